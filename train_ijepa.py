"""Pretrain I-JEPA (arXiv:2301.08243): from a part of an image, the student predicts the teacher's features of others.

With `predictor.position_noise_std` above 0 it is StoP (arXiv:2308.00566), which blurs where the others are.

    python train_ijepa.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue where a run stopped
    python train_ijepa.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python train_ijepa.py config.yaml train.output_dir=DIR --export    write student.pth and student_ema.pth of a run

Later files and overrides win over earlier ones, and all over default_ijepa_config.yaml.
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from baselines import starting
from checkpoint import SavedState, read_weights
from config import (
    COUNT,
    FRACTION,
    LATER_KEYS,
    NOT_NEGATIVE,
    POSITIVE,
    EpochsConfig,
    EpochsImagesConfig,
    EpochsOptimConfig,
    PretrainingImagesConfig,
    StartConfig,
    TrainConfig,
    ViTConfig,
    load_config,
    one_of,
    require,
    require_fraction,
    require_whole_patches,
    require_width,
    within,
)
from data import Batch, PretrainLoader
from distributed import mean_over_ranks, world_size
from flops import block_flops, embedding_flops
from ijepa import (
    DEFAULT_CONFIG,
    Encoder,
    Predictor,
    prediction_loss,
    prediction_targets,
    published_moments,
    published_part,
    read_encoder,
)
from keys import answer
from masking import MultiBlockMasks, MultiBlockPlan
from metrics import feature_health
from model import load_resized
from optim import (
    ema_update_,
    half_cosine,
    in_parts,
    make_adamw,
    moments_bytes,
    multipliers,
    part_of,
    scheduled_ahead,
    set_rates_,
    started_rates,
)
from pictures import PatchPredictor, Prediction
from reading.crops import Colours
from report import Panel
from sheets import Column, mark, mask_column
from training import (
    Run,
    TrainState,
    describe,
    fill_adamw,
    length_words,
    milestones,
    run_command,
    warn_of_another_course,
    weights_to_start_from,
    with_length,
)
from utils import as_typed, ending_in_words, setup_logging
from weights import spread_over_bands

logger = logging.getLogger("capi")

COURSE_KEYS = ("optim", "masks", "predictor.position_noise_std")
"""What the rest of a training depends on: a change when it continues is a warning."""
FINITE = ("loss", "grad_norm")
"""Scalars of a step that must be finite."""
NETWORKS = "Set model.* and predictor.* to what they were trained with"
SAMPLED_BATCHES = 8
"""Batches whose masks are drawn to say how many patches contexts and targets have."""
PUBLISHED_CONTEXT = 0.25
"""Share of the patches that contexts of the published models have, as 128 images in a forward pass cut them."""

# --- Knobs: the sections of the configuration that are this method's own ---------------------------------------------


@dataclass(frozen=True)
class IjepaTrainConfig(TrainConfig):
    """The run itself."""

    init_optimizer: bool
    """Whether the optimizer too starts from the file of init_from, which has to be one that the authors publish. The
    schedules start at step 0 all the same."""

    def __post_init__(self) -> None:
        """Check that there is a file."""
        require(
            not self.init_optimizer or self.init_from is not None,
            "train.init_optimizer",
            self.init_optimizer,
            "needs train.init_from, a file as the authors publish it",
        )


@dataclass(frozen=True)
class PredictorConfig:
    """Arguments of `ijepa.Predictor`, and what stands at the positions that it predicts."""

    embed_dim: int = field(metadata=COUNT)
    """384 in the paper, for every encoder."""
    depth: int = field(metadata=COUNT)
    """Blocks."""
    num_heads: int | None = field(metadata=COUNT)
    """null for as many as the encoder has."""
    position_noise_std: float = field(metadata=NOT_NEGATIVE)
    """Standard deviation of StoP's noise, in the encoder's width; 0 for I-JEPA. The authors' configs call it `var` and
    use it as a standard deviation: 0.25, for ViT-H 0.2. Whoever reads the paper's sigma as a variance takes the root.
    With noise there is no mask token: the bias of the projection that noise and context share takes its place."""


@dataclass(frozen=True)
class MasksConfig:
    """Arguments of `masking.MultiBlockPlan`, which says more about each."""

    num_contexts: int = field(metadata=COUNT)
    """Context blocks per image, each encoded for itself; 1 in the paper."""
    num_targets: int = field(metadata=COUNT)
    """Target blocks per image, each predicted for itself; 4."""
    context_scale: tuple[float, float] = field(metadata=within(above=0, at_most=1, ascending=True))
    """Area of the context block, as fractions of the image."""
    target_scale: tuple[float, float] = field(metadata=within(above=0, at_most=1, ascending=True))
    """Area of a target block, as fractions of the image."""
    target_aspect: tuple[float, float] = field(metadata=within(above=0, ascending=True))
    """Height / width of a target block."""
    min_keep: int = field(metadata=NOT_NEGATIVE)
    """A context has more patches than this after the targets are taken out."""
    allow_overlap: bool
    """Whether targets stay in the context."""
    context_patches: int | None = field(metadata=COUNT)
    """null, as published: contexts are cut to the smallest of a forward pass, so that optim.batch_size_per_gpu decides
    how much is seen. A number: all are cut to it, and smaller ones are drawn again."""
    cut_from_below: bool
    """true, as published: a cut leaves the first patches in reading order. false: random ones."""
    reach_border: bool
    """false, as published: no block reaches the last row or column of the grid."""
    independent_aspect: bool
    """false, as published: one random number decides on area and aspect ratio of a target. true: each has its own."""


@dataclass(frozen=True)
class IjepaOptimConfig(EpochsOptimConfig):
    """Length, batch, and the optimizer of student and predictor. `lr_schedule` is as I-JEPA counts: the first update
    has the value of step 1."""

    start: StartConfig
    weight_decay: tuple[float, float] = field(metadata=within(at_least=0, size=2))
    """At the first and the last update, a half cosine between them. Biases and norms have none."""
    momentum: tuple[float, float] = field(metadata=within(at_least=0, at_most=1, size=2))
    """EMA momentum m in ema = m * ema + (1 - m) * student at the first and the last update, a line between them."""
    hold_after: int | float | None = field(metadata=POSITIVE)
    """Step, or with a decimal point the fraction of total_iters, after which learning rate and weight decay stay what
    they are; StoP's ViT-H holds them after 250 of 300 epochs. null: never."""

    def check_length(self) -> None:
        """Raise unless what is counted in steps fits into total_iters, and something is learned before it is held."""
        super().check_length()
        self.start.check(self.total_iters)
        require_fraction("optim.hold_after", self.hold_after)
        remedy = (
            f"is step {self.hold_step} of optim.total_iters={self.total_iters}; give one of 1 to {self.total_iters}"
        )
        is_within = 1 <= self.hold_step <= self.total_iters
        require(is_within, "optim.hold_after", self.hold_after, f"{remedy}, or null for never")

    @property
    def hold_step(self) -> int:
        """`hold_after` in steps."""
        if self.hold_after is None:
            return self.total_iters
        return round(self.hold_after * self.total_iters) if isinstance(self.hold_after, float) else self.hold_after


