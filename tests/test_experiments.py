"""experiments/: tables of trainings under one budget, presets, and what ails a run that left its preset's band."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_method
import yaml
from commands import FAKE_EVALUATION, TINY_TRAINING, make_images, run_forked
from conftest import PYTHON, ROOT
from PIL import Image

import train_capi
import train_distributed
from config import DEFAULT_PRETRAIN_CONFIG, changed_keys, check_evaluation, load_config, to_yaml

sys.path.append(str(ROOT / "experiments"))  # where the scripts look for each other

import ablate
import compare
import compare_run
import rule
from table import TableConfig, children_cpu_seconds

from metrics import read_metrics
from train_capi import CapiConfig
from utils import import_from_path

TRAINING = """
import argparse, json, os, sys
from pathlib import Path
import yaml

def read(sources):
    cfg = {
        "launcher": {}, "evals": None, "lr": 0.5, "reads": None, "fails_at": None,
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
    if os.environ.get("RANK", "0") != "0":
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
import base64, json, sys
from pathlib import Path
import yaml

cfg = yaml.safe_load(open(sys.argv[1]))
folder, weights = Path(cfg["output_dir"]), cfg["model_loader_kwargs"].get("pretrained_weights")
score = json.loads(Path(weights).read_text())["score"] if weights else 0.01
scores = [{"path": ["top1"], "label": "top-1"}]
about = {"seconds": 1.0, "weights_sha256": "ab", "device": "an abacus"}
content = {"results": {"knn": {"top1": score, "other": 3.0}}, "config": cfg, "about": about, "scores": scores}
(folder / "results_stub.json").write_text(json.dumps(content))
(folder / "artifacts").mkdir(exist_ok=True)
(folder / "artifacts" / "overview.png").write_bytes(base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="))
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
    (tmp_path / "base.yaml").write_text("lr: 0.5\n")
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


def change_script(before: str, after: str) -> None:
    path = Path("train_stub.py")
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def results() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text())


def starts(name: str, seed: int = 0) -> int:
    return len(Path(f"out/{name}/seed_{seed}/run/starts").read_text())


@pytest.mark.long
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
    assert '<td class="number best">55.0' in page
    assert content["evaluated on"] == ["an abacus"] and "an abacus" in page
    alts = re.findall(r'alt="([^"]+)"', page)
    assert alts == [
        "loss over 3 steps. low: from 0.25 to 0.08333; high: from 0.5 to 0.1667",
        "pets, low: overview", "pets, random initialisation: overview", "pets, high: overview",
    ]  # fmt: skip
    assert compare.main(["table.yaml"]) == 0
    assert capsys.readouterr().out == shown
    assert [starts(name, seed) for name in ("low", "high") for seed in (0, 1)] == [1] * 4


@pytest.mark.long
def test_a_table_whose_trainings_run_side_by_side_is_the_same(here, capsys):
    """Also one of them that fails, and one that reads another's run."""
    table = {
        "high": {"overrides": ["lr=0.5"]},
        "reader": {"overrides": ["reads=<high>/weights.json"]},
        "bad": {"overrides": ["fails_at=2"]},
        "low": {"overrides": ["lr=0.25"]},
    }
    write_table(here, seeds=[0], trainings=table)
    found = {}
    for at_once in (1, 3):
        assert compare.main(["table.yaml", f"output_dir=out_{at_once}", f"at_once={at_once}"]) == 1
        told = capsys.readouterr().out.replace("out_1", "out").replace("out_3", "out")
        content = json.loads(Path(f"out_{at_once}/results.json").read_text())
        means = {name: row["mean"] | {"CPU minutes": 0} for name, row in content["rows"].items()}
        found[at_once] = means, [line for line in told.splitlines() if "failed" in line]
    assert found[1] == found[3]
    assert found[1][0]["reader"]["pets/knn/top1"] == pytest.approx(0.5)


TOGETHER = """
import time
Path(f"here_{cfg['lr']}").write_text(str(os.getpid()))
end = time.monotonic() + 60
while not all(Path(f"here_{lr}").exists() for lr in (0.25, 0.5)) or Path("stay").exists():
    assert time.monotonic() < end
    time.sleep(0.05)
"""


def wait_for_each_other(here):
    """Let the two trainings of the table end only after both have begun, and not while there is a file `stay`."""
    lines = textwrap.indent(TOGETHER, "    ")
    (here / "train_stub.py").write_text(
        TRAINING.replace('    path = folder / "metrics.jsonl"', f'{lines}    path = folder / "metrics.jsonl"')
    )
    write_table(here, seeds=[0], evaluations={})


def test_trainings_run_at_the_same_time(here):
    wait_for_each_other(here)
    assert compare.main(["table.yaml", "at_once=2"]) == 0


def test_what_runs_side_by_side_ends_with_the_command_and_goes_on_with_the_next(here):
    wait_for_each_other(here)
    (here / "stay").touch()
    command = subprocess.Popen([sys.executable, str(ROOT / "experiments" / "compare.py"), "table.yaml", "at_once=2"])
    end = time.monotonic() + 100
    paths = [here / f"here_{lr}" for lr in (0.25, 0.5)]
    while not all(path.exists() and path.read_text() for path in paths):  # a file is there before what is in it
        assert time.monotonic() < end and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    for path in paths:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    (here / "stay").unlink()
    assert compare.main(["table.yaml", "at_once=2"]) == 0
    assert (starts("low"), starts("high")) == (2, 2)


def test_a_training_waits_for_the_weights_that_it_reads_and_not_for_their_evaluation(here):
    lines = """
import time
end = time.monotonic() + 60
while "/first/" in cfg["output_dir"] and not Path("out/second/seed_0/run/starts").exists():
    assert time.monotonic() < end
    time.sleep(0.05)
"""
    (here / "eval_stub.py").write_text(EVALUATION + lines)
    table = {"first": {}, "second": {"overrides": ["reads=<first>/weights.json"]}}
    write_table(here, seeds=[0], trainings=table)
    assert compare.main(["table.yaml", "at_once=2"]) == 0


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


BY_A_SCRIPT = {
    "file": "before.py",
    "makes": "<folder>/made.txt",
    "config": {"weights": "<first>/weights.json", "output": "<folder>/made.txt"},
}


def test_a_training_reads_what_another_run_made_by_a_script_in_between(here, capsys):
    second = {"overrides": ["reads=<folder>/made.txt"], "before": BY_A_SCRIPT, "note": "Its ids are made of the first."}
    write_table(here, trainings={"first": {}, "second": second}, evaluations={})
    assert compare.main(["table.yaml"]) == 0
    assert Path("out/second/seed_1/made.txt").read_text() == "made"
    config = yaml.safe_load(Path("out/second/seed_1/config.yaml").read_text())
    assert config["reads"] == "out/second/seed_1/made.txt"
    assert "second: Its ids are made of the first." in capsys.readouterr().out
    assert "Its ids are made of the first." in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    "second",
    [
        {"overrides": ["reads=<first>/weights.json"]},
        {"overrides": ["reads=<folder>/made.txt"], "before": BY_A_SCRIPT},
    ],
    ids=["itself", "before"],
)
def test_a_training_is_not_shown_beside_another_run_than_it_read(here, second, capsys):
    write_table(here, seeds=[0], evaluations={}, trainings={"first": {}, "second": second})
    assert compare.main(["table.yaml"]) == 0
    shutil.rmtree("out/first")
    assert compare.main(["table.yaml"]) == 0, "the same was made again"
    assert (starts("first"), starts("second")) == (1, 1)

    shutil.rmtree("out/first")
    other = ["table.yaml", "trainings.first.overrides=[lr=0.75]"]
    capsys.readouterr()
    assert compare.main(other) == 1
    assert "second, seed 0 reads a run that has changed, that of first" in capsys.readouterr().out
    assert compare.main(other) == 2
    assert "delete out/second/seed_0 to train anew" in capsys.readouterr().err

    noted = Path("out/second/seed_0/asked.json")
    content = json.loads(noted.read_text())
    noted.write_text(json.dumps({key: value for key, value in content.items() if key != "reads"}))
    assert compare.main(other) == 0, "runs of before this note are taken as they are"
    noted.write_text(json.dumps(content))
    shutil.rmtree("out/second/seed_0")
    assert compare.main(other) == 0
    assert starts("second") == 1


