"""Semantic segmentation from frozen patch features: nearest neighbours and logistic regression.

    python eval_segmentation.py model_loader_kwargs.pretrained_weights=student_ema.pth output_dir=results/segmentation
        train_dataset_name="custom://Segmentation?root='/data/train'" test_dataset_name="custom://Segmentation?root='/data/val'"

Hyper-parameters are chosen by mIoU on validation images, then the classifier is fitted on all training images and
evaluated on the test images. Writes results_segmentation.json and pictures of predictions beside the truth.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from config import BETWEEN_0_AND_1, COUNT, NOT_NEGATIVE, one_of, within
from distributed import all_gather_rows, all_reduce_sum_, gather_objects, rank, world_size
from evaluation import (
    Evaluation,
    EvaluationConfig,
    Features,
    FrozenModel,
    ImageBatches,
    Results,
    extract,
    my_share,
    open_dataset,
    split_off,
)
from logreg import fit_logistic
from neighbors import DISTANCES, TRAIN_CHUNK, majority_votes, nearest
from sources import ImageDataset
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("segmentation")

NUM_LABELS = 256
STANDARDIZATIONS = ("StandardScaler", "center", "center_div", "RobustScaler", "pca", "pca_whiten", "none")
CLASSIFIERS = ("knn", "logreg")
ROWS = 65_536
"""Rows that are standardised at a time."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(EvaluationConfig):
    """Keys of this evaluation; the defaults are those of the published ADE20K numbers."""

    train_dataset_name: str = "custom://ADE20K?split='training'"
    """Data URL of images with label images."""
    test_dataset_name: str = "custom://ADE20K?split='validation'"
    val_dataset_name: str | None = None
    """For the hyper-parameters; null holds out a part of the training images."""
    val_proportion: float = field(default=0.1, metadata=BETWEEN_0_AND_1)
    """Fraction of the training images that is held out, a random choice by `seed`."""
    max_train_images: int | None = field(default=None, metadata=COUNT)
    """Use so many training images, evenly spaced; null for all."""
    classifiers: list[str] = field(
        default_factory=lambda: list(CLASSIFIERS), metadata=one_of(*CLASSIFIERS, not_empty=True)
    )
    standardization: str = field(default="StandardScaler", metadata=one_of(*STANDARDIZATIONS))
    """What is done to the features, as fitted on the training images: one of `STANDARDIZATIONS`."""
    resolution: int = field(default=224, metadata=COUNT)
    """Images are resized to squares of this many pixels (bicubic), label images too (nearest)."""
    ignore_labels: list[int] = field(default_factory=lambda: [0, 255], metadata=within(at_least=0, below=NUM_LABELS))
    """Labels of pixels that do not count."""
    knn_ks: list[int] = field(default_factory=lambda: [1, 3, 10, 30], metadata=within(at_least=1, not_empty=True))
    knn_distances: list[str] = field(
        default_factory=lambda: ["cosine", "L2"], metadata=one_of(*DISTANCES, not_empty=True)
    )
    knn_chunk: int = field(default=TRAIN_CHUNK, metadata=COUNT)
    """Training patches that are compared at a time."""
    knn_dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16"))
    """Precision of the comparison: float32 or bfloat16."""
    logreg_cs: list[float] = field(
        default_factory=lambda: np.logspace(-6, 5, 8).tolist(), metadata=within(above=0, not_empty=True)
    )
    logreg_max_iter: int = field(default=1000, metadata=COUNT)
    logreg_tol: float = field(default=1e-12, metadata=NOT_NEGATIVE)
    num_pictures: int = field(default=8, metadata=NOT_NEGATIVE)
    """Test images, evenly spaced, whose predictions are drawn; 0 for none."""
    dump_features: bool = False
    """Write the training features and labels to output_dir/dumps."""
    dump_predictions: bool = False
    """Write the predicted label images of all test images to output_dir/dumps."""
    dump_classifier: bool = False
    """Write the weights of the logistic regression to output_dir/dumps."""


# ------------------------------------------------------------------------------------------------------ labels


def prepare_pair(image: Image.Image, target: Any, resolution: int) -> tuple[Tensor, Tensor]:
    """Image and label image as squares of `resolution` pixels: uint8 [3, h, w] and [h, w].

    Raises: UserError if the label image is none, or of another size than the image.
    """
    if not isinstance(target, Image.Image):
        raise UserError(f"the label is {type(target).__name__}, not a label image; give a data set for segmentation")
    if target.size != image.size:
        raise UserError(
            f"the image has {image.width}x{image.height} pixels and its label image {target.width}x{target.height}; "
            "make them the same size"
        )
    size = (resolution, resolution)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    labels = np.asarray(target.resize(size, Image.Resampling.NEAREST))
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).contiguous(), torch.from_numpy(labels.copy())


