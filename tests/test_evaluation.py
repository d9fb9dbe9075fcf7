"""evaluation.py: the contract of models, shares of ranks, what is kept of an earlier run, and mistakes of a user."""

import functools
import json
import os
import runpy
import shutil
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
import yaml
from commands import FAKE_EVALUATION, make_images
from conftest import ROOT, seeded
from ranks import exit_codes, run_on_ranks
from samples import encode, photo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import model
import weights
from data import dead_workers_explained
from evaluation import (
    EvaluationConfig,
    FrozenModel,
    ImageBatches,
    Results,
    describe,
    extract,
    find_loader,
    hash_loader,
    hash_weights,
    load_model_file,
    my_share,
    open_dataset,
)
from reading.sources import ImageDataset, Sample
from report import Score
from utils import UserError

CPU = torch.device("cpu")


class Model(nn.Module):
    """Means of patches, or whatever a test wants it to return."""

    patch_size = 4

    def __init__(self, out=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.out = out

    def forward(self, images):
        b, _, h, w = images.shape
        patches = nn.functional.avg_pool2d(images, 4).movedim(1, -1)
        good = (patches.mean((1, 2)), None, patches)
        return self.out(b, h // 4, w // 4, good) if self.out else good


def frozen(out=None, **keys):
    return FrozenModel(Model(out), EvaluationConfig(output_dir="x", **keys), CPU, "mine.py")


IMAGES = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (lambda b, h, w, good: good[2], "Tensor, not (global, registers, feature map)"),
        (lambda b, h, w, good: good[:2], "tuple, not (global, registers, feature map)"),
        (lambda b, h, w, good: (None, *good[1:]), "the global representation is NoneType"),
        (lambda b, h, w, good: (good[0][0], *good[1:]), "the global representation has shape [3], expected [2, any]"),
        (lambda b, h, w, good: (*good[:2], good[2].flatten(1, 2)), "expected [2, 2, 3, any]"),
        (lambda b, h, w, good: (*good[:2], good[2].transpose(1, 2)), "has shape [2, 3, 2, 3], expected [2, 2, 3, any]"),
        (lambda b, h, w, good: (good[0], good[0], good[2]), "the registers has shape [2, 3], expected [2, any, any]"),
        (lambda b, h, w, good: (good[0] / 0, *good[1:]), "the global representation has values that are not finite"),
        (lambda b, h, w, good: (*good[:2], good[2] / 0), "the feature map has values that are not finite"),
    ],
)
def test_a_model_that_breaks_the_contract_is_told_how(out, words):
    with pytest.raises(UserError, match=r"model_path=mine\.py: ") as caught:
        frozen(out)(IMAGES)
    assert words in str(caught.value)


