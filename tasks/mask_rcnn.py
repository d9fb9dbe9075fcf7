"""Mask R-CNN (arXiv:1703.06870) on the feature maps of a plain vision transformer, from torchvision's parts.

A pyramid of five maps, a network that proposes boxes, and heads that give each proposal a class, a better box and a
mask. Beside torchvision's it has anchors and pooling for any patch size, pooling that is aligned to pixels, and the box
losses of decoded boxes (their overlap) and of regressions (L1), with first weights as in mmdetection and Detectron2.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_area, generalized_box_iou_loss, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import Conv2dNormActivation

from tasks.pyramid import SimplePyramid, SyncedBatchNorm

ANCHOR_STRIDES = 8.0
"""Side of the anchors of a map, in its strides: with patches of 16 pixels 32 to 512 pixels."""
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
CANONICAL_STRIDES = 14.0
"""Side, in patches, of the boxes that are pooled from the map of the patch grid's size and larger: 224 pixels with
patches of 16."""
BOX_POOL, MASK_POOL = 7, 14
"""Side of what the heads get of a box."""
MAX_DETECTIONS = 100
LOWEST_SCORE = 0.05

LOSSES = ("proposal_object", "proposal_box", "class", "box", "mask")
"""Names of the parts of the loss."""


class Targets(NamedTuple):
    """What is to be learned of one image."""

    boxes: Float[Tensor, "n 4"]
    classes: Int64[Tensor, " n"]
    """From 0 on."""
    masks: UInt8[Tensor, "n h w"] | None


class Detections(NamedTuple):
    """What is found in one image, the surest first."""

    boxes: Float[Tensor, "n 4"]
    classes: Int64[Tensor, " n"]
    """From 0 on."""
    scores: Float[Tensor, " n"]
    masks: Float[Tensor, "n m m"] | None
    """Probabilities within the box, see `paste_masks`."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, as ViTDet has it."""

    kept_in_float32 = ("weight", "bias")

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Float[Tensor, "b d _ _"]) -> Float[Tensor, "b d _ _"]:  # noqa: A002
        """Each place by itself."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelNorm, "batch": SyncedBatchNorm}
"""Norms of maps, by the names that configurations have for them."""


class Pyramid(nn.Module):
    """Five maps of equally many channels, at 4, 2, 1, 1/2 and 1/4 of the patch grid.

    Args:
        dim: channels of the backbone's maps.
        channels: of what is given.
        norm: makes a norm for so many channels.
        top_down: add to each map what the coarser ones say (arXiv:1612.03144); else each is by itself, as in ViTDet,
            and normed.
    """

    def __init__(self, dim: int, channels: int, norm: Callable[[int], nn.Module], *, top_down: bool) -> None:
        super().__init__()
        self.scales = SimplePyramid(dim, norm)
        num_maps = len(SimplePyramid.SCALES)
        if top_down:
            self.joined: nn.Module = FeaturePyramidNetwork([dim] * num_maps, channels, LastLevelMaxPool())
        else:
            self.joined = nn.ModuleList(
                nn.Sequential(_conv(dim, channels, 1, norm), _conv(channels, channels, 3, norm))
                for _ in range(num_maps)
            )

    def forward(self, maps: Sequence[Float[Tensor, "b d _ _"]]) -> list[Float[Tensor, "b c _ _"]]:
        """The finest map first."""
        scaled = self.scales(maps)
        if isinstance(self.joined, FeaturePyramidNetwork):
            return list(self.joined(OrderedDict(zip("0123", scaled, strict=True))).values())
        joined = [convs(x) for convs, x in zip(self.joined, scaled, strict=True)]  # pyright: ignore[reportArgumentType]
        return [*joined, F.max_pool2d(joined[-1], 1, 2)]


def _conv(dim: int, channels: int, kernel_size: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return Conv2dNormActivation(dim, channels, kernel_size, norm_layer=norm, activation_layer=None)


class Anchors(AnchorGenerator):
    """Anchors of three shapes at the upper left corner of each place of each map, in float32.

    torchvision's have whole numbers of pixels, as their distances, and the precision of the maps.

    Args:
        strides: pixels between the places of each map.
    """

    def __init__(self, strides: Sequence[float]) -> None:
        super().__init__(tuple((ANCHOR_STRIDES * stride,) for stride in strides), (ANCHOR_RATIOS,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Float[Tensor, "n 4"]]:
        """Of each image; row by row of each map, and all shapes of a place in turn."""
        anchors = []
        for stride, features in zip(self.strides, feature_maps, strict=True):
            rows, columns = (torch.arange(n, device=features.device) * stride for n in features.shape[-2:])
            ratios = torch.tensor(ANCHOR_RATIOS, device=features.device)
            height, width = ANCHOR_STRIDES * stride * ratios.sqrt(), ANCHOR_STRIDES * stride / ratios.sqrt()
            shapes = torch.stack([-width, -height, width, height], dim=1) / 2
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            places = torch.stack([x, y, x, y], dim=2).view(-1, 1, 4)
            anchors.append((places + shapes).view(-1, 4))
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's, whose outputs are in float32: boxes need it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and box regressions of each map."""
        logits, boxes = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in boxes]


