"""Images for training: how they are cropped and masked, and in which order training sees them.

`sources.make_mixture` turns data URLs into samples, `PretrainLoader` turns samples into masked batches,
`DevicePrefetcher` brings these to the device. Every crop, flip and mask is a function of (seed, position in the data),
and the position is all that a checkpoint has to keep: a resumed run sees what the uninterrupted one would have seen.
"""

import atexit
import copy
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from config import ImagesConfig
from distributed import gather_objects, ranks_of_this_machine
from reading.crops import CROP_RATIO, Crop, View, cut, draw_crop, largest_area, turned
from reading.sources import (
    MIXTURE_BLOCK,
    BadImageError,
    ImageDataset,
    ImageStream,
    Mixture,
    Sample,
    cache_root,
    make_mixture,
    silent_decoders,
)
from utils import RGB8, UPRIGHT, Bands, Normalisation, Turns, UserError, derive_seed, largest_divisor

if TYPE_CHECKING:  # else imported by data.decode=gpu alone
    from speed.device_decode import EncodedCrop, EncodedCrops

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = Normalisation.mean, Normalisation.std
MAX_REPLACEMENTS = 20
MAX_BAD_IN_A_ROW = 200
MAX_EMPTY_EPOCHS = 10
BAD_ODDS = (1.05, 1.2, 1.5, 2.0, 4.0, 16.0, 256.0)
"""How many times higher than allowed the odds of an unreadable image may be: alternatives that are tested together."""
BAD_DOUBT = 1e-6
"""Probability that a rank ever stops a run in which the fraction of unreadable images is as large as allowed."""
BATCH_TIMEOUT_S = 600.0
"""After so long without any batch, reading is given up. A stream over a slow network may need minutes for its first."""
CLOSE_TIMEOUT_S = 5.0
"""After so long, workers that are asked to end are killed: one may hang in a read."""
MAX_WAIT_FRACTION = 0.1
"""Of the time between two log lines; beyond it, training is told to use more workers."""


