"""Decoding on the GPU (data.decode=gpu): workers hand out JPEG files, and the device decodes and crops them.

The order of the images, their boxes and their masks are those of data.decode=cpu. Pixels differ a little, which makes
this an exception in this folder: decoders round colours in ways of their own, a large JPEG is not shrunk while it is
decoded, and crops are resized in float32 instead of 8-bit fixed point.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Self

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from crops import Crop, cut
from sources import (
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
    """Bytes of each file, its row in the batch, and the fields of its `Crop`."""
    names: list[str]

    @classmethod
    def pack(cls, crops: Sequence[Tensor | EncodedCrop]) -> Self:
        """Pack those crops of a batch, given in its order, that are files."""
        files = [(row, crop) for row, crop in enumerate(crops) if isinstance(crop, EncodedCrop)]
        table = [[len(crop.data), row, *astuple(crop.box)] for row, crop in files]
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
        images = torch.empty(
            self.num_rows, *others.shape[1:], dtype=torch.uint8, device=device, memory_format=torch.channels_last
        )
        sizes, rows = self.table[:, 0].tolist(), self.table[:, 1].tolist()
        rest = sorted(set(range(self.num_rows)) - set(rows))
        if rest:
            images[torch.tensor(rest, device=device)] = others.to(device)
        bad: dict[int, tuple[str, str]] = {}
        decoded = _decode_jpegs(list(self.blob.split(sizes)) if sizes else [], device)
        for (_, row, *box, flip), name, pixels in zip(self.table.tolist(), self.names, decoded, strict=True):
            if isinstance(pixels, Tensor):
                images[row] = cut_in_float(pixels, Crop(*box, flip=bool(flip)), others.shape[-1])
            else:
                bad[row] = (name, pixels)
        readable = [row for row in range(self.num_rows) if row not in bad]
        if not readable:
            raise UserError(
                f"data.dataset: {len(bad)} images in a row cannot be read, last {': '.join(bad.popitem()[1])}"
            )
        for row in bad:
            images[row] = images[max((r for r in readable if r < row), default=readable[-1])]
        return images, list(bad.values())


def cut_in_float(pixels: UInt8[Tensor, "3 h w"], crop: Crop, size: int) -> UInt8[Tensor, "3 size size"]:
    """As `crops.cut`, computed in float32 and rounded at the end: torch's 8-bit resizing is for CPUs alone."""
    box = pixels[None, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    square = interpolate(box.float(), size=(size, size), mode="bicubic", antialias=True)
    square = square.round_().clamp_(0, 255).to(torch.uint8)
    return (square.flip(-1) if crop.flip else square)[0]


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | str]:
    """The pixels of each file on `device`, or why it cannot be read.

    TorchCodec decodes on the current stream and waits for it: what follows there may read the result, and free it.
    """
    decode_jpeg = jpeg_decoder()
    assert decode_jpeg is not None, "check_device was not called"
    if not files:
        return []
    with silent_decoders():
        try:
            return decode_jpeg(files, mode="RGB", device=device)
        except RuntimeError:
            # The message does not say which of them it was.
            return [_decode_alone(decode_jpeg, file, device) for file in files]


def _decode_alone(decode_jpeg: Callable[..., Any], file: Tensor, device: torch.device) -> Tensor | str:
    reason = ""
    for place in (device, torch.device("cpu")):  # the CPU's decoder has the last word on what is damaged
        try:
            return decode_jpeg(file, mode="RGB", device=place).to(device)
        except RuntimeError as error:
            reason = str(error)
    return reason


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
