"""Train a backbone and Mask R-CNN on it to find objects: their boxes, classes and masks.

    python finetune_detection.py config.yaml [more.yaml ...] [a.b=c ...]      train, or continue
    python finetune_detection.py config.yaml a.b=c --dry-run                  say what would be trained, and stop
    python finetune_detection.py config.yaml train.output_dir=DIR --export    write model.pth of a run

data.dataset is a folder with images and one JSON file in COCO's format, or
"custom://COCO?images='/data/train'&annotations='/data/train.json'". Later files and overrides win over earlier ones,
and all over configs/finetune/detection.yaml.
"""

from utils import add_training_options, command_line

with command_line(__doc__, __name__) as parser:
    add_training_options(parser)

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

import finetuning
from config import BETWEEN_0_AND_1, COUNT, NOT_NEGATIVE, POSITIVE, one_of, require, within
from data import Batch, PretrainLoader
from distributed import gather_objects, on_rank_0, rank
from evaluation import FrozenModel, ImageBatches, Results
from finetuning import FinetuneConfig, Task, Trunk
from optim import scheduled, stepped
from pictures import show
from reading.crops import derive_uniforms
from reading.sources import BadImageError, Sample, match_classes
from report import Score
from sheets import Column, as_rgb, class_colours, draw_boxes
from tasks.coco import (
    CocoImages,
    Objects,
    average_precision,
    decode_mask,
    ground_truth,
    open_coco,
    optional,
    run_lengths,
)
from tasks.mask_rcnn import NORMS, Detections, MaskRCNN, Targets, paste_masks
from utils import UserError, write_text_atomically

logger = logging.getLogger("detection")

SMALLEST_SIDE = 1.0
"""Pixels of a box, in the changed image, below which it is not learned."""
SHOWN_SCORE = 0.3
"""Above it, predictions are drawn."""

# --- Knobs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionConfig:
    """Objects, head, and how images are changed."""

    masks: bool
    """Learn masks as well as boxes."""
    skip_empty: bool
    """Leave out training images without objects."""

    augmentation: str = field(metadata=one_of("multi_scale", "jitter"))
    """How images are changed: DETR's sizes and crops (arXiv:2005.12872), or large-scale jitter (arXiv:2012.07177)."""
    short_sides: list[int] = field(metadata=within(at_least=1, not_empty=True))
    """multi_scale: what the shorter side is resized to, in pixels, one of them by chance."""
    long_side: int = field(metadata=COUNT)
    """multi_scale: the longer side is at most so long, and the other one shorter for it."""
    crop_short_sides: list[int] = field(metadata=within(at_least=1))
    """multi_scale: every second image is first resized to one of these and cropped; none if there are none."""
    crop_range: tuple[int, int] = field(metadata=within(at_least=1, size=2, ascending=True))
    """multi_scale: shortest and longest side of a crop."""
    jitter_range: tuple[float, float] = field(metadata=within(above=0, size=2, ascending=True))
    """jitter: how many times larger than to fit into a square of data.images_size an image is made; it is cropped, or
    padded, to that square."""
    test_short_side: int = field(metadata=COUNT)
    """The shorter side of images whose objects are predicted, in pixels."""
    test_long_side: int = field(metadata=COUNT)
    """Their longer side is at most so long."""

    blocks: list[int]
    """Backbone blocks whose maps are read: four that ascend, the first for small objects, or one for all. Empty for
    four, evenly spaced, of a backbone that has them, else the last."""
    pyramid: str = field(metadata=one_of("top_down", "separate"))
    """Whether finer maps are told what the coarser ones say (arXiv:1612.03144), or not (ViTDet, arXiv:2203.16527)."""
    norm: str = field(metadata=one_of(*NORMS))
    """Norm of the pyramid and of the head of boxes: LayerNorm of each place, or BatchNorm over all ranks."""
    channels: int = field(metadata=COUNT)
    """Of the pyramid and of the convolutions of the heads."""
    proposal_convs: int = field(metadata=NOT_NEGATIVE)
    """Convolutions that propose boxes."""
    box_convs: int = field(metadata=NOT_NEGATIVE)
    """Convolutions of the head of boxes, before a hidden layer of `box_dim`."""
    box_dim: int = field(metadata=COUNT)
    """Channels of that hidden layer."""
    mask_convs: int = field(metadata=NOT_NEGATIVE)
    """Convolutions of the head of masks."""
    norm_masks: bool
    """Whether these have norms."""
    num_proposals: int = field(metadata=COUNT)
    """Boxes that are proposed for each image."""
    num_samples: int = field(metadata=COUNT)
    """Proposals of an image that are learned from."""
    box_loss: str = field(metadata=one_of("giou", "l1"))
    """What boxes are compared by: generalised intersection over union, or what is regressed."""
    box_loss_weight: float = field(metadata=POSITIVE)
    """What that part of the loss is multiplied by; 10 for giou in the recipe of arXiv:2202.03026."""
    lr_steps: list[float] = field(metadata=BETWEEN_0_AND_1)
    """Parts of the training after which the learning rate is a tenth of what it was; empty for the cosine."""

    def __post_init__(self) -> None:
        """Check the number of maps."""
        remedy = "give one block, or four that ascend; [] chooses"
        require(len(self.blocks) in {0, 1, 4}, "detection.blocks", self.blocks, remedy)
        remedy = f"must be at least detection.test_short_side={self.test_short_side}"
        require(self.test_long_side >= self.test_short_side, "detection.test_long_side", self.test_long_side, remedy)
        remedy = f"must be at least {max(self.short_sides)}, the largest of detection.short_sides"
        require(self.long_side >= max(self.short_sides), "detection.long_side", self.long_side, remedy)


