"""Lay a run of CAPI over the curve of a preset: what left the band, at which step, and what that usually means.

    python experiments/compare_run.py RUN [--preset NAME]
    python experiments/compare_run.py RUN --keep-as NAME     write the run's curve, thinned, as that of a preset, which
                                                             a new name makes one with the run's configuration

RUN is the output folder of a training, finished or not. NAME is a preset of experiments/presets that has been run, or
the folder of a run that went well; without it, the preset with the nearest number of images. Exit code 1 if something
left its band.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

from utils import command_line

with command_line(__doc__, __name__) as parser:
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a training")
    parser.add_argument("--preset", metavar="NAME", help="what to compare with")
    parser.add_argument("--keep-as", metavar="NAME", help="make the run the curve of a preset, and stop")

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import yaml

from checkpoint import Checkpoints
from config import DEFAULT_PRETRAIN_CONFIG, build, changed_keys, load_config, merge, require_name, to_yaml
from metrics import TIMING_KEYS, read_metrics
from train_capi import CapiConfig, CapiState
from training import BATCH_KEYS
from utils import UserError, did_you_mean, ending_in_words, write_text_atomically

ROOT = Path(__file__).parent.parent
PRESETS = Path(__file__).parent / "presets"
CURVE = ".metrics.jsonl"
BASE = re.compile(r"^#   python \S+ (configs/\S+\.yaml) ", re.MULTILINE)
"""In the command at the head of a preset, the configuration that it goes on top of."""
PROCESSES = re.compile(r", (\d+) process\(es\), code ")
"""In the log, on how many processes a training starts."""
MOST_RECORDS = 200
"""Of a curve that is kept."""
IN_A_ROW = 2
"""Readings outside of a band that count as having left it: one alone is noise."""


# ------------------------------------------------------------------------------------------------------------ curves


class Run(NamedTuple):
    """A training as far as it is compared."""

    name: str
    config: Mapping[str, Any]
    """Resolved."""
    records: Sequence[Mapping[str, Any]]
    num_processes: int | None
    """None where nothing that is left of a run says it."""

    def value(self, key: str) -> Any:
        """A value of the configuration, by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value[part]
        return value

    @property
    def num_images(self) -> float:
        """Images seen in the whole training."""
        return self.value("optim.total_iters") * self.images_per_step

    @property
    def images_per_step(self) -> float:
        """Images of an update on all processes, over which Sinkhorn balances; of one if their number is unknown."""
        per_process = self.value("optim.batch_size_per_gpu") * self.value("optim.accumulation_steps")
        return per_process * (self.num_processes or 1)

    @property
    def num_prototypes(self) -> float:
        """K."""
        return self.value("capi.num_clusters")

    def points(self, quantity: "Quantity") -> list[tuple[int, float | None]]:
        """Step and value of each reading of a quantity; None where it was not finite."""
        readings = [(record["step"], record[quantity.key]) for record in self.records if quantity.key in record]
        return [(step, None if value is None else quantity.measure(value, self)) for step, value in readings]


