"""Backbones of CAPI, I-JEPA, StoP and CAE for `torch.hub`, with torch alone: trained here, or a released one by name.

    model = torch.hub.load("/path/to/this/folder", "capi", source="local", weights="runs/mine")
    model = torch.hub.load("/path/to/this/folder", "ijepa", source="local", weights="runs/mine")
    model = torch.hub.load("/path/to/this/folder", "capi_vitl14_lvd", source="local")
    global_repr, registers, feature_map = model(torch.zeros(1, 3, 224, 224))

Images are RGB in [0, 1], minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225), unless the model was trained on
others: `model.normalisation(values)` makes of values as they are stored what the model takes. Both sides are multiples
of the patch size, 14 for the released ones.

torch.hub runs in other people's programs, whose `model.py` and `utils.py` are not ours. Imported by it, this folder's
modules get names of their own, which no program asks for, and models pickle as a call of `torch.hub.load`.
"""

import functools
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator as _Iterator  # underscores keep names out of `torch.hub.list`
from collections.abc import Mapping as _Mapping
from pathlib import Path as _Path
from typing import Any as _Any

import torch
from torch.overrides import TorchFunctionMode as _TorchFunctionMode

_FOLDER = _Path(__file__).resolve().parent

# Names of the folder's modules in a program of somebody else. They are below a name that every program has, so that
# none is new at the top; importing one finds it in `sys.modules`, as torch.compile does with the module of a function
# that it inlines. Not below `torch`: the compiler takes what is there for PyTorch's own. Other copies of this
# repository have other names.
_PACKAGE = f"__main__.capi_{hashlib.sha256(str(_FOLDER).encode(errors='surrogateescape')).hexdigest()[:12]}"


def _import(name: str) -> _Any:
    """A module of this folder: under its plain name in programs of this folder, else below `_PACKAGE`."""
    if __name__ == "hubconf" and getattr(importlib.util.find_spec(name), "origin", None) == str(_FOLDER / f"{name}.py"):
        return importlib.import_module(name)
    utils = sys.modules.get(f"{_PACKAGE}.utils")
    if utils is None:
        spec: _Any = importlib.util.spec_from_file_location(f"{_PACKAGE}.utils", _FOLDER / "utils.py")
        utils = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(utils)
        sys.modules[spec.name] = utils
    # Without jaxtyping annotations say less, and that a program has it shall not depend on us.
    folder = utils.FolderOfModules(_FOLDER, _PACKAGE, hidden=["jaxtyping"])
    module = folder.import_module(name)
    for part in ("model", "ijepa", "cae", "weights", "utils"):
        for value in list(vars(sys.modules.get(f"{_PACKAGE}.{part}", utils)).values()):
            if isinstance(value, type) and value.__module__.startswith(f"{_PACKAGE}."):
                _pickle_by_folder(value)
    return module