def no_json(word: str) -> None:
    pytest.fail(f"{word} is not JSON")


@pytest.mark.parametrize("last", ['float("nan")', 'float("inf")', "None"])
def test_a_value_that_is_not_finite_is_called_so_and_leaves_the_rest_of_the_table(here, last, capsys):
    """Beside a seed whose values are."""
    write_table(here, evaluations={}, trainings={"bad": {}})
    change_script('cfg["lr"] / step + cfg["train"]["seed"]', f'{last} if cfg["train"]["seed"] and step == 3 else 1.0')
    assert compare.main(["table.yaml"]) == 0
    assert re.search("^bad +not finite +8 ± 0 +24 ", capsys.readouterr().out, flags=re.MULTILINE)
    content = json.loads(Path("out/results.json").read_text(), parse_constant=no_json)
    row = content["rows"]["bad"]
    assert row["mean"]["last loss"] is row["deviation"]["last loss"] is row["seeds"]["1"]["values"]["last loss"] is None
    assert row["seeds"]["0"]["values"]["last loss"] == 1


def test_only_complete_trainings_are_averaged_and_their_number_is_told(here, capsys):
    write_table(here, evaluations={}, trainings={"bad": {"overrides": ["fails_at=2"]}})
    assert compare.main(["table.yaml", "seeds=[0]"]) == 1
    assert re.search("^bad( +n/a){4}$", capsys.readouterr().out, flags=re.MULTILINE)
    assert compare.main(["table.yaml", "seeds=[0]"]) == 0
    alone = results()["rows"]["bad"]
    assert compare.main(["table.yaml"]) == 1
    row = results()["rows"]["bad"]
    assert row["mean"] == alone["mean"] and not row["deviation"] and set(row["count"].values()) == {1}
    assert row["seeds"]["1"]["values"]["images"] == 8
    assert " 24 (1 of 2)" in capsys.readouterr().out


