"""Trainings under one budget, evaluated in the same way, as the rows of one table: what compare.py and ablate.py make.

A training is a script and its configuration, and no method is known here. Each is run with every seed. All of it can be
interrupted: the same command goes on, and does not repeat what is done. In the folder of a table:

    results.json, report.html        the table
    evaluations.yaml                 what benchmark.py is given
    <training>/config.yaml           its configuration, as its script resolved it
    <training>/seed_0/config.yaml    the same with length, seed and output folder, which is what runs
    <training>/seed_0/log.txt        what that run said, or jobs/ of Slurm
    <training>/seed_0/part.txt       what was said besides, where trainings ran side by side
    <training>/seed_0/asked.json     what was asked for, the length, what it reads, by which code, processor times
    <training>/seed_0/run            train.output_dir
    <training>/seed_0/before         a script that was run before it
    <training>/seed_0/calibration_*  short runs that measure how fast it is
    <training>/seed_0/evaluation     output_dir of benchmark.py
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import platform
import re
import resource
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmark import BenchmarkConfig, BenchmarkLauncher, benchmark, run_here, run_on_slurm
from config import (
    COUNT,
    DEVICE,
    NAMES,
    NOT_NEGATIVE,
    POSITIVE,
    changed_keys,
    dump_yaml,
    find_file,
    require,
    within,
)
from evaluation import find_loader
from launch import ROOT, NotedRun, Status
from metrics import read_metrics
from utils import UserError, did_you_mean, git_revision, hash_file, import_from_path, remove, write_text_atomically

logger = logging.getLogger("table")

COUNTS = ("optim.batch_size_per_gpu", "optim.accumulation_steps")
CONTRACT = ("train.output_dir", "train.seed", "optim.total_iters", *COUNTS)
"""Keys that the configuration of every training script has."""
MEASURED = ("train.health_every", "train.probe.every", "evals")
"""Further ones, of those that are measured for a budget of processor time."""

FOLDER = "folder"
"""`<folder>` in a configuration stands for the folder of the training with its seed, `<name>` for the run of another
training with that seed."""


# ----------------------------------------------------------------------------------------------- what a table holds


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every training may use up: one of the first two keys is given."""

    images: int | None = field(default=None, metadata=COUNT)
    """Images seen, repetitions included; steps are as many as fill it best."""
    cpu_seconds: float | None = field(default=None, metadata=POSITIVE)
    """Processor time of the steps, that of all threads and of processes that read images. How many steps fit is
    measured before: by two short runs, whose difference is free of what starts and ends cost. The schedules are then
    made for that number of steps. Probes, health metrics, checkpoints and starts come on top; the table shows all that
    was used."""
    calibration_steps: int = field(default=10, metadata=COUNT)
    """Steps of the first of the short runs; the second has twice as many."""

    def __post_init__(self) -> None:
        """Check that there is one budget."""
        given = (self.images is not None) + (self.cpu_seconds is not None)
        remedy = "give one of budget.images and budget.cpu_seconds, and make the other null"
        require(given == 1, "budget", asdict(self), remedy)

    def __str__(self) -> str:
        """As a table has it."""
        if self.images is not None:
            return f"{self.images:,} images"
        return f"{self.cpu_seconds:,g} seconds of processor time"


