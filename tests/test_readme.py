"""README.md: its commands run, its keys and files exist, its numbers are today's."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import golden_cae
import golden_ijepa
import numpy as np
import pytest
import torch
import torchvision
from commands import TINY, make_images, run_forked, run_main
from conftest import ROOT, run_cli
from PIL import Image

import finetune_classification
import finetune_detection
import finetune_segmentation
import finetuning
import train_cae
import train_capi
import train_ijepa
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from model import EncoderDecoder
from reading.sources import SEGMENTATION_SETS, parse_data_url
from train_capi import CapiConfig
from utils import import_from_path

README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)))
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS.values() for line in block.splitlines() if line.strip()]
KEYS = [command for command in COMMANDS if "--help-all" in command or "--schema" in command]
TRAINING = [command for command in COMMANDS if command.startswith("python train_capi.py") and command not in KEYS]
TRAINING_CAE = [command for command in COMMANDS if command.startswith("python train_cae.py")]
TRAINING_IJEPA = [command for command in COMMANDS if command.startswith("python train_ijepa.py")]
SLURM = [command for command in COMMANDS if command.startswith("python train_distributed.py")]
EXPORT, EXTRACT, BENCHMARK, TOKENIZER, REPORT = (
    next(command for command in COMMANDS if command.startswith(f"python {script}"))
    for script in ("export.py", "extract_features.py", "benchmark.py", "cae_tokenizer.py", "report.py")
)
PICTURES = next(command for command in COMMANDS if command.startswith("python eval_visualizations.py"))
EVALUATIONS = [command for command in COMMANDS if command.startswith("python eval_") and command != PICTURES]
FINETUNING = [command for command in COMMANDS if command.startswith(("python finetune_", "python demo_data/"))]
TORCHRUN = [command for command in COMMANDS if command.startswith("torchrun ")]


def test_the_commands_are_all_of_a_kind_that_is_tested():
    make_targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        program, *rest = shlex.split(command)
        if program == "make":
            assert rest[0] in make_targets, command
        else:
            install = "pip install -c constraints.txt -e '.[test]'"
            assert command in [
                *KEYS,
                *TRAINING,
                *TRAINING_IJEPA,
                *TRAINING_CAE,
                *FINETUNING,
                *TORCHRUN,
                *SLURM,
                *EVALUATIONS,
                EXPORT,
                EXTRACT,
                PICTURES,
                BENCHMARK,
                TOKENIZER,
                REPORT,
                install,
            ], command


def test_keys_are_found_as_written(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(KEYS) >= 3
    for command in KEYS:
        arguments, _, _file = command.partition(" > ")
        with pytest.raises(SystemExit) as ended:
            train_capi.main(shlex.split(arguments)[2:])
        assert ended.value.code == 0 and "EMA momentum m" in capsys.readouterr().out


def test_training_commands_run_one_after_the_other(tmp_path, monkeypatch):
    """In the order of the README, in one place, with images of ours and a model small enough to wait for."""
    images = make_images(tmp_path / "images")
    assert len(TRAINING) >= 3
    for command in TRAINING:
        arguments = [
            word.replace("/my/images", str(images)).replace("runs/", f"{tmp_path}/runs/")
            for word in shlex.split(command)[2:]
        ]
        config, rest = arguments[0], arguments[1:]
        assert (ROOT / config).is_file(), command
        monkeypatch.chdir(ROOT)
        assert run_main([config, *TINY, *rest]) == 0, command
    assert (tmp_path / "runs" / "mine" / "student_ema.pth").is_file()


@pytest.mark.parametrize(
    ("script", "commands", "tiny_of", "exported"),
    [
        (train_ijepa, TRAINING_IJEPA, golden_ijepa.tiny_run, "ijepa/student_ema.pth"),
        (train_cae, TRAINING_CAE, golden_cae.tiny_run, "cae/student.pth"),
    ],
    ids=["ijepa", "cae"],
)
def test_training_commands_of_other_methods_run(script, commands, tiny_of, exported, tmp_path, monkeypatch):
    images = make_images(tmp_path / "images", size=40)
    golden_cae.save_tokenizer(images)
    small = ("tokenizer.path=", "tokenizer.image_size=")
    assert commands
    monkeypatch.chdir(ROOT)
    for command in commands:
        words = (
            w.replace("/my/images", str(images)).replace("runs/", f"{tmp_path}/runs/") for w in shlex.split(command)
        )
        config, *rest = [word for word in words if not word.startswith(small)][2:]
        assert script.main([config, *tiny_of(images, tmp_path, "optim.total_iters=1"), *rest]) == 0, command
    assert (tmp_path / "runs" / exported).is_file()


@pytest.mark.long
def test_torchrun_commands_run_with_two_processes(tmp_path):
    images = make_images(tmp_path / "images")
    assert TORCHRUN
    for command in TORCHRUN:
        script, config, *rest = shlex.split(command)[3:]
        assert (script, Path(config).suffix) == ("train_capi.py", ".yaml"), command
        rest = [w.replace("/my/images", str(images)).replace("runs/", f"{tmp_path}/runs/") for w in rest]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = run_forked(*launcher, script, config, *TINY, *rest)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "mine" / "student_ema.pth").is_file()


def test_slurm_commands_show_a_job_script():
    assert SLURM
    for command in SLURM:
        done = run_forked(*shlex.split(command)[1:])
        assert done.returncode == 0, done.stderr
        assert "#SBATCH --partition=gpu" in done.stdout


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder that has what the examples read: runs/mine and images."""
    root = tmp_path_factory.mktemp("mine")
    images = make_images(root / "images")
    arguments = [*TINY, f"data.dataset={images}", f"train.output_dir={root}/runs/mine", "model.patch_size=14",
                 "data.images_size=56", "optim.total_iters=1"]  # fmt: skip
    assert run_main(arguments) == 0
    return root


