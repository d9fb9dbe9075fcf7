"""What a run says about itself: averaged scalars, their log files, health, speed, and the alarm for non-finite losses.

Nothing here waits for the accelerator except where a docstring says so. Reductions over ranks belong to the caller.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from utils import UserError, replacing, write_text_atomically

logger = logging.getLogger(__name__)

Scalar = Tensor | int | float

TIMING_KEYS = ("images_per_s", "step_ms", "data_wait", "memory_gib", "mfu", "eta_s")
"""Keys of `Throughput.read`: the part of a metrics line that two runs of the same training do not share."""


REST_S = 600.0
"""Time for which a logger that failed gets nothing: each call to a server that is down may wait for minutes."""


FAILURES = (OSError, RuntimeError, ValueError, LookupError)
"""What a logger may raise beside errors that its package has made for itself."""


def read_metrics(path: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, oldest first, without the half-written last line that a killed process may leave.

    Args:
        path: the file.
        damaged: is given a sentence for each line that is left out, where that is better than an error.

    Raises: UserError if the file is missing, or if a line before the last one is damaged, or one is no record.
    """
    if not path.exists():
        raise UserError(f"There is no metrics file {str(path)!r}")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; if it is no file, move it away") from error
    records = []
    for number, line in enumerate(lines, start=1):
        problem = ""
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            problem = "is not valid JSON"
        else:
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
            else:
                problem = "is no JSON object with a step"
        if problem and damaged is None:
            raise UserError(f"{path}, line {number} {problem}; delete that line or move the file away")
        if problem and damaged is not None:
            damaged.append(f"{path.name}, line {number} {problem}, and is left out")
    return records


