"""bench/results.py, and that bench/README.md shows what bench/results.jsonl holds."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import run_forked
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))

import results


def arguments(tmp_path, *words):
    parser = argparse.ArgumentParser()
    results.add_arguments(parser)
    return parser.parse_args(["--results", str(tmp_path / "new" / "r.jsonl"), *words])


def test_a_recorded_line_says_what_was_measured_where(tmp_path):
    args = arguments(tmp_path)
    results.record(args, "step", {"batch": 4}, [{"what": "eager", "ms": 1.5}, {"what": "compiled", "ms": None}])
    results.record(args, "step", {"batch": 8}, [{"what": "eager", "ms": 2.5}])
    first, second = map(json.loads, args.results.read_text().splitlines())
    assert first["numbers"] == [{"what": "eager", "ms": 1.5}, {"what": "compiled", "ms": None}]
    assert second["settings"] == {"batch": 8}
    assert set(first) == {"bench", "date", "hardware", "commit", "versions", "settings", "numbers"}
    assert first["versions"]["torch"]
    assert "core" in first["hardware"] or "GiB" in first["hardware"]


class Gpu:
    total_memory = 80 * 2**30


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", "core"), ("cuda", "a GPU, 80 GiB"), (None, "a GPU, 80 GiB")], ids=str
)
def test_where_it_was_measured_is_the_device_and_not_what_else_the_machine_has(device, names, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(results, "pick_device", lambda _: torch.device("cuda"))
    args = arguments(tmp_path)
    results.record(args, "step", {}, [{"what": "eager"}], device=None if device is None else torch.device(device))
    (line,) = map(json.loads, args.results.read_text().splitlines())
    assert names in line["hardware"]


RECORD = """
import argparse, sys
sys.path.insert(0, "bench")
import results
parser = argparse.ArgumentParser()
results.add_arguments(parser)
results.record(parser.parse_args([]), "step", {}, [{"what": "eager"}])
results.write_readme(results.RESULTS, results.README)
print(results.README.read_text())
"""


def test_a_recorded_commit_is_that_of_the_code_whatever_was_recorded_before(tmp_path):
    (tmp_path / "bench").mkdir()
    for name in (
        "utils.py",
        "config.py",
        "distributed.py",
        "default_eval_config.py",
        "bench/results.py",
        "bench/README.md",
        "bench/results.jsonl",
    ):
        shutil.copy(ROOT / name, tmp_path / name)

    def git(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")

    def recorded():
        done = run_forked("-c", RECORD, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "bench" / "results.jsonl").read_text().splitlines()[-1])["commit"], done.stdout

    commit = git("rev-parse", "HEAD")
    for _ in range(2):
        assert recorded()[0] == commit
    with (tmp_path / "utils.py").open("a") as file:
        file.write("CHANGED = 1\n")
    changed, readme = recorded()
    assert changed == f"{commit}+changes"
    assert f"code {commit[:10]}+changes" in readme


def test_the_newest_line_of_each_setting_and_device_is_shown(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    for hardware, batch, ms in (("CPU", 4, 1.0), ("GPU", 4, 0.1), ("CPU", 8, 2.0), ("CPU", 4, 1234.5)):
        monkeypatch.setattr(results, "hardware", lambda _, name=hardware: name)
        results.record(args, "step", {"batch": batch}, [{"what": "eager", "ms": ms, "MFU": None}])
    found = results.newest(args.results)
    assert [(line["hardware"], line["settings"]["batch"]) for line in found] == [("CPU", 4), ("GPU", 4), ("CPU", 8)]
    text = results.markdown(found)
    assert "| eager | 1234 | not measured |" in text
    assert "| eager | 1 |" not in text, "an older line of the same settings"


def test_a_bar_in_a_cell_is_no_border_of_it():
    line = {"bench": "pca", "date": "", "hardware": "", "versions": {}, "commit": None, "settings": {}}
    text = results.markdown([line | {"numbers": [{"way": "ours", "against": "|cosine| >= 1"}]}])
    assert "| ours | \\|cosine\\| >= 1 |" in text


def test_the_readme_changes_between_its_marks_alone(tmp_path):
    args = arguments(tmp_path)
    results.record(args, "step", {}, [{"what": "eager"}])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.MARKS[0]}\nold\n{results.MARKS[1]}\nafter\n")
    results.write_readme(args.results, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| eager |" in text
    assert "old" not in text


def test_bench_readme_shows_the_newest_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(results.README.read_text())
    results.write_readme(results.RESULTS, copy)
    assert copy.read_text() == results.README.read_text(), "run: python bench/results.py"


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "bench").glob("*") if p.suffix in (".py", ".sh")))
def test_the_readme_names_every_script(script):
    assert f"`{script}`" in results.README.read_text() or f"bench/{script}" in results.README.read_text()
