import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PYTHON, ROOT, run_cli
from ranks import run_on_ranks

import distributed
import launch
from config import LauncherConfig
from launch import (
    HOLD_SIGNALS,
    OF_RANKS,
    Job,
    ScriptRun,
    Status,
    StopRequest,
    SubmittedJob,
    claim_output_dir,
    copy_code,
    launches,
    repeated_launch,
    requeue,
    without_ranks,
)
from speed.compiling import kept_compilations
from utils import UserError


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_sets_the_flag_however_often_it_comes(number):
    with StopRequest() as stop:
        assert stop.name is None
        for _ in range(3):  # Slurm sends SIGTERM twice when it preempts a job without grace time
            send(number)
        assert stop.name == number.name


def test_the_stronger_signal_counts():
    with StopRequest() as stop:
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        assert stop.name == "SIGUSR2"


def test_a_wait_that_never_ends_gives_way_to_a_signal_and_no_other_moment_does():
    read, write = os.pipe()
    with StopRequest() as stop:
        assert stop.wait_for(lambda: 7) == 7
        timer = threading.Timer(0.05, send, [signal.SIGTERM])
        timer.start()
        assert stop.wait_for(lambda: os.read(read, 1)) is None
        assert stop.name == "SIGTERM"
        assert stop.wait_for(lambda: os.read(read, 1)) is None, "it waits although a signal came before"
        send(signal.SIGTERM)
    with StopRequest() as stop:
        with pytest.raises(UserError):
            stop.wait_for(fail)
        send(signal.SIGTERM)
        assert stop.name == "SIGTERM"
    for end in (read, write):
        os.close(end)


def fail():
    raise UserError("as asked")


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] == before


def run_python(program: str, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, *before, "-c", "import os, signal, time\nfrom launch import StopRequest\n" + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_ctrl_c_twice_ends_a_run_that_hangs():
    done = run_python(
        "with StopRequest() as stop:\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never')\n"
    )
    assert done.stdout == "still here\n", "the same Ctrl-C came twice, from the terminal and from a launcher"
    assert done.returncode == -signal.SIGINT


def test_a_signal_during_the_imports_is_not_lost():
    program = "os.kill(os.getpid(), signal.SIGTERM)\nwith StopRequest() as stop:\n    print(stop.name)\n"
    assert run_python(program).returncode == -signal.SIGTERM
    done = run_python(program, "-c", HOLD_SIGNALS)
    assert done.stdout == "SIGTERM\n", done.stderr


def stop_on_some(signals: list[str | None]) -> tuple[bool, bool, str | None]:
    with StopRequest() as stop:
        first = stop.agreed()
        name = signals[distributed.rank()]
        if name:
            send(signal.Signals[name])
        return first, stop.agreed(), stop.name


def test_ranks_agree_on_the_strongest_signal_of_any():
    assert run_on_ranks(stop_on_some, 3, [None, "SIGUSR2", "SIGTERM"]) == [(False, True, "SIGUSR2")] * 3


SCONTROL = """#!/bin/bash
echo "$@" >>{calls}
[ $(wc -l <{calls}) -gt {silent} ] || {{ echo "{silence}" >&2; exit 1; }}
case "$1" in
show) echo "{shown}" ;;
requeue) [ -z "{refusal}" ] || {{ echo "{refusal}" >&2; exit 1; }} ;;
esac
"""

RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=1 BatchFlag=1 PreemptTime=None Command=/a b"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2025-01-01T00:00:00")


# A run's folder.


