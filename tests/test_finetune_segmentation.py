"""finetune_segmentation.py and the scores of its models: exact resume, ranks, labels, crops, windows, wrong input."""

import colorsys
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import metrics_of, run_forked
from conftest import ROOT, seeded
from finetunes import (
    CASES,
    LABEL_COLOURS,
    LABEL_NAMES,
    opened,
    pretrain,
    segmentation_url,
    train_on_this_rank,
    write_masks,
)
from PIL import Image
from ranks import run_on_ranks

import cae
import eval_finetuned
import eval_segmentation
import finetune_segmentation as script
import finetuning
from config import load_config
from data import Batch, normalize
from finetuning import layer_scales
from reading.sources import UNLABELLED, SegmentationDataset
from utils import UserError

CASE = CASES["segmentation"]
url = segmentation_url


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_masks(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return pretrain(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def arguments(folders, pretrained, tmp_path):
    """Arguments of a tiny training in a folder of this test."""

    def make(name: str = "run", *more: str) -> list[str]:
        return CASE.arguments(folders, f"pretrained_weights={pretrained}", tmp_path / name, *more)

    return make


def load(arguments: list[str]) -> script.FinetuneSegmentationConfig:
    return finetuning.load(script.TASK, arguments)


def state_of(arguments: list[str]) -> Any:
    cfg, _ = opened("segmentation", arguments)
    return finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)


BOTH = pytest.mark.parametrize("head", ["uper", "linear"])

# --- The loop --------------------------------------------------------------------------------------------------------

EVALS = {"test": {
    "period": 0, "final": True, "model_to_eval": "model", "model_setup_script": "finetuning.py", "where": "inline",
    "download": False, "eval_config": {"test": {"file": "eval_finetuned.py", "num_pictures": 3, "num_workers": 0}},
}}  # fmt: skip


@pytest.mark.long
def test_a_model_learns_as_typed_and_the_report_has_its_scores_and_pictures(folders, pretrained, tmp_path):
    EVALS["test"]["eval_config"]["test"]["test_dataset_name"] = url(folders / "test")
    (tmp_path / "evals.yaml").write_text(yaml.safe_dump({"evals": EVALS}))
    done = run_forked(
        "finetune_segmentation.py", tmp_path / "evals.yaml",
        *CASE.arguments(folders, f"pretrained_weights={pretrained}", tmp_path / "run"),
        "optim.total_iters=60", "optim.layer_decay=1",
        "optim.lr_schedule.base_value=5e-3", "optim.batch_size_per_gpu=8", "segmentation.photometric_distortion=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "evals" / "test").iterdir()
    page = (folder / "results" / "report.html").read_text()
    assert "mIoU" in page and "auxiliary head" in page and "predictions, " in page
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/test/test/finetuned/mIoU"] > 0.6, "three colours are not told apart"


@BOTH
def test_the_loss_is_the_sum_of_its_parts(arguments, tmp_path, head):
    assert script.main(arguments("run", f"segmentation.head={head}", "optim.total_iters=2")) == 0
    for record in metrics_of(tmp_path / "run"):
        assert ("auxiliary" in record) == (head == "uper")
        parts = record["cross_entropy"] + record.get("auxiliary", 0.0)
        assert record["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("head", [pytest.param("uper", marks=pytest.mark.long), "linear"])
def test_bfloat16_is_close_to_float32_on_one_rank_and_on_two(arguments, tmp_path, head):
    more = [f"segmentation.head={head}", "backbone.drop_path_rate=0", "segmentation.dropout=0", "optim.total_iters=2"]
    half = [*more, "efficiency.param_dtype=bfloat16"]
    assert script.main(arguments("float32", *more)) == 0
    assert script.main(arguments("one", *half)) == 0
    share = "optim.batch_size_per_gpu=4"
    run_on_ranks(train_on_this_rank, 2, "segmentation", arguments("two", *half, "efficiency.fsdp=simple", share))
    plain = metrics_of(tmp_path / "float32")
    for name in ("one", "two"):
        for a, b in zip(metrics_of(tmp_path / name), plain, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-2), f"{name}, step {a['step']}"
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.2), f"{name}, step {a['step']}"
    weights = torch.load(tmp_path / "two" / "model.pth", weights_only=True)
    assert {x.dtype for x in weights.values() if x.is_floating_point()} == {torch.float32}


# --- Labels ----------------------------------------------------------------------------------------------------------


def numbers(names: list[str], ignored: list[int], *overrides: str, name: str = "Segmentation") -> script.LabelNumbers:
    own = load([f"data.dataset=custom://{name}?root='x'", *overrides])
    dataset = SegmentationDataset([], ignored, names)
    return script.number_labels(own.segmentation, dataset, "data.dataset", own.data.dataset)


def table(found: script.LabelNumbers) -> dict[int, int]:
    return {label: number for label, number in enumerate(found.table.tolist()) if number != script.UNKNOWN}


def test_labels_that_count_are_numbered_without_those_that_do_not():
    found = numbers(LABEL_NAMES, [1, 255])
    assert found.classes == ["ground", "blue", "red"]
    assert table(found) == {0: 0, 1: 255, 2: 1, 3: 2, 255: 255}
    found = numbers(LABEL_NAMES, [1, 255], "segmentation.ignore_labels=[0]")
    assert (found.classes, table(found)) == (["(void)", "blue", "red"], {0: 255, 1: 0, 2: 1, 3: 2, 255: 255})


def test_reduce_zero_label_ignores_label_0_and_shifts_the_others():
    found = numbers(["wall", "floor", "sky"], [255], "segmentation.reduce_zero_label=true")
    assert (found.classes, table(found)) == (["floor", "sky"], {0: 255, 1: 0, 2: 1, 255: 255})
    plain, reduced = (
        numbers([], [255], "segmentation.num_classes=4", f"segmentation.reduce_zero_label={reduce}")
        for reduce in ("false", "true")
    )
    assert table(plain) == {0: 0, 1: 1, 2: 2, 3: 3, 255: 255}
    assert table(reduced) == {0: 255, 1: 0, 2: 1, 3: 2, 4: 3, 255: 255}
    labels = torch.tensor([[0, 1, 4, 255]], dtype=torch.uint8)
    assert reduced.read(Image.fromarray(labels.numpy()), 4, 1).tolist() == [[255, 0, 3, 255]]


def test_published_sets_have_their_classes():
    for reduce in ("false", "true"):  # label 0 is none of ADE20K's classes in any case
        ade = numbers([], [0, 255], f"segmentation.reduce_zero_label={reduce}", name="ADE20K")
        assert len(ade.classes) == 150
        assert table(ade) == {0: 255, **{label: label - 1 for label in range(1, 151)}, 255: 255}
    assert table(numbers([], [255], name="VOC2012")) == {**{label: label for label in range(21)}, 255: 255}


def test_classes_of_a_test_set_are_matched_by_name(arguments):
    cfg, *_ = opened("segmentation", arguments())
    other = SegmentationDataset([], [0, 255], ["(rest)", "red", "ground", "blue"])
    found = script.numbers_of_test(cfg, other, "custom://Segmentation?root='x'")
    assert found.classes == ["ground", "blue", "red"]
    assert table(found) == {0: 255, 1: 2, 2: 0, 3: 1, 255: 255}
    with pytest.raises(UserError, match="class green is not a class of the classes that were trained"):
        script.numbers_of_test(cfg, SegmentationDataset([], [255], ["red", "green"]), "custom://Segmentation?root='x'")
    nameless = script.numbers_of_test(cfg, SegmentationDataset([], [255]), "custom://Segmentation?root='x'")
    assert table(nameless) == {0: 0, 1: 1, 2: 2, 255: 255}


# --- Crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((640, 480), (2048, 512), (683, 512)),
        ((480, 640), (2048, 512), (512, 683)),
        ((3000, 500), (2048, 512), (2048, 341)),
        ((640, 480), (1024, 256), (341, 256)),
        ((4000, 1), (64, 16), (64, 1)),
    ],
)
def test_images_are_fitted_into_the_longer_and_the_shorter_side(size, resize, expected):
    assert script.fitted_size(*size, *resize) == expected


