"""hubconf.py: the released models by name, as torch.hub finds them, with torch alone."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

import hubconf
from model import EncoderDecoder
from utils import UserError

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


def test_torch_hub_lists_the_four_names_and_nothing_else():
    listed = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert listed == NAMES.keys()
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


def test_it_works_with_torch_alone_beside_modules_of_the_same_names(tmp_path):
    """In the program of a user who has a `model.py` and a `utils.py`, and nothing installed but torch."""
    for name in ("model", "utils", "weights"):
        (tmp_path / f"{name}.py").write_text(f"mine = '{name}'\n")
    code = f"""
import sys
for name in ("jaxtyping", "omegaconf", "numpy", "PIL", "datasets", "huggingface_hub", "safetensors", "tqdm", "yaml"):
    sys.modules[name] = None
import torch
import model, utils
with torch.device("meta"):
    for name in {list(NAMES)}:
        loaded = torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False)
        global_repr, registers, feature_map = loaded(torch.zeros(1, 3, 224, 224))
        assert feature_map.shape == (1, 16, 16, 1024), feature_map.shape
        assert not loaded.training
assert (model.mine, utils.mine, sys.modules["model"].mine) == ("model", "utils", "model")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
