"""model.py against the golden numbers, and its properties."""

import copy
import math
import re
import textwrap
from collections import Counter
from typing import Any

import pytest
import torch
from commands import run_forked
from conftest import ROOT, load_golden, load_golden_json, seeded
from golden import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clustering import L2NormLinear, OnlineClustering
from model import PREDICTORS, EncoderDecoder, RotaryEmbedding, edge_coordinates, grid_coordinates, load_model
from utils import UserError
from weights import load_backbone_weights, save_safetensors


def with_drop_path(rate: float, kind: str) -> dict[str, Any]:
    block = {"drop_path_type": kind, "attn_kwargs": {"num_heads": 2}}
    return {"transformers_kwargs": {"embed_dim": 32, "drop_path_rate": rate, "block_kwargs": block}}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], EncoderDecoder]:
    tensors, meta = load_golden("model_default")
    model = EncoderDecoder(**meta["model"])
    model.load_state_dict({k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")})
    return tensors, model.eval()


def test_state_dict_has_the_names_and_shapes_of_the_released_weights(golden):
    tensors, model = golden
    expected = {k.removeprefix("sd."): v.shape for k, v in tensors.items() if k.startswith("sd.")}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected


@pytest.mark.parametrize(("norm", "parts"), [("RMSNorm", {"weight"}), ("LayerNorm", {"weight", "bias"})])
def test_learnable_final_norms_have_the_published_names_and_are_used(norm, parts):
    model = tiny_model(norm_layer_type=norm, final_norm_kwargs={"elementwise_affine": True}).eval()
    plain = tiny_model(norm_layer_type=norm)
    names = {f"{tower}_norm.{part}" for tower in ("enc", "dec") for part in parts}
    assert model.state_dict().keys() - plain.state_dict().keys() == names
    images = torch.randn(1, 3, 8, 8)
    before = model(images)
    assert all(value.isfinite().all() for value in before)
    with torch.no_grad():
        model.enc_norm.weight *= 2
    assert torch.equal(model(images).feature_map, 2 * before.feature_map)
    with torch.no_grad():
        model.enc_norm.weight /= 2
        model.dec_norm.weight *= 2
    after = model(images)
    assert torch.equal(after.feature_map, before.feature_map)
    torch.testing.assert_close(after.global_repr, 2 * before.global_repr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {a: 1", "(?s)cannot be read: .*line 1"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"- 1\n", "cannot be read"),
        (b"model:\n  patch_size: ${nothing}", "cannot be read: .*nothing"),
        (b"model: 3", "cannot be read: .*int"),
    ],
)
def test_a_config_that_cannot_be_read_is_explained(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_model(config_path=tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)


def test_no_name_of_weights_is_no_file():
    with pytest.raises(UserError, match="pretrained_weights='' is a folder"):
        load_model(pretrained_weights="")


def test_weights_with_the_earlier_names_of_final_norms_load_by_every_way(tmp_path):
    changes = {"norm_layer_type": "LayerNorm", "final_norm_kwargs": {"elementwise_affine": True}}
    model = tiny_model(**changes).eval()
    with torch.no_grad():
        for parameter in (*model.enc_norm.parameters(), *model.dec_norm.parameters()):
            parameter.copy_(torch.randn_like(parameter))
    earlier = {re.sub(r"^(enc|dec)_norm", r"\1oder.norm", key): value for key, value in model.state_dict().items()}
    assert "encoder.norm.bias" in earlier
    torch.save({f"backbone.{key}": value for key, value in earlier.items()}, tmp_path / "w.pth")
    model.save_pretrained(tmp_path / "hub")
    save_safetensors(earlier, tmp_path / "hub" / "model.safetensors")
    bare = tiny_model(**changes).eval()
    load_backbone_weights(bare, earlier, "w.pth")
    override = {"model": {k: v for k, v in model.arguments.items() if v is not None}}
    images = torch.randn(1, 3, 8, 8)
    for loaded in (
        bare,
        load_model(pretrained_weights=tmp_path / "w.pth", config_override=override),
        EncoderDecoder.from_pretrained(tmp_path / "hub"),
    ):
        for actual, expected in zip(loaded(images), model(images), strict=True):
            assert torch.equal(actual, expected)


def test_forward_matches_golden(golden):
    tensors, model = golden
    with torch.no_grad():
        out = model(tensors["images"])
    for name in ("global_repr", "registers", "feature_map"):
        torch.testing.assert_close(getattr(out, name), tensors[f"out.{name}"], atol=1e-5, rtol=0)
    global_repr, registers, feature_map = out
    assert global_repr is out.global_repr
    assert registers is out.registers
    assert feature_map is out.feature_map


def test_forward_pretrain_matches_golden(golden):
    tensors, model = golden
    with torch.no_grad():
        patches, predictions = model.forward_pretrain(
            tensors["images"], tensors["visible_indices"], tensors["predict_indices"], do_prediction=True
        )
        teacher_patches, nothing = model.forward_pretrain(tensors["images"])
    torch.testing.assert_close(patches, tensors["pretrain.encoder_patches"], atol=1e-5, rtol=0)
    torch.testing.assert_close(predictions, tensors["pretrain.predictions"], atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher_patches, tensors["teacher.encoder_patches"], atol=1e-5, rtol=0)
    assert nothing is None


def test_rotary_frequencies_match_golden(golden):
    tensors, _ = golden
    torch.testing.assert_close(
        RotaryEmbedding(16).freqs.detach(), tensors["sd.encoder.blocks.0.residual1.fn.rope.freqs"]
    )


def test_initialisation_has_the_golden_statistics():
    golden = load_golden_json("init_stats")
    width, stats = golden["embed_dim"], golden["stats"]
    towers = {"embed_dim": width, "drop_path_rate": 0.0, "block_kwargs": {"attn_kwargs": {"num_heads": 4}}}
    backbone = EncoderDecoder(
        transformers_kwargs=towers, encoder_kwargs={"depth": 3}, decoder_kwargs={"depth": 2}, n_registers=16
    )
    k = stats["teacher_head.layer.weight"]["shape"][0]
    teacher_head = OnlineClustering(width, k, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    fresh = dict(backbone.named_parameters())
    fresh |= {f"student_head.{name}": p for name, p in L2NormLinear(width, k).named_parameters()}
    fresh |= {f"teacher_head.{name}": p for name, p in teacher_head.named_parameters()}
    assert fresh.keys() == stats.keys()
    for name, expected in stats.items():
        assert_same_statistics(name, fresh[name].detach(), expected)


def assert_same_statistics(name: str, actual: Tensor, stats: dict[str, Any]) -> None:
    n = actual.numel()
    assert list(actual.shape) == stats["shape"], name
    if stats["std"] == 0 or name.endswith("freqs"):  # not random
        assert actual.mean().item() == pytest.approx(stats["mean"], rel=1e-5), name
        assert actual.abs().max().item() == pytest.approx(stats["absmax"], rel=1e-5), name
        return
    std = stats["std"]
    assert abs(actual.mean().item() - stats["mean"]) < 6 * std * math.sqrt(2 / n), name
    assert actual.std().item() / std == pytest.approx(1, abs=6 / math.sqrt(n)), name
    assert actual.abs().max().item() / stats["absmax"] == pytest.approx(1, abs=0.6), name


def test_meta_device_then_materialise_is_the_same_model():
    torch.manual_seed(3)
    model = tiny_model()
    with torch.device("meta"):
        materialised = tiny_model()
    materialised.to_empty(device="cpu")
    for parameter in materialised.parameters():
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(3)
    tiny_model()  # the constructor above drew once; init_weights draws the same again
    torch.manual_seed(3)
    model.init_weights()
    torch.manual_seed(3)
    materialised.init_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, materialised.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["efficient", "naive"])
def test_drop_path_keeps_the_expectation(kind):
    model = tiny_model(**with_drop_path(0.3, kind)).train()
    residual = model.encoder.blocks[0].residual2
    x = torch.randn(8, 3, 32, generator=seeded(0))
    with torch.no_grad():
        mean = torch.stack([residual(x) for _ in range(3000)]).mean(0)
        expected = x + residual.branch(x)
    kept = max(int(8 * 0.7), 1) / 8 if kind == "efficient" else 0.7
    spread = (expected - x).abs().max() * math.sqrt((1 - kept) / kept / 3000)
    assert (mean - expected).abs().max() < 6 * spread


def test_efficient_drop_path_runs_the_branch_on_exactly_that_many_images():
    model = tiny_model(**with_drop_path(0.3, "efficient")).train()
    residual = model.encoder.blocks[0].residual2
    seen = []
    residual.fn.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    for b in (1, 2, 8, 10):
        residual(torch.randn(b, 3, 32))
    assert seen == [1, 1, 5, 7]  # max(int(b * 0.7), 1), where 10 * (1 - 0.3) is 7.0 in floating point


def test_drop_path_is_off_in_eval_mode():
    model = tiny_model(**with_drop_path(0.9, "efficient")).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x).feature_map, model(x).feature_map)


def test_dropped_self_attention_still_sees_one_coordinate_tensor():
    """Self-attention computes its angles once: the subset of the coordinates must stay one object for q and k."""
    model = tiny_model(**with_drop_path(0.5, "efficient")).train()
    calls = []
    model.encoder.blocks[0].residual1.fn.rope.register_forward_hook(lambda *_: calls.append(1))
    model.forward_pretrain(torch.randn(4, 3, 8, 8))
    assert len(calls) == 1


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_drop_path_asks_the_device_for_nothing():
    """Reading a number, or a tensor whose shape depends on values, would make the host wait."""
    model = tiny_model(**with_drop_path(0.5, "efficient")).train()
    with Operators() as operators:
        _, predictions = model.forward_pretrain(
            torch.randn(4, 3, 8, 8),
            torch.tensor([0, 1, 4, 5, 8, 9, 12, 13]),
            torch.tensor([2, 7, 10, 15]),
            do_prediction=True,
        )
        predictions.square().sum().backward()
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
    assert not waits & operators.names.keys()
    assert operators.names["aten::randperm"] == 8  # two branches in each of four blocks
    added_up = [name for name in operators.names.elements() if "index_add" in name or "index_put" in name]
    assert added_up == ["aten::index_put"], (
        "on a GPU these are atomic operations; one for the visible patches is enough"
    )


@pytest.mark.parametrize("kind", ["efficient", "naive"])
def test_the_same_draw_drops_the_same_branches_and_another_one_others(kind):
    model = tiny_model(**with_drop_path(0.5, kind)).train()
    x, everything = torch.randn(6, 3, 8, 12), torch.arange(6 * 6)

    def predictions(seed):
        drawn = model.draw_drop_path(6, seeded(seed))
        before = torch.get_rng_state()
        _, predictions = model.forward_pretrain(x, everything, everything, do_prediction=True, drop_path=drawn)
        assert torch.equal(torch.get_rng_state(), before), "something else was drawn"
        return predictions

    assert torch.equal(predictions(0), predictions(0))
    assert not torch.equal(predictions(0), predictions(1))


@pytest.mark.parametrize("kind", ["efficient", "naive"])
def test_every_branch_draws_for_itself(kind):
    model = tiny_model(**with_drop_path(0.5, kind))
    drawn = model.draw_drop_path(64, seeded(0))
    assert drawn.shape[:2] == (4, 2)
    assert len({tuple(branch.flatten().tolist()) for branch in drawn.flatten(0, 1)}) == 8
    assert tiny_model().draw_drop_path(64, seeded(0)) is None, "there is nothing to drop"


@pytest.mark.parametrize("kind", ["efficient", "naive"])
@pytest.mark.parametrize(("b", "rate"), [(6, 0.5), (5, 0.3), (2, 0.9), (1, 0.3)])
def test_dropped_images_pass_unchanged_and_their_gradient_too(kind, b, rate):
    """Against the plain definition, image by image: x + branch(x, context) / fraction that is kept, or x."""
    residual = tiny_model(**with_drop_path(rate, kind)).train().double().encoder.blocks[0].residual1
    shapes = {"x": (b, 3, 32), "coords": (b, 3, 2), "context": (b, 4, 32), "context_coords": (b, 4, 2)}
    random = seeded(0)
    inputs = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    drawn = residual.draw(b, random)
    num_kept = max(int(b * (1 - rate)), 1)
    kept = drawn.nonzero().flatten() if kind == "naive" else drawn[0, :num_kept]
    scale = 1 / (1 - rate) if kind == "naive" else b / num_kept
    weights = torch.randn(shapes["x"], generator=random, dtype=torch.float64)
    results = []
    for is_plain in (False, True):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        if is_plain:
            rows = [[leaf[i : i + 1] for leaf in leaves.values()] for i in range(b)]
            out = [x + scale * residual.branch(x, *others) if i in kept else x for i, (x, *others) in enumerate(rows)]
            out = torch.cat(out)
        else:
            out = residual(*leaves.values(), drawn=drawn)
        gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()), materialize_grads=True)
        results.append([out, *gradients])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)  # angles are float32


