"""Evaluations of a training while it goes on.

`benchmark.py` is launched on exported weights, as a user would. Each launch has a folder of its own,
`<run>/evals/<set>/step_000010000/`: the exported weights, evals.yaml, log.txt, and results/ with results.json and
report.html. What has been launched and what has landed in the run's metrics is read from these folders and from
metrics.jsonl, so a run that is killed picks its evaluations up when it continues. Nothing that goes wrong here stops
the training: it is logged, with the place of the log.
"""

import contextlib
import dataclasses
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import EvalConfig, LauncherConfig, chosen_evals, dump_yaml
from distributed import any_rank, on_rank_0, rank
from launch import ROOT, STOP_SIGNALS, ScriptRun, StopRequest, SubmittedJob, without_ranks
from metrics import Metrics, read_metrics
from reading.sources import is_on_disk
from report import PICTURES_EACH, pictures_of, read_results, score_rows
from utils import UserError, due, end_process, reason, remove

logger = logging.getLogger("evals")

POLL_S = 1.0
ASK_SLURM_S = 60.0
"""Time between questions about a job. What another machine wrote to a shared file system shows by then."""
UNANSWERED_S = 1800.0
"""The same after a question without an answer, for which a training waits up to a minute."""
ENDED_BY_STOP = {code for number in STOP_SIGNALS for code in (-number, 128 + number)}
"""Exit codes of a process that was asked to stop; the latter are those of `utils.ending_in_words`."""


@dataclasses.dataclass(kw_only=True)
class _Launched(ScriptRun):
    """One evaluation set at one step, on rank 0: benchmark.py on exported weights."""

    name: str
    step: int
    is_gone: bool = False
    """Whether Slurm did not have the job any more when it was last asked."""
    failure: str | None = None
    """Why there is no hope for the job."""

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pth"

    @property
    def job_file(self) -> Path:
        return self.folder / "slurm_job"

    def is_done(self) -> bool:
        """Whether benchmark.py came to its end, where it writes the report."""
        try:
            return (self.folder / "results" / "report.html").is_file()
        except OSError:  # a stale handle of a shared file system, for example: it may be seen the next time
            return False

    def ask_slurm(self) -> None:
        """Find out whether the job is alive: it has failed if it was gone the last time, and still has no report.

        Raises: UserError if Slurm does not answer.
        """
        status = self.status()
        was_gone, self.is_gone = self.is_gone, status.word == "failed"
        if was_gone and self.is_gone:
            self.failure = status.message


class Landed(NamedTuple):
    """What came of one evaluation set at one step."""

    step: int
    scores: dict[str, float]
    pictures: dict[str, Path]
    """By the name that loggers show them under."""


def plan_evals(
    evals: Mapping[str, EvalConfig | None] | None,
) -> tuple[dict[str, EvalConfig], list[str]]:
    """The sets that are evaluated, without what would have to download data and may not, and a line for people on each.

    Raises: UserError for a mistake in the URL of a data set.
    """
    kept: dict[str, EvalConfig] = {}
    lines = []
    for name, cfg in (evals or {}).items():
        if cfg is None:
            continue
        entries = chosen_evals(cfg.eval_config)
        missing = {} if cfg.download else {key: urls for key, entry in entries.items() if (urls := _not_here(entry))}
        chosen = {key: entry for key, entry in cfg.eval_config.items() if key not in missing}
        if chosen or not entries:
            kept[name] = dataclasses.replace(cfg, eval_config=chosen)
            when = [f"every {cfg.period} steps"] if cfg.period > 0 else []
            when += ["at the end"] if cfg.final else []
            lines.append(f"evals.{name}: {', '.join(chosen)}, {' and '.join(when) or 'never'}")
        if missing:
            urls = ", ".join(dict.fromkeys(url for urls in missing.values() for url in urls))
            lines.append(
                f"evals.{name}: {', '.join(missing)} left out, since data is not on this machine: {urls}. "
                f"evals.{name}.download=true downloads it at the first evaluation; evals.{name}=null ends this message"
            )
    return kept, lines


