"""Reports: the curves of a training run, and the scores of evaluations as text and as one HTML file.

    python report.py runs/mine                          a page of a training, at any time: runs/mine/report.html
    python report.py runs/mine --output page.html

The HTML file holds everything it shows, runs no script and loads nothing, which its content security policy enforces:
it can be mailed, archived and opened without a network. That of a training has its curves, what it saw, the pictures of
its evaluations, the end of its log and its configuration, as far as they are there yet.
"""

from utils import command_line

with command_line(__doc__, __name__) as parser:
    parser.add_argument("run_dir", help="folder of a training, running or finished")
    parser.add_argument("--output", help="the page (default: report.html in that folder)")

import base64
import collections
import functools
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from config import read_yaml
from metrics import read_metrics
from utils import (
    UserError,
    as_typed,
    ending_in_words,
    git_revision,
    setup_logging,
    write_text_atomically,
    writing_explained,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart also by colour-blind people.
BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#777777"
COLORS = (BLUE, VERMILLION, GREEN, ORANGE)
STYLES = ("-", "--", "-.", ":")
"""Of curves that share a colour, or nearly."""
FEW = 8
"""Curves of one drawing that have their legend among them; that of more is beside them."""

PANELS = "panels.json"
"""In the folder of a training: which curves its method wants seen, see `Panel`."""

CONTACT_SHEET, DRY_RUN_SHEET = "contact_sheet.png", "dry_run.png"
"""Likewise: what it sees since its last start, and what a `--dry-run` said that it would."""

MINUS = "\N{MINUS SIGN}"
PICTURES_EACH = 4
"""Pictures that are shown of one evaluation of one model alone."""
PICTURES_MIB = 6
"""All pictures together; a third more in the file, which stays below 10 MB."""
PICTURE_SIZE = 1600
"""Longer side of a picture, in pixels."""


# ------------------------------------------------------------------------------------------------------- scores
#
# What is reported has the layout of the results.json of `benchmark.py`:
#
#   name         of the model, for people
#   evaluations  name -> entry; an entry holds script, status (done, running, failed, left out), message, folder (with
#                pictures), and results, config, about and scores of the script's result file
#   random       the same of the same model at random initialisation, as far as it was evaluated
#   compared     name of another model -> its evaluations
#   notes        sentences to show beside the scores


class Score(NamedTuple):
    """Which value of the results of an evaluation is a score, and how it is shown: an entry of a file's `scores`."""

    path: tuple[str, ...]
    """Keys that lead to it in a result; a result that lacks them does not have the score."""
    label: str = ""
    """What it is called in tables; empty for its name."""
    unit: str = "fraction"
    """`fraction`, which is shown in percent, or a unit, which is shown beside the label; may be empty."""
    higher_is_better: bool = True
    terms: Mapping[str, str] = {}
    """Words of the label that need an explanation -> the explanation."""

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return " ".join(self.path)

    @property
    def shown_label(self) -> str:
        """The label, with what sets it apart from a fraction of which more is better."""
        unit = "" if self.unit == "fraction" else self.unit
        notes = [note for note in (unit, "" if self.higher_is_better else "lower is better") if note]
        return f"{self.label or self.name} ({', '.join(notes)})" if notes else self.label or self.name

    def number(self, value: float | None) -> str:
        """A value as it is shown, without its unit."""
        if self.unit == "fraction":
            return percent(value)
        return "n/a" if value is None else "not finite" if math.isnan(value) else f"{value:.4g}"

    def gain(self, value: float | None, other: float | None) -> str:
        """How far a value is above another, with its sign; empty if one is missing."""
        if value is None or other is None or math.isnan(value - other):
            return ""
        # Of the rounded numbers, so that the table adds up.
        difference = float(self.number(value)) - float(self.number(other))
        return f"{difference:{'+.1f' if self.unit == 'fraction' else '+.4g'}}".replace("-", MINUS)

    def rank(self, value: float) -> float:
        """A number that is the larger, the better a value is; the least for one that is not a number."""
        return -math.inf if math.isnan(value) else value if self.higher_is_better else -value


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json that benchmark.py wrote.

    Raises: UserError without the file's name, for the caller to put before it, if it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"name", "evaluations"} <= content.keys():
        raise UserError("is not a results.json that benchmark.py wrote")
    if not isinstance(content["name"], str):
        raise UserError(f"is damaged: name is {content['name']!r}, not text")
    for part in ("evaluations", "random", "compared"):
        if not isinstance(content.get(part, {}), dict):
            raise UserError(f"is damaged: {part} is {type(content[part]).__name__}, not name: evaluation")
    for name, entry in content["evaluations"].items():
        check_entry(entry, f"evaluations.{name}")
    return content


def check_entry(entry: Any, where: str) -> None:
    """Raise UserError unless results, config and about of an evaluation are there and its scores are numbers."""
    for part in ("results", "config", "about"):
        if not isinstance(entry, dict) or not isinstance(entry.get(part), dict):
            raise UserError(f"is damaged: {where} lacks {part}, or it is no JSON object")
    declared = entry.get("scores", [])
    if not isinstance(declared, list) or not all(map(_is_score, declared)):
        keys = "label, unit, higher_is_better and terms"
        raise UserError(f"is damaged: {where}.scores is no list of scores, each with a path and perhaps {keys}")
    for method, score, value in _scores(entry):
        if not isinstance(value, float | int):
            path = ".".join((method, *score.path))
            raise UserError(f"is damaged: {where}.results.{path} is {value!r}, not a number")
    if not isinstance(entry["config"].get("model_loader_kwargs", {}), dict):
        raise UserError(f"is damaged: {where}.config.model_loader_kwargs is no JSON object")


def _is_score(declared: Any) -> bool:
    types = {"path": list, "label": str, "unit": str, "higher_is_better": bool, "terms": dict}
    if not isinstance(declared, dict) or "path" not in declared or not declared.keys() <= types.keys():
        return False
    return all(isinstance(value, types[key]) for key, value in declared.items()) and all(
        isinstance(word, str) for word in (*declared["path"], *declared.get("terms", {}).values())
    )


def _scores(entry: Mapping[str, Any]) -> Iterator[tuple[str, Score, Any]]:
    """(method, score, its value) of an evaluation, method by method."""
    for method, result in entry.get("results", {}).items():
        values = dict(_leaves(result))
        if "scores" in entry:
            scores = [Score(**{**declared, "path": tuple(declared["path"])}) for declared in entry["scores"]]
        else:
            scores = _scores_by_name(values)
        yield from ((method, score, values[score.path]) for score in scores if score.path in values)


def _scores_by_name(values: Mapping[tuple[str, ...], Any]) -> list[Score]:
    """The scores of a file that does not say which they are, as older ones do not, by the names that were in use."""
    return [
        Score(path)
        for path, value in values.items()
        if path
        and not isinstance(value, list)
        and not {"per_class", "settings"} & {*path}
        and path[-1].startswith(("mIoU", "acc", "mean_acc", "top1"))
        and not re.search(r"_k\d+([_/]|$)", path[-1])
    ]


class Row(NamedTuple):
    """One score of all models; None where a model lacks it."""

    evaluation: str
    method: str
    metric: str
    """The name of the score."""
    values: list[float | None]
    score: Score


def columns(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Model -> its evaluations: the model itself, random initialisation if it was evaluated, then the others."""
    chosen = {content["name"]: content["evaluations"]}
    if content.get("random"):
        chosen["random initialisation"] = content["random"]
    return chosen | dict(content.get("compared", {}))


def score_rows(content: Mapping[str, Any]) -> list[Row]:
    """All scores of the evaluations of the model, in their order."""
    models = list(columns(content).values())
    rows = []
    for evaluation in content["evaluations"]:
        found: dict[tuple[str, str], Row] = {}
        for place, model in enumerate(models):
            for method, score, value in _scores(model.get(evaluation, {})):
                empty = Row(evaluation, method, score.name, [None] * len(models), score)
                found.setdefault((method, score.name), empty).values[place] = value
        rows += found.values()
    return rows


def _leaves(result: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(result, dict):
        for key, value in result.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, result


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return "n/a" if value is None else "not finite" if math.isnan(value) else f"{100 * value:.1f}"


def text_table(content: Mapping[str, Any]) -> str:
    """The scores for a terminal; fractions in percent."""
    models = list(columns(content))
    lines = [["evaluation", "method", "score", *models]]
    lines += [
        [row.evaluation, row.method, row.score.shown_label, *map(row.score.number, row.values)]
        for row in score_rows(content)
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = []
    for line in lines:
        words = [
            w.ljust(width) if i < 3 else w.rjust(width) for i, (w, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(words).rstrip())
    return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:]])


def summary(content: Mapping[str, Any]) -> str:
    """The best result of each evaluation in a sentence, with the gain over random initialisation."""
    rows, parts = score_rows(content), []
    place = list(columns(content)).index("random initialisation") if content.get("random") else None
    for evaluation in content["evaluations"]:
        own = [row for row in rows if row.evaluation == evaluation and row.values[0] is not None]
        if not own:
            continue
        score = own[0].score
        rivals = [(row.values[0] or 0.0, row) for row in own if row.metric == score.name]
        value, best = max(rivals, key=lambda rival: score.rank(rival[0]))
        unit = "% " if score.unit == "fraction" else f"{score.unit} " if score.unit else ""
        part = f"{evaluation}: {score.number(value)} {unit}{score.label or score.name} ({best.method})"
        gain = score.gain(value, best.values[place]) if place else ""
        side = "below" if gain.startswith(MINUS) else "above"
        points = "points " if score.unit == "fraction" else unit
        parts.append(f"{part}, {gain[1:]} {points}{side} random initialisation" if gain else part)
    return "; ".join(parts) + "." if parts else "No evaluation has results yet."


# --------------------------------------------------------------------------------------------------------- HTML

TEMPLATES = Path(__file__).parent / "templates"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@functools.cache
def _templates() -> Any:
    """The macros of report.html. They escape what they are given, except `Markup`, which is what they return."""
    import jinja2
    from markupsafe import Markup, escape

    def breakable(name: str) -> Markup:
        """With places where a narrow column may break it."""
        return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html").module


def write_report(
    path: Path,
    content: Mapping[str, Any],
    run_dir: Path | None = None,
    lead: Sequence[tuple[Path, str]] = (),
) -> None:
    """Write the report of evaluations as one HTML file.

    Args:
        path: the file.
        content: what is reported; the comment at the top of the section on scores says how it is laid out. Folders in
            it are relative to that of `path`.
        run_dir: folder of the training run whose curves are shown.
        lead: pictures that come first, and what is to be seen on them.

    Raises: UserError if `run_dir` has no metrics.
    """
    sections = [
        _lead(lead),
        notice(_notices(content)),
        _scores_section(content),
        pictures_section([content], path.parent),
        "" if run_dir is None else _curves_of_run(run_dir),
        _about_section(content),
        _explanation_section(content),
    ]
    write_page(path, f"Evaluation of {content['name']}", summary(content), sections)


def write_page(path: Path, title: str, told: str, sections: "Sequence[Markup | str]") -> None:
    """Write an HTML file that holds all it shows.

    Args:
        path: the file.
        title: its heading.
        told: a sentence below that.
        sections: what the functions below made; empty ones are left out, and other text is escaped.
    """
    from markupsafe import Markup

    page = _templates().page(title, told, Markup(POLICY), sections)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes


def _lead(lead: Sequence[tuple[Path, str]]) -> "Markup":
    budget, html = _Budget(2**20), _templates()
    return _joined(html.lead(_picture(path, budget, told)[0], told) for path, told in lead)


def _joined(parts: "Iterable[Markup | str]") -> "Markup":
    from markupsafe import Markup

    return Markup("").join(parts)


def _notices(content: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores has to know."""
    lines = []
    for label, model in columns(content).items():
        for name, entry in model.items():
            if entry.get("status", "done") != "done":
                whose = "" if model is content["evaluations"] else f", {label}"
                lines.append(f"{name}{whose}: {entry['status']}. {entry.get('message') or ''}")
    return [*lines, *content.get("notes", [])]


def notice(lines: Sequence[str]) -> "Markup | str":
    """A box with sentences that must not be missed; empty without any."""
    return _templates().notice(lines) if lines else ""


def _scores_section(content: Mapping[str, Any]) -> "Markup":
    models, rows = list(columns(content)), score_rows(content)
    groups = []
    for evaluation, entry in content["evaluations"].items():
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row.evaluation == evaluation:
                line = {"label": row.score.shown_label, "cells": _score_cells(row)}
                methods.setdefault(row.method, []).append(line)
        empty = "pictures only" if entry.get("status", "done") == "done" else f"{entry['status']}, no scores yet"
        named = {"name": evaluation, "setting": _setting(entry.get("config", {}))}
        groups.append(named | {"methods": methods, "empty": empty})
    usual = all(row.score.shown_label == (row.score.label or row.score.name) for row in rows)
    note = f"In percent; higher is better{'' if usual else ', where nothing else is said'}."
    if models[1:]:
        note += f" The best of a row is bold. A gain is how far {content['name']} is above the model of that column."
    return section("scores", "Scores", [_templates().scores(models, groups, note), *_classes(content)])


def section(name: str, title: str, parts: "Sequence[Markup | str]") -> "Markup":
    """A part of a page with a heading; `name` is its anchor, `parts` what the functions here made."""
    return _templates().section(name, title, _joined(parts))


def _score_cells(row: Row) -> list["Cell"]:
    score = row.score
    shown = [score.number(value) for value in row.values]
    known = [value for value in row.values if value is not None and not math.isnan(value)]
    best = score.number(max(known, key=score.rank)) if len(known) > 1 else None
    cells = []
    for i, (value, text) in enumerate(zip(row.values, shown, strict=True)):
        cells.append(Cell(text, "best" if text == best else ""))
        if i > 0:
            gain = score.gain(row.values[0], value)
            is_better = gain.startswith("+") == score.higher_is_better
            cells.append(Cell(gain, "" if not gain or not float(gain[1:]) else "up" if is_better else "down"))
    return cells


def _setting(config: Mapping[str, Any]) -> str:
    """The keys of an evaluation that tell it from others, in short."""
    words = [
        str(config[key])
        for key in ("test_dataset_name", "test_dataset_names", "dataset_name")
        if isinstance(config.get(key), str)
    ]
    if config.get("resolution") is not None:
        words.append(f"{as_typed(config['resolution'])} px")
    return ", ".join(words)


def _classes(content: Mapping[str, Any]) -> "list[Markup]":
    """A folded table of the classes for each method that has them."""
    tables, models = [], columns(content)
    for evaluation, entry in content["evaluations"].items():
        for method, result in entry.get("results", {}).items():
            classes = result.get("per_class") if isinstance(result, dict) else None
            if not classes:
                continue
            keys = list(next(iter(classes.values())))
            others = {}
            for label, model in list(models.items())[1:]:
                theirs = model.get(evaluation, {}).get("results", {}).get(method, {})
                others[label] = theirs.get("per_class", {}) if isinstance(theirs, dict) else {}
            heads = [*keys, *(f"{keys[0]}, {label}" for label in others)]
            body = {}
            for name, values in classes.items():
                numbers = [values.get(key) for key in keys]
                numbers += [theirs.get(name, {}).get(keys[0]) for theirs in others.values()]
                body[name] = [Cell(_number(value)) for value in numbers]
            what = f"{evaluation}, {method}: each of the {len(classes)} classes"
            html = _templates()
            caption = "In percent, where it is a share."
            tables.append(html.folded(what, html.numbers(["class", *heads], body, caption, what)))
    return tables


class Cell(NamedTuple):
    """A cell of a table, and how it is shown."""

    text: str
    kind: str = ""
    """`best`, `up` or `down`, or none of these."""


def numbers_table(columns: Sequence[str], rows: Mapping[str, Sequence[Cell]], caption: str) -> "Markup":
    """A table of numbers: a row for each name, under the names of the columns, of which the first is that of names."""
    return _templates().numbers(columns, rows, caption, caption)


def _number(value: Any) -> str:
    return percent(value) if value is None or isinstance(value, float) else f"{value:,}".replace(",", " ")


# What was evaluated.


def _about_section(content: Mapping[str, Any]) -> "Markup | str":
    entries = {
        (name if model is content["evaluations"] else f"{name}, {label}"): entry
        for label, model in columns(content).items()
        for name, entry in model.items()
        if entry.get("about")
    }
    own = [entries[name]["about"] for name in content["evaluations"] if name in entries]
    if not own:
        return ""
    shared = {k: v for k, v in own[0].items() if all(k in about and about[k] == v for about in own)}
    parts = [key_values(shared, "The model and the code, the same for all evaluations of it.")]
    for name, entry in entries.items():
        about = {k: v for k, v in entry["about"].items() if k not in shared or shared[k] != v}
        scores = {(method, *score.path) for method, score, _ in _scores(entry)}
        settings = {
            " ".join(path): value
            for path, value in _leaves(entry.get("results", {}))
            if path[1:2] != ("per_class",) and path not in scores
        }
        table = key_values({"script": entry.get("script")} | about | settings | entry.get("config", {}), None)
        parts.append(_templates().folded(f"{name}: all settings", table))
    return section("about", "What was evaluated", parts)


def key_values(values: Mapping[str, Any], caption: str | None) -> "Markup":
    """A table of names and values."""
    return _templates().key_values({key: _plain(value) for key, value in values.items()}, caption)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", " ")
    return "none" if value is None else json.dumps(value)


def _explanation_section(content: Mapping[str, Any]) -> "Markup | str":
    told = {word: meaning for row in score_rows(content) for word, meaning in row.score.terms.items()}
    if content.get("random"):
        told["random initialisation"] = (
            "The same architecture with weights as they are before any training, evaluated in the same way. What a "
            "model scores above it was learned."
        )
    if not told:
        return ""
    return section("terms", "What the numbers mean", [_templates().terms(told)])


# Pictures.


@dataclass
class _Budget:
    """Bytes of pictures that still fit."""

    left: int

    def image(self, data: bytes, kind: str, size: tuple[int, int], alt: str) -> "Markup | None":
        """An `img` element; None if it does not fit any more."""
        if len(data) > self.left:
            return None
        self.left -= len(data)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return _templates().image({"source": source, "width": size[0], "height": size[1], "alt": alt})


def pictures_section(contents: Sequence[Mapping[str, Any]], base: Path) -> "Markup | str":
    """The pictures that evaluations drew, one of each if there are several models; empty without any.

    Args:
        contents: of each model, what is reported.
        base: what the folders in it are relative to.
    """
    budget, parts = _Budget(PICTURES_MIB * 2**20), []
    shown = [(content, name, entry) for content in contents for name, entry in content["evaluations"].items()]
    limit = PICTURES_EACH if len(contents) == 1 else 1
    for content, evaluation, entry in shown:
        found = pictures_of(entry, evaluation, base)
        figures = [_figure(path, budget, evaluation, content["name"]) for path in found[:limit]]
        # Beside the model, one picture of random weights says enough.
        untrained = content.get("random", {}).get(evaluation)
        if untrained and found:
            same = [path for path in pictures_of(untrained, evaluation, base) if path.name == found[0].name]
            figures[1:1] = [_figure(path, budget, evaluation, "random initialisation") for path in same]
        if any(figures):
            left_out = max(0, len(found) - limit) + figures.count("")
            where = str(Path(entry.get("folder", evaluation), "artifacts"))
            heading = evaluation if len(contents) == 1 else f"{content['name']}, {evaluation}"
            parts.append(_templates().pictures(heading, figures, left_out, where))
    return section("pictures", "Pictures", parts) if parts else ""


def pictures_of(entry: Mapping[str, Any], evaluation: str, base: Path) -> list[Path]:
    """Its pictures, the most telling one first."""
    folder = base / entry.get("folder", evaluation) / "artifacts"
    return sorted(folder.glob("*.png"), key=lambda path: (path.stem != "overview", path.name))


def _figure(path: Path, budget: _Budget, evaluation: str, label: str) -> "Markup | str":
    """A picture with its title; empty if it does not fit into the file any more."""
    image, is_wide = _picture(path, budget, f"{evaluation}, {label}: {_words(path)}")
    return _templates().figure(image, f"{_words(path)}, {label}", is_wide) if image else ""


def _words(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")


def _picture(path: Path, budget: _Budget, alt: str) -> "tuple[Markup | None, bool]":
    """An `img` element if it fits and can be read, and whether it is broad."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError):  # an evaluation may be writing it just now; of a broken PNG, Pillow gives the latter
        return None, False
    size = picture.size
    is_wide = size[0] > 1.3 * size[1]
    original = path.read_bytes()
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    if len(original) <= buffer.tell():  # drawings are smaller as they are
        return budget.image(original, "png", size, alt), is_wide
    return budget.image(buffer.getvalue(), "jpeg", picture.size, alt), is_wide


# ------------------------------------------------------------------------------------------------------- curves


class Panel(NamedTuple):
    """One drawing of the training curves: what a training's method wants seen of its metrics, over the step."""

    title: str
    unit: str
    """The unit of the vertical axis, which starts at 0 unless something lies below."""
    keys: Mapping[str, str]
    """Keys of metrics.jsonl -> what each is called; one that is alone may be called nothing."""
    mark: tuple[str, float] | None = None
    """A height that is drawn as a line, after what it is called."""
    whole: tuple[str, float] | None = None
    """A height that is 1 on an axis of its own to the right, after the unit of that axis."""
    right: Mapping[str, str] = {}
    """Keys with an axis of their own to the right, and what each is called; its unit is the name of the first."""


def write_panels(run_dir: Path, panels: Sequence[Panel]) -> None:
    """Let reports of a training draw these panels of its metrics."""
    write_text_atomically(run_dir / PANELS, json.dumps([panel._asdict() for panel in panels], indent=1) + "\n")


def read_panels(run_dir: Path, records: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels of a training, or if it has not said which, those of `usual_panels`.

    Raises: UserError if the file that says so is damaged.
    """
    path = run_dir / PANELS
    try:
        return [Panel(**panel) for panel in json.loads(path.read_text())]
    except FileNotFoundError:
        return usual_panels(records)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"run_dir={run_dir}: {path} cannot be read: {error}") from error


def usual_panels(records: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Panels that suit any training: its losses, gradient and learning rate."""
    losses = dict.fromkeys(key for record in records for key in record if key.endswith("loss"))
    return [
        Panel("Losses", "loss", {key: key for key in losses}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Learning rate", "learning rate", {"lr": ""}),
    ]


def check_run(run_dir: Path) -> None:
    """Raise UserError unless the folder has what the curves of a training are drawn from."""
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"run_dir={run_dir}: has no metrics.jsonl; give the output folder of a training")
    read_panels(run_dir, read_metrics(run_dir / "metrics.jsonl"))


def draw_curves(records: Sequence[Mapping[str, Any]], panels: Sequence[Panel]) -> "Figure":
    """Panels of the records of a metrics.jsonl, three in a row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(12, 3.3 * rows), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for ax, panel in zip(axes[: len(panels)], panels, strict=True):
        _draw_panel(ax, records, panel)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def _curves_of_run(run_dir: Path) -> "Markup":
    records = read_metrics(run_dir / "metrics.jsonl")
    told = f"{run_dir}: {_plain(_last_step(records))} steps"
    return curves_section(told, [(records, panel) for panel in read_panels(run_dir, records)])


def curves_section(
    told: str,
    drawings: Sequence[tuple[Sequence[Mapping[str, Any]], Panel]],
    name: str = "training",
    title: str = "Training",
) -> "Markup":
    """Curves of trainings.

    Args:
        told: what they are of.
        drawings: the records that a panel is drawn from, and the panel.
        name, title: of the section.
    """
    from matplotlib.figure import Figure

    budget, images = _Budget(2**20), []
    for records, panel in drawings:
        is_wide = len(panel.keys) > FEW
        inches, dpi = ((10.0, max(4.5, 0.18 * len(panel.keys))), 110) if is_wide else ((4.4, 2.9), 150)
        figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
        ax = figure.subplots()
        _draw_panel(ax, records, panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        size = (int(figure.bbox.width), int(figure.bbox.height))
        image = budget.image(buffer.getvalue(), "png", size, _described(ax, records))
        images += [(image, is_wide)] if image else []
    return section(name, title, [_templates().curves(told, images)])


def _last_step(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["step"] for record in records), default=0)


def _described(ax: "Axes", records: Sequence[Mapping[str, Any]]) -> str:
    """A drawn panel in words."""
    curves = []
    for line in ax.lines:
        heights = list(line.get_ydata())  # pyright: ignore[reportArgumentType]  # an array
        name = str(line.get_label())
        if len(heights) > 1 and not (heights[0] == heights[-1] and line.get_linestyle() == ":"):
            named = "" if name.startswith("_") or not name else f"{name}: "
            curves.append(f"{named}from {heights[0]:.4g} to {heights[-1]:.4g}")
    what = "; ".join(curves) if curves else "not logged"
    return f"{ax.get_title()} over {_last_step(records)} steps. {what}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _looks(num: int) -> list[tuple[Any, str]]:
    """Colour and style of so many curves, no two alike; also neighbours on the map of colours differ in style."""
    if num <= FEW:
        return [(COLORS[i % len(COLORS)], STYLES[i // len(COLORS)]) for i in range(num)]
    from matplotlib import colormaps

    return [(colormaps["turbo"](i / (num - 1)), STYLES[i % len(STYLES)]) for i in range(num)]


def _draw_panel(ax: "Axes", records: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    right = ax.twinx() if panel.right else None
    curves = {**panel.keys, **panel.right}
    looks = _looks(len(curves))
    for number, (key, label) in enumerate(curves.items()):
        logged = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
        points = [(step, value) for step, value in logged if math.isfinite(value)]
        if points:
            axis = right if right and key in panel.right else ax
            # Curves with an axis each may lie upon each other, so styles tell them apart too.
            color, style = looks[number]
            style = style if right is None else ":" if axis is right else STYLES[number % 3]
            marker = "o" if len(points) < 10 else ""  # one point makes no line
            look: Any = {"color": color, "linestyle": style, "marker": marker, "markersize": 4}
            axis.plot(*zip(*points, strict=True), label=label, **look)
    if not ax.lines:
        ax.text(0.5, 0.5, "not logged in this run", transform=ax.transAxes, ha="center", va="center", color=GREY)
    if panel.mark is not None:
        text, height = panel.mark
        ax.axhline(height, color=GREY, linewidth=1, linestyle=":", label=text)
    ax.set_title(panel.title, fontsize=11)
    ax.set_xlabel("step")
    ax.set_ylabel(panel.unit)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.lines:  # from 0, so that small changes look small, with room for the legend of more axes
        extents = [line.get_path().get_extents() for line in ax.lines]
        low, high = min(each.ymin for each in extents), max(each.ymax for each in extents)
        span = high - min(low, 0) or abs(high) or 1
        ax.set_ylim(0 if low >= 0 else low - 0.1 * span, high + (0.1 if right is None else 0.5) * span)
    lines = [*ax.lines, *(right.lines if right else ())]
    if len(lines) > 1:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "handlelength": 3, "labelspacing": 0.2}
        place: Any = beside if len(lines) > FEW else {} if right is None else {"loc": "upper left"}
        ax.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8, **place)
    if panel.whole is not None:
        unit, whole = panel.whole
        there_and_back: Any = (lambda value: value / whole, lambda part: part * whole)
        ax.secondary_yaxis("right", functions=there_and_back).set_ylabel(unit)
    if right is not None:
        ax.ticklabel_format(axis="y", scilimits=(-2, 2))
        right.margins(y=0.5)
        right.spines["top"].set_visible(False)
        right.set_ylabel(next(iter(panel.right)))
        right.ticklabel_format(axis="y", useOffset=False)
    for axis in (ax, right) if right else (ax,):
        axis.set_xlim(0, 1.03 * (_last_step(records) or 1))


# ---------------------------------------------------------------------------------------------- page of a training

LOG_LINES = 30
"""Last ones of a log that are shown."""
NOTED = 8
"""Warnings of a log that are shown, each once, the last ones."""
SCORE_PANELS = 12
"""Drawings of scores of evaluations; what is beyond is in metrics.jsonl."""


def write_run_report(run_dir: Path, path: Path) -> None:
    """Write a page of a training, running or finished. What is not there yet, or is damaged, is said in words on it.

    Args:
        run_dir: folder of the training.
        path: the page.

    Raises: UserError if the folder is not that of a training.
    """
    _require_run(run_dir)
    name = run_dir.resolve().name
    notes: list[str] = []
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics, damaged=notes) if metrics.is_file() else []
    config = _config_of(run_dir, notes)
    log = _lines_of(run_dir / "log.txt")
    panels = _panels_of(run_dir, records, notes)
    if len(notes) > 2 * NOTED:  # a file that is damaged throughout
        notes[NOTED:] = [f"{len(notes) - NOTED} further faults of this kind"]
    sheet = _sheet_section(run_dir, notes)
    pictures = pictures_section([_evaluations_of(run_dir, name, notes)], run_dir)
    notes += [*_health_notes(records), *_notes_of_files(run_dir), *_warnings_of(log)]
    drawings = [(records, panel) for panel in [*panels, *_own_panels(records)]]
    sections = [
        notice(notes),
        sheet,
        curves_section(f"{_plain(_last_step(records))} steps", drawings) if records else "",
        _evaluation_curves(records),
        pictures,
        section("log", "Log", [_templates().text(log[-LOG_LINES:])]) if log else "",
        _about_run(run_dir, log, _lines_of(run_dir / "config.yaml")),
    ]
    write_page(path, f"Training {name}", _progress(run_dir, records, config, log), sections)


def _require_run(run_dir: Path) -> None:
    files = ("metrics.jsonl", "log.txt", "config.yaml", DRY_RUN_SHEET)
    if any((run_dir / name).is_file() for name in files):
        return
    if not run_dir.is_dir():
        raise UserError(f"run_dir={run_dir}: there is no such folder; give the output folder of a training")
    below = [path.parent for path in sorted(run_dir.glob("*/metrics.jsonl"))]
    hint = f", such as {below[0]}" if below else ""
    raise UserError(f"run_dir={run_dir}: has none of {', '.join(files)}; give the output folder of a training{hint}")


def _config_of(run_dir: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        config = read_yaml(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else {}
    except UserError as error:
        notes.append(str(error))
        config = {}
    return config if isinstance(config, dict) else {}


def _lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="backslashreplace").splitlines() if path.is_file() else []


def _panels_of(run_dir: Path, records: Sequence[Mapping[str, Any]], notes: list[str]) -> list[Panel]:
    try:
        panels = read_panels(run_dir, records)
        # One of another version may have the names right and the rest wrong.
        for panel in panels:
            _ = {**panel.keys, **panel.right}
    except (UserError, TypeError) as error:
        notes.append(f"{error}; another version of the program may have written it. The usual curves are drawn instead")
        return usual_panels(records)
    return panels


def _own_panels(records: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Curves that no method has to ask for, where they were logged."""
    known = {key for record in records for key in record}
    panels = []
    if "images_per_s" in known:
        panels.append(Panel("Speed", "images per second", {"images_per_s": ""}))
        panels.append(Panel("Waiting for data", "part of the time", {"data_wait": ""}))
    if {"probe_knn", "probe_linear"} & known:
        panels.append(Panel("Probe", "top-1", {"probe_knn": "k-NN", "probe_linear": "linear"}))
    return panels


def _health_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    first: dict[str, int] = {}
    for record in records:
        for key, value in record.items():
            if value is None:
                first.setdefault(key, record["step"])
    return [f"{key} was not finite, first in the line of step {step} of metrics.jsonl" for key, step in first.items()]


def _notes_of_files(run_dir: Path) -> list[str]:
    notes = []
    if bad := _lines_of(run_dir / "bad_files.jsonl"):
        notes.append(f"{len(bad)} image(s) could not be read; the last line of bad_files.jsonl is {bad[-1]}")
    for path in sorted(run_dir.glob("evals/*/step_*/failed")):
        words = " ".join(_lines_of(path))
        notes.append(f"evaluation {path.parent.relative_to(run_dir / 'evals')} failed: {words}")
    return notes


def _warnings_of(log: Sequence[str]) -> list[str]:
    found = [re.match(r"(\S+) [WEC] (.*)", line) for line in log]
    last: dict[str, str] = {}
    for match in filter(None, found):
        last.pop(match[2], None)  # else it would keep the place of its first time
        last[match[2]] = match[1]
    told = [f"log, {when}: {words}" for words, when in last.items()]
    left_out = [f"{len(told) - NOTED} earlier warnings are in log.txt"] if len(told) > NOTED else []
    return [*told[-NOTED:], *left_out]


def _progress(
    run_dir: Path, records: Sequence[Mapping[str, Any]], config: Mapping[str, Any], log: Sequence[str]
) -> str:
    """How far it has come, in a few sentences."""
    train, optim = (part if isinstance(part := config.get(key), dict) else {} for key in ("train", "optim"))
    if not records:
        if not log:
            return "No training has started in this folder yet."
        every = f"; the first line comes after train.log_loss_every={every} steps" if (
            every := train.get("log_loss_every")
        ) else ""  # fmt: skip
        return f"No metrics yet{every}."
    step, total = _last_step(records), optim.get("total_iters")
    age = _age_words(time.time() - (run_dir / "metrics.jsonl").stat().st_mtime)
    if not isinstance(total, int):
        told = f"Step {_plain(step)}, written {age} ago."
    elif step >= total:
        told = f"All {_plain(total)} steps are done, the last one {age} ago."
    else:
        told = f"Step {_plain(step)} of {_plain(total)} ({step / total:.0%}), written {age} ago."
        left = next((record["eta_s"] for record in reversed(records) if _is_number(record.get("eta_s"))), None)
        told += f" At that speed another {_age_words(left)}." if left is not None else ""
    last = {key: value for record in records for key, value in record.items() if key.endswith("loss")}
    losses = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if _is_number(value))
    return told + (f" Last: {losses}." if losses else "")


def _age_words(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} seconds"


def _sheet_section(run_dir: Path, notes: list[str]) -> "Markup | str":
    told = {
        CONTACT_SHEET: "The first crops since the last start of the training, and what the network gets of them.",
        DRY_RUN_SHEET: "No training has drawn this yet: it is what a dry run said that it would see.",
    }
    for name, words in told.items():
        if (run_dir / name).is_file():
            image, _ = _picture(run_dir / name, _Budget(2 * 2**20), f"Contact sheet. {words}")
            if image is None:
                notes.append(f"{name} cannot be read as a picture, and is left out")
                continue
            return section("sheet", "What it sees", [_templates().lead(image, words)])
    return ""


def _evaluation_curves(records: Sequence[Mapping[str, Any]]) -> "Markup | str":
    """Scores of evaluations over the step that they are of: a drawing for each score, a curve for each method."""
    scored = [{**record, "step": record["eval_step"]} for record in records if _is_number(record.get("eval_step"))]
    scored.sort(key=lambda record: record["step"])  # those that run beside the training end in any order
    keys = dict.fromkeys(key for record in scored for key in record if key.startswith("eval/") and key.count("/") >= 4)
    groups: dict[tuple[str, ...], dict[str, str]] = collections.defaultdict(dict)
    for key in keys:
        _, name, evaluation, method, score = key.split("/", 4)
        groups[name, evaluation, score][key] = method
    panels = [
        Panel(f"{name}, {evaluation}", score if len(keys) > 1 else f"{score}, {next(iter(keys.values()))}", keys)
        for (name, evaluation, score), keys in groups.items()
    ]
    if not panels:
        return ""
    told = "Each over the step whose weights were evaluated."
    if len(panels) > SCORE_PANELS:
        told += f" {len(panels) - SCORE_PANELS} further scores are in metrics.jsonl."
    drawings = [(scored, panel) for panel in panels[:SCORE_PANELS]]
    return curves_section(told, drawings, "evaluations", "Evaluations while it trains")


def _evaluations_of(run_dir: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """The newest results of each set of evaluations, as content of a report, for its pictures."""
    entries: dict[str, Any] = {}
    for results in sorted(run_dir.glob("evals/*/step_*/results/results.json")):
        step_dir = results.parent.parent
        try:
            content = read_results(results)
        except UserError as error:
            notes.append(f"{results.relative_to(run_dir)} {error}")
            continue
        for evaluation, entry in content["evaluations"].items():
            folder = results.parent.relative_to(run_dir) / str(entry.get("folder", evaluation))
            step = step_dir.name.removeprefix("step_").lstrip("0") or "0"
            shown = {**entry, "folder": str(folder), "step": step}
            if pictures_of(shown, evaluation, run_dir):
                entries[f"{step_dir.parent.name}, {evaluation}"] = shown  # later steps come later
    return {
        "name": name,
        "evaluations": {f"{title}, step {entry['step']}": entry for title, entry in entries.items()},
    }


def _about_run(run_dir: Path, log: Sequence[str], config: Sequence[str]) -> "Markup":
    codes = [match[1] for line in log if (match := re.search(r"process\(es\), code (\S+)$", line))]
    values = {
        "folder": str(run_dir.resolve()),
        "code of the training": codes[-1] if codes else None,
        "code of this page": git_revision(),
        "drawn": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    checkpoints = sorted(path.name for path in run_dir.glob("checkpoints/step_*"))
    exports = sorted(path.name for path in run_dir.glob("*.pth"))
    values |= {"newest checkpoint": checkpoints[-1] if checkpoints else None, "exports": ", ".join(exports) or None}
    parts = [key_values(values, None)]
    if config:
        parts.append(_templates().folded("config.yaml", _templates().text(config)))
    return section("about", "About this training", parts)


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 a mistake that the message explains."""
    args = parser.parse_args(arguments)
    setup_logging()
    run_dir = Path(args.run_dir)
    path = run_dir / "report.html" if args.output is None else Path(args.output)
    with writing_explained(path.parent, "--output"):
        write_run_report(run_dir, path)
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