@dataclass(frozen=True)
class FinetuneDetectionConfig(FinetuneConfig):
    """Everything `finetune_detection.py` reads."""

    SECTION = "detection"

    detection: DetectionConfig

    def __post_init__(self) -> None:
        """Check rules that span sections."""
        super().__post_init__()
        wanted, remedy = self.backbone.relative_position_bias, "images differ in their sizes here; set it to false"
        require(not wanted, "backbone.relative_position_bias", wanted, remedy)


def lr_at(step: int, cfg: FinetuneDetectionConfig) -> float:
    """Learning rate of the head in the update after `step` finished ones."""
    schedule, total, steps = cfg.optim.lr_schedule, cfg.optim.total_iters, cfg.detection.lr_steps
    if not steps:
        return scheduled(schedule, step, total)
    level = replace(schedule, final_value=schedule.base_value)
    return scheduled(level, step, total) * stepped(step / total, steps)


# --- How images are changed ------------------------------------------------------------------------------------------


class Resize(NamedTuple):
    """To so many pixels."""

    height: int
    width: int


class Cut(NamedTuple):
    """Out of the image."""

    top: int
    left: int
    height: int
    width: int


class Affine(NamedTuple):
    """Where a place of an image, in pixels from its corner, is in the changed one."""

    x_scale: float
    x_shift: float
    y_scale: float
    y_shift: float
    height: int
    """Of the changed image."""
    width: int


@dataclass(frozen=True)
class Change:
    """Resize and cut in turn, and then mirror or not."""

    steps: tuple[Resize | Cut, ...]
    flip: bool

    def affine(self, height: int, width: int) -> Affine:
        """As one map, of images of this size."""
        place = Affine(1.0, 0.0, 1.0, 0.0, height, width)
        for step in self.steps:
            if isinstance(step, Resize):
                x, y = step.width / place.width, step.height / place.height
                place = Affine(x * place.x_scale, x * place.x_shift, y * place.y_scale, y * place.y_shift, *step)
            else:
                shifts = {"x_shift": place.x_shift - step.left, "y_shift": place.y_shift - step.top}
                place = place._replace(**shifts, height=step.height, width=step.width)
        if self.flip:
            place = place._replace(x_scale=-place.x_scale, x_shift=place.width - place.x_shift)
        return place

    def pixels(self, image: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h2 w2"]:
        """The changed image, by bilinear antialiased resampling."""
        # Channels innermost, with a stride of a batch: see `crops.cut`.
        x = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        for step in self.steps:
            if isinstance(step, Resize):
                x = F.interpolate(x, size=tuple(step), mode="bilinear", antialias=True)
            else:
                x = x[..., step.top : step.top + step.height, step.left : step.left + step.width]
        return (x.flip(-1) if self.flip else x)[0]


def fitting(height: int, width: int, short: int, long: int) -> Resize:
    """The size with a shorter side of `short` pixels, or with a longer one of `long`, whichever is smaller."""
    scale = min(short / min(height, width), long / max(height, width))
    return Resize(max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))


