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
TORCHRUN = [command for command in COMMANDS if command.startswith("torchrun ")]


def test_the_commands_are_all_of_a_kind_that_is_tested():
    make_targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        program, *rest = shlex.split(command)
        if program == "make":
            assert rest[0] in make_targets, command
        else:
            install = "pip install -c constraints.txt -e '.[test]'"
            assert command in [*TRAINING, *TORCHRUN, *SLURM, install], command


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


def test_the_python_example_runs_as_written(tmp_path):
    images = make_images(tmp_path / "images")
    arguments = [*TINY, f"data.dataset={images}", f"train.output_dir={tmp_path}/runs/mine", "model.patch_size=14",
                 "data.images_size=56", "optim.total_iters=1"]  # fmt: skip
    assert run_main(arguments) == 0
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    example = example.replace("runs/mine", f"{tmp_path}/runs/mine") + "\nassert feature_map.shape == (1, 16, 16, 32)\n"
    (tmp_path / "example.py").write_text(example)
    done = run_cli(tmp_path / "example.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_keys_that_are_named_exist():
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [])
    sections = "launcher|train|capi|optim|data|model|efficiency"
    named = {key for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)", README) if not key.endswith(".py")}
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
