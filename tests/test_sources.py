"""sources.py: URLs, folders, decoding, archives."""

import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features
from samples import age, encode, folder_url, photo

from reading import sources
from reading.sources import (
    BadImageError,
    Fields,
    Sample,
    decode_image,
    decode_mask,
    decode_pixels,
    make_dataset,
    match_classes,
    parse_data_url,
    silent_decoders,
)
from utils import UserError

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
        ("htps://host/x", "unknown source htps://; did you mean https?"),
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
        ("custom://Images?root=''", "needs root='/path/of/a/folder'"),
        ("custom://Images?root='~nobody-of-this-name/x'", "~nobody-of-this-name/x: Could not determine home directory"),
        ("custom://ADE20K?split='training'&root=5", "needs root='/path/of/a/folder'"),
        ("custom://Segmentation?root='/x'&images=5", "needs images='/path/of/a/folder'"),
        ("torchvision://ImageFolder?root=5", "needs root='/path/of/a/folder'"),
        ("torchvision://ImageFolder?root='/x'&loader='x'", "unknown argument loader"),
        ("torchvision://FakeData?size='x'", "cannot be interpreted as an integer"),
        ("torchvision://FakeData?size=0", "has no images"),
        ("torchvision://PhotoTour?root='/no/such/folder'&name='x'", "KeyError: 'x'"),
        ("hf://?split='train'", "needs the name of a data set"),
        ("hf://imagefolder?split='train'", "needs data_files='...' or data_dir='...'"),
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


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(text):
    with pytest.raises(UserError, match=r"^data.dataset='.*': is empty; give a folder of images"):
        make_dataset(text)


def test_the_message_names_the_key_it_is_given():
    with pytest.raises(UserError, match=r"^train_dataset=x://y: "):
        make_dataset("x://y", key="train_dataset")


# ------------------------------------------------------------------------------------ folders of images


def test_every_image_below_a_folder_is_found_in_sorted_order(folder, tmp_path):
    root = tmp_path / "root"
    for name in (
        "b.JPG",
        "a.jpeg",
        "B/1.png",
        "z/y.Png",
        "z/.hidden.png",
        ".git/x.png",
        "notes.txt",
        "c.tiff",
        "d.gif",
        "e.webp",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "folder.png").mkdir()
    (root / "broken.png").symlink_to(root / "nowhere.png")
    (root / "linked.png").symlink_to(folder / "0.png")
    found = make_dataset(str(root))
    names = [str(Path(found[index].name).relative_to(root)) for index in range(len(found))]
    assert names == ["B/1.png", "a.jpeg", "b.JPG", "c.tiff", "d.gif", "e.webp", "linked.png", "z/y.Png"]
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


def names_below(root, **kwargs):
    found = make_dataset(str(root), **kwargs)
    return [str(Path(found[index].name).relative_to(root)) for index in range(len(found))]


def test_every_format_that_pillow_writes_and_reads_is_found_by_its_endings_and_read(tmp_path):
    picture, expected = photo(3, 32, 32), set()
    Image.init()
    for ending, kind in Image.registered_extensions().items():
        if kind in Image.SAVE and (kind in Image.OPEN or kind == "MPO") and kind not in sources.NO_IMAGES:
            for mode in ("RGB", "L", "1"):
                try:
                    with silent_decoders():  # a format may be deprecated
                        content = encode(picture.convert(mode), kind)
                except (OSError, ValueError):  # not in this mode
                    continue
                for name in (f"a{ending}", f"B{ending.upper()}"):
                    (tmp_path / name).write_bytes(content)
                    expected.add(name)
                break
    assert {"a.avif", "a.jfif", "a.jp2", "B.TIFF", "a.qoi", "a.tga", "a.pgm"} <= expected, "too few formats were tried"
    found = make_dataset(str(tmp_path))
    assert {Path(found[index].name).name for index in range(len(found))} == expected
    with silent_decoders():
        assert {len(found[index].pixels()) for index in range(len(found))} == {3}


