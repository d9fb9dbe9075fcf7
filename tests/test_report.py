import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from figures import assert_no_overlaps, num_coloured
from figures import panels as cut_panels
from matplotlib.figure import Figure
from PIL import Image

import report
from train_capi import panels
from utils import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"wbr", "meta", "img", "br", "link", "input", "hr"}


def made_up_records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(10, 210, 10):
        record: dict[str, Any] = {"step": step, "capi_loss": 3 + 30 / step, "clustering_loss": 5 - step / 100}
        record |= {"target_entropy": 1.4 - step / 1000, "prototypes_used": 60.0, "prototype_perplexity": 40 + step / 10}
        record |= {
            "lr": 1e-3 * step / 200,
            "clustering_lr": 5e-4,
            "momentum": 0.99 + step / 1e5,
            "grad_norm": 20 / step,
        }
        if step % 50 == 0:
            record |= {"teacher_rank": 30.0 + step / 10}
        records.append(record)
    return records


def entry(results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = {"output_dir": "x", "test_dataset_name": "custom://ADE20K?split='validation'", "resolution": 224}
    about = {"weights": "runs/a/student_ema.pth", "weights_sha256": "ab" * 32, "num_parameters": 303_123_456}
    about |= {"commit": "0123abc", "seconds": 61.5}
    return {"script": "eval_x.py", "status": "done", "results": results, "config": config, "about": about} | changes


def segmentation(mean_iou: float) -> dict[str, Any]:
    return {
        "mIoU": mean_iou,
        "mIoU_valid": mean_iou + 0.01,
        "per_class": {
            "wall": {"iou": 2 * mean_iou, "acc": 0.5, "pixels": 12_345},
            "sky <b>": {"iou": 0.25, "acc": 0.75, "pixels": 7},
        },
        "settings": {"k": 10, "distance": "cosine", "val_mIoU": 0.91},
    }


DECLARED = [
    {"path": ["mIoU"], "label": "mIoU", "terms": {"mIoU": "Mean intersection over union."}},
    {"path": ["mIoU_valid"]},
]


def made_up_content() -> dict[str, Any]:
    return {
        "name": "mine/student_ema",
        "evaluations": {
            "segmentation": entry({"knn": segmentation(0.321), "logreg": segmentation(0.30)}, scores=DECLARED),
            "classification": entry({"patch": {"top1": 0.8, "top1_other": 0.5, "top1_k20": 0.1, "val_top1": 0.2}}),
            "pictures": entry({}, folder="pictures dir"),
        },
        "random": {"segmentation": entry({"knn": segmentation(0.12), "logreg": segmentation(0.345)})},
        "compared": {"other <model>": {"segmentation": entry({"knn": segmentation(0.321)})}},
    }


def noise(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)


def make_run(folder: Path, num_clusters: int = 64) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in made_up_records()))
    report.write_panels(folder, panels(num_clusters))
    return folder


class Page(HTMLParser):
    """Elements with their attributes, table cells by row, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(tmp_path: Path, content: dict[str, Any], run_dir: Path | None = None) -> Page:
    report.write_report(tmp_path / "report.html", content, run_dir)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report with everything: scores, a failure, curves, pictures."""
    folder = tmp_path_factory.mktemp("report")
    content = made_up_content()
    content["evaluations"]["broken"] = entry({}, status="failed", message="exit code 2: error: <bad>. Log: a/log.txt")
    content["notes"] = ["segmentation: other was evaluated differently"]
    content["random"]["pictures"] = entry({}, folder="random/pictures")
    noise(folder / "random" / "pictures" / "artifacts" / "overview.png", 301, 80)
    for name, size in (("overview", 300), ("a_b", 100), ("c", 101), ("d", 102), ("e", 103)):
        noise(folder / "pictures dir" / "artifacts" / f"{name}.png", size, 80)
    return write(folder, content, make_run(folder / "run")), folder / "report.html"


# Scores.


