"""finetune_classification.py and the scores of its models: exact resume, ranks, labels, what is done to images."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import logged_steps, run_forked
from conftest import ROOT, seeded
from finetunes import CASES, CLASS_COLOURS, opened, pretrain, write_classes
from PIL import Image

import eval_finetuned
import finetune_classification as script
import finetuning
from data import Batch, normalize
from utils import UserError

CASE = CASES["classification"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return pretrain(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def arguments(classes, pretrained, tmp_path):
    """Arguments of a tiny training in a folder of this test."""

    def make(name: str, *more: str) -> list[str]:
        return CASE.arguments(classes, f"pretrained_weights={pretrained}", tmp_path / name, *more)

    return make


EVALS = {"test": {
    "period": 0, "final": True, "model_to_eval": "model", "model_setup_script": "finetuning.py", "where": "inline",
    "download": False, "eval_config": {"test": {"file": "eval_finetuned.py", "num_pictures": 5, "num_workers": 0}},
}}  # fmt: skip


@pytest.mark.long
def test_a_model_learns_as_typed_and_the_report_has_its_scores_and_pictures(classes, pretrained, tmp_path):
    EVALS["test"]["eval_config"]["test"]["test_dataset_name"] = str(classes / "test")
    (tmp_path / "evals.yaml").write_text(yaml.safe_dump({"evals": EVALS}))
    done = run_forked(
        "finetune_classification.py", tmp_path / "evals.yaml",
        *CASE.arguments(classes, f"pretrained_weights={pretrained}", tmp_path / "run"),
        "optim.total_iters=30", "classification.mixup=0", "classification.cutmix=0",
        "classification.rand_augment=null", "optim.batch_size_per_gpu=9", "optim.layer_decay=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "evals" / "test").iterdir()
    page = (folder / "results" / "report.html").read_text()
    assert "accuracy" in page and "Learning rate of the head" in page
    assert (folder / "results" / "test" / "artifacts" / "predictions.png").is_file()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/test/test/finetuned/top1"] > 0.9, "three colours are not told apart"
    assert "top5" not in (folder / "results" / "results.json").read_text().split('"scores"')[0]


def test_a_run_over_epochs_is_exported_without_its_images(arguments, tmp_path):
    run = [x for x in arguments("run", "optim.epochs=1") if not x.startswith("optim.total_iters")]
    assert script.main(run) == 0
    before = (tmp_path / "run" / "model.yaml").read_text()
    (tmp_path / "run" / "model.pth").unlink()
    assert script.main([*run, "data.dataset=gone", "--export"]) == 0
    assert (tmp_path / "run" / "model.pth").is_file()
    after = (tmp_path / "run" / "model.yaml").read_text()
    assert [line for line in after.splitlines() if line not in before.splitlines()] == ["  dataset: gone"]


def test_the_average_is_what_is_exported_and_the_head_alone_learns_if_the_backbone_is_frozen(
    arguments, pretrained, tmp_path
):
    frozen = "backbone.freeze=true"
    assert script.main(arguments("own", frozen)) == 0
    assert script.main(arguments("average", frozen, "optim.ema_momentum=0.5")) == 0
    own, average = (torch.load(tmp_path / name / "model.pth", weights_only=True) for name in ("own", "average"))
    assert not torch.equal(own["head.linear.weight"], average["head.linear.weight"])
    start = torch.load(pretrained, weights_only=True)
    for key in own:
        if key.startswith("backbone."):
            assert torch.equal(own[key], start[key]) and torch.equal(average[key], start[key]), key


def loss_of(arguments: list[str], seed: int = 0, labels: tuple[int, ...] = (0, 1, 2, 1)) -> torch.Tensor:
    """Of made-up images, in evaluation mode, by the loss of a training with these arguments."""
    cfg, _ = opened("classification", arguments)
    state = finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)
    with torch.no_grad():
        state.model["head"].linear.weight.normal_(generator=seeded(3))
    images = normalize(torch.randint(256, (4, 3, 16, 16), generator=seeded(1), dtype=torch.uint8))
    batch = Batch(images, {}, torch.arange(4), labels={"label": torch.tensor(labels)})
    before = images.clone()
    parts = script.make_loss(cfg)(state.model, state.trunk, batch, seeded(seed))
    assert torch.equal(images, before), "the images of the batch were changed"
    return parts["cross_entropy"].detach()


NOTHING = ["classification.mixup=0", "classification.cutmix=0", "classification.random_erasing=0"]


def test_without_mixing_the_loss_is_smoothed_cross_entropy(arguments):
    cfg, _ = opened("classification", arguments("x", *NOTHING))
    state = finetuning.make_state(script.TASK, cfg, torch.device("cpu"), with_weights=True)
    with torch.no_grad():
        state.model["head"].linear.weight.normal_(generator=seeded(3))
    images = normalize(torch.randint(256, (4, 3, 16, 16), generator=seeded(1), dtype=torch.uint8))
    logits = script.predict(cfg, state.model, state.trunk, images)
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 1]), label_smoothing=0.1)
    torch.testing.assert_close(loss_of(arguments("x", *NOTHING)), expected.detach())


@pytest.mark.parametrize("kept", ["mixup", "cutmix", "random_erasing"])
def test_what_is_done_to_a_batch_follows_from_its_seed(arguments, kept):
    pytest.importorskip("timm")
    value = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 1.0}[kept]
    own = arguments("x", *NOTHING, f"classification.{kept}={value}")
    first, again, other = loss_of(own, 0), loss_of(own, 0), loss_of(own, 1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, loss_of(arguments("x", *NOTHING)))


def test_rand_augment_follows_from_seed_and_position(classes, arguments):
    pytest.importorskip("timm")
    cfg, images = opened("classification", arguments("x"))
    maker = script.LabelledCrops(cfg)
    first, again, other = (maker.make(images[7], position)[0] for position in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    image, label = maker.make(images[7], 3)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    assert label == 1, "the eighth of six images per class is green"


def test_labels_per_class_choose_by_the_seed(arguments):
    def chosen(*more: str) -> list[int]:
        cfg, images = script.TASK.open_data(finetuning.load(script.TASK, arguments("x", *more)))
        assert cfg.data.images_per_epoch == len(images)
        return images.rows.tolist()

    two = chosen("classification.labels_per_class=2")
    assert [row // 6 for row in two] == [0, 0, 1, 1, 2, 2]
    assert (
        two
        == chosen("classification.labels_per_class=2")
        != chosen("classification.labels_per_class=2", "train.seed=1")
    )
    assert len(chosen("classification.labels_per_class=0.5")) == 9
    assert len(chosen()) == 18


def evaluated(weights: Path, dataset: Path | str, output_dir: Path, *more: str) -> int:
    return eval_finetuned.main(
        [f"model_loader_kwargs.pretrained_weights={weights}", f"test_dataset_name={dataset}",
         f"output_dir={output_dir}", "device=cpu", "num_workers=0", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(classes, pretrained, tmp_path_factory) -> Path:
    """An export whose head has been set so that it predicts different classes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert script.main(CASE.arguments(classes, f"pretrained_weights={pretrained}", run, "optim.total_iters=1")) == 0
    state = torch.load(run / "model.pth", weights_only=True)
    state["head.linear.weight"] = torch.randn(3, 32, generator=seeded(0))
    torch.save(state, run / "model.pth")
    return run / "model.pth"


