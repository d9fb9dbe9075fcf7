"""finetuning.py: blocks and layers of any backbone, the vectors of CAE's recipe, and runs of every task."""

import shutil
import textwrap
from typing import Any

import pytest
import torch
from commands import assert_close_runs, assert_same_run, train_through_kills
from conftest import ROOT, seeded
from finetunes import CASES, opened, pretrain, tiny_beit, train_on_this_rank
from golden_cae import CAE, IMAGES, fill
from methods import METHODS, write_export
from ranks import run_on_ranks
from torch import nn

import finetune_classification
import finetune_detection
import finetune_segmentation
import finetuning
import ijepa
from cae import Encoder, relative_position_index
from config import ScheduleConfig
from evaluation import FrozenModel, FrozenModelConfig
from finetune_classification import LinearHead
from finetuning import Trunk, decayed_multipliers, freeze_unused_, layer_scales
from model import EncoderDecoder, Features, draw_drop_path, linear_rates
from optim import scheduled
from training import export
from utils import Normalisation, UserError

TRANSFORMERS = {"embed_dim": 32, "drop_path_rate": 0.0, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}}


def capi(depth: int = 3) -> EncoderDecoder:
    return EncoderDecoder(
        patch_size=4,
        n_registers=4,
        transformers_kwargs=TRANSFORMERS,
        encoder_kwargs={"depth": depth},
        decoder_kwargs={"depth": 2},
    )


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")

    class Wrapped(nn.Module):
        patch_size = 4

        def __init__(self):
            super().__init__()
            self.network = timm.models.VisionTransformer(
                img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
            )

        def forward(self, images):
            tokens = self.network.forward_features(images)
            return Features(
                tokens[:, 0], None, tokens[:, 1:].unflatten(1, (images.shape[2] // 4, images.shape[3] // 4))
            )

    return Wrapped()


def torch_encoder() -> nn.Module:
    class Wrapped(nn.Module):
        patch_size = 4

        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 32, 4, 4)
            layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=False)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

        def forward(self, images):
            embedded = self.patch_embed(images)
            tokens = self.encoder(embedded.flatten(2).transpose(1, 2))
            return Features(tokens.mean(1), None, tokens.unflatten(1, embedded.shape[2:]))

    return Wrapped()


BACKBONES = {
    "CAPI": capi,
    "I-JEPA": lambda: ijepa.Encoder(grid_size=4, patch_size=4, embed_dim=32, depth=3, num_heads=2),
    "CAE": lambda: Encoder(grid_size=4, patch_size=4, embed_dim=32, depth=3, num_heads=2),
    "timm": timm_vit,
    "BEiT": tiny_beit,
    "torch": torch_encoder,
}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    module = BACKBONES[request.param]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(0)))
    return module


def test_the_last_map_is_the_feature_map_and_earlier_ones_are_the_blocks(backbone):
    trunk, images = Trunk(backbone), torch.randn(2, 3, 16, 24, generator=seeded(1))
    assert len(trunk.blocks) == 3
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in trunk.blocks]
    expected = backbone(images)[2].movedim(-1, 1)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(trunk.maps(images, [-1], norm=True)[0], expected)
    maps = trunk.maps(images, [0, 2])
    assert [x.shape for x in maps] == [(2, 32, 4, 6)] * 2
    for x, block in zip(maps, (0, 2), strict=True):
        torch.testing.assert_close(x.flatten(2).transpose(1, 2), seen[block][:, -24:])
    with pytest.raises(UserError, match="the backbone has 3 blocks, 0 to 2"):
        trunk.maps(images, [3])


def test_the_final_norm_makes_the_last_map_of_the_last_block(backbone):
    trunk, images = Trunk(backbone), torch.randn(2, 3, 16, 24, generator=seeded(1))
    last = trunk.maps(images, [-1])[0].movedim(1, -1)
    without: Any = backbone.enc_norm if isinstance(backbone, EncoderDecoder) else nn.Identity()  # has no weights
    torch.testing.assert_close(backbone(images)[2], (trunk.final_norm or without)(last))


