"""README.md: its commands run, its keys and files exist, its numbers are today's."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_cli
from runs import TINY, make_images, run_main

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from model import EncoderDecoder

README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)))
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS.values() for line in block.splitlines() if line.strip()]
TRAINING = [command for command in COMMANDS if command.startswith("python train_capi.py")]
SLURM = [command for command in COMMANDS if command.startswith("python train_distributed.py")]
EXPORT, EXTRACT, BENCHMARK = (
    next(command for command in COMMANDS if command.startswith(f"python {script}"))
    for script in ("export.py", "extract_features.py", "benchmark.py")
)
TORCHRUN = [command for command in COMMANDS if command.startswith("torchrun ")]


def test_the_commands_are_all_of_a_kind_that_is_tested():
    make_targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        program, *rest = shlex.split(command)
        if program == "make":
            assert rest[0] in make_targets, command
        else:
            install = "pip install -c constraints.txt -e '.[test]'"
            assert command in [*TRAINING, *TORCHRUN, *SLURM, EXPORT, EXTRACT, BENCHMARK, install], command


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


def test_torchrun_commands_run_with_two_processes(tmp_path):
    images = make_images(tmp_path / "images")
    assert TORCHRUN
    for command in TORCHRUN:
        script, config, *rest = shlex.split(command)[3:]
        assert (script, Path(config).suffix) == ("train_capi.py", ".yaml"), command
        rest = [w.replace("/my/images", str(images)).replace("runs/", f"{tmp_path}/runs/") for w in rest]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = run_cli(*launcher, script, config, *TINY, *rest, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "mine" / "student_ema.pth").is_file()


def test_slurm_commands_show_a_job_script():
    assert SLURM
    for command in SLURM:
        done = run_cli(*shlex.split(command)[1:])
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


def test_the_python_examples_run_as_written(mine):
    own, released, here = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    own = own.replace("/path/to/this/folder", str(ROOT)) + "\nassert feature_map.shape == (1, 16, 16, 32)\n"
    line = 'torch.hub.load("/path/to/this/folder", "capi_vitl14_lvd", source="local")'
    assert line in released
    offline = line.replace("/path/to/this/folder", str(ROOT)).replace(")", ", pretrained=False)")
    released = released.replace(line, offline) + "\nassert out.feature_map.shape == (1, 16, 16, 1024)\n"
    for name, example, path in (("own", own, ""), ("released", released, ""), ("here", here, str(ROOT))):
        (mine / f"{name}.py").write_text(example)
        done = run_cli(mine / f"{name}.py", cwd=mine, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


def test_export_extraction_and_benchmark_run_as_written(mine):
    def run(command, *more):
        words = [w.replace("/my/images", str(mine / "images")) for w in shlex.split(command)[1:]]
        words[0] = str(ROOT / words[0])
        return run_cli(*words, *more, cwd=mine)

    done = run(EXPORT)
    assert done.returncode == 0, done.stderr
    assert all((mine / f"backbone.{kind}").is_file() for kind in ("pth", "safetensors", "onnx"))
    done = run(EXTRACT, "device=cpu", "num_workers=0")
    assert done.returncode == 0, done.stderr
    assert list((mine / "features" / "shards").glob("*.safetensors"))
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


def test_keys_that_are_named_exist():
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [])
    sections = "train|capi|optim|data|model|efficiency"
    # Not file names, and not methods of the examples' `model`, which have a parenthesis.
    named = {key for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)(?!\()\b", README) if not key.endswith(".py")}
    assert len(named) > 10
    for key in named:
        value = cfg
        for part in key.split("."):
            if part.isupper():
                break
            assert hasattr(value, part), f"README names {key}, which is no configuration key"
            value = getattr(value, part)


def test_files_that_are_named_exist():
    named = re.findall(r"`([a-z_0-9/]+\.(?:py|yaml))`", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_sizes_in_the_table_are_those_of_the_configs(config: Path):
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(config)])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in EncoderDecoder(**cfg.model.kwargs()).parameters())
    (stated,) = re.findall(rf"\| `configs/{config.name}` \|.*\| ([\d.]+) ([MG]) \|", README)
    assert parameters / {"M": 1e6, "G": 1e9}[stated[1]] == pytest.approx(float(stated[0]), rel=0.03)
