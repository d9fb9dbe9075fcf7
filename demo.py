"""The demo: train a small CAPI model on the images in demo_data, draw what it learned, evaluate it. Minutes on a CPU.

    python demo.py [--output-dir runs/demo] [a.b=c ...]

Runs `train_capi.py configs/demo.yaml` as you would type it, with your overrides, draws curves.png and features.png into
the output folder, and runs `benchmark.py` with configs/evals/demo.yaml: the trained model beside random initialisation
and raw pixels, in evaluation/report.html. Started again after an interruption, it continues.
"""

from utils import command_line

with command_line(__doc__, __name__) as parser:
    parser.add_argument("--output-dir", default="runs/demo", help="where everything is written (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="as for train_capi.py")

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from checkpoint import Checkpoints, read_weights
from clustering import L2NormLinear, OnlineClustering
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from data import normalize
from masking import MaskPlan, draw_positions, make_masking_generator
from metrics import read_metrics
from model import EncoderDecoder, load_model
from report import ORANGE, draw_curves
from sources import make_dataset
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent
DEMO_CONFIG = "configs/demo.yaml"
DEMO_EVALS = "configs/evals/demo.yaml"
VALIDATION_IMAGES = ROOT / "demo_data" / "emoji_on_scenes" / "val" / "images"
NUM_IMAGES = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: that of the training if it failed, 2 for a mistake of the user."""
    given = parser.parse_intermixed_args(arguments)
    started = time.monotonic()
    try:
        sources = [DEMO_CONFIG, *given.overrides, f"train.output_dir={given.output_dir}"]
        exit_code = run("train_capi.py", *sources)
        if exit_code != 0:
            return exit_code
        files = draw(sources)
        evaluated = evaluate(sources)
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    sys.stdout.write(f"\nDone in {minutes} min {seconds} s. Written:\n")
    for path, what in files.items():
        sys.stdout.write(f"  {_relative(path):<44} {_size(path):>9}  {what}\n")
    if not evaluated.is_file():
        return 1
    sys.stdout.write(f"  {_relative(evaluated):<44} {_size(evaluated):>9}  scores and pictures: open it in a browser\n")
    return 0


def run(script: str, *arguments: str) -> int:
    """Run a script in a process of its own, in the folder of this file. Returns its exit code."""
    command = [sys.executable, script, *arguments]
    sys.stdout.write(f"\n$ python {shlex.join(command[1:])}\n")
    sys.stdout.flush()
    with subprocess.Popen(command, cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the script got Ctrl-C as well: training saves a checkpoint and ends


def evaluate(sources: Sequence[str]) -> Path:
    """Evaluate the trained model, its random initialisation, and raw pixels. Returns the report, if all went well."""
    cfg = _config(sources)
    output_dir = ROOT / cfg.train.output_dir
    checkpoint = Checkpoints(output_dir, keep=1).newest()
    assert checkpoint is not None  # it was drawn from
    shares = hidden_patches(cfg, checkpoint, validation_images(cfg.data.images_size, num_images=None))
    trained, random, copied, chance = (f"{shares[name]:.1%}" for name in ("trained", "random", "copied", "chance"))
    answers = (
        f"Which of {cfg.capi.num_clusters} clusters does a hidden patch of a held-out image belong to? The trained "
        f"student is right {trained} of the time, with random weights {random}, copying the nearest visible patch "
        f"{copied}, guessing {chance}."
    )
    sys.stdout.write(f"\n{answers}\n")
    outlook = (
        "A few minutes teach the student to predict, and hardly more: expect segmentation scores near those of random "
        "weights. EXPERIMENTS.md has longer runs."
    )
    evaluation = output_dir / "evaluation"
    pixels = evaluation / "pixels"
    common = [f"evals_config_path={DEMO_EVALS}", f"evals.segmentation.resolution={cfg.data.images_size}"]
    of_pixels = [
        f"output_dir={pixels}",
        "name=raw pixels",
        "model_path=baselines/pixels_loader.py",
        f"model_loader_kwargs.patch_size={cfg.model.patch_size}",
        "evals.pictures=null",
    ]
    of_model = [
        f"output_dir={evaluation}",
        f"name=CAPI, {cfg.optim.total_iters} steps",
        f"pretrained_weights={output_dir / 'student_ema.pth'}",
        f"evals.pictures.resolution={cfg.data.images_size}",
        f"compare=[{pixels / 'results.json'}]",
        f"run_dir={output_dir}",
        f"notes={json.dumps([answers, outlook])}",
        f"seed={cfg.train.seed}",
    ]
    report = evaluation / "report.html"
    if run("benchmark.py", *of_pixels, *common) or run("benchmark.py", *of_model, *common):
        report.unlink(missing_ok=True)
    return report


def draw(sources: Sequence[str]) -> dict[Path, str]:
    """Draw both pictures of a finished training.

    Returns: every file worth looking at, and what it is.
    Raises: UserError if the training has not finished.
    """
    cfg = _config(sources)
    output_dir = ROOT / cfg.train.output_dir
    weights, metrics_path = output_dir / "student_ema.pth", output_dir / "metrics.jsonl"
    records = read_metrics(metrics_path)
    num_steps = records[-1]["step"] if records else 0
    checkpoint = Checkpoints(output_dir, keep=1).newest()
    if num_steps < cfg.optim.total_iters or checkpoint is None:
        raise UserError(
            f"the training stopped after {num_steps} of {cfg.optim.total_iters} steps; the same command continues it"
        )

    curves, features = output_dir / "curves.png", output_dir / "features.png"
    draw_curves(records, cfg.capi.num_clusters).savefig(curves)
    images = validation_images(cfg.data.images_size)
    visible, predicted = draw_masks(cfg, len(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        untrained = EncoderDecoder(**cfg.model.kwargs()).eval()
    feature_maps = {
        "patch features (PCA),\nrandom weights": patch_features(untrained, images),
        f"patch features (PCA),\nafter {num_steps} steps": patch_features(
            load_model(pretrained_weights=weights), images
        ),
    }
    draw_features(images, visible, predicted, feature_maps).savefig(features)
    return {
        checkpoint: "newest checkpoint, to continue from",
        weights: "averaged weights, for model.load_model",
        metrics_path: "a line of numbers each few steps",
        curves: "how the training went",
        features: "what the student sees, and the features it learned",
    }


def hidden_patches(cfg: CapiConfig, checkpoint: Path, images: UInt8[Tensor, "b 3 h w"]) -> dict[str, float]:
    """How often the student names the cluster of a hidden patch: the question it was trained on, on other images.

    The right answer is the cluster to which the teacher, who sees the whole image, assigns the patch.

    Args:
        cfg: of the training.
        checkpoint: a checkpoint of the training.
        images: images that were not trained on.

    Returns: shares of right answers: `trained`; `random`, the same network before training; `copied`, giving the
        cluster of the nearest visible patch; `chance`.
    """
    averaged = read_weights(checkpoint, "student_ema")
    width, k = cfg.model.transformers_kwargs.embed_dim, cfg.capi.num_clusters
    teacher_head = OnlineClustering(width, k, **asdict(cfg.capi.clustering_kwargs))
    teacher_head.load_state_dict(read_weights(checkpoint, "clustering"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        students = {name: _student(cfg) for name in ("trained", "random")}
    students["trained"].load_state_dict(averaged)

    b, n = len(images), cfg.grid_size**2
    plan = MaskPlan(cfg.grid_size, cfg.grid_size, cfg.data.mask_ratio, 1.0)
    masking = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    generator = torch.Generator().manual_seed(cfg.train.seed)
    visible, hidden = map(torch.stack, zip(*(draw_positions(plan, masking, generator) for _ in range(b)), strict=True))
    first = torch.arange(b).unsqueeze(1) * n
    place = torch.cartesian_prod(torch.arange(cfg.grid_size), torch.arange(cfg.grid_size)).double()
    nearest = torch.cdist(place[hidden], place[visible]).argmin(dim=2)
    with torch.no_grad():
        x = normalize(images)
        trained: Any = students["trained"]["backbone"]
        features = trained.forward_pretrain(x)[0]
        clusters = teacher_head(features.transpose(0, 1))[0].argmax(dim=2).T  # [b, n]
        truth = clusters.gather(1, hidden)
        answers = {"copied": clusters.gather(1, visible.gather(1, nearest))}
        for name, student in students.items():
            backbone: Any = student["backbone"]
            _, predicted = backbone.forward_pretrain(
                x, (first + visible).flatten(), (first + hidden).flatten(), do_prediction=True
            )
            answers[name] = student["head"](predicted).argmax(dim=1).view_as(truth)
    shares = {name: float((answer == truth).double().mean()) for name, answer in answers.items()}
    return {name: shares[name] for name in ("trained", "random", "copied")} | {"chance": 1 / k}


def _student(cfg: CapiConfig) -> nn.ModuleDict:
    backbone = EncoderDecoder(**cfg.model.kwargs())
    head = L2NormLinear(backbone.pred_dim, cfg.capi.num_clusters)
    return nn.ModuleDict({"backbone": backbone, "head": head}).eval()


def _config(sources: Sequence[str]) -> CapiConfig:
    paths = [source if "=" in source else str(ROOT / source) for source in sources]
    return load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, paths)


def validation_images(
    size: int, folder: Path = VALIDATION_IMAGES, num_images: int | None = NUM_IMAGES
) -> UInt8[Tensor, "b 3 h w"]:
    """A few images of the folder, evenly spread, or all of them (None), as squares of `size` pixels."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    dataset = make_dataset(str(folder))
    chosen = torch.linspace(0, len(dataset) - 1, min(num_images or len(dataset), len(dataset))).long().tolist()
    pictures = [ImageOps.fit(dataset[i].image(), (size, size), Image.Resampling.BICUBIC) for i in chosen]
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


def draw_masks(cfg: CapiConfig, num_images: int) -> tuple[Int[Tensor, "b v"], Int[Tensor, "b m"]]:
    """Visible and predict positions as the training draws them, for `num_images` images."""
    plan = MaskPlan(cfg.grid_size, cfg.grid_size, cfg.data.mask_ratio, cfg.data.prediction_subsampling)
    masking = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    generator = torch.Generator().manual_seed(cfg.train.seed)
    visible, predicted = zip(*(draw_positions(plan, masking, generator) for _ in range(num_images)), strict=True)
    return torch.stack(visible), torch.stack(predicted)


@torch.no_grad()
def patch_features(model: EncoderDecoder, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b hp wp d"]:
    """The encoder's output at every patch."""
    return model(normalize(images)).feature_map


def pca_colors(feature_map: Float[Tensor, "b hp wp d"]) -> Float[Tensor, "b hp wp 3"]:
    """First three principal components over all patches of all images, as colours in [0, 1].

    A component's sign is chosen such that its longer tail is bright; its range is that of 96 % of the patches.
    """
    x = feature_map.flatten(0, 2).double()
    x = x - x.mean(dim=0)
    components = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    components = components * torch.where((components**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98], dtype=x.dtype), dim=0)
    scaled = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scaled.float().unflatten(0, feature_map.shape[:3])


def draw_features(
    images: UInt8[Tensor, "b 3 h w"],
    visible: Int[Tensor, "b v"],
    predicted: Int[Tensor, "b m"],
    feature_maps: Mapping[str, Float[Tensor, "b hp wp d"]],
) -> "Figure":
    """One row per image: the image, its mask, the student's view, and each feature map under its title as colours."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    b, _, height, width = images.shape
    hp, wp = next(iter(feature_maps.values())).shape[1:3]
    zoom = 4  # so that the edges of patches stay sharp on the enlarged image
    shown = F.interpolate(images.float(), scale_factor=zoom, mode="bicubic", align_corners=False).clamp(0, 255) / 255
    shown = shown.movedim(1, -1)
    is_visible = torch.zeros(b, hp * wp, dtype=torch.bool).scatter_(1, visible, value=True).view(b, hp, wp)
    patch_h, patch_w = zoom * height // hp, zoom * width // wp
    seen = is_visible.repeat_interleave(patch_h, 1).repeat_interleave(patch_w, 2).unsqueeze(-1)
    columns: dict[str, Tensor] = {
        "image": shown,
        "mask: hidden is dark,\npredicted is framed": torch.where(seen, shown, 0.3 * shown),
        "what the student sees": torch.where(seen, shown, torch.full_like(shown, 0.93)),
        **{title: pca_colors(feature_map) for title, feature_map in feature_maps.items()},
    }

    figure = Figure(figsize=(1.75 * len(columns) + 0.2, 1.75 * b + 0.9), dpi=130, layout="constrained")
    figure.suptitle("Validation images, which were not trained on", fontsize=12)
    axes = figure.subplots(b, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, ax in enumerate(axes[:, column]):
            is_patches = pictures.shape[1] == hp and pictures.shape[2] == wp
            ax.imshow(pictures[row].numpy(), interpolation="nearest" if is_patches else "antialiased")
            ax.set_axis_off()
    for row, positions in enumerate(predicted.tolist()):
        for position in positions:
            corner = ((position % wp) * patch_w, (position // wp) * patch_h)
            axes[row, 1].add_patch(Rectangle(corner, patch_w, patch_h, fill=False, edgecolor=ORANGE, linewidth=1.0))
    return figure


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _size(path: Path) -> str:
    num_bytes = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