def test_attention_on_a_cpu_takes_the_fused_kernel():
    """For student, predictor and teacher: nothing holds all scores of a layer."""
    model = tiny_model().train()
    with Operators() as operators:
        _, predictions = model.forward_pretrain(
            torch.randn(2, 3, 8, 8), torch.tensor([0, 1, 4, 5]), torch.tensor([2, 7]), do_prediction=True
        )
        predictions.square().sum().backward()
        with torch.no_grad():
            model.forward_pretrain(torch.randn(2, 3, 8, 8))
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert operators.names[flash] == 6
    assert operators.names[f"{flash}_backward"] == 4
    assert operators.names["aten::_softmax"] == 0


class LargestCosine(TorchDispatchMode):
    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cos:
            self.num_elements = max(self.num_elements, out.numel())
        return out


@pytest.mark.parametrize("trains", [True, False])
def test_angles_of_whole_images_are_computed_for_one_and_are_those_of_each(trains):
    model = tiny_model(**with_drop_path(0.5, "efficient")).train(trains)
    x, everything = torch.randn(6, 3, 8, 12), torch.arange(6 * 6)
    outputs = []
    for visible in (None, everything):  # shown all patches by name, each image has coordinates of its own
        torch.manual_seed(1)
        outputs.append(model.forward_pretrain(x, visible, everything, do_prediction=True))
    with LargestCosine() as cosine:
        model.forward_pretrain(x)
    assert cosine.num_elements == (4 + 6) * 16, "one image's tokens times the width of a head"
    for one_for_all, own in zip(*outputs, strict=True):
        assert torch.equal(one_for_all, own)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_masked_patches_do_not_reach_the_student(kind):
    model = tiny_model(predictor=kind).eval()
    images = torch.randn(1, 3, 8, 8, generator=seeded(0))
    visible, predict = torch.tensor([0, 1]), torch.tensor([2, 3])
    changed = images.clone()
    changed[:, :, 4:] += 1  # patches 2 and 3
    for a, b in zip(
        model.forward_pretrain(images, visible, predict, do_prediction=True),
        model.forward_pretrain(changed, visible, predict, do_prediction=True),
        strict=True,
    ):
        assert torch.equal(a, b)


