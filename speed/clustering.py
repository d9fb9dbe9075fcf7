"""The clustering head's step in bounded memory: targets, loss and gradients, some positions at a time.

`learn_in_chunks` puts it in the place of `clustering.OnlineClustering.learn`, where what is computed stands plainly. Of
a position's Sinkhorn problem only two scaling vectors are kept: its assignments are

    exp((logits - maximum) / temperature + shift)[b, k] * token[b] * prototype[k]

and a round changes the two vectors. The residuals, assignments minus prediction, are written over the logits; the
gradients of weight and bias follow from them. What is worked on at a time, from large to small:

- a chunk: the positions whose logits come from one matmul and are alive together. It bounds the memory.
- a part: the positions of a chunk that are balanced together and then learnt from. All of the chunk; or, on a CPU, as
  many as its cache holds.
- a block: the tokens of a part that one operation reads. All of the part; or, again, as many as the cache holds.

With several ranks, each Sinkhorn round sums over them. Two chunks, A and B, are then alive side by side: while the sums
of one are on their way, the other one computes.

    computes      A, B: logits   A: maxima   B: maxima   A: first sums   B: first sums  ...  A: learn   B: learn
    on their way                             A's maxima  B's maxima      A's sums       ...  B's sums
"""

import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clustering import SHIFT, SINKHORN_EPS, OnlineClustering, TargetStep, normalize_features
from distributed import all_reduce_max_, all_reduce_sum_, is_distributed
from utils import UserError

CPU_BYTES, GPU_BYTES = 2**25, 2**31
"""Size of the float32 logits that are alive together, where `chunk` leaves it open; Triton's kernels hold half of it in
bfloat16. A CPU works in its cache. On a GPU each chunk costs its launches, 1.2 ms on an H100, and with several ranks a
reduction per Sinkhorn round and one more: few and large chunks."""
LARGEST_DOT = 2**30
"""Elements of which torch computes a dot product on a GPU, which has an int to count them."""
BLOCK_BYTES = 2**22
"""Size of a block's logits on a CPU. Less fits the cache of a core better, but costs more calls."""


@dataclass(frozen=True)
class HeadOptions:
    """How a step learns: the arguments of `clustering.OnlineClustering`, of its `step`, and of `learn_in_chunks`."""

    n_sk_iter: int
    target_temp: float
    pred_temp: float
    positionwise_sk: bool
    chunk: int | None
    use_triton: bool
    with_usage: bool


def learn_in_chunks(
    head: OnlineClustering, *, kernel: str, device: torch.device, chunk: int | None = None
) -> OnlineClustering:
    """Make the head's `step` go through the positions in chunks, which changes nothing but memory and speed.

    To be called before weights are divided over ranks.

    Args:
        head: changed in place.
        kernel: `torch`; `triton`, which has its own kernels for GPUs; or `auto`, which takes them where they run.
        device: where the steps will run.
        chunk: positions whose logits are alive together; None takes as many as fit into a fixed amount of memory.

    Returns: the head.
    Raises: UserError if `kernel` cannot run there.
    """
    head.learn = functools.partial(_learn, head, chunk, use_triton(kernel, device))
    return head


def use_triton(kernel: str, device: torch.device) -> bool:
    """Whether a step with this choice of `capi.clustering_kernel` runs Triton's kernels.

    Raises: UserError if they are asked for and cannot run here.
    """
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return False
    installed = importlib.util.find_spec("triton") is not None
    can = installed and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if kernel == "triton" and not can:
        missing = "the package triton is not installed" if not installed else f"it needs a GPU, not {device.type}"
        raise UserError(f"capi.clustering_kernel=triton: {missing}; use auto or torch")
    return can


def _learn(
    head: OnlineClustering,
    chunk: int | None,
    with_triton: bool,
    x: Float[Tensor, "p b d"],
    predict_indices: Int[Tensor, " m"],
    *,
    with_usage: bool,
    earlier: Tensor | None = None,
) -> TargetStep:
    """In the place of `head.learn`, for the images of one batch."""
    assert earlier is None, "a head that balances with earlier batches learns plainly"
    options = HeadOptions(
        n_sk_iter=head.n_sk_iter,
        target_temp=head.target_temp,
        pred_temp=head.pred_temp,
        positionwise_sk=head.positionwise_sk,
        chunk=chunk,
        use_triton=with_triton,
        with_usage=with_usage,
    )
    weight, bias = head.layer.weight, head.layer.bias  # read once: where they are divided, that gathers them
    return TargetStep(*_ClusteringLoss.apply(weight, bias, x.detach(), predict_indices, options))


