import math
import random

import pytest
import torch
from conftest import load_golden_json, seeded

from config import DEFAULT_PRETRAIN_CONFIG, load_config
from masking import (
    MAX_ASPECT_RATIO,
    MIN_ASPECT_RATIO,
    Block,
    InverseBlock,
    MaskPlan,
    PatchMasks,
    ScatteredBlocks,
    Uniform,
    draw_positions,
    make_masking_generator,
)
from train_capi import CapiConfig
from utils import UserError

GENERATORS = {
    "InverseBlock_roll_True": InverseBlock(roll=True),
    "InverseBlock_roll_False": InverseBlock(roll=False),
    "Block_roll_True": Block(roll=True),
    "Block_roll_False": Block(roll=False),
    "Uniform": Uniform(),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)


def frequency(name, height, width, num_masked, draws):
    generator = seeded(0)
    masks = [GENERATORS[name](height, width, num_masked, generator) for _ in range(draws)]
    return torch.stack(masks).float().mean(0)


def bounding_box(mask):
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def is_one_block(mask):
    """Whether the True cells are a filled rectangle, whose last rows may be cut short at their right end."""
    height, width = bounding_box(mask)
    top, left = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    block = mask[top : top + height, left : left + width].flatten()
    return bool(block[: int(mask.sum())].all())


@every_generator
def test_each_patch_is_hidden_as_often_as_by_the_authors_generator(name):
    golden = load_golden_json("mask_statistics")[name]
    # 12000 draws against the golden file's 20000: the standard error of a cell's difference is below 0.0055.
    actual = frequency(name, golden["grid"], golden["grid"], golden["masked"], draws=12000)
    expected = torch.tensor(golden["frequency_rows_0_4_8"])
    difference = (actual[[0, 4, 8]] - expected).abs()
    assert difference.mean() < 0.006, f"mean difference {difference.mean():.4f}"
    assert difference.max() < 0.022, f"largest difference {difference.max():.4f}"
    assert actual.max() == pytest.approx(golden["max_frequency"], abs=0.015)
    assert actual.min() == pytest.approx(golden["min_frequency"], abs=0.015)
    centre = actual[7:9, 7:9].mean()
    assert centre == pytest.approx(golden["centre_frequency"], abs=0.015), "the centre differs"
    corners = actual[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert corners == pytest.approx(golden["corner_frequency"], abs=0.015), "the corners differ"


@every_generator
@pytest.mark.parametrize(("height", "width"), [(16, 16), (3, 17), (40, 4), (1, 9), (9, 1), (1, 1), (2, 2)])
def test_exactly_the_asked_number_is_hidden_on_every_grid(name, height, width):
    generator = seeded(1)
    for num_masked in range(height * width + 1):
        mask = GENERATORS[name](height, width, num_masked, generator)
        assert mask.shape == (height, width)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == num_masked


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 30), (37, 37)])
def test_hidden_cells_of_block_are_one_block_of_permitted_aspect(height, width):
    generator, area = seeded(2), height * width // 2
    for _ in range(200):
        mask = Block(roll=False)(height, width, area, generator)
        assert is_one_block(mask), mask
        rows, columns = bounding_box(mask)
        # Rows over columns, with the rounding up of both; a flat grid forces flat blocks.
        forced = height / (area / height)
        assert rows / max(columns - 1, 1) >= min(MIN_ASPECT_RATIO, forced) * (1 - 1e-6) or rows == 1
        assert (rows - 1) / columns <= MAX_ASPECT_RATIO


@pytest.mark.parametrize("roll", [False, True])
def test_visible_cells_of_inverse_block_are_one_block_up_to_wrapping(roll):
    generator, wrapped = seeded(3), 0
    for _ in range(60):
        visible = ~InverseBlock(roll=roll)(12, 16, 130, generator)
        unrolled = [visible.roll((-row, -column), (0, 1)) for row in range(12) for column in range(16)]
        if not roll:
            assert is_one_block(visible), visible
        elif not is_one_block(visible):
            wrapped += 1
            assert any(is_one_block(candidate) for candidate in unrolled), visible
    assert wrapped > 0 or not roll, "no mask was ever shifted across the border"


@pytest.mark.parametrize("name", ["InverseBlock_roll_True", "Block_roll_True", "Uniform"])
def test_every_patch_is_hidden_equally_often_with_roll(name):
    actual = frequency(name, 6, 10, 40, draws=6000)
    standard_error = math.sqrt(40 / 60 * 20 / 60 / 6000)
    assert (actual - 40 / 60).abs().max() < 4.5 * standard_error


