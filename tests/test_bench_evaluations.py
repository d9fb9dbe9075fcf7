"""bench/evaluations.py as it is typed, on small sizes."""

import json

import pytest
from commands import run_forked


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


def test_an_unknown_part_is_named(tmp_path):
    done = run_forked("bench/evaluations.py", "knm", "--results", str(tmp_path / "results.jsonl"))
    assert done.returncode == 2
    assert "parts=knm: unknown; choose from knn, logreg, linear, attentive, pca" in done.stderr
    assert not (tmp_path / "results.jsonl").exists()
