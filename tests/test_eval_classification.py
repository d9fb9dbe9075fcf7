"""Classification of frozen features: goldens, oracles, ranks, resuming, the command, and mistakes."""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_golden_json, run_cli, seeded
from PIL import Image
from ranks import run_on_ranks
from samples import COLOURS, Listed, folder_url, save_colour_folders
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import eval_classification
from config import load_config
from eval_classification import (
    EVALUATION,
    METHODS,
    CentreCropped,
    ClassificationConfig,
    ClippedCrop,
    attentive_probe_recipe,
    classifiers_recipe,
    linear_probe_recipe,
    represent,
    start_training,
    train_batches,
    vissl_recipe,
)
from evaluation import FrozenModel
from labels import open_labelled, open_splits
from model import EncoderDecoder
from readouts import AttentiveProbes, Training, train_step
from report import score_rows
from utils import UserError

TINY_MODEL = """
import torch
from torch import nn
class Tiny(nn.Module):
    patch_size = 4
    def __init__(self, registers, dim=8):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.registers = registers
    def forward(self, images):
        map = self.patches(images).movedim(1, -1)
        registers = map.flatten(1, 2)[:, : self.registers] if self.registers else None
        return map.mean((1, 2)), registers, map
    def get_intermediate_layers(self, images, n, reshape, norm):
        assert reshape and norm
        map = self.patches(images)
        return (map.square(), map.tanh(), map)[-n:]
def __model_loader__(registers=2):
    return Tiny(registers)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of images whose colour says the class, with noise."""
    root = tmp_path_factory.mktemp("classes")
    save_colour_folders(root, train=20, test=5)
    (root / "tiny.py").write_text(TINY_MODEL)
    return root


def arguments(images, output_dir, *overrides):
    return [
        f"train_dataset_name={folder_url(images / 'train')}",
        f"test_dataset_names={folder_url(images / 'test')}",
        f"output_dir={output_dir}",
        f"model_path={images / 'tiny.py'}",
        "device=cpu",
        "num_workers=0",
        "resolution=16",
        "learning_rates=[1e-3,1e-2,1e-1]",
        "weight_decays=[0,0.05]",
        "representations=[cls,concat_objects,patch]",
        "methods=[classifiers,knn,logreg,few_label]",
        "batch_size_per_gpu=8",
        "n_iters=6",
        "warmup_iters=2",
        "save_checkpoint_period=2",
        "knn_k=[1,5,20]",
        "c_values=[0.01,1.0]",
        "labels_per_class=3",
        "val_proportion=0.3",
        *overrides,
    ]


def config(images, output_dir="out", *overrides):
    return load_config(ClassificationConfig, None, arguments(images, output_dir, *overrides))


def results_of(output_dir):
    return json.loads((Path(output_dir) / "results_classification.json").read_text())


def error_of(capsys, *args):
    code = eval_classification.main(list(args))
    assert code == 2, "it was accepted"
    return capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize(("resize", "shorter"), [("null", 37), ("50", 50)])
