"""Write the weights of a training run, or of a file, for other programs.

    python export.py runs/mine backbone.pth                     the newest checkpoint of a run
    python export.py runs/mine/checkpoints/step_000003750 backbone.safetensors backbone.onnx
    python export.py student_ema.pth backbone.onnx              a file that was exported before, or an address
    python export.py IN1K-vit.h.14-300e.pth.tar backbone.pth --config configs/ijepa/vith14.yaml

The last is a file of several networks, as the authors of I-JEPA and StoP publish them: `student_ema` is its target
encoder, `student` its encoder with the predictor. Files of CAE's authors are taken likewise.
`.pth` is a dict of tensors by their published names, `.safetensors` has the same keys; both get their config beside
them, as `.yaml`, where the loader of the method (`load_model` of model.py, ijepa.py, cae.py) finds it. `.onnx` takes
normalised images of any number and size and gives the three outputs of the backbone's `forward`; its metadata
says under `normalisation` by what, as that of `.safetensors` does if it is not ImageNet's of 8-bit RGB. It needs
`pip install -c constraints.txt -e '.[onnx]'` in this folder. `.pth.tar`, of a run or checkpoint of I-JEPA, StoP or CAE,
is what the authors' programs read: all networks in one file. The reverse, starting a run from weights, is the key
`train.init_from`.
"""

from pathlib import Path

from utils import command_line

with command_line(__doc__, __name__) as parser:
    FORMATS = (".pth", ".safetensors", ".onnx", ".pth.tar")
    MODELS = ("student_ema", "student")
    parser.add_argument("source", help="folder of a run, checkpoint, or file or address of weights")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"to write: {', '.join(FORMATS)}")
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="of a checkpoint or .pth.tar; default: student_ema, or student where there is no average",
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="of a file of weights; default: the .yaml beside it. Its keys: `--help-all` of the training script",
    )

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cae
import ijepa
import train_cae
import train_ijepa
from checkpoint import Checkpoints, export_weights, read_weights, replacing_export, save_atomically
from config import DEFAULT_PRETRAIN_CONFIG, TrainingConfig, load_config, read_yaml, require_one_of, to_yaml
from model import EncoderDecoder
from train_cae import CaeConfig
from train_capi import CapiConfig, make_head
from train_ijepa import IjepaConfig
from utils import Normalisation, UserError, ending_in_words, setup_logging
from weights import load_backbone_weights, load_strictly, read_state_dict, save_safetensors

logger = logging.getLogger("export")

ONNX_FILE_LIMIT = 2**31 - 2**26
"""Bytes of weights up to which they are part of the .onnx file, whose format ends at 2 GiB; beyond, `.onnx.data`."""


@dataclass(frozen=True)
class Method:
    """What there is to know of a pretraining method whose weights are exported."""

    config: type[TrainingConfig]
    default_config: Path
    make_modules: Callable[[Any, Mapping[str, Any]], dict[str, nn.Module]]
    """From a configuration and weights to modules for them, by their prefix in released weights: `backbone`, whose
    `forward` gives the three outputs, and others that the weights have too."""
    as_exported: Callable[[Mapping[str, Any], str], Mapping[str, Any]]
    """From what a file holds, and one of `MODELS`, to its weights as a training exports them."""
    as_published: Callable[[Mapping[str, Mapping[str, nn.Module]]], Mapping[str, Any]] | None
    """From the modules of all `MODELS` to what the authors publish; None if that is what a training exports."""


def _capi_modules(cfg: CapiConfig, weights: Mapping[str, Any]) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"backbone": EncoderDecoder(**cfg.model.kwargs())}
    if any(key.startswith("head.") for key in weights):
        modules["head"] = make_head(cfg, len(weights.get("head.last_layer.weight_v", ())))
    return modules


def _modules_with_predictor(cfg: IjepaConfig | CaeConfig, weights: Mapping[str, Any]) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"backbone": cfg.make_encoder()}
    if "predictor.mask_token" in weights:
        modules["predictor"] = cfg.make_predictor()
    return modules


