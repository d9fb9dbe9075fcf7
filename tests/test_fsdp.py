"""fsdp.py: recomputation by operator name and compilation change nothing but memory and speed."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from config import DEFAULT_PRETRAIN_CONFIG, RematerializationConfig, load_config
from fsdp import Sharding, overlap_collectives, overlap_options, parallelize
from model import Attention, Block, EncoderDecoder
from speed.attention import attend_by_xformers
from speed.compiling import compile_function, kept_compilations
from speed.fp8 import multiply_in_fp8
from speed.recomputing import recompute_blocks
from train_capi import CapiConfig
from utils import UserError

CPU = torch.device("cpu")


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


def test_compiling_for_a_cpu_without_a_compiler_is_an_error_with_the_key(monkeypatch):
    options = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation.do_student
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"efficiency\.compilation\.do_student\.disable=true"):
        compile_function(forward_backward, options, "efficiency.compilation.do_student", torch.device("cpu"))
    disabled = dataclasses.replace(options, disable=True)
    assert compile_function(forward_backward, disabled, "", torch.device("cpu")) is forward_backward


@pytest.mark.parametrize(("device", "wanted"), [("cuda", {"triton.cudagraphs": True}), ("cpu", None)])
def test_cuda_graphs_are_asked_for_where_there_is_cuda(device, wanted, monkeypatch, caplog):
    options = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation.do_student
    asked = []
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("torch.compile", lambda function, **kwargs: asked.append(kwargs) or function)
    caplog.set_level("INFO", "capi")
    compile_function(forward_backward, options, "efficiency.x", torch.device(device), cuda_graphs=True)
    compile_function(forward_backward, options, "efficiency.x", torch.device(device))
    assert [kwargs["options"] for kwargs in asked] == [wanted, None]
    assert ("there are none on cpu; efficiency.x runs without" in caplog.text) == (device == "cpu")


def test_cuda_graphs_and_divided_weights_do_not_go_together(monkeypatch):
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation
    sharding = Sharding("simple", torch.bfloat16, torch.float32, 64, 1)
    monkeypatch.setattr("speed.compiling.is_distributed", lambda: True)
    with pytest.raises(UserError, match=r"cuda_graphs=true: not with weights divided"):
        compile_function(forward_backward, cfg.do_student, "x", torch.device("cuda"), sharding, cuda_graphs=True)


def test_cuda_graphs_need_compiled_functions():
    off = [f"efficiency.compilation.{name}.disable=true" for name in ("do_teacher", "do_student")]
    on = "efficiency.compilation.cuda_graphs=true"
    assert load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [on]).efficiency.compilation.cuda_graphs
    with pytest.raises(UserError, match=r"cuda_graphs=True: only compiled functions become graphs"):
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*off, on])


# Ordering the collectives of a graph

RANKS = 4
C10D = torch.ops._c10d_functional


def gather(own: torch.Tensor) -> torch.Tensor:
    return C10D.wait_tensor(C10D.all_gather_into_tensor(own, RANKS, "0"))


def reduce(grad: torch.Tensor) -> torch.Tensor:
    return C10D.wait_tensor(C10D.reduce_scatter_tensor(grad, "sum", RANKS, "0"))


def traced(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def forward(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    for part in parts:
        x = x @ gather(part).t()
    return x


def backward(x: torch.Tensor, *outputs: torch.Tensor) -> list[torch.Tensor]:
    results = []
    for output in outputs:
        x = x.sin()
        results.append(reduce(output.t() @ x) / RANKS)
    return results


def kinds(graph: fx.GraphModule) -> str:
    """One letter per interesting node: g all-gather, s reduce-scatter, r all-reduce, w wait, m matmul."""
    letters = {
        C10D.all_gather_into_tensor.default: "g",
        C10D.reduce_scatter_tensor.default: "s",
        C10D.all_reduce.default: "r",
        C10D.wait_tensor.default: "w",
        torch.ops.aten.mm.default: "m",
    }
    return "".join(letters.get(node.target, "") for node in graph.graph.nodes)


WEIGHT = 8 * 8 * 4 / 2**20
"""MiB of one gathered weight."""


@pytest.mark.parametrize(
    ("num_weights", "prefetch", "expected"),
    [
        (1, 0, "gwmgwmgwmgwm"),
        (1, 1, "ggwmgwmgwmwm"),
        (1, 2, "gggwmgwmwmwm"),
        (1, 9, "ggggwmwmwmwm"),
        (2, 0, "gwmmgwmm"),
        (2, 1, "ggwmmwmm"),
        (3, 1, "ggwmmmwm"),
        (4, 1, "gwmmmm"),
    ],
)
def test_all_gathers_start_ahead_of_their_use(num_weights, prefetch, expected):
    graph = traced(forward, torch.randn(3, 8), *torch.randn(4, 2, 8))
    assert kinds(graph) == "gwmgwmgwmgwm"
    buckets = overlap_collectives(graph.graph, num_weights * WEIGHT, prefetch)
    assert kinds(graph) == expected
    assert sum(bucket.num_bytes for bucket in buckets) == 4 * 8 * 8 * 4
    assert [bucket.num_tensors for bucket in buckets] == [
        min(num_weights, 4 - done) for done in range(0, 4, num_weights)
    ]


@pytest.mark.parametrize(
    ("num_weights", "prefetch", "expected"),
    [
        (1, 0, "mswmswmswmsw"),
        (1, 1, "msmwsmwsmwsw"),
        (1, 2, "msmsmwsmwsww"),
        (2, 0, "mmswmmsw"),
        (2, 1, "mmsmmwsw"),
        (4, 1, "mmmmsw"),
    ],
)
def test_reduce_scatters_are_waited_for_late(num_weights, prefetch, expected):
    graph = traced(backward, torch.randn(3, 8), *torch.randn(4, 3, 8))
    assert kinds(graph) == "mswmswmswmsw"
    overlap_collectives(graph.graph, num_weights * WEIGHT, prefetch)
    assert kinds(graph) == expected


def test_precisions_have_buckets_of_their_own_and_large_weights_go_alone():
    def mixed(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(parts):
            x = x @ gather(part.bfloat16() if i % 2 else part).to(x.dtype).t()
        return x

    graph = traced(mixed, torch.randn(3, 8), *torch.randn(6, 2, 8))
    buckets = overlap_collectives(graph.graph, 1.5 * WEIGHT, 1)
    assert (
        sorted((str(b.dtype), b.num_tensors) for b in buckets) == [("torch.bfloat16", 3)] + [("torch.float32", 1)] * 3
    )


def test_a_weight_read_twice_is_gathered_once():
    graph = traced(lambda x, part: x @ gather(part).t() @ gather(part), torch.randn(3, 8), torch.randn(2, 8))
    assert kinds(graph) == "gwmgwm"
    assert len(overlap_collectives(graph.graph, 0, 1)) == 1
    assert kinds(graph) == "gwmm"


def test_other_collectives_stay_where_they_are():
    def others(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        sums = C10D.wait_tensor(C10D.all_reduce(x.sum(dim=0), "sum", "0"))
        activations = gather(x @ gather(part).t())  # not a weight: it comes from two inputs
        scattered = reduce(activations[:, :8].t() @ activations)  # not a gradient: a collective depends on it
        return C10D.wait_tensor(C10D.all_reduce(scattered.sum(), "sum", "0")) + sums.sum()

    graph = traced(others, torch.randn(4, 8), torch.randn(2, 8))
    before = kinds(graph)
    assert before == "rwgwmgwmswrw"
    buckets = overlap_collectives(graph.graph, 25, 1)
    assert [bucket.kind for bucket in buckets] == ["all_gather"]
    assert kinds(graph) == "grwwmgwmswrw", "only the weight's all-gather moves, to the front"


def test_the_cache_of_compiled_code_knows_the_settings():
    def key(**changes: Any) -> object:
        values = {"bucket_mib": 25.0, "prefetch": 1, **changes}
        return overlap_options(Sharding("simple", torch.float32, torch.float32, **values))[
            "post_grad_custom_post_pass"
        ].uuid()

    assert key() == key()
    assert len({key(), key(bucket_mib=26.0), key(prefetch=2)}) == 3


def test_without_a_process_group_nothing_is_divided():
    model = make_model()
    for mode in ("simple", "fully_shard", "none"):
        parallelize(model, Sharding(mode, torch.bfloat16, torch.float32, 25, 1), torch.device("cpu"))
    assert type(model) is EncoderDecoder
    assert type(model.mask_token) is torch.nn.Parameter


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def cache_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in CACHES if name in os.environ}


@pytest.fixture
def _no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_caches")
def test_what_is_compiled_goes_to_the_folder_until_the_block_ends(tmp_path):
    with kept_compilations(tmp_path / "cache"):
        folders = cache_variables()
        assert sorted(folders) == sorted(CACHES)
        assert all(tmp_path / "cache" in Path(folder).parents for folder in folders.values())
    assert cache_variables() == {}
    with kept_compilations(tmp_path / "cache"):
        assert cache_variables() == folders, "a later start does not find it"


@pytest.mark.usefixtures("_no_caches")
def test_each_kind_of_processor_has_libraries_of_its_own(tmp_path, monkeypatch):
    with kept_compilations(tmp_path):
        folders = cache_variables()
    monkeypatch.setattr("speed.compiling._processor", lambda: "other")
    with kept_compilations(tmp_path):
        assert not set(cache_variables().values()) & set(folders.values())


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.usefixtures("_no_caches")
def test_the_folder_that_a_user_has_chosen_comes_first(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "/mine")
    with kept_compilations(tmp_path):
        assert os.environ[name] == "/mine"
        assert len(cache_variables()) == 2
    assert cache_variables() == {name: "/mine"}


@pytest.mark.usefixtures("_no_caches")
def test_the_default_that_torch_sets_on_import_is_no_choice_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    with kept_compilations(tmp_path):
        assert tmp_path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert cache_variables() == {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}


@pytest.mark.usefixtures("_no_caches")
def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO")
    with kept_compilations(tmp_path / "file" / "cache"):
        assert cache_variables() == {}
    assert "not kept for later starts" in caplog.text


@pytest.mark.usefixtures("_no_caches")
def test_what_a_run_left_that_was_killed_while_it_compiled_is_compiled_again(tmp_path):
    """What is there in the middle of a compilation is what a kill would leave."""
    folder, killed, library = tmp_path / "cache", tmp_path / "killed", Path("ab") / "abc.main.so"

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        shutil.copytree(folder, killed)
        return graph.forward

    with kept_compilations(folder):
        kind = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).name
        (folder / kind / library).parent.mkdir()
        (folder / kind / library).write_bytes(b"half a library")
        torch.compile(torch.sin, backend=backend)(torch.zeros(2))
    assert (killed / kind / library).exists()
    with kept_compilations(killed):
        assert not (killed / kind / library).exists()
        assert (killed / kind).is_dir()
    with kept_compilations(folder):
        assert (folder / kind / library).exists(), "what a run made that ended later is thrown away"


# 8-bit floats


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
            attend_by_xformers(attention_of(model), torch.device("cuda"), torch.bfloat16)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            features = model.forward_pretrain(images)[0]
        features.float().square().sum().backward()
        results.append([features.float(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_fp8_multiplies_each_row_as_precisely_as_any_other():
    linear = nn.Linear(64, 96)
    x = torch.randn(2, 37, 64)
    x[0, 3] *= 1e4
    exact = linear(x)
    multiply_in_fp8([linear], CPU)
    actual = linear(x)
    errors = (actual - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert actual.shape == exact.shape
    assert actual.dtype == torch.bfloat16
    assert 0.005 < errors.median() < 0.05, "3 bits of mantissa are not 8, nor 1"
    assert errors.max() < 0.08, "a row of large numbers, or one beside it, lost its precision"
    torch.testing.assert_close(linear(torch.zeros(1, 64))[0].float(), linear.bias, atol=2e-3, rtol=8e-3)


def test_fp8_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        UserError, match=r"efficiency\.teacher_fp8=true: .* compute capability 8\.9 on; set it to false"
    ):
        multiply_in_fp8([nn.Linear(16, 16)], torch.device("cuda"))
    with pytest.raises(UserError, match="mps"):
        multiply_in_fp8([nn.Linear(16, 16)], torch.device("mps"))


@pytest.mark.gpu
def test_fp8_on_a_gpu_is_that_of_the_cpu():
    linear = nn.Linear(64, 96)
    x = torch.randn(37, 64)
    multiply_in_fp8([linear], CPU)
    expected = linear(x)
    linear.cuda()
    torch.testing.assert_close(linear(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)
