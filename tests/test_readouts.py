"""readouts.py against goldens, scikit-learn and plain loops; golden labels of k-NN are in test_eval_segmentation.py."""

import itertools

import numpy as np
import pytest
import torch
from conftest import load_golden, load_golden_json, seeded
from golden_cae import IMAGES, fill
from ranks import run_on_ranks
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import readouts
from cae import Encoder
from distributed import rank, world_size
from readouts import (
    GROUP_SIZE,
    AttentiveClassifiers,
    AttentiveProbes,
    LinearClassifiers,
    LogisticModel,
    NormedClassifiers,
    StackedAdamW,
    StackedLARS,
    StackedSGD,
    StandardisedClassifiers,
    any_label_loss,
    any_match,
    fit_logistic,
    knn_num_correct,
    mean_and_variance,
    nearest,
    pick,
    weighted_vote,
)

# ---------------------------------------------------------------------------------------------------- shared


def test_any_match_equals_golden():
    golden, _ = load_golden("evaluation")
    correct = any_match(golden["anymatch.preds"].permute(2, 0, 1), golden["anymatch.targets"])
    expected = load_golden_accuracy()
    torch.testing.assert_close(correct.float().mean(0), torch.tensor(expected))


def load_golden_accuracy():
    return load_golden_json("evaluation")["anymatch_top1"]


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
        torch.testing.assert_close(votes / votes.sum(), torch.tensor([expected]) / sum(expected))


