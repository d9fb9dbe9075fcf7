"""Multinomial logistic regression on features that stay where they are, CPU or GPU."""

import os
import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    c: float,
    *,
    max_iter: int = 1000,
    tol: float = 1e-12,
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

    Returns: weight and bias, on the device of the features; logits are `features @ weight.T + bias`.
    """
    os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn wants it set before it takes tensors
    import sklearn
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present, compact = labels.unique(return_inverse=True)
    with sklearn.config_context(array_api_dispatch=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=c, max_iter=max_iter, tol=tol).fit(features, compact)
    rows, intercepts = fitted.coef_, fitted.intercept_
    if len(present) == 2:  # one row then says how much the second class is ahead of the first
        rows = torch.cat([torch.zeros_like(rows), rows])
        intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_full((num_classes,), -torch.inf)
    weight[present], bias[present] = rows, intercepts
    return weight, bias
