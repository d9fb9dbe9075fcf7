"""Online clustering: Sinkhorn-Knopp, the teacher's clustering head and the student's prediction head.

Axis order matters: the clustering head works on `[positions, batch, d]`, so that every patch position is a problem of
its own over the images of the batch (CAPI, arXiv:2502.08769, section 3).

Beside the clustering head stand what the paper compares it to, with a `step` like its own: `EmaHeadTargets`, which a
moving average gives, and `LatentTargets`, the teacher's features themselves.
"""

import itertools
import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed import all_reduce_max_, all_reduce_sum_

SINKHORN_EPS = 1e-8
SHIFT = 50.0
"""Exponent of each prototype's largest logit, which keeps the others' exp() from vanishing."""


def sinkhorn_knopp(
    logits: Float[Tensor, "*p b k"], n_iterations: int, eps: float = SINKHORN_EPS
) -> Float[Tensor, "*p b k"]:
    """Balanced soft assignment of samples to prototypes: SwAV (arXiv:2006.09882) section 3.1, positionwise as in CAPI.

    Args:
        logits: similarities already divided by the temperature; not modified. `b` is this rank's part of the batch,
            balance is over all ranks; leading axes (one per position) are balanced separately.
        n_iterations: normalisation rounds, 3 in the paper.
        eps: keeps empty columns and rows from dividing by zero.

    Returns: assignments, without gradient; rows sum to 1, and prototype masses are equal up to convergence. A sample
        all of whose logits lie far below the largest of every prototype, some 18 of these units, gets a row of nearly
        0 instead: with many samples per prototype, temperatures far below the published ones do that.
    """
    assert n_iterations >= 1, f"n_sk_iter={n_iterations} must be at least 1"
    with torch.no_grad():
        # A constant added to a prototype's column is undone by the first normalisation: it only keeps exp() in range.
        # The range is that of float32, to which half precision is converted here.
        scaled = logits.float()
        assignments = (scaled - (all_reduce_max_(scaled.amax(dim=-2, keepdim=True)) - SHIFT)).exp_()
        for _ in range(n_iterations):
            assignments /= all_reduce_sum_(assignments.sum(dim=-2, keepdim=True)) + eps
            assignments /= assignments.sum(dim=-1, keepdim=True) + eps
        return assignments.to(logits.dtype)


def balanced_assignments(
    logits: Float[Tensor, "p b k"], temperature: float, n_iterations: int, *, positionwise: bool
) -> Float[Tensor, "p b k"]:
    """`sinkhorn_knopp` of logits of all positions, in float32: one problem per position, or one over all tokens."""
    scaled = logits.detach() / temperature
    if positionwise:
        return sinkhorn_knopp(scaled, n_iterations)
    return sinkhorn_knopp(scaled.flatten(0, 1), n_iterations).unflatten(0, scaled.shape[:2])


