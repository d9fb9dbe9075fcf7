"""train_cae.py: the step against the published vectors, the loop, weights from outside, and every configuration."""

import argparse
import dataclasses
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
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
from golden_cae import (
    CAE,
    DROP_PATH,
    GOLDEN_CONFIG,
    NARROW,
    TINY,
    GoldenTokenizer,
    golden_batches,
    golden_state,
    published_state,
    save_tokenizer,
    tiny_networks,
    tiny_run,
)
from ranks import run_on_ranks
from torch import Tensor

import export
import train_cae
from cae import load_model
from checkpoint import SavedState
from config import load_config
from train_cae import DEFAULT_CONFIG, CaeConfig, CaeState, lr_at, warn_if_changed
from training import with_length

CPU = torch.device("cpu")


def load(*sources: str) -> CaeConfig:
    return load_config(CaeConfig, DEFAULT_CONFIG, list(sources))


# --- Against the vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vectors"),
    [("vitb16_300e", CAE["pretrain_lr_300e"]), ("vitb16_800e", CAE["pretrain_lr_800e"])],
)
def test_schedules_of_the_published_configs_are_those_of_the_vectors(config, vectors):
    cfg = load(str(ROOT / "configs" / "cae" / f"{config}.yaml"))
    assert cfg.optim.total_iters == vectors["n"]
    for step, expected in vectors.items():
        if step != "n":
            assert lr_at(int(step), cfg) == pytest.approx(expected, rel=1e-9), f"at {step}"


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_steps_are_those_of_the_vectors(recompute):
    state = golden_state(f"efficiency.rematerialization.enabled={recompute}")
    for expected in TINY["train_4_steps"]["steps"]:
        scalars = train_cae.train_step(state, GoldenTokenizer(), golden_batches(), 1.5e-3)
        state.step += 1
        assert scalars["token_loss"].item() == pytest.approx(expected["ce"], rel=1e-5)
        assert scalars["alignment_loss"].item() == pytest.approx(expected["align"], rel=1e-5)
        assert scalars["grad_norm"].item() == pytest.approx(expected["grad_norm_before_clip"], rel=1e-5)
        total = scalars["token_loss"] + scalars["alignment_loss"]
        assert scalars["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def optimizer_groups(state: CaeState) -> list[dict[str, float]]:
    """Weight decay, and how many tensors and numbers it acts on, of what is trained; what decays comes first."""
    groups = sorted(state.optimizer.param_groups, key=lambda group: -group["wd_multiplier"])
    trained = [[p for p in group["params"] if p.requires_grad] for group in groups]
    decays = [state.cfg.optim.weight_decay * group["wd_multiplier"] for group in groups]
    return [
        {"wd": decay, "tensors": len(group), "numel": sum(p.numel() for p in group)}
        for decay, group in zip(decays, trained, strict=True)
    ]


def test_as_many_parameters_decay_as_in_the_vectors(monkeypatch):
    assert optimizer_groups(golden_state()) == TINY["train_4_steps"]["opt_groups"]

    def on_meta(self, make, *_args, **_kwargs):
        with torch.device("meta"):
            return make()

    monkeypatch.setattr(CaeState, "place", on_meta)
    base = [each for each in GOLDEN_CONFIG if "compilation" in each]
    assert optimizer_groups(CaeState(load(*base), CPU)) == CAE["stats"]["opt_groups"]


def test_gradients_of_accumulated_images_are_the_mean_of_those_of_each():
    whole, parts = golden_state(), golden_state()
    a = train_cae.train_step(whole, GoldenTokenizer(), golden_batches(), 0.0)
    b = train_cae.train_step(parts, GoldenTokenizer(), golden_batches(2), 0.0)
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5), name


# --- The step --------------------------------------------------------------------------------------------------------


