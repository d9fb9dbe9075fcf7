"""Online clustering: Sinkhorn-Knopp, the teacher's clustering head and the student's prediction head.

Axis order matters: the clustering head works on `[positions, batch, d]`, so that every patch position is a problem of
its own over the images of the batch (CAPI, arXiv:2502.08769, section 3).
"""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from distributed import all_reduce_max_, all_reduce_sum_, is_distributed
from utils import UserError

SINKHORN_EPS = 1e-8


def sinkhorn_knopp(
    logits: Float[Tensor, "*p b k"], n_iterations: int, eps: float = SINKHORN_EPS
) -> Float[Tensor, "*p b k"]:
    """Balanced soft assignment of samples to prototypes: SwAV (arXiv:2006.09882) section 3.1, positionwise as in CAPI.

    Args:
        logits: similarities already divided by the temperature; not modified. `b` is this rank's part of the batch,
            balance is over all ranks; leading axes (one per position) are balanced separately.
        n_iterations: normalisation rounds, 3 in the paper.
        eps: keeps empty columns and rows from dividing by zero.

    Returns: assignments, without gradient; rows sum to 1, and prototype masses are equal up to convergence.
    Raises: UserError if `n_iterations < 1`.
    """
    problem = _Running(_sinkhorn_rounds(logits, n_iterations, eps))
    while not problem.advance():
        pass
    return problem.result


@torch.no_grad()
def _sinkhorn_rounds(logits: Tensor, n_iterations: int, eps: float) -> Generator[None, None, Tensor]:
    """`sinkhorn_knopp`, yielding whenever a reduction over ranks is under way, for the caller to compute meanwhile."""
    if n_iterations < 1:
        raise UserError(f"n_sk_iter={n_iterations} must be at least 1")
    # A constant added to a prototype's column is undone by the first normalisation: it only keeps exp() in range.
    # The range is that of float32, to which half precision is converted here.
    dtype, logits = logits.dtype, logits.float()
    maximum = logits.amax(dim=-2, keepdim=True)
    yield from _over_ranks(maximum, dist.ReduceOp.MAX)
    assignments = (logits - (maximum - 50)).exp_()
    for _ in range(n_iterations):
        sums = assignments.sum(dim=-2, keepdim=True)
        yield from _over_ranks(sums, dist.ReduceOp.SUM)
        assignments /= sums + eps
        assignments /= assignments.sum(dim=-1, keepdim=True) + eps
    return assignments.to(dtype)


def _over_ranks(x: Tensor, operation: Any) -> Generator[None, None, None]:
    """Reduce `x` over ranks, in place; yields once while it is under way."""
    if is_distributed():
        work = dist.all_reduce(x, operation, async_op=True)
        yield
        assert work is not None
        work.wait()


class _Running:
    """A computation that stops at each reduction over ranks."""

    def __init__(self, rounds: Generator[None, None, Tensor]) -> None:
        self._rounds: Generator[None, None, Tensor] | None = rounds
        self.result: Tensor

    def advance(self) -> bool:
        """Compute up to the next reduction, and start that; True once the result is there."""
        if self._rounds is not None:
            try:
                next(self._rounds)
            except StopIteration as end:
                self.result, self._rounds = end.value, None
        return self._rounds is None


