"""The networks of I-JEPA (arXiv:2301.08243) and StoP (arXiv:2308.00566): encoder, predictor, and the loss between them.

State-dict names and shapes are those of the published weights. Position tables are frozen and part of the weights.
This file is also a model file in the sense of the evaluations: `load_model` builds an encoder from weights on disk.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    Backbone,
    Features,
    Float,
    Int,
    Mlp,
    PatchEmbed,
    configuration_with_heads,
    encoder_sizes,
    normalisation_beside,
    patch_grid,
    resize_positions,
    sincos_table,
    untrained_encoder,
)
from utils import UserError, as_written, both_sides
from weights import CardText, backbone_part, load_strictly, read_state_dict

DEFAULT_CONFIG = Path(__file__).parent / "default_ijepa_config.yaml"
NORM_EPS = 1e-6
TARGET_NORM_EPS = 1e-5
WEIGHT_STD = 0.02
PUBLISHED_PARTS = ("encoder", "target_encoder", "predictor")
"""State dicts in a published file; all keys in them begin with `module.`."""


EXPORTED_AS = {
    "student": {"backbone": "encoder", "predictor": "predictor"},
    "student_ema": {"backbone": "target_encoder"},
}
"""Which of them is what in the exports of a training, by the prefix that its keys have there."""


def gather_patches(x: Float[Tensor, "#b n d"], indices: Int[Tensor, "k b m"]) -> Float[Tensor, "kb m d"]:
    """Rows of every image, one mask after the other along the batch: [k*b, m, d], mask-major.

    Args:
        x: tokens of every image, or one table for all.
        indices: positions in `[0, n)`, of k masks for each image.
    """
    images = torch.arange(indices.shape[1], device=x.device).clamp_max(len(x) - 1).view(1, -1, 1)
    return x[images, indices].flatten(0, 1)


def prediction_targets(
    features: Float[Tensor, "b n d"], target_indices: Int[Tensor, "t b m"], num_contexts: int = 1
) -> Float[Tensor, "tcb m d"]:
    """What is predicted: the teacher's patch features, each normalised over its channels, at the target positions.

    The order along the batch is block, context, image, as the predictor's.
    """
    normed = F.layer_norm(features.float(), features.shape[-1:], eps=TARGET_NORM_EPS)
    blocks = gather_patches(normed, target_indices).unflatten(0, target_indices.shape[:2])
    return blocks.repeat_interleave(num_contexts, dim=0).flatten(0, 1)


def prediction_loss(predicted: Float[Tensor, "b m d"], targets: Float[Tensor, "b m d"]) -> Float[Tensor, ""]:
    """Smooth L1 with beta 1, the mean over all elements. (The paper writes L2; this is what was trained.)"""
    return F.smooth_l1_loss(predicted.float(), targets)


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values.

    `attend` is as in `model.Attention`.
    """

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"embed_dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Attend among the tokens of each image."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block: residual attention, then residual MLP, each after a norm. No drop-path, no layer scale."""

    is_transformer_block = True
    kept_in_float32 = ("norm1", "norm2")

    def __init__(self, dim: int, num_heads: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, hidden_dim=mlp_dim, bias=True)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Add both branches to the tokens."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def _init_weights(module: nn.Module) -> None:
    """Linear and convolution weights N(0, 0.02), biases 0, norms the identity.

    The published code truncates at +-2, which is 100 standard deviations, and undoes the rescaling of deep layers that
    its constructors ask for by initialising a second time.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.normal_(part.weight, std=WEIGHT_STD)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()


