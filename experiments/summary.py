"""What came of the trainings of a table: means and deviations over seeds, as JSON, as text and as one page."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from table import TableConfig, Training

from launch import Status
from metrics import TIMING_KEYS
from report import (
    Cell,
    Panel,
    Score,
    curves_section,
    key_values,
    notice,
    numbers_table,
    pictures_section,
    read_results,
    score_rows,
    section,
    write_page,
)

RANDOM = "random weights"
IMAGES, CPU_MINUTES = "images", "CPU minutes"
USED = (IMAGES, CPU_MINUTES)
"""Columns that say what a training used up."""


def summarise(cfg: TableConfig, trainings: Sequence[Training], statuses: Mapping[str, Status]) -> dict[str, Any]:
    """The content of results.json, as `as_json` writes it.

    Args:
        cfg: of the table.
        trainings: all of it.
        statuses: title of a training -> how it stands.

    Returns: `columns`, name -> how its values are shown (see `report.Score`); `rows`, name -> `seeds`, with status,
        message and values of each, and `mean`, `deviation` (of the sample) and `count` of each column, over the seeds
        whose training is complete; `notices`, sentences that a reader must not miss; and what was asked for and when,
        and which code and versions trained it.
    """
    columns: dict[str, Score] = {}
    rows: dict[str, dict[str, Any]] = {}
    complete: dict[str, list[dict[str, float]]] = {}
    for training in trainings:
        status = statuses[training.title]
        own, untrained = values_of(training, cfg, status.word, columns)
        standing = {"status": status.word, "message": status.message, "folder": str(training.folder)}
        made = {"note": training.entry.note, "command": training.command(training.num_steps), "seeds": {}}
        parts = [(training.name, made, own)]
        if training.entry.random:
            note = f"The model of {training.name} as it is before training."
            made = {"note": note, "command": None, "seeds": {}}
            parts.append((f"{RANDOM} ({training.name})", made, untrained))
        for name, row, values in parts:
            rows.setdefault(name, row)["seeds"][str(training.seed)] = standing | {"values": values}
            complete.setdefault(name, []).extend([values] if training.is_done() else [])
    for name, row in rows.items():
        row.update(moments(list(columns), complete[name]))
    return {
        "title": cfg.title,
        "budget": str(cfg.budget),
        "seeds": cfg.seeds,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "code": made_by(trainings, "code"),
        "versions": {name: made_by(trainings, name) for name in ("python", "torch")},
        "evaluated on": sorted(
            {device for training in trainings for device in devices_of(training, cfg, statuses[training.title].word)}
        ),
        "columns": {name: score._asdict() for name, score in columns.items()},
        "rows": rows,
        "notices": notices(cfg, trainings, statuses, rows),
    }


def values_of(
    training: Training, cfg: TableConfig, status: str, columns: dict[str, Score]
) -> tuple[dict[str, float], dict[str, float]]:
    """The values of a training, and those of its model at random initialisation, by column.

    Args:
        training: as far as it got.
        cfg: of the table.
        status: the word for how it stands.
        columns: filled with what occurs.
    """
    own, untrained = scores_of(training, cfg, status, columns)
    records = training.records()
    for name, key in cfg.metrics.items():
        # What is not finite is null in a metrics.jsonl.
        values = [math.nan if record[key] is None else record[key] for record in records if key in record]
        columns.setdefault(name, Score((key,), label=name, unit=""))
        if values:
            finite = [value for value in values if math.isfinite(value)]
            own[name] = statistics.median(finite or [math.nan]) if key in TIMING_KEYS else values[-1]
    for name in USED:
        columns.setdefault(name, Score((name,), label=name, unit=""))
    if records:
        own[IMAGES] = training.images_seen(cfg.num_ranks)
    if training.cpu_seconds is not None:
        own[CPU_MINUTES] = training.cpu_seconds / 60
    return own, untrained


def made_by(trainings: Sequence[Training], name: str) -> list[Any]:
    """The different values of `code`, or a version, with which trainings were started, as far as that was noted."""
    return list(dict.fromkeys(versions.get(name) for training in trainings for versions in training.made_by))


def evaluations_of(training: Training, cfg: TableConfig, status: str) -> dict[str, Any]:
    """What benchmark.py wrote of a complete training, without evaluations that the table lacks, or that are not done.

    One that is not done, or was refused, may have left the results of another request.
    """
    path = training.folder / "evaluation" / "results.json"
    content = read_results(path) if path.is_file() and training.is_done() and status != "refused" else {}
    done = {
        part: {
            name: entry
            for name, entry in content.get(part, {}).items()
            if cfg.evaluations.get(name) is not None and entry.get("status") == "done"
        }
        for part in ("evaluations", "random")
    }
    return {"name": training.name, **done}


def scores_of(
    training: Training, cfg: TableConfig, status: str, columns: dict[str, Score]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of a training and of its random initialisation, as far as they were evaluated, by column."""
    for name, place in cfg.scores.items():
        if cfg.evaluations.get(place.partition("/")[0]) is not None:
            columns.setdefault(name, Score(tuple(place.split("/")), label=name))
    names = {place: name for name, place in cfg.scores.items()}
    own, untrained = {}, {}
    content = evaluations_of(training, cfg, status)
    for row in score_rows(content):
        place = f"{row.evaluation}/{row.method}/{row.metric}"
        if cfg.scores and place not in names:
            continue
        name = names.get(place, place)
        columns[name] = row.score._replace(label=name)
        if row.values[0] is not None:
            own[name] = row.values[0]
        if content["random"] and row.values[1] is not None:
            untrained[name] = row.values[1]
    return own, untrained


