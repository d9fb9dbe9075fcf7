"""Tiny trainings of every method, for tests that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_cae
import golden_ijepa
from commands import make_images, tiny

import cae
import ijepa
import model
import train_cae
import train_capi
import train_ijepa


@dataclass(frozen=True)
class Method:
    """A method with a tiny training."""

    script: Any
    tiny_run: Callable[..., list[str]]
    """Arguments, of a folder made by `images_for_all`, an output folder and overrides."""
    patch: int
    load_model: Callable[..., Any]
    export: str = "student_ema"
    """Name of the weights that a training leaves."""


def tiny_stop(images: Path, output_dir: Path, *overrides: str) -> list[str]:
    return golden_ijepa.tiny_run(images, output_dir, golden_ijepa.STOP_NOISE, *overrides)


METHODS = {
    "capi": Method(train_capi, tiny, 4, model.load_model),
    "ijepa": Method(train_ijepa, golden_ijepa.tiny_run, 4, ijepa.load_model),
    "stop": Method(train_ijepa, tiny_stop, 4, ijepa.load_model),
    "cae": Method(train_cae, golden_cae.tiny_run, 8, cae.load_model, "student"),
}


def images_for_all(folder: Path) -> Path:
    """Images, and beside them the tokenizer that CAE needs."""
    make_images(folder, size=40)
    golden_cae.save_tokenizer(folder)
    return folder
