"""export.py, and its reverse, `train.init_from`; and `--export` of a training."""

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from commands import make_images, run_forked, run_main, tiny
from conftest import files_limited_to
from finetunes import CASES, write_classes
from golden_ijepa import tiny_run
from methods import METHODS, images_for_all
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

import cae
import export
import ijepa
import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from launch import claim_output_dir
from model import EncoderDecoder, load_model
from train_capi import CapiConfig
from utils import UserError
from weights import read_state_dict


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """A finished run of two steps, after which student and average differ."""
    output_dir = tmp_path_factory.mktemp("runs") / "mine"
    assert run_main(tiny(images, output_dir, "optim.total_iters=2", "model.encoder_kwargs.depth=1")) == 0
    return output_dir


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def assert_equal_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


# ------------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("source", ["", "checkpoints/step_000000002"])
@pytest.mark.parametrize("model", ["student", "student_ema"])
def test_a_checkpoint_becomes_what_its_run_exported(run, tmp_path, source, model):
    out = tmp_path / "deep" / "out.pth"
    assert export.main([str(run / source), str(out), "--model", model]) == 0
    assert_equal_weights(load(out), load(run / f"{model}.pth"))
    assert yaml.safe_load(out.with_suffix(".yaml").read_text()) == yaml.safe_load((run / "config.yaml").read_text())


def test_pth_to_safetensors_and_back_is_the_same(run, tmp_path):
    first, second = tmp_path / "w.safetensors", tmp_path / "w.pth"
    assert export.main([str(run / "student_ema.pth"), str(first)]) == 0
    assert export.main([str(first), str(second)]) == 0
    assert_equal_weights(load(second), load(run / "student_ema.pth"))
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(load_model(pretrained_weights=first)(image).feature_map, loaded_run(run)(image).feature_map)


def loaded_run(run: Path) -> EncoderDecoder:
    return load_model(pretrained_weights=run / "student_ema.pth")


@pytest.mark.parametrize(
    ("choice", "key"), [("capi.student_head=mlp", "head.mlp.2.bias"), ("capi.targets=latents", "head.bias")]
)
def test_the_head_is_the_one_that_was_trained(images, tmp_path, choice, key):
    run = tmp_path / "run"
    assert run_main(tiny(images, run, "optim.total_iters=1", choice)) == 0
    assert export.main([str(run), str(tmp_path / "w.safetensors")]) == 0
    weights = load(run / "student_ema.pth")
    assert key in weights
    assert_equal_weights(read_state_dict(tmp_path / "w.safetensors"), weights)


def test_weights_without_a_head_or_prefix_are_exported_as_released_ones(run, tmp_path):
    backbone = loaded_run(run).state_dict()
    torch.save(backbone, tmp_path / "bare.pth")
    config = str(run / "config.yaml")
    assert export.main([str(tmp_path / "bare.pth"), str(tmp_path / "out.pth"), "--config", config]) == 0
    assert_equal_weights(load(tmp_path / "out.pth"), {f"backbone.{key}": value for key, value in backbone.items()})


