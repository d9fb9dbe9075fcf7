"""finetune_detection.py, what it reads (tasks/coco.py), its head (tasks/mask_rcnn.py), and the scores of its models."""

import functools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetunes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import TINY as TINY_PRETRAINING
from commands import metrics_of, run_forked
from conftest import ROOT, run_cli, seeded
from finetunes import CASES, CATEGORIES, COMMON, SIZE, objects_content, train_on_this_rank, write_coco
from PIL import Image
from pycocotools import mask as rle
from ranks import run_on_ranks
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou

import eval_finetuned
import finetune_detection as script
import finetuning
from config import load_config, to_yaml
from data import normalize
from demo_data import coco_from_masks
from reading.sources import BadImageError, Sample
from tasks import coco
from tasks.mask_rcnn import (
    MASK_POOL,
    NORMS,
    Anchors,
    Detections,
    MaskRCNN,
    Pool,
    Targets,
    mask_targets,
    paste_masks,
)
from train_capi import DEFAULT_PRETRAIN_CONFIG, CapiConfig
from utils import UserError

CASE = CASES["detection"]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "train")


@pytest.fixture(scope="module")
def model_config(tmp_path_factory) -> Path:
    """Of a tiny model, which has random weights then."""
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    path.write_text(to_yaml(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, TINY_PRETRAINING)))
    return path


@pytest.fixture
def arguments(boxes, model_config, tmp_path):
    """Arguments of a tiny training in a folder of this test."""

    def make(name: str, *more: str) -> list[str]:
        return CASE.arguments(boxes.parent, f"config_path={model_config}", tmp_path / name, *more)

    return make


@pytest.fixture
def opened(arguments):
    """The configuration of a tiny training with its classes, and its images."""
    return lambda *more: finetunes.opened("detection", arguments("run", *more))


# --- Training, and scores of what was trained ------------------------------------------------------------------------


@pytest.mark.long
def test_a_model_is_trained_and_scored_as_typed_and_keeps_the_ids_of_the_data(arguments, boxes, tmp_path):
    more = ["optim.total_iters=100", "optim.batch_size_per_gpu=6", "optim.layer_decay=1", "detection.lr_steps=[]"]
    more += ["optim.lr_schedule.base_value=3e-3", "optim.lr_schedule.warmup_iters=5", "backbone.drop_path_rate=0"]
    more += ["detection.crop_short_sides=[]", "train.checkpointing.period=1000", "detection.channels=16"]
    done = run_forked("finetune_detection.py", *arguments("run", *more))
    assert done.returncode == 0, done.stderr
    weights = f"model_loader_kwargs.pretrained_weights={tmp_path / 'run' / 'model.pth'}"
    url = f"custom://COCO?images='{boxes}'&annotations='{boxes / 'annotations.json'}'"
    results = tmp_path / "results"
    own = [weights, f"test_dataset_name={url}", f"output_dir={results}", "device=cpu", "num_workers=0"]
    done = run_forked("eval_finetuned.py", *own)
    assert done.returncode == 0, done.stderr
    scores = json.loads((results / "results_finetuned.json").read_text())["results"]["finetuned"]
    assert scores["boxes"]["AP50"] > 0.6, "coloured rectangles are not found"
    assert scores["masks"]["AP50"] > 0.6
    assert (results / "artifacts" / "predictions.png").is_file()
    # What was written is what the other package scores alike, with the file as it is.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(boxes / "annotations.json"))
    found = truth.loadRes(str(results / "artifacts" / "detections.json"))
    for kind, name in (("bbox", "boxes"), ("segm", "masks")):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert scores[name]["AP"] == pytest.approx(evaluation.stats[0], abs=1e-9), name


def only_in_the_first(known: dict[str, Any]) -> None:
    first = known["images"][0]["id"]
    known["annotations"] = [entry for entry in known["annotations"] if entry["image_id"] == first]


@pytest.mark.parametrize("mode", ["simple", "none"])
def test_ranks_whose_images_are_empty_train_beside_others(arguments, tmp_path, mode):
    few = write_coco(tmp_path / "few", only_in_the_first)
    more = [f"data.dataset={few}", "detection.skip_empty=false", "optim.total_iters=3", f"efficiency.fsdp={mode}"]
    share = "optim.batch_size_per_gpu=2"
    run_on_ranks(train_on_this_rank, 2, "detection", arguments("ranks", *more, share), timeout_s=60)
    assert [record["step"] for record in metrics_of(tmp_path / "ranks")] == [1, 2, 3]


def test_images_without_objects_are_learned_from_only_if_asked_for(opened, tmp_path):
    few = write_coco(tmp_path / "few", only_in_the_first)
    assert len(opened(f"data.dataset={few}")[1]) == 1
    cfg, images = opened(f"data.dataset={few}", "detection.skip_empty=false")
    assert len(images) == 6
    assert cfg.data.images_per_epoch == 6


