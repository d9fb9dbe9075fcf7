"""DINOv2 (arXiv:2304.07193), without and with registers (arXiv:2309.16588). Architecture: timm.

The two kinds resize their positions, stored for 518 x 518 pixels, by different rules. Without registers the second
output is an empty tensor [b, 0, d], not None.
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
    resize_antialiased,
    resize_like_dino,
    weights_source,
)

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2/"
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
MODELS = {
    f"dinov2_vit{size}14{suffix}": (size, suffix == "_reg") for size in SIZES for suffix in ("", "_reg")
}  # fmt: skip


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    size, has_registers = look_up(model_name, MODELS)
    architecture = f"vit_{SIZES[size]}_patch14_{'reg4_' if has_registers else ''}dinov2"
    vit = create_vit(architecture)
    name = f"dinov2_vit{size}14"
    url = f"{BASE_URL}{name}/{name}_{'reg4_' if has_registers else ''}pretrain.pth"
    source = weights_source(url, pretrained_weights, pretrained)
    load_published(vit, source, drop=("mask_token",), rename=fold_class_position if has_registers else rename_swiglu)
    positions = resize_antialiased if has_registers else resize_like_dino
    return PatchFeatures(vit, 14, positions, num_registers=4 if has_registers else 0).to(device).eval()


__model_loader__ = load_model


def rename_swiglu(state: StateDict) -> StateDict:
    """Name the gated MLP of ViT-g as timm does."""
    return rename_keys(state, (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))


def fold_class_position(state: StateDict) -> StateDict:
    """timm's networks with registers have positions for patches only: that of the class token joins the token."""
    state = rename_keys(rename_swiglu(state), (r"^register_tokens$", "reg_token"))
    if {"cls_token", "pos_embed"} <= state.keys():
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state
