"""Pretrain CAPI (arXiv:2502.08769): the teacher clusters patches, the student predicts the clusters of hidden ones.

    python train_capi.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue where a run stopped
    python train_capi.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python train_capi.py config.yaml train.output_dir=DIR --export    write student.pth and student_ema.pth of a run

Later files and overrides win over earlier ones, and all over default_pretrain_config.yaml.
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
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from baselines import starting
from checkpoint import SavedState, read_weights
from clustering import (
    HEADS,
    EmaHeadTargets,
    FeatureQueue,
    L2NormLinear,
    LatentHead,
    LatentTargets,
    OnlineClustering,
    batch_warning,
    entropy,
    latent_loss,
    normalized_entropy,
    normalized_latents,
    prototype_usage,
    soft_cross_entropy,
)
from config import (
    BETA,
    BETWEEN_0_AND_1,
    COUNT,
    DEFAULT_PRETRAIN_CONFIG,
    LATER_KEYS,
    NOT_NEGATIVE,
    OPTIMIZERS,
    POSITIVE,
    OptimConfig,
    PretrainingImagesConfig,
    ScheduleConfig,
    StartConfig,
    TrainingConfig,
    load_config,
    one_of,
    require,
    require_whole_patches,
    within,
)
from data import Batch, PretrainLoader
from distributed import all_reduce_sum_, mean_over_ranks, rank, world_size
from flops import StepShape, device_memory_estimate, training_flops_per_image
from fsdp import joined_along
from keys import answer
from masking import MaskPlan, PatchMasks, draw_positions, make_masking_generator
from metrics import feature_health
from model import PREDICTORS, EncoderDecoder, RotaryEmbedding
from optim import ema_update_, in_parts, make_adamw, moments_bytes, multipliers, scheduled, set_rates_, started_rates
from pictures import PatchPredictor, Prediction
from report import Panel
from sheets import Column, mark, mask_column
from training import (
    Run,
    TrainState,
    describe,
    global_batch_size,
    milestones,
    run_command,
    sent_to,
    warn_of_another_course,
    weights_to_start_from,
)
from utils import UserError, as_typed, as_written, derive_seed, ending_in_words, setup_logging
from weights import backbone_part, load_backbone_weights, load_strictly, spread_over_bands

logger = logging.getLogger("capi")

COURSE_KEYS = ("optim", "capi.student_temp", "capi.clustering_kwargs", "capi.clustering_optimizer")
"""What the rest of a training depends on: a change when it continues is a warning."""
FINITE = ("capi_loss", "grad_norm")
"""Scalars of a step that must be finite."""
FINITE_OF_CLUSTERING = ("clustering_loss", "clustering_grad_norm")
"""Those of a step that has a clustering head."""
SIZES = (
    "model.transformers_kwargs.embed_dim",
    "model.encoder_kwargs.depth",
    "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads",
    None,
)
"""Keys of width, blocks, heads and hidden channels of the encoder."""
KEEPS_ALL = "the encoder of configs/continue/capi_from_dinov3.yaml has a place for more of it"
PREDICTOR = ("decoder.", "dec_norm.", "mask_token")
"""Names of the predictor's parameters in the backbone begin with one of these."""
TARGETS = ("clustering", "ema_head", "latents")
"""What the student predicts, by the names of `capi.targets`."""

# --- Knobs: the sections of the configuration that are CAPI's own ----------------------------------------------------


@dataclass(frozen=True)
class ClusteringHeadConfig:
    """Arguments of `clustering.OnlineClustering`."""

    target_temp: float = field(metadata=POSITIVE)
    """Temperature of the Sinkhorn targets, 0.06 in the paper."""
    pred_temp: float = field(metadata=POSITIVE)
    """Temperature of the head's own prediction in the clustering loss, 0.12."""
    n_sk_iter: int = field(metadata=COUNT)
    """Sinkhorn-Knopp rounds, 3."""
    bias: bool
    """Whether the head's linear layer has a bias."""
    positionwise_sk: bool
    """True: one Sinkhorn problem per patch position (paper, section 3.2). False: one over all tokens."""


@dataclass(frozen=True)
class ClusteringOptimizerConfig:
    """The clustering head's own optimizer."""

    optimizer: str = field(metadata=one_of(*OPTIMIZERS))
    """AdamW, or AdamW8bit; see optim.optimizer."""
    betas: tuple[float, float] = field(metadata=BETA)
    """Decay per update of the averages of gradients and of their squares."""
    weight_decay: float = field(metadata=NOT_NEGATIVE)
    """Times the learning rate at each update."""
    lr_schedule: ScheduleConfig
    """Learning rate of the head."""


