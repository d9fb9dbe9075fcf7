"""What the benchmarks share: a table on the screen, a line in `results.jsonl`, the newest of these in `README.md`.

    python bench/results.py [--results FILE]     write the newest results into bench/README.md

A line holds `bench`, `date`, `hardware`, `commit`, `versions`, `settings` and `numbers`: one dictionary per row of the
table. README shows, per benchmark, device and settings, the newest line.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

import torch

from config import argument
from distributed import device_model, pick_device
from utils import git_revision

RESULTS = Path(__file__).parent / "results.jsonl"
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- newest results: begin -->", "<!-- newest results: end -->")

whole_number = argument(int, at_least=1)
positive_number = argument(float, above=0)

Row = Mapping[str, str | int | float | bool | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--results`, the file that a line is appended to."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines file that the result is appended to")


def record(
    args: argparse.Namespace,
    bench: str,
    settings: Mapping[str, Any],
    numbers: Sequence[Row],
    device: torch.device | None = None,
) -> None:
    """Append one line to `args.results`.

    Args:
        args: with what `add_arguments` added.
        bench: name of the benchmark.
        settings: what was measured; with `bench` and the device, lines of equal settings replace each other in README.
        numbers: rows of the table, by column; None where nothing was measured.
        device: what it was measured on; what is picked for a training if None.
    """
    line = {
        "bench": bench,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(device or pick_device("auto")),
        "commit": git_revision("bench/results.jsonl", "bench/README.md"),  # what an earlier benchmark has written
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": dict(settings),
        "numbers": [dict(row) for row in numbers],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")


@functools.cache
def hardware(device: torch.device) -> str:
    """A GPU and its memory, or the processor and the number of threads that torch uses."""
    name = device_model(device)
    if device.type == "cuda":
        return f"{name}, {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} shared cores"


def print_table(rows: Sequence[Row]) -> None:
    """Print rows of the same columns, aligned; may be called again with more rows of the same table."""
    sys.stdout.write(_aligned([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]))
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def newest(path: Path) -> list[dict[str, Any]]:
    """The last line of each benchmark, device and settings, in order of the benchmarks' names."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    last = {json.dumps([line["bench"], line["hardware"], line["settings"]]): line for line in lines}
    return sorted(last.values(), key=lambda line: line["bench"])


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """One section per benchmark, one table per line."""
    parts, bench = [], None
    for line in lines:
        if line["bench"] != bench:
            bench = line["bench"]
            parts.append(f"### {bench}\n")
        settings = ", ".join(f"{key} {value}" for key, value in line["settings"].items())
        versions = ", ".join(f"{key} {value}" for key, value in line["versions"].items())
        commit = re.sub(r"(?<=[0-9a-f]{10})[0-9a-f]+", "", line["commit"] or "outside a git checkout")
        parts.append(f"{line['date']}, {line['hardware']}, {versions}, code {commit}; {settings}\n")
        columns = list(line["numbers"][0])
        rows = [
            columns,
            ["---"] * len(columns),
            *([_cell(row.get(c)).replace("|", "\\|") for c in columns] for row in line["numbers"]),
        ]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    return "\n".join(parts)


def write_readme(results: Path, readme: Path) -> None:
    """Put the newest results between the marks of the README."""
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n\n{markdown(newest(results))}\n{MARKS[1]}{after}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    write_readme(parser.parse_args().results, README)


if __name__ == "__main__":
    main()
