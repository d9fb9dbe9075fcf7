"""Crops: random boxes of images, and cutting them out on the CPU, or on the GPU from JPEG files.

A crop is a function of its key, such as a seed and a position in the data; no state is kept.
"""

import hashlib
import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sources import JpegFile, as_bytes_tensor, jpeg_decoder, silent_decoders
from utils import UserError

CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


def derive_uniforms(*parts: object) -> list[float]:
    """Five numbers, uniform in [0, 1), that depend on every part; to seed a generator for so few would take longer."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=40).digest()
    return [number / 2**64 for number in struct.unpack("<5Q", digest)]


@dataclass(frozen=True)
class Crop:
    """A box of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def of_larger(self, factor: int, height: int, width: int) -> Self:
        """The same box of the image of this size, of which the box's own is 1 / `factor` rounded up."""
        top, left = self.top * factor, self.left * factor
        bottom, right = min(top + self.height * factor, height), min(left + self.width * factor, width)
        return replace(self, top=top, left=left, height=bottom - top, width=right - left)


def draw_crop(width: int, height: int, scale: tuple[float, float], do_hflip: bool, *key: object) -> Crop:
    """A random crop as torchvision's RandomResizedCrop and RandomHorizontalFlip describe it, a function of `key`.

    Area uniform in `scale`, aspect ratio log-uniform in `CROP_RATIO`, place uniform; ten attempts to find one that
    fits, then the middle of the image, as much of it as has a permitted ratio.
    """
    low, high = map(math.log, CROP_RATIO)
    flip = False
    for attempt in range(CROP_ATTEMPTS):
        u_area, u_ratio, u_top, u_left, u_flip = derive_uniforms("crop", attempt, *key)
        flip = do_hflip and (u_flip < 0.5 if attempt == 0 else flip)
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w, flip)
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def cut(
    pixels: UInt8[Tensor, "3 h w"], crop: Crop, size: int, *, in_float: bool = False
) -> UInt8[Tensor, "3 size size"]:
    """The crop as a square of `size` pixels, antialiased bicubic, with the channels innermost in memory.

    In 8-bit fixed point, which torch has on the CPU, it takes a third of Pillow's time and is within a grey level of
    it; with `in_float` in float32, rounded at the end.
    """
    # One axis more while the channels are innermost, so that its stride is that of a batch: else torch would take the
    # layout for that of a single channel, and transpose the result.
    rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
    box = pixels.permute(1, 2, 0)[None, rows, columns].permute(0, 3, 1, 2)
    square = interpolate(box.float() if in_float else box, size=(size, size), mode="bicubic", antialias=True)
    if in_float:
        square = square.round_().clamp_(0, 255).to(torch.uint8)
    return (square.flip(-1) if crop.flip else square)[0]


# ------------------------------------------------------------------------------ decoding on the device


@dataclass(frozen=True)
class EncodedCrop:
    """A JPEG, and the box that is to be cut from it."""

    file: JpegFile
    box: Crop


@dataclass(frozen=True)
class EncodedCrops:
    """Those crops of a batch that are still JPEG files, in few tensors: each costs a handle between processes."""

    num_rows: int
    """Images of the batch; those that are not here are in `Batch.images`, in order."""
    blob: UInt8[Tensor, " bytes"]
    """The files, one after the other."""
    files: Int64[Tensor, "n 7"]
    """Of each: bytes, row in the batch, and the fields of its `Crop`."""
    names: list[str]

    @classmethod
    def pack(cls, crops: dict[int, EncodedCrop], num_rows: int) -> Self:
        """Pack crops by their row in a batch of `num_rows`."""
        table = [
            [len(c.file.data), row, c.box.top, c.box.left, c.box.height, c.box.width, c.box.flip]
            for row, c in crops.items()
        ]
        blob = as_bytes_tensor(b"".join(c.file.data for c in crops.values())) if crops else torch.empty(0).byte()
        return cls(
            num_rows, blob, torch.tensor(table, dtype=torch.int64).view(-1, 7), [c.file.name for c in crops.values()]
        )

    def decode(
        self, others: UInt8[Tensor, "k 3 h w"], device: torch.device
    ) -> tuple[UInt8[Tensor, "b 3 h w"], list[tuple[str, str]]]:
        """All crops of the batch on `device`, and (name, reason) of the files that turned out to be damaged.

        A damaged one is replaced by the readable one before it in the batch, or the last one of the batch.

        Args:
            others: crops of the rows that are not here.
            device: where the files are decoded.

        Raises: UserError if none of the batch can be read.
        """
        images = torch.empty(
            self.num_rows, *others.shape[1:], dtype=torch.uint8, device=device, memory_format=torch.channels_last
        )
        rows = [fields[1] for fields in self.files.tolist()]
        rest = sorted(set(range(self.num_rows)) - set(rows))
        if rest:
            images[torch.tensor(rest, device=device)] = others.to(device)
        bad: dict[int, tuple[str, str]] = {}
        sizes = self.files[:, 0].tolist()
        decoded = _decode_jpegs(list(self.blob.split(sizes)) if sizes else [], device)
        for (_, row, *box, flip), name, pixels in zip(self.files.tolist(), self.names, decoded, strict=True):
            if isinstance(pixels, Tensor):
                crop = Crop(*box, flip=bool(flip))
                images[row] = cut(pixels, crop, others.shape[-1], in_float=True)
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


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | str]:
    """The pixels of each file on `device`, or why it cannot be read.

    TorchCodec decodes on the current stream and waits for it: what follows there may read the result, and free it.
    """
    decode_jpeg = jpeg_decoder()
    assert decode_jpeg is not None, "check_decode was not called"
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
    for where in (device, torch.device("cpu")):  # the CPU's decoder has the last word on what is damaged
        try:
            return decode_jpeg(file, mode="RGB", device=where).to(device)
        except RuntimeError as error:
            reason = str(error)
    return reason


def check_decode(decode: str, device: torch.device) -> None:
    """Check that `device` can do what data.decode asks of it.

    Raises: UserError if it cannot.
    """
    if decode == "cpu":
        return
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
