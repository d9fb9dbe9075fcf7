"""Masks: which patches of an image the student does not see, and which of those it predicts (CAPI, sec. 3).

A generator draws one mask, True = hidden. A `MaskPlan` fixes the counts, which are the same for every image.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Generator, Tensor

from utils import UserError, derive_seed

MIN_ASPECT_RATIO = 0.5
MAX_ASPECT_RATIO = 2.0

MaskingGenerator = Callable[[int, int, int, Generator], Bool[Tensor, "hp wp"]]


class Block:
    """Hides one block of random shape and place.

    Args:
        roll: shift the mask circularly by a uniform offset, so that every patch is hidden equally often.
    """

    def __init__(self, *, roll: bool = True) -> None:
        self.roll = roll

    def __call__(self, height: int, width: int, num_masked: int, generator: Generator) -> Bool[Tensor, "hp wp"]:
        """Draw a mask with exactly `num_masked` hidden patches."""
        _check_counts(height, width, num_masked)
        u_aspect, u_top, u_left, u_down, u_right = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        mask = torch.zeros(height, width, dtype=torch.bool)
        if num_masked > 0:
            block_height, block_width = _block_size(height, width, num_masked, u_aspect)
            top = int(u_top * (height - block_height + 1))
            left = int(u_left * (width - block_width + 1))
            # Rounding up made the block too large by less than a row and a column; it loses its last cells.
            full_rows, rest = divmod(num_masked, block_width)
            mask[top : top + full_rows, left : left + block_width] = True
            mask[top + full_rows : top + full_rows + 1, left : left + rest] = True
        if self.roll:
            mask = mask.roll((int(u_down * height), int(u_right * width)), dims=(0, 1))
        return mask


class InverseBlock:
    """Hides all but one block of random shape and place; the arguments are those of `Block`."""

    def __init__(self, *, roll: bool = True) -> None:
        self.visible = Block(roll=roll)

    def __call__(self, height: int, width: int, num_masked: int, generator: Generator) -> Bool[Tensor, "hp wp"]:
        """Draw a mask with exactly `num_masked` hidden patches."""
        _check_counts(height, width, num_masked)
        return ~self.visible(height, width, height * width - num_masked, generator)


class Uniform:
    """Hides patches drawn independently of each other."""

    def __call__(self, height: int, width: int, num_masked: int, generator: Generator) -> Bool[Tensor, "hp wp"]:
        """Draw a mask with exactly `num_masked` hidden patches."""
        _check_counts(height, width, num_masked)
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[torch.randperm(height * width, generator=generator)[:num_masked]] = True
        return mask.view(height, width)


GENERATORS: dict[str, type[Block] | type[InverseBlock] | type[Uniform]] = {
    "InverseBlock": InverseBlock,
    "Block": Block,
    "Uniform": Uniform,
}


def make_masking_generator(name: str, **kwargs: Any) -> MaskingGenerator:
    """The generator called `name`, made with `kwargs`.

    Raises: UserError if there is no such generator, or it does not take these arguments.
    """
    if name not in GENERATORS:
        raise UserError(f"data.masking_generator={name!r}: must be one of {', '.join(GENERATORS)}")
    generator: Callable[..., MaskingGenerator] = GENERATORS[name]
    known = [parameter for parameter in inspect.signature(generator).parameters if parameter != "self"]
    for key, value in kwargs.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no arguments; use {}"
            raise UserError(f"data.masking_generator_kwargs={kwargs!r}: {key} is unknown, {name} {takes}")
        if not isinstance(value, bool):
            raise UserError(f"data.masking_generator_kwargs={kwargs!r}: {key} must be true or false")
    return generator(**kwargs)


@dataclass(frozen=True)
class MaskPlan:
    """How many patches of each image are hidden, seen and predicted.

    Raises: UserError if the ratios leave nothing to see or nothing to predict on this grid.
    """

    height: int
    """Rows of the patch grid."""
    width: int
    """Columns of the patch grid."""
    mask_ratio: float
    """Fraction of the patches that is hidden."""
    prediction_subsampling: float
    """Fraction of the hidden patches that is predicted."""

    def __post_init__(self) -> None:
        """Check that every count is at least one."""
        grid = f"a grid of {self.height} x {self.width} patches"
        if self.num_masked < 1:
            smallest = _smallest_factor(self.num_patches)
            raise UserError(
                f"data.mask_ratio={self.mask_ratio}: hides no patch of {grid}; use at least {smallest:.4g}"
                if self.num_patches > 1
                else f"data.mask_ratio={self.mask_ratio}: {grid} cannot be masked; use a larger data.images_size"
            )
        if self.num_visible < 1:
            raise UserError(f"data.mask_ratio={self.mask_ratio}: leaves no visible patch of {grid}; use a smaller one")
        if self.num_predict < 1:
            raise UserError(
                f"data.prediction_subsampling={self.prediction_subsampling}: none of the {self.num_masked} hidden "
                f"patches of {grid} is predicted; use at least {_smallest_factor(self.num_masked):.4g}"
            )

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return self.height * self.width

    @property
    def num_masked(self) -> int:
        """Hidden patches per image."""
        return int(self.num_patches * self.mask_ratio)

    @property
    def num_visible(self) -> int:
        """Patches per image that the student sees."""
        return self.num_patches - self.num_masked

    @property
    def num_predict(self) -> int:
        """Hidden patches per image that are predicted."""
        return int(self.num_masked * self.prediction_subsampling)


def draw_positions(
    plan: MaskPlan, masking_generator: MaskingGenerator, generator: Generator
) -> tuple[Int64[Tensor, " v"], Int64[Tensor, " m"]]:
    """Visible and predict positions of one image, each ascending in `[0, n)`.

    The predict positions are drawn uniformly, without replacement, from the hidden ones.
    """
    mask = masking_generator(plan.height, plan.width, plan.num_masked, generator).flatten()
    hidden = mask.nonzero().squeeze(1)
    assert len(hidden) == plan.num_masked, f"the mask hides {len(hidden)} patches, not {plan.num_masked}"
    chosen = torch.randperm(plan.num_masked, generator=generator)[: plan.num_predict]
    return (~mask).nonzero().squeeze(1), hidden[chosen.sort().values]


@dataclass(frozen=True)
class PatchMasks:
    """Draws which patches of each image of a batch are visible and which are predicted.

    Args:
        plan: how many.
        generator: draws the mask of one image.
        seed: from which, and the key of an image, its mask follows.
    """

    plan: MaskPlan
    generator: MaskingGenerator
    seed: int

    def __call__(self, keys: list[tuple[int, ...]]) -> dict[str, Int64[Tensor, " patches"]]:
        """`visible_indices` [b*v] and `predict_indices` [b*m], as image * n + position, image-major and ascending."""
        visible, predict = [], []
        for row, key in enumerate(keys):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "mask", *key))
            seen, predicted = draw_positions(self.plan, self.generator, generator)
            visible.append(seen + row * self.plan.num_patches)
            predict.append(predicted + row * self.plan.num_patches)
        return {"visible_indices": torch.cat(visible), "predict_indices": torch.cat(predict)}


def _block_size(height: int, width: int, area: int, u_aspect: float) -> tuple[int, int]:
    """Rows and columns of a block of at least `area` cells that fits; its aspect ratio is log-uniform in what fits."""
    lowest = area / width**2
    highest = max(height**2 / (area + 1e-5), lowest)
    low = min(max(MIN_ASPECT_RATIO, lowest), highest)
    high = max(min(MAX_ASPECT_RATIO, highest), lowest)
    aspect = math.exp(math.log(low) + u_aspect * (math.log(high) - math.log(low)))
    # The float error of a square root can push a block that just fits past the border.
    rows = min(math.ceil(math.sqrt(area * aspect)), height)
    columns = min(math.ceil(math.sqrt(area / aspect)), width)
    return max(rows, math.ceil(area / columns)), columns


def _check_counts(height: int, width: int, num_masked: int) -> None:
    assert height >= 1, "the grid has no rows"
    assert width >= 1, "the grid has no columns"
    assert 0 <= num_masked <= height * width, f"cannot hide {num_masked} of {height * width} patches"


def _smallest_factor(total: int) -> float:
    """The smallest ratio for which `int(total * ratio)` is 1, rounded up to four digits so that it can be typed."""
    return math.ceil(1e4 / total) / 1e4
