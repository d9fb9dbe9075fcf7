"""train_ijepa.py: the step against the published vectors, the loop, weights from outside, and every configuration."""

import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from commands import (
    assert_close_runs,
    assert_same_but_for_values,
    assert_same_run,
    make_images,
    metrics_of,
    probed_and_evaluated,
    train_through_kills,
    untrained,
)
from conftest import ROOT
from golden_ijepa import (
    GOLDEN_CONFIG,
    IJEPA,
    STOP,
    STOP_NOISE,
    golden_batches,
    golden_state,
    tiny_networks,
    tiny_run,
)
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

import model
import train_ijepa
from checkpoint import SavedState
from config import load_config
from ijepa import load_model
from model import sincos_table
from train_ijepa import DEFAULT_CONFIG, IjepaConfig, IjepaState, hyper_at, warn_if_changed
from training import with_length
from utils import UserError

BOTH = pytest.mark.parametrize("overrides", [[], [STOP_NOISE]], ids=["ijepa", "stop"])


def load(*sources: str) -> IjepaConfig:
    return load_config(IjepaConfig, DEFAULT_CONFIG, list(sources))


# --- Against the vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vectors"),
    [
        ("ijepa/vith14", IJEPA["schedule_in1k_vith14_ep300_ipe625"]),
        ("stop/vitb16", STOP["schedule_b16_l16_ep600_ipe625"]),
        ("stop/vitl16", STOP["schedule_b16_l16_ep600_ipe625"]),
        ("stop/vith16", STOP["schedule_h16_ep300_ipe625_fix250_const"]),
    ],
)
def test_schedules_of_the_published_configs_are_those_of_the_vectors(config, vectors):
    cfg = load(str(ROOT / "configs" / f"{config}.yaml"))
    for step, expected in vectors.items():
        hyper = hyper_at(int(step) - 1, cfg)  # the vectors count the update under way
        assert hyper.lr == pytest.approx(expected["lr"], rel=1e-9), f"at {step}"
        assert hyper.weight_decay == pytest.approx(expected["wd"], rel=1e-9), f"at {step}"
        assert hyper.momentum == pytest.approx(expected["ema_used"], rel=1e-9), f"at {step}"


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_six_steps_are_those_of_the_vectors(recompute):
    state = golden_state(f"efficiency.rematerialization.enabled={recompute}")
    for expected in IJEPA["tiny"]["train_6_steps"]["steps"]:
        hyper = hyper_at(state.step, state.cfg)
        assert hyper.lr == pytest.approx(expected["lr"], rel=1e-9)
        assert hyper.weight_decay == pytest.approx(expected["wd"], rel=1e-9)
        assert hyper.momentum == pytest.approx(expected["ema"], rel=1e-9)
        scalars = train_ijepa.train_step(state, golden_batches(), hyper)
        state.step += 1
        assert scalars["loss"].item() == pytest.approx(expected["loss"], rel=2e-6)
        assert scalars["context_patches"].item() == 6
        sums = {
            "target_param_sum": state.student_ema["backbone"].parameters(),
            "enc_param_sum": state.student["backbone"].parameters(),
            "mask_token_sum": [state.student["predictor"].mask_token],
        }
        for name, parameters in sums.items():
            total = sum(float(p.detach().double().sum()) for p in parameters)
            assert total == pytest.approx(expected[name], rel=1e-5), f"{name} at {state.step}"


def test_gradients_of_accumulated_images_are_the_mean_of_those_of_each():
    whole, parts = golden_state(), golden_state()
    a = train_ijepa.train_step(whole, golden_batches(), hyper_at(0, whole.cfg))
    b = train_ijepa.train_step(parts, golden_batches(2), hyper_at(0, parts.cfg))
    assert a["loss"].item() == pytest.approx(b["loss"].item(), rel=1e-6)
    assert a["grad_norm"].item() == pytest.approx(b["grad_norm"].item(), rel=1e-5)


def optimizer_groups(state: IjepaState) -> list[list[Tensor]]:
    """The parameters of encoder and predictor that decay, then those that do not."""
    parts = {name: set(state.student[name].parameters()) for name in ("backbone", "predictor")}
    groups = sorted(state.optimizer.param_groups, key=lambda group: -group["wd_multiplier"])
    return [[p for p in group["params"] if p in part] for group in groups for part in parts.values()]