def test_a_crop_avoids_places_where_one_class_has_too_much():
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 30:] = 1
    labels[:20] = 255

    def shares(ratio: float) -> list[float]:
        found = []
        for seed in range(200):
            top, left = script.draw_place(labels, 16, ratio, np.random.default_rng(seed))
            assert 0 <= top <= 24 and 0 <= left <= 24
            counts = labels[top : top + 16, left : left + 16].flatten().bincount(minlength=256)[:255]
            found.append(float(counts.max() / counts.sum().clamp_min(1)))
        return found

    free, bound = shares(1.0), shares(0.75)
    assert sum(share >= 0.75 for share in free) > 100
    assert sum(share >= 0.75 for share in bound) < 40, "ten tries find a place nearly always"
    one_class = torch.zeros(20, 20, dtype=torch.uint8)
    places = {script.draw_place(one_class, 16, 0.75, np.random.default_rng(seed)) for seed in range(20)}
    assert len(places) > 5, "where no place is better, the last one is taken"


def make(arguments: list[str], positions: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cfg, (dataset, found) = opened("segmentation", arguments)
    maker = script.LabelledCrops(cfg, found)
    return [maker.make(dataset[position % len(dataset)], position) for position in positions]


PLAIN = "segmentation.photometric_distortion=false"


def test_labels_travel_with_their_pixels(arguments):
    colours = torch.from_numpy(LABEL_COLOURS[[0, 2, 3]]).float()
    right = counted = 0
    flipped = set()
    for image, labels in make(arguments("x", PLAIN), range(30)):
        assert image.shape == (3, 16, 16) and labels.shape == (16, 16)
        nearest = torch.cdist(image.flatten(1).T.float(), colours).argmin(dim=1).view(16, 16)
        counts = labels != UNLABELLED
        right += int((nearest == labels)[counts].sum())
        counted += int(counts.sum())
        flipped.add(tuple(image.shape))
    assert right / counted > 0.93, "only at borders the colours are mixed"


def test_a_crop_larger_than_its_image_is_padded_with_what_does_not_count(arguments):
    for image, labels in make(arguments("x", PLAIN, "segmentation.resize_ratio=[0.25,0.5]"), range(8)):
        inside = labels != UNLABELLED
        assert not inside[8:, 8:].any() and inside.any()
        grey = script.mean_colour((0.485, 0.456, 0.406)).expand(3, 4, 4)
        assert torch.equal(image[:, -4:, -4:], grey)
        assert normalize(image[None])[0, :, -4:, -4:].abs().max() < 0.02


def test_half_of_the_crops_are_flipped(arguments):
    own = ["segmentation.resize_ratio=[1,1]", PLAIN, "segmentation.cat_max_ratio=1", "train.seed=3"]
    plain = make(arguments("x", *own, "data.do_hflip=false"), range(40))
    random = make(arguments("x", *own), range(40))
    flipped = 0
    for (image, labels), (other, other_labels) in zip(plain, random, strict=True):
        same = torch.equal(image, other) and torch.equal(labels, other_labels)
        mirrored = torch.equal(image.flip(2), other) and torch.equal(labels.flip(1), other_labels)
        assert same or mirrored
        flipped += not same
    assert 10 < flipped < 30


def test_a_crop_follows_from_seed_and_position(arguments):
    (first, _), (again, _), (later, _) = (make(arguments(), range(at, at + 1))[0] for at in (3, 3, 13))
    (other, _) = make(arguments("x", "train.seed=1"), range(3, 4))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, later) and not torch.equal(first, other)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_is_that_of_hsv(factor):
    x = torch.rand(3, 5, 5, generator=seeded(0))
    x[:, 0] = x[:1, 0]  # grey
    changed = script.saturated(x, factor)
    for row, column in itertools.product(range(5), range(5)):
        h, s, v = colorsys.rgb_to_hsv(*x[:, row, column].tolist())
        expected = torch.tensor(colorsys.hsv_to_rgb(h, min(1.0, s * factor), v))
        torch.testing.assert_close(changed[:, row, column], expected, atol=1e-5, rtol=0)


