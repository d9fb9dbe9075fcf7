"""readouts.py against goldens, scikit-learn and plain loops; golden labels of k-NN are in test_eval_segmentation.py."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_golden, seeded
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import readouts
from readouts import (
    GROUP_SIZE,
    AttentiveClassifiers,
    LinearClassifiers,
    LogisticModel,
    StackedAdamW,
    any_label_loss,
    any_match,
    fit_logistic,
    nearest,
    weighted_vote,
)

# ---------------------------------------------------------------------------------------------------- shared


def test_any_match_equals_golden():
    golden, _ = load_golden("evaluation")
    correct = any_match(golden["anymatch.preds"].permute(2, 0, 1), golden["anymatch.targets"])
    expected = load_golden_accuracy()
    torch.testing.assert_close(correct.float().mean(0), torch.tensor(expected))


def load_golden_accuracy():
    return json.loads((Path(__file__).parent / "golden" / "evaluation.json").read_text())["anymatch_top1"]


def test_a_mapping_restricts_and_renumbers_the_classes():
    logits = torch.tensor([[[9.0, 1.0, 2.0, 3.0]], [[9.0, 5.0, 4.0, 3.0]]])
    labels = torch.tensor([[0], [1]])
    assert any_match(logits, labels).flatten().tolist() == [True, False]
    assert any_match(logits, labels, torch.tensor([3, 1])).flatten().tolist() == [True, True]


def test_predictions_that_are_not_finite_are_wrong():
    logits = torch.tensor([[[torch.nan, 1.0]], [[1.0, torch.nan]], [[-torch.inf, -torch.inf]]])
    assert not any_match(logits, torch.tensor([[0, 1]] * 3)).any()


# ---------------------------------------------------------------------------------------- nearest neighbours


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
    monkeypatch.setattr(readouts, "BLOCK_COLUMNS", num_columns)
    monkeypatch.setattr(readouts, "BLOCK_SIZE", block)
    k, num = 3, 4995
    assert num % GROUP_SIZE, "some rows must be left over"
    assert min(num, train_chunk) > 8 * k * GROUP_SIZE, "too few rows for groups"
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


def test_votes_are_weighted_by_similarity_and_counted_for_every_label():
    similarity = torch.tensor([[0.9, 0.8, 0.7]])
    labels = torch.tensor([[[1, -1], [0, 2], [0, -1]]])
    near, second, third = (similarity[0] / 0.07).exp().tolist()
    for k, expected in ((1, [0, near, 0, 0]), (3, [second + third, near, second, 0])):
        votes = weighted_vote(similarity[:, :k], labels[:, :k], 4, 0.07)
        torch.testing.assert_close(votes, torch.tensor([expected]))


# --------------------------------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_probabilities_are_those_of_scikit_learn(num_classes, c):
    x = torch.randn(400, 12, generator=seeded(0))
    y = (x[:, :num_classes] + torch.randn(400, num_classes, generator=seeded(1))).argmax(1)
    weight, bias = fit_logistic(x, y, num_classes, c)
    oracle = LogisticRegression(C=c, max_iter=1000, tol=1e-10).fit(x.double().numpy(), y.numpy())
    actual = (x @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(actual.numpy(), oracle.predict_proba(x.double().numpy()), atol=1e-3)


def test_a_class_that_does_not_occur_is_never_predicted():
    x = torch.randn(100, 4, generator=seeded(0))
    y = torch.where(x[:, 0] > 0, 1, 3)
    weight, bias = fit_logistic(x, y, 5, 10.0)
    predicted = (x @ weight.T + bias).argmax(1)
    assert set(predicted.tolist()) == {1, 3}
    assert (predicted == y).double().mean() > 0.95


def test_the_features_are_not_modified():
    x = torch.randn(50, 4, generator=seeded(0))
    before = x.clone()
    fit_logistic(x, (x[:, 0] > 0).long(), 2, 1.0)
    assert torch.equal(x, before)


def test_logistic_regression_is_that_of_scikit_learn_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = torch.randn(60, 5, generator=seeded(0)) * torch.tensor([1, 10, 0.1, 1, 0]) + 3
    y = (x[:, 0] + torch.randn(60, generator=seeded(1)) > 3).long() + (x[:, 1] > 8).long()
    ours = LogisticModel.fit(x, y, 3, 0.5, scaling="standard", max_iter=1000)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-10)).fit(x.numpy(), y.numpy())
    actual = ours.logits(x).squeeze(1).softmax(1)
    torch.testing.assert_close(
        actual.double(), torch.tensor(theirs.predict_proba(x.numpy())).double(), rtol=0, atol=2e-3
    )


# --------------------------------------------------------------------------------------- trained classifiers


def test_attentive_classifier_equals_golden_wherever_it_is_in_the_stack():
    golden, _ = load_golden("evaluation")
    stack = AttentiveClassifiers(3, 128, 10)
    key_weight, value_weight = golden["attnpool.kv.weight"].chunk(2)
    values = {
        "query": golden["attnpool.query_token"],
        "key_weight": key_weight,
        "value_weight": value_weight,
        "value_bias": golden["attnpool.kv.bias"].chunk(2)[1],
        "weight": golden["attnpool.linear.weight"],
        "bias": golden["attnpool.linear.bias"],
    }
    with torch.no_grad():
        for name, value in values.items():
            getattr(stack, name)[1] = value
        out = stack(golden["attnpool.x"])
    torch.testing.assert_close(out[:, 1], golden["attnpool.out"], rtol=0, atol=1e-5)
    assert not torch.allclose(out[:, 0], out[:, 1])


def attention_by_the_book(stack, m, tokens):
    """Keys and values of every token, for one of the stacked classifiers, in float64."""
    dim = stack.query.shape[1]
    keys = F.linear(tokens, stack.key_weight[m].double())
    values = F.linear(tokens, stack.value_weight[m].double(), stack.value_bias[m].double())
    keys, values = (x.unflatten(-1, (-1, stack.head_dim)).transpose(1, 2) for x in (keys, values))
    query = stack.query[m].double().expand(len(tokens), 1, dim).unflatten(-1, (-1, stack.head_dim)).transpose(1, 2)
    pooled = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)
    return F.linear(pooled, stack.weight[m].double(), stack.bias[m].double())


@pytest.mark.parametrize("dim", [128, 96, 8])
def test_attentive_classifiers_and_their_gradients_equal_attention_by_the_book(dim):
    stack = AttentiveClassifiers(3, dim, 5)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(4, 7, dim, generator=seeded(0))
    direction = torch.randn(4, 3, 5, generator=seeded(1))
    out = stack(tokens)
    expected = torch.stack([attention_by_the_book(stack, m, tokens.double()) for m in range(3)], dim=1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad((out * direction).sum(), list(stack.parameters()))
    wanted = torch.autograd.grad((expected * direction).sum(), list(stack.parameters()))
    for (name, _), ours, theirs in zip(stack.named_parameters(), actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_linear_classifiers_equal_one_linear_layer_each():
    stack = LinearClassifiers(3, 6, 4)
    nn.init.normal_(stack.bias)
    with torch.no_grad():
        stack.weight.mul_(torch.arange(1, 4).view(3, 1, 1))
    x = torch.randn(5, 6, generator=seeded(0))
    for m in range(3):
        torch.testing.assert_close(stack(x)[:, m], F.linear(x, stack.weight[m], stack.bias[m]))


def test_stacked_adamw_equals_torch_adamw_of_each_classifier():
    grid = [(1e-2, 0.05), (1e-3, 0.5), (3e-1, 0.0)]
    stack = AttentiveClassifiers(len(grid), 8, 4)
    alone = [{name: nn.Parameter(p[m].detach().clone()) for name, p in stack.named_parameters()} for m in range(3)]
    others = [
        torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": 0.0 if name in ("bias", "value_bias") else wd}
                for name, p in parameters.items()
            ],
            lr=lr,
            betas=(0.9, 0.95),
        )
        for parameters, (lr, wd) in zip(alone, grid, strict=True)
    ]
    ours = StackedAdamW(stack, *torch.tensor(grid).T)
    for number, lr_scale in enumerate((0.0, 0.5, 1.0, 0.7), 1):
        for name, p in stack.named_parameters():
            # The smallest are of the size of epsilon.
            sizes = torch.tensor([1e-8, 1.0, 100.0]).view(-1, *[1] * (p.ndim - 1))
            p.grad = torch.randn(p.shape, generator=seeded(number)) * sizes
            for m in range(3):
                alone[m][name].grad = p.grad[m].clone()
        ours.step(number, lr_scale)
        for optimizer, (lr, _) in zip(others, grid, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_scale
            optimizer.step()
    for m, (name, p) in itertools.product(range(3), stack.named_parameters()):
        torch.testing.assert_close(p[m], alone[m][name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def test_loss_is_cross_entropy_with_all_labels_of_an_image_as_target():
    logits = torch.randn(3, 2, 4, generator=seeded(0), dtype=torch.float64)
    labels = torch.tensor([[2, -1], [-1, 0], [1, 3]])
    targets = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0.5, 0, 0.5]], dtype=torch.float64)
    for m in range(2):
        expected = F.cross_entropy(logits[:, m], targets)
        torch.testing.assert_close(any_label_loss(logits, labels)[m], expected)