@dataclass(frozen=True)
class CapiMethodConfig:
    """The method: clustering and prediction."""

    num_clusters: int = field(metadata=within(at_least=2))
    """Prototypes K, 16384 in the paper. Needs a global batch that is not far smaller."""
    targets: str = field(metadata=one_of(*TARGETS))
    """clustering, as published. What the paper compares it to: ema_head, iBOT's, where the moving average of the
    student's head takes the place of the clustering head; or latents, the teacher's normalised features themselves, by
    a smooth L1 loss, which need no prototypes."""
    queue: int = field(metadata=NOT_NEGATIVE)
    """Earlier batches whose teacher features balance with those of this one, for batches that are small for the number
    of prototypes (arXiv:2006.09882, section 4); 0 in the paper. `clustering.FeatureQueue` says what it costs."""
    student_head: str = field(metadata=one_of(*HEADS))
    """linear, as published; or mlp, DINO's head with two hidden layers and a bottleneck (arXiv:2104.14294)."""
    student_temp: float = field(metadata=POSITIVE)
    """Temperature of the student's prediction, 0.12."""
    clustering_chunk: int | None = field(metadata=COUNT)
    """Patch positions clustered at a time; only memory and speed depend on it. null: chosen by memory."""
    clustering_kernel: str = field(metadata=one_of("auto", "torch", "triton", "plain"))
    """torch; triton, which has kernels of its own for GPUs; auto: triton on a GPU where it is installed, else torch; or
    plain, which has no tricks: as the paper writes it, all logits in memory at once."""
    clustering_kwargs: ClusteringHeadConfig
    clustering_optimizer: ClusteringOptimizerConfig

    def __post_init__(self) -> None:
        """Check what does not go together."""
        kernel, targets = self.clustering_kernel, self.targets
        if self.queue:
            remedy = (
                f"do not balance with the capi.queue={self.queue} batches before; use auto or plain, or capi.queue=0"
            )
            require(kernel in ("auto", "plain"), "capi.clustering_kernel", kernel, f"its kernels {remedy}")
        if targets != "clustering":
            alone = f"is for capi.targets=clustering, and this is {targets}; use"
            require(kernel in ("auto", "plain"), "capi.clustering_kernel", kernel, f"{alone} auto or plain")
            require(self.queue == 0, "capi.queue", self.queue, f"{alone} 0")
        if targets == "latents":
            remedy = "predicts prototypes, and capi.targets=latents has none; use linear"
            require(self.student_head == "linear", "capi.student_head", self.student_head, remedy)

    @property
    def clusters(self) -> bool:
        """Whether there is a clustering head."""
        return self.targets == "clustering"

    @property
    def has_kernels(self) -> bool:
        """Whether the clustering head learns by the kernels of `speed`, instead of as the paper writes it."""
        return self.clusters and self.clustering_kernel != "plain" and not self.queue


@dataclass(frozen=True)
class CapiOptimConfig(OptimConfig):
    """Batch, and the student's optimizer and schedules. Sinkhorn balances over all accumulation steps as over one
    large batch."""

    start: StartConfig
    weight_decay: float = field(metadata=NOT_NEGATIVE)
    """Times the learning rate at each update; biases and layer scales have none."""
    patch_embed_lr_mult: float = field(metadata=NOT_NEGATIVE)
    """Learning-rate multiplier of the patch embedding, 0.2."""
    rope_lr_mult: float = field(metadata=NOT_NEGATIVE)
    """Learning-rate multiplier of the rotary frequencies, 0: they stay as initialised."""
    layernorm_wd_mult: float = field(metadata=NOT_NEGATIVE)
    """Weight-decay multiplier of norm weights, 0.1."""
    momentum_schedule: ScheduleConfig
    """EMA momentum m in ema = m * ema + (1 - m) * student."""

    def __post_init__(self) -> None:
        """Check also that momentum stays an average."""
        super().__post_init__()
        for key in ("start_warmup_value", "base_value", "final_value"):
            value = getattr(self.momentum_schedule, key)
            require(value <= 1, f"optim.momentum_schedule.{key}", value, "must lie in [0, 1]")

    def check_length(self) -> None:
        """Raise unless what is counted in steps fits into total_iters."""
        super().check_length()
        self.start.check(self.total_iters)
        self.momentum_schedule.check("optim.momentum_schedule", self.total_iters)


@dataclass(frozen=True)
class CapiDataConfig(PretrainingImagesConfig):
    """Images, crops and masks."""

    mask_ratio: float = field(metadata=BETWEEN_0_AND_1)
    """Fraction of the patches that the student does not see, 0.65."""
    prediction_subsampling: float = field(metadata=within(above=0, at_most=1))
    """Fraction of the hidden patches that are predicted, 0.05 (the authors: about 0.2 is better)."""
    masking_generator: str = field(metadata=one_of("InverseBlock", "Block", "Uniform"))
    """InverseBlock (a block stays visible), Block or Uniform; see masking.py."""
    masking_generator_kwargs: dict[str, Any]
    """Arguments of the generator, `roll` for the two block kinds; null leaves one out, as Uniform needs it."""


@dataclass(frozen=True)
class RopeConfig:
    """Arguments of `model.RotaryEmbedding`."""

    max_freq: float = field(metadata=POSITIVE)
    """Highest frequency, in turns over the image."""
    min_freq: float = field(metadata=POSITIVE)
    """Lowest frequency, likewise."""

    def __post_init__(self) -> None:
        """Check the order."""
        key = "model.transformers_kwargs.block_kwargs.attn_kwargs.rope_kwargs.min_freq"
        require(self.min_freq <= self.max_freq, key, self.min_freq, f"must be at most max_freq={self.max_freq}")


@dataclass(frozen=True)
class AttentionConfig:
    """Arguments of `model.Attention`."""

    num_heads: int = field(metadata=COUNT)
    """Heads, which share the channels."""
    qkv_bias: bool
    """Whether queries, keys and values have a bias."""
    proj_bias: bool
    """Whether the projection of the result has a bias."""
    rope_kwargs: RopeConfig


@dataclass(frozen=True)
class BlockConfig:
    """Arguments of `model.Block`."""

    drop_path_type: str = field(metadata=one_of("efficient", "naive"))
    """efficient (the branch runs on a subset of the images) or naive (its result is masked)."""
    mlp_bias: bool
    """Whether the linear layers of the MLPs have a bias."""
    attn_kwargs: AttentionConfig