def test_what_is_no_image_is_left_out_counted_and_named_once(tmp_path, caplog):
    (tmp_path / "cat").mkdir()
    for name in ("1.jpg", "a.HEIC", "b.heic", "clip.mpg", "paper.pdf", "table.h5", "README", "._1.jpg", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(encode(photo(0), "JPEG"))
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "cat" / "null.png").symlink_to("/dev/null")
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere.png")
    age(tmp_path)
    urls = (str(tmp_path), f"torchvision://ImageFolder?root='{tmp_path}'", str(tmp_path))  # the last from the cache
    for url in urls:
        caplog.clear()
        with caplog.at_level("INFO"):
            found = make_dataset(url, listing_cache=tmp_path.with_name("cache"))
        assert [Path(found[index].name).name for index in range(len(found))] == ["1.jpg"], url
        (line,) = [record.getMessage() for record in caplog.records]
        for part in (
            f"data.dataset={url}: ",
            "2 .heic",
            "1 .mpg",
            "1 .pdf",
            "1 .h5",
            "1 without ending",
            "2 .png that",
        ):
            assert part in line, line
        assert "DS_Store" not in line


def test_a_pipe_in_the_place_of_a_file_is_a_bad_image_and_blocks_nothing(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encode(photo(0), "JPEG"))
    sample = make_dataset(str(tmp_path))[0]
    (tmp_path / "x.jpg").unlink()
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(BadImageError, match="not a regular file"):
        sample.image()
    with pytest.raises(BadImageError, match="not a regular file"):
        Fields("hf://x", "image", None).sample({"image": str(tmp_path / "x.jpg")}, "row 0").image()


def test_a_folder_that_cannot_be_read_is_named_with_a_remedy(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"deep.*make it readable, or move it out of"):
        make_dataset(str(folder))


def test_names_that_are_not_utf8_can_be_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xe9.png"
    with open(path, "wb") as file:  # noqa: PTH123  # pathlib takes no bytes
        file.write(encode(photo(0)))
    age(tmp_path)
    for _ in range(2):  # the second from the cache
        sample = make_dataset(str(tmp_path), listing_cache=tmp_path.with_name("cache"))[0]
        assert sample.image().size == (80, 60)
        assert os.fsencode(json.loads(json.dumps(sample.name))) == path


def test_a_folder_without_images_is_refused_with_the_extensions_that_count(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(UserError, match=r"no images below .*\.jpg \.jpeg \.png"):
        make_dataset(str(tmp_path))


def test_the_listing_is_cached_until_a_folder_changes(tmp_path, monkeypatch):
    root, cache = tmp_path / "images", tmp_path / "cache"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "1.png").touch()
    (root / "2.png").touch()
    listings = []
    scandir = os.scandir

    def watched(folder):
        if isinstance(folder, bytes) and Path(os.fsdecode(folder)) == root:  # `age` looks too, at a text
            listings.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", watched)

    def names():
        found = make_dataset(str(root), listing_cache=cache)
        return [Path(found[index].name).name for index in range(len(found))]

    assert names() == ["2.png", "1.png"]
    assert not cache.exists(), "a folder that was changed just now must not be cached"
    age(root)
    assert names() == names() == names() == ["2.png", "1.png"]
    assert len(listings) == 2, "the cache was not used"
    (root / "sub" / "3.png").touch()
    assert names() == ["2.png", "1.png", "3.png"], "a new file in a folder below was not seen"
    age(root)
    names()
    listings.clear()
    assert names() == ["2.png", "1.png", "3.png"]
    assert not listings
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:50])
    assert names() == ["2.png", "1.png", "3.png"]
    assert listings, "a damaged cache file was used"
    age(root)
    names()
    (root / "4.new").touch()
    age(root)
    names()
    known = sources.image_endings()
    monkeypatch.setattr(sources, "image_endings", lambda: (*known, ".new"))
    assert names() == ["2.png", "4.new", "1.png", "3.png"], "a listing of other endings was used"
    (root / "4.new").unlink()
    (root / "sub" / "1.png").unlink()
    (root / "sub" / "3.png").unlink()
    (root / "sub").rmdir()
    assert names() == ["2.png"]
    age(root)
    cache = tmp_path / "file" / "cache"
    (tmp_path / "file").touch()
    assert names() == ["2.png"], "a cache that cannot be written is in the way"


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
    random, refused = np.random.default_rng(0), 0
    for content in contents * 40:
        damaged = bytearray(content)
        for place in random.integers(0, min(len(damaged), 400), 4):
            damaged[place] = random.integers(256)
        try:
            Sample("x", lambda damaged=damaged: bytes(damaged)).image()
        except BadImageError:
            refused += 1
    assert 60 < refused < 180, f"{refused} of 240 damaged files were refused; this needs both, many and not all"


