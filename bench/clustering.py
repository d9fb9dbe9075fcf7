"""Time and memory of the clustering head's step against the two matmuls that it cannot do without.

    python bench/clustering.py [--batch 64] [--width 384] [--chunks 1 8 auto] [--results FILE]

256 positions and 16384 prototypes; by default 64 images and width 384 in float32 on a CPU, 512 images and width 1024
under bfloat16 autocast on a GPU.

`floor`: the matmuls alone, logits and weight gradient, in chunks. `step`: what training does, by positions per chunk
and kernel. `plain`: the same on everything at once, by `OnlineClustering.forward` and its backward pass. Times are
medians, taken in turn in one process; the ratio is that to the floor. `added GiB`: peak above what was there before,
the targets included; on a CPU every line has a process of its own for it, because the peak of a process never falls.

Bounds of the step: operations, 4 x tokens x width x prototypes over the rate of the unit; bytes, the logits written
once, read once per Sinkhorn round, once for loss and gradient, written and read as gradient, over the bandwidth.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from results import add_arguments, print_table, record, whole_number

from clustering import OnlineClustering
from metrics import peak_flops
from speed.clustering import learn_in_chunks

PREDICTED = 8
ROUNDS = 3
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}
"""Bytes per second of the memory of GPUs (data sheets of the SXM modules; the A100 with 80 GB)."""


def variants(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each call does all of it once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    head = OnlineClustering(
        args.width, args.prototypes, bias=True, n_sk_iter=ROUNDS, target_temp=0.06, pred_temp=0.12
    ).to(device)
    x = torch.randn(args.positions, args.batch, args.width, device=device)
    indices = torch.cat([torch.randperm(args.positions)[:PREDICTED] + i * args.positions for i in range(args.batch)])
    chunk = 8

    @torch.no_grad()
    def floor() -> None:
        weight, bias = head.layer.weight.to(dtype), head.layer.bias.to(dtype)
        logits = torch.empty(chunk * args.batch, args.prototypes, dtype=dtype, device=device)
        gradient = torch.zeros(weight.shape, dtype=dtype, device=device)
        for part in x.to(dtype).split(chunk):
            tokens = part.flatten(0, 1)
            out = logits[: len(tokens)]
            torch.addmm(bias, tokens, weight.T, out=out)
            gradient.addmm_(out.T, tokens)

    def autocast() -> Any:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step(stepping: OnlineClustering) -> Callable[[], None]:
        def run() -> None:
            stepping.zero_grad()
            with autocast():
                stepping.step(x, indices)

        return run

    def fast(positions: str, kernel: str) -> OnlineClustering:
        chunk = None if positions == "auto" else int(positions)
        return learn_in_chunks(copy.copy(head), kernel=kernel, device=device, chunk=chunk)

    kernels = ["torch", "triton"] if device.type == "cuda" else ["torch"]
    steps = {f"step, {kernel}, chunk {c}": step(fast(c, kernel)) for kernel in kernels for c in args.chunks}
    return {"floor": floor, **steps, "plain": step(head)}


def seconds_of(run: Callable[[], Any]) -> float:
    """Time of one call, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def added_gib(run: Callable[[], Any]) -> float | None:
    """Peak memory of the first call above what was there before it; None if there is too little on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            run()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def added_gib_alone(name: str) -> float | None:
    """`added_gib` of a variant in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None  # plain may need more memory than there is


def print_bounds(args: argparse.Namespace, floor_s: float) -> None:
    """The two bounds, and what the floor makes of the first."""
    elements = args.positions * args.batch * args.prototypes
    operations = 4 * elements * args.width
    lines = [f"operations: {operations / 1e12:.3g} TFLOP; the floor does {operations / floor_s / 1e12:.3g} TFLOP/s"]
    size = 2 if torch.cuda.is_available() else 4
    traffic = elements * size * (ROUNDS + 4)
    lines.append(f"bytes: {traffic / 1e9:.3g} GB")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = peak_flops(name, "bfloat16")
        bandwidth = next((value for gpu, value in PEAK_BANDWIDTH.items() if gpu in name), None)
        lines[0] += f"; at the unit's peak {operations / peak * 1e3:.3g} ms" if peak else ""
        lines[1] += f"; at the memory's peak {traffic / bandwidth * 1e3:.3g} ms" if bandwidth else ""
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """The command line."""
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=whole_number, default=256)
    parser.add_argument("--batch", type=whole_number, default=512 if is_cuda else 64)
    parser.add_argument("--width", type=whole_number, default=1024 if is_cuda else 384)
    parser.add_argument("--prototypes", type=whole_number, default=16384)
    parser.add_argument("--chunks", nargs="+", default=["auto"], help="positions per chunk")
    parser.add_argument("--repeats", type=whole_number, default=10 if is_cuda else 3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    runs = variants(args)
    if args.memory_of:
        sys.stdout.write(str(added_gib(runs[args.memory_of])))
        return
    memory = {name: added_gib(run) if is_cuda else added_gib_alone(name) for name, run in runs.items()}
    runs = {name: run for name, run in runs.items() if memory[name] is not None}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    floor_s = statistics.median(times["floor"])
    rows = []
    for name, gib in memory.items():
        taken = times.get(name)  # none if there was too little memory
        ratio = (
            statistics.median(own / floor for own, floor in zip(taken, times["floor"], strict=True)) if taken else None
        )
        ms = 1e3 * statistics.median(taken) if taken else None
        rows.append({"what": name, "ms": ms, "of floor": ratio, "added GiB": gib})
    print_bounds(args, floor_s)
    print_table(rows)
    sizes = {key: getattr(args, key) for key in ("positions", "batch", "width", "prototypes")}
    dtype = "bfloat16" if is_cuda else "float32"
    record(args, "clustering", sizes | {"dtype": dtype, "chunks": " ".join(args.chunks)}, rows)


if __name__ == "__main__":
    main()
