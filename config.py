"""Typed configuration: what every key means, and how YAML files and `a.b=c` overrides become one checked object.

Values live in YAML, types and meanings here. Later sources win: `default_pretrain_config.yaml`, your files, the
command line. Unknown keys, wrong types and impossible combinations are `UserError`s before any device is touched.
"""

import ast
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from default_eval_config import EVALS
from utils import UserError

ROOT = Path(__file__).parent
DEFAULT_PRETRAIN_CONFIG = ROOT / "default_pretrain_config.yaml"

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "autocast_dtype": ("dtype", "efficiency.param_dtype"),
    "checkpoint_period": ("save_checkpoint_period", "train.checkpointing.period"),
    "classifiers_kwargs": (
        "what it held are keys of their own: knn_ks, knn_distances, knn_chunk, knn_dtype, logreg_cs, logreg_max_iter, "
        "logreg_tol",
    ),
    "config_path": ("model_loader_kwargs.config_path",),
    "dataset": ("dataset_name", "data.dataset", "train_dataset_name"),
    "dataset_name": ("dataset", "data.dataset"),
    "do_dict_learning": ("name dictionary in pictures=[...], and sizes in dictionary_atoms=[...]",),
    "do_pca": ("name image_pca and joint_pca in pictures=[...]",),
    "eval_period": ("save_checkpoint_period", "evals.<name>.period is the period of a set of evaluations"),
    "n_images": ("num_images",),
    "n_iters": ("optim.total_iters",),
    "n_workers": ("num_workers", "efficiency.dataloader_num_workers"),
    "pretrained_weights": ("model_loader_kwargs.pretrained_weights", "train.init_from"),
    "script": ("file",),
    "test_dataset": ("test_dataset_name", "test_dataset_names"),
    "test_dataset_name": ("test_dataset_names",),
    "test_dataset_names": ("test_dataset_name",),
    "test_datasets": ("test_dataset_names", "test_dataset_name"),
    "total_iters": ("n_iters",),
    "train_dataset": ("train_dataset_name",),
    "use_compile": ("efficiency.compilation", "evaluations do not compile the model; leave it out"),
    "val_dataset": ("val_dataset_name",),
}
"""Keys of the published system and of earlier versions that are called otherwise: their names today, of which the first
that a configuration has is told, or a sentence."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise the error a user understands unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {remedy}")


def require_one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class LauncherConfig:
    """Where a Slurm job of `train_distributed.py` runs. null leaves a choice to the cluster."""

    num_nodes: int
    """Nodes of a job; 4 in the paper."""
    gpus_per_node: int
    """GPUs, and processes, per node; 8 in the paper. 0 for CPU nodes."""
    tasks_per_node: int | None
    """Processes per node; null for one per GPU, or one without GPUs."""
    cpus_per_task: int | None
    """Processor cores per process: the data workers need some."""
    time_min: int | None
    """Time limit of one start of the job, in minutes. It is requeued when it gets there."""
    mem: str | None
    """Memory per node, such as 200G."""
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    """Nodes to avoid."""
    signal_delay_s: int
    """Seconds before the time limit at which the run saves and is requeued; longer than a step and a save.
    Slurm may ask up to a minute earlier."""
    setup: list[str]
    """Shell lines before the run, such as `module load cuda`."""
    sbatch: dict[str, Any]
    """Further `#SBATCH` options by name; `true` for one without a value."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_nodes >= 1, "launcher.num_nodes", self.num_nodes, "must be at least 1")
        require(self.gpus_per_node >= 0, "launcher.gpus_per_node", self.gpus_per_node, "must be 0 or more")
        for key in ("tasks_per_node", "cpus_per_task", "time_min"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"launcher.{key}", value, "must be at least 1, or null")
        require(self.signal_delay_s >= 1, "launcher.signal_delay_s", self.signal_delay_s, "must be at least 1 second")
        require(
            self.time_min is None or self.signal_delay_s < 60 * self.time_min,
            "launcher.signal_delay_s",
            self.signal_delay_s,
            f"must be less than launcher.time_min={self.time_min} minutes, or the job is stopped when it starts",
        )

    @property
    def num_tasks_per_node(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass(frozen=True)
class CheckpointingConfig:
    """When the training state is saved."""

    period: int
    """Steps between checkpoints; one is also saved at the end and when a signal asks the run to stop."""
    max_to_keep: int
    """How many of the newest checkpoints stay on disk."""
    async_save: bool
    """Write checkpoints while training goes on; needs host memory for one more copy of weights and optimizer state."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.period >= 1, "train.checkpointing.period", self.period, "must be at least 1 step")
        require(self.max_to_keep >= 1, "train.checkpointing.max_to_keep", self.max_to_keep, "must be at least 1")


@dataclass(frozen=True)
class ProbeConfig:
    """Scores of the teacher on a small labelled set, computed in between steps; see probe.py."""

    every: int
    """Steps between probes; 0 for none. Two sets of 1000 images took 1.7 % of the time at a period of 250 steps of 128
    images (configs/imagenette.yaml on a CPU)."""
    train_dataset: str | None
    """Data URL of images with class labels, to fit on."""
    test_dataset: str | None
    """Data URL of images with class labels, to score."""
    max_images: int
    """Images of each set, evenly spaced; they stay in memory."""
    k: int
    """Neighbours that vote."""

    def __post_init__(self) -> None:
        """Check that there is something to probe with."""
        for key in ("train_dataset", "test_dataset"):
            require(
                self.every <= 0 or getattr(self, key) is not None,
                f"train.probe.{key}",
                None,
                "is needed for train.probe.every > 0: a data URL of labelled images",
            )
        require(self.max_images > 1, "train.probe.max_images", self.max_images, "must be at least 2")
        require(self.k > 0, "train.probe.k", self.k, "must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The run itself: where it writes, on what it runs, how often it reports."""

    output_dir: str
    """Folder of the run: checkpoints, metrics, exports, logs. One run at a time."""
    device: str
    """auto (cuda, then mps, then cpu), or one of them."""
    auto_resume: bool
    """Continue from the newest checkpoint in output_dir if there is one."""
    resume_from: str | None
    """Continue from this checkpoint folder instead of the newest one, for example after the newest was damaged."""
    init_from: str | None
    """Path or URL of weights (an export, or a released model) from which student, average and teacher start; null for
    random ones. The two heads always start random. Without effect once the run has a checkpoint."""
    seed: int
    """Seed of initial weights, data order, crops, masks and drop-path. All are functions of it and of the step."""
    nan_check_period: int
    """Steps between looks at whether a loss was ever NaN or infinite; the run stops if so. 0 never looks."""
    log_loss_every: int
    """Steps between log lines and metric records, averaged over the steps since the last one."""
    health_every: int
    """Steps between the costlier health metrics (effective rank and norms of teacher features). 0 turns them off."""
    loggers: list[str]
    """Besides metrics.jsonl: any of tensorboard, wandb, mlflow, trackio."""
    profiling: bool
    """Write a profiler trace and a memory snapshot of a few early steps to output_dir/profile."""
    checkpointing: CheckpointingConfig
    probe: ProbeConfig

    def __post_init__(self) -> None:
        """Check ranges and choices."""
        require_one_of("train.device", self.device, ("auto", "cuda", "mps", "cpu"))
        require(self.log_loss_every >= 1, "train.log_loss_every", self.log_loss_every, "must be at least 1 step")
        require(
            self.nan_check_period >= 0, "train.nan_check_period", self.nan_check_period, "must be 0 (never) or more"
        )
        require(self.health_every >= 0, "train.health_every", self.health_every, "must be 0 (never) or more")
        require(0 <= self.seed < 2**32, "train.seed", self.seed, "must be in [0, 2**32)")
        for logger in self.loggers:
            require_one_of("train.loggers", logger, ("tensorboard", "wandb", "mlflow", "trackio"))


@dataclass(frozen=True)
class ScheduleConfig:
    """One `optim.WarmupThenCosine` over `optim.total_iters` steps."""

    start_warmup_value: float
    """Value at the first warm-up step."""
    base_value: float
    """Value at the end of the warm-up, where the cosine starts."""
    final_value: float
    """Where a full cosine would end, and the value past the last step."""
    warmup_iters: int | float
    """Steps of the linear warm-up, or, with a decimal point, a fraction of total_iters in [0, 1] (0.1 in the paper)."""
    freeze_iters: int
    """Steps at 0 before the warm-up."""
    truncate_cos: float
    """Fraction of the half cosine that is run through, 0.8 in the paper: the learning rate ends above final_value."""

    def warmup_steps(self, total_iters: int) -> int:
        """`warmup_iters` in steps."""
        return round(self.warmup_iters * total_iters) if isinstance(self.warmup_iters, float) else self.warmup_iters

    def check(self, key: str, total_iters: int) -> None:
        """Raise unless the schedule fits into `total_iters` steps."""
        if isinstance(self.warmup_iters, float):
            require(
                0 <= self.warmup_iters <= 1,
                f"{key}.warmup_iters",
                self.warmup_iters,
                "a number with a decimal point is a fraction of optim.total_iters and must lie in [0, 1]",
            )
        steps = self.warmup_steps(total_iters)
        require(
            0 <= steps + self.freeze_iters <= total_iters and steps >= 0 and self.freeze_iters >= 0,
            f"{key}.warmup_iters",
            self.warmup_iters,
            f"with freeze_iters={self.freeze_iters} it does not fit into optim.total_iters={total_iters}; "
            "give the warm-up as a fraction, for example 0.1",
        )


@dataclass(frozen=True)
class ClusteringHeadConfig:
    """Arguments of `clustering.OnlineClustering`."""

    target_temp: float
    """Temperature of the Sinkhorn targets, 0.06 in the paper."""
    pred_temp: float
    """Temperature of the head's own prediction in the clustering loss, 0.12."""
    n_sk_iter: int
    """Sinkhorn-Knopp rounds, 3."""
    bias: bool
    """Whether the head's linear layer has a bias."""
    positionwise_sk: bool
    """True: one Sinkhorn problem per patch position (paper, section 3.2). False: one over all tokens."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("target_temp", "pred_temp"):
            require(getattr(self, key) > 0, f"capi.clustering_kwargs.{key}", getattr(self, key), "must be above 0")
        require(self.n_sk_iter >= 1, "capi.clustering_kwargs.n_sk_iter", self.n_sk_iter, "must be at least 1")


@dataclass(frozen=True)
class ClusteringOptimizerConfig:
    """The clustering head's own optimizer."""

    optimizer: str
    betas: tuple[float, float]
    weight_decay: float
    lr_schedule: ScheduleConfig

    def __post_init__(self) -> None:
        """Check the choice of optimizer."""
        require_one_of("capi.clustering_optimizer.optimizer", self.optimizer, ("AdamW",))


@dataclass(frozen=True)
class CapiMethodConfig:
    """The method: clustering and prediction."""

    num_clusters: int
    """Prototypes K, 16384 in the paper. Needs a global batch that is not far smaller."""
    student_temp: float
    """Temperature of the student's prediction, 0.12."""
    clustering_chunk: int | None
    """Patch positions clustered at a time; only memory and speed depend on it. null: chosen by memory."""
    clustering_kernel: str
    """torch; triton, which has kernels of its own for GPUs; or auto: triton on a GPU where it is installed."""
    clustering_kwargs: ClusteringHeadConfig
    clustering_optimizer: ClusteringOptimizerConfig

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.num_clusters >= 2, "capi.num_clusters", self.num_clusters, "must be at least 2")
        require(self.student_temp > 0, "capi.student_temp", self.student_temp, "must be above 0")
        chunk = self.clustering_chunk
        require(
            chunk is None or chunk >= 1, "capi.clustering_chunk", chunk, "must be at least 1, or null for automatic"
        )
        require_one_of("capi.clustering_kernel", self.clustering_kernel, ("auto", "torch", "triton"))


