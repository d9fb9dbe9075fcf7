"""Readouts: what is fitted on frozen features to see what they are good for.

Nearest neighbours, exact and in bounded memory; logistic regression on features that stay where they are, CPU or GPU;
and linear and attentive classifiers, of which a whole grid of learning rates and weight decays trains at once, with
AdamW, SGD or LARS. They take tensors, and know neither a model nor an evaluation.
"""

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoint import save_atomically
from config import changed_keys
from data import seeded
from distributed import all_reduce_sum_, barrier, broadcast_object, gather_objects, rank, world_size
from utils import UserError, derive_seed, largest_divisor

logger = logging.getLogger("readouts")

T = TypeVar("T")
R = TypeVar("R")

DISTANCES = ("cosine", "L2", "L1", "Linf", "inner_product")
SCALINGS = ("standard", "l2", "none")
SCORED_ROWS = 16_384
"""Images whose logits are held at a time."""
VOTE_ROWS = 1024
"""Queries whose votes are held at a time."""
HEAD_DIM = 64
"""Channels of an attention head, or the largest divisor of the width below that."""
INIT_STD = 0.02
PROBE_INIT_STD = 0.01
"""Of the linear layers of published probes."""
BETAS = (0.9, 0.95)
MOMENTUM = 0.9
TRUST = 0.001
"""Coefficient of LARS: how long an update is, as a fraction of the length of what it updates."""
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1
LAYER_NORM_EPS = 1e-6


# ---------------------------------------------------------------------------------------------------- shared


def any_match(
    logits: Float[Tensor, "b m k"], labels: Int64[Tensor, "b l"], mapping: Int64[Tensor, " c"] | None = None
) -> Bool[Tensor, "b m"]:
    """Whether the top prediction of each of m classifiers is any of an image's labels.

    A prediction that is not finite, as of a classifier that has diverged, is wrong.

    Args:
        logits: for all classes.
        labels: padded with -1.
        mapping: if given, label i means class `mapping[i]`, and no other class can be predicted.
    """
    if mapping is not None:
        logits = logits[..., mapping.to(logits.device)]
    best, predicted = logits.max(-1)
    predicted = predicted.where(best.isfinite(), -2)
    return (predicted.unsqueeze(-1) == labels.to(logits.device).unsqueeze(1)).any(-1)


def spread(tasks: Sequence[T], run: Callable[[T], R]) -> list[R]:
    """The outcome of `run` for every task, on all ranks, which take turns in running them."""
    own = {number: run(tasks[number]) for number in range(rank(), len(tasks), world_size())}
    outcomes = {number: outcome for part in gather_objects(own) for number, outcome in part.items()}
    return [outcomes[number] for number in range(len(tasks))]


class _SumOverRanks(torch.autograd.Function):
    """A sum over all ranks through which gradients flow, those of all ranks to each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum_(gradients[0].clone())


def mean_and_variance(x: Float[Tensor, "n d"], correction: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and variance of each column over the rows of all ranks, which call this together; a rank may have no row.

    Args:
        x: this rank's rows.
        correction: what is subtracted from the number of rows in the denominator of the variance.
    """
    num_rows = all_reduce_sum_(torch.tensor(len(x), device=x.device)).to(x.dtype)
    mean = _SumOverRanks.apply(x.sum(0)) / num_rows
    return mean, _SumOverRanks.apply((x - mean).square().sum(0)) / (num_rows - correction)


def best_of(values: Sequence[float]) -> int:
    """The index of the largest value, of the first one among equals."""
    return max(range(len(values)), key=lambda i: values[i])


# ---------------------------------------------------------------------------------------- nearest neighbours

TRAIN_CHUNK = 262_144
"""Training rows that are cast, normalised and moved to the device of the queries at a time."""
BLOCK_SIZE = 2**26
"""Most similarities, or votes, that are held at once."""
BLOCK_COLUMNS = 2**16
"""Training rows of a block of similarities: about square, it reuses what a product reads most."""
GROUP_SIZE = 64
"""Similarities of which only the largest is looked at, unless it is among the k largest."""
MIN_GROUPS = 8
"""Groups per neighbour that is sought, below which sorting the candidates costs as much as sorting all."""


