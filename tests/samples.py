"""Pictures and configurations that several test files make."""

import hashlib
import io
import json
import os

import numpy as np
import torch
from PIL import Image

from config import DEFAULT_PRETRAIN_CONFIG, load_config
from reading.sources import ImageDataset, ImageStream, Sample
from train_capi import CapiConfig

COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 50), "red": (210, 40, 30)}


def make_config(*overrides, batch_size=4, workers=0):
    return load_config(
        CapiConfig,
        DEFAULT_PRETRAIN_CONFIG,
        [
            "data.images_size=56",
            "data.prediction_subsampling=0.3",
            f"optim.batch_size_per_gpu={batch_size}",
            f"efficiency.dataloader_num_workers={workers}",
            "efficiency.cache_dataset=false",
            "data.dataset=none",
            *overrides,
        ],
    )


def encode(image, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def photo(seed, width=80, height=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def age(root):
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 60))


def folder_url(path):
    return f"torchvision://ImageFolder?root='{path}'"


def save_colour_folders(root, **splits):
    """Folders of images whose colour says the class, with noise: `root/<split>/<colour>`, so many per class."""
    rng = np.random.default_rng(0)
    for split, per_class in splits.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                light = np.array(colour) + rng.normal(0, 110, 3)
                pixels = np.clip(light + rng.normal(0, 70, (20, 24, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


class Listed(ImageDataset):
    """Images of one colour, with any targets."""

    def __init__(self, targets, mapping=None):
        self.targets = targets
        if mapping is not None:
            self.get_imagenet_class_mapping = lambda: np.array(mapping)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        target = self.targets[index]
        labels = [label for label in (target if isinstance(target, list) else [target]) if label in (0, 1, 2)]
        colour = list(COLOURS.values())[int(labels[0])] if labels else (0, 0, 0)
        picture = Image.new("RGB", (16, 16), (colour[0] + index % 20, colour[1], colour[2]))
        return Sample(f"image {index}", lambda: picture, lambda: target)


class MemoryDataset(ImageDataset):
    def __init__(self, size, bad=()):
        self.files = [b"not an image" if index in bad else encode(photo(index)) for index in range(size)]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Sample(f"image {index}", lambda: self.files[index])


class MemoryStream(ImageStream):
    """Shards of samples; the name of a sample is its number over all shards."""

    def __init__(self, *sizes, bad=()):
        self.num_shards = len(sizes)
        self.firsts = np.cumsum([0, *sizes]).tolist()
        self.bad = bad
        self.png = encode(photo(0))

    def read_shard(self, shard, start=0):
        for number in range(self.firsts[shard] + start, self.firsts[shard + 1]):
            yield Sample(f"sample {number}", lambda number=number: b"bad" if number in self.bad else self.png)


def fingerprint(batch):
    """Everything that training sees of a batch."""
    assert batch.images.dtype == torch.uint8
    return (
        batch.sample_ids.tolist(),
        hashlib.sha256(batch.images.numpy().tobytes()).hexdigest(),
        batch.masks["visible_indices"].tolist(),
        batch.masks["predict_indices"].tolist(),
    )


def take(loader, count):
    with loader:
        return [fingerprint(next(loader)) for _ in range(count)]


def ids(loader, count):
    with loader:
        return [index for _ in range(count) for index in next(loader).sample_ids.tolist()]


def through_json(position):
    return json.loads(json.dumps(position))