REFUSES = """
import os, pathlib, json, sys, yaml
asked = yaml.safe_load(open(sys.argv[1]))
found = pathlib.Path(asked["output_dir"], "results_stub.json")
if found.is_file() and json.loads(found.read_text())["config"] != asked:
    sys.exit("error: has results of another request")
"""


def change_the_weights():
    Path("out/low/seed_0/run/weights.json").write_text('{"score": 0.5}')


def lose_the_weights():
    Path("out/low/seed_0/run/weights.json").unlink()
    change_script("weights.json", "other.json")


@pytest.mark.parametrize(
    ("change", "sources", "code", "has_column"),
    [
        (None, ["evaluations.pets.k=5"], 1, True),
        (None, ["evaluations.pets=null"], 0, False),
        (change_the_weights, [], 1, True),
        (lose_the_weights, [], 1, True),
    ],
    ids=["other key", "left out", "other weights", "no weights"],
)
def test_scores_of_another_request_are_not_those_of_the_table(here, change, sources, code, has_column):
    (here / "eval_stub.py").write_text(REFUSES + EVALUATION)
    trainings = {"low": {"overrides": ["lr=0.25"]}}
    write_table(here, seeds=[0], trainings=trainings, scores={"pets": "pets/knn/top1"})
    assert compare.main(["table.yaml"]) == 0
    assert results()["rows"]["low"]["mean"]["pets"] == 0.25
    if change is not None:
        change()
    assert compare.main(["table.yaml", *sources]) == code
    content = results()
    row = content["rows"]["low"]
    assert "pets" not in row["mean"] and "pets" not in row["seeds"]["0"]["values"] and not content["evaluated on"]
    assert ("pets" in content["columns"]) == has_column
    page = Path("out/report.html").read_text()
    assert "25.0" not in page and "pets, low: overview" not in page
    assert Path("out/low/seed_0/evaluation/results.json").is_file(), "what was evaluated is lost"
    if sources:
        assert compare.main(["table.yaml"]) == 0
        assert results()["rows"]["low"]["mean"]["pets"] == 0.25, "what was asked for first is still there"


def test_the_code_of_a_table_is_that_which_trained_and_not_that_which_wrote_it(here, monkeypatch):
    write_table(here, seeds=[0], evaluations={}, trainings={"bad": {"overrides": ["fails_at=2"]}, "good": {}})
    for revision in ("first", "second", "third"):
        monkeypatch.setattr("table.git_revision", lambda revision=revision: revision)
        compare.main(["table.yaml"])
    content = results()
    assert content["code"] == ["first", "second"]
    assert content["versions"] == {
        "python": [platform.python_version()],
        "torch": [importlib.metadata.version("torch")],
    }
    for folder in ("bad", "good"):  # trainings of before this note
        noted = Path(f"out/{folder}/seed_0/asked.json")
        state = json.loads(noted.read_text())
        noted.write_text(json.dumps({key: value for key, value in state.items() if key != "made_by"}))
    assert compare.main(["table.yaml"]) == 0
    assert results()["code"] == []


def test_images_are_those_of_the_processes_that_trained(here, capsys):
    write_table(here, seeds=[0], evaluations={}, trainings={"bad": {"overrides": ["fails_at=2"]}, "good": {}})
    two = ["table.yaml", "nproc_per_node=2"]
    assert compare.main(two) == 1
    seen = {name: row["seeds"]["0"]["values"]["images"] for name, row in results()["rows"].items()}
    assert seen == {"bad": 16, "good": 32}
    capsys.readouterr()
    assert compare.main(["table.yaml"]) == 1
    assert results()["rows"]["good"]["mean"]["images"] == 32, "it was told as that of one process"
    assert "bad, seed 0 was begun with 16 images a step, and is now asked to go on with 8" in capsys.readouterr().out
    assert compare.main(two) == 0


def test_a_training_waits_for_what_it_reads(here, capsys):
    table = {"first": {"overrides": ["fails_at=2"]}, "second": {"overrides": ["reads=<first>/weights.json"]}}
    write_table(here, seeds=[0], trainings=table, evaluations={})
    assert compare.main(["table.yaml"]) == 1
    assert "second, seed 0: left out. It reads the run of first, which is not complete." in capsys.readouterr().out
    assert compare.main(["table.yaml"]) == 0


