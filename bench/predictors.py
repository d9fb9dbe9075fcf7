"""CAPI's step with each of the predictors that the paper compares: time here, and FLOPs, also at the paper's size.

    python bench/predictors.py [--batch 8] [--px 224] [--steps 5] [--results FILE] [a.b=c ...]

ViT-S/14 as `configs/vits14.yaml` has it, on made-up images; float32 on a CPU, the config's bfloat16 on a GPU; eager.
Steps are taken in turn in one process; `times cross` is the median of the ratios in a turn, of processor time on a CPU
and of the wall on a GPU, and `by FLOPs` the ratio of matmuls alone. The last columns are of the published recipe,
ViT-L/14: by formula, and what its author reports, that cross-attention is 18 % faster than `split` and 44 % faster than
`fused`: 1.18 and 1.44 times the images per second, or 1.22 and 1.79 times the time, as one reads it.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from methods import time_in_turn
from results import add_arguments, print_table, record, whole_number
from step import Step, configure

from config import DEFAULT_PRETRAIN_CONFIG, load_config
from distributed import pick_device
from flops import training_flops_per_image
from model import PREDICTORS
from train_capi import CapiConfig, step_shape

REPORTED = {"cross": 0.0, "split": 0.18, "fused": 0.44}
"""By how much the author has cross-attention faster than this; on which machine and at which batch is not said."""


def flops(cfg: CapiConfig) -> float:
    """Model FLOPs of a step per image."""
    return float(training_flops_per_image(step_shape(cfg)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="*", help="configuration on top of configs/vits14.yaml, not of the last columns"
    )
    parser.add_argument("--batch", type=whole_number, default=8, help="images per step; 8")
    parser.add_argument("--px", type=whole_number, default=224, help="side of the images; 224")
    parser.add_argument("--steps", type=whole_number, default=5, help="timed steps of each; 5")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    args.model, device = "vits14", pick_device("auto")
    overrides = {"overrides": " ".join(args.sources)} if args.sources else {}
    args.sources.append(f"data.images_size={args.px}")
    published = {
        kind: flops(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [f"model.predictor={kind}"]))
        for kind in PREDICTORS
    }
    configs = {}
    for kind in PREDICTORS:
        own = argparse.Namespace(model=args.model, sources=[*args.sources, f"model.predictor={kind}"])
        configs[kind] = configure(own, device, args.batch, "eager")
    steps = {kind: Step(cfg, device) for kind, cfg in configs.items()}
    wall, processor = time_in_turn(steps, args.steps, device)
    compared, rows = processor if device.type == "cpu" else wall, []
    for kind, step in steps.items():
        step.check()
        ratios = [own / cross for own, cross in zip(compared[kind], compared["cross"], strict=True)]
        rows.append(
            {
                "predictor": kind,
                "ms per image": 1e3 * statistics.median(wall[kind]) / args.batch,
                "times cross": statistics.median(ratios),
                "TFLOP per image": flops(configs[kind]) / 1e12,
                "by FLOPs": flops(configs[kind]) / flops(configs["cross"]),
                "ViT-L/14 TFLOP": published[kind] / 1e12,
                "ViT-L/14 by FLOPs": published[kind] / published["cross"],
                "author, as speed": 1 + REPORTED[kind],
                "author, as time": 1 / (1 - REPORTED[kind]),
            }
        )
    print_table(rows)
    dtype = str(steps["cross"].state.dtype).removeprefix("torch.")
    settings = {"encoder": "ViT-S/14", "batch": args.batch, "px": args.px, "steps": args.steps, "dtype": dtype}
    record(args, "predictors", settings | overrides, rows)


if __name__ == "__main__":
    main()
