"""Pretrain CAE (arXiv:2202.03026): from the visible patches of an image, regress the latents of hidden ones, and from
these their visual tokens.

    python train_cae.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue where a run stopped
    python train_cae.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python train_cae.py config.yaml train.output_dir=DIR --export    write student.pth of a run

Later files and overrides win over earlier ones, and all over default_cae_config.yaml. The tokens are those of a frozen
tokenizer, `tokenizer.path`: DALL-E's, or one that cae_tokenizer.py made.
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from baselines import starting
from cae import (
    DEFAULT_CONFIG,
    Encoder,
    Predictor,
    alignment_loss,
    read_encoder,
    read_file,
    read_predictor,
    token_loss,
)
from cae_tokenizer import Tokenizer, load_tokenizer
from checkpoint import SavedState, read_weights
from config import (
    BETWEEN_0_AND_1,
    COUNT,
    LATER_KEYS,
    NOT_NEGATIVE,
    EpochsConfig,
    EpochsImagesConfig,
    EpochsOptimConfig,
    PretrainingImagesConfig,
    StartConfig,
    ViTConfig,
    load_config,
    one_of,
    require,
    require_whole_patches,
    section_of,
    within,
)
from data import Batch, PretrainLoader
from distributed import mean_over_ranks, world_size
from flops import block_flops, embedding_flops
from keys import answer
from masking import MaskPlan, PatchMasks, ScatteredBlocks, Uniform
from metrics import feature_health
from model import draw_drop_path, load_resized
from optim import decay_of_matrices, in_parts, make_adamw, moments_bytes, part_of, scheduled, set_rates_, started_rates
from pictures import PatchPredictor, Prediction
from reading.crops import View
from report import Panel
from sheets import Column, as_rgb, mark, mask_column
from training import (
    Run,
    TrainState,
    describe,
    length_words,
    milestones,
    run_command,
    sent_to,
    warn_of_another_course,
    weights_to_start_from,
    with_length,
)
from utils import Bands, UserError, as_typed, as_written, both_sides, ending_in_words, setup_logging
from weights import is_downloaded, local_path, spread_over_bands

logger = logging.getLogger("capi")

COURSE_KEYS = (
    "optim",
    "data.mask_ratio",
    "data.masking_generator",
    "data.min_block",
    "data.min_aspect",
    "tokenizer.path",
    "tokenizer.image_size",
    "cae",
)
"""What the rest of a training depends on: a change when it continues is a warning."""
FINITE = ("loss", "grad_norm")
"""Scalars of a step that must be finite."""
NETWORKS = "Set model.*, regressor.* and decoder.* to what they were trained with"

# --- Knobs: the sections of the configuration that are this method's own ---------------------------------------------


@dataclass(frozen=True)
class EncoderConfig(ViTConfig):
    """Arguments of `cae.Encoder`."""

    layer_scale: float = field(metadata=NOT_NEGATIVE)
    """By what branches of the encoder are multiplied at the beginning: 0.1 for ViT-B, 1e-5 for ViT-L."""
    drop_path_rate: float = field(metadata=within(at_least=0, below=1))
    """Probability that a branch of the last block is dropped, image by image, 0.1; 0 at the first block, linear between
    them. So it is in the encoder, also where it makes the targets, in the regressor and in the decoder."""


@dataclass(frozen=True)
class RegressorConfig:
    """The latent context regressor; the decoder has its width, heads and layer scale."""

    embed_dim: int = field(metadata=COUNT)
    """Channels. Other than the encoder's, a linear layer and a norm stand between."""
    depth: int = field(metadata=COUNT)
    """Blocks."""
    num_heads: int = field(metadata=COUNT)
    """Attention heads, of embed_dim // num_heads channels each; a rest is left out, as published."""
    layer_scale: float = field(metadata=NOT_NEGATIVE)
    """As the encoder's; 0.1, also where that has another one."""

    def __post_init__(self) -> None:
        """Check that positions and heads fit the channels."""
        remedy = "must be a multiple of 4: sine and cosine of row and column"
        require(self.embed_dim % 4 == 0, "regressor.embed_dim", self.embed_dim, remedy)
        remedy = f"must be at most regressor.embed_dim={self.embed_dim}"
        require(self.num_heads <= self.embed_dim, "regressor.num_heads", self.num_heads, remedy)


