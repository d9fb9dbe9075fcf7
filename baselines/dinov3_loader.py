"""DINOv3 (arXiv:2508.10104), ViT-S/16 and ViT-L/16 of LVD-1689M. Architecture: timm, in its `_qkvb` variants.

Meta gives the files to those who accept its DINOv3 License: ask for access at https://ai.meta.com/dinov3, download,
and give the path as `pretrained_weights`.

timm's plain variants leave out the bias of queries and values. That of the keys is masked in the published network
(`bias_mask`), so it has no place here.
"""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import (
    PatchFeatures,
    StateDict,
    create_vit,
    load_published,
    look_up,
    rename_keys,
    weights_source,
)

MODELS = {
    "dinov3_vits16": ("vit_small_patch16_dinov3_qkvb", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"),
    "dinov3_vitl16": ("vit_large_patch16_dinov3_qkvb", "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or a signed URL."""
    architecture, file_name = look_up(model_name, MODELS)
    vit = create_vit(architecture)
    how_to_get = f"{file_name} is given on request at https://ai.meta.com/dinov3"
    source = weights_source(None, pretrained_weights, pretrained, how_to_get)
    load_published(vit, source, drop=("mask_token", "rope_embed.periods"), rename=rename_to_timm)
    return PatchFeatures(vit, 16, num_registers=4).to(device).eval()


__model_loader__ = load_model


def rename_to_timm(state: StateDict) -> StateDict:
    """Layer scale, registers and the attention bias under timm's names."""
    renamed: StateDict = {}
    for key, value in rename_keys(
        state, (r"\.ls([12])\.gamma$", r".gamma_\1"), ("^storage_tokens$", "reg_token")
    ).items():
        if key.endswith(".attn.qkv.bias"):
            query, _, value_bias = value.chunk(3)
            renamed |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value_bias}
        elif not key.endswith(".attn.qkv.bias_mask"):
            renamed[key] = value
    return renamed
