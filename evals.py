"""Evaluations of a run while it trains: `benchmark.py` is launched on exported weights, as a user would.

Each launch has a folder of its own, `<run>/evals/<set>/step_000010000/`: the exported weights, evals.yaml, log.txt, and
results/ with results.json and report.html. What has been launched and what has landed in the run's metrics is read from
these folders and from metrics.jsonl, so a run that is killed picks its evaluations up when it continues. Nothing that
goes wrong here stops the training: it is logged, with the place of the log.
"""

import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import EvalConfig, LauncherConfig, chosen_evals, dump_yaml
from distributed import any_rank, broadcast_object, rank
from launch import ROOT, Job, StopRequest, job_state
from metrics import Metrics, read_metrics
from report import read_results, score_rows
from sources import is_on_disk
from utils import UserError, due, end_process, remove, start_python, write_text_atomically

logger = logging.getLogger("evals")

POLL_S = 1.0
OF_RANKS = re.compile(r"RANK$|^LOCAL_|^GROUP_|^ROLE_|^WORLD_SIZE$|^MASTER_|^TORCHELASTIC_|^SLURM_|^PMI")
"""Environment variables by which an evaluation would take itself for a rank of the training."""


@dataclass
class _Launched:
    """One evaluation set at one step, on rank 0."""

    name: str
    step: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pth"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def job_file(self) -> Path:
        return self.folder / "slurm_job"

    def is_complete(self) -> bool:
        """Whether benchmark.py came to its end, where it writes the report."""
        return (self.folder / "results" / "report.html").is_file()

    def is_queued(self) -> bool:
        """Whether it is a Slurm job that waits or runs."""
        if not self.job_file.is_file():
            return False
        try:
            return job_state(self.job_file.read_text()) is not None
        except UserError as error:  # the run may go on where there is no Slurm
            logger.warning("whether %s still runs as a Slurm job is unknown, so it starts anew: %s", self.folder, error)
            return False

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def plan_evals(
    evals: Mapping[str, EvalConfig | None] | None,
) -> tuple[dict[str, EvalConfig], list[str]] | UserError:
    """The sets that are evaluated, without what would have to download data and may not, and a line for people on each.

    A mistake in the URL of a data set is returned, for all ranks to raise.
    """
    kept: dict[str, EvalConfig] = {}
    lines = []
    for name, cfg in (evals or {}).items():
        if cfg is None:
            continue
        entries = chosen_evals(cfg.eval_config)
        try:
            missing = {} if cfg.download else {each: urls for each in entries if (urls := _not_here(entries[each]))}
        except UserError as error:
            return error
        chosen = {each: keys for each, keys in cfg.eval_config.items() if each not in missing}
        if chosen or not entries:
            kept[name] = replace(cfg, eval_config=chosen)
            when = [f"every {cfg.period} steps"] if cfg.period > 0 else []
            when += ["at the end"] if cfg.final else []
            lines.append(f"evals.{name}: {', '.join(chosen)}, {' and '.join(when) or 'never'}")
        if missing:
            urls = ", ".join(dict.fromkeys(url for each in missing.values() for url in each))
            lines.append(
                f"evals.{name}: {', '.join(missing)} left out, since data is not on this machine: {urls}. "
                f"evals.{name}.download=true downloads it at the first evaluation; evals.{name}=null ends this message"
            )
    return kept, lines


def _not_here(entry: Mapping[str, Any]) -> list[str]:
    """Data URLs of an evaluation that would be downloaded."""
    found = []
    for key, value in entry.items():
        if key.endswith(("dataset_name", "dataset_names")) and value is not None:
            urls = value.values() if isinstance(value, dict) else [value]
            found += [url for url in map(str, urls) if not is_on_disk(url, key)]
    return found


