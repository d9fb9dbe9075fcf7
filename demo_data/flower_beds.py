"""Images of flower beds with masks, drawn from a seed: what the demo trains on.

    python demo_data/flower_beds.py data/flower_beds [--seed 0] [--train 2000] [--val 200]

A lawn seen from above has one bed of flowers, planted with one of ten mixes of three colours out of ten. The mix is the
class. A colour occurs in three mixes and two mixes share at most one colour, so that a single flower does not tell the
mix, but its neighbourhood does. A histogram of an image's colours tells it too: the images show how learning from
hidden patches works, and are no test of general features.

Writes `train` and `val`, each with `images` and `masks` in a folder per mix, and `classes.txt` with what the values of
the masks mean, as `custom://Segmentation?root='data/flower_beds/train'` reads them; class folders for
`torchvision://ImageFolder?root='data/flower_beds/train/images'` are the same files.
"""

import argparse
import functools
import json
import math
import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

COLOURS = {
    "red": (0.80, 0.12, 0.15),
    "blue": (0.16, 0.30, 0.75),
    "yellow": (0.97, 0.87, 0.25),
    "purple": (0.45, 0.20, 0.62),
    "magenta": (0.85, 0.15, 0.60),
    "pink": (0.96, 0.62, 0.75),
    "teal": (0.10, 0.60, 0.66),
    "orange": (0.95, 0.50, 0.10),
    "white": (0.93, 0.93, 0.90),
    "black": (0.14, 0.13, 0.16),
}
# Differences of 0, 1 and 3 modulo 10 are all distinct, so two mixes share at most one colour.
MIXES = sorted("-".join(list(COLOURS)[(first + step) % 10] for step in (0, 1, 3)) for first in range(10))
CLASSES = ["lawn", *MIXES]
GREENS = ((0.20, 0.45, 0.15), (0.28, 0.55, 0.20), (0.35, 0.60, 0.25))
SOIL = (0.12, 0.27, 0.09)

SIZE = 96
FINE = 2
"""Shapes are drawn on a grid so many times finer than the pixels."""
SMALLEST, LARGEST = 9, 21
"""Radius of leaves and flowers on the fine grid."""
BED_SHARE = (0.25, 0.55)
"""Part of the image that a bed covers."""
TURNS = 8
"""Ways in which a flower of five petals is turned."""


