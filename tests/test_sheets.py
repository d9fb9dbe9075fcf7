"""sheets.py, and what each method and task draws on a contact sheet."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_classification
import finetune_detection
import finetune_segmentation
import sheets
import train_cae
import train_capi
import train_ijepa
from data import Batch, normalize
from masking import InverseBlock, MaskPlan, MultiBlockMasks, MultiBlockPlan, PatchMasks
from sheets import NUM_IMAGES, TILE, VALUE_RANGE, Column, as_rgb, class_colours, mask_column, normalised_column
from training import write_contact_sheet

PATCH = 4
CFG: Any = SimpleNamespace(model=SimpleNamespace(patch_size=PATCH))


def noise(b: int, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    # None is black, so that nothing visible looks hidden.
    return torch.randint(100, 256, (b, c, h, w), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def batch_of(images: torch.Tensor, masks: Any = None, **kwargs: Any) -> Batch:
    drawn = {} if masks is None else masks([(row,) for row in range(len(images))])
    return Batch(images, drawn, torch.arange(len(images)), **kwargs)


def roles(picture: np.ndarray, crop: torch.Tensor) -> torch.Tensor:
    """What a mask picture says of each patch, by its pixels alone: 2 visible, 1 orange, 0 dark."""
    squares = torch.from_numpy(picture).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).float()
    same = (squares == crop.movedim(0, -1).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)).flatten(2).all(-1)
    red, _, blue = squares.mean((-1, -2)).unbind(-1)
    return torch.where(same, 2, (red - blue > 100).long())


CAPI_MASKS = PatchMasks(MaskPlan(8, 8, 0.6, 0.5), InverseBlock(), 0)
BLOCKS = MultiBlockPlan(
    8, 8, num_contexts=1, num_targets=4, context_scale=(0.85, 1.0), target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5),
    min_keep=2, allow_overlap=False, context_patches=None, cut_from_below=True,
    reach_border=False, independent_aspect=False,
)  # fmt: skip


@pytest.mark.parametrize("script", [train_capi, train_cae])
def test_sheets_show_the_masks_of_the_batch_image_by_image(script):
    images = noise(NUM_IMAGES + 2)
    batch = batch_of(images, CAPI_MASKS, second_images=noise(NUM_IMAGES + 2, h=16, w=16))
    column, *others = script.look(CFG, batch, NUM_IMAGES)
    expected = torch.zeros(len(images) * 64, dtype=torch.long)
    expected[batch.masks["predict_indices"]] = 1
    expected[batch.masks["visible_indices"]] = 2
    shown = torch.stack([roles(p, crop) for p, crop in zip(column.pictures, images[:NUM_IMAGES], strict=True)])
    assert torch.equal(shown, expected.view(-1, 8, 8)[:NUM_IMAGES])
    assert [len(other.pictures) for other in others] == ([NUM_IMAGES] if script is train_cae else [])


def test_sheets_show_contexts_and_all_targets_of_blocks():
    images = noise(5)
    batch = batch_of(images, MultiBlockMasks(BLOCKS, 0))
    (column,) = train_ijepa.look(CFG, batch, 3)
    for number in range(3):
        expected = torch.zeros(64, dtype=torch.long)
        expected[batch.masks["target_indices"][:, number].flatten()] = 1
        expected[batch.masks["context_indices"][0, number]] = 2
        assert torch.equal(roles(column.pictures[number], images[number]), expected.view(8, 8))


def test_masks_fit_images_that_are_not_square():
    images = noise(1, h=8, w=24)
    visible = torch.zeros(1, 2, 6, dtype=torch.bool)
    visible[0, 1, 5] = True
    (picture,) = mask_column(images, visible, torch.zeros_like(visible)).pictures
    assert torch.equal(roles(picture, images[0]), 2 * visible[0].long())


def test_wrong_statistics_are_seen_and_right_ones_look_like_the_crop():
    images = noise(2)
    right = np.stack(normalised_column(normalize(images)).pictures)
    assert np.corrcoef(right.ravel(), images.movedim(1, -1).numpy().ravel())[0, 1] > 0.95
    for wrong, cause in (({"mean": (2.0, 2.0, 2.0)}, "mean"), ({"std": (20.0, 20.0, 20.0)}, "deviation")):
        seen = np.stack(normalised_column(normalize(images, **wrong)).pictures)
        assert seen.mean() < 5 or seen.std() < 5, f"a wrong {cause} looks as if nothing was wrong"
    values = torch.tensor([-9.0, -VALUE_RANGE, 0.0, VALUE_RANGE, torch.nan]).view(1, 1, 1, 5)
    assert normalised_column(values).pictures[0][0, :, 0].tolist() == [0, 0, 128, 255, 0]


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
def test_images_of_any_bands_and_depth_are_drawn(bands):
    images = noise(2, bands)
    pictures = np.stack(as_rgb(images))
    assert pictures.shape == (2, 32, 32, 3)
    expected = images[:, :3] if bands >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    assert (pictures == expected.movedim(1, -1).numpy()).all()
    deep = np.stack(as_rgb(images.float() * 7 - 1000))
    assert (deep.min(), deep.max()) == (0, 255)


@pytest.mark.parametrize("num_columns", [1, 2, 3, 9])
def test_every_picture_has_its_place_on_the_sheet(num_columns, tmp_path):
    colours = np.random.default_rng(0).permutation(200)[: num_columns * 5].reshape(num_columns, 5)
    captions = ["word " * 90, "", "\u4e2d", "<", "w" * 90]
    columns = [
        Column("t" * 300, [np.full((7, 14, 3), (colour, 255, 0), np.uint8) for colour in own], captions)
        for own in colours
    ]
    sheets.write_sheet(tmp_path / "sheet.png", columns, ["a heading " * 80])
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image)
    counts = np.bincount(pixels[(pixels[..., 1] == 255) & (pixels[..., 2] == 0)][:, 0])
    assert {colour: counts[colour] for colour in counts.nonzero()[0]} == dict.fromkeys(colours.flat, TILE * TILE // 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_of_a_small_batch_has_all_of_it(tmp_path):
    words = write_contact_sheet(tmp_path / "a.png", batch_of(noise(3)), lambda *_: [], normalize, "here")
    assert words.startswith("3 crops; normalised: mean 1.") and (tmp_path / "a.png").is_file()


def test_fine_tuning_names_classes_and_draws_labels():
    images = noise(3)
    cfg: Any = SimpleNamespace(classes=["cat", "dog", "emu"])
    batch = batch_of(images, labels={"label": torch.tensor([2, 0, 1])})
    (column,) = finetune_classification.look(cfg, batch, 2)
    assert (column.pictures, column.captions) == ([], ["emu", "cat"])

    labels = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    labels[0, :20], labels[0, 20:] = 1, 2
    (column,) = finetune_segmentation.look(cfg, batch_of(images, labels={"label": labels}), 2)
    assert column.captions == ["dog, emu", "nothing labelled"]
    assert (column.pictures[1] == 255).all() and len(np.unique(column.pictures[0].reshape(-1, 3), axis=0)) == 2

    objects = {
        "boxes": torch.tensor([[4.0, 6.0, 20.0, 30.0], [0.0, 0.0, 9.0, 9.0]]),
        "class": torch.tensor([0, 2]),
        "image": torch.tensor([0, 2]),
    }
    (column,) = finetune_detection.look(cfg, batch_of(images, labels=objects), 2)
    assert column.captions == ["1 cat", "no objects"]
    changed = (column.pictures[0] != images[0].movedim(0, -1).numpy()).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (4, 6, 20, 30)
    assert not changed[8:28, 6:18].any(), "what is in a box without a mask stays as it is"
    assert (column.pictures[1] == images[1].movedim(0, -1).numpy()).all()


def test_classes_beside_each_other_have_other_colours_and_no_class_is_white():
    colours = class_colours(torch.arange(-1, 41), 40)
    assert (colours[[0, -1]] == 255).all()
    assert len(colours[1:-1].unique(dim=0)) == 40
    assert (colours[1:-2].int() - colours[2:-1].int()).abs().amax(dim=1).min() > 50
