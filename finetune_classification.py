"""Train a backbone and a linear head to classify images: fine-tuning as in BEiT and MAE.

    python finetune_classification.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue
    python finetune_classification.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python finetune_classification.py config.yaml train.output_dir=DIR --export    write model.pth of a run

data.dataset is a folder with one folder of images per class, or any labelled data URL. Later files and overrides win
over earlier ones, and all over configs/finetune/classification.yaml.
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import functools
import importlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

import finetuning
from config import BETWEEN_0_AND_1, FRACTION, NOT_NEGATIVE, one_of, require
from data import Batch, PretrainLoader, seeded
from distributed import rank
from evaluation import FrozenModel, ImageBatches, Results, extract
from finetuning import FinetuneConfig, Task, Trunk
from labels import Labelled, choose_rows, first_labels, label_list, open_labelled, pad
from pictures import show
from reading.crops import cut, draw_crop
from reading.sources import ImageDataset, Sample, match_classes, parse_data_url
from report import Score
from sheets import Column
from utils import UserError, derive_seed

NORM_EPS = 1e-6

# --- Knobs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassificationConfig:
    """Labels, head, and how images are changed."""

    pooling: str = field(metadata=one_of("avg_patch", "cls"))
    """What the head reads: the mean of the last block's patches, or the model's representation of the image."""
    labels_per_class: int | float | None
    """How many labelled images of each class are used, or which fraction of them; null for all. train.seed chooses."""
    init_scale: float = field(metadata=NOT_NEGATIVE)
    """What the head's first weights are multiplied by."""
    label_smoothing: float = field(metadata=BETWEEN_0_AND_1)
    """Part of each target that is shared out among all classes."""
    mixup: float = field(metadata=NOT_NEGATIVE)
    """Parameter of the Beta distribution by which pairs of images are blended (arXiv:1710.09412); 0 for none."""
    cutmix: float = field(metadata=NOT_NEGATIVE)
    """The same for boxes of one image that are put into another (arXiv:1905.04899)."""
    switch_prob: float = field(metadata=FRACTION)
    """Where there are both, the part of the batches that get boxes."""
    rand_augment: str | None
    """timm's description of RandAugment (arXiv:1909.13719), such as rand-m9-mstd0.5-inc1; null for none."""
    random_erasing: float = field(metadata=FRACTION)
    """Part of the images of which a box is filled with noise (arXiv:1708.04896)."""

    def __post_init__(self) -> None:
        """Check the number of labels."""
        wanted = self.labels_per_class
        is_number = not isinstance(wanted, bool) and isinstance(wanted, int | float)
        fits = wanted is None or (is_number and (wanted >= 1 if isinstance(wanted, int) else 0 < wanted <= 1))
        remedy = "must be a whole number from 1 on, a fraction up to 1.0, or null"
        require(fits, "classification.labels_per_class", wanted, remedy)


@dataclass(frozen=True)
class FinetuneClassificationConfig(FinetuneConfig):
    """Everything `finetune_classification.py` reads."""

    SECTION = "classification"

    classification: ClassificationConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        own, size = self.classification, self.optim.batch_size_per_gpu
        remedy = "must be even: Mixup and CutMix make pairs; or set classification.mixup=0 classification.cutmix=0"
        require(not (own.mixup or own.cutmix) or size % 2 == 0, "optim.batch_size_per_gpu", size, remedy)


# --- Images and labels -----------------------------------------------------------------------------------------------


class LabelledImages(ImageDataset):
    """Some images of a labelled set; the target of each is its first label."""

    def __init__(self, data: Labelled, rows: Int64[Tensor, " n"]) -> None:
        self.whole, self.rows = data.dataset, rows
        self.targets = first_labels(data.labels)[rows]

    def fingerprint(self) -> str:
        """Of the whole set."""
        return self.whole.fingerprint()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.whole[int(self.rows[index])], read_target=functools.partial(int, self.targets[index]))


