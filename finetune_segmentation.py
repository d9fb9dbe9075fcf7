"""Train a backbone and a head to segment images: UperNet on a simple pyramid as in BEiT, or a linear layer.

    python finetune_segmentation.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue
    python finetune_segmentation.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python finetune_segmentation.py config.yaml train.output_dir=DIR --export    write model.pth of a run

data.dataset is a data URL of images with label images, such as custom://Segmentation?root='/data/train'. Later files
and overrides win over earlier ones, and all over configs/finetune/segmentation.yaml.
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from numpy.random import Generator
from PIL import Image
from torch import Tensor, nn

import finetuning
from config import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, one_of, require, within
from data import Batch, PretrainLoader
from distributed import all_reduce_sum_, gather_objects, rank, world_size
from eval_segmentation import (
    NUM_LABELS,
    SCORES,
    check_label_image,
    confusion_matrix,
    draw_predictions,
    segmentation_metrics,
)
from evaluation import FrozenModel, ImageBatches, Results, open_dataset
from finetuning import FinetuneConfig, Task, Trunk
from optim import scheduled
from reading.sources import UNLABELLED, ImageDataset, Sample, SegmentationDataset, match_classes, parse_data_url
from sheets import Column, class_colours
from tasks.pyramid import SimplePyramid, SyncedBatchNorm, synchronise_
from utils import UserError, derive_seed

logger = logging.getLogger("segmentation")

# --- Knobs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentationConfig:
    """Labels, head, how images are changed, and how the learning rate falls. data.crop_scale does not count."""

    head: str = field(metadata=one_of("uper", "linear"))
    """uper: UperNet (arXiv:1807.10221) on a simple pyramid of four blocks, with an auxiliary head. linear: a batch norm
    and a linear layer on the last block's normed patches, as in DINOv3."""
    blocks: list[int] | None = field(metadata=within(at_least=0, size=4))
    """After which blocks uper reads, for the finest map first; the first block is 0. null: four that are evenly spaced,
    the last one among them."""
    channels: int = field(metadata=COUNT)
    """Of uper's convolutions."""
    dropout: float = field(metadata=within(at_least=0, below=1))
    """Probability that a channel is 0 for an image, before the last layer of each head."""
    auxiliary_weight: float = field(metadata=NOT_NEGATIVE)
    """What the loss of uper's auxiliary head is multiplied by, which reads the third map; 0 leaves it out."""
    auxiliary_channels: int = field(metadata=COUNT)
    """Of its one convolution."""
    num_classes: int | None = field(metadata=within(at_least=2, below=NUM_LABELS))
    """How many labels count, for data without names of classes; null for data that have them, and ADE20K and VOC."""
    ignore_labels: list[int] | None = field(metadata=within(at_least=0, below=NUM_LABELS))
    """Labels of pixels that do not count, beside 255; the others are numbered anew without them. null: those that the
    data set leaves out, such as classes.txt's in parentheses."""
    reduce_zero_label: bool
    """Label 0 does not count, and label 1 is the first class. ADE20K leaves it out by itself."""
    resize: tuple[int, int] = field(metadata=within(at_least=1, size=2))
    """Images are resized, with their aspect, to fit into so many pixels along their longer and shorter side."""
    resize_ratio: tuple[float, float] = field(metadata=within(above=0, size=2, ascending=True))
    """While training, both numbers are multiplied by one that is uniform in this range."""
    cat_max_ratio: float = field(metadata=FRACTION)
    """Another crop is tried, ten times, while more of its counting pixels are of one class than this; 1 takes any."""
    photometric_distortion: bool
    """Change brightness, contrast, saturation and hue, each of half of the crops."""
    poly_power: float | None = field(metadata=POSITIVE)
    """The learning rate falls from optim.lr_schedule.base_value by (1 - step / steps) to this power, and is multiplied
    by a factor that rises linearly in the warm-up, as in mmsegmentation. null: a half cosine, see `optim.scheduled`."""

    def __post_init__(self) -> None:
        """Check the order of blocks."""
        blocks = self.blocks
        remedy = "must be ascending: the first is for the finest map"
        require(blocks is None or blocks == sorted(blocks), "segmentation.blocks", blocks, remedy)