def same_from_both_decoders(content, reduction=None):
    """Whether the decoder of training gives what Pillow gives, or both refuse."""
    sample = Sample("x", lambda: content)
    results = []
    for decode in (sample.image, sample.pixels):
        try:
            with silent_decoders():
                results.append(np.asarray(decode(reduction)))
        except BadImageError as error:
            results.append(error.reason)
    image, pixels = results
    if isinstance(image, str) or isinstance(pixels, str):
        return isinstance(image, str) and isinstance(pixels, str)
    return np.array_equal(image, pixels.transpose(1, 2, 0))


def with_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(5, 33, 18), kind, exif=exif)


KINDS = {
    **{f"jpeg {options}": encode(photo(1, 61, 47), "JPEG", **options) for options in (
        {}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True},
        {"keep_rgb": True},
    )},
    "grey jpeg": encode(photo(2, 61, 47).convert("L"), "JPEG"),
    "cmyk jpeg": encode(photo(2, 61, 47).convert("CMYK"), "JPEG"),
    "1x1 jpeg": encode(Image.new("RGB", (1, 1), RED), "JPEG"),
    "png": encode(photo(3)),
    "16-bit png": grey16("PNG", "I;16"),
    "palette": palette_png(transparent=True),
    "rgba": encode(Image.new("RGBA", (4, 5), (*RED, 90))),
    **{f"{kind}, orientation {o}": with_orientation(o, kind) for kind in ("JPEG", "PNG") for o in range(10)},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("divisor", [1, 2])
def test_the_tensors_of_training_are_the_pixels_of_pillow_bit_for_bit(name, divisor):
    assert same_from_both_decoders(KINDS[name], lambda width, height: divisor)


def test_damaged_jpegs_are_refused_by_training_exactly_where_pillow_refuses_them():
    content = encode(photo(3, 200, 150), "JPEG", quality=90)
    random = np.random.default_rng(0)
    damaged = [content[:length] for length in [*range(0, len(content), 150), *range(len(content) - 4, len(content))]]
    for _ in range(100):
        broken = np.frombuffer(content, np.uint8).copy()
        broken[random.integers(0, len(broken), 4)] = random.integers(0, 256, 4)
        damaged.append(broken.tobytes())
    assert all(same_from_both_decoders(each) for each in damaged)


def test_without_torchcodec_pillow_decodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    sources.jpeg_decoder.cache_clear()
    try:
        assert sources.jpeg_decoder() is None
        assert all(same_from_both_decoders(content) for content in KINDS.values())
    finally:
        sources.jpeg_decoder.cache_clear()


def test_an_image_that_is_decoded_already_is_taken_as_it_is():
    image = photo(4)
    np.testing.assert_array_equal(decode_pixels(image).permute(1, 2, 0), np.asarray(image))


def test_a_decompression_bomb_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match="DecompressionBomb"):
        Sample("bomb.png", lambda: encode(photo(0))).image()


def test_a_mistake_of_the_user_is_not_a_bad_image():
    dataset = make_dataset("torchvision://FakeData?size=3&image_size=(3,8,8)")
    dataset.dataset.transform = np.asarray
    with pytest.raises(UserError, match="gives ndarray, not images"):
        dataset[0].image()


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


def labelled_names(dataset):
    """Class names, and name and label of every image."""
    samples = [dataset[index] for index in range(len(dataset))]
    return dataset.class_names, [(sample.name, sample.target()) for sample in samples]


@pytest.fixture
def class_folders(tmp_path):
    """Folders of classes whose names and depths sort in many ways, with a file that is in none."""
    root = tmp_path / "classes"
    for name in ("a-b/1.png", "a/2.png", "a/10.PNG", "a/b/3.png", "a/b.png", "a/a/c/4.jpg", "a/a-/5.png", "Z/x.png",
                 "\u00e9/\U0001f600.png", "\u00e9/\uff21.png", "\u00e9/\udcfe.png", "not in a class.png"):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(len(name))))
    return root