def test_a_model_that_keeps_it_gets_normalised_images():
    images = torch.randint(256, (2, 3, 8, 12), generator=seeded(0), dtype=torch.uint8)
    features = frozen(image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 1.0, 2.0])(images)
    pixels = (images.double() / 255 - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(
        3, 1, 1
    )
    expected = pixels.view(2, 3, 2, 4, 3, 4).mean((3, 5)).movedim(1, -1)
    torch.testing.assert_close(features.feature_map.double(), expected, rtol=0, atol=1e-6)
    assert features.registers is None


def test_the_look_for_values_that_are_not_finite_can_be_left_out_and_no_other():
    nan = frozen(lambda b, h, w, good: (good[0] / 0, torch.full((b, 2, 3), torch.nan), good[2] / 0))
    assert not nan(IMAGES, check_finite=False).feature_map.isfinite().any()
    with pytest.raises(UserError, match="the global representation has values that are not finite"):
        nan(IMAGES)
    with pytest.raises(UserError, match="not \\(global, registers, feature map\\)"):
        frozen(lambda b, h, w, good: good[2])(IMAGES, check_finite=False)


class CountWaits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_checks_wait_for_the_device_once_and_not_for_every_output():
    model = frozen(lambda b, h, w, good: (good[0], torch.zeros(b, 2, 3), good[2]))
    with CountWaits() as waits:
        model(IMAGES)
    assert waits.num == 0, "single values are read one by one"


def test_an_empty_tensor_of_registers_is_none():
    assert frozen(lambda b, h, w, good: (good[0], torch.zeros(b, 0, 3), good[2]))(IMAGES).registers is None


@pytest.mark.parametrize("made", ["None", "{'state': 1}", "int", "object()"])
def test_a_loader_that_gives_no_module_is_told_so(tmp_path, made):
    (tmp_path / "mine.py").write_text(f"def __model_loader__(): return {made}")
    with pytest.raises(UserError, match=r"mine\.py: the loader returned .*, not a torch\.nn\.Module"):
        load_model_file(str(tmp_path / "mine.py"), {})


@pytest.mark.parametrize("patch_size", [None, 0, -4, 4.0, True, "4"])
def test_a_patch_size_that_is_no_size_is_named(patch_size):
    model = Model()
    model.patch_size = patch_size
    with pytest.raises(UserError, match=r"its attribute patch_size is .* and must be a whole number"):
        FrozenModel(model, EvaluationConfig(output_dir="x"), CPU, "mine.py")


def test_what_a_model_says_of_its_training_is_in_the_results():
    model = Model()
    assert not any(key.startswith("training_") for key in describe(frozen(), EvaluationConfig(output_dir="x")))
    model.training_notes = {"images": "a million", "patch_size": "of no matter"}
    said = describe(FrozenModel(model, EvaluationConfig(), CPU, "mine.py"), EvaluationConfig())
    assert (said["training_images"], said["patch_size"]) == ("a million", 4)


@pytest.mark.parametrize("notes", [None, "a million", ["a million"], {"images": 1_000_000}, {1: "a million"}])
def test_what_a_model_says_of_its_training_is_texts_by_their_names(notes):
    model = Model()
    model.training_notes = notes
    with pytest.raises(
        UserError, match=r"mine\.py: its attribute training_notes is .* must be a dict of texts by their"
    ):
        FrozenModel(model, EvaluationConfig(), CPU, "mine.py")


def test_the_patch_size_must_divide_the_images_and_exist():
    with pytest.raises(UserError, match="images of 8x10 pixels do not divide into patches of 4"):
        frozen()(torch.zeros(1, 3, 8, 10, dtype=torch.uint8))
    model = Model()
    model.patch_size = (4, 4)
    with pytest.raises(UserError, match="patch_size is \\(4, 4\\)"):
        FrozenModel(model, EvaluationConfig(output_dir="x"), CPU, "mine.py")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", "does not define __model_loader__"),
        ("import not_installed_anywhere", "cannot be imported: No module named"),
        ("def load(:", "cannot be imported: invalid syntax"),
        ("__model_loader__ = 3", "does not define __model_loader__"),
    ],
)
def test_a_file_without_a_loader_is_told_so(tmp_path, content, words):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=words):
        load_model_file(str(tmp_path / "mine.py"), {})