@dataclass(frozen=True, kw_only=True)
class BeforeConfig:
    """A script that is run before a training, such as one that makes what the training reads."""

    file: str
    """Script, which takes a YAML file."""
    makes: str
    """File that it writes at its end; where it is, the script has been run."""
    config: dict[str, Any] = field(default_factory=dict)
    """Its keys."""


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """A training. The script keeps the contract of `training.py`; see experiments/README.md."""

    script: str | None = None
    """Training script. This and the next three keys: null takes what `shared` has."""
    configs: list[str] | None = None
    """YAML files for it, in order; later ones win."""
    model_path: str | None = None
    """Model file whose loader takes the weights."""
    weights: str | None = None
    """File in the run's folder that is evaluated; it is there when the training is complete."""
    overrides: list[str] = field(default_factory=list)
    """`a.b=c`, after those of `shared`."""
    before: BeforeConfig | None = None
    random: bool = False
    """Whether its model at random initialisation is evaluated too, as a row of its own."""
    note: str | None = None
    """What a reader of the table has to know about this row."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Keys of a table."""

    output_dir: str
    """Folder of the table: runs, results, page."""
    title: str
    """Heading of the page."""
    budget: BudgetConfig
    """What every training may use up."""
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata=within(at_least=0, below=2**32, not_empty=True, distinct=True)
    )
    """Each training is run with each of them; it is that of its evaluations too."""
    shared: EntryConfig = field(default_factory=EntryConfig)
    """What the trainings have in common."""
    trainings: dict[str, EntryConfig | None] = field(metadata=NAMES)
    """Name -> training; null leaves one out."""
    evaluations: dict[str, dict[str, Any] | None] = field(default_factory=dict, metadata=NAMES)
    """Name -> `file`, an evaluation script, and its keys, as for benchmark.py; empty for none."""
    scores: dict[str, str] = field(default_factory=dict)
    """Column -> `evaluation/method/score`; empty for all scores."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Column -> key of metrics.jsonl: its last value, of speeds and times the median."""
    curves: list[str] = field(default_factory=list)
    """Keys of metrics.jsonl whose curves the page shows, of the first seed."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the page."""
    launcher: BenchmarkLauncher = field(default_factory=BenchmarkLauncher)
    """Where trainings and evaluations run, as for benchmark.py: here, or each as a Slurm job of this size."""
    nproc_per_node: int = field(default=1, metadata=COUNT)
    """Processes of each training and evaluation here."""
    at_once: int = field(default=1, metadata=COUNT)
    """Trainings here side by side, each with its evaluations: for a GPU that one small training does not fill."""
    retry: bool = False
    """Submit Slurm jobs again that ended without finishing."""
    device: str | None = field(default=None, metadata=DEVICE)
    """Of the evaluations; null leaves it to them, as the next key."""
    num_workers: int | None = field(default=None, metadata=NOT_NEGATIVE)
    """Processes of the evaluations that read images; null as above."""

    def __post_init__(self) -> None:
        """Check that there is something to do, in one way."""
        require(any(self.trainings.values()), "trainings", dict(self.trainings), "no training is left")
        require(
            "=" not in self.output_dir, "output_dir", self.output_dir, "must not contain '=', which marks overrides"
        )
        for column, place in self.scores.items():
            name = place.partition("/")[0]
            remedy = f"{name} is none of the evaluations{did_you_mean(name, self.evaluations)}"
            require(name in self.evaluations, f"scores.{column}", place, remedy)
        is_local = self.launcher.where == "local"
        require(
            is_local or self.budget.cpu_seconds is None,
            "budget.cpu_seconds",
            self.budget.cpu_seconds,
            "is measured on this machine; with launcher=slurm give budget.images",
        )
        for key in ("nproc_per_node", "at_once"):
            require(is_local or getattr(self, key) == 1, key, getattr(self, key), "is for launcher=local")
        require(
            self.at_once == 1 or self.budget.cpu_seconds is None,
            "at_once",
            self.at_once,
            "must be 1 with budget.cpu_seconds, which is measured on an otherwise idle machine",
        )

    @property
    def num_ranks(self) -> int:
        """Processes of one training."""
        if self.launcher.where == "local":
            return self.nproc_per_node
        return self.launcher.num_nodes * self.launcher.num_tasks_per_node


def complete(shared: EntryConfig, own: EntryConfig, key: str) -> EntryConfig:
    """A training with what is shared.

    Raises: UserError naming what both lack.
    """
    chosen = {
        name: getattr(shared, name) if getattr(own, name) is None else getattr(own, name)
        for name in ("script", "configs", "model_path", "weights", "before", "note")
    }
    require(chosen["script"] is not None, f"{key}.script", None, "must name a training script, here or in shared")
    require(chosen["weights"] is not None, f"{key}.weights", None, "must name the file of the run that is evaluated")
    chosen |= {"configs": chosen["configs"] or [], "model_path": chosen["model_path"] or "model.py"}
    overrides = [*shared.overrides, *own.overrides]
    return EntryConfig(**chosen, overrides=overrides, random=shared.random or own.random)


