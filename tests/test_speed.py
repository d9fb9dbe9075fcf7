"""speed/: the law of the folder, that a training which asks for nothing fast does not need it."""

import textwrap

from conftest import ROOT, run_cli
from runs import make_images, tiny

ALL_OFF = ["capi.clustering_kernel=plain", "efficiency.fsdp=none"]
"""On top of a tiny training, in which compilation and recomputation are off already."""

TRAIN = """
    import sys
    import train_capi

    assert train_capi.main(sys.argv[1:]) == 0
    print(*(name for name in sys.modules if name.split(".")[0] == "speed"), sep=",")
"""


def imported_in_training(tmp_path, *overrides: str) -> list[str]:
    """Modules of the folder that a process has imported after two steps."""
    images = make_images(tmp_path / "images")
    arguments = tiny(images, tmp_path / "run", "optim.total_iters=2", *ALL_OFF, *overrides)
    done = run_cli("-c", textwrap.dedent(TRAIN), *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return [name for name in done.stdout.strip().split(",") if name]


def test_with_everything_off_a_training_imports_nothing_that_only_makes_it_faster(tmp_path):
    assert imported_in_training(tmp_path) == []


def test_what_is_on_is_imported_and_no_more(tmp_path):
    imported = imported_in_training(tmp_path, "efficiency.rematerialization.enabled=true")
    assert imported == ["speed", "speed.recomputing"], "what is imported goes unnoticed"
