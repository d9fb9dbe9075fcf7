"""Tokenizers: DALL-E's encoder against its vectors and its file, k-means against an oracle, the command, mistakes."""

import itertools
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_forked
from conftest import load_golden_json, seeded
from golden_ijepa import fill
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file

import cae_tokenizer
from cae_tokenizer import DalleEncoder, DalleTokenizer, load_tokenizer, map_pixels
from utils import UserError
from weights import read_state_dict

CPU = torch.device("cpu")
GOLDEN = load_golden_json("vectors_cae")["dalle_encoder"]
PUBLISHED_KEYS = load_golden_json("keys_cae_base")["dalle_encoder_pickled_module_state_dict"]

# ------------------------------------------------------------------------------------------------ DALL-E's encoder


@pytest.fixture(scope="module")
def golden_encoder():
    encoder = DalleEncoder()
    fill(encoder)
    for name, parameter in encoder.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.zeros_(parameter)
    return encoder


def golden_image():
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.stack([column / 31, row / 31, ((column // 8 + row // 8) % 2).float()]).unsqueeze(0)


def test_dalle_encoder_equals_its_vectors(golden_encoder):
    torch.testing.assert_close(map_pixels(torch.tensor(GOLDEN["map_pixels_of"])), torch.tensor(GOLDEN["map_pixels"]))
    assert sum(p.numel() for p in golden_encoder.parameters()) == GOLDEN["n_params"]
    with torch.no_grad():
        logits = golden_encoder(map_pixels(golden_image()))
    assert list(logits.shape) == GOLDEN["logits_shape"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits[0, :4, 0, 0], torch.tensor(GOLDEN["logits_first4_at_0_0"]), **close)
    torch.testing.assert_close(logits.max(), torch.tensor(GOLDEN["logit_max"]), **close)
    top = logits[0].flatten(1).topk(2, dim=0).values
    torch.testing.assert_close(top[0] - top[1], torch.tensor(GOLDEN["argmax_margins"]), **close)
    tokenizer = DalleTokenizer(golden_encoder, image_size=32, device=CPU)
    assert tokenizer(golden_image()).tolist() == GOLDEN["argmax"]
    assert (tokenizer.vocabulary_size, tokenizer.grid_size) == (8192, 4)


def test_dalle_encoder_has_the_published_keys():
    with torch.device("meta"):
        state = DalleEncoder().state_dict()
    assert {key: list(x.shape) for key, x in state.items()} == dict(PUBLISHED_KEYS)


@pytest.mark.gpu
def test_ids_on_a_gpu_are_those_of_a_cpu_but_for_near_ties():
    """All layers but the last compute in float16 there."""
    state = small_encoder(width=64).state_dict()
    images = torch.rand(4, 3, 112, 112, generator=seeded(0))
    ids, logits = {}, {}
    for device in ("cpu", "cuda"):
        encoder = DalleEncoder(64, 50)
        encoder.load_state_dict(state)
        tokenizer = DalleTokenizer(encoder, image_size=112, device=torch.device(device))
        dtypes = {name: part.w.dtype for name, part in encoder.named_modules() if hasattr(part, "w")}
        halves = {name for name, dtype in dtypes.items() if dtype == torch.float16}
        assert halves == (set() if device == "cpu" else dtypes.keys() - {"blocks.output.conv"})
        with torch.no_grad():
            logits[device] = encoder(map_pixels(images.to(device))).cpu()
        assert logits[device].dtype == torch.float32
        with torch.autocast(device, torch.bfloat16):
            ids[device] = tokenizer(images.to(device)).cpu()
        assert torch.equal(ids[device], logits[device].argmax(1).flatten(1))
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=0.02, atol=0.02 * logits["cpu"].std().item())
    assert (ids["cuda"] == ids["cpu"]).float().mean() > 0.98


def small_encoder(width=4, vocabulary_size=50):
    encoder = DalleEncoder(width, vocabulary_size)
    fill(encoder)
    return encoder


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A function that saves an encoder as it was published: a module of classes that are not installed here."""

    def save(encoder, name="encoder.pkl", **kwargs):
        path = tmp_path / name
        with monkeypatch.context() as patch:
            package = types.ModuleType("dall_e.encoder")
            patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            patch.setitem(sys.modules, "dall_e.encoder", package)
            for kind in {type(part) for part in encoder.modules() if type(part).__module__ == "cae_tokenizer"}:
                patch.setattr(kind, "__module__", "dall_e.encoder")
                setattr(package, kind.__name__, kind)
            torch.save(encoder, path, **kwargs)
        return path

    return save


def test_the_published_file_and_files_of_its_tensors_give_the_same_ids(published, tmp_path):
    encoder = small_encoder()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    images = torch.rand(2, 3, 24, 24, generator=seeded(0))
    expected = DalleTokenizer(encoder, image_size=24, device=CPU)
    assert len(expected(images).unique()) > 3
    for path in (published(encoder), tmp_path / "encoder.pth", tmp_path / "encoder.safetensors"):
        tokenizer = load_tokenizer(path, image_size=24, device="cpu")
        assert torch.equal(tokenizer(images), expected(images)), path
        assert tokenizer.description == expected.description
        assert tokenizer.description.startswith("DALL-E's encoder, 50 tokens, weights ")
        assert (tokenizer.vocabulary_size, tokenizer.grid_size) == (50, 3)


def test_an_address_is_downloaded_to_the_folder_of_torch_hub_or_placed_there_by_hand(published, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "cdn.openai.com" / "dall-e" / "encoder.pkl"
    place.parent.mkdir(parents=True)
    published(small_encoder()).rename(place)
    assert load_tokenizer(cae_tokenizer.DALLE_ENCODER, image_size=24, device="cpu").vocabulary_size == 50


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["attribute", "parameter", "all"])
def test_a_payload_in_the_file_is_refused_by_name_and_never_runs(published, tmp_path, where):
    encoder, trace = small_encoder(), tmp_path / "it-ran"
    if where == "all":
        path = tmp_path / "encoder.pkl"
        torch.save(Payload(trace), path)
    else:
        place = encoder.__dict__ if where == "attribute" else encoder.blocks.input.__dict__["_parameters"]
        place["extra"] = Payload(trace)
        path = published(encoder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, image_size=24, device="cpu", key="cae.tokenizer")
    assert not trace.exists(), "the payload ran"
    message = (
        f"cae.tokenizer: '{path}' is refused: it holds more than weights, and reading it would execute posix.mkdir"
    )
    assert str(caught.value) == f"{message}. Use a file from another source, best as .safetensors"


def test_a_module_in_the_format_before_torch_1_6_says_how_to_convert_it(published):
    with pytest.warns(UserWarning, match="Couldn't retrieve source code"):
        path = published(small_encoder(), _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"encoder.pkl' is a module in torch's format before 1.6.* convert it once"):
        load_tokenizer(path, image_size=24, device="cpu")


def test_classes_of_other_packages_than_the_published_ones_are_no_part_of_a_module(published):
    path = published(small_encoder())
    with pytest.raises(UserError, match=r"would execute dall_e\.encoder\."):
        read_state_dict(path, module_packages=("torch.nn.modules",))


def test_a_file_that_is_no_tokenizer_names_key_fault_and_remedy(published, tmp_path):
    def error_of(path, image_size=24):
        with pytest.raises(UserError) as caught:
            load_tokenizer(path, image_size=image_size, device="cpu", key="cae.tokenizer")
        return str(caught.value)

    whole = published(small_encoder())
    message = error_of(whole, image_size=100)
    assert "has patches of 8 pixels, into which images of 100 do not divide" in message and "such as 96" in message
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(whole.read_bytes()[:-2000])
    assert "cae.tokenizer: " in error_of(cut) and "cut.pkl' cannot be read" in error_of(cut)
    state = small_encoder().state_dict()
    torch.save({key: x for key, x in state.items() if "group_3" not in key}, tmp_path / "some.pth")
    message = error_of(tmp_path / "some.pth")
    assert "18 missing: blocks.group_3.block_1.id_path.b" in message
    assert f"Give the encoder that was published with DALL-E ({cae_tokenizer.DALLE_ENCODER})" in message
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    assert "74 missing" in error_of(tmp_path / "other.pth") and "1 unexpected: a" in error_of(tmp_path / "other.pth")
    save_file({"centres": torch.ones(2, 2)}, tmp_path / "centres.safetensors")
    assert "was not written by cae_tokenizer.py" in error_of(tmp_path / "centres.safetensors")
    assert "there is no such file" in error_of(tmp_path / "none.pth")
    for value in (torch.tensor(3.0), torch.zeros(0), 3, "text"):
        torch.save(state | {"blocks.input.b": value}, tmp_path / "odd.pth")
        message = error_of(tmp_path / "odd.pth")
        assert f"'cae.tokenizer={tmp_path}/odd.pth' do not fit the model" in message, message
        assert cae_tokenizer.DALLE_ENCODER in message, message


# ----------------------------------------------------------------------------------------------------- k-means

TILES = np.array(list(itertools.product((0, 255), (0, 255), (40, 200))), dtype=np.uint8)
"""Eight colours, far from each other."""


def tiled(rng, num=4, size=8):
    """A picture of tiles of these colours with a little noise, and the number of each tile's colour, row by row."""
    chosen = rng.integers(0, len(TILES), (num, num))
    noise = rng.integers(-20, 21, (num * size, num * size, 3))
    pixels = TILES[chosen].repeat(size, 0).repeat(size, 1).astype(int) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), chosen.flatten()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for i in range(24):
        tiled(rng)[0].save(root / f"{i}.png")
    return root


def arguments(images, output, *overrides):
    model = ["model_path=baselines/pixels_loader.py", "model_loader_kwargs.patch_size=8"]
    keys = ["vocabulary_size=8", "image_size=32", "device=cpu", "num_workers=0"]
    model = [] if any(text.startswith("model_path=") for text in overrides) else model
    return [*model, f"dataset={images}", f"output={output}", *keys, *overrides]


def make(images, output, *overrides):
    assert cae_tokenizer.main(arguments(images, output, *overrides)) == 0
    return load_tokenizer(output, image_size=32, device="cpu")


def test_kmeans_finds_the_partition_of_patches_that_can_be_separated(images, tmp_path):
    tokenizer = make(images, tmp_path / "tokenizer.safetensors")
    rng = np.random.default_rng(1)
    pictures, colours = zip(*[tiled(rng) for _ in range(10)], strict=True)
    batch = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in pictures]).float() / 255
    ids = tokenizer(batch)
    assert ids.shape == (10, 16) and ids.dtype == torch.int64
    assert (tokenizer.vocabulary_size, tokenizer.grid_size) == (8, 4)
    pairs = set(zip(ids.flatten().tolist(), np.concatenate(colours).tolist(), strict=True))
    assert len(pairs) == 8, f"clusters are not colours: {sorted(pairs)}"
    assert len({cluster for cluster, _ in pairs}) == len({colour for _, colour in pairs}) == 8
    one_by_one = torch.cat([tokenizer(batch[i : i + 1]) for i in range(10)])
    assert torch.equal(ids, one_by_one), "ids depend on the batch size"
    assert tokenizer.description.startswith("k-means, 8 clusters of patch features of pixels_loader (weights ")