def test_a_model_file_may_import_what_is_beside_it_whatever_it_is_called(tmp_path):
    """Then and later, as modules and packages, with names that this repository has too, and two folders do not mix."""
    before, path = {name.partition(".")[0] for name in sys.modules}, list(sys.path)
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "nets" / "deep").mkdir(parents=True)
        (folder / "omegaconf").mkdir()  # of images, not the package
        (folder / "utils.py").write_text(f"name = '{name}'\n")
        (folder / "model.py").write_text("import utils\nfrom utils import name\nassert utils.name == name\n")
        (folder / "nets" / "__init__.py").write_text("from . import first\nfrom nets.deep import second\n")
        (folder / "nets" / "first.py").write_text("from utils import name\nimport nets.deep.second\n")
        (folder / "nets" / "deep" / "second.py").write_text("from ..first import name\nimport utils as mine\n")
        (folder / "late.py").write_text("from utils import *\n")
        (folder / "timm.v2.py").write_text(
            "import json, omegaconf, model, nets.deep, torch.nn as nn\n"
            "from weights import read_state_dict\n"
            "def __model_loader__():\n"
            "    import late\n"
            "    from nets.deep.second import mine\n"
            "    module = nn.Identity()\n"
            "    module.names = [model.name, nets.first.name, nets.second.name, late.name, mine.name]\n"
            "    module.read, module.omegaconf = read_state_dict, omegaconf\n"
            "    return module\n"
        )
        (folder / "yaml.py").write_text("import yaml\n__model_loader__ = yaml.safe_load\n")
    for name in ("one", "two", "one"):
        loaded: Any = load_model_file(str(tmp_path / name / "timm.v2.py"), {})
        assert loaded.names == [name] * 5
        assert loaded.read is weights.read_state_dict, "a name that is not beside it is not this repository's"
        assert loaded.omegaconf is omegaconf
        assert find_loader(str(tmp_path / name / "yaml.py")) is yaml.safe_load, "a file cannot be called like a package"
    assert sys.path == path
    assert "utils" in before
    assert sys.modules["utils"].__file__ == str(ROOT / "utils.py")
    new = {name.partition(".")[0] for name in sys.modules} - before
    assert not new & {"late", "nets", "model", "timm"}
    (tmp_path / "one" / "broken.py").write_text("import nets.missing\n")
    with pytest.raises(UserError, match=r"broken.py cannot be imported: No module named 'nets.missing'"):
        load_model_file(str(tmp_path / "one" / "broken.py"), {})


def test_the_model_file_of_this_repository_is_its_module():
    assert find_loader("model.py") is model.load_model


def test_weights_have_a_hash_of_their_own():
    one, same, other = Model(), Model(), Model()
    with torch.no_grad():
        other.scale[1] += 1e-6
    assert hash_weights(one) == hash_weights(same) != hash_weights(other)
    assert hash_weights(one) != hash_weights(Model().bfloat16())


# ------------------------------------------------------------------------------------------------ the images


def prepare(image, target):
    return (torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).movedim(-1, 0), torch.tensor(image.width))


def extract_on_rank(folder, num):
    batches = ImageBatches(open_dataset(str(folder), "d"), prepare, batch_size=2, indices=range(num))
    shares = [my_share(num, place) for place in range(8)]
    patches, widths = extract(frozen(), batches, lambda f, widths: (f.feature_map.flatten(0, 2), widths.clone()))
    return patches, widths, len(batches.share), shares


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_ranks_extract_comes_together_in_the_order_of_the_images(tmp_path, num_ranks):
    folder = make_images(tmp_path / "images", num=7)
    alone = extract_on_rank(folder, 7)
    assert alone[0].shape == (28, 3)
    found = run_on_ranks(extract_on_rank, num_ranks, folder, 7)
    assert sum(each[2] for each in found) == 7
    for patches, widths, *_ in found:
        assert torch.equal(patches, alone[0]) and torch.equal(widths, alone[1])


def test_a_rank_without_an_image_gets_those_of_the_others(tmp_path):
    folder = make_images(tmp_path / "images", num=2)
    alone = extract_on_rank(folder, 2)
    found = run_on_ranks(extract_on_rank, 3, folder, 2)
    assert min(each[2] for each in found) == 0
    assert all(torch.equal(each[0], alone[0]) for each in found)


# ----------------------------------------------------------------------------------------------------- results


ABOUT = {"weights_sha256": "a" * 64}


def results(folder, about=ABOUT, **keys):
    return Results("fake", EvaluationConfig(output_dir=str(folder), **keys), about)


def test_what_was_added_is_there_again(tmp_path):
    results(tmp_path).add("one", {"top1": 0.5})
    again = results(tmp_path, batch_size=7)
    assert "one" in again and "two" not in again and again.values == {"one": {"top1": 0.5}}


