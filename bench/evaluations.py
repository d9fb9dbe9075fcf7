"""Time and memory of the evaluations' costly parts on made-up features, against the straightforward way to do each.

    python bench/evaluations.py [knn logreg linear attentive pca] [--scale 0.08] [--repeats 3] [--device cpu]

Parts, with their sizes at `--scale 1` (images, patches and queries are scaled, widths and numbers of classes are not):

    knn        50k queries among 200k training patches, width 1024, votes of 196 pixels for k = 1, 3, 10, 30;
               20 classes; baseline: similarities to all training patches, `topk`, one-hot votes. Also: the bare product
    logreg     200k x 1024 features, 20 classes, 20 iterations; baselines: scikit-learn on numpy arrays
    linear     a training step of 30 linear classifiers, 128 images, width 1024, 1000 classes;
               baseline: 30 modules and 30 optimizers in a loop
    attentive  likewise, attentive classifiers of 256 tokens per image
    pca        10 components of 1M patches of width 1024; baselines: `torch.linalg.svd`, `torch.pca_lowrank`

The ways are measured in turn, `--repeats` times; medians are shown. Bounds: operations over the rate of a large matrix
product, and bytes (inputs and results once; of parameters what a step must read and write) over the rate of a large
copy, both measured in the same turns. `times bound` is the time in units of the larger one. Memory is what is added at
the peak to what was there before, in the turn that adds most.
"""

import argparse
import ctypes
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

import torch
from results import Row, add_arguments, positive_number, print_table, record, whole_number
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pictures import Moments
from readouts import (
    AttentiveClassifiers,
    LinearClassifiers,
    StackedAdamW,
    any_label_loss,
    fit_logistic,
    majority_votes,
    nearest,
)

WIDTH, PIXELS, TOKENS, HEAD_DIM = 1024, 196, 256, 64
KS = [1, 3, 10, 30]
FEW_CLASSES, MANY_CLASSES = 20, 1000
ITERATIONS = 20
CLASSIFIERS = 30
COMPONENTS = 10
LEARNING_RATES = torch.logspace(-5, -2, CLASSIFIERS).tolist()
WEIGHT_DECAY = 5e-4
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Way:
    """One way to compute something.

    `run` returns what `agreement` of the part compares with the first way's. `flops` and `num_bytes` are what it cannot
    do without; `rate` says in which precision it computes.
    """

    name: str
    run: Callable[[], Any]
    flops: float
    num_bytes: float
    rate: torch.dtype = torch.float32


@dataclass(frozen=True)
class Part:
    """Ways to compute the same, ours first; how large the problem is; and how well two outcomes agree."""

    settings: dict[str, Any]
    ways: list[Way]
    agreement: Callable[[Any, Any], str]


