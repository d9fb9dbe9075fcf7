"""What dividing a model over many GPUs costs per step, worked out on this machine without any.

    python bench/plan.py [preset ...] [config.yaml ...] [a.b=c ...] [--ranks N] [--bandwidth GB/s] [--tflops T]
    python bench/plan.py --scale [a.b=c ...]      ViT-L, H, g and 3B on 8, 64, 128 and 512 H100: one table

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
from results import add_arguments, positive_number, print_table, record, whole_number
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.node import map_arg
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from config import DEFAULT_PRETRAIN_CONFIG, argument, load_config
from flops import device_memory_estimate, training_flops_per_image
from fsdp import Bucket, Sharding, overlap_collectives, parallelize
from model import Block, EncoderDecoder
from speed.recomputing import recompute_blocks
from train_capi import CapiConfig, do_student, do_teacher, mask_plan, optimizer_bytes, step_shape, with_head
from utils import UserError


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


def kept_bytes(forward: fx.GraphModule) -> tuple[int, int]:
    """What the forward pass keeps for the backward pass: gathered weights, and activations. Arguments do not count."""
    results: Any = next(iter(reversed(forward.graph.nodes))).args[0]
    weights, activations = 0, {}
    for node in {n for n in results if isinstance(n, fx.Node)}:
        value = node.meta["val"]
        if _is_gathered(node):
            weights += value.numel() * value.element_size()
        elif isinstance(value, torch.Tensor):
            root = _whole_tensor(node)
            if root.op == "call_function":
                activations[root] = int(root.meta["val"].untyped_storage().nbytes())  # may be symbolic
    return weights, sum(activations.values())


def _is_gathered(node: fx.Node) -> bool:
    while len(node.all_input_nodes) == 1 and node.op == "call_function":
        if node.target is torch.ops._c10d_functional.wait_tensor.default:
            return True
        node = node.all_input_nodes[0]
    return False


def _whole_tensor(node: fx.Node) -> fx.Node:
    """The node whose result a view shows a part of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.all_input_nodes[0]
    return node


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


@dataclass
class Traced:
    """The compiled graphs of one model on some number of ranks, with their collectives ordered."""

    graphs: dict[str, fx.GraphModule]
    before: dict[str, Counter[str]]
    """Operators of each graph before the collectives were ordered."""
    buckets: dict[str, list[Bucket]]
    num_weights: int
    kept: int
    """Bytes of gathered weights that the forward pass keeps for the backward pass."""
    activations: int
    """Bytes of all else that it keeps."""
    seconds: float
    """What tracing took."""


def trace_step(cfg: CapiConfig, ranks: int, sharding: Sharding) -> Traced:
    """Graphs of teacher and student. But for the padding of weights they do not depend on `ranks`."""
    began = time.perf_counter()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make() -> nn.ModuleDict:
        with torch.device("meta"):
            return with_head(EncoderDecoder(**cfg.model.kwargs()), cfg)

    student = make()
    num_weights = sum(p.numel() for p in student.parameters())
    recompute_blocks((m for m in student.modules() if isinstance(m, Block)), cfg.efficiency.rematerialization)
    student = divided(student, sharding, mode)
    teacher = divided(make().requires_grad_(False).eval(), sharding, mode)["backbone"]
    masks, batch = mask_plan(cfg), cfg.optim.batch_size_per_gpu
    with mode:
        images = torch.empty(batch, cfg.model.in_chans, *cfg.data.crop_size)
        visible = torch.empty(batch * masks.num_visible, dtype=torch.int64)
        predict = torch.empty(batch * masks.num_predict, dtype=torch.int64)
        targets = torch.empty(len(predict), cfg.capi.num_clusters)
        drop_path = student["backbone"].draw_drop_path(batch, torch.Generator())
        graphs = {"teacher": trace(do_teacher, teacher, images, sharding.param_dtype)["inference"]}
        temperature, dtype = cfg.capi.student_temp, sharding.param_dtype
        graphs |= trace(do_student, student, images, visible, predict, targets, drop_path, temperature, dtype)
    kept, activations = kept_bytes(graphs["forward"])
    traced = time.perf_counter() - began
    dist.destroy_process_group()
    before = {name: Counter(str(node.target) for node in graph.graph.nodes) for name, graph in graphs.items()}
    buckets = {
        name: overlap_collectives(graph.graph, sharding.bucket_mib, sharding.prefetch) for name, graph in graphs.items()
    }
    return Traced(graphs, before, buckets, num_weights, kept, activations, traced)


@dataclass(frozen=True)
class Cost:
    """What a step costs on one machine."""

    compiled: Played
    seconds: float
    clustering: float
    """Seconds of the head's matmuls; its transfers and Sinkhorn's are `head`."""
    head: float
    transfer: float
    exposed: float
    scores: int
    """Bytes that Sinkhorn reduces."""


