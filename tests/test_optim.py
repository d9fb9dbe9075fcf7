"""optim.py: schedules and parameter groups against the golden numbers, moments in 8 bits, and the moving average."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import load_golden_json
from torch import nn

import optim
from clustering import L2NormLinear
from config import DEFAULT_PRETRAIN_CONFIG, ScheduleConfig, load_config
from model import EncoderDecoder
from optim import (
    AdamW8bit,
    Multipliers,
    block_size,
    ema_update_,
    make_adamw,
    moments_bytes,
    multipliers,
    scheduled,
    scheduled_ahead,
    set_rates_,
    stepped,
)
from train_capi import CapiConfig, hyper_at


@pytest.mark.parametrize("case", load_golden_json("schedules"), ids=lambda c: str(c["kwargs"])[:60])
def test_schedule_matches_golden(case):
    given = {"start_warmup_value": 0.0, "freeze_iters": 0, "truncate_cos": 1.0, "warmup_iters": 0} | case["kwargs"]
    total = given.pop("total_iters")
    for step, expected in case["values"].items():
        assert scheduled(ScheduleConfig(**given), int(step), total) == pytest.approx(expected, rel=1e-9, abs=1e-15), (
            f"at step {step}"
        )


def test_fractions_of_the_default_recipe_are_the_published_steps():
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [])
    for schedule in (cfg.optim.lr_schedule, cfg.optim.momentum_schedule, cfg.capi.clustering_optimizer.lr_schedule):
        assert schedule.warmup_steps(cfg.optim.total_iters) == 50_000
    golden = load_golden_json("schedules")
    assert hyper_at(250_000, cfg).lr == pytest.approx(golden[0]["values"]["250000"])
    assert hyper_at(250_000, cfg).momentum == pytest.approx(golden[1]["values"]["250000"])
    assert hyper_at(250_000, cfg).clustering_lr == pytest.approx(golden[2]["values"]["250000"])


def test_a_schedule_ahead_begins_a_step_up_and_ends_at_the_final_value():
    """Published numbers are in test_train_ijepa.py; here are the keys that those leave alone."""
    values = {"start_warmup_value": 1.0, "base_value": 3.0, "final_value": 0.5, "warmup_iters": 4, "truncate_cos": 1.0}
    curve = [scheduled_ahead(ScheduleConfig(freeze_iters=2, **values), step, 20) for step in range(21)]
    assert curve[0] == 0 and curve[1] == 0, "frozen: the values of step 1 and 2"
    assert curve[2:6] == [1.5, 2.0, 2.5, 3.0]
    assert curve[19] == curve[20] == pytest.approx(0.5)
    assert curve[12] == pytest.approx(1.75), "the middle of the cosine"
    only_warmup = ScheduleConfig(freeze_iters=0, **(values | {"warmup_iters": 4}))
    assert [scheduled_ahead(only_warmup, step, 4) for step in range(3)] == [1.5, 2.0, 2.5]
    assert scheduled_ahead(only_warmup, 3, 4) == 0.5


def test_a_shorter_run_is_the_same_curve_compressed():
    long = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [])
    short = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["optim.total_iters=5000"])
    for share in (0.2, 0.5, 0.9):
        a, b = hyper_at(int(share * 500_000), long), hyper_at(int(share * 5000), short)
        assert a.lr == pytest.approx(b.lr, rel=1e-3)
        assert 1 - a.momentum == pytest.approx(1 - b.momentum, rel=1e-3)


def student(depths: tuple[int, int] = (3, 2)) -> nn.ModuleDict:
    towers = {"embed_dim": 64, "drop_path_rate": 0.0, "block_kwargs": {"attn_kwargs": {"num_heads": 4}}}
    backbone = EncoderDecoder(
        transformers_kwargs=towers, encoder_kwargs={"depth": depths[0]}, decoder_kwargs={"depth": depths[1]}
    )
    return nn.ModuleDict({"backbone": backbone, "head": L2NormLinear(64, 48)})


def test_parameter_groups_match_golden():
    golden = load_golden_json("param_groups")
    actual = multipliers(student(), patch_embed_lr_mult=0.2, rope_lr_mult=0.0, layernorm_wd_mult=0.1)
    assert {k: v for k, v in actual.items() if k in golden} == {
        k: Multipliers(v["lr_multiplier"], v["wd_multiplier"]) for k, v in golden.items()
    }
    assert actual.keys() - golden.keys() <= {"head.last_layer.weight_g", "head.last_layer.weight_v"}


def test_every_parameter_is_in_exactly_one_group_and_gets_its_multipliers():
    module = student()
    by_name = multipliers(module, patch_embed_lr_mult=0.2, rope_lr_mult=0.0, layernorm_wd_mult=0.1)
    optimizer = make_adamw(module, "AdamW", (0.9, 0.95), by_name)
    other = make_adamw(nn.Linear(2, 2), "AdamW", (0.9, 0.95))
    for each in (optimizer, other):
        set_rates_(each, 1e-3, 0.1)
    by_parameter = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(by_parameter) == len(list(module.parameters()))
    freqs = by_parameter[module.get_parameter("backbone.encoder.blocks.0.residual1.fn.rope.freqs")]
    bias = by_parameter[module.get_parameter("backbone.patch_embed.bias")]
    assert freqs["lr"] == 0
    assert bias["lr"] == pytest.approx(0.2 * 1e-3)
    assert bias["weight_decay"] == 0
    norm = by_parameter[module.get_parameter("backbone.encoder.blocks.0.residual1.norm.weight")]
    assert norm["weight_decay"] == pytest.approx(0.1 * 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in other.param_groups] == [(1e-3, 0.1)]


def test_ema_moves_by_one_minus_momentum():
    ema, module = nn.Linear(2, 2), nn.Linear(2, 2)
    before, target = ema.weight.detach().clone(), module.weight.detach().clone()
    ema_update_(ema, module, 1.0)
    assert torch.equal(ema.weight, before)
    ema_update_(ema, module, 0.9)
    torch.testing.assert_close(ema.weight.detach(), 0.9 * before + 0.1 * target)
    assert torch.equal(module.weight, target)
    ema_update_(ema, module, 0.0)
    assert torch.equal(ema.weight, target)


def test_a_stepped_rate_falls_to_a_tenth_at_each_milestone():
    progress = [0, 7.999, 8, 15.9, 16, 24, 27.9]
    values = [stepped(x, [8, 16, 24]) for x in progress]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001, 0.001])
    assert stepped(5, []) == 1


# --- Moments in 8 bits -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two blocks in a row, a row of 196 in one block, rows that nothing divides, and what is small."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            "wide": (11, 512), "patches": (24, 3, 14, 14), "prime": (20, 257), "bias": (5000,), "small": (8, 8),
        }.items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def stepped_by(kind, num_steps, module=None, optimizer=None, first=0):
    """A module and its optimizer after steps whose gradients have scales from 1e-4 to 1 within a block."""
    module = Mixed() if module is None else module
    if optimizer is None:
        optimizer = make_adamw(module, kind, (0.9, 0.95))
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            scale = 10 ** (-4 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(99)))
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        set_rates_(optimizer, 1e-2, 0.1)
        optimizer.step()
    return module, optimizer


def dynamic_levels(signed: bool) -> np.ndarray:
    """Decades from 1 down to 1e-6: 64, 32, ..., 1 centres of equal parts; without sign twice as many, and no zero."""
    levels = [1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (6 - decade) * (1 if signed else 2) + 1) * 10.0**-decade
        levels += [*(edges[1:] + edges[:-1]) / 2]
    return np.sort([*levels, 0.0, *(-x for x in levels if x < 1)] if signed else levels)


def rounded(x: np.ndarray, block: int, signed: bool) -> np.ndarray:
    blocks, levels = x.reshape(-1, block), dynamic_levels(signed)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - levels).argmin(-1)
    return (levels[nearest] * scale).reshape(x.shape)


@pytest.fixture(params=["torch", "triton"])
def updated_by(request, monkeypatch):
    """Plainly, and by the kernel for GPUs, in Triton's interpreter where there is none."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU, which is tested")
        monkeypatch.setattr(optim, "has_kernel", lambda device: True)


