"""data.py: order, crops, masks, streams, resuming, workers."""

import copy
import gc
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import textwrap
import threading
import time
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import TINY
from conftest import PYTHON, ROOT
from PIL import Image
from ranks import exit_codes
from samples import (
    MemoryDataset,
    MemoryStream,
    age,
    encode,
    fingerprint,
    ids,
    make_config,
    photo,
    take,
    through_json,
)
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train_capi
from data import (
    DevicePrefetcher,
    PretrainLoader,
    WorkerAdvice,
    derive_seed,
    is_above,
    largest_divisor,
    merge_positions,
    normalize,
)
from reading.crops import Colours, Crop, View, cut, draw_crop, turned
from reading.sources import BadImageError, ImageDataset, ImageStream, Sample, decode_image, decode_pixels, make_dataset
from speed.device_decode import crop_or_file
from train_capi import make_loader
from utils import Turns, UserError

# -------------------------------------------------------------------------------------- crops and batches


def test_a_batch_has_uint8_images_and_flat_indices(folder):
    config = make_config(f"data.dataset={folder}", batch_size=5)
    with make_loader(config) as loader:
        batch = next(loader)
    assert batch.images.shape == (5, 3, 56, 56)
    assert batch.images.dtype == torch.uint8
    visible, predict = batch.masks["visible_indices"].view(5, 6), batch.masks["predict_indices"].view(5, 3)
    for image in range(5):
        positions = {*visible[image].tolist(), *predict[image].tolist()}
        assert len(positions) == 9, "a visible patch is predicted"
        assert all(16 * image <= position < 16 * (image + 1) for position in positions), "not image-major"
    assert len({tuple((row % 16).tolist()) for row in visible}) > 1, "all images have the same mask"
    assert batch.bad == []


def test_normalize_gives_imagenet_statistics():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(normalize(images), (images / 255 - mean) / std)
    assert torch.equal(images, before), "the input was modified in place"
    half = normalize(images, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, normalize(images).bfloat16())


def test_crops_keep_the_permitted_area_and_ratio_and_half_are_flipped(monkeypatch):
    # The image says where each pixel came from: red is the column, green the row.
    rows, columns = np.mgrid[0:200, 0:250]
    source = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    content = encode(Image.fromarray(source))
    maker = make_loader(make_config("data.crop_scale=[0.3, 0.5]"), dataset=MemoryDataset(1)).maker
    flips, areas = 0, []
    for key in range(200):
        crop = maker.crop(Sample("x", lambda: content), key).float()
        left, right, top, bottom = crop[0, :, 0].mean(), crop[0, :, -1].mean(), crop[1, 0].mean(), crop[1, -1].mean()
        flips += int(left > right)
        width, height = float(abs(right - left)) * 56 / 55, float(bottom - top) * 56 / 55
        areas.append(width * height / (200 * 250))
        assert 0.7 <= width / height <= 1.4
    assert 0.27 <= min(areas) < 0.33
    assert 0.47 < max(areas) <= 0.53
    assert 70 <= flips <= 130
    unflipped = make_loader(make_config("data.do_hflip=false"), dataset=MemoryDataset(1)).maker
    for key in range(20):
        crop = unflipped.crop(Sample("x", lambda: content), key).float()
        assert crop[0, :, 0].mean() < crop[0, :, -1].mean(), "flipped although do_hflip=false"


def test_crops_are_resized_and_coloured_as_asked():
    content = encode(photo(3, 90, 70))
    sample, cfg = Sample("x", lambda: content), make_config()
    colours = Colours(grayscale=1.0, blur=0.0)
    plain, bilinear, grey = (
        make_loader(cfg, dataset=MemoryDataset(1), **own).maker.crop(sample, 5)
        for own in ({}, {"interpolation": "bilinear"}, {"change_colours": colours})
    )
    box = draw_crop(90, 70, cfg.data.crop_scale, cfg.data.do_hflip, cfg.train.seed, 5)
    pixels = sample.pixels(lambda *_: 1)
    assert torch.equal(plain, cut(pixels, box, 56)) and torch.equal(bilinear, cut(pixels, box, 56, "bilinear"))
    assert not torch.equal(plain, bilinear)
    assert torch.equal(grey, colours(plain, cfg.train.seed, 5)) and torch.equal(grey[0], grey[2])


def test_crops_and_their_second_view_are_turned_as_asked():
    content = encode(photo(3, 90, 70))
    sample = Sample("x", lambda: content)
    cfg = make_config("data.do_vflip=true", "data.do_turns=true")
    upright = make_loader(make_config(), dataset=MemoryDataset(1)).maker
    maker = make_loader(cfg, dataset=MemoryDataset(1), second_view=View((28, 28), "lanczos")).maker
    changed = 0
    for key in range(8):
        crop, second = maker.crop(sample, key)
        box = draw_crop(90, 70, cfg.data.crop_scale, cfg.data.do_hflip, cfg.train.seed, key)
        way = turned(box, Turns(do_vflip=True, do_turns=True), cfg.train.seed, key)
        pixels = sample.pixels(lambda *_: 1)
        assert torch.equal(crop, cut(pixels, way, 56)) and torch.equal(second, cut(pixels, way, 28, "lanczos"))
        changed += not torch.equal(crop, upright.crop(sample, key))
    assert changed >= 5


@pytest.mark.parametrize("size", [28, 80])
def test_a_second_view_is_the_same_box_in_another_size_on_the_way_to_the_device(size):
    """A larger one decides how far a JPEG may be shrunk while it is decoded."""
    content = encode(photo(3, 600, 500), "JPEG", quality=95)
    sample, cfg, view = (
        Sample("x", lambda: content),
        make_config("data.crop_scale=[0.3,1.0]"),
        View((size, size), "lanczos"),
    )
    maker = make_loader(cfg, dataset=MemoryDataset(1), second_view=view).maker
    assert maker.reduction(600, 500) == (4 if size == 28 else 2)
    views = [maker.crop(sample, key) for key in (5, 6)]
    for key, (first, second) in zip((5, 6), views, strict=True):
        pixels = sample.pixels(maker.reduction)
        box = draw_crop(pixels.shape[2], pixels.shape[1], cfg.data.crop_scale, cfg.data.do_hflip, cfg.train.seed, key)
        assert torch.equal(first, cut(pixels, box, 56)) and torch.equal(second, cut(pixels, box, size, "lanczos"))
    batch = maker.batch(views, [(5,), (6,)], [0, 0], []).to("cpu")
    assert batch.images.shape == (2, 3, 56, 56) and batch.second_images.shape == (2, 3, size, size)
    assert torch.equal(batch.second_images[1], views[1][1])
    assert any(tensor is batch.second_images for tensor in batch.tensors()), "its memory could be reused too soon"
    without = make_loader(cfg, dataset=MemoryDataset(1)).maker
    assert without.batch([views[0][0]], [(5,)], [0], []).second_images is None


class Outputs(TorchDispatchMode):
    """Notes the floating-point tensors that are made within."""

    def __init__(self):
        super().__init__()
        self.floats = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else [out]
        self.floats += [x.numel() for x in made if torch.is_tensor(x) and x.is_floating_point()]
        return out


