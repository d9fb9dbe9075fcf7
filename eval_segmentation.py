"""Semantic segmentation from frozen patch features: nearest neighbours and logistic regression.

    python eval_segmentation.py model_loader_kwargs.pretrained_weights=student_ema.pth \\
        train_dataset_name="custom://Segmentation?root='/data/train'" \\
        test_dataset_name="custom://Segmentation?root='/data/val'" output_dir=results/segmentation

Hyper-parameters are chosen by mIoU on validation images, then the classifier is fitted on all training images and
evaluated on the test images. Writes results_segmentation.json and pictures of predictions beside the truth.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import functools
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from config import BETWEEN_0_AND_1, COUNT, NOT_NEGATIVE, one_of, require, within
from distributed import all_gather_rows, all_reduce_sum_, gather_objects, rank
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
    squashed,
)
from labels import choose_images, split_off
from reading.sources import UNLABELLED, ImageDataset, SegmentationDataset, match_classes
from readouts import DISTANCES, TRAIN_CHUNK, fit_logistic, majority_votes, nearest, spread
from report import Score
from sheets import as_rgb
from utils import RGB8, Bands, UserError, as_written, both_sides, derive_seed
from weights import save_safetensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("segmentation")

NUM_LABELS = 256
STANDARDIZATIONS = ("StandardScaler", "center", "center_div", "RobustScaler", "pca", "pca_whiten", "none")
CLASSIFIERS = ("knn", "logreg")
ROWS = 65_536
"""Rows that are standardised at a time."""
FEW_K = 5
FEW_PENALTY = 1e-3
"""Neighbours and penalty of classifiers with few labelled images, see `fit_on_few`."""


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(EvaluationConfig):
    """Keys of this evaluation; the defaults are those of the published ADE20K numbers."""

    train_dataset_name: str = "custom://ADE20K?split='training'"
    """Data URL of images with label images."""
    test_dataset_name: str = "custom://ADE20K?split='validation'"
    """Data URL of the images that are scored."""
    val_dataset_name: str | None = None
    """Images on which hyper-parameters are chosen; null holds out a part of the training images."""
    val_proportion: float = field(default=0.1, metadata=BETWEEN_0_AND_1)
    """Fraction of the training images that is held out, a random choice by `seed`."""
    max_train_images: int | None = field(default=None, metadata=COUNT)
    """Use so many training images, evenly spaced; null for all."""
    classifiers: list[str] = field(
        default_factory=lambda: list(CLASSIFIERS), metadata=one_of(*CLASSIFIERS, not_empty=True)
    )
    """Which of them run: knn, logreg."""
    standardization: str = field(default="StandardScaler", metadata=one_of(*STANDARDIZATIONS))
    """What is done to the features, as fitted on the training images: one of `STANDARDIZATIONS`."""
    resolution: int | tuple[int, int] = field(default=224, metadata=COUNT)
    """Images are resized to squares of so many pixels, or to [height, width] (bicubic), label images too (nearest)."""
    ignore_labels: list[int] | None = field(default=None, metadata=within(at_least=0, below=NUM_LABELS))
    """Labels of pixels that do not count. null: those that the data sets leave out, which are 0 and 255 for ADE20K,
    what classes.txt says for custom://Segmentation, else 255; what one of the sets leaves out counts in none."""
    knn_ks: list[int] = field(default_factory=lambda: [1, 3, 10, 30], metadata=within(at_least=1, not_empty=True))
    """Numbers of neighbours that vote; the best on validation images is taken."""
    knn_distances: list[str] = field(
        default_factory=lambda: ["cosine", "L2"], metadata=one_of(*DISTANCES, not_empty=True)
    )
    """How neighbours are told, cosine or L2; the best on validation images is taken."""
    knn_chunk: int = field(default=TRAIN_CHUNK, metadata=COUNT)
    """Training patches that are compared at a time."""
    knn_dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16"))
    """Precision of the comparison: float32 or bfloat16."""
    logreg_cs: list[float] = field(
        default_factory=lambda: np.logspace(-6, 5, 8).tolist(), metadata=within(above=0, not_empty=True)
    )
    """Inverse strengths of the L2 penalty; the best on validation images is taken."""
    logreg_max_iter: int = field(default=1000, metadata=COUNT)
    """Iterations after which a fit ends at the latest."""
    logreg_tol: float = field(default=1e-12, metadata=NOT_NEGATIVE)
    """A fit ends once no part of the gradient is larger."""
    labelled_images: list[int] = field(default_factory=list, metadata=within(at_least=1, distinct=True))
    """Also score classifiers that have so many labelled images, each number giving results of its own: `[10]` adds
    knn_10_images and logreg_10_images. The training images are chosen such that classes occur equally often."""
    labelled_repeats: int = field(default=3, metadata=COUNT)
    """Choices of labelled images over which those scores are averaged."""
    num_pictures: int = field(default=8, metadata=NOT_NEGATIVE)
    """Test images, evenly spaced, whose predictions are drawn; 0 for none."""
    dump_features: bool = False
    """Write the training features and labels to output_dir/dumps."""
    dump_predictions: bool = False
    """Write the predicted label images of all test images to output_dir/dumps; with few labelled images, those of the
    first choice of them."""
    dump_classifier: bool = False
    """Write the weights of the logistic regression to output_dir/dumps."""

    def __post_init__(self) -> None:
        """Write squares as one number."""
        object.__setattr__(self, "resolution", as_written(self.resolution))