@pytest.mark.parametrize("temperature", [0.07, 0.01, 1e-6])
def test_votes_are_finite_at_every_temperature(temperature):
    """exp(1 / 0.01) is more than float32 holds."""
    bank, labels = torch.eye(8).repeat(2, 1), (torch.arange(16) % 8 // 2).unsqueeze(1)
    correct = knn_num_correct(bank, labels, bank, labels, [1, 2, 16], num_classes=4, temperature=temperature)
    assert correct.tolist() == [16, 16, 16]


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


def stop_example(num, row_labels, part):
    """Features and labels of the example of StoP's evaluation, in float64; see `data` in vectors_stop.json."""
    flat = torch.arange(num * 8, dtype=torch.float64).view(num, 8)
    labels = (row_labels * torch.arange(num)) % 3
    column, one_hot = torch.arange(8), F.one_hot(labels, 8)
    if part == "train":
        return (1.618 * flat).sin() + 0.5 * column + 0.35 * one_hot, labels
    x = 0.6 * (0.917 * flat).cos() + 0.4 * column + 0.9 * one_hot
    x[:, 0] += 0.8
    return x, labels


@pytest.mark.parametrize("number", [0, 1, 2], ids=["0.0025", "0.00025", "1"])
def test_logistic_regression_of_stop_reaches_the_optimum_of_its_vectors(number):
    golden = load_golden_json("vectors_stop")["logistic_eval"]
    expected = golden["results"][number]
    x, y = stop_example(60, 7, "train")
    test_x, test_y = stop_example(48, 5, "test")
    torch.testing.assert_close(x.std(0)[:3], torch.tensor(golden["std_check"], dtype=torch.float64))
    c = 1 / expected["lambda_cli"]
    fitted = LogisticModel.fit(x, y, 3, c, scaling="standard", max_iter=10_000, correction=1, intercept=False)
    loss = F.cross_entropy(fitted.logits(x).squeeze(1), y)
    objective = loss + expected["lambda_effective"] / 2 * fitted.weight.square().sum()
    assert objective.item() == pytest.approx(expected["objective"], rel=1e-7)
    assert fitted.weight.norm().item() == pytest.approx(expected["W_frobenius"], rel=1e-4)
    assert not fitted.bias.any(), "there is an intercept"

    def accuracy(model, features, labels):
        return model.num_correct(features, labels.unsqueeze(1)) / len(labels)

    assert accuracy(fitted, x, y) == expected["train_acc"]
    assert accuracy(fitted, test_x, test_y) == expected["test_acc_with_train_stats"]
    transductive = fitted.with_statistics_of(test_x)
    assert accuracy(transductive, test_x, test_y) == expected["test_acc_with_own_test_stats"]


def share_of_rows(x, sizes):
    x = x.split(sizes)[rank()]
    model = LogisticModel("standard", torch.zeros(3), torch.ones(3), torch.zeros(2, 3), torch.zeros(2))
    # A rank without images does not know how wide features are.
    return *mean_and_variance(x, 1), *model.with_statistics_of(x if len(x) else torch.empty(0, 1))[1:3]


@pytest.mark.parametrize("sizes", [[3, 5], [0, 8]])
def test_mean_and_variance_are_those_of_the_rows_of_all_ranks(sizes):
    x = torch.randn(8, 3, generator=seeded(0)) * 5 + 100
    x[:, 2] = 7
    variance, mean = torch.var_mean(x, dim=0)
    for ours in run_on_ranks(share_of_rows, 2, x, sizes):
        torch.testing.assert_close(ours[:2], (mean, variance))
        torch.testing.assert_close(ours[2:], (mean, variance.sqrt().where(variance > 0, 1)))


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


# --- Published probes


def published_probe(dim=32, num_classes=10):
    """The encoder of the vectors, and the state of their tiny attentive model, of which it is a part."""
    encoder = Encoder(grid_size=4, patch_size=8, embed_dim=dim, depth=2, num_heads=4)
    shapes = {"query_token": (1, 1, dim), "head.weight": (num_classes, dim), "head.bias": (num_classes,)}
    block = "attentive_blocks.0"
    shapes |= {f"{block}.cross_attn.{name}": (dim,) for name in ("q_bias", "v_bias", "proj.bias")}
    shapes |= {f"{block}.cross_attn.{name}.weight": (dim, dim) for name in ("q", "k", "v", "proj")}
    shapes |= {f"{block}.norm_{name}.{kind}": (dim,) for name in "qkv" for kind in ("weight", "bias")}
    shapes |= {f"fc_norm.{name}": () for name in ("running_mean", "running_var", "num_batches_tracked")}
    state = encoder.state_dict() | {name: torch.empty(shape) for name, shape in shapes.items()}
    fill(state, skipped="fc_norm")
    return encoder, state


@torch.no_grad()
def test_attentive_probe_equals_its_vectors(monkeypatch):
    monkeypatch.setattr(readouts, "HEAD_DIM", 8)
    golden = load_golden_json("vectors_cae")["attentive_tiny_with_kwargs_removed"]
    encoder, state = published_probe()
    tokens = encoder.encode(IMAGES)
    probe = AttentiveProbes(1, 32, 10)
    cross = "attentive_blocks.0.cross_attn"
    names = {"query": "query_token", "weight": "head.weight", "bias": "head.bias", "query_bias": f"{cross}.q_bias",
             "value_bias": f"{cross}.v_bias"}  # fmt: skip
    names |= {f"{name}_weight": f"{cross}.{name[0]}.weight" for name in ("query", "key", "value")}
    names |= {f"proj_{kind}": f"{cross}.proj.{kind}" for kind in ("weight", "bias")}
    for name in ("query", "key", "value"):
        names |= {f"norm_{name}_{kind}": f"attentive_blocks.0.norm_{name[0]}.{kind}" for kind in ("weight", "bias")}
    del names["norm_key_bias"]  # changes nothing
    assert names.keys() == dict(probe.named_parameters()).keys()
    for name, key in names.items():
        parameter = probe.get_parameter(name)
        parameter.copy_(state[key].view(parameter.shape))
    for training, expected in ((False, golden["running_stats"]), (True, golden["batch_stats"])):
        out = probe.train(training)(tokens)[:, 0, :4]
        torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def probe_by_the_book(stack, m, tokens):
    """Logits of probe m in training, in float64, each of its layers for itself."""
    own = {name: parameter[m].double() for name, parameter in stack.named_parameters()}
    d = tokens.shape[-1]

    def normed(x, name):
        return F.layer_norm(x, (d,), own[f"norm_{name}_weight"], own.get(f"norm_{name}_bias"), eps=1e-6)

    query = F.linear(normed(own["query"], "query"), own["query_weight"], own["query_bias"]).expand(len(tokens), 1, d)
    keys = F.linear(normed(tokens, "key"), own["key_weight"])
    values = F.linear(normed(tokens, "value"), own["value_weight"], own["value_bias"])
    query, keys, values = (x.unflatten(-1, (-1, stack.head_dim)).transpose(1, 2) for x in (query, keys, values))
    pooled = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)
    pooled = F.batch_norm(F.linear(pooled, own["proj_weight"], own["proj_bias"]), None, None, training=True, eps=1e-5)
    return F.linear(pooled, own["weight"], own["bias"])


def random_probes():
    torch.manual_seed(0)
    stack = AttentiveProbes(2, 96, 5)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    return stack


PROBED = torch.randn(8, 7, 96, generator=seeded(0))
DIRECTION = torch.randn(8, 2, 5, generator=seeded(1))


