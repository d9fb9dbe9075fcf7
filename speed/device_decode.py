"""Decoding on the GPU (data.decode=gpu): workers hand out JPEG files, and the device decodes and crops them.

The order of the images, their boxes and their masks are those of data.decode=cpu. Pixels differ a little, which makes
this an exception in this folder: decoders round colours in ways of their own, a large JPEG is not shrunk while it is
decoded, and crops are resized in float32 instead of 8-bit fixed point.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from reading.crops import Crop, cut
from reading.sources import (
    Sample,
    as_bytes_tensor,
    damage_named,
    decode_pixels,
    exif_orientation,
    jpeg_decoder,
    silent_decoders,
)
from utils import UserError

END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG file, and the box that is to be cut from it."""

    name: str
    """That of the sample."""
    data: bytes
    box: Crop


def crop_or_file(
    sample: Sample, draw: Callable[[int, int], Crop], reduction: Callable[[int, int], int], size: int
) -> UInt8[Tensor, "3 size size"] | EncodedCrop:
    """The file of a JPEG that every GPU decodes as it is, with the box to cut from it; of another image, the crop.

    Args:
        sample: the image.
        draw: from the (width, height) of an image to a box in it.
        reduction: from (width, height) to the divisor by which a CPU would shrink a JPEG while it decodes it. The box
            is drawn in the image that a CPU would see, so that it is the same wherever the image is decoded.
        size: of a crop, in pixels.

    Raises: BadImageError if the file cannot be read; damage within a JPEG shows only when that is decoded.
    """
    with damage_named(sample.name):
        data = sample.read()
        jpeg_size = _size_of_plain_jpeg(data) if isinstance(data, bytes) else None
        if isinstance(data, bytes) and jpeg_size:
            width, height = jpeg_size
            divisor = reduction(width, height)
            box = draw(-(-width // divisor), -(-height // divisor))
            return EncodedCrop(sample.name, data, _enlarged(box, divisor, width, height))
        pixels = decode_pixels(data, reduction)
    return cut(pixels, draw(pixels.shape[2], pixels.shape[1]), size)


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height. None for what a CPU is to decode: other formats and colours, files that are turned by their
    EXIF orientation, progressive ones, and those without an end."""
    image = Image.open(io.BytesIO(data))
    if image.format != "JPEG" or image.mode != "RGB" or "progressive" in image.info:
        return None
    return image.size if END_OF_JPEG in data[-64:] and exif_orientation(image) == 1 else None


def _enlarged(box: Crop, factor: int, width: int, height: int) -> Crop:
    """The same box in the image of this size, of which the box's own is 1 / `factor`, rounded up."""
    top, left = box.top * factor, box.left * factor
    bottom, right = min(top + box.height * factor, height), min(left + box.width * factor, width)
    return Crop(top, left, bottom - top, right - left, box.flip)


@dataclass(frozen=True)
class EncodedCrops:
    """Those crops of a batch that are still JPEG files, in few tensors: each costs a handle between processes."""

    num_rows: int
    """Images of the batch, those included that are crops already."""
    blob: UInt8[Tensor, " bytes"]
    """The files, one after the other."""
    table: Int64[Tensor, "n 7"]
    """Bytes of each file, its row in the batch, and top, left, height, width and `flip` of its `Crop`."""
    names: list[str]

    @classmethod
    def pack(cls, crops: Sequence[Tensor | EncodedCrop]) -> Self:
        """Pack those crops of a batch, given in its order, that are files."""
        files = [(row, crop) for row, crop in enumerate(crops) if isinstance(crop, EncodedCrop)]
        boxes = [crop.box for _, crop in files]  # upright ones: see config.PretrainingImagesConfig
        table = [
            [len(crop.data), row, box.top, box.left, box.height, box.width, box.flip]
            for (row, crop), box in zip(files, boxes, strict=True)
        ]
        blob = as_bytes_tensor(b"".join(crop.data for _, crop in files)) if files else torch.empty(0).byte()
        names = [crop.name for _, crop in files]
        return cls(len(crops), blob, torch.tensor(table, dtype=torch.int64).view(-1, 7), names)

    def decode(
        self, others: UInt8[Tensor, "k 3 h w"], device: torch.device
    ) -> tuple[UInt8[Tensor, "b 3 h w"], list[tuple[str, str]]]:
        """All crops of the batch on `device`, and (name, reason) of the files that turned out to be damaged.

        A damaged one is replaced by the readable one before it in the batch, or the last one of the batch.

        Args:
            others: crops of the rows that are not here, in their order.
            device: where the files are decoded.

        Raises: UserError if none of the batch can be read.
        """
        lengths, rows = self.table[:, 0].tolist(), self.table[:, 1].tolist()
        crops: list[tuple[int, Tensor, Crop]] = []
        bad: dict[int, tuple[str, str]] = {}
        decoded = _decode_jpegs(list(self.blob.split(lengths)) if rows else [], device)
        for (_, row, *box, flip), name, pixels in zip(self.table.tolist(), self.names, decoded, strict=True):
            if isinstance(pixels, Tensor):
                crops.append((row, pixels, Crop(*box, flip=bool(flip))))
            else:
                bad[row] = (name, pixels)
        crops.sort(key=lambda crop: crop[2].height * crop[2].width)
        readable = [*sorted(set(range(self.num_rows)) - set(rows)), *(row for row, *_ in crops)]
        if not readable:
            raise UserError(
                f"data.dataset: {len(bad)} images in a row cannot be read, last {': '.join(bad.popitem()[1])}"
            )
        place = {row: index for index, row in enumerate(readable)}
        for row in bad:
            place[row] = place[max((other for other in readable if other < row), default=max(readable))]
        # To the device before crops are queued there: a copy from memory that is not pinned waits for them.
        order = torch.tensor([place[row] for row in range(self.num_rows)]).to(device)
        squares = cut_together([pixels for _, pixels, _ in crops], [box for *_, box in crops], others.shape[-1])
        return torch.cat([others.to(device, non_blocking=True), *squares])[order], list(bad.values())


PADDED_VALUES = 2**25
"""Most colour values of boxes that are cut together, padding included: 128 MiB as float32."""


def cut_together(
    pixels: Sequence[UInt8[Tensor, "3 _ _"]], boxes: Sequence[Crop], size: int
) -> list[UInt8[Tensor, "n 3 size size"]]:
    """Crops of images of any sizes, in order, in some batches: as `crops.cut`, but in float32 and rounded at the end.

    Resizing is linear, and the same for all columns, then for all rows: two matrix products. Boxes are padded to the
    largest of their batch, so that few launches do for many images what would otherwise take some for each. It pays
    that neighbours are of similar size.

    Args:
        pixels: one image per box, all on the same device.
        boxes: what to cut out of each.
        size: of the crops, in pixels.
    """
    if not boxes:
        return []
    lengths = [[box.height for box in boxes], [box.width for box in boxes]]
    flips = [[False for _ in boxes], [box.flip for box in boxes]]
    lines = torch.tensor([lengths, flips]).to(pixels[0].device)  # [lengths and flips, rows and columns, boxes]
    squares, start = [], 0
    while start < len(boxes):
        end, height, width = _fitting(boxes, start)
        # [n, h, 3, w], so that neither product needs another order of the axes. What is beyond a box counts 0 times.
        padded = torch.empty(end - start, height, 3, width, dtype=torch.uint8, device=lines.device)
        for room, image, box in zip(padded, pixels[start:end], boxes[start:end], strict=True):
            part = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
            room[: box.height, :, : box.width] = part.transpose(0, 1)
        weights = _bicubic_weights(*lines[..., start:end].flatten(1), size, max(height, width))
        of_rows, of_columns = weights.chunk(2)
        columns = padded.flatten(1, 2).float() @ of_columns[..., :width].mT  # [n, h*3, size]
        square = (of_rows[..., :height] @ columns.view(-1, height, 3 * size)).view(-1, size, 3, size)
        squares.append(square.round_().clamp_(0, 255).to(torch.uint8).transpose(1, 2))
        start = end
    return squares


def _fitting(boxes: Sequence[Crop], start: int) -> tuple[int, int, int]:
    """End of the batch of boxes that begins at `start`, and the height and width to which they are padded."""
    height, width = boxes[start].height, boxes[start].width
    for end in range(start + 1, len(boxes)):
        taller, wider = max(height, boxes[end].height), max(width, boxes[end].width)
        if (end + 1 - start) * 3 * taller * wider > PADDED_VALUES:
            return end, height, width
        height, width = taller, wider
    return len(boxes), height, width


def _bicubic_weights(
    lengths: Int64[Tensor, " n"], flips: Int64[Tensor, " n"], size: int, longest: int
) -> Float[Tensor, "n size longest"]:
    """By how much each pixel of a line of `lengths` counts in each of the `size` that it is resized to.

    Keys' cubic with a = -1/2, stretched where the line shrinks, as Pillow and torch have it with antialiasing. The
    cubic of 0 <= x < 2 is (1 - x) (2 - x)^2 / 2, plus (1 - x)^2 (2 x - 1) where x < 1.
    """
    lengths, flips = lengths.view(-1, 1, 1), flips.view(-1, 1, 1)
    scale = lengths / size
    target = torch.arange(size, device=lengths.device).view(-1, 1)
    target = torch.where(flips > 0, size - 1 - target, target)
    pixel = torch.arange(longest, device=lengths.device)
    near = 1 - ((pixel + 0.5 - (target + 0.5) * scale) / scale.clamp_min(1)).abs_()
    far = (near + 1).clamp_min_(0)
    weights = far.square_().mul_(near).mul_(0.5)
    weights += near.clamp_min_(0).square() * (1 - 2 * near)
    weights *= pixel < lengths
    return weights / weights.sum(-1, keepdim=True)


def _decode_jpegs(files: list[Tensor], device: torch.device) -> Sequence[Tensor | str]:
    """The pixels of each file on `device`, or why it cannot be read.

    TorchCodec decodes on the current stream and waits for it: what follows there may read the result, and free it.
    """
    if not files:
        return []
    try:
        return _decode(files, device)
    except RuntimeError:
        # The message does not say which of them it was.
        return [_decode_alone(file, device) for file in files]


def _decode_alone(file: Tensor, device: torch.device) -> Tensor | str:
    reason = ""
    for place in (device, torch.device("cpu")):  # the CPU's decoder has the last word on what is damaged
        try:
            return _decode([file], place)[0].to(device)
        except RuntimeError as error:
            reason = str(error)
    return reason


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    decode_jpeg = jpeg_decoder()
    assert decode_jpeg is not None, "check_device was not called"
    if device.type == "cuda":
        # nvJPEG's hardware engine does not wait for the stream that it is given, and TorchCodec 0.16 does not for it
        # (its pull request 1634). Pixels would be written where the queued crops of the batch before still read.
        torch.cuda.current_stream(device).synchronize()
    with silent_decoders():
        return decode_jpeg(files, mode="RGB", device=device)


def check_device(device: torch.device) -> None:
    """Check that `device` can decode JPEGs.

    Raises: UserError if it cannot.
    """
    remedy = "use data.decode=cpu and as many efficiency.dataloader_num_workers as there are cores"
    if device.type != "cuda":
        raise UserError(f"data.decode=gpu: needs a CUDA device, this run is on {device.type}; {remedy}")
    decode_jpeg, example = jpeg_decoder(), io.BytesIO()
    Image.new("RGB", (16, 16)).save(example, "JPEG")
    try:
        with silent_decoders():
            decoded = decode_jpeg and decode_jpeg([as_bytes_tensor(example.getvalue())], mode="RGB", device=device)
    except RuntimeError as error:
        raise UserError(f"data.decode=gpu: JPEGs cannot be decoded on {device} ({error}); {remedy}") from error
    if not decoded:
        raise UserError(f"data.decode=gpu: the package torchcodec is not installed; {remedy}")
