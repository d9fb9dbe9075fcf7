"""CAPI (arXiv:2502.08769): the four released ViT-L/14, by the names of `hubconf.py`.

For a backbone trained here, use `model.py` itself as the model file.
"""

from pathlib import Path

import torch
from torch import nn

import hubconf
from baselines._shared import look_up

MODELS = {
    "capi_vitl14_lvd": hubconf.capi_vitl14_lvd,
    "capi_vitl14_p205": hubconf.capi_vitl14_p205,
    "capi_vitl14_in22k": hubconf.capi_vitl14_in22k,
    "capi_vitl14_in1k": hubconf.capi_vitl14_in1k,
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build encoder and predictor; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    weights = None if pretrained_weights is None else str(pretrained_weights)
    return look_up(model_name, MODELS)(pretrained=pretrained, weights=weights).to(device)


__model_loader__ = load_model
