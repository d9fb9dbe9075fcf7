import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, run_cli, seeded
from figures import panels
from PIL import Image

import benchmark
import demo
import eval_segmentation
import eval_visualizations
import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from demo_data import flower_beds
from reading.sources import make_dataset
from train_capi import CapiConfig

SMALL = [
    "optim.total_iters=2",
    "optim.batch_size_per_gpu=4",
    "train.log_loss_every=1",
    "model.encoder_kwargs.depth=1",
    "model.decoder_kwargs.depth=1",
    "model.transformers_kwargs.embed_dim=32",
    "capi.num_clusters=8",
    "efficiency.dataloader_num_workers=0",
]


GOLDEN = [
    [78.63, 113.62, 52.79, 104.72, 78.37, 38.71, 129.03, 120.56, 51.41, 56.28, 114.61, 38.30, 100.72, 60.19,
     40.51, 77.10, 70.40, 36.42, 64.44, 130.43, 52.19, 69.04, 117.55, 53.02, 101.41, 140.86, 50.44, 3703],
    [57.53, 112.90, 50.12, 71.95, 123.74, 55.25, 63.00, 129.82, 52.88, 107.97, 99.46, 90.56, 157.65, 83.45,
     115.97, 70.25, 111.93, 52.57, 123.23, 87.25, 82.93, 135.69, 71.57, 114.45, 97.00, 144.33, 51.23, 4305],
]  # fmt: skip
"""Mean colours of nine squares of two images, and how many pixels are of the bed."""


