"""The networks of CAE (arXiv:2202.03026): encoder, latent context regressor, decoder, and the losses between them.

State-dict names and shapes are those of the published weights. Position tables are frozen and part of the weights, and
have the row first. There is no average of the encoder: targets come from the encoder itself, run on the hidden patches.
This file is also a model file in the sense of the evaluations: `load_model` builds an encoder from weights on disk.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    Backbone,
    CardText,
    Features,
    Float,
    Int,
    Mlp,
    PatchEmbed,
    configuration_with_heads,
    encoder_sizes,
    linear_rates,
    normalisation_beside,
    patch_grid,
    resize_positions,
    sincos_table,
    untrained_encoder,
)
from utils import UserError, as_written, both_sides
from weights import backbone_part, load_strictly, read_state_dict

DEFAULT_CONFIG = Path(__file__).parent / "default_cae_config.yaml"
NORM_EPS = 1e-6
TOKEN_STD = 0.02
"""Where convolution, class token and mask token are cut off, and what their standard deviation is before: 0.0108 after.
The published code asks for a truncated normal of this deviation and cuts it at one of them, not at two."""
PUBLISHED_ENCODER = "encoder."
PUBLISHED_COPY = "alignment_encoder."
"""Keys of a published file that repeat the encoder: there, targets come from a second module with the same storage."""
KNOWN_HEADS = "12 for ViT-Ti, S and B, 16 for ViT-L"


def patches_at(x: Float[Tensor, "#b n d"], indices: Int[Tensor, " bm"], num_images: int) -> Float[Tensor, "b m d"]:
    """Rows of every image, or of one table for all, in the given order.

    Args:
        x: tokens of every image, or one table.
        indices: flat positions `image * n + patch`, image-major, equally many per image.
        num_images: b.
    """
    return x.flatten(0, 1)[indices % (len(x) * x.shape[1])].unflatten(0, (num_images, -1))


def token_loss(logits: Float[Tensor, "bm k"], token_ids: Int[Tensor, " bm"]) -> Float[Tensor, ""]:
    """Cross-entropy between the tokens of the hidden patches and what the decoder says, the mean over all of them."""
    return F.cross_entropy(logits.float(), token_ids)


def alignment_loss(predicted: Float[Tensor, "b m d"], targets: Float[Tensor, "b m d"]) -> Float[Tensor, ""]:
    """Squared distance between regressed latents and the encoder's own, the mean over all elements; not weighted."""
    return F.mse_loss(predicted.float(), targets.float())


# --- Blocks ----------------------------------------------------------------------------------------------------------


