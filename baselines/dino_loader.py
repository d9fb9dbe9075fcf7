"""DINO (arXiv:2104.14294): ViT, ResNet-50 and XCiT. Architecture: timm. Keys are timm's but for XCiT.

ResNet-50 gives its pooled features and the map of its last stage, 32 pixels a cell. XCiT gives class token and patch
tokens of its final norm, after the class-attention blocks.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import (
    Output,
    PatchFeatures,
    StateDict,
    create_vit,
    library,
    load_published,
    look_up,
    patch_grid,
    rename_keys,
    resize_like_dino,
    weights_source,
)

BASE_URL = "https://dl.fbaipublicfiles.com/dino/"
MODELS = {
    "dino_vits16": ("vit_small_patch16_224", 16, "dino_deitsmall16_pretrain"),
    "dino_vits8": ("vit_small_patch8_224", 8, "dino_deitsmall8_pretrain"),
    "dino_vitb16": ("vit_base_patch16_224", 16, "dino_vitbase16_pretrain"),
    "dino_vitb8": ("vit_base_patch8_224", 8, "dino_vitbase8_pretrain"),
    "dino_resnet50": ("resnet50", 32, "dino_resnet50_pretrain"),
    "dino_xcit_small_12_p16": ("xcit_small_12_p16_224", 16, "dino_xcit_small_12_p16_pretrain"),
    "dino_xcit_small_12_p8": ("xcit_small_12_p8_224", 8, "dino_xcit_small_12_p8_pretrain"),
    "dino_xcit_medium_24_p16": ("xcit_medium_24_p16_224", 16, "dino_xcit_medium_24_p16_pretrain"),
    "dino_xcit_medium_24_p8": ("xcit_medium_24_p8_224", 8, "dino_xcit_medium_24_p8_pretrain"),
}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    architecture, patch_size, name = look_up(model_name, MODELS)
    source = weights_source(f"{BASE_URL}{name}/{name}.pth", pretrained_weights, pretrained)
    if architecture == "resnet50":
        network = library("timm").create_model(architecture, pretrained=False, num_classes=0)
        load_published(network, source)
        model = ConvolutionalFeatures(network, patch_size)
    elif architecture.startswith("xcit"):
        network = create_vit(architecture)
        load_published(network, source, rename=split_class_attention)
        model = PatchFeatures(network, patch_size)
    else:
        network = create_vit(architecture)
        load_published(network, source)
        model = PatchFeatures(network, patch_size, resize_like_dino)
    return model.to(device).eval()


__model_loader__ = load_model


def split_class_attention(state: StateDict) -> StateDict:
    """timm computes queries of the class token alone, so the joint projection becomes three."""
    split: StateDict = {}
    for key, value in rename_keys(state, (r"^pos_embeder\.", "pos_embed.")).items():
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            split |= {
                key.replace(".qkv.", f".{part}."): third for part, third in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            split[key] = value
    return split


class ConvolutionalFeatures(nn.Module):
    """Pooled features and last feature map of a convolutional network of timm."""

    def __init__(self, network: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.network: Any = network
        self.patch_size = patch_size

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        patch_grid(images, self.patch_size)
        features = self.network.forward_features(images)
        return self.network.forward_head(features, pre_logits=True), None, features.permute(0, 2, 3, 1)
