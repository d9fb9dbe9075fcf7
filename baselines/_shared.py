"""What the loaders of published backbones share: names, files, strict loading, position tables, outputs.

A loader builds the architecture with a library, hands its file to `load_published`, and wraps the network so that
`forward(images [b, 3, H, W])` returns (global [b, d], registers [b, k, d] or None, feature map [b, h, w, d]).
"""

import argparse
import importlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model import patch_grid, resize_positions
from utils import UserError, did_you_mean
from weights import load_strictly, read_state_dict

Grid = tuple[int, int]  # rows and columns of patches
Output = tuple[Tensor, Tensor | None, Tensor]
StateDict = dict[str, Tensor]
Entry = TypeVar("Entry")

logger = logging.getLogger("baselines")


# ---------------------------------------------------------------------------------------- names and libraries


def look_up(model_name: str, models: Mapping[str, Entry]) -> Entry:
    """The entry of a model name, whatever its case. Raises: UserError that lists the names and suggests one."""
    by_lower = {name.lower(): entry for name, entry in models.items()}
    if model_name.lower() in by_lower:
        return by_lower[model_name.lower()]
    hint = did_you_mean(model_name, models)
    all_names = f" (it has {', '.join(models)})" if hint.startswith("; did you mean") else ""
    raise UserError(f"model_name={model_name!r} is unknown to this loader{hint}{all_names}")