def test_every_parameter_of_the_head_learns_from_a_batch_without_objects(opened):
    cfg, _ = opened()
    state = finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)
    maps = script.head_inputs(cfg, state.trunk, torch.randn(2, 3, 32, 32, generator=seeded(0)))
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 32, 32).byte())
    losses = state.model["head"](maps, [(32, 32), (30, 24)], [nothing, nothing])
    assert list(losses) == list(script.TASK.losses)
    sum(losses.values(), torch.zeros(())).backward()
    lacking = [name for name, p in state.model["head"].named_parameters() if p.grad is None]
    assert lacking == [], "ranks with other images would wait for their gradients"
    assert all(loss.isfinite() for loss in losses.values())


def test_boxes_alone_need_no_masks(arguments, opened, tmp_path):
    def without(known: dict[str, Any]) -> None:
        for entry in known["annotations"]:
            del entry["segmentation"]

    plain = write_coco(tmp_path / "plain", without)
    with pytest.raises(UserError, match=r"annotation id=1 has no segmentation.*detection\.masks=false"):
        opened(f"data.dataset={plain}")
    own = [f"data.dataset={plain}", "detection.masks=false", "optim.total_iters=1"]
    assert script.main(arguments("run", *own)) == 0
    assert "mask" not in metrics_of(tmp_path / "run")[0]
    model = tmp_path / "run" / "model.pth"
    results = tmp_path / "results"
    assert scored(model, plain, results) == 0
    assert "masks" not in json.loads((results / "results_finetuned.json").read_text())["results"]["finetuned"]