def test_as_many_parameters_decay_as_in_the_vectors():
    groups = optimizer_groups(golden_state())
    assert [group["n"] for group in IJEPA["tiny"]["opt_groups"]] == [len(group) for group in groups]
    assert [group["numel"] for group in IJEPA["tiny"]["opt_groups"]] == [sum(p.numel() for p in g) for g in groups]


@pytest.mark.parametrize(
    ("config", "vectors"),
    [
        ("ijepa/vith14", IJEPA["param_counts"]),
        *((f"stop/vit{size}", STOP[f"param_counts_vit-{size}"]) for size in ("b16", "l16", "h16")),
    ],
)
def test_as_many_parameters_of_the_published_models_decay_as_in_the_vectors(config, vectors, monkeypatch):
    monkeypatch.setattr(IjepaState, "place", on_meta)
    state = IjepaState(load(str(ROOT / "configs" / f"{config}.yaml"), *EAGER), torch.device("cpu"))
    groups = optimizer_groups(state)
    assert vectors["opt_group_tensor_counts"] == [len(group) for group in groups]
    assert vectors["opt_group_numel"] == [sum(p.numel() for p in group) for group in groups]


EAGER = [each for each in GOLDEN_CONFIG if "compilation" in each]


def on_meta(self, make, *_args, **_kwargs):
    with torch.device("meta"):
        return make()


# --- The step --------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_step_is_that_of_seed_step_and_place_alone():
    state, (batch,) = golden_state(STOP_NOISE), golden_batches()
    first = state.draw_noise(0, batch)
    assert first.shape == (4, 4, 32) and 0.2 < first.std() < 0.3
    torch.manual_seed(5)
    assert torch.equal(state.draw_noise(0, batch), first)
    assert not torch.equal(state.draw_noise(1, batch), first)
    state.step = 1
    assert not torch.equal(state.draw_noise(0, batch), first)
    assert golden_state().draw_noise(0, batch) is None


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@BOTH
def test_half_precisions_are_close_to_float32_and_keep_float32_weights(precision, overrides):
    scaled = f"efficiency.grad_scaler={'true' if precision == 'float16' else 'false'}"
    plain, half = golden_state(*overrides), golden_state(f"efficiency.param_dtype={precision}", scaled, *overrides)
    half.scaler._init_scale = 1024.0
    for i in range(3):
        a, b = (train_ijepa.train_step(s, golden_batches(), hyper_at(i, s.cfg)) for s in (plain, half))
        assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=1e-2)
        assert b["grad_norm"].item() == pytest.approx(a["grad_norm"].item(), rel=5e-2)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}


@BOTH
def test_gradients_reach_what_is_trained_and_nothing_else(overrides):
    state = golden_state(*overrides)
    tables = [table.clone() for name, table in state.student.state_dict().items() if "pos_embed" in name]
    train_ijepa.train_step(state, golden_batches(), hyper_at(0, state.cfg))
    without = {name for name, p in state.student.named_parameters() if p.grad is None}
    expected = {"backbone.pos_embed", "predictor.predictor_pos_embed"}
    assert without == (expected | {"predictor.mask_token"} if overrides else expected)
    assert all(p.grad is None for p in state.student_ema.parameters())
    after = [table for name, table in state.student.state_dict().items() if "pos_embed" in name]
    assert all(map(torch.equal, tables, after)) and len(tables) == 2


# --- The loop --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), size=40)


