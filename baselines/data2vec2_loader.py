"""data2vec 2.0 (arXiv:2212.07525), images.

No library has this network: its blocks normalise after each residual sum (timm's post-norm blocks do it inside the
branch). The blocks are `torch.nn.TransformerEncoderLayer`; what comes before them is written here.

The `_ema` names read the teacher, `file["model"]["_ema"]`.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines._shared import (
    Grid,
    Output,
    StateDict,
    load_published,
    look_up,
    patch_grid,
    rename_keys,
    resize_antialiased,
    split_tokens,
    weights_source,
)

BASE_URL = "https://dl.fbaipublicfiles.com/fairseq/data2vec2/"
SIZES = {
    "data2vec2_vitb16": (768, 12, 12, 16, "base_imagenet.pt"),
    "data2vec2_vitl16": (1024, 24, 16, 16, "large_imagenet.pt"),
    "data2vec2_vith14": (1280, 32, 16, 14, "huge_imagenet.pt"),
}
MODELS = {name + suffix: (*size, suffix == "_ema") for name, size in SIZES.items() for suffix in ("", "_ema")}


def load_model(
    model_name: str,
    pretrained_weights: str | Path | None = None,
    pretrained: bool = True,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Build an encoder; `pretrained=False` leaves random weights, `pretrained_weights` is a path or URL."""
    embed_dim, depth, num_heads, patch_size, file_name, ema = look_up(model_name, MODELS)
    model = PostNormViT(embed_dim, depth, num_heads, patch_size)
    source = weights_source(BASE_URL + file_name, pretrained_weights, pretrained)
    path = ("model", "_ema") if ema else ("model",)
    drop = ("modality_encoders.IMAGE.decoder", "_ema")  # the prediction head, and the teacher in the student's dict
    load_published(model, source, path=path, drop=drop, rename=rename_to_torch)
    return model.to(device).eval()


__model_loader__ = load_model


def rename_to_torch(state: StateDict) -> StateDict:
    """Key names of `PostNormViT`. Blocks that a file keeps in the image encoder come before the others."""
    in_image_encoder = r"^modality_encoders\.IMAGE\.context_encoder\.blocks\.(\d+)\."
    first = len(
        {key.split(".")[4] for key in state if key.startswith("modality_encoders.IMAGE.context_encoder.blocks.")}
    )
    shifted: StateDict = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            shifted[f"encoder.layers.{int(index) + first}.{rest}"] = value
        else:
            shifted[key] = value
    return rename_keys(
        shifted,
        (in_image_encoder, r"encoder.layers.\1."),
        (r"\.attn\.qkv\.(weight|bias)$", r".self_attn.in_proj_\1"),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.fc([12])\.", r".linear\1."),
        (r"^modality_encoders\.IMAGE\.extra_tokens$", "cls_token"),
        (r"^modality_encoders\.IMAGE\.fixed_positional_encoder\.positions$", "pos_embed"),
        (r"^modality_encoders\.IMAGE\.local_encoder\.proj\.", "patch_embed."),
        (r"^modality_encoders\.IMAGE\.context_encoder\.norm\.", "norm_pre."),
    )


class PostNormViT(nn.Module):
    """Vision transformer with a norm before the first block and after each residual sum, and none at the end."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, patch_size: int, image_size: int = 224) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", 0.02 * torch.randn(1, (image_size // patch_size) ** 2, embed_dim))
        self.norm_pre = nn.LayerNorm(embed_dim, eps=1e-6)
        block = nn.TransformerEncoderLayer(
            embed_dim,
            num_heads,
            4 * embed_dim,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=False,
        )
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        grid: Grid = patch_grid(images, self.patch_size)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + resize_antialiased(self.pos_embed, grid)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return split_tokens(self.encoder(self.norm_pre(tokens)), grid)
