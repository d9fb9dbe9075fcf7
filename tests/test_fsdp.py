"""fsdp.py: recomputation by operator name and compilation change nothing but memory and speed."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, RematerializationConfig, load_config
from fsdp import compile_function, recompute_blocks
from model import Block, EncoderDecoder
from utils import UserError


def make_model() -> EncoderDecoder:
    torch.manual_seed(0)
    block = {"drop_path_type": "efficient", "attn_kwargs": {"num_heads": 2}}
    return EncoderDecoder(
        patch_size=4,
        n_registers=4,
        transformers_kwargs={"embed_dim": 32, "drop_path_rate": 0.3, "block_kwargs": block},
        encoder_kwargs={"depth": 2},
        decoder_kwargs={"depth": 1},
    )


def default_policy(**changes: object) -> RematerializationConfig:
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.rematerialization
    return dataclasses.replace(cfg, **{"enabled": True, **changes})  # pyright: ignore[reportArgumentType]  # test values


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def forward_backward(model: EncoderDecoder) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, int]]:
    """Loss, gradients, and the operators that the backward pass ran."""
    torch.manual_seed(1)  # drop-path
    images = torch.randn(4, 3, 16, 16)
    visible, predict = torch.arange(64).view(4, 16)[:, :6].flatten(), torch.arange(64).view(4, 16)[:, 9:12].flatten()
    _, predictions = model.forward_pretrain(images, visible, predict, do_prediction=True)
    loss = predictions.square().mean()
    with CountOperators() as counter:
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], counter.counts


@pytest.mark.parametrize(
    "policy", [default_policy(), default_policy(policy={}), default_policy(default=False, policy={})]
)
def test_recomputation_changes_no_bit(policy):
    plain, recomputed = make_model(), make_model()
    recompute_blocks((m for m in recomputed.modules() if isinstance(m, Block)), policy)
    assert recomputed.state_dict().keys() == plain.state_dict().keys()
    loss, grads, _ = forward_backward(plain)
    loss_again, grads_again, _ = forward_backward(recomputed)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_the_policy_decides_by_operator_name_what_runs_again():
    plain, by_default, everything, nothing = (make_model() for _ in range(4))
    for model, policy in (
        (by_default, default_policy()),
        (everything, default_policy(policy={})),
        (nothing, default_policy(default=False, policy={})),
    ):
        recompute_blocks((m for m in model.modules() if isinstance(m, Block)), policy)
    _, _, base = forward_backward(plain)
    _, _, counts = forward_backward(by_default)
    assert counts["aten::mm"] == base["aten::mm"], "matmuls ran again"
    assert counts["aten::gelu"] == 3, "pointwise operators of the three blocks did not run again"
    assert base.get("aten::gelu", 0) == 0
    _, _, counts = forward_backward(everything)
    assert counts["aten::mm"] > base["aten::mm"]
    _, _, counts = forward_backward(nothing)
    assert counts.get("aten::gelu", 0) == 0
    assert counts["aten::mm"] == base["aten::mm"]


def test_disabled_touches_nothing():
    model = make_model()
    recompute_blocks(model.encoder.blocks, default_policy(enabled=False))
    assert "forward" not in vars(model.encoder.blocks[0])


def test_an_unknown_operator_is_named():
    with pytest.raises(UserError, match=r"efficiency\.rematerialization\.policy\.aten::matmull"):
        recompute_blocks([], default_policy(policy={"aten::matmull": True}))


def test_compiling_for_a_cpu_without_a_compiler_is_an_error_with_the_key(monkeypatch):
    options = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation.do_student
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"efficiency\.compilation\.do_student\.disable=true"):
        compile_function(forward_backward, options, "efficiency.compilation.do_student", torch.device("cpu"))
    disabled = dataclasses.replace(options, disable=True)
    assert compile_function(forward_backward, disabled, "", torch.device("cpu")) is forward_backward