class _New:
    """Makes an empty instance of a class. Pickled, it is the way to that class: no other process knows its module."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __call__(self, *arguments: _Any) -> _Any:
        return self.cls.__new__(self.cls, *arguments)

    def __reduce__(self) -> _Any:
        where = (str(_FOLDER), "_new", self.cls.__module__.rpartition(".")[2], self.cls.__qualname__)
        return functools.partial(torch.hub.load, source="local"), where


def _new(module: str, name: str) -> _New:
    return _New(getattr(_import(module), name))


def _pickle_by_folder(cls: _Any) -> None:
    """Let instances of `cls`, unlike those of classes that derive from it, name the class by this folder."""
    if "__reduce_ex__" in vars(cls):
        return
    new = _New(cls)  # one for all instances, so that a pickle names the class once

    def reduce_ex(self: _Any, protocol: int) -> _Any:
        if type(self) is not cls:
            return object.__reduce_ex__(self, protocol)
        make, arguments, *state = object.__reduce_ex__(self, 2)
        return new, arguments if make is cls else arguments[1:], *state  # exceptions call the class

    cls.__reduce_ex__ = reduce_ex


_model = _import("model")

dependencies = ["torch"]

ADDRESS = "https://dl.fbaipublicfiles.com/capi/"

VIT_L14: dict[str, _Any] = {
    "patch_size": 14,
    "in_chans": 3,
    "norm_layer_type": "RMSNorm",
    "norm_layer_kwargs": {"eps": 1e-5},
    "final_norm_kwargs": {"elementwise_affine": False},
    "n_registers": 16,
    "register_coordinates": "edge",
    "scale_reg_to_visible": True,
    "out_layer": -1,
    "predictor": "cross",
    "transformers_kwargs": {
        "embed_dim": 1024,
        "drop_path_rate": 0.2,
        "block_kwargs": {
            "drop_path_type": "efficient",
            "mlp_bias": False,
            "attn_kwargs": {
                "num_heads": 16,
                "qkv_bias": False,
                "proj_bias": False,
                "rope_kwargs": {"max_freq": 7.0, "min_freq": 7e-4},
            },
        },
    },
    "encoder_kwargs": {"depth": 24},
    "decoder_kwargs": {"depth": 12},
}
"""The released architecture, whatever the default of new trainings becomes."""


class _WithoutRandomNumbers(_TorchFunctionMode):
    """Leaves weights uninitialised that others replace. The meta device would too, but imports sympy and triton."""

    def __torch_function__(self, func: _Any, types: _Any, args: _Any = (), kwargs: _Any = None) -> _Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _load(arguments: dict[str, _Any], source: _Any) -> _Any:
    state_dict = _model.read_state_dict(source, key="weights")
    with _WithoutRandomNumbers():
        model = _model.EncoderDecoder(**arguments)
    _model.load_backbone_weights(model, state_dict, str(source))
    return model.eval()


def _vit_l14(file: str, pretrained: bool, weights: str | None) -> _Any:
    source = weights if weights is not None else ADDRESS + file if pretrained else None
    return _model.EncoderDecoder(**VIT_L14).eval() if source is None else _load(VIT_L14, source)


def capi(weights: str | _Path, config: str | _Path | dict[str, _Any] | None = None) -> _Any:
    """A model that was trained here.

    Args:
        weights: what a run or `export.py` wrote, `.pth` or `.safetensors`, or its address; or the folder of a run,
            whose `student_ema.pth` it is, or one that `save_pretrained` wrote.
        config: the training configuration, or its section `model` as a dict, which come on top of the released
            architecture. None: the .yaml of the same name beside the weights, if there is one.
    """
    source, section, path = _source_and_section(weights, config, "capi")
    try:
        return _load(_merged(VIT_L14, section), source)
    except TypeError as error:
        raise _model.UserError(
            f"config={str(path or config)!r}: the section model has a wrong key: {error}; models of other methods are "
            "'ijepa' and 'cae' of torch.hub"
        ) from error


def ijepa(
    weights: str | _Path,
    config: str | _Path | dict[str, _Any] | None = None,
    num_heads: int | None = None,
    encoder: str = "target_encoder",
) -> _Any:
    """An encoder of I-JEPA or StoP: one that was trained here, or that of a file which its authors publish.

    Args:
        weights: as for `capi`, or a published `.pth.tar`, or its address.
        config: the training configuration, or its section `model` as a dict. None: the .yaml of the same name beside
            the weights, if there is one.
        num_heads: attention heads, which no shape tells, where there is no configuration: 16 for ViT-L, H and g, 12 for
            ViT-B.
        encoder: which one of a published file; `target_encoder` is the one that the paper evaluates, the other is
            `encoder`.
    """
    source, section, _ = _source_and_section(weights, config, "ijepa")
    return _import("ijepa").load_model(pretrained_weights=source, encoder=encoder, **_told(section, num_heads))


def cae(
    weights: str | _Path, config: str | _Path | dict[str, _Any] | None = None, num_heads: int | None = None
) -> _Any:
    """An encoder of CAE: one that was trained here, or that of a file which its authors publish.

    Args:
        weights: as for `capi`, with `student.pth` of a run, or a published `.pth`, or its address.
        config: the training configuration, or its section `model` as a dict. None: the .yaml of the same name beside
            the weights, if there is one.
        num_heads: attention heads, which no shape tells, where there is no configuration: 12 for ViT-Ti, S and B, 16
            for ViT-L.
    """
    source, section, _ = _source_and_section(weights, config, "cae", exported="student")
    return _import("cae").load_model(pretrained_weights=source, **_told(section, num_heads))


_ENTRIES = {"capi": "capi", "predictor": "ijepa", "regressor": "cae"}
"""By the section that the configurations of a method alone have."""


def _source_and_section(
    weights: str | _Path, config: str | _Path | dict[str, _Any] | None, entry: str, exported: str = "student_ema"
) -> tuple[str | _Path, dict[str, _Any], _Path | None]:
    """Address or file of the weights, the section `model` of their configuration, empty if there is none, and its file.

    Args:
        weights: as for `capi`.
        config: as for `capi`.
        entry: by which the user asks.
        exported: the network of a run's folder.
    """
    file = _Path(weights)
    beside = file.parent / f"{file.stem}.yaml"
    if file.is_dir() and (file / "config.json").is_file():
        file, beside = file / "model.safetensors", file / "config.json"
    elif file.is_dir():
        _check_entry(entry, file / "config.yaml")
        file, beside = file / f"{exported}.pth", file / f"{exported}.yaml"
        if not file.is_file():
            raise _model.UserError(
                f"weights={str(weights)!r}: the folder has no {exported}.pth, which a run writes at its end and "
                "python export.py <the run's folder> <file>.pth at any time"
            )
    if config is None and beside.is_file():
        config = beside
    path = None if config is None or isinstance(config, dict) else _Path(config)
    if path is not None:
        _check_entry(entry, path)
    section = config if isinstance(config, dict) else {} if path is None else _model_section(path)
    if path is not None and path.suffix != ".json":
        section = section | {"normalisation": _normalisation(path) or None}
    return (weights if "://" in str(weights) else file), section, path


def _check_entry(entry: str, path: _Path) -> None:
    """Raise UserError if a configuration, where there is one, is of another method."""
    names = [line.partition(":")[0] for line in _lines(path)] if path.is_file() and path.suffix != ".json" else []
    others = [_ENTRIES[name] for name in names if _ENTRIES.get(name, entry) != entry]
    if others:
        raise _model.UserError(f"config={str(path)!r} is of a model which torch.hub has as {others[0]!r}")


def _told(section: _Mapping[str, _Any], num_heads: int | None) -> dict[str, _Any]:
    """What loaders would else ask the configuration, for which they need PyYAML."""
    return {
        "num_heads": num_heads or section.get("num_heads"),
        "normalisation": section.get("normalisation") or {},
    }


def _merged(below: dict[str, _Any], above: _Mapping[str, _Any]) -> dict[str, _Any]:
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _model_section(path: _Path) -> dict[str, _Any]:
    """The section `model` of a configuration. torch brings no reader of YAML; this one knows what our files have.

    That is names and values, nested by indentation or in braces. Anything else is an error.
    """
    if path.suffix == ".json":
        return _checked(json.loads("\n".join(_lines(path))), "model", path)
    root: dict[str, _Any] = {}
    opened: list[_Any] = []  # names without a value: indentation, the mapping they are in, name, indentation inside
    for where, indentation, content in _content_of("model", path):
        while opened and opened[-1][0] >= indentation:
            opened.pop()
        named = re.fullmatch(r"(\w+):(?:\s+(.+))?", content)
        mapping, expected = root, indentation
        if opened:
            _, parent, name, expected = opened[-1]
            opened[-1][3] = expected = expected or indentation
            mapping = parent[name] = parent[name] or {}
        if named is None or indentation != expected:
            raise _too_much(where, content)
        mapping[named[1]] = None if named[2] is None else _plain_value(named[2], where, content)
        if named[2] is None:
            opened.append([indentation, mapping, named[1], None])
    return _checked(root.get("model"), "model", path)


def _normalisation(path: _Path) -> dict[str, _Any]:
    """What the section `data` of a configuration says of it: null, or lists of numbers, in brackets or a line each.

    What else is in that section may be any YAML.
    """
    keys = ("value_range", "mean", "std")
    said: dict[str, _Any] = {}
    level, key = 0, ""  # of names in the section; the one whose numbers have a line each
    for where, indentation, content in _content_of("data", path):
        level = level or indentation
        named = re.fullmatch(r"(\w+):(?:\s+(.+))?", content)
        if not indentation and named and named[2] and re.search(rf"\b({'|'.join(keys)})\W", named[2]):
            section = _checked(_plain_value(named[2], where, content), "data", path)
            return {name: value for name, value in section.items() if name in keys}
        if named and indentation == level:
            key = named[1] if named[1] in keys and indentation else ""
            if key:
                said[key] = None if named[2] is None else _plain_value(named[2], where, content)
                key = key if named[2] is None else ""
        elif key and (item := re.fullmatch(r"- +([-+.\deE]+)", content)):
            said[key] = [*(said[key] or ()), float(item[1])]
        elif key:
            raise _too_much(where, content)
    return said


def _lines(path: _Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _model.UserError(f"config={str(path)!r} cannot be read: {error}") from error


def _content_of(section: str, path: _Path) -> _Iterator[tuple[str, int, str]]:
    """Where a line of a section is, for messages, its indentation, and what is on it beside comments; none if that is
    nothing. The first is that with the section's name."""
    inside = False
    for number, line in enumerate(_lines(path), start=1):
        content = re.sub(r"""("[^"]*"|'[^']*')|(?:^|\s)#.*""", lambda found: found[1] or "", line).rstrip()
        indentation = len(content) - len(content.lstrip(" "))
        if content and not indentation and not content.startswith("-"):
            inside = content.startswith(f"{section}:")
        if content and inside:
            yield f"config={str(path)!r}, line {number}", indentation, content.lstrip(" ")