# --------------------------------------------------------------------------------------------------- what is to be done


@dataclass(kw_only=True)
class Part(NotedRun):
    """A script of a training's folder, and in `asked.json` what was asked for and what became of it."""

    request: dict[str, Any]

    def state(self) -> dict[str, Any] | None:
        """What is noted."""
        return _read_json(self.folder / "asked.json")

    def write_state(self) -> None:
        """Note what is asked for, the job that does it, and with what it starts."""
        versions = {"code": git_revision(), "python": platform.python_version()}
        versions |= {"torch": importlib.metadata.version("torch")}
        made_by = self.made_by if versions in self.made_by else [*self.made_by, versions]
        self.note(request=self.request, job=self.job._asdict() if self.job else None, made_by=made_by)

    @property
    def made_by(self) -> list[dict[str, Any]]:
        """`code`, the revision of this repository, and versions of `python` and `torch`, at each start that differs."""
        return (self.state() or {}).get("made_by", [])

    def note(self, **values: Any) -> None:
        """Note further values, or other ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"request": self.request} | (self.state() or {}) | values
        write_text_atomically(self.folder / "asked.json", json.dumps(content, indent=2) + "\n")

    def check_request(self) -> None:
        """Raise UserError if something else was asked for in this folder before."""
        noted = (self.state() or {}).get("request")
        if noted is not None and noted != json.loads(json.dumps(self.request)):
            raise UserError(
                f"{self.folder} has a training that differs in {', '.join(changed_keys(noted, self.request))}; choose "
                "another output_dir, or delete that folder to train anew"
            )

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time of all starts; None if it is not known, as for jobs, or after a start that was killed."""
        times = (self.state() or {}).get("cpu_seconds", [])
        return sum(times) if times and None not in times else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); delete it") from error


@dataclass(kw_only=True)
class Preparation(Part):
    """The script that is run before a training."""

    makes: Path

    def is_done(self) -> bool:
        """Whether what it makes is there."""
        return self.makes.is_file()