def test_what_is_dropped_in_a_step_follows_from_seed_step_and_place_alone():
    state = golden_state(DROP_PATH)
    first = state.draw_drop_paths(0, 4)
    assert [factors.shape for factors in first] == [(2, 2, 4), (2, 2, 4), (4, 2, 4)]
    assert not torch.equal(first.targets, first.context), "targets are dropped by themselves"
    torch.manual_seed(5)
    assert all(map(torch.equal, state.draw_drop_paths(0, 4), first))
    assert not torch.equal(state.draw_drop_paths(1, 4).predictor, first.predictor)
    state.step = 1
    assert not torch.equal(state.draw_drop_paths(0, 4).predictor, first.predictor)
    assert golden_state().draw_drop_paths(0, 4) == (None, None, None)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precisions_are_close_to_float32_and_keep_float32_weights(precision):
    scaled = f"efficiency.grad_scaler={'true' if precision == 'float16' else 'false'}"
    plain, half = golden_state(), golden_state(f"efficiency.param_dtype={precision}", scaled)
    half.scaler._init_scale = 1024.0
    for _ in range(3):
        a, b = (train_cae.train_step(s, GoldenTokenizer(), golden_batches(), 1e-4) for s in (plain, half))
        for name in ("token_loss", "alignment_loss"):
            assert b[name].item() == pytest.approx(a[name].item(), rel=2e-2), name
        assert b["grad_norm"].item() == pytest.approx(a["grad_norm"].item(), rel=5e-2)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}


@pytest.mark.parametrize("overrides", [[], [NARROW]], ids=["as wide", "narrower"])
def test_gradients_reach_what_is_trained_and_nothing_else(overrides):
    state = golden_state(DROP_PATH, *overrides)
    tables = [table.clone() for name, table in state.student.state_dict().items() if "pos_embed" in name]
    train_cae.train_step(state, GoldenTokenizer(), golden_batches(), 1e-3)
    without = {name for name, p in state.student.named_parameters() if p.grad is None}
    assert without == {"backbone.pos_embed", "predictor.rd_pos_embed"}
    after = [table for name, table in state.student.state_dict().items() if "pos_embed" in name]
    assert all(map(torch.equal, tables, after)) and len(tables) == 2


# --- The loop --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("data") / "images", size=40)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("finished")
    assert train_cae.main(tiny_run(images, run)) == 0
    return run


def test_a_run_learns_and_says_how_it_goes(finished):
    records = metrics_of(finished)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["alignment_loss"] < records[0]["alignment_loss"]
    for record in records:
        assert {"loss", "token_loss", "alignment_loss", "grad_norm", "lr"} <= record.keys()
        health = {"teacher_rank", "feature_norm_median", "feature_norm_max"}
        assert (health <= record.keys()) == (record["step"] % 3 == 0)
    log = (finished / "log.txt").read_text()
    assert re.search(r"step 6/6  loss \d\.\d{4}  tokens \d\.\d{4}  alignment \d\.\d{4}  lr", log)
    assert "8 of 16 patches are seen, 8 are predicted; 6 steps of 4 images = 0.0 epochs; DALL-E's encoder, 16" in log


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_run_ends_like_one_never_interrupted(images, finished, tmp_path, monkeypatch, stop_at):
    step = train_cae.train_step

    def stopped(state, *rest, **options):
        if state.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step(state, *rest, **options)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(train_cae, "train_step", stopped)
        assert train_cae.main(tiny_run(images, tmp_path)) == 0
    assert metrics_of(tmp_path)[-1]["step"] == stop_at + 1
    workers = f"efficiency.dataloader_num_workers={stop_at // 4}"  # which change nothing either
    assert train_cae.main(tiny_run(images, tmp_path, workers)) == 0
    assert_same_run(tmp_path, finished, exports=("student",))


def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(images, finished, tmp_path):
    arguments = tiny_run(images, tmp_path)
    train_through_kills(train_cae, arguments, tmp_path)
    assert_same_run(tmp_path, finished, exports=("student",))


FORWARD_PASSES = 12
"""Of an update, on all ranks together: one to four of them divide it."""


def train_on_this_rank(arguments: list[str]) -> None:
    share = f"optim.accumulation_steps={FORWARD_PASSES // dist.get_world_size()}"
    cfg = load(*arguments, share)
    train_cae.train(cfg, Path(cfg.train.output_dir), CPU)


def on_ranks(images: Path, output_dir: Path, num_ranks: int, *overrides: str) -> None:
    # Keys shift together with a bias before them, which changes nothing: its gradient is rounding, and Adam's step for
    # it as large as for others. With a small one the weights can be compared.
    own = ["optim.batch_size_per_gpu=1", "optim.total_iters=3", "optim.lr_schedule.base_value=1e-4", NARROW]
    run_on_ranks(train_on_this_rank, num_ranks, tiny_run(images, output_dir, *own, *overrides))


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """The run that those on several ranks have to equal: past the first epoch of ten images."""
    run = tmp_path_factory.mktemp("alone")
    on_ranks(images, run, 1)
    return run


