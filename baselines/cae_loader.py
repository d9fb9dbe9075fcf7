"""CAE (arXiv:2202.03026): the encoders of the published pretraining files. Architecture: timm's BEiT with a table of
absolute positions; the keys lose `encoder.`.

The files have no direct address: the folders are linked in https://github.com/Atten4Vis/CAE. The stored positions have
the row first, unlike those of all other families here. They serve 224 x 224 pixels; for other sizes they are resized,
with a warning.
"""

from pathlib import Path

import torch
from torch import nn

from baselines._shared import PatchFeatures, create_vit, load_published, look_up, resize_plainly, weights_source

MODELS = {"cae_base_patch16_224": "beit_base_patch16_224", "cae_large_patch16_224": "beit_large_patch16_224"}
NOT_ENCODER = (
    "alignment_encoder.",
    "regresser.",
    "decoder.",
    "mask_token",
    "rd_pos_embed",
    "encoder_to_regresser",
)


def load_weights(vit: nn.Module, source: str | None) -> None:
    """Copy the encoder of a published file, or of an export of train_cae.py, into timm's network; None copies nothing.

    Raises: UserError if the file cannot be read or does not fit.
    """
    load_published(vit, source, path=("model",), prefix="encoder.", drop=NOT_ENCODER, exports=True)


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL, also of an
    export of train_cae.py."""
    architecture = look_up(model_name, MODELS)
    vit = create_vit(architecture, use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.1)
    how_to_get = "its folder is linked in the README of https://github.com/Atten4Vis/CAE"
    source = weights_source(None, pretrained_weights, pretrained, how_to_get)
    load_weights(vit, source)
    return PatchFeatures(vit, 16, resize_plainly, is_formula=True, published_grid=(14, 14)).to(device).eval()


__model_loader__ = load_model