# --- How the student predicts


def plain_block(
    block: Any, x: Tensor, coords: Tensor, context: Tensor | None = None, context_coords: Tensor | None = None
) -> Tensor:
    """A block on the tokens `[n, d]` of one image, head by head, as the definition has it."""
    attention, (norm1, norm2) = block.residual1.fn, (block.residual1.norm, block.residual2.norm)

    def turned(tokens: Tensor, where: Tensor) -> Tensor:
        angles = where.double() @ attention.rope.freqs
        (x1, x2), (a1, a2) = tokens.chunk(2, dim=-1), angles.chunk(2, dim=-1)
        return torch.cat([x1 * a1.cos() - x2 * a1.sin(), x2 * a2.cos() + x1 * a2.sin()], dim=-1)

    own = norm1(x)
    context, context_coords = (own, coords) if context is None else (context, context_coords)
    heads = []
    projected = attention.q_proj(own), attention.k_proj(context), attention.v_proj(context)
    for q, k, v in zip(*(tokens.chunk(attention.num_heads, dim=-1) for tokens in projected), strict=True):
        scores = turned(q, coords) @ turned(k, context_coords).T / math.sqrt(q.shape[-1])
        heads.append(scores.softmax(dim=-1) @ v)
    x = x + attention.proj(torch.cat(heads, dim=-1))
    mlp = block.residual2.fn
    return x + mlp.fc2(nn.functional.gelu(mlp.fc1(norm2(x))))


