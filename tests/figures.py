"""Looking at drawn figures: what several test files ask of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def panels(figure: Any, path: Path) -> list[np.ndarray]:
    """Save the figure, read it back, and cut out the pixels inside each axes."""
    figure.savefig(path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert 600 < width < 3000
    assert 400 < height < 3000
    cut = []
    for ax in figure.axes:
        box = ax.get_position()
        rows = slice(math.ceil((1 - box.y1) * height), math.floor((1 - box.y0) * height))
        cut.append(pixels[rows, math.ceil(box.x0 * width) : math.floor(box.x1 * width)])
    return cut


def num_coloured(pixels: np.ndarray) -> int:
    """Pixels that are not grey."""
    return int((np.ptp(pixels.astype(int), axis=-1) > 60).sum())


def assert_no_overlaps(figure: Any) -> None:
    boxes = {}
    for number, ax in enumerate(figure.axes):
        texts = {"title": ax.title, "x": ax.xaxis.label, "y": ax.yaxis.label}
        boxes |= {(number, kind): t.get_window_extent() for kind, t in texts.items() if t.get_text()}
    names = list(boxes)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not boxes[first].overlaps(boxes[second]), f"{first} overlaps {second}"