class Encoder(Backbone):
    """The ViT of I-JEPA: patches with frozen positions, no class token, no registers, a norm at the end.

    Args:
        grid_size: rows and columns of patches of the images that it is trained on, or one number for a square.
        patch_size: side of a patch, pixels.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden channels of the MLPs; None for 4 x `embed_dim`.
        in_chans: bands of the images.
        normalisation: what they go through before; see `Backbone.use_normalisation`.

    Raises: UserError if the sizes do not fit together.
    """

    card_text = CardText(
        method="I-JEPA",
        tag="ijepa",
        files="`ijepa.py`, `model.py`, `weights.py` and `utils.py`",
        module="ijepa",
        about="""\
A vision transformer of {parameters:.0f}M parameters, width {width}, {depth} blocks and patches of {patch} pixels,
pretrained without labels by I-JEPA, *Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture* ([arXiv:2301.08243](https://arxiv.org/abs/2301.08243)): from a part of an image, a student predicts a
teacher's features of others; or by StoP, *Stochastic Positional Embeddings Improve Masked Image Modeling*
([arXiv:2308.00566](https://arxiv.org/abs/2308.00566)), which blurs where these are.""",
        citation="""\
@inproceedings{assran2023ijepa,
  title     = {Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture},
  author    = {Assran, Mahmoud and Duval, Quentin and Misra, Ishan and Bojanowski, Piotr and Vincent, Pascal and
               Rabbat, Michael and LeCun, Yann and Ballas, Nicolas},
  booktitle = {CVPR},
  year      = {2023}
}

@inproceedings{bar2024stop,
  title     = {Stochastic Positional Embeddings Improve Masked Image Modeling},
  author    = {Bar, Amir and Bordes, Florian and Shocher, Assaf and Assran, Mahmoud and Vincent, Pascal and
               Ballas, Nicolas and Darrell, Trevor and Globerson, Amir and LeCun, Yann},
  booktitle = {ICML},
  year      = {2024}
}""",
    )
    row_first = False
    kept_in_float32 = ("pos_embed", "norm")
    forward_methods = ("encode", "get_intermediate_layers")
    n_registers = num_prefix_tokens = 0

    def __init__(
        self,
        *,
        grid_size: int | Sequence[int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int | None = None,
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
        }
        self.grid_size = both_sides(grid_size)
        self.patch_size, self.embed_dim, self.n_blocks, self.in_chans = patch_size, embed_dim, depth, in_chans
        self.use_normalisation(normalisation)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), embed_dim), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: also those that come uninitialised from the meta device."""
        self.pos_embed.copy_(sincos_table(self.grid_size, self.embed_dim))
        _init_weights(self)

    def encode(
        self, images: Float[Tensor, "b ch h w"], context_indices: Int[Tensor, "c b v"] | None = None
    ) -> Float[Tensor, "cb v d"]:
        """Features of the patches that are given, or of all.

        Args:
            images: normalised; both sides must be multiples of the patch size. Where the grid is another one than that
                of training, positions are resized bicubically.
            context_indices: positions of the patches that take part, of c masks for each image; other patches are not
                seen. None shows all.

        Returns: tokens after the final norm, [c*b, v, d], mask-major; without masks [b, n, d].
        """
        x = self._embed(images)
        if context_indices is not None:
            x = gather_patches(x, context_indices)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _embed(self, images: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b n d"]:
        grid = patch_grid(images, self.patch_size)
        positions = resize_positions(self.pos_embed, grid, antialias=False, own_grid=self.grid_size)
        return self.patch_embed(images) + positions

    def _run_encoder(
        self, x: Float[Tensor, "b ch h w"], blocks: Sequence[int], *, stop_early: bool
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b n d"]]]:
        tokens, chosen = self._embed(x), []
        for index, block in enumerate(self.blocks[: max(blocks) + 1 if stop_early else None]):
            tokens = block(tokens)
            if index in blocks:
                chosen.append(tokens)
        return tokens, chosen

    def _final_norm(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.norm(tokens)

    def forward(self, images: Float[Tensor, "b ch h w"]) -> Features:
        """Features of whole images, for evaluation: `global_repr` is the mean over patches, there are no registers."""
        tokens = self.encode(images)
        feature_map = tokens.unflatten(1, patch_grid(images, self.patch_size))
        return Features(tokens.mean(dim=1), tokens[:, :0], feature_map)


class Predictor(nn.Module):
    """Predicts the features of target patches from those of the context, every target block by itself.

    Args:
        grid_size: as the encoder's.
        encoder_dim: channels of the encoder.
        embed_dim: channels within the predictor, 384 in the paper.
        depth: number of blocks.
        num_heads: attention heads; those of the encoder in the paper, whatever `embed_dim` is.

    Raises: UserError if the sizes do not fit together.
    """

    row_first = False
    kept_in_float32 = ("predictor_pos_embed", "mask_token", "predictor_norm")

    def __init__(
        self, *, grid_size: int | Sequence[int], encoder_dim: int, embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.grid_size, self.embed_dim = both_sides(grid_size), embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        num_patches = math.prod(self.grid_size)
        self.predictor_pos_embed = nn.Parameter(torch.empty(1, num_patches, embed_dim), requires_grad=False)
        self.predictor_embed = nn.Linear(encoder_dim, embed_dim)
        self.predictor_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(embed_dim, encoder_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: also those that come uninitialised from the meta device."""
        self.predictor_pos_embed.copy_(sincos_table(self.grid_size, self.embed_dim))
        nn.init.normal_(self.mask_token, std=WEIGHT_STD)
        _init_weights(self)

    def forward(
        self,
        context: Float[Tensor, "cb v d"],
        context_indices: Int[Tensor, "c b v"],
        target_indices: Int[Tensor, "t b m"],
        noise: Float[Tensor, "tcb m d"] | None = None,
    ) -> Float[Tensor, "tcb m d"]:
        """Predict the features at the target positions.

        Targets of one block attend to the context and to each other, never to another block.

        Args:
            context: what the encoder made of the context patches.
            context_indices: where these are, of c masks for each image.
            target_indices: where the targets are, of t blocks for each image.
            noise: StoP, equation 5: with it the positions of targets are stochastic. Noise of the encoder's width goes
                through the projection of the context tokens, whose bias takes the place of the mask token: tied
                weights, so that learning cannot shrink the noise alone. The published code's default is normal with
                standard deviation 0.25. None for I-JEPA: mask token and position.

        Returns: predictions in the order block, context, image.
        """
        (num_contexts, _, _), (num_blocks, _, _) = context_indices.shape, target_indices.shape
        table = self.predictor_pos_embed
        x = self.predictor_embed(context) + gather_patches(table, context_indices)
        per_block = gather_patches(table, target_indices).unflatten(0, target_indices.shape[:2])
        positions = per_block.repeat_interleave(num_contexts, dim=0).flatten(0, 1)
        queries = positions + (self.mask_token if noise is None else self.predictor_embed(noise))
        x = torch.cat([x.repeat(num_blocks, 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -target_indices.shape[2] :]))