def scored(model: Path, data: Path | str, results: Path, *more: str) -> int:
    return eval_finetuned.main([
        f"model_loader_kwargs.pretrained_weights={model}", f"test_dataset_name={data}", f"output_dir={results}",
        "num_workers=0", "device=cpu", "num_pictures=0", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(boxes, model_config, tmp_path_factory) -> Path:
    """The export of one step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    model = f"backbone.model_loader_kwargs.config_path={model_config}"
    own = ["optim.total_iters=1", f"data.dataset={boxes}", f"train.output_dir={folder}"]
    assert script.main([*COMMON, *CASE.tiny, model, *own]) == 0
    return folder / "model.pth"


def test_where_objects_belong_is_read_of_the_host_copy(opened):
    """Which objects, and how large an image is without padding: a GPU that was asked would be waited for."""
    losses = []
    for on_device in (True, False):
        cfg, images = opened("detection.short_sides=[24]")
        state = finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)
        maker = script.ChangedImages(cfg, 2.0)
        learned = [maker.make(images[i], i) for i in range(3)]
        first = learned[0]
        empty = script.Learned(first.pixels, first.boxes[:0], first.classes[:0], first.masks[:0])
        batch = maker.batch([empty, *learned[1:]], [], [0, 1, 2], []).to("cpu")
        assert batch.labels["image"].tolist() == [1, 1, 2, 2]
        if not on_device:
            unread = {name: torch.full_like(batch.labels[name], -9) for name in ("image", "size")}
            batch = replace(batch, labels=batch.labels | unread)
        batch = replace(batch, images=normalize(batch.images))
        losses.append(finetuning.train_step(state, [batch], 1e-3, script.make_loss(cfg)))
    assert losses[0] == losses[1]


def test_losses_in_bfloat16_are_those_in_float32_but_for_rounding(opened):
    """Boxes of hundreds of pixels would be off by several if they were computed in bfloat16."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        cfg, images = opened(f"efficiency.param_dtype={dtype}")
        state = finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)
        maker = script.ChangedImages(cfg, 2.0)
        batch = maker.batch([maker.make(images[i], i) for i in range(2)], [], [0, 1], [])
        batch = replace(batch, images=normalize(batch.images))
        losses.append(finetuning.train_step(state, [batch], 1e-3, script.make_loss(cfg)))
    for name, expected in losses[0].items():
        torch.testing.assert_close(losses[1][name], expected, rtol=0.03, atol=1e-3, msg=name)


def test_test_images_have_the_resolution_that_is_asked_for(finished, boxes, tmp_path):
    assert scored(finished, boxes, tmp_path / "own") == 0
    assert scored(finished, boxes, tmp_path / "large", "resolution=64") == 0
    sides = [
        json.loads((tmp_path / name / "results_finetuned.json").read_text())["results"]["finetuned"]["test_sides"]
        for name in ("own", "large")
    ]
    assert sides == [[32, 40], [64, 64]]


# --- Learning rate and configurations --------------------------------------------------------------------------------

CONFIGS = sorted(path.name for path in (ROOT / "configs" / "finetune").glob("*detection.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_are_complete(name):
    cfg = finetuning.load(script.TASK, [str(ROOT / "configs" / "finetune" / name)])
    assert cfg.detection.channels > 0


def test_the_learning_rate_of_cae_falls_to_a_tenth_after_nine_and_eleven_of_twelve_epochs():
    cfg = finetuning.load(script.TASK, [
        str(ROOT / "configs" / "finetune" / "cae_detection.yaml"), "optim.epochs=null", "optim.total_iters=12000",
    ])  # fmt: skip
    rates = [script.lr_at(step, cfg) for step in (0, 499, 500, 8999, 9000, 10999, 11001, 11999)]
    expected = [3e-7, 3e-4, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    assert rates == pytest.approx(expected, rel=1e-9)


# --- How images, boxes and masks are changed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((200, 640), (800, 1333), (417, 1333)),
    ],
)
def test_images_fit_between_the_shorter_and_the_longer_side_as_in_mmdetection(size, limits, expected):
    assert tuple(script.fitting(*size, *limits)) == expected


def test_boxes_follow_resizing_cutting_and_mirroring_as_by_hand():
    change = script.Change((script.Resize(80, 120), script.Cut(10, 20, 50, 60)), flip=True)
    place = change.affine(40, 60)
    boxes = torch.tensor([[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 10.0, 40.0], [20.0, 10.0, 60.0, 40.0]])
    # Twice as large; 20 and 10 to the left and up; mirrored in 60 pixels.
    expected = torch.tensor([[20.0, 0.0, 60.0, 30.0], [60.0, 0.0, 60.0, 50.0], [0.0, 10.0, 40.0, 50.0]])
    torch.testing.assert_close(script.change_boxes(boxes, place), expected)


@pytest.mark.parametrize("augmentation", ["multi_scale", "jitter"])
@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
def test_boxes_and_masks_stay_on_what_is_seen(opened, augmentation, kind):
    cfg, _ = opened(f"detection.augmentation={augmentation}", "detection.jitter_range=[0.7,2.0]")
    height, width, box = 60, 70, [20.0, 15.0, 45.0, 40.0]
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[:, 15:40, 20:45] = 255
    left, top, right, bottom = box
    segmentation: Any = [[left, top, right, top, right, bottom, left, bottom]]
    if kind == "run lengths":
        segmentation = coco_from_masks.run_lengths((pixels[0] > 0).numpy())
    flips = 0
    for number in range(40):
        change = script.draw_change(height, width, cfg.detection, 32, True, 0, number)
        place = change.affine(height, width)
        seen = change.pixels(pixels)[0]
        assert seen.shape == (place.height, place.width)
        (found,) = script.change_boxes(torch.tensor([box]), place).tolist()
        mask = torch.from_numpy(script.change_mask(segmentation, height, width, place))
        bright = seen > 127
        if bright.sum() < 20:
            continue
        flips += change.flip
        (around,) = script.boxes_around(bright[None].byte()).tolist()
        assert found == pytest.approx(around, abs=1.01), f"box of change {number}"
        off = (mask.bool() != bright).sum().item()
        assert off <= sum(bright.shape), f"{off} pixels of the mask are wrong in change {number}"
    assert 5 < flips < 35


def test_masks_that_are_only_cut_are_cut_exactly():
    polygon = [[3.0, 4.0, 20.0, 2.0, 25.0, 21.0, 8.0, 27.0]]
    whole = coco.decode_mask(polygon, 32, 30)
    place = script.Change((script.Cut(6, 5, 20, 18),), flip=False).affine(32, 30)
    np.testing.assert_array_equal(script.change_mask(polygon, 32, 30, place), whole[6:26, 5:23])
    lengths = coco_from_masks.run_lengths(whole.astype(bool))
    np.testing.assert_array_equal(script.change_mask(lengths, 32, 30, place), whole[6:26, 5:23])


def test_run_lengths_of_a_third_of_the_size_are_the_middle_pixels():
    mask = torch.rand(30, 36, generator=seeded(0)).numpy() > 0.5
    place = script.Change((script.Resize(10, 12),), flip=True).affine(30, 36)
    found = script.change_mask(coco_from_masks.run_lengths(mask), 30, 36, place)
    np.testing.assert_array_equal(found, mask[1::3, 1::3][:, ::-1])


@pytest.mark.parametrize("augmentation", ["multi_scale", "jitter"])
def test_a_batch_follows_from_seed_and_position_and_holds_what_the_images_hold(opened, augmentation):
    cfg, images = opened(f"detection.augmentation={augmentation}", "detection.jitter_range=[0.5,2.0]")
    maker = script.ChangedImages(cfg, 2.0)

    def batch(*keys: int) -> Any:
        return maker.batch([maker.make(images[i], key) for i, key in enumerate(keys)], [], [0, 1, 2], [])

    first, again, other = batch(5, 6, 7), batch(5, 6, 7), batch(8, 9, 10)
    for a, b in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)
    labels, (height, width) = first.labels, first.images.shape[2:]
    assert labels["masks"].shape == (len(labels["boxes"]), height, width)
    if augmentation == "jitter":
        assert (height, width) == (32, 32)
    for number in range(3):
        h, w = labels["size"][number].tolist()
        assert torch.equal(first.images[number, :, h:], maker.grey.expand(3, height - h, width))
        own = labels["boxes"][labels["image"] == number]
        assert (own[:, 2:] <= torch.tensor([w, h])).all()
    assert set(labels["class"].tolist()) == {0, 1}


def test_objects_that_a_crop_leaves_out_and_crowds_are_not_learned(opened, tmp_path):
    def crowd(known: dict[str, Any]) -> None:
        known["annotations"][1]["iscrowd"] = 1

    cfg, images = opened(f"data.dataset={write_coco(tmp_path / 'crowd', crowd)}")
    maker = script.ChangedImages(cfg, 2.0)
    assert {len(maker.make(images[0], key).boxes) for key in range(8)} <= {0, 1}
    kept = {len(maker.make(images[1], key).boxes) for key in range(30)}
    assert kept >= {1, 2}, "no crop left an object out"


def test_an_image_of_another_size_than_its_annotations_say_counts_as_unreadable(opened):
    cfg, images = opened()
    sample = images[0]
    turned = Sample("a.png", lambda: Image.new("RGB", (SIZE, SIZE + 8)), sample.read_target)
    with pytest.raises(BadImageError, match=r"has 40x48 pixels, turned by .*, and its annotations are of 48x40"):
        script.ChangedImages(cfg, 2.0).make(turned, 0)


# --- The head --------------------------------------------------------------------------------------------------------


def test_anchors_are_those_of_torchvision_but_for_its_roundings():
    maps = [torch.zeros(1, 1, 8, 6), torch.zeros(1, 1, 4, 3)]
    images = ImageList(torch.zeros(1, 3, 64, 48), [(64, 48)])
    (found,) = Anchors([8.0, 16.0])(images, maps)
    (expected,) = AnchorGenerator(((64,), (128,)), ((0.5, 1.0, 2.0),) * 2)(images, maps)
    torch.testing.assert_close(found, expected, atol=0.51, rtol=0)
    assert torch.equal(found[1::3], expected[1::3]), "squares have whole numbers of pixels"
    (fine,) = Anchors([3.5])(images, [torch.zeros(1, 1, 2, 2)])
    assert fine[4].tolist() == pytest.approx([3.5 - 14, -14, 3.5 + 14, 14])


def test_pooling_reads_the_places_of_a_box_from_the_map_that_suits_it():
    strides = [4.0, 8.0, 16.0, 32.0]
    # Each map says where it is: the middle of each place in x, and which map it is.
    maps = []
    for number, stride in enumerate(strides):
        n = int(1024 / stride)
        x = ((torch.arange(n) + 0.5) * stride).expand(n, n)
        maps.append(torch.stack([x, torch.full((n, n), float(number))])[None])
    boxes = torch.tensor([[80.0, 90.0, 680.0, 790.0], [100.0, 300.0, 210.0, 410.0], [64.0, 64.0, 304.0, 304.0]])
    pooled = Pool(7, strides, patch_size=16)(maps, [boxes])
    assert pooled[:, 1, 3, 3].tolist() == [3.0, 0.0, 2.0]  # from 448, below 112, from 224 pixels
    for box, found in zip(boxes.tolist(), pooled[:, 0], strict=True):
        expected = box[0] + (torch.arange(7) + 0.5) * (box[2] - box[0]) / 7
        torch.testing.assert_close(found, expected.expand(7, 7), atol=1e-2, rtol=0)


def test_masks_come_back_to_where_they_were():
    mask = torch.zeros(1, 60, 80, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    mask[0] = ((x - 40.0) / 22) ** 2 + ((y - 31.0) / 17) ** 2 < 1
    boxes = script.boxes_around(mask)
    target = mask_targets(mask, boxes, torch.tensor([0]), 2 * MASK_POOL)
    back = paste_masks(target, boxes, 60, 80)
    overlap = (back & mask.bool()).sum() / (back | mask.bool()).sum()
    assert overlap > 0.95, f"overlap {overlap:.3f}"


def test_masks_of_as_many_pixels_as_are_predicted_are_kept_exactly():
    mask = (torch.rand(1, 40, 50, generator=seeded(0)) > 0.5).byte()
    box = torch.tensor([[11.0, 5.0, 39.0, 33.0]])
    target = mask_targets(mask, box, torch.tensor([0]), 28)
    assert torch.equal(target[0], mask[0, 5:33, 11:39].float())
    back = paste_masks(target, box, 40, 50)
    assert torch.equal(back[0, 5:33, 11:39], mask[0, 5:33, 11:39].bool())
    assert back.sum() == target.sum()


def test_masks_at_the_border_and_beyond_it_are_cut_off():
    whole = torch.ones(2, 28, 28)
    found = paste_masks(whole, torch.tensor([[-5.0, -5.0, 10.0, 8.0], [50.0, 3.0, 60.0, 9.0]]), 20, 30)
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[:8, :10] = True
    assert torch.equal(found[0], expected)
    assert not found[1].any()


def tiny_head(**changes: Any) -> MaskRCNN:
    options: dict[str, Any] = {
        "channels": 8, "norm": NORMS["layer"], "top_down": True, "proposal_convs": 1, "box_convs": 1, "box_dim": 16,
        "mask_convs": 1, "norm_masks": False, "num_proposals": 20, "num_samples": 16, "box_loss": "giou",
        "box_loss_weight": 10.0,
    }  # fmt: skip
    return MaskRCNN(12, 8, 3, **{**options, **changes})


def test_the_loss_of_boxes_is_the_overlap_of_decoded_ones_over_all_samples(monkeypatch):
    heads = tiny_head().heads
    proposals = [torch.tensor([[10.0, 10.0, 30.0, 30.0], [12.0, 8.0, 33.0, 29.0], [40.0, 40.0, 60.0, 60.0]])]
    true = torch.tensor([[11.0, 9.0, 31.0, 32.0]])
    labels = [torch.tensor([2, 2, 0])]
    targets = heads.box_coder.encode([true.expand(3, 4)], proposals)
    matched = [torch.zeros(3, dtype=torch.int64)]

    def select(_: Any, known: Any) -> Any:
        assert known[0]["labels"].tolist() == [2], "0 is for no object"
        return proposals, matched, labels, targets

    monkeypatch.setattr(heads, "select_training_samples", select)
    regressed = 0.3 * torch.randn(3, 16, generator=seeded(1))
    monkeypatch.setattr(heads, "box_outputs", lambda *_: (torch.zeros(3, 4), regressed))
    maps = [torch.randn(1, 8, n, n) for n in (32, 16, 8, 4)]
    known = [Targets(true, torch.tensor([1]), torch.ones(1, 64, 64).byte())]
    losses = heads.losses(maps, proposals, known)
    decoded = heads.box_coder.decode(regressed, proposals)[:2, 2]
    expected = 10 * (1 - generalized_box_iou(decoded, true)).sum() / 3
    torch.testing.assert_close(losses["box"], expected)
    torch.testing.assert_close(losses["class"], torch.tensor(math.log(4)))
    heads.box_loss, heads.box_loss_weight = "l1", 1.0
    off = (regressed.view(3, 4, 4)[:2, 2] - targets[0][:2]).abs().sum() / 3
    torch.testing.assert_close(heads.losses(maps, proposals, known)["box"], off)


def normed_on_this_rank(x: torch.Tensor, weights: torch.Tensor, share: list[int]) -> list[torch.Tensor]:
    start = sum(share[: dist.get_rank()])
    own = x[start : start + share[dist.get_rank()]].requires_grad_()
    norm = NORMS["batch"](3)
    out = norm(own)
    (out * weights[start : start + len(own)]).sum().backward()
    assert own.grad is not None
    return [out.detach(), own.grad, norm.running_mean, norm.running_var]


def test_batch_norm_counts_the_boxes_of_all_ranks_however_many_each_has():
    x, weights = torch.randn(9, 3, 4, 4, generator=seeded(0)), torch.randn(9, 3, 4, 4, generator=seeded(1))
    ranks = run_on_ranks(normed_on_this_rank, 2, x, weights, [2, 7])
    (alone,) = run_on_ranks(normed_on_this_rank, 1, x, weights, [9])
    for number in (0, 1):
        together = torch.cat([own[number] for own in ranks])
        torch.testing.assert_close(together, alone[number], atol=1e-5, rtol=1e-5)
    for own in ranks:
        torch.testing.assert_close(own[2:], alone[2:])


@pytest.mark.parametrize("changes", [{}, {"top_down": False, "norm_masks": True}, {"mask_convs": None}], ids=str)
@pytest.mark.parametrize("norm", list(NORMS))
def test_heads_give_losses_and_detections_also_of_odd_sizes(norm, changes):
    head = tiny_head(norm=NORMS[norm], **changes)
    maps = [torch.randn(2, 12, 5, 7, generator=seeded(0))]
    target = Targets(torch.tensor([[4.0, 4.0, 30.0, 28.0]]), torch.tensor([2]), torch.ones(1, 40, 56).byte())
    losses = head(maps, [(40, 56), (33, 50)], [target, target])
    assert all(loss.isfinite() for loss in losses.values())
    assert ("mask" in losses) == (changes.get("mask_convs", 1) is not None)
    with torch.no_grad():
        for found, (height, width) in zip(head.eval()(maps, [(40, 56), (33, 50)]), [(40, 56), (33, 50)], strict=True):
            assert (found.boxes[:, 2] <= width).all()
            assert (found.boxes[:, 3] <= height).all()
            assert (found.scores[:-1] >= found.scores[1:]).all()
            assert found.classes.max() <= 2
            assert (found.masks is None) == (changes.get("mask_convs", 1) is None)


def test_what_is_found_is_told_in_pixels_of_the_image_itself():
    found = Detections(torch.tensor([[8.0, 6.0, 80.0, 61.0]]), torch.tensor([0]), torch.tensor([0.9]), None)
    whole = script.in_image(found, (60, 80), height=30, width=50)
    assert whole.boxes[0].tolist() == pytest.approx([5.0, 3.0, 50.0, 30.0])


# --- Average precision -----------------------------------------------------------------------------------------------


def made_up(data: coco.CocoImages, noise: float, seed: int = 0) -> list[script.Found]:
    """Detections near the truth, with wrong ones among them."""
    rng, found = np.random.default_rng(seed), []
    for index in range(len(data)):
        known = data.objects(index)
        boxes, classes, scores, masks = [], [], [], []
        for box, label, segmentation in zip(
            known.boxes.numpy(), known.classes.tolist(), known.segmentations, strict=True
        ):
            mask = coco.decode_mask(segmentation, known.height, known.width)
            boxes.append(box + noise * rng.normal(0, 1, 4))
            masks.append(np.roll(mask, (round(noise * rng.normal()), round(noise * rng.normal())), (0, 1)))
            classes.append(label if rng.random() > 0.1 * noise else 1 - label)
            scores.append(rng.random())
        if noise:
            boxes.append(np.array([1.0, 1.0, 9.0, 12.0]))
            classes.append(0)
            scores.append(rng.random())
            masks.append(np.zeros_like(masks[0]))
            masks[-1][1:12, 1:9] = 1
        lengths = [rle.encode(np.asfortranarray(mask)) for mask in masks]
        found.append(script.Found(np.array(boxes), np.array(classes), np.array(scores), lengths))
    return found


def crowded(known: dict[str, Any]) -> None:
    """A crowd, and sizes of objects from small to large."""
    known["annotations"][3]["iscrowd"] = 1
    for number, entry in enumerate(known["annotations"]):
        entry["area"] = [500, 5000, 50_000][number % 3]


@pytest.fixture
def scored_data(tmp_path) -> coco.CocoImages:
    return coco.open_coco(str(write_coco(tmp_path / "scored", crowded)), "x", masks=True)


def zero(known: dict[str, Any]) -> None:
    """An id that stands for nothing in pycocotools, which then counts the object as missed."""
    known["annotations"][0]["id"] = 0


def test_perfect_detections_have_a_precision_of_one_whatever_the_ids(scored_data, tmp_path):
    odd = coco.open_coco(str(write_coco(tmp_path / "odd", zero)), "x", masks=True)
    assert script.score(odd, made_up(odd, 0.0), ["boxes"])["boxes"]["AP"] == pytest.approx(1.0)
    for scores in script.score(scored_data, made_up(scored_data, 0.0), ["boxes", "masks"]).values():
        assert scores.keys() == set(coco.SCORES)
        assert all(value == pytest.approx(1.0) for value in scores.values())


def test_no_detections_have_a_precision_of_zero(scored_data):
    nothing = [script.Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), [])] * len(scored_data)
    for scores in script.score(scored_data, nothing, ["boxes", "masks"]).values():
        assert set(scores.values()) == {0.0}


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_average_precision_is_that_of_pycocotools(scored_data, noise, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = made_up(scored_data, noise)
    scores = script.score(scored_data, found, ["boxes", "masks"])
    script.write_detections(tmp_path / "found.json", scored_data, found)
    truth = COCO(str(scored_data.annotations.path))
    values = []
    for name, kind in script.KINDS.items():
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected = dict(zip(coco.SCORES, evaluation.stats[:6].tolist(), strict=True))
        assert scores[name] == pytest.approx(expected, abs=1e-9), name
        values += list(expected.values())
    assert len(set(values)) > 4, "the made-up detections tell nothing"
    capsys.readouterr()


def test_classes_of_test_data_are_matched_by_name(scored_data):
    assert script.test_classes(scored_data, ["yellow box", "blue box", "red box"]) == [1, -1, 0]
    with pytest.raises(UserError, match="yellow box is not a class of"):
        script.test_classes(scored_data, ["red box", "blue box"])


def evaluate_on_this_rank(arguments: list[str]) -> dict[str, Any]:
    evaluation = eval_finetuned.EVALUATION
    cfg = load_config(evaluation.schema, None, arguments)
    return evaluation.run(cfg, torch.device("cpu")).values["finetuned"]


def test_ranks_share_the_test_images_and_find_what_one_finds(finished, boxes, tmp_path):
    def arguments(name: str) -> list[str]:
        return [
            f"model_loader_kwargs.pretrained_weights={finished}", f"test_dataset_name={boxes}", "num_workers=0",
            f"output_dir={tmp_path / name}", "num_pictures=0",
        ]  # fmt: skip

    (alone,) = run_on_ranks(evaluate_on_this_rank, 1, arguments("alone"))
    for shared in run_on_ranks(evaluate_on_this_rank, 2, arguments("shared")):
        assert shared == alone
    names = [tmp_path / name / "artifacts" / "detections.json" for name in ("alone", "shared")]
    assert names[0].read_text() == names[1].read_text()
    entries = json.loads(names[0].read_text())
    assert {entry["image_id"] for entry in entries} <= set(range(100, 106))
    assert {entry["category_id"] for entry in entries} <= set(CATEGORIES)


# --- What is read ----------------------------------------------------------------------------------------------------


def test_categories_are_numbered_without_gaps_in_the_order_of_their_ids(boxes):
    data = coco.open_coco(str(boxes), "x", masks=True)
    assert data.class_names == ["red box", "yellow box"]
    assert data.annotations.category_ids == [3, 7]
    known = data.objects(2)
    expected, _ = objects_content()
    own = [entry for entry in expected["annotations"] if entry["image_id"] == 102]
    assert known.classes.tolist() == [1, 0]
    assert known.boxes[:, 2:].sub(known.boxes[:, :2]).tolist() == [entry["bbox"][2:] for entry in own]
    assert known.segmentations == [entry["segmentation"] for entry in own]
    assert data.image_id(2) == 102
    assert data[2].image().size == (known.width, known.height)


def test_annotations_belong_to_their_images_in_whatever_order_they_are(boxes, tmp_path):
    def mix(known: dict[str, Any]) -> None:
        known["annotations"] = known["annotations"][::2] + known["annotations"][1::2]
        known["images"].reverse()

    expected = coco.open_coco(str(boxes), "x", masks=True)
    mixed = coco.open_coco(str(write_coco(tmp_path / "mixed", mix)), "x", masks=True)
    for index in range(len(expected)):
        a, b = expected.objects(index), mixed.objects(len(expected) - 1 - index)
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.classes, b.classes)
        assert a.segmentations == b.segmentations


