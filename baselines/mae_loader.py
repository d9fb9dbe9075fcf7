"""MAE (arXiv:2111.06377): the encoders of the published pretraining files. Architecture: timm, key names unchanged."""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import PatchFeatures, create_vit, load_published, look_up, resize_antialiased, weights_source

BASE_URL = "https://dl.fbaipublicfiles.com/mae/pretrain/"
MODELS = {
    "vit_base_patch16": ("vit_base_patch16_224", 16, "mae_pretrain_vit_base.pth"),
    "vit_large_patch16": ("vit_large_patch16_224", 16, "mae_pretrain_vit_large.pth"),
    "vit_huge_patch14": ("vit_huge_patch14_224", 14, "mae_pretrain_vit_huge.pth"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    architecture, patch_size, file_name = look_up(model_name, MODELS)
    vit = create_vit(architecture)
    load_published(vit, weights_source(BASE_URL + file_name, pretrained_weights, pretrained), path=("model",))
    return PatchFeatures(vit, patch_size, resize_antialiased).to(device).eval()


__model_loader__ = load_model