@dataclass(frozen=True)
class IjepaDataConfig(PretrainingImagesConfig, EpochsImagesConfig):
    """Images and crops."""

    interpolation: str = field(metadata=one_of("bilinear", "bicubic"))
    """How crops are resized; with data.decode=gpu bicubic alone."""
    grayscale: float = field(metadata=FRACTION)
    """Fraction of the crops that lose their colours; 0.2 for StoP."""
    blur: float = field(metadata=FRACTION)
    """Fraction of the crops that are blurred, with a radius of 0.1 to 2 pixels; 0.5 for StoP."""

    def __post_init__(self) -> None:
        """Check that the GPU, and bands, are not asked for what they do not do."""
        super().__post_init__()
        own = self.interpolation != "bicubic" or self.grayscale > 0 or self.blur > 0
        require(
            self.decode == "cpu" or not own,
            "data.decode",
            self.decode,
            "crops there are bicubic and keep their colours; use data.decode=cpu, or data.interpolation=bicubic "
            "data.grayscale=0 data.blur=0",
        )
        is_rgb8 = self.value_range is None and (self.mean == "auto" or len(self.mean) == 3)
        for key in ("grayscale", "blur"):
            given = getattr(self, key)
            require(is_rgb8 or given == 0, f"data.{key}", given, f"is for 8-bit RGB; use data.{key}=0")