@dataclass(kw_only=True)
class Training(Part):
    """A training with one seed."""

    name: str
    seed: int
    entry: EntryConfig
    """Complete."""
    sources: list[str]
    """Its configuration, as typed."""
    needs: list[str]
    """Trainings whose runs it reads."""
    preparation: Preparation | None

    @property
    def run_dir(self) -> Path:
        """The output folder of the training script."""
        return self.folder / "run"

    @property
    def weights(self) -> Path:
        """What is evaluated."""
        return self.run_dir / (self.entry.weights or "")

    @property
    def num_steps(self) -> int | None:
        """The length that was planned; None before."""
        return (self.state() or {}).get("num_steps")

    def records(self) -> list[dict[str, Any]]:
        """Its metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []

    def is_done(self) -> bool:
        """Whether all steps are done and the weights are there."""
        return self.weights.is_file() and self._has_all_steps()  # in this order, as metrics are long

    def _has_all_steps(self) -> bool:
        records, planned = self.records(), self.num_steps
        return planned is not None and bool(records) and records[-1]["step"] >= planned

    def _last_step_told(self) -> str:
        """Where a training ended that is not complete."""
        records = self.records()
        last = f"ends with step {records[-1]['step']}" if records else "has no step"
        return f"it ended before step {self.num_steps}: {self.run_dir / 'metrics.jsonl'} {last}"

    def status(self) -> Status:
        """How it stands; a training that was asked to stop ends well, but is not done."""
        status = super().status()
        if status.word == "done" and not self.is_done():
            told = f"it ended without {self.weights}" if self._has_all_steps() else self._last_step_told()
            return Status("failed", f"{told}; the same command goes on (log: {self.log})", status.log)
        return status

    def set_length(self, num_steps: int, images_per_step: int) -> None:
        """Plan so many steps of so many images; the schedules follow."""
        self.config = with_length(self.config, num_steps)
        self.note(num_steps=num_steps, images_per_step=images_per_step)

    def note_what_it_reads(self, others: Mapping[str, "Training"]) -> None:
        """Note at its start which runs of others, by name, it and its preparation read."""
        if self.needs and "reads" not in (self.state() or {}):
            self.note(reads={name: hash_file(others[name].weights) for name in self.needs})

    def check_what_it_reads(self, others: Mapping[str, "Training"]) -> None:
        """Raise UserError if a run of others that it read has been made anew since; without a note nothing is known."""
        for name, weights in (self.state() or {}).get("reads", {}).items():
            path = others[name].weights
            if path.is_file() and hash_file(path) != weights:  # without the file, it is being made anew
                raise UserError(
                    f"{self.title} reads a run that has changed, that of {name} (SHA-256 of {path}); delete "
                    f"{self.folder} to train anew with that one"
                )

    def images_per_step(self, num_ranks: int) -> int:
        """Images of an update on all of so many processes."""
        optim = self.config["optim"]
        return optim["batch_size_per_gpu"] * optim["accumulation_steps"] * num_ranks

    def images_seen(self, num_ranks: int) -> int:
        """Images of all updates so far, repetitions included; `num_ranks` is asked only before a length is planned."""
        per_step = (self.state() or {}).get("images_per_step", self.images_per_step(num_ranks))
        records = self.records()
        return records[-1]["step"] * per_step if records else 0

    def command(self, num_steps: int | None) -> str:
        """How one would type it, for so many steps if they are known."""
        epochs = ["optim.epochs=null"] if "epochs" in self.config.get("optim", {}) else []
        length = [] if num_steps is None else [f"optim.total_iters={num_steps}", *epochs]
        own = [f"train.seed={self.seed}", f"train.output_dir={self.run_dir}", *length]
        return shlex.join(["python", str(self.entry.script), *self.sources, *own])


def with_length(config: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """A training's resolved configuration with another number of steps."""
    epochs = {"epochs": None} if "epochs" in config["optim"] else {}
    return {**config, "optim": {**config["optim"], "total_iters": num_steps, **epochs}}


def plan(cfg: TableConfig, *, keep: bool) -> list[Training]:
    """All trainings, seed by seed, in their order.

    Args:
        cfg: of the table.
        keep: whether resolved configurations are written down, for later commands to notice that they have changed.

    Raises: UserError for what can be seen before anything runs.
    """
    chosen = {name: entry for name, entry in cfg.trainings.items() if entry is not None}
    entries = {name: complete(cfg.shared, entry, f"trainings.{name}") for name, entry in chosen.items()}
    needs = {name: _needs(name, entry, list(entries)) for name, entry in entries.items()}
    if any(entry is not None for entry in cfg.evaluations.values()):
        for name, entry in entries.items():
            try:
                find_loader(str(entry.model_path))
            except UserError as error:
                raise UserError(f"trainings.{name}: {error}") from error
    asked, resolved = {}, {}
    for name, entry in entries.items():
        asked[name], resolved[name] = _resolve(cfg, name, entry, keep=keep)
    trainings = []
    for seed in cfg.seeds:
        folders = {name: Path(cfg.output_dir, name, f"seed_{seed}") for name in entries}
        for name, entry in entries.items():
            places = {other: str(folders[other] / "run") for other in entries} | {FOLDER: str(folders[name])}
            config = _placed(resolved[name], places)
            config["train"] |= {"seed": seed, "output_dir": str(folders[name] / "run")}
            title = f"{name}, seed {seed}"
            training = Training(
                title=title,
                script=find_file(str(entry.script), f"trainings.{name}.script"),
                config=config,
                folder=folders[name],
                request={"budget": asdict(cfg.budget), **asked[name]},
                name=name,
                seed=seed,
                entry=entry,
                sources=[_placed(source, places) for source in _sources(entry)],
                needs=needs[name],
                preparation=_preparation(entry, title, folders[name], places),
            )
            training.check_request()
            if training.num_steps is not None:
                training.config = with_length(training.config, training.num_steps)
            trainings.append(training)
    for training in trainings:
        training.check_what_it_reads(same_seed(training, trainings))
    return trainings


