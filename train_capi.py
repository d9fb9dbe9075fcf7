"""Pretrain CAPI (arXiv:2502.08769): the teacher clusters patches, the student predicts the clusters of hidden ones.

    python train_capi.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue where a run stopped
    python train_capi.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python train_capi.py config.yaml train.output_dir=DIR --export    write student.pth and student_ema.pth of a run

Later files and overrides win over earlier ones, and all over default_pretrain_config.yaml.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and stop")
    parser.add_argument("--print-config", action="store_true", help="check and print the resolved config and stop")
    parser.add_argument("--export", action="store_true", help="write the weights of the newest checkpoint and stop")

import contextlib
import functools
import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import metrics
from checkpoint import Checkpoints, SavedState, claim_output_dir, export_weights, largest_magnitude
from clustering import L2NormLinear, OnlineClustering, entropy, soft_cross_entropy
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, build, changed_keys, load_config, to_yaml
from crops import check_decode
from data import (
    Batch,
    DevicePrefetcher,
    PretrainLoader,
    WorkerAdvice,
    cores_of_this_rank,
    derive_seed,
    merge_positions,
    normalize,
)
from distributed import all_reduce_sum_, pick_device, rank, session, world_size
from evals import EvalRuns, plan_evals
from fsdp import (
    Sharding,
    attend_by_xformers,
    average_gradients_,
    compile_blocks,
    compile_function,
    kept_compilations,
    multiply_in_fp8,
    parallelize,
    recompute_blocks,
)
from fused_clustering import use_triton
from launch import StopRequest, requeue, was_requeued
from masking import MaskPlan, make_masking_generator
from metrics import FiniteWatch, Metrics, Profile, StepShape, Throughput, training_flops_per_image
from model import Attention, Block, EncoderDecoder, RotaryEmbedding
from optim import (
    Hyper,
    ema_update_,
    grad_norm,
    hyper_at,
    make_clustering_optimizer,
    make_student_optimizer,
    set_hyper,
)
from pixels import log_pixels, sample_pixels
from probe import Probe
from utils import (
    UserError,
    due,
    ending_in_words,
    git_revision,
    setup_logging,
    write_text_atomically,
    writing_explained,
)
from weights import backbone_part, load_backbone_weights, read_state_dict

logger = logging.getLogger("capi")

COURSE_KEYS = ("optim.", "capi.student_temp.", "capi.clustering_kwargs.", "capi.clustering_optimizer.")
"""What the rest of a training depends on: a change when it continues is a warning."""
SCHEDULED = {"lr": "learning rate", "clustering_lr": "that of the clustering head", "momentum": "EMA momentum"}
"""Fields of `Hyper`, for people."""
BATCH_KEYS = ("optim.batch_size_per_gpu.", "optim.accumulation_steps.")
"""Of these, what may be divided otherwise over ranks: their product with the number of ranks counts."""
WATCHED = ("capi_loss", "clustering_loss", "grad_norm", "clustering_grad_norm")
"""Scalars of a step that must be finite."""
HEALTH_TOKENS = 4096
"""Teacher patch tokens from which the health metrics are computed."""
SMALLEST_SCALE = 1e-4
"""Of the loss, 30 skipped steps below the scale at the start: gradients that still overflow are not finite anyway."""


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
    student_temp: float,
    dtype: torch.dtype,
) -> Float[Tensor, ""]:
    """Cross-entropy between targets and predictions, summed over the predicted tokens in float64."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        backbone: Any = student["backbone"]
        _, predictions = backbone.forward_pretrain(
            images, visible_indices, predict_indices, do_prediction=True, drop_path=drop_path
        )
        logits = student["head"](predictions)
    per_token = soft_cross_entropy(targets, logits, student_temp)
    return per_token.sum() if per_token.device.type == "mps" else per_token.double().sum()  # mps has no float64


