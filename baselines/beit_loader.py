"""BEiT (arXiv:2106.08254), self-supervised on ImageNet-22k. Architecture: timm, key names unchanged.

One table of relative positions serves all blocks. It was published for 224 x 224 pixels; for other sizes it is resized,
bicubic, with a warning.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import (
    Grid,
    Output,
    PatchFeatures,
    create_vit,
    library,
    load_published,
    look_up,
    patch_grid,
    weights_source,
)

BASE_URL = "https://github.com/addf400/files/releases/download/v1.0/"
MODELS = {
    "beit_base_patch16_224_pt22k": "beit_base_patch16_224",
    "beit_large_patch16_224_pt22k": "beit_large_patch16_224",
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    architecture = look_up(model_name, MODELS)
    vit = create_vit(architecture, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, init_values=0.1)
    source = weights_source(f"{BASE_URL}{model_name.lower()}.pth", pretrained_weights, pretrained)
    # The index is a formula, which timm has too. The mask token and the head are of pretraining.
    drop = ("rel_pos_bias.relative_position_index", "mask_token", "lm_head.")
    load_published(vit, source, path=("model",), drop=drop)
    return RelativePatchFeatures(vit, 16, published_grid=(14, 14)).to(device).eval()


__model_loader__ = load_model


class RelativePatchFeatures(PatchFeatures):
    """Gives the network's table of relative positions the grid at hand."""

    def __init__(self, network: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(network, *args, **kwargs)
        network.rel_pos_bias = RelativePositions(network.rel_pos_bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        network: Any = self.network
        network.rel_pos_bias.grid = patch_grid(images, self.patch_size)
        return super().forward(images)


class RelativePositions(nn.Module):
    """Offsets of the scores for `grid`, from one table for all grids: the published one, which is resized as needed.

    Args:
        published: timm's module of that name, with the table.
    """

    def __init__(self, published: Any) -> None:
        super().__init__()
        self.relative_position_bias_table = published.relative_position_bias_table
        self.grid: Grid = tuple(published.window_size)
        self.kind: Any = type(published)

    def forward(self) -> Float[Tensor, "heads n n"]:
        """Of the class token and the patches."""
        table = self.relative_position_bias_table
        with table.device:
            bias = self.kind(self.grid, table.shape[1])
        # Not timm's own set_window_size: its geometric interpolation relies on an indexing that torch takes back.
        resize = library("timm.layers").resize_rel_pos_bias_table_simple
        resized = resize(table, self.grid, bias.relative_position_bias_table.shape)
        return torch.func.functional_call(bias, {"relative_position_bias_table": resized}, ())
