"""Published backbones: keys against manifests, outputs against golden numbers, and what is refused.

The manifests and golden numbers hold no weights: a rule makes every tensor from its name, see `fill`.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_forked
from conftest import GOLDEN, ROOT, run_cli
from finetunes import tiny_beit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hubconf
from baselines import _shared
from evaluation import FrozenModel, FrozenModelConfig
from model import EncoderDecoder
from utils import UserError, import_from_path

pytest.importorskip("timm", reason="pip install -c constraints.txt -e '.[baselines]'")

FOLDER = ROOT / "baselines"
GOLDEN_FAMILIES = sorted(path.stem.removeprefix("golden_") for path in (GOLDEN / "baselines").glob("golden_*.json"))
FAMILIES = [*GOLDEN_FAMILIES, "capi"]


@functools.cache
def loader(family: str) -> ModuleType:
    """The loader as the evaluations get it: a file that is run by its path."""
    return import_from_path(FOLDER / f"{family}_loader.py")


@functools.cache
def read_json(kind: str, family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "baselines" / f"{kind}_{family}.json").read_text())


def manifest_of(family: str, model_name: str) -> dict[str, Any]:
    """A model's own manifest entry over that of the model with the same keys."""
    models = read_json("manifest", family)["models"]
    entry = models[model_name]
    return models[entry["same_keys_as"]] | entry if "same_keys_as" in entry else entry


def model_names(family: str) -> list[str]:
    return list(read_json("manifest", family)["models"])


MANIFEST_MODELS = [
    (family, name) for family in GOLDEN_FAMILIES if family != "mimrefiner" for name in model_names(family)
]
NUMERIC_MODELS = [
    (family, name)
    for family in GOLDEN_FAMILIES
    for name, entry in read_json("golden", family)["models"].items()
    if "outputs" in entry
]

SMALLEST = {
    "aim": "aim_600M", "beit": "beit_base_patch16_224_pt22k", "cae": "cae_base_patch16_224",
    "capi": "capi_vitl14_lvd", "data2vec2": "data2vec2_vitb16", "dino": "dino_vits16", "dinov2": "dinov2_vits14",
    "dinov3": "dinov3_vits16", "ibot": "ibot_vits16", "ijepa": "vit_huge_patch14_in1k", "mae": "vit_base_patch16",
    "mimrefiner": "mae_refined_l16", "stop": "stop_vitb16", "timm": "vit_tiny_patch16_224",
}  # fmt: skip


# ------------------------------------------------------------------------------------------ the fill rule


