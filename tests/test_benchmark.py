import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import slurm
import yaml
from conftest import PYTHON, ROOT, run_cli
from samples import encode, photo

import benchmark
import config
from launch import claim_output_dir
from reading.sources import make_dataset
from report import Panel, write_panels
from utils import UserError

STUB = """
import json, os, sys
from pathlib import Path
import yaml

cfg = yaml.safe_load(open(sys.argv[1]))
folder = Path(cfg["output_dir"])
with (folder / "starts").open("a") as file:
    file.write("x")
print("it begins", flush=True)
path = folder / "results_stub.json"
if path.exists() and json.loads(path.read_text())["config"]["score"] != cfg["score"]:
    sys.exit("error: results of another config")
results = {"knn": {"mIoU": cfg["score"]}}
written = cfg | ({"resolution": 16} if cfg.get("resolution") == [16, 16] else {})
content = {"results": results, "config": written, "about": {"weights_sha256": "ab" * 32}}
path.write_text(json.dumps(content))
if cfg.get("fails"):
    print("error: train_dataset_name=nowhere: there is no such folder", file=sys.stderr)
    sys.exit(2)
if "signals" in cfg:
    os.kill(os.getppid(), cfg["signals"])
    import time
    time.sleep(600)
if cfg.get("dies"):
    os.kill(os.getpid(), 9)
content["about"]["seconds"] = 1.5
content["about"]["ranks"] = os.environ.get("WORLD_SIZE", "1")
path.write_text(json.dumps(content))
"""