def nearest(
    queries: Float[Tensor, "q d"],
    train: Float[Tensor, "n d"],
    k: int,
    distance: str,
    *,
    train_chunk: int = TRAIN_CHUNK,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """The `k` training rows that are nearest to each query, by exhaustive search.

    Memory beside the arguments: a block of `BLOCK_SIZE` similarities, and a chunk of the training rows, which is cast,
    normalised and moved to the device of the queries.

    Args:
        queries: features of what neighbours are sought for, on the device where it is computed.
        train: features among which neighbours are sought, on any device.
        k: neighbours of each query, at most n.
        distance: one of `DISTANCES`.
        train_chunk: training rows compared at a time.
        dtype: precision of the products; bfloat16 halves memory and time on a GPU and may swap close neighbours.

    Returns: similarities, nearest first (for L2 without the query's own norm: 2 q.x - x.x), and row numbers.
    """
    train_chunk = min(train_chunk, len(train))
    queries = _prepare(queries, distance, dtype)
    num = len(queries)
    best = torch.empty(num, 0, device=queries.device)
    rows = torch.empty(num, 0, dtype=torch.int64, device=queries.device)
    num_columns = min(max(BLOCK_COLUMNS, MIN_GROUPS * k * GROUP_SIZE), len(train))
    # One for all: fresh memory of this size comes from the system, which clears it first.
    num_held = min(max(BLOCK_SIZE, num_columns), num * num_columns) if dtype == torch.float32 else 0
    block = torch.empty(num_held, device=queries.device)
    for start in range(0, len(train), train_chunk):
        chunk = _prepare(train[start : start + train_chunk].to(queries.device), distance, dtype)
        for first, part in zip(range(start, start + len(chunk), num_columns), chunk.split(num_columns), strict=True):
            largest = [
                _largest(_similarity(batch, part, distance, block), min(k, len(part)))
                for batch in queries.split(max(1, BLOCK_SIZE // len(part)))
            ]
            best = torch.cat([best, torch.cat([values for values, _ in largest])], dim=1)
            rows = torch.cat([rows, torch.cat([columns for _, columns in largest]) + first], dim=1)
            # Ties keep the earlier row: a stable sort of at most 2 k candidates.
            order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
            best, rows = best.gather(1, order), rows.gather(1, order)
    return best, rows


def _prepare(x: Tensor, distance: str, dtype: torch.dtype) -> Tensor:
    x = x.float()
    return (F.normalize(x, dim=1) if distance == "cosine" else x).to(dtype)


def _similarity(queries: Tensor, train: Tensor, distance: str, block: Tensor) -> Tensor:
    """Similarities [q, n] of all pairs; products in float32 are written into the memory `block`."""
    if distance in ("L1", "Linf"):
        return -torch.cdist(queries.float(), train.float(), p=1.0 if distance == "L1" else torch.inf)
    if queries.dtype == torch.float32:
        products = block[: len(queries) * len(train)].view(len(queries), len(train))
        torch.mm(queries, train.T, out=products)
    else:
        products = (queries @ train.T).float()
    return products.mul_(2).sub_(train.float().square().sum(dim=1)) if distance == "L2" else products


def _largest(x: Float[Tensor, "q n"], k: int) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """`x.topk(k, dim=1)`. The k largest numbers are in the k groups with the largest maxima, so few are sorted."""
    num_groups, num_left = divmod(x.shape[1], GROUP_SIZE)
    if num_groups < MIN_GROUPS * k:
        values, columns = x.topk(k, dim=1)
        return values, columns
    grouped = x[:, : num_groups * GROUP_SIZE].unflatten(1, (num_groups, GROUP_SIZE))
    groups = grouped.amax(dim=2).topk(k, dim=1, sorted=False).indices.unsqueeze(2)
    candidates = grouped.gather(1, groups.expand(-1, -1, GROUP_SIZE)).flatten(1)
    columns = (groups * GROUP_SIZE + torch.arange(GROUP_SIZE, device=x.device)).flatten(1)
    if num_left:
        candidates = torch.cat([candidates, x[:, -num_left:]], dim=1)
        last = torch.arange(x.shape[1] - num_left, x.shape[1], device=x.device)
        columns = torch.cat([columns, last.expand(len(x), -1)], dim=1)
    values, places = candidates.topk(k, dim=1)
    return values, columns.gather(1, places)


def majority_votes(
    neighbors: Int64[Tensor, "q k"], labels: UInt8[Tensor, "n p"], ks: Sequence[int]
) -> Iterator[tuple[int, UInt8[Tensor, "q p"]]]:
    """For each k in ascending order, the most frequent label of the k nearest rows, separately in each column.

    Ties go to the smallest label.

    Args:
        neighbors: row numbers in `labels`, nearest first.
        labels: p labels of each training row, such as those of a patch's pixels.
        ks: numbers of neighbours to ask; at most as many as there are.
    """
    num_labels = int(labels.max()) + 1
    per_block = max(1, BLOCK_SIZE // (labels.shape[1] * num_labels))
    predicted = {
        k: torch.empty(len(neighbors), labels.shape[1], dtype=torch.uint8, device=neighbors.device) for k in ks
    }
    for start in range(0, len(neighbors), per_block):
        block = neighbors[start : start + per_block]
        counts = torch.zeros(len(block), labels.shape[1], num_labels, dtype=torch.int16, device=neighbors.device)
        one = counts.new_ones(1, 1, 1).expand(len(block), labels.shape[1], 1)
        asked = 0
        for k in sorted(ks):
            for column in range(asked, k):
                votes = labels[block[:, column].to(labels.device)].to(neighbors.device)
                counts.scatter_add_(2, votes.long().unsqueeze(2), one)
            asked = k
            predicted[k][start : start + per_block] = counts.argmax(dim=2).to(torch.uint8)
    for k in sorted(ks):
        yield k, predicted[k]


def weighted_vote(
    similarity: Float[Tensor, "q k"], labels: Int64[Tensor, "q k l"], num_classes: int, temperature: float
) -> Float[Tensor, "q c"]:
    """Votes for each class, a neighbour's weight being exp(similarity / temperature): DINO (arXiv:2104.14294).

    Weights are relative to that of the nearest neighbour, so that they stay finite at any temperature.

    Args:
        similarity: cosine similarities of the neighbours.
        labels: those of the neighbours, padded with -1; one with several labels votes for each.
        num_classes: the number of classes, c.
        temperature: 0.07 in DINO; the smaller, the more the nearest count.
    """
    nearest_one = similarity.amax(dim=1, keepdim=True)
    weights = ((similarity - nearest_one) / temperature).exp().unsqueeze(2) * (labels >= 0)
    empty = torch.zeros(len(labels), num_classes, device=similarity.device)
    return empty.scatter_add_(1, labels.clamp_min(0).flatten(1), weights.flatten(1))


def knn_num_correct(
    queries: Float[Tensor, "q d"],
    labels: Int64[Tensor, "q l"],
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, "n l2"],
    ks: Sequence[int],
    *,
    num_classes: int,
    temperature: float,
    mapping: Int64[Tensor, " c"] | None = None,
) -> Int64[Tensor, " ks"]:
    """For each k, how many queries the weighted vote of the k nearest rows of the bank gives one of their labels.

    Args:
        queries: features, on the device where it is computed.
        labels: those of the queries, padded with -1.
        bank: features of the images that vote.
        bank_labels: their labels, padded with -1.
        ks: numbers of neighbours, ascending, at most n.
        num_classes: classes that are voted for.
        temperature: see `weighted_vote`.
        mapping: see `any_match`.
    """
    correct = torch.zeros(len(ks), dtype=torch.int64)
    if not len(queries):
        return correct
    similarity, index = nearest(queries, bank, ks[-1], "cosine")
    for start in range(0, len(queries), VOTE_ROWS):
        rows = slice(start, start + VOTE_ROWS)
        near = bank_labels[index[rows].cpu()].to(queries.device)
        votes = [weighted_vote(similarity[rows, :k], near[:, :k], num_classes, temperature) for k in ks]
        correct += any_match(torch.stack(votes, dim=1), labels[rows], mapping).sum(0).cpu()
    return correct


# --------------------------------------------------------------------------------------- logistic regression


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    c: float,
    *,
    max_iter: int = 1000,
    tol: float = 1e-12,
    intercept: bool = True,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Minimise mean cross-entropy + |weight|^2 / (2 c n) by L-BFGS: scikit-learn's LogisticRegression.

    It runs on the tensors themselves, so features are not copied. Its tolerance is below what float32 reaches, as
    in the published evaluations: it stops when the line search finds nothing better.

    Args:
        features: float32 or float64.
        labels: in [0, num_classes); at least two of them occur.
        num_classes: k. A class that does not occur is never predicted: its bias is -inf.
        c: inverse strength of the penalty, which leaves the bias alone.
        max_iter: L-BFGS iterations.
        tol: largest component of the gradient at which it stops.
        intercept: whether there is a bias; without one it is 0 for every class that occurs.

    Returns: weight and bias, on the device of the features; logits are `features @ weight.T + bias`.
    """
    os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn wants it set before it takes tensors
    import sklearn
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present, compact = labels.unique(return_inverse=True)
    with sklearn.config_context(array_api_dispatch=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=c, max_iter=max_iter, tol=tol, fit_intercept=intercept).fit(features, compact)
    rows = fitted.coef_
    intercepts = fitted.intercept_ if intercept else rows.new_zeros(len(rows))
    if len(present) == 2:  # one row then says how much the second class is ahead of the first
        rows = torch.cat([torch.zeros_like(rows), rows])
        intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_full((num_classes,), -torch.inf)
    weight[present], bias[present] = rows, intercepts
    return weight, bias


class LogisticModel(NamedTuple):
    """Scaling of features, and the linear map of a logistic regression that was fitted to them."""

    scaling: str
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    @classmethod
    def fit(
        cls,
        features: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        num_classes: int,
        c: float,
        *,
        scaling: str,
        max_iter: int,
        correction: int = 0,
        intercept: bool = True,
    ) -> "LogisticModel":
        """Scale features as one of `SCALINGS` says, with their own mean and deviation, and fit; see `fit_logistic`.

        `correction` is subtracted from n in the denominator of the squared deviation.
        """
        std, mean = torch.std_mean(features, dim=0, correction=correction)
        std = std.where(std > 0, 1)
        x = _scaled(features, scaling, mean, std)
        fitted = fit_logistic(x, labels, num_classes, c, max_iter=max_iter, intercept=intercept)
        return cls(scaling, mean, std, *fitted)

    def with_statistics_of(self, features: Float[Tensor, "n d"]) -> "LogisticModel":
        """The same model, which scales with the mean and the unbiased deviation of these features of all ranks.

        Given the test images themselves, their score is transductive: each prediction depends on all of them.
        """
        features = features.reshape(-1, len(self.mean))  # a rank without images may not know how wide they are
        mean, variance = mean_and_variance(features.double(), correction=1)
        std = variance.sqrt().where(variance > 0, 1)
        return self._replace(mean=mean.to(self.mean), std=std.to(self.std))

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n 1 k"]:
        """Logits of images, with the axis that `any_match` has for several classifiers."""
        return F.linear(_scaled(features, self.scaling, self.mean, self.std), self.weight, self.bias).unsqueeze(1)

    def num_correct(
        self,
        features: Float[Tensor, "n d"],
        labels: Int64[Tensor, "n l"],
        mapping: Int64[Tensor, " c"] | None = None,
    ) -> int:
        """How many images get one of their labels; see `any_match`."""
        correct = 0
        for start in range(0, len(labels), SCORED_ROWS):
            rows = slice(start, start + SCORED_ROWS)
            correct += int(any_match(self.logits(features[rows].to(self.bias.device)), labels[rows], mapping).sum())
        return correct

    def to(self, device: torch.device | str) -> "LogisticModel":
        """The same model with its tensors on another device."""
        return LogisticModel(self.scaling, *(value.to(device) for value in self[1:]))


def _scaled(
    features: Float[Tensor, "n d"], scaling: str, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    if scaling == "standard":
        return (features - mean) / std
    return F.normalize(features, dim=1) if scaling == "l2" else features


# --------------------------------------------------------------------------------------- trained classifiers


def _normal_parameter(num_classifiers: int, *shape: int, std: float = INIT_STD) -> nn.Parameter:
    # The same start for all: classifiers then differ by learning rate and weight decay alone.
    start = nn.init.trunc_normal_(torch.empty(1, *shape), std=std)
    return nn.Parameter(start.expand(num_classifiers, *shape).clone(memory_format=torch.contiguous_format))


def _batch_norm(x: Tensor, mean: Tensor, variance: Tensor, eps: float, *, training: bool) -> Tensor:
    """Batch norm without scale and shift.

    In training it takes the statistics of the images of all ranks, and moves the running `mean` and `variance` towards
    them; else it takes these.
    """
    if training:
        batch_mean, batch_variance = (part.view_as(mean) for part in mean_and_variance(x.flatten(1), correction=0))
        num_rows = len(x) * world_size()
        mean.lerp_(batch_mean.detach(), BATCH_NORM_MOMENTUM)
        variance.lerp_(batch_variance.detach() * num_rows / max(1, num_rows - 1), BATCH_NORM_MOMENTUM)
        mean, variance = batch_mean, batch_variance
    return (x - mean) / (variance + eps).sqrt()


class LinearClassifiers(nn.Module):
    """m linear classifiers of one vector per image, computed as one matrix product."""

    weight_std: ClassVar = INIT_STD

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = _normal_parameter(num_classifiers, num_classes, dim, std=self.weight_std)
        self.bias = nn.Parameter(torch.zeros(num_classifiers, num_classes))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier for each image."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)


class NormedClassifiers(LinearClassifiers):
    """m linear classifiers, each behind a batch norm of its own: what VISSL calls `eval_mlp`.

    All see the same vectors, so all norms have the same statistics, taken over the images of all ranks. Scale and shift
    are each classifier's own; they are multiplied into its weight, so that all is still one matrix product.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__(num_classifiers, dim, num_classes)
        self.norm_weight = nn.Parameter(torch.ones(num_classifiers, dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_classifiers, dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier for each image; in training, with the statistics of the images of all ranks."""
        normed = _batch_norm(x, self.running_mean, self.running_var, BATCH_NORM_EPS, training=self.training)
        weight = self.weight * self.norm_weight.unsqueeze(1)
        bias = _linear_each(self.norm_bias, self.weight, self.bias)
        return F.linear(normed, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)


class StandardisedClassifiers(LinearClassifiers):
    """m linear classifiers behind one batch norm without scale and shift: the linear probe of MAE (arXiv:2111.06377).

    Statistics are taken over the images of all ranks; the published code has those of each rank for itself.
    """

    weight_std = PROBE_INIT_STD
    eps = 1e-6
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__(num_classifiers, dim, num_classes)
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier for each image; in training, with the statistics of the images of all ranks."""
        return super().forward(_batch_norm(x, self.running_mean, self.running_var, self.eps, training=self.training))


class AttentiveClassifiers(nn.Module):
    """m classifiers, each of which pools the tokens by attention with one learned query before a linear layer.

    A query is known before the image is, so it is multiplied with the key weights instead of the tokens: a head's
    scores are then one vector's products with the tokens. And since attention weights sum to 1, tokens are pooled first
    and projected to values afterwards. Keys and values of the tokens, by far the largest part, are never computed.
    Keys have no bias: it would add the same to all scores of a head, which the softmax undoes.
    """

    weight_std: ClassVar = INIT_STD

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head_dim = largest_divisor(dim, HEAD_DIM)
        self.query = _normal_parameter(num_classifiers, dim)
        self.key_weight = _normal_parameter(num_classifiers, dim, dim)
        self.value_weight = _normal_parameter(num_classifiers, dim, dim)
        self.value_bias = nn.Parameter(torch.zeros(num_classifiers, dim))
        self.weight = _normal_parameter(num_classifiers, num_classes, dim, std=self.weight_std)
        self.bias = nn.Parameter(torch.zeros(num_classifiers, num_classes))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier for each image."""
        attended = self._attend(tokens, self.query, self.key_weight, self.value_weight, self.value_bias)
        # With the weight on the left, its gradient comes out in its own layout and needs no copy.
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, attended).permute(2, 0, 1)

    def _attend(
        self,
        tokens: Float[Tensor, "b n d"],
        query: Float[Tensor, "m d"],
        key_weight: Float[Tensor, "m d d"],
        value_weight: Float[Tensor, "m d d"],
        value_bias: Float[Tensor, "m d"],
    ) -> Float[Tensor, "m d b"]:
        m, d = query.shape
        # Views: were both in one parameter, each step would copy them and their gradients.
        key_weight, value_weight = (w.view(-1, self.head_dim, d) for w in (key_weight, value_weight))
        query = query.view(-1, 1, self.head_dim) / self.head_dim**0.5
        scores = F.linear(tokens, (query @ key_weight).squeeze(1))  # [b, n, m*heads]
        pooled = scores.softmax(dim=1).transpose(1, 2) @ tokens  # [b, m*heads, d]
        values = pooled.transpose(0, 1) @ value_weight.transpose(1, 2)  # [m*heads, b, head_dim]
        return values.transpose(1, 2).reshape(m, d, -1) + value_bias.unsqueeze(2)  # heads in a row


class AttentiveProbes(AttentiveClassifiers):
    """m attentive probes of arXiv:2202.03026: a query that attends to all tokens, then a linear layer.

    Query, keys and values each have a layer norm before them; what was attended to is projected, and goes through a
    batch norm without scale and shift, whose statistics are those of the images of all ranks. The norm of keys has no
    shift, as keys have no bias: see `AttentiveClassifiers`.
    """

    weight_std = PROBE_INIT_STD
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__(num_classifiers, dim, num_classes)
        nn.init.zeros_(self.query)
        self.norm_query_weight, self.norm_key_weight, self.norm_value_weight = (
            nn.Parameter(torch.ones(num_classifiers, dim)) for _ in range(3)
        )
        self.norm_query_bias, self.norm_value_bias, self.query_bias, self.proj_bias = (
            nn.Parameter(torch.zeros(num_classifiers, dim)) for _ in range(4)
        )
        self.query_weight = _normal_parameter(num_classifiers, dim, dim)
        self.proj_weight = _normal_parameter(num_classifiers, dim, dim)
        self.register_buffer("running_mean", torch.zeros(num_classifiers, dim))
        self.register_buffer("running_var", torch.ones(num_classifiers, dim))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier for each image; in training, with the statistics of the images of all ranks."""
        return self.classify(self.pool(tokens))

    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """What the query of every classifier attends to, projected."""
        query = F.layer_norm(self.query, self.query.shape[1:], eps=LAYER_NORM_EPS)
        query = query * self.norm_query_weight + self.norm_query_bias
        # Scale and shift of the norms are multiplied into the weights, so that all see the same normed tokens.
        attended = self._attend(
            F.layer_norm(tokens, tokens.shape[2:], eps=LAYER_NORM_EPS),
            _linear_each(query, self.query_weight, self.query_bias),
            self.key_weight * self.norm_key_weight.unsqueeze(1),
            self.value_weight * self.norm_value_weight.unsqueeze(1),
            _linear_each(self.norm_value_bias, self.value_weight, self.value_bias),
        )
        return torch.baddbmm(self.proj_bias.unsqueeze(2), self.proj_weight, attended).permute(2, 0, 1)

    def classify(self, pooled: Float[Tensor, "b m d"]) -> Float[Tensor, "b m k"]:
        """Logits of every classifier, from what `pool` gave for each image."""
        normed = _batch_norm(pooled, self.running_mean, self.running_var, BATCH_NORM_EPS, training=self.training)
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, normed.permute(1, 2, 0)).permute(2, 0, 1)


def _linear_each(
    x: Float[Tensor, "m d"], weight: Float[Tensor, "m k d"], bias: Float[Tensor, "m k"]
) -> Float[Tensor, "m k"]:
    """One vector of each classifier through a linear layer of its own."""
    return (weight @ x.unsqueeze(2)).squeeze(2) + bias


Classifiers = LinearClassifiers | AttentiveClassifiers


def make_classifiers(
    shapes: Mapping[str, torch.Size],
    num_classifiers: int,
    num_classes: int,
    seed: int,
    kinds: Mapping[str, type[Classifiers]],
) -> nn.ModuleDict:
    """Stacks of classifiers, attentive for representations of one vector per token, else linear.

    Args:
        shapes: representation -> its shape for one image, `[d]` or `[tokens, d]`.
        num_classifiers: in each stack.
        num_classes: classes to tell apart.
        seed: those of a representation are initialised from it and its name, whatever else is evaluated.
        kinds: representation -> classifiers of another kind.
    """
    classifiers = nn.ModuleDict()
    for name, shape in shapes.items():
        kind = kinds.get(name, AttentiveClassifiers if len(shape) == 2 else LinearClassifiers)
        with seeded(derive_seed(seed, "classifiers", name)):
            classifiers[name] = kind(num_classifiers, shape[-1], num_classes)
    return classifiers


class StackedOptimizer:
    """Updates stacked classifiers, each with its own learning rate and weight decay.

    Args:
        module: all its parameters have the classifiers as first axis.
        learning_rates, weight_decays: one of each classifier.
    """

    num_moments: ClassVar[int]
    """Tensors that are kept for each parameter."""

    def __init__(
        self, module: nn.Module, learning_rates: Float[Tensor, " m"], weight_decays: Float[Tensor, " m"]
    ) -> None:
        self.parameters = dict(module.named_parameters())
        self.learning_rates, self.weight_decays = learning_rates, weight_decays
        self.moments = {
            name: tuple(torch.zeros_like(p) for _ in range(self.num_moments)) for name, p in self.parameters.items()
        }

    def step(self, number: int, lr_scale: float) -> None:
        """Update all parameters from their gradients, which are overwritten: another tensor of their size costs time.

        Args:
            number: which update this is, from 1 on.
            lr_scale: what the learning rates are multiplied by.
        """
        raise NotImplementedError

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, p in self.parameters.items():
            assert p.grad is not None, f"{name} has no gradient"
            yield name, p, p.grad


def _along(values: Float[Tensor, " m"], p: Tensor) -> Tensor:
    """One value of each classifier, shaped to be multiplied with a parameter of all."""
    return values.view(-1, *[1] * (p.ndim - 1))


class StackedAdamW(StackedOptimizer):
    """AdamW (arXiv:1711.05101). Parameters whose name ends in `bias` do not decay."""

    num_moments = 2
    eps = 1e-8

    @torch.no_grad()
    def step(self, number: int, lr_scale: float) -> None:
        """Update all parameters from their gradients; see `StackedOptimizer.step`."""
        corrections = [1 - beta**number for beta in BETAS]
        for name, p, grad in self._gradients():
            lr = _along(lr_scale * self.learning_rates, p)
            if not name.endswith("bias"):
                p.mul_(1 - lr * _along(self.weight_decays, p))
            mean, square = self.moments[name]
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            # (mean / c0) / (sqrt(square / c1) + eps), with the corrections c0 and c1 moved into eps and the step size.
            deviation = torch.sqrt(square, out=grad).add_(self.eps * corrections[1] ** 0.5)
            p.addcmul_(torch.div(mean, deviation, out=grad), lr * (-(corrections[1] ** 0.5) / corrections[0]))


class StackedSGD(StackedOptimizer):
    """SGD with Nesterov momentum, as VISSL trains its linear classifiers: all but batch norms decays, biases too."""

    num_moments = 1

    @torch.no_grad()
    def step(self, number: int, lr_scale: float) -> None:
        """Update all parameters from their gradients; see `StackedOptimizer.step`."""
        for name, p, grad in self._gradients():
            if not name.split(".")[-1].startswith("norm_"):
                grad.addcmul_(p, _along(self.weight_decays, p))
            (velocity,) = self.moments[name]
            velocity.mul_(MOMENTUM).add_(grad)
            grad.add_(velocity, alpha=MOMENTUM)
            p.addcmul_(grad, _along(lr_scale * self.learning_rates, p), value=-1)


class StackedLARS(StackedOptimizer):
    """LARS (arXiv:1708.03888): the gradient of each matrix gets `TRUST` times the length of the matrix.

    Biases and batch norms neither decay nor are adapted.
    """

    num_moments = 1

    @torch.no_grad()
    def step(self, number: int, lr_scale: float) -> None:
        """Update all parameters from their gradients; see `StackedOptimizer.step`."""
        for name, p, grad in self._gradients():
            if p.ndim > 2:  # a matrix of each classifier
                grad.addcmul_(p, _along(self.weight_decays, p))
                length, grad_length = (x.flatten(1).norm(dim=1) for x in (p, grad))
                ratio = (TRUST * length / grad_length).where((length > 0) & (grad_length > 0), 1)
                grad.mul_(_along(ratio, p))
            (velocity,) = self.moments[name]
            velocity.mul_(MOMENTUM).add_(grad)
            p.addcmul_(velocity, _along(lr_scale * self.learning_rates, p), value=-1)


def any_label_loss(logits: Float[Tensor, "b m k"], labels: Int64[Tensor, "b l"]) -> Float[Tensor, " m"]:
    """Mean cross-entropy of each classifier; an image with several labels has each in equal parts as target."""
    given = labels >= 0
    label_logits = logits.gather(2, labels.clamp_min(0).unsqueeze(1).expand(-1, logits.shape[1], -1))
    mean_logit = (label_logits * given.unsqueeze(1)).sum(2) / given.sum(1, keepdim=True)
    return (logits.logsumexp(2) - mean_logit).mean(0)


@dataclass
class Training:
    """Everything that changes while classifiers train: what a checkpoint holds."""

    classifiers: nn.ModuleDict
    optimizer: StackedOptimizer
    step: int = 0
    """Finished updates."""
    validations: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """step -> representation -> accuracy of each classifier."""

    def state(self) -> dict[str, Any]:
        """What `torch.save` writes into a checkpoint."""
        return {
            "classifiers": self.classifiers.state_dict(),
            "moments": self.optimizer.moments,
            "step": self.step,
            "validations": self.validations,
        }

    def restore_(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.classifiers.load_state_dict(state["classifiers"])
        for name, moments in self.optimizer.moments.items():
            for moment, saved in zip(moments, state["moments"][name], strict=True):
                moment.copy_(saved)
        self.step, self.validations = state["step"], state["validations"]


def train_step(
    training: Training,
    inputs: Mapping[str, Float[Tensor, "b *tokens d"]],
    labels: Int64[Tensor, "b l"],
    lr_scale: float,
) -> dict[str, Tensor]:
    """One update of all classifiers, the same on all ranks.

    Args:
        training: what is updated.
        inputs: representation -> those of this rank's images.
        labels: their labels, padded with -1.
        lr_scale: what the learning rates are multiplied by.

    Returns: representation -> the loss of each of its classifiers [m], still on the device.
    """
    training.classifiers.train()
    losses = {name: any_label_loss(head(inputs[name]), labels) for name, head in training.classifiers.items()}
    training.classifiers.zero_grad()
    # Classifiers share nothing, so the gradient of the sum is that of each; one that diverges harms no other.
    torch.cat(list(losses.values())).sum().backward()
    for parameter in training.classifiers.parameters():
        assert parameter.grad is not None
        all_reduce_sum_(parameter.grad).div_(world_size())
    training.step += 1
    training.optimizer.step(training.step, lr_scale)
    return {name: loss.detach() for name, loss in losses.items()}


def pick(classifiers: Classifiers, number: int) -> Classifiers:
    """A stack that holds a copy of classifier `number` of this one alone."""
    _, dim = classifiers.weight.shape[1:]
    one = type(classifiers)(1, dim, classifiers.bias.shape[1]).to(classifiers.bias.device)
    shapes = {name: x.shape for name, x in one.state_dict().items()}
    state = classifiers.state_dict()
    # Statistics of a batch norm that sees the same for all classifiers have no axis of classifiers.
    one.load_state_dict({n: x if x.shape == shapes[n] else x[number : number + 1] for n, x in state.items()})
    return one


class CheckpointFile:
    """Where an interrupted training of classifiers continues; rank 0 writes, all ranks read.

    Args:
        path: the file.
        identity: what the training depends on; a checkpoint of another one is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity

    def save(self, training: Training) -> None:
        """Write the file, replacing an older one in one step; rank 0 does it."""
        if rank() == 0:
            save_atomically(self.path, {"identity": self.identity, **training.state()})

    def restore_(self, training: Training) -> None:
        """Continue where the file stands; without a file, nothing.

        Raises: UserError if it belongs to another training or cannot be read.
        """
        if not broadcast_object(self.path.is_file()):
            return
        remedy = f"choose another output_dir, or delete {self.path} to train anew"
        try:
            # Memory-mapped: the ranks of a machine need not hold a copy of it each.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path} cannot be read ({error}); delete it to train anew") from error
        if not isinstance(state, dict) or "identity" not in state:
            raise UserError(f"{self.path} was not written by an evaluation; {remedy}")
        changed = changed_keys(state["identity"], self.identity)
        if changed:
            what = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise UserError(f"{self.path} belongs to another training ({what}); {remedy}")
        try:
            training.restore_(state)
        except (RuntimeError, KeyError) as error:  # another version of this script wrote it
            what = str(error).splitlines()[0]
            raise UserError(f"{self.path} holds other classifiers than these ({what}); {remedy}") from error
        logger.info("continuing after step %d", training.step)

    def remove(self) -> None:
        """Delete the file, once all ranks are here; to be called when all results are written."""
        barrier()
        if rank() == 0:
            self.path.unlink(missing_ok=True)
