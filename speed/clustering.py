"""The clustering head's step over all positions in bounded memory: targets, loss and gradients, a chunk at a time.

Of a position's Sinkhorn problem only scaling vectors are kept: its assignments are exp((logits - maximum) / temperature
+ shift)[b, k] * token[b] * prototype[k], and a round changes the two vectors. The residuals, assignments minus
prediction, are written over the logits; the gradients of weight and bias follow from them.
The plain version is `clustering.OnlineClustering.forward` and its backward pass.
"""

import importlib.util
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from distributed import all_reduce_max_, all_reduce_sum_, is_distributed
from utils import UserError

SINKHORN_EPS = 1e-8
SHIFT = 50.0
"""Exponent of each prototype's largest logit, which keeps the others' exp() from vanishing."""
CPU_BYTES, GPU_BYTES, DISTRIBUTED_GPU_BYTES = 2**25, 2**29, 2**31
"""Of float32 logits that are alive together, where `chunk` leaves it open; with several ranks each chunk costs a
reduction over them per Sinkhorn round, and one more."""
BLOCK_BYTES = 2**22
"""On the CPU: what is worked on at a time. Less fits the cache of a core better, but costs more calls."""


@dataclass(frozen=True)
class Learning:
    """How `Prototypes.learn` learns; the arguments are those of `clustering.OnlineClustering` and its `step`."""

    n_sk_iter: int
    target_temp: float
    pred_temp: float
    positionwise_sk: bool
    chunk: int | None = None
    with_usage: bool = False
    use_triton: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.n_sk_iter < 1:
            raise UserError(f"n_sk_iter={self.n_sk_iter} must be at least 1")


class ClusteringStep(NamedTuple):
    """What one step of the clustering head leaves behind."""

    targets: Float[Tensor, "m k"]
    """Assignments at the predicted positions, in the order of `predict_indices`."""
    loss: Float[Tensor, ""]
    """Mean clustering loss over all tokens."""
    mass: Float[Tensor, " k"] | None
    """Sum of the assignments over all tokens, per prototype; only if asked for."""
    counts: Int[Tensor, " k"] | None
    """Tokens whose largest assignment is this prototype; only if asked for."""


class Prototypes(nn.Linear):
    """`nn.Linear` from features to logits that also learns from all tokens of a step at once.

    `learn` belongs to the module that owns the weights: however they are divided over ranks, they are gathered once for
    it, and their gradients reduced once.
    """

    def learn(self, x: Float[Tensor, "p b d"], predict_indices: Int[Tensor, " m"], how: Learning) -> ClusteringStep:
        """What `OnlineClustering.step` returns; the backward pass of the loss reaches this layer alone."""
        return ClusteringStep(*_Learn.apply(self.weight, self.bias, x.detach(), predict_indices, how))


def normalize_features(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Unit length, in float32, without gradient."""
    return F.normalize(x.detach().float(), dim=-1, eps=1e-7)


def use_triton(kernel: str, device: torch.device) -> bool:
    """Whether a step with this choice of `capi.clustering_kernel` runs Triton's kernels.

    Raises: UserError for an unknown choice, or one that cannot run here.
    """
    if kernel not in ("auto", "torch", "triton"):
        raise UserError(f"capi.clustering_kernel={kernel!r} must be one of auto, torch, triton")
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return False
    installed = importlib.util.find_spec("triton") is not None
    can = installed and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if kernel == "triton" and not can:
        missing = "the package triton is not installed" if not installed else f"it needs a GPU, not {device.type}"
        raise UserError(f"capi.clustering_kernel=triton: {missing}; use auto or torch")
    return can


class _Learn(torch.autograd.Function):
    """The loss as a function of weight and bias. Its forward pass computes the gradients as well, for both need the
    logits, of which only a chunk is alive at a time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, indices: Tensor, how: Learning) -> Any:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            passed = _Pass(weight.to(dtype), None if bias is None else bias.to(dtype), x, indices, how)
            passed.run()
        ctx.gradients, ctx.dtype = (passed.weight_grad, passed.bias_grad), weight.dtype
        extra = [t for t in (passed.targets, passed.mass, passed.counts) if t is not None]
        ctx.mark_non_differentiable(*extra)
        return passed.targets, passed.loss.float(), passed.mass, passed.counts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Scaled before it is rounded: in float16 it would vanish.
        weight_grad, bias_grad = (None if g is None else (g * grads[1]).to(ctx.dtype) for g in ctx.gradients)
        return weight_grad, bias_grad, None, None, None


