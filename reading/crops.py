"""Crops: draw a random box of an image, cut it out as a square, and change its colours.

A crop is a function of its key, such as a seed and a position in the data; no state is kept.
"""

import hashlib
import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate

from reading.bands import resized
from utils import UPRIGHT, Turns

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


def derive_uniforms(*parts: object) -> list[float]:
    """Five numbers, uniform in [0, 1), that depend on every part; to seed a generator for so few would take longer."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=40).digest()
    return [number / 2**64 for number in struct.unpack("<5Q", digest)]


@dataclass(frozen=True)
class Crop:
    """A box of an image in pixels, and how it is turned: mirrored first, then upside down, then by quarter turns."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    vflip: bool = False
    turns: int = 0
    """Quarter turns, against the clock."""


def draw_crop(width: int, height: int, scale: tuple[float, float], do_hflip: bool, *key: object) -> Crop:
    """A random crop as torchvision's RandomResizedCrop and RandomHorizontalFlip describe it, a function of `key`.

    Area uniform in `scale`, aspect ratio log-uniform in `CROP_RATIO`, place uniform; ten attempts to find one that
    fits, then the middle of the image, as much of it as has a permitted ratio.
    """
    low, high = map(math.log, CROP_RATIO)
    flip = False
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_ratio, u_top, u_left, u_flip = derive_uniforms("crop", attempt, *key)
        flip = do_hflip and (u_flip < 0.5 if attempt == 0 else flip)
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w, flip)
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def turned(crop: Crop, turns: Turns, *key: object) -> Crop:
    """The crop, half of the times upside down, and by 0 to 3 quarter turns alike, as far as asked for: a function of
    `key`."""
    if turns == UPRIGHT:
        return crop
    u_vflip, u_turns, *_ = derive_uniforms("turned", *key)
    return replace(crop, vflip=turns.do_vflip and u_vflip < 0.5, turns=int(4 * u_turns) if turns.do_turns else 0)


@dataclass(frozen=True)
class View:
    """A square that boxes are resized to: its side in pixels, and how, bicubic, bilinear or lanczos."""

    size: int
    interpolation: str


def cut(pixels: Shaped[Tensor, "c h w"], crop: Crop, size: int, mode: str = "bicubic") -> Shaped[Tensor, "c size size"]:
    """The crop as a square of `size` pixels, antialiased as `View` names it, with the channels innermost in memory.

    In 8-bit fixed point, which torch has on the CPU alone, it takes a third of Pillow's time and is within a grey level
    of it. Lanczos is Pillow's: torch has it from 2.12 on. Deeper images, in [0, 1], stay float32.
    """
    square = _square(pixels, crop, size, mode)
    if crop.vflip or crop.turns:
        square = (square.flip(-2) if crop.vflip else square).rot90(crop.turns, (-2, -1))
        square = square.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return square


def _square(pixels: Shaped[Tensor, "c h w"], crop: Crop, size: int, mode: str) -> Shaped[Tensor, "c size size"]:
    rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
    if pixels.is_floating_point():
        square = resized(pixels[:, rows, columns], size, size, mode)
        square = square.flip(-1) if crop.flip else square
        return square.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if mode == "lanczos" and len(pixels) != 3:
        # Pillow's, band by band, rounds to the nearest level.
        square = resized(pixels[:, rows, columns], size, size, mode)
        return (square.flip(-1) if crop.flip else square).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if mode == "lanczos":
        image = Image.fromarray(pixels.permute(1, 2, 0)[rows, columns].numpy())
        square = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        return square.flip(-1) if crop.flip else square
    # One axis more while the channels are innermost, so that its stride is that of a batch: else torch would take the
    # layout for that of a single channel, and transpose the result.
    box = pixels.permute(1, 2, 0)[None, rows, columns].permute(0, 3, 1, 2)
    square = interpolate(box, size=(size, size), mode=mode, antialias=True)
    return (square.flip(-1) if crop.flip else square)[0]


BLUR_RADIUS = (0.1, 2.0)


@dataclass(frozen=True)
class Colours:
    """Takes the colours out of some crops, and blurs some, each a function of its key.

    Args:
        grayscale: fraction of the crops that become grey.
        blur: fraction of the crops that are blurred, by a Gaussian whose radius is uniform in `BLUR_RADIUS`, in pixels.
    """

    grayscale: float
    blur: float

    @property
    def change_anything(self) -> bool:
        """Whether there are such crops."""
        return self.grayscale > 0 or self.blur > 0

    def __call__(self, crop: UInt8[Tensor, "3 size size"], *key: object) -> UInt8[Tensor, "3 size size"]:
        """The crop, changed or not, with the channels innermost in memory."""
        u_grayscale, u_blur, u_radius, *_ = derive_uniforms("colours", *key)
        if u_grayscale >= self.grayscale and u_blur >= self.blur:
            return crop
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        if u_grayscale < self.grayscale:
            image = image.convert("L").convert("RGB")
        if u_blur < self.blur:
            image = image.filter(
                ImageFilter.GaussianBlur(BLUR_RADIUS[0] + u_radius * (BLUR_RADIUS[1] - BLUR_RADIUS[0]))
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
