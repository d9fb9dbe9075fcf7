"""hubconf.py: the released models by name, as torch.hub finds them, with torch alone."""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from commands import run_forked
from conftest import ROOT, run_cli
from golden_cae import TINY_RUN as CAE_RUN
from golden_ijepa import TINY_RUN
from methods import METHODS, write_export
from omegaconf import OmegaConf

import export
import hubconf
import train_cae
import train_ijepa
from checkpoint import export_weights
from config import DEFAULT_PRETRAIN_CONFIG, load_config, to_yaml
from model import EncoderDecoder, load_model
from train_capi import CapiConfig
from utils import Normalisation, UserError

NAMES = {
    "capi_vitl14_lvd": "https://dl.fbaipublicfiles.com/capi/capi_vitl14_lvd.pth",
    "capi_vitl14_p205": "https://dl.fbaipublicfiles.com/capi/capi_vitl14_p205.pth",
    "capi_vitl14_in22k": "https://dl.fbaipublicfiles.com/capi/capi_vitl14_i22k.pth",
    "capi_vitl14_in1k": "https://dl.fbaipublicfiles.com/capi/capi_vitl14_in1k.pth",
}

TINY: dict[str, Any] = {
    "patch_size": 4,
    "n_registers": 4,
    "transformers_kwargs": {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
    "encoder_kwargs": {"depth": 1},
    "decoder_kwargs": {"depth": 1},
}


def vit_l14_manifest() -> dict[str, list[int]]:
    """Keys and shapes of the released weights, from their description."""
    d, r = 1024, 16
    keys = {
        "mask_token": [1, d],
        "registers": [1, r, d],
        "patch_embed.weight": [d, 3, 14, 14],
        "patch_embed.bias": [d],
    }
    for tower, depth in (("encoder", 24), ("decoder", 12)):
        for i in range(depth):
            block = f"{tower}.blocks.{i}"
            keys[f"{block}.residual1.norm.weight"] = [d]
            for name in ("q_proj", "k_proj", "v_proj", "proj"):
                keys[f"{block}.residual1.fn.{name}.weight"] = [d, d]
            keys[f"{block}.residual1.fn.rope.freqs"] = [2, d // 16]
            keys[f"{block}.residual2.norm.weight"] = [d]
            keys[f"{block}.residual2.fn.fc1.weight"] = [4 * d, d]
            keys[f"{block}.residual2.fn.fc2.weight"] = [d, 4 * d]
    return keys


def test_the_architecture_has_the_keys_of_the_released_weights():
    with torch.device("meta"):
        model = EncoderDecoder(**hubconf.VIT_L14)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == vit_l14_manifest()
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(302e6, rel=0.002)


def test_the_architecture_is_that_of_the_default_training():
    config: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "default_pretrain_config.yaml"))
    assert config["model"] == hubconf.VIT_L14


def test_torch_hub_lists_the_names_and_nothing_else():
    listed = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert listed == NAMES.keys() | {"capi", "cae", "ijepa"}
    assert hubconf.dependencies == ["torch"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(hubconf, "VIT_L14", TINY)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_loads_its_address(name, tiny, monkeypatch):
    asked, released = [], EncoderDecoder(**TINY)

    def read(address: str, **_: Any) -> dict[str, Any]:
        asked.append(address)
        return {f"backbone.{key}": value for key, value in released.state_dict().items()}

    monkeypatch.setattr("model.read_state_dict", read)
    model = getattr(hubconf, name)()
    assert asked == [NAMES[name]]
    images = torch.randn(1, 3, 8, 12)
    assert not model.training
    assert torch.equal(model(images).feature_map, released.eval()(images).feature_map)


def test_a_path_replaces_the_released_weights(tiny, tmp_path):
    mine = EncoderDecoder(**TINY)
    torch.save(mine.state_dict(), tmp_path / "mine.pth")
    for pretrained in (True, False):
        model = hubconf.capi_vitl14_lvd(pretrained=pretrained, weights=str(tmp_path / "mine.pth"))
        assert torch.equal(model.registers, mine.registers)
    with pytest.raises(UserError, match=r"weights='nowhere.pth': there is no such file"):
        hubconf.capi_vitl14_lvd(weights="nowhere.pth")


# ------------------------------------------------------------------------------------------------ a run's model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder like that of a finished run, of a model with learnable final norms."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    overrides = ["model.patch_size=4", "model.n_registers=4", "model.encoder_kwargs.depth=1"]
    overrides += ["model.decoder_kwargs.depth=1", "model.transformers_kwargs.embed_dim=32"]
    overrides += ["model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=2"]
    overrides += ["model.norm_layer_type=LayerNorm", "model.final_norm_kwargs.elementwise_affine=true"]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, overrides)
    export_weights(folder / "student_ema.pth", {"backbone": EncoderDecoder(**cfg.model.kwargs())}, to_yaml(cfg))
    return folder


