"""Time and memory of the clustering head's step: 256 positions x 64 images x 16384 prototypes, width 384, float32.

    python bench/clustering.py [chunk ...]

One line per chunk size (positions whose logits are alive together; `auto` is what training does), each in a process of
its own, because the peak of a process never falls. `added` is the peak of the step above what the process held before.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

POSITIONS, BATCH, PROTOTYPES, WIDTH, PREDICTED = 256, 64, 16384, 384, 8


def measure(chunk: int | None) -> str:
    """One line of the table."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch

    from clustering import OnlineClustering

    torch.manual_seed(0)
    head = OnlineClustering(WIDTH, PROTOTYPES, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    features = torch.randn(POSITIONS, BATCH, WIDTH)
    predict_indices = torch.cat([torch.randperm(POSITIONS)[:PREDICTED] + i * POSITIONS for i in range(BATCH)])
    head.step(features[:1, :1], torch.zeros(0, dtype=torch.int64))  # libraries loaded, gradients allocated
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    head.step(features, predict_indices, chunk=chunk)
    seconds = time.perf_counter() - start
    added_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    used = chunk or head.automatic_chunk(BATCH, features.device)
    name = "auto" if chunk is None else chunk
    return f"{name:>5} {used:>9} {seconds:>9.1f} {added_mb:>11.0f}"


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(measure(None if sys.argv[2] == "auto" else int(sys.argv[2])) + "\n")
        return
    copy_mb = POSITIONS * BATCH * PROTOTYPES * 4 / 1e6
    sys.stdout.write(
        f"{POSITIONS} positions x {BATCH} images x {PROTOTYPES} prototypes: all logits are {copy_mb:.0f} MB\n"
        f"{'chunk':>5} {'positions':>9} {'seconds':>9} {'added MB':>11}\n"
    )
    for chunk in sys.argv[1:] or ["auto", "1", "32"]:
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--one", chunk], check=True)


if __name__ == "__main__":
    main()