def draw(rng: Generator, mix: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A bed of the mix `CLASSES[mix]`: image [size, size, 3] and mask [size, size] of 0, the lawn, and `mix`.

    Leaves and flowers fall on each other. What falls is a flower where its centre lies in the bed, else a leaf.
    Randomness is drawn as uniform numbers alone, whose stream numpy keeps between versions.
    """
    n = SIZE * FINE
    in_bed = _bed(rng, SIZE)
    mean_area = math.pi * ((SMALLEST + LARGEST) / 2) ** 2
    count = round(3.5 * n * n / mean_area)  # covers the ground 3.5 times over
    y, x = (rng.uniform(0, n, count).astype(int) for _ in range(2))
    radius = rng.uniform(SMALLEST, LARGEST + 1, count).astype(int)
    which, turn = (rng.uniform(0, choices, count).astype(int) for choices in (3, TURNS))
    is_flower = in_bed[y // FINE, x // FINE]

    petals = np.array([COLOURS[name] for name in CLASSES[mix].split("-")])
    colours = np.where(is_flower[:, None], petals[which], np.array(GREENS)[which])
    colours = rng.uniform(0.75, 1.1, (count, 1)) * colours + rng.uniform(-0.087, 0.087, (count, 3))
    hearts = 0.5 * colours
    table = np.concatenate([[SOIL], colours, hearts]).astype(np.float32)

    top = np.zeros((n + 2 * LARGEST, n + 2 * LARGEST), np.int16)  # row of `table` of what lies on top, with a margin
    for k in range(count):
        r = radius[k]
        rows, columns = (slice(at + LARGEST - r, at + LARGEST + r + 1) for at in (y[k], x[k]))
        if is_flower[k]:
            flower, heart = _flower(r, turn[k])
            np.copyto(top[rows, columns], k + 1, where=flower)
            np.copyto(top[rows, columns], k + 1 + count, where=heart)
        else:
            np.copyto(top[rows, columns], k + 1, where=_disc(r, 0.85 * r))
    fine = table[top[LARGEST:-LARGEST, LARGEST:-LARGEST]]
    image = np.mean([fine[i::FINE, j::FINE] for i in range(FINE) for j in range(FINE)], axis=0)

    light = (1 + 0.1 * _waves(rng, SIZE, 3)[:, :, None]) * rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3)
    image = image * light + rng.uniform(-0.035, 0.035, image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8), (mix * in_bed).astype(np.uint8)


def _bed(rng: Generator, n: int) -> NDArray[np.bool_]:
    """Where the bed is: an ellipse with a wavy border."""
    radius = n * math.sqrt(rng.uniform(*BED_SHARE) / math.pi)
    stretch, turn = math.exp(rng.uniform(-0.4, 0.4)), rng.uniform(0, math.pi)
    y, x = rng.uniform(0.35, 0.65, 2) * n
    i = np.arange(n)[:, None] - y + 0.1 * n * _waves(rng, n, 5)
    j = np.arange(n)[None, :] - x + 0.1 * n * _waves(rng, n, 5)
    along, across = math.cos(turn) * i + math.sin(turn) * j, math.cos(turn) * j - math.sin(turn) * i
    return (along * stretch) ** 2 + (across / stretch) ** 2 < radius**2


def _waves(rng: Generator, n: int, cells: int) -> NDArray[np.float32]:
    """A smooth surface [n, n] through random heights between -1 and 1 on a grid of `cells` x `cells`."""
    heights = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(heights.resize((n, n), Image.Resampling.BICUBIC))


def _from_centre(r: int) -> NDArray[np.complex128]:
    return np.arange(-r, r + 1)[:, None] + 1j * np.arange(-r, r + 1)[None, :]


@functools.cache
def _disc(r: int, edge: float) -> NDArray[np.bool_]:
    return np.abs(_from_centre(r)) < edge


@functools.cache
def _flower(r: int, turn: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Five petals, and the dark heart."""
    angle = np.angle(_from_centre(r)) + 2 * math.pi / 5 * turn / TURNS
    return np.abs(_from_centre(r)) < r * (0.8 + 0.2 * np.cos(5 * angle)), _disc(r, 0.22 * r)


def _write(job: tuple[Path, int, int, list[int]]) -> None:
    """Draw one image and its mask into the folder of a split."""
    folder, mix, number, seed = job
    image, mask = draw(np.random.default_rng(seed), mix)
    name = f"{CLASSES[mix]}/{number:05}"
    Image.fromarray(image).save(folder / "images" / f"{name}.jpg", quality=92)
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def write(folder: Path, seed: int, num_images: dict[str, int], processes: int | None = None) -> None:
    """Draw a data set, unless the folder has it already.

    Args:
        folder: filled completely, or left without `drawn.json`.
        seed: of everything.
        num_images: split -> how many images, rounded down to as many of each mix; at least one of each.
        processes: None for one per processor.

    Raises: ValueError if the folder holds something else, or there would be no images.
    """
    for split, num in num_images.items():
        if num < len(MIXES):
            raise ValueError(f"{split}: {num} images are too few for one of each of {len(MIXES)} mixes")
    drawn, request = folder / "drawn.json", {"seed": seed, "size": SIZE, **num_images}
    if drawn.is_file():
        found = json.loads(drawn.read_text())
        if found != request:
            raise ValueError(f"{folder} was drawn with {found}, not with {request}; remove it or give another folder")
        return
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {"classes.txt", *num_images}:
        raise ValueError(f"{folder} has other files; give another folder")
    jobs = []
    for split_number, (split, num) in enumerate(num_images.items()):
        shutil.rmtree(folder / split, ignore_errors=True)
        for mix in range(1, len(CLASSES)):
            for kind in ("images", "masks"):
                (folder / split / kind / CLASSES[mix]).mkdir(parents=True)
            jobs += [(folder / split, mix, i, [seed, split_number, mix, i]) for i in range(num // len(MIXES))]
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    # Spawned, since a process that has started threads should not be forked.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(_write, jobs, chunksize=20), "drawing", len(jobs), unit="image"):
            pass
    drawn.write_text(json.dumps(request) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="images to train on (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="held-out images (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        write(given.folder, given.seed, {"train": given.train, "val": given.val})
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