class _ClusteringLoss(torch.autograd.Function):
    """The loss as a function of weight and bias. Its forward pass computes the gradients as well, for both need the
    logits, of which only a chunk is alive at a time."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, predict_indices: Tensor, options: HeadOptions
    ) -> Any:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            step = HeadPass(weight.to(dtype), None if bias is None else bias.to(dtype), x, predict_indices, options)
            step.run()
        ctx.gradients, ctx.dtype = (step.weight_grad, step.bias_grad), weight.dtype
        ctx.mark_non_differentiable(*(t for t in (step.targets, step.mass, step.counts) if t is not None))
        return step.targets, step.loss.float(), step.mass, step.counts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Scaled before it is rounded: in float16 it would vanish.
        weight_grad, bias_grad = (None if g is None else (g * grads[1]).to(ctx.dtype) for g in ctx.gradients)
        return weight_grad, bias_grad, None, None, None


@runtime_checkable
class Part(Protocol):
    """The logits of some positions `[c, b, k]`, and what is done with them. The vectors are float32."""

    first: int
    """The first of these positions."""
    token: Tensor
    """Scaling of each token, `[c, b]`."""

    def maxima(self) -> Float[Tensor, "c k"]:
        """Largest logit of each prototype."""
        ...

    def first_sums(self, maxima: Float[Tensor, "c k"]) -> Float[Tensor, "c k"]:
        """Mass of each prototype before the first round; `maxima` stay in use."""
        ...

    def next_sums(self, prototype: Float[Tensor, "c k"]) -> Float[Tensor, "c k"]:
        """Scale the tokens, given the prototypes' scaling; mass of each prototype after that, without its scaling."""
        ...

    def learn_(self, prototype: Float[Tensor, "c k"], results: "HeadPass") -> None:
        """Scale the tokens a last time; add to the results of the pass; write residuals over the logits.

        Residuals, assignments minus prediction, are the gradients of the summed loss times -`pred_temp`;
        `results.bias_grad` gets their sums.
        """
        ...