def assert_same_model(a: Any, b: Any) -> None:
    images = torch.randn(2, 3, 8, 12)
    assert not a.training
    for x, y in zip(a(images), b(images), strict=True):
        assert torch.equal(x, y)


def test_capi_loads_what_a_run_or_an_export_or_save_pretrained_wrote(run, tmp_path):
    expected = load_model(pretrained_weights=run / "student_ema.pth")
    assert {"enc_norm.weight", "enc_norm.bias", "dec_norm.weight", "dec_norm.bias"} <= expected.state_dict().keys()
    assert export.main([str(run / "student_ema.pth"), str(tmp_path / "w.safetensors")]) == 0
    expected.save_pretrained(tmp_path / "hub")
    for weights in (run, str(run), run / "student_ema.pth", tmp_path / "w.safetensors", tmp_path / "hub"):
        assert_same_model(hubconf.capi(weights), expected)
    torch.save(expected.state_dict(), tmp_path / "elsewhere.pth")
    for config in (run / "student_ema.yaml", str(run / "student_ema.yaml"), expected.arguments):
        assert_same_model(hubconf.capi(tmp_path / "elsewhere.pth", config=config), expected)


def test_ijepa_loads_what_a_run_wrote_and_what_is_published(tmp_path):
    cfg = load_config(train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG, TINY_RUN)
    encoder, average = cfg.make_encoder(), cfg.make_encoder().eval()
    export_weights(tmp_path / "run" / "student_ema.pth", {"backbone": average}, to_yaml(cfg))
    average.save_pretrained(tmp_path / "hub")
    for weights in (tmp_path / "run", tmp_path / "run" / "student_ema.pth", tmp_path / "hub"):
        assert_same_model(hubconf.ijepa(weights), average)
    parts = {"encoder": encoder, "target_encoder": average}
    file = {name: {f"module.{k}": v for k, v in part.state_dict().items()} for name, part in parts.items()}
    torch.save(file | {"opt": {}, "epoch": 300}, tmp_path / "published.pth.tar")
    assert_same_model(hubconf.ijepa(tmp_path / "published.pth.tar", num_heads=2), average)
    both = {"num_heads": 2, "encoder": "encoder"}
    assert_same_model(hubconf.ijepa(tmp_path / "published.pth.tar", **both), encoder.eval())
    with pytest.raises(UserError, match="Nothing tells the attention heads"):
        hubconf.ijepa(tmp_path / "published.pth.tar")


def test_cae_loads_what_a_run_wrote_and_what_is_published(tmp_path):
    cfg = load_config(train_cae.CaeConfig, train_cae.DEFAULT_CONFIG, [*CAE_RUN, "model.patch_size=4"])
    encoder = cfg.make_encoder().eval()
    export_weights(tmp_path / "run" / "student.pth", {"backbone": encoder}, to_yaml(cfg))
    for weights in (tmp_path / "run", tmp_path / "run" / "student.pth"):
        assert_same_model(hubconf.cae(weights), encoder)
    weights = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": weights | {"mask_token": torch.zeros(1, 1, 32)}}, tmp_path / "published.pth")
    assert_same_model(hubconf.cae(tmp_path / "published.pth", num_heads=2), encoder)
    with pytest.raises(UserError, match="Nothing tells the attention heads"):
        hubconf.cae(tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"has no student.pth, which a run writes at its end"):
        hubconf.cae(tmp_path)