def load_model(
    config_path: str | Path | None = None,
    pretrained_weights: str | Path | None = None,
    encoder: str = "target_encoder",
    num_heads: int | None = None,
    normalisation: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Build an encoder and load its weights: the model loader that evaluations call.

    Args:
        config_path: training configuration. None: the file of the same name beside the weights, as exports have it.
        pretrained_weights: path or URL: an export of a training, or a published `.pth.tar`. None gives random
            weights to what `config_path` describes.
        encoder: which encoder of a published file; the paper evaluates the target encoder.
        num_heads: what no shape tells; None asks the configuration.
        normalisation: what images go through before, see `Backbone.use_normalisation`; None asks the configuration, if
            there is one.
        device: where to put the model.

    Returns: the model in eval mode.
    Raises: UserError for a missing file, weights that do not fit, naming the keys, or if nothing tells `num_heads`.
    """
    if pretrained_weights is None:
        return untrained_encoder(Encoder, DEFAULT_CONFIG, config_path, num_heads).to(device).eval()
    source = str(pretrained_weights)
    weights = read_encoder(read_state_dict(source), source, encoder)
    if num_heads is None:
        known = "16 for ViT-L, H and g, 12 for ViT-B"
        num_heads = int(configuration_with_heads(config_path, source, known)["model"]["num_heads"])
    sizes = {**encoder_sizes(weights, source, row_first=Encoder.row_first), "num_heads": num_heads}
    if normalisation is None:
        normalisation = normalisation_beside(config_path, source)
    model = Encoder(**sizes, normalisation=normalisation)
    load_strictly(model, weights, source, remedy="Give weights of I-JEPA or StoP")
    return model.to(device).eval()


def read_encoder(file: Mapping[str, Any], source: str, encoder: str = "target_encoder") -> dict[str, Tensor]:
    """The encoder's weights of a file, by their published names.

    Args:
        file: what was read: an export of a training, or what the authors publish.
        source: where it is from, for messages.
        encoder: `encoder` or `target_encoder`, of a published file.

    Raises: UserError if the file is neither, such as weights of another method.
    """
    if encoder not in ("encoder", "target_encoder"):
        raise UserError(f"encoder={encoder!r} must be one of encoder, target_encoder")
    weights = published_part(file, encoder) if encoder in file else backbone_part(file, source)
    if "pos_embed" not in weights or "patch_embed.proj.weight" not in weights:
        raise UserError(
            f"{source!r} holds no encoder of I-JEPA or StoP: pos_embed and patch_embed.proj.weight are missing among "
            f"{', '.join(sorted(weights)[:3])}, ...; give weights of this method"
        )
    return weights


def published_part(file: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """One of the `PUBLISHED_PARTS` of a published file, without the prefix that its keys have."""
    return {key.removeprefix("module."): value for key, value in file[part].items()}


def as_exported(file: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The weights of a published file as a training exports them; those of an export as they are.

    Args:
        file: what was read.
        model: one of `EXPORTED_AS`.
    """
    parts = {prefix: part for prefix, part in EXPORTED_AS[model].items() if part in file}
    if not parts:
        return dict(file)
    return {
        f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in published_part(file, part).items()
    }


def as_published(models: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, dict[str, Tensor]]:
    """What programs of the authors read, of all `EXPORTED_AS`: weights alone, without what continues a training."""
    return {
        part: {f"module.{key}": value for key, value in models[model][prefix].state_dict().items()}
        for model, parts in EXPORTED_AS.items()
        for prefix, part in parts.items()
    }


def published_moments(file: Mapping[str, Any], source: str) -> dict[str, dict[str, Tensor]]:
    """What the AdamW of a published file keeps of each parameter, by the names that exports have.

    The file only numbers parameters. They are in four groups: those of encoder and predictor that decay, then those
    that do not, which are biases and all others with one axis; within a group they stand as in the state dicts of the
    file, in which I-JEPA and StoP order mask token and table differently. Tables have a number and nothing else, nor
    has the mask token of StoP. Numbers and shapes are compared; were two parameters of one group and shape exchanged,
    nothing in the file would tell.

    Args:
        file: what was read.
        source: where it is from, for messages.

    Returns: for each parameter that was updated its `step`, `exp_avg` and `exp_avg_sq`.
    Raises: UserError if the file holds no such optimizer.
    """
    groups = [
        [
            f"{prefix}.{key}"
            for key, value in published_part(file, part).items()
            if ("bias" not in key and value.ndim > 1) == decays
        ]
        for decays in (True, False)
        for prefix, part in EXPORTED_AS["student"].items()
        if part in file
    ]
    try:
        state = file["opt"]["state"]
        numbers = [group["params"] for group in file["opt"]["param_groups"]]
        sizes = [len(group) for group in numbers]
        known = {
            number: {key: torch.as_tensor(own[key]) for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, own in state.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"train.init_optimizer=true: {source!r} holds no AdamW under opt; set it to false, or give a file as the "
            "authors publish it"
        ) from error
    if sizes != [len(group) for group in groups]:
        raise UserError(
            f"train.init_optimizer=true: the optimizer in {source!r} has groups of {sizes} parameters, its encoder and "
            f"predictor have {[len(group) for group in groups]}; set it to false, or give a file as the authors "
            "publish it"
        )
    names = zip(itertools.chain(*numbers), itertools.chain(*groups), strict=True)
    return {name: known[number] for number, name in names if number in known}


__model_loader__ = load_model  # the name that evaluation scripts look for in a model file
__trained_by__ = "train_ijepa.py"  # the file beside this one that has the predictor, for pictures