@dataclass(frozen=True)
class DecoderConfig:
    """From regressed latents to tokens."""

    depth: int = field(metadata=COUNT)
    """Blocks."""
    vocabulary_size: int = field(metadata=within(at_least=2))
    """How many tokens the tokenizer tells apart; 8192 for DALL-E's."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The frozen tokenizer, whose tokens of the hidden patches are predicted. Its weights are in no checkpoint."""

    path: str
    """File or address: DALL-E's encoder, or what cae_tokenizer.py wrote."""
    image_size: int | tuple[int, int] = field(metadata=COUNT)
    """Its view of a crop in pixels, a side or [height, width] as data.images_size, so that it gives one token for each
    patch: DALL-E's has patches of 8."""
    description: str | None
    """What it is; written by the training, for those who read the configuration beside an export. Never read by it."""

    def __post_init__(self) -> None:
        """Write squares as one number."""
        object.__setattr__(self, "image_size", as_written(self.image_size))


@dataclass(frozen=True)
class CaeMethodConfig:
    """What is learned."""

    alignment_weight: float = field(metadata=NOT_NEGATIVE)
    """By what the squared distance between regressed latents and the encoder's own is multiplied, 2; the cross-entropy
    of the tokens counts once."""


@dataclass(frozen=True)
class CaeOptimConfig(EpochsOptimConfig):
    """Length, batch, and the optimizer."""

    start: StartConfig
    weight_decay: float = field(metadata=NOT_NEGATIVE)
    """Of matrices, convolution, class token and mask token, 0.05. Biases, norms and layer scales have none."""

    def check_length(self) -> None:
        """Raise unless what is counted in steps fits into total_iters."""
        super().check_length()
        self.start.check(self.total_iters)


@dataclass(frozen=True)
class CaeDataConfig(PretrainingImagesConfig, EpochsImagesConfig):
    """Images, crops and masks."""

    mask_ratio: float = field(metadata=BETWEEN_0_AND_1)
    """Fraction of the patches that is hidden, 0.5: exactly as many in every image."""
    masking_generator: str = field(metadata=one_of("ScatteredBlocks", "Uniform"))
    """ScatteredBlocks (blocks of random sizes, as published) or Uniform; see masking.py."""
    min_block: int = field(metadata=COUNT)
    """Smallest area of a block, patches, 16."""
    min_aspect: float = field(metadata=within(above=0, at_most=1))
    """Smallest height / width of a block, 0.3; its inverse is the largest."""

    def __post_init__(self) -> None:
        """Check that the GPU is not asked for what it does not do."""
        super().__post_init__()
        remedy = "the tokenizer's view of a crop is not made there; use data.decode=cpu"
        require(self.decode == "cpu", "data.decode", self.decode, remedy)