def draw_change(
    height: int, width: int, cfg: DetectionConfig, size: int, do_hflip: bool, seed: int, *key: int
) -> Change:
    """How an image of this size is changed, a function of (seed, key)."""
    u_flip, u_way, u_short, u_first, u_height = derive_uniforms("detection", seed, *key)
    u_width, u_top, u_left, u_scale, _ = derive_uniforms("detection crop", seed, *key)
    steps: list[Resize | Cut] = []
    if cfg.augmentation == "jitter":
        low, high = cfg.jitter_range
        side = size * (low + u_scale * (high - low))
        scale = side / max(height, width)
        steps.append(Resize(max(1, round(height * scale)), max(1, round(width * scale))))
        steps.append(_placed(steps[-1], min(size, steps[-1].height), min(size, steps[-1].width), u_top, u_left))
    else:
        if cfg.crop_short_sides and u_way < 0.5:
            resized = fitting(height, width, _choice(cfg.crop_short_sides, u_first), cfg.long_side)
            low, high = cfg.crop_range
            height, width = (
                min(side, low) + int(u * (min(side, high) - min(side, low) + 1))
                for side, u in zip(resized, (u_height, u_width), strict=True)
            )
            steps += [resized, _placed(resized, height, width, u_top, u_left)]
        steps.append(fitting(height, width, _choice(cfg.short_sides, u_short), cfg.long_side))
    return Change(tuple(steps), do_hflip and u_flip < 0.5)


def _choice(values: Sequence[int], uniform: float) -> int:
    return values[int(uniform * len(values))]


def _placed(image: Resize | Cut, height: int, width: int, u_top: float, u_left: float) -> Cut:
    return Cut(int(u_top * (image.height - height + 1)), int(u_left * (image.width - width + 1)), height, width)


def change_boxes(boxes: Float[Tensor, "n 4"], place: Affine) -> Float[Tensor, "n 4"]:
    """Boxes in the changed image, cut off at its sides; one that lies outside has no area."""
    x = boxes[:, 0::2] * place.x_scale + place.x_shift
    y = boxes[:, 1::2] * place.y_scale + place.y_shift
    x, y = x.sort(dim=1).values.clamp(0, place.width), y.clamp(0, place.height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def change_mask(segmentation: Any, height: int, width: int, place: Affine) -> UInt8[np.ndarray, "h2 w2"]:
    """The mask in the changed image: corners of polygons are moved, run lengths are sampled at the middle of pixels."""
    if isinstance(segmentation, list):
        moved = []
        for polygon in segmentation:
            corners = np.asarray(polygon, dtype=np.float64)
            corners[0::2] = corners[0::2] * place.x_scale + place.x_shift
            corners[1::2] = corners[1::2] * place.y_scale + place.y_shift
            moved.append(corners.tolist())
        return decode_mask(moved, place.height, place.width)
    mask = decode_mask(segmentation, height, width)
    rows = np.floor((np.arange(place.height) + 0.5 - place.y_shift) / place.y_scale).astype(int)
    columns = np.floor((np.arange(place.width) + 0.5 - place.x_shift) / place.x_scale).astype(int)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return mask[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)] * inside.astype(np.uint8)


class Learned(NamedTuple):
    """A changed image and its objects."""

    pixels: UInt8[Tensor, "3 h w"]
    boxes: Float[Tensor, "n 4"]
    classes: Int64[Tensor, " n"]
    masks: UInt8[Tensor, "n h w"] | None


def check_size(name: str, height: int, width: int, known: Objects) -> None:
    """Raise BadImageError if the image in a file has another size than its annotations say."""
    if (height, width) != (known.height, known.width):
        turned = ", turned by its EXIF orientation perhaps" * ((width, height) == (known.height, known.width))
        raise BadImageError(
            name, f"has {width}x{height} pixels{turned}, and its annotations are of {known.width}x{known.height}"
        )


