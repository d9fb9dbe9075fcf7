"""What every training has around its step: the state that a checkpoint holds, and a `Run` that watches the loop.

A method is a script with its configuration, its state and its step. The loop stays in the script:

    with Run(cfg, state, output_dir, ...) as run:
        while not run.is_over():
            scalars = train_step(state, run.next_batches(), ...)
            state.step += 1
            run.count(scalars, ...)
            run.log()
            run.save()
            run.evaluate()
    run.export()

`Run` never calls the step, and nothing here knows which method runs: it is told in plain values and callables.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import logging
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from checkpoint import Checkpoints, SavedState, export_weights, largest_magnitude
from config import (
    CompileConfig,
    EpochsConfig,
    OptimConfig,
    PretrainingImagesConfig,
    TrainingConfig,
    build,
    changed_keys,
    read_yaml,
    require,
    section_of,
    to_yaml,
)
from data import (
    Batch,
    DevicePrefetcher,
    PretrainLoader,
    WorkerAdvice,
    check_decode,
    cores_of_this_rank,
    merge_positions,
    normalizer,
)
from distributed import device_model, on_rank_0, pick_device, rank, session, world_size
from fsdp import Sharding, average_gradients_, divide_like, parallelize
from launch import StopRequest, claim_output_dir, launches, repeated_launch, requeue
from metrics import FiniteWatch, Metrics, Profile, Throughput, rounded_speed
from optim import MOMENTS, grad_norm
from probe import Probe
from reading.pixels import log_pixels, measure, sample_pixels
from reading.sources import cache_root, make_mixture
from report import CONTACT_SHEET, DRY_RUN_SHEET, Panel, write_panels
from sheets import NUM_IMAGES, VALUE_RANGE, Column, Look, as_rgb, normalised_column, write_sheet
from training_evals import Evaluations, plan_evals
from utils import (
    Normalisation,
    UserError,
    derive_seed,
    due,
    git_revision,
    reason,
    setup_logging,
    write_text_atomically,
    writing_explained,
)
from weights import not_finite

logger = logging.getLogger("capi")

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)
EpochsT = TypeVar("EpochsT", bound=EpochsConfig)
M = TypeVar("M", bound=nn.Module)

SMALLEST_SCALE = 1e-4
"""Of the loss, 30 skipped steps below the scale at the start: gradients that still overflow are not finite anyway."""
BATCH_KEYS = ("optim.batch_size_per_gpu.", "optim.accumulation_steps.")
"""What may be divided otherwise over ranks: their product with the number of ranks counts."""


class TrainState(Generic[ConfigT]):
    """Everything a checkpoint holds, and how an update acts on it; a method's state inherits from it.

    Its constructor calls this one, which seeds the initial weights, builds its networks with `place`, and fills
    `modules` and `optimizers`, under the names that checkpoints have. `optim.clip_grad` limits the gradient of `MAIN`.

    Args:
        cfg: of the training.
        device: where the networks are.
        plain: for a state that holds weights and makes no updates, on any device: without the parts of `speed`, which
            need not run there, whatever `cfg` says.
    """

    MODEL_KEYS: ClassVar[tuple[str, ...]] = ("model",)
    """Keys and sections of the configuration that say which weights there are."""
    MAIN: ClassVar[str] = "student"
    """The module whose gradient is clipped, and whose norm is called `grad_norm`."""
    LATER_KEYS: ClassVar[dict[str, Any]] = {}
    """Keys that earlier checkpoints lack, as nested dicts, with the values that those were trained with."""

    def __init__(self, cfg: ConfigT, device: torch.device, *, plain: bool = False) -> None:
        efficiency = cfg.efficiency
        self.cfg, self.device, self.plain, self.step = cfg, device, plain, 0
        self.dtype: torch.dtype = getattr(torch, efficiency.param_dtype)
        self.sharding = Sharding(
            mode=efficiency.fsdp,
            param_dtype=self.dtype,
            reduce_dtype=getattr(torch, efficiency.reduce_dtype),
            bucket_mib=efficiency.fsdp_bucket_mib,
            prefetch=efficiency.fsdp_prefetch,
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=efficiency.grad_scaler, growth_interval=efficiency.grad_scaler_growth_interval
        )
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        self.parts: dict[str, Any] = {"scaler": self.scaler}  # the same on all ranks; each has a state_dict
        self.position: dict[str, Any] | None = None  # in the data, of this rank, after the last finished update
        torch.manual_seed(derive_seed(cfg.train.seed, "init"))

    def place(
        self,
        make: Callable[[], M],
        name: str | None = None,
        *,
        compiles_blocks: bool = False,
        is_teacher: bool = False,
        is_filled: bool = False,
        load: Callable[[M], None] | None = None,
    ) -> M:
        """Build a network and put it on the device as `efficiency` says: recomputed, compiled and divided over ranks.

        One after the other: where weights are divided, no rank ever holds two whole networks.

        Args:
            make: builds it; every part has an `init_weights`, and transformer blocks a class attribute
                `is_transformer_block`.
            name: its blocks are compiled as `efficiency.compilation.<name>` says, where `compile` cannot compile the
                function that calls them; None for not.
            compiles_blocks: whether there is no such function, so that blocks are compiled everywhere.
            is_teacher: whether it gets no gradient.
            is_filled: whether `make` gives it its weights, on the CPU; they are rank 0's then.
            load: changes its weights before they are divided; called on rank 0 alone.
        """
        module = make().to(self.device) if is_filled else _materialise(make, self.device)
        if load is not None and rank() == 0:
            load(module)
        if is_teacher:
            module.requires_grad_(False).eval()
        blocks: list[nn.Module] = [p for p in module.modules() if hasattr(p, "is_transformer_block")]
        if not self.plain:
            self._speed_up(module, blocks, is_teacher)
            if name is not None and not (own := self._compilation(name)).disable:
                from speed.compiling import compile_blocks

                key = f"efficiency.compilation.{name}"
                compile_blocks(blocks, own, key, self.device, self.sharding, always=compiles_blocks)
        parallelize(module, self.sharding, self.device, blocks)
        return module

    def _speed_up(self, module: nn.Module, blocks: list[nn.Module], is_teacher: bool) -> None:
        """Of `speed`, only what is asked for is imported."""
        efficiency = self.cfg.efficiency
        if efficiency.attention == "xformers":
            from speed.attention import attend_by_xformers

            attention: list[nn.Module] = [p for p in module.modules() if hasattr(p, "attend")]
            attend_by_xformers(attention, self.device, self.dtype)
        if is_teacher and efficiency.teacher_fp8:
            from speed.fp8 import multiply_in_fp8

            multiply_in_fp8(blocks, self.device)
        if not is_teacher and efficiency.rematerialization.enabled:
            from speed.recomputing import recompute_blocks

            recompute_blocks(blocks, efficiency.rematerialization)
        if efficiency.offload_activations and not is_teacher and self.device.type == "cuda":
            from speed.offloading import offload_blocks

            offload_blocks(blocks)

    def _compilation(self, name: str) -> CompileConfig:
        return getattr(self.cfg.efficiency.compilation, name)

    def compile(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function of tensors, compiled as `efficiency.compilation.<name>` says."""
        own = self._compilation(name)
        if own.disable or self.plain:
            return function
        from speed.compiling import compile_function

        return compile_function(
            function,
            own,
            f"efficiency.compilation.{name}",
            device=self.device,
            sharding=self.sharding,
            cuda_graphs=self.cfg.efficiency.compilation.cuda_graphs,
        )

    def seed_of(self, purpose: str, forward_pass: int) -> int:
        """Seed of what is random in one of an update's forward passes: ranks are accumulation steps of one.

        Args:
            purpose: what is drawn.
            forward_pass: number among those of this update on this rank.
        """
        number = forward_pass * world_size() + rank()
        return derive_seed(self.cfg.train.seed, purpose, self.step, number)

    def zero_grad(self) -> None:
        """Forget the gradients of the last update."""
        for _, optimizer in self.optimizers.values():
            optimizer.zero_grad()
        if self.cfg.efficiency.compilation.cuda_graphs:  # if not, this would import the compiler, for no graph
            # What the graphs of the last step gave, gradients above all, is not needed any more. The first step says so
            # too: without any such mark, torch lets every call of a graph overwrite what earlier calls gave.
            torch.compiler.cudagraph_mark_step_begin()

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of a loss, scaled where float16 needs it."""
        self.scaler.scale(loss).backward()

    def apply_gradients(self) -> tuple[bool, dict[str, Tensor]]:
        """Average the gradients over the ranks and step all optimizers, or none of them if float16 ones overflowed.

        Returns: whether they were stepped; and the norm of each module's gradients, before clipping: `grad_norm` of
            `MAIN`, `<name>_grad_norm` of others. None if the update was skipped, which is no fault unless smaller and
            smaller scales do not help.
        """
        for module, _ in self.optimizers.values():
            average_gradients_(module, self.sharding)
        scaled = self.scaler.is_enabled()
        if scaled:
            for _, optimizer in self.optimizers.values():
                self.scaler.unscale_(optimizer)
        local = {name: grad_norm(module) for name, (module, _) in self.optimizers.items()}
        norms = {}
        for name, norm in local.items():
            key = "grad_norm" if name == self.MAIN else f"{name}_grad_norm"
            norms[key] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Only float16 has to know on the host whether to skip; elsewhere nothing waits for the device.
        skip = scaled and not bool(sum(norms.values(), torch.zeros((), device=self.device)).isfinite())
        if not skip:
            limit = self.cfg.optim.clip_grad
            if limit is not None:
                nn.utils.clip_grads_with_norm_(list(self.modules[self.MAIN].parameters()), limit, local[self.MAIN])
            for _, optimizer in self.optimizers.values():
                optimizer.step()
        if scaled:
            self.scaler.update()
        return not skip, {} if skip and self.scaler.get_scale() > SMALLEST_SCALE else norms

    def state_dict(self) -> dict[str, Any]:
        """What `Checkpoints.save` takes beside the step and the configuration."""
        return {
            "modules": self.modules,
            "optimizers": self.optimizers,
            "extra": {name: part.state_dict() for name, part in self.parts.items()},
            "rank_extra": {"data": self.position},
        }

    def network(self, name: str) -> Any:
        """The network, a module of named parts, that is exported under one of the configuration's `EXPORTS`."""
        return self.modules[name]

    def check(self, saved: SavedState) -> None:
        """Raise UserError for a checkpoint that cannot be continued, for a reason that no single key tells."""

    def load_state_dict(self, saved: SavedState) -> None:
        """Take over what is beside the tensors, which `Checkpoints` has loaded in place.

        The precision may be another one: the loss then has a fresh scale.
        """
        self.step = saved.step
        for name, part in self.parts.items():
            if saved.extra[name]:  # that of a scaler that was off is empty
                part.load_state_dict(saved.extra[name])
        self.scaler.set_growth_interval(self.cfg.efficiency.grad_scaler_growth_interval)  # which was loaded, too
        self.position = merge_positions([of_rank["data"] for of_rank in saved.rank_extra])