def test_declared_scores_are_in_the_file_and_stay_there(tmp_path):
    first = results(tmp_path)
    first.add("one", {"map": {"AP": 0.5}})
    assert "scores" not in json.loads(first.path.read_text()), "an evaluation that declares none says nothing"
    first.declare_scores(Score(("map", "AP"), unit="", terms={"AP": "Average precision."}))
    first.add("two", {"map": {"AP": 0.25}})
    results(tmp_path).note(more=1)
    declared = {"path": ["map", "AP"], "label": "map AP", "unit": "", "higher_is_better": True}
    assert json.loads(first.path.read_text())["scores"] == [declared | {"terms": {"AP": "Average precision."}}]


@pytest.mark.parametrize(
    ("about", "keys", "words"),
    [
        ({"weights_sha256": "b" * 64}, {}, "results of another model"),
        (ABOUT, {"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
    ],
)
def test_results_of_something_else_are_not_mixed(tmp_path, about, keys, words):
    results(tmp_path).add("one", 1)
    before = (tmp_path / "results_fake.json").read_text()
    with pytest.raises(UserError, match="choose another output_dir") as caught:
        results(tmp_path, about, **keys)
    assert words in str(caught.value)
    assert (tmp_path / "results_fake.json").read_text() == before


MODEL_FILE = """
    import torch
    def __model_loader__(pretrained_weights=None, config_path=None, scale=1, device=None):
        return torch.nn.Linear(1, 1)
"""


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ("nothing", True),
        ("moved", True),
        ("device", True),
        ("file", False),
        ("argument", False),
        ("config", False),
    ],
)
def test_a_model_is_known_by_its_file_arguments_and_configuration_beside_its_weights(tmp_path, change, is_same):
    model = tmp_path / "mine.py"
    model.write_text(textwrap.dedent(MODEL_FILE))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.pth").write_bytes(b"big")
        (tmp_path / folder / "w.yaml").write_text("depth: 3")
    kwargs = {"pretrained_weights": str(tmp_path / "a" / "w.pth"), "scale": 2}
    before = hash_loader(str(model), kwargs)
    if change == "moved":
        kwargs = {"pretrained_weights": str(tmp_path / "b" / "w.pth"), "scale": 2}
        kwargs["config_path"] = str(tmp_path / "a" / "w.yaml")
    elif change == "device":
        kwargs["device"] = "cpu"
    elif change == "file":
        model.write_text(model.read_text() + "# changed\n")
    elif change == "argument":
        kwargs["scale"] = 3
    elif change == "config":
        (tmp_path / "a" / "w.yaml").write_text("depth: 4")
    assert (hash_loader(str(model), kwargs) == before) == is_same


def test_results_of_another_loader_are_not_mixed(tmp_path):
    results(tmp_path, ABOUT | {"loader_sha256": "b" * 64}).add("one", 1)
    with pytest.raises(UserError, match=r"the weights are the same, but model\.py, its model_loader_kwargs"):
        results(tmp_path, ABOUT | {"loader_sha256": "c" * 64})
    results(tmp_path / "old").add("one", 1)  # of a version that did not store it
    assert "one" in results(tmp_path / "old", ABOUT | {"loader_sha256": "c" * 64})


OTHER_WEIGHTS = '{"results": {}, "config": {}, "about": {"weights_sha256": 7}}'


@pytest.mark.parametrize("content", ["{", "[]", '{"results": {}}', OTHER_WEIGHTS])
def test_a_file_that_is_no_result_is_left_alone_and_named(tmp_path, content):
    (tmp_path / "results_fake.json").write_text(content)
    with pytest.raises(UserError, match=r"results_fake\.json cannot be read"):
        results(tmp_path)
    assert (tmp_path / "results_fake.json").read_text() == content


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    found = results(tmp_path)
    (tmp_path / "artifacts").write_text("")
    with pytest.raises(UserError, match="artifacts cannot be made: File exists"):
        found.artifacts()
    (tmp_path / "results_fake.json").mkdir()
    with pytest.raises(UserError, match=r"results_fake\.json cannot be written: Is a directory"):
        found.add("one", 1)