class Proposals(RegionProposalNetwork):
    """torchvision's, with an L1 loss of boxes, as mmdetection and Detectron2 have it."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of the sampled anchors: whether they are objects, and the boxes of those that are."""
        chosen_positive, chosen_negative = (torch.cat(x) > 0 for x in self.fg_bg_sampler(labels))
        chosen = chosen_positive | chosen_negative
        targets = torch.cat([*regression_targets])
        off = (pred_bbox_deltas[chosen_positive] - targets[chosen_positive]).abs().sum()
        wanted = torch.cat(labels)[chosen]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[chosen], wanted), off / chosen.sum()


class Pool(nn.Module):
    """Equal parts of boxes from the map whose resolution suits the box, aligned to pixels.

    Args:
        size: side of what is given.
        strides: pixels between the places of the maps; later ones are not used.
        patch_size: see `CANONICAL_STRIDES`.
    """

    def __init__(self, size: int, strides: Sequence[float], patch_size: int) -> None:
        super().__init__()
        self.size, self.strides, self.canonical = size, strides, CANONICAL_STRIDES * patch_size

    def level(self, boxes: Float[Tensor, "n 4"]) -> Int64[Tensor, " n"]:
        """The map of each box: equation 1 of the FPN paper (arXiv:1612.03144)."""
        whole = SimplePyramid.SCALES.index(1)
        level = torch.floor(whole + torch.log2(box_area(boxes).sqrt() / self.canonical) + 1e-6)
        return level.clamp(0, len(self.strides) - 1).long()

    def forward(
        self, maps: Sequence[Float[Tensor, "b c _ _"]], boxes: Sequence[Float[Tensor, "_ 4"]]
    ) -> Float[Tensor, "n c _ _"]:
        """Of all boxes of all images, image by image."""
        numbers = [torch.full((len(own), 1), float(i), device=own.device) for i, own in enumerate(boxes)]
        placed = torch.cat([torch.cat(numbers), torch.cat([*boxes])], dim=1)
        levels = self.level(placed[:, 1:])
        order = torch.argsort(levels, stable=True)
        pooled = []
        for level, (stride, features) in enumerate(zip(self.strides, maps[: len(self.strides)], strict=True)):
            own = placed[levels == level]
            pooled.append(roi_align(features.float(), own, self.size, 1 / stride, sampling_ratio=0, aligned=True))
        return torch.cat(pooled)[torch.argsort(order)]


