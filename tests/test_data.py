import copy
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, features

import data
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from data import (
    BadImageError,
    DevicePrefetcher,
    ImageDataset,
    ImageStream,
    PretrainLoader,
    Sample,
    decode_image,
    derive_seed,
    largest_divisor,
    make_dataset,
    merge_positions,
    normalize,
    parse_data_url,
)
from utils import UserError


def make_config(*overrides, batch_size=4, workers=0):
    return load_config(
        CapiConfig,
        DEFAULT_PRETRAIN_CONFIG,
        [
            "data.images_size=56",
            "data.prediction_subsampling=0.3",
            f"optim.batch_size_per_gpu={batch_size}",
            f"efficiency.dataloader_num_workers={workers}",
            "efficiency.cache_dataset=false",
            "data.dataset=none",
            *overrides,
        ],
    )


def encode(image, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def photo(seed, width=80, height=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


class MemoryDataset(ImageDataset):
    def __init__(self, size, bad=()):
        self.files = [b"not an image" if index in bad else encode(photo(index)) for index in range(size)]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Sample(f"image {index}", lambda: self.files[index])


class MemoryStream(ImageStream):
    """Shards of samples; the name of a sample is its number over all shards."""

    def __init__(self, *sizes, bad=()):
        self.num_shards = len(sizes)
        self.firsts = np.cumsum([0, *sizes]).tolist()
        self.bad = bad
        self.png = encode(photo(0))

    def read_shard(self, shard, start=0):
        for number in range(self.firsts[shard] + start, self.firsts[shard + 1]):
            yield Sample(f"sample {number}", lambda number=number: b"bad" if number in self.bad else self.png)


def fingerprint(batch):
    """Everything that training sees of a batch."""
    assert batch.images.dtype == torch.uint8
    return (
        batch.sample_ids.tolist(),
        hashlib.sha256(batch.images.numpy().tobytes()).hexdigest(),
        batch.visible_indices.tolist(),
        batch.predict_indices.tolist(),
    )


def take(loader, count):
    with loader:
        return [fingerprint(next(loader)) for _ in range(count)]


def ids(loader, count):
    with loader:
        return [index for _ in range(count) for index in next(loader).sample_ids.tolist()]


def through_json(position):
    return json.loads(json.dumps(position))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "nested" / "deep").mkdir(parents=True)
    for index in range(10):
        parent = (root, root / "nested", root / "nested" / "deep")[index % 3]
        (parent / f"{index}.png").write_bytes(encode(photo(index)))
    return root


# ---------------------------------------------------------------------------------------------- data URLs


@pytest.mark.parametrize(
    ("text", "source", "name", "kwargs"),
    [
        ("torchvision://ImageFolder?root='/a/b'", "torchvision", "ImageFolder", {"root": "/a/b"}),
        ("hf://org/name?split='train'&streaming=True", "hf", "org/name", {"split": "train", "streaming": True}),
        ("custom://ADE20K", "custom", "ADE20K", {}),
        ("custom://ADE20K?", "custom", "ADE20K", {}),
        ("custom://Images?root='/a&b=c?d'", "custom", "Images", {"root": "/a&b=c?d"}),
        ('custom://Images?root="it\'s & it"&x=1', "custom", "Images", {"root": "it's & it", "x": 1}),
        (r"a://b?x='\'&\''&y='\\'", "a", "b", {"x": "'&'", "y": "\\"}),
        ("a://b?x=[1, 'p&q']&y={'k=v': None}&z=-1.5e3", "a", "b", {"x": [1, "p&q"], "y": {"k=v": None}, "z": -1500.0}),
        ("hf://webdataset?data_files='hf://datasets/o/n/*.tar'", "hf", "webdataset", {"data_files": "hf://datasets/o/n/*.tar"}),
        ("a://b?x=(3,32,32)&y= 2", "a", "b", {"x": (3, 32, 32), "y": 2}),
        ("/data/images?x=1", "custom", "Images", {"root": "/data/images?x=1"}),
    ],
)  # fmt: skip
def test_a_data_url_is_split_into_source_name_and_literals(text, source, name, kwargs):
    url = parse_data_url(text)
    assert (url.source, url.name, url.kwargs) == (source, name, kwargs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://a/b?split=train", "quote text: split='train'"),
        ("hf://a/b?split='train", "is not a Python literal"),
        ("hf://a/b?split", "'split' is not key=value"),
        ("hf://a/b?split='a'&&x=1", "'' is not key=value"),
        ("hf://a/b?split='a'&split='b'", "split is given twice"),
        ("custom://Images?root=__import__('os').getcwd()", "is not a Python literal"),
        ("custm://ADE20K", "unknown source custm://; did you mean custom?"),
        ("s3://bucket/x", "unknown source s3://; there are: custom, hf, torchvision"),
        ("custom://ade20k?split='training'", "unknown name ade20k; did you mean ADE20K?"),
        ("custom://ImageNet", "unknown name ImageNet"),
        ("custom://Images", "needs root='/path/of/a/folder'"),
        ("custom://Images?path='/x'", "unknown argument path; there are: root"),
        ("custom://ADE20K?split='train'", "needs split= one of 'training', 'validation'"),
        ("custom://VOC2012", "needs split= one of 'train', 'val', 'trainaug'"),
        ("torchvision://ImagFolder", "no dataset ImagFolder; did you mean ImageFolder?"),
        ("torchvision://VisionDataset", "no dataset VisionDataset"),
        ("torchvision://FakeData?sizes=3", "unknown argument sizes; did you mean size?"),
        ("torchvision://ImageFolder?root='/no/such/folder'", "/no/such/folder"),
        ("hf://parquet?data_files='x.parquet'&split='train'&trust_remote_code=True", "never run"),
        ("/no/such/folder", "the folder /no/such/folder does not exist"),
        (str(Path(__file__)), "is not a folder"),
    ],
)
def test_a_wrong_data_url_is_refused_with_key_value_and_remedy(text, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        make_dataset(text)
    assert str(error.value).startswith(f"data.dataset={text}: "), error.value
    assert message in str(error.value)


def test_the_message_names_the_key_it_is_given():
    with pytest.raises(UserError, match=r"^train_dataset=x://y: "):
        make_dataset("x://y", key="train_dataset")


# ------------------------------------------------------------------------------------ folders of images


def test_every_image_below_a_folder_is_found_in_sorted_order(folder, tmp_path):
    root = tmp_path / "root"
    for name in ("b.JPG", "a.jpeg", "z/y.Png", "z/.hidden.png", ".git/x.png", "notes.txt", "c.tiff", "d.gif", "e.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "folder.png").mkdir()
    (root / "broken.png").symlink_to(root / "nowhere.png")
    (root / "linked.png").symlink_to(folder / "0.png")
    found = make_dataset(str(root))
    names = [str(Path(found[index].name).relative_to(root)) for index in range(len(found))]
    assert names == ["a.jpeg", "b.JPG", "c.tiff", "d.gif", "e.webp", "linked.png", "z/y.Png"]
    same = make_dataset(f"custom://Images?root='{root}'")
    assert [same[index].name for index in range(len(same))] == [found[index].name for index in range(len(found))]


def test_links_to_folders_are_followed_once_and_cycles_end(folder, tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "1.png").touch()
    (root / "real" / "up").symlink_to(root)
    (root / "again").symlink_to(root / "real")
    (root / "self").symlink_to(root / "self")
    (root / "elsewhere").symlink_to(folder)
    found = make_dataset(str(root))
    names = [str(Path(found[index].name).relative_to(root)) for index in range(len(found))]
    assert "real/1.png" in names, "the real folder comes before a link to it"
    assert len(names) == 11, names
    assert sum(name.startswith("elsewhere/") for name in names) == 10


def test_names_that_are_not_utf8_can_be_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(path, "wb") as file:  # noqa: PTH123  # pathlib takes no bytes
        file.write(encode(photo(0)))
    sample = make_dataset(str(tmp_path))[0]
    assert sample.image().size == (80, 60)
    assert os.fsencode(json.loads(json.dumps(sample.name))) == path


def test_a_folder_without_images_is_refused_with_the_extensions_that_count(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(UserError, match=r"no images below .*\.jpg \.jpeg \.png"):
        make_dataset(str(tmp_path))


def _age(root):
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def test_the_listing_is_cached_until_a_folder_changes(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "cache"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "1.png").touch()
    (root / "2.png").touch()
    listings = []
    original = data._list_images
    monkeypatch.setattr(data, "_list_images", lambda root: listings.append(root) or original(root))

    def names():
        found = make_dataset(str(root), listing_cache=cache)
        return [Path(found[index].name).name for index in range(len(found))]

    assert names() == ["2.png", "1.png"]
    assert not cache.exists(), "a folder that was changed just now must not be cached"
    _age(root)
    assert names() == names() == names() == ["2.png", "1.png"]
    assert len(listings) == 2, "the cache was not used"
    (root / "sub" / "3.png").touch()
    assert names() == ["2.png", "1.png", "3.png"], "a new file in a folder below was not seen"
    _age(root)
    names()
    listings.clear()
    assert names() == ["2.png", "1.png", "3.png"]
    assert not listings
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:50])
    assert names() == ["2.png", "1.png", "3.png"]
    assert listings, "a damaged cache file was used"
    (root / "sub" / "1.png").unlink()
    (root / "sub" / "3.png").unlink()
    (root / "sub").rmdir()
    assert names() == ["2.png"]


def test_the_loader_caches_the_listing_when_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _age(folder)
    for switch in ("false", "true"):
        PretrainLoader(make_config(f"data.dataset={folder}", f"efficiency.cache_dataset={switch}")).close()
        assert bool(list(tmp_path.rglob("*.npz"))) == (switch == "true")


# ------------------------------------------------------------------------------------------------ decoding

RED = (200, 30, 40)


def jpeg_cmyk():
    # 0 of cyan and full magenta and yellow is red.
    return encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)