def class_folders(url: str) -> str:
    """The data URL for a place that is given as one, a folder or archives: with one folder of images per class."""
    parsed = parse_data_url(url)
    is_plain = (parsed.source, parsed.name) == ("custom", "Images")
    arguments = "&".join(f"{name}={value!r}" for name, value in parsed.kwargs.items())
    return f"torchvision://ImageFolder?{arguments}" if is_plain else url


def open_training_images(cfg: FinetuneClassificationConfig) -> tuple[FinetuneClassificationConfig, LabelledImages]:
    """The images that are trained on, and the configuration with their classes and their number.

    Raises: UserError if there are no labels, or one class only.
    """
    url, chosen = cfg.data.only_dataset, cfg.classification.labels_per_class
    data = open_labelled(class_folders(url), "data.dataset")
    rows = data.labelled
    if chosen is not None:
        rows = rows[choose_rows(data.labels[rows], chosen, cfg.train.seed, data)]
    images = LabelledImages(data, rows)
    present = images.targets.unique()
    if len(present) < 2:
        named = data.name_of(int(present[0]))
        raise UserError(f"data.dataset={url}: all images are of class {named}; classification needs two or more")
    names = data.class_names or list(map(str, range(int(present.max()) + 1)))
    num_images = cfg.data.images_per_epoch or len(images)
    return replace(cfg, classes=names, data=replace(cfg.data, images_per_epoch=num_images)), images


def timm() -> Any:
    """The package timm.

    Raises: UserError that says how to install it.
    """
    try:
        return importlib.import_module("timm.data")
    except ImportError as error:
        raise UserError(
            f"RandAugment, Mixup, CutMix and random erasing are timm's, which is missing ({error}): pip install -e "
            "'.[finetuning]', or leave them out (classification.rand_augment=null classification.mixup=0 "
            "classification.cutmix=0 classification.random_erasing=0)"
        ) from error


@contextmanager
def seeded_python(seed: int) -> Iterator[None]:
    """Seed the generators of Python and NumPy, which timm draws from, and put them back afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # timm draws from it
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


class LabelledCrops:
    """Random crops, flipped and changed by RandAugment, with their labels; a `data.Maker`."""

    def __init__(self, cfg: FinetuneClassificationConfig) -> None:
        self.cfg, self.seed = cfg, cfg.train.seed
        self._augment: Callable[[Image.Image], Image.Image] | None = None

    def batch_bytes(self, batch_size: int) -> int:
        """See `data.Maker`."""
        return batch_size * (3 * self.cfg.data.images_size**2 + 16)

    def make(self, sample: Sample, *key: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        """A crop and the label."""
        data, own = self.cfg.data, self.cfg.classification
        pixels = sample.pixels()
        crop = draw_crop(pixels.shape[2], pixels.shape[1], data.crop_scale, data.do_hflip, self.seed, *key)
        image = cut(pixels, crop, data.images_size)
        if own.rand_augment is not None:
            if self._augment is None:  # here, in the process that calls it
                self._augment = rand_augment(own.rand_augment, data.images_size, self.cfg.backbone.normalisation.mean)
            with seeded_python(derive_seed(self.seed, "RandAugment", *key)):
                changed = self._augment(Image.fromarray(image.movedim(0, -1).contiguous().numpy()))
            image = torch.from_numpy(np.array(changed)).movedim(-1, 0)
        return image, sample.target()

    def batch(
        self,
        crops: Sequence[tuple[Tensor, int]],
        keys: list[tuple[int, ...]],
        sample_ids: list[int],
        bad: list[tuple[str, str]],
    ) -> Batch:
        """See `data.Maker`."""
        return finetuning.stacked(crops, sample_ids, bad)


def rand_augment(description: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as its own training gives it to images of `size` pixels; what is shifted in is mean grey.

    Raises: UserError for a description that timm does not know.
    """
    grey = tuple(min(255, round(255 * x)) for x in mean)
    kwargs = {"translate_const": int(size * 0.45), "img_mean": grey, "interpolation": Image.Resampling.BICUBIC}
    try:
        return timm().rand_augment_transform(description, kwargs)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"classification.rand_augment={description}: timm does not know it ({error!r}); an example is "
            "rand-m9-mstd0.5-inc1"
        ) from error