def soft_cross_entropy(
    targets: Float[Tensor, "*b k"], logits: Float[Tensor, "*b k"], temperature: float
) -> Float[Tensor, "*b"]:
    """Cross-entropy between soft targets and `softmax(logits / temperature)`, per token, in float32."""
    return -(targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def entropy(probabilities: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """Entropy of each row in nats."""
    return torch.special.entr(probabilities.float()).sum(dim=-1)


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


class OnlineClustering(nn.Module):
    """The teacher's head: prototypes trained by a clustering loss on the teacher's own features.

    Args:
        in_dim: feature width d.
        out_dim: prototypes k.
        bias: whether the linear layer has a bias.
        n_sk_iter: Sinkhorn rounds.
        target_temp: temperature of the targets.
        pred_temp: temperature of the prediction in the clustering loss.
        positionwise_sk: balance each position by itself; otherwise all tokens of all positions together.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        bias: bool,
        n_sk_iter: int,
        target_temp: float,
        pred_temp: float,
        positionwise_sk: bool = True,
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim, self.n_sk_iter = in_dim, out_dim, n_sk_iter
        self.target_temp, self.pred_temp, self.positionwise_sk = target_temp, pred_temp, positionwise_sk
        self.layer = nn.Linear(in_dim, out_dim, bias=bias)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 1) weights: they set the entropy of the first targets. Bias 0."""
        nn.init.normal_(self.layer.weight)
        if self.layer.bias is not None:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x: Float[Tensor, "p b d"]) -> tuple[Float[Tensor, "p b k"], Float[Tensor, ""]]:
        """Assignments of all tokens (no gradient) and the clustering loss, whose gradient reaches this head only.

        All assignments are alive at once; training uses `step`, which is bounded in memory.
        """
        logits = self._logits(x)
        if self.positionwise_sk:
            assignments = sinkhorn_knopp(logits.detach() / self.target_temp, self.n_sk_iter)
        else:
            flat = sinkhorn_knopp(logits.detach().flatten(0, 1) / self.target_temp, self.n_sk_iter)
            assignments = flat.unflatten(0, logits.shape[:2])
        return assignments, soft_cross_entropy(assignments, logits, self.pred_temp).mean()

    def step(
        self,
        x: Float[Tensor, "p b d"],
        predict_indices: Int[Tensor, " m"],
        *,
        chunk: int | None = None,
        with_usage: bool = False,
        loss_scale: float | Tensor = 1.0,
    ) -> ClusteringStep:
        """Targets, loss and gradients of the head, `chunk` positions at a time: equal to `forward` and backward on all.

        Gradients of `loss * loss_scale` are added to the parameters' `.grad`.

        Args:
            x: teacher features.
            predict_indices: flat positions `image * p + position`; on the CPU, or this waits for the device.
            chunk: positions whose logits are alive together; None takes as many as fit into a fixed amount of memory.
            with_usage: also count how often each prototype is used.
            loss_scale: for the float16 loss scaler.
        """
        p, b, _ = x.shape
        chunk = chunk or self.automatic_chunk(b, x.device)
        predicted, bounds = _sort_by_position(predict_indices.cpu(), p, chunk)
        order, position, image = predicted.to(x.device, non_blocking=True)
        targets = torch.empty(len(predict_indices), self.out_dim, device=x.device)
        total = torch.zeros((), device=x.device)
        mass = torch.zeros(self.out_dim, device=x.device) if with_usage else None
        counts = torch.zeros(self.out_dim, dtype=torch.int64, device=x.device) if with_usage else None
        balance = None if self.positionwise_sk else self._balance_all_tokens(x, chunk)

        def learn(i: int, logits: Tensor, assignments: Tensor) -> None:
            with torch.enable_grad():
                chunk_loss = soft_cross_entropy(assignments, logits, self.pred_temp).sum() / (p * b)
            (chunk_loss * loss_scale).backward()
            total.add_(chunk_loss.detach())
            mine = slice(bounds[i], bounds[i + 1])
            targets[order[mine]] = assignments[position[mine] - i * chunk, image[mine]]
            if mass is not None and counts is not None:
                mass.add_(assignments.sum(dim=(0, 1)))
                largest = assignments.argmax(dim=-1).flatten()
                counts.scatter_add_(0, largest, torch.ones_like(largest))

        # While a chunk waits for the other ranks, the next one's logits are computed. Alone, there is nothing to await.
        waiting: tuple[int, Tensor, _Running] | None = None
        for i, start in enumerate(range(0, p, chunk)):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                logits = self._logits(x[part])
            running = _Running(self._assignment_rounds(logits.detach() / self.target_temp, part, balance))
            at_once = running.advance()
            if waiting is not None:
                while not waiting[2].advance():
                    running.advance()
                learn(waiting[0], waiting[1], waiting[2].result)
            waiting = None if at_once else (i, logits, running)
            if at_once:
                learn(i, logits, running.result)
            del logits, running
        if waiting is not None:
            while not waiting[2].advance():
                pass
            learn(waiting[0], waiting[1], waiting[2].result)
        return ClusteringStep(targets, total, mass, counts)

    def _assignment_rounds(
        self, scaled: Tensor, part: slice, balance: "_TokenBalance | None"
    ) -> Generator[None, None, Tensor]:
        if balance is None:
            return (yield from _sinkhorn_rounds(scaled, self.n_sk_iter, SINKHORN_EPS))
        return balance.assign(scaled, part)

    def automatic_chunk(self, batch: int, device: torch.device) -> int:
        """Positions per chunk such that one float32 copy of a chunk's logits is about 32 MiB (256 MiB on a GPU)."""
        budget = (2**25 if device.type == "cpu" else 2**28) // (2 if is_distributed() else 1)  # then two are alive
        return max(1, budget // (4 * batch * self.out_dim))

    def _logits(self, x: Float[Tensor, "p b d"]) -> Float[Tensor, "p b k"]:
        return self.layer(F.normalize(x.detach().float(), dim=-1, eps=1e-7)).float()

    @torch.no_grad()
    def _balance_all_tokens(self, x: Float[Tensor, "p b d"], chunk: int) -> "_TokenBalance":
        """Sinkhorn over the tokens of all positions; keeps scaling vectors, and computes logits anew per pass."""

        def passes() -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                yield part, self._logits(x[part]) / self.target_temp

        maxima = [scaled.amax(dim=(0, 1)) for _, scaled in passes()]
        balance = _TokenBalance(
            shift=50 - all_reduce_max_(torch.stack(maxima).amax(dim=0)),
            prototype_scale=torch.ones(self.out_dim, device=x.device),
            token_scale=torch.ones(x.shape[:2], device=x.device),
        )
        for iteration in range(self.n_sk_iter):
            column_sums = torch.zeros(self.out_dim, device=x.device)
            for part, scaled in passes():
                if iteration > 0:
                    balance.update_tokens(scaled, part)
                column_sums += balance.assignments(scaled, part).sum(dim=(0, 1))
            balance.prototype_scale /= all_reduce_sum_(column_sums) + SINKHORN_EPS
        return balance


class _TokenBalance:
    """Scaling vectors of a Sinkhorn problem: assignment[t, k] = exp(logit + shift)[t, k] * token[t] * prototype[k]."""

    def __init__(self, shift: Tensor, prototype_scale: Tensor, token_scale: Tensor) -> None:
        self.shift, self.prototype_scale, self.token_scale = shift, prototype_scale, token_scale

    def assignments(self, scaled: Tensor, part: slice) -> Tensor:
        return (scaled + self.shift).exp_() * self.prototype_scale * self.token_scale[part].unsqueeze(-1)

    def update_tokens(self, scaled: Tensor, part: slice) -> None:
        self.token_scale[part] /= self.assignments(scaled, part).sum(dim=-1) + SINKHORN_EPS

    def assign(self, scaled: Tensor, part: slice) -> Tensor:
        unbalanced = self.assignments(scaled, part)
        return unbalanced / (unbalanced.sum(dim=-1, keepdim=True) + SINKHORN_EPS)


def _sort_by_position(predict_indices: Tensor, p: int, chunk: int) -> tuple[Tensor, list[int]]:
    """The predicted tokens, their positions and their images `[3, m]`, sorted by position, and where each chunk begins.

    On the CPU, page-locked if there is a GPU: one copy that nothing waits for, instead of several per chunk.
    """
    image, position = predict_indices // p, predict_indices % p
    order = position.argsort(stable=True)
    bounds = torch.searchsorted(position[order], torch.tensor([*range(0, p, chunk), p])).tolist()
    predicted = torch.stack([order, position[order], image[order]])
    return (predicted.pin_memory() if torch.cuda.is_available() else predicted), bounds


class L2NormLinear(nn.Module):
    """The student's head: L2-normalised input, then a bias-free weight-normalised linear layer (arXiv:1602.07868).

    Args:
        in_dim: width d of the predictions.
        out_dim: prototypes k.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.last_layer = WeightNormLinear(in_dim, out_dim)

    def init_weights(self) -> None:
        """Directions from a truncated normal of std 0.02, magnitudes 1."""
        self.last_layer.init_weights()

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Similarities to the prototypes."""
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(x.float(), dim=-1, eps=eps))


class WeightNormLinear(nn.Module):
    """Bias-free linear layer with weight v * g / |v|, normalised in float32 so that bfloat16 training works."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Fill both parameters."""
        nn.init.ones_(self.weight_g)
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Apply the layer."""
        v = self.weight_v.float()
        weight = v * (self.weight_g.float() / (v.norm(dim=1, keepdim=True) + 1e-8))
        return F.linear(x, weight)