class TrainState:
    """Everything a checkpoint holds, and how one update acts on it.

    Modules: `student` {backbone, head}; `student_ema`, their moving average, whose backbone is the teacher and which is
    what a run exports; `clustering`, the teacher's head.
    """

    def __init__(
        self, cfg: CapiConfig, device: torch.device, *, compiled: bool = True, init_from: str | None = None
    ) -> None:
        self.cfg, self.device, self.step = cfg, device, 0
        self.dtype: torch.dtype = getattr(torch, cfg.efficiency.param_dtype)
        efficiency = cfg.efficiency
        self.sharding = Sharding(
            mode=efficiency.fsdp,
            param_dtype=self.dtype,
            reduce_dtype=getattr(torch, efficiency.reduce_dtype),
            bucket_mib=efficiency.fsdp_bucket_mib,
            prefetch=efficiency.fsdp_prefetch,
        )
        use_triton(cfg.capi.clustering_kernel, device)  # raises early
        torch.manual_seed(derive_seed(cfg.train.seed, "init"))
        # One after the other: where weights are divided, no rank ever holds two whole modules.
        self.student = _materialise(self._make_student, device)
        if efficiency.attention == "xformers":
            attend_by_xformers(_attention_of(self.student), device, self.dtype)
        if init_from is not None and rank() == 0:
            start_from(self.student["backbone"], init_from)
        recompute_blocks(_blocks_of(self.student), efficiency.rematerialization)
        if compiled:
            compile_blocks(_blocks_of(self.student), efficiency.compilation.do_student, self.sharding)
        parallelize(self.student, self.sharding, device, _blocks_of(self.student))
        self.student_ema = _materialise(self._make_student, device).requires_grad_(False).eval()
        if efficiency.attention == "xformers":
            attend_by_xformers(_attention_of(self.student_ema), device, self.dtype)
        if efficiency.teacher_fp8:
            multiply_in_fp8(_blocks_of(self.student_ema), device)
        if compiled:
            compile_blocks(_blocks_of(self.student_ema), efficiency.compilation.do_teacher, self.sharding)
        parallelize(self.student_ema, self.sharding, device, _blocks_of(self.student_ema))
        ema_update_(self.student_ema, self.student, 0.0)
        self.clustering = _materialise(self._make_clustering, device)
        parallelize(self.clustering, self.sharding, device)
        self.do_teacher, self.do_student = do_teacher, do_student
        if compiled:
            key, options = "efficiency.compilation", efficiency.compilation
            how = {"device": device, "sharding": self.sharding, "cuda_graphs": options.cuda_graphs}
            self.do_teacher = compile_function(do_teacher, options.do_teacher, f"{key}.do_teacher", **how)
            self.do_student = compile_function(do_student, options.do_student, f"{key}.do_student", **how)
        self.student_optimizer = make_student_optimizer(self.student, cfg)
        self.clustering_optimizer = make_clustering_optimizer(self.clustering, cfg)
        self.scaler = torch.amp.GradScaler(
            device.type,
            enabled=efficiency.grad_scaler,
            growth_interval=efficiency.grad_scaler_growth_interval,
        )

    def _make_student(self) -> nn.ModuleDict:
        backbone = EncoderDecoder(**self.cfg.model.kwargs())
        if self.cfg.optim.rope_lr_mult == 0:  # they stay what they are: a gradient would be computed for nothing
            for module in backbone.modules():
                if isinstance(module, RotaryEmbedding):
                    module.requires_grad_(False)
        return nn.ModuleDict(
            {"backbone": backbone, "head": L2NormLinear(backbone.pred_dim, self.cfg.capi.num_clusters)}
        )

    def _make_clustering(self) -> OnlineClustering:
        width = self.cfg.model.transformers_kwargs.embed_dim
        return OnlineClustering(width, self.cfg.capi.num_clusters, **asdict(self.cfg.capi.clustering_kwargs))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by their name in checkpoints."""
        return {"student": self.student, "student_ema": self.student_ema, "clustering": self.clustering}

    @property
    def optimizers(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """Optimizers by their name in checkpoints, with the module they update."""
        return {
            "student": (self.student, self.student_optimizer),
            "clustering": (self.clustering, self.clustering_optimizer),
        }

    def apply_gradients(self, hyper: Hyper) -> dict[str, Tensor]:
        """Update student, average and clustering head, in that order, or none of them if float16 gradients overflowed.

        Returns: the gradient norms of student, before clipping, and clustering head. Nothing if the update was skipped,
            which is no fault unless smaller and smaller scales do not help.
        """
        set_hyper(self.student_optimizer, self.clustering_optimizer, hyper)
        for module in (self.student, self.clustering):
            average_gradients_(module, self.sharding)
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.student_optimizer)
            self.scaler.unscale_(self.clustering_optimizer)
        norm = grad_norm(self.student)
        norms = {"grad_norm": _whole(norm), "clustering_grad_norm": _whole(grad_norm(self.clustering))}
        # Only float16 has to know on the host whether to skip; elsewhere nothing waits for the device.
        skip = scaled and not bool(sum(norms.values(), torch.zeros((), device=self.device)).isfinite())
        if not skip:
            if self.cfg.optim.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(list(self.student.parameters()), self.cfg.optim.clip_grad, norm)
            self.student_optimizer.step()
            ema_update_(self.student_ema, self.student, hyper.momentum)
            self.clustering_optimizer.step()
        if scaled:
            self.scaler.update()
        return {} if skip and self.scaler.get_scale() > SMALLEST_SCALE else norms


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    return [submodule for submodule in module.modules() if isinstance(submodule, Block)]


def _attention_of(module: nn.Module) -> list[nn.Module]:
    return [submodule for submodule in module.modules() if isinstance(submodule, Attention)]


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _materialise(make: Any, device: torch.device) -> Any:
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
    for child in parts:
        child.init_weights()
    return module


def start_from(backbone: nn.Module, path_or_url: str) -> None:
    """Copy the weights of `train.init_from` into a fresh backbone, and say what stays random.

    A predictor that is missing as a whole does. So do the heads: the released weights have no clustering head, and the
    student's is of no use with the prototypes of another one.

    Raises: UserError if the weights do not fit.
    """
    weights = backbone_part(read_state_dict(path_or_url, key="train.init_from"), path_or_url)
    parts = ("decoder.", "dec_norm.", "mask_token")
    predictor = {key: value for key, value in backbone.state_dict().items() if key.startswith(parts)}
    has_predictor = not predictor.keys().isdisjoint(weights)
    load_backbone_weights(backbone, weights if has_predictor else predictor | weights, path_or_url)
    random = "" if has_predictor else "the predictor, which the file lacks, "
    logger.info(
        "student, average and teacher start from %s; %sthe student's head and the clustering head start random",
        path_or_url,
        random,
    )


def train_step(
    state: TrainState, batches: Sequence[Batch], hyper: Hyper, *, with_usage: bool = False, with_health: bool = False
) -> dict[str, Tensor]:
    """One update of student, average and clustering head. Returns detached scalars, still on the device.

    Args:
        state: changed in place.
        batches: normalised images and indices of the accumulation steps, equally many images each, on the device.
        hyper: learning rates, weight decay and momentum of this update.
        with_usage: also say how many prototypes are used.
        with_health: also compute effective rank and norms of the teacher's features.
    """
    cfg = state.cfg
    random = torch.Generator().manual_seed(derive_seed(cfg.train.seed, "drop-path", state.step, rank()))
    state.student_optimizer.zero_grad()
    state.clustering_optimizer.zero_grad()
    torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs gave, gradients above all, is not needed

    # Targets are balanced over the images of all accumulation steps: the same problem as one large batch.
    teacher: Any = state.student_ema["backbone"]
    features = torch.cat([state.do_teacher(teacher, batch.images, state.dtype) for batch in batches])
    images_before = range(0, len(features), len(features) // len(batches))
    predict_indices = torch.cat(
        [b.host_predict_indices + i * features.shape[1] for b, i in zip(batches, images_before, strict=True)]
    )
    one = torch.ones((), device=state.device)
    autocast = torch.autocast(state.device.type, state.dtype, enabled=state.dtype != torch.float32)
    with autocast:
        clustering = state.clustering.step(
            features.transpose(0, 1),
            predict_indices,
            chunk=cfg.capi.clustering_chunk,
            kernel=cfg.capi.clustering_kernel,
            with_usage=with_usage,
            loss_scale=state.scaler.scale(one),
        )

    student: Any = state.student["backbone"]
    capi_loss = torch.zeros((), device=state.device)
    for batch, targets in zip(batches, clustering.targets.chunk(len(batches)), strict=True):
        drop_path = student.draw_drop_path(len(batch.images), random)
        summed = state.do_student(
            state.student,
            batch.images,
            batch.visible_indices,
            batch.predict_indices,
            targets,
            None if drop_path is None else _sent_to(state.device, drop_path),
            cfg.capi.student_temp,
            state.dtype,
        )
        loss = summed / len(predict_indices)
        state.scaler.scale(loss).backward()
        capi_loss = capi_loss + loss.detach()

    target_entropy = entropy(clustering.targets).mean()
    scalars = {
        "capi_loss": capi_loss,
        "clustering_loss": clustering.loss,
        "loss": capi_loss + clustering.loss,
        "target_entropy": target_entropy,
        "target_entropy_rel": metrics.normalized_entropy(target_entropy, cfg.capi.num_clusters),
    }
    if clustering.counts is not None and clustering.mass is not None:
        scalars |= metrics.prototype_usage(all_reduce_sum_(clustering.counts), all_reduce_sum_(clustering.mass))
    if with_health:
        scalars |= _health(features)
    return _mean_over_ranks(scalars) | state.apply_gradients(hyper)


def _sent_to(device: torch.device, x: Tensor) -> Tensor:
    """A copy of a tensor of the CPU that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _mean_over_ranks(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    if world_size() == 1:
        return scalars
    means = all_reduce_sum_(torch.stack([value.double() for value in scalars.values()])) / world_size()
    return dict(zip(scalars, means, strict=True))


def _health(features: Float[Tensor, "b n d"]) -> dict[str, Tensor]:
    tokens = features.flatten(0, 1)
    tokens = tokens[:: -(-len(tokens) // HEALTH_TOKENS)].float()
    median, largest = metrics.norm_stats(tokens)
    return {"teacher_rank": metrics.effective_rank(tokens), "feature_norm_median": median, "feature_norm_max": largest}


def train(cfg: CapiConfig, output_dir: Path, device: torch.device) -> None:
    """Train up to `optim.total_iters` finished updates, or until a signal; continue what is in `output_dir`."""
    check_decode(cfg, device)
    saving = cfg.train.checkpointing
    checkpoints = Checkpoints(output_dir, keep=saving.max_to_keep, async_save=saving.async_save)
    continues = cfg.train.resume_from is not None or checkpoints.newest() is not None
    state = TrainState(cfg, device, init_from=None if continues else cfg.train.init_from)
    saved = restore(state, checkpoints)
    meters = Metrics(output_dir, cfg.train.loggers, config=asdict(cfg), enabled=rank() == 0)
    meters.truncate_after(state.step, keep_copy=cfg.train.resume_from is not None)
    if saved is not None:
        meters.load_state_dict(saved.extra["metrics"])
    if rank() == 0:
        write_text_atomically(output_dir / "config.yaml", to_yaml(cfg))
    log_start(cfg, state, saved)
    probe = None
    if cfg.train.probe.every > 0:
        probe = Probe(
            cfg.train.probe,
            images_size=cfg.data.images_size,
            batch_size=cfg.optim.batch_size_per_gpu,
            device=device,
        )

    total, every = cfg.optim.total_iters, cfg.train.log_loss_every
    with StopRequest() as stop:
        with contextlib.ExitStack() as stack:
            stack.callback(meters.close)
            stack.enter_context(checkpoints)
            loader = stack.enter_context(
                PretrainLoader(
                    cfg,
                    rank=rank(),
                    world_size=world_size(),
                    position=merge_positions([each["data"] for each in saved.rank_extra]) if saved else None,
                    pin_memory=device.type == "cuda",
                    decode_device=device,
                    bad_files_path=output_dir / "bad_files.jsonl",
                )
            )
            loader.check_shared_memory()
            if rank() == 0:
                log_pixels(loader.dataset, "data.dataset")
            batches = DevicePrefetcher(loader, device)
            advice = WorkerAdvice(batches, cores_of_this_rank())
            profile = stack.enter_context(
                Profile(output_dir, cfg.train.profiling and rank() == 0, num_steps=total - state.step, device=device)
            )
            if rank() == 0:
                stack.enter_context(logging_redirect_tqdm())  # its handler knows no levels, and would make others talk
            bar = stack.enter_context(
                tqdm(
                    total=total,
                    initial=state.step,
                    unit="step",
                    disable=None if rank() == 0 else True,
                    dynamic_ncols=True,
                )
            )
            stack.enter_context(_manual_garbage_collection())
            evals = EvalRuns(output_dir, cfg.evals, cfg.launcher, device=cfg.train.device, kept_step=state.step)
            stack.callback(evals.close)
            export_now = functools.partial(export_one, state)
            watch, speed = FiniteWatch(), _throughput(cfg, device)
            waited = 0.0

            @contextlib.contextmanager
            def writes() -> Iterator[None]:
                """One rank alone writes here: the others learn at the next agreement that it cannot."""
                with stop.faults(), writing_explained(output_dir, "train.output_dir"):
                    yield

            def next_inputs() -> list[Batch]:
                """Of the next update; none if there is a reason to stop, which the next agreement tells all ranks."""
                steps = cfg.optim.accumulation_steps
                with writes():  # bad files are listed
                    return stop.wait_for(lambda: [_on_device(next(batches)) for _ in range(steps)]) or []
                return []

            inputs = next_inputs() if state.step < total else []
            stopping = stop.agreed()
            while state.step < total and not stopping:
                hyper = hyper_at(state.step, cfg)
                step = state.step + 1  # finished updates after this one: checkpoint 3750 holds 3750 updates
                done, logs = step == total, step == total or due(step, every)
                scalars = train_step(
                    state, inputs, hyper, with_usage=logs, with_health=due(step, cfg.train.health_every)
                )
                state.step = step
                meters.update(**scalars, lr=hyper.lr, clustering_lr=hyper.clustering_lr, momentum=hyper.momentum)
                watch.update(step, **{name: scalars[name] for name in WATCHED if name in scalars})
                position = batches.state_dict()
                if not done:
                    inputs = next_inputs()
                speed.step(batches.wait_s - waited)
                waited = batches.wait_s
                with writes():
                    profile.step()
                bar.update()
                stopping = stop.agreed()
                saves = done or stopping or due(step, saving.period)
                if saves:  # a finite gradient can still throw the weights out of range
                    watch.update(step, weights=largest_magnitude(state.modules, state.optimizers))
                if saves or evals.are_due(step) or due(step, cfg.train.nan_check_period):
                    watch.check(checkpoints.last)
                if logs:
                    with writes():
                        log_step(cfg, bar, meters.write(step, **speed.read(total - step)))
                    if line := advice.read():
                        logger.warning(line)
                    gc.collect(1)
                if probe is not None and (done or due(step, cfg.train.probe.every)):
                    scores = probe(functools.partial(encode, state))
                    with writes():
                        log_probe(meters.append(step, scores))
                if saves:
                    checkpoints.save(
                        step,
                        modules=state.modules,
                        optimizers=state.optimizers,
                        extra={"metrics": meters.state_dict(), "scaler": state.scaler.state_dict()},
                        rank_extra={"data": position},
                        config_yaml=to_yaml(cfg),
                    )
                if done or stopping:
                    checkpoints.wait()  # here, where a second signal does not end it
                if not done and not stopping:
                    evals.launch_due(step, export_now, stop)
                if logs:
                    with writes():
                        evals.record(meters, step)
            if state.step == total:
                evals.launch_due(total, export_now, stop, final=True)
                evals.wait(stop)
                with writes():
                    evals.record(meters, total)
            stop.agreed()  # of faults after the last step
        if stop.is_fault or state.step < total:
            logger.info("stopped by %s after %d of %d steps; the same command continues", stop.name, state.step, total)
            if not stop.is_fault:
                requeue(stop)
            return
    for path in export(state, output_dir):
        logger.info("exported %s", path)


def restore(state: TrainState, checkpoints: Checkpoints) -> SavedState | None:
    """Load the checkpoint that the config chooses into `state`: `resume_from`, or the newest with `auto_resume`.

    Raises: UserError if it is damaged, or holds another model or numbers that are not finite, or if there are
        checkpoints and `auto_resume` is off.
    """
    cfg = state.cfg
    places: dict[str, Any] = {"modules": state.modules, "optimizers": state.optimizers, "config": asdict(cfg)}
    if cfg.train.resume_from is not None:
        saved = checkpoints.restore(cfg.train.resume_from, **places, restarted=was_requeued())
    elif cfg.train.auto_resume:
        saved = checkpoints.restore_latest(**places)
    else:
        if checkpoints.newest() is not None:
            raise UserError(
                f"train.auto_resume=false, but train.output_dir={cfg.train.output_dir!r} has checkpoints of an earlier "
                "run; choose another train.output_dir, or continue it with train.auto_resume=true"
            )
        return None
    if saved is not None:
        if not bool(largest_magnitude(state.modules, state.optimizers).isfinite()):
            raise UserError(
                f"The checkpoint {str(saved.path)!r} holds weights or optimizer state that are NaN or infinite: it was "
                f"saved after training had diverged. {checkpoints.remedy(saved.path)}"
            )
        state.step = saved.step
        state.scaler.load_state_dict(saved.extra["scaler"])
        warn_of_another_course(saved, cfg)
    return saved


def warn_of_another_course(saved: SavedState, cfg: CapiConfig) -> None:
    """Warn of keys that shape the rest of the training and are others than at the checkpoint, and of what they move."""
    told = [
        f"{key} {old!r} -> {new!r}"
        for key, (old, new) in changed_keys(saved.config, asdict(cfg)).items()
        if f"{key}.".startswith(COURSE_KEYS) and f"{key}." not in BATCH_KEYS
    ]
    old = saved.config["optim"]
    old_batch = old["batch_size_per_gpu"] * old["accumulation_steps"] * saved.world_size
    if old_batch != global_batch_size(cfg):
        told.append(f"images of one update, on all ranks, {old_batch} -> {global_batch_size(cfg)}")
    if not told:
        return
    try:
        optim, capi = (
            build(type(now), saved.config[key], key) for key, now in (("optim", cfg.optim), ("capi", cfg.capi))
        )
    except UserError as error:
        moves = f"the schedules there cannot be compared: {error}"
    else:
        before, after = (asdict(hyper_at(saved.step, each)) for each in (replace(cfg, optim=optim, capi=capi), cfg))
        moved = [f"{SCHEDULED[key]} {before[key]:.4g} -> {after[key]:.4g}" for key in SCHEDULED]
        moves = f"at this step: {', '.join(moved)}"
    logger.warning(
        "other than at the checkpoint, which changes the rest of the training: %s; %s", ", ".join(told), moves
    )


def encode(state: TrainState, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """The teacher's patch features, not compiled, for batches of any size."""
    backbone: Any = state.student_ema["backbone"]
    return do_teacher(backbone, images, state.dtype)


def export_one(state: TrainState, name: str, path: Path) -> None:
    """Write `student` or `student_ema` in the format of the released weights, with its config beside it."""
    module: Any = state.modules[name]
    export_weights(path, dict(module.items()), to_yaml(state.cfg))


def export(state: TrainState, output_dir: Path) -> list[Path]:
    """Write both to the folder of the run."""
    paths = [output_dir / f"{name}.pth" for name in ("student", "student_ema")]
    for path in paths:
        export_one(state, path.stem, path)
    return paths


def export_newest(cfg: CapiConfig, output_dir: Path) -> None:
    """Export the checkpoint that training would continue from, on the CPU.

    Raises: UserError if there is none.
    """
    state = TrainState(cfg, torch.device("cpu"), compiled=False)
    if restore(state, Checkpoints(output_dir, keep=cfg.train.checkpointing.max_to_keep)) is None:
        raise UserError(f"train.output_dir={cfg.train.output_dir!r} has no checkpoint to export; train first")
    sys.stdout.writelines(f"{path}\n" for path in export(state, output_dir))


def _on_device(batch: Batch) -> Batch:
    return replace(batch, images=normalize(batch.images))


@contextlib.contextmanager
def _manual_garbage_collection() -> Any:
    """Collect at log steps only, so that no collection falls into a step, or on some ranks and not on others."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def compiles(cfg: CapiConfig, device: torch.device) -> bool:
    """Whether a training compiles anything: the functions of the step, or kernels for a GPU."""
    options = cfg.efficiency.compilation
    return device.type == "cuda" or not (options.do_teacher.disable and options.do_student.disable)


def mask_plan(cfg: CapiConfig) -> MaskPlan:
    """How many patches are visible, hidden and predicted.

    Raises: UserError if nothing would be visible or predicted.
    """
    return MaskPlan(cfg.grid_size, cfg.grid_size, cfg.data.mask_ratio, cfg.data.prediction_subsampling)


def global_batch_size(cfg: CapiConfig) -> int:
    """Images of one update, on all ranks."""
    return cfg.optim.batch_size_per_gpu * cfg.optim.accumulation_steps * world_size()


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
    )


def _throughput(cfg: CapiConfig, device: torch.device) -> Throughput:
    flops_per_image = training_flops_per_image(step_shape(cfg))
    dtype = cfg.efficiency.param_dtype
    return Throughput(global_batch_size(cfg), flops_per_image, device, world_size(), param_dtype=dtype)


def log_start(cfg: CapiConfig, state: TrainState, saved: SavedState | None) -> None:
    """Say what runs where, and warn about what will not go well."""
    logger.info(
        "torch %s on %s, %d process(es), code %s", torch.__version__, state.device, world_size(), git_revision()
    )
    plan = mask_plan(cfg)
    logger.info(
        "%.1fM backbone parameters; %d patches per image: %d visible, %d hidden, %d predicted; %d images per step",
        sum(p.numel() for p in state.student["backbone"].parameters()) / 1e6,
        plan.num_patches,
        plan.num_visible,
        plan.num_masked,
        plan.num_predict,
        global_batch_size(cfg),
    )
    warning = metrics.batch_warning(global_batch_size(cfg), cfg.capi.num_clusters)
    if warning:
        logger.warning(warning)
    if saved is None:
        logger.info("starting at step 0 of %d", cfg.optim.total_iters)
    else:
        logger.info("continuing %s at step %d of %d", saved.path, saved.step, cfg.optim.total_iters)


def log_step(cfg: CapiConfig, bar: Any, values: dict[str, float]) -> None:
    """One line for people. On a terminal the bar has steps and time already."""
    mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
    minutes, seconds = divmod(round(values["eta_s"]), 60)
    logger.info(
        "step %d/%d  capi %.3f  clustering %.3f  entropy %.2f nats (%.2f of log K)  prototypes %d/%d  lr %.1e"
        "  |  %.1f img/s%s, data wait %.0f%%, %.1f GiB, %d:%02d left",
        values["step"],
        cfg.optim.total_iters,
        values["capi_loss"],
        values["clustering_loss"],
        values["target_entropy"],
        values["target_entropy_rel"],
        values["prototypes_used"],
        cfg.capi.num_clusters,
        values["lr"],
        values["images_per_s"],
        mfu,
        100 * values["data_wait"],
        values["memory_gib"],
        minutes,
        seconds,
    )
    bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)


def log_probe(values: dict[str, float]) -> None:
    """One line for people."""
    logger.info(
        "step %d  probe: k-NN %.1f %%, linear %.1f %%, in %.1f s",
        values["step"],
        100 * values["probe_knn"],
        100 * values["probe_linear"],
        values["probe_s"],
    )


def dry_run(cfg: CapiConfig) -> str:
    """What a training with this config would be, without training: data, grid, tokens, parameters, schedule, memory."""
    device, plan, optim = pick_device(cfg.train.device), mask_plan(cfg), cfg.optim
    check_decode(cfg, device)
    with torch.device("meta"):
        backbone = EncoderDecoder(**cfg.model.kwargs())
    parameters = sum(p.numel() for p in backbone.parameters())
    with PretrainLoader(cfg, rank=0, world_size=1, position=None, pin_memory=False, bad_files_path=None) as loader:
        loader.check_shared_memory()
        images, pixels = loader.describe(), sample_pixels(loader.dataset)
    memory = metrics.device_memory_estimate(
        step_shape(cfg),
        batch_size=optim.batch_size_per_gpu,
        param_bytes=4 if cfg.efficiency.param_dtype == "float32" else 2,
        recompute=cfg.efficiency.rematerialization.enabled,
        world_size=world_size(),
    )
    milestones = sorted(
        {0, optim.lr_schedule.warmup_steps(optim.total_iters), optim.total_iters // 2, optim.total_iters - 1}
    )
    lines = [
        f"data         {images}",
        *(f"pixels       {line}" for line in pixels.lines()),
        f"batch        {global_batch_size(cfg)} images = {optim.batch_size_per_gpu} per forward pass x "
        f"{optim.accumulation_steps} accumulation steps x {world_size()} process(es)",
        f"image        {cfg.data.images_size} px, {cfg.grid_size} x {cfg.grid_size} = {plan.num_patches} patches of "
        f"{cfg.model.patch_size} px",
        f"tokens       {plan.num_visible} visible, {plan.num_masked} masked, {plan.num_predict} of them predicted; "
        f"{cfg.model.n_registers} registers",
        f"parameters   {parameters:,} in the backbone; {cfg.capi.num_clusters:,} prototypes in each head",
        f"device       {device}, {cfg.efficiency.param_dtype}",
        f"memory       about {memory['total']:.1f} GiB per device, an estimate: {memory['state']:.1f} for weights, "
        f"gradients, optimizer and average; {memory['activations']:.1f} for the student's activations; "
        f"{memory['clustering']:.1f} for teacher and clustering",
        f"compute      {training_flops_per_image(step_shape(cfg)) / 1e12:.4f} TFLOP per image",
        "schedule     step         lr         momentum   clustering lr",
    ]
    for step in milestones:
        hyper = hyper_at(step, cfg)
        lines.append(f"             {step:<12} {hyper.lr:<10.3g} {hyper.momentum:<10.6g} {hyper.clustering_lr:.3g}")
    planned = plan_evals(cfg.evals)
    if isinstance(planned, UserError):
        raise planned
    lines += [f"evaluation   {line}" for line in planned[1]]
    warning = metrics.batch_warning(global_batch_size(cfg), cfg.capi.num_clusters)
    warnings = [*pixels.warnings(), *([warning] if warning else [])]
    return "\n".join([*lines, *(f"warning      {warning}" for warning in warnings)]) + "\n"


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, args.sources)
    mask_plan(cfg)
    make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    if args.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    if args.dry_run:
        sys.stdout.write(dry_run(cfg))
        return 0
    with session(cfg.train.device) as device, claim_output_dir(cfg.train.output_dir) as output_dir:
        setup_logging(output_dir / "log.txt" if rank() == 0 else None, quiet=rank() != 0)
        if args.export:
            export_newest(cfg, output_dir)
        elif compiles(cfg, device):
            with kept_compilations(output_dir / "compile_cache"):
                train(cfg, output_dir, device)
        else:
            train(cfg, output_dir, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