def make_loader(cfg: FinetuneClassificationConfig, images: LabelledImages, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`."""
    return PretrainLoader(
        cfg.data,
        None,
        maker=LabelledCrops(cfg),
        dataset=images,
        seed=cfg.train.seed,
        batch_size=cfg.optim.batch_size_per_gpu,
        num_workers=cfg.efficiency.dataloader_num_workers,
        **place,
    )


# --- Head and loss ---------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """A norm and a linear layer.

    Args:
        dim: channels that are read.
        num_classes: outputs.
        init_scale: what the first weights, of a truncated normal of std 0.02, are multiplied by.
        norm: of the backbone, whose weights the norm begins with; None begins with the identity.
    """

    def __init__(self, dim: int, num_classes: int, init_scale: float, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        with torch.no_grad():
            self.linear.weight.mul_(init_scale)
        nn.init.zeros_(self.linear.bias)
        if norm is not None:
            self.norm.load_state_dict(norm.state_dict())

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.linear(self.norm(x))


def head_inputs(cfg: FinetuneClassificationConfig, trunk: Trunk, images: Tensor) -> list[Float[Tensor, "b d"]]:
    """The vector of each image that the head reads."""
    if cfg.classification.pooling == "cls":
        return [trunk.backbone(images)[0]]
    return [trunk.maps(images, [-1])[0].mean((2, 3))]


def make_head(cfg: FinetuneClassificationConfig, trunk: Trunk) -> LinearHead:
    """A head for the classes, whose norm takes the place of the backbone's last one if it is of the same kind."""
    with torch.no_grad():
        size = finetuning.probe_size(cfg, trunk)
        dim = head_inputs(cfg, trunk, torch.zeros(1, 3, size, size))[0].shape[1]
    norm = trunk.final_norm if cfg.classification.pooling == "avg_patch" else None
    fits = norm is not None and norm.normalized_shape == (dim,)
    return LinearHead(dim, len(cfg.classes), cfg.classification.init_scale, norm if fits else None)


def predict(cfg: FinetuneClassificationConfig, model: nn.ModuleDict, trunk: Trunk, images: Tensor) -> Tensor:
    """Logits [b, classes] of normalised images."""
    return model["head"](*head_inputs(cfg, trunk, images))


def soft_cross_entropy(logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean cross-entropy between soft targets and `softmax(logits)`, in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def make_loss(cfg: FinetuneClassificationConfig) -> finetuning.Loss:
    """Cross-entropy with smoothed targets, of images that are erased in part, blended and cut into each other."""
    own, num_classes = cfg.classification, len(cfg.classes)
    mix = erase = None
    if own.mixup or own.cutmix:
        mix = timm().Mixup(
            mixup_alpha=own.mixup,
            cutmix_alpha=own.cutmix,
            switch_prob=own.switch_prob,
            label_smoothing=own.label_smoothing,
            num_classes=num_classes,
        )
    if own.random_erasing:
        erase = timm().random_erasing.RandomErasing(own.random_erasing, mode="pixel", device="cpu")

    def loss(model: nn.ModuleDict, trunk: Trunk, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        images, labels = batch.images, batch.labels["label"]
        seed = int(torch.randint(2**31, (), generator=generator))
        with seeded_python(seed), seeded(seed):
            if erase is not None:
                erase.device = images.device.type
                images = erase(images.clone())
            if mix is not None:
                images, targets = mix(images.clone(), labels)
            else:
                off = own.label_smoothing / num_classes
                targets = F.one_hot(labels, num_classes).float() * (1 - own.label_smoothing) + off
        return {"cross_entropy": soft_cross_entropy(predict(cfg, model, trunk, images), targets.to(images.device))}

    return loss


# --- Scores ----------------------------------------------------------------------------------------------------------

TOP = 5


class CentreCropped:
    """Resize the shorter side, cut out the centre, and hand over the labels; see `evaluation.Prepare`."""

    def __init__(self, size: int, num_labels: int) -> None:
        self.size, self.num_labels = size, num_labels

    def __call__(self, image: Image.Image, target: Any) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, " l"]]:
        """As MAE tests: for 224 pixels, bicubic to 256 and the centre of that."""
        shorter = round(self.size * 256 / 224)
        scale = shorter / min(image.size)
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        crop = np.array(resized.crop((left, top, left + self.size, top + self.size)))
        labels = pad([label_list(target, "label")], self.num_labels)[0]
        return torch.from_numpy(crop).movedim(-1, 0).contiguous(), labels


def evaluate(cfg: Any, model: FrozenModel, results: Results) -> None:
    """Accuracy; of an image with several labels, one of them has to be predicted."""
    trained: Any = model.module.cfg
    data = open_labelled(class_folders(cfg.test_dataset_name), "test_dataset_name")
    results.note_data(test_dataset_name=data.dataset)
    results.declare_scores(
        Score(("top1",), "accuracy"),
        Score(("top5",), f"accuracy of {TOP} guesses"),
        Score(("mean_acc",), "mean accuracy of classes"),
    )
    if "finetuned" in results:
        return
    numbers = match_classes(data.class_names, data.where, trained.classes, "the classes that were trained")
    highest = int(data.labels.max()) if numbers is None else max(numbers)
    if highest >= len(trained.classes):
        raise UserError(f"{data.where}: has class {highest}, and the model knows {len(trained.classes)}, from 0 on")
    size = cfg.resolution or trained.data.images_size
    batches = ImageBatches(
        data.dataset,
        CentreCropped(size, data.labels.shape[1]),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=data.labelled.tolist(),
        pin=model.device.type == "cuda",
        title="test images",
    )
    network: Any = model.module
    num_guesses = min(TOP, len(trained.classes))

    def logits(images: Tensor) -> Tensor:
        return model.run(network.predict, images).float()

    def guess(scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return scores.topk(num_guesses).indices, labels

    guesses, labels = extract(logits, batches, guess)
    if numbers is not None:
        labels = torch.where(labels < 0, labels, torch.tensor(numbers)[labels])
    hits = (guesses.unsqueeze(2) == labels.unsqueeze(1)).any(dim=2)
    right, first = hits[:, 0].double(), first_labels(labels)
    of_classes = torch.stack([right[first == label].mean() for label in first.unique()])
    scores = {"top1": float(right.mean()), "mean_acc": float(of_classes.mean())}
    if num_guesses == TOP < len(trained.classes):
        scores["top5"] = float(hits.any(dim=1).double().mean())
    results.add("finetuned", {**scores, "num_images": len(labels), "resolution": size})
    draw(cfg, data, trained.classes, guesses[:, 0], first, results)


def draw(cfg: Any, data: Labelled, classes: Sequence[str], guesses: Tensor, labels: Tensor, results: Results) -> None:
    """Some images, evenly spaced, with what was predicted and, where that is wrong, what is true."""
    if rank() > 0 or not cfg.num_pictures:
        return
    from matplotlib.figure import Figure

    chosen = torch.linspace(0, len(labels) - 1, min(cfg.num_pictures, len(labels))).round().long().tolist()
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, place in zip(axes[: len(chosen)], chosen, strict=True):
        image = data.dataset[int(data.labelled[place])].image()
        image.thumbnail((224, 224))
        guess, truth = int(guesses[place]), int(labels[place])
        show(ax, np.array(image), classes[guess] if guess == truth else f"{classes[guess]}\nnot {classes[truth]}")
        ax.title.set_color("#1a7f37" if guess == truth else "#cf222e")
    for ax in axes[len(chosen) :]:
        ax.set_axis_off()
    figure.savefig(results.artifacts() / "predictions.png")


# --- The command -----------------------------------------------------------------------------------------------------


def look(cfg: FinetuneClassificationConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet says of crops: their classes, before any are mixed."""
    return [Column("class", [], [cfg.classes[number] for number in batch.labels["label"][:num_images].tolist()])]


TASK = Task(
    schema=FinetuneClassificationConfig,
    defaults="configs/finetune/classification.yaml",
    open_data=open_training_images,
    make_head=make_head,
    head_inputs=head_inputs,
    loss=make_loss,
    make_loader=make_loader,
    predict=predict,
    evaluate=evaluate,
    look=look,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    return finetuning.main(TASK, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