@dataclass(frozen=True)
class OptimConfig:
    """Length of training, batch, and the student's optimizer and schedules."""

    total_iters: int
    """Optimizer updates of the whole training."""
    batch_size_per_gpu: int
    """Images per forward pass on one rank; global batch = this x accumulation_steps x ranks."""
    accumulation_steps: int
    """Forward passes per update. Sinkhorn balances over all of them: the same result as one large batch."""
    clip_grad: float | None
    """Largest norm of the student's gradient, or null for no clipping (the paper's choice)."""
    optimizer: str
    betas: tuple[float, float]
    weight_decay: float
    lr_schedule: ScheduleConfig
    patch_embed_lr_mult: float
    """Learning-rate multiplier of the patch embedding, 0.2."""
    rope_lr_mult: float
    """Learning-rate multiplier of the rotary frequencies, 0: they stay as initialised."""
    layernorm_wd_mult: float
    """Weight-decay multiplier of norm weights, 0.1."""
    momentum_schedule: ScheduleConfig
    """EMA momentum m in ema = m * ema + (1 - m) * student."""

    def __post_init__(self) -> None:
        """Check ranges and that the schedules fit."""
        require_one_of("optim.optimizer", self.optimizer, ("AdamW",))
        for key in ("total_iters", "batch_size_per_gpu", "accumulation_steps"):
            require(getattr(self, key) >= 1, f"optim.{key}", getattr(self, key), "must be at least 1")
        clip = self.clip_grad
        require(clip is None or clip > 0, "optim.clip_grad", clip, "must be above 0, or null for no clipping")
        self.lr_schedule.check("optim.lr_schedule", self.total_iters)
        self.momentum_schedule.check("optim.momentum_schedule", self.total_iters)