def test_layers_are_counted_from_the_embedding_to_what_follows_the_blocks(backbone):
    trunk = Trunk(backbone)
    layers = {name: trunk.layer_of(name) for name, _ in backbone.named_parameters()}
    assert {layer for name, layer in layers.items() if trunk.name not in name} <= {0, 4}
    for name, layer in layers.items():
        if "patch_embed" in name or "pos_embed" in name or "token" in name.rpartition(".")[2]:
            assert layer == 0, name
        elif name.startswith(trunk.name):
            assert layer == 1 + int(name.removeprefix(f"{trunk.name}.").partition(".")[0]), name
        elif "norm" in name or "relative_position" in name:  # which BEiT's rule has at the full rate
            assert layer == 4, name


def test_rates_fall_with_depth_and_what_has_one_axis_does_not_decay():
    backbone = BACKBONES["CAE"]()
    model = nn.ModuleDict({"backbone": backbone, "head": LinearHead(32, 5, 1.0)})
    found = decayed_multipliers(model, Trunk(backbone), 0.5)
    by_layer = {
        "backbone.patch_embed.proj.weight": 1 / 16,
        "backbone.blocks.0.attn.qkv.weight": 1 / 8,
        "backbone.blocks.2.mlp.fc1.bias": 1 / 2,
        "backbone.norm.weight": 1,
        "head.linear.weight": 1,
    }
    assert {name: found[name].lr for name in by_layer} == by_layer
    undecayed = {name for name, value in found.items() if value.weight_decay == 0}
    assert {"backbone.cls_token", "backbone.pos_embed", "head.norm.weight", "head.linear.bias"} <= undecayed
    assert not {"head.linear.weight", "backbone.blocks.0.mlp.fc2.weight"} & undecayed


def test_layer_scales_are_published_ones():
    assert layer_scales(12, 0.65) == pytest.approx(CAE["layer_decay_0.65_base_scales"])


def test_learning_rates_of_the_published_recipe():
    schedule = ScheduleConfig(
        start_warmup_value=0.0,
        base_value=8e-3,
        final_value=1e-6,
        warmup_iters=5 * 312,
        freeze_iters=0,
        truncate_cos=1.0,
    )
    expected = dict(CAE["finetune_base_lr_ipe312"])
    total = expected.pop("n")
    for step, lr in expected.items():
        assert scheduled(schedule, int(step), total) == pytest.approx(lr, rel=1e-9), step


def test_branches_are_skipped_for_the_drawn_images_and_scaled_for_others(backbone):
    """An image whose branches are all skipped keeps its embedding; with nothing to skip a draw changes nothing."""
    trunk, images = Trunk(backbone, 0.9), torch.randn(4, 3, 16, 16, generator=seeded(1))
    kept = trunk.maps(images, [2])[0]
    trunk.draw_drop_path(4, seeded(0), torch.device("cpu"))
    dropped = trunk.maps(images, [2])[0]
    assert not torch.allclose(kept, dropped)
    with trunk.keeping_all():
        torch.testing.assert_close(trunk.maps(images, [2])[0], kept)
    torch.testing.assert_close(trunk.maps(images, [2])[0], dropped)
    trunk.draw_drop_path(4, seeded(0), torch.device("cpu"))
    torch.testing.assert_close(trunk.maps(images, [2])[0], dropped, msg="the same draw gives something else")


def test_stochastic_depth_is_that_of_an_encoder_that_has_it():
    encoder, images = BACKBONES["CAE"](), torch.randn(6, 3, 16, 16, generator=seeded(1))
    trunk = Trunk(encoder, 0.6)
    trunk.draw_drop_path(6, seeded(0), torch.device("cpu"))
    found = trunk.maps(images, [2], norm=True)[0].flatten(2).transpose(1, 2)
    factors = draw_drop_path(linear_rates(0.6, 3), 6, seeded(0))
    assert (factors == 0).any(), "nothing is dropped"
    with trunk.keeping_all():
        expected = encoder.encode(images, drop_path=factors)[:, 1:]
    torch.testing.assert_close(found, expected)