def soft_cross_entropy(
    targets: Float[Tensor, "*b k"], logits: Float[Tensor, "*b k"], temperature: float
) -> Float[Tensor, "*b"]:
    """Cross-entropy between soft targets and `softmax(logits / temperature)`, per token, in float32."""
    return -(targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def latent_loss(targets: Float[Tensor, "*b d"], predictions: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Smooth L1 between targets and predictions, per token: the mean over channels, in float32."""
    return F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(dim=-1)


def entropy(probabilities: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    """Entropy of each row in nats."""
    return torch.special.entr(probabilities.float()).sum(dim=-1)


def normalize_features(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Unit length, in float32, without gradient."""
    return F.normalize(x.detach().float(), dim=-1, eps=1e-7)


class TargetStep(NamedTuple):
    """What the student has to predict in a step, and what making it leaves behind."""

    targets: Float[Tensor, "m k"]
    """At the predicted positions, in the order of `predict_indices`: assignments, or latents."""
    loss: Float[Tensor, ""] | None = None
    """Mean clustering loss over all tokens; None of targets that are not clustered."""
    mass: Float[Tensor, " k"] | None = None
    """Sum of the assignments over all tokens, per prototype; only if asked for."""
    counts: Int[Tensor, " k"] | None = None
    """Tokens whose largest assignment is this prototype; only if asked for."""

    @classmethod
    def of_assignments(
        cls,
        assignments: Float[Tensor, "p b k"],
        predict_indices: Int[Tensor, " m"],
        loss: Float[Tensor, ""] | None = None,
        *,
        with_usage: bool,
    ) -> "TargetStep":
        """Pick those of the predicted positions, flat `image * p + position`, and count if asked for."""
        targets = at_positions(assignments, predict_indices)
        if not with_usage:
            return cls(targets, loss)
        counts = assignments.argmax(dim=-1).flatten().bincount(minlength=assignments.shape[-1])
        return cls(targets, loss, assignments.sum(dim=(0, 1)), counts)


def at_positions(x: Float[Tensor, "p b d"], predict_indices: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """Rows at flat positions `image * p + position`."""
    return x[predict_indices % len(x), predict_indices // len(x)]


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

    forward_methods = ("learn",)  # what reads the weights beside `forward`, for code that divides them over ranks

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

    def forward(
        self, x: Float[Tensor, "p b d"], earlier: Float[Tensor, "p e d"] | None = None
    ) -> tuple[Float[Tensor, "p b k"], Float[Tensor, ""]]:
        """Assignments of all tokens (no gradient) and the clustering loss, whose gradient reaches this head only.

        Features of `earlier` images, normalised, share the balance and nothing else.
        """
        logits = self.layer(normalize_features(x)).float()
        to_balance = logits.detach()
        if earlier is not None:
            with torch.no_grad():
                to_balance = torch.cat([to_balance, self.layer(earlier).float()], dim=1)
        balanced = balanced_assignments(to_balance, self.target_temp, self.n_sk_iter, positionwise=self.positionwise_sk)
        assignments = balanced[:, : x.shape[1]]
        return assignments, soft_cross_entropy(assignments, logits, self.pred_temp).mean()

    def learn(
        self,
        x: Float[Tensor, "p b d"],
        predict_indices: Int[Tensor, " m"],
        *,
        with_usage: bool,
        earlier: Float[Tensor, "p e d"] | None = None,
    ) -> TargetStep:
        """What `step` returns, before the backward pass of the loss.

        Here the assignments of all tokens are alive at once. `speed.clustering.learn_in_chunks` puts a function in the
        place of this one that computes the same in bounded memory, for the images of one batch.
        """
        # Without the hooks of a call: those of `learn` have gathered the weights.
        assignments, loss = self.forward(x, earlier)
        return TargetStep.of_assignments(assignments, predict_indices, loss, with_usage=with_usage)

    def step(
        self,
        x: Float[Tensor, "p b d"],
        predict_indices: Int[Tensor, " m"],
        *,
        with_usage: bool = False,
        loss_scale: float | Tensor = 1.0,
        earlier: Float[Tensor, "p e d"] | None = None,
    ) -> TargetStep:
        """Cluster the tokens of all positions: targets for the student, and the loss and gradients of this head.

        Gradients of `loss * loss_scale` are added to the parameters' `.grad`.

        Args:
            x: teacher features.
            predict_indices: flat positions `image * p + position`; on the CPU, or this waits for the device.
            with_usage: also count how often each prototype is used.
            loss_scale: for the float16 loss scaler.
            earlier: normalised features of images of earlier batches, which share the balance; see `FeatureQueue`.
        """
        result = self.learn(x, predict_indices, with_usage=with_usage, earlier=earlier)
        assert result.loss is not None
        (result.loss * loss_scale).backward()
        return result._replace(loss=result.loss.detach())


class EmaHeadTargets:
    """Targets as iBOT has them (arXiv:2111.07832): what the moving average of the student's head says of the teacher's
    features. They are balanced as the clusters are, as in DINOv2 (arXiv:2304.07193, section 4); nothing is trained.

    Args:
        head: of the average.
        target_temp: temperature of the targets.
        n_sk_iter: Sinkhorn rounds.
        positionwise_sk: balance each position by itself.
    """

    def __init__(self, head: nn.Module, *, target_temp: float, n_sk_iter: int, positionwise_sk: bool) -> None:
        self.head, self.target_temp = head, target_temp
        self.n_sk_iter, self.positionwise_sk = n_sk_iter, positionwise_sk

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "p b d"], predict_indices: Int[Tensor, " m"], *, with_usage: bool = False, **_: Any
    ) -> TargetStep:
        """As `OnlineClustering.step`, without a loss; the logits of all tokens are alive at once."""
        logits = self.head(x).float()
        assignments = balanced_assignments(logits, self.target_temp, self.n_sk_iter, positionwise=self.positionwise_sk)
        return TargetStep.of_assignments(assignments, predict_indices, with_usage=with_usage)


class LatentTargets:
    """Targets as I-JEPA has them (arXiv:2301.08243): the teacher's features, each normalised over its channels."""

    @torch.no_grad()
    def step(self, x: Float[Tensor, "p b d"], predict_indices: Int[Tensor, " m"], **_: Any) -> TargetStep:
        """As `OnlineClustering.step`, without a loss and without prototypes to count."""
        return TargetStep(normalized_latents(at_positions(x, predict_indices)))


def normalized_latents(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Mean 0 and variance 1 over channels, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:])


class FeatureQueue(nn.Module):
    """Teacher features of the batches before, with which Sinkhorn balances the one at hand: SwAV, section 4.

    A batch that is small for the number of prototypes is shared out among all of them whatever it shows. With the
    images of the last few batches beside it there are enough. Their features are kept, not their logits: prototypes
    have moved since. They are kept by position, so that a positionwise balance stays one over images; and those of the
    batch that was made at step s are at `s % length`, so that the step alone says which are there.

    Memory: `length` times the float32 features of a batch, `length * b * p * d * 4` bytes on each rank; and while the
    head learns the logits of all images, `(length + 1) * b * p * k * 4` bytes a few times over.

    Args:
        rows: zeros `[length, b, p, d]`; over ranks a tensor that is divided along `b`.
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    @property
    def _own_rows(self) -> Float[Tensor, "length b p d"]:
        return self.rows.to_local() if isinstance(self.rows, DTensor) else self.rows

    def earlier(self, step: int) -> Float[Tensor, "p e d"] | None:
        """Normalised features of the batches before that of this step, of this rank's images; None if there are none.

        Args:
            step: finished updates.
        """
        filled = self._own_rows[:step]
        return filled.flatten(0, 1).transpose(0, 1) if len(filled) else None

    @torch.no_grad()
    def put_(self, features: Float[Tensor, "b p d"], step: int) -> None:
        """Take in the features of the batch of this step, in the place of the oldest ones."""
        rows = self._own_rows
        if len(rows):
            rows[step % len(rows)].copy_(normalize_features(features))


class L2NormLinear(nn.Module):
    """The student's head: L2-normalised input, then a bias-free weight-normalised linear layer (arXiv:1602.07868).

    Args:
        in_dim: width d of the predictions.
        out_dim: prototypes k.
    """

    hidden_dims: ClassVar[tuple[int, ...]] = ()
    """Widths of the layers between predictions and prototypes."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.last_layer = WeightNormLinear(in_dim, out_dim)

    def init_weights(self) -> None:
        """Directions from a truncated normal of std 0.02, magnitudes 1."""
        self.last_layer.init_weights()

    def embed(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """What is compared to the prototypes, the rows of `last_layer.weight_v`, by its cosine."""
        return x

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Similarities to the prototypes."""
        x = self.embed(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(x.float(), dim=-1, eps=eps))


class MlpHead(L2NormLinear):
    """A student's head as DINO's (arXiv:2104.14294): a GELU MLP to a bottleneck, and there an `L2NormLinear`.

    Args:
        in_dim: width d of the predictions.
        out_dim: prototypes k.
    """

    hidden_dims = (2048, 2048, 256)

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(self.hidden_dims[-1], out_dim)
        self.mlp = nn.ModuleList(nn.Linear(*widths) for widths in itertools.pairwise((in_dim, *self.hidden_dims)))
        self.init_weights()

    def init_weights(self) -> None:
        """As `L2NormLinear`; MLP weights from a truncated normal of std 0.02, biases 0."""
        super().init_weights()
        layers: Any = self.mlp
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def embed(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """The bottleneck."""
        for layer in self.mlp[:-1]:
            x = F.gelu(layer(x))
        return self.mlp[-1](x)


class LatentHead(nn.Linear):
    """A student's head for targets that are latents: a linear layer, as wide as they are."""

    hidden_dims: ClassVar[tuple[int, ...]] = ()

    def init_weights(self) -> None:
        """Weights from a truncated normal of std 0.02, biases 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


HEADS: dict[str, type[L2NormLinear]] = {"linear": L2NormLinear, "mlp": MlpHead}
"""The student's heads, by their names in `capi.student_head`."""


class WeightNormLinear(nn.Module):
    """Bias-free linear layer with weight v * g / |v|, normalised in float32 so that bfloat16 training works."""

    kept_in_float32 = ("weight_g", "weight_v")

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


@torch.no_grad()
def prototype_usage(counts: Int[Tensor, " k"], mass: Float[Tensor, " k"]) -> dict[str, Float[Tensor, ""]]:
    """How many of the k prototypes are in use, by two measures.

    Args:
        counts: tokens for which the prototype has the largest assignment.
        mass: sum of its assignments.

    Returns: `prototypes_used`, prototypes with a count above 0; `prototype_perplexity`, exp of the entropy of the mass.
    """
    mass = mass.detach().to(torch.float32 if mass.device.type == "mps" else torch.float64)
    perplexity = torch.special.entr(mass / mass.sum()).sum().exp()
    return {"prototypes_used": (counts > 0).sum().float(), "prototype_perplexity": perplexity.float()}


def normalized_entropy(entropy: Float[Tensor, ""], num_clusters: int) -> Float[Tensor, ""]:
    """Entropy as a fraction of that of a uniform choice among `num_clusters`: 0 is certain, 1 knows nothing."""
    return entropy / math.log(num_clusters)


def batch_warning(global_batch_size: int, num_clusters: int, queue: int = 0) -> str | None:
    """What to tell a user whose batch, with those in the queue, is too small for the number of prototypes, or None.

    Published is one image per prototype (16384 each); the limits here are a rule of thumb, but for one image, to which
    each balance can only give all prototypes alike.
    """
    num_images = global_batch_size * (1 + queue)
    if num_images == 1:
        return (
            "A global batch of one image teaches nothing: Sinkhorn balances the images at each patch position, and of "
            "one its targets are the same for all prototypes. Use a larger optim.batch_size_per_gpu, "
            "optim.accumulation_steps or capi.queue, or capi.clustering_kwargs.positionwise_sk=false"
        )
    if num_images * 8 >= num_clusters:
        return None
    batches = f"global batch of {global_batch_size} images" + (f" and the {queue} before it are" if queue else " is")
    return (
        f"The {batches} small for capi.num_clusters={num_clusters}. At each patch "
        f"position Sinkhorn shares the images out among all prototypes, {num_images / num_clusters:.2g} images "
        "each (1 in the paper), so that targets are spread over prototypes that no image is close to. Use at most "
        f"capi.num_clusters={num_images * 8}, better {num_images * 4} or fewer, a larger optim.batch_size_per_gpu, "
        "optim.accumulation_steps, over which Sinkhorn balances as over one batch, or a longer capi.queue of earlier "
        "batches."
    )