MODEL = """
def load_model(model_name="tiny", pretrained_weights=None, config_path=None): ...

__model_loader__ = load_model
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model file, weights, and an evaluation script that only writes what it is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "tiny_model.py").write_text(MODEL)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "student.pth").write_bytes(b"weights")
    (tmp_path / "runs" / "a" / "student.yaml").write_text("model: {}")
    evals = {"one": {"file": "stub.py", "score": 0.25}, "two": {"file": "stub.py", "score": 0.5}}
    (tmp_path / "evals.yaml").write_text(yaml.safe_dump(evals))
    return tmp_path


ARGUMENTS = [
    "output_dir=out",
    "model_path=tiny_model.py",
    "pretrained_weights=runs/a/student.pth",
    "evals_config_path=evals.yaml",
]
NO_RANDOM = [*ARGUMENTS, "random_baseline=false"]


def results() -> dict[str, Any]:
    return json.loads(Path("out/results.json").read_text())


def starts(name: str) -> int:
    return len(Path("out", name, "starts").read_text())


# What is evaluated.


def test_the_default_evaluations_are_a_literal_of_scripts_that_know_their_keys():
    evals = benchmark.read_evals("default_eval_config.py", {})
    assert [entry["file"] for entry in evals.values()] == [
        "eval_classification.py",
        "eval_segmentation.py",
        "eval_visualizations.py",
        "eval_visualizations.py",
    ]
    assert [entry.get("resolution") for entry in evals.values()] == [None, 224, 224, 448]
    for entry in evals.values():
        text = (ROOT / entry["file"]).read_text()
        assert all(re.search(rf"^    {key}: ", text, re.MULTILINE) for key in entry.keys() - {"file"})


def test_a_python_file_of_evaluations_is_read_and_not_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEVALS = {{'a': {{'file': 'eval_x.py', 'k': [1, 2]}}}}\n")
    assert benchmark.read_evals(str(path), {}) == {"a": {"file": "eval_x.py", "k": [1, 2]}}
    assert not (tmp_path / "ran").exists()


def test_keys_of_a_script_are_read_from_its_source(tmp_path):
    import eval_classification

    fields = {field.name for field in dataclasses.fields(eval_classification.ClassificationConfig)}
    assert config.script_keys(ROOT / "eval_classification.py") == fields
    (tmp_path / "mine.py").write_text("raise SystemExit\nclass C(evaluation.EvaluationConfig):\n    width: int = 3\n")
    assert {"width", "output_dir", "free_keys"} & config.script_keys(tmp_path / "mine.py") == {"width", "output_dir"}
    for text in ("class C(Mixin, EvaluationConfig):\n    width: int = 3\n", "print()\n"):
        (tmp_path / "mine.py").write_text(text)
        assert config.script_keys(tmp_path / "mine.py") is None, "keys that cannot be known are taken for unknown ones"


def test_a_list_of_evaluations_in_the_published_form_runs_as_it_stands(here):
    published = """
        seg: {file: eval_segmentation.py, train_dataset_name: a, test_dataset_name: b, resolution: 448}
        cls: {file: eval_classification.py, train_dataset_name: a, test_dataset_names: b, n_iters: 10}
        vis: {file: eval_visualizations.py, dataset_name: a}
    """
    (here / "evals.yaml").write_text(textwrap.dedent(published))
    tasks = benchmark.plan(benchmark.read_config(NO_RANDOM))
    assert [task.script.name for task in tasks] == [
        f"eval_{x}.py" for x in ("segmentation", "classification", "visualizations")
    ]
    assert tasks[0].config["test_dataset_name"] == "b" and "file" not in tasks[0].config


def test_single_evaluations_can_be_changed_added_and_left_out(here):
    changes = {"one": {"score": 0.75, "batch": {"x": 1}}, "two": None, "three": {"file": "s.py"}}
    assert benchmark.read_evals("evals.yaml", changes) == {
        "one": {"file": "stub.py", "score": 0.75, "batch": {"x": 1}},
        "three": {"file": "s.py"},
    }


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("e.py", "EVALS = dict(a=1)", "evals_config_path=e.py: EVALS is read, not run, so it must be a plain literal"),
        ("e.py", "EVALS = [1]", "evals_config_path=e.py: EVALS must be a dict"),
        ("e.py", "EVAL = {}", "evals_config_path=e.py: does not assign EVALS"),
        ("e.py", "EVALS = {", "evals_config_path=e.py: is not Python"),
        ("e.yaml", "- a", "evals_config_path=e.yaml: must hold"),
        ("e.yaml", "a: [", "evals_config_path=e.yaml: cannot be read"),
        ("e.yaml", "a: {resolution: 2}", "evals.a: needs file"),
        ("e.yaml", "a/b: {file: s.py}", "evals.a/b: a name is also that of a folder"),
        ("e.yaml", "random: {file: s.py}", "evals.random: a name is also that of a folder"),
        ("e.yaml", "a: {file: s.py, output_dir: x}", "evals.a.output_dir: is the same for all evaluations"),
        ("e.yaml", "{}", "no evaluation is left"),
    ],
)
def test_a_bad_list_of_evaluations_is_explained(tmp_path, monkeypatch, name, text, says):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(UserError) as caught:
        benchmark.read_evals(name, {})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("evals.on.score=1", "evals.on: there is no such evaluation in evals.yaml; did you mean one?"),
        ("evals_config_path=none.yaml", "evals_config_path=none.yaml: there is no such file"),
        ("evals.one.file=none.py", "evals.one.file=none.py: there is no such file"),
        ("pretrained_weights=none.pth", "pretrained_weights=none.pth: cannot be read: No such file or directory"),
        ("model_path=none.py", "model_path=none.py: there is no such file"),
        ("model_path=stub_model.py", "the file does not define __model_loader__"),
        ("compare=[evals.yaml]", "compare=evals.yaml: cannot be read"),
        ("compare=[any.json]", "compare=any.json: is not a results.json that benchmark.py wrote"),
        ("run_dir=runs/a", "run_dir=runs/a: has no metrics.jsonl"),
        ("launcher=cloud", "launcher.where='cloud': must be one of local, slurm"),
        ("launcher.gpus_per_nod=1", "did you mean launcher.gpus_per_node?"),
        ("nproc_per_node=0", "nproc_per_node=0: must be at least 1"),
        ("output_dir=a=b", "output_dir='a=b': must not contain '='"),
        ("modelpath=x", "unknown key modelpath; did you mean model_path?"),
        ("train_dataset=x", "a key of one evaluation is given as evals.<name>.train_dataset_name"),
        ("evals.one.script=stub.py", "evals.one: unknown key script; it is called file"),
        ("evals.new={script: stub.py}", "evals.new: unknown key script; it is called file"),
        (
            "evals.new={file: eval_segmentation.py, test_datasets: x}",
            "evals.new: unknown key test_datasets; it is called test_dataset_name",
        ),
        ("evals.new={file: eval_classification.py, resolutoin: 1}", "unknown key resolutoin; did you mean resolution?"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(here, capsys, argument, says):
    (here / "stub_model.py").write_text("")
    (here / "any.json").write_text('{"results": 1}')
    assert benchmark.main([*ARGUMENTS, argument]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_help_shows_the_command(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "python benchmark.py output_dir=results/mine pretrained_weights=" in capsys.readouterr().out


def test_without_an_output_folder_one_is_chosen_and_found_again(here, capsys):
    assert benchmark.main(NO_RANDOM[1:]) == 0
    shown = capsys.readouterr()
    chosen = Path(shown.out.splitlines()[-2]).parent
    assert chosen.parent == Path("runs/a"), "it is not beside the weights"
    assert chosen.name.startswith("student_benchmark_")
    assert f"output_dir={chosen}" in shown.err, "it is not said before the evaluations start"
    assert benchmark.main(NO_RANDOM[1:]) == 0
    assert [path.name for path in Path("runs/a").glob("student_benchmark_*")] == [chosen.name]
    assert len((chosen / "one" / "starts").read_text()) == 1, "it was done again"
    assert benchmark.main([*NO_RANDOM[1:], "model_loader_kwargs.model_name=huge"]) == 0
    assert len(list(Path("runs/a").glob("student_benchmark_*"))) == 2, "another model has results in the same folder"


@pytest.mark.parametrize("where", ["unwritable", "url", "none", "equals"])
def test_what_cannot_be_beside_the_weights_is_in_runs(here, where, monkeypatch, capsys):
    (here / "lr=1").mkdir()
    (here / "lr=1" / "w.pth").write_bytes(b"weights")
    if where == "unwritable":
        monkeypatch.setattr("evaluation.os.access", lambda path, mode: Path(path) != Path("runs/a"))
    weights = {"unwritable": "runs/a/student.pth", "url": "https://x.org/w.pth?a=b", "equals": "lr=1/w.pth"}.get(where)
    given = [f"pretrained_weights={weights}"] if weights else ["model_loader_kwargs.model_name=data2vec2_vitb16"]
    arguments = ["model_path=tiny_model.py", "evals_config_path=evals.yaml", "random_baseline=false", *given]
    assert benchmark.main(arguments) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-2]).parent
    assert folder.parent == Path("runs")
    stem = {"none": "tiny_model_data2vec2_vitb16", "unwritable": "a_student", "url": "w", "equals": "lr_1_w"}[where]
    assert folder.name.startswith(stem), folder


ENTRY = {"results": {"knn": {"mIoU": 0.5}}, "config": {}, "about": {}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "is not a results.json"),
        (None, "is not a results.json"),
        ({"name": 3, "evaluations": {}}, "name is 3, not text"),
        ({"name": "x", "evaluations": []}, "evaluations is list"),
        ({"name": "x", "evaluations": {"one": None}}, "evaluations.one lacks results"),
        ({"name": "x", "evaluations": {"one": ENTRY | {"results": [1]}}}, "evaluations.one lacks results"),
        ({"name": "x", "evaluations": {"one": {"results": {}, "about": {}}}}, "evaluations.one lacks config"),
        (
            {"name": "x", "evaluations": {"one": ENTRY | {"results": {"knn": {"mIoU": "0.5"}}}}},
            "is '0.5', not a number",
        ),
        ({"name": "x", "evaluations": {"one": ENTRY | {"results": {"knn": {"mIoU": None}}}}}, "is None, not a number"),
        ({"name": "x", "evaluations": {"one": ENTRY | {"about": "x"}}}, "evaluations.one lacks about"),
    ],
)
def test_a_malformed_file_to_compare_with_is_explained(here, capsys, content, says):
    Path("other.json").write_text(json.dumps(content))
    assert benchmark.main([*ARGUMENTS, "compare=[other.json]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: compare=other.json: ") and says in error
    assert not Path("out").exists()
    Path("other.json").write_bytes(b'{"name": "\xff"}')
    assert benchmark.main([*ARGUMENTS, "compare=[other.json]"]) == 2
    assert benchmark.main([*ARGUMENTS, "compare=[runs]"]) == 2


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", '{"request": null}', '{"request": {}}', '{"request": {}, "job": 3}', "{"]
)
@pytest.mark.parametrize("name", ["benchmark.json", "results_stub.json"])
def test_our_own_files_with_something_else_in_them_are_named(here, capsys, name, content):
    assert benchmark.main([*NO_RANDOM, "evals.two=null"]) == 0
    capsys.readouterr()
    Path("out/one", name).write_text(content)
    assert benchmark.main([*NO_RANDOM, "evals.two=null"]) == 2
    error = capsys.readouterr().err
    assert f"out/one/{name}" in error and "delete it to evaluate anew" in error


@pytest.mark.parametrize(
    "path", ["out", "out/one", "out/random", "out/results.json/x", "out/one/log.txt/x", "out/report.html/x"]
)
def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_explained(here, capsys, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("")
    assert benchmark.main([*ARGUMENTS, "evals.two=null"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_names_that_are_not_utf8_do_not_end_a_benchmark(here, capfd):
    weights = os.fsdecode(b"runs/caf\xe9/student.pth")
    Path(weights).parent.mkdir()
    Path(weights).write_bytes(b"weights")
    cfg = benchmark.BenchmarkConfig(
        model_path="tiny_model.py",
        model_loader_kwargs={"pretrained_weights": weights},
        evals_config_path="evals.yaml",
        output_dir=os.fsdecode(b"o\xff"),
    )
    assert benchmark.benchmark(cfg) == 0
    assert "o\\udcff/results.json" in capfd.readouterr().out
    assert "caf\\udce9/student" in Path(os.fsdecode(b"o\xff"), "report.html").read_text()


# Random initialisation.


@pytest.mark.parametrize(
    ("given", "parameters", "expected"),
    [
        ({"pretrained_weights": "runs/a/student.pth"}, ["config_path"], {"config_path": "runs/a/student.yaml"}),
        ({"pretrained_weights": "runs/a/student.pth", "config_path": "c"}, ["config_path"], {"config_path": "c"}),
        ({"pretrained_weights": "https://x/a.pth"}, ["config_path"], {}),
        ({"pretrained_weights": "a.pth", "model_name": "b"}, ["pretrained"], {"model_name": "b", "pretrained": False}),
        ({"model_name": "b"}, ["pretrained"], {"model_name": "b", "pretrained": False}),
        ({"pretrained": False}, ["pretrained"], {"pretrained": False}),
    ],
)
def test_random_initialisation_keeps_everything_but_the_weights(here, given, parameters, expected):
    assert benchmark.without_weights(given, parameters) == expected


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"loader_sha256": "0" * 64}, r"out/one has results of another model: tiny_model\.py, its model_loader_kwargs"),
        (
            {"data": {"dataset_name": {"url": "photos", "fingerprint": "0"}}},
            "what is at dataset_name=photos has changed",
        ),
        ({"data": {"dataset_name": {"url": "photos", "fingerprint": ""}}}, None),
        ({"data": {"dataset_name": {"url": "custom://ADE20K?split='training'", "fingerprint": "0"}}}, None),
    ],
)
def test_what_is_done_is_done_for_this_very_model_and_data(here, capsys, about, message):
    (here / "photos").mkdir()
    (here / "photos" / "a.png").write_bytes(encode(photo(0)))
    assert benchmark.main(NO_RANDOM) == 0
    path = Path("out/one/results_stub.json")
    content = json.loads(path.read_text())
    for entry in about.get("data", {}).values():
        entry["fingerprint"] = entry["fingerprint"] or make_dataset(entry["url"]).fingerprint()
    content["about"] |= about
    path.write_text(json.dumps(content))
    assert benchmark.main(NO_RANDOM) == (0 if message is None else 2)
    if message is not None:
        assert re.search(message, capsys.readouterr().err)
    assert starts("one") == 1


def test_both_models_are_evaluated_with_the_same_keys(here):
    assert benchmark.main([*ARGUMENTS, "device=cpu", "num_workers=0", "evals.two.num_workers=3"]) == 0
    of = {name: yaml.safe_load(Path("out", name, "config.yaml").read_text()) for name in ("one", "two", "random/one")}
    assert of["one"] == {
        "device": "cpu",
        "num_workers": 0,
        "score": 0.25,
        "model_path": "tiny_model.py",
        "model_loader_kwargs": {"pretrained_weights": "runs/a/student.pth"},
        "output_dir": "out/one",
    }
    assert of["two"]["num_workers"] == 3
    changed = {"model_loader_kwargs": {"config_path": "runs/a/student.yaml"}, "output_dir": "out/random/one"}
    assert of["random/one"] == of["one"] | changed
    assert list(results()["random"]) == ["one", "two"]


def test_a_model_without_weights_is_not_evaluated_twice(here, caplog):
    caplog.set_level("INFO")
    assert benchmark.main(["output_dir=out", "model_path=tiny_model.py", "evals_config_path=evals.yaml"]) == 0
    assert results()["random"] == {}
    assert results()["name"] == "tiny_model"


# Running.


def test_the_end_is_a_table_results_and_a_report(here, capsys):
    assert benchmark.main(ARGUMENTS) == 0
    shown = capsys.readouterr()
    assert re.search(r"^two +knn +mIoU +50\.0 +50\.0$", shown.out, re.MULTILINE)
    assert shown.out.endswith("\nout/results.json\nout/report.html\n")
    assert "    it begins\n" in shown.err, "what the script says is not shown"
    assert Path("out/one/log.txt").read_text() == "it begins\n"
    content = results()
    assert content["name"] == "a/student"
    assert content["evaluations"]["one"]["results"] == {"knn": {"mIoU": 0.25}}
    assert content["evaluations"]["one"]["about"]["seconds"] == 1.5
    assert content["evaluations"]["one"]["folder"] == "one"
    assert content["random"]["one"]["folder"] == "random/one"
    assert "<h1>Evaluation of a/student</h1>" in Path("out/report.html").read_text()


def test_what_is_done_is_not_done_again(here):
    assert benchmark.main(NO_RANDOM) == 0
    # Neither a machine nor the place of the weights changes a result.
    Path("runs/a/student.pth").rename("runs/a/moved.pth")
    assert benchmark.main([*NO_RANDOM, "batch_size=7", "device=cpu", "pretrained_weights=runs/a/moved.pth"]) == 0
    assert (starts("one"), starts("two")) == (1, 1)
    assert results()["evaluations"]["two"]["status"] == "done"


@pytest.mark.parametrize("resolution", ["[16,16]", "[16,32]", "16"])
def test_a_square_may_be_asked_for_by_both_sides(here, resolution):
    for _ in range(2):
        assert benchmark.main([*NO_RANDOM, f"evals.one.resolution={resolution}"]) == 0
    assert starts("one") == 1


def test_a_changed_key_goes_to_the_script_and_its_refusal_is_a_failure_also_the_second_time(here, capsys):
    assert benchmark.main(NO_RANDOM) == 0
    for _ in range(2):
        assert benchmark.main([*NO_RANDOM, "evals.one.score=0.75"]) == 1
        assert (
            "one: failed. exit code 1: error: results of another config (log: out/one/log.txt)"
            in capsys.readouterr().out
        )
    assert benchmark.main(NO_RANDOM) == 0, "the old request holds again"


def test_other_weights_are_refused_before_anything_runs(here, capsys):
    assert benchmark.main(NO_RANDOM) == 0
    Path("runs/a/student.pth").write_bytes(b"other weights")
    assert benchmark.main(NO_RANDOM) == 2
    error = capsys.readouterr().err
    assert re.search(r"out/one has results of another model \(SHA-256 of its weights file: \w{12}, of this one", error)
    assert "choose another output_dir" in error
    assert starts("one") == 1


def test_results_of_another_origin_are_not_taken_for_ours(here, capsys):
    Path("out/one").mkdir(parents=True)
    Path("out/one/results_x.json").write_text('{"results": {}, "config": {}, "about": {"seconds": 1}}')
    assert benchmark.main(NO_RANDOM) == 2
    assert "out/one has results that benchmark.py did not make" in capsys.readouterr().err


def test_a_failure_is_named_and_the_others_are_done_and_reported(here, capsys):
    assert benchmark.main([*NO_RANDOM, "evals.one.fails=true"]) == 1
    shown = capsys.readouterr().out
    reason = "exit code 2: error: train_dataset_name=nowhere: there is no such folder (log: out/one/log.txt)"
    assert f"one: failed. {reason}" in shown
    assert results()["evaluations"]["one"]["status"] == "failed"
    assert results()["evaluations"]["two"]["results"] == {"knn": {"mIoU": 0.5}}
    assert reason in Path("out/report.html").read_text()
    assert benchmark.main(NO_RANDOM) == 0
    assert (starts("one"), starts("two")) == (2, 1), "what failed, and only that, runs again"


def test_what_failed_for_the_model_is_not_tried_at_random_initialisation(here, capsys):
    assert benchmark.main([*ARGUMENTS, "evals.one.fails=true"]) == 1
    assert "one, random initialisation: left out. It failed for the model itself." in capsys.readouterr().out
    assert not Path("out/random/one").exists()
    assert results()["random"]["two"]["status"] == "done"


def test_a_killed_script_is_a_failure(here, capsys):
    assert benchmark.main([*NO_RANDOM, "evals.one.dies=true"]) == 1
    assert "one: failed. killed, perhaps because memory ran out: it begins" in capsys.readouterr().out


@pytest.mark.slow
def test_with_several_processes_torchrun_starts_them(here):
    assert benchmark.main([*NO_RANDOM, "evals.two=null", "nproc_per_node=2"]) == 0
    assert results()["evaluations"]["one"]["about"]["ranks"] == "2"
    assert starts("one") == 2


@pytest.fixture
def parent_is_known(monkeypatch):
    """What `STUB` signals is the process that started it, and no server."""
    monkeypatch.setattr(sys, "executable", PYTHON)


@pytest.mark.usefixtures("parent_is_known")
def test_ctrl_c_ends_it_and_the_same_command_goes_on(here, capsys):
    assert benchmark.main([*NO_RANDOM, f"evals.two.signals={int(signal.SIGINT)}"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on\n")
    assert benchmark.main(NO_RANDOM) == 0
    assert (starts("one"), starts("two")) == (1, 2)


@pytest.mark.usefixtures("parent_is_known")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_evaluation_first(here, capsys, name):
    number = signal.Signals[name]
    code = benchmark.main([*NO_RANDOM, f"evals.two.signals={int(number)}"])  # or this waits for ten minutes
    assert code == 128 + number
    assert capsys.readouterr().err.endswith(f"interrupted by {name}; the same command goes on\n")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_two_benchmarks_do_not_share_a_folder(here, capsys):
    with claim_output_dir("out"):
        assert benchmark.main(NO_RANDOM) == 2
    assert "output_dir='out' is in use by another run (process" in capsys.readouterr().err
    assert not Path("out/one").exists()


# Comparison.


def test_other_models_are_shown_beside_and_differences_of_their_evaluation_said(here, capsys):
    assert benchmark.main([*NO_RANDOM, "evals.one.score=0.2", "evals.two=null"]) == 0
    Path("out").rename("first")
    assert benchmark.main([*NO_RANDOM, "name=second", "compare=[first/results.json]"]) == 0
    assert re.search(r"^one +knn +mIoU +25\.0 +20\.0$", capsys.readouterr().out, re.MULTILINE)
    content = results()
    assert (content["name"], list(content["compared"])) == ("second", ["a/student"])
    assert content["notes"] == ["one: a/student was evaluated differently, with score 0.2 instead of 0.25."]
    assert "evaluated differently, with score 0.2" in Path("out/report.html").read_text()


def test_what_has_no_result_yet_was_not_evaluated_differently(here):
    """The keys that its script would have filled in are not known."""
    assert benchmark.main([*NO_RANDOM, "evals.two=null"]) == 0
    Path("out").rename("first")
    path = Path("first/results.json")
    content = json.loads(path.read_text())
    content["evaluations"]["one"]["config"]["a_default"] = 3
    path.write_text(json.dumps(content))
    (here / "refuses.py").write_text("import sys\nsys.exit(2)\n")
    assert benchmark.main([*NO_RANDOM, "compare=[first/results.json]", "evals.one.file=refuses.py"]) == 1
    assert results()["notes"] == []


def test_two_models_of_one_name_are_told_apart(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "results.json"))
        Path(paths[-1]).write_text('{"name": "same", "evaluations": {}}')
    assert list(benchmark.read_compared(paths)) == ["same", f"same ({tmp_path / 'b'})"]


def test_the_training_run_is_in_the_report(here):
    record = {"step": 1, "capi_loss": 4.0, "lr": 0.1}
    Path("runs/a/metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"step": 9}) + "\n")
    write_panels(Path("runs/a"), [Panel("Cross-entropy losses", "nats", {"capi_loss": "student"})])
    assert benchmark.main([*NO_RANDOM, "evals.two=null", "run_dir=runs/a"]) == 0
    assert "Cross-entropy losses over 9 steps" in Path("out/report.html").read_text()


# Slurm.

FAKE_SBATCH = """#!/bin/sh
echo x >> submitted
cp "$1" script.sh
echo "Submitted batch job 17"
"""


@pytest.fixture
def fake_slurm(here, monkeypatch):
    """A queue that takes a job and of which the test says what became of it."""
    folder = here / "bin"
    folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("squeue", "#!/bin/sh\ncat queue\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (here / "queue").write_text("PENDING\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(benchmark, "ROOT", here)
    monkeypatch.setattr("launch.ROOT", here)
    return [*NO_RANDOM, "evals.two=null", "launcher=slurm"]


def test_jobs_are_submitted_once_and_collected_later(fake_slurm, here, capsys):
    assert benchmark.main([*fake_slurm, "launcher.partition=long", "launcher.time_min=30"]) == 0
    assert re.search(
        r"one: running\. Slurm job 17, log .*out/one/jobs/001/17_0_log.out: submitted", capsys.readouterr().out
    )
    script = Path("script.sh").read_text()
    for option in ("partition=long", "time=30", "nodes=1", "gpus-per-node=1", "ntasks-per-node=1"):
        assert f"#SBATCH --{option}\n" in script
    assert yaml.safe_load(Path("out/one/jobs/001/config.yaml").read_text())["output_dir"] == "out/one"
    assert f"{here}/out/one/jobs/001/code/stub.py" in script

    Path("queue").write_text("RUNNING\n")
    assert benchmark.main(fake_slurm) == 0
    assert "one: running. Slurm job 17, log" in capsys.readouterr().out
    assert results()["evaluations"]["one"]["status"] == "running"

    Path("queue").write_text("")
    subprocess.run([sys.executable, "stub.py", "out/one/jobs/001/config.yaml"], check=True)
    assert benchmark.main(fake_slurm) == 0
    assert "25.0" in capsys.readouterr().out
    assert results()["evaluations"]["one"]["status"] == "done"
    assert Path("submitted").read_text() == "x\n"


def test_a_job_that_ended_unfinished_is_a_failure_until_it_is_retried(fake_slurm, capsys):
    assert benchmark.main(fake_slurm) == 0
    Path("queue").write_text("")
    for _ in range(2):
        assert benchmark.main(fake_slurm) == 1
        assert "ended without finishing; retry=true submits it again" in capsys.readouterr().out
    assert benchmark.main([*fake_slurm, "retry=true"]) == 0
    assert Path("submitted").read_text() == "x\nx\n"


def test_a_squeue_that_does_not_answer_is_not_taken_for_an_empty_queue(fake_slurm, here, capsys):
    assert benchmark.main(fake_slurm) == 0
    (here / "bin" / "squeue").write_text("#!/bin/sh\necho 'cannot connect' >&2\nexit 1\n")
    assert benchmark.main(fake_slurm) == 2
    assert "squeue does not answer (cannot connect)" in capsys.readouterr().err


def test_slurm_must_be_there_and_know_the_script(fake_slurm, monkeypatch, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other") / "stub.py"
    other.write_text(STUB)
    assert benchmark.main([*fake_slurm, f"evals.one.file={other}"]) == 2
    assert "a Slurm job runs scripts of" in capsys.readouterr().err
    assert benchmark.main([*fake_slurm, "nproc_per_node=2"]) == 2
    assert "nproc_per_node=2: is for launcher=local" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert benchmark.main(fake_slurm) == 2
    assert "launcher=slurm: there is no Slurm here" in capsys.readouterr().err


# As a user types it.


DEMO_EVALS = """
segmentation:
  file: eval_segmentation.py
  train_dataset_name: custom://Segmentation?root='demo_data/emoji_on_scenes/train'
  test_dataset_name: custom://Segmentation?root='demo_data/emoji_on_scenes/val'
  resolution: 32
  ignore_labels: [255]
  max_train_images: 20
  classifiers: [knn]
