"""Typed configuration: what every key means, and how YAML files and `a.b=c` overrides become one checked object.

Values live in YAML, types, ranges and meanings here. Later sources win: `default_pretrain_config.yaml`, your files, the
command line. Unknown keys, wrong types, values out of range and impossible combinations are `UserError`s before any
device is touched. What a key holds is decided by its declared type, not by YAML's guesses: `2024_11_05` is a text for
a key that is a text.
"""

import argparse
import ast
import dataclasses
import functools
import math
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml

from default_eval_config import EVALS
from utils import (
    RGB8,
    UPRIGHT,
    Bands,
    Normalisation,
    Turns,
    UserError,
    as_typed,
    as_written,
    both_sides,
    closest,
    of_this_code,
)

ROOT = Path(__file__).parent
MISSING = "???"
"""Default, or in YAML the value, of a key that must be given: OmegaConf's word for it."""
DEFAULT_PRETRAIN_CONFIG = ROOT / "default_pretrain_config.yaml"

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "autocast_dtype": ("dtype", "efficiency.param_dtype"),
    "checkpoint_period": ("save_checkpoint_period", "train.checkpointing.period"),
    "classifiers_kwargs": (
        "what it held are keys of their own: knn_ks, knn_distances, knn_chunk, knn_dtype, logreg_cs, logreg_max_iter, "
        "logreg_tol",
    ),
    "config_path": ("model_loader_kwargs.config_path",),
    "dataset": ("dataset_name", "data.dataset", "train_dataset_name"),
    "dataset_name": ("dataset", "data.dataset"),
    "do_dict_learning": ("name dictionary in pictures=[...], and sizes in dictionary_atoms=[...]",),
    "do_pca": ("name image_pca and joint_pca in pictures=[...]",),
    "eval_period": ("save_checkpoint_period", "evals.<name>.period is the period of a set of evaluations"),
    "n_images": ("num_images",),
    "n_iters": ("optim.total_iters",),
    "n_workers": ("num_workers", "efficiency.dataloader_num_workers"),
    "pretrained_weights": ("model_loader_kwargs.pretrained_weights", "train.init_from"),
    "script": ("file",),
    "test_dataset": ("test_dataset_name", "test_dataset_names"),
    "test_dataset_name": ("test_dataset_names",),
    "test_dataset_names": ("test_dataset_name",),
    "test_datasets": ("test_dataset_names", "test_dataset_name"),
    "total_iters": ("n_iters",),
    "train_dataset": ("train_dataset_name",),
    "use_compile": ("efficiency.compilation", "evaluations do not compile the model; leave it out"),
    "val_dataset": ("val_dataset_name",),
}
"""Keys of the published system and of earlier versions that are called otherwise: their names today, of which the first
that a configuration has is told, or a sentence."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise the error a user understands unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {remedy}")


def require_fraction(key: str, number: float | None) -> None:
    """Raise for a number of steps with a decimal point, a part of the training, that is more than all of it."""
    remedy = "a number with a decimal point is a fraction of optim.total_iters and must lie in [0, 1]"
    require(not isinstance(number, float) or number <= 1, key, number, remedy)


def require_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


def require_name(key: str, name: str, taken: tuple[str, ...] = ()) -> None:
    """Raise unless `name`, which the user chose, can be that of a file or folder and is not `taken`."""
    fits = re.fullmatch(r"\w[\w.-]*", name) is not None and len(name.encode()) <= MAX_NAME_BYTES
    if not fits or name in taken:
        but = f", and none of {', '.join(taken)}" if taken else ""
        raise UserError(f"{key}: a name is also that of a folder; use letters, digits, '-', '_' and '.'{but}")


MAX_NAME_BYTES = 200
"""File systems take 255, and endings are added."""


def is_one_line(text: str) -> bool:
    """Whether `text` is without line breaks and control characters."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


# What a key may hold, beside its type: metadata of its field, checked by `load_config`.