def test_the_config_is_read_as_omegaconf_reads_it(tmp_path):
    paths = [DEFAULT_PRETRAIN_CONFIG, *sorted((ROOT / "configs").glob("*.yaml"))]
    for path in paths:
        resolved = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(path)])
        (tmp_path / "exported.yaml").write_text(to_yaml(resolved))
        for each in (path, tmp_path / "exported.yaml"):
            loaded: Any = OmegaConf.to_container(OmegaConf.load(each))
            assert hubconf._model_section(each) == loaded.get("model", {}), f"{path.name} is another model"
            merged = hubconf._merged(hubconf.VIT_L14, hubconf._model_section(each))
            assert merged == resolved.model.kwargs(), path.name
    text = """
        # a comment
        train: {seed: 1}
        model:   # ours
            a: null
            b:
                c: "x: # y"   # more
                d: {e: 1e-5, f: {g: ~, h: 'true'}, i: {}}

                j: -0.5
            k:
            l: TRUE
        data: [1]
        """
    (tmp_path / "odd.yaml").write_text(textwrap.dedent(text))
    expected: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "odd.yaml"))
    assert hubconf._model_section(tmp_path / "odd.yaml") == expected["model"]


@pytest.mark.parametrize(
    "data",
    [
        "data: {mean: [0.1, 0.2, 0.3], std: [0.5, 0.5, 0.5]}",
        "data: {dataset: 'custom://Images?root=1', mean: [0.1, 0.2, 0.3], std: [0.5, 0.5, 0.5]}  # ours",
        "data:  # ours\n  dataset: https://a.b/c?d='e'  # x\n  mean: [0.1, 0.2, 0.3]  # y\n  std: [0.5,0.5,0.5]",
        "data:\n  crops: {mean: [1]}\n  mean:\n    - 0.1\n    - .2  # x\n\n    - 0.3\n  std:\n  - 1\n  - 2\n  - 0.5",
        "data:\n  own:\n    mean: [1, 1, 1]\n  mean: [0.1, 0.2, 0.3]\n  std: [0.5, 0.5, 0.5]\n  value_range: null",
    ],
)  # fmt: skip
def test_the_normalisation_is_read_as_omegaconf_reads_it(run, tmp_path, data):
    path, of_run = tmp_path / "c.yaml", OmegaConf.load(run / "student_ema.yaml")
    path.write_text(f"{data}\n{OmegaConf.to_yaml(OmegaConf.masked_copy(of_run, ['model']))}")
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
    assert hubconf.capi(run / "student_ema.pth", config=path).normalisation == Normalisation.of(loaded["data"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data:\n  mean: [.1, .2, .3]\n", r"line 2: 'mean: \[.1, .2, .3\]' is more YAML than"),
        ("data: {mean: [.1, .2, .3]}\n", "line 1.*is more YAML than"),
        ("data: {mean: [0.1, 0.2,\n  0.3]}\n", "line 1.*is more YAML than"),
        ("data:\n  std: [0.5, 0.5, # x\n    0.5]\n", "line 2.*is more YAML than"),
        ("data:\n  std:\n    - half\n", "line 3.*is more YAML than"),
        ("data:\n  std:\n    a: 1\n", "line 3.*is more YAML than"),
        ("data:\n  mean: auto\n", "data.mean='auto': says no numbers"),
        ("model:\n  a: &x 1\n", "line 2: 'a: &x 1' is more YAML than"),
        ("model:\n  - 1\n", "line 2"),
        ("model:\n  patch_size: ${data.x}\n", "line 2"),
        ("model:\n  a: {b: 1,\n    c: 2}\n", "line 2"),
        ("model:\n  patch_size: 4\n     n_registers: 4\n", "line 3"),
        ("model:\n  patch_sise: 4\n", "has a wrong key: .*patch_sise"),
        ("model: 3\n", "its section model is 3"),
        (b"model:\n  norm_layer_type: \xff\n", "cannot be read: .*utf-8"),
        (None, "cannot be read: .*No such file"),
        ("model: {patch_size: 4}\n", "do not fit the model .*Give the config they were trained with"),
    ],
)
def test_a_config_that_cannot_be_read_or_does_not_fit_is_explained(run, tmp_path, config, message):
    path = tmp_path / "c.yaml"
    if config is not None:
        path.write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(UserError, match=message):
        hubconf.capi(run / "student_ema.pth", config=path)


def test_a_folder_without_weights_says_how_to_have_them(tmp_path):
    with pytest.raises(UserError, match=r"has no student_ema.pth, which a run writes at its end and python export.py"):
        hubconf.capi(tmp_path)


