"""Images of any bands and bit depth: from the bytes of a file to the values that it stores, and to those trained on.

`read_stored` keeps what a file has; `decode_bands` makes as many bands of it as a model takes, by one rule each for
grey, palettes and opacity. Beside what Pillow opens, `.npy` arrays, TIFF and BigTIFF of any depth and number of bands
(tifffile and imagecodecs, GeoTIFF among them), PNG of 16 bits, and DICOM (pydicom). Their packages are imported where
they are used: `pip install -c constraints.txt -e '.[bands]'`.
"""

import functools
import io
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from utils import Bands, UserError

ARRAY_ENDINGS = (".btf", ".dcm", ".dicom", ".npy", ".tf8")
"""Of files that count as images in a folder without any of which Pillow knows the ending."""

MAX_PIXELS = 2 * 89_478_485
"""Of an image; a header that says more is not believed, as Pillow does not."""

ALPHA_ASSOCIATED, ALPHA_UNASSOCIATED = 1, 2
"""What a TIFF says of a further band: opacity by which colours are multiplied already, or not. 0 says nothing."""
PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
"""What a PNG contains that may say how it is to be turned."""
NO_DATA = 42113
"""The tag of GDAL that says which value stands for no data."""


@dataclass(frozen=True)
class Stored:
    """The values of an image as its file has them."""

    values: Shaped[np.ndarray, "h w c"]
    alpha: int | None = None
    """`ALPHA_ASSOCIATED` or `ALPHA_UNASSOCIATED` if the last band is known to be opacity."""
    no_data: float | None = None
    """The value, perhaps NaN, that stands for no data."""
    bits: int = 8

    @property
    def missing(self) -> Shaped[np.ndarray, "h w c"] | None:
        """Where there is no data, which opacity never lacks; None if the file does not say."""
        if self.no_data is None:
            return None
        missing = np.isnan(self.values) if math.isnan(self.no_data) else self.values == self.no_data
        if self.alpha is not None:
            missing[..., -1] = False
        return missing

    def thinned(self, num_pixels: int) -> "Stored":
        """At least about so many of the pixels, evenly spaced; all of a small image."""
        height, width = self.values.shape[:2]
        step = max(1, math.isqrt(height * width // num_pixels))
        return replace(self, values=self.values[::step, ::step].copy())

    @property
    def measured(self) -> Shaped[np.ndarray, " values"]:
        """Values that are data and no opacity."""
        kept = self.values if self.alpha is None else self.values[..., :-1]
        missing = self.missing
        return kept.ravel() if missing is None else kept[~missing[..., : kept.shape[2]]]

    def describe(self) -> str:
        """Depth and bands, for people."""
        num = self.values.shape[2]
        tagged = ", the last of them opacity" if self.alpha is not None else ""
        return f"{self.values.dtype}, {num} band{'s' * (num > 1)}{tagged}"


def is_array_file(data: Any) -> bool:
    """Whether Pillow has no reader for the bytes of a file, but this module has."""
    return isinstance(data, bytes) and (_is_npy(data) or _is_dicom(data) or data[:4] in (b"II+\0", b"MM\0+"))


def _is_npy(data: bytes) -> bool:
    return data.startswith(b"\x93NUMPY")


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def _is_deep_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6")


def read_stored(data: bytes | Image.Image, num: int = 3) -> Stored:
    """The values of an image, upright, in the depth in which its file has them.

    Args:
        data: contents of the file, or an image that is already decoded.
        num: bands that are wanted, by which the axes of an array without names are told apart.

    Raises: UserError naming the package that is missing; ValueError, or what its reader raises, for a damaged file.
    """
    if isinstance(data, bytes):
        if _is_npy(data):
            return _read_npy(data, num)
        if _is_dicom(data):
            return _read_dicom(data)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _read_tiff(data)
        if _is_deep_png(data):
            return _read_deep_png(data)
    return _read_pillow(Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data)


def decode_bands(data: bytes | Image.Image, bands: Bands) -> Shaped[Tensor, "c h w"]:
    """The values of an image as they are trained on, channels innermost in memory: uint8, or float32 in [0, 1].

    The rules, beside the one that a file with as many bands as are wanted is taken as it is:

    - grey, where three bands are wanted, is repeated; else it is one band;
    - a palette stands for its colours;
    - a band that the file calls opacity is a band like others where it is the last one wanted beyond three; else it
      puts the image on white, which is the upper end of the range, and is left out. A further band of which the file
      does not say that is never taken for opacity;
    - pixels that the file declares to be without data get the lower end of the range, of 8 bits 0. As 8-bit RGB they
      stay as they are, and those of a palette have their colour.

    Args:
        data: contents of the file, or an image that is already decoded.
        bands: what is made of it.

    Raises: as `read_stored`; ValueError if the image has other bands or another depth, values that are not finite, or
        none within the range.
    """
    return combined(read_stored(data, bands.num), bands)


def combined(stored: Stored, bands: Bands) -> Shaped[Tensor, "c h w"]:
    """The bands that are trained on, of values that were read; see `decode_bands`."""
    values = as_numbers(stored, bands)
    fits = values.shape[2] == bands.num and not (bands.num == 3 and stored.alpha is not None)
    if not fits and stored.alpha is not None:
        values = _on_white(values, stored, bands)
    if values.shape[2] == 1 and bands.num == 3:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] != bands.num:
        raise ValueError(f"it has {stored.describe()}, which do not make model.in_chans={bands.num}")
    values = np.ascontiguousarray(values)
    # Of a file's own bytes, which are not to be written to, a copy.
    return torch.from_numpy(values if values.flags.writeable else values.copy()).permute(2, 0, 1)


def as_numbers(stored: Stored, bands: Bands) -> np.ndarray:
    """The stored values as uint8, or scaled by the range to float32 in [0, 1], and clipped; see `decode_bands`.

    True is as bright as 255.
    """
    values, missing = stored.values, stored.missing
    if values.size == 0 or values.dtype.kind not in "buif":
        raise ValueError(f"it has {stored.describe()}, and no numbers that are pixels")
    if bands.value_range is None:
        if values.dtype == bool:
            values = values.astype(np.uint8) * 255
        elif values.dtype != np.uint8:
            raise ValueError(
                f"it is stored as {values.dtype}, and data.value_range=null is for 8 bits; set data.value_range=auto, "
                "or to [lowest, highest]"
            )
        # Pillow, which reads most files of 8-bit RGB, knows nothing of missing data.
        return values if missing is None or bands.are_rgb8 else np.where(missing, np.uint8(0), values)
    low, high = bands.value_range
    if values.dtype in (np.uint8, bool) and high > 255:
        raise ValueError(f"it is stored as {values.dtype}, not as deep as data.value_range=[{low:g}, {high:g}] says")
    if values.dtype == bool:
        values = values * np.float32(high)  # what is beyond would be clipped
    known = values if missing is None else values[~missing]
    if values.dtype.kind == "f" and not np.isfinite(known).all():
        raise ValueError(f"{int((~np.isfinite(known)).sum())} of {values.size} values are not finite")
    if known.size and (known.max() < low or known.min() > high):
        raise ValueError(
            f"all values, {known.min():g} to {known.max():g}, lie outside of data.value_range=[{low:g}, {high:g}]"
        )
    # Large integers have more digits than float32.
    wide = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    scaled = np.clip((wide - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return scaled if missing is None else np.where(missing, np.float32(0), scaled)


def _on_white(values: np.ndarray, stored: Stored, bands: Bands) -> np.ndarray:
    """The bands but for the last one, which says how opaque they are, on white."""
    full = 255.0 if bands.value_range is None else 1.0
    # Opacity has the depth of the file, not the range of what is measured.
    raw = stored.values[..., -1:].astype(np.float64)
    opacity = np.clip(raw / (1.0 if stored.values.dtype.kind in "bf" else 2.0**stored.bits - 1), 0, 1)
    colours = values[..., :-1].astype(np.float64)
    seen = colours if stored.alpha == ALPHA_ASSOCIATED else colours * opacity
    mixed = np.clip(seen + (1 - opacity) * full, 0, full)
    return np.round(mixed).astype(np.uint8) if bands.value_range is None else mixed.astype(np.float32)


# ----------------------------------------------------------------------------------------------------- readers


def missing_package(what: str, error: ImportError) -> UserError:
    """The error of a reader whose package is not installed."""
    return UserError(
        f"{what} needs {error.name or error}, which is not installed: pip install -c constraints.txt -e '.[bands]'"
    )


def _check_size(shape: tuple[int, ...]) -> None:
    if min(shape, default=0) < 1:
        raise ValueError(f"its header says that it has {' x '.join(map(str, shape))} values")
    if math.prod(sorted(shape)[-2:]) > MAX_PIXELS:
        raise ValueError(f"its header says that it has {' x '.join(map(str, shape))} values, more than is believed")


def _read_npy(data: bytes, num: int) -> Stored:
    """`[h, w]`, or with an axis of bands that is first or last: the one of `num`, else of 1, and the last if both."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject or len(shape) not in (2, 3):
        raise ValueError(
            f"it is an array {list(shape)} of {dtype}, not [h, w], [h, w, bands] or [bands, h, w] of numbers"
        )
    _check_size(shape)
    has = len(data) - file.tell()
    if math.prod(shape) * dtype.itemsize != has:
        raise ValueError(
            f"its header says {list(shape)} of {dtype}, {math.prod(shape) * dtype.itemsize} bytes; it has {has}"
        )
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")
    if values.ndim == 2:
        values = values[..., None]
    elif values.shape[2] != num and (values.shape[0] == num or (values.shape[2] != 1 and values.shape[0] == 1)):
        values = np.moveaxis(values, 0, 2)
    return Stored(_native(values), bits=8 * dtype.itemsize)


def _native(values: np.ndarray) -> np.ndarray:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _read_dicom(data: bytes) -> Stored:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
    except ImportError as error:
        raise missing_package("DICOM", error) from error
    try:
        header = pydicom.dcmread(io.BytesIO(data))
        frames = int(header.get("NumberOfFrames", 1) or 1)
        if frames != 1:
            raise ValueError(f"it has {frames} frames; save those to train on as files of their own")
        _check_size((int(header.Rows), int(header.Columns)))
        values, bits = header.pixel_array, int(header.BitsStored)
        if header.PhotometricInterpretation == "PALETTE COLOR":
            values = apply_color_lut(values, header)
        elif header.PhotometricInterpretation == "MONOCHROME1":  # low values are bright
            values = (2**bits - 1 if header.PixelRepresentation == 0 else -1) - values
        if values.ndim == 2:
            values = np.asarray(apply_modality_lut(values, header))
    except (AttributeError, RuntimeError, InvalidDicomError, NotImplementedError) as error:
        raise ValueError(f"DICOM: {error}") from error
    return Stored(values[..., None] if values.ndim == 2 else values, bits=bits)


def _read_deep_png(data: bytes) -> Stored:
    try:
        import imagecodecs
    except ImportError as error:
        raise missing_package("PNG of 16 bits and several bands", error) from error
    width, height = struct.unpack(">II", data[16:24])
    _check_size((height, width))
    try:
        values = imagecodecs.png_decode(data)
    except RuntimeError as error:
        raise ValueError(f"PNG: {error}") from error
    orientation = 1
    if any(each in data for each in PNG_METADATA):  # else Pillow would decode the image to look for it
        orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
    return Stored(_upright(values, orientation), ALPHA_UNASSOCIATED if data[25] in (4, 6) else None, bits=16)


def _read_tiff(data: bytes) -> Stored:
    try:
        import imagecodecs  # noqa: F401  # tifffile asks for it once it meets a compressed file
        import tifffile
    except ImportError as error:
        raise missing_package("TIFF of more than 8 bits or other than three bands", error) from error
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return _tiff_values(file, len(data))
    except (tifffile.TiffFileError, RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"TIFF: {error}") from error


def _tiff_values(file: Any, num_bytes: int) -> Stored:
    """The first image of a file: its samples are bands, or, where each page has one, its pages are."""
    series = file.series[0]
    page: Any = series.pages[0]
    _check_size(series.shape)
    for each in series.pages:
        ends = [start + length for start, length in zip(each.dataoffsets, each.databytecounts, strict=True)]
        if max(ends, default=0) > num_bytes or not ends:
            raise ValueError(f"its header says that pixels go up to byte {max(ends, default=0)}; it has {num_bytes}")
    if not page.is_tiled and page.planarconfig == 1 and page.compression == 1:
        needed = -(-page.imagewidth * page.samplesperpixel * page.bitspersample // 8) * page.imagelength
        if sum(page.databytecounts) < needed:
            raise ValueError(f"its header says {needed} bytes of pixels; it has {sum(page.databytecounts)}")
    values, axes = series.asarray(), series.axes
    kept = [axis for axis, size in zip(axes, series.shape, strict=True) if size > 1 or axis in "YX"]
    values = values.reshape([size for axis, size in zip(axes, series.shape, strict=True) if axis in kept])
    others = [axis for axis in kept if axis not in "YX"]
    if "Y" not in kept or "X" not in kept or len(others) > 1 or others in (["Z"], ["T"]):
        raise ValueError(f"it has axes {axes} of {list(series.shape)}; save one image of bands, rows and columns")
    values = values[..., None] if not others else np.moveaxis(values, kept.index(others[0]), 2)
    if others and kept.index("Y") > kept.index("X"):
        raise ValueError(f"it has axes {axes}; save rows before columns")
    bits, photometric = int(page.bitspersample), int(page.photometric)
    tag = page.tags.get(NO_DATA)
    no_data = None if tag is None else float(str(tag.value).strip("\0 "))
    if photometric == 3:  # a palette: 16-bit colours, red, green and blue one after the other
        values = (page.colormap.T[values[..., 0]] >> 8).astype(np.uint8)
        bits, no_data = 8, None
    elif photometric == 0 and values.dtype.kind in "bu":  # 0 is white
        values = ~values if values.dtype == bool else (2**bits - 1 - values).astype(values.dtype)
        no_data = None if no_data is None else 2**bits - 1 - no_data
    elif photometric in (5, 8, 9, 10):
        raise ValueError(f"its colours are {page.photometric.name}; save the bands to train on as they are")
    if bits in (2, 4):  # up to 255, as Pillow reads them
        factor = 255 // (2**bits - 1)
        values, no_data, bits = values * np.uint8(factor), None if no_data is None else no_data * factor, 8
    extras = [int(extra) for extra in page.extrasamples]
    alphas = [extra for extra in extras if extra in (ALPHA_ASSOCIATED, ALPHA_UNASSOCIATED)]
    alpha = alphas[0] if len(alphas) == 1 and extras[-1] == alphas[0] and values.shape[2] > 1 else None
    orientation = page.tags.get(274)
    values = _upright(_native(values), 1 if orientation is None else int(orientation.value))
    return Stored(values, alpha, no_data, bits)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """As `PIL.ImageOps.exif_transpose` turns and mirrors."""
    if orientation in {2, 4, 5, 7}:
        values = values[:, ::-1]
    quarters = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.rot90(values, quarters) if quarters else values


def _read_pillow(image: Image.Image) -> Stored:
    image.load()
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if "transparency" in image.info and mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if mode == "RGB" else "LA")
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
    elif mode in ("RGBa", "La"):
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    elif mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I"):
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    alpha = ALPHA_UNASSOCIATED if image.mode in ("LA", "RGBA") else None
    return Stored(_native(values), alpha, bits=8 * values.dtype.itemsize)


# ----------------------------------------------------------------------------------------------- resampling


def resized(
    values: Shaped[Tensor, "c h w"], height: int, width: int, mode: str = "bicubic"
) -> Shaped[Tensor, "c height width"]:
    """Antialiased, in float32, within the range [0, 1] also where bicubic overshoots; Lanczos is Pillow's.

    Images of 8 bits stay so.
    """
    if values.dtype == torch.uint8:
        return resized(values / 255, height, width, mode).mul_(255).round_().to(torch.uint8)
    if mode == "lanczos":
        lanczos = Image.Resampling.LANCZOS
        bands = [Image.fromarray(band.contiguous().numpy()).resize((width, height), lanczos) for band in values]
        return torch.stack([torch.from_numpy(np.array(band)) for band in bands]).clamp(0, 1)
    resize = functools.partial(torch.nn.functional.interpolate, antialias=True)
    return resize(values[None], size=(height, width), mode=mode)[0].clamp(0, 1)