# ------------------------------------------------------------------------------------------------ measuring


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_gib(device: torch.device, *, peak: bool) -> float | None:
    """Memory in use, or its peak since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    if not STATUS.is_file():
        return None
    key = "VmHWM" if peak else "VmRSS"
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 2**20


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks, and what was freed: memory that stays in the process would hide what is asked for next."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif REFERENCES.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
        REFERENCES.write_text("5")


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    synchronize(device)
    started = time.perf_counter()
    outcome = run()
    synchronize(device)
    return time.perf_counter() - started, outcome


class Rates:
    """What the device does at best: operations per second by precision, and bytes per second."""

    def __init__(self, device: torch.device, precisions: set[torch.dtype]) -> None:
        self.device = device
        self.matrices = {dtype: torch.randn(4096, 2048, device=device).to(dtype) for dtype in precisions}
        self.source = torch.zeros(2**27, device=device)
        self.target = self.source.clone()  # the first touch of memory is slow and does not count
        self.flops: dict[torch.dtype, list[float]] = {dtype: [] for dtype in precisions}
        self.bandwidth: list[float] = []

    def measure(self) -> None:
        """Once more."""
        for dtype, matrix in self.matrices.items():
            seconds, _ = timed(lambda matrix=matrix: matrix @ matrix.T, self.device)
            self.flops[dtype].append(2 * matrix.shape[0] ** 2 * matrix.shape[1] / seconds)
        seconds, _ = timed(lambda: self.target.copy_(self.source), self.device)
        self.bandwidth.append(2 * self.source.nbytes / seconds)


def measure(name: str, part: Part, repeats: int, device: torch.device) -> list[Row]:
    """The rows of a part."""
    rates = Rates(device, {way.rate for way in part.ways})
    seconds: dict[str, list[float]] = {way.name: [] for way in part.ways}
    added: dict[str, list[float]] = {way.name: [] for way in part.ways}
    outcomes: dict[str, Any] = {}
    for _ in range(repeats):
        rates.measure()
        for way in part.ways:
            reset_peak(device)
            before = memory_gib(device, peak=False)
            elapsed, outcomes[way.name] = timed(way.run, device)
            peak = memory_gib(device, peak=True)
            seconds[way.name].append(elapsed)
            if before is not None and peak is not None:
                added[way.name].append(max(0.0, peak - before))
    ours = part.ways[0].name
    rows = []
    for way in part.ways:
        elapsed = statistics.median(seconds[way.name])
        by_operations = way.flops / statistics.median(rates.flops[way.rate])
        by_bytes = way.num_bytes / statistics.median(rates.bandwidth)
        rows.append(
            {
                "part": name,
                "way": way.name,
                "seconds": elapsed,
                "times ours": elapsed / statistics.median(seconds[ours]),
                "operations bound s": by_operations,
                "bytes bound s": by_bytes,
                "times bound": elapsed / max(by_operations, by_bytes),
                "added GiB": max(added[way.name], default=None),
                "against ours": "" if way.name == ours else part.agreement(outcomes[ours], outcomes[way.name]),
            }
        )
    return rows


def normal(rows: int, columns: int, device: torch.device, seed: int) -> Tensor:
    """Random features, made a few rows at a time on the CPU, so that all devices see the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(rows, columns, device=device)
    for some in x.split(10_000):
        some.copy_(torch.randn(some.shape, generator=generator))
    return x


# ---------------------------------------------------------------------------------------------------- k-NN