def _materialise(make: Callable[[], M], device: torch.device) -> M:
    """Build on the meta device, then fill the real storage: a parameter that no `init_weights` reaches stays NaN.

    On rank 0 alone: `parallelize` brings its weights to the others.
    """
    with torch.device("meta"):
        module = make()
    if rank() > 0:
        return module
    module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
    parts: Any = module.children() if isinstance(module, nn.ModuleDict) else [module]
    for part in parts:
        part.init_weights()
    return module


def sent_to(device: torch.device, x: Tensor) -> Tensor:
    """A copy of a tensor of the CPU that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def global_batch_size(optim: OptimConfig) -> int:
    """Images of one update, on all ranks."""
    return optim.batch_size_per_gpu * optim.accumulation_steps * world_size()


def with_length(cfg: EpochsT) -> EpochsT:
    """The configuration with `optim.total_iters` as `optim.epochs` asks for it, which needs the number of ranks.

    Raises: UserError if an epoch has fewer images than a batch, or something counted in steps does not fit.
    """
    optim, num_images = cfg.optim, cfg.data.images_per_epoch
    if optim.epochs is None or num_images is None:
        return cfg
    batch = global_batch_size(optim)
    require(
        num_images >= batch, "data.images_per_epoch", num_images, f"fewer than the {batch} images of one update; use "
        "a smaller optim.batch_size_per_gpu or optim.accumulation_steps",
    )  # fmt: skip
    total_iters = max(1, int(optim.epochs * (num_images // batch)))
    optim = dataclasses.replace(optim, total_iters=total_iters)
    optim.check_length()
    return dataclasses.replace(cfg, optim=optim)


def with_normalisation(cfg: ConfigT, output_dir: Path | None = None) -> ConfigT:
    """The configuration with numbers in place of `auto` in `data.value_range`, `mean` and `std`; all ranks call this.

    Those of the checkpoint that a training continues from, else measured; see `pixels.measure`.

    Args:
        cfg: of the training.
        output_dir: folder of the run; None for one that does not train.

    Raises: UserError if the data cannot be opened or measured.
    """
    data = cfg.data
    if not isinstance(data, PretrainingImagesConfig) or data.bands_are_known:
        return cfg
    if output_dir is not None:
        cfg = _measured_as(cfg, config_in(chosen_checkpoint(cfg, output_dir)))
        if cfg.data.bands_are_known:
            return cfg
    measured = on_rank_0(functools.partial(_measure, cfg))
    values = {"value_range": measured.value_range, "mean": list(measured.mean), "std": list(measured.std)}
    return _with_values(cfg, {key: value for key, value in values.items() if getattr(data, key) == "auto"})


def _measure(cfg: TrainingConfig) -> Normalisation:
    data: Any = cfg.data
    kept = cache_root() / "image_listings" if cfg.efficiency.cache_dataset else None
    dataset = make_mixture(data.dataset, key="data.dataset", listing_cache=kept)
    measured, found = measure(dataset, cfg.in_chans, data.value_range, cfg.train.seed)
    logger.info("measured on %d images of data.dataset: %s", found.num, measured.describe())
    for warning in found.warnings():
        logger.warning("data.dataset: %s", warning)
    return measured


def _measured_as(cfg: ConfigT, saved: Mapping[str, Any]) -> ConfigT:
    """The configuration with what a saved one has in place of `auto`."""
    before = section_of(saved, "data")
    keys = ("value_range", "mean", "std") if isinstance(cfg.data, PretrainingImagesConfig) else ()
    return _with_values(
        cfg,
        {key: before[key] for key in keys if getattr(cfg.data, key) == "auto" and before.get(key, "auto") != "auto"},
    )


def _with_values(cfg: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **values)) if values else cfg


def length_words(cfg: EpochsConfig) -> str:
    """How long the training is, in steps and, where the number of images is known, in epochs."""
    optim, num_images = cfg.optim, cfg.data.images_per_epoch
    batch = global_batch_size(optim)
    words = f"{optim.total_iters:,} steps of {batch:,} images"
    return words if num_images is None else f"{words} = {optim.total_iters * batch / num_images:.1f} epochs"


# --- Going on from a checkpoint, and exports -------------------------------------------------------------------------


def chosen_checkpoint(cfg: TrainingConfig, output_dir: Path) -> Path | None:
    """What a training in this folder would go on from, which need not be there or good; None if it would begin."""
    chosen = cfg.train.resume_from
    return Checkpoints(output_dir, keep=1).newest() if chosen is None else Path(chosen)


def config_in(checkpoint: Path | None) -> dict[str, Any]:
    """The configuration that a checkpoint has; empty without one that can be read, of which `restore` tells."""
    try:
        saved = None if checkpoint is None else read_yaml(checkpoint / "config.yaml")
    except UserError:
        saved = None
    return saved if isinstance(saved, dict) else {}


def weights_to_start_from(cfg: TrainingConfig, output_dir: Path) -> str | None:
    """`train.init_from`, unless the training continues from a checkpoint."""
    return cfg.train.init_from if chosen_checkpoint(cfg, output_dir) is None else None


def fill_adamw(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Callable[[], Mapping[str, Mapping[str, Tensor]]],
    *,
    source: str,
    key: str,
    unused: Collection[str] = (),
) -> None:
    """Let AdamW go on from moments that rank 0 reads, divided over ranks as its weights are; every rank calls it.

    Args:
        module: whose parameters it updates.
        optimizer: a fresh AdamW; its learning rates and other hyper-parameters stay.
        read: called on rank 0 alone: by the name of a parameter its `step`, `exp_avg` and `exp_avg_sq`.
        source: where they are from, for messages.
        key: the configuration key that asks for them, likewise.
        unused: names of parameters that get no gradient, whose moments do not matter.

    Raises: UserError on all ranks, naming the parameters whose moments are missing, misshapen or not finite.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad and name not in unused}
    moments: dict[str, Mapping[str, Tensor]] = {}

    def read_steps() -> dict[str, float]:
        moments.update({name: state for name, state in read().items() if name not in unused})
        shapes = {f"{name}.{part}": list(state[part].shape) for name, state in moments.items() for part in MOMENTS}
        expected = {f"{name}.{part}": list(p.shape) for name, p in parameters.items() for part in MOMENTS}
        wrong = [key for key in sorted(shapes.keys() | expected.keys()) if shapes.get(key) != expected.get(key)]
        if wrong:
            listing = ", ".join(f"{key} ({shapes.get(key)}, expected {expected.get(key)})" for key in wrong[:5])
            raise UserError(
                f"{key}=true: the optimizer in {source!r} is not that of this model: {len(wrong)} of "
                f"its tensors do not fit: {listing}; set it to false, or train the model of that file"
            )
        named = ((f"{name}.{part}", state[part]) for name, state in moments.items() for part in MOMENTS)
        if problem := not_finite(named):
            raise UserError(f"{key}=true: the optimizer in {source!r} is not all finite: {problem}; set it to false")
        return {name: float(state["step"]) for name, state in moments.items()}

    steps = on_rank_0(read_steps)
    number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, step in steps.items():
        parameter, own = parameters[name], moments.get(name, {})
        divided = {part: divide_like(parameter, own.get(part)) for part in MOMENTS}
        state[number[parameter]] = {"step": torch.tensor(step), **divided}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore(state: TrainState[Any], checkpoints: Checkpoints) -> SavedState | None:
    """Load the checkpoint that the config chooses into `state`: `resume_from`, or the newest with `auto_resume`.

    Raises: UserError if it is damaged, or holds another model or numbers that are not finite, or if there are
        checkpoints and `auto_resume` is off.
    """
    train = state.cfg.train
    places: dict[str, Any] = {
        "modules": state.modules,
        "optimizers": state.optimizers,
        "config": dataclasses.asdict(state.cfg),
    }
    if train.resume_from is not None:
        saved = checkpoints.restore(train.resume_from, **places, launches=launches(), repeated=repeated_launch())
    elif train.auto_resume:
        saved = checkpoints.restore_latest(**places)
    else:
        if checkpoints.newest() is not None:
            raise UserError(
                f"train.auto_resume=false, but train.output_dir={train.output_dir!r} has checkpoints of an earlier "
                "run; choose another train.output_dir, or continue it with train.auto_resume=true"
            )
        return None
    if saved is not None:
        if not bool(largest_magnitude(state.modules, state.optimizers).isfinite()):
            raise UserError(
                f"The checkpoint {str(saved.path)!r} holds weights or optimizer state that are NaN or infinite: it was "
                f"saved after training had diverged. {checkpoints.remedy(saved.path)}"
            )
        state.load_state_dict(saved)
    return saved