def test_a_budget_of_processor_time_decides_how_many_steps_there_are(here, monkeypatch, capsys):
    seconds = {"quick": 0.02, "slow": 0.04}

    def children_cpu_seconds() -> float:
        """What all trainings took whose folders are there: three seconds for each start, and then for each step."""
        runs = {path.parent: path.read_text() for path in Path("out").glob("*/**/run/starts")}
        steps = {run: len((run / "metrics.jsonl").read_text().splitlines()) for run in runs}
        return sum(3 * len(x) + seconds[run.parts[1]] * steps[run] for run, x in runs.items())

    monkeypatch.setattr("table.children_cpu_seconds", children_cpu_seconds)
    write_table(here, seeds=[0], budget={"cpu_seconds": 0.5}, evaluations={}, trainings={"quick": {}, "slow": {}})
    assert compare.main(["table.yaml"]) == 0
    config = {name: yaml.safe_load(Path(f"out/{name}/seed_0/config.yaml").read_text()) for name in seconds}
    assert {name: own["optim"]["total_iters"] for name, own in config.items()} == {"quick": 25, "slow": 12}
    assert config["slow"]["optim"]["epochs"] is None, "epochs would decide how long it is"
    assert results()["budget"] == "0.5 seconds of processor time"
    assert results()["rows"]["slow"]["mean"]["images"] == 8 * 12
    assert results()["rows"]["slow"]["mean"]["CPU minutes"] == pytest.approx((3 + 0.04 * 12) / 60)
    planned = Path("out/slow/seed_0/asked.json").read_text()
    assert compare.main(["table.yaml"]) == 0
    assert Path("out/slow/seed_0/asked.json").read_text() == planned, "it was measured again"
    capsys.readouterr()
    assert compare.main(["table.yaml", "seeds=[0,1]", "--dry-run"]) == 0
    assert "slow, seed 1: 12 steps of 8 images" in capsys.readouterr().out
    assert compare.main(["table.yaml", "seeds=[0,1]", "trainings.quick=null"]) == 0
    assert results()["rows"]["slow"]["deviation"]["images"] == 0, "another seed saw another number of images"
    assert not list(Path("out/slow/seed_1").glob("calibration_*"))


def test_the_processor_time_of_a_process_and_of_its_own_is_counted():
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)\n{burn}"
    before = children_cpu_seconds()
    subprocess.run([PYTHON, "-c", code], check=True)  # `sys.executable` starts none of this process's own
    assert 0.4 <= children_cpu_seconds() - before < 4


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


def test_a_training_is_that_of_its_script_as_it_is_now_and_a_begun_one_is_not_mixed_with_it(here, capsys):
    """Also after one that failed, whose configuration would fail again and again."""
    write_table(here, seeds=[0], evaluations={}, trainings={"bad": {}, "good": {"overrides": ["fails_at=null"]}})
    change_script('"fails_at": None', '"fails_at": 1')
    assert compare.main(["table.yaml"]) == 1
    change_script('"fails_at": 1', '"fails_at": None, "momentum": 0.9')
    assert compare.main(["table.yaml"]) == 2
    told = capsys.readouterr().err
    assert "out/bad has trainings that differ in fails_at, momentum from what train_stub.py" in told
    shutil.rmtree("out/bad/seed_0")
    Path("out/good/config.yaml").unlink()
    assert compare.main(["table.yaml"]) == 0
    assert yaml.safe_load(Path("out/bad/seed_0/config.yaml").read_text())["momentum"] == 0.9
    assert starts("good") == 1, "it was said to count"


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
        (["launcher=slurm", "at_once=2"], "at_once=2: is for launcher=local"),
        (["at_once=2", "budget.cpu_seconds=3", "budget.images=null"], "at_once=2: must be 1 with budget.cpu_seconds"),
        (["at_once=0"], "at_once=0: must be"),
        (["shared.model_path=modle_stub.py"], "trainings.low: model_path=modle_stub.py: there is no such file"),
        (
            ["trainings.high.model_path=train_stub.py"],
            "trainings.high: model_path=train_stub.py: the file does not define",
        ),
        (
            ["scores.top1=pest/knn/top1"],
            "scores.top1='pest/knn/top1': pest is none of the evaluations; did you mean pets?",
        ),
        (["output_dir=out/lr=1"], "output_dir='out/lr=1': must not contain '='"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(here, sources, message, capfd):
    assert compare.main(["table.yaml", *sources]) == 2
    assert message in capfd.readouterr().err
    assert not list(Path().glob("out/**/seed_*"))


PRINTED = "        print(yaml.safe_dump(cfg))\n        return 0"


@pytest.mark.parametrize("end", ["sys.exit(0)", "sys.exit()", "return None"])
def test_a_script_may_end_in_every_way_that_means_success(here, end):
    write_table(here, seeds=[0], evaluations={}, trainings={"only": {}})
    change_script(PRINTED, PRINTED.replace("return 0", end))
    assert compare.main(["table.yaml"]) == 0
    assert starts("only") == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (PRINTED, PRINTED.replace("return 0", "sys.exit(3)"), "lr=0.25 --print-config failed, see above"),
        (PRINTED, PRINTED.replace("return 0", "sys.exit('no luck')"), "lr=0.25 --print-config failed: no luck"),
        (
            PRINTED,
            f"        print('[reading')\n{PRINTED}",
            "prints no configuration in YAML, but begins with '[reading'",
        ),
        (PRINTED, "        print('all is well')\n        return 0", "but begins with 'all is well'"),
        (PRINTED, "        return 0", "prints no configuration in YAML, but nothing"),
        (', "accumulation_steps": 2', "", "its configuration lacks optim.accumulation_steps"),
        ('"seed": 0, ', "", "its configuration lacks train.seed"),
        ('"optim": {', '"optim": [], "was": {', "its configuration lacks optim.total_iters"),
        ('"batch_size_per_gpu": 4', '"batch_size_per_gpu": None', "has optim.batch_size_per_gpu=None, not a number"),
    ],
)
def test_a_script_that_breaks_the_contract_is_named_with_what_it_lacks(here, before, after, message, capsys):
    change_script(before, after)
    assert compare.main(["table.yaml"]) == 2
    told = capsys.readouterr().err
    assert "train_stub.py" in told and message in told
    assert not list(Path().glob("out/*/seed_*"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '{"step": step,',
            '{"step": step - 1,',
            "ended before step 3: out/bad/seed_0/run/metrics.jsonl ends with step 2;",
        ),
        ("weights.json", "other.json", "it ended without out/bad/seed_0/run/weights.json;"),
    ],
)
def test_what_a_training_lacks_to_be_complete_is_told(here, before, after, message, capsys):
    write_table(here, seeds=[0], evaluations={}, trainings={"bad": {}})
    change_script(before, after)
    assert compare.main(["table.yaml"]) == 1
    assert message in capsys.readouterr().out