def library(name: str, user: str = "This baseline") -> Any:
    """Import an optional package. Raises: UserError that says how to install it, and what needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = f"in {str(Path(__file__).parent.parent)!r}: pip install -c constraints.txt -e '.[baselines]'"
        raise UserError(f"{user} needs {name} ({error}); {remedy}") from error


def create_vit(architecture: str, **kwargs: Any) -> nn.Module:
    """A timm transformer with random weights that takes any image size and returns all tokens, without a head."""
    vit = library("timm").create_model(architecture, pretrained=False, num_classes=0, global_pool="", **kwargs)
    if hasattr(vit.patch_embed, "strict_img_size"):
        vit.patch_embed.strict_img_size = False
    return vit


# ---------------------------------------------------------------------------------------- published files


def weights_source(
    url: str | None, pretrained_weights: str | Path | None, pretrained: bool, how_to_get: str = ""
) -> str | None:
    """What to read: the user's file or address, else the published one, or None for random weights.

    Raises: UserError if nothing can be downloaded; `how_to_get` says where the file is.
    """
    if pretrained_weights is not None:
        return str(pretrained_weights)
    if pretrained and url is None:
        raise UserError(
            f"There is no address to download this file from: {how_to_get}. Get it by hand and give "
            "model_loader_kwargs.pretrained_weights=<path>, or model_loader_kwargs.pretrained=false for random weights"
        )
    return url if pretrained else None


EXPORTED = "backbone."
"""What keys of the encoder begin with in an export of a training here."""


def load_published(
    network: nn.Module,
    source: str | None,
    *,
    path: tuple[str, ...] = (),
    prefix: str = "",
    drop: tuple[str, ...] = (),
    rename: Callable[[StateDict], StateDict] | None = None,
    exports: bool = False,
) -> None:
    """Copy a published file into `network`: every tensor finds its place and every place its tensor.

    Args:
        network: filled in place.
        source: path or URL; None leaves the random weights.
        path: keys to follow from what the file holds to its state dict.
        prefix: removed from the keys.
        drop: beginnings of the keys, before the prefix is removed, that belong to no part of the backbone.
        rename: turns the file's state dict into the network's.
        exports: whether it may also be an export of a training here, whose keys are those after `EXPORTED`.

    Raises: UserError if the file cannot be read, or naming the keys that are missing, unexpected or misshapen.
    """
    if source is None:
        return
    # Training scripts of the time stored their options beside the weights. A Namespace is a bag of values, no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: Any = read_state_dict(source)
    if exports and any(key.startswith(EXPORTED) for key in state):
        state, path, prefix = {key: x for key, x in state.items() if key.startswith(EXPORTED)}, (), EXPORTED
    for depth, level in enumerate(path):
        if not isinstance(state, Mapping) or level not in state:
            entries = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
            raise UserError(f"{source!r} has no entry {'.'.join(path[: depth + 1])!r}; it has: {entries}")
        state = state[level]
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{source!r} has no state dict at {'.'.join(path)!r}, but a {type(state).__name__}")
    state = {key.removeprefix(prefix): value for key, value in state.items() if not key.startswith(drop)}
    state = state if rename is None else rename(state)
    load_strictly(network, state, source, remedy="Give the file that was published for this model")


def rename_keys(state: StateDict, *rules: tuple[str, str]) -> StateDict:
    """Apply regular-expression replacements, in order, to all keys."""
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


# ---------------------------------------------------------------------------------------- positions


def resize_like_dino(table: Float[Tensor, "1 n d"], grid: Grid) -> Float[Tensor, "1 n2 d"]:
    """The rule of DINO, iBOT and DINOv2 without registers: scaled by (n + 0.1) / side, not antialiased."""
    return resize_positions(table, grid, antialias=False, offset=0.1)


def resize_antialiased(table: Float[Tensor, "1 n d"], grid: Grid) -> Float[Tensor, "1 n2 d"]:
    """The rule of MAE, data2vec 2.0, DINOv2 with registers, and timm."""
    return resize_positions(table, grid, antialias=True)


def resize_plainly(table: Float[Tensor, "1 n d"], grid: Grid) -> Float[Tensor, "1 n2 d"]:
    """The rule of I-JEPA: to the size asked for, not antialiased."""
    return resize_positions(table, grid, antialias=False)


# ---------------------------------------------------------------------------------------- outputs


def split_tokens(
    tokens: Float[Tensor, "b t d"], grid: Grid, *, class_token: bool = True, num_registers: int | None = None
) -> Output:
    """Class token, registers and patches, in this order, as (global, registers, feature map).

    Args:
        tokens: the network's last layer.
        grid: rows and columns of patches.
        class_token: whether there is one; else the global output is the mean of the patch tokens.
        num_registers: 0 gives an empty tensor and None gives None, for families that know no registers.
    """
    num_prefix = int(class_token) + (num_registers or 0)
    prefix, patches = tokens.split([num_prefix, grid[0] * grid[1]], dim=1)
    global_repr = prefix[:, 0] if class_token else patches.mean(dim=1)
    registers = None if num_registers is None else prefix[:, int(class_token) :]
    return global_repr, registers, patches.unflatten(1, grid)


class PatchFeatures(nn.Module):
    """A network that maps images to all tokens of its last layer, behind the contract of the evaluations.

    Args:
        network: built by `create_vit`.
        patch_size: pixels.
        positions: the family's rule that makes the table for a grid from `network.pos_embed`; None if the network
            has its own way with other image sizes.
        is_formula: whether that table is of sines and cosines, which no training changes; it becomes a buffer.
        class_token: as in `split_tokens`.
        num_registers: as in `split_tokens`.
        published_grid: for families that were published for one image size only, and say nothing about others.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: int,
        positions: Callable[[Tensor, Grid], Tensor] | None = None,
        *,
        is_formula: bool = False,
        class_token: bool = True,
        num_registers: int | None = None,
        published_grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.network, self.patch_size, self.positions = network, patch_size, positions
        self.class_token, self.num_registers = class_token, num_registers
        self.known_grids = None if published_grid is None else {published_grid}
        if is_formula:
            table: Any = network.pos_embed
            del network.pos_embed
            network.register_buffer("pos_embed", table.detach())

    def forward(self, images: Float[Tensor, "b c h w"]) -> Output:
        """Features of normalised images; both sides must be multiples of the patch size."""
        grid = patch_grid(images, self.patch_size)
        if self.known_grids is not None and grid not in self.known_grids:
            self.known_grids.add(grid)  # say it once
            logger.warning(
                "This model was published for one image size only; for %dx%d its positions are resized by a rule of "
                "this repository",
                *images.shape[-2:],
            )
        table: Any = None if self.positions is None else self.network.pos_embed
        replaced = {} if self.positions is None else {"pos_embed": self.positions(table, grid)}
        tokens = torch.func.functional_call(self.network, replaced, (images,))
        return split_tokens(tokens, grid, class_token=self.class_token, num_registers=self.num_registers)

    def get_intermediate_layers(
        self, x: Float[Tensor, "b c h w"], n: int = 1, reshape: bool = False, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Patch tokens after each of the `n` last blocks, first block first, called as DINOv2's method of that name.

        Args:
            x: normalised images; both sides must be multiples of the patch size.
            n: how many blocks.
            reshape: `[b, d, rows, columns]` instead of `[b, patches, d]`.
            norm: put the tokens through the final norm, as `forward` does.

        Raises: UserError if there are fewer blocks, or if they have other tokens than the network returns.
        """
        network: Any = self.network
        blocks = list(network.blocks)
        if not 0 < n <= len(blocks):
            raise UserError(f"n={n}: the network has {len(blocks)} blocks")
        outputs: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in blocks[-n:]]
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        grid = patch_grid(x, self.patch_size)
        num_tokens = int(self.class_token) + (self.num_registers or 0) + grid[0] * grid[1]
        if any(out.shape[1] != num_tokens for out in outputs):  # as in XCiT, whose class token comes after the blocks
            raise UserError("blocks of this network do not hold the tokens that it returns; choose another model")
        tokens = [network.norm(out) if norm else out for out in outputs]
        maps = [
            split_tokens(t, grid, class_token=self.class_token, num_registers=self.num_registers)[2] for t in tokens
        ]
        return tuple(x.movedim(-1, 1) if reshape else x.flatten(1, 2) for x in maps)