@pytest.mark.parametrize("given", ["folder", "file", "hub"])
@pytest.mark.parametrize(("method", "entry"), [("capi", "capi"), ("ijepa", "ijepa"), ("stop", "ijepa"), ("cae", "cae")])
def test_a_model_of_another_method_is_told_its_entry(tmp_path, method, entry, given):
    weights, backbone = write_export(METHODS[method], tmp_path)
    shutil.copyfile(weights.with_suffix(".yaml"), tmp_path / "config.yaml")
    backbone.save_pretrained(tmp_path / "hub")
    for other in {"capi", "ijepa", "cae"} - {entry}:
        source = {"folder": tmp_path, "file": weights, "hub": tmp_path / "hub"}[given]
        says = rf"config='{tmp_path}/.*' is of a model which torch.hub has as {entry!r}"
        with pytest.raises(UserError, match=says if given != "hub" else "config.json'|do not fit|holds no encoder of"):
            getattr(hubconf, other)(source)


# ---------------------------------------------------------------------------------- in a program of somebody else

PROGRAM = """
import copy, io, multiprocessing, pickle, sys
import torch
from torch import nn

def work(model, images, queue):
    import model as mine  # the program's own, in a spawned worker too
    try:
        model(images[..., 1:])
    except ValueError as error:
        queue.put((mine.name, model(images).feature_map.tolist(), error))

def names():
    return {name.split(".")[0] for name in sys.modules}

def load(*args, **kwargs):
    before = names()
    loaded = torch.hub.load(*args, **kwargs)
    assert names() <= before, f"torch.hub.load left {names() - before}"
    return loaded

def own_modules():
    from utils.helpers import x
    import model, weights
    assert (model.name, weights.name, x) == ("model", "weights", 1)

def main():
    clone, run = sys.argv[1:]
    for name in ("jaxtyping", "omegaconf", "numpy", "PIL", "datasets", "huggingface_hub", "safetensors", "yaml"):
        if name not in sys.modules:
            sys.modules[name] = None
    path = list(sys.path)
    ours = load(clone, "capi", source="local", weights=run)
    theirs = load("owner/repo:main", "capi", weights=run, trust_repo=True, skip_validation=True, verbose=False)
    assert type(ours) is type(load(clone, "capi", source="local", weights=run))
    assert type(ours) is not type(theirs), "two copies of the repository are mixed"
    assert torch.hub.load("dino", "dino", source="local") == "dino's utils"
    for name in ("utils", "vision_transformer"):
        del sys.modules[name]  # what such a repository leaves
    own_modules()
    assert sys.path == path

    images = torch.randn(2, 3, 8, 12)
    out = ours(images)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(again) is type(ours)
        assert torch.equal(again(images).feature_map, out.feature_map)
    again = pickle.loads(pickle.dumps(theirs))
    assert type(again) is type(theirs)
    assert type(pickle.loads(pickle.dumps(out))) is type(out)
    wrapped = nn.DataParallel(nn.Sequential(ours, nn.Identity()))
    with open("models.pkl", "wb") as file:
        pickle.dump((ours, theirs, ours.encoder, wrapped, out, images), file)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(ours, images, queue))
    process.start()
    name, feature_map, error = queue.get(timeout=100)
    process.join()
    assert name == "model" and torch.equal(torch.tensor(feature_map), out.feature_map)
    assert type(error).__name__ == "UserError" and "8x11" in str(error), error

if __name__ == "__main__":
    main()
"""

FRESH = """
import pickle, sys
import model, torch
before = {name.split(".")[0] for name in sys.modules}
ours, theirs, encoder, wrapped, out, images = pickle.load(open("models.pkl", "rb"))
new = {name.split(".")[0] for name in sys.modules} - before
assert not new, new
assert torch.equal(ours(images).feature_map, out.feature_map) and torch.equal(theirs(images)[1], out[1])
assert torch.equal(wrapped(images).global_repr, out.global_repr)
assert type(encoder) is type(ours.encoder) and type(theirs) is not type(ours) and model.name == "model"
"""


