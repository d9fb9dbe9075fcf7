"""What the pixels of a data set look like: a sample of the files as they are stored, and as a model sees them.

Images are made 8-bit RGB when they are decoded, which loses what they have beyond that: the rest of a deep range, and
further bands. Whoever reads a data set for the first time decodes some of it first, and says so.
"""

import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from reading.bands import Stored, combined
from reading.sources import (
    BadImageError,
    ImageDataset,
    ImageStream,
    Mixture,
    Sample,
    damage_named,
    full_range,
    has_transparency,
    share_out,
)
from utils import RGB8, Bands, Normalisation, UserError, derive_seed

logger = logging.getLogger("pixels")

NUM_IMAGES = 32
TIME_LIMIT_S = 20.0
"""For all of them; a disk that does not answer does not hold anybody up for longer."""

BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
"""Tags of a TIFF."""

MAX_PIXELS = 1_000_000
"""About as many of an image are counted."""

DEEP_LEVELS = 64
"""Grey levels of 256. Files of more than 8 bits whose values span no more leave two bits or more of theirs unused, as
12-bit data in 16-bit files does; a whole sample of photographs that are that dark is not expected."""

SHALLOW_LEVELS = 16
"""Likewise for files of 8 bits, whose range nobody chose for them: below the contrast of the darkest photographs, but
not below that of label numbers, or of 12-bit values cut down to 8 bits."""


@dataclass
class Kind:
    """Files of the sample that are stored alike."""

    num: int = 0
    low: float = float("inf")
    """Stored values, where they are to be had."""
    high: float = float("-inf")
    levels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    """How often each 8-bit value occurs in red, green and blue, after decoding."""


