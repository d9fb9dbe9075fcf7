"""speed/: the law of the folder, that a training which asks for nothing fast does not need it, and what blocks do.

Its larger modules have files of their own: test_clustering.py, test_clustering_triton.py, test_compile.py.
"""

import dataclasses
import gc
import sys
import textwrap
import weakref
from types import ModuleType

import pytest
import torch
from commands import make_images, run_forked, tiny
from conftest import ROOT, needs_fp8_on_a_cpu
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from config import DEFAULT_PRETRAIN_CONFIG, RematerializationConfig, load_config
from model import Attention, Block, EncoderDecoder
from speed import offloading
from speed.attention import attend_by_xformers
from speed.fp8 import multiply_in_fp8
from speed.recomputing import recompute_blocks
from train_capi import CapiConfig
from utils import UserError

ALL_OFF = ["capi.clustering_kernel=plain", "efficiency.fsdp=none"]
"""On top of a tiny training, in which compilation and recomputation are off already."""

TRAIN = """
    import sys
    import train_capi

    assert train_capi.main(sys.argv[1:]) == 0
    print(*(name for name in sys.modules if name.split(".")[0] == "speed"), sep=",")
"""


def imported_in_training(tmp_path, *overrides: str) -> list[str]:
    """Modules of the folder that a process has imported after two steps."""
    images = make_images(tmp_path / "images")
    arguments = tiny(images, tmp_path / "run", "optim.total_iters=2", *ALL_OFF, *overrides)
    done = run_forked("-c", textwrap.dedent(TRAIN), *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return [name for name in done.stdout.strip().split(",") if name]


def test_with_everything_off_a_training_imports_nothing_that_only_makes_it_faster(tmp_path):
    assert imported_in_training(tmp_path) == []


def test_what_is_on_is_imported_and_no_more(tmp_path):
    imported = imported_in_training(tmp_path, "efficiency.rematerialization.enabled=true")
    assert imported == ["speed", "speed.recomputing"], "what is imported goes unnoticed"


# --- Recomputation ---------------------------------------------------------------------------------------------------


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
    assert predictions is not None
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


# --- Activations in the host's memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, default_policy(policy={})])
def test_offloading_changes_no_bit_and_holds_nothing_afterwards(policy, monkeypatch):
    """Copies are made on a CPU too, where a training makes none."""
    plain, model = make_model(), make_model()
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    if policy is not None:
        recompute_blocks(blocks, policy)
    moved, empty_like = [], torch.empty_like

    def recorded(x, **kwargs):
        copy = empty_like(x, **kwargs)
        if "pin_memory" in kwargs:
            moved.append((x.untyped_storage().data_ptr(), weakref.ref(copy)))
        return copy

    monkeypatch.setattr(torch, "empty_like", recorded)
    monkeypatch.setattr(offloading, "SMALLEST", 512)
    offloading.offload_blocks(blocks)
    gc.disable()  # a training collects by hand
    try:
        loss, grads, _ = forward_backward(model)
        assert all(copy() is None for _, copy in moved), "a copy outlives the backward pass"
    finally:
        gc.enable()
    assert len(moved) == 3 if policy else len(moved) > 30, "inputs: of two blocks, and what the predictor looks at"
    assert not {p.untyped_storage().data_ptr() for p in model.parameters()} & {place for place, _ in moved}
    expected_loss, expected, _ = forward_backward(plain)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


EAGER = "efficiency.compilation.do_student.disable=true"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], r"compiled code decides itself what it keeps; set efficiency\.compilation\.do_student\.disable=true"),
        ([EAGER], r"stays \(aten::mm, aten::addmm, \.\.\.\); set efficiency\.rematerialization\.enabled=false"),
    ],
)
def test_offloading_is_refused_where_it_would_do_nothing(more, says):
    with pytest.raises(UserError, match=rf"efficiency\.offload_activations=True: .*{says}"):
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["efficiency.offload_activations=true", *more])


