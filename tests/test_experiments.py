"""experiments/: tables of trainings under one budget, presets, and what ails a run that left its preset's band."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import toy_method
import yaml
from conftest import ROOT
from runs import FAKE_EVALUATION, TINY_TRAINING, make_images

from config import check_evaluation, load_config

sys.path.append(str(ROOT / "experiments"))  # where the scripts look for each other

import ablate
import compare
from table import TableConfig

TRAINING = """
import argparse, json, sys, time
from pathlib import Path
import yaml

def read(sources):
    cfg = {
        "launcher": {}, "evals": None, "lr": 0.5, "reads": None, "fails_at": None, "busy_s": 0.0,
        "train": {"output_dir": ".", "seed": 0, "health_every": 1, "probe": {"every": 1}},
        "optim": {"total_iters": 1000, "epochs": 300, "batch_size_per_gpu": 4, "accumulation_steps": 2},
    }
    for source in sources:
        key, equals, value = source.partition("=")
        given = {key: yaml.safe_load(value)} if equals else yaml.safe_load(Path(source).read_text())
        for key, value in given.items():
            if key not in cfg:
                return print(f"error: unknown key {key}", file=sys.stderr)
            cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
    return cfg

def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--print-config", action="store_true")
    args = parser.parse_args(arguments)
    cfg = read(args.sources)
    if cfg is None:
        return 2
    if args.print_config:
        print(yaml.safe_dump(cfg))
        return 0
    folder = Path(cfg["train"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if cfg["reads"]:
        assert Path(cfg["reads"]).is_file(), cfg["reads"]
    with (folder / "starts").open("a") as file:
        file.write("x")
    path = folder / "metrics.jsonl"
    first = len(path.read_text().splitlines()) if path.exists() else 0
    for step in range(first + 1, cfg["optim"]["total_iters"] + 1):
        end = time.process_time() + cfg["busy_s"]
        while time.process_time() < end:
            pass
        if step == cfg["fails_at"] and not first:
            print("error: train.device=nowhere: there is none", file=sys.stderr)
            return 2
        record = {"step": step, "loss": cfg["lr"] / step + cfg["train"]["seed"], "images_per_s": 8.0}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\\n")
    (folder / "weights.json").write_text(json.dumps({"score": cfg["lr"] + cfg["train"]["seed"] / 10}))
    return 0

if __name__ == "__main__":
    sys.exit(main())
"""
"""A training that keeps the contract, without torch."""

EVALUATION = """
import json, sys
from pathlib import Path
import yaml

cfg = yaml.safe_load(open(sys.argv[1]))
folder, weights = Path(cfg["output_dir"]), cfg["model_loader_kwargs"].get("pretrained_weights")
score = json.loads(Path(weights).read_text())["score"] if weights else 0.01
scores = [{"path": ["top1"], "label": "top-1"}]
about = {"seconds": 1.0, "weights_sha256": "ab"}
content = {"results": {"knn": {"top1": score, "other": 3.0}}, "config": cfg, "about": about, "scores": scores}
(folder / "results_stub.json").write_text(json.dumps(content))
"""

MODEL = "def __model_loader__(pretrained_weights=None): ...\n"

BEFORE = """
import sys
from pathlib import Path
import yaml

cfg = yaml.safe_load(open(sys.argv[1]))
assert Path(cfg["weights"]).is_file()
Path(cfg["output"]).write_text("made")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a training, an evaluation and a model file that only write what they are told, and a table."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("train_stub", TRAINING), ("eval_stub", EVALUATION), ("model_stub", MODEL), ("before", BEFORE)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "base.yaml").write_text("busy_s: 0.0\n")
    write_table(tmp_path)
    return tmp_path


def write_table(folder: Path, **changes: Any) -> None:
    table = {
        "output_dir": "out",
        "title": "Two learning rates",
        "budget": {"images": 24},
        "seeds": [0, 1],
        "shared": {
            "script": "train_stub.py", "configs": ["base.yaml"], "model_path": "model_stub.py",
            "weights": "weights.json",
        },
        "trainings": {"low": {"overrides": ["lr=0.25"], "random": True}, "high": {"overrides": ["lr=0.5"]}},
        "evaluations": {"pets": {"file": "eval_stub.py"}},
        "metrics": {"last loss": "loss", "images/s": "images_per_s"},
        "curves": ["loss"],
    }  # fmt: skip
    (folder / "table.yaml").write_text(yaml.safe_dump(table | changes, sort_keys=False))


def results() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text())


def starts(name: str, seed: int = 0) -> int:
    return len(Path(f"out/{name}/seed_{seed}/run/starts").read_text())


def test_a_table_has_means_and_deviations_over_seeds_and_is_not_made_twice(here, capsys):
    assert compare.main(["table.yaml"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in shown.splitlines() if "±" in line}
    assert rows.keys() == {"low", "random weights (low)", "high"}
    assert "30.0 ± 7.1" in rows["low"] and "55.0 ± 7.1" in rows["high"] and "1.0 ± 0.0" in rows["random weights (low)"]
    content = results()
    assert content["rows"]["low"]["mean"]["pets/knn/top1"] == pytest.approx(0.3)
    assert content["rows"]["low"]["deviation"]["last loss"] == pytest.approx(0.5**0.5)
    assert content["rows"]["high"]["mean"]["images"] == 24, "3 steps of 4 x 2 images"
    assert content["rows"]["high"]["mean"]["CPU minutes"] > 0
    page = Path("out/report.html").read_text()
    assert '<td class="number best">55.0' in page and "data:image/png" in page
    assert compare.main(["table.yaml"]) == 0
    assert capsys.readouterr().out == shown
    assert [starts(name, seed) for name in ("low", "high") for seed in (0, 1)] == [1] * 4


def test_a_training_that_failed_leaves_the_others_alone_and_goes_on_where_it_was(here, capsys):
    write_table(here, seeds=[0], trainings={"bad": {"overrides": ["fails_at=2"]}, "good": {}})
    assert compare.main(["table.yaml"]) == 1
    said = capsys.readouterr().out
    assert "bad, seed 0: failed. exit code 2: error: train.device=nowhere: there is none" in said
    assert results()["rows"]["good"]["mean"]["pets/knn/top1"] == 0.5
    assert compare.main(["table.yaml"]) == 0
    steps = [json.loads(line)["step"] for line in Path("out/bad/seed_0/run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3], "it began anew"
    assert (starts("bad"), starts("good")) == (2, 1)
    assert len(json.loads(Path("out/bad/seed_0/asked.json").read_text())["cpu_seconds"]) == 2


def test_a_training_reads_what_another_run_made_by_a_script_in_between(here, capsys):
    before = {
        "file": "before.py",
        "makes": "<folder>/made.txt",
        "config": {"weights": "<first>/weights.json", "output": "<folder>/made.txt"},
    }
    second = {"overrides": ["reads=<folder>/made.txt"], "before": before, "note": "Its ids are made of the first."}
    write_table(here, trainings={"first": {}, "second": second}, evaluations={})
    assert compare.main(["table.yaml"]) == 0
    assert Path("out/second/seed_1/made.txt").read_text() == "made"
    config = yaml.safe_load(Path("out/second/seed_1/config.yaml").read_text())
    assert config["reads"] == "out/second/seed_1/made.txt"
    assert "second: Its ids are made of the first." in capsys.readouterr().out
    assert "Its ids are made of the first." in Path("out/report.html").read_text()


def test_a_training_waits_for_what_it_reads(here, capsys):
    table = {"first": {"overrides": ["fails_at=2"]}, "second": {"overrides": ["reads=<first>/weights.json"]}}
    write_table(here, seeds=[0], trainings=table, evaluations={})
    assert compare.main(["table.yaml"]) == 1
    assert "second, seed 0: left out. It reads the run of first, which is not complete." in capsys.readouterr().out
    assert compare.main(["table.yaml"]) == 0


def test_a_budget_of_processor_time_decides_how_many_steps_there_are(here, capsys):
    slow = {"overrides": ["busy_s=0.04"]}
    write_table(
        here, seeds=[0], budget={"cpu_seconds": 0.5, "calibration_steps": 10}, evaluations={},
        trainings={"quick": {"overrides": ["busy_s=0.02"]}, "slow": slow},
    )  # fmt: skip
    assert compare.main(["table.yaml"]) == 0
    config = {name: yaml.safe_load(Path(f"out/{name}/seed_0/config.yaml").read_text()) for name in ("quick", "slow")}
    steps = {name: own["optim"]["total_iters"] for name, own in config.items()}
    assert config["slow"]["optim"]["epochs"] is None, "epochs would decide how long it is"
    assert 8 <= steps["slow"] <= 17 and 1.5 < steps["quick"] / steps["slow"] < 2.5, steps
    assert results()["budget"] == "0.5 seconds of processor time"
    assert results()["rows"]["slow"]["mean"]["images"] == 8 * steps["slow"]
    planned = Path("out/slow/seed_0/asked.json").read_text()
    assert compare.main(["table.yaml"]) == 0
    assert Path("out/slow/seed_0/asked.json").read_text() == planned, "it was measured again"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["budget.images=80"], "out/low/seed_0 has a training that differs in budget.images"),
        (["trainings.low.overrides=[lr=0.3]"], "out/low has trainings that differ in sources"),
    ],
)
def test_other_trainings_are_not_mixed_into_a_table(here, sources, message, capsys):
    write_table(here, seeds=[0], evaluations={})
    assert compare.main(["table.yaml"]) == 0
    assert compare.main(["table.yaml", *sources]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["budget.cpu_seconds=3"], "give one of budget.images and budget.cpu_seconds"),
        (["trainings.low=null", "trainings.high=null"], "no training is left"),
        (["shared.script=null"], "trainings.low.script=None: must name a training script"),
        (["shared.script=nowhere.py"], "trainings.low.script=nowhere.py: there is no such file"),
        (["shared.overrides=[lrr=1]"], "error: unknown key lrr"),
        (["trainings.low.overrides=['reads=<hihg>/x']"], "<hihg> must be <folder> or a training that stands before"),
        (["evaluations.pets.file=nowhere.py"], "evaluations.pets.file=nowhere.py: there is no such file"),
        (["launcher=slurm", "budget.cpu_seconds=3", "budget.images=null"], "is measured on this machine"),
        (["trainings.low.lr=3"], "unknown key trainings.low.lr"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(here, sources, message, capfd):
    assert compare.main(["table.yaml", *sources]) == 2
    assert message in capfd.readouterr().err
    assert not list(Path().glob("out/*/seed_*"))


def test_a_dry_run_shows_the_commands_and_writes_nothing(here, capsys):
    assert ablate.main(["table.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "low, seed 1: 3 steps of 8 images" in shown
    line = "python train_stub.py base.yaml lr=0.25 train.seed=1 train.output_dir=out/low/seed_1/run optim.total_iters=3"
    assert line in shown
    assert not Path("out").exists()


def test_a_method_that_keeps_the_contract_joins_by_an_entry(tmp_path, monkeypatch, capsys):
    """The real loop, export and evaluation, of a method that this repository does not have."""
    toy_method.write_config(tmp_path / "toy.yaml", make_images(tmp_path / "images"))
    (tmp_path / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    toy = {
        "script": toy_method.__file__, "model_path": toy_method.__file__, "weights": "student.pth",
        "configs": ["toy.yaml"], "overrides": [*TINY_TRAINING, "optim.lr_schedule.warmup_iters=0.5"],
    }  # fmt: skip
    table = {
        "output_dir": "out", "title": "A toy", "budget": {"images": 10}, "trainings": {"toy": toy},
        "evaluations": {"fake": {"file": "eval_fake.py"}}, "scores": {"sum": "fake/sum/top1"}, "device": "cpu",
        "num_workers": 0,
    }  # fmt: skip
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert compare.main(["table.yaml"]) == 0
    assert results()["rows"]["toy"]["mean"].keys() == {"sum", "images", "CPU minutes"}
    assert results()["rows"]["toy"]["mean"]["images"] == 8, "2 steps of 4 images are nearest to 10"
    assert '<section aria-labelledby="scores">' in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("script", "tables", "num"),
    [
        (compare, ["four_methods.yaml"], 4),
        (compare, ["four_methods.yaml", "four_methods_cpu.yaml", "camvid.yaml"], 4),
        (ablate, ["paper_choices.yaml"], 19),
    ],
)
def test_the_shipped_tables_name_scripts_configurations_and_keys_that_exist(script, tables, num, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert script.main([*(f"experiments/{table}" for table in tables), "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    python train_")]
    assert len(lines) == num
    table = load_config(TableConfig, None, [f"experiments/{table}" for table in tables])
    for name, entry in table.evaluations.items():
        check_evaluation(name, entry)
    assert all(place.split("/")[0] in table.evaluations for place in table.scores.values())


# Slurm.

FAKE_SBATCH = """#!/bin/sh
number=$(( $(cat jobs | wc -l) + 1 ))
echo "$number $(grep -o "'[^']*config.yaml'\\|[^ ]*config.yaml" "$1" | tail -1)" >> jobs
echo "Submitted batch job $number"
"""


@pytest.fixture
def fake_slurm(here, monkeypatch):
    """A queue whose jobs run when the test says so."""
    folder = here / "bin"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("squeue", "#!/bin/sh\ncat queue\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (here / "jobs").write_text("")
    (here / "queue").write_text("PENDING\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for module in ("benchmark", "launch", "table"):
        monkeypatch.setattr(f"{module}.ROOT", here)

    def run_jobs(script: str) -> None:
        """Run what was submitted last, and let the queue be empty."""
        config = (here / "jobs").read_text().splitlines()[-1].split(" ", 1)[1].strip("'")
        subprocess.run([sys.executable, script, config], check=True)
        (here / "queue").write_text("")

    return run_jobs


def test_trainings_and_then_their_evaluations_are_jobs_that_are_collected_later(fake_slurm, here, capsys):
    write_table(here, seeds=[0], trainings={"only": {}})
    command = ["table.yaml", "launcher=slurm"]
    assert compare.main(command) == 0
    assert "only, seed 0: running. Slurm job 1, log" in capsys.readouterr().out
    assert compare.main(command) == 0
    assert len((here / "jobs").read_text().splitlines()) == 1, "it was submitted twice"
    fake_slurm("train_stub.py")
    (here / "queue").write_text("")
    assert compare.main(command) == 0
    assert "only, seed 0: running. evaluation pets: Slurm job 2" in capsys.readouterr().out
    fake_slurm("eval_stub.py")
    assert compare.main(command) == 0
    assert "50.0" in capsys.readouterr().out.splitlines()[2]
    assert len((here / "jobs").read_text().splitlines()) == 2