@dataclass(frozen=True)
class Allowed:
    """What a key may hold; of a list, each element. Texts have one line and are not empty, numbers are finite."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()
    size: int | None = None
    """Length of a list; None for any."""
    not_empty: bool = False
    """Whether a list has at least one element."""
    distinct: bool = False
    """Whether no element of a list is there twice."""
    ascending: bool = False
    """Whether no element of a list is below the one before it."""
    texts: tuple[str, ...] = ()
    """Of a mapping without declared types, the keys that are texts."""
    names: bool = False
    """Whether the keys of a mapping become names of files or folders."""
    remedy: str | None = None
    """Instead of the sentence about the range."""

    def check(self, key: str, value: Any) -> None:
        """Raise a UserError that names `key` unless this allows `value`."""
        elements = value if isinstance(value, list | tuple) else (value,)
        if isinstance(value, dict):  # null leaves a name out
            elements = [*value, *(each for each in value.values() if each is not None)]
            require(not self.not_empty or len(elements) > len(value), key, value, "must not be empty")
        if elements is value:
            value = list(value)  # a tuple is written like a list
            if self.size is not None:
                remedy = self.remedy or f"must be {self.size} numbers"
                require(len(value) == self.size, key, value, remedy)
            must = f"must name at least one of {', '.join(self.choices)}" if self.choices else "must not be empty"
            require(not self.not_empty or bool(value), key, value, must)
            require(not self.distinct or len(value) == len(set(value)), key, value, "must not have a value twice")
        for element in elements:
            if isinstance(element, str):
                self._check_text(key, element)
            elif isinstance(element, int | float) and not isinstance(element, bool):
                require(math.isfinite(element), key, value, "must be a finite number")
                require(isinstance(element, float) or abs(element) < 2**63, key, value, "must be below 2**63")
                require(self._has(element), key, value, self.remedy or self._range(value))
        if self.ascending:
            require(value == sorted(value), key, value, "must be ascending, the smallest first")

    def _check_text(self, key: str, text: str) -> None:
        if self.choices:
            require_one_of(key, text, self.choices)
        require(text.strip() != "", key, text, "must not be empty")
        require(is_one_line(text), key, text, "must not contain line breaks or other control characters")

    def _has(self, number: float) -> bool:
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def _range(self, value: Any) -> str:
        must = "must all" if isinstance(value, list) else "must"
        return f"{must} {'lie' if self.range_words.startswith('in') else 'be'} {self.range_words}"

    @property
    def range_words(self) -> str:
        """Where numbers lie, in words: `at least 1`, `above 0`, `in [0, 1)`; empty if they lie anywhere."""
        with_low, with_high = self.at_least > self.above, self.at_most < self.below
        low, high = max(self.at_least, self.above), min(self.at_most, self.below)
        if high < math.inf:
            return f"in {'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
        return f"{'at least' if with_low else 'above'} {low}" if low > -math.inf else ""


def within(**allowed: Any) -> dict[str, Any]:
    """Metadata of a field that holds numbers; the arguments are those of `Allowed`."""
    return {"allowed": Allowed(**allowed)}


def argument(kind: type, **allowed: Any) -> Callable[[str], Any]:
    """The `type` of a number on a command line of `argparse`; what it may be is as for `within`."""

    def convert(text: str) -> Any:
        value = _scalar(text, kind)
        try:
            require(value is not None, "it", text, f"must be {WORDS[kind]}")
            Allowed(**allowed).check("it", value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return convert


def one_of(*choices: str, **allowed: Any) -> dict[str, Any]:
    """Metadata of a field that holds one or more of these texts."""
    return {"allowed": Allowed(choices=choices, **allowed)}


LOADER_KWARGS = {"allowed": Allowed(texts=("pretrained_weights", "config_path", "model_name"))}
"""Metadata of the arguments of a model loader: beside these texts, each loader knows its own types."""
NAMES = {"allowed": Allowed(names=True)}
"""Metadata of a mapping whose keys become names of files or folders."""
FRACTION = within(at_least=0, at_most=1)
BETWEEN_0_AND_1 = within(above=0, below=1)
CANDIDATES = within(above=0, not_empty=True, distinct=True)
NOT_NEGATIVE = within(at_least=0)
POSITIVE = within(above=0)
COUNT = within(at_least=1)
BETA = within(at_least=0, below=1)
SEED = within(at_least=0, below=2**32)
IMAGE_MEAN = within(at_least=0, at_most=1, remedy="must be numbers in [0, 1], one for each band")
IMAGE_STD = within(above=0, remedy="must be numbers above 0, one for each band")
DEVICE = one_of("auto", "cuda", "mps", "cpu")
DTYPE = one_of("float32", "bfloat16", "float16")
OPTIMIZERS = ("AdamW", "AdamW8bit")
"""See `optim.make_adamw`."""


@dataclass(frozen=True)
class LauncherConfig:
    """Where a Slurm job of `train_distributed.py` runs. null leaves a choice to the cluster."""

    num_nodes: int = field(metadata=COUNT)
    """Nodes of a job; 4 in the paper."""
    gpus_per_node: int = field(metadata=NOT_NEGATIVE)
    """GPUs, and processes, per node; 8 in the paper. 0 for CPU nodes."""
    tasks_per_node: int | None = field(metadata=COUNT)
    """Processes per node; null for one per GPU, or one without GPUs."""
    cpus_per_task: int | None = field(metadata=COUNT)
    """Processor cores per process: the data workers need some."""
    time_min: int | None = field(metadata=COUNT)
    """Time limit of one start of the job, in minutes. It is requeued when it gets there."""
    mem: str | None
    """Memory per node, such as 200G."""
    partition: str | None
    """Queue of the cluster."""
    account: str | None
    """Who is charged for the time."""
    qos: str | None
    """Quality of service, by which the cluster ranks and limits jobs."""
    constraint: str | None
    """Features that nodes must have, such as the kind of their GPUs."""
    exclude: str | None
    """Nodes to avoid."""
    signal_delay_s: int = field(metadata=COUNT)
    """Seconds before the time limit at which the run saves and is requeued; longer than a step and a save.
    Slurm may ask up to a minute earlier."""
    setup: list[str]
    """Shell lines before the run, such as `module load cuda`."""
    sbatch: dict[str, Any]
    """Further `#SBATCH` options by name; `true` for one without a value, `false` to leave one of ours out."""

    def __post_init__(self) -> None:
        """Check that the job is not stopped when it starts."""
        require(
            self.time_min is None or self.signal_delay_s < 60 * self.time_min,
            "launcher.signal_delay_s",
            self.signal_delay_s,
            f"must be less than launcher.time_min={self.time_min} minutes, or the job is stopped when it starts",
        )

    @property
    def num_tasks_per_node(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass(frozen=True)
class CheckpointingConfig:
    """When the training state is saved."""

    period: int = field(metadata=COUNT)
    """Steps between checkpoints; one is also saved at the end and when a signal asks the run to stop."""
    max_to_keep: int = field(metadata=COUNT)
    """How many of the newest checkpoints stay on disk."""
    async_save: bool
    """Write checkpoints while training goes on; needs host memory for one more copy of weights and optimizer state."""


@dataclass(frozen=True)
class ProbeConfig:
    """Scores of the network that is probed on a small labelled set, computed in between steps; see probe.py."""

    every: int = field(metadata=NOT_NEGATIVE)
    """Steps between probes; 0 for none. Two sets of 1000 images took 1.7 % of the time at a period of 250 steps of 128
    images (configs/imagenette.yaml on a CPU)."""
    train_dataset: str | None
    """Data URL of images with class labels, to fit on."""
    test_dataset: str | None
    """Data URL of images with class labels, to score."""
    max_images: int = field(metadata=within(at_least=2))
    """Images of each set, evenly spaced; they stay in memory."""
    k: int = field(metadata=COUNT)
    """Neighbours that vote."""

    def __post_init__(self) -> None:
        """Check that there is something to probe with."""
        for key in ("train_dataset", "test_dataset"):
            require(
                self.every == 0 or getattr(self, key) is not None,
                f"train.probe.{key}",
                None,
                "is needed for train.probe.every > 0: a data URL of labelled images",
            )


@dataclass(frozen=True)
class TrainConfig:
    """The run itself: where it writes, on what it runs, how often it reports."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, exports, logs. One run at a time."""
    device: str = field(metadata=DEVICE)
    """auto (cuda, then mps, then cpu), or one of them."""
    auto_resume: bool
    """Continue from the newest checkpoint in output_dir if there is one."""
    resume_from: str | None
    """Continue from this checkpoint folder instead of the newest one, for example after the newest was damaged."""
    init_from: str | None
    """Path or URL of weights (an export, or a released model) from which the networks start; null for random ones. What
    stays random is in the log. Without effect once the run has a checkpoint."""
    seed: int = field(metadata=SEED)
    """Seed of initial weights, data order, crops, masks and drop-path. All are functions of it and of the step."""
    nan_check_period: int = field(metadata=NOT_NEGATIVE)
    """Steps between looks at whether a loss or gradient was ever NaN or infinite; the run stops if so. 0 looks only
    before it saves or evaluates."""
    log_loss_every: int = field(metadata=COUNT)
    """Steps between log lines and metric records, averaged over the steps since the last one."""
    health_every: int = field(metadata=NOT_NEGATIVE)
    """Steps between the costlier health metrics (effective rank and norms of teacher features). 0 turns them off."""
    loggers: list[str] = field(metadata=one_of("tensorboard", "wandb", "mlflow", "trackio"))
    """Besides metrics.jsonl: any of tensorboard, wandb, mlflow, trackio."""
    profiling: bool
    """Write a profiler trace and a memory snapshot of a few early steps to output_dir/profile."""
    checkpointing: CheckpointingConfig
    probe: ProbeConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """A value for every step: zeros, a linear warm-up, then part of a half cosine; see `optim.scheduled`."""

    start_warmup_value: float = field(metadata=NOT_NEGATIVE)
    """Value at the first warm-up step."""
    base_value: float = field(metadata=NOT_NEGATIVE)
    """Value at the end of the warm-up, where the cosine starts."""
    final_value: float = field(metadata=NOT_NEGATIVE)
    """Where a full cosine would end, and the value past the last step."""
    warmup_iters: int | float = field(metadata=NOT_NEGATIVE)
    """Steps of the linear warm-up, or, with a decimal point, a fraction of total_iters in [0, 1] (0.1 in the paper)."""
    freeze_iters: int = field(metadata=NOT_NEGATIVE)
    """Steps at 0 before the warm-up."""
    truncate_cos: float = field(metadata=FRACTION)
    """Fraction of the half cosine that is run through, 0.8 in the paper: the learning rate ends above final_value."""

    def warmup_steps(self, total_iters: int) -> int:
        """`warmup_iters` in steps."""
        return round(self.warmup_iters * total_iters) if isinstance(self.warmup_iters, float) else self.warmup_iters

    def check(self, key: str, total_iters: int) -> None:
        """Raise unless the schedule fits into `total_iters` steps."""
        require_fraction(f"{key}.warmup_iters", self.warmup_iters)
        steps = self.warmup_steps(total_iters)
        require(
            steps + self.freeze_iters <= total_iters,
            f"{key}.warmup_iters",
            self.warmup_iters,
            f"with freeze_iters={self.freeze_iters} it does not fit into optim.total_iters={total_iters}; "
            "give the warm-up as a fraction, for example 0.1",
        )