def grey16(kind, mode):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16 if mode == "I;16" else np.int32).reshape(8, 8)
    return encode(Image.fromarray(ramp), kind)


def palette_png(transparent):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, *RED, *[0] * 750])
    image.putpixel((0, 0), 0)
    return encode(image, "PNG", **({"transparency": 0} if transparent else {}))


@pytest.mark.parametrize(
    ("name", "content", "expected", "tolerance"),
    [
        ("rgb png", encode(Image.new("RGB", (5, 4), RED)), {(0, 0): RED}, 0),
        ("1x1", encode(Image.new("RGB", (1, 1), RED), "JPEG"), {(0, 0): RED}, 12),
        ("grey", encode(Image.new("L", (4, 4), 77)), {(1, 1): (77, 77, 77)}, 0),
        ("black and white", encode(Image.new("1", (4, 4), 1)), {(1, 1): (255, 255, 255)}, 0),
        ("cmyk jpeg", jpeg_cmyk(), {(4, 4): (255, 0, 0)}, 8),
        ("16-bit png", grey16("PNG", "I;16"), {(0, 0): (0, 0, 0), (7, 7): (255,) * 3, (0, 4): (130,) * 3}, 1),
        ("16-bit tiff", grey16("TIFF", "I;16"), {(0, 0): (0, 0, 0), (7, 7): (255,) * 3, (0, 4): (130,) * 3}, 1),
        ("32-bit tiff", grey16("TIFF", "I"), {(0, 0): (0, 0, 0), (7, 7): (255,) * 3, (0, 4): (130,) * 3}, 1),
        ("float tiff", encode(Image.new("F", (4, 4), 0.5), "TIFF"), {(0, 0): (128,) * 3}, 1),
        ("dark 16-bit png", encode(Image.fromarray(np.full((4, 4), 257, np.uint16))), {(0, 0): (1, 1, 1)}, 0),
        ("rgba opaque", encode(Image.new("RGBA", (4, 4), (*RED, 255))), {(0, 0): RED}, 0),
        ("rgba clear", encode(Image.new("RGBA", (4, 4), (*RED, 0))), {(0, 0): (255, 255, 255)}, 0),
        ("rgba half", encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), {(0, 0): (127,) * 3}, 1),
        ("grey and alpha", encode(Image.new("LA", (4, 4), (9, 0))), {(0, 0): (255, 255, 255)}, 0),
        ("palette", palette_png(transparent=False), {(0, 0): (0, 0, 255), (1, 1): RED}, 0),
        ("palette with a clear colour", palette_png(transparent=True), {(0, 0): (255, 255, 255), (1, 1): RED}, 0),
        ("gif", encode(Image.new("P", (4, 4), 0), "GIF"), {}, 0),
        ("bmp", encode(Image.new("RGB", (4, 4), RED), "BMP"), {(0, 0): RED}, 0),
        ("ppm", encode(Image.new("RGB", (4, 4), RED), "PPM"), {(0, 0): RED}, 0),
    ],
)
def test_images_of_every_kind_have_the_right_colours(name, content, expected, tolerance):
    image = decode_image(content)
    assert image.mode == "RGB"
    for place, colour in expected.items():
        difference = np.abs(np.array(image.getpixel(place), int) - np.array(colour)).max()
        assert difference <= tolerance, f"{name}: {image.getpixel(place)} instead of {colour} at {place}"


