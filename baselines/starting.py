"""Encoders that others publish, as the beginning of a training: MAE, DINOv2, DINOv3, and other ViTs of their layout.

`read` gives the tensors of a file common names, `fit` makes of them the weights of an encoder here and says what was
done to which part. What an encoder has no place for is not always lost:

- layer scale is multiplied into the projection before it, where the encoder has none;
- a bias of keys shifts all scores of a query alike, so without rotary positions it does nothing;
- tables of positions are resized by the rule of the file's authors, and are part of the weights here too;
- rotary frequencies are weights here, and only differences of positions count: those of DINOv3, which has the distance
  between two of n patches as 2 / n where it is 1 / (n - 1) here, are scaled by 2 (n - 1) / n, for one n.

So an encoder with class token and table computes what MAE's and DINOv2's (without registers) do, one with a table alone
what such a ViT without class token does, and one with rotary positions, LayerNorm, all biases, and registers at the
centre what DINOv3's does, all at the size of images that is trained on. Others start near it; the log says what is
missing.
"""

import argparse
import itertools
import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from baselines._shared import Grid, StateDict, library, resize_antialiased, resize_like_dino
from model import position_grid
from utils import UserError
from weights import check_values, local_path, read_state_dict, spread_over_bands

logger = logging.getLogger("baselines")