@dataclass(frozen=True)
class StartConfig:
    """How what comes from `train.init_from` learns beside what starts random; without it, 1, 1, 0 and 0."""

    encoder_lr_mult: float = field(metadata=NOT_NEGATIVE)
    """Learning-rate multiplier of the encoder."""
    predictor_lr_mult: float = field(metadata=NOT_NEGATIVE)
    """Learning-rate multiplier of the predictor."""
    frozen_iters: int | float = field(metadata=NOT_NEGATIVE)
    """Steps in which the encoder stays what it is while the rest learns to read it, or, with a decimal point, a
    fraction of total_iters."""
    ramp_iters: int | float = field(metadata=NOT_NEGATIVE)
    """Steps after these in which its learning rate rises from 0 to what it is else; a fraction likewise."""

    @property
    def tells_parts_apart(self) -> bool:
        """Whether encoder, predictor and the rest learn differently."""
        return (self.encoder_lr_mult, self.predictor_lr_mult, self.frozen_iters, self.ramp_iters) != (1, 1, 0, 0)

    def steps(self, total_iters: int) -> tuple[int, int]:
        """Steps at which the encoder begins to learn and has its own learning rate."""
        frozen, ramp = (
            round(number * total_iters) if isinstance(number, float) else number
            for number in (self.frozen_iters, self.ramp_iters)
        )
        return frozen, frozen + ramp

    def check(self, total_iters: int) -> None:
        """Raise unless the encoder learns before `total_iters` steps are over."""
        for name in ("frozen_iters", "ramp_iters"):
            require_fraction(f"optim.start.{name}", getattr(self, name))
        end = self.steps(total_iters)[1]
        remedy = f"the encoder would have its learning rate at step {end} of optim.total_iters={total_iters}"
        require(end <= total_iters, "optim.start", f"{self.frozen_iters} + {self.ramp_iters} steps", remedy)


@dataclass(frozen=True)
class OptimConfig:
    """Length of training, batch, and the student's optimizer; a method adds its own keys and schedules."""

    total_iters: int = field(metadata=COUNT)
    """Optimizer updates of the whole training."""
    batch_size_per_gpu: int = field(metadata=COUNT)
    """Images per forward pass on one rank; global batch = this x accumulation_steps x ranks."""
    accumulation_steps: int = field(metadata=COUNT)
    """Forward passes per update: a larger batch in the same memory."""
    clip_grad: float | None = field(metadata=POSITIVE)
    """Largest norm of the student's gradient, or null for no clipping (the paper's choice)."""
    optimizer: str = field(metadata=one_of(*OPTIMIZERS))
    """AdamW; or AdamW8bit, which keeps its averages in 8 bits instead of 32: 2 bytes per weight instead of 8, for an
    update that takes longer. A run may change from one to the other."""
    betas: tuple[float, float] = field(metadata=BETA)
    """How long it remembers gradients and their squares: decay per update of each average."""
    lr_schedule: ScheduleConfig
    """Learning rate, of all weights that have no multiplier."""

    def __post_init__(self) -> None:
        """Check what is counted in steps."""
        self.check_length()

    def check_length(self) -> None:
        """Raise unless what is counted in steps fits into total_iters."""
        self.lr_schedule.check("optim.lr_schedule", self.total_iters)


@dataclass(frozen=True)
class EpochsOptimConfig(OptimConfig):
    """The same for methods that may count in epochs."""

    epochs: float | None = field(metadata=POSITIVE)
    """Instead of total_iters: passes over data.images_per_epoch images, each without a last part that fills no batch.
    null: total_iters counts."""

    def __post_init__(self) -> None:
        """Check what is counted in steps, unless their number is not known before `training.with_length`."""
        if self.epochs is None:
            super().__post_init__()


