"""All evaluations of one model, here or on Slurm, with a table, results.json and report.html at the end.

    python benchmark.py output_dir=results/mine pretrained_weights=runs/mine/student_ema.pth
    python benchmark.py model_loader_kwargs.config_path=default_pretrain_config.yaml pretrained_weights=weights.pth
    python benchmark.py output_dir=results/dinov2 model_path=baselines/dinov2_loader.py \\
        model_loader_kwargs.model_name=dinov2_vits14 compare=[results/mine/results.json]

Which evaluations these are is in default_eval_config.py; `evals.<name>.<key>=value` changes a key of one, and
`evals.<name>=null` leaves one out. Without output_dir a folder is chosen, beside the weights or in runs/. What is done
is not done again: the same command goes on after an interruption, and with `launcher=slurm` collects what has finished.
Exit code 1 if an evaluation failed; the others are done and reported.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import ast
import inspect
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import (
    COUNT,
    DEVICE,
    DTYPE,
    IMAGE_MEAN,
    IMAGE_STD,
    LOADER_KWARGS,
    NAMES,
    NOT_NEGATIVE,
    SEED,
    LauncherConfig,
    changed_keys,
    check_evaluation,
    find_file,
    load_config,
    merge,
    one_of,
    read_yaml,
    require,
    require_name,
)
from evaluation import SPEED_KEYS, check_same_data, choose_output_dir, find_loader, hash_loader, model_name
from keys import answer
from launch import ROOT, NotedRun, Status, SubmittedJob, claim_output_dir
from reading.sources import is_folder, make_dataset
from report import check_entry, check_run, read_results, text_table, write_report
from utils import (
    UserError,
    did_you_mean,
    ended_with_block,
    ending_in_words,
    hash_file,
    setup_logging,
    write_text_atomically,
)

logger = logging.getLogger("benchmark")

STATE = "benchmark.json"
"""In the folder of each evaluation: what was asked for, and the Slurm job that does it."""
PASSED_ON = ("device", "dtype", "batch_size", "num_workers", "seed", "image_mean", "image_std")
ALIASES = {
    "pretrained_weights": "model_loader_kwargs.pretrained_weights",
    "config_path": "model_loader_kwargs.config_path",
    "launcher": "launcher.where",
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkLauncher(LauncherConfig):
    """Where evaluations run: each in a process of its own here, or as a Slurm job of this size."""

    where: str = field(default="local", metadata=one_of("local", "slurm"))
    """local, one after another; or slurm. `launcher=slurm` is short for `launcher.where=slurm`."""
    num_nodes: int = 1
    gpus_per_node: int = 1
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time_min: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    signal_delay_s: int = 120
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Keys of the benchmark."""

    output_dir: str = ""
    """Each evaluation writes to output_dir/<its name>, that of random weights to output_dir/random/<its name>. Empty:
    chosen, see `evaluation.choose_output_dir`."""
    model_path: str = "model.py"
    """Python file with `__model_loader__(**model_loader_kwargs)`, as for the evaluation scripts."""
    model_loader_kwargs: dict[str, Any] = field(default_factory=dict, metadata=LOADER_KWARGS)
    """Arguments of the loader; `pretrained_weights=` and `config_path=` at top level are short for two of them."""
    name: str | None = None
    """Name of the model in tables; null takes that of the weights."""
    evals_config_path: str = "default_eval_config.py"
    """Python file with one literal, EVALS, or YAML: name -> `file`, a script, and its keys."""
    evals: dict[str, dict[str, Any] | None] = field(default_factory=dict, metadata=NAMES)
    """Changes of single evaluations, or null to leave one out."""
    launcher: BenchmarkLauncher = field(default_factory=BenchmarkLauncher)
    nproc_per_node: int = field(default=1, metadata=COUNT)
    """Processes of each evaluation here; torchrun starts them if there are several."""
    retry: bool = False
    """Submit Slurm jobs again that ended without finishing."""
    random_baseline: bool = True
    """Also evaluate the same model without weights."""
    compare: list[str] = field(default_factory=list)
    """results.json files of other models, to show beside this one."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report."""
    run_dir: str | None = None
    """Folder of the training run, whose curves the report then shows."""
    device: str | None = field(default=None, metadata=DEVICE)
    """This and the following keys are passed on to all evaluations; null leaves the choice to them."""
    dtype: str | None = field(default=None, metadata=DTYPE)
    """Precision of the forward pass, as for each evaluation."""
    batch_size: int | None = field(default=None, metadata=COUNT)
    """Images per forward pass of one process."""
    num_workers: int | None = field(default=None, metadata=NOT_NEGATIVE)
    """Processes that read images, per process that computes."""
    seed: int | None = field(default=None, metadata=SEED)
    """What random weights, splits and initialisations follow from."""
    image_mean: list[float] | None = field(default=None, metadata=IMAGE_MEAN)
    """Mean of the RGB channels, in [0, 1], which is subtracted."""
    image_std: list[float] | None = field(default=None, metadata=IMAGE_STD)
    """Deviation of the RGB channels, in units of [0, 1], by which they are divided."""

    def __post_init__(self) -> None:
        """Check rules between keys."""
        require(
            self.nproc_per_node == 1 or self.launcher.where == "local",
            "nproc_per_node",
            self.nproc_per_node,
            "is for launcher=local; the size of a Slurm job is in launcher.gpus_per_node and launcher.tasks_per_node",
        )
        require(
            "=" not in self.output_dir, "output_dir", self.output_dir, "must not contain '=', which marks overrides"
        )