def cost(cfg: CapiConfig, machine: Machine, sharding: Sharding, traced: Traced) -> Cost:
    """Play the graphs on a machine, and add the clustering head."""
    compiled = Played()
    for graph in traced.graphs.values():
        play(graph.graph, machine, compiled)
    masks, batch = mask_plan(cfg), cfg.optim.batch_size_per_gpu
    k, width = cfg.capi.num_clusters, cfg.model.transformers_kwargs.embed_dim
    half, reduced = sharding.param_dtype.itemsize, sharding.reduce_dtype.itemsize
    scores = masks.num_patches * k * 4 * (1 + cfg.capi.clustering_kwargs.n_sk_iter)
    head = machine.seconds(k * (width + 1) * half) + machine.seconds(k * (width + 1) * reduced)
    head += 2 * machine.seconds(scores)  # an all-reduce moves everything twice
    clustering = 2 * 2 * batch * masks.num_patches * width * k / (machine.tflops * 1e12)  # logits, gradient of weights
    return Cost(
        compiled=compiled,
        seconds=compiled.seconds + clustering + head,
        clustering=clustering,
        head=head,
        transfer=compiled.transfer + head,
        exposed=compiled.exposed + head,
        scores=scores,
    )


def plan(cfg: CapiConfig, machine: Machine, sharding: Sharding) -> str:
    """A paragraph about one machine."""
    traced = trace_step(cfg, machine.ranks, sharding)
    on = cost(cfg, machine, sharding, traced)
    batch = cfg.optim.batch_size_per_gpu
    lines = [
        f"{machine.ranks} ranks, {machine.tflops:g} TFLOP/s, {machine.bandwidth:g} GB/s, {machine.latency_us:g} us; "
        f"{traced.num_weights / 1e9:.2f} G weights; {batch} images per rank, {batch * machine.ranks} per step; buckets "
        f"of {sharding.bucket_mib:g} MiB, prefetch {sharding.prefetch}   [traced in {traced.seconds:.0f} s]",
        "            all-gathers        reduce-scatters        GB    largest, median bucket (MiB)",
    ]
    for name, found in traced.buckets.items():
        lines.append(_row(name, traced.before[name], found))
    parts = memory_parts(cfg, machine, traced, on.compiled.peak_bytes)
    listed = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in parts.items())
    computing = on.compiled.compute + on.clustering
    lines += [
        f"clustering  1 gather, 1 reduce, Sinkhorn reduces {on.scores / 1e9:.2f} GB: {on.head * 1e3:.1f} ms",
        f"time        {on.seconds * 1e3:.0f} ms per step, {computing * 1e3:.0f} of it computing; "
        f"transfers take {on.transfer * 1e3:.0f} ms, of which {_share(on.exposed, on.transfer)} are not covered "
        f"({_share(on.compiled.exposed, on.compiled.transfer)} in compiled code): {_share(on.exposed, on.seconds)} of "
        "the step",
        f"memory      {sum(parts.values()) / 2**30:.1f} GiB per rank without activations: {listed}",
    ]
    return "\n".join(lines) + "\n"


SCALE_MODELS = ("vitl14", "vith14", "vitg14", "vit3b14")
SCALE_MACHINES = (
    Machine(8, 450, 360),
    Machine(64, 450, 320, 90),
    Machine(128, 450, 320, 150),
    Machine(512, 450, 320, 500),
)
PEAK_TFLOPS = 989.0
MEMORY_GIB = 74.0
"""Of an H100 with 80 GB, without what CUDA, NCCL and fragmentation take."""
SCALE_NOTE = f"""\
Predicted, not measured. Assumed: matmuls, convolutions and attention at 450 TFLOP/s (45 % of the dense bfloat16 peak,
{PEAK_TFLOPS:g}), all else in no time; collectives at 360 GB/s per GPU within a node and 320 across (80 % of the link),
plus a fixed 30, 90, 150, 500 us each on 8, 64, 128, 512 GPUs (a ring grows with its members); no other waiting. Memory:
weights, gradients, AdamW and average over the ranks, activations that the compiled forward pass keeps, gathered
weights, buckets, and the clustering head whole; 512 images per GPU, or the most, by 32, within {MEMORY_GIB:g} GiB.
"""


