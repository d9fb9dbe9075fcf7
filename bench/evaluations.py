"""Memory and time of the evaluations' costly parts on made-up features: neighbours with votes, logistic regression.

    python bench/evaluations.py [--patches 500000] [--queries 2000] [--dim 1024] [--device cpu]

Prints seconds, the share of the time that one matrix product of the same size takes, and the peak of this process's
memory, features included.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from logreg import fit_logistic  # the repository is not installed
from neighbors import majority_votes, nearest

CLASSES, PIXELS, ITERATIONS = 20, 196, 5


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=500_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    train = torch.empty(args.patches, args.dim)
    for rows in train.split(10_000):
        rows.normal_(generator=generator)
    pixels = torch.randint(CLASSES, (args.patches, PIXELS), generator=generator, dtype=torch.uint8)
    queries = torch.randn(args.queries, args.dim, generator=generator).to(args.device)
    print_row("what", "seconds", "of one product", "peak GiB")

    started = time.monotonic()
    for rows in train.split(50_000):
        (queries @ rows.to(args.device).T).sum().item()
    product = time.monotonic() - started
    title = f"{args.patches} x {args.queries} x {args.dim}"
    print_row(f"product {title}", f"{product:.1f}", "1.0", f"{peak_gib():.2f}")

    started = time.monotonic()
    _, found = nearest(queries, train, 30, "cosine")
    for _, labels in majority_votes(found, pixels, [1, 3, 10, 30]):
        labels.sum().item()
    seconds = time.monotonic() - started
    print_row(f"k-NN    {title}", f"{seconds:.1f}", f"{seconds / product:.1f}", f"{peak_gib():.2f}")

    started = time.monotonic()
    labels = pixels[:, 0].long().to(args.device)
    fit_logistic(train.to(args.device), labels, CLASSES, 1.0, max_iter=ITERATIONS)
    seconds = time.monotonic() - started
    title = f"{args.patches} x {args.dim}, {CLASSES} classes, {ITERATIONS} iterations"
    print_row(f"logistic regression {title}", f"{seconds:.1f}", "", f"{peak_gib():.2f}")


def peak_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_row(*cells: str) -> None:
    """One line of the table."""
    sys.stdout.write(f"{cells[0]:<72} {cells[1]:>8} {cells[2]:>15} {cells[3]:>9}\n")


if __name__ == "__main__":
    main()