def same_seed(training: Training, trainings: Sequence[Training]) -> dict[str, Training]:
    """Trainings with the same seed, by name."""
    return {other.name: other for other in trainings if other.seed == training.seed}


def _sources(entry: EntryConfig) -> list[str]:
    return [*(entry.configs or []), *entry.overrides]


def _needs(name: str, entry: EntryConfig, names: Sequence[str]) -> list[str]:
    """Trainings that an entry reads, by the places that its texts name."""
    before = {} if entry.before is None else asdict(entry.before)
    named = list(dict.fromkeys(re.findall(r"<([\w.-]+)>", " ".join([*entry.overrides, dump_yaml(before)]))))
    earlier = names[: names.index(name)]
    for place in named:
        if place not in (FOLDER, *earlier):
            message = f"trainings.{name}: <{place}> must be <{FOLDER}> or a training that stands before this one"
            raise UserError(message + did_you_mean(place, [FOLDER, *earlier]))
    return [place for place in named if place != FOLDER]


def _placed(tree: Any, places: Mapping[str, str]) -> Any:
    """Nested values with folders in place of their names in `<>`; always a copy."""
    if isinstance(tree, dict):
        return {key: _placed(value, places) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_placed(value, places) for value in tree]
    if isinstance(tree, str):
        for name, folder in places.items():
            tree = tree.replace(f"<{name}>", folder)
    return tree


def _preparation(entry: EntryConfig, title: str, folder: Path, places: Mapping[str, str]) -> Preparation | None:
    if entry.before is None:
        return None
    return Preparation(
        title=f"before {title}",
        script=find_file(entry.before.file, "before.file"),
        config=_placed(entry.before.config, places),
        folder=folder / "before",
        request={},
        makes=Path(_placed(entry.before.makes, places)),
    )


