"""pictures.py: principal components against scikit-learn, and what colours say."""

import numpy as np
import pytest
import torch
from conftest import seeded
from sklearn.decomposition import PCA

import pictures
from pictures import Moments, image_scores, map_colors, project, rgb_colors, standardize


def assert_equal_up_to_sign(actual, expected, message):
    signs = np.sign((actual * expected).sum(axis=0))
    np.testing.assert_allclose(actual * signs, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=message)


def correlated(n, d, seed=0):
    """Patches with a few strong directions and a mean far from 0."""
    mixing = torch.randn(d, d, generator=seeded(seed)) * torch.linspace(3, 0.1, d)
    return torch.randn(n, d, generator=seeded(seed + 1)) @ mixing.T + 10


@pytest.mark.parametrize(("n", "d"), [(20, 50), (50, 20)], ids=["fewer patches than channels", "more"])
@pytest.mark.parametrize("whiten", [True, False])
def test_image_components_are_those_of_scikit_learn(n, d, whiten):
    x = torch.stack([correlated(n, d), correlated(n, d, seed=5)])
    actual = standardize(image_scores(x, 6), whiten).numpy()
    for i in range(2):
        expected = PCA(6, whiten=whiten, svd_solver="full").fit_transform(x[i].double().numpy())
        expected /= expected[:, 0].std(ddof=1)
        assert_equal_up_to_sign(actual[i], expected, f"image {i}")


def test_joint_components_are_those_of_scikit_learn_and_bounded_in_memory(monkeypatch):
    monkeypatch.setattr(pictures, "MOMENT_ROWS", 7)
    x = correlated(60, 12).view(5, 12, 12)
    moments = Moments(12)
    moments.add(x[:2])
    moments.add(x[2:])
    moments.add_other_ranks()
    mean, directions, shares = moments.principal_components(4)
    oracle = PCA(4, svd_solver="full").fit(x.flatten(0, 1).double().numpy())
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_, rtol=1e-9)
    actual = project(x, mean, directions).flatten(0, 1).numpy()
    assert_equal_up_to_sign(actual, oracle.transform(x.flatten(0, 1).double().numpy()), "projections")
    assert moments.sums.numel() == 13**2, "the patches themselves must not be kept"


def test_components_are_skewed_to_the_right_whatever_sign_they_had():
    scores = torch.randn(3, 200, 4, generator=seeded(0)).exp() - 1.6
    flipped = scores * torch.tensor([1.0, -1, 1, -1])
    for each in (scores, flipped):
        standard = standardize(each - each.mean(dim=1, keepdim=True), whiten=True)
        assert (standard.pow(3).mean(dim=1) > 0).all()
    torch.testing.assert_close(
        standardize(scores, whiten=True).abs(), standardize(flipped, whiten=True).abs(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("whiten", [True, False])
def test_components_without_variance_are_zero_and_not_noise(whiten):
    scores = torch.randn(1, 30, 3, generator=seeded(0)) * torch.tensor([1.0, 1e-9, 0.0])
    standard = standardize(scores, whiten)
    assert standard.isfinite().all()
    assert (standard[..., 1:] == 0).all()
    assert (standardize(torch.zeros(1, 9, 3), whiten) == 0).all()


def test_rgb_range_is_2_3_deviations():
    components = torch.tensor([[-2.3, 0.0, 2.3], [-9.0, 1.15, 9.0]])
    assert rgb_colors(components).tolist() == [[0, 128, 255], [0, 191, 255]]


def test_single_components_are_coolwarm_blue_below_and_red_above():
    negative, zero, positive = map_colors(torch.tensor([-2.3, 0.0, 2.3]), -2.3, 2.3, "coolwarm").tolist()
    assert negative == [58, 76, 192]
    assert positive == [179, 3, 38]
    assert max(zero) - min(zero) < 3, "zero is grey"