@functools.cache
def _statistics(statistics: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: copying them to a GPU in every step would make the host wait for it each time.
    return torch.tensor(statistics, device=device).view(-1, 1, 1)


def normalize(
    images: Shaped[Tensor, "b c h w"],
    dtype: torch.dtype = torch.float32,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "b c h w"]:
    """Pixels in [0, 1] minus the mean of their channel, divided by its standard deviation; computed in float32.

    Pixels of 8 bits are divided by 255 first; floats are in [0, 1] already.
    """
    mean_of, std_of = _statistics(mean, images.device), _statistics(std, images.device)
    # Batches have the channels innermost, as decoders and resizing do; the model gets them outermost.
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    if images.is_floating_point():
        return pixels.sub(mean_of).div_(std_of).to(dtype)
    return pixels.div_(255).sub_(mean_of).div_(std_of).to(dtype)


def normalizer(normalisation: Normalisation) -> Callable[[Tensor], Tensor]:
    """`normalize` with the statistics of a training."""
    return functools.partial(normalize, mean=normalisation.mean, std=normalisation.std)


# ------------------------------------------------------------------------------------- samples to batches


@dataclass(frozen=True)
class Batch:
    """Masked images of one forward pass on one rank."""

    images: Shaped[Tensor, "b c h w"]
    """uint8; of a range that `Bands` says, float32 in [0, 1]."""
    masks: dict[str, Tensor]
    """What the masks of these images say, by the names that the method gives it."""
    sample_ids: Int64[Tensor, " b"]
    """Index in the dataset; of a stream, the running number within that stream."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of the unreadable images that were met on the way."""
    stream_state: dict[str, int] | None = None
    """Streaming: where the stream of this batch stands after it."""
    position: dict[str, Any] | None = None
    """What `PretrainLoader.state_dict` was when this batch was handed out."""
    encoded: "EncodedCrops | None" = None
    """With data.decode=gpu, until `PretrainLoader` hands the batch out: the images that `images` lacks."""
    make_s: float = 0.0
    """Seconds that one process took to read, decode and crop it."""
    host_masks: dict[str, Tensor] = field(default_factory=dict)
    """`masks` on the CPU, once `to` was called: what depends on them need not wait for the device."""
    second_images: Shaped[Tensor, "b c h2 w2"] | None = None
    """With a second view, the same crops in its size."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    """What is known of these images, by the names that the task gives it."""
    host_labels: dict[str, Tensor] = field(default_factory=dict)
    """`labels` on the CPU, once `to` was called."""

    def tensors(self) -> list[Tensor]:
        """The tensors that travel to the device."""
        second = [] if self.second_images is None else [self.second_images]
        return [self.images, *second, *self.masks.values(), *self.labels.values(), self.sample_ids]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch with its tensors on `device`."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, host_masks=self.host_masks or self.masks, host_labels=self.host_labels or self.labels)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            images=change(self.images),
            masks={name: change(mask) for name, mask in self.masks.items()},
            sample_ids=change(self.sample_ids),
            second_images=None if self.second_images is None else change(self.second_images),
            labels={name: change(label) for name, label in self.labels.items()},
        )


Masks = Callable[[list[tuple[int, ...]]], dict[str, Tensor]]
"""Draws the masks of a batch: one key for each of its images, from which, and a seed, all randomness follows."""

ChangeColours = Callable[..., Tensor]
"""From a crop, and the seed and key that all randomness follows from, to the crop that is trained on."""

CropViews = Tensor | tuple[Tensor, Tensor]
"""A crop, or with a second view the crop and that."""


class Maker(Protocol):
    """Turns samples into what a batch is made of, each a function of (seed, key of the sample) alone, and into batches.

    Workers call it, so it has to be picklable.
    """

    seed: int

    def make(self, sample: Sample, *key: int) -> Any:
        """What `batch` takes of one sample. Raises: BadImageError if it cannot be read, so that another replaces it."""
        ...

    def batch(
        self, crops: Sequence[Any], keys: list[tuple[int, ...]], sample_ids: list[int], bad: list[tuple[str, str]]
    ) -> Batch:
        """A batch of them; the last two are its fields of these names."""
        ...

    def batch_bytes(self, batch_size: int) -> int:
        """About the size of a batch in shared memory."""
        ...


class SampleMaker:
    """Turns samples into crops, each a function of (seed, key of the sample) alone, and these into masked batches."""

    def __init__(
        self,
        *,
        seed: int,
        crop_size: tuple[int, int],
        crop_scale: tuple[float, float],
        do_hflip: bool,
        turns: Turns = UPRIGHT,
        masks: Masks,
        encoded: bool = False,
        interpolation: str = "bicubic",
        change_colours: ChangeColours | None = None,
        second_view: View | None = None,
        bands: Bands = RGB8,
    ) -> None:
        own = interpolation != "bicubic" or change_colours is not None or second_view is not None
        assert not encoded or not own, "the GPU does nothing of this"
        assert change_colours is None or second_view is None, "colours would differ"
        self.seed = seed
        self.crop_size = crop_size
        self.aspect = crop_size[1] / crop_size[0]
        self.crop_scale = crop_scale
        self.do_hflip, self.turns = do_hflip, turns
        self.masks = masks
        self.encoded = encoded
        self.interpolation = interpolation
        self.change_colours = change_colours
        self.second_view = second_view
        self.bands = bands

    def reduction(self, width: int, height: int) -> int:
        """The largest divisor of a JPEG's size after which no possible crop has to be enlarged."""
        area = self.crop_scale[0] * largest_area(width, height, self.aspect) * CROP_RATIO[0]
        lowest, narrowest = min(math.sqrt(area / self.aspect), height), min(math.sqrt(area * self.aspect), width)
        views = [self.crop_size, *([] if self.second_view is None else [self.second_view.size])]
        height_needed, width_needed = (max(lengths) for lengths in zip(*views, strict=True))
        fits = (d for d in (8, 4, 2) if lowest / d >= height_needed and narrowest / d >= width_needed)
        return next(fits, 1)

    def make(self, sample: Sample, *key: int) -> "CropViews | EncodedCrop":
        """What `batch` takes: a crop, or with data.decode=gpu the file that it is to be cut from.

        Raises: BadImageError if the file cannot be read, as far as that is known without decoding it.
        """
        if not self.encoded:
            return self.crop(sample, *key)
        from speed.device_decode import crop_or_file

        return crop_or_file(sample, lambda w, h: self._draw(w, h, key), self.reduction, self.crop_size)

    def crop(self, sample: Sample, *key: int) -> CropViews:
        """A random crop, flipped half of the times, with the channels innermost in memory; and its second view.

        Raises: BadImageError if the file cannot be read.
        """
        pixels = sample.pixels(self.reduction, self.bands)
        box = self._draw(pixels.shape[2], pixels.shape[1], key)
        crop = cut(pixels, box, self.crop_size, self.interpolation)
        if self.second_view is not None:
            return crop, cut(pixels, box, self.second_view.size, self.second_view.interpolation)
        return crop if self.change_colours is None else self.change_colours(crop, self.seed, *key)

    def _draw(self, width: int, height: int, key: tuple[int, ...]) -> Crop:
        crop = draw_crop(width, height, self.crop_scale, self.do_hflip, self.seed, *key, aspect=self.aspect)
        return turned(crop, self.turns, self.seed, *key)

    def batch_bytes(self, batch_size: int) -> int:
        """See `Maker`."""
        masks = sum(mask.nbytes for mask in self.masks([(row,) for row in range(batch_size)]).values())
        views = [self.crop_size, *([] if self.second_view is None else [self.second_view.size])]
        pixels = sum(map(math.prod, views))
        values = self.bands.num * (1 if self.bands.value_range is None else 4)
        return batch_size * (values * pixels + 8) + masks

    def batch(
        self,
        crops: Sequence[Any],
        keys: list[tuple[int, ...]],
        sample_ids: list[int],
        bad: list[tuple[str, str]],
    ) -> Batch:
        """Stack crops, which `make` made, and draw their masks."""
        encoded, second = None, ()
        if self.second_view is not None:
            crops, second = zip(*crops, strict=True)
        if self.encoded:
            from speed.device_decode import EncodedCrops

            encoded = EncodedCrops.pack(crops)
        # Masks before images: the other way around, malloc takes the memory of most batches anew, page by page.
        masks = self.masks(keys)
        return Batch(
            images=_stack([crop for crop in crops if isinstance(crop, Tensor)], self.crop_size),
            masks=masks,
            sample_ids=torch.tensor(sample_ids),
            bad=bad,
            encoded=encoded,
            second_images=None if self.second_view is None else _stack(second, self.second_view.size),
        )


class _FirstImages:
    """Makes batches of a maker, but of each only the first images, since the others would be decoded for nothing."""

    def __init__(self, maker: Maker, num_images: int) -> None:
        self.maker, self.seed, self.num_images = maker, maker.seed, num_images
        self._num_made = 0

    def make(self, sample: Sample, *key: int) -> Any:
        """See `Maker`."""
        if self._num_made >= self.num_images:
            return None
        made = self.maker.make(sample, *key)
        self._num_made += 1
        return made

    def batch(
        self, crops: Sequence[Any], keys: list[tuple[int, ...]], sample_ids: list[int], bad: list[tuple[str, str]]
    ) -> Batch:
        """See `Maker`."""
        return self.maker.batch(crops[: self.num_images], keys, sample_ids, bad)

    def batch_bytes(self, batch_size: int) -> int:
        """See `Maker`."""
        return self.maker.batch_bytes(batch_size)


def check_decode(decode: str, device: torch.device) -> None:
    """Check that `device` can do what data.decode asks of it.

    Raises: UserError if it cannot.
    """
    if decode == "gpu":
        from speed.device_decode import check_device

        check_device(device)


def _stack(crops: Sequence[Tensor], size: tuple[int, int]) -> Shaped[Tensor, "b c h w"]:
    """Crops with the channels innermost, in a batch of the same layout: whole images are copied, not single pixels."""
    if not crops:
        return torch.empty(0, 3, *size, dtype=torch.uint8)
    return torch.stack([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global random numbers and put them back afterwards; torch.manual_seed would touch the GPU's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class MapBatches(Dataset[Any]):
    """Batches of an `ImageDataset`; an item is asked for by its (global position, index in the dataset) pairs."""

    def __init__(self, dataset: ImageDataset, maker: Maker) -> None:
        self.dataset = dataset
        self.maker = maker

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Batch | UserError:
        crops, sample_ids, bad = [], [], []
        start = time.perf_counter()
        try:
            with silent_decoders():
                for position, index in pairs:
                    crop, used = self._readable(position, index, bad)
                    crops.append(crop)
                    sample_ids.append(used)
        except UserError as error:
            return error  # see `wait_for_batch`
        batch = self.maker.batch(crops, [(position,) for position, _ in pairs], sample_ids, bad)
        return replace(batch, make_s=time.perf_counter() - start)

    def _readable(self, position: int, index: int, bad: list[tuple[str, str]]) -> "tuple[CropViews | EncodedCrop, int]":
        """The crop for `position`: of image `index`, or of the first readable one of those that replace it."""
        tried: list[str] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            if attempt > 0:
                number = derive_seed(self.maker.seed, "replacement", position, attempt)
                index = self.dataset.replacement(index, number)
            try:
                return self.maker.make(self.dataset[index], position), index
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


class MixtureOrder(EpochOrder):
    """The same of data sets with weights: each goes through epochs of its own, in an order of its own.

    Of each `MIXTURE_BLOCK` positions from 0 on, every data set has exactly its share, at places drawn for that block.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        assert mixture.counts is not None
        super().__init__(len(mixture), seed)
        self.counts = mixture.counts
        self.starts = [mixture.start_of(part) for part in range(len(mixture.parts))]
        self.orders = [
            EpochOrder(len(part), derive_seed(seed, "mixture", number)) for number, part in enumerate(mixture.parts)
        ]
        self._block = functools.lru_cache(maxsize=2)(self._draw_block)

    def _draw_block(self, block: int) -> tuple[Int64[Tensor, " positions"], Int64[Tensor, " positions"]]:
        """Of each position of a block, its data set, and how many before it are of the same."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "mixture block", block))
        parts = torch.repeat_interleave(torch.tensor(self.counts))
        numbers = torch.cat([torch.arange(count) for count in self.counts])
        parts = parts[torch.randperm(len(parts), generator=generator)]
        before = torch.empty_like(parts)
        before[parts.argsort(stable=True)] = numbers
        return parts, before

    def image_at(self, position: int) -> int:
        """Index in the mixture of the image at `position`."""
        block, offset = divmod(position, sum(self.counts))
        parts, before = self._block(block)
        part = int(parts[offset])
        return self.starts[part] + self.orders[part].image_at(block * self.counts[part] + int(before[offset]))


def order_of(dataset: ImageDataset, seed: int) -> EpochOrder:
    """The order in which training sees the images of a data set."""
    if isinstance(dataset, Mixture) and dataset.counts is not None:
        return MixtureOrder(dataset, seed)
    return EpochOrder(len(dataset), seed)


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
        maker: Maker,
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

    def __iter__(self) -> Iterator[Batch | UserError]:
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
            yield error  # see `wait_for_batch`

    def _batch(self, part: StreamPart) -> Batch:
        crops, numbers, bad, bad_in_a_row = [], [], [], 0
        start = time.perf_counter()
        with silent_decoders():
            while len(crops) < self.batch_size:
                number, sample = next(part)
                try:
                    crops.append(self.maker.make(sample, part.part, number))
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
        return replace(batch, stream_state=part.state(), make_s=time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ workers

PREFETCH = 2
"""Batches per worker that are made ahead, as `DataLoader` does."""


def wait_for_batch(batches: Iterator[Any], key: str, num_workers: int) -> Any:
    """The next batch of a `DataLoader` whose `timeout` is `worker_poll_s`; None at the end.

    A worker that meets a mistake of the user gives the UserError in place of a batch: raised there, it would arrive
    with the worker's traceback in its message.

    Args:
        batches: an iterator over it.
        key: configuration key of the number of workers.
        num_workers: its value.

    Raises: UserError of a worker, or if one was killed, or none has given a batch for `BATCH_TIMEOUT_S`.
    """
    deadline = time.monotonic() + BATCH_TIMEOUT_S
    with dead_workers_explained(key):
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if time.monotonic() > deadline:
                    break
            except (ConnectionError, EOFError) as error:
                if num_workers == 0 or " in DataLoader worker process" in str(error):
                    raise
                raise _killed(key) from error  # in the middle of handing a batch over
            else:
                if isinstance(batch, UserError):
                    raise batch
                return batch
    raise UserError(
        f"{key}={num_workers}: no batch came for {BATCH_TIMEOUT_S:.0f} s; does the disk or network with the images "
        f"answer, and has {SHARED_MEMORY} free space ({shared_memory_free() / 2**20:.0f} MiB)?"
    )


def read_batches(loader: DataLoader[Any], key: str) -> Iterator[Any]:
    """The batches of a `DataLoader` whose `timeout` is `worker_poll_s`; the workers end with the iterator.

    Args:
        loader: gives anything but None.
        key: configuration key of the number of workers.

    Raises: UserError as `wait_for_batch`.
    """
    batches = iter(loader)
    try:
        while (batch := wait_for_batch(batches, key, loader.num_workers)) is not None:
            yield batch
    finally:
        end_workers(batches)


def worker_poll_s(num_workers: int) -> float:
    """`DataLoader(timeout=)` with which it looks for dead workers while it waits."""
    return 1.0 if num_workers else 0.0


@contextmanager
def dead_workers_explained(key: str) -> Iterator[None]:
    """Explain the death of a worker of a `DataLoader`; one that was forked shows it anywhere in the main thread.

    Raises: UserError naming `key`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DEAD_WORKER):
            raise
        raise _killed(key) from error


def worker_processes(batches: Iterator[Any]) -> list[BaseProcess]:
    """The processes that read for an iterator over a `DataLoader`; none if this one does."""
    return list(getattr(batches, "_workers", []))  # torch has no public name for them


def end_workers(batches: Iterator[Any]) -> None:
    """Stop the workers of an iterator over a `DataLoader` now, rather than when the garbage collector comes by."""
    workers = worker_processes(batches)
    if not workers:
        return
    # Ours ignore SIGTERM, so one that hangs in a read would outlive us, and each would be waited for.
    killer = threading.Timer(CLOSE_TIMEOUT_S, lambda: [worker.kill() for worker in workers])
    killer.start()
    try:
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError as error:  # the death of one that was forked shows anywhere, but here it is of no matter
        if not str(error).startswith(DEAD_WORKER):
            raise
    finally:
        killer.cancel()
        for worker in workers:
            if worker.is_alive():
                worker.kill()


DEAD_WORKER = "DataLoader worker (pid"
"""How torch begins to say that a worker of a `DataLoader` is dead."""


def _killed(key: str) -> UserError:
    return UserError(
        f"{key}: a process that reads images was killed, most likely because memory ran out; use fewer of them, or "
        "give more memory to this machine, container or job (launcher.mem)"
    )


SHARED_MEMORY = Path("/dev/shm")  # where batches travel from workers, not a temporary file


def shared_memory_free() -> float:
    """Bytes that are free in `SHARED_MEMORY`; infinity where there is none, as on macOS."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return math.inf


def workers_that_fit(batch_bytes: int) -> int:
    """Workers per rank whose batches fit into the free shared memory, beside one in use and one on its way."""
    free = shared_memory_free() / ranks_of_this_machine()
    return sys.maxsize if free == math.inf else max(0, int(free / max(1, batch_bytes) - 2) // PREFETCH)


def check_shared_memory(key: str, num_workers: int, batch_bytes: int, batch_key: str) -> None:
    """Check that the batches that workers make ahead fit: without space, one would be waited for in vain.

    Args:
        key: configuration key of the number of workers.
        num_workers: its value.
        batch_bytes: size of a batch.
        batch_key: configuration key of the number of images in it.

    Raises: UserError if they do not.
    """
    fit, ranks, mib = workers_that_fit(batch_bytes), ranks_of_this_machine(), 2**20
    if num_workers > fit:
        needed = ranks * batch_bytes * (PREFETCH * num_workers + 2)
        raise UserError(
            f"{key}={num_workers}: {SHARED_MEMORY} has {shared_memory_free() / mib:.0f} MiB free; {ranks} rank(s) of "
            f"this machine need {needed / mib:.0f}, as each worker makes {PREFETCH} batches of "
            f"{batch_bytes / mib:.1f} MiB ahead. Use {key}={fit}, or a smaller {batch_key}, or give a container more "
            f"(docker run --shm-size={-(-needed // 2**30)}g)"
        )


# ------------------------------------------------------------------------------------------------- loader


MOST_WORKERS = 20
"""Of a rank, where efficiency.dataloader_num_workers leaves it open."""


class PretrainLoader:
    """An endless iterator over the `Batch`es of one rank that can continue where another one stopped.

    Map-style data: the global position counts the images that all ranks together have been given; epochs follow each
    other without a gap, and a batch may span two. The order depends neither on the ranks nor on the workers. Several
    data sets without weights are one; with weights, see `MixtureOrder`.
    Streaming data: see `StreamPart`; the order depends on the number of ranks and of `data.stream_partitions`.
    Continued with another number of shards, all parts begin a new epoch, and a warning says so.

    Args:
        images: the data, and how images are cropped.
        masks: draws the masks of a batch; workers call it, so it has to be picklable. None with a `maker`.
        seed: of order and crops.
        batch_size: images per batch of one rank.
        num_workers: processes that read; None for as many as the rank has cores, up to `MOST_WORKERS`.
        keep_listing: whether the list of files of an image folder is kept on disk for later starts.
        interpolation: how crops are resized, bicubic or bilinear; with data.decode=gpu bicubic.
        change_colours: what is done to crops, such as `crops.Colours`; nothing with data.decode=gpu.
        second_view: a further size of the same crops, `Batch.second_images`; not with data.decode=gpu.
        maker: makes batches in another way than by crops and masks; the keys of `images` that say how do not count.
        dataset: what `make_dataset` gave; by default that of data.dataset.
        rank: this process.
        world_size: number of processes.
        position: `state_dict()` of the run to continue; `merge_positions` of those of all ranks.
        pin_memory: hand out batches in page-locked memory.
        decode_device: where images are decoded if data.decode is gpu; those of a batch are on it then.
        bad_files_path: JSON lines file that unreadable images are added to, each once.
        start_method: of the workers. forkserver and spawn need a script with `if __name__ == "__main__"`.

    Raises: UserError if the data or the position do not fit the configuration.
    """

    def __init__(
        self,
        images: ImagesConfig,
        masks: Masks | None,
        *,
        seed: int,
        batch_size: int,
        num_workers: int | None = None,
        keep_listing: bool = False,
        interpolation: str = "bicubic",
        change_colours: ChangeColours | None = None,
        second_view: View | None = None,
        maker: Maker | None = None,
        dataset: ImageDataset | ImageStream | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: dict[str, Any] | None = None,
        pin_memory: bool = False,
        decode_device: torch.device | None = None,
        bad_files_path: Path | None = None,
        start_method: str = "forkserver",
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if maker is None:
            assert masks is not None
            maker = SampleMaker(
                seed=seed,
                crop_size=images.crop_size,
                crop_scale=images.crop_scale,
                do_hflip=images.do_hflip,
                turns=images.turns,
                masks=masks,
                encoded=images.decode == "gpu",
                interpolation=interpolation,
                change_colours=change_colours,
                second_view=second_view,
                bands=images.bands,
            )
        self.maker = maker
        if dataset is None:
            listings = cache_root() / "image_listings" if keep_listing else None
            dataset = make_mixture(images.dataset, key="data.dataset", listing_cache=listings)
        assert isinstance(dataset, ImageDataset | ImageStream)
        self.images = images
        self.seed = seed
        self.batch_size = batch_size
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.decode_device = decode_device or torch.device("cpu")
        self.start_method = start_method
        self._wanted_workers = num_workers
        self.num_workers = min(MOST_WORKERS, cores_of_this_rank()) if num_workers is None else num_workers
        self.bad_files = BadFiles(bad_files_path, images.max_bad_fraction)
        self._batches: Iterator[Any] | None = None
        self._restore(position or {})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._make_loader())
            if self.num_workers:  # at exit, before multiprocessing's own clean-up, which would wait for them
                atexit.register(self.close)
        batch = wait_for_batch(self._batches, "efficiency.dataloader_num_workers", self.num_workers)
        if batch.encoded is not None:
            images, damaged = batch.encoded.decode(batch.images, self.decode_device)
            batch = replace(batch, images=images, encoded=None, bad=batch.bad + damaged)
        self.bad_files.count(len(batch.sample_ids), batch.bad)
        self._advance(batch)
        return replace(batch, position=self.state_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> list[BaseProcess]:
        """The processes that read, from the first batch on."""
        return [] if self._batches is None else worker_processes(self._batches)

    def close(self) -> None:
        """Stop the workers. Iterating on starts them again, after the last batch that was handed out."""
        atexit.unregister(self.close)
        batches, self._batches = self._batches, None
        if batches is not None:
            end_workers(batches)

    def check_shared_memory(self) -> None:
        """Check that the batches of all workers fit into the shared memory of this machine.

        Raises: UserError if they do not.
        """
        check_shared_memory(
            "efficiency.dataloader_num_workers",
            self.num_workers,
            self.maker.batch_bytes(self.batch_size),
            "optim.batch_size_per_gpu",
        )

    def peek(self, num_images: int) -> Batch:
        """The next batch without taking it, made in this process: all of its masks, and no more than its first images.

        The others are not decoded, and taken for readable.

        Raises: UserError if images cannot be read.
        """
        alone = copy.copy(self)
        alone.num_workers, alone.pin_memory, alone.maker = 0, False, _FirstImages(self.maker, num_images)
        batch = next(iter(alone._make_loader()))
        if isinstance(batch, UserError):
            raise batch
        if batch.encoded is not None:
            images, _ = batch.encoded.decode(batch.images, self.decode_device)
            batch = replace(batch, images=images, encoded=None)
        return batch

    def describe(self) -> str:
        """What is read and how, for people."""
        if isinstance(self.dataset, ImageStream):
            what = f"stream of {self.dataset.num_shards:,} shards, {len(self._parts)} parts per rank"
        else:
            what = f"{len(self.dataset):,} images"
        if isinstance(self.dataset, Mixture):
            name = f"{len(self.dataset.parts)} data sets" + (" with weights" if self.dataset.counts else "")
        else:
            name = str(self.images.dataset)
        return f"{name}: {what}, {self.num_workers} workers per rank"

    def shares(self) -> list[str]:
        """Of several data sets, the share of each, for people."""
        return self.dataset.shares() if isinstance(self.dataset, Mixture) else []

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; can be written as JSON. Of a stream: of this rank."""
        counts = {"seen": self.bad_files.seen, "bad": self.bad_files.bad}
        if isinstance(self.dataset, ImageDataset):
            position = {"kind": "map", "num_images": len(self.dataset), "samples": self._samples, **counts}
            return position | self._mixed()
        return {
            "kind": "stream",
            "num_shards": self.dataset.num_shards,
            "num_parts": self.world_size * len(self._parts),
            "world_size": self.world_size,
            "next_batch": self._next_batch,
            "parts": {str(part): self._part_states.get(part) for part in self._parts},
            **counts,
        }

    def _mixed(self) -> dict[str, Any]:
        """Of several data sets, what their order follows from beside the seed."""
        if not isinstance(self.dataset, Mixture):
            return {}
        return {"mixture": {"images": list(map(len, self.dataset.parts)), "counts": self.dataset.counts}}

    def _restore(self, position: dict[str, Any]) -> None:
        kind = "map" if isinstance(self.dataset, ImageDataset) else "stream"
        if position and position["kind"] != kind:
            raise UserError(
                f"data.dataset={self.images.dataset}: the run to continue read a {position['kind']} dataset, this is "
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
            elif position and position.get("mixture") != self._mixed().get("mixture"):
                logger.warning(
                    "data.dataset is another mixture than when the checkpoint was made (sizes and images of each in "
                    "%d): %s, it was %s; the order of the images is another one from here on",
                    MIXTURE_BLOCK, self._mixed().get("mixture"), position.get("mixture"),
                )  # fmt: skip
            return
        self._restore_stream(self.dataset, position)

    def _share_of(self, total: int) -> int:
        """This rank's part of a count, so that the parts of all ranks add up to it."""
        return total * (self.rank + 1) // self.world_size - total * self.rank // self.world_size

    def _restore_stream(self, stream: ImageStream, position: dict[str, Any]) -> None:
        # Not by the number of cores, on which the order of the images would depend then.
        workers = MOST_WORKERS if self._wanted_workers is None else self._wanted_workers
        wanted = self.images.stream_partitions or max(1, workers)
        num_parts = position.get("num_parts", wanted * self.world_size)
        if num_parts % self.world_size:
            raise UserError(
                f"the run to continue divides its stream into {num_parts} parts, which cannot be dealt out to "
                f"{self.world_size} ranks; use a number of ranks that divides {num_parts}"
            )
        partitions = num_parts // self.world_size
        if self.images.stream_partitions not in {None, partitions}:
            logger.warning("data.stream_partitions is %d, as in the run that is continued", partitions)
        self._parts = list(range(self.rank * partitions, (self.rank + 1) * partitions))
        self._num_parts = num_parts
        states = position.get("parts", dict.fromkeys(map(str, self._parts)))
        assert states.keys() >= set(map(str, self._parts)), "the position is that of other ranks; use merge_positions"
        before = position.get("num_shards", stream.num_shards)  # not in a position of earlier versions
        if before != stream.num_shards:
            logger.warning(
                "data.dataset has %d shards, it had %d shards when the checkpoint was made: all parts of the stream "
                "begin a new epoch of all of them here", stream.num_shards, before,
            )  # fmt: skip
            states = _in_a_new_epoch(states)
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
            self._samples += self.world_size * self.batch_size
            return
        assert batch.stream_state is not None
        part = self._parts[self._next_batch % len(self._parts)]
        self._part_states = {**self._part_states, part: batch.stream_state}
        self._next_batch += 1

    def _make_loader(self) -> DataLoader[Any]:
        if isinstance(self.dataset, ImageDataset):
            order = order_of(self.dataset, self.seed)
            batches: Dataset[Any] = MapBatches(self.dataset, self.maker)
            sampler = order.batches(self._samples, self.rank, self.world_size, self.batch_size)
        else:
            sampler = None
            batches = StreamBatches(
                self.dataset,
                self.maker,
                batch_size=self.batch_size,
                block_size=self.images.stream_shuffle_block,
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
                brought = {"torchvision", "timm.data"} & sys.modules.keys()  # by a data set, by augmentations
                context.set_forkserver_preload(["torch", "numpy", "PIL.Image", *brought])
                _start_fork_server()
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_identity,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            timeout=worker_poll_s(self.num_workers),
            generator=torch.Generator(),  # else it would draw from the global random numbers
        )


def _in_a_new_epoch(states: dict[str, dict[str, int] | None]) -> dict[str, dict[str, int] | None]:
    """The states of `StreamPart`s at the start of the first epoch that none of them has begun; shards are dealt anew.

    It is the same one for all, else two parts could have the same shard. Samples are numbered on.
    """
    begun = [state for state in states.values() if state is not None]
    if not begun:
        return states
    start = {"epoch": max(state["epoch"] for state in begun) + 1, "shard": 0, "row": 0, "block": 0, "offset": 0}
    return {part: {**start, "samples": state["samples"] if state else 0} for part, state in states.items()}


def is_above(limit: float, bad: int, seen: int) -> bool:
    """Whether more than a fraction `limit` of all images is bad beyond doubt; it may be asked after every batch.

    Let one image be bad with probability p <= limit. For odds o times those of `limit`, the likelihood ratio
    o^bad / (1 + (o - 1) limit)^seen is then a non-negative supermartingale that begins at 1. By Ville's inequality it
    ever reaches 1/a with probability a at most, over a run of any length; `BAD_DOUBT` is dealt out to all odds.
    """
    if limit == 0:
        return bad > 0
    evidence = max(bad * math.log(odds) - seen * math.log1p((odds - 1) * limit) for odds in BAD_ODDS)
    return evidence >= math.log(len(BAD_ODDS) / BAD_DOUBT)


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
        if is_above(self.max_fraction, self.bad, self.seen):
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


def _identity(batch: Any) -> Any:
    return batch


SIGNALS_OF_LAUNCHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Launchers send them to every process of a job. The trainer decides what they mean, and needs batches meanwhile."""


def _start_fork_server() -> None:
    """Start the processes that workers come from and depend on, with the signals of launchers blocked for good.

    Either would end at a signal, and with the fork server its workers. What a process blocks, those that it starts do.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_LAUNCHERS)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it is done; it ignores them itself
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_LAUNCHERS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    for number in SIGNALS_OF_LAUNCHERS:
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

    With data.decode=gpu that stream also decodes and crops, and the host waits for it. It goes first where both streams
    have work, so that the host is soon back to queue the next step, and is not kept waiting for the whole of this one.

    `wait_s` adds up the seconds for which the consumer waited for data, `make_s` those that making it took, and
    `images` counts them.
    """

    def __init__(self, loader: PretrainLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.wait_s = 0.0
        self.make_s = 0.0
        self.images = 0
        self._copy_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
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
            for tensor in batch.tensors():
                tensor.record_stream(current)  # else its memory could be reused while this step still reads it
            self._copied = self._copy_next(self._copy_stream)
        self._position = batch.position
        self.images += len(batch.images)
        self.make_s += batch.make_s
        self.wait_s += time.perf_counter() - start
        return batch

    def _copy_next(self, stream: torch.cuda.Stream) -> Batch:
        with torch.cuda.stream(stream):
            return next(self.loader).to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The loader's position after the last batch that was handed out here, whatever was read ahead."""
        return self._position or self.loader.state_dict()


def cores_of_this_rank() -> int:
    """Processor cores that this process may use, divided by the ranks that share them. Every rank has to call it."""
    # Slurm binds each rank to cores of its own, torchrun lets the ranks of a machine share all of them.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    mine = (socket.gethostname(), cores)
    return max(1, len(cores) // gather_objects(mine).count(mine))


class WorkerAdvice:
    """Says how many workers would be enough when training waits for data.

    Args:
        batches: what training takes its batches from.
        cores: of this rank; see `cores_of_this_rank`.
        clock: seconds, for tests.
    """

    def __init__(
        self, batches: DevicePrefetcher, cores: int, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.batches = batches
        self.cores = cores
        self._clock = clock
        self._before = (clock(), 0.0, 0.0)
        self._first = True
        self._said = 0

    def read(self) -> str | None:
        """One line about the time since the last reading, or None: no need, nothing new, or the first reading.

        The first one is left out because workers start and kernels are compiled in it.
        """
        now = (self._clock(), self.batches.wait_s, self.batches.make_s)
        elapsed, waited, made = (new - old for new, old in zip(now, self._before, strict=True))
        first, self._before, self._first = self._first, now, False
        if first or waited <= MAX_WAIT_FRACTION * elapsed:
            return None
        enough = workers_needed(elapsed, waited, made)
        if self._said and 2 / 3 < enough / self._said < 3 / 2:
            return None
        self._said = enough
        return self._line(enough, waited / elapsed)

    def _line(self, enough: int, fraction: float) -> str:
        loader, most = self.batches.loader, max(1, self.cores - 1)  # the training loop needs one
        partitions = loader.images.stream_partitions if isinstance(loader.dataset, ImageStream) else None
        if enough > most:
            gpu = self.batches.device.type == "cuda" and loader.images.decode == "cpu"
            advice = (
                f"{enough} would be enough, but this rank has {self.cores} core(s), one of them for the training loop"
                + (f"; use {most}" if most != loader.num_workers else "")
                + f"; smaller image files and more cores{' and data.decode=gpu' * gpu} help"
            )
        elif enough > loader.num_workers:
            advice = f"{enough} would be enough" + (
                f", if they divide data.stream_partitions={partitions}" if partitions else ""
            )
        else:
            advice = "they make batches quickly enough, so it is their way to the training that is slow"
        return (
            f"training waits for images {fraction:.0%} of the time with "
            f"efficiency.dataloader_num_workers={loader.num_workers}: {advice}"
        )


def workers_needed(elapsed_s: float, waited_s: float, made_s: float) -> int:
    """Workers that give batches as quickly as training could take them, if it never waited.

    Args:
        elapsed_s: time in which some batches were used.
        waited_s: the part of it that training waited for them.
        made_s: what it took to make as many batches, in one worker.
    """
    return max(1, math.ceil(made_s / max(elapsed_s - waited_s, 1e-9)))