@pytest.mark.parametrize(
    ("num_ranks", "mode"),
    [
        pytest.param(2, "simple", marks=pytest.mark.long),
        pytest.param(3, "fully_shard", marks=pytest.mark.long),
        (2, "none"),
        pytest.param(4, "simple", marks=pytest.mark.slow),
    ],
)
def test_ranks_are_accumulation_steps_of_one_drop_path_included(images, alone, tmp_path, num_ranks, mode):
    on_ranks(images, tmp_path, num_ranks, f"efficiency.fsdp={mode}")
    assert_close_runs(tmp_path, alone, "token_loss", "alignment_loss", export="student")


@pytest.mark.parametrize(
    ("before", "after", "modes"),
    [
        pytest.param(2, 3, ("simple", "none"), marks=pytest.mark.long),
        pytest.param(3, 1, ("none", "simple"), marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_on_other_ranks(images, alone, tmp_path, before, after, modes):
    on_ranks(images, tmp_path, before, f"efficiency.fsdp={modes[0]}")
    (tmp_path / "checkpoints" / "step_000000003").rename(tmp_path / "not-reached")
    on_ranks(images, tmp_path, after, f"efficiency.fsdp={modes[1]}")
    assert_close_runs(tmp_path, alone, "token_loss", "alignment_loss", export="student")


def test_an_export_is_a_model_of_the_evaluations(finished):
    model = load_model(pretrained_weights=finished / "student.pth")
    assert_same_but_for_values(untrained(load_model, finished / "student.pth"), model)
    assert model(torch.zeros(1, 3, 32, 48)).feature_map.shape == (1, 4, 6, 32)
    student = torch.load(finished / "student.pth", weights_only=True)
    assert {key.partition(".")[0] for key in student} == {"backbone", "predictor"}
    assert not (finished / "student_ema.pth").exists()


def test_every_export_of_a_run_says_which_tokenizer_it_had(images, finished, tmp_path, capsys):
    """Also where the tokenizer is not there any more, and where the command line names another one."""
    (description,) = set(re.findall(r"DALL-E's encoder, 16 tokens, weights \w{12}", (finished / "log.txt").read_text()))
    assert export.main([str(finished), *(str(tmp_path / f"w.{ending}") for ending in ("pth", "safetensors"))]) == 0
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    (again / "student.pth").unlink()
    assert train_cae.main([*tiny_run(images, again, "tokenizer.path=/nowhere.pth"), "--export"]) == 0
    for file in (finished / "student.pth", tmp_path / "w.pth", tmp_path / "w.safetensors", again / "student.pth"):
        assert load_model(pretrained_weights=file).training_notes == {"tokenizer": description}, file


def test_an_encoder_without_a_configuration_says_nothing_of_its_tokenizer(finished, tmp_path):
    shutil.copy(finished / "student.pth", tmp_path)
    assert load_model(pretrained_weights=tmp_path / "student.pth", num_heads=2).training_notes == {}
    cfg = yaml.safe_load((finished / "student.yaml").read_text())
    for section in ({"path": "of the time before"}, None):
        (tmp_path / "student.yaml").write_text(yaml.safe_dump(cfg | {"tokenizer": section}))
        assert load_model(pretrained_weights=tmp_path / "student.pth").training_notes == {}


@pytest.mark.slow
def test_a_run_is_probed_and_evaluated_while_it_trains(images, tmp_path):
    run = tmp_path / "run"
    own = probed_and_evaluated(tmp_path, "student", "cae.py")
    assert train_cae.main(tiny_run(images, run, *own)) == 0
    records = metrics_of(run)
    assert any("probe_knn" in record for record in records)
    (score,) = [record["eval/mine/fake/sum/top1"] for record in records if "eval_step" in record]
    weights = torch.load(run / "student.pth", weights_only=True)
    total = sum(float(w.double().sum()) for key, w in weights.items() if key.startswith("backbone."))
    assert score == pytest.approx(total, abs=1e-4)


def test_a_run_does_not_continue_with_another_tokenizer(images, finished, tmp_path, capsys):
    other = tmp_path / "other.pth"
    weights = torch.load(f"{images}.tokenizer.pth", weights_only=True)
    torch.save({key: -x for key, x in weights.items()}, other)
    longer = [f"tokenizer.path={other}", f"train.resume_from={finished}/checkpoints/step_000000004"]
    assert train_cae.main(tiny_run(images, tmp_path / "run", *longer)) == 2
    assert "but the checkpoint was trained with DALL-E's encoder, 16" in capsys.readouterr().err


# --- Weights from outside --------------------------------------------------------------------------------------------


@pytest.fixture
def published() -> dict[str, Tensor]:
    """Weights as the authors publish them, of the tiny networks."""
    return {key: x.clone() for key, x in published_state(*tiny_networks()).items()}


def start(path: Path, *overrides: str) -> CaeState:
    return CaeState(load(*GOLDEN_CONFIG, *overrides), CPU, init_from=str(path))


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "stripped"])
def test_a_training_starts_from_a_published_file(published, tmp_path, caplog, is_full):
    caplog.set_level("INFO", "capi")
    weights = {k: x for k, x in published.items() if is_full or k.startswith(("mask_token", "encoder."))}
    rest = {"optimizer": {}, "epoch": 799, "scaler": {}, "args": argparse.Namespace(lr=1e-3)} if is_full else {}
    torch.save({"model": weights, **rest}, tmp_path / "published.pth")
    state = start(tmp_path / "published.pth")
    for key, value in state.student["backbone"].state_dict().items():
        assert torch.equal(value, published[f"encoder.{key}"]), key
    same = [torch.equal(value, published[key]) for key, value in state.student["predictor"].state_dict().items()]
    assert all(same) if is_full else sum(same) < len(same) / 2
    assert ("regressor and decoder, which the file lacks, start random" in caplog.text) != is_full


def test_a_training_starts_from_an_export(images, finished):
    state = CaeState(load(*tiny_run(images, finished)), CPU, init_from=str(finished / "student.pth"))
    weights = torch.load(finished / "student.pth", weights_only=True)
    for key, value in state.student.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_start_at_another_resolution_resizes_the_positions_of_patches(published, tmp_path):
    torch.save({"model": published}, tmp_path / "published.pth")
    state = start(tmp_path / "published.pth", "data.images_size=64")
    for module, key in ((state.student["backbone"], "pos_embed"), (state.student["predictor"], "rd_pos_embed")):
        table = module.state_dict()[key]
        assert table.shape == (1, 65, 32) and not table[:, 0].any()


def test_weights_of_another_method_or_size_are_refused_in_words(images, published, tmp_path, capsys):
    from golden import tiny_model

    capi, other = tmp_path / "capi.pth", tmp_path / "other.pth"
    torch.save({f"backbone.{key}": value for key, value in tiny_model().state_dict().items()}, capi)
    torch.save({"model": published}, other)
    for path, words in ((capi, "holds no encoder of CAE"), (other, "do not fit the model")):
        assert train_cae.main([*tiny_run(images, tmp_path / "run"), f"train.init_from={path}", "model.depth=1"]) == 2
        message = capsys.readouterr().err
        assert words in message and str(path) in message, message


# --- Configurations --------------------------------------------------------------------------------------------------

CONFIGS = sorted(ROOT.glob("configs/cae/*.yaml"))
ON_TOP = {"vitl16_1600e_as_written": "vitl16_1600e_as_run"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_trained(path, images, tmp_path, capsys):
    base = [str(path.with_stem(ON_TOP[path.stem]))] if path.stem in ON_TOP else []
    arguments = [*base, str(path), f"data.dataset={images}", "train.device=cpu", "train.probe.every=0"]
    assert train_cae.main([*arguments, f"train.output_dir={tmp_path}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    is_small = path.stem in ("imagenette", "vits16_128")
    shown = "32 of 64 patches are seen, 32 are" if is_small else "98 of 196 patches are seen, 98 are"
    assert shown in text
    assert ("there is no such file yet; cae_tokenizer.py makes one" in text) == is_small
    if "1600e_as" in path.stem:
        heads = "768 with 12 heads of 64" if path.stem.endswith("run") else "1024 with 12 heads of 85"
        assert f"of width {heads}" in text


@pytest.mark.parametrize(("name", "epochs"), [("vitb16_300e", 300), ("vitb16_800e", 800), ("vitb16_1600e", 1600),
                                              ("vitl16_1600e_as_run", 1600)])  # fmt: skip
def test_published_batches_are_of_2048_images(name, epochs):
    cfg = load(str(ROOT / "configs" / "cae" / f"{name}.yaml"))
    num_gpus = cfg.launcher.num_nodes * cfg.launcher.gpus_per_node
    assert (cfg.optim.batch_size_per_gpu, num_gpus) == (64, 32)
    assert cfg.optim.total_iters == epochs * (cfg.data.images_per_epoch // 2048)
    warmup = {300: 10, 800: 20, 1600: 40}[epochs]
    assert cfg.optim.lr_schedule.warmup_steps(cfg.optim.total_iters) == warmup * 625
    longer = dataclasses.replace(
        cfg, optim=dataclasses.replace(cfg.optim, epochs=float(epochs), batch_size_per_gpu=2048)
    )
    assert with_length(longer).optim.total_iters == cfg.optim.total_iters


def test_a_change_on_the_way_is_told(caplog):
    cfg = load(*GOLDEN_CONFIG)
    before: Any = dataclasses.asdict(load(*GOLDEN_CONFIG, "cae.alignment_weight=1"))
    warn_if_changed(SavedState(path=Path("x"), step=4, world_size=1, config=before, extra={}, rank_extra=[]), cfg)
    assert "cae.alignment_weight 1.0 -> 2.0" in caplog.text and "learning rate" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.images_size=50"], "data.images_size=50: must be a multiple of model.patch_size=8; the nearest is 48"),
        (["data.mask_ratio=0.01"], "data.mask_ratio=0.01: hides no patch of a grid of 4 x 4 patches"),
        (["data.images_size=8"], "data.mask_ratio=0.5: a grid of 1 x 1 patches cannot be masked"),
        (["data.images_size=24", "data.mask_ratio=0.9", "data.min_block=9"], "do not come to 8 hidden ones; use a sm"),
        (["model.embed_dim=30"], "model.embed_dim=30: must be a multiple of 4"),
        (["model.num_heads=5"], "model.embed_dim=32: must be a multiple of the 5 heads"),
        (["regressor.embed_dim=18"], "regressor.embed_dim=18: must be a multiple of 4"),
        (["regressor.num_heads=64"], "regressor.num_heads=64: must be at most regressor.embed_dim=32"),
        (["optim.epochs=1", "data.images_per_epoch=null"], "optim.epochs=1.0: needs data.images_per_epoch"),
        (["data.decode=gpu"], "data.decode='gpu': the tokenizer's view of a crop is not made there"),
        (["efficiency.teacher_fp8=true", "efficiency.param_dtype=bfloat16"], "efficiency.teacher_fp8=True: there is "),
        (["evals={a: {period: 1, final: false, model_to_eval: student_ema, model_setup_script: cae.py, where: auto, "
          "eval_config: {}, download: false}}"], "evals.a.model_to_eval='student_ema': must be one of student"),
        (["decoder.vocabulry_size=3"], "unknown key decoder.vocabulry_size; did you mean decoder.vocabulary"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_a_remedy(images, tmp_path, capsys, arguments, says):
    assert train_cae.main([*tiny_run(images, tmp_path), *arguments, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("tokenizer.image_size=64", "tokenizer.image_size=64: it gives 8 x 8 tokens, and images have 4 x 4 pa"),
        ("decoder.vocabulary_size=8", "decoder.vocabulary_size=8: tokenizer.path='{images}.tokenizer.pth' has 16"),
        ("tokenizer.path=/nowhere.pth", "tokenizer.path='/nowhere.pth': there is no such file"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_refused_in_words(images, tmp_path, capsys, argument, says):
    assert train_cae.main(tiny_run(images, tmp_path, argument)) == 2
    assert says.format(images=images) in capsys.readouterr().err
    assert train_cae.main([*tiny_run(images, tmp_path, argument), "--dry-run"]) == (0 if "nowhere" in argument else 2)


def test_a_dry_run_says_whether_a_tokenizer_with_an_address_is_there(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "example.org" / "encoder.pth"
    arguments = [*tiny_run(images, tmp_path, "tokenizer.path=https://example.org/encoder.pth"), "--dry-run"]
    assert train_cae.main(arguments) == 0
    told = capsys.readouterr().out
    assert f"tokenizer.path=https://example.org/encoder.pth: the training downloads it to '{place}'" in told
    place.parent.mkdir(parents=True)
    shutil.copy(f"{images}.tokenizer.pth", place)
    assert train_cae.main(arguments) == 0
    told = capsys.readouterr().out
    assert "tokenizer    16 tokens at 32 px: DALL-E's encoder, 16 tokens, weights" in told and "downloads" not in told


def test_a_dry_run_says_which_tokenizer_it_is(images, tmp_path, capsys):
    assert train_cae.main([*tiny_run(images, tmp_path), "--dry-run"]) == 0
    assert "tokenizer    16 tokens at 32 px: DALL-E's encoder, 16 tokens, weights" in capsys.readouterr().out
