"""bench/evaluations.py as it is typed, on small sizes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import run_forked
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))

import evaluations
from evaluations import Part, Way, measure


@pytest.mark.long
def test_ours_and_the_straightforward_way_agree(tmp_path):
    results = tmp_path / "results.jsonl"
    sizes = ["--scale", "0.0005", "--repeats", "1", "--results", str(results)]
    done = run_forked("bench/evaluations.py", "knn", "pca", *sizes)
    assert done.returncode == 0, done.stderr
    knn, pca = (json.loads(line) for line in results.read_text().splitlines())
    rows = {(line["bench"], row["way"]): row for line in (knn, pca) for row in line["numbers"]}
    assert rows["evaluations, knn", "straightforward"]["against ours"] == "100.0000% of labels equal"
    assert rows["evaluations, pca", "linalg.svd"]["against ours"] == "|cosine| >= 1.000000"
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "straightforward" in done.stdout, "the table is printed"


@pytest.mark.skipif(not evaluations.REFERENCES.exists(), reason="the system does not tell the peak of a process")
def test_added_memory_is_that_of_a_way_whatever_was_freed_before_and_of_its_largest_turn(monkeypatch):
    between: list[bytearray] = []
    turns = iter(range(3))

    def hold() -> int:
        """100 MB in small pieces; what is kept after them keeps their memory in the process when they are freed."""
        pieces = [bytearray(100_000) for _ in range(1000)]
        between.append(bytearray(100_000))
        return len(pieces)

    def once() -> int:
        return hold() if next(turns) == 0 else 0

    rates = SimpleNamespace(measure=lambda: None, flops={torch.float32: [1.0]}, bandwidth=[1.0])
    monkeypatch.setattr(evaluations, "Rates", lambda *_: rates)
    ways = [Way(name, run, 1.0, 1.0) for name, run in (("first", hold), ("again", hold), ("once", once))]
    rows = measure("memory", Part({}, ways, lambda *_: ""), 3, torch.device("cpu"))
    for row in rows:
        assert row["added GiB"] == pytest.approx(1e8 / 2**30, rel=0.2), row["way"]


def test_an_unknown_part_is_named(tmp_path):
    done = run_forked("bench/evaluations.py", "knm", "--results", str(tmp_path / "results.jsonl"))
    assert done.returncode == 2
    assert "parts=knm: unknown; choose from knn, logreg, linear, attentive, pca" in done.stderr
    assert not (tmp_path / "results.jsonl").exists()
