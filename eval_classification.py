"""Classification with frozen features: trained linear and attentive classifiers, k-NN and logistic regression.

    python eval_classification.py model_loader_kwargs.pretrained_weights=weights.pth output_dir=runs/eval \\
        train_dataset_name="torchvision://ImageFolder?root='/data/train'" \\
        test_dataset_names="torchvision://ImageFolder?root='/data/val'"

`methods` says which run. `classifiers` trains one classifier per representation, learning rate and weight decay, all
at once on one forward pass, and continues after an interruption. `knn` needs no training. `logreg` fits mean patch
features with all labels, `few_label` with few of them. What is chosen is chosen on a validation part; an image counts
as correct if the top prediction is any of its labels.

The others are protocols of papers: `vissl` (arXiv:2301.08243, 2308.00566) trains linear classifiers of the last blocks
with SGD or LARS, with and without batch norm; `low_shot` (arXiv:2308.00566) fits a logistic regression without
intercept to 1 % of the images, with a penalty that is given; `linear_probe` (arXiv:2111.06377) trains a linear
classifier of the global representation with LARS, `attentive_probe` (arXiv:2202.03026) one of what a learned query
attends to, with SGD, both behind a batch norm without scale and shift.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import contextlib
import copy
import functools
import itertools
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from torch import Tensor, nn
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
    one_of,
    require,
    within,
)
from data import EpochOrder, read_batches, seeded, worker_poll_s
from distributed import all_reduce_sum_, rank, world_size
from evaluation import (
    Evaluation,
    EvaluationConfig,
    Features,
    FrozenModel,
    ImageBatches,
    Results,
    extract,
    reader_processes,
)
from labels import (
    Labelled,
    Splits,
    TestSet,
    choose_rows,
    first_labels,
    join,
    label_list,
    open_splits,
    pad,
    read_image_list,
    renumber,
)
from optim import scheduled, stepped, warmed_half_cosine
from reading.sources import BadImageError
from readouts import (
    SCALINGS,
    AttentiveProbes,
    CheckpointFile,
    Classifiers,
    LogisticModel,
    NormedClassifiers,
    StackedAdamW,
    StackedLARS,
    StackedOptimizer,
    StackedSGD,
    StandardisedClassifiers,
    Training,
    any_match,
    best_of,
    knn_num_correct,
    make_classifiers,
    pick,
    spread,
    train_step,
)
from report import Score
from utils import RGB8, Bands, UserError, as_typed, as_written, both_sides, derive_seed, due

logger = logging.getLogger("eval_classification")

METHODS = ("classifiers", "knn", "logreg", "few_label", "vissl", "low_shot", "linear_probe", "attentive_probe")
POOLED = ("cls", "avg_patch", "cls_avg_patch", "avg_objects", "concat_objects")
"""Representations of one vector per image: for linear classifiers."""
TOKENS = ("objects", "patch")
"""Representations of one vector per token: for attentive classifiers."""
NEED_REGISTERS = ("avg_objects", "concat_objects", "objects")
RESIZE_OF_RESOLUTION = 256 / 224
LR_BATCH_SIZE = 256
"""Images per step over all ranks for which `learning_rates` are given."""
TOP1 = (
    "Share of the images whose most likely class is one of their labels. If there are several test sets, the name of "
    "the set follows."
)
TRANSDUCTIVE = "top1_transductive"
TRANSDUCTIVE_MEANING = (
    "As top1, but the features of test images are standardised with the mean and deviation of the test images instead "
    "of those of the training images, so that each prediction depends on the whole test set. The numbers published in "
    "arXiv:2308.00566 are computed so, and those of attentive probes in arXiv:2202.03026 for batches of test images."
)
ONE_PERCENT_SHA256 = "6581e723dbf23ae41ebd1d66d0b3c1c0eb8865d5abfa906987f6563513f4b9b8"
"""Of the 12,811 file names of ImageNet-1k with which arXiv:2308.00566 fits its logistic regression; see `ImageList`."""
ATTENTIVE_FINAL_LR = 1e-6 / 0.4
"""Learning rate at the end of an attentive probe, as a fraction of the highest."""
VISSL_OPTIMIZERS: dict[str, type[StackedOptimizer]] = {"sgd": StackedSGD, "lars": StackedLARS}
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
    """Fraction of the training set that is then not trained on: drawn at random, or by class if that misses a class."""
    test_dataset_names: Any = "hf://ILSVRC/imagenet-1k?split='validation'&tgt_field='label'"
    """A data URL, or several by name: `test_dataset_names.v2=...`."""
    num_classes: int | None = field(default=None, metadata=within(at_least=2))
    """null: as many as the training set names, or its largest label + 1."""
    only_test_classes: bool = False
    """Of a test set that names fewer classes than the training set, such as ImageNet-A and ImageNet-R, predict these
    only, as is usual for them; false: all classes."""
    resolution: int | tuple[int, int] = field(default=224, metadata=COUNT)
    """Side of the square that the model sees, in pixels, or [height, width]."""
    resize: int | None = field(default=None, metadata=COUNT)
    """Shorter side of a test image before its centre is cut out; null for 256/224 of the resolution. With [height,
    width] that of a box of this shape, which the test image then just covers."""
    resize_interpolation: str = field(default="bicubic", metadata=one_of("bicubic", "bilinear"))
    """How a test image is resized: bicubic or bilinear, both antialiased."""
    methods: list[str] = field(
        default_factory=lambda: ["classifiers", "knn", "few_label"],
        metadata=one_of(*METHODS, not_empty=True, distinct=True),
    )
    """Any of classifiers, knn, logreg, few_label, vissl, low_shot, linear_probe, attentive_probe."""
    representations: list[str] = field(
        default_factory=lambda: ["cls", "avg_patch", "patch"],
        metadata=one_of(*POOLED, *TOKENS, not_empty=True, distinct=True),
    )
    """What `classifiers` are trained on. Linear: cls, avg_patch, cls_avg_patch, and of registers avg_objects and
    concat_objects. Attentive: patch, and of registers objects."""
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2], metadata=CANDIDATES
    )
    """Learning rates for a batch of 256 images over all ranks; scaled in proportion to it."""
    weight_decays: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 5e-2], metadata=within(at_least=0, not_empty=True, distinct=True)
    )
    """Weight decays of AdamW; biases have none."""
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
    """Numbers of neighbours. top1 is that of 20 if it is among them, else of the smallest."""
    knn_temperature: float = field(default=0.07, metadata=POSITIVE)
    """Neighbours vote with weight exp(cosine similarity / temperature)."""
    feature_scaling: str = field(default="standard", metadata=one_of(*SCALINGS))
    """How logistic regression scales features: standard (mean 0, deviation 1 over the images fitted on), l2 or none."""
    c_values: list[float] = field(
        default_factory=lambda: [float(c) for c in np.logspace(-6, 5, 8)], metadata=CANDIDATES
    )
    """Inverse strengths of the L2 penalty of logistic regression to choose from."""
    logreg_max_iter: int = field(default=1000, metadata=COUNT)
    """L-BFGS iterations."""
    labels_per_class: int | float = field(
        default=0.01, metadata=within(above=0, remedy="must be a whole number from 1 on, or a fraction up to 1.0")
    )
    """few_label, low_shot: training images of each class, a number (`5`) or a fraction (`0.01`, at least one)."""
    few_label_repeats: int = field(default=3, metadata=COUNT)
    """few_label: random choices of images over which accuracies are averaged."""
    low_shot_list: str | None = None
    """low_shot: text file with the name of a training image a line, such as `n04235860_14959.JPEG`; null for a random
    choice of `labels_per_class`."""
    low_shot_penalty: float = field(default=0.0025, metadata=POSITIVE)
    """low_shot: p in the objective, mean cross-entropy + p / (2 n) |weight|^2, n being the number of images."""
    vissl_optimizer: str = field(default="sgd", metadata=one_of(*VISSL_OPTIMIZERS))
    """sgd (with Nesterov momentum, as published for ViT-B and L) or lars (for ViT-H)."""
    vissl_learning_rates: list[float] = field(default_factory=lambda: [0.01], metadata=CANDIDATES)
    """Learning rates for a batch of 256 images over all ranks; scaled in proportion to it. ViT-H: [0.1, 0.01]."""
    vissl_weight_decays: list[float] = field(
        default_factory=lambda: [5e-4], metadata=within(at_least=0, not_empty=True, distinct=True)
    )
    """Weight decays; batch norms have none, and with lars nor have biases. ViT-H: [5e-4, 0]."""
    vissl_epochs: int = field(default=28, metadata=COUNT)
    """Passes over the training images, `batch_size_per_gpu` of them in each step on one rank. ViT-H: 50."""
    vissl_decay_epochs: list[int] = field(
        default_factory=lambda: [8, 16, 24], metadata=within(at_least=1, ascending=True, distinct=True)
    )
    """Passes after which learning rates fall to a tenth. ViT-H: [15, 30, 45]."""
    vissl_blocks: int = field(default=4, metadata=COUNT)
    """Last blocks of the model whose mean patch tokens, each through the final norm, are concatenated."""
    linear_probe_learning_rates: list[float] = field(default_factory=lambda: [0.1], metadata=CANDIDATES)
    """Learning rates of LARS for a batch of 256 images over all ranks; scaled in proportion to it."""
    attentive_probe_learning_rates: list[float] = field(default_factory=lambda: [0.0125], metadata=CANDIDATES)
    """Learning rates of SGD with Nesterov momentum, likewise; published: 0.4 for 8192 images."""
    probe_epochs: int = field(default=90, metadata=COUNT)
    """linear_probe, attentive_probe: passes over the training images, `batch_size_per_gpu` in each step on one rank."""
    probe_warmup_epochs: int = field(default=10, metadata=NOT_NEGATIVE)
    """linear_probe, attentive_probe: passes of the linear warm-up, before a half cosine."""

    def __post_init__(self) -> None:
        """Write squares as one number, and check rules that span keys."""
        object.__setattr__(self, "resolution", as_written(self.resolution))
        require(
            self.warmup_iters < self.n_iters,
            "warmup_iters",
            self.warmup_iters,
            f"must be 0 or more and below n_iters={self.n_iters}",
        )
        require(
            self.resize is None or self.resize >= min(both_sides(self.resolution)),
            "resize",
            self.resize,
            f"must be at least resolution={as_typed(self.resolution)}, of two sides the shorter: it is cut out of that",
        )
        require(
            all(epoch < self.vissl_epochs for epoch in self.vissl_decay_epochs),
            "vissl_decay_epochs",
            self.vissl_decay_epochs,
            f"must all be below vissl_epochs={self.vissl_epochs}; change one of them",
        )
        require(
            self.probe_warmup_epochs < self.probe_epochs,
            "probe_warmup_epochs",
            self.probe_warmup_epochs,
            f"must be below probe_epochs={self.probe_epochs}; change one of them",
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
    def test_box(self) -> tuple[int, int]:
        """Height and width of what a test image just covers before its centre is cut out."""
        sides = both_sides(self.resolution)
        times = RESIZE_OF_RESOLUTION if self.resize is None else self.resize / min(sides)
        height, width = (round(side * times) for side in sides)
        return height, width

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of the classifiers of one representation, in the order of their numbers."""
        return list(itertools.product(self.learning_rates, self.weight_decays))

    @property
    def global_batch_size(self) -> int:
        """Training images of one step on all ranks."""
        return self.batch_size_per_gpu * world_size()