def test_scores_are_the_fractions_and_not_the_details():
    rows = report.score_rows(made_up_content())
    assert [(*row[:3], row.values) for row in rows] == [
        ("segmentation", "knn", "mIoU", [0.321, 0.12, 0.321]),
        ("segmentation", "knn", "mIoU_valid", [0.331, 0.13, 0.331]),
        ("segmentation", "logreg", "mIoU", [0.30, 0.345, None]),
        ("segmentation", "logreg", "mIoU_valid", [0.31, 0.355, None]),
        ("classification", "patch", "top1", [0.8, None, None]),
        ("classification", "patch", "top1_other", [0.5, None, None]),
    ]


def test_only_what_is_better_when_more_is_a_score():
    results = {
        "norms": {"outliers": 0.02, "settings": {"top1": 0.5}},
        "knn": {"top1": 0.5, "top1_k20": 0.4, "top1_k20_b": 0.3, "each": {"top1": [0.5]}, "grid": {"c 1": 0.4}},
        "logreg": {"b": {"acc": 1.0}},
        "shares": [0.1, 0.2],
    }
    rows = report.score_rows({"name": "m", "evaluations": {"e": entry(results)}})
    assert [row[1:3] for row in rows] == [("knn", "top1"), ("logreg", "b acc")]


def detection() -> dict[str, Any]:
    """Results whose scores no other file knows: one of a part, in a unit, and one of which less is better."""
    scores = [
        {"path": ["all", "AP"], "label": "average precision", "terms": {"precision": "Share of right boxes."}},
        {"path": ["distance"], "label": "centre distance", "unit": "px", "higher_is_better": False},
    ]
    results = {
        "boxes": {"all": {"AP": 0.25, "top1": 0.9}, "distance": 12.345},
        "masks": {"all": {"AP": 0.5}, "distance": 14},
    }
    random = {"boxes": {"all": {"AP": 0.1}, "distance": 20.0}}
    return {
        "name": "m",
        "evaluations": {"detection": entry(results, scores=scores)},
        "random": {"detection": entry(random, scores=scores)},
    }