def test_aspect_ratio_is_log_uniform():
    # Masks of 100 cells on a large grid: the block is never cut by the border, so rows/columns tells the ratio.
    generator = seeded(4)
    sizes = [bounding_box(Block(roll=False)(64, 64, 100, generator)) for _ in range(1500)]
    logs = torch.tensor([math.log(rows / columns) for rows, columns in sizes])
    assert logs.min() >= math.log(MIN_ASPECT_RATIO) - 0.15
    assert logs.max() <= math.log(MAX_ASPECT_RATIO) + 0.15
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    expected = math.log(MIN_ASPECT_RATIO) + quartiles * math.log(MAX_ASPECT_RATIO / MIN_ASPECT_RATIO)
    torch.testing.assert_close(logs.quantile(quartiles), expected, atol=0.1, rtol=0)


@every_generator
def test_the_same_seed_gives_the_same_mask_and_another_seed_another_one(name):
    def draw(seed):
        return GENERATORS[name](16, 16, 166, seeded(seed))

    assert torch.equal(draw(5), draw(5))
    assert not all(torch.equal(draw(5), draw(seed)) for seed in range(6, 12))


@every_generator
def test_global_random_numbers_are_not_used(name):
    before = torch.get_rng_state()
    GENERATORS[name](16, 16, 166, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (4, 9)])
@pytest.mark.parametrize(("mask_ratio", "subsampling"), [(0.65, 0.05), (0.65, 1.0), (0.9, 0.2), (0.1, 0.5)])
def test_positions_split_the_grid_exactly(height, width, mask_ratio, subsampling):
    plan = MaskPlan(height, width, mask_ratio, subsampling)
    assert plan.num_masked == int(height * width * mask_ratio)
    assert plan.num_visible == height * width - plan.num_masked
    assert plan.num_predict == int(plan.num_masked * subsampling)
    for seed in range(20):
        visible, predict = draw_positions(plan, InverseBlock(), seeded(seed))
        assert len(visible) == plan.num_visible
        assert len(predict) == plan.num_predict
        for positions in (visible, predict):
            assert positions.dtype == torch.int64
            assert positions.tolist() == sorted(set(positions.tolist())), "not ascending, or twice the same"
            assert positions.min() >= 0
            assert positions.max() < height * width
        assert not set(visible.tolist()) & set(predict.tolist()), "a visible patch is predicted"


def test_the_default_recipe_predicts_8_and_shows_90_of_256_patches():
    plan = MaskPlan(16, 16, 0.65, 0.05)
    assert (plan.num_masked, plan.num_visible, plan.num_predict) == (166, 90, 8)


def test_predict_positions_are_uniform_over_the_hidden_ones():
    plan = MaskPlan(4, 6, 0.5, 0.25)

    def fixed(height, width, num_masked, generator):
        return (torch.arange(24) % 2 == 0).view(4, 6)

    generator, draws = seeded(0), 3000
    counts = torch.zeros(24)
    for _ in range(draws):
        counts[draw_positions(plan, fixed, generator)[1]] += 1
    assert counts[1::2].sum() == 0, "a visible patch was predicted"
    expected = draws * 3 / 12
    assert (counts[::2] - expected).abs().max() < 4.5 * math.sqrt(expected * 0.75)


@pytest.mark.parametrize(
    ("height", "width", "mask_ratio", "subsampling", "key", "value", "remedy"),
    [
        (2, 2, 0.2, 1.0, "data.mask_ratio", "0.2", "at least 0.25"),
        (1, 7, 0.1, 1.0, "data.mask_ratio", "0.1", "at least 0.1429"),
        (1, 1, 0.9, 1.0, "data.mask_ratio", "0.9", "larger data.images_size"),
        (4, 4, 1.0, 1.0, "data.mask_ratio", "1.0", "smaller"),
        (4, 4, 0.65, 0.05, "data.prediction_subsampling", "0.05", "at least 0.1"),
        (16, 16, 0.65, 0.001, "data.prediction_subsampling", "0.001", "at least 0.0061"),
    ],
)
def test_impossible_counts_are_refused_with_key_value_and_a_remedy(
    height, width, mask_ratio, subsampling, key, value, remedy
):
    with pytest.raises(UserError) as error:
        MaskPlan(height, width, mask_ratio, subsampling)
    assert f"{key}={value}" in str(error.value)
    assert remedy in str(error.value)


