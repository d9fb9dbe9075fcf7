"""Images per second that one core turns into batches, against PIL and torchvision's v1 transforms.

    python bench/loading.py [--images 64] [--repeats 7] [--results FILE]

One process, one thread, JPEGs of 500 x 400 pixels with quality 90, crops of 224. The baseline opens and converts with
Pillow, crops, flips and normalises with `torchvision.transforms`, and stacks float32; ours are whole `PretrainLoader`
batches with masks, from a folder, parquet and tar, and then the normalisation, which training does on its device.
Rows are measured in turn, in processor time, and the table has medians: a busy machine spoils the ratios less. With a
CUDA device there is a row for data.decode=gpu: what is then left for the processor, and that spent waiting for the GPU.

The bound is the entropy decoding, inverse DCT and colour conversion of libjpeg-turbo, single-threaded in both decoders:
the rows `decode`. Bytes do not bind: a core reads and writes 10 GB/s, and an image moves 2 MB.
"""

import argparse
import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from results import add_arguments, print_table, record, whole_number
from torch import Tensor
from torchvision import transforms

from config import DEFAULT_PRETRAIN_CONFIG, argument, load_config
from data import IMAGENET_MEAN, IMAGENET_STD, normalize
from distributed import device_model
from reading.crops import cut, draw_crop
from reading.sources import as_bytes_tensor, decode_pixels, jpeg_decoder, silent_decoders
from train_capi import CapiConfig, make_loader

