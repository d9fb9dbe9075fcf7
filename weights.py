"""Weights of models: reading and downloading files of them, and the Hugging Face Hub. Needs torch alone.

Nothing here executes what a file contains. huggingface_hub and safetensors are imported where they are used.
"""

import contextlib
import functools
import hashlib
import http.client
import pickle
import pickletools
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import UserError


def read_state_dict(
    path_or_url: str | Path, *, sha256: str | None = None, key: str = "pretrained_weights"
) -> dict[str, Any]:
    """Read the dict that a `.pth` or `.safetensors` file holds, without executing anything the file may contain.

    Objects besides tensors and plain Python values are refused. To read a trusted old file that has some, name them:
    `with torch.serialization.safe_globals([argparse.Namespace]): read_state_dict(...)`.

    Args:
        path_or_url: a file; or an address, downloaded once into torch's hub folder (`TORCH_HOME` moves it).
        sha256: what the file must hash to; None checks nothing.
        key: argument or config key by which the user gave the file, for messages.

    Raises: UserError if the file is missing, unreachable, damaged, another one than `sha256` says, or refused.
    """
    address = str(path_or_url)
    if address.startswith("file://"):
        address = urllib.request.url2pathname(urllib.parse.urlsplit(address).path)
    path = Path(address)
    if "://" in address:
        path = _cached_path(address)
        if not path.is_file():
            _download(address, path, sha256, key)
        again = f"delete {str(path)!r} to have it downloaded again"
    else:
        again = "get it again"
        if not path.is_file():
            raise UserError(f"{key}={address!r}: there is no such file")
    if sha256 is not None and (actual := _sha256(path)) != sha256.lower():
        raise UserError(f"{key}: {str(path)!r} has sha256 {actual} instead of {sha256}: damaged or changed; {again}")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pth
    loaded = read(path, key, again)
    if not isinstance(loaded, dict):
        raise UserError(
            f"{key}: {str(path)!r} holds a {type(loaded).__name__}, not a dict of tensors; give another file"
        )
    return loaded


def _cached_path(url: str) -> Path:
    """Where a download is kept. Host and folders are part of it: many files on the web are called model.safetensors."""
    parts = urllib.parse.urlsplit(url)
    folders = [part for part in urllib.parse.unquote(parts.path).split("/") if part not in ("", ".", "..")]
    name = folders.pop() if folders else "weights"
    if parts.query:
        name = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{name}"
    return Path(torch.hub.get_dir(), "checkpoints", parts.netloc.replace(":", "_"), *folders, name)


def _download(url: str, path: Path, sha256: str | None, key: str) -> None:
    """Fetch `url` into `path`, which appears once it is complete and has the right hash."""
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(path.with_name(f".lock-{path.name}")):
            if path.is_file():  # another process was faster
                return
            actual = _fetch(url, temporary)
            if sha256 is not None and actual != sha256.lower():
                raise UserError(
                    f"{key}: {url} has sha256 {actual} instead of {sha256}: another file, or damaged on the way"
                )
            temporary.replace(path)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"{key}: {url} could not be downloaded: {error}. Without a connection, place the file by hand as "
            f"{str(path)!r}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _one_process_at_a_time(lock: Path) -> Iterator[None]:
    """The ranks of a machine want the same file at the same time. No lock where the system has none of that kind."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, path: Path) -> str:
    """Download with a progress bar; returns the sha256. Raises OSError if the connection ends early."""
    request = urllib.request.Request(url, headers={"User-Agent": "capi"})
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=60) as response, path.open("wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        progress_bar: Any = torch.hub.tqdm  # pyright: ignore[reportPrivateImportUsage]  # or a plain counter without tqdm
        with progress_bar(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=url.rsplit("/", 1)[-1]
        ) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path, key: str, again: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{key}: reading {str(path)!r} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {error}; {again}") from error


def _read_pth(path: Path, key: str, again: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error))
        remedy = "Use a file from another source, best as .safetensors"
        if names and "is blocked" not in str(error):
            if zipfile.is_zipfile(path):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path) or names  # all of them
            remedy += (
                ". Old training files (.pth.tar) may hold options or counters beside the weights: only if you trust"
                " where this one is from, allow what you know to be harmless, "
                f"with torch.serialization.safe_globals([{', '.join(names)}]): ..."
            )
        names = names or _pickled_names(path)
        if not names:
            raise UserError(f"{key}: {str(path)!r} is no file of weights, or damaged; {again}") from error
        raise UserError(
            f"{key}: {str(path)!r} is refused: it holds more than weights, and reading it would execute "
            f"{', '.join(names)}. {remedy}"
        ) from error
    except EOFError as error:
        raise UserError(f"{key}: {str(path)!r} ends too early; {again}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {_first_sentence(error)}; {again}") from error


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
    """`safetensors.torch.save_file`, but others may read the file as they may any new one; it forbids them."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def backbone_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries under `backbone.`, without that prefix; all of them if none has it."""
    prefix = "backbone."
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return own or dict(state_dict)