@dataclass(frozen=True)
class ImagesConfig:
    """Images and crops; a method adds its masks."""

    dataset: str | list[str] | dict[str, float | None] = field(metadata=within(above=0, not_empty=True, distinct=True))
    """Data URL (README lists the sources), or the path of a folder of images or of an archive. Pretraining also takes
    several, as a list, or as a mapping with the weight of each; null as weight leaves one out."""
    crop_scale: tuple[float, float] = field(metadata=within(above=0, at_most=1, ascending=True))
    """Area range of the random crop, as fractions of the image; of crops that are no squares, of the largest box of
    their shape in the image."""
    images_size: int | tuple[int, int] = field(metadata=COUNT)
    """Crop in pixels, multiples of model.patch_size: the side of a square, or [height, width]."""
    do_hflip: bool
    """Flip half of the images."""
    stream_shuffle_block: int = field(metadata=COUNT)
    """Streaming data: samples that are read ahead and shuffled together. 1 keeps the order of the stream."""
    stream_partitions: int | None = field(metadata=COUNT)
    """Streaming data: independent streams per rank, read by the loader's workers in turn. The order of the images
    depends on it. null: efficiency.dataloader_num_workers, or 20 if that is null too."""
    max_bad_fraction: float = field(metadata=FRACTION)
    """Largest fraction of unreadable images. The run stops once it is beyond doubt that more are: with 0.05, after 120
    images or so if 20 % cannot be read."""
    decode: str = field(metadata=one_of("cpu", "gpu"))
    """cpu: the loader's workers decode. gpu: JPEG files go to the CUDA device, which decodes and crops them. The crops
    are the same boxes; colours differ by a few grey levels, since the decoders do."""

    def __post_init__(self) -> None:
        """Write squares as one number, so that [64, 64] is 64 to checkpoints and exports too."""
        object.__setattr__(self, "images_size", as_written(self.images_size))

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of a crop, pixels."""
        return both_sides(self.images_size)

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Rows and columns of patches of a crop."""
        height, width = self.crop_size
        return height // patch_size, width // patch_size

    def size_words(self, patch_size: int) -> str:
        """Crop and patches, for people."""
        rows, columns = self.grid(patch_size)
        px = " x ".join(str(side) for side in dict.fromkeys(self.crop_size))
        return f"{px} px, {rows} x {columns} = {rows * columns} patches of {patch_size} px"

    @property
    def only_dataset(self) -> str:
        """The data URL, for what is trained on one data set. Raises: UserError if there are several."""
        if isinstance(self.dataset, str):
            return self.dataset
        raise UserError(
            f"data.dataset={self.dataset!r}: only pretraining mixes several data sets; give one folder or data URL"
        )

    @property
    def bands_are_known(self) -> bool:
        """Whether range, mean and deviation are numbers; else they are to be measured."""
        return True

    @property
    def normalisation(self) -> Normalisation:
        """How images become what the network sees."""
        return Normalisation()

    @property
    def bands(self) -> Bands:
        """What is made of the images' values."""
        return RGB8

    @property
    def turns(self) -> Turns:
        """How crops are turned, beside being mirrored."""
        return UPRIGHT


@dataclass(frozen=True)
class PretrainingImagesConfig(ImagesConfig):
    """The same for methods that learn from images of any bands and depth."""

    value_range: tuple[float, float] | str | None = field(metadata=one_of("auto", at_least=-(2**52), at_most=2**52))
    """The stored values that become 0 and 1; others are clipped. null: 8-bit images as they are; deep grey by 16 bits,
    or, of floats, by 0 to 1. auto: null if a sample of the images has 8 bits, else what it shows, without the darkest
    and brightest thousandth; measured once, and written to the run's config.yaml."""
    mean: list[float] | str = field(metadata=one_of("auto", at_least=0, at_most=1))
    """Of each band, in [0, 1], by which images are normalised: as many numbers as model.in_chans. auto: measured once
    on a sample that follows from train.seed, and written to the run's config.yaml."""
    std: list[float] | str = field(metadata=one_of("auto", above=0))
    """The deviation of each band, likewise."""
    do_vflip: bool
    """Turn half of the images upside down: for images without an upper side, from above or of cells."""
    do_turns: bool
    """Turn images by none to three quarters, each as often: likewise."""

    def __post_init__(self) -> None:
        """Check the range, that crops can be turned, and that 8-bit RGB alone, and nothing turned, is decoded on a
        GPU."""
        super().__post_init__()
        given = self.value_range
        if given is not None and not isinstance(given, str):
            remedy = "must be [lowest, highest], the first below the second"
            require(given[0] < given[1], "data.value_range", list(given), remedy)
        if isinstance(self.mean, list | tuple) and isinstance(self.std, list | tuple):
            remedy = f"must be as many numbers as data.mean has, {len(self.mean)}"
            require(len(self.mean) == len(self.std), "data.std", list(self.std), remedy)
        is_rgb8 = given is None and (self.mean == "auto" or len(self.mean) == 3)
        require(self.decode == "cpu" or is_rgb8, "data.decode", self.decode, "is for 8-bit RGB; use data.decode=cpu")
        remedy = (
            f"quarter turns would swap height and width of data.images_size={as_typed(self.images_size)}; use "
            "data.do_turns=false, or squares"
        )
        require(not self.do_turns or isinstance(self.images_size, int), "data.do_turns", self.do_turns, remedy)
        remedy = "turns no images; use data.decode=cpu"
        require(self.decode == "cpu" or self.turns == UPRIGHT, "data.decode", self.decode, remedy)

    @property
    def bands_are_known(self) -> bool:
        """See `ImagesConfig.bands_are_known`."""
        return "auto" not in (self.value_range, self.mean, self.std)

    @property
    def normalisation(self) -> Normalisation:
        """How images become what the network sees, once that is measured."""
        assert self.bands_are_known, "they are to be measured first: training.with_normalisation"
        return Normalisation.of(dataclasses.asdict(self))

    @property
    def bands(self) -> Bands:
        """What is made of the images' values."""
        return Bands(len(self.mean), self.normalisation.value_range)

    @property
    def turns(self) -> Turns:
        """See `ImagesConfig.turns`."""
        return Turns(self.do_vflip, self.do_turns)


LATER_KEYS: dict[str, Any] = {
    "optim": {"start": {"encoder_lr_mult": 1.0, "predictor_lr_mult": 1.0, "frozen_iters": 0, "ramp_iters": 0}},
    "efficiency": {"offload_activations": False},
    "data": {
        "value_range": None,
        "mean": list(Normalisation.mean),
        "std": list(Normalisation.std),
        "do_vflip": False,
        "do_turns": False,
    },
}
"""Keys of all methods that earlier checkpoints lack, with the values that those were trained with."""