def test_what_the_head_does_not_depend_on_is_frozen():
    backbone = capi()
    trunk = Trunk(backbone)
    freeze_unused_(backbone, lambda x: trunk.maps(x, [-1]), 16)
    learned = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert not [name for name in learned if name.startswith(("decoder", "mask_token"))]
    assert {"patch_embed.weight", "registers", "encoder.blocks.2.residual2.fn.fc2.weight"} <= learned


def test_relative_positions_are_numbered_as_published():
    assert relative_position_index(2).tolist() == CAE["rel_pos_index_2x2"]
    for grid, heads in ((14, 12), (32, 12)):
        rows = int(relative_position_index(grid).max()) + 1
        assert [rows, heads] == CAE[f"rel_pos_table_shape_{grid}x{grid}_12heads"]


def test_the_fine_tuning_forward_pass_is_the_published_one():
    """Published keys are those of the encoder, with fc_norm in the place of its last norm."""
    encoder = Encoder(grid_size=4, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    encoder.add_relative_positions(4)
    head = LinearHead(32, 10, 1.0)
    published = {key: x for key, x in encoder.state_dict().items() if not key.startswith("norm.")}
    published |= {f"fc_norm.{key}": x for key, x in head.norm.state_dict().items()}
    published |= {f"head.{key}": x for key, x in head.linear.state_dict().items()}
    expected = CAE["finetune_forward_tiny"]
    assert {key: list(published[key].shape) for key in expected["keys"]} == expected["keys"]
    fill(published)
    out = head(Trunk(encoder).maps(IMAGES, [-1])[0].mean((2, 3)))
    torch.testing.assert_close(out[:, :4], torch.tensor(expected["out"]), atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match="relative positions are those of 16 patches, and these images have 9"):
        encoder(torch.zeros(1, 3, 24, 24))


def test_a_model_without_blocks_is_named():
    class Pixels(nn.Module):
        patch_size = 4

    with pytest.raises(UserError, match="Pixels has no list of transformer blocks"):
        Trunk(Pixels())


RECIPES = [path for path in sorted((ROOT / "configs" / "finetune").glob("*.yaml")) if path.stem != "default"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one_of_a_task(path):
    """By its name, or of classification; on top of the task's own defaults it says where the head's rate is highest."""
    task = path.stem.rpartition("_")[2]
    script = {"segmentation": finetune_segmentation, "detection": finetune_detection}.get(task, finetune_classification)
    cfg = finetuning.load(script.TASK, [str(path)])
    total = cfg.optim.total_iters
    rates = [script.TASK.lr_at(step, cfg) for step in range(0, total, max(1, total // 200))]
    assert max(rates) == pytest.approx(cfg.optim.lr_schedule.base_value, rel=0.1)
    assert rates[-1] < 0.1 * max(rates)


# --- Runs of every task ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Folders with the data of each task."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, case in CASES.items():
        case.write(folders[name])
    return folders


@pytest.fixture
def arguments(data_of, pretrained, tmp_path):
    """Arguments of a tiny training for a task, in a folder of this test."""

    def make(name, output, *more, weights=pretrained):
        return CASES[name].arguments(data_of[name], f"pretrained_weights={weights}", tmp_path / output, *more)

    return make


AVERAGED = ["optim.ema_momentum=0.9", "backbone.drop_path_rate=0.5"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "num_workers"), [("classification", 0), ("classification", 2), ("segmentation", 2), ("detection", 2)]
)
def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(arguments, tmp_path, name, num_workers):
    script = CASES[name].script
    at_steps = (3,) if num_workers else (1, 3, 5)  # a start with workers takes several seconds
    workers = f"efficiency.dataloader_num_workers={num_workers}"
    assert script.main(arguments(name, "straight", *AVERAGED)) == 0
    train_through_kills(script, arguments(name, "killed", *AVERAGED, workers), tmp_path / "killed", at_steps)
    assert_same_run(tmp_path / "killed", tmp_path / "straight", ["model"])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("classification", []),
        pytest.param("segmentation", ["segmentation.head=uper"], marks=pytest.mark.long),
        ("segmentation", ["segmentation.head=linear"]),
        ("detection", []),
    ],
)
def test_a_run_goes_on_without_the_weights_that_it_began_with_and_is_exported_without_data(
    arguments, pretrained, tmp_path, name, own
):
    script, moved, run = CASES[name].script, tmp_path / "gone", tmp_path / "run"
    moved.mkdir()
    for path in (pretrained, pretrained.with_suffix(".yaml")):
        shutil.copy(path, moved)
    assert script.main(arguments(name, "straight", *AVERAGED, *own)) == 0
    interrupted = arguments(name, "run", *AVERAGED, *own, weights=moved / pretrained.name)
    assert script.main(interrupted) == 0
    shutil.rmtree(moved)
    shutil.rmtree(run / "checkpoints" / "step_000000006")  # as if it had been killed after step 4
    (run / "model.pth").unlink()
    assert script.main(interrupted) == 0
    assert_same_run(run, tmp_path / "straight", ["model"])
    before = torch.load(run / "model.pth", weights_only=True)
    (run / "model.pth").unlink()
    assert script.main([*interrupted, "data.dataset=gone", "--export"]) == 0
    after = torch.load(run / "model.pth", weights_only=True)
    assert all(torch.equal(after[key], before[key]) for key in before)
    model = finetuning.load_model(run / "model.pth")
    assert model.cfg.classes == script.TASK.open_data(finetuning.load(script.TASK, interrupted))[0].classes
    assert model(torch.zeros(1, 3, 16, 24)).feature_map.shape == (1, 4, 6, 32)


def fresh(name, arguments):
    """The state of a training at its beginning."""
    cfg, _ = opened(name, arguments)
    return finetuning.make_state(CASES[name].script.TASK, cfg, torch.device("cpu"), with_weights=True, plain=True)


def normalisation_in_evaluations(model):
    return FrozenModel(model, FrozenModelConfig(), torch.device("cpu"), "finetuning.py").normalisation


@pytest.mark.parametrize("method", METHODS)
def test_images_are_normalised_as_the_backbone_knows_them(arguments, tmp_path, method):
    """In a fine-tuning as in the pretraining, and in evaluations of its export as in the fine-tuning."""
    own = Normalisation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    overrides = ("data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.6,0.7]")
    weights, _ = write_export(METHODS[method], tmp_path / method, *overrides)
    model_path = f"backbone.model_path={METHODS[method].load_model.__module__}.py"
    given = "backbone.image_std=[0.25,0.25,0.25]"
    for more, expected in (((), own), ((given,), Normalisation(mean=own.mean, std=(0.25,) * 3))):
        state = fresh("classification", arguments("classification", "run", model_path, *more, weights=weights))
        images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
        torch.testing.assert_close(finetuning.normalisation(state.cfg)(images), expected(images))
        export(state, "model", tmp_path / "model.pth")
        assert normalisation_in_evaluations(finetuning.load_model(tmp_path / "model.pth")) == expected


def test_images_are_normalised_by_imagenets_statistics_where_nothing_else_is_known(arguments):
    cfg = finetuning.load(finetune_classification.TASK, arguments("classification", "run"))
    assert finetuning.with_normalisation_of(cfg, torch_encoder()).backbone.normalisation == Normalisation()


@pytest.fixture
def of_file(data_of, tmp_path):
    """Arguments of a tiny training of classification, of a model file with this text."""

    def make(text, *more, model="pretrained=true"):
        (tmp_path / "own.py").write_text(textwrap.dedent(text))
        model_path = f"backbone.model_path={tmp_path / 'own.py'}"
        return CASES["classification"].arguments(data_of["classification"], model, tmp_path / "run", model_path, *more)

    return make


FROZEN = """
    from finetunes import tiny_beit
    from cae import Encoder
    def encoder():
        return Encoder(grid_size=4, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    def __model_loader__(pretrained=True):
        return {make}().requires_grad_(False)
"""


@pytest.mark.parametrize("make", ["tiny_beit", "encoder"])
@pytest.mark.parametrize("freeze", ["false", "true"])
def test_what_a_loader_froze_learns_unless_it_is_a_formula(of_file, make, freeze):
    backbone = fresh("classification", of_file(FROZEN.format(make=make), f"backbone.freeze={freeze}")).model["backbone"]
    learned = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    unused = {"pos_embed", "norm.weight", "norm.bias", "network.norm.weight", "network.norm.bias"}
    expected = {name for name, _ in backbone.named_parameters()} - unused if freeze == "false" else set()
    assert learned == expected


@pytest.mark.parametrize("make", ["tiny_beit", "encoder"])
def test_the_heads_norm_begins_as_that_of_the_backbone(of_file, make):
    state = fresh("classification", of_file(FROZEN.format(make=make)))
    norm = state.trunk.final_norm
    with torch.no_grad():
        norm.weight.fill_(3), norm.bias.fill_(-1)
    head = finetune_classification.make_head(state.cfg, state.trunk)
    assert torch.all(head.norm.weight == 3) and torch.all(head.norm.bias == -1)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_backbone_drops_nothing(arguments, freeze):
    own = [f"backbone.freeze={freeze}", "backbone.drop_path_rate=0.9"]
    trunk = fresh("classification", arguments("classification", "run", *own)).trunk
    images = torch.randn(8, 3, 16, 16, generator=seeded(1))
    clean = trunk.maps(images, [-1])[0]
    trunk.draw_drop_path(len(images), seeded(2), torch.device("cpu"))
    assert torch.equal(trunk.maps(images, [-1])[0], clean) == freeze


def test_a_backbone_without_gradient_is_named_unless_it_is_frozen(of_file):
    text = """
        import torch
        from finetunes import tiny_beit
        def __model_loader__(pretrained=True):
            model = tiny_beit()
            model.forward = torch.no_grad()(model.forward)
            return model
    """
    with pytest.raises(UserError, match=r"what RelativePatchFeatures gives has no gradient.*backbone.freeze=true"):
        fresh("classification", of_file(text))
    fresh("classification", of_file(text, "backbone.freeze=true"))


def test_a_loader_that_builds_something_else_without_weights_is_refused_at_the_start(of_file):
    text = """
        from torch import nn
        from finetunes import tiny_beit
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.patch_size = tiny_beit(), 4
            def forward(self, images):
                return self.inner(images)
        def __model_loader__(pretrained=True):
            return Wrapped() if pretrained else tiny_beit()
    """
    with pytest.raises(UserError, match=r"own.py.* missing: .*pretrained=False, so that no export"):
        fresh("classification", of_file(text))


def test_a_fine_tuned_model_is_gone_on_from_and_then_stands_on_its_configuration(arguments, tmp_path):
    first, second = tmp_path / "first" / "model.pth", tmp_path / "second" / "model.pth"
    export(fresh("classification", arguments("classification", "first")), "model", first)
    going_on = arguments("segmentation", "second", "backbone.model_path=finetuning.py", weights=first)
    state = fresh("segmentation", going_on)
    export(state, "model", second)
    first.unlink()
    model = finetuning.load_model(second)
    images = torch.randn(1, 3, 16, 16, generator=seeded(0))
    torch.testing.assert_close(model(images).feature_map, state.model["backbone"].eval()(images).feature_map)
    first.with_suffix(".yaml").unlink()
    with pytest.raises(UserError, match=r"first/model.yaml' is not there"):
        finetuning.load_model(second)


def test_a_loader_that_needs_its_weights_for_every_export_is_named_with_the_remedy(of_file, tmp_path):
    text = """
        import torch
        from finetunes import tiny_beit
        def __model_loader__(pretrained_weights):
            model = tiny_beit()
            model.load_state_dict(torch.load(pretrained_weights))
            return model
    """
    weights = tmp_path / "weights.pth"
    torch.save(tiny_beit().state_dict(), weights)
    state = fresh("classification", of_file(text, model=f"pretrained_weights={weights}"))
    export(state, "model", tmp_path / "model.pth")
    assert finetuning.load_model(tmp_path / "model.pth").cfg.classes == state.cfg.classes
    weights.unlink()
    with pytest.raises(UserError, match=r"own.py: its loader takes no `pretrained`.*weights.pth.*put that back"):
        finetuning.load_model(tmp_path / "model.pth")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_without_checkpoint_is_named_before_any_network_is_built(arguments, tmp_path, capsys, name, is_there):
    if is_there:
        (tmp_path / "run").mkdir()
    run = arguments(name, "run", "data.dataset=gone", weights=tmp_path / "gone.pth")
    assert CASES[name].script.main([*run, "--export"]) == 2
    said = capsys.readouterr().err
    assert f"train.output_dir='{tmp_path / 'run'}' has no checkpoint to export; train first" in said
    assert "Traceback" not in said


STEPS_ARE_RANKS = ["optim.ema_momentum=0.5", "backbone.drop_path_rate=0.3", "optim.accumulation_steps=2"]
IMAGES_ARE_SHARED = [
    "backbone.drop_path_rate=0",
    "segmentation.dropout=0",
    "optim.weight_decay=0",
    "optim.batch_size_per_gpu=4",
]
"""What batch norm computes depends on all images, which ranks share and accumulation steps do not; drop path depends on
places in a batch."""
ROUNDED = {"rel": 1e-4, "atol": 2e-4, "rtol": 1e-4, "but": ["head.pyramid.levels.0.0.bias"]}
"""A norm undoes that bias: its gradient is rounding, which AdamW scales up."""


COMPILED = "efficiency.compilation.do_student.disable=false"
has_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="it needs a C++ compiler")
compiles = [pytest.mark.slow, pytest.mark.timeout(600), has_compiler]


@has_compiler
@pytest.mark.parametrize("own", [[], [COMPILED]])
def test_blocks_are_compiled_if_asked_for(arguments, own):
    cfg, _ = opened("classification", arguments("classification", "run", *own))
    task = CASES["classification"].script.TASK
    state = finetuning.make_state(task, cfg, torch.device("cpu"), with_weights=True)
    assert [block._compiled_call_impl is not None for block in state.trunk.blocks] == [bool(own)] * 2


@pytest.mark.parametrize(
    ("name", "mode", "own", "tolerances"),
    [
        ("classification", "simple", STEPS_ARE_RANKS, {}),
        ("classification", "fully_shard", STEPS_ARE_RANKS, {}),
        ("classification", "none", STEPS_ARE_RANKS, {}),
        pytest.param("classification", "simple", [COMPILED, *STEPS_ARE_RANKS], {}, marks=compiles),
        pytest.param("classification", "fully_shard", [COMPILED, *STEPS_ARE_RANKS], {}, marks=compiles),
        pytest.param("segmentation", "simple", IMAGES_ARE_SHARED, ROUNDED, marks=pytest.mark.long),
        pytest.param("segmentation", "none", IMAGES_ARE_SHARED, ROUNDED, marks=pytest.mark.long),
        ("segmentation", "fully_shard", ["segmentation.head=linear", *IMAGES_ARE_SHARED], ROUNDED),
        # With LayerNorm.
        ("detection", "simple", STEPS_ARE_RANKS, {"rel": 5e-4, "atol": 5e-5}),
        pytest.param("detection", "fully_shard", STEPS_ARE_RANKS, {"rel": 5e-4, "atol": 5e-5}, marks=pytest.mark.long),
        ("detection", "none", STEPS_ARE_RANKS, {"rel": 5e-4, "atol": 5e-5}),
    ],
)
def test_ranks_divide_an_update_without_changing_it(arguments, tmp_path, name, mode, own, tolerances):
    more = [f"efficiency.fsdp={mode}", "optim.total_iters=3", *own]
    run_on_ranks(train_on_this_rank, 1, name, arguments(name, "alone", *more), timeout_s=290)
    run_on_ranks(train_on_this_rank, 2, name, arguments(name, "ranks", *more), timeout_s=290)
    losses = ["loss", *CASES[name].script.TASK.losses]
    assert_close_runs(tmp_path / "ranks", tmp_path / "alone", *losses, export="model", **tolerances)