def test_boxes_outside_of_their_images_and_without_area_are_counted_and_told(tmp_path, caplog):
    def wrong(known: dict[str, Any]) -> None:
        boxes = [[30, 10, 40, 20], [60, 5, 10, 10], [5, 5, 0, 10], [5, 5, 10, -3], [-0.4, 0, 20, 20]]
        for entry, box in zip(known["annotations"][: len(boxes)], boxes, strict=True):
            entry["bbox"] = box

    data = coco.open_coco(str(write_coco(tmp_path / "wrong", wrong)), "x", masks=True)
    with caplog.at_level(logging.WARNING):
        data.log_faults()
    assert data.objects(0).boxes.tolist() == [[30, 10, 48, 30]]
    assert len(data.objects(1).boxes) == 0
    assert data.objects(2).boxes[0].tolist() == [-0.4, 0, 19.6, 20], "a rounding is no fault"
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "1 annotation(s)" in told and "reaches beyond its image and is clipped" in told
    assert "annotation id=1 of part/0.png: bbox=[30, 10, 40, 20] in an image of 48x40" in told
    assert "outside of their image" in told
    assert "2 annotation(s)" in told and "of no area" in told
    assert len(caplog.records) == 3


def drop_image(known: dict[str, Any]) -> None:
    del known["images"][2]


