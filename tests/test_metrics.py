import io
import json
import math
import re
import sqlite3
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import never_waiting, seeded
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from clustering import (
    HEADS,
    EmaHeadTargets,
    L2NormLinear,
    LatentHead,
    OnlineClustering,
    batch_warning,
    normalized_entropy,
    prototype_usage,
    soft_cross_entropy,
)
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from flops import (
    StepShape,
    attention_recomputation_per_image,
    device_memory_estimate,
    encoder_flops_per_image,
    num_backbone_parameters,
    step_flops_per_image,
    training_flops_per_image,
)
from metrics import (
    TIMING_KEYS,
    FiniteWatch,
    Metrics,
    NonFiniteError,
    Profile,
    Throughput,
    effective_rank,
    norm_stats,
    peak_flops,
    read_metrics,
    rounded_speed,
)
from model import EncoderDecoder
from train_capi import CapiConfig, optimizer_bytes
from utils import UserError

PUBLISHED = StepShape(
    embed_dim=1024,
    encoder_depth=24,
    decoder_depth=12,
    num_heads=16,
    num_registers=16,
    patch_size=14,
    num_patches=256,
    num_visible=90,
    num_predict=8,
    num_clusters=16384,
)
SMALL = StepShape(
    embed_dim=64,
    encoder_depth=3,
    decoder_depth=2,
    num_heads=4,
    num_registers=4,
    patch_size=4,
    num_patches=36,
    num_visible=13,
    num_predict=5,
    num_clusters=96,
)


# --- Meters and the metrics file


def test_a_line_holds_the_average_since_the_last_line(tmp_path):
    metrics = Metrics(tmp_path)
    for value in (1.0, 2.0, 6.0):
        metrics.update(loss=torch.tensor(value), lr=value / 10)
    assert metrics.write(3) == {"step": 3, "loss": 3.0, "lr": pytest.approx(0.3)}
    metrics.update(loss=torch.tensor(5.0))
    assert metrics.write(4) == {"step": 4, "loss": 5.0}, "the first window leaked into the second"


def test_each_name_is_averaged_over_its_own_updates(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(4):
        metrics.update(loss=torch.tensor(2.0))
        if step == 2:
            metrics.update(teacher_rank=torch.tensor(7.0))
    assert metrics.write(4) == {"step": 4, "loss": 2.0, "teacher_rank": 7.0}


def test_sums_are_kept_in_float64(tmp_path):
    metrics = Metrics(tmp_path)
    values = torch.rand(5000, generator=seeded(0)) * 1e-3 + 10
    for value in values:
        metrics.update(loss=value)
    assert metrics.write(1)["loss"] == pytest.approx(values.double().mean().item(), rel=1e-14)


def test_the_meters_hold_no_graph(tmp_path):
    metrics = Metrics(tmp_path)
    activation = torch.ones((), requires_grad=True).exp()
    loss, kept = activation * activation, weakref.ref(activation)
    del activation
    assert kept() is not None, "the graph of a product keeps its factors, or this shows nothing"
    metrics.update(loss=loss)
    del loss
    assert kept() is None, "activations would be kept until the window is written"


def test_the_file_has_the_exact_numbers_with_step_first_and_the_rest_in_order(tmp_path):
    metrics = Metrics(tmp_path)
    written = []
    for step in range(1, 4):
        names = (
            ["zeta", "alpha", "mid"] if step % 2 else ["mid", "zeta", "alpha"]
        )  # the order of the calls does not matter
        metrics.update(**dict(zip(names, torch.rand(3, generator=seeded(step)) / 3, strict=True)))
        written.append(metrics.write(step, images_per_s=1 / 3))
    assert read_metrics(tmp_path / "metrics.jsonl") == written
    keys = [list(json.loads(line)) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert keys == [["step", "alpha", "images_per_s", "mid", "zeta"]] * 3


def test_non_finite_values_are_null_in_the_file(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.update(loss=torch.tensor(math.nan), other=torch.tensor(math.inf))
    assert math.isnan(metrics.write(1)["loss"])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "other": None}


def test_ranks_other_than_0_write_nothing_but_see_the_averages(tmp_path):
    metrics = Metrics(tmp_path, ["wandb"], enabled=False)  # the package need not be installed there
    metrics.update(loss=torch.tensor(4.0))
    assert metrics.write(1) == {"step": 1, "loss": 4.0}
    metrics.truncate_after(0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def _meter_steps(metrics: Metrics, first: int, last: int) -> None:
    """Steps first..last of a run that writes every 4 steps."""
    for step in range(first, last + 1):
        random = torch.rand(2, generator=seeded(step))
        metrics.update(loss=random[0] / 3, lr=0.1 / step)
        if step % 3 == 0:
            metrics.update(teacher_rank=random[1])
        if step % 4 == 0:
            metrics.write(step)


@pytest.mark.parametrize("checkpoint", [3, 4, 6, 9])  # inside windows and at their end
@pytest.mark.parametrize("killed", [9, 11, 13])  # later, also with further lines on disk
def test_the_file_of_a_killed_and_resumed_run_is_that_of_an_uninterrupted_one(checkpoint, killed, tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    _meter_steps(Metrics(tmp_path / "straight"), 1, 17)
    first = Metrics(tmp_path / "resumed")
    _meter_steps(first, 1, checkpoint)
    saved = json.dumps(first.state_dict())
    _meter_steps(first, checkpoint + 1, killed)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # killed while writing

    second = Metrics(tmp_path / "resumed")
    second.load_state_dict(json.loads(saved))
    second.truncate_after(checkpoint)
    _meter_steps(second, checkpoint + 1, 17)
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "resumed"))
    assert resumed == straight
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["metrics.jsonl"], "a temporary file is left"


def test_truncation_drops_later_steps_and_half_a_line_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 0.1}\n{"step": 4, "loss": null}\n{"step": 6}\n{"step": 8, "lo')
    metrics = Metrics(tmp_path)
    metrics.truncate_after(4)
    assert path.read_text() == '{"step": 2, "loss": 0.1}\n{"step": 4, "loss": null}\n'
    metrics.truncate_after(0)
    assert path.read_text() == ""
    path.unlink()
    metrics.truncate_after(4)  # a run that was killed before its first line
    assert not path.exists()


@pytest.mark.parametrize("length", range(1, 25))
def test_a_line_cut_anywhere_is_dropped(length, tmp_path):
    line = '{"step": 12, "loss": 1.5}'
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n' + line[:length])
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6}]


