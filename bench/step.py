"""A whole training step on made-up images: time, its parts apart, model FLOPs by formula and as counted, peak memory.

    python bench/step.py [--model vits14] [--batch N] [--mode eager|compiled|cudagraphs] [config.yaml ...] [a.b=c ...]
    python bench/step.py --model vitl14 --mode compiled --largest-batch       (on a GPU)

`--model` names a file in configs/. Default: ViT-S/14 at 224 px, batch 16, 16384 prototypes, eager; float32 on a CPU,
the config's bfloat16 on a GPU. The whole step is timed undisturbed; a second pass waits for the device at the borders
of the parts, and its `rest` is what lies between them. After warm-up, compiling anything again is an error.

Bounds: `FLOP bound` is model FLOPs over the rate of the GPU's data sheet if it is known, else over that of one matrix
product measured here; `byte bound` is what the optimizers (7 float32 values per weight) and the average (3) read and
write over the bandwidth of a copy measured here. With a `--mode` other than eager, the eager step is measured and
recorded first; and at the end, how long the first step takes with an empty compile cache (`cold`) and with a filled
one (`warm`; in the same process, so that what Python has loaded stays).
`counted` is what torch.utils.flop_counter counts on one eager step of at most 16 images, `formula` what
`flops.step_flops_per_image` says, with the scores that fused attention computes again in the backward pass added for
this comparison alone. The counter does not see kernels in Triton, such as the clustering head's on a GPU.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from results import add_arguments, print_table, record, whole_number
from torch.utils.flop_counter import FlopCounterMode

import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import Batch
from distributed import pick_device
from flops import attention_recomputation_per_image, num_backbone_parameters, step_flops_per_image
from masking import draw_positions, make_masking_generator
from metrics import peak_flops, peak_memory_gib
from speed.compiling import kept_compilations
from train_capi import CapiConfig, CapiState, hyper_at, mask_plan, step_shape, train_step
from utils import UserError

ROOT = Path(__file__).parent.parent
MODELS = ("vits14", "vitb14", "vitl14", "vith14", "vitg14", "vit3b14")
MODES = ("eager", "compiled", "cudagraphs")
WARMUP_STEPS = {"eager": 1, "compiled": 2, "cudagraphs": 3}
"""They allocate, compile, and record CUDA graphs at the second call."""
PARTS = ("teacher", "clustering", "student", "optimizers", "average")


def configure(args: argparse.Namespace, device: torch.device, batch: int, mode: str) -> CapiConfig:
    """The config that the command line asks for, at this batch size and in this mode."""
    eager = str(mode == "eager").lower()
    sources = [
        str(ROOT / "configs" / f"{args.model}.yaml"),
        f"efficiency.compilation.do_teacher.disable={eager}",
        f"efficiency.compilation.do_student.disable={eager}",
        f"efficiency.compilation.cuda_graphs={str(mode == 'cudagraphs').lower()}",
    ]
    if device.type == "cpu":
        sources.append("efficiency.param_dtype=float32")
    sources += [*args.sources, f"optim.batch_size_per_gpu={batch}"]
    return load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources)


def make_batch(cfg: CapiConfig, device: torch.device) -> Batch:
    """Noise, with masks as in training."""
    plan, b = mask_plan(cfg), cfg.optim.batch_size_per_gpu
    generator = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    random = torch.Generator().manual_seed(0)
    drawn = [draw_positions(plan, generator, random) for _ in range(b)]
    visible, predict = (torch.cat([d[k] + i * plan.num_patches for i, d in enumerate(drawn)]) for k in (0, 1))
    images = torch.randn(b, cfg.model.in_chans, *cfg.data.crop_size, generator=random)
    return Batch(
        images=images, masks={"visible_indices": visible, "predict_indices": predict}, sample_ids=torch.arange(b)
    ).to(device)


class Step:
    """A training step that can be repeated."""

    def __init__(self, cfg: CapiConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.state, self.batch = CapiState(cfg, device), make_batch(cfg, device)

    def __call__(self) -> None:
        """Run one step; on a GPU this returns before it is done."""
        # The learning rate of the middle of the training: it is 0 at both ends.
        hyper = hyper_at(self.cfg.optim.total_iters // 2, self.cfg)
        self.last = train_step(self.state, [self.batch], hyper)
        self.state.step += 1

    def check(self) -> None:
        """Raises: RuntimeError if the last step gave no finite loss: its time would mean nothing."""
        if not self.last["loss"].isfinite():
            raise RuntimeError(f"the loss is {self.last['loss'].item()} after {self.state.step} steps")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(step: Callable[[], None], num_steps: int, device: torch.device) -> list[float]:
    """Seconds of each step; on a GPU by events between them, without waiting in between."""
    if device.type != "cuda":
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


class PartTimer:
    """Seconds of the parts of `train_step`, waiting for the device at their borders.

    The student's part lasts from its forward pass to the end of its backward pass, where `apply_gradients` begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._student_began = 0.0

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` that adds its time to a part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(*args, **kwargs)
            self.seconds[name] += self._now() - start
            return result

        return wrapper

    def _student_begins(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            self._student_began = self._now()
            return function(*args)

        return wrapper

    def _student_ends(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            self.seconds["student"] += self._now() - self._student_began
            return self.timed("optimizers", function)(*args)

        return wrapper

    @contextlib.contextmanager
    def watching(self, state: CapiState) -> Iterator[None]:
        """Wrap the functions that a step calls, and put them back."""
        before = {name: getattr(state, name) for name in ("do_teacher", "do_student")}
        ema_update = train_capi.ema_update_
        state.do_teacher = self.timed("teacher", state.do_teacher)
        state.do_student = self._student_begins(state.do_student)
        state.clustering.step = self.timed("clustering", state.clustering.step)
        state.apply_gradients = self._student_ends(state.apply_gradients)
        train_capi.ema_update_ = self.timed("average", ema_update)
        try:
            yield
        finally:
            train_capi.ema_update_ = ema_update
            del state.apply_gradients, state.clustering.step
            for name, function in before.items():
                setattr(state, name, function)


def time_parts(step: Step, num_steps: int) -> dict[str, float]:
    """Median seconds of each part, and of the `rest`."""
    rows = []
    for _ in range(num_steps):
        timer = PartTimer(step.device)
        with timer.watching(step.state):
            (whole,) = time_steps(step, 1, step.device)
        rows.append(timer.seconds | {"rest": whole - sum(timer.seconds.values())})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _addmm_flops(_sum: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def count_flops(cfg: CapiConfig, device: torch.device) -> dict[str, dict[str, float]]:
    """FLOPs per image of each part of one eager step, `counted` by torch and by `formula`."""
    step = Step(cfg, device)
    b, shape = cfg.optim.batch_size_per_gpu, step_shape(cfg)
    counted: dict[str, float] = {}

    def counts(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before = counter.get_total_flops()
            result = function(*args, **kwargs)
            counted[name] = (counter.get_total_flops() - before) / b
            return result

        return wrapper

    step.state.do_teacher = counts("teacher", step.state.do_teacher)
    step.state.clustering.step = counts("clustering", step.state.clustering.step)
    in_place: Any = {torch.ops.aten.addmm_: _addmm_flops}  # torch knows the other form alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
        counted["step"] = counter.get_total_flops() / b
    counted["student"] = counted["step"] - counted["teacher"] - counted["clustering"]
    formula = step_flops_per_image(shape, b)
    formula["student"] += attention_recomputation_per_image(shape, b)
    formula["step"] = sum(formula.values())
    return {name: {"counted": counted[name], "formula": formula[name]} for name in formula}


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of one large matrix product and bytes/s of a copy, the best of five."""
    cuda = device.type == "cuda"
    size, values = (8192, 2**28) if cuda else (2048, 2**25)
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(values, device=device)
    target = torch.empty_like(source)

    def best(function: Callable[[], object]) -> float:
        return min(time_steps(lambda: (function(), None)[1], 6, device)[1:])

    return 2 * size**3 / best(lambda: a @ a), 8 * values / best(lambda: target.copy_(source))


def largest_batch(runs: Callable[[int], bool], start: int) -> int:
    """Largest batch that runs, to an eighth of `start`: by doubling, or halving, then bisection. 0 if none does."""
    unit = max(1, start // 8)
    good, bad = 0, start
    if runs(start):
        good, bad = start, 2 * start
        while runs(bad):
            good, bad = bad, 2 * bad
    while bad - good > unit:
        middle = (good + bad) // 2 // unit * unit
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if runs(middle) else (good, middle)
    return good


def fits(args: argparse.Namespace, device: torch.device, batch: int, mode: str) -> bool:
    """Whether two steps of this batch run without asking for more memory than there is."""
    fitted = _runs_twice(args, device, batch, mode)
    release(device)  # not in there, where an error's traceback would still hold the tensors
    sys.stdout.write(f"batch {batch} {'fits' if fitted else 'does not fit'}, {mode}\n")
    sys.stdout.flush()
    return fitted


def _runs_twice(args: argparse.Namespace, device: torch.device, batch: int, mode: str) -> bool:
    try:
        step = Step(configure(args, device, batch, mode), device)
        step()
        step()
        synchronize(device)
    except torch.OutOfMemoryError:
        return False
    return True


def search(args: argparse.Namespace, device: torch.device) -> int:
    """Largest batch that fits, to an eighth of `--batch`; searched eagerly, for every size is compiled anew.

    Raises: UserError without a CUDA device, or if none fits.
    """
    if device.type != "cuda":
        raise UserError(f"--largest-batch needs a CUDA device, this is {device}")
    batch = largest_batch(functools.partial(fits, args, device, mode="eager"), args.batch)
    if batch == 0:
        raise UserError(f"--batch={args.batch}: not even an eighth of it fits")
    return batch


def release(device: torch.device) -> None:
    """Give back what an earlier step held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Measured(NamedTuple):
    """What was measured of one mode."""

    seconds: dict[str, float]
    """Medians of the parts and, as `step`, of the whole."""
    memory_gib: float
    """Peak."""
    first_s: float
    """Seconds of the first step, in which everything is compiled."""


def first_step(args: argparse.Namespace, device: torch.device, batch: int, mode: str) -> tuple[Step, float]:
    """A step that has run once, and the seconds that it took."""
    step = Step(configure(args, device, batch, mode), device)
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return step, time.perf_counter() - began


def measure(args: argparse.Namespace, device: torch.device, batch: int, mode: str) -> Measured:
    """Measure one mode."""
    step, first_s = first_step(args, device, batch, mode)
    for _ in range(WARMUP_STEPS[mode] - 1):
        step()
    synchronize(device)
    with torch.compiler.set_stance("fail_on_recompile" if mode != "eager" else "default"):
        whole = statistics.median(time_steps(step, args.steps, device))
        peak = peak_memory_gib(device)
        parts = time_parts(step, args.steps)
    step.check()
    return Measured(parts | {"step": whole}, peak, first_s)


class Rates(NamedTuple):
    """What a step is compared to."""

    counts: dict[str, dict[str, float]]
    """As `count_flops` gives them."""
    peak: float | None
    """FLOP/s of the data sheet, if known."""
    product: float
    """FLOP/s of one matrix product."""
    copy: float
    """Bytes/s of a copy."""


def report(args: argparse.Namespace, device: torch.device, batch: int) -> None:
    """Measure the eager step and that of `--mode`; print and record each at once, for what comes next may take long."""
    cfg = configure(args, device, batch, args.mode)
    counts = count_flops(configure(args, device, min(batch, 16), "eager"), device)
    release(device)
    is_cuda = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device), cfg.efficiency.param_dtype) if is_cuda else None
    rates = Rates(counts, peak, *machine_rates(device, getattr(torch, cfg.efficiency.param_dtype)))
    release(device)
    sys.stdout.write(f"one product {rates.product / 1e12:.3g} TFLOP/s, copy {rates.copy / 1e9:.3g} GB/s\n")
    settings = {
        "model": args.model,
        "batch": batch,
        "px": cfg.data.images_size,
        "prototypes": cfg.capi.num_clusters,
        "dtype": cfg.efficiency.param_dtype,
    }
    overrides = {"overrides": " ".join(args.sources)} if args.sources else {}
    eager_s = None
    with tempfile.TemporaryDirectory() as cache, kept_compilations(Path(cache)):
        if args.mode != "eager":
            with contextlib.suppress(torch.OutOfMemoryError):
                eager = measure(args, device, batch, "eager")
                eager_s = eager.seconds["step"]
                report_mode(args, cfg, rates, settings | {"mode": "eager"} | overrides, eager, eager_s)
            release(device)
        measured = measure(args, device, batch, args.mode)
        settings |= {"mode": args.mode} | overrides
        report_mode(args, cfg, rates, settings, measured, eager_s)
        if args.mode != "eager":
            report_starts(args, settings, measured.first_s, None)  # a later line with both replaces it
            release(device)
            report_starts(args, settings, measured.first_s, first_step(args, device, batch, args.mode)[1])


def report_starts(args: argparse.Namespace, settings: dict[str, Any], cold_s: float, warm_s: float | None) -> None:
    """Print and record how long the first step takes with an empty compile cache and, once measured, a filled one."""
    rows = [{"compile cache": name, "first step s": s} for name, s in (("cold", cold_s), ("warm", warm_s))]
    print_table(rows)
    record(args, "training step, start", settings, rows)


def report_mode(
    args: argparse.Namespace,
    cfg: CapiConfig,
    rates: Rates,
    settings: dict[str, Any],
    measured: Measured,
    eager_s: float | None,
) -> None:
    """Print two tables about one mode, and append two lines."""
    shape, batch, seconds = step_shape(cfg), settings["batch"], measured.seconds
    head = shape.num_clusters * (shape.embed_dim + 1)  # a magnitude per prototype in the student's, a bias in the other
    student = num_backbone_parameters(shape) + head
    flops = {name: batch * value for name, value in step_flops_per_image(shape, batch).items()}
    moved = {"optimizers": 28 * (student + head), "average": 12 * student}
    flops["step"] = whole_flops = sum(flops.values())
    all_parts_s = sum(part_s for name, part_s in seconds.items() if name != "step")
    agreement = {name: counted["counted"] / counted["formula"] for name, counted in rates.counts.items()}
    rows = [
        {
            "part": name,
            "ms": 1e3 * part_s,
            "share": part_s / all_parts_s if name != "step" else "",
            "model TFLOP": flops[name] / 1e12 if name in flops else "",
            "FLOP bound ms": 1e3 * flops[name] / (rates.peak or rates.product) if name in flops else "",
            "byte bound ms": 1e3 * moved[name] / rates.copy if name in moved else "",
            "counted / formula": agreement.get(name, ""),
        }
        for name, part_s in seconds.items()
    ]
    summary = [
        {
            "ms": 1e3 * seconds["step"],
            "images/s": batch / seconds["step"],
            "TFLOP per image": whole_flops / batch / 1e12,
            "TFLOP/s": whole_flops / seconds["step"] / 1e12,
            "MFU": whole_flops / seconds["step"] / rates.peak if rates.peak else None,
            "of one product's rate": whole_flops / seconds["step"] / rates.product,
            "peak GiB": measured.memory_gib,
            "counted / formula": agreement["step"],
            "eager / this": 1.0 if settings["mode"] == "eager" else eager_s and eager_s / seconds["step"],
        }
    ]
    sys.stdout.write(", ".join(f"{key} {value}" for key, value in settings.items()) + "\n")
    print_table(rows)
    print_table(summary)
    record(args, "training step", settings, summary)
    record(args, "training step, parts", settings, rows)


def report_what_fits(args: argparse.Namespace, device: torch.device) -> None:
    """`report` of `--batch`, or of the largest one, less an eighth as often as `--mode` needs more memory than eager.

    Raises: UserError if there is too little memory.
    """
    batch = search(args, device) if args.largest_batch else args.batch
    while not _reported(args, device, batch):
        release(device)
        if not args.largest_batch or batch == 1:
            raise UserError(f"--batch={batch} does not fit on {device}; use a smaller one, or --largest-batch")
        batch = batch * 7 // 8


def _reported(args: argparse.Namespace, device: torch.device, batch: int) -> bool:
    try:
        report(args, device, batch)
    except torch.OutOfMemoryError:
        return False
    return True


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vits14")
    parser.add_argument("--batch", type=whole_number, default=16, help="images per step; 16")
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--steps", type=whole_number, default=5, help="timed steps, once whole and once in parts; 5")
    parser.add_argument(
        "--largest-batch", action="store_true", help="search the largest batch that fits, eagerly, from --batch on"
    )
    parser.add_argument("sources", nargs="*", metavar="config.yaml | a.b=c")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        device = pick_device("auto")
        report_what_fits(args, device)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