def _too_much(where: str, content: str) -> Exception:
    return _model.UserError(
        f"{where}: {content!r} is more YAML than torch.hub reads here; give the section model as a dict, "
        "config={...}, or write it as the exports do"
    )


def _checked(section: _Any, name: str, path: _Path) -> dict[str, _Any]:
    if section is not None and not isinstance(section, dict):
        raise _model.UserError(f"config={str(path)!r}: its section {name} is {section!r}, not names with values")
    return section or {}


def _plain_value(text: str, where: str, content: str) -> _Any:
    """A number, truth value, null or name, or some in braces or brackets, by way of JSON.

    Raises: UserError for anything else, of a line.
    """
    constants = {"true": "true", "false": "false", "null": "null", "~": "null"}

    def as_json(word: re.Match[str]) -> str:
        return constants.get(word[0].lower()) or json.dumps(word[0].strip("'\""))

    try:
        return json.loads(re.sub(r"\"[^\"]*\"|'[^']*'|(?<![\w.+-])[A-Za-z_~][\w-]*", as_json, text))
    except ValueError as error:
        raise _too_much(where, content) from error


def capi_vitl14_lvd(pretrained: bool = True, weights: str | None = None) -> _Any:
    """ViT-L/14 trained on LVD-142M.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_lvd.pth", pretrained, weights)


def capi_vitl14_p205(pretrained: bool = True, weights: str | None = None) -> _Any:
    """ViT-L/14 trained on Places205.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_p205.pth", pretrained, weights)


def capi_vitl14_in22k(pretrained: bool = True, weights: str | None = None) -> _Any:
    """ViT-L/14 trained on ImageNet-22k.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_i22k.pth", pretrained, weights)


def capi_vitl14_in1k(pretrained: bool = True, weights: str | None = None) -> _Any:
    """ViT-L/14 trained on ImageNet-1k.

    Args:
        pretrained: load the released weights, downloaded once; False leaves them random.
        weights: path or address to load instead.
    """
    return _vit_l14("capi_vitl14_in1k.pth", pretrained, weights)