def test_a_damaged_line_inside_the_file_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\nrubbish\n{"step": 6}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not valid JSON"):
        Metrics(tmp_path).truncate_after(4)
    assert "rubbish" in (tmp_path / "metrics.jsonl").read_text(), "an error must not touch the file"


def test_damaged_lines_are_told_and_left_out_where_that_is_asked_for(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnot json\n[1]\n{"loss": 1}\n{"step": 2}\n{"step": 3')
    damaged: list[str] = []
    assert read_metrics(tmp_path / "m.jsonl", damaged) == [{"step": 1}, {"step": 2}]
    assert [re.sub(" is .*", "", line) for line in damaged] == [f"m.jsonl, line {number}" for number in (2, 3, 4)]


def test_a_missing_metrics_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("speed", "words"), [(1234.56, "1234.6"), (1.04, "1.0"), (0.0187, "0.019"), (0.5, "0.5")])
def test_slow_steps_have_a_speed_too(speed, words):
    assert rounded_speed(speed) == words


@pytest.mark.gpu
def test_meters_and_watch_do_not_wait_for_the_device(tmp_path):
    metrics, watch = Metrics(tmp_path), FiniteWatch()
    loss = torch.rand((), device="cuda")
    with never_waiting():
        for step in range(3):
            metrics.update(loss=loss, lr=0.1)
            watch.update(step, loss=loss)
            norm_stats(loss.expand(8, 4))
            prototype_usage(torch.ones(4, dtype=torch.int64).to("cuda", non_blocking=True), loss.expand(4))
            normalized_entropy(loss, 4)
    watch.check()
    assert metrics.write(3)["loss"] == pytest.approx(loss.item())


# --- Loggers


def _log_run(folder: Path, loggers: list[str], first: int, last: int, state: dict[str, Any] | None = None) -> Metrics:
    folder.mkdir(exist_ok=True)
    metrics = Metrics(folder, loggers, config={"optim": {"total_iters": 9}})
    if state is not None:
        metrics.load_state_dict(state)
        metrics.truncate_after(first - 1)
    for step in range(first, last + 1):
        metrics.update(loss=step + (0.5 if state else 0.0))
        metrics.write(step, lr=0.1)
    return metrics


def test_tensorboard_has_every_point_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = _log_run(tmp_path, ["tensorboard"], 1, 4)
    killed.close()
    _log_run(tmp_path, ["tensorboard"], 3, 5, {"sums": {}, "counts": {}, "run_ids": {}}).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 3.5),
        (4, 4.5),
        (5, 5.5),
    ]
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    (text_tag,) = events.Tags()["tensors"]
    assert len(events.Tensors(text_tag)) == 1, "the configuration is stored once"