def scale(sources: list[str], args: argparse.Namespace) -> None:
    """Print and record a table of models and numbers of GPUs. Each model is traced once, as on 8 ranks."""
    sys.stdout.write(SCALE_NOTE)
    rows: list[dict[str, str | int | float]] = []
    for model in SCALE_MODELS:
        path = str(Path(__file__).parent.parent / "configs" / f"{model}.yaml")
        cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [path, *sources])
        sharding = sharding_of(cfg)
        traced = trace_step(cfg, 8, sharding)
        model_rows = [scale_row(model, cfg, machine, sharding, traced) for machine in SCALE_MACHINES]
        print_table(model_rows)
        rows += model_rows
    settings = {"assumed TFLOP/s": 450, "assumed GB/s": "360 in a node, 320 across", "overrides": " ".join(sources)}
    record(args, "scale, predicted", settings, rows, torch.device("cpu"))


def scale_row(
    model: str, cfg: CapiConfig, machine: Machine, sharding: Sharding, traced: Traced
) -> dict[str, str | int | float]:
    """One model on one machine, at the largest batch that fits, up to the config's."""
    full = cfg.optim.batch_size_per_gpu

    def memory_gib(batch: int) -> float:
        share = batch / full
        shape = step_shape(cfg)
        head = device_memory_estimate(shape, batch_size=batch, param_bytes=2, recompute=True, world_size=machine.ranks)
        # The student's activations and the teacher's are not alive together.
        alive = max(share * traced.activations + traced.kept, head["clustering"] * 2**30)
        return (sum(memory_parts(cfg, machine, traced, peak).values()) - traced.kept + alive) / 2**30

    peak = cost(cfg, machine, sharding, traced).compiled.peak_bytes
    batch = next((b for b in range(full, 0, -32) if memory_gib(b) <= MEMORY_GIB), 0)
    if batch == 0:
        raise UserError(f"{model} on {machine.ranks} GPUs: not even 32 images fit")
    # The traced graphs compute on `full` images: fewer take proportionally less.
    same_graphs = replace(machine, tflops=machine.tflops * full / batch)
    on = cost(cfg, same_graphs, sharding, traced)
    images_per_s = batch * machine.ranks / on.seconds
    flops = training_flops_per_image(step_shape(cfg))
    return {
        "model": model,
        "weights G": traced.num_weights / 1e9,
        "GPUs": machine.ranks,
        "images per GPU": batch,
        "ms per step": on.seconds * 1e3,
        "images/s": images_per_s,
        "MFU": images_per_s * flops / machine.ranks / (PEAK_TFLOPS * 1e12),
        "not covered": on.exposed / on.seconds,
        "memory GiB": memory_gib(batch),
        "of it activations": batch / full * traced.activations / 2**30,
    }


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


def memory_parts(cfg: CapiConfig, machine: Machine, traced: Traced, peak: int) -> dict[str, float]:
    """Bytes on one rank, without activations; `peak` is that of the buckets."""
    head = cfg.capi.num_clusters * (cfg.model.transformers_kwargs.embed_dim + 1)
    shares = {
        "weights": 4 * (traced.num_weights + head),
        "gradients": 4 * (traced.num_weights + head),
        "AdamW": optimizer_bytes(cfg),
        "average": 4 * traced.num_weights,
    }
    parts = {name: size / machine.ranks for name, size in shares.items()}
    return parts | {
        "gathered weights kept for the backward pass": traced.kept,
        "buckets": peak,
        "clustering head, whole": 8 * head,
    }


def sharding_of(cfg: CapiConfig) -> Sharding:
    """As in a training with efficiency.fsdp=simple."""
    efficiency = cfg.efficiency
    return Sharding(
        "simple",
        getattr(torch, efficiency.param_dtype),
        getattr(torch, efficiency.reduce_dtype),
        efficiency.fsdp_bucket_mib,
        efficiency.fsdp_prefetch,
    )


def main() -> None:
    """Print one paragraph per machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="preset | config.yaml | a.b=c")
    parser.add_argument("--ranks", type=whole_number, help="instead of the preset's; 128 without a preset")
    parser.add_argument("--bandwidth", type=positive_number, help="GB/s of collectives, per GPU")
    parser.add_argument("--tflops", type=positive_number, help="10^12 FLOP per second that a GPU reaches")
    parser.add_argument("--latency-us", type=argument(float, at_least=0), help="fixed cost of a collective")
    parser.add_argument("--scale", action="store_true", help="a table of models on 8 to 512 H100 instead")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    if args.scale:
        logging.getLogger("torch").setLevel(logging.ERROR)
        scale(args.sources, args)
        return
    names = [name for name in args.sources if name in PRESETS]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [s for s in args.sources if s not in PRESETS])
    asked = {key: getattr(args, key) for key in ("ranks", "bandwidth", "tflops", "latency_us")}
    asked = {key: value for key, value in asked.items() if value is not None}
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name in names or (["a100x128"] if asked else PRESETS):
        sys.stdout.write(
            f"{name}{' changed' if asked else ''}: {plan(cfg, replace(PRESETS[name], **asked), sharding_of(cfg))}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
