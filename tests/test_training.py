"""training.py: a method of a few lines goes through everything that a training has around its step."""

import functools
import json
import re
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_method
import yaml
from commands import (
    FAKE_EVALUATION,
    TINY_TRAINING,
    assert_same_run,
    make_images,
    metrics_of,
    probed_and_evaluated,
    run_forked,
)
from conftest import ROOT
from PIL import Image
from ranks import run_on_ranks

import training
from checkpoint import read_tensors
from config import load_config
from metrics import Throughput
from training_evals import Evaluations


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images, a script that evaluates, and the configuration of a run of six steps."""
    root = tmp_path_factory.mktemp("toy")
    make_images(root / "images")
    (root / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    toy_method.write_config(root / "toy.yaml", root / "images")
    return root


def arguments(place: Path, output_dir: Path, *overrides: str) -> list[str]:
    own = ["optim.lr_schedule.warmup_iters=2", f"train.output_dir={output_dir}"]
    return [str(place / "toy.yaml"), *TINY_TRAINING, *own, *overrides]


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Path:
    """A run of the toy, never interrupted."""
    run = tmp_path_factory.mktemp("straight")
    assert toy_method.main(arguments(place, run)) == 0
    return run


EIGHT_BITS = ("optim.optimizer=AdamW8bit", "model.embed_dim=64", "optim.batch_size_per_gpu=6")
"""One of the toy's matrices is then large enough for them."""


@pytest.fixture(scope="module")
def in_8_bits(place, tmp_path_factory) -> Path:
    """Four steps of a wider toy, never interrupted."""
    run = tmp_path_factory.mktemp("eight")
    assert toy_method.main(arguments(place, run, *EIGHT_BITS, "optim.total_iters=4")) == 0
    return run


def test_a_toy_learns_logs_and_exports(finished):
    records = metrics_of(finished)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    log = (finished / "log.txt").read_text()
    assert f"contact sheet: {finished / 'contact_sheet.png'} (4 crops; normalised: mean" in log
    assert re.search(r"step 6/6  colour \d\.\d{3}  lr \S+  \|  \S+ img/s", log)
    weights = torch.load(finished / "student.pth", weights_only=True)
    assert {key.partition(".")[0] for key in weights} == {"backbone", "head"}
    assert not (finished / "student_ema.pth").exists(), "this method has no average"


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_toy_ends_like_one_never_interrupted(place, finished, tmp_path, monkeypatch, stop_at):
    step = toy_method.train_step

    def stopped(state, *rest):
        if state.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step(state, *rest)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(toy_method, "train_step", stopped)
        assert toy_method.main(arguments(place, tmp_path)) == 0
    assert metrics_of(tmp_path)[-1]["step"] == stop_at + 1
    assert toy_method.main(arguments(place, tmp_path)) == 0
    assert_same_run(tmp_path, finished, exports=("student",))


@pytest.mark.parametrize(
    ("before", "after"),
    [("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16"), ("float16", "float16")],
)
def test_a_toy_may_go_on_in_another_precision(place, finished, tmp_path, before, after):
    """It computes in float32 whatever the precision: only the scale of the loss differs, which changes no bit."""
    for precision, interval in ((before, 1), (after, 100)):
        own = [f"efficiency.param_dtype={precision}", f"efficiency.grad_scaler={str(precision == 'float16').lower()}"]
        own.append(f"efficiency.grad_scaler_growth_interval={interval}")
        rmtree(tmp_path / "checkpoints" / "step_000000006", ignore_errors=True)  # as if it had been killed after step 4
        assert toy_method.main(arguments(place, tmp_path, *own)) == 0
    assert_same_run(tmp_path, finished, exports=("student",))
    scaler = json.loads((tmp_path / "checkpoints" / "step_000000006" / "state.json").read_text())["extra"]["scaler"]
    grown = 2**4 if before == "float16" else 1  # in each of the steps before, and in none after, as configured
    assert scaler.get("scale") == (2**16 * grown if after == "float16" else None)


def train_on_this_rank(sources: list[str]) -> None:
    cfg = load_config(toy_method.ToyConfig, None, sources)
    toy_method.train(cfg, Path(cfg.train.output_dir), torch.device("cpu"))