@dataclass(frozen=True)
class DataConfig:
    """Images, crops and masks."""

    dataset: str
    """Data URL (README lists the sources), or the path of a folder of images."""
    mask_ratio: float
    """Fraction of the patches that the student does not see, 0.65."""
    prediction_subsampling: float
    """Fraction of the hidden patches that are predicted, 0.05 (the authors: about 0.2 is better)."""
    crop_scale: tuple[float, float]
    """Area range of the random crop, as fractions of the image."""
    images_size: int
    """Side of the square crop in pixels, a multiple of model.patch_size."""
    do_hflip: bool
    """Flip half of the images."""
    masking_generator: str
    """InverseBlock (a block stays visible), Block or Uniform; see masking.py."""
    masking_generator_kwargs: dict[str, Any]
    """Arguments of the generator, `roll` for the two block kinds."""
    stream_shuffle_block: int
    """Streaming data: samples that are read ahead and shuffled together. 1 keeps the order of the stream."""
    stream_partitions: int | None
    """Streaming data: independent streams per rank, read by the loader's workers in turn. The order of the images
    depends on it. null: one per worker."""
    max_bad_fraction: float
    """Largest fraction of unreadable images; the run stops beyond it, and beyond this fraction of the first 100."""
    decode: str
    """cpu: the loader's workers decode. gpu: JPEG files go to the CUDA device, which decodes and crops them. The crops
    are the same boxes; colours differ by a few grey levels, since the decoders do."""

    def __post_init__(self) -> None:
        """Check ranges and choices."""
        require(self.images_size >= 1, "data.images_size", self.images_size, "must be at least 1 pixel")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "data.crop_scale", list(self.crop_scale), "needs 0 < smallest <= largest <= 1")
        require(0 < self.mask_ratio < 1, "data.mask_ratio", self.mask_ratio, "must lie between 0 and 1")
        subsampling = self.prediction_subsampling
        require(0 < subsampling <= 1, "data.prediction_subsampling", subsampling, "must be above 0 and at most 1")
        require_one_of("data.masking_generator", self.masking_generator, ("InverseBlock", "Block", "Uniform"))
        require(
            self.stream_shuffle_block >= 1, "data.stream_shuffle_block", self.stream_shuffle_block, "must be at least 1"
        )
        parts = self.stream_partitions
        require(parts is None or parts >= 1, "data.stream_partitions", parts, "must be at least 1, or null")
        require_one_of("data.decode", self.decode, ("cpu", "gpu"))
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "must lie in [0, 1]")


