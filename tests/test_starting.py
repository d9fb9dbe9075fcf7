"""Encoders of MAE, DINOv2 and DINOv3 as the beginning of a training: `baselines/starting.py` and `train.init_from`."""

import argparse
import functools
import logging
from typing import Any

import golden_cae
import golden_ijepa
import pytest
import torch
import torch.nn.functional as F
from commands import make_images, tiny
from conftest import ROOT, seeded

import cae
import ijepa
import model
import train_cae
import train_capi
import train_ijepa
from baselines import starting
from baselines._shared import PatchFeatures, resize_antialiased, resize_like_dino
from model import EncoderDecoder
from utils import UserError, both_sides
from weights import load_strictly

timm: Any = pytest.importorskip("timm", reason="pip install -c constraints.txt -e '.[baselines]'")
transformers: Any = pytest.importorskip("transformers", reason="pip install -c constraints.txt -e '.[finetuning]'")

WIDTH, DEPTH, HEADS, PATCH = 32, 2, 2, 8
SIZES: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
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


def timm_vit(grid=(4, 4), **kwargs):
    kwargs = {"img_size": tuple(PATCH * n for n in grid), "num_classes": 0, "global_pool": "", **SIZES, **kwargs}
    return random_everywhere(timm.models.VisionTransformer(**kwargs))


def hf_model(kind, grid_size=4, **kwargs):
    config, network = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    return random_everywhere(network(config(**HF_SIZES, image_size=PATCH * grid_size, **kwargs)))


def cae_encoder(grid_size=4, **sizes: Any):
    return cae.Encoder(grid_size=grid_size, **SIZES | sizes)


def ijepa_encoder(grid_size=4, **sizes: Any):
    return ijepa.Encoder(grid_size=grid_size, **SIZES | sizes)


def capi_backbone(**kwargs):
    attention = {"num_heads": HEADS, "qkv_bias": True, "proj_bias": True}
    arguments: dict[str, Any] = {
        "patch_size": PATCH,
        "norm_layer_type": "LayerNorm",
        "final_norm_kwargs": {"elementwise_affine": True},
        "n_registers": 5,
        "register_coordinates": "centre",
        "scale_reg_to_visible": False,
        "transformers_kwargs": {"embed_dim": WIDTH, "block_kwargs": {"mlp_bias": True, "attn_kwargs": attention}},
        "encoder_kwargs": {"depth": DEPTH},
        "decoder_kwargs": {"depth": 1},
        **kwargs,
    }
    return EncoderDecoder(**arguments)


def read(file, encoder, source="file.pth"):
    vit = starting.read(file, source, encoder)
    assert vit is not None
    return vit


def start(encoder, file, source="file.pth", grid_size=4, **kwargs):
    vit = read(file, encoder, source)
    load_strictly(encoder, starting.fit(vit, encoder, grid=both_sides(grid_size), **kwargs), source, remedy="")
    return encoder.eval()


def tokens_here(encoder, images):
    """What an encoder of this repository makes of images: all its tokens."""
    with torch.no_grad():
        if not isinstance(encoder, EncoderDecoder):
            return encoder.encode(images)
        features = encoder(images)
        return torch.cat([features.registers, features.feature_map.flatten(1, 2)], dim=1)