def draw(mix: int = 1, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    return flower_beds.draw(np.random.default_rng([0, *seed]), mix)


# The images.


def test_two_mixes_share_at_most_one_colour_and_a_colour_occurs_in_three():
    mixes = [set(mix.split("-")) for mix in flower_beds.MIXES]
    assert len(mixes) == 10
    assert all(len(mix) == 3 for mix in mixes)
    assert max(len(a & b) for i, a in enumerate(mixes) for b in mixes[:i]) == 1
    assert {sum(colour in mix for mix in mixes) for colour in flower_beds.COLOURS} == {3}


def test_the_mask_is_where_the_flowers_of_the_mix_are():
    for mix in range(1, 11):
        image, mask = draw(mix, mix)
        assert image.shape == (96, 96, 3)
        assert set(np.unique(mask)) == {0, mix}
        # Leaves and soil are green, no flower is; soil shows between flowers too.
        pixels = image.astype(int)
        is_green = (pixels[..., 1] > pixels[..., 0] + 15) & (pixels[..., 1] > pixels[..., 2] + 15)
        # Not along the border, over which flowers hang by up to a radius.
        inner, outer = (np.asarray(_shrunk(mask == value)) for value in (mix, 0))
        assert inner.sum() > 300
        assert outer.sum() > 300
        assert is_green[outer].mean() > 0.9, flower_beds.CLASSES[mix]
        assert is_green[inner].mean() < 0.25, flower_beds.CLASSES[mix]


def _shrunk(where: np.ndarray, by: int = 11) -> np.ndarray:
    from scipy.ndimage import binary_erosion

    return binary_erosion(where, iterations=by, border_value=1)


def test_images_do_not_depend_on_versions_of_the_libraries():
    # A rounding that falls differently moves a mean by less than 0.1.
    for seed, numbers in enumerate(GOLDEN):
        image, mask = draw(1 + seed, seed)
        cells = image.reshape(3, 32, 3, 32, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(cells.ravel(), numbers[:-1], atol=0.1)
        assert int((mask > 0).sum()) == pytest.approx(numbers[-1], abs=3)


@pytest.fixture(scope="module")
def beds(tmp_path_factory):
    """A small data set, as the demo draws it."""
    folder = tmp_path_factory.mktemp("beds") / "flower beds"
    flower_beds.write(folder, 3, {"train": 20, "val": 10}, processes=2)
    return folder


def test_any_number_of_processes_draws_the_same_files(beds, tmp_path):
    flower_beds.write(tmp_path / "again", 3, {"train": 20, "val": 10}, processes=1)
    flower_beds.write(tmp_path / "other", 4, {"train": 20, "val": 10}, processes=1)
    names = sorted(str(path.relative_to(beds)) for path in beds.rglob("*.*"))
    assert len(names) == 2 * 30 + 2
    for name in names:
        assert (beds / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
        if name.endswith("jpg"):
            assert (beds / name).read_bytes() != (tmp_path / "other" / name).read_bytes(), "the seed does nothing"
    drawn = [path.read_bytes() for path in beds.rglob("*.jpg")]
    assert len(set(drawn)) == len(drawn), "held-out images are among the training images"


def test_the_data_set_reads_as_segmentation_and_as_class_folders(beds):
    dataset: Any = make_dataset(f"custom://Segmentation?root='{beds}/val'")
    folders: Any = make_dataset(f"torchvision://ImageFolder?root='{beds}/val/images'")
    assert dataset.class_names == ["lawn", *folders.class_names]
    assert len(dataset) == len(folders) == 10
    for i in range(10):
        mask = np.asarray(dataset[i].target())
        assert np.array_equal(np.unique(mask), [0, 1 + folders[i].target()])
        assert np.array_equal(dataset[i].image(), folders[i].image())


def test_a_drawn_folder_is_kept_and_another_request_is_refused(beds, capsys):
    before = {path: path.stat().st_mtime_ns for path in beds.rglob("*")}
    assert flower_beds.main([str(beds), "--seed=3", "--train=20", "--val=10"]) == 0
    assert {path: path.stat().st_mtime_ns for path in beds.rglob("*")} == before
    with pytest.raises(SystemExit) as ended:
        flower_beds.main([str(beds), "--seed=4", "--train=20", "--val=10"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "'seed': 3" in message
    assert "remove it or give another folder" in message


def test_a_data_set_without_images_is_not_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit):
        flower_beds.main([str(tmp_path / "new"), "--train=20", "--val=3"])
    assert "val: 3 images are too few for one of each of 10 mixes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        flower_beds.main([str(tmp_path)])
    assert "has other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_drawing_is_begun_again(beds, tmp_path):
    (tmp_path / "train" / "images" / "old").mkdir(parents=True)
    (tmp_path / "train" / "images" / "old" / "0.jpg").write_text("half")
    flower_beds.write(tmp_path, 3, {"train": 10, "val": 10}, processes=1)
    assert len(list((tmp_path / "train").rglob("*.jpg"))) == 10


# The story.


def in_this_process(script: str, *arguments: str) -> int:
    """What `demo.run` does, without starting processes that import torch."""
    if script == demo.DRAWING:
        return flower_beds.main(arguments)
    scripts = {"train_capi.py": train_capi, "benchmark.py": benchmark, "eval_visualizations.py": eval_visualizations}
    return scripts[script].main(list(arguments))


def evaluate_here(task: benchmark.Task, nproc_per_node: int) -> benchmark.Status:
    task.write_state()
    (task.folder / "config.yaml").write_text(json.dumps(task.config))
    return benchmark.Status("failed" if eval_segmentation.main([str(task.folder / "config.yaml")]) else "done")


@pytest.fixture(scope="module")
def ran(beds, tmp_path_factory):
    """Folder, exit code and terminal of a demo at a tiny size."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(demo, "run", in_this_process)
        patch.setattr(benchmark, "run_here", evaluate_here)
        patch.chdir(ROOT)
        arguments = ["--output-dir", str(folder), "--data", str(beds), "--data-seed=3", "--train-images=20"]
        code = demo.main([*arguments, "--val-images=10", *SMALL])
    return folder, code, told.getvalue()


@pytest.mark.long
def test_the_demo_ends_with_the_numbers_of_the_results_the_times_and_the_files(ran):
    folder, code, told = ran
    assert code == 0
    (sentence,) = [line for line in told.splitlines() if line.startswith("With ten labelled images")]
    content = json.loads((folder / "evaluation" / "results.json").read_text())
    assert list(content["compared"]) == ["raw pixels", "colour histogram"]
    models = (content["evaluations"], content["random"], *content["compared"].values())
    scores = [f"{100 * demo.few_label_score(model):.1f} %" for model in models]
    words = ("the trained model", "random weights", "raw pixels", "a hand-made histogram of colours")
    places = [sentence.index(f"{score} by {what}") for score, what in zip(scores, words, strict=True)]
    assert places == sorted(places)
    assert "10 held-out images" in sentence
    after = told[told.index(sentence) :]
    assert "mix of three colours by construction" in after
    for part in ("drawing the images", "training", "evaluation", "pictures", "in all"):
        assert part in after
    for name in ("evaluation/report.html", "ten_labels.png", "neighbours.png", "predictions.png", "curves.png",
                 "metrics.jsonl", "student_ema.pth", "checkpoints/step_000000002"):  # fmt: skip
        assert (folder / name).exists()
        assert str(folder / name) in after


@pytest.mark.long
def test_the_report_leads_with_the_pictures_and_says_what_they_do_not_show(ran):
    folder, *_ = ran
    page = (folder / "evaluation" / "report.html").read_text()
    first = page[: page.index('id="scores"')]
    assert first.count("<img") == 3
    assert "by construction" in first
    assert "configs/imagenette.yaml" in first


@pytest.mark.long
def test_the_pictures_are_small_and_legible(ran):
    folder, *_ = ran
    for name in ("ten_labels", "neighbours", "predictions"):
        assert (folder / f"{name}.png").stat().st_size < 300_000
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300


@pytest.mark.parametrize("name", ["demo", "predictions"])
def test_the_figures_of_the_readme_are_there_and_small(name):
    assert f'src="demo_data/{name}.png"' in (ROOT / "README.md").read_text()
    assert (ROOT / "demo_data" / f"{name}.png").stat().st_size <= 300_000


@pytest.mark.long
def test_every_column_is_a_mix_and_truth_has_its_colour(ran, beds, tmp_path):
    folder, *_ = ran
    content = json.loads((folder / "evaluation" / "results.json").read_text())
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(ROOT / demo.CONFIG), *SMALL])
    evaluated = dict(zip(demo.TITLES, demo.columns(content).values(), strict=True))
    models = {title: demo.load(entries["segmentation"]["config"]) for title, entries in evaluated.items()}
    pairs = demo.read_pairs(make_dataset(f"custom://Segmentation?root='{beds}/val'"))
    figure = demo.draw_ten_labels(cfg, evaluated, models, *pairs)
    cut = panels(figure, tmp_path / "figure.png")
    assert len(cut) == 10 * 10
    for panel in cut:
        assert min(panel.shape[:2]) > 80, "too small to see anything"
    titles = [ax.get_title().replace("\n", "-") for ax in figure.axes[:10]]
    assert titles == flower_beds.MIXES
    truth = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[30:40]]
    for number, picture in enumerate(truth):
        colors = np.unique(picture.reshape(-1, 3), axis=0)
        assert len(colors) == 2
        own = figure.axes[number].title.get_color()
        assert np.abs(colors - own).sum(axis=1).min() < 1e-6, "the label above a column has another colour"


def test_a_failed_part_ends_the_demo_with_its_exit_code(monkeypatch, tmp_path):
    for failing in (demo.DRAWING, "train_capi.py", "benchmark.py", "eval_visualizations.py"):
        monkeypatch.setattr(demo, "check_finished", lambda cfg: None)
        monkeypatch.setattr(demo, "run", lambda script, *_, failing=failing: 3 if script == failing else 0)
        assert demo.main(["--output-dir", str(tmp_path)]) == 3


def test_an_interrupted_training_evaluates_nothing_and_says_how_to_continue(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", lambda *command: 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "capi_loss": 4.7}\n')
    assert demo.main(["--output-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "stopped after 10 of 300 steps; the same command continues it" in message
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_pca_colours_do_not_depend_on_the_basis_and_are_shared_by_the_images():
    maps = torch.randn(3, 6, 6, 16, generator=seeded(0)) ** 3
    maps[1] = maps[0]
    colours = demo.pca_colors(maps)
    assert colours.shape == (3, 6, 6, 3)
    assert colours.min() == 0
    assert colours.max() == 255
    torch.testing.assert_close(colours[1], colours[0])
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=seeded(1))).Q
    rotated = demo.pca_colors(5 * maps @ rotation + 3)
    assert (rotated.int() - colours.int()).abs().max() <= 1, "they differ by more than rounding"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_command_runs_as_typed(beds, tmp_path):
    done = run_cli(
        "demo.py", "--output-dir", tmp_path / "run", "--data", beds, "--data-seed=3", "--train-images=20",
        "--val-images=10", *SMALL, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train_capi.py configs/demo.yaml optim.total_iters=2" in done.stdout, "the command that a user could type"
    assert "With ten labelled images" in done.stdout