@pytest.fixture
def program(tmp_path, run):
    """A program with modules called like ours, a copy of this repository in the hub's cache, and another repository."""
    for name in ("model", "weights"):
        (tmp_path / f"{name}.py").write_text(f"name = '{name}'\n")
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").touch()
    (tmp_path / "utils" / "helpers.py").write_text("x = 1\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "fresh.py").write_text(FRESH)
    cached = tmp_path / "torch" / "hub" / "owner_repo_main"
    cached.mkdir(parents=True)
    for name in ("hubconf", "model", "utils", "weights"):
        (cached / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "utils.py").write_text('name = "dino\'s utils"\n')
    (tmp_path / "dino" / "vision_transformer.py").write_text("from utils import name\n")
    (tmp_path / "dino" / "hubconf.py").write_text(
        "import vision_transformer\ndef dino(): return vision_transformer.name"
    )

    def start(script: str, *args: object, run: Callable[..., CompletedProcess[str]] = run_cli) -> None:
        done = run(tmp_path / script, *map(str, args), cwd=tmp_path, TORCH_HOME=str(tmp_path / "torch"))
        assert done.returncode == 0, done.stderr

    return start


@pytest.mark.long
def test_the_hub_leaves_no_name_behind_and_its_models_pickle(program, run):
    program("program.py", ROOT, run)
    program("fresh.py")


@pytest.mark.timeout(300)
def test_models_of_the_hub_compile_and_export_in_any_program(program, run, tmp_path):
    """After the program's own modules were imported, as one graph, and as plain and strict exports."""
    (tmp_path / "compile.py").write_text(
        "import sys, torch, model, weights, utils.helpers\n"
        "ours = torch.hub.load(sys.argv[1], 'capi', source='local', weights=sys.argv[2])\n"
        "images = torch.randn(2, 3, 8, 12)\n"
        "with torch.no_grad():\n"
        "    out = ours(images)\n"
        "    compiled = torch.compile(ours, backend='aot_eager', fullgraph=True)\n"
        "    torch.testing.assert_close(compiled(images), out)\n"
        "    for strict in (False, True):\n"
        "        exported = torch.export.export(ours, (images,), strict=strict).module()\n"
        "        torch.testing.assert_close(exported(images), out)\n"
        "assert model.name == 'model'\n"
    )
    program("compile.py", ROOT, run, run=run_forked)


def test_programs_of_this_folder_get_its_plain_modules(run):
    plain = torch.hub.load(str(ROOT), "capi", source="local", weights=run)
    assert type(plain) is EncoderDecoder
    assert type(plain).__module__ == "model"


def test_it_works_with_torch_alone_beside_modules_of_the_same_names(tmp_path):
    """In the program of a user who has a `model.py` and a `utils.py`, and nothing installed but torch."""
    for name in ("model", "utils", "weights"):
        (tmp_path / f"{name}.py").write_text(f"mine = '{name}'\n")
    for name, method in METHODS.items():
        write_export(method, tmp_path / name, "data.mean=[0.1,0.2,0.3]")
    shutil.copy(tmp_path / "cae" / "student.pth", tmp_path / "alone.pth")
    hub_names = {name: "ijepa" if name == "stop" else name for name in METHODS}
    code = f"""
import sys
for name in ("jaxtyping", "omegaconf", "numpy", "PIL", "datasets", "huggingface_hub", "safetensors", "tqdm", "yaml"):
    sys.modules[name] = None
import torch
import model, utils
for run, name in {hub_names}.items():
    loaded = torch.hub.load({str(ROOT)!r}, name, source="local", weights=run)
    assert loaded.normalisation.mean == (0.1, 0.2, 0.3), loaded.normalisation
    assert loaded(torch.zeros(1, 3, 16, 24)).feature_map.isfinite().all()
try:
    torch.hub.load({str(ROOT)!r}, "cae", source="local", weights="alone.pth")
except ValueError as error:
    assert "Nothing tells the attention heads" in str(error), error
with torch.device("meta"):
    for name in {list(NAMES)}:
        loaded = torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False)
        global_repr, registers, feature_map = loaded(torch.zeros(1, 3, 224, 224))
        assert feature_map.shape == (1, 16, 16, 1024), feature_map.shape
        assert not loaded.training
assert (model.mine, utils.mine, sys.modules["model"].mine) == ("model", "utils", "model")
"""
    done = run_cli("-W", "ignore", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