@pytest.mark.usefixtures("updated_by")
@pytest.mark.parametrize(("name", "block"), [("wide", 256), ("patches", 196)])
def test_8_bit_updates_are_those_of_the_paper(name, block):
    module, _ = stepped_by("AdamW8bit", 3)
    weights = getattr(Mixed(), name).detach().double().numpy()
    average, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(3):
        gradients = getattr(stepped_by("AdamW8bit", 1, first=step)[0], name).grad.double().numpy()
        average, square = 0.9 * average + 0.1 * gradients, 0.95 * square + 0.05 * gradients**2
        update = average / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.95 ** (step + 1))) + 1e-8)
        weights = weights * (1 - 1e-2 * 0.1) - 1e-2 * update
        average, square = rounded(average, block, True), rounded(square, block, False)
    error = np.abs(getattr(module, name).detach().numpy() - weights)
    assert np.quantile(error, 0.999) < 1e-6  # what lies half way between two levels may be rounded to either
    assert error.max() < 1e-2


@pytest.mark.usefixtures("updated_by")
def test_8_bits_follow_32_and_leave_what_does_not_suit_them_in_32():
    (eight, of_eight), (whole, _) = stepped_by("AdamW8bit", 20), stepped_by("AdamW", 20)
    for name, parameter in eight.named_parameters():
        state, other = of_eight.state[parameter], getattr(whole, name)
        if name in ("wide", "patches"):
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
            moved = (other - getattr(Mixed(), name)).abs().mean()
            assert 0 < (parameter - other).abs().mean() < 0.15 * moved, name
        else:
            assert block_size(parameter.shape) is None
            assert torch.equal(parameter, other), name


