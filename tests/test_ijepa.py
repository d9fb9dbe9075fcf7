"""ijepa.py, and the masks of I-JEPA: every published vector, and properties."""

import math
from typing import Any

import pytest
import torch
from conftest import ROOT, load_golden_json, seeded
from golden_ijepa import CONTEXT, IJEPA, IMAGES, STOP, TARGET, hashed, tiny_networks
from torch import Tensor, nn

import cae
import ijepa
from ijepa import (
    Encoder,
    Predictor,
    gather_patches,
    load_model,
    prediction_loss,
    prediction_targets,
    published_part,
    read_encoder,
)
from masking import MultiBlockMasks, MultiBlockPlan
from model import encoder_sizes, sincos_table
from utils import UserError

TINY = IJEPA["tiny"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def plan(grid: int, **changes: Any) -> MultiBlockPlan:
    values = {
        "height": grid, "width": grid, "num_contexts": 1, "num_targets": 4, "context_scale": (0.85, 1.0),
        "target_scale": (0.15, 0.2), "target_aspect": (0.75, 1.5), "min_keep": 10, "allow_overlap": False,
        "context_patches": None, "cut_from_below": True, "reach_border": False, "independent_aspect": False,
    }  # fmt: skip
    return MultiBlockPlan(**(values | changes))


# --- Networks --------------------------------------------------------------------------------------------------------


def test_the_rule_that_fills_weights_and_images_is_the_published_one():
    for index in (0, 5):
        expected = IJEPA["hash_examples"][f"u(n=0..3,j={index})"]
        assert hashed(4, index).tolist() == pytest.approx(expected, abs=1e-12)
    assert IMAGES.flatten()[:4].tolist() == pytest.approx(IJEPA["hash_examples"]["image_first4"], abs=1e-7)


def test_positions_are_those_of_the_vectors_column_first():
    expected = torch.tensor(IJEPA["sincos_grid3_dim8"])
    torch.testing.assert_close(sincos_table((3, 3), 8)[0], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("grid", "dim"), [(16, 1280), (14, 768), (16, 384)])
def test_large_position_tables_are_those_of_the_vectors(grid, dim):
    expected, table = IJEPA[f"sincos_grid{grid}_dim{dim}_checks"], sincos_table((grid, grid), dim)[0].double()
    assert float(table.sum()) == pytest.approx(expected["sum"], rel=1e-7)
    assert float(table.abs().sum()) == pytest.approx(expected["abs_sum"], rel=1e-7)
    for actual, key in (
        (table[1, :4], "row1_first4"),
        (table[grid, :4], "row_g_first4"),
        (table[grid, dim // 2 : dim // 2 + 4], "row_g_half_first4"),
    ):
        assert actual.tolist() == pytest.approx(expected[key], abs=1e-7), key
    assert float(table[-1, -1]) == pytest.approx(expected["last_last"], abs=1e-7)


@pytest.mark.parametrize("name", ["ijepa_vith14", "stop_vitb16"])
def test_state_dicts_have_the_published_names_and_shapes(name):
    sizes = {"ijepa_vith14": (16, 14, 1280, 32, 16, 12), "stop_vitb16": (14, 16, 768, 12, 12, 6)}[name]
    encoder, predictor = meta_networks(*sizes)
    published = load_golden_json(f"keys_{name}")
    for module, part in ((encoder, "encoder"), (predictor, "predictor")):
        shapes = {f"module.{key}": list(value.shape) for key, value in module.state_dict().items()}
        assert shapes == published[part]


def meta_networks(
    grid: int, patch: int, dim: int, depth: int, heads: int, predictor_depth: int
) -> tuple[Encoder, Predictor]:
    with torch.device("meta"):
        encoder = Encoder(grid_size=grid, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads)
        predictor = Predictor(grid_size=grid, encoder_dim=dim, embed_dim=384, depth=predictor_depth, num_heads=heads)
    return encoder, predictor


COUNTS = {
    "vith14": (IJEPA["param_counts"], (16, 14, 1280, 32, 16, 12)),
    "vitb16": (STOP["param_counts_vit-b16"], (14, 16, 768, 12, 12, 6)),
    "vitl16": (STOP["param_counts_vit-l16"], (14, 16, 1024, 24, 16, 12)),
    "vith16": (STOP["param_counts_vit-h16"], (14, 16, 1280, 32, 16, 12)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_as_many_tensors_and_parameters_as_the_published_ones(name):
    expected, sizes = COUNTS[name]
    for module, part in zip(meta_networks(*sizes), ("enc", "pred"), strict=True):
        total = sum(p.numel() for p in module.parameters())
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert len(module.state_dict()) == expected.get(f"n_{part}_keys", expected.get(f"{part}_keys"))
        assert total == expected.get(f"{part}_params_total", expected.get(f"{part}_total"))
        assert trainable == expected.get(f"{part}_params_trainable", expected.get(f"{part}_trainable"))


def test_weights_are_initialised_as_in_the_vectors_deep_layers_included():
    torch.manual_seed(0)
    encoder = Encoder(grid_size=14, patch_size=16, embed_dim=192, depth=12, num_heads=12)
    predictor = Predictor(grid_size=14, encoder_dim=192, embed_dim=96, depth=6, num_heads=12)
    tensors = encoder.state_dict() | predictor.state_dict()
    for key, expected in STOP["init_std_b16"].items():
        num = tensors[key].numel()
        assert float(tensors[key].std()) == pytest.approx(expected, abs=max(2e-4, 0.1 / math.sqrt(num))), key
        assert float(tensors[key].abs().max()) > (0.05 if num > 1000 else 0.03), f"{key} is truncated"
    for key, value in tensors.items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key.split(".")[-2:][0]:
            assert (value == 1).all(), key


def test_every_parameter_is_filled_by_init_weights():
    for module in tiny_networks():
        before = {key: value.clone() for key, value in module.state_dict().items()}
        for parameter in module.parameters():
            nn.init.constant_(parameter, math.nan)
        module.init_weights()
        for key, value in module.state_dict().items():
            assert value.isfinite().all(), key
            assert "pos_embed" not in key or torch.equal(value, before[key]), key


def test_gathering_is_mask_major():
    example = IJEPA["apply_masks_example"]
    x, masks = torch.arange(8.0).view(2, 4, 1), torch.tensor(example["masks"])
    assert gather_patches(x, masks).squeeze(-1).tolist() == example["out"]
    blocks = gather_patches(x, masks).unflatten(0, masks.shape[:2]).repeat_interleave(2, dim=0).flatten(0, 1)
    assert blocks.squeeze(-1).tolist() == example["repeat2"]


def test_targets_are_repeated_in_the_order_of_the_predictions():
    """Block, context, image: with two contexts each target meets the prediction from every context of its own image."""
    features = torch.randn(2, 16, 32, generator=seeded(1))
    targets = prediction_targets(features, TARGET, num_contexts=2).view(2, 2, 2, 4, 32)
    assert torch.equal(targets[:, 0], targets[:, 1])
    for block in range(2):
        for image in range(2):
            rows = torch.nn.functional.layer_norm(features[image, TARGET[block, image]], (32,), eps=1e-5)
            assert torch.equal(targets[block, 0, image], rows)
    encoder, predictor = tiny_networks()
    contexts = torch.cat([CONTEXT, CONTEXT.flip(1)])
    both = predictor(encoder.encode(IMAGES, contexts), contexts, TARGET).view(2, 2, 2, 4, 32)
    for i in range(2):
        alone = predictor(encoder.encode(IMAGES, contexts[i : i + 1]), contexts[i : i + 1], TARGET).view(2, 2, 4, 32)
        torch.testing.assert_close(both[:, i], alone, **CLOSE)


def test_smooth_l1_is_that_of_the_vectors():
    example = IJEPA["smooth_l1_from_zero"]
    errors = torch.tensor(example["d"]).view(1, 1, -1)
    assert prediction_loss(errors, torch.zeros_like(errors)).item() == pytest.approx(example["val"], rel=1e-7)


def tiny_step(noise: Tensor | None = None, *, mask_token: bool = True) -> dict[str, Any]:
    """Features, targets, predictions, loss and gradients of the networks of the vectors."""
    encoder, predictor = tiny_networks()
    if not mask_token:
        with torch.no_grad():
            predictor.mask_token.zero_()
    with torch.no_grad():
        features = encoder.encode(IMAGES)
    targets = prediction_targets(features, TARGET)
    predicted = predictor(encoder.encode(IMAGES, CONTEXT), CONTEXT, TARGET, noise)
    loss = prediction_loss(predicted, targets)
    loss.backward()
    gradients = {name: p.grad for module in (encoder, predictor) for name, p in module.named_parameters()}
    return {"features": features, "h": targets, "z": predicted.detach(), "loss": loss.item(), "gradients": gradients}


def assert_vector(actual: Tensor, expected: list[float]) -> None:
    assert actual.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_tiny_ijepa_has_the_features_predictions_and_loss_of_the_vectors():
    step = tiny_step()
    assert list(step["features"].shape) == TINY["target_full_shape"]
    assert list(step["z"].shape) == TINY["z_shape"] and list(step["h"].shape) == TINY["h_shape"]
    assert float(step["features"].double().sum()) == pytest.approx(TINY["target_full_sum"], rel=1e-5)
    assert_vector(step["features"][0, 0, :4], TINY["target_full_0_0_first4"])
    assert_vector(step["h"][0, 0, :4], TINY["h_0_0_first4"])
    assert_vector(step["z"][0, 0, :4], TINY["z_0_0_first4"])
    assert_vector(step["z"][3, 3, -4:], TINY["z_3_3_last4"])
    assert float(step["z"].double().sum()) == pytest.approx(TINY["z_sum"], rel=1e-5)
    assert step["loss"] == pytest.approx(TINY["loss"], rel=1e-6)


def test_a_tiny_ijepa_has_the_gradients_of_the_vectors():
    gradients = tiny_step()["gradients"]
    for name, expected in TINY["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-5), name
    assert [name for name, gradient in gradients.items() if gradient is None] == TINY["params_without_grad"]


def test_stop_without_noise_is_positions_alone():
    """Neither mask token nor bias: that is what the published code does without noise, and not the baseline I-JEPA."""
    step, expected = tiny_step(mask_token=False), STOP["tiny"]["no_stop"]
    assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert float(step["z"].double().sum()) == pytest.approx(expected["z_sum"], rel=1e-5)
    assert_vector(step["z"][0, 0, :4], expected["z_0_0_first4"])


def test_a_tiny_stop_has_the_predictions_loss_and_gradients_of_the_vectors():
    expected, generator = STOP["tiny"]["stop_var0.25_seed123"], seeded(123)
    noise = [torch.normal(0.0, 0.25, (2, 4, 32), generator=generator) for _ in TARGET]
    for i, block in enumerate(noise):
        assert_vector(block.flatten()[:4], expected[f"noise_call{i}_first4"])
    step = tiny_step(torch.cat(noise))
    assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert float(step["z"].double().sum()) == pytest.approx(expected["z_sum"], rel=1e-5)
    assert_vector(step["z"][0, 0, :4], expected["z_0_0_first4"])
    assert_vector(step["z"][3, 3, -4:], expected["z_3_3_last4"])
    for name, norm in (expected["grads"] | expected["enc_grads"]).items():
        assert step["gradients"][name].norm().item() == pytest.approx(norm, rel=1e-5), name
    without = [name for name, gradient in step["gradients"].items() if gradient is None]
    assert sorted(without) == sorted(expected["params_without_grad"])


def test_target_blocks_do_not_see_each_other():
    encoder, predictor = tiny_networks()
    context = encoder.encode(IMAGES, CONTEXT)
    both, alone = predictor(context, CONTEXT, TARGET), predictor(context, CONTEXT, TARGET[1:])
    torch.testing.assert_close(both[2:], alone, **CLOSE)


def test_patches_outside_of_the_context_are_not_seen():
    encoder, _ = tiny_networks()
    changed = IMAGES.clone()
    changed[:, :, 36:] += 1  # the lowest row of patches, which is in no context
    assert torch.equal(encoder.encode(changed, CONTEXT), encoder.encode(IMAGES, CONTEXT))
    assert not torch.equal(encoder.encode(changed), encoder.encode(IMAGES))


# --- As a model of the evaluations -----------------------------------------------------------------------------------


def test_an_encoder_gives_what_evaluations_ask_for_at_any_size():
    encoder, _ = tiny_networks()
    for height, width in ((48, 48), (24, 60)):
        features = encoder(torch.randn(2, 3, height, width))
        assert features.feature_map.shape == (2, height // 12, width // 12, 32)
        assert features.registers.shape == (2, 0, 32)
        torch.testing.assert_close(features.global_repr, features.feature_map.mean(dim=(1, 2)), **CLOSE)
    assert torch.equal(encoder(IMAGES).feature_map.flatten(1, 2), encoder.encode(IMAGES))


def test_an_encoder_gives_its_layers_by_the_calls_of_others():
    encoder, _ = tiny_networks()
    images = torch.randn(2, 3, 24, 60)
    whole = encoder(images).feature_map
    first, last = encoder.get_intermediate_layers(images, 2)
    torch.testing.assert_close(last.unflatten(1, (2, 5)), whole, **CLOSE)
    shallow = Encoder(grid_size=4, patch_size=12, embed_dim=32, depth=1, num_heads=4)
    shallow.load_state_dict({key: value for key, value in encoder.state_dict().items() if "blocks.1" not in key})
    torch.testing.assert_close(first.unflatten(1, (2, 5)), shallow(images).feature_map, **CLOSE)
    tokens, (only,) = encoder.forward_intermediates(images, indices=[0])
    assert only.shape == (2, 32, 2, 5)
    torch.testing.assert_close(tokens.unflatten(1, (2, 5)), whole, **CLOSE)
    with pytest.raises(UserError, match="the encoder has 2 blocks, 0 to 1"):
        encoder.get_intermediate_layers(images, [2])


def test_an_image_that_is_no_multiple_of_the_patch_is_refused():
    encoder, _ = tiny_networks()
    with pytest.raises(UserError, match="50x48 must be a multiple of the patch size 12"):
        encoder(torch.zeros(1, 3, 50, 48))


@pytest.mark.parametrize("changes", [{"embed_dim": 30}, {"num_heads": 5}, {"num_heads": 0}])
def test_sizes_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(UserError, match=r"embed_dim=\d+ must be a multiple of"):
        Encoder(**({"grid_size": 4, "patch_size": 12, "embed_dim": 32, "depth": 1, "num_heads": 4} | changes))


@pytest.fixture
def published(tmp_path):
    """A file as the authors publish it, of the networks of the vectors."""
    encoder, predictor = tiny_networks()
    target = Encoder(grid_size=4, patch_size=12, embed_dim=32, depth=2, num_heads=4)
    file = {
        name: {f"module.{key}": value for key, value in module.state_dict().items()}
        for name, module in (("encoder", encoder), ("predictor", predictor), ("target_encoder", target))
    }
    path = tmp_path / "jepa-ep1.pth.tar"
    torch.save(file | {"opt": {}, "scaler": None, "epoch": 1, "loss": 0.5, "batch_size": 2, "world_size": 1}, path)
    return path, encoder, target


def test_a_published_file_is_a_model_of_the_evaluations(published):
    path, encoder, target = published
    for kwargs, expected in (({}, target), ({"encoder": "encoder"}, encoder)):
        model = load_model(pretrained_weights=path, num_heads=4, **kwargs)
        assert not model.training
        assert torch.equal(model(IMAGES).feature_map, expected(IMAGES).feature_map)
    with pytest.raises(UserError, match="Nothing tells the attention heads"):
        load_model(pretrained_weights=path)
    with pytest.raises(UserError, match="encoder='teacher' must be one of encoder, target_encoder"):
        load_model(pretrained_weights=path, num_heads=4, encoder="teacher")


@pytest.mark.parametrize("method", [ijepa, cae])
def test_without_weights_a_configuration_is_needed_and_one_of_the_method(method):
    with pytest.raises(UserError, match=r"pretrained_weights=None: .* for random weights config_path="):
        method.load_model()
    with pytest.raises(UserError, match=r"The model section of .*default_pretrain_config\.yaml has a wrong key: "):
        method.load_model(config_path=ROOT / "default_pretrain_config.yaml")
    config_path = ROOT / "configs" / method.__name__ / "imagenette.yaml"
    assert [method.load_model(config_path, num_heads=heads).blocks[0].attn.num_heads for heads in (None, 6)] == [3, 6]


@pytest.mark.parametrize("source", [lambda path, _: path, lambda _, exported: exported], ids=["published", "exported"])
def test_the_loader_of_baselines_computes_what_this_encoder_does(published, source):
    """Another implementation, timm's, of the same file."""
    from baselines._shared import PatchFeatures, create_vit, load_published, resize_plainly

    path, _, target = published
    exported = path.with_name("student_ema.pth")
    torch.save({f"backbone.{key}": value for key, value in target.state_dict().items()}, exported)
    vit = create_vit(
        "vit_base_patch16_224", img_size=48, patch_size=12, embed_dim=32, depth=2, num_heads=4, class_token=False,
        fc_norm=False,
    )  # fmt: skip
    load_published(vit, str(source(path, exported)), path=("target_encoder",), prefix="module.", exports=True)
    theirs = PatchFeatures(vit, 12, resize_plainly, class_token=False).eval()
    for size in ((48, 48), (24, 60)):
        images = torch.randn(2, 3, *size, generator=seeded(0))
        for a, b in zip((target(images)[0], target(images)[2]), (theirs(images)[0], theirs(images)[2]), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        options = ({"n": 2, "reshape": True}, {"n": 1}, {"n": 2, "norm": False})
        for given in options:
            both = target.get_intermediate_layers(images, **given), theirs.get_intermediate_layers(images, **given)
            assert len(both[0]) == given["n"]
            torch.testing.assert_close(*both, **CLOSE)
        (_, last), whole = target.get_intermediate_layers(images, 2, reshape=True), target(images).feature_map
        torch.testing.assert_close(last.movedim(1, -1), whole, **CLOSE)
    with pytest.raises(UserError, match="n=3: the network has 2 blocks"):
        theirs.get_intermediate_layers(images, 3)


def test_weights_of_another_method_are_refused_in_words():
    from golden import tiny_model

    weights = {f"backbone.{key}": value for key, value in tiny_model().state_dict().items()}
    with pytest.raises(UserError, match=r"'capi.pth' holds no encoder of I-JEPA or StoP: pos_embed"):
        read_encoder(weights, "capi.pth")


def test_sizes_are_read_from_weights(published):
    path, encoder, _ = published
    weights = published_part(torch.load(path, weights_only=True), "encoder")
    sizes = encoder_sizes(weights, str(path))
    assert sizes == {"grid_size": 4, "patch_size": 12, "in_chans": 3, "embed_dim": 32, "depth": 2, "mlp_dim": 128}
    assert Encoder(**sizes, num_heads=4).state_dict().keys() == encoder.state_dict().keys()


# --- Masks -----------------------------------------------------------------------------------------------------------

GRIDS = {16: "16x16(224/14)", 14: "14x14(224/16)", 28: "28x28(448/16)"}


@pytest.mark.parametrize("grid", [16, 14])
def test_block_sizes_are_those_of_the_vectors(grid):
    for seed, expected in enumerate(IJEPA["masks"][f"block_sizes_seed0to11_{GRIDS[grid]}"]):
        assert [list(size) for size in plan(grid).draw_sizes(seeded(seed))] == expected, f"seed {seed}"


@pytest.mark.parametrize("grid", GRIDS)
def test_block_sizes_are_as_frequent_as_in_the_vectors(grid):
    drawn: dict[str, dict[str, int]] = {"pred": {}, "enc": {}}
    generator = torch.Generator()
    for seed in range(20_000):
        sizes = plan_of[grid].draw_sizes(generator.manual_seed(seed))
        for name, (rows, columns) in zip(drawn, sizes, strict=True):
            drawn[name][f"{rows}x{columns}"] = drawn[name].get(f"{rows}x{columns}", 0) + 1
    for name, counts in drawn.items():
        assert counts == IJEPA["masks"][f"{name}_size_hist_20000seeds_{GRIDS[grid]}"], name
    areas = [math.prod(map(int, size.split("x"))) for size in drawn["pred"]]
    assert [min(areas), max(areas)] == IJEPA["masks"][f"pred_area_minmax_{GRIDS[grid]}"]


plan_of = {grid: plan(grid) for grid in GRIDS}


def collated(grid: int, num_images: int, size_seed: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The masks of a batch from one stream of random numbers, as the published code draws them."""
    masks = MultiBlockMasks(plan(grid), seed=0)
    return masks.collate(plan_of[grid].draw_sizes(seeded(size_seed)), [generator] * num_images)


@pytest.mark.parametrize(
    ("grid", "expected"), [(16, IJEPA["masks"]["collate_seed0_B4_16x16"]), (14, STOP["collate_seed0_B4_14x14"])]
)
def test_collated_masks_are_those_of_the_vectors(grid, expected):
    masks = collated(grid, 4, 0, seeded(0))
    context, target = masks["context_indices"], masks["target_indices"]
    assert list(context[0].shape) == expected["enc_shape"]
    assert [list(block.shape) for block in target] == expected["pred_shapes"]
    assert context[0, 0].tolist() == expected["enc0_img0"]
    assert target[0, 0].tolist() == expected["pred0_img0"]
    assert context[0].sum(dim=1).tolist() == expected["enc_sum"]
    assert target.sum(dim=2).tolist() == expected["pred_sum"]
    if grid == 16:
        assert target[1, 0].tolist() == expected["pred1_img0"]
        assert target[:, :, 0].tolist() == expected["pred_first_idx"]


@pytest.mark.parametrize("grid", [16, 14])
@pytest.mark.parametrize("num_images", [1, 16, 128])
def test_the_number_of_images_decides_how_much_is_seen_as_in_the_vectors(grid, num_images):
    vectors = IJEPA["masks"]
    masks, batches = MultiBlockMasks(plan(grid), seed=0), {1: 200, 16: 40, 128: 6}[num_images]
    lengths = [
        masks([(batch * num_images + i,) for i in range(num_images)])["context_indices"].shape[2]
        for batch in range(batches)
    ]
    expected = vectors[f"coverage_{grid}x{grid}"]["mean_ctx_len_B16"] if num_images == 16 else None
    expected = expected or vectors[f"ctx_len_{grid}x{grid}_B{num_images}"]["mean"]
    assert sum(lengths) / batches == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("reach_border", [False, True])
def test_the_last_row_and_column_are_never_drawn_unless_they_may_be(reach_border):
    masks = MultiBlockMasks(plan(14, reach_border=reach_border), seed=0)
    covered = torch.zeros(14 * 14, dtype=torch.bool)
    for batch in range(40):
        for indices in masks([(4 * batch + i,) for i in range(4)]).values():
            covered[indices.flatten()] = True
    border = covered.view(14, 14)
    assert border[-1].any().item() == border[:, -1].any().item() == reach_border
    assert border[:-1, :-1].all()


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (14, 14)])
def test_contexts_have_the_shape_of_the_image_and_targets_that_of_their_own(height, width):
    """A square context of most of a long image does not fit into it."""
    long = plan(height, width=width, reach_border=True, allow_overlap=True)
    for seed in range(20):
        target, context = long.draw_sizes(seeded(seed))
        assert context[0] * context[1] >= 0.8 * height * width
        assert 0.85 < context[0] / context[1] / (height / width) < 1.15
        assert 0.5 < target[0] / target[1] < 2
    masks = MultiBlockMasks(long, seed=0)([(i,) for i in range(150)])
    assert len(masks["context_indices"].unique()) == height * width, "some patches are never seen"
    assert len(masks["target_indices"].unique()) == height * width, "some patches are never predicted"


def test_context_and_targets_do_not_overlap_unless_they_may():
    for allowed in (False, True):
        masks = MultiBlockMasks(plan(14, allow_overlap=allowed), seed=3)([(i,) for i in range(8)])
        for image in range(8):
            context = set(masks["context_indices"][0, image].tolist())
            targets = set(masks["target_indices"][:, image].flatten().tolist())
            assert bool(context & targets) == allowed


def test_masks_follow_from_seed_and_keys_alone():
    masks, keys = MultiBlockMasks(plan(14), seed=1), [(5,), (6,)]
    expected = masks(keys)
    torch.manual_seed(99)
    for name, indices in masks(keys).items():
        assert torch.equal(indices, expected[name])
    others = (MultiBlockMasks(plan(14), seed=2)(keys), masks([(7,), (8,)]))
    assert all(not torch.equal(o["target_indices"], expected["target_indices"]) for o in others)


def test_a_fixed_context_makes_the_batch_size_immaterial():
    masks = MultiBlockMasks(plan(14, context_patches=50), seed=0)
    together = masks([(i,) for i in range(32)])["context_indices"]
    assert together.shape == (1, 32, 50)
    alone = masks([(0,)])["context_indices"]
    assert alone.shape[2] == 50
    assert torch.equal(alone[:, 0], together[:, 0]), "of the batch, the first image decides on the sizes of blocks"


def test_a_cut_at_random_keeps_the_lower_part_of_images():
    rows = {}
    for from_below in (True, False):
        masks = MultiBlockMasks(plan(14, cut_from_below=from_below), seed=0)
        indices = torch.cat([masks([(64 * b + i,) for i in range(64)])["context_indices"].flatten() for b in range(8)])
        assert all((i.diff() > 0).all() for i in masks([(0,), (1,)])["context_indices"].flatten(0, 1))
        rows[from_below] = torch.bincount(indices // 14, minlength=14) / len(indices)
    assert rows[True][12] < 0.03 < 0.05 < rows[False][12]


def test_area_and_aspect_of_a_target_are_one_random_number_unless_they_are_two():
    for independent in (False, True):
        blocks = plan(14, independent_aspect=independent)
        sizes = {blocks.draw_sizes(seeded(seed))[0] for seed in range(300)}
        assert (len(sizes) > 8) == independent, sizes


@pytest.mark.parametrize(
    ("grid", "changes", "says"),
    [
        (1, {}, r"masks.target_scale=\[0.15, 0.2\]: a target block may have no patch on a grid of 1 x 1"),
        (6, {"target_scale": (0.001, 0.2)}, r"masks.target_scale=\[0.001, 0.2\]: a target block may have no patch"),
        (4, {}, r"masks.context_scale=\[0.85, 1.0\]: a context block may have 9 patches on a grid of 4 x 4"),
        (14, {"context_scale": (0.01, 1.0)}, r"masks.context_scale=.*not more than masks.min_keep=10"),
        (14, {"context_patches": 170}, r"masks.context_scale=.*less than masks.context_patches=170"),
    ],
)  # fmt: skip
def test_blocks_that_leave_nothing_are_refused_in_words(grid, changes, says):
    with pytest.raises(UserError, match=says):
        plan(grid, **changes)


def test_a_context_that_targets_leave_too_little_of_is_drawn_again_and_then_overlaps():
    """Targets that cover nearly all of the image: only by ignoring some of them is there a context."""
    small = plan(8, target_scale=(0.6, 0.7), min_keep=20, num_targets=4)
    contexts, targets = small.draw_blocks(*small.draw_sizes(seeded(0)), seeded(0))
    assert len(contexts[0]) > 20
    assert set(contexts[0].tolist()) & set(torch.cat(targets).tolist())
