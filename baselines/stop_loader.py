"""StoP (arXiv:2308.00566): I-JEPA with stochastic positions. Architecture: timm; the keys lose `module.`.

As in the authors' probe, the target encoder is loaded. They take 224 x 224 pixels only; for other sizes the positions
are resized by I-JEPA's rule, with a warning.
"""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import PatchFeatures, create_vit, load_published, look_up, resize_plainly, weights_source

BASE_URL = "https://huggingface.co/amirbar1/StoP/resolve/main/"
MODELS = {
    "stop_vitb16": ("vit_base_patch16_224", "vit-b16.pth.tar"),
    "stop_vitl16": ("vit_large_patch16_224", "vit-l16.pth.tar"),
    "stop_vith16": ("vit_huge_patch16_gap_448", "vit-h16.pth.tar"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL, also of an
    export of train_ijepa.py."""
    architecture, file_name = look_up(model_name, MODELS)
    vit = create_vit(architecture, img_size=224, class_token=False, fc_norm=False)
    source = weights_source(BASE_URL + file_name, pretrained_weights, pretrained)
    load_published(vit, source, path=("target_encoder",), prefix="module.", exports=True)
    model = PatchFeatures(vit, 16, resize_plainly, is_formula=True, class_token=False, published_grid=(14, 14))
    return model.to(device).eval()


__model_loader__ = load_model
