"""eval_segmentation.py: golden predictions and scores, oracles, ranks, and the command as it is typed."""

import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from commands import run_forked
from conftest import GOLDEN, ROOT, load_golden_json, run_cli, seeded
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import RobustScaler, StandardScaler
from torch.utils.flop_counter import FlopCounterMode

import eval_segmentation
from config import load_config
from eval_segmentation import (
    STANDARDIZATIONS,
    Standardizer,
    confusion_matrix,
    from_patches,
    is_ignored,
    majority_label,
    segmentation_metrics,
    to_patches,
)
from readouts import majority_votes, nearest
from utils import UserError

IGNORED = (0, 255)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "evaluation.safetensors")


# ------------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("distance", ["cosine", "L2", "L1", "inner_product"])
@pytest.mark.parametrize("train_chunk", [150, 7, 1000])
def test_knn_predicts_the_golden_labels_whatever_the_chunk(golden, distance, train_chunk):
    kept = ~is_ignored(majority_label(golden["seg.train_labels"]), IGNORED)
    train, labels = golden["seg.train_features"][kept], golden["seg.train_labels"][kept]
    _, found = nearest(golden["seg.test_features"], train, 10, distance, train_chunk=train_chunk)
    scores = load_golden_json("evaluation")
    for k, predicted in majority_votes(found, labels, [10, 1, 3]):
        assert torch.equal(predicted, golden[f"seg.knn.{distance}.{k}"])
        expected = scores[f"knn.{distance}.{k}"]
        truth = golden["seg.test_labels"]
        actual = segmentation_metrics(confusion_matrix(truth, predicted, IGNORED), IGNORED)
        assert actual["mIoU"] == pytest.approx(expected["mIoU"], rel=1e-12)
        assert actual["acc"] == pytest.approx(expected["acc"], rel=1e-12)
        keep_0 = segmentation_metrics(confusion_matrix(truth, predicted, (255,)), (255,))
        assert keep_0["mIoU"] == pytest.approx(expected["mIoU_keep0"], rel=1e-12)


