"""pixels.py: what a sample of a data set shows, and what it warns of."""

import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import make_images, run_forked, run_main, tiny
from PIL import Image
from samples import encode, photo

from reading import pixels
from reading.pixels import sample_pixels
from reading.sources import ImageStream, Sample, make_dataset


def tiff(values, *, extra=()):
    """An uncompressed TIFF of [h, w, bands], which Pillow cannot write with bands beyond RGBA."""
    height, width, bands = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries, appended = [], b""
    for tag, numbers in sorted({
        256: [width], 257: [height], 258: [8 * values.dtype.itemsize] * bands, 259: [1], 262: [2 if bands > 2 else 1],
        273: [8], 277: [bands], 278: [height], 279: [len(data)], 284: [1], 339: [kind] * bands,
        **({338: list(extra)} if extra else {}),
    }.items()):  # fmt: skip
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4:
            place = 8 + len(data) + len(appended)
            appended, packed = appended + packed, struct.pack("<I", place)
        entries.append(struct.pack("<HHI", tag, 4, len(numbers)) + packed)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(appended)) + data + appended + directory


def noise(high, *shape, dtype=np.uint16, low=0):
    return (low + np.random.default_rng(0).random((40, 30, *shape)) * (high - low)).astype(dtype)


def on_disk(folder, content, ending, num=3):
    for index in range(num):
        (folder / f"{index}{ending}").write_bytes(content)
    return make_dataset(str(folder))


PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 255, 200, 30, 40, *[0] * 750])
PALETTE.putpixel((0, 0), 0)
OPAQUE = Image.merge("RGBA", (*photo(1).split(), Image.new("L", (80, 60), 255)))
CUTOUT = Image.merge("RGBA", (*photo(1).split(), photo(2).getchannel(0)))
PAGES = {"save_all": True, "append_images": [photo(2), photo(3)]}

LOST = [
    ("12 bits of 16, grey PNG", encode(Image.fromarray(noise(4095))), ".png", "16-bit I;16 PNG) use 16 of 256 grey"),
    ("12 bits of 16, grey TIFF", tiff(noise(4095, 1)), ".tif", "use 16 of 256 grey levels (stored as"),
    ("12 bits of 16, RGB TIFF", tiff(noise(4095, 3)), ".tif", "(16-bit RGB TIFF) use"),
    ("14 bits of 16", tiff(noise(16383, 1)), ".tif", "use 6"),
    ("10 bits of 16", tiff(noise(1023, 1)), ".tif", "use 4 of 256"),
    ("8 bits of 16", tiff(noise(255, 1)), ".tif", "use 1 of 256"),
    ("12 bits around the middle", tiff(noise(34000, 1, low=32000)), ".tif", "of 256 grey levels"),
    ("12 bits, no data", tiff(np.where(noise(4095, 1) > 3000, 65535, noise(4095, 1)).astype("u2")), ".tif", "grey"),
    ("float of small values", tiff(noise(0.1, 1, dtype=np.float32)), ".tif", "of 256 grey levels"),
    ("float outside of [0, 1]", tiff(noise(900, 1, dtype=np.float32)), ".tif", "scaled by its own darkest"),
    ("negative integers", tiff(noise(900, 1, dtype=np.int16, low=-900)), ".tif", "scaled by its own darkest"),
    ("label numbers", encode(Image.fromarray(noise(5, dtype=np.uint8))), ".png", "of 256 grey levels"),
    ("alpha", encode(CUTOUT), ".png", "taken for their opacity"),
    ("a palette with a clear colour", encode(PALETTE, transparency=0), ".png", "taken for their opacity"),
    ("4 bands, tagged as alpha", tiff(noise(255, 4, dtype=np.uint8), extra=[2]), ".tif", "taken for their opacity"),
    ("4 bands, untagged", tiff(noise(255, 4, dtype=np.uint8)), ".tif", "taken for their opacity"),
    ("4 bands, the fourth unspecified", tiff(noise(255, 4, dtype=np.uint8), extra=[0]), ".tif", "4 bands, 1 of them"),
    ("2 bands", tiff(noise(255, 2, dtype=np.uint8), extra=[0]), ".tif", "2 bands, 1 of them"),
    ("5 bands", tiff(noise(255, 5, dtype=np.uint8), extra=[0, 0]), ".tif", "5 bands, 2 of them"),
    ("5 bands of 16 bits", tiff(noise(65535, 5), extra=[0, 0]), ".tif", "3 of 3 images cannot be read, first"),
    ("bands as pages", encode(photo(1), "TIFF", **PAGES), ".tif", "3 pages, of which the first is read"),
    ("black", encode(Image.new("L", (9, 9), 0)), ".png", "have the value 0 of 255 everywhere"),
    ("damaged", b"damaged", ".png", "3 of 3 images cannot be read, first"),
]  # fmt: skip

