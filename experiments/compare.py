"""Methods side by side: trained under one budget, evaluated in the same way, in one table.

    python experiments/compare.py experiments/four_methods.yaml [more.yaml ...] [a.b=c ...]

Writes results.json and report.html in `output_dir`, and prints the table. What is done is not done again: the same
command goes on after an interruption, and with `launcher=slurm` collects what has finished and submits what can follow.
A method is an entry of the YAML file; `--help-all` shows all keys, experiments/README.md says what an entry needs.
Exit code 1 if a part failed; the others are done and reported.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the trainings and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # see `side_by_side`

import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from summary import as_json, summarise, text_table, write_report
from table import TableConfig, Training, evaluate, plan, planned_steps, same_seed, train

from config import check_evaluation, dump_yaml, load_config
from keys import answer
from launch import Status, claim_output_dir
from utils import (
    UserError,
    ended_with_block,
    ending_in_words,
    setup_logging,
    start_python,
    write_text_atomically,
)

logger = logging.getLogger("compare")

POLL_S = 0.2


def make_table(cfg: TableConfig, sources: Sequence[str]) -> int:
    """Do what is left to do, and write the results after each part of it. Returns the exit code.

    Args:
        cfg: of the table.
        sources: of which it was made.

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
        ended = in_turn(trainings, cfg) if cfg.at_once == 1 else side_by_side(trainings, cfg, sources)
        for training, status in ended:
            statuses[training.title] = status
            content = summarise(cfg, trainings, statuses)
            write_text_atomically(base / "results.json", json.dumps(as_json(content), indent=2) + "\n")
        content = summarise(cfg, trainings, statuses)
        write_report(base / "report.html", content, trainings, cfg)
        lines = [text_table(content), "", *content["notices"], str(base / "results.json"), str(base / "report.html")]
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if any(status.word in ("failed", "refused") for status in statuses.values()) else 0


def in_turn(trainings: Sequence[Training], cfg: TableConfig) -> Iterator[tuple[Training, Status]]:
    """Each training with its evaluations, in this process, and how it stands then."""
    for training in trainings:
        yield training, advance(training, trainings, cfg)


def side_by_side(
    trainings: Sequence[Training], cfg: TableConfig, sources: Sequence[str]
) -> Iterator[tuple[Training, Status]]:
    """The same, `cfg.at_once` of them at a time, each in a process of its own, which is this command with `--part`.

    What a process says besides that of its scripts goes to `part.txt` in the folder of the training.
    """
    waiting = list(trainings)
    running: list[tuple[Training, subprocess.Popen[str]]] = []
    with contextlib.ExitStack() as ends:
        try:
            while waiting or running:
                unfinished = [*waiting, *(training for training, _ in running)]
                for training in list(waiting):
                    if len(running) < cfg.at_once and has_what_it_reads(training, unfinished):
                        waiting.remove(training)
                        running.append((training, ends.enter_context(start_part(training, sources))))
                        logger.info("%s starts; %d wait", training.title, len(waiting))
                time.sleep(POLL_S)
                for training, process in [each for each in running if each[1].poll() is not None]:
                    running.remove((training, process))
                    yield training, told_by(training, process)
        finally:  # of an interruption: the end of the block asks and waits for one after the other
            for _, process in running:
                process.terminate()


def has_what_it_reads(training: Training, unfinished: Sequence[Training]) -> bool:
    """Whether the trainings that it reads have made their weights, or have ended without; others are unfinished."""
    read = (each for each in unfinished if each.seed == training.seed and each.name in training.needs)
    return all(each.is_done() for each in read)


@contextlib.contextmanager
def start_part(training: Training, sources: Sequence[str]) -> "Iterator[subprocess.Popen[str]]":
    """A process that advances one training, and ends with this block."""
    training.folder.mkdir(parents=True, exist_ok=True)
    command = [__file__, *sources, f"--part={training.title}"]
    with (
        (training.folder / "part.txt").open("w") as said,
        start_python(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
        ended_with_block(process),
    ):
        yield process


def told_by(training: Training, process: "subprocess.Popen[str]") -> Status:
    """How a training stands, by the last line of the process that advanced it."""
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    try:
        status = Status(**json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        status = Status("failed", f"exit code {process.returncode}, see {training.folder / 'part.txt'}")
    logger.info("%s: %s %s", training.title, status.word, status.message)
    return status


def advance_part(cfg: TableConfig, title: str) -> int:
    """Advance one training of a table that another process makes, and print how it stands. Returns the exit code."""
    trainings = plan(cfg, keep=True)
    training = next(each for each in trainings if each.title == title)
    sys.stdout.write(json.dumps(asdict(advance(training, trainings, cfg))) + "\n")
    return 0


def advance(training: Training, trainings: Sequence[Training], cfg: TableConfig) -> Status:
    """Train and evaluate as far as it is not done; a mistake that shows here is a failure of this training alone."""
    evaluated = any(entry is not None for entry in cfg.evaluations.values())
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            status = train(training, cfg, same_seed(training, trainings))
            return evaluate(training, cfg) if status.word == "done" and evaluated else status
    except UserError as error:
        return Status("failed", str(error))


def show(cfg: TableConfig) -> int:
    """Print what would be run, and write nothing. Returns the exit code."""
    for training in plan(cfg, keep=False):
        if training.preparation is not None and not training.preparation.is_done():
            sys.stdout.write(f"{training.preparation.title}: {training.preparation.script}\n")
        length = planned_steps(training, cfg) if training.num_steps is None else training.num_steps
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
        if args.part is not None:
            return advance_part(cfg, args.part)
        return show(cfg) if args.dry_run else make_table(cfg, sources)
    except KeyboardInterrupt as error:
        error.add_note("the same command goes on")
        raise


if __name__ == "__main__":
    sys.exit(main())