@dataclass(frozen=True)
class EpochsImagesConfig(ImagesConfig):
    """The same for methods that may count in epochs."""

    images_per_epoch: int | None = field(metadata=COUNT)
    """How many images an epoch is, for optim.epochs and for the log; null where nobody counts in epochs."""


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of an encoder with a table of sines and cosines for positions; a method may add its own keys."""

    patch_size: int = field(metadata=COUNT)
    """Side of a patch in pixels."""
    in_chans: int = field(metadata=COUNT)
    """Bands of the images."""
    embed_dim: int = field(metadata=COUNT)
    """Channels of a token."""
    depth: int = field(metadata=COUNT)
    """Blocks."""
    num_heads: int = field(metadata=COUNT)
    """Attention heads of a block, which share its channels."""
    mlp_dim: int | None = field(metadata=COUNT)
    """Hidden channels of the MLPs; null for 4 x embed_dim."""

    def __post_init__(self) -> None:
        """Check that positions and heads divide the channels."""
        require_width("model", self.embed_dim, self.num_heads)


def require_width(section: str, embed_dim: int, num_heads: int) -> None:
    """Raise unless positions of sines and cosines, and heads, divide `<section>.embed_dim`."""
    for number, what in ((4, "4: sine and cosine of row and column"), (num_heads, f"the {num_heads} heads")):
        require(embed_dim % number == 0, f"{section}.embed_dim", embed_dim, f"must be a multiple of {what}")


def require_whole_patches(images: ImagesConfig, patch_size: int) -> None:
    """Raise unless `model.patch_size` divides `data.images_size`."""
    if any(side % patch_size for side in images.crop_size):
        nearest = [max(patch_size, round(side / patch_size) * patch_size) for side in images.crop_size]
        must = "must be a multiple" if isinstance(images.images_size, int) else "both must be multiples"
        raise UserError(
            f"data.images_size={as_typed(images.images_size)}: {must} of model.patch_size={patch_size}; the nearest is "
            f"{as_typed(nearest)}"
        )


@dataclass(frozen=True)
class CompileConfig:
    """How `torch.compile` treats one function."""

    disable: bool
    """True runs it eagerly."""
    dynamic: bool | None
    """Passed to torch.compile; null lets it decide."""


@dataclass(frozen=True)
class CompilationConfig:
    """The two compiled functions of the step."""

    do_teacher: CompileConfig
    do_student: CompileConfig
    cuda_graphs: bool
    """Replay each compiled function as a CUDA graph, for models whose kernels are shorter than their launches. Costs
    memory: results and temporaries get addresses of their own. For one process, or fsdp none; without a CUDA device it
    does nothing but say so in the log."""

    def __post_init__(self) -> None:
        """Check rules between the keys."""
        require(
            not self.cuda_graphs or not (self.do_teacher.disable and self.do_student.disable),
            "efficiency.compilation.cuda_graphs",
            self.cuda_graphs,
            "only compiled functions become graphs; set do_teacher.disable=false and do_student.disable=false",
        )


@dataclass(frozen=True)
class RematerializationConfig:
    """Which operators of a transformer block run again in the backward pass instead of keeping their results."""

    enabled: bool
    """Recompute at all. false keeps every result: faster, for more memory."""
    default: bool
    """Whether an operator that `policy` does not name is recomputed."""
    policy: dict[str, bool]
    """Operator name (`aten::mm`) -> recompute?"""


@dataclass(frozen=True)
class EfficiencyConfig:
    """Speed, memory and precision. Nothing here but the precision changes what is computed."""

    param_dtype: str = field(metadata=DTYPE)
    """Precision of matmuls and activations: bfloat16, float16 or float32. Weights and optimizer stay float32."""
    attention: str = field(metadata=one_of("sdpa", "xformers"))
    """Whose attention kernels: torch's, which choose among several, or those of the optional package xformers."""
    teacher_fp8: bool
    """Compute the linear layers of the teacher's blocks in 8-bit floats, on an NVIDIA GPU of compute capability 8.9 or
    newer. It changes the targets a little."""
    reduce_dtype: str = field(metadata=DTYPE)
    """Precision in which gradients are averaged over ranks."""
    fsdp: str = field(metadata=one_of("simple", "fully_shard", "none"))
    """How weights are divided over ranks: simple (ours: each rank holds its part, gathered when used), fully_shard
    (torch's FSDP2) or none (whole weights everywhere, gradients averaged)."""
    fsdp_bucket_mib: float = field(metadata=NOT_NEGATIVE)
    """simple, compiled: gathered weights per collective, in MiB. none: averaged gradients per collective."""
    fsdp_prefetch: int = field(metadata=NOT_NEGATIVE)
    """simple, compiled: buckets of weights that are gathered ahead of the one in use."""
    grad_scaler: bool
    """Scale the loss and skip steps whose gradients overflow; for float16."""
    grad_scaler_growth_interval: int = field(metadata=COUNT)
    """Steps without overflow after which the scale doubles."""
    dataloader_num_workers: int | None = field(metadata=NOT_NEGATIVE)
    """Processes that read and decode images, per rank. 0 decodes in the training process; null: as many as the rank has
    cores, up to 20."""
    cache_dataset: bool
    """Keep the list of files of an image folder on disk, so that later starts need not read the whole tree."""
    compilation: CompilationConfig
    rematerialization: RematerializationConfig
    offload_activations: bool
    """Keep what the student's blocks need in the backward pass in the host's memory until then: slower, in less memory
    of a CUDA device. With rematerialization, the inputs of the blocks."""

    def __post_init__(self) -> None:
        """Check which precisions, and which ways to save memory, go together."""
        require(
            not self.teacher_fp8 or self.param_dtype == "bfloat16",
            "efficiency.teacher_fp8",
            self.teacher_fp8,
            f"results are bfloat16; set efficiency.param_dtype=bfloat16 (it is {self.param_dtype}), or this to false",
        )
        require(
            self.grad_scaler or self.param_dtype != "float16",
            "efficiency.grad_scaler",
            self.grad_scaler,
            "float16 gradients underflow without it; set it to true, or use efficiency.param_dtype=bfloat16",
        )
        if self.offload_activations:
            self._check_offload()

    def _check_offload(self) -> None:
        require(
            self.compilation.do_student.disable,
            "efficiency.offload_activations",
            True,
            "compiled code decides itself what it keeps; set efficiency.compilation.do_student.disable=true, or this "
            "to false",
        )
        recomputed = self.rematerialization
        kept = [operator for operator, again in recomputed.policy.items() if not again]
        if recomputed.enabled and (kept or not recomputed.default):
            raise UserError(
                "efficiency.offload_activations=True: little would leave the device, for what recomputation keeps "
                f"stays ({', '.join([*kept[:2], '...'])}); set efficiency.rematerialization.enabled=false, and all "
                "that blocks keep leaves it, or default and each entry of policy there to true, and the blocks' "
                "inputs do, from which the rest is computed again"
            )


@dataclass(frozen=True)
class EvalConfig:
    """One named set of evaluations of a run."""

    period: int = field(metadata=NOT_NEGATIVE)
    """Steps between evaluations; 0 for none before the end."""
    final: bool
    """Whether it also runs after the last step."""
    model_to_eval: str
    """Which of the networks that a run exports, such as student_ema."""
    model_setup_script: str
    """Model file whose loader builds the model."""
    eval_config: dict[str, dict[str, Any] | None] = field(metadata=NAMES)
    """Name -> `file`, a script, and its keys, or for a name of default_eval_config.py only the keys that change."""
    where: str = field(metadata=one_of("auto", "process", "inline", "slurm"))
    """process: on this machine, while training goes on. inline: on this machine, while training waits. slurm: as a job.
    auto: slurm for a training that is a Slurm job, else process."""
    download: bool
    """Whether evaluations run whose data is not on this machine when the training starts. true for each set that your
    files or the command line name, unless they say otherwise."""

    def __post_init__(self) -> None:
        """Check the evaluations."""
        for name, entry in chosen_evals(self.eval_config).items():
            known = bool({"file", "script"} & entry.keys())
            key = f"evals.*.eval_config.{name}"
            require(known, key, entry, f"needs file, or a name of {', '.join(sorted(EVALS))}")
            check_evaluation(key, entry)