class Heads(RoIHeads):
    """torchvision's, with a loss of decoded boxes or an L1 loss, and masks aligned to pixels.

    Args:
        box_loss: `giou`, of decoded boxes (arXiv:1902.09630), or `l1`, of what is regressed.
        box_loss_weight: what it is multiplied by.
        **parts: those of `RoIHeads`.
    """

    def __init__(self, *, box_loss: str, box_loss_weight: float, **parts: Any) -> None:
        super().__init__(**parts)
        self.box_loss, self.box_loss_weight = box_loss, box_loss_weight

    def losses(
        self, maps: Sequence[Tensor], proposals: list[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses of classes, boxes and masks."""
        known = [{"boxes": t.boxes, "labels": t.classes + 1, "masks": t.masks} for t in targets]  # 0: no object
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, known)
        logits, regressed = self.box_outputs(maps, proposals)
        label, wanted = torch.cat(labels), torch.cat([*regression_targets])
        positive = torch.where(label > 0)[0]
        regressed = regressed.view(len(label), -1, 4)[positive, label[positive]]
        if self.box_loss == "giou":
            places = torch.cat(proposals)[positive]
            found, true = (self.box_coder.decode_single(x, places) for x in (regressed, wanted[positive]))
            off = generalized_box_iou_loss(found, true, reduction="sum")
        else:
            off = (regressed - wanted[positive]).abs().sum()
        losses = {
            "class": F.cross_entropy(logits, label),
            "box": self.box_loss_weight * off / len(label),
        }
        if self.has_mask():
            inside = [own > 0 for own in labels]
            places = [own[chosen] for own, chosen in zip(proposals, inside, strict=True)]
            of_image = [own[chosen] for own, chosen in zip(matched, inside, strict=True)]
            wanted_masks = torch.cat([
                mask_targets(t.masks, place, number, 2 * MASK_POOL)
                for t, place, number in zip(targets, places, of_image, strict=True)
                if t.masks is not None
            ])  # fmt: skip
            found_masks = self.mask_outputs(maps, places)[torch.arange(len(positive)), label[positive]]
            # A mean over nothing is not a number.
            total = F.binary_cross_entropy_with_logits(found_masks, wanted_masks, reduction="sum")
            losses["mask"] = total / max(1, wanted_masks.numel())
        return losses

    def detect(self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """What is found in each image, of which `sizes` has height and width."""
        logits, regressed = self.box_outputs(maps, proposals)
        boxes, scores, labels = self.postprocess_detections(logits, regressed, proposals, sizes)
        masks: Sequence[Tensor | None] = [None] * len(boxes)
        if self.has_mask():
            masks = [own[:, 0] for own in maskrcnn_inference(self.mask_outputs(maps, boxes), labels)]
        return [
            Detections(box, label - 1, score, mask)
            for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
        ]

    def box_outputs(self, maps: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of classes and what is regressed for each of them, of all proposals, in float32."""
        logits, regressed = self.box_predictor(self.box_head(self.box_roi_pool(maps, proposals)))
        return logits.float(), regressed.float()

    def mask_outputs(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Logits of masks of all classes, of all boxes, in float32."""
        assert self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes))).float()


def mask_targets(
    masks: UInt8[Tensor, "n h w"], boxes: Float[Tensor, "m 4"], numbers: Int64[Tensor, " m"], size: int
) -> Float[Tensor, "m _ _"]:
    """What is to be learned of the masks with these numbers within boxes: 1 where most of a part is inside."""
    if len(masks) == 0:  # then there is no box either
        return boxes.new_zeros(0, size, size)
    placed = torch.cat([numbers[:, None].to(boxes), boxes], dim=1)
    parts = roi_align(masks[:, None].to(boxes), placed, size, 1.0, sampling_ratio=0, aligned=True)
    return (parts[:, 0] >= 0.5).to(boxes)


def paste_masks(
    masks: Float[Tensor, "n m m"], boxes: Float[Tensor, "n 4"], height: int, width: int
) -> Bool[Tensor, "n height width"]:
    """Masks of an image, from probabilities within boxes: true where, between the middles, it is a half or more."""
    result = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for number, (mask, box) in enumerate(zip(masks.float().cpu(), boxes.tolist(), strict=True)):
        left, top = max(0, int(box[0])), max(0, int(box[1]))
        right, bottom = min(width, int(box[2]) + 1), min(height, int(box[3]) + 1)
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right) + 0.5 - box[0]) / max(box[2] - box[0], 1e-6)
        y = (torch.arange(top, bottom) + 0.5 - box[1]) / max(box[3] - box[1], 1e-6)
        rows, columns = torch.meshgrid(2 * y - 1, 2 * x - 1, indexing="ij")
        grid = torch.stack([columns, rows], dim=2)[None]
        part = F.grid_sample(mask[None, None], grid, align_corners=False)
        result[number, top:bottom, left:right] = part[0, 0] >= 0.5
    return result


def _zero_bias_(layer: Any) -> None:
    nn.init.zeros_(layer.bias)


def _normal_(layer: Any, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    _zero_bias_(layer)


class MaskRCNN(nn.Module):
    """Detection head: from feature maps of padded images to losses or detections.

    Args:
        dim: channels of the backbone's maps.
        patch_size: its patches, in pixels.
        num_classes: without that of no object.
        channels: of the pyramid and of the convolutions after it.
        norm: makes a norm for so many channels.
        top_down: see `Pyramid`.
        proposal_convs: convolutions of the network that proposes boxes.
        box_convs: of the head of classes and boxes, each with a norm.
        box_dim: of its hidden layer.
        mask_convs: of the head of masks; None for no masks.
        norm_masks: whether they have norms.
        num_proposals: for each image, after the suppression of those that overlap.
        num_samples: proposals of an image that are learned from, of which a quarter are objects at most.
        box_loss, box_loss_weight: see `Heads`.
    """

    forward_methods = ()  # its parts are called several times in a forward pass: weights are gathered for all of it

    def __init__(
        self,
        dim: int,
        patch_size: int,
        num_classes: int,
        *,
        channels: int,
        norm: Callable[[int], nn.Module],
        top_down: bool,
        proposal_convs: int,
        box_convs: int,
        box_dim: int,
        mask_convs: int | None,
        norm_masks: bool,
        num_proposals: int,
        num_samples: int,
        box_loss: str,
        box_loss_weight: float,
    ) -> None:
        super().__init__()
        strides = [patch_size / scale for scale in SimplePyramid.SCALES]
        self.pyramid = Pyramid(dim, channels, norm, top_down=top_down)
        self.proposals = Proposals(
            Anchors([*strides, 2 * strides[-1]]),
            ProposalHead(channels, len(ANCHOR_RATIOS), proposal_convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
            post_nms_top_n={"training": num_proposals, "testing": num_proposals},
            nms_thresh=0.7,
        )
        num_labels = num_classes + 1
        predictor = FastRCNNPredictor(box_dim, num_labels)
        _normal_(predictor.cls_score, 0.01)
        _normal_(predictor.bbox_pred, 0.001)
        of_masks: dict[str, nn.Module] = {}
        if mask_convs is not None:
            layers = [channels] * mask_convs
            mask_predictor = MaskRCNNPredictor(channels, channels, num_labels)
            _zero_bias_(mask_predictor.conv5_mask)
            _normal_(mask_predictor.mask_fcn_logits, 0.001)
            of_masks = {
                "mask_roi_pool": Pool(MASK_POOL, strides, patch_size),
                "mask_head": MaskRCNNHeads(channels, layers, dilation=1, norm_layer=norm if norm_masks else None),
                "mask_predictor": mask_predictor,
            }
        self.heads = Heads(
            box_loss=box_loss,
            box_loss_weight=box_loss_weight,
            box_roi_pool=Pool(BOX_POOL, strides, patch_size),
            box_head=FastRCNNConvFCHead(
                (channels, BOX_POOL, BOX_POOL), [channels] * box_convs, [box_dim], norm_layer=norm
            ),
            box_predictor=predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=num_samples,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=LOWEST_SCORE,
            nms_thresh=0.5,
            detections_per_img=MAX_DETECTIONS,
            **of_masks,
        )

    def forward(
        self,
        maps: Sequence[Float[Tensor, "b d _ _"]],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets] | None = None,
    ) -> dict[str, Float[Tensor, ""]] | list[Detections]:
        """Losses by `LOSSES`, of targets; without, what is found in each image.

        Args:
            maps: of the backbone.
            sizes: height and width of each image without its padding.
            targets: of each image; in training.
        """
        levels = self.pyramid(maps)
        # Of the images themselves nothing is used.
        images = ImageList(levels[0], [*sizes])
        known = None if targets is None else [{"boxes": t.boxes} for t in targets]
        proposals, found = self.proposals(images, OrderedDict(enumerate(levels)), known)
        if targets is None:
            return self.heads.detect(levels, proposals, [*sizes])
        first = {"proposal_object": found["loss_objectness"], "proposal_box": found["loss_rpn_box_reg"]}
        return first | self.heads.losses(levels, proposals, targets)
