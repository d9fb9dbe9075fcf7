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
from checkpoint import export_weights
from config import DEFAULT_PRETRAIN_CONFIG, load_config, to_yaml


@dataclass(frozen=True)
class Method:
    """A method with a tiny training."""

    script: Any
    tiny_run: Callable[..., list[str]]
    """Arguments, of a folder made by `images_for_all`, an output folder and overrides."""
    patch: int
    load_model: Callable[..., Any]
    schema: type[Any]
    default_config: Path
    make_backbone: Callable[[Any], Any]
    """Of a configuration."""
    export: str = "student_ema"
    """Name of the weights that a training leaves."""


def tiny_stop(images: Path, output_dir: Path, *overrides: str) -> list[str]:
    return golden_ijepa.tiny_run(images, output_dir, golden_ijepa.STOP_NOISE, *overrides)


IJEPA = (train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG, train_ijepa.IjepaConfig.make_encoder)
METHODS = {
    "capi": Method(
        train_capi,
        tiny,
        4,
        model.load_model,
        train_capi.CapiConfig,
        DEFAULT_PRETRAIN_CONFIG,
        lambda cfg: model.EncoderDecoder(**cfg.model.kwargs()),
    ),
    "ijepa": Method(train_ijepa, golden_ijepa.tiny_run, 4, ijepa.load_model, *IJEPA),
    "stop": Method(train_ijepa, tiny_stop, 4, ijepa.load_model, *IJEPA),
    "cae": Method(
        train_cae,
        golden_cae.tiny_run,
        8,
        cae.load_model,
        train_cae.CaeConfig,
        train_cae.DEFAULT_CONFIG,
        train_cae.CaeConfig.make_encoder,
        "student",
    ),
}


def write_export(method: Method, folder: Path, *overrides: str) -> tuple[Path, Any]:
    """Leave in a folder what a tiny training does, with the weights that it begins with; the file and the backbone."""
    arguments = method.tiny_run(folder / "images", folder, *overrides)
    cfg = load_config(method.schema, method.default_config, arguments)
    backbone = method.make_backbone(cfg).eval()
    export_weights(folder / f"{method.export}.pth", {"backbone": backbone}, to_yaml(cfg))
    return folder / f"{method.export}.pth", backbone


def images_for_all(folder: Path) -> Path:
    """Images, and beside them the tokenizer that CAE needs."""
    make_images(folder, size=40)
    golden_cae.save_tokenizer(folder)
    return folder