def test_weights_that_are_not_finite_are_not_exported(run, tmp_path, capsys):
    weights = load(run / "student_ema.pth")
    weights["backbone.registers"][0, 1, :3] = torch.nan
    torch.save(weights, tmp_path / "nan.pth")
    config = str(run / "config.yaml")
    for name in ("w.pth", "w.safetensors"):
        assert export.main([str(tmp_path / "nan.pth"), str(tmp_path / name), "--config", config]) == 2
        assert "not all finite: registers (3 of" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_names_that_are_not_utf_8_are_exported_to(run, tmp_path):
    name = os.fsdecode(b"w\xff.pth")
    done = run_forked("export.py", run / "student_ema.pth", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(read_state_dict(tmp_path / name), load(run / "student_ema.pth"))


def assert_onnx_is(model, sizes, *arguments):
    """`export.py` with these arguments, the last of which is the file, writes a model that computes what `model` does
    for images of all these numbers and sizes."""
    pytest.importorskip("onnxscript")
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    done = run_forked("export.py", *arguments, timeout=280)  # shape checks and export do not go together
    assert done.returncode == 0, done.stderr
    path = arguments[-1]
    assert done.stdout == f"{path}\n"
    assert [other.name for other in path.parent.iterdir()] == ["w.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == ["images"]
    said = json.loads(session.get_modelmeta().custom_metadata_map["normalisation"])
    assert said == {"value_range": None, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert [o.name for o in session.get_outputs()] == ["global_repr", "registers", "feature_map"]
    for b, height, width in sizes:
        images = torch.randn(b, 3, height, width)
        with torch.no_grad():
            expected = model(images)
        actual = session.run(None, {"images": images.numpy()})
        for name, a, e in zip(expected._fields, actual, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), e, atol=2e-5, rtol=0, msg=f"{name} of {b}x{height}x{width}")


@pytest.mark.timeout(300)
def test_onnx_equals_torch_for_any_number_and_size_of_images(run, tmp_path):
    assert_onnx_is(loaded_run(run), [(1, 16, 16), (3, 8, 24), (2, 20, 4), (5, 4, 4)], run, tmp_path / "w.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_the_extra_onnx_says_what_to_install(run, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, "onnx", sys.modules.get("onnx", sys))  # whether or not they are installed
    monkeypatch.setitem(sys.modules, "onnxscript", sys.modules.get("onnxscript", sys))
    monkeypatch.setitem(sys.modules, package, None)
    assert export.main([str(run), str(tmp_path / "w.pth"), str(tmp_path / "w.onnx")]) == 2
    assert "pip install -c constraints.txt -e '.[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "w.pth").exists(), "it was found out after the work"


@pytest.mark.parametrize(
    ("source", "file", "message"),
    [
        ("", "w.bin", "must end in one of .pth, .safetensors, .onnx"),
        ("nothing.pth", "w.pth", "there is no such file"),
        ("checkpoints", "w.pth", "neither a checkpoint nor the folder of a run"),
        ("other.pth", "w.pth", "do not fit the model"),
        ("tuned.pth", "w.pth", "is of a fine-tuned model, which is not exported: finetuning.load_model loads it"),
    ],
)
def test_mistakes_are_explained(run, tmp_path, capsys, source, file, message):
    tuned = shutil.copyfile(run / "student_ema.pth", run / "tuned.pth")
    tuned.with_suffix(".yaml").write_text("backbone: {model_path: model.py}\nclassification: {}\n")
    torch.save({"backbone.mask_token": torch.zeros(1, 2)}, run / "other.pth")
    assert export.main([str(run / source), str(tmp_path / file)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / file).exists()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    (run / "checkpoints" / "step_000000002").rename(run / "checkpoints" / "step_000000002.aside")
    damaged = run / "checkpoints" / "step_000000002"
    try:
        damaged.mkdir()
        for file in (run / "checkpoints" / "step_000000002.aside").iterdir():
            (damaged / file.name).write_bytes(file.read_bytes()[: -1 if file.name.endswith(".distcp") else None])
        assert export.main([str(run), str(tmp_path / "w.pth")]) == 2
        assert "is unreadable" in capsys.readouterr().err
    finally:
        for file in damaged.iterdir():
            file.unlink()
        damaged.rmdir()
        (run / "checkpoints" / "step_000000002.aside").rename(damaged)


# ------------------------------------------------------------------------------------------ --export of a training


class Training(NamedTuple):
    """A finished one, of two steps."""

    name: str
    main: Callable[[list[str]], int]
    arguments: Callable[..., list[str]]
    """Of an output folder and overrides."""
    run: Path
    export: str

    def copy(self, folder: Path) -> Path:
        """Its run without log and exports."""
        exports = shutil.ignore_patterns("log.txt", "*.pth", "student*.yaml", "model.yaml")
        return Path(shutil.copytree(self.run, folder / "copy", ignore=exports))


@pytest.fixture(scope="module", params=["capi", "ijepa", "cae", "fine-tuning"])
def training(request, run, tmp_path_factory) -> Training:
    """Of each method, and a fine-tuning, counted in epochs and with images that are measured, where that can be."""
    place, name = tmp_path_factory.mktemp("training"), request.param
    if name == "fine-tuning":
        case, data = CASES["classification"], write_classes(place / "data")

        def arguments(output_dir: Path, *more: str) -> list[str]:
            weights = f"pretrained_weights={run / 'student_ema.pth'}"
            return case.arguments(data, weights, output_dir, "optim.epochs=0.5", *more)

        export, main = "model", case.script.main
    else:
        method, images = METHODS[name], images_for_all(place / "images")
        own = ["optim.epochs=1", "data.images_per_epoch=10"] if name != "capi" else ["optim.total_iters=2"]

        def arguments(output_dir: Path, *more: str) -> list[str]:
            return method.tiny_run(images, output_dir, *own, "data.mean=auto", "data.std=auto", *more)

        export, main = method.export, method.script.main
    assert main(arguments(place / "run")) == 0
    return Training(name, main, arguments, place / "run", export)


def test_a_run_is_exported_with_the_configuration_that_it_has(training, tmp_path):
    """Also where another batch, as with another number of processes, would make an epoch of another length."""
    run = training.copy(tmp_path)
    assert training.main(training.arguments(run, "optim.batch_size_per_gpu=2", "--export")) == 0
    assert_equal_weights(load(run / f"{training.export}.pth"), load(training.run / f"{training.export}.pth"))
    written, expected = (
        yaml.safe_load((folder / f"{training.export}.yaml").read_text()) for folder in (run, training.run)
    )
    expected["train"]["output_dir"], expected["optim"]["batch_size_per_gpu"] = str(run), 2
    assert written == expected
    said = (run / "log.txt").read_text()
    assert set(re.findall(r"changed since the checkpoint: (\S+):", said)) == {
        "optim.batch_size_per_gpu",
        "train.output_dir",
    }


def test_while_a_run_trains_the_script_is_named_that_exports_it(training, tmp_path, monkeypatch, capsys):
    """As one types it; a fine-tuning has none."""
    run = training.copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    with claim_output_dir(run):
        assert training.main([*training.arguments(run), "--export"]) == 2
        said = capsys.readouterr().err
        assert "is in use by another run" in said
        command = re.search("python (.*)", said)
        if training.name == "fine-tuning":
            assert command is None and "stop that run" in said
        else:
            assert command is not None and "stop that run" not in said, said
            script, *arguments = shlex.split(command[1])
            assert script == "export.py" and export.main(arguments) == 0
            assert_equal_weights(load(tmp_path / arguments[-1]), load(training.run / f"{training.export}.pth"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a head of the classes that it does not say
@pytest.mark.parametrize("damage", ["a part", "no mapping", "no YAML", "nothing"])
def test_a_checkpoint_whose_configuration_is_damaged_is_named(training, tmp_path, capsys, damage):
    run = training.copy(tmp_path)
    checkpoint = run / "checkpoints" / "step_000000002"
    whole = (checkpoint / "config.yaml").read_text()
    content = {"a part": whole[: whole.index("optim:") + 6], "no mapping": "[1]", "no YAML": "a: [", "nothing": ""}
    (checkpoint / "config.yaml").write_text(content[damage])
    assert training.main([*training.arguments(run), "--export"]) == 2
    assert f"The newest checkpoint '{checkpoint}' is unreadable: config.yaml" in capsys.readouterr().err


SPEED = [
    "efficiency.param_dtype=bfloat16",
    "efficiency.attention=xformers",
    "efficiency.rematerialization.enabled=true",
    "efficiency.compilation.do_student.disable=false",
]
OWN_SPEED = {
    "capi": ["capi.clustering_kernel=triton", "efficiency.teacher_fp8=true"],
    "ijepa": ["efficiency.teacher_fp8=true"],
}


@pytest.mark.parametrize("option", ["--export", "--dry-run"])
def test_what_makes_a_run_fast_where_it_trains_is_not_asked_for_on_the_cpu(training, tmp_path, monkeypatch, option):
    """Many kernels are for GPUs alone; an export, and a look at what weights fit, builds the networks on the CPU."""
    for module in ("attention", "clustering", "compiling", "fp8", "recomputing"):
        monkeypatch.setitem(sys.modules, f"speed.{module}", None)
    run, more = training.copy(tmp_path), [*SPEED, *OWN_SPEED.get(training.name, [])]
    if option == "--dry-run":
        shutil.rmtree(run / "checkpoints")
        if training.name != "fine-tuning":
            more.append(f"train.init_from={training.run / training.export}.pth")
    assert training.main([*training.arguments(run, *more), option]) == 0
    if option == "--export":
        assert_equal_weights(load(run / f"{training.export}.pth"), load(training.run / f"{training.export}.pth"))
        written = yaml.safe_load((run / f"{training.export}.yaml").read_text())
        assert written["efficiency"]["attention"] == "xformers", "that is no configuration of the run"


# -------------------------------------------------------------------------------------------- train.init_from


def make_state(images: Path, *overrides: str, init_from: Path) -> train_capi.CapiState:
    arguments = tiny(images, images, *overrides, "train.seed=7", "model.encoder_kwargs.depth=1")
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, arguments)
    return train_capi.CapiState(cfg, torch.device("cpu"), init_from=str(init_from))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def test_student_and_average_start_from_the_weights_and_the_heads_random(images, run, caplog):
    caplog.set_level(logging.INFO)
    state = make_state(images, init_from=run / "student_ema.pth")
    weights = load(run / "student_ema.pth")
    for module in (state.student, state.student_ema):
        for key, value in module.state_dict().items():
            is_head = key.startswith("head.") and not key.endswith("weight_g")  # which is 1 in any case
            assert torch.equal(value, weights[key]) != is_head or key.endswith("weight_g"), key
    assert "student_ema.pth; the student's head and the clustering head start random" in caplog.text


def test_a_missing_predictor_stays_random(images, run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    weights = load(run / "student_ema.pth")
    encoder = {k: v for k, v in weights.items() if not k.startswith(("backbone.decoder.", "backbone.mask_token"))}
    torch.save(encoder, tmp_path / "encoder.pth")
    student = make_state(images, init_from=tmp_path / "encoder.pth").student.state_dict()
    assert all(torch.equal(student[key], value) for key, value in encoder.items() if key.startswith("backbone."))
    assert all(value.isfinite().all() for value in student.values())
    assert not torch.equal(student["backbone.mask_token"], weights["backbone.mask_token"])
    assert "the predictor, which the file lacks, the student's head and the clustering head start random" in caplog.text


def test_weights_move_between_students_that_predict_in_other_ways(images, run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    published, tower = load(run / "student_ema.pth"), ("backbone.decoder.", "backbone.dec_norm.", "head.")
    fused = make_state(images, "model.predictor=fused", init_from=run / "student_ema.pth").student
    assert "its predictor is left out; the student's head" in caplog.text
    kept = {key: value for key, value in published.items() if not key.startswith(tower)}
    assert_equal_weights({key: x for key, x in fused.state_dict().items() if not key.startswith("head.")}, kept)
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    again = make_state(images, "model.predictor=fused", init_from=tmp_path / "fused.pth").student.state_dict()
    assert "fused.pth; the student's head" in caplog.text
    split = make_state(images, "model.predictor=split", init_from=tmp_path / "fused.pth").student.state_dict()
    assert "fused.pth; the predictor, which the file lacks, the student's head" in caplog.text
    for student in (again, split):
        assert_equal_weights({key: student[key] for key in kept}, kept)
    assert all(value.isfinite().all() for value in split.values())
    assert split.keys() == published.keys()


def test_a_missing_predictor_takes_its_final_norm_along(images, run, tmp_path):
    weights = {k: v for k, v in load(run / "student_ema.pth").items() if k.startswith("backbone.")}
    encoder = {k: v for k, v in weights.items() if not k.startswith(("backbone.decoder.", "backbone.mask_token"))}
    width = encoder["backbone.registers"].shape[-1]
    torch.save(encoder | {"backbone.encoder.norm.weight": torch.randn(width)}, tmp_path / "encoder.pth")  # earlier name
    state = make_state(
        images, "model.final_norm_kwargs.elementwise_affine=true", init_from=tmp_path / "encoder.pth"
    ).student.state_dict()
    assert torch.equal(
        state["backbone.enc_norm.weight"], load(tmp_path / "encoder.pth")["backbone.encoder.norm.weight"]
    )
    assert torch.equal(state["backbone.dec_norm.weight"], torch.ones(width))


@pytest.mark.parametrize("missing", ["backbone.decoder.blocks.0.residual2.fn.fc1.weight", "backbone.registers"])
def test_weights_with_a_hole_are_refused(images, run, tmp_path, missing):
    weights = load(run / "student_ema.pth")
    del weights[missing]
    torch.save(weights, tmp_path / "hole.pth")
    with pytest.raises(UserError, match=f"1 missing: {missing.removeprefix('backbone.')}"):
        make_state(images, init_from=tmp_path / "hole.pth")


def state_on_this_rank(images: Path, mode: str, init_from: Path) -> dict[str, Tensor]:
    state = make_state(images, f"efficiency.fsdp={mode}", init_from=init_from)
    return {
        f"{name}.{key}": whole(value)
        for name in ("student", "student_ema")
        for key, value in state.modules[name]["backbone"].state_dict().items()  # pyright: ignore[reportIndexIssue]  # a ModuleDict
    }


@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
def test_every_rank_starts_from_the_weights(images, run, mode):
    weights = load(run / "student_ema.pth")
    backbone = {key.removeprefix("backbone."): v for key, v in weights.items() if key.startswith("backbone.")}
    expected = {f"{name}.{key}": v for name in ("student", "student_ema") for key, v in backbone.items()}
    for actual in run_on_ranks(state_on_this_rank, 2, images, mode, run / "student_ema.pth"):
        assert_equal_weights(actual, expected)


def test_a_run_that_has_a_checkpoint_does_not_start_anew(images, run, tmp_path, caplog):
    source = tmp_path / "w.pth"
    source.write_bytes((run / "student_ema.pth").read_bytes())
    arguments = tiny(images, tmp_path / "run", f"train.init_from={source}", "model.encoder_kwargs.depth=1")
    assert run_main([*arguments, "optim.total_iters=1"]) == 0
    assert "start from" in (tmp_path / "run" / "log.txt").read_text()
    source.unlink()
    assert run_main([*arguments, "optim.total_iters=2"]) == 0, "the weights were asked for again"


def test_a_missing_file_is_a_mistake_with_a_name(images, tmp_path, capsys):
    assert run_main(tiny(images, tmp_path / "run", "train.init_from=nothing.pth")) == 2
    assert "train.init_from='nothing.pth': there is no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- other methods


@pytest.fixture(scope="module")
def ijepa_run(images, tmp_path_factory) -> Path:
    import train_ijepa

    output_dir = tmp_path_factory.mktemp("runs") / "ijepa"
    assert train_ijepa.main(tiny_run(images, output_dir, "optim.total_iters=2")) == 0
    return output_dir


@pytest.fixture(scope="module")
def cae_run(images, tmp_path_factory) -> Path:
    import golden_cae

    import train_cae

    output_dir = tmp_path_factory.mktemp("runs") / "cae"
    golden_cae.save_tokenizer(images)
    assert train_cae.main(golden_cae.tiny_run(images, output_dir, "optim.total_iters=2")) == 0
    return output_dir


@pytest.mark.parametrize(
    ("run_of", "loader", "model"),
    [("ijepa_run", ijepa, "student"), ("ijepa_run", ijepa, "student_ema"), ("cae_run", cae, "student")],
)
def test_a_checkpoint_of_another_method_goes_through_both_formats(run_of, loader, model, tmp_path, request):
    run = request.getfixturevalue(run_of)
    first, second = tmp_path / "w.safetensors", tmp_path / "w.pth"
    assert export.main([str(run), str(first), "--model", model]) == 0
    assert export.main([str(first), str(second)]) == 0
    assert_equal_weights(load(second), load(run / f"{model}.pth"))
    assert loader.load_model(pretrained_weights=first)(torch.zeros(1, 3, 32, 32)).feature_map.isfinite().all()


def test_without_an_average_the_student_is_exported(cae_run, tmp_path, capsys):
    assert export.main([str(cae_run), str(tmp_path / "w.pth")]) == 0
    assert_equal_weights(load(tmp_path / "w.pth"), load(cae_run / "student.pth"))
    assert export.main([str(cae_run), str(tmp_path / "w.pth"), "--model", "student_ema"]) == 2
    assert "--model='student_ema': must be one of student" in capsys.readouterr().err


def test_a_run_of_cae_is_written_in_the_layout_of_its_authors_and_back(cae_run, tmp_path):
    published, config = tmp_path / "run.pth.tar", ["--config", str(cae_run / "config.yaml")]
    assert export.main([str(cae_run), str(published)]) == 0
    file = load(published)
    parts = [key.partition(".")[0] for key in file["model"]]
    order = ["rd_pos_embed", "mask_token", "encoder", "alignment_encoder", "regresser", "decoder"]
    assert file.keys() == {"model"} and list(dict.fromkeys(parts)) == order
    torch.save(file | {"optimizer": {}, "epoch": 1, "args": argparse.Namespace(lr=1.0)}, published)
    assert export.main([str(published), str(tmp_path / "w.pth"), *config]) == 0
    assert_equal_weights(load(tmp_path / "w.pth"), load(cae_run / "student.pth"))
    model = cae.load_model(pretrained_weights=published, num_heads=2)
    assert_equal_weights(model.state_dict(), cae.load_model(pretrained_weights=cae_run / "student.pth").state_dict())


@pytest.fixture(scope="module")
def published(ijepa_run, tmp_path_factory) -> Path:
    """The run in the layout in which the authors publish."""
    path = tmp_path_factory.mktemp("published") / "run.pth.tar"
    assert export.main([str(ijepa_run), str(path)]) == 0
    return path


def test_a_run_is_written_in_the_layout_of_the_authors(ijepa_run, published):
    file = load(published)
    parts = {"encoder": ("student", "backbone"), "predictor": ("student", "predictor")}
    parts["target_encoder"] = ("student_ema", "backbone")
    assert file.keys() == parts.keys() == set(ijepa.PUBLISHED_PARTS)
    for part, (name, prefix) in parts.items():
        weights = load(ijepa_run / f"{name}.pth")
        own = {key.removeprefix(f"{prefix}."): x for key, x in weights.items() if key.startswith(f"{prefix}.")}
        assert_equal_weights(file[part], {f"module.{key}": value for key, value in own.items()})
    for encoder, name in (("target_encoder", "student_ema"), ("encoder", "student")):
        model = ijepa.load_model(pretrained_weights=published, encoder=encoder, num_heads=2)
        exported = ijepa.load_model(pretrained_weights=ijepa_run / f"{name}.pth")
        assert_equal_weights(model.state_dict(), exported.state_dict())


def test_all_files_are_of_one_checkpoint_of_a_run_that_trains(ijepa_run, tmp_path, monkeypatch):
    run, read, seen = Path(shutil.copytree(ijepa_run, tmp_path / "run")), export.read_weights, []

    def read_while_it_trains(folder: Path, name: str) -> dict[str, Tensor]:
        weights = read(folder, name)
        seen.append(folder.name)
        shutil.copytree(folder, run / "checkpoints" / f"step_{len(seen) + 2:09d}")
        return weights

    monkeypatch.setattr(export, "read_weights", read_while_it_trains)
    assert export.main([str(run), str(tmp_path / "w.pth"), str(tmp_path / "w.pth.tar")]) == 0
    assert seen == 3 * ["step_000000002"]


@pytest.mark.parametrize("model", ["student", "student_ema"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_of_the_authors_becomes_what_a_run_exports(ijepa_run, published, tmp_path, model, name):
    config = str(ijepa_run / "config.yaml")
    assert export.main([str(published), str(tmp_path / name), "--model", model, "--config", config]) == 0
    assert_equal_weights(read_state_dict(tmp_path / name), load(ijepa_run / f"{model}.pth"))


def test_a_training_starts_from_a_run_in_the_layout_of_the_authors(images, ijepa_run, published):
    import train_ijepa

    cfg = load_config(train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG, tiny_run(images, ijepa_run))
    state = train_ijepa.IjepaState(cfg, torch.device("cpu"), init_from=str(published))
    for name in ("student", "student_ema"):
        assert_equal_weights(state.modules[name].state_dict(), load(ijepa_run / f"{name}.pth"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{published}", "w.pth"), "holds several networks, and no configuration lies beside it"),
        (("{published}", "w.pth", "--config", "{capi}/config.yaml"), "The weights in"),
        (("{ijepa}/student.pth", "w.pth.tar"), "is to hold student and average: give a run or a checkpoint, not"),
        (("{capi}", "w.pth.tar"), "what the authors of this method publish is what .pth holds"),
        (("{ijepa}", "w.tar"), "the name must end in one of .pth, .safetensors, .onnx, .pth.tar"),
        (("{capi}/student_ema.pth", "w.pth", "--model", "student"), "student_ema.pth' there is one network"),
        (
            ("{capi}", "w.pth", "--config", "{ijepa}/config.yaml"),
            "--config='{ijepa}/config.yaml': '{capi}/checkpoints",
        ),
    ],
)
def test_mistakes_with_files_of_the_authors_are_explained(
    run, ijepa_run, published, tmp_path, monkeypatch, capsys, arguments, says
):
    monkeypatch.chdir(tmp_path)
    places = {"published": published, "ijepa": ijepa_run, "capi": run}
    assert export.main([argument.format(**places) for argument in arguments]) == 2
    assert says.format(**places) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pth.tar"])
def test_a_full_disk_is_explained_and_leaves_an_earlier_export_with_its_configuration(
    ijepa_run, tmp_path, capsys, name
):
    out = tmp_path / name
    assert export.main([str(ijepa_run), str(out)]) == 0
    for config in tmp_path.glob("*.yaml"):
        config.write_text(f"{config.read_text()}# an earlier one\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_limited_to(20_000):  # room for a configuration
        assert export.main([str(ijepa_run), str(out)]) == 2
    assert re.search(f"{name}'.*: .*File too large", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_onnx_of_cae_equals_torch_for_any_number_and_size_of_images(cae_run, tmp_path):
    model = cae.load_model(pretrained_weights=cae_run / "student.pth")
    assert_onnx_is(model, [(1, 32, 32), (3, 16, 40), (2, 24, 64)], cae_run, tmp_path / "w.onnx")


@pytest.mark.timeout(300)
def test_onnx_of_a_file_of_the_authors_equals_torch_for_any_number_and_size_of_images(ijepa_run, published, tmp_path):
    model = ijepa.load_model(pretrained_weights=ijepa_run / "student_ema.pth")
    config = ["--config", ijepa_run / "config.yaml"]
    assert_onnx_is(model, [(1, 32, 32), (3, 16, 40), (2, 20, 64)], *config, published, tmp_path / "w.onnx")