def test_scores_that_nobody_foresaw_are_shown_as_their_file_declares(tmp_path):
    content = detection()
    assert [(*row[:3], row.values) for row in report.score_rows(content)] == [
        ("detection", "boxes", "all AP", [0.25, 0.1]),
        ("detection", "boxes", "distance", [12.345, 20.0]),
        ("detection", "masks", "all AP", [0.5, None]),
        ("detection", "masks", "distance", [14, None]),
    ]
    lines = report.text_table(content).splitlines()
    assert re.search(r"boxes +average precision +25\.0 +10\.0$", lines[2])
    assert re.search(r"boxes +centre distance \(px, lower is better\) +12\.35 +20$", lines[3]), lines[3]
    assert report.summary(content) == "detection: 50.0 % average precision (masks)."
    page = write(tmp_path, content)
    distance = next(row for row in page.rows if row[0].startswith("centre distance"))
    assert distance == ["centre distance (px, lower is better)", "12.35", "20", "\N{MINUS SIGN}7.65"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<td class="number best">12.35</td><td class="number">20</td><td class="number up">' in text
    assert "higher is better, where nothing else is said." in text
    assert "Share of right boxes." in text


def test_the_summary_takes_the_least_where_less_is_better():
    content = detection()
    content["evaluations"]["detection"]["scores"].reverse()
    told = "detection: 12.35 px centre distance (boxes), 7.65 px below random initialisation."
    assert report.summary(content) == told


def test_files_that_do_not_declare_their_scores_are_read_by_the_names_in_use():
    content = report.read_results(GOLDEN / "results_without_scores.json")
    for evaluation, names, num_methods in (
        ("segmentation", ["mIoU", "mIoU_valid", "acc", "mean_acc"], 4),
        ("classification", ["top1/a", "top1/b"], 9),
        ("visualizations", [], 0),
    ):
        results = content["evaluations"][evaluation]["results"]
        rows = [row for row in report.score_rows(content) if row.evaluation == evaluation]
        expected = [(method, name) for method in list(results)[:num_methods] for name in names]
        assert [row[1:3] for row in rows] == expected, "one of a sweep, or a detail, is shown as a score"
        assert all(row.values == [results[row.method][row.metric]] for row in rows)


@pytest.mark.parametrize(
    "scores", [{}, ["top1"], [{"label": "top1"}], [{"path": "top1"}], [{"path": ["top1"], "colour": "red"}]]
)
def test_damaged_declarations_of_scores_are_named(scores):
    with pytest.raises(UserError, match=r"is damaged: it\.scores is no list of scores, each with a path and perhaps"):
        report.check_entry(entry({"knn": {"top1": 0.5}}, scores=scores), "it")


def test_a_declared_score_that_is_no_number_is_named():
    broken = entry({"knn": {"all": {"AP": "half"}}}, scores=[{"path": ["all", "AP"]}])
    with pytest.raises(UserError, match=r"it\.results\.knn\.all\.AP is 'half', not a number"):
        report.check_entry(broken, "it")


def test_the_text_table_is_aligned():
    lines = report.text_table(made_up_content()).splitlines()
    assert len(lines) == 8
    assert lines[0].split("  ")[0] == "evaluation"
    assert re.search(r"knn +mIoU +32\.1 +12\.0 +32\.1$", lines[2])
    assert lines[4].endswith("n/a")
    assert len({len(line) for line in lines}) == 1, "the last column is not flush right"
    assert len({line.index(word) for line, word in zip(lines[2:], ["mIoU"] * 4 + ["top1"] * 2, strict=True)}) == 1


def test_the_summary_has_the_best_method_and_what_was_gained():
    told = report.summary(made_up_content())
    assert told == (
        "segmentation: 32.1 % mIoU (knn), 20.1 points above random initialisation; classification: 80.0 % top1 (patch)."
    )
    content = made_up_content()
    content["evaluations"] = {"segmentation": entry({"knn": segmentation(0.1)})}
    assert "2.0 points below random" in report.summary(content)
    assert "No evaluation" in report.summary({"name": "m", "evaluations": {}})


# The page.


def test_the_table_compares_and_marks_the_best(full):
    page, path = full
    assert page.rows[0] == ["method", "score", "mine/student_ema", "random initialisation", "other <model>"]
    knn = next(row for row in page.rows if row[:2] == ["knn", "mIoU"])
    assert knn[2:] == ["32.1", "12.0", "+20.1", "32.1", "+0.0"]
    logreg = next(row for row in page.rows if row[:2] == ["logreg", "mIoU"])
    assert logreg[2:] == ["30.0", "34.5", "\N{MINUS SIGN}4.5", "n/a", ""]
    best = re.findall(r'<td class="number best">([^<]+)', path.read_text(encoding="utf-8"))
    assert best == ["32.1", "32.1", "33.1", "33.1", "34.5", "35.5"], "both of a tie, and none without a comparison"


def test_every_row_of_a_table_has_the_same_width(full):
    text = full[1].read_text(encoding="utf-8")
    for table in re.findall(r"<table.*?</table>", text):
        open_rows, widths = 0, set()
        for row in re.findall(r"<tr.*?</tr>", re.sub(r"<thead>.*?</thead>", "", table)):
            cells = re.findall(r"<t[hd]([^>]*)>", row)
            spans = [int(found[1]) if (found := re.search(r'colspan="(\d+)"', cell)) else 1 for cell in cells]
            widths.add(sum(spans) + (1 if open_rows > 0 else 0))
            below = re.search(r'rowspan="(\d+)"', row)
            open_rows = int(below[1]) - 1 if below else max(0, open_rows - 1)
        assert len(widths) == 1, table[:300]


def test_names_and_messages_cannot_add_elements(full):
    page, path = full
    words = "".join(page.words)
    for text in ("sky <b>", "other <model>", "exit code 2: error: <bad>. Log: a/log.txt"):
        assert text in words
    assert {"b", "model", "bad"}.isdisjoint(name for name, _ in page.elements)
    content = made_up_content() | {"name": "</title><script>alert(1)</script>\"'>"}
    assert write(path.parent / "run", content).of("script") == []


def test_nothing_is_loaded_from_elsewhere(full):
    page, path = full
    loads = {"src", "srcset", "href", "action", "formaction", "poster", "data", "background", "style", "onload"}
    values = [value or "" for _, attributes in page.elements for name, value in attributes.items() if name in loads]
    assert len(values) == len(page.of("img")) > 0
    assert all(value.startswith("data:image/") for value in values)
    style = "".join(re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL))
    assert style
    assert not re.search(r"url\(|@import|//", style)
    assert {"script", "link", "iframe", "object", "embed", "base"}.isdisjoint(name for name, _ in page.elements)
    assert any((meta.get("content") or "").startswith("default-src 'none'") for meta in page.of("meta"))


