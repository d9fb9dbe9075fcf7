"""How a script starts, here or on a Slurm cluster, how it stands, is asked to stop, and gets back into the queue.

A job is one `srun` of a training script, one task per GPU, from a copy of the code. Slurm asks it to stop with SIGUSR2
some time before its limit, and with SIGTERM when a more urgent job needs the nodes. The ranks agree on that between two
steps, save together, and rank 0 puts the job back into the queue; its next start continues from that checkpoint.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from config import LauncherConfig, dump_yaml, is_one_line, require
from utils import (
    UserError,
    git_revision,
    lock_file,
    reason,
    start_python,
    unblock,
    write_text_atomically,
    writing_explained,
)

logger = logging.getLogger("launch")

ROOT = Path(__file__).parent

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Weakest first: ranks that received different ones all act on the last of these."""

FAULT = 1 + len(STOP_SIGNALS)
"""Strength of a fault among requests to stop."""

SECOND_INTERRUPT_S = 1.0
"""A Ctrl-C that follows another one by less than this is the same one, passed on by a launcher."""

NO_ANSWER = re.compile("unable to contact|timed out|connection|zero bytes|socket|temporarily", re.IGNORECASE)
"""What Slurm's commands say while its controller restarts or has too much to do; anything else is an answer."""
ASKS_S, PAUSE_S = 60.0, 5.0
"""For how long a controller that does not answer is asked for a requeue, and the time between two tries of anything."""

CLAIM_S = 300.0
"""For how long a start that repeats another one waits until that has left the folder: it may still be dying, on a
machine that does not answer."""

HOLD_SIGNALS = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""Runs Python with the arguments that follow. A signal that comes during its imports, which can take a minute on a
shared file system, waits for `StopRequest` instead of ending the task, and with it the job for good. Only for scripts
with a `StopRequest`: others would not hear of these signals at all."""

OF_RANKS = re.compile(
    r"RANK$|^LOCAL_|^GROUP_|^ROLE_|^WORLD_SIZE$|^MASTER_|^TORCHELASTIC_|^PMI|^SRUN_CPUS_PER_TASK$"
    r"|^SLURM_(?!CONF|JWT$|CLUSTERS$)"
)
"""Environment variables of a job, of Slurm or torchrun, and of a process's place in it. What a rank starts would take
itself for that rank by them, and what it submits would be bound to that rank's processors. Which Slurm it is and how
one reaches it is not among them."""

LARGEST_UNTRACKED_MIB = 10
"""An untracked file above this size is data, not code, and stays out of a job's copy of the code."""


T = TypeVar("T")


class _CutShortError(BaseException):
    """Raised by the handler of a signal during `StopRequest.wait_for`; nothing in between may take it for a failure."""