@dataclass(frozen=True)
class RopeConfig:
    """Arguments of `model.RotaryEmbedding`."""

    max_freq: float
    min_freq: float


@dataclass(frozen=True)
class AttentionConfig:
    """Arguments of `model.Attention`."""

    num_heads: int
    qkv_bias: bool
    proj_bias: bool
    rope_kwargs: RopeConfig


@dataclass(frozen=True)
class BlockConfig:
    """Arguments of `model.Block`."""

    drop_path_type: str
    """efficient (the branch runs on a subset of the images) or naive (its result is masked)."""
    attn_kwargs: AttentionConfig


@dataclass(frozen=True)
class TransformersConfig:
    """What encoder and predictor share."""

    embed_dim: int
    drop_path_rate: float
    block_kwargs: BlockConfig


@dataclass(frozen=True)
class DepthConfig:
    """Depth of one tower."""

    depth: int


@dataclass(frozen=True)
class ModelConfig:
    """Arguments of `model.EncoderDecoder`."""

    patch_size: int
    in_chans: int
    norm_layer_type: str
    """Name of a norm in torch.nn."""
    norm_layer_kwargs: dict[str, Any]
    final_norm_kwargs: dict[str, Any]
    n_registers: int
    register_coordinates: str
    """edge (spread over the border of the image, so a multiple of 4) or zeros."""
    scale_reg_to_visible: bool
    out_layer: int
    transformers_kwargs: TransformersConfig
    encoder_kwargs: DepthConfig
    decoder_kwargs: DepthConfig

    def __post_init__(self) -> None:
        """Check the divisibility rules."""
        require_one_of("model.register_coordinates", self.register_coordinates, ("edge", "zeros"))
        if self.register_coordinates == "edge":
            require(
                self.n_registers % 4 == 0,
                "model.n_registers",
                self.n_registers,
                "must be a multiple of 4 with model.register_coordinates=edge (one quarter per side); "
                "change it, or use model.register_coordinates=zeros",
            )
        towers = self.transformers_kwargs
        heads = towers.block_kwargs.attn_kwargs.num_heads
        require(heads >= 1, "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads", heads, "must be at least 1")
        require(
            towers.embed_dim % (4 * heads) == 0,
            "model.transformers_kwargs.embed_dim",
            towers.embed_dim,
            f"must be a multiple of 4 x num_heads = {4 * heads}, so that rotary embedding can split each head in four",
        )
        require(
            0 <= towers.drop_path_rate < 1,
            "model.transformers_kwargs.drop_path_rate",
            towers.drop_path_rate,
            "must lie in [0, 1)",
        )
        require_one_of(
            "model.transformers_kwargs.block_kwargs.drop_path_type",
            towers.block_kwargs.drop_path_type,
            ("efficient", "naive"),
        )
        for tower in ("encoder_kwargs", "decoder_kwargs"):
            require(
                getattr(self, tower).depth >= 1,
                f"model.{tower}.depth",
                getattr(self, tower).depth,
                "must be at least 1",
            )

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `model.EncoderDecoder`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CompileConfig:
    """How `torch.compile` treats one function."""

    disable: bool
    """True runs it eagerly."""
    dynamic: bool | None
    """Passed to torch.compile; null lets it decide."""