def test_colours_are_distorted_within_their_ranges():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    red = torch.tensor([200, 100, 100], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    values, hues, kept = [], [], 0
    for seed in range(1000, 1300):
        out = script.distorted(grey, np.random.default_rng(seed))
        assert (out == out[:1, :1, :1]).all(), "without a hue there is nothing to turn"
        values.append(int(out[0, 0, 0]))
        h, s, _ = colorsys.rgb_to_hsv(*(script.distorted(red, np.random.default_rng(seed))[:, 0, 0] / 255).tolist())
        hues.append(h if h < 0.5 else h - 1)
        kept += values[-1] == 100
        assert s > 0.14
    assert min(values) >= 34 and max(values) <= 198, "(100 - 32) x 0.5 and (100 + 32) x 1.5"
    assert min(values) < 50 and max(values) > 150
    assert 0.15 < kept / 300 < 0.35, "a quarter has neither brightness nor contrast"
    assert max(map(abs, hues)) < 0.11 and 0.4 < sum(abs(hue) > 0.003 for hue in hues) / 300 < 0.6


# --- Schedule, head and loss -----------------------------------------------------------------------------------------


def test_the_schedule_is_poly_with_a_warm_up():
    cfg = load([str(ROOT / "configs" / "finetune" / "cae_segmentation.yaml")])
    expected = {  # by hand: 1e-4 (1 - i / 160000), in the warm-up times 1 - (1 - i / 1500) (1 - 1e-6)
        0: 1e-10,
        750: 9.953125e-5 * (1 - 0.5 * (1 - 1e-6)),
        1499: 9.9063125e-5 * (1 - (1 - 1e-6) / 1500),
        1500: 9.90625e-5,
        80_000: 5e-5,
        159_999: 6.25e-10,
        160_000: 0.0,
    }
    for step, lr in expected.items():
        assert script.lr_at(step, cfg) == pytest.approx(lr, rel=1e-9, abs=1e-20), step
    square = load(["optim.total_iters=10", "segmentation.poly_power=2", "optim.lr_schedule.warmup_iters=0",
                   "optim.lr_schedule.base_value=1", "optim.lr_schedule.final_value=0.2"])  # fmt: skip
    assert script.lr_at(5, square) == pytest.approx(0.2 + 0.8 * 0.25)
    cosine = load(["optim.total_iters=10", "segmentation.poly_power=null", "optim.lr_schedule.warmup_iters=0"])
    assert script.lr_at(5, cosine) == pytest.approx(cosine.optim.lr_schedule.base_value / 2)


@pytest.mark.parametrize(
    "config", sorted((ROOT / "configs" / "finetune").glob("*segmentation.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_configurations(config):
    cfg = load([str(config)])
    assert cfg.segmentation.resize == (4 * cfg.data.images_size, cfg.data.images_size)


def test_layer_decay_reaches_the_backbone_alone(arguments):
    state = state_of(arguments("x", "optim.layer_decay=0.5"))
    rate = {p: group["lr_multiplier"] for group in state.optimizer.param_groups for p in group["params"]}
    assert {rate[p] for p in state.model["head"].parameters()} == {1.0}
    first, last = (next(block.parameters()) for block in (state.trunk.blocks[0], state.trunk.blocks[-1]))
    assert [rate[first], rate[last]] == layer_scales(2, 0.5)[1:3] == [0.25, 0.5]
    decays = {p: group["wd_multiplier"] for group in state.optimizer.param_groups for p in group["params"]}
    norm = state.model["head"].pyramid.levels[0][1]
    assert [decays[p] for p in (norm.weight, state.model["head"].main.fpn_bottleneck.conv.weight)] == [0.0, 1.0]


def test_blocks_are_evenly_spaced_unless_they_are_given(arguments):
    def of(depth: int, *more: str) -> list[int]:
        return script.blocks_of(load(arguments("x", *more)).segmentation, depth)

    assert (of(12), of(24)) == ([2, 5, 8, 11], [5, 11, 17, 23])
    assert (of(2), of(1), of(6)) == ([0, 0, 1, 1], [0, 0, 0, 0], [1, 2, 4, 5])
    assert of(12, "segmentation.blocks=[3,5,7,11]") == [3, 5, 7, 11]
    with pytest.raises(UserError, match=r"segmentation.blocks=\[3, 5, 7, 11\]: the backbone has 4 blocks, 0 to 3"):
        of(4, "segmentation.blocks=[3,5,7,11]")
    with pytest.raises(UserError, match="must be ascending"):
        load(["segmentation.blocks=[5,3,7,11]"])


def test_the_heads_read_the_blocks_that_are_named(arguments):
    images = torch.randn(1, 3, 16, 16, generator=seeded(0))
    state = state_of(arguments("x", "segmentation.blocks=[0,0,1,1]"))
    with torch.no_grad():
        maps = script.head_inputs(state.cfg, state.trunk, images)
        both = state.trunk.maps(images, [0, 1])
        assert [torch.equal(x, both[i]) for x, i in zip(maps, (0, 0, 1, 1), strict=True)] == [True] * 4
        linear = state_of(arguments("x", "segmentation.head=linear"))
        (normed,) = script.head_inputs(linear.cfg, linear.trunk, images)
        torch.testing.assert_close(normed, linear.trunk.backbone(images)[2].movedim(-1, 1))


def test_uper_gives_logits_on_the_finest_map_and_while_training_those_of_the_auxiliary_head(arguments):
    state = state_of(arguments())
    head, images = state.model["head"], torch.randn(2, 3, 16, 16, generator=seeded(0))
    main, auxiliary = script.predict(state.cfg, state.model, state.trunk, images)
    assert (main.shape, auxiliary.shape) == ((2, 3, 16, 16), (2, 3, 4, 4))
    with torch.no_grad():
        levels = head.pyramid(script.head_inputs(state.cfg, state.trunk, images))
        without = head.main.classifier
        head.main.classifier = without[1]
        plain = [head.main(levels) for _ in range(2)]
        head.main.classifier = without
    assert torch.equal(*plain), "but for the dropout, a training head gives the same twice"
    assert not torch.equal(head.main(levels), plain[0])
    state.model.eval()
    assert [x.shape for x in script.predict(state.cfg, state.model, state.trunk, images)] == [(2, 3, 16, 16)]
    lone = state_of(arguments("x", "segmentation.auxiliary_weight=0"))
    assert lone.model["head"].auxiliary is None
    assert len(script.predict(lone.cfg, lone.model, lone.trunk, images)) == 1


def test_the_classic_recipe_has_as_many_parameters_as_its_layers_say():
    with torch.device("meta"):
        head = script.UperHead(768, 150, load([]).segmentation)

    def conv(channels: int, outputs: int, kernel: int) -> int:
        """Without a bias, and a batch norm."""
        return channels * outputs * kernel**2 + 2 * outputs

    pooled, laterals, smoothed = 4 * conv(768, 768, 1), 3 * conv(768, 768, 1), 3 * conv(768, 768, 3)
    main = pooled + conv(5 * 768, 768, 3) + laterals + smoothed + conv(4 * 768, 768, 3) + 769 * 150
    auxiliary = conv(768, 256, 3) + 257 * 150
    pyramid = 3 * (4 * 768 * 768 + 768) + 2 * 768
    assert sum(p.numel() for p in head.parameters()) == main + auxiliary + pyramid == 76_853_804


def test_pixels_that_do_not_count_have_no_part_in_the_loss():
    logits = torch.randn(2, 3, 4, 4, generator=seeded(0)).requires_grad_()
    labels = torch.randint(0, 3, (2, 16, 16), generator=seeded(1)).to(torch.uint8)
    labels[0, :, :9] = 255
    labels[1, 2] = 255
    large = F.interpolate(logits.double(), size=(16, 16), mode="bilinear", align_corners=False).log_softmax(dim=1)
    each = [-large[b, labels[b, i, j].long(), i, j] for b, i, j in (labels != 255).nonzero().tolist()]
    loss = script.pixel_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(float(torch.stack(each).sum().detach() / labels.numel()), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[0, :, :, 0] == 0).all(), "what is only under pixels that do not count"
    assert (logits.grad[0, :, :, 1:] != 0).all()
    assert script.pixel_cross_entropy(logits, torch.full_like(labels, 255)).item() == 0


def test_the_auxiliary_loss_has_its_weight(arguments):
    images = normalize(torch.randint(256, (4, 3, 16, 16), generator=seeded(1), dtype=torch.uint8))
    labels = torch.randint(0, 3, (4, 16, 16), generator=seeded(2)).to(torch.uint8)
    batch = Batch(images, {}, torch.arange(4), labels={"label": labels})
    found = []
    for weight in (0.4, 0.8):
        state = state_of(arguments("x", f"segmentation.auxiliary_weight={weight}", "segmentation.dropout=0"))
        parts = script.make_loss(state.cfg)(state.model, state.trunk, batch, seeded(0))
        found.append({name: part.item() for name, part in parts.items()})
    assert found[1]["auxiliary"] == pytest.approx(2 * found[0]["auxiliary"], rel=1e-5)
    assert found[1]["cross_entropy"] == pytest.approx(found[0]["cross_entropy"], rel=1e-5)
    # Logits begin close to 0, where each class is as likely as another.
    assert found[0]["cross_entropy"] == pytest.approx(np.log(3), rel=0.2)


# --- Windows and scores ----------------------------------------------------------------------------------------------


def windows_by_hand(length: int, size: int) -> list[int]:
    """Every stride, and the last one moved back to the end."""
    stride, starts, at = int(size * 2 / 3), [], 0
    while True:
        starts.append(min(at, max(length - size, 0)))
        if at + size >= length:
            return starts
        at += stride


@pytest.mark.parametrize(("length", "expected"), [(512, [0]), (300, [0]), (683, [0, 171]), (1024, [0, 341, 512])])
def test_windows_are_two_thirds_of_their_side_apart(length, expected):
    assert script.windows(length, 512) == expected
    for other in range(1, 60):
        assert script.windows(other, 12) == windows_by_hand(other, 12), other


def network(windows: torch.Tensor) -> torch.Tensor:
    """Logits of windows that depend on where in the window a pixel is, on a grid of a quarter."""
    x = windows.float() / 255
    place = torch.linspace(0, 1, x.shape[-1])
    return F.avg_pool2d(torch.cat([x[:, :2], x[:, :1] * place, x[:, 2:] + place[:, None]], dim=1), 4)


GREY = script.mean_colour((0.5, 0.5, 0.5))


def test_one_window_that_covers_the_image_is_one_forward_pass():
    image = torch.randint(256, (3, 16, 16), generator=seeded(0), dtype=torch.uint8)
    logits = script.sliding_logits(network, image, 16, batch_size=4, colour=GREY)
    assert torch.equal(logits, script.enlarged(network(image[None]), 16, 16)[0])
    small = image[:, :10, :13]
    whole = GREY.expand(3, 16, 16).clone()
    whole[:, :10, :13] = small
    padded = script.sliding_logits(network, small, 16, batch_size=4, colour=GREY)
    assert torch.equal(padded, script.enlarged(network(whole[None]), 16, 16)[0, :, :10, :13])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_are_the_mean_over_the_windows_of_a_pixel(batch_size):
    image = torch.randint(256, (3, 27, 45), generator=seeded(0), dtype=torch.uint8)
    logits = script.sliding_logits(network, image, 12, batch_size=batch_size, colour=GREY)
    of_pixels: dict[tuple[int, int], list[torch.Tensor]] = {}
    for top, left in itertools.product(windows_by_hand(27, 12), windows_by_hand(45, 12)):
        one = script.enlarged(network(image[None, :, top : top + 12, left : left + 12]), 12, 12)[0]
        for i, j in itertools.product(range(12), range(12)):
            of_pixels.setdefault((top + i, left + j), []).append(one[:, i, j])
    assert len(of_pixels) == 27 * 45
    assert {len(each) for each in of_pixels.values()} >= {1, 2, 4}
    for (i, j), each in of_pixels.items():
        torch.testing.assert_close(logits[:, i, j], torch.stack(each).mean(dim=0))


def test_the_most_likely_class_is_that_of_enlarged_logits():
    logits = torch.randn(40, 6, 7, generator=seeded(0))
    expected = F.interpolate(logits[None], size=(25, 19), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert torch.equal(script.most_likely(logits, 25, 19), expected.to(torch.uint8))


def evaluated(weights: Path, dataset: str, output_dir: Path, *more: str) -> int:
    return eval_finetuned.main(
        [f"model_loader_kwargs.pretrained_weights={weights}", f"test_dataset_name={dataset}",
         f"output_dir={output_dir}", "device=cpu", "num_workers=0", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(folders, pretrained, tmp_path_factory) -> Path:
    """An export whose last layer has been set so that it predicts different classes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert script.main(CASE.arguments(folders, f"pretrained_weights={pretrained}", run, "optim.total_iters=2")) == 0
    state = torch.load(run / "model.pth", weights_only=True)
    state["head.main.classifier.1.weight"] = torch.randn(3, 8, 1, 1, generator=seeded(0))
    torch.save(state, run / "model.pth")
    return run / "model.pth"


def test_scores_are_those_of_the_evaluation_of_frozen_features(folders, finished, tmp_path):
    assert evaluated(finished, url(folders / "test"), tmp_path / "results", "batch_size=2", "num_pictures=2") == 0
    results = json.loads((tmp_path / "results" / "results_finetuned.json").read_text())
    found = results["results"]["finetuned"]
    model = finetuning.load_model(finished)
    labels_of = torch.tensor([0, 255, 1, 2])
    truths, predictions = [], []
    for i in range(4):
        image = Image.open(folders / "test" / "images" / f"{i}.png")
        scale = 16 / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
        pixels = F.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True)[0]
        total, count = torch.zeros(3, height, width), torch.zeros(height, width)
        for top, left in itertools.product(windows_by_hand(height, 16), windows_by_hand(width, 16)):
            part = (slice(None), slice(top, top + 16), slice(left, left + 16))
            with torch.no_grad():
                total[part] += script.enlarged(model.predict(normalize(pixels[part][None]))[0], 16, 16)[0]
            count[part[1:]] += 1
        own = F.interpolate((total / count)[None], size=image.size[::-1], mode="bilinear", align_corners=False)
        predictions.append(own[0].argmax(dim=0).flatten().to(torch.uint8))
        mask = torch.from_numpy(np.array(Image.open(folders / "test" / "masks" / f"{i}.png")))
        truths.append(labels_of[mask.long()].flatten().to(torch.uint8))
    confusion = eval_segmentation.confusion_matrix(torch.cat(truths), torch.cat(predictions), [255])
    assert len(torch.cat(predictions).unique()) > 1, "one class alone would show nothing"
    expected = eval_segmentation.segmentation_metrics(confusion, [255], ["ground", "blue", "red"])
    for name, value in expected.items():
        assert found[name] == value, name
    assert found["mIoU"] == found["mIoU_valid"], "what does not count is never predicted"
    assert [score["label"] for score in results["scores"]] == ["mIoU", "mIoU_valid", "acc", "mean_acc"]
    assert found["num_images"] == 4 and found["window"] == 16
    assert found["counted_pixels"] == int(confusion.sum()) / sum(map(len, truths)) < 1
    assert (tmp_path / "results" / "artifacts" / "predictions.png").is_file()


def score_on_this_rank(arguments: list[str]) -> None:
    cfg = load_config(eval_finetuned.FinetunedConfig, None, arguments)
    eval_finetuned.EVALUATION.run(cfg, torch.device("cpu"))


@pytest.mark.long
def test_two_ranks_score_as_one(folders, finished, tmp_path):
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        own = [f"model_loader_kwargs.pretrained_weights={finished}", f"test_dataset_name={url(folders / 'test')}"]
        run_on_ranks(score_on_this_rank, ranks, [*own, f"output_dir={out}", "num_workers=0", "num_pictures=3"])
        found.append(json.loads((out / "results_finetuned.json").read_text())["results"])
        assert (out / "artifacts" / "predictions.png").is_file()
    assert found[0] == found[1]


def test_another_resolution_resizes_in_proportion(folders, finished, tmp_path, capsys):
    assert evaluated(finished, url(folders / "test"), tmp_path / "results", "resolution=32", "num_pictures=0") == 0
    found = json.loads((tmp_path / "results" / "results_finetuned.json").read_text())["results"]["finetuned"]
    assert (found["window"], found["resize"]) == (32, [128, 32])
    assert not (tmp_path / "results" / "artifacts").exists()
    assert evaluated(finished, url(folders / "test"), tmp_path / "other", "resolution=30") == 2
    assert "must be a multiple of the backbone's patches of 4 pixels" in capsys.readouterr().err


# --- CAE's encoder with relative positions ---------------------------------------------------------------------------

CAE_FILE = """
import sys
sys.path.insert(0, {root!r})
import cae
def __model_loader__():
    return cae.Encoder(grid_size=2, patch_size=4, embed_dim=32, depth=2, num_heads=2)
"""


def test_relative_positions_learn_and_predict_in_windows_of_their_size(arguments, folders, tmp_path):
    (tmp_path / "loader.py").write_text(CAE_FILE.format(root=str(ROOT)))
    own = [argument for argument in arguments() if "pretrained_weights" not in argument]
    cae_run = [*own, f"backbone.model_path={tmp_path / 'loader.py'}", "backbone.relative_position_bias=true",
               "optim.total_iters=2", "data.images_size=32", "segmentation.resize=[128,32]"]  # fmt: skip
    assert script.main(cae_run) == 0
    (tmp_path / "loader.py").unlink()
    weights = tmp_path / "run" / "model.pth"
    model = finetuning.load_model(weights)
    assert isinstance(model.model["backbone"], cae.Encoder)
    moved = model.state_dict()["model.backbone.blocks.0.attn.relative_position_bias_table"]
    assert moved.shape == (15 * 15 + 3, 2) and (moved != 0).any()
    assert evaluated(weights, url(folders / "test"), tmp_path / "results", "num_pictures=0") == 0


# --- Wrong input -----------------------------------------------------------------------------------------------------


def message(arguments: list[str], capsys) -> str:
    assert script.main(arguments) == 2
    return capsys.readouterr().err


def small_set(root: Path, labels: np.ndarray, size: tuple[int, int] = (20, 20), names: str | None = None) -> str:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", size).save(root / "images" / f"photo{i}.png")
        Image.fromarray(labels).save(root / "masks" / f"photo{i}.png")
    if names is not None:
        (root / "classes.txt").write_text(names)
    return f"data.dataset={url(root)}"


def test_a_label_that_is_no_class_stops_with_its_file(arguments, tmp_path, capsys):
    labels = np.zeros((20, 20), np.uint8)
    labels[3, 4] = 7
    data = small_set(tmp_path / "set", labels, names="ground\nblue\n")
    said = message(arguments("run", data), capsys)
    assert str(tmp_path / "set" / "images" / "photo") in said
    assert "has label 7, which is none of the 2 classes; name it in classes.txt" in said
    labels[3, 4] = 255
    fine = small_set(tmp_path / "fine", labels, names="ground\nblue\n")
    assert script.main(arguments("fine", fine, "optim.total_iters=1")) == 0


def test_data_without_names_need_a_number_of_classes(arguments, tmp_path, capsys):
    data = small_set(tmp_path / "set", np.eye(20, dtype=np.uint8))
    said = message(arguments("run", data), capsys)
    assert f"data.dataset={url(tmp_path / 'set')}" in said and "give segmentation.num_classes" in said
    assert script.main(arguments("fine", data, "segmentation.num_classes=2", "optim.total_iters=1")) == 0
    said = message(arguments("run", "segmentation.num_classes=2"), capsys)
    assert "segmentation.num_classes=2" in said and "names 3 classes that count; leave it null" in said


def test_a_mask_of_another_size_stops_with_its_file(arguments, tmp_path, capsys):
    data = small_set(tmp_path / "set", np.eye(20, dtype=np.uint8), size=(24, 20), names="ground\nblue\n")
    said = message(arguments("run", data), capsys)
    assert "photo" in said and "has 24x20 pixels and its label image 20x20" in said


def test_a_damaged_mask_is_a_damaged_image(arguments, tmp_path, capsys):
    data = small_set(tmp_path / "set", np.eye(20, dtype=np.uint8), names="ground\nblue\n")
    path = tmp_path / "set" / "masks" / "photo1.png"
    path.write_bytes(path.read_bytes()[:45])
    assert script.main(arguments("run", data, "data.max_bad_fraction=1", "optim.total_iters=1")) == 0
    (line,) = (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()
    assert "photo1" in line and "label" in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.images_size=18"], "must be a multiple of the backbone's patches of 4 pixels; the nearest is 16"),
        (["data.images_size=4"], "must be at least 2 patches of 4 pixels"),
        (["optim.batch_size_per_gpu=1"], "two or more images of all ranks together"),
        (["segmentation.blocks=[0,1]"], "segmentation.blocks=[0, 1]: must be 4 numbers"),
        (["segmentation.blocks=[0,1,2,3]"], "the backbone has 2 blocks, 0 to 1"),
        (["segmentation.ignore_labels=[0,1,2]"], "1 labels count, and segmentation needs two or more"),
        (["segmentation.head=mask"], "segmentation.head='mask': must be one of uper, linear"),
        (["optim.lr_schedule.truncate_cos=0.8"], "is for a half cosine, segmentation.poly_power=null"),
        (["optim.lr_schedule.start_warmup_value=1"], "must not be above base_value"),
    ],
    ids=lambda value: value[0].partition("=")[2] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_said_in_words(arguments, capsys, overrides, said):
    assert said in message(arguments("run", *overrides), capsys)


def test_a_missing_package_is_named_with_its_extra(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.upernet.modeling_upernet", None)
    said = message(arguments(), capsys)
    assert "pip install -e '.[finetuning]'" in said and "segmentation.head=linear" in said


def test_test_data_without_a_pixel_that_counts_have_no_score(finished, tmp_path, capsys):
    small_set(tmp_path / "set", np.full((20, 20), 255, np.uint8))
    assert evaluated(finished, url(tmp_path / "set"), tmp_path / "results") == 2
    assert "no pixel has a label that counts" in capsys.readouterr().err
    small_set(tmp_path / "other", np.full((20, 20), 3, np.uint8))
    assert evaluated(finished, url(tmp_path / "other"), tmp_path / "results") == 2
    said = capsys.readouterr().err
    assert "photo0.png" in said and "has label 3, which is none of the 3 classes" in said
