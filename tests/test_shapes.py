"""Crops that are no squares, `data.images_size=[height,width]`, through every method."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import assert_same_run
from conftest import seeded
from methods import METHODS, images_for_all
from PIL import Image

import finetune_classification
import hubconf
import train_cae
import train_capi
from model import position_grid, resize_positions, sincos_table

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twice as wide as high."""
    folder = images_for_all(tmp_path_factory.mktemp("data") / "images")
    for path in folder.iterdir():
        Image.open(path).resize((160, 80)).save(path)
    return folder


def arguments(name, images, output_dir, rows, columns, *more):
    """Of a run of two steps with so many rows and columns of patches."""
    method = METHODS[name]
    size = f"[{rows * method.patch},{columns * method.patch}]"
    sizes = [f"data.images_size={size}", *([f"tokenizer.image_size={size}"] if name == "cae" else [])]
    return method.tiny_run(images, output_dir, "optim.total_iters=2", "train.checkpointing.period=1", *sizes, *more)


@pytest.fixture(scope="module")
def wide(images, tmp_path_factory):
    """A run of each method on 4 x 8 patches."""
    runs = {}

    def of(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name)
            assert METHODS[name].script.main(arguments(name, images, runs[name], 4, 8)) == 0
        return runs[name]

    return of


@every_method
def test_an_interrupted_run_is_the_uninterrupted_one(images, wide, tmp_path, name):
    shutil.copytree(wide(name), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000000002")
    (tmp_path / f"{METHODS[name].export}.pth").unlink()
    assert METHODS[name].script.main(arguments(name, images, tmp_path, 4, 8)) == 0
    assert "continuing" in (tmp_path / "log.txt").read_text().rpartition("starting at")[2]
    assert_same_run(tmp_path, wide(name), [METHODS[name].export])


@every_method
def test_a_square_as_two_numbers_is_the_same_as_one(images, tmp_path, name):
    method = METHODS[name]
    patch = method.patch
    for run, size in (("two", []), ("one", [f"data.images_size={8 * patch}"])):
        assert method.script.main(arguments(name, images, tmp_path / run, 8, 8, *size)) == 0
        written = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert written["data"]["images_size"] == 8 * patch
        assert name != "cae" or written["tokenizer"]["image_size"] == 8 * patch
    assert_same_run(tmp_path / "two", tmp_path / "one", [method.export])


@every_method
def test_a_model_is_loaded_with_its_grid_by_every_way(wide, tmp_path, name):
    patch, load = METHODS[name].patch, METHODS[name].load_model
    weights = wide(name) / f"{METHODS[name].export}.pth"
    loaded = load(pretrained_weights=weights)
    if name != "capi":
        assert loaded.grid_size == (4, 8) and loaded.arguments["grid_size"] == (4, 8)
        table = sincos_table((4, 8), 32, row_first=name == "cae")
        assert torch.equal(loaded.pos_embed[:, -32:], table), "positions are those of another grid"
    untrained = load(config_path=weights.with_suffix(".yaml"))
    assert {k: x.shape for k, x in untrained.state_dict().items()} == {
        k: x.shape for k, x in loaded.state_dict().items()
    }
    by_hub = getattr(hubconf, "ijepa" if name == "stop" else name)(weights)
    by_hub.save_pretrained(tmp_path)
    again = type(by_hub).from_pretrained(tmp_path)
    x = torch.randn(2, 3, 4 * patch, 8 * patch, generator=seeded(0))
    expected = loaded(x)
    assert expected.feature_map.shape == (2, 4, 8, 32)
    for other in (by_hub, again):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
    assert loaded(x[..., : 4 * patch]).feature_map.shape == (2, 4, 4, 32), "squares do no longer work"


@pytest.mark.parametrize("name", ["ijepa", "cae"])
@pytest.mark.parametrize("grid", [(8, 4), (6, 6)])
def test_a_training_starts_from_weights_of_another_grid(images, wide, tmp_path, name, grid):
    load, export = METHODS[name].load_model, METHODS[name].export
    start = wide(name) / f"{export}.pth"
    more = [f"train.init_from={start}", "optim.total_iters=1"]
    assert METHODS[name].script.main(arguments(name, images, tmp_path, *grid, *more)) == 0
    before, after = (
        load(pretrained_weights=path).pos_embed[:, -n:]
        for path, n in ((start, 32), (tmp_path / f"{export}.pth", math.prod(grid)))
    )
    as_map = before.view(1, 4, 8, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(as_map, grid, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


def test_a_dry_run_says_and_shows_the_shape(images, tmp_path, capsys):
    assert train_capi.main([*arguments("capi", images, tmp_path / "run", 4, 8), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "16 x 32 px, 4 x 8 = 32 patches of 4 px" in said
    with Image.open(tmp_path / "run" / "dry_run.png") as sheet:
        assert sheet.height < 350, "there is room for squares"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images_size=[16]", "=[16]: must be a whole number, such as 1000 or a list of 2 whole numbers"),
        ("images_size=[16,0]", "=[16, 0]: must all be at least 1"),
        ("images_size=[16,8.5]", ".1=8.5: must be a whole number"),
        ("images_size=wide", "=wide: must be a whole number"),
        ("images_size=[17,30]", "=[17,30]: both must be multiples of model.patch_size=4; the nearest is [16,32]"),
        ("do_turns=true", "=True: quarter turns would swap height and width of data.images_size=[16,32]; use data.do"),
    ],
)
def test_a_size_that_cannot_be_is_named_with_a_remedy(images, tmp_path, capsys, override, message):
    assert train_capi.main(arguments("capi", images, tmp_path, 4, 8, f"data.{override}")) == 2
    assert f"data.{override.partition('=')[0]}{message}" in capsys.readouterr().err


def test_a_tokenizer_of_another_shape_is_named_with_a_remedy(images, tmp_path, capsys):
    assert train_cae.main(arguments("cae", images, tmp_path, 4, 8, "tokenizer.image_size=[64,32]")) == 2
    said = capsys.readouterr().err
    assert "tokenizer.image_size=[64,32]: it gives 8 x 4 tokens, and images have 4 x 8 patches; use [32,64]" in said


def test_fine_tuning_takes_squares_alone(images, tmp_path, capsys):
    given = [f"data.dataset={images}", f"train.output_dir={tmp_path}", "data.images_size=[32,64]"]
    assert finetune_classification.main(given) == 2
    assert "data.images_size=[32, 64]: must be a whole number" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("row_first", [False, True])
@pytest.mark.parametrize("grid", [(4, 8), (2, 16), (3, 5), (1, 9), (9, 1), (4, 4), (1, 1)])
def test_positions_are_those_of_the_formula_and_tell_their_grid(grid, row_first):
    table = sincos_table(grid, 16, row_first=row_first)
    for number, (row, column) in enumerate((r, c) for r in range(grid[0]) for c in range(grid[1])):
        first, second = (row, column) if row_first else (column, row)
        frequencies = [10000 ** -(k / 4) for k in range(4)]
        expected = [f(place * w) for place in (first, second) for f in (math.sin, math.cos) for w in frequencies]
        assert table[0, number].tolist() == pytest.approx(expected, abs=1e-6)
    with_class = torch.cat([torch.zeros(1, 1, 16), table], dim=1)
    assert position_grid(table, row_first=row_first) == position_grid(with_class, row_first=row_first) == grid
    if min(grid) > 1:
        larger = resize_positions(table, (16 * grid[0], 20), antialias=False, own_grid=grid)
        assert position_grid(larger, row_first=row_first) == (16 * grid[0], 20)


def test_tables_of_other_kinds_are_those_of_squares():
    for table in (torch.randn(1, 16, 8, generator=seeded(0)), torch.zeros(1, 17, 8)):
        assert position_grid(table, row_first=False) == (4, 4)