def test_class_folders_are_those_of_torchvision_in_its_order(class_folders):
    import torchvision

    url = folder_url(class_folders)
    expected = sources.TorchvisionDataset(parse_data_url(url), torchvision.datasets.ImageFolder(str(class_folders)))
    found = make_dataset(url)
    assert labelled_names(found) == labelled_names(expected)
    assert found.class_names == ["Z", "a", "a-b", "\u00e9"]
    assert found.fingerprint() == expected.fingerprint(), "results of before are no longer taken for those of this data"


def test_hidden_files_are_in_no_class_and_links_multiply_no_image(class_folders):
    url = folder_url(class_folders)
    before = labelled_names(make_dataset(url))
    for hidden in (".cache/x.png", "a/.@__thumb/2.png", "a/._2.png"):
        (class_folders / hidden).parent.mkdir(exist_ok=True)
        (class_folders / hidden).write_bytes(encode(photo(0)))
    (class_folders / ".empty").mkdir()
    for up in ("a/up", "Z/up"):  # each by itself doubles the images, both together go on for ever
        (class_folders / up).symlink_to(class_folders)
    (class_folders / "Z" / "sibling").symlink_to(class_folders / "a")
    assert labelled_names(make_dataset(url)) == before


def test_folders_without_images_are_no_classes_and_are_named(class_folders, caplog):
    before = labelled_names(make_dataset(folder_url(class_folders)))
    (class_folders / "a-annotations").mkdir()
    (class_folders / "a-annotations" / "2.xml").touch()
    (class_folders / "b").symlink_to(class_folders / "a")
    caplog.clear()
    assert labelled_names(make_dataset(folder_url(class_folders))) == before
    assert "2 folders have no images of their own, and are no classes: a-annotations, b" in caplog.text


PICTURES = {
    "16-bit.png": grey16("PNG", "I;16"),
    "rgba.png": encode(Image.merge("RGBA", (*photo(1, 40, 30).split(), photo(2, 40, 30).getchannel(0)))),
    "palette.png": palette_png(transparent=True),
    "turned.jpg": with_orientation(6, "JPEG"),
    "cmyk.jpg": encode(photo(2, 61, 47).convert("CMYK"), "JPEG"),
    "plain.jpg": encode(photo(4, 61, 47), "JPEG"),
}
"""Files that decoders treat differently."""


def pictures_of(dataset):
    if isinstance(dataset, sources.ImageStream):
        return [sample for shard in range(dataset.num_shards) for sample in dataset.read_shard(shard)]
    return [dataset[index] for index in range(len(dataset))]


def parquet(path, name, column):
    pq.write_table(pa.table({name: column}), path)
    return f"hf://parquet?data_files='{path}'&split='train'&img_field='{name}'"


@pytest.fixture(scope="module")
def same_pictures(tmp_path_factory):
    """Data URLs of `PICTURES`, sorted by name, as every kind of source holds them."""
    root = tmp_path_factory.mktemp("sources")
    names, contents = sorted(PICTURES), [PICTURES[name] for name in sorted(PICTURES)]
    voc = root / "VOCdevkit" / "VOC2012"
    for folder in (
        root / "classes" / "one",
        voc / "JPEGImages",
        voc / "SegmentationClass",
        voc / "ImageSets/Segmentation",
    ):
        folder.mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(Path(name).stem for name in names))
    with tarfile.open(root / "0.tar", "w") as tar:
        for name, content in zip(names, contents, strict=True):
            (root / "classes" / "one" / name).write_bytes(content)
            (voc / "JPEGImages" / f"{Path(name).stem}.jpg").write_bytes(content)
            (voc / "SegmentationClass" / f"{Path(name).stem}.png").write_bytes(palette_png(transparent=False))
            member = tarfile.TarInfo(f"{Path(name).stem}.img")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    hub = [
        parquet(root / "bytes.parquet", "image", pa.array(contents)),
        parquet(root / "dicts.parquet", "image", pa.array([{"bytes": each, "path": None} for each in contents])),
        parquet(root / "paths.parquet", "image", pa.array([str(root / "classes" / "one" / name) for name in names])),
        f"hf://imagefolder?data_dir='{root}/classes/one'&split='train'&img_field='image'",
        f"hf://webdataset?data_files='{root}/0.tar'&split='train'&img_field='img'",
    ]
    return [
        str(root / "classes"),
        f"torchvision://ImageFolder?root='{root}/classes'",
        f"torchvision://VOCSegmentation?root='{root}'&image_set='train'",
        *hub,
        *(f"{url}&streaming=True" for url in hub),
    ]


