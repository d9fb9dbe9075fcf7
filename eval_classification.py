"""Classification with frozen features: trained linear and attentive classifiers, k-NN and logistic regression.

    python eval_classification.py model_loader_kwargs.pretrained_weights=weights.pth output_dir=runs/eval \\
        train_dataset_name="torchvision://ImageFolder?root='/data/train'" \\
        test_dataset_names="torchvision://ImageFolder?root='/data/val'"

`methods` says which run. `classifiers` trains one classifier per representation, learning rate and weight decay, all
at once on one forward pass, and continues after an interruption. `knn` needs no training. `logreg` fits mean patch
features with all labels, `few_label` with few of them. What is chosen is chosen on a validation part; an image counts
as correct if the top prediction is any of its labels.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import contextlib
import itertools
import logging
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from checkpoint import save_atomically
from config import (
    BETWEEN_0_AND_1,
    CANDIDATES,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    ScheduleConfig,
    changed_keys,
    one_of,
    require,
    within,
)
from data import EpochOrder, read_batches, seeded, worker_poll_s
from distributed import all_reduce_sum_, barrier, broadcast_object, gather_objects, rank, world_size
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
    reader_processes,
    split_off,
)
from logreg import fit_logistic
from neighbors import nearest, weighted_vote
from optim import scheduled
from sources import BadImageError, HubDataset, ImageDataset, TorchvisionDataset, match_classes
from utils import UserError, derive_seed, due, largest_divisor

logger = logging.getLogger("eval_classification")

T = TypeVar("T")
R = TypeVar("R")

METHODS = ("classifiers", "knn", "logreg", "few_label")
POOLED = ("cls", "avg_patch", "cls_avg_patch", "avg_objects", "concat_objects")
"""Representations of one vector per image: for linear classifiers."""
TOKENS = ("objects", "patch")
"""Representations of one vector per token: for attentive classifiers."""
OF_REGISTERS = ("avg_objects", "concat_objects", "objects")
SCALINGS = ("standard", "l2", "none")
SPLIT_SEED = 42
RESIZE_OF_RESOLUTION = 256 / 224
HEAD_DIM = 64
INIT_STD = 0.02
BETAS = (0.9, 0.95)
LR_BATCH_SIZE = 256
REPORTED_K = 20
"""k whose accuracy is called top1, as is usual in the field; choosing the best k on the test set would flatter."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(EvaluationConfig):
    """Keys of the classification evaluation."""

    train_dataset_name: str = "hf://ILSVRC/imagenet-1k?split='train'&tgt_field='label'"
    """Images that are learned from; data URL."""
    val_dataset_name: str | None = None
    """Images on which hyper-parameters are chosen; null for a part of the training set."""
    val_proportion: float = field(default=0.1, metadata=BETWEEN_0_AND_1)
    """That part, which is then not trained on: a random one, or, if a class were missing in it, one drawn by class."""
    test_dataset_names: Any = "hf://ILSVRC/imagenet-1k?split='validation'&tgt_field='label'"
    """A data URL, or several by name: `test_dataset_names.v2=...`."""
    num_classes: int | None = field(default=None, metadata=within(at_least=2))
    """null: as many as the training set names, or its largest label + 1."""
    resolution: int = field(default=224, metadata=COUNT)
    """Side of the square that the model sees, in pixels."""
    resize: int | None = field(default=None, metadata=COUNT)
    """Shorter side of a test image before its centre is cut out; null for 256/224 of the resolution."""
    methods: list[str] = field(
        default_factory=lambda: ["classifiers", "knn", "few_label"],
        metadata=one_of(*METHODS, not_empty=True, distinct=True),
    )
    """Any of classifiers, knn, logreg, few_label."""
    representations: list[str] = field(
        default_factory=lambda: ["cls", "avg_patch", "patch"],
        metadata=one_of(*POOLED, *TOKENS, not_empty=True, distinct=True),
    )
    """For `classifiers`. Linear: cls, avg_patch, cls_avg_patch, and of registers avg_objects and concat_objects.
    Attentive: patch, and of registers objects."""
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2], metadata=CANDIDATES
    )
    """For a batch of 256 images over all ranks; scaled in proportion to it."""
    weight_decays: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 5e-2], metadata=within(at_least=0, not_empty=True, distinct=True)
    )
    """Of AdamW; biases have none."""
    batch_size_per_gpu: int = field(default=128, metadata=COUNT)
    """Training images of one step on one rank."""
    n_iters: int = field(default=12500, metadata=COUNT)
    """Training steps."""
    warmup_iters: int = field(default=1250, metadata=NOT_NEGATIVE)
    """Steps of the linear warm-up, before a cosine to 0."""
    save_checkpoint_period: int = field(default=1250, metadata=COUNT)
    """Steps between checkpoints, each with a validation."""
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata=within(above=0, at_most=1, size=2, ascending=True)
    )
    """Area of a random training crop, as fractions of the image."""
    knn_k: list[int] = field(
        default_factory=lambda: [10, 20, 50, 100, 200], metadata=within(at_least=1, not_empty=True, distinct=True)
    )
    """Numbers of neighbours. top1 is that of 20 if it is among them, else of the first."""
    knn_temperature: float = field(default=0.07, metadata=POSITIVE)
    """Neighbours vote with weight exp(cosine similarity / temperature)."""
    feature_scaling: str = field(default="standard", metadata=one_of(*SCALINGS))
    """Of features for logistic regression: standard (mean 0, deviation 1 over the images fitted on), l2 or none."""
    c_values: list[float] = field(
        default_factory=lambda: [float(c) for c in np.logspace(-6, 5, 8)], metadata=CANDIDATES
    )
    """Inverse strengths of the L2 penalty of logistic regression to choose from."""
    logreg_max_iter: int = field(default=1000, metadata=COUNT)
    """L-BFGS iterations."""
    labels_per_class: int | float = field(
        default=0.01, metadata=within(above=0, remedy="must be a whole number from 1 on, or a fraction up to 1.0")
    )
    """few_label: training images of each class, a number (`5`) or a fraction of them (`0.01`, at least one)."""
    few_label_repeats: int = field(default=3, metadata=COUNT)
    """few_label: random choices of images over which accuracies are averaged."""

    def __post_init__(self) -> None:
        """Check rules that span keys."""
        require(
            self.warmup_iters < self.n_iters,
            "warmup_iters",
            self.warmup_iters,
            f"must be 0 or more and below n_iters={self.n_iters}",
        )
        require(
            self.test_resize >= self.resolution,
            "resize",
            self.resize,
            f"must be at least resolution={self.resolution}, which is cut out of it",
        )
        number = self.labels_per_class
        require(
            isinstance(number, int) or number <= 1,
            "labels_per_class",
            number,
            "must be a whole number from 1 on, or a fraction up to 1.0",
        )
        tests = self.test_dataset_names
        named = isinstance(tests, dict) and tests and all(isinstance(url, str) for url in tests.values())
        require(
            bool(named) or isinstance(tests, str), "test_dataset_names", tests, "must be a data URL, or name: URL pairs"
        )

    @property
    def test_resize(self) -> int:
        """Shorter side of a test image before its centre is cut out."""
        return round(self.resolution * RESIZE_OF_RESOLUTION) if self.resize is None else self.resize

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of the classifiers of one representation, in the order of their numbers."""
        return list(itertools.product(self.learning_rates, self.weight_decays))


# ------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labelled:
    """A data set and the labels of its images, for all of them before any image is needed."""

    where: str
    """`key=url`, for messages."""
    dataset: ImageDataset
    labels: Int64[Tensor, "n l"]
    """Each image's labels, padded with -1; only -1 if it has none."""
    class_names: list[str]

    @property
    def labelled(self) -> Int64[Tensor, " labelled"]:
        """Indices of the images that have a label."""
        return (self.labels >= 0).any(1).nonzero().squeeze(1)

    def name_of(self, label: int) -> str:
        """A class, for messages."""
        names = self.class_names
        return f"{label} ({names[label]})" if label < len(names) else str(label)