@pytest.mark.usefixtures("updated_by")
def test_a_gradient_that_falls_away_moves_a_weight_no_further_than_in_32_bits():
    """Rounded to zero, a square would leave the average of the gradients a divisor of 1e-8."""
    ends = []
    for kind in ("AdamW8bit", "AdamW"):
        linear = nn.Linear(256, 16, bias=False)
        nn.init.zeros_(linear.weight)
        optimizer = make_adamw(linear, kind, (0.9, 0.95))
        set_rates_(optimizer, 1e-3, 0.0)
        for small in (2e-4, 0.0, 0.0, 0.0):
            linear.weight.grad = torch.full_like(linear.weight, small)
            linear.weight.grad[:, 0] = 1.0
            optimizer.step()
        ends.append(linear.weight.detach().abs().max())
    assert ends[0] < 1.5 * ends[1]


def test_moments_take_as_many_bytes_as_a_plan_says():
    for kind in ("AdamW", "AdamW8bit"):
        module, optimizer = stepped_by(kind, 1)
        held = [x.nbytes for state in optimizer.state.values() for key, x in state.items() if key != "step"]
        assert sum(held) == moments_bytes(module, kind)
    big = nn.Linear(1024, 1024, bias=False, device="meta")
    assert moments_bytes(big, "AdamW8bit") / 2**20 == 2 + 8 / 256, "bytes per weight"


def test_a_run_changes_from_32_bits_to_8_and_back():
    module, optimizer = stepped_by("AdamW", 3)
    before = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in module.named_parameters()}
    saved = optimizer.state_dict()
    eight = make_adamw(module, "AdamW8bit", (0.9, 0.95))
    assert isinstance(eight, AdamW8bit)
    eight.load_state_dict(saved)
    assert eight.state[module.wide]["exp_avg_sq"].dtype == torch.uint8
    back = make_adamw(module, "AdamW", (0.9, 0.95))
    back.load_state_dict(deepcopy(eight.state_dict()))
    for name, parameter in module.named_parameters():
        state = back.state[parameter]
        # Levels lie no further apart than 0.1 and 0.55 of a decade, the two last ones; what is below these is lost.
        torch.testing.assert_close(state["exp_avg_sq"], before[name], rtol=0.7, atol=1e-6 * before[name].max().item())
        assert state["step"] == 3
    for kind, changed in (("AdamW8bit", eight), ("AdamW", back)):
        stepped_by(kind, 1, module, changed, first=3)
        assert {float(state["step"]) for state in changed.state.values()} == {4}