@dataclass(frozen=True)
class TransformersConfig:
    """What encoder and predictor share."""

    embed_dim: int = field(metadata=COUNT)
    """Channels of a token."""
    drop_path_rate: float = field(metadata=within(at_least=0, below=1))
    """Probability that a branch of a block is skipped for an image, in training."""
    block_kwargs: BlockConfig


@dataclass(frozen=True)
class DepthConfig:
    """Depth of one tower."""

    depth: int = field(metadata=COUNT)
    """Blocks."""


NORM_SWITCHES = {"RMSNorm": ("elementwise_affine",), "LayerNorm": ("elementwise_affine", "bias")}
"""Norms of torch.nn that work here, and which of their arguments are true or false."""


@dataclass(frozen=True)
class ModelConfig:
    """Arguments of `model.EncoderDecoder`."""

    patch_size: int = field(metadata=COUNT)
    """Side of a patch in pixels."""
    in_chans: int = field(metadata=COUNT)
    """Channels of the images."""
    norm_layer_type: str = field(metadata=one_of(*NORM_SWITCHES))
    """Norm of torch.nn: RMSNorm or LayerNorm."""
    norm_layer_kwargs: dict[str, Any]
    """Its arguments: eps and elementwise_affine, for LayerNorm also bias."""
    final_norm_kwargs: dict[str, Any]
    """What is different for the norm after the last block."""
    n_registers: int = field(metadata=NOT_NEGATIVE)
    """Learned tokens beside the patches, 16."""
    register_coordinates: str = field(metadata=one_of("edge", "zeros", "centre"))
    """edge (spread over the border of the image, so a multiple of 4), zeros (its corner) or centre."""
    scale_reg_to_visible: bool
    """Map the registers' coordinates into the bounding box of each image's visible patches."""
    out_layer: int = field(metadata=within())
    """Layer whose output is the feature: 0 is the embedding, -1 the last layer."""
    predictor: str = field(metadata=one_of(*PREDICTORS))
    """cross: mask tokens attend to the encoder's output, as published. split: both attend to each other, as in MAE.
    fused: mask tokens are in the encoder's input, as in BEiT and iBOT; decoder_kwargs then say nothing."""
    transformers_kwargs: TransformersConfig
    encoder_kwargs: DepthConfig
    """The encoder, which is kept."""
    decoder_kwargs: DepthConfig
    """The predictor."""

    def __post_init__(self) -> None:
        """Check the norm, and rules between sizes."""
        for key in ("norm_layer_kwargs", "final_norm_kwargs"):
            for name, value in getattr(self, key).items():
                if name == "eps":
                    remedy = "must be a number above 0, such as 1e-5"
                    is_number = isinstance(value, int | float) and not isinstance(value, bool)
                    require(is_number and 0 < value < math.inf, f"model.{key}.eps", value, remedy)
                else:
                    known = NORM_SWITCHES[self.norm_layer_type]
                    remedy = f"{self.norm_layer_type} takes eps, {' and '.join(known)}"
                    require(name in known, f"model.{key}.{name}", value, remedy)
                    require(isinstance(value, bool), f"model.{key}.{name}", value, "must be true or false")
        if self.register_coordinates == "edge":
            require(
                self.n_registers % 4 == 0,
                "model.n_registers",
                self.n_registers,
                "must be a multiple of 4 with model.register_coordinates=edge (one quarter per side); "
                "change it, or use model.register_coordinates=centre",
            )
        towers = self.transformers_kwargs
        heads = towers.block_kwargs.attn_kwargs.num_heads
        require(
            towers.embed_dim % (4 * heads) == 0,
            "model.transformers_kwargs.embed_dim",
            towers.embed_dim,
            f"must be a multiple of 4 x num_heads = {4 * heads}, so that rotary embedding can split each head in four",
        )
        depth = self.encoder_kwargs.depth
        require(
            -depth - 1 <= self.out_layer <= depth,
            "model.out_layer",
            self.out_layer,
            f"must lie in [{-depth - 1}, {depth}], as model.encoder_kwargs.depth={depth}",
        )

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `model.EncoderDecoder`."""
        return asdict(self)


@dataclass(frozen=True)
class CapiConfig(TrainingConfig):
    """Everything `train_capi.py` reads."""

    EXPORTS: ClassVar[tuple[str, ...]] = ("student_ema", "student")

    optim: CapiOptimConfig
    data: CapiDataConfig
    model: ModelConfig
    capi: CapiMethodConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        self.capi.clustering_optimizer.lr_schedule.check(
            "capi.clustering_optimizer.lr_schedule", self.optim.total_iters
        )
        require_whole_patches(self.data, self.model.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of a crop."""
        return self.data.grid(self.model.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return math.prod(self.grid_size)


@dataclass(frozen=True)
class Hyper:
    """Scheduled values of one update."""

    lr: float
    clustering_lr: float | None
    """None if there is no clustering head."""
    momentum: float
    """EMA momentum m in ema = m * ema + (1 - m) * student."""


def hyper_at(step: int, cfg: CapiConfig) -> Hyper:
    """Scheduled values of the update after `step` finished ones. Pure, so a resumed run has nothing to restore."""
    schedules = (cfg.optim.lr_schedule, cfg.capi.clustering_optimizer.lr_schedule, cfg.optim.momentum_schedule)
    hyper = Hyper(*(scheduled(schedule, step, cfg.optim.total_iters) for schedule in schedules))
    return hyper if cfg.capi.clusters else replace(hyper, clustering_lr=None)


# --- State and step --------------------------------------------------------------------------------------------------


def do_teacher(
    backbone: EncoderDecoder, images: Float[Tensor, "b c h w"], dtype: torch.dtype
) -> Float[Tensor, "b n d"]:
    """Patch features of whole images."""
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return backbone.forward_pretrain(images)[0]


def do_student(
    student: nn.ModuleDict,
    images: Float[Tensor, "b c h w"],
    visible_indices: Int[Tensor, " bv"],
    predict_indices: Int[Tensor, " bm"],
    targets: Float[Tensor, "bm k"],
    drop_path: Shaped[Tensor, "layers 2 ..."] | None,
    student_temp: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """Cross-entropy between targets and predictions at `student_temp`, or without one the loss of latents, summed over
    the predicted tokens in float64."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        backbone: Any = student["backbone"]
        _, predictions = backbone.forward_pretrain(
            images, visible_indices, predict_indices, do_prediction=True, drop_path=drop_path
        )
        predicted = student["head"](predictions)
    if student_temp is None:
        per_token = latent_loss(targets, predicted)
    else:
        per_token = soft_cross_entropy(targets, predicted, student_temp)
    return per_token.sum() if per_token.device.type == "mps" else per_token.double().sum()  # mps has no float64


class CapiState(TrainState[CapiConfig]):
    """Everything a checkpoint holds.

    Modules: `student` {backbone, head}; `student_ema`, their moving average, whose backbone is the teacher and which is
    what a run exports; `clustering`, the teacher's head, if targets are clustered; `queue`, if there is one, features
    of earlier batches.
    """

    MODEL_KEYS = (
        "model",
        *(f"capi.{key}" for key in ("num_clusters", "clustering_kwargs.bias", "targets", "queue", "student_head")),
    )
    LATER_KEYS: ClassVar[dict[str, Any]] = {
        **LATER_KEYS,
        "model": {"predictor": "cross", "transformers_kwargs": {"block_kwargs": {"mlp_bias": False}}},
        "capi": {"targets": "clustering", "queue": 0, "student_head": "linear"},
    }

    def __init__(
        self, cfg: CapiConfig, device: torch.device, *, plain: bool = False, init_from: str | None = None
    ) -> None:
        super().__init__(cfg, device, plain=plain)
        self.student = self.place(
            self._make_student,
            "do_student",
            load=None
            if init_from is None
            else functools.partial(start_from, path_or_url=init_from, grid=cfg.grid_size),
        )
        self.student_ema = self.place(self._make_student, "do_teacher", is_teacher=True)
        ema_update_(self.student_ema, self.student, 0.0)
        self.modules = {"student": self.student, "student_ema": self.student_ema}
        if cfg.capi.clusters:
            self.modules["clustering"] = self.clustering = self.place(self._make_clustering)
        self.targets = self._make_targets()
        self.queue = self._make_queue()
        if cfg.capi.queue:
            self.modules["queue"] = self.queue
        self.do_teacher = self.compile(do_teacher, "do_teacher")
        self.do_student = self.compile(do_student, "do_student")
        optim = cfg.optim
        by_name = multipliers(
            self.student,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
            rope_lr_mult=optim.rope_lr_mult,
            layernorm_wd_mult=optim.layernorm_wd_mult,
        )
        by_name = in_parts(by_name, part_of, optim.start)
        self.student_optimizer = make_adamw(self.student, optim.optimizer, optim.betas, by_name)
        self.optimizers = {"student": (self.student, self.student_optimizer)}
        if cfg.capi.clusters:
            of_head = cfg.capi.clustering_optimizer
            self.clustering_optimizer = make_adamw(self.clustering, of_head.optimizer, of_head.betas)
            self.optimizers["clustering"] = (self.clustering, self.clustering_optimizer)

    def _make_student(self) -> nn.ModuleDict:
        backbone = EncoderDecoder(**self.cfg.model.kwargs())
        if self.cfg.optim.rope_lr_mult == 0:  # they stay what they are: a gradient would be computed for nothing
            for module in backbone.modules():
                if isinstance(module, RotaryEmbedding):
                    module.requires_grad_(False)
        return with_head(backbone, self.cfg)

    def _make_clustering(self) -> OnlineClustering:
        settings, head = self.cfg.capi, make_clustering(self.cfg)
        if settings.has_kernels and not self.plain:
            from speed.clustering import learn_in_chunks

            learn_in_chunks(
                head, kernel=settings.clustering_kernel, device=self.device, chunk=settings.clustering_chunk
            )
        return head

    def _make_targets(self) -> OnlineClustering | EmaHeadTargets | LatentTargets:
        kwargs = self.cfg.capi.clustering_kwargs
        match self.cfg.capi.targets:
            case "clustering":
                return self.clustering
            case "ema_head":
                return EmaHeadTargets(
                    self.student_ema["head"],
                    target_temp=kwargs.target_temp,
                    n_sk_iter=kwargs.n_sk_iter,
                    positionwise_sk=kwargs.positionwise_sk,
                )
            case _:
                return LatentTargets()

    def _make_queue(self) -> FeatureQueue:
        cfg, optim = self.cfg, self.cfg.optim
        num_images, width = optim.batch_size_per_gpu * optim.accumulation_steps, cfg.model.transformers_kwargs.embed_dim
        rows = torch.zeros(cfg.capi.queue, num_images, cfg.num_patches, width, device=self.device)
        return FeatureQueue(joined_along(rows, 1) if cfg.capi.queue else rows)

    def check(self, saved: SavedState) -> None:
        """Raise UserError if the queue there has batches of another size."""
        optim, cfg = saved.config["optim"], self.cfg
        num_images = optim["batch_size_per_gpu"] * optim["accumulation_steps"] * saved.world_size
        before = (num_images, as_written(saved.config["data"]["images_size"]))
        now = (global_batch_size(cfg.optim), cfg.data.images_size)
        if cfg.capi.queue and before != now:
            raise UserError(
                f"capi.queue={cfg.capi.queue}: the checkpoint {str(saved.path)!r} holds features of updates of "
                f"{before[0]} images of {as_typed(before[1])} px, and those of this run have {now[0]} of "
                f"{as_typed(now[1])} px; go back to that data.images_size, and choose optim.batch_size_per_gpu and "
                "optim.accumulation_steps so that their product with the number of processes is as before. To export, "
                "use export.py"
            )

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The teacher's patch features, not compiled, for batches of any size."""
        backbone: Any = self.student_ema["backbone"]
        return do_teacher(backbone, images, self.dtype)


def with_head(backbone: EncoderDecoder, cfg: CapiConfig) -> nn.ModuleDict:
    """A student: its backbone and a fresh head."""
    return nn.ModuleDict({"backbone": backbone, "head": make_head(cfg, cfg.capi.num_clusters)})


def make_head(cfg: CapiConfig, num_clusters: int) -> nn.Module:
    """A student's head, of width `num_clusters` unless it predicts latents."""
    width = cfg.model.transformers_kwargs.embed_dim
    if cfg.capi.targets == "latents":
        return LatentHead(width, width)
    return HEADS[cfg.capi.student_head](width, num_clusters)


def make_clustering(cfg: CapiConfig) -> OnlineClustering:
    """The teacher's head."""
    width = cfg.model.transformers_kwargs.embed_dim
    return OnlineClustering(width, cfg.capi.num_clusters, **asdict(cfg.capi.clustering_kwargs))


def part_of(name: str) -> str:
    """The part of the student that a parameter belongs to, for `optim.start`."""
    if not name.startswith("backbone."):
        return "head"
    return "predictor" if name.startswith(tuple(f"backbone.{part}" for part in PREDICTOR)) else "encoder"


def start_from(student: nn.ModuleDict, path_or_url: str, grid: tuple[int, int]) -> None:
    """Copy the weights of `train.init_from` into a fresh student's backbone, and say what stays random.

    A predictor that is missing as a whole does; one that a fused student has no use for is left out. The heads stay
    random: the released weights have no clustering head, and the student's is of no use with the prototypes of another.

    Args:
        student: filled in place.
        path_or_url: what this method publishes or exports, or an encoder of another one.
        grid: rows and columns of patches of the images.

    Raises: UserError if the weights do not fit.
    """
    backbone: Any = student["backbone"]
    file = starting.read_file(path_or_url)
    vit = starting.read(file, path_or_url, backbone)
    if vit is not None:
        load_strictly(
            backbone,
            starting.fit(vit, backbone, grid=grid, keys=SIZES, hint=KEEPS_ALL),
            path_or_url,
            remedy="Give another file",
        )
        logger.info("predictor, mask token, the student's head and the clustering head start random")
        return
    weights = backbone_part(file, path_or_url)
    tower, note = PREDICTOR[:2], ""
    has_predictor = any(key.startswith("decoder.blocks.") for key in weights)
    if backbone.decoder is None and has_predictor:
        weights = {key: value for key, value in weights.items() if not key.startswith(tower)}
        note = "its predictor is left out; "
    elif not has_predictor:
        predictor = {key: x for key, x in backbone.state_dict().items() if key.startswith(PREDICTOR)}
        note = "" if predictor.keys() <= weights.keys() else "the predictor, which the file lacks, "
        weights = predictor | weights
    load_backbone_weights(backbone, spread_over_bands(weights, backbone), path_or_url)
    logger.info(
        "student, average and teacher start from %s; %sthe student's head and the clustering head start random",
        path_or_url,
        note,
    )


def train_step(
    state: CapiState, batches: Sequence[Batch], hyper: Hyper, *, with_usage: bool = False, with_health: bool = False
) -> dict[str, Tensor]:
    """One update of student, average and clustering head. Returns detached scalars, still on the device.

    Args:
        state: changed in place.
        batches: normalised images and indices of the accumulation steps, equally many images each, on the device.
        hyper: learning rates and momentum of this update.
        with_usage: also say how many prototypes are used.
        with_health: also compute effective rank and norms of the teacher's features.
    """
    cfg = state.cfg
    random = torch.Generator().manual_seed(derive_seed(cfg.train.seed, "drop-path", state.step, rank()))
    of_parts = started_rates(state.step, cfg.optim.start, cfg.optim.total_iters)
    set_rates_(state.student_optimizer, hyper.lr, cfg.optim.weight_decay, of_parts)
    if hyper.clustering_lr is not None:
        set_rates_(state.clustering_optimizer, hyper.clustering_lr, cfg.capi.clustering_optimizer.weight_decay)
    state.zero_grad()

    # Targets are balanced over the images of all accumulation steps: the same problem as one large batch.
    teacher: Any = state.student_ema["backbone"]
    features = torch.cat([state.do_teacher(teacher, batch.images, state.dtype) for batch in batches])
    images_before = range(0, len(features), len(features) // len(batches))
    predict_indices = torch.cat(
        [b.host_masks["predict_indices"] + i * features.shape[1] for b, i in zip(batches, images_before, strict=True)]
    )
    with torch.autocast(state.device.type, state.dtype, enabled=state.dtype != torch.float32):
        made = state.targets.step(
            features.transpose(0, 1),
            predict_indices,
            with_usage=with_usage,
            loss_scale=state.scaler.scale(torch.ones((), device=state.device)),
            earlier=state.queue.earlier(state.step),
        )
    state.queue.put_(features, state.step)

    student: Any = state.student["backbone"]
    capi_loss = torch.zeros((), device=state.device)
    for batch, targets in zip(batches, made.targets.chunk(len(batches)), strict=True):
        drop_path = student.draw_drop_path(len(batch.images), random)
        summed = state.do_student(
            state.student,
            batch.images,
            batch.masks["visible_indices"],
            batch.masks["predict_indices"],
            targets,
            None if drop_path is None else sent_to(state.device, drop_path),
            None if cfg.capi.targets == "latents" else cfg.capi.student_temp,
            state.dtype,
        )
        loss = summed / len(predict_indices)
        state.backward(loss)
        capi_loss = capi_loss + loss.detach()

    scalars = {"capi_loss": capi_loss, "loss": capi_loss}
    if made.loss is not None:
        scalars = {"capi_loss": capi_loss, "clustering_loss": made.loss, "loss": capi_loss + made.loss}
    if cfg.capi.targets != "latents":
        target_entropy = entropy(made.targets).mean()
        scalars["target_entropy"] = target_entropy
        scalars["target_entropy_rel"] = normalized_entropy(target_entropy, cfg.capi.num_clusters)
    if made.counts is not None and made.mass is not None:
        scalars |= prototype_usage(all_reduce_sum_(made.counts), all_reduce_sum_(made.mass))
    if with_health:
        scalars |= feature_health(features)

    updated, norms = state.apply_gradients()
    if updated:
        ema_update_(state.student_ema, state.student, hyper.momentum)
    return mean_over_ranks(scalars) | norms


def panels(num_clusters: int, targets: str = "clustering") -> list[Panel]:
    """The curves of a training's metrics that its reports show."""
    log_k = math.log(num_clusters)
    rank_and_norm = [
        Panel("Effective rank of the teacher's features", "dimensions", {"teacher_rank": ""}),
        Panel("Norm of the student's gradient", "norm", {"grad_norm": ""}),
    ]
    losses, rates = {"capi_loss": "student"}, {"lr": "learning rate, student"}
    if targets == "clustering":
        losses["clustering_loss"], rates["clustering_lr"] = "clustering head", "learning rate, clustering head"
    schedules = Panel("Schedules", "learning rate", rates, right={"momentum": "EMA momentum (right axis)"})
    if targets == "latents":
        return [Panel("Smooth L1 loss", "loss", losses), *rank_and_norm, schedules]
    usage = {"prototypes_used": "largest for some token", "prototype_perplexity": "perplexity"}
    return [
        Panel("Cross-entropy losses", "nats", losses, mark=("log K: knows nothing", log_k)),
        Panel("Entropy of the targets", "nats", {"target_entropy": ""}, whole=("fraction of log K", log_k)),
        Panel("Prototypes in use", "number", usage, mark=(f"all {num_clusters}", num_clusters)),
        *rank_and_norm,
        schedules,
    ]


# --- The run ---------------------------------------------------------------------------------------------------------


def train(cfg: CapiConfig, output_dir: Path, device: torch.device) -> None:
    """Train up to `optim.total_iters` finished updates, or until a signal; continue what is in `output_dir`."""
    state = CapiState(cfg, device, init_from=weights_to_start_from(cfg, output_dir))
    with Run(
        cfg,
        state,
        output_dir,
        make_loader=functools.partial(make_loader, cfg),
        encode=state.encode,
        log_line=functools.partial(log_line, cfg),
        finite=FINITE + (FINITE_OF_CLUSTERING if cfg.capi.clusters else ()),
        look=functools.partial(look, cfg),
        panels=panels(cfg.capi.num_clusters, cfg.capi.targets),
        flops_per_image=training_flops_per_image(step_shape(cfg)),
        opening=opening(cfg, state),
        warnings=warnings(cfg),
        on_resume=functools.partial(warn_if_changed, cfg=cfg),
    ) as run:
        while not run.is_over():
            hyper = hyper_at(state.step, cfg)
            scalars = train_step(state, run.next_batches(), hyper, with_usage=run.logs, with_health=run.looks_at_health)
            state.step += 1  # finished updates: checkpoint 3750 holds 3750
            run.count(scalars, {name: value for name, value in asdict(hyper).items() if value is not None})
            run.log()
            run.save()
            run.evaluate()
    run.export()


def make_loader(cfg: CapiConfig, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`.

    Raises: UserError if data or masks do not fit the configuration.
    """
    generator = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    return PretrainLoader(
        cfg.data,
        PatchMasks(mask_plan(cfg), generator, cfg.train.seed),
        seed=cfg.train.seed,
        batch_size=cfg.optim.batch_size_per_gpu,
        num_workers=cfg.efficiency.dataloader_num_workers,
        keep_listing=cfg.efficiency.cache_dataset,
        **place,
    )


def look(cfg: CapiConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet shows beside crops: their masks."""
    images, patch_size = batch.images[:num_images], cfg.model.patch_size
    visible, predicted = (mark(images, patch_size, batch.masks[f"{name}_indices"]) for name in ("visible", "predict"))
    return [mask_column(images, visible, predicted)]


def warn_if_changed(saved: SavedState, cfg: CapiConfig) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint."""

    def values(step: int, cfg: CapiConfig) -> dict[str, float]:
        hyper = hyper_at(step, cfg)
        head = {} if hyper.clustering_lr is None else {"that of the clustering head": hyper.clustering_lr}
        return {"learning rate": hyper.lr, **head, "EMA momentum": hyper.momentum}

    warn_of_another_course(saved, cfg, COURSE_KEYS, values)


def mask_plan(cfg: CapiConfig) -> MaskPlan:
    """How many patches are visible, hidden and predicted.

    Raises: UserError if nothing would be visible or predicted.
    """
    return MaskPlan(*cfg.grid_size, cfg.data.mask_ratio, cfg.data.prediction_subsampling)


def step_shape(cfg: CapiConfig) -> StepShape:
    """The sizes on which the cost of a step depends."""
    plan, towers = mask_plan(cfg), cfg.model.transformers_kwargs
    return StepShape(
        embed_dim=towers.embed_dim,
        encoder_depth=cfg.model.encoder_kwargs.depth,
        decoder_depth=cfg.model.decoder_kwargs.depth,
        num_heads=towers.block_kwargs.attn_kwargs.num_heads,
        num_registers=cfg.model.n_registers,
        patch_size=cfg.model.patch_size,
        num_patches=plan.num_patches,
        num_visible=plan.num_visible,
        num_predict=plan.num_predict,
        num_clusters=cfg.capi.num_clusters,
        in_chans=cfg.model.in_chans,
        drop_path_rate=towers.drop_path_rate if towers.block_kwargs.drop_path_type == "efficient" else 0.0,
        predictor=cfg.model.predictor,
        student_head_dims=HEADS[cfg.capi.student_head].hidden_dims,
        targets=cfg.capi.targets,
        queue=cfg.capi.queue,
    )


def opening(cfg: CapiConfig, state: CapiState) -> str:
    """What is trained, in a line of the log."""
    plan, num_images = mask_plan(cfg), global_batch_size(cfg.optim)
    parameters = sum(p.numel() for p in state.student["backbone"].parameters())
    return (
        f"{parameters / 1e6:.1f}M backbone parameters; {plan.num_patches} patches per image: {plan.num_visible} "
        f"visible, {plan.num_masked} hidden, {plan.num_predict} predicted; {num_images} images per step"
    )


def warnings(cfg: CapiConfig) -> list[str]:
    """What is not going to go well."""
    if cfg.capi.targets == "latents" or not cfg.capi.clustering_kwargs.positionwise_sk:  # patches are many in any batch
        return []
    warning = batch_warning(global_batch_size(cfg.optim), cfg.capi.num_clusters, cfg.capi.queue)
    return [] if warning is None else [warning]


def log_line(cfg: CapiConfig, values: Mapping[str, float]) -> str:
    """How it goes, in a line of the log."""
    parts = [f"capi {values['capi_loss']:.3f}"]
    if cfg.capi.clusters:
        parts.append(f"clustering {values['clustering_loss']:.3f}")
    if cfg.capi.targets != "latents":
        parts.append(f"entropy {values['target_entropy']:.2f} nats ({values['target_entropy_rel']:.2f} of log K)")
        parts.append(f"prototypes {int(values['prototypes_used'])}/{cfg.capi.num_clusters}")
    return "  ".join(parts)


def optimizer_bytes(cfg: CapiConfig) -> int:
    """Bytes that the optimizers of student and clustering head keep, on all ranks together."""
    with torch.device("meta"):
        num = moments_bytes(with_head(EncoderDecoder(**cfg.model.kwargs()), cfg), cfg.optim.optimizer)
        if cfg.capi.clusters:
            num += moments_bytes(make_clustering(cfg), cfg.capi.clustering_optimizer.optimizer)
    return num


def dry_run(cfg: CapiConfig) -> str:
    """What a training with this config would be, without training: data, grid, tokens, parameters, schedule, memory."""
    plan, shape = mask_plan(cfg), step_shape(cfg)
    with torch.device("meta"):
        backbone = EncoderDecoder(**cfg.model.kwargs())
    parameters = sum(p.numel() for p in backbone.parameters())
    memory = device_memory_estimate(
        shape,
        batch_size=cfg.optim.batch_size_per_gpu,
        param_bytes=4 if cfg.efficiency.param_dtype == "float32" else 2,
        recompute=cfg.efficiency.rematerialization.enabled,
        world_size=world_size(),
        num_earlier=cfg.capi.queue * cfg.optim.batch_size_per_gpu * cfg.optim.accumulation_steps,
        optimizer_bytes=optimizer_bytes(cfg),
        offload=cfg.efficiency.offload_activations,
    )
    in_host = f"; {memory['offloaded']:.1f} more in the host's memory" if memory["offloaded"] else ""
    schedule = ["schedule     step         lr         momentum" + ("   clustering lr" if cfg.capi.clusters else "")]
    for step in milestones(cfg.optim):
        hyper = hyper_at(step, cfg)
        of_head = "" if hyper.clustering_lr is None else f"{hyper.clustering_lr:.3g}"
        schedule.append(f"             {step:<12} {hyper.lr:<10.3g} {hyper.momentum:<10.6g} {of_head}".rstrip())
    heads = {
        "clustering": f"{cfg.capi.num_clusters:,} prototypes in each head",
        "ema_head": f"{cfg.capi.num_clusters:,} prototypes in the head",
        "latents": f"{cfg.model.transformers_kwargs.embed_dim} channels to predict",
    }
    return describe(
        cfg,
        functools.partial(make_loader, cfg),
        look=functools.partial(look, cfg),
        make_state=CapiState,
        sizes=[
            f"image        {cfg.data.size_words(cfg.model.patch_size)}",
            f"tokens       {plan.num_visible} visible, {plan.num_masked} masked, {plan.num_predict} of them predicted; "
            f"{cfg.model.n_registers} registers",
            f"parameters   {parameters:,} in the backbone; {heads[cfg.capi.targets]}",
        ],
        costs=[
            f"memory       about {memory['total']:.1f} GiB per device, an estimate: {memory['state']:.1f} for weights, "
            f"gradients, optimizer and average; {memory['activations']:.1f} for the student's activations; "
            f"{memory['clustering']:.1f} for teacher and {'clustering' if cfg.capi.clusters else 'targets'}{in_host}",
            f"compute      {training_flops_per_image(shape) / 1e12:.4f} TFLOP per image",
        ],
        schedule=schedule,
        warnings=warnings(cfg),
    )


# --- For pictures ----------------------------------------------------------------------------------------------------


class HiddenPatchPredictor(PatchPredictor):
    """What a student says of hidden patches, all of which are predicted; by itself, of the latents there."""

    def __init__(self, cfg: CapiConfig, student: nn.ModuleDict) -> None:
        super().__init__()
        self.cfg, self.student = cfg, student

    def forward(self, image: Float[Tensor, "3 h w"], seed: int, num_draws: int) -> Prediction:
        """See `PatchPredictor.forward`."""
        data, patch_size = self.cfg.data, self.cfg.model.patch_size
        plan = MaskPlan(image.shape[1] // patch_size, image.shape[2] // patch_size, data.mask_ratio, 1.0)
        masking = make_masking_generator(data.masking_generator, **data.masking_generator_kwargs)
        random = torch.Generator().manual_seed(seed)
        seen, hidden = draw_positions(plan, masking, random)
        backbone: Any = self.student["backbone"]
        indices = (seen.to(image.device), hidden.to(image.device))
        _, predictions = backbone.forward_pretrain(image.unsqueeze(0), *indices, do_prediction=True)
        visible = torch.zeros(plan.num_patches, dtype=torch.bool).index_fill(0, seen, True)
        draws = self.draw(self.student["head"](predictions).float(), random, num_draws)
        return Prediction(visible, hidden, draws)

    def draw(
        self, predicted: Float[Tensor, "m k"], random: torch.Generator, num_draws: int
    ) -> dict[str, Float[Tensor, "m d"]]:
        """`Prediction.draws`, of what the head gave."""
        return {"predicted": predicted}

    def targets(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Teacher's features, normalised over their channels."""
        return normalized_latents(features)


class PrototypePredictor(HiddenPatchPredictor):
    """A student's distribution over prototypes at hidden patches: the most likely one of each patch, then draws.

    A prototype is represented by its row of the head that made the targets: the patch with the nearest feature is the
    one that this head is most certain to be of it.

    Args:
        cfg: of the training.
        student: backbone and head.
        prototypes: rows of the head that made the targets.
        target_head: that head, if it does something to features before it compares them to its rows.
    """

    prototypes: Tensor

    def __init__(
        self,
        cfg: CapiConfig,
        student: nn.ModuleDict,
        prototypes: Float[Tensor, "k d"],
        target_head: L2NormLinear | None = None,
    ) -> None:
        super().__init__(cfg, student)
        self.register_buffer("prototypes", prototypes)
        self.target_head = target_head

    def draw(
        self, predicted: Float[Tensor, "m k"], random: torch.Generator, num_draws: int
    ) -> dict[str, Float[Tensor, "m d"]]:
        """Rows of the chosen prototypes."""
        probabilities = (predicted / self.cfg.capi.student_temp).softmax(dim=-1).cpu()
        chosen = {"most likely": probabilities.argmax(dim=-1)}
        for number in range(1, num_draws + 1):
            chosen[f"draw {number}"] = torch.multinomial(probabilities, 1, generator=random).squeeze(1)
        return {title: self.prototypes[k.to(predicted.device)] for title, k in chosen.items()}

    def targets(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What is compared to the prototypes."""
        return features if self.target_head is None else self.target_head.embed(features)


def load_predictor(
    checkpoint: Path, resolution: int | tuple[int, int]
) -> HiddenPatchPredictor:  # of images of any size
    """Student and prototypes of a training checkpoint; see `PatchPredictor`.

    Raises: UserError if it is damaged, or of another method.
    """
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [str(checkpoint / "config.yaml")])
    student, remedy = with_head(EncoderDecoder(**cfg.model.kwargs()), cfg), "Give a checkpoint as it was saved"
    load_strictly(student, read_weights(checkpoint, "student"), str(checkpoint), remedy=remedy)
    match cfg.capi.targets:
        case "clustering":
            rows = read_weights(checkpoint, "clustering")["layer.weight"].float()
            return PrototypePredictor(cfg, student, rows)
        case "ema_head":
            average: Any = with_head(EncoderDecoder(**cfg.model.kwargs()), cfg)
            load_strictly(average, read_weights(checkpoint, "student_ema"), str(checkpoint), remedy=remedy)
            head = average["head"]
            return PrototypePredictor(cfg, student, head.last_layer.weight_v.detach(), head)
        case _:
            return HiddenPatchPredictor(cfg, student)


__predictor_loader__ = load_predictor  # the name that pictures of predictions look for


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, CapiConfig, [DEFAULT_PRETRAIN_CONFIG, *args.sources])
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, args.sources)
    mask_plan(cfg)
    make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    return run_command(
        args,
        cfg,
        dry_run=dry_run,
        train=train,
        make_state=functools.partial(CapiState, plain=True),
        has_kernels=cfg.capi.has_kernels,
        exporter="export.py",
    )


if __name__ == "__main__":
    sys.exit(main())