class ChangedImages:
    """Changed images with boxes, classes and masks, padded with mean grey to a common size; a `data.Maker`.

    Args:
        cfg: of the training.
        objects_per_image: how many there are, on average.
    """

    def __init__(self, cfg: FinetuneDetectionConfig, objects_per_image: float) -> None:
        self.cfg, self.seed, self.objects_per_image = cfg, cfg.train.seed, objects_per_image
        grey = [round(255 * x) for x in cfg.backbone.normalisation.mean]
        self.grey = torch.tensor(grey, dtype=torch.uint8).view(3, 1, 1)

    def batch_bytes(self, batch_size: int) -> int:
        """See `data.Maker`."""
        own, size = self.cfg.detection, self.cfg.data.images_size
        pixels = size**2 if own.augmentation == "jitter" else own.long_side * max(own.short_sides)
        return int(batch_size * pixels * (3 + self.objects_per_image * own.masks)) + 1

    def make(self, sample: Sample, *key: int) -> Learned:
        """A changed image and those of its objects that are to be seen in it."""
        own, data = self.cfg.detection, self.cfg.data
        pixels, known = sample.pixels(), sample.target()
        height, width = pixels.shape[1:]
        check_size(sample.name, height, width, known)
        change = draw_change(height, width, own, data.images_size, data.do_hflip, self.seed, *key)
        place = change.affine(height, width)
        boxes = change_boxes(known.boxes, place)
        is_seen = ~known.crowd & ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_SIDE).all(dim=1)
        numbers = torch.where(is_seen)[0]
        masks = None
        if own.masks:
            found = [change_mask(known.segmentations[i], height, width, place) for i in numbers.tolist()]
            masks = torch.from_numpy(np.stack(found)) if found else torch.zeros(0, place.height, place.width).byte()
            seen = masks.flatten(1).bool().any(dim=1)
            numbers, masks = numbers[seen], masks[seen].contiguous()
        boxes = boxes[numbers]
        if masks is not None and own.augmentation == "jitter":  # as ViTDet: crops leave boxes wider than what is seen
            boxes = boxes_around(masks)
        return Learned(change.pixels(pixels), boxes.float(), known.classes[numbers], masks)

    def batch(
        self, crops: Sequence[Learned], keys: list[tuple[int, ...]], sample_ids: list[int], bad: list[tuple[str, str]]
    ) -> Batch:
        """See `data.Maker`."""
        own, square = self.cfg.detection, self.cfg.data.images_size
        sizes = torch.tensor([each.pixels.shape[1:] for each in crops])
        height, width = (square, square) if own.augmentation == "jitter" else sizes.amax(0).tolist()
        images = self.grey.expand(len(crops), 3, height, width).contiguous()
        for image, each in zip(images, crops, strict=True):
            image[:, : each.pixels.shape[1], : each.pixels.shape[2]] = each.pixels
        labels = {
            "size": sizes,
            "boxes": torch.cat([each.boxes for each in crops]),
            "class": torch.cat([each.classes for each in crops]),
            "image": torch.cat([torch.full((len(each.boxes),), i) for i, each in enumerate(crops)]),
        }
        if own.masks:
            labels["masks"] = torch.zeros(len(labels["boxes"]), height, width, dtype=torch.uint8)
            start = 0
            for each in crops:
                assert each.masks is not None
                number, h, w = each.masks.shape
                labels["masks"][start : start + number, :h, :w] = each.masks
                start += number
        return Batch(images=images, masks={}, labels=labels, sample_ids=torch.tensor(sample_ids), bad=bad)