@dataclass(frozen=True)
class CompilationConfig:
    """The two compiled functions of the step."""

    do_teacher: CompileConfig
    do_student: CompileConfig
    cuda_graphs: bool
    """Replay each compiled function as a CUDA graph, for models whose kernels are shorter than their launches. Costs
    memory: results and temporaries get addresses of their own. For one process, or fsdp none; without a CUDA device it
    does nothing but say so in the log."""

    def __post_init__(self) -> None:
        """Check rules between the keys."""
        require(
            not self.cuda_graphs or not (self.do_teacher.disable and self.do_student.disable),
            "efficiency.compilation.cuda_graphs",
            self.cuda_graphs,
            "only compiled functions become graphs; set do_teacher.disable=false and do_student.disable=false",
        )


@dataclass(frozen=True)
class RematerializationConfig:
    """Which operators of a transformer block run again in the backward pass instead of keeping their results."""

    enabled: bool
    default: bool
    """Whether an operator that `policy` does not name is recomputed."""
    policy: dict[str, bool]
    """Operator name (`aten::mm`) -> recompute?"""


@dataclass(frozen=True)
class EfficiencyConfig:
    """Speed, memory and precision. Nothing here but the precision changes what is computed."""

    param_dtype: str
    """Precision of matmuls and activations: bfloat16, float16 or float32. Weights and optimizer stay float32."""
    teacher_fp8: bool
    """Compute the linear layers of the teacher's blocks in 8-bit floats, on an NVIDIA GPU of compute capability 8.9 or
    newer. It changes the targets a little."""
    reduce_dtype: str
    """Precision in which gradients are averaged over ranks."""
    fsdp: str
    """How weights are divided over ranks: simple (ours: each rank holds its part, gathered when used), fully_shard
    (torch's FSDP2) or none (whole weights everywhere, gradients averaged)."""
    fsdp_bucket_mib: float
    """simple, compiled: gathered weights per collective, in MiB. none: averaged gradients per collective."""
    fsdp_prefetch: int
    """simple, compiled: buckets of weights that are gathered ahead of the one in use."""
    grad_scaler: bool
    """Scale the loss and skip steps whose gradients overflow; for float16."""
    grad_scaler_growth_interval: int
    """Steps without overflow after which the scale doubles."""
    dataloader_num_workers: int
    """Processes that read and decode images, per rank. 0 decodes in the training process."""
    cache_dataset: bool
    """Keep the list of files of an image folder on disk, so that later starts need not read the whole tree."""
    compilation: CompilationConfig
    rematerialization: RematerializationConfig

    def __post_init__(self) -> None:
        """Check the choices."""
        require_one_of("efficiency.param_dtype", self.param_dtype, ("bfloat16", "float16", "float32"))
        require(
            not self.teacher_fp8 or self.param_dtype == "bfloat16",
            "efficiency.teacher_fp8",
            self.teacher_fp8,
            f"results are bfloat16; set efficiency.param_dtype=bfloat16 (it is {self.param_dtype}), or this to false",
        )
        require_one_of("efficiency.reduce_dtype", self.reduce_dtype, ("bfloat16", "float16", "float32"))
        require_one_of("efficiency.fsdp", self.fsdp, ("simple", "fully_shard", "none"))
        require(self.fsdp_bucket_mib >= 0, "efficiency.fsdp_bucket_mib", self.fsdp_bucket_mib, "must be 0 or more")
        require(self.fsdp_prefetch >= 0, "efficiency.fsdp_prefetch", self.fsdp_prefetch, "must be 0 or more")
        workers = self.dataloader_num_workers
        require(workers >= 0, "efficiency.dataloader_num_workers", workers, "must be 0 or more")
        require(
            self.grad_scaler or self.param_dtype != "float16",
            "efficiency.grad_scaler",
            self.grad_scaler,
            "float16 gradients underflow without it; set it to true, or use efficiency.param_dtype=bfloat16",
        )