METHODS = {
    "capi": Method(CapiConfig, DEFAULT_PRETRAIN_CONFIG, _capi_modules, lambda file, _: file, None),
    "predictor": Method(
        IjepaConfig, train_ijepa.DEFAULT_CONFIG, _modules_with_predictor, ijepa.as_exported, ijepa.as_published
    ),
    "regressor": Method(
        CaeConfig, train_cae.DEFAULT_CONFIG, _modules_with_predictor, cae.as_exported, cae.as_published
    ),
}
"""By the section that the configurations of that method alone have. The first is that of weights without one."""


@dataclass(frozen=True)
class Exportable:
    """Modules by their prefix in released weights, with the configuration that they were trained with."""

    modules: dict[str, Any]
    cfg: TrainingConfig
    method: Method


def read(source: str, *, model: str | None = None, config_path: Path | None = None) -> Exportable:
    """Read what is to be exported.

    Args:
        source: a run's folder, one of its checkpoints, or a file or address of weights.
        model: which weights of a checkpoint or a published file of several networks, one of `MODELS`; None for those
            that the method exports first.
        config_path: configuration of a file of weights. None: the one beside it, or the default.

    Raises: UserError if there is nothing to read, it does not fit its configuration, or there is nothing to choose.
    """
    folder = _checkpoint_in(Path(source)) if Path(source).is_dir() else None
    weights: Mapping[str, Any] = {}
    if folder is not None:
        if config_path is not None:
            own = str(folder / "config.yaml")
            raise UserError(f"--config={str(config_path)!r}: {source!r} has its own, {own!r}; leave --config out")
        config_path = folder / "config.yaml"
    else:
        # Published files may have the options of their training beside the weights: a bag of values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = read_state_dict(source, key="source")
        beside = Path(source).with_suffix(".yaml")
        config_path = config_path or (beside if beside.is_file() else None)
        has_several = any(part in weights for part in ijepa.PUBLISHED_PARTS)
        if model is not None and not has_several:
            raise UserError(f"--model={model!r}: in {source!r} there is one network to export; leave --model out")
        if config_path is None and has_several:
            raise UserError(
                f"source={source!r} holds several networks, and no configuration lies beside it: give the one that "
                "describes them, such as --config configs/ijepa/vith14.yaml"
            )
    method = _method_of(config_path)
    model = model or method.config.EXPORTS[0]
    require_one_of("--model", model, method.config.EXPORTS)
    if folder is not None:
        logger.info("reading %s of %s", model, folder)
        weights = read_weights(folder, model)
    weights = method.as_exported(weights, model)
    cfg = load_config(method.config, method.default_config, [] if config_path is None else [str(config_path)])
    with torch.device("meta"):
        modules = method.make_modules(cfg, weights)
    for name, module in modules.items():
        module.to_empty(device="cpu").eval()
        if name == "backbone":
            load_backbone_weights(module, weights, source)
        else:
            own = {key.removeprefix(f"{name}."): x for key, x in weights.items() if key.startswith(f"{name}.")}
            load_strictly(module, own, source, remedy="Give the config they were trained with")
    return Exportable(modules, cfg, method)


def _method_of(config_path: Path | None) -> Method:
    sections = None if config_path is None else read_yaml(config_path)
    sections = sections if isinstance(sections, dict) else {}
    if "backbone" in sections:
        raise UserError(
            f"{str(config_path)!r} is of a fine-tuned model, which is not exported: finetuning.load_model loads it"
        )
    names = [name for name in METHODS if name in sections]
    return METHODS[[*names, *METHODS][0]]


def _checkpoint_in(folder: Path) -> Path:
    if (folder / "manifest.json").is_file():
        return folder
    newest = Checkpoints(folder, keep=1).newest()
    if newest is None:
        raise UserError(f"source={str(folder)!r}: neither a checkpoint nor the folder of a run that has one")
    return newest


def write(exportable: Exportable, path: Path) -> None:
    """Write one file, in the format that its suffix names; a file that was there before is replaced at the end.

    `publish` writes `.pth.tar`.

    Raises: UserError for another suffix, a missing package, or a folder that cannot be written to.
    """
    check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".pth":
            export_weights(path, exportable.modules, to_yaml(exportable.cfg))
        elif path.suffix == ".safetensors":
            _write_safetensors(exportable, path)
        else:
            _write_onnx(exportable.modules["backbone"], path, _normalisation_notes(exportable.cfg))
    except OSError as error:
        raise UserError(f"{str(path)!r} could not be written: {error}") from error