def test_a_dry_run_shows_the_commands_and_writes_nothing(here, capsys):
    assert ablate.main(["table.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "low, seed 1: 3 steps of 8 images" in shown
    line = "python train_stub.py base.yaml lr=0.25 train.seed=1 train.output_dir=out/low/seed_1/run optim.total_iters=3"
    assert f"{line} optim.epochs=null" in shown, "or epochs of the configuration would be the length"
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


COMMANDS = [
    shlex.split(line)[1:]
    for page in ("README.md", "presets/README.md")
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "experiments" / page).read_text(), flags=re.DOTALL)
    for line in block.splitlines()
]
"""What the pages of experiments/ show, without `python`."""


@pytest.mark.parametrize("command", [each for each in COMMANDS if "train_" not in each[0]], ids=" ".join)
def test_the_commands_that_are_shown_start_as_typed(command, tmp_path):
    """Tables are shown and not made; there is no run yet to lay over a curve."""
    is_table = command[0] in ("experiments/compare.py", "experiments/ablate.py")
    more = ["--dry-run", f"output_dir={tmp_path / 'out'}"] if is_table else []
    done = run_forked(*command, *more)
    expected = 2 if command[0] == "experiments/compare_run.py" else 0
    assert done.returncode == expected, done.stderr
    if expected == 2:
        assert "runs/cpu_30min is no output folder of a training" in done.stderr
    if is_table:
        lines = [line for line in done.stdout.splitlines() if line.startswith("    python train_")]
        table = load_config(TableConfig, None, [word for word in command[1:] if word.endswith(".yaml")])
        assert len(lines) == len(table.trainings), done.stdout