@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear"])
def test_images_are_resized_and_their_centre_is_cut_out(images, resize, shorter, filter_name):
    cfg = config(images, "out", "resolution=32", f"resize={resize}", f"resize_interpolation={filter_name}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    crop, labels = CentreCropped(cfg, 3)(image, [2, 1])
    width = shorter * 90 // 60
    resized = image.resize((width, shorter), Image.Resampling[filter_name.upper()])
    left, top = round((width - 32) / 2), round((shorter - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(crop.movedim(0, -1).numpy(), expected)
    assert labels.tolist() == [2, 1, -1]


@pytest.mark.parametrize(
    ("height", "width", "more", "resized"),
    [
        (60, 90, [], (24, 37)),  # it covers 18 x 37
        (30, 90, [], (18, 54)),
        (60, 90, ["resize=20"], (26, 40)),
        (20, 40, ["resize=16"], (16, 32)),  # nothing is cut off
    ],
)
def test_of_an_image_that_is_no_square_the_centre_is_cut_out(images, height, width, more, resized):
    cfg = config(images, "out", "resolution=[16,32]", *more)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop, _ = CentreCropped(cfg, 1)(image, 0)
    left, top = round((resized[1] - 32) / 2), round((resized[0] - 16) / 2)
    whole = image.resize(resized[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(crop.movedim(0, -1).numpy(), np.asarray(whole.crop((left, top, left + 32, top + 16))))


def test_a_model_is_evaluated_on_images_that_are_no_squares(images, tmp_path):
    """A colour is a class, and is seen in crops of any shape; [16, 16] is what 16 is."""
    methods = "methods=[classifiers,knn,logreg,few_label,linear_probe,attentive_probe]"
    short = ["probe_epochs=2", "probe_warmup_epochs=1", methods]
    for name, more in {"wide": ["resolution=[8,16]"], "pair": ["resolution=[16,16]"], "one": []}.items():
        EVALUATION.run(config(images, tmp_path / name, *short, *more), torch.device("cpu"))
    wide, pair, one = (results_of(tmp_path / name) for name in ("wide", "pair", "one"))
    assert wide["results"]["knn_avg_patch"]["settings"]["resolution"] == [8, 16]
    assert wide["results"]["logreg_avg_patch"]["top1"] > 0.6
    assert wide["results"].keys() == one["results"].keys()
    assert pair["results"] == one["results"]


def test_knn_equals_a_vote_over_sorted_distances_in_float64(images, tmp_path):
    cfg = config(images, tmp_path, "methods=[knn]", "resize=16")
    torch.manual_seed(cfg.seed)
    model = frozen_tiny(images)
    rows, labels = {}, {}
    for split in ("train", "test"):
        data = open_labelled(folder_url(images / split), split)
        crops = [CentreCropped(cfg, 1)(data.dataset[i].image(), 0)[0] for i in range(len(data.labels))]
        rows[split] = F.normalize(model(torch.stack(crops)).feature_map.double().mean((1, 2)), dim=1)
        labels[split] = F.one_hot(data.labels.squeeze(1))
    similarity, index = (rows["test"] @ rows["train"].T).sort(dim=1, descending=True)
    weights = (similarity[:, :20] / 0.07).exp().unsqueeze(2)
    predicted = (weights * labels["train"][index[:, :20]]).sum(1).argmax(1)
    EVALUATION.run(cfg, torch.device("cpu"))
    result = results_of(tmp_path)["results"]["knn_avg_patch"]
    assert result["top1"] == result["top1_k20"] == (predicted == labels["test"].argmax(1)).double().mean().item()
    assert 0.4 < result["top1"] < 1, "too easy or too hard to tell right from wrong"


# -------------------------------------------------------------------------------------------------- the cost


class CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step_on_images(training, model, images, labels):
    features = model(images)
    train_step(training, {name: represent(features, name) for name in training.classifiers}, labels, 1.0)


def cost_of_a_step(images, *overrides):
    cfg = config(images, "out", "representations=[cls,avg_patch,patch]", *overrides)
    torch.manual_seed(0)
    module = EncoderDecoder(
        patch_size=8,
        transformers_kwargs={"embed_dim": 192, "block_kwargs": {"attn_kwargs": {"num_heads": 3}}},
        encoder_kwargs={"depth": 4},
        decoder_kwargs={"depth": 1},
    )
    model = FrozenModel(module, cfg, torch.device("cpu"), "model.py")
    shapes = {name: torch.Size([192]) for name in ("cls", "avg_patch")} | {"patch": torch.Size([64, 192])}
    training = start_training(cfg, classifiers_recipe(cfg, model, shapes), 100, torch.device("cpu"))
    batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.arange(8).unsqueeze(1)
    with CountOperators() as operators:
        step_on_images(training, model, *batch)
    with FlopCounterMode(display=False) as counter:
        step_on_images(training, model, *batch)
    return counter.get_total_flops(), operators.calls


def test_thirty_classifiers_per_representation_cost_less_than_three_times_one(images):
    grid = f"learning_rates=[{','.join(str(0.001 * i) for i in range(1, 11))}]"
    thirty, their_operators = cost_of_a_step(images, grid, "weight_decays=[0.1,0.2,0.3]")
    one, _ = cost_of_a_step(images, "learning_rates=[0.001]", "weight_decays=[0.1]")
    _, operators_of_two = cost_of_a_step(images, "learning_rates=[0.001,0.01]", "weight_decays=[0.1]")
    assert thirty < 3 * one, f"{thirty / one:.2f} times as many operations"
    assert their_operators == operators_of_two, "the number of kernels grows with the number of classifiers"


# -------------------------------------------------------------------------------------- training classifiers


def test_a_classifier_that_diverges_harms_no_other(images):
    batch = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=seeded(0)), torch.arange(8)[:, None] % 3
    model = frozen_tiny(images)
    weights = []
    for other in ("2e-2", "1e30"):
        cfg = config(images, "out", f"learning_rates=[1e-2,{other}]", "weight_decays=[0.1]")
        training = start_training(cfg, classifiers_recipe(cfg, model, SHAPES), 3, torch.device("cpu"))
        for _ in range(4):
            step_on_images(training, model, *batch)
        weights.append(training.classifiers.state_dict())
    for name in weights[0]:
        assert torch.equal(weights[0][name][0], weights[1][name][0]), name
    assert not weights[1]["patch.weight"][1].isfinite().all(), "it was meant to diverge"


SHAPES = {"cls": torch.Size([8]), "concat_objects": torch.Size([16]), "patch": torch.Size([16, 8])}


def frozen_tiny(images, registers=2, seed=0):
    from evaluation import load_model_file

    if seed is not None:
        torch.manual_seed(seed)
    module = load_model_file(str(images / "tiny.py"), {"registers": registers})
    return FrozenModel(module, config(images), torch.device("cpu"), "tiny.py")


def test_augmentation_follows_from_seed_and_position(images):
    cfg = config(images)
    data = open_labelled(cfg.train_dataset_name, "train_dataset_name")
    torch.manual_seed(1)
    first = list(itertools.islice(train_batches(cfg, data, data.labelled, 0, pin=False), 10))
    torch.manual_seed(2)
    again = list(itertools.islice(train_batches(cfg, data, data.labelled, 7, pin=False), 3))
    for expected, actual in zip(first[7:], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    labels = torch.cat([labels for _, labels in first])[:60]
    assert Counter(labels.flatten().tolist()) == {0: 20, 1: 20, 2: 20}, "60 images are one epoch"
    other = next(train_batches(config(images, "out", "seed=1"), data, data.labelled, 0, pin=False))
    assert not torch.equal(other[0], first[0][0])


class Killed(Exception):  # noqa: N818
    pass


SHORT_VISSL = ["methods=[vissl]", "vissl_epochs=2", "vissl_decay_epochs=[1]", "vissl_blocks=2"]
SHORT_PROBES = ["probe_epochs=2", "probe_warmup_epochs=1"]
TRAINED = {
    "classifiers": ["methods=[classifiers]", "n_iters=10"],
    "vissl": [*SHORT_VISSL, "vissl_weight_decays=[5e-4,0]"],
    "linear_probe": ["methods=[linear_probe]", *SHORT_PROBES],
    "attentive_probe": ["methods=[attentive_probe]", *SHORT_PROBES, "attentive_probe_learning_rates=[0.1,3.0]"],
}


@pytest.mark.parametrize("killed_after", [1, 5, 9])
@pytest.mark.parametrize("method", TRAINED)
def test_interrupted_training_equals_uninterrupted_bit_for_bit(images, tmp_path, monkeypatch, method, killed_after):
    options = TRAINED[method]
    EVALUATION.run(config(images, tmp_path / "straight", *options), torch.device("cpu"))
    broken = config(images, tmp_path / "broken", *options)

    def step_or_die(training: Training, *args):
        if training.step == killed_after:
            raise Killed
        return train_step(training, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(eval_classification, "train_step", step_or_die)
        EVALUATION.run(broken, torch.device("cpu"))
    steps = []

    def counted_step(training: Training, *args):
        steps.append(training.step)
        return train_step(training, *args)

    monkeypatch.setattr(eval_classification, "train_step", counted_step)
    EVALUATION.run(broken, torch.device("cpu"))
    assert steps == list(range(killed_after // 2 * 2, 10)), "it did not continue at its checkpoint"
    assert results_of(tmp_path / "broken")["results"] == results_of(tmp_path / "straight")["results"]
    a, b = (torch.load(tmp_path / run / f"{method}.pth", weights_only=True) for run in ("broken", "straight"))
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    assert not (tmp_path / "broken" / f"{method}_checkpoint.pth").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_linear_probes_of_vissl_equal_layers_of_torch_that_are_trained_one_by_one(images, tmp_path, optimizer):
    options = [*SHORT_VISSL, f"vissl_optimizer={optimizer}", "vissl_learning_rates=[5.0]"]
    cfg = config(images, tmp_path, *options)
    torch.manual_seed(cfg.seed)  # as the run does: the weights of the model are random
    model = frozen_tiny(images, seed=None)
    EVALUATION.run(cfg, torch.device("cpu"))
    trained = torch.load(tmp_path / "vissl.pth", weights_only=True)
    data = open_labelled(cfg.train_dataset_name, "train_dataset_name")
    splits = open_splits(
        cfg.train_dataset_name, None, cfg.test_dataset_names, val_proportion=0.3, num_classes=None, all_classes=True
    )
    num_steps = 10  # two passes over 42 images in steps of 8
    start = start_training(cfg, vissl_recipe(cfg, model, 42), 3, model.device).classifiers.state_dict()
    for name, width in (("last", 8), ("last_bn", 8), ("concat", 16), ("concat_bn", 16)):
        norm, linear = nn.BatchNorm1d(width).double(), nn.Linear(width, 3).double()
        linear.load_state_dict({key: start[f"{name}.{key}"][0].double() for key in ("weight", "bias")})
        layers = nn.Sequential(norm, linear) if name.endswith("_bn") else linear
        velocity = {p: torch.zeros_like(p) for p in layers.parameters()}
        batches = itertools.islice(train_batches(cfg, data, splits.fit, 0, pin=False), num_steps)
        for step, (crops, labels) in enumerate(batches):
            patches = model(crops).feature_map.double()
            x = torch.cat([patches.tanh().mean((1, 2))] * (width // 16) + [patches.mean((1, 2))], dim=1)
            rate = 5.0 * 8 / 256 * (0.1 if step * 8 / 42 >= 1 else 1.0)
            gradients = torch.autograd.grad(F.cross_entropy(layers(x), labels[:, 0]), list(velocity))
            for (p, v), gradient in zip(velocity.items(), gradients, strict=True):
                with torch.no_grad():
                    if p.ndim == 2 or (optimizer == "sgd" and p is linear.bias):
                        gradient.add_(p, alpha=5e-4)
                    if optimizer == "lars" and p.ndim == 2:
                        gradient.mul_(0.001 * p.norm() / gradient.norm())
                    v.mul_(0.9).add_(gradient)
                    p.sub_(rate * (gradient + 0.9 * v if optimizer == "sgd" else v))
        for key, expected in linear.state_dict().items():
            torch.testing.assert_close(trained[f"{name}.{key}"][0].double(), expected, rtol=1e-3, atol=1e-5)
        if name.endswith("_bn"):
            for key in ("running_mean", "running_var"):
                torch.testing.assert_close(trained[f"{name}.{key}"].double(), norm.state_dict()[key], rtol=1e-4, atol=0)
            torch.testing.assert_close(
                trained[f"{name}.norm_weight"][0].double(), norm.weight.detach(), rtol=1e-4, atol=0
            )
    results = results_of(tmp_path)["results"]
    assert list(results) == ["vissl_last", "vissl_last_bn", "vissl_concat", "vissl_concat_bn"]
    assert results["vissl_concat_bn"]["settings"] == {
        "blocks": 2, "batch_norm": True, "optimizer": optimizer, "epochs": 2, "decay_epochs": [1],
        "learning_rate": 5.0, "weight_decay": 5e-4, "global_batch_size": 8, "steps": 10, "resolution": 16,
    }  # fmt: skip


def schedule_of(images, make_recipe, batch_size, num_steps_per_epoch):
    cfg = config(images, "out", f"batch_size_per_gpu={batch_size}")
    recipe = make_recipe(cfg, frozen_tiny(images), num_steps_per_epoch * batch_size)
    ((learning_rate, weight_decay),) = recipe.grid
    assert weight_decay == 0
    return recipe, lambda step: learning_rate * batch_size / 256 * recipe.lr_scale(step)


def test_learning_rates_of_the_published_probes_equal_their_vectors(images):
    golden = load_golden_json("vectors_cae")
    recipe, lr_at = schedule_of(images, linear_probe_recipe, 16384, 160)
    assert recipe.num_steps == 90 * 160
    for epoch, expected in golden["linear_lr_6.4"].items():
        assert lr_at(round(160 * float(epoch))) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    recipe, lr_at = schedule_of(images, attentive_probe_recipe, 8192, 156)
    expected = golden["attentive_lr_ipe156"]
    assert recipe.num_steps == expected.pop("n")
    for step, value in expected.items():
        assert lr_at(int(step)) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_a_crop_of_the_linear_probe_is_the_first_that_is_drawn_cut_off_at_the_image():
    crop = ClippedCrop(16, (0.08, 1.0))
    image = Image.new("RGB", (200, 90))
    torch.manual_seed(0)
    boxes = [crop.make_params([image]) for _ in range(2000)]
    for box in boxes:
        assert 0 <= box["top"] <= 90 - box["height"] and 0 <= box["left"] <= 200 - box["width"]
    torch.manual_seed(0)
    area, ratio = torch.rand(2, dtype=torch.float64).tolist()
    area, ratio = 200 * 90 * (0.08 + 0.92 * area), (3 / 4) * (16 / 9) ** ratio
    assert boxes[0]["width"] == round((area * ratio) ** 0.5)
    assert boxes[0]["height"] == min(90, round((area / ratio) ** 0.5))
    # An area above 4/3 * 90^2 is higher than the image at every ratio.
    assert sum(box["height"] == 90 for box in boxes) / 2000 > 1 - (4 / 3 * 90**2 / (200 * 90) - 0.08) / 0.92
    assert crop(image).size == (16, 16)


def test_the_test_set_standardises_itself_for_the_published_number_of_the_attentive_probe(images, tmp_path):
    options = ["methods=[attentive_probe]", *SHORT_PROBES, "resize=16", "attentive_probe_learning_rates=[3.0]"]
    cfg = config(images, tmp_path, *options)
    torch.manual_seed(cfg.seed)
    model = frozen_tiny(images, seed=None)
    EVALUATION.run(cfg, torch.device("cpu"))
    written = results_of(tmp_path)
    probe = AttentiveProbes(1, 8, 3)
    state = torch.load(tmp_path / "attentive_probe.pth", weights_only=True)
    probe.load_state_dict({key.removeprefix("cls_patch."): x for key, x in state.items()})
    data = open_labelled(folder_url(images / "test"), "test")
    crops = torch.stack([CentreCropped(cfg, 1)(data.dataset[i].image(), 0)[0] for i in range(len(data.labels))])
    features = model(crops)
    tokens = torch.cat([features.global_repr.unsqueeze(1), features.feature_map.flatten(1, 2)], dim=1)
    accuracy = {}
    for name, training in (("top1", False), ("top1_transductive", True)):
        predicted = probe.train(training)(tokens)[:, 0].argmax(1)
        accuracy[name] = (predicted == data.labels[:, 0]).double().mean().item()
    result = written["results"]["attentive_probe_cls_patch"]
    assert {name: result[name] for name in accuracy} == accuracy
    assert accuracy["top1"] != accuracy["top1_transductive"], "they cannot be told apart"
    assert [score["label"] for score in written["scores"]] == ["top1", "top1_transductive"]
    assert result["settings"] == {
        "representation": "cls_patch", "optimizer": "sgd", "epochs": 2, "warmup_epochs": 1, "learning_rate": 3.0,
        "weight_decay": 0.0, "global_batch_size": 8, "steps": 10, "resolution": 16,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- few labels


def test_low_shot_equals_scikit_learn_on_the_listed_images_with_both_kinds_of_statistics(images, tmp_path):
    listed = [f"{name}/{i}.png" for i in (3, 11, 7) for name in COLOURS]
    (tmp_path / "few.txt").write_text("\n".join(listed) + "\n\n")
    options = ["methods=[low_shot]", f"low_shot_list={tmp_path}/few.txt", "resize=16", "low_shot_penalty=0.5"]
    cfg = config(images, tmp_path / "out", *options)
    torch.manual_seed(cfg.seed)
    model = frozen_tiny(images, seed=None)
    rows, labels = {}, {}
    for split in ("train", "test"):
        data = open_labelled(folder_url(images / split), split)
        chosen = [
            i for i in range(len(data.labels))
            if split == "test" or data.dataset[i].name.removeprefix(f"{images}/train/") in listed
        ]  # fmt: skip
        crops = torch.stack([CentreCropped(cfg, 1)(data.dataset[i].image(), 0)[0] for i in chosen])
        rows[split] = model(crops).feature_map.double().mean((1, 2)).numpy()
        labels[split] = data.labels[chosen, 0].numpy()
    assert len(labels["train"]) == 9

    def standardised(x, like):
        return (x - like.mean(0)) / like.std(0, ddof=1)

    oracle = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    oracle.fit(standardised(rows["train"], rows["train"]), labels["train"])
    clean, transductive = (
        oracle.score(standardised(rows["test"], rows[like]), labels["test"]) for like in ("train", "test")
    )
    EVALUATION.run(cfg, torch.device("cpu"))
    written = results_of(tmp_path / "out")
    result = written["results"]["low_shot_avg_patch"]
    assert (result["top1"], result["top1_transductive"]) == pytest.approx((clean, transductive))
    assert clean != transductive, "they cannot be told apart"
    assert result["settings"]["num_labels"] == 9
    assert result["settings"]["list_is_published"] is False
    assert result["settings"]["list_sha256"] == hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest()
    assert [score["label"] for score in written["scores"]] == ["top1", "top1_transductive"]
    assert "numbers published in" in written["scores"][1]["terms"]["top1_transductive"]


def test_the_published_list_is_known_by_its_hash(images, tmp_path, monkeypatch):
    golden = load_golden_json("vectors_stop")["one_percent_list"]
    assert golden["sha256_of_sorted_lines_joined_by_newline"] == eval_classification.ONE_PERCENT_SHA256
    (tmp_path / "few.txt").write_text("\n".join(f"{name}/1.png" for name in COLOURS))
    digest = hashlib.sha256("\n".join(sorted(f"{name}/1.png" for name in COLOURS)).encode()).hexdigest()
    monkeypatch.setattr(eval_classification, "ONE_PERCENT_SHA256", digest)
    options = ["methods=[low_shot]", f"low_shot_list={tmp_path}/few.txt"]
    EVALUATION.run(config(images, tmp_path / "out", *options), torch.device("cpu"))
    assert results_of(tmp_path / "out")["results"]["low_shot_avg_patch"]["settings"]["list_is_published"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is empty; give a text file with the name of an image a line"),
        ("red/1.png\nred/1.png\n", "has a name twice"),
        ("red/1.png\nred/100.png\n", "0 labelled images of train_dataset_name="),
        ("red/1.png\n2.png\n", "3 labelled images of train_dataset_name="),
        ("red/1.png\nred/2.png\n", "must name images of two classes or more"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(images, tmp_path, capsys, content, message):
    path = tmp_path / "few.txt"
    if content is not None:
        path.write_text(content)
    found = error_of(capsys, *arguments(images, tmp_path, "methods=[low_shot]", f"low_shot_list={path}"))
    assert f"low_shot_list={path}" in found or f"low_shot_list='{path}'" in found
    assert message in found


def test_a_checkpoint_of_another_training_is_refused(images, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(eval_classification, "pick", die)
        EVALUATION.run(config(images, tmp_path, "methods=[classifiers]"), torch.device("cpu"))
    (tmp_path / "results_classification.json").unlink()
    with pytest.raises(UserError, match=r"classifiers_checkpoint\.pth belongs to another training .*n_iters was 6"):
        EVALUATION.run(config(images, tmp_path, "methods=[classifiers]", "n_iters=8"), torch.device("cpu"))
    (tmp_path / "results_classification.json").unlink()
    path = tmp_path / "classifiers_checkpoint.pth"
    state = torch.load(path, weights_only=True)
    state["classifiers"] = {f"old_{name}": value for name, value in state["classifiers"].items()}
    torch.save(state, path)
    with pytest.raises(
        UserError, match=r"classifiers_checkpoint\.pth holds other classifiers .* delete .* to train anew"
    ):
        EVALUATION.run(config(images, tmp_path, "methods=[classifiers]"), torch.device("cpu"))
    (tmp_path / "results_classification.json").unlink()
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        EVALUATION.run(config(images, tmp_path, "methods=[classifiers]"), torch.device("cpu"))


def evaluate_on_ranks(arguments):
    EVALUATION.run(load_config(ClassificationConfig, None, arguments), torch.device("cpu"))


def test_two_ranks_give_the_results_of_one(images, tmp_path):
    images_of_test = f"test_dataset_names={folder_url(images / 'test')}"
    every_method = [*SHORT_VISSL[1:], *SHORT_PROBES, f"methods=[{','.join(METHODS)}]"]
    one = arguments(images, tmp_path / "one", images_of_test, *every_method)
    two = arguments(images, tmp_path / "two", images_of_test, *every_method, "batch_size_per_gpu=4")
    evaluate_on_ranks(one)
    run_on_ranks(evaluate_on_ranks, 2, two)
    expected, actual = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert actual["about"]["num_ranks"] == 2
    assert actual["results"] == expected["results"]
    for method in TRAINED:
        a, b = (torch.load(tmp_path / run / f"{method}.pth", weights_only=True) for run in ("one", "two"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -------------------------------------------------------------------------------------- labels and data sets


def test_several_labels_and_none(images, tmp_path, listed):
    listed["train"] = Listed([0, [1], 2, [0, -1], 1, 2, None, [-1], *([0, 1, 2] * 6)])
    listed["test"] = Listed([0, 1, 2, [1, 0], None, -1])
    listed["v2"] = Listed([[1], [0]], mapping=[2, 0])
    cfg = config(
        images,
        tmp_path,
        "train_dataset_name=train",
        "test_dataset_names.a=test",
        "test_dataset_names.b=v2",
        "methods=[knn,logreg]",
    )
    EVALUATION.run(cfg, torch.device("cpu"))
    written = results_of(tmp_path)
    assert written["about"]["num_images"] == {"fit": 17, "validation": 7, "test/a": 4, "test/b": 2}
    assert written["about"]["test_classes"] == {"test/b": 2}
    assert written["results"]["knn_avg_patch"]["top1/a"] == 1
    assert [score["label"] for score in written["scores"]] == ["top1/a", "top1/b"]
    splits = open_splits(
        "train", None, cfg.test_dataset_names, val_proportion=cfg.val_proportion, num_classes=None, all_classes=True
    )
    assert splits.tests["/b"].mapping is not None
    assert splits.tests["/b"].mapping.tolist() == [2, 0]
    assert splits.train.labels.tolist()[:4] == [[0], [1], [2], [0]]


class Named(Listed):
    """Images whose colours say their class, with the classes in an order of their own."""

    def __init__(self, classes, order):
        super().__init__(classes)
        self.order = list(order)

    @property
    def class_names(self):
        return [list(COLOURS)[number] for number in self.order]

    def __getitem__(self, index):
        return replace(super().__getitem__(index), read_target=lambda: self.order.index(self.targets[index]))


def test_scores_do_not_depend_on_the_order_in_which_a_set_has_its_classes(images, tmp_path, listed):
    """Neither those of validation, by which hyper-parameters are chosen, nor those of tests."""
    listed["train"] = Named([0, 1, 2] * 8, (0, 1, 2))
    scores = []
    for name, order in (("same", (0, 1, 2)), ("other", (2, 0, 1))):
        listed["other"] = Named([0, 1, 2] * 3, order)
        urls = ["train_dataset_name=train", "val_dataset_name=other", "test_dataset_names=other"]
        cfg = config(images, tmp_path / name, *urls, *SHORT_PROBES, "methods=[classifiers,knn,logreg,attentive_probe]")
        EVALUATION.run(cfg, torch.device("cpu"))
        scores.append(results_of(tmp_path / name)["results"])
    assert scores[0]["linear_cls"]["top1"] > 0.5, "nothing was learned, so that nothing was compared"
    assert scores[0] == scores[1]


# ----------------------------------------------------------------------------------------------- the command


def test_the_command_as_typed(images, tmp_path):
    tower = {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}}
    override = {"patch_size": 4, "transformers_kwargs": tower, "encoder_kwargs": {"depth": 1}}
    (tmp_path / "eval.yaml").write_text(
        json.dumps({"n_iters": 20, "warmup_iters": 2, "save_checkpoint_period": 10, "batch_size_per_gpu": 16})
    )
    command = [
        "eval_classification.py",
        *arguments(images, tmp_path / "out")[:14],
        tmp_path / "eval.yaml",
        "model_path=model.py",
        f"model_loader_kwargs.config_override.model={json.dumps(override)}",
        *arguments(images, tmp_path / "out")[15:],
        "n_iters=30",
    ]
    done = run_cli(*command)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "results_classification.json").read_text()
    results = json.loads(written)["results"]
    names = "linear_cls", "linear_concat_objects", "attentive_patch", "knn_cls", "knn_avg_patch", "logreg_avg_patch"
    assert list(results) == [*names, "few_label_avg_patch"]
    for name, value in results.items():
        assert all(0 <= v <= 1 for v in value.values() if isinstance(v, float)), name
        assert value["top1"] > 0.5, f"{name}: colours are easy"
        assert value["settings"]["resolution"] == 16
    assert results["few_label_avg_patch"]["settings"]["num_labels"] == 9
    rows = score_rows({"name": "m", "evaluations": {"colours": json.loads(written)}})
    assert [(row.method, row.metric, row.values) for row in rows] == [
        (name, "top1", [value["top1"]]) for name, value in results.items()
    ]


def test_what_is_done_is_skipped(images, tmp_path, monkeypatch):
    EVALUATION.run(config(images, tmp_path), torch.device("cpu"))
    before = results_of(tmp_path)

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    for name in ("train_classifiers", "extract_feature_sets", "score_classifiers"):
        monkeypatch.setattr(eval_classification, name, forbidden)
    EVALUATION.run(config(images, tmp_path), torch.device("cpu"))
    assert results_of(tmp_path)["results"] == before["results"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resolution=18"], "resolution=18: must be a multiple of 4, the patch size of"),
        (["learning_rates=[]"], "learning_rates=[]: must not be empty"),
        (["learning_rates=[0.1,-1]"], "learning_rates=[0.1, -1.0]: must all be above 0"),
        (["methods=[lineal]"], "methods='lineal': must be one of classifiers, knn, logreg"),
        (
            ["representations=[objects]", "model_loader_kwargs.registers=0"],
            "objects is made of registers, and this model",
        ),
        (["labels_per_class=30"], "labels_per_class=30: class 0 (blue) of train_dataset_name="),
        (["labels_per_class=0"], "labels_per_class=0: must be a whole number from 1 on, or a fraction"),
        (["num_classes=2"], "train': label 2 is out of range: there are 2 classes, counted from 0; set num_classes"),
        (["val_proportion=0.995"], "of 60 training images, 100% for validation leave none"),
        (["resize=8"], "resize=8: must be at least resolution=16"),
        (["resize=8", "resolution=[12,24]"], "resize=8: must be at least resolution=[12,24], of two sides the shorter"),
        (["resolution=[16,18]"], "resolution=[16,18]: both must be multiples of 4, the patch size of"),
        (["warmup_iters=6"], "warmup_iters=6: must be 0 or more and below n_iters=6"),
        (["knn_k=[1000]", "methods=[knn]"], "knn_k=[1000]: there are 60 training images"),
        (["methods=[vissl]", "vissl_blocks=4"], "vissl_blocks=4: model_path="),
        (["methods=[vissl]", "vissl_blocks=4"], "did not return 4 maps [b, d, rows, columns]"),
        (["vissl_epochs=8"], "vissl_decay_epochs=[8, 16, 24]: must all be below vissl_epochs=8"),
        (["vissl_optimizer=adam"], "vissl_optimizer='adam': must be one of sgd, lars"),
        (["probe_epochs=5"], "probe_warmup_epochs=10: must be below probe_epochs=5"),
        (["linear_probe_learning_rates=[]"], "linear_probe_learning_rates=[]: must"),
        (["low_shot_penalty=0"], "low_shot_penalty=0.0: must be above 0"),
        (["methods=[low_shot]", "labels_per_class=30"], "labels_per_class=30: class 0 (blue) of train_dataset_name="),
        (["test_dataset_names=[a]"], "test_dataset_names=['a']: must be a data URL, or name: URL pairs"),
        (["test_dataset_names={images}/test/red"], "no image has a label; give a data set with labels"),
        (["train_dataset_name=torchvision://ImageFolder?root='{images}/one'"], "all images are of class 0 (red)"),
        (["test_dataset_names.odd=torchvision://ImageFolder?root='{images}/odd'"], "its class pink is not a class of"),
    ],
)
def test_mistakes_are_named_with_a_remedy(images, tmp_path, capsys, overrides, message):
    (images / "one").mkdir(exist_ok=True)
    (images / "odd").mkdir(exist_ok=True)
    for link, target in (("one/red", "red"), ("odd/pink", "red"), ("odd/blue", "blue")):
        if not (images / link).exists():
            (images / link).symlink_to(images / "test" / target)
    found = error_of(capsys, *arguments(images, tmp_path, *(o.replace("{images}", str(images)) for o in overrides)))
    assert message in found


def test_a_damaged_training_image_is_named(images, tmp_path, capsys):
    for name in COLOURS:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            data = (images / "train" / name / f"{i}.png").read_bytes()
            (tmp_path / "train" / name / f"{i}.png").write_bytes(data)
    bad = tmp_path / "train" / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    url = f"train_dataset_name={folder_url(tmp_path / 'train')}"
    found = error_of(capsys, *arguments(images, tmp_path / "out", url, "val_proportion=0.25", "n_iters=8"))
    assert str(bad) in found
    assert "repair or remove the file" in found