@dataclass(frozen=True)
class CaeConfig(EpochsConfig):
    """Everything `train_cae.py` reads."""

    EXPORTS: ClassVar[tuple[str, ...]] = ("student",)

    optim: CaeOptimConfig
    data: CaeDataConfig
    model: EncoderConfig
    regressor: RegressorConfig
    decoder: DecoderConfig
    tokenizer: TokenizerConfig
    cae: CaeMethodConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        require_whole_patches(self.data, self.model.patch_size)
        remedy = "there is no teacher with weights of its own; set it to false"
        require(not self.efficiency.teacher_fp8, "efficiency.teacher_fp8", self.efficiency.teacher_fp8, remedy)

    def as_trained(self, saved: Mapping[str, Any]) -> Self:
        """Also with what its tokenizer was, which need not be there any more."""
        cfg, description = super().as_trained(saved), section_of(saved, "tokenizer").get("description")
        return replace(cfg, tokenizer=replace(cfg.tokenizer, description=description or cfg.tokenizer.description))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of a crop."""
        return self.data.grid(self.model.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return math.prod(self.grid_size)

    def make_encoder(self) -> Encoder:
        """The encoder that this describes."""
        return Encoder(grid_size=self.grid_size, **asdict(self.model))

    def make_predictor(self) -> Predictor:
        """The predictor that this describes."""
        return Predictor(
            grid_size=self.grid_size,
            encoder_dim=self.model.embed_dim,
            embed_dim=self.regressor.embed_dim,
            regressor_depth=self.regressor.depth,
            decoder_depth=self.decoder.depth,
            num_heads=self.regressor.num_heads,
            vocabulary_size=self.decoder.vocabulary_size,
            layer_scale=self.regressor.layer_scale,
            drop_path_rate=self.model.drop_path_rate,
        )


def with_tokenizer(cfg: CaeConfig, description: str) -> CaeConfig:
    """The configuration that says what its tokenizer is, for whoever reads it beside checkpoints and exports."""
    return replace(cfg, tokenizer=replace(cfg.tokenizer, description=description))


def lr_at(step: int, cfg: CaeConfig) -> float:
    """Learning rate of the update after `step` finished ones. Pure, so a resumed run has nothing to restore."""
    return scheduled(cfg.optim.lr_schedule, step, cfg.optim.total_iters)


# --- State and step --------------------------------------------------------------------------------------------------


class DropPaths(NamedTuple):
    """What `model.draw_drop_path` drew for a forward pass; None where nothing is dropped."""

    targets: Float[Tensor, "layers 2 b"] | None
    """Of the encoder on the hidden patches, which drops branches where it makes targets too, as published."""
    context: Float[Tensor, "layers 2 b"] | None
    """Of the encoder on the visible patches."""
    predictor: Float[Tensor, "layers 2 b"] | None


def do_teacher(
    encoder: Encoder,
    images: Float[Tensor, "b c h w"],
    predict_indices: Int[Tensor, " bm"],
    drop_path: Float[Tensor, "layers 2 b"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "b m d"]:
    """Targets: what the encoder itself makes of the hidden patches when it sees nothing else."""
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return encoder.encode(images, predict_indices, drop_path)[:, 1:]


def do_student(
    student: nn.ModuleDict,
    images: Float[Tensor, "b c h w"],
    visible_indices: Int[Tensor, " bv"],
    predict_indices: Int[Tensor, " bm"],
    targets: Float[Tensor, "b m d"],
    token_ids: Int[Tensor, " bm"],
    context_drop_path: Float[Tensor, "layers 2 b"] | None,
    predictor_drop_path: Float[Tensor, "layers 2 b"] | None,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy of the tokens, and squared distance of the latents, of the hidden patches."""
    encoder: Any = student["backbone"]
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        context = encoder.encode(images, visible_indices, context_drop_path)[:, 1:]
        prediction = student["predictor"](context, targets, visible_indices, predict_indices, predictor_drop_path)
    return token_loss(prediction.logits, token_ids), alignment_loss(prediction.latents, prediction.targets)