class FakeRun:
    def __init__(self, calls: list[Any], name: str | None) -> None:
        self.calls, self.id, self.name = calls, "id7", name
        self.info = SimpleNamespace(run_id="id7")

    def finish(self) -> None:
        self.calls.append("finish")


def fake_image(path: str) -> tuple[int, ...]:
    with Image.open(path) as image:
        return np.asarray(image).shape


def fake_wandb(calls: list[Any]) -> ModuleType:
    class Run(FakeRun):
        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            calls.append((step, data, commit))

    def init(*, project=None, dir=None, id=None, name=None, config=None, resume=None) -> Run:  # noqa: A002  # wandb's
        calls.append({"project": project, "id": id, "name": name, "resume": resume, "config": config, "dir": dir})
        return Run(calls, name)

    module = ModuleType("wandb")
    module.__dict__.update(init=init, Image=fake_image)
    return module


def fake_trackio(calls: list[Any]) -> ModuleType:
    class Run(FakeRun):
        def log(self, metrics: dict, step: int | None = None) -> None:
            calls.append((step, metrics, None))

    def init(project: str, name: str | None = None, *, config: dict | None = None, resume: str = "never") -> Run:
        assert resume in ("never", "allow", "must")
        calls.append({"project": project, "name": name, "resume": resume, "config": config})
        return Run(calls, "vits-2" if resume == "never" else name)  # as if the name was taken

    module = ModuleType("trackio")
    module.__dict__.update(init=init, Image=fake_image)
    return module


def fake_mlflow(calls: list[Any]) -> ModuleType:
    def set_experiment(experiment_name: str | None = None, experiment_id: str | None = None) -> None:
        calls.append({"experiment": experiment_name or experiment_id})

    def start_run(run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None) -> FakeRun:
        calls.append({"id": run_id, "name": run_name, "experiment_id": experiment_id})
        return FakeRun(calls, run_name)

    def log_dict(dictionary: dict[str, Any], artifact_file: str, run_id: str | None = None) -> None:
        calls.append({"config": dictionary, "artifact_file": artifact_file, "run_id": run_id})

    def log_metrics(metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None) -> None:
        calls.append((step, metrics, synchronous))

    def log_image(image: np.ndarray, artifact_file: str | None = None, key: str = "", step: int | None = None) -> None:
        assert re.fullmatch(r"[\w.\- ]+", key), "mlflow takes no other characters"
        calls.append((step, {key: image.shape}, None))

    def end_run(status: str = "FINISHED") -> None:
        calls.append("finish" if status == "FINISHED" else status)

    module = ModuleType("mlflow")
    functions = (set_experiment, start_run, log_dict, log_metrics, log_image, end_run)
    module.__dict__.update({function.__name__: function for function in functions})
    return module


@pytest.mark.parametrize(("name", "fake"), [("wandb", fake_wandb), ("trackio", fake_trackio), ("mlflow", fake_mlflow)])
def test_a_logger_gets_the_points_and_its_run_is_continued_after_a_resume(name, fake, tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, fake(calls))
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    first = _log_run(tmp_path / "vits", [name], 1, 2)
    saved = json.loads(json.dumps(first.state_dict()))
    first.close()
    start = {key: value for call in calls if isinstance(call, dict) for key, value in call.items()}
    assert start["config"] == {"optim": {"total_iters": 9}}
    assert start["name"] == "vits", "the run is called as its folder"
    assert start.get("project", start.get("experiment")) == "capi"
    assert start.get("id") is None
    assert [call for call in calls if isinstance(call, tuple)] == [
        (1, {"loss": 1.0, "lr": 0.1}, None),
        (2, {"loss": 2.0, "lr": 0.1}, None),
    ]
    assert calls[-1] == "finish"

    calls.clear()
    _log_run(tmp_path / "vits", [name], 3, 3, saved).close()
    resumed = {key: value for call in calls if isinstance(call, dict) for key, value in call.items()}
    assert resumed.get("id") == "id7" or resumed["name"] == "vits-2"
    assert resumed.get("resume", "allow") == "allow"
    assert "artifact_file" not in resumed, "mlflow keeps the configuration already"
    assert [call[0] for call in calls if isinstance(call, tuple)] == [3]


@pytest.mark.parametrize(("name", "fake"), [("wandb", fake_wandb), ("trackio", fake_trackio), ("mlflow", fake_mlflow)])
def test_a_logger_gets_pictures_beside_the_numbers(name, fake, tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, fake(calls))
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    metrics = Metrics(tmp_path, [name])
    metrics.picture(0, "eval/mine/pca", tmp_path / "a.png")
    metrics.write(1, loss=0.5)
    metrics.close()
    shown = "eval_mine_pca" if name == "mlflow" else "eval/mine/pca"
    assert [call[:2] for call in calls if isinstance(call, tuple)] == [(0, {shown: (4, 5, 3)}), (1, {"loss": 0.5})]
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == [{"step": 1, "loss": 0.5}]


