"""notebooks/: each runs from its first cell to its last, and shows pictures."""

import re

import nbclient
import nbformat
import pytest
from commands import make_images
from conftest import ROOT

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
TINY = ["model.encoder_kwargs.depth=1", "model.decoder_kwargs.depth=1", "optim.batch_size_per_gpu=4"]
TINY += ["efficiency.dataloader_num_workers=0", "capi.num_clusters=8", "train.health_every=0"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_they_showed(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.long
def test_a_folder_of_images_becomes_features_and_pictures(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "features_of_a_folder.ipynb", as_version=4)
    where = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    chosen = {
        "IMAGES": str(make_images(tmp_path / "images", 6)),
        "OUTPUT": str(tmp_path / "out"),
        "STEPS": 2,
        "RESOLUTION": 32,
        "OVERRIDES": TINY,
    }
    assert set(chosen) < set(re.findall(r"^([A-Z]+) =", notebook.cells[where].source, re.M))
    given = "\n".join(f"{name} = {value!r}" for name, value in chosen.items())
    notebook.cells.insert(where + 1, nbformat.v4.new_code_cell(given))
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    shown = [[output.data for output in cell.get("outputs", ()) if "data" in output] for cell in notebook.cells]
    assert sum("image/png" in data for cell in shown for data in cell) == 1 + 4 + 1  # all, four queries, the overview
    assert (tmp_path / "out" / "training" / "student_ema.pth").is_file()
