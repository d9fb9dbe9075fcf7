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
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
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
from labels import Labelled, Splits, choose_rows, first_labels, join, label_list, open_splits, pad
from optim import scheduled
from readouts import (
    SCALINGS,
    CheckpointFile,
    Classifiers,
    LogisticModel,
    StackedAdamW,
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
from sources import BadImageError
from utils import UserError, derive_seed, due

logger = logging.getLogger("eval_classification")

METHODS = ("classifiers", "knn", "logreg", "few_label")
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
    """Numbers of neighbours. top1 is that of 20 if it is among them, else of the first."""
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


# ---------------------------------------------------------------------------------------------------- images


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
        return self.transform(image), pad([label_list(target, "label")], self.num_labels)[0]


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
    """This rank's batches from `step` on, without end; all ranks together see the same whatever their number is."""
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


def start_training(
    cfg: ClassificationConfig, shapes: Mapping[str, torch.Size], num_classes: int, device: torch.device
) -> Training:
    """Fresh classifiers of every representation, one for each learning rate and weight decay."""
    chosen = {name: shapes[name] for name in cfg.representations}
    classifiers = make_classifiers(chosen, len(cfg.grid), num_classes, cfg.seed).to(device)
    learning_rates, weight_decays = torch.tensor(cfg.grid, device=device).T
    scale = cfg.batch_size_per_gpu * world_size() / LR_BATCH_SIZE
    return Training(classifiers, StackedAdamW(classifiers, learning_rates * scale, weight_decays))


def train_classifiers(
    cfg: ClassificationConfig, model: FrozenModel, splits: Splits, training: Training, checkpoint: CheckpointFile
) -> None:
    """Train all classifiers to the end, with a validation and a checkpoint now and then."""
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
            features = model(images, check_finite=training.step == 0)
            inputs = {name: represent(features, name) for name in training.classifiers}
            labels = labels.to(model.device, non_blocking=True)
            losses = train_step(training, inputs, labels, scheduled(schedule, training.step, cfg.n_iters))
            bar.update()
            if training.step == cfg.n_iters or due(training.step, cfg.save_checkpoint_period):
                val_images = image_batches(cfg, model, splits.val, splits.val_indices, "validation")
                scores = score_classifiers(model, training.classifiers, val_images)
                training.validations[training.step] = scores
                checkpoint.save(training)
                for name, values in scores.items():
                    number = best_of(values)
                    logger.info(
                        "step %d, %s: validation top-1 %.4f, lr %g, weight decay %g, training loss %.4f",
                        training.step, name, values[number], *cfg.grid[number], losses[name][number].item(),
                    )  # fmt: skip


def score_classifiers(
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
        for name, (top1,) in score_classifiers(model, best, batches, test.mapping).items():
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
    metrics = {}
    for suffix, test in splits.tests.items():
        features, labels = sets.tests[suffix].features[representation], sets.tests[suffix].labels
        counts = [logistic.to(model.device).num_correct(features, labels, test.mapping) for logistic in fitted]
        num_images = len(test.data.labelled)
        metrics[f"top1{suffix}"] = [hits / num_images for hits in all_reduce_sum_(torch.tensor(counts)).tolist()]
    return metrics


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
    splits = open_splits(
        cfg.train_dataset_name,
        cfg.val_dataset_name,
        cfg.test_dataset_names,
        val_proportion=cfg.val_proportion,
        num_classes=cfg.num_classes,
        all_classes=set(cfg.methods) != {"knn"},  # nothing is chosen for it
    )
    results.note_data(
        train_dataset_name=splits.train.dataset,
        **({} if splits.val_is_part_of_train else {"val_dataset_name": splits.val.dataset}),
        **{f"test_dataset_names{suffix}": test.data.dataset for suffix, test in splits.tests.items()},
    )
    results.declare_scores(*(Score((f"top1{suffix}",), terms={"top1": TOP1}) for suffix in splits.tests))
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