def test_scores_are_those_of_the_predictions_one_by_one(finished, classes, tmp_path):
    assert evaluated(finished, classes / "test", tmp_path, "batch_size=5") == 0
    scores = json.loads((tmp_path / "results_finetuned.json").read_text())["results"]["finetuned"]
    model, right = finetuning.load_model(finished), {name: [] for name in CLASS_COLOURS}
    for number, name in enumerate(CLASS_COLOURS):
        for path in sorted((classes / "test" / name).iterdir()):
            image = Image.open(path).resize((18, 22), Image.Resampling.BICUBIC).crop((1, 3, 17, 19))
            pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
            with torch.no_grad():
                right[name].append(int(model.predict(normalize(pixels)).argmax()) == number)
    assert 0 < sum(map(sum, right.values())) < 12, "all right or all wrong tells nothing"
    assert scores["top1"] == pytest.approx(np.mean([hit for hits in right.values() for hit in hits]))
    assert scores["mean_acc"] == pytest.approx(np.mean([np.mean(hits) for hits in right.values()]))
    assert scores["num_images"] == 12


def test_classes_of_a_test_set_are_matched_by_name(finished, classes, tmp_path):
    for name in ("green", "red"):  # numbers 0 and 1 there, 1 and 2 in training
        shutil.copytree(classes / "test" / name, tmp_path / "two" / name)
    assert evaluated(finished, tmp_path / "two", tmp_path / "part") == 0
    assert evaluated(finished, classes / "test", tmp_path / "all") == 0
    part, whole = (json.loads((tmp_path / name / "results_finetuned.json").read_text())["results"]["finetuned"]
                   for name in ("part", "all"))  # fmt: skip
    blue = 12 * whole["top1"] - 8 * part["top1"]
    assert math.isclose(blue, round(blue), abs_tol=1e-6) and 0 <= round(blue) <= 4


def test_evaluations_of_frozen_features_take_a_fine_tuned_model(finished):
    model = finetuning.load_model(finished).eval()
    backbone = model.model["backbone"]
    images = torch.randn(1, 3, 16, 16, generator=seeded(0))
    torch.testing.assert_close(model(images).feature_map, backbone(images).feature_map)
    untrained = finetuning.load_model(config_path=finished.with_suffix(".yaml"))
    assert untrained.state_dict().keys() == model.state_dict().keys()


