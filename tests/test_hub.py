"""Models on the Hugging Face Hub: folders that are written and read, uploads (to nowhere), and what is refused."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from golden import tiny_model
from golden_ijepa import tiny_networks
from safetensors.torch import load_file

import cae
from ijepa import Encoder
from model import Backbone, EncoderDecoder
from utils import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def assert_same_model(a: Backbone, b: Backbone) -> None:
    images = torch.randn(2, 3, 2 * a.patch_size, 3 * a.patch_size)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    for x, y in zip(a.eval()(images), b.eval()(images), strict=True):
        assert torch.equal(x, y)


def tiny_encoder() -> Encoder:
    return tiny_networks()[0]


def tiny_cae() -> cae.Encoder:
    return cae.Encoder(grid_size=4, patch_size=12, embed_dim=32, depth=2, num_heads=4, layer_scale=0.5)


EACH_CLASS = pytest.mark.parametrize("make", [lambda: tiny_model(out_layer=1, n_registers=8), tiny_encoder, tiny_cae])


@EACH_CLASS
def test_what_was_saved_is_loaded(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "mine")
    loaded = type(model).from_pretrained(tmp_path / "mine")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.arguments == model.arguments
    assert_same_model(loaded, model)


@EACH_CLASS
def test_the_files_are_those_of_the_hub(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text()) == model.arguments
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@EACH_CLASS
def test_saving_does_not_change_the_model(tmp_path, make):
    model = make().train()
    parameters = list(model.parameters())
    kind = type(model)
    model.save_pretrained(tmp_path)
    assert type(model) is kind
    assert model.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_arguments_win_over_the_config(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert EncoderDecoder.from_pretrained(tmp_path, out_layer=1).out_layer == 1


@pytest.mark.parametrize(
    ("make", "said", "shape"),
    [
        (tiny_model, ("arXiv:2502.08769", "Darcet, Timoth{\\'e}e", "width 32, 2 blocks"), (1, 16, 16, 32)),
        (
            tiny_encoder,
            (
                "arXiv:2301.08243",
                "arXiv:2308.00566",
                "Assran, Mahmoud",
                "Bar, Amir",
                "width 32, 2 blocks and patches of 12",
            ),
            (1, 16, 16, 32),
        ),
        (tiny_cae, ("arXiv:2202.03026", "Chen, Xiaokang", "width 32, 2 blocks and patches of 12"), (1, 16, 16, 32)),
    ],
)
def test_the_model_card_says_what_it_is_and_its_example_runs(tmp_path, make, said, shape):
    folder = tmp_path / "mine"
    make().save_pretrained(folder, card={"license": "cc0-1.0", "training": "Trained on 480 photos."})
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["license"] == "cc0-1.0"
    assert card.data.to_dict()["library_name"] == "capi"
    for part in ("cc0-1.0", "Trained on 480 photos.", *said):
        assert part in card.text, part
    snippet = card.text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)  # our own text
    assert names["feature_map"].shape == shape


def test_an_encoder_that_was_loaded_takes_other_resolutions_by_bicubic_positions(tmp_path):
    model = tiny_encoder()
    model.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    table = model.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(8, 8), mode="bicubic").flatten(2).transpose(1, 2)
    larger = Encoder(**model.arguments | {"grid_size": 8}).eval()
    larger.load_state_dict(model.state_dict() | {"pos_embed": resized})
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(loaded(images).feature_map, larger(images).feature_map)


def test_a_model_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, monkeypatch):
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls["create"] = (repo_id, kwargs)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, folder_path: Path, repo_id: str, **kwargs: Any) -> str:
            calls["upload"] = (repo_id, kwargs["revision"])
            calls["card"] = (folder_path / "README.md").read_text()
            calls["model"] = EncoderDecoder.from_pretrained(folder_path)
            return "https://huggingface.co/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = tiny_model()
    url = model.push_to_hub("lab/capi-tiny", private=True, token="secret", branch="dev", card={"license": "mit"})
    assert url == "https://huggingface.co/commit"
    assert calls["token"] == "secret"
    assert calls["create"] == ("lab/capi-tiny", {"private": True, "exist_ok": True})
    assert calls["upload"] == ("lab/capi-tiny", "dev")
    assert 'from_pretrained("lab/capi-tiny")' in calls["card"]
    assert "license: mit" in calls["card"]
    assert_same_model(calls["model"], model)


def test_from_the_hub_asks_for_the_two_files(tmp_path, monkeypatch):
    model, asked = tiny_model(), []
    model.save_pretrained(tmp_path)

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename, kwargs.get("revision")))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda **kw: download(kw["repo_id"], kw["filename"])
    )
    assert_same_model(EncoderDecoder.from_pretrained("lab/capi-tiny", revision="v1"), model)
    assert ("lab/capi-tiny", "model.safetensors", "v1") in asked
    assert {name for _, name, _ in asked} == {"config.json", "model.safetensors"}, "a pickle was asked for"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "the folder has no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "the folder has no model.safetensors"),
        (lambda d: (d / "config.json").write_text("{}"), "does not describe the model"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors' cannot be read"),
        (
            lambda d: tiny_model(n_registers=8).save_pretrained(d, config=tiny_model().arguments),
            r"registers \(\[1, 8, 32",
        ),
    ],
)
def test_folders_that_hold_no_model_are_refused(tmp_path, damage, message):
    tiny_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        EncoderDecoder.from_pretrained(tmp_path)


def test_a_folder_of_another_class_is_refused(tmp_path):
    for model, other in ((tiny_model(), Encoder), (tiny_encoder(), EncoderDecoder)):
        folder = tmp_path / other.__name__
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=r"config.json, or an argument, does not describe the model"):
            other.from_pretrained(folder)


@pytest.mark.parametrize("name", ["lab/not-here", "no/such/folder"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(name):
    with pytest.raises(UserError, match=f"from_pretrained\\('{name}'\\): there is no such folder, and config.json"):
        EncoderDecoder.from_pretrained(name)
