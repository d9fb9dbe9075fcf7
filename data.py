"""Images: where they come from, how they are decoded and cropped, and in which order training sees them.

`make_dataset` turns a data URL into samples, `PretrainLoader` turns samples into masked batches, `DevicePrefetcher`
brings these to the device. Every crop, flip and mask is a function of (seed, position in the data), and the position
is all that a checkpoint has to keep: a resumed run sees what the uninterrupted one would have seen.
"""

import ast
import atexit
import difflib
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import torch
import torchvision
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from config import CapiConfig
from masking import MaskingGenerator, MaskPlan, draw_positions, make_masking_generator
from utils import UserError

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = (3 / 4, 4 / 3)
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
MAX_REPLACEMENTS = 20
MAX_BAD_IN_A_ROW = 200
MAX_EMPTY_EPOCHS = 10
MIN_SEEN_FOR_BAD_FRACTION = 100


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part: different purposes and positions give unrelated random streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normalize(images: UInt8[Tensor, "b 3 h w"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "b 3 h w"]:
    """Pixels minus the ImageNet mean, divided by the ImageNet standard deviation; computed in float32."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std).to(dtype)


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
        try:
            return decode_image(self.read(), reduction)
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise BadImageError(self.name, "not an image of a known format") from error
        except DECODE_ERRORS as error:
            raise BadImageError(self.name, f"{type(error).__name__}: {error}") from error

    def target(self) -> Any:
        """The label.

        Raises: BadImageError if it is a mask that cannot be read.
        """
        try:
            return self.read_target()
        except DECODE_ERRORS as error:
            raise BadImageError(self.name, f"label: {type(error).__name__}: {error}") from error


def decode_image(data: bytes | Image.Image, reduction: Callable[[int, int], int] | None = None) -> Image.Image:
    """Decode an image file of any kind that Pillow reads to 8-bit RGB, upright as its EXIF orientation says.

    Transparent pixels are put on white. Deep grey is scaled to 8 bits. Of an animation, the first frame is taken.

    Args:
        data: contents of the file, or an image that is already decoded.
        reduction: from (width, height) to a divisor by which a JPEG may be shrunk while it is decoded.
    """
    with warnings.catch_warnings():
        # Pillow warns about odd metadata and large images; neither is of use in the log of a billion images.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        divisor = reduction(image.width, image.height) if reduction is not None and image.format == "JPEG" else 1
        if divisor > 1:
            image.draft(None, (image.width // divisor, image.height // divisor))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def decode_mask(data: bytes) -> Image.Image:
    """Decode an image whose pixels are label numbers to mode L; the palette, if any, is only for looking at it."""
    labels = np.asarray(Image.open(io.BytesIO(data)))
    if labels.ndim != 2 or labels.max(initial=0) > 255:
        raise ValueError(f"a mask needs one channel of values up to 255, this one has shape {labels.shape}")
    return Image.fromarray(labels.astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Scale deep grey to 0..255: integers as 16 bit, floats as [0, 1]; values outside of that by their own range."""
    if not np.isfinite(grey).all():
        raise ValueError("pixels that are not finite")
    full = 1.0 if np.issubdtype(grey.dtype, np.floating) else 65535.0
    low, high = float(grey.min()), float(grey.max())
    if low >= 0 and high <= full:
        low, high = 0.0, full
    return np.round((grey.astype(np.float64) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


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
        """A mistake in this URL."""
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them."""
    known = list(known)
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; there are: {', '.join(known) or 'none'}"


def parse_data_url(text: str, key: str = "data.dataset") -> DataUrl:
    """Split `source://name?key=literal&...`; a text without `://` is the path of a folder of images.

    Values are Python literals, so text is quoted; `&`, `=` and `?` may occur within quotes.

    Raises: UserError if a value is not a literal, or a key is missing or given twice.
    """
    if "://" not in text:
        return DataUrl(text, key, "custom", "Images", {"root": text})
    source, rest = text.split("://", 1)
    name, _, query = rest.partition("?")
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


class ImageDataset(Dataset[Sample]):
    """A dataset with a length, whose images can be asked for in any order."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError


class ImageStream:
    """A dataset that can only be read from start to end, shard by shard."""

    num_shards: int

    def read_shard(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """The samples of one shard, from number `start` on."""
        raise NotImplementedError


class TransformedDataset(Dataset[Any]):
    """A dataset whose items are `transform(image, target)` of the decoded samples; for evaluations."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Image.Image, Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        return self.transform(sample.image(), sample.target())


def make_dataset(
    url: str,
    transform: Callable[[Image.Image, Any], Any] | None = None,
    *,
    key: str = "data.dataset",
    listing_cache: Path | None = None,
) -> Any:
    """The dataset of a data URL: an `ImageDataset`, or an `ImageStream` for `hf://...&streaming=True`.

    Sources: `torchvision://Class?...`, `hf://...?split='train'&img_field='jpg'&tgt_field='label'`,
    `custom://ADE20K|VOC2012|Images?...`, or the path of a folder of images.

    Args:
        url: see `parse_data_url`.
        transform: makes the items `transform(image, target)` of decoded images instead of `Sample`s.
        key: configuration key that `url` comes from, for messages.
        listing_cache: folder in which the file lists of image folders are kept.

    Raises: UserError naming the key, the URL and the remedy.
    """
    parsed = parse_data_url(url, key)
    if parsed.source not in SOURCES:
        raise parsed.error(f"unknown source {parsed.source}://{did_you_mean(parsed.source, SOURCES)}")
    dataset = SOURCES[parsed.source](parsed, listing_cache)
    if transform is None:
        return dataset
    if isinstance(dataset, ImageStream):
        raise parsed.error("evaluations need random access; leave streaming=True out")
    return TransformedDataset(dataset, transform)


def _make_custom(url: DataUrl, listing_cache: Path | None) -> ImageDataset:
    if url.name == "Images":
        arguments = url.take(("root",))
        if not isinstance(arguments.get("root"), str):
            raise url.error("needs root='/path/of/a/folder'")
        return ImageFolder(url, Path(arguments["root"]).expanduser(), listing_cache)
    if url.name not in SEGMENTATION_SETS:
        raise url.error(f"unknown name {url.name}{did_you_mean(url.name, [*SEGMENTATION_SETS, 'Images'])}")
    list_files, splits = SEGMENTATION_SETS[url.name]
    arguments = url.take(("split", "root"))
    split = arguments.get("split")
    if split not in splits:
        raise url.error(f"needs split= one of {', '.join(map(repr, splits))}")
    root = Path(arguments.get("root", cache_root() / "datasets" / url.name)).expanduser()
    return SegmentationDataset(list_files(url, root, split))


# ------------------------------------------------------------------------------------ folders of images


class PathList(Sequence[str]):
    """Millions of paths in two tensors, which worker processes share instead of each holding a copy."""

    def __init__(self, blob: UInt8[Tensor, " bytes"], ends: Int64[Tensor, " paths"]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, paths: list[bytes]) -> Self:
        """Pack a list of paths."""
        blob = torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8) if paths else torch.empty(0).byte()
        return cls(blob, torch.tensor([len(path) for path in paths], dtype=torch.int64).cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return os.fsdecode(self.blob[start : int(self.ends[index])].numpy().tobytes())


class ImageFolder(ImageDataset):
    """Every image file below a folder, in the order of the sorted paths. No labels.

    Links to folders are followed, each folder is read once; names that start with a dot are skipped.
    """

    def __init__(self, url: DataUrl, root: Path, listing_cache: Path | None = None) -> None:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise url.error(f"the folder {root} {what}; give a folder of images, or source://name?key=value")
        self.root = root
        try:
            self.paths = _list_images_cached(root, listing_cache) if listing_cache else _list_images(root)[0]
        except OSError as error:
            raise url.error(f"cannot be listed: {error}") from error
        if not self.paths:
            raise url.error(f"no images below {root}; files count whose names end in {' '.join(IMAGE_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.root / self.paths[index]
        return Sample(str(path), path.read_bytes)


def _list_images(root: Path) -> tuple[PathList, dict[str, int]]:
    """Relative paths of the images below `root`, and the modification time of every folder, in nanoseconds."""
    paths: list[bytes] = []
    times: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    pending = [b""]
    while pending:
        folder = pending.pop()
        full = os.path.join(os.fsencode(root), folder)  # noqa: PTH118  # pathlib takes no bytes, and is slow
        status = os.stat(full)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        times[os.fsdecode(folder)] = status.st_mtime_ns
        with os.scandir(full) as entries:
            found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        prefix = folder + b"/" if folder else b""
        visible = [entry for entry in found if not entry.name.startswith(b".")]
        paths += [
            prefix + entry.name
            for entry in visible
            if os.fsdecode(entry.name).lower().endswith(IMAGE_EXTENSIONS) and _follows_to(entry.is_file)
        ]
        # Reversed, since the last one is taken first: real folders come before links to them.
        pending += [prefix + entry.name for entry in reversed(visible) if _follows_to(entry.is_dir)]
    return PathList.of(sorted(paths)), times


def _follows_to(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError:  # a link to itself
        return False


def _list_images_cached(root: Path, cache_dir: Path) -> PathList:
    """As `_list_images`, from a file that is valid until the modification time of any folder changes."""
    resolved = str(root.resolve())
    cache = cache_dir / f"{hashlib.blake2b(os.fsencode(resolved), digest_size=16).hexdigest()}.npz"
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            times = json.loads(stored["times"].tobytes())
            if all((root / folder).stat().st_mtime_ns == time_ns for folder, time_ns in times.items()):
                return PathList(torch.from_numpy(stored["blob"]), torch.from_numpy(stored["ends"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # no cache yet, a damaged one, or a folder is gone: list again
    paths, times = _list_images(root)
    # A folder that changes twice within the clock's resolution keeps its time, so recent changes are not cached.
    if max(times.values()) < time.time_ns() - 2_000_000_000:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as temporary:
            header = np.frombuffer(json.dumps(times).encode(), dtype=np.uint8)
            np.savez(temporary, times=header, blob=paths.blob.numpy(), ends=paths.ends.numpy())
        Path(temporary.name).replace(cache)
    return paths


# ---------------------------------------------------------------------------------- segmentation datasets


class SegmentationDataset(ImageDataset):
    """Pairs of an image file and a file of labels; targets are images of mode L that hold label numbers."""

    def __init__(self, pairs: list[tuple[Path, Path]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, labels = self.pairs[index]
        return Sample(str(image), image.read_bytes, functools.partial(_read_labels, labels))


def _read_labels(path: Path) -> Image.Image:
    if path.suffix != ".mat":
        return decode_mask(path.read_bytes())
    from scipy.io import loadmat

    return Image.fromarray(loadmat(str(path))["GTcls"]["Segmentation"][0, 0].astype(np.uint8))


@dataclass(frozen=True)
class Archive:
    """A file to download, and the folder that it unpacks to."""

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
    return _existing(url, [(image, labels / f"{image.stem}.png") for image in images], folder)


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
    return _existing(url, list(zip(images, labels, strict=True)), folder)


def _existing(url: DataUrl, pairs: list[tuple[Path, Path]], folder: Path) -> list[tuple[Path, Path]]:
    present = {
        parent: {path.name for path in parent.glob("*")} for parent in {p.parent for pair in pairs for p in pair}
    }
    missing = [str(path) for pair in pairs for path in pair if path.name not in present[path.parent]]
    if missing or not pairs:
        lacks = f"lacks {len(missing)} files, first {missing[0]}" if missing else "has no images of this split"
        raise url.error(f"{folder} {lacks}; remove that folder to have it downloaded again")
    return pairs


SEGMENTATION_SETS: dict[str, tuple[Callable[[DataUrl, Path, str], list[tuple[Path, Path]]], tuple[str, ...]]] = {
    "ADE20K": (_list_ade20k, ("training", "validation")),
    "VOC2012": (_list_voc2012, ("train", "val", "trainaug")),
}


def _unpacked(url: DataUrl, archive: Archive, root: Path) -> Path:
    """The folder of an archive below `root`; downloaded, checked and unpacked if it is not there."""
    folder = root / archive.folder
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks of this node wait here for the first
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
            with urllib.request.urlopen(archive.address, timeout=60) as response:
                file = Path(temporary) / file.name
                with file.open("wb") as out:
                    shutil.copyfileobj(response, out, 1 << 20)
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if md5 != archive.md5:
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
    """Any dataset of torchvision whose items are (image, target)."""

    def __init__(self, url: DataUrl, dataset: Any) -> None:
        self.url = url
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        item = functools.cache(functools.partial(self.dataset.__getitem__, index))
        files = getattr(self.dataset, "samples", None) or getattr(self.dataset, "imgs", None)
        name = str(files[index][0]) if files else f"{self.url.source}://{self.url.name}[{index}]"
        return Sample(name, lambda: self._image(item()[0]), lambda: item()[1])

    def _image(self, image: Any) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise self.url.error(f"gives {type(image).__name__}, not images")
        return image


def _make_torchvision(url: DataUrl, _: Path | None) -> ImageDataset:
    known = [name for name in torchvision.datasets.__all__ if name != "VisionDataset"]
    if url.name not in known:
        raise url.error(f"torchvision has no dataset {url.name}{did_you_mean(url.name, known)}")
    cls = getattr(torchvision.datasets, url.name)
    parameters = inspect.signature(cls).parameters
    arguments = dict(url.take(parameters))
    if "root" in parameters:
        arguments.setdefault("root", str(cache_root() / "datasets" / url.name))
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    missing = [name for name in missing if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if missing:
        raise url.error(f"needs {', '.join(f'{name}=' for name in missing)}")
    try:
        return TorchvisionDataset(url, cls(**arguments))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise url.error(str(error)) from error


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
        return Path(path).read_bytes()
    import fsspec

    with fsspec.open(path) as file:
        return file.read()  # pyright: ignore[reportAttributeAccessIssue]  # one file, not a list of them


def _read_target_cell(cell: Any) -> Any:
    return decode_mask(_read_cell(cell)) if isinstance(cell, dict) and "bytes" in cell else cell


class HubDataset(ImageDataset):
    """A Hugging Face dataset with random access."""

    def __init__(self, dataset: Any, fields: Fields) -> None:
        self.dataset = dataset
        self.fields = fields

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.fields.sample(self.dataset[index], f"row {index}")


class HubStream(ImageStream):
    """A streaming Hugging Face dataset."""

    def __init__(self, dataset: Any, fields: Fields) -> None:
        self.dataset = dataset
        self.fields = fields
        self.num_shards = dataset.num_shards

    def read_shard(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """The samples of one shard, from number `start` on."""
        # Unlike iter(), iter(batch_size=1) does not divide the samples among the workers of a DataLoader once more.
        rows = self.dataset.shard(num_shards=self.num_shards, index=shard).iter(batch_size=1)
        for number, row in itertools.islice(enumerate(rows), start, None):
            yield self.fields.sample({name: cells[0] for name, cells in row.items()}, f"shard {shard}, row {number}")


def _make_hub(url: DataUrl, _: Path | None) -> ImageDataset | ImageStream:
    import datasets

    arguments = dict(url.kwargs)
    image_field, target_field = arguments.pop("img_field", None), arguments.pop("tgt_field", None)
    if "trust_remote_code" in arguments:
        raise url.error("trust_remote_code is not accepted: code that comes with a dataset is never run")
    if "split" not in arguments:
        raise url.error(f"needs split={_hub_splits(url.name, arguments)}")
    try:
        dataset = datasets.load_dataset(url.name, **arguments)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise url.error(f"{type(error).__name__}: {error}") from error
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise url.error("split must name one split, for example split='train'")
    features = dataset.features
    columns = list(features) if features else list(next(iter(dataset), {}))
    images = [name for name in columns if features and isinstance(features[name], datasets.Image)]
    if image_field is None and len(images) == 1:
        image_field = images[0]
    for key, column in (("img_field", image_field), ("tgt_field", target_field)):
        if column not in (columns if key == "img_field" else [*columns, None]):
            raise url.error(f"{key}={column!r} is not a column; there are: {', '.join(map(repr, columns))}")
    for name in images:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    fields = Fields(f"hf://{url.name}", str(image_field), target_field)
    return HubDataset(dataset, fields) if isinstance(dataset, datasets.Dataset) else HubStream(dataset, fields)


def _hub_splits(name: str, arguments: dict[str, Any]) -> str:
    import datasets

    passed = {key: value for key, value in arguments.items() if key in {"data_files", "data_dir", "revision", "token"}}
    try:
        splits = datasets.get_dataset_split_names(name, arguments.get("name"), **passed)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError):
        return "'train', for example"
    return " or ".join(map(repr, splits))


SOURCES: dict[str, Callable[[DataUrl, Path | None], ImageDataset | ImageStream]] = {
    "custom": _make_custom,
    "hf": _make_hub,
    "torchvision": _make_torchvision,
}


# ------------------------------------------------------------------------------------- samples to batches


@dataclass(frozen=True)
class Batch:
    """Masked images of one forward pass on one rank."""

    images: UInt8[Tensor, "b 3 h w"]
    visible_indices: Int64[Tensor, " b*v"]
    """Patches that the student sees, as image * n + position, image-major and ascending."""
    predict_indices: Int64[Tensor, " b*m"]
    """Hidden patches that are predicted, likewise."""
    sample_ids: Int64[Tensor, " b"]
    """Index in the dataset; of a stream, the running number within that stream."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of the unreadable images that were met on the way."""
    stream_state: dict[str, int] | None = None
    """Streaming: where the stream of this batch stands after it."""
    position: dict[str, Any] | None = None
    """What `PretrainLoader.state_dict` was when this batch was handed out."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch with its tensors on `device`."""
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()})

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class _Failure:
    """A mistake of the user that a worker met; as an exception it would arrive wrapped in a traceback."""

    message: str


class SampleMaker:
    """Turns samples into crops and masks, each a function of (seed, key of the sample) alone."""

    def __init__(
        self,
        *,
        seed: int,
        image_size: int,
        crop_scale: tuple[float, float],
        do_hflip: bool,
        masking_generator: MaskingGenerator,
        plan: MaskPlan,
    ) -> None:
        self.seed = seed
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.masking_generator = masking_generator
        self.plan = plan
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(image_size, crop_scale, CROP_RATIO, interpolation=bicubic, antialias=True)
        self.transform = v2.Compose([crop, *([v2.RandomHorizontalFlip(0.5)] if do_hflip else []), v2.PILToTensor()])

    def reduction(self, width: int, height: int) -> int:
        """The largest divisor of a JPEG's size after which no possible crop has to be enlarged."""
        smallest_crop = min(math.sqrt(self.crop_scale[0] * width * height * CROP_RATIO[0]), width, height)
        return next((divisor for divisor in (8, 4, 2) if smallest_crop / divisor >= self.image_size), 1)

    def crop(self, sample: Sample, *key: int) -> UInt8[Tensor, "3 h w"]:
        """A random crop, flipped half of the times.

        Raises: BadImageError if the file cannot be read.
        """
        image = sample.image(self.reduction)
        with _seeded(derive_seed(self.seed, "crop", *key)):
            return self.transform(image)

    def mask(self, *key: int) -> tuple[Int64[Tensor, " v"], Int64[Tensor, " m"]]:
        """Visible and predict positions."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "mask", *key))
        return draw_positions(self.plan, self.masking_generator, generator)

    def batch(
        self, crops: list[Tensor], keys: list[tuple[int, ...]], sample_ids: list[int], bad: list[tuple[str, str]]
    ) -> Batch:
        """Stack crops, and draw the mask of each."""
        visible, predict = zip(*(self.mask(*key) for key in keys), strict=True)
        first_patch = torch.arange(len(keys)).unsqueeze(1) * self.plan.num_patches
        return Batch(
            images=torch.stack(crops),
            visible_indices=(torch.stack(visible) + first_patch).flatten(),
            predict_indices=(torch.stack(predict) + first_patch).flatten(),
            sample_ids=torch.tensor(sample_ids),
            bad=bad,
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global random numbers and put them back afterwards; torch.manual_seed would touch the GPU's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class MapBatches(Dataset[Any]):
    """Batches of an `ImageDataset`; an item is asked for by its (global position, index in the dataset) pairs."""

    def __init__(self, dataset: ImageDataset, maker: SampleMaker) -> None:
        self.dataset = dataset
        self.maker = maker

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Batch | _Failure:
        crops, sample_ids, bad = [], [], []
        try:
            for position, index in pairs:
                crop, used = self._readable(position, index, bad)
                crops.append(crop)
                sample_ids.append(used)
        except UserError as error:
            return _Failure(str(error))
        return self.maker.batch(crops, [(position,) for position, _ in pairs], sample_ids, bad)

    def _readable(self, position: int, index: int, bad: list[tuple[str, str]]) -> tuple[Tensor, int]:
        """The crop for `position`: of image `index`, or of the first readable one of those that replace it."""
        tried: list[str] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            if attempt > 0:
                index = derive_seed(self.maker.seed, "replacement", position, attempt) % len(self.dataset)
            try:
                return self.maker.crop(self.dataset[index], position), index
            except BadImageError as error:
                bad.append((error.name, error.reason))
                tried.append(str(error))
        raise UserError(f"data.dataset: {len(tried)} images in a row cannot be read, last {'; '.join(tried[-3:])}")


class EpochOrder:
    """Which image is at a global position: epoch after epoch, each in a random order of its own."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> Int64[Tensor, " images"]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator)

    def image_at(self, position: int) -> int:
        """Index in the dataset of the image at `position`."""
        epoch, offset = divmod(position, self.num_images)
        return int(self._permutation(epoch)[offset])

    def batches(self, start: int, rank: int, world_size: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
        """For ever, the (position, index) pairs of this rank's batches, from global position `start` on."""
        for first in itertools.count(start + rank * batch_size, world_size * batch_size):
            yield [(position, self.image_at(position)) for position in range(first, first + batch_size)]


class StreamPart:
    """One of the parts that an `ImageStream` is divided into; iterates for ever over (running number, sample).

    Per epoch the order of the shards is drawn, the same for all parts, and dealt out: a part gets whole shards, or,
    with fewer shards than parts, each n-th sample of one shard. So no two parts see the same sample in an epoch.
    Within a part, blocks of samples are read in order and permuted. The state is the place where a block starts and the
    offset in it: a resumed part reads the block again. If parts have unequal numbers of shards, those with fewer start
    their next epoch sooner.
    """

    def __init__(
        self,
        stream: ImageStream,
        *,
        seed: int,
        part: int,
        num_parts: int,
        block_size: int,
        state: dict[str, int] | None,
    ) -> None:
        self.stream = stream
        self.seed = seed
        self.part = part
        self.num_parts = num_parts
        self.block_size = block_size
        state = state or dict.fromkeys(("epoch", "shard", "row", "block", "offset", "samples"), 0)
        self.samples = state["samples"]
        self._next_block = state["block"]
        self._seek(state["epoch"], state["shard"], state["row"])
        self._read_block()
        self.offset = state["offset"]

    def __next__(self) -> tuple[int, Sample]:
        while self.offset >= len(self.block):
            self._read_block()
        sample = self.block[self.offset]
        self.offset += 1
        self.samples += 1
        return self.samples - 1, sample

    def state(self) -> dict[str, int]:
        """Where the next sample comes from."""
        return {**self._block_start, "offset": self.offset, "samples": self.samples}

    def _seek(self, epoch: int, shard: int, row: int) -> None:
        self._place = {"epoch": epoch, "shard": shard, "row": row}
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shards", epoch))
        order = torch.randperm(self.stream.num_shards, generator=generator).tolist()
        lane = self.part % len(order)
        self._shards: list[int] = order[lane :: self.num_parts]
        self._member, self._members = self.part // len(order), len(range(lane, self.num_parts, len(order)))
        self._rows = self._read(shard, row)

    def _read(self, first_shard: int, first_row: int) -> Iterator[tuple[int, int, Sample]]:
        for shard in range(first_shard, len(self._shards)):
            start = first_row if shard == first_shard else 0
            for row, sample in enumerate(self.stream.read_shard(self._shards[shard], start), start):
                if row % self._members == self._member:
                    yield shard, row + 1, sample

    def _read_block(self) -> None:
        """Read and permute the next block; past the end of an epoch, the first one of the next epoch."""
        for _ in range(MAX_EMPTY_EPOCHS):
            self._block_start = {**self._place, "block": self._next_block}
            found = list(itertools.islice(self._rows, self.block_size))
            if found:
                self._place |= {"shard": found[-1][0], "row": found[-1][1]}
                seed = derive_seed(self.seed, "block", self.part, self._place["epoch"], self._next_block)
                order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
                self.block = [found[index][2] for index in order]
                self.offset = 0
                self._next_block += 1
                return
            self._seek(self._place["epoch"] + 1, 0, 0)
        raise UserError(
            f"data.dataset: part {self.part} of the {self.num_parts} that the stream is divided into has no samples; "
            "use fewer parts (data.stream_partitions, or efficiency.dataloader_num_workers if that is null), or check "
            "that the dataset is not empty"
        )


class StreamBatches(IterableDataset[Any]):
    """Batches of an `ImageStream` on one rank: batch i comes from part i % S of the rank's S parts."""

    def __init__(
        self,
        stream: ImageStream,
        maker: SampleMaker,
        *,
        batch_size: int,
        block_size: int,
        parts: list[int],
        num_parts: int,
        states: dict[int, dict[str, int] | None],
        first_batch: int,
    ) -> None:
        self.stream = stream
        self.maker = maker
        self.batch_size = batch_size
        self.block_size = block_size
        self.parts = parts
        self.num_parts = num_parts
        self.states = states
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[Batch | _Failure]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        assert len(self.parts) % num_workers == 0, "two workers would share a part"
        open_parts: dict[int, StreamPart] = {}
        try:
            for number in itertools.count(self.first_batch + worker, num_workers):
                part = self.parts[number % len(self.parts)]
                if part not in open_parts:
                    open_parts[part] = StreamPart(
                        self.stream,
                        seed=self.maker.seed,
                        part=part,
                        num_parts=self.num_parts,
                        block_size=self.block_size,
                        state=self.states.get(part),
                    )
                yield self._batch(open_parts[part])
        except UserError as error:
            yield _Failure(str(error))

    def _batch(self, part: StreamPart) -> Batch:
        crops, numbers, bad, bad_in_a_row = [], [], [], 0
        while len(crops) < self.batch_size:
            number, sample = next(part)
            try:
                crops.append(self.maker.crop(sample, part.part, number))
                numbers.append(number)
                bad_in_a_row = 0
            except BadImageError as error:
                bad.append((error.name, error.reason))
                bad_in_a_row += 1
                if bad_in_a_row >= MAX_BAD_IN_A_ROW:
                    raise UserError(
                        f"data.dataset: {bad_in_a_row} images in a row cannot be read, last {error}"
                    ) from error
        batch = self.maker.batch(crops, [(part.part, number) for number in numbers], numbers, bad)
        return replace(batch, stream_state=part.state())


# ------------------------------------------------------------------------------------------------- loader


class PretrainLoader:
    """An endless iterator over the `Batch`es of one rank that can continue where another one stopped.

    Map-style data: the global position counts the images that all ranks together have been given; epochs follow each
    other without a gap, and a batch may span two. The order depends neither on the ranks nor on the workers.
    Streaming data: see `StreamPart`; the order depends on the number of ranks and of `data.stream_partitions`.

    Args:
        cfg: the whole configuration; train.seed, data, optim.batch_size_per_gpu and efficiency are used.
        dataset: what `make_dataset` gave; by default that of data.dataset.
        rank: this process.
        world_size: number of processes.
        position: `state_dict()` of the run to continue; `merge_positions` of those of all ranks.
        pin_memory: hand out batches in page-locked memory.
        bad_files_path: JSON lines file that unreadable images are added to, each once.
        start_method: of the workers. forkserver and spawn need a script with `if __name__ == "__main__"`.

    Raises: UserError if the data, the masks or the position do not fit the configuration.
    """

    def __init__(
        self,
        cfg: CapiConfig,
        *,
        dataset: ImageDataset | ImageStream | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: dict[str, Any] | None = None,
        pin_memory: bool = False,
        bad_files_path: Path | None = None,
        start_method: str = "forkserver",
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        data = cfg.data
        if cfg.model.in_chans != 3:
            raise UserError(f"model.in_chans={cfg.model.in_chans}: images are RGB; use model.in_chans=3")
        self.maker = SampleMaker(
            seed=cfg.train.seed,
            image_size=data.images_size,
            crop_scale=data.crop_scale,
            do_hflip=data.do_hflip,
            masking_generator=make_masking_generator(data.masking_generator, **data.masking_generator_kwargs),
            plan=MaskPlan(cfg.grid_size, cfg.grid_size, data.mask_ratio, data.prediction_subsampling),
        )
        if dataset is None:
            listing_cache = cache_root() / "image_listings" if cfg.efficiency.cache_dataset else None
            dataset = make_dataset(data.dataset, listing_cache=listing_cache)
        assert isinstance(dataset, ImageDataset | ImageStream)
        self.cfg = cfg
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.start_method = start_method
        self.num_workers = cfg.efficiency.dataloader_num_workers
        self.bad_files = BadFiles(bad_files_path, data.max_bad_fraction)
        self._batches: Iterator[Any] | None = None
        self._restore(position or {})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._make_loader())
            if self.num_workers:  # at exit, before multiprocessing's own clean-up, which would wait for them
                atexit.register(self.close)
        batch = next(self._batches)
        if isinstance(batch, _Failure):
            self.close()
            raise UserError(batch.message)
        self.bad_files.count(len(batch.images), batch.bad)
        self._advance(batch)
        return replace(batch, position=self.state_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. Iterating on starts them again, after the last batch that was handed out."""
        atexit.unregister(self.close)
        batches, self._batches = self._batches, None
        if batches is not None and self.num_workers:
            # Private, but else the workers would stop only when the garbage collector comes by.
            batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
            for worker in batches._workers:  # pyright: ignore[reportAttributeAccessIssue]
                if worker.is_alive():  # they ignore SIGTERM, so one that hangs in a read would outlive us
                    worker.kill()

    def describe(self) -> str:
        """What is read and how, for people."""
        if isinstance(self.dataset, ImageStream):
            what = f"stream of {self.dataset.num_shards:,} shards, {len(self._parts)} parts per rank"
        else:
            what = f"{len(self.dataset):,} images"
        return f"{self.cfg.data.dataset}: {what}, {self.num_workers} workers per rank"

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; can be written as JSON. Of a stream: of this rank."""
        counts = {"seen": self.bad_files.seen, "bad": self.bad_files.bad}
        if isinstance(self.dataset, ImageDataset):
            return {"kind": "map", "num_images": len(self.dataset), "samples": self._samples, **counts}
        return {
            "kind": "stream",
            "num_parts": self.world_size * len(self._parts),
            "world_size": self.world_size,
            "next_batch": self._next_batch,
            "parts": {str(part): self._part_states.get(part) for part in self._parts},
            **counts,
        }

    def _restore(self, position: dict[str, Any]) -> None:
        kind = "map" if isinstance(self.dataset, ImageDataset) else "stream"
        if position and position["kind"] != kind:
            raise UserError(
                f"data.dataset={self.cfg.data.dataset}: the run to continue read a {position['kind']} dataset, this is "
                f"a {kind} dataset; give the same data, or start a new run in another train.output_dir"
            )
        self.bad_files.seen = self._share_of(position.get("seen", 0))
        self.bad_files.bad = self._share_of(position.get("bad", 0))
        if isinstance(self.dataset, ImageDataset):
            self._samples = position.get("samples", 0)
            before = position.get("num_images", len(self.dataset))
            if before != len(self.dataset):
                logger.warning(
                    "data.dataset has %d images, it had %d when the checkpoint was made: the order of the images is "
                    "another one from here on", len(self.dataset), before,
                )  # fmt: skip
            return
        self._restore_stream(position)

    def _share_of(self, total: int) -> int:
        """This rank's part of a count, so that the parts of all ranks add up to it."""
        return total * (self.rank + 1) // self.world_size - total * self.rank // self.world_size

    def _restore_stream(self, position: dict[str, Any]) -> None:
        wanted = self.cfg.data.stream_partitions or max(1, self.num_workers)
        num_parts = position.get("num_parts", wanted * self.world_size)
        if num_parts % self.world_size:
            raise UserError(
                f"the run to continue divides its stream into {num_parts} parts, which cannot be dealt out to "
                f"{self.world_size} ranks; use a number of ranks that divides {num_parts}"
            )
        partitions = num_parts // self.world_size
        if self.cfg.data.stream_partitions not in {None, partitions}:
            logger.warning("data.stream_partitions is %d, as in the run that is continued", partitions)
        self._parts = list(range(self.rank * partitions, (self.rank + 1) * partitions))
        self._num_parts = num_parts
        states = position.get("parts", dict.fromkeys(map(str, self._parts)))
        assert states.keys() >= set(map(str, self._parts)), "the position is that of other ranks; use merge_positions"
        self._part_states: dict[int, dict[str, int] | None] = {part: states[str(part)] for part in self._parts}
        # With another number of ranks the parts are dealt anew; each continues where it was, which one is next is free.
        self._next_batch = position.get("next_batch", 0) if position.get("world_size") == self.world_size else 0
        workers = largest_divisor(partitions, self.num_workers) if self.num_workers else 0
        if workers != self.num_workers:
            logger.info(
                "%d workers instead of efficiency.dataloader_num_workers=%d, so that each reads as many of %d streams",
                workers, self.num_workers, partitions,
            )  # fmt: skip
        self.num_workers = workers

    def _advance(self, batch: Batch) -> None:
        if isinstance(self.dataset, ImageDataset):
            self._samples += self.world_size * self.cfg.optim.batch_size_per_gpu
            return
        assert batch.stream_state is not None
        part = self._parts[self._next_batch % len(self._parts)]
        self._part_states = {**self._part_states, part: batch.stream_state}
        self._next_batch += 1

    def _make_loader(self) -> DataLoader[Any]:
        batch_size = self.cfg.optim.batch_size_per_gpu
        if isinstance(self.dataset, ImageDataset):
            order = EpochOrder(len(self.dataset), self.cfg.train.seed)
            batches: Dataset[Any] = MapBatches(self.dataset, self.maker)
            sampler = order.batches(self._samples, self.rank, self.world_size, batch_size)
        else:
            sampler = None
            batches = StreamBatches(
                self.dataset,
                self.maker,
                batch_size=batch_size,
                block_size=self.cfg.data.stream_shuffle_block,
                parts=self._parts,
                num_parts=self._num_parts,
                states=self._part_states,
                first_batch=self._next_batch,
            )
        context = None
        if self.num_workers:
            context = torch.multiprocessing.get_context(self.start_method)
            if self.start_method == "forkserver":
                # Imported once by the server, not once by every worker.
                context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "numpy", "PIL.Image"])
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_identity,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it would draw from the global random numbers
        )


class BadFiles:
    """Counts the images that could not be read, names each in a file, and stops the run when there are too many."""

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        self.path = path
        self.max_fraction = max_fraction
        self.seen = 0
        self.bad = 0
        self._named: set[str] = set()

    def count(self, good: int, bad: list[tuple[str, str]]) -> None:
        """Add images that were just read.

        Raises: UserError if the unreadable ones are too many.
        """
        self.seen += good + len(bad)
        self.bad += len(bad)
        for name, reason in bad:
            self._record(name, reason)
        if self.bad > self.max_fraction * max(self.seen, MIN_SEEN_FOR_BAD_FRACTION):
            listed = f"; they are listed in {self.path}" if self.path else ""
            raise UserError(
                f"data.max_bad_fraction={self.max_fraction}: {self.bad} of {self.seen} images cannot be read, "
                f"last {bad[-1][0] if bad else 'before the restart'}{listed}. Repair or remove them, or raise the limit"
            )

    def _record(self, name: str, reason: str) -> None:
        if self.path is None or name in self._named:
            return
        self._named |= self._read_names(self.path)  # by earlier runs and by other ranks
        if name not in self._named:
            self._named.add(name)
            logger.warning("unreadable image %s: %s", name, reason)
            with self.path.open("a") as file:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")

    @staticmethod
    def _read_names(path: Path) -> set[str]:
        if not path.is_file():
            return set()
        names = set()
        for line in path.read_text().splitlines():
            try:
                names.add(json.loads(line)["file"])
            except (ValueError, KeyError, TypeError):
                continue  # a line that a killed run did not finish
        return names


def merge_positions(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """One position out of the `state_dict()`s that all ranks have after the same step."""
    assert len({(p["kind"], p.get("samples"), p.get("next_batch")) for p in positions}) == 1, "ranks are out of step"
    merged = {**positions[0], "seen": sum(p["seen"] for p in positions), "bad": sum(p["bad"] for p in positions)}
    if merged["kind"] == "stream":
        merged["parts"] = {part: state for position in positions for part, state in position["parts"].items()}
    return merged


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _identity(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Launchers signal every process of a job. The trainer decides what that means, and needs batches until it stops.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # DataLoader's own check looks at the parent process, which is the fork server, and that outlives the trainer.
    threading.Thread(target=_exit_with_trainer, daemon=True).start()


def _exit_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "not a worker process"
    trainer.join()
    os._exit(1)


class DevicePrefetcher:
    """Iterates over batches on the device; on CUDA the next one is copied on a stream of its own during this step.

    `wait_s` adds up the seconds for which the consumer waited for data.
    """

    def __init__(self, loader: PretrainLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.wait_s = 0.0
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Batch | None = None
        self._position: dict[str, Any] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self._copy_stream is None:
            batch = next(self.loader).to(self.device)
        else:
            batch = self._copied or self._copy_next(self._copy_stream)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copy_stream)
            for tensor in batch.tensors().values():
                tensor.record_stream(current)  # else its memory could be reused while this step still reads it
            self._copied = self._copy_next(self._copy_stream)
        self._position = batch.position
        self.wait_s += time.perf_counter() - start
        return batch

    def _copy_next(self, stream: torch.cuda.Stream) -> Batch:
        with torch.cuda.stream(stream):
            return next(self.loader).to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position after the last batch that was handed out here, whatever was read ahead."""
        return self._position or self.loader.state_dict()