@dataclass(frozen=True)
class EvalConfig:
    """One named set of evaluations of a run."""

    period: int
    """Steps between evaluations; 0 for none before the end."""
    final: bool
    """Whether it also runs after the last step."""
    model_to_eval: str
    """student or student_ema."""
    model_setup_script: str
    """Model file whose loader builds the model."""
    eval_config: dict[str, Any]
    """Name -> `file`, a script, and its keys, or for a name of default_eval_config.py only the keys that change."""
    where: str
    """process: on this machine, while training goes on. inline: on this machine, while training waits. slurm: as a job.
    auto: slurm for a training that is a Slurm job, else process."""

    def __post_init__(self) -> None:
        """Check the choices."""
        require_one_of("evals.*.model_to_eval", self.model_to_eval, ("student", "student_ema"))
        require_one_of("evals.*.where", self.where, ("auto", "process", "inline", "slurm"))
        for name, entry in chosen_evals(self.eval_config).items():
            known = bool({"file", "script"} & entry.keys())
            key = f"evals.*.eval_config.{name}"
            require(known, key, entry, f"needs file, or a name of {', '.join(sorted(EVALS))}")
            check_evaluation(key, entry)


def chosen_evals(eval_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Evaluations of a set, written out: a name of default_eval_config.py stands for what that file has.

    Raises: UserError if one is not made of keys.
    """
    for name, entry in eval_config.items():
        is_keys = entry is None or isinstance(entry, dict)
        require(is_keys, f"evals.*.eval_config.{name}", entry, "must be keys and their values, or {}")
    return {name: EVALS.get(name, {}) | dict(entry or {}) for name, entry in eval_config.items()}


def check_evaluation(key: str, entry: Mapping[str, Any]) -> Path:
    """The script of an evaluation, once it is sure that it exists and has the keys that are given.

    Args:
        key: of the entry, for messages.
        entry: `file`, and keys of that script.

    Raises: UserError naming the key.
    """
    if "script" in entry:
        raise UserError(f"{key}: {unknown_key('script', ('file',))}")
    require(isinstance(entry.get("file"), str), f"{key}.file", entry.get("file"), "must name an evaluation script")
    script = find_file(entry["file"], f"{key}.file")
    known = script_keys(script)
    for name in entry:
        if known is not None and name not in known | {"file"}:
            raise UserError(f"{key}: {unknown_key(name, sorted(known))}")
    return script


def find_file(path_name: str, key: str) -> Path:
    """A file as seen from the current folder, else from that of this one."""
    for path in (Path(path_name), ROOT / path_name):
        if path.is_file():
            return path
    raise UserError(f"{key}={path_name}: there is no such file")


def script_keys(script: Path) -> set[str] | None:
    """Keys of an evaluation script, read from its source and not run; None where they cannot be told from that."""
    keys: set[str] = set()
    configs = {"EvaluationConfig"}
    for path in (ROOT / "evaluation.py", script):
        try:
            tree = ast.parse(path.read_text())
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read as Python: {error}") from error
        for node in tree.body:
            bases = {ast.unparse(base).rpartition(".")[2] for base in getattr(node, "bases", ())}
            if not isinstance(node, ast.ClassDef) or not ({node.name} | bases) & configs:
                continue
            if bases - configs:
                return None
            configs.add(node.name)
            fields = (field for field in node.body if isinstance(field, ast.AnnAssign))
            keys |= {ast.unparse(f.target) for f in fields if not ast.unparse(f.annotation).startswith("ClassVar")}
    return keys if len(configs) > 1 else None


@dataclass(frozen=True)
class CapiConfig:
    """Everything `train_capi.py` reads."""

    launcher: LauncherConfig
    train: TrainConfig
    capi: CapiMethodConfig
    optim: OptimConfig
    data: DataConfig
    model: ModelConfig
    efficiency: EfficiencyConfig
    evals: dict[str, EvalConfig | None] | None
    """Named sets of evaluations; null for none, evals.<name>=null to leave one out."""

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        self.capi.clustering_optimizer.lr_schedule.check(
            "capi.clustering_optimizer.lr_schedule", self.optim.total_iters
        )
        size, patch = self.data.images_size, self.model.patch_size
        nearest = max(patch, round(size / patch) * patch)
        require(
            size % patch == 0,
            "data.images_size",
            size,
            f"must be a multiple of model.patch_size={patch}; the nearest is {nearest}",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a crop."""
        return self.data.images_size // self.model.patch_size


ConfigT = TypeVar("ConfigT")


def load_config(schema: type[ConfigT], default_path: Path | None, sources: list[str]) -> ConfigT:
    """Merge the default file, then `sources` in order, into a checked `schema` object.

    Args:
        schema: a frozen dataclass, without defaults if `default_path` has them.
        default_path: YAML file that gives every key a value; None if the dataclass does.
        sources: paths of YAML files and `a.b=c` overrides, as typed on the command line.

    Raises: UserError naming the key or file, its value and what to do instead.
    """
    merged = OmegaConf.structured(schema)
    _make_writable(merged)
    if default_path is not None:
        merged = _merge(merged, _read_yaml(default_path), str(default_path), schema)
    for source in sources:
        is_file = source.endswith((".yaml", ".yml")) and Path(source).is_file()
        if "=" in source and not is_file:
            merged = _merge(merged, _read_override(source), source, schema)
        else:
            merged = _merge(merged, _read_yaml(Path(source)), source, schema)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"{missing[0]}= must be given; --help shows a whole command")
    try:
        return OmegaConf.to_object(merged)  # pyright: ignore[reportReturnType]  # an instance of `schema`
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, "the configuration", schema)) from error