class StopRequest:
    """Set by SIGTERM, SIGINT and SIGUSR2 (Slurm's warning before its time limit); read at a step boundary.

    The handler does nothing but set a flag: a save inside it could run in the middle of an update. A signal that comes
    again changes nothing, because Slurm may send SIGTERM twice within a second. Only a second Ctrl-C acts as if there
    were no handler, to end a run that hangs. A wait that may never end is cut short: see `wait_for`.

    A fault of one rank after which training cannot go on, but can still save, stops all ranks in the same way: see
    `faults`. The end of the block then raises it.
    """

    def __init__(self) -> None:
        # 1 + index in STOP_SIGNALS of the strongest signal, 0 without any; FAULT is above all
        self._received = 0
        self._agreed = 0
        self._waiting = False
        self._fault: str | None = None
        self._interrupted_at: float | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Signals can only be caught in the main thread; a run inside another one is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
            unblock(STOP_SIGNALS)  # see HOLD_SIGNALS
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal returned
        self._previous = {}
        if error is None and self.is_fault:
            from distributed import gather_objects

            raise UserError(next(fault for fault in gather_objects(self._fault) if fault))
        if isinstance(error, UserError) and self._fault is not None:
            raise UserError(f"{self._fault}. Besides: {error}") from error

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """A UserError in the block leaves it, and is kept until all ranks have agreed to stop and have saved."""
        try:
            yield
        except UserError as error:
            self._fault = self._fault or str(error)
            self._received = FAULT

    @property
    def is_fault(self) -> bool:
        """Whether what all ranks agreed on is a fault of any."""
        return self._agreed == FAULT

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received = max(self._received, 1 + STOP_SIGNALS.index(signal.Signals(number)))
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > SECOND_INTERRUPT_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted_at = self._interrupted_at or now
        if self._waiting:
            self._waiting = False
            raise _CutShortError

    def wait_for(self, get: Callable[[], T]) -> T | None:
        """What `get` gives; None if a signal comes first, or came before, and then at once.

        `get` is left wherever it is, so that what it works on is of no use any more.
        """
        try:
            try:
                self._waiting = True
                return None if self._received else get()
            finally:
                self._waiting = False
        except _CutShortError:  # also from within `finally`
            return None

    @property
    def name(self) -> str | None:
        """The strongest signal that came, None without any. The same on all ranks once `agreed` said True."""
        strength = self._agreed or self._received
        return "a fault" if strength == FAULT else STOP_SIGNALS[strength - 1].name if strength else None

    def deafen(self) -> None:
        """Ignore these signals for the rest of the process: it is leaving."""
        if self._previous:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        self._previous = {}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank calls it at the same step boundary and gets one answer."""
        from distributed import max_over_ranks  # here, because submitting a job needs no torch

        self._agreed = max_over_ranks(self._received)  # a signal that comes meanwhile counts the next time
        return self._agreed > 0


# A run's folder.


@contextlib.contextmanager
def claim_output_dir(
    output_dir: str | Path, *, key: str = "train.output_dir", remedy: str | None = None
) -> Iterator[Path]:
    """Create `output_dir` and keep other runs out of it until the block ends; every rank calls it, rank 0 holds it.

    The claim is a lock on `output_dir/.lock`, a file with the holder's name. A start that repeats another one, see
    `repeated_launch`, waits up to `CLAIM_S` for that to leave.

    Args:
        output_dir: folder of a training or an evaluation.
        key: of the configuration that names it.
        remedy: what to do if another run holds it; None for stopping that one or choosing another folder.

    Raises: UserError if another run holds the folder (it says which), or if it cannot be created or written, also for
        errors of that kind in the block.
    """
    from distributed import on_rank_0  # here, because submitting a job needs no torch

    output_dir = Path(output_dir)
    with contextlib.ExitStack() as claim:
        try:
            on_rank_0(lambda: _claim(output_dir, key, claim, remedy or f"stop that run or choose another {key}"))
        except OSError as error:
            raise UserError(
                f"{key}={str(output_dir)!r} cannot be written: {reason(error)}; choose another folder"
            ) from error
        with writing_explained(output_dir, key):
            yield output_dir


def _claim(output_dir: Path, key: str, claim: contextlib.ExitStack, remedy: str) -> None:
    """Take the lock; `claim` gives it back when it is closed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = output_dir / ".lock"
    began = told = time.monotonic()
    while True:
        try:
            descriptor = lock_file(lock, wait=False)
            break
        except BlockingIOError as error:
            holder, now = lock.read_text(errors="replace").strip(), time.monotonic()
            if now - began >= CLAIM_S or repeated_launch() is None:
                raise UserError(
                    f"{key}={str(output_dir)!r} is in use by another run ({holder or 'just starting'}); {remedy}"
                ) from error
        if now >= told:
            logger.warning("waiting for %s to leave %s", holder, output_dir)
            told += 60
        time.sleep(PAUSE_S)
    if descriptor is None:
        logger.warning("%s is on a file system without locks: a second run in it will not be noticed", output_dir)
        return
    claim.callback(os.close, descriptor)
    # A forked data worker shares the lock; were it to outlive this process, it would go on holding it.
    os.register_at_fork(after_in_child=claim.close)
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode())


