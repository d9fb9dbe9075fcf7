"""What a start costs: importing torch, `--help` of every script, and a training until its first and second step.

    python bench/startup.py [--repeats N] [config.yaml ...] [a.b=c ...]

Each row is a process of its own, timed from outside by the wall clock; medians of `--repeats`, with the rows of one
round after the other. The training is that of configs/demo.yaml with one block each in encoder and predictor and 8
images per step. `cold` compiles everything, once and for about a minute on a CPU; `warm` starts again with the compile
cache that it left in the run's folder. Baseline is `import torch`, below which nothing that trains can start.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from results import add_arguments, print_table, record, whole_number

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text())
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
TRAINING = [
    str(ROOT / "configs" / "demo.yaml"),
    "data.dataset=demo_data/emoji_on_scenes/train/images",
    "efficiency.dataloader_num_workers=0",
    "model.encoder_kwargs.depth=1",
    "model.decoder_kwargs.depth=1",
    "optim.batch_size_per_gpu=8",
    "optim.total_iters=2",
]
PARTS = ("imports", "data", "model", "first step", "until the first step is done", "second step")
CHILD = """
import json, sys, time
started = float(sys.argv[1])

def timed(name, function):
    def call(*args, **kwargs):
        begun = time.monotonic()
        result = function(*args, **kwargs)
        if isinstance(result, dict):
            result["loss"].item()  # waits for the device
        parts.setdefault(name if name not in parts else "second step", time.monotonic() - begun)
        if name == "first step":
            parts.setdefault("until the first step is done", time.monotonic() - started)
        return result
    return call

import train_capi
parts = {"imports": time.monotonic() - started}
train_capi.PretrainLoader = timed("data", train_capi.PretrainLoader)
train_capi.CapiState = timed("model", train_capi.CapiState)
train_capi.train_step = timed("first step", train_capi.train_step)
code = train_capi.main(sys.argv[2:])
sys.stdout.write(json.dumps(parts) + "\\n")
sys.exit(code)
"""
"""A training that says how long its parts took. `imports` and `until ...` begin where the process does; the latter has
what lies between the parts as well."""


def environment() -> dict[str, str]:
    """That of this process, with the compile cache left to the training and this repository to import from."""
    own = {name: value for name, value in os.environ.items() if name not in CACHES}
    return own | {"PYTHONPATH": str(ROOT)}


def seconds(*arguments: str) -> float:
    """Wall time of a Python process."""
    begun = time.monotonic()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, check=True)
    return time.monotonic() - begun


def training(output_dir: Path, sources: Sequence[str], *, compiled: bool) -> dict[str, float]:
    """Seconds of the parts of two training steps, from the start of the process.

    Args:
        output_dir: of the run. What an earlier one left is deleted, but for the compile cache.
        sources: further configuration.
        compiled: whether teacher and student are compiled.
    """
    for path in output_dir.glob("*"):
        if path.name != "compile_cache":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    disabled = str(not compiled).lower()
    choices = [f"efficiency.compilation.{name}.disable={disabled}" for name in ("do_teacher", "do_student")]
    arguments = [*TRAINING, *choices, *sources, f"train.output_dir={output_dir}"]
    command = [sys.executable, "-c", CHILD, str(time.monotonic()), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    parts = json.loads(done.stdout.splitlines()[-1])
    return {part: parts[part] for part in PARTS}


def measure(repeats: int, sources: Sequence[str], folder: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Medians: of plain processes, and of the parts of trainings."""
    plain = {"python -c pass": ["-c", "pass"], "import torch": ["-c", "import torch"]}
    plain |= {f"{script} --help": [script, "--help"] for script in SCRIPTS}
    times: dict[str, list[float]] = {name: [] for name in plain}
    trainings: dict[str, list[dict[str, float]]] = {"eager": [], "compiled, cold": [], "compiled, warm": []}
    trainings["compiled, cold"].append(training(folder / "compiled", sources, compiled=True))
    for _ in range(repeats):
        for name, arguments in plain.items():
            times[name].append(seconds(*arguments))
        trainings["eager"].append(training(folder / "eager", sources, compiled=False))
        trainings["compiled, warm"].append(training(folder / "compiled", sources, compiled=True))
    medians = {
        name: {part: statistics.median(each[part] for each in measured) for part in PARTS}
        for name, measured in trainings.items()
    }
    return {name: statistics.median(each) for name, each in times.items()}, medians


def rows(plain: Mapping[str, float], trainings: Mapping[str, Mapping[str, float]]) -> list[dict[str, str | float]]:
    """The table."""
    named = dict(plain)
    for name, parts in trainings.items():
        named |= {f"training, {name}: {part}": value for part, value in parts.items()}
    torch = named["import torch"]
    return [{"what": name, "seconds": value, "of import torch": value / torch} for name, value in named.items()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="config.yaml | a.b=c", help="of the training; later ones win")
    parser.add_argument("--repeats", type=whole_number, default=3, help="of each process; default: %(default)s")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        table = rows(*measure(args.repeats, args.sources, Path(folder)))
    print_table(table)
    record(args, "startup", {"repeats": args.repeats, "sources": " ".join(args.sources)}, table)


if __name__ == "__main__":
    main()