WIDTH, HEIGHT, SIZE, BATCH = 500, 400, 224, 64
TRANSFORM = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.6, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def made_up_jpeg(seed: int) -> bytes:
    """Gradients, shapes and texture, about as many bytes per pixel as a photograph."""
    random = np.random.default_rng(seed)
    picture = np.full((HEIGHT, WIDTH, 3), 128.0)
    for cells, amplitude in ((4, 60), (12, 40), (40, 25), (120, 12)):
        grid = random.normal(size=(3, cells, cells * WIDTH // HEIGHT)).astype(np.float32)
        layers = [Image.fromarray(layer).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for layer in grid]
        picture += amplitude * np.stack([np.asarray(layer) for layer in layers], -1)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_sources(root: Path, files: list[bytes]) -> dict[str, str]:
    """Write the files as a folder, a parquet file and a tar file; data URLs by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "images").mkdir()
    table = pa.table({"jpg": [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(files)]})
    features = {"info": {"features": {"jpg": {"_type": "Image"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), root / "images.parquet")
    with tarfile.open(root / "images.tar", "w") as archive:
        for index, content in enumerate(files):
            (root / "images" / f"{index:05d}.jpg").write_bytes(content)
            member = tarfile.TarInfo(f"{index:05d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    stream = "&split='train'&img_field='jpg'&streaming=True"
    return {
        "folder": str(root / "images"),
        "parquet, streamed": f"hf://parquet?data_files='{root / 'images.parquet'}'{stream}",
        "tar, streamed": f"hf://webdataset?data_files='{root / 'images.tar'}'{stream}",
    }


def baseline_batches(folder: Path) -> Iterator[Tensor]:
    """Float batches of the baseline, for ever."""
    paths = itertools.cycle(sorted(folder.iterdir()))
    while True:
        images = []
        for path in itertools.islice(paths, BATCH):
            with Image.open(path) as image:
                images.append(TRANSFORM(image.convert("RGB")))
        yield torch.stack(images)


def our_batches(url: str, *overrides: str, decode_device: torch.device | None = None) -> Iterator[Any]:
    """Batches of the loader, without workers."""
    sources = [
        f"data.dataset={url}",
        f"data.images_size={SIZE}",
        f"optim.batch_size_per_gpu={BATCH}",
        "efficiency.dataloader_num_workers=0",
        "efficiency.cache_dataset=false",
        *overrides,
    ]
    return make_loader(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources), decode_device=decode_device)


def gpu_batches(url: str) -> Callable[[], None]:
    """As `our_batches`, decoded and cropped on the CUDA device; each call waits for it."""
    batches = our_batches(url, "data.decode=gpu", decode_device=torch.device("cuda"))

    def call() -> None:
        next(batches)
        torch.cuda.synchronize()

    return call


def parts(files: list[bytes]) -> dict[str, Callable[[], object]]:
    """One image each, of what a loader is made of."""
    encoded = itertools.cycle([as_bytes_tensor(content) for content in files])
    data = itertools.cycle(files)
    pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in files]
    pillow, tensors = itertools.cycle(pictures), itertools.cycle([decode_pixels(content) for content in files])
    keys = itertools.count()
    decode_jpeg = jpeg_decoder()
    assert decode_jpeg is not None

    def draft() -> object:
        image = Image.open(io.BytesIO(next(data)))
        image.draft(None, (WIDTH // 2, HEIGHT // 2))
        return image.load()

    def pillow_crop() -> object:
        crop = draw_crop(WIDTH, HEIGHT, (0.6, 1.0), True, next(keys))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        return next(pillow).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)

    return {
        "decode: Pillow": lambda: Image.open(io.BytesIO(next(data))).load(),
        "decode: Pillow at half size (draft)": draft,
        "decode: TorchCodec": lambda: decode_jpeg(next(encoded), mode="RGB"),
        "crop and resize: Pillow": pillow_crop,
        "crop, resize, flip: ours": lambda: cut(
            next(tensors), draw_crop(WIDTH, HEIGHT, (0.6, 1.0), True, next(keys)), SIZE
        ),
        "box and flip drawn": lambda: draw_crop(WIDTH, HEIGHT, (0.6, 1.0), True, next(keys)),
    }


def measure(rows: dict[str, tuple[int, Callable[[], object]]], num_images: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per image, `repeats` of each row in turn; a row is (images per call, call)."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, (images_per_call, call) in rows.items():
            calls = num_images // images_per_call
            start = time.process_time()
            for _ in range(calls):
                call()
            if repeat > 0:
                seconds[name].append((time.process_time() - start) / (calls * images_per_call))
    return seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = argument(int, at_least=BATCH)
    parser.add_argument("--images", type=images, default=64, help="images per row and repeat, a multiple of 64")
    parser.add_argument("--repeats", type=whole_number, default=9)
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    files = [made_up_jpeg(seed) for seed in range(args.images)]
    with tempfile.TemporaryDirectory() as folder:
        urls = write_sources(Path(folder), files)
        streams = {name: our_batches(url) for name, url in urls.items()}
        baseline = baseline_batches(Path(folder) / "images")
        batch = next(streams["folder"]).images
        rows: dict[str, tuple[int, Callable[[], object]]] = {
            "baseline: Pillow, torchvision v1, float32": (BATCH, lambda: next(baseline)),
            **{f"ours: {name}": (BATCH, lambda stream=stream: next(stream)) for name, stream in streams.items()},
            **({"ours: folder, decoded on the GPU": (BATCH, gpu_batches(urls["folder"]))} if has_gpu else {}),
            "normalisation, after ours": (BATCH, lambda: normalize(batch)),
            **{name: (1, call) for name, call in parts(files).items()},
        }
        with silent_decoders():
            seconds = measure(rows, args.images, args.repeats)
    reference = seconds["baseline: Pillow, torchvision v1, float32"]
    numbers = [
        {
            "row": name,
            "ms per image": 1e3 * statistics.median(times),
            "images/s per core": 1 / statistics.median(times),
            "times the baseline": statistics.median(r / t for r, t in zip(reference, times, strict=True)),
        }
        for name, times in seconds.items()
    ]
    print_table(numbers)
    settings = {"jpeg": f"{WIDTH}x{HEIGHT}", "crop": SIZE, "batch": BATCH, "images": args.images}
    gpu = {"gpu": device_model(torch.device("cuda"))} if has_gpu else {}
    record(args, "loading", settings | gpu, numbers, torch.device("cpu"))


if __name__ == "__main__":
    main()