def make_on_ranks(arguments):
    assert cae_tokenizer.main(arguments) == 0


@pytest.mark.long
def test_a_tokenizer_follows_from_the_seed_not_from_batches_or_ranks(images, tmp_path):
    options = ["num_images=20", "patches_per_image=5", "vocabulary_size=12"]
    descriptions = {
        name: make(images, tmp_path / f"{name}.safetensors", *options, *more).description
        for name, more in {"one": [], "other": ["seed=1"], "batches": ["batch_size=3"]}.items()
    }
    output = tmp_path / "ranks.safetensors"
    run_on_ranks(make_on_ranks, 2, arguments(images, output, *options))
    descriptions["ranks"] = load_tokenizer(output, image_size=32, device="cpu").description
    assert descriptions["one"] == descriptions["batches"] == descriptions["ranks"] != descriptions["other"]
    assert load_file(output)["centres"].shape == (12, 192)


def test_the_command_makes_a_tokenizer_once_and_finds_it_again(images, tmp_path):
    command = ["cae_tokenizer.py", *arguments(images, tmp_path / "new" / "tokenizer.safetensors")]
    done = run_forked(*command)
    assert done.returncode == 0, done.stderr
    assert "384 patches: 8 of 8 clusters have some" in done.stderr
    tokenizer = load_tokenizer(tmp_path / "new" / "tokenizer.safetensors", image_size=32, device="cpu")
    assert tokenizer.description in done.stderr, "the log does not say what it is"
    written = (tmp_path / "new" / "tokenizer.safetensors").stat().st_mtime_ns
    assert cae_tokenizer.main([*command[1:], "batch_size=2"]) == 0
    assert (tmp_path / "new" / "tokenizer.safetensors").stat().st_mtime_ns == written, "it was made anew"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "is another tokenizer (config.seed was 0, is 1); choose another name, or delete it"),
        (["model_loader_kwargs.patch_size=4"], "is another tokenizer (loader_sha256 was "),
        (["output=tokenizer.pth"], "output='tokenizer.pth': must end in .safetensors"),
        (["output={new}", "vocabulary_size=1"], "vocabulary_size=1: must be"),
        (["output={new}", "vocabulary_size=400"], "vocabulary_size=400: there are 384 patches for so many clusters"),
        (["output={new}", "image_size=36"], "model_path='baselines/pixels_loader.py' has patches of 8 pixels"),
        (["output={images}/0.png/new.safetensors"], "output="),
        (["dataset=/no/such/folder"], "dataset=/no/such/folder"),
        (["clusters=5"], "unknown key clusters"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(images, tmp_path, capsys, overrides, message):
    make(images, tmp_path / "tokenizer.safetensors", "vocabulary_size=8")
    given = [text.format(new=tmp_path / "new.safetensors", images=images) for text in overrides]
    capsys.readouterr()
    assert cae_tokenizer.main([*arguments(images, tmp_path / "tokenizer.safetensors"), *given]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and message in told
    assert not (tmp_path / "new.safetensors").exists()


MODEL = """
import torch
class Model(torch.nn.Module):
    patch_size = 8
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 5, 8, 8)
    def forward(self, images):
        x = self.patches(images).movedim(1, -1)
        return x.mean((1, 2)), None, x
def __model_loader__(pretrained_weights=None):
    model = Model()
    if pretrained_weights is not None:
        model.load_state_dict(torch.load(pretrained_weights, weights_only=True))
    return model
"""


def test_a_tokenizer_finds_its_model_from_any_folder_and_refuses_another(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODEL)
    weights = {"patches.weight": torch.randn(5, 3, 8, 8, generator=seeded(0)), "patches.bias": torch.zeros(5)}
    torch.save(weights, "weights.pth")
    model = ["model_path=mine.py", "model_loader_kwargs={pretrained_weights: weights.pth}"]
    description = make(images, "tokenizer.safetensors", *model).description
    assert f"clusters of patch features of {tmp_path.name}/weights (weights " in description
    monkeypatch.chdir("/")
    path = tmp_path / "tokenizer.safetensors"
    assert load_tokenizer(path, image_size=32, device="cpu").description == description
    with pytest.raises(UserError, match=r"cae.tokenizer=.* is for images of 32 pixels, not 112"):
        load_tokenizer(path, image_size=112, device="cpu", key="cae.tokenizer")
    torch.save(weights | {"patches.bias": torch.ones(5)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"was made with other weights of .*mine\.py"):
        load_tokenizer(path, image_size=32, device="cpu")
    (tmp_path / "mine.py").unlink()
    with pytest.raises(UserError, match=r"tokenizer=.* needs the model that it was made of, as it was: .*mine\.py"):
        load_tokenizer(path, image_size=32, device="cpu")


def test_a_tokenizer_may_have_an_address(images, tmp_path):
    output = tmp_path / "tokenizer.safetensors"
    description = make(images, output).description
    assert load_tokenizer(output.as_uri(), image_size=32, device="cpu").description == description


@pytest.mark.parametrize("notes", [{}, [1], {"config": 1, "weights_sha256": "0"}, {"weights_sha256": "0"}])
def test_notes_of_another_kind_are_no_tokenizer(tmp_path, notes):
    save_file({"centres": torch.ones(2, 2)}, tmp_path / "odd.safetensors", {"tokenizer": json.dumps(notes)})
    with pytest.raises(UserError, match=r"cae.tokenizer=.*odd.safetensors' was not written by cae_tokenizer.py, or is"):
        load_tokenizer(tmp_path / "odd.safetensors", image_size=32, device="cpu", key="cae.tokenizer")


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:3], lambda x: x[0], lambda x: x * torch.nan, lambda x: x.long()],
    ids=["fewer", "one", "not finite", "whole numbers"],
)
def test_centres_that_cannot_be_those_of_the_notes_are_refused(images, tmp_path, change):
    from safetensors import safe_open

    path = tmp_path / "tokenizer.safetensors"
    make(images, path)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    save_file({"centres": change(load_file(path)["centres"]).contiguous()}, path, notes)
    with pytest.raises(UserError, match=r"tokenizer=.*tokenizer.safetensors' is damaged: .* make it again"):
        load_tokenizer(path, image_size=32, device="cpu")


def test_a_file_says_what_it_is_made_of_as_json(images, tmp_path):
    from safetensors import safe_open

    make(images, tmp_path / "tokenizer.safetensors", "image_mean=[0.5,0.5,0.5]")
    with safe_open(tmp_path / "tokenizer.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["tokenizer"])
    assert notes.keys() == {"config", "weights_sha256", "loader_sha256", "data"}
    assert notes["config"]["image_mean"] == [0.5, 0.5, 0.5]
    assert notes["config"]["model_path"] == "baselines/pixels_loader.py"