def publish(source: str, path: Path) -> None:
    """Write student and average of a checkpoint into one file, in the layout in which the authors publish.

    Raises: UserError for another source or method, as `read` does, or for a folder that cannot be written to.
    """
    if not Path(source).is_dir():
        raise UserError(f"{str(path)!r} is to hold student and average: give a run or a checkpoint, not {source!r}")
    student = read(source, model="student")
    others = (name for name in student.cfg.EXPORTS if name != "student")
    models = {"student": student} | {name: read(source, model=name) for name in others}
    as_published = student.method.as_published
    if as_published is None:
        raise UserError(f"{str(path)!r}: what the authors of this method publish is what .pth holds; call it so")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_atomically(path, as_published({model: exportable.modules for model, exportable in models.items()}))
    except OSError as error:
        raise UserError(f"{str(path)!r} could not be written: {error}") from error


def check_path(path: Path) -> None:
    """Raise UserError unless the suffix is one of `FORMATS` and the packages that it needs are there."""
    if not path.name.endswith(FORMATS):
        raise UserError(f"{str(path)!r}: the name must end in one of {', '.join(FORMATS)}")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            remedy = f"in {str(Path(__file__).parent)!r}: pip install -c constraints.txt -e '.[onnx]'"
            raise UserError(f"{str(path)!r}: {error.name} is missing; {remedy}") from error


def _write_safetensors(exportable: Exportable, path: Path) -> None:
    weights = {
        f"{name}.{key}": tensor
        for name, module in exportable.modules.items()
        for key, tensor in module.state_dict().items()
    }
    is_default = exportable.cfg.data.normalisation == Normalisation()  # without a word, as released weights
    notes = {} if is_default else _normalisation_notes(exportable.cfg)
    with replacing_export(path, to_yaml(exportable.cfg)) as temporary:
        save_safetensors(weights, temporary, {"format": "pt", **notes})


def _normalisation_notes(cfg: TrainingConfig) -> dict[str, str]:
    """What images are normalised by, for the metadata of a file: `value_range`, `mean` and `std` as JSON."""
    return {"normalisation": json.dumps(asdict(cfg.data.normalisation))}


class _Named(nn.Module):
    """The backbone one level down: its parameter `registers` may not be called like an output of the graph."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.backbone(images))


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """The exporter logs every node that it looks at."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _write_onnx(backbone: Any, path: Path, notes: Mapping[str, str]) -> None:
    import onnx

    p = backbone.patch_size
    example = torch.zeros(2, backbone.in_chans, 4 * p, 6 * p)  # three numbers that differ: none is taken for another
    batch, rows, columns = torch.export.Dim("batch"), torch.export.Dim("rows"), torch.export.Dim("columns")
    size = sum(parameter.nbytes for parameter in backbone.parameters())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder, torch.no_grad():
        with warnings.catch_warnings(), _no_chatter():
            warnings.simplefilter("ignore")  # the exporter's, about its own parts
            torch.onnx.export(
                _Named(backbone).eval(),
                (example,),
                Path(folder, path.name),
                input_names=["images"],
                output_names=["global_repr", "registers", "feature_map"],
                dynamic_shapes={"images": {0: batch, 2: p * rows, 3: p * columns}},
                external_data=size > ONNX_FILE_LIMIT,
                dynamo=True,
                verbose=False,
            )
        graph: Any = onnx.load(str(Path(folder, path.name)), load_external_data=False)
        onnx.helper.set_model_props(graph, dict(notes))
        Path(folder, path.name).write_bytes(graph.SerializeToString())
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the .onnx file after the .onnx.data it needs
            written.replace(path.parent / written.name)


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    for path in args.files:
        check_path(path)
    # Once for all: a run that trains has a newer one at any moment.
    source = str(_checkpoint_in(Path(args.source))) if Path(args.source).is_dir() else args.source
    exportable = read(source, model=args.model, config_path=args.config)
    for path in args.files:
        if path.name.endswith(".pth.tar"):
            publish(source, path)
        else:
            write(exportable, path)
        sys.stdout.write(os.fsencode(path).decode(errors="backslashreplace") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