def open_labelled(url: str, key: str) -> Labelled:
    """A data set with its labels.

    Raises: UserError if it has none, or some that are not whole numbers from 0 on.
    """
    dataset = open_dataset(url, key)
    where = f"{key}={url}"
    labels = pad([_label_list(target, where) for target in _read_targets(dataset, where)])
    if not (labels >= 0).any():
        raise UserError(
            f"{where}: no image has a label; give a data set with labels, such as torchvision://ImageFolder"
        )
    return Labelled(where, dataset, labels, dataset.class_names)


def pad(rows: list[list[int]], width: int = 1) -> Int64[Tensor, "n l"]:
    """Lists of labels as one tensor, filled up with -1."""
    width = max([width, *map(len, rows)])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(-1, width)


def _label_list(target: Any, where: str) -> list[int]:
    if isinstance(target, Tensor | np.ndarray | np.generic):
        target = target.tolist()
    labels = [] if target is None else list(target) if isinstance(target, list | tuple) else [target]
    wrong = [label for label in labels if not isinstance(label, int) or isinstance(label, bool)]
    if wrong:
        raise UserError(f"{where}: a label is {str(wrong[0])[:60]!r}; labels are whole numbers, or lists of them")
    if min(labels, default=0) < -1:
        raise UserError(f"{where}: label {min(labels)} is out of range; classes count from 0, and -1 means no label")
    return [label for label in labels if label >= 0]


def _read_targets(dataset: ImageDataset, where: str) -> Sequence[Any]:
    column = _targets_at_once(dataset, where)
    if column is not None:
        return column
    mine = [_target(dataset, i, where) for i in tqdm(my_share(len(dataset)), "labels", disable=rank() > 0 or None)]
    return [target for part in gather_objects(mine) for target in part]


def _target(dataset: ImageDataset, index: int, where: str) -> Any:
    try:
        return dataset[index].target()
    except BadImageError as error:
        raise UserError(f"{where}: {error}; repair or remove the file: an evaluation leaves none out") from error


def _targets_at_once(dataset: ImageDataset, where: str) -> Sequence[Any] | None:
    """All targets without reading an image, or None if there is no such list."""
    if isinstance(dataset, HubDataset):
        name = dataset.fields.target
        if name is None:
            columns = ", ".join(map(repr, dataset.dataset.column_names))
            raise UserError(f"{where}: needs tgt_field=, the column with the labels; there are: {columns}")
        return dataset.dataset.select_columns([name])[:][name]
    if isinstance(dataset, TorchvisionDataset):
        for name in ("targets", "labels", "_labels"):
            column = getattr(dataset.dataset, name, None)
            if isinstance(column, list | Tensor | np.ndarray) and len(column) == len(dataset) > 0:
                # These names are a custom, not a promise.
                ends = (0, len(dataset) - 1)
                if all(_label_list(column[i], where) == _label_list(_target(dataset, i, where), where) for i in ends):
                    return list(column)
    return None


def class_mapping(other: Labelled, train: Labelled) -> Int64[Tensor, " c"] | None:
    """The training class of each class of another set, or None if they are the same.

    A set may have `get_imagenet_class_mapping()`; else see `sources.match_classes`.
    """
    for holder in (other.dataset, getattr(other.dataset, "dataset", None)):
        own_mapping = getattr(holder, "get_imagenet_class_mapping", None)
        if own_mapping is not None:
            return torch.as_tensor(np.asarray(own_mapping()), dtype=torch.int64)
    numbers = match_classes(other.class_names, other.where, train.class_names, train.where)
    return None if numbers in (None, list(range(len(train.class_names)))) else torch.tensor(numbers)


@dataclass(frozen=True)
class TestSet:
    """A test set, and the training classes that its labels mean, if it has its own."""

    data: Labelled
    mapping: Int64[Tensor, " c"] | None


@dataclass(frozen=True)
class Splits:
    """Which images are for what. Images without a label are in none of it."""

    train: Labelled
    fit: Int64[Tensor, " fit"]
    val: Labelled
    val_indices: Int64[Tensor, " val"]
    tests: dict[str, TestSet]
    """By the suffix of the result's name; a single test set has none."""
    num_classes: int

    @property
    def val_is_part_of_train(self) -> bool:
        """Whether the validation images were split off the training set."""
        return self.val is self.train