# ------------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True)
class LabelSet:
    """A data set of label images."""

    key: str
    """The key of the configuration that names it, for messages."""
    url: str
    dataset: ImageDataset
    own_ignore_labels: list[int]
    """What the data set itself leaves out, in its own numbers."""
    class_names: list[str]
    """Name of each label from 0 on, in its own numbers; empty if there are none."""
    numbers: UInt8[Tensor, "256"] | None = None
    """The training set's number of each label, if that has other ones."""

    @property
    def where(self) -> str:
        """The data set as `key=url`, for messages."""
        return f"{self.key}={self.url}"


class LabelSets(NamedTuple):
    """All data sets of an evaluation, whose labels mean the same once `LabelSet.numbers` is applied."""

    train: LabelSet
    val: LabelSet | None
    test: LabelSet
    ignore_labels: list[int]
    """Labels of pixels that do not count, in the numbers of the training set."""


def open_label_sets(cfg: SegmentationConfig, bands: Bands = RGB8) -> LabelSets:
    """Open the data sets, match their classes by name, and say which labels do not count.

    The images are for a model of these bands.

    Raises: UserError if a data set cannot be opened, or has some classes of the training set and others.
    """

    def open_one(key: str) -> LabelSet | None:
        url = getattr(cfg, key)
        if url is None:
            return None
        dataset = open_dataset(url, key, bands)
        # Names that other sources have may be those of whole images.
        names = dataset.class_names if isinstance(dataset, SegmentationDataset) else []
        return LabelSet(key, url, dataset, list(dataset.ignore_labels), names)

    train, val, test = map(open_one, ("train_dataset_name", "val_dataset_name", "test_dataset_name"))
    assert train is not None
    assert test is not None
    val, test = (None if labels is None else _with_numbers_of(train, labels, cfg) for labels in (val, test))
    assert test is not None
    if cfg.ignore_labels is not None:
        logger.info("labels that do not count: %s, as ignore_labels says", cfg.ignore_labels or "none")
        return LabelSets(train, val, test, cfg.ignore_labels)
    opened = [labels for labels in (train, val, test) if labels is not None]
    left_out = [set(labels.own_ignore_labels) for labels in opened if labels.numbers is None]
    ignore_labels = sorted(set().union(*left_out) | {UNLABELLED for labels in opened if labels.numbers is not None})
    logger.info("labels that do not count: %s, as the data sets say; ignore_labels=[...] overrides", ignore_labels)
    differing = set().union(*left_out) - set.intersection(*left_out)
    if differing:
        names = (train.class_names[label] if label < len(train.class_names) else str(label) for label in differing)
        logger.warning(
            "labels %s are left out by one of the data sets and not by another, so they count in none; "
            "ignore_labels=[...] overrides",
            ", ".join(sorted(names)),
        )
    return LabelSets(train, val, test, ignore_labels)