# ---------------------------------------------------------------------------------------------------- images


class CentreCropped:
    """Resize, cut out the centre, and hand over the labels; see `evaluation.Prepare`."""

    def __init__(self, cfg: ClassificationConfig, num_labels: int, numbers: Int64[Tensor, " c"] | None = None) -> None:
        self.num_labels, self.numbers, self.box = num_labels, numbers, cfg.test_box
        self.interpolation = v2.InterpolationMode(cfg.resize_interpolation)
        self.cut = v2.Compose([v2.CenterCrop(both_sides(cfg.resolution)), v2.PILToTensor()])

    def __call__(self, image: Image.Image | Tensor, target: Any) -> tuple[Shaped[Tensor, "c h w"], Tensor]:
        """An image of a test or validation set, or of the training set for methods without augmentation."""
        size = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        resize = v2.Resize(covering_size(size, self.box), self.interpolation, antialias=True)
        labels = pad([label_list(target, "label")], self.num_labels)[0]
        return in_range(self.cut(resize(image))), labels if self.numbers is None else renumber(labels, self.numbers)


def covering_size(size: Sequence[int], box: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image, first as they are and then, in the same proportion, so that it just covers a box;
    for a square box as torchvision's `Resize` rounds them."""
    (height, width), (box_height, box_width) = size, box
    if box_height * width >= box_width * height:
        return box_height, box_height * width // height
    return box_width * height // width, box_width


def image_batches(
    cfg: ClassificationConfig, model: FrozenModel, data: Labelled, indices: Tensor, title: str
) -> ImageBatches:
    """Batches of (test image, labels) of this rank's share."""
    return ImageBatches(
        data.dataset,
        CentreCropped(cfg, data.labels.shape[1], data.numbers),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=indices.tolist(),
        pin=model.device.type == "cuda",
        title=title,
        bands=model.bands,
    )


def in_range(pixels: Shaped[Tensor, "c h w"]) -> Shaped[Tensor, "c h w"]:
    """Deep pixels within [0, 1], where bicubic resampling overshoots."""
    return pixels.clamp(0, 1) if pixels.is_floating_point() else pixels


class ClippedCrop(v2.RandomResizedCrop):
    """A random crop whose first draw counts: sides that are longer than the image are shortened to it.

    The crop of MAE's linear probe (arXiv:2111.06377). `RandomResizedCrop` draws again, and crops less often so wide or
    so high as the image.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """A box within the image, from torch's generator."""
        (image,) = flat_inputs
        height, width = v2.functional.get_size(image)
        uniform, log_uniform = torch.rand(2, dtype=torch.float64).tolist()
        area = width * height * (self.scale[0] + uniform * (self.scale[1] - self.scale[0]))
        low, high = map(math.log, self.ratio)
        ratio = math.exp(low + log_uniform * (high - low))
        w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
        top, left = (int(torch.randint(rest + 1, ())) for rest in (height - h, width - w))
        return {"top": top, "left": left, "height": h, "width": w}


class TrainBatches(Dataset[Any]):
    """Augmented training batches; asked for by (position in the training, index in the data set) pairs.

    The augmentation of an image follows from the seed and its position alone.
    """

    def __init__(
        self,
        cfg: ClassificationConfig,
        data: Labelled,
        indices: Int64[Tensor, " fit"],
        crop_kind: type[v2.RandomResizedCrop],
        bands: Bands,
    ) -> None:
        self.seed, self.data, self.indices, self.bands = cfg.seed, data, indices, bands
        low, high = cfg.crop_scale
        height, width = both_sides(cfg.resolution)
        ratio = (3 / 4 * (width / height), 4 / 3 * (width / height))
        bicubic = v2.InterpolationMode.BICUBIC
        crop = crop_kind((height, width), (low, high), ratio, interpolation=bicubic, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(0.5), v2.PILToTensor()])

    def __getitem__(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | UserError:
        crops = []
        chosen = [int(self.indices[number]) for _, number in pairs]
        for (position, _), index in zip(pairs, chosen, strict=True):
            try:
                image = self.data.dataset[index].picture(self.bands)
            except BadImageError as error:
                return UserError(f"{error}; repair or remove the file: an evaluation leaves none out")
            except UserError as error:
                return error
            with seeded(derive_seed(self.seed, "classification crop", position)):
                crops.append(in_range(self.transform(image)))
        return torch.stack(crops), self.data.labels[chosen]


def train_batches(
    cfg: ClassificationConfig,
    data: Labelled,
    indices: Int64[Tensor, " fit"],
    step: int,
    *,
    pin: bool,
    crop_kind: type[v2.RandomResizedCrop] = v2.RandomResizedCrop,
    bands: Bands = RGB8,
) -> Iterator[tuple[Shaped[Tensor, "b c h w"], Int64[Tensor, "b l"]]]:
    """This rank's batches from `step` on, without end; all ranks together see the same whatever their number is."""
    order = EpochOrder(len(indices), derive_seed(cfg.seed, "classification order"))
    start = step * cfg.batch_size_per_gpu * world_size()
    num_bytes = bands.num * (1 if bands.value_range is None else 4)
    num_workers = reader_processes(
        cfg.num_workers, cfg.batch_size_per_gpu * num_bytes * math.prod(both_sides(cfg.resolution))
    )
    loader = DataLoader(
        TrainBatches(cfg, data, indices, crop_kind, bands),
        batch_size=None,
        sampler=_Pairs(order, start, rank(), world_size(), cfg.batch_size_per_gpu),
        num_workers=num_workers,
        pin_memory=pin,
        timeout=worker_poll_s(num_workers),
    )
    yield from read_batches(loader, "num_workers")


class _Pairs:
    def __init__(self, order: EpochOrder, *place: int) -> None:
        self.order, self.place = order, place

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.batches(*self.place)


# -------------------------------------------------------------------------------------------------- features


def represent(features: Features, representation: str) -> Float[Tensor, "b *tokens d"]:
    """One vector, or one per token, for each image.

    Raises: UserError if it is made of registers and the model has none.
    """
    global_repr, registers, feature_map = features
    if representation in NEED_REGISTERS and registers is None:
        raise UserError(
            f"representations: {representation} is made of registers, and this model returns none; "
            f"choose from {', '.join(r for r in (*POOLED, *TOKENS) if r not in NEED_REGISTERS)}"
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
    rows = indices if gather else indices[batches.share.start : batches.share.stop]
    return Extracted(dict(zip(representations, columns, strict=True)), data.labels[rows])


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


# --------------------------------------------------------------------------------------- trained classifiers


@dataclass(frozen=True)
class Recipe:
    """How stacks of classifiers are trained: what sets the methods that do so apart."""

    method: str
    """One of `METHODS`, the beginning of the names of files."""
    shapes: Mapping[str, torch.Size]
    """Stack -> shape of what it sees of one image."""
    inputs: Callable[..., dict[str, Tensor]]
    """Stack -> what it sees, from 8-bit images; takes `check_finite` as `FrozenModel` does."""
    grid: list[tuple[float, float]]
    """(learning rate for a batch of 256, weight decay) of each classifier of a stack, in the order of their numbers."""
    optimizer: type[StackedOptimizer]
    num_steps: int
    lr_scale: Callable[[int], float]
    """Finished steps -> what the learning rates are multiplied by."""
    names: Mapping[str, str]
    """Stack -> the key of its result."""
    settings: Mapping[str, Mapping[str, Any]]
    """Stack -> what its result says about it, beside what all say."""
    kinds: Mapping[str, type[Classifiers]] = field(default_factory=dict)
    """Stack -> its classifiers, where they are not plain linear or attentive ones."""
    crop_kind: type[v2.RandomResizedCrop] = v2.RandomResizedCrop
    """How training images are cropped."""


def classifiers_recipe(cfg: ClassificationConfig, model: FrozenModel, shapes: Mapping[str, torch.Size]) -> Recipe:
    """Linear and attentive classifiers with AdamW, a stack for each representation."""
    schedule = ScheduleConfig(
        start_warmup_value=0.0, base_value=1.0, final_value=0.0, warmup_iters=cfg.warmup_iters, freeze_iters=0,
        truncate_cos=1.0,
    )  # fmt: skip

    def inputs(images: Tensor, *, check_finite: bool = True) -> dict[str, Tensor]:
        features = model(images, check_finite=check_finite)
        return {name: represent(features, name) for name in cfg.representations}

    return Recipe(
        method="classifiers",
        shapes={name: shapes[name] for name in cfg.representations},
        inputs=inputs,
        grid=cfg.grid,
        optimizer=StackedAdamW,
        num_steps=cfg.n_iters,
        lr_scale=lambda step: scheduled(schedule, step, cfg.n_iters),
        names={name: f"{'attentive' if name in TOKENS else 'linear'}_{name}" for name in cfg.representations},
        settings={name: {"representation": name} for name in cfg.representations},
    )


def vissl_recipe(cfg: ClassificationConfig, model: FrozenModel, num_fit: int) -> Recipe:
    """Linear classifiers as in arXiv:2301.08243 and 2308.00566: of the last block, and of the last blocks side by side.

    Raises: UserError if the model does not give that many blocks.
    """

    def inputs(images: Tensor, *, check_finite: bool = True) -> dict[str, Tensor]:
        blocks = model.pooled_blocks(images, cfg.vissl_blocks, check_finite=check_finite)
        last, concat = blocks[:, -1], blocks.flatten(1)
        return {"last": last, "last_bn": last, "concat": concat, "concat_bn": concat}

    try:
        black = inputs(model.blank(cfg.resolution))
    except UserError as error:
        raise UserError(
            f"vissl_blocks={cfg.vissl_blocks}: {error}; change it, or leave vissl out of methods"
        ) from error
    return Recipe(
        method="vissl",
        shapes={name: x.shape[1:] for name, x in black.items()},
        inputs=inputs,
        grid=list(itertools.product(cfg.vissl_learning_rates, cfg.vissl_weight_decays)),
        optimizer=VISSL_OPTIMIZERS[cfg.vissl_optimizer],
        num_steps=max(1, round(cfg.vissl_epochs * num_fit / cfg.global_batch_size)),
        lr_scale=lambda step: stepped(step * cfg.global_batch_size / num_fit, cfg.vissl_decay_epochs),
        names={name: f"vissl_{name}" for name in black},
        settings={
            name: {
                "blocks": cfg.vissl_blocks if name.startswith("concat") else 1,
                "batch_norm": name.endswith("_bn"),
                "optimizer": cfg.vissl_optimizer,
                "epochs": cfg.vissl_epochs,
                "decay_epochs": cfg.vissl_decay_epochs,
            }
            for name in black
        },
        kinds={"last_bn": NormedClassifiers, "concat_bn": NormedClassifiers},
    )


def linear_probe_recipe(cfg: ClassificationConfig, model: FrozenModel, num_fit: int) -> Recipe:
    """The linear probe of MAE (arXiv:2111.06377), with LARS, of the global representation."""

    def inputs(images: Tensor, *, check_finite: bool = True) -> dict[str, Tensor]:
        return {"cls": model(images, check_finite=check_finite).global_repr}

    return Recipe(
        method="linear_probe",
        shapes={"cls": inputs(model.blank(cfg.resolution))["cls"].shape[1:]},
        inputs=inputs,
        grid=[(learning_rate, 0.0) for learning_rate in cfg.linear_probe_learning_rates],
        optimizer=StackedLARS,
        num_steps=max(1, round(cfg.probe_epochs * num_fit / cfg.global_batch_size)),
        lr_scale=lambda step: warmed_half_cosine(
            step * cfg.global_batch_size / num_fit, cfg.probe_warmup_epochs, cfg.probe_epochs
        ),
        names={"cls": "linear_probe_cls"},
        settings={"cls": {"representation": "cls", **probe_settings(cfg, "lars")}},
        kinds={"cls": StandardisedClassifiers},
        crop_kind=ClippedCrop,
    )


def attentive_probe_recipe(cfg: ClassificationConfig, model: FrozenModel, num_fit: int) -> Recipe:
    """The attentive probe of arXiv:2202.03026, with SGD, of the global representation and the patch tokens.

    Raises: UserError if these have different widths.
    """

    def inputs(images: Tensor, *, check_finite: bool = True) -> dict[str, Tensor]:
        global_repr, _, feature_map = model(images, check_finite=check_finite)
        patches = feature_map.flatten(1, 2)
        if global_repr.shape[1] != patches.shape[2]:
            raise UserError(
                f"model_path={model.name}: its global representation has {global_repr.shape[1]} channels and its "
                f"patches have {patches.shape[2]}; leave attentive_probe out of methods"
            )
        return {"cls_patch": torch.cat([global_repr.unsqueeze(1), patches], dim=1)}

    num_steps = max(1, round(cfg.probe_epochs * num_fit / cfg.global_batch_size))
    schedule = ScheduleConfig(
        start_warmup_value=0.0, base_value=1.0, final_value=ATTENTIVE_FINAL_LR, freeze_iters=0, truncate_cos=1.0,
        warmup_iters=round(cfg.probe_warmup_epochs * num_fit / cfg.global_batch_size),
    )  # fmt: skip
    return Recipe(
        method="attentive_probe",
        shapes={"cls_patch": inputs(model.blank(cfg.resolution))["cls_patch"].shape[1:]},
        inputs=inputs,
        grid=[(learning_rate, 0.0) for learning_rate in cfg.attentive_probe_learning_rates],
        optimizer=StackedSGD,
        num_steps=num_steps,
        lr_scale=lambda step: scheduled(schedule, step, num_steps),
        names={"cls_patch": "attentive_probe_cls_patch"},
        settings={"cls_patch": {"representation": "cls_patch", **probe_settings(cfg, "sgd")}},
        kinds={"cls_patch": AttentiveProbes},
    )


def probe_settings(cfg: ClassificationConfig, optimizer: str) -> dict[str, Any]:
    """What results of both probes say."""
    return {"optimizer": optimizer, "epochs": cfg.probe_epochs, "warmup_epochs": cfg.probe_warmup_epochs}


def start_training(cfg: ClassificationConfig, recipe: Recipe, num_classes: int, device: torch.device) -> Training:
    """Fresh classifiers, in each stack one for each learning rate and weight decay."""
    classifiers = make_classifiers(recipe.shapes, len(recipe.grid), num_classes, cfg.seed, recipe.kinds).to(device)
    learning_rates, weight_decays = torch.tensor(recipe.grid, device=device).T
    scale = cfg.global_batch_size / LR_BATCH_SIZE
    return Training(classifiers, recipe.optimizer(classifiers, learning_rates * scale, weight_decays))


def train_classifiers(
    cfg: ClassificationConfig,
    model: FrozenModel,
    recipe: Recipe,
    splits: Splits,
    training: Training,
    checkpoint: CheckpointFile,
) -> None:
    """Train all classifiers to the end, with a validation and a checkpoint now and then."""
    pin = model.device.type == "cuda"
    kinds = {"crop_kind": recipe.crop_kind, "bands": model.bands}
    batches = train_batches(cfg, splits.train, splits.fit, training.step, pin=pin, **kinds)
    quiet = True if rank() > 0 else None
    num_steps = recipe.num_steps
    with tqdm(total=num_steps, initial=training.step, desc=recipe.method, unit="step", disable=quiet) as bar:
        while training.step < num_steps:
            images, labels = next(batches)
            inputs = recipe.inputs(images, check_finite=training.step == 0)
            labels = labels.to(model.device, non_blocking=True)
            losses = train_step(training, inputs, labels, recipe.lr_scale(training.step))
            bar.update()
            if training.step == num_steps or due(training.step, cfg.save_checkpoint_period):
                val_images = image_batches(cfg, model, splits.val, splits.val_indices, "validation")
                scores = score_classifiers(recipe, training.classifiers, val_images)
                training.validations[training.step] = scores
                checkpoint.save(training)
                for name, values in scores.items():
                    number = best_of(values)
                    logger.info(
                        "step %d, %s: validation top-1 %.4f, lr %g, weight decay %g, training loss %.4f",
                        training.step, name, values[number], *recipe.grid[number], losses[name][number].item(),
                    )  # fmt: skip


def score_classifiers(
    recipe: Recipe,
    classifiers: nn.ModuleDict,
    batches: ImageBatches,
    mapping: Int64[Tensor, " c"] | None = None,
) -> dict[str, list[float]]:
    """Accuracy of every classifier, by stack; the ranks share the images, and none is counted twice."""
    classifiers.eval()

    @torch.no_grad()
    def count(inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            any_match(head(inputs[name]), labels, mapping).sum(0, keepdim=True) for name, head in classifiers.items()
        )

    counted = extract(recipe.inputs, batches, count, gather=False)
    scores = {}
    for number, (name, head) in enumerate(classifiers.items()):
        assert isinstance(head, Classifiers)
        correct = counted[number].sum(0) if counted else torch.zeros(len(head.bias), dtype=torch.int64)
        scores[name] = [hits / batches.num_images for hits in all_reduce_sum_(correct).tolist()]
    return scores


def score_transductively(
    recipe: Recipe, classifiers: nn.ModuleDict, batches: ImageBatches, mapping: Int64[Tensor, " c"] | None
) -> dict[str, list[float]]:
    """Accuracy of attentive probes, by stack, if batch norms take the statistics of all the images to be classified.

    The published code takes those of batches of 384 test images, which depend on the order of the images.
    """
    probes = {name: head for name, head in classifiers.items() if isinstance(head, AttentiveProbes)}
    if not probes:
        return {}

    @torch.no_grad()
    def pool(inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, ...]:
        return (*(head.pool(inputs[name]) for name, head in probes.items()), labels)

    columns = extract(recipe.inputs, batches, pool, gather=False)
    scores = {}
    for number, (name, head) in enumerate(probes.items()):
        in_training = copy.deepcopy(head).train()
        pooled = columns[number] if columns else torch.empty(0, *head.query.shape)  # this rank may have no image
        labels = columns[-1] if columns else torch.empty(0, 1, dtype=torch.int64)
        with torch.no_grad():
            correct = any_match(in_training.classify(pooled.to(head.bias.device)), labels, mapping).sum(0)
        scores[name] = [hits / batches.num_images for hits in all_reduce_sum_(correct).tolist()]
    return scores


def evaluate_classifiers(
    cfg: ClassificationConfig, model: FrozenModel, results: Results, splits: Splits, recipe: Recipe
) -> None:
    """Train, choose learning rate and weight decay on the validation part, test."""
    if all(name in results for name in recipe.names.values()):
        return
    training = start_training(cfg, recipe, splits.num_classes, model.device)
    identity = {**results.identity(), "global batch size": cfg.global_batch_size}
    checkpoint = CheckpointFile(results.output_dir / f"{recipe.method}_checkpoint.pth", identity)
    checkpoint.restore_(training)
    train_classifiers(cfg, model, recipe, splits, training, checkpoint)
    validation = training.validations[recipe.num_steps]
    chosen = {name: best_of(values) for name, values in validation.items()}
    best = nn.ModuleDict()
    for name, head in training.classifiers.items():
        assert isinstance(head, Classifiers)
        best[name] = pick(head, chosen[name])
    metrics: dict[str, dict[str, float]] = {name: {} for name in best}
    for suffix, test in splits.tests.items():
        batches = image_batches(cfg, model, test.data, test.data.labelled, f"test{suffix}")
        for name, (top1,) in score_classifiers(recipe, best, batches, test.mapping).items():
            metrics[name][f"top1{suffix}"] = top1
        for name, (top1,) in score_transductively(recipe, best, batches, test.mapping).items():
            metrics[name][f"{TRANSDUCTIVE}{suffix}"] = top1
    if rank() == 0:
        save_atomically(results.output_dir / f"{recipe.method}.pth", best.state_dict())
    for name, number in chosen.items():
        learning_rate, weight_decay = recipe.grid[number]
        results.add(
            recipe.names[name],
            {
                **metrics[name],
                "val_top1": validation[name][number],
                "settings": {
                    **recipe.settings[name],
                    "learning_rate": learning_rate,
                    "weight_decay": weight_decay,
                    "global_batch_size": cfg.global_batch_size,
                    "steps": recipe.num_steps,
                    "resolution": cfg.resolution,
                },
                "grid": {
                    f"lr {lr:g}, weight decay {wd:g}": value
                    for (lr, wd), value in zip(recipe.grid, validation[name], strict=True)
                },
                "best_val_top1_by_step": {
                    str(step): max(scores[name]) for step, scores in training.validations.items()
                },
            },
        )
    checkpoint.remove()


# -------------------------------------------------------------------------------------- readouts of features


def evaluate_knn(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, sets: FeatureSets, representation: str
) -> dict[str, Any]:
    """k-NN on one representation; the ranks share the queries."""
    bank, bank_labels = sets.bank.features[representation], sets.bank.labels
    ks = sorted(k for k in cfg.knn_k if k <= len(bank))
    if not ks:
        raise UserError(f"knn_k={cfg.knn_k}: there are {len(bank)} training images; use smaller numbers")
    if len(ks) < len(cfg.knn_k):
        logger.warning("knn_k: only those up to %d are used, the number of training images", len(bank))
    reported = REPORTED_K if REPORTED_K in ks else ks[0]
    metrics = {}
    for suffix, test in splits.tests.items():
        queries = sets.tests[suffix]
        correct = knn_num_correct(
            queries.features[representation].to(model.device),
            queries.labels,
            bank,
            bank_labels,
            ks,
            num_classes=splits.num_classes,
            temperature=cfg.knn_temperature,
            mapping=test.mapping,
        )
        top1 = [hits / len(test.data.labelled) for hits in all_reduce_sum_(correct).tolist()]
        metrics |= {f"top1{suffix}": top1[ks.index(reported)]}
        metrics |= {f"top1_k{k}{suffix}": value for k, value in zip(ks, top1, strict=True)}
    settings = {"k": reported, "temperature": cfg.knn_temperature, "resolution": cfg.resolution}
    return {**metrics, "settings": {"representation": representation, **settings}}


def fit_logreg(
    cfg: ClassificationConfig,
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n l"],
    num_classes: int,
    c: float,
    device: torch.device,
) -> LogisticModel:
    """Logistic regression on features scaled as the configuration says; the first label of an image counts."""
    targets = first_labels(labels).to(device)
    options: Any = {"scaling": cfg.feature_scaling, "max_iter": cfg.logreg_max_iter}
    return LogisticModel.fit(features.to(device), targets, num_classes, c, **options)


def evaluate_logreg(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, sets: FeatureSets, representation: str
) -> dict[str, Any]:
    """Logistic regression with all labels; C is chosen on the validation part, which then is fitted as well."""
    val_features, val_labels = sets.val.features[representation], sets.val.labels

    def fit(features: Tensor, labels: Tensor, c: float) -> LogisticModel:
        return fit_logreg(cfg, features, labels, splits.num_classes, c, model.device)

    def validate(c: float) -> float:
        return fit(*sets.fit(representation), c).num_correct(val_features, val_labels) / len(val_labels)

    val_top1 = spread(cfg.c_values, validate)
    c = cfg.c_values[best_of(val_top1)]
    all_features, all_labels = sets.bank.features[representation], sets.bank.labels
    if not splits.val_is_part_of_train:
        all_features, all_labels = torch.cat([all_features, val_features]), join(all_labels, val_labels)
    # One fit; the other ranks wait for its outcome.
    (fitted,) = spread([c], lambda c: fit(all_features, all_labels, c).to("cpu"))
    metrics = score_logreg(model, splits, sets, representation, [fitted])
    return {
        **{key: values[0] for key, values in metrics.items()},
        "val_top1": max(val_top1),
        "settings": {
            "representation": representation,
            "c": c,
            "scaling": cfg.feature_scaling,
            "resolution": cfg.resolution,
        },
        "grid": {f"c {c:g}": value for c, value in zip(cfg.c_values, val_top1, strict=True)},
    }


def score_logreg(
    model: FrozenModel, splits: Splits, sets: FeatureSets, representation: str, fitted: Sequence[LogisticModel]
) -> dict[str, list[float]]:
    """Accuracy of each of several fits on every test set; the ranks share the images."""
    return {
        f"top1{suffix}": accuracies(model, test, sets.tests[suffix], representation, fitted)
        for suffix, test in splits.tests.items()
    }


def accuracies(
    model: FrozenModel, test: TestSet, images: Extracted, representation: str, fitted: Sequence[LogisticModel]
) -> list[float]:
    """Accuracy of each of several fits on one test set; the ranks share the images."""
    features = images.features[representation]
    counts = [logistic.to(model.device).num_correct(features, images.labels, test.mapping) for logistic in fitted]
    return [hits / len(test.data.labelled) for hits in all_reduce_sum_(torch.tensor(counts)).tolist()]


def evaluate_few_label(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, sets: FeatureSets, representation: str
) -> dict[str, Any]:
    """Logistic regression with few labels, several times with other images; C is chosen on the validation part."""
    features, labels = sets.fit(representation)
    val_features, val_labels = sets.val.features[representation], sets.val.labels
    seeds = [derive_seed(cfg.seed, "few labels", repeat) for repeat in range(cfg.few_label_repeats)]
    rows = [choose_rows(labels, cfg.labels_per_class, seed, splits.train) for seed in seeds]

    def fit(repeat: int, c: float) -> LogisticModel:
        chosen = rows[repeat]
        return fit_logreg(cfg, features[chosen], labels[chosen], splits.num_classes, c, model.device)

    tasks = list(itertools.product(range(cfg.few_label_repeats), cfg.c_values))
    accuracies = spread(tasks, lambda task: fit(*task).num_correct(val_features, val_labels) / len(val_labels))
    val_top1 = torch.tensor(accuracies, dtype=torch.float64).view(cfg.few_label_repeats, -1).mean(0).tolist()
    c = cfg.c_values[best_of(val_top1)]
    fitted = spread(range(cfg.few_label_repeats), lambda repeat: fit(repeat, c).to("cpu"))
    metrics = score_logreg(model, splits, sets, representation, fitted)
    return {
        **{key: sum(values) / len(values) for key, values in metrics.items()},
        "val_top1": max(val_top1),
        "each_repeat": metrics,
        "settings": {
            "representation": representation,
            "c": c,
            "scaling": cfg.feature_scaling,
            "labels_per_class": cfg.labels_per_class,
            "num_labels": len(rows[0]),
            "repeats": cfg.few_label_repeats,
            "resolution": cfg.resolution,
        },
        "grid": {f"c {c:g}": value for c, value in zip(cfg.c_values, val_top1, strict=True)},
    }


LOW_SHOT_RESULT = "low_shot_avg_patch"


def evaluate_low_shot(cfg: ClassificationConfig, model: FrozenModel, results: Results, splits: Splits) -> None:
    """The logistic regression of arXiv:2308.00566 on mean patch features of few images, with nothing to choose.

    Features are standardised with their unbiased deviation, there is no intercept, and the optimum is reached; the
    published solver stops within 0.1 % of it. Tested twice: clean, and with the test images' own statistics.
    """
    if LOW_SHOT_RESULT in results:
        return
    train, chosen, settings = splits.train, splits.train.labelled, {}
    if cfg.low_shot_list is None:
        seed = derive_seed(cfg.seed, "few labels", 0)
        chosen = chosen[choose_rows(train.labels[chosen], cfg.labels_per_class, seed, train)]
        settings = {"labels_per_class": cfg.labels_per_class}
    else:
        chosen, digest = read_image_list(cfg.low_shot_list, train, "low_shot_list")
        require(
            len(first_labels(train.labels[chosen]).unique()) > 1,
            "low_shot_list",
            cfg.low_shot_list,
            "must name images of two classes or more",
        )
        settings = {"list_sha256": digest, "list_is_published": digest == ONE_PERCENT_SHA256}
    pooled = functools.partial(extract_pooled, cfg, model, representations=["avg_patch"])
    few = pooled(train, chosen, title="labelled images", gather=True)

    def fit(c: float) -> LogisticModel:
        fitted = LogisticModel.fit(
            few.features["avg_patch"].to(model.device),
            first_labels(few.labels).to(model.device),
            splits.num_classes,
            c,
            scaling="standard",
            max_iter=cfg.logreg_max_iter,
            correction=1,
            intercept=False,
        )
        return fitted.to("cpu")

    (fitted,) = spread([1 / cfg.low_shot_penalty], fit)  # one fit; the other ranks wait for its outcome
    metrics = {}
    for suffix, test in splits.tests.items():
        images = pooled(test.data, test.data.labelled, title=f"test images{suffix}", gather=False)
        variants = {"top1": fitted, TRANSDUCTIVE: fitted.with_statistics_of(images.features["avg_patch"])}
        values = accuracies(model, test, images, "avg_patch", list(variants.values()))
        metrics |= {f"{name}{suffix}": value for name, value in zip(variants, values, strict=True)}
    settings = {"representation": "avg_patch", "penalty": cfg.low_shot_penalty, "num_labels": len(chosen), **settings}
    sizes = {
        "resolution": cfg.resolution,
        "resize": as_written(cfg.test_box),
        "interpolation": cfg.resize_interpolation,
    }
    results.add(LOW_SHOT_RESULT, {**metrics, "settings": settings | sizes})


class FeatureReadout(NamedTuple):
    """A method that needs the features of whole data sets alone, which all of these share, on one representation."""

    method: str
    """One of `METHODS`."""
    representation: str
    """One of `POOLED`."""
    evaluate: Callable[[ClassificationConfig, FrozenModel, Splits, FeatureSets, str], dict[str, Any]]
    """Its result, from the arguments of `evaluate_knn`."""

    @property
    def name(self) -> str:
        """The key of its result in the result file."""
        return f"{self.method}_{self.representation}"


FEATURE_READOUTS = (
    FeatureReadout("knn", "cls", evaluate_knn),
    FeatureReadout("knn", "avg_patch", evaluate_knn),
    FeatureReadout("logreg", "avg_patch", evaluate_logreg),
    FeatureReadout("few_label", "avg_patch", evaluate_few_label),
)


# --------------------------------------------------------------------------------------------------- results


def representation_shapes(cfg: ClassificationConfig, model: FrozenModel) -> dict[str, torch.Size]:
    """Shape of each representation of one image, from a forward pass of a black one.

    Raises: UserError if the resolution does not fit the patch size, or the model lacks a representation.
    """
    model.grid(cfg.resolution)  # raises
    features = model(model.blank(cfg.resolution))
    names = {"cls", "avg_patch"} | (set(cfg.representations) if "classifiers" in cfg.methods else set())
    return {name: represent(features, name).shape[1:] for name in sorted(names)}


def evaluate(cfg: ClassificationConfig, model: FrozenModel, results: Results) -> None:
    """Run the chosen methods; those whose results are there are skipped."""
    shapes = representation_shapes(cfg, model)
    splits = open_splits(
        cfg.train_dataset_name,
        cfg.val_dataset_name,
        cfg.test_dataset_names,
        val_proportion=cfg.val_proportion,
        num_classes=cfg.num_classes,
        all_classes=not set(cfg.methods) <= {"knn", "low_shot"},  # nothing is chosen for them
        only_test_classes=cfg.only_test_classes,
        bands=model.bands,
    )
    results.note_data(
        train_dataset_name=splits.train.dataset,
        **({} if splits.val_is_part_of_train else {"val_dataset_name": splits.val.dataset}),
        **{f"test_dataset_names{suffix}": test.data.dataset for suffix, test in splits.tests.items()},
    )
    has_transductive = not {"low_shot", "attentive_probe"}.isdisjoint(cfg.methods)
    meanings = {"top1": TOP1} | ({TRANSDUCTIVE: TRANSDUCTIVE_MEANING} if has_transductive else {})
    results.declare_scores(
        *(Score((f"{name}{suffix}",), terms={name: meanings[name]}) for name in meanings for suffix in splits.tests)
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
        test_resize=as_written(cfg.test_box),
    )
    num_fit = len(splits.fit)
    recipes: dict[str, Callable[[], Recipe]] = {
        "classifiers": lambda: classifiers_recipe(cfg, model, shapes),
        "vissl": lambda: vissl_recipe(cfg, model, num_fit),
        "linear_probe": lambda: linear_probe_recipe(cfg, model, num_fit),
        "attentive_probe": lambda: attentive_probe_recipe(cfg, model, num_fit),
    }
    for method in [method for method in recipes if method in cfg.methods]:
        with timed(results, method):
            evaluate_classifiers(cfg, model, results, splits, recipes[method]())
    if "low_shot" in cfg.methods:
        with timed(results, LOW_SHOT_RESULT):
            evaluate_low_shot(cfg, model, results, splits)
    todo = [readout for readout in FEATURE_READOUTS if readout.method in cfg.methods and readout.name not in results]
    if not todo:
        return
    with timed(results, "features"):
        names = sorted({readout.representation for readout in todo})
        with_val = any(readout.method != "knn" for readout in todo)
        sets = extract_feature_sets(cfg, model, splits, names, with_val=with_val)
    for readout in todo:
        with timed(results, readout.name):
            results.add(readout.name, readout.evaluate(cfg, model, splits, sets, readout.representation))


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
