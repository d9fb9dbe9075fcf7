"""What the evaluations share: the one `main`, the model under evaluation, its features, splits, and result files.

An evaluation is a script with a config, a frozen dataclass derived from `EvaluationConfig` whose fields are its keys,
and a function `evaluate(cfg, model, results)`. It runs on one process, under torchrun and under Slurm alike: each rank
reads its share of the images, and what was computed is gathered in the order of the data set.
"""

import argparse
import functools
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config import (
    COUNT,
    DEVICE,
    DTYPE,
    IMAGE_MEAN,
    IMAGE_STD,
    LOADER_KWARGS,
    NOT_NEGATIVE,
    SEED,
    changed_keys,
    load_config,
)
from data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_shared_memory,
    dead_workers_explained,
    read_batches,
    worker_poll_s,
    workers_that_fit,
)
from distributed import (
    all_gather_rows,
    barrier,
    broadcast_object,
    device_model,
    gather_objects,
    on_rank_0,
    rank,
    session,
    world_size,
)
from keys import answer
from launch import claim_output_dir
from reading.bands import resized
from reading.pixels import log_pixels
from reading.sources import BadImageError, ImageDataset, ImageStream, make_dataset
from report import Score
from utils import (
    RGB8,
    Bands,
    Normalisation,
    UserError,
    as_typed,
    both_sides,
    ending_in_words,
    git_revision,
    import_from_path,
    setup_logging,
    write_text_atomically,
)

logger = logging.getLogger("evaluation")

ROOT = Path(__file__).parent
SPEED_KEYS = ("device", "num_workers", "batch_size", "output_dir")
"""Keys that change where and how fast an evaluation runs, not what it computes."""


class Features(NamedTuple):
    """What a model under evaluation gives, in float32."""

    global_repr: Float[Tensor, "b d"]
    registers: Float[Tensor, "b r d_registers"] | None
    feature_map: Float[Tensor, "b hp wp d_patch"]


@dataclass(frozen=True, kw_only=True)
class FrozenModelConfig:
    """Keys of every script that runs a frozen model over images."""

    model_path: str = "model.py"
    """Python file with `__model_loader__(**model_loader_kwargs)`; relative to the current folder, or to this file's."""
    model_loader_kwargs: dict[str, Any] = field(default_factory=dict, metadata=LOADER_KWARGS)
    """Arguments of the loader, such as `pretrained_weights`."""
    device: str = field(default="auto", metadata=DEVICE)
    """auto, cuda, mps or cpu."""
    dtype: str = field(default="float32", metadata=DTYPE)
    """Precision of the model's forward pass: float32, or autocast to bfloat16 or float16."""
    batch_size: int = field(default=128, metadata=COUNT)
    """Images per forward pass of one rank."""
    num_workers: int | None = field(default=None, metadata=NOT_NEGATIVE)
    """Processes per rank that read images; null for one per core, up to 8."""
    image_mean: list[float] | None = field(default=None, metadata=IMAGE_MEAN)
    """Mean of each band, in [0, 1], which is subtracted. null: that of the model's training, if its configuration lies
    beside its weights, else ImageNet's."""
    image_std: list[float] | None = field(default=None, metadata=IMAGE_STD)
    """Deviation of each band, in units of [0, 1], by which it is divided; null likewise."""
    seed: int = field(default=0, metadata=SEED)
    """What random weights, splits and initialisations follow from."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(FrozenModelConfig):
    """Keys of every evaluation."""

    output_dir: str = ""
    """Where results_<script>.json and everything else is written. Empty: chosen, see `choose_output_dir`."""

    free_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that may change between runs into one folder, besides `SPEED_KEYS`: the evaluation sees to it by itself."""


# ------------------------------------------------------------------------------------------------ the model