@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
def test_a_toy_on_two_ranks_is_one_on_one(place, finished, tmp_path, mode):
    divided = [f"efficiency.fsdp={mode}", "optim.batch_size_per_gpu=2"]
    run_on_ranks(train_on_this_rank, 2, arguments(place, tmp_path, *divided))
    a, b = (torch.load(run / "student.pth", weights_only=True) for run in (tmp_path, finished))
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize(("num_ranks", "mode"), [(None, "none"), (3, "simple"), (2, "fully_shard")])
def test_moments_in_8_bits_go_on_bit_for_bit_or_on_other_ranks(place, in_8_bits, tmp_path, num_ranks, mode):
    """Up to rounding there: what lies between two levels may be rounded to the other one."""
    shutil.copytree(in_8_bits / "checkpoints" / "step_000000002", tmp_path / "checkpoints" / "step_000000002")
    continued = arguments(place, tmp_path, *EIGHT_BITS, f"efficiency.fsdp={mode}", "optim.total_iters=4")
    if num_ranks is None:
        assert toy_method.main(continued) == 0
    else:
        run_on_ranks(train_on_this_rank, num_ranks, [*continued, f"optim.batch_size_per_gpu={6 // num_ranks}"])
    a, b = (
        read_tensors(
            run / "checkpoints" / "step_000000004", lambda sizes: [key for key in sizes if "mix.weight" in key]
        )
        for run in (tmp_path, in_8_bits)
    )
    assert a["optimizers.student.backbone.mix.weight.exp_avg"].dtype == torch.uint8
    for key, there in b.items():
        distance = (a[key].double() - there.double()).norm()
        assert distance <= (0 if num_ranks is None else 1e-3 if "exp_avg" in key else 1e-6) * there.double().norm(), key


def test_a_toy_is_evaluated_while_it_trains_also_before_its_first_log_line(place, tmp_path):
    entry = {"file": str(place / "eval_fake.py")}
    evals = {"mine": {
        "period": 2, "final": False, "model_to_eval": "student", "where": "inline", "download": False,
        "model_setup_script": toy_method.__file__, "eval_config": {"fake": entry},
    }}  # fmt: skip
    (tmp_path / "evals.yaml").write_text(yaml.safe_dump({"evals": evals}))
    run, sources = tmp_path / "run", [str(tmp_path / "evals.yaml"), "train.log_loss_every=3", "optim.total_iters=3"]
    assert toy_method.main(arguments(place, run, *sources)) == 0
    (record,) = [record for record in metrics_of(run) if "eval_step" in record]
    assert (record["step"], record["eval_step"]) == (3, 2), (run / "log.txt").read_text()
    weights = read_tensors(run / "checkpoints" / "step_000000002", list)
    total = sum(float(w.double().sum()) for key, w in weights.items() if key.startswith("student.backbone."))
    assert record["eval/mine/fake/sum/top1"] == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_speed_and_time_left_are_those_of_the_steps_alone(place, tmp_path, monkeypatch, is_resumed):
    more = [*probed_and_evaluated(tmp_path, "student", toy_method.__file__), "optim.total_iters=5"]
    monkeypatch.setattr("launch.start_python", lambda _, **options: subprocess.Popen(["true"], **options))
    monkeypatch.setattr("training_evals.POLL_S", 0.02)
    if is_resumed:
        assert toy_method.main(arguments(place, tmp_path / "run", *more, "optim.total_iters=2")) == 0
        shutil.rmtree(tmp_path / "run" / "evals")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training, "Throughput", functools.partial(Throughput, clock=lambda: clock.now))

    def take(seconds, owner, name):
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    take(1.0, toy_method, "train_step")
    take(1e2, training.Probe, "__call__")
    take(1e3, training.Checkpoints, "save")
    take(1e4, training, "export")
    take(1e5, Evaluations, "record")
    take(1e6, Evaluations, "take_up")
    assert toy_method.main(arguments(place, tmp_path / "run", *more)) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    timed = [line for line in lines if "step_ms" in line][2 * is_resumed :]
    assert [line["step_ms"] for line in timed] == [1e3] * (5 - 2 * is_resumed)
    assert [line["eta_s"] for line in timed] == [4.0, 3.0, 2.0, 1.0, 0.0][2 * is_resumed :]


