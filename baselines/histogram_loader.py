"""Colour histograms: how often each colour occurs in a patch and in its whole image, as the features of the patch.

No weights and nothing learned: what can be told by colour alone, which a model trained on colourful images should beat.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError


class Histogram(nn.Module):
    """Features of a patch are its colour histogram beside that of the image; the global representation the latter."""

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int, bins: int) -> None:
        super().__init__()
        self.patch_size, self.bins = patch_size, bins
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], None, Float[Tensor, "b hp wp d2"]]:
        """Histograms of images that were normalised as evaluations do by default: d = bins ** 3, d2 = 2 * d."""
        p, k = self.patch_size, self.bins
        # 8-bit colours came here through a division; rounding undoes it exactly, so that none falls beside its bin.
        colours = (255 * (images * self.std + self.mean)).round().clamp(0, 255)
        red, green, blue = (colours * k / 256).long().unbind(dim=1)
        cubes = ((red * k + green) * k + blue).unfold(1, p, p).unfold(2, p, p).flatten(3)  # [b, hp, wp, pixels]
        counts = torch.zeros(*cubes.shape[:3], k**3, device=images.device)
        patches = counts.scatter_add_(3, cubes, torch.ones_like(cubes, dtype=counts.dtype)) / p**2
        image = patches.mean(dim=(1, 2))
        return image, None, torch.cat([patches, image[:, None, None].expand_as(patches)], dim=3)


def load_model(patch_size: int = 16, bins: int = 4, device: str | torch.device = "cpu") -> Histogram:
    """Histograms of `bins` values of red, green and blue each, in patches of `patch_size` pixels. No weights."""
    for key, value, least in (("patch_size", patch_size, 1), ("bins", bins, 2)):
        if value < least:
            raise UserError(f"{key}={value}: must be at least {least}")
    return Histogram(patch_size, bins).to(device).eval()


__model_loader__ = load_model
