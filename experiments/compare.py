"""Methods side by side: trained under one budget, evaluated in the same way, in one table.

    python experiments/compare.py experiments/four_methods.yaml [more.yaml ...] [a.b=c ...]

Writes results.json and report.html in `output_dir`, and prints the table. What is done is not done again: the same
command goes on after an interruption, and with `launcher=slurm` collects what has finished and submits what can follow.
A method is an entry of the YAML file; `table.TableConfig` has all keys, experiments/README.md says what an entry needs.
Exit code 1 if a part failed; the others are done and reported.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the trainings and stop")

import argparse
import contextlib
import json
from collections.abc import Sequence

from summary import summarise, text_table, write_report
from table import TableConfig, Training, evaluate, plan, planned_steps, train

from config import check_evaluation, dump_yaml, load_config
from keys import answer
from launch import Status, claim_output_dir
from utils import UserError, ending_in_words, setup_logging, write_text_atomically


def make_table(cfg: TableConfig) -> int:
    """Do what is left to do, and write the results after each part of it. Returns the exit code.

    Raises: UserError for what can be seen before anything runs.
    """
    base = Path(cfg.output_dir)
    evaluations = {name: entry for name, entry in cfg.evaluations.items() if entry is not None}
    with claim_output_dir(base, key="output_dir"):
        write_text_atomically(base / "evaluations.yaml", dump_yaml(evaluations))
        for name, entry in evaluations.items():  # mistakes are seen before hours of training
            check_evaluation(f"evaluations.{name}", entry)
        trainings = plan(cfg, keep=True)
        statuses = {training.title: Status("not started") for training in trainings}
        for training in trainings:
            statuses[training.title] = advance(training, trainings, cfg, evaluated=bool(evaluations))
            content = summarise(cfg, trainings, statuses)
            write_text_atomically(base / "results.json", json.dumps(content, indent=2) + "\n")
        content = summarise(cfg, trainings, statuses)
        write_report(base / "report.html", content, trainings, cfg)
        lines = [text_table(content), "", *content["notices"], str(base / "results.json"), str(base / "report.html")]
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if any(status.word == "failed" for status in statuses.values()) else 0


def advance(training: Training, trainings: Sequence[Training], cfg: TableConfig, *, evaluated: bool) -> Status:
    """Train and evaluate as far as it is not done; a mistake that shows here is a failure of this training alone."""
    others = {other.name: other for other in trainings if other.seed == training.seed}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            status = train(training, cfg, others)
            return evaluate(training, cfg) if status.word == "done" and evaluated else status
    except UserError as error:
        return Status("failed", str(error))


def show(cfg: TableConfig) -> int:
    """Print what would be run, and write nothing. Returns the exit code."""
    for training in plan(cfg, keep=False):
        if training.preparation is not None and not training.preparation.is_done():
            sys.stdout.write(f"{training.preparation.title}: {training.preparation.script}\n")
        length = training.num_steps
        if length is None and cfg.budget.images is not None:
            length = planned_steps(training, cfg)
        words = "as many steps as a calibration tells" if length is None else f"{length} steps"
        per_step = training.images_per_step(cfg.num_ranks)
        sys.stdout.write(f"{training.title}: {words} of {per_step} images\n    {training.command(length)}\n")
    return 0


def _written_out(source: str) -> str:
    """`launcher=slurm` is short for a key, as for benchmark.py."""
    return source.replace("launcher=", "launcher.where=", 1) if source.startswith("launcher=") else source


@ending_in_words
def main(arguments: Sequence[str] | None = None, own_parser: argparse.ArgumentParser = parser) -> int:
    """The command line. Returns the exit code: 0 done or submitted, 1 a part failed, 2 a mistake of the user."""
    args = own_parser.parse_intermixed_args(arguments)
    setup_logging()
    sources = [_written_out(source) for source in args.sources]
    answer(args, TableConfig, sources)
    cfg = load_config(TableConfig, None, sources)
    try:
        return show(cfg) if args.dry_run else make_table(cfg)
    except KeyboardInterrupt as error:
        error.add_note("the same command goes on")
        raise


if __name__ == "__main__":
    sys.exit(main())