HOLD = """
import os, signal, sys
from launch import claim_output_dir

with claim_output_dir(sys.argv[1]):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    signal.pause()
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    command = [PYTHON, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="is in use by another run") as caught, claim_output_dir(tmp_path):
                pass
            parts = (f"process {holder.pid}", socket.gethostname(), "started 20", f"train.output_dir={str(tmp_path)!r}")
            assert all(part in str(caught.value) for part in parts)
            holder.kill()
            holder.wait(timeout=30)
            with claim_output_dir(tmp_path):  # although a forked data worker of the dead run still lives
                os.kill(worker, 0)
        finally:
            holder.kill()
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(("variable", "leaves_after_s", "waited_s"), [
    ("SLURM_RESTART_COUNT", 130, 130),
    ("TORCHELASTIC_RESTART_COUNT", 130, 130),
    ("SLURM_RESTART_COUNT", 10_000, 300),
    (None, 130, 0),
])  # fmt: skip
def test_a_start_that_repeats_another_one_waits_for_its_end_but_not_for_ever(
    variable, leaves_after_s, waited_s, tmp_path, monkeypatch, caplog
):
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    def lock_file(path, *, wait):
        assert not wait
        path.write_text("process 3")
        if now < leaves_after_s:
            raise BlockingIOError

    monkeypatch.setattr("launch.time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr("launch.lock_file", lock_file)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, str(int(name == variable)))
    refused = waited_s < leaves_after_s
    expectation = pytest.raises(UserError, match="in use by another run") if refused else contextlib.nullcontext()
    with expectation, claim_output_dir(tmp_path):
        pass
    assert waited_s <= now < waited_s + 10
    assert caplog.text.count("waiting for process 3 to leave") == -(-waited_s // 60)


def test_a_claim_ends_with_its_block(tmp_path):
    for _ in range(2):
        with claim_output_dir(tmp_path / "new" / "run") as directory:
            assert directory.is_dir()
            with pytest.raises(UserError, match=f"process {os.getpid()} "), claim_output_dir(directory):
                pass


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        message = r"train.output_dir=.*cannot be written: (File exists|Not a directory)"
        with pytest.raises(UserError, match=message), claim_output_dir(path):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"), claim_output_dir(tmp_path / "run"):
        pass


@pytest.fixture
def slurm_job(tmp_path, monkeypatch):
    """A `scontrol` that shows the given job and remembers what it was asked. Other tests have a real one."""
    calls = tmp_path / "calls"

    def make(shown: str, *, refusal: str = "", silent: int = 0, silence: str = ""):
        words = {"shown": shown, "refusal": refusal, "silent": silent, "silence": silence}
        (tmp_path / "scontrol").write_text(SCONTROL.format(calls=calls, **words))
        (tmp_path / "scontrol").chmod(0o755)
        return lambda: [line for line in calls.read_text().splitlines() if line.startswith("requeue")]

    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    now = [0.0]
    clock = {"monotonic": lambda: now[0], "sleep": lambda seconds: now.append(now.pop() + seconds)}
    monkeypatch.setattr("launch.time", SimpleNamespace(**clock))
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped_by(number: signal.Signals) -> StopRequest:
    with StopRequest() as stop:
        send(number)
        requeue(stop)
    return stop


@pytest.mark.parametrize(
    ("number", "shown", "calls"),
    [
        (signal.SIGUSR2, RUNNING, ["requeue 7"]),
        (signal.SIGTERM, PREEMPTED, ["requeue 7"]),
        (signal.SIGTERM, RUNNING, []),
        (signal.SIGTERM, RUNNING.replace("RUNNING", "COMPLETING"), []),
        (signal.SIGTERM, RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=1", "Restarts=2"), []),
        (signal.SIGUSR2, RUNNING.replace("BatchFlag=1", "BatchFlag=0"), []),
        (signal.SIGINT, RUNNING, []),
    ],
    ids=[
        "time-limit",
        "preempted",
        "signal-of-the-user",
        "cancelled",
        "slurm-has-requeued-it",
        "interactive",
        "ctrl-c",
    ],
)
def test_a_job_is_requeued_only_if_slurm_ended_it_and_will_not_do_so_itself(slurm_job, number, shown, calls):
    assert repeated_launch() == "Slurm job 7"
    requeued = slurm_job(shown)
    stopped_by(number)
    assert requeued() == calls
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "Slurm's answer would end a process that is leaving"


def test_only_the_own_element_of_an_array_is_requeued(slurm_job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeued = slurm_job(RUNNING)
    stopped_by(signal.SIGUSR2)
    assert requeued() == ["requeue 7_3"]


@pytest.mark.parametrize(
    ("environment", "names", "repeated"),
    [
        ({}, [], None),
        ({"SLURM_JOB_ID": "7"}, ["Slurm job 7"], None),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ["Slurm job 7"], "Slurm job 7"),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}, ["torchrun a"], None),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, ["torchrun a"], "torchrun a"),
        (
            {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"},
            ["Slurm job 7", "torchrun a"],
            "torchrun a",
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "b"},
            ["Slurm job 7", "torchrun b"],
            "Slurm job 7",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"},
            [f"torchrun {os.getppid()} on {socket.gethostname()}"],
            f"torchrun {os.getppid()} on {socket.gethostname()}",
        ),
    ],
)
def test_a_process_knows_what_repeats_it(environment, names, repeated, monkeypatch):
    for name in [name for name in os.environ if OF_RANKS.search(name)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launches(), repeated_launch()) == (names, repeated)


@pytest.mark.parametrize("refusal", ["Requested operation is presently disabled", None])
def test_a_refused_requeue_is_said_and_does_not_fail_the_run(slurm_job, caplog, monkeypatch, refusal):
    if refusal:
        slurm_job(RUNNING, refusal=refusal)
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    stopped_by(signal.SIGUSR2)
    assert "Slurm job 7 could not be requeued" in caplog.text
    assert (refusal or "scontrol") in caplog.text
    assert "Submit it again" in caplog.text


@pytest.mark.parametrize(
    "silence",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "Socket timed out on send/recv operation",
        "Zero Bytes were transmitted or received",
    ],
)
@pytest.mark.parametrize(("silent", "requeues"), [(1, 1), (5, 1), (1000, 0)])
def test_a_controller_that_does_not_answer_is_asked_again_for_a_while(slurm_job, caplog, silence, silent, requeues):
    requeued = slurm_job(RUNNING, silent=silent, silence=silence)
    stopped_by(signal.SIGUSR2)
    assert len(requeued()) == requeues
    assert (f"Slurm job 7 could not be requeued: {silence}. Submit it again" in caplog.text) == (requeues == 0)


@pytest.mark.parametrize("refusal", ["Requested operation is presently disabled", "Access/permission denied"])
def test_a_refusal_is_not_contested(slurm_job, refusal):
    requeued = slurm_job(RUNNING, refusal=refusal)
    stopped_by(signal.SIGUSR2)
    assert requeued() == ["requeue 7"]


def test_outside_slurm_nothing_happens(slurm_job, monkeypatch, tmp_path):
    slurm_job(PREEMPTED)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    handler = signal.getsignal(signal.SIGTERM)
    stopped_by(signal.SIGTERM)
    assert not (tmp_path / "calls").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert repeated_launch() is None


def job(output_dir: str = "run", **launcher: Any) -> Job:
    none = dict.fromkeys(
        ("tasks_per_node", "cpus_per_task", "time_min", "mem", "partition", "account", "qos", "constraint", "exclude")
    )
    given: dict[str, Any] = {"num_nodes": 1, "gpus_per_node": 0, "signal_delay_s": 60, "setup": [], "sbatch": {}}
    return Job(ROOT / "train_capi.py", "", Path(output_dir), LauncherConfig(**(none | given | launcher)))


OF_A_RANK = {
    "torchrun": {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "64",
                 "MASTER_ADDR": "gpu7", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none"},
    "srun": {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "64", "SLURM_PROCID": "0",
             "SLURM_CPU_BIND": "quiet,mask_cpu:0xF", "SLURM_CPU_BIND_LIST": "0xF", "SRUN_CPUS_PER_TASK": "16",
             "SLURM_RESTART_COUNT": "1", "SLURM_ARRAY_JOB_ID": "5", "PMI_RANK": "0"},
}  # fmt: skip
OF_THE_USER = {
    "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "x", "SLURM_CLUSTERS": "a", "SBATCH_EXPORT": "ALL", "HF_TOKEN": "x",
    "CUDA_VISIBLE_DEVICES": "0", "TORCH_HOME": "x",
}  # fmt: skip


@pytest.mark.parametrize("launcher", OF_A_RANK)
def test_what_a_rank_submits_or_starts_is_no_rank_of_its_job(launcher, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\nenv -0 >{tmp_path}/exported\necho Submitted batch job 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setattr(launch, "copy_code", lambda *_, **__: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (OF_A_RANK[launcher] | OF_THE_USER).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert job(str(tmp_path / "run")).submit()[0] == "17"
    assert dict(os.environ) == before, "the rank has lost its place"
    exported = dict(line.split("=", 1) for line in (tmp_path / "exported").read_text().split("\0") if line)
    for environment in (exported, without_ranks()):
        assert not OF_A_RANK[launcher].keys() & environment.keys()
        assert environment.items() >= OF_THE_USER.items()


BLOCKED = "import signal; print(sorted(signal.Signals(n).name for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
CHILD = f"from utils import start_python; start_python(['-c', {BLOCKED!r}]).wait()"


@pytest.mark.parametrize(("is_training", "blocked"), [(False, []), (True, ["SIGTERM", "SIGUSR2"])])
def test_signals_are_held_for_those_alone_who_let_them_through_again(is_training, blocked, tmp_path):
    (tmp_path / "code").mkdir()
    script = tmp_path / "code" / "train_capi.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BLOCKED}; sys.stdout.flush(); {CHILD}")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", "-s"],
        input=replace(job(), is_training=is_training).sbatch_script(tmp_path),
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.splitlines() == [str(blocked), "[]"], "its children have no part in it"


@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\u2028", "\x85"])
@pytest.mark.parametrize(
    "where",
    ["mem", "partition", "account", "qos", "constraint", "exclude", "setup", "sbatch value", "sbatch name", "folder"],
)
def test_nothing_can_begin_a_line_of_its_own_in_the_job_script(where, character):
    text = f"a{character}touch pwned"
    given: dict[str, Any] = {where: text}
    if where == "setup":
        given = {"setup": ["module load cuda", text]}
    elif where.startswith("sbatch"):
        given = {"sbatch": {"mail-type": text} if where.endswith("value") else {text: "x"}}
    elif where == "folder":
        given = {"output_dir": f"{text}/run"}
    with pytest.raises(UserError, match="must"):
        job(**given)


def test_the_folder_in_which_a_job_is_submitted_counts_too(tmp_path, monkeypatch):
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(UserError, match=r"output_dir=.*must not contain line breaks"):
        job()


@pytest.mark.parametrize("name", ["", "a b", "a=b", "-x", "--mail-type", "a;b", "ü", "#x"])
def test_names_of_sbatch_options_are_names(name):
    with pytest.raises(UserError, match=r"launcher\.sbatch=.*names of sbatch's long options"):
        job(sbatch={name: "x"})


@pytest.mark.parametrize("value", [["a"], {"a": 1}])
def test_an_sbatch_option_has_one_value(value):
    with pytest.raises(UserError, match=r"launcher\.sbatch\.mail-type=.*must be one text or number, or true"):
        job(sbatch={"mail-type": value})


@pytest.mark.parametrize("name", ["100%j", "50%", "a\\b"])
def test_what_slurm_replaces_in_paths_is_refused(name):
    with pytest.raises(UserError, match=r"output_dir=.*Slurm replaces"):
        job(name)


def test_sbatch_options_that_are_false_or_null_are_left_out(tmp_path):
    script = job(sbatch={"requeue": False, "comment": None, "nice": 0, "exclusive": True}).sbatch_script(tmp_path)
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nice=0" in options
    assert "#SBATCH --exclusive" in options
    assert not any("requeue" in option or "comment" in option for option in options)


def test_whatever_a_folder_is_called_the_script_runs_as_meant_and_nothing_else(tmp_path):
    name = """it's a "run" $HOME `touch pwned` $(touch pwned) # 1; touch pwned & | > pwned * ~ !x {a,b} 'é"""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    folder = tmp_path / name / "jobs" / "001"
    script = job(str(tmp_path / name), partition=" a b'; touch pwned #").sbatch_script(folder)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-s"], input=script, env={"PATH": path}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    arguments = done.stdout.splitlines()
    assert str(folder / "config.yaml") in arguments
    assert arguments[arguments.index("--output") + 1] == str(folder / "%j_%t_log.out")
    assert done.stderr == ""
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    (root / "configs").mkdir(parents=True)
    (root / "runs").mkdir()
    (root / "speed").mkdir()
    for name in (
        "train.py",
        "default.yaml",
        "configs/small.yaml",
        "speed/kernels.py",
        "notes.txt",
        "ignored.bin",
        "runs/log.txt",
        "new.py",
    ):
        (root / name).write_text(name)
    (root / ".gitignore").write_text("ignored.bin\n")
    monkeypatch.setattr(launch, "ROOT", root)
    return root


def git(root: Path, *args: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", root, *identity, *args], check=True, capture_output=True)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_copy_of_the_code_has_what_git_has_and_new_files(repository, tmp_path, monkeypatch, caplog):
    git(repository, "init", "-q")
    git(repository, "add", "train.py", "default.yaml", "notes.txt", ".gitignore")
    git(repository, "commit", "-qm", "first")
    (repository / "train.py").write_text("changed")
    (repository / "notes.txt").unlink()
    (repository / "data.bin").write_bytes(bytes(2**20 + 1))
    monkeypatch.setattr(launch, "LARGEST_UNTRACKED_MIB", 1)
    copy_code(tmp_path / "code", leave_out=repository / "runs")
    assert files_of(tmp_path / "code") == {
        "train.py", "default.yaml", ".gitignore", "configs/small.yaml", "speed/kernels.py", "new.py", "REVISION",
        "ORIGIN",
    }  # fmt: skip
    assert (tmp_path / "code" / "train.py").read_text() == "changed"
    assert "data.bin (1 MiB, not in git) is not copied" in caplog.text


def test_what_another_run_has_compiled_is_no_code(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")
    with kept_compilations(repository / "mine" / "compile_cache"):
        (repository / "mine" / "compile_cache" / "kernel.py").write_text("")
    git(repository, "init", "-q")
    git(repository, "add", "train.py")
    copy_code(tmp_path / "code", leave_out=repository / "runs")
    assert "new.py" in files_of(tmp_path / "code")
    assert not [name for name in files_of(tmp_path / "code") if "mine" in name]


def test_without_git_the_copy_has_modules_and_configs(repository, tmp_path):
    copy_code(tmp_path / "code")
    assert files_of(tmp_path / "code") == {
        "train.py", "new.py", "default.yaml", "configs/small.yaml", "speed/kernels.py", "REVISION", "ORIGIN",
    }  # fmt: skip


def test_without_git_the_copy_lacks_no_module_of_this_repository(tmp_path, monkeypatch):
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py", "templates"], check=True, capture_output=True)
    monkeypatch.setenv("PATH", "")
    copy_code(tmp_path / "code")
    assert set(listed.stdout.decode().split()) - files_of(tmp_path / "code") == set()


def test_a_job_takes_modules_from_its_copy_of_the_code_wherever_it_runs(tmp_path):
    """Else `model.py` of the folder where it was submitted would be another module than the one that the code knows."""
    copy_code(tmp_path / "code")
    (tmp_path / "mine.py").write_text("")
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        import config, model, utils
        for path in ("model.py", sys.argv[2] + "/model.py"):
            assert utils.import_from_path(Path(path)) is model, path
        assert config.find_file("eval_segmentation.py", "evals") == Path(sys.argv[1], "eval_segmentation.py").resolve()
        own = Path(sys.argv[1]).parent / "mine.py"
        assert utils.of_this_code(own) == own
    """
    done = run_cli("-c", textwrap.dedent(code), str(tmp_path / "code"), str(ROOT), cwd=ROOT)
    assert done.returncode == 0, done.stderr