def test_a_file_has_the_same_pixels_whatever_source_names_it(same_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for url in same_pictures:
        found = make_dataset(url)
        if isinstance(found, sources.ImageStream):
            samples = [sample for shard in range(found.num_shards) for sample in found.read_shard(shard)]
        else:
            samples = [found[index] for index in range(len(found))]
        assert len(samples) == len(PICTURES), url
        for sample, name in zip(samples, sorted(PICTURES), strict=True):
            expected = np.asarray(decode_image(PICTURES[name]))
            np.testing.assert_array_equal(np.asarray(sample.image()), expected, err_msg=f"{name} from {url}")
            with silent_decoders():
                pixels = sample.pixels().permute(1, 2, 0)
            np.testing.assert_array_equal(pixels, expected, err_msg=f"{name} from {url}")
            if "VOC" in url:
                assert np.asarray(sample.target()).max() == 1, "labels are no longer as stored"


def test_the_default_root_is_below_the_torch_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/datasets/ImageFolder"):
        make_dataset("torchvision://ImageFolder")


def serve(monkeypatch, name, path):
    """Make `name` download from a local file, whose checksum is the right one."""
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(sources.ARCHIVES, name, sources.Archive(path.as_uri(), md5, sources.ARCHIVES[name].folder))


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
    path.parent.mkdir(exist_ok=True)
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
    served.mkdir(exist_ok=True)

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


# --------------------------------------------------------------------------------------------------------- masks


LABELS = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], dtype=np.uint8)


def shallow_png(bits, labels, color_type=0):
    """A grey (0) or palette (3) PNG of 1, 2 or 4 bits, which Pillow does not write."""
    rows = b""
    for row in labels:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits = digits.ljust(-(-len(digits) // 8) * 8, "0")
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = labels.shape
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits))) if color_type == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_palette(labels):
    image = Image.fromarray(labels).convert("P")
    image.putpalette([i * 7 % 256 for i in range(768)])
    return image


def stacked(*channels):
    return Image.fromarray(np.stack(channels, axis=-1))


OPAQUE = np.full_like(LABELS, 255)
SMALL = LABELS % 2


@pytest.mark.parametrize(
    ("mask", "labels"),
    [
        *((shallow_png(bits, LABELS % 2**bits, kind), LABELS % 2**bits) for bits in (1, 2, 4) for kind in (0, 3)),
        *((encode(Image.fromarray(LABELS), kind), LABELS) for kind in ("PNG", "TIFF", "BMP", "GIF", "PPM")),
        *((encode(with_palette(LABELS), kind), LABELS) for kind in ("PNG", "TIFF", "BMP")),
        *((encode(Image.fromarray(SMALL > 0), kind), SMALL) for kind in ("PNG", "TIFF", "BMP")),
        *((encode(Image.fromarray(LABELS), "TIFF", compression=c), LABELS) for c in ("tiff_lzw", "packbits")),
        (encode(Image.fromarray(LABELS.astype(np.uint16))), LABELS),
        (encode(Image.fromarray(LABELS.astype(np.uint16)), "TIFF"), LABELS),
        (encode(Image.fromarray(LABELS.astype(np.int32)), "TIFF"), LABELS),
        (encode(Image.fromarray(LABELS.astype(np.float32)), "TIFF"), LABELS),
        (encode(stacked(LABELS, LABELS, LABELS)), LABELS),
        (encode(stacked(LABELS, LABELS, LABELS, OPAQUE)), LABELS),
        (encode(stacked(LABELS, OPAQUE)), LABELS),
        (with_palette(LABELS), LABELS),
        (Image.fromarray(SMALL > 0), SMALL),
    ],
)
def test_labels_are_read_as_they_are_stored(mask, labels):
    decoded = decode_mask(mask, "mask")
    assert decoded.mode == "L"
    np.testing.assert_array_equal(np.asarray(decoded), labels)