def plain_predictions(model: EncoderDecoder, kind: str, image: Tensor, visible: list[int], hidden: list[int]) -> Tensor:
    """What is predicted of one image, from the definition of each predictor; `model` is in float64."""
    patches = model.patch_embed(image[None])[0].flatten(1).T
    rows = torch.linspace(0, 1, image.shape[1] // 4)
    grid = torch.cartesian_prod(rows, torch.linspace(0, 1, image.shape[2] // 4))
    shown = list(range(len(grid))) if kind == "fused" else visible
    low, high = grid[shown].amin(0), grid[shown].amax(0)
    coords = torch.cat([low + edge_coordinates(4, "edge") * (high - low), grid[shown]])
    if kind == "fused":
        patches = torch.stack([patches[i] if i in visible else model.mask_token[0] for i in shown])
    else:
        patches = patches[visible]
    x = torch.cat([model.registers[0], patches])
    for block in model.encoder.blocks:
        x = plain_block(block, x, coords)
    x = model.enc_norm(x)
    if kind == "fused":
        return x[4:][hidden]
    queries = model.mask_token.expand(len(hidden), -1)
    if kind == "cross":
        for block in model.decoder.blocks:
            queries = plain_block(block, queries, grid[hidden], x, coords)
        return model.dec_norm(queries)
    everything, everywhere = torch.cat([x, queries]), torch.cat([coords, grid[hidden]])
    for block in model.decoder.blocks:
        everything = plain_block(block, everything, everywhere)
    return model.dec_norm(everything[-len(hidden) :])


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictions_are_those_of_the_definition_of_each_predictor(kind):
    torch.manual_seed(0)
    model = tiny_model(predictor=kind)
    images = torch.randn(2, 3, 12, 16, generator=seeded(0))
    visible, hidden = [[0, 1, 4, 5], [6, 3, 10, 11]], [[2, 11, 7], [0, 9, 8]]
    flat = [torch.tensor([12 * i + patch for i in range(2) for patch in patches[i]]) for patches in (visible, hidden)]
    _, actual = model.forward_pretrain(images, *flat, do_prediction=True)
    weights = torch.randn(actual.shape, generator=seeded(1))
    plain = copy.deepcopy(model).double()
    rows = [plain_predictions(plain, kind, images[i].double(), visible[i], hidden[i]) for i in range(2)]
    torch.testing.assert_close(actual.double(), torch.cat(rows), atol=1e-5, rtol=1e-5)
    (actual * weights).sum().backward()
    (torch.cat(rows) * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm(), name


@pytest.mark.parametrize("kind", PREDICTORS)
def test_only_queries_of_the_split_predictor_see_which_others_are_predicted(kind):
    model = tiny_model(predictor=kind).eval()
    images, visible = torch.randn(1, 3, 8, 8, generator=seeded(0)), torch.tensor([0, 1])
    beside, alone = (
        model.forward_pretrain(images, visible, torch.tensor(hidden), do_prediction=True)[1][0]
        for hidden in ([2, 3], [2])
    )
    assert torch.allclose(beside, alone, atol=1e-6) == (kind != "split")
    teacher = model.forward_pretrain(images)[0]
    assert torch.equal(teacher, model(images).feature_map.flatten(1, 2)), "whole images have no mask tokens"


def test_the_encoder_has_its_published_names_whatever_predicts(golden):
    _, published = golden
    names = {kind: tiny_model(predictor=kind).state_dict().keys() for kind in PREDICTORS}
    assert names["cross"] == names["split"]
    towers = ("decoder.", "dec_norm.")
    assert names["fused"] == {key for key in names["cross"] if not key.startswith(towers)}
    prefixes = {key.partition(".")[0] for key in published.state_dict()}
    assert {key.partition(".")[0] for key in names["fused"]} == prefixes - {"decoder"}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_a_model_is_rebuilt_with_its_predictor(kind, tmp_path):
    model, images = tiny_model(predictor=kind).eval(), torch.randn(1, 3, 8, 12)
    model.save_pretrained(tmp_path / "hub")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    override = {"model": {k: v for k, v in model.arguments.items() if v is not None}}
    for loaded in (
        EncoderDecoder.from_pretrained(tmp_path / "hub"),
        load_model(pretrained_weights=tmp_path / "w.pth", config_override=override),
    ):
        for actual, expected in zip(loaded(images), model(images), strict=True):
            assert torch.equal(actual, expected)
    if kind == "fused":
        assert torch.equal(model(images).global_repr, model(images).feature_map.mean(dim=(1, 2)))


def test_a_predictor_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="predictor='mlp' must be one of cross, split, fused"):
        tiny_model(predictor="mlp")


@pytest.mark.parametrize("kind", PREDICTORS)
def test_every_parameter_gets_a_gradient(kind):
    model = tiny_model(predictor=kind)
    images = torch.randn(2, 3, 8, 8)
    _, predictions = model.forward_pretrain(
        images, torch.tensor([0, 1, 5, 6]), torch.tensor([2, 7]), do_prediction=True
    )
    predictions.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_image_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(UserError, match=r"10x8 must be a multiple of the patch size 4"):
        tiny_model()(torch.randn(1, 3, 10, 8))


def test_registers_walk_round_the_unit_square():
    expected = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
    torch.testing.assert_close(edge_coordinates(8, "edge"), torch.tensor(expected, dtype=torch.float32))
    with pytest.raises(UserError, match="multiple of 4"):
        tiny_model(n_registers=6)
    assert tiny_model(n_registers=6, register_coordinates="zeros").n_registers == 6


def test_out_layer_counts_from_the_embedding_and_wraps_around():
    torch.manual_seed(1)
    model = tiny_model().eval()
    images = torch.randn(1, 3, 8, 8)
    by_layer = {}
    for layer in (0, 1, 2, -1, -3):
        chosen = tiny_model(out_layer=layer).eval()
        chosen.load_state_dict(model.state_dict())
        by_layer[layer] = chosen(images)
    assert torch.equal(by_layer[-1].feature_map, by_layer[2].feature_map)
    assert torch.equal(by_layer[-3].feature_map, by_layer[0].feature_map)
    assert not torch.allclose(by_layer[0].feature_map, by_layer[1].feature_map)
    for out in by_layer.values():
        assert torch.equal(out.global_repr, by_layer[-1].global_repr)


def test_no_registers_work():
    out = tiny_model(n_registers=0)(torch.randn(2, 3, 8, 12))
    assert out.registers.shape == (2, 0, 32)
    assert out.feature_map.shape == (2, 2, 3, 32)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_load_model_reads_an_export_with_its_config_beside_it(tmp_path, prefix):
    model = tiny_model()
    torch.save({f"{prefix}{k}": v for k, v in model.state_dict().items()}, tmp_path / "w.pth")
    (tmp_path / "w.yaml").write_text(
        "model:\n  patch_size: 4\n  n_registers: 4\n  transformers_kwargs: {embed_dim: 32, block_kwargs: "
        "{attn_kwargs: {num_heads: 2}}}\n  encoder_kwargs: {depth: 2}\n  decoder_kwargs: {depth: 2}\n"
    )
    loaded = load_model(pretrained_weights=tmp_path / "w.pth")
    assert not loaded.training
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(images).global_repr, model.eval()(images).global_repr)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("backbone.mask_token"), "1 missing: mask_token"),
        (lambda sd: sd.update({"backbone.extra": torch.zeros(1)}), "1 unexpected: extra"),
        (
            lambda sd: sd.update({"backbone.mask_token": torch.zeros(1, 3)}),
            r"mask_token \(\[1, 3\], expected \[1, 32\]\)",
        ),
        (lambda sd: sd.clear(), "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    small = {
        "model": {
            "patch_size": 4,
            "n_registers": 4,
            "transformers_kwargs": {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
            "encoder_kwargs": {"depth": 2},
            "decoder_kwargs": {"depth": 2},
        }
    }
    state = {f"backbone.{k}": v for k, v in tiny_model().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        load_model(pretrained_weights=tmp_path / "w.pth", config_override=small)


def test_patch_coordinates_run_from_0_to_1():
    for num in (1, 2, 3, 16, 37, 1000):
        expected = torch.linspace(0, 1, num, dtype=torch.float64)
        torch.testing.assert_close(
            grid_coordinates(num, 2, torch.device("cpu"))[0, ::2, 0].double(), expected, atol=1e-7, rtol=0
        )


def test_one_model_takes_images_of_any_size_and_shape():
    """What a call gives depends on its own images alone: not on the sizes before, not on the rest of the batch."""
    model = tiny_model().eval()
    images = {size: torch.randn(2, 3, *size, generator=seeded(0)) for size in ((8, 8), (16, 24), (4, 4), (24, 16))}
    first = {size: model(x) for size, x in images.items()}
    for size, x in reversed(images.items()):
        out = model(x[1:])
        assert out.feature_map.shape == (1, size[0] // 4, size[1] // 4, 32)
        for now, before in zip(out, first[size], strict=True):
            torch.testing.assert_close(now, before[1:], atol=1e-5, rtol=0)


def test_the_last_intermediate_layer_is_the_feature_map():
    model, x = tiny_model().eval(), torch.randn(2, 3, 8, 12)
    out = model(x)
    (patches,) = model.get_intermediate_layers(x)
    assert torch.equal(patches, out.feature_map.flatten(1, 2))
    ((patches, registers),) = model.get_intermediate_layers(x, 1, reshape=True, return_registers=True)
    assert patches.is_contiguous()
    assert torch.equal(patches, out.feature_map.permute(0, 3, 1, 2))
    assert torch.equal(registers, out.registers)


@pytest.mark.parametrize(("n", "blocks"), [(1, [1]), (2, [0, 1]), ([0], [0]), ([-1, 0], [0, 1]), ((1,), [1])])
def test_intermediate_layers_are_those_of_out_layer(n, blocks):
    model, x = tiny_model().eval(), torch.randn(1, 3, 8, 8)
    expected = []
    for block in blocks:
        chosen = tiny_model(out_layer=block + 1).eval()
        chosen.load_state_dict(model.state_dict())
        expected.append(chosen(x).feature_map.flatten(1, 2))
    for layers in (
        model.get_intermediate_layers(x, n),
        model.forward_intermediates(x, n, norm=True, output_fmt="NLC", intermediates_only=True),
    ):
        assert len(layers) == len(blocks)
        for layer, want in zip(layers, expected, strict=True):
            assert torch.equal(layer, want)


def test_forward_intermediates_gives_final_tokens_and_every_block():
    model, x = tiny_model().eval(), torch.randn(2, 3, 8, 12)
    final, intermediates = model.forward_intermediates(x)
    out = model(x)
    assert torch.equal(final, torch.cat([out.registers, out.feature_map.flatten(1, 2)], dim=1))
    assert [tuple(t.shape) for t in intermediates] == [(2, 32, 2, 3)] * 2
    unnormed = model.get_intermediate_layers(x, 2, reshape=True, norm=False)
    assert all(torch.equal(a, b) for a, b in zip(intermediates, unnormed, strict=True))
    ((patches, registers),) = model.forward_intermediates(
        x, [0], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert (patches.shape, registers.shape) == ((2, 6, 32), (2, 4, 32))


def test_stop_early_runs_no_block_after_the_last_one_chosen():
    model, x = tiny_model().eval(), torch.randn(1, 3, 8, 8)
    ran = []
    model.encoder.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(x, [0], stop_early=True)
    model.get_intermediate_layers(x, [0])
    assert not ran
    model.forward_intermediates(x, [0])
    assert ran


@pytest.mark.parametrize("n", [0, 3, [2], [-3], []])
def test_blocks_that_do_not_exist_are_refused(n):
    with pytest.raises(UserError, match=r"n=.*: the encoder has 2 blocks, 0 to 1"):
        tiny_model().get_intermediate_layers(torch.zeros(1, 3, 8, 8), n)
    with pytest.raises(UserError, match=r"indices="):
        tiny_model().forward_intermediates(torch.zeros(1, 3, 8, 8), n)


def test_another_output_format_is_refused():
    with pytest.raises(UserError, match="output_fmt='NHWC' must be one of NCHW, NLC"):
        tiny_model().forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NHWC")


COMPILE_AND_EXPORT = """
    import torch, torch._dynamo
    from golden import tiny_model
    from model import Features

    model = tiny_model(encoder_kwargs={"depth": 1}, decoder_kwargs={"depth": 1}).eval()
    images = [torch.randn(b, 3, h, w) for b, h, w in ((2, 16, 24), (3, 8, 8), (5, 20, 12), (2, 24, 24))]

    def check(function, name):
        for x in images:
            out = function(x)
            assert isinstance(out, Features), name
            for actual, expected in zip(out, model(x), strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, msg=f"{name}, {list(x.shape)}")

    with torch.no_grad():
        check(torch.compile(model, dynamic=True, fullgraph=True, backend=BACKEND), "compiled")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled anew for another size"
        b, rows, columns = (torch.export.Dim(name, min=2) for name in ("b", "rows", "columns"))
        exported = torch.export.export(model, (images[0],), dynamic_shapes=({0: b, 2: 4 * rows, 3: 4 * columns},))
        check(exported.module(), "exported")
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "backend", [pytest.param("aot_eager", marks=pytest.mark.long), pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_and_exported_models_take_any_size(backend):
    """In a process of its own: run-time shape checks do not go together with torch.compile and torch.export."""
    code = textwrap.dedent(COMPILE_AND_EXPORT).replace("BACKEND", repr(backend))
    done = run_forked("-c", code, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr[-3000:]