class Metrics:
    """Averages of scalars between two log lines, kept on the device, and the places they are written to.

    metrics.jsonl is the record, without which a run cannot go on. A logger that fails is left out for `REST_S`, then
    tried again; what it missed, it does not get later.

    Args:
        output_dir: folder of metrics.jsonl.
        loggers: further places, any of tensorboard, wandb, mlflow, trackio.
        config: values that wandb, mlflow, trackio and tensorboard store with the run.
        enabled: False on all ranks but 0: nothing is written, averages are still returned.

    Raises: UserError if a logger's package is not installed.
    """

    def __init__(
        self,
        output_dir: Path,
        loggers: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.path = output_dir / "metrics.jsonl"
        self._run_name = output_dir.resolve().name
        self._config, self._enabled = dict(config or {}), enabled
        self._modules = {name: _import_logger(name) for name in loggers} if enabled else {}
        self._loggers: dict[str, Logger] = {}
        self._rests_until: dict[str, float] = {}  # of loggers that failed
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._run_ids: dict[str, str] = {}
        self._kept_step = 0

    def update(self, **scalars: Scalar) -> None:
        """Count these values in the averages of the current window. Does not wait for the device."""
        for name, value in scalars.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            if isinstance(value, Tensor):
                value = value.detach().to(_widest_float(value.device)).reshape(())  # noqa: PLW2901  # same quantity
            self._sums[name] = self._sums.get(name, 0.0) + value

    def write(self, step: int, **extra: int | float) -> dict[str, int | float]:
        """End the window: write and return `step`, averages and `extra`. Waits for the device, once.

        Keys follow `step` in alphabetical order. NaN and infinities are null in the file: JSON has no word for them.
        """
        values: dict[str, int | float] = {name: total / self._counts[name] for name, total in self._host_sums().items()}
        assert not values.keys() & extra.keys(), f"metered and given: {values.keys() & extra.keys()}"
        values |= extra
        self._sums, self._counts = {}, {}
        return self.append(step, values)

    def append(self, step: int, values: Mapping[str, int | float]) -> dict[str, int | float]:
        """Write a record that is not of the window, such as the scores of an evaluation, which leaves it open."""
        record = {"step": step} | {name: values[name] for name in sorted(values)}
        if self._enabled:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
            numbers = {key: value for key, value in record.items() if key != "step"}
            for name in self._modules:
                self._tell(name, lambda opened: opened.log(step, numbers))
        return record

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show the image of a file in the loggers; metrics.jsonl has numbers alone."""
        if self._modules:
            with Image.open(path) as image:
                image.load()  # a damaged file is no fault of a logger
        for logger_name in self._modules:
            self._tell(logger_name, lambda opened: opened.picture(step, name, path))

    def _tell(self, name: str, act: Callable[["Logger"], None]) -> None:
        if time.monotonic() < self._rests_until.get(name, -math.inf):
            return
        try:
            act(self._opened(name))
        except (*FAILURES, *_LOGGERS[name].own_errors(self._modules[name])) as error:
            if name not in self._rests_until:
                logger.warning(
                    "train.loggers=%s failed (%s: %s); training goes on, metrics.jsonl has all, and it is tried again "
                    "every %.0f minutes",
                    *(name, type(error).__name__, error, REST_S / 60),
                )
            self._rests_until[name] = time.monotonic() + REST_S

    def _opened(self, name: str) -> "Logger":
        if name not in self._loggers:
            self._loggers[name] = self._open(name, self._modules[name])
        return self._loggers[name]

    def _open(self, name: str, module: Any) -> "Logger":
        run = RunInfo(self.path.parent, self._run_name, self._config, self._kept_step, self._run_ids.get(name))
        opened = _LOGGERS[name](module, run)
        if opened.run_id is not None:
            self._run_ids[name] = opened.run_id
        return opened

    def _host_sums(self) -> dict[str, float]:
        on_device = {n: total for n, total in self._sums.items() if isinstance(total, Tensor) and not total.is_cpu}
        fetched = dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True)) if on_device else {}
        return {name: fetched[name] if name in fetched else float(total) for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The open window and the loggers' run ids, as JSON-able values. Waits for the device."""
        return {"sums": self._host_sums(), "counts": dict(self._counts), "run_ids": dict(self._run_ids)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the window that `state_dict` described, exactly, and the loggers' runs."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._run_ids = dict(state["run_ids"])

    def truncate_after(self, step: int, *, keep_copy: bool = False) -> None:
        """Drop what an earlier process wrote past `step`, so that a resumed run's file is that of an uninterrupted one.

        With `keep_copy`, for a return to an older checkpoint, what was there stays as `metrics.set-aside-<n>.jsonl`.
        tensorboard hides its later points too. wandb ignores points up to the last one it has. mlflow and trackio keep
        both points of a repeated step.
        """
        self._kept_step = step
        if not self._enabled or not self.path.exists():
            return
        records = read_metrics(self.path)
        kept = [record for record in records if record["step"] <= step]
        if keep_copy and len(kept) < len(records):
            taken = len(list(self.path.parent.glob("metrics.set-aside-*.jsonl")))
            with replacing(self.path.with_name(f"metrics.set-aside-{taken + 1}.jsonl")) as copy:
                copy.write_bytes(self.path.read_bytes())
        write_text_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Finish the loggers' runs."""
        for name in self._loggers:
            self._tell(name, lambda opened: opened.close())
        self._loggers = {}


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


# --- Loggers: one adapter per package --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told about the run."""

    output_dir: Path
    name: str
    config: dict[str, Any]
    kept_step: int
    """Last step whose points stay valid; 0 for a fresh start."""
    run_id: str | None
    """What the logger called this run before it was interrupted."""


class Logger:
    """A place that takes scalars and pictures. `run_id` is what it needs to continue the run, if anything."""

    run_id: str | None = None

    def __init__(self, module: Any, run: RunInfo) -> None:
        """Start the run, or continue it. `module` is the imported package."""
        raise NotImplementedError

    @staticmethod
    def own_errors(module: Any) -> tuple[type[Exception], ...]:
        """The errors that its package has made for itself, for a server that is down or refuses, for example."""
        return ()

    def log(self, step: int, values: dict[str, int | float]) -> None:
        """Send the scalars of one step."""
        raise NotImplementedError

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send the image of a file."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the run."""
        raise NotImplementedError


class _TensorBoard(Logger):
    def __init__(self, module: Any, run: RunInfo) -> None:
        purge_step = run.kept_step + 1 if run.kept_step else None
        self.writer = module.SummaryWriter(log_dir=str(run.output_dir / "tensorboard"), purge_step=purge_step)
        if not run.kept_step:
            self.writer.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```", 0)

    def log(self, step: int, values: dict[str, int | float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb(Logger):
    def __init__(self, module: Any, run: RunInfo) -> None:
        self.module = module
        self.run = module.init(
            project=os.environ.get("WANDB_PROJECT", "capi"),
            name=run.name,
            config=run.config,
            dir=str(run.output_dir),
            id=run.run_id,
            resume="allow" if run.run_id else None,
        )
        self.run_id = self.run.id

    @staticmethod
    def own_errors(module: Any) -> tuple[type[Exception], ...]:
        return (module.errors.Error,)

    def log(self, step: int, values: dict[str, int | float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio(Logger):
    def __init__(self, module: Any, run: RunInfo) -> None:
        self.module = module
        resume = "allow" if run.run_id else "never"
        self.run = module.init(project="capi", name=run.run_id or run.name, config=run.config, resume=resume)
        self.run_id = self.run.name  # a free one, if the name was taken

    @staticmethod
    def own_errors(module: Any) -> tuple[type[Exception], ...]:
        return (sqlite3.Error,)  # it keeps its values in a database, and sends them from a thread of its own

    def log(self, step: int, values: dict[str, int | float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow(Logger):
    def __init__(self, module: Any, run: RunInfo) -> None:
        self.module = module
        module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "capi"))
        self.run_id = module.start_run(run_id=run.run_id, run_name=run.name).info.run_id
        if run.run_id is None:
            # Not log_params: it limits number, length and characters of the parameters.
            module.log_dict(run.config, "config.json")

    @staticmethod
    def own_errors(module: Any) -> tuple[type[Exception], ...]:
        return (module.exceptions.MlflowException,)

    def log(self, step: int, values: dict[str, int | float]) -> None:
        self.module.log_metrics(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self.module.log_image(np.asarray(image.convert("RGB")), key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self.module.end_run()


_LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _import_logger(name: str) -> Any:
    assert name in _LOGGERS, name
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(
            f"train.loggers={name}: the package cannot be imported ({error}); "
            f"run `pip install {name}`, or take it out of train.loggers"
        ) from error


# --- Non-finite losses -----------------------------------------------------------------------------------------------


class NonFiniteError(UserError):
    """A loss, a gradient or a weight became NaN or infinite. `quantity` and `step` say which and when first."""

    def __init__(self, message: str, quantity: str, step: int) -> None:
        super().__init__(message)
        self.quantity, self.step = quantity, step


class FiniteWatch:
    """Remembers on the device when each quantity was first not finite, so that looking can wait for many steps.

    Give it values that are averaged over the ranks: then all ranks find the same and stop together. Losses are those
    before an update and the norms of gradients decide what it makes of the weights, so both are needed. Call `check`
    before a checkpoint is saved too, so that no checkpoint is later than the first bad step.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[Int[Tensor, ""], Float[Tensor, ""]]] = {}

    def update(self, step: int, **quantities: Tensor) -> None:
        """Look at the scalars of `step`. Does not wait for the device."""
        for name, quantity in quantities.items():
            value = quantity.detach().float().reshape(())
            if name not in self._first:
                self._first[name] = (torch.full_like(value, -1, dtype=torch.int64), torch.zeros_like(value))
            first_step, first_value = self._first[name]
            is_first = ~torch.isfinite(value) & (first_step < 0)
            # Not torch.where(_, step, _): that copies the number to the device and waits for it.
            self._first[name] = (first_step.masked_fill(is_first, step), torch.where(is_first, value, first_value))

    def check(self, last_checkpoint: Callable[[], Path | None] = lambda: None) -> None:
        """Raise if any quantity was ever not finite. Waits for the device.

        Args:
            last_checkpoint: says which one to go back to, asked only if it comes to that.

        Raises: NonFiniteError naming quantities and first steps, the checkpoint to go back to, and remedies.
        """
        if not self._first:
            return
        steps = torch.stack([step for step, _ in self._first.values()]).tolist()
        if max(steps) < 0:
            return
        values = torch.stack([value for _, value in self._first.values()]).tolist()
        found = sorted(
            ((step, name, value) for step, name, value in zip(steps, self._first, values, strict=True) if step >= 0),
            key=lambda item: item[0],
        )
        events = ", then ".join(f"{name} became {_kind(value)} at step {step}" for step, name, value in found)
        checkpoint = last_checkpoint()
        back = (
            f"continue from the last good checkpoint with train.resume_from={checkpoint} and"
            if checkpoint is not None
            else "there is no checkpoint from before; start again and"
        )
        raise NonFiniteError(
            f"{events}. The weights are lost from that step on: {back} lower optim.lr_schedule.base_value, "
            "clip gradients (optim.clip_grad=1.0), or compute in float32 (efficiency.param_dtype=float32)",
            quantity=found[0][1],
            step=found[0][0],
        )


def _kind(value: float) -> str:
    return "NaN" if math.isnan(value) else "+infinity" if value > 0 else "-infinity"


# --- Health ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def effective_rank(features: Float[Tensor, "n d"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """RankMe (arXiv:2210.02885, equation 1): exp of the entropy of the normalised singular values.

    Between 1 and min(n, d), whatever the scale. A few thousand rows are enough; the caller subsamples.
    On CUDA the eigenvalue routine itself waits for the device. NaN if a feature is not finite.
    """
    # Squared singular values lose half the digits: in float32 the noise of d near-zero ones would pass for rank.
    x = features.detach().to("cpu" if features.device.type == "mps" else features.device, torch.float64)
    finite = x.isfinite().all()
    x = x.nan_to_num(0.0, 0.0, 0.0)  # the eigenvalue routine raises on what is not finite, which is FiniteWatch's to do
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    singular_values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular_values / singular_values.sum() + eps
    rank = torch.special.entr(p).sum().exp().where(finite, torch.nan)
    return rank.to(features.device, torch.float32)


@torch.no_grad()
def norm_stats(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Median and largest norm of the rows. A maximum far above the median means outlier tokens (arXiv:2309.16588)."""
    norms = features.detach().float().norm(dim=-1)
    return norms.median(), norms.max()


HEALTH_TOKENS = 4096
"""Patch tokens from which the health of features is computed."""


def feature_health(features: Float[Tensor, "b n d"]) -> dict[str, Tensor]:
    """Whether the teacher's patch features are rich: effective rank, and median and largest norm, of some of them."""
    tokens = features.flatten(0, 1)
    tokens = tokens[:: -(-len(tokens) // HEALTH_TOKENS)].float()
    median, largest = norm_stats(tokens)
    return {"teacher_rank": effective_rank(tokens), "feature_norm_median": median, "feature_norm_max": largest}


# --- Speed -----------------------------------------------------------------------------------------------------------

_PEAK_FLOPS = (
    # Dense bf16 (equal to fp16) tensor-core peak with fp32 accumulation, FLOP/s, from the makers' data sheets.
    # The whole name has to match: variants (H100 NVL, A10G, 4090 D, laptops, MIG slices) differ.
    (r"NVIDIA A100-(SXM4|PCIE|PCIe)-\d+GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA H100 80GB HBM3", 989e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H200", 989e12),
    (r"NVIDIA GH200 \d+GB", 989e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
)
_PEAK_FLOPS_FLOAT16_ONLY = ((r"Tesla V100-SXM\d-\d+GB(-LS)?", 125e12), (r"Tesla T4", 65e12))


def peak_flops(device_name: str, param_dtype: str) -> float | None:
    """Peak FLOP/s of a GPU model (as `torch.cuda.get_device_name` says it) in this precision, or None if not known."""
    table = _PEAK_FLOPS if param_dtype in ("bfloat16", "float16") else ()
    if param_dtype == "float16":
        table += _PEAK_FLOPS_FLOAT16_ONLY
    return next((flops for pattern, flops in table if re.fullmatch(pattern, device_name)), None)


class Throughput:
    """Speed between two readings, of the steps alone: what goes on between them happens in `paused`.

    Args:
        images_per_step: images of one optimizer step, on all ranks together.
        flops_per_image: model FLOPs of one step per image, see flops.py; None if nobody has counted them.
        device: this rank's device.
        world_size: ranks.
        param_dtype: precision of the matmuls; decides against which peak utilisation is measured.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_image: float | None,
        device: torch.device,
        world_size: int,
        *,
        param_dtype: str = "bfloat16",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images_per_step, self.flops_per_image, self.world_size = images_per_step, flops_per_image, world_size
        self.device, self._clock = device, clock
        is_cuda = device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device), param_dtype) if is_cuda else None
        self._start, self._steps, self._wait_s = clock(), 0, 0.0

    def step(self, wait_s: float) -> None:
        """Count one finished step, `wait_s` seconds of which went by waiting for data."""
        self._steps += 1
        self._wait_s += wait_s

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out. Waits for the device first, whose work is of the steps before."""
        self._wait_for_device()
        paused_at = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - paused_at

    def read(self, remaining_steps: int | None = None) -> dict[str, float]:
        """Rates since the last reading; call it right before `Metrics.write`, for it waits for the device.

        Returns: `images_per_s` (all ranks), `step_ms`, `data_wait` (fraction of the time), `memory_gib` (peak so far),
            `mfu` (model FLOPs utilisation, arXiv:2204.02311 appendix B) where FLOPs and peak are known, and `eta_s` if
            `remaining_steps` is given. Empty before the first step.
        """
        if self._steps == 0:
            return {}
        self._wait_for_device()
        now = self._clock()
        elapsed = max(now - self._start, 1e-9)
        images_per_s = self._steps * self.images_per_step / elapsed
        rates = {
            "images_per_s": images_per_s,
            "step_ms": 1e3 * elapsed / self._steps,
            "data_wait": self._wait_s / elapsed,
            "memory_gib": peak_memory_gib(self.device),
        }
        if self.peak_flops is not None and self.flops_per_image is not None:
            rates["mfu"] = images_per_s * self.flops_per_image / (self.world_size * self.peak_flops)
        if remaining_steps is not None:
            rates["eta_s"] = remaining_steps * elapsed / self._steps
        self._start, self._steps, self._wait_s = now, 0, 0.0
        return rates

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def rounded_speed(speed: float) -> str:
    """Images per second for people: a step of a detector takes a minute on a CPU, which is not 0.0."""
    return f"{speed:.1f}" if speed >= 1 else f"{speed:.2g}"


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: tensors on a CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- Profiling -------------------------------------------------------------------------------------------------------


class Profile:
    """Profiler of a few early steps: `with Profile(...) as profile:`, and `profile.step()` after each training step.

    Skips 2 steps, warms up for 2 and records 3, fewer of each if `num_steps` is small. Writes to `output_dir/profile`:
    trace.json (open it in https://ui.perfetto.dev), operators.txt (time and memory by operator), and on CUDA
    memory_snapshot.pickle (open it in https://docs.pytorch.org/memory_viz).

    Args:
        output_dir: folder of the run.
        enabled: False makes everything here do nothing.
        num_steps: training steps that are to come.
        device: of the training.
    """

    def __init__(self, output_dir: Path, enabled: bool, *, num_steps: int, device: torch.device) -> None:
        self.folder = output_dir / "profile"
        self._is_cuda = device.type == "cuda"
        self._num_active = max(1, min(3, num_steps))
        num_warmup = max(0, min(2, num_steps - self._num_active))
        self._first_warmup = max(0, min(2, num_steps - self._num_active - num_warmup))
        self._first_active = self._first_warmup + num_warmup
        self._written = False
        self._profiler: torch.profiler.profile | None = None
        if enabled:
            activity = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(
                activities=[activity.CPU, activity.CUDA] if self._is_cuda else [activity.CPU],
                schedule=self._action,
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
                acc_events=True,  # there is one cycle only; without it torch 2.11 warns about further ones
            )

    def _action(self, step: int) -> torch.profiler.ProfilerAction:
        action = torch.profiler.ProfilerAction
        last = self._first_active + self._num_active - 1
        if step == self._first_active and self._is_cuda and self._profiler is not None:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        if step < self._first_warmup or step > last:
            return action.NONE
        if step < self._first_active:
            return action.WARMUP
        return action.RECORD if step < last else action.RECORD_AND_SAVE

    def __enter__(self) -> "Profile":
        if self._profiler is not None:
            self._profiler.__enter__()
        return self

    def step(self) -> None:
        """Say that a training step has finished."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, traceback)
            if not self._written:
                logger.warning("Nothing was profiled: the run ended before step %d", self._first_active + 1)

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        place = "cuda" if self._is_cuda else "cpu"
        averages = profiler.key_averages()
        by_time = averages.table(sort_by=f"self_{place}_time_total", row_limit=40)
        by_memory = averages.table(sort_by=f"self_{place}_memory_usage", row_limit=40)
        (self.folder / "operators.txt").write_text(f"By time\n{by_time}\n\nBy memory\n{by_memory}\n")
        if self._is_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory_snapshot.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("Wrote the profile of %d steps to %s", self._num_active, self.folder)