def test_tensorboard_shows_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (5, 4), (200, 100, 0)).save(tmp_path / "a.png")
    metrics = Metrics(tmp_path, ["tensorboard"])
    metrics.picture(7, "sheet", tmp_path / "a.png")
    metrics.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("sheet")
    assert (event.step, event.width, event.height) == (7, 5, 4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert (np.asarray(image) == (200, 100, 0)).all()


def test_ranks_without_loggers_and_runs_without_loggers_take_pictures_in_silence(tmp_path):
    Metrics(tmp_path, ["tensorboard"], enabled=False).picture(0, "a", tmp_path / "never.png")
    Metrics(tmp_path).picture(0, "a", tmp_path / "never.png")
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_name_has_that_of_its_folder(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    (tmp_path / "vitl14").mkdir()
    Metrics(tmp_path / "vitl14", ["wandb"]).write(1, loss=0.5)
    assert calls[0]["name"] == "vitl14"


class ServerDownError(Exception):
    """As packages have them: no RuntimeError, no OSError."""


@pytest.mark.parametrize("error", [ServerDownError, ConnectionError, RuntimeError])
@pytest.mark.parametrize("fails", ["start_run", "log_metrics", "log_image", "end_run"])
def test_a_logger_that_is_down_is_told_of_once_and_tried_again_later(error, fails, tmp_path, monkeypatch, caplog):
    is_down, asked, now = True, [], 0.0
    package = fake_mlflow([])
    answer = getattr(package, fails)

    def ask(*args: Any, **kwargs: Any) -> Any:
        asked.append(now)
        if is_down:
            raise error("max retries exceeded")
        return answer(*args, **kwargs)

    package.__dict__.update({fails: ask, "exceptions": SimpleNamespace(MlflowException=ServerDownError)})
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setattr("metrics.time", SimpleNamespace(monotonic=lambda: now))
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    meters = Metrics(tmp_path, ["mlflow"])
    for step, now in enumerate((0.0, 1.0, 599.0, 601.0, 1500.0, 1501.0)):
        is_down = now < 1000
        meters.write(step, loss=0.5)
        meters.picture(step, "a", tmp_path / "a.png")
    is_down = fails == "end_run"
    meters.close()
    assert [record["step"] for record in read_metrics(meters.path)] == [0, 1, 2, 3, 4, 5]
    assert caplog.text.count("train.loggers=mlflow failed") == 1
    assert f"{error.__name__}: max retries exceeded" in caplog.text
    if fails != "end_run":
        assert asked[:3] == [0.0, 601.0, 1500.0], "a server that is down is asked too often, or never again"


@pytest.mark.parametrize(("name", "fake"), [("wandb", fake_wandb), ("trackio", fake_trackio)])
def test_errors_that_a_package_has_made_for_itself_do_not_end_a_run(name, fake, tmp_path, monkeypatch, caplog):
    def init(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("no room") if name == "trackio" else ServerDownError("no route")

    package = fake([])
    package.__dict__.update(init=init, errors=SimpleNamespace(Error=ServerDownError))
    monkeypatch.setitem(sys.modules, name, package)
    meters = Metrics(tmp_path, [name])
    meters.write(1, loss=0.5)
    meters.close()
    assert f"train.loggers={name} failed" in caplog.text


def test_a_damaged_picture_is_no_fault_of_a_logger(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    (tmp_path / "a.png").write_bytes(b"no picture")
    meters = Metrics(tmp_path, ["wandb"])
    with pytest.raises(OSError, match="cannot identify image file"):
        meters.picture(0, "a", tmp_path / "a.png")
    meters.write(1, loss=0.5)
    assert calls[-1][0] == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_a_user_error_before_the_first_step(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=f"train.loggers={name}.*pip install {name}"):
        Metrics(tmp_path, [name])


# --- Non-finite losses


@pytest.mark.parametrize("bad_step", [1, 19, 20, 21, 40])
def test_the_first_non_finite_step_is_exact_although_looked_for_every_20_steps(bad_step):
    watch = FiniteWatch()
    with pytest.raises(NonFiniteError) as caught:
        for step in range(1, 41):
            loss = torch.tensor(math.nan if step >= bad_step else 1.0)
            watch.update(step, capi_loss=loss, clustering_loss=torch.tensor(2.0))
            if step % 20 == 0:
                watch.check(lambda: Path("runs/a/checkpoints/17"))
    assert (caught.value.quantity, caught.value.step) == ("capi_loss", bad_step)
    message = str(caught.value)
    assert message.startswith(f"capi_loss became NaN at step {bad_step}. ")
    assert "clustering_loss" not in message
    for remedy in ("train.resume_from=runs/a/checkpoints/17", "optim.clip_grad", "lr_schedule", "float32"):
        assert remedy in message


def test_the_earliest_of_several_quantities_is_named_first_with_its_kind():
    watch = FiniteWatch()
    for step in range(1, 10):
        watch.update(
            step,
            capi_loss=torch.tensor(math.nan if step >= 7 else 1.0, dtype=torch.float64),
            clustering_loss=torch.tensor(
                -math.inf if step == 4 else 1.0, dtype=torch.bfloat16
            ),  # once, then finite again
            grad_norm=torch.tensor(math.inf if step >= 5 else 1.0),
        )
    with pytest.raises(NonFiniteError) as caught:
        watch.check()
    events = (
        "clustering_loss became -infinity at step 4",
        "grad_norm became +infinity at step 5",
        "capi_loss became NaN",
    )
    assert str(caught.value).startswith(", then ".join(events))
    assert (caught.value.quantity, caught.value.step) == ("clustering_loss", 4)
    assert "no checkpoint from before" in str(caught.value)


def test_finite_losses_pass():
    watch = FiniteWatch()
    watch.check()
    for step in range(5):
        watch.update(step, loss=torch.tensor(1e30, requires_grad=True))
    watch.check()


# --- Health


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
@pytest.mark.parametrize("shape", [(512, 64), (64, 512)])
def test_effective_rank_of_equal_directions_is_their_number(rank, shape):
    n, d = shape
    left = torch.linalg.qr(torch.randn(n, rank, generator=seeded(0))).Q
    right = torch.linalg.qr(torch.randn(d, rank, generator=seeded(1))).Q
    assert effective_rank(left @ right.T).item() == pytest.approx(rank, rel=2e-3)


def test_effective_rank_of_white_noise_is_close_to_the_width():
    assert effective_rank(torch.randn(4096, 64, generator=seeded(0))).item() == pytest.approx(64, rel=0.01)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_effective_rank_does_not_depend_on_scale_or_precision(scale, dtype):
    features = torch.randn(300, 48, generator=seeded(0)) * torch.logspace(0, -2, 48)
    expected = effective_rank(features).item()
    assert 5 < expected < 40
    assert effective_rank((features * scale).to(dtype)).item() == pytest.approx(expected, rel=0.02)


def test_effective_rank_agrees_with_the_definition_from_singular_values():
    features = torch.randn(80, 20, generator=seeded(0), dtype=torch.float64) * torch.logspace(0, -3, 20)
    singular_values = torch.linalg.svdvals(features)
    p = singular_values / singular_values.sum() + 1e-7
    assert effective_rank(features).item() == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-6)


def test_norm_stats_show_outlier_tokens():
    features = torch.nn.functional.normalize(torch.randn(101, 8, generator=seeded(0)), dim=-1) * 3
    features[17] *= 50
    median, largest = norm_stats(features.bfloat16())
    assert median.item() == pytest.approx(3, rel=0.01)
    assert largest.item() == pytest.approx(150, rel=0.01)


def test_prototype_usage_at_its_extremes_and_between():
    even = prototype_usage(torch.full((64,), 5), torch.full((64,), 0.3))
    assert (even["prototypes_used"].item(), even["prototype_perplexity"].item()) == (64, pytest.approx(64))
    one = prototype_usage(torch.eye(64, dtype=torch.int64)[3] * 9, torch.eye(64)[3] * 0.1)
    assert (one["prototypes_used"].item(), one["prototype_perplexity"].item()) == (1, pytest.approx(1))
    half = prototype_usage(torch.arange(64) % 2, torch.cat([torch.ones(16), torch.zeros(48)]))
    assert (half["prototypes_used"].item(), half["prototype_perplexity"].item()) == (32, pytest.approx(16))


def test_normalized_entropy_is_1_for_a_uniform_target():
    assert normalized_entropy(torch.tensor(math.log(4096)), 4096).item() == pytest.approx(1)


@pytest.mark.parametrize(("batch", "clusters"), [(16384, 16384), (2048, 16384), (64, 512), (256, 1024)])
def test_usual_batches_get_no_warning(batch, clusters):
    assert batch_warning(batch, clusters) is None


def test_a_small_batch_gets_a_warning_with_both_numbers_and_remedies():
    warning = batch_warning(32, 16384)
    assert warning is not None
    for part in ("32 images", "capi.num_clusters=16384", "0.002 images", "capi.num_clusters=256", "accumulation_steps"):
        assert part in warning
    assert batch_warning(32, 256) is None, "the advice has to silence the warning"
    assert batch_warning(32, 1024) is not None and batch_warning(32, 1024, queue=3) is None
    assert "teaches nothing" in str(batch_warning(1, 8)) and batch_warning(1, 8, queue=1) is None
    queued = batch_warning(32, 16384, queue=3)
    assert queued is not None and "32 images and the 3 before it" in queued and "0.0078 images" in queued


# --- Speed


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_counts_since_the_last_reading():
    clock = FakeClock()
    speed = Throughput(64, 1e9, torch.device("cpu"), 2, clock=clock)
    assert speed.read() == {}
    for step_s, wait_s in ((1.0, 0.5), (3.0, 0.5)):
        clock.now += step_s
        speed.step(wait_s)
    rates = speed.read(remaining_steps=10)
    assert rates.pop("memory_gib") > 0.01
    assert rates == {"images_per_s": 32.0, "step_ms": 2000.0, "data_wait": 0.25, "eta_s": 20.0}
    assert set(rates) <= set(TIMING_KEYS)
    clock.now += 0.5
    speed.step(0.0)
    rates = speed.read()
    assert (rates["images_per_s"], rates["data_wait"]) == (128.0, 0.0), "the first reading leaked into the second"
    assert "eta_s" not in rates


def test_throughput_leaves_out_what_is_no_step():
    clock = FakeClock()
    speed = Throughput(64, None, torch.device("cpu"), 1, clock=clock)
    for _ in range(2):
        with speed.paused():
            clock.now += 1000.0
        clock.now += 2.0
        speed.step(0.5)
        with pytest.raises(ZeroDivisionError), speed.paused():
            clock.now += 1000.0
            _ = 1 / 0
        rates = speed.read(remaining_steps=10)
        assert rates.pop("memory_gib") > 0.01
        assert rates == {"images_per_s": 32.0, "step_ms": 2000.0, "data_wait": 0.25, "eta_s": 20.0}


def test_utilisation_is_per_device_and_only_where_the_peak_is_known():
    clock = FakeClock()
    speed = Throughput(1000, 1e12, torch.device("cpu"), 4, clock=clock)
    speed.peak_flops = peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    clock.now += 1.0
    speed.step(0.0)
    assert speed.read()["mfu"] == pytest.approx(1000e12 / (4 * 989e12))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "float16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("Tesla V100-SXM2-32GB", "float16", 125e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("Some GPU", "bfloat16", None),
    ],
)
def test_peak_flops_knows_models_by_their_whole_name(name, dtype, expected):
    assert peak_flops(name, dtype) == expected


# --- Cost models


def test_flops_of_the_published_recipe():
    assert encoder_flops_per_image(PUBLISHED) == pytest.approx(1.70e11, rel=0.02)
    assert training_flops_per_image(PUBLISHED) == pytest.approx(0.41e12, rel=0.05)


def _model(shape: StepShape) -> EncoderDecoder:
    return EncoderDecoder(
        patch_size=shape.patch_size,
        in_chans=shape.in_chans,
        n_registers=shape.num_registers,
        transformers_kwargs={
            "embed_dim": shape.embed_dim,
            "drop_path_rate": shape.drop_path_rate,
            "block_kwargs": {"attn_kwargs": {"num_heads": shape.num_heads}},
        },
        encoder_kwargs={"depth": shape.encoder_depth},
        decoder_kwargs={"depth": shape.decoder_depth},
        predictor=shape.predictor,
    ).train()


def _images(shape: StepShape, b: int) -> torch.Tensor:
    side = math.isqrt(shape.num_patches) * shape.patch_size
    return torch.randn(b, shape.in_chans, side, side)


def _student_loss(model: EncoderDecoder, head: nn.Module, shape: StepShape, b: int) -> torch.Tensor:
    n, v, m = shape.num_patches, shape.num_visible, shape.num_predict
    order = torch.rand(b, n).argsort(dim=1) + n * torch.arange(b).unsqueeze(1)
    visible, hidden = order[:, :v].flatten(), order[:, v : v + m].flatten()
    _, predictions = model.forward_pretrain(_images(shape, b), visible, hidden, do_prediction=True)
    assert predictions is not None
    predicted = head(predictions)
    return soft_cross_entropy(torch.rand_like(predicted), predicted, 0.12).mean()


@pytest.mark.skipif("_for_cpu" not in str(list(flop_registry)), reason="this torch does not count attention on a CPU")
@pytest.mark.parametrize(
    ("drop_path_rate", "predictor", "kind", "targets", "queue"),
    [
        (0.0, "cross", "linear", "clustering", 2),
        (0.25, "cross", "mlp", "clustering", 0),
        (0.25, "cross", "mlp", "ema_head", 0),
        (0.0, "cross", "linear", "latents", 0),
        (0.3, "cross", "linear", "clustering", 0),
        (0.3, "split", "linear", "clustering", 0),
        (0.3, "fused", "linear", "clustering", 0),
    ],
)
def test_training_flops_are_those_torch_counts_on_the_model(drop_path_rate, predictor, kind, targets, queue):
    dims, b = HEADS[kind].hidden_dims, 8
    changes = {"drop_path_rate": drop_path_rate, "predictor": predictor, "targets": targets, "queue": queue}
    shape = replace(SMALL, student_head_dims=dims, **changes)
    d, k = shape.embed_dim, shape.num_clusters
    model, head = _model(shape), LatentHead(d, d) if targets == "latents" else HEADS[kind](d, k)
    clustering = OnlineClustering(d, k, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            features, _ = model.eval().forward_pretrain(_images(shape, b))
        x = features.transpose(0, 1)
        if targets == "clustering":
            clustering(x, torch.cat([x] * queue, dim=1) if queue else None)[1].backward()
        elif targets == "ema_head":
            no_loss = {"target_temp": 0.06, "n_sk_iter": 3, "positionwise_sk": True}
            EmaHeadTargets(head, **no_loss).step(x, torch.arange(3))
        _student_loss(model.train(), head, shape, b).backward()
    # Fused attention computes its scores again in the backward pass: 5 matmuls instead of 4, and is counted so.
    expected = training_flops_per_image(shape, b) + attention_recomputation_per_image(shape, b)
    assert counter.get_total_flops() / b == pytest.approx(expected, rel=1e-6)


def test_flops_expect_what_drop_path_keeps_on_average():
    """Whole images for a known batch; their limit without."""
    shape = replace(SMALL, drop_path_rate=0.2)
    parts = step_flops_per_image(shape)
    assert training_flops_per_image(shape) == sum(parts.values())
    assert training_flops_per_image(shape, 10) == training_flops_per_image(shape)
    assert step_flops_per_image(shape, 16)["student"] < parts["student"] < step_flops_per_image(shape, 1)["student"]
    assert training_flops_per_image(shape, 1) == training_flops_per_image(SMALL)
    assert training_flops_per_image(shape, 10**7) == pytest.approx(training_flops_per_image(shape))


def test_parameters_are_those_of_the_model():
    for shape in (SMALL, PUBLISHED, *(replace(SMALL, predictor=kind) for kind in ("split", "fused"))):
        with torch.device("meta"):
            model = _model(shape)
        assert num_backbone_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    for head in HEADS.values():
        shape = replace(SMALL, student_head_dims=head.hidden_dims)
        sizes = {"batch_size": 1, "param_bytes": 4, "recompute": False, "world_size": 1}
        own = sum(parameter.numel() for parameter in head(shape.embed_dim, shape.num_clusters).parameters())
        for targets, of_teacher in (("clustering", shape.num_clusters * (shape.embed_dim + 1)), ("ema_head", 0)):
            estimate = device_memory_estimate(replace(shape, targets=targets), **sizes)
            assert estimate["parameters"] == num_backbone_parameters(shape) + own + of_teacher
    latents = device_memory_estimate(replace(SMALL, targets="latents"), **sizes)
    own = sum(parameter.numel() for parameter in LatentHead(SMALL.embed_dim, SMALL.embed_dim).parameters())
    assert latents["parameters"] == num_backbone_parameters(SMALL) + own


@pytest.mark.parametrize("predictor", ["cross", "split", "fused"])
def test_the_memory_estimate_is_close_to_what_the_student_keeps_for_its_backward_pass(predictor):
    shape = replace(SMALL, num_clusters=8192, num_patches=144, num_visible=50, predictor=predictor)
    model, head = _model(shape), L2NormLinear(shape.embed_dim, shape.num_clusters)
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _student_loss(model, head, shape, 8)
    assert loss.requires_grad
    for parameter in [*model.parameters(), *head.parameters()]:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    measured = sum(kept.values()) / 2**30
    estimate = device_memory_estimate(shape, batch_size=8, param_bytes=4, recompute=False, world_size=1)
    assert measured / 1.5 < estimate["activations"] < measured * 1.5


def test_the_memory_estimate_shrinks_with_recomputation_precision_batch_and_ranks():
    def estimate(
        *, batch_size: int = 64, param_bytes: int = 2, recompute: bool = True, world_size: int = 1, **queue: int
    ) -> dict[str, int | float]:
        sizes = {"batch_size": batch_size, "param_bytes": param_bytes, "world_size": world_size}
        return device_memory_estimate(PUBLISHED, recompute=recompute, **sizes, **queue)

    rising = [
        estimate(world_size=8),
        estimate(batch_size=32),
        estimate(),
        estimate(recompute=False),
        estimate(recompute=False, param_bytes=4),
    ]
    totals = [values["total"] for values in rising]
    assert totals == sorted(set(totals))
    assert estimate()["parameters"] == num_backbone_parameters(PUBLISHED) + 2 * 16384 * 1025
    bytes_per_parameter = estimate()["state"] * 2**30 / estimate()["parameters"]
    assert 16 < bytes_per_parameter < 20, "16 for all, 4 more for the averaged ones"
    kept = estimate(num_earlier=128)["state"] - estimate()["state"]
    assert kept == pytest.approx(128 * 256 * 1024 * 4 / 2**30), "float32 features of 128 images"
    assert estimate(num_earlier=128)["clustering"] > 128 * 256 * 16384 * 4 / 2**30, "the head has all logits"


def test_the_memory_estimate_counts_8_bits():
    keys = ("optim.optimizer", "capi.clustering_optimizer.optimizer")
    small = ["model.encoder_kwargs.depth=2", "model.decoder_kwargs.depth=1"]
    shape = replace(PUBLISHED, encoder_depth=2, decoder_depth=1)
    sizes: dict[str, Any] = {"batch_size": 64, "param_bytes": 2, "recompute": False, "world_size": 2}
    in_32 = device_memory_estimate(shape, **sizes)
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*small, *(f"{key}=AdamW8bit" for key in keys)])
    held = optimizer_bytes(cfg)
    assert 2 * in_32["parameters"] < held < 2.1 * in_32["parameters"]
    in_8 = device_memory_estimate(shape, **sizes, optimizer_bytes=held)
    assert in_32["state"] - in_8["state"] == pytest.approx((8 * in_32["parameters"] - held) / 2 / 2**30)