def two_color_bmp():
    """8 bits per pixel with a palette of black and white: Pillow takes it for 1 bit per pixel."""
    rows = bytes([0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    header = struct.pack("<IiiHHIIiiII", 40, 9, 1, 1, 8, 0, len(rows), 0, 0, 2, 0)
    start = 14 + len(header) + 8
    return (
        b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + bytes([0] * 4 + [255] * 3 + [0]) + rows
    )


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (encode(Image.fromarray(LABELS), "JPEG"), "stored as JPEG"),
        (encode(Image.fromarray(LABELS), "WEBP", lossless=True), "stored as WEBP"),
        (encode(Image.new("L", (16, 16)), "TIFF", compression="jpeg"), "TIFF with jpeg compression"),
        (encode(Image.fromarray(LABELS), "TIFF", tiffinfo={262: 0}), "0 is white"),
        (encode(Image.fromarray(LABELS.astype(np.uint16)), "TIFF", tiffinfo={262: 0}), "0 is white"),
        (encode(Image.fromarray(SMALL > 0), "PPM"), "0 is white"),
        (encode(Image.fromarray(LABELS.astype(np.uint16) * 100)), "numbers from 0 to 400"),
        (encode(Image.fromarray(-LABELS.astype(np.int32)), "TIFF"), "numbers from -4 to 0"),
        (encode(Image.fromarray(LABELS.astype(np.float32) / 2), "TIFF"), "not all whole"),
        (encode(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "numbers from nan to nan"),
        (encode(stacked(LABELS, LABELS, 0 * LABELS)), "colours or transparency"),
        (encode(stacked(LABELS, LABELS, LABELS, LABELS)), "colours or transparency"),
        (encode(Image.fromarray(LABELS).convert("CMYK"), "TIFF"), "channels C, M, Y, K"),
        (b"P5 5 2 20\n" + LABELS.tobytes(), "a depth that cannot be read"),
        (two_color_bmp(), "a depth that cannot be read"),
    ],
)  # fmt: skip
def test_what_holds_no_label_numbers_is_refused_with_a_remedy(mask, reason):
    with pytest.raises(UserError, match=r"^masks/7\.png .*; store one label number from 0 to 255 per pixel") as caught:
        decode_mask(mask, "masks/7.png")
    assert reason in str(caught.value)


def test_a_mask_is_turned_by_its_own_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_mask(encode(Image.fromarray(LABELS), exif=exif), "mask")
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(LABELS, -1))


def make_pair_folder(root, names=None, mask="a.png"):
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    (root / "images" / "a.jpg").write_bytes(encode(photo(0, 5, 2), "JPEG"))
    (root / "masks" / mask).write_bytes(encode(Image.fromarray(LABELS), "PNG" if mask.endswith("png") else "TIFF"))
    if names is not None:
        (root / "classes.txt").write_text(names, encoding="utf-8-sig")
    return f"custom://Segmentation?root='{root}'"


@pytest.mark.parametrize(
    ("names", "class_names", "ignored"),
    [
        (None, [], [255]),
        ("lawn\nbed\n", ["lawn", "bed"], [255]),
        ("(void)\r\nroad \r\n(sky)\r\n\r\n", ["(void)", "road", "(sky)"], [0, 2, 255]),
        ("\n".join(f"c{i}" for i in range(256)), [f"c{i}" for i in range(256)], []),
    ],
)
def test_a_folder_says_which_labels_count(tmp_path, names, class_names, ignored):
    dataset = make_dataset(make_pair_folder(tmp_path, names))
    assert dataset.class_names == class_names and dataset.ignore_labels == ignored


def test_ade20k_and_voc_have_the_published_conventions(ade_zip, voc_archives, monkeypatch, tmp_path):
    serve(monkeypatch, "ADE20K", ade_zip)
    assert make_dataset(f"custom://ADE20K?split='training'&root='{tmp_path}/ade'").ignore_labels == [0, 255]
    assert make_dataset(f"custom://VOC2012?split='val'&root='{tmp_path}/voc'").ignore_labels == [255]