def chosen_evals(eval_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Evaluations of a set, written out: a name of default_eval_config.py stands for what that file has."""
    return {name: EVALS.get(name, {}) | dict(entry or {}) for name, entry in eval_config.items()}


def check_evaluation(key: str, entry: Mapping[str, Any]) -> Path:
    """The script of an evaluation, once it is sure that it exists and has the keys that are given.

    Args:
        key: of the entry, for messages.
        entry: `file`, and keys of that script.

    Raises: UserError naming the key.
    """
    if "script" in entry:
        raise UserError(f"{key}: {unknown_key('script', ('file',))}")
    require(isinstance(entry.get("file"), str), f"{key}.file", entry.get("file"), "must name an evaluation script")
    script = find_file(entry["file"], f"{key}.file")
    known = script_keys(script)
    for name in entry:
        if known is not None and name not in known | {"file"}:
            raise UserError(f"{key}: {unknown_key(name, sorted(known))}")
    return script


def find_file(path_name: str, key: str) -> Path:
    """A file as seen from the current folder, else from that of this one."""
    for path in (Path(path_name), ROOT / path_name):
        if path.is_file():
            return of_this_code(path)
    raise UserError(f"{key}={path_name}: there is no such file")


_parse = functools.lru_cache(maxsize=16)(ast.parse)  # a configuration names the same few scripts again and again


def script_keys(script: Path) -> set[str] | None:
    """Keys of an evaluation script, read from its source and not run; None where they cannot be told from that."""
    keys: set[str] = set()
    configs = {"FrozenModelConfig", "EvaluationConfig"}
    for path in (ROOT / "evaluation.py", script):
        try:
            tree = _parse(path.read_text())
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read as Python: {error}") from error
        for node in tree.body:
            bases = {ast.unparse(base).rpartition(".")[2] for base in getattr(node, "bases", ())}
            if not isinstance(node, ast.ClassDef) or not ({node.name} | bases) & configs:
                continue
            if bases - configs:
                return None
            configs.add(node.name)
            fields = (field for field in node.body if isinstance(field, ast.AnnAssign))
            keys |= {ast.unparse(f.target) for f in fields if not ast.unparse(f.annotation).startswith("ClassVar")}
    return keys if len(configs) > 2 else None


@dataclass(frozen=True)
class TrainingConfig:
    """The sections that every training has; a method adds its own."""

    EXPORTS: ClassVar[tuple[str, ...]] = ()
    """Names of the networks that a training of this method exports, the one to use first."""

    launcher: LauncherConfig
    train: TrainConfig
    optim: OptimConfig
    data: ImagesConfig
    efficiency: EfficiencyConfig
    evals: dict[str, EvalConfig | None] | None = field(metadata=NAMES)
    """Named sets of evaluations; null for none, evals.<name>=null to leave one out."""

    def __post_init__(self) -> None:
        """Check that what is evaluated is exported, and that all bands have a mean and a deviation."""
        for key in ("mean", "std") if isinstance(self.data, PretrainingImagesConfig) else ():
            given = getattr(self.data, key)
            remedy = (
                f"must be one number for each of model.in_chans={self.in_chans} bands; data.{key}=auto measures them"
            )
            require(given == "auto" or len(given) == self.in_chans, f"data.{key}", given, remedy)
        for name, entry in (self.evals or {}).items():
            if entry is not None:
                require_one_of(f"evals.{name}.model_to_eval", entry.model_to_eval, self.EXPORTS)

    @property
    def in_chans(self) -> int:
        """Bands of the images; three for a model without such a key."""
        return getattr(getattr(self, "model", None), "in_chans", 3)

    def as_trained(self, saved: Mapping[str, Any]) -> Self:
        """The configuration with what a training has written into its own, to export what it has learned.

        Args:
            saved: that of its checkpoint, as nested dicts; sections may be missing.
        """
        return self


@dataclass(frozen=True)
class EpochsConfig(TrainingConfig):
    """The sections of a training that may be as long as so many epochs; see `training.with_length`."""

    optim: EpochsOptimConfig
    data: EpochsImagesConfig

    def __post_init__(self) -> None:
        """Check that epochs can be counted."""
        super().__post_init__()
        require(
            self.optim.epochs is None or self.data.images_per_epoch is not None,
            "optim.epochs",
            self.optim.epochs,
            "needs data.images_per_epoch, the number of images; or give optim.total_iters",
        )

    def as_trained(self, saved: Mapping[str, Any]) -> Self:
        """Also with the length of that training: how many steps an epoch has depends on its number of processes."""
        cfg, total_iters = super().as_trained(saved), section_of(saved, "optim").get("total_iters")
        if cfg.optim.epochs is None or total_iters is None:
            return cfg
        return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, total_iters=total_iters))


ConfigT = TypeVar("ConfigT")


def load_config(schema: type[ConfigT], default_path: Path | None, sources: list[str]) -> ConfigT:
    """Merge the default file, then `sources` in order, into a checked `schema` object.

    Args:
        schema: a frozen dataclass, without defaults if `default_path` has them.
        default_path: YAML file that gives every key a value; None if the dataclass does.
        sources: paths of YAML files and `a.b=c` overrides, as typed on the command line.

    Raises: UserError naming the key or file, its value and what to do instead.
    """
    merged: dict[str, Any] = {}
    typed: dict[str, Any] = {}  # the same without the default file, which may be given as a source as well
    said_steps: str | None = None  # the source that says how many, if none says after it how many epochs
    for source in ([] if default_path is None else [str(default_path)]) + sources:
        values = read_source(schema, source)
        merged = merge(merged, values)
        length = values.get("optim") if issubclass(schema, EpochsConfig) else None
        if length and not length.keys().isdisjoint(("total_iters", "epochs")):
            said_steps = None if "epochs" in length else source
        if default_path is None or not _is_file(source) or not Path(source).samefile(default_path):
            typed = merge(typed, values)
    if issubclass(schema, TrainingConfig):
        _allow_downloads(merged, typed)
    if said_steps is not None and merged["optim"].get("epochs") is not None:
        optim = merged["optim"]
        where = f"{said_steps}: optim.total_iters={optim['total_iters']}" if _is_file(said_steps) else said_steps
        raise UserError(
            f"{where}: the length is that of optim.epochs={optim['epochs']:g} in the configuration; add "
            "optim.epochs=null"
        )
    return build(schema, merged)


def read_source(schema: type, source: str) -> dict[str, Any]:
    """What a YAML file or an override gives, as nested dicts of values that have the types of `schema`.

    Raises: UserError for what cannot be read, a key that `schema` lacks, or a value of another type.
    """
    if "=" in source and not _is_file(source):
        reader, node = _Reader(schema, ""), _read_override(source, schema)
    else:
        reader, node = _Reader(schema, f"{source}: "), _read_yaml(Path(source))
    return {} if node is None else reader.read(node, schema, "")


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) and Path(source).is_file()


def section_of(saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a saved configuration, which may be any other's, and damaged; empty if there is none."""
    section = saved.get(name)
    return section if isinstance(section, dict) else {}


def merge(base: Any, top: Any) -> Any:
    """`top`, and what `base` has beside it if both are mappings."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: merge(base.get(key), value) for key, value in top.items()}


def build(kind: Any, value: Any, key: str = "", allowed: Allowed | None = None) -> Any:
    """A dataclass from nested dicts of values that have its types.

    Args:
        kind: the dataclass, or the declared type of what is below it.
        value: dict, or what is below it.
        key: dotted key of `value`.
        allowed: what its field may hold.

    Raises: UserError for a key that is missing or holds what it may not.
    """
    kinds = members(kind)
    if isinstance(value, dict) and dataclasses.is_dataclass(kinds[0]):
        return _build_section(kinds[0], value, key)
    if isinstance(value, dict) and typing.get_origin(kinds[0]) is dict:
        element = typing.get_args(kinds[0])[1]
        for name in value if allowed is not None and allowed.names else ():
            require_name(f"{key}.{name}", name)
        return {name: each if element is Any else build(element, each, f"{key}.{name}") for name, each in value.items()}
    if kind is not Any or isinstance(value, str):
        (allowed or Allowed()).check(key, value)
    is_tuple = any(typing.get_origin(each) is tuple for each in kinds)
    return tuple(value) if is_tuple and isinstance(value, list) else value


def allowed_of(schema: Any, name: str) -> Allowed | None:
    """What a field may hold, as stated by the class or by one that it inherits from; None if nothing is stated."""
    stated = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in schema.__mro__)
    return next((each.metadata["allowed"] for each in stated if each is not None and each.metadata), None)


def _build_section(schema: Any, tree: dict[str, Any], prefix: str) -> Any:
    values, kinds = {}, typing.get_type_hints(schema)
    for each in dataclasses.fields(schema):
        key = f"{prefix}.{each.name}" if prefix else each.name
        is_given = tree.get(each.name, MISSING) != MISSING
        has_default = each.default not in (dataclasses.MISSING, MISSING)
        if is_given:
            values[each.name] = build(kinds[each.name], tree[each.name], key, allowed_of(schema, each.name))
        elif not has_default and each.default_factory is dataclasses.MISSING:
            raise UserError(f"{key}= must be given; --help shows a whole command")
    return schema(**values)


def _allow_downloads(merged: dict[str, Any], typed: dict[str, Any]) -> None:
    """Let the sets of evaluations in `typed` download their data, unless that says otherwise."""
    for name, keys in (typed.get("evals") or {}).items():
        if isinstance(keys, dict) and "download" not in keys:
            merged["evals"][name]["download"] = True


def to_yaml(cfg: object) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    return dump_yaml(dataclasses.asdict(cfg))  # pyright: ignore[reportArgumentType]  # an instance of a schema


def dump_yaml(tree: Any) -> str:
    """Nested dicts, lists and plain values as YAML in which every reader finds the same texts and numbers."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def changed_keys(old: object, new: object) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two nested dicts, as `a.b` -> (old, new); a key that one side lacks is None."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# From text to values. YAML's syntax is kept, its guesses about scalars are not: OmegaConf and PyYAML take `12:30` for
# 750, `010` for 8 and `2024_11_05` for a number, and read `${...}` and `???` into texts.

TEXT, NULL = "tag:yaml.org,2002:str", ("null", "Null", "NULL", "~", "")
TRUE, FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
BOOLEANS = {text: text in TRUE for text in (*TRUE, *FALSE)}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
REAL = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
WORDS = {int: "a whole number, such as 1000", float: "a number", bool: "true or false", str: "a text"}


class _Loader(yaml.SafeLoader):
    """Composes nodes; values are made of them by the declared type of their key."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and node is not None and node.end_mark is None:
            raise yaml.MarkedYAMLError(problem="an alias is part of what it stands for", problem_mark=node.start_mark)
        if isinstance(node, yaml.Node) and not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not supported", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or (key.value in names and key.value != "<<"):
                raise yaml.MarkedYAMLError(problem="a key is no text or is there twice", problem_mark=key.start_mark)
            names.add(key.value)
        self.flatten_mapping(node)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that some reader of YAML takes for a number; PyYAML itself would leave `1e3` bare."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?=.*[0-9]){REAL.pattern}$"), [*"-+.0123456789"])


def members(kind: Any) -> list[Any]:
    """The types of a union, except None."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [each for each in typing.get_args(kind) if each is not type(None)] if is_union else [kind]


def may_be_null(kind: Any) -> bool:
    """Whether null is among the values of a type."""
    return kind is Any or type(None) in typing.get_args(kind)


def _element_kind(kind: Any, name: str, allowed: Allowed) -> Any:
    """The declared type of what is called `name` in a mapping."""
    return str | None if name in allowed.texts else typing.get_args(kind)[1] if kind is not Any else Any


class _Reader:
    """Makes plain values of YAML nodes, each of the type that `schema` declares for its key."""

    def __init__(self, schema: type, source: str) -> None:
        self.schema, self.source = schema, source

    def read(self, node: yaml.Node, kind: Any, key: str, allowed: Allowed | None = None) -> Any:
        """The value of a node. A section becomes a dict of what the node has.

        Args:
            node: from a YAML file or the command line.
            kind: declared type.
            key: dotted key.
            allowed: what its field may hold.

        Raises: UserError if the node is of another type, or an unknown key.
        """
        allowed = allowed or Allowed()
        if _is_null(node) and may_be_null(kind):
            return None
        if kind is Any:
            return _plain(node)
        kinds = members(kind)
        if isinstance(node, yaml.ScalarNode):
            if not _is_null(node):
                for scalar in (bool, int, float, str):
                    value = _scalar(node.value, scalar) if scalar in kinds else None
                    if value is not None:
                        return value
            raise self._error(node, kind, key)
        for each in kinds:
            if isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(each):
                return self._section(node, each, key)
            if isinstance(node, yaml.MappingNode) and typing.get_origin(each) is dict:
                return {
                    name.value: self.read(value, _element_kind(each, name.value, allowed), f"{key}.{name.value}")
                    for name, value in node.value
                }
            if isinstance(node, yaml.SequenceNode) and typing.get_origin(each) in (list, tuple):
                elements = typing.get_args(each)
                if typing.get_origin(each) is tuple and len(elements) != len(node.value):
                    break
                return [self.read(value, elements[0], f"{key}.{i}") for i, value in enumerate(node.value)]
        raise self._error(node, kind, key)

    def _section(self, node: yaml.MappingNode, schema: Any, prefix: str) -> dict[str, Any]:
        kinds, tree = typing.get_type_hints(schema), {}
        fields = {each.name for each in dataclasses.fields(schema)}
        for name, value in node.value:
            key = f"{prefix}.{name.value}" if prefix else name.value
            if name.value not in fields:
                raise UserError(self.source + unknown_key(key, list(_schema_keys(self.schema))))
            tree[name.value] = self.read(value, kinds[name.value], key, allowed_of(schema, name.value))
        return tree

    def _error(self, node: yaml.Node, kind: Any, key: str) -> UserError:
        shown = node.value if isinstance(node, yaml.ScalarNode) else _plain(node)
        kinds = [each for each in members(kind) if each is not int or float not in members(kind)]
        words = [kind_words(each) for each in kinds] + (["null"] if may_be_null(kind) else [])
        at = f"{key}={shown}" if key else str(shown)
        return UserError(f"{self.source}{at}: must be {' or '.join(words)}")


def kind_words(kind: Any) -> str:
    """What a type other than null is called, with an example after a comma."""
    elements = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        like = "whole numbers, such as [224,448]" if elements[0] is int else "numbers, such as [0.9,0.95]"
        return f"a list of {len(elements)} {like}"
    if typing.get_origin(kind) is list:
        return "a list of " + ("texts, such as [a,b]" if elements[0] is str else "numbers, such as [1,2]")
    return WORDS.get(kind, "`key: value` pairs, such as {key: value}")


def _scalar(text: str, kind: type) -> Any:
    """The value of a text for a key of this type, None if it has none."""
    if kind is bool:
        return BOOLEANS.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULL


def _plain(node: yaml.Node) -> Any:
    """The value of a node where no type is declared: bare words are texts unless they can be nothing else."""
    if isinstance(node, yaml.MappingNode):
        return {name.value: _plain(value) for name, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    text = node.value
    if node.style is not None:  # pyright: ignore[reportAttributeAccessIssue]  # a ScalarNode
        return text
    if text in NULL:
        return None
    if text.lower() in ("true", "false"):
        return BOOLEANS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if REAL.fullmatch(text) and any(digit.isdigit() for digit in text) else text


def read_yaml(path: Path) -> Any:
    """What a YAML file holds where no types are declared: bare words are texts unless they can be nothing else.

    Raises: UserError if it cannot be read.
    """
    node = _read_yaml(path)
    return None if node is None else _plain(node)


def _read_yaml(path: Path) -> yaml.Node | None:
    try:
        node = _compose(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        hint = "; overrides are written key=value" if path.suffix not in {".yaml", ".yml"} else ""
        raise UserError(f"There is no configuration file {str(path)!r}{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"The configuration file {str(path)!r} is not valid YAML: {error}") from error
    return node


def _compose(text: str) -> yaml.Node | None:
    return _Loader(text).get_single_node()


def _read_override(source: str, schema: type) -> yaml.Node:
    """A node that holds one key. Texts are taken letter for letter; the rest is YAML."""
    key, _, text = source.partition("=")
    parts = key.split(".")
    if not all(parts):
        raise UserError(f"{source!r} is not an override; write key=value, for example optim.total_iters=1000")
    kind = _kind_at(schema, parts)
    kinds = members(kind)
    is_collection = text.startswith(("[", "{"))
    node: yaml.Node | None
    if str in kinds and not (len(kinds) > 1 and is_collection):
        if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
            raise UserError(
                f"{source}: a text on the command line is taken letter for letter, and these quotes would be part of "
                f"it; leave them out: {key}={text[1:-1]}"
            )
        is_null = may_be_null(kind) and text in ("", "null")
        node = yaml.ScalarNode(TEXT, text, style=None if is_null else "'")
    elif kind is Any and not is_collection and not text.startswith(("'", '"')):
        node = yaml.ScalarNode(TEXT, text)
    else:
        try:
            node = _compose(text) or yaml.ScalarNode(TEXT, "")
        except yaml.YAMLError as error:
            remedy = "put texts with special characters in quotes, as in [a,'b #2']"
            raise UserError(f"The value of {source!r} is not valid YAML ({error}); {remedy}") from error
    for part in reversed(parts):
        node = yaml.MappingNode("", [(yaml.ScalarNode(TEXT, part), node)])
    return node


def _kind_at(schema: type, parts: list[str]) -> Any:
    """The declared type of a dotted key, Any if there is none."""
    kind, allowed = schema, Allowed()
    for part in parts:
        section = members(kind)[0]
        if dataclasses.is_dataclass(section):
            if part not in {each.name for each in dataclasses.fields(section)}:
                return Any
            kind, allowed = typing.get_type_hints(section)[part], allowed_of(section, part) or Allowed()
        elif typing.get_origin(section) is dict:
            kind = _element_kind(section, part, allowed)
        else:
            return Any
    return kind


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """What to say of a key that is none of `keys`: what it is called, the nearest one, or which there are."""
    for other in OTHER_NAMES.get(key.rpartition(".")[2], ()):
        if " " in other:
            return f"unknown key {key}: {other}"
        if other in keys or other.rpartition(".")[0] in keys:  # arguments of a loader are no keys of ours
            return f"unknown key {key}; it is called {other}"
    close = closest(key, keys) or _same_name(key, keys)
    if close:
        return f"unknown key {key}; did you mean {close}?"
    if key in OTHER_NAMES and "evals" in keys:
        return f"unknown key {key}; a key of one evaluation is given as evals.<name>.{OTHER_NAMES[key][0]}"
    return f"unknown key {key}; known sections: {', '.join(k for k in keys if '.' not in k)}"


def _same_name(key: str, keys: Sequence[str]) -> str | None:
    """A key of another section whose last part looks like that of `key`, for a right name in the wrong place."""
    by_name = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    close = closest(key.rsplit(".", 1)[-1], by_name, cutoff=0.8)
    return None if close is None else by_name[close]


def _schema_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for each in dataclasses.fields(schema):
        name = prefix + each.name
        keys[name] = each.type
        if isinstance(each.type, type) and dataclasses.is_dataclass(each.type):
            keys |= _schema_keys(each.type, f"{name}.")
    return keys