@dataclass(frozen=True)
class IjepaConfig(EpochsConfig):
    """Everything `train_ijepa.py` reads."""

    EXPORTS: ClassVar[tuple[str, ...]] = ("student_ema", "student")

    train: IjepaTrainConfig
    optim: IjepaOptimConfig
    data: IjepaDataConfig
    model: ViTConfig
    predictor: PredictorConfig
    masks: MasksConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        require_whole_patches(self.data, self.model.patch_size)
        require_width("predictor", self.predictor.embed_dim, self.predictor_heads)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of a crop."""
        return self.data.grid(self.model.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return math.prod(self.grid_size)

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor."""
        return self.predictor.num_heads or self.model.num_heads

    def make_encoder(self) -> Encoder:
        """The encoder that this describes."""
        return Encoder(grid_size=self.grid_size, **asdict(self.model))

    def make_predictor(self) -> Predictor:
        """The predictor that this describes."""
        return Predictor(
            grid_size=self.grid_size,
            encoder_dim=self.model.embed_dim,
            embed_dim=self.predictor.embed_dim,
            depth=self.predictor.depth,
            num_heads=self.predictor_heads,
        )


@dataclass(frozen=True)
class Hyper:
    """Scheduled values of one update."""

    lr: float
    weight_decay: float
    momentum: float
    """EMA momentum m in ema = m * ema + (1 - m) * student."""


def hyper_at(step: int, cfg: IjepaConfig) -> Hyper:
    """Scheduled values of the update after `step` finished ones. Pure, so a resumed run has nothing to restore."""
    optim, total = cfg.optim, cfg.optim.total_iters
    # Learning rate and weight decay are those of the step under way, which counts from 1; the momentum counts from 0.
    held = min(step, optim.hold_step - 1)
    first, last = optim.momentum
    return Hyper(
        lr=scheduled_ahead(optim.lr_schedule, held, total),
        weight_decay=half_cosine(*optim.weight_decay, (held + 1) / total),
        momentum=first + step * (last - first) / total,
    )


# --- State and step --------------------------------------------------------------------------------------------------


def do_teacher(encoder: Encoder, images: Float[Tensor, "b c h w"], dtype: torch.dtype) -> Float[Tensor, "b n d"]:
    """Features of all patches of whole images."""
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return encoder.encode(images)


