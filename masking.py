"""Masks: which patches of an image the student sees, and which of the others it predicts.

CAPI (section 3): a generator draws one mask, True = hidden, and a `MaskPlan` fixes the counts, which are the same for
every image; so it is in CAE, with a generator of its own. I-JEPA (section 3): a `MultiBlockPlan` draws a context block
and target blocks that are taken out of it.
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
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


MAX_BLOCKS = 1000
"""Blocks of one mask beyond which `ScatteredBlocks` gives up; on 14 x 14 patches, half of them hidden, 17 are many."""


class ScatteredBlocks:
    """Hides blocks of random shapes and places, which may overlap, until exactly as many patches are hidden as asked.

    As CAE has it of BEiT (arXiv:2106.08254, algorithm 1). Unlike there, no block is as high or wide as the grid.

    Args:
        min_block: smallest area of a block, patches, 16; the largest is what is still to be hidden, and where that is
            less the two change places.
        min_aspect: smallest height / width of a block, 0.3; its inverse is the largest.
    """

    def __init__(self, min_block: int, min_aspect: float) -> None:
        self.min_block, self.min_aspect = min_block, min_aspect

    def __call__(self, height: int, width: int, num_masked: int, generator: Generator) -> Bool[Tensor, "hp wp"]:
        """Draw a mask with exactly `num_masked` hidden patches.

        Raises: UserError as `draw`.
        """
        seed = int(torch.randint(2**62, (1,), generator=generator))
        return self.draw(height, width, num_masked, random.Random(seed))

    def draw(self, height: int, width: int, num_masked: int, numbers: random.Random) -> Bool[Tensor, "hp wp"]:
        """As a call, with Python's random numbers, of which the published code draws the same in the same order.

        Raises: UserError if blocks do not come to so many patches, since they do not fit the grid.
        """
        _check_counts(height, width, num_masked)
        mask = torch.zeros(height, width, dtype=torch.bool)
        num_missing = num_masked
        for _ in range(MAX_BLOCKS):
            if num_missing == 0:
                return mask
            num_missing -= self._hide_block(mask, num_missing, numbers)
        raise UserError(
            f"data.min_block={self.min_block}, data.min_aspect={self.min_aspect}: blocks that are lower and narrower "
            f"than a grid of {height} x {width} patches do not come to {num_masked} hidden ones; use a smaller "
            "data.min_block or data.mask_ratio, or more patches: a larger data.images_size"
        )

    def _hide_block(self, mask: Bool[Tensor, "hp wp"], most: int, numbers: random.Random) -> int:
        """Hide one block with at least one and at most so many patches that are not hidden yet; returns how many.

        None after ten attempts.
        """
        height, width = mask.shape
        flattest = math.log(self.min_aspect)
        for _ in range(10):
            area = numbers.uniform(self.min_block, most)
            aspect = math.exp(numbers.uniform(flattest, -flattest))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= height or columns >= width:
                continue
            top, left = numbers.randint(0, height - rows), numbers.randint(0, width - columns)
            block = mask[top : top + rows, left : left + columns]
            num_new = block.numel() - int(block.sum())
            if 0 < num_new <= most:
                block.fill_(True)
                return num_new
        return 0


GENERATORS: dict[str, type[Block] | type[InverseBlock] | type[Uniform]] = {
    "InverseBlock": InverseBlock,
    "Block": Block,
    "Uniform": Uniform,
}


def make_masking_generator(name: str, **kwargs: Any) -> MaskingGenerator:
    """The generator called `name`, made with those of `kwargs` that are not None.

    Raises: UserError if there is no such generator, or it does not take these arguments.
    """
    if name not in GENERATORS:
        raise UserError(f"data.masking_generator={name!r}: must be one of {', '.join(GENERATORS)}")
    generator: Callable[..., MaskingGenerator] = GENERATORS[name]
    known = [parameter for parameter in inspect.signature(generator).parameters if parameter != "self"]
    # A section of a configuration has what the files below it have: only null takes one out.
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    for key, value in kwargs.items():
        if key not in known:
            takes = (
                f"takes {', '.join(known) or 'no arguments'}; leave it out by data.masking_generator_kwargs.{key}=null"
            )
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


# --- I-JEPA: a context block without several target blocks (arXiv:2301.08243, section 3) -----------------------------

RETRIES = 20
"""Contexts with too few patches after which one more target block may overlap the context."""


@dataclass(frozen=True)
class MultiBlockPlan:
    """How context and target blocks of I-JEPA are drawn. What the published code does is what the masks of its configs
    are; the last fields are its peculiarities, each of which can be turned off.

    Raises: UserError if some block that can be drawn leaves nothing to see or nothing to predict on this grid.
    """

    height: int
    """Rows of the patch grid."""
    width: int
    """Columns of the patch grid."""
    num_contexts: int
    """Context blocks per image, each encoded for itself; 1 in the paper."""
    num_targets: int
    """Target blocks per image, each predicted for itself; 4."""
    context_scale: tuple[float, float]
    """Area of a context block as a fraction of the image, (0.85, 1); it has the shape of the image."""
    target_scale: tuple[float, float]
    """Area of a target block as a fraction of the image, (0.15, 0.2)."""
    target_aspect: tuple[float, float]
    """Height / width of a target block, (0.75, 1.5), in patches: of what shape the image is does not count."""
    min_keep: int
    """A context has more patches than this, 10, after the targets are taken out; else its place is drawn again."""
    allow_overlap: bool
    """Whether the targets stay in the context. False in the paper."""
    context_patches: int | None
    """None, as published: all contexts of a forward pass are cut to the size of the smallest, so that the number of
    images in it decides how much is seen: with 14 x 14 patches 41 % of the image for one, 25 % for 128. A number: all
    are cut to it, and smaller contexts are drawn again."""
    cut_from_below: bool
    """True, as published: what a cut leaves are the first patches in reading order, so that the lower part of images is
    rarely seen. False: patches drawn at random."""
    reach_border: bool
    """False, as published: a block never reaches the last row and the last column of the grid, since the last place is
    not drawn. True: it may."""
    independent_aspect: bool
    """False, as published: one random number decides on area and aspect ratio of a target, so that small blocks are
    wide and large ones are tall. True: each has its own."""

    def __post_init__(self) -> None:
        """Check the smallest blocks that can be drawn."""
        grid = f"a grid of {self.height} x {self.width} patches"
        steps = [i / 64 for i in range(64)] + [math.nextafter(1, 0)]
        corners = [(0.0, 0.0), (0.0, steps[-1])]  # the flattest and the narrowest of the smallest
        for u_scale, u_aspect in corners if self.independent_aspect else zip(steps, steps, strict=True):
            rows, columns = self._size(self.target_scale, self.target_aspect, u_scale, u_aspect)
            if rows < 1 or columns < 1:
                raise UserError(
                    f"masks.target_scale={list(self.target_scale)}: a target block may have no patch on {grid}; use "
                    "larger scales, or more patches: a larger data.images_size or a smaller model.patch_size"
                )
        rows, columns = self._size(self.context_scale, self._shape, 0.0, 0.0)
        if rows * columns <= self.least_kept:
            raise UserError(
                f"masks.context_scale={list(self.context_scale)}: a context block may have {rows * columns} "
                f"patches on {grid}, which is not more than masks.min_keep={self.min_keep}"
                + (f" or less than masks.context_patches={self.context_patches}" if self.context_patches else "")
                + "; use a smaller one of these, larger scales, or more patches"
            )

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return self.height * self.width

    @property
    def _shape(self) -> tuple[float, float]:
        """The range of height / width of a context block."""
        return self.height / self.width, self.height / self.width

    @property
    def least_kept(self) -> int:
        """A context has more patches than this."""
        return self.min_keep if self.context_patches is None else max(self.min_keep, self.context_patches - 1)

    def draw_sizes(self, generator: Generator) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the target blocks and of the context blocks of a forward pass."""
        u_scale = torch.rand(1, generator=generator).item()
        u_aspect = torch.rand(1, generator=generator).item() if self.independent_aspect else u_scale
        target = self._size(self.target_scale, self.target_aspect, u_scale, u_aspect)
        u = torch.rand(1, generator=generator).item()
        return target, self._size(self.context_scale, self._shape, u, u)

    def draw_blocks(
        self, target_size: tuple[int, int], context_size: tuple[int, int], generator: Generator
    ) -> tuple[list[Int64[Tensor, " v"]], list[Int64[Tensor, " m"]]]:
        """Positions of one image's contexts and of its targets, ascending in `[0, n)`; contexts are not cut yet."""
        targets = [self._place(target_size, generator) for _ in range(self.num_targets)]
        contexts = [self._draw_context(context_size, targets, generator) for _ in range(self.num_contexts)]
        return [_positions(context) for context in contexts], [_positions(target) for target in targets]

    def _draw_context(
        self, size: tuple[int, int], targets: Sequence[Bool[Tensor, "hp wp"]], generator: Generator
    ) -> Bool[Tensor, "hp wp"]:
        num_avoided, failures = 0 if self.allow_overlap else len(targets), 0
        while True:
            context = self._place(size, generator)
            for target in targets[:num_avoided]:
                context &= ~target
            if context.sum() > self.least_kept:
                return context
            failures += 1
            if failures % RETRIES == 0:
                num_avoided -= 1

    def _size(
        self, scale: tuple[float, float], aspect: tuple[float, float], u_scale: float, u_aspect: float
    ) -> tuple[int, int]:
        area = int(self.num_patches * (scale[0] + u_scale * (scale[1] - scale[0])))
        ratio = aspect[0] + u_aspect * (aspect[1] - aspect[0])
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        free = 0 if self.reach_border else 1
        return min(rows, self.height - free), min(columns, self.width - free)

    def _place(self, size: tuple[int, int], generator: Generator) -> Bool[Tensor, "hp wp"]:
        border = 1 if self.reach_border else 0
        top = int(torch.randint(self.height - size[0] + border, (1,), generator=generator))
        left = int(torch.randint(self.width - size[1] + border, (1,), generator=generator))
        block = torch.zeros(self.height, self.width, dtype=torch.bool)
        block[top : top + size[0], left : left + size[1]] = True
        return block


