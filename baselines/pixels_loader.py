"""Raw pixels: what a patch looks like, as its features. The floor below which no trained model should score."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from utils import UserError


class Pixels(nn.Module):
    """Features of a patch are its pixels; the global representation is their mean over the patches."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], None, Float[Tensor, "b hp wp d"]]:
        """The patches themselves: d = 3 * patch_size ** 2."""
        p = self.patch_size
        feature_map = images.unfold(2, p, p).unfold(3, p, p).movedim(1, 3).flatten(3)
        return feature_map.mean(dim=(1, 2)), None, feature_map


def load_model(patch_size: int = 16, device: str | torch.device = "cpu") -> Pixels:
    """Patches of `patch_size` pixels. There are no weights."""
    if patch_size < 1:
        raise UserError(f"patch_size={patch_size}: must be at least 1")
    return Pixels(patch_size).to(device).eval()


__model_loader__ = load_model