def warn_of_another_course(
    saved: SavedState,
    cfg: TrainingConfig,
    course_keys: Sequence[str],
    scheduled_values: Callable[[int, Any], Mapping[str, float]],
) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint, and of what they move.

    Args:
        saved: the checkpoint.
        cfg: of this run.
        course_keys: keys and sections that the rest of a training depends on.
        scheduled_values: the scheduled values of a step with a configuration, by their names for people.
    """
    told = [
        f"{key} {old!r} -> {new!r}"
        for key, (old, new) in changed_keys(saved.config, dataclasses.asdict(cfg)).items()
        if any(f"{key}.".startswith(f"{part}.") for part in course_keys) and f"{key}." not in BATCH_KEYS
    ]
    if isinstance(cfg.data, PretrainingImagesConfig):
        before = Normalisation.of(saved.config["data"])
        if before != cfg.data.normalisation:
            told.append(f"normalisation, {before.describe()} -> {cfg.data.normalisation.describe()}")
    optim = saved.config["optim"]
    old_batch = optim["batch_size_per_gpu"] * optim["accumulation_steps"] * saved.world_size
    if old_batch != global_batch_size(cfg.optim):
        told.append(f"images of one update, on all ranks, {old_batch} -> {global_batch_size(cfg.optim)}")
    if not told:
        return
    try:
        sections = {
            name: build(type(getattr(cfg, name)), saved.config[name], name)
            for name in dict.fromkeys(key.partition(".")[0] for key in course_keys)
        }
    except UserError as error:
        moves = f"the schedules there cannot be compared: {error}"
    else:
        before = scheduled_values(saved.step, dataclasses.replace(cfg, **sections))
        after = scheduled_values(saved.step, cfg)
        moves = "at this step: " + ", ".join(f"{name} {before[name]:.4g} -> {after[name]:.4g}" for name in after)
    logger.warning(
        "other than at the checkpoint, which changes the rest of the training: %s; %s", ", ".join(told), moves
    )


def export(state: TrainState[Any], name: str, path: Path) -> None:
    """Write a network in the format of released weights, with its config beside it; every rank calls it.

    Args:
        state: of the training.
        name: one of the configuration's `EXPORTS`.
        path: of the file.
    """
    export_weights(path, dict(state.network(name).items()), to_yaml(state.cfg))


def export_all(state: TrainState[Any], output_dir: Path) -> list[Path]:
    """Write every network that this method exports to the folder of the run; returns the files."""
    paths = [output_dir / f"{name}.pth" for name in sorted(state.cfg.EXPORTS)]
    for path in paths:
        export(state, path.stem, path)
    return paths


def export_newest(
    cfg: ConfigT, output_dir: Path, make_state: Callable[[ConfigT, torch.device], TrainState[Any]]
) -> list[Path]:
    """Export the checkpoint that training would continue from; returns the files.

    Args:
        cfg: of the training, as typed.
        output_dir: folder of the run.
        make_state: builds a plain state.

    Raises: UserError if there is none.
    """
    checkpoint = chosen_checkpoint(cfg, output_dir)
    if checkpoint is None:
        raise UserError(f"train.output_dir={cfg.train.output_dir!r} has no checkpoint to export; train first")
    saved = config_in(checkpoint)
    state = make_state(_measured_as(cfg, saved).as_trained(saved), torch.device("cpu"))
    checkpoints = Checkpoints(
        output_dir,
        keep=cfg.train.checkpointing.max_to_keep,
        model_keys=state.MODEL_KEYS,
        later_keys=state.LATER_KEYS,
        check=state.check,
        only_reads=True,
    )
    restore(state, checkpoints)
    return export_all(state, output_dir)


# --- What is going to be seen ----------------------------------------------------------------------------------------


def _no_columns(_batch: Batch, _num_images: int) -> list[Column]:
    return []


def write_contact_sheet(
    path: Path, batch: Batch, look: Look, normalize: Callable[[Tensor], Tensor], heading: str
) -> str:
    """Draw the first crops of a batch, what the networks get of them, and what `look` adds. Returns words about it.

    Args:
        path: the PNG.
        batch: of images as the loader gives them, on any device.
        look: see `sheets.Look`.
        normalize: from these to what the networks get.
        heading: what batch this is.
    """
    num_images = min(NUM_IMAGES, len(batch.images))
    normalised = normalised_column(normalize(batch.images[:num_images]))
    on_cpu = batch.to("cpu")
    added = [column._replace(pictures=list(column.pictures)[:num_images]) for column in look(on_cpu, num_images)]
    # What has no pictures says something about the crops.
    captions = next((column.captions for column in added if not column.pictures), ())
    crops = Column("crop", as_rgb(on_cpu.images[:num_images]), captions)
    height, width = batch.images.shape[-2:]
    shown = f"{num_images} of {len(batch.sample_ids)} crops of {height} x {width} px, {heading}"
    scale = f"What the networks get is drawn from {-VALUE_RANGE} (black) to {VALUE_RANGE} (white): a crop, only paler."
    write_sheet(path, [crops, normalised, *(column for column in added if column.pictures)], [shown, scale])
    return f"{num_images} crops; {normalised.title}"


# --- The run ---------------------------------------------------------------------------------------------------------


class Run:
    """Everything that watches a training, as a context around its loop; all ranks go through it together.

    It owns the data, averages and log, bar, speed, profile, probe, evaluations, checkpoints, signals and garbage. Its
    beginning restores `state`; the end of the block closes all of it, and puts a Slurm job that was asked to stop back
    into the queue. The methods are called once per update, in the order of the module's docstring; each does what is
    due after that update.

    Args:
        cfg: of the training.
        state: freshly built.
        output_dir: folder of the run, which this process has claimed.
        make_loader: makes the data loader of this rank; takes the keyword arguments of `PretrainLoader` that say where
            it runs and where it continues.
        encode: patch features [b, n, d] of the network that is probed, of normalised images.
        log_line: the part of a log line that says how the method does, from the averages.
        finite: names of those scalars of a step that have to be finite.
        panels: curves that reports of the training show.
        flops_per_image: model FLOPs of a step per image; None if nobody has counted them.
        opening: what is trained, for the log.
        warnings: what is not going to go well, for the log.
        on_resume: told of the checkpoint that the training continues from.
        normalize: from images as batches have them to what the networks get; by default as `data` says.
        look: what the contact sheet shows beside crops.

    Raises: UserError for what cannot be read, written or restored.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        state: TrainState[Any],
        output_dir: Path,
        *,
        make_loader: Callable[..., PretrainLoader],
        encode: Callable[[Tensor], Tensor],
        log_line: Callable[[Mapping[str, float]], str],
        finite: Sequence[str],
        panels: Sequence[Panel] = (),
        flops_per_image: float | None,
        opening: str,
        warnings: Sequence[str] = (),
        on_resume: Callable[[SavedState], None] = lambda _: None,
        normalize: Callable[[Tensor], Tensor] | None = None,
        look: Look = _no_columns,
    ) -> None:
        self._normalize, self._look = normalize or normalizer(cfg.data.normalisation), look
        self._has_sheet = rank() != 0
        self.cfg, self.state, self.output_dir, self.device = cfg, state, output_dir, state.device
        self.total = cfg.optim.total_iters
        self._make_loader, self._encode, self._log_line, self._finite = make_loader, encode, log_line, finite
        check_decode(cfg.data.decode, self.device)
        saving = cfg.train.checkpointing
        self.checkpoints = Checkpoints(
            output_dir,
            keep=saving.max_to_keep,
            async_save=saving.async_save,
            model_keys=state.MODEL_KEYS,
            later_keys=state.LATER_KEYS,
            check=state.check,
        )
        self.meters = Metrics(output_dir, cfg.train.loggers, config=dataclasses.asdict(cfg), enabled=rank() == 0)
        state.parts["metrics"] = self.meters
        saved = restore(state, self.checkpoints)
        if saved is not None:
            on_resume(saved)
        self.meters.truncate_after(state.step, keep_copy=cfg.train.resume_from is not None)
        if rank() == 0:
            self.meters.path.touch()  # evaluations before the first log line look for it
            write_text_atomically(output_dir / "config.yaml", to_yaml(cfg))
            if panels:
                write_panels(output_dir, panels)
        self._open_log(saved, opening, warnings)
        self.probe = None
        if cfg.train.probe.every > 0:
            self.probe = Probe(
                cfg.train.probe,
                images_size=cfg.data.crop_size,
                batch_size=cfg.optim.batch_size_per_gpu,
                device=self.device,
                normalisation=cfg.data.normalisation,
            )
        self.watch = FiniteWatch()
        self.speed = Throughput(
            global_batch_size(cfg.optim),
            flops_per_image,
            self.device,
            world_size(),
            param_dtype=cfg.efficiency.param_dtype,
        )
        self.step = state.step  # finished updates once the one under way is
        self._waited = 0.0
        self._has_evals_left = False  # by a stop after the last step

    def _open_log(self, saved: SavedState | None, opening: str, warnings: Sequence[str]) -> None:
        versions = (torch.__version__, self.device, device_model(self.device), world_size(), git_revision())
        logger.info("torch %s on %s (%s), %d process(es), code %s", *versions)
        logger.info("%s", opening)
        if isinstance(self.cfg.data, PretrainingImagesConfig):
            logger.info("normalised: %s", self.cfg.data.normalisation.describe())
        for warning in [*efficiency_warnings(self.cfg, self.device), *warnings]:
            logger.warning("%s", warning)
        if saved is None:
            logger.info("starting at step 0 of %d", self.total)
        else:
            logger.info("continuing %s at step %d of %d", saved.path, saved.step, self.total)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(StopRequest())
            stack.push(self._leave)
            stack.callback(self.meters.close)
            stack.enter_context(self.checkpoints)
            loader = stack.enter_context(
                self._make_loader(
                    rank=rank(),
                    world_size=world_size(),
                    position=self.state.position,
                    pin_memory=self.device.type == "cuda",
                    decode_device=self.device,
                    bad_files_path=self.output_dir / "bad_files.jsonl",
                )
            )
            loader.check_shared_memory()
            if rank() == 0:
                for line in loader.shares():
                    logger.info("data.dataset: %s", line)
                log_pixels(loader.dataset, "data.dataset", self.cfg.data.bands)
            self.batches = DevicePrefetcher(loader, self.device)
            self.advice = WorkerAdvice(self.batches, cores_of_this_rank())
            num_steps, enabled = self.total - self.state.step, self.cfg.train.profiling and rank() == 0
            self.profile = stack.enter_context(
                Profile(self.output_dir, enabled, num_steps=num_steps, device=self.device)
            )
            if rank() == 0:
                stack.enter_context(logging_redirect_tqdm())  # its handler knows no levels, and would make others talk
            self.bar = stack.enter_context(
                tqdm(
                    total=self.total,
                    initial=self.state.step,
                    unit="step",
                    disable=None if rank() == 0 else True,
                    dynamic_ncols=True,
                )
            )
            stack.enter_context(_collected_by_hand())
            self.evals = Evaluations(
                self.output_dir,
                self.cfg.evals,
                self.cfg.launcher,
                self.stop,
                device=self.cfg.train.device,
                kept_step=self.state.step,
            )
            stack.callback(self.evals.close)
            stack.push(self._finish)
            with self.speed.paused():
                self.evals.take_up()
                if 0 < self.state.step < self.total:  # who saved this step may have ended before it came to them
                    self.evals.launch_due(self.state.step, self._export)
            self._inputs = self._read() if self.state.step < self.total else []
            self._stopping = self.stop.agreed()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool:
        return bool(self._stack.__exit__(*error))

    def is_over(self) -> bool:
        """Whether all updates are done, or all ranks have agreed to stop."""
        return self.state.step >= self.total or self._stopping

    def next_batches(self) -> list[Batch]:
        """The normalised batches of the next update, one per accumulation step, on the device."""
        self.step = self.state.step + 1
        return self._inputs

    @property
    def is_last(self) -> bool:
        """Whether the update under way is the last one."""
        return self.step == self.total

    @property
    def logs(self) -> bool:
        """Whether a log line follows on the update under way."""
        return self.is_last or due(self.step, self.cfg.train.log_loss_every)

    @property
    def looks_at_health(self) -> bool:
        """Whether the update under way computes the costlier health metrics."""
        return due(self.step, self.cfg.train.health_every)

    def count(self, scalars: Mapping[str, Tensor], hyper: Mapping[str, float]) -> None:
        """Take in a finished update, without waiting for the device, and read the batches of the next one.

        Args:
            scalars: what the step returned.
            hyper: its scheduled values, logged beside these.

        Raises: NonFiniteError, where it is looked for, if a scalar was not finite; the run cannot go on from there.
        """
        assert self.step == self.state.step, "count follows on `state.step += 1`"
        self.meters.update(**scalars, **hyper)
        self.watch.update(self.step, **{name: scalars[name] for name in self._finite if name in scalars})
        self.state.position = self.batches.state_dict()
        if not self.is_last:
            self._inputs = self._read()  # while the device works on this one
        self.speed.step(self.batches.wait_s - self._waited)
        self._waited = self.batches.wait_s
        with self._writes():
            self.profile.step()
        self.bar.update()
        self._stopping = self.stop.agreed()
        if self._saves:  # a finite gradient can still throw the weights out of range
            self.watch.update(self.step, weights=largest_magnitude(self.state.modules, self.state.optimizers))
        if self._saves or self.evals.are_due(self.step) or due(self.step, self.cfg.train.nan_check_period):
            self.watch.check(self.checkpoints.last)

    def log(self) -> None:
        """Where they are due, write the averages since the last line, and the scores of the probe."""
        if self.logs:
            with self._writes():
                self._log(self.meters.write(self.step, **self.speed.read(self.total - self.step)))
            if line := self.advice.read():
                logger.warning(line)
            gc.collect(1)
        if self.probe is not None and (self.is_last or due(self.step, self.cfg.train.probe.every)):
            with self.speed.paused():
                scores = self.probe(self._encode)
            with self._writes():
                self._log_probe(self.meters.append(self.step, scores))

    def save(self) -> None:
        """Where it is due, save a checkpoint; on disk it is only later with `train.checkpointing.async_save`."""
        if self._saves:
            with self.speed.paused():
                self.checkpoints.save(self.step, **self.state.state_dict(), config_yaml=to_yaml(self.cfg))
        if self.is_last or self._stopping:
            self.checkpoints.wait()  # here, where a second signal does not end it

    def evaluate(self) -> None:
        """Launch the evaluations that are due, and write down the scores of those that have ended."""
        if not self.is_last and not self._stopping and self.evals.are_due(self.step):
            with self.speed.paused():
                self.evals.launch_due(self.step, self._export)
        if self.logs:
            with self.speed.paused(), self._writes():
                self.evals.record(self.meters, self.step)

    def export(self) -> None:
        """After the block, export the networks if the training is complete."""
        if self.state.step < self.total:
            return
        for path in export_all(self.state, self.output_dir):
            logger.info("exported %s", path)

    @property
    def _saves(self) -> bool:
        return self.is_last or self._stopping or due(self.step, self.cfg.train.checkpointing.period)

    def _export(self, name: str, path: Path) -> None:
        export(self.state, name, path)

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        """One rank alone writes here: the others learn at the next agreement that it cannot."""
        with self.stop.faults(), writing_explained(self.output_dir, "train.output_dir"):
            yield

    def _read(self) -> list[Batch]:
        """Batches of the next update; none if there is a reason to stop, which the next agreement tells all ranks."""

        def read() -> list[Batch]:
            batches = [next(self.batches) for _ in range(self.cfg.optim.accumulation_steps)]
            if not self._has_sheet:
                self._has_sheet = True
                self._draw_sheet(batches[0])
            return [dataclasses.replace(batch, images=self._normalize(batch.images)) for batch in batches]

        with self._writes():  # bad files are listed
            return self.stop.wait_for(read) or []
        return []

    def _draw_sheet(self, batch: Batch) -> None:
        path = self.output_dir / CONTACT_SHEET
        heading = f"first batch after step {self.state.step}"
        try:
            words = write_contact_sheet(path, batch, self._look, self._normalize, heading)
            logger.info("contact sheet: %s (%s)", path, words)
            self.meters.picture(self.state.step, path.stem, path)
        except OSError as error:  # no picture is worth a training
            logger.warning("no contact sheet: %s cannot be written: %s", path, reason(error))

    def _log(self, values: Mapping[str, float]) -> None:
        """One line for people. On a terminal the bar has steps and time already."""
        mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
        minutes, seconds = divmod(round(values["eta_s"]), 60)
        logger.info(
            "step %d/%d  %s  lr %.1e  |  %s img/s%s, data wait %.0f%%, %.1f GiB, %d:%02d left",
            *(
                values["step"],
                self.total,
                self._log_line(values),
                values["lr"],
                rounded_speed(values["images_per_s"]),
                mfu,
            ),
            *(100 * values["data_wait"], values["memory_gib"], minutes, seconds),
        )
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)

    def _log_probe(self, values: Mapping[str, float]) -> None:
        logger.info(
            "step %d  probe: k-NN %.1f %%, linear %.1f %%, in %.1f s",
            *(values["step"], 100 * values["probe_knn"], 100 * values["probe_linear"], values["probe_s"]),
        )

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """At the end of the block, while all is open: the last evaluations, and an agreement on faults since."""
        if kind is not None:
            return
        if self.state.step == self.total:
            self.evals.launch_due(self.total, self._export, final=True)
            self._has_evals_left = not self.evals.wait()
            with self._writes():
                self.evals.record(self.meters, self.total)
        self.stop.agreed()

    def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """At the end of the block, once all is closed: say why the run stops, and queue a job of Slurm again."""
        if kind is not None or not (self.stop.is_fault or self.state.step < self.total or self._has_evals_left):
            return
        places = (self.stop.name, self.state.step, self.total)
        logger.info("stopped by %s after %d of %d steps; the same command continues", *places)
        if not self.stop.is_fault:
            requeue(self.stop)


