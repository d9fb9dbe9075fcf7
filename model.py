"""The CAPI backbone: a ViT encoder with registers and rotary embedding, and its predictor, as published or another.

Needs torch alone. It knows nothing of configs, ranks or training; `train_capi.py` and `fsdp.py` act on it from outside.
This file is also a model file in the sense of the evaluations: `load_model` builds a backbone from weights on disk.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import Normalisation, UserError, as_written, both_sides
from weights import (
    CardText,
    load_backbone_weights,
    load_from_hub,
    load_strictly,
    read_state_dict,
    with_hub_methods,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
else:
    try:
        from jaxtyping import Float, Int, Shaped
    except ImportError:  # torch.hub users have torch alone; annotations then say less

        class _Untyped:
            def __class_getitem__(cls, _: object) -> Any:
                return Tensor

        Float = Int = Shaped = _Untyped

BackboneT = TypeVar("BackboneT", bound="Backbone")

DEFAULT_CONFIG = Path(__file__).parent / "default_pretrain_config.yaml"


class Features(NamedTuple):
    """What `EncoderDecoder.forward` returns; unpacks as (global_repr, registers, feature_map)."""

    global_repr: Float[Tensor, "b d"]
    registers: Float[Tensor, "b r d"]
    feature_map: Float[Tensor, "b hp wp d"]


class RotaryEmbedding(nn.Module):
    """Rotary embedding (arXiv:2104.09864) of continuous 2-D coordinates over the whole head dimension, as CAPI has it.

    Channel c is rotated with channel c + D/2 although one carries the row angle and the other the column angle. That is
    how the released weights were trained.

    Args:
        head_dim: D, a multiple of 4.
        max_freq: highest frequency, in turns over the image.
        min_freq: lowest frequency.
    """

    kept_in_float32 = ("freqs",)

    def __init__(self, head_dim: int, *, max_freq: float = 7.0, min_freq: float = 7e-4) -> None:
        super().__init__()
        self.head_dim, self.max_freq, self.min_freq = head_dim, max_freq, min_freq
        self.freqs = nn.Parameter(torch.empty(2, head_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Geometric frequencies from `max_freq` to `min_freq`: rows in the first half of the channels, columns next."""
        num = self.head_dim // 4
        exponents = torch.arange(num, device=self.freqs.device) / max(num - 1, 1)
        freqs = 2 * math.pi * self.max_freq * (self.max_freq / self.min_freq) ** -exponents
        half = self.head_dim // 2
        self.freqs.zero_()
        self.freqs[0, :half] = torch.cat([freqs, freqs])
        self.freqs[1, half:] = torch.cat([freqs, freqs])

    def forward(self, coords: Float[Tensor, "b n 2"]) -> tuple[Float[Tensor, "b 1 n dh"], Float[Tensor, "b 1 n dh"]]:
        """Cosine and sine of every token's angles, in float32, with an axis for the heads."""
        # No matmul: autocast would round angles of up to 44 radians to bfloat16.
        freqs = self.freqs.float()
        angles = coords[..., :1].float() * freqs[0] + coords[..., 1:].float() * freqs[1]
        angles = angles.unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not angles.requires_grad:
            # Inductor would compute them anew for every head, of queries and of keys. What is to be seen with given
            # strides it keeps in memory.
            cos, sin = cos.as_strided(cos.shape, cos.stride()), sin.as_strided(sin.shape, sin.stride())
        return cos, sin


