"""iBOT (arXiv:2111.07832). Architecture: timm, key names unchanged.

The ImageNet-22k files hold the student. That of ViT-L/16 is the one file without a `state_dict` level.
"""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import PatchFeatures, create_vit, load_published, look_up, resize_like_dino, weights_source

BASE_URL = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/"
MODELS = {
    "ibot_vits16": ("vit_small_patch16_224", "vits_16/checkpoint_teacher.pth", ("state_dict",)),
    "ibot_vitb16": ("vit_base_patch16_224", "vitb_16_rand_mask/checkpoint_teacher.pth", ("state_dict",)),
    "ibot_vitl16": ("vit_large_patch16_224", "vitl_16_rand_mask/checkpoint_teacher.pth", ("state_dict",)),
    "ibot_vitb16_in22k": ("vit_base_patch16_224", "vitb_16_pt22k/checkpoint_student.pth", ("state_dict",)),
    "ibot_vitl16_in22k": ("vit_large_patch16_224", "vitl_16_pt22k/checkpoint_student.pth", ()),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    architecture, file_name, path = look_up(model_name, MODELS)
    vit = create_vit(architecture)
    source = weights_source(BASE_URL + file_name, pretrained_weights, pretrained)
    load_published(vit, source, path=path, drop=("masked_embed", "head."))  # of pretraining, in student files
    return PatchFeatures(vit, 16, resize_like_dino).to(device).eval()


__model_loader__ = load_model
