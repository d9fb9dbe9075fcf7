"""optim.py: schedules and parameter groups against the golden numbers, and the moving average."""

import pytest
import torch
from conftest import load_golden_json
from torch import nn

from clustering import L2NormLinear
from config import DEFAULT_PRETRAIN_CONFIG, ScheduleConfig, load_config
from model import EncoderDecoder
from optim import Multipliers, ema_update_, make_adamw, multipliers, scheduled, scheduled_ahead, set_rates_, stepped
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
