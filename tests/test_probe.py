"""probe.py: what it finds out, on how many ranks, and what it does to a training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_same_run, make_images, metrics_of, run_main, tiny
from conftest import seeded
from PIL import Image
from ranks import run_on_ranks
from samples import make_config
from sklearn.linear_model import Ridge

from config import ProbeConfig
from probe import RIDGE, Probe, ridge_scores
from utils import UserError


def make_classes(folder, num=8):
    """A folder per class, whose images have a colour."""
    rng = np.random.default_rng(0)
    for name, color in (("red", (200, 20, 20)), ("blue", (20, 20, 200)), ("grey", (120, 120, 120))):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            pixels = np.clip(np.array(color) + rng.normal(0, 10, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"torchvision://ImageFolder?root='{folder}'"


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    return make_classes(root / "train"), make_classes(root / "test", num=3)


def make_probe(urls, **changes):
    keys = {"every": 1, "train_dataset": urls[0], "test_dataset": urls[1], "max_images": 1000, "k": 5} | changes
    return Probe(ProbeConfig(**keys), images_size=16, batch_size=4, device=torch.device("cpu"))


def colors(images):
    return images.flatten(2).transpose(1, 2)  # every pixel is a patch whose features are its colour


def linked(root, source, names):
    """A folder with some of the classes of another one, under other names."""
    root.mkdir()
    for name, old in names.items():
        (root / name).symlink_to(source / old)
    return f"torchvision://ImageFolder?root='{root}'"


def folder_of(url):
    return Path(url.split("'")[1])


@pytest.mark.parametrize("lacking", ["test", "train"])
def test_classes_are_matched_by_name_where_a_set_lacks_one(urls, tmp_path, lacking, caplog):
    # Sorted, they are blue, grey, red: without blue, grey is class 0 and red is class 1.
    some = linked(tmp_path / "some", folder_of(urls[lacking == "test"]), {"grey": "grey", "red": "red"})
    if lacking == "train":
        with pytest.raises(UserError, match=r"its class blue is not a class of train\.probe\.train_dataset="):
            make_probe((some, urls[1]))
        return
    scores = make_probe((urls[0], some))(colors)
    assert scores["probe_knn"] == 1.0 and scores["probe_linear"] == 1.0
    assert not caplog.records


def test_classes_with_other_names_are_matched_by_number_and_that_is_said(urls, tmp_path, caplog):
    renamed = linked(tmp_path / "test", folder_of(urls[1]), {"a": "blue", "b": "grey", "c": "red"})
    assert make_probe((urls[0], renamed))(colors)["probe_knn"] == 1.0
    assert "matched by number" in caplog.text


def test_labels_of_a_table_are_matched_by_name(urls, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    names = ["red", "grey", "blue"]
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "label": names.index(path.parent.name)}
        for path in sorted(folder_of(urls[1]).rglob("*.png"))
    ]
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    datasets.Dataset.from_list(rows, features=datasets.Features(columns)).to_parquet(tmp_path / "test.parquet")
    table = f"hf://parquet?data_files='{tmp_path}/test.parquet'&split='train'&tgt_field='label'"
    assert make_probe((urls[0], table))(colors)["probe_knn"] == 1.0


def one_number(images):
    return torch.ones(len(images), 4, 8)


def test_features_that_tell_the_classes_apart_score_high(urls):
    scores = make_probe(urls)(colors)
    assert scores["probe_knn"] == 1.0 and scores["probe_linear"] == 1.0


def test_features_that_tell_nothing_score_like_a_guess(urls):
    scores = make_probe(urls)(one_number)
    assert scores["probe_knn"] == pytest.approx(1 / 3) and scores["probe_linear"] == pytest.approx(1 / 3)


def test_the_linear_scores_are_those_of_ridge_regression():
    x, y, q = (torch.randn(n, 6, generator=seeded(n)) for n in (40, 41, 9))
    labels = y[:40].argmax(1)
    centred = x - x.mean(0)
    alpha = RIDGE * float((centred.T @ centred).diagonal().mean())
    expected = Ridge(alpha=alpha).fit(x.numpy(), torch.nn.functional.one_hot(labels, 6).numpy()).predict(q.numpy())
    torch.testing.assert_close(ridge_scores(x, labels, q, 6), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def probe_on_rank(urls):
    seen = []

    def watched(images):
        seen.append(len(images))
        return colors(images)

    return make_probe(urls)(watched), seen


def test_ranks_share_the_images_and_score_the_same(urls):
    alone, _ = probe_on_rank(urls)
    shares = run_on_ranks(probe_on_rank, 3, urls)
    for scores, seen in shares:
        assert {k: v for k, v in scores.items() if k != "probe_s"} == {k: v for k, v in alone.items() if k != "probe_s"}
        assert seen == shares[0][1], "ranks that encode more often than others would wait for them forever"
        assert sum(seen) == 24 // 3 + 9 // 3


def test_training_is_the_same_with_a_probe_and_the_scores_are_in_its_metrics(urls, tmp_path):
    images = make_images(tmp_path / "images")
    probe = [f"train.probe.train_dataset={urls[0]}", f"train.probe.test_dataset={urls[1]}"]
    assert run_main(tiny(images, tmp_path / "without")) == 0
    assert run_main(tiny(images, tmp_path / "with", "train.probe.every=4", *probe)) == 0
    records = [r for r in metrics_of(tmp_path / "with") if "probe_knn" in r]
    assert [r["step"] for r in records] == [4, 6]
    assert all(0 <= r["probe_linear"] <= 1 for r in records)
    lines = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "with" / "metrics.jsonl").write_text("".join(line for line in lines if "probe_knn" not in line))
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataset": None}, ("train.probe.train_dataset", "data URL")),
        ({"test_dataset": "nowhere"}, ("train.probe.test_dataset=nowhere", "does not exist")),
    ],
)
def test_mistakes_name_the_key(urls, changes, words):
    with pytest.raises(UserError) as caught:
        make_probe(urls, **changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_probe_of_no_neighbours_is_refused():
    with pytest.raises(UserError, match=r"train\.probe\.k=0"):
        make_config("train.probe.k=0")


def test_images_without_class_labels_are_refused(urls, tmp_path):
    with pytest.raises(UserError, match="has the label None; a probe needs class numbers"):
        make_probe(urls, train_dataset=str(make_images(tmp_path / "images")))
