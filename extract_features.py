"""Features of a folder of images, or of any data URL, from any model, as files that other programs read.

    python extract_features.py dataset=/my/images output_dir=features \\
        model_loader_kwargs.pretrained_weights=runs/mine/student_ema.pth [features=[global,patches]] [format=parquet]

Under torchrun or Slurm, shards are dealt out to the processes. A shard appears once it is complete; started again, on
any number of processes, the command continues with those that are missing. Each says which model, data and keys it was
made of, and what is there of others is refused. Images that cannot be read are left out and listed. `--help-all`
shows all keys.

A `.safetensors` shard in `output_dir/shards` holds one tensor per kind of features, with a row per image, and `index`,
the image's number in the data; its metadata `images` has the names, as JSON. Of a stream, `index` counts in each of its
parts, and `part` says which: both together are the key of an image. A `.parquet` shard has the same as columns, `name`
included. `read_shard` reads both.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, Shaped
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2
from tqdm import tqdm

from config import COUNT, DTYPE, MISSING, changed_keys, one_of, require
from data import read_batches, worker_poll_s
from distributed import barrier, on_rank_0, rank, world_size
from evaluation import Evaluation, EvaluationConfig, Features, FrozenModel, Results, reader_processes
from reading.pixels import log_pixels
from reading.sources import BadImageError, ImageDataset, ImageStream, Sample, make_dataset
from utils import Bands, UserError, as_written, both_sides, replacing
from weights import save_safetensors

logger = logging.getLogger("features")

KINDS: dict[str, Callable[[Features], Tensor | None]] = {
    "global": lambda features: features.global_repr,
    "mean_patch": lambda features: features.feature_map.mean(dim=(1, 2)),
    "patches": lambda features: features.feature_map,
    "registers": lambda features: features.registers,
}


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(EvaluationConfig):
    """What to extract, beside the keys of every evaluation."""

    dataset: str = MISSING
    """Folder of images, or data URL; `streaming=True` too."""
    features: list[str] = field(
        default_factory=lambda: ["global", "mean_patch"], metadata=one_of(*KINDS, not_empty=True)
    )
    """Any of global [d], mean_patch [d], patches [rows, columns, d] and registers [registers, d]."""
    resolution: int | tuple[int, int] = field(default=224, metadata=COUNT)
    """What the model sees in pixels, multiples of its patch size: the side of squares, or [height, width]."""
    fit: str = field(default="crop", metadata=one_of("crop", "squash"))
    """How an image gets that shape: crop (the largest box of it in the middle) or squash (all of it, distorted)."""
    format: str = field(default="safetensors", metadata=one_of("safetensors", "parquet"))
    """safetensors or parquet."""
    feature_dtype: str = field(default="float32", metadata=DTYPE)
    """Type of the numbers in the files: float32, float16 or (safetensors only) bfloat16."""
    shard_size: int = field(default=1000, metadata=COUNT)
    """Images per file. One process holds the features of so many in memory."""

    def __post_init__(self) -> None:
        """Write squares as one number, and check that the format has the type."""
        object.__setattr__(self, "resolution", as_written(self.resolution))
        require(
            self.format != "parquet" or self.feature_dtype != "bfloat16",
            "feature_dtype",
            self.feature_dtype,
            "parquet has no such type; use float16, or format=safetensors",
        )


class Skipped(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


class Shard(NamedTuple):
    """The contents of one file of features."""

    names: list[str]
    features: dict[str, Tensor]
    indices: Int64[Tensor, " images"]
    skipped: list[Skipped]
    is_last: bool
    """Whether no other file of its part of a stream follows."""
    made_of: dict[str, Any]
    """Model, data and keys that its features follow from: see `evaluation.Results.identity`."""
    part: int | None
    """Of the stream, in which `indices` count; None of a data set."""

    @property
    def keys(self) -> dict[str, Tensor]:
        """What tells an image from all others of the data, as columns."""
        of_stream = {} if self.part is None else {"part": torch.full_like(self.indices, self.part)}
        return {**of_stream, "index": self.indices}


# ------------------------------------------------------------------------------------------------------ images


def prepare(image: Image.Image | Tensor, resolution: int | tuple[int, int], fit: str) -> Shaped[Tensor, "c h w"]:
    """A square of `resolution` pixels a side, or of that height and width: all of the image, distorted, if `fit` is
    squash, else its centre."""
    bicubic = v2.InterpolationMode.BICUBIC
    x = image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image)
    height, width = size = both_sides(resolution)
    if fit == "squash":
        resized_to = size
    elif height == width:
        resized_to = [height]  # of the shorter side
    else:
        scale = max(height / x.shape[-2], width / x.shape[-1])
        resized_to = [max(height, round(x.shape[-2] * scale)), max(width, round(x.shape[-1] * scale))]
    x = v2.functional.resize(x, list(resized_to), bicubic, antialias=True)
    return v2.functional.center_crop(x.clamp(0, 1) if x.is_floating_point() else x, list(size))


Read = tuple[int, str, Tensor | str]
"""Number in the data, name, and the image or why it cannot be read."""


def _read(index: int, sample: Sample, resolution: int | tuple[int, int], fit: str, bands: Bands) -> Read:
    try:
        return index, sample.name, prepare(sample.picture(bands), resolution, fit)
    except BadImageError as error:
        return index, sample.name, error.reason


class _ByNumber(Dataset[Read]):
    def __init__(self, dataset: ImageDataset, read: Callable[[int, Sample], Read]) -> None:
        self.dataset, self.read = dataset, read

    def __getitem__(self, index: int) -> Read:
        return self.read(index, self.dataset[index])


class Batch(NamedTuple):
    """Some images of the data, in order."""

    indices: list[int]
    """Numbers in the data of those that can be read."""
    names: list[str]
    images: Shaped[Tensor, "b c h w"] | None
    """None if none can be read."""
    skipped: list[Skipped]

    @property
    def num_seen(self) -> int:
        """With those that cannot be read."""
        return len(self.names) + len(self.skipped)


def _stack(items: list[Read]) -> Batch:
    """Of a worker: each tensor that it hands over takes a file descriptor, and memory of all that it is a view of."""
    good = [(index, name, x) for index, name, x in items if isinstance(x, Tensor)]
    skipped = [Skipped(name, x) for _, name, x in items if isinstance(x, str)]
    images = torch.stack([x for _, _, x in good]) if good else None
    return Batch([index for index, _, _ in good], [name for _, name, _ in good], images, skipped)


class _InOrder(IterableDataset[list[Read]]):
    """Batches of one part of a stream, none of which lies across the border of two files."""

    def __init__(
        self, stream: ImageStream, part: int, start: int, read: Callable[[int, Sample], Read], cfg: FeaturesConfig
    ) -> None:
        self.stream, self.part, self.start, self.read, self.cfg = stream, part, start, read, cfg

    def __iter__(self) -> Iterator[list[Read]]:
        batch: list[Read] = []
        for index, sample in enumerate(self.stream.read_shard(self.part, self.start), self.start):
            batch.append(self.read(index, sample))
            if len(batch) == self.cfg.batch_size or (index + 1) % self.cfg.shard_size == 0:
                yield batch
                batch = []
        if batch:
            yield batch


# ------------------------------------------------------------------------------------------------------ shards


Shapes = dict[str, torch.Size]
"""Of each kind of features of an image."""


def shapes_of(cfg: FeaturesConfig, model: FrozenModel) -> Shapes:
    """What a shard has of each image, also where none can be read.

    Raises: UserError if the model has no such features.
    """
    out = model(model.blank(cfg.resolution), check_finite=False)
    rows = {kind: KINDS[kind](out) for kind in cfg.features}
    if rows.get("registers", out.global_repr) is None:
        raise UserError(f"features={cfg.features}: {model.name} has no registers; leave them out")
    return {kind: x.shape[1:] for kind, x in rows.items() if x is not None}


class Writer:
    """Collects the features of up to `capacity` images and writes them as one file, which says what it is made of."""

    def __init__(
        self, cfg: FeaturesConfig, capacity: int, made_of: dict[str, Any], shapes: Shapes, part: int | None = None
    ) -> None:
        self.cfg, self.capacity, self.made_of, self.shapes, self.part = cfg, capacity, made_of, shapes, part
        self.dtype: torch.dtype = getattr(torch, cfg.feature_dtype)
        self._clear()

    def _clear(self) -> None:
        self.names: list[str] = []
        self.index: list[int] = []
        self.skipped: list[Skipped] = []
        self.features: dict[str, Tensor] = {}
        self.num_seen = 0

    def add(self, batch: Batch, model: FrozenModel) -> None:
        """Run the model on the readable images of a batch.

        Raises: UserError if the type of the files does not reach to the values.
        """
        self.num_seen += batch.num_seen
        self.skipped += batch.skipped
        if batch.images is None:
            return
        out = model(batch.images)
        start = len(self.names)
        for kind in self.cfg.features:
            rows = KINDS[kind](out)
            assert rows is not None, f"{kind} are there for one batch and not for another"
            converted = rows.to(self.dtype)
            if not converted.isfinite().all():  # the model's own are
                raise UserError(
                    f"feature_dtype={self.cfg.feature_dtype}: {kind} features of {model.name} reach "
                    f"{rows.abs().max():.3g}, and {self.cfg.feature_dtype} ends at {torch.finfo(self.dtype).max:.3g}; "
                    "use float32, or bfloat16 with format=safetensors"
                )
            self._room(kind)[start : start + len(rows)] = converted
        self.names += batch.names
        self.index += batch.indices

    def _room(self, kind: str) -> Tensor:
        """All memory at once: pieces would be there twice when they are joined."""
        if kind not in self.features:
            self.features[kind] = torch.empty(self.capacity, *self.shapes[kind], dtype=self.dtype)
        return self.features[kind]

    def write(self, path: Path, *, is_last: bool) -> None:
        """Write the file in one step and begin the next."""
        features = {kind: self._room(kind)[: len(self.names)] for kind in self.cfg.features}
        index = torch.tensor(self.index, dtype=torch.int64)
        shard = Shard(self.names, features, index, self.skipped, is_last, self.made_of, self.part)
        try:
            with replacing(path) as temporary:
                (_write_parquet if path.suffix == ".parquet" else _write_safetensors)(temporary, shard)
        except OSError as error:
            raise UserError(f"{path} could not be written: {error}") from error
        self._clear()


def _write_safetensors(path: Path, shard: Shard) -> None:
    notes = {
        "names": shard.names,
        "skipped": [s._asdict() for s in shard.skipped],
        "is_last": shard.is_last,
        "made_of": shard.made_of,
        "part": shard.part,
    }
    # One entry, as several come in a random order and the same features would make different files.
    save_safetensors(shard.features | shard.keys, path, {"images": json.dumps(notes)})


def _write_parquet(path: Path, shard: Shard) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name.encode(errors="backslashreplace").decode() for name in shard.names]  # a file's name may be any bytes
    columns: dict[str, Any] = {"name": pa.array(names, pa.string())}
    columns |= {key: pa.array(numbers.numpy()) for key, numbers in shard.keys.items()}
    for kind, rows in shard.features.items():
        flat = rows.flatten(1)
        columns[kind] = pa.FixedSizeListArray.from_arrays(pa.array(flat.flatten().numpy()), flat.shape[1])
    metadata = {
        "shapes": {kind: list(rows.shape[1:]) for kind, rows in shard.features.items()},
        "skipped": [s._asdict() for s in shard.skipped],
        "is_last": shard.is_last,
        "made_of": shard.made_of,
        "part": shard.part,
    }
    table = pa.table(columns).replace_schema_metadata({key: json.dumps(v) for key, v in metadata.items()})
    pq.write_table(table, path)


def read_shard(path: Path, *, only_notes: bool = False) -> Shard:
    """Read a file that this command wrote; `only_notes` leaves the features out.

    Raises: UserError if it is damaged.
    """
    try:
        return _read_parquet(path, only_notes) if path.suffix == ".parquet" else _read_safetensors(path, only_notes)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to have it written again") from error


def _read_safetensors(path: Path, only_notes: bool) -> Shard:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["images"])
            kinds = [key for key in file.keys() if key not in ("part", "index")]  # noqa: SIM118  # not a dict
            features = {} if only_notes else {kind: file.get_tensor(kind) for kind in kinds}
            index = file.get_tensor("index")
    except SafetensorError as error:
        raise ValueError(error) from error
    return _noted(notes, notes["names"], features, index)


def _noted(notes: dict[str, Any], names: list[str], features: dict[str, Tensor], index: Tensor) -> Shard:
    skipped = [Skipped(**image) for image in notes["skipped"]]
    return Shard(names, features, index, skipped, notes["is_last"], notes.get("made_of", {}), notes.get("part"))


def _read_parquet(path: Path, only_notes: bool) -> Shard:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["name", "index"] if only_notes else None)
    notes = {key.decode(): json.loads(text) for key, text in (table.schema.metadata or {}).items()}
    features = {
        kind: torch.tensor(table[kind].combine_chunks().flatten().to_numpy()).view(len(table), *shape)
        for kind, shape in notes["shapes"].items()
        if not only_notes
    }
    names, index = table["name"].to_pylist(), torch.tensor(table["index"].to_pylist(), dtype=torch.int64)
    return _noted(notes, names, features, index)


# ------------------------------------------------------------------------------------------------- the command


def extract_features(cfg: FeaturesConfig, model: FrozenModel, results: Results) -> None:
    """Write all shards that are missing; all ranks call this together."""
    model.grid(cfg.resolution)  # raises
    shapes = shapes_of(cfg, model)
    dataset = make_dataset(cfg.dataset, key="dataset")
    if rank() == 0:
        log_pixels(dataset, "dataset", model.bands, only_warnings=True)
    size = None if isinstance(dataset, ImageStream) else len(dataset)
    before = results.about.get("num_samples", size)
    if before != size:
        raise UserError(
            f"dataset={cfg.dataset}: has {size} images, and had {before} when output_dir={cfg.output_dir} was begun; "
            "choose another output_dir"
        )
    results.about["num_samples"] = size  # as the data, not written before there is a result
    results.note_data(dataset=dataset)
    made_of = results.identity()
    on_rank_0(lambda: _check_shards(cfg, made_of))
    if isinstance(dataset, ImageStream):
        _extract_stream(cfg, model, dataset, made_of, shapes)
    else:
        _extract_dataset(cfg, model, dataset, made_of, shapes)
    barrier()
    _summarise(cfg, results)


def _check_shards(cfg: FeaturesConfig, made_of: dict[str, Any]) -> None:
    """Make the folder. Raises: UserError if it has shards of another model, of other data, or made with other keys."""
    try:
        _folder(cfg).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{_folder(cfg)} cannot be made: {error.strerror or error}; move away what is there") from error
    for path in sorted(_folder(cfg).iterdir()):
        if path.name.startswith(".") or path.suffix not in (".safetensors", ".parquet"):
            continue
        before = read_shard(path, only_notes=True).made_of
        changed = changed_keys(before, made_of)
        if changed:
            changes = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise UserError(
                f"{path} has features of something else ({changes if before else 'it does not say of what'}); choose "
                f"another output_dir, or delete {_folder(cfg)} to extract them anew"
            )


def _loader(cfg: FeaturesConfig, model: FrozenModel, data: Any, most_workers: int, **batching: Any) -> DataLoader[Any]:
    batch_bytes = cfg.batch_size * model.blank(cfg.resolution).nbytes
    workers = reader_processes(cfg.num_workers, batch_bytes, most_workers)
    return DataLoader(data, num_workers=workers, collate_fn=_stack, timeout=worker_poll_s(workers), **batching)


def _reader(cfg: FeaturesConfig, model: FrozenModel) -> Callable[[int, Sample], Read]:
    return functools.partial(_read, resolution=cfg.resolution, fit=cfg.fit, bands=model.bands)


def _bar(total: int | None) -> Any:
    return tqdm(total=total, unit="img", dynamic_ncols=True, disable=None if rank() == 0 else True)


def _extract_dataset(
    cfg: FeaturesConfig, model: FrozenModel, dataset: ImageDataset, made_of: dict[str, Any], shapes: Shapes
) -> None:
    """Shard k has the images from k * shard_size on, whatever the number of processes."""
    starts = range(0, len(dataset), cfg.shard_size)
    own_shards = list(enumerate(starts))[rank() :: world_size()]
    missing = [(_path(cfg, k), range(s, min(s + cfg.shard_size, len(dataset)))) for k, s in own_shards]
    missing = [(path, images) for path, images in missing if not path.exists()]
    if len(missing) < len(own_shards):
        num_done = len(own_shards) - len(missing)
        logger.info("%d of %d shards of this process are there already", num_done, len(own_shards))
    numbers = [images[i : i + cfg.batch_size] for _, images in missing for i in range(0, len(images), cfg.batch_size)]
    loader = _loader(cfg, model, _ByNumber(dataset, _reader(cfg, model)), len(numbers), batch_sampler=numbers)
    batches = read_batches(loader, "num_workers")
    with _bar(sum(len(images) for _, images in missing)) as bar:
        for path, images in missing:
            writer = Writer(cfg, len(images), made_of, shapes)
            while writer.num_seen < len(images):
                batch = next(batches)
                writer.add(batch, model)
                bar.update(batch.num_seen)
            writer.write(path, is_last=True)


def _extract_stream(
    cfg: FeaturesConfig, model: FrozenModel, stream: ImageStream, made_of: dict[str, Any], shapes: Shapes
) -> None:
    """Each part of the stream is read by one process from start to end, and becomes as many files as it needs."""
    with _bar(None) as bar:
        for part in range(stream.num_shards)[rank() :: world_size()]:
            number = 0
            while _path(cfg, part, number).exists():
                number += 1
            if number and read_shard(_path(cfg, part, number - 1), only_notes=True).is_last:
                continue
            data = _InOrder(stream, part, number * cfg.shard_size, _reader(cfg, model), cfg)
            writer = Writer(cfg, cfg.shard_size, made_of, shapes, part)
            loader = _loader(cfg, model, data, 1, batch_size=None)
            for batch in read_batches(loader, "num_workers"):
                if writer.num_seen == cfg.shard_size:
                    writer.write(_path(cfg, part, number), is_last=False)
                    number += 1
                writer.add(batch, model)
                bar.update(batch.num_seen)
            writer.write(_path(cfg, part, number), is_last=True)


def _folder(cfg: FeaturesConfig) -> Path:
    return Path(cfg.output_dir, "shards")


def _path(cfg: FeaturesConfig, *numbers: int) -> Path:
    return _folder(cfg) / f"{'-'.join(f'{number:06d}' for number in numbers)}.{cfg.format}"


def _summarise(cfg: FeaturesConfig, results: Results) -> None:
    names = sorted(path.name for path in _folder(cfg).glob(f"*.{cfg.format}") if not path.name.startswith("."))
    notes = [read_shard(_folder(cfg) / name, only_notes=True) for name in names]
    skipped = [image for note in notes for image in note.skipped]
    if skipped and not any(note.names for note in notes):
        barrier()  # all have read them
        on_rank_0(lambda: [(_folder(cfg) / name).unlink() for name in names])  # so that they do not refuse other images
        raise UserError(
            f"dataset={cfg.dataset}: none of {len(skipped)} images can be read; the first is {': '.join(skipped[0])}"
        )
    results.add("num_images", sum(len(note.names) for note in notes))
    results.add("shards", names)
    results.add("skipped", [image._asdict() for image in skipped])
    for image in skipped[:10]:
        logger.warning("left out: %s: %s", *image)
    if len(skipped) > 10:
        logger.warning("left out: %d more, all in %s", len(skipped) - 10, results.path)


EVALUATION = Evaluation("features", FeaturesConfig, extract_features, parser)
main = EVALUATION.main


if __name__ == "__main__":
    sys.exit(main())