def open_splits(cfg: ClassificationConfig) -> Splits:
    """Open all data sets and check that their labels fit together.

    Raises: UserError for a single class, a label out of range, or a validation part that lacks a class.
    """
    train = open_labelled(cfg.train_dataset_name, "train_dataset_name")
    num_classes = cfg.num_classes or max(len(train.class_names), int(train.labels.max()) + 1)
    _check_range(train, num_classes)
    classes = train.labels[train.labels >= 0].unique()
    if len(classes) < 2:
        raise UserError(
            f"{train.where}: all images are of class {train.name_of(int(classes[0]))}; classification needs two or more"
        )
    val, fit, val_indices = train, train.labelled, None
    if cfg.val_dataset_name is not None:
        val = open_labelled(cfg.val_dataset_name, "val_dataset_name")
        mapping = class_mapping(val, train)
        if mapping is not None:
            _check_range(val, len(mapping))
            val = Labelled(val.where, val.dataset, _through(mapping, val.labels), train.class_names)
        _check_range(val, num_classes)
        val_indices = val.labelled
    else:
        fit, val_indices = (fit[part] for part in _split(cfg, train, fit))
    if set(cfg.methods) != {"knn"}:
        _check_classes(cfg, train, fit, val, val_indices, classes)
    urls = cfg.test_dataset_names if isinstance(cfg.test_dataset_names, dict) else {"": cfg.test_dataset_names}
    tests = {}
    for name, url in urls.items():
        data = open_labelled(url, f"test_dataset_names.{name}" if name else "test_dataset_names")
        mapping = class_mapping(data, train)
        _check_range(data, num_classes if mapping is None else len(mapping))
        if mapping is not None and int(mapping.max()) >= num_classes:
            raise UserError(
                f"{data.where}: it is mapped to class {int(mapping.max())} of {num_classes} training classes"
            )
        tests[f"/{name}" if name else ""] = TestSet(data, mapping)
    return Splits(train, fit, val, val_indices, tests, num_classes)