@runtime_checkable
class Chunk(Protocol):
    """The logits of some positions `[c, b, k]`, and what is done with them. The vectors are float32."""

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

    def learn_(self, prototype: Float[Tensor, "c k"], first: int, into: "_Pass") -> None:
        """Scale the tokens a last time; add to the pass's results; write residuals over the logits.

        Residuals, assignments minus prediction, are the gradients of the summed loss times -`pred_temp`; `bias_grad`
        gets their sums. `first` is the first of these positions.
        """
        ...


class _TorchChunk:
    """In plain torch: on a CPU in blocks of positions, or of tokens, that the caches hold; elsewhere all at once.

    Args:
        logits: float32, `[c, b, k]`.
        exponentials: memory of the same shape.
        how: temperatures.
    """

    def __init__(self, logits: Tensor, exponentials: Tensor, how: Learning) -> None:
        self.logits, self.exponentials, self.how = logits, exponentials, how
        self.token = torch.ones(logits.shape[:2], device=logits.device)

    def _blocks(self) -> Iterator[tuple[int | slice, slice]]:
        """Positions, and tokens of each, that are worked on together: all below holds for one position or several."""
        c, b, k = self.logits.shape
        if self.logits.device.type != "cpu":
            return iter([(slice(None), slice(None))])
        positions, rows = _positions_of(BLOCK_BYTES, b, k), max(1, BLOCK_BYTES // (4 * k))
        if positions > 1:
            return ((slice(start, start + positions), slice(None)) for start in range(0, c, positions))
        return ((j, slice(start, start + rows)) for j in range(c) for start in range(0, b, rows))

    def maxima(self) -> Tensor:
        return self.logits.amax(dim=1)

    def first_sums(self, maxima: Tensor) -> Tensor:
        sums, scale = torch.zeros_like(maxima), 1 / self.how.target_temp
        shifts = (SHIFT - maxima * scale).unsqueeze(1)
        for j, rows in self._blocks():
            block = torch.add(shifts[j], self.logits[j, rows], alpha=scale, out=self.exponentials[j, rows])
            sums[j].add_(block.exp_().sum(dim=-2))
        return sums

    def next_sums(self, prototype: Tensor) -> Tensor:
        sums = torch.zeros(prototype.shape, device=prototype.device)
        for j, rows in self._blocks():
            block, token = self.exponentials[j, rows], self.token[j, rows]
            _scale_tokens_(token, block, prototype[j])
            sums[j].add_(_times(block.mT, token))
        return sums

    def learn_(self, prototype: Tensor, first: int, into: "_Pass") -> None:
        scale = 1 / self.how.pred_temp
        for j, rows in self._blocks():
            assignments, logits, token = self.exponentials[j, rows], self.logits[j, rows], self.token[j, rows]
            sums = _scale_tokens_(token, assignments, prototype[j])
            assignments.mul_(prototype[j].unsqueeze(-2)).mul_(token.unsqueeze(-1))
            largest = logits.amax(dim=-1, keepdim=True) * -scale
            log = torch.add(largest, logits, alpha=scale, out=logits)  # of the prediction, before it is normalised
            loss = torch.dot(assignments.flatten(), log.flatten())
            exp_sums = log.exp_().sum(dim=-1)
            into.loss += torch.dot(exp_sums.log().flatten(), sums.flatten()) - loss
            torch.addcmul(assignments, logits, (sums / exp_sums).unsqueeze(-1), value=-1, out=logits)
            if into.bias_grad is not None:
                into.bias_grad += logits.flatten(0, -2).sum(dim=0)
        mine = slice(into.bounds[first], into.bounds[first + len(self.logits)])
        into.targets[into.order[mine]] = self.exponentials[into.position[mine] - first, into.image[mine]]
        if into.mass is not None:
            into.add_usage(self.exponentials.sum(dim=(0, 1)), self.exponentials.argmax(dim=-1))


def _scale_tokens_(token: Tensor, exponentials: Tensor, prototype: Tensor) -> Tensor:
    """A round's second half for some tokens of a position. Returns the sums of their assignments, which are about 1."""
    sums = _times(exponentials, prototype)
    token /= token * sums + SINKHORN_EPS
    return token * sums


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, or a batch of both."""
    return torch.mv(matrix, vector) if matrix.ndim == 2 else torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1)


class _Pass:
    """One pass over all positions, in chunks; after `run`, the gradients of the mean loss and all else that is wanted.

    Args:
        weight: of the prototypes, in the precision of the matmuls.
        bias: likewise, or None.
        x: features `[p, b, d]`.
        predict_indices: flat positions `image * p + position`.
        how: all else.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, x: Tensor, predict_indices: Tensor, how: Learning) -> None:
        (self.p, self.b, _), k, device = x.shape, len(weight), x.device
        self.weight, self.bias, self.x, self.how = weight, bias, x, how
        self.num_alive = 2 if is_distributed() else 1  # one is computed while the other one waits for other ranks
        budget = CPU_BYTES if device.type == "cpu" else GPU_BYTES if self.num_alive == 1 else DISTRIBUTED_GPU_BYTES
        self.chunk = min(self.p, how.chunk or _positions_of(budget // self.num_alive, self.b, k))
        self.part = self.chunk
        if device.type == "cpu" and self.num_alive == 1 and how.positionwise_sk:
            # What is balanced is learnt from at once, while it is in the cache.
            self.part = min(self.chunk, _positions_of(BLOCK_BYTES, self.b, k))
        dtype = weight.dtype if how.use_triton else torch.float32
        self.logits = [self._rows((self.chunk, self.b), dtype) for _ in range(self.num_alive)]
        self.exponentials = None
        if not how.use_triton:
            self.exponentials = [self._rows((self.part, self.b), dtype) for _ in range(self.num_alive)]
        self.weight_grad = torch.zeros(weight.shape, device=device)
        self.bias_grad = None if bias is None else torch.zeros(k, device=device)
        predicted, self.bounds = _sort_by_position(predict_indices.cpu(), self.p)
        self.order, self.position, self.image = predicted.to(device, non_blocking=True)
        self.targets = self._rows((len(predict_indices),), torch.float32)
        if how.use_triton:  # row of `targets` by position and image; -1 where none is wanted
            self.slots = torch.full((self.p, self.b), -1, dtype=torch.int32, device=device)
            self.slots[self.position, self.image] = self.order.int()
        self.loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.mass = torch.zeros(k, device=device) if how.with_usage else None
        self.counts = torch.zeros(k, dtype=torch.int64, device=device) if how.with_usage else None

    def _rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a value per prototype; for Triton's kernels, with rows as far apart as they like them."""
        k = width = len(self.weight)
        if self.how.use_triton:
            from speed.clustering_triton import MULTIPLE

            width = -(-k // MULTIPLE) * MULTIPLE
        return torch.empty(*shape, width, dtype=dtype, device=self.x.device)[..., :k]

    def run(self) -> None:
        """Do it."""
        together = None if self.how.positionwise_sk else _BalanceOfAll(self)
        _two_at_a_time(self._learn(i, first, together) for i, first in enumerate(range(0, self.p, self.chunk)))
        count = self.p * self.b
        self.loss /= count
        self.weight_grad /= -count * self.how.pred_temp
        if self.bias_grad is not None:
            self.bias_grad /= -count * self.how.pred_temp

    def _learn(self, i: int, first: int, together: "_BalanceOfAll | None") -> Generator[None, None, None]:
        """Learn from a chunk; yields whenever a reduction over ranks is under way."""
        x, logits = self.compute_logits(i, first)
        for start in range(0, len(logits), self.part):
            part = self.make_part(i, logits[start : start + self.part])
            if together is None:
                prototype = yield from _balance(part, self.how.n_sk_iter)
            else:
                prototype = together.prepare(part, first + start)
            part.learn_(prototype, first + start, self)
        residuals = logits.flatten(0, 1).to(x.dtype)
        if x.dtype == torch.float32:
            self.weight_grad.addmm_(residuals.T, x)
        else:
            self.weight_grad += residuals.T @ x

    def compute_logits(self, i: int, first: int) -> tuple[Float[Tensor, "cb d"], Float[Tensor, "c b k"]]:
        """Normalised features of chunk `i`, which begins at this position, and their logits."""
        x = normalize_features(self.x[first : first + self.chunk]).to(self.weight.dtype).flatten(0, 1)
        logits = self.logits[i % self.num_alive][: len(x) // self.b]
        flat = logits.flatten(0, 1)
        if flat.dtype != x.dtype:
            flat.copy_(F.linear(x, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(x, self.weight.T, out=flat)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=flat)
        return x, logits

    def make_part(self, i: int, logits: Float[Tensor, "c b k"]) -> Chunk:
        """What computes with some logits of chunk `i`."""
        if self.exponentials is not None:
            return _TorchChunk(logits, self.exponentials[i % self.num_alive][: len(logits)], self.how)
        from speed.clustering_triton import TritonChunk

        temperatures = {"target_temp": self.how.target_temp, "pred_temp": self.how.pred_temp}
        return TritonChunk(logits, **temperatures, shift=SHIFT, eps=SINKHORN_EPS)

    def add_usage(self, mass: Float[Tensor, " k"], largest: Int[Tensor, "c b"]) -> None:
        """Count how often each prototype is used: sums of assignments, and which one is largest for each token."""
        assert self.mass is not None and self.counts is not None
        self.mass += mass
        largest = largest.flatten().long()
        self.counts.scatter_add_(0, largest, torch.ones_like(largest))  # bincount would wait for the device


def _balance(part: Chunk, num_rounds: int) -> Generator[None, None, Tensor]:
    """Sinkhorn's rounds, but for the last scaling of the tokens: `learn_` does it. Returns the prototypes' scaling."""
    maxima = part.maxima()
    yield from _over_ranks(maxima, dist.ReduceOp.MAX)
    sums, prototype = part.first_sums(maxima), None
    for _ in range(num_rounds):
        if prototype is not None:
            sums = part.next_sums(prototype)
        yield from _over_ranks(sums, dist.ReduceOp.SUM)
        prototype = _scaled(prototype, sums)
    assert prototype is not None
    return prototype


def _scaled(prototype: Tensor | None, sums: Tensor) -> Tensor:
    """A round's first half."""
    return 1 / (sums + SINKHORN_EPS) if prototype is None else prototype / (prototype * sums + SINKHORN_EPS)


class _BalanceOfAll:
    """Sinkhorn over the tokens of all positions: one scaling per prototype; logits are computed anew per round."""

    def __init__(self, of: _Pass) -> None:
        chunks = range(0, of.p, of.chunk)
        maxima = torch.stack([of.compute_logits(0, first)[1].float().amax(dim=(0, 1)) for first in chunks])
        self.maxima = all_reduce_max_(maxima.amax(dim=0))
        self.token = torch.ones(of.p, of.b, device=of.x.device)
        self.prototype: Tensor | None = None
        for _ in range(of.how.n_sk_iter):
            sums = torch.zeros_like(self.maxima)
            for first in chunks:
                part = of.make_part(0, of.compute_logits(0, first)[1])
                mine = self._enter(part, first)
                if self.prototype is None:
                    sums += mine.sum(dim=0)
                else:
                    sums += part.next_sums(self._of_each_position(self.prototype, part)).sum(dim=0)
            self.prototype = _scaled(self.prototype, all_reduce_sum_(sums))

    def prepare(self, part: Chunk, first: int) -> Float[Tensor, "c k"]:
        """Make ready for `learn_` the positions from `first` on. Returns the prototypes' scaling."""
        self._enter(part, first)
        assert self.prototype is not None
        return self._of_each_position(self.prototype, part)

    def _enter(self, part: Chunk, first: int) -> Tensor:
        part.token = self.token[first : first + len(part.token)]
        return part.first_sums(self._of_each_position(self.maxima, part))

    @staticmethod
    def _of_each_position(vector: Tensor, part: Chunk) -> Tensor:
        return vector.repeat(len(part.token), 1)


def _over_ranks(x: Tensor, operation: Any) -> Generator[None, None, None]:
    """Reduce `x` over ranks, in place; yields once while it is under way."""
    if is_distributed():
        work = dist.all_reduce(x, operation, async_op=True)
        yield
        assert work is not None
        work.wait()


def _two_at_a_time(tasks: Iterable[Generator[None, None, None]]) -> None:
    """Run tasks that stop at each reduction over ranks: while one waits, the next one computes. The same order on all
    ranks."""
    waiting: Generator[None, None, None] | None = None
    for task in tasks:
        done = _advance(task)
        while waiting is not None and not _advance(waiting):
            done = done or _advance(task)
        waiting = None if done else task
    while waiting is not None and not _advance(waiting):
        pass


def _advance(task: Generator[None, None, None]) -> bool:
    """Compute up to the next reduction, and start that; True at the end."""
    return next(task, True) is not None


def _positions_of(num_bytes: int, b: int, k: int) -> int:
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
