"""What somebody types who knows the published system: its commands are accepted word for word, with small data."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from commands import FAKE_EVALUATION, TINY, make_images, run_main
from conftest import ROOT

import benchmark
import eval_classification
import eval_segmentation
import eval_visualizations
import extract_features
import train_distributed
from config import DEFAULT_PRETRAIN_CONFIG, load_config, to_yaml
from model import EncoderDecoder
from train_capi import CapiConfig

NAMES = [
    f"{key}=custom://Segmentation?root='{ROOT}/demo_data/emoji_on_scenes/{split}'"
    for key, split in (("train_dataset_name", "train"), ("test_dataset_name", "val"))
]
SMALL = [
    "device=cpu",
    "num_workers=0",
    "resolution=64",
    "ignore_labels=[255]",
    "classifiers=[knn]",
    "knn_ks=[1]",
    "max_train_images=12",
    "num_pictures=0",
]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of a small model in a folder, and default_pretrain_config.yaml of that model in the current one."""
    monkeypatch.chdir(tmp_path)
    small = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, TINY)
    (tmp_path / "default_pretrain_config.yaml").write_text(to_yaml(small))
    (tmp_path / "path").mkdir()
    torch.save(EncoderDecoder(**small.model.kwargs()).state_dict(), tmp_path / "path" / "weights.pth")
    return tmp_path / "path" / "weights.pth"


def test_train_capi_takes_a_config_and_overrides(tmp_path):
    images = make_images(tmp_path / "images")
    config = tmp_path / "my_config.yaml"
    run = tmp_path / "run"
    config.write_text(yaml.safe_dump({"train": {"output_dir": str(run)}, "data": {"dataset": str(images)}}))
    assert run_main([str(config), *TINY, "optim.total_iters=1"]) == 0
    assert (run / "student_ema.pth").is_file()


@pytest.mark.parametrize("config", ["default_pretrain_config.yaml", str(DEFAULT_PRETRAIN_CONFIG)])
def test_train_distributed_takes_the_default_config(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT if config == "default_pretrain_config.yaml" else tmp_path)
    assert train_distributed.main([config, f"train.output_dir={tmp_path}/run", "--dry-run"]) == 0
    assert "#SBATCH --nodes=4" in capsys.readouterr().out


def test_benchmark_takes_a_config_and_weights(weights, tmp_path, capsys):
    (tmp_path / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    (tmp_path / "evals.yaml").write_text("fake: {file: eval_fake.py}\n")
    command = ["model_loader_kwargs.config_path=default_pretrain_config.yaml", f"pretrained_weights={weights}"]
    small = ["evals_config_path=evals.yaml", "random_baseline=false", "device=cpu"]
    chosen = []
    for _ in range(2):
        assert benchmark.main([*command, *small]) == 0
        shown = capsys.readouterr()
        chosen.append(Path(shown.out.splitlines()[-2]).parent)
        assert f"output_dir={chosen[0]}" in shown.err
    assert chosen[0] == chosen[1] and chosen[0].parent == weights.parent
    assert "fake: is done" in shown.err, "the same command did it again"


def test_eval_segmentation_takes_a_baseline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["model_path=baselines/data2vec2_loader.py", "model_loader_kwargs.model_name=data2vec2_vitb16"]
    assert eval_segmentation.main([*command, "model_loader_kwargs.pretrained=false", *NAMES, *SMALL]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("data2vec2_loader_data2vec2_vitb16_segmentation_")
    assert "knn" in json.loads((folder / "results_segmentation.json").read_text())["results"]


@pytest.mark.parametrize(
    "given",
    [
        ["model_loader_kwargs={pretrained_weights: WEIGHTS, config_path: default_pretrain_config.yaml}"],
        ['model_loader_kwargs={"pretrained_weights": "WEIGHTS", "config_path": "default_pretrain_config.yaml"}'],
        ["model_loader_kwargs={'pretrained_weights': 'WEIGHTS', 'config_path': 'default_pretrain_config.yaml'}"],
        [
            "model_loader_kwargs.pretrained_weights=WEIGHTS",
            "model_loader_kwargs.config_path=default_pretrain_config.yaml",
        ],
    ],
)
def test_eval_segmentation_takes_a_model_its_arguments_and_data(weights, given):
    given = [each.replace("WEIGHTS", str(weights)) for each in given]
    assert eval_segmentation.main(["model_path=model.py", *given, *NAMES, *SMALL]) == 0
    (folder,) = weights.parent.glob("weights_segmentation_*")
    written = json.loads((folder / "results_segmentation.json").read_text())["config"]
    assert written["model_loader_kwargs"]["pretrained_weights"] == str(weights)
    assert f"train_dataset_name={written['train_dataset_name']}" == NAMES[0]


EVERY_SCRIPT = [eval_segmentation, eval_classification, eval_visualizations, extract_features]
KEY = "a key of this script"
TOLD = {
    "autocast_dtype=bfloat16": ["dtype"] * 4,
    "classifiers_kwargs={}": ["knn_ks"] * 4,
    "eval_period=1": [None, "save_checkpoint_period", None, None],
    "use_compile=true": ["leave it out"] * 4,
    "do_pca=true": ["pictures=[...]"] * 4,
    "do_dict_learning=true": ["dictionary_atoms"] * 4,
    "pretrained_weights=x": ["model_loader_kwargs.pretrained_weights"] * 4,
    "train_dataset=x": ["train_dataset_name", "train_dataset_name", None, None],
    "val_dataset=x": ["val_dataset_name", "val_dataset_name", None, None],
    "test_dataset=x": ["test_dataset_name", "test_dataset_names", None, None],
    "test_datasets=x": ["test_dataset_name", "test_dataset_names", None, None],
    "test_datasets.a=x": ["test_dataset_name", "test_dataset_names", None, None],
    "test_dataset_names=x": ["test_dataset_name", KEY, None, None],
    "total_iters=5": [None, "n_iters", None, None],
    "checkpoint_period=5": [None, "save_checkpoint_period", None, None],
    "dataset=x": ["train_dataset_name", "train_dataset_name", "dataset_name", KEY],
    "dataset_name=x": [None, None, KEY, "dataset"],
}


@pytest.mark.parametrize("argument", TOLD)
def test_whoever_types_another_name_of_a_key_is_told_todays(argument, capsys):
    typed = argument.split("=")[0].split(".")[0]
    for script, told in zip(EVERY_SCRIPT, TOLD[argument], strict=True):
        if told == KEY:
            continue
        assert script.main(["output_dir=x", argument]) == 2
        _, unknown, remedy = capsys.readouterr().err.partition(f"unknown key {typed}")
        assert unknown, f"{script.__name__} has a key {typed}"
        assert told is None or f" {told}" in remedy, remedy


def test_a_key_that_must_be_given_is_named(capsys):
    assert extract_features.main([]) == 2
    assert capsys.readouterr().err == "error: dataset= must be given; --help shows a whole command\n"