# Requeue.


def launches() -> list[str]:
    """Names of what started this process and may start it again by itself: its Slurm job, its torchrun."""
    names = [f"Slurm job {job}"] if (job := _slurm_job()) else []
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):  # "none" if it was given none and needs none
        names.append(f"torchrun {run if run != 'none' else f'{os.getppid()} on {socket.gethostname()}'}")
    return names


def repeated_launch() -> str | None:
    """The one of `launches` that started this before, so that the command line is a repetition and no new decision."""
    counts = {"Slurm": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    return next((name for name in launches() if os.environ.get(counts[name.split()[0]], "0") != "0"), None)


def requeue(stop: StopRequest) -> None:
    """Put this job back into Slurm's queue if Slurm asked it to stop; outside a job, do nothing.

    Every rank calls it, after the checkpoint is complete and as the last thing before it leaves: Slurm answers a
    requeue with SIGTERM to all tasks, which they ignore from here on, and kills after its `KillWait` what is left.

    What Slurm does by itself, and this does not repeat: a job that was preempted without grace time is queued again
    already, one that the user cancelled must not come back. A job that leaves within its grace time is finished for
    Slurm, whatever its `PreemptMode`, so it is requeued here.
    """
    job = _slurm_job()
    if job is None:
        return
    from distributed import rank

    stop.deafen()
    if rank() != 0:
        return
    asks_until = time.monotonic() + ASKS_S
    while True:
        try:
            _requeue(job, stop)
        except (OSError, subprocess.SubprocessError) as error:
            why = str(getattr(error, "stderr", None) or error).strip()
            is_answer = not (isinstance(error, subprocess.TimeoutExpired) or NO_ANSWER.search(why))
            if is_answer or time.monotonic() > asks_until:
                logger.error(  # noqa: TRY400  # no traceback: the run itself ended well
                    "Slurm job %s could not be requeued: %s. Submit it again; it continues from its checkpoint",
                    *(job, why),
                )
                return
            logger.warning("Slurm job %s could not be requeued yet: %s", job, why)
        else:
            return
        time.sleep(PAUSE_S)


def _requeue(job: str, stop: StopRequest) -> None:
    """Requeue a job if it is to be; it may be already, by a call to which no answer came."""
    fields = _job_fields(_run("scontrol", "show", "job", "--oneliner", job))
    reason = _why_not_requeue(fields, stop)
    if reason:
        logger.info("Slurm job %s: no requeue, because %s", job, reason)
        return
    # The job may be killed before the next statement.
    logger.info("requeueing Slurm job %s after %s", job, stop.name)
    _run("scontrol", "requeue", job)


def _slurm_job() -> str | None:
    """Slurm's name for the job of this process; of an array, for this element alone."""
    environ = os.environ
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _why_not_requeue(fields: dict[str, str], stop: StopRequest) -> str | None:
    if fields.get("BatchFlag") == "0":
        return "it is interactive; run the same command again"
    if int(fields.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return "Slurm has put it back into the queue already"
    state = fields.get("JobState", "unknown")
    if state != "RUNNING":
        return f"its state is {state}: it was cancelled or reached its limit"
    preempted = fields.get("PreemptTime", "None") not in {"None", "Unknown"}
    if stop.name != "SIGUSR2" and not preempted:
        return f"{stop.name} did not come from Slurm, which is not preempting it"
    return None


def _job_fields(shown: str) -> dict[str, str]:
    """`scontrol show job --oneliner` as a dict; values with spaces are cut at the first one."""
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


# Submission.


@dataclass(frozen=True)
class Job:
    """A training script with its configuration, to be submitted to Slurm.

    All it needs and leaves behind is in a folder of its own below the run's output folder, which all nodes must share:

        output_dir/jobs/001/
            code/                  copy of the code at submission, which is what runs, also after a requeue
            config.yaml            resolved configuration
            17_submission.sh       what sbatch was given, after Slurm's job number
            17_0_log.out, ...      output of each task, appended to by every start

    The job runs in the folder in which it was submitted, so relative paths mean what they meant there.
    """

    script: Path
    """The training script, in this repository. It is called with a YAML file, and finds its ranks by itself."""
    config_yaml: str
    output_dir: Path
    launcher: LauncherConfig
    is_training: bool = False
    """Whether it has a `StopRequest`, for which signals are held during its imports."""

    def __post_init__(self) -> None:
        """Check everything that becomes a line of the job script: a line break in it would begin another one."""
        given = {f"launcher.{field.name}": getattr(self.launcher, field.name) for field in fields(self.launcher)}
        lines = {key: value for key, value in given.items() if isinstance(value, str)}
        lines |= {f"launcher.setup[{number}]": line for number, line in enumerate(self.launcher.setup)}
        for name, value in self.launcher.sbatch.items():
            known = re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII) is not None
            require(known, "launcher.sbatch", name, "must be names of sbatch's long options, such as mail-type")
            is_one = value is None or isinstance(value, str | int | float)
            require(is_one, f"launcher.sbatch.{name}", value, "must be one text or number, or true")
            lines[f"launcher.sbatch.{name}"] = str(value)
        for key, line in (lines | {"output_dir": str(self.output_dir.absolute())}).items():
            require(is_one_line(line), key, line, "must not contain line breaks or other control characters")
        folder = str(self.output_dir.absolute())
        remedy = "Slurm replaces % and \\ in the paths of logs; choose a folder without them"
        require(not set("%\\") & set(folder), "output_dir", folder, remedy)

    def sbatch_script(self, folder: Path) -> str:
        """What sbatch would be given if the job's folder were `folder`. Works without Slurm."""
        return self._executor(folder)._make_submission_file_text(self._command(folder), "")

    def submit(self) -> tuple[str, Path]:
        """Copy the code and submit. Returns Slurm's job number and the log of rank 0.

        Raises: UserError if sbatch refuses.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        folder = self.new_folder()
        try:
            folder.mkdir(parents=True)
            copy_code(folder / "code", leave_out=self.output_dir)
            (folder / "config.yaml").write_text(self.config_yaml)
            with _environment_without_ranks():  # all of which sbatch would hand on
                job = self._executor(folder)._submit_command(self._command(folder))
        except OSError as error:
            raise UserError(f"train.output_dir={str(self.output_dir)!r} cannot be written: {error}") from error
        except (FailedJobError, FailedSubmissionError) as error:
            shutil.rmtree(folder)
            raise UserError(f"sbatch refused the job: {error}. The options are keys of the section launcher") from error
        return job.job_id, job.paths.stdout

    def new_folder(self) -> Path:
        """The folder that `submit` would make now."""
        jobs = self.output_dir.absolute() / "jobs"
        taken = [int(path.name) for path in jobs.glob("[0-9]*") if path.name.isdecimal()]
        return jobs / f"{max(taken, default=0) + 1:03d}"

    def torchrun_line(self, arguments: list[str]) -> str:
        """How to start the same without Slurm, for people."""
        cfg, command = self.launcher, shlex.join([self.script.name, *arguments])
        if cfg.num_nodes == 1:
            return f"torchrun --standalone --nproc-per-node {cfg.num_tasks_per_node} {command}"
        return (
            f"torchrun --nnodes {cfg.num_nodes} --nproc-per-node {cfg.num_tasks_per_node} --rdzv-backend c10d "
            f"--rdzv-endpoint FIRST_MACHINE:29400 {command}"
        )

    def _command(self, folder: Path) -> str:
        script = folder / "code" / self.script.absolute().relative_to(ROOT)
        hold = ["-c", HOLD_SIGNALS] if self.is_training else []
        return shlex.join([sys.executable, *hold, "-u", str(script), str(folder / "config.yaml")])

    def _executor(self, folder: Path) -> Any:
        import submitit

        class Executor(submitit.SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 2  # the script can be shown where there is no Slurm

        cfg = self.launcher
        executor = Executor(folder)
        # `srun` of Slurm 22.05 and later does not take the processors per task from sbatch.
        cpus = [] if cfg.cpus_per_task is None else [f"--cpus-per-task={cfg.cpus_per_task}"]
        executor.update_parameters(
            job_name=self.output_dir.absolute().name,
            nodes=cfg.num_nodes,
            ntasks_per_node=cfg.num_tasks_per_node,
            gpus_per_node=cfg.gpus_per_node or None,
            cpus_per_task=cfg.cpus_per_task,
            time=cfg.time_min,
            mem=cfg.mem,
            partition=cfg.partition,
            account=cfg.account,
            qos=cfg.qos,
            constraint=cfg.constraint,
            exclude=cfg.exclude,
            signal_delay_s=cfg.signal_delay_s,
            wckey=None,
            stderr_to_stdout=True,
            setup=list(cfg.setup) or None,
            srun_args=["--kill-on-bad-exit=1", "--open-mode=append", *cpus],
            additional_parameters={
                key: value
                for key, value in ({"requeue": True} | cfg.sbatch).items()
                if value is not None and value is not False
            },
        )
        return executor


def without_ranks() -> dict[str, str]:
    """The environment for what has nothing to do with the ranks of this process's job; see `OF_RANKS`."""
    return {name: value for name, value in os.environ.items() if not OF_RANKS.search(name)}


@contextlib.contextmanager
def _environment_without_ranks() -> Iterator[None]:
    before, others = dict(os.environ), without_ranks()
    for name in before.keys() - others.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def copy_code(destination: Path, *, leave_out: Path | None = None) -> None:
    """Copy this repository: what git tracks, and new files that it does not ignore; in a copy without git, the modules.

    A file `REVISION` says which commit it was, and `ORIGIN` which folder, see `utils.of_this_code`.

    Args:
        destination: folder to make.
        leave_out: a folder inside the repository that is no code, such as that of the run.
    """
    leave_out = leave_out.absolute() if leave_out else None
    for path, tracked in _code_files():
        source = ROOT / path
        if not source.is_file() or (leave_out and leave_out != ROOT and source.is_relative_to(leave_out)):
            continue
        size_mib = source.stat().st_size / 2**20
        if not tracked and size_mib > LARGEST_UNTRACKED_MIB:
            logger.warning("%s (%.0f MiB, not in git) is not copied with the code", path, size_mib)
            continue
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, destination / path)
    (destination / "REVISION").write_text(f"{git_revision() or 'unknown'}\n")
    (destination / "ORIGIN").write_text(f"{ROOT.resolve()}\n")