@pytest.mark.gpu
def test_offloading_on_a_gpu_changes_no_bit_and_needs_less_memory():
    towers = {"embed_dim": 256, "drop_path_rate": 0.0, "block_kwargs": {"attn_kwargs": {"num_heads": 4}}}
    results, peaks = [], []
    for offloads in (False, True):
        torch.manual_seed(0)
        model = EncoderDecoder(transformers_kwargs=towers, encoder_kwargs={"depth": 12}, decoder_kwargs={"depth": 1})
        model = model.cuda()
        if offloads:
            offloading.offload_blocks(m for m in model.modules() if isinstance(m, Block))
        images = torch.randn(16, 3, 224, 224, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        # Flash attention adds up gradients in whatever order they come.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            with torch.autocast("cuda", torch.bfloat16):
                features = model.forward_pretrain(images)[0]
            features.float().square().sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        results.append([features.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        del model
    different = [i for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)]
    assert not different, f"features (0) or gradients differ: {different} of {len(results[0])}"
    assert peaks[1] < 0.6 * peaks[0]


# --- Attention by xformers, and 8-bit floats -------------------------------------------------------------------------

CPU = torch.device("cpu")


def attention_of(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def pretend_xformers(monkeypatch, attention):
    """A package of that name, with tokens before heads as it has them."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_attention_by_xformers_is_that_of_torch(monkeypatch):
    calls = []

    def by_the_book(q, k, v):
        calls.append((q.shape, k.shape))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(dim=-1), v)

    pretend_xformers(monkeypatch, by_the_book)
    expected = forward_backward(make_model())
    model = make_model()
    attend_by_xformers(attention_of(model), CPU, torch.float32)
    calls.clear()
    actual = forward_backward(model)
    assert [(q[1:], k[1:]) for q, k in calls] == [((10, 2, 16), (10, 2, 16))] * 2 + [((3, 2, 16), (10, 2, 16))]
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-4, atol=1e-6)


def test_xformers_is_refused_where_it_is_missing_or_has_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(
        UserError, match=r"efficiency\.attention=xformers: the package is not installed .*attention=sdpa"
    ):
        attend_by_xformers(attention_of(make_model()), CPU, torch.float32)

    def no_kernel(*_):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs")

    pretend_xformers(monkeypatch, no_kernel)
    with pytest.raises(UserError, match=r"no kernel for torch\.float32 and heads of width 16 on cpu"):
        attend_by_xformers(attention_of(make_model()), CPU, torch.float32)


@pytest.mark.gpu
def test_attention_by_xformers_on_a_gpu_is_that_of_torch():
    pytest.importorskip("xformers.ops")
    towers = {"embed_dim": 128, "drop_path_rate": 0.0, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}}
    torch.manual_seed(0)
    model = EncoderDecoder(transformers_kwargs=towers, encoder_kwargs={"depth": 2}, decoder_kwargs={"depth": 1}).cuda()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    results = []
    for by_xformers in (False, True):
        if by_xformers:
            try:
                attend_by_xformers(attention_of(model), torch.device("cuda"), torch.bfloat16)
            except UserError as error:  # it is installed without kernels
                pytest.skip(str(error))
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            features = model.forward_pretrain(images)[0]
        features.float().square().sum().backward()
        results.append([features.float(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_fp8_on_a_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_fp8_multiplies_each_row_as_precisely_as_any_other(device):
    linear = nn.Linear(64, 96)
    x = torch.randn(2, 37, 64)
    x[0, 3] *= 1e4
    exact = linear(x)
    multiply_in_fp8([linear.to(device)], torch.device(device))
    actual = linear(x.to(device)).cpu()
    errors = (actual - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert actual.shape == exact.shape
    assert actual.dtype == torch.bfloat16
    assert 0.005 < errors.median() < 0.05, "3 bits of mantissa are not 8, nor 1"
    assert errors.max() < 0.08, "a row of large numbers, or one beside it, lost its precision"
    zero = torch.zeros(1, 64, device=device)
    torch.testing.assert_close(linear(zero)[0].float(), linear.bias, atol=2e-3, rtol=8e-3)


def test_fp8_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        UserError, match=r"efficiency\.teacher_fp8=true: .* compute capability 8\.9 on; set it to false"
    ):
        multiply_in_fp8([nn.Linear(16, 16)], torch.device("cuda"))
    with pytest.raises(UserError, match="mps"):
        multiply_in_fp8([nn.Linear(16, 16)], torch.device("mps"))
