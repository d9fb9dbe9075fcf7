import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli, seeded
from figures import assert_no_overlaps, panels
from runs import make_images, run_main, tiny

import demo
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from model import EncoderDecoder


def tiny_model() -> EncoderDecoder:
    return EncoderDecoder(
        patch_size=8,
        n_registers=4,
        transformers_kwargs={"embed_dim": 16, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
        encoder_kwargs={"depth": 2},
        decoder_kwargs={"depth": 1},
    ).eval()


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    images = demo.validation_images(48)[:3]
    order = torch.rand(3, 36, generator=seeded(0)).argsort(dim=1)
    visible, predicted = order[:, :12], order[:, 12:17]
    maps = {name: demo.patch_features(tiny_model(), images) for name in ("before", "after")}
    return images, visible, predicted, demo.draw_features(images, visible, predicted, maps)


def test_every_panel_of_the_features_is_a_picture(drawn, tmp_path):
    *_, figure = drawn
    cut = panels(figure, tmp_path / "features.png")
    assert len(cut) == 3 * 5
    for panel in cut:
        assert min(panel.shape[:2]) > 100, "too small to see anything"
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 20
    assert_no_overlaps(figure)
    assert [ax.get_title() for ax in figure.axes[3:5]] == ["before", "after"]


def test_the_students_view_has_the_visible_patches_and_nothing_else(drawn):
    _, visible, predicted, figure = drawn
    for row in range(3):
        image, masked, view = (np.asarray(figure.axes[5 * row + column].images[0].get_array()) for column in range(3))
        patch = image.shape[0] // 6
        for position in range(36):
            top, left = position // 6 * patch, position % 6 * patch
            cell = np.s_[top : top + patch, left : left + patch]
            if position in visible[row]:
                np.testing.assert_array_equal(view[cell], image[cell])
                np.testing.assert_array_equal(masked[cell], image[cell])
            else:
                assert np.ptp(view[cell]) == 0, "a hidden patch shows something"
                assert (masked[cell] <= image[cell]).all()
        frames = {(frame.get_x() // patch, frame.get_y() // patch) for frame in figure.axes[5 * row + 1].patches}
        assert frames == {(position % 6, position // 6) for position in predicted[row].tolist()}


def test_pca_colours_do_not_depend_on_the_basis_and_are_shared_by_the_images():
    maps = torch.randn(3, 6, 6, 16, generator=seeded(0)) ** 3
    maps[1] = maps[0]
    colours = demo.pca_colors(maps)
    assert colours.shape == (3, 6, 6, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    torch.testing.assert_close(colours[1], colours[0])
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=seeded(1))).Q
    torch.testing.assert_close(demo.pca_colors(5 * maps @ rotation + 3), colours, rtol=0, atol=1e-3)


def test_validation_images_are_different_squares():
    images = demo.validation_images(32)
    assert images.shape == (demo.NUM_IMAGES, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == demo.NUM_IMAGES


def test_a_failed_training_ends_the_demo_with_its_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run", lambda *command: 3)
    assert demo.main(["--output-dir", str(tmp_path)]) == 3


def test_an_interrupted_training_draws_nothing_and_says_how_to_continue(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "run", lambda *command: 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "capi_loss": 4.7}\n')
    assert demo.main(["--output-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "stopped after 10 of 200 steps; the same command continues it" in message
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_trained_student_names_clusters_of_hidden_patches_better_than_a_random_one(tmp_path):
    images = make_images(tmp_path / "images", num=4)
    steps = ["optim.total_iters=200", "optim.lr_schedule.base_value=3e-3", "capi.num_clusters=8", "train.seed=5"]
    arguments = tiny(images, tmp_path / "run", *steps, "train.checkpointing.period=200", "train.log_loss_every=200")
    assert run_main(arguments) == 0
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, arguments)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000200"
    same = demo.validation_images(16, images, num_images=None)
    shares = demo.hidden_patches(cfg, checkpoint, same)
    assert shares == demo.hidden_patches(cfg, checkpoint, same)
    assert shares["chance"] == 1 / 8
    assert shares["trained"] > 0.2 > shares["random"], shares
    assert 0 < shares["copied"] < 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_command_trains_draws_evaluates_and_names_its_files(tmp_path):
    small = ["optim.total_iters=2", "optim.batch_size_per_gpu=4", "train.log_loss_every=1", "data.images_size=48"]
    small += ["model.encoder_kwargs.depth=1", "model.decoder_kwargs.depth=1", "capi.num_clusters=8"]
    small += ["efficiency.dataloader_num_workers=0", "data.mask_ratio=0.5"]
    done = run_cli("demo.py", "--output-dir", tmp_path / "run", *small, timeout=380)
    assert done.returncode == 0, done.stderr
    assert "train_capi.py configs/demo.yaml optim.total_iters=2" in done.stdout, "the command that a user could type"
    for name in ("student_ema.pth", "metrics.jsonl", "curves.png", "features.png", "checkpoints/step_000000002",
                 "evaluation/report.html"):  # fmt: skip
        assert (tmp_path / "run" / name).exists()
        assert str(tmp_path / "run" / name) in done.stdout
    assert "Done in" in done.stdout
    table = [line for line in done.stdout.splitlines() if "mIoU" in line]
    assert table, "the scores are on the terminal"
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert set(results["compared"]) == {"raw pixels"} and set(results["random"]) == {"segmentation", "pictures"}