def _code_files() -> list[tuple[Path, bool]]:
    """Files of the code, relative to the repository, and whether git tracks them."""

    def git(*args: str) -> list[Path]:
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", *args], capture_output=True, check=True)
        return [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]

    try:
        tracked = git("--cached")
        untracked = git("--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        tracked = untracked = []
    if tracked:
        return [(path, True) for path in tracked] + [(path, False) for path in untracked]
    patterns = ("*.py", "*/*.py", "*.yaml", "configs/**/*.yaml", "templates/*")
    return [(path.relative_to(ROOT), True) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


# A script that runs here or as a job, and how it stands.


class SubmittedJob(NamedTuple):
    """A job that Slurm has taken."""

    number: str
    """Slurm's name for it."""
    log: str
    """Path of the output of its rank 0."""

    def __str__(self) -> str:
        """As messages have it."""
        return f"Slurm job {self.number}, log {self.log}"


@dataclass(frozen=True)
class Status:
    """How a script stands."""

    word: str
    """`not started`, `running`, `done` or `failed`; benchmark.py adds `left out`."""
    message: str = ""
    """For people: why it failed, or where it runs."""
    log: str | None = None
    """Path of its output."""


@dataclass(kw_only=True)
class ScriptRun:
    """A script with its configuration, in processes of this machine or as a Slurm job, and how it stands.

    Its folder has `config.yaml` and `log.txt` of the processes, or `jobs/` of Slurm (see `Job`). A job outlives the
    process that submitted it: who comes later sets `job` to what was noted then. Processes here end with the one that
    started them.
    """

    title: str
    """What messages call it."""
    script: Path
    config: dict[str, Any]
    folder: Path
    job: SubmittedJob | None = None
    process: "subprocess.Popen[Any] | None" = None

    def is_done(self) -> bool:
        """Whether the script came to its end, as far as what it wrote tells."""
        raise NotImplementedError

    @property
    def log(self) -> Path:
        """Output of the processes of this machine."""
        return self.folder / "log.txt"

    def start(self, nproc_per_node: int = 1, **options: Any) -> "subprocess.Popen[Any]":
        """Start the script on this machine, in processes of its own, so that its memory is free afterwards.

        Args:
            nproc_per_node: processes; torchrun starts them if there are several.
            options: of `subprocess.Popen`; among them where stdout goes, of which `log` should have a copy.
        """
        config = self.folder / "config.yaml"
        write_text_atomically(config, dump_yaml(self.config))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
        command = [*(torchrun if nproc_per_node > 1 else []), str(self.script), str(config)]
        logger.info("%s: python %s", self.title, " ".join(command))
        self.job, self.process = None, start_python(command, stderr=subprocess.STDOUT, **options)
        return self.process

    def submit(self, launcher: LauncherConfig) -> Status:
        """Submit the script as a job of this size. Raises: UserError if Slurm refuses."""
        number, log = Job(self.script, dump_yaml(self.config), self.folder, launcher).submit()
        self.job, self.process = SubmittedJob(number, str(log)), None
        logger.info("%s is Slurm job %s, log %s", self.title, number, log)
        return Status("running", f"{self.job}: submitted", self.job.log)

    def status(self) -> Status:
        """How it stands at this moment; of a job, Slurm is asked. Raises: UserError if Slurm does not answer."""
        if self.process is not None:
            code, log = self.process.poll(), str(self.log)
            if code is None:
                return Status("running", f"process {self.process.pid}, log {log}", log)
            if code == 0:
                return Status("done", log=log)
            return Status("failed", f"{_how_it_ended(code)}: {_last_error(self.log)} (log: {log})", log)
        if self.job is None:
            return Status("done" if self.is_done() else "not started")
        state = job_state(self.job.number)
        if state is not None:
            return Status("running", f"{self.job}: {state.lower()}", self.job.log)
        if self.is_done():
            return Status("done", log=self.job.log)
        return Status("failed", f"{self.job}: ended without finishing", self.job.log)


class NotedRun(ScriptRun):
    """A script whose folder also says, for later commands, what was asked for and which job does it."""

    def state(self) -> dict[str, Any] | None:
        """What an earlier command noted: `request`, and `job` if that was given to Slurm. None if there was none."""
        raise NotImplementedError

    def write_state(self) -> None:
        """Note `request`, and the job that does it."""
        raise NotImplementedError


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed, perhaps because memory ran out"
    names = {number.value: number.name for number in signal.Signals}
    return f"ended by {names.get(-code, f'signal {-code}')}" if code < 0 else f"exit code {code}"


def _last_error(log: Path) -> str:
    """The line of a log that says what went wrong, of several ranks that of the script and not of torchrun."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"what it said cannot be read: {reason(error)}"
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*Error|error):? ", line)]
    return [*lines[-1:], *errors[-1:]][-1] if lines else "it said nothing."


def job_state(number: str) -> str | None:
    """The state of a Slurm job such as PENDING, None if it is not in the queue any more."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={number}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error}); try again later") from error
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue does not answer ({done.stderr.strip()}); try again later")
    return done.stdout.strip() or None
