"""I-JEPA (arXiv:2301.08243). Architecture: timm; the keys lose `module.`.

A file holds both encoders. As timm does, this loads the context encoder; `encoder="target_encoder"` loads the one that
the paper evaluates. The published code takes square images only; here the same resizing serves any shape.
"""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import PatchFeatures, create_vit, load_published, look_up, resize_plainly, weights_source
from utils import UserError

BASE_URL = "https://dl.fbaipublicfiles.com/ijepa/"
MODELS = {
    "vit_huge_patch14_in1k": ("vit_huge_patch14_gap_224", 14, "IN1K-vit.h.14-300e.pth.tar"),
    "vit_huge_patch16_in1k_448": ("vit_huge_patch16_gap_448", 16, "IN1K-vit.h.16-448px-300e.pth.tar"),
    "vit_huge_patch14_in22k": ("vit_huge_patch14_gap_224", 14, "IN22K-vit.h.14-900e.pth.tar"),
    "vit_giant_patch16_in22k": ("vit_giant_patch16_gap_224", 16, "IN22K-vit.g.16-600e.pth.tar"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
    encoder: str = "encoder",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL, also of an
    export of train_ijepa.py."""
    if encoder not in ("encoder", "target_encoder"):
        raise UserError(f"encoder={encoder!r} must be one of encoder, target_encoder")
    architecture, patch_size, file_name = look_up(model_name, MODELS)
    vit = create_vit(architecture)
    source = weights_source(BASE_URL + file_name, pretrained_weights, pretrained)
    load_published(vit, source, path=(encoder,), prefix="module.", exports=True)
    return PatchFeatures(vit, patch_size, resize_plainly, is_formula=True, class_token=False).to(device).eval()


__model_loader__ = load_model