def to_yaml(cfg: object) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))  # pyright: ignore[reportArgumentType]


def changed_keys(old: object, new: object) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two nested dicts, as `a.b` -> (old, new); a key that one side lacks is None."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _make_writable(node: DictConfig) -> None:
    # Frozen dataclasses become read-only nodes, each for itself; only the merged object has to be frozen.
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_missing():
            _make_writable(child)


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        hint = "; overrides are written key=value" if path.suffix not in {".yaml", ".yml"} else ""
        raise UserError(f"There is no configuration file {str(path)!r}{hint}") from error
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {str(path)!r} cannot be read: {error}") from error
    except (yaml.YAMLError, GrammarParseError) as error:
        raise UserError(f"The configuration file {str(path)!r} is not valid YAML: {error}") from error
    if isinstance(loaded, ListConfig):
        raise UserError(f"The configuration file {str(path)!r} holds a list; it must hold `key: value` pairs")
    return loaded


def _read_override(text: str) -> DictConfig:
    key = text.split("=", 1)[0]
    if not key or any(not part for part in key.split(".")):
        raise UserError(f"{text!r} is not an override; write key=value, for example optim.total_iters=1000")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"The value of {text!r} is not valid YAML: {error}") from error


def _merge(base: DictConfig, top: DictConfig, source: str, schema: type) -> DictConfig:
    try:
        return OmegaConf.merge(base, top)  # pyright: ignore[reportReturnType]  # both are dicts
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, source, schema)) from error