def _with_numbers_of(train: LabelSet, other: LabelSet, cfg: SegmentationConfig) -> LabelSet:
    if other.class_names == train.class_names:
        return other
    left_out = other.own_ignore_labels if cfg.ignore_labels is None else ()
    counting = [label for label in range(len(other.class_names)) if label not in left_out]
    names = [other.class_names[label] for label in counting]
    matched = match_classes(names, other.where, train.class_names, train.where)
    if matched is None:
        return other
    numbers = torch.arange(NUM_LABELS, dtype=torch.uint8)
    numbers[counting] = torch.tensor(matched, dtype=torch.uint8)
    numbers[list(left_out)] = UNLABELLED
    return replace(other, numbers=numbers)


def warn_of_labels(
    labels: LabelSet, pixels: Int64[Tensor, "256"], ignore_labels: Sequence[int], class_names: Sequence[str]
) -> None:
    """Warn where most pixels do not count, or a label has no name though others have.

    Args:
        labels: the data set.
        pixels: how many have each label, in the numbers of the training set.
        ignore_labels: labels that do not count, in these numbers.
        class_names: of the training set.
    """
    total = max(1, int(pixels.sum()))
    for label in ignore_labels:
        if 2 * int(pixels[label]) > total:
            logger.warning(
                "%s: label %d covers %.0f%% of the pixels and does not count; if it is a class, give ignore_labels "
                "without it",
                *(labels.where, label, 100 * int(pixels[label]) / total),
            )
    nameless = [label for label in pixels.nonzero().flatten().tolist() if label >= len(class_names) > 0]
    nameless = [str(label) for label in nameless if label not in ignore_labels]
    if nameless:
        logger.warning(
            "%s: labels without a name count as classes: %s; %d classes have a name, counted from 0",
            *(labels.where, ", ".join(nameless[:10]), len(class_names)),
        )