def load_backbone_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy the `backbone.` part of a state dict (or all of it if there is no such prefix) into `model`, exactly.

    Raises: UserError naming missing, unexpected and misshapen keys.
    """
    own = backbone_part(state_dict)
    expected = model.state_dict()
    wrong = {
        "missing": sorted(expected.keys() - own.keys()),
        "unexpected": sorted(own.keys() - expected.keys()),
        "of another shape": [
            f"{key} ({list(own[key].shape)}, expected {list(expected[key].shape)})"
            for key in sorted(own.keys() & expected.keys())
            if own[key].shape != expected[key].shape
        ],
    }
    if any(wrong.values()):
        details = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in wrong.items() if keys)
        raise UserError(
            f"The weights in {source!r} do not fit the model ({details}). Give the config they were trained with."
        )
    model.load_state_dict(own)


# The Hugging Face Hub. A model class gets the methods of huggingface_hub's mixin only where they are used.

HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token")

MODEL_CARD = """\
---
license: {license}
library_name: capi
pipeline_tag: image-feature-extraction
tags:
- capi
- self-supervised-learning
- model_hub_mixin
- pytorch_model_hub_mixin
---

# CAPI features: {name}

A vision transformer of {parameters:.0f}M parameters (with its predictor), width {width}, {depth} blocks, patches of
{patch} pixels and {registers} registers, pretrained without labels by CAPI, *Cluster and Predict Latent Patches for
Improved Masked Image Modeling* ([arXiv:2502.08769](https://arxiv.org/abs/2502.08769)): a teacher clusters its patch
features, and a student predicts the clusters of hidden patches.

{training}

## Use

With `model.py`, `weights.py` and `utils.py` of the code that wrote this, and
`pip install torch huggingface_hub safetensors`:

```python
import torch
from model import EncoderDecoder

model = EncoderDecoder.from_pretrained("{name}")
# RGB in [0, 1], minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)
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
@article{{darcet2025capi,
  title   = {{Cluster and Predict Latent Patches for Improved Masked Image Modeling}},
  author  = {{Darcet, Timoth{{\\'e}}e and Baldassarre, Federico and Oquab, Maxime and Mairal, Julien and
             Bojanowski, Piotr}},
  journal = {{Transactions on Machine Learning Research}},
  year    = {{2025}}
}}
```
"""


def with_hub_methods(model: Any) -> Any:
    """An `EncoderDecoder` that shares the weights of `model` and whose hub methods are those of huggingface_hub."""
    with torch.device("meta"):
        twin = _hub_class(type(model))(**model.arguments)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def load_from_hub(model_class: Any, name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """What `EncoderDecoder.from_pretrained` does; see there."""
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
            save_safetensors(self.state_dict(), save_directory / "model.safetensors", {"format": "pt"})

        def generate_model_card(self, *, name: str, license: str = "apache-2.0", training: str = "") -> Any:  # noqa: A002  # the hub's word
            text = MODEL_CARD.format(
                name=name,
                license=license,
                training=training,
                parameters=sum(p.numel() for p in self.parameters()) / 1e6,
                width=self.embed_dim,
                depth=self.n_blocks,
                patch=self.patch_size,
                registers=self.n_registers,
                channels=self.in_chans,
                size=16 * self.patch_size,
            )
            return ModelCard(re.sub(r"\n{3,}", "\n\n", text))

    return HubModel


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