def devices_of(training: Training, cfg: TableConfig, status: str) -> set[str]:
    """The models of GPU or processor that evaluated a training; a Slurm job's are not those of this machine."""
    entries = evaluations_of(training, cfg, status)["evaluations"].values()
    return {entry["about"]["device"] for entry in entries if "device" in entry.get("about", {})}


def moments(columns: Sequence[str], values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, deviation of the sample and number of the values of each column, where there are enough.

    Of values that are not all finite, mean and deviation are NaN.
    """
    known = {name: [seed[name] for seed in values if name in seed] for name in columns}
    usable = {name: numbers if all(map(math.isfinite, numbers)) else [] for name, numbers in known.items()}
    return {
        "mean": {name: statistics.fmean(usable[name] or [math.nan]) for name, numbers in known.items() if numbers},
        "deviation": {
            name: statistics.stdev(usable[name]) if usable[name] else math.nan
            for name, numbers in known.items()
            if len(numbers) > 1
        },
        "count": {name: len(numbers) for name, numbers in known.items()},
    }


def as_json(tree: Any) -> Any:
    """Nested values with null for numbers that are not finite, for which JSON has no word."""
    if isinstance(tree, Mapping):
        return {key: as_json(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [as_json(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def notices(
    cfg: TableConfig,
    trainings: Sequence[Training],
    statuses: Mapping[str, Status],
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What a reader of the table must know: what is not done, what is particular about a row, and the table's notes."""
    open_ones = [(training.title, statuses[training.title]) for training in trainings]
    lines = [f"{title}: {status.word}. {status.message}" for title, status in open_ones if status.word != "done"]
    lines += [f"{name}: {row['note']}" for name, row in rows.items() if row["note"]]
    return lines + cfg.notes


def shown(row: Mapping[str, Any], name: str, score: Score) -> str:
    """The cell of a row in a column: the mean, the deviation if there are several seeds, and how many, if not all."""
    if name not in row["mean"]:
        return "n/a"
    text = f"{row['mean'][name]:,.0f}" if name == IMAGES else score.number(row["mean"][name])
    if name in row["deviation"] and name != IMAGES and not math.isnan(row["mean"][name]):
        text += f" ± {score.number(row['deviation'][name])}"
    if row["count"][name] < len(row["seeds"]):
        text += f" ({row['count'][name]} of {len(row['seeds'])})"
    return text


def read_columns(content: Mapping[str, Any]) -> dict[str, Score]:
    """The columns of a results.json."""
    return {name: Score(**{**score, "path": tuple(score["path"])}) for name, score in content["columns"].items()}


def text_table(content: Mapping[str, Any]) -> str:
    """The table for a terminal: a row for each training, fractions in percent."""
    columns = read_columns(content)
    lines = [["training", *(score.shown_label for score in columns.values())]]
    lines += [
        [name, *(shown(row, column, score) for column, score in columns.items())]
        for name, row in content["rows"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def write_report(path: Path, content: Mapping[str, Any], trainings: Sequence[Training], cfg: TableConfig) -> None:
    """Write the page of a table: the numbers, curves and pictures of the first seed, and how it was made.

    Args:
        path: of the HTML file, in the folder of the table.
        content: as `summarise` gives it.
        trainings: of the table.
        cfg: likewise.
    """
    columns, rows = read_columns(content), content["rows"]
    best = {
        name: max((row["mean"].get(name, math.nan) for row in rows.values()), key=score.rank)
        for name, score in columns.items()
        if name not in (*USED, *cfg.metrics)
    }
    cells = {
        label: [
            Cell(shown(row, name, score), "best" if row["mean"].get(name) == best.get(name, math.nan) else "")
            for name, score in columns.items()
        ]
        for label, row in rows.items()
    }
    seeds = ", ".join(map(str, content["seeds"]))
    told = f"{content['budget']} for each training; {'seed' if len(cfg.seeds) == 1 else 'seeds'} {seeds}."
    caption = (
        "Mean, and deviation of the sample where there are several seeds; (1 of 3): of one of three, as yet. Fractions "
        "are in percent."
    )
    heads = ["training", *(score.shown_label for score in columns.values())]
    numbers = section("scores", "Results", [numbers_table(heads, cells, caption)])
    first = [training for training in trainings if training.seed == cfg.seeds[0]]
    sections = [notice(content["notices"]), numbers, curves(first, cfg), pictures(first, cfg, content), about(content)]
    write_page(path, content["title"], told, sections)


def curves(trainings: Sequence[Training], cfg: TableConfig) -> str:
    """A drawing for each key that is asked for, with the curve of each training."""
    records = {training.name: training.records() for training in trainings}
    drawings = []
    for key in cfg.curves:
        points = [
            {"step": record["step"], name: record[key]}
            for name, run in records.items()
            for record in run
            if record.get(key) is not None
        ]
        names = {name: name for name in records if any(name in point for point in points)}
        drawings.append((points, Panel(key, "", names)))
    return curves_section(f"Seed {cfg.seeds[0]}.", drawings) if drawings else ""


def pictures(trainings: Sequence[Training], cfg: TableConfig, content_of_table: Mapping[str, Any]) -> str:
    """What evaluations drew of each training."""
    base, contents = Path(cfg.output_dir), []
    for training in trainings:
        here = (training.folder / "evaluation").relative_to(base)
        status = content_of_table["rows"][training.name]["seeds"][str(training.seed)]["status"]
        content = evaluations_of(training, cfg, status)
        for part in ("evaluations", "random"):
            entries = content[part].items()
            content[part] = {name: {**entry, "folder": str(here / entry["folder"])} for name, entry in entries}
        contents += [content] if content["evaluations"] else []
    return pictures_section(contents, base)


def about(content: Mapping[str, Any]) -> str:
    """How the table was made."""
    made = {key: content[key] for key in ("date", "code", "versions", "evaluated on", "budget", "seeds")}
    commands = {name: row["command"] for name, row in content["rows"].items() if row["command"]}
    folders = {name: next(iter(row["seeds"].values()))["folder"] for name, row in content["rows"].items()}
    tables = [
        key_values(made, None),
        key_values(commands, "The training of the first seed, as typed."),
        key_values(
            folders, "Where the first seed is; evaluation/report.html in it has all settings and more pictures."
        ),
    ]
    return section("about", "How it was made", tables)