def tokens_of(network, images):
    """What the file's own network makes of images: all its tokens."""
    with torch.no_grad():
        if isinstance(network, timm.models.VisionTransformer | timm.models.Eva):
            return network.forward_features(images)
        if network.config.model_type == "vit_mae":
            network.config.mask_ratio = 0.0
            noise = torch.arange((images.shape[-1] // PATCH) ** 2.0).expand(len(images), -1)  # keeps the order
            return network(images, noise=noise).last_hidden_state
        return network(images).last_hidden_state


def published_names(state):
    """The names of DINOv3's authors, from transformers', with what stands at the masked biases of keys."""
    renamed = {
        "model.": "", "layer.": "blocks.", "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.register_tokens": "storage_tokens", "embeddings.": "", "attention.": "attn.", "o_proj": "proj",
        "up_proj": "fc1", "down_proj": "fc2", "layer_scale": "ls", "lambda1": "gamma",
    }  # fmt: skip
    named = {
        functools.reduce(lambda key, pair: key.replace(*pair), renamed.items(), key): x for key, x in state.items()
    }
    for begin in (f"blocks.{i}.attn" for i in range(DEPTH)):
        for kind in ("weight", "bias"):
            thirds = [named.pop(f"{begin}.{part}_proj.{kind}", torch.full((WIDTH,), 7.0)) for part in "qkv"]
            named[f"{begin}.qkv.{kind}"] = torch.cat(thirds)
        named[f"{begin}.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(WIDTH)
    named["rope_embed.periods"] = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    return named


def hf_dinov3():
    return hf_model("DINOv3ViT", num_register_tokens=4)


IMAGES = torch.randn(2, 3, 32, 32, generator=seeded(0))
EXACT = {
    "MAE by its authors": (cae_encoder, timm_vit, lambda m: {"model": m.state_dict() | {"decoder_embed.bias": IMAGES}}),
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
    "DINOv3 of transformers": (capi_backbone, hf_dinov3, lambda m: m.state_dict()),
    "DINOv3 by its authors": (capi_backbone, hf_dinov3, lambda m: published_names(m.state_dict())),
}
"""Who begins, with what, and how its file names that."""


@pytest.mark.parametrize("name", EXACT)
def test_what_fits_computes_the_same(name, caplog):
    make, make_source, saved = EXACT[name]
    source = make_source()
    with caplog.at_level(logging.INFO):
        encoder = start(make(), saved(source))
    torch.testing.assert_close(tokens_here(encoder, IMAGES), tokens_of(source, IMAGES), rtol=1e-5, atol=1e-5)
    assert "the encoder computes what the file's does, on images of 32 x 32 px" in caplog.text


def test_crops_that_are_no_squares_keep_rotary_positions_exact():
    source, images = hf_dinov3(), torch.randn(2, 3, 16, 48, generator=seeded(0))
    encoder = start(capi_backbone(), source.state_dict(), grid_size=(2, 6))
    torch.testing.assert_close(tokens_here(encoder, images), tokens_of(source, images), rtol=1e-5, atol=1e-5)


def test_a_learned_table_is_for_squares():
    """MAE's, of sines and cosines, tells its grid in any size."""
    learned = timm_vit(init_values=1.0).state_dict()
    with pytest.raises(UserError, match=r"positions is learned.* 2 x 6 patches; set data.images_size to a num"):
        start(cae_encoder(grid_size=(2, 6)), learned, grid_size=(2, 6))
    encoder = cae_encoder(grid_size=(2, 6))
    own = learned | {"pos_embed": model.sincos_table((4, 4), WIDTH)}  # as MAE has them: columns first
    own["pos_embed"] = torch.cat([torch.zeros(1, 1, WIDTH), own["pos_embed"].view(1, 16, WIDTH)], dim=1)
    assert model.position_grid(start(encoder, own, grid_size=(2, 6)).pos_embed, row_first=True) == (2, 6)


def test_the_names_of_files_are_those_of_state_dicts(tmp_path):
    """Transformers writes other names than its models have."""
    for kind in ("ViTMAE", "Dinov2", "DINOv3ViT"):
        source = hf_model(kind)
        source.save_pretrained(tmp_path / kind)
        file = starting.read_file(str(tmp_path / kind / "model.safetensors"))
        assert file.keys() != source.state_dict().keys()
        first, second = (read(weights, cae_encoder()).weights for weights in (file, source.state_dict()))
        assert first.keys() == second.keys()
        assert all(torch.equal(x, second[key]) for key, x in first.items())


@pytest.mark.parametrize(("registers", "resize"), [(0, resize_like_dino), (4, resize_antialiased)])
def test_positions_are_resized_as_the_authors_do(registers, resize):
    """The table of a file is for 6 x 6 patches, and images have 4 x 4."""
    source = timm_vit(grid=(6, 6), init_values=1.0, reg_tokens=registers, no_embed_class=registers > 0)
    table = source.pos_embed.detach()
    encoder = start(cae_encoder(), source.state_dict())
    torch.testing.assert_close(encoder.pos_embed[:, 1:], resize(table, (4, 4))[:, -16:])
    if not registers:  # of which this encoder has none
        source.patch_embed.strict_img_size = False
        oracle = PatchFeatures(source, PATCH, resize).eval()
        with torch.no_grad():
            torch.testing.assert_close(encoder(IMAGES).feature_map, oracle(IMAGES)[2], rtol=1e-5, atol=1e-5)


NARROW = {
    "MAE": timm_vit,
    "DINOv2": lambda: timm_vit(init_values=1.0, reg_tokens=4, no_embed_class=True),
    "DINOv3": hf_dinov3,
}
LOST = {
    ("ijepa", "MAE"): ["dropped: class token"],
    ("ijepa", "DINOv2"): ["dropped: class token; 4 registers", "multiplied into the projections"],
    ("ijepa", "DINOv3"): ["dropped: rotary positions; class token; 4 registers", "not in the file: the table of posit"],
    ("cae", "DINOv2"): [
        "taken: 2 blocks; patch embedding; layer scale; positions; class token; final norm",
        "dropped: 4 registers",
    ],
    ("cae", "DINOv3"): ["dropped: rotary positions; 4 registers", "not in the file: the table of positions"],
    ("capi", "MAE"): ["not in the file: 7 registers", "dropped: the table of positions", "LayerNorm to RMSNorm"],
    ("capi", "DINOv2"): ["not in the file: 3 registers", "class token and registers, as 5 registers"],
    ("capi", "DINOv3"): ["biases of the norms", "which have places here"],
}


def test_a_class_token_that_becomes_a_register_keeps_its_position():
    source = timm_vit()
    registers = start(capi_backbone(), source.state_dict()).registers
    torch.testing.assert_close(registers[:, :1], source.cls_token + source.pos_embed[:, :1])


@pytest.mark.parametrize(("here", "there"), LOST)
def test_what_is_lost_is_named(here, there, caplog):
    plain = {"n_registers": 8, "register_coordinates": "edge", "norm_layer_type": "RMSNorm", "final_norm_kwargs": None}
    plain["transformers_kwargs"] = {"embed_dim": WIDTH, "block_kwargs": {"attn_kwargs": {"num_heads": HEADS}}}
    make = {"ijepa": ijepa_encoder, "cae": cae_encoder, "capi": lambda: capi_backbone(**plain)}[here]
    with caplog.at_level(logging.INFO):
        encoder = start(make(), NARROW[there]().state_dict())
    for line in LOST[here, there]:
        assert line in caplog.text
    assert "does not compute what the file's does" in caplog.text
    assert all(x.isfinite().all() for x in encoder(IMAGES)[::2])


def test_patches_of_another_size_are_resampled_and_bands_spread(caplog):
    state = timm_vit(patch_size=4, img_size=16).state_dict()
    with caplog.at_level(logging.INFO):
        encoder = start(cae_encoder(in_chans=2, grid_size=8), state, grid_size=8)
    weight, theirs = encoder.patch_embed.proj.weight, state["patch_embed.proj.weight"]
    grey = torch.rand(1, 1, 4, 4, generator=seeded(0))  # enlarged, it gives what it gave
    large = F.interpolate(grey, (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close((weight * large).sum((1, 2, 3)), (theirs * grey).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    assert encoder.pos_embed.shape == (1, 65, WIDTH)
    for said in (
        "patch embedding from 4 to 8 px",
        "model.patch_size=4 keeps it",
        "3 bands, spread over 2",
        "8 x 8 patc",
    ):
        assert said in caplog.text


def without(pattern):
    return lambda state: {key: x for key, x in state.items() if pattern not in key}


REFUSED = {
    "other sizes": (
        lambda s: s,
        {"embed_dim": 64, "depth": 3, "num_heads": 2},
        "set model.embed_dim=32 model.depth=2$",
    ),
    "other MLPs": (lambda s: s, {"mlp_dim": 96}, "set model.mlp_dim=128$"),
    "gated": (lambda s: s | {"blocks.0.mlp.w12.weight": s["norm.bias"]}, {}, "gated .blocks.0.mlp.w12.weight."),
    "unknown parts": (
        lambda s: s | {"blocks.0.attn.q_norm.weight": s["norm.bias"]},
        {},
        "no encoder here has: blocks.0",
    ),
    "no tensor": (lambda s: s | {"norm.bias": 3}, {}, "no encoder here has: norm.bias"),
    "cut short": (without("blocks.0.attn.proj"), {}, "incomplete: it has no blocks.0.attn.proj.weight"),
    "integers": (lambda s: s | {"norm.bias": s["norm.bias"].int()}, {}, "norm.bias .int32.*Convert"),
    "a hole": (lambda s: s | {"norm.bias": s["norm.bias"] / 0}, {}, "not all finite: norm.bias"),
    "misshapen": (
        lambda s: s | {"blocks.1.attn.qkv.bias": torch.ones(95)},
        {},
        r"width 32: blocks.1.attn.v.bias .31.",
    ),
    "no square": (lambda s: s | {"pos_embed": s["pos_embed"][:, :15]}, {}, "15 positions are those of no square"),
    "two bands": (
        lambda s: s | {"patch_embed.proj.weight": s["patch_embed.proj.weight"][:, :2]},
        {},
        "reads 2 bands; set model.in_chans=2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name):
    change, sizes, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        start(cae_encoder(**sizes), change(timm_vit().state_dict()))


def test_heads_are_those_of_the_file(tmp_path, caplog):
    """No shape tells them: DINOv3's frequencies do, or a config.json beside the file, or the published widths."""
    encoder = cae_encoder(num_heads=4)
    with pytest.raises(UserError, match=r"set model.num_heads=2$"):
        start(encoder, published_names(hf_dinov3().state_dict()))
    start(encoder, timm_vit().state_dict())
    assert "nothing tells its attention heads; model.num_heads=4 has to be their number" in caplog.text
    wide = {"embed_dim": 192, "depth": 1}
    state = timm_vit(**wide).state_dict()
    with pytest.raises(UserError, match=r"set model.num_heads=3. No shape tells .* 3 are those of published ViTs"):
        start(cae_encoder(**wide, num_heads=4), state)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    start(cae_encoder(**wide, num_heads=4), state, source=str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"set model.num_heads=4$"):
        start(cae_encoder(**wide, num_heads=3), state, source=str(tmp_path / "w.pth"))
    for text, message in (("{", "cannot be read"), ('{"num_attention_heads": "4"}', "num_attention_heads='4'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json.*{message}"):
            start(cae_encoder(**wide), state, source=str(tmp_path / "w.pth"))


def test_own_weights_are_left_to_their_own_reading():
    for encoder in (cae_encoder(), ijepa_encoder(), capi_backbone()):
        own = encoder.state_dict()
        exported = {f"backbone.{key}": x for key, x in own.items()}
        assert starting.read(own, "", encoder) is starting.read(exported, "", encoder) is None


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("data") / "images", size=40)
    golden_cae.save_tokenizer(folder)
    return folder


RUNS = {
    "cae": (train_cae, golden_cae.tiny_run, timm_vit, ["cae.yaml"], ["student"], cae),
    "ijepa": (
        train_ijepa,
        golden_ijepa.tiny_run,
        lambda: timm_vit(class_token=False, init_values=1.0, patch_size=4, img_size=32),
        ["ijepa.yaml"],
        ["student", "student_ema"],
        ijepa,
    ),
    "capi": (train_capi, tiny, hf_dinov3, ["capi.yaml", "capi_from_dinov3.yaml"], ["student", "student_ema"], model),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_starts_from_published_weights(images, tmp_path, name):
    """One step with the encoder frozen, then what evaluations load is what the file's network is."""
    script, arguments, make_source, presets, exports, module = RUNS[name]
    source = make_source()
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "source.pth")
    own = [str(ROOT / "configs" / "continue" / preset) for preset in presets]
    own += [f"train.init_from={tmp_path / 'source.pth'}", "optim.total_iters=1", "optim.start.frozen_iters=1"]
    own += ["optim.start.ramp_iters=0"]
    if name == "capi":
        attention = "model.transformers_kwargs.block_kwargs.attn_kwargs"
        own += ["data.images_size=32", "model.patch_size=8", "model.n_registers=5", "model.encoder_kwargs.depth=2"]
        own += ["model.transformers_kwargs.embed_dim=32", f"{attention}.num_heads=2"]
    assert script.main(arguments(images, tmp_path / "run", *own)) == 0
    for export in exports:
        encoder = module.load_model(pretrained_weights=tmp_path / "run" / f"{export}.pth")
        torch.testing.assert_close(tokens_here(encoder, IMAGES), tokens_of(source, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["training", "dry run"])
def test_another_width_is_an_error_with_the_overrides_to_type(images, tmp_path, capsys, more):
    torch.save(timm_vit(embed_dim=64, depth=3).state_dict(), tmp_path / "source.pth")
    arguments = tiny(images, tmp_path / "run", f"train.init_from={tmp_path / 'source.pth'}")
    assert train_capi.main([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert "set model.transformers_kwargs.embed_dim=64 model.encoder_kwargs.depth=3" in said and "Traceback" not in said