@pytest.fixture(scope="module", params=[[], [STOP_NOISE, "data.grayscale=0.2", "data.blur=0.5"]], ids=["ijepa", "stop"])
def finished(request, images, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of either method, never interrupted, with the arguments that are its own."""
    run = tmp_path_factory.mktemp("finished")
    assert train_ijepa.main(tiny_run(images, run, *request.param)) == 0
    return run, request.param


def test_a_run_learns_and_says_how_it_goes(finished):
    run, _ = finished
    records = metrics_of(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    for record in records:
        assert {"loss", "grad_norm", "context_patches", "lr", "weight_decay", "momentum"} <= record.keys()
        assert 4 < record["context_patches"] < 49
        health = {"teacher_rank", "feature_norm_median", "feature_norm_max"}
        assert (health <= record.keys()) == (record["step"] % 3 == 0)
    log = (run / "log.txt").read_text()
    assert re.search(r"step 6/6  loss \d\.\d{4}  context \d+\.\d of 64 patches  lr", log)
    assert re.search(r"64 patches per image: 1 context of about \d+\.\d patches \(\d+%\), 4 targets", log)
    assert "6 steps of 4 images = 0.0 epochs" in log


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_run_ends_like_one_never_interrupted(images, finished, tmp_path, monkeypatch, stop_at):
    straight, own = finished
    step = train_ijepa.train_step

    def stopped(state, *rest, **options):
        if state.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step(state, *rest, **options)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(train_ijepa, "train_step", stopped)
        assert train_ijepa.main(tiny_run(images, tmp_path, *own)) == 0
    assert metrics_of(tmp_path)[-1]["step"] == stop_at + 1
    workers = f"efficiency.dataloader_num_workers={stop_at // 4}"  # which change nothing either
    assert train_ijepa.main(tiny_run(images, tmp_path, *own, workers)) == 0
    assert_same_run(tmp_path, straight)


def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(images, finished, tmp_path):
    straight, own = finished
    arguments = tiny_run(images, tmp_path, *own)
    train_through_kills(train_ijepa, arguments, tmp_path)
    assert_same_run(tmp_path, straight)


FORWARD_PASSES = 12
"""Of an update, on all ranks together."""


def train_on_this_rank(arguments: list[str]) -> int:
    """A whole run, with this rank's share of the forward passes; how many graphs were compiled for it."""
    torch._dynamo.utils.counters.clear()
    share = f"optim.accumulation_steps={FORWARD_PASSES // dist.get_world_size()}"
    cfg = load(*arguments, share)
    train_ijepa.train(cfg, Path(cfg.train.output_dir), torch.device("cpu"))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> dict[str, Path]:
    """For either method, the run that those on several ranks have to equal."""
    runs = {name: tmp_path_factory.mktemp(name) for name in OWN}
    for name, run in runs.items():
        run_on_ranks(train_on_this_rank, 1, tiny_run(images, run, *OWN[name], "optim.batch_size_per_gpu=2"))
    return runs


OWN = {"ijepa": [], "stop": [STOP_NOISE]}


COMPILED = [f"efficiency.compilation.{name}.disable=false" for name in ("do_teacher", "do_student")]
compiles = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="it needs a C++ compiler"),
]


@pytest.mark.parametrize(
    ("method", "num_ranks", "mode", "compiled"),
    [
        ("ijepa", 2, "simple", []),
        pytest.param("ijepa", 3, "fully_shard", [], marks=pytest.mark.long),
        ("stop", 2, "none", []),
        pytest.param("stop", 4, "simple", [], marks=pytest.mark.slow),
        pytest.param("ijepa", 2, "simple", COMPILED, marks=compiles),
        pytest.param("stop", 2, "fully_shard", COMPILED, marks=compiles),
    ],
)
def test_ranks_are_accumulation_steps_of_one(images, alone, tmp_path, method, num_ranks, mode, compiled):
    """As many images per forward pass: then masks and noise are the same too."""
    own = [*OWN[method], f"efficiency.fsdp={mode}", *compiled]
    arguments = tiny_run(images, tmp_path, "optim.batch_size_per_gpu=2", *own)
    graphs = run_on_ranks(train_on_this_rank, num_ranks, arguments, timeout_s=590)
    assert all((number > 0) == bool(compiled) for number in graphs), graphs
    assert_close_runs(tmp_path, alone[method], "loss", "context_patches")


@pytest.mark.long
def test_a_run_continues_on_other_ranks(images, alone, tmp_path):
    own = ["optim.batch_size_per_gpu=2", STOP_NOISE]
    run_on_ranks(train_on_this_rank, 2, tiny_run(images, tmp_path, *own, "efficiency.fsdp=simple"))
    *earlier, newest = sorted((tmp_path / "checkpoints").iterdir())
    newest.rename(tmp_path / "not-reached")
    assert earlier, "nothing is left to continue"
    run_on_ranks(train_on_this_rank, 3, tiny_run(images, tmp_path, *own, "efficiency.fsdp=none"))
    assert_close_runs(tmp_path, alone["stop"], "loss", "context_patches")