def to_patches(labels: UInt8[Tensor, "b h w"], patch_size: int) -> UInt8[Tensor, "patches pixels"]:
    """The labels of each patch's pixels, patches in the order of flattened feature maps."""
    b, h, w = labels.shape
    grid = labels.view(b, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.transpose(2, 3).reshape(-1, patch_size**2)


def from_patches(
    pixels: UInt8[Tensor, "patches pixels"], height: int, width: int, patch_size: int
) -> UInt8[Tensor, "b h w"]:
    """The inverse of `to_patches`."""
    grid = pixels.view(-1, height // patch_size, width // patch_size, patch_size, patch_size)
    return grid.transpose(2, 3).reshape(-1, height, width)


def majority_label(pixels: UInt8[Tensor, "patches pixels"]) -> UInt8[Tensor, " patches"]:
    """The most frequent label of each patch; ties go to the smallest."""
    labels = []
    for some in pixels.split(ROWS):
        counts = torch.zeros(len(some), NUM_LABELS, dtype=torch.int32, device=pixels.device)
        counts.scatter_add_(1, some.long(), torch.ones_like(some, dtype=torch.int32))
        labels.append(counts.argmax(dim=1).to(torch.uint8))
    return torch.cat(labels)


def is_ignored(labels: UInt8[Tensor, "*shape"], ignore_labels: Sequence[int]) -> Tensor:
    """Where `labels` are among those that do not count."""
    table = torch.zeros(NUM_LABELS, dtype=torch.bool, device=labels.device)
    table[list(ignore_labels)] = True
    return table[labels.long()]


# ----------------------------------------------------------------------------------------------------- metrics


def confusion_matrix(
    truth: UInt8[Tensor, "*shape"], predicted: UInt8[Tensor, "*shape"], ignore_labels: Sequence[int]
) -> Int64[Tensor, "256 256"]:
    """Counts of [true label, predicted label] over the pixels whose true label is not ignored."""
    counted = ~is_ignored(truth, ignore_labels)
    pairs = truth[counted].long() * NUM_LABELS + predicted[counted].long()
    return torch.bincount(pairs, minlength=NUM_LABELS**2).view(NUM_LABELS, NUM_LABELS)


def segmentation_metrics(
    confusion: Int64[Tensor, "256 256"], ignore_labels: Sequence[int], class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores of a confusion matrix, as fractions.

    - `mIoU`: Jaccard index, averaged over the labels that occur in truth or prediction. An ignored label that is
      predicted where it is not true counts as a class with index 0; published CAPI numbers have that.
    - `mIoU_valid`: averaged over the labels that are not ignored and occur; the usual definition.
    - `acc`: share of pixels that are right; `mean_acc`: averaged over the true classes.
    """
    confusion = confusion.double().cpu()
    hits, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    union = true + predicted - hits
    iou = hits / union.clamp_min(1)
    occurs = union > 0
    valid = occurs.clone()
    valid[list(ignore_labels)] = False
    in_truth = true > 0
    accuracy = hits / true.clamp_min(1)

    def name(label: int) -> str:
        return class_names[label] if label < len(class_names) else str(label)

    return {
        "mIoU": float(iou[occurs].mean()),
        "mIoU_valid": float(iou[valid].mean()),
        "acc": float(hits.sum() / true.sum()),
        "mean_acc": float(accuracy[in_truth].mean()),
        "per_class": {
            name(label): {"iou": float(iou[label]), "acc": float(accuracy[label]), "pixels": int(true[label])}
            for label in torch.nonzero(valid).flatten().tolist()
        },
    }


# ---------------------------------------------------------------------------------------------- standardisation


class Standardizer:
    """An affine map of features, fitted on the training patches and applied in place, a few rows at a time."""

    def __init__(self, kind: str, features: Float[Tensor, "n d"]) -> None:
        self.kind = kind
        d = features.shape[1]
        self.shift, self.scale = torch.zeros(d), torch.ones(d)
        self.rotation: Tensor | None = None
        if kind == "none":
            return
        if kind == "RobustScaler":
            low, self.shift, high = _quartiles(features)
            self.scale = _nonzero(high - low)
            return
        mean = torch.stack([rows.double().sum(dim=0) for rows in features.split(ROWS)]).sum(dim=0) / len(features)
        self.shift = mean.float()
        if kind == "StandardScaler":
            self.scale = _nonzero(_variances(features, mean).sqrt()).float()
        elif kind == "center_div":
            # Of all numbers before centring, so that the spread of the means counts too, as in the published numbers.
            self.scale = torch.full((d,), float((_variances(features, mean).mean() + mean.var(correction=0)).sqrt()))
        elif kind in ("pca", "pca_whiten"):
            variances, axes = torch.linalg.eigh(_covariance(features, mean))
            self.rotation = axes.flip(1).float()
            if kind == "pca_whiten":
                self.scale = _nonzero(variances.flip(0).clamp_min(0).sqrt()).float()

    def apply_(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Change `features` in place."""
        shift, scale = self.shift.to(features.device), self.scale.to(features.device)
        for rows in features.split(ROWS):
            rows.sub_(shift)
            if self.rotation is not None:
                rows.copy_(rows @ self.rotation.to(rows.device))
            rows.div_(scale)
        return features


def _variances(features: Tensor, mean: Tensor) -> Tensor:
    squares = [(rows.double() - mean).square_().sum(dim=0) for rows in features.split(ROWS)]
    return torch.stack(squares).sum(dim=0) / len(features)


def _covariance(features: Tensor, mean: Tensor) -> Tensor:
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    return covariance / len(features)


def _quartiles(features: Tensor, columns: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    parts = [np.percentile(some.numpy(), (25, 50, 75), axis=0) for some in features.split(columns, dim=1)]
    low, middle, high = torch.from_numpy(np.concatenate(parts, axis=1)).float()
    return low, middle, high


def _nonzero(scale: Tensor) -> Tensor:
    # A constant feature stays 0 after centring, as in scikit-learn, rather than become NaN.
    return torch.where(scale > 10 * torch.finfo(torch.float32).eps, scale, torch.ones_like(scale))


# ------------------------------------------------------------------------------------------------------- fitting


class TrainingPatches:
    """Standardised features of the training patches and the labels of their pixels, the same on every rank.

    Rows: patches to fit on; then those of held-out images; of these, the ones whose majority label is ignored come last
    and are evaluated, but never fitted on. So each part is a view. Memory: the features, twice while they are read.
    """

    def __init__(self, cfg: SegmentationConfig, model: FrozenModel) -> None:
        train = open_dataset(cfg.train_dataset_name, "train_dataset_name")
        self.class_names: list[str] = getattr(train, "class_names", [])
        chosen = torch.arange(len(train))
        if cfg.max_train_images is not None and cfg.max_train_images < len(train):
            chosen = torch.linspace(0, len(train) - 1, cfg.max_train_images).round().long()
        if cfg.val_dataset_name is None:
            fit, held_out = split_off(len(chosen), cfg.val_proportion, cfg.seed)
            sources = [(train, chosen[fit]), (train, chosen[held_out])]
        else:
            val = open_dataset(cfg.val_dataset_name, "val_dataset_name")
            sources = [(train, chosen), (val, torch.arange(len(val)))]
        self.num_images = sum(len(indices) for _, indices in sources)
        titles = ("training images", "validation images")
        (fit_x, fit_y), (val_x, val_y) = (
            self._read(cfg, model, *source, title) for source, title in zip(sources, titles, strict=True)
        )
        fit_x, fit_y = (column[~is_ignored(majority_label(fit_y), cfg.ignore_labels)] for column in (fit_x, fit_y))
        dropped = is_ignored(majority_label(val_y), cfg.ignore_labels)
        order = dropped.int().argsort(stable=True)
        self.num_fit, self.num_refit = len(fit_x), len(fit_x) + int((~dropped).sum())
        self.features, self.pixels = torch.cat([fit_x, val_x[order]]), torch.cat([fit_y, val_y[order]])
        del fit_x, val_x
        self.labels = majority_label(self.pixels)
        self._check(cfg)
        self.standardizer = Standardizer(cfg.standardization, self.features[: self.num_refit])
        self.standardizer.apply_(self.features)
        if model.device.type == "cuda" and 2 * self.features.nbytes < torch.cuda.mem_get_info(model.device)[0]:
            self.features = self.features.to(model.device)

    @staticmethod
    def _read(
        cfg: SegmentationConfig, model: FrozenModel, dataset: ImageDataset, indices: Tensor, title: str
    ) -> tuple[Tensor, ...]:
        def compute(features: Features, labels: Tensor) -> tuple[Tensor, Tensor]:
            return features.feature_map.flatten(0, 2), to_patches(labels, model.patch_size)

        return extract(model, _batches(cfg, dataset, model, title, indices.tolist()), compute)

    def _check(self, cfg: SegmentationConfig) -> None:
        present = set(self.labels[: self.num_fit].unique().tolist()) - set(cfg.ignore_labels)
        if len(present) < 2:
            raise UserError(
                f"train_dataset_name={cfg.train_dataset_name}: patches have {len(present)} different labels "
                f"({sorted(present)}) beside ignore_labels={cfg.ignore_labels}; classification needs two: check the "
                "label images, and whether ignore_labels names a class that counts"
            )
        counted = self.pixels[self.num_fit :]
        seen = set(counted.unique().tolist()) - set(cfg.ignore_labels)
        key = (
            f"val_proportion={cfg.val_proportion}"
            if cfg.val_dataset_name is None
            else f"val_dataset_name={cfg.val_dataset_name}"
        )
        if not seen:
            raise UserError(f"{key}: no pixel of the validation images has a label that counts; give more images")
        if present - seen:
            missing = ", ".join(self.name(label) for label in sorted(present - seen))
            logger.warning("%s: not in the validation images, so without a say in the choices: %s", key, missing)
        most = max(cfg.knn_ks)
        if "knn" in cfg.classifiers and most > self.num_fit:
            raise UserError(f"knn_ks={cfg.knn_ks}: there are only {self.num_fit} training patches; choose fewer")

    def name(self, label: int) -> str:
        """Of a class."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def _batches(
    cfg: SegmentationConfig, dataset: ImageDataset, model: FrozenModel, title: str, indices: list[int] | None = None
) -> ImageBatches:
    return ImageBatches(
        dataset,
        functools.partial(prepare_pair, resolution=cfg.resolution),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=indices,
        pin=model.device.type == "cuda",
        title=title,
    )


Predict = Callable[[Float[Tensor, "q d"]], UInt8[Tensor, "q pixels"]]
"""From standardised features on the device to labels of the patches' pixels."""


def choose_knn(cfg: SegmentationConfig, data: TrainingPatches, device: torch.device) -> tuple[dict[str, Any], Predict]:
    """The best k and distance on the validation patches, which the ranks share, and the classifier with all patches."""
    dtype = getattr(torch, cfg.knn_dtype)
    num_val = len(data.features) - data.num_fit
    share = my_share(num_val)
    rows = slice(data.num_fit + share.start, data.num_fit + share.stop)
    queries, truth = data.features[rows].to(device), data.pixels[rows].to(device)
    scores: dict[str, float] = {}
    fit = data.features[: data.num_fit]
    for distance in cfg.knn_distances:
        _, found = nearest(queries, fit, max(cfg.knn_ks), distance, train_chunk=cfg.knn_chunk, dtype=dtype)
        for k, predicted in majority_votes(found, data.pixels[: data.num_fit], cfg.knn_ks):
            confusion = all_reduce_sum_(confusion_matrix(truth, predicted, cfg.ignore_labels))
            scores[f"{distance}, k={k}"] = segmentation_metrics(confusion, cfg.ignore_labels)["mIoU"]
            logger.info("k-NN, %s, k=%d: %.4f validation mIoU", distance, k, scores[f"{distance}, k={k}"])
    best = max(scores, key=lambda name: scores[name])
    distance, k = best.split(", k=")
    features, pixels = data.features[: data.num_refit], data.pixels[: data.num_refit]

    def predict(some: Tensor) -> Tensor:
        _, found = nearest(some, features, int(k), distance, train_chunk=cfg.knn_chunk, dtype=dtype)
        ((_, predicted),) = majority_votes(found, pixels, [int(k)])
        return predicted

    return {"k": int(k), "distance": distance, "val_mIoU": scores[best], "search": scores}, predict


def choose_logreg(
    cfg: SegmentationConfig, data: TrainingPatches, device: torch.device
) -> tuple[dict[str, Any], Predict, dict[str, Tensor]]:
    """The best C on the validation patches, each rank trying some, and the classifier fitted on all patches."""
    num_classes = int(data.labels[: data.num_refit].max()) + 1
    pixels_per_patch = data.pixels.shape[1]

    def fit(num_rows: int, c: float) -> tuple[Tensor, Tensor]:
        # On a CPU the features stay where they are; on a GPU they are there already if they fit.
        features = data.features[:num_rows].to(device)
        labels = data.labels[:num_rows].long().to(device)
        return fit_logistic(features, labels, num_classes, c, max_iter=cfg.logreg_max_iter, tol=cfg.logreg_tol)

    def classify(some: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        labels = [torch.addmm(bias, rows.to(device), weight.T).argmax(dim=1) for rows in some.split(ROWS)]
        return torch.cat(labels).to(torch.uint8).unsqueeze(1).expand(-1, pixels_per_patch)

    mine = {}
    for c in cfg.logreg_cs[rank() :: world_size()]:
        predicted = classify(data.features[data.num_fit :], *fit(data.num_fit, c))
        truth = data.pixels[data.num_fit :].to(device)
        confusion = confusion_matrix(truth, predicted, cfg.ignore_labels)
        mine[c] = segmentation_metrics(confusion, cfg.ignore_labels)["mIoU"]
        logger.info("logistic regression, C=%.3g: %.4f validation mIoU", c, mine[c])
    found: dict[float, float] = {}
    for part in gather_objects(mine):
        found |= part
    scores = {c: found[c] for c in cfg.logreg_cs}
    best = max(scores, key=lambda c: scores[c])
    weight, bias = fit(data.num_refit, best)
    settings = {"C": best, "val_mIoU": scores[best], "search": {f"C={c:.3g}": score for c, score in scores.items()}}
    return settings, lambda some: classify(some, weight, bias), {"weight": weight.cpu(), "bias": bias.cpu()}


# --------------------------------------------------------------------------------------------------- evaluation


def evaluate(cfg: SegmentationConfig, model: FrozenModel, results: Results) -> None:
    """Fit and test every classifier that has no result yet."""
    wanted = [name for name in cfg.classifiers if name not in results]
    if not wanted:
        logger.info("nothing to do: %s has %s", results.path, ", ".join(cfg.classifiers))
        return
    if cfg.resolution % model.patch_size:
        raise UserError(f"resolution={cfg.resolution}: must be a multiple of the model's patch size {model.patch_size}")
    test = open_dataset(cfg.test_dataset_name, "test_dataset_name")
    started = time.monotonic()
    data = TrainingPatches(cfg, model)
    seconds = {"features": time.monotonic() - started}
    grid = cfg.resolution // model.patch_size
    results.note(
        representation="patch tokens",
        resolution=cfg.resolution,
        grid=[grid, grid],
        standardization=cfg.standardization,
        ignore_labels=cfg.ignore_labels,
        num_train_images=data.num_images,
        num_train_patches=data.num_refit,
        num_test_images=len(test),
        feature_dim=data.features.shape[1],
    )
    dumps = results.output_dir / "dumps"
    if cfg.dump_features:
        patches = {"features": data.features[: data.num_refit], "pixel_labels": data.pixels[: data.num_refit]}
        _dump(dumps / "train_patches.safetensors", patches)
    predictors: dict[str, Predict] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name in wanted:
        started = time.monotonic()
        if name == "knn":
            settings[name], predictors[name] = choose_knn(cfg, data, model.device)
        else:
            settings[name], predictors[name], weights = choose_logreg(cfg, data, model.device)
            if cfg.dump_classifier:
                shift, scale = data.standardizer.shift, data.standardizer.scale
                _dump(dumps / "logreg.safetensors", weights | {"shift": shift, "scale": scale})
        seconds[name] = time.monotonic() - started

    started = time.monotonic()
    outcome = run_test(cfg, model, test, data, predictors)
    seconds["test"] = time.monotonic() - started
    for name in wanted:
        scores = segmentation_metrics(outcome.confusions[name], cfg.ignore_labels, data.class_names)
        results.add(name, scores | {"settings": settings[name]})
        logger.info(
            "%s: mIoU %.4f, without ignored classes %.4f, pixel accuracy %.4f, mean accuracy %.4f",
            name,
            scores["mIoU"],
            scores["mIoU_valid"],
            scores["acc"],
            scores["mean_acc"],
        )
        if cfg.dump_predictions:
            _dump(dumps / f"predictions_{name}.safetensors", {"labels": outcome.predictions[name]})
    results.note(parts_s={part: round(value, 1) for part, value in seconds.items()})
    if outcome.pictures and rank() == 0:
        draw_predictions(outcome.pictures, data.class_names, cfg.ignore_labels).savefig(
            results.artifacts() / "segmentation.png"
        )


@dataclass
class Outcome:
    """What came of the test images, on every rank."""

    confusions: dict[str, Int64[Tensor, "256 256"]]
    predictions: dict[str, Tensor]
    """Label images [n, h, w] of each classifier, if they are dumped."""
    pictures: list[dict[str, np.ndarray]]
    """For each image that is drawn: image [h, w, 3], truth [h, w], and the prediction of each classifier."""


def run_test(
    cfg: SegmentationConfig,
    model: FrozenModel,
    test: ImageDataset,
    data: TrainingPatches,
    predictors: dict[str, Predict],
) -> Outcome:
    """One pass over the test images for all classifiers. Memory: one batch, and what is dumped."""
    batches = _batches(cfg, test, model, "test images")
    drawn = set(torch.linspace(0, len(test) - 1, min(cfg.num_pictures, len(test))).round().long().tolist())
    confusions = {name: torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64) for name in predictors}
    dumped: dict[str, list[Tensor]] = {name: [] for name in predictors}
    pictures: list[dict[str, np.ndarray]] = []
    position = batches.share.start
    for images, truth in batches:
        features = data.standardizer.apply_(model(images).feature_map.flatten(0, 2))
        predicted = {
            name: from_patches(predict(features).cpu(), cfg.resolution, cfg.resolution, model.patch_size)
            for name, predict in predictors.items()
        }
        for name, labels in predicted.items():
            confusions[name] += confusion_matrix(truth, labels, cfg.ignore_labels)
            if cfg.dump_predictions:
                dumped[name].append(labels)
        for i in range(len(images)):
            if position + i in drawn:
                shown = {"image": images[i].movedim(0, -1).numpy(), "truth": truth[i].numpy()}
                pictures.append(shown | {name: labels[i].numpy() for name, labels in predicted.items()})
        position += len(images)
    for confusion in confusions.values():
        all_reduce_sum_(confusion)
        if not int(confusion.sum()):
            raise UserError(f"test_dataset_name={cfg.test_dataset_name}: no pixel has a label beside ignore_labels")
    empty = torch.empty(0, cfg.resolution, cfg.resolution, dtype=torch.uint8)
    predictions = {
        name: all_gather_rows(torch.cat([empty, *parts])) for name, parts in dumped.items() if cfg.dump_predictions
    }
    gathered = [picture for part in gather_objects(pictures) for picture in part]
    return Outcome(confusions, predictions, gathered)


def _dump(path: Path, tensors: dict[str, Tensor]) -> None:
    if rank() == 0:
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
        logger.info("wrote %s", path)


def draw_predictions(
    pictures: Sequence[dict[str, np.ndarray]], class_names: Sequence[str], ignore_labels: Sequence[int]
) -> "Figure":
    """One row per image: image, truth and predictions, with the classes that occur. Ignored truth is left white."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = list(pictures[0])
    titles = {"image": "image", "truth": "truth", "knn": "k-NN", "logreg": "logistic regression"}
    shown = sorted({int(v) for picture in pictures for key in columns[1:] for v in np.unique(picture[key])})
    palette = np.asarray([*colormaps["tab10"].colors, *colormaps["tab20b"].colors, *colormaps["tab20c"].colors])  # pyright: ignore[reportAttributeAccessIssue]  # listed ones have colors
    colors = np.ones((NUM_LABELS, 3))
    for number, label in enumerate(label for label in shown if label not in ignore_labels):
        colors[label] = palette[number % len(palette)]

    figure = Figure(figsize=(1.8 * len(columns) + 2.2, 1.8 * len(pictures) + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for row, picture in enumerate(pictures):
        for column, key in enumerate(columns):
            ax = axes[row, column]
            ax.imshow(picture[key] if key == "image" else colors[picture[key]], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(titles[key], fontsize=10)
    handles = [
        Patch(
            facecolor=colors[label],
            edgecolor="#777777",
            label=(class_names[label] if label < len(class_names) else str(label))
            + (" (ignored)" if label in ignore_labels else ""),
        )
        for label in shown[:40]
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


EVALUATION = Evaluation("segmentation", SegmentationConfig, evaluate, parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see `evaluation.Evaluation.main`."""
    return EVALUATION.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
