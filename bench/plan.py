"""What dividing a model over many GPUs costs per step, worked out on this machine without any.

    python bench/plan.py [preset ...] [config.yaml ...] [a.b=c ...] [--ranks N] [--bandwidth GB/s] [--tflops T]

Presets: a100x128, h100x1, h100x8, h100x64; all four if none is named. The default config is ViT-L/14; see also
configs/vit3b14.yaml.

A process group of N ranks that sends nothing, and tensors that have shapes but no storage, stand in for the machine.
Dynamo and AOTAutograd trace teacher and student as in training, with the recomputation that the config asks for, and
`fsdp.overlap_collectives` orders the graphs as in a compiled training; inductor itself does not run. Then each graph is
played through on two queues. Matmuls, convolutions and attention take FLOP / rate; all else takes no time, so there is
less to hide behind than in reality. Collectives take latency + bytes x (N - 1) / N / bandwidth, one after the other.
The clustering head is not compiled: its gathering, its gradient and Sinkhorn's reductions count as not covered.
Optimizers, data and metrics count as nothing. Rates and bandwidths of the presets are assumptions: 55 % (A100) and
45 % (H100) of the dense bfloat16 peak, and 80 % of the slowest link: 8 x 200 Gbit/s (A100) or 8 x 400 Gbit/s (H100) per
node, or NVLink within one.

Tracing takes one to five minutes per machine and model.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.node import map_arg
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from clustering import L2NormLinear
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from fsdp import Bucket, Sharding, overlap_collectives, parallelize, recompute_blocks
from model import Block, EncoderDecoder
from train_capi import do_student, do_teacher, mask_plan


@dataclass(frozen=True)
class Machine:
    """A cluster, as far as this script knows it."""

    ranks: int
    tflops: float
    """FLOP rate of one GPU that matmuls are assumed to reach, in 10^12 per second."""
    bandwidth: float
    """Of collectives ("bus bandwidth"), GB/s per GPU."""
    latency_us: float = 30.0
    """Fixed cost of a collective."""

    def seconds(self, num_bytes: int) -> float:
        """Time of an all-gather or reduce-scatter of whole tensors of this size."""
        if self.ranks == 1:
            return 0.0
        return self.latency_us * 1e-6 + num_bytes * (self.ranks - 1) / self.ranks / (self.bandwidth * 1e9)


PRESETS = {
    "a100x128": Machine(128, 170, 160),
    "h100x1": Machine(1, 450, 360),
    "h100x8": Machine(8, 450, 360),
    "h100x64": Machine(64, 450, 320),
}


class _Traced(Exception):  # noqa: N818  # not an error: the trace is complete
    pass


def trace(function: Callable[..., Any], *args: Any) -> dict[str, fx.GraphModule]:
    """Graphs of a function of fake tensors: forward and backward, or inference."""
    graphs: dict[str, fx.GraphModule] = {}

    def compiler(graph: fx.GraphModule, _inputs: Any) -> Any:
        graphs.setdefault("inference", graph)

        def stop(_arguments: Any) -> Any:
            raise _Traced

        stop._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  # what AOTAutograd looks for
        return stop

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        graphs["forward"], graphs["backward"] = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        graphs["inference"] = graphs["forward"]
        return graphs["forward"], graphs["backward"]

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler, partition_fn=partition
    )
    torch._dynamo.reset()
    with contextlib.suppress(_Traced):
        torch.compile(function, backend=backend, dynamic=False)(*args)
    if "backward" in graphs:
        del graphs["inference"]
    return graphs


def num_flops(node: fx.Node) -> int:
    """Of a matmul, convolution or attention; 0 for anything else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    name, count = target._schema.name, flop_registry.get(target.overloadpacket)
    if "flash_attention_for_cpu" in name:  # the registry knows those of GPUs
        shapes = [value.meta["val"].shape for value in node.args if isinstance(value, fx.Node)]
        return sdpa_backward_flop_count(*shapes[:4]) if "backward" in name else sdpa_flop_count(*shapes[:3])
    if count is None:
        return 0
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return count(*args, **kwargs, out_val=node.meta["val"])


@dataclass
class Played:
    """What one or more graphs cost."""

    seconds: float = 0.0
    compute: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    peak_bytes: int = 0
    """Most bytes of collectives on their way, or gathered and not yet used up."""