@contextlib.contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Collect garbage at log steps only, so that it falls into no step, or into some ranks' and not into others'."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- The command -----------------------------------------------------------------------------------------------------


def run_command(
    args: argparse.Namespace,
    cfg: ConfigT,
    *,
    dry_run: Callable[[ConfigT], str],
    train: Callable[[ConfigT, Path, torch.device], None],
    make_state: Callable[[ConfigT, torch.device], TrainState[Any]],
    has_kernels: bool = True,
    exporter: str | None = None,
) -> int:
    """Do what the options of `utils.add_training_options` ask for. Returns the exit code.

    What the configuration leaves to be measured is, before a dry run or a training; see `with_normalisation`.

    Args:
        args: the parsed command line.
        cfg: what its sources gave.
        dry_run: says what would be trained with a configuration.
        train: trains in a folder, on a device.
        make_state: builds a plain state, to export from; with what `TrainingConfig.as_trained` gives.
        has_kernels: whether the training has kernels of its own on a GPU, which are compiled there.
        exporter: the script that exports a run also while it trains; None if there is none.
    """
    if args.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    if args.dry_run:
        sys.stdout.write(dry_run(with_normalisation(cfg)))
        return 0
    remedy = None
    if args.export and exporter is not None:
        command = shlex.join(["python", exporter, cfg.train.output_dir, "backbone.pth"])
        remedy = f"what it has saved so far is exported by: {command}"
    with session(cfg.train.device) as device, claim_output_dir(cfg.train.output_dir, remedy=remedy) as output_dir:
        setup_logging(output_dir / "log.txt" if rank() == 0 else None, quiet=rank() != 0)
        if args.export:
            sys.stdout.writelines(f"{path}\n" for path in export_newest(cfg, output_dir, make_state))
            return 0
        options = cfg.efficiency.compilation
        compiles = not (options.do_teacher.disable and options.do_student.disable)
        kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if compiles or (device.type == "cuda" and has_kernels):
            from speed.compiling import kept_compilations

            kept = kept_compilations(output_dir / "compile_cache")
        with kept:
            train(with_normalisation(cfg, output_dir), output_dir, device)
    return 0