FINETUNERS = [finetune_classification, finetune_segmentation, finetune_detection]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.long
def test_the_python_examples_run_as_written(mine):
    own, released, here, _ = EXAMPLES
    own = own.replace("/path/to/this/folder", str(ROOT)) + "\nassert feature_map.shape == (1, 16, 16, 32)\n"
    line = 'torch.hub.load("/path/to/this/folder", "capi_vitl14_lvd", source="local")'
    assert line in released
    offline = line.replace("/path/to/this/folder", str(ROOT)).replace(")", ", pretrained=False)")
    released = released.replace(line, offline) + "\nassert out.feature_map.shape == (1, 16, 16, 1024)\n"
    for name, example, path in (("own", own, ""), ("released", released, ""), ("here", here, str(ROOT))):
        (mine / f"{name}.py").write_text(example)
        done = run_forked(mine / f"{name}.py", cwd=mine, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_fine_tuning_commands_and_their_example_run_after_the_demo(tmp_path, monkeypatch):
    """In the order of the README, with fewer images and steps than it takes to learn something."""
    for name in ("configs", "demo_data"):
        (tmp_path / name).symlink_to(ROOT / name)
    drawn = run_forked(
        ROOT / "demo_data" / "flower_beds.py", "data/flower_beds", "--train", "20", "--val", "10", cwd=tmp_path
    )
    assert drawn.returncode == 0, drawn.stderr
    monkeypatch.chdir(tmp_path)
    assert run_main(["configs/demo.yaml", "optim.total_iters=1", "optim.batch_size_per_gpu=4"]) == 0
    assert len(FINETUNING) == 4
    for command in FINETUNING:
        _, script, *rest = shlex.split(command)
        short = ["optim.total_iters=2", "optim.batch_size_per_gpu=4"] if script.startswith("finetune_") else []
        done = run_forked(ROOT / script, *rest, *short, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for task in ("classification", "segmentation", "detection"):
        (step,) = (tmp_path / "runs" / f"flower_beds_{task}" / "evals" / "test").iterdir()
        assert (step / "results" / "report.html").is_file()
        assert (step / "results" / "beds" / "artifacts" / "predictions.png").is_file()
    example = "import torch\nimages = torch.zeros(2, 3, 96, 96)\n" + EXAMPLES[-1] + "\nassert logits.shape == (2, 10)\n"
    (tmp_path / "example.py").write_text(example)
    done = run_forked(tmp_path / "example.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_export_extraction_tokenizer_pictures_and_benchmark_run_as_written(mine):
    def run(command, *more, by=run_forked):
        words = [w.replace("/my/images", str(mine / "images")) for w in shlex.split(command)[1:]]
        words[0] = str(ROOT / words[0])
        return by(*words, *more, cwd=mine)

    done = run(EXPORT, by=run_cli)
    assert done.returncode == 0, done.stderr
    assert all((mine / f"backbone.{kind}").is_file() for kind in ("pth", "safetensors", "onnx"))
    done = run(REPORT)
    assert (done.returncode, done.stdout) == (0, "runs/mine/report.html\n"), done.stderr
    done = run(EXTRACT, "device=cpu", "num_workers=0", by=run_cli)
    assert done.returncode == 0, done.stderr
    assert list((mine / "features" / "shards").glob("*.safetensors"))
    done = run(TOKENIZER, "device=cpu", "num_workers=0", "vocabulary_size=20")
    assert done.returncode == 0, done.stderr
    assert (mine / "tokenizer.safetensors").is_file()
    done = run(PICTURES, "device=cpu", "num_workers=0")
    assert done.returncode == 0, done.stderr
    assert (mine / "results" / "predictions" / "artifacts" / "predictions.png").is_file()
    only_pictures = [
        "evals.in1k_classification=null",
        "evals.ade20k_segmentation=null",
        "evals.ade20k_pictures_448=null",
        f"evals.ade20k_pictures_224.dataset_name={mine / 'images'}",
        "evals.ade20k_pictures_224.pictures=[image_pca]",
        "evals.ade20k_pictures_224.resolution=56",
    ]
    done = run(BENCHMARK, *only_pictures, "random_baseline=false", "num_workers=0")
    assert done.returncode == 0, done.stderr + done.stdout
    assert (mine / "results" / "mine" / "report.html").is_file()


ANY_MODEL = """
import torch

class Model(torch.nn.Module):
    patch_size = 4

    def forward(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 4).movedim(1, -1)
        return patches.mean((1, 2)), None, patches

    def get_intermediate_layers(self, images, n, reshape, norm):
        return (self(images)[2].movedim(-1, 1),) * n

def __model_loader__(model_name, encoder=None, pretrained_weights=None):
    return Model()
"""


def test_evaluation_commands_run_as_written_with_another_model_and_data_of_ours(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(ANY_MODEL)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, shape, low, high in (("images", (16, 16, 3), 0, 256), ("masks", (16, 16), 1, 3)):
            (tmp_path / split / folder).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(low, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / folder / f"{i}.png")
        for name in ("cat", "dog"):
            make_images(tmp_path / "classes" / split / name, 8)
    few = {
        "eval_segmentation.py": [
            f"train_dataset_name=custom://Segmentation?root='{tmp_path}/train'",
            f"test_dataset_name=custom://Segmentation?root='{tmp_path}/val'",
            "resolution=16", "knn_ks=[1]",
        ],
        "eval_classification.py": [
            f"train_dataset_name=torchvision://ImageFolder?root='{tmp_path}/classes/train'",
            f"test_dataset_names=torchvision://ImageFolder?root='{tmp_path}/classes/val'",
            "resolution=16", "n_iters=2", "warmup_iters=1", "batch_size_per_gpu=4", "val_proportion=0.3",
            "learning_rates=[1e-3]", "probe_epochs=2", "probe_warmup_epochs=1",
        ],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert {shlex.split(command)[1] for command in EVALUATIONS} == few.keys()
    (tmp_path / "1percent.txt").write_text("cat/01.jpg\ndog/03.jpg\n")
    for command in EVALUATIONS:
        script, *rest = shlex.split(command)[1:]
        model_path, model_name = (word.split("=")[1] for word in rest[:2])
        assert model_name in import_from_path(ROOT / model_path).MODELS
        small = ["model_path=model.py", *few[script], "device=cpu", "num_workers=0"]
        replacements = {
            "resize": "16",
            "val_dataset_name": f"torchvision://ImageFolder?root='{tmp_path}/classes/val'",
            "dtype": "float32",
        }
        given = {word.split("=")[0] for word in rest}
        small += [f"{key}={value}" for key, value in replacements.items() if key in given]
        module = importlib.import_module(Path(script).stem)
        assert module.main([*rest, *small]) == 0, command


def test_the_released_models_have_their_published_numbers():
    published = {"p205": (35.2, 79.2), "lvd": (32.1, 83.8), "in22k": (29.7, 83.6), "in1k": (29.2, 82.9)}
    rows = re.findall(r"^\| `capi_vitl14_(\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert {name: (float(knn), float(attentive)) for name, knn, attentive in rows} == published
    with torch.device("meta"):
        model = EncoderDecoder(**load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).model.kwargs())
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("decoder."))
    assert int(parameters / 1e6) == 302, "the encoder is not as large as the table says"


def test_the_protocols_of_ijepa_and_stop_have_the_published_numbers():
    section = README.split("### The protocols of I-JEPA and StoP")[1].split("\n### ")[0]
    rows = re.findall(
        r"^\| (StoP|I-JEPA) \| ViT-(\S+), .*? \|(?: ([\d.]+))? \|(?: ([\d.]+))? \| ([\d.]+) \|", section, re.MULTILINE
    )
    assert {(method, size): numbers for method, size, *numbers in rows} == {
        ("StoP", "B/16"): ["60.3", "72.6", "74.5"], ("StoP", "L/16"): ["65.1", "77.1", "78.5"],
        ("StoP", "H/16"): ["65.4", "79.0", "79.6"], ("I-JEPA", "B/16"): ["57.1", "70.9", "72.9"],
        ("I-JEPA", "L/16"): ["64.2", "76.1", "77.5"], ("I-JEPA", "H/14"): ["62.9", "78.2", "79.3"],
        ("I-JEPA", "H/16"): ["", "", "81.1"],
    }  # fmt: skip


def test_the_probes_of_cae_have_the_published_numbers():
    section = README.split("### The probes of CAE")[1].split("\n### ")[0]
    rows = re.findall(r"^\| CAE \| ViT-(\S+), (\d+) epochs \|.*\| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert {(size, int(epochs)): (float(linear), float(attentive)) for size, epochs, linear, attentive in rows} == {
        ("B/16", 300): (64.5, 74.0), ("B/16", 800): (68.9, 75.9), ("B/16", 1600): (70.3, 77.2),
        ("L/16", 1600): (77.8, 81.2),
    }  # fmt: skip


def test_urls_of_data_sets_parse_and_their_arguments_exist():
    section = README.split("## Where images come from")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|`]+ \| `((?:hf|custom|torchvision)://[^`]+)`", section, flags=re.MULTILINE)
    urls = {url.name: url for url in map(parse_data_url, rows)}
    named = {"ILSVRC/imagenet-1k", "timm/imagenet-22k-wds", "ADE20K", "VOC2012", "INaturalist", "SUN397", "Places365"}
    assert urls.keys() == named
    assert urls["timm/imagenet-22k-wds"].kwargs["streaming"] is True
    for url in urls.values():
        if url.source == "torchvision":
            parameters = inspect.signature(getattr(torchvision.datasets, url.name)).parameters
            assert url.kwargs.keys() <= parameters.keys() and url.kwargs["download"] is True, url
        elif url.source == "custom":
            assert url.kwargs["split"] in SEGMENTATION_SETS[url.name][1], url
        else:
            assert "split" in url.kwargs, url


def test_imagenet_is_named_alike_everywhere():
    paths = [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("*.yaml"), *ROOT.glob("configs/**/*.yaml")]
    urls = {url for path in paths for url in re.findall(r"hf://ILSVRC/imagenet-1k[^`\"\s]*", path.read_text())}
    assert urls == {f"hf://ILSVRC/imagenet-1k?split='{split}'&tgt_field='label'" for split in ("train", "validation")}


def has_key(cfg: object, key: str) -> bool:
    for part in key.split("."):
        if part.isupper():
            break
        if not hasattr(cfg, part):
            return False
        cfg = getattr(cfg, part)
    return True


def test_keys_that_are_named_exist():
    cfgs = [
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []),
        load_config(train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG, []),
        load_config(train_cae.CaeConfig, train_cae.DEFAULT_CONFIG, []),
    ]
    cfgs += [finetuning.load(script.TASK, []) for script in FINETUNERS]
    sections = "train|capi|optim|data|model|efficiency|predictor|masks|regressor|decoder|tokenizer|cae|backbone"
    sections += "|classification|segmentation|detection"
    # Not file names, and not methods of the examples' `model`, which have a parenthesis.
    found = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?!\()\b", README)
    named = {key for key in found if not key.endswith((".py", ".pth", ".tar"))}
    assert len(named) > 10
    for key in named:
        assert any(has_key(cfg, key) for cfg in cfgs), f"README names {key}, which is no configuration key"


def test_files_that_are_named_exist():
    named = re.findall(r"`([a-z_0-9/]+\.(?:py|yaml))`", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_has_one_line_in_the_map_of_the_code():
    lines = re.findall(r"^\| `([a-z_0-9/]+(?:\.py|/))` \| .+ \|$", README.split("## The code")[1], flags=re.MULTILINE)
    files = [*ROOT.glob("*.py"), *ROOT.glob("speed/[!_]*.py")]
    expected = {str(path.relative_to(ROOT)) for path in files} | {"baselines/", "bench/", "tasks/"}
    assert sorted(lines) == sorted(expected)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_sizes_in_the_table_are_those_of_the_configs(config: Path):
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(config)])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in EncoderDecoder(**cfg.model.kwargs()).parameters())
    (stated,) = re.findall(rf"\| `configs/{config.name}` \|.*\| ([\d.]+) ([MG]) \|", README)
    assert parameters / {"M": 1e6, "G": 1e9}[stated[1]] == pytest.approx(float(stated[0]), rel=0.03)
