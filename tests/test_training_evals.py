"""Evaluations during training: they land in the run's metrics, they pick up where they were, they never stop it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_method
import yaml
from commands import FAKE_EVALUATION, TINY_TRAINING, make_images, metrics_of, run_main, tiny
from conftest import ROOT
from PIL import Image
from ranks import exit_codes

from config import DEFAULT_PRETRAIN_CONFIG, EvalConfig, chosen_evals, load_config, to_yaml
from default_eval_config import EVALS
from launch import StopRequest
from metrics import Metrics
from reading.sources import is_on_disk
from train_capi import CapiConfig
from training_evals import Evaluations, Landed, plan_evals
from utils import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evals")
    make_images(root / "images")
    (root / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    (root / "eval_broken.py").write_text("raise RuntimeError('as asked')")
    toy_method.write_config(root / "toy.yaml", root / "images")
    return root


def write_sets(place, path, **sets):
    """A config file whose evaluation sets run the fake script."""
    common = {"model_to_eval": "student_ema", "model_setup_script": "model.py", "period": 0, "final": False}
    entry = {"file": str(place / "eval_fake.py")}
    content = {
        name: common
        | {"where": "process"}
        | changes
        | {"eval_config": {"fake": entry | changes.get("eval_config", {})}}
        for name, changes in sets.items()
    }
    off = dict.fromkeys(("fast", "slow", "full"))  # those of the default config
    path.write_text(yaml.safe_dump({"evals": content | off}))
    return path


def command(place, config, output_dir, *more):
    arguments = [each for each in tiny(place / "images", output_dir, *more) if each != "evals=null"]
    return [str(config), *arguments]


def eval_records(output_dir):
    return [record for record in metrics_of(output_dir) if "eval_step" in record]


def sum_of(path):
    from model import load_model

    model = load_model(pretrained_weights=path)
    return sum(float(p.detach().double().sum()) for p in model.parameters())


def train_on_a_rank(arguments):
    raise SystemExit(run_main(arguments))


@pytest.fixture(scope="module")
def finished(place):
    config = write_sets(
        place,
        place / "config.yaml",
        often={"period": 3, "where": "inline"},
        last={"final": True, "model_to_eval": "student"},
        broken={"final": True, "eval_config": {"file": str(place / "eval_broken.py")}},
        pictures={"final": True, "eval_config": {"draws": True}},
    )
    run = place / "run"
    # Two processes, as torchrun starts them: the evaluation must not take itself for a third.
    codes = exit_codes(train_on_a_rank, 2, command(place, config, run, "optim.batch_size_per_gpu=2"), timeout_s=280)
    assert codes == [0, 0], (run / "log.txt").read_text()
    return run


def test_scores_land_in_the_metrics_beside_the_step_they_are_of(finished):
    records = eval_records(finished)
    often = {r["eval_step"]: r["eval/often/fake/sum/top1"] for r in records if "eval/often/fake/sum/top1" in r}
    assert sorted(often) == [3, 6]
    assert often[3] != often[6]
    assert often[6] == pytest.approx(sum_of(finished / "student_ema.pth"), abs=1e-6)
    (last,) = [r for r in records if "eval/last/fake/sum/top1" in r]
    assert last["eval/last/fake/sum/top1"] == pytest.approx(sum_of(finished / "student.pth"), abs=1e-6)
    assert not any("not" in key or "seconds" in key for record in records for key in record), "only scores"


def test_inline_means_the_next_step_waits(finished):
    records = metrics_of(finished)
    steps = [(r["step"], "eval_step" in r) for r in records]
    assert steps.index((3, True)) < steps.index((4, False))


def test_a_failed_evaluation_does_not_stop_the_training(finished):
    folder = finished / "evals" / "broken" / "step_000000006"
    assert "exit code 1" in (folder / "failed").read_text()
    assert "as asked" in (folder / "log.txt").read_text()
    assert "evals.broken of step 6 failed, training goes on" in (finished / "log.txt").read_text()
    assert (finished / "student_ema.pth").is_file() and metrics_of(finished)[-1]["step"] == 6


def test_an_evaluation_that_only_draws_has_not_failed(finished):
    folder = finished / "evals" / "pictures" / "step_000000006"
    assert (folder / "results" / "report.html").is_file()
    assert not (folder / "failed").exists()


def test_exported_weights_are_kept_only_where_they_are_needed_again(finished):
    kept = sorted(path.relative_to(finished).parts[1] for path in finished.glob("evals/*/*/weights.pth"))
    assert kept == ["broken"]
    assert len(list(finished.glob("evals/*/*/results/report.html"))) == 5


def no_slurm(number):
    raise UserError("squeue does not answer")


def test_what_did_not_land_before_a_kill_starts_anew(finished, place, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in lines if '"eval/last' in line]
    assert lost
    (run / "metrics.jsonl").write_text("".join(line for line in lines if line not in lost))
    shutil.copy(run / "student.pth", run / "evals" / "last" / "step_000000006" / "weights.pth")
    shutil.copy(run / "student.yaml", run / "evals" / "last" / "step_000000006" / "weights.yaml")
    # It was a Slurm job, and the run goes on where there is no Slurm to ask about it.
    (run / "evals" / "last" / "step_000000006" / "slurm_job").write_text("17")
    (run / "evals" / "last" / "step_000000006" / "results" / "report.html").unlink()
    monkeypatch.setattr("launch.job_state", no_slurm)
    assert run_main(command(place, place / "config.yaml", run, "optim.batch_size_per_gpu=4")) == 0
    again = [record for record in eval_records(run) if "eval/last/fake/sum/top1" in record]
    assert again == [json.loads(line) for line in lost]
    assert len(eval_records(run)) == len(eval_records(finished)), "what had landed, or failed, is not done again"


class Stub:
    """Stands for benchmark.py on this machine: it takes its time, then leaves a score."""

    def __init__(self, folder):
        self.seconds, self.results = 0.0, folder / "results"
        self.started: list[tuple[str, subprocess.Popen[Any]]] = []
        self.seen_running: list[str] = []
        """Those which still ran when another one was started."""
        entry = {"results": {"sum": {"top1": 0.5}}, "config": {}, "about": {}}
        self.results.mkdir(parents=True)
        (self.results / "results.json").write_text(json.dumps({"name": "x", "evaluations": {"fake": entry}}))
        (self.results / "report.html").write_text("")

    def start(self, command, **options):
        folder = Path(command[-1]).parent
        self.seen_running += self.running()
        code = f'trap "exit 143" TERM; sleep {self.seconds} & wait; cp -r "$0" "$1"'
        shell = ["sh", "-c", code, str(self.results), str(folder / "results")]
        process = subprocess.Popen(shell, **options)
        self.started.append((f"{folder.parent.name} {int(folder.name.removeprefix('step_'))}", process))
        return process

    def running(self):
        return [name for name, process in self.started if process.poll() is None]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "stub")
    monkeypatch.setattr("launch.start_python", stub.start)
    monkeypatch.setattr("training_evals.POLL_S", 0.02)
    return stub


def train_toy(place, folder, *overrides, during=lambda step: None, monkeypatch, **sets):
    """Six steps of the toy with these sets, in `folder / "run"`. The exit code.

    Args:
        during: called in each step with its number, that of the updates that are finished after it.
    """
    train_step = toy_method.train_step

    def step(state, *rest):
        during(state.step + 1)
        return train_step(state, *rest)

    sets = {name: {"model_to_eval": "student"} | keys for name, keys in sets.items()}
    config = write_sets(place, folder / "sets.yaml", **sets)
    own = ["optim.lr_schedule.warmup_iters=2", f"train.output_dir={folder / 'run'}"]
    with monkeypatch.context() as patched:
        patched.setattr(toy_method, "train_step", step)
        return toy_method.main([str(place / "toy.yaml"), *TINY_TRAINING, *own, str(config), *overrides])


def signal_at(number, signal_number=signal.SIGTERM):
    return lambda step: signal.raise_signal(signal_number) if step == number else None


def stopped_asleep(signal_number):
    """The module `time` for waits that are told to stop."""
    return SimpleNamespace(sleep=lambda _: signal.raise_signal(signal_number), monotonic=time.monotonic)


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("ends", ["by a signal in its step", "before the export", "after its scores landed"])
def test_what_is_due_at_the_step_of_the_last_checkpoint_is_evaluated_once(place, tmp_path, monkeypatch, stub, ends):
    mine = {"period": 2, "where": "inline"}
    with monkeypatch.context() as first:
        during = signal_at(2) if "signal" in ends else lambda step: killed() if step == 4 else None
        if "export" in ends:
            first.setattr("training.export", killed)
        train_toy(place, tmp_path, mine=mine, during=during, monkeypatch=monkeypatch)
    if "landed" in ends:
        assert [name for name, _ in stub.started] == ["mine 2"]
        assert [record["eval_step"] for record in eval_records(tmp_path / "run")] == [2]
        # It landed beside a later step, which is undone.
        path = tmp_path / "run" / "metrics.jsonl"
        path.write_text(path.read_text().replace('{"step": 2, "eval', '{"step": 3, "eval'))
    assert sorted(path.name for path in tmp_path.glob("run/checkpoints/*")) == ["step_000000002"]
    assert train_toy(place, tmp_path, mine=mine, monkeypatch=monkeypatch) == 0
    assert [name for name, _ in stub.started] == ["mine 2", "mine 4", "mine 6"]
    assert [record["eval_step"] for record in eval_records(tmp_path / "run")] == [2, 4, 6]


def test_inline_sets_that_are_taken_up_run_one_by_one_before_the_next_step(place, tmp_path, monkeypatch, stub):
    sets = {name: {"period": 2, "where": "inline"} for name in ("one", "two")}
    stub.seconds = 60.0
    with monkeypatch.context() as first:
        first.setattr("training_evals.time", stopped_asleep(signal.SIGTERM))
        train_toy(place, tmp_path, "optim.total_iters=5", **sets, monkeypatch=monkeypatch)
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert [name for name, _ in stub.started] == ["one 2", "two 2"]

    stub.seconds, stub.seen_running = 0.2, []
    beside = []
    more = {"during": lambda _: beside.extend(stub.running()), "monkeypatch": monkeypatch}
    assert train_toy(place, tmp_path, "optim.total_iters=5", **sets, **more) == 0
    assert [name for name, _ in stub.started[2:]] == ["one 2", "two 2", "one 4", "two 4"]
    assert (beside, stub.seen_running) == ([], [])
    assert [record["eval_step"] for record in eval_records(tmp_path / "run")] == [2, 2, 4, 4]


def end_all(stub, number):
    for _, process in stub.started:
        if process.poll() is None:
            os.killpg(process.pid, number)
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize(
    ("mine", "step", "before", "again"),
    [
        ({"period": 2}, 4, ["mine 2"], ["mine 2", "mine 4", "mine 6"]),
        ({"final": True}, 6, ["mine 6"], ["mine 6"]),
        ({"final": True}, None, ["mine 6"], ["mine 6"]),
    ],
    ids=["in a step", "in the last step", "in the wait"],
)
def test_evaluations_that_are_stopped_with_their_job_start_anew_with_it(
    place, tmp_path, monkeypatch, stub, number, mine, step, before, again
):
    def stop(now=None):
        if now == step:  # Slurm signals all processes of a job
            end_all(stub, number)
            signal.raise_signal(number)

    requeued, steps = [], []
    monkeypatch.setattr("training.requeue", lambda stop: requeued.append(stop.name))
    stub.seconds = 60.0
    with monkeypatch.context() as first:
        clock = SimpleNamespace(sleep=lambda _: stop(), monotonic=time.monotonic)
        first.setattr("training_evals.time", clock)
        assert train_toy(place, tmp_path, during=stop, monkeypatch=monkeypatch, mine=mine) == 0
    assert [name for name, _ in stub.started] == before
    assert requeued == [number.name]
    log = tmp_path / "run" / "log.txt"
    assert f"stopped by {number.name} after {step or 6} of 6 steps; the same command continues" in log.read_text()
    assert not list(tmp_path.glob("run/evals/*/*/failed"))

    stub.seconds = 0.0
    assert train_toy(place, tmp_path, during=steps.append, monkeypatch=monkeypatch, mine=mine) == 0
    assert (steps, len(requeued)) == ([5, 6] if step == 4 else [], 1), "what was trained, or queued, once more"
    assert [name for name, _ in stub.started] == [*before, *again]
    assert sorted(f"mine {record['eval_step']}" for record in eval_records(tmp_path / "run")) == again
    assert (tmp_path / "run" / "student.pth").is_file()


def test_a_job_that_is_stopped_in_its_last_step_and_has_nothing_to_do_is_not_requeued(place, tmp_path, monkeypatch):
    monkeypatch.setattr("training.requeue", lambda _: pytest.fail("requeued"))
    assert train_toy(place, tmp_path, during=signal_at(6, signal.SIGUSR2), monkeypatch=monkeypatch) == 0
    assert "stopped by" not in (tmp_path / "run" / "log.txt").read_text()


def test_an_evaluation_that_is_ended_alone_has_failed(place, tmp_path, monkeypatch, stub):
    stub.seconds = 60.0
    ends = {"during": lambda _: end_all(stub, signal.SIGTERM), "monkeypatch": monkeypatch}
    assert train_toy(place, tmp_path, **ends, mine={"period": 4}) == 0
    (failed,) = tmp_path.glob("run/evals/*/*/failed")
    assert re.match("exit code 143|ended by SIGTERM", failed.read_text())


def test_all_evaluations_are_asked_to_end_before_any_is_waited_for(place, tmp_path, monkeypatch):
    """Each may take long, and the training has to requeue itself within the time that Slurm gives it."""
    processes = []

    def start(command, **options):  # ends only once both were asked to
        own, other = f"asked-{len(processes)}", f"asked-{1 - len(processes)}"
        code = (
            'trap "touch $0; until [ -e $1 ]; do sleep 0.01; done; exit 0" TERM; touch $2; while :; do sleep 0.01; done'
        )
        ready = tmp_path / f"ready-{len(processes)}"
        shell = ["sh", "-c", code, str(tmp_path / own), str(tmp_path / other), str(ready)]
        processes.append(subprocess.Popen(shell, **options))
        while not ready.exists():
            time.sleep(0.01)
        return processes[-1]

    monkeypatch.setattr("launch.start_python", start)
    monkeypatch.setattr("utils.END_S", 10)
    sets = {"one": {"period": 4}, "two": {"period": 4}}
    assert train_toy(place, tmp_path, during=signal_at(5), monkeypatch=monkeypatch, **sets) == 0
    assert [process.returncode for process in processes] == [0, 0]


class FakeSlurm:
    """Takes jobs, and says how they stand."""

    def __init__(self, monkeypatch):
        self.states: dict[str, str | None] = {}
        self.asked, self.now = 0, 0.0

        def submit(job):
            number = str(17 + len(self.states))
            self.states[number] = "PENDING"
            return number, job.output_dir / f"{number}_0_log.out"

        monkeypatch.setattr("launch.Job.submit", submit)
        monkeypatch.setattr("launch.job_state", self.state)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=time.sleep)
        monkeypatch.setattr("training_evals.time", clock)

    def state(self, number):
        self.asked += 1
        if number not in self.states:
            raise UserError("squeue does not answer")
        return self.states[number]


@pytest.fixture
def fake_slurm(monkeypatch):
    return FakeSlurm(monkeypatch)


@pytest.fixture
def jobs(place, tmp_path, fake_slurm):
    """Evaluations of a run that goes on, one of which is a job that an earlier process submitted."""
    script = {"file": str(place / "eval_fake.py")}
    cfg = EvalConfig(1, False, "student", "model.py", {"fake": script}, "slurm", True)
    launcher = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x"]).launcher

    def export(name, path):
        path.write_text(name)

    before = Evaluations(tmp_path, {"mine": cfg}, launcher, StopRequest(), device="cpu", kept_step=0)
    before.launch_due(1, export)
    after = Evaluations(tmp_path, {"mine": cfg}, launcher, StopRequest(), device="cpu", kept_step=1)
    after.take_up()
    fake_slurm.asked = 0
    return after


@pytest.mark.parametrize(("answers", "times"), [(True, 60), (False, 2)])
def test_slurm_is_asked_about_once_a_minute_and_less_where_it_does_not_answer(jobs, fake_slurm, answers, times):
    """A training waits for up to a minute each time."""
    if not answers:
        del fake_slurm.states["17"]
    for fake_slurm.now in range(0, 3600, 2):
        assert jobs.finished() == []
    assert times <= fake_slurm.asked <= times + 1


@pytest.mark.parametrize("ends", ["dead", "late", "unheard of"])
def test_a_job_that_left_without_a_report_has_failed(jobs, fake_slurm, stub, tmp_path, caplog, ends):
    folder = tmp_path / "evals" / "mine" / "step_000000001"
    if ends == "unheard of":
        del fake_slurm.states["17"]
    else:
        fake_slurm.states["17"] = None
    landed = []
    for fake_slurm.now in range(0, 600, 50):
        landed += jobs.finished()
        if ends == "late" and fake_slurm.now == 50:  # on a shared file system what a job wrote shows after a while
            shutil.copytree(stub.results, folder / "results")
    assert [each.scores for each in landed] == {"late": [{"eval/mine/fake/sum/top1": 0.5}], "dead": [{}]}.get(ends, [])
    assert [run.step for run in jobs.pending] == [1] * (ends == "unheard of")
    assert (folder / "failed").exists() == (ends == "dead")
    why = f"Slurm job 17, log {folder}/17_0_log.out: ended without finishing"
    assert (f"evals.mine of step 1 failed, training goes on: {why}" in caplog.text) == (ends == "dead")
    assert ("squeue does not answer" in caplog.text) == (ends == "unheard of")


@pytest.mark.parametrize("is_done", [True, False])
def test_a_run_tells_which_evaluations_are_still_jobs_and_records_them_when_it_is_started_again(
    place, tmp_path, monkeypatch, fake_slurm, stub, is_done
):
    full, run = {"final": True, "where": "slurm"}, tmp_path / "run"
    told = "evaluations that are still Slurm jobs: {}; the same command records their scores when they are done"
    assert train_toy(place, tmp_path, monkeypatch=monkeypatch, full_size=full, other=full) == 0
    assert told.format(2) in (run / "log.txt").read_text()
    assert eval_records(run) == []
    for number, name in zip(fake_slurm.states, ["full_size", "other"][: 1 + is_done], strict=False):
        fake_slurm.states[number] = None
        shutil.copytree(stub.results, run / "evals" / name / "step_000000006" / "results")
    assert train_toy(place, tmp_path, monkeypatch=monkeypatch, full_size=full, other=full) == 0
    assert len(fake_slurm.states) == 2, "a job was submitted twice"
    assert len(eval_records(run)) == 1 + is_done
    assert (told.format(1) in (run / "log.txt").read_text()) == (not is_done)


def test_not_even_a_disk_that_takes_no_note_of_a_failure_stops_the_training(place, tmp_path, caplog):
    script = {"file": str(place / "eval_fake.py")}
    cfg = EvalConfig(1, False, "student", "model.py", {"fake": script}, "process", True)
    launcher = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x"]).launcher
    runs = Evaluations(tmp_path, {"mine": cfg}, launcher, StopRequest(), device="cpu", kept_step=0)

    def export(name, path):
        (path.parent / "failed").mkdir(parents=True)  # stands for a file that cannot be written

    runs.launch_due(1, export)
    assert "evals.mine of step 1 failed, training goes on" in caplog.text
    assert "could not be marked as failed" in caplog.text
    assert runs.finished() == []


STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("method", "name", "told", "scores"),
    [
        ("unlink", "weights.pth", "weights.pth could not be deleted: Stale file handle", 1),
        ("is_file", "report.html", "ended without finishing", 1),
        ("read_text", "results.json", "failed, training goes on", 0),
        ("is_file", "pca.png", "failed, training goes on: what came of it cannot be read: Stale file handle", 0),
    ],
)
def test_no_error_of_the_file_system_while_scores_are_taken_in_stops_the_training(
    jobs, fake_slurm, stub, tmp_path, caplog, monkeypatch, method, name, told, scores
):
    folder = tmp_path / "evals" / "mine" / "step_000000001"
    fake_slurm.states["17"] = None
    shutil.copytree(stub.results, folder / "results")
    plain = getattr(Path, method)

    def fails(path, *args, **kwargs):
        if path.name == name and path.is_relative_to(folder):
            raise STALE
        return plain(path, *args, **kwargs)

    def pictures_of(*_):
        (folder / "results" / "pca.png").is_file()
        return []

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(Path, method, fails)
    monkeypatch.setattr("training_evals.pictures_of", pictures_of)
    for fake_slurm.now in range(0, 600, 50):
        jobs.record(Metrics(tmp_path), 5)
    assert told in caplog.text
    assert len(eval_records(tmp_path)) == scores
    assert jobs.pending == []


def test_pictures_go_to_the_loggers_and_none_that_is_broken_stops_the_training(tmp_path, caplog, monkeypatch):
    Image.new("RGB", (5, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    launcher = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x"]).launcher
    runs = Evaluations(tmp_path, {}, launcher, StopRequest(), device="cpu", kept_step=0)
    landed = [
        Landed(3, {}, {"bad": tmp_path / "bad.png", "good": tmp_path / "good.png"}),
        Landed(4, {"eval/a": 0.5}, {}),
    ]
    monkeypatch.setattr(runs, "finished", lambda: landed)
    shown: list[tuple[int, str]] = []

    class Shown(Metrics):
        def picture(self, step, name, path):
            with Image.open(path) as image:
                image.load()
            shown.append((step, name))

    runs.record(Shown(tmp_path), 5)
    assert shown == [(5, "good")]
    assert f"{tmp_path / 'bad.png'} is not shown in train.loggers" in caplog.text
    assert metrics_of(tmp_path) == [{"step": 5, "eval/a": 0.5, "eval_step": 4}], "pictures alone make no line"


def test_a_set_may_name_evaluations_of_the_defaults_and_change_them():
    chosen = chosen_evals({"ade20k_segmentation": {"resolution": 448}, "mine": {"file": "x.py"}})
    assert chosen["ade20k_segmentation"] == EVALS["ade20k_segmentation"] | {"resolution": 448}
    assert chosen["mine"] == {"file": "x.py"}


def evals_of(*sources):
    return load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x", *map(str, sources)]).evals


def may_download(*sources):
    return sorted(name for name, cfg in (evals_of(*sources) or {}).items() if cfg is not None and cfg.download)


def test_a_set_downloads_its_data_if_the_user_named_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("evals: {slow: {where: inline}}\n")
    (tmp_path / "evals_off.yaml").write_text("evals: {slow: null}\noptim: {total_iters: 7}\n")
    (tmp_path / "copy.yaml").write_text(DEFAULT_PRETRAIN_CONFIG.read_text())
    assert may_download() == []
    assert may_download(DEFAULT_PRETRAIN_CONFIG) == [], "the default file, given as a source, is nobody's wish"
    assert may_download("evals.fast.period=10000") == ["fast"], "the same value as the default, but typed"
    assert may_download(tmp_path / "mine.yaml") == ["slow"]
    assert may_download(tmp_path / "evals_off.yaml") == []
    assert may_download(tmp_path / "copy.yaml") == [], "the copy says download: false"
    assert may_download(DEFAULT_PRETRAIN_CONFIG, "evals.full.final=false", "evals.fast.download=true") == [
        "fast",
        "full",
    ]
    assert may_download("evals.fast.download=false", "evals.fast.period=3") == []
    assert may_download("evals=null", "evals.fast=null") == []
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["evals.fast.period=3"])))
    assert may_download(resolved) == ["fast"], "a job that is given the resolved file would decide differently"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty places for data, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    return tmp_path


def test_default_evaluations_run_only_where_their_data_is(caches):
    kept, lines = plan_evals(evals_of())
    assert kept == {}, "ADE20K or ImageNet would be downloaded"
    said = "\n".join(lines)
    assert "evals.slow: in1k_classification left out" in said and "hf://ILSVRC/imagenet-1k" in said
    assert "evals.fast.download=true" in said
    (caches / "torch/datasets/ADE20K/ADEChallengeData2016").mkdir(parents=True)
    kept, lines = plan_evals(evals_of())
    assert {name: list(cfg.eval_config) for name, cfg in kept.items()} == {
        "fast": ["ade20k_segmentation", "ade20k_pictures_224"],
        "full": ["ade20k_segmentation", "ade20k_pictures_224", "ade20k_pictures_448"],
    }
    assert any(line.startswith("evals.full: in1k_classification left out") for line in lines)
    for split in ("train", "validation"):
        assert "slow" not in kept
        table = (
            caches / f"hf/datasets/ILSVRC___imagenet-1k/default/0.0.0/49e2ee/imagenet-1k-{split}-00000-of-00257.arrow"
        )
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_bytes(b"")
        kept, _ = plan_evals(evals_of())
    assert list(kept) == ["fast", "slow", "full"]


def test_a_named_set_runs_wherever_its_data_is(caches):
    kept, lines = plan_evals(evals_of("evals.fast.period=3"))
    assert list(kept) == ["fast"]
    assert "evals.fast: ade20k_segmentation, ade20k_pictures_224, every 3 steps" in lines


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("custom://ADE20K?split='training'", "torch/datasets/ADE20K/ADEChallengeData2016.zip"),
        ("custom://ADE20K?split='training'&root='{root}/ade'", "ade/ADEChallengeData2016/x"),
        ("custom://VOC2012?split='val'", "torch/datasets/VOC2012/VOCdevkit/x"),
        (
            "hf://ILSVRC/imagenet-1k?split='train[:10%]'",
            "hf/hub/datasets--ILSVRC--imagenet-1k/snapshots/1/data/train-0.parquet",
        ),
        ("hf://o/n?split='train'&cache_dir='{root}/c'", "c/o___n/default/0.0.0/1/n-train.arrow"),
        ("hf://parquet?data_files='{root}/*.parquet'&split='train'", "x.parquet"),
        ("hf://imagefolder?data_dir='{root}/images'&split='train'", "images/x.png"),
        ("torchvision://ImageFolder?root='{root}/images'", "images/x.png"),
        ("custom://Segmentation?root='{root}/pairs'", "pairs/images/x.png"),
        ("{root}/plain", "plain/x.png"),
    ],
)
def test_what_is_on_disk_is_seen_without_network(caches, url, file):
    url = url.format(root=caches)
    assert not is_on_disk(url, "dataset_name"), "nothing is there yet"
    (caches / file).parent.mkdir(parents=True, exist_ok=True)
    (caches / file).write_bytes(b"")
    assert is_on_disk(url, "dataset_name")


@pytest.mark.parametrize(
    ("url", "files"),
    [
        ("hf://o/n?split='train'", ["hf/hub/datasets--o--n/snapshots/1/README.md"]),
        (
            "hf://o/n?split='train'",
            ["hf/hub/datasets--o--n/snapshots/1/train.parquet", "hf/hub/datasets--o--n/blobs/a.incomplete"],
        ),
        ("hf://o/n?split='test'", ["hf/datasets/o___n/default/0.0.0/1/n-train.arrow"]),
        ("hf://o/n?split='train'", ["hf/datasets/o___n/default/0.0.0/1.incomplete/n-train.arrow"]),
        ("custom://VOC2012?split='trainaug'", ["torch/datasets/VOC2012/VOCdevkit/x"]),
    ],
)
def test_half_of_the_data_is_not_the_data(caches, url, files):
    for file in files:
        (caches / file).parent.mkdir(parents=True, exist_ok=True)
        (caches / file).write_bytes(b"")
    assert not is_on_disk(url, "dataset_name")


def test_a_run_on_a_folder_says_what_is_left_out_and_starts_nothing(caches, place, capsys):
    arguments = [each for each in tiny(place / "images", caches / "run", "optim.total_iters=1") if each != "evals=null"]
    assert run_main([*arguments, "--dry-run"]) == 0
    assert "evals.full: in1k_classification, ade20k_segmentation" in capsys.readouterr().out
    assert run_main(arguments) == 0
    assert "evals.full.download=true" in (caches / "run" / "log.txt").read_text()
    assert not (caches / "run" / "evals").exists(), "an evaluation was started whose data is not there"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{where: somewhere}", ("where='somewhere'", "inline")),
        ("{model_to_eval: teacher}", ("model_to_eval='teacher'", "student_ema")),
        ("{eval_config: {cifar: {}}}", ("eval_config.cifar", "file", "ade20k_segmentation")),
        ("{perod: 3}", ("perod", "period")),
        ("{eval_config: {ade20k_segmentation: {train_dataset: x}}}", ("train_dataset", "called train_dataset_name")),
        ("{eval_config: {mine: {script: x.py}}}", ("eval_config.mine", "unknown key script; it is called file")),
        ("{eval_config: {mine: {file: x.py}}}", ("eval_config.mine.file=x.py", "no such file")),
        ("{eval_config: {mine: 3}}", ("eval_config.mine=3", "pairs")),
    ],
)
def test_mistakes_in_a_set_are_found_before_training(entry, words):
    with pytest.raises(UserError) as caught:
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x", f"evals.fast={entry}"])
    assert all(word in str(caught.value) for word in words), caught.value