KEPT = [
    ("photographs", encode(photo(1), "JPEG"), ".jpg"),
    ("dark photographs", encode(photo(1).point(lambda value: value // 8), "JPEG"), ".jpg"),
    ("grey", encode(photo(1).convert("L")), ".png"),
    ("black and white", encode(photo(1).convert("1")), ".png"),
    ("palette", encode(PALETTE), ".png"),
    ("CMYK", encode(photo(1).convert("CMYK"), "JPEG"), ".jpg"),
    ("16 bits, all used", tiff(noise(65535, 1)), ".tif"),
    ("16 bits, half used", tiff(noise(32767, 1)), ".tif"),
    ("16-bit RGB", tiff(noise(65535, 3)), ".tif"),
    ("float in [0, 1]", tiff(noise(1, 1, dtype=np.float32)), ".tif"),
    ("two shades", encode(Image.fromarray(np.where(noise(2, dtype=np.uint8), 90, 0).astype(np.uint8))), ".png"),
    ("opaque", encode(OPAQUE), ".png"),
    ("animation", encode(photo(1), "GIF", **PAGES), ".gif"),
]


@pytest.mark.parametrize(("content", "ending", "message"), [case[1:] for case in LOST], ids=[case[0] for case in LOST])
def test_what_decoding_loses_is_warned_of(content, ending, message, tmp_path):
    warnings = sample_pixels(on_disk(tmp_path, content, ending)).warnings()
    assert [message in warning and "3 of 3 images" in warning for warning in warnings] == [True], warnings


@pytest.mark.parametrize(("content", "ending"), [case[1:] for case in KEPT], ids=[case[0] for case in KEPT])
def test_nothing_is_warned_of_where_nothing_is_lost(content, ending, tmp_path):
    found = sample_pixels(on_disk(tmp_path, content, ending))
    assert found.warnings() == []
    assert len(found.lines()) == 2


def test_the_sample_gives_range_mean_and_deviation_of_what_is_seen_and_the_range_of_what_is_stored(tmp_path):
    values = np.array([[0, 257 * 10], [257 * 30, 65535]], np.uint16)
    found = sample_pixels(on_disk(tmp_path, encode(Image.fromarray(values)), ".png", num=1))
    seen = np.array([0, 10, 30, 255])
    stored, shown = found.lines()
    assert stored == "1 of 1 images looked at: 1 16-bit I;16 PNG with values 0 to 65535"
    for band in ("red", "green", "blue"):
        assert f"{band} 0 to 255, mean {seen.mean():.1f}, deviation {seen.std():.1f}" in shown


def test_each_kind_of_file_is_judged_by_itself(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(encode(photo(index), "JPEG"))
    (tmp_path / "deep.png").write_bytes(encode(Image.fromarray(noise(4095))))
    (warning,) = sample_pixels(make_dataset(str(tmp_path))).warnings()
    assert warning.startswith("1 of 5 images (16-bit I;16 PNG) use 16 of 256 grey levels (stored as 0 to 409")


def test_a_large_data_set_is_sampled_from_end_to_end(tmp_path):
    for index in range(100):
        (tmp_path / f"{index:03d}.png").write_bytes(encode(Image.new("L", (1, 1), index)))
    found = sample_pixels(make_dataset(str(tmp_path)))
    assert found.num == pixels.NUM_IMAGES
    assert "red 0 to 99" in found.lines()[1]


class Endless(ImageStream):
    num_shards = 1

    def read_shard(self, shard, start=0):
        while True:
            yield Sample("x", lambda: encode(photo(0)))


def test_of_a_stream_the_first_images_are_sampled():
    assert sample_pixels(Endless()).num == pixels.NUM_IMAGES


def test_a_read_that_never_returns_holds_nobody_up(monkeypatch, caplog):
    monkeypatch.setattr(pixels, "TIME_LIMIT_S", 0.05)
    blocked = threading.Event()

    class Stuck(ImageStream):
        num_shards = 1

        def read_shard(self, shard, start=0):
            yield Sample("good", lambda: encode(photo(0)))
            yield Sample("stuck", lambda: blocked.wait() and b"")

    found = sample_pixels(Stuck())
    blocked.set()
    assert found.num <= 1
    assert "read slowly" in caplog.text


def test_names_that_are_not_utf8_are_no_hindrance_to_a_training_its_log_and_its_dry_run(tmp_path):
    images, run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/im\xff")), tmp_path / "run"
    on_disk(make_images(images), b"damaged", "\udcfe.png", num=1)
    arguments = tiny(images, run, "optim.total_iters=4", "data.max_bad_fraction=1.0")
    done = run_forked("train_capi.py", *arguments, "--dry-run", PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert "im\\udcff" in done.stdout
    assert run_main(arguments) == 0
    assert "unreadable image" in (run / "log.txt").read_text()
    (record,) = [json.loads(line) for line in (run / "bad_files.jsonl").read_text().splitlines()]
    assert Path(record["file"]).read_bytes() == b"damaged"
    assert run_main([str(run / "config.yaml"), "--print-config"]) == 0


def test_a_training_and_its_dry_run_show_the_sample_and_warn(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    on_disk(tmp_path / "images", encode(Image.fromarray(noise(4095))), ".png", num=8)
    arguments = tiny(tmp_path / "images", tmp_path / "run", "optim.total_iters=1")
    assert run_main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pixels       8 of 8 images looked at: 8 16-bit I;16 PNG with values 0 to 409" in out
    assert "warning      8 of 8 images (16-bit I;16 PNG) use 16 of 256" in out
    assert run_main(arguments) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "data.dataset: 8 of 8 images looked at" in log
    assert "W pixels: data.dataset: 8 of 8 images (16-bit I;16 PNG) use 16 of 256" in log