def play(graph: fx.Graph, machine: Machine, total: Played) -> None:
    """Run a graph on a compute queue and a transfer queue; add to `total`."""
    operators = torch.ops._c10d_functional
    starts = {operators.all_gather_into_tensor.default, operators.reduce_scatter_tensor.default}
    place = {node: i for i, node in enumerate(graph.nodes)}
    now = free = 0.0
    done: dict[fx.Node, float] = {}
    alive: Counter[int] = Counter()
    for node in graph.nodes:
        if node.target in starts:
            gathers = node.target is operators.all_gather_into_tensor.default
            whole = (node if gathers else node.all_input_nodes[0]).meta["val"]
            size = whole.numel() * whole.element_size()
            seconds = machine.seconds(size)
            free = max(free, now) + seconds
            done[node] = free
            total.transfer += seconds
            alive[place[node]] += size
            alive[_last_read(node, place) + 1] -= size
        elif node.target is operators.wait_tensor.default and node.args[0] in done:
            late = max(0.0, done[node.args[0]] - now)
            total.exposed += late
            now += late
        elif node.op == "call_function":
            seconds = num_flops(node) / (machine.tflops * 1e12)
            now += seconds
            total.compute += seconds
    total.seconds += now
    held = 0
    for _, change in sorted(alive.items()):
        held += change
        total.peak_bytes = max(total.peak_bytes, held)


def _last_read(started: fx.Node, place: dict[fx.Node, int]) -> int:
    """When the buffer of a collective is free: after the last node that reads it or a view of it."""
    last, stack = place[started], [started]
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                continue  # kept for the backward pass: counted as such
            last = max(last, place[user])
            is_wait = user.target is torch.ops._c10d_functional.wait_tensor.default
            if is_wait or (isinstance(user.target, torch._ops.OpOverload) and user.target.is_view):
                stack.append(user)
    return last


def kept_bytes(forward: fx.GraphModule) -> int:
    """Gathered weights that the forward pass keeps for the backward pass."""
    kept = 0
    results: Any = next(iter(reversed(forward.graph.nodes))).args[0]
    for node in {n for n in results if isinstance(n, fx.Node)}:
        root = node
        while len(root.all_input_nodes) == 1 and root.op == "call_function":
            if root.target is torch.ops._c10d_functional.wait_tensor.default:
                kept += node.meta["val"].numel() * node.meta["val"].element_size()
                break
            root = root.all_input_nodes[0]
    return kept


def divided(module: nn.Module, sharding: Sharding, mode: FakeTensorMode) -> Any:
    """Divide a module of the meta device; its parts become tensors without storage that claim to be on the CPU."""
    parallelize(module, sharding, torch.device("meta"))
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if isinstance(parameter, DTensor):
                shape = parameter._local_tensor.shape
                with mode:
                    stored = DTensor.from_local(
                        torch.empty(shape),
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
                    submodule._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)
    return module