# A script that runs here or as a job.


def script_run(folder: Path, code: str) -> ScriptRun:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(code)
    return ScriptRun(title="mine", script=folder / "script.py", config={"key": 1}, folder=folder)


def started(folder: Path, code: str, **options: Any) -> ScriptRun:
    run = script_run(folder, code)
    with run.log.open("w") as log:
        run.start(stdout=log, **options)
    return run


def test_a_script_that_runs_here_is_running_until_it_has_ended(tmp_path):
    run = started(tmp_path, "import sys; input(); print(open(sys.argv[1]).read())", stdin=subprocess.PIPE)
    assert run.process is not None
    assert run.status().word == "running"
    run.process.communicate(b"go on\n")
    assert run.status() == Status("done", log=str(tmp_path / "log.txt"))
    assert run.log.read_text() == "key: 1\n\n"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        # Of several ranks, the script speaks before torchrun does.
        ("ok\n[rank1]: ValueError: small\n[rank1]: more\nx.ChildFailedError: \n===\n", "[rank1]: ValueError: small"),
        ("first\nlast\n", "last"),
        ("", "it said nothing."),
    ],
)
def test_a_failure_is_told_in_the_scripts_own_words(tmp_path, output, reason):
    run = started(tmp_path, f"import sys; print({output!r}); sys.exit(3)")
    assert run.process is not None
    run.process.wait()
    log = str(tmp_path / "log.txt")
    assert run.status() == Status("failed", f"exit code 3: {reason} (log: {log})", log)
    run.log.unlink()
    assert "exit code 3: what it said cannot be read: No such file" in run.status().message


@pytest.mark.parametrize(
    ("in_queue", "is_done", "expected"),
    [
        ("PENDING", False, Status("running", "Slurm job 17, log x: pending", "x")),
        ("", True, Status("done", log="x")),
        ("", False, Status("failed", "Slurm job 17, log x: ended without finishing", "x")),
    ],
)
def test_a_job_stands_as_slurm_says_and_has_failed_if_it_left_without_results(
    tmp_path, monkeypatch, in_queue, is_done, expected
):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{in_queue}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ScriptRun, "is_done", lambda _: is_done)
    run = script_run(tmp_path / "run", "")
    assert run.status() == Status("done" if is_done else "not started"), "nobody has started it"
    run.job = SubmittedJob("17", "x")
    assert run.status() == expected
