"""cae.py: every published vector, and properties."""

import argparse
import math
from typing import Any

import pytest
import torch
from conftest import load_golden_json, seeded
from golden_cae import (
    CAE,
    HIDDEN,
    IMAGES,
    LABELS,
    PREDICT_INDICES,
    TINY,
    VISIBLE_INDICES,
    fill,
    published_state,
    tiny_networks,
)
from torch import Tensor, nn

from cae import (
    Encoder,
    Predictor,
    alignment_loss,
    load_model,
    patches_at,
    read_encoder,
    token_loss,
)
from model import draw_drop_path, linear_rates, sincos_table
from utils import UserError

KEYS = load_golden_json("keys_cae_base")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def meta_networks(dim: int, depth: int, heads: int, **predictor: Any) -> tuple[Encoder, Predictor]:
    sizes = {"embed_dim": dim, "regressor_depth": 4, "decoder_depth": 4, "num_heads": 12, "vocabulary_size": 8192}
    with torch.device("meta"):
        encoder = Encoder(grid_size=14, patch_size=16, embed_dim=dim, depth=depth, num_heads=heads)
        return encoder, Predictor(grid_size=14, encoder_dim=dim, **(sizes | predictor))


# --- Networks --------------------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_vectors_row_first():
    expected = torch.tensor(CAE["sincos_grid3_dim8_with_cls"])
    encoder = Encoder(grid_size=3, patch_size=2, embed_dim=8, depth=1, num_heads=1)
    torch.testing.assert_close(encoder.pos_embed[0], expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(sincos_table((3, 3), 8, row_first=True)[0], expected[1:], atol=1e-7, rtol=0)


def test_the_state_dict_of_base_has_the_published_names_and_shapes_in_the_published_order():
    shapes = {key: list(value.shape) for key, value in published_state(*meta_networks(768, 12, 12)).items()}
    assert list(shapes.items()) == list(KEYS["pretrain_model"].items())
    assert len(shapes) == CAE["stats"]["n_keys"]


@pytest.mark.parametrize("width", [768, 1024])
def test_large_has_the_shapes_of_either_reading_of_the_published_script(width):
    """As the script is run, regressor and decoder are narrower than the encoder; as it is meant, 12 heads have 85."""
    state = published_state(*meta_networks(1024, 24, 16, embed_dim=width))
    if width == 768:
        expected = KEYS["large_pretrain_model_as_released_script"]
        assert expected.items() <= {key: list(value.shape) for key, value in state.items()}.items()
    assert ("encoder_to_regresser.weight" in state) == (width == 768)
    heads = state["regresser.regressor_blocks.0.cross_attn.q.weight"].shape
    assert heads == ((768, 768) if width == 768 else (1020, 1024))


def test_base_has_as_many_parameters_as_the_published_one():
    encoder, predictor = meta_networks(768, 12, 12)
    parts: dict[str, nn.Module | nn.Parameter] = {
        "encoder": encoder, "regresser": predictor.regresser, "decoder": predictor.decoder,
        "mask_token": predictor.mask_token, "rd_pos_embed": predictor.rd_pos_embed,
    }  # fmt: skip
    for name, part in parts.items():
        parameters = list(part.parameters()) if isinstance(part, nn.Module) else [part]
        expected = CAE["stats"]["by_prefix"][name]
        assert len(parameters) == expected["tensors"], name
        assert sum(p.numel() for p in parameters) == expected["numel"], name
        assert sum(p.numel() for p in parameters if p.requires_grad) == expected["trainable"], name


def test_weights_are_initialised_as_in_the_vectors():
    """Base is large: its layers are filled one by one."""
    torch.manual_seed(0)
    encoder = Encoder(grid_size=2, patch_size=16, embed_dim=768, depth=1, num_heads=12, layer_scale=1e-5)
    predictor = Predictor(
        grid_size=2, encoder_dim=768, embed_dim=768, regressor_depth=1, decoder_depth=1, num_heads=12,
        vocabulary_size=8192,
    )  # fmt: skip
    state = published_state(encoder, predictor)
    for key, expected in CAE["stats"]["init_stds"].items():
        tensor = state[key.replace("blocks.11", "blocks.0")]
        assert float(tensor.std()) == pytest.approx(expected, rel=max(0.003, 2 / math.sqrt(tensor.numel()))), key
    for key in ("mask_token", "encoder.cls_token", "encoder.patch_embed.proj.weight"):
        assert 0.0195 < float(state[key].abs().max()) <= 0.02, f"{key} is not cut at one standard deviation"
    for key, value in state.items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert (value == 1).all(), key
        elif "gamma" in key:
            assert (value == (1e-5 if "encoder." in key else 0.1)).all(), key


def test_every_parameter_is_filled_by_init_weights():
    for module in tiny_networks(16):
        before = {key: value.clone() for key, value in module.state_dict().items()}
        for parameter in module.parameters():
            nn.init.constant_(parameter, math.nan)
        module.init_weights()
        for key, value in module.state_dict().items():
            assert value.isfinite().all(), key
            assert "pos_embed" not in key or torch.equal(value, before[key]), key


def tiny_step(token_weight: float = 1.0, alignment_weight: float = 2.0, dim: int = 32) -> dict[str, Any]:
    """What the networks of the vectors compute, and the gradients of a weighted sum of both losses."""
    encoder, predictor = tiny_networks(dim)
    with torch.no_grad():
        targets = encoder.encode(IMAGES, PREDICT_INDICES)[:, 1:]
    context = encoder.encode(IMAGES, VISIBLE_INDICES)[:, 1:]
    prediction = predictor(context, targets, VISIBLE_INDICES, PREDICT_INDICES)
    token = token_loss(prediction.logits, LABELS)
    alignment = alignment_loss(prediction.latents, prediction.targets)
    (token_weight * token + alignment_weight * alignment).backward()
    parameters = {f"encoder.{name}": p for name, p in encoder.named_parameters()} | dict(predictor.named_parameters())
    return {
        "prediction": prediction,
        "ce": token.item(),
        "align_weighted": 2 * alignment.item(),
        "loss": token.item() + 2 * alignment.item(),
        "gradients": {name: p.grad for name, p in parameters.items()},
    }


def assert_vector(actual: Tensor, expected: list[float]) -> None:
    assert actual.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_tiny_cae_has_the_latents_logits_and_losses_of_the_vectors():
    step, expected = tiny_step(), TINY["decoder_embed_dim_32"]
    latents, targets, logits = step["prediction"]
    assert list(logits.shape) == expected["logits_shape"]
    assert list(latents.shape) == list(targets.shape) == expected["latent_shape"]
    assert_vector(logits[0, :4], expected["logits_0_first4"])
    assert_vector(latents[0, 0, :4], expected["latent_predict_0_0_first4"])
    assert_vector(targets[0, 0, :4], expected["latent_target_0_0_first4"])
    for name in ("ce", "align_weighted", "loss"):
        assert step[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize(
    ("weights", "norms"),
    [
        ((1.0, 2.0), TINY["decoder_embed_dim_32"]["grad_norms"]),
        ((1.0, 0.0), TINY["ce_only_grad_norms"]),
        ((0.0, 2.0), TINY["align_only_grad_norms"]),
    ],
    ids=["both", "tokens alone", "alignment alone"],
)
def test_a_tiny_cae_has_the_gradients_of_the_vectors(weights, norms):
    gradients = tiny_step(*weights)["gradients"]
    for name, expected in norms.items():
        assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-5), name
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert sorted(without) == sorted(TINY["decoder_embed_dim_32"]["params_without_grad"])
    of_decoder = sum(float(gradient.abs().sum()) for name, gradient in gradients.items() if name.startswith("decoder"))
    assert (of_decoder == 0) == (weights[0] == 0), "alignment does not reach the decoder"


def test_the_tiny_state_dict_is_that_of_the_vectors():
    state = published_state(*tiny_networks())
    shapes = {key: list(value.shape) for key, value in state.items() if not key.startswith("alignment_encoder.")}
    assert list(shapes.items()) == list(TINY["decoder_embed_dim_32"]["keys"].items())


def test_a_narrower_regressor_projects_context_and_targets_and_learns_from_the_context_alone():
    step = tiny_step(dim=16)
    latents, targets, logits = step["prediction"]
    assert latents.shape == targets.shape == (2, 8, 16) and logits.shape == (16, 16)
    assert not targets.requires_grad
    gradients = step["gradients"]
    assert gradients["encoder_to_regresser.weight"].norm() > 0 and gradients["encoder.cls_token"].norm() > 0
    encoder, predictor = tiny_networks(16)
    hidden = encoder.encode(IMAGES, PREDICT_INDICES)[:, 1:]
    expected = predictor.encoder_to_regresser_norm(predictor.encoder_to_regresser(hidden))
    torch.testing.assert_close(targets, expected.detach(), **CLOSE)


def test_the_class_token_of_whole_images_is_that_of_the_vectors():
    encoder = Encoder(grid_size=4, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    head = {"head.weight": torch.empty(10, 32), "head.bias": torch.empty(10)}
    fill(encoder.state_dict() | head)  # which the published model of linear probes has as well
    expected = CAE["linear_feature_tiny"]
    global_repr, registers, feature_map = encoder(IMAGES)
    assert list(global_repr.shape) == expected["shape"] and registers.shape == (2, 0, 32)
    for row, first in zip(global_repr, expected["first4"], strict=True):
        assert_vector(row[:4], first)
    assert torch.equal(feature_map.flatten(1, 2), encoder.encode(IMAGES)[:, 1:])


def test_hidden_patches_are_not_seen():
    encoder, _ = tiny_networks()
    pixels = HIDDEN.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(pixels, IMAGES + 1, IMAGES)
    assert torch.equal(encoder.encode(changed, VISIBLE_INDICES), encoder.encode(IMAGES, VISIBLE_INDICES))
    assert not torch.equal(encoder.encode(changed), encoder.encode(IMAGES))


def test_rows_are_taken_from_every_image_or_from_one_table_for_all():
    x = torch.randn(2, 16, 3)
    expected = torch.stack([x[i, mask] for i, mask in enumerate(HIDDEN)])
    assert torch.equal(patches_at(x, PREDICT_INDICES, 2), expected)
    expected = torch.stack([x[0, mask] for mask in HIDDEN])
    assert torch.equal(patches_at(x[:1], PREDICT_INDICES, 2), expected)


# --- Drop-path -------------------------------------------------------------------------------------------------------


def test_drop_path_rises_over_the_blocks_and_keeps_the_expectation():
    assert linear_rates(0.1, 4) == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    assert linear_rates(0.1, 1) == [0.0]
    assert draw_drop_path([0.0, 0.0], 4, seeded(0)) is None
    drawn = draw_drop_path([0.0, 0.5], 20_000, seeded(0))
    assert drawn is not None and drawn.shape == (2, 2, 20_000)
    assert (drawn[0] == 1).all() and set(drawn[1].unique().tolist()) == {0.0, 2.0}
    assert drawn[1].mean().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(drawn[1])[0, 1].abs() < 0.05, "both branches of a block are dropped together"


def test_dropped_branches_are_left_out_image_by_image():
    encoder, predictor = tiny_networks()
    drop_path = torch.ones(2, 2, 2)
    assert torch.equal(encoder.encode(IMAGES, drop_path=drop_path), encoder.encode(IMAGES))
    drop_path[:, :, 0] = 0
    tokens = encoder.encode(IMAGES, drop_path=drop_path)
    shallow = Encoder(grid_size=4, patch_size=8, embed_dim=32, depth=0, num_heads=4)
    shallow.load_state_dict({key: x for key, x in encoder.state_dict().items() if not key.startswith("blocks")})
    torch.testing.assert_close(tokens[0], shallow.encode(IMAGES)[0], **CLOSE)
    torch.testing.assert_close(tokens[1], encoder.encode(IMAGES)[1], **CLOSE)
    context, targets = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    given = (context, targets, VISIBLE_INDICES, PREDICT_INDICES)
    dropped = predictor(*given, torch.cat([drop_path, drop_path]))
    assert torch.equal(dropped.latents[1], predictor(*given).latents[1])
    assert not torch.equal(dropped.latents[0], predictor(*given).latents[0])


# --- As a model of the evaluations -----------------------------------------------------------------------------------


def test_an_encoder_gives_what_evaluations_ask_for_at_any_size():
    encoder, _ = tiny_networks()
    for height, width in ((32, 32), (16, 40)):
        global_repr, registers, feature_map = encoder(torch.randn(2, 3, height, width))
        assert feature_map.shape == (2, height // 8, width // 8, 32)
        assert global_repr.shape == (2, 32) and registers.shape == (2, 0, 32)
    images = torch.randn(2, 3, 16, 40)
    _, last = encoder.get_intermediate_layers(images, 2)
    torch.testing.assert_close(last.unflatten(1, (2, 5)), encoder(images).feature_map, **CLOSE)
    ((_, class_token),) = encoder.get_intermediate_layers(images, 1, return_registers=True)
    torch.testing.assert_close(class_token[:, 0], encoder(images).global_repr, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"embed_dim": 30}, "embed_dim=30 must be a multiple of 4"), ({"num_heads": 0}, "num_heads=0 must lie between")],
)
def test_sizes_that_do_not_fit_together_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        Encoder(**({"grid_size": 4, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4} | changes))