def test_pixels_are_bytes_until_they_are_on_the_device_and_no_batch_collects_garbage(jpegs, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("a batch collects garbage"))
    with make_loader(make_config(f"data.dataset={jpegs}", batch_size=6)) as loader, Outputs() as made:
        batches = [next(loader) for _ in range(3)]
    assert max(made.floats, default=0) < 3 * 56 * 56, "pixels were turned into floats before they reached the device"
    for batch in batches:
        assert {tensor.dtype for tensor in batch.tensors()} == {torch.uint8, torch.int64}
        assert batch.images.is_contiguous(memory_format=torch.channels_last), "crops were transposed one by one"
        assert normalize(batch.images).is_contiguous(), "the model would get another layout than before"
        assert batch.make_s > 0


def test_the_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    take(make_loader(make_config(), dataset=MemoryDataset(6)), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_purposes_and_positions_differ():
    seeds = {derive_seed(seed, what, key) for seed in range(5) for what in ("crop", "mask") for key in range(500)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_seed_changes_order_crops_and_masks():
    first, second = (
        take(make_loader(make_config(f"train.seed={seed}", batch_size=8), dataset=MemoryDataset(8)), 1)[0]
        for seed in (0, 1)
    )
    assert all(one != other for one, other in zip(first, second, strict=True))


# ------------------------------------------------------------------------------- map-style order and resume


def test_each_epoch_shows_every_image_once_in_a_new_order():
    shown = ids(make_loader(make_config(batch_size=3), dataset=MemoryDataset(9)), 12)
    epochs = [shown[start : start + 9] for start in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_batch_may_be_larger_than_the_dataset(size):
    shown = ids(make_loader(make_config(batch_size=8), dataset=MemoryDataset(size)), 5)
    for start in range(0, 40 - size, size):
        assert sorted(shown[start : start + size]) == list(range(size))


def test_an_image_that_returns_is_cropped_and_masked_anew():
    dataset = MemoryDataset(1)
    batches = take(make_loader(make_config(batch_size=1), dataset=dataset), 8)
    assert len({images for _, images, _, _ in batches}) == 8
    assert len({tuple(visible) for _, _, visible, _ in batches}) > 3


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_what_one_rank_sees(world_size):
    dataset = MemoryDataset(11)
    alone = ids(make_loader(make_config(batch_size=8), dataset=dataset), 6)
    config = make_config(batch_size=8 // world_size)
    ranks = [
        ids(make_loader(config, dataset=dataset, rank=rank, world_size=world_size), 6) for rank in range(world_size)
    ]
    per_rank = 8 // world_size
    together = [
        index for step in range(6) for shown in ranks for index in shown[step * per_rank : (step + 1) * per_rank]
    ]
    assert together == alone
    assert all(sorted(together[start : start + 11]) == list(range(11)) for start in range(0, 44, 11))


@pytest.mark.parametrize("stop_at", [1, 3, 7])  # 10 images in batches of 4: within an epoch, at its end, past it
def test_a_resumed_run_continues_as_the_uninterrupted_one(folder, stop_at):
    config = make_config(f"data.dataset={folder}")
    straight = take(make_loader(config), 10)
    with make_loader(config) as loader:
        for _ in range(stop_at):
            next(loader)
        position = through_json(loader.state_dict())
    assert take(make_loader(config, position=position), 10 - stop_at) == straight[stop_at:]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_run_resumes_on_another_number_of_ranks_up_to_epoch_10(world_size):
    dataset = MemoryDataset(7)
    straight = ids(make_loader(make_config(batch_size=8), dataset=dataset), 10)
    config = make_config(batch_size=2)
    loaders = [make_loader(config, dataset=dataset, rank=rank, world_size=4) for rank in range(4)]
    for _ in range(3):
        for loader in loaders:
            next(loader)
    position = through_json(merge_positions([loader.state_dict() for loader in loaders]))
    assert position["samples"] == 24
    assert position["seen"] == 24
    after = make_config(batch_size=8 // world_size)
    resumed = [
        make_loader(after, dataset=dataset, rank=rank, world_size=world_size, position=position)
        for rank in range(world_size)
    ]
    together = [index for _ in range(7) for loader in resumed for index in next(loader).sample_ids.tolist()]
    assert together == straight[24:]
    assert len(straight) > 10 * 7
    assert sum(loader.state_dict()["seen"] for loader in resumed) == 24 + 56, "images were counted twice or lost"


def test_closing_and_going_on_continues_after_the_last_batch(folder):
    config = make_config(f"data.dataset={folder}")
    straight = take(make_loader(config), 4)
    loader = make_loader(config)
    first = [fingerprint(next(loader)) for _ in range(2)]
    loader.close()
    assert first + take(loader, 2) == straight


def test_a_changed_dataset_is_told(caplog):
    position = make_loader(make_config(), dataset=MemoryDataset(5)).state_dict()
    with caplog.at_level(logging.WARNING):
        make_loader(make_config(), dataset=MemoryDataset(6), position=position)
    assert "data.dataset has 6 images, it had 5" in caplog.text
    with pytest.raises(UserError, match=r"data\.dataset=none: the run to continue read a map dataset"):
        make_loader(make_config(), dataset=MemoryStream(5), position=position)


def test_bands_without_a_mean_each_are_refused():
    with pytest.raises(UserError, match=r"data\.mean=.*one number for each of model\.in_chans=4 bands"):
        make_config("model.in_chans=4")


@pytest.mark.parametrize("dataset", [MemoryDataset(9, bad=(1, 4)), MemoryStream(5, 4, bad=(0,))])
def test_peeking_shows_what_comes_next_and_takes_nothing(dataset):
    config = make_config("data.stream_partitions=2", "data.max_bad_fraction=1.0", workers=2)
    loader = make_loader(config, dataset=dataset)
    peeked = loader.peek(2)
    assert not loader.workers and loader.peek(3).images.shape[0] == 3
    loader.num_workers = 0
    with loader:
        batch = next(loader)
        assert torch.equal(peeked.images, batch.images[:2])
        assert all(torch.equal(peeked.masks[name], mask) for name, mask in batch.masks.items())
        assert fingerprint(loader.peek(4)) == fingerprint(next(loader)), "from where it has come to"


def test_peeking_at_what_cannot_be_read_is_the_error_of_reading_it():
    with pytest.raises(UserError, match="images in a row cannot be read"):
        make_loader(make_config(), dataset=MemoryDataset(2, bad=(0, 1))).peek(2)


def test_describe_says_what_is_read(folder):
    described = make_loader(make_config(f"data.dataset={folder}")).describe()
    assert described == f"{folder}: 10 images, 0 workers per rank"
    described = make_loader(make_config("data.stream_partitions=3"), dataset=MemoryStream(5, 6)).describe()
    assert described == "none: stream of 2 shards, 3 parts per rank, 0 workers per rank"


# ----------------------------------------------------------------------------------------------- bad images


def test_an_unreadable_image_is_replaced_the_same_way_every_time(tmp_path):
    dataset = MemoryDataset(6, bad={2, 4})
    config = make_config("data.max_bad_fraction=1.0")
    one = take(make_loader(config, dataset=dataset, bad_files_path=tmp_path / "bad.jsonl"), 6)
    two = take(make_loader(config, dataset=dataset), 6)
    assert one == two
    shown = [index for sample_ids, *_ in one for index in sample_ids]
    assert len(shown) == 24
    assert not {2, 4} & set(shown)
    recorded = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(record["file"] for record in recorded) == ["image 2", "image 4"], "not exactly once each"
    assert all("not an image of a known format" in record["reason"] for record in recorded)


def test_counts_and_names_of_bad_images_survive_a_restart(tmp_path):
    path = tmp_path / "bad.jsonl"
    dataset = MemoryDataset(6, bad={2})
    config = make_config("data.max_bad_fraction=1.0")
    with make_loader(config, dataset=dataset, bad_files_path=path) as loader:
        batches = [next(loader) for _ in range(6)]
        position = through_json(loader.state_dict())
    assert position["bad"] == sum(len(batch.bad) for batch in batches) > 1
    assert position["seen"] == 24 + position["bad"]
    with path.open("a") as file:
        file.write('{"file": "cut o')
    with make_loader(config, dataset=dataset, bad_files_path=path, position=position) as loader:
        for _ in range(6):
            next(loader)
        assert loader.state_dict()["bad"] > position["bad"]
    assert path.read_text().count("image 2") == 1


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_counts_of_all_ranks_are_added_up_and_dealt_out_without_loss(world_size):
    dataset = MemoryDataset(5)
    positions = [
        {"kind": "map", "num_images": 5, "samples": 40, "seen": seen, "bad": bad} for seen, bad in ((23, 3), (21, 1))
    ]
    merged = merge_positions(positions)
    assert (merged["seen"], merged["bad"]) == (44, 4)
    loaders = [
        make_loader(make_config(), dataset=dataset, rank=rank, world_size=world_size, position=merged)
        for rank in range(world_size)
    ]
    assert merge_positions([loader.state_dict() for loader in loaders]) == merged


def test_too_many_bad_images_stop_the_run(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    loader = make_loader(make_config(), dataset=MemoryDataset(20, bad=range(6, 12)), bad_files_path=path)
    with pytest.raises(UserError) as error, loader:
        for _ in range(100):
            next(loader)
    assert re.search(r"data\.max_bad_fraction=0\.05: \d+ of \d+ images cannot be read", str(error.value))
    assert str(path) in str(error.value)
    assert loader.bad_files.bad > 5
    assert loader.bad_files.seen < 100, "30 % of bad images went on for long"


def images_until_stop(fraction: float, limit: float, *, images: int, runs: int) -> list[float]:
    """For runs in which images are bad by chance, how many are seen in batches of 8 until one stops; inf if none."""
    draw = random.Random(0)
    stops = []
    for _ in range(runs):
        bad, stop = 0, math.inf
        for seen in range(8, images + 1, 8):
            bad += sum(draw.random() < fraction for _ in range(8))
            if is_above(limit, bad, seen):
                stop = seen
                break
        stops.append(stop)
    return sorted(stops)


@pytest.mark.parametrize("fraction", [0.04, 0.05])
def test_a_fraction_of_bad_images_that_is_allowed_stops_no_run_by_chance(fraction):
    stops = images_until_stop(fraction, 0.05, images=4000, runs=200)
    assert sum(stop < math.inf for stop in stops) < 2, "1 % of the runs or more"


@pytest.mark.parametrize(("fraction", "median", "latest"), [(0.1, 1000, 2500), (0.2, 160, 400), (0.5, 40, 80)])
def test_a_larger_fraction_of_bad_images_stops_the_run_soon(fraction, median, latest):
    stops = images_until_stop(fraction, 0.05, images=3000, runs=100)
    assert stops[50] <= median
    assert stops[-1] <= latest


def test_the_limits_of_bad_images_zero_and_one_mean_what_they_say():
    assert not is_above(0.0, 0, 1000)
    assert is_above(0.0, 1, 1000)
    assert not any(is_above(1.0, seen, seen) for seen in (1, 100, 10**6))
    assert not is_above(0.05, 0, 0)


def test_a_few_bad_images_do_not_stop_a_short_run():
    dataset = MemoryDataset(100, bad={3, 50})
    take(make_loader(make_config(batch_size=10), dataset=dataset), 10)


def test_a_dataset_without_readable_images_is_an_error_that_names_some():
    with pytest.raises(UserError, match=r"21 images in a row cannot be read, last image \d"):
        next(make_loader(make_config(), dataset=MemoryDataset(5, bad=range(5))))
    with pytest.raises(UserError, match=r"200 images in a row cannot be read, last sample \d"):
        next(make_loader(make_config(), dataset=MemoryStream(300, bad=range(300))))


def test_a_corrupt_file_in_a_folder_is_named_by_its_path(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(photo(0)))
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "cut.jpg").write_bytes(encode(photo(0), "JPEG")[:500])
    path = tmp_path / "bad.jsonl"
    config = make_config(f"data.dataset={tmp_path}", "data.max_bad_fraction=1.0")
    assert set(ids(make_loader(config, bad_files_path=path), 5)) == {1}
    names = {json.loads(line)["file"] for line in path.read_text().splitlines()}
    assert names == {str(tmp_path / "text.jpg"), str(tmp_path / "cut.jpg")}


# --------------------------------------------------------------------------------------------------- streams


def names_of(stream, config, batches, rank=0, world_size=1, position=None):
    """Names of the samples that a rank sees, in order."""
    seen = []
    original = stream.read_shard

    def read_shard(shard, start=0):
        for sample in original(shard, start):
            yield Sample(sample.name, lambda sample=sample: (seen.append(sample.name), sample.read())[1])

    spied = copy.copy(stream)
    spied.read_shard = read_shard
    with make_loader(config, dataset=spied, rank=rank, world_size=world_size, position=position) as loader:
        for _ in range(batches):
            next(loader)
    return seen


@pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (48,), (16, 32), (8, 8, 8, 8, 8, 8)])
@pytest.mark.parametrize(("world_size", "partitions"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_an_epoch_of_all_parts_of_all_ranks_is_every_sample_once(sizes, world_size, partitions):
    config = make_config(f"data.stream_partitions={partitions}", "data.stream_shuffle_block=5", batch_size=2)
    stream = MemoryStream(*sizes)
    num_parts = world_size * partitions
    seen = []
    for part in range(num_parts):
        reader = data.StreamPart(stream, seed=0, part=part, num_parts=num_parts, block_size=5, state=None)
        while reader.state()["epoch"] == 0:
            _, sample = next(reader)
            if reader.state()["epoch"] == 0:
                seen.append(sample.name)
    assert len(seen) == len(set(seen)), "a sample is in two parts"
    assert sorted(seen) == sorted(f"sample {number}" for number in range(48))
    ranks = [names_of(stream, config, 48 // num_parts // 2 // 2, rank, world_size) for rank in range(world_size)]
    assert len({name for rank in ranks for name in rank}) == sum(len(rank) for rank in ranks), (
        "two ranks share an image"
    )


def test_samples_are_shuffled_within_blocks_and_the_order_of_shards_changes_by_epoch():
    part = data.StreamPart(MemoryStream(6, 6, 6), seed=0, part=0, num_parts=1, block_size=6, state=None)
    numbers = [int(next(part)[1].name.split()[1]) for _ in range(18 * 4)]
    orders = []
    for epoch in range(4):
        blocks = [numbers[18 * epoch + start : 18 * epoch + start + 6] for start in (0, 6, 12)]
        orders.append(tuple(block[0] // 6 for block in blocks))
        for block in blocks:
            assert len({number // 6 for number in block}) == 1, "a block of six must be one shard of six"
        assert sum(block != sorted(block) for block in blocks) >= 2, "blocks are not shuffled"
    assert len(set(orders)) > 1, "the shards come in the same order in every epoch"


def test_a_block_of_one_keeps_the_order_of_the_stream():
    part = data.StreamPart(MemoryStream(7), seed=0, part=0, num_parts=1, block_size=1, state=None)
    assert [next(part)[1].name for _ in range(9)] == [f"sample {number % 7}" for number in range(9)]


@pytest.mark.parametrize("sizes", [(5, 9, 4), (17,)])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_a_part_resumes_exactly_from_every_sample(sizes, num_parts):
    stream = MemoryStream(*sizes)

    def open_part(state):
        return data.StreamPart(stream, seed=3, part=num_parts - 1, num_parts=num_parts, block_size=4, state=state)

    reader = open_part(None)
    straight = [(through_json(reader.state()), next(reader)) for _ in range(50)]
    for start in range(0, 50, 3):
        resumed = open_part(straight[start][0])
        for _, (number, sample) in straight[start:]:
            actual_number, actual = next(resumed)
            assert (actual_number, actual.name) == (number, sample.name), f"differs after resuming at {start}"


@pytest.mark.parametrize("stop_at", [1, 4, 9])
@pytest.mark.parametrize("partitions", [1, 3])
def test_a_resumed_stream_continues_as_the_uninterrupted_one(stop_at, partitions):
    stream = MemoryStream(7, 8, 6, bad={3, 9})
    config = make_config(
        f"data.stream_partitions={partitions}", "data.stream_shuffle_block=5", "data.max_bad_fraction=1.0"
    )
    for rank in range(2):
        straight = take(make_loader(config, dataset=stream, rank=rank, world_size=2), 12)
        with make_loader(config, dataset=stream, rank=rank, world_size=2) as loader:
            position = [next(loader) for _ in range(stop_at)][-1].position
        resumed = make_loader(config, dataset=stream, rank=rank, world_size=2, position=through_json(position))
        assert take(resumed, 12 - stop_at) == straight[stop_at:]


def test_positions_of_ranks_merge_and_can_be_dealt_to_another_number_of_ranks():
    stream = MemoryStream(*[9] * 8)
    config = make_config("data.stream_partitions=2", "data.stream_shuffle_block=4", batch_size=3)

    def run(world_size, steps, position=None, config=config):
        loaders = [
            make_loader(config, dataset=stream, rank=rank, world_size=world_size, position=position)
            for rank in range(world_size)
        ]
        batches = [[fingerprint(next(loader)) for loader in loaders] for _ in range(steps)]
        return batches, through_json(merge_positions([loader.state_dict() for loader in loaders])), loaders

    straight, _, _ = run(2, 8)
    _, position, _ = run(2, 3)
    resumed, _, _ = run(2, 5, position)
    assert resumed == straight[3:]
    other = make_config("data.stream_partitions=4", "data.stream_shuffle_block=4", batch_size=3)
    _, merged, loaders = run(1, 1, position, other)
    assert "4 parts per rank" in loaders[0].describe()
    assert {part: state for part, state in merged["parts"].items() if part != "0"} == {
        part: state for part, state in position["parts"].items() if part != "0"
    }
    assert merged["parts"]["0"]["samples"] == position["parts"]["0"]["samples"] + 3
    with pytest.raises(UserError, match="4 parts, which cannot be dealt out to 3 ranks"):
        make_loader(config, dataset=stream, rank=0, world_size=3, position=position)
    alone = make_loader(config, dataset=stream, rank=0, world_size=2).state_dict()
    with pytest.raises(AssertionError, match="merge_positions"):
        make_loader(config, dataset=stream, rank=1, world_size=2, position=alone)


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (12, 12)])
def test_a_stream_with_other_shards_is_told_and_goes_on_with_a_new_epoch_of_all_of_them(sizes, caplog):
    config = make_config("data.stream_partitions=2", "data.stream_shuffle_block=4", batch_size=2)
    before, after = MemoryStream(6, 5, 4), MemoryStream(*sizes)
    with make_loader(config, dataset=before) as loader:
        position = through_json([next(loader) for _ in range(9)][-1].position)  # its parts are in different epochs
    seen = names_of(after, config, 12, position=position)
    assert "3 shards when the checkpoint was made" in caplog.text
    assert sorted(seen) == sorted(f"sample {number}" for number in range(24))
    with make_loader(config, dataset=after, position=position) as loader:
        numbers = [number for _ in range(2) for number in next(loader).sample_ids.tolist()]
    assert numbers == [8, 9, 10, 11], "crops and masks are those of numbers that came before"


def test_a_position_without_a_number_of_shards_continues_its_stream(caplog):
    stream, config = MemoryStream(7, 8, 6), make_config("data.stream_partitions=3", "data.stream_shuffle_block=5")
    straight = take(make_loader(config, dataset=stream), 8)
    with make_loader(config, dataset=stream) as loader:
        position = through_json([next(loader) for _ in range(4)][-1].position)
    del position["num_shards"]
    assert take(make_loader(config, dataset=stream, position=position), 4) == straight[4:]
    assert not caplog.records


def test_a_part_without_samples_is_an_error_with_the_remedy():
    config = make_config("data.stream_partitions=5")
    with pytest.raises(UserError, match=r"part 3 of the 5 .*data\.stream_partitions"), \
         make_loader(config, dataset=MemoryStream(3)) as loader:  # fmt: skip
        for _ in range(5):
            next(loader)


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(20, 20, 20), (20, 19, 10), (7, 5, 1), (6, 100, 6), (1, 1, 1)]
)
def test_largest_divisor(number, limit, expected):
    assert largest_divisor(number, limit) == expected


def test_without_a_number_there_is_a_worker_per_core_up_to_20(monkeypatch):
    config = make_config("efficiency.dataloader_num_workers=null")
    for cores, workers in ((1, 1), (3, 2), (8, 5), (64, 20)):
        monkeypatch.setattr(data, "cores_of_this_rank", lambda cores=cores: cores)
        assert make_loader(config, dataset=MemoryDataset(9)).num_workers == min(cores, 20)
        loader = make_loader(config, dataset=MemoryStream(*[3] * 20))
        assert (loader.num_workers, loader.state_dict()["num_parts"]) == (workers, 20)


def test_workers_are_reduced_to_a_divisor_of_the_partitions_and_it_is_logged(caplog):
    config = make_config("data.stream_partitions=6", workers=5)
    with caplog.at_level(logging.INFO):
        loader = make_loader(config, dataset=MemoryStream(*[3] * 6))
    assert "3 workers per rank" in loader.describe()
    assert "3 workers instead of efficiency.dataloader_num_workers=5" in caplog.text


# ------------------------------------------------------------------------------------------- Hugging Face


def write_parquet(path, images, labels):
    rows = pa.table(
        {
            "img": [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(images)],
            "label": labels,
        }
    )
    features = {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    pq.write_table(
        rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        path,
        row_group_size=4,
    )


def write_tar(path, images, first):
    with tarfile.open(path, "w") as archive:
        for index, content in enumerate(images, first):
            for name, member in ((f"{index:04d}.png", content), (f"{index:04d}.cls", str(index).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three parquet files and three tar files of the same 7 + 5 + 6 images; image 9 is damaged."""
    root = tmp_path_factory.mktemp("shards")
    images = [b"damaged" if index == 9 else encode(photo(index)) for index in range(18)]
    for shard, (first, last) in enumerate([(0, 7), (7, 12), (12, 18)]):
        write_parquet(root / f"{shard}.parquet", images[first:last], list(range(first, last)))
        write_tar(root / f"{shard}.tar", images[first:last], first)
    return root


def hub_url(root, kind, files="*", streaming=True, fields=True):
    if kind == "parquet":
        named = "&img_field='img'&tgt_field='label'"
        url = f"hf://parquet?data_files='{root}/{files}.parquet'"
    else:
        named = "&img_field='png'&tgt_field='cls'"
        url = f"hf://webdataset?data_files='{root}/{files}.tar'"
    cache = "" if streaming else f"&cache_dir='{root}/cache'"
    return f"{url}&split='train'{named if fields else ''}{cache}" + "&streaming=True" * streaming


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_local_stream_gives_every_image_and_target_of_every_shard(shards, kind):
    stream = make_dataset(hub_url(shards, kind))
    assert stream.num_shards == 3
    samples = [sample for shard in range(3) for sample in stream.read_shard(shard)]
    assert [sample.target() for sample in samples] == list(range(18))
    assert [sample.target() for sample in stream.read_shard(1, 3)] == [10, 11]
    np.testing.assert_array_equal(np.asarray(samples[4].image()), np.asarray(photo(4)))
    assert len({sample.name for sample in samples}) == 18, "samples cannot be told apart by their names"
    with pytest.raises(BadImageError):
        samples[9].image()


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("files", ["*", "0"])
def test_a_local_stream_resumes_exactly_past_the_end_of_an_epoch(shards, kind, files, tmp_path):
    config = make_config(
        f"data.dataset={hub_url(shards, kind, files)}", "data.stream_shuffle_block=5", "data.max_bad_fraction=1.0",
        "data.stream_partitions=2", batch_size=3,
    )  # fmt: skip
    path = tmp_path / "bad.jsonl"
    with make_loader(config, bad_files_path=path) as loader:
        batches = [next(loader) for _ in range(10)]
    straight = [fingerprint(batch) for batch in batches]
    assert len({images for _, images, _, _ in straight}) == 10
    state = batches[-1].stream_state
    assert state is not None
    assert state["epoch"] >= 1, "the test does not pass the end of an epoch"
    for stop_at in (1, 6):
        position = through_json(batches[stop_at - 1].position)
        assert take(make_loader(config, position=position), 10 - stop_at) == straight[stop_at:]
    if files == "*":
        (record,) = [json.loads(line) for line in path.read_text().splitlines()]
        assert "shard" in record["file"] or "0009" in record["file"]


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory):
    """As `shards`, but that the second file of each kind breaks off, and no single image is damaged."""
    root = tmp_path_factory.mktemp("damaged")
    images = [encode(photo(index)) for index in range(18)]
    for shard, (first, last) in enumerate([(0, 7), (7, 12), (12, 18)]):
        write_parquet(root / f"{shard}.parquet", images[first:last], list(range(first, last)))
        write_tar(root / f"{shard}.tar", images[first:last], first)
    for name in ("1.parquet", "1.tar"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 3])
    return root


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_damaged_shard_is_named_counted_once_an_epoch_and_training_goes_on_also_when_resumed(
    damaged_shards, kind, tmp_path
):
    path = tmp_path / "bad.jsonl"
    config = make_config(
        f"data.dataset={hub_url(damaged_shards, kind)}", "data.max_bad_fraction=1.0", "data.stream_shuffle_block=4",
        batch_size=3,
    )  # fmt: skip
    with make_loader(config, bad_files_path=path) as loader:
        batches = [next(loader) for _ in range(10)]
    straight = [fingerprint(batch) for batch in batches]
    ending = {"webdataset": "tar"}.get(kind, kind)
    named = [name for batch in batches for name, _ in batch.bad]
    assert set(named) == {str(damaged_shards / f"1.{ending}")}
    # 13 images of whole shards in an epoch, and of the damaged one those before the damage.
    assert len(named) == batches[-1].position["bad"] == 2
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["file"] == named[0]
    assert "cannot be read from sample" in record["reason"]
    for stop_at in range(1, 10):
        position = through_json(batches[stop_at - 1].position)
        with make_loader(config, position=position) as loader:
            rest = [next(loader) for _ in range(10 - stop_at)]
        assert [fingerprint(batch) for batch in rest] == straight[stop_at:]
        assert rest[-1].position["bad"] == 2, "a damaged shard was counted twice after a restart"


def test_data_of_the_hub_that_cannot_be_read_at_all_is_refused_at_the_start(damaged_shards, tmp_path):
    write_parquet(tmp_path / "empty.parquet", [], [])
    pq.write_table(pa.table({"img": ["s3://bucket/1.png"], "label": [0]}), tmp_path / "far.parquet")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "none.tar").write_bytes(b"")
    cases = [
        (hub_url(tmp_path, "webdataset", "empty"), "empty"),
        (hub_url(tmp_path, "webdataset", "none"), "ReadError: empty file; check that its files are there, whole"),
        (hub_url(tmp_path, "webdataset", "missing*"), "no file matches data_files"),
        (hub_url(tmp_path, "parquet", "missing*"), "files are invalid"),
        (hub_url(tmp_path, "parquet", "empty"), "has no samples"),
        (hub_url(damaged_shards, "parquet", "1"), "check that its files are there, whole"),
        (hub_url(tmp_path, "parquet", "empty", streaming=False), "check that its files are there, whole and not empty"),
        (hub_url(damaged_shards, "parquet", streaming=False), "check that its files are there, whole and not empty"),
        (hub_url(tmp_path, "parquet", "far"), "images such as s3://bucket/1.png need a library: Install s3fs"),
        (hub_url(tmp_path, "parquet", "far", streaming=False), "images such as s3://bucket/1.png need a library"),
        ("hf://parquet?data_files='s3://bucket/x.parquet'&split='train'&streaming=True", "Install s3fs"),
    ]
    for url, message in cases:
        with pytest.raises(UserError) as error:
            make_dataset(url)
        assert str(error.value).startswith(f"data.dataset={url}: "), url
        assert message in str(error.value).removeprefix(f"data.dataset={url}"), str(error.value)


def test_a_map_style_parquet_dataset_reads_and_counts_bad_images(shards):
    config = make_config(
        f"data.dataset={hub_url(shards, 'parquet', streaming=False)}", "data.max_bad_fraction=1.0", batch_size=6
    )
    with make_loader(config) as loader:
        assert "18 images" in loader.describe()
        shown = [next(loader) for _ in range(3)]
    assert 9 not in [index for batch in shown for index in batch.sample_ids.tolist()]
    assert ["(9.png)" in name or "row 9" in name for batch in shown for name, _ in batch.bad] == [True]
    dataset = make_dataset(hub_url(shards, "parquet", streaming=False))
    assert dataset[11].target() == 11


def test_the_only_image_column_is_found_without_img_field(shards):
    stream = make_dataset(hub_url(shards, "parquet", fields=False))
    assert next(stream.read_shard(0)).image().size == (80, 60)
    assert next(stream.read_shard(0)).target() is None


class RefusedError(OSError):
    def __init__(self, status):
        super().__init__("Cannot access the repository")
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (RefusedError(401), True),
        (RefusedError(403), True),
        (RefusedError(500), False),
        (FileNotFoundError("Dataset 'o/n' is a gated dataset on the Hub. Visit the page to ask for access."), True),
        (ConnectionError("no route"), False),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refused_download_says_how_to_log_in(monkeypatch, error, refused, wrapped):
    def refuse(*_, **__):
        if wrapped:
            raise FileNotFoundError("Dataset 'o/n' cannot be loaded") from error
        raise error

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        make_dataset("hf://o/n?split='train'")
    said = str(caught.value)
    assert ("`hf auth login`, or set HF_TOKEN" in said) == refused, said
    assert ("https://huggingface.co/datasets/o/n" in said) == refused


def test_the_only_column_of_classes_is_the_target_and_a_stream_without_types_is_read(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "x": datasets.Value("int64")}
    )
    rows = {"image": [photo(0), photo(1)], "label": [1, 0], "x": [5, 6]}
    typed = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: typed)
    found = make_dataset("hf://o/n?split='train'")
    assert (found.fields.image, found.fields.target) == ("image", "label")
    assert [found[i].target() for i in range(2)] == [1, 0]
    two = typed.add_column("fine", [0, 1]).cast_column("fine", datasets.ClassLabel(names=["a", "b"]))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: two)
    assert make_dataset("hf://o/n?split='train'").fields.target is None, "one of two columns of classes was guessed"

    def untyped():
        yield from ({"image": photo(i), "x": i} for i in range(2))

    stream = datasets.IterableDataset.from_generator(untyped)
    assert stream.features is None
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    samples = list(make_dataset("hf://o/n?split='train'&streaming=True").read_shard(0))
    np.testing.assert_array_equal(np.asarray(samples[1].image()), np.asarray(photo(1)))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream.remove_columns("image"))
    with pytest.raises(UserError, match="needs img_field=, the column with the images; there are: 'x'"):
        make_dataset("hf://o/n?split='train'&streaming=True")


def test_a_local_imagefolder_is_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / f"{name}.png").write_bytes(encode(photo(len(name))))
    url = f"hf://imagefolder?data_dir='{tmp_path}/images'&split='train'&img_field='image'&tgt_field='label'"
    stream = make_dataset(f"{url}&streaming=True")
    samples = [sample for shard in range(stream.num_shards) for sample in stream.read_shard(shard)]
    mapped = make_dataset(f"{url}&cache_dir='{tmp_path}/cache'")
    assert [mapped[0].target(), mapped[1].target()] == [0, 1]
    for found in (samples, [mapped[0], mapped[1]]):
        assert [sample.image().size for sample in found] == [(80, 60)] * 2
        assert found[0].name.endswith("cat.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (("split='train'", "split='test'"), ["test", "train"]),
        (("&split='train'", ""), ["needs split='train'"]),
        (("img_field='img'", "img_field='image'"), ["img_field='image' is not a column; there are: 'img', 'label'"]),
        (("tgt_field='label'", "tgt_field='cls'"), ["tgt_field='cls' is not a column; there are: 'img', 'label'"]),
        (("*.parquet", "none.parquet"), ["none.parquet"]),
        (("&split=", "&no_such_option=1&split="), ["no_such_option"]),
    ],
)
def test_a_wrong_hub_argument_is_refused_with_what_there_is(shards, streaming, change, messages):
    url = hub_url(shards, "parquet", streaming=streaming)
    assert change[0] in url
    url = url.replace(*change)
    with pytest.raises(UserError) as error:
        make_dataset(url)
    assert str(error.value).startswith(f"data.dataset={url}: ")
    for message in messages:
        assert message in str(error.value).removeprefix(f"data.dataset={url}: ")


# --------------------------------------------------------------------------------------- workers, prefetching


def test_two_workers_give_what_none_gives_and_a_resumed_run_too(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for path in folder.rglob("*.png"):
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "text.jpg").write_bytes(b"text")
    overrides = (f"data.dataset={tmp_path}/images", "data.max_bad_fraction=1.0")
    expected = take(make_loader(make_config(*overrides)), 9)
    with make_loader(make_config(*overrides, workers=2), bad_files_path=tmp_path / "bad.jsonl") as loader:
        batches = [next(loader) for _ in range(5)]
        assert [fingerprint(batch) for batch in batches] == expected[:5]
        # Batches that the workers have made beyond these must not count.
        assert loader.state_dict() == batches[-1].position
        assert loader.state_dict()["samples"] == 20
        position = through_json(loader.state_dict())
    assert "text.jpg" in (tmp_path / "bad.jsonl").read_text()
    assert take(make_loader(make_config(*overrides, workers=2), position=position), 4) == expected[5:]


def test_a_stream_is_the_same_with_two_workers_also_when_resumed_at_an_odd_batch(shards):
    overrides = (
        f"data.dataset={hub_url(shards, 'webdataset')}", "data.stream_shuffle_block=4", "data.max_bad_fraction=1.0",
        "data.stream_partitions=2",
    )  # fmt: skip
    expected = take(make_loader(make_config(*overrides, batch_size=2)), 14)
    with make_loader(make_config(*overrides, batch_size=2, workers=2)) as loader:
        assert "2 workers per rank" in loader.describe()
        start = [fingerprint(next(loader)) for _ in range(5)]
        position = through_json(loader.state_dict())
    assert start == expected[:5]
    assert take(make_loader(make_config(*overrides, batch_size=2, workers=2), position=position), 9) == expected[5:]


def test_an_error_in_a_worker_arrives_as_a_plain_message():
    config = make_config("data.stream_partitions=4", workers=1)
    with pytest.raises(UserError) as error, make_loader(config, dataset=make_two_samples()) as loader:
        for _ in range(4):
            next(loader)
    assert "Traceback" not in str(error.value)
    assert str(error.value).startswith("data.dataset: part ")


def make_two_samples():
    return _TwoSamples()


class _TwoSamples(ImageStream):
    num_shards = 1

    def read_shard(self, shard, start=0):
        for number in range(start, 2):
            yield Sample(str(number), _one_pixel)


def _one_pixel():
    return encode(Image.new("RGB", (1, 1)))


def test_workers_outlive_the_signals_of_a_launcher(folder):
    config = make_config(f"data.dataset={folder}", workers=2)
    expected = take(make_loader(make_config(f"data.dataset={folder}")), 12)
    with make_loader(config) as loader:
        start = [fingerprint(next(loader)) for _ in range(2)]  # one of each worker: both have started
        workers = loader.workers
        for worker in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(worker.pid, number)
        assert start + [fingerprint(next(loader)) for _ in range(10)] == expected
    assert not any(worker.is_alive() for worker in workers), "workers were left behind"


JOB = """
    import os, signal, sys
    from samples import make_config
    from train_capi import make_loader

    if __name__ == "__main__":
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
        for number in numbers:
            signal.signal(number, lambda *_: None)
        with make_loader(make_config(f"data.dataset={sys.argv[1]}", workers=2), rank=0, world_size=1) as loader:
            next(loader)
            for number in numbers:
                os.killpg(0, number)
            for _ in range(20):
                next(loader)
        print("20 more")
"""


@pytest.mark.long
def test_what_workers_come_from_outlives_the_signals_of_a_launcher(folder, tmp_path):
    """Slurm signals every process of a job step: the fork server and what tracks its resources too."""
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    done = subprocess.run(
        [PYTHON, tmp_path / "job.py", folder], start_new_session=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "20 more\n", "")


def test_a_worker_that_was_killed_is_explained_in_one_line_with_key_and_remedy(folder):
    with pytest.raises(UserError) as error, make_loader(make_config(f"data.dataset={folder}", workers=2)) as loader:
        next(loader)
        os.kill(loader.workers[0].pid, signal.SIGKILL)
        for _ in range(20):
            next(loader)
    assert str(error.value) == (
        "efficiency.dataloader_num_workers: a process that reads images was killed, most likely because memory ran "
        "out; use fewer of them, or give more memory to this machine, container or job (launcher.mem)"
    )


class Stuck(ImageDataset):
    """Images in a pipe into which nobody writes."""

    def __init__(self, pipe):
        os.mkfifo(pipe)
        self.pipe = pipe

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return Sample(str(index), self.pipe.read_bytes)


def test_a_batch_that_never_comes_is_an_error_and_its_workers_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(data, "CLOSE_TIMEOUT_S", 0.1)
    loader = make_loader(make_config(workers=2), dataset=Stuck(tmp_path / "pipe"))
    with pytest.raises(UserError) as error:
        next(loader)
    assert str(error.value).startswith("efficiency.dataloader_num_workers=2: no batch came for 0 s; does the disk")
    workers = loader.workers
    loader.close()
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers), "a worker that hangs was left behind"


def test_batches_that_do_not_fit_into_the_shared_memory_are_refused_before_the_start(folder, monkeypatch):
    with make_loader(make_config(f"data.dataset={folder}")) as loader:
        size = sum(tensor.nbytes for tensor in next(loader).tensors())
    loader.num_workers = 3
    for batches, fits in ((8, True), (7, False)):  # 2 per worker, one in use and one on its way
        free = SimpleNamespace(free=batches * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: free)
        if fits:
            loader.check_shared_memory()
            continue
        with pytest.raises(UserError) as error:
            loader.check_shared_memory()
    for part in ("efficiency.dataloader_num_workers=3: /dev/shm", "num_workers=2, or a smaller", "--shm-size=1g"):
        assert part in str(error.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert data.workers_that_fit(size) == 0, "two ranks share it"


class UntilBlocked(ImageDataset):
    """Images that can be read until a file named `blocked` appears, and then are waited for."""

    def __init__(self, root):
        os.mkfifo(root / "pipe")
        self.root, self.image = root, encode(photo(0))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Sample(str(index), self._read)

    def _read(self):
        return (self.root / "pipe").read_bytes() if (self.root / "blocked").exists() else self.image


def run_until(step, act, dataset, tmp_path, monkeypatch, workers):
    """Train on `dataset`, and call `act(loader)` after a step: the exit code, and the steps that were saved."""
    loaders = []

    class Spy(PretrainLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, dataset=dataset, **kwargs)
            loaders.append(self)

    def log_line(cfg, values):
        if values["step"] == step:
            act(loaders[0])
        return ""

    monkeypatch.setattr(train_capi, "PretrainLoader", Spy)
    monkeypatch.setattr(train_capi, "log_line", log_line)
    code = train_capi.main([
        *TINY, f"train.output_dir={tmp_path}/run", "data.dataset=unused", "optim.total_iters=100000",
        "train.checkpointing.period=100000", f"efficiency.dataloader_num_workers={workers}",
    ])  # fmt: skip
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (saved,) = (path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == f"step_{steps[-1]:09d}", "what was trained last was not saved"
    return code, steps[-1]


def block(root):
    """Let all further reads wait for ever, and end that by a signal."""

    def act(_):
        (root / "blocked").touch()
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()

    return act


def train_as_a_rank_of_which_the_last_is_blocked(root):
    rank = int(os.environ["RANK"])
    (root / str(rank)).mkdir()
    act = block(root / "1") if rank == 1 else lambda _: None
    with pytest.MonkeyPatch.context() as patch:
        code, _ = run_until(2, act, UntilBlocked(root / str(rank)), root, patch, workers=0)
    assert code == 0


def test_ranks_save_together_when_one_of_them_waits_for_ever_and_gets_the_signal(tmp_path):
    assert exit_codes(train_as_a_rank_of_which_the_last_is_blocked, 2, tmp_path) == [0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_waits_for_a_batch_for_ever_saves_and_leaves_at_a_signal(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CLOSE_TIMEOUT_S", 0.1)

    code, step = run_until(2, block(tmp_path), UntilBlocked(tmp_path), tmp_path, monkeypatch, workers)
    assert code == 0
    assert 2 <= step <= 2 + 5, "the training did not wait"
    assert "stopped by SIGTERM" in (tmp_path / "run" / "log.txt").read_text()


def test_a_training_whose_worker_is_killed_saves_and_says_why_it_ends(tmp_path, monkeypatch, capfd):
    def kill(loader):
        os.kill(loader.workers[0].pid, signal.SIGKILL)

    code, _ = run_until(2, kill, UntilBlocked(tmp_path), tmp_path, monkeypatch, workers=2)
    assert code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "efficiency.dataloader_num_workers: a process that reads images was killed" in errors[0]


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, signal, sys\n"
        "from config import DEFAULT_PRETRAIN_CONFIG, load_config\n"
        "from train_capi import CapiConfig, make_loader\n"
        "if __name__ == '__main__':\n"
        "    config = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sys.argv[1:])\n"
        "    loader = make_loader(config, rank=0, world_size=1)\n"
        "    next(loader)\n"
        "    print(*[worker.pid for worker in loader.workers], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [PYTHON, script, f"data.dataset={folder}", "efficiency.dataloader_num_workers=2",
         "efficiency.cache_dataset=false", "optim.batch_size_per_gpu=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    workers = done.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), "workers were left behind"


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_other_ways_to_start_workers_give_the_same(folder, start_method):
    config = make_config(f"data.dataset={folder}", workers=2)
    expected = take(make_loader(make_config(f"data.dataset={folder}")), 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        assert take(make_loader(config, start_method=start_method), 4) == expected


def test_the_prefetcher_hands_out_the_loaders_batches_and_their_position(folder):
    config = make_config(f"data.dataset={folder}")
    straight = take(make_loader(config), 4)
    loader = make_loader(config)
    batches = DevicePrefetcher(loader, torch.device("cpu"))
    assert batches.state_dict() == loader.state_dict()
    assert [fingerprint(next(batches)) for _ in range(4)] == straight
    assert batches.state_dict() == loader.state_dict()
    assert batches.wait_s > 0


@pytest.mark.gpu
def test_the_prefetcher_copies_ahead_and_keeps_the_position_of_the_batch_in_use(folder):
    config = make_config(f"data.dataset={folder}", workers=2)
    straight = take(make_loader(make_config(f"data.dataset={folder}")), 8)
    with make_loader(config, pin_memory=True) as loader:
        batches = DevicePrefetcher(loader, torch.device("cuda"))
        for step in range(8):
            batch = next(batches)
            assert batch.images.is_cuda
            assert fingerprint(batch.to("cpu")) == straight[step]
            assert batches.state_dict()["samples"] == 4 * (step + 1)
            assert loader.state_dict()["samples"] == 4 * (step + 2), "nothing was read ahead"


class Late:
    """A loader whose batches reach a GPU late: their copies are queued behind work that takes about 0.05 s."""

    def __init__(self, loader):
        self.loader = loader

    def __next__(self):
        torch.cuda._sleep(100_000_000)  # cycles
        return next(self.loader)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_work_that_is_queued_on_a_batch_reads_it_neither_too_early_nor_too_late(jpegs, decode):
    device = torch.device("cuda")
    config = make_config(f"data.dataset={jpegs}", "data.max_bad_fraction=1.0", f"data.decode={decode}", batch_size=12)
    with make_loader(config, decode_device=device) as loader:
        expected = [next(loader).images.cpu() for _ in range(6)]
    with make_loader(config, pin_memory=True, decode_device=device) as loader:
        batches = DevicePrefetcher(Late(loader), device)
        early = [next(batches).images.clone() for _ in range(6)]
    with make_loader(config, pin_memory=True, decode_device=device) as loader:
        batches = DevicePrefetcher(loader, device)
        late = []
        for _ in range(6):
            batch = next(batches)
            torch.cuda._sleep(100_000_000)
            late.append(batch.images.clone())
            del batch  # the next ones are copied before it is read
    for number, images in enumerate(expected):
        assert torch.equal(early[number].cpu(), images), f"batch {number} was read before it was there"
        assert torch.equal(late[number].cpu(), images), f"the memory of batch {number} was given away too early"


class FakeBatches:
    """What `WorkerAdvice` looks at."""

    def __init__(self, workers, *overrides, dataset=None, device="cpu"):
        self.loader = make_loader(make_config(*overrides, workers=workers), dataset=dataset or MemoryDataset(2))
        self.device = torch.device(device)
        self.now = self.wait_s = self.make_s = 0.0

    def spend(self, elapsed, waited, made):
        self.now, self.wait_s, self.make_s = self.now + elapsed, self.wait_s + waited, self.make_s + made


def test_advice_names_the_workers_that_would_be_enough_once():
    batches = FakeBatches(2)
    advice = WorkerAdvice(batches, 16, clock=lambda: batches.now)
    batches.spend(10, 9, 20)
    assert advice.read() is None, "the start of the workers was counted"
    batches.spend(10, 0.9, 18)
    assert advice.read() is None, "a wait of less than a tenth"
    batches.spend(10, 6, 19)  # the loop needs 4 s for what one worker makes in 19 s
    assert advice.read() == (
        "training waits for images 60% of the time with efficiency.dataloader_num_workers=2: 5 would be enough"
    )
    batches.spend(10, 6, 19)
    assert advice.read() is None, "said twice"
    batches.spend(10, 8, 19)
    assert "10 would be enough" in advice.read(), "it changed much"


def test_advice_never_asks_for_more_workers_than_cores():
    batches = FakeBatches(2, device="cuda")
    advice = WorkerAdvice(batches, 4, clock=lambda: batches.now)
    advice.read()
    batches.spend(10, 9, 20)
    assert advice.read().endswith(
        "workers=2: 20 would be enough, but this rank has 4 core(s), one of them for the training loop; use 3; smaller "
        "image files and more cores and data.decode=gpu help"
    )
    batches = FakeBatches(3)
    advice = WorkerAdvice(batches, 4, clock=lambda: batches.now)
    advice.read()
    batches.spend(10, 9, 20)
    line = advice.read()
    assert "use" not in line
    assert "gpu" not in line, "there is none"


def test_advice_for_workers_that_are_quick_and_for_streams():
    batches = FakeBatches(4)
    advice = WorkerAdvice(batches, 8, clock=lambda: batches.now)
    advice.read()
    batches.spend(10, 5, 10)
    assert "they make batches quickly enough" in advice.read()
    batches = FakeBatches(2, "data.stream_partitions=4", dataset=MemoryStream(5, 5, 5, 5))
    advice = WorkerAdvice(batches, 8, clock=lambda: batches.now)
    advice.read()
    batches.spend(10, 5, 20)
    assert advice.read().endswith("4 would be enough, if they divide data.stream_partitions=4")


def test_the_cores_of_a_machine_are_divided_among_the_ranks_that_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8}, raising=False)
    monkeypatch.setattr(data, "gather_objects", lambda mine: [mine, ("other host", mine[1]), mine, (mine[0], [1, 2])])
    assert data.cores_of_this_rank() == 2


def test_training_says_in_its_log_when_it_waits_for_images(jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_WAIT_FRACTION", 0.0)
    arguments = [*TINY, f"data.dataset={jpegs}", "data.max_bad_fraction=1.0", f"train.output_dir={tmp_path}/run"]
    assert train_capi.main(arguments) == 0
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    lines = [line for line in log if "training waits for images" in line]
    assert lines, "nothing was said"
    assert all("efficiency.dataloader_num_workers=0: " in line for line in lines)


class ThreadsInTheReason(ImageDataset):
    """Its first image cannot be read, and the reason says how many threads torch would use."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Sample(f"image {index}", _one_pixel if index else _raise_threads)


def _raise_threads():
    raise ValueError(f"threads {torch.get_num_threads()}")


def test_a_worker_uses_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # read by a spawned worker, not by one of a server that runs already
    config = make_config("data.max_bad_fraction=1.0", workers=1)
    with make_loader(config, dataset=ThreadsInTheReason(), start_method="spawn") as loader:
        reasons = {reason for _ in range(3) for _, reason in next(loader).bad}
    assert reasons == {"ValueError: threads 1"}


def test_the_loader_caches_the_listing_when_asked(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    age(folder)
    for switch in ("false", "true"):
        make_loader(make_config(f"data.dataset={folder}", f"efficiency.cache_dataset={switch}")).close()
        assert bool(list(tmp_path.rglob("*.npz"))) == (switch == "true")


@pytest.mark.parametrize("crop", [(56, 112), (112, 28)])
@pytest.mark.parametrize("size", [(2000, 1500), (700, 300), (3000, 200), (300, 1600)])
def test_a_jpeg_is_shrunk_no_further_than_long_crops_allow(size, crop):
    config = make_config(f"data.images_size=[{crop[0]},{crop[1]}]")
    maker = make_loader(config, dataset=MemoryDataset(1)).maker
    divisor = maker.reduction(*size)
    aspect = crop[1] / crop[0]
    boxes = [draw_crop(*size, config.data.crop_scale, False, key, aspect=aspect) for key in range(2000)]
    least = min(min(box.height / crop[0], box.width / crop[1]) for box in boxes)
    assert divisor == 1 or divisor <= 1.01 * least, "some crop has to be enlarged"
    assert divisor == 8 or 2 * divisor > 0.95 * least, "could be shrunk further"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_shrunk_as_far_as_its_upright_size_allows(orientation):
    maker = make_loader(make_config("data.images_size=[112,224]"), dataset=MemoryDataset(1)).maker
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photo(3, 800, 600), "JPEG", exif=exif)
    width, height = decode_image(content).size
    divisor = maker.reduction(width, height)
    assert divisor != maker.reduction(height, width), "the size does not tell the two apart"
    sizes = [decode_image(content, maker.reduction).size, decode_pixels(content, maker.reduction).shape[:0:-1]]
    drawn = []

    def draw(width, height):
        drawn.append((width, height))
        return Crop(0, 0, height, width, flip=False)

    crop_or_file(Sample("x", lambda: content), draw, maker.reduction, maker.crop_size)
    for size in (*sizes, *drawn):
        assert size == (width // divisor, height // divisor)


@pytest.mark.parametrize("size", [(2000, 1500), (900, 700), (640, 480), (500, 375), (3000, 200), (100, 100)])
def test_a_jpeg_is_shrunk_while_decoding_only_as_far_as_no_crop_needs_enlarging(size):
    config = make_config("data.images_size=112")
    maker = make_loader(config, dataset=MemoryDataset(1)).maker
    divisor = maker.reduction(*size)
    smallest = min(np.sqrt(0.6 * size[0] * size[1] * 0.75), *size)
    assert divisor == 1 or smallest / divisor >= 112
    assert divisor == 8 or smallest / (2 * divisor) < 112, "could be shrunk further"
    content = encode(photo(2, *size), "JPEG", quality=95)
    plain, shrunk = decode_image(content), decode_image(content, maker.reduction)
    assert shrunk.width == -(-plain.width // divisor)
    reference = np.asarray(plain.resize(shrunk.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(shrunk, float) - reference).mean() < 3