def test_center_div_is_the_golden_one(golden):
    features = golden["seg.train_features"].clone()
    Standardizer("center_div", features).apply_(features)
    torch.testing.assert_close(features, golden["scaler.center_div"], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- metrics


def test_scores_are_those_of_scikit_learn():
    truth = torch.randint(0, 6, (5000,), generator=seeded(0)).to(torch.uint8)
    predicted = torch.where(torch.rand(5000, generator=seeded(1)) < 0.6, truth, truth.roll(1))
    scores = segmentation_metrics(confusion_matrix(truth, predicted, (0,)), (0,))
    counted = truth != 0
    y, p = truth[counted].numpy(), predicted[counted].numpy()
    assert 0 in p, "an ignored label has to be predicted somewhere for this to be a test"
    assert scores["mIoU"] == pytest.approx(jaccard_score(y, p, average="macro", labels=np.unique([*y, *p])))
    assert scores["mIoU_valid"] == pytest.approx(jaccard_score(y, p, average="macro", labels=[1, 2, 3, 4, 5]))
    assert scores["mIoU"] < scores["mIoU_valid"]
    confusion = sklearn_confusion(y, p, labels=range(6))[1:]
    assert scores["mean_acc"] == pytest.approx((confusion.diagonal(offset=1) / confusion.sum(1)).mean())
    assert scores["acc"] == pytest.approx((y == p).mean())


def test_classes_have_their_names_and_counts():
    truth = torch.tensor([0, 1, 1, 2, 255], dtype=torch.uint8)
    predicted = torch.tensor([1, 1, 0, 2, 2], dtype=torch.uint8)
    scores = segmentation_metrics(confusion_matrix(truth, predicted, (255,)), (255,), ["sky", "tree"])
    assert scores["per_class"] == {
        "sky": {"iou": 0.0, "acc": 0.0, "pixels": 1},
        "tree": {"iou": pytest.approx(1 / 3), "acc": 0.5, "pixels": 2},
        "2": {"iou": 1.0, "acc": 1.0, "pixels": 1},
    }


# ------------------------------------------------------------------------------------------------------ labels


def test_patches_hold_the_pixels_of_their_square():
    labels = torch.arange(24, dtype=torch.uint8).view(1, 4, 6)
    patches = to_patches(labels, 2)
    assert patches.tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert torch.equal(from_patches(patches, 4, 6, 2), labels)


def test_the_majority_wins_and_the_smallest_label_a_tie():
    pixels = torch.tensor([[3, 3, 1, 2], [5, 5, 4, 4], [255, 255, 255, 0]], dtype=torch.uint8)
    assert majority_label(pixels).tolist() == [3, 4, 255]


# ---------------------------------------------------------------------------------------------- standardisation


@pytest.mark.parametrize("kind", STANDARDIZATIONS)
def test_standardisation_is_that_of_scikit_learn(kind, monkeypatch):
    monkeypatch.setattr(eval_segmentation, "ROWS", 64)
    x = torch.randn(300, 20, generator=seeded(0)) * torch.linspace(0.1, 5, 20) + torch.linspace(-3, 3, 20)
    x[:, 4] = 7.0  # a dead channel
    before = x.clone()
    actual = Standardizer(kind, x).apply_(x).numpy()
    y = before.double().numpy()
    if kind in ("pca", "pca_whiten"):
        expected = PCA(20, whiten=kind == "pca_whiten", svd_solver="full").fit_transform(y)
        expected, actual = np.abs(expected)[:, :19], np.abs(actual)[:, :19]  # signs are free, the last variance is 0
        if kind == "pca_whiten":
            expected *= np.sqrt(300 / 299)  # ours divides by n
    else:
        expected = {
            "none": lambda: y,
            "center": lambda: y - y.mean(0),
            "center_div": lambda: (y - y.mean(0)) / y.std(),
            "StandardScaler": lambda: StandardScaler().fit_transform(y),
            "RobustScaler": lambda: RobustScaler().fit_transform(y),
        }[kind]()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-4 if "whiten" in kind else 3e-5)


@pytest.mark.parametrize(("kind", "products"), [("StandardScaler", 0), ("center_div", 0), ("pca", 2 * 300 * 20**2)])
def test_standardisation_without_rotation_needs_no_covariance(kind, products):
    x = torch.randn(300, 20, generator=seeded(0))
    with FlopCounterMode(display=False) as counter:
        Standardizer(kind, x)
    assert counter.get_total_flops() == products


# --------------------------------------------------------------------------------------------------- whole runs