def test_an_export_is_a_model_of_the_evaluations_and_the_average(finished):
    run, _ = finished
    encoder = load_model(pretrained_weights=run / "student_ema.pth")
    assert_same_but_for_values(untrained(load_model, run / "student_ema.pth"), encoder)
    assert encoder(torch.zeros(1, 3, 32, 48)).feature_map.shape == (1, 8, 12, 32)
    student = torch.load(run / "student.pth", weights_only=True)
    assert {key.partition(".")[0] for key in student} == {"backbone", "predictor"}
    average = torch.load(run / "student_ema.pth", weights_only=True)
    assert {key for key in student if key.startswith("backbone.")} == set(average)
    assert not torch.equal(average["backbone.norm.bias"], student["backbone.norm.bias"])
    with pytest.raises(UserError, match=r"model_path=ijepa\.py"):  # that is not the default of the evaluations
        model.load_model(pretrained_weights=run / "student_ema.pth")


def test_a_run_is_probed_and_evaluated_while_it_trains(images, tmp_path):
    run = tmp_path / "run"
    own = probed_and_evaluated(tmp_path, "student_ema", "ijepa.py")
    assert train_ijepa.main(tiny_run(images, run, *own)) == 0
    records = metrics_of(run)
    assert any("probe_knn" in record for record in records)
    (score,) = [record["eval/mine/fake/sum/top1"] for record in records if "eval_step" in record]
    weights = torch.load(run / "student_ema.pth", weights_only=True)
    assert score == pytest.approx(sum(float(w.double().sum()) for w in weights.values()), abs=1e-4)
    assert (run / "evals" / "mine" / "step_000000002" / "results" / "report.html").is_file()


# --- Weights from outside --------------------------------------------------------------------------------------------


def start(path: Path, *overrides: str) -> IjepaState:
    cfg = load(*GOLDEN_CONFIG, *overrides)
    return IjepaState(cfg, torch.device("cpu"), init_from=str(path))


