"""AIM (arXiv:2401.08541), first version. Architecture: timm, without class token and with sin-cos positions.

The features are those of the 19th block, not normalised, in every size; the authors average several blocks instead.
"""

from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import (
    Grid,
    PatchFeatures,
    StateDict,
    library,
    load_published,
    look_up,
    rename_keys,
    weights_source,
)

BASE_URL = "https://huggingface.co/apple/AIM/resolve/main/"
FEATURE_BLOCK = 18
MODELS = {
    "aim_600M": (1536, 24, 12, "aim_600m_2bimgs_attnprobe_backbone.pth"),
    "aim_1B": (2048, 24, 16, "aim_1b_5bimgs_attnprobe_backbone.pth"),
    "aim_3B": (3072, 24, 24, "aim_3b_5bimgs_attnprobe_backbone.pth"),
    "aim_7B": (4096, 32, 32, "aim_7b_5bimgs_attnprobe_backbone.pth"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    embed_dim, depth, num_heads, file_name = look_up(model_name, MODELS)
    layer_norm = partial(nn.LayerNorm, eps=1e-6)
    vit = library("timm.models").VisionTransformer(
        img_size=224,
        patch_size=14,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        qkv_bias=False,
        proj_bias=False,
        class_token=False,
        global_pool="",
        num_classes=0,
        norm_layer=layer_norm,
        embed_norm_layer=layer_norm,
    )
    vit.patch_embed.strict_img_size = False
    load_published(vit, weights_source(BASE_URL + file_name, pretrained_weights, pretrained), rename=rename_to_timm)
    vit.blocks = vit.blocks[: FEATURE_BLOCK + 1]
    vit.norm = nn.Identity()
    return PatchFeatures(vit, 14, sincos_for, class_token=False).to(device).eval()


__model_loader__ = load_model


def rename_to_timm(state: StateDict) -> StateDict:
    """Key names of timm. The positions are a formula, so that the file has none."""
    state = rename_keys(
        state,
        (r"^preprocessor\.patchifier\.", "patch_embed."),
        (r"^trunk\.post_trunk_norm\.", "norm."),
        (r"^trunk\.", ""),
        (r"\.norm_([12])\.", r".norm\1."),
    )
    if "norm.weight" in state:
        state["pos_embed"] = sincos_positions((16, 16), state["norm.weight"].shape[0])
    return state


def sincos_for(table: Float[Tensor, "1 n d"], grid: Grid) -> Float[Tensor, "1 n2 d"]:
    """The formula for a grid, in the width, type and place of the network's table."""
    return sincos_positions(grid, table.shape[-1]).to(table)


def sincos_positions(grid: Grid, embed_dim: int) -> Float[Tensor, "1 n d"]:
    """Sine and cosine of the column, then of the row: a quarter of the channels each, computed in float64."""
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()[None]
