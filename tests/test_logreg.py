"""logreg.py against scikit-learn in float64."""

import numpy as np
import pytest
import torch
from conftest import seeded
from sklearn.linear_model import LogisticRegression

from logreg import fit_logistic


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