def test_readers_that_do_not_see_are_told(full):
    page, _ = full
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("h1")) == 1
    assert all(th["scope"] in ("row", "col", "rowgroup", "colgroup") for th in page.of("th"))
    alts = [image["alt"] or "" for image in page.of("img")]
    assert all(len(alt) > 15 for alt in alts)
    assert len(set(alts)) == len(alts)
    assert "Cross-entropy losses over 200 steps. student: from 6 to 3.15; clustering head: from 4.9 to 3" in alts
    labels = [attributes["aria-labelledby"] for attributes in page.of("section")]
    assert labels == [heading["id"] for heading in page.of("h2")]


def test_leading_pictures_come_before_everything_with_what_they_show(tmp_path):
    for name, size in (("one", 300), ("two", 301)):
        noise(tmp_path / f"{name}.png", size, 80)
    lead = [(tmp_path / "one.png", "What <one> shows, in words."), (tmp_path / "two.png", "And the other.")]
    report.write_report(tmp_path / "report.html", made_up_content() | {"notes": ["a note"]}, lead=lead)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [(image["width"], image["alt"]) for image in page.of("img")[:2]] == [
        ("300", "What <one> shows, in words."),
        ("301", "And the other."),
    ]
    text = "".join(page.words)
    places = [text.index(part) for part in ("points above", "What <one> shows", "And the other", "a note", "Scores")]
    assert places == sorted(places)


def test_what_failed_is_said_first_and_what_was_evaluated_last(full):
    text = "".join(full[0].words)
    parts = [
        "20.1 points above",
        "broken: failed. exit code 2",
        "evaluated differently",
        "Scores",
        "Pictures",
        "Training",
    ]
    parts += ["What was evaluated", "ab" * 32, "303 123 456", "val_mIoU", "top1_k20", "Mean intersection over union"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "broken" in text
    assert "failed, no scores yet" in text
    assert "pictures only" in text


def test_overview_comes_first_and_what_is_left_out_is_counted(full):
    page, _ = full
    alts = [image["alt"] for image in page.of("img")]
    names = [
        "mine/student_ema: overview",
        "random initialisation: overview",
        *(f"mine/student_ema: {n}" for n in ("a b", "c", "d")),
    ]
    assert alts[:5] == [f"pictures, {name}" for name in names]
    assert "1 more in " in "".join(page.words)
    assert len(alts) == 5 + 6, "pictures and curves"


def test_large_pictures_are_made_smaller_and_those_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    assert report.PICTURES_MIB * 2**20 * 4 / 3 < 9_000_000, "in base64, and beside them there is text"
    monkeypatch.setattr(report, "PICTURES_MIB", 1)
    content = {"name": "m", "evaluations": {f"e{i}": entry({}, folder=f"e{i}") for i in range(2)}}
    for i in range(2):
        for j in range(2):
            noise(tmp_path / f"e{i}" / "artifacts" / f"{j}.png", (500, 1700)[j] + i, 400)
    page = write(tmp_path, content)
    assert 600_000 < (tmp_path / "report.html").stat().st_size < 1.4 * 2**20
    assert [int(image["width"] or 0) for image in page.of("img")] == [500, 1600, 501]
    assert "1 more in e1/artifacts" in "".join(page.words)


def test_a_report_without_anything_to_compare_is_a_plain_table(tmp_path):
    content = made_up_content()
    page = write(tmp_path, {"name": "m", "evaluations": content["evaluations"]})
    assert page.rows[0] == ["method", "score", "m"]
    assert [] not in page.rows
    assert "gain" not in "".join(page.words)
    assert "best" not in {cell.get("class") for cell in page.of("td")}


@pytest.mark.parametrize("text", ["[", '[{"title": "a"}]', '[{"colour": "red"}]', "[1]", '{"a": 1}'])
def test_a_run_whose_panels_are_damaged_is_named(tmp_path, text):
    run = make_run(tmp_path / "run")
    (run / "panels.json").write_text(text)
    with pytest.raises(UserError, match=r"panels\.json cannot be read: ") as caught:
        report.check_run(run)
    assert f"run_dir={run}" in str(caught.value)


def test_a_run_that_does_not_say_what_to_draw_has_its_losses_gradient_and_rate_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "panels.json").unlink()
    page = write(tmp_path, {"name": "m", "evaluations": {}}, run)
    assert [image["alt"] for image in page.of("img")] == [
        "Losses over 200 steps. capi_loss: from 6 to 3.15; clustering_loss: from 4.9 to 3",
        "Norm of the gradient over 200 steps. from 2 to 0.1",
        "Learning rate over 200 steps. from 5e-05 to 0.001",
    ]