def test_attentive_probes_and_their_gradients_equal_their_layers_one_by_one():
    stack = random_probes()
    out = stack(PROBED)
    expected = torch.stack([probe_by_the_book(stack, m, PROBED.double()) for m in range(2)], dim=1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad((out * DIRECTION).sum(), list(stack.parameters()))
    wanted = torch.autograd.grad((expected * DIRECTION).sum(), list(stack.parameters()))
    for (name, _), ours, theirs in zip(stack.named_parameters(), actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def probe_gradients_of_my_share():
    stack = random_probes()
    tokens, direction = (x.chunk(world_size())[rank()] for x in (PROBED, DIRECTION))
    out = stack(tokens)
    return out.detach(), torch.autograd.grad((out * direction).sum(), list(stack.parameters()))


def test_attentive_probes_and_their_gradients_are_the_same_on_one_and_two_ranks():
    outs, gradients = zip(*run_on_ranks(probe_gradients_of_my_share, 2), strict=True)
    expected, wanted = probe_gradients_of_my_share()
    torch.testing.assert_close(torch.cat(outs), expected)
    for number, (one, two) in enumerate(zip(*gradients, strict=True)):
        torch.testing.assert_close(one + two, wanted[number], rtol=1e-3, atol=1e-4)


def test_an_attentive_probe_starts_with_a_query_of_zeros_and_its_query_learns():
    stack = AttentiveProbes(2, 96, 5)
    assert not stack.query.any() and stack.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(stack.weight[0], stack.weight[1]), "probes of a grid start differently"
    (gradient,) = torch.autograd.grad((stack(PROBED) * DIRECTION).sum(), stack.norm_query_bias)
    assert gradient.any()


def test_standardised_classifiers_equal_a_batch_norm_without_affine_and_a_linear_layer():
    stack = StandardisedClassifiers(2, 6, 4)
    assert stack.weight.std().item() == pytest.approx(0.01, rel=0.3)
    norm = nn.BatchNorm1d(6, affine=False, eps=1e-6).double()
    for number in range(3):
        x = torch.randn(8, 6, generator=seeded(number)) * 3e-3 + torch.arange(6)
        out, normed = stack(x), norm(x.double())
        for m in range(2):
            expected = F.linear(normed, stack.weight[m].double(), stack.bias[m].double())
            torch.testing.assert_close(out[:, m].double(), expected, rtol=1e-3, atol=1e-4)
    out = pick(stack, 1).eval()(x)[:, 0]
    expected = F.linear(norm.eval()(x.double()), stack.weight[1].double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


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


def norm_and_linear(stack, m):
    """Classifier m of the stack as two layers of torch, in float64."""
    norm, linear = nn.BatchNorm1d(stack.weight.shape[2]), nn.Linear(*reversed(stack.weight.shape[1:]))
    with torch.no_grad():
        for ours, theirs in (
            (stack.norm_weight, norm.weight), (stack.norm_bias, norm.bias), (stack.weight, linear.weight),
            (stack.bias, linear.bias),
        ):  # fmt: skip
            theirs.copy_(ours[m])
    return nn.Sequential(norm, linear).double()


def test_normed_classifiers_equal_a_batch_norm_and_a_linear_layer_each():
    stack = NormedClassifiers(3, 6, 4)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    alone = [norm_and_linear(stack, m) for m in range(3)]
    direction = torch.randn(8, 3, 4, generator=seeded(9))
    for number in range(3):
        x = torch.randn(8, 6, generator=seeded(number)) * 3 + torch.arange(6)
        out, expected = stack(x), torch.stack([one(x.double()) for one in alone], dim=1)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad((out * direction).sum(), list(stack.parameters()))
    wanted = [torch.autograd.grad((expected[:, m] * direction[:, m]).sum(), one.parameters()) for m, one in
              enumerate(alone)]  # fmt: skip
    order = dict(zip(("norm_weight", "norm_bias", "weight", "bias"), zip(*wanted, strict=True), strict=True))
    for (name, _), gradient in zip(stack.named_parameters(), actual, strict=True):
        torch.testing.assert_close(gradient.double(), torch.stack(order[name]), rtol=1e-4, atol=1e-4)
    stack.eval()
    expected = torch.stack([one.eval()(x.double()) for one in alone], dim=1)
    torch.testing.assert_close(stack(x).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pick(stack, 2).eval()(x)[:, 0], stack(x)[:, 2])


def normed_on_my_share(x):
    torch.manual_seed(0)
    stack = NormedClassifiers(2, 6, 4)
    return stack(x.chunk(world_size())[rank()]).detach(), stack.running_mean, stack.running_var


def test_batch_norm_is_over_the_images_of_all_ranks():
    x = torch.randn(8, 6, generator=seeded(0)) * 3 + 1
    outs, means, variances = zip(*run_on_ranks(normed_on_my_share, 2, x), strict=True)
    expected, mean, variance = normed_on_my_share(x)
    torch.testing.assert_close(torch.cat(outs), expected)
    torch.testing.assert_close((means[0], variances[0]), (mean, variance))
    assert torch.equal(means[0], means[1])


GRID = torch.tensor([[0.1, 5e-4], [0.01, 5e-4], [6.4, 0.0]])
"""Learning rate and weight decay of three classifiers."""
STEPS = ((1, 1.0), (2, 1.0), (3, 0.1))
"""Number of a step, and what learning rates are multiplied by."""


def gradients(stack, number):
    return {name: torch.randn(p.shape, generator=seeded(10 * number + len(name))) for name, p in
            stack.named_parameters()}  # fmt: skip


def steps_of(optimizer, stack):
    """Take the steps; of each, the gradients and the learning rates of the classifiers."""
    for number, lr_scale in STEPS:
        for name, gradient in gradients(stack, number).items():
            stack.get_parameter(name).grad = gradient
        optimizer.step(number, lr_scale)
        yield gradients(stack, number), lr_scale * GRID[:, 0]


def test_stacked_sgd_equals_torch_sgd_of_each_classifier_and_batch_norms_do_not_decay():
    stack = NormedClassifiers(3, 6, 4)
    alone = [{name: nn.Parameter(p[m].detach().clone()) for name, p in stack.named_parameters()} for m in range(3)]
    others = [
        torch.optim.SGD(
            [{"params": [p], "weight_decay": 0.0 if name.startswith("norm") else wd} for name, p in named.items()],
            lr=lr, momentum=0.9, nesterov=True,
        )
        for named, (lr, wd) in zip(alone, GRID.tolist(), strict=True)
    ]  # fmt: skip
    for given, rates in steps_of(StackedSGD(stack, *GRID.T), stack):
        for m, (optimizer, rate) in enumerate(zip(others, rates.tolist(), strict=True)):
            for name, p in alone[m].items():
                p.grad = given[name][m]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    for m, (name, p) in itertools.product(range(3), stack.named_parameters()):
        torch.testing.assert_close(p[m], alone[m][name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("golden", [load_golden_json("lars"), load_golden_json("vectors_cae")["lars_two_steps"]])
def test_lars_equals_its_vectors(golden):
    stack = LinearClassifiers(1, 2, 2)
    with torch.no_grad():
        stack.weight[0], stack.bias[0] = torch.tensor(golden["init_W"]), torch.tensor(golden["init_b"])
    optimizer = StackedLARS(stack, torch.tensor([golden["lr"]]), torch.tensor([float(golden["wd"])]))
    for number, after in enumerate(golden["after"], 1):
        stack.weight.grad, stack.bias.grad = torch.tensor([golden["grad_W"]]), torch.tensor([golden["grad_b"]])
        optimizer.step(number, 1.0)
        torch.testing.assert_close(stack.weight[0].detach(), torch.tensor(after["W"]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(stack.bias[0].detach(), torch.tensor(after["b"]), rtol=1e-6, atol=1e-7)


def test_stacked_lars_equals_a_plain_loop_in_float64():
    stack = NormedClassifiers(3, 6, 4)
    with torch.no_grad():
        stack.weight[1] = 0  # has no length, so its gradient is taken as it is
    start = {name: p.detach().double().clone() for name, p in stack.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in start.items()}
    for given, rates in steps_of(StackedLARS(stack, *GRID.T), stack):
        for (name, p), m in itertools.product(start.items(), range(3)):
            grad = given[name][m].double()
            if name == "weight":
                grad = grad + GRID[m, 1].double() * p[m]
                length, grad_length = p[m].square().sum().sqrt(), grad.square().sum().sqrt()
                grad = grad * (0.001 * length / grad_length if length > 0 else 1)
            velocity[name][m] = 0.9 * velocity[name][m] + grad
            p[m] -= rates[m].double() * velocity[name][m]
    for name, p in stack.named_parameters():
        torch.testing.assert_close(p.double(), start[name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def test_loss_is_cross_entropy_with_all_labels_of_an_image_as_target():
    logits = torch.randn(3, 2, 4, generator=seeded(0), dtype=torch.float64)
    labels = torch.tensor([[2, -1], [-1, 0], [1, 3]])
    targets = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0.5, 0, 0.5]], dtype=torch.float64)
    for m in range(2):
        expected = F.cross_entropy(logits[:, m], targets)
        torch.testing.assert_close(any_label_loss(logits, labels)[m], expected)