class FrozenModel:
    """A model under evaluation: takes images, gives `Features`, and checks that it keeps the contract.

    Images have the model's `bands`: 8 bits, or float32 in [0, 1].

    The contract: `patch_size`, and `forward(images [b, 3, h, w])` that returns a global representation [b, d],
    registers [b, r, d] or None, and a feature map [b, h / patch_size, w / patch_size, d]. It may have `training_notes`,
    a dict of texts about its training by their names, which results keep; and `in_chans` and `normalisation`, as
    `model.Backbone` has them, without which it gets RGB.
    """

    def __init__(self, model: nn.Module, cfg: FrozenModelConfig, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self.module = model.to(device).eval().requires_grad_(False)
        self.dtype: torch.dtype = getattr(torch, cfg.dtype)
        self.normalisation = self._normalisation(model, cfg)
        self.mean, self.std = (
            torch.tensor(each, device=device).view(-1, 1, 1)
            for each in (self.normalisation.mean, self.normalisation.std)
        )
        patch_size = getattr(model, "patch_size", None)
        if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
            raise self._broken(f"its attribute patch_size is {patch_size!r} and must be a whole number from 1 on")
        self.patch_size: int = patch_size
        notes = getattr(model, "training_notes", {})
        if not isinstance(notes, dict) or not all(isinstance(text, str) for entry in notes.items() for text in entry):
            raise self._broken(f"its attribute training_notes is {notes!r} and must be a dict of texts by their names")
        self.training_notes: dict[str, str] = notes
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.sha256 = hash_weights(model)

    def _normalisation(self, model: nn.Module, cfg: FrozenModelConfig) -> Normalisation:
        """What the keys say, else the model."""
        own = getattr(model, "normalisation", Normalisation())
        given = {"mean": cfg.image_mean, "std": cfg.image_std}
        used = replace(own, **{key: tuple(numbers) for key, numbers in given.items() if numbers is not None})
        num = getattr(model, "in_chans", len(own.mean))
        for key, numbers in (("image_mean", used.mean), ("image_std", used.std)):
            if len(numbers) != num:
                raise UserError(f"{key}={list(numbers)}: must have a number for each of the model's {num} bands")
        return used

    @property
    def bands(self) -> Bands:
        """What is made of images for this model."""
        return Bands(len(self.normalisation.mean), self.normalisation.value_range)

    def grid(self, resolution: int | Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of images of this resolution: the side of squares in pixels, or both sides.

        Raises: UserError if they do not divide into patches.
        """
        sides = both_sides(resolution)
        if any(side % self.patch_size for side in sides):
            near = [max(1, round(side / self.patch_size)) * self.patch_size for side in sides]
            must = "must be a multiple" if isinstance(resolution, int) else "both must be multiples"
            raise UserError(
                f"resolution={as_typed(resolution)}: {must} of {self.patch_size}, the patch size of {self.name}; the "
                f"nearest is {as_typed(near)}"
            )
        return sides[0] // self.patch_size, sides[1] // self.patch_size

    def blank(self, resolution: int | Sequence[int]) -> Shaped[Tensor, "1 c h w"]:
        """A black image as the model is called with."""
        deep = self.bands.value_range is not None
        size = (1, self.bands.num, *both_sides(resolution))
        return torch.zeros(size, dtype=torch.float32 if deep else torch.uint8)

    @torch.no_grad()
    def __call__(self, images: Shaped[Tensor, "b c h w"], *, check_finite: bool = True) -> Features:
        """Features of images, on the model's device.

        Args:
            images: both sides divide into patches.
            check_finite: refuse values that are not finite, for which the host waits for the device.

        Raises: UserError if the image size does not fit the patch size, or the model breaks the contract.
        """
        out = self.run(self.module, images)
        height, width = images.shape[-2:]
        features = self._checked(out, len(images), height // self.patch_size, width // self.patch_size)
        if check_finite:
            given = {"global representation": features.global_repr, "feature map": features.feature_map}
            self._check_finite(given if features.registers is None else given | {"registers": features.registers})
        return features

    @torch.no_grad()
    def pooled_blocks(
        self, images: Shaped[Tensor, "b c h w"], num_blocks: int, *, check_finite: bool = True
    ) -> Float[Tensor, "b n d"]:
        """Mean patch tokens after each of the last blocks, first block first, put through the model's final norm.

        The model has `get_intermediate_layers(images, n, reshape=True, norm=True)` for it, as DINOv2 has, which gives
        one map [b, d, rows, columns] per block.

        Raises: as `__call__`, and UserError if the model has no such method or gives something else.
        """
        blocks = getattr(self.module, "get_intermediate_layers", None)
        if blocks is None:
            raise self._broken("it has no get_intermediate_layers(x, n, reshape, norm), which gives its last blocks")
        maps = self.run(functools.partial(blocks, n=num_blocks, reshape=True, norm=True), images)
        is_map = [isinstance(x, Tensor) and x.ndim == 4 and len(x) == len(images) for x in maps]
        if len(is_map) != num_blocks or not all(is_map):
            raise self._broken(f"get_intermediate_layers did not return {num_blocks} maps [b, d, rows, columns]")
        pooled = torch.stack([x.float().mean((2, 3)) for x in maps], dim=1)
        if check_finite:
            self._check_finite({"output of get_intermediate_layers": pooled})
        return pooled

    @torch.no_grad()
    def run(self, network: Callable[[Tensor], Any], images: Shaped[Tensor, "b c h w"]) -> Any:
        """Call a network on normalised images, in the precision of the evaluation.

        Raises: UserError if the image size does not fit the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images of {height}x{width} pixels do not divide into patches of {self.patch_size}; choose a "
                f"resolution that is a multiple of {self.patch_size}, the patch size of {self.name}"
            )
        x = images.to(self.device, non_blocking=True)
        scaled = x if x.is_floating_point() else x.float() / 255
        x = (scaled - self.mean) / self.std
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(x)

    def _checked(self, out: Any, b: int, hp: int, wp: int) -> Features:
        if not isinstance(out, tuple) or len(out) != 3:
            raise self._broken(f"forward returned {type(out).__name__}, not (global, registers, feature map)")
        global_repr, registers, feature_map = out
        expected = {
            "the global representation": (global_repr, (b, None)),
            "the feature map": (feature_map, (b, hp, wp, None)),
        }
        if registers is not None:
            expected["the registers"] = (registers, (b, None, None))
        for what, (tensor, shape) in expected.items():
            if not isinstance(tensor, Tensor):
                raise self._broken(f"{what} is {type(tensor).__name__}, not a tensor")
            fits = len(shape) == tensor.ndim and all(
                want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if want is None else str(want) for want in shape)
                raise self._broken(f"{what} has shape {list(tensor.shape)}, expected [{wanted}]")
        if registers is not None and registers.shape[1] == 0:
            registers = None
        return Features(global_repr.float(), None if registers is None else registers.float(), feature_map.float())

    def _check_finite(self, given: Mapping[str, Tensor]) -> None:
        finite = torch.stack([tensor.isfinite().all().to(self.device) for tensor in given.values()])
        for what, is_finite in zip(given, finite.tolist(), strict=True):  # one wait for the device, not one for each
            if not is_finite:
                raise self._broken(f"the {what} has values that are not finite; dtype=float32 may help")

    def _broken(self, how: str) -> UserError:
        return UserError(f"model_path={self.name}: {how}; see the contract of models in README.md")


def load_model_file(model_path: str, model_loader_kwargs: dict[str, Any]) -> nn.Module:
    """Call the loader of a model file.

    Raises: UserError if there is no such file or loader, or the loader does not take these arguments or gives no model.
    """
    loader = find_loader(model_path)
    try:
        inspect.signature(loader).bind(**model_loader_kwargs)
    except TypeError as error:
        name = f"{Path(model_path).name}{inspect.signature(loader)}"
        raise UserError(f"model_loader_kwargs={model_loader_kwargs}: {error}; the loader is {name}") from error
    model = loader(**model_loader_kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(f"model_path={model_path}: the loader returned {type(model).__name__}, not a torch.nn.Module")
    return model


def find_loader(model_path: str) -> Callable[..., Any]:
    """`__model_loader__` of a model file, see `find_model_file`.

    Raises: UserError if there is no such file, or it does not define it.
    """
    loader: Any = getattr(import_from_path(find_model_file(model_path)), "__model_loader__", None)
    if not callable(loader):
        raise UserError(f"model_path={model_path}: the file does not define __model_loader__(**model_loader_kwargs)")
    return loader


def find_model_file(model_path: str) -> Path:
    """A model file, which is looked for from the current folder, then from that of this file.

    Raises: UserError if there is none.
    """
    path = next((path for path in (Path(model_path), ROOT / model_path) if path.is_file()), None)
    if path is None:
        raise UserError(f"model_path={model_path}: there is no such file; give a Python file with __model_loader__")
    return path


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's state dict: equal for equal weights, however stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- features


def open_dataset(url: str, key: str, bands: Bands = RGB8) -> ImageDataset:
    """The data set of a data URL for an evaluation, which needs random access.

    Raises: UserError naming `key`.
    """
    dataset = make_dataset(url, key=key)
    if isinstance(dataset, ImageStream):
        raise UserError(f"{key}={url}: evaluations need random access; leave streaming=True out")
    if rank() == 0:
        log_pixels(dataset, key, bands, only_warnings=True)
    return dataset


def squashed(image: Image.Image | Tensor, size: int | tuple[int, int]) -> Shaped[Tensor, "c h w"]:
    """All of the image as a square of `size` pixels, or of that height and width, by bicubic resampling: of 8-bit RGB
    Pillow's, else torch's."""
    height, width = both_sides(size)
    if isinstance(image, Tensor):
        return resized(image, height, width)
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).movedim(-1, 0).contiguous()


Prepare = Callable[[Any, Any], tuple[Tensor, ...]]
"""Makes tensors of a decoded image (see `Sample.picture`) and its label, of the same shapes for all images; the first
is the image."""


class _Prepared(Dataset[Any]):
    def __init__(self, dataset: ImageDataset, prepare: Prepare, indices: Sequence[int], bands: Bands) -> None:
        self.dataset, self.prepare, self.indices, self.bands = dataset, prepare, indices, bands

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, ...] | UserError:
        sample = self.dataset[self.indices[position]]
        try:
            return self.prepare(sample.picture(self.bands), sample.target())
        except BadImageError as error:
            return UserError(f"{error}; repair or remove the file: an evaluation leaves none out")
        except UserError as error:
            return UserError(f"{sample.name}: {error}")