def test_what_a_toy_does_not_export_cannot_be_evaluated(place, tmp_path, capsys):
    evals = "evals={mine: {period: 1, final: false, model_to_eval: student_ema, where: inline, download: false, "
    evals += "model_setup_script: model.py, eval_config: {ade20k_segmentation: {}}}}"
    assert toy_method.main(arguments(place, tmp_path, evals)) == 2
    assert "evals.mine.model_to_eval='student_ema': must be one of student" in capsys.readouterr().err


def test_no_picture_is_worth_a_training(place, finished, tmp_path):
    (tmp_path / "contact_sheet.png").mkdir()
    assert toy_method.main(arguments(place, tmp_path)) == 0
    assert f"no contact sheet: {tmp_path / 'contact_sheet.png'} cannot be written" in (tmp_path / "log.txt").read_text()
    assert_same_run(tmp_path, finished, exports=("student",))


def test_the_commands_of_a_toy_are_those_of_every_training(place, finished, tmp_path):
    script = str(ROOT / "tests" / "toy_method.py")
    shown = run_forked(script, *arguments(place, tmp_path), "--dry-run", PYTHONPATH=str(ROOT))
    assert shown.returncode == 0, shown.stderr
    assert "a toy" in shown.stdout and "10 images" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run.png"], "a dry run writes nothing but its pictures"
    assert f"pictures     {tmp_path / 'dry_run.png'}, 4 crops; normalised: mean" in shown.stdout
    sheets = [
        Image.open(folder / name) for folder, name in ((tmp_path, "dry_run.png"), (finished, "contact_sheet.png"))
    ]
    of_dry_run, of_training = (np.asarray(sheet)[30:] for sheet in sheets)  # below what is said of the batch
    assert np.array_equal(of_dry_run, of_training), "a dry run shows other crops than the training begins with"
    before = (finished / "student.pth").read_bytes()
    (finished / "student.pth").unlink()
    exported = run_forked(script, *arguments(place, finished), "--export", PYTHONPATH=str(ROOT))
    assert exported.stdout.splitlines() == [str(finished / "student.pth")], exported.stderr
    assert (finished / "student.pth").read_bytes() == before


@pytest.mark.parametrize("chosen", [True, False])
def test_an_export_leaves_what_a_training_that_no_lock_shows_is_writing(place, finished, tmp_path, chosen):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in (".tmp-step_000000008", ".trash-step_000000002-1", ".replaced-step_000000001"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    before = sorted(run.glob("checkpoints/**/*"))
    own = [f"train.resume_from={run / 'checkpoints' / 'step_000000006'}"] if chosen else []
    assert toy_method.main([*arguments(place, run, *own), "--export"]) == 0
    assert sorted(run.glob("checkpoints/**/*")) == before


def test_a_toy_whose_loss_is_not_finite_is_stopped_before_it_is_saved(place, tmp_path, monkeypatch, capsys):
    average = training.average_gradients_

    def poisoned(module, sharding):
        average(module, sharding)
        next(module.parameters()).grad.view(-1)[0] = torch.nan

    monkeypatch.setattr(training, "average_gradients_", poisoned)
    assert toy_method.main(arguments(place, tmp_path)) == 2
    assert "grad_norm became NaN at step 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoints/step_*"))


def test_activations_that_cannot_leave_the_device_are_warned_of(place):
    cfg = load_config(toy_method.ToyConfig, place / "toy.yaml", [*TINY_TRAINING, "efficiency.offload_activations=true"])
    (line,) = training.efficiency_warnings(cfg, torch.device("cpu"))
    assert line.startswith("efficiency.offload_activations=true: does nothing on cpu")
    assert not training.efficiency_warnings(cfg, torch.device("cuda"))


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recomputation_without_compilation_is_warned_of_on_a_gpu(place, device, recomputed, is_compiled):
    options = {"rematerialization.enabled": recomputed, "compilation.do_student.disable": not is_compiled}
    overrides = [f"efficiency.{key}={str(value).lower()}" for key, value in options.items()]
    cfg = load_config(toy_method.ToyConfig, place / "toy.yaml", overrides)
    expected = device == "cuda" and recomputed and not is_compiled
    assert bool(training.efficiency_warnings(cfg, torch.device(device))) == expected
