"""Encoders of MAE, DINOv2 and DINOv3 as the beginning of a training: `baselines/starting.py` and `train.init_from`."""

import json
import logging

import golden_cae
import golden_ijepa
import pytest
import torch
from conftest import ROOT, seeded
from runs import make_images, tiny
from torch import nn

import cae
import ijepa
import train_cae
import train_capi
import train_ijepa
from baselines import starting
from config import load_config
from model import EncoderDecoder
from utils import UserError
from weights import load_strictly

timm = pytest.importorskip("timm", reason="pip install -c constraints.txt -e '.[baselines]'")
transformers = pytest.importorskip("transformers", reason="pip install -c constraints.txt -e '.[finetuning]'")

WIDTH, DEPTH, HEADS, PATCH = 32, 2, 2, 8
SIZES = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
HF_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "patch_size": PATCH,
}


def random_everywhere(module):
    """Also what begins with 0 or 1, such as biases and layer scale."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(index)))
    return module.eval()


def timm_vit(grid_size=4, **kwargs):
    kwargs = {"img_size": PATCH * grid_size, "num_classes": 0, "global_pool": "", **SIZES, **kwargs}
    return random_everywhere(timm.models.VisionTransformer(**kwargs))


def hf_model(kind, grid_size=4, **kwargs):
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    return random_everywhere(model(config(**HF_SIZES, image_size=PATCH * grid_size, **kwargs)))


def cae_encoder(grid_size=4, **sizes):
    return cae.Encoder(grid_size=grid_size, **SIZES | sizes)


def ijepa_encoder(grid_size=4, **sizes):
    return ijepa.Encoder(grid_size=grid_size, **SIZES | sizes)


def capi_backbone(**kwargs):
    attention = {"num_heads": HEADS, "qkv_bias": True, "proj_bias": True}
    arguments = {
        "patch_size": PATCH,
        "norm_layer_type": "LayerNorm",
        "final_norm_kwargs": {"elementwise_affine": True},
        "n_registers": 5,
        "register_coordinates": "centre",
        "scale_reg_to_visible": False,
        "transformers_kwargs": {"embed_dim": WIDTH, "block_kwargs": {"mlp_bias": True, "attn_kwargs": attention}},
        "encoder_kwargs": {"depth": DEPTH},
        "decoder_kwargs": {"depth": 1},
    }
    return EncoderDecoder(**arguments | kwargs)


def start(encoder, file, source="file.pth", grid_size=4, **kwargs):
    vit = starting.read(file, source, encoder)
    assert vit is not None
    load_strictly(encoder, starting.fit(vit, encoder, grid_size=grid_size, **kwargs), source, remedy="")
    return encoder.eval()


def tokens_of(model, images):
    """What the file's own network makes of images: all its tokens."""
    with torch.no_grad():
        if isinstance(model, timm.models.VisionTransformer | timm.models.Eva):
            return model.forward_features(images)
        if model.config.model_type == "vit_mae":
            model.config.mask_ratio = 0.0
            noise = torch.arange((images.shape[-1] // PATCH) ** 2.0).expand(len(images), -1)  # keeps the order
            return model(images, noise=noise).last_hidden_state
        return model(images).last_hidden_state


def published_names(state):
    """The names of DINOv3's authors, from transformers'."""
    named = {}
    for key, x in state.items():
        key = key.removeprefix("model.").replace("layer.", "blocks.").replace("embeddings.patch_embeddings", "patch_embed.proj")
        key = key.replace("embeddings.register_tokens", "storage_tokens").replace("embeddings.", "")
        key = key.replace("attention.", "attn.").replace("o_proj", "proj").replace("up_proj", "fc1")
        key = key.replace("down_proj", "fc2").replace("layer_scale", "ls").replace("lambda1", "gamma")
        named[key] = x
    for i in range(DEPTH):
        begin = f"blocks.{i}.attn"
        for kind in ("weight", "bias"):
            third = [named.pop(f"{begin}.{part}_proj.{kind}", torch.full((WIDTH,), 7.0)) for part in "qkv"]
            named[f"{begin}.qkv.{kind}"] = torch.cat(third)
        named[f"{begin}.qkv.bias_mask"] = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
    named["rope_embed.periods"] = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    return named


IMAGES = torch.randn(2, 3, 32, 32, generator=seeded(0))
EXACT = {
    "MAE by its authors": (cae_encoder, lambda: timm_vit(), lambda m: {"model": m.state_dict()}),
    "MAE of transformers": (
        cae_encoder,
        lambda: hf_model("ViTMAE", layer_norm_eps=1e-6),
        lambda m: {f"vit.{key}": x for key, x in m.state_dict().items()},
    ),
    "DINOv2 by its authors": (
        cae_encoder,
        lambda: timm_vit(init_values=1.0),
        lambda m: m.state_dict() | {"mask_token": torch.zeros(1, WIDTH)},
    ),
    "DINOv2 of transformers": (cae_encoder, lambda: hf_model("Dinov2"), lambda m: m.state_dict()),
    "a ViT without class token": (
        ijepa_encoder,
        lambda: timm_vit(class_token=False, init_values=1.0),
        lambda m: m.state_dict(),
    ),
    "DINOv3 of transformers": (
        capi_backbone, lambda: hf_model("DINOv3ViT", num_register_tokens=4), lambda m: m.state_dict()
    ),
    "DINOv3 by its authors": (
        capi_backbone,
        lambda: hf_model("DINOv3ViT", num_register_tokens=4),
        lambda m: published_names(m.state_dict()),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_fits_computes_the_same(name, caplog):
    make, make_source, saved = EXACT[name]
    source = make_source()
    with caplog.at_level(logging.INFO):
        encoder = start(make(), saved(source))
    expected = tokens_of(source, IMAGES)
    with torch.no_grad():
        if isinstance(encoder, EncoderDecoder):
            features = encoder(IMAGES)
            actual = torch.cat([features.registers, features.feature_map.flatten(1, 2)], dim=1)
        else:
            actual = encoder.encode(IMAGES)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert "the encoder computes what the file's does, on images of 32 px" in caplog.text
