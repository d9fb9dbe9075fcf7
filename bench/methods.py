"""The training steps of all methods beside each other, on made-up images: time per image and memory.

    python bench/methods.py [--method capi ijepa stop cae] [--batch 8] [--px 224] [--steps 5] [--results FILE]

ViT-S/16 as the encoder of each, everything else as its recipe has it: CAPI's predictor has 6 blocks of width 384 and
its heads 16384 prototypes; those of I-JEPA and StoP have 6 blocks of width 192, and contexts of a quarter of the
patches, as 128 images in a forward pass cut them; CAE's regressor and decoder have 4 blocks of width 384 each, and its
tokenizer is left out. Eager; float32 on a CPU, bfloat16 on a GPU.

Times are medians of steps taken in turn in one process. On a CPU that others use too, the wall says little: `processor
ms per image` is the time that all threads ran, and `times the first` the median of its ratio in a turn; on a GPU that
of the wall. Threads that wait for each other run too, so OMP_NUM_THREADS=1 is for a busy machine. `added GiB` is the
peak above what was there before the networks were built: weights, gradients, optimizers, average and activations; each
method has a process of its own for it. `TFLOP per image` counts matmuls alone, and none twice that is recomputed.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from results import add_arguments, print_table, record, whole_number
from step import ROOT, Step, time_steps

import train_cae
import train_ijepa
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import Batch
from distributed import pick_device
from flops import step_flops_per_image
from masking import MultiBlockMasks
from metrics import peak_memory_gib
from train_cae import CaeConfig, CaeState
from train_capi import CapiConfig, step_shape
from train_ijepa import IjepaConfig, IjepaState
from training import TrainState
from utils import both_sides

PATCH = 16


@dataclass(frozen=True)
class Repeated:
    """A training step that can be repeated."""

    run: Callable[[], None]
    check: Callable[[], None]
    """Raises RuntimeError if the last loss was not finite."""
    flops_per_image: float


def capi(sources: Sequence[str], device: torch.device) -> Repeated:
    """CAPI's step."""
    vits = [str(ROOT / "configs" / "vits14.yaml"), f"model.patch_size={PATCH}"]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*vits, *sources])
    step = Step(cfg, device)
    return Repeated(step, step.check, sum(step_flops_per_image(step_shape(cfg)).values()))