def _explain(error: OmegaConfBaseException, source: str, schema: type) -> str:
    key = error.full_key
    first_line = str(error.msg or error).splitlines()[0]
    if not key:
        return f"{source}: {first_line}"
    keys = list(_schema_keys(schema))
    if key in keys:
        return f"{source}: {key}: {first_line}"
    return f"{source}: {unknown_key(key, keys)}"


def unknown_key(key: str, keys: Sequence[str]) -> str:
    """What to say of a key that is none of `keys`: what it is called, the nearest one, or which there are."""
    for other in OTHER_NAMES.get(key.rpartition(".")[2], ()):
        if " " in other:
            return f"unknown key {key}: {other}"
        if other in keys or other.rpartition(".")[0] in keys:  # arguments of a loader are no keys of ours
            return f"unknown key {key}; it is called {other}"
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or _same_name(key, keys)
    if close:
        return f"unknown key {key}; did you mean {close[0]}?"
    if key in OTHER_NAMES and "evals" in keys:
        return f"unknown key {key}; a key of one evaluation is given as evals.<name>.{OTHER_NAMES[key][0]}"
    return f"unknown key {key}; known sections: {', '.join(k for k in keys if '.' not in k)}"


def _same_name(key: str, keys: Sequence[str]) -> list[str]:
    """Keys of other sections whose last part looks like that of `key`, for a right name in the wrong place."""
    by_name = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    return [by_name[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_name), n=1, cutoff=0.8)]


def _schema_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        name = prefix + field.name
        keys[name] = field.type
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys |= _schema_keys(field.type, f"{name}.")
    return keys
