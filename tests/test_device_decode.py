"""speed/device_decode.py: files leave the workers, and the device makes of them what a CPU would have made."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_forked, run_main, tiny
from conftest import ROOT
from PIL import Image
from samples import encode, make_config, photo
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as v1

from data import DevicePrefetcher, check_decode
from reading.crops import Crop
from reading.sources import BadImageError, Sample, as_bytes_tensor, decode_image, jpeg_decoder, silent_decoders
from speed import device_decode
from speed.device_decode import EncodedCrop, EncodedCrops, crop_or_file, cut_together
from train_capi import make_loader
from utils import UserError

GPU = ("data.decode=gpu", "data.max_bad_fraction=1.0")


def seen(loader, count):
    """Identity and pixels of the images of the next batches."""
    batches = [next(loader) for _ in range(count)]
    return [(batch.sample_ids.tolist(), batch.images.tolist()) for batch in batches]


# ------------------------------------------------------------------------------------------------ in the workers


def test_without_decoding_on_the_device_nothing_of_it_is_imported(jpegs):
    code = """
        import sys
        from train_capi import make_loader
        from samples import make_config
        with make_loader(make_config("data.dataset=%s", "data.max_bad_fraction=1.0")) as loader:
            next(loader)
        assert "speed.device_decode" not in sys.modules
    """
    done = run_forked("-c", textwrap.dedent(code) % jpegs, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]


def jpeg_kinds():
    """JPEG files of many kinds, and other files, by name."""
    kinds = {
        **{f"plain, {options}": encode(photo(1, 61, 47), "JPEG", **options) for options in (
            {}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"keep_rgb": True},
        )},
        "plain, 1x1": encode(Image.new("RGB", (1, 1)), "JPEG"),
        "progressive": encode(photo(1, 61, 47), "JPEG", progressive=True),
        "grey": encode(photo(2, 61, 47).convert("L"), "JPEG"),
        "cmyk": encode(photo(2, 61, 47).convert("CMYK"), "JPEG"),
        "png": encode(photo(3)),
    }  # fmt: skip
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = 2 <= orientation <= 8
        kinds[f"{'turned' if turned else 'plain'}, {orientation}"] = encode(photo(5, 33, 18), "JPEG", exif=exif)
    return kinds


def whole(width, height):
    return Crop(0, 0, height, width, flip=False)


def test_only_plain_colour_jpegs_that_are_upright_are_left_to_a_gpu():
    for name, content in jpeg_kinds().items():
        sample = Sample(name, lambda content=content: content)
        with silent_decoders():
            made = crop_or_file(sample, whole, lambda width, height: 1, 16)
        assert isinstance(made, EncodedCrop) == name.startswith("plain"), name
        if isinstance(made, EncodedCrop):
            image = decode_image(content)
            assert (made.name, made.data, made.box) == (name, content, whole(*image.size)), name
            with silent_decoders():
                (pixels,) = jpeg_decoder()([as_bytes_tensor(content)], mode="RGB")
            np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(image), err_msg=name)
    cut_off = encode(photo(1, 61, 47), "JPEG")[:-2]
    with pytest.raises(BadImageError, match=r"^cut off: "), silent_decoders():
        crop_or_file(Sample("cut off", lambda: cut_off), whole, lambda width, height: 1, 16)


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_a_box_is_drawn_in_the_image_that_a_cpu_would_decode_and_covers_the_same_part_of_the_whole_one(divisor):
    content = encode(photo(0, 61, 47), "JPEG")
    sizes = []

    def draw(width, height):
        sizes.append((width, height))
        return Crop(1, 2, height - 1, width - 2, flip=True)

    made = crop_or_file(Sample("x", lambda: content), draw, lambda width, height: divisor, 16)
    assert sizes == [decode_image(content, lambda width, height: divisor).size]
    assert made.box == Crop(divisor, 2 * divisor, 47 - divisor, 61 - 2 * divisor, flip=True)


def test_plain_jpegs_leave_the_workers_as_files_and_the_rest_as_crops(jpegs):
    loader = make_loader(make_config(f"data.dataset={jpegs}", *GPU))
    names = [Path(path).name for path in loader.dataset.paths]
    with silent_decoders():
        made = {
            name: loader.maker.make(loader.dataset[index], index)
            for index, name in enumerate(names)
            if name != "cut.jpg"
        }
    encoded = {name for name, crop in made.items() if not torch.is_tensor(crop)}
    assert encoded == {"plain.jpg", "tall.jpg", "large.jpg"}
    batch = loader.maker.batch(list(made.values()), [(i,) for i in range(len(made))], list(range(len(made))), [])
    assert len(batch.images) == 5
    assert batch.encoded.names == [str(jpegs / name) for name in made if name in encoded]
    assert len(batch.encoded.blob) == sum((jpegs / name).stat().st_size for name in encoded)


# ------------------------------------------------------------------------------------------------ on the device


def noise(seed, height, width):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


BOXES = [(0, 0, 60, 80), (3, 7, 41, 50), (10, 0, 50, 33), (59, 79, 1, 1), (5, 5, 20, 24), (0, 3, 60, 2), (1, 0, 3, 79)]


def test_crops_are_those_of_torchvision_on_pillow_images_within_rounding():
    pixels = [noise(seed, 60, 80) for seed, _ in enumerate(BOXES)]
    for flip in (False, True):
        (crops,) = cut_together(pixels, [Crop(*box, flip=flip) for box in BOXES], 56)
        assert (crops.dtype, crops.shape) == (torch.uint8, (len(BOXES), 3, 56, 56))
        for crop, image, box in zip(crops, pixels, BOXES, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            oracle = v1.resized_crop(picture, *box, [56, 56], v1.InterpolationMode.BICUBIC)
            oracle = np.asarray(v1.hflip(oracle) if flip else oracle)
            error = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - oracle)
            # Pillow rounds and clips between the two directions, which shows in noise: floats overshoot there.
            assert error.max() <= 16, f"{box}: more than rounding"
            assert error.mean() < 0.4, f"{box}: systematically different"


@pytest.mark.parametrize(("most_values", "size"), [(1, (56, 56)), (100_000, (30, 91)), (2**25, (64, 40))])
def test_crops_that_are_cut_together_are_those_of_torch_one_by_one_but_for_ties(most_values, size, monkeypatch):
    monkeypatch.setattr(device_decode, "PADDED_VALUES", most_values)
    random = np.random.default_rng(0)
    pixels, boxes, expected = [], [], []
    for number in range(24):
        height, width = random.integers(1, 300, 2).tolist()
        h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        pixels.append(noise(number, height, width))
        boxes.append(Crop(top, left, h, w, flip=number % 2 == 0))
        part = pixels[-1][None, :, top : top + h, left : left + w].float()
        one = interpolate(part, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()[0]
        expected.append(one.flip(-1) if number % 2 == 0 else one)
    actual = cut_together(pixels, boxes, size)
    assert len(actual) == {1: 24, 2**25: 1}.get(most_values, len(actual)), "batches are not as large as they may be"
    difference = (torch.cat(actual).int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4, "more than values halfway between two grey levels"


def test_few_launches_cut_many_crops():
    """On a GPU each operator that is no view is a launch at least; one by one, it was six or seven for each image."""
    pixels = [noise(0, 60, 80)] * 100
    with Launches() as launches:
        cut_together(pixels, [Crop(*BOXES[number % 7], flip=False) for number in range(100)], 56)
    assert launches.number < 150


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def test_decoding_on_the_device_gives_the_same_crops_masks_and_replacements(jpegs):
    dataset = f"data.dataset={jpegs}"
    with make_loader(make_config(dataset, GPU[1], batch_size=12)) as on_cpu, \
         make_loader(make_config(dataset, *GPU, batch_size=12)) as on_device:  # fmt: skip
        names = [Path(path).name for path in on_cpu.dataset.paths]
        for _ in range(4):
            expected, actual = next(on_cpu), next(on_device)
            assert actual.encoded is None
            for field in ("sample_ids", "masks", "bad"):
                assert str(getattr(actual, field)) == str(getattr(expected, field)), field
            error = (actual.images.int() - expected.images.int()).abs().float().mean((1, 2, 3))
            for index, difference in zip(expected.sample_ids.tolist(), error.tolist(), strict=True):
                # The large one is shrunk in one go here, and by the JPEG decoder and then in another there.
                assert difference < (3 if names[index] == "large.jpg" else 0.5), names[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_decodes_on_the_device_resumes_exactly(jpegs, workers):
    config = make_config(f"data.dataset={jpegs}", *GPU, batch_size=5, workers=workers)
    with make_loader(make_config(f"data.dataset={jpegs}", *GPU, batch_size=5)) as loader:
        straight = seen(loader, 8)
    with make_loader(config) as loader:
        start = seen(loader, 3)
        position = json.loads(json.dumps(loader.state_dict()))
    with make_loader(config, position=position) as loader:
        assert start + seen(loader, 5) == straight


def test_a_jpeg_that_shows_its_damage_on_the_device_is_replaced_within_the_batch_and_named(tmp_path):
    good = encode(photo(0, 90, 70), "JPEG")
    damaged = bytearray(good)
    damaged[good.index(b"\xff\xc4") + 3] = 1  # a Huffman table that is too short; header and end stay whole
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(damaged if index == 2 else encode(photo(index, 90, 70), "JPEG"))
    overrides = (f"data.dataset={tmp_path}", *GPU)
    path = tmp_path / "bad.jsonl"
    with make_loader(make_config(*overrides, batch_size=5), bad_files_path=path) as loader:
        batch = next(loader)
        position = loader.state_dict()
    assert (position["bad"], position["seen"]) == (1, 6)
    assert [name for name, _ in batch.bad] == [str(tmp_path / "2.jpg")]
    assert str(tmp_path / "2.jpg") in path.read_text()
    row = batch.sample_ids.tolist().index(2)
    assert torch.equal(batch.images[row], batch.images[row - 1]), "not the one before it, or of the first the last"
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(damaged)
    with pytest.raises(UserError, match=r"5 images in a row cannot be read, last .*\.jpg: "), \
         make_loader(make_config(*overrides, batch_size=5)) as loader:  # fmt: skip
        next(loader)


def test_decoding_on_a_gpu_without_one_is_refused_with_key_and_remedy(folder, tmp_path, monkeypatch, capsys):
    assert run_main(tiny(folder, tmp_path / "run", "data.decode=gpu")) == 2
    message = "error: data.decode=gpu: needs a CUDA device, this run is on cpu; use data.decode=cpu"
    assert message in capsys.readouterr().err
    monkeypatch.setattr(device_decode, "jpeg_decoder", lambda: None)
    with pytest.raises(UserError, match="the package torchcodec is not installed"):
        check_decode("gpu", torch.device("cuda"))
    with pytest.raises(UserError, match=r"data\.decode='tpu': must be one of cpu, gpu"):
        make_config("data.decode=tpu")


@pytest.mark.gpu
def test_a_gpu_decodes_the_crops_of_the_cpu_but_for_the_rounding_of_colours(jpegs):
    dataset, device = f"data.dataset={jpegs}", torch.device("cuda")
    check_decode("gpu", device)
    with make_loader(make_config(dataset, GPU[1], batch_size=12)) as on_cpu, \
         make_loader(make_config(dataset, *GPU, batch_size=12), decode_device=device) as loader:  # fmt: skip
        batches = DevicePrefetcher(loader, device)
        for _ in range(3):
            expected, actual = next(on_cpu), next(batches)
            assert actual.images.is_cuda
            assert actual.sample_ids.tolist() == expected.sample_ids.tolist()
            error = (actual.images.cpu().int() - expected.images.int()).abs().float().mean((1, 2, 3))
            assert error.max() < 5, "another box, orientation or colour"


@pytest.mark.gpu
def test_a_gpu_decodes_nothing_into_memory_that_queued_work_still_reads(monkeypatch):
    """The crops of one batch are still queued when the next one is decoded, and the pixels they read are freed."""
    device, content = torch.device("cuda"), encode(photo(0, 640, 480), "JPEG", quality=90)
    crops = EncodedCrops.pack([EncodedCrop("x", content, whole(640, 480))] * 8)
    idle, places = [], set()

    def decode_jpeg(*args, **kwargs):
        idle.append(torch.cuda.current_stream().query())
        decoded = jpeg_decoder()(*args, **kwargs)
        places.update(pixels.data_ptr() for pixels in decoded)
        return decoded

    monkeypatch.setattr(device_decode, "jpeg_decoder", lambda: decode_jpeg)
    with torch.cuda.stream(torch.cuda.Stream()):
        crops.decode(torch.empty(0, 3, 56, 56, dtype=torch.uint8), device)  # libraries load
        places.clear()
        freed = [torch.full((3, 480, 640), 7, dtype=torch.uint8, device=device) for _ in range(8)]
        before = {pixels.data_ptr() for pixels in freed}
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        sums = torch.stack([pixels.sum() for pixels in freed])
        del freed
        crops.decode(torch.empty(0, 3, 56, 56, dtype=torch.uint8), device)
        assert before & places, "the memory was not used again: this test shows nothing"
        assert sums.tolist() == [7 * 3 * 480 * 640] * 8, "overwritten while it was still to be read"
    assert idle[-1], "the decoder was started beside work on its stream, for which TorchCodec 0.16 does not wait"