@dataclass(frozen=True)
class FinetuneSegmentationConfig(FinetuneConfig):
    """Everything `finetune_segmentation.py` reads."""

    SECTION = "segmentation"

    segmentation: SegmentationConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        schedule, power = self.optim.lr_schedule, self.segmentation.poly_power
        if power is not None:
            remedy = "is for a half cosine, segmentation.poly_power=null; leave it at"
            require(schedule.freeze_iters == 0, "optim.lr_schedule.freeze_iters", schedule.freeze_iters, f"{remedy} 0")
            key, value = "optim.lr_schedule.truncate_cos", schedule.truncate_cos
            require(value == 1, key, value, f"{remedy} 1.0")
            remedy = "must not be above base_value, to which the warm-up rises"
            key, value = "optim.lr_schedule.start_warmup_value", schedule.start_warmup_value
            require(value <= schedule.base_value, key, value, remedy)


def lr_at(step: int, cfg: FinetuneSegmentationConfig) -> float:
    """Learning rate of the head in the update after `step` finished ones.

    mmsegmentation's: in the warm-up the falling rate is multiplied by a share that rises linearly from that of the
    start value to 1; where the warm-up ends, the rate has fallen already.
    """
    schedule, total, power = cfg.optim.lr_schedule, cfg.optim.total_iters, cfg.segmentation.poly_power
    if power is None:
        return scheduled(schedule, step, total)
    if step >= total:
        return schedule.final_value
    lr = schedule.final_value + (schedule.base_value - schedule.final_value) * (1 - step / total) ** power
    warmup = schedule.warmup_steps(total)
    if step < warmup:
        start = schedule.start_warmup_value / schedule.base_value if schedule.base_value else 1.0
        lr *= 1 - (1 - step / warmup) * (1 - start)
    return lr


# --- Images and labels -----------------------------------------------------------------------------------------------

PUBLISHED_CLASSES = {"ADE20K": 150, "VOC2012": 21}
"""Labels that count in data sets which come without names of classes."""
UNKNOWN = -1
CROP_TRIES = 10


@dataclass(frozen=True)
class LabelNumbers:
    """What the numbers in the label images of a data set mean."""

    classes: list[str]
    """What each number that the model learns is called: its name in the data set, or its number there."""
    table: Int64[Tensor, "256"]
    """The model's number of each of the data set's; `UNLABELLED` for those that do not count, `UNKNOWN` for others."""

    def read(self, target: Any, width: int, height: int) -> UInt8[Tensor, "h w"]:
        """The model's numbers of a label image.

        Args:
            target: the label image.
            width: of its image.
            height: of its image.

        Raises: UserError for a label that is no class, or as `check_label_image`.
        """
        stored = torch.from_numpy(np.array(check_label_image(target, width, height)))
        labels = self.table[stored.long()]
        unknown = stored[labels == UNKNOWN]
        if len(unknown):
            label = int(unknown.flatten()[0])
            raise UserError(
                f"the label image has label {label}, which is none of the {len(self.classes)} classes; name it in "
                "classes.txt, as `(void)` if it does not count, give segmentation.num_classes, or list it in "
                "segmentation.ignore_labels"
            )
        return labels.to(torch.uint8)


