"""CAPI's step with moments of the optimizer in 32 and in 8 bits: time and memory.

    python bench/optimizers.py [--model vits14] [--batch 8] [--px 224] [--steps 5] [--results FILE] [a.b=c ...]

On made-up images; float32 on a CPU, the config's bfloat16 on a GPU; eager. Steps are taken in turn in one process, and
then updates alone; `times AdamW` is the median of the ratios in a turn, of processor time on a CPU and of the wall on a
GPU. Bytes are those of the tensors that the optimizers of student and clustering head hold; of ViT-L/14, by formula.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from methods import time_in_turn
from results import add_arguments, print_table, record, whole_number
from step import Step, configure

from config import DEFAULT_PRETRAIN_CONFIG, OPTIMIZERS, load_config
from distributed import pick_device
from train_capi import CapiConfig, optimizer_bytes


def both(kind: str) -> list[str]:
    """Overrides that give student and clustering head an optimizer of this kind."""
    return [f"optim.optimizer={kind}", f"capi.clustering_optimizer.optimizer={kind}"]


def update(step: Step) -> None:
    """Repeat the last update of both optimizers."""
    for _, optimizer in step.state.optimizers.values():
        optimizer.step()


def held_bytes(step: Step) -> tuple[int, int]:
    """Bytes of the moments, and weights that have some."""
    optimizers = [optimizer for _, optimizer in step.state.optimizers.values()]
    states = [(p, state) for optimizer in optimizers for p, state in optimizer.state.items()]
    held = sum(x.nbytes for _, state in states for name, x in state.items() if name != "step")
    return held, sum(p.numel() for p, _ in states)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="configuration on top of the model's, not of ViT-L/14")
    parser.add_argument("--model", default="vits14", help="name of a file in configs/; vits14")
    parser.add_argument("--batch", type=whole_number, default=8, help="images per step; 8")
    parser.add_argument("--px", type=whole_number, default=224, help="side of the images; 224")
    parser.add_argument("--steps", type=whole_number, default=5, help="timed steps of each; 5")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    device = pick_device("auto")
    overrides = {"overrides": " ".join(args.sources)} if args.sources else {}
    given = [*args.sources, f"data.images_size={args.px}"]
    steps = {}
    for kind in OPTIMIZERS:
        args.sources = [*given, *both(kind)]
        steps[kind] = Step(configure(args, device, args.batch, "eager"), device)
    timed = {"step": time_in_turn(steps, args.steps, device)}
    for step in steps.values():
        step.check()
    updates = {kind: lambda step=step: update(step) for kind, step in steps.items()}
    timed["update"] = time_in_turn(updates, args.steps, device)
    rows = []
    for kind, step in steps.items():
        row: dict[str, str | int | float] = {"optimizer": kind}
        for what, (wall, processor) in timed.items():
            compared = processor if device.type == "cpu" else wall
            ratios = [own / other for own, other in zip(compared[kind], compared["AdamW"], strict=True)]
            row |= {
                f"ms per {what}": 1e3 * statistics.median(wall[kind]),
                f"{what}, times AdamW": statistics.median(ratios),
            }
        held, num_weights = held_bytes(step)
        published = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, both(kind))
        row |= {
            "million weights": num_weights / 1e6,
            "MiB": held / 2**20,
            "bytes per weight": held / num_weights,
            "ViT-L/14 GiB": optimizer_bytes(published) / 2**30,
        }
        rows.append(row)
    print_table(rows)
    dtype = str(steps["AdamW"].state.dtype).removeprefix("torch.")
    settings = {"model": args.model, "batch": args.batch, "px": args.px, "steps": args.steps, "dtype": dtype}
    record(args, "optimizers", settings | overrides, rows)


if __name__ == "__main__":
    main()