def _split(cfg: ClassificationConfig, train: Labelled, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `labelled` to fit on and for validation: a random part, or one drawn by class if that lacks a class."""
    labels = train.labels[labelled]
    classes, columns = labels.unique(return_inverse=True)
    has_class = torch.zeros(len(labels), len(classes), dtype=torch.bool).scatter_(1, columns, value=True)
    parts = split_off(len(labels), cfg.val_proportion, SPLIT_SEED, has_class[:, classes >= 0])
    alone = classes[has_class.sum(dim=0) == 1]
    alone = [train.name_of(label) for label in alone[alone >= 0].tolist()]
    if alone:
        logger.warning(
            "%s: %d classes have one image, which is trained on and not validated: %s",
            *(train.where, len(alone), ", ".join(alone[:5])),
        )
    return parts


def _through(mapping: Int64[Tensor, " c"], labels: Int64[Tensor, "n l"]) -> Int64[Tensor, "n l"]:
    return torch.where(labels >= 0, mapping[labels.clamp_min(0)], -1)


def _check_range(data: Labelled, num_classes: int) -> None:
    largest = int(data.labels.max())
    if largest >= num_classes:
        raise UserError(
            f"{data.where}: label {largest} is out of range: there are {num_classes} classes, counted from 0; "
            "set num_classes, or use data sets with the same classes"
        )


def _check_classes(
    cfg: ClassificationConfig, train: Labelled, fit: Tensor, val: Labelled, val_indices: Tensor, classes: Tensor
) -> None:
    remedy = (
        f"change val_proportion={cfg.val_proportion:g}, give more images, or give val_dataset_name"
        if val is train
        else "use a validation set with the classes of the training set"
    )
    for what, data, indices in (("validation", val, val_indices), ("training", train, fit)):
        missing = classes[~torch.isin(classes, data.labels[indices])].tolist()
        if val is train:  # a class of one image is on one side
            missing = [label for label in missing if (train.labels == label).any(dim=1).sum() > 1]
        if missing:
            named = ", ".join(train.name_of(label) for label in missing[:5])
            raise UserError(
                f"{data.where}: the {what} part of {len(indices)} images has none of class {named}"
                f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}; {remedy}"
            )


def any_match(
    logits: Float[Tensor, "b m k"], labels: Int64[Tensor, "b l"], mapping: Int64[Tensor, " c"] | None = None
) -> Bool[Tensor, "b m"]:
    """Whether the top prediction of each of m classifiers is any of an image's labels.

    A prediction that is not finite, as of a classifier that has diverged, is wrong.

    Args:
        logits: for all classes.
        labels: padded with -1.
        mapping: if given, label i means class `mapping[i]`, and no other class can be predicted.
    """
    if mapping is not None:
        logits = logits[..., mapping.to(logits.device)]
    best, predicted = logits.max(-1)
    predicted = predicted.where(best.isfinite(), -2)
    return (predicted.unsqueeze(-1) == labels.to(logits.device).unsqueeze(1)).any(-1)


# ------------------------------------------------------------------------------------------------- images


class CentreCropped:
    """Resize, cut out the centre, and hand over the labels; see `evaluation.Prepare`."""

    def __init__(self, cfg: ClassificationConfig, num_labels: int) -> None:
        self.num_labels = num_labels
        self.transform = v2.Compose(
            [
                v2.Resize(cfg.test_resize, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(cfg.resolution),
                v2.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image, target: Any) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, " l"]]:
        """An image of a test or validation set, or of the training set for methods without augmentation."""
        return self.transform(image), pad([_label_list(target, "label")], self.num_labels)[0]


def image_batches(
    cfg: ClassificationConfig, model: FrozenModel, data: Labelled, indices: Tensor, title: str
) -> ImageBatches:
    """Batches of (test image, labels) of this rank's share."""
    return ImageBatches(
        data.dataset,
        CentreCropped(cfg, data.labels.shape[1]),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=indices.tolist(),
        pin=model.device.type == "cuda",
        title=title,
    )


class TrainBatches(Dataset[Any]):
    """Augmented training batches; asked for by (position in the training, index in the data set) pairs.

    The augmentation of an image follows from the seed and its position alone.
    """

    def __init__(self, cfg: ClassificationConfig, data: Labelled, indices: Int64[Tensor, " fit"]) -> None:
        self.seed, self.data, self.indices = cfg.seed, data, indices
        low, high = cfg.crop_scale
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(cfg.resolution, (low, high), interpolation=bicubic, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(0.5), v2.PILToTensor()])

    def __getitem__(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | UserError:
        crops = []
        chosen = [int(self.indices[number]) for _, number in pairs]
        for (position, _), index in zip(pairs, chosen, strict=True):
            try:
                image = self.data.dataset[index].image()
            except BadImageError as error:
                return UserError(f"{error}; repair or remove the file: an evaluation leaves none out")
            except UserError as error:
                return error
            with seeded(derive_seed(self.seed, "classification crop", position)):
                crops.append(self.transform(image))
        return torch.stack(crops), self.data.labels[chosen]


def train_batches(
    cfg: ClassificationConfig, data: Labelled, indices: Int64[Tensor, " fit"], step: int, *, pin: bool
) -> Iterator[tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b l"]]]:
    """For ever, this rank's batches from `step` on; all ranks together see the same whatever their number is."""
    order = EpochOrder(len(indices), derive_seed(cfg.seed, "classification order"))
    start = step * cfg.batch_size_per_gpu * world_size()
    num_workers = reader_processes(cfg.num_workers, cfg.batch_size_per_gpu * 3 * cfg.resolution**2)
    loader = DataLoader(
        TrainBatches(cfg, data, indices),
        batch_size=None,
        sampler=_Pairs(order, start, rank(), world_size(), cfg.batch_size_per_gpu),
        num_workers=num_workers,
        pin_memory=pin,
        timeout=worker_poll_s(num_workers),
    )
    for batch in read_batches(loader, "num_workers"):
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Pairs:
    def __init__(self, order: EpochOrder, *place: int) -> None:
        self.order, self.place = order, place

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.batches(*self.place)


# -------------------------------------------------------------------------------------------- classifiers


def represent(features: Features, representation: str) -> Float[Tensor, "b *tokens d"]:
    """One vector, or one per token, for each image.

    Raises: UserError if it is made of registers and the model has none.
    """
    global_repr, registers, feature_map = features
    if representation in OF_REGISTERS and registers is None:
        raise UserError(
            f"representations: {representation} is made of registers, and this model returns none; "
            f"choose from {', '.join(r for r in (*POOLED, *TOKENS) if r not in OF_REGISTERS)}"
        )
    if representation == "cls":
        return global_repr
    if representation == "avg_patch":
        return feature_map.mean((1, 2))
    if representation == "cls_avg_patch":
        return torch.cat([global_repr, feature_map.mean((1, 2))], dim=-1)
    if representation == "patch":
        return feature_map.flatten(1, 2)
    assert registers is not None
    if representation == "objects":
        return registers
    return registers.mean(1) if representation == "avg_objects" else registers.flatten(1)


def _normal_parameter(num_classifiers: int, *shape: int) -> nn.Parameter:
    # The same start for all: classifiers then differ by learning rate and weight decay alone.
    start = nn.init.trunc_normal_(torch.empty(1, *shape), std=INIT_STD)
    return nn.Parameter(start.expand(num_classifiers, *shape).clone(memory_format=torch.contiguous_format))


class LinearClassifiers(nn.Module):
    """m linear classifiers of one vector per image, computed as one matrix product."""

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = _normal_parameter(num_classifiers, num_classes, dim)
        self.bias = nn.Parameter(torch.zeros(num_classifiers, num_classes))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m k"]:
        """Logits."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)


class AttentiveClassifiers(nn.Module):
    """m classifiers, each of which pools the tokens by attention with one learned query before a linear layer.

    A query is known before the image is, so it is multiplied with the key weights instead of the tokens: a head's
    scores are then one vector's products with the tokens. And since attention weights sum to 1, tokens are pooled first
    and projected to values afterwards. Keys and values of the tokens, by far the largest part, are never computed.
    Keys have no bias: it would add the same to all scores of a head, which the softmax undoes.
    """

    def __init__(self, num_classifiers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head_dim = largest_divisor(dim, HEAD_DIM)
        self.query = _normal_parameter(num_classifiers, dim)
        self.key_weight = _normal_parameter(num_classifiers, dim, dim)
        self.value_weight = _normal_parameter(num_classifiers, dim, dim)
        self.value_bias = nn.Parameter(torch.zeros(num_classifiers, dim))
        self.weight = _normal_parameter(num_classifiers, num_classes, dim)
        self.bias = nn.Parameter(torch.zeros(num_classifiers, num_classes))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m k"]:
        """Logits."""
        m, d = self.query.shape
        # Views: were both in one parameter, each step would copy them and their gradients.
        key_weight, value_weight = (w.view(-1, self.head_dim, d) for w in (self.key_weight, self.value_weight))
        query = self.query.view(-1, 1, self.head_dim) / self.head_dim**0.5
        scores = F.linear(tokens, (query @ key_weight).squeeze(1))  # [b, n, m*heads]
        pooled = scores.softmax(dim=1).transpose(1, 2) @ tokens  # [b, m*heads, d]
        values = pooled.transpose(0, 1) @ value_weight.transpose(1, 2)  # [m*heads, b, head_dim]
        values = values.transpose(1, 2).reshape(m, d, -1) + self.value_bias.unsqueeze(2)  # [m, d, b], heads in a row
        # With the weight on the left, its gradient comes out in its own layout and needs no copy.
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, values).permute(2, 0, 1)


Classifiers = LinearClassifiers | AttentiveClassifiers


def make_classifiers(cfg: ClassificationConfig, shapes: Mapping[str, torch.Size], num_classes: int) -> nn.ModuleDict:
    """The classifiers of every representation; initialised from the seed, whatever else is evaluated."""
    classifiers = nn.ModuleDict()
    for name in cfg.representations:
        kind = AttentiveClassifiers if name in TOKENS else LinearClassifiers
        with seeded(derive_seed(cfg.seed, "classifiers", name)):
            classifiers[name] = kind(len(cfg.grid), shapes[name][-1], num_classes)
    return classifiers


class StackedAdamW:
    """AdamW (arXiv:1711.05101) of stacked classifiers, each with its own learning rate and weight decay.

    Args:
        module: all its parameters have the classifiers as first axis. Those whose name ends in `bias` do not decay.
        learning_rates, weight_decays: of each classifier.
    """

    def __init__(
        self, module: nn.Module, learning_rates: Float[Tensor, " m"], weight_decays: Float[Tensor, " m"]
    ) -> None:
        self.parameters = dict(module.named_parameters())
        self.learning_rates, self.weight_decays = learning_rates, weight_decays
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self.eps = 1e-8

    @torch.no_grad()
    def step(self, number: int, lr_scale: float) -> None:
        """Update all parameters from their gradients, which are overwritten: another tensor of their size costs time.

        Args:
            number: of this update, from 1 on.
            lr_scale: what the learning rates are multiplied by.
        """
        corrections = [1 - beta**number for beta in BETAS]
        for name, p in self.parameters.items():
            grad = p.grad
            assert grad is not None, f"{name} has no gradient"
            lr = (lr_scale * self.learning_rates).view(-1, *[1] * (p.ndim - 1))
            if not name.endswith("bias"):
                p.mul_(1 - lr * self.weight_decays.view(lr.shape))
            mean, square = self.moments[name]
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            # (mean / c0) / (sqrt(square / c1) + eps), with the corrections c0 and c1 moved into eps and the step size.
            deviation = torch.sqrt(square, out=grad).add_(self.eps * corrections[1] ** 0.5)
            p.addcmul_(torch.div(mean, deviation, out=grad), lr * (-(corrections[1] ** 0.5) / corrections[0]))


def any_label_loss(logits: Float[Tensor, "b m k"], labels: Int64[Tensor, "b l"]) -> Float[Tensor, " m"]:
    """Mean cross-entropy of each classifier; an image with several labels has each in equal parts as target."""
    given = labels >= 0
    of_labels = logits.gather(2, labels.clamp_min(0).unsqueeze(1).expand(-1, logits.shape[1], -1))
    mean_of_labels = (of_labels * given.unsqueeze(1)).sum(2) / given.sum(1, keepdim=True)
    return (logits.logsumexp(2) - mean_of_labels).mean(0)


@dataclass
class Training:
    """Everything that changes while classifiers train: what a checkpoint holds."""

    classifiers: nn.ModuleDict
    optimizer: StackedAdamW
    step: int = 0
    """Finished updates."""
    validations: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """step -> representation -> accuracy of each classifier."""

    def state(self) -> dict[str, Any]:
        """For `torch.save`."""
        return {
            "classifiers": self.classifiers.state_dict(),
            "moments": self.optimizer.moments,
            "step": self.step,
            "validations": self.validations,
        }

    def restore_(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.classifiers.load_state_dict(state["classifiers"])
        for name, moments in self.optimizer.moments.items():
            for moment, saved in zip(moments, state["moments"][name], strict=True):
                moment.copy_(saved)
        self.step, self.validations = state["step"], state["validations"]


def start_training(
    cfg: ClassificationConfig, shapes: Mapping[str, torch.Size], num_classes: int, device: torch.device
) -> Training:
    """Fresh classifiers."""
    classifiers = make_classifiers(cfg, shapes, num_classes).to(device)
    lr, wd = torch.tensor(cfg.grid, device=device).T
    scale = cfg.batch_size_per_gpu * world_size() / LR_BATCH_SIZE
    return Training(classifiers, StackedAdamW(classifiers, lr * scale, wd))


def train_step(
    training: Training,
    model: FrozenModel,
    images: UInt8[Tensor, "b 3 h w"],
    labels: Int64[Tensor, "b l"],
    lr_scale: float,
) -> dict[str, Tensor]:
    """One update of all classifiers. Returns the losses of each representation's, still on the device."""
    features = model(images, check_finite=training.step == 0)
    labels = labels.to(model.device, non_blocking=True)
    losses = {
        name: any_label_loss(classifiers(represent(features, name)), labels)
        for name, classifiers in training.classifiers.items()
    }
    training.classifiers.zero_grad()
    # Classifiers share nothing, so the gradient of the sum is that of each; one that diverges harms no other.
    torch.cat(list(losses.values())).sum().backward()
    for parameter in training.classifiers.parameters():
        assert parameter.grad is not None
        all_reduce_sum_(parameter.grad).div_(world_size())
    training.step += 1
    training.optimizer.step(training.step, lr_scale)
    return {name: loss.detach() for name, loss in losses.items()}


def score_classifiers(
    cfg: ClassificationConfig,
    model: FrozenModel,
    classifiers: nn.ModuleDict,
    batches: ImageBatches,
    mapping: Int64[Tensor, " c"] | None = None,
) -> dict[str, list[float]]:
    """Accuracy of every classifier, by representation; the ranks share the images, and none is counted twice."""

    @torch.no_grad()
    def count(features: Features, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            any_match(head(represent(features, name)), labels, mapping).sum(0, keepdim=True)
            for name, head in classifiers.items()
        )

    counted = extract(model, batches, count, gather=False)
    scores = {}
    for number, (name, head) in enumerate(classifiers.items()):
        assert isinstance(head, Classifiers)
        correct = counted[number].sum(0) if counted else torch.zeros(len(head.bias), dtype=torch.int64)
        scores[name] = [hits / batches.num_images for hits in all_reduce_sum_(correct).tolist()]
    return scores


class CheckpointFile:
    """Where an interrupted training of classifiers continues; rank 0 writes, all ranks read.

    Args:
        path: the file.
        identity: what the training depends on; a checkpoint of another one is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity

    def save(self, training: Training) -> None:
        """Replace the file in one step."""
        if rank() == 0:
            save_atomically(self.path, {"identity": self.identity, **training.state()})

    def restore_(self, training: Training) -> None:
        """Continue where the file stands; without a file, nothing.

        Raises: UserError if it belongs to another training or cannot be read.
        """
        if not broadcast_object(self.path.is_file()):
            return
        remedy = f"choose another output_dir, or delete {self.path} to train anew"
        try:
            # Memory-mapped: the ranks of a machine need not hold a copy of it each.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.path} cannot be read ({error}); delete it to train anew") from error
        if not isinstance(state, dict) or "identity" not in state:
            raise UserError(f"{self.path} was not written by an evaluation; {remedy}")
        changed = changed_keys(state["identity"], self.identity)
        if changed:
            what = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise UserError(f"{self.path} belongs to another training ({what}); {remedy}")
        try:
            training.restore_(state)
        except (RuntimeError, KeyError) as error:  # of another version of this script
            what = str(error).splitlines()[0]
            raise UserError(f"{self.path} holds other classifiers than these ({what}); {remedy}") from error
        logger.info("continuing after step %d", training.step)

    def remove(self) -> None:
        """Once all results are there."""
        barrier()
        if rank() == 0:
            self.path.unlink(missing_ok=True)


def train_classifiers(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, training: Training, checkpoint: CheckpointFile
) -> None:
    """Train all classifiers to the end."""
    schedule = ScheduleConfig(
        start_warmup_value=0.0, base_value=1.0, final_value=0.0, warmup_iters=cfg.warmup_iters, freeze_iters=0,
        truncate_cos=1.0,
    )  # fmt: skip
    pin = model.device.type == "cuda"
    batches = train_batches(cfg, splits.train, splits.fit, training.step, pin=pin)
    quiet = True if rank() > 0 else None
    with tqdm(total=cfg.n_iters, initial=training.step, desc="classifiers", unit="step", disable=quiet) as bar:
        while training.step < cfg.n_iters:
            images, labels = next(batches)
            losses = train_step(training, model, images, labels, scheduled(schedule, training.step, cfg.n_iters))
            bar.update()
            if training.step == cfg.n_iters or due(training.step, cfg.save_checkpoint_period):
                images_of_val = image_batches(cfg, model, splits.val, splits.val_indices, "validation")
                scores = score_classifiers(cfg, model, training.classifiers, images_of_val)
                training.validations[training.step] = scores
                checkpoint.save(training)
                for name, values in scores.items():
                    number = best_of(values)
                    logger.info(
                        "step %d, %s: validation top-1 %.4f, lr %g, weight decay %g, training loss %.4f",
                        training.step, name, values[number], *cfg.grid[number], losses[name][number].item(),
                    )  # fmt: skip


def best_of(values: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: values[i])


def pick(classifiers: Classifiers, number: int) -> Classifiers:
    """One of the classifiers, in a stack of its own."""
    _, dim = classifiers.weight.shape[1:]
    one = type(classifiers)(1, dim, classifiers.bias.shape[1]).to(classifiers.bias.device)
    one.load_state_dict({name: value[number : number + 1] for name, value in classifiers.state_dict().items()})
    return one


def evaluate_classifiers(
    cfg: ClassificationConfig,
    model: FrozenModel,
    results: Results,
    splits: Splits,
    shapes: Mapping[str, torch.Size],
) -> None:
    """Train, choose learning rate and weight decay on the validation part, test."""
    names = {name: f"{'attentive' if name in TOKENS else 'linear'}_{name}" for name in cfg.representations}
    if all(name in results for name in names.values()):
        return
    global_batch_size = cfg.batch_size_per_gpu * world_size()
    training = start_training(cfg, shapes, splits.num_classes, model.device)
    identity = {**results.identity(), "global batch size": global_batch_size}
    checkpoint = CheckpointFile(results.output_dir / "classifiers_checkpoint.pth", identity)
    checkpoint.restore_(training)
    train_classifiers(cfg, model, splits, training, checkpoint)
    validation = training.validations[cfg.n_iters]
    chosen = {name: best_of(values) for name, values in validation.items()}
    best = nn.ModuleDict()
    for name, head in training.classifiers.items():
        assert isinstance(head, Classifiers)
        best[name] = pick(head, chosen[name])
    metrics: dict[str, dict[str, float]] = {name: {} for name in best}
    for suffix, test in splits.tests.items():
        batches = image_batches(cfg, model, test.data, test.data.labelled, f"test{suffix}")
        for name, (top1,) in score_classifiers(cfg, model, best, batches, test.mapping).items():
            metrics[name][f"top1{suffix}"] = top1
    if rank() == 0:
        save_atomically(results.output_dir / "classifiers.pth", best.state_dict())
    for name, number in chosen.items():
        learning_rate, weight_decay = cfg.grid[number]
        results.add(
            names[name],
            {
                **metrics[name],
                "val_top1": validation[name][number],
                "settings": {
                    "representation": name,
                    "learning_rate": learning_rate,
                    "weight_decay": weight_decay,
                    "global_batch_size": global_batch_size,
                    "steps": cfg.n_iters,
                    "resolution": cfg.resolution,
                },
                "grid": {
                    f"lr {lr:g}, weight decay {wd:g}": value
                    for (lr, wd), value in zip(cfg.grid, validation[name], strict=True)
                },
                "best_val_top1_by_step": {
                    str(step): max(scores[name]) for step, scores in training.validations.items()
                },
            },
        )
    checkpoint.remove()


# ------------------------------------------------------------------------------- features of whole data sets


class Extracted(NamedTuple):
    """Representations of images, on the CPU, and their labels."""

    features: dict[str, Float[Tensor, "n d"]]
    labels: Int64[Tensor, "n l"]


def extract_pooled(
    cfg: ClassificationConfig,
    model: FrozenModel,
    data: Labelled,
    indices: Int64[Tensor, " n"],
    representations: Sequence[str],
    title: str,
    *,
    gather: bool,
) -> Extracted:
    """Features of images without augmentation; of all ranks together, or of this rank's share."""

    def compute(features: Features, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(represent(features, name) for name in representations)

    batches = image_batches(cfg, model, data, indices, title)
    columns = extract(model, batches, compute, gather=gather)
    if not columns:  # this rank has no image
        columns = tuple(torch.empty(0, 1) for _ in representations)
    of_share = indices if gather else indices[batches.share.start : batches.share.stop]
    return Extracted(dict(zip(representations, columns, strict=True)), data.labels[of_share])


@dataclass(frozen=True)
class FeatureSets:
    """Features that the methods without augmentation share."""

    bank: Extracted
    """All training images; those to fit on first, then the validation part if it is one of the training set."""
    num_fit: int
    val: Extracted
    tests: dict[str, Extracted]
    """This rank's share of each test set."""

    def fit(self, representation: str) -> tuple[Tensor, Tensor]:
        """Features and labels of the images to fit on."""
        return self.bank.features[representation][: self.num_fit], self.bank.labels[: self.num_fit]


def extract_feature_sets(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, representations: Sequence[str], *, with_val: bool
) -> FeatureSets:
    """Forward passes over all data sets."""
    indices, part_of_train = splits.fit, splits.val_is_part_of_train
    if part_of_train:
        indices = torch.cat([splits.fit, splits.val_indices])
    bank = extract_pooled(cfg, model, splits.train, indices, representations, "training images", gather=True)
    num_fit = len(splits.fit)
    if part_of_train or not with_val:
        val = Extracted({name: x[num_fit:] for name, x in bank.features.items()}, bank.labels[num_fit:])
    else:
        val = extract_pooled(
            cfg, model, splits.val, splits.val_indices, representations, "validation images", gather=True
        )
    tests = {
        suffix: extract_pooled(
            cfg, model, test.data, test.data.labelled, representations, f"test images{suffix}", gather=False
        )
        for suffix, test in splits.tests.items()
    }
    return FeatureSets(bank, num_fit, val, tests)


def rows_in_chunks(num: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `num` of them."""
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


# --------------------------------------------------------------------------------------------------- k-NN


def evaluate_knn(
    cfg: ClassificationConfig, model: FrozenModel, results: Results, splits: Splits, sets: FeatureSets, name: str
) -> None:
    """k-NN on one representation; the ranks share the queries."""
    bank, bank_labels = sets.bank.features[name], sets.bank.labels
    ks = sorted(k for k in cfg.knn_k if k <= len(bank))
    if not ks:
        raise UserError(f"knn_k={cfg.knn_k}: there are {len(bank)} training images; use smaller numbers")
    if len(ks) < len(cfg.knn_k):
        logger.warning("knn_k: only those up to %d are used, the number of training images", len(bank))
    reported = REPORTED_K if REPORTED_K in ks else ks[0]
    metrics = {}
    for suffix, test in splits.tests.items():
        queries = sets.tests[suffix]
        correct = torch.zeros(len(ks), dtype=torch.int64)
        if len(queries.labels):
            similarity, index = nearest(queries.features[name].to(model.device), bank, ks[-1], "cosine")
            for rows in rows_in_chunks(len(similarity), 1024):
                near = bank_labels[index[rows].cpu()].to(model.device)
                votes = [
                    weighted_vote(similarity[rows, :k], near[:, :k], splits.num_classes, cfg.knn_temperature)
                    for k in ks
                ]
                correct += any_match(torch.stack(votes, dim=1), queries.labels[rows], test.mapping).sum(0).cpu()
        top1 = [hits / len(test.data.labelled) for hits in all_reduce_sum_(correct).tolist()]
        metrics |= {f"top1{suffix}": top1[ks.index(reported)]}
        metrics |= {f"top1_k{k}{suffix}": value for k, value in zip(ks, top1, strict=True)}
    settings = {"representation": name, "k": reported, "temperature": cfg.knn_temperature, "resolution": cfg.resolution}
    results.add(f"knn_{name}", {**metrics, "settings": settings})


# ------------------------------------------------------------------------------------- logistic regression


class LogisticModel(NamedTuple):
    """Scaling and linear map of a fitted logistic regression."""

    scaling: str
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n 1 k"]:
        """Logits."""
        return F.linear(scaled(features, self.scaling, self.mean, self.std), self.weight, self.bias).unsqueeze(1)

    def num_correct(self, data: Extracted, name: str, mapping: Tensor | None = None) -> int:
        """How many predictions are right."""
        correct = 0
        for rows in rows_in_chunks(len(data.labels), 16384):
            features = data.features[name][rows].to(self.bias.device)
            correct += int(any_match(self.logits(features), data.labels[rows], mapping).sum())
        return correct

    def to(self, device: torch.device | str) -> "LogisticModel":
        """The same on another device."""
        return LogisticModel(self.scaling, *(value.to(device) for value in self[1:]))


def scaled(
    features: Float[Tensor, "n d"], scaling: str, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    """Features as the key feature_scaling says."""
    if scaling == "standard":
        return (features - mean) / std
    return F.normalize(features, dim=1) if scaling == "l2" else features


def fit_features(
    cfg: ClassificationConfig,
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n l"],
    num_classes: int,
    c: float,
    device: torch.device,
) -> LogisticModel:
    """Logistic regression on scaled features; the first label of an image counts."""
    first = labels.gather(1, (labels >= 0).int().argmax(1, keepdim=True)).squeeze(1).to(device)
    features = features.to(device)
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.where(std > 0, 1)
    x = scaled(features, cfg.feature_scaling, mean, std)
    weight, bias = fit_logistic(x, first, num_classes, c, max_iter=cfg.logreg_max_iter)
    return LogisticModel(cfg.feature_scaling, mean, std, weight, bias)


def spread(tasks: Sequence[T], run: Callable[[T], R]) -> list[R]:
    """`run` of every task, divided among the ranks; all get all outcomes."""
    mine = {number: run(tasks[number]) for number in range(rank(), len(tasks), world_size())}
    outcomes = {number: outcome for part in gather_objects(mine) for number, outcome in part.items()}
    return [outcomes[number] for number in range(len(tasks))]


def choose_rows(labels: Int64[Tensor, "n l"], per_class: int | float, seed: int, data: Labelled) -> Int64[Tensor, " f"]:
    """Random rows with so many images of each class, ascending.

    Args:
        labels: of the rows; the first label of an image counts.
        per_class: number, or fraction of what there is, at least one.
        seed: other seeds, other rows.
        data: where they are from, for messages.

    Raises: UserError if a class has fewer.
    """
    first = labels.gather(1, (labels >= 0).int().argmax(1, keepdim=True)).squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in first.unique().tolist():
        rows = (first == label).nonzero().squeeze(1)
        wanted = per_class if isinstance(per_class, int) else max(1, round(per_class * len(rows)))
        if wanted > len(rows):
            raise UserError(
                f"labels_per_class={per_class}: class {data.name_of(label)} of {data.where} has {len(rows)} images to "
                f"fit on; use at most that many"
            )
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


def evaluate_logreg(
    cfg: ClassificationConfig, model: FrozenModel, results: Results, splits: Splits, sets: FeatureSets, name: str
) -> None:
    """Logistic regression with all labels; C is chosen on the validation part, which then is fitted as well."""
    features, labels = sets.fit(name)
    num_val = len(sets.val.labels)

    def validate(c: float) -> float:
        fitted = fit_features(cfg, features, labels, splits.num_classes, c, model.device)
        return fitted.num_correct(sets.val, name) / num_val

    val_top1 = spread(cfg.c_values, validate)
    c = cfg.c_values[best_of(val_top1)]
    everything, all_labels = sets.bank.features[name], sets.bank.labels
    if not splits.val_is_part_of_train:
        everything = torch.cat([everything, sets.val.features[name]])
        all_labels = torch.cat([widened(all_labels, sets.val.labels), widened(sets.val.labels, all_labels)])
    # One fit; the other ranks wait for its outcome.
    (fitted,) = spread(
        [c], lambda c: fit_features(cfg, everything, all_labels, splits.num_classes, c, model.device).to("cpu")
    )
    metrics = score_logistic(model, splits, sets, name, [fitted])
    results.add(
        f"logreg_{name}",
        {
            **{key: values[0] for key, values in metrics.items()},
            "val_top1": max(val_top1),
            "settings": {"representation": name, "c": c, "scaling": cfg.feature_scaling, "resolution": cfg.resolution},
            "grid": {f"c {c:g}": value for c, value in zip(cfg.c_values, val_top1, strict=True)},
        },
    )


def widened(labels: Int64[Tensor, "n l"], like: Int64[Tensor, "n2 l2"]) -> Int64[Tensor, "n l3"]:
    """Labels padded to the width of others."""
    return F.pad(labels, (0, max(0, like.shape[1] - labels.shape[1])), value=-1)


def score_logistic(
    model: FrozenModel, splits: Splits, sets: FeatureSets, name: str, fitted: Sequence[LogisticModel]
) -> dict[str, list[float]]:
    """Accuracy of each of several fits on every test set; the ranks share the images."""
    metrics = {}
    for suffix, test in splits.tests.items():
        counts = [each.to(model.device).num_correct(sets.tests[suffix], name, test.mapping) for each in fitted]
        hits = all_reduce_sum_(torch.tensor(counts)).tolist()
        metrics[f"top1{suffix}"] = [each / len(test.data.labelled) for each in hits]
    return metrics


def evaluate_few_label(
    cfg: ClassificationConfig, model: FrozenModel, results: Results, splits: Splits, sets: FeatureSets, name: str
) -> None:
    """Logistic regression with few labels, several times with other images; C is chosen on the validation part."""
    features, labels = sets.fit(name)
    seeds = [derive_seed(cfg.seed, "few labels", repeat) for repeat in range(cfg.few_label_repeats)]
    rows = [choose_rows(labels, cfg.labels_per_class, seed, splits.train) for seed in seeds]
    num_val = len(sets.val.labels)

    def fit(task: tuple[int, float]) -> LogisticModel:
        chosen = rows[task[0]]
        fitted = fit_features(cfg, features[chosen], labels[chosen], splits.num_classes, task[1], model.device)
        return fitted

    tasks = list(itertools.product(range(cfg.few_label_repeats), cfg.c_values))
    scores = spread(tasks, lambda task: fit(task).num_correct(sets.val, name) / num_val)
    val_top1 = torch.tensor(scores, dtype=torch.float64).view(cfg.few_label_repeats, -1).mean(0).tolist()
    c = cfg.c_values[best_of(val_top1)]
    fitted = spread([(repeat, c) for repeat in range(cfg.few_label_repeats)], lambda task: fit(task).to("cpu"))
    metrics = score_logistic(model, splits, sets, name, fitted)
    means = {key: sum(values) / len(values) for key, values in metrics.items()}
    results.add(
        f"few_label_{name}",
        {
            **means,
            "val_top1": max(val_top1),
            "each_repeat": metrics,
            "settings": {
                "representation": name,
                "c": c,
                "scaling": cfg.feature_scaling,
                "labels_per_class": cfg.labels_per_class,
                "num_labels": len(rows[0]),
                "repeats": cfg.few_label_repeats,
                "resolution": cfg.resolution,
            },
            "grid": {f"c {c:g}": value for c, value in zip(cfg.c_values, val_top1, strict=True)},
        },
    )


# --------------------------------------------------------------------------------------------------- main


def representation_shapes(cfg: ClassificationConfig, model: FrozenModel) -> dict[str, torch.Size]:
    """Shape of each representation of one image, from a forward pass of a black one.

    Raises: UserError if the resolution does not fit the patch size, or the model lacks a representation.
    """
    size, patch = cfg.resolution, model.patch_size
    require(
        size % patch == 0,
        "resolution",
        size,
        f"must be a multiple of {patch}, the patch size of {model.name}; the nearest is "
        f"{max(patch, round(size / patch) * patch)}",
    )
    features = model(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    names = {"cls", "avg_patch"} | (set(cfg.representations) if "classifiers" in cfg.methods else set())
    return {name: represent(features, name).shape[1:] for name in sorted(names)}


def evaluate(cfg: ClassificationConfig, model: FrozenModel, results: Results) -> None:
    """Run the chosen methods; those whose results are there are skipped."""
    shapes = representation_shapes(cfg, model)
    splits = open_splits(cfg)
    results.note_data(
        train_dataset_name=splits.train.dataset,
        **({} if splits.val_is_part_of_train else {"val_dataset_name": splits.val.dataset}),
        **{f"test_dataset_names{suffix}": test.data.dataset for suffix, test in splits.tests.items()},
    )
    results.note(
        num_classes=splits.num_classes,
        num_images={
            "fit": len(splits.fit),
            "validation": len(splits.val_indices),
            **{f"test{suffix}": len(test.data.labelled) for suffix, test in splits.tests.items()},
        },
        test_classes={
            f"test{suffix}": len(test.mapping) for suffix, test in splits.tests.items() if test.mapping is not None
        },
        dims={name: list(shape) for name, shape in shapes.items()},
        test_resize=cfg.test_resize,
    )
    if "classifiers" in cfg.methods:
        with timed(results, "classifiers"):
            evaluate_classifiers(cfg, model, results, splits, shapes)
    on_features = {
        "knn_cls": evaluate_knn,
        "knn_avg_patch": evaluate_knn,
        "logreg_avg_patch": evaluate_logreg,
        "few_label_avg_patch": evaluate_few_label,
    }
    method_of = {result: next(method for method in METHODS if result.startswith(method)) for result in on_features}
    todo = [result for result in on_features if method_of[result] in cfg.methods and result not in results]
    if not todo:
        return
    representation_of = {result: result.removeprefix(f"{method_of[result]}_") for result in todo}
    with timed(results, "features"):
        names = sorted(set(representation_of.values()))
        with_val = any(method_of[result] != "knn" for result in todo)
        sets = extract_feature_sets(cfg, model, splits, names, with_val=with_val)
    for result in todo:
        with timed(results, result):
            on_features[result](cfg, model, results, splits, sets, representation_of[result])


@contextlib.contextmanager
def timed(results: Results, part: str) -> Iterator[None]:
    """Note how long a part took, and the memory in use at its peak so far."""
    started = time.monotonic()
    yield
    seconds = round(time.monotonic() - started, 1)
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_initialized():
        memory["gpu"] = torch.cuda.max_memory_allocated()
    results.note(
        part_seconds={**results.about.get("part_seconds", {}), part: seconds},
        peak_memory_gib={name: round(size / 2**30, 2) for name, size in memory.items()},
    )
    added = results.values.get(part, {})
    logger.info("%s: %.1f s%s", part, seconds, f", top-1 {added['top1']:.4f}" if "top1" in added else "")


EVALUATION = Evaluation("classification", ClassificationConfig, evaluate, parser)
main = EVALUATION.main

if __name__ == "__main__":
    sys.exit(main())