def _stack(items: list[Any]) -> tuple[Tensor, ...] | UserError:
    for item in items:
        if isinstance(item, UserError):  # see `data.wait_for_batch`
            return item
    return tuple(torch.stack(column) for column in zip(*items, strict=True))


class ImageBatches:
    """Batches of this rank's images, in order: iterate to get tuples of what `prepare` returned, stacked.

    Args:
        dataset: images with labels.
        prepare: see `Prepare`.
        indices: which images, of all ranks; None for all of them. This rank takes a contiguous share.
        batch_size: images per batch.
        num_workers: processes that read; 0 for this one.
        pin: whether batches go to a GPU.
        title: shown before the progress bar; None for no bar.
        bands: those of the model.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        prepare: Prepare,
        *,
        batch_size: int,
        num_workers: int | None = 0,
        indices: Sequence[int] | None = None,
        pin: bool = False,
        title: str | None = None,
        bands: Bands = RGB8,
    ) -> None:
        chosen = range(len(dataset)) if indices is None else indices
        self.num_images = len(chosen)
        share = my_share(len(chosen))
        self.share, self.title, self.batch_size = share, title, batch_size
        prepared = _Prepared(dataset, prepare, [int(chosen[i]) for i in share], bands)
        first = prepared[0] if num_workers != 0 and len(share) > 0 else ()
        image_bytes = 0 if isinstance(first, UserError) else sum(tensor.nbytes for tensor in first)
        self.num_workers = reader_processes(
            num_workers, min(batch_size, len(share)) * image_bytes, -(-len(share) // batch_size)
        )
        self.loader = DataLoader(
            prepared,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=_stack,
            pin_memory=pin,
            timeout=worker_poll_s(self.num_workers),
        )

    def __iter__(self) -> Any:
        quiet = self.title is None or rank() > 0
        with tqdm(
            total=len(self.share), desc=self.title, unit="img", disable=True if quiet else None, leave=False
        ) as bar:
            for batch in read_batches(self.loader, "num_workers"):
                yield batch
                bar.update(len(batch[0]))


def reader_processes(num_workers: int | None, batch_bytes: int, num_batches: int = sys.maxsize) -> int:
    """What the key num_workers stands for: no more than there are batches; if null, than fit into the shared memory.

    Raises: UserError if it was given, and they do not fit.
    """
    if num_workers is None:
        return min(8, os.cpu_count() or 1, num_batches, workers_that_fit(batch_bytes))
    check_shared_memory("num_workers", min(num_workers, num_batches), batch_bytes, "batch_size")
    return min(num_workers, num_batches)


def my_share(num: int, place: int | None = None) -> range:
    """The contiguous part of `range(num)` that belongs to a rank, by default this one; sizes differ by at most one."""
    r, n = rank() if place is None else place, world_size()
    return range(num * r // n, num * (r + 1) // n)


def extract(
    model: Callable[[Tensor], Any],
    batches: ImageBatches,
    compute: Callable[..., tuple[Tensor, ...]],
    *,
    gather: bool = True,
) -> tuple[Tensor, ...]:
    """Run the model over all images and keep what `compute` makes of its features, on the CPU.

    Memory: what is kept, once, and one batch. The rows of all ranks come together in the order of the images.

    Args:
        model: features of 8-bit images, such as a `FrozenModel`.
        batches: images and labels.
        compute: from (features, *labels of the batch) to tensors with any number of rows.
        gather: whether every rank gets the rows of all ranks; else its own.
    """
    columns: list[list[Tensor]] = []
    for images, *labels in batches:
        rows = compute(model(images), *labels)
        columns = columns or [[] for _ in rows]
        for column, part in zip(columns, rows, strict=True):
            column.append(part.cpu())
    joined = tuple(_join(column) for column in columns)
    if not gather or world_size() == 1:
        return joined
    # A rank may have no image; it learns from another what the rows look like.
    likeness = [(row.dtype, row.shape[1:]) for row in joined] or None
    known = next(rows for rows in gather_objects(likeness) if rows is not None)
    joined = joined or tuple(torch.empty(0, *shape, dtype=dtype) for dtype, shape in known)
    return tuple(all_gather_rows(column) for column in joined)


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate and free the parts on the way, so that the peak is one copy and not two."""
    whole = torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    start = 0
    for i, part in enumerate(parts):
        whole[start : start + len(part)] = part
        start += len(part)
        parts[i] = part.new_empty(0)
    return whole


