"""Dockerfile, skypilot.yaml, CITATION.cff and CONTRIBUTING.md: what they name is there, and versions agree."""

import json
import re
import shlex
import tomllib

import pytest
import yaml
from conftest import ROOT

import cae
import ijepa
import model

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
SKYPILOT = yaml.safe_load((ROOT / "skypilot.yaml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def arguments_of(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def commands() -> list[list[str]]:
    """What runs on the machines, and what their files show as examples."""
    shown = re.findall(r"python \w+\.py[^\"\n`]*", "\n".join(re.findall(r"^#.*(?:\n#  .*)*", DOCKERFILE, re.M)))
    lines = [*SKYPILOT["setup"].splitlines(), SKYPILOT["envs"]["COMMAND"], *arguments_of("RUN"), *shown]
    return [json.loads(rest) for rest in arguments_of("CMD")] + [shlex.split(line) for line in lines if line]


def test_commands_on_machines_exist():
    assert len(commands()) >= 5
    for program, *rest in commands():
        if program == "pip":
            assert rest[0] == "install" and rest[-2:] == ["-e", "."] and (ROOT / rest[rest.index("-c") + 1]).is_file()
        else:
            assert program == "python"
            files = [word for word in rest if word.endswith((".py", ".yaml"))]
            assert files and all((ROOT / name).is_file() for name in files), rest
    assert SKYPILOT["run"].split() == ["eval", '"$COMMAND"'], "the command is what is checked here"


def test_both_machines_have_a_python_that_is_new_enough():
    (image,) = arguments_of("FROM")
    assert SKYPILOT["resources"]["image_id"] == f"docker:{image}"
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)", image).groups()))
    assert version >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


def test_packages_are_installed_from_files_that_are_copied_before():
    before = INSTRUCTIONS[: next(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "RUN")]
    copied = " ".join(rest for name, rest in before if name == "COPY").split()
    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed <= set(copied)
    assert [name for name in copied[:-1] if not (ROOT / name).is_file()] == []


def test_the_citation_is_of_this_version():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert (CITATION["version"], CITATION["license"]) == (PROJECT["version"], PROJECT["license"])
    assert CITATION["title"] == PROJECT["description"]


@pytest.mark.parametrize("reference", CITATION["references"], ids=lambda reference: reference["title"][:20])
def test_papers_are_cited_as_model_cards_cite_them(reference):
    """Title, year and authors in their order are those of the card's BibTeX."""
    entries = [
        " ".join(entry.split())
        for encoder in (model.EncoderDecoder, ijepa.Encoder, cae.Encoder)
        for entry in encoder.card_text.citation.replace("{\\'e}", "é").split("\n\n")
    ]
    (entry,) = (entry for entry in entries if reference["title"] in entry)
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in reference["authors"])
    assert f"{{{authors}}}" in entry and f"{{{reference['year']}}}" in entry


def test_the_guide_names_targets_and_markers_that_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make (\w+)`", guide)) <= set(targets)
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert {marker.split(":")[0] for marker in markers} == set(re.findall(r"^\| .* \| `(\w+)` \|", guide, re.M))
    assert all((ROOT / name).exists() for name in re.findall(r"`([\w/]+\.(?:py|md|txt)|tests/\w+/)`", guide))
