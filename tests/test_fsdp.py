"""fsdp.py: the order of the collectives in compiled graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import tiny_model
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fsdp import Sharding, overlap_collectives, overlap_options, parallelize
from model import EncoderDecoder

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
    model = tiny_model()
    for mode in ("simple", "fully_shard", "none"):
        parallelize(model, Sharding(mode, torch.bfloat16, torch.float32, 25, 1), torch.device("cpu"))
    assert type(model) is EncoderDecoder
    assert type(model.mask_token) is torch.nn.Parameter