# ---------------------------------------------------------------------------------------------------- results


class Results:
    """`output_dir/results_<script>.json`: results, config, and what was evaluated; written after every partial result.

    A second run of the same evaluation of the same weights keeps what is there, so `in` tells what need not be computed
    again. Rank 0 writes; all ranks hold the same.

    Raises: UserError, on all ranks, if the folder cannot be made, or holds results of other weights or another config,
        or a file of that name that is something else.
    """

    def __init__(self, script: str, cfg: EvaluationConfig, about: dict[str, Any]) -> None:
        self.output_dir = Path(cfg.output_dir)
        self.path = self.output_dir / f"results_{script}.json"
        self.config = asdict(cfg)
        self.free_keys = cfg.free_keys
        self.about = about
        self.values: dict[str, Any] = {}
        self.scores: list[dict[str, Any]] | None = None
        old = on_rank_0(self._open)
        if old is not None:
            self._check_same(old)
            self.values = old["results"]
            # Notes of the earlier run, such as times, stay beside the numbers that they describe.
            self.about = old["about"] | about
            self.scores = old.get("scores")
            self._write()

    def _open(self) -> dict[str, Any] | None:
        """What an earlier run left, None if there was none."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir={self.config['output_dir']} cannot be made: {error.strerror or error}; choose another one"
            ) from error
        try:
            old = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unreadable(str(error)) from error
        parts = [old.get(key) for key in ("results", "config", "about")] if isinstance(old, dict) else [None]
        whole = all(isinstance(part, dict) for part in parts)
        if not whole or not isinstance(old["about"].get("weights_sha256"), str):
            raise self._unreadable("it was not written by an evaluation")
        return old

    def _unreadable(self, why: str) -> UserError:
        return UserError(f"{self.path} cannot be read ({why}); move it away or choose another output_dir")

    def _check_same(self, old: dict[str, Any]) -> None:
        remedy = f"choose another output_dir, or delete {self.path} to evaluate anew"
        if old["about"]["weights_sha256"] != self.about["weights_sha256"]:
            raise UserError(
                f"output_dir={self.config['output_dir']} has results of another model (weights "
                f"{old['about']['weights_sha256'][:12]}, these are {self.about['weights_sha256'][:12]}); {remedy}"
            )
        before, now = old["about"].get("loader_sha256"), self.about.get("loader_sha256")
        if before is not None and before != now:
            raise UserError(
                f"output_dir={self.config['output_dir']} has results of another model: the weights are the same, but "
                f"{self.config['model_path']}, its model_loader_kwargs or the configuration beside the weights have "
                f"changed; {remedy}"
            )
        changed = changed_keys(self._computed_by(old["config"]), self._computed_by(json.loads(json.dumps(self.config))))
        if changed:
            what = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise UserError(f"output_dir={self.config['output_dir']} has results of another config ({what}); {remedy}")

    def _computed_by(self, config: dict[str, Any]) -> dict[str, Any]:
        # Where a model comes from is not compared: its weights, and what `hash_loader` takes in, are.
        free = (*SPEED_KEYS, *self.free_keys, "model_path", "model_loader_kwargs")
        return {k: v for k, v in config.items() if k not in free}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def add(self, name: str, value: Any) -> None:
        """Store a JSON value under `name`; the file is replaced at once. All ranks call this with the same value."""
        self.values[name] = value
        self._write()

    def note(self, **about: Any) -> None:
        """Store notes about how the results came about, such as times and sizes."""
        self.about |= about
        self._write()

    def _write(self) -> None:
        if rank() == 0:
            content = {"results": self.values, "config": self.config, "about": self.about}
            content |= {} if self.scores is None else {"scores": self.scores}
            try:
                write_text_atomically(self.path, json.dumps(content, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def declare_scores(self, *scores: Score) -> None:
        """Say which values of the results are scores, in the order of tables; written with the next result.

        Reports and training logs show what is declared. A value counts in every result that has the path to it.
        """
        self.scores = [score._asdict() | {"label": score.label or score.name} for score in scores]

    def note_data(self, **datasets: ImageDataset | ImageStream) -> None:
        """Keep what the data under each key are, for the file; all ranks call this before they compute anything.

        Raises: UserError, on all ranks, if there are results of other data, though the keys are the same.
        """
        data = {
            key: {"url": _value_at(self.config, key), "fingerprint": dataset.fingerprint() if rank() == 0 else ""}
            for key, dataset in datasets.items()
        }
        data = broadcast_object(data)
        if self.values:
            check_same_data(data, self.about.get("data", {}), self.path)
        self.about |= {"data": data}  # not written yet, so that a run that fails leaves no file that refuses the next

    def identity(self) -> dict[str, Any]:
        """What the results depend on: two evaluations with the same identity compute the same."""
        config = self._computed_by(json.loads(json.dumps(self.config)))
        made_of = {key: self.about.get(key) for key in ("weights_sha256", "loader_sha256")}
        data = {f"data of {key}": entry["fingerprint"] for key, entry in self.about.get("data", {}).items()}
        return made_of | data | config

    def artifacts(self) -> Path:
        """The folder for pictures, which is made."""
        return self.folder("artifacts")

    def folder(self, name: str) -> Path:
        """A folder beside the results, which is made."""
        folder = self.output_dir / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror or error}; move away what is there") from error
        return folder


def choose_output_dir(what: str, request: Mapping[str, Any]) -> str:
    """A folder for results, the same for the same request: beside the weights, or in runs/ if nothing can be there.

    Args:
        what: is done, a part of the name.
        request: `model_path`, `model_loader_kwargs`, and whatever else tells one request from another.
    """
    digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:8]
    weights = request["model_loader_kwargs"].get("pretrained_weights")
    folder, name = Path("runs"), model_name(request["model_path"], request["model_loader_kwargs"])
    if weights is not None and "://" not in str(weights):
        beside = Path(str(weights)).parent
        # An `=` marks overrides on the command lines of the scripts.
        if beside.is_dir() and os.access(beside, os.W_OK) and "=" not in str(beside):
            folder, name = beside, Path(str(weights)).stem
    name = re.sub(r"[^\w.-]+", "_", name)[:80]
    chosen = str(folder / f"{name}_{what}_{digest}")
    logger.info("output_dir=%s, chosen since none is given; the same command finds it again", chosen)
    return chosen


def model_name(model_path: str, model_loader_kwargs: Mapping[str, Any]) -> str:
    """A short name for a model."""
    weights = model_loader_kwargs.get("pretrained_weights")
    if weights is None:
        words = [str(value) for value in model_loader_kwargs.values() if isinstance(value, str)]
        return " ".join([Path(model_path).stem, *words])
    path = Path(str(weights))
    return f"{path.parent.name}/{path.stem}" if path.parent.name and "://" not in str(weights) else path.stem


def _value_at(config: Mapping[str, Any], key: str) -> str:
    """`test_dataset_names/v2` is an entry of a key that has several."""
    first, _, rest = key.partition("/")
    return config[first][rest] if rest else config[first]


def check_same_data(now: Mapping[str, Mapping[str, str]], before: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Raise UserError if data that results are made of have changed where they are.

    Args:
        now: URL and fingerprint by key, as `Results.note_data` stores them.
        before: those that the results in `path` are of.
        path: the result file, or the folder that it is in.
    """
    for key in now.keys() & before.keys():
        if now[key]["url"] == before[key]["url"] and now[key]["fingerprint"] != before[key]["fingerprint"]:
            raise UserError(
                f"{path} has results of other data: what is at {key}={now[key]['url']} has changed since; choose "
                "another output_dir, or delete it to evaluate anew"
            )