# The page of a training.


def make_training(folder: Path) -> Path:
    """A run whose names, log and configuration try to add elements, with an evaluation that drew something."""
    run = make_run(folder)
    report.write_panels(run, panels(64)[:1])
    text = "</pre></title><script>alert(1)</script>\"'>"
    (run / "log.txt").write_text(
        f"12:00:00 I capi: torch 2 on cpu, 1 process(es), code 0123abc\n12:00:01 W capi: slow {text}\n" * 2
    )
    (run / "config.yaml").write_text(f"optim: {{total_iters: 400}}\ndata: {{dataset: {json.dumps(text)}}}\n")
    noise(run / "contact_sheet.png", 120, 80)
    (run / "bad_files.jsonl").write_text(json.dumps({"file": f"{text}.png", "reason": "cut"}) + "\n")
    for step in (100, 200):
        results = run / "evals" / "mine" / f"step_{step:09d}" / "results"
        noise(results / "pictures" / "artifacts" / "overview.png", 90 + step // 100, 60)
        noise(results / "pictures" / "artifacts" / "pca.png", 190 + step // 100, 60)
        content = {"name": text, "evaluations": {"pictures": entry({}, folder="pictures")}}
        (results / "results.json").write_text(json.dumps(content))
        with (run / "metrics.jsonl").open("a") as file:
            scores = {f"eval/mine/{text.replace('/', '')}/knn/mIoU": step / 1000, "eval_step": step}
            file.write(json.dumps({"step": 200, "images_per_s": 5.0, "eta_s": 7300.0, **scores}) + "\n")
    return run


def test_the_page_of_a_training_shows_all_there_is_and_nothing_of_it_becomes_an_element(tmp_path, capsys):
    run = make_training(tmp_path / "<script>mine")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    text = (run / "report.html").read_text(encoding="utf-8")
    page, words = Page(text), "".join(Page(text).words)
    assert page.of("script") == []
    assert words.count("<script>alert(1)</script>") >= 4, "log, note of the log, bad file, configuration"
    assert len(page.of("title")) == len(page.of("h1")) == 1 and "Training <script>mine" in words
    progress = (
        r"Step 200 of 400 \(50%\), written \d+ seconds ago\. At that speed another 2 hours\. Last: capi_loss 3\.15"
    )
    assert re.search(progress, words)
    assert words.count("log, 12:00:01: capi: slow") == 1, "what is said twice is noted once"
    assert "0123abc" in words
    alts = [str(image["alt"]) for image in page.of("img")]
    assert alts[0].startswith("Contact sheet.")
    assert sum("over 200 steps" in alt for alt in alts) == 1 + 2 + 1, "of the method, of speed, of a score"
    assert [image["width"] for image in page.of("img")][-2:] == ["92", "192"], "pictures of the newest step alone"
    assert [heading["id"] for heading in page.of("h2")] == [
        "sheet",
        "training",
        "evaluations",
        "pictures",
        "log",
        "about",
    ]
    assert all(str(image["src"]).startswith("data:image/") for image in page.of("img"))


def test_scores_are_in_the_order_of_the_steps_that_they_are_of(tmp_path):
    scores = {200: 0.3, 300: 0.5, 100: 0.1}  # as they landed
    lines = [{"step": 400, "eval_step": step, "eval/fast/seg/knn/mIoU": score} for step, score in scores.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write_run_report(tmp_path, tmp_path / "report.html")
    alts = [str(image["alt"]) for image in Page((tmp_path / "report.html").read_text()).of("img")]
    assert any("from 0.1 to 0.5" in alt for alt in alts), alts


def test_a_warning_that_came_again_is_among_the_last_ones(tmp_path):
    often = [f"{hour}:00:00 W data: the disk is slow" for hour in (10, 18)]
    others = [f"11:00:{second:02d} W data: other {second}" for second in range(report.NOTED + 2)]
    (tmp_path / "log.txt").write_text("\n".join([often[0], *others, often[1]]) + "\n")
    report.write_run_report(tmp_path, tmp_path / "report.html")
    words = "".join(Page((tmp_path / "report.html").read_text()).words)
    assert words.count("log, ") == report.NOTED
    assert "log, 18:00:00: data: the disk is slow3 earlier warnings" in words


def test_a_training_without_metrics_is_said_to_have_none(tmp_path):
    noise(tmp_path / "dry_run.png", 30, 20)
    report.write_run_report(tmp_path, tmp_path / "page.html")
    assert "No training has started in this folder yet." in (tmp_path / "page.html").read_text()
    assert "a dry run said that it would see" in (tmp_path / "page.html").read_text()
    (tmp_path / "log.txt").write_text("12:00:00 I capi: hello\n")
    (tmp_path / "config.yaml").write_text("train: {log_loss_every: 10}\n")
    report.write_run_report(tmp_path, tmp_path / "page.html")
    assert (
        "No metrics yet; the first line comes after train.log_loss_every=10 steps."
        in (tmp_path / "page.html").read_text()
    )


def test_what_is_damaged_or_of_another_version_is_said_and_the_rest_is_shown(tmp_path):
    run = make_training(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "capi_loss": null}\nnot <b> json\n[1]\n{"step": 301, "capi_loss": "low"}\n{"step": 3')
    (run / "panels.json").write_text('[{"title": "a", "axes": "b"}]')
    (run / "config.yaml").write_text("train: [")
    for path in (run / "contact_sheet.png", *run.glob("evals/*/*200/results/*/*/pca.png")):
        path.write_bytes(path.read_bytes()[:200])
    (run / "evals" / "mine" / "step_000000100" / "results" / "results.json").write_text("{")
    failed = run / "evals" / "mine" / "step_000000300" / "failed"
    failed.parent.mkdir()
    failed.write_text("no <i> disk\n")
    report.write_run_report(run, run / "report.html")
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    words = "".join(page.words)
    for said in (
        "metrics.jsonl, line 24 is not valid JSON",
        "metrics.jsonl, line 25 is no JSON object with a step",
        "unexpected keyword argument 'axes'; another version of the program may have written it",
        "is not valid YAML",
        "contact_sheet.png cannot be read as a picture",
        "step_000000100/results/results.json cannot be read",
        "evaluation mine/step_000000300 failed: no <i> disk",
        "capi_loss was not finite, first in the line of step 300",
        "1 more in ",
        "Step 301, written",
    ):
        assert said in words, said
    assert any(str(image["alt"]).startswith("Losses over 301 steps") for image in page.of("img"))


def test_a_file_that_is_damaged_throughout_does_not_fill_the_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x\n" * 1000 + '{"step": 1, "loss": 1}\n')
    report.write_run_report(tmp_path, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("is not valid JSON") == 8 and "992 further faults" in text


def test_a_folder_that_is_no_training_is_an_error_that_shows_where_one_is(tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder; give the output folder of a training" in capsys.readouterr().err
    make_run(tmp_path / "mine")
    assert report.main([str(tmp_path)]) == 2
    assert f"give the output folder of a training, such as {tmp_path / 'mine'}" in capsys.readouterr().err
    assert report.main([str(tmp_path / "mine"), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "--output=" in capsys.readouterr().err


# In a browser.


@pytest.fixture(scope="module")
def browse():
    if CHROMIUM is None:
        pytest.skip("needs a browser: Debian's package chromium")

    def run(path: Path, *options: str) -> tuple[str, str]:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}"]
        done = subprocess.run(
            [str(CHROMIUM), *flags, *options, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return run


def test_a_browser_without_network_shows_all_of_it(full, browse):
    page, path = full
    dom, console = browse(path, "--dump-dom")
    assert console == ""
    assert len(re.findall("<table", dom)) == len(page.of("table")) > 3
    assert len(re.findall("<tr", dom)) == len(page.of("tr"))

    # The same browser does complain of what a report must not have, so the silence above means something.
    bad = path.with_name("bad.html")
    bad.write_text(path.read_text(encoding="utf-8").replace("</main>", '<img src="https://a.invalid/b.png"></main>'))
    assert "violates" in browse(bad, "--dump-dom")[1]


@pytest.mark.parametrize("width", [360, 1280])
def test_only_tables_scroll_sideways(full, browse, width, tmp_path):
    inner = full[1].read_text(encoding="utf-8").replace(report.POLICY, "")
    measure = (
        "const root = document.documentElement; parent.document.title = root.scrollWidth + ' of ' + root.clientWidth"
    )
    inner = inner.replace("</main>", f"</main><script>{measure}</script>")
    # In a frame, because a window cannot be as narrow as a phone.
    (tmp_path / "outer.html").write_text(
        f'<iframe style="width: {width}px; border: 0" srcdoc="{escape(inner)}"></iframe>'
    )
    dom, _ = browse(tmp_path / "outer.html", "--dump-dom")
    found = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert found, "the page did not measure itself"
    assert int(found[1]) <= int(found[2]) <= width


# Curves.


def test_every_panel_of_the_curves_shows_its_quantity(tmp_path):
    figure = report.draw_curves(made_up_records(), panels(64))
    cut = cut_panels(figure, tmp_path / "curves.png")
    assert len(cut) == 7  # six panels, one of them with a second axis
    assert all(num_coloured(panel) > 100 for panel in cut)
    assert_no_overlaps(figure)
    words = " ".join(ax.get_title() + ax.get_ylabel() for ax in figure.axes)
    for word in ("losses", "nats", "Entropy", "Prototypes", "rank", "gradient", "learning rate", "momentum"):
        assert word in words


def test_curves_leave_out_what_was_not_logged_or_not_finite(tmp_path):
    records = [{"step": 1, "capi_loss": None, "lr": 1e-3, "momentum": 0.9}, {"step": 2, "capi_loss": 2.0, "lr": 1e-3}]
    figure = report.draw_curves(records, panels(64))
    cut_panels(figure, tmp_path / "curves.png")
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes[:6]]
    missing = ["not logged in this run"]
    assert texts == [[], missing, missing, missing, missing, []]
    report.draw_curves([], panels(64)).savefig(tmp_path / "empty.png")


@pytest.mark.parametrize("num", [2, 8, 9, 26, 40])
def test_every_curve_of_many_is_told_apart_and_has_room(num, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    names = {f"run{number}": f"inverse_blocks_no_roll_{number}" for number in range(num)}
    records = [{"step": step} | {name: step + place for place, name in enumerate(names)} for step in range(12)]
    report.curves_section("", [(records, report.Panel("Loss", "nats", names))])
    (ax,) = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == num
    box, legend = ax.get_window_extent(), ax.get_legend().get_window_extent()
    assert box.width > 0.5 * figures[0].bbox.width and box.height > 0.5 * figures[0].bbox.height
    assert figures[0].bbox.y0 <= legend.y0 and legend.x1 <= figures[0].bbox.x1, "the legend is cut off"
    assert num <= 8 or not legend.overlaps(box)


@pytest.mark.parametrize(
    ("heights", "from_zero"),
    [([0.5, 2], True), ([0, 0], True), ([-0.9, -0.32], False), ([-1, -1], False), ([-1, 3], False)],
    ids=str,
)
def test_a_vertical_axis_points_up_and_has_all_heights_and_zero_unless_some_are_below(heights, from_zero):
    """Also beside a height that is not finite."""
    records = [{"step": step, "loss": height} for step, height in enumerate([*heights, math.inf], start=1)]
    (ax,) = report.draw_curves(records, [report.Panel("Loss", "nats", {"loss": ""})]).axes
    low, high = ax.get_ylim()
    assert low <= min(heights) and max(heights) < high
    assert (low == 0) == from_zero