def test_webp_is_read():
    if not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    assert decode_image(encode(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True)).getpixel((0, 0)) == RED


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 3), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    upright = decode_image(encode(image, "PNG", exif=exif))
    assert upright.size == (3, 6)
    assert upright.getpixel((2, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("truncated jpeg", encode(photo(1, 400, 300), "JPEG")[:4000]),
        ("truncated png", encode(photo(1, 400, 300))[:4000]),
        ("text", b"this is not an image"),
        ("empty", b""),
        ("header only", encode(photo(1), "JPEG")[:20]),
        ("nan", encode(Image.new("F", (4, 4), float("nan")), "TIFF")),
    ],
)
def test_a_damaged_file_is_a_bad_image_and_nothing_else(name, content):
    with pytest.raises(BadImageError) as error:
        Sample("x.jpg", lambda: content).image()
    assert error.value.name == "x.jpg"
    assert error.value.reason


def test_randomly_damaged_files_never_raise_anything_else():
    contents = [
        encode(photo(3), "JPEG"), encode(photo(3)), encode(photo(3), "TIFF"), encode(photo(3).convert("P"), "GIF"),
        encode(photo(3), "BMP"), encode(photo(3).convert("L"), "PPM"),
    ]  # fmt: skip
    random = np.random.default_rng(0)
    for content in contents * 40:
        damaged = bytearray(content)
        for place in random.integers(0, min(len(damaged), 400), 4):
            damaged[place] = random.integers(256)
        try:
            Sample("x", lambda damaged=damaged: bytes(damaged)).image()
        except BadImageError:
            continue


def test_a_decompression_bomb_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match="DecompressionBomb"):
        Sample("bomb.png", lambda: encode(photo(0))).image()


def test_a_mistake_of_the_user_is_not_a_bad_image():
    dataset = make_dataset("torchvision://FakeData?size=3&image_size=(3,8,8)")
    dataset.dataset.transform = np.asarray
    with pytest.raises(UserError, match="gives ndarray, not images"):
        dataset[0].image()