def test_a_dry_run_says_what_would_be_trained(arguments, capsys):
    assert script.main([*arguments("never"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "18 images" in said and "blue, green, red" in said and "lr of the head" in said
    assert script.main([*arguments("never"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["classification"]["pooling"] == "avg_patch"


def test_what_changes_the_rest_of_a_training_is_warned_of_when_it_goes_on(arguments, tmp_path):
    assert script.main(arguments("run", "optim.total_iters=3")) == 0
    assert script.main(arguments("run", "classification.mixup=0.1", "backbone.drop_path_rate=0.2")) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    (said,) = (line for line in log.splitlines() if "other than at the checkpoint" in line)
    assert "classification.mixup 0.8 -> 0.1" in said and "backbone.drop_path_rate 0.1 -> 0.2" in said
    assert "optim.total_iters 3 -> 6" in said and "learning rate" in said


BAD_INPUT = [
    (["classification.labels_per_class=7"], ["labels_per_class=7", "has 6 images"]),
    (["classification.labels_per_class=1.5"], ["classification.labels_per_class=1.5", "fraction up to 1.0"]),
    (["classification.rand_augment=rund-m9"], ["classification.rand_augment=rund-m9"]),
    (["optim.batch_size_per_gpu=3"], ["optim.batch_size_per_gpu=3", "even"]),
    (["data.images_size=18"], ["data.images_size=18", "patches of 4 pixels"]),
    (["backbone.relative_position_bias=true"], ["EncoderDecoder", "relative_position_bias"]),
    (["backbone.model_path=nothere.py"], ["model_path=nothere.py"]),
    (["train.init_from=x.pth"], ["train.init_from", "backbone.model_path"]),
    (["data.decode=gpu"], ["data.decode='gpu'", "use cpu"]),
    (["classification.pooling=mean"], ["classification.pooling='mean'", "avg_patch"]),
]


@pytest.mark.parametrize(("wrong", "named"), BAD_INPUT, ids=lambda value: value[0][:40])
def test_bad_input_names_the_key_and_leaves_no_traceback(arguments, capsys, wrong, named):
    assert script.main([*arguments("wrong"), *wrong]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for words in named:
        assert words in error


def test_folders_that_tell_no_classes_apart_are_named(arguments, classes, tmp_path, capsys):
    shutil.copytree(classes / "train" / "red", tmp_path / "one" / "red")
    assert script.main([*arguments("wrong"), f"data.dataset={tmp_path / 'one'}"]) == 2
    assert "all images are of class 0 (red)" in capsys.readouterr().err


def test_a_damaged_image_is_replaced_and_counted_in_training_and_refused_in_scores(
    arguments, classes, finished, tmp_path, capsys
):
    shutil.copytree(classes / "train", tmp_path / "images")
    (tmp_path / "images" / "red" / "0.png").write_bytes(b"no image")
    own = [f"data.dataset={tmp_path / 'images'}", "data.max_bad_fraction=0.5", "optim.total_iters=5"]
    assert script.main([*arguments("run"), *own]) == 0
    (line,) = (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("0.png")
    assert evaluated(finished, tmp_path / "images", tmp_path / "scores") == 2
    assert "0.png" in capsys.readouterr().err


def test_models_of_other_things_predict_nothing(finished, pretrained, classes, tmp_path, capsys):
    assert evaluated(pretrained, classes / "test", tmp_path / "a", "model_path=model.py") == 2
    assert "its models predict nothing; use finetuning.py" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no configuration of a fine-tuning"):
        finetuning.load_model(pretrained)
    assert evaluated(finished, ROOT / "nothere", tmp_path / "b") == 2
    assert evaluated(finished, classes / "test", tmp_path / "c", "resolution=18") == 2
    assert "resolution=18" in capsys.readouterr().err


def test_epochs_are_counted_in_the_images_that_are_there(arguments, tmp_path):
    own = ["optim.epochs=2", "optim.batch_size_per_gpu=6", "classification.labels_per_class=4"]
    assert script.main(arguments("run", *own)) == 0
    assert logged_steps(tmp_path / "run") == 4, "two passes over twelve images in batches of six"
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (resolved["data"]["images_per_epoch"], resolved["optim"]["total_iters"]) == (12, 4)


@pytest.mark.parametrize(
    "named", ["os.system", "subprocess.Popen", "utils.UserError", "model.Transformer", "nothere.A"]
)
def test_a_configuration_of_someone_else_cannot_have_anything_called(finished, tmp_path, named):
    sections = yaml.safe_load(finished.with_suffix(".yaml").read_text())
    sections["backbone"] |= {"architecture": named, "arguments": {}}
    shutil.copy(finished, tmp_path / "model.pth")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match=r"backbone\.architecture=.*is no backbone of this repository"):
        finetuning.load_model(tmp_path / "model.pth")


def test_a_checkpoint_that_is_not_there_is_named_by_its_key(arguments, tmp_path, capsys):
    assert script.main(arguments("run", f"train.resume_from={tmp_path / 'nope'}")) == 2
    assert "train.resume_from" in capsys.readouterr().err