TINY = {"config_override": {"model": {
    "patch_size": 8, "n_registers": 4, "encoder_kwargs": {"depth": 1}, "decoder_kwargs": {"depth": 1},
    "transformers_kwargs": {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
}}}  # fmt: skip


def make_pairs(folder, num, *, labels=(0, 1, 2), size=32, seed=0):
    """Images whose quarters have a colour and a label each."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(num):
        quarters = rng.choice(labels, (2, 2))
        mask = np.kron(quarters, np.ones((size // 2, size // 2), dtype=np.uint8)).astype(np.uint8)
        colors = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])[mask % 3]
        pixels = np.clip(colors + rng.normal(0, 20, colors.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.jpg", quality=95)
        Image.fromarray(mask).save(folder / "masks" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    make_pairs(root / "train", 20)
    make_pairs(root / "val", 7, seed=1)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def arguments(data, output_dir, *more):
    return [
        f"model_loader_kwargs={json.dumps(TINY)}",
        f"train_dataset_name=custom://Segmentation?root='{data / 'train'}'",
        f"test_dataset_name=custom://Segmentation?root='{data / 'val'}'",
        f"output_dir={output_dir}",
        "resolution=32",
        "ignore_labels=[255]",
        "device=cpu",
        "num_workers=0",
        "batch_size=4",
        "knn_ks=[1,3]",
        "logreg_cs=[0.01,1,100]",
        "logreg_max_iter=50",
        *more,
    ]


def test_images_of_many_bands_are_segmented_and_drawn(data, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(data / part / "masks", tmp_path / part / "masks")
        (tmp_path / part / "images").mkdir()
        for path in (data / part / "images").iterdir():
            deep = np.tile(np.asarray(Image.open(path)).astype(np.uint16) * 40, (1, 1, 2))[..., :5]
            file = tmp_path / part / "images" / f"{path.stem}.tif"
            tifffile.imwrite(file, deep, photometric="minisblack", planarconfig="contig")
    settings = {"value_range": [0, 10200], "mean": [0.4] * 5, "std": [0.3] * 5}
    model = {**TINY["config_override"]["model"], "in_chans": 5}
    kwargs = {"config_override": {"model": model, "data": settings}}
    own = [f"model_loader_kwargs={json.dumps(kwargs)}", "classifiers=[knn]", "num_pictures=1"]
    sources = arguments(tmp_path, tmp_path / "out", *own)
    assert eval_segmentation.main(sources) == 0
    assert (tmp_path / "out" / "artifacts" / "segmentation.png").is_file()


def results_in(folder):
    return json.loads((folder / "results_segmentation.json").read_text())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    dumps = ("dump_features=true", "dump_predictions=true", "dump_classifier=true")
    done = run_cli("eval_segmentation.py", *arguments(data, folder, *dumps))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_command_learns_colours(finished):
    found = results_in(finished)
    for name in ("knn", "logreg"):
        scores = found["results"][name]
        assert scores["mIoU"] > 0.6, f"colours are easy even for random weights, but {name} has {scores}"
        assert set(scores["per_class"]) == {"red", "green", "blue"}
        assert scores["mIoU"] == pytest.approx(np.mean([each["iou"] for each in scores["per_class"].values()]))
    about = found["about"]
    assert about["num_train_patches"] == 20 * 16 and about["grid"] == [4, 4] and len(about["weights_sha256"]) == 64
    assert about["ignore_labels"] == [255] and about["resolution"] == 32 and about["seconds"] > 0


def test_images_are_scored_in_a_shape_that_is_no_square(data, tmp_path):
    more = ("resolution=[16,32]", "classifiers=[knn]", "num_pictures=1", "dump_predictions=true")
    assert eval_segmentation.main(arguments(data, tmp_path, *more)) == 0
    found = results_in(tmp_path)
    assert found["about"]["grid"] == [2, 4] and found["about"]["num_train_patches"] == 20 * 8
    predicted = load_file(tmp_path / "dumps" / "predictions_knn.safetensors")["labels"]
    masks = [Image.open(p).resize((32, 16), Image.Resampling.NEAREST) for p in sorted(data.glob("val/masks/*.png"))]
    truth = torch.stack([torch.from_numpy(np.array(mask)) for mask in masks])
    again = segmentation_metrics(confusion_matrix(truth, predicted, (255,)), (255,))
    assert again["mIoU"] == pytest.approx(found["results"]["knn"]["mIoU"]) and again["mIoU"] > 0.5


def test_the_dumps_give_the_scores_again(finished, data):
    found, dumps = results_in(finished), finished / "dumps"
    truth = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(data.glob("val/masks/*.png"))])
    for name in ("knn", "logreg"):
        predicted = load_file(dumps / f"predictions_{name}.safetensors")["labels"]
        again = segmentation_metrics(confusion_matrix(truth, predicted, (255,)), (255,))
        assert again["mIoU"] == pytest.approx(found["results"][name]["mIoU"])
    train = load_file(dumps / "train_patches.safetensors")
    assert train["features"].shape == (320, 32) and train["pixel_labels"].shape == (320, 64)
    torch.testing.assert_close(train["features"].mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    weights = load_file(dumps / "logreg.safetensors")
    predicted = (train["features"] @ weights["weight"].T + weights["bias"]).argmax(1)
    assert (predicted == majority_label(train["pixel_labels"]).long()).double().mean() > 0.8


def test_pictures_show_predictions_beside_the_truth(finished):
    with Image.open(finished / "artifacts" / "segmentation.png") as picture:
        assert picture.width > 600 and picture.height > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_what_is_done_is_not_done_again(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "again")
    dumps = ("dump_features=true", "dump_predictions=true", "dump_classifier=true")
    assert eval_segmentation.main(arguments(data, tmp_path / "again", *dumps)) == 0
    before, after = results_in(finished), results_in(tmp_path / "again")
    assert after["results"] == before["results"]
    timed = ("seconds", "parts_s")
    assert [after["about"][key] for key in timed] == [before["about"][key] for key in timed]
    assert "nothing to do" in capsys.readouterr().err


def evaluate_on_rank(args):
    cfg = load_config(eval_segmentation.SegmentationConfig, None, args)
    eval_segmentation.EVALUATION.run(cfg, torch.device("cpu"))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_the_number_of_ranks_does_not_change_the_scores(finished, data, tmp_path, num_ranks):
    args = arguments(data, tmp_path, "dump_features=true", "dump_predictions=true", "dump_classifier=true")
    run_on_ranks(evaluate_on_rank, num_ranks, args)
    one, many = results_in(finished)["results"], results_in(tmp_path)["results"]
    assert many["knn"] == one["knn"]
    assert many["logreg"]["settings"]["C"] == one["logreg"]["settings"]["C"]
    assert many["logreg"]["mIoU"] == pytest.approx(one["logreg"]["mIoU"], abs=1e-3)
    for name in ("train_patches", "predictions_knn"):
        alone, together = (load_file(f / "dumps" / f"{name}.safetensors") for f in (finished, tmp_path))
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-5)


def test_a_validation_set_and_fewer_images(data, tmp_path):
    more = (f"val_dataset_name=custom://Segmentation?root='{data / 'val'}'", "max_train_images=5", "classifiers=[knn]")
    assert eval_segmentation.main(arguments(data, tmp_path, *more)) == 0
    found = results_in(tmp_path)
    assert found["about"]["num_train_images"] == 5 + 7 and "logreg" not in found["results"]


def test_autocast_changes_scores_a_little_and_is_noted(finished, data, tmp_path):
    assert eval_segmentation.main(arguments(data, tmp_path, "dtype=bfloat16", "classifiers=[knn]")) == 0
    found = results_in(tmp_path)
    assert found["about"]["dtype"] == "bfloat16"
    assert found["results"]["knn"]["mIoU"] == pytest.approx(results_in(finished)["results"]["knn"]["mIoU"], abs=0.1)


# ----------------------------------------------------------------------------------------------------- mistakes


def mistake(capsys, args):
    assert eval_segmentation.main(args) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_a_label_image_of_another_size(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    Image.new("L", (16, 32)).save(tmp_path / "data" / "train" / "masks" / "03.png")
    message = mistake(capsys, arguments(tmp_path / "data", tmp_path / "out"))
    assert "03.jpg" in message and "32x32" in message and "16x32" in message


def test_an_unreadable_image_is_named(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "images" / "05.jpg").write_bytes(b"no image")
    message = mistake(capsys, arguments(tmp_path / "data", tmp_path / "out", "num_workers=2"))
    assert "05.jpg" in message


def test_images_without_labels(data, tmp_path, capsys):
    message = mistake(capsys, arguments(data, tmp_path, f"train_dataset_name={data}/train/images"))
    assert "not a label image" in message


def test_one_class_alone(tmp_path, capsys):
    make_pairs(tmp_path / "data" / "train", 4, labels=(1,))
    make_pairs(tmp_path / "data" / "val", 2, labels=(1,))
    message = mistake(capsys, arguments(tmp_path / "data", tmp_path / "out"))
    assert "train_dataset_name=" in message and "needs two" in message


def test_validation_images_without_a_label_that_counts(data, tmp_path, capsys):
    make_pairs(tmp_path / "empty", 3, labels=(255,))
    empty = f"val_dataset_name=custom://Segmentation?root='{tmp_path / 'empty'}'"
    message = mistake(capsys, arguments(data, tmp_path / "out", empty))
    assert "val_dataset_name=" in message and "no pixel" in message


def test_a_class_that_validation_lacks_is_named(data, tmp_path, capsys):
    make_pairs(tmp_path / "some", 3, labels=(0, 1))
    more = (f"val_dataset_name=custom://Segmentation?root='{tmp_path / 'some'}'", "classifiers=[knn]")
    assert eval_segmentation.main(arguments(data, tmp_path / "out", *more)) == 0
    assert "without a say in the choices: blue" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resolution=30", ("resolution=30", "of 8, the patch size of")),
        ("knn_ks=[1,100000]", ("knn_ks", "fewer")),
        ("knn_distances=[manhattan]", ("knn_distances='manhattan'", "cosine")),
        ("standardization=zca", ("standardization='zca'", "StandardScaler")),
        ("classifiers=[]", ("classifiers=[]", "at least one")),
        ("val_proportion=1.5", ("val_proportion=1.5",)),
        ("val_proportion=0.99", ("of 20 training images", "leave none")),
        ("resolutoin=32", ("resolutoin", "did you mean resolution")),
        ("model_path=nothing.py", ("model_path=nothing.py", "no such file")),
        ("model_loader_kwargs.weights=x", ("model_loader_kwargs", "weights", "pretrained_weights")),
    ],
)
def test_mistakes_are_explained(data, tmp_path, capsys, override, words):
    message = mistake(capsys, arguments(data, tmp_path, override))
    assert all(word in message for word in words), message


def test_results_of_another_model_are_not_mixed(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    message = mistake(capsys, arguments(data, tmp_path / "out", "seed=1"))
    assert "another model" in message and "another output_dir" in message
    message = mistake(capsys, arguments(data, tmp_path / "out"))
    assert "dump_features was True" in message


def test_help_is_instant_and_shows_how(tmp_path):
    done = run_forked("eval_segmentation.py", "--help")
    assert done.returncode == 0 and "train_dataset_name=" in done.stdout


def test_the_demo_data_has_names_for_its_labels():
    from reading.sources import make_dataset

    dataset = make_dataset(f"custom://Segmentation?root='{ROOT}/demo_data/emoji_on_scenes/val'")
    assert dataset.class_names[0] == "background" and len(dataset.class_names) == 7
    assert dataset.ignore_labels == [255], "background counts"


# ------------------------------------------------------------------------------------ which labels count, and as what


def evaluate(data, output_dir, *more):
    assert eval_segmentation.main(arguments(data, output_dir, "classifiers=[knn]", "num_pictures=0", *more)) == 0
    return results_in(output_dir)


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data, to change."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def relabel(folder, numbers, names=None):
    """Give labels other numbers, and classes names of their own."""
    for path in folder.glob("masks/*.png"):
        Image.fromarray(np.asarray(numbers, dtype=np.uint8)[np.array(Image.open(path))]).save(path)
    if names is not None:
        (folder / "classes.txt").write_text("\n".join(names))


def test_background_counts_where_the_data_set_does_not_leave_it_out(finished, data, tmp_path, capsys):
    found = evaluate(data, tmp_path, "ignore_labels=null")
    assert found["results"]["knn"]["mIoU"] == results_in(finished)["results"]["knn"]["mIoU"]
    assert found["config"]["ignore_labels"] is None and found["about"]["ignore_labels"] == [255]
    assert found["about"]["own_ignore_labels"] == {"train_dataset_name": [255], "test_dataset_name": [255]}
    err = capsys.readouterr().err
    assert "labels that do not count: [255], as the data sets say" in err


def test_a_class_in_parentheses_does_not_count(own, tmp_path):
    (own / "classes.txt").write_text("(red)\ngreen\nblue\n")
    found = evaluate(own, tmp_path / "out", "ignore_labels=null")
    assert set(found["results"]["knn"]["per_class"]) == {"green", "blue"}
    assert found["about"]["ignore_labels"] == [0, 255]


def test_what_one_data_set_leaves_out_counts_in_none_and_that_is_said(own, tmp_path, capsys):
    (own / "classes.txt").unlink()
    (own / "val" / "classes.txt").write_text("(red)\ngreen\nblue\n")
    found = evaluate(own, tmp_path / "out", "ignore_labels=null")
    assert found["about"]["ignore_labels"] == [0, 255]
    assert found["about"]["own_ignore_labels"] == {"train_dataset_name": [255], "test_dataset_name": [0, 255]}
    err = capsys.readouterr().err
    assert "labels 0 are left out by one of the data sets and not by another" in err


@pytest.mark.parametrize("void", [False, True])
@pytest.mark.parametrize("key", ["test_dataset_name", "val_dataset_name"])
def test_classes_in_another_order_are_matched_by_name(own, data, tmp_path, key, void):
    names = ["blue", "(nothing)", "red", "green"] if void else ["blue", "red", "green"]
    relabel(own / "val", [names.index(name) for name in ("red", "green", "blue")], names)
    url = f"{key}=custom://Segmentation?root='{{}}'"
    same, changed = (
        evaluate(data, tmp_path / root.parent.name, url.format(root), "ignore_labels=null")
        for root in (data / "val", own / "val")
    )
    assert changed["results"] == same["results"]


def test_a_class_that_training_does_not_know_is_refused(own, tmp_path, capsys):
    (own / "val" / "classes.txt").write_text("red\ngreen\nviolet\n")
    message = mistake(capsys, arguments(own, tmp_path / "out"))
    assert "test_dataset_name=" in message and "its class violet is not a class of train_dataset_name=" in message


def test_labels_that_are_likely_a_mistake_are_pointed_out(own, tmp_path, capsys):
    relabel(own / "train", [0, 0, 2])
    relabel(own / "val", [0, 1, 9])
    for i, path in enumerate(sorted(own.glob("train/masks/*.png"))[:4]):
        Image.fromarray(np.full((32, 32), 1 + i % 2, dtype=np.uint8)).save(path)
    evaluate(own, tmp_path / "out", "ignore_labels=[0]")
    err = capsys.readouterr().err
    assert "label 0 covers" in err and "of the pixels and does not count" in err
    assert "labels without a name count as classes: 9; 3 classes have a name" in err


def test_names_of_whole_images_are_not_names_of_pixels(monkeypatch):
    from reading.sources import ImageDataset

    class Pets(ImageDataset):
        class_names = ("cat", "dog")

        def __len__(self):
            return 1

    monkeypatch.setattr(eval_segmentation, "open_dataset", lambda *_: Pets())
    sets = eval_segmentation.open_label_sets(eval_segmentation.SegmentationConfig(output_dir="x"))
    assert sets.train.class_names == [] and sets.ignore_labels == [255]


def test_a_turned_image_with_a_mask_that_is_not_is_explained(tmp_path):
    with pytest.raises(UserError, match="turned by its EXIF orientation, perhaps; turn its label image too"):
        eval_segmentation.prepare_pair(Image.new("RGB", (4, 6)), Image.new("L", (6, 4)), 8)


def test_a_rare_class_is_held_out_too(own, tmp_path, capsys):
    for i, path in enumerate(sorted(own.glob("train/masks/*.png"))):
        mask = np.full((32, 32), 2 if i in (4, 11) else 1, dtype=np.uint8)
        mask[:16] = 0
        Image.fromarray(mask).save(path)
    evaluate(own, tmp_path / "out")
    err = capsys.readouterr().err
    assert "so it is drawn by class" in err
    assert "not in the validation images" not in err


# ------------------------------------------------------------------------------------------- few labelled images


@pytest.fixture(scope="module")
def with_few(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    more = ("labelled_images=[4,20]", "labelled_repeats=2", "num_pictures=0", "knn_ks=[5]", "knn_distances=[cosine]")
    more += ("dump_predictions=true",)
    assert eval_segmentation.main(arguments(data, folder, *more)) == 0
    return folder


def test_scores_with_few_labelled_images_stand_beside_the_others(with_few):
    found = results_in(with_few)["results"]
    assert list(found) == ["knn", "logreg", *(f"{name}_{num}_images" for num in (4, 20) for name in ("knn", "logreg"))]
    for name, result in found.items():
        if name.endswith("images"):
            values = result["each_repeat"]["mIoU"]
            assert len(values) == 2 and result["mIoU"] == pytest.approx(np.mean(values))
            assert result["std_mIoU"] == pytest.approx(np.std(values))
            assert [len(images) for images in result["settings"]["images"]] == [int(name.split("_")[1])] * 2
            assert result["mIoU"] > 0.5, "colours are easy"
    # All images, and the hyper-parameters that k-NN has by default there.
    assert found["knn_20_images"]["mIoU"] == pytest.approx(found["knn"]["mIoU"], rel=1e-6)
    assert found["knn_20_images"]["std_mIoU"] == 0


def test_the_dump_with_few_images_is_of_their_first_choice(with_few, data):
    truth = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted(data.glob("val/masks/*.png"))])
    for name in ("knn_4_images", "logreg_4_images", "knn_20_images"):
        predicted = load_file(with_few / "dumps" / f"predictions_{name}.safetensors")["labels"]
        again = segmentation_metrics(confusion_matrix(truth, predicted, (255,)), (255,))
        assert again["mIoU"] == pytest.approx(results_in(with_few)["results"][name]["each_repeat"]["mIoU"][0])


def test_they_show_in_the_table(with_few):
    from report import text_table

    entry = {"script": "eval_segmentation.py", "status": "done", "folder": "x", **results_in(with_few)}
    table = text_table({"name": "mine", "evaluations": {"flowers": entry}, "random": {}, "compared": {}})
    rows = [line.split() for line in table.splitlines() if "knn_4_images" in line]
    undeclared = {key: value for key, value in entry.items() if key != "scores"}
    assert table == text_table({"name": "mine", "evaluations": {"flowers": undeclared}}), "the names in use are scores"
    assert [row[2] for row in rows] == ["mIoU", "mIoU_valid", "acc", "mean_acc"]


def test_ranks_share_the_scores_with_few_images(with_few, data, tmp_path):
    more = ("labelled_images=[4]", "labelled_repeats=2", "num_pictures=0", "classifiers=[knn]", "knn_ks=[5]")
    run_on_ranks(evaluate_on_rank, 2, arguments(data, tmp_path, *more))
    assert results_in(tmp_path)["results"]["knn_4_images"] == results_in(with_few)["results"]["knn_4_images"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("labelled_images=[21]", "labelled_images=21: there are 20 training images"),
        ("labelled_images=[0]", "labelled_images=[0]"),
        ("labelled_repeats=0", "labelled_repeats=0"),
    ],
)
def test_mistakes_about_few_images_are_explained(data, tmp_path, capsys, override, words):
    assert words in mistake(capsys, arguments(data, tmp_path, override))


# ------------------------------------------------------------------------------------------------------- reuse


def test_results_of_data_that_have_changed_are_not_called_done(finished, own, tmp_path, capsys):
    assert eval_segmentation.main(arguments(own, tmp_path / "out", "classifiers=[knn]")) == 0
    relabel(own / "val", [1, 0, 2])
    message = mistake(capsys, arguments(own, tmp_path / "out", "classifiers=[knn]"))
    assert "results of other data: what is at test_dataset_name=custom" in message and "has changed since" in message