def _resolve(cfg: TableConfig, name: str, entry: EntryConfig, *, keep: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked for by an entry, and its configuration as its script resolves it now.

    Raises: UserError if there is no such file, if the script refuses it, which has then said why, or if a seed has
        begun with something else.
    """
    key, folder = f"trainings.{name}", Path(cfg.output_dir, name)
    script = find_file(str(entry.script), f"{key}.script")
    files = {path: find_file(path, f"{key}.configs") for path in entry.configs or []}
    before = None if entry.before is None else asdict(entry.before)
    hashes = {name: hash_file(path) for name, path in files.items()}
    request = {"script": script.name, "sources": _sources(entry), "files": hashes, "before": before}
    begun = _has_begun(folder)
    noted = _read_json(folder / "asked.json")
    if noted not in (None, request) and begun:
        raise UserError(
            f"{folder} has trainings that differ in {', '.join(changed_keys(noted, request))}; choose another "
            "output_dir, another name, or delete that folder to train anew"
        )
    if cfg.launcher.where == "slurm" and not script.absolute().is_relative_to(ROOT):
        raise UserError(f"{key}.script={script}: a Slurm job runs scripts of {ROOT} only")
    text = _printed_config(key, script, [*map(str, files.values()), *entry.overrides])
    config, path = _checked_config(text, f"{key}.script={script}", cfg.budget), folder / "config.yaml"
    changed = changed_keys(yaml.safe_load(path.read_text()), config) if noted is not None and path.is_file() else {}
    if changed and begun:
        raise UserError(
            f"{folder} has trainings that differ in {', '.join(changed)} from what {script} makes of the same request "
            "now; choose another output_dir, another name, or delete that folder to train anew (only its config.yaml, "
            "if they are to count, and to go on, all the same)"
        )
    if keep and (noted != request or changed or not path.is_file()):
        for planned in [] if begun else folder.glob("seed_*/asked.json"):  # lengths that were of something else
            planned.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, text)
        write_text_atomically(folder / "asked.json", json.dumps(request, indent=2) + "\n")
    return request, config


def _has_begun(folder: Path) -> bool:
    """Whether a training has a run with any seed, or a job that was to make one."""
    noted = (_read_json(path) or {} for path in folder.glob("seed_*/asked.json"))
    return any(folder.glob("seed_*/run")) or any(state.get("job") for state in noted)


def _printed_config(key: str, script: Path, arguments: Sequence[str]) -> str:
    """What a training script prints as its resolved configuration."""
    # In this process: another one for each of many trainings would import torch each time.
    train_script = import_from_path(script)
    require(
        hasattr(train_script, "main"), f"{key}.script", str(script), "must have main(arguments), as train_capi.py has"
    )
    arguments = [*arguments, "--print-config"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            code = train_script.main(arguments)
        except SystemExit as end:
            code = end.code
    if code not in (None, 0):  # as Python itself takes them
        told = "failed, see above" if isinstance(code, int) else f"failed: {code}"
        raise UserError(f"{key}: {shlex.join(['python', str(script), *arguments])} {told}")
    return printed.getvalue()


def _checked_config(text: str, where: str, budget: BudgetConfig) -> dict[str, Any]:
    """The configuration that a script printed, once it is sure that it has what a table sets and reads."""
    remedy = "experiments/README.md says what a training script prints"
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        begins = f"but begins with {text.splitlines()[0]!r}" if text.strip() else "but nothing"
        raise UserError(f"{where}: with --print-config it prints no configuration in YAML, {begins}; {remedy}")
    for place in (*CONTRACT, *(MEASURED if budget.cpu_seconds is not None else ())):
        value: Any = config
        for part in place.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{where}: its configuration lacks {place}; {remedy}")
            value = value[part]
        if place in COUNTS and (not isinstance(value, int) or value < 1):
            raise UserError(f"{where}: its configuration has {place}={value!r}, not a number of at least 1; {remedy}")
    return config


# ------------------------------------------------------------------------------------------------------------- doing it


def children_cpu_seconds() -> float:
    """Processor time of all processes that this one started and that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def timed(part: Part) -> Iterator[None]:
    """Note the processor time of one start of a part; None stands for that of a start whose end nobody saw."""
    times = (part.state() or {}).get("cpu_seconds", [])
    part.note(cpu_seconds=[*times, None])
    before = children_cpu_seconds()
    try:
        yield
    finally:
        part.note(cpu_seconds=[*times, round(children_cpu_seconds() - before, 2)])


def run(part: Part, cfg: TableConfig) -> Status:
    """Run a part here and wait for it, or submit it if it was not and say how the job stands."""
    if cfg.launcher.where == "slurm":
        return run_on_slurm(part, cfg.launcher, retry=cfg.retry)
    part.write_state()
    with timed(part):
        return run_here(part, cfg.nproc_per_node)


def planned_steps(training: Training, cfg: TableConfig) -> int | None:
    """How many steps the budget is; None if what a step takes was measured for none of the seeds, whose steps are as
    many."""
    per_step = training.images_per_step(cfg.num_ranks)
    if cfg.budget.images is not None:
        return max(1, round(cfg.budget.images / per_step))
    assert cfg.budget.cpu_seconds is not None
    noted = [_read_json(path) or {} for path in sorted(training.folder.parent.glob("seed_*/asked.json"))]
    measured = [state["cpu_seconds_per_step"] for state in noted if "cpu_seconds_per_step" in state]
    return max(1, int(cfg.budget.cpu_seconds / measured[0])) if measured else None


def measure_step(training: Training, cfg: TableConfig) -> None:
    """Note the processor time of a step, by the difference of two short runs.

    Raises: UserError if one of them fails.
    """
    times = []
    for num_steps in (cfg.budget.calibration_steps, 2 * cfg.budget.calibration_steps):
        folder = training.folder / f"calibration_{num_steps}"
        remove(folder)
        config = with_length(training.config, num_steps)
        train = config["train"]
        # What is only done now and then would count for too much, or not at all.
        own = {"output_dir": str(folder / "run"), "health_every": 0, "probe": train["probe"] | {"every": 0}}
        config |= {"train": train | own, "evals": None}
        title = f"{training.title}, calibration of {num_steps} steps"
        part = Part(title=title, script=training.script, config=config, folder=folder, request={})
        status = run(part, cfg)
        if status.word != "done" or part.cpu_seconds is None:
            raise UserError(f"{title}: {status.message or 'its processor time is not known'}")
        times.append(part.cpu_seconds)
        shutil.rmtree(folder / "run")
    taken = (times[1] - times[0]) / cfg.budget.calibration_steps
    if taken <= 0:
        raise UserError(
            f"budget.calibration_steps={cfg.budget.calibration_steps}: {training.title} took {times[0]:.1f} s for so "
            f"many steps and {times[1]:.1f} s for twice as many, which tells nothing; use more"
        )
    training.note(cpu_seconds_per_step=taken)


def train(training: Training, cfg: TableConfig, others: Mapping[str, Training]) -> Status:
    """Do what is left to do for a training, its preparation first.

    Args:
        training: of the table.
        cfg: of the table.
        others: trainings with the same seed, by name.

    Raises: UserError for what the user has to decide.
    """
    training.check_what_it_reads(others)  # one of them may have been made anew just now
    if training.is_done():
        return Status("done")
    missing = [name for name in training.needs if not others[name].is_done()]
    if missing:
        return Status("left out", f"It reads the run of {', '.join(missing)}, which is not complete.")
    training.note_what_it_reads(others)
    preparation = training.preparation
    if preparation is not None and not preparation.is_done():
        status = run(preparation, cfg)
        if status.word != "done":
            return dataclasses.replace(status, message=f"{preparation.title}: {status.message}")
    if training.num_steps is None:
        length = planned_steps(training, cfg)
        if length is None:
            measure_step(training, cfg)
            length = planned_steps(training, cfg)
            assert length is not None
        training.set_length(length, training.images_per_step(cfg.num_ranks))
    per_step, planned = training.images_per_step(cfg.num_ranks), (training.state() or {}).get("images_per_step")
    if planned not in (None, per_step):
        raise UserError(
            f"{training.title} was begun with {planned} images a step, and is now asked to go on with {per_step}; give "
            f"it as many processes as before (nproc_per_node, launcher.*), or delete {training.folder} to train anew"
        )
    logger.info("%s: %s steps of %d images", training.title, training.num_steps, per_step)
    return run(training, cfg)


def evaluate(training: Training, cfg: TableConfig) -> Status:
    """Evaluate a complete training by benchmark.py, as far as it is not done. Returns the worst status of them all.

    One that cannot be evaluated in this way is "refused": what was written before is of another request.
    """
    results = training.folder / "evaluation" / "results.json"
    own = BenchmarkConfig(
        output_dir=str(results.parent),
        model_path=str(training.entry.model_path),
        model_loader_kwargs={"pretrained_weights": str(training.weights)},
        name=training.name,
        evals_config_path=str(Path(cfg.output_dir, "evaluations.yaml")),
        launcher=cfg.launcher,
        nproc_per_node=cfg.nproc_per_node,
        retry=cfg.retry,
        random_baseline=training.entry.random,
        run_dir=str(training.run_dir),
        device=cfg.device,
        num_workers=cfg.num_workers,
        seed=training.seed,
    )
    try:
        benchmark(own)
    except UserError as error:
        return Status("refused", str(error))
    content = _read_json(results) or {}
    entries = {
        f"evaluation {name}{told}": entry
        for part, told in (("evaluations", ""), ("random", " of random weights"))
        for name, entry in content.get(part, {}).items()
    }
    for word in ("failed", "running", "left out"):
        told = [f"{name}: {entry['message']}" for name, entry in entries.items() if entry["status"] == word]
        if told:
            return Status(word, "; ".join(told))
    return Status("done")