def key_table(entry: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every key of a manifest entry with its shape and rule."""
    table = {}
    for pattern, spec in entry["keys"].items():
        for index in range(*spec["i"]) if "i" in spec else (None,):
            table[pattern.replace("{i}", str(index))] = (tuple(spec["shape"]), spec["fill"])
    return table


def fill(key: str, shape: tuple[int, ...], rule: str) -> Tensor:
    """The tensor that stands for `key`, which must not be modified: small ones are shared between models."""
    return _fill_cached(key, shape, rule) if math.prod(shape) < 3_000_000 else _fill(key, shape, rule)


def _fill(key: str, shape: tuple[int, ...], rule: str) -> Tensor:
    if rule.startswith("computed:"):
        return COMPUTED[rule.removeprefix("computed:")](shape)
    if rule == "zero_int":
        return torch.zeros(shape, dtype=torch.int64)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    a = rng.standard_normal(shape).astype(np.float32)
    values = {
        "norm": lambda: 1 + np.float32(0.1) * a,
        "gamma": lambda: np.float32(0.1) + np.float32(0.02) * a,
        "matrix": lambda: a / np.float32(math.sqrt(math.prod(shape[1:]))),
        "vector": lambda: np.float32(0.02) * a,
    }[rule]()
    return torch.from_numpy(values)


_fill_cached = functools.lru_cache(maxsize=600)(_fill)


def sincos(shape: tuple[int, ...], *, row_first: bool = False, class_row: bool = False) -> Tensor:
    """Positions in numpy, apart from the repository's own formula."""
    side, quarter = math.isqrt(shape[1] - class_row), shape[2] // 4
    precision = np.float32 if row_first else np.float64
    k = np.arange(quarter, dtype=precision) / precision(quarter)
    w = 1 / precision(10000) ** k
    row, column = np.divmod(np.arange(side * side), side)
    first, second = (row, column) if row_first else (column, row)
    groups = [wave(place.astype(precision)[:, None] * w) for place in (first, second) for wave in (np.sin, np.cos)]
    table = np.concatenate(groups, axis=1).astype(np.float32)
    if class_row:
        table = np.concatenate([np.zeros((1, shape[2]), np.float32), table])
    return torch.from_numpy(table)[None]


def relative_index(shape: tuple[int, ...]) -> Tensor:
    side = math.isqrt(shape[0] - 1)
    span = 2 * side - 1
    row, column = np.divmod(np.arange(side * side), side)
    index = np.zeros(shape, dtype=np.int64)
    rows, columns = row[:, None] - row[None] + side - 1, column[:, None] - column[None] + side - 1
    index[1:, 1:] = rows * span + columns
    index[0], index[:, 0], index[0, 0] = span**2, span**2 + 1, span**2 + 2
    return torch.from_numpy(index)


def key_bias_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.ones(shape)
    mask[shape[0] // 3 : 2 * shape[0] // 3] = 0
    return mask


COMPUTED: dict[str, Any] = {
    "sincos_col_first": sincos,
    "sincos_col_first_cls": functools.partial(sincos, class_row=True),
    "sincos_row_first_cls_f32": functools.partial(sincos, row_first=True, class_row=True),
    "beit_relative_index": relative_index,
    "rope_periods": lambda shape: 100 ** (2 * torch.arange(shape[0]) / 32),
    "k_bias_mask": key_bias_mask,
}


def filled_state_dict(family: str, model_name: str) -> dict[str, Tensor]:
    """All tensors of a model; their hash, or 64 values of a formula, are checked before anything runs on them."""
    entry = manifest_of(family, model_name)
    table = key_table(entry)
    state = {key: fill(key, *spec) for key, spec in table.items()}
    expected = read_json("golden", family)["models"][model_name]["fill_check"]
    digest, total, elements = hashlib.sha256(), 0.0, 0
    drawn = sorted(key for key, (_, rule) in table.items() if rule != "zero_int" and not rule.startswith("computed:"))
    for key in drawn:
        values = state[key].numpy()
        digest.update(key.encode())
        digest.update(values)
        total += values.sum(dtype=np.float64)
        elements += values.size
    actual = {"tensors": len(drawn), "elements": elements, "sha256": digest.hexdigest()}
    assert actual == {key: expected[key] for key in actual}
    assert total == pytest.approx(expected["sum"], rel=1e-6)
    for key, check in entry.get("computed_check", {}).items():
        sample = state[key].flatten()[:: check["index_stride"]][: check["index_count"]].double()
        torch.testing.assert_close(sample, torch.tensor(check["values"], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    return state


def empty_state_dict(family: str, model_name: str) -> dict[str, Tensor]:
    """The same keys, shapes and types, without values: for the meta device."""
    table = key_table(manifest_of(family, model_name))
    types = {key: torch.int64 if rule == "zero_int" else None for key, (_, rule) in table.items()}
    return {key: torch.empty(shape, dtype=types[key]) for key, (shape, _) in table.items()}


def published_file(entry: dict[str, Any], load: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict as the file on the web holds it: with its levels, prefixes, and what else is in there."""
    junk = {entry.split()[0].lstrip("*").replace("*", ".x"): torch.zeros(1) for entry in load["not_loaded_from_file"]}
    content: dict[str, Any] = {entry["prefix"] + key: value for key, value in state.items()}
    in_state_dict = entry["prefix"] != "module."  # I-JEPA and StoP have networks, not tensors, beside it
    content |= junk if in_state_dict else {}
    for level in reversed(entry["path"]):
        content = {level: content, "epoch": 1}
    return content if in_state_dict else junk | content


@contextlib.contextmanager
def answered_with(content: Any) -> Iterator[list[str]]:
    """Reads of a file or address get `content`; gives the addresses asked for."""
    asked: list[str] = []

    def read(source: str) -> Any:
        asked.append(source)
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shared, "read_state_dict", read)
        yield asked


def load(family: str, model_name: str, state: dict[str, Tensor] | None, **kwargs: Any) -> nn.Module:
    """A model with the tensors of a manifest, through the loader's own reading, or a random one.

    The tensors stand for the published file, or for one placed by hand where nothing can be downloaded.
    """
    if state is None:
        return loader(family).load_model(model_name, pretrained=False, **kwargs)
    entry = manifest_of(family, model_name)
    by_hand = family in ("cae", "dinov3", "timm")  # no address, gated, timm's own business
    with answered_with(published_file(entry, read_json("manifest", family)["load"], state)) as asked:
        model = loader(family).load_model(model_name, "by_hand.pth" if by_hand else None, **kwargs)
    assert asked == ["by_hand.pth" if by_hand else entry["url"]]
    return model


class WithoutInitialValues(TorchFunctionMode):
    """On the meta device, drawing values is all that takes time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and func.__name__ in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """What is built here has names and shapes, but no values and no cost."""
    with torch.device("meta"), WithoutInitialValues():
        yield


def shorten(model: nn.Module) -> None:
    """Keep two blocks of each kind, for a forward on the meta device."""
    for module in list(model.modules()):
        for name, child in list[Any](module.named_children()):
            if name in ("blocks", "layers"):
                setattr(module, name, child[:2])
        if isinstance(module, nn.TransformerEncoder):
            module.num_layers = 2


def golden_image(height: int, width: int) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(b"baseline/img")))
    return torch.from_numpy(rng.standard_normal((1, 3, height, width)).astype(np.float32))


# ------------------------------------------------------------------------------------------ keys


def layer_norm_eps(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_the_manifest_is_known(family):
    module = loader(family)
    assert module.__model_loader__ is module.load_model
    if family not in ("timm", "capi"):
        assert list(module.MODELS) == model_names(family)


@pytest.mark.parametrize(("family", "model_name"), MANIFEST_MODELS)
def test_every_published_tensor_has_its_place_and_the_features_their_shape(family, model_name):
    """On the meta device, so that the largest models cost nothing."""
    entry = manifest_of(family, model_name)
    arch = entry["arch"]
    with on_meta():
        state = empty_state_dict(family, model_name)
        assert len(state) == entry["tensors"] and sum(map(torch.numel, state.values())) == entry["elements"]
        model: Any = load(family, model_name, state, device="meta")
    stride, width = arch.get("patch", arch.get("output_stride")), arch.get("width", 2048)
    assert model.patch_size == stride and not model.training
    # The outputs of StoP and AIM hardly change with it.
    assert layer_norm_eps(model) == ({arch["layernorm_eps"]} if "layernorm_eps" in arch else set())
    shorten(model)
    with torch.device("meta"):
        global_repr, registers, feature_map = model(torch.empty(2, 3, 8 * stride, 10 * stride))
    assert global_repr.shape == (2, width) and feature_map.shape == (2, 8, 10, width)
    num_registers = {"dinov3": 4, "dinov2": 4 if model_name.endswith("_reg") else 0}.get(family)
    expected = None if num_registers is None else (2, num_registers, width)
    assert (None if registers is None else registers.shape) == expected


@pytest.fixture
def downloads_of_timm(monkeypatch):
    """timm's downloads give random weights, to networks with the classifier of their tag."""
    timm: Any = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create(name, **kwargs))


@pytest.mark.usefixtures("downloads_of_timm")
@pytest.mark.parametrize(
    ("family", "model_name"),
    [
        *((family, name) for family, name in SMALLEST.items() if family not in ("capi", "mimrefiner", "timm")),
        ("timm", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("timm", "deit_tiny_distilled_patch16_224.fb_in1k"),  # two classifiers
        ("timm", "vit_base_patch16_siglip_224"),  # none, and pooling with weights
        ("timm", "eva02_tiny_patch14_336.mim_in22k_ft_in1k"),
    ],
)
def test_a_network_is_built_again_without_its_file(family, model_name):
    """With the same keys and shapes: what was trained on from the file is loaded into a network without it."""
    with on_meta():
        if family == "timm":
            loaded = loader(family).load_model(model_name, device="meta")
        else:
            loaded = load(family, model_name, empty_state_dict(family, model_name), device="meta")
        again = load(family, model_name, None, device="meta")
    assert {key: x.shape for key, x in loaded.state_dict().items()} == {
        key: x.shape for key, x in again.state_dict().items()
    }


@pytest.mark.parametrize("family", ["cae", "dinov3"])
def test_what_cannot_be_downloaded_says_where_to_get_it(family):
    with on_meta(), pytest.raises(UserError, match=r"https://.*pretrained_weights=<path>"):
        loader(family).load_model(SMALLEST[family], device="meta")


@pytest.mark.parametrize("model_name", ["capi_vitl14_lvd", "capi_vitl14_p205", "capi_vitl14_in22k", "capi_vitl14_in1k"])
def test_capi_names_are_those_of_the_hub(model_name, tmp_path, monkeypatch):
    tiny: Any = {
        "patch_size": 4,
        "n_registers": 4,
        "transformers_kwargs": {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
        "encoder_kwargs": {"depth": 1},
        "decoder_kwargs": {"depth": 1},
    }
    released, asked = EncoderDecoder(**tiny), []
    monkeypatch.setattr(hubconf, "VIT_L14", tiny)
    monkeypatch.setattr("model.read_state_dict", lambda source, **_: asked.append(source) or released.state_dict())
    for weights in (None, tmp_path / "mine.pth"):
        model = loader("capi").load_model(model_name, pretrained_weights=weights)
        assert torch.equal(model.registers, released.registers) and not model.training and model.patch_size == 4
    file_name = model_name.replace("in22k", "i22k") + ".pth"
    assert asked == [f"https://dl.fbaipublicfiles.com/capi/{file_name}", str(tmp_path / "mine.pth")]
    random = loader("capi").load_model(model_name, pretrained=False)
    assert len(asked) == 2 and not torch.equal(random.registers, released.registers)


def test_data2vec2_blocks_in_the_image_encoder_come_first():
    keys = ["modality_encoders.IMAGE.context_encoder.blocks.0.norm1.weight", "blocks.0.norm1.weight"]
    keys += ["modality_encoders.IMAGE.context_encoder.blocks.1.norm1.weight", "blocks.9.norm1.weight"]
    renamed = loader("data2vec2").rename_to_torch({key: torch.zeros(1) for key in keys})
    assert list(renamed) == [f"encoder.layers.{i}.norm1.weight" for i in (0, 2, 1, 11)]


# ------------------------------------------------------------------------------------------ numbers

IN_A_MINUTE = {  # the smallest of each family; AIM and I-JEPA start at 600 million parameters
    "beit_base_patch16_224_pt22k", "cae_base_patch16_224", "data2vec2_vitb16", "dino_resnet50", "dino_vits16",
    "dino_xcit_small_12_p16", "dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16", "ibot_vits16",
    "vit_base_patch16", "stop_vitb16", "vit_small_patch16_224.dino",
}  # fmt: skip
ATOL = {"aim": 1e-4, "dinov2_vitg14": 1e-4, "dinov2_vitg14_reg": 1e-4}


def check_output(actual: Tensor | None, expected: dict[str, Any] | None, atol: float) -> float:
    """Compare shape, samples and moments; returns the largest difference of a sample."""
    if expected is None:
        assert actual is None
        return 0.0
    assert actual is not None and list(actual.shape) == expected["shape"]
    if expected.get("empty"):
        return 0.0
    values = actual.flatten().double()
    samples = values[:: expected["index_stride"]][: expected["index_count"]]
    golden = torch.tensor(expected["values"], dtype=torch.float64)
    torch.testing.assert_close(samples, golden, rtol=0, atol=atol)
    assert values.mean().item() == pytest.approx(expected["mean"], abs=atol)
    assert values.std(correction=0).item() == pytest.approx(expected["std"], abs=atol)
    assert values.norm().item() == pytest.approx(expected["l2"], rel=atol)
    return (samples - golden).abs().max().item()


@pytest.mark.parametrize(
    ("family", "model_name"),
    [
        pytest.param(*names, marks=[] if names[1] in IN_A_MINUTE else [pytest.mark.slow, pytest.mark.timeout(900)])
        for names in NUMERIC_MODELS
    ],
)
def test_outputs_equal_the_golden_numbers(family, model_name):
    needed = 2.5 * 4 * manifest_of(family, model_name)["elements"]  # the tensors, the network, and what runs on them
    if needed > 4e9 and needed > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    model = load(family, model_name, filled_state_dict(family, model_name))
    atol = ATOL.get(model_name, ATOL.get(family, 3e-5))
    differences = []
    for size, expected in read_json("golden", family)["models"][model_name]["outputs"].items():
        with torch.inference_mode():
            outputs = model(golden_image(*map(int, size.split("x"))))
        for name, actual in zip(("global", "registers", "map"), outputs, strict=True):
            differences.append(check_output(actual, expected[name], atol))
    logging.getLogger(__name__).info("%s: largest difference %.1e", model_name, max(differences))


# ------------------------------------------------------------------------------------------ traps


@pytest.mark.parametrize("model_name", ["aim_600M", "aim_7B"])
def test_aim_ends_with_the_19th_block_and_no_norm(model_name):
    with on_meta():
        model = load("aim", model_name, None, device="meta")
    network: Any = model.get_submodule("network")
    assert len(network.blocks) == 19 and isinstance(network.norm, nn.Identity)


def test_aim_positions_have_the_column_first_and_follow_the_grid():
    positions = loader("aim").sincos_positions((3, 5), 16)
    torch.testing.assert_close(loader("aim").sincos_positions((4, 4), 16), sincos((1, 16, 16)))
    assert positions.shape == (1, 15, 16)
    torch.testing.assert_close(positions[0, 7, [0, 8]], torch.tensor([2.0, 1.0]).sin())  # row 1, column 2


@pytest.mark.parametrize(
    ("family", "encoder", "kwargs"),
    [
        ("ijepa", "encoder", {}),
        ("ijepa", "target_encoder", {"encoder": "target_encoder"}),
        ("stop", "target_encoder", {}),
    ],
)
def test_which_of_the_two_encoders_is_loaded(family, encoder, kwargs, monkeypatch):
    """Both are in the files with the same keys. Seen by a tensor that only one of them lacks."""
    model_name = model_names(family)[0]
    with on_meta():
        state = {f"module.{key}": torch.empty(s) for key, (s, _) in key_table(manifest_of(family, model_name)).items()}
        partial = {key: value for key, value in state.items() if key != "module.norm.bias"}
        content = {"encoder": state, "target_encoder": state, "predictor": {}} | {encoder: partial}
        with answered_with(content), pytest.raises(UserError, match=r"1 missing: norm\.bias"):
            loader(family).load_model(model_name, device="meta", **kwargs)


def test_ijepa_has_two_encoders_only():
    with pytest.raises(UserError, match="encoder='teacher' must be one of encoder, target_encoder"):
        loader("ijepa").load_model("vit_huge_patch14_in1k", encoder="teacher")


def test_ibot_vitl16_in22k_has_no_level_above_the_state_dict():
    assert [path for _, _, path in loader("ibot").MODELS.values()] == [("state_dict",)] * 4 + [()]


@pytest.mark.parametrize("rule", ["resize_like_dino", "resize_antialiased", "resize_plainly"])
def test_position_rules_keep_the_native_grid_the_class_row_and_constants(rule):
    resize = getattr(_shared, rule)
    table = torch.randn(1, 17, 8)
    assert resize(table, (4, 4)) is table
    other = resize(table, (2, 8))
    assert torch.equal(other[:, 0], table[:, 0]) and other.shape == table.shape
    assert not torch.equal(other[:, 1:], table[:, 1:]), "as many patches in another shape are resized too"
    assert resize(table[:, 1:], (3, 5)).shape == (1, 15, 8)
    torch.testing.assert_close(resize(torch.ones(1, 16, 8), (7, 3)), torch.ones(1, 21, 8))


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_small_patch14_reg4_dinov2.lvd142m", (28, 42)), ("vit_small_patch16_dinov3.lvd1689m", (32, 48))],
)
def test_timm_gives_registers_and_its_own_pooling(name, size):
    """Also of a network that does not count its registers, the second one."""
    model = load("timm", name, None)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        global_repr, registers, feature_map = model(images)
        network: Any = model.get_submodule("network")
        tokens = network.forward_features(images)
    assert torch.equal(registers, tokens[:, 1:5]) and torch.equal(feature_map, tokens[:, 5:].reshape(2, 2, 3, 384))
    assert torch.equal(global_repr, network(images))


@pytest.mark.parametrize(
    ("name", "has_file", "mean"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", False, 0.5),
        ("vit_tiny_patch16_224.augreg_in21k", True, 0.5),
        ("vit_tiny_patch16_224", False, 0.5),  # timm takes its first tag
        ("vit_tiny_patch16_224", True, 0.485),  # anyone's
    ],
)
def test_images_for_timm_are_normalised_as_those_that_its_weights_saw(name, has_file, mean, monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs | {"pretrained": False}))
    file = tmp_path / "weights.pth"
    if has_file:
        torch.save(create("vit_tiny_patch16_224", num_classes=0).state_dict(), file)
    model = loader("timm").load_model(name, str(file) if has_file else None)
    frozen = FrozenModel(model, FrozenModelConfig(), torch.device("cpu"), "timm_loader.py")
    assert frozen.normalisation.mean[0] == mean


# ------------------------------------------------------------------------------------------ random weights


@pytest.fixture(scope="module")
def random_model(request):
    """The smallest network of a family with random weights. Tests that ask for the same one run after each other."""
    torch.manual_seed(0)
    return load(request.param, SMALLEST[request.param], None)


@pytest.mark.parametrize(
    "random_model",
    [
        pytest.param(family, marks=pytest.mark.slow if family in ("aim", "capi", "ijepa", "mimrefiner") else [])
        for family in FAMILIES
    ],
    indirect=True,
)
def test_random_weights_need_no_file_and_give_finite_features(random_model):
    size = random_model.patch_size
    with torch.inference_mode():
        global_repr, _, feature_map = random_model(torch.randn(2, 3, 4 * size, 4 * size))
    assert global_repr.isfinite().all() and feature_map.isfinite().all()
    assert not torch.equal(global_repr[0], global_repr[1]) and feature_map.shape[:3] == (2, 4, 4)
    with pytest.raises(UserError, match="must be a multiple of the patch size"):
        random_model(torch.zeros(1, 3, 4 * size, 4 * size + 1))


FORMULAS = ("cae", "data2vec2", "stop")
"""Families with a table of sines and cosines that learns in no recipe of theirs; I-JEPA's is too large for here."""


@pytest.mark.parametrize("random_model", [*FORMULAS, "dino"], indirect=True)
def test_positions_learn_unless_they_are_a_formula(random_model, request):
    (is_learned,) = {
        isinstance(tensor, nn.Parameter)
        for name, tensor in random_model.state_dict(keep_vars=True).items()
        if name.endswith("pos_embed")
    }
    assert is_learned == (request.node.callspec.params["random_model"] not in FORMULAS)


@pytest.mark.parametrize("random_model", ["beit", "cae", "stop"], indirect=True)
def test_other_sizes_than_the_published_one_are_announced_once_and_leave_it_unchanged(random_model, caplog):
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        before = random_model(images)[2]
        assert not caplog.records
        for _ in range(2):
            assert random_model(torch.zeros(1, 3, 48, 96))[2].shape[1:3] == (3, 6)
        assert [record.args for record in caplog.records] == [(48, 96)]
        assert torch.equal(random_model(images)[2], before)


@pytest.mark.parametrize("random_model", ["beit"], indirect=True)
def test_beit_resizes_the_published_table_whatever_came_before(random_model):
    positions = random_model.network.rel_pos_bias
    table = nn.init.normal_(positions.relative_position_bias_table)
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        direct = random_model(images)[0]
        random_model(torch.zeros(1, 3, 32, 32))
        assert torch.equal(random_model(images)[0], direct)
        bias = positions()
    assert bias.shape == (12, 37, 37)
    assert torch.equal(torch.stack([bias[:, 0, 1], bias[:, 1, 0], bias[:, 0, 0]]), table[-3:]), "those of the class"
    centre = bias.diagonal(dim1=1, dim2=2)[:, 1:], table[27 * 13 + 13, :, None].expand(-1, 36)
    torch.testing.assert_close(*centre, msg="the bias of a patch to itself is the same in every grid")


def test_beit_learns_one_table_on_every_grid():
    model = tiny_beit()
    before = dict(model.named_parameters())
    (table,) = (parameter for name, parameter in before.items() if "relative_position" in name)
    for height, width in ((16, 16), (12, 20), (32, 32)):
        table.grad = None
        model(torch.randn(2, 3, height, width))[2].square().sum().backward()
        assert table.grad is not None and table.grad.any(), f"{height}x{width} do not teach it"
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)


# ------------------------------------------------------------------------------------------ files and mistakes


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_name_is_answered_with_a_known_one(family):
    name = SMALLEST[family]
    with pytest.raises(UserError, match=f"{name[:-1]}x.*did you mean {name}") as error:
        loader(family).load_model(name[:-1] + "x")
    if family != "timm":
        assert all(other in str(error.value) for other in loader(family).MODELS)
        with pytest.raises(UserError, match=r"; there are: .*[^)]$"):
            loader(family).load_model("?")


def test_names_are_known_in_any_case():
    with on_meta():
        load("aim", "aim_600m", None, device="meta")


@pytest.fixture
def dino_file(tmp_path):
    """A file for the smallest network, and its content to spoil."""
    path = tmp_path / "dino.pth"
    keys = key_table(manifest_of("dino", "dino_vits16"))
    content = {key: fill(key, *spec) for key, spec in keys.items()}
    torch.save(content, path)
    return path, content


def test_a_file_placed_by_hand_is_loaded(dino_file):
    path, content = dino_file
    model = loader("dino").load_model("dino_vits16", pretrained_weights=path)
    assert torch.equal(model.network.norm.weight, content["norm.weight"])


def test_missing_left_over_and_misshapen_tensors_are_named(dino_file):
    path, content = dino_file
    content["head.weight"] = content.pop("norm.bias")
    content["norm.weight"] = torch.zeros(3)
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        loader("dino").load_model("dino_vits16", path)
    assert str(path) in str(error.value)
    for part in ("1 missing: norm.bias", "1 unexpected: head.weight", "norm.weight ([3], expected [384])"):
        assert part in str(error.value)


def test_a_file_of_another_layout_is_explained(dino_file):
    path, _ = dino_file
    with on_meta():
        with pytest.raises(UserError, match="no entry 'model'; it has: cls_token, pos_embed"):
            loader("mae").load_model("vit_base_patch16", path)
        with pytest.raises(UserError, match="no entry 'model'; it has: cls_token"):
            loader("data2vec2").load_model("data2vec2_vitb16_ema", path)


def test_training_options_beside_the_weights_are_read(dino_file, tmp_path):
    _, content = dino_file
    path = tmp_path / "ibot.pth"
    torch.save(
        {"state_dict": content | {"masked_embed": torch.zeros(1, 384)}, "args": argparse.Namespace(lr=0.1)}, path
    )
    model = loader("ibot").load_model("ibot_vits16", path)
    assert torch.equal(model.network.norm.weight, content["norm.weight"])


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_file_that_would_execute_something_is_refused_by_name(dino_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, content = dino_file
    torch.save({"state_dict": content, "args": Payload()}, path)
    for family in ("ibot", "timm"):
        with pytest.raises(UserError, match=r"pathlib\.\S*Path\.touch|getattr"):
            loader(family).load_model(SMALLEST[family], path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("model_name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timm_leaves_the_classifiers_of_a_file_out(model_name):
    timm: Any = pytest.importorskip("timm")
    with on_meta(), answered_with(timm.create_model(model_name).state_dict()):
        model = loader("timm").load_model(model_name, "by_hand.pth", device="meta")
    assert not [key for key in model.state_dict() if "head" in key]


def test_timm_refuses_weights_that_do_not_fit(dino_file):
    path, content = dino_file
    del content["norm.bias"]
    torch.save({"model": content}, path)
    with pytest.raises(UserError, match="unexpected: model"):
        loader("timm").load_model("vit_small_patch16_224", path)
    with pytest.raises(UserError, match=r"1 missing: norm\.bias\)"):
        loader("timm").load_model("vit_small_patch16_224", path, state_dict_key="model")


def test_timm_says_what_it_does_not_take():
    with pytest.raises(UserError, match=r"Try timm_kwargs=\{\}"):
        loader("timm").load_model("beit_base_patch16_224", pretrained=False)
    with pytest.raises(UserError, match="takes vision transformers"):
        loader("timm").load_model("resnet18", pretrained=False, timm_kwargs={})
    with pytest.raises(UserError, match="local-dir"):
        loader("timm").load_model("nobody/nothing")
    with pytest.raises(UserError, match="not_a_tag"):
        loader("timm").load_model("vit_tiny_patch16_224.not_a_tag")


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm.*pip install -c constraints\.txt -e '\.\[baselines\]'"):
        loader("dino").load_model("dino_vits16", pretrained=False)


def test_a_loader_file_runs_from_anywhere_without_its_library(tmp_path):
    """Importing one must cost nothing; the library is imported by `load_model`."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['timm'] = None\n"
        "from pathlib import Path; from utils import import_from_path\n"
        f"print(import_from_path(Path({str(FOLDER / 'mimrefiner_loader.py')!r})).__model_loader__.__name__)"
    )
    done = run_forked("-c", code, cwd=tmp_path)
    assert done.stdout == "load_model\n", done.stderr


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_loaders_read_files_in_one_place_only(path):
    text = path.read_text()
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        assert ast.unparse(call.func) not in ("torch.load", "pickle.load", "torch.hub.load_state_dict_from_url")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert (
            "trust_remote_code" not in given and "weights_only" not in given and given.get("strict") in (None, "True")
        )


# ------------------------------------------------------------------------------------------ MIM-Refiner


@pytest.fixture
def fake_repository(tmp_path):
    """What torch.hub needs of a repository: a hubconf.py. Its networks return token number and pixel mean."""
    (tmp_path / "hubconf.py").write_text(
        "import pathlib, torch\n"
        "dependencies = ['torch']\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n"
        "        tokens = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 16).flatten(2).transpose(1, 2)\n"
        "        return self.scale * torch.cat([torch.full_like(tokens[:, :1], -1), tokens], dim=1)\n"
        "def mae_refined_l16():\n"
        "    pathlib.Path(__file__).with_name('executed').touch()\n"
        "    return Network()\n"
        "def dbot_refined_l16():\n"
        "    import a_package_that_nobody_has\n"
    )
    return tmp_path


def test_mimrefiner_runs_the_code_of_its_repository_only_when_told_to(fake_repository):
    with pytest.raises(UserError, match=r"runs its code on this machine.*trust_repo=true"):
        loader("mimrefiner").load_model("mae_refined_l16", repo=fake_repository)
    assert not (fake_repository / "executed").exists()
    model = loader("mimrefiner").load_model("mae_refined_l16", repo=fake_repository, trust_repo=True)
    assert (fake_repository / "executed").exists()
    images = torch.arange(6.0).view(1, 1, 2, 3).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(2, 3, -1, -1)
    global_repr, registers, feature_map = model(images)
    assert global_repr.tolist() == [[-1], [-1]] and registers is None
    assert feature_map[1, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert model.patch_size == 16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mimrefiner_explains_what_its_repository_lacks(fake_repository):
    with pytest.raises(UserError, match=r"a_package_that_nobody_has.*pip install kappamodules einops"):
        loader("mimrefiner").load_model("dbot_refined_l16", repo=fake_repository, trust_repo=True)
    with pytest.raises(UserError, match="reads its own files only"):
        loader("mimrefiner").load_model("mae_refined_l16", "weights.th")


def test_mimrefiner_asks_github_by_default(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.hub, "load", lambda **kwargs: asked.update(kwargs) or nn.Identity())
    loader("mimrefiner").load_model("mae_refined_h14", trust_repo=True)
    assert asked == {
        "repo_or_dir": "ml-jku/MIM-Refiner", "source": "github", "trust_repo": True, "model": "mae_refined_h14",
    }  # fmt: skip


@pytest.mark.parametrize("model_name", model_names("mimrefiner"))
def test_mimrefiner_random_networks_have_the_published_architecture(model_name):
    arch = manifest_of("mimrefiner", model_name)["arch"]
    with on_meta():
        model = load("mimrefiner", model_name, None, device="meta")
    blocks = [module for name, module in model.named_modules() if name.endswith(f".{arch['depth'] - 1}")]
    assert len(blocks) == 1 and layer_norm_eps(model) == {1e-6}
    shorten(model)
    with torch.device("meta"):
        global_repr, _, feature_map = model(torch.empty(2, 3, 16 * arch["patch"], 10 * arch["patch"]))
    assert global_repr.shape == (2, arch["width"]) and feature_map.shape == (2, 16, 10, arch["width"])


# -------------------------------------------------------------------------------------- features without weights


def test_a_histogram_counts_the_colours_of_patch_and_image():
    from baselines import histogram_loader
    from data import IMAGENET_MEAN, IMAGENET_STD

    images = torch.randint(0, 256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(0))
    images[0, :, :4, :4] = torch.tensor([63, 64, 255]).view(3, 1, 1)  # the ends of bins
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    model = histogram_loader.load_model(patch_size=4, bins=4)
    global_repr, registers, feature_map = model((images / 255 - mean) / std)
    assert registers is None
    assert feature_map.shape == (2, 2, 3, 128)
    assert feature_map[0, 0, 0].nonzero().flatten().tolist()[0] == 0 * 16 + 1 * 4 + 3
    for i in range(2):
        bins = (images[i] // 64 * torch.tensor([16, 4, 1]).view(3, 1, 1)).sum(dim=0)
        counted = bins.flatten().bincount(minlength=64) / 96
        torch.testing.assert_close(global_repr[i], counted)
        for row, column in itertools.product(range(2), range(3)):
            patch = bins[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(feature_map[i, row, column, :64], patch.flatten().bincount(minlength=64) / 16)
            torch.testing.assert_close(feature_map[i, row, column, 64:], counted)


@pytest.mark.parametrize("wrong", [{"patch_size": 0}, {"bins": 1}])
def test_a_histogram_of_nothing_is_refused(wrong):
    from baselines import histogram_loader

    ((key, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{key}={value}: must be at least"):
        histogram_loader.load_model(**wrong)


# -------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=pytest.mark.long if each == "timm" else pytest.mark.slow) for each in SMALLEST]
)
def test_every_family_runs_through_the_benchmark_on_the_demo_data(family, tmp_path):
    data = "demo_data/emoji_on_scenes"
    keys = [
        f"evals.segmentation.{key}"
        for key in (
            f"train_dataset_name=custom://Segmentation?root='{data}/train'",
            f"test_dataset_name=custom://Segmentation?root='{data}/val'",
            "max_train_images=6",
            "labelled_images=[]",
            "classifiers=[knn]",
            "knn_ks=[1]",
            "resolution=112",
            "num_pictures=2",
        )
    ]
    done = run_cli(
        "benchmark.py",
        f"output_dir={tmp_path}",
        f"model_path=baselines/{family}_loader.py",
        f"model_loader_kwargs.model_name={SMALLEST[family]}",
        "model_loader_kwargs.pretrained=false",
        "evals_config_path=configs/evals/demo.yaml",
        "device=cpu",
        "num_workers=0",
        "batch_size=20",
        *keys,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        0
        <= json.loads((tmp_path / "results.json").read_text())["evaluations"]["segmentation"]["results"]["knn"]["acc"]
        <= 1
    )
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("family", "model_name", "size"),
    [("dino", "dino_vits16", 32), ("dinov2", "dinov2_vits14_reg", 28), ("stop", "stop_vitb16", 32)],
)
def test_the_last_intermediate_layer_is_the_feature_map(family, model_name, size):
    model = loader(family).load_model(model_name, pretrained=False)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = model.get_intermediate_layers(images, 3, reshape=True)
        assert len(layers) == 3
        assert torch.equal(layers[-1].movedim(1, -1), model(images)[2])
        with pytest.raises(UserError, match="n=13: the network has 12 blocks"):
            model.get_intermediate_layers(images, 13)


def test_blocks_without_the_class_token_are_refused():
    model = loader("dino").load_model("dino_xcit_small_12_p16", pretrained=False)
    with torch.no_grad(), pytest.raises(UserError, match="do not hold the tokens that it returns"):
        model.get_intermediate_layers(torch.zeros(1, 3, 32, 32))