@dataclass
class PixelSample:
    """What a sample of a data set showed so far."""

    size: str
    """Of the data set, for people."""
    kinds: dict[tuple[str, int], Kind] = field(default_factory=lambda: defaultdict(Kind))
    """By description and bits per value."""
    problems: Counter[str] = field(default_factory=Counter)
    """What else is lost, with the number of images."""
    unreadable: list[str] = field(default_factory=list)

    @property
    def num(self) -> int:
        """Images so far, unreadable ones included."""
        return sum(kind.num for kind in self.kinds.values()) + len(self.unreadable)

    def add(self, data: bytes | Image.Image, image: Image.Image, rgb: Image.Image) -> None:
        """Count the values of one image: its file, what that stores, and what a model sees of it."""
        bits = stored_bits(image, data)
        kind = self.kinds[f"{bits}-bit {image.mode} {image.format or 'array'}", bits]
        kind.num += 1
        if bits > 8 and len(image.getbands()) == 1:  # of several bands, Pillow gives 8 bits alone
            stored = np.asarray(image)
            low, high = float(stored.min()), float(stored.max())
            kind.low, kind.high = min(kind.low, low), max(kind.high, high)
            if low < 0 or high > full_range(stored):
                self.problems[
                    "values outside of 0 to 65535 (integers) or 0 to 1 (floats): each is scaled by its own darkest and "
                    "brightest value, so that brightness means nothing between images"
                ] += 1
        step = max(1, math.isqrt(rgb.width * rgb.height // MAX_PIXELS))
        pixels = np.asarray(rgb)[::step, ::step]
        kind.levels += np.stack([np.bincount(pixels[..., band].ravel(), minlength=256) for band in range(3)])
        if problem := lost_bands(image):
            self.problems[problem] += 1

    def lines(self) -> list[str]:
        """What was found, for people."""
        if not self.kinds:
            return []
        files = "; ".join(
            f"{kind.num} {text}" + (f" with values {kind.low:g} to {kind.high:g}" if kind.high >= kind.low else "")
            for (text, _), kind in self.kinds.items()
        )
        bands, values = [], np.arange(256)
        total = np.sum([kind.levels for kind in self.kinds.values()], axis=0)
        for name, levels in zip(("red", "green", "blue"), total, strict=True):
            mean = np.average(values, weights=levels)
            deviation = np.sqrt(np.average((values - mean) ** 2, weights=levels))
            low, high = np.flatnonzero(levels)[[0, -1]]
            bands.append(f"{name} {low} to {high}, mean {mean:.1f}, deviation {deviation:.1f}")
        return [
            f"{self.num} of {self.size} looked at: {files}",
            f"as the model sees them, in 0 to 255: {'; '.join(bands)}",
        ]

    def warnings(self) -> list[str]:
        """What is lost, with the number of images, and what to do about it."""
        found = [
            f"{kind.num} of {self.num} images ({text}) {problem}"
            for (text, bits), kind in self.kinds.items()
            if (problem := _unused_range(kind, bits))
        ]
        found += [f"{num} of {self.num} images have {problem}" for problem, num in self.problems.items()]
        if self.unreadable:
            found.append(f"{len(self.unreadable)} of {self.num} images cannot be read, first {self.unreadable[0]}")
        return found


def _unused_range(kind: Kind, bits: int) -> str | None:
    levels = kind.levels.sum(axis=0)
    values = np.flatnonzero(levels)
    if len(values) == 1:
        return f"have the value {values[0]} of 255 everywhere: there is nothing to learn from"
    if bits > 8:  # the ends of a deep range also stand for "no data" and "too bright"
        levels = levels[1:255]
    up_to = levels.cumsum()
    if up_to[-1] == 0:
        return None
    low, high = np.searchsorted(up_to, [0.001 * up_to[-1], 0.999 * up_to[-1]])  # single pixels are always defective
    span = int(high - low + 1)
    if span > (DEEP_LEVELS if bits > 8 else SHALLOW_LEVELS):
        return None
    stored = f" (stored as {kind.low:g} to {kind.high:g})" if kind.high >= kind.low else ""
    return (
        f"use {span} of 256 grey levels{stored}, so that the model sees next to no contrast; stretch the values to the "
        "whole range of the files, for example 12-bit values in 16-bit files by a factor of 16, or pretrain with "
        "data.value_range=auto"
    )


def stored_bits(image: Image.Image, data: bytes | Image.Image) -> int:
    """Bits per value in the file, of which Pillow may give the upper 8 alone."""
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        return max(tags.get(BITS_PER_SAMPLE, (1,)))
    if image.format == "PNG" and isinstance(data, bytes):
        return data[24]  # of the header chunk, which comes first
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def lost_bands(image: Image.Image) -> str | None:
    """What of a decoded image does not reach the model."""
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        bands, read = tags.get(SAMPLES_PER_PIXEL, 1), len(image.getbands())
        if bands > read:
            return (
                f"{bands} bands, {bands - read} of them left out; save the bands to train on as RGB, or pretrain on "
                "all of them with model.in_chans and data.value_range"
            )
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            return f"{pages} pages, of which the first is read; save the others as files of their own"
    if has_transparency(image) and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        return (
            "a band that is taken for their opacity: they are put on white by it, and it is left out; if it means "
            "something else, save the bands to train on as RGB"
        )
    return None


@dataclass
class BandSample:
    """What a sample of a data set of any bands and depth showed so far."""

    size: str
    """Of the data set, for people."""
    bands: Bands
    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))
    """By description."""
    outside: int = 0
    values: int = 0
    """How many were looked at, and how many of them are clipped to the range."""
    sums: np.ndarray = field(default_factory=lambda: np.zeros((5, 0)))
    """Of each band, as the model sees it: number of pixels, sum, sum of squares, smallest and largest."""
    unreadable: list[str] = field(default_factory=list)

    @property
    def num(self) -> int:
        """Images so far, unreadable ones included."""
        return sum(kind.num for kind in self.kinds.values()) + len(self.unreadable)

    def add(self, stored: Stored, seen: np.ndarray) -> None:
        """Count the values of one image: as its file has them, and as the model sees them, in [0, 1]."""
        kind, known = self.kinds[stored.describe()], stored.measured
        kind.num += 1
        if known.size:
            kind.low, kind.high = min(kind.low, float(known.min())), max(kind.high, float(known.max()))
        if self.bands.value_range is not None:
            low, high = self.bands.value_range
            self.outside += int(((known < low) | (known > high)).sum())
        self.values += known.size
        flat = seen.reshape(len(seen), -1).astype(np.float64)
        sums = np.stack([np.full(len(flat), flat.shape[1]), flat.sum(1), (flat**2).sum(1), flat.min(1), flat.max(1)])
        if not self.sums.size:
            self.sums = sums
        else:
            low, high = np.minimum(self.sums[3], sums[3]), np.maximum(self.sums[4], sums[4])
            self.sums = np.concatenate([self.sums[:3] + sums[:3], [low, high]])

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each band, in [0, 1]."""
        mean = self.sums[1] / self.sums[0]
        return mean, np.sqrt(np.maximum(self.sums[2] / self.sums[0] - mean**2, 0))

    def lines(self) -> list[str]:
        """What was found, for people."""
        if not self.kinds:
            return []
        files = "; ".join(
            f"{kind.num} {text}, values {kind.low:g} to {kind.high:g}" for text, kind in self.kinds.items()
        )
        mean, deviation = self.mean_and_deviation()
        bands = "; ".join(
            f"band {i + 1} {self.sums[3, i]:.3f} to {self.sums[4, i]:.3f}, mean {mean[i]:.3f}, deviation {each:.3f}"
            for i, each in enumerate(deviation)
        )
        return [f"{self.num} of {self.size} looked at: {files}", f"as the model sees them, in 0 to 1: {bands}"]

    def warnings(self) -> list[str]:
        """What is not going to go well, with the number of images."""
        found = []
        if self.outside > 0.01 * self.values and self.bands.value_range is not None:
            low, high = self.bands.value_range
            found.append(
                f"{self.outside / self.values:.1%} of the values lie outside of data.value_range=[{low:g}, {high:g}] "
                "and are clipped; data.value_range=auto measures one"
            )
        if self.sums.size and (constant := np.flatnonzero(self.sums[3] == self.sums[4])).size:
            names = ", ".join(str(i + 1) for i in constant)
            found.append(f"the same value everywhere in band {names}: there is nothing to learn from it")
        if self.unreadable:
            found.append(f"{len(self.unreadable)} of {self.num} images cannot be read, first {self.unreadable[0]}")
        return found


MEASURED_IMAGES = 256
"""How many images `measure` looks at."""
MEASURED_PIXELS = 16_384
"""About so many pixels of each, evenly spaced."""
TAIL = 0.001
"""Fraction of the values below and above a range that is measured: single pixels are always defective."""


def measure(
    dataset: ImageDataset | ImageStream,
    num_bands: int,
    value_range: tuple[float, float] | str | None,
    seed: int,
) -> tuple[Normalisation, BandSample]:
    """Range, mean and deviation of a sample of a data set, for `data.value_range`, `data.mean` and `data.std`.

    Args:
        dataset: of a stream, the first images of a part that follows from the seed are looked at.
        num_bands: of the model.
        value_range: as the key; `auto` measures it: None if all images have 8 bits, else what all but `TAIL` lie in.
        seed: the sample follows from it.

    Raises: UserError if no image can be read, or all have one value.
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, "normalisation"))
    if isinstance(dataset, ImageStream):
        shard = int(torch.randint(dataset.num_shards, (), generator=rng))
        samples: Iterable[Sample] = itertools.islice(dataset.read_shard(shard), MEASURED_IMAGES)
    else:
        samples = (dataset[index] for index in sorted(_drawn(dataset, rng)))
    read: list[tuple[str, Stored]] = []
    unreadable: list[str] = []
    for sample in samples:
        try:
            read.append((sample.name, sample.stored(num_bands).thinned(MEASURED_PIXELS)))
        except BadImageError as error:
            unreadable.append(str(error))
    if isinstance(value_range, str):
        deep = [stored.measured for _, stored in read if stored.values.dtype not in (np.uint8, bool)]
        value_range = _range_of(deep) if deep else None
    found = BandSample(f"{len(read) + len(unreadable)} images", Bands(num_bands, value_range), unreadable=unreadable)
    for name, stored in read:
        try:
            with damage_named(name):
                seen = combined(stored, found.bands).numpy()
        except BadImageError as error:
            unreadable.append(str(error))
        else:
            found.add(stored, seen / 255 if seen.dtype == np.uint8 else seen)
    if not found.kinds:
        first = f", first {unreadable[0]}" if unreadable else ""
        raise UserError(f"data.mean=auto: none of {len(unreadable)} images could be measured{first}")
    mean, deviation = found.mean_and_deviation()
    deviation = np.where(deviation < 1e-6, 1.0, deviation)  # of a band that is the same everywhere
    digits = [tuple(float(f"{x:.4g}") for x in each) for each in (mean, deviation)]
    return Normalisation(value_range, *digits), found


