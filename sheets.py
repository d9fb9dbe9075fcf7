"""Contact sheets: what a training is going to see, as one picture.

The machinery draws the crops and what normalisation makes of them. A method or a task adds what it knows of a batch,
masks or labels, as a `Column` of plain pictures.
"""

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils import replacing

if TYPE_CHECKING:
    from data import Batch

NUM_IMAGES = 8
"""Of a batch that are drawn."""
TILE = 176
"""Side of the square that a picture is fitted into, in pixels."""
GAP = 6
PER_LINE = 8
"""Pictures beside each other."""
VALUE_RANGE = 2.7
"""Normalised values that are drawn black (minus this) and white. ImageNet's normalisation goes from -2.1 to 2.6."""

INK, SOFT = (27, 31, 36), (87, 96, 106)
ORANGE = (230, 159, 0)


class Column(NamedTuple):
    """Pictures of the same kind, one of each image."""

    title: str
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]]
    captions: Sequence[str] = ()
    """What is said below each; none for nothing."""


Look = Callable[["Batch", int], Sequence[Column]]
"""From a batch on the CPU, with its images as loaded, to what is drawn of its first so many beside their crops."""


def as_rgb(images: Shaped[Tensor, "b c h w"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Images for people: 8-bit ones as they are, others between their own darkest and brightest value.

    Of one or two bands the first is drawn grey, of more than three the first three are red, green and blue.
    """
    bands = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    if bands.dtype != torch.uint8:
        low, high = (reduce(bands.float().flatten(1), dim=1).view(-1, 1, 1, 1) for reduce in (torch.amin, torch.amax))
        bands = ((bands.float() - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    return [picture.numpy() for picture in bands.movedim(1, -1).contiguous()]


def normalised_column(images: Float[Tensor, "b c h w"]) -> Column:
    """What the network gets, on a scale that is the same for all data: a wrong mean gives a cast or darkness, a wrong
    deviation too little or too much contrast."""
    values = images.detach().float().cpu()
    levels = ((values / VALUE_RANGE + 1) * 127.5).clamp(0, 255).nan_to_num(0).round().to(torch.uint8)
    title = f"normalised: mean {values.mean():.2f}, deviation {values.std():.2f}"
    return Column(title, as_rgb(levels))


def mask_column(
    images: UInt8[Tensor, "b c h w"], visible: Bool[Tensor, "b hp wp"], predicted: Bool[Tensor, "b hp wp"]
) -> Column:
    """Images as they are where they are visible, orange where they are predicted, and dark where they are neither."""
    pictures = []
    for picture, seen, aim in zip(as_rgb(images), visible, predicted, strict=True):
        # No smaller than it will be drawn; of large crops, most of the time goes into pixels that nobody sees.
        reduced = Image.fromarray(picture).reduce(max(1, max(picture.shape[:2]) // (2 * TILE)))
        colour = np.asarray(reduced, np.float32)
        grey = colour.mean(axis=2, keepdims=True)
        (h, w), (hp, wp) = colour.shape[:2], seen.shape
        of_patch = np.arange(h) * hp // h, np.arange(w) * wp // w
        is_seen, is_aim = (mask.numpy()[np.ix_(*of_patch)][..., None] for mask in (seen, aim))
        dark = 0.22 * grey
        orange = 0.35 * grey + 0.65 * np.array(ORANGE, np.float32)
        drawn = np.where(is_seen, colour, np.where(is_aim, orange, dark))
        pictures.append(drawn.round().astype(np.uint8))
    return Column("visible; orange: predicted; dark: the rest", pictures)


def mark(images: Shaped[Tensor, "b c h w"], patch_size: int, positions: Int64[Tensor, " n"]) -> Bool[Tensor, "b hp wp"]:
    """True at patches of images, given by image * patches + position; those of later images do not count."""
    b, _, h, w = images.shape
    marked = torch.zeros(b, h // patch_size, w // patch_size, dtype=torch.bool)
    marked.view(-1)[positions[positions < marked.numel()]] = True
    return marked


def class_colours(labels: Int[Tensor, "*grid"], num_classes: int) -> UInt8[Tensor, "*grid 3"]:
    """A colour of its own for each class in `[0, num_classes)`, and white for other numbers."""
    golden = 0.61803  # turns of the colour wheel, after which neighbouring numbers are far apart
    table = [
        colorsys.hsv_to_rgb(i * golden % 1, (0.85, 0.55)[i % 2], (0.9, 0.7)[i // 2 % 2]) for i in range(num_classes)
    ]
    colours = (torch.tensor([*table, (1.0, 1.0, 1.0)]) * 255).round().to(torch.uint8)
    numbers = labels.long()
    return colours[torch.where((numbers >= 0) & (numbers < num_classes), numbers, num_classes)]


def draw_boxes(
    picture: UInt8[np.ndarray, "h w 3"], boxes: Float[Tensor, "n 4"], colours: UInt8[Tensor, "n 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A copy with boxes [left, top, right, bottom] in pixels, each in its colour."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    width = max(1, max(picture.shape[:2]) // 100)
    for box, colour in zip(boxes.tolist(), colours.tolist(), strict=True):
        left, top, right, bottom = box
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=tuple(colour), width=width)
    return np.asarray(image)


def write_sheet(path: Path, columns: Sequence[Column], heading: Sequence[str]) -> None:
    """Write pictures as one PNG: those of an image beside each other, under the titles of their columns.

    Args:
        path: the file, replaced in one step.
        columns: each with a picture of every image.
        heading: the first lines of the sheet.
    """
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    step, line_height = TILE + GAP, 15
    titles = [_wrapped(column.title, small, TILE) for column in columns]
    title_height = line_height * max(map(len, titles)) + GAP
    captions = [[_wrapped(text, small, TILE)[:3] for text in column.captions] for column in columns]
    caption_height = line_height * max((len(lines) for column in captions for lines in column), default=0)
    num_images = len(columns[0].pictures)
    per_line = max(1, min(PER_LINE // len(columns), num_images))
    rows = -(-num_images // per_line)
    group = len(columns) * step + 2 * GAP
    width = per_line * group
    head = [line for text in heading for line in _wrapped(text, font, width - 2 * GAP)]
    top = GAP + 18 * len(head) + GAP
    tiles = [[_fitted(picture) for picture in column.pictures] for column in columns]
    tile_height = max(tile.height for column in tiles for tile in column)
    row_height = tile_height + caption_height + GAP
    sheet = Image.new("RGB", (width, top + title_height + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(head):
        draw.text((GAP, GAP + 18 * number), line, INK, font)
    for place in range(per_line * len(columns)):
        left = GAP + place // len(columns) * group + place % len(columns) * step
        for number, line in enumerate(titles[place % len(columns)]):
            draw.text((left, top + line_height * number), line, SOFT, small)
    for image in range(num_images):
        y = top + title_height + image // per_line * row_height
        for place in range(len(columns)):
            x = GAP + image % per_line * group + place * step
            sheet.paste(tiles[place][image], (x, y))
            for number, line in enumerate(captions[place][image] if captions[place] else ()):
                draw.text((x, y + tile_height + 1 + line_height * number), line, SOFT, small)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def _fitted(picture: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """The picture in a tile: small ones with whole pixels as squares, so that patches stay sharp."""
    h, w = picture.shape[:2]
    scale = TILE / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, way)


def _wrapped(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> list[str]:
    """Lines that are no wider than `width` pixels; a word that is wider alone is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        kept = word[:width]  # no letter is narrower than a pixel
        while font.getlength(kept) > width:
            kept = f"{kept[:-2]}\N{HORIZONTAL ELLIPSIS}" if len(kept) > 2 else ""
        lines[-1:] = [kept] if not lines[-1] else [lines[-1], kept]
    return lines