def test_masks_may_have_another_ending(tmp_path):
    dataset = make_dataset(make_pair_folder(tmp_path, mask="a.tif"))
    np.testing.assert_array_equal(np.asarray(dataset[0].target()), LABELS)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("masks/a.tif", encode(Image.fromarray(LABELS), "TIFF"), r"a\.png and .*a\.tif have the same name"),
        ("images/a.png", encode(photo(1)), r"a\.jpg and .*a\.png have the same name"),
        ("images/b.png", encode(photo(1)), r"1 images have no mask of the same name .*such as b\.png"),
        ("classes.txt", b"road\nroad\n", r"classes\.txt has the name 'road' twice"),
        ("classes.txt", b"\xff\xfe", r"classes\.txt cannot be read"),
        ("classes.txt", "\n".join(map(str, range(257))).encode(), r"classes\.txt has 257 names"),
    ],
)
def test_a_folder_of_pairs_that_is_ambiguous_is_refused(tmp_path, file, content, message):
    url = make_pair_folder(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_dataset(url)


def test_a_refused_mask_is_named(tmp_path):
    url = make_pair_folder(tmp_path)
    (tmp_path / "masks" / "a.png").write_bytes(encode(Image.fromarray(LABELS), "JPEG"))  # whatever its name says
    with pytest.raises(UserError, match=r"masks/a\.png is stored as JPEG"):
        make_dataset(url)[0].target()


def test_masks_without_an_image_are_counted(tmp_path, caplog):
    url = make_pair_folder(tmp_path)
    (tmp_path / "masks" / "b.png").write_bytes(encode(Image.fromarray(LABELS)))
    make_dataset(url)
    assert "1 masks have no image, such as" in caplog.text


# -------------------------------------------------------------------------------------- classes and fingerprints


def test_classes_are_matched_by_name(caplog):
    known = ["ant", "bee", "cat"]
    assert match_classes(["cat", "ant"], "test", known, "train") == [2, 0]
    assert match_classes(known, "test", known, "train") == [0, 1, 2]
    assert match_classes([], "test", known, "train") is None
    assert not caplog.records
    assert match_classes(["x", "y"], "test", known, "train") is None
    assert "matched by number" in caplog.text
    with pytest.raises(UserError, match="test: its class dog is not a class of train"):
        match_classes(["cat", "dog"], "test", known, "train")
    cranes = ["tench", "crane", "drake", "crane"]  # two classes of ImageNet have one name
    assert match_classes(cranes, "test", cranes, "train") == [0, 1, 2, 3]
    assert match_classes(["drake", "tench"], "test", cranes, "train") == [2, 0]
    for names, others, where in ((cranes[:2], cranes, "train"), (cranes, cranes[:3], "test")):
        with pytest.raises(UserError, match=f"{where}: two of its classes are named crane"):
            match_classes(names, "test", others, "train")


def hub_table(folder, values):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": values}).to_parquet(folder / "x.parquet")
    return f"hf://parquet?data_files='{folder}/x.parquet'&split='train'&img_field='image'"


@pytest.mark.parametrize("source", ["images", "pairs", "classes", "hub"])
def test_a_fingerprint_is_that_of_the_content(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    url = {
        "images": str(tmp_path / "images"),
        "pairs": make_pair_folder(tmp_path / "pairs"),
        "classes": f"torchvision://ImageFolder?root='{tmp_path / 'classes'}'",
        "hub": hub_table(tmp_path, ["a"]),
    }[source]
    for folder in (tmp_path / "images", tmp_path / "classes" / "one"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_bytes(encode(Image.new("L", (5, 2), 1)))
    first = make_dataset(url).fingerprint()
    assert make_dataset(url).fingerprint() == first
    if source == "hub":
        hub_table(tmp_path, ["b"])
    else:
        path = {"images": "images/a.png", "pairs": "pairs/masks/a.png", "classes": "classes/one/a.png"}[source]
        data = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    assert make_dataset(url).fingerprint() != first