class CaeState(TrainState[CaeConfig]):
    """Everything a checkpoint holds.

    Modules: `student` {backbone, predictor}. There is no average of it; the backbone makes its own targets. A training
    adds the part `tokenizer`.
    """

    MODEL_KEYS = (
        *(f"model.{name}" for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_dim")),
        *(f"regressor.{name}" for name in ("embed_dim", "depth", "num_heads")),
        "decoder",
        "data.images_size",
    )
    LATER_KEYS: ClassVar[dict[str, Any]] = {**LATER_KEYS, "model": {"in_chans": 3}}

    def __init__(
        self, cfg: CaeConfig, device: torch.device, *, plain: bool = False, init_from: str | None = None
    ) -> None:
        super().__init__(cfg, device, plain=plain)
        self.student = self.place(
            lambda: nn.ModuleDict({"backbone": cfg.make_encoder(), "predictor": cfg.make_predictor()}),
            "do_student",
            load=None if init_from is None else functools.partial(start_from, path_or_url=init_from),
        )
        self.modules = {"student": self.student}
        self.do_teacher = self.compile(do_teacher, "do_teacher")
        self.do_student = self.compile(do_student, "do_student")
        by_name = in_parts(decay_of_matrices(self.student), part_of, cfg.optim.start)
        self.optimizer = make_adamw(self.student, cfg.optim.optimizer, cfg.optim.betas, by_name)
        self.optimizers = {"student": (self.student, self.optimizer)}

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The encoder's patch features, not compiled and without drop-path, for batches of any size."""
        encoder: Any = self.student["backbone"]
        with torch.no_grad(), torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return encoder.encode(images)[:, 1:]

    def draw_drop_paths(self, forward_pass: int, num_images: int) -> DropPaths:
        """What is dropped in one of an update's forward passes; see `TrainState.seed_of`."""
        encoder, predictor = self.student["backbone"], self.student["predictor"]
        generator = torch.Generator().manual_seed(self.seed_of("drop-path", forward_pass))
        drawn = (
            draw_drop_path(module.drop_path_rates, num_images, generator)  # pyright: ignore[reportArgumentType]
            for module in (encoder, encoder, predictor)
        )
        return DropPaths(*(None if factors is None else sent_to(self.device, factors) for factors in drawn))


def start_from(student: nn.ModuleDict, path_or_url: str) -> None:
    """Copy the weights of `train.init_from` into a fresh student, and say what stays random.

    That is the predictor, if the file lacks it: an export of the encoder, or what the authors publish, or the encoder
    of another method.

    Raises: UserError if the weights do not fit.
    """
    file = read_file(path_or_url, key="train.init_from")
    encoder: Any = student["backbone"]
    vit = starting.read(file, path_or_url, encoder)
    if vit is None:
        parts = {"backbone": read_encoder(file, path_or_url), "predictor": read_predictor(file)}
    else:
        parts = {"backbone": starting.fit(vit, encoder, grid=encoder.grid_size), "predictor": {}}
    for name, weights in parts.items():
        if weights:
            fitting = spread_over_bands(weights, student[name])
            load_resized(student[name], fitting, path_or_url, remedy=NETWORKS)
    random = "" if parts["predictor"] else "; regressor and decoder, which the file lacks, start random"
    logger.info("the training starts from %s%s", path_or_url, random)


def token_ids_at(tokenizer: Tokenizer, batch: Batch) -> Int[Tensor, " bm"]:
    """The tokens of the hidden patches of a batch, image-major."""
    assert batch.second_images is not None
    images = batch.second_images.to(torch.float32, memory_format=torch.contiguous_format)
    if not batch.second_images.is_floating_point():
        images = images.div_(255)
    return tokenizer(images).flatten()[batch.masks["predict_indices"]]


def train_step(
    state: CaeState, tokenizer: Tokenizer, batches: Sequence[Batch], lr: float, *, with_health: bool = False
) -> dict[str, Tensor]:
    """One update. Returns detached scalars, still on the device.

    Args:
        state: changed in place.
        tokenizer: of the second images.
        batches: normalised images, second images and indices of the accumulation steps, on the device.
        lr: learning rate of this update.
        with_health: also compute effective rank, norms and spread of the targets.
    """
    cfg = state.cfg
    of_parts = started_rates(state.step, cfg.optim.start, cfg.optim.total_iters)
    set_rates_(state.optimizer, lr, cfg.optim.weight_decay, of_parts)
    state.zero_grad()
    sums = {name: torch.zeros((), device=state.device) for name in ("loss", "token_loss", "alignment_loss")}
    targets: list[Tensor] = []
    for forward_pass, batch in enumerate(batches):
        visible_indices, predict_indices = (batch.masks[f"{name}_indices"] for name in ("visible", "predict"))
        drop_paths = state.draw_drop_paths(forward_pass, len(batch.images))
        encoder = state.student["backbone"]
        targets.append(state.do_teacher(encoder, batch.images, predict_indices, drop_paths.targets, state.dtype))
        token, distance = state.do_student(
            state.student,
            batch.images,
            visible_indices,
            predict_indices,
            targets[-1],
            token_ids_at(tokenizer, batch),
            drop_paths.context,
            drop_paths.predictor,
            state.dtype,
        )
        alignment = cfg.cae.alignment_weight * distance
        loss = token + alignment
        state.backward(loss / len(batches))
        for name, value in zip(sums, (loss, token, alignment), strict=True):
            sums[name] += value.detach() / len(batches)
    if with_health:
        sums |= feature_health(torch.cat(targets))
    _, norms = state.apply_gradients()
    return mean_over_ranks(sums) | norms


def panels(cfg: CaeConfig) -> list[Panel]:
    """The curves of a training's metrics that its reports show."""
    losses = {"token_loss": "tokens (cross-entropy, nats)", "alignment_loss": "alignment, with its weight"}
    log_k = math.log(cfg.decoder.vocabulary_size)
    return [
        Panel("Losses", "loss", losses, mark=("log of the vocabulary: knows nothing", log_k)),
        Panel("Effective rank of the targets", "dimensions", {"teacher_rank": ""}),
        Panel("Norms of the targets", "norm", {"feature_norm_median": "median", "feature_norm_max": "max"}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Schedule", "learning rate", {"lr": ""}),
    ]


# --- The run ---------------------------------------------------------------------------------------------------------


def train(cfg: CaeConfig, output_dir: Path, device: torch.device) -> None:
    """Train up to `optim.total_iters` finished updates, or until a signal; continue what is in `output_dir`."""
    cfg = with_length(cfg)
    tokenizer = open_tokenizer(cfg, device)
    cfg = with_tokenizer(cfg, tokenizer.description)
    state = CaeState(cfg, device, init_from=weights_to_start_from(cfg, output_dir))
    state.parts["tokenizer"] = SameTokenizer(tokenizer.description)
    with Run(
        cfg,
        state,
        output_dir,
        make_loader=functools.partial(make_loader, cfg),
        encode=state.encode,
        log_line=log_line,
        finite=FINITE,
        look=functools.partial(look, cfg),
        panels=panels(cfg),
        flops_per_image=step_flops_per_image(cfg),
        opening=f"{opening(cfg, state)}; {tokenizer.description}",
        on_resume=functools.partial(warn_if_changed, cfg=cfg),
    ) as run:
        while not run.is_over():
            lr = lr_at(state.step, cfg)
            scalars = train_step(state, tokenizer, run.next_batches(), lr, with_health=run.looks_at_health)
            state.step += 1
            run.count(scalars, {"lr": lr})
            run.log()
            run.save()
            run.evaluate()
    run.export()


def open_tokenizer(cfg: CaeConfig, device: torch.device) -> Tokenizer:
    """The tokenizer of the configuration, on the device.

    Raises: UserError if it cannot be read, or has another grid or vocabulary than the student.
    """
    section = cfg.tokenizer
    tokenizer = load_tokenizer(section.path, image_size=section.image_size, device=device, key="tokenizer.path")
    own, grid = tokenizer.grid_size, cfg.grid_size
    if own != grid:
        fitting = as_typed([length * tokenizer.patch_size for length in grid])
        raise UserError(
            f"tokenizer.image_size={as_typed(section.image_size)}: it gives {own[0]} x {own[1]} tokens, and images "
            f"have {grid[0]} x {grid[1]} patches; use {fitting}, or another data.images_size or model.patch_size"
        )
    require(
        tokenizer.vocabulary_size == cfg.decoder.vocabulary_size,
        "decoder.vocabulary_size",
        cfg.decoder.vocabulary_size,
        f"tokenizer.path={section.path!r} has {tokenizer.vocabulary_size} tokens; use that number",
    )
    known = tokenizer.bands or Bands(3, cfg.data.bands.value_range)
    if known != cfg.data.bands:
        raise UserError(
            f"tokenizer.path={section.path!r} is of images of {known}, and this training of {cfg.data.bands}: make one "
            "with cae_tokenizer.py of a model of these bands, or set model.in_chans and data.value_range as there"
        )
    return tokenizer


@dataclass
class SameTokenizer:
    """Of which tokenizer a training is, in its checkpoints."""

    description: str

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps."""
        return {"description": self.description}

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Raise UserError if the checkpoint is of a training with another tokenizer: its ids mean something else."""
        if saved["description"] != self.description:
            raise UserError(
                f"tokenizer.path: this is {self.description}, but the checkpoint was trained with "
                f"{saved['description']}; give that one, or start anew in another train.output_dir, with "
                "train.init_from for the weights"
            )


def make_loader(cfg: CaeConfig, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`.

    Raises: UserError if data or masks do not fit the configuration.
    """
    return PretrainLoader(
        cfg.data,
        make_masks(cfg),
        seed=cfg.train.seed,
        batch_size=cfg.optim.batch_size_per_gpu,
        num_workers=cfg.efficiency.dataloader_num_workers,
        keep_listing=cfg.efficiency.cache_dataset,
        second_view=View(both_sides(cfg.tokenizer.image_size), "lanczos"),
        **place,
    )


def make_masks(cfg: CaeConfig, seed: int | None = None) -> PatchMasks:
    """How patches are hidden: as many in every image, all of which are predicted; by `seed` instead of the training's.

    Raises: UserError if that leaves nothing to see or to predict, or blocks do not fit the grid.
    """
    data = cfg.data
    plan = MaskPlan(*cfg.grid_size, data.mask_ratio, prediction_subsampling=1.0)
    is_uniform = data.masking_generator == "Uniform"
    masks = PatchMasks(
        plan,
        Uniform() if is_uniform else ScatteredBlocks(data.min_block, data.min_aspect),
        cfg.train.seed if seed is None else seed,
    )
    masks([(image,) for image in range(8)])  # raises early
    return masks


def look(cfg: CaeConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet shows beside crops: their masks."""
    images, patch_size = batch.images[:num_images], cfg.model.patch_size
    visible, predicted = (mark(images, patch_size, batch.masks[f"{name}_indices"]) for name in ("visible", "predict"))
    assert batch.second_images is not None
    return [
        mask_column(images, visible, predicted),
        Column("for the tokenizer", as_rgb(batch.second_images[:num_images])),
    ]


def warn_if_changed(saved: SavedState, cfg: CaeConfig) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint."""
    warn_of_another_course(saved, cfg, COURSE_KEYS, lambda step, cfg: {"learning rate": lr_at(step, cfg)})


def step_flops_per_image(cfg: CaeConfig) -> float:
    """Model FLOPs of one step per image: matmuls alone, recomputation not counted, a backward pass as two forward ones.

    The tokenizer is not counted.
    """
    model, width, masks = cfg.model, cfg.regressor.embed_dim, make_masks(cfg).plan
    visible, hidden = masks.num_visible, masks.num_masked
    embedding = embedding_flops(masks.num_patches, model.patch_size, model.embed_dim, model.in_chans)
    of_encoder, of_targets = (
        model.depth * block_flops(model.embed_dim, num + 1, num + 1, model.mlp_dim) for num in (visible, hidden)
    )
    regressor = cfg.regressor.depth * block_flops(width, hidden, masks.num_patches)
    decoder = cfg.decoder.depth * block_flops(width, hidden, hidden)
    head = 2 * hidden * width * cfg.decoder.vocabulary_size
    projected = 2 * model.embed_dim * width if model.embed_dim != width else 0
    teacher = embedding + of_targets + hidden * projected
    return float(teacher + 2 * embedding + 3 * (of_encoder + visible * projected + regressor + decoder + head))


def opening(cfg: CaeConfig, state: CaeState) -> str:
    """What is trained, in a line of the log."""
    encoder, predictor = (
        sum(p.numel() for p in state.student[name].parameters()) / 1e6 for name in ("backbone", "predictor")
    )
    return (
        f"{encoder:.1f}M encoder and {predictor:.1f}M regressor and decoder parameters; {mask_words(cfg)}; "
        f"{length_words(cfg)}"
    )


def mask_words(cfg: CaeConfig) -> str:
    """How much is seen and predicted."""
    plan = make_masks(cfg).plan
    return f"{plan.num_visible} of {plan.num_patches} patches are seen, {plan.num_masked} are predicted"


def log_line(values: Mapping[str, float]) -> str:
    """How it goes, in a line of the log."""
    return f"loss {values['loss']:.4f}  tokens {values['token_loss']:.4f}  alignment {values['alignment_loss']:.4f}"


def dry_run(cfg: CaeConfig) -> str:
    """What a training with this config would be, without training: data, grid, tokens, parameters, schedule."""
    cfg = with_length(cfg)
    with torch.device("meta"):
        modules = (cfg.make_encoder(), cfg.make_predictor())
    encoder, predictor = (sum(p.numel() for p in m.parameters()) for m in modules)
    moments = sum(moments_bytes(m, cfg.optim.optimizer) for m in modules)
    state = (4 * 2 * (encoder + predictor) + moments) / world_size() / 2**30
    schedule = ["schedule     step         lr"]
    schedule += [f"             {step:<12} {lr_at(step, cfg):.3g}" for step in milestones(cfg.optim)]
    regressor = cfg.regressor
    tokenizer = path = cfg.tokenizer.path
    missing, place = [], local_path(path)
    if place.is_file():
        tokenizer = open_tokenizer(cfg, torch.device("cpu")).description
    elif is_downloaded(path):
        missing = [f"tokenizer.path={path}: the training downloads it to {str(place)!r}, or place it there by hand"]
    else:
        missing = [f"tokenizer.path={path}: there is no such file yet; cae_tokenizer.py makes one"]
    return describe(
        cfg,
        functools.partial(make_loader, cfg),
        look=functools.partial(look, cfg),
        make_state=CaeState,
        sizes=[
            f"length       {length_words(cfg)}",
            f"image        {cfg.data.size_words(cfg.model.patch_size)}",
            f"masks        {mask_words(cfg)}",
            f"tokenizer    {cfg.decoder.vocabulary_size} tokens at {as_typed(cfg.tokenizer.image_size)} px: "
            f"{tokenizer}",
            f"parameters   {encoder:,} in the encoder, {predictor:,} in regressor and decoder, of width "
            f"{regressor.embed_dim} with {regressor.num_heads} heads of {regressor.embed_dim // regressor.num_heads}",
        ],
        costs=[
            f"memory       {state:.1f} GiB per device for weights, gradients and optimizer, and activations",
            f"compute      {step_flops_per_image(cfg) / 1e12:.4f} TFLOP per image, without the tokenizer",
        ],
        schedule=schedule,
        warnings=missing,
    )


# --- For pictures ----------------------------------------------------------------------------------------------------


class LatentPredictor(PatchPredictor):
    """A student's latents of the hidden patches."""

    def __init__(self, cfg: CaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = nn.ModuleDict({"backbone": cfg.make_encoder(), "predictor": cfg.make_predictor()})

    def forward(self, image: Float[Tensor, "3 h w"], seed: int, num_draws: int) -> Prediction:
        """See `PatchPredictor.forward`; the prediction is deterministic."""
        masks = make_masks(self.cfg, seed)([(0,)])
        seen = torch.zeros(self.cfg.num_patches, dtype=torch.bool).index_fill(0, masks["visible_indices"], True)
        visible, hidden = (masks[f"{name}_indices"].to(image.device) for name in ("visible", "predict"))
        encoder: Any = self.student["backbone"]
        context = encoder.encode(image.unsqueeze(0), visible)[:, 1:]
        no_targets = context.new_zeros(1, len(hidden), context.shape[2])
        latents = self.student["predictor"](context, no_targets, visible, hidden).latents
        return Prediction(seen, hidden.cpu(), {"predicted": latents.squeeze(0)})

    def targets(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The encoder's features, in the width of the regressor."""
        predictor: Any = self.student["predictor"]
        return predictor.project(features)


def load_predictor(checkpoint: Path, resolution: int | tuple[int, int]) -> LatentPredictor:
    """The student of a training checkpoint; see `PatchPredictor`.

    Raises: UserError if it is damaged, or of another method, or images of this size have no grid.
    """
    sources = [str(checkpoint / "config.yaml"), f"data.images_size={as_typed(resolution)}"]
    predictor = LatentPredictor(load_config(CaeConfig, DEFAULT_CONFIG, sources))
    load_resized(predictor.student, read_weights(checkpoint, "student"), str(checkpoint), remedy=NETWORKS)
    return predictor


__predictor_loader__ = load_predictor  # the name that pictures of predictions look for


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, CaeConfig, [DEFAULT_CONFIG, *args.sources])
    cfg = load_config(CaeConfig, DEFAULT_CONFIG, args.sources)
    make_masks(cfg)
    return run_command(
        args,
        cfg,
        dry_run=dry_run,
        train=train,
        make_state=functools.partial(CaeState, plain=True),
        has_kernels=False,
        exporter="export.py",
    )


if __name__ == "__main__":
    sys.exit(main())
