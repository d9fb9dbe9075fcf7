"""Images of any bands and depth: tiny files with the right values beside them, and what becomes of these on the way."""

import io
import json
import shutil
import struct
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
import torch
import toy_method
import yaml
from conftest import ROOT
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from samples import encode, make_config, photo

import train_capi
import train_ijepa
from config import load_config
from data import PretrainLoader, normalize
from evaluation import FrozenModel, FrozenModelConfig, load_model_file
from reading import bands
from reading.bands import decode_bands, read_stored, resized
from reading.crops import Crop, cut
from reading.pixels import measure, sample_pixels
from reading.sources import BadImageError, ImageDataset, ImageStream, Sample, make_dataset
from utils import RGB8, Bands, Normalisation, UserError

H, W = 20, 24
DEEP = (0.0, 4000.0)


def values(num, seed=0, high=4000, dtype=np.uint16):
    """[h, w, bands], smooth, with the whole of the range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W] / W
    planes = [np.sin((2 + band) * x + rng.uniform(0, 6)) * np.cos((1 + band) * y) for band in range(num)]
    scaled = np.stack(planes, 2)
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min()) * high
    return scaled.astype(dtype) if np.issubdtype(dtype, np.floating) else scaled.round().astype(dtype)


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack", **options})
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def dicom(array, *, bits=12, slope=1, intercept=0, photometric="MONOCHROME2"):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Rows, image.Columns = array.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, photometric
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, bits, bits - 1, 0
    image.RescaleSlope, image.RescaleIntercept = slope, intercept
    image.PixelData = array.astype("<u2").tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, image, enforce_file_format=True)
    return file.getvalue()


def packed_tiff(array):
    """12 bits a pixel, two pixels in three bytes, as no library writes them."""
    first, second = array[:, ::2].astype(np.uint32), array[:, 1::2].astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 2).astype(np.uint8).tobytes()
    height, width = array.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(packed)
    return struct.pack("<2sHI", b"II", 42, start) + packed + struct.pack("<H", len(tags)) + directory + bytes(4)


def chw(array):
    return np.moveaxis(array, 2, 0)


GREY, TWO, RGB, FOUR, MANY = (values(num) for num in (1, 2, 3, 4, 13))
EIGHT = values(4, high=255, dtype=np.uint8)
FLOATS = values(4, high=1.5, dtype=np.float32) - np.float32(0.5)

TEST_SET = {
    "8 bits, grey, PNG": (encode(Image.fromarray(EIGHT[..., 0])), EIGHT[..., :1]),
    "8 bits, RGB, PNG": (encode(Image.fromarray(EIGHT[..., :3])), EIGHT[..., :3]),
    "8 bits, 4 bands, untagged, TIFF": (tiff(EIGHT, planarconfig="contig", extrasamples=["unspecified"] * 3), EIGHT),
    "8 bits, 13 bands, .npy": (npy(MANY.astype(np.uint8)), MANY.astype(np.uint8)),
    "12 bits, packed, TIFF": (packed_tiff(GREY[..., 0]), GREY),
    "12 bits, DICOM": (dicom(GREY[..., 0]), GREY),
    "12 bits, inverted, DICOM": (dicom(GREY[..., 0], photometric="MONOCHROME1"), 4095 - GREY),
    "12 bits, rescaled, DICOM": (dicom(GREY[..., 0], slope=2, intercept=-1000), 2.0 * GREY - 1000),
    "16 bits, grey, PNG": (encode(Image.fromarray(GREY[..., 0])), GREY),
    "16 bits, RGB, PNG": (imagecodecs.png_encode(RGB), RGB),
    "16 bits, 2 bands, .npy, bands first": (npy(chw(TWO)), TWO),
    "16 bits, big-endian, TIFF": (tiff(FOUR, byteorder=">", extrasamples=["unspecified"] * 3), FOUR),
    "16 bits, 13 bands, planar, deflated, TIFF": (tiff(chw(MANY), planarconfig="separate", compression="zlib"), MANY),
    "16 bits, 13 bands, a page each, LZW, BigTIFF": (tiff(chw(MANY), bigtiff=True, compression="lzw"), MANY),
    "16 bits, tiled, zstd, TIFF": (
        tiff(FOUR, tile=(16, 16), compression="zstd", extrasamples=["unspecified"] * 3),
        FOUR,
    ),
    "floats, predictor, TIFF": (
        tiff(FLOATS, compression="zlib", predictor=True, extrasamples=["unspecified"] * 3),
        FLOATS,
    ),
    "floats, Fortran order, .npy": (npy(np.asfortranarray(FLOATS)), FLOATS),
}


@pytest.mark.parametrize("name", TEST_SET)
def test_files_give_the_values_that_were_written(name):
    data, expected = TEST_SET[name]
    num = expected.shape[2]
    np.testing.assert_array_equal(read_stored(data, num).values, expected)
    if expected.dtype == np.uint8:
        pixels = decode_bands(data, Bands(num))
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.numpy(), chw(expected))
    else:
        low, high = (-0.25, 0.75) if expected.dtype == np.float32 else (100.0, 3000.0)  # some are clipped
        pixels = decode_bands(data, Bands(num, (low, high)))
        assert pixels.dtype == torch.float32
        right = np.clip((chw(expected).astype(np.float64) - low) / (high - low), 0, 1)
        np.testing.assert_allclose(pixels.numpy(), right, atol=1e-6)
    assert pixels.stride()[0] == 1 or num == 1, "the channels are not innermost"


def test_what_a_tagged_band_of_opacity_does():
    opacity = values(1, 7, high=65535)
    for data in (
        tiff(np.dstack([RGB, opacity]), photometric="rgb", extrasamples=["unassalpha"]),
        imagecodecs.png_encode(np.dstack([RGB, opacity])),
    ):
        on_white = decode_bands(data, Bands(3, DEEP)).double().numpy()
        a, colours = chw(opacity) / 65535, chw(RGB) / 4000
        np.testing.assert_allclose(on_white, colours * a + (1 - a), atol=1e-6)
        as_band = decode_bands(data, Bands(4, (0, 65535))).double().numpy()
        np.testing.assert_allclose(as_band, chw(np.dstack([RGB, opacity])) / 65535, atol=1e-6)
    premultiplied = (RGB * (opacity / 65535)).round().astype(np.uint16)
    data = tiff(np.dstack([premultiplied, opacity]), photometric="rgb", extrasamples=["assocalpha"])
    np.testing.assert_allclose(decode_bands(data, Bands(3, DEEP)).numpy(), on_white, atol=3e-4)
    untagged = tiff(np.dstack([RGB, opacity]), photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ValueError, match=r"4 bands, which do not make model\.in_chans=3"):
        decode_bands(untagged, Bands(3, DEEP))
    assert decode_bands(untagged, Bands(4, DEEP)).shape == (4, H, W)


def test_8_bit_rgb_is_the_same_by_either_way():
    """Also of grey, palettes, transparency and turned files."""
    picture, turned = photo(1, 30, 20), Image.Exif()
    turned[0x0112] = 6
    files = [
        encode(picture), encode(picture.convert("L")), encode(picture.convert("1")), encode(picture.convert("P")),
        encode(picture, "JPEG"), encode(picture, "JPEG", exif=turned), encode(picture.convert("CMYK"), "JPEG"),
        encode(picture.convert("LA")), encode(picture.quantize(8), "GIF", transparency=3), encode(picture, "TIFF"),
        tiff(chw(np.array(picture)), photometric="rgb", planarconfig="separate"), encode(picture.convert("P"), "TIFF"),
        encode(picture, "TIFF", tiffinfo={274: 6}), encode(picture, "TIFF", tiffinfo={274: 5}),
        encode(picture.convert("1"), "TIFF", compression="group4"), encode(picture, "TIFF", compression="jpeg"),
        encode(picture.convert("RGBA"), "TIFF"), encode(picture, "WEBP", lossless=True),
    ]  # fmt: skip
    for number, data in enumerate(files):
        ours, pillows = decode_bands(data, RGB8), Sample("x", lambda data=data: data).pixels()
        assert (ours.int() - pillows.int()).abs().max() <= (1 if number in (4, 5, 6) else 0), number
    translucent = picture.copy()
    translucent.putalpha(Image.linear_gradient("L").resize(picture.size))
    data = encode(translucent)
    assert (decode_bands(data, RGB8).int() - Sample("x", lambda: data).pixels().int()).abs().max() <= 1


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_is_as_bright_as_pillow_has_it(bits, photometric):
    grey = values(1, high=2**bits - 1, dtype=np.uint8)[..., 0]
    for orientation in (1, 6):
        turned = [(274, "H", 1, orientation, True)]
        data = tiff(grey > 0 if bits == 1 else grey, photometric=photometric, bitspersample=bits, extratags=turned)
        expected = np.asarray(Sample("x", lambda data=data: data).image())
        assert expected.min() == 0 and expected.max() == 255
        np.testing.assert_array_equal(decode_bands(data, Bands(1))[0], expected[..., 0])
        scaled = decode_bands(data, Bands(3, (0, 255))).numpy()
        np.testing.assert_allclose(scaled, np.moveaxis(expected, 2, 0) / 255, atol=1e-6)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_16_bits_are_white_where_the_file_says_so_by_either_way(photometric):
    grey = values(1, high=65535)[..., 0]
    right = np.round((grey if photometric == "minisblack" else 65535 - grey) / 257)
    for orientation in (1, 6):
        data = tiff(grey, photometric=photometric, extratags=[(274, "H", 1, orientation, True)])
        expected = right if orientation == 1 else np.rot90(right, -1)
        for pixels in (
            Sample("x", lambda data=data: data).pixels().numpy(),
            decode_bands(data, Bands(3, (0, 65535))).mul(255).round().numpy(),
        ):
            np.testing.assert_array_equal(pixels, np.stack([expected] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("before_pixels", [True, False])
def test_a_png_of_16_bits_is_turned_as_one_of_8_is(orientation, before_pixels):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    plain = imagecodecs.png_encode(values(3, high=65535))
    place = plain.index(b"IDAT" if before_pixels else b"IEND") - 4
    data = plain[:place] + chunk + plain[place:]
    ours = decode_bands(data, Bands(3, (0, 65535))).numpy()
    pillows = np.moveaxis(np.asarray(Sample("x", lambda: data).image()), 2, 0) / 255
    np.testing.assert_allclose(ours, pillows, atol=1 / 255)


def cut_short(data):
    return data[: len(data) - len(data) // 4]


def with_shape(data, *shape):
    """A .npy whose header says another shape."""
    array, file = np.load(io.BytesIO(data)), io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


NAN = FLOATS.copy()
NAN[3, 4, 1] = np.nan
BAD = {
    "cut TIFF": (cut_short(tiff(FOUR, extrasamples=["unspecified"] * 3)), "its header says"),
    "cut deflated TIFF": (cut_short(tiff(FOUR, compression="zlib", extrasamples=["unspecified"] * 3)), "header|TIFF"),
    "cut .npy": (cut_short(npy(FOUR)), "its header says"),
    "lying .npy": (with_shape(npy(FOUR), 9, 24, 4), "its header says"),
    "huge .npy": (with_shape(npy(FOUR), 10**9, 2, 4), "more than is believed"),
    "pickle": (npy(np.array([[{}]], dtype=object)), "object"),
    "cut DICOM": (cut_short(dicom(GREY[..., 0])), "DICOM|bytes"),
    "cut 16-bit PNG": (cut_short(imagecodecs.png_encode(RGB)), "PNG"),
    "NaN": (tiff(NAN, extrasamples=["unspecified"] * 3), "1 of 1920 values are not finite"),
    "other bands": (tiff(chw(MANY), planarconfig="separate"), r"uint16, 13 bands, which do not make model\.in_chans=4"),
    "outside of the range": (npy(FOUR + np.uint16(9000)), r"lie outside of data\.value_range=\[0, 4000\]"),
    "8 bits among deeper ones": (npy(EIGHT), "stored as uint8, not as deep as"),
    "complex": (npy(FLOATS.astype(np.complex64)), "no numbers that are pixels"),
    "no image": (b"\x93NUMPY\x01\x00", "."),
    "a film": (tiff(np.stack([FOUR] * 3)[..., 0], imagej=True, metadata={"axes": "TYX"}), "axes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_a_reason(name):
    data, message = BAD[name]
    with pytest.raises(BadImageError, match=message) as error:
        Sample("x.tif", lambda: data).pixels(bands=Bands(4, DEEP))
    assert error.value.name == "x.tif"


def test_deep_files_without_a_range_ask_for_one():
    with pytest.raises(BadImageError, match=r"stored as uint16.*set data\.value_range=auto"):
        Sample("x", lambda: npy(RGB)).pixels()
    with pytest.raises(BadImageError, match=r"set data\.value_range=auto"):
        Sample("x", lambda: tiff(chw(MANY), planarconfig="separate")).pixels(bands=Bands(13))
    with pytest.raises(BadImageError, match=r"damaged, or no 8-bit RGB.*model\.in_chans and data\.value_range"):
        Sample("x", lambda: tiff(chw(MANY), planarconfig="separate")).pixels()


def test_no_data_is_the_low_end_and_is_not_measured():
    array = FLOATS.copy()
    array[:5] = 9999  # not the low end by being clipped
    tag = [(bands.NO_DATA, "s", 0, "9999", True)]
    data = tiff(array, extratags=tag, extrasamples=["unspecified"] * 3)
    pixels = decode_bands(data, Bands(4, (-0.5, 1.0)))
    assert (pixels[:, :5] == 0).all() and (pixels[:, 5:] > 0).any()
    measured, _ = measure(MemoryBands([data]), 4, "auto", 0)
    assert measured.value_range is not None and measured.value_range[1] <= 1.0


@pytest.mark.parametrize(("value_range", "low"), [(None, 0), ((0.0, 255.0), 0.0)])
def test_no_data_of_8_bits_is_the_low_end(value_range, low):
    array = EIGHT.copy()
    array[:5] = 255
    options = {"extratags": [(bands.NO_DATA, "s", 0, "255", True)], "extrasamples": ["unspecified"] * 3}
    pixels = decode_bands(tiff(array, planarconfig="contig", **options), Bands(4, value_range)).numpy()
    expected = np.where(chw(array) == 255, low, chw(array) / (255 if value_range else 1))
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    options["extrasamples"] = ["unassalpha"]  # which is no measurement
    with_opacity = decode_bands(tiff(array, photometric="rgb", **options), Bands(4, value_range)).numpy()
    np.testing.assert_allclose(with_opacity[:3], expected[:3], atol=1e-6)
    assert (with_opacity[3, :5] == (1 if value_range else 255)).all()


def test_no_data_is_the_number_that_is_stored_not_what_becomes_of_it():
    tag = [(bands.NO_DATA, "s", 0, "255", True)]
    inverted = EIGHT[..., 0].copy()
    inverted[:5] = 255
    inverted[5:7] = 0  # which becomes 255
    pixels = decode_bands(tiff(inverted, photometric="miniswhite", extratags=tag), Bands(1)).numpy()
    np.testing.assert_array_equal(pixels[0], np.where(inverted == 255, 0, 255 - inverted))
    colours = np.zeros((3, 256), np.uint16)
    colours[0] = 65535  # red of any index
    pixels = decode_bands(tiff(inverted, photometric="palette", colormap=colours, extratags=tag), Bands(3, (0, 255)))
    assert (pixels[0] == 1).all() and not pixels[1:].any(), "a palette stands for its colours"


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    for package, data in (
        ("tifffile", tiff(FOUR)),
        ("pydicom", dicom(GREY[..., 0])),
        ("imagecodecs", BAD["cut 16-bit PNG"][0]),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{package}, which is not installed: pip install .*\[bands\]"):
            Sample("x", lambda data=data: data).pixels(bands=Bands(4, DEEP))


# ------------------------------------------------------------------------------------------------ from crop to batch


class MemoryBands(ImageDataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Sample(f"image {index}", lambda: self.files[index])


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "lanczos"])
def test_a_crop_of_deep_bands_is_that_of_each_band_by_pillow(mode):
    pixels = torch.from_numpy(chw(MANY) / np.float32(4000))
    box = Crop(2, 3, 15, 17, flip=True)
    actual = cut(pixels, box, 8, mode)
    assert actual.dtype == torch.float32 and actual.stride()[0] == 1
    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "lanczos": Image.Resampling.LANCZOS,
    }
    for band, ours in zip(pixels.numpy(), actual, strict=True):
        resized_band = Image.fromarray(band[2:17, 3:20]).resize((8, 8), filters[mode])
        np.testing.assert_allclose(ours.numpy(), np.array(resized_band).clip(0, 1)[:, ::-1], atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 4, 13])
@pytest.mark.parametrize("mode", ["bicubic", "lanczos"])
def test_a_crop_of_8_bits_stays_8_bits(num, mode):
    pixels = torch.from_numpy(chw(values(num, high=255, dtype=np.uint8)).copy())
    crop = cut(pixels, Crop(0, 0, H, W, flip=False), 8, mode)
    assert crop.dtype == torch.uint8 and crop.shape == (num, 8, 8)
    exact = resized(pixels / 255, 8, 8, mode) * 255
    assert (crop - exact).abs().max() <= 1


def test_small_differences_of_deep_values_reach_the_batch():
    """A range of 16 of 65536 values, which 8 bits do not tell apart."""
    faint = (1000 + values(2, high=16)).astype(np.uint16)
    cfg = make_config("model.in_chans=2", "data.value_range=[1000,1016]", "data.mean=[0,0]", "data.std=[1,1]")
    with PretrainLoader(
        cfg.data, lambda keys: {}, seed=0, batch_size=2, num_workers=0, dataset=MemoryBands([npy(faint)] * 3)
    ) as loader:
        batch = next(loader)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (2, 2, 56, 56)
    assert len(batch.images.unique()) > 256
    assert 0 <= batch.images.min() < 0.1 and 0.9 < batch.images.max() <= 1
    before = batch.images.clone()
    expected = (batch.images - 0.5) / 0.25
    torch.testing.assert_close(normalize(batch.images, mean=(0.5, 0.5), std=(0.25, 0.25)), expected)
    assert torch.equal(batch.images, before), "the batch was changed in place"


def test_bands_that_differ_within_a_folder_are_counted_and_named(tmp_path):
    files = [npy(FOUR)] * 9 + [npy(RGB)]
    cfg = make_config("model.in_chans=4", "data.value_range=[0,4000]", "data.mean=[0,0,0,0]", "data.std=[1,1,1,1]",
                      "data.max_bad_fraction=0.5")  # fmt: skip
    path = tmp_path / "bad_files.jsonl"
    with PretrainLoader(
        cfg.data, lambda keys: {}, seed=0, batch_size=5, num_workers=0, dataset=MemoryBands(files), bad_files_path=path
    ) as loader:
        next(loader), next(loader)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["file"] == "image 9" and "3 bands, which do not make model.in_chans=4" in line["reason"]


def test_arrays_are_images_only_where_there_are_no_others(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.npy").write_bytes(npy(FOUR))
    assert len(make_dataset(str(tmp_path))) == 3
    (tmp_path / "x.png").write_bytes(encode(photo(0)))
    dataset = make_dataset(str(tmp_path))
    assert [Path(dataset[i].name).name for i in range(len(dataset))] == ["x.png"]


# ---------------------------------------------------------------------------------------- measuring, and what travels


def write_folder(root, num=8, bands=4):
    root.mkdir()
    for number in range(num):
        (root / f"{number}.tif").write_bytes(
            tiff(chw(values(bands, number)), planarconfig="separate", compression="zlib")
        )
    return root


def test_measured_statistics_are_those_of_the_pixels_and_follow_from_the_seed(tmp_path):
    dataset = make_dataset(str(write_folder(tmp_path / "x")))
    measured, _ = measure(dataset, 4, "auto", seed=0)
    everything = np.stack([chw(values(4, number)) for number in range(8)]).astype(np.float64)
    low, high = np.quantile(everything, [0.001, 0.999])
    assert measured.value_range == (np.floor(low), np.ceil(high))
    scaled = ((everything - measured.value_range[0]) / (measured.value_range[1] - measured.value_range[0])).clip(0, 1)
    np.testing.assert_allclose(measured.mean, scaled.mean((0, 2, 3)), rtol=1e-3)
    np.testing.assert_allclose(measured.std, scaled.std((0, 2, 3)), rtol=1e-3)
    assert measure(dataset, 4, "auto", seed=0)[0] == measured
    assert measure(MemoryBands([npy(EIGHT)] * 2), 4, "auto", seed=0)[0].value_range is None, "8 bits stay as they are"


def test_a_sample_of_a_large_set_depends_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr("reading.pixels.MEASURED_IMAGES", 4)
    asked = []

    class Watched(MemoryBands):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    for seed in (0, 0, 1):
        measure(Watched([npy(FOUR)] * 40), 4, "auto", seed)
    assert asked[:4] == asked[4:8] != asked[8:] and len(set(asked[:4])) == 4


def test_a_stream_is_measured_too():
    class Stream(ImageStream):
        num_shards = 2

        def read_shard(self, shard, start=0):
            return iter([Sample("x", lambda: npy(FOUR))] * 3)

    measured, found = measure(Stream(), 4, DEEP, 0)
    assert found.num == 3 and measured.value_range == DEEP and len(measured.mean) == 4
    assert sample_pixels(Stream(), Bands(4, DEEP)).num == 3


def test_the_log_says_range_mean_deviation_and_what_is_clipped():
    found = sample_pixels(MemoryBands([npy(FOUR), npy(RGB)]), Bands(4, (1000.0, 3000.0)))
    text = "\n".join(found.lines())
    assert "1 uint16, 4 bands, values 0 to 4000" in text and "band 4 0.000 to 1.000, mean" in text
    warnings = "\n".join(found.warnings())
    assert "lie outside of data.value_range=[1000, 3000]" in warnings and "1 of 2 images cannot be read" in warnings


def test_without_a_readable_image_measuring_says_why():
    with pytest.raises(UserError, match=r"none of 2 images could be measured, first image 0: .*3 bands"):
        measure(MemoryBands([npy(RGB)] * 2), 4, DEEP, 0)
    with pytest.raises(UserError, match=r"data\.value_range=auto: the images have one value everywhere"):
        measure(MemoryBands([npy(np.full((8, 8, 4), 7, np.uint16))]), 4, "auto", 0)


AUTO = ("data.value_range=auto", "data.mean=auto", "data.std=auto", "model.in_chans=4")
SMALL = (
    "optim.batch_size_per_gpu=2", "optim.total_iters=2", "optim.lr_schedule.warmup_iters=0", "train.device=cpu",
    "efficiency.param_dtype=float32", "efficiency.dataloader_num_workers=0", "train.probe.every=0",
)  # fmt: skip


@pytest.fixture
def toy(tmp_path):
    """Runs the toy method on a folder of four 16-bit bands; gives the arguments of its command line."""
    folder = write_folder(tmp_path / "images")
    toy_method.write_config(tmp_path / "toy.yaml", folder)
    return [str(tmp_path / "toy.yaml"), *AUTO, *SMALL]


def config_of(path):
    return yaml.safe_load(Path(path).read_text())["data"]


@pytest.mark.long
def test_what_was_measured_is_kept_resumed_and_exported(toy, tmp_path, capsys):
    run = tmp_path / "run"
    where = f"train.output_dir={run}"
    assert toy_method.main([*toy, where, "--dry-run"]) == 0
    assert "normalised   values from 1 to 3999 as 0 to 1" in capsys.readouterr().out
    assert toy_method.main([*toy, where]) == 0
    measured = {key: config_of(run / "config.yaml")[key] for key in ("value_range", "mean", "std")}
    assert len(measured["mean"]) == len(measured["std"]) == 4 and measured["value_range"][1] <= 4000
    assert "normalised: values from" in (run / "log.txt").read_text()
    for path in (tmp_path / "images").iterdir():  # brighter images, which the rest of the run does not measure
        path.write_bytes(tiff(chw(values(4, 3, high=9000)), planarconfig="separate"))
    assert toy_method.main([*toy, where, "optim.total_iters=3"]) == 0
    for file in (run / "config.yaml", run / "student.yaml", run / "checkpoints" / "step_000000003" / "config.yaml"):
        assert {key: config_of(file)[key] for key in measured} == measured, file
    (run / "student.yaml").unlink()
    assert toy_method.main([*toy, where, "--export"]) == 0
    assert {key: config_of(run / "student.yaml")[key] for key in measured} == measured


def test_a_mixture_is_measured_by_its_shares(toy, tmp_path, capsys):
    """Where one data set of two is a hundredth of what is seen, its bright images hardly count."""
    (tmp_path / "bright").mkdir()
    for i in range(4):
        np.save(tmp_path / "bright" / f"{i}.npy", np.full((24, 24, 4), 60_000, np.uint16))
    where = f"train.output_dir={tmp_path / 'run'}"
    means = {}
    for weight in (1, 99):
        mixture = f"data.dataset={{{tmp_path / 'bright'}: {weight}, {tmp_path / 'images'}: {100 - weight}}}"
        assert toy_method.main([*toy, where, mixture, "data.value_range=[0,60000]"]) == 0
        means[weight] = config_of(tmp_path / "run" / "config.yaml")["mean"]
        shutil.rmtree(tmp_path / "run")
    assert max(means[1]) < 0.1 and min(means[99]) > 0.9


METHODS = {
    "capi": (train_capi, "configs/imagenette.yaml", "model.py", (
        "capi.num_clusters=8", "model.transformers_kwargs.embed_dim=16", "model.encoder_kwargs.depth=1",
        "model.decoder_kwargs.depth=1", "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=2",
    )),
    "ijepa": (train_ijepa, "configs/ijepa/imagenette.yaml", "ijepa.py", (
        "optim.epochs=null", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "predictor.embed_dim=8",
        "predictor.depth=1", "data.images_per_epoch=null", "predictor.num_heads=2",
    )),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_use_of_an_export_normalises_as_its_training(method, tmp_path):
    """Loader, evaluations, hub and torch.hub know range, mean and deviation; what is given to an evaluation wins."""
    script, config, model_path, sizes = METHODS[method]
    run, folder = tmp_path / "run", write_folder(tmp_path / "images")
    args = [
        str(ROOT / config),
        *AUTO,
        *SMALL,
        *sizes,
        f"data.dataset={folder}",
        f"train.output_dir={run}",
        "evals=null",
    ]
    assert script.main([*args, "data.images_size=32"]) == 0
    weights = str(run / "student_ema.pth")
    said = config_of(run / "student_ema.yaml")
    model = load_model_file(str(ROOT / model_path), {"pretrained_weights": weights})
    assert model.normalisation == Normalisation(*(tuple(said[key]) for key in ("value_range", "mean", "std")))
    raw = torch.from_numpy(chw(values(4, 5)).astype(np.float32))[None, :, :16, :16]
    expected = model(model.normalisation(raw)).feature_map
    low, high = said["value_range"]
    frozen = FrozenModel(model, FrozenModelConfig(), torch.device("cpu"), model_path)
    assert frozen.bands == Bands(4, (low, high))
    torch.testing.assert_close(frozen(((raw - low) / (high - low)).clamp(0, 1)).feature_map, expected)
    other = FrozenModel(model, FrozenModelConfig(image_mean=[0.5] * 4), torch.device("cpu"), model_path)
    assert other.normalisation.mean == (0.5,) * 4 and other.normalisation.std == model.normalisation.std
    with pytest.raises(UserError, match=r"image_std=\[1.0\]: must have a number for each of the model's 4 bands"):
        FrozenModel(model, FrozenModelConfig(image_std=[1.0]), torch.device("cpu"), model_path)
    model.save_pretrained(tmp_path / "hub")
    again = type(model).from_pretrained(str(tmp_path / "hub"))
    assert again.normalisation == model.normalisation
    torch.testing.assert_close(again(again.normalisation(raw)).feature_map, expected)
    assert "model.normalisation(values)" in (tmp_path / "hub" / "README.md").read_text()
    import hubconf

    for source in (run, tmp_path / "hub"):
        hub = getattr(hubconf, method)(source)
        assert hub.normalisation.mean == model.normalisation.mean, source
        torch.testing.assert_close(hub(hub.normalisation(raw)).feature_map, expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.value_range=[5,5]"], r"data\.value_range=\[5.0, 5.0\]: must be \[lowest, highest\]"),
        (["data.value_range=sixteen"], r"data\.value_range='sixteen': must be one of auto"),
        (["data.mean=[0.5,0.5]"], r"data\.std=.*as many numbers as data\.mean has, 2"),
        (["data.value_range=[0,1]", "data.decode=gpu"], r"data\.decode='gpu': is for 8-bit RGB"),
        (["data.do_turns=true", "data.decode=gpu"], r"data\.decode='gpu': turns no images; use data\.decode=cpu"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        make_config(*overrides)


def test_colours_of_stop_are_for_8_bit_rgb():
    overrides = ["data.value_range=[0,1]", "data.blur=0.5", "data.dataset=x"]
    with pytest.raises(UserError, match=r"data\.blur=0\.5: is for 8-bit RGB; use data\.blur=0"):
        load_config(train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG, overrides)


def test_defaults_are_8_bit_rgb_and_imagenet():
    data = make_config().data
    assert data.bands == RGB8 and data.normalisation == Normalisation()
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(data.normalisation(images), normalize(images), rtol=1e-5, atol=1e-6)