def do_student(
    student: nn.ModuleDict,
    images: Float[Tensor, "b c h w"],
    context_indices: Int[Tensor, "c b v"],
    target_indices: Int[Tensor, "t b m"],
    features: Float[Tensor, "b n d"],
    noise: Float[Tensor, "tcb m d"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """Distance between the teacher's features at the targets and those predicted from the context."""
    encoder: Any = student["backbone"]
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        context = encoder.encode(images, context_indices)
        predicted = student["predictor"](context, context_indices, target_indices, noise)
    return prediction_loss(predicted, prediction_targets(features, target_indices, len(context_indices)))


class IjepaState(TrainState[IjepaConfig]):
    """Everything a checkpoint holds.

    Modules: `student` {backbone, predictor}; `student_ema` {backbone}, the moving average of its backbone, which is the
    teacher and which is what a run exports.
    """

    MODEL_KEYS = ("model", "predictor.embed_dim", "predictor.depth", "predictor.num_heads", "data.images_size")
    LATER_KEYS: ClassVar[dict[str, Any]] = {**LATER_KEYS, "model": {"in_chans": 3}}

    def __init__(
        self, cfg: IjepaConfig, device: torch.device, *, plain: bool = False, init_from: str | None = None
    ) -> None:
        super().__init__(cfg, device, plain=plain)
        start = None if init_from is None else StartingWeights(init_from)
        self.student = self.place(
            lambda: nn.ModuleDict({"backbone": cfg.make_encoder(), "predictor": cfg.make_predictor()}),
            "do_student",
            load=None if start is None else start.fill_student,
        )
        self.student_ema = self.place(
            lambda: nn.ModuleDict({"backbone": cfg.make_encoder()}),
            "do_teacher",
            is_teacher=True,
            load=None if start is None else start.fill_teacher,
        )
        if start is None:
            ema_update_(self.student_ema["backbone"], self.student["backbone"], 0.0)
        self.modules = {"student": self.student, "student_ema": self.student_ema}
        self.do_teacher = self.compile(do_teacher, "do_teacher")
        self.do_student = self.compile(do_student, "do_student")
        by_name = multipliers(self.student, patch_embed_lr_mult=1, rope_lr_mult=1, layernorm_wd_mult=0)
        self.optimizer = make_adamw(
            self.student, cfg.optim.optimizer, cfg.optim.betas, in_parts(by_name, part_of, cfg.optim.start)
        )
        self.optimizers = {"student": (self.student, self.optimizer)}
        if start is not None and cfg.train.init_optimizer:
            unused = {"predictor.mask_token"} if cfg.predictor.position_noise_std else ()
            fill_adamw(
                self.student,
                self.optimizer,
                start.moments,
                source=start.path_or_url,
                key="train.init_optimizer",
                unused=unused,
            )

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The teacher's patch features, not compiled, for batches of any size."""
        encoder: Any = self.student_ema["backbone"]
        return do_teacher(encoder, images, self.dtype)

    def draw_noise(self, forward_pass: int, batch: Batch) -> Float[Tensor, "tcb m d"] | None:
        """StoP's noise of one of an update's forward passes; None for I-JEPA.

        It follows from seed, step and the number of the forward pass among those of all ranks.
        """
        std = self.cfg.predictor.position_noise_std
        if std == 0:
            return None
        generator = torch.Generator(self.device).manual_seed(self.seed_of("position-noise", forward_pass))
        (contexts, images, _), (blocks, _, patches) = (
            batch.masks[f"{name}_indices"].shape for name in ("context", "target")
        )
        size = (blocks * contexts * images, patches, self.cfg.model.embed_dim)
        return std * torch.randn(size, generator=generator, device=self.device)


@dataclass(frozen=True)
class StartingWeights:
    """The file of `train.init_from`: an export of a training, or what these or other authors publish."""

    path_or_url: str

    @functools.cached_property
    def file(self) -> dict[str, Any]:
        """What it holds."""
        return starting.read_file(self.path_or_url)

    def encoder_for(self, backbone: Any, name: str) -> dict[str, Tensor]:
        """The weights of one of the encoders of a published file, or the one in it, for a fresh encoder.

        Raises: UserError if there is none, or another method's that does not fit.
        """
        vit = starting.read(self.file, self.path_or_url, backbone)
        if vit is not None:
            return starting.fit(vit, backbone, grid=backbone.grid_size, say=name == "encoder")
        return spread_over_bands(read_encoder(self.file, self.path_or_url, name), backbone)

    def fill_student(self, student: nn.ModuleDict) -> None:
        """Copy encoder and, if the file has one, predictor into a fresh student, and say what stays random.

        Raises: UserError if the weights do not fit.
        """
        source = self.path_or_url
        encoder = self.encoder_for(student["backbone"], "encoder")
        load_resized(student["backbone"], encoder, source, remedy=NETWORKS)
        prefix = "predictor."
        predictor = {key.removeprefix(prefix): x for key, x in self.file.items() if key.startswith(prefix)}
        if "predictor" in self.file:
            predictor = published_part(self.file, "predictor")
        if predictor:
            load_resized(student["predictor"], predictor, source, remedy=NETWORKS)
        random = "" if predictor else "; the predictor, which the file lacks, starts random"
        logger.info("student and teacher start from %s%s", source, random)

    def fill_teacher(self, student_ema: nn.ModuleDict) -> None:
        """Copy the target encoder of a published file, or the encoder of an export, into the teacher.

        Raises: UserError if the weights do not fit.
        """
        source = self.path_or_url
        encoder = self.encoder_for(student_ema["backbone"], "target_encoder")
        load_resized(student_ema["backbone"], encoder, source, remedy=NETWORKS)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizer of a published file keeps of each parameter, see `ijepa.published_moments`.

        Raises: UserError if the file has none.
        """
        return published_moments(self.file, self.path_or_url)


def train_step(
    state: IjepaState, batches: Sequence[Batch], hyper: Hyper, *, with_health: bool = False
) -> dict[str, Tensor]:
    """One update of student and average. Returns detached scalars, still on the device.

    Args:
        state: changed in place.
        batches: normalised images and indices of the accumulation steps, on the device.
        hyper: learning rate, weight decay and momentum of this update.
        with_health: also compute effective rank, norms and spread of the teacher's features.
    """
    of_parts = started_rates(state.step, state.cfg.optim.start, state.cfg.optim.total_iters)
    set_rates_(state.optimizer, hyper.lr, hyper.weight_decay, of_parts)
    state.zero_grad()
    teacher = state.student_ema["backbone"]
    total = torch.zeros((), device=state.device)
    features: list[Tensor] = []
    for forward_pass, batch in enumerate(batches):
        features.append(state.do_teacher(teacher, batch.images, state.dtype))
        loss = state.do_student(
            state.student,
            batch.images,
            batch.masks["context_indices"],
            batch.masks["target_indices"],
            features[-1],
            state.draw_noise(forward_pass, batch),
            state.dtype,
        )
        # The mean of the means of forward passes, as over ranks: each has block sizes of its own.
        state.backward(loss / len(batches))
        total = total + loss.detach() / len(batches)
    lengths = [batch.masks["context_indices"].shape[2] for batch in batches]
    mean_length = sum(lengths) / len(lengths)
    scalars = {"loss": total, "context_patches": torch.full((), mean_length, device=state.device)}
    if with_health:
        scalars |= feature_health(torch.cat(features))
    updated, norms = state.apply_gradients()
    if updated:
        ema_update_(teacher, state.student["backbone"], hyper.momentum)
    return mean_over_ranks(scalars) | norms


def panels(cfg: IjepaConfig) -> list[Panel]:
    """The curves of a training's metrics that its reports show."""
    patches = cfg.num_patches
    return [
        Panel("Smooth L1 loss", "per channel of a normalised feature", {"loss": ""}),
        Panel("Effective rank of the teacher's features", "dimensions", {"teacher_rank": ""}),
        Panel("Norms of the teacher's features", "norm", {"feature_norm_median": "median", "feature_norm_max": "max"}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Patches of a context", "number", {"context_patches": ""}, whole=("fraction of the image", patches)),
        Panel("Schedules", "learning rate", {"lr": ""}, right={"momentum": "EMA momentum (right axis)"}),
    ]


# --- The run ---------------------------------------------------------------------------------------------------------


def train(cfg: IjepaConfig, output_dir: Path, device: torch.device) -> None:
    """Train up to `optim.total_iters` finished updates, or until a signal; continue what is in `output_dir`."""
    cfg = with_length(cfg)
    state = IjepaState(cfg, device, init_from=weights_to_start_from(cfg, output_dir))
    sizes = sampled_sizes(cfg)
    with Run(
        cfg,
        state,
        output_dir,
        make_loader=functools.partial(make_loader, cfg),
        encode=state.encode,
        log_line=functools.partial(log_line, cfg),
        finite=FINITE,
        look=functools.partial(look, cfg),
        panels=panels(cfg),
        flops_per_image=step_flops_per_image(cfg, sizes),
        opening=opening(cfg, state, sizes),
        warnings=warnings(cfg, sizes),
        on_resume=functools.partial(warn_if_changed, cfg=cfg),
    ) as run:
        while not run.is_over():
            hyper = hyper_at(state.step, cfg)
            scalars = train_step(state, run.next_batches(), hyper, with_health=run.looks_at_health)
            state.step += 1  # finished updates: checkpoint 3750 holds 3750
            run.count(scalars, asdict(hyper))
            run.log()
            run.save()
            run.evaluate()
    run.export()


def make_loader(cfg: IjepaConfig, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`.

    Raises: UserError if data or masks do not fit the configuration.
    """
    colours = Colours(cfg.data.grayscale, cfg.data.blur)
    return PretrainLoader(
        cfg.data,
        MultiBlockMasks(mask_plan(cfg), cfg.train.seed),
        seed=cfg.train.seed,
        batch_size=cfg.optim.batch_size_per_gpu,
        num_workers=cfg.efficiency.dataloader_num_workers,
        keep_listing=cfg.efficiency.cache_dataset,
        interpolation=cfg.data.interpolation,
        change_colours=colours if colours.change_anything else None,
        **place,
    )


def look(cfg: IjepaConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet shows beside crops: their masks."""
    images, patch_size = batch.images[:num_images], cfg.model.patch_size
    num_patches = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    first = num_patches * torch.arange(num_images)[None, :, None]
    # Of several contexts the first.
    context, targets = batch.masks["context_indices"][:1, :num_images], batch.masks["target_indices"][:, :num_images]
    visible, predicted = (mark(images, patch_size, (part + first).flatten()) for part in (context, targets))
    return [mask_column(images, visible, predicted)]


def warn_if_changed(saved: SavedState, cfg: IjepaConfig) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint."""

    def values(step: int, cfg: IjepaConfig) -> dict[str, float]:
        hyper = hyper_at(step, cfg)
        return {
            "learning rate": hyper.lr,
            "weight decay": hyper.weight_decay,
            "EMA momentum": hyper.momentum,
        }

    warn_of_another_course(saved, cfg, COURSE_KEYS, values)


def mask_plan(cfg: IjepaConfig) -> MultiBlockPlan:
    """How contexts and targets are drawn.

    Raises: UserError if some leave nothing to see or nothing to predict.
    """
    return MultiBlockPlan(*cfg.grid_size, **asdict(cfg.masks))


@dataclass(frozen=True)
class MaskSizes:
    """Patches of a context and of a target block, the mean of some forward passes."""

    context: float
    target: float


def sampled_sizes(cfg: IjepaConfig) -> MaskSizes:
    """Draw the masks of a few forward passes and see how large they are: how contexts are cut depends on the batch."""
    masks, b = MultiBlockMasks(mask_plan(cfg), cfg.train.seed), cfg.optim.batch_size_per_gpu
    drawn = [masks([(b * i + image,) for image in range(b)]) for i in range(SAMPLED_BATCHES)]
    context, target = (
        sum(each[f"{name}_indices"].shape[2] for each in drawn) / SAMPLED_BATCHES for name in ("context", "target")
    )
    return MaskSizes(context, target)


def step_flops_per_image(cfg: IjepaConfig, sizes: MaskSizes) -> float:
    """Model FLOPs of one step per image: matmuls alone, recomputation not counted, a backward pass as two forward ones.

    Args:
        cfg: of the training.
        sizes: of contexts and targets, on average.
    """
    model, predictor, masks, patches = cfg.model, cfg.predictor, cfg.masks, cfg.num_patches
    embedding = embedding_flops(patches, model.patch_size, model.embed_dim, model.in_chans)
    encoder = functools.partial(block_flops, model.embed_dim, mlp_dim=model.mlp_dim)
    tokens = sizes.context + sizes.target
    per_block = predictor.depth * block_flops(predictor.embed_dim, tokens, tokens)
    num_projected = sizes.context / masks.num_targets + sizes.target * (2 if predictor.position_noise_std else 1)
    per_block += 2 * num_projected * model.embed_dim * predictor.embed_dim
    teacher = embedding + model.depth * encoder(patches, patches)
    student = masks.num_contexts * (model.depth * encoder(sizes.context, sizes.context) + masks.num_targets * per_block)
    return teacher + 2 * embedding + 3 * student


def opening(cfg: IjepaConfig, state: IjepaState, sizes: MaskSizes) -> str:
    """What is trained, in a line of the log."""
    encoder, predictor = (
        sum(p.numel() for p in state.student[name].parameters()) / 1e6 for name in ("backbone", "predictor")
    )
    return (
        f"{encoder:.1f}M encoder and {predictor:.1f}M predictor parameters; {cfg.num_patches} patches per image: "
        f"{mask_words(cfg, sizes)}; {length_words(cfg)}"
    )


def mask_words(cfg: IjepaConfig, sizes: MaskSizes) -> str:
    """How much is seen and predicted."""
    return (
        f"{cfg.masks.num_contexts} context of about {sizes.context:.1f} patches "
        f"({sizes.context / cfg.num_patches:.0%}), {cfg.masks.num_targets} targets of about {sizes.target:.1f}"
    )


def warnings(cfg: IjepaConfig, sizes: MaskSizes) -> list[str]:
    """What is not going to go well."""
    share, batch = sizes.context / cfg.num_patches, cfg.optim.batch_size_per_gpu
    if cfg.masks.context_patches is not None or share < 1.3 * PUBLISHED_CONTEXT:
        return []
    return [
        f"contexts show about {share:.0%} of an image, as they are cut to the smallest of the {batch} images in a "
        f"forward pass (optim.batch_size_per_gpu); with 128, as published, about {PUBLISHED_CONTEXT:.0%}. "
        f"masks.context_patches={round(PUBLISHED_CONTEXT * cfg.num_patches)} shows as much with any batch"
    ]


def log_line(cfg: IjepaConfig, values: Mapping[str, float]) -> str:
    """How it goes, in a line of the log."""
    return f"loss {values['loss']:.4f}  context {values['context_patches']:.1f} of {cfg.num_patches} patches"


def dry_run(cfg: IjepaConfig) -> str:
    """What a training with this config would be, without training: data, grid, tokens, parameters, schedule."""
    cfg = with_length(cfg)
    sizes = sampled_sizes(cfg)
    with torch.device("meta"):
        modules = (cfg.make_encoder(), cfg.make_predictor())
    encoder, predictor = (sum(p.numel() for p in m.parameters()) for m in modules)
    moments = sum(moments_bytes(m, cfg.optim.optimizer) for m in modules)
    state = (4 * (3 * encoder + 2 * predictor) + moments) / world_size() / 2**30
    schedule = ["schedule     step         lr         weight decay momentum"]
    for step in milestones(cfg.optim):
        hyper = hyper_at(step, cfg)
        schedule.append(f"             {step:<12} {hyper.lr:<10.3g} {hyper.weight_decay:<12.4g} {hyper.momentum:.6g}")
    noise = cfg.predictor.position_noise_std
    return describe(
        cfg,
        functools.partial(make_loader, cfg),
        look=functools.partial(look, cfg),
        make_state=IjepaState,
        sizes=[
            f"length       {length_words(cfg)}",
            f"image        {cfg.data.size_words(cfg.model.patch_size)}",
            f"tokens       {mask_words(cfg, sizes)}",
            f"positions    {f'stochastic, standard deviation {noise:g}' if noise else 'exact'}",
            f"parameters   {encoder:,} in the encoder, {predictor:,} in the predictor",
        ],
        costs=[
            f"memory       {state:.1f} GiB per device for weights, gradients, optimizer and average, and activations",
            f"compute      {step_flops_per_image(cfg, sizes) / 1e12:.4f} TFLOP per image",
        ],
        schedule=schedule,
        warnings=warnings(cfg, sizes),
    )


# --- For pictures ----------------------------------------------------------------------------------------------------


class BlockPredictor(PatchPredictor):
    """A student's features of target blocks: one prediction by I-JEPA, as many as there is noise by StoP."""

    def __init__(self, cfg: IjepaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.student = nn.ModuleDict({"backbone": cfg.make_encoder(), "predictor": cfg.make_predictor()})

    def forward(self, image: Float[Tensor, "3 h w"], seed: int, num_draws: int) -> Prediction:
        """See `PatchPredictor.forward`; the context, the first of several, is cut as in a forward pass of training."""
        batch = [(number,) for number in range(self.cfg.optim.batch_size_per_gpu)]
        masks = MultiBlockMasks(mask_plan(self.cfg), seed)(batch)
        context, targets = masks["context_indices"][:1, :1], masks["target_indices"][:, :1]
        visible = torch.zeros(self.cfg.num_patches, dtype=torch.bool).index_fill(0, context.flatten(), True)
        context, targets = context.to(image.device), targets.to(image.device)
        encoder: Any = self.student["backbone"]
        encoded = encoder.encode(image.unsqueeze(0), context)
        std = self.cfg.predictor.position_noise_std
        noises: dict[str, Tensor | None] = {"predicted": None}
        if std > 0:
            random = torch.Generator().manual_seed(seed)
            size = (*targets.flatten(0, 1).shape, self.cfg.model.embed_dim)
            drawn = (std * torch.randn(size, generator=random).to(image.device) for _ in range(num_draws))
            noises = {f"draw {number}": noise for number, noise in enumerate(drawn, 1)}
        draws = {
            title: self.student["predictor"](encoded, context, targets, noise).flatten(0, 1)
            for title, noise in noises.items()
        }
        return Prediction(visible, targets.flatten().cpu(), draws)

    def targets(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Teacher's features, normalised over their channels."""
        everywhere = torch.arange(features.shape[1], device=features.device).expand(1, len(features), -1)
        return prediction_targets(features, everywhere)


def load_predictor(checkpoint: Path, resolution: int | tuple[int, int]) -> BlockPredictor:
    """Student and predictor of a training checkpoint; see `PatchPredictor`.

    Raises: UserError if it is damaged, or of another method, or images of this size have no grid.
    """
    sources = [str(checkpoint / "config.yaml"), f"data.images_size={as_typed(resolution)}"]
    predictor = BlockPredictor(load_config(IjepaConfig, DEFAULT_CONFIG, sources))
    load_resized(predictor.student, read_weights(checkpoint, "student"), str(checkpoint), remedy=NETWORKS)
    return predictor


__predictor_loader__ = load_predictor  # the name that pictures of predictions look for


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, IjepaConfig, [DEFAULT_CONFIG, *args.sources])
    cfg = load_config(IjepaConfig, DEFAULT_CONFIG, args.sources)
    mask_plan(cfg)
    return run_command(
        args,
        cfg,
        dry_run=dry_run,
        train=train,
        make_state=functools.partial(IjepaState, plain=True),
        has_kernels=False,
        exporter="export.py",
    )


if __name__ == "__main__":
    sys.exit(main())