CONFIG_ENDINGS = (".yaml", ".yml", ".json", ".toml", ".py")


def hash_loader(model_path: str, loader_kwargs: Mapping[str, Any]) -> str:
    """SHA-256 over what makes a model beside its weights: the model file, arguments, and configuration files.

    Where files are does not count, nor do paths of weights, whose values have a hash of their own.
    """
    arguments = {key: value for key, value in loader_kwargs.items() if key != "device" and value is not None}
    weights = arguments.pop("pretrained_weights", None)
    if weights is not None:
        arguments.setdefault("config_path", str(Path(weights).with_suffix(".yaml")))
    digest = hashlib.sha256(find_model_file(model_path).read_bytes())
    for key, value in sorted(arguments.items()):
        path = Path(value) if isinstance(value, str) else None
        if path is None or not (path.is_file() or key == "config_path"):
            digest.update(f"{key}={json.dumps(value, default=str)}".encode())
        elif path.is_file() and path.suffix in CONFIG_ENDINGS:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe(model: FrozenModel, cfg: EvaluationConfig) -> dict[str, Any]:
    """What was evaluated, on what, by which code."""
    weights = cfg.model_loader_kwargs.get("pretrained_weights")
    return {f"training_{name}": text for name, text in model.training_notes.items()} | {
        "model_path": cfg.model_path,
        "weights": None if weights is None else str(weights),
        "weights_sha256": model.sha256,
        "loader_sha256": hash_loader(cfg.model_path, cfg.model_loader_kwargs),
        "num_parameters": model.num_parameters,
        "patch_size": model.patch_size,
        "image_mean": list(model.normalisation.mean),
        "image_std": list(model.normalisation.std),
        "value_range": model.normalisation.value_range and list(model.normalisation.value_range),
        "dtype": cfg.dtype,
        "commit": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_model(model.device),
        "num_ranks": world_size(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# -------------------------------------------------------------------------------------------------------- main

ConfigT = TypeVar("ConfigT", bound=EvaluationConfig)


@dataclass(frozen=True)
class Evaluation(Generic[ConfigT]):
    """One script: its name, its keys, and what it does."""

    name: str
    """What it is called, as in results_<name>.json."""
    schema: type[ConfigT]
    evaluate: Callable[[ConfigT, FrozenModel, Results], None]
    parser: argparse.ArgumentParser
    """The parser of its command line, whose arguments are `sources`."""

    @ending_in_words
    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The command line. Returns the exit code: 0 done, 2 a mistake that the message explains."""
        args = self.parser.parse_intermixed_args(arguments)
        setup_logging()
        answer(args, self.schema, args.sources)
        cfg = load_config(self.schema, None, args.sources)
        with session(cfg.device, key="device") as device, dead_workers_explained("num_workers"):
            setup_logging(quiet=rank() != 0)
            if not cfg.output_dir:
                free = (*SPEED_KEYS, *cfg.free_keys)
                request = {key: value for key, value in asdict(cfg).items() if key not in free}
                # The folder of a request without them is that of the time when these were the defaults.
                for key, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
                    request[key] = request[key] or list(default)
                chosen = choose_output_dir(self.name, request) if rank() == 0 else None
                cfg = replace(cfg, output_dir=broadcast_object(chosen))
            with claim_output_dir(cfg.output_dir, key="output_dir"):
                self.run(cfg, device)
        return 0

    def run(self, cfg: ConfigT, device: torch.device) -> Results:
        """Evaluate; all ranks call this together. Returns the results, which are also in the output directory."""
        started = time.monotonic()
        torch.manual_seed(cfg.seed)
        model = FrozenModel(load_model_file(cfg.model_path, cfg.model_loader_kwargs), cfg, device, cfg.model_path)
        # What was used, so that results with another normalisation are others.
        used = model.normalisation
        cfg = replace(cfg, image_mean=list(used.mean), image_std=list(used.std))
        results = Results(self.name, cfg, describe(model, cfg))
        before = set(results.values)
        logger.info(
            "%s of %s, %.1fM parameters, weights %s, on %s",
            self.name,
            cfg.model_loader_kwargs.get("pretrained_weights") or f"{cfg.model_path} without pretrained_weights",
            model.num_parameters / 1e6,
            model.sha256[:12],
            device,
        )
        with logging_redirect_tqdm():
            self.evaluate(cfg, model, results)
        # A run that was killed after its last result did not note its end, by which others know that all is done.
        if set(results.values) != before or "seconds" not in results.about:
            results.note(seconds=round(results.about.get("seconds", 0) + time.monotonic() - started, 1))
        barrier()
        logger.info("results are in %s", results.path)
        return results