def prepare_pair(
    image: Image.Image | Tensor,
    target: Any,
    resolution: int | tuple[int, int],
    numbers: UInt8[Tensor, "256"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Image and label image in the resolution: [bands, h, w], and uint8 [h, w].

    Args:
        image: upright.
        target: its label image, which fits the upright image.
        resolution: side of squares in pixels, or height and width.
        numbers: what each label becomes, if not itself.

    Raises: UserError as `check_label_image`.
    """
    height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
    target = check_label_image(target, width, height)
    size = both_sides(resolution)
    labels = torch.from_numpy(np.array(target.resize(size[::-1], Image.Resampling.NEAREST)))
    return squashed(image, size), labels if numbers is None else numbers[labels.long()]


def check_label_image(target: Any, width: int, height: int) -> Image.Image:
    """The label image of an image of `width` x `height` pixels.

    Raises: UserError if it is none, or of another size than the image.
    """
    if not isinstance(target, Image.Image):
        raise UserError(f"the label is {type(target).__name__}, not a label image; give a data set for segmentation")
    if target.size != (width, height):
        turned = target.size == (height, width)
        remedy = "the image is turned by its EXIF orientation, perhaps; turn its label image too" if turned else ""
        raise UserError(
            f"the image has {width}x{height} pixels and its label image {target.width}x{target.height}; "
            f"{remedy or 'make them the same size'}"
        )
    return target


def to_patches(labels: UInt8[Tensor, "b h w"], patch_size: int) -> UInt8[Tensor, "patches pixels"]:
    """The labels of each patch's pixels, patches in the order of flattened feature maps."""
    b, h, w = labels.shape
    grid = labels.view(b, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.transpose(2, 3).reshape(-1, patch_size**2)


def from_patches(
    pixels: UInt8[Tensor, "patches pixels"], height: int, width: int, patch_size: int
) -> UInt8[Tensor, "b h w"]:
    """Label images of `height` x `width` pixels from the labels of each patch's pixels: undoes `to_patches`."""
    grid = pixels.view(-1, height // patch_size, width // patch_size, patch_size, patch_size)
    return grid.transpose(2, 3).reshape(-1, height, width)


def majority_label(pixels: UInt8[Tensor, "patches pixels"]) -> UInt8[Tensor, " patches"]:
    """The most frequent label of each patch; ties go to the smallest."""
    labels = []
    for rows in pixels.split(ROWS):
        counts = torch.zeros(len(rows), NUM_LABELS, dtype=torch.int32, device=pixels.device)
        counts.scatter_add_(1, rows.long(), torch.ones_like(rows, dtype=torch.int32))
        labels.append(counts.argmax(dim=1).to(torch.uint8))
    return torch.cat(labels)


def is_ignored(labels: UInt8[Tensor, "*shape"], ignore_labels: Sequence[int]) -> Tensor:
    """Where `labels` are among those that do not count."""
    table = torch.zeros(NUM_LABELS, dtype=torch.bool, device=labels.device)
    table[list(ignore_labels)] = True
    return table[labels.long()]


# ----------------------------------------------------------------------------------------------------- metrics

SCORES = (
    Score(
        ("mIoU",),
        terms={
            "mIoU": "Mean intersection over union. For each class, the pixels that are both of that class and "
            "predicted as it, as a share of those that are either; averaged over the classes that occur in truth or "
            "prediction. A prediction of a label that does not count is a class with 0, as in the published CAPI "
            "numbers."
        },
    ),
    Score(
        ("mIoU_valid",),
        terms={"mIoU_valid": "The same, averaged only over the classes that count. The usual definition."},
    ),
    Score(("acc",), terms={"acc": "Share of the pixels that are predicted right."}),
    Score(("mean_acc",), terms={"mean_acc": "That share within each true class, averaged over the classes."}),
)


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
        """Standardise `features` in place, and return them."""
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
    parts = [np.percentile(part.numpy(), (25, 50, 75), axis=0) for part in features.split(columns, dim=1)]
    low, middle, high = torch.from_numpy(np.concatenate(parts, axis=1)).float()
    return low, middle, high


def _nonzero(scale: Tensor) -> Tensor:
    # A constant feature stays 0 after centring, as in scikit-learn, rather than become NaN.
    return torch.where(scale > 10 * torch.finfo(torch.float32).eps, scale, torch.ones_like(scale))


# ------------------------------------------------------------------------------------------------------- fitting


class TrainingPatches:
    """Standardised features of the training patches and the labels of their pixels, the same on every rank.

    Rows: patches to fit on; then those of held-out images; of these, the ones whose majority label is ignored come last
    and are evaluated, but never fitted on. So each part is a view. `images` has the training image of each row, as a
    place in `chosen`, or -1 if it is of the validation set. Memory: the features, twice while they are read.
    """

    def __init__(self, cfg: SegmentationConfig, model: FrozenModel, sets: LabelSets) -> None:
        train, val = sets.train, sets.val
        self.ignore_labels, self.class_names = sets.ignore_labels, train.class_names
        self.chosen = torch.arange(len(train.dataset))
        if cfg.max_train_images is not None and cfg.max_train_images < len(self.chosen):
            self.chosen = torch.linspace(0, len(self.chosen) - 1, cfg.max_train_images).round().long()
        num = len(self.chosen)
        most = max(cfg.labelled_images, default=0)
        require(most <= num, "labelled_images", most, f"there are {num} training images; give smaller numbers")
        if val is None:
            fit, held_out = split_off(num, cfg.val_proportion, cfg.seed)
            val_images = self.chosen[held_out]
        else:
            fit, held_out = torch.arange(num), torch.full((len(val.dataset),), -1)
            val_images = torch.arange(len(val.dataset))
        fit_x, fit_y = self._read(cfg, model, train, self.chosen[fit], "training images")
        val_x, val_y = self._read(cfg, model, val or train, val_images, "validation images")
        self.num_images, num_patches = len(fit) + len(held_out), len(fit_y) // len(fit)
        counts, val_counts = (_count_labels(y, num_patches) for y in (fit_y, val_y))
        if val is not None:
            warn_of_labels(val, val_counts.sum(dim=0), self.ignore_labels, self.class_names)
        else:
            order, counts = torch.cat([fit, held_out]), torch.cat([counts, val_counts])
            # Only once they are read it is known which classes the images have.
            has_class = (counts[order.argsort()] > 0) & ~is_ignored(
                torch.arange(NUM_LABELS, dtype=torch.uint8), self.ignore_labels
            )
            fit, again = split_off(num, cfg.val_proportion, cfg.seed, has_class)
            if not torch.equal(again, held_out):
                held_out, place = again, order.argsort()
                fit_x, val_x, fit_y, val_y = (
                    column[(place[part].unsqueeze(1) * num_patches + torch.arange(num_patches)).flatten()]
                    for column in (torch.cat([fit_x, val_x]), torch.cat([fit_y, val_y]))
                    for part in (fit, held_out)
                )
        warn_of_labels(train, counts.sum(dim=0), self.ignore_labels, self.class_names)
        counts_in_fit = ~is_ignored(majority_label(fit_y), self.ignore_labels)
        dropped = is_ignored(majority_label(val_y), self.ignore_labels)
        order = dropped.int().argsort(stable=True)
        self.num_fit = int(counts_in_fit.sum())
        self.num_refit = self.num_fit + int((~dropped).sum())
        self.features, self.pixels, self.images = (
            torch.cat([fit_column[counts_in_fit], val_column[order]])
            for fit_column, val_column in (
                (fit_x, val_x),
                (fit_y, val_y),
                (fit.repeat_interleave(num_patches), held_out.repeat_interleave(num_patches)),
            )
        )
        del fit_x, val_x
        self.labels = majority_label(self.pixels)
        self._check(cfg)
        self.standardizer = Standardizer(cfg.standardization, self.features[: self.num_refit])
        self.standardizer.apply_(self.features)
        if model.device.type == "cuda" and 2 * self.features.nbytes < torch.cuda.mem_get_info(model.device)[0]:
            self.features = self.features.to(model.device)

    @staticmethod
    def _read(
        cfg: SegmentationConfig, model: FrozenModel, labels: LabelSet, indices: Tensor, title: str
    ) -> tuple[Tensor, ...]:
        def compute(features: Features, pixels: Tensor) -> tuple[Tensor, Tensor]:
            return features.feature_map.flatten(0, 2), to_patches(pixels, model.patch_size)

        return extract(model, _batches(cfg, labels, model, title, indices.tolist()), compute)

    def _check(self, cfg: SegmentationConfig) -> None:
        present = set(self.labels[: self.num_fit].unique().tolist()) - set(self.ignore_labels)
        if len(present) < 2:
            raise UserError(
                f"train_dataset_name={cfg.train_dataset_name}: patches have {len(present)} different labels "
                f"({sorted(present)}) beside ignore_labels={self.ignore_labels}; classification needs two: check the "
                "label images, and whether ignore_labels names a class that counts"
            )
        counted = self.pixels[self.num_fit :]
        seen = set(counted.unique().tolist()) - set(self.ignore_labels)
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
        """The name of a class, or its number if it has none."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


def _count_labels(pixels: UInt8[Tensor, "patches pixels"], num_patches: int) -> Int64[Tensor, "images 256"]:
    """How many pixels of each image have each label."""
    counts = [image.flatten().bincount(minlength=NUM_LABELS) for image in pixels.split(num_patches)]
    return torch.stack(counts)


def _batches(
    cfg: SegmentationConfig, labels: LabelSet, model: FrozenModel, title: str, indices: list[int] | None = None
) -> ImageBatches:
    return ImageBatches(
        labels.dataset,
        functools.partial(prepare_pair, resolution=cfg.resolution, numbers=labels.numbers),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=indices,
        pin=model.device.type == "cuda",
        title=title,
        bands=model.bands,
    )


Predict = Callable[[Float[Tensor, "q d"]], UInt8[Tensor, "q pixels"]]
"""A fitted classifier: from standardised features on the device to labels of the patches' pixels."""


def knn_classifier(cfg: SegmentationConfig, features: Tensor, pixels: Tensor, k: int, distance: str) -> Predict:
    """The most frequent label of the k nearest patches, pixel by pixel."""

    def predict(queries: Tensor) -> Tensor:
        dtype = getattr(torch, cfg.knn_dtype)
        _, neighbors = nearest(queries, features, k, distance, train_chunk=cfg.knn_chunk, dtype=dtype)
        ((_, predicted),) = majority_votes(neighbors, pixels, [k])
        return predicted

    return predict


def linear_classifier(weight: Tensor, bias: Tensor, num_pixels: int) -> Predict:
    """The most likely label of a patch, for all of its pixels."""

    def predict(features: Tensor) -> Tensor:
        labels = [torch.addmm(bias, rows.to(bias.device), weight.T).argmax(dim=1) for rows in features.split(ROWS)]
        return torch.cat(labels).to(torch.uint8).unsqueeze(1).expand(-1, num_pixels)

    return predict


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
        _, neighbors = nearest(queries, fit, max(cfg.knn_ks), distance, train_chunk=cfg.knn_chunk, dtype=dtype)
        for k, predicted in majority_votes(neighbors, data.pixels[: data.num_fit], cfg.knn_ks):
            confusion = all_reduce_sum_(confusion_matrix(truth, predicted, data.ignore_labels))
            scores[f"{distance}, k={k}"] = segmentation_metrics(confusion, data.ignore_labels)["mIoU"]
            logger.info("k-NN, %s, k=%d: %.4f validation mIoU", distance, k, scores[f"{distance}, k={k}"])
    best = max(scores, key=lambda name: scores[name])
    distance, k = best.split(", k=")
    predict = knn_classifier(cfg, data.features[: data.num_refit], data.pixels[: data.num_refit], int(k), distance)
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

    def validate(c: float) -> float:
        predicted = linear_classifier(*fit(data.num_fit, c), pixels_per_patch)(data.features[data.num_fit :])
        truth = data.pixels[data.num_fit :].to(device)
        confusion = confusion_matrix(truth, predicted, data.ignore_labels)
        score = segmentation_metrics(confusion, data.ignore_labels)["mIoU"]
        logger.info("logistic regression, C=%.3g: %.4f validation mIoU", c, score)
        return score

    scores = dict(zip(cfg.logreg_cs, spread(cfg.logreg_cs, validate), strict=True))
    best = max(scores, key=lambda c: scores[c])
    weight, bias = fit(data.num_refit, best)
    settings = {"C": best, "val_mIoU": scores[best], "search": {f"C={c:.3g}": score for c, score in scores.items()}}
    return settings, linear_classifier(weight, bias, pixels_per_patch), {"weight": weight.cpu(), "bias": bias.cpu()}


# ------------------------------------------------------------------------------------------- few labelled images


def fit_on_few(
    cfg: SegmentationConfig, data: TrainingPatches, classifier: str, num: int, device: torch.device
) -> tuple[dict[str, Any], list[Predict]]:
    """Classifiers that have the labels of `num` training images, one for each of `labelled_repeats` choices.

    No labels are left to choose hyper-parameters by, so these are fixed: `FEW_K` neighbours by cosine similarity, and a
    penalty of `FEW_PENALTY` * |weight|^2 beside the mean cross-entropy. Features are standardised as all training
    images are, which needs no labels.

    Raises: UserError if the images of a choice have a single class.
    """
    rows = (data.images[: data.num_refit] >= 0).nonzero().squeeze(1)
    has_class = torch.zeros(len(data.chosen), NUM_LABELS, dtype=torch.bool)
    has_class[data.images[rows], data.labels[rows].long()] = True
    choices, predictors = [], []
    for repeat in range(cfg.labelled_repeats):
        images = sorted(choose_images(has_class, num, derive_seed(cfg.seed, "labelled images", repeat)))
        labelled = rows[torch.isin(data.images[rows], torch.tensor(images))]
        features, labels = data.features[labelled.to(data.features.device)], data.labels[labelled].long()
        present, all_present = len(labels.unique()), int(has_class.any(dim=0).sum())
        require(present > 1, "labelled_images", num, "so many images have one class alone; classifiers need two")
        if present < all_present:
            logger.warning("labelled_images=%d: choice %d has %d of %d classes", num, repeat, present, all_present)
        if classifier == "knn":
            predictors.append(knn_classifier(cfg, features, data.pixels[labelled], min(FEW_K, len(labelled)), "cosine"))
        else:
            c = 1 / (2 * FEW_PENALTY * len(labelled))
            fitted = fit_logistic(
                features.to(device), labels.to(device), int(labels.max()) + 1, c, max_iter=cfg.logreg_max_iter
            )
            predictors.append(linear_classifier(*fitted, data.pixels.shape[1]))
        choices.append(data.chosen[images].tolist())
    fixed = {"k": FEW_K, "distance": "cosine"} if classifier == "knn" else {"penalty": FEW_PENALTY}
    return {"images": choices, **fixed}, predictors


# --------------------------------------------------------------------------------------------------- evaluation


def evaluate(cfg: SegmentationConfig, model: FrozenModel, results: Results) -> None:
    """Fit and test every classifier that has no result yet."""
    names = [*cfg.classifiers, *names_with_few(cfg)]
    missing = [name for name in names if name not in results]
    sets = open_label_sets(cfg, model.bands)
    opened = [labels for labels in (sets.train, sets.val, sets.test) if labels is not None]
    results.note_data(**{labels.key: labels.dataset for labels in opened})
    results.declare_scores(*SCORES)
    if not missing:
        logger.info("nothing to do: %s has %s", results.path, ", ".join(names))
        return
    grid = model.grid(cfg.resolution)
    started = time.monotonic()
    data = TrainingPatches(cfg, model, sets)
    seconds = {"features": time.monotonic() - started}
    results.note(
        representation="patch tokens",
        resolution=cfg.resolution,
        grid=list(grid),
        standardization=cfg.standardization,
        ignore_labels=sets.ignore_labels,
        own_ignore_labels={labels.key: labels.own_ignore_labels for labels in opened},
        num_train_images=data.num_images,
        num_train_patches=data.num_refit,
        num_test_images=len(sets.test.dataset),
        feature_dim=data.features.shape[1],
    )
    if cfg.dump_features:
        patches = {"features": data.features[: data.num_refit], "pixel_labels": data.pixels[: data.num_refit]}
        _dump(results, "train_patches", patches)
    fitted = fit_classifiers(cfg, data, missing, results, model.device)
    started = time.monotonic()
    outcome = run_test(cfg, model, sets.test, data, fitted)
    seconds |= fitted.seconds | {"test": time.monotonic() - started}
    store_scores(results, data, fitted, outcome)
    results.note(parts_s={part: round(value, 1) for part, value in seconds.items()})
    if outcome.pictures and rank() == 0:
        draw_predictions(outcome.pictures, data.class_names, data.ignore_labels).savefig(
            results.artifacts() / "segmentation.png"
        )


def names_with_few(cfg: SegmentationConfig) -> dict[str, tuple[str, int]]:
    """The results with few labelled images, by their names: which classifier, and how many images."""
    return {f"{name}_{num}_images": (name, num) for num in cfg.labelled_images for name in cfg.classifiers}


@dataclass
class Fitted:
    """Classifiers by the names of their results."""

    predictors: dict[str, Predict] = field(default_factory=dict)
    """Those that have all labels."""
    few_predictors: dict[str, list[Predict]] = field(default_factory=dict)
    """Those that have the labels of few images, one for each choice of them."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How each of both kinds was fitted, for its result."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What fitting those with all labels took."""


def fit_classifiers(
    cfg: SegmentationConfig, data: TrainingPatches, names: Sequence[str], results: Results, device: torch.device
) -> Fitted:
    """Fit the classifiers of these results; all ranks call this together, and get the same."""
    fitted = Fitted()
    for name in (name for name in cfg.classifiers if name in names):
        started = time.monotonic()
        if name == "knn":
            fitted.settings[name], fitted.predictors[name] = choose_knn(cfg, data, device)
        else:
            fitted.settings[name], fitted.predictors[name], weights = choose_logreg(cfg, data, device)
            if cfg.dump_classifier:
                shift, scale = data.standardizer.shift, data.standardizer.scale
                _dump(results, "logreg", weights | {"shift": shift, "scale": scale})
        fitted.seconds[name] = time.monotonic() - started
    for name, (classifier, num) in names_with_few(cfg).items():
        if name in names:
            fitted.settings[name], fitted.few_predictors[name] = fit_on_few(cfg, data, classifier, num, device)
    return fitted


@dataclass
class Outcome:
    """What came of the test images, on every rank."""

    confusions: dict[str, Int64[Tensor, "256 256"]]
    few_confusions: dict[str, list[Int64[Tensor, "256 256"]]]
    """Those of the classifiers with few labelled images, one for each choice of them."""
    predictions: dict[str, Tensor]
    """Label images [n, h, w] of each classifier, with few labelled images of the first choice, if they are dumped."""
    pictures: list[dict[str, np.ndarray]]
    """One for each image that is drawn: image [h, w, 3], truth [h, w], and the prediction of each classifier."""


def run_test(
    cfg: SegmentationConfig,
    model: FrozenModel,
    test: LabelSet,
    data: TrainingPatches,
    fitted: Fitted,
) -> Outcome:
    """One pass over the test images for all classifiers. Memory: one batch, and what is dumped."""
    predictors, few = fitted.predictors, fitted.few_predictors
    batches = _batches(cfg, test, model, "test images")
    num_test = len(test.dataset)
    drawn = set(torch.linspace(0, num_test - 1, min(cfg.num_pictures, num_test)).round().long().tolist())
    confusions = {name: torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64) for name in predictors}
    few_confusions = {
        name: [torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64) for _ in choices] for name, choices in few.items()
    }
    counts = torch.zeros(NUM_LABELS, dtype=torch.int64)
    dumped: dict[str, list[Tensor]] = {name: [] for name in (*predictors, *few)}
    pictures: list[dict[str, np.ndarray]] = []
    position = batches.share.start
    for images, truth in batches:
        features = data.standardizer.apply_(model(images).feature_map.flatten(0, 2))
        counts += truth.flatten().bincount(minlength=NUM_LABELS)

        def label_images(predict: Predict, features: Tensor = features) -> Tensor:
            return from_patches(predict(features).cpu(), *both_sides(cfg.resolution), model.patch_size)

        predicted = {name: label_images(predict) for name, predict in predictors.items()}
        for name, labels in predicted.items():
            confusions[name] += confusion_matrix(truth, labels, data.ignore_labels)
        kept = dict(predicted)
        for name, choices in few.items():
            for number, predict in enumerate(choices):
                labels = label_images(predict)
                few_confusions[name][number] += confusion_matrix(truth, labels, data.ignore_labels)
                kept.setdefault(name, labels)
        if cfg.dump_predictions:
            for name, labels in kept.items():
                dumped[name].append(labels)
        for i in range(len(images)):
            if position + i in drawn:
                shown = {"image": as_rgb(images[i : i + 1])[0], "truth": truth[i].numpy()}
                pictures.append(shown | {name: labels[i].numpy() for name, labels in predicted.items()})
        position += len(images)
    for confusion in itertools.chain([counts], confusions.values(), *few_confusions.values()):
        all_reduce_sum_(confusion)
    if is_ignored(counts.nonzero().to(torch.uint8), data.ignore_labels).all():
        raise UserError(f"{test.where}: no pixel has a label beside ignore_labels={data.ignore_labels}")
    warn_of_labels(test, counts, data.ignore_labels, data.class_names)
    empty = torch.empty(0, *both_sides(cfg.resolution), dtype=torch.uint8)
    predictions = {
        name: all_gather_rows(torch.cat([empty, *parts])) for name, parts in dumped.items() if cfg.dump_predictions
    }
    gathered = [picture for part in gather_objects(pictures) for picture in part]
    return Outcome(confusions, few_confusions, predictions, gathered)


def store_scores(results: Results, data: TrainingPatches, fitted: Fitted, outcome: Outcome) -> None:
    """Write what came of the test images, predictions first: whose score is there need not be tested again."""
    for name, labels in outcome.predictions.items():
        _dump(results, f"predictions_{name}", {"labels": labels})
    for name, confusion in outcome.confusions.items():
        scores = segmentation_metrics(confusion, data.ignore_labels, data.class_names)
        results.add(name, scores | {"settings": fitted.settings[name]})
        logger.info(
            "%s: mIoU %.4f, without ignored classes %.4f, pixel accuracy %.4f, mean accuracy %.4f",
            *(name, scores["mIoU"], scores["mIoU_valid"], scores["acc"], scores["mean_acc"]),
        )
    for name, confusions in outcome.few_confusions.items():
        scores = [segmentation_metrics(each, data.ignore_labels) for each in confusions]
        each_repeat = {score.name: [each[score.name] for each in scores] for score in SCORES}
        means = {key: float(np.mean(values)) for key, values in each_repeat.items()}
        deviations = {f"std_{key}": float(np.std(values)) for key, values in each_repeat.items()}
        results.add(name, means | deviations | {"each_repeat": each_repeat, "settings": fitted.settings[name]})
        logger.info(
            "%s: mIoU %.4f, standard deviation %.4f over %d choices of images",
            *(name, means["mIoU"], deviations["std_mIoU"], len(scores)),
        )


def _dump(results: Results, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a file that says what it was made of, as an older one may lie beside it."""
    if rank() == 0:
        path = results.folder("dumps") / f"{name}.safetensors"
        on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
        save_safetensors(on_cpu, path, {"made_of": json.dumps(results.identity())})
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
                ax.set_title(titles.get(key, key), fontsize=10)
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
    """Run the command line and return its exit code; see `evaluation.Evaluation.main`."""
    return EVALUATION.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