# --------------------------------------------------------------------------------------------- what is to be done


@dataclass(kw_only=True)
class Task(NotedRun):
    """One evaluation of one model, whose results are in its folder too."""

    name: str
    is_random: bool
    weights_file_sha256: str | None

    def request(self) -> dict[str, Any]:
        """All that determines the results: script, keys, and the hash of a weights file, which may thus be moved."""
        config = {key: value for key, value in self.config.items() if key not in SPEED_KEYS}
        config["model_loader_kwargs"] = _without_file(config["model_loader_kwargs"], self.weights_file_sha256)
        return {"script": self.script.name, "config": config, "weights_file_sha256": self.weights_file_sha256}

    def state(self) -> dict[str, Any] | None:
        """What an earlier run asked for in this folder: `request`, and `job` if that was given to Slurm."""
        path = self.folder / STATE
        state = _read_json(path)
        if state is not None:
            request, job = state.get("request"), state.get("job", {"number": "", "log": ""})
            whole = isinstance(request, dict) and "weights_file_sha256" in request and isinstance(job, dict)
            if not whole or not all(isinstance(job.get(key), str) for key in ("number", "log")):
                raise UserError(f"{path} was not written by benchmark.py; delete it to evaluate anew")
        return state

    def write_state(self) -> None:
        """Note, for later runs, what is asked for in this folder, and the job that does it."""
        state = {"request": self.request()} | ({"job": self.job._asdict()} if self.job else {})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.folder / STATE, json.dumps(state, indent=2) + "\n")

    def outcome(self) -> dict[str, Any] | None:
        """The script's result file, which may be incomplete."""
        path = next(iter(sorted(self.folder.glob("results_*.json"))), None)
        if path is None:
            return None
        outcome = _read_json(path)
        try:
            check_entry(outcome, path.stem)
        except UserError as error:
            raise UserError(f"{path} {error}; delete it to evaluate anew") from error
        return outcome

    def is_done(self) -> bool:
        """Whether the script ran to its end, where it notes its time, for this very request."""
        outcome, state = self.outcome(), self.state()
        if outcome is None or state is None or "seconds" not in outcome.get("about", {}):
            return False
        request = json.loads(json.dumps(self.request()))
        # The script may have refused the request, and left what it found.
        written = dict(outcome["config"])
        written["model_loader_kwargs"] = _without_file(written["model_loader_kwargs"], self.weights_file_sha256)
        asked = request["config"]
        as_asked = asked.keys() <= written.keys() and all(_is_same(asked[key], written[key]) for key in asked)
        return state["request"] == request and as_asked

    def check_folder(self) -> None:
        """Raise UserError if the folder has results of another model or of folders whose content has changed.

        Scripts see themselves if their keys have changed.
        """
        outcome = self.outcome()
        if outcome is None:
            return
        state = self.state()
        if state is None:
            raise UserError(f"{self.folder} has results that benchmark.py did not make; choose another output_dir")
        before, now = state["request"]["weights_file_sha256"], self.weights_file_sha256
        if before != now:
            raise UserError(
                f"{self.folder} has results of another model (SHA-256 of its weights file: {str(before)[:12]}, of this "
                f"one: {str(now)[:12]}); choose another output_dir, or delete that folder to evaluate anew"
            )
        about = outcome.get("about", {})
        loader = hash_loader(self.config["model_path"], self.config["model_loader_kwargs"])
        if about.get("loader_sha256", loader) != loader:
            raise UserError(
                f"{self.folder} has results of another model: {self.config['model_path']}, its model_loader_kwargs or "
                "the configuration beside the weights have changed; choose another output_dir, or delete that folder "
                "to evaluate anew"
            )
        data = about.get("data", {})
        # Others may be downloaded when they are opened, and do not change.
        own = {key: entry["url"] for key, entry in data.items() if is_folder(entry["url"])}
        now = {key: {"url": url, "fingerprint": make_dataset(url, key=key).fingerprint()} for key, url in own.items()}
        check_same_data(now, data, self.folder)