def number_labels(cfg: SegmentationConfig, dataset: ImageDataset, key: str, url: str) -> LabelNumbers:
    """Number the labels of a data set that count, from 0 on in their order.

    Args:
        cfg: which ones do.
        dataset: the data set, for its names.
        key: of the configuration, for messages.
        url: of the data set.

    Raises: UserError if it is not known how many there are, or there are fewer than two.
    """
    # Names that other sources have may be those of whole images.
    names = dataset.class_names if isinstance(dataset, SegmentationDataset) else []
    ignored = set(dataset.ignore_labels if cfg.ignore_labels is None else cfg.ignore_labels) | {UNLABELLED}
    ignored |= {0} if cfg.reduce_zero_label else set()
    counting = [label for label in range(len(names) or NUM_LABELS) if label not in ignored]
    number = cfg.num_classes
    if names:
        remedy = f"{key}={url} names {len(counting)} classes that count; leave it null"
        require(number in (None, len(counting)), "segmentation.num_classes", number, remedy)
    else:
        parsed = parse_data_url(url, key)
        if number is None and parsed.source == "custom":
            number = PUBLISHED_CLASSES.get(parsed.name)
        if number is None:
            raise UserError(
                f"{key}={url}: it does not say how many classes there are; put classes.txt there, with a name a line, "
                "or give segmentation.num_classes"
            )
        require(number <= len(counting), "segmentation.num_classes", number, f"only {len(counting)} labels count")
        counting = counting[:number]
    if len(counting) < 2:
        raise UserError(f"{key}={url}: {len(counting)} labels count, and segmentation needs two or more")
    table = torch.full((NUM_LABELS,), UNKNOWN)
    table[sorted(ignored)] = UNLABELLED
    table[counting] = torch.arange(len(counting))
    return LabelNumbers([names[label] if names else str(label) for label in counting], table)


class NumberedImages(NamedTuple):
    """Images with masks, and what the numbers in these become."""

    dataset: ImageDataset
    numbers: LabelNumbers


def open_training_images(cfg: FinetuneSegmentationConfig) -> tuple[FinetuneSegmentationConfig, NumberedImages]:
    """The images that are trained on, and the configuration with their classes and their number.

    Raises: UserError as `open_dataset` and `number_labels`.
    """
    dataset = open_dataset(cfg.data.only_dataset, "data.dataset")
    numbers = number_labels(cfg.segmentation, dataset, "data.dataset", cfg.data.only_dataset)
    num_images = cfg.data.images_per_epoch or len(dataset)
    data = replace(cfg.data, images_per_epoch=num_images)
    return replace(cfg, classes=numbers.classes, data=data), NumberedImages(dataset, numbers)


