"""crops.py against torchvision; what a GPU cuts is in test_device_decode.py."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as v1

from reading.crops import BLUR_RADIUS, Colours, Crop, cut, draw_crop, turned
from utils import Turns


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("layout", ["channels innermost", "channels outermost"])
@pytest.mark.parametrize("box", [(0, 0, 60, 80), (3, 7, 41, 50), (10, 0, 50, 33), (59, 79, 1, 1), (5, 5, 20, 24)])
def test_a_crop_is_that_of_torchvision_on_a_pillow_image_within_rounding(box, layout, mode):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if layout == "channels outermost":
        pixels = pixels.contiguous()
    resized = v1.resized_crop(image, *box, [56, 56], v1.InterpolationMode(mode))
    for flip, oracle in ((False, resized), (True, v1.hflip(resized))):
        crop = cut(pixels, Crop(*box, flip=flip), 56, mode)
        assert (crop.dtype, crop.shape) == (torch.uint8, (3, 56, 56))
        error = (crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(oracle)).__abs__()
        assert error.max() <= 1, "more than rounding"
        assert error.mean() < 0.1, "systematically different"
    if layout == "channels innermost" and box[2] > 1:
        assert crop.permute(1, 2, 0).is_contiguous(), "torch transposed the crop"


def test_boxes_and_flips_are_distributed_like_those_of_torchvision():
    drawn = [draw_crop(500, 375, (0.3, 1.0), True, 0, key) for key in range(4000)]
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    reference = np.array([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.array([[crop.top, crop.left, crop.height, crop.width] for crop in drawn])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 375).all()
    assert (ours[:, 1] + ours[:, 3] <= 500).all()
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], reference[:, column]).pvalue > 1e-3, name
    areas = [boxes[:, 2] * boxes[:, 3] for boxes in (ours, reference)]
    ratios = [boxes[:, 3] / boxes[:, 2] for boxes in (ours, reference)]
    assert ks_2samp(*areas).pvalue > 1e-3
    assert ks_2samp(*ratios).pvalue > 1e-3
    flips = np.array([crop.flip for crop in drawn])
    assert abs(flips.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(flips, ours[:, 1])[0, 1]) < 0.06, "the flip depends on the box"
    assert drawn[7] == draw_crop(500, 375, (0.3, 1.0), True, 0, 7), "not a function of the key"
    unflipped = [draw_crop(500, 375, (0.3, 1.0), False, 0, key) for key in range(50)]
    assert not any(crop.flip for crop in unflipped)
    assert [replace(crop, flip=False) for crop in drawn[:50]] == unflipped, "do_hflip moves the box"


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (1, 1), (1, 50), (7, 3)])
def test_of_an_image_that_no_box_fits_the_middle_is_taken_as_torchvision_does(size):
    width, height = size
    torch.manual_seed(0)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    crop = draw_crop(width, height, (1.0, 1.0), True, 0)
    assert (crop.top, crop.left, crop.height, crop.width) == tuple(expected)


def test_so_many_crops_lose_their_colours_and_so_many_are_blurred():
    crop = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).permute(2, 0, 1)
    image = Image.fromarray(crop.permute(1, 2, 0).numpy())
    colours, kinds, radii = Colours(grayscale=0.2, blur=0.5), [], []
    for key in range(600):
        changed = colours(crop, 0, key)
        assert torch.equal(changed, colours(crop, 0, key)), "not a function of the key"
        assert (changed.dtype, changed.shape) == (torch.uint8, crop.shape)
        assert changed.permute(1, 2, 0).is_contiguous()
        is_grey = bool((changed[0] == changed[1]).all() and (changed[1] == changed[2]).all())
        sharp = np.asarray(image.convert("L").convert("RGB") if is_grey else image)
        is_blurred = not np.array_equal(changed.permute(1, 2, 0).numpy(), sharp)
        kinds.append((is_grey, is_blurred))
        if is_blurred and not is_grey:
            radii.append(float(changed.float().std()))
    grey, blurred = np.array(kinds).T
    assert abs(grey.mean() - 0.2) < 0.05
    # The smallest radii round to no change.
    assert abs(blurred.mean() - 0.5) < 0.08
    assert abs(np.corrcoef(grey, blurred)[0, 1]) < 0.1, "grey crops are blurred more often"
    limits = [np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(float).std() for radius in BLUR_RADIUS]
    assert limits[1] - 1 < min(radii) < max(radii) < limits[0] + 1
    assert not Colours(grayscale=0.0, blur=0.0).change_anything
    assert all(Colours(grayscale=0.0, blur=0.0)(crop, 0, key) is crop for key in range(50))


def test_crops_are_turned_as_asked_for_in_every_way_alike_without_moving():
    pixels = (
        torch.arange(3 * 30 * 40, dtype=torch.int64).remainder(251).to(torch.uint8).view(30, 40, 3).permute(2, 0, 1)
    )
    seen = {}
    for do_vflip in (False, True):
        for do_turns in (False, True):
            ways = []
            for key in range(400):
                box = draw_crop(40, 30, (0.3, 1.0), False, 0, key)
                crop = turned(box, Turns(do_vflip, do_turns), 0, key)
                assert replace(crop, vflip=False, turns=0) == box, "turning moves the box"
                ways.append((crop.vflip, crop.turns))
                if key < 20:
                    expected = cut(pixels, box, 8)
                    expected = expected.flip(1) if crop.vflip else expected
                    actual = cut(pixels, crop, 8)
                    assert torch.equal(actual, torch.rot90(expected, crop.turns, (1, 2)))
                    assert actual.stride(0) == 1, "channels are innermost"
            seen[do_vflip, do_turns] = Counter(ways)
    assert {key: len(ways) for key, ways in seen.items()} == {
        (False, False): 1, (True, False): 2, (False, True): 4, (True, True): 8,
    }  # fmt: skip
    assert min(seen[True, True].values()) > 25, "ways are as likely as each other"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_turned_crop_is_what_quarter_turns_against_the_clock_make_of_it(dtype):
    """A bright corner at the upper left goes to the lower left."""
    pixels = torch.zeros(1 if dtype == torch.float32 else 3, 16, 16, dtype=dtype)
    pixels[:, :8, :8] = 1 if dtype == torch.float32 else 255
    corners = {}
    for turns in range(4):
        found = cut(pixels, Crop(0, 0, 16, 16, flip=False, turns=turns), 4)[0]
        corners[turns] = [bool(found[y, x] == found.max()) for y, x in ((0, 0), (3, 0), (3, 3), (0, 3))].index(True)
    assert corners == {0: 0, 1: 1, 2: 2, 3: 3}
