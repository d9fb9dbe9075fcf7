"""The demo: draw images, train a small CAPI model on them, and see what its features are good for. Minutes on a CPU.

    python demo.py [--output-dir runs/demo] [--data data/flower_beds] [--data-seed 0] [a.b=c ...]

Runs, as you would type them, `demo_data/flower_beds.py`, which draws the images; `train_capi.py configs/demo.yaml`,
with your overrides; `benchmark.py` with configs/evals/demo.yaml for raw pixels, for a histogram of colours, and for
the trained model beside random initialisation; and `eval_visualizations.py` for what the student predicts. Then it
draws what came out and ends with a verdict. Started again after an interruption, it continues.
"""

from utils import command_line

with command_line(__doc__, __name__) as parser:
    parser.add_argument("--output-dir", default="runs/demo", help="where everything is written (default: %(default)s)")
    parser.add_argument("--data", default="data/flower_beds", help="where images are drawn (default: %(default)s)")
    parser.add_argument("--data-seed", type=int, default=0, help="of the images (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=2000, help="to train on (default: %(default)s)")
    parser.add_argument("--val-images", type=int, default=200, help="to evaluate on (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="as for train_capi.py, whose --help-all shows them"
    )

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from checkpoint import Checkpoints
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from evaluation import EvaluationConfig, FrozenModel, load_model_file
from masking import draw_positions, make_masking_generator
from metrics import read_metrics
from pictures import Moments, project, rgb_colors, show, standardize
from reading.sources import ImageDataset, SegmentationDataset, make_dataset
from report import GREEN, VERMILLION, columns, draw_curves, percent, write_report
from train_capi import CapiConfig, mask_plan, panels
from utils import UserError, ending_in_words, start_python

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent
DRAWING, CONFIG, EVALS = "demo_data/flower_beds.py", "configs/demo.yaml", "configs/evals/demo.yaml"
DATA: str = parser.get_default("data")
"""What the configuration files read."""
FEW_LABELS = "knn_10_images"
"""What is shown of the evaluation `segmentation`: nearest patches of ten labelled images."""
TITLES = ("trained", "random weights", "raw pixels", "colour histogram")
"""What the models are called, in the order in which `report.columns` has them."""
NUM_QUERIES, NUM_NEIGHBOURS = 5, 4

BY_CONSTRUCTION = (
    "The class is a mix of three colours by construction, so this shows the mechanism: the model learned from hidden "
    "patches what surrounds a patch. It says nothing about features of photographs; for those train a preset of "
    "configs/ on images of your own, or configs/imagenette.yaml."
)
CHOICES = "The scores are means over three choices of the ten images, the pictures are of the first."
NEIGHBOURS_CAPTION = (
    "Held-out images, and the others whose mean patch features are most alike (cosine). Crossed out: another mix. The "
    "shares are those of all held-out images, not of these alone."
)
PREDICTIONS_CAPTION = (
    "What the student predicts where it sees nothing: each hidden patch is shown as that patch of another held-out "
    "image of which the teacher is most certain that it belongs to the predicted prototype. First the most likely "
    "prototype of each patch, then draws from the predicted distributions, each patch by itself, then the most likely "
    "prototype by a student with random weights."
)


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: that of the part that failed, 2 for a mistake of the user."""
    given = parser.parse_intermixed_args(arguments)
    with contextlib.chdir(ROOT):  # paths are seen from there, by this script and by those that it starts
        return demo(given)


def demo(given: argparse.Namespace) -> int:
    """All parts, one after the other, as far as they go well. Returns the exit code."""
    sources = [CONFIG, *given.overrides, *elsewhere(CONFIG, given.data), f"train.output_dir={given.output_dir}"]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources)
    size = [f"--seed={given.data_seed}", f"--train={given.train_images}", f"--val={given.val_images}"]
    parts = {
        "drawing the images": [[DRAWING, given.data, *size]],
        "training": [["train_capi.py", *sources]],
        "evaluation": evaluations(cfg, given.data),
    }
    seconds = {}
    for part, commands in parts.items():
        started = time.monotonic()
        for command in commands:
            exit_code = run(*command)
            if exit_code != 0:
                return exit_code
        if part == "training":
            check_finished(cfg)
        seconds[part] = time.monotonic() - started

    started = time.monotonic()
    content = json.loads(Path(cfg.train.output_dir, "evaluation", "results.json").read_text())
    files = draw(cfg, content)
    seconds["pictures"] = time.monotonic() - started
    sys.stdout.write(f"\n{verdict(content)}\n{BY_CONSTRUCTION}\n\n")
    for part, taken in [*seconds.items(), ("in all", sum(seconds.values()))]:
        sys.stdout.write(f"  {part:<20} {taken:5.0f} s\n")
    sys.stdout.write("\nWritten:\n")
    for path, what in files.items():
        sys.stdout.write(f"  {path!s:<44} {_size(path):>9}  {what}\n")
    return 0


def run(script: str, *arguments: str) -> int:
    """Run a script in a process of its own. Returns its exit code."""
    command = [script, *arguments]
    sys.stdout.write(f"\n$ python {shlex.join(command)}\n")
    sys.stdout.flush()
    with start_python(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the script got Ctrl-C as well: training saves a checkpoint and ends


def elsewhere(config: str, data: str) -> list[str]:
    """What to override in a configuration file that reads `DATA` so that it reads the folder `data`."""

    def overrides(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from overrides(value, f"{prefix}{key}.")
            elif DATA in str(value):
                yield f"{prefix}{key}={value.replace(DATA, data)}"

    return [] if data == DATA else list(overrides(yaml.safe_load(Path(config).read_text())))


def evaluations(cfg: CapiConfig, data: str) -> list[list[str]]:
    """Commands that evaluate raw pixels, colour histograms, and the trained model beside its random initialisation, and
    that draw what its student predicts."""
    run_dir, folder = cfg.train.output_dir, f"{cfg.train.output_dir}/evaluation"
    baselines = {"raw pixels": "pixels", "colour histogram": "histogram"}
    keys = [
        [
            f"output_dir={folder}/{baseline}",
            f"name={title}",
            f"model_path=baselines/{baseline}_loader.py",
            f"model_loader_kwargs.patch_size={cfg.model.patch_size}",
        ]
        for title, baseline in baselines.items()
    ]
    keys += [
        [
            f"output_dir={folder}",
            f"name=CAPI, {cfg.optim.total_iters} steps",
            f"pretrained_weights={run_dir}/student_ema.pth",
            f"compare=[{','.join(f'{folder}/{baseline}/results.json' for baseline in baselines.values())}]",
            f"run_dir={run_dir}",
        ]
    ]
    # Of the random weights, and of the choices of labelled images, which are thus the same for all.
    shared = [f"seed={cfg.train.seed}", f"evals_config_path={EVALS}"]
    shared += [f"evals.{override}" for override in elsewhere(EVALS, data)]
    predictions = [
        "pictures=[predictions]",
        f"output_dir={run_dir}/predictions",
        f"model_loader_kwargs.pretrained_weights={run_dir}/student_ema.pth",
        f"dataset_name=custom://Images?root='{data}/val/images'",
        f"resolution={cfg.data.images_size}",
        f"seed={cfg.train.seed}",
    ]
    return [*(["benchmark.py", *own, *shared] for own in keys), ["eval_visualizations.py", *predictions]]


def check_finished(cfg: CapiConfig) -> None:
    """Raise UserError unless the training did all its steps."""
    records = read_metrics(Path(cfg.train.output_dir, "metrics.jsonl"))
    num_steps = records[-1]["step"] if records else 0
    if num_steps < cfg.optim.total_iters:
        raise UserError(
            f"the training stopped after {num_steps} of {cfg.optim.total_iters} steps; the same command continues it"
        )


# ------------------------------------------------------------------------------------------------------ verdict


def few_label_score(evaluations: Mapping[str, Any]) -> float:
    """Mean IoU of the held-out images from ten labelled ones, of a model."""
    return evaluations["segmentation"]["results"][FEW_LABELS]["mIoU"]


def verdict(content: Mapping[str, Any]) -> str:
    """What came of it in a sentence, from the results.json of the trained model."""
    models = columns(content).values()
    trained, random, pixels, histogram = (f"{percent(few_label_score(model))} %" for model in models)
    num_images = content["evaluations"]["segmentation"]["about"]["num_test_images"]
    return (
        f"With ten labelled images, the patches of {num_images} held-out images are told apart with a mean IoU of "
        f"{trained} by the trained model, {random} by random weights, {pixels} by raw pixels, and {histogram} by a "
        "hand-made histogram of colours."
    )


# ----------------------------------------------------------------------------------------------------- pictures


def draw(cfg: CapiConfig, content: Mapping[str, Any]) -> dict[Path, str]:
    """Draw the pictures, and write the report again with those of the evaluation at its head.

    Args:
        cfg: of the training.
        content: results.json of its evaluation.

    Returns: every file worth looking at, and what it is.
    """
    run_dir = Path(cfg.train.output_dir)
    report, curves = run_dir / "evaluation" / "report.html", run_dir / "curves.png"
    ten_labels, neighbours, predictions = (
        run_dir / f"{name}.png" for name in ("ten_labels", "neighbours", "predictions")
    )
    draw_curves(read_metrics(run_dir / "metrics.jsonl"), panels(cfg.capi.num_clusters, cfg.capi.targets)).savefig(
        curves
    )
    evaluated: dict[str, Any] = dict(zip(TITLES, columns(content).values(), strict=True))
    models = {title: load(entries["segmentation"]["config"]) for title, entries in evaluated.items()}
    test = make_dataset(content["evaluations"]["segmentation"]["config"]["test_dataset_name"])
    assert isinstance(test, ImageDataset)
    images, masks = read_pairs(test)
    _save(draw_ten_labels(cfg, evaluated, models, images, masks), ten_labels)
    _save(draw_neighbours(models, images, masks), neighbours)
    _save_small(run_dir / "predictions" / "artifacts" / "predictions.png", predictions)
    lead = [
        (ten_labels, f"{verdict(content)} {CHOICES} {BY_CONSTRUCTION}"),
        (neighbours, NEIGHBOURS_CAPTION),
        (predictions, PREDICTIONS_CAPTION),
    ]
    write_report(report, content, run_dir, lead)
    checkpoint = Checkpoints(run_dir, keep=1).newest()
    assert checkpoint is not None  # the training has finished
    return {
        report: "scores and pictures: open it in a browser",
        ten_labels: "what the features make of ten labelled images",
        neighbours: "the images most alike to a few others",
        predictions: "what the student predicts at hidden patches",
        curves: "how the training went",
        run_dir / "metrics.jsonl": "a line of numbers each few steps",
        run_dir / "student_ema.pth": "averaged weights, for model.load_model",
        checkpoint: "newest checkpoint, to continue from",
    }


def load(config: Mapping[str, Any]) -> FrozenModel:
    """The model of an evaluation with this configuration, with the same random weights if it has none."""
    torch.manual_seed(config["seed"])
    model = load_model_file(config["model_path"], config["model_loader_kwargs"])
    return FrozenModel(model, EvaluationConfig(output_dir=""), torch.device("cpu"), config["model_path"])


def read_pairs(
    dataset: ImageDataset, indices: Sequence[int] | None = None
) -> tuple[UInt8[Tensor, "n 3 h w"], UInt8[Tensor, "n h w"]]:
    """Images of one size, all of the data set or those at `indices`, and the labels of their pixels."""
    samples = [dataset[i] for i in (range(len(dataset)) if indices is None else indices)]
    images = [torch.from_numpy(np.array(sample.image())).movedim(2, 0) for sample in samples]
    return torch.stack(images), torch.stack([torch.from_numpy(np.array(sample.target())) for sample in samples])


def mixes(labels: UInt8[Tensor, "n h w"]) -> list[int]:
    """The mix of each image: its only label beside 0, the lawn."""
    return labels.amax(dim=(1, 2)).tolist()


def first_of_each(labels: Sequence[int]) -> list[int]:
    """Where each label occurs first, in the order of the labels."""
    return [labels.index(label) for label in sorted(set(labels))]


def features(model: FrozenModel, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b hp wp d"]:
    """The model's feature maps, computed a hundred images at a time."""
    return torch.cat([model(batch).feature_map for batch in images.split(100)])


def draw_visible(cfg: CapiConfig, num_images: int) -> Bool[Tensor, "b hp wp"]:
    """Which patches the student sees, as the training draws it."""
    plan = mask_plan(cfg)
    masking = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    generator = torch.Generator().manual_seed(cfg.train.seed)
    visible = torch.zeros(num_images, cfg.grid_size**2, dtype=torch.bool)
    for row in visible:
        row[draw_positions(plan, masking, generator)[0]] = True
    return visible.view(num_images, cfg.grid_size, cfg.grid_size)


def pca_colors(feature_map: Float[Tensor, "b hp wp d"]) -> UInt8[Tensor, "b hp wp 3"]:
    """First three principal components over all patches of all images, as colours."""
    x = feature_map.flatten(1, 2)
    moments = Moments(x.shape[-1])
    moments.add(x)
    mean, directions, _ = moments.principal_components(3)
    scores = project(x, mean, directions).flatten(0, 1)
    return rgb_colors(standardize(scores, whiten=True)).unflatten(0, feature_map.shape[:3])


def class_colors(num_classes: int) -> Float[Tensor, "classes 3"]:
    """Lawn green for label 0, and for the others colours that are told apart."""
    from matplotlib import colormaps

    others = [color for i, color in enumerate(colormaps["tab20"].colors) if i not in (4, 5)]  # pyright: ignore[reportAttributeAccessIssue]  # listed ones have colors
    return torch.tensor([(0.25, 0.5, 0.2), *others[: num_classes - 1]])


def draw_ten_labels(
    cfg: CapiConfig,
    evaluated: Mapping[str, Mapping[str, Any]],
    models: Mapping[str, FrozenModel],
    images: UInt8[Tensor, "n 3 h w"],
    masks: UInt8[Tensor, "n h w"],
) -> "Figure":
    """A column for each mix: a labelled image, a held-out one, its truth and predictions, and its components.

    Args:
        cfg: of the training.
        evaluated: title of a model -> its evaluations, the first the trained one.
        models: title of a model -> the model.
        images: held-out ones.
        masks: the labels of their pixels.
    """
    own = evaluated[TITLES[0]]["segmentation"]
    train = make_dataset(own["config"]["train_dataset_name"])
    assert isinstance(train, SegmentationDataset)
    # In the order of the folders of the mixes, as the held-out images.
    labelled, labelled_masks = read_pairs(train, own["results"][FEW_LABELS]["settings"]["images"][0])
    shown = first_of_each(mixes(masks))
    images, masks = images[shown], masks[shown]
    colors = class_colors(len(train.class_names))
    seen = F.interpolate(draw_visible(cfg, len(images))[:, None].float(), images.shape[2:])
    rows = {
        "ten labelled\nimages": labelled.movedim(1, 3) / 255,
        "held-out\nimages": images.movedim(1, 3) / 255,
        "seen by the\nstudent": (images * seen + 235 * (1 - seen)).movedim(1, 3) / 255,
        "truth": colors[masks.long()],
    }
    for title, entries in evaluated.items():
        dumped = load_file(
            Path(entries["segmentation"]["config"]["output_dir"], "dumps", f"predictions_{FEW_LABELS}.safetensors")
        )
        rows[f"{title}\nmIoU {percent(few_label_score(entries))}"] = colors[dumped["labels"][shown].long()]
    for title, when in (("random weights", "before"), ("trained", "after")):
        rows[f"PCA of patches\n{when} training"] = pca_colors(features(models[title], images))
    heads = [(train.class_names[mix].replace("-", "\n"), colors[mix]) for mix in mixes(labelled_masks)]
    figure = draw_rows(rows, heads)
    figure.suptitle(
        "Held-out images, their patches named by the most alike patches of ten labelled images", fontsize=11
    )
    figure.supxlabel(
        "A mix of colours makes the class, by construction: what colour alone gives is the score of the histogram.\n"
        "This shows the mechanism, not features for photographs.",
        fontsize=9,
    )
    return figure


def draw_rows(
    rows: Mapping[str, Shaped[Tensor, "n h w 3"]], heads: Sequence[tuple[str, Float[Tensor, "3"]]]
) -> "Figure":
    """A row of n pictures for each title, and above the columns their n heads, each in its colour."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    close = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(1.02 * len(heads) + 1.1, 1.02 * len(rows) + 1.3), dpi=100, layout=close)
    axes = figure.subplots(len(rows), len(heads), squeeze=False)
    for places, (title, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(places, pictures, strict=True):
            show(ax, picture.numpy())
        places[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    for ax, (head, color) in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=8, color=color.numpy(), weight="bold")
    return figure


def draw_neighbours(
    models: Mapping[str, FrozenModel], images: UInt8[Tensor, "n 3 h w"], masks: UInt8[Tensor, "n h w"]
) -> "Figure":
    """A row for each of a few images: itself, and by each model the others that are most alike.

    Args:
        models: title -> model.
        images: held-out ones.
        masks: the labels of their pixels.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    mix = torch.tensor(mixes(masks))
    queries = first_of_each(mix.tolist())[: 2 * NUM_QUERIES : 2]
    pictures = images.movedim(1, 3).numpy()
    widths = [1.0, *len(models) * [0.2, *NUM_NEIGHBOURS * [1.0]]]
    figure = Figure(figsize=(0.72 * sum(widths), 0.72 * len(queries) + 0.5), dpi=100)
    # Of equal size to the pixel, which a layout that makes room for titles would not keep.
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.015, top=1 - 0.4 / figure.get_figheight(), wspace=0.06)
    axes = figure.subplots(len(queries), len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].set_title("held out", fontsize=9, loc="left")
    for row, query in enumerate(queries):
        axes[row, 0].imshow(pictures[query])
    for block, (title, model) in enumerate(models.items()):
        means = F.normalize(features(model, images).mean(dim=(1, 2)), dim=1)
        similarity = (means @ means.T).fill_diagonal_(-torch.inf)
        found = similarity.topk(min(NUM_NEIGHBOURS, len(images) - 1)).indices
        is_same = mix[found] == mix[:, None]
        first = 2 + block * (NUM_NEIGHBOURS + 1)
        share = percent(float(is_same.double().mean()))
        axes[0, first].set_title(f"{title}: {share} % of the same mix", fontsize=9, loc="left")
        for row, query in enumerate(queries):
            places = axes[row, first : first + found.shape[1]]
            for ax, other, right in zip(places, found[query], is_same[query], strict=True):
                ax.imshow(pictures[other])
                color = GREEN if right else VERMILLION
                ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, linewidth=4, color=color))
                if not right:
                    ax.plot([0, 1], [0, 1], transform=ax.transAxes, color=color, linewidth=1.5)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    _save_small(buffer, path)


def _save_small(picture: Path | io.BytesIO, path: Path) -> None:
    """Save a picture as a PNG with 256 colours, which is a third of the size."""
    with Image.open(picture) as image:
        # Without k-means, colours that are rare turn into others: red flowers would be orange.
        image.convert("RGB").quantize(256, kmeans=3).save(path, optimize=True)


def _size(path: Path) -> str:
    num_bytes = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