def test_the_memory_estimate_counts_what_leaves_the_device():
    def estimate(*, recompute: bool, offload: bool) -> dict[str, int | float]:
        sizes = {"batch_size": 64, "param_bytes": 2, "world_size": 1}
        return device_memory_estimate(PUBLISHED, recompute=recompute, offload=offload, **sizes)

    stays, leaves = (estimate(recompute=False, offload=offload) for offload in (False, True))
    assert stays["offloaded"] == 0 and stays["activations"] - leaves["activations"] < leaves["offloaded"]
    assert leaves["activations"] < stays["activations"] / 10
    inputs = estimate(recompute=True, offload=True)
    assert inputs["offloaded"] < leaves["offloaded"] / 20 and inputs["activations"] == leaves["activations"]


# --- Profiling


@pytest.mark.parametrize(
    ("planned", "run", "recorded"),
    [
        (20, 9, ["step4", "step5", "step6"]),
        (7, 7, ["step4", "step5", "step6"]),
        (2, 2, ["step0", "step1"]),
        (20, 5, ["step4"]),
    ],
)
def test_the_profile_has_a_few_steps_after_a_warm_up_or_what_there_was(planned, run, recorded, tmp_path):
    weight = torch.randn(32, 32, requires_grad=True)
    with Profile(tmp_path, True, num_steps=planned, device=torch.device("cpu")) as profile:
        for step in range(run):
            with torch.profiler.record_function(f"step{step}"):
                (weight @ weight).sum().backward()
            profile.step()
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert sorted(name for name in names if name.startswith("step")) == recorded
    assert "aten::mm" in names
    operators = (tmp_path / "profile" / "operators.txt").read_text()
    assert "aten::mm" in operators
    assert "CPU Mem" in operators


def test_a_run_that_ends_before_the_profile_starts_says_so(tmp_path, caplog):
    with Profile(tmp_path, True, num_steps=20, device=torch.device("cpu")) as profile:
        profile.step()
    assert "Nothing was profiled: the run ended before step 5" in caplog.text


def test_a_disabled_profile_does_nothing(tmp_path):
    with Profile(tmp_path, False, num_steps=20, device=torch.device("cpu")) as profile:
        for _ in range(9):
            profile.step()
    assert list(tmp_path.iterdir()) == []


def test_the_rank_of_what_is_not_finite_is_nan_and_no_crash():
    features = torch.randn(20, 4)
    features[3, 1] = math.inf
    assert effective_rank(features).isnan()