def boxes_around(masks: UInt8[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """The smallest box around each mask, of which none is empty."""
    boxes = []
    for mask in masks:
        rows, columns = (torch.where(mask.bool().any(dim=axis))[0] for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


def open_training_images(cfg: FinetuneDetectionConfig) -> tuple[FinetuneDetectionConfig, CocoImages]:
    """The images that are trained on, and the configuration with their classes and their number.

    Raises: UserError if there are no objects.
    """
    if cfg.detection.masks:
        optional("pycocotools.mask")  # now, not in the workers
    images = open_coco(cfg.data.only_dataset, "data.dataset", masks=cfg.detection.masks)
    with_objects = images.with_objects()
    chosen = with_objects if cfg.detection.skip_empty else images
    num_images = cfg.data.images_per_epoch or len(chosen)
    return replace(cfg, classes=images.class_names, data=replace(cfg.data, images_per_epoch=num_images)), chosen


def make_loader(cfg: FinetuneDetectionConfig, images: CocoImages, **place: Any) -> PretrainLoader:
    """The loader of a training; `place` says where it runs and where it continues, see `PretrainLoader`."""
    if place.get("rank", 0) == 0:
        images.log_faults()
    return PretrainLoader(
        cfg.data,
        None,
        maker=ChangedImages(cfg, len(images.annotations.boxes) / len(images.annotations.names)),
        dataset=images,
        seed=cfg.train.seed,
        batch_size=cfg.optim.batch_size_per_gpu,
        num_workers=cfg.efficiency.dataloader_num_workers,
        **place,
    )


# --- Head and loss ---------------------------------------------------------------------------------------------------

MAPS = 4
"""That a pyramid is made of."""


def padded(images: Float[Tensor, "b 3 h w"], patch_size: int) -> Float[Tensor, "b 3 h2 w2"]:
    """Normalised images with zeros to the right and below, which are mean grey, until they divide into patches.

    At least two patches along a side, of which the pyramid makes one.
    """
    height, width = (max(2, -(-side // patch_size)) * patch_size for side in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def head_inputs(cfg: FinetuneDetectionConfig, trunk: Trunk, images: Tensor) -> list[Float[Tensor, "b d hp wp"]]:
    """The maps that the head reads."""
    depth = len(trunk.blocks)
    spaced = [depth * (i + 1) // MAPS - 1 for i in range(MAPS)]
    blocks = cfg.detection.blocks or (spaced if depth >= MAPS else [depth - 1])
    return trunk.maps(padded(images, trunk.patch_size), blocks)


def make_head(cfg: FinetuneDetectionConfig, trunk: Trunk) -> MaskRCNN:
    """A head for the classes."""
    own, size = cfg.detection, finetuning.probe_size(cfg, trunk)
    with torch.no_grad():
        dim = head_inputs(cfg, trunk, torch.zeros(1, 3, size, size))[0].shape[1]
    return MaskRCNN(
        dim,
        trunk.patch_size,
        len(cfg.classes),
        channels=own.channels,
        norm=NORMS[own.norm],
        top_down=own.pyramid == "top_down",
        proposal_convs=own.proposal_convs,
        box_convs=own.box_convs,
        box_dim=own.box_dim,
        mask_convs=own.mask_convs if own.masks else None,
        norm_masks=own.norm_masks,
        num_proposals=own.num_proposals,
        num_samples=own.num_samples,
        box_loss=own.box_loss,
        box_loss_weight=own.box_loss_weight,
    )


def predict(
    cfg: FinetuneDetectionConfig,
    model: nn.ModuleDict,
    trunk: Trunk,
    images: Float[Tensor, "b 3 h w"],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Detections]:
    """What is found in each of normalised images.

    Args:
        cfg: that the model was trained with.
        model: its backbone and head.
        trunk: of the backbone.
        images: which may be padded.
        sizes: height and width of each without padding; None for none.
    """
    height, width = images.shape[-2:]
    return model["head"](head_inputs(cfg, trunk, images), sizes or [(height, width)] * len(images))


def make_loss(cfg: FinetuneDetectionConfig) -> finetuning.Loss:
    """The five losses of Mask R-CNN, of the sampled anchors and proposals."""

    def loss(model: nn.ModuleDict, trunk: Trunk, batch: Batch, _generator: torch.Generator) -> dict[str, Tensor]:
        labels, known = batch.labels, batch.host_labels or batch.labels  # to read those, a GPU would be waited for
        numbers = known["image"].bincount(minlength=len(batch.images)).tolist()
        boxes, classes = labels["boxes"].split(numbers), labels["class"].split(numbers)
        masks = labels["masks"].split(numbers) if "masks" in labels else [None] * len(numbers)
        targets = [Targets(*each) for each in zip(boxes, classes, masks, strict=True)]
        sizes = [(int(height), int(width)) for height, width in known["size"].tolist()]
        return model["head"](head_inputs(cfg, trunk, batch.images), sizes, targets)

    return loss


# --- Scores ----------------------------------------------------------------------------------------------------------


class Fitted:
    """Resize an image for predictions, pad it to whole patches, and say how large it is; see `evaluation.Prepare`.

    Args:
        short: shorter side.
        long: the longer one is at most so long.
        patch_size: of the backbone.
        mean: of the images, by which they are padded.
    """

    def __init__(self, short: int, long: int, patch_size: int, mean: Sequence[float]) -> None:
        self.short, self.long, self.patch_size = short, long, patch_size
        self.grey = torch.tensor([round(255 * x) for x in mean], dtype=torch.uint8).view(3, 1, 1)

    def __call__(self, image: Image.Image, known: Objects) -> tuple[UInt8[Tensor, "3 h w"], Int64[Tensor, " 2"]]:
        """The image, and its height and width without padding."""
        check_size("the image", image.height, image.width, known)
        size = fitting(image.height, image.width, self.short, self.long)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        resized = Change((size,), flip=False).pixels(pixels)
        height, width = (max(2, -(-side // self.patch_size)) * self.patch_size for side in size)
        result = self.grey.expand(3, height, width).contiguous()
        result[:, : size.height, : size.width] = resized
        return result, torch.tensor(size)


def in_image(found: Detections, size: tuple[int, int], height: int, width: int) -> Detections:
    """Detections in an image of its own size, from one that was resized to `size` for them."""
    scale = torch.tensor([width / size[1], height / size[0]] * 2, device=found.boxes.device)
    limits = torch.tensor([width, height] * 2, dtype=torch.float32, device=found.boxes.device)
    return found._replace(boxes=torch.minimum((found.boxes * scale).clamp(min=0), limits))


class Found(NamedTuple):
    """What the model says of one image, ready to travel between ranks."""

    boxes: np.ndarray
    """Left, top, right and bottom in pixels of the image."""
    classes: np.ndarray
    """Of the test data, from 0 on."""
    scores: np.ndarray
    masks: list[Any] | None
    """Compressed run lengths."""


def as_found(found: Detections, height: int, width: int, class_of: Sequence[int]) -> Found:
    """Detections of an image of this size in the numbers of the test data, without those of classes that it lacks.

    Args:
        found: in the numbers of the model.
        height: of the image.
        width: of the image.
        class_of: the test data's number of each of the model's classes; -1 for none.
    """
    classes = torch.tensor(class_of)[found.classes.cpu()]
    known = classes >= 0
    boxes, scores = found.boxes.float().cpu()[known], found.scores.float().cpu()[known]
    masks = None
    if found.masks is not None:
        pasted = paste_masks(found.masks.cpu()[known], boxes, height, width)
        encode = optional("pycocotools.mask").encode
        masks = [encode(np.asfortranarray(mask)) for mask in pasted.byte().numpy()]
    return Found(boxes.double().numpy(), classes[known].numpy(), scores.double().numpy(), masks)


def as_results(found: Iterable[Found], image_ids: Sequence[Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of all images as COCO's results are written, with these ids."""
    results = []
    for image_id, each in zip(image_ids, found, strict=True):
        for number, (box, label, score) in enumerate(zip(each.boxes, each.classes, each.scores, strict=True)):
            left, top, right, bottom = box.tolist()
            entry = {
                "image_id": image_id,
                "category_id": category_ids[int(label)],
                "bbox": [left, top, right - left, bottom - top],
                "score": float(score),
            }
            if each.masks is not None:
                entry["segmentation"] = each.masks[number]
            results.append(entry)
    return results


KINDS = {"boxes": "bbox", "masks": "segm"}
"""Our names of what is scored, and COCO's."""
SIZE_TERMS = {"small": "objects below 32x32 pixels", "large": "objects above 96x96 pixels"}


def declared_scores() -> list[Score]:
    """Average precision of boxes and of masks."""
    terms = {"AP": "average precision, the mean over ten overlaps from 0.5 to 0.95 and over all classes"}
    scores = []
    for kind in KINDS:
        scores.append(Score((kind, "AP"), f"AP of {kind}", terms=terms))
        scores += [Score((kind, f"AP{overlap}"), f"AP of {kind} at overlap 0.{overlap}") for overlap in (50, 75)]
        for size in ("small", "medium", "large"):
            explained = {size: SIZE_TERMS[size]} if size in SIZE_TERMS else {}
            scores.append(Score((kind, f"AP_{size}"), f"AP of {kind} of {size} objects", terms=explained))
    return scores


def evaluate(cfg: Any, model: FrozenModel, results: Results) -> None:
    """Average precision of boxes, and of masks if the model has them."""
    network: Any = model.module
    trained: FinetuneDetectionConfig = network.cfg
    own = trained.detection
    optional("faster_coco_eval")  # now, not after all images are done
    data = open_coco(cfg.test_dataset_name, "test_dataset_name", masks=own.masks)
    results.note_data(test_dataset_name=data)
    results.declare_scores(*declared_scores())
    if "finetuned" in results:
        return
    if rank() == 0:
        data.log_faults()
    data.with_objects()  # or there is nothing to score
    class_of = test_classes(data, trained.classes)
    sides = (cfg.resolution, cfg.resolution) if cfg.resolution else (own.test_short_side, own.test_long_side)
    batches = ImageBatches(
        data,
        Fitted(*sides, model.patch_size, model.normalisation.mean),
        batch_size=1,  # they differ in size, and padding would be seen
        num_workers=cfg.num_workers,
        pin=model.device.type == "cuda",
        title="test images",
    )
    found = []
    for index, (images, size) in zip(batches.share, batches, strict=True):
        height, width = size[0].tolist()

        def detect(x: Tensor, own_size: tuple[int, int] = (height, width)) -> list[Detections]:
            return predict(trained, network.model, network.trunk, x, [own_size])

        known = data.objects(index)
        whole = in_image(model.run(detect, images)[0], (height, width), known.height, known.width)
        found.append(as_found(whole, known.height, known.width, class_of))
    found = [each for part in gather_objects(found) for each in part]  # shares are contiguous

    scores = on_rank_0(lambda: score(data, found, list(KINDS) if own.masks else ["boxes"]))
    results.add("finetuned", {**scores, "num_images": len(data), "test_sides": list(sides)})
    if rank() == 0:
        write_detections(results.artifacts() / "detections.json", data, found)
        draw(cfg, data, found, results.artifacts() / "predictions.png")


def test_classes(data: CocoImages, trained: Sequence[str]) -> list[int]:
    """The test data's number of each class of the model; -1 for one that it lacks, whose detections do not count.

    Raises: UserError if the test data have classes that the model does not know.
    """
    numbers = match_classes(data.class_names, data.where, trained, "the classes that were trained")
    numbers = list(range(len(data.class_names))) if numbers is None else numbers
    if max(numbers) >= len(trained):
        raise UserError(f"{data.where}: has {len(numbers)} categories, and the model knows {len(trained)}")
    class_of = [-1] * len(trained)
    for own, number in enumerate(numbers):
        class_of[number] = own
    missing = class_of.count(-1)
    if missing and rank() == 0:
        logger.info("%s: lacks %d classes of the model, whose detections do not count", data.where, missing)
    return class_of


def score(data: CocoImages, found: Sequence[Found], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Average precision of each kind, by the names of `coco.SCORES`."""
    detections = as_results(found, range(1, len(data) + 1), range(1, len(data.class_names) + 1))
    truth = ground_truth(data)
    return {kind: average_precision(truth, detections, KINDS[kind]) for kind in kinds}


def write_detections(path: Path, data: CocoImages, found: Sequence[Found]) -> None:
    """Write all detections in COCO's format of results, with the ids of the data."""
    ids = [data.image_id(i) for i in range(len(data))]
    entries = as_results(found, ids, data.annotations.category_ids)
    for entry in entries:
        if "segmentation" in entry:
            lengths = entry["segmentation"]
            entry["segmentation"] = {"size": list(lengths["size"]), "counts": lengths["counts"].decode()}
    write_text_atomically(path, json.dumps(entries) + "\n")


def draw(cfg: Any, data: CocoImages, found: Sequence[Found], path: Path) -> None:
    """Some images, evenly spaced: above what is in them, below what was found with a score above `SHOWN_SCORE`."""
    if not cfg.num_pictures:
        return
    from matplotlib.figure import Figure

    chosen = torch.linspace(0, len(data) - 1, min(cfg.num_pictures, len(data))).round().long().tolist()
    figure = Figure(figsize=(2.6 * len(chosen), 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for (above, below), index in zip(axes.T, chosen, strict=True):
        pixels, known, guess = np.array(data[index].image()), data.objects(index), found[index]
        masks = [None if s is None else run_lengths(s, known.height, known.width) for s in known.segmentations]
        names = [data.class_names[label] for label in known.classes.tolist()]
        draw_objects(above, pixels, known.boxes.numpy(), known.classes.tolist(), names, masks)
        sure = np.flatnonzero(guess.scores > SHOWN_SCORE)
        labels = guess.classes[sure].tolist()
        names = [f"{data.class_names[i]} {s:.2f}" for i, s in zip(labels, guess.scores[sure], strict=True)]
        masks = [None if guess.masks is None else guess.masks[i] for i in sure]
        draw_objects(below, pixels, guess.boxes[sure], labels, names, masks)
    axes[0, 0].set_ylabel("truth", fontsize=9)
    axes[1, 0].set_ylabel("prediction", fontsize=9)
    figure.savefig(path)


def draw_objects(
    ax: Any, pixels: np.ndarray, boxes: np.ndarray, labels: Sequence[int], names: Sequence[str], masks: Sequence[Any]
) -> None:
    """An image with boxes, their names and masks, in a colour for each class."""
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    colours = mpl.colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    pixels = pixels.astype(np.float32) / 255
    for label, mask in zip(labels, masks, strict=True):
        if mask is not None:
            inside = decode_mask(mask, *pixels.shape[:2])[..., None] * 0.45
            pixels = pixels * (1 - inside) + np.array(colours[label % len(colours)]) * inside
    show(ax, pixels)
    for box, label, name in zip(boxes, labels, names, strict=True):
        colour = colours[label % len(colours)]
        corner, sides = box[:2] - 0.5, box[2:] - box[:2]  # pictures have the middle of the first pixel at 0
        ax.add_patch(Rectangle(tuple(corner), *sides, fill=False, edgecolor=colour, linewidth=1.4))
        style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        ax.text(*corner, name, fontsize=6, color="white", va="top", bbox=style, clip_on=True)


# --- The command -----------------------------------------------------------------------------------------------------


def look(cfg: FinetuneDetectionConfig, batch: Batch, num_images: int) -> list[Column]:
    """What the contact sheet shows beside crops: boxes, masks if they are learned from, and what is in them."""
    labels, pictures, captions = batch.labels, [], []
    for number, pixels in enumerate(as_rgb(batch.images[:num_images])):
        own = labels["image"] == number
        classes = labels["class"][own]
        colours = class_colours(classes, len(cfg.classes))
        drawn = pixels.astype(np.float32)
        if "masks" in labels:
            for mask, colour in zip(labels["masks"][own].bool().numpy(), colours.numpy(), strict=True):
                drawn[mask] = 0.55 * drawn[mask] + 0.45 * colour
        pictures.append(draw_boxes(drawn.astype(np.uint8), labels["boxes"][own], colours))
        counts = torch.bincount(classes, minlength=len(cfg.classes)).tolist()
        captions.append(", ".join(f"{n} {cfg.classes[i]}" for i, n in enumerate(counts) if n) or "no objects")
    return [Column("objects", pictures, captions)]


TASK = Task(
    schema=FinetuneDetectionConfig,
    defaults="configs/finetune/detection.yaml",
    open_data=open_training_images,
    make_head=make_head,
    head_inputs=head_inputs,
    loss=make_loss,
    make_loader=make_loader,
    predict=predict,
    evaluate=evaluate,
    look=look,
    losses={
        "proposal_object": "proposals",
        "proposal_box": "their boxes",
        "class": "classes",
        "box": "boxes",
        "mask": "masks",
    },
    lr_at=lr_at,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done or stopped by a signal, 2 a mistake that the message explains."""
    return finetuning.main(TASK, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
