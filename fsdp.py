"""How a model is divided over ranks, from outside: models know nothing of it.

`parallelize` makes every rank hold 1/n of each weight, its gradient, its optimizer state and its average. Three ways:

- `simple`, ours, after SimpleFSDP (arXiv:2411.00284). A weight is stored as a `DTensor` split along its first axis;
  reading `layer.weight` in a forward pass casts the own part to `param_dtype` and gathers the others' (all-gather), and
  its gradient comes back in `reduce_dtype`, averaged over ranks and cut to the own part (reduce-scatter). Nothing else
  changes: names, state dicts, optimizers and code that acts on parameters one by one see parameters as before.
  Eagerly, every read gathers and the gathered weight lives until the backward pass is done with it. If a
  rematerialisation policy recomputes `_c10d_functional::all_gather_into_tensor` and `_c10d_functional::wait_tensor`,
  blocks free it after the forward pass and gather again: fully sharded instead of gradient-sharded.
  Compiled (`speed.compiling.compile_function`), `overlap_collectives` groups and orders the collectives so that they
  run beside the computation.
- `fully_shard`, torch's FSDP2: a cross-check and a way out.
- `none`: whole weights everywhere; `average_gradients_` after the backward pass.

With gradient accumulation, `simple` and `fully_shard` gather weights and reduce gradients in every accumulation step,
so that no rank ever holds whole gradients: n steps communicate n times as much as one step on an n times larger batch.
`none` communicates once per update.

A module may have two class attributes that are read here: `kept_in_float32`, the names of parameters and submodules
whose weights it computes with in float32 whatever `param_dtype` is; and `forward_methods`, the names of methods that
are called instead of its `forward`.
"""

import functools
import heapq
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from distributed import is_distributed, world_size

logger = logging.getLogger("capi")


@dataclass(frozen=True)
class Sharding:
    """How weights are divided over ranks, in which precision they travel, and how compiled code orders transfers."""

    mode: str
    """simple, fully_shard or none."""
    param_dtype: torch.dtype
    """Precision in which weights are gathered and used. The own part, gradients and optimizer state stay float32."""
    reduce_dtype: torch.dtype
    """Precision in which gradients are summed over ranks."""
    bucket_mib: float
    """Compiled code: gathered weights, or unreduced gradients, per collective; larger tensors go alone."""
    prefetch: int
    """Compiled code: buckets that are gathered ahead of the one in use, and reduced behind it."""