class _TorchPart:
    """In plain torch: on a CPU in blocks of positions, or of tokens, that the caches hold; elsewhere all at once.

    Args:
        logits: float32, `[c, b, k]`.
        exponentials: memory of the same shape.
        first: the first of these positions.
        options: temperatures.
    """

    def __init__(self, logits: Tensor, exponentials: Tensor, first: int, options: HeadOptions) -> None:
        self.logits, self.exponentials, self.first, self.options = logits, exponentials, first, options
        self.token = torch.ones(logits.shape[:2], device=logits.device)

    def _blocks(self) -> Iterator[tuple[int | slice, slice]]:
        """Positions, and tokens of each: an index of one position, for which all below has an axis less, or several."""
        c, b, k = self.logits.shape
        if self.logits.device.type != "cpu":
            return iter([(slice(None), slice(None))])
        positions, tokens = _positions_in(BLOCK_BYTES, b, k), max(1, BLOCK_BYTES // (4 * k))
        if positions > 1:
            return ((slice(start, start + positions), slice(None)) for start in range(0, c, positions))
        return ((j, slice(start, start + tokens)) for j in range(c) for start in range(0, b, tokens))

    def maxima(self) -> Tensor:
        return self.logits.amax(dim=1)

    def first_sums(self, maxima: Tensor) -> Tensor:
        sums, scale = torch.zeros_like(maxima), 1 / self.options.target_temp
        shifts = (SHIFT - maxima * scale).unsqueeze(1)
        for j, tokens in self._blocks():
            block = torch.add(shifts[j], self.logits[j, tokens], alpha=scale, out=self.exponentials[j, tokens])
            sums[j].add_(block.exp_().sum(dim=-2))
        return sums

    def next_sums(self, prototype: Tensor) -> Tensor:
        sums = torch.zeros(prototype.shape, device=prototype.device)
        for j, tokens in self._blocks():
            block, token = self.exponentials[j, tokens], self.token[j, tokens]
            _scale_tokens_(token, block, prototype[j])
            sums[j].add_(_times(block.mT, token))
        return sums

    def learn_(self, prototype: Tensor, results: "HeadPass") -> None:
        scale = 1 / self.options.pred_temp
        for j, tokens in self._blocks():
            assignments, logits, token = self.exponentials[j, tokens], self.logits[j, tokens], self.token[j, tokens]
            sums = _scale_tokens_(token, assignments, prototype[j])
            assignments.mul_(prototype[j].unsqueeze(-2)).mul_(token.unsqueeze(-1))
            # Cross-entropy with the prediction, whose logarithm is `log` minus log(exp_sums):
            # sum over prototypes of assignments * (log(exp_sums) - log).
            largest = logits.amax(dim=-1, keepdim=True) * -scale
            log = torch.add(largest, logits, alpha=scale, out=logits)
            dot = sum(map(torch.dot, assignments.flatten().split(LARGEST_DOT), log.flatten().split(LARGEST_DOT)))
            exp_sums = log.exp_().sum(dim=-1)  # written over `log`, and so over the logits
            results.loss += torch.dot(exp_sums.log().flatten(), sums.flatten()) - dot
            # A token's assignments sum to about 1, not exactly: its prediction has the same sum, so that residuals are
            # the gradient of this loss.
            torch.addcmul(assignments, logits, (sums / exp_sums).unsqueeze(-1), value=-1, out=logits)
            if results.bias_grad is not None:
                results.bias_grad += logits.flatten(0, -2).sum(dim=0)
        rows = slice(results.bounds[self.first], results.bounds[self.first + len(self.logits)])
        predicted = self.exponentials[results.position[rows] - self.first, results.image[rows]]
        results.targets[results.order[rows]] = predicted
        if results.mass is not None:
            results.add_usage(self.exponentials.sum(dim=(0, 1)), self.exponentials.argmax(dim=-1))


def _scale_tokens_(token: Tensor, exponentials: Tensor, prototype: Tensor) -> Tensor:
    """A round's second half for some tokens of a position. Returns the sums of their assignments, which are about 1."""
    sums = _times(exponentials, prototype)
    token /= token * sums + SINKHORN_EPS
    return token * sums


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, or a batch of both."""
    return torch.mv(matrix, vector) if matrix.ndim == 2 else torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1)


class HeadPass:
    """One pass over all positions. After `run` its attributes are the results of the step.

    `targets`, `mass` and `counts` are those of `clustering.TargetStep`, `loss` likewise in float64 where there is
    such; `weight_grad` and `bias_grad` are the gradients of the loss, in float32.

    Args:
        weight: of the prototypes, `[k, d]`, in the precision of the matmuls.
        bias: `[k]`, likewise, or None.
        x: features `[p, b, d]`.
        predict_indices: flat positions `image * p + position`.
        options: how to learn.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, x: Tensor, predict_indices: Tensor, options: HeadOptions
    ) -> None:
        (self.p, self.b, _), k, device = x.shape, len(weight), x.device
        self.weight, self.bias, self.x, self.options = weight, bias, x, options
        self.num_alive = 2 if is_distributed() else 1
        budget = CPU_BYTES if device.type == "cpu" else GPU_BYTES
        self.chunk = min(self.p, options.chunk or _positions_in(budget // self.num_alive, self.b, k))
        self.part = self.chunk
        if device.type == "cpu" and self.num_alive == 1 and options.positionwise_sk:
            self.part = min(self.chunk, _positions_in(BLOCK_BYTES, self.b, k))

        dtype = weight.dtype if options.use_triton else torch.float32
        self.logits = [self._rows((self.chunk, self.b), dtype) for _ in range(self.num_alive)]
        self.exponentials = None  # Triton's kernels compute them anew where they need them
        if not options.use_triton:
            self.exponentials = [self._rows((self.part, self.b), dtype) for _ in range(self.num_alive)]
        self.weight_grad = torch.zeros(weight.shape, device=device)
        self.bias_grad = None if bias is None else torch.zeros(k, device=device)
        self.loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.mass = torch.zeros(k, device=device) if options.with_usage else None
        self.counts = torch.zeros(k, dtype=torch.int64, device=device) if options.with_usage else None

        predicted, self.bounds = _sort_by_position(predict_indices.cpu(), self.p)
        self.order, self.position, self.image = predicted.to(device, non_blocking=True)
        self.targets = self._rows((len(predict_indices),), torch.float32)
        if options.use_triton:  # row of `targets` by position and image; -1 where none is wanted
            self.slots = torch.full((self.p, self.b), -1, dtype=torch.int32, device=device)
            self.slots[self.position, self.image] = self.order.int()

    def _rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a value per prototype; for Triton's kernels, with rows as far apart as they like them."""
        k = width = len(self.weight)
        if self.options.use_triton:
            from speed.clustering_triton import MULTIPLE

            width = -(-k // MULTIPLE) * MULTIPLE
        return torch.empty(*shape, width, dtype=dtype, device=self.x.device)[..., :k]

    def run(self) -> None:
        """Learn from all positions."""
        together = None if self.options.positionwise_sk else _BalanceTogether(self)
        firsts = range(0, self.p, self.chunk)
        for i in range(0, len(firsts), self.num_alive):
            self._learn_side_by_side(firsts[i : i + self.num_alive], together)
        count = self.p * self.b
        self.loss /= count
        self.weight_grad /= -count * self.options.pred_temp
        if self.bias_grad is not None:
            self.bias_grad /= -count * self.options.pred_temp

    def _learn_side_by_side(self, firsts: Sequence[int], together: "_BalanceTogether | None") -> None:
        """Learn from the chunks that begin at these positions."""
        chunks = [self.compute_logits(slot, first) for slot, first in enumerate(firsts)]
        # Two chunks are one part each. A chunk alone may have many: each is learnt from at once, while it is in the
        # cache.
        for offset in range(0, len(chunks[0][1]), self.part):
            parts = [
                self.make_part(slot, logits[offset : offset + self.part], first + offset)
                for slot, (first, (_, logits)) in enumerate(zip(firsts, chunks, strict=True))
            ]
            if together is None:
                self._balance_and_learn(parts)
            else:
                for part in parts:
                    part.learn_(together.prepare(part), self)
        for x, logits in chunks:
            residuals = logits.flatten(0, 1).to(x.dtype)
            if x.dtype == torch.float32:
                self.weight_grad.addmm_(residuals.T, x)
            else:
                self.weight_grad += residuals.T @ x

    def _balance_and_learn(self, parts: Sequence[Part]) -> None:
        """Sinkhorn's rounds on each of these parts, then learn from them.

        Every loop goes over all parts, and each part waits only for its own sums, so that those of the others are under
        way meanwhile. The last scaling of the tokens is left to `learn_`.
        """
        maxima = [_Reduction(part.maxima(), dist.ReduceOp.MAX) for part in parts]
        sums = [_Reduction(p.first_sums(m.wait()), dist.ReduceOp.SUM) for p, m in zip(parts, maxima, strict=True)]
        prototypes: list[Any] = [1.0] * len(parts)
        for _ in range(self.options.n_sk_iter - 1):
            for i, part in enumerate(parts):
                prototypes[i] = _scaled(prototypes[i], sums[i].wait())
                sums[i] = _Reduction(part.next_sums(prototypes[i]), dist.ReduceOp.SUM)
        for i, part in enumerate(parts):
            part.learn_(_scaled(prototypes[i], sums[i].wait()), self)

    def compute_logits(self, slot: int, first: int) -> tuple[Float[Tensor, "cb d"], Float[Tensor, "c b k"]]:
        """Normalised features of the chunk that begins at this position, and their logits, in the memory of a slot."""
        x = normalize_features(self.x[first : first + self.chunk]).to(self.weight.dtype).flatten(0, 1)
        logits = self.logits[slot][: len(x) // self.b]
        flat = logits.flatten(0, 1)
        if flat.dtype != x.dtype:
            flat.copy_(F.linear(x, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(x, self.weight.T, out=flat)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=flat)
        return x, logits

    def make_part(self, slot: int, logits: Float[Tensor, "c b k"], first: int) -> Part:
        """What computes with some logits of the chunk in a slot; `first` is the first of their positions."""
        if self.exponentials is not None:
            return _TorchPart(logits, self.exponentials[slot][: len(logits)], first, self.options)
        from speed.clustering_triton import TritonPart

        temperatures = {"target_temp": self.options.target_temp, "pred_temp": self.options.pred_temp}
        return TritonPart(logits, first, **temperatures, shift=SHIFT, eps=SINKHORN_EPS)

    def add_usage(self, mass: Float[Tensor, " k"], largest: Int[Tensor, "c b"]) -> None:
        """Count how often each prototype is used: sums of assignments, and which one is largest for each token."""
        assert self.mass is not None and self.counts is not None
        self.mass += mass
        largest = largest.flatten().long()
        self.counts.scatter_add_(0, largest, torch.ones_like(largest))  # bincount would wait for the device


class _Reduction:
    """A tensor that is being reduced over ranks, in place, from now on until `wait`. The same order on all ranks."""

    def __init__(self, tensor: Tensor, operation: Any) -> None:
        self.tensor = tensor
        self.work = dist.all_reduce(tensor, operation, async_op=True) if is_distributed() else None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


def _scaled(prototype: Any, sums: Tensor) -> Tensor:
    """A round's first half: the prototypes' scaling, 1 before the first round, such that their masses are equal."""
    return prototype / (prototype * sums + SINKHORN_EPS)


class _BalanceTogether:
    """Sinkhorn over the tokens of all positions: one scaling per prototype. Every round computes the logits anew."""

    def __init__(self, head_pass: HeadPass) -> None:
        firsts = range(0, head_pass.p, head_pass.chunk)
        maxima = torch.stack([head_pass.compute_logits(0, first)[1].float().amax(dim=(0, 1)) for first in firsts])
        self.maxima = all_reduce_max_(maxima.amax(dim=0))
        self.token = torch.ones(head_pass.p, head_pass.b, device=head_pass.x.device)
        self.prototype: Any = 1.0
        for i in range(head_pass.options.n_sk_iter):
            sums = torch.zeros_like(self.maxima)
            for first in firsts:
                part = head_pass.make_part(0, head_pass.compute_logits(0, first)[1], first)
                first_sums = self._enter(part)
                sums += (first_sums if i == 0 else part.next_sums(_per_position(self.prototype, part))).sum(dim=0)
            self.prototype = _scaled(self.prototype, all_reduce_sum_(sums))

    def prepare(self, part: Part) -> Float[Tensor, "c k"]:
        """Make a part ready for `learn_`. Returns the prototypes' scaling, at each of its positions."""
        self._enter(part)
        return _per_position(self.prototype, part)

    def _enter(self, part: Part) -> Tensor:
        """Give a part its tokens' scaling and the maxima. Returns its sums before the first round."""
        part.token = self.token[part.first : part.first + len(part.token)]
        return part.first_sums(_per_position(self.maxima, part))


def _per_position(vector: Tensor, part: Part) -> Tensor:
    return vector.repeat(len(part.token), 1)


def _positions_in(num_bytes: int, b: int, k: int) -> int:
    """Positions whose logits, in float32, take this much; at least one."""
    return max(1, num_bytes // (4 * b * k))


def _sort_by_position(predict_indices: Tensor, p: int) -> tuple[Tensor, list[int]]:
    """The predicted tokens, their positions and their images `[3, m]`, sorted by position, and where each begins.

    On the CPU, page-locked if there is a GPU: one copy that nothing waits for, instead of several per chunk.
    """
    image, position = predict_indices // p, predict_indices % p
    order = position.argsort(stable=True)
    bounds = torch.searchsorted(position[order], torch.arange(p + 1)).tolist()
    predicted = torch.stack([order, position[order], image[order]])
    return (predicted.pin_memory() if torch.cuda.is_available() else predicted), bounds