class EvalRuns:
    """The evaluations of one run. Every rank calls the methods together; rank 0 launches and reads.

    Args:
        output_dir: of the run.
        evals: the sets of the configuration; those whose data is missing are left out, see `plan_evals`.
        launcher: where Slurm jobs run; an evaluation takes one node and at most one of its GPUs.
        device: `train.device`, for evaluations on this machine.
        kept_step: the step from which the run continues; folders of later steps belong to what was undone.
    """

    def __init__(
        self,
        output_dir: Path,
        evals: Mapping[str, EvalConfig | None] | None,
        launcher: LauncherConfig,
        *,
        device: str,
        kept_step: int,
    ) -> None:
        self.output_dir, self.device = output_dir, device
        planned: Any = broadcast_object(plan_evals(evals) if rank() == 0 else None)
        if isinstance(planned, UserError):
            raise planned
        self.evals, lines = planned
        """What is evaluated, the same on all ranks: by the data that rank 0 sees."""
        for line in lines:
            logger.info(line)
        self.launcher = replace(
            launcher, num_nodes=1, tasks_per_node=1, gpus_per_node=min(1, launcher.gpus_per_node), signal_delay_s=60
        )
        self.pending: list[_Launched] = []
        known: set[tuple[str, int]] = set()
        if rank() == 0:
            for launched, is_over in self._earlier(kept_step):
                known.add((launched.name, launched.step))
                if is_over:
                    continue
                if launched.is_complete() or launched.is_queued():
                    self.pending.append(launched)
                else:
                    logger.info("evals.%s of step %d was not finished; it starts anew", launched.name, launched.step)
                    self._start(launched)
        self.known = broadcast_object(known)
        """Sets and steps that have been launched, by this process or before."""

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
                launched = _Launched(name, int(folder.name.removeprefix("step_")), folder)
                is_over = (name, launched.step) in recorded or (folder / "failed").exists()
                if launched.step <= kept_step and (is_over or launched.weights.is_file()):
                    yield launched, is_over

    def launch_due(
        self, step: int, export: Callable[[str, Path], None], stop: StopRequest, *, final: bool = False
    ) -> None:
        """Launch the sets that are due after `step` finished updates, unless they have been.

        Args:
            step: finished updates.
            export: writes `student` or `student_ema` to a path; every rank calls it.
            stop: ends the wait for an `inline` set.
            final: whether it was the last update.
        """
        for name in self._due(step, final=final):
            cfg = self.evals[name]
            self.known.add((name, step))
            launched = _Launched(name, step, self.output_dir / "evals" / name / f"step_{step:09d}")
            if rank() == 0:
                _make_anew(launched.folder, self.output_dir)
            try:
                export(cfg.model_to_eval, launched.weights)
            except UserError as error:  # a full disk, for example: on all ranks alike
                logger.warning("evals.%s of step %d is left out: %s", name, step, error)
                continue
            if rank() == 0:
                self._start(launched)
            if cfg.where == "inline":
                self.wait(stop, only=name)

    def are_due(self, step: int) -> bool:
        """Whether `launch_due` would export weights after `step` finished updates."""
        return bool(self._due(step, final=False))

    def _due(self, step: int, *, final: bool) -> list[str]:
        return [
            name
            for name, cfg in self.evals.items()
            if (due(step, cfg.period) or (final and cfg.final)) and (name, step) not in self.known
        ]

    def _start(self, launched: _Launched) -> None:
        cfg = self.evals[launched.name]
        try:
            (launched.folder / "failed").unlink(missing_ok=True)
            (launched.folder / "evals.yaml").write_text(dump_yaml(chosen_evals(cfg.eval_config)))
            if self._where(cfg) == "slurm":
                request = self._request(launched, cfg, device="auto")
                job = Job(ROOT / "benchmark.py", dump_yaml(request), launched.folder, self.launcher)
                number, log = job.submit()
                launched.job_file.write_text(number)
                logger.info("evals.%s of step %d is Slurm job %s, log %s", launched.name, launched.step, number, log)
            else:
                request = self._request(launched, cfg, device=self.device)
                write_text_atomically(launched.folder / "config.yaml", dump_yaml(request))
                command = [str(ROOT / "benchmark.py"), str(launched.folder / "config.yaml")]
                environment = {key: value for key, value in os.environ.items() if not OF_RANKS.search(key)}
                with launched.log.open("ab") as log:
                    # In a session of its own: Ctrl-C is for the training, which ends this one in its own time.
                    launched.process = start_python(
                        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                        start_new_session=True,
                    )  # fmt: skip
                logger.info("evals.%s of step %d started, log %s", launched.name, launched.step, launched.log)
        except (OSError, UserError) as error:
            self._fail(launched, str(error))
            return
        self.pending.append(launched)

    def _where(self, cfg: EvalConfig) -> str:
        return ("slurm" if "SLURM_JOB_ID" in os.environ else "process") if cfg.where == "auto" else cfg.where

    def _request(self, launched: _Launched, cfg: EvalConfig, *, device: str) -> dict[str, Any]:
        folder = launched.folder.absolute()
        return {
            "output_dir": str(folder / "results"),
            "model_path": cfg.model_setup_script,
            "model_loader_kwargs": {"pretrained_weights": str(launched.weights.absolute())},
            "evals_config_path": str(folder / "evals.yaml"),
            "name": f"{self.output_dir.absolute().name}, step {launched.step}",
            "random_baseline": False,
            "run_dir": str(self.output_dir.absolute()),
            "device": device,
        }

    def finished(self) -> list[tuple[int, dict[str, float]]]:
        """On rank 0, the step and the scores of every launch that has ended since the last call."""
        landed = []
        for launched in list(self.pending):
            if launched.is_running() or (launched.process is None and not launched.is_complete()):
                continue
            self.pending.remove(launched)
            scores = self._read(launched, launched.folder / "results" / "results.json")
            code = launched.process.returncode if launched.process is not None else 0
            if code != 0 or not scores:
                why = f"exit code {code}" if code else "no scores"
                self._fail(launched, f"{why}, see {launched.log if launched.process else launched.folder}")
            else:
                launched.weights.unlink(missing_ok=True)  # the checkpoint has them
            if scores:
                landed.append((launched.step, scores))
        return landed

    def record(self, meters: Metrics, step: int) -> None:
        """Write the scores of what has ended to the metrics, beside the present step."""
        for eval_step, scores in self.finished():
            meters.append(step, {**scores, "eval_step": eval_step})

    def _read(self, launched: _Launched, results: Path) -> dict[str, float]:
        try:
            rows = score_rows(read_results(results))
        except UserError:
            return {}
        scores = {
            f"eval/{launched.name}/{row.evaluation}/{row.method}/{row.metric}": row.values[0]
            for row in rows
            if row.values[0] is not None
        }
        for name, value in scores.items():
            logger.info("step %d  %s  %.4f", launched.step, name, value)
        return scores

    def _fail(self, launched: _Launched, why: str) -> None:
        logger.warning("evals.%s of step %d failed, training goes on: %s", launched.name, launched.step, why)
        try:
            if launched.folder.is_dir():
                (launched.folder / "failed").write_text(why + "\n")
        except OSError as error:  # the disk is full, which may be why it failed
            logger.warning("%s could not be marked as failed, and may start anew: %s", launched.folder, error)

    def wait(self, stop: StopRequest, only: str | None = None) -> None:
        """Wait for the processes on this machine, all or those of one set, or until the training is to stop."""
        while not stop.agreed():
            running = [each for each in self.pending if each.is_running() and only in (None, each.name)]
            # A collective each time, so that no rank waits for longer than its timeout allows.
            if not any_rank(bool(running)):
                return
            time.sleep(POLL_S)

    def close(self) -> None:
        """End what still runs on this machine; it starts anew when the run continues."""
        for launched in self.pending:
            if launched.process is not None and launched.is_running():
                logger.info("evals.%s of step %d is ended; it starts anew with the run", launched.name, launched.step)
                end_process(launched.process, group=True)


def _make_anew(folder: Path, output_dir: Path) -> None:
    """An empty folder below one that is there; what it held is of steps that were undone by going back.

    What goes wrong is left to the export into it, which tells all ranks.
    """
    with contextlib.suppress(OSError):
        remove(folder)
        for parent in reversed(folder.relative_to(output_dir).parents):
            (output_dir / parent).mkdir(exist_ok=True)  # not `parents=True`: the run's folder may have been moved away
        folder.mkdir()