def knn(scale: float, device: torch.device) -> Part:
    """Neighbours by cosine similarity, then the vote of each pixel."""
    num_train, num_queries = round(200_000 * scale), round(50_000 * scale)
    train, queries = normal(num_train, WIDTH, device, 0), normal(num_queries, WIDTH, device, 1)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(FEW_CLASSES, (num_train, PIXELS), generator=generator, dtype=torch.uint8).to(device)

    def ours(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        _, found = nearest(queries, train, max(KS), "cosine", dtype=dtype)
        return [labels for _, labels in majority_votes(found, pixels, KS)]

    def straightforward() -> list[Tensor]:
        bank, votes = F.normalize(train, dim=1), []
        for some in F.normalize(queries, dim=1).split(1024):
            found = (some @ bank.T).topk(max(KS), dim=1).indices
            for few in found.split(64):
                near = pixels[few].long()
                votes.append([F.one_hot(near[:, :k], FEW_CLASSES).sum(1).argmax(-1) for k in KS])
        return [torch.cat(column) for column in zip(*votes, strict=True)]

    def product() -> None:
        for some in queries.split(1024):
            torch.mm(some, train.T)

    flops = 2 * num_train * num_queries * WIDTH
    num_bytes = train.nbytes + queries.nbytes + pixels.nbytes + len(KS) * num_queries * PIXELS
    ways = [
        Way("ours", ours, flops, num_bytes),
        Way("straightforward", straightforward, flops, num_bytes),
        Way("bare product", product, flops, num_bytes),
    ]
    if device.type == "cuda":  # virtual CPUs may advertise instructions for it that they refuse
        ways.append(Way("ours, bfloat16", lambda: ours(torch.bfloat16), flops, num_bytes, torch.bfloat16))
    return Part({"train": num_train, "queries": num_queries, "width": WIDTH}, ways, same_labels)


def same_labels(ours: list[Tensor], theirs: list[Tensor] | None) -> str:
    """Share of the pixels that get the same label, over all k."""
    if theirs is None:
        return ""
    equal = [(a == b).double().mean().item() for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.mean(equal):.4%} of labels equal"


# --------------------------------------------------------------------------------------- logistic regression


def logreg(scale: float, device: torch.device) -> Part:
    """A fixed number of L-BFGS iterations."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    num = round(200_000 * scale)
    x = normal(num, WIDTH, device, 0)
    labels = (x @ normal(WIDTH, FEW_CLASSES, device, 1) + 30 * normal(num, FEW_CLASSES, device, 2)).argmax(1)

    def ours() -> Tensor:
        weight, bias = fit_logistic(x, labels, FEW_CLASSES, 1.0, max_iter=ITERATIONS)
        return (x @ weight.T + bias).argmax(1).cpu()

    def numpy_arrays(features: Any) -> Callable[[], Tensor]:
        y = labels.cpu().numpy()

        def run() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = LogisticRegression(C=1.0, max_iter=ITERATIONS, tol=1e-12).fit(features, y)
            return torch.from_numpy(fitted.predict(features))

        return run

    # A look at all features for the logits and one for the gradient, in each iteration.
    flops, num_bytes = ITERATIONS * 4 * num * WIDTH * FEW_CLASSES, ITERATIONS * 2 * x.nbytes
    ways = [Way("ours", ours, flops, num_bytes)]
    for dtype in (torch.float32, torch.float64):
        features = x.cpu().to(dtype).numpy()
        size = num_bytes * dtype.itemsize / 4
        ways.append(Way(f"scikit-learn, numpy {features.dtype}", numpy_arrays(features), flops, size, dtype))
    return Part(
        {"images": num, "width": WIDTH, "classes": FEW_CLASSES, "iterations": ITERATIONS},
        ways,
        lambda a, b: f"{(a == b).double().mean().item():.2%} of predictions equal",
    )


# ------------------------------------------------------------------------------------------- classifiers


class Attentive(nn.Module):
    """One attentive classifier as it is usually written: keys and values of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(WIDTH))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.linear = nn.Linear(WIDTH, MANY_CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, k]."""
        heads = (-1, HEAD_DIM)
        keys, values = (x.unflatten(-1, heads).transpose(1, 2) for x in self.kv(tokens).chunk(2, dim=-1))
        query = self.query.unflatten(0, heads).unsqueeze(1).expand(len(tokens), -1, -1, -1)
        return self.linear(F.scaled_dot_product_attention(query, keys, values).flatten(1))


def copy_weights(stack: LinearClassifiers | AttentiveClassifiers, number: int, module: nn.Module) -> None:
    """Make `module` the same as one of the stacked classifiers."""
    with torch.no_grad():
        if isinstance(module, Attentive):
            assert isinstance(stack, AttentiveClassifiers)
            module.query.copy_(stack.query[number])
            module.kv.weight.copy_(torch.cat([stack.key_weight[number], stack.value_weight[number]]))
            nn.init.zeros_(module.kv.bias)
        linear = module.linear if isinstance(module, Attentive) else module
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(stack.weight[number])
        linear.bias.copy_(stack.bias[number])


def classifiers(
    stack: LinearClassifiers | AttentiveClassifiers, make: Callable[[], nn.Module], x: Tensor, settings: dict[str, Any]
) -> Part:
    """A step of all at once, or one after the other."""
    device = x.device
    labels = torch.randint(MANY_CLASSES, (len(x), 1), generator=torch.Generator().manual_seed(0)).to(device)
    alone = [make().to(device) for _ in range(CLASSIFIERS)]
    for number, module in enumerate(alone):
        copy_weights(stack, number, module)
    optimizer = StackedAdamW(
        stack, torch.tensor(LEARNING_RATES, device=device), torch.full((CLASSIFIERS,), WEIGHT_DECAY, device=device)
    )
    optimizers = [adamw(module, lr) for module, lr in zip(alone, LEARNING_RATES, strict=True)]
    num_steps = 0

    def at_once() -> Tensor:
        nonlocal num_steps
        losses = any_label_loss(stack(x), labels)
        stack.zero_grad()
        losses.sum().backward()
        num_steps += 1
        optimizer.step(num_steps, 1.0)
        return losses.detach()

    def loop() -> Tensor:
        losses = []
        for module, its in zip(alone, optimizers, strict=True):
            loss = F.cross_entropy(module(x), labels.squeeze(1))
            its.zero_grad()
            loss.backward()
            its.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    # Parameters: read by the forward and the backward pass; gradients written; AdamW reads four tensors, writes three.
    num_bytes = 10 * sum(p.nbytes for p in stack.parameters()) + 2 * x.nbytes
    # Both are counted and warmed up by one step.
    ways = [Way("ours", at_once, count_flops(at_once), num_bytes), Way("loop", loop, count_flops(loop), num_bytes)]
    return Part(
        {"classifiers": CLASSIFIERS, "width": WIDTH, "classes": MANY_CLASSES, **settings},
        ways,
        lambda a, b: f"losses within {(a - b).abs().max().item():.1e}",
    )


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """The optimizer of one classifier; biases do not decay."""
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    others = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def count_flops(run: Callable[[], Any]) -> float:
    """Operations of the matrix products in `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def linear(scale: float, device: torch.device) -> Part:
    """Classifiers of one vector per image."""
    num = max(1, round(128 * scale))
    stack = LinearClassifiers(CLASSIFIERS, WIDTH, MANY_CLASSES).to(device)
    x = normal(num, WIDTH, device, 0)
    return classifiers(stack, lambda: nn.Linear(WIDTH, MANY_CLASSES), x, {"images": num})


def attentive(scale: float, device: torch.device) -> Part:
    """Classifiers of one vector per token."""
    num = max(1, round(128 * scale))
    stack = AttentiveClassifiers(CLASSIFIERS, WIDTH, MANY_CLASSES).to(device)
    x = normal(num * TOKENS, WIDTH, device, 0).unflatten(0, (num, TOKENS))
    return classifiers(stack, Attentive, x, {"images": num, "tokens": TOKENS})


# ----------------------------------------------------------------------------------------------------- PCA


def pca(scale: float, device: torch.device) -> Part:
    """Principal components of patches whose variances fall off, first fast and then slowly."""
    num = max(2 * TOKENS, round(1_000_000 * scale) // TOKENS * TOKENS)
    x = normal(num, WIDTH, device, 0)
    x.mul_((1 + 9 * 0.8 ** torch.arange(WIDTH)).to(device)).add_(3)

    def ours() -> Tensor:
        moments = Moments(WIDTH)
        for images in x.unflatten(0, (-1, TOKENS)).split(128):
            moments.add(images)
        moments.add_other_ranks()
        return moments.principal_components(COMPONENTS)[1]

    def svd() -> Tensor:
        return torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)[2][:COMPONENTS].T

    def randomised() -> Tensor:
        return torch.pca_lowrank(x, q=2 * COMPONENTS)[2][:, :COMPONENTS]

    covariance = 2 * num * WIDTH**2
    # pca_lowrank: five products with q columns.
    ways = [
        Way("ours", ours, covariance, x.nbytes, torch.float64),
        Way("pca_lowrank", randomised, 5 * 2 * num * WIDTH * 2 * COMPONENTS, 5 * x.nbytes),
    ]
    if 5 * x.nbytes / 2**30 < available_gib(device):
        ways.append(Way("linalg.svd", svd, 2 * covariance, x.nbytes))
    else:
        sys.stderr.write("pca: linalg.svd is left out, there is too little memory for it\n")
    return Part({"patches": num, "width": WIDTH, "components": COMPONENTS}, ways, same_directions)


def available_gib(device: torch.device) -> float:
    """Free memory; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    info = Path("/proc/meminfo")
    lines: Iterator[str] = iter(info.read_text().splitlines() if info.is_file() else ())
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), float("inf"))


def same_directions(ours: Tensor, theirs: Tensor) -> str:
    """The worst absolute cosine between corresponding directions."""
    cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=0).abs()
    return f"|cosine| >= {cosine.min().item():.6f}"


# ---------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[float, torch.device], Part]] = {
    "knn": knn,
    "logreg": logreg,
    "linear": linear,
    "attentive": attentive,
    "pca": pca,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="which parts; all of them by default")
    parser.add_argument(
        "--scale", type=positive_number, default=0.08, help="of the numbers of patches, images and queries"
    )
    parser.add_argument("--repeats", type=whole_number, default=3)
    parser.add_argument("--device", default="cpu")
    add_arguments(parser)
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - PARTS.keys())
    if unknown:
        parser.error(f"parts={' '.join(unknown)}: unknown; choose from {', '.join(PARTS)}")
    if args.scale <= 0 or args.repeats < 1:
        parser.error(f"--scale={args.scale} must be above 0 and --repeats={args.repeats} at least 1")
    device = torch.device(args.device)
    torch.manual_seed(0)
    for name in args.parts or PARTS:
        part = PARTS[name](args.scale, device)
        rows = measure(name, part, args.repeats, device)
        print_table(rows)
        settings = {**part.settings, "device": device.type, "repeats": args.repeats}
        record(args, f"evaluations, {name}", settings, rows, device)


if __name__ == "__main__":
    main()