@pytest.fixture
def published(tmp_path):
    """The files that the authors publish, of a whole training and of an encoder, and an export; with the encoder."""
    encoder, predictor = tiny_networks()
    state = published_state(encoder, predictor)
    stripped = {key: value for key, value in state.items() if key.startswith(("mask_token", "encoder."))}
    files: dict[str, Any] = {
        "full": {"model": state, "optimizer": {}, "epoch": 799, "scaler": {}, "args": argparse.Namespace(lr=1.5e-3)},
        "stripped": {"model": stripped},
        "exported": {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
        | {f"predictor.{key}": value for key, value in predictor.state_dict().items()},
    }
    for name, file in files.items():
        torch.save(file, tmp_path / f"{name}.pth")
    return tmp_path, encoder


@pytest.mark.parametrize("name", ["full", "stripped", "exported"])
def test_every_layout_of_weights_is_a_model_of_the_evaluations(published, name):
    folder, encoder = published
    path = folder / f"{name}.pth"
    model = load_model(pretrained_weights=path, num_heads=4)
    assert not model.training
    for a, b in zip(model(IMAGES), encoder(IMAGES), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"Nothing tells the attention heads .*num_heads=12 for ViT-Ti, S and B, 16"):
        load_model(pretrained_weights=path)
    path.with_suffix(".yaml").write_text("model: {num_heads: 4}")
    assert torch.equal(load_model(pretrained_weights=path)(IMAGES).global_repr, encoder(IMAGES).global_repr)


@pytest.mark.parametrize("name", ["full", "stripped", "exported"])
def test_the_loader_of_baselines_computes_what_this_encoder_does(published, name):
    """Another implementation, timm's, of the same file."""
    from baselines import cae_loader
    from baselines._shared import PatchFeatures, create_vit, resize_plainly

    folder, encoder = published
    vit = create_vit(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, use_abs_pos_emb=True,
        use_rel_pos_bias=False, init_values=0.1,
    )  # fmt: skip
    cae_loader.load_weights(vit, str(folder / f"{name}.pth"))
    theirs = PatchFeatures(vit, 8, resize_plainly).eval()
    for size in ((32, 32), (16, 40)):
        images = torch.randn(2, 3, *size, generator=seeded(0))
        for a, b in zip((encoder(images)[0], encoder(images)[2]), (theirs(images)[0], theirs(images)[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_of_another_method_are_refused_in_words():
    from golden import tiny_model

    weights = {f"backbone.{key}": value for key, value in tiny_model().state_dict().items()}
    with pytest.raises(UserError, match=r"'capi.pth' holds no encoder of CAE: cls_token"):
        read_encoder(weights, "capi.pth")