def plan(cfg: CapiConfig, machine: Machine, sharding: Sharding) -> str:
    """A paragraph about one machine."""
    began = time.perf_counter()
    dist.init_process_group("fake", rank=0, world_size=machine.ranks, store=FakeStore())
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make() -> nn.ModuleDict:
        with torch.device("meta"):
            backbone = EncoderDecoder(**cfg.model.kwargs())
            return nn.ModuleDict({"backbone": backbone, "head": L2NormLinear(backbone.pred_dim, cfg.capi.num_clusters)})

    student = make()
    num_weights = sum(p.numel() for p in student.parameters())
    recompute_blocks((m for m in student.modules() if isinstance(m, Block)), cfg.efficiency.rematerialization)
    student = divided(student, sharding, mode)
    teacher = divided(make().requires_grad_(False).eval(), sharding, mode)["backbone"]
    masks, batch, size = mask_plan(cfg), cfg.optim.batch_size_per_gpu, cfg.data.images_size
    with mode:
        images = torch.empty(batch, cfg.model.in_chans, size, size)
        visible = torch.empty(batch * masks.num_visible, dtype=torch.int64)
        predict = torch.empty(batch * masks.num_predict, dtype=torch.int64)
        targets = torch.empty(len(predict), cfg.capi.num_clusters)
        graphs = {"teacher": trace(do_teacher, teacher, images, sharding.param_dtype)["inference"]}
        graphs |= trace(
            do_student, student, images, visible, predict, targets, cfg.capi.student_temp, sharding.param_dtype
        )
    kept = kept_bytes(graphs["forward"])
    traced = time.perf_counter() - began
    dist.destroy_process_group()

    before = {name: Counter(str(node.target) for node in graph.graph.nodes) for name, graph in graphs.items()}
    buckets = {
        name: overlap_collectives(graph.graph, sharding.bucket_mib, sharding.prefetch) for name, graph in graphs.items()
    }
    compiled = Played()
    for graph in graphs.values():
        play(graph.graph, machine, compiled)
    lines = [
        f"{machine.ranks} ranks, {machine.tflops:g} TFLOP/s, {machine.bandwidth:g} GB/s, {machine.latency_us:g} us; "
        f"{num_weights / 1e9:.2f} G weights; {batch} images per rank, {batch * machine.ranks} per step; buckets of "
        f"{sharding.bucket_mib:g} MiB, prefetch {sharding.prefetch}   [traced in {traced:.0f} s]",
        "            all-gathers        reduce-scatters        GB    largest, median bucket (MiB)",
    ]
    for name, found in buckets.items():
        lines.append(_row(name, before[name], found))

    k, width = cfg.capi.num_clusters, cfg.model.transformers_kwargs.embed_dim
    half, reduced = sharding.param_dtype.itemsize, sharding.reduce_dtype.itemsize
    scores = masks.num_patches * k * 4 * (1 + cfg.capi.clustering_kwargs.n_sk_iter)
    head = machine.seconds(k * (width + 1) * half) + machine.seconds(k * (width + 1) * reduced)
    sinkhorn = 2 * machine.seconds(scores)  # an all-reduce moves everything twice
    clustering = 2 * 2 * batch * masks.num_patches * width * k / (machine.tflops * 1e12)  # logits, gradient of weights
    exposed, transfer = compiled.exposed + head + sinkhorn, compiled.transfer + head + sinkhorn
    seconds = compiled.seconds + clustering + head + sinkhorn
    lines += [
        f"clustering  1 gather, 1 reduce, Sinkhorn reduces {scores / 1e9:.2f} GB: {(head + sinkhorn) * 1e3:.1f} ms",
        f"time        {seconds * 1e3:.0f} ms per step, {(compiled.compute + clustering) * 1e3:.0f} of it computing; "
        f"transfers take {transfer * 1e3:.0f} ms, of which {_share(exposed, transfer)} are not covered "
        f"({_share(compiled.exposed, compiled.transfer)} in compiled code): {_share(exposed, seconds)} of the step",
        _memory(cfg, machine, num_weights, kept, compiled.peak_bytes),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, before: Counter[str], found: list[Bucket]) -> str:
    cells = []
    for kind in ("all_gather", "reduce_scatter"):
        number = sum(count for target, count in before.items() if kind in target)
        cells.append(f"{number} -> {sum(bucket.kind == kind for bucket in found)}")
    sizes = sorted(bucket.num_bytes / 2**20 for bucket in found) or [0.0]
    total = sum(bucket.num_bytes for bucket in found) / 1e9
    return f"{name:<11} {cells[0]:<18} {cells[1]:<18} {total:>8.2f}    {sizes[-1]:.1f}, {sizes[len(sizes) // 2]:.1f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _memory(cfg: CapiConfig, machine: Machine, num_weights: int, kept: int, peak: int) -> str:
    head = cfg.capi.num_clusters * (cfg.model.transformers_kwargs.embed_dim + 1)
    shares = {
        "weights": 4 * (num_weights + head),
        "gradients": 4 * (num_weights + head),
        "AdamW": 8 * (num_weights + head),
        "average": 4 * num_weights,
    }
    parts = {name: size / machine.ranks for name, size in shares.items()}
    parts |= {"gathered weights kept for the backward pass": kept, "buckets": peak, "clustering head, whole": 8 * head}
    listed = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in parts.items())
    return f"memory      {sum(parts.values()) / 2**30:.1f} GiB per rank without activations: {listed}"


def main() -> None:
    """Print one paragraph per machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="preset | config.yaml | a.b=c")
    parser.add_argument("--ranks", type=int, help="instead of the preset's; 128 without a preset")
    parser.add_argument("--bandwidth", type=float, help="GB/s of collectives, per GPU")
    parser.add_argument("--tflops", type=float, help="10^12 FLOP per second that a GPU reaches")
    parser.add_argument("--latency-us", type=float, help="fixed cost of a collective")
    args = parser.parse_intermixed_args()
    names = [name for name in args.sources if name in PRESETS]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [s for s in args.sources if s not in PRESETS])
    asked = {key: getattr(args, key) for key in ("ranks", "bandwidth", "tflops", "latency_us")}
    asked = {key: value for key, value in asked.items() if value is not None}
    efficiency = cfg.efficiency
    sharding = Sharding(
        "simple",
        getattr(torch, efficiency.param_dtype),
        getattr(torch, efficiency.reduce_dtype),
        efficiency.fsdp_bucket_mib,
        efficiency.fsdp_prefetch,
    )
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name in names or (["a100x128"] if asked else PRESETS):
        sys.stdout.write(
            f"{name}{' changed' if asked else ''}: {plan(cfg, replace(PRESETS[name], **asked), sharding)}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
