"""Where images come from: data URLs, the datasets behind them, and the decoding of single images.

`make_dataset` turns a data URL into an `ImageDataset` or an `ImageStream` of samples that are not decoded yet, so that
an image that cannot be read is met where its name is known. In this order:

- which files count as images, by their names;
- decoding: a `Sample`, and from the bytes of a file to pixels or label numbers;
- data URLs, what every data set has (class names, a fingerprint), and `make_dataset`;
- the sources: folders of images; archives and remote places; segmentation sets, downloaded if need be; torchvision;
  Hugging Face; several of them as one;
- what is on this machine already.
"""

import ast
import bisect
import functools
import glob
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import lzma
import os
import re
import stat
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self
from unittest import mock

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from reading.archives import (
    ARCHIVE,
    REMOTE_PACKAGES,
    ArchiveError,
    Member,
    Members,
    RemoteFile,
    StoredFile,
    archives_below,
    compressed,
    expand_braces,
    files_below,
    folders_below,
    follows_to,
    index_all,
    is_archive,
    is_remote,
    read_member,
    read_whole,
    split_place,
    stored_file,
)
from reading.bands import ARRAY_ENDINGS, Stored, decode_bands, is_array_file, read_stored
from utils import RGB8, Bands, UserError, did_you_mean, hash_file, locked, replacing
from weights import fetch

logger = logging.getLogger("sources")

# ------------------------------------------------------------------------------------ names of image files

NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow registers without a decoder of its own, or whose files hold programs, films or tables."""


@functools.cache
def image_endings() -> tuple[str, ...]:
    """Endings of the files that count as images, in lower case: of every format of which this Pillow opens images."""
    Image.init()
    readable = Image.OPEN.keys() - NO_IMAGES | {"MPO"}  # an MPO is opened as the JPEG that it begins with
    return tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in readable))


class Endings:
    """Which file names count as images, and how many did not, by their ending. Hidden files are no part of the data."""

    def __init__(self, left_out: Mapping[str, int] | None = None) -> None:
        self.left_out = Counter(left_out or {})
        self.arrays = Counter[str]()
        """Files of arrays, by their ending. They are images where there are no others, and left out otherwise."""

    def is_image(self, name: str, is_file: Callable[[], bool]) -> bool:
        """Whether a file of this name, without its folder, is an image; else it is counted, unless it is hidden."""
        if name.startswith("."):  # .DS_Store, and the ._x.jpg that macOS writes beside every x.jpg
            return False
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  # a Path for each of millions of names is slow
        if self.is_array(name) and follows_to(is_file):
            self.arrays[ending] += 1
            return False
        if ending not in image_endings():
            self.left_out[ending or "without ending"] += 1
        elif follows_to(is_file):
            return True
        else:
            self.left_out[f"{ending} that are links to nothing, pipes or devices"] += 1
        return False

    @staticmethod
    def is_array(name: str) -> bool:
        """Whether a file of this name is one of arrays, and not hidden."""
        return name.lower().endswith(ARRAY_ENDINGS) and not name.startswith(".")

    def describe(self) -> str:
        """Counts by ending, the most frequent ones first; empty if nothing was left out."""
        common = [f"{num:,} {ending}" for ending, num in self.left_out.most_common(10)]
        others = len(self.left_out) - len(common)
        return ", ".join(common + [f"{others} other endings"] * (others > 0))

    def log(self, url: "DataUrl") -> None:
        """Say what was left out, if anything was."""
        if self.left_out:
            logger.info("%s=%s: no images by their names, left out: %s", url.key, url.text, self.describe())


# ------------------------------------------------------------------------------------------------ decoding


class BadImageError(Exception):
    """An image that cannot be read. Training skips it, counts it and reports it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


# What Pillow raises for damaged files, by format. LookupError, TypeError and ArithmeticError come from broken headers.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
"""Formats of label images, as Pillow names them: those that keep every number."""
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")


def _no_target() -> None:
    return None


@dataclass(frozen=True)
class Sample:
    """One image of a dataset, not decoded yet."""

    name: str
    """Path or other description by which a person can find the image."""
    read: Callable[[], bytes | Image.Image]
    """Gives the encoded image, or a decoded one."""
    read_target: Callable[[], Any] = _no_target
    """Gives the label: a number, a list, a mask of label values, or None."""

    def image(self, reduction: Callable[[int, int], int] | None = None) -> Image.Image:
        """Decode to RGB; `reduction` is that of `decode_image`.

        Raises: BadImageError if the file cannot be read.
        """
        with damage_named(self.name):
            return decode_image(self.read(), reduction)

    def pixels(
        self, reduction: Callable[[int, int], int] | None = None, bands: Bands = RGB8
    ) -> Shaped[Tensor, "c h w"]:
        """Decode to a tensor: 8-bit RGB as `decode_pixels` does, other bands and depths as `bands.decode_bands`.

        Args:
            reduction: that of `decode_image`, for 8-bit RGB.
            bands: what is made of the values.

        Raises: BadImageError if the file cannot be read, or has other bands.
        """
        with damage_named(self.name):
            data = self.read()
            if bands.are_rgb8 and not is_array_file(data):
                return decode_pixels(data, reduction)
            return decode_bands(data, bands)

    def picture(self, bands: Bands) -> Image.Image | Shaped[Tensor, "c h w"]:
        """What evaluations resize: of 8-bit RGB as `image`, else as `pixels`, unresampled.

        Raises: BadImageError if the file cannot be read, or has other bands.
        """
        return self.image() if bands.are_rgb8 else self.pixels(bands=bands)

    def stored(self, num: int) -> Stored:
        """The values that the file has; see `bands.read_stored`.

        Raises: BadImageError if it cannot be read.
        """
        with damage_named(self.name), silent_decoders():
            return read_stored(self.read(), num)

    def stored_and_seen(self) -> tuple[bytes | Image.Image, Image.Image, Image.Image]:
        """Read once: what `read` gives, the image in the mode in which it is stored, and as `image` gives it.

        Raises: BadImageError if the file cannot be read.
        """
        with damage_named(self.name), silent_decoders():
            data = self.read()
            stored = _opened(data)
            return data, stored, _decoded(stored, 1)

    def target(self) -> Any:
        """The label; one that is an image comes from `decode_mask`.

        Raises: BadImageError if it is a mask that cannot be read, UserError if one whose pixels are no label numbers.
        """
        try:
            target = self.read_target()
            return decode_mask(target, "its label image") if isinstance(target, Image.Image) else target
        except UserError:
            raise
        except DECODE_ERRORS as error:
            raise BadImageError(self.name, f"label: {type(error).__name__}: {error}") from error


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Say which image it was that a block could not decode, in words for people.

    Raises: BadImageError with the image's `name` for whatever Pillow raises for damaged files. A UserError passes.
    """
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(name, "not an image of a known format") from error
    except DECODE_ERRORS as error:
        raise BadImageError(name, f"{type(error).__name__}: {error}") from error


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Ignore warnings. Pillow's are about odd metadata and large images: of no use in the log of a billion images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode_image(data: bytes | Image.Image, reduction: Callable[[int, int], int] | None = None) -> Image.Image:
    """Decode an image file of any kind that Pillow reads to 8-bit RGB, upright as its EXIF orientation says.

    Transparent pixels are put on white. Deep grey is scaled to 8 bits. Of an animation, the first frame is taken.

    Args:
        data: contents of the file, or an image that is already decoded.
        reduction: from (width, height), upright, to a divisor by which a JPEG may be shrunk while it is decoded.
    """
    with silent_decoders():
        image = _opened(data)
        return _decoded(image, _divisor(image, reduction))


def decode_pixels(
    data: bytes | Image.Image, reduction: Callable[[int, int], int] | None = None
) -> UInt8[Tensor, "3 h w"]:
    """The pixels of `decode_image`, bit for bit, with the channels innermost in memory.

    A JPEG that is neither shrunk nor turned goes to `jpeg_decoder`, which is quicker than Pillow. Where it fails,
    Pillow decides whether the file is damaged. Run it within `silent_decoders`, which would cost too much for every
    image.
    """
    image = _opened(data)
    divisor = _divisor(image, reduction)
    decode_jpeg = jpeg_decoder()
    is_plain = divisor == 1 and image.format == "JPEG" and image.mode in ("RGB", "L") and exif_orientation(image) == 1
    if decode_jpeg and isinstance(data, bytes) and is_plain:
        try:
            return decode_jpeg(as_bytes_tensor(data), mode="RGB")
        except RuntimeError:
            pass
    image = _decoded(image, divisor)
    return as_bytes_tensor(image.tobytes()).view(image.height, image.width, 3).permute(2, 0, 1)


@functools.cache
def jpeg_decoder() -> Callable[..., Any] | None:
    """TorchCodec's `decode_jpeg(file or list of files, mode=, device=)`. None without it: Pillow decodes then."""
    try:
        return importlib.import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, AttributeError):
        return None