END = r"\.(weight|bias)"
LAYER = r"(?:encoder\.|model\.)?layers?\.(\d+)\."
COMMON_NAMES = {
    "authors of MAE, DINOv2 and DINOv3, and timm": (
        (r"(cls_token|pos_embed)", r"\1"),
        (r"register_tokens|storage_tokens|reg_token", "registers"),
        (r"patch_embed\.proj" + END, r"patch_embed.proj.\1"),
        (r"blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])" + END, r"blocks.\1.\2.\3"),
        (r"blocks\.(\d+)\.attn\.qkv\.bias_mask", r"blocks.\1.attn.qkv.bias_mask"),
        (r"blocks\.(\d+)\.attn\.([qkv])_bias", r"blocks.\1.attn.\2.bias"),
        (r"blocks\.(\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?", r"blocks.\1.gamma_\2"),
        (r"(?:fc_)?norm" + END, r"norm.\1"),
        (r"rope_embed\.periods", "periods"),
        (r"mask_token|decoder_.*|head\..*", ""),
    ),
    "transformers": (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "registers"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings(?:\.projection)?" + END, r"patch_embed.proj.\1"),
        (LAYER + r"(?:norm1|layernorm_before)" + END, r"blocks.\1.norm1.\2"),
        (LAYER + r"(?:norm2|layernorm_after)" + END, r"blocks.\1.norm2.\2"),
        (LAYER + r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)" + END, r"blocks.\1.attn.\2.\3"),
        (LAYER + r"attention\.(?:output\.dense|o_proj)" + END, r"blocks.\1.attn.proj.\2"),
        (LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)" + END, r"blocks.\1.mlp.fc1.\2"),
        (LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.down_proj)" + END, r"blocks.\1.mlp.fc2.\2"),
        (LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
        (r"layernorm" + END, r"norm.\1"),
        (r"embeddings\.mask_token|decoder\..*|(?:classifier|pooler)\..*", ""),
    ),
    "CAPI": (
        (r"registers", "registers"),
        (r"patch_embed" + END, r"patch_embed.proj.\1"),
        (r"encoder\.blocks\.(\d+)\.residual([12])\.norm" + END, r"blocks.\1.norm\2.\3"),
        (r"encoder\.blocks\.(\d+)\.residual1\.fn\.([qkv])_proj" + END, r"blocks.\1.attn.\2.\3"),
        (r"encoder\.blocks\.(\d+)\.residual1\.fn\.proj" + END, r"blocks.\1.attn.proj.\2"),
        (r"encoder\.blocks\.(\d+)\.residual2\.fn\.(fc[12])" + END, r"blocks.\1.mlp.\2.\3"),
        (r"encoder\.blocks\.(\d+)\.residual1\.fn\.rope\.freqs", r"blocks.\1.freqs"),
        (r"enc_norm" + END, r"norm.\1"),
    ),
}
"""Regular expressions for all of a key, and the common name; "" is no part of an encoder. Those of I-JEPA and CAE are
timm's."""
PUBLISHED = [layout for layout in COMMON_NAMES if layout != "CAPI"]
BLOCK_PARTS = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
DROPPED = {
    "norm.": "the weights of the final norm",
    "norm": "biases of the norms",
    "attn": "biases of attention",
    "mlp": "biases of the MLPs",
}
"""What the log calls weights that an encoder has no place for, by the beginning of their names."""
TO_RMS = "LayerNorm to RMSNorm"
PREFIX = re.compile(r"^(?:module|vit|dinov2|dinov2_with_registers|dinov3_vit)\.")
GATED = re.compile(r".*\.mlp\.(?:w1|w2|w3|w12|gate_proj|fc1_[gx]|weights_in)\..*")
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
"""Attention heads of the ViTs that MAE, DINOv2 and DINOv3 publish, by width; DINOv3's file tells its own."""
BASE = 100.0
"""Of DINOv3's rotary frequencies."""
VIT_KEYS = ("model.embed_dim", "model.depth", "model.num_heads", "model.mlp_dim")


@dataclass(frozen=True)
class PublishedViT:
    """An encoder out of a file."""

    source: str
    weights: StateDict
    """By common names, in float32; queries, keys and values apart."""
    num_heads: int | None
    """None if neither the file nor a config.json beside it tells them."""
    rope_base: float

    @property
    def family(self) -> str:
        """Whose layout it has."""
        if "pos_embed" not in self.weights:
            return "DINOv3"
        return "DINOv2" if "blocks.0.gamma_1" in self.weights else "MAE"

    @property
    def width(self) -> int:
        """Channels of a token."""
        return len(self.weights["patch_embed.proj.weight"])

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return _depth(self.weights)

    @property
    def patch_size(self) -> int:
        """Pixels."""
        return self.weights["patch_embed.proj.weight"].shape[-1]

    def positions(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The class token's row and those of a grid of patches, resized by the rule of the authors.

        Raises: UserError if the table is of no square.
        """
        table = self.weights["pos_embed"]
        side = math.isqrt(table.shape[1])
        if table.shape[1] - side**2 not in (0, 1):
            raise UserError(f"train.init_from={self.source!r}: its {table.shape[1]} positions are those of no square")
        class_row, patches = table.split([table.shape[1] - side**2, side**2], dim=1)
        is_first_dinov2 = self.family == "DINOv2" and "registers" not in self.weights
        resize = resize_like_dino if is_first_dinov2 else resize_antialiased
        return class_row, resize(patches, grid)

    def rotary_frequencies(self, head_dim: int, grid: Grid) -> Tensor:
        """DINOv3's, [2, head_dim], as `model.RotaryEmbedding` has them, for a grid of patches."""
        periods = self.weights.get("periods")
        if periods is None:
            periods = self.rope_base ** (torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        down, across = (2 * math.pi / periods.double() * 2 * (n - 1) / n for n in grid)
        none = torch.zeros_like(down)
        return torch.stack([torch.cat([down, none] * 2), torch.cat([none, across] * 2)]).float()


def read_file(path_or_url: str) -> dict[str, Any]:
    """What the file of `train.init_from` holds; options of a training, a bag of values, may be beside the weights.

    Raises: UserError as `weights.read_state_dict`.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return read_state_dict(path_or_url, key="train.init_from")


def read(file: Mapping[str, Any], source: str, encoder: nn.Module) -> PublishedViT | None:
    """The encoder of another method in a file; None if it holds none, or has the very keys of `encoder`.

    Args:
        file: what was read: weights, or a dict with them at `model` or `state_dict`.
        source: where it is from.
        encoder: the one that is to begin with it.

    Raises: UserError for a ViT with parts that no encoder here has or without some of its own, naming them, or with
        values that are no weights.
    """
    for level in ("model", "state_dict"):
        file = file[level] if isinstance(file.get(level), Mapping) else file
    tensors = {PREFIX.sub("", key): value for key, value in file.items()}
    is_ours = tensors.keys() == encoder.state_dict().keys()
    if is_ours or "patch_embed.proj.weight" not in {common_name(key, PUBLISHED) for key in tensors}:
        return None
    begin = f"train.init_from={source!r}"
    if gated := [key for key in tensors if GATED.fullmatch(key)]:
        raise UserError(
            f"{begin}: its MLPs are gated ({gated[0]}), and those of no encoder here are; give a smaller model of "
            "that family"
        )
    unknown = [key for key, x in tensors.items() if common_name(key, PUBLISHED) is None or not isinstance(x, Tensor)]
    if unknown:
        raise UserError(
            f"{begin} holds a vision transformer with parts that no encoder here has: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}; give a plain one, such as MAE, DINOv2, DINOv3 or an export"
        )
    named = {name: x for key, x in tensors.items() if (name := common_name(key, PUBLISHED)) and x.numel()}
    check_values(named, dict.fromkeys(named, torch.empty(0)), source)
    weights = _apart({name: x.float() for name, x in named.items()})
    needed = {f"blocks.{i}.{part}.weight" for i in range(_depth(weights)) for part in BLOCK_PARTS}
    if "pos_embed" not in weights:  # rotary positions have no weights, and come with a class token
        needed.add("cls_token")
    if missing := sorted(needed - weights.keys()):
        raise UserError(f"{begin} is incomplete: it has no {', '.join(missing[:5])}; get it again, or another file")
    width, hidden = (len(weights[name]) for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"))
    if misshapen := [
        f"{name} {list(x.shape)}" for name, x in weights.items() if not _has_shape(name, x, width, hidden)
    ]:
        raise UserError(
            f"{begin}: shapes as in no plain vision transformer of width {width}: {', '.join(misshapen[:5])}; get it "
            "again, or another file"
        )
    beside = _config_beside(source)
    heads, base = beside.get("num_attention_heads"), beside.get("rope_theta", BASE)
    if not isinstance(heads, int | None) or not isinstance(base, int | float) or base <= 1:
        raise UserError(
            f"{begin}: the config.json beside it has num_attention_heads={heads!r} and rope_theta={base!r}; correct it"
        )
    if heads is None and "periods" in weights:
        heads = width // (4 * len(weights["periods"]))
    return PublishedViT(source, weights, heads, float(base))


def common_name(key: str, layouts: Collection[str] | None = None) -> str | None:
    """The common name of a key; "" for what is no part of an encoder, None if none of these layouts (or all) has it."""
    for pattern, name in itertools.chain(*(COMMON_NAMES[layout] for layout in layouts or COMMON_NAMES)):
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


def _depth(weights: StateDict) -> int:
    return max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=0) + 1


def _has_shape(name: str, x: Tensor, width: int, hidden: int) -> bool:
    part, kind = _part(name), name.rpartition(".")[2]
    if part == "patch_embed.proj.weight":
        return x.ndim == 4 and x.shape[2] == x.shape[3]
    if part in ("cls_token", "registers", "pos_embed"):
        return x.ndim == 3 and x.shape[::2] == (1, width)
    if part == "periods":
        return x.ndim == 1
    sides = (
        (width, hidden) if part.startswith("mlp.fc2") else (hidden, width) if part.startswith("mlp") else (width,) * 2
    )
    return x.shape == (sides if kind == "weight" and "norm" not in part else sides[:1])


def _apart(weights: StateDict) -> StateDict:
    """Queries, keys and values apart, without the biases of keys that are masked."""
    apart: StateDict = {}
    for name, x in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".attn.qkv") and kind != "bias_mask":
            thirds = zip("qkv", x.tensor_split(3), strict=True)
            apart |= {f"{stem.removesuffix('qkv')}{part}.{kind}": third for part, third in thirds}
        elif kind != "bias_mask":
            apart[name] = x
    masked = {name.replace("qkv.bias_mask", "k.bias") for name in weights if name.endswith("bias_mask")}
    return {name: x for name, x in apart.items() if name not in masked}


def _config_beside(source: str) -> dict[str, Any]:
    """What transformers writes beside weights."""
    path = local_path(source).with_name("config.json")
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"train.init_from={source!r}: {str(path)!r} beside it cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


# ---------------------------------------------------------------------------------------- into an encoder here


@dataclass
class Report:
    """What became of the parts of a file, in words."""

    taken: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    """Changed, with the same result."""
    changed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether the encoder computes what the file's does."""
        return not (self.changed or self.dropped or self.fresh)

    def lines(self) -> list[str]:
        """For the log."""
        kinds = {
            "taken": self.taken,
            "changed without effect": self.same,
            "changed": self.changed,
            "dropped": self.dropped,
            "not in the file": self.fresh,
        }
        return [f"{kind}: {'; '.join(parts)}" for kind, parts in kinds.items() if parts]


def fit(
    vit: PublishedViT,
    encoder: Any,
    *,
    grid: Grid,
    keys: tuple[str, str, str, str | None] = VIT_KEYS,
    hint: str = "",
    say: bool = True,
) -> StateDict:
    """Weights for all of an encoder's state dict: what the file has, and for the rest those that are there.

    Args:
        vit: what `read` gave.
        encoder: a `model.Backbone`, with fresh weights.
        grid: rows and columns of patches of the images that it is trained on.
        keys: configuration keys of width, blocks, heads and hidden channels; None for one that follows from the others.
        hint: how to keep what an encoder of this kind drops.
        say: tell the log what became of each part.

    Raises: UserError if the sizes differ, with the overrides to type.
    """
    own = {key: x.cpu() for key, x in encoder.state_dict().items()}
    names = {key: name for key in own if (name := common_name(key))}
    parts = {_part(name) for name in names.values()}
    _check_sizes(vit, encoder, keys)
    report = Report([f"{vit.depth} blocks"])
    weights = {name: x for name, x in vit.weights.items() if name != "periods"}
    _fit_patches(weights, vit, encoder, report)
    _fit_layer_scale(weights, vit, parts, report)
    _fit_positions(weights, vit, encoder, parts, grid, report)
    _fit_tokens(weights, vit, encoder, own, report)
    _fit_norms_and_biases(weights, encoder, parts, report)
    if say:
        _tell(vit, report, [n * encoder.patch_size for n in grid], hint)
    return own | spread_over_bands({key: _made(weights, name, own[key]) for key, name in names.items()}, encoder)


def _counted(registers: int) -> str:
    return f"{registers} register{'s' if registers != 1 else ''}"


def _crossed(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _part(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def _made(weights: StateDict, name: str, fresh: Tensor) -> Tensor:
    """The weights of a common name; where the file has none, a bias is 0 and the rest as it is."""
    stem, _, kind = name.rpartition(".")
    if stem.endswith(".attn.qkv"):
        thirds = zip((stem.removesuffix("qkv") + part for part in "qkv"), fresh.chunk(3), strict=True)
        return torch.cat([_made(weights, f"{third}.{kind}", x) for third, x in thirds])
    is_bias = kind == "bias" and stem != "norm"
    return weights.get(name, torch.zeros_like(fresh) if is_bias else fresh)


def _check_sizes(vit: PublishedViT, encoder: Any, keys: tuple[str, str, str, str | None]) -> None:
    begin = f"train.init_from={vit.source!r}"
    heads = next(module.num_heads for module in encoder.modules() if hasattr(module, "num_heads"))
    hidden = next(len(x) for key, x in encoder.state_dict().items() if key.endswith(".fc1.weight"))
    usual = PUBLISHED_HEADS.get(vit.width)
    theirs, their_hidden = vit.num_heads or usual, len(vit.weights["blocks.0.mlp.fc1.weight"])
    if theirs is None:
        logger.warning("%s: nothing tells its attention heads; %s=%d has to be their number", begin, keys[2], heads)
    wrong = {
        keys[0]: (vit.width, encoder.embed_dim),
        keys[1]: (vit.depth, encoder.n_blocks),
        keys[2]: (theirs or heads, heads),
    }
    if their_hidden != (4 * vit.width if hidden == 4 * encoder.embed_dim else hidden):
        if keys[3] is None:
            raise UserError(
                f"{begin}: its MLPs have {their_hidden} hidden channels, and those here 4 x {vit.width}; give another"
            )
        wrong[keys[3]] = (their_hidden, hidden)
    overrides = [f"{key}={a}" for key, (a, b) in wrong.items() if a != b]
    guessed = (
        f". No shape tells attention heads: {usual} are those of published ViTs of this width; if these are others, "
        'write them into a config.json beside the file: {"num_attention_heads": n}'
    )
    if overrides:
        raise UserError(
            f"{begin}: the encoder in it has other sizes than that of this training; set {' '.join(overrides)}"
            f"{guessed if vit.num_heads is None and theirs not in (None, heads) else ''}"
        )
    bands = vit.weights["patch_embed.proj.weight"].shape[1]
    if bands not in (3, encoder.in_chans):
        raise UserError(f"{begin}: the encoder in it reads {bands} bands; set model.in_chans={bands}")


def _fit_patches(weights: StateDict, vit: PublishedViT, encoder: Any, report: Report) -> None:
    key, size = "patch_embed.proj.weight", encoder.patch_size
    if size == vit.patch_size:
        report.taken.append("patch embedding")
    else:
        weights[key] = library(
            "timm.layers", f"model.patch_size={size}, of patches of {vit.patch_size} px,"
        ).resample_patch_embed(weights[key], [size, size])
        report.changed.append(
            f"patch embedding from {vit.patch_size} to {size} px, by timm's resample_patch_embed "
            f"(model.patch_size={vit.patch_size} keeps it)"
        )
    if weights[key].shape[1] != encoder.in_chans:
        report.changed.append(f"filters of 3 bands, spread over {encoder.in_chans}")


def _fit_layer_scale(weights: StateDict, vit: PublishedViT, parts: set[str], report: Report) -> None:
    scaled = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
    has = "blocks.0.gamma_1" in weights
    if "gamma_1" in parts:
        ones = {f"blocks.{i}.{gamma}": torch.ones(vit.width) for i in range(vit.depth) for gamma in scaled}
        weights |= {} if has else ones
        (report.taken if has else report.same).append("layer scale" if has else "layer scale, which is 1")
    elif has:
        for name in [name for name in weights if _part(name) in scaled]:
            gamma = weights.pop(name)
            projection = name.replace(_part(name), scaled[_part(name)])
            weights[f"{projection}.weight"] = weights[f"{projection}.weight"] * gamma[:, None]
            if f"{projection}.bias" in weights:
                weights[f"{projection}.bias"] = weights[f"{projection}.bias"] * gamma
        report.same.append("layer scale, multiplied into the projections before it")


def _fit_positions(
    weights: StateDict, vit: PublishedViT, encoder: Any, parts: set[str], grid: Grid, report: Report
) -> None:
    """Leaves the row of the class token with that, unless the encoder has a row for it."""
    table = weights.pop("pos_embed", None)
    if table is not None:
        class_row, patches = vit.positions(grid)
        if "pos_embed" in parts:
            before = (math.isqrt(table.shape[1]),) * 2
            resized = f", resized from {_crossed(before)} to {_crossed(grid)} patches" if before != grid else ""
            report.taken.append(f"positions{resized}")
            if grid[0] != grid[1] and position_grid(patches, row_first=encoder.row_first) != grid:
                raise UserError(
                    f"train.init_from={vit.source!r}: its table of positions is learned, and of {math.prod(grid)} rows "
                    f"of one nothing would tell that they are {_crossed(grid)} patches; set data.images_size to a "
                    "number, for squares"
                )
            if "cls_token" in parts:
                class_row = class_row if class_row.numel() else torch.zeros(1, 1, vit.width)
                patches = torch.cat([class_row, patches], dim=1)
            weights["pos_embed"] = patches
        else:
            report.dropped.append("the table of positions, which this encoder does without")
        if "pos_embed" not in parts and class_row.numel() and "cls_token" in weights:
            weights["cls_token"] = weights["cls_token"] + class_row
    elif "freqs" in parts:
        freqs = vit.rotary_frequencies(next(m.head_dim for m in encoder.modules() if hasattr(m, "head_dim")), grid)
        weights |= {f"blocks.{i}.freqs": freqs for i in range(vit.depth)}
        report.same.append(f"rotary frequencies, scaled for {_crossed(grid)} patches")
    else:
        report.dropped.append("rotary positions")
        report.fresh.append("the table of positions, of sines and cosines")


def _fit_tokens(weights: StateDict, vit: PublishedViT, encoder: Any, own: StateDict, report: Report) -> None:
    registers = weights.pop("registers", torch.zeros(1, 0, vit.width))
    if "cls_token" in own:
        (report.taken if "cls_token" in weights else report.fresh).append("class token")
        report.dropped += [_counted(registers.shape[1])] if registers.shape[1] else []
        return
    class_token = weights.pop("cls_token", torch.zeros(1, 0, vit.width))
    if "registers" not in own:
        report.dropped += ["class token"] if class_token.shape[1] else []
        report.dropped += [_counted(registers.shape[1])] if registers.shape[1] else []
        return
    tokens = torch.cat([class_token, registers], dim=1)
    given, wanted = tokens.shape[1], encoder.n_registers
    weights["registers"] = torch.cat([tokens[:, :wanted], own["registers"][:, given:]], dim=1)
    report.taken.append(f"class token and registers, as {_counted(min(given, wanted))}")
    report.dropped += [_counted(given - wanted)] if given > wanted else []
    report.fresh += [_counted(wanted - given)] if given < wanted else []
    if vit.family == "DINOv3" and (encoder.register_coordinates != "centre" or encoder.scale_reg_to_visible):
        report.changed.append("registers, which have places here")


def _fit_norms_and_biases(weights: StateDict, encoder: Any, parts: set[str], report: Report) -> None:
    """Takes out what the encoder has no place for, and says of which parts."""
    rotary = "freqs" in parts
    has_final = "norm.weight" in weights
    fused = {f"attn.{part}.{kind}" for part in "qkv" for kind in ("weight", "bias") if f"attn.qkv.{kind}" in parts}
    for name in [name for name in weights if _part(name) not in parts | fused]:
        x, part = weights.pop(name), _part(name)
        if part == "attn.k.bias" and not rotary:
            said, words = report.same, "biases of keys, left out"
        else:
            said = report.dropped
            words = next((words for start, words in DROPPED.items() if part.startswith(start)), part)
        if x.any() and words not in said:
            said.append(words)
    if any(isinstance(module, nn.RMSNorm) for module in encoder.modules()):
        report.changed.append(TO_RMS)
    if "norm.weight" in parts:
        (report.taken if has_final else report.fresh).append("final norm")


def _tell(vit: PublishedViT, report: Report, image_size: Sequence[int], hint: str) -> None:
    logger.info(
        "%s: a ViT in the layout of %s, width %d, %d blocks, patches of %d px",
        *(vit.source, vit.family, vit.width, vit.depth, vit.patch_size),
    )
    for line in report.lines():
        logger.info("%s", line)
    if report.is_exact:
        logger.info("the encoder computes what the file's does, on images of %s px", _crossed(image_size))
    else:
        has_remedy = hint and {TO_RMS, *DROPPED.values()} & {*report.changed, *report.dropped}
        remedy = f"; {hint}" if has_remedy else ""
        logger.warning("so this encoder does not compute what the file's does%s", remedy)