def change_entry(kind: str, place: int, **values: Any) -> Any:
    def change(known: dict[str, Any]) -> None:
        known[kind][place].update(values)

    return change


def without(kind: str, place: int, key: str) -> Any:
    def change(known: dict[str, Any]) -> None:
        del known[kind][place][key]

    return change


BAD_FILES = {
    "no image": (drop_image, ["annotation id=21", "image_id=102", "add the image"]),
    "no category": (change_entry("annotations", 1, category_id=9), ["annotation id=2", "category_id=9"]),
    "no file": (change_entry("images", 1, file_name="part/9.png"), ["1 of 6 images", "'part/9.png'", "id=101"]),
    "box of three": (change_entry("annotations", 0, bbox=[1, 2, 3]), ["id=1", "bbox=[1, 2, 3]", "left, top"]),
    "box of words": (change_entry("annotations", 0, bbox="1 2 3 4"), ["id=1", "bbox='1 2 3 4'"]),
    "box of nothing": (change_entry("annotations", 0, bbox=[1, 2, math.nan, 4]), ["id=1", "nan"]),
    "no box": (without("annotations", 0, "bbox"), ["annotation id=1 has no bbox"]),
    "no size": (without("images", 0, "width"), ["image id=100 has no width"]),
    "twice": (change_entry("images", 1, id=100), ["two entries of images", "id=100"]),
    "same name": (change_entry("categories", 0, name="red box"), ["two categories", "name='red box'"]),
    "run lengths": (
        change_entry("annotations", 0, segmentation={"size": [48, 40], "counts": [1920]}),
        ["annotation id=1", "size=[48, 40]", "[40, 48]"],
    ),
    "their sum": (
        change_entry("annotations", 0, segmentation={"size": [40, 48], "counts": [9]}),
        ["annotation id=1", "add up to 9", "1920"],
    ),
    "odd polygon": (change_entry("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ["polygon", "x1, y1"]),
    "no list": (lambda known: {**known, "images": {}}, ["images={}", "COCO's format"]),
    "no images": (lambda known: {**known, "images": []}, ["images is empty"]),
    "no classes": (lambda known: {**known, "categories": []}, ["categories is empty"]),
    "no objects": (lambda known: {**known, "annotations": []}, ["no image", "has an object to learn"]),
    "a list": (lambda known: [known], ["a list", "COCO's format"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_wrong_in_a_file_is_named_with_its_place_and_leaves_no_traceback(arguments, tmp_path, capsys, case):
    change, named = BAD_FILES[case]
    folder = write_coco(tmp_path / "wrong", change)
    assert script.main(arguments("run", f"data.dataset={folder}")) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for words in ["data.dataset", "annotations.json", *named]:
        assert words in error


BAD_INPUT = [
    (["data.dataset=nowhere"], ["data.dataset=nowhere", "custom://COCO"]),
    (["data.dataset=hf://x?split='train'"], ["custom://COCO"]),
    (["data.dataset=custom://COCO?images='nowhere'&annotations='x.json'"], ["no folder nowhere"]),
    (["data.dataset=custom://COCO?images='.'&annotations='x.json'"], ["x.json cannot be read"]),
    (["data.dataset=custom://COCO?images='.'"], ["annotations="]),
    (["data.dataset=custom://COCO?root='.'"], ["unknown argument root"]),
    (["detection.blocks=[0,1]"], ["detection.blocks=[0, 1]", "one block, or four"]),
    (["detection.blocks=[7]"], ["[7]", "0 to 1"]),
    (["detection.norm=group"], ["detection.norm='group'", "layer, batch"]),
    (["detection.box_loss=l2"], ["detection.box_loss='l2'", "giou"]),
    (["detection.crop_range=[30,20]"], ["detection.crop_range", "ascending"]),
    (["detection.long_side=30"], ["detection.long_side=30", "32"]),
    (["detection.test_long_side=30"], ["detection.test_long_side=30"]),
    (["backbone.relative_position_bias=true"], ["backbone.relative_position_bias=True", "sizes"]),
    (["data.images_size=30"], ["data.images_size=30", "patches of 4 pixels"]),
]


@pytest.mark.parametrize(("wrong", "named"), BAD_INPUT, ids=lambda value: value[0][:50])
def test_bad_input_names_the_key_and_leaves_no_traceback(arguments, capsys, wrong, named):
    assert script.main(arguments("run", *wrong)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for words in named:
        assert words in error


def test_a_damaged_image_is_replaced_and_counted_in_training_and_refused_in_scores(
    arguments, finished, tmp_path, capsys
):
    folder = write_coco(tmp_path / "damaged")
    (folder / "part" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(folder / "part" / "1.png")
    own = [f"data.dataset={folder}", "data.max_bad_fraction=0.9", "optim.total_iters=3"]
    assert script.main(arguments("run", *own)) == 0
    lines = (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()
    assert sorted(Path(json.loads(line)["file"]).name for line in lines) == ["0.png", "1.png"]
    assert scored(finished, folder, tmp_path / "scores") == 2
    assert "0.png" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.import_module", functools.partial(_missing))
    with pytest.raises(UserError, match=r"faster_coco_eval.*pip install -e '\.\[finetuning\]'"):
        coco.optional("faster_coco_eval")


def _missing(name: str) -> None:
    raise ImportError(f"No module named {name}")


# --- The demo's data -------------------------------------------------------------------------------------------------


def test_parts_of_masks_become_objects_with_the_boxes_around_them(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[2:8, 3:10], mask[9:15, 3:10], mask[5:19, 15:29] = 1, 1, 2
    mask[8, 3] = 1  # joins the first two at a side
    mask[0, 29] = 2  # too small
    (tmp_path / "masks").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "classes.txt").write_text("lawn\nred\nblue\n")
    done = run_cli("demo_data/coco_from_masks.py", tmp_path)
    assert done.returncode == 0, done.stderr
    data = coco.open_coco(str(tmp_path), "x", masks=True)
    assert data.class_names == ["red", "blue"]
    known = data.objects(0)
    assert known.boxes.tolist() == [[3, 2, 10, 15], [15, 5, 29, 19]]
    found = sum(coco.decode_mask(s, 20, 30) * (c + 1) for s, c in zip(known.segmentations, [0, 1], strict=True))
    mask[0, 29] = 0
    np.testing.assert_array_equal(found, mask)


def test_folders_without_classes_or_images_are_named(tmp_path):
    done = run_forked("demo_data/coco_from_masks.py", tmp_path / "nothing")
    assert done.returncode == 2
    assert "has no classes.txt" in done.stderr
    assert "Traceback" not in done.stderr