"""
TINY = {
    "n_registers": 4,
    "patch_size": 8,
    "transformers_kwargs": {"embed_dim": 16, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
    "encoder_kwargs": {"depth": 1},
    "decoder_kwargs": {"depth": 1},
}


@pytest.fixture
def real(tmp_path):
    """Arguments of a benchmark of small real weights with a real evaluation."""
    import torch

    from model import EncoderDecoder

    (tmp_path / "evals.yaml").write_text(DEMO_EVALS)
    torch.manual_seed(1)  # 0 is that of the evaluation
    model = EncoderDecoder(**TINY)
    torch.save({f"backbone.{key}": value for key, value in model.state_dict().items()}, tmp_path / "weights.pth")
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump({"model": TINY}))
    arguments = [f"output_dir={tmp_path / 'out'}", f"pretrained_weights={tmp_path / 'weights.pth'}", "device=cpu"]
    return [*arguments, f"evals_config_path={tmp_path / 'evals.yaml'}", "num_workers=0"]


@pytest.mark.slow
def test_a_real_evaluation_of_real_weights_is_done_once(real, tmp_path):
    done = run_cli("benchmark.py", *real)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^segmentation +knn +mIoU +\d+\.\d +\d+\.\d$", done.stdout, re.MULTILINE)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    hashes = {content[part]["segmentation"]["about"]["weights_sha256"] for part in ("evaluations", "random")}
    assert len(hashes) == 2
    started = time.monotonic()
    again = run_cli("benchmark.py", *real)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert time.monotonic() - started < 60
    assert again.stderr.count("is done") == 2


@pytest.mark.slow
def test_a_real_evaluation_runs_on_a_real_slurm(real, tmp_path):
    refusal = slurm.why_not_here()
    if refusal:
        pytest.skip(refusal)
    on_cpus = ["launcher=slurm", "launcher.gpus_per_node=0", "launcher.tasks_per_node=1", "random_baseline=false"]
    with slurm.slurm() as cluster:

        def run() -> subprocess.CompletedProcess[str]:
            return run_cli("benchmark.py", *real, *on_cpus, **cluster.environ)

        done = run()
        assert done.returncode == 0, done.stderr
        assert "segmentation: running. Slurm job 1" in done.stdout
        cluster.wait_for("1", seconds=100, JobState="COMPLETED")
        slurm.wait_until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty", 60)
        done = run()
        assert done.returncode == 0, done.stderr
        assert re.search(r"^segmentation +knn +mIoU +\d+\.\d$", done.stdout, re.MULTILINE)