def fitted_size(width: int, height: int, longer: float, shorter: float) -> tuple[int, int]:
    """Width and height of an image that is resized, with its aspect, to fit into `longer` x `shorter` pixels."""
    scale = min(longer / max(width, height), shorter / min(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def resized(pixels: UInt8[Tensor, "c h w"], width: int, height: int, mode: str) -> UInt8[Tensor, "c height width"]:
    """An image, bilinear and antialiased where it shrinks, or a label image, nearest-exact: both keep their centres."""
    return F.interpolate(pixels[None], size=(height, width), mode=mode, antialias=mode == "bilinear")[0]


def mean_colour(image_mean: tuple[float, ...]) -> UInt8[Tensor, "3 1 1"]:
    """What images are padded with, which is close to 0 once they are normalised."""
    return (255 * torch.tensor(image_mean)).round().to(torch.uint8).view(3, 1, 1)


def padded(pixels: UInt8[Tensor, "c h w"], size: int, colour: Tensor | int) -> UInt8[Tensor, "c h2 w2"]:
    """At least `size` pixels along both sides, by more of a colour to the right and below."""
    channels, height, width = pixels.shape
    if height >= size and width >= size:
        return pixels
    whole = torch.empty(channels, max(size, height), max(size, width), dtype=torch.uint8).copy_(torch.as_tensor(colour))
    whole[:, :height, :width] = pixels
    return whole


def draw_place(labels: UInt8[Tensor, "h w"], size: int, cat_max_ratio: float, random: Generator) -> tuple[int, int]:
    """Top and left of a crop of `size` pixels, in which no class has more than a part of the counting pixels.

    mmsegmentation's: the tenth place is taken as it is, and one with a single class counts as all of one.
    """
    height, width = labels.shape
    top = left = 0
    for _ in range(CROP_TRIES):
        top, left = (int(random.integers(0, max(side - size, 0) + 1)) for side in (height, width))
        if cat_max_ratio == 1:
            break
        inside = labels[top : top + size, left : left + size].flatten()
        counts = inside.bincount(minlength=NUM_LABELS)[:UNLABELLED]
        if int((counts > 0).sum()) > 1 and int(counts.max()) < cat_max_ratio * int(counts.sum()):
            break
    return top, left


BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18 / 180
"""Largest shift in grey levels, factors of contrast and saturation, and the largest shift as a part of all hues."""


def distorted(image: UInt8[Tensor, "3 h w"], random: Generator) -> UInt8[Tensor, "3 h w"]:
    """Brightness, contrast, saturation and hue changed, each with probability one half: SSD's photometric distortion.

    In the order of mmsegmentation, in which contrast comes second or last. Computed in float32 and rounded once, where
    it rounds down after each. Saturation and hue are those of HSV.
    """
    from torchvision.transforms.v2.functional import adjust_hue

    does = random.random(4) < 0.5
    shift, hue = random.uniform(-BRIGHTNESS, BRIGHTNESS), random.uniform(-HUE, HUE)
    contrast, saturation = random.uniform(*CONTRAST), random.uniform(*SATURATION)
    contrast_last = random.random() < 0.5
    x = image.float() / 255
    if does[0]:
        x = (x + shift / 255).clamp(0, 1)
    if does[1] and not contrast_last:
        x = (x * contrast).clamp(0, 1)
    if does[2]:
        x = saturated(x, saturation)
    if does[3]:
        x = adjust_hue(x, hue)
    if does[1] and contrast_last:
        x = (x * contrast).clamp(0, 1)
    return (255 * x).round().clamp(0, 255).to(torch.uint8)


def saturated(x: Float[Tensor, "3 h w"], factor: float) -> Float[Tensor, "3 h w"]:
    """The saturation of HSV times a factor, up to 1; value and hue stay."""
    value = x.amax(dim=0)
    below = value - x  # what each channel lacks of the largest one, in proportion to the saturation
    largest = value / below.amax(dim=0).clamp_min(1e-9)
    return value - below * largest.clamp(max=factor)


class LabelledCrops:
    """Random crops with their label images, as in mmsegmentation's recipe for ADE20K; a `data.Maker`.

    Resized by a random ratio, cropped, flipped half of the times, distorted in their colours, and padded.
    """

    def __init__(self, cfg: FinetuneSegmentationConfig, numbers: LabelNumbers) -> None:
        self.cfg, self.numbers, self.seed = cfg, numbers, cfg.train.seed
        self.colour = mean_colour(cfg.backbone.normalisation.mean)

    def batch_bytes(self, batch_size: int) -> int:
        """See `data.Maker`."""
        return batch_size * (4 * self.cfg.data.images_size**2 + 8)

    def make(self, sample: Sample, *key: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "h w"]]:
        """A crop and the model's numbers of its pixels.

        Raises: UserError, with the name of the image, for labels that do not fit; BadImageError.
        """
        own, size = self.cfg.segmentation, self.cfg.data.images_size
        image = sample.pixels()
        try:
            labels = self.numbers.read(sample.target(), image.shape[2], image.shape[1])
        except UserError as error:
            raise UserError(f"{sample.name}: {error}") from error
        random = np.random.default_rng(derive_seed(self.seed, "segmentation crop", *key))
        ratio = random.uniform(*own.resize_ratio)
        longer, shorter = (int(side * ratio) for side in own.resize)
        width, height = fitted_size(image.shape[2], image.shape[1], longer, shorter)
        labels = resized(labels[None], width, height, "nearest-exact")
        top, left = draw_place(labels[0], size, own.cat_max_ratio, random)
        rows, columns = slice(top, top + size), slice(left, left + size)
        labels = labels[:, rows, columns]
        image = resized(image, width, height, "bilinear")[:, rows, columns]
        if self.cfg.data.do_hflip and random.random() < 0.5:
            image, labels = image.flip(2), labels.flip(2)
        if own.photometric_distortion:
            image = distorted(image, random)
        return padded(image, size, self.colour), padded(labels, size, UNLABELLED)[0]

    def batch(
        self,
        crops: Sequence[tuple[Tensor, Tensor]],
        keys: list[tuple[int, ...]],
        sample_ids: list[int],
        bad: list[tuple[str, str]],
    ) -> Batch:
        """See `data.Maker`."""
        return finetuning.stacked(crops, sample_ids, bad)


def make_loader(cfg: FinetuneSegmentationConfig, data: NumberedImages, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`.

    Raises: UserError if a batch is a single image, which uper cannot be trained with.
    """
    size = cfg.optim.batch_size_per_gpu
    remedy = "batch norm after uper's pooling needs two or more images of all ranks together"
    require(cfg.segmentation.head != "uper" or size * world_size() > 1, "optim.batch_size_per_gpu", size, remedy)
    return PretrainLoader(
        cfg.data,
        None,
        maker=LabelledCrops(cfg, data.numbers),
        dataset=data.dataset,
        seed=cfg.train.seed,
        batch_size=size,
        num_workers=cfg.efficiency.dataloader_num_workers,
        **place,
    )


# --- Heads and loss --------------------------------------------------------------------------------------------------

AUXILIARY_MAP = 2
POOL_SCALES = (1, 2, 3, 6)


def upernet() -> Any:
    """The module of transformers with UperNet's heads.

    Raises: UserError that says how to install it.
    """
    try:
        return importlib.import_module("transformers.models.upernet.modeling_upernet")
    except ImportError as error:
        raise UserError(
            f"segmentation.head=uper: UperNet is that of transformers, which is missing ({error}): pip install -e "
            "'.[finetuning]', or use segmentation.head=linear"
        ) from error


class UperHead(nn.Module):
    """UperNet on a simple pyramid, and an auxiliary head that helps it to learn: transformers', with mmseg's dropout.

    Weights begin as in mmsegmentation: convolutions before a ReLU as He et al. have it, classifiers with a deviation of
    0.01. Batch norms count the images of all ranks.

    Args:
        dim: channels of the four maps that are read.
        num_classes: outputs.
        cfg: sizes.
    """

    def __init__(self, dim: int, num_classes: int, cfg: SegmentationConfig) -> None:
        super().__init__()
        heads = upernet()
        sizes = SimpleNamespace(
            num_labels=num_classes,
            hidden_size=cfg.channels,
            pool_scales=POOL_SCALES,
            auxiliary_in_channels=None,
            auxiliary_channels=cfg.auxiliary_channels,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.pyramid = SimplePyramid(dim)
        self.main = heads.UperNetHead(sizes, [dim] * 4)
        self.auxiliary = heads.UperNetFCNHead(sizes, [dim] * 4, AUXILIARY_MAP) if cfg.auxiliary_weight else None
        for head in (self.main, self.auxiliary):
            for part in () if head is None else head.modules():
                if isinstance(part, nn.Conv2d) and part.bias is None:
                    nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if head is not None:
                head.classifier = nn.Sequential(nn.Dropout2d(cfg.dropout), _begin_small(head.classifier))
        synchronise_(self)

    def forward(self, maps: Sequence[Float[Tensor, "b d rows columns"]]) -> list[Tensor]:
        """Logits [b, classes, 4 rows, 4 columns]; while training also those of the auxiliary head, on the grid."""
        levels = self.pyramid(maps)
        logits = [self.main(levels)]
        if self.auxiliary is not None and self.training:
            logits.append(self.auxiliary(levels))
        return logits


class LinearHead(nn.Module):
    """Dropout, a batch norm of all ranks' images, and a linear layer for each patch."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout2d(dropout), SyncedBatchNorm(dim)
        self.linear = _begin_small(nn.Conv2d(dim, num_classes, kernel_size=1))

    def forward(self, maps: Sequence[Float[Tensor, "b d rows columns"]]) -> list[Tensor]:
        """Logits [b, classes, rows, columns], alone in a list."""
        return [self.linear(self.norm(self.dropout(maps[0])))]


def _begin_small(layer: Any) -> Any:
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def blocks_of(cfg: SegmentationConfig, depth: int) -> list[int]:
    """The blocks after which uper reads; of fewer than four, some twice."""
    if cfg.blocks is None:
        return [-(-depth * (level + 1) // 4) - 1 for level in range(4)]
    wrong = [block for block in cfg.blocks if block not in range(depth)]
    remedy = f"the backbone has {depth} blocks, 0 to {depth - 1}; null takes four that are evenly spaced"
    require(not wrong, "segmentation.blocks", cfg.blocks, remedy)
    return cfg.blocks


def head_inputs(
    cfg: FinetuneSegmentationConfig, trunk: Trunk, images: Tensor
) -> list[Float[Tensor, "b d rows columns"]]:
    """The feature maps that the head reads: four, or for the linear head the last one, normed."""
    if cfg.segmentation.head == "linear":
        return trunk.maps(images, [-1], norm=True)
    blocks = blocks_of(cfg.segmentation, len(trunk.blocks))
    different = sorted(set(blocks))
    maps = trunk.maps(images, different)
    return [maps[different.index(block)] for block in blocks]


def make_head(cfg: FinetuneSegmentationConfig, trunk: Trunk) -> UperHead | LinearHead:
    """The head for the classes, with weights to begin with.

    Raises: UserError if images have too few patches for the pyramid, or transformers is missing.
    """
    own, num_classes, size = cfg.segmentation, len(cfg.classes), finetuning.probe_size(cfg, trunk)
    with torch.no_grad(), trunk.keeping_all():
        dim = head_inputs(cfg, trunk, torch.zeros(1, 3, size, size))[0].shape[1]
    if own.head == "linear":
        return LinearHead(dim, num_classes, own.dropout)
    remedy = f"must be at least 2 patches of {trunk.patch_size} pixels, which uper halves"
    require(cfg.data.images_size >= 2 * trunk.patch_size, "data.images_size", cfg.data.images_size, remedy)
    return UperHead(dim, num_classes, own)


def predict(cfg: FinetuneSegmentationConfig, model: nn.ModuleDict, trunk: Trunk, images: Tensor) -> list[Tensor]:
    """Logits of normalised images as the heads give them, those that count first; on a grid coarser than the pixels."""
    return model["head"](head_inputs(cfg, trunk, images))


def enlarged(logits: Float[Tensor, "b k rows columns"], height: int, width: int) -> Float[Tensor, "b k height width"]:
    """Logits of the pixels, in float32."""
    return F.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False)


def pixel_cross_entropy(logits: Float[Tensor, "b k rows columns"], labels: UInt8[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Cross-entropy of enlarged logits, 0 at pixels that do not count, averaged over all pixels as in mmsegmentation.

    So a pixel weighs the same in every crop, on every rank and in every accumulation step.
    """
    at_pixels = enlarged(logits, labels.shape[1], labels.shape[2])
    return F.cross_entropy(at_pixels, labels.long(), ignore_index=UNLABELLED, reduction="sum") / labels.numel()


def make_loss(cfg: FinetuneSegmentationConfig) -> finetuning.Loss:
    """Cross-entropy of the head, and that of the auxiliary head times its weight."""
    weights = {"cross_entropy": 1.0, "auxiliary": cfg.segmentation.auxiliary_weight}

    def loss(model: nn.ModuleDict, trunk: Trunk, batch: Batch, _: torch.Generator) -> dict[str, Tensor]:
        given = predict(cfg, model, trunk, batch.images)
        named = zip(list(weights)[: len(given)], given, strict=True)
        return {name: weights[name] * pixel_cross_entropy(x, batch.labels["label"]) for name, x in named}

    return loss


# --- Scores ----------------------------------------------------------------------------------------------------------

STRIDE = 2 / 3
"""Of a window, in its sides: 341 of 512 pixels."""
PICTURE_SIDE = 400
CLASSES_AT_ONCE = 16


class Resized:
    """Resize an image as in training without a random ratio, and read its label image; see `evaluation.Prepare`.

    Args:
        numbers: of the labels.
        longer: pixels into which the image is fitted along its longer side.
        shorter: along its shorter side.
    """

    def __init__(self, numbers: LabelNumbers, longer: float, shorter: float) -> None:
        self.numbers, self.longer, self.shorter = numbers, longer, shorter

    def __call__(self, image: Image.Image, target: Any) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "h0 w0"]]:
        """The image, resized, and its labels in its own size."""
        labels = self.numbers.read(target, image.width, image.height)
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
        width, height = fitted_size(image.width, image.height, self.longer, self.shorter)
        return resized(pixels, width, height, "bilinear"), labels


def windows(length: int, size: int) -> list[int]:
    """Where windows of `size` pixels begin that cover `length` pixels, the last one flush with the end."""
    stride = max(1, int(size * STRIDE))
    number = max(0, -(-(length - size) // stride)) + 1
    return [min(i * stride, max(0, length - size)) for i in range(number)]


def sliding_logits(
    logits_of: Callable[[UInt8[Tensor, "n 3 size size"]], Float[Tensor, "n k rows columns"]],
    image: UInt8[Tensor, "3 h w"],
    size: int,
    *,
    batch_size: int,
    colour: UInt8[Tensor, "3 1 1"],
) -> Float[Tensor, "k h w"]:
    """Logits of an image's pixels, averaged over the windows that have them.

    Args:
        logits_of: logits of windows, on any grid.
        image: any size; one that is smaller than a window is padded.
        size: of a window.
        batch_size: windows at a time.
        colour: what it is padded with.
    """
    height, width = image.shape[1:]
    whole = padded(image, size, colour)
    places = [(top, left) for top in windows(height, size) for left in windows(width, size)]
    total: Tensor | None = None
    count = torch.zeros(whole.shape[1:])
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        given = logits_of(torch.stack([whole[:, top : top + size, left : left + size] for top, left in chosen]))
        if total is None:
            total = torch.zeros(given.shape[1], *whole.shape[1:], device=given.device)
        for (top, left), logits in zip(chosen, given, strict=True):
            total[:, top : top + size, left : left + size] += enlarged(logits[None], size, size)[0]
            count[top : top + size, left : left + size] += 1
    assert total is not None
    return (total / count.to(total.device))[:, :height, :width]


def most_likely(logits: Float[Tensor, "k h w"], height: int, width: int) -> UInt8[Tensor, "height width"]:
    """The class of each pixel of an image of another size; a few classes at a time, as images may be large."""
    best = torch.full((height, width), -torch.inf, device=logits.device)
    label = torch.zeros(height, width, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), CLASSES_AT_ONCE):
        value, index = enlarged(logits[None, first : first + CLASSES_AT_ONCE], height, width)[0].max(dim=0)
        label = torch.where(value > best, (first + index).to(torch.uint8), label)
        best = torch.maximum(best, value)
    return label


def numbers_of_test(trained: FinetuneSegmentationConfig, dataset: ImageDataset, url: str) -> LabelNumbers:
    """The numbers, in a trained model, of the labels of another data set, whose classes are matched by name.

    Raises: UserError if some of its classes are not the model's.
    """
    key, classes, own = "test_dataset_name", trained.classes, trained.segmentation
    has_names = isinstance(dataset, SegmentationDataset) and bool(dataset.class_names)
    numbers = number_labels(replace(own, num_classes=None if has_names else len(classes)), dataset, key, url)
    if has_names:
        where = f"{key}={url}"
        matched = match_classes(numbers.classes, where, classes, "the classes that were trained")
        if matched is None and len(numbers.classes) > len(classes):
            raise UserError(f"{where}: has {len(numbers.classes)} classes, and the model knows {len(classes)}")
        if matched is not None:
            counts = (numbers.table != UNKNOWN) & (numbers.table != UNLABELLED)
            numbers.table[counts] = torch.tensor(matched)[numbers.table[counts]]
    return LabelNumbers(classes, numbers.table)


def evaluate(cfg: Any, model: FrozenModel, results: Results) -> None:
    """Mean IoU by sliding windows, at the images' own size, with the scores of eval_segmentation.py.

    Images are resized as in training without a random ratio, in proportion if `resolution` is another size than that of
    training.
    """
    trained: Any = model.module.cfg
    url = cfg.test_dataset_name
    dataset = open_dataset(url, "test_dataset_name")
    numbers = numbers_of_test(trained, dataset, url)
    results.note_data(test_dataset_name=dataset)
    results.declare_scores(*SCORES)
    if "finetuned" in results:
        return
    size = cfg.resolution or trained.data.images_size
    longer, shorter = (side * size / trained.data.images_size for side in trained.segmentation.resize)
    batches = ImageBatches(
        dataset,
        Resized(numbers, longer, shorter),
        batch_size=1,  # they differ in size
        num_workers=cfg.num_workers,
        pin=model.device.type == "cuda",
        title="test images",
    )
    colour = mean_colour(model.normalisation.mean)

    network: Any = model.module

    def logits_of(windows: Tensor) -> Tensor:
        return model.run(lambda x: network.predict(x)[0], windows)

    drawn = set(torch.linspace(0, len(dataset) - 1, min(cfg.num_pictures, len(dataset))).round().long().tolist())
    confusion = torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64)
    num_pixels = torch.zeros((), dtype=torch.int64)
    pictures: list[dict[str, np.ndarray]] = []
    for position, (images, truth) in enumerate(batches, batches.share.start):
        with torch.no_grad():
            logits = sliding_logits(logits_of, images[0], size, batch_size=cfg.batch_size, colour=colour)
            predicted = most_likely(logits, truth.shape[1], truth.shape[2]).cpu()
        confusion += confusion_matrix(truth[0], predicted, [UNLABELLED])
        num_pixels += truth.numel()
        if position in drawn:
            pictures.append(small_picture(images[0], truth[0], predicted))
    counted = int(all_reduce_sum_(confusion).sum()) / int(all_reduce_sum_(num_pixels))
    if not counted:
        raise UserError(f"test_dataset_name={url}: no pixel has a label that counts")
    if counted < 0.5:
        logger.warning("test_dataset_name=%s: only %.0f%% of the pixels have a label that counts", url, 100 * counted)
    scores = segmentation_metrics(confusion, [UNLABELLED], trained.classes)
    about = {"num_images": len(dataset), "window": size, "resize": [round(longer), round(shorter)]}
    results.add("finetuned", scores | about | {"counted_pixels": counted})
    logger.info("mIoU %.4f, pixel accuracy %.4f, mean accuracy %.4f", *(scores[k] for k in ("mIoU", "acc", "mean_acc")))
    gathered = [picture for part in gather_objects(pictures) for picture in part]
    if gathered and rank() == 0:
        draw_predictions(gathered, trained.classes, [UNLABELLED]).savefig(results.artifacts() / "predictions.png")


def small_picture(
    image: UInt8[Tensor, "3 h w"], truth: UInt8[Tensor, "h0 w0"], predicted: UInt8[Tensor, "h0 w0"]
) -> dict[str, np.ndarray]:
    """Image, truth and prediction in a size for pictures."""
    height, width = truth.shape
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    w, h = (max(1, round(side * scale)) for side in (width, height))
    small = [resized(labels[None], w, h, "nearest-exact")[0].numpy() for labels in (truth, predicted)]
    return {
        "image": resized(image, w, h, "bilinear").movedim(0, -1).numpy(),
        "truth": small[0],
        "prediction": small[1],
    }


# --- The command -----------------------------------------------------------------------------------------------------


def look(cfg: FinetuneSegmentationConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet shows beside crops: their labels, and the names of the largest; unlabelled is white."""
    pictures, captions = [], []
    for labels in batch.labels["label"][:num_images]:
        pictures.append(class_colours(labels, len(cfg.classes)).numpy())
        numbers = torch.bincount(labels.flatten().long(), minlength=len(cfg.classes))[: len(cfg.classes)]
        largest = [int(number) for number in numbers.argsort(descending=True, stable=True) if numbers[number]]
        captions.append(", ".join(cfg.classes[number] for number in largest[:4]) or "nothing labelled")
    return [Column("labels; white: none", pictures, captions)]


TASK = Task(
    schema=FinetuneSegmentationConfig,
    defaults="configs/finetune/segmentation.yaml",
    open_data=open_training_images,
    make_head=make_head,
    head_inputs=head_inputs,
    loss=make_loss,
    make_loader=make_loader,
    predict=predict,
    evaluate=evaluate,
    look=look,
    losses={"cross_entropy": "head", "auxiliary": "auxiliary head"},
    lr_at=lr_at,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    return finetuning.main(TASK, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
