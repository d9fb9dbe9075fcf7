"""Pictures of patch features: principal components, colours, and what a method brings to show its predictions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from torch import Tensor, nn

from distributed import all_reduce_sum_, broadcast_object

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOR_RANGE = 2.3
"""Standard deviations from the mean at which a component's colour ends."""
MOMENT_ROWS = 8192
"""Patches that are converted to float64 at a time; a product of fewer runs below the processor's rate."""


def image_scores(x: Float[Tensor, "b n d"], num_components: int) -> Float32[Tensor, "b n k"]:
    """First principal components of each image's own patches; their signs are arbitrary."""
    return torch.stack([_scores(image.double(), num_components).float() for image in x])


def _scores(x: Float64[Tensor, "n d"], num_components: int) -> Float64[Tensor, "n k"]:
    x = x - x.mean(dim=0)
    n, d = x.shape
    if n > d:
        return x @ _leading(x.T @ x, num_components)[1]
    values, vectors = _leading(x @ x.T, num_components)  # the same, from the smaller matrix
    return vectors * values.clamp_min(0).sqrt()


def _leading(symmetric: Float64[Tensor, "m m"], k: int) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "m k"]]:
    """The k largest eigenvalues, descending, and their eigenvectors."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


class Moments:
    """Sums from which mean and covariance of any number of patches follow, in float64.

    `sums`: products of the features, and in the last row their sums and the number of patches.
    """

    def __init__(self, width: int) -> None:
        self.sums = torch.zeros(width + 1, width + 1, dtype=torch.float64)

    def add(self, x: Float[Tensor, "b n d"]) -> None:
        """Count the patches of some images."""
        self.sums = self.sums.to(x.device)
        for part in x.flatten(0, 1).split(MOMENT_ROWS):
            rows = part.double()
            self.sums[:-1, :-1].addmm_(rows.T, rows)
            self.sums[-1, :-1] += rows.sum(dim=0)
            self.sums[-1, -1] += len(rows)

    def add_other_ranks(self) -> None:
        """Count what the other ranks counted; all call this together."""
        self.sums = all_reduce_sum_(self.sums.cpu())

    def principal_components(
        self, num_components: int
    ) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d k"], Float64[Tensor, " k"]]:
        """Mean, directions, and the parts of the variance that they explain; the same on all ranks."""
        count = self.sums[-1, -1]
        mean = self.sums[-1, :-1] / count
        covariance = (self.sums[:-1, :-1] - count * torch.outer(mean, mean)) / (count - 1)
        values, directions = broadcast_object(_leading(covariance, num_components))
        return mean, directions, values / covariance.trace().clamp_min(1e-300)


def project(
    x: Float[Tensor, "b n d"], mean: Float64[Tensor, " d"], directions: Float64[Tensor, "d k"]
) -> Float32[Tensor, "b n k"]:
    """Components of patches of images along `directions`, once `mean` is taken off."""
    directions = directions.to(x.device)
    shift = mean.to(x.device) @ directions
    return torch.stack([(image.double() @ directions - shift).float() for image in x])


def standardize(scores: Float[Tensor, "*images n k"], whiten: bool) -> Float32[Tensor, "*images n k"]:
    """Components ready to be coloured: of standard deviation 1 (the first one if not `whiten`), skewed to the right."""
    scores = scores.double()
    std = scores.std(dim=-2, keepdim=True)
    first = std[..., :1]
    # What has no variance is rounding noise, which must not be blown up to colours.
    is_noise = (std <= 1e-6 * first) | (first <= 1e-30)
    scaled = torch.where(is_noise, 0.0, scores / torch.where(is_noise, 1.0, std if whiten else first))
    skewness = scaled.pow(3).sum(dim=-2, keepdim=True)
    return torch.where(skewness < 0, -scaled, scaled).float()


def rgb_colors(components: Float[Tensor, "*grid 3"]) -> UInt8[Tensor, "*grid 3"]:
    """Three components as red, green and blue: -2.3 is 0 and 2.3 is 255, what lies beyond is cut off."""
    return to_bytes((components / COLOR_RANGE + 1) / 2)


def to_bytes(x: Float[Tensor, "*grid"]) -> UInt8[Tensor, "*grid"]:
    """Numbers from 0 to 1 as bytes from 0 to 255; what lies beyond is cut off."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def map_colors(x: Float[Tensor, "*grid"], low: float, high: float, name: str) -> UInt8[Tensor, "*grid 3"]:
    """Numbers as colours of one of matplotlib's maps between `low` and `high`."""
    import matplotlib as mpl

    table = torch.from_numpy(mpl.colormaps[name](np.arange(256), bytes=True)[:, :3].copy())
    return table[to_bytes((x - low) / max(high - low, 1e-12)).long()]


def show(ax: "Axes", pixels: np.ndarray, title: str = "") -> None:
    """Draw an image [h, w, 3] without a frame; few pixels as squares."""
    ax.imshow(pixels, interpolation="nearest" if len(pixels) < 160 else "antialiased")
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


class Prediction(NamedTuple):
    """What is predicted of an image from a part of its patches, row-major."""

    visible: Bool[Tensor, " n"]
    """Which patches are seen."""
    positions: Int64[Tensor, " m"]
    """Which patches are predicted, in `[0, n)`; of one that occurs more than once the last prediction counts."""
    draws: Mapping[str, Float[Tensor, "m d"]]
    """Title, of lower-case words -> representations there, whose cosine to `PatchPredictor.targets` says how alike a
    patch is. A deterministic prediction is one draw."""


class PatchPredictor(nn.Module):
    """Student and predictor of a training checkpoint, for pictures of what they predict at hidden patches.

    The script that trains a method derives a class from this one, and names what makes it `__predictor_loader__`: a
    function of the checkpoint's folder and of the resolution of the images, in pixels: a side, or height and width.
    """

    student: nn.ModuleDict
    """All that predicts. Each part has an `init_weights`, which draws random ones to compare with."""

    def forward(self, image: Float[Tensor, "3 h w"], seed: int, num_draws: int) -> Prediction:
        """Hide patches as the training does, and predict them.

        Args:
            image: normalised.
            seed: what the mask and all draws follow from.
            num_draws: how many draws, if the prediction is not deterministic.

        Raises: UserError if images of this size cannot be masked.
        """
        raise NotImplementedError

    def targets(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What predictions are compared to, of the teacher's patch features: these themselves, unless overridden."""
        return features