@pytest.mark.parametrize(
    "tables",
    [
        ["four_methods"],
        ["four_methods", "camvid"],
        ["paper_choices"],
        ["paper_choices", "camvid"],
        ["finetuning"],
        ["finetuning_camvid"],
        ["finetuning_detection"],
    ],
    ids=str,
)
def test_the_scores_of_the_shipped_tables_are_of_their_evaluations(tables, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = load_config(TableConfig, None, [f"experiments/{name}.yaml" for name in tables])
    for name, entry in table.evaluations.items():
        check_evaluation(name, entry)
    methods = {"knn_avg_patch", "logreg_avg_patch", "few_label_avg_patch", "linear_avg_patch", "attentive_patch"}
    methods |= {"knn", "logreg", "finetuned"}  # of segmentation, and of what was trained on
    for place in table.scores.values():
        evaluation, method, _ = place.split("/")
        assert evaluation in table.evaluations and method in methods, place


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


# Presets.

PRESETS = ROOT / "experiments" / "presets"
TABLE = re.findall(
    r"^\| `(\w+)` \| `(configs/\w+\.yaml)` \| ([\d,]+) \| ([\d,]+) \| [^|]+ \| ([^|]+) \|$",
    (PRESETS / "README.md").read_text(), flags=re.MULTILINE,
)  # fmt: skip
"""Name, configuration, images seen, images in the data set, files or `not run`."""


def test_every_preset_is_in_the_table_with_what_was_run():
    assert {row[0] for row in TABLE} == {path.stem for path in PRESETS.glob("*.yaml")}
    for name, *_, run in TABLE:
        files = re.findall(r"`([\w.]+)`", run)
        assert sorted(path.name for path in PRESETS.glob(f"{name}.*.json*")) == sorted(files)
        assert bool(files) != (run == "not run")


@pytest.mark.parametrize(
    ("name", "config", "images", "dataset_images"), [row[:4] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_a_preset_follows_the_rule(name, config, images, dataset_images, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [config, f"experiments/presets/{name}.yaml"])
    follows = rule.recommended(*(int(number.replace(",", "")) for number in (images, dataset_images)), cfg.num_patches)
    num_processes = cfg.launcher.num_nodes * cfg.launcher.num_tasks_per_node
    assert cfg.optim.batch_size_per_gpu * cfg.optim.accumulation_steps * num_processes == follows["optim"].pop(
        "batch_size_per_gpu"
    )
    has = asdict(cfg)
    different = {key: pair for key, pair in changed_keys(has, follows).items() if pair[1] is not None}
    assert not different, "preset, rule"


@pytest.mark.parametrize(("name", "config"), [row[:2] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_command_of_a_preset_passes_a_dry_run(name, config, tmp_path, monkeypatch, capsys):
    (command,) = re.findall(r"^#   python (\S+ .+)$", (PRESETS / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    script, *sources = shlex.split(command)
    assert script in ("train_capi.py", "train_distributed.py") and sources[0] == config
    monkeypatch.chdir(ROOT)
    images = f"data.dataset={make_images(tmp_path / 'images')}"
    if script == "train_distributed.py":
        assert train_distributed.main([*sources, images, "--dry-run"]) == 0
        assert "#SBATCH --gpus-per-node=8" in capsys.readouterr().out
        sources.append("optim.accumulation_steps=32")  # one process for eight
    assert train_capi.main([*sources, images, f"train.output_dir={tmp_path}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "warning" not in shown, shown


def test_the_rule_gives_the_published_recipe_at_the_published_length():
    published = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [])
    follows = rule.recommended(500_000 * 16_384, 14_197_087, 256)
    follows["optim"].pop("batch_size_per_gpu")
    follows.pop("data")  # the authors recommend another value than they used
    different = {key: pair for key, pair in changed_keys(asdict(published), follows).items() if pair[1] is not None}
    assert not different


def test_the_rule_is_printed_as_a_configuration(tmp_path, capsys):
    assert rule.main(["--images", "76800", "--dataset-images", "9469", "--patches", "64"]) == 0
    (tmp_path / "rule.yaml").write_text(capsys.readouterr().out)
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(tmp_path / "rule.yaml")])
    assert (cfg.optim.total_iters, cfg.capi.num_clusters) == (600, 512)
    assert rule.main(["--images", "76800", "--dataset-images", "50000", "--patches", "16"]) == 0
    (tmp_path / "rule.yaml").write_text(capsys.readouterr().out)
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(tmp_path / "rule.yaml")])
    assert cfg.data.prediction_subsampling == 1, "there are fewer hidden patches than should be predicted"
    assert rule.main(["--images", "10", "--dataset-images", "9469"]) == 2
    assert "10 images of 9469 are too few" in capsys.readouterr().err
    assert rule.main(["--images", "76800", "--dataset-images", "9469", "--patches", "0"]) == 2
    assert "--patches=0: must be at least 1" in capsys.readouterr().err


# A run beside the curve of a preset.

SMALL = [
    "train.device=cpu", "train.log_loss_every=3", "train.health_every=3", "optim.batch_size_per_gpu=32",
    "optim.total_iters=30", "optim.lr_schedule.base_value=2e-3", "capi.num_clusters=32",
    "capi.clustering_optimizer.lr_schedule.base_value=1e-2", "optim.momentum_schedule.start_warmup_value=0.95",
    "optim.momentum_schedule.base_value=0.95", "data.images_size=32", "data.prediction_subsampling=0.5",
    "model.patch_size=8", "model.n_registers=4", "model.transformers_kwargs.embed_dim=64",
    "model.transformers_kwargs.drop_path_rate=0", "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=2",
    "model.encoder_kwargs.depth=2", "model.decoder_kwargs.depth=1", "efficiency.param_dtype=float32",
    "efficiency.dataloader_num_workers=0", "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true", "efficiency.rematerialization.enabled=false", "evals=null",
]  # fmt: skip
"""A training of seconds on the images of the demo."""


@pytest.fixture(scope="module")
def train_small(tmp_path_factory):
    """Trains on flower beds, in a folder of its own, which it returns."""
    root = tmp_path_factory.mktemp("small")
    draw = import_from_path(ROOT / "demo_data" / "flower_beds.py").draw
    (root / "beds").mkdir()
    for number in range(100):
        image, _ = draw(np.random.default_rng(number), 1 + number % 10)
        Image.fromarray(image).save(root / "beds" / f"{number:02d}.png")

    def train(name: str, *overrides: str) -> Path:
        own = [f"data.dataset={root}/beds", f"train.output_dir={root / name}", *overrides]
        assert train_capi.main([*SMALL, *own]) == 0
        return root / name

    return train


@pytest.fixture(scope="module")
def good(train_small):
    return train_small("good")


def test_a_run_with_another_seed_stays_in_the_bands(good, train_small, capsys):
    assert compare_run.main([str(train_small("other_seed", "train.seed=1")), "--preset", str(good)]) == 0
    assert "all that is logged stays in its band" in capsys.readouterr().out


def momentum(**values: float) -> list[str]:
    return [f"optim.momentum_schedule.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(
    ("overrides", "left", "meaning"),
    [
        (
            ["optim.lr_schedule.base_value=0.3"],
            "effective rank of the teacher's features / width is below its band",
            "A learning rate",
        ),
        (
            ["capi.num_clusters=1024"],
            "share of the prototypes in use is below its band",
            "Too few images for the prototypes",
        ),
        (
            momentum(start_warmup_value=0.9999, base_value=0.9999),
            "1 - m is below its band",
            "A teacher that moves too slowly",
        ),
        (
            [*momentum(start_warmup_value=0, base_value=0, final_value=0), "optim.lr_schedule.base_value=4e-3"],
            "effective rank of the teacher's features / width is below its band",
            "Collapse",
        ),
    ],
    ids=["learning rate", "prototypes", "slow teacher", "collapse"],
)
def test_what_ails_a_run_that_was_made_to_fail_is_told(overrides, left, meaning, good, train_small, request, capsys):
    run = train_small(request.node.callspec.id.replace(" ", "_"), *overrides)
    assert compare_run.main([str(run), "--preset", str(good)]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"^  step \d+: .*{re.escape(left)}: ", said, re.MULTILINE), said
    assert re.search(rf"^{meaning}", said, re.MULTILINE), said
    differ = set(re.findall(r"^  ([\w.]+): \S+ instead of", said, re.MULTILINE))
    assert differ == {override.partition("=")[0] for override in overrides}


IMAGENETTE = str(ROOT / "configs" / "imagenette.yaml")
LONG_RUN = ROOT / "experiments" / "measured" / "long_run"


def folder_of(tmp_path: Path, curve: Path, *overrides: str) -> Path:
    """A curve in the form of a run's folder."""
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [IMAGENETTE, f"{curve}.yaml", *overrides])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    (tmp_path / "metrics.jsonl").write_text(Path(f"{curve}.metrics.jsonl").read_text())
    return tmp_path


def change_metrics(run: Path, **changes: Callable[[float], float | None]) -> None:
    """Change what a run has logged, by key."""
    records = [
        {key: changes.get(key, lambda same: same)(value) for key, value in record.items()}
        for record in read_metrics(run / "metrics.jsonl")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_is_laid_over_the_preset_that_is_nearest_to_it(tmp_path, capsys):
    run = folder_of(tmp_path, PRESETS / "cpu_30min")
    assert compare_run.main([str(run)]) == 0
    assert f"{run} beside preset cpu_30min, 15 lines up to step 600" in capsys.readouterr().out
    change_metrics(run, teacher_rank=lambda _: None)
    assert compare_run.main([str(run), "--preset", "cpu_30min"]) == 1
    assert "step 200: effective rank of the teacher's features / width is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(("shrunk", "code"), [(1, 0), (2, 1)])
def test_a_good_run_of_another_width_has_not_collapsed_and_one_of_half_its_rank_has(shrunk, code, tmp_path, capsys):
    run = folder_of(tmp_path, LONG_RUN)
    change_metrics(run, teacher_rank=lambda rank: rank / shrunk)
    assert compare_run.main([str(run)]) == code
    said = capsys.readouterr().out
    assert "beside preset gpu_10min" in said, "of width 384 instead of 128"
    assert ("Collapse" in said) == bool(code)


@pytest.mark.parametrize(
    "override",
    ["capi.num_clusters=64", "model.encoder_kwargs.depth=3", "data.mask_ratio=0.5", "efficiency.param_dtype=bfloat16"],
    ids=["of the preset", "of its configuration", "of the defaults", "of the precision"],
)
def test_every_key_that_shapes_a_training_is_told_where_it_differs(override, tmp_path, capsys):
    idle = ["data.dataset=/my/images", "train.log_loss_every=3", "efficiency.dataloader_num_workers=0"]
    run = folder_of(tmp_path, PRESETS / "cpu_30min", *idle, override)
    change_metrics(run, lr=lambda lr: 10 * lr)
    assert compare_run.main([str(run), "--preset", "cpu_30min"]) == 1
    differ = re.findall(r"^  ([\w.]+): (\S+) instead of", capsys.readouterr().out, re.MULTILINE)
    assert ["=".join(pair).replace("'", "") for pair in differ] == [override]


@pytest.mark.parametrize(("processes", "batch"), [(1, 512), (4, 128), (4, 64), (None, 128)])
@pytest.mark.parametrize("told_by", ["log", "checkpoint"])
def test_images_per_prototype_are_those_of_all_processes(processes, batch, told_by, tmp_path, capsys):
    run = folder_of(tmp_path, PRESETS / "gpu_10min", f"optim.batch_size_per_gpu={batch}")
    if processes and told_by == "log":
        start = "12:00:00 I training: torch 2 on cpu (x), {} process(es), code 0123abc\n"
        (run / "log.txt").write_text(start.format(1) + start.format(processes))
    elif processes:
        (run / "checkpoints" / "step_000000003").mkdir(parents=True)
        state = {"world_size": processes}
        (run / "checkpoints" / "step_000000003" / "state.json").write_text(json.dumps(state))
    change_metrics(run, target_entropy_rel=lambda entropy: 3 * entropy)
    assert compare_run.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert "beside preset gpu_10min" in said or processes is None
    is_short = processes is not None and processes * batch < 512
    assert ("Too few images for the prototypes" in said) == is_short
    assert ("images of an update: 256 instead of 512" in said) == is_short
    assert ("on how many processes it trained is unknown" in said) == (processes is None)


@pytest.mark.parametrize(("processes", "nearest"), [(1, "cpu_30min"), (32, "gpu_10min")])
def test_the_nearest_preset_has_about_as_many_images_as_all_processes(processes, nearest, tmp_path, capsys):
    run = folder_of(tmp_path, PRESETS / "cpu_30min")
    (run / "log.txt").write_text(f"12:00:00 I training: torch 2 on cpu (x), {processes} process(es), code 0123abc\n")
    compare_run.main([str(run)])
    assert f"beside preset {nearest}" in capsys.readouterr().out


def test_losses_are_not_judged_where_they_mean_something_else(tmp_path, capsys):
    factors = {"capi_loss": 0.01, "clustering_loss": 100, "grad_norm": 0.01}
    run = folder_of(tmp_path, PRESETS / "cpu_30min", "capi.targets=ema_head")
    change_metrics(run, **{key: lambda value, by=by: by * value for key, by in factors.items()})
    assert compare_run.main([str(run), "--preset", "cpu_30min"]) == 0
    said = capsys.readouterr().out
    assert "capi.targets: 'ema_head' instead of 'clustering', so these are not compared: " in said
    assert "student's loss / log K, clustering loss / log K, norm of the student's gradient" in said
    folder_of(tmp_path, PRESETS / "cpu_30min", "capi.targets=clustering")
    change_metrics(run, capi_loss=lambda loss: 0.01 * loss)
    assert compare_run.main([str(run), "--preset", "cpu_30min"]) == 1
    assert "so these are not compared" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--preset", "gpu_1h"], "--preset gpu_1h: it was not run, so there is no curve to compare with"),
        (["RUN", "--preset", "gpu_1our"], "there is no such preset, and no such folder; did you mean gpu_1h?"),
        (["nowhere"], "nowhere is no output folder of a training"),
    ],
)
def test_what_there_is_no_curve_for_is_told(arguments, message, good, capsys):
    assert compare_run.main([word.replace("RUN", str(good)) for word in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_kept_is_a_preset_that_later_runs_are_compared_with(processes, tmp_path, monkeypatch, capsys):
    run = folder_of(tmp_path, PRESETS / "cpu_30min", "capi.num_clusters=256")
    (run / "log.txt").write_text(f"12:00:00 I training: torch 2 on cpu (x), {processes} process(es), code 0123abc\n")
    presets = tmp_path / "presets"
    presets.mkdir()
    shutil.copy(PRESETS / "cpu_30min.metrics.jsonl", presets / "a_curve_alone.metrics.jsonl")
    monkeypatch.setattr(compare_run, "PRESETS", presets)
    for _ in range(2):
        assert compare_run.main([str(run), "--keep-as", "mine"]) == 0
    for named in ([], ["--preset", "mine"]):
        assert compare_run.main([str(run), *named]) == 0
        assert "beside preset mine, " in capsys.readouterr().out
    kept, own = compare_run.read_preset("mine"), compare_run.read_run(run)
    assert kept.images_per_step == own.images_per_step == 128 * processes
    other = {key for key in changed_keys(own.config, kept.config) if not key.startswith("launcher.")}
    assert other == {"train.output_dir"}
    before = sorted(presets.iterdir()), (presets / "mine.metrics.jsonl").read_text()
    folder_of(tmp_path, PRESETS / "cpu_30min", "capi.num_clusters=128")
    change_metrics(run, lr=lambda lr: 2 * lr)
    assert compare_run.main([str(run), "--keep-as", "mine"]) == 2
    assert "there is a preset of that name, with other keys (capi.num_clusters)" in capsys.readouterr().err
    assert compare_run.main([str(run), "--keep-as", "sub/mine"]) == 2
    assert "--keep-as sub/mine: " in capsys.readouterr().err
    assert before == (sorted(presets.iterdir()), (presets / "mine.metrics.jsonl").read_text())


def test_a_curve_that_is_kept_is_thin_and_without_what_depends_on_the_machine(good, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_run, "PRESETS", tmp_path)
    monkeypatch.setattr(compare_run, "MOST_RECORDS", 4)
    assert compare_run.main([str(good), "--keep-as", "mine"]) == 0
    records = read_metrics(tmp_path / "mine.metrics.jsonl")
    assert [record["step"] for record in records] == [3, 12, 21, 30]
    assert "capi_loss" in records[0] and "images_per_s" not in records[0]
