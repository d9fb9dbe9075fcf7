import contextlib
import functools
import json
import operator
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import golden_cae
import golden_ijepa
import pytest
import slurm
import yaml
from commands import FAKE_EVALUATION, logged_steps, make_images, metrics_of, run_forked, tiny
from conftest import ROOT, run_cli
from finetunes import CASES, pretrain

import train_distributed

ENDLESS = ["optim.total_iters=100000", "train.checkpointing.period=100000"]
"""Runs that are only ended, and only saved, by a signal. Tests compare the steps that all of them made."""

WRITTEN = {
    "train_cae.py": ["tokenizer.description"],
    "finetune_classification.py": [
        "classes",
        "data.images_per_epoch",
        "backbone.architecture",
        "backbone.arguments",
        "backbone.image_mean",
        "backbone.image_std",
    ],
}
"""Keys of a run's configuration that the training fills in, by script."""

ON_CPUS = ["launcher.num_nodes=2", "launcher.gpus_per_node=0", "launcher.cpus_per_task=1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


STUB = """
import sys
if "bad.key=1" in sys.argv:
    sys.stderr.write("error: unknown key bad.key\\n")
    sys.exit(2)
assert sys.argv[-1] == "--print-config"
print(open("config.json").read())
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A training script that does nothing but check its configuration, in a repository of its own."""
    launcher = {
        "num_nodes": 2,
        "gpus_per_node": 8,
        "tasks_per_node": None,
        "cpus_per_task": 5,
        "mem": "64G",
        "time_min": 600,
        "signal_delay_s": 120,
        "partition": "long",
        "account": None,
        "qos": "high",
        "constraint": "a100|h100",
        "exclude": "node[07,12]",
        "setup": ["module load cuda"],
        "sbatch": {"mail-type": "END", "exclusive": True},
    }
    config = {"launcher": launcher, "train": {"output_dir": str(tmp_path / "run 1")}}
    (tmp_path / "train_stub.py").write_text(STUB)
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_distributed, "ROOT", tmp_path)
    monkeypatch.setattr("launch.ROOT", tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return config


def submit(*arguments: str) -> int:
    return train_distributed.main(["--script", "train_stub.py", *arguments])


def test_dry_run_prints_every_option_and_writes_nothing(stub, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert submit("--dry-run") == 0
    script = capsys.readouterr().out
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert options.pop("output") == f"'{tmp_path}/run 1/jobs/001/%j_0_log.out'"
    assert options == {
        "nodes": "2",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "cpus-per-task": "5",
        "mem": "64G",
        "time": "600",
        "signal": "USR2@120",
        "partition": "long",
        "qos": "high",
        "constraint": "'a100|h100'",
        "exclude": "'node[07,12]'",
        "mail-type": "END",
        "exclusive": "",
        "requeue": "",
        "open-mode": "append",
        "job-name": "'run 1'",
    }
    assert script.index("module load cuda") < script.index("srun"), "the set-up must come before the training"
    assert f"'{tmp_path}/run 1/jobs/001/code/train_stub.py' '{tmp_path}/run 1/jobs/001/config.yaml'" in script
    assert "--kill-on-bad-exit=1" in script
    assert "submitit.core" not in script, "submitit's own signal handler must not run"
    assert sorted(tmp_path.rglob("*")) == before


def test_without_slurm_the_error_gives_the_torchrun_line(stub, capsys):
    assert submit("a.yaml", "data.dataset=/my images") == 2
    error = capsys.readouterr().err
    assert "no Slurm here" in error
    assert (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29400 "
        "train_stub.py a.yaml 'data.dataset=/my images'" in error
    )
    stub["launcher"]["num_nodes"] = 1
    Path("config.json").write_text(json.dumps(stub))
    assert submit("a.yaml") == 2
    assert "torchrun --standalone --nproc-per-node 8 train_stub.py a.yaml" in capsys.readouterr().err


def test_the_scripts_own_message_and_exit_code_are_passed_on(stub, capfd):
    assert submit("bad.key=1") == 2
    assert capfd.readouterr().err == "error: unknown key bad.key\n"


@pytest.mark.parametrize("name", ["train_nothing.py", "/bin/sh", "../other/train.py"])
def test_a_script_must_be_in_the_repository(stub, capsys, name):
    assert train_distributed.main(["--script", name]) == 2
    assert f"--script {name}: must be the name of a training script in" in capsys.readouterr().err


def test_the_defaults_and_train_capi_work_as_a_user_types_it(images, tmp_path):
    done = run_cli("train_distributed.py", *tiny(images, tmp_path / "run"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert "#SBATCH --ntasks-per-node=8\n" in done.stdout
    assert "#SBATCH --partition" not in done.stdout, "a default names a site's partition"
    done = run_forked("train_distributed.py", "launcher.partitoin=x", "--dry-run")
    assert done.returncode == 2
    assert "did you mean launcher.partition?" in done.stderr
    assert "Traceback" not in done.stderr


# On a real Slurm.


UNHURRIED = """
import sys, time

def wait(event, arguments):
    if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and "a" in str(arguments[1]):
        time.sleep(0.3)

sys.addaudithook(wait)
"""
"""Makes a line of metrics take its time: jobs that only wait for a signal leave the processors to other tests."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    refusal = slurm.why_not_here()
    if refusal:
        pytest.skip(refusal)
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(UNHURRIED)
    with slurm.slurm() as started:
        started.environ["PYTHONPATH"] = str(site)
        yield started


class Submitted:
    """A tiny run on two nodes of the cluster."""

    def __init__(
        self, cluster: slurm.Cluster, arguments: list[str], output_dir: Path, script: str = "train_capi.py"
    ) -> None:
        self.cluster, self.output_dir = cluster, output_dir
        done = run_cli("train_distributed.py", "--script", script, *arguments, **cluster.environ)
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted job (\d+); its output: (.+)", done.stderr)
        assert found, done.stderr
        self.number, self.log = found[1], Path(found[2])

    def wait_for_steps(self, steps: int) -> None:
        slurm.wait_until(
            lambda: logged_steps(self.output_dir) >= steps or self.cluster.job(self.number)["JobState"] == "FAILED",
            f"{self.output_dir} has {steps} steps",
            90,
        )
        assert logged_steps(self.output_dir) >= steps, self.text()

    def wait_for_requeue(self) -> int:
        """Until it is in the queue again; the finished steps."""
        self.cluster.wait_for(self.number, JobState="PENDING", Restarts="1")
        steps = logged_steps(self.output_dir)
        assert [path.name for path in (self.output_dir / "checkpoints").iterdir()] == [f"step_{steps:09d}"], self.text()
        return steps

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)
        self.cluster.wait_for(self.number, JobState="CANCELLED")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log)"


def run_on_two_ranks(script: str, arguments: list[str], output_dir: Path, steps: int) -> None:
    """The same training without a cluster, until it has made `steps` steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAXTYPING_DISABLE": "1"},
        start_new_session=True,
    )
    try:
        slurm.wait_until(lambda: logged_steps(output_dir) >= steps, f"{output_dir} has {steps} steps", 90)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_same_steps(actual: Path, expected: Path, steps: int) -> None:
    ours, theirs = metrics_of(actual)[:steps], metrics_of(expected)[:steps]
    assert [record["step"] for record in ours] == list(range(1, steps + 1))
    assert ours == theirs


@pytest.mark.slow
def test_what_sbatch_refuses_is_said(cluster, images, tmp_path):
    arguments = tiny(images, tmp_path / "run", *ON_CPUS, "launcher.partition=nowhere")
    done = run_cli("train_distributed.py", *arguments, **cluster.environ)
    assert done.returncode == 2
    assert "sbatch refused the job" in done.stderr
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


def tiny_fine_tuning(images: Path, output_dir: Path) -> list[str]:
    case, folder = CASES["classification"], images.parent / "labelled"
    if not folder.exists():
        case.write(folder)
        pretrain(folder)
    return case.arguments(folder, f"pretrained_weights={folder / 'run' / 'student_ema.pth'}", output_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "tiny_of", "grace_s"),
    [
        ("train_capi.py", tiny, 30),
        ("train_capi.py", tiny, 0),
        ("train_ijepa.py", golden_ijepa.tiny_run, 30),
        ("train_cae.py", golden_cae.tiny_run, 30),
        ("finetune_classification.py", tiny_fine_tuning, 30),
    ],
)
def test_a_preempted_job_is_requeued_once_and_goes_on_as_if_nothing_had_been(
    cluster, images, tmp_path, script, tiny_of, grace_s
):
    cluster.run("scontrol", "update", "partitionname=debug", f"gracetime={grace_s}")
    out = tmp_path / "run"
    golden_cae.save_tokenizer(images)
    job = Submitted(cluster, [*tiny_of(images, out), *ENDLESS, *ON_CPUS], out, script)
    job.wait_for_steps(3)
    urgent = cluster.submit_urgent()
    before = job.wait_for_requeue()
    cluster.wait_for(urgent, JobState="COMPLETED")
    cluster.start_now(job.number)
    job.wait_for_steps(before + 3)
    # The second start is ended by its user, who wants no third one.
    job.cancel()
    assert cluster.job(job.number)["Restarts"] == "1", job.text()
    log = job.text()
    assert log.count("starting at step 0") == 1
    # Without grace time Slurm requeues a job before the job hears of it.
    by_slurm = "no requeue, because Slurm has put it back into the queue already"
    assert (f"requeueing Slurm job {job.number} after SIGTERM" in log, by_slurm in log) == (grace_s > 0, grace_s == 0)
    assert log.count("no requeue, because its state is COMPLETING: it was cancelled") == 1
    assert "Exited with" not in log, "a rank did not leave with 0"
    assert f"at step {before} of" in log

    folder = job.log.parent
    assert (folder / "code" / script).read_text() == (ROOT / script).read_text()
    assert (folder / f"{job.number}_submission.sh").exists()
    submitted, ran = (yaml.safe_load((where / "config.yaml").read_text()) for where in (folder, out))
    for key in WRITTEN.get(script, ()):
        for cfg in (submitted, ran):
            *sections, name = key.split(".")
            functools.reduce(operator.getitem, sections, cfg).pop(name)
    assert submitted == ran

    straight = tmp_path / "straight"
    run_on_two_ranks(script, [*tiny_of(images, straight), *ENDLESS], straight, before + 3)
    assert_same_steps(out, straight, before + 3)


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_is_requeued_and_goes_on(cluster, images, tmp_path):
    out = tmp_path / "run"
    limit = ["launcher.time_min=2", "launcher.signal_delay_s=70"]
    job = Submitted(cluster, [*tiny(images, out), *ENDLESS, *ON_CPUS, *limit], out)
    job.wait_for_steps(1)
    slurm.wait_until(lambda: "stopped by SIGUSR2" in job.text(), f"Slurm asked it to stop: {job.text()}", 100)
    before = job.wait_for_requeue()
    cluster.start_now(job.number)
    job.wait_for_steps(before + 3)
    job.cancel()
    assert f"requeueing Slurm job {job.number} after SIGUSR2" in job.text()
    assert "Exited with" not in job.text(), "a rank did not leave with 0"

    straight = tmp_path / "straight"
    run_on_two_ranks("train_capi.py", [*tiny(images, straight), *ENDLESS], straight, before + 3)
    assert_same_steps(out, straight, before + 3)


def with_evaluation(arguments: list[str], place: Path, script: str = FAKE_EVALUATION, **entry: Any) -> list[str]:
    """Arguments of a training whose only set of evaluations runs this script."""
    (place / "eval_fake.py").write_text(textwrap.dedent(script.format(root=str(ROOT))))
    common = {"model_to_eval": "student_ema", "model_setup_script": "model.py"}
    mine = common | entry | {"eval_config": {"fake": {"file": str(place / "eval_fake.py")}}}
    (place / "sets.yaml").write_text(
        yaml.safe_dump({"evals": {"fast": None, "slow": None, "full": None, "mine": mine}})
    )
    return [str(place / "sets.yaml"), *(each for each in arguments if each != "evals=null")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_evaluations_of_a_job_are_jobs_and_land_in_the_metrics_when_the_run_goes_on(cluster, images, tmp_path):
    out = tmp_path / "run"
    arguments = with_evaluation(tiny(images, out, *ON_CPUS), tmp_path, where="auto", period=3, final=False)
    job = Submitted(cluster, arguments, out)
    report = out / "evals" / "mine" / "step_000000003" / "results" / "report.html"
    slurm.wait_until(report.is_file, f"the evaluation of step 3 is done: {job.text()}", 200)
    cluster.wait_for(job.number, JobState="COMPLETED")
    assert "evals.mine of step 3 is Slurm job" in job.text()
    assert "evaluations that are still Slurm jobs: 2; the same command records their scores" in job.text()

    done = run_cli("train_capi.py", *arguments, **cluster.environ)
    assert done.returncode == 0, done.stderr
    landed = [record for record in metrics_of(out) if record.get("eval_step") == 3]
    assert len(landed) == 1 and "eval/mine/fake/sum/top1" in landed[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_is_preempted_in_its_last_evaluations_is_requeued_for_them_alone(cluster, images, tmp_path):
    cluster.run("scontrol", "update", "partitionname=debug", "gracetime=30")
    out, release = tmp_path / "run", tmp_path / "release"
    held = f"""
    import pathlib, time
    while not pathlib.Path({str(release)!r}).exists():
        time.sleep(0.1)
    {FAKE_EVALUATION}"""
    arguments = with_evaluation(tiny(images, out, *ON_CPUS), tmp_path, held, where="process", period=0, final=True)
    job = Submitted(cluster, arguments, out)
    slurm.wait_until(lambda: "evals.mine of step 6 started" in job.text(), f"it is evaluated: {job.text()}", 100)
    urgent = cluster.submit_urgent()
    cluster.wait_for(job.number, JobState="PENDING", Restarts="1")
    release.touch()
    cluster.wait_for(urgent, JobState="COMPLETED")
    cluster.start_now(job.number)
    cluster.wait_for(job.number, seconds=150, JobState="COMPLETED", Restarts="1")
    log = job.text()
    assert "stopped by SIGTERM after 6 of 6 steps; the same command continues" in log
    assert f"requeueing Slurm job {job.number} after SIGTERM" in log
    assert (log.count("step 6/6"), log.count("evals.mine of step 6 started")) == (1, 2)
    assert [record["eval_step"] for record in metrics_of(out) if "eval_step" in record] == [6]