def _drawn(dataset: ImageDataset, rng: torch.Generator) -> list[int]:
    """Images to measure: each once, or of data sets with weights as many as these say, of few images some again."""
    if not isinstance(dataset, Mixture) or dataset.counts is None:
        return torch.randperm(len(dataset), generator=rng)[:MEASURED_IMAGES].tolist()
    drawn = []
    for number, share in enumerate(share_out(MEASURED_IMAGES, dataset.counts)):
        images = torch.randint(len(dataset.parts[number]), (share,), generator=rng) + dataset.start_of(number)
        drawn += images.tolist()
    return drawn


def _range_of(values: list[np.ndarray]) -> tuple[float, float]:
    joined = np.concatenate([each.astype(np.float64) for each in values])
    finite = joined[np.isfinite(joined)]
    if not finite.size or finite.min() == finite.max():
        raise UserError("data.value_range=auto: the images have one value everywhere; give [lowest, highest]")
    low, high = np.quantile(finite, [TAIL, 1 - TAIL])
    if low == high:
        low, high = finite.min(), finite.max()
    if all(each.dtype.kind in "biu" for each in values):
        return float(np.floor(low)), float(np.ceil(high))
    return float(f"{low:.4g}"), float(f"{high:.4g}")


def sample_pixels(dataset: ImageDataset | ImageStream, bands: Bands = RGB8) -> PixelSample | BandSample:
    """Decode up to `NUM_IMAGES` images, spread over a data set, or the first ones of a stream.

    Neither the data set nor the order in which it is read changes. It takes no longer than `TIME_LIMIT_S`. What cannot
    be read is noted; to stop for it is up to who needs it.
    """
    if isinstance(dataset, ImageStream):
        size, samples = "the stream's first images", itertools.islice(dataset.read_shard(0), NUM_IMAGES)
    else:
        chosen = np.linspace(0, len(dataset) - 1, min(NUM_IMAGES, len(dataset))).round().astype(int).tolist()
        size, samples = f"{len(dataset):,} images", (dataset[index] for index in chosen)
    found = PixelSample(size) if bands.are_rgb8 else BandSample(size, bands)
    read, stop = queue.SimpleQueue(), threading.Event()
    look = Sample.stored_and_seen if bands.are_rgb8 else functools.partial(_stored_and_scaled, bands=bands)
    # A thread, since a read that never returns cannot be interrupted.
    threading.Thread(target=_read_all, args=(samples, look, read, stop), daemon=True).start()
    deadline = time.monotonic() + TIME_LIMIT_S
    try:
        while (each := read.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if isinstance(each, BadImageError | UserError):
                found.unreadable.append(str(each))
            else:
                found.add(*each)
    except queue.Empty:
        logger.warning("the images are read slowly: %d in %.0f s, not %d", found.num, TIME_LIMIT_S, NUM_IMAGES)
    stop.set()
    return found


def _stored_and_scaled(sample: Sample, bands: Bands) -> tuple[Stored, np.ndarray]:
    stored = sample.stored(bands.num).thinned(MAX_PIXELS // bands.num)
    with damage_named(sample.name):
        seen = combined(stored, bands).numpy()
    return stored, seen / 255 if seen.dtype == np.uint8 else seen


def _read_all(
    samples: Iterable[Sample], look: Callable[[Sample], Any], read: "queue.SimpleQueue[Any]", stop: threading.Event
) -> None:
    try:
        for sample in samples:
            if stop.is_set():
                return
            try:
                read.put(look(sample))
            except (BadImageError, UserError) as error:
                read.put(error)
    except UserError as error:
        read.put(error)
    finally:
        read.put(None)


def log_pixels(
    dataset: ImageDataset | ImageStream, key: str, bands: Bands = RGB8, *, only_warnings: bool = False
) -> None:
    """Log what a sample of the data set of a configuration key looks like, and warn of what is lost."""
    found = sample_pixels(dataset, bands)
    for line in () if only_warnings else found.lines():
        logger.info("%s: %s", key, line)
    for line in found.warnings():
        logger.warning("%s: %s", key, line)
