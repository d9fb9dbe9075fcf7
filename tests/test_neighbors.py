"""neighbors.py against sorting all distances in float64; golden labels are in test_eval_segmentation.py."""

import pytest
import torch
from conftest import seeded

import neighbors
from neighbors import GROUP, nearest


def similarities_by_the_book(queries, train, distance):
    queries, train = queries.double(), train.double()
    if distance == "cosine":
        return torch.nn.functional.cosine_similarity(queries[:, None], train[None], dim=2)
    difference = queries[:, None] - train[None]
    return -difference.square().sum(dim=2) if distance == "L2" else -difference.abs().sum(dim=2)


@pytest.mark.parametrize("distance", ["cosine", "L2", "L1"])
@pytest.mark.parametrize("train_chunk", [5000, 2000], ids=["one chunk", "three"])
@pytest.mark.parametrize(("num_columns", "block"), [(2**16, 2**26), (1600, 1600 * 7)], ids=["one block", "many"])
def test_many_rows_are_searched_exactly(distance, train_chunk, num_columns, block, monkeypatch):
    monkeypatch.setattr(neighbors, "COLUMNS", num_columns)
    monkeypatch.setattr(neighbors, "BLOCK", block)
    k, num = 3, 4995
    assert num % GROUP, "some rows must be left over"
    assert min(num, train_chunk) > 8 * k * GROUP, "too few rows for groups"
    queries = torch.randn(20, 6, generator=seeded(0))
    train = torch.randn(num, 6, generator=seeded(1))
    # Near ones side by side, so in one group; at the first rows; and at the last.
    for query, first in ((0, 70), (1, 0), (2, num - k)):
        train[first : first + k] = queries[query] * torch.tensor([[1.001], [1.002], [1.003]])
        train[first : first + k] += torch.tensor([[0.01], [0.02], [0.03]])
    similarity, rows = nearest(queries, train, k, distance, train_chunk=train_chunk)
    expected = similarities_by_the_book(queries, train, distance).argsort(dim=1, descending=True)[:, :k]
    assert torch.equal(rows, expected)
    assert (similarity.diff(dim=1) <= 0).all(), "nearest first"
    assert rows[2].min() >= num - k, "the last rows are those that were put there"