def _dropped(branch: Float[Tensor, "b n d"], factors: Float[Tensor, " b"] | None) -> Float[Tensor, "b n d"]:
    return branch if factors is None else branch * factors.view(-1, 1, 1)


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer, in which queries and values have a bias and keys have none.

    With `add_relative_positions` its scores have an offset for each relative position and head, as in BEiT.

    Heads have `dim // num_heads` channels each. Where that leaves a rest, as in 12 heads for 1024 channels, they have
    fewer channels together than the tokens. `attend` is as in `model.Attention`.
    """

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = _width_of_heads(dim, num_heads)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.proj = nn.Linear(width, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        self.relative_position_index: Tensor | None = None

    def add_relative_positions(self, grid_size: int) -> None:
        """Learn an offset of the scores for each relative position, from 0 on, for images of this grid alone."""
        index = relative_position_index(grid_size)
        table = torch.zeros(int(index.max()) + 1, self.num_heads, device=self.qkv.weight.device)
        self.relative_position_bias_table = nn.Parameter(table)
        del self.relative_position_index
        self.register_buffer("relative_position_index", index.to(table.device))

    def _relative_position_bias(self, num_tokens: int) -> Float[Tensor, "heads n n"] | None:
        table, index = self.relative_position_bias_table, self.relative_position_index
        if table is None or index is None:
            return None
        if num_tokens != len(index):
            raise UserError(
                f"relative positions are those of {len(index) - 1} patches, and these images have {num_tokens - 1}; "
                "use images of the size that was trained with"
            )
        return table[index].permute(2, 0, 1)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attend among the tokens of each image."""
        q_bias, v_bias = self.q_bias, self.v_bias
        qkv = F.linear(x, self.qkv.weight, torch.cat([q_bias, torch.zeros_like(v_bias), v_bias]))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._relative_position_bias(x.shape[1])
        attended = self.attend(q, k, v) if bias is None else self.attend(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(attended.transpose(1, 2).flatten(2))


def relative_position_index(grid_size: int) -> Int[Tensor, "n1 n1"]:
    """Which row of a table tells the relative position of two tokens, a class token and the patches of a square grid.

    Of two patches it is (dr + s - 1) (2 s - 1) + dc + s - 1, where dr and dc are the rows and columns from the second
    to the first, and s is the side of the grid. Three more rows are for class token to patch, patch to class token, and
    the class token itself (BEiT, arXiv:2106.08254; CAE's fine-tuning).
    """
    side, width = grid_size, 2 * grid_size - 1
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    rows, columns = (places[:, None] - places[None, :] + side - 1).unbind(-1)
    index = torch.full((side**2 + 1, side**2 + 1), width**2 + 2)
    index[0, 1:], index[1:, 0] = width**2, width**2 + 1
    index[1:, 1:] = rows * width + columns
    return index


class CrossAttention(nn.Module):
    """As `Attention`, with queries, keys and values from tokens of their own, each with its own linear layer."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = _width_of_heads(dim, num_heads)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, dim)

    def forward(
        self, queries: Float[Tensor, "b m d"], keys: Float[Tensor, "b n d"], values: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b m d"]:
        """Attend from the queries to the keys."""
        q = F.linear(queries, self.q.weight, self.q_bias)
        v = F.linear(values, self.v.weight, self.v_bias)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, self.k(keys), v))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def _width_of_heads(dim: int, num_heads: int) -> int:
    if not 1 <= num_heads <= dim:
        raise UserError(f"num_heads={num_heads} must lie between 1 and embed_dim={dim}")
    return num_heads * (dim // num_heads)


class Block(nn.Module):
    """Transformer block: residual attention, then residual MLP, each after a norm and scaled channel by channel."""

    is_transformer_block = True
    kept_in_float32 = ("norm1", "norm2", "gamma_1", "gamma_2")

    def __init__(self, dim: int, num_heads: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, hidden_dim=mlp_dim, bias=True)

    def forward(
        self, x: Float[Tensor, "b n d"], drop_path: Float[Tensor, "2 b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Add both branches to the tokens, times their part of what `draw_drop_path` gave."""
        attention, mlp = (None, None) if drop_path is None else drop_path.unbind()
        x = x + _dropped(self.gamma_1 * self.attn(self.norm1(x)), attention)
        return x + _dropped(self.gamma_2 * self.mlp(self.norm2(x)), mlp)


class RegressorBlock(nn.Module):
    """Queries attend to the visible latents and to each other, and are normalised where others keep the residual."""

    is_transformer_block = True
    kept_in_float32 = ("norm1_q", "norm1_k", "norm1_v", "norm2_cross", "gamma_1_cross", "gamma_2_cross")

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.gamma_1_cross, self.gamma_2_cross = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(4))
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp_cross = Mlp(dim, bias=True)

    def forward(
        self,
        queries: Float[Tensor, "b m d"],
        query_positions: Float[Tensor, "b m d"],
        context: Float[Tensor, "b v d"],
        context_positions: Float[Tensor, "b v d"],
        drop_path: Float[Tensor, "2 b"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Refine the queries. Queries and keys know their positions, values do not; the context stays as it is."""
        attention, mlp = (None, None) if drop_path is None else drop_path.unbind()
        values = torch.cat([context, queries], dim=1)
        keys = values + torch.cat([context_positions, query_positions], dim=1)
        attended = self.cross_attn(self.norm1_q(queries + query_positions), self.norm1_k(keys), self.norm1_v(values))
        # The norm takes the place of the residual stream: what the MLP is added to is normalised as well.
        queries = self.norm2_cross(queries + _dropped(self.gamma_1_cross * attended, attention))
        return queries + _dropped(self.gamma_2_cross * self.mlp_cross(queries), mlp)


@torch.no_grad()
def _init_weights(module: nn.Module, layer_scale: float) -> None:
    """Linear weights Xavier uniform, the fused ones by their fused shape; biases 0, norms the identity.

    The published code rescales deep layers first, and then fills all linear layers anew.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        elif isinstance(part, nn.Conv2d):
            _init_token(part.weight)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        for name, parameter in part.named_parameters(recurse=False):
            if name.startswith("gamma"):
                nn.init.constant_(parameter, layer_scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _init_token(parameter: Tensor) -> None:
    nn.init.trunc_normal_(parameter, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)


def _table_with_class_row(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 n d"]:
    table = sincos_table(grid, dim, row_first=True)
    return torch.cat([torch.zeros(1, 1, dim, device=table.device), table], dim=1)


# --- Networks --------------------------------------------------------------------------------------------------------


class Encoder(Backbone):
    """The ViT of CAE: a class token, then patches with frozen positions, blocks with layer scale, a norm at the end.

    Args:
        grid_size: rows and columns of patches of the images that it is trained on, or one number for a square.
        patch_size: side of a patch, pixels.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden channels of the MLPs; None for 4 x `embed_dim`.
        in_chans: bands of the images.
        normalisation: what they go through before; see `Backbone.use_normalisation`.
        layer_scale: by what branches are multiplied at the beginning of a training.
        drop_path_rate: probability that a branch of the last block is dropped, see `linear_rates`.
        relative_grid: see `add_relative_positions`; of a square.

    Raises: UserError if the sizes do not fit together.
    """

    card_text = CardText(
        method="CAE",
        tag="cae",
        files="`cae.py`, `model.py`, `weights.py` and `utils.py`",
        module="cae",
        about="""\
A vision transformer of {parameters:.0f}M parameters, width {width}, {depth} blocks and patches of {patch} pixels,
pretrained without labels by CAE, *Context Autoencoder for Self-Supervised Representation Learning*
([arXiv:2202.03026](https://arxiv.org/abs/2202.03026)): from the visible patches of an image, a regressor makes the
features of hidden ones, and a decoder names their visual tokens.""",
        citation="""\
@article{chen2023cae,
  title   = {Context Autoencoder for Self-Supervised Representation Learning},
  author  = {Chen, Xiaokang and Ding, Mingyu and Wang, Xiaodi and Xin, Ying and Mo, Shentong and Wang, Yunhao and
             Han, Shumin and Luo, Ping and Zeng, Gang and Wang, Jingdong},
  journal = {International Journal of Computer Vision},
  year    = {2023}
}""",
    )
    row_first = True
    kept_in_float32 = ("cls_token", "pos_embed", "norm")
    forward_methods = ("encode", "get_intermediate_layers")
    n_registers = num_prefix_tokens = 1  # the class token

    def __init__(
        self,
        *,
        grid_size: int | Sequence[int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int | None = None,
        layer_scale: float = 0.1,
        drop_path_rate: float = 0.0,
        relative_grid: int | None = None,
        in_chans: int = 3,
        normalisation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "grid_size": as_written(grid_size),
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "in_chans": in_chans,
            "normalisation": None,
            "layer_scale": layer_scale,
            "drop_path_rate": drop_path_rate,
            "relative_grid": relative_grid,
        }
        self.grid_size = both_sides(grid_size)
        self.patch_size, self.embed_dim, self.n_blocks, self.in_chans = patch_size, embed_dim, depth, in_chans
        self.use_normalisation(normalisation)
        self.layer_scale, self.drop_path_rates = layer_scale, linear_rates(drop_path_rate, depth)
        self.training_notes: dict[str, str] = {}  # what results of evaluations say about the training
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid_size), embed_dim), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.init_weights()
        if relative_grid is not None:
            self.add_relative_positions(relative_grid)

    def add_relative_positions(self, grid_size: int) -> None:
        """Let every block learn about relative positions, for images of this grid alone, as CAE's fine-tuning does."""
        self.arguments["relative_grid"] = grid_size
        for block in self.blocks:
            block.attn.add_relative_positions(grid_size)  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: also those that come uninitialised from the meta device."""
        self.pos_embed.copy_(_table_with_class_row(self.grid_size, self.embed_dim))
        _init_token(self.cls_token)
        _init_weights(self, self.layer_scale)

    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        indices: Int[Tensor, " bv"] | None = None,
        drop_path: Float[Tensor, "layers 2 b"] | None = None,
    ) -> Float[Tensor, "b v1 d"]:
        """Features of the class token and of the patches that are given, or of all.

        Args:
            images: normalised; both sides must be multiples of the patch size. Where the grid is another one than that
                of training, positions are resized bicubically.
            indices: flat positions `image * n + patch` of the patches that take part, image-major, equally many per
                image; the others are not seen. None shows all.
            drop_path: what `draw_drop_path` drew for `drop_path_rates`; None drops nothing.

        Returns: tokens after the final norm, the class token first.
        """
        x = self._embed(images, indices)
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[i])
        return self.norm(x)

    def _embed(
        self, images: Float[Tensor, "b c h w"], indices: Int[Tensor, " bv"] | None = None
    ) -> Float[Tensor, "b v1 d"]:
        b, grid = images.shape[0], patch_grid(images, self.patch_size)
        table = resize_positions(self.pos_embed, grid, antialias=False, own_grid=self.grid_size)
        class_row, positions = table.split([1, grid[0] * grid[1]], dim=1)
        patches = self.patch_embed(images)
        if indices is not None:
            patches, positions = patches_at(patches, indices, b), patches_at(positions, indices, b)
        return torch.cat([(self.cls_token + class_row).expand(b, -1, -1), patches + positions], dim=1)

    def _run_encoder(
        self, x: Float[Tensor, "b c h w"], blocks: Sequence[int], *, stop_early: bool
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b n d"]]]:
        tokens, chosen = self._embed(x), []
        for index, block in enumerate(self.blocks[: max(blocks) + 1 if stop_early else None]):
            tokens = block(tokens)
            if index in blocks:
                chosen.append(tokens)
        return tokens, chosen

    def _final_norm(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.norm(tokens)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Features of whole images, for evaluation: `global_repr` is the class token, there are no registers."""
        tokens = self.encode(images)
        feature_map = tokens[:, 1:].unflatten(1, patch_grid(images, self.patch_size))
        return Features(tokens[:, 0], tokens[:, :0], feature_map)


class Regressor(nn.Module):
    """The latent context regressor: cross-attention blocks, and a norm after them."""

    kept_in_float32 = ("norm",)

    def __init__(self, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.regressor_blocks = nn.ModuleList(RegressorBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self,
        queries: Float[Tensor, "b m d"],
        query_positions: Float[Tensor, "b m d"],
        context: Float[Tensor, "b v d"],
        context_positions: Float[Tensor, "b v d"],
        drop_path: Float[Tensor, "layers 2 b"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Latents of the hidden patches, normed."""
        for i, block in enumerate(self.regressor_blocks):
            given = (queries, query_positions, context, context_positions)
            queries = block(*given, None if drop_path is None else drop_path[i])
        return self.norm(queries)


class Decoder(nn.Module):
    """Self-attention among the hidden patches, and a linear layer to logits of their tokens."""

    kept_in_float32 = ("norm",)

    def __init__(self, dim: int, depth: int, num_heads: int, vocabulary_size: int) -> None:
        super().__init__()
        self.decoder_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, vocabulary_size)

    def forward(
        self, x: Float[Tensor, "b m d"], drop_path: Float[Tensor, "layers 2 b"] | None = None
    ) -> Float[Tensor, "b m k"]:
        """Logits of every token."""
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, None if drop_path is None else drop_path[i])
        return self.head(self.norm(x))


class Prediction(NamedTuple):
    """What `Predictor` returns."""

    latents: Float[Tensor, "b m d"]
    """Regressed."""
    targets: Float[Tensor, "b m d"]
    """What they are to be, in the same width; without a gradient."""
    logits: Float[Tensor, "bm k"]
    """Of the tokens of the hidden patches."""


class Predictor(nn.Module):
    """From the latents of visible patches to those of hidden ones (the regressor), and to their tokens (the decoder).

    Args:
        grid_size: as the encoder's.
        encoder_dim: channels of the encoder.
        embed_dim: channels of regressor and decoder. If they are others than the encoder's, a linear layer and a norm
            stand between, for the latents of visible patches and, without a gradient, for targets.
        regressor_depth: number of the regressor's blocks.
        decoder_depth: number of the decoder's blocks.
        num_heads: attention heads of both.
        vocabulary_size: number of different tokens, k.
        layer_scale: by what branches are multiplied at the beginning of a training.
        drop_path_rate: probability that a branch of the last block of either is dropped.

    Raises: UserError if the sizes do not fit together.
    """

    row_first = True
    kept_in_float32 = ("rd_pos_embed", "mask_token")

    def __init__(
        self,
        *,
        grid_size: int | Sequence[int],
        encoder_dim: int,
        embed_dim: int,
        regressor_depth: int,
        decoder_depth: int,
        num_heads: int,
        vocabulary_size: int,
        layer_scale: float = 0.1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.grid_size, self.embed_dim, self.layer_scale = both_sides(grid_size), embed_dim, layer_scale
        self.regressor_depth = regressor_depth
        self.drop_path_rates = [
            *linear_rates(drop_path_rate, regressor_depth),
            *linear_rates(drop_path_rate, decoder_depth),
        ]
        num_patches = math.prod(self.grid_size)
        self.rd_pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim), requires_grad=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.has_projection = encoder_dim != embed_dim
        if self.has_projection:
            self.encoder_to_regresser = nn.Linear(encoder_dim, embed_dim)
            self.encoder_to_regresser_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
            self.kept_in_float32 = (*self.kept_in_float32, "encoder_to_regresser_norm")
        self.regresser = Regressor(embed_dim, regressor_depth, num_heads)
        self.decoder = Decoder(embed_dim, decoder_depth, num_heads, vocabulary_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: also those that come uninitialised from the meta device."""
        self.rd_pos_embed.copy_(_table_with_class_row(self.grid_size, self.embed_dim))
        _init_token(self.mask_token)
        _init_weights(self, self.layer_scale)

    def project(self, x: Float[Tensor, "b n d_encoder"]) -> Float[Tensor, "b n d"]:
        """What the encoder made of patches, in the width of the regressor."""
        return self.encoder_to_regresser_norm(self.encoder_to_regresser(x)) if self.has_projection else x

    def forward(
        self,
        context: Float[Tensor, "b v d_encoder"],
        targets: Float[Tensor, "b m d_encoder"],
        visible_indices: Int[Tensor, " bv"],
        predict_indices: Int[Tensor, " bm"],
        drop_path: Float[Tensor, "layers 2 b"] | None = None,
    ) -> Prediction:
        """Predict latents and tokens of the hidden patches.

        Args:
            context: what the encoder made of the visible patches, without the class token.
            targets: what it made of the hidden ones; they only change their width.
            visible_indices: flat positions `image * n + patch` of the visible patches, image-major.
            predict_indices: those of the hidden ones.
            drop_path: what `draw_drop_path` drew for `drop_path_rates`; None drops nothing.
        """
        b, m, _ = targets.shape
        context = self.project(context)
        with torch.no_grad():
            targets = self.project(targets)
        regression, decoding = (None, None) if drop_path is None else drop_path.tensor_split([self.regressor_depth])
        table = self.rd_pos_embed[:, 1:]
        positions = patches_at(table, predict_indices, b)
        queries = self.mask_token.expand(b, m, -1)
        latents = self.regresser(queries, positions, context, patches_at(table, visible_indices, b), regression)
        logits = self.decoder(latents + positions, decoding)
        return Prediction(latents, targets.detach(), logits.flatten(0, 1))


# --- As a model of the evaluations, and files of weights -------------------------------------------------------------


def load_model(
    config_path: str | Path | None = None,
    pretrained_weights: str | Path | None = None,
    num_heads: int | None = None,
    normalisation: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Build an encoder and load its weights: the model loader that evaluations call.

    Args:
        config_path: training configuration. None: the file of the same name beside the weights, as exports have it.
        pretrained_weights: path or URL: an export of a training, or a published `.pth`. None gives random
            weights to what `config_path` describes.
        num_heads: what no shape tells; None asks the configuration.
        normalisation: what images go through before, see `Backbone.use_normalisation`; None asks the configuration, if
            there is one.
        device: where to put the model.

    Returns: the model in eval mode; its `training_notes` name the tokenizer if the configuration was asked.
    Raises: UserError for a missing file, weights that do not fit, naming the keys, or if nothing tells `num_heads`.
    """
    if pretrained_weights is None:
        return untrained_encoder(Encoder, DEFAULT_CONFIG, config_path, num_heads).to(device).eval()
    source = str(pretrained_weights)
    weights = read_encoder(read_file(source), source)
    notes: dict[str, str] = {}
    if num_heads is None:
        trained_with = configuration_with_heads(config_path, source, KNOWN_HEADS)
        num_heads = int(trained_with["model"]["num_heads"])
        tokenizer = trained_with.get("tokenizer")
        if isinstance(tokenizer, dict) and tokenizer.get("description"):
            notes = {"tokenizer": str(tokenizer["description"])}
    sizes = {**encoder_sizes(weights, source, row_first=Encoder.row_first), "num_heads": num_heads}
    if normalisation is None:
        normalisation = normalisation_beside(config_path, source)
    model = Encoder(**sizes, normalisation=normalisation)
    model.training_notes = notes
    load_strictly(model, weights, source, remedy="Give weights of CAE")
    return model.to(device).eval()


def read_file(path_or_url: str, key: str = "pretrained_weights") -> dict[str, Any]:
    """What a file of weights holds, without executing anything in it; the level that is named `model` is taken away.

    Args:
        path_or_url: an export of a training, or what the authors publish: all networks and the state of the training,
            whose options are a Namespace, a bag of values; or encoder and mask token alone.
        key: argument or config key by which the user gave the file, for messages.

    Raises: UserError as `weights.read_state_dict`.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        file = read_state_dict(path_or_url, key=key)
    return file["model"] if isinstance(file.get("model"), dict) else file


def read_encoder(file: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The encoder's weights of a file, by their published names without `encoder.`.

    Args:
        file: what `read_file` gave.
        source: where it is from, for messages.

    Raises: UserError if they are not there, as in weights of another method.
    """
    weights = _part(file, PUBLISHED_ENCODER) or backbone_part(file, source)
    if not {"cls_token", "pos_embed", "blocks.0.gamma_1"} <= weights.keys():
        raise UserError(
            f"{source!r} holds no encoder of CAE: cls_token, pos_embed and blocks.0.gamma_1 are not all among "
            f"{', '.join(sorted(weights)[:3])}, ...; give weights of this method"
        )
    return weights


def read_predictor(file: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of regressor and decoder of a file, by their published names; empty if it lacks them.

    A mask token alone, which published files of encoders have, is none of them: it means nothing to another regressor.
    """
    exported = _part(file, "predictor.")
    published = {k: v for k, v in file.items() if not k.startswith((PUBLISHED_ENCODER, PUBLISHED_COPY, "backbone."))}
    return exported or (published if any(key.startswith("regresser.") for key in published) else {})


def as_exported(file: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The weights of a published file as a training exports them; those of an export as they are.

    Args:
        file: what was read.
        model: `student`, the only network that is exported.
    """
    assert model == "student"
    if not isinstance(file.get("model"), dict):
        return dict(file)
    parts = {"backbone": _part(file["model"], PUBLISHED_ENCODER), "predictor": read_predictor(file["model"])}
    return {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.items()}


def as_published(models: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, dict[str, Tensor]]:
    """What programs of the authors read, of the exported `student`: weights alone, in their order.

    Of an encoder without regressor and decoder it is that encoder alone, which they read as well.
    """
    parts = {name: module.state_dict() for name, module in models["student"].items()}
    rest = dict(parts.get("predictor", {}))
    first = {key: rest.pop(key) for key in ("rd_pos_embed", "mask_token") if key in rest}
    copies = (PUBLISHED_ENCODER, PUBLISHED_COPY) if rest else (PUBLISHED_ENCODER,)
    encoders = {f"{prefix}{key}": value for prefix in copies for key, value in parts["backbone"].items()}
    return {"model": first | encoders | rest}


def _part(file: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}


__trained_by__ = "train_cae.py"  # the file beside this one that has the predictor, for pictures
__model_loader__ = load_model  # the name that evaluation scripts look for in a model file