def describe(
    cfg: TrainingConfig,
    make_loader: Callable[..., PretrainLoader],
    *,
    sizes: Sequence[str],
    costs: Sequence[str],
    schedule: Sequence[str],
    warnings: Sequence[str],
    look: Look = _no_columns,
    normalize: Callable[[Tensor], Tensor] | None = None,
    make_state: Callable[..., TrainState[Any]] | None = None,
) -> str:
    """What a training with this config would be, without training: the text of `--dry-run`.

    Args:
        cfg: of the training.
        make_loader: as for `Run`.
        sizes, costs: lines about image, tokens and parameters, and about memory and compute.
        schedule: lines of a table, one per step of `milestones`, under a head.
        warnings: what is not going to go well.
        look, normalize: as for `Run`.
        make_state: takes config, device, `plain` and `init_from`. With `train.init_from` the networks are built on
            the CPU: what is not taken of the weights is logged, and what does not fit is an error now.
    """
    device, optim, data = pick_device(cfg.train.device), cfg.optim, cfg.data
    init_from = weights_to_start_from(cfg, Path(cfg.train.output_dir))
    if make_state is not None and init_from is not None:
        make_state(cfg, torch.device("cpu"), plain=True, init_from=init_from)
    check_decode(cfg.data.decode, device)
    place = {"rank": 0, "world_size": 1, "position": None, "pin_memory": False, "bad_files_path": None}
    with make_loader(**place, decode_device=device) as loader:
        loader.check_shared_memory()
        images, shares, pixels = loader.describe(), loader.shares(), sample_pixels(loader.dataset, data.bands)
        sheet = _sheet_of_dry_run(cfg, loader, look, normalize or normalizer(data.normalisation))
    lines = [
        f"data         {images}",
        *(f"             {line}" for line in shares),
        *(f"pixels       {line}" for line in pixels.lines()),
        *([f"normalised   {data.normalisation.describe()}"] if isinstance(data, PretrainingImagesConfig) else []),
        f"pictures     {sheet}",
        *([f"start        {init_from}"] if init_from is not None else []),
        f"batch        {global_batch_size(optim)} images = {optim.batch_size_per_gpu} per forward pass x "
        f"{optim.accumulation_steps} accumulation steps x {world_size()} process(es)",
        *sizes,
        f"device       {device}, {cfg.efficiency.param_dtype}",
        *costs,
        *schedule,
        *(f"evaluation   {line}" for line in plan_evals(cfg.evals)[1]),
        *(f"warning      {w}" for w in [*pixels.warnings(), *efficiency_warnings(cfg, device), *warnings]),
    ]
    return "\n".join(lines) + "\n"


