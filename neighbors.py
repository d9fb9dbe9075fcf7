"""Exact nearest neighbours in bounded memory, and the vote among them."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

DISTANCES = ("cosine", "L2", "L1", "Linf", "inner_product")
TRAIN_CHUNK = 262_144
BLOCK = 2**26
"""Most similarities, or votes, that are held at once."""
COLUMNS = 2**16
"""Training rows of such a block: about square, it reuses what a product reads most."""
GROUP = 64
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

    Memory beside the arguments: a block of `BLOCK` similarities and a chunk of the training rows, in which they are
    cast, normalised and moved to the device of the queries.

    Args:
        queries: on the device where it is computed.
        train: on any device.
        k: at most n.
        distance: one of `DISTANCES`.
        train_chunk: training rows compared at a time.
        dtype: of the products; bfloat16 halves memory and time on a GPU and may swap close neighbours.

    Returns: similarities, nearest first (for L2 without the query's own norm: 2 q.x - x.x), and row numbers.
    """
    train_chunk = min(train_chunk, len(train))
    queries = _prepare(queries, distance, dtype)
    num = len(queries)
    best = queries.new_full((num, 0), 0, dtype=torch.float32)
    rows = torch.empty(num, 0, dtype=torch.int64, device=queries.device)
    num_columns = min(max(COLUMNS, MIN_GROUPS * k * GROUP), len(train))
    # One for all: fresh memory of this size comes from the system, which clears it first.
    num_held = min(max(BLOCK, num_columns), num * num_columns) if dtype == torch.float32 else 0
    block = torch.empty(num_held, device=queries.device)
    for start in range(0, len(train), train_chunk):
        chunk = _prepare(train[start : start + train_chunk].to(queries.device), distance, dtype)
        for first, part in zip(range(start, start + len(chunk), num_columns), chunk.split(num_columns), strict=True):
            found = [
                _largest(_similarity(some, part, distance, block), min(k, len(part)))
                for some in queries.split(max(1, BLOCK // len(part)))
            ]
            best = torch.cat([best, torch.cat([values for values, _ in found])], dim=1)
            rows = torch.cat([rows, torch.cat([columns for _, columns in found]) + first], dim=1)
            # Ties keep the earlier row: a stable sort of at most 2 k candidates.
            order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
            best, rows = best.gather(1, order), rows.gather(1, order)
    return best, rows


def _prepare(x: Tensor, distance: str, dtype: torch.dtype) -> Tensor:
    x = x.float()
    return (F.normalize(x, dim=1) if distance == "cosine" else x).to(dtype)


def _similarity(queries: Tensor, train: Tensor, distance: str, block: Tensor) -> Tensor:
    """All of them; in float32, of the memory `block` where it is a product."""
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
    num_groups, rest = divmod(x.shape[1], GROUP)
    if num_groups < MIN_GROUPS * k:
        values, columns = x.topk(k, dim=1)
        return values, columns
    grouped = x[:, : num_groups * GROUP].unflatten(1, (num_groups, GROUP))
    groups = grouped.amax(dim=2).topk(k, dim=1, sorted=False).indices.unsqueeze(2)
    candidates = grouped.gather(1, groups.expand(-1, -1, GROUP)).flatten(1)
    columns = (groups * GROUP + torch.arange(GROUP, device=x.device)).flatten(1)
    if rest:
        candidates = torch.cat([candidates, x[:, -rest:]], dim=1)
        last = torch.arange(x.shape[1] - rest, x.shape[1], device=x.device)
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
        labels: of the training rows: p labels each, such as those of a patch's pixels.
        ks: numbers of neighbours to ask; at most as many as there are.
    """
    num_labels = int(labels.max()) + 1
    per_block = max(1, BLOCK // (labels.shape[1] * num_labels))
    predicted = {
        k: torch.empty(len(neighbors), labels.shape[1], dtype=torch.uint8, device=neighbors.device) for k in ks
    }
    for start in range(0, len(neighbors), per_block):
        some = neighbors[start : start + per_block]
        counts = torch.zeros(len(some), labels.shape[1], num_labels, dtype=torch.int16, device=neighbors.device)
        one = counts.new_ones(1, 1, 1).expand(len(some), labels.shape[1], 1)
        asked = 0
        for k in sorted(ks):
            for column in range(asked, k):
                votes = labels[some[:, column].to(labels.device)].to(neighbors.device)
                counts.scatter_add_(2, votes.long().unsqueeze(2), one)
            asked = k
            predicted[k][start : start + per_block] = counts.argmax(dim=2).to(torch.uint8)
    for k in sorted(ks):
        yield k, predicted[k]


def weighted_vote(
    similarity: Float[Tensor, "q k"], labels: Int64[Tensor, "q k l"], num_classes: int, temperature: float
) -> Float[Tensor, "q c"]:
    """Votes for each class, a neighbour's weight being exp(similarity / temperature): DINO (arXiv:2104.14294).

    Args:
        similarity: cosine similarities of the neighbours.
        labels: of the neighbours, padded with -1; one with several labels votes for each.
        num_classes: c.
        temperature: 0.07 there; small for a vote of the nearest.
    """
    weights = (similarity / temperature).exp().unsqueeze(2) * (labels >= 0)
    empty = torch.zeros(len(labels), num_classes, device=similarity.device)
    return empty.scatter_add_(1, labels.clamp_min(0).flatten(1), weights.flatten(1))