@pytest.mark.parametrize("size", [(2000, 1500), (900, 700), (500, 375), (3000, 200), (100, 100)])
def test_a_jpeg_is_shrunk_while_decoding_only_as_far_as_no_crop_needs_enlarging(size):
    config = make_config("data.images_size=112")
    maker = PretrainLoader(config, dataset=MemoryDataset(1)).maker
    divisor = maker.reduction(*size)
    smallest = min(np.sqrt(0.6 * size[0] * size[1] * 0.75), *size)
    assert divisor == 1 or smallest / divisor >= 112
    assert divisor == 8 or smallest / (2 * divisor) < 112, "could be shrunk further"
    content = encode(photo(2, *size), "JPEG", quality=95)
    plain, shrunk = decode_image(content), decode_image(content, maker.reduction)
    assert shrunk.width == -(-plain.width // divisor)
    reference = np.asarray(plain.resize(shrunk.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(shrunk, float) - reference).mean() < 3


# -------------------------------------------------------------------------------------- crops and batches


def test_a_batch_has_uint8_images_and_flat_indices(folder):
    config = make_config(f"data.dataset={folder}", batch_size=5)
    with PretrainLoader(config) as loader:
        batch = next(loader)
    assert batch.images.shape == (5, 3, 56, 56)
    assert batch.images.dtype == torch.uint8
    visible, predict = batch.visible_indices.view(5, 6), batch.predict_indices.view(5, 3)
    for image in range(5):
        positions = {*visible[image].tolist(), *predict[image].tolist()}
        assert len(positions) == 9, "a visible patch is predicted"
        assert all(16 * image <= position < 16 * (image + 1) for position in positions), "not image-major"
    assert len({tuple((row % 16).tolist()) for row in visible}) > 1, "all images have the same mask"
    assert batch.bad == []


def test_normalize_gives_imagenet_statistics():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(normalize(images), (images / 255 - mean) / std)
    assert torch.equal(images, before), "the input was modified in place"
    half = normalize(images, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, normalize(images).bfloat16())


def test_crops_keep_the_permitted_area_and_ratio_and_half_are_flipped(monkeypatch):
    # The image says where each pixel came from: red is the column, green the row.
    rows, columns = np.mgrid[0:200, 0:250]
    source = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    content = encode(Image.fromarray(source))
    maker = PretrainLoader(make_config("data.crop_scale=[0.3, 0.5]"), dataset=MemoryDataset(1)).maker
    flips, areas = 0, []
    for key in range(200):
        crop = maker.crop(Sample("x", lambda: content), key).float()
        left, right, top, bottom = crop[0, :, 0].mean(), crop[0, :, -1].mean(), crop[1, 0].mean(), crop[1, -1].mean()
        flips += int(left > right)
        width, height = float(abs(right - left)) * 56 / 55, float(bottom - top) * 56 / 55
        areas.append(width * height / (200 * 250))
        assert 0.7 <= width / height <= 1.4
    assert 0.27 <= min(areas) < 0.33
    assert 0.47 < max(areas) <= 0.53
    assert 70 <= flips <= 130
    unflipped = PretrainLoader(make_config("data.do_hflip=false"), dataset=MemoryDataset(1)).maker
    for key in range(20):
        crop = unflipped.crop(Sample("x", lambda: content), key).float()
        assert crop[0, :, 0].mean() < crop[0, :, -1].mean(), "flipped although do_hflip=false"


def test_the_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    take(PretrainLoader(make_config(), dataset=MemoryDataset(6)), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_purposes_and_positions_differ():
    seeds = {derive_seed(seed, what, key) for seed in range(5) for what in ("crop", "mask") for key in range(500)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_seed_changes_order_crops_and_masks():
    first, second = (
        take(PretrainLoader(make_config(f"train.seed={seed}", batch_size=8), dataset=MemoryDataset(8)), 1)[0]
        for seed in (0, 1)
    )
    assert all(one != other for one, other in zip(first, second, strict=True))


# ------------------------------------------------------------------------------- map-style order and resume


def test_each_epoch_shows_every_image_once_in_a_new_order():
    shown = ids(PretrainLoader(make_config(batch_size=3), dataset=MemoryDataset(9)), 12)
    epochs = [shown[start : start + 9] for start in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_batch_may_be_larger_than_the_dataset(size):
    shown = ids(PretrainLoader(make_config(batch_size=8), dataset=MemoryDataset(size)), 5)
    for start in range(0, 40 - size, size):
        assert sorted(shown[start : start + size]) == list(range(size))


def test_an_image_that_returns_is_cropped_and_masked_anew():
    dataset = MemoryDataset(1)
    batches = take(PretrainLoader(make_config(batch_size=1), dataset=dataset), 8)
    assert len({images for _, images, _, _ in batches}) == 8
    assert len({tuple(visible) for _, _, visible, _ in batches}) > 3


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_what_one_rank_sees(world_size):
    dataset = MemoryDataset(11)
    alone = ids(PretrainLoader(make_config(batch_size=8), dataset=dataset), 6)
    config = make_config(batch_size=8 // world_size)
    ranks = [
        ids(PretrainLoader(config, dataset=dataset, rank=rank, world_size=world_size), 6) for rank in range(world_size)
    ]
    per_rank = 8 // world_size
    together = [
        index for step in range(6) for shown in ranks for index in shown[step * per_rank : (step + 1) * per_rank]
    ]
    assert together == alone
    assert all(sorted(together[start : start + 11]) == list(range(11)) for start in range(0, 44, 11))


@pytest.mark.parametrize("stop_at", [1, 3, 7])  # 10 images in batches of 4: within an epoch, at its end, past it
def test_a_resumed_run_continues_as_the_uninterrupted_one(folder, stop_at):
    config = make_config(f"data.dataset={folder}")
    straight = take(PretrainLoader(config), 10)
    with PretrainLoader(config) as loader:
        for _ in range(stop_at):
            next(loader)
        position = through_json(loader.state_dict())
    assert take(PretrainLoader(config, position=position), 10 - stop_at) == straight[stop_at:]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_run_resumes_on_another_number_of_ranks_up_to_epoch_10(world_size):
    dataset = MemoryDataset(7)
    straight = ids(PretrainLoader(make_config(batch_size=8), dataset=dataset), 10)
    config = make_config(batch_size=2)
    loaders = [PretrainLoader(config, dataset=dataset, rank=rank, world_size=4) for rank in range(4)]
    for _ in range(3):
        for loader in loaders:
            next(loader)
    position = through_json(merge_positions([loader.state_dict() for loader in loaders]))
    assert position["samples"] == 24
    assert position["seen"] == 24
    after = make_config(batch_size=8 // world_size)
    resumed = [
        PretrainLoader(after, dataset=dataset, rank=rank, world_size=world_size, position=position)
        for rank in range(world_size)
    ]
    together = [index for _ in range(7) for loader in resumed for index in next(loader).sample_ids.tolist()]
    assert together == straight[24:]
    assert len(straight) > 10 * 7
    assert sum(loader.state_dict()["seen"] for loader in resumed) == 24 + 56, "images were counted twice or lost"


def test_closing_and_going_on_continues_after_the_last_batch(folder):
    config = make_config(f"data.dataset={folder}")
    straight = take(PretrainLoader(config), 4)
    loader = PretrainLoader(config)
    first = [fingerprint(next(loader)) for _ in range(2)]
    loader.close()
    assert first + take(loader, 2) == straight


def test_a_changed_dataset_is_told(caplog):
    position = PretrainLoader(make_config(), dataset=MemoryDataset(5)).state_dict()
    with caplog.at_level(logging.WARNING):
        PretrainLoader(make_config(), dataset=MemoryDataset(6), position=position)
    assert "data.dataset has 6 images, it had 5" in caplog.text
    with pytest.raises(UserError, match=r"data\.dataset=none: the run to continue read a map dataset"):
        PretrainLoader(make_config(), dataset=MemoryStream(5), position=position)


def test_in_chans_other_than_3_is_refused():
    with pytest.raises(UserError, match=r"model\.in_chans=4: images are RGB"):
        PretrainLoader(make_config("model.in_chans=4"), dataset=MemoryDataset(1))


def test_describe_says_what_is_read(folder):
    described = PretrainLoader(make_config(f"data.dataset={folder}")).describe()
    assert described == f"{folder}: 10 images, 0 workers per rank"
    described = PretrainLoader(make_config("data.stream_partitions=3"), dataset=MemoryStream(5, 6)).describe()
    assert described == "none: stream of 2 shards, 3 parts per rank, 0 workers per rank"


# ----------------------------------------------------------------------------------------------- bad images


def test_an_unreadable_image_is_replaced_the_same_way_every_time(tmp_path):
    dataset = MemoryDataset(6, bad={2, 4})
    config = make_config("data.max_bad_fraction=1.0")
    one = take(PretrainLoader(config, dataset=dataset, bad_files_path=tmp_path / "bad.jsonl"), 6)
    two = take(PretrainLoader(config, dataset=dataset), 6)
    assert one == two
    shown = [index for sample_ids, *_ in one for index in sample_ids]
    assert len(shown) == 24
    assert not {2, 4} & set(shown)
    recorded = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(record["file"] for record in recorded) == ["image 2", "image 4"], "not exactly once each"
    assert all("not an image of a known format" in record["reason"] for record in recorded)


def test_counts_and_names_of_bad_images_survive_a_restart(tmp_path):
    path = tmp_path / "bad.jsonl"
    dataset = MemoryDataset(6, bad={2})
    config = make_config("data.max_bad_fraction=1.0")
    with PretrainLoader(config, dataset=dataset, bad_files_path=path) as loader:
        batches = [next(loader) for _ in range(6)]
        position = through_json(loader.state_dict())
    assert position["bad"] == sum(len(batch.bad) for batch in batches) > 1
    assert position["seen"] == 24 + position["bad"]
    with path.open("a") as file:
        file.write('{"file": "cut o')
    with PretrainLoader(config, dataset=dataset, bad_files_path=path, position=position) as loader:
        for _ in range(6):
            next(loader)
        assert loader.state_dict()["bad"] > position["bad"]
    assert path.read_text().count("image 2") == 1


def test_too_many_bad_images_stop_the_run(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    loader = PretrainLoader(make_config(), dataset=MemoryDataset(20, bad=range(6, 12)), bad_files_path=path)
    with pytest.raises(UserError) as error, loader:
        for _ in range(100):
            next(loader)
    assert re.search(r"data\.max_bad_fraction=0\.05: \d+ of \d+ images cannot be read", str(error.value))
    assert str(path) in str(error.value)
    assert loader.bad_files.bad > 5
    assert loader.bad_files.seen < 100, "the limit of five in the first hundred was not applied"


def test_a_few_bad_images_do_not_stop_a_short_run():
    dataset = MemoryDataset(100, bad={3, 50})
    take(PretrainLoader(make_config(batch_size=10), dataset=dataset), 10)


def test_a_dataset_without_readable_images_is_an_error_that_names_some():
    with pytest.raises(UserError, match=r"21 images in a row cannot be read, last image \d"):
        next(PretrainLoader(make_config(), dataset=MemoryDataset(5, bad=range(5))))
    with pytest.raises(UserError, match=r"200 images in a row cannot be read, last sample \d"):
        next(PretrainLoader(make_config(), dataset=MemoryStream(300, bad=range(300))))


def test_a_corrupt_file_in_a_folder_is_named_by_its_path(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(photo(0)))
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "cut.jpg").write_bytes(encode(photo(0), "JPEG")[:500])
    path = tmp_path / "bad.jsonl"
    config = make_config(f"data.dataset={tmp_path}", "data.max_bad_fraction=1.0")
    assert set(ids(PretrainLoader(config, bad_files_path=path), 5)) == {1}
    names = {json.loads(line)["file"] for line in path.read_text().splitlines()}
    assert names == {str(tmp_path / "text.jpg"), str(tmp_path / "cut.jpg")}


# --------------------------------------------------------------------------------------------------- streams


def names_of(stream, config, batches, rank=0, world_size=1):
    """Names of the samples that a rank sees, in order."""
    seen = []
    original = stream.read_shard

    def read_shard(shard, start=0):
        for sample in original(shard, start):
            yield Sample(sample.name, lambda sample=sample: (seen.append(sample.name), sample.read())[1])

    spied = copy.copy(stream)
    spied.read_shard = read_shard
    with PretrainLoader(config, dataset=spied, rank=rank, world_size=world_size) as loader:
        for _ in range(batches):
            next(loader)
    return seen


@pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (48,), (16, 32), (8, 8, 8, 8, 8, 8)])
@pytest.mark.parametrize(("world_size", "partitions"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_an_epoch_of_all_parts_of_all_ranks_is_every_sample_once(sizes, world_size, partitions):
    config = make_config(f"data.stream_partitions={partitions}", "data.stream_shuffle_block=5", batch_size=2)
    stream = MemoryStream(*sizes)
    num_parts = world_size * partitions
    seen = []
    for part in range(num_parts):
        reader = data.StreamPart(stream, seed=0, part=part, num_parts=num_parts, block_size=5, state=None)
        while reader.state()["epoch"] == 0:
            _, sample = next(reader)
            if reader.state()["epoch"] == 0:
                seen.append(sample.name)
    assert len(seen) == len(set(seen)), "a sample is in two parts"
    assert sorted(seen) == sorted(f"sample {number}" for number in range(48))
    ranks = [names_of(stream, config, 48 // num_parts // 2 // 2, rank, world_size) for rank in range(world_size)]
    assert len({name for rank in ranks for name in rank}) == sum(len(rank) for rank in ranks), (
        "two ranks share an image"
    )


def test_samples_are_shuffled_within_blocks_and_the_order_of_shards_changes_by_epoch():
    part = data.StreamPart(MemoryStream(6, 6, 6), seed=0, part=0, num_parts=1, block_size=6, state=None)
    numbers = [int(next(part)[1].name.split()[1]) for _ in range(18 * 4)]
    orders = []
    for epoch in range(4):
        blocks = [numbers[18 * epoch + start : 18 * epoch + start + 6] for start in (0, 6, 12)]
        orders.append(tuple(block[0] // 6 for block in blocks))
        for block in blocks:
            assert len({number // 6 for number in block}) == 1, "a block of six must be one shard of six"
        assert sum(block != sorted(block) for block in blocks) >= 2, "blocks are not shuffled"
    assert len(set(orders)) > 1, "the shards come in the same order in every epoch"


def test_a_block_of_one_keeps_the_order_of_the_stream():
    part = data.StreamPart(MemoryStream(7), seed=0, part=0, num_parts=1, block_size=1, state=None)
    assert [next(part)[1].name for _ in range(9)] == [f"sample {number % 7}" for number in range(9)]


@pytest.mark.parametrize("sizes", [(5, 9, 4), (17,)])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_a_part_resumes_exactly_from_every_sample(sizes, num_parts):
    stream = MemoryStream(*sizes)

    def open_part(state):
        return data.StreamPart(stream, seed=3, part=num_parts - 1, num_parts=num_parts, block_size=4, state=state)

    reader = open_part(None)
    straight = [(through_json(reader.state()), next(reader)) for _ in range(50)]
    for start in range(0, 50, 3):
        resumed = open_part(straight[start][0])
        for _, (number, sample) in straight[start:]:
            actual_number, actual = next(resumed)
            assert (actual_number, actual.name) == (number, sample.name), f"differs after resuming at {start}"


@pytest.mark.parametrize("stop_at", [1, 4, 9])
@pytest.mark.parametrize("partitions", [1, 3])
def test_a_resumed_stream_continues_as_the_uninterrupted_one(stop_at, partitions):
    stream = MemoryStream(7, 8, 6, bad={3, 9})
    config = make_config(
        f"data.stream_partitions={partitions}", "data.stream_shuffle_block=5", "data.max_bad_fraction=1.0"
    )
    for rank in range(2):
        straight = take(PretrainLoader(config, dataset=stream, rank=rank, world_size=2), 12)
        with PretrainLoader(config, dataset=stream, rank=rank, world_size=2) as loader:
            position = [next(loader) for _ in range(stop_at)][-1].position
        resumed = PretrainLoader(config, dataset=stream, rank=rank, world_size=2, position=through_json(position))
        assert take(resumed, 12 - stop_at) == straight[stop_at:]


def test_positions_of_ranks_merge_and_can_be_dealt_to_another_number_of_ranks():
    stream = MemoryStream(*[9] * 8)
    config = make_config("data.stream_partitions=2", "data.stream_shuffle_block=4", batch_size=3)

    def run(world_size, steps, position=None, config=config):
        loaders = [
            PretrainLoader(config, dataset=stream, rank=rank, world_size=world_size, position=position)
            for rank in range(world_size)
        ]
        batches = [[fingerprint(next(loader)) for loader in loaders] for _ in range(steps)]
        return batches, through_json(merge_positions([loader.state_dict() for loader in loaders])), loaders

    straight, _, _ = run(2, 8)
    _, position, _ = run(2, 3)
    resumed, _, _ = run(2, 5, position)
    assert resumed == straight[3:]
    other = make_config("data.stream_partitions=4", "data.stream_shuffle_block=4", batch_size=3)
    _, merged, loaders = run(1, 1, position, other)
    assert "4 parts per rank" in loaders[0].describe()
    assert {part: state for part, state in merged["parts"].items() if part != "0"} == {
        part: state for part, state in position["parts"].items() if part != "0"
    }
    assert merged["parts"]["0"]["samples"] == position["parts"]["0"]["samples"] + 3
    with pytest.raises(UserError, match="4 parts, which cannot be dealt out to 3 ranks"):
        PretrainLoader(config, dataset=stream, rank=0, world_size=3, position=position)
    alone = PretrainLoader(config, dataset=stream, rank=0, world_size=2).state_dict()
    with pytest.raises(AssertionError, match="merge_positions"):
        PretrainLoader(config, dataset=stream, rank=1, world_size=2, position=alone)


def test_a_part_without_samples_is_an_error_with_the_remedy():
    config = make_config("data.stream_partitions=5")
    with pytest.raises(UserError, match=r"part 3 of the 5 .*data\.stream_partitions"), \
         PretrainLoader(config, dataset=MemoryStream(3)) as loader:  # fmt: skip
        for _ in range(5):
            next(loader)


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(20, 20, 20), (20, 19, 10), (7, 5, 1), (6, 100, 6), (1, 1, 1)]
)
def test_largest_divisor(number, limit, expected):
    assert largest_divisor(number, limit) == expected


def test_workers_are_reduced_to_a_divisor_of_the_partitions_and_it_is_logged(caplog):
    config = make_config("data.stream_partitions=6", workers=5)
    with caplog.at_level(logging.INFO):
        loader = PretrainLoader(config, dataset=MemoryStream(*[3] * 6))
    assert "3 workers per rank" in loader.describe()
    assert "3 workers instead of efficiency.dataloader_num_workers=5" in caplog.text


# ------------------------------------------------------------------------------------------- Hugging Face


def write_parquet(path, images, labels):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table(
        {
            "img": [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(images)],
            "label": labels,
        }
    )
    features = {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    pq.write_table(
        rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        path,
        row_group_size=4,
    )


def write_tar(path, images, first):
    with tarfile.open(path, "w") as archive:
        for index, content in enumerate(images, first):
            for name, member in ((f"{index:04d}.png", content), (f"{index:04d}.cls", str(index).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three parquet files and three tar files of the same 7 + 5 + 6 images; image 9 is damaged."""
    root = tmp_path_factory.mktemp("shards")
    images = [b"damaged" if index == 9 else encode(photo(index)) for index in range(18)]
    for shard, (first, last) in enumerate([(0, 7), (7, 12), (12, 18)]):
        write_parquet(root / f"{shard}.parquet", images[first:last], list(range(first, last)))
        write_tar(root / f"{shard}.tar", images[first:last], first)
    return root


def hub_url(root, kind, files="*", streaming=True, fields=True):
    if kind == "parquet":
        named = "&img_field='img'&tgt_field='label'"
        url = f"hf://parquet?data_files='{root}/{files}.parquet'"
    else:
        named = "&img_field='png'&tgt_field='cls'"
        url = f"hf://webdataset?data_files='{root}/{files}.tar'"
    cache = "" if streaming else f"&cache_dir='{root}/cache'"
    return f"{url}&split='train'{named if fields else ''}{cache}" + "&streaming=True" * streaming


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_local_stream_gives_every_image_and_target_of_every_shard(shards, kind):
    stream = make_dataset(hub_url(shards, kind))
    assert stream.num_shards == 3
    samples = [sample for shard in range(3) for sample in stream.read_shard(shard)]
    assert [sample.target() for sample in samples] == list(range(18))
    assert [sample.target() for sample in stream.read_shard(1, 3)] == [10, 11]
    np.testing.assert_array_equal(np.asarray(samples[4].image()), np.asarray(photo(4)))
    assert len({sample.name for sample in samples}) == 18, "samples cannot be told apart by their names"
    with pytest.raises(BadImageError):
        samples[9].image()


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("files", ["*", "0"])
def test_a_local_stream_resumes_exactly_past_the_end_of_an_epoch(shards, kind, files, tmp_path):
    config = make_config(
        f"data.dataset={hub_url(shards, kind, files)}", "data.stream_shuffle_block=5", "data.max_bad_fraction=1.0",
        "data.stream_partitions=2", batch_size=3,
    )  # fmt: skip
    path = tmp_path / "bad.jsonl"
    with PretrainLoader(config, bad_files_path=path) as loader:
        batches = [next(loader) for _ in range(10)]
    straight = [fingerprint(batch) for batch in batches]
    assert len({images for _, images, _, _ in straight}) == 10
    state = batches[-1].stream_state
    assert state is not None
    assert state["epoch"] >= 1, "the test does not pass the end of an epoch"
    for stop_at in (1, 6):
        position = through_json(batches[stop_at - 1].position)
        assert take(PretrainLoader(config, position=position), 10 - stop_at) == straight[stop_at:]
    if files == "*":
        (record,) = [json.loads(line) for line in path.read_text().splitlines()]
        assert "shard" in record["file"] or "0009" in record["file"]


def test_a_map_style_parquet_dataset_reads_and_counts_bad_images(shards):
    config = make_config(
        f"data.dataset={hub_url(shards, 'parquet', streaming=False)}", "data.max_bad_fraction=1.0", batch_size=6
    )
    with PretrainLoader(config) as loader:
        assert "18 images" in loader.describe()
        shown = [next(loader) for _ in range(3)]
    assert 9 not in [index for batch in shown for index in batch.sample_ids.tolist()]
    assert ["(9.png)" in name or "row 9" in name for batch in shown for name, _ in batch.bad] == [True]
    dataset = make_dataset(hub_url(shards, "parquet", streaming=False))
    assert dataset[11].target() == 11
    transformed = make_dataset(hub_url(shards, "parquet", streaming=False), lambda image, target: (image.size, target))
    assert transformed[11] == ((80, 60), 11)
    assert len(transformed) == 18


def test_the_only_image_column_is_found_without_img_field(shards):
    stream = make_dataset(hub_url(shards, "parquet", fields=False))
    assert next(stream.read_shard(0)).image().size == (80, 60)
    assert next(stream.read_shard(0)).target() is None


def test_a_local_imagefolder_is_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"{name}.png").write_bytes(encode(photo(len(name))))
    url = f"hf://imagefolder?data_dir='{tmp_path}/images'&split='train'&img_field='image'&tgt_field='label'"
    stream = make_dataset(f"{url}&streaming=True")
    samples = [sample for shard in range(stream.num_shards) for sample in stream.read_shard(shard)]
    mapped = make_dataset(f"{url}&cache_dir='{tmp_path}/cache'")
    assert [mapped[0].target(), mapped[1].target()] == [0, 1]
    for found in (samples, [mapped[0], mapped[1]]):
        assert [sample.image().size for sample in found] == [(80, 60)] * 2
        assert found[0].name.endswith("cat.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (("split='train'", "split='test'"), ["test", "train"]),
        (("&split='train'", ""), ["needs split='train'"]),
        (("img_field='img'", "img_field='image'"), ["img_field='image' is not a column; there are: 'img', 'label'"]),
        (("tgt_field='label'", "tgt_field='cls'"), ["tgt_field='cls' is not a column; there are: 'img', 'label'"]),
        (("*.parquet", "none.parquet"), ["none.parquet"]),
        (("&split=", "&no_such_option=1&split="), ["no_such_option"]),
    ],
)
def test_a_wrong_hub_argument_is_refused_with_what_there_is(shards, streaming, change, messages):
    url = hub_url(shards, "parquet", streaming=streaming)
    assert change[0] in url
    url = url.replace(*change)
    with pytest.raises(UserError) as error:
        make_dataset(url)
    assert str(error.value).startswith(f"data.dataset={url}: ")
    for message in messages:
        assert message in str(error.value).removeprefix(f"data.dataset={url}: ")


def test_a_stream_with_a_transform_is_refused(shards):
    with pytest.raises(UserError, match="leave streaming=True out"):
        make_dataset(hub_url(shards, "parquet"), lambda image, target: image)


# --------------------------------------------------------------------------------------- torchvision, archives


def test_torchvision_datasets_are_read(tmp_path):
    fake = make_dataset("torchvision://FakeData?size=5&image_size=(3, 20, 30)&num_classes=4")
    assert len(fake) == 5
    assert fake[2].image().size == (30, 20)
    assert int(fake[2].target()) in range(4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encode(photo(0)) if name == "a" else b"damaged")
    found = make_dataset(f"torchvision://ImageFolder?root='{tmp_path}'")
    assert (found[0].name, found[0].target()) == (str(tmp_path / "a" / "x.png"), 0)
    with pytest.raises(BadImageError, match=r"x\.png"):
        found[1].image()


def test_the_default_root_is_below_the_torch_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/datasets/ImageFolder"):
        make_dataset("torchvision://ImageFolder")


def serve(monkeypatch, name, path):
    """Make `name` download from a local file, whose checksum is the right one."""
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(data.ARCHIVES, name, data.Archive(path.as_uri(), md5, data.ARCHIVES[name].folder))


def mask_png(seed, palette=False):
    labels = np.random.default_rng(seed).integers(0, 21, (6, 8), dtype=np.uint8)
    image = Image.fromarray(labels)
    if palette:
        image = Image.new("P", image.size)
        image.putdata(labels.flatten().tolist())
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tolist())
    return encode(image), labels


@pytest.fixture
def ade_zip(tmp_path):
    path = tmp_path / "served" / "ADEChallengeData2016.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for split, names in (("training", ["2", "1"]), ("validation", ["3"])):
            for name in names:
                archive.writestr(f"ADEChallengeData2016/images/{split}/{name}.jpg", encode(photo(int(name)), "JPEG"))
                archive.writestr(f"ADEChallengeData2016/annotations/{split}/{name}.png", mask_png(int(name))[0])
    return path


def test_ade20k_is_downloaded_checked_and_read_once(ade_zip, monkeypatch, tmp_path):
    serve(monkeypatch, "ADE20K", ade_zip)
    root = tmp_path / "root"
    dataset = make_dataset(f"custom://ADE20K?split='training'&root='{root}'")
    assert [Path(dataset[index].name).name for index in range(len(dataset))] == ["1.jpg", "2.jpg"]
    target = dataset[0].target()
    assert target.mode == "L"
    np.testing.assert_array_equal(np.asarray(target), mask_png(1)[1])
    assert dataset[0].image().size == (80, 60)
    ade_zip.unlink()
    assert len(make_dataset(f"custom://ADE20K?split='validation'&root='{root}'")) == 1, "it was downloaded again"
    assert sorted(path.name for path in root.iterdir()) == [".lock", "ADEChallengeData2016"], "leftovers"
    (root / "ADEChallengeData2016/annotations/training/2.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 files, first .*2\.png; remove that folder"):
        make_dataset(f"custom://ADE20K?split='training'&root='{root}'")


def test_the_default_root_of_ade20k_is_below_the_torch_cache(ade_zip, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    serve(monkeypatch, "ADE20K", ade_zip)
    make_dataset("custom://ADE20K?split='training'")
    assert (tmp_path / "torch" / "datasets" / "ADE20K" / "ADEChallengeData2016").is_dir()


def test_an_archive_that_the_user_placed_is_used_and_kept(ade_zip, monkeypatch, tmp_path):
    serve(monkeypatch, "ADE20K", ade_zip)
    root = tmp_path / "root"
    root.mkdir()
    ade_zip.rename(root / ade_zip.name)
    assert len(make_dataset(f"custom://ADE20K?split='training'&root='{root}'")) == 2
    assert (root / ade_zip.name).is_file()


def test_a_wrong_checksum_or_a_failed_download_leaves_nothing_behind(ade_zip, monkeypatch, tmp_path):
    serve(monkeypatch, "ADE20K", ade_zip)
    root = tmp_path / "root"
    url = f"custom://ADE20K?split='training'&root='{root}'"
    content = ade_zip.read_bytes()
    ade_zip.write_bytes(content + b"x")
    with pytest.raises(UserError, match=r"has md5 .* instead of .*: damaged or changed"):
        make_dataset(url)
    ade_zip.unlink()
    with pytest.raises(UserError, match=r"could not be downloaded .* put the file there"):
        make_dataset(url)
    assert [path.name for path in root.iterdir()] == [".lock"]
    ade_zip.write_bytes(content)
    assert len(make_dataset(url)) == 2


@pytest.mark.parametrize("kind", ["zip", "zip absolute", "tar", "tar link"])
def test_an_archive_that_writes_outside_of_its_folder_is_refused(kind, monkeypatch, tmp_path):
    (tmp_path / "served").mkdir()
    name = "ADE20K" if kind.startswith("zip") else "VOC2012"
    path = tmp_path / "served" / ("a.zip" if kind.startswith("zip") else "a.tar")
    if kind.startswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("/tmp/escaped.txt" if "absolute" in kind else "x/../../../escaped.txt", "x")
    else:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("../../escaped.txt" if kind == "tar" else "VOCdevkit")
            if kind == "tar link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(info)
    serve(monkeypatch, name, path)
    split = "training" if name == "ADE20K" else "train"
    with pytest.raises(UserError, match="is refused"):
        make_dataset(f"custom://{name}?split='{split}'&root='{tmp_path}/root'")
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.fixture
def voc_archives(tmp_path, monkeypatch):
    """VOC has train a, b and val c; the augmented set has train a, d, e and val c, b, f. All images are in VOC."""
    from scipy.io import savemat

    served = tmp_path / "served"
    served.mkdir()

    def add(archive, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    with tarfile.open(served / "voc.tar", "w") as archive:
        lists = "VOCdevkit/VOC2012/ImageSets/Segmentation"
        add(archive, f"{lists}/train.txt", b"a\nb\n")
        add(archive, f"{lists}/val.txt", b"c\n")
        for index, name in enumerate("abcdef"):
            add(archive, f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", encode(photo(index), "JPEG"))
        for index, name in enumerate("abc"):
            add(archive, f"VOCdevkit/VOC2012/SegmentationClass/{name}.png", mask_png(index, palette=True)[0])
    with tarfile.open(served / "benchmark.tgz", "w:gz") as archive:
        add(archive, "benchmark_RELEASE/dataset/train.txt", b"a\nd\ne\n")
        add(archive, "benchmark_RELEASE/dataset/val.txt", b"c\nb\nf\n")
        for index, name in enumerate("abcdef"):
            buffer = io.BytesIO()
            savemat(buffer, {"GTcls": {"Segmentation": mask_png(10 + index)[1], "CategoriesPresent": [1]}})
            add(archive, f"benchmark_RELEASE/dataset/cls/{name}.mat", buffer.getvalue())
    serve(monkeypatch, "VOC2012", served / "voc.tar")
    serve(monkeypatch, "VOC2012 augmented", served / "benchmark.tgz")


@pytest.mark.parametrize(("split", "expected"), [("train", "ab"), ("val", "c"), ("trainaug", "abdef")])
def test_voc2012_has_the_splits_and_labels_of_mmsegmentation(voc_archives, tmp_path, split, expected):
    dataset = make_dataset(f"custom://VOC2012?split='{split}'&root='{tmp_path}/root'")
    assert [Path(dataset[index].name).stem for index in range(len(dataset))] == list(expected)
    for index, name in enumerate(expected):
        number = "abcdef".index(name)
        labels = mask_png(number)[1] if name in "abc" else mask_png(10 + number)[1]
        target = dataset[index].target()
        assert target.mode == "L"
        np.testing.assert_array_equal(np.asarray(target), labels)
        assert dataset[index].image().size == (80, 60)
    assert (tmp_path / "root" / "benchmark_RELEASE").exists() == (split == "trainaug")


def test_a_damaged_label_is_reported_with_the_name_of_the_image(voc_archives, tmp_path):
    dataset = make_dataset(f"custom://VOC2012?split='val'&root='{tmp_path}/root'")
    next((tmp_path / "root").rglob("SegmentationClass/c.png")).write_bytes(b"damaged")
    with pytest.raises(BadImageError, match=r"c\.jpg: label: UnidentifiedImageError"):
        dataset[0].target()


# --------------------------------------------------------------------------------------- workers, prefetching


def test_two_workers_give_what_none_gives_and_a_resumed_run_too(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for path in folder.rglob("*.png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "text.jpg").write_bytes(b"text")
    overrides = (f"data.dataset={tmp_path}/images", "data.max_bad_fraction=1.0")
    expected = take(PretrainLoader(make_config(*overrides)), 9)
    with PretrainLoader(make_config(*overrides, workers=2), bad_files_path=tmp_path / "bad.jsonl") as loader:
        batches = [next(loader) for _ in range(5)]
        assert [fingerprint(batch) for batch in batches] == expected[:5]
        # Batches that the workers have made beyond these must not count.
        assert loader.state_dict() == batches[-1].position
        assert loader.state_dict()["samples"] == 20
        position = through_json(loader.state_dict())
    assert "text.jpg" in (tmp_path / "bad.jsonl").read_text()
    assert take(PretrainLoader(make_config(*overrides, workers=2), position=position), 4) == expected[5:]


def test_a_stream_is_the_same_with_two_workers_also_when_resumed_at_an_odd_batch(shards):
    overrides = (
        f"data.dataset={hub_url(shards, 'webdataset')}", "data.stream_shuffle_block=4", "data.max_bad_fraction=1.0",
        "data.stream_partitions=2",
    )  # fmt: skip
    expected = take(PretrainLoader(make_config(*overrides, batch_size=2)), 14)
    with PretrainLoader(make_config(*overrides, batch_size=2, workers=2)) as loader:
        assert "2 workers per rank" in loader.describe()
        start = [fingerprint(next(loader)) for _ in range(5)]
        position = through_json(loader.state_dict())
    assert start == expected[:5]
    assert take(PretrainLoader(make_config(*overrides, batch_size=2, workers=2), position=position), 9) == expected[5:]


def test_an_error_in_a_worker_arrives_as_a_plain_message():
    config = make_config("data.stream_partitions=4", workers=1)
    with pytest.raises(UserError) as error, PretrainLoader(config, dataset=make_two_samples()) as loader:
        for _ in range(4):
            next(loader)
    assert "Traceback" not in str(error.value)
    assert str(error.value).startswith("data.dataset: part ")


def make_two_samples():
    return _TwoSamples()


class _TwoSamples(ImageStream):
    num_shards = 1

    def read_shard(self, shard, start=0):
        for number in range(start, 2):
            yield Sample(str(number), _one_pixel)


def _one_pixel():
    return encode(Image.new("RGB", (1, 1)))


def test_workers_outlive_the_signals_of_a_launcher(folder):
    config = make_config(f"data.dataset={folder}", workers=2)
    expected = take(PretrainLoader(make_config(f"data.dataset={folder}")), 12)
    with PretrainLoader(config) as loader:
        start = [fingerprint(next(loader))]
        workers = getattr(loader._batches, "_workers")  # noqa: B009  # not known to the type checker
        for worker in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(worker.pid, number)
        assert start + [fingerprint(next(loader)) for _ in range(11)] == expected
    assert not any(worker.is_alive() for worker in workers), "workers were left behind"


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, signal, sys\n"
        "from config import CapiConfig, DEFAULT_PRETRAIN_CONFIG, load_config\n"
        "from data import PretrainLoader\n"
        "if __name__ == '__main__':\n"
        "    loader = PretrainLoader(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sys.argv[1:]))\n"
        "    next(loader)\n"
        "    print(*[worker.pid for worker in loader._batches._workers], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, script, f"data.dataset={folder}", "efficiency.dataloader_num_workers=2",
         "efficiency.cache_dataset=false", "optim.batch_size_per_gpu=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    workers = done.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), "workers were left behind"


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_other_ways_to_start_workers_give_the_same(folder, start_method):
    config = make_config(f"data.dataset={folder}", workers=2)
    expected = take(PretrainLoader(make_config(f"data.dataset={folder}")), 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        assert take(PretrainLoader(config, start_method=start_method), 4) == expected


def test_the_prefetcher_hands_out_the_loaders_batches_and_their_position(folder):
    config = make_config(f"data.dataset={folder}")
    straight = take(PretrainLoader(config), 4)
    loader = PretrainLoader(config)
    batches = DevicePrefetcher(loader, torch.device("cpu"))
    assert batches.state_dict() == loader.state_dict()
    assert [fingerprint(next(batches)) for _ in range(4)] == straight
    assert batches.state_dict() == loader.state_dict()
    assert batches.wait_s > 0


@pytest.mark.gpu
def test_the_prefetcher_copies_ahead_and_keeps_the_position_of_the_batch_in_use(folder):
    config = make_config(f"data.dataset={folder}", workers=2)
    straight = take(PretrainLoader(make_config(f"data.dataset={folder}")), 8)
    with PretrainLoader(config, pin_memory=True) as loader:
        batches = DevicePrefetcher(loader, torch.device("cuda"))
        for step in range(8):
            batch = next(batches)
            assert batch.images.is_cuda
            assert fingerprint(batch.to("cpu")) == straight[step]
            assert batches.state_dict()["samples"] == 4 * (step + 1)
            assert loader.state_dict()["samples"] == 4 * (step + 2), "nothing was read ahead"