def _not_here(entry: Mapping[str, Any]) -> list[str]:
    """Data URLs of an evaluation that would be downloaded."""
    missing = []
    for key, value in entry.items():
        if key.endswith(("dataset_name", "dataset_names")) and value is not None:
            urls = value.values() if isinstance(value, dict) else [value]
            missing += [url for url in map(str, urls) if not is_on_disk(url, key)]
    return missing


class Evaluations:
    """The evaluations of one run. Every rank calls the methods together; rank 0 launches and reads.

    Args:
        output_dir: folder of the run.
        evals: the sets of the configuration; those whose data is missing are left out, see `plan_evals`.
        launcher: where Slurm jobs run; an evaluation takes one node and at most one of its GPUs.
        stop: ends every wait.
        device: name of the device for evaluations on this machine.
        kept_step: the step from which the run continues; folders of later steps belong to what was undone.
    """

    def __init__(
        self,
        output_dir: Path,
        evals: Mapping[str, EvalConfig | None] | None,
        launcher: LauncherConfig,
        stop: StopRequest,
        *,
        device: str,
        kept_step: int,
    ) -> None:
        self.output_dir, self.stop, self.device = output_dir, stop, device
        self.evals, lines = on_rank_0(lambda: plan_evals(evals))
        """What is evaluated, the same on all ranks: by the data that rank 0 sees."""
        for line in lines:
            logger.info(line)
        self.launcher = dataclasses.replace(
            launcher, num_nodes=1, tasks_per_node=1, gpus_per_node=min(1, launcher.gpus_per_node), signal_delay_s=60
        )
        self.pending: list[_Launched] = []
        self._asks_slurm_at = 0.0
        earlier = on_rank_0(lambda: {(run.name, run.step): done for run, done in self._earlier(kept_step)})
        self.known = set(earlier)
        """Sets and steps that have been launched, by this process or before."""
        self._unsettled = [key for key, is_settled in earlier.items() if not is_settled]

    def _earlier(self, kept_step: int) -> Iterator[tuple[_Launched, bool]]:
        """Launches of earlier processes up to a step, and whether they landed in the metrics or failed."""
        path = self.output_dir / "metrics.jsonl"
        recorded = {
            (key.split("/")[1], record["eval_step"])
            for record in (read_metrics(path) if path.is_file() else [])
            for key in record
            if key.startswith("eval/") and "eval_step" in record
        }
        for name in self.evals:
            for folder in sorted((self.output_dir / "evals" / name).glob("step_" + "[0-9]" * 9)):
                run = self._run(name, int(folder.name.removeprefix("step_")))
                is_settled = (name, run.step) in recorded or (folder / "failed").exists()
                if run.step <= kept_step and (is_settled or run.weights.is_file() or run.is_done()):
                    yield run, is_settled

    def take_up(self) -> None:
        """Before the first step: go on with what earlier processes launched and has not landed; see `launch_due`."""
        for name, step in self._unsettled:
            if rank() == 0:
                self._take_up(self._run(name, step))
            self._wait_if_inline(name)
        self._unsettled = []

    def _take_up(self, run: _Launched) -> None:
        """Wait for what an earlier process launched, if it is done or still a job of Slurm's; else launch it anew."""
        try:
            if run.job_file.is_file():
                number, _, log = run.job_file.read_text().partition("\n")
                run.job = SubmittedJob(number, log)
            is_under_way = run.is_done() or run.status().word in ("running", "done")
        except (OSError, UserError) as error:  # the run may go on where there is no Slurm
            logger.warning("whether %s still runs as a Slurm job is unknown, so it starts anew: %s", run.folder, error)
            is_under_way = False
        if is_under_way:
            self.pending.append(run)
        else:
            logger.info("%s was not finished; it starts anew", run.title)
            self._start(run)

    def launch_due(self, step: int, export: Callable[[str, Path], None], *, final: bool = False) -> None:
        """Launch the sets that are due after `step` finished updates, unless they have been.

        Args:
            step: finished updates.
            export: writes the weights of a module, by the name that `model_to_eval` has for it, to a path; every rank
                calls it.
            final: whether it was the last update.
        """
        for name in self._due(step, final=final):
            cfg = self.evals[name]
            self.known.add((name, step))
            run = self._run(name, step)
            if rank() == 0:
                _make_anew(run.folder, self.output_dir)
            try:
                export(cfg.model_to_eval, run.weights)
            except UserError as error:  # a full disk, for example: on all ranks alike
                logger.warning("%s is left out: %s", run.title, error)
                continue
            if rank() == 0:
                self._start(run)
            self._wait_if_inline(name)

    def are_due(self, step: int) -> bool:
        """Whether `launch_due` would export weights after `step` finished updates."""
        return bool(self._due(step, final=False))

    def _due(self, step: int, *, final: bool) -> list[str]:
        return [
            name
            for name, cfg in self.evals.items()
            if (due(step, cfg.period) or (final and cfg.final)) and (name, step) not in self.known
        ]

    def _run(self, name: str, step: int) -> _Launched:
        folder = self.output_dir / "evals" / name / f"step_{step:09d}"
        config = {
            "output_dir": str(folder.absolute() / "results"),
            "model_path": self.evals[name].model_setup_script,
            "model_loader_kwargs": {"pretrained_weights": str(folder.absolute() / "weights.pth")},
            "evals_config_path": str(folder.absolute() / "evals.yaml"),
            "name": f"{self.output_dir.absolute().name}, step {step}",
            "random_baseline": False,
            "run_dir": str(self.output_dir.absolute()),
            "device": "auto" if self._is_for_slurm(name) else self.device,
        }
        title, script = f"evals.{name} of step {step}", ROOT / "benchmark.py"
        return _Launched(title=title, script=script, config=config, folder=folder, name=name, step=step)

    def _is_for_slurm(self, name: str) -> bool:
        where = self.evals[name].where
        return where == "slurm" or (where == "auto" and "SLURM_JOB_ID" in os.environ)

    def _start(self, run: _Launched) -> None:
        try:
            (run.folder / "failed").unlink(missing_ok=True)
            (run.folder / "evals.yaml").write_text(dump_yaml(chosen_evals(self.evals[run.name].eval_config)))
            if self._is_for_slurm(run.name):
                run.submit(self.launcher)
                assert run.job is not None
                run.job_file.write_text("\n".join(run.job))
            else:
                with run.log.open("ab") as log:
                    # In a session of its own: Ctrl-C is for the training, which ends this one in its own time.
                    run.start(stdout=log, stdin=subprocess.DEVNULL, env=without_ranks(), start_new_session=True)
                logger.info("%s started, log %s", run.title, run.log)
        except (OSError, UserError) as error:
            self._fail(run, str(error))
            return
        self.pending.append(run)

    def finished(self) -> list[Landed]:
        """On rank 0, what came of every launch that has ended since the last call."""
        self._ask_slurm()
        landed = []
        for run in [run for run in self.pending if self._is_over(run)]:
            self.pending.remove(run)
            try:
                landed.append(self._land(run))
            except OSError as error:
                self._fail(run, f"what came of it cannot be read: {reason(error)}")
        return landed

    def _land(self, run: _Launched) -> Landed:
        scores, pictures, is_complete = self._read(run)
        if run.process is not None and run.process.returncode != 0:
            run.failure = run.status().message
        if run.failure is not None:
            self._fail(run, run.failure)
        elif not is_complete:
            self._fail(run, f"not all of it has results, see {run.log if run.process else run.folder}")
        else:
            try:
                run.weights.unlink(missing_ok=True)  # the checkpoint has them
            except OSError as error:
                logger.warning("%s could not be deleted: %s", run.weights, reason(error))
        return Landed(run.step, scores, pictures)

    def _ask_slurm(self) -> None:
        """How the jobs stand: one that ran out of memory or time leaves no other trace."""
        if time.monotonic() < self._asks_slurm_at:
            return
        pause = ASK_SLURM_S
        try:
            for run in self._jobs():
                run.ask_slurm()
        except UserError as error:  # the next question may wait in vain as long, and the training with it
            pause = UNANSWERED_S
            logger.warning("whether evaluations still run as Slurm jobs is unknown: %s", error)
        self._asks_slurm_at = time.monotonic() + pause

    def record(self, meters: Metrics, step: int) -> None:
        """Write the scores of what has ended to the metrics, beside the present step, and show loggers its pictures."""
        for landed in self.finished():
            if landed.scores:
                meters.append(step, {**landed.scores, "eval_step": landed.step})
            for name, path in landed.pictures.items():
                try:
                    meters.picture(step, name, path)
                except (OSError, SyntaxError) as error:  # the latter is Pillow's, of a broken PNG
                    logger.warning("%s is not shown in train.loggers: %s", path, error)

    def _read(self, run: _Launched) -> tuple[dict[str, float], dict[str, Path], bool]:
        """The scores, of which pictures have none, the pictures, and whether all evaluations came to their end."""
        try:
            content = read_results(run.folder / "results" / "results.json")
            rows = score_rows(content)
        except UserError:
            return {}, {}, False
        results = run.folder / "results"
        pictures = {
            f"eval/{run.name}/{name}/{path.stem}": path
            for name, entry in content["evaluations"].items()
            for path in pictures_of(entry, name, results)[:PICTURES_EACH]
        }
        scores = {
            f"eval/{run.name}/{row.evaluation}/{row.method}/{row.metric}": row.values[0]
            for row in rows
            if row.values[0] is not None
        }
        for name, value in scores.items():
            logger.info("step %d  %s  %.4f", run.step, name, value)
        return scores, pictures, all(entry.get("status", "done") == "done" for entry in content["evaluations"].values())

    def _fail(self, run: _Launched, why: str) -> None:
        logger.warning("%s failed, training goes on: %s", run.title, why)
        try:
            if run.folder.is_dir():
                (run.folder / "failed").write_text(why + "\n")
        except OSError as error:  # the disk is full, which may be why it failed
            logger.warning("%s could not be marked as failed, and may start anew: %s", run.folder, error)

    def wait(self, only: str | None = None) -> bool:
        """Wait for the processes on this machine, all or those of one set, or until the training is to stop.

        Returns: whether they have ended; the same on all ranks.
        """
        # Collectives each time, so that no rank waits for longer than its timeout allows.
        while any_rank(any(only in (None, run.name) for run in self._processes())):
            if self.stop.agreed():
                return False
            time.sleep(POLL_S)
        return True

    def _wait_if_inline(self, name: str) -> None:
        if self.evals[name].where == "inline":
            self.wait(only=name)

    def close(self) -> None:
        """End what still runs on this machine, which starts anew when the run continues; jobs of Slurm go on."""
        running = self._processes()
        for run in running:
            logger.info("%s is ended; it starts anew with the run", run.title)
        end_process(*(run.process for run in running if run.process is not None), group=True)
        if jobs := self._jobs():
            told = "evaluations that are still Slurm jobs: %d; the same command records their scores when they are done"
            logger.info(told, len(jobs))

    def _processes(self) -> list[_Launched]:
        return [run for run in self.pending if run.process is not None and not self._is_over(run)]

    def _jobs(self) -> list[_Launched]:
        return [run for run in self.pending if run.job is not None and not self._is_over(run)]

    def _is_over(self, run: _Launched) -> bool:
        """Whether it came to an end of its own; of a job, as far as its report and `ask_slurm` tell.

        Slurm asks all processes of a job to stop: an evaluation that ends with the training is left to the next start.
        """
        if run.process is None:
            return run.is_done() or run.failure is not None
        code = run.process.poll()
        return code is not None and not (code in ENDED_BY_STOP and self.stop.name is not None)


def _make_anew(folder: Path, output_dir: Path) -> None:
    """An empty folder below one that is there; what it held is of steps that were undone by going back.

    What goes wrong is left to the export into it, which tells all ranks.
    """
    with contextlib.suppress(OSError):
        remove(folder)
        for parent in reversed(folder.relative_to(output_dir).parents):
            (output_dir / parent).mkdir(exist_ok=True)  # not `parents=True`: the run's folder may have been moved away
        folder.mkdir()