def overlap_options(sharding: Sharding) -> dict[str, Any]:
    """Options of `torch.compile` that order collectives as `overlap_collectives` does, and keep them so."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class OverlapCollectives(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            overlap_collectives(graph, sharding.bucket_mib, sharding.prefetch)
            pin_order(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,), f"{sharding.bucket_mib} {sharding.prefetch}")

    return {"post_grad_custom_post_pass": OverlapCollectives(), "reorder_for_peak_memory": False}


# Dividing a module over ranks.


def parallelize(
    module: nn.Module, sharding: Sharding, device: torch.device, blocks: Iterable[nn.Module] = (), group: Any = None
) -> None:
    """Give every rank the weights of rank 0 and divide them as `sharding` says, in place. State-dict keys stay.

    Without a process group there is nothing to divide, and nothing happens.

    Args:
        module: its weights are on `device` on rank 0; on the other ranks they may be on the meta device. With `simple`
            only one gathered parameter at a time is added to what is there; the other two modes need all on every rank.
            A `device` of type meta divides shapes only.
        sharding: mode and precisions.
        device: where the weights go.
        blocks: submodules whose weights `fully_shard` gathers together. `simple` and `none` need no hint.
        group: process group; None is all ranks.
    """
    if not is_distributed():
        return
    group = dist.group.WORLD if group is None else group
    if sharding.mode == "simple":
        _shard(module, sharding, device, group)
    else:
        _same_weights(module, device, group)
        if sharding.mode == "fully_shard":
            _fully_shard(module, sharding, device, list(blocks), group)
    _same_buffers(module, device, group)


@dataclass(frozen=True)
class _Gathering:
    """How one parameter travels. Plain values: compiled code has them as constants."""

    group_name: str
    world_size: int
    rows: int | None
    """Length of the first axis over all ranks; None for a scalar, of which every rank has a copy."""
    dtype: torch.dtype
    reduce_dtype: torch.dtype

    @property
    def rows_per_rank(self) -> int:
        """Rows that travel per rank: the last ranks' parts are padded to it, down to empty ones."""
        assert self.rows is not None
        return -(-self.rows // self.world_size)


def _shard(module: nn.Module, sharding: Sharding, device: torch.device, group: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu" if device.type == "meta" else device.type)
    kept_in_float32 = _kept_in_float32(module)
    divided: dict[nn.Parameter, tuple[nn.Parameter, _Gathering]] = {}  # a tied parameter stays one
    for submodule in module.modules():
        gatherings = {}
        for name, parameter in list(submodule._parameters.items()):
            if parameter is None:
                continue
            if parameter not in divided:
                dtype = torch.float32 if parameter in kept_in_float32 else sharding.param_dtype
                rows = parameter.shape[0] if parameter.ndim else None
                gathering = _Gathering(group.group_name, group.size(), rows, dtype, sharding.reduce_dtype)
                divided[parameter] = _shard_parameter(parameter, mesh, device, group), gathering
            submodule._parameters[name], gatherings[name] = divided[parameter]
        if gatherings:
            submodule.__class__ = _reading_gathers(type(submodule), tuple(gatherings.items()))


def _kept_in_float32(module: nn.Module) -> set[nn.Parameter]:
    kept: set[nn.Parameter] = set()
    for submodule in module.modules():
        for name in getattr(submodule, "kept_in_float32", ()):
            part = getattr(submodule, name)
            kept |= {part} if isinstance(part, nn.Parameter) else set(part.parameters())
    return kept


def _shard_parameter(parameter: nn.Parameter, mesh: Any, device: torch.device, group: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    full = _from_rank_0(parameter, device, group)
    if parameter.ndim == 0:
        own, placement = full, Replicate()
    else:
        rows, per_rank = full.shape[0], -(-full.shape[0] // group.size())
        start = min(group.rank() * per_rank, rows)
        own, placement = full[start : min(start + per_rank, rows)].clone(), Shard(0)
    stored = DTensor.from_local(own, mesh, [placement], run_check=False, shape=full.shape, stride=full.stride())
    return nn.Parameter(stored, requires_grad=parameter.requires_grad)


@torch.no_grad()
def _from_rank_0(tensor: Tensor, device: torch.device, group: Any) -> Tensor:
    """Rank 0's tensor, whole, on every rank."""
    if tensor.is_meta or device.type == "meta":
        assert device.type == "meta" or group.rank() > 0, "rank 0 has to have the weights"
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        full = tensor.detach().to(device).contiguous()
    if device.type != "meta":
        dist.broadcast(full, group=group, group_src=0)
    return full


@torch.no_grad()
def divide_like(parameter: Tensor, full: Tensor | None) -> Tensor:
    """What this rank holds of a tensor of rank 0, divided as a parameter of the same shape is; every rank calls it.

    Args:
        parameter: of a module that `parallelize` has seen, in any mode.
        full: the tensor on rank 0, which may be returned; None on the others.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if full is None:
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    full = full.to(parameter.device, parameter.dtype).contiguous()
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    if is_distributed():
        dist.broadcast(full, src=0)
    return full


def joined_along(own: Tensor, axis: int) -> Tensor:
    """One tensor of all ranks, of which each holds an equal part along an axis; alone, that part itself.

    It stays where it is. A checkpoint of it is read on any number of ranks.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    if not is_distributed():
        return own
    group: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(group, own.device.type)
    return DTensor.from_local(own, mesh, [Shard(axis)], run_check=False)


def _same_weights(module: nn.Module, device: torch.device, group: Any) -> None:
    for submodule in module.modules():
        for name, parameter in list(submodule._parameters.items()):
            if parameter is not None:
                full = _from_rank_0(parameter, device, group)
                submodule._parameters[name] = nn.Parameter(full, requires_grad=parameter.requires_grad)


def _same_buffers(module: nn.Module, device: torch.device, group: Any) -> None:
    for submodule in module.modules():
        for name, buffer in list(submodule._buffers.items()):
            if buffer is not None:
                submodule._buffers[name] = _from_rank_0(buffer, device, group)


@functools.cache
def _reading_gathers(base: type[nn.Module], gatherings: tuple[tuple[str, _Gathering], ...]) -> type[nn.Module]:
    """A subclass of `base` with one property per parameter. Modules of the same shapes share it.

    A property comes before `nn.Module.__getattr__`, while registration, state dicts and optimizers go to `_parameters`.
    """
    properties = {
        name: property(functools.partial(_read, name=name, gathering=gathering)) for name, gathering in gatherings
    }
    return type(base.__name__, (base,), {**properties, "_gatherings": dict(gatherings), "__module__": base.__module__})


def _read(module: nn.Module, name: str, gathering: _Gathering) -> Tensor | None:
    from torch.distributed.tensor import DTensor

    parameter = module._parameters[name]
    if not isinstance(parameter, DTensor):  # functional_call has put a whole tensor there
        return parameter
    own = parameter.to_local()
    # Another precision here: functional_call with a weight that was cast before it is gathered.
    return _Gather.apply(own, gathering, gathering.dtype if own.dtype == torch.float32 else own.dtype)


class _Gather(torch.autograd.Function):
    """Own part of a weight to whole weight; gradient of the whole weight to the own part of its average over ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, gathering: _Gathering, dtype: torch.dtype) -> Tensor:
        ctx.gathering, ctx.own_rows, ctx.own_dtype = gathering, own.shape[0] if own.ndim else None, own.dtype
        return _all_gather(own.to(dtype), gathering)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _average(grad, ctx.gathering, ctx.own_rows, ctx.own_dtype), None, None


def _all_gather(own: Tensor, gathering: _Gathering) -> Tensor:
    if gathering.rows is None:
        return own.clone()
    padded = _pad_rows(own, gathering.rows_per_rank)
    collectives = torch.ops._c10d_functional
    full = collectives.wait_tensor(
        collectives.all_gather_into_tensor(padded, gathering.world_size, gathering.group_name)
    )
    return full if len(full) == gathering.rows else full[: gathering.rows]


def _average(grad: Tensor, gathering: _Gathering, own_rows: int | None, dtype: torch.dtype) -> Tensor:
    """Average over ranks of a whole gradient, cut to the own rows."""
    collectives = torch.ops._c10d_functional
    grad = grad.to(gathering.reduce_dtype)
    # A sum in float16 would overflow where the average does not; in other types dividing the small result is cheaper.
    early = gathering.reduce_dtype == torch.float16
    if early:
        grad = grad / gathering.world_size
    if gathering.rows is None:
        own = collectives.wait_tensor(collectives.all_reduce(grad.contiguous(), "sum", gathering.group_name))
    else:
        padded = _pad_rows(grad, gathering.rows_per_rank * gathering.world_size).contiguous()
        started = collectives.reduce_scatter_tensor(padded, "sum", gathering.world_size, gathering.group_name)
        own = collectives.wait_tensor(started)
    own = (own if early else own / gathering.world_size).to(dtype)
    # Cut last: arithmetic on no rows would give strides of its own, which torch 2.11 takes for another layout of the
    # whole gradient, so that the ranks without rows, and no others, would wait for each other in a collective.
    return own if own_rows is None or len(own) == own_rows else own[:own_rows]


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, [0, 0] * (x.ndim - 1) + [0, rows - len(x)])


def _fully_shard(
    module: nn.Module, sharding: Sharding, device: torch.device, blocks: Sequence[nn.Module], group: Any
) -> None:
    """FSDP2 on every block, then on the outermost modules that have weights of their own.

    A module that keeps all of its own weights in float32 becomes a group of its own. What is kept beside other weights,
    or in a submodule (norms, whose weights the block around them reads), is rounded to `param_dtype` here.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    def precision(dtype: torch.dtype) -> Any:
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False)

    # FSDP2's hook on a result that is a view would be lost if that were changed in place. Nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    # Weights that stay gathered after a forward pass would be what the optimizer and the average see.
    options = {"mesh": DeviceMesh.from_group(group, device.type), "reshard_after_forward": True}
    for submodule in module.modules():
        own = {name for name, _ in submodule.named_parameters(recurse=False)}
        kept = own and own <= set(getattr(submodule, "kept_in_float32", ()))
        if kept and sharding.param_dtype != torch.float32:
            fully_shard(submodule, **options, mp_policy=precision(torch.float32))
    for submodule in [*blocks, *_outermost_with_weights(module)]:
        if not isinstance(submodule, FSDPModule):
            fully_shard(submodule, **options, mp_policy=precision(sharding.param_dtype))
        for method in getattr(submodule, "forward_methods", ()):
            register_fsdp_forward_method(submodule, method)


def _outermost_with_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters of their own, or with methods that read those of their children."""
    if hasattr(module, "forward_methods") or any(True for _ in module.parameters(recurse=False)):
        yield module
    else:
        for child in module.children():
            yield from _outermost_with_weights(child)


@torch.no_grad()
def average_gradients_(module: nn.Module, sharding: Sharding, group: Any = None) -> None:
    """Average whole gradients over ranks, in buckets; for `none`. The other modes have averaged them already."""
    if sharding.mode != "none" or not is_distributed():
        return
    size = world_size() if group is None else group.size()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    limit = max(1, int(sharding.bucket_mib * 2**20))
    running = []
    for bucket in _split_by_size(grads, [g.numel() * sharding.reduce_dtype.itemsize for g in grads], limit):
        flat = torch.cat([grad.to(sharding.reduce_dtype).flatten() for grad in bucket]) / size
        running.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in running:
        work.wait()
        for grad, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


ItemT = TypeVar("ItemT")


def _split_by_size(items: Sequence[ItemT], sizes: Sequence[int], limit: int) -> list[list[ItemT]]:
    """Consecutive groups of at most `limit`; an item larger than that is alone."""
    groups: list[list[ItemT]] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


# Ordering the collectives of compiled code.


@dataclass(frozen=True)
class Bucket:
    """One collective that `overlap_collectives` left in a graph."""

    kind: str
    """all_gather or reduce_scatter."""
    dtype: torch.dtype
    num_tensors: int
    num_bytes: int
    """Size of the whole tensors: what an all-gather gives and a reduce-scatter takes."""


def overlap_collectives(graph: fx.Graph, bucket_mib: float, prefetch: int) -> list[Bucket]:
    """Group all-gathers of weights and reduce-scatters of gradients in a graph, and hide them behind computation.

    All-gathers of one precision are grouped in the order of first use into buckets of at most `bucket_mib` (a larger
    tensor is a bucket by itself). A bucket's all-gather starts just before the `prefetch`-th bucket before it is waited
    for, and is waited for just before its first use. Reduce-scatters are grouped in the order in which gradients become
    ready; each bucket starts with its last gradient, and is waited for when the `prefetch`-th bucket after it starts
    (at the end of the graph, for the last ones). With `prefetch` = 0 nothing overlaps.

    What it costs in memory: `prefetch` + 1 buckets of gathered weights on their way, and one more while a bucket is
    copied into its tensors; the same for gradients; and what ordering all else for the lowest peak would save, for
    that reordering (an option of inductor) has to be off. What is kept for the backward pass stays the same.

    Only all-gathers at the end of a chain from one graph input, and reduce-scatters on which nothing but the graph's
    results depends, are touched; other collectives stay where they are, in their order.

    Args:
        graph: forward, backward or inference graph with `_c10d_functional` operators; changed in place.
        bucket_mib: largest bucket.
        prefetch: buckets on their way beside the one in use.

    Returns: the collectives that it ordered, in the order in which they start.
    """
    return _Overlap(graph, bucket_mib, prefetch).run()


MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"})
"""Operators that are kernels of their own in compiled code, whatever is fused around them."""


def pin_order(graph: fx.Graph) -> None:
    """Make each start and each wait of a collective depend on the one before it and on the last matmul before it.

    Inductor schedules what depends on nothing as early as it likes: it fuses computations that read the same tensor
    into one kernel, and everything the kernel needs comes before it. An all-gather for the last block could thus start,
    or be waited for, in the first one, and on some ranks only, for the graphs of ranks with shorter parts differ by
    the padding. With these dependencies such a fusion would be a cycle.
    """
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    operators = torch.ops._c10d_functional
    pinned = [operators.all_gather_into_tensor, operators.reduce_scatter_tensor, operators.wait_tensor]
    before, matmul, dependencies = None, None, {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target.overloadpacket in pinned:
                earlier = [other for other in (before, matmul) if other is not None]
                if earlier:
                    dependencies[node] = OrderedSet(earlier)
                before = node
            elif node.target._schema.name in MATMULS:
                matmul = node
    preserve_node_ordering(graph, dependencies)


class _Place(NamedTuple):
    """Where a node is to go in a graph."""

    at: float
    """Index in the original order. What is moved to just before a node is at its index minus a half."""
    rank: int = 0
    """Order among what is moved to the same index. What stays where it was has 0."""


BEGIN, END = -math.inf, math.inf
"""Indices before and behind all nodes."""


class _Overlap:
    """What `overlap_collectives` does.

    Every node has a place in the order to be. Moving a node, or adding one, only notes its place; at the end the graph
    is sorted by place, once, as far as what depends on what allows. For three weights A, B, C in buckets of their own,
    with `prefetch` = 1 (g starts an all-gather, s a reduce-scatter, w waits for it, m computes):

        gathers, before     gA wA mA   gB wB mB   gC wC mC
        gathers, after   gA gB wA mA   gC wB mB      wC mC         gC starts before wB: one is always on its way

        scatters, before     mA sA wA   mB sB wB      mC sC wC
        scatters, after      mA sA      mB wA sB      mC wB sC wC  wA comes when sB is about to start

    Ranks at the place before a first use: 0 what a weight goes through before it is gathered (casts, padding), 1 the
    start of a gather, 2 the wait of another one and taking its bucket apart. At the place of a reduce-scatter: 0 the
    wait of an earlier one and taking that apart, 1 putting the bucket together, 2 its start.
    """

    def __init__(self, graph: fx.Graph, bucket_mib: float, prefetch: int) -> None:
        operators = torch.ops._c10d_functional
        self.all_gather = operators.all_gather_into_tensor.default
        self.reduce_scatter = operators.reduce_scatter_tensor.default
        self.wait = operators.wait_tensor.default
        self.graph, self.limit, self.prefetch = graph, int(bucket_mib * 2**20), prefetch
        self.place = {node: _Place(i) for i, node in enumerate(graph.nodes)}
        self.output = next(iter(reversed(graph.nodes)))
        self.place[self.output] = _Place(END, 1)

    def run(self) -> list[Bucket]:
        """Find, group, place, and sort everything once."""
        placed = self._place_gathers(self._gathers_of_inputs()) + self._place_scatters(self._scatters_of_results())
        self._sort()
        self.graph.lint()
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return [bucket for _, bucket in sorted(placed, key=lambda pair: order[pair[0]])]

    def _gathers_of_inputs(self) -> list[fx.Node]:
        """All-gathers that hang on one graph input each, without repetitions."""
        known: dict[str, fx.Node] = {}
        for gather in self.graph.find_nodes(op="call_function", target=self.all_gather):
            chain, wait = _chain_from_input(gather), self._only_wait(gather)
            if chain is None or wait is None:
                continue
            # The same input, through the same operators with the same arguments.
            steps = [(node.name, node.op) if node is chain[0] else _signature(node) for node in chain]
            first = known.setdefault(repr(steps), gather)
            if first is not gather:  # the same weight, read twice
                self._replace(gather, wait, next(iter(first.users)))
        return list(known.values())

    def _scatters_of_results(self) -> list[fx.Node]:
        """Reduce-scatters whose results go to the graph's results, through no other collective and no mutation."""
        pinned: set[fx.Node] = set()  # something behind the node cares when it runs
        for node in reversed(self.graph.nodes):
            if any(user in pinned or (user.target is not self.wait and _cares(user)) for user in node.users):
                pinned.add(node)
        scatters = self.graph.find_nodes(op="call_function", target=self.reduce_scatter)
        waits = [(scatter, self._only_wait(scatter)) for scatter in scatters]
        return [scatter for scatter, wait in waits if wait is not None and wait not in pinned]

    def _only_wait(self, started: fx.Node) -> fx.Node | None:
        """The wait of a collective, made the only one; None if something uses the collective without waiting."""
        first, *others = started.users
        if any(wait.target is not self.wait for wait in (first, *others)):
            return None
        for wait in others:
            wait.replace_all_uses_with(first)
            self.graph.erase_node(wait)
        return first

    def _place_gathers(self, gathers: list[fx.Node]) -> list[tuple[fx.Node, Bucket]]:
        """Merge all-gathers into buckets. Returns what starts each one."""
        waits = {gather: next(iter(gather.users)) for gather in gathers}
        first_use = {gather: self._first_use(waits[gather]) for gather in gathers}
        gathers = sorted(gathers, key=lambda gather: (first_use[gather], self.place[gather]))
        placed = []
        for group in _by_type(gathers):
            buckets = _split_by_size(group, [_num_bytes(gather) for gather in group], self.limit)
            uses = [first_use[bucket[0]] - 0.5 for bucket in buckets]
            for i, bucket in enumerate(buckets):
                start = uses[i - self.prefetch] if i >= self.prefetch else BEGIN
                for gather in bucket:
                    # What the weight goes through moves along. Where two gathers share a cast, the earlier one counts.
                    for node in (_chain_from_input(gather) or [])[1:]:
                        self.place[node] = min(self.place[node], _Place(start))
                info = Bucket("all_gather", _value(bucket[0]).dtype, len(bucket), sum(map(_num_bytes, bucket)))
                if len(bucket) == 1:
                    gather, wait = bucket[0], waits[bucket[0]]
                    self.place[gather], self.place[wait] = _Place(start, 1), _Place(uses[i], 2)
                else:
                    gather = self._merge_gathers(bucket, waits, start, uses[i])
                placed.append((gather, info))
        return placed

    def _first_use(self, wait: fx.Node) -> float:
        """Index of the first node that computes with a gathered weight; views, and keeping it for later, do not."""
        first, stack, seen = END, [wait], {self.output}
        while stack:
            for user in stack.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if isinstance(user.target, torch._ops.OpOverload) and user.target.is_view:
                    stack.append(user)
                else:
                    first = min(first, self.place[user].at)
        return first

    def _merge_gathers(self, bucket: list[fx.Node], waits: dict[fx.Node, fx.Node], start: float, use: float) -> fx.Node:
        """One all-gather of the own parts end to end: a row of the result has one rank's parts of all weights, and a
        weight is a range of columns."""
        aten, arguments = torch.ops.aten, bucket[0].args[1:]
        pack, unpack = _Place(start), _Place(use, 2)
        parts = [self._call(pack, aten.reshape.default, gather.args[0], [-1]) for gather in bucket]
        joined = self._call(pack, aten.cat.default, parts)
        started = self._call(_Place(start, 1), self.all_gather, joined, *arguments)
        wait = self._call(unpack, self.wait, started)
        table = self._call(unpack, aten.reshape.default, wait, [arguments[0], _value(joined).numel()])
        offset = 0
        for part, gather in zip(parts, bucket, strict=True):
            end, shape = offset + _value(part).numel(), list(_value(gather).shape)
            columns = self._call(unpack, aten.slice.Tensor, table, 1, offset, end)
            # A copy even where a view would do: that would keep the whole bucket alive.
            copied = self._call(unpack, aten.clone.default, columns, memory_format=torch.contiguous_format)
            self._replace(gather, waits[gather], self._call(unpack, aten.reshape.default, copied, shape))
            offset = end
        return started

    def _place_scatters(self, scatters: list[fx.Node]) -> list[tuple[fx.Node, Bucket]]:
        """Merge reduce-scatters into buckets. Returns what starts each one."""
        placed = []
        for group in _by_type(scatters):
            sizes = [_num_bytes(scatter.all_input_nodes[0]) for scatter in group]
            buckets = _split_by_size(group, sizes, self.limit)
            starts = [self.place[bucket[-1]].at for bucket in buckets]  # where its last gradient is ready
            for i, bucket in enumerate(buckets):
                behind = i + self.prefetch
                end = _Place(starts[behind] if behind < len(buckets) else END)
                size = sum(_num_bytes(scatter.all_input_nodes[0]) for scatter in bucket)
                info = Bucket("reduce_scatter", _value(bucket[0]).dtype, len(bucket), size)
                if len(bucket) == 1:
                    scatter = bucket[0]
                    self.place[scatter], self.place[next(iter(scatter.users))] = _Place(starts[i], 2), end
                else:
                    scatter = self._merge_scatters(bucket, starts[i], end)
                placed.append((scatter, info))
        return placed

    def _merge_scatters(self, bucket: list[fx.Node], start: float, end: _Place) -> fx.Node:
        """One reduce-scatter of a table in which a row has what one rank gets of all gradients."""
        aten, ranks = torch.ops.aten, bucket[0].args[2]
        pack = _Place(start, 1)
        inputs = [scatter.all_input_nodes[0] for scatter in bucket]
        parts = [self._call(pack, aten.reshape.default, grad, [ranks, -1]) for grad in inputs]
        joined = self._call(pack, aten.cat.default, parts, 1)
        started = self._call(_Place(start, 2), self.reduce_scatter, joined, *bucket[0].args[1:])
        wait = self._call(end, self.wait, started)
        offset = 0
        for part, scatter in zip(parts, bucket, strict=True):
            length, shape = _value(part).shape[1], list(_value(scatter).shape)
            columns = self._call(end, aten.slice.Tensor, wait, 1, offset, offset + length)
            whole = self._call(end, aten.reshape.default, columns, shape)
            self._replace(scatter, next(iter(scatter.users)), whole)
            offset += length
        return started

    def _call(self, place: _Place, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, with the shape and type that inductor reads."""
        with self.graph.inserting_before(self.output):  # the final sort moves it
            node = self.graph.call_function(target, args, kwargs)
        values = map_arg(args, _value)
        with _value(node.all_input_nodes[0]).fake_mode:
            node.meta["val"] = target(*values, **kwargs)
        self.place[node] = place
        return node

    def _replace(self, started: fx.Node, wait: fx.Node, by: fx.Node) -> None:
        """Put another result in the place of a collective's, and erase what nothing uses then."""
        wait.replace_all_uses_with(by)
        unused = [wait, started, *reversed(_chain_from_input(started) or [])]
        for node in dict.fromkeys(unused):
            if not node.users and node.op != "placeholder":
                self.graph.erase_node(node)

    def _sort(self) -> None:
        """Order the graph by place, as far as what depends on what allows: of the nodes whose inputs are there, the one
        with the lowest place comes next."""
        number = {node: i for i, node in enumerate(self.graph.nodes)}  # decides between equal places
        missing = {node: len(node.all_input_nodes) for node in number}

        def key(node: fx.Node) -> tuple[bool, _Place, int]:
            return node.op != "placeholder", self.place[node], number[node]

        nodes = {number[node]: node for node in number}
        ready = [key(node) for node, count in missing.items() if count == 0]
        heapq.heapify(ready)
        order = []
        while ready:
            node = nodes[heapq.heappop(ready)[-1]]
            order.append(node)
            for user in node.users:
                missing[user] -= 1
                if missing[user] == 0:
                    heapq.heappush(ready, key(user))
        assert len(order) == len(number)
        for node in order[:-1]:
            self.output.prepend(node)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _num_bytes(node: fx.Node) -> int:
    return _value(node).numel() * _value(node).element_size()


def _signature(node: fx.Node) -> str:
    return repr((node.target, [a for a in node.args if not isinstance(a, fx.Node)], sorted(node.kwargs.items())))


def _by_type(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Collectives that may become one: same precision, ranks and reduction."""
    groups: dict[tuple[torch.dtype, str], list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault((_value(node).dtype, repr(node.args[1:])), []).append(node)
    return list(groups.values())


def _chain_from_input(node: fx.Node) -> list[fx.Node] | None:
    """From a graph input to the node, if each node on the way has one input only."""
    chain = [node]
    while chain[0].op != "placeholder":
        inputs = chain[0].all_input_nodes
        if len(inputs) != 1:
            return None
        chain.insert(0, inputs[0])
    return chain


def _cares(node: fx.Node) -> bool:
    """Whether it matters when the node runs."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.namespace == "_c10d_functional" or target._schema.is_mutable
    )
