"""keys.py: what `--help-all` and `--schema` say of the keys of every script."""

import importlib
import json
import re
import sys
from typing import Any

import pytest
from commands import run_forked
from conftest import ROOT
from jsonschema import Draft202012Validator

import keys
import train_distributed
from config import DEFAULT_PRETRAIN_CONFIG, load_config, read_source, read_yaml
from utils import UserError

sys.path.append(str(ROOT / "experiments"))  # where the scripts look for each other

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")])
READS = re.compile(r"^with command_line.*\n    add_(sources|training_options)\(", re.M)
SCRIPTS = [path.stem for path in SOURCES if READS.search(path.read_text())]
PASSED_ON = {"train_distributed"}
"""Scripts that let another answer."""


def asked(script: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a script prints before it ends at once."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def schema_of(script: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    schema = json.loads(asked(script, capsys, "--schema"))
    Draft202012Validator.check_schema(schema)
    return schema


def dotted_keys(schema: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Of sections; what a user gives names to is not gone into."""
    found = {}
    for name, about in schema["properties"].items():
        found[prefix + name] = about
        if about.get("additionalProperties") is False:
            found |= dotted_keys(about, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - PASSED_ON))
def test_every_key_of_every_script_has_a_meaning_and_is_listed(script, capsys):
    schema = schema_of(script, capsys)
    mute = [key for key, about in dotted_keys(schema).items() if not about.get("description")]
    assert not mute, f"write below these fields what they mean: {', '.join(mute)}"
    listed = re.findall(r"^([a-z][\w.]*)(?= |,|$)", asked(script, capsys, "--help-all"), re.M)
    assert set(dotted_keys(schema)) <= set(listed)


def test_the_scripts_that_read_configurations_answer():
    assert {"train_capi", "train_ijepa", "train_cae", "benchmark", "extract_features", "compare"} <= set(SCRIPTS)


def test_a_key_is_found_as_a_user_types_it():
    done = run_forked("train_capi.py", "configs/demo.yaml", "optim.total_iters=7", "--help-all=updates")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "optim.total_iters = 7  (a whole number at least 1)\n    Optimizer updates of the whole training.\n"
    )


def test_what_a_user_names_is_listed_once(capsys):
    said = asked("train_capi", capsys, "--help-all", "evals.")
    assert "evals.<name>.period  (a whole number at least 0)" in said and "evals.fast" not in said


def test_what_must_be_given_and_short_names_of_a_command_line(capsys):
    assert "dataset, which must be given  (a text)" in asked("extract_features", capsys, "--help-all")
    said = asked("benchmark", capsys, "launcher=slurm", "--help-all=launcher.where")
    assert "launcher.where = slurm" in said


def test_mistakes_are_explained(capsys):
    script = importlib.import_module("train_capi")
    assert script.main(["--help-all=no such words"]) == 2
    assert "no key or meaning has this word" in capsys.readouterr().err
    assert script.main(["optim.total_iter=7", "--schema"]) == 2
    assert "did you mean optim.total_iters" in capsys.readouterr().err


def test_the_script_of_a_job_answers_for_it(capfd):
    assert train_distributed.main(["--script", "train_ijepa.py", "--help-all=sigma"]) == 0
    assert capfd.readouterr().out.startswith("predictor.position_noise_std = 0.0  (a number at least 0)")
    assert train_distributed.main(["--script", "none.py", "--schema"]) == 2


def script_of(path: Any) -> str:
    """The script that reads a YAML file of this repository."""
    if path.parent.name == "continue":
        return f"train_{path.stem.partition('_')[0]}"
    sections = set(read_yaml(path))
    for section, script in {
        "trainings": "compare",
        "evaluations": "compare",
        "budget": "compare",
        "classification": "finetune_classification",
        "segmentation": "finetune_segmentation",
        "detection": "finetune_detection",
        "predictor": "train_ijepa",
        "regressor": "train_cae",
    }.items():
        if section in sections:
            return script
    folders = {"ijepa": "train_ijepa", "stop": "train_ijepa", "cae": "train_cae", "finetune": "finetune_segmentation"}
    return folders.get(path.parent.name, "train_capi")


def test_yaml_files_of_this_repository_fit(capsys):
    paths = [path for folder in ("configs", "experiments") for path in sorted(ROOT.glob(f"{folder}/**/*.yaml"))]
    paths += sorted(ROOT.glob("default_*.yaml"))
    validators: dict[str, Draft202012Validator] = {}
    seen = set()
    for path in paths:
        if path.parent.name == "evals":
            checked = [(entry.pop("file").removesuffix(".py"), entry) for entry in read_yaml(path).values()]
        else:
            checked = [(script_of(path), read_yaml(path))]
        for script, tree in checked:
            seen.add(script)
            if script not in validators:
                validators[script] = Draft202012Validator(schema_of(script, capsys))
            said = [f"{error.json_path}: {error.message}" for error in validators[script].iter_errors(tree)]
            assert not said, f"{path}: {'; '.join(said)}"
    assert len(seen) >= 8


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("optim: {total_iters: 10}", True),
        ("optim: {total_iters: 500_000}", True),
        ("optim: {total_iters: 0}", False),
        ("optim: {total_iters: 1.5}", False),
        ("optim: {total_iters: null}", False),
        ("optim: {total_iter: 10}", False),
        ("optim: {clip_grad: null}", True),
        ("optim: {clip_grad: 0}", False),
        ("optim: {clip_grad: 3}", True),
        ("optim: {betas: [0.9]}", False),
        ("optim: {betas: [0.9, 1]}", False),
        ("optim: {betas: [0.9, 0.99]}", True),
        ("optim: {lr_schedule: {base_value: 1e-3, warmup_iters: 5}}", True),
        ("optim: {lr_schedule: {base_value: fast}}", False),
        ("optim: {lr_schedule: null}", False),
        ("capi: {num_clusters: 1}", False),
        ("capi: {targets: latent}", False),
        ("data: {masking_generator_kwargs: {roll: false, mine: 3}}", True),
        ("data: {do_hflip: perhaps}", False),
        ("train: {loggers: [wandb, tensorboard]}", True),
        ("train: {loggers: [paper]}", False),
        ("train: {init_from: ''}", False),
        ("train: {seed: 4294967296}", False),
        ("evals: null", True),
        ("evals: {mine: null}", True),
        ("evals: {fast: {period: -1}}", False),
        ("evals: {fast: {priod: 1}}", False),
        ("evals: {a/b: null}", False),
        ("efficiency: {rematerialization: {policy: {'aten::mm': maybe}}}", False),
        ("new: 1", False),
    ],
)
def test_editors_and_trainings_agree_on_what_fits(text, fits, tmp_path):
    script = importlib.import_module("train_capi")
    values = read_source(script.CapiConfig, str(DEFAULT_PRETRAIN_CONFIG))
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    schema = keys.json_schema(script.CapiConfig, values)
    assert Draft202012Validator(schema).is_valid(read_yaml(path)) == fits
    try:
        load_config(script.CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(path)])
    except UserError:
        assert not fits
    else:
        assert fits
