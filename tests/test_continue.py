"""Continuing from weights: `optim.start` and the presets configs/continue, of every method."""

import shutil

import golden_cae
import golden_ijepa
import numpy as np
import pytest
import torch
import yaml
from commands import make_images, rewrite_config, tiny
from conftest import ROOT, seeded

import train_cae
import train_capi
import train_ijepa
from config import StartConfig, load_config
from optim import started_rates

REST_OF_CAPI = ("head.", "backbone.decoder.", "backbone.dec_norm.", "backbone.mask_token")
METHODS = {
    "capi": (train_capi, tiny, "student", "capi.yaml", REST_OF_CAPI),
    "ijepa": (train_ijepa, golden_ijepa.tiny_run, "student_ema", "ijepa.yaml", ()),
    "cae": (train_cae, golden_cae.tiny_run, "student", "cae.yaml", ("predictor.",)),
}
"""Script, arguments of a tiny run, name of an export, preset, and how what is not the encoder's begins in that."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("data") / "images", size=40)
    golden_cae.save_tokenizer(folder)
    return folder


def weights_of(run, export):
    return torch.load(run / f"{export}.pth", weights_only=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_reads_the_weights_that_a_training_would_start_from(images, tmp_path, capsys, name):
    script, arguments, export, *_ = METHODS[name]
    assert script.main(arguments(images, tmp_path / "first", "optim.total_iters=1")) == 0
    start = tmp_path / "first" / f"{export}.pth"
    dry = arguments(images, tmp_path / "second", f"train.init_from={start}", "--dry-run")
    assert script.main(dry) == 0
    assert f"start        {start}" in capsys.readouterr().out
    weights = torch.load(start, weights_only=True)
    torch.save({key: x for key, x in weights.items() if "blocks.0" not in key}, start)
    assert script.main(dry) == 2
    assert str(start) in capsys.readouterr().err
    assert script.main(arguments(images, tmp_path / "third", "--dry-run")) == 0
    assert "start        " not in capsys.readouterr().out


def test_the_encoder_waits_and_then_its_learning_rate_rises():
    start = StartConfig(encoder_lr_mult=0.5, predictor_lr_mult=2.0, frozen_iters=2, ramp_iters=0.2)
    rates = [started_rates(step, start, 20) for step in range(8)]
    assert [each["encoder"] for each in rates] == [0, 0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert {each["predictor"] for each in rates} == {2.0}
    plain = StartConfig(encoder_lr_mult=1.0, predictor_lr_mult=1.0, frozen_iters=0, ramp_iters=0)
    assert started_rates(0, plain, 20) == {"encoder": 1.0, "predictor": 1.0}


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_is_not_changed_while_the_rest_learns(images, tmp_path, name):
    script, arguments, export, preset, rest = METHODS[name]
    assert script.main(arguments(images, tmp_path / "first", "optim.total_iters=1")) == 0
    begun = weights_of(tmp_path / "first", export)
    more = [
        f"train.init_from={tmp_path / 'first' / export}.pth",
        "optim.total_iters=2",
        "optim.start.ramp_iters=0",
        "train.seed=5",
    ]
    for run, frozen in (("waits", 2), ("learns", 1)):
        own = [str(ROOT / "configs" / "continue" / preset), *more, f"optim.start.frozen_iters={frozen}"]
        assert script.main(arguments(images, tmp_path / run, *own)) == 0
    waited, learned = (weights_of(tmp_path / run, export) for run in ("waits", "learns"))
    encoder = [key for key in begun if not key.startswith(rest)]
    changed = {key for key in begun if not torch.equal(waited[key], begun[key])}
    assert changed.isdisjoint(encoder)
    assert not rest or changed, "the rest does not learn"
    moved = {key for key in encoder if not torch.equal(learned[key], begun[key])}
    assert len(moved) > 0.8 * len([key for key in encoder if "freqs" not in key and "pos" not in key])


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_from_before_the_keys_continues_without_a_word_about_them(images, tmp_path, name):
    """Of `optim.start`, and of bands, depth and turns: what they do by default is what was done before."""
    script, arguments, *_ = METHODS[name]
    run = arguments(images, tmp_path, "optim.total_iters=2", "train.checkpointing.period=1")
    assert script.main(run) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "step_000000002")
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        config = yaml.safe_load((checkpoint / "config.yaml").read_text())
        del config["optim"]["start"]
        for key in ("value_range", "mean", "std", "do_vflip", "do_turns"):
            del config["data"][key]
        if name == "capi":
            del config["model"]["transformers_kwargs"]["block_kwargs"]["mlp_bias"]
        rewrite_config(checkpoint, yaml.safe_dump(config))
    (tmp_path / "log.txt").unlink()
    assert script.main(run) == 0
    said = (tmp_path / "log.txt").read_text()
    assert "loaded " in said and "changed since" not in said and "other than at the checkpoint" not in said


@pytest.mark.parametrize(("name", "bands"), [("capi", 5), ("ijepa", 1), ("cae", 2)])
def test_filters_of_rgb_are_spread_over_other_bands(images, tmp_path, name, bands):
    script, arguments, export, _, _ = METHODS[name]
    assert script.main(arguments(images, tmp_path / "rgb", "optim.total_iters=1")) == 0
    (tmp_path / "bands").mkdir()
    for i in range(8):
        np.save(tmp_path / "bands" / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (40, 44, bands), np.uint8))
    before = weights_of(tmp_path / "rgb", export)
    own = [f"train.init_from={tmp_path / 'rgb' / export}.pth", f"model.in_chans={bands}", "data.mean=auto"]
    own += ["data.std=auto", f"data.dataset={tmp_path / 'bands'}", "optim.total_iters=1", "optim.start.frozen_iters=1"]
    if name == "cae":  # its tokenizer reads RGB: what is built is looked at, and not trained
        cfg = load_config(
            train_cae.CaeConfig,
            train_cae.DEFAULT_CONFIG,
            arguments(images, tmp_path, *own[:2], "data.mean=[0.5,0.5]", "data.std=[1,1]"),
        )
        after = train_cae.CaeState(cfg, torch.device("cpu"), init_from=cfg.train.init_from).student.state_dict()
    else:
        assert script.main(arguments(images, tmp_path / "run", *own)) == 0
        after = weights_of(tmp_path / "run", export)
    (key,) = (key for key in before if "patch_embed" in key and before[key].ndim == 4)
    assert after[key].shape[1] == bands
    grey = torch.rand(1, 1, *before[key].shape[2:], generator=seeded(0))
    responses = [(weights[key] * grey).sum((1, 2, 3)) for weights in (before, after)]
    torch.testing.assert_close(*responses)
    assert all(torch.equal(after[key][:, i], after[key][:, 0]) for i in range(bands))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.start.frozen_iters=1.5", "optim.start.frozen_iters=1.5: a number with a decimal point"),
        ("optim.start.ramp_iters=99", "the encoder would have its learning rate at step 99 of optim.total_iters=4"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_start_that_does_not_fit_is_named(images, tmp_path, capsys, name, override, message):
    script, arguments, *_ = METHODS[name]
    assert script.main(arguments(images, tmp_path / "run", "optim.total_iters=4", override)) == 2
    assert message in capsys.readouterr().err