def repeated(state: TrainState[Any], step: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    """What runs a step that gives its loss, and what checks the last one."""
    losses = [torch.zeros(())]

    def run() -> None:
        losses[0] = step()
        state.step += 1

    def check() -> None:
        if not losses[0].isfinite():
            raise RuntimeError(f"the loss is {losses[0].item()} after {state.step} steps")

    return run, check


def ijepa(sources: Sequence[str], device: torch.device, noise_std: float = 0.0) -> Repeated:
    """I-JEPA's step, with noise on the positions StoP's; every step has masks of its own, as in training."""
    small = [f"model={{patch_size: {PATCH}, embed_dim: 384, depth: 12, num_heads: 6}}"]
    small += ["predictor={embed_dim: 192, depth: 6}", f"predictor.position_noise_std={noise_std}"]
    cfg = load_config(IjepaConfig, train_ijepa.DEFAULT_CONFIG, [*small, *sources])
    quarter = f"masks.context_patches={cfg.num_patches // 4}"
    cfg = load_config(IjepaConfig, train_ijepa.DEFAULT_CONFIG, [*small, *sources, quarter])
    state, b = IjepaState(cfg, device), cfg.optim.batch_size_per_gpu
    images = torch.randn(b, 3, *cfg.data.crop_size, generator=torch.Generator().manual_seed(0))
    draw = MultiBlockMasks(train_ijepa.mask_plan(cfg), seed=0)

    def step() -> torch.Tensor:
        masks = draw([(b * state.step + image,) for image in range(b)])
        batch = Batch(images=images, masks=masks, sample_ids=torch.arange(b)).to(device)
        hyper = train_ijepa.hyper_at(cfg.optim.total_iters // 2, cfg)
        return train_ijepa.train_step(state, [batch], hyper)["loss"]

    return Repeated(*repeated(state, step), train_ijepa.step_flops_per_image(cfg, train_ijepa.sampled_sizes(cfg)))


def stop(sources: Sequence[str], device: torch.device) -> Repeated:
    """StoP's step, with the noise of its ViT-B."""
    return ijepa(sources, device, noise_std=0.25)


def cae(sources: Sequence[str], device: torch.device) -> Repeated:
    """CAE's step, with random tokens; every step has masks of its own, as in training."""
    small = [f"model={{patch_size: {PATCH}, embed_dim: 384, depth: 12, num_heads: 6}}"]
    cfg = load_config(
        CaeConfig, train_cae.DEFAULT_CONFIG, [*small, "regressor={embed_dim: 384, num_heads: 6}", *sources]
    )
    state, b, masks = CaeState(cfg, device), cfg.optim.batch_size_per_gpu, train_cae.make_masks(cfg)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(b, 3, *cfg.data.crop_size, generator=generator)
    size = both_sides(cfg.tokenizer.image_size)
    second = torch.randint(256, (b, 3, *size), generator=generator, dtype=torch.uint8)
    shape = (b, cfg.num_patches)
    tokens = torch.randint(cfg.decoder.vocabulary_size, shape, generator=generator).to(device)

    def step() -> torch.Tensor:
        drawn = masks([(b * state.step + image,) for image in range(b)])
        batch = Batch(images=images, second_images=second, masks=drawn, sample_ids=torch.arange(b)).to(device)
        tokenizer: Any = lambda _: tokens  # noqa: E731
        lr = train_cae.lr_at(cfg.optim.total_iters // 2, cfg)
        return train_cae.train_step(state, tokenizer, [batch], lr)["loss"]

    return Repeated(*repeated(state, step), train_cae.step_flops_per_image(cfg))


METHODS: dict[str, Callable[[Sequence[str], torch.device], Repeated]] = {
    "capi": capi,
    "ijepa": ijepa,
    "stop": stop,
    "cae": cae,
}


def sources_of(args: argparse.Namespace, device: torch.device) -> list[str]:
    """What the configurations of all methods have in common here."""
    precision = "float32" if device.type == "cpu" else "bfloat16"
    disabled = [f"efficiency.compilation.{name}.disable=true" for name in ("do_teacher", "do_student")]
    sizes = [f"data.images_size={args.px}", f"optim.batch_size_per_gpu={args.batch}"]
    return [*sizes, *disabled, f"efficiency.param_dtype={precision}"]


def added_gib(args: argparse.Namespace, name: str, device: torch.device) -> float:
    """Peak memory of two steps above what was there before the networks, in this process."""
    before = peak_memory_gib(device)
    repeated = METHODS[name](sources_of(args, device), device)
    for _ in range(2):  # the optimizers have their state from the first one on
        repeated.run()
    repeated.check()
    return peak_memory_gib(device) - before


def added_gib_alone(name: str) -> float:
    """`added_gib` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def time_in_turn(
    steps: Mapping[str, Callable[[], None]], num_turns: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every step in every turn, by the wall and as all threads ran; a turn before them is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(num_turns):
        for name, step in steps.items():
            began = time.process_time()
            wall[name] += time_steps(step, 1, device)
            processor[name].append(time.process_time() - began)
    return wall, processor


def report(args: argparse.Namespace, device: torch.device) -> None:
    """Measure all methods, print a table and append a line."""
    memory = {name: added_gib_alone(name) for name in args.method}
    steps = {name: METHODS[name](sources_of(args, device), device) for name in args.method}
    wall, processor = time_in_turn({name: repeated.run for name, repeated in steps.items()}, args.steps, device)
    compared = processor if device.type == "cpu" else wall
    first, rows = compared[args.method[0]], []
    for name, repeated in steps.items():
        repeated.check()
        ratios = [own / other for own, other in zip(compared[name], first, strict=True)]
        rows.append(
            {
                "method": name,
                "ms per image": 1e3 * statistics.median(wall[name]) / args.batch,
                "processor ms per image": 1e3 * statistics.median(processor[name]) / args.batch,
                "times the first": statistics.median(ratios),
                "TFLOP per image": repeated.flops_per_image / 1e12,
                "added GiB": memory[name],
            }
        )
    print_table(rows)
    settings = {"encoder": f"ViT-S/{PATCH}", "batch": args.batch, "px": args.px, "steps": args.steps}
    settings["dtype"] = "float32" if device.type == "cpu" else "bfloat16"
    chosen = {} if args.method == list(METHODS) else {"methods": " ".join(args.method)}
    record(args, "methods", settings | chosen, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--batch", type=whole_number, default=8, help="images per step; 8")
    parser.add_argument("--px", type=whole_number, default=224, help="side of the images; 224")
    parser.add_argument("--steps", type=whole_number, default=5, help="timed steps of each; 5")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    device = pick_device("auto")
    if args.memory_of:
        sys.stdout.write(str(added_gib(args, args.memory_of, device)))
    else:
        report(args, device)


if __name__ == "__main__":
    main()
