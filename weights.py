"""Weights of models: reading and downloading files of them, and the Hugging Face Hub. Needs torch alone.

Nothing here executes what a file contains, and nothing that is damaged becomes a model in silence. huggingface_hub and
safetensors are imported where they are used.
"""

import contextlib
import functools
import hashlib
import http.client
import logging
import os
import pickle
import pickletools
import re
import stat
import struct
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from utils import Normalisation, UserError, hash_file, locked, replacing

logger = logging.getLogger("weights")


def read_state_dict(
    path_or_url: str | Path,
    *,
    sha256: str | None = None,
    key: str = "pretrained_weights",
    module_packages: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read the dict that a `.pth` or `.safetensors` file holds, without executing anything the file may contain.

    Objects besides tensors and plain Python values are refused. To read a trusted old file that has some, name them:
    `with torch.serialization.safe_globals([argparse.Namespace]): read_state_dict(...)`.

    Args:
        path_or_url: a file; or an address, downloaded once into torch's hub folder (`TORCH_HOME` moves it).
        sha256: what the file must hash to; None checks nothing.
        key: argument or config key by which the user gave the file, for messages.
        module_packages: packages such as `torch.nn.modules`. A `.pth` file may then hold, instead of a dict, a whole
            module of their classes, as of torch 1.6. They are not imported; the module's state dict is returned.

    Raises: UserError if the file is missing, unreachable, damaged, another one than `sha256` says, or refused. Damage
        shows in the checksums that a `.pth` archive has; a .safetensors file and torch's format before 1.6 have none.
    """
    address, path = str(path_or_url), local_path(path_or_url)
    if is_downloaded(path_or_url):
        if not path.is_file():
            _download(address, path, sha256, key)
        again = f"delete {str(path)!r} to have it downloaded again"
    else:
        again = "get it again"
        address = str(path) if "://" in address else address
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last for a zero byte
            raise UserError(f"{key}={address!r}: there is no such file") from error
        except OSError as error:
            raise UserError(f"{key}={address!r}: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            names = ("student_ema.pth", "student.pth", "model.safetensors")
            inside = [str(path / name) for name in names if (path / name).is_file()]
            raise UserError(
                f"{key}={address!r} is a folder; give a file{f', {inside[0]!r}' if inside else ' of weights'}"
            )
    if sha256 is not None and (actual := hash_file(path)) != sha256.lower():
        raise UserError(f"{key}: {str(path)!r} has sha256 {actual} instead of {sha256}: damaged or changed; {again}")
    if path.suffix == ".safetensors":
        loaded = _read_safetensors(path, key, again)
    else:
        loaded = _read_pth(path, key, again, tuple(f"{package}." for package in module_packages))
    if not isinstance(loaded, dict):
        raise UserError(
            f"{key}: {str(path)!r} holds a {type(loaded).__name__}, not a dict of tensors; give another file"
        )
    if nameless := [name for name in loaded if not isinstance(name, str)]:
        raise UserError(
            f"{key}: {str(path)!r} holds a dict with keys like {nameless[0]!r}, not names; give another file"
        )
    return loaded


def is_downloaded(path_or_url: str | Path) -> bool:
    """Whether it is an address elsewhere, and so `local_path` the place of a download."""
    return "://" in str(path_or_url) and not str(path_or_url).startswith("file://")


def local_path(path_or_url: str | Path) -> Path:
    """Where the file of a path or an address is on this machine, or will be once `read_state_dict` has downloaded it.

    Downloads are kept in torch's hub folder, under host and folders too: many files on the web are called
    model.safetensors.
    """
    address = str(path_or_url)
    parts = urllib.parse.urlsplit(address)
    if not is_downloaded(address):
        return Path(urllib.request.url2pathname(parts.path) if "://" in address else address)
    folders = [part for part in urllib.parse.unquote(parts.path).split("/") if part not in ("", ".", "..")]
    name = folders.pop() if folders else "weights"
    if parts.query:
        name = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{name}"
    return Path(torch.hub.get_dir(), "checkpoints", parts.netloc.replace(":", "_"), *folders, name)


def _download(url: str, path: Path, sha256: str | None, key: str) -> None:
    """Fetch `url` into `path`, which appears once it is complete and has the right hash."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".lock-{path.name}")):  # the ranks of a machine want it at the same time
            if path.is_file():  # another process was faster
                return
            with replacing(path, shared=True) as temporary:
                fetch(url, temporary)
                if sha256 is not None and (actual := hash_file(temporary)) != sha256.lower():
                    raise UserError(
                        f"{key}: {url} has sha256 {actual} instead of {sha256}: another file, or damaged on the way"
                    )
    except OSError as error:
        raise UserError(
            f"{key}: {url} could not be downloaded: {error}. Without a connection, place the file by hand as "
            f"{str(path)!r}"
        ) from error


def fetch(url: str, path: Path) -> None:
    """Download a file to `path`, with a progress bar.

    Raises: OSError if the address cannot be reached, or the connection ends before the file does.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "capi"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            # Of torch, since it is a plain counter where there is no tqdm.
            tqdm: Any = torch.hub.tqdm  # pyright: ignore[reportPrivateImportUsage]
            with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=url.rsplit("/", 1)[-1]) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    if total is not None and (size := path.stat().st_size) != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def _read_safetensors(path: Path, key: str, again: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{key}: reading {str(path)!r} needs safetensors: pip install safetensors") from error
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: {str(path)!r}: safetensors reads files with names in UTF-8 alone; rename it"
        ) from error
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {_kind_of(path) or error}; {again}") from error


HARMLESS = {"argparse.Namespace"}
"""What a refusal tells how to allow: bags of values, which training scripts of the time saved their options in."""


class _StandIn:
    """Takes the place of a class that a file names: it does nothing, but has the attributes that are in the file."""

    def __new__(cls, *_args: Any) -> "_StandIn":
        return super().__new__(cls)


def _load_without_classes(file: BinaryIO, prefixes: tuple[str, ...]) -> Any:
    """What `torch.load` reads of weights alone, with stand-ins for the classes whose names begin with a prefix."""
    stand_ins: dict[str, Any] = {}
    while True:
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Torch names the first class that it does not know, in both of its formats.
            name = "".join(re.findall(r"GLOBAL (\S+) was not an allowed", str(error)))
            if not name.startswith(prefixes) or name in stand_ins:
                raise
            stand_ins[name] = type(name, (_StandIn,), {})
        else:
            return dict(_module_tensors(loaded)) if isinstance(loaded, _StandIn) else loaded


def _module_tensors(module: _StandIn, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The entries of a module's state dict."""
    tensors = {**module.__dict__["_parameters"], **module.__dict__["_buffers"]}
    yield from ((prefix + name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, child in module.__dict__["_modules"].items():
        yield from _module_tensors(child, f"{prefix}{name}.")


def _read_pth(path: Path, key: str, again: str, prefixes: tuple[str, ...]) -> Any:
    try:
        _verify_checksums(path)
        with path.open("rb") as file:  # torch takes names in UTF-8 alone
            return _load_without_classes(file, prefixes)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error))
        if not zipfile.is_zipfile(path):
            names = names or _pickled_names(path)
        elif names:
            with path.open("rb") as file, contextlib.suppress(pickle.UnpicklingError, EOFError, *UNREADABLE):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(file) or names  # all of them
        names = [name for name in names if not name.startswith(prefixes)]
        if prefixes and not names and "Only persistent_load of storage" in str(error):
            raise UserError(
                f"{key}: {str(path)!r} is a module in torch's format before 1.6, of which only dicts are read here. "
                "Where you trust the file and have its classes, convert it once: torch.save(torch.load(path, "
                "weights_only=False).state_dict(), 'weights.pth')"
            ) from error
        if not names:
            kind = _kind_of(path)
            raise UserError(
                f"{key}: {str(path)!r} is no file of weights, or damaged{f': {kind}' if kind else ''}; {again}"
            ) from error
        remedy = "Use a file from another source, best as .safetensors"
        if HARMLESS.issuperset(names):
            remedy += (
                ". Old training files (.pth.tar) may hold options beside the weights: these are harmless, and "
                f"with torch.serialization.safe_globals([{', '.join(names)}]): ... allows them"
            )
        raise UserError(
            f"{key}: {str(path)!r} is refused: it holds more than weights, and reading it would execute "
            f"{', '.join(names)}. {remedy}"
        ) from error
    except EOFError as error:
        raise UserError(f"{key}: {str(path)!r} ends too early; {again}") from error
    except UNREADABLE as error:
        speaks = isinstance(error, OSError | RuntimeError | ValueError | zipfile.BadZipFile)
        reason = _kind_of(path) or (_first_sentence(error) if speaks else "it is no file of weights, or damaged")
        raise UserError(f"{key}: {str(path)!r} cannot be read: {reason}; {again}") from error


UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What torch's readers raise for bytes that are no file of weights. The first to notice is any line of an unpickler."""


def _verify_checksums(path: Path) -> None:
    """Raise BadZipFile if a part of the archive is not what was written; torch does not look. 1 GB takes 0.5 s."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # no archive: torch's format before 1.6
            return
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.CRC:  # 0 with torch.serialization.set_crc32_options(False)
                    with archive.open(part) as content:
                        while content.read(1 << 24):
                            pass


def _kind_of(path: Path) -> str | None:
    """What a file that could not be read is instead, as far as its beginning says."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer that git-lfs leaves for a file, not the file: run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not the file that it is about"
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "it is what torch.save writes: call it .pth"
    if (
        path.suffix != ".safetensors"
        and start[8:9] == b"{"
        and int.from_bytes(start[:8], "little") < path.stat().st_size
    ):
        return "it is in the format of .safetensors: call it so"
    return None


def _pickled_names(path: Path) -> list[str]:
    """What a plain pickle would import, found without running it; nothing if the file is none."""
    names, strings = [], [""]
    with path.open("rb") as file, contextlib.suppress(ValueError):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return names


def _first_sentence(error: Exception) -> str:
    return re.split(r"\. |\n", str(error).strip())[0] or type(error).__name__


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, but others may read the file as they may any new one; it forbids them.

    Raises: OSError if it cannot be written, a full disk included.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(mode)


def published_key(key: str) -> str:
    """The released name of a tensor, also if the file, or checkpoint, is of the time when a backbone's final norms had
    another."""
    return re.sub(r"(^|\bbackbone\.)(enc|dec)oder\.norm\.", r"\1\2_norm.", key)


def backbone_part(state_dict: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The entries under `backbone.`, without that prefix, by their released names; all of them if none has it.

    Raises: UserError if one of them is no tensor, naming the part of `source` that the weights may be in.
    """
    prefix = "backbone."
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    own = own or dict(state_dict)
    others = {key: value for key, value in own.items() if not isinstance(value, Tensor)}
    parts = [key for key, value in others.items() if isinstance(value, Mapping)]
    if parts:
        with_tensors = [key for key in parts if any(isinstance(value, Tensor) for value in others[key].values())]
        raise UserError(
            f"The weights in {source!r} are one level down: it holds dicts called {', '.join(map(repr, parts[:8]))}. "
            f"Save the one you want: torch.save(torch.load({source!r})[{(with_tensors or parts)[0]!r}], 'weights.pth')"
        )
    if others:
        listing = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(others.items())[:5])
        raise UserError(
            f"{source!r} holds values that are no tensors: {listing}. Save a dict of tensors alone, as torch.save("
            "model.state_dict(), 'weights.pth') does"
        )
    return {published_key(key): value for key, value in own.items()}


def load_backbone_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Copy the `backbone.` part of a state dict (or all of it if there is no such prefix) into `model`, exactly.

    Raises: UserError as `load_strictly` does.
    """
    own = backbone_part(state_dict, source)
    load_strictly(model, own, source, remedy="Give the config they were trained with")


def spread_over_bands(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights whose filters of RGB patches read as many bands as a module does; as they are if they fit, or are no RGB.

    Every band gets the mean of the three filters, times 3 / bands: what is grey means what it meant.
    """
    spread = dict(weights)
    for key, own in module.state_dict().items():
        rgb = weights.get(key)
        if "patch_embed" in key.split(".") and own.ndim == 4 and isinstance(rgb, Tensor) and rgb.ndim == 4:
            bands = own.shape[1]
            if rgb.shape[1] == 3 != bands:
                spread[key] = (rgb.mean(dim=1, keepdim=True) * (3 / bands)).expand(-1, bands, -1, -1).contiguous()
                logger.info("each of %d bands begins with the mean of the filters for red, green and blue", bands)
    return spread


def load_strictly(module: nn.Module, state_dict: Mapping[str, Any], source: str, *, remedy: str) -> None:
    """Copy a state dict into a module, all of it and nothing else.

    Args:
        module: filled in place.
        state_dict: tensors by the module's own keys.
        source: where they are from, for messages.
        remedy: what the user can do where they do not fit.

    Raises: UserError naming missing, unexpected and misshapen keys, and those with values that cannot be weights.
    """
    expected = module.state_dict()
    shapes = {key: list(getattr(value, "shape", [type(value).__name__])) for key, value in state_dict.items()}
    wrong = {
        "missing": sorted(expected.keys() - state_dict.keys()),
        "unexpected": sorted(state_dict.keys() - expected.keys()),
        "of another shape": [
            f"{key} ({shapes[key]}, expected {list(expected[key].shape)})"
            for key in sorted(state_dict.keys() & expected.keys())
            if shapes[key] != list(expected[key].shape)
        ],
    }
    if any(wrong.values()):
        details = "; ".join(f"{len(keys)} {fault}: {', '.join(keys[:5])}" for fault, keys in wrong.items() if keys)
        raise UserError(f"The weights in {source!r} do not fit the model ({details}). {remedy}.")
    check_values(state_dict, expected, source)
    module.load_state_dict(state_dict)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that `load_state_dict` would turn into weights without a word.

    Args:
        weights: what is to be loaded.
        expected: tensors with the same keys and shapes that they are to be copied to.
        source: where they are from, for messages.

    Raises: UserError naming integers, complex numbers, sparse or quantised tensors, and values that are not finite.
    """
    unfit = [
        f"{key} ({kind})" for key, value in weights.items() if (kind := _unfit_kind(value, expected[key])) is not None
    ]
    if unfit:
        raise UserError(
            f"The weights in {source!r} cannot be used as they are: {_listing(unfit)}. Convert them to ordinary "
            "floating-point tensors, or give another file"
        )
    if problem := not_finite((key, value.to(expected[key].dtype)) for key, value in weights.items()):
        raise UserError(f"The weights in {source!r} are not all finite: {problem}. Give another file")


def _listing(problems: list[str]) -> str:
    return ", ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")


def _unfit_kind(value: Tensor, wanted: Tensor) -> str | None:
    if value.is_meta and not wanted.is_meta:
        return "without values, on the device meta"
    if value.is_quantized:
        return "quantised"
    if value.is_nested or value.layout is not torch.strided:
        return "nested" if value.is_nested else "sparse"
    fits = value.dtype in FLOATS if wanted.dtype in FLOATS else value.dtype == wanted.dtype
    return None if fits else str(value.dtype).removeprefix("torch.")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Which floating-point tensors have NaN or infinite values, and how many; None if all are finite."""
    problems = []
    for key, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not torch.linalg.vector_norm(tensor).isfinite():  # much faster, but may overflow
            count = tensor.numel() - int(tensor.isfinite().sum())
            problems += [f"{key} ({count} of {tensor.numel()} values)"] if count else []
    return _listing(problems) or None


# The Hugging Face Hub. A model class gets the methods of huggingface_hub's mixin only where they are used.


@dataclass(frozen=True)
class CardText:
    """What a class of models says on its model card."""

    method: str
    """What pretrained it."""
    tag: str
    """The same as a tag of the hub."""
    files: str
    """Which files of this repository it needs, as a list in words."""
    module: str
    """Where the class is imported from."""
    about: str
    """A paragraph; {parameters} in millions, {width}, {depth}, {patch} and {registers} are filled in."""
    citation: str
    """BibTeX."""


HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token")


def with_hub_methods(model: Any) -> Any:
    """A model that shares the weights of `model` and whose hub methods are those of huggingface_hub."""
    with torch.device("meta"):
        twin = _hub_class(type(model))(**model.arguments)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def load_from_hub(model_class: Any, name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """Build a model of `model_class` from a folder or a repository of the hub: its `from_pretrained`."""
    hub_class = _hub_class(model_class)
    _hub_file(name_or_path, "config.json", {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    try:
        return hub_class.from_pretrained(name_or_path, **kwargs)
    except TypeError as error:
        raise UserError(
            f"from_pretrained({name_or_path!r}): config.json, or an argument, does not describe the model: {error}"
        ) from error


@functools.cache
def _hub_class(model_class: Any) -> Any:
    try:
        from huggingface_hub import ModelCard, PyTorchModelHubMixin
    except ImportError as error:
        raise UserError("The Hugging Face Hub needs a package: pip install huggingface_hub safetensors") from error
    mixin: Any = PyTorchModelHubMixin

    class HubModel(mixin, model_class):
        @classmethod
        def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **kwargs: Any) -> Any:
            file = _hub_file(model_id, "model.safetensors", {name: kwargs.pop(name) for name in HUB_ARGUMENTS})
            with torch.device("meta"):
                model = model_class(**kwargs)
            model.to_empty(device=map_location)
            load_backbone_weights(model, read_state_dict(file, key="from_pretrained"), model_id)
            return model.eval()

        def _save_pretrained(self, save_directory: Path) -> None:
            if problem := not_finite(self.state_dict().items()):
                raise UserError(f"The model is not saved: its weights are not all finite: {problem}")
            save_safetensors(self.state_dict(), save_directory / "model.safetensors", {"format": "pt"})

        def generate_model_card(self, *, name: str, license: str = "apache-2.0", training: str = "") -> Any:  # noqa: A002  # the hub's word
            said = model_class.card_text
            sizes = {
                "parameters": sum(p.numel() for p in self.parameters()) / 1e6,
                "width": self.embed_dim,
                "depth": self.n_blocks,
                "patch": self.patch_size,
                "registers": self.n_registers,
            }
            text = MODEL_CARD.format(
                name=name,
                license=license,
                training=training,
                library="capi",
                model_class=model_class.__name__,
                channels=self.in_chans,
                normalisation=_normalisation_words(self.normalisation),
                size=16 * self.patch_size,
                **sizes,
                **vars(said) | {"about": said.about.format(**sizes)},
            )
            return ModelCard(re.sub(r"\n{3,}", "\n\n", text))

    return HubModel


def _normalisation_words(normalisation: Normalisation) -> str:
    if normalisation.value_range is None and len(normalisation.mean) == 3:
        numbers = (", ".join(f"{x:g}" for x in each) for each in (normalisation.mean, normalisation.std))
        return "RGB in [0, 1], minus ({}), divided by ({})".format(*numbers)
    return f"What `model.normalisation(values)` makes of stored values: {normalisation.describe()}"


def _hub_file(name_or_path: str, file: str, kwargs: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    if Path(name_or_path).is_dir():
        path = Path(name_or_path, file)
        if not path.is_file():
            raise UserError(f"from_pretrained({name_or_path!r}): the folder has no {file}; save_pretrained writes one")
        return path
    try:
        return Path(hf_hub_download(name_or_path, file, **kwargs))
    except (OSError, ValueError) as error:  # unreachable, unknown, private; or no name at all
        raise UserError(
            f"from_pretrained({name_or_path!r}): there is no such folder, and {file} could not be had from the Hugging "
            f"Face Hub: {_first_sentence(error)}"
        ) from error


MODEL_CARD = """\
---
license: {license}
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- {tag}
- self-supervised-learning
- model_hub_mixin
- pytorch_model_hub_mixin
---

# {method} features: {name}

{about}

{training}

## Use

With {files} of the code that wrote this, and
`pip install torch huggingface_hub safetensors`:

```python
import torch
from {module} import {model_class}

model = {model_class}.from_pretrained("{name}")
# {normalisation}
images = torch.zeros(1, {channels}, {size}, {size})
with torch.no_grad():
    global_repr, registers, feature_map = model(images)  # [b, d], [b, registers, d], [b, rows, columns, d]
```

Both sides of the images must be multiples of {patch}. `global_repr` stands for the whole image, `feature_map` for its
patches.

## Licence

The weights: {license}.

## Citation

```bibtex
{citation}
```
"""
"""What `save_pretrained` and `push_to_hub` write beside the weights, for those who find them on the hub."""