def _is_same(asked: Any, written: Any) -> bool:
    """Whether a value is as it was asked for; of [224, 224], the sides of a square, scripts write 224."""
    return asked == written or asked == [written, written]


def _without_file(loader_kwargs: Mapping[str, Any], sha256: str | None) -> dict[str, Any]:
    """Loader arguments; a weights file whose content is known is left out, so that it may move."""
    return {key: value for key, value in loader_kwargs.items() if key != "pretrained_weights" or sha256 is None}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to evaluate anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read (it is no JSON object); delete it to evaluate anew")
    return content


def read_evals(path_name: str, changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Evaluations by name: those of a file, with changes.

    Raises: UserError naming file or key.
    """
    path = find_file(path_name, "evals_config_path")
    evals = _read_literal(path) if path.suffix == ".py" else _read_evals_yaml(path)
    for name, entry in changes.items():
        if name not in evals and not (isinstance(entry, dict) and {"file", "script"} & entry.keys()):
            raise UserError(f"evals.{name}: there is no such evaluation in {path}{did_you_mean(name, list(evals))}")
    merged = merge(evals, dict(changes))
    chosen = {str(name): entry for name, entry in merged.items() if entry is not None}
    if not chosen:
        raise UserError(f"evals_config_path={path_name}: no evaluation is left")
    for name, entry in chosen.items():
        require_name(f"evals.{name}", name, taken=("random", "jobs"))
        if not isinstance(entry, dict) or not {"file", "script"} & entry.keys():
            raise UserError(f"evals.{name}: needs file, the name of an evaluation script; other keys are for it")
        for key in ("output_dir", "model_path", "model_loader_kwargs"):
            if key in entry:
                raise UserError(f"evals.{name}.{key}: is the same for all evaluations; give {key}= without evals")
    return chosen


def _read_literal(path: Path) -> dict[str, Any]:
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["EVALS"]:
                evals = ast.literal_eval(node.value)
                break
        else:
            raise UserError(f"evals_config_path={path}: does not assign EVALS")
    except SyntaxError as error:
        raise UserError(f"evals_config_path={path}: is not Python: {error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"evals_config_path={path}: EVALS is read, not run, so it must be a plain literal") from error
    if not isinstance(evals, dict):
        raise UserError(f"evals_config_path={path}: EVALS must be a dict: name -> {{'file': ..., key: value}}")
    return evals


def _read_evals_yaml(path: Path) -> dict[str, Any]:
    try:
        evals = read_yaml(path)
    except UserError as error:
        raise UserError(f"evals_config_path={path}: cannot be read: {error}") from error
    if not isinstance(evals, dict):
        raise UserError(f"evals_config_path={path}: must hold `name: {{file: ..., key: value}}` pairs")
    return evals


def plan(cfg: BenchmarkConfig) -> list[Task]:
    """Everything to be done, the model before its random initialisation.

    Raises: UserError naming the key.
    """
    evals = read_evals(cfg.evals_config_path, cfg.evals)
    scripts = {name: check_evaluation(f"evals.{name}", entry) for name, entry in evals.items()}
    models = [(False, dict(cfg.model_loader_kwargs))]
    parameters = list(inspect.signature(find_loader(cfg.model_path)).parameters)
    weights = cfg.model_loader_kwargs.get("pretrained_weights")
    sha256 = None
    if weights is not None and "://" not in str(weights):
        try:
            sha256 = hash_file(Path(weights))
        except OSError as error:
            raise UserError(f"pretrained_weights={weights}: cannot be read: {error.strerror}") from error
    if cfg.random_baseline:
        untrained = without_weights(cfg.model_loader_kwargs, parameters)
        if untrained == cfg.model_loader_kwargs:
            logger.info("no pretrained_weights given: the model itself is at random initialisation")
        else:
            models.append((True, untrained))
    passed_on = {key: getattr(cfg, key) for key in PASSED_ON if getattr(cfg, key) is not None}
    tasks = []
    for is_random, loader_kwargs in models:
        for name, entry in evals.items():
            keys = {key: value for key, value in entry.items() if key != "file"}
            folder = Path(cfg.output_dir, "random", name) if is_random else Path(cfg.output_dir, name)
            config = {"model_path": cfg.model_path, "model_loader_kwargs": loader_kwargs, "output_dir": str(folder)}
            tasks.append(
                Task(
                    title=f"{name}, random initialisation" if is_random else name,
                    script=scripts[name],
                    config=passed_on | keys | config,
                    folder=folder,
                    name=name,
                    is_random=is_random,
                    weights_file_sha256=None if is_random else sha256,
                )
            )
    return tasks


def without_weights(loader_kwargs: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
    """Loader arguments of the same architecture at random initialisation.

    Args:
        loader_kwargs: arguments that load weights.
        parameters: names of the loader's parameters.
    """
    weights = loader_kwargs.get("pretrained_weights")
    changed = {key: value for key, value in loader_kwargs.items() if key != "pretrained_weights"}
    if "pretrained" in parameters:
        changed["pretrained"] = False
    if weights is not None and "config_path" in parameters and changed.get("config_path") is None:
        # Without weights the loader would not look at the file beside them.
        beside = Path(weights).with_suffix(".yaml")
        if beside.is_file():
            changed["config_path"] = str(beside)
    return changed


# ---------------------------------------------------------------------------------------------------- doing it


def run_here(task: NotedRun, nproc_per_node: int) -> Status:
    """Run the script and wait for it; what it says goes to stderr and log.txt."""
    task.write_state()
    with (
        task.log.open("w") as log,
        task.start(nproc_per_node, stdout=subprocess.PIPE, text=True, errors="replace") as process,
        ended_with_block(process),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            sys.stderr.write(f"    {line}")
    status = task.status()
    if status.word == "failed":
        logger.error("%s failed, see %s", task.title, task.log)
    return status


def run_on_slurm(task: NotedRun, launcher: LauncherConfig, *, retry: bool) -> Status:
    """Submit the script unless it was before, and say how the job stands."""
    noted = (task.state() or {}).get("job")
    task.job = SubmittedJob(noted["number"], noted["log"]) if noted else None
    status = task.status()
    if status.word == "failed" and not retry:
        return replace(status, message=f"{status.message}; retry=true submits it again.")
    if status.word in ("not started", "failed"):
        task.job = None
        task.write_state()
        status = task.submit(launcher)
        task.write_state()
    if status.word == "running":
        return replace(status, message=f"{status.message}. The same command collects it later.")
    return status


def check_slurm(tasks: Sequence[Task]) -> None:
    """Raise UserError unless these can be submitted from here."""
    if shutil.which("sbatch") is None:
        raise UserError("launcher=slurm: there is no Slurm here (no sbatch on the PATH); leave it out to run here")
    for task in tasks:
        if not task.script.absolute().is_relative_to(ROOT):
            raise UserError(f"evals.{task.name}.file={task.script}: a Slurm job runs scripts of {ROOT} only")


# ---------------------------------------------------------------------------------------------------- the results


def read_compared(paths: Sequence[str]) -> dict[str, Any]:
    """Evaluations of other models by their names.

    Raises: UserError if a file is not a results.json of this script.
    """
    compared: dict[str, Any] = {}
    for path in map(Path, paths):
        try:
            content = read_results(path)
        except UserError as error:
            raise UserError(f"compare={path}: {error}") from error
        name = content["name"]
        compared[f"{name} ({path.parent})" if name in compared else name] = content["evaluations"]
    return compared


def describe(task: Task, status: Status, base: Path) -> dict[str, Any]:
    """A task's entry of results.json: how it stands, and what its script wrote so far."""
    outcome = task.outcome() or {"results": {}, "config": task.config, "about": {}}
    return {
        "script": task.script.name,
        "status": status.word,
        "message": status.message,
        "log": status.log,
        "folder": str(task.folder.relative_to(base)),
        **outcome,
    }


def differences(content: Mapping[str, Any]) -> list[str]:
    """Sentences on evaluations of other models that were not done in the same way."""
    where_from = (*SPEED_KEYS, "model_path", "model_loader_kwargs")
    told = []
    for label, model in content["compared"].items():
        for name in content["evaluations"].keys() & model.keys():
            entries = content["evaluations"][name], model[name]
            if not all(entry["about"] for entry in entries):  # no result yet: what was left to defaults is not known
                continue
            ours, theirs = (
                {key: value for key, value in entry["config"].items() if key not in where_from} for entry in entries
            )
            changed = changed_keys(ours, theirs)
            if changed:
                other_keys = "; ".join(f"{key} {other!r} instead of {own!r}" for key, (own, other) in changed.items())
                told.append(f"{name}: {label} was evaluated differently, with {other_keys}.")
    return sorted(told)


def benchmark(cfg: BenchmarkConfig) -> int:
    """Do what is left to do, then write results.json and report.html. Returns the exit code.

    Raises: UserError for what can be seen before anything runs.
    """
    if not cfg.output_dir:
        request = {key: getattr(cfg, key) for key in ("model_path", "model_loader_kwargs", "evals_config_path")}
        cfg = replace(cfg, output_dir=choose_output_dir("benchmark", request))
    base = Path(cfg.output_dir)
    tasks = plan(cfg)
    compared = read_compared(cfg.compare)
    run_dir = None if cfg.run_dir is None else Path(cfg.run_dir)
    if run_dir is not None:
        check_run(run_dir)
    for task in tasks:
        task.check_folder()
    left = [task for task in tasks if not task.is_done()]
    if left and cfg.launcher.where == "slurm":
        check_slurm(left)
    with claim_output_dir(base, key="output_dir"):
        name = cfg.name if cfg.name is not None else model_name(cfg.model_path, cfg.model_loader_kwargs)
        content: dict[str, Any] = {"name": name, "evaluations": {}, "random": {}, "compared": compared}
        statuses = []
        for task in tasks:
            if task not in left:
                logger.info("%s: is done", task.title)
                status = Status("done")
            elif task.is_random and content["evaluations"][task.name]["status"] == "failed":
                status = Status("left out", "It failed for the model itself.")
            elif cfg.launcher.where == "slurm":
                status = run_on_slurm(task, cfg.launcher, retry=cfg.retry)
            else:
                status = run_here(task, cfg.nproc_per_node)
            statuses.append((task, status))
            content["random" if task.is_random else "evaluations"][task.name] = describe(task, status, base)
            content["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            content["notes"] = [*cfg.notes, *differences(content)]
            write_text_atomically(base / "results.json", json.dumps(content, indent=2) + "\n")
        write_report(base / "report.html", content, run_dir)

        lines = ["", text_table(content), ""]
        lines += [
            f"{task.title}: {status.word}. {status.message}" for task, status in statuses if status.word != "done"
        ]
        lines += [str(base / "results.json"), str(base / "report.html"), ""]
        sys.stdout.write("\n".join(lines).encode(errors="backslashreplace").decode())
        return 1 if any(status.word == "failed" for _, status in statuses) else 0


def read_config(sources: Sequence[str]) -> BenchmarkConfig:
    """The configuration of a command line."""
    return load_config(BenchmarkConfig, None, written_out(sources))


def written_out(sources: Sequence[str]) -> list[str]:
    """Files and overrides, with the keys for which `ALIASES` stand."""
    parts = [(source, *source.partition("=")) for source in sources]
    return [f"{ALIASES[key]}={value}" if equals and key in ALIASES else source for source, key, equals, value in parts]


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or submitted, 1 an evaluation failed, 2 a mistake of the user."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, BenchmarkConfig, written_out(args.sources))
    try:
        return benchmark(read_config(args.sources))
    except KeyboardInterrupt as error:
        error.add_note("the same command goes on")
        raise


if __name__ == "__main__":
    sys.exit(main())