@dataclass(frozen=True)
class MultiBlockMasks:
    """Draws the contexts and targets of a batch, whose images share the sizes of blocks.

    They follow from the seed and the keys of the images that share a forward pass on one rank: neither the number of
    ranks nor that of accumulation steps changes them, the number of images in a forward pass does. (In the published
    code all ranks share the sizes of a step as well.)

    Args:
        plan: what is drawn.
        seed: from which, and the keys of the images, all masks follow.
    """

    plan: MultiBlockPlan
    seed: int

    def __call__(self, keys: list[tuple[int, ...]]) -> dict[str, Int64[Tensor, "k b patches"]]:
        """`context_indices` [contexts, b, v] and `target_indices` [targets, b, m], positions in `[0, n)`."""
        sizes = self.plan.draw_sizes(torch.Generator().manual_seed(derive_seed(self.seed, "block-sizes", *keys[0])))
        return self.collate(
            sizes, [torch.Generator().manual_seed(derive_seed(self.seed, "blocks", *key)) for key in keys]
        )

    def collate(
        self, sizes: tuple[tuple[int, int], tuple[int, int]], generators: Sequence[Generator]
    ) -> dict[str, Int64[Tensor, "k b patches"]]:
        """Masks of one image after the other, cut to equal lengths.

        Args:
            sizes: what `MultiBlockPlan.draw_sizes` gave.
            generators: of the images' blocks; the published code has one for all.
        """
        drawn = [self.plan.draw_blocks(*sizes, generator) for generator in generators]
        length = self.plan.context_patches or min(len(context) for contexts, _ in drawn for context in contexts)
        contexts = [
            torch.stack([self._cut(context, length, generator) for context in contexts])
            for (contexts, _), generator in zip(drawn, generators, strict=True)
        ]
        targets = [torch.stack(targets) for _, targets in drawn]
        return {"context_indices": torch.stack(contexts, dim=1), "target_indices": torch.stack(targets, dim=1)}

    def _cut(self, context: Int64[Tensor, " v"], length: int, generator: Generator) -> Int64[Tensor, " cut"]:
        if self.plan.cut_from_below:
            return context[:length]
        return context[torch.randperm(len(context), generator=generator)[:length].sort().values]


def _positions(block: Bool[Tensor, "hp wp"]) -> Int64[Tensor, " patches"]:
    return block.flatten().nonzero().squeeze(1)