def rotate(
    x: Float[Tensor, "b heads n dh"], cos: Float[Tensor, "#b 1 n dh"], sin: Float[Tensor, "#b 1 n dh"]
) -> Float[Tensor, "b heads n dh"]:
    """Apply rotary angles: x * cos + [-x2, x1] * sin on the two halves of the head dimension. Keeps `x`'s dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-x2, x1], dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary embedding on queries and keys: self-attention, or cross-attention to a context.

    `attend` computes softmax(q k' / sqrt(dh)) v from tensors `[b, heads, n, dh]`; another function may take its place.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        rope_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise UserError(
                f"embed_dim={dim} must be a multiple of 4 x num_heads={4 * num_heads} for the rotary embedding"
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.rope = RotaryEmbedding(dim // num_heads, **(rope_kwargs or {}))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        coords: Float[Tensor, "#b n 2"],
        context: Float[Tensor, "b nc d"] | None = None,
        context_coords: Float[Tensor, "#b nc 2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Queries from `x`, keys and values from `context`, or from `x` as well if there is none.

        Coordinates are in units of the image: one set per image, or one for all.
        """
        angles = context_angles = self.rope(coords)
        if context is None:
            context = x
        else:
            context_angles = self.rope(context_coords)
        q, k, v = (self._split_heads(tokens) for tokens in (self.q_proj(x), self.k_proj(context), self.v_proj(context)))
        q, k = rotate(q, *angles), rotate(k, *context_angles)
        out = self.attend(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _split_heads(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n dh"]:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU; between them 4 x `dim` channels, unless `hidden_dim` says otherwise."""

    def __init__(self, dim: int, *, hidden_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply the layers to every token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    """A pre-norm residual branch with stochastic depth (arXiv:1603.09382).

    Args:
        norm: applied to the branch's input.
        fn: the branch; called with the normed tokens and further inputs: tensors whose first axis is the batch, or 1
            for all images, or None.
        drop_path_rate: probability of skipping the branch, per image.
        drop_path_type: `efficient` runs the branch on a random subset of max(int(b * keep), 1) images and adds it back
            scaled by b / subset size; `naive` runs it on all and zeroes some.
    """

    kept_in_float32 = ("norm",)  # whose weights are cast here

    def __init__(self, norm: nn.Module, fn: nn.Module, *, drop_path_rate: float, drop_path_type: str) -> None:
        super().__init__()
        if drop_path_type not in ("efficient", "naive"):
            raise UserError(f"drop_path_type={drop_path_type!r} must be one of efficient, naive")
        self.norm, self.fn = norm, fn
        self.keep_prob, self.drop_path_type = 1.0 - drop_path_rate, drop_path_type

    def draw(
        self, b: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Shaped[Tensor, "..."]:
        """What `forward` takes as `drawn`.

        Returns: for `naive` whether each image is kept, `[b]`; for `efficient` the images in a random order, of which
            the first ones are kept, and each image's place in it, `[2, b]`.
        """
        if self.drop_path_type == "naive":
            return torch.rand(b, generator=generator, device=device) < self.keep_prob
        order = torch.randperm(b, generator=generator, device=device)
        return torch.stack([order, order.argsort()])

    def forward(
        self, x: Float[Tensor, "b n d"], *inputs: Tensor | None, drawn: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Add the branch, with these further inputs, to `x`.

        Without `drawn`, training draws from torch's global generator.
        """
        if not self.training or self.keep_prob == 1.0:
            return x + self.branch(x, *inputs)
        b = x.shape[0]
        if drawn is None:
            drawn = self.draw(b, device=x.device)
        if self.drop_path_type == "naive":
            return x + self.branch(x, *inputs) * (drawn.view(b, 1, 1) / self.keep_prob).to(x.dtype)
        num_kept = max(int(b * self.keep_prob), 1)
        kept, place = drawn[0, :num_kept], drawn[1]
        kept_inputs = (t if t is None or len(t) == 1 else _rows(t, kept, place) for t in inputs)
        branch = self.branch(_rows(x, kept, place), *kept_inputs)
        return x + _rows(branch.to(x.dtype), place, kept) * (b / num_kept)

    def branch(self, x: Float[Tensor, "b n d"], *inputs: Tensor | None) -> Float[Tensor, "b n d"]:
        """The branch alone, on all images."""
        return self.fn(_norm_in_dtype_of(x, self.norm), *inputs)


class _Rows(torch.autograd.Function):
    """Rows of `x` by index, zeros where the index is past the end; `inverse` is where each row of `x` went, past the
    end if nowhere. With it the gradient is gathered as well: adding it up by index would take atomic operations."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        rows = x.index_select(0, index.clamp(max=len(x) - 1))
        if len(index) <= len(inverse):
            return rows
        return torch.where((index < len(x)).view(-1, *[1] * (x.ndim - 1)), rows, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        index, inverse = ctx.saved_tensors
        return _rows(grads[0], inverse, index), None, None


def _rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _Rows.apply(x, index, inverse)


def _norm_in_dtype_of(x: Tensor, norm: nn.Module) -> Tensor:
    """Norm with weights in the dtype of `x`: autocast leaves them in float32, for which there is no fused kernel."""
    weights = {name: weight.to(x.dtype) for name, weight in norm.named_parameters() if weight.dtype != x.dtype}
    return torch.func.functional_call(norm, weights, (x,)) if weights else norm(x)


class Block(nn.Module):
    """Transformer block: residual attention, then residual MLP."""

    is_transformer_block = True

    def __init__(
        self,
        dim: int,
        *,
        norm_layer: Any,
        drop_path_rate: float = 0.0,
        drop_path_type: str = "efficient",
        mlp_bias: bool = False,
        attn_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        drop = {"drop_path_rate": drop_path_rate, "drop_path_type": drop_path_type}
        self.residual1 = Residual(norm_layer(dim), Attention(dim, **attn_kwargs), **drop)
        self.residual2 = Residual(norm_layer(dim), Mlp(dim, bias=mlp_bias), **drop)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        coords: Float[Tensor, "#b n 2"],
        context: Float[Tensor, "b nc d"] | None = None,
        context_coords: Float[Tensor, "#b nc 2"] | None = None,
        drop_path: Shaped[Tensor, "2 ..."] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend to `context`, or to `x` itself if there is none. `drop_path`: what each branch takes as `drawn`."""
        attention, mlp = (None, None) if drop_path is None else drop_path.unbind()
        return self.residual2(self.residual1(x, coords, context, context_coords, drawn=attention), drawn=mlp)


class _Tower(nn.Module):
    """A stack of blocks. The norm after the last one is the caller's, whose weights released files name beside it."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        norm_layer: Any,
        drop_path_rate: float = 0.0,
        block_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(embed_dim, norm_layer=norm_layer, drop_path_rate=drop_path_rate, **block_kwargs) for _ in range(depth)
        )

    def run(
        self,
        x: Float[Tensor, "b n d"],
        coords: Float[Tensor, "#b n 2"],
        context: Float[Tensor, "b nc d"] | None = None,
        context_coords: Float[Tensor, "#b nc 2"] | None = None,
        *,
        layers: Collection[int] | None = None,
        drop_path: Shaped[Tensor, "layers 2 ..."] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        """Tokens after chosen layers, the lowest first; blocks after the last of them do not run.

        Args:
            x: tokens.
            coords: where they are.
            context: what they attend to; themselves if it is None.
            context_coords: where that is.
            layers: 0 is `x` itself, 1 the output of the first block; None chooses the last one.
            drop_path: for each block what it takes.
        """
        layers = [len(self.blocks)] if layers is None else layers
        chosen = [x] if 0 in layers else []
        for layer, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x, coords, context, context_coords, None if drop_path is None else drop_path[layer - 1])
            if layer in layers:
                chosen.append(x)
        return chosen


class Transformer(_Tower):
    """Blocks whose tokens attend to each other."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        coords: Float[Tensor, "#b n 2"],
        drop_path: Shaped[Tensor, "layers 2 ..."] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Run all blocks, each with its part of `drop_path`."""
        return self.run(x, coords, drop_path=drop_path)[0]


class Predictor(_Tower):
    """CAPI's predictor (arXiv:2502.08769, section 3): queries attend to the encoder's output, not to each other.

    What is predicted at one position hence does not depend on which others are predicted. `predictor=cross`.
    """

    def forward(
        self,
        queries: Float[Tensor, "b m d"],
        coords: Float[Tensor, "#b m 2"],
        context: Float[Tensor, "b nc d"],
        context_coords: Float[Tensor, "#b nc 2"],
        *,
        num_blocks: int | None = None,
        drop_path: Shaped[Tensor, "layers 2 ..."] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Run the first `num_blocks` blocks (default all), each with its part of `drop_path`."""
        layers = None if num_blocks is None else [num_blocks]
        return self.run(queries, coords, context, context_coords, layers=layers, drop_path=drop_path)[0]


class SplitPredictor(_Tower):
    """A predictor as MAE's decoder (arXiv:2111.06377): queries and the encoder's output attend to each other.

    Its blocks have the weights of those of `Predictor`, and run on the encoder's tokens as well. `predictor=split`.
    """

    def forward(
        self,
        queries: Float[Tensor, "b m d"],
        coords: Float[Tensor, "#b m 2"],
        context: Float[Tensor, "b nc d"],
        context_coords: Float[Tensor, "#b nc 2"],
        *,
        num_blocks: int | None = None,
        drop_path: Shaped[Tensor, "layers 2 ..."] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Called as `Predictor`."""
        sets = max(len(coords), len(context_coords))  # one for all images where both have one
        together = torch.cat([part.expand(sets, -1, -1) for part in (context_coords, coords)], dim=1)
        layers = None if num_blocks is None else [num_blocks]
        tokens = self.run(torch.cat([context, queries], dim=1), together, layers=layers, drop_path=drop_path)[0]
        return tokens[:, context.shape[1] :]


PREDICTORS: dict[str, type[Predictor] | type[SplitPredictor] | None] = {
    "cross": Predictor,
    "split": SplitPredictor,
    "fused": None,
}
"""What predicts, by its name in `model.predictor`; None for the encoder itself."""


class Backbone(nn.Module):
    """Features after chosen blocks of an encoder, by the calls of DINOv2 and timm, and the Hugging Face Hub.

    A subclass has its sizes, runs its blocks, and says which norm follows on the last of them.
    """

    card_text: ClassVar[CardText]
    arguments: dict[str, Any]
    """What builds this model again; `save_pretrained` writes it."""
    normalisation: Normalisation = Normalisation()
    """What images go through before they get here; what builds it again is among the arguments unless it is the
    default."""
    patch_size: int
    in_chans: int
    n_blocks: int
    n_registers: int

    def use_normalisation(self, normalisation: Normalisation | Mapping[str, Any] | None) -> None:
        """Say what this model's images are normalised by; None leaves the default.

        Raises: UserError if it is of another number of bands.
        """
        if normalisation is None:
            return
        if isinstance(normalisation, Mapping):
            normalisation = Normalisation.of(normalisation)
        if len(normalisation.mean) != self.in_chans or len(normalisation.std) != self.in_chans:
            raise UserError(
                f"data.mean={list(normalisation.mean)} and data.std={list(normalisation.std)}: must have a number for "
                f"each of the {self.in_chans} bands of the model (in_chans)"
            )
        self.normalisation = normalisation
        if normalisation != Normalisation():
            self.arguments["normalisation"] = asdict(normalisation)

    def _run_encoder(
        self, x: Float[Tensor, "b c h w"], blocks: Sequence[int], *, stop_early: bool
    ) -> tuple[Float[Tensor, "b rn d"], list[Float[Tensor, "b rn d"]]]:
        """Tokens after the last block that ran, and after each of `blocks`, which ascend; none of them normed."""
        raise NotImplementedError

    def _final_norm(self, tokens: Float[Tensor, "b rn d"]) -> Float[Tensor, "b rn d"]:
        raise NotImplementedError

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "b c h w"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        norm: bool = True,
        return_registers: bool = False,
    ) -> tuple[Any, ...]:
        """Patch tokens after chosen blocks of the encoder, called as DINOv2's method of that name.

        Args:
            x: normalised images; both sides must be multiples of the patch size.
            n: how many of the last blocks, or which ones: 0 is the first, -1 the last.
            reshape: `[b, d, rows, columns]` instead of `[b, patches, d]`.
            norm: put them through the encoder's final norm, as `forward` does.
            return_registers: give (patch tokens, registers `[b, registers, d]`) for each block.

        Returns: one item per block, first block first.
        Raises: UserError for a block that does not exist.
        """
        output_fmt = "NCHW" if reshape else "NLC"
        _, chosen = self._run_encoder(x, self._which_blocks("n", n), stop_early=True)
        return tuple(self._intermediates(x, chosen, return_registers, norm, output_fmt))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after chosen blocks of the encoder, called as timm's method of that name.

        Args:
            x: normalised images; both sides must be multiples of the patch size.
            indices: how many of the last blocks, which ones (0 is the first, -1 the last), or None for all.
            return_prefix_tokens: give (features, registers `[b, registers, d]`) for each block.
            norm: put the intermediate features through the encoder's final norm; the final tokens always are.
            stop_early: do not run the blocks after the last chosen one.
            output_fmt: `NCHW` for `[b, d, rows, columns]`, `NLC` for `[b, patches, d]`.
            intermediates_only: leave out the final tokens.

        Returns: final tokens `[b, registers + patches, d]` and the list of intermediate features, first block first;
            or that list alone.
        Raises: UserError for a block that does not exist, or another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt!r} must be one of NCHW, NLC")
        blocks = self._which_blocks("indices", self.n_blocks if indices is None else indices)
        last, chosen = self._run_encoder(x, blocks, stop_early=stop_early)
        intermediates = self._intermediates(x, chosen, return_prefix_tokens, norm, output_fmt)
        return intermediates if intermediates_only else (self._final_norm(last), intermediates)

    def _which_blocks(self, name: str, chosen: int | Sequence[int]) -> list[int]:
        depth = self.n_blocks
        indices = range(-chosen, 0) if isinstance(chosen, int) else chosen
        if not indices or min(indices) < -depth or max(indices) >= depth:
            raise UserError(f"{name}={chosen!r}: the encoder has {depth} blocks, 0 to {depth - 1}")
        return sorted({index % depth for index in indices})

    def _intermediates(
        self, x: Tensor, chosen: Sequence[Tensor], with_registers: bool, norm: bool, output_fmt: str
    ) -> list[Any]:
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        intermediates: list[Any] = []
        for hidden in chosen:
            tokens = self._final_norm(hidden) if norm else hidden
            patches = tokens[:, self.n_registers :]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            intermediates.append((patches, tokens[:, : self.n_registers]) if with_registers else patches)
        return intermediates

    @classmethod
    def from_pretrained(cls: type[BackboneT], name_or_path: str | Path, **kwargs: Any) -> BackboneT:
        """Load what `save_pretrained` or `push_to_hub` wrote: a folder, or a repository of the Hugging Face Hub.

        Args:
            name_or_path: `owner/name`, or a folder with `config.json` and `model.safetensors`.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as for any model of the hub;
                `map_location`, where to put the model; arguments of the model, which win over `config.json`.

        Returns: the model in eval mode.
        Raises: UserError if it is not there or does not fit.
        """
        return load_from_hub(cls, str(name_or_path), kwargs)

    def save_pretrained(self, folder: str | Path, *, card: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Write `model.safetensors`, `config.json` and a model card `README.md`, if there is none, into a folder.

        Args:
            folder: made if it does not exist.
            card: for the model card: any of `license` (of the weights; apache-2.0 if not given), `name` and `training`
                (on what, for how long: a sentence of yours).
            kwargs: as for `save_pretrained` of huggingface_hub's mixin.
        """
        card = {"name": str(folder)} | dict(card or {})
        return with_hub_methods(self).save_pretrained(folder, model_card_kwargs=card, **kwargs)

    def push_to_hub(self, repo_id: str, *, card: Mapping[str, Any] | None = None, **kwargs: Any) -> str:
        """Upload to the Hugging Face Hub what `save_pretrained` writes; needs `hf auth login` or `token`.

        Args:
            repo_id: `owner/name`; made if it does not exist.
            card: as for `save_pretrained`.
            kwargs: `private`, `token`, `branch`, `commit_message`, `create_pr`, as for any model of the hub.

        Returns: address of the commit.
        """
        card = {"name": repo_id} | dict(card or {})
        return with_hub_methods(self).push_to_hub(repo_id, model_card_kwargs=card, **kwargs)


class EncoderDecoder(Backbone):
    """Encoder (the ViT that is kept) and predictor ("decoder") of CAPI (arXiv:2502.08769, section 3).

    State-dict names are those of the released weights. Token order is registers, then patches in row-major order.

    Args:
        patch_size: side of a patch, pixels.
        in_chans: bands of the images.
        norm_layer_type: name of a norm in `torch.nn`; `norm_layer_kwargs` are its arguments, `final_norm_kwargs` come
            on top for the norm after the last block.
        n_registers: learned tokens beside the patches.
        register_coordinates: `edge` spreads them over the border of the image, `zeros` puts them at the corner,
            `centre` in the middle.
        scale_reg_to_visible: map their coordinates into the bounding box of each image's visible patches.
        transformers_kwargs: what both towers share: `embed_dim`, `drop_path_rate`, `block_kwargs`.
        encoder_kwargs: the encoder's `depth`.
        decoder_kwargs: the predictor's `depth`; with `predictor=fused` there is none.
        predictor: how the student predicts, the paper's comparison. The kept encoder is of one size, under the same
            names, in all of them.
            `cross`: mask tokens attend to the encoder's output, which saw the visible patches alone; as published.
            `split`: they and the encoder's output attend to each other, as in MAE; mask tokens stand at the predicted
            positions.
            `fused`: they stand at all hidden positions in the encoder's input, as in BEiT and iBOT, and its output at
            the predicted ones is the prediction; registers are those of a whole image. There is no tower beside the
            encoder, whose depth stays: one as deep as both together would be another encoder to evaluate.
        out_layer: which layer's output is the feature, modulo depth + 1; 0 is the embedding, -1 the last layer.
        normalisation: what images go through before; see `Backbone.use_normalisation`.

    Raises: UserError on an impossible combination.
    """

    card_text = CardText(
        method="CAPI",
        tag="capi",
        files="`model.py`, `weights.py` and `utils.py`",
        module="model",
        about="""\
A vision transformer of {parameters:.0f}M parameters (with its predictor), width {width}, {depth} blocks, patches of
{patch} pixels and {registers} registers, pretrained without labels by CAPI, *Cluster and Predict Latent Patches for
Improved Masked Image Modeling* ([arXiv:2502.08769](https://arxiv.org/abs/2502.08769)): a teacher clusters its patch
features, and a student predicts the clusters of hidden patches.""",
        citation="""\
@article{darcet2025capi,
  title   = {Cluster and Predict Latent Patches for Improved Masked Image Modeling},
  author  = {Darcet, Timoth{\\'e}e and Baldassarre, Federico and Oquab, Maxime and Mairal, Julien and
             Bojanowski, Piotr},
  journal = {Transactions on Machine Learning Research},
  year    = {2025}
}""",
    )
    # For code that divides weights over ranks. The predictor's residual stream begins with the mask token.
    kept_in_float32 = ("mask_token",)
    forward_methods = ("forward_pretrain", "get_intermediate_layers")

    def __init__(
        self,
        *,
        patch_size: int = 14,
        in_chans: int = 3,
        norm_layer_type: str = "RMSNorm",
        n_registers: int = 16,
        register_coordinates: str = "edge",
        scale_reg_to_visible: bool = True,
        transformers_kwargs: Mapping[str, Any],
        encoder_kwargs: Mapping[str, Any],
        decoder_kwargs: Mapping[str, Any],
        norm_layer_kwargs: Mapping[str, Any] | None = None,
        final_norm_kwargs: Mapping[str, Any] | None = None,
        out_layer: int = -1,
        predictor: str = "cross",
        normalisation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "patch_size": patch_size,
            "in_chans": in_chans,
            "norm_layer_type": norm_layer_type,
            "n_registers": n_registers,
            "register_coordinates": register_coordinates,
            "scale_reg_to_visible": scale_reg_to_visible,
            "transformers_kwargs": transformers_kwargs,
            "encoder_kwargs": encoder_kwargs,
            "decoder_kwargs": decoder_kwargs,
            "norm_layer_kwargs": norm_layer_kwargs,
            "final_norm_kwargs": final_norm_kwargs,
            "out_layer": out_layer,
            "predictor": predictor,
            "normalisation": None,
        }
        if predictor not in PREDICTORS:
            raise UserError(f"predictor={predictor!r} must be one of {', '.join(PREDICTORS)}")
        if norm_layer_type not in ("RMSNorm", "LayerNorm"):
            raise UserError(f"norm_layer_type={norm_layer_type!r}: must be one of RMSNorm, LayerNorm")
        norm_type = getattr(nn, norm_layer_type)
        norm_kwargs = {"eps": 1e-5} if norm_layer_kwargs is None else dict(norm_layer_kwargs)
        final_kwargs = {"elementwise_affine": False} if final_norm_kwargs is None else dict(final_norm_kwargs)

        def norm_layer(dim: int) -> nn.Module:
            return norm_type(dim, **norm_kwargs)

        embed_dim = transformers_kwargs["embed_dim"]
        self.patch_size, self.in_chans, self.embed_dim, self.pred_dim = patch_size, in_chans, embed_dim, embed_dim
        self.use_normalisation(normalisation)
        self.n_registers = self.num_prefix_tokens = n_registers
        self.register_coordinates, self.scale_reg_to_visible = register_coordinates, scale_reg_to_visible
        edge_coordinates(n_registers, register_coordinates)  # raises early
        self.n_blocks = encoder_kwargs["depth"]
        self.out_layer = out_layer % (self.n_blocks + 1)
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.registers = nn.Parameter(torch.empty(1, n_registers, embed_dim))
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.encoder = Transformer(norm_layer=norm_layer, **transformers_kwargs, **encoder_kwargs)
        self.enc_norm = norm_type(embed_dim, **(norm_kwargs | final_kwargs))
        self.decoder = self.dec_norm = None
        tower = PREDICTORS[predictor]
        if tower is not None:
            self.decoder = tower(norm_layer=norm_layer, **transformers_kwargs, **decoder_kwargs)
            self.dec_norm = norm_type(embed_dim, **(norm_kwargs | final_kwargs))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: also those that come uninitialised from the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RotaryEmbedding):
                module.init_weights()
            elif isinstance(module, Residual):
                for name, parameter in module.norm.named_parameters():
                    nn.init.ones_(parameter) if name == "weight" else nn.init.zeros_(parameter)
        for final_norm in (self.enc_norm, self.dec_norm):
            for name, parameter in () if final_norm is None else final_norm.named_parameters():
                nn.init.ones_(parameter) if name == "weight" else nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        assert self.patch_embed.bias is not None
        bound = 1 / math.sqrt(self.patch_embed.weight[0].numel())
        nn.init.uniform_(self.patch_embed.bias, -bound, bound)
        nn.init.normal_(self.registers, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Features of whole images, for evaluation.

        Args:
            x: normalised images; both sides must be multiples of the patch size.

        Returns: `Features`: `global_repr` is the mean over all positions of the first predictor block's output, or, if
            there is no predictor, of the encoder's; `registers` and `feature_map` come from `out_layer`. All went
            through the final norm of their tower.
        """
        patches, hp, wp = self._embed_patches(x)
        coords = grid_coordinates(hp, wp, x.device)
        tokens, token_coords = self._prepend_registers(patches, coords)
        outputs = self.encoder.run(tokens, token_coords, layers={self.out_layer, self.n_blocks})
        normed = [self.enc_norm(output) for output in outputs]  # of one layer, or of two
        if self.decoder is None or self.dec_norm is None:
            predicted = normed[-1][:, self.n_registers :]
        else:
            queries = self.mask_token.expand(x.shape[0], hp * wp, -1)
            predicted = self.dec_norm(self.decoder(queries, coords, normed[-1], token_coords, num_blocks=1))
        registers, feature_map = normed[0].split([self.n_registers, hp * wp], dim=1)
        return Features(predicted.mean(dim=1), registers, feature_map.unflatten(1, (hp, wp)))

    def forward_pretrain(
        self,
        x: Float[Tensor, "b c h w"],
        visible_indices: Int[Tensor, " visible"] | None = None,
        predict_indices: Int[Tensor, " predicted"] | None = None,
        do_prediction: bool = False,
        drop_path: Shaped[Tensor, "layers 2 ..."] | None = None,
    ) -> tuple[Float[Tensor, "b v d"], Float[Tensor, "predicted d"] | None]:
        """Encode the visible patches and, if asked, predict the hidden ones.

        Args:
            x: normalised images.
            visible_indices: flat positions `image * n + patch` of the visible patches, image-major, equally many per
                image; None shows all patches (the teacher).
            predict_indices: flat positions to predict, likewise.
            do_prediction: run the predictor; needs `predict_indices`.
            drop_path: what `draw_drop_path` drew for this batch; None leaves it to torch's global generator.

        Returns: encoder output at the visible patches in the given order, and predictions or None.
        """
        if self.decoder is None or self.dec_norm is None:
            return self._forward_fused(x, visible_indices, predict_indices if do_prediction else None, drop_path)
        b = x.shape[0]
        patches, hp, wp = self._embed_patches(x)
        grid = grid_coordinates(hp, wp, x.device)
        coords = grid  # of whole images the same for all: angles are then computed for one
        if visible_indices is not None:
            patches = patches.flatten(0, 1)[visible_indices].unflatten(0, (b, -1))
            coords = grid[0][visible_indices % (hp * wp)].unflatten(0, (b, -1))
        tokens, token_coords = self._prepend_registers(patches, coords)
        encoder_drop_path = None if drop_path is None else drop_path[: self.n_blocks]
        encoded = self.enc_norm(self.encoder(tokens, token_coords, encoder_drop_path))
        encoder_patches = encoded[:, self.n_registers :]
        if not do_prediction:
            return encoder_patches, None
        assert predict_indices is not None
        query_coords = grid[0][predict_indices % (hp * wp)].unflatten(0, (b, -1))
        queries = self.mask_token.expand(b, query_coords.shape[1], -1)
        predictor_drop_path = None if drop_path is None else drop_path[self.n_blocks :]
        predicted = self.decoder(queries, query_coords, encoded, token_coords, drop_path=predictor_drop_path)
        return encoder_patches, self.dec_norm(predicted).flatten(0, 1)

    def _forward_fused(
        self,
        x: Float[Tensor, "b c h w"],
        visible_indices: Int[Tensor, " visible"] | None,
        predict_indices: Int[Tensor, " predicted"] | None,
        drop_path: Shaped[Tensor, "layers 2 ..."] | None,
    ) -> tuple[Float[Tensor, "b v d"], Float[Tensor, "predicted d"] | None]:
        """`forward_pretrain` where the encoder itself predicts: hidden patches are mask tokens in its input."""
        b = x.shape[0]
        patches, hp, wp = self._embed_patches(x)
        if visible_indices is not None:
            is_visible = torch.zeros(b * hp * wp, 1, dtype=torch.bool, device=x.device)
            is_visible = is_visible.index_fill(0, visible_indices, True).unflatten(0, (b, -1))
            patches = torch.where(is_visible, patches, self.mask_token.to(patches.dtype))
        tokens, token_coords = self._prepend_registers(patches, grid_coordinates(hp, wp, x.device))
        encoded = self.enc_norm(self.encoder(tokens, token_coords, drop_path))[:, self.n_registers :]
        every_patch = encoded.flatten(0, 1)  # [b*n, d], image-major
        if visible_indices is not None:
            encoded = every_patch[visible_indices].unflatten(0, (b, -1))
        return encoded, None if predict_indices is None else every_patch[predict_indices]

    def draw_drop_path(self, b: int, generator: torch.Generator) -> Shaped[Tensor, "layers 2 ..."] | None:
        """On which images of a batch each branch of each block runs in training; None if on all.

        To be drawn outside of what is compiled: there, random numbers need not come from the generator that is seeded.
        """
        residuals = [module for module in self.modules() if isinstance(module, Residual)]
        if all(residual.keep_prob == 1.0 for residual in residuals):
            return None
        return torch.stack([residual.draw(b, generator) for residual in residuals]).unflatten(0, (-1, 2))

    def _run_encoder(
        self, x: Float[Tensor, "b c h w"], blocks: Sequence[int], *, stop_early: bool
    ) -> tuple[Float[Tensor, "b rn d"], list[Float[Tensor, "b rn d"]]]:
        """Tokens after the last block that ran, and after each of `blocks`, none of them normed."""
        patches, hp, wp = self._embed_patches(x)
        tokens, coords = self._prepend_registers(patches, grid_coordinates(hp, wp, x.device))
        layers = [block + 1 for block in blocks]
        outputs = self.encoder.run(tokens, coords, layers=layers if stop_early else {*layers, self.n_blocks})
        return outputs[-1], outputs[: len(blocks)]

    def _final_norm(self, tokens: Float[Tensor, "b rn d"]) -> Float[Tensor, "b rn d"]:
        return self.enc_norm(tokens)

    def _embed_patches(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], int, int]:
        patch_grid(x, self.patch_size)  # raises
        embedded = self.patch_embed(x)
        return embedded.flatten(2).transpose(1, 2), embedded.shape[-2], embedded.shape[-1]

    def _prepend_registers(
        self, patches: Float[Tensor, "b v d"], coords: Float[Tensor, "#b v 2"]
    ) -> tuple[Float[Tensor, "b rv d"], Float[Tensor, "#b rv 2"]]:
        b = patches.shape[0]
        register_coords = edge_coordinates(self.n_registers, self.register_coordinates, coords.device)
        register_coords = register_coords.expand(len(coords), -1, -1)
        if self.scale_reg_to_visible:
            low, high = coords.amin(dim=1, keepdim=True), coords.amax(dim=1, keepdim=True)
            register_coords = low + register_coords * (high - low)
        registers = self.registers.to(patches.dtype).expand(b, -1, -1)
        return torch.cat([registers, patches], dim=1), torch.cat([register_coords, coords], dim=1)


def draw_drop_path(
    rates: Sequence[float], num_images: int, generator: torch.Generator
) -> Float[Tensor, "layers 2 b"] | None:
    """By what both branches of each block are multiplied for each image: 0, or 1 / probability to be kept.

    Stochastic depth (arXiv:1603.09382), to be drawn outside of what is compiled: there, random numbers need not come
    from the generator that is seeded.

    Args:
        rates: probability, for each block, that a branch of an image is dropped.
        num_images: b.
        generator: of the CPU.

    Returns: the factors, or None if no branch is ever dropped.
    """
    if not any(rates):
        return None
    kept = 1 - torch.tensor(rates).view(-1, 1, 1)
    return (torch.rand(len(rates), 2, num_images, generator=generator) < kept) / kept


def linear_rates(highest: float, depth: int) -> list[float]:
    """Drop-path rates that rise linearly from 0 at the first block to `highest` at the last one."""
    return [highest * block / max(depth - 1, 1) for block in range(depth)]


def patch_grid(images: Float[Tensor, "b c h w"], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises: UserError if a side of the images is no multiple of the patch size.
    """
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise UserError(
            f"The image size {height}x{width} must be a multiple of the patch size {patch_size} in both directions; "
            "resize or crop the images"
        )
    return height // patch_size, width // patch_size


def resize_positions(
    table: Float[Tensor, "1 n d"],
    grid: tuple[int, int],
    *,
    antialias: bool,
    offset: float = 0.0,
    own_grid: tuple[int, int] | None = None,
) -> Float[Tensor, "1 n2 d"]:
    """Bicubic resizing of a learned or stored position table, with or without a class token's row.

    Args:
        table: the rows of the patches, row-major, after at most one for the class token, which is kept.
        grid: rows and columns wanted; those of the table give the table itself.
        antialias: low-pass before shrinking, as MAE and DINOv2 with registers do and DINO and I-JEPA do not.
        offset: DINO, iBOT and DINOv2 without registers enlarge by (n + 0.1) / side instead of n / side.
        own_grid: rows and columns of the table; None for a square, as those of published models are.
    """
    own_grid = own_grid or both_sides(math.isqrt(table.shape[1]))
    num_patches = math.prod(own_grid)
    class_row, patches = table.split([table.shape[1] - num_patches, num_patches], dim=1)
    if grid == own_grid and not torch.compiler.is_exporting():  # which would fix the grid of what is exported
        return table
    as_map = patches.unflatten(1, own_grid).permute(0, 3, 1, 2).float()
    if offset:
        scales = tuple((length + offset) / side for length, side in zip(grid, own_grid, strict=True))
        resized = F.interpolate(as_map, scale_factor=scales, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(as_map, size=grid, mode="bicubic", antialias=antialias)
    assert resized.shape[-2:] == grid
    return torch.cat([class_row, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def load_resized(module: nn.Module, weights: Mapping[str, Tensor], source: str, *, remedy: str) -> None:
    """Copy weights into an encoder or predictor, or several, whose grid of patches may be another one than theirs.

    Args:
        module: filled in place; the first `grid_size` in it says how large its tables of positions are, and the
            `row_first` beside it in which order they have sines and cosines.
        weights: by its own keys; those that end in `pos_embed` are resized.
        source: where the weights are from, for messages.
        remedy: what the user can do if they do not fit.

    Raises: UserError if they do not fit.
    """
    part: Any = next(part for part in module.modules() if hasattr(part, "grid_size"))

    def fitting(table: Tensor) -> Tensor:
        own_grid = position_grid(table, row_first=part.row_first)
        return resize_positions(table, part.grid_size, antialias=False, own_grid=own_grid)

    resized = {key: fitting(x) if key.endswith("pos_embed") else x for key, x in weights.items()}
    load_strictly(module, resized, source, remedy=remedy)


def sincos_table(grid: tuple[int, int], dim: int, *, row_first: bool = False) -> Float[Tensor, "1 n d"]:
    """Positions of the patches of a grid as sines and cosines, row-major.

    A patch at (row, column) gets [sin(column w), cos(column w), sin(row w), cos(row w)], each `dim` / 4 long, with
    w_k = 10000^(-k / (dim / 4)). Computed in float64, returned in float32.

    Args:
        grid: rows and columns of patches.
        dim: channels.
        row_first: give the row's sines and cosines before the column's, as CAE does; MAE and I-JEPA do not.

    Raises: UserError if `dim` is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"embed_dim={dim} must be a multiple of 4: sine and cosine of row and column")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    lines = [torch.arange(length, dtype=torch.float64, device="cpu") for length in grid]
    rows, columns = (places.flatten().outer(frequencies) for places in torch.meshgrid(*lines, indexing="ij"))
    angles = (rows, columns) if row_first else (columns, rows)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)


SAME_POSITION = 1e-4
"""Difference up to which two numbers of a table are the same. Resizing 14 rows to 224 leaves neighbours 1e-3 apart."""


def position_grid(table: Float[Tensor, "1 n d"], *, row_first: bool) -> tuple[int, int]:
    """Rows and columns of patches that a table of positions is for, with or without a class token's row before them.

    Nothing else in a file of weights says whether 32 patches are 4 x 8 or 2 x 16. In what `sincos_table` gives, also
    after it was resized, half of the channels say the row alone and half the column alone, so one row of patches ends
    where the first half changes. Any other table is for a square.

    Args:
        table: of positions.
        row_first: as for `sincos_table`: which order to try first. A table of the other one, out of another encoder,
            is told apart by itself, unless there is one row or one column.
    """
    for swapped, patches in itertools.product((False, True), (table[0], table[0, 1:])):
        halves = patches.float().chunk(2, dim=1)
        of_rows, of_columns = halves if row_first is not swapped else reversed(halves)
        same_row = (of_rows - of_rows[:1]).abs().amax(dim=1) < SAME_POSITION
        columns = int(same_row.long().cumprod(dim=0).sum())
        if columns == 0 or len(patches) % columns:
            continue
        grid = (len(patches) // columns, columns)
        rows, lines = of_rows.unflatten(0, grid), of_columns.unflatten(0, grid)
        is_new = (lines[0, 1:] - lines[0, :1]).abs().amax(dim=1) > SAME_POSITION
        spread = max(float((part - first).abs().max()) for part, first in ((rows, rows[:, :1]), (lines, lines[:1])))
        if spread < SAME_POSITION and is_new.all():
            return grid
    return both_sides(math.isqrt(table.shape[1]))


class PatchEmbed(nn.Module):
    """Every patch a token, row-major."""

    def __init__(self, patch_size: int, dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Project the pixels of each patch."""
        return self.proj(images).flatten(2).transpose(1, 2)


def _linspace(num: int, device: torch.device) -> Float[Tensor, " num"]:
    """`torch.linspace(0, 1, num)` up to rounding; that function would fix `num` in compiled and exported models."""
    index = torch.arange(num, device=device, dtype=torch.float32)
    return index / index[-1:].clamp(min=1)


def grid_coordinates(num_rows: int, num_columns: int, device: torch.device) -> Float[Tensor, "1 n 2"]:
    """Coordinates (row, column) of the patches of an image, row by row: from 0 to 1 along both sides."""
    rows, columns = _linspace(num_rows, device), _linspace(num_columns, device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(1, num_rows * num_columns, 2)


def edge_coordinates(num_registers: int, kind: str, device: torch.device | None = None) -> Float[Tensor, "r 2"]:
    """Coordinates of the registers: walking round the unit square (`edge`), or all at its origin (`zeros`) or `centre`.

    Raises: UserError if `edge` has a number of registers that is no multiple of 4, or for another kind.
    """
    if kind in ("zeros", "centre"):
        return torch.full((num_registers, 2), 0.5 if kind == "centre" else 0.0, device=device)
    if kind != "edge":
        raise UserError(f"register_coordinates={kind!r} must be one of edge, zeros, centre")
    if num_registers % 4:
        raise UserError(
            f"n_registers={num_registers} must be a multiple of 4 with register_coordinates='edge' (a quarter per side)"
        )
    if num_registers == 0:
        return torch.zeros(0, 2, device=device)
    c = torch.arange(num_registers // 4, device=device) / (num_registers // 4)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    sides = [(c, zero), (one, c), (1 - c, one), (zero, 1 - c)]
    return torch.cat([torch.stack(side, dim=-1) for side in sides])


def configuration_with_heads(config_path: str | Path | None, source: str, known: str) -> dict[str, Any]:
    """The configuration that an encoder was trained with; no shape of its weights tells its attention heads.

    Args:
        config_path: of the configuration. None: the file of the same name beside the weights, as exports have it.
        source: where the weights are from.
        known: the heads of published encoders, for the message.

    Returns: its sections, with a whole number at `model.num_heads`.
    Raises: UserError if there is no configuration, or none with `model.num_heads`.
    """
    path = Path(source).with_suffix(".yaml") if config_path is None else Path(config_path)
    if not path.is_file():
        raise UserError(
            f"Nothing tells the attention heads of {source!r}: there is no configuration {str(path)!r}; give "
            f"model_loader_kwargs.num_heads={known}"
        )
    import yaml  # here, so that those who know the number need torch alone

    try:
        sections = yaml.safe_load(path.read_text())
        int(sections["model"]["num_heads"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"The configuration {str(path)!r} has no model.num_heads: {error}") from error
    return sections


def untrained_encoder(
    make: type[BackboneT], default: Path, config_path: str | Path | None, num_heads: int | None
) -> BackboneT:
    """The encoder that a training configuration describes, at random initialisation.

    Args:
        make: class of the encoder: takes the keys of the section `model`, and rows and columns of patches of a crop
            as `grid_size`.
        default: the method's default configuration, on top of which the other one goes.
        config_path: of the configuration.
        num_heads: attention heads in place of its own; None keeps those.

    Raises: UserError if there is none, or it is of another method.
    """
    if config_path is None:
        raise UserError(
            "pretrained_weights=None: give an export of a training, or a file that the authors publish; or for random "
            "weights config_path=, a configuration of a training. benchmark.py shows them unless random_baseline=false"
        )
    config = read_sections(default, config_path, {} if num_heads is None else {"model": {"num_heads": num_heads}})
    try:
        sizes = config["model"]
        height, width = both_sides(config["data"]["images_size"])
        model = make(grid_size=(height // sizes["patch_size"], width // sizes["patch_size"]), **sizes)
    except (KeyError, TypeError) as error:
        raise UserError(f"The model section of {config_path} has a wrong key: {error}") from error
    model.use_normalisation(config["data"])
    return model


def normalisation_beside(config_path: str | Path | None, source: str) -> dict[str, Any] | None:
    """The section `data` of the configuration of weights, which says how their images are normalised; None without one.

    Args:
        config_path: of the configuration. None: the file of the same name beside the weights, as exports have it.
        source: where the weights are from.

    Raises: UserError if it cannot be read.
    """
    path = Path(source).with_suffix(".yaml") if config_path is None else Path(config_path)
    if not path.is_file():
        return None
    import yaml  # here, so that those without a configuration need torch alone

    try:
        data = yaml.safe_load(path.read_text()).get("data")
    except (OSError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"The configuration {str(path)!r} cannot be read: {error}") from error
    return data if isinstance(data, dict) else None


def encoder_sizes(weights: Mapping[str, Tensor], source: str, *, row_first: bool = False) -> dict[str, Any]:
    """Grid, patch, bands, width, depth and hidden width of a ViT with a table of positions, by its weights' shapes.

    Args:
        weights: by the names that timm has, with a row for each patch in the table and at most one for a class token.
        source: where they are from, for messages.
        row_first: as for `sincos_table`.

    Raises: UserError if they are not those of such an encoder.
    """
    try:
        table = weights["pos_embed"]
        _, _, embed_dim = table.shape
        return {
            "grid_size": as_written(position_grid(table, row_first=row_first)),
            "patch_size": weights["patch_embed.proj.weight"].shape[-1],
            "embed_dim": embed_dim,
            "in_chans": weights["patch_embed.proj.weight"].shape[1],
            "depth": sum(key.endswith(".norm1.weight") for key in weights),
            "mlp_dim": len(weights["blocks.0.mlp.fc1.bias"]),
        }
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{source!r} holds no encoder with a table of positions: {error}") from error


def read_sections(
    default: Path, config_path: str | Path | None, override: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sections `model` and `data` of a default configuration with a file and then `override` on top, unchecked.

    Raises: UserError if the file is not there or cannot be read.
    """
    import yaml  # here, so that torch.hub users need torch alone
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if config_path is not None and not Path(config_path).is_file():
        raise UserError(f"There is no configuration file {str(config_path)!r}")
    try:
        sources = [OmegaConf.load(path) for path in (default, config_path) if path is not None]
        merged: Any = OmegaConf.merge(*sources, OmegaConf.create(dict(override or {})))
        return {name: OmegaConf.to_container(merged[name], resolve=True) for name in ("model", "data")}
    except (OSError, TypeError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The configuration {config_path or 'config_override'} cannot be read: {error}") from error


def load_model(
    config_path: str | Path | None = None,
    pretrained_weights: str | Path | None = None,
    config_override: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> EncoderDecoder:
    """Build a backbone and load its weights: the model loader that evaluations call.

    Args:
        config_path: training configuration whose `model` section comes on top of the default one. None: the file of
            the same name beside the weights if there is one (exports of a training run have it), else the default.
        pretrained_weights: path or URL of a state dict; keys under `backbone.` are used, or all if none has that
            prefix. None leaves the random initialisation.
        config_override: last word, for example `{"model": {"out_layer": -2}}`.
        device: where to put the model.

    Returns: the model in eval mode.
    Raises: UserError for a missing file, or weights that do not fit, naming the keys.
    """
    weights = None if pretrained_weights is None else str(pretrained_weights)
    if config_path is None and weights is not None:
        beside = Path(weights).parent / f"{Path(weights).stem}.yaml"
        config_path = beside if beside.is_file() else None
    sections = read_sections(DEFAULT_CONFIG, config_path, config_override)
    arguments = sections["model"]
    state = None if weights is None else read_state_dict(weights)
    try:
        model = EncoderDecoder(**arguments)
    except TypeError as error:
        raise UserError(
            f"The model section of {config_path or 'config_override'} has a wrong key: {error}. Models that other "
            "methods trained have model files of their own, such as model_path=ijepa.py"
        ) from error
    model.use_normalisation(sections["data"])
    if state is not None:
        load_backbone_weights(model, state, str(weights))
    return model.to(device).eval()


__model_loader__ = load_model  # the name that evaluation scripts look for in a model file
__trained_by__ = "train_capi.py"  # the file beside this one that has the predictor, for pictures
