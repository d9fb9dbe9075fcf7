"""Pictures and configurations that several test files make."""

import io
import os

import numpy as np
from PIL import Image

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config


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