@pytest.fixture
def published(tmp_path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A file in the layout of the authors, whose three networks differ."""
    encoder, predictor = tiny_networks()
    target = {key: value + 1 for key, value in encoder.state_dict().items()}
    parts = {"encoder": encoder.state_dict(), "predictor": predictor.state_dict(), "target_encoder": target}
    path = tmp_path / "published.pth.tar"
    file: dict[str, Any] = {name: {f"module.{k}": v for k, v in part.items()} for name, part in parts.items()}
    torch.save(file | {"opt": {}, "scaler": None, "epoch": 300, "loss": 0.2}, path)
    return path, parts


def test_a_training_starts_from_a_published_file(published):
    path, parts = published
    state = start(path)
    for module, part in (
        (state.student["backbone"], "encoder"),
        (state.student["predictor"], "predictor"),
        (state.student_ema["backbone"], "target_encoder"),
    ):
        for key, value in module.state_dict().items():
            assert torch.equal(value, parts[part][key]), f"{part}: {key}"


def trained_elsewhere(path: Path, order: str, *, uses_mask_token: bool = True) -> dict[str, dict[str, Tensor]]:
    """Add the authors' AdamW after three updates to a published file; what it keeps, by the names of our parameters.

    It is made here as they make it: from modules whose parameters have this order, in four groups.
    """
    encoder, predictor = tiny_networks()
    named = {"backbone": dict(encoder.named_parameters()), "predictor": dict(predictor.named_parameters())}
    if order == "table first":  # StoP's
        token = named["predictor"].pop("mask_token")
        table = named["predictor"].pop("predictor_pos_embed")
        named["predictor"] = {"predictor_pos_embed": table, "mask_token": token, **named["predictor"]}
    groups = [
        {"params": [p for name, p in part.items() if ("bias" in name or p.ndim == 1) == excluded], "extra": excluded}
        for excluded in (False, True)
        for part in named.values()
    ]
    assert [len(group["params"]) for group in groups] == [group["n"] for group in IJEPA["tiny"]["opt_groups"]]
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(1)
    parameters = {f"{part}.{name}": p for part, own in named.items() for name, p in own.items() if p.requires_grad}
    if not uses_mask_token:
        del parameters["predictor.mask_token"]
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    file = torch.load(path, weights_only=True)
    file["predictor"] = {f"module.{name}": file["predictor"][f"module.{name}"] for name in named["predictor"]}
    torch.save(file | {"opt": optimizer.state_dict()}, path)
    return {name: optimizer.state[p] for name, p in parameters.items()}


WITH_OPTIMIZER = ["train.init_from=x", "train.init_optimizer=true"]


@pytest.mark.parametrize("order", ["mask token first", "table first"])
def test_a_training_starts_from_a_published_optimizer(published, order):
    path, _ = published
    expected = trained_elsewhere(path, order)
    state = start(path, *WITH_OPTIMIZER)
    kept = {name: state.optimizer.state[p] for name, p in state.student.named_parameters() if p.requires_grad}
    assert kept.keys() == expected.keys()
    for name, own in expected.items():
        for part in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[name][part], own[part]), f"{part} of {name}"
    assert kept["backbone.norm.bias"]["step"] == 3
    scalars = train_ijepa.train_step(state, golden_batches(), hyper_at(0, state.cfg))
    assert kept["backbone.norm.bias"]["step"] == 4 and scalars["loss"].isfinite()
    assert not start(path).optimizer.state, "it was not asked for"


def test_a_published_optimizer_goes_on_in_8_bits(published):
    path, _ = published
    expected = trained_elsewhere(path, "table first")
    state = start(path, *WITH_OPTIMIZER, "optim.optimizer=AdamW8bit")
    kept = {name: state.optimizer.state[p] for name, p in state.student.named_parameters() if p.requires_grad}
    assert kept.keys() == expected.keys()
    coarse = {name for name, own in kept.items() if own["exp_avg"].dtype == torch.uint8}
    assert coarse == {name for name, own in expected.items() if own["exp_avg"].numel() >= 4096}
    assert coarse and {float(own["step"]) for own in kept.values()} == {3}


def test_the_published_optimizer_of_stop_has_no_mask_token(published):
    path, _ = published
    trained_elsewhere(path, "table first", uses_mask_token=False)
    state = start(path, *WITH_OPTIMIZER, STOP_NOISE)
    assert state.student["predictor"].mask_token not in state.optimizer.state
    assert state.student["predictor"].predictor_proj.weight in state.optimizer.state
    with pytest.raises(UserError, match=r"2 of its tensors do not fit: predictor.mask_token.exp_avg \(None, expected"):
        start(path, *WITH_OPTIMIZER)


def moments_on_this_rank(path: Path, mode: str) -> dict[str, Tensor]:
    state = start(path, *WITH_OPTIMIZER, f"efficiency.fsdp={mode}")
    moments = {}
    for name, parameter in state.student.named_parameters():
        for part, value in state.optimizer.state.get(parameter, {}).items():
            if mode != "none" and part != "step":
                assert value.placements == parameter.placements and value.to_local().shape == parameter.to_local().shape
            moments[f"{name}.{part}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    train_ijepa.train_step(state, golden_batches(), hyper_at(0, state.cfg))
    return moments


@pytest.mark.parametrize(("mode", "num_ranks"), [("simple", 3), ("fully_shard", 2), ("none", 2)])
def test_every_rank_has_its_part_of_a_published_optimizer(published, mode, num_ranks):
    path, _ = published
    expected = {f"{name}.{part}": x for name, own in trained_elsewhere(path, "").items() for part, x in own.items()}
    for moments in run_on_ranks(moments_on_this_rank, num_ranks, path, mode):
        assert moments.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(moments[key], value)] == []


def fault(path: Path, mode: str) -> str:
    with pytest.raises(UserError) as caught:
        moments_on_this_rank(path, mode)
    return str(caught.value)


def test_an_optimizer_that_does_not_fit_is_refused_in_words(published, tmp_path):
    path, _ = published
    trained_elsewhere(path, "")
    file = torch.load(path, weights_only=True)
    moment = file["opt"]["state"][1]["exp_avg"]
    damage = {
        "holds no AdamW under opt": {"opt": {}},
        "has groups of [2, 1] parameters, its encoder and predictor have [10, 12, 19, 20]": {
            "opt": {"state": {}, "param_groups": [{"params": [0, 1]}, {"params": [2]}]}
        },
        "patch_embed.proj.weight.exp_avg ([3], expected [32, 3, 12, 12])": {
            "opt": file["opt"]
            | {"state": file["opt"]["state"] | {1: file["opt"]["state"][1] | {"exp_avg": moment[0, 0, 0, :3]}}}
        },
        "is not all finite: backbone.patch_embed.proj.weight.exp_avg (13824 of": {
            "opt": file["opt"]
            | {"state": file["opt"]["state"] | {1: file["opt"]["state"][1] | {"exp_avg": moment / 0}}}
        },
    }
    for words, changed in damage.items():
        torch.save(file | changed, tmp_path / "damaged.pth.tar")
        with pytest.raises(UserError, match=r"^train.init_optimizer=true: .*damaged\.pth.*set it to false") as caught:
            start(tmp_path / "damaged.pth.tar", *WITH_OPTIMIZER)
        assert words in str(caught.value)
    assert run_on_ranks(fault, 2, tmp_path / "damaged.pth.tar", "none") == [str(caught.value)] * 2, "a rank waits"


def test_a_training_starts_from_an_export_with_or_without_predictor(images, finished):
    run, own = finished
    for name in ("student", "student_ema"):
        weights = torch.load(run / f"{name}.pth", weights_only=True)
        cfg = load(*tiny_run(images, run, *own))
        state = IjepaState(cfg, torch.device("cpu"), init_from=str(run / f"{name}.pth"))
        for key, value in state.student.state_dict().items():
            same = key not in weights or torch.equal(value, weights[key])
            assert same, f"{name}: {key}"
        for key, value in state.student_ema.state_dict().items():
            assert torch.equal(value, weights[key]), f"{name}: {key}"


def test_a_start_at_another_resolution_resizes_the_positions(published):
    path, parts = published
    state = start(path, "data.images_size=96")
    table = state.student["backbone"].pos_embed
    assert table.shape == (1, 64, 32)
    old = parts["encoder"]["pos_embed"].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(old, size=(8, 8), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(table, expected)
    assert not torch.equal(table, sincos_table((8, 8), 32))
    features = state.student["backbone"](torch.zeros(1, 3, 96, 96))
    assert features.feature_map.shape == (1, 8, 8, 32)


def test_weights_of_another_method_or_size_are_refused_in_words(published, tmp_path, capsys):
    from golden import tiny_model

    capi = tmp_path / "capi.pth"
    torch.save({f"backbone.{key}": value for key, value in tiny_model().state_dict().items()}, capi)
    for path, words in ((capi, "holds no encoder of I-JEPA or StoP"), (published[0], "do not fit the model")):
        arguments = [*tiny_run("/nowhere", tmp_path / "run"), f"train.init_from={path}"]
        assert train_ijepa.main(arguments) == 2
        message = capsys.readouterr().err
        assert words in message and str(path) in message, message


def test_a_checkpoint_of_another_method_is_refused_in_words(images, tmp_path, capsys):
    from commands import run_main, tiny

    assert run_main(tiny(images, tmp_path, "optim.total_iters=2")) == 0
    assert train_ijepa.main(tiny_run(images, tmp_path)) == 2
    message = capsys.readouterr().err
    assert "model." in message and "Traceback" not in message, message


# --- Configurations --------------------------------------------------------------------------------------------------

CONFIGS = sorted(ROOT.glob("configs/ijepa/*.yaml")) + sorted(ROOT.glob("configs/stop/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_can_be_trained(path, images, tmp_path, capsys):
    base = [str(ROOT / "configs/ijepa/imagenette.yaml")] if path.parts[-2:] == ("stop", "imagenette.yaml") else []
    arguments = [*base, str(path), f"data.dataset={images}", "train.device=cpu", "train.probe.every=0"]
    assert train_ijepa.main([*arguments, f"train.output_dir={tmp_path}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    is_stop = path.parent.name == "stop"
    assert ("positions    stochastic, standard deviation 0.2" in text) == is_stop
    assert ("positions    exact" in text) != is_stop
    share = int(re.search(r"context of about [\d.]+ patches \((\d+)%\)", text)[1])
    assert 20 <= share <= 45, "contexts are far from the published ones"
    assert "warning      contexts" not in text


PUBLISHED_BATCHES = {  # images per GPU, GPUs
    "ijepa/vith14": (128, 16), "ijepa/vith16_448": (16, 128), "ijepa/vith14_in22k": (32, 64),
    "ijepa/vitg16_in22k": (16, 128), "stop/vitb16": (64, 32), "stop/vitl16": (64, 32), "stop/vith16": (64, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_BATCHES)
def test_published_batches_are_of_2048_images(name):
    cfg = load(str(ROOT / "configs" / f"{name}.yaml"))
    per_gpu, gpus = PUBLISHED_BATCHES[name]
    assert (cfg.optim.batch_size_per_gpu, cfg.launcher.num_nodes * cfg.launcher.gpus_per_node) == (per_gpu, gpus)
    epoch = cfg.data.images_per_epoch // 2048
    epochs = {"vith14_in22k": 66, "vitg16_in22k": 44, "vitb16": 600, "vitl16": 600}.get(name.split("/")[1], 300)
    assert cfg.optim.total_iters == epochs * epoch


def test_a_training_may_be_as_long_as_so_many_epochs(images, tmp_path, capsys):
    cfg = load("optim.epochs=2.5", "optim.batch_size_per_gpu=2048")
    assert with_length(cfg).optim.total_iters == int(2.5 * 625)
    arguments = [*tiny_run(images, tmp_path), "optim.epochs=2", "data.images_per_epoch=10"]
    # what is counted in steps has to fit into these four, and not into the steps that epochs replace
    arguments += ["optim.total_iters=1", "optim.epochs=2", "optim.lr_schedule.warmup_iters=2", "optim.hold_after=3"]
    assert train_ijepa.main([*arguments, "--dry-run"]) == 0
    assert "length       4 steps of 4 images = 1.6 epochs" in capsys.readouterr().out
    assert train_ijepa.main(arguments) == 0
    assert metrics_of(tmp_path)[-1]["step"] == 4


def test_a_change_on_the_way_is_told(caplog):
    import dataclasses

    cfg = load(*GOLDEN_CONFIG)
    saved = SavedState(
        path=Path("x"), step=4, world_size=1, config=dataclasses.asdict(load(*GOLDEN_CONFIG, "masks.num_targets=3")),
        extra={}, rank_extra=[],
    )  # fmt: skip
    warn_if_changed(saved, cfg)
    assert "masks.num_targets 3 -> 4" in caplog.text and "weight decay" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.images_size=50"], "data.images_size=50: must be a multiple of model.patch_size=4; the nearest is 48"),
        (["data.images_size=12"], "masks.context_scale=[0.85, 1.0]: a context block may have 4 patches on a grid of"),
        (["masks.target_scale=[0.001,0.01]"], "masks.target_scale=[0.001, 0.01]: a target block may have no patch on"),
        (["model.embed_dim=30"], "model.embed_dim=30: must be a multiple of 4"),
        (["model.num_heads=5"], "model.embed_dim=32: must be a multiple of the 5 heads"),
        (["predictor.embed_dim=18"], "predictor.embed_dim=18: must be a multiple of 4"),
        (["optim.epochs=1", "data.images_per_epoch=null"], "optim.epochs=1.0: needs data.images_per_epoch"),
        (["optim.epochs=1", "data.images_per_epoch=3"], "data.images_per_epoch=3: fewer than the 4 images"),
        (["optim.hold_after=250.0"], "optim.hold_after=250.0: a number with a decimal point is a fraction of"),
        (["optim.hold_after=0.01"], "optim.hold_after=0.01: is step 0 of optim.total_iters=6; give one of 1 to 6, or"),
        (
            ["optim.epochs=2", "data.images_per_epoch=10", "optim.hold_after=5"],
            "optim.hold_after=5: is step 5 of optim.total_iters=4; give one of 1 to 4, or",
        ),
        (
            ["optim.epochs=2", "data.images_per_epoch=10", "optim.lr_schedule.warmup_iters=5"],
            "optim.lr_schedule.warmup_iters=5: with freeze_iters=0 it does not fit into optim.total_iters=4",
        ),
        (["optim.hold_after=7"], "optim.hold_after=7: is step 7 of optim.total_iters=6; give one of 1 to 6, or"),
        (["train.init_optimizer=true"], "train.init_optimizer=True: needs train.init_from"),
        (["data.decode=gpu"], "data.decode='gpu': crops there are bicubic and keep their colours"),
        (["masks.context_pathces=3"], "unknown key masks.context_pathces; did you mean masks.context_patches?"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_a_remedy(images, tmp_path, capsys, arguments, says):
    assert train_ijepa.main([*tiny_run(images, tmp_path), *arguments, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_a_batch_of_one_trains_and_is_warned_of(images, tmp_path, capsys):
    """Nothing is cut then: an image shows nearly twice as much as in the published batches."""
    one = tiny_run(images, tmp_path, "optim.batch_size_per_gpu=1", "optim.total_iters=2")
    assert train_ijepa.main([*one, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "warning      contexts show about" in text and "masks.context_patches=16" in text
    assert train_ijepa.main(one) == 0
    assert math.isfinite(metrics_of(tmp_path)[-1]["loss"])