def read_run(folder: Path) -> Run:
    """A training of which the output folder is there. Raises: UserError if that is none."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except OSError as error:
        raise UserError(f"{folder} is no output folder of a training: {error.strerror}: config.yaml") from error
    if not isinstance(config, dict) or "capi" not in config:
        raise UserError(f"{folder} is a training of another method; bands are known for CAPI alone")
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise UserError(f"{folder} has logged nothing yet")
    return Run(str(folder), merge(CapiState.LATER_KEYS, config), records, num_processes(folder))


def num_processes(folder: Path) -> int | None:
    """Processes of a training: by its log, where its last start says it, or by its newest checkpoint."""
    log = folder / "log.txt"
    told = PROCESSES.findall(log.read_text(errors="replace")) if log.is_file() else []
    if told:
        return int(told[-1])
    newest = Checkpoints(folder, keep=1).newest()
    return None if newest is None else json.loads((newest / "state.json").read_text())["world_size"]


def read_preset(name: str) -> Run:
    """A preset, on top of its configuration, and its curve.

    Raises: UserError if there is none, or if it was not run.
    """
    path = PRESETS / f"{name}.yaml"
    known = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
    if not path.is_file():
        raise UserError(f"--preset {name}: there is no such preset, and no such folder{did_you_mean(name, known)}")
    curve = path.with_suffix(CURVE)
    if not curve.is_file():
        raise UserError(f"--preset {name}: it was not run, so there is no curve to compare with")
    return _preset(path, read_metrics(curve))


def _preset(path: Path, records: Sequence[Mapping[str, Any]]) -> Run:
    sources = [*(str(ROOT / base) for base in BASE.findall(path.read_text())), str(path)]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources)
    return Run(f"preset {path.stem}", asdict(cfg), records, cfg.launcher.num_nodes * cfg.launcher.num_tasks_per_node)


def nearest_preset(run: Run) -> Run:
    """The preset with a curve whose number of images is nearest to that of a run."""
    with_curve = [path.stem for path in sorted(PRESETS.glob("*.yaml")) if path.with_suffix(CURVE).is_file()]
    presets = [read_preset(name) for name in with_curve]
    return min(presets, key=lambda preset: abs(math.log(preset.num_images / run.num_images)))


def thinned(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_RECORDS` records without what depends on the machine; each has the last values of several lines."""
    every = -(-len(records) // MOST_RECORDS)
    groups = [records[max(0, end - every) : end] for end in range(len(records), 0, -every)]
    left_out = {*TIMING_KEYS, "probe_s"}
    return [
        {key: value for record in group for key, value in record.items() if key not in left_out}
        for group in reversed(groups)
    ]


# ------------------------------------------------------------------------------------------------------------- bands


class Quantity(NamedTuple):
    """What is compared: a key of metrics.jsonl, and its band around the reference."""

    key: str
    words: str
    low: float
    """Times the reference: the lower end of the band."""
    high: float
    measure: Callable[[float, Run], float] = lambda value, _: value
    """Of a logged value, what can be compared between runs of different sizes."""
    is_of_loss: bool = False
    """Whether it says nothing beside that of another loss."""


def of_log_k(loss: float, run: Run) -> float:
    """A cross-entropy over the prototypes, beside that of knowing nothing."""
    return loss / math.log(run.num_prototypes)


def of_width(rank: float, run: Run) -> float:
    """The part of their dimensions that features fill."""
    return rank / run.value("model.transformers_kwargs.embed_dim")


QUANTITIES = (
    Quantity("lr", "learning rate", 0.4, 2.5),
    Quantity("momentum", "share of the student in each step of the teacher, 1 - m", 0.2, 5, lambda m, _: 1 - m),
    Quantity("teacher_rank", "effective rank of the teacher's features / width", 0.75, 1.6, of_width),
    Quantity("target_entropy_rel", "entropy of the targets / log K", 0.6, 1.7),
    Quantity(
        "prototypes_used", "share of the prototypes in use", 0.8, 1.25, lambda used, run: used / run.num_prototypes
    ),
    Quantity("capi_loss", "student's loss / log K", 0.8, 1.2, of_log_k, is_of_loss=True),
    Quantity("clustering_loss", "clustering loss / log K", 0.5, 2, of_log_k, is_of_loss=True),
    Quantity("grad_norm", "norm of the student's gradient", 0.3, 3, is_of_loss=True),
)
"""A run with another seed stays in these bands, and runs that fail leave some: tests/test_experiments.py has both."""


LOSS_KEY = "capi.targets"
"""What the loss means depends on this key."""


class Departure(NamedTuple):
    """A quantity that left its band: at which step, to which side, and where it was and should have been then."""

    quantity: Quantity
    step: int
    side: str
    """`above`, `below` or `not finite`."""
    value: float
    band: tuple[float, float]

    def __str__(self) -> str:
        """As it is printed."""
        if self.side == "not finite":
            return f"step {self.step}: {self.quantity.words} is not finite"
        low, high = self.band
        band = f"{self.value:.3g}, not {low:.3g} to {high:.3g}"
        return f"step {self.step}: {self.quantity.words} is {self.side} its band: {band}"


def departures(run: Run, reference: Run) -> list[Departure]:
    """What left its band, the earliest first. Runs of different lengths are compared at the same part of the whole."""
    scale = reference.value("optim.total_iters") / run.value("optim.total_iters")
    has_another_loss = run.value(LOSS_KEY) != reference.value(LOSS_KEY)
    judged = [quantity for quantity in QUANTITIES if not (quantity.is_of_loss and has_another_loss)]
    candidates = (_departure(quantity, run, reference, scale) for quantity in judged)
    return sorted(filter(None, candidates), key=lambda departure: departure.step)


def _departure(quantity: Quantity, run: Run, reference: Run, scale: float) -> Departure | None:
    expected = [(step, value) for step, value in reference.points(quantity) if value is not None]
    outside: list[Departure] = []
    readings = run.points(quantity)
    for step, value in readings:
        middle = interpolated(expected, step * scale)
        if value is None:
            outside.append(Departure(quantity, step, "not finite", math.nan, (0.0, 0.0)))
        elif middle is not None:
            band = (quantity.low * middle, quantity.high * middle)
            if band[0] <= value <= band[1]:
                outside = []
                continue
            outside.append(Departure(quantity, step, "below" if value < band[0] else "above", value, band))
        if len(outside) == IN_A_ROW or (outside and outside[-1].side == "not finite"):
            return outside[0]
    return outside[0] if outside and outside[-1].step == readings[-1][0] else None


def interpolated(points: Sequence[tuple[float, float]], step: float) -> float | None:
    """The height of a curve at a step, on the line between two points; None before the first and after the last."""
    for (before, low), (after, high) in itertools.pairwise(points):
        if before <= step <= after:
            return low + (high - low) * (step - before) / (after - before)
    return next((height for place, height in points if place == step), None)


# ---------------------------------------------------------------------------------------------------- what it means


class Cause(NamedTuple):
    """What usually moves these quantities to these sides: signs are a key of metrics.jsonl and a side."""

    words: str
    signs: frozenset[str]
    """All of them are there."""
    one_of: frozenset[str] = frozenset()
    """Of these one at least, if there are any."""
    none_of: frozenset[str] = frozenset()
    """Signs of something else that would explain it."""

    def fits(self, signs: frozenset[str]) -> bool:
        """Whether a run has the signs."""
        return self.signs <= signs and (not self.one_of or bool(self.one_of & signs)) and not self.none_of & signs


FEW_IMAGES = "images per prototype below"
"""A sign that is read off the configurations: the images of a step over the number of prototypes."""
FEWER = 0.6
"""Times the reference's: fewer images per prototype are that sign."""
CAUSES = (
    Cause(
        "A learning rate that is too high: the weights are thrown out of range, and features and targets lose what "
        "tells them apart. Lower optim.lr_schedule.base_value, or warm up for longer.",
        frozenset({"lr above"}),
        one_of=frozenset({"teacher_rank below", "capi_loss above", "capi_loss not finite", "grad_norm not finite"}),
    ),
    Cause(
        "Collapse: the teacher's features have lost dimensions, so that prediction is easy and worth nothing. A "
        "teacher that follows the student too closely does it (optim.momentum_schedule).",
        frozenset({"teacher_rank below"}),
        none_of=frozenset({"lr above", FEW_IMAGES}),  # of few images the rank is that of few patches
    ),
    Cause(
        "Too few images for the prototypes: Sinkhorn shares the images of a step out among all prototypes, so that "
        "targets are spread over many that no patch is close to. Lower capi.num_clusters to four times the global "
        "batch or less, or raise optim.accumulation_steps.",
        frozenset({"target_entropy_rel above", FEW_IMAGES}),
    ),
    Cause(
        "A teacher that moves too slowly: the targets stay those of its random beginning. Lower "
        "optim.momentum_schedule.base_value (and start_warmup_value): its average should be over a part of the run.",
        frozenset({"momentum below"}),
    ),
)
UNKNOWN = "No pattern that is known. Look at the quantity that left first, and at the keys that differ."


UNCOUNTED = "{} has neither log.txt nor checkpoints, so on how many processes it trained is unknown"


def uncounted(*runs: Run) -> list[str]:
    """Runs whose images per prototype are unknown."""
    return [run.name for run in runs if run.num_processes is None]


def causes(departed: Sequence[Departure], run: Run, reference: Run) -> list[str]:
    """What departures usually mean; empty if there are none."""
    signs = {f"{departure.quantity.key} {departure.side}" for departure in departed}
    own, usual = (curve.images_per_step / curve.num_prototypes for curve in (run, reference))
    if not uncounted(run, reference) and own < FEWER * usual:
        signs.add(FEW_IMAGES)
    return [cause.words for cause in CAUSES if cause.fits(frozenset(signs))] or ([UNKNOWN] if departed else [])


SHAPING = ("capi", "optim", "data", "model", "train.init_from", "efficiency.param_dtype", "efficiency.teacher_fp8")
"""Sections and keys of the configuration that make a training what it is ..."""
IDLE = ("capi.clustering_chunk", "capi.clustering_kernel", "data.dataset", "data.decode", "data.max_bad_fraction")
"""... and those among them that do not."""


def differing_keys(run: Run, reference: Run) -> dict[str, str]:
    """Keys that shape a training and differ, each with `the run's value instead of the reference's`."""
    changed = {
        key: pair
        for key, pair in changed_keys(reference.config, run.config).items()
        if any(f"{key}.".startswith(f"{part}.") for part in SHAPING) and key not in IDLE
    }
    if not uncounted(run, reference):  # how an update is divided does not matter then
        changed = {key: pair for key, pair in changed.items() if f"{key}." not in BATCH_KEYS}
        old, new = reference.images_per_step, run.images_per_step
        changed |= {"images of an update": (old, new)} if old != new else {}
    return {key: f"{new!r} instead of {old!r}" for key, (old, new) in changed.items()}


def keep(run: Run, name: str) -> Path:
    """Make a run's curve that of a preset; under a new name, its configuration becomes one.

    Returns: where the curve is.
    Raises: UserError if it cannot be called that, or if a preset of that name is of other trainings.
    """
    require_name(f"--keep-as {name}", name)
    path = PRESETS / f"{name}.yaml"
    if path.is_file():
        differ = differing_keys(run, _preset(path, []))
        if differ:
            raise UserError(
                f"--keep-as {name}: there is a preset of that name, with other keys ({', '.join(differ)}) than "
                f"{run.name}; choose another name"
            )
    elif run.num_processes is None:
        raise UserError(f"--keep-as {name}: {UNCOUNTED.format(run.name)}; a new preset has to say how many")
    else:
        processes = {"num_nodes": 1, "gpus_per_node": run.num_processes, "tasks_per_node": None}
        own = {"train": {"output_dir": f"runs/{name}"}, "launcher": processes}
        start = "python" if run.num_processes == 1 else f"torchrun --nproc-per-node {run.num_processes}"
        head = (
            f"# The whole configuration of {run.name}.\n#   {start} train_capi.py experiments/presets/{name}.yaml\n\n"
        )
        write_text_atomically(path, head + to_yaml(build(CapiConfig, merge(run.config, own))))
    curve = path.with_suffix(CURVE)
    write_text_atomically(curve, "".join(json.dumps(record) + "\n" for record in thinned(run.records)))
    return curve


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 within the bands, 1 something left one, 2 a mistake of the user."""
    args = parser.parse_args(arguments)
    run = read_run(args.run)
    if args.keep_as is not None:
        sys.stdout.write(f"{keep(run, args.keep_as)}\n")
        return 0
    if args.preset is None:
        reference = nearest_preset(run)
    else:
        reference = read_run(Path(args.preset)) if Path(args.preset).is_dir() else read_preset(args.preset)
    departed, differ = departures(run, reference), differing_keys(run, reference)
    lines = [f"{run.name} beside {reference.name}, {len(run.records)} lines up to step {run.records[-1]['step']}"]
    lines += [f"  {departure}" for departure in departed] or ["  all that is logged stays in its band"]
    if LOSS_KEY in differ:
        left_out = ", ".join(quantity.words for quantity in QUANTITIES if quantity.is_of_loss)
        lines.append(f"  {LOSS_KEY}: {differ[LOSS_KEY]}, so these are not compared: {left_out}")
    for name in uncounted(run, reference):
        lines.append(f"  {UNCOUNTED.format(name)}, and images per prototype are not compared")
    if departed:
        lines += ["", *causes(departed, run, reference), "", "Keys that differ:"]
        lines += [f"  {key}: {values}" for key, values in differ.items()] or ["  none"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if departed else 0


if __name__ == "__main__":
    sys.exit(main())