def test_the_remedy_works_when_typed():
    for total in range(2, 400):
        with pytest.raises(UserError) as error:
            MaskPlan(1, total, 0.5 / total, 1.0)
        remedy = float(str(error.value).rsplit(" ", 1)[1])
        assert MaskPlan(1, total, remedy, 1.0).num_masked == 1


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("Blocks", {}, "data.masking_generator='Blocks': must be one of InverseBlock, Block, Uniform"),
        ("Block", {"rol": True}, "data.masking_generator_kwargs={'rol': True}: rol is unknown, Block takes roll"),
        ("Uniform", {"roll": True}, "data.masking_generator_kwargs={'roll': True}: roll is unknown, Uniform takes no"),
        ("Block", {"roll": "yes"}, "data.masking_generator_kwargs={'roll': 'yes'}: roll must be true or false"),
    ],
)
def test_a_wrong_generator_or_argument_is_named(name, kwargs, message):
    with pytest.raises(UserError) as error:
        make_masking_generator(name, **kwargs)
    assert message in str(error.value)


def test_the_made_generator_has_its_arguments():
    rolled, fixed = (make_masking_generator("Block", roll=roll) for roll in (True, False))
    assert isinstance(rolled, Block)
    assert isinstance(fixed, Block)
    assert (rolled.roll, fixed.roll) == (True, False)
    assert isinstance(make_masking_generator("InverseBlock"), InverseBlock)


def test_the_remedy_for_an_argument_that_a_generator_does_not_take_works_when_typed():
    """The default configuration has `roll`, and sections of configurations are merged."""

    def kwargs(*sources):
        cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.masking_generator=Uniform", *sources])
        return cfg.data.masking_generator_kwargs

    with pytest.raises(UserError) as error:
        make_masking_generator("Uniform", **kwargs())
    remedy = str(error.value).rsplit(" ", 1)[1]
    assert isinstance(make_masking_generator("Uniform", **kwargs(remedy)), Uniform)


# --- Blocks of CAE ---------------------------------------------------------------------------------------------------

BLOCKS = load_golden_json("vectors_cae")["block_masks_98_min16"]
SCATTERED = ScatteredBlocks(min_block=16, min_aspect=0.3)


def test_scattered_blocks_are_those_of_the_vectors():
    numbers = random.Random(BLOCKS["seed"])
    masks = torch.stack([SCATTERED.draw(14, 14, 98, numbers) for _ in range(2000)])
    for mask, name in zip(masks, ("first_mask_rows", "second_mask_rows"), strict=False):
        assert ["".join(str(int(cell)) for cell in row) for row in mask] == BLOCKS[name]
    assert (masks.sum((1, 2)) == 98).all() and BLOCKS["all_sum_98"]
    assert masks.float().mean((0, 2)).tolist() == pytest.approx(BLOCKS["row_freq"], abs=1e-4)
    assert masks.float().mean((0, 1)).tolist() == pytest.approx(BLOCKS["col_freq"], abs=1e-4)


def test_scattered_blocks_of_images_follow_from_seed_and_key_with_the_frequencies_of_the_vectors():
    masks = PatchMasks(MaskPlan(14, 14, 0.5, 1.0), SCATTERED, seed=0)
    indices = masks([(key,) for key in range(1000)])
    hidden, visible = (indices[name].view(1000, 98) % 196 for name in ("predict_indices", "visible_indices"))
    rows = torch.bincount(hidden.flatten() // 14, minlength=14) / 14_000
    assert rows.tolist() == pytest.approx(BLOCKS["row_freq"], abs=0.04)
    assert torch.equal(torch.cat([hidden, visible], dim=1).sort().values, torch.arange(196).expand(1000, -1))
    random.seed(5)
    again = masks([(7,), (8,)])["predict_indices"].view(2, 98) % 196
    assert torch.equal(again, hidden[7:9]) and not torch.equal(hidden[7], hidden[8])


@pytest.mark.parametrize(
    ("height", "width", "num_masked"), [(4, 4, 8), (8, 8, 32), (2, 2, 1), (14, 14, 195), (1, 9, 0)]
)
def test_scattered_blocks_hide_exactly_as_many_patches_on_any_grid_that_they_fit(height, width, num_masked):
    mask = SCATTERED(height, width, num_masked, seeded(0))
    assert mask.shape == (height, width) and int(mask.sum()) == num_masked


@pytest.mark.parametrize(("grid", "num_masked"), [((3, 3), 8), ((1, 9), 4)])
def test_scattered_blocks_that_do_not_fit_the_grid_are_refused_in_words(grid, num_masked):
    with pytest.raises(UserError, match=r"data.min_block=16, data.min_aspect=0.3: .* 3 x 3|1 x 9 patches do not come"):
        SCATTERED(*grid, num_masked, seeded(0))