def as_bytes_tensor(data: bytes) -> UInt8[Tensor, " bytes"]:
    """A copy of the bytes, for torch does not know memory that must not be written to."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def turn_upright(pixels: UInt8[Tensor, "c h w"], orientation: int) -> UInt8[Tensor, "c h2 w2"]:
    """Turn and mirror as the EXIF orientation says, like `PIL.ImageOps.exif_transpose`."""
    if orientation in {2, 4, 5, 7}:
        pixels = pixels.flip(-1)
    quarters = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return pixels.rot90(quarters, (1, 2)) if quarters else pixels  # against the clock; a turn by none would copy


def _opened(data: bytes | Image.Image) -> Image.Image:
    if is_array_file(data):  # of 8-bit RGB, which looks the same from every reader
        return Image.fromarray(decode_bands(data, RGB8).permute(1, 2, 0).contiguous().numpy())
    if not isinstance(data, bytes):
        return data
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data[:4] not in (b"II*\0", b"MM\0*"):
            raise
        raise ValueError(
            "a TIFF that is damaged, or no 8-bit RGB, such as one of many bands; pretraining reads those with "
            "model.in_chans and data.value_range, and evaluations with a model that was trained so"
        ) from error


def _divisor(image: Image.Image, reduction: Callable[[int, int], int] | None) -> int:
    if reduction is None or image.format != "JPEG":
        return 1
    as_stored, lying = reduction(image.width, image.height), reduction(image.height, image.width)
    return as_stored if as_stored == lying or exif_orientation(image) not in {5, 6, 7, 8} else lying


def _decoded(image: Image.Image, divisor: int) -> Image.Image:
    if divisor > 1:
        image.draft(None, (image.width // divisor, image.height // divisor))
    image.load()
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    return ImageOps.invert(rgb) if image.mode == "I;16" and _zero_is_white(image) else rgb


def _zero_is_white(image: Image.Image) -> bool:
    """Whether a TIFF says so; of up to 8 bits, Pillow has inverted the values then."""
    return image.format == "TIFF" and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def exif_orientation(image: Image.Image) -> int:
    """How an image file asks to be turned and mirrored, from 1 to 8; 1, as it is, without such a tag."""
    # Most files have neither, and reading EXIF takes as long as a tenth of the decoding.
    if not {"exif", "xmp"} & image.info.keys():
        return 1
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def decode_mask(data: bytes | Image.Image, name: str) -> Image.Image:
    """The label numbers of a label image as they are stored, in mode L.

    A palette is only for looking at it: its indices count. Grey of 1, 2 or 4 bits is not stretched to 8. Channels that
    are all equal count as one, whole numbers stored as floats as what they are. The file's own EXIF orientation is
    followed, as that of an image is.

    Args:
        data: contents of the file, or an image.
        name: of the file, for messages.

    Raises: UserError if the format does not keep numbers, or they are not one label from 0 to 255 for each pixel.
    """
    image = _opened(data)
    if image.format is None and image.mode == "L":
        return image
    remedy = "store one label number from 0 to 255 per pixel, for example as an 8-bit grey or palette PNG"
    compression = image.info.get("compression") if image.format == "TIFF" else None
    if image.format not in {None, *MASK_FORMATS} or compression in LOSSY_TIFF:
        stored = image.format if compression is None else f"TIFF with {compression} compression"
        raise UserError(f"{name} is stored as {stored}, which need not keep label numbers as they were; {remedy}")
    codec, rawmode, *arguments = _stored_as(image)
    scaled = (";16" in rawmode and len(image.getbands()) > 1) or (image.format == "PPM" and codec != "raw")
    # Pillow reads 8 bits per pixel as 1 where the palette has two entries, black and white.
    torn = image.format == "BMP" and rawmode == "1" and arguments[0] != (image.width + 31) // 32 * 4
    if scaled or torn:
        raise UserError(f"{name} has numbers of a depth that cannot be read as they are; {remedy}")
    # Programs differ in whether they turn the numbers as well.
    if re.fullmatch(r"[1L];\d?IR?", rawmode) or _zero_is_white(image):
        raise UserError(f"{name} says that 0 is white, so its numbers are ambiguous; {remedy}")
    labels = np.asarray(image)
    if bits := re.fullmatch(r"L;([24])R?", rawmode):
        labels = labels // (255 // (2 ** int(bits[1]) - 1))
    elif image.mode == "1":
        labels = labels.astype(np.uint8)
    if labels.ndim == 3:
        if image.mode not in ("LA", "PA", "RGB", "RGBA"):
            raise UserError(f"{name} has the channels {', '.join(image.getbands())}; {remedy}")
        num_colors = 3 if image.mode.startswith("RGB") else 1
        if (labels[..., :1] != labels[..., :num_colors]).any() or (labels[..., num_colors:] != 255).any():
            raise UserError(f"{name} has colours or transparency instead of label numbers; {remedy}")
        labels = labels[..., 0]
    low, high = (labels.min(), labels.max()) if labels.size else (0, 0)
    # Written so that NaN is refused.
    if not (low >= 0 and high <= 255) or (labels != labels.astype(np.uint8)).any():
        raise UserError(f"{name} has numbers from {low} to {high}, which are not all whole and from 0 to 255; {remedy}")
    upright = turn_upright(torch.from_numpy(labels.astype(np.uint8)).unsqueeze(0), exif_orientation(image))
    return Image.fromarray(upright[0].numpy())


def _stored_as(image: Image.Image) -> tuple[Any, ...]:
    """Pillow's names of decoder and layout of an image that is not decoded yet, and the decoder's other arguments."""
    tiles = getattr(image, "tile", [])  # images that are no files have none
    if not tiles:
        return "raw", ""
    arguments = tiles[0].args
    layout, *more = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    return tiles[0].codec_name, layout if isinstance(layout, str) else "", *more


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if has_transparency(image):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def has_transparency(image: Image.Image) -> bool:
    """Whether an image has a band, or a colour, that says how opaque it is."""
    return image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Scale deep grey to 0..255: integers as 16 bit, floats as [0, 1]; values outside of that by their own range."""
    if not np.isfinite(grey).all():
        raise ValueError("pixels that are not finite")
    full, low, high = full_range(grey), float(grey.min()), float(grey.max())
    if low >= 0 and high <= full:
        low, high = 0.0, full
    return np.round((grey.astype(np.float64) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def full_range(grey: np.ndarray) -> float:
    """The value of deep grey that becomes 255: that of 16 bits for integers, 1 for floats."""
    return 1.0 if np.issubdtype(grey.dtype, np.floating) else 65535.0


# ---------------------------------------------------------------------------------------------- data URLs


@dataclass(frozen=True)
class DataUrl:
    """`source://name?key=literal&...`, and the configuration key it came from, for messages."""

    text: str
    key: str
    source: str
    name: str
    kwargs: dict[str, Any]

    def error(self, problem: str) -> UserError:
        """The error of a mistake in this URL, which names key and URL before the problem."""
        return UserError(f"{self.key}={self.text}: {problem}")

    def take(self, allowed: Iterable[str]) -> dict[str, Any]:
        """The arguments, if all of them are among `allowed`.

        Raises: UserError naming the unknown one.
        """
        allowed = list(allowed)
        for name in self.kwargs:
            if name not in allowed:
                raise self.error(f"unknown argument {name}{did_you_mean(name, allowed)}")
        return self.kwargs

    def folder(self, name: str, default: str | None = None) -> Path:
        """The argument `name`, which is the path of a folder.

        Raises: UserError if it is no text, or missing without a default.
        """
        value = self.kwargs.get(name, default)
        if not isinstance(value, str) or not value.strip():  # empty, it would be the current folder
            raise self.error(f"needs {name}='/path/of/a/folder'")
        try:
            return Path(value).expanduser()
        except RuntimeError as error:
            raise self.error(f"{value}: {error}") from error


def parse_data_url(text: str, key: str = "data.dataset") -> DataUrl:
    """Split `source://name?key=literal&...`; a text without `://`, or with that of a remote place, is where images lie.

    Values are Python literals, so text is quoted; `&`, `=` and `?` may occur within quotes.

    Raises: UserError if a value is not a literal, or a key is missing or given twice.
    """
    if not text.strip():
        raise UserError(f"{key}={text!r}: is empty; give a folder of images, or source://name?key=value")
    if "://" not in text or is_remote(text):
        return DataUrl(text, key, "custom", "Images", {"root": text})
    source, _, location = text.partition("://")
    name, _, query = location.partition("?")
    url = DataUrl(text, key, source, name, {})
    for part in _split_outside_quotes(query):
        argument, separator, literal = part.partition("=")
        if not separator or not argument.isidentifier():
            raise url.error(f"{part!r} is not key=value")
        if argument in url.kwargs:
            raise url.error(f"{argument} is given twice")
        try:
            url.kwargs[argument] = ast.literal_eval(literal.strip())
        except (ValueError, SyntaxError) as error:
            raise url.error(f"{literal!r} is not a Python literal; quote text: {argument}='{literal}'") from error
    return url


def _split_outside_quotes(query: str) -> Iterator[str]:
    start, quote, escaped = 0, "", False
    for index, char in enumerate(query):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char == "&":
            yield query[start:index]
            start = index + 1
    if query[start:]:
        yield query[start:]


def cache_root() -> Path:
    """Torch's cache folder ($TORCH_HOME, or ~/.cache/torch), below which data sets are downloaded."""
    return Path(torch.hub.get_dir()).parent


def _default_root(url: DataUrl) -> str:
    """Where a data set is that is downloaded, unless the URL says otherwise."""
    return str(cache_root() / "datasets" / url.name)


UNLABELLED = 255
"""The label of pixels without one, where a data set does not say otherwise."""


class ImageDataset(Dataset[Sample]):
    """A dataset with a length, whose images can be asked for in any order."""

    ignore_labels: Sequence[int] = (UNLABELLED,)
    """If labels are images: those of pixels that do not count."""

    @property
    def class_names(self) -> list[str]:
        """Name of each label from 0 on, as far as they are known."""
        return []

    def fingerprint(self) -> str:
        """A hash that is the same as long as the data are, as far as can be seen without reading all of them."""
        return str(len(self))

    def replacement(self, index: int, number: int) -> int:
        """The index of an image in place of `index`, which cannot be read; `number` is a random one."""
        return number % len(self)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError


class ImageStream:
    """A dataset that can only be read from start to end, shard by shard."""

    num_shards: int

    def fingerprint(self) -> str:
        """The number of its parts, as nothing else of a stream shows without reading it; see `ImageDataset`."""
        return f"{self.num_shards} parts"

    def read_shard(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """The samples of one shard, from number `start` on."""
        raise NotImplementedError


def match_classes(names: Sequence[str], where: str, known: Sequence[str], known_where: str) -> list[int] | None:
    """The number that each class of a data set has in another one, by name; None if its own numbers are to be used.

    That is so where a set has no names, and, with a warning, where none is the same.

    Args:
        names: of the classes of the set.
        where: the set, for messages.
        known: names of the classes of the other set, that of training.
        known_where: the other set, for messages.

    Raises: UserError if some names are known and others are not, or a name stands for two classes.
    """
    if not names or not known:
        return None
    if list(names) == list(known):  # even if two classes have one name, as ImageNet's cranes
        return list(range(len(known)))
    number_of = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in number_of]
    if not unknown:
        for counted, named in ((Counter(names), where), (Counter(known), known_where)):
            twice = next((name for name in names if counted[name] > 1), None)
            if twice is not None:
                raise UserError(
                    f"{named}: two of its classes are named {twice}, so that those of {where} and {known_where} cannot "
                    "be matched by name; use data sets with the same classes, or give each class a name of its own"
                )
        return [number_of[name] for name in names]
    if len(unknown) < len(names):
        raise UserError(f"{where}: its class {unknown[0]} is not a class of {known_where}; use matching data sets")
    logger.warning("%s: its classes have other names than those of %s; they are matched by number", where, known_where)
    return None


HASHED_FILES = 1000
"""Files whose content is hashed."""
MEASURED_FILES = 50_000
"""Files whose size is looked up, which on a network file system takes its time."""


def files_fingerprint(files: Sequence[Path], names: bytes) -> str:
    """SHA-256 over all names, the sizes of many files and the contents of some, evenly spaced: all of a small set."""
    digest = hashlib.sha256(names)
    for most in (MEASURED_FILES, HASHED_FILES):
        for i in torch.linspace(0, len(files) - 1, min(most, len(files)), dtype=torch.float64).round().long().tolist():
            try:
                part = files[i].read_bytes() if most == HASHED_FILES else str(files[i].stat().st_size).encode()
            except OSError as error:
                part = f"unreadable: {error.strerror}".encode()
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def labelled_fingerprint(num: int, class_names: Sequence[str], files: Sequence[Path]) -> str:
    """The hash of so many images, of the names of their classes and, where their files are known, of these."""
    return files_fingerprint(files, json.dumps([num, class_names, [str(path) for path in files]]).encode())


def is_folder(url: str) -> bool:
    """Whether a data URL names folders or archives of the user that are there, to be opened without a download."""
    parsed = parse_data_url(url)
    is_kind = (parsed.source, parsed.name) in {
        ("custom", "Images"),
        ("custom", "Segmentation"),
        ("torchvision", "ImageFolder"),
    }
    return is_kind and _is_here(str(parsed.kwargs.get("root")))


def make_dataset(url: str, *, key: str = "data.dataset", listing_cache: Path | None = None) -> Any:
    """The dataset of a data URL: an `ImageDataset`, or an `ImageStream` for `hf://...&streaming=True`.

    Sources: `torchvision://Class?...`, `hf://...?split='train'&img_field='jpg'&tgt_field='label'`,
    `custom://ADE20K|VOC2012|Images?...`, or a place of images: a folder or archives, here or behind a URL.

    Args:
        url: see `parse_data_url`.
        key: configuration key that `url` comes from, for messages.
        listing_cache: folder in which the file lists of image folders are kept.

    Raises: UserError naming the key, the URL and the remedy.
    """
    parsed = parse_data_url(url, key)
    if parsed.source not in SOURCES:
        known = [*SOURCES, *REMOTE_PACKAGES]
        raise parsed.error(f"unknown source {parsed.source}://{did_you_mean(parsed.source, known)}")
    return SOURCES[parsed.source](parsed, listing_cache)


def _make_custom(url: DataUrl, listing_cache: Path | None) -> ImageDataset:
    if url.name == "Images":
        url.take(("root", "cache"))
        return _open_images(url, listing_cache)
    if url.name == "Segmentation":
        return _make_segmentation_folder(url)
    if url.name not in SEGMENTATION_SETS:
        raise url.error(
            f"unknown name {url.name}{did_you_mean(url.name, [*SEGMENTATION_SETS, 'Images', 'Segmentation'])}"
        )
    published = SEGMENTATION_SETS[url.name]
    split = url.take(("split", "root")).get("split")
    if split not in published.splits:
        raise url.error(f"needs split= one of {', '.join(map(repr, published.splits))}")
    root = url.folder("root", _default_root(url))
    return SegmentationDataset(published.list_files(url, root, split), published.ignore_labels)


# ------------------------------------------------------------------------------------ folders of images


class PathList(Sequence[str]):
    """Millions of paths in two tensors, which worker processes share instead of each holding a copy."""

    def __init__(self, blob: UInt8[Tensor, " bytes"], ends: Int64[Tensor, " paths"]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def pack(cls, paths: list[bytes]) -> Self:
        """Make one of a list of paths, as the file system has them."""
        blob = torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8) if paths else torch.empty(0).byte()
        return cls(blob, torch.tensor([len(path) for path in paths], dtype=torch.int64).cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return os.fsdecode(self.blob[start : int(self.ends[index])].numpy().tobytes())


class _Below(Sequence[Path]):
    def __init__(self, root: Path, paths: PathList) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return self.root / self.paths[index]


class NoImagesError(UserError):
    """A place that has no images by the names of its files."""


def _no_images(url: DataUrl, place: str, endings: Endings) -> UserError:
    others = f" (left out: {endings.describe()})" if endings.left_out else ""
    about = url.error(
        f"no images below {place}{others}; files count whose names end in .jpg .jpeg .png or as those of "
        f"another format that Pillow opens, or else in {' '.join(ARRAY_ENDINGS)}"
    )
    return NoImagesError(str(about))


class ImageFolder(ImageDataset):
    """Every image file below a folder, in the order of the sorted paths. No labels.

    Links to folders are followed, each folder is read once; names that start with a dot are skipped.
    """

    def __init__(self, url: DataUrl, root: Path, listing_cache: Path | None = None) -> None:
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "does not exist"
            raise url.error(f"the folder {root} {problem}; give a folder of images, or source://name?key=value")
        self.root = root
        try:
            listing = _list_images_cached(root, listing_cache) if listing_cache else _list_images(root)
        except OSError as error:
            raise url.error(f"cannot be listed: {error}; make it readable, or move it out of {root}") from error
        self.paths = listing.paths
        if not self.paths:
            raise _no_images(url, str(root), listing.endings)
        listing.endings.log(url)
        archives = sum(num for ending, num in listing.endings.left_out.items() if ending in (".tar", ".zip"))
        if archives:
            logger.warning(
                "%s=%s: the %d archives beside the images are not read; give them by their path, in a list with the "
                "folder", url.key, url.text, archives,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.root / self.paths[index]
        return Sample(str(path), functools.partial(read_file, path))

    def fingerprint(self) -> str:
        """The hash of the files below the folder that `files_fingerprint` takes."""
        return files_fingerprint(_Below(self.root, self.paths), self.paths.blob.numpy().tobytes())


def read_file(path: str | Path) -> bytes:
    """The contents of a regular file; of a pipe or a device, which might never end, an error.

    Raises: OSError.
    """
    # Else opening a pipe waits for somebody who writes to it. A buffer, as Path.read_bytes has, doubles the time.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read()


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    paths: PathList
    """Relative to the folder, sorted."""
    endings: Endings
    times: dict[str, int]
    """Modification time of every folder, in nanoseconds."""


def _list_images(root: Path) -> Listing:
    endings = Endings()
    paths: list[bytes] = []
    arrays: list[bytes] = []  # of labels, perhaps, beside images; by themselves they are the images
    times: dict[str, int] = {}
    for folder, time_ns, files in folders_below(root):
        times[os.fsdecode(folder)] = time_ns
        prefix = folder + b"/" if folder else b""
        for entry in files:
            name = os.fsdecode(entry.name)
            if endings.is_image(name, entry.is_file):
                paths.append(prefix + entry.name)
            elif endings.is_array(name) and follows_to(entry.is_file):
                arrays.append(prefix + entry.name)
    if paths:
        endings.left_out.update(endings.arrays)
    return Listing(PathList.pack(sorted(paths or arrays)), endings, times)


def _list_images_cached(root: Path, cache_dir: Path) -> Listing:
    """As `_list_images`, from a file that is valid until the modification time of any folder changes."""
    resolved = str(root.resolve())
    request = os.fsencode(" ".join([resolved, *image_endings(), *ARRAY_ENDINGS]))
    cache = cache_dir / f"{hashlib.blake2b(request, digest_size=16).hexdigest()}.npz"
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            times, left_out = about["times"], about["left_out"]
            if all((root / folder).stat().st_mtime_ns == time_ns for folder, time_ns in times.items()):
                paths = PathList(torch.from_numpy(stored["blob"]), torch.from_numpy(stored["ends"]))
                return Listing(paths, Endings(left_out), times)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        pass  # no cache yet, a damaged one, one of another version, or a folder is gone: list again
    listing = _list_images(root)
    # A folder that changes twice within the clock's resolution keeps its time, so recent changes are not cached.
    if max(listing.times.values()) < time.time_ns() - 2_000_000_000:
        try:
            _keep_listing(listing, cache)
        except OSError as error:
            logger.warning("the list of the files below %s could not be kept: %s", root, error)
    return listing


def _keep_listing(listing: Listing, cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    about = {"times": listing.times, "left_out": listing.endings.left_out}
    with replacing(cache, shared=True) as temporary, temporary.open("wb") as file:
        header = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        np.savez(file, about=header, blob=listing.paths.blob.numpy(), ends=listing.paths.ends.numpy())


# ------------------------------------------------------------------------ archives and remote places


class ArchivedImages(ImageDataset):
    """Every image in some tar or zip files, in the order of the archives and, in each, of the sorted names. No labels.

    Args:
        files: the archives.
        indices: the images in each.
        below: the folder within each that counts, empty for all.
    """

    def __init__(self, files: Sequence[StoredFile], indices: Sequence[Members], below: str = "") -> None:
        self.files, self.below = files, below
        prefix, starts = f"{below}/" if below else "", []
        blobs, ends, members, num, length = [], [], [], 0, 0
        for index in indices:
            starts.append(num)
            blob, own_ends, own_members = index.blob, index.ends, index.members
            if prefix:
                blob, own_ends, own_members = _below_prefix(index, prefix)
            blobs.append(blob)
            ends.append(own_ends + length)
            members.append(own_members)
            num, length = num + len(own_ends), length + len(blob)
        # Tensors, for worker processes share these.
        self.paths = PathList(torch.from_numpy(np.concatenate(blobs)), torch.from_numpy(np.concatenate(ends)))
        self.members: Int64[Tensor, "n fields"] = torch.from_numpy(np.concatenate(members))
        self._starts: Int64[Tensor, " archives"] = torch.tensor(starts)

    def __len__(self) -> int:
        return len(self.paths)

    def file_of(self, index: int) -> StoredFile:
        """The archive that image `index` is in."""
        return self.files[int(torch.searchsorted(self._starts, index, right=True)) - 1]

    def __getitem__(self, index: int) -> Sample:
        file = self.file_of(index)
        return Sample(f"{file.place}/{self.paths[index]}", functools.partial(read_member, file, self._member(index)))

    def _member(self, index: int) -> Member:
        return Member(*self.members[index].tolist())

    def fingerprint(self) -> str:
        """A hash of all names, sizes and places, and of the contents of some images, or a remote archive's version."""
        digest = hashlib.sha256(repr([(file.name, file.size) for file in self.files]).encode())
        for part in (self.paths.blob, self.paths.ends, self.members, self._starts):
            digest.update(part.numpy().tobytes())
        if any(is_remote(file.place) for file in self.files):
            digest.update(repr([file.version for file in self.files]).encode())
            return digest.hexdigest()
        for i in np.linspace(0, len(self) - 1, min(HASHED_FILES, len(self))).round().astype(int).tolist():
            try:
                content = read_member(self.file_of(i), self._member(i))
            except DECODE_ERRORS as error:
                content = f"unreadable: {type(error).__name__}".encode()
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def _below_prefix(index: Members, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    paths = PathList(torch.from_numpy(index.blob), torch.from_numpy(index.ends))
    # Sorted, those that begin alike are neighbours.
    chosen = [i for i in range(len(paths)) if paths[i].startswith(prefix)]
    names = [os.fsencode(paths[i]) for i in chosen]
    blob = np.frombuffer(bytearray(b"".join(names)), dtype=np.uint8)
    return blob, np.cumsum([len(name) for name in names], dtype=np.int64), index.members[chosen]


class RemoteImages(ImageDataset):
    """Every image file below a remote folder, in the order of the sorted paths. No labels.

    Args:
        root: the folder.
        files: those that are images.
        copies: folder to which a file is copied when it is first read; None for no copies.
    """

    def __init__(self, root: str, files: Sequence[RemoteFile], copies: Path | None) -> None:
        self.root, self.copies = root.rstrip("/"), copies
        self.paths = PathList.pack([os.fsencode(file.path) for file in files])
        self._known = PathList.pack([f"{file.size} {file.version}".encode() for file in files])
        about = repr([(file.path, file.size, file.version) for file in files])
        self._digest = hashlib.sha256(about.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        place = f"{self.root}/{self.paths[index]}"
        size, _, version = self._known[index].partition(" ")
        known = (int(size), version) if version else None  # a server that lists files may tell neither
        return Sample(place, functools.partial(read_whole, place, self.copies, known))

    def fingerprint(self) -> str:
        """A hash of all paths, sizes and versions, as the remote place lists them."""
        return self._digest


def paths_below(images: ImageFolder | ArchivedImages | RemoteImages) -> Iterator[str]:
    """Where each image is, below the place that the data set was opened with, which may be a folder in an archive."""
    prefix = f"{images.below}/" if isinstance(images, ArchivedImages) and images.below else ""
    return (path.removeprefix(prefix) for path in images.paths)


class ClassFolders(ImageDataset):
    """Images of a folder, archives or a remote folder, labelled by the first folder of their path below that place.

    Those in no folder are left out, and folders without images are no classes. Images of a folder are in the order of
    `torchvision.datasets.ImageFolder`. If no image of archives is in a folder, the archives stand for the classes, as
    in the training images of ImageNet.
    """

    def __init__(self, url: DataUrl, images: ImageFolder | ArchivedImages | RemoteImages) -> None:
        folders = [path.split("/", 1)[0] if "/" in path else None for path in paths_below(images)]
        if isinstance(images, ArchivedImages) and not any(folders):
            folders = [Path(images.file_of(index).name).stem for index in range(len(images))]
        names = sorted({folder for folder in folders if folder is not None})
        if not names:
            raise url.error("no image is in a folder; class folders are needed for labels: class/image.jpg")
        number_of = {name: number for number, name in enumerate(names)}
        rows = [index for index, folder in enumerate(folders) if folder is not None]
        if len(rows) < len(folders):
            logger.warning("%s: %d images are in no class folder, and left out", url.text, len(folders) - len(rows))
        if isinstance(images, ImageFolder):
            rows.sort(key=lambda row: (folders[row], *images.paths[row].rpartition("/")))
            if empty := [name for name in _folders_in(images.root) if name not in number_of]:
                logger.warning(
                    "%s: %d folders have no images of their own, and are no classes: %s",
                    url.text, len(empty), ", ".join(empty[:10]),
                )  # fmt: skip
        self.images, self.names = images, names
        self.rows = torch.tensor(rows)
        self.labels = torch.tensor([number_of[folders[row]] for row in rows])  # pyright: ignore[reportArgumentType]  # not None

    @property
    def class_names(self) -> list[str]:
        """Names of the folders."""
        return self.names

    def fingerprint(self) -> str:
        """That of the images, whose names have the classes; of a folder, that of `torchvision.datasets.ImageFolder`."""
        if not isinstance(self.images, ImageFolder):
            return self.images.fingerprint()
        files = [self.images.root / self.images.paths[row] for row in self.rows.tolist()]
        return labelled_fingerprint(len(self), self.names, files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sample = self.images[int(self.rows[index])]
        return Sample(sample.name, sample.read, functools.partial(int, self.labels[index]))


def _folders_in(root: Path) -> list[str]:
    """Names of the folders in one, sorted, without hidden ones; none if that is no folder."""
    inside = root.iterdir() if root.is_dir() else ()
    return sorted(path.name for path in inside if not path.name.startswith(".") and path.is_dir())


def _make_class_folders(url: DataUrl, listing_cache: Path | None) -> ClassFolders:
    url.take(("root", "cache"))
    url = replace(url, kwargs={"root": _default_root(url), **url.kwargs})
    images = _open_images(url, listing_cache)
    root = Path(str(url.kwargs["root"])).expanduser()
    if isinstance(images, ArchivedImages) and _folders_in(root):
        raise url.error(f"the folders in {root} have archives and no images; unpack them, or name an archive of all")
    return ClassFolders(url, images)


def _open_images(url: DataUrl, listing_cache: Path | None) -> ImageFolder | ArchivedImages | RemoteImages:
    """What is at `root=`: a folder of images or of archives, or archives, here or remote."""
    stored = _open_stored(url, listing_cache)
    if stored is not None:
        return stored
    if "cache" in url.kwargs:
        raise url.error("cache= is for remote places, and root= is a folder of this machine; leave it out")
    root = url.folder("root")
    try:
        folder = ImageFolder(url, root, listing_cache)
    except NoImagesError:
        found = archives_below(root)
        if not found:
            raise
        return _open_archives(url, _uncompressed(url, found), "", None, listing_cache)
    return folder


def _uncompressed(url: DataUrl, archives: list[str]) -> list[str]:
    """Those that are not compressed as a whole. Raises: UserError if all are."""
    found = [place for place in archives if ARCHIVE.search(place)]
    if len(found) < len(archives):
        why = compressed(next(place for place in archives if not ARCHIVE.search(place)))
        if not found:
            raise url.error(why)
        logger.warning("%s: %d archives are not read: %s", url.text, len(archives) - len(found), why)
    return found


def _open_stored(url: DataUrl, listing_cache: Path | None) -> ArchivedImages | RemoteImages | None:
    """The images of `root=` if it is an archive, several by braces, or a remote place; None if it is a folder here."""
    root = url.kwargs.get("root")
    if not isinstance(root, str) or not root.strip():
        return None
    try:
        places = _places(root)
        split = [split_place(place) for place in places]
    except ValueError as error:
        raise url.error(str(error)) from error
    copies = url.folder("cache").absolute() if "cache" in url.kwargs else None
    archives = [each for each in split if each is not None]
    if len(archives) == len(places):
        if len({below for _, below in archives}) > 1:
            raise url.error("names different folders in its archives; give one of them, the same in each")
        return _open_archives(url, [place for place, _ in archives], archives[0][1], copies, listing_cache)
    if len(places) > 1:
        raise url.error("braces are for archives, such as shard-{000..099}.tar; several folders are a list: [a,b]")
    return _open_remote(url, places[0], copies, listing_cache) if is_remote(places[0]) else None


def _places(root: str) -> list[str]:
    """The names that a root stands for. Raises: ValueError for wrong braces."""
    if not is_remote(root):
        try:
            root = str(Path(root).expanduser())
        except RuntimeError:
            return [root]  # `DataUrl.folder` explains
        if Path(root).exists():
            return [root]
    return expand_braces(root) if "{" in root else [root]


def _is_here(root: str) -> bool:
    """Whether folders or archives that a root stands for are on this machine."""
    try:
        places = _places(root)
        archives = [split_place(place) for place in places]
    except ValueError:
        return False
    return all(
        not is_remote(place) and Path(archive[0] if archive else place).exists()
        for place, archive in zip(places, archives, strict=True)
    )


def _open_archives(
    url: DataUrl, places: Sequence[str], below: str, copies: Path | None, listing_cache: Path | None
) -> ArchivedImages:
    if copies is not None and not is_remote(places[0]):
        raise url.error("cache= is for remote places, and these archives are on this machine; leave it out")
    if is_remote(places[0]):  # an index of what is far away is worth keeping also where others are not
        listing_cache = listing_cache or cache_root() / "image_listings"
    try:
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(functools.partial(_look_at, copies=copies), places))
        missing = [place for place, file in zip(places, files, strict=True) if isinstance(file, OSError)]
        if missing:
            first = next(file for file in files if isinstance(file, OSError))
            why = "there is no such file" if isinstance(first, FileNotFoundError) else first.strerror or str(first)
            many = f"{len(missing)} of {len(files)} archives cannot be opened, first " if len(files) > 1 else ""
            where = "" if missing[0] == url.text else f"{missing[0]}: "
            raise url.error(f"{many}{where}{why}; check the path, or name archives that are there")
        found = [file for file in files if isinstance(file, StoredFile)]
        indices = index_all(found, Endings, " ".join([*image_endings(), *ARRAY_ENDINGS]), listing_cache)
    except ArchiveError as error:
        raise url.error(str(error)) from error
    except UserError as error:
        raise error if str(error).startswith(f"{url.key}=") else _about(url, error) from error
    endings = Endings()
    for index in indices:
        endings.left_out.update(index.left_out)
    images = ArchivedImages(found, [index.images for index in indices], below)
    arrays = ArchivedImages(found, [index.arrays for index in indices], below)
    if len(images):
        endings.left_out.update(Path(path).suffix.lower() for path in arrays.paths)
    images = images if len(images) else arrays
    if not len(images):
        where = f"{places[0]} and {len(places) - 1} other archives" if len(places) > 1 else places[0]
        raise _no_images(url, f"{below} in {where}" if below else where, endings)
    endings.log(url)
    return images


def _about(url: DataUrl, error: UserError) -> UserError:
    """What is wrong with a place, as the error of the URL, which does not say the same name twice."""
    return url.error(str(error).removeprefix(f"{url.text}: "))


def _look_at(place: str, copies: Path | None) -> StoredFile | OSError:
    try:
        return stored_file(place, copies)
    except OSError as error:
        return error


def _open_remote(
    url: DataUrl, root: str, copies: Path | None, listing_cache: Path | None
) -> ArchivedImages | RemoteImages:
    try:
        listed = files_below(root)
    except FileNotFoundError as error:
        raise url.error(f"there is nothing at {root}; check the address") from error
    except UserError as error:
        raise _about(url, error) from error
    endings = Endings()
    images = [file for file in listed if endings.is_image(PurePosixPath(file.path).name, lambda: True)]
    if images:
        endings.left_out.update(endings.arrays)
    else:
        images = [file for file in listed if endings.is_array(PurePosixPath(file.path).name)]
    if images:
        endings.log(url)
        return RemoteImages(root, images, copies)
    archives = [f"{root.rstrip('/')}/{file.path}" for file in listed if is_archive(file.path)]
    if archives:
        return _open_archives(url, _uncompressed(url, archives), "", copies, listing_cache)
    if not listed:
        raise url.error(
            f"there are no files below {root}, or the server does not list them; check the address, or name archives: "
            f"{root.rstrip('/')}/shard-{{000..099}}.tar"
        )
    raise _no_images(url, root, endings)


# ---------------------------------------------------------------------------------- segmentation datasets


class SegmentationDataset(ImageDataset):
    """Pairs of an image file and a file of labels; targets are images of mode L that hold label numbers.

    Args:
        pairs: image file, label file.
        ignore_labels: labels of pixels that do not count.
        class_names: name of each label from 0 on, as far as they are known.
    """

    def __init__(
        self, pairs: list[tuple[Path, Path]], ignore_labels: Sequence[int], class_names: Sequence[str] = ()
    ) -> None:
        self.pairs = pairs
        self.ignore_labels = list(ignore_labels)
        self.names = list(class_names)

    @property
    def class_names(self) -> list[str]:
        """Name of each label from 0 on, as far as they are known."""
        return self.names

    def fingerprint(self) -> str:
        """The hash of images and labels that `files_fingerprint` takes, with their order and what labels mean."""
        files = [path for pair in self.pairs for path in pair]
        meaning = json.dumps([self.ignore_labels, self.names, [str(path) for path in files]])
        return files_fingerprint(files, meaning.encode())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, labels = self.pairs[index]
        return Sample(str(image), functools.partial(read_file, image), functools.partial(_read_labels, labels))


class ArchivedSegmentation(SegmentationDataset):
    """Pairs of images and label images of two data sets.

    Args:
        images: of which at least these or
        masks: those are in an archive.
        rows: numbers in them of each pair.
        ignore_labels: labels of pixels that do not count.
        class_names: name of each label from 0 on, as far as they are known.
    """

    def __init__(
        self,
        images: ImageDataset,
        masks: ImageDataset,
        rows: Sequence[tuple[int, int]],
        ignore_labels: Sequence[int],
        class_names: Sequence[str],
    ) -> None:
        super().__init__([], ignore_labels, class_names)
        self.images, self.masks, self.rows = images, masks, torch.tensor(rows, dtype=torch.int64)

    def fingerprint(self) -> str:
        """A hash of those of images and label images, of their pairs and of what labels mean."""
        parts = [self.images.fingerprint(), self.masks.fingerprint(), self.rows.tolist()]
        return hashlib.sha256(json.dumps([*parts, self.ignore_labels, self.names]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        image, mask = (
            part[row] for part, row in zip((self.images, self.masks), self.rows[index].tolist(), strict=True)
        )
        return Sample(image.name, image.read, functools.partial(_read_archived_labels, mask))


def _read_archived_labels(mask: Sample) -> Image.Image:
    return decode_mask(mask.read(), mask.name)


def _make_segmentation_folder(url: DataUrl) -> SegmentationDataset:
    """`custom://Segmentation?root='/data/train'`: images and masks of the same file names, but for the ending.

    Folder, images and masks may each be an archive, or a folder of one. Class names come from classes.txt, a name a
    line, in that folder or the one above. Pixels do not count whose label's name is in parentheses, such as `(void)`,
    nor those of label 255, unless it has a name.
    """
    url.take(("root", "images", "masks"))
    if any(is_remote(str(url.kwargs.get(name))) for name in ("root", "images", "masks")):
        raise url.error("label images are read from this machine; copy them, and give that folder or archive")
    root = url.folder("root")
    places = [root / url.folder(kind, kind) for kind in ("images", "masks")]
    images, masks = (archived_images(url, place) or ImageFolder(url, place) for place in places)
    image_of, mask_of = (_by_stem(url, part) for part in (images, masks))
    alone = [stem for stem in image_of if stem not in mask_of]
    if alone:
        first = Path(images[image_of[alone[0]]].name).name
        raise url.error(f"{len(alone)} images have no mask of the same name in {places[1]}, such as {first}")
    if len(mask_of) > len(image_of):
        unused = next(masks[row].name for stem, row in mask_of.items() if stem not in image_of)
        logger.warning("%s: %d masks have no image, such as %s", url.text, len(mask_of) - len(image_of), unused)
    names = _read_class_names(url, root)
    ignore_labels = [label for label, name in enumerate(names) if name.startswith("(") and name.endswith(")")]
    if len(names) <= UNLABELLED:
        ignore_labels.append(UNLABELLED)
    rows = [(row, mask_of[stem]) for stem, row in image_of.items()]
    if isinstance(images, ImageFolder) and isinstance(masks, ImageFolder):
        pairs = [(images.root / images.paths[i], masks.root / masks.paths[j]) for i, j in rows]
        return SegmentationDataset(pairs, ignore_labels, names)
    return ArchivedSegmentation(images, masks, rows, ignore_labels, names)


def archived_images(url: DataUrl, place: Path) -> ArchivedImages | None:
    """The images of an archive, or of a folder in one, on this machine; None if a path names no archive.

    Raises: UserError if it cannot be read, or has no images.
    """
    try:
        archive = split_place(str(place))
    except ValueError as error:
        raise url.error(str(error)) from error
    return None if archive is None else _open_archives(url, [archive[0]], archive[1], None, None)


def _by_stem(url: DataUrl, images: ImageFolder | ArchivedImages) -> dict[str, int]:
    """The number of each image by its name below the place that was opened, without the ending."""
    by_stem: dict[str, int] = {}
    for row, path in enumerate(paths_below(images)):
        stem = str(Path(path).with_suffix(""))
        if stem in by_stem:
            both = f"{images[by_stem[stem]].name} and {images[row].name}"
            raise url.error(f"{both} have the same name but for the ending; remove one")
        by_stem[stem] = row
    return by_stem


class _ClassFiles:
    """Says which files have class names, as `archives.Names`."""

    NAME = "classes.txt"

    def __init__(self) -> None:
        self.left_out = Counter[str]()

    def is_image(self, name: str, is_file: Callable[[], bool]) -> bool:
        return name == self.NAME and is_file()

    def is_array(self, name: str) -> bool:
        return False


def _find_class_names(root: Path) -> tuple[str, bytes] | None:
    """Place and content of the file of class names of a folder or archive."""
    archive = split_place(str(root))
    if archive is not None:
        file, below = stored_file(archive[0]), PurePosixPath(archive[1])
        inside = ArchivedImages([file], [index.images for index in index_all([file], _ClassFiles, "", None)])
        row_of = {path: row for row, path in enumerate(inside.paths)}
        for folder in (below, below.parent):
            if (row := row_of.get(str(folder / _ClassFiles.NAME))) is not None:
                return inside[row].name, inside[row].read()  # pyright: ignore[reportReturnType]  # bytes, of an archive
        root = Path(archive[0])
    path = next((path for path in (root / "classes.txt", root.parent / "classes.txt") if path.is_file()), None)
    return None if path is None else (str(path), path.read_bytes())


def _read_class_names(url: DataUrl, root: Path) -> list[str]:
    path = root
    try:
        found = _find_class_names(root)
        if found is None:
            return []
        path, data = found
        names = [line.strip() for line in data.decode("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError, ValueError, ArchiveError) as error:
        raise url.error(f"{path} cannot be read: {error}; it has a class name a line, as UTF-8") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or len(names) > 256:
        wrong = f"the name {twice!r} twice" if twice is not None else f"{len(names)} names, and labels go up to 255"
        raise url.error(f"{path} has {wrong}; it has a name a line, that of label 0 first")
    return names


def _read_labels(path: Path) -> Image.Image:
    if path.suffix != ".mat":
        return decode_mask(read_file(path), str(path))
    from scipy.io import loadmat

    return Image.fromarray(loadmat(str(path))["GTcls"]["Segmentation"][0, 0].astype(np.uint8))


@dataclass(frozen=True)
class Archive:
    """A file to download, its hash, and the folder that it unpacks to."""

    address: str
    md5: str
    folder: str


ARCHIVES = {
    "ADE20K": Archive(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        "7328b3957e407ddae1d3cbf487f149ef",
        "ADEChallengeData2016",
    ),
    "VOC2012": Archive(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
        "VOCdevkit",
    ),
    "VOC2012 augmented": Archive(
        "http://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
        "benchmark_RELEASE",
    ),
}


def _list_ade20k(url: DataUrl, root: Path, split: str) -> list[tuple[Path, Path]]:
    folder = _unpacked(url, ARCHIVES["ADE20K"], root)
    images = sorted((folder / "images" / split).glob("*.jpg"))
    labels = folder / "annotations" / split
    return _checked(url, [(image, labels / f"{image.stem}.png") for image in images], folder)


def _list_voc2012(url: DataUrl, root: Path, split: str) -> list[tuple[Path, Path]]:
    """VOC's splits, and trainaug as in mmsegmentation: train, and what the augmented set adds to train and val."""
    folder = _unpacked(url, ARCHIVES["VOC2012"], root) / "VOC2012"

    def names(path: Path) -> list[str]:
        try:
            return path.read_text().split()
        except OSError as error:
            raise url.error(f"{folder} is incomplete: {error}") from error

    lists = folder / "ImageSets" / "Segmentation"
    own = names(lists / f"{'train' if split == 'trainaug' else split}.txt")
    labels = [folder / "SegmentationClass" / f"{name}.png" for name in own]
    added: list[str] = []
    if split == "trainaug":
        extra = _unpacked(url, ARCHIVES["VOC2012 augmented"], root) / "dataset"
        known = {*names(lists / "train.txt"), *names(lists / "val.txt")}
        added = sorted({*names(extra / "train.txt"), *names(extra / "val.txt")} - known)
        labels += [extra / "cls" / f"{name}.mat" for name in added]
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in own + added]
    return _checked(url, list(zip(images, labels, strict=True)), folder)


def _checked(url: DataUrl, pairs: list[tuple[Path, Path]], folder: Path) -> list[tuple[Path, Path]]:
    """The pairs, if all their files are there."""
    present = {
        parent: {path.name for path in parent.glob("*")} for parent in {p.parent for pair in pairs for p in pair}
    }
    missing = [str(path) for pair in pairs for path in pair if path.name not in present[path.parent]]
    if missing or not pairs:
        lacks = f"lacks {len(missing)} files, first {missing[0]}" if missing else "has no images of this split"
        raise url.error(f"{folder} {lacks}; remove that folder to have it downloaded again")
    return pairs


class SegmentationSet(NamedTuple):
    """A published data set that is downloaded."""

    list_files: Callable[[DataUrl, Path, str], list[tuple[Path, Path]]]
    """From the URL, the root folder and a split to pairs of an image and its labels."""
    splits: tuple[str, ...]
    ignore_labels: tuple[int, ...]


SEGMENTATION_SETS = {
    # 0 is all that is none of the 150 classes in ADE20K, and background, a class that counts, in VOC.
    "ADE20K": SegmentationSet(_list_ade20k, ("training", "validation"), (0, UNLABELLED)),
    "VOC2012": SegmentationSet(_list_voc2012, ("train", "val", "trainaug"), (UNLABELLED,)),
}


def _unpacked(url: DataUrl, archive: Archive, root: Path) -> Path:
    """The folder of an archive below `root`; downloaded, checked and unpacked if it is not there."""
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".lock"):  # the other ranks of this node wait here for the first
            if not folder.is_dir():
                _download_and_unpack(url, archive, root)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise url.error(
            f"{archive.address} could not be downloaded to {root}: {error}; put the file there, or give root="
        ) from error
    return folder


def _download_and_unpack(url: DataUrl, archive: Archive, root: Path) -> None:
    file = root / PurePosixPath(archive.address).name
    placed_by_user = file.is_file()
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as temporary:
        if not placed_by_user:
            logger.info("downloading %s to %s", archive.address, root)
            file = Path(temporary) / file.name
            fetch(archive.address, file)
        if (md5 := hash_file(file, "md5")) != archive.md5:
            source = file if placed_by_user else archive.address
            raise url.error(f"{source} has md5 {md5} instead of {archive.md5}: damaged or changed; get it again")
        logger.info("unpacking %s", file)
        contents = Path(temporary) / "contents"
        _extract(url, file, contents)
        if not (contents / archive.folder).is_dir():
            raise url.error(f"{file} does not hold the folder {archive.folder}")
        (contents / archive.folder).rename(root / archive.folder)


def _extract(url: DataUrl, file: Path, target: Path) -> None:
    """Unpack a zip or tar file, unless a member would land outside of `target`."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise url.error(f"{file} is refused: its member {name!r} lies outside of the archive")
            archive.extractall(target)
        return
    try:
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")
    except tarfile.FilterError as error:
        raise url.error(f"{file} is refused: {error}") from error


# ------------------------------------------------------------------------------- torchvision, Hugging Face


class TorchvisionDataset(ImageDataset):
    """Any dataset of torchvision whose items are (image, target).

    Its files are read and decoded here, so that they give the pixels that they give from every other source. A dataset
    that has arrays in memory, such as CIFAR10, or makes its images gives those.
    """

    def __init__(self, url: DataUrl, dataset: Any) -> None:
        self.url = url
        self.dataset = dataset

    @property
    def class_names(self) -> list[str]:
        """Name of each class, of those data sets that have `classes`; synonyms are joined by commas."""
        names = getattr(self.dataset, "classes", None) or []
        return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]

    def fingerprint(self) -> str:
        """A hash of number and names of the classes and, where the data set lists its files, of these."""
        return labelled_fingerprint(len(self), self.class_names, [Path(sample[0]) for sample in self._samples() or ()])

    def _samples(self) -> Any:
        return getattr(self.dataset, "samples", None) or getattr(self.dataset, "imgs", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        item = functools.cache(functools.partial(self._item, index))
        files = self._samples()
        name = str(files[index][0]) if files else f"{self.url.source}://{self.url.name}[{index}]"
        return Sample(name, lambda: self._encoded(item()[0]), lambda: item()[1])

    def _item(self, index: int) -> Any:
        # Datasets without the argument `loader` open their files themselves, and most convert them at once.
        with (
            mock.patch.object(Image, "open", _open_with_file),
            mock.patch.object(Image.Image, "convert", _convert_but_to_rgb),
        ):
            return self.dataset[index]

    def _encoded(self, image: Any) -> bytes | Image.Image:
        if not isinstance(image, bytes | Image.Image):
            raise self.url.error(f"gives {type(image).__name__}, not images")
        return getattr(image, "encoded", image)


_open, _convert = Image.open, Image.Image.convert


def _open_with_file(file: Any, *args: Any, **kwargs: Any) -> Image.Image:
    """`PIL.Image.open`, whose image also has the contents of its file, as `encoded`."""
    encoded = file.read() if hasattr(file, "read") else read_file(file)
    image = _open(io.BytesIO(encoded), *args, **kwargs)
    image.encoded = encoded  # pyright: ignore[reportAttributeAccessIssue]
    return image


def _convert_but_to_rgb(image: Image.Image, mode: str | None = None, *args: Any, **kwargs: Any) -> Image.Image:
    """`Image.convert`, which leaves an image that has its file as it is where RGB is wanted: `decode_image` will."""
    return image if mode == "RGB" and hasattr(image, "encoded") else _convert(image, mode, *args, **kwargs)


def _make_torchvision(url: DataUrl, listing_cache: Path | None) -> ImageDataset:
    if url.name == "ImageFolder":
        return _make_class_folders(url, listing_cache)
    import torchvision  # only here: it brings torch's compiler, a second of every start

    known = [name for name in torchvision.datasets.__all__ if name != "VisionDataset"]
    if url.name not in known:
        raise url.error(f"torchvision has no dataset {url.name}{did_you_mean(url.name, known)}")
    cls = getattr(torchvision.datasets, url.name)
    parameters = inspect.signature(cls).parameters
    functions = {"loader", "is_valid_file", "transform", "target_transform", "transforms"}  # no URL can give one
    arguments, endings = dict(url.take(name for name in parameters if name not in functions)), Endings()
    if "loader" in parameters:
        arguments["loader"] = read_file
    if "is_valid_file" in parameters and "extensions" not in arguments:
        arguments["is_valid_file"] = functools.partial(_is_image_file, endings)
    if "root" in parameters:
        arguments["root"] = str(url.folder("root", _default_root(url)))
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    missing = [name for name in missing if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if missing:
        raise url.error(f"needs {', '.join(f'{name}=' for name in missing)}")
    try:
        dataset = TorchvisionDataset(url, cls(**arguments))
        size = len(dataset)
    except (*SHARD_ERRORS, ImportError) as error:
        raise url.error(f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)) from error
    if size == 0:
        raise url.error("has no images")
    endings.log(url)
    return dataset


def _is_image_file(endings: Endings, path: str) -> bool:
    return endings.is_image(os.path.basename(path), functools.partial(os.path.isfile, path))  # noqa: PTH119


@dataclass(frozen=True)
class Fields:
    """Names of the image and target columns of a Hugging Face dataset, and of the dataset itself for messages."""

    dataset: str
    image: str
    target: str | None

    def sample(self, row: dict[str, Any], place: str) -> Sample:
        """The sample of one row; `place` says where in the dataset it is."""
        image = row[self.image]
        path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
        if "__key__" in row:
            name = f"{row.get('__url__')}: {row['__key__']}.{self.image}"
        elif path and Path(path).is_absolute():
            name = path
        else:
            name = f"{self.dataset}, {place}" + (f" ({path})" if path else "")
        if self.target is None:
            return Sample(name, functools.partial(_read_cell, image))
        return Sample(
            name, functools.partial(_read_cell, image), functools.partial(_read_target_cell, row[self.target])
        )


def _read_cell(cell: Any) -> bytes:
    """The encoded image in a table cell: bytes, a path, or a dict of both as `datasets.Image(decode=False)` gives."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str):
        raise ValueError(f"no image but {type(cell).__name__}")  # noqa: TRY004  # a bad image, not our mistake
    if "://" not in path:
        return read_file(path)
    import fsspec

    try:
        with fsspec.open(path) as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]  # one file, not a list of them
    except ImportError as error:
        raise UserError(f"images such as {path} need a library: {error} (pip install)") from error


def _read_target_cell(cell: Any) -> Any:
    return decode_mask(_read_cell(cell), "its label image") if isinstance(cell, dict) and "bytes" in cell else cell


class HubDataset(ImageDataset):
    """A Hugging Face dataset with random access."""

    def __init__(self, dataset: Any, fields: Fields) -> None:
        self.dataset = dataset
        self.fields = fields

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of the target column, if it holds class labels or lists of them."""
        feature = self.dataset.features[self.fields.target] if self.fields.target is not None else None
        return list(getattr(getattr(feature, "feature", feature), "names", None) or [])

    def fingerprint(self) -> str:
        """A hash of the columns and of the names of `datasets`' own files, which follow from origin and version."""
        copies = [Path(file["filename"]).parts[-5:] for file in self.dataset.cache_files]
        return hashlib.sha256(repr([len(self), self.dataset.features, copies]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.fields.sample(self.dataset[index], f"row {index}")


class DamagedShard(Sample):
    """Stands for the samples of a shard that cannot be read any more: a sample that cannot be read either."""


class HubStream(ImageStream):
    """A streaming Hugging Face dataset."""

    def __init__(self, dataset: Any, fields: Fields) -> None:
        self.dataset = dataset
        self.fields = fields
        self.num_shards = dataset.num_shards

    def read_shard(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """The samples of one shard, from number `start` on; the rest of a damaged one is a sample that is unreadable.

        So training counts and names it like a bad image, at the same place whenever it comes by, and goes on.
        """
        return itertools.islice(self._samples(shard), start, None)

    def _samples(self, shard: int) -> Iterator[Sample]:
        number = 0
        try:
            # Unlike iter(), iter(batch_size=1) does not divide the samples among the workers of a DataLoader once more.
            for row in self.dataset.shard(num_shards=self.num_shards, index=shard).iter(batch_size=1):
                cells = {name: cells[0] for name, cells in row.items()}
                yield self.fields.sample(cells, f"shard {shard}, row {number}")
                number += 1
        except SHARD_ERRORS as error:
            reason = f"cannot be read from sample {number} on: {type(error).__name__}: {error}"
            yield DamagedShard(self._name(shard), functools.partial(_raise, OSError(reason)))

    def _name(self, shard: int) -> str:
        """The file of a shard, where the private parts of `datasets` say it."""
        source: Any = getattr(self.dataset, "_ex_iterable", None)
        while hasattr(source, "ex_iterable"):
            source = source.ex_iterable
        for files in getattr(source, "kwargs", {}).values():
            if isinstance(files, list) and len(files) == self.num_shards and isinstance(files[shard], str):
                return files[shard]
        return f"{self.fields.dataset}, shard {shard}"


PACKAGED = {"arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "sql", "text", "webdataset"}
"""Names that stand for a format of the user's own files, and for no data set."""

SHARD_ERRORS = (*DECODE_ERRORS, tarfile.TarError, lzma.LZMAError, RuntimeError)
"""What reading a damaged shard raises: Arrow's errors are among them, as OSError and ValueError."""


def _raise(error: Exception) -> bytes:
    raise error


def _make_hub(url: DataUrl, _: Path | None) -> ImageDataset | ImageStream:
    import datasets
    from datasets.exceptions import DatasetsError

    arguments = dict(url.kwargs)
    image_field, target_field = arguments.pop("img_field", None), arguments.pop("tgt_field", None)
    if "trust_remote_code" in arguments:
        raise url.error("trust_remote_code is not accepted: code that comes with a dataset is never run")
    if not url.name:
        raise url.error("needs the name of a data set, as in hf://organisation/name?split='train'")
    if url.name in PACKAGED and not {"data_files", "data_dir"} & arguments.keys():
        raise url.error("needs data_files='...' or data_dir='...'; else all files of the current folder would be read")
    if "split" not in arguments:
        raise url.error(f"needs split={_hub_splits(url.name, arguments)}")
    try:
        dataset = datasets.load_dataset(url.name, **arguments)
    except (*SHARD_ERRORS, ImportError, DatasetsError) as error:
        raise url.error(_why_not_loaded(error) + _how_to_log_in(url.name, error)) from error
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise url.error("split must name one split, for example split='train'")
    features = dataset.features
    if features is None:  # a stream that does not say: as its first row has it
        try:
            features = datasets.Dataset.from_list(list(itertools.islice(dataset, 1))).features
        except SHARD_ERRORS as error:
            raise url.error(_why_not_loaded(error)) from error
    columns = list(features)
    images = [name for name in columns if isinstance(features[name], datasets.Image)]
    labels = [name for name in columns if isinstance(features[name], datasets.ClassLabel)]
    if image_field is None and len(images) == 1:
        image_field = images[0]
    if image_field is None:
        raise url.error(f"needs img_field=, the column with the images; there are: {', '.join(map(repr, columns))}")
    if target_field is None and len(labels) == 1:
        target_field = labels[0]
    for key, column in (("img_field", image_field), ("tgt_field", target_field)):
        if column not in (columns if key == "img_field" else [*columns, None]):
            raise url.error(f"{key}={column!r} is not a column; there are: {', '.join(map(repr, columns))}")
    if images and dataset.features is None:
        dataset = dataset.cast(features)
    for name in images:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    fields = Fields(f"hf://{url.name}", str(image_field), target_field)
    opened = HubDataset(dataset, fields) if isinstance(dataset, datasets.Dataset) else HubStream(dataset, fields)
    _check_first(url, opened)
    return opened


def _why_not_loaded(error: Exception) -> str:
    """An error of `datasets` in words; it logs which file it is about itself."""
    if isinstance(error, LookupError):  # of webdataset, whose list of files is empty
        return "no file matches data_files"
    reasons = "; ".join(f"{type(cause).__name__}: {cause}" for cause in (error, error.__cause__) if cause is not None)
    whole = "; check that its files are there, whole and not empty"
    return reasons if isinstance(error, OSError | ImportError) else reasons + whole


def _check_first(url: DataUrl, opened: "HubDataset | HubStream") -> None:
    """Refuse a dataset without samples, or whose first image needs a library that is not there.

    Raises: UserError.
    """
    if isinstance(opened, HubDataset):
        samples = (opened[index] for index in range(min(1, len(opened))))
    else:
        samples = (sample for shard in range(opened.num_shards) for sample in opened.read_shard(shard))
    damaged = ""
    for first in samples:
        if not isinstance(first, DamagedShard):
            break
        damaged = f": {first.name} is damaged or empty"
    else:
        raise url.error(f"has no samples{damaged}; check the split, and that the files are whole and not empty")
    try:
        first.read()
    except UserError as error:
        raise url.error(str(error)) from error
    except DECODE_ERRORS:
        pass  # a bad image, which training counts


def _how_to_log_in(name: str, error: BaseException) -> str:
    """What to do about a download that was refused, empty for another error."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    codes = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    if not codes & {401, 403} and not any("gated" in f"{type(link).__name__} {link}".lower() for link in chain):
        return ""
    return (
        f". If access is restricted, accept the terms at https://huggingface.co/datasets/{name} and log in with "
        "`hf auth login`, or set HF_TOKEN"
    )


def _hub_splits(name: str, arguments: dict[str, Any]) -> str:
    import datasets
    from datasets.exceptions import DatasetsError

    passed = {key: value for key, value in arguments.items() if key in {"data_files", "data_dir", "revision", "token"}}
    try:
        splits = datasets.get_dataset_split_names(name, arguments.get("name"), **passed)
    except (*SHARD_ERRORS, ImportError, DatasetsError):
        return "'train', for example"
    return " or ".join(map(repr, splits))


SOURCES: dict[str, Callable[[DataUrl, Path | None], ImageDataset | ImageStream]] = {
    "custom": _make_custom,
    "hf": _make_hub,
    "torchvision": _make_torchvision,
}


# ------------------------------------------------------------------------------------------- several data sets as one

MIXTURE_BLOCK = 10_000
"""Images in which each data set of a mixture with weights has its share exactly; the smallest share is one of them."""


class Mixture(ImageDataset):
    """Several data sets one after the other, and how many of so many images come from each.

    Args:
        urls: of the data sets, for people.
        parts: the data sets.
        weights: of each, in any unit; None where each image counts once, as in one large data set.
    """

    def __init__(
        self, urls: Sequence[str], parts: Sequence[ImageDataset], weights: Sequence[float] | None = None
    ) -> None:
        self.urls, self.parts = list(urls), list(parts)
        self.ends = list(itertools.accumulate(map(len, parts)))
        self.counts = None if weights is None else share_out(MIXTURE_BLOCK, weights)
        """With weights, images of each data set among `MIXTURE_BLOCK`."""

    def __len__(self) -> int:
        return self.ends[-1]

    def part_of(self, index: int) -> int:
        """The number of the data set that image `index` is in."""
        return bisect.bisect_right(self.ends, index)

    def start_of(self, part: int) -> int:
        """The index of the first image of a data set."""
        return self.ends[part - 1] if part else 0

    def __getitem__(self, index: int) -> Sample:
        part = self.part_of(index)
        return self.parts[part][index - self.start_of(part)]

    def replacement(self, index: int, number: int) -> int:
        """An image of the same data set, so that shares stay what they are."""
        part = self.part_of(index)
        return self.start_of(part) + number % len(self.parts[part])

    def fingerprint(self) -> str:
        """A hash of those of all, and of their shares."""
        about = [[part.fingerprint() for part in self.parts], self.counts]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def shares(self) -> list[str]:
        """Of each data set, which part of the images that training sees it gives: lines for people."""
        lines = []
        for number, (url, part) in enumerate(zip(self.urls, self.parts, strict=True)):
            fraction = len(part) / len(self) if self.counts is None else self.counts[number] / MIXTURE_BLOCK
            again = f", all of them every {len(part) / fraction:,.0f} images" if self.counts else ""
            lines.append(f"{fraction:7.2%} {url}: {len(part):,} images{again}")
        return lines


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in the ratio of the weights as nearly as can be: largest remainders."""
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def make_mixture(
    datasets: str | Sequence[str] | Mapping[str, float | None], *, key: str, listing_cache: Path | None = None
) -> ImageDataset | ImageStream:
    """The data set of one URL, of a list of them, or of several with weights; null as weight leaves one out.

    Raises: UserError as `make_dataset`, and if one cannot be part of a mixture or would have no share.
    """
    if isinstance(datasets, str):
        return make_dataset(datasets, key=key, listing_cache=listing_cache)
    weights = None
    if isinstance(datasets, Mapping):
        kept = {url: weight for url, weight in datasets.items() if weight is not None}
        datasets, weights = list(kept), list(kept.values())
    opened = [make_dataset(url, key=key, listing_cache=listing_cache) for url in datasets]
    if len(opened) == 1:
        return opened[0]
    for url, each in zip(datasets, opened, strict=True):
        if isinstance(each, ImageStream):
            raise UserError(
                f"{key}: {url} is a stream, and a mixture needs random access: leave streaming=True out, or name tar "
                "files by their paths, which are read in any order"
            )
    mixture = Mixture(datasets, opened, weights)
    if mixture.counts and 0 in mixture.counts:
        url = datasets[mixture.counts.index(0)]
        raise UserError(
            f"{key}: {url} has a share below 1 in {MIXTURE_BLOCK:,}; give it a larger weight, or null to leave it out"
        )
    return mixture


# --------------------------------------------------------------------------------------------- what is there already


def is_on_disk(url: str, key: str) -> bool:
    """Whether a data set is on this machine, as far as its place tells; nothing is read or downloaded.

    Raises: UserError for text that is no data URL, or an argument that is no path.
    """
    parsed = parse_data_url(url, key)
    if parsed.source == "hf":
        return _hub_is_on_disk(parsed)
    root = parsed.folder("root", _default_root(parsed))
    if parsed.source == "custom" and parsed.name in SEGMENTATION_SETS:
        names = [name for name in ARCHIVES if name.startswith(parsed.name)]
        needed = [ARCHIVES[name] for name in names if name == parsed.name or parsed.kwargs.get("split") == "trainaug"]
        return all((root / a.folder).is_dir() or (root / PurePosixPath(a.address).name).is_file() for a in needed)
    return root.exists() or _is_here(str(parsed.kwargs.get("root")))


def _hub_is_on_disk(url: DataUrl) -> bool:
    """Files of the user's, a table that `datasets` has prepared, or a complete download in the cache of the hub."""
    from huggingface_hub import constants

    if "/" not in url.name:  # a format, such as parquet, of files that are named
        given = url.kwargs.get("data_files", url.kwargs.get("data_dir", ()))
        lists = given.values() if isinstance(given, dict) else [given]
        groups = [group if isinstance(group, list | tuple) else [group] for group in lists]
        patterns = [pattern for group in groups for pattern in group]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise url.error("data_files and data_dir are texts, or lists of them: data_files='/my/x.parquet'")
        return bool(patterns) and all(any(glob.iglob(pattern, recursive=True)) for pattern in patterns)  # noqa: PTH207  # they may be absolute
    splits = {part.split("[")[0] for part in str(url.kwargs.get("split")).split("+")}
    home = Path(constants.HF_HOME).expanduser()
    tables = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    if url.kwargs.get("cache_dir"):
        tables = url.folder("cache_dir")
    squeezed = url.name.replace("/", "").replace("_", "").lower()  # datasets writes ImageNet as image_net
    for folder in tables.glob("*___*"):
        if folder.name.replace("_", "").lower() == squeezed:
            files = [str(path) for path in folder.rglob("*.arrow") if ".incomplete" not in str(path)]
            if all(any(f"-{split}" in file for file in files) for split in splits):
                return True
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{url.name.replace('/', '--')}"
    if any(downloaded.glob("blobs/*.incomplete")):
        return False
    about = (".md", ".json", ".yaml", ".yml", ".py", ".txt", ".gitattributes")
    files = [str(path) for path in downloaded.glob("snapshots/*/**/*") if path.is_file() and path.suffix not in about]
    return all(any(split in file.rpartition("/snapshots/")[2] for file in files) for split in splits)