def error_on_rank(folder):
    with pytest.raises(UserError) as caught:
        results(folder)
    return str(caught.value)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_output_directory_that_cannot_be_made_is_named_on_all_ranks(tmp_path, num_ranks):
    (tmp_path / "file").write_text("")
    messages = run_on_ranks(error_on_rank, num_ranks, tmp_path / "file" / "out")
    assert len(set(messages)) == 1
    assert f"output_dir={tmp_path}/file/out cannot be made: Not a directory" in messages[0]


@pytest.mark.parametrize("change", [{}, {"batch_size": 3}, {"pictures": ["norms"]}])
def test_the_folder_that_is_chosen_is_the_same_for_the_same_evaluation(tmp_path, monkeypatch, capsys, change):
    """As typed; keys that change no result, or may change between runs into one folder, do not choose another."""
    import eval_visualizations

    monkeypatch.chdir(tmp_path)
    asked = []
    evaluation = replace(
        eval_visualizations.EVALUATION, evaluate=lambda cfg, model, results: asked.append(results.path)
    )
    pixels = [f"model_path={ROOT}/baselines/pixels_loader.py", "model_loader_kwargs={patch_size: 8}", "device=cpu"]
    for more in ([], [f"{key}={json.dumps(value)}" for key, value in change.items()], ["resolution=448"]):
        assert evaluation.main([*pixels, *more]) == 0
    assert asked[0] == asked[1] != asked[2]
    assert asked[0].parent.parent == Path("runs")
    assert f"output_dir={asked[0].parent}" in capsys.readouterr().err


def run_script_on_a_rank(arguments):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def test_an_evaluation_runs_on_the_ranks_of_torchrun(tmp_path):
    (tmp_path / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    tiny = f'model_loader_kwargs={{"config_path": "{ROOT / "configs" / "demo.yaml"}"}}'
    command = [str(tmp_path / "eval_fake.py"), tiny, f"output_dir={tmp_path / 'out'}", "device=cpu"]
    assert exit_codes(run_script_on_a_rank, 2, command) == [0, 0]
    found = json.loads((tmp_path / "out" / "results_fake.json").read_text())
    assert found["about"]["num_ranks"] == 2 and "top1" in found["results"]["sum"]


class EightImages(ImageDataset):
    """The worker that reads the last one is killed if it is told to."""

    def __init__(self, killed):
        self.killed = killed

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Sample(str(index), functools.partial(self._read, index))

    def _read(self, index):
        if self.killed and index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(photo(index))


def as_tensor(image, _):
    return (torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0),)


def test_a_killed_worker_of_an_evaluation_is_explained_with_its_key():
    with pytest.raises(UserError, match="num_workers: a process that reads images was killed, most likely because"), \
         dead_workers_explained("num_workers"):  # fmt: skip
        for _ in ImageBatches(EightImages(killed=True), as_tensor, batch_size=2, num_workers=2):
            pass


def test_a_worker_whose_death_shows_while_they_are_stopped_is_of_no_matter(monkeypatch):
    shut_down, deaths = _MultiProcessingDataLoaderIter._shutdown_workers, iter(["DataLoader worker (pid 1) is killed"])

    def noticing(iterator):
        shut_down(iterator)
        for death in deaths:
            raise RuntimeError(death)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", noticing)
    batches = iter(ImageBatches(EightImages(killed=False), as_tensor, batch_size=2, num_workers=2))
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(deaths, None) is None


def test_an_evaluation_uses_no_more_workers_than_its_batches_fit_into_the_shared_memory(monkeypatch):
    batch = 2 * 3 * 60 * 80
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for free, workers in ((100, 2), (5, 1), (3, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free * batch))
        batches = ImageBatches(EightImages(killed=False), as_tensor, batch_size=2, num_workers=None)
        assert batches.num_workers == workers
    assert sum(len(images) for (images,) in batches) == 8
    with pytest.raises(UserError, match=r"num_workers=2: /dev/shm has .* Use num_workers=0, or a smaller batch_size"):
        ImageBatches(EightImages(killed=False), as_tensor, batch_size=2, num_workers=2)
