"""Tiny data and trainings of the three tasks of fine-tuning."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import make_images, run_main, tiny
from PIL import Image
from torch import nn

import finetune_classification
import finetune_detection
import finetune_segmentation
import finetuning
from baselines import beit_loader

# --- Data ------------------------------------------------------------------------------------------------------------

CLASS_COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def write_classes(root: Path) -> Path:
    """Folders train and test with images of three classes, each of a colour with noise."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 6), ("test", 4)):
        for name, colour in CLASS_COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = (np.array(colour) + rng.normal(0, 25, (24, 20, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


LABEL_NAMES = ["ground", "(void)", "blue", "red"]
LABEL_COLOURS = np.array([(90, 150, 60), (128, 128, 128), (40, 60, 200), (210, 50, 40)])


def draw_labelled(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels: ground with a void stripe, and a blue and a red rectangle."""
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 8] = 1
    for label in (2, 3):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        labels[top : top + height // 2, left : left + width // 3] = label
    return (LABEL_COLOURS[labels] + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8), labels


def write_masks(root: Path) -> Path:
    """Folders train and test, each with images, masks, and classes.txt beside them."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").write_text("\n".join(LABEL_NAMES))
    for part, number in (("train", 10), ("test", 4)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for i in range(number):
            image, labels = draw_labelled(rng, 40 if i % 2 else 28, 32)
            Image.fromarray(image).save(root / part / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / part / "masks" / f"{i}.png")
    return root


def segmentation_url(folder: Path) -> str:
    return f"custom://Segmentation?root='{folder}'"


CATEGORIES = {7: "yellow box", 3: "red box"}
"""By ids that begin above 0, have a gap and are not in order."""
CATEGORY_COLOURS = {7: (230, 220, 40), 3: (200, 40, 40)}
SIZE = 40


def objects_content(num: int = 6) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Annotations in COCO's format of two rectangles in each image, and the images."""
    rng = np.random.default_rng(0)
    images, annotations, pictures = [], [], []
    for i in range(num):
        pixels = rng.integers(90, 110, (SIZE, SIZE + 8, 3), dtype=np.uint8)
        images.append({"id": 100 + i, "file_name": f"part/{i}.png", "width": SIZE + 8, "height": SIZE})
        for k, category in enumerate(CATEGORIES):
            left, top = int(rng.integers(1, 5)) + 22 * k, int(rng.integers(1, 20))
            width, height = int(rng.integers(10, 18)), int(rng.integers(10, 19))
            pixels[top : top + height, left : left + width] = CATEGORY_COLOURS[category]
            right, bottom = left + width, top + height
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append({
                "id": 10 * i + k + 1, "image_id": 100 + i, "category_id": category, "bbox": [left, top, width, height],
                "segmentation": [polygon], "iscrowd": 0, "area": width * height,
            })  # fmt: skip
        pictures.append(pixels)
    categories = [{"id": identity, "name": name} for identity, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, pictures


def write_coco(folder: Path, change: Any = None, num: int = 6) -> Path:
    """A folder with images and their annotations, after `change` was called with these."""
    known, pictures = objects_content(num)
    (folder / "part").mkdir(parents=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / "part" / f"{i}.png")
    if change is not None:
        known = change(known) or known
    (folder / "annotations.json").write_text(json.dumps(known))
    return folder


# --- Trainings -------------------------------------------------------------------------------------------------------

COMMON = [
    "train.device=cpu",
    "train.log_loss_every=1",
    "train.checkpointing.period=2",
    "optim.total_iters=6",
    "optim.batch_size_per_gpu=4",
    "efficiency.param_dtype=float32",
    "efficiency.dataloader_num_workers=0",
]


@dataclass(frozen=True)
class Case:
    """A task with tiny data and a tiny training."""

    script: Any
    write: Callable[[Path], Any]
    """Makes a folder train."""
    url: Callable[[Path], str]
    """Of that folder."""
    tiny: list[str]

    def arguments(self, data: Path, model: str, output_dir: Path, *more: str) -> list[str]:
        """Of a training.

        Args:
            data: folder with a folder train.
            model: the key of backbone.model_loader_kwargs that says what is trained, and its value.
            output_dir: of the training.
            *more: which win over the others.
        """
        own = [f"data.dataset={self.url(data / 'train')}", f"train.output_dir={output_dir}"]
        return [*COMMON, *self.tiny, f"backbone.model_loader_kwargs.{model}", *own, *more]


CASES = {
    "classification": Case(finetune_classification, write_classes, str, [
        "optim.epochs=null",
        "data.images_size=16",
    ]),
    "segmentation": Case(finetune_segmentation, write_masks, segmentation_url, [
        "optim.lr_schedule.warmup_iters=0.3",
        "data.images_size=16",
        "segmentation.channels=8",
        "segmentation.auxiliary_channels=8",
        "segmentation.resize=[64,16]",
    ]),
    "detection": Case(finetune_detection, lambda root: write_coco(root / "train"), str, [
        "optim.epochs=null",
        "optim.batch_size_per_gpu=2",
        "data.images_size=32",
        "detection.short_sides=[24,32]",
        "detection.long_side=40",
        "detection.crop_short_sides=[32]",
        "detection.crop_range=[20,28]",
        "detection.test_short_side=32",
        "detection.test_long_side=40",
        "detection.channels=8",
        "detection.box_convs=1",
        "detection.box_dim=16",
        "detection.mask_convs=1",
        "detection.num_proposals=20",
        "detection.num_samples=8",
    ]),
}  # fmt: skip


def opened(name: str, arguments: list[str]) -> tuple[Any, Any]:
    """The configuration of a training as it begins, and its data; of a case."""
    task = CASES[name].script.TASK
    cfg, data = task.open_data(finetuning.load(task, arguments))
    return finetuning.prepared(cfg), data


def tiny_beit() -> nn.Module:
    """BEiT's network for images of 16 pixels, with random weights."""
    network = pytest.importorskip("timm.models.beit").Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0, global_pool="",
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
    )  # fmt: skip
    network.patch_embed.strict_img_size = False
    return beit_loader.RelativePatchFeatures(network, 4)


def pretrain(folder: Path) -> Path:
    """What a step of pretraining exports, made in a folder."""
    images = make_images(folder / "images")
    assert run_main(tiny(images, folder / "run", "optim.total_iters=1", "model.decoder_kwargs.depth=1")) == 0
    return folder / "run" / "student_ema.pth"


def train_on_this_rank(name: str, arguments: list[str]) -> None:
    """What a rank of the tests does.

    Args:
        name: of the case.
        arguments: of a training, but for what each rank has its share of, which comes last as `key=total`.
    """
    key, total = arguments[-1].split("=")
    share = f"{key}={int(total) // dist.get_world_size()}"
    task = CASES[name].script.TASK
    cfg, data = task.open_data(finetuning.load(task, [*arguments[:-1], share]))
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    finetuning.train(task, cfg, data, Path(cfg.train.output_dir), torch.device("cpu"))