def _sheet_of_dry_run(
    cfg: TrainingConfig, loader: PretrainLoader, look: Look, normalize: Callable[[Tensor], Tensor]
) -> str:
    """Draw the first batch, and say where. A dry run tells all it can, so that what fails here is said, not raised."""
    folder = Path(cfg.train.output_dir)
    if folder.resolve() == Path.cwd():
        return "none; name a folder in train.output_dir for a contact sheet of the first crops"
    path = folder / DRY_RUN_SHEET
    try:
        batch = loader.peek(NUM_IMAGES)
        folder.mkdir(parents=True, exist_ok=True)
        return f"{path}, {write_contact_sheet(path, batch, look, normalize, 'first batch of a training')}"
    except UserError as error:
        return f"none: {error}"
    except OSError as error:
        return f"none: train.output_dir={cfg.train.output_dir!r} cannot be written: {reason(error)}"


def efficiency_warnings(cfg: TrainingConfig, device: torch.device) -> list[str]:
    """What keeps a training from being fast, or from saving memory, on this device."""
    recomputed, student = cfg.efficiency.rematerialization.enabled, cfg.efficiency.compilation.do_student
    if cfg.efficiency.offload_activations and device.type != "cuda":
        return [
            f"efficiency.offload_activations=true: does nothing on {device}, whose memory is the host's; it is for "
            "CUDA devices"
        ]
    if device.type != "cuda" or not recomputed or not student.disable:
        return []
    return [
        "efficiency.rematerialization.enabled=true: without compilation, choosing what is kept takes longer than the "
        "GPU needs (a step of ViT-S/14 with 256 images on an H100: 349 ms instead of 108); set it to false if memory "
        "allows (there 5.2 instead of 3.9 GiB), or efficiency.compilation.do_student.disable=false"
    ]


def milestones(optim: OptimConfig) -> list[int]:
    """Steps at which schedules are worth showing: start, end of the warm-up, middle and last step."""
    total = optim.total_iters
    return sorted({0, optim.lr_schedule.warmup_steps(total), total // 2, total - 1})
