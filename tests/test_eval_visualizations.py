"""Pictures: each number in them against an oracle, and the command as it is typed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import make_images, tiny
from conftest import ROOT, run_cli, seeded
from golden_cae import NARROW, save_tokenizer
from golden_cae import tiny_run as cae_run
from golden_ijepa import STOP_NOISE, tiny_run
from PIL import Image
from ranks import run_on_ranks
from torch import nn

import eval_visualizations as vis
import train_cae
import train_capi
import train_ijepa
from checkpoint import Checkpoints
from clustering import OnlineClustering, normalize_features
from config import load_config
from evaluation import EvaluationConfig, FrozenModel, hash_weights, load_model_file
from reading.sources import make_dataset
from report import write_report
from utils import UserError

WIDTH = 16
MODEL = '''
import torch
from torch import nn
class Tiny(nn.Module):
    """Patches through a random layer, then a normalisation; registers come first."""
    patch_size = 4
    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(48, width, generator=generator))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.decoder_norm = nn.LayerNorm(width, elementwise_affine=False)
    def forward(self, images):
        patches = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
        tokens = torch.cat([torch.zeros(len(patches), 2, self.weight.shape[1]), torch.tanh(patches @ self.weight)], 1)
        out = self.norm(tokens)
        self.decoder_norm(tokens + 1)
        grid = images.shape[-2] // 4, images.shape[-1] // 4
        return out.mean(1), out[:, :2], out[:, 2:].unflatten(1, grid)
def __model_loader__(width=16):
    return Tiny(width)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    make_images(root / "images", num=7, size=24)
    (root / "tiny.py").write_text(MODEL)
    return root


def arguments(place, output_dir, *more):
    return [
        f"model_path={place / 'tiny.py'}",
        f"output_dir={output_dir}",
        f"dataset_name=custom://Images?root='{place / 'images'}'",
        "resolution=16",
        "image_components=3",
        "joint_components=4",
        "num_overview=2",
        "num_workers=0",
        "device=cpu",
        *more,
    ]


def run(*args):
    return vis.main(arguments(*args))


def results_in(folder):
    return json.loads((folder / "results_visualizations.json").read_text())["results"]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


# -------------------------------------------------------------------------------------- choices, norms, matches


@pytest.mark.parametrize(("total", "num"), [(100, 7), (20210, 1024), (10, 10), (5, 8), (9, 1), (1, 1)])
def test_images_are_evenly_spaced(total, num):
    chosen = vis.evenly_spaced(total, num)
    assert len(chosen) == len(set(chosen)) == min(total, num)
    assert chosen[0] == 0
    assert chosen[-1] == (total - 1 if num > 1 else 0)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1, "the distances differ by at most one"


def test_planted_outliers_are_found_and_no_others():
    norms = 40 + 3 * torch.randn(20, 64, generator=seeded(0))
    planted = [(0, 3), (7, 60), (7, 61)]
    for place in planted:
        norms[place] = 120
    assert (norms > vis.outlier_cutoff(norms)).nonzero().tolist() == [list(place) for place in planted]


def test_norms_that_differ_by_rounding_have_no_outliers():
    norms = torch.full((50, 20), 13.85) + 1e-6 * torch.randn(50, 20, generator=seeded(0)).pow(3)
    assert not (norms > vis.outlier_cutoff(norms)).any()


def test_a_patch_is_nearest_to_itself_and_to_its_copies():
    x = torch.randn(4, 9, 5, generator=seeded(0))
    x[2, 7] = 3 * x[1, 4]
    similarity = vis.cosine_similarity(x, x[1, 4])
    assert similarity[1].argmax() == 4
    torch.testing.assert_close(similarity[1, 4], torch.tensor(1.0))
    matches = vis.best_matches(similarity, [10, 20, 30, 40], vis.Query(20, 1, 1), 2, columns=3)
    assert matches[0] == [30, 2, 1, 1.0], "the copy is the best match, and the image of the query is none"
    assert len(matches) == 2
    assert matches[1][0] in (10, 40)


def test_assignments_are_those_of_the_training_head():
    head = OnlineClustering(WIDTH, 12, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    nn.init.normal_(head.layer.bias)
    x = torch.randn(3, 10, WIDTH, generator=seeded(0))
    weights = vis.ClusteringHead(head.layer.weight.detach(), head.layer.bias.detach(), is_teacher=None)
    logits = head.layer(normalize_features(x))
    assert torch.equal(weights.assign(x), logits.argmax(dim=-1))


def test_colours_of_clusters_differ_where_they_are_used_most():
    usage = torch.randint(1, 100, (300,), generator=seeded(0))
    colors = vis.cluster_colors(usage)[usage.argsort(descending=True)[:12]].int()
    distance = (colors[:, None] - colors[None]).abs().sum(dim=-1) + 999 * torch.eye(12, dtype=torch.int32)
    assert distance.min() > 40


def test_codes_are_optimal():
    x = torch.randn(200, 6, generator=seeded(0)).double()
    atoms = torch.nn.functional.normalize(torch.randn(4, 6, generator=seeded(1)).double(), dim=1)
    codes = vis.sparse_codes(x, atoms)
    # Karush-Kuhn-Tucker: the slope is 0 where a code is positive, and upwards where it is 0.
    slope = (codes @ atoms - x) @ atoms.T + vis.DICTIONARY_ALPHA
    used = codes > 0
    assert 0.3 < used.double().mean() < 0.7, "both cases must occur"
    assert (codes >= 0).all()
    assert slope[used].abs().max() < 1e-5
    assert slope[~used].min() > -1e-5


def test_codes_mix_the_fixed_colours():
    colors = vis.mix_colors(torch.tensor([[2.0, 0, 0], [0, 1, 1], [0, 0, 0]]))
    blue, vermillion, green = (torch.tensor(list(bytes.fromhex(c[1:]))).float() for c in vis.PALETTE[:3])
    assert colors[0].tolist() == blue.tolist()
    assert (colors[1].float() - (vermillion + green) / 2).abs().max() <= 1
    assert colors[2].tolist() == [220, 220, 220]


def test_norms_are_measured_before_the_final_normalisation(place):
    model = FrozenModel(
        load_model_file(str(place / "tiny.py"), {}),
        EvaluationConfig(output_dir="unused"),
        torch.device("cpu"),
        "tiny.py",
    )
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=seeded(0))
    layers = {"norm": model.module.norm, "decoder_norm": model.module.decoder_norm}
    with vis.NormInputs(layers) as inputs:
        x = model(images).feature_map.flatten(1, 2)
        found = inputs.before(x)
    assert found is not None
    name, before = found
    assert name == "norm"
    torch.testing.assert_close(nn.functional.layer_norm(before, (WIDTH,)), x)
    assert x.norm(dim=-1).std() < 1e-3 < before.norm(dim=-1).std()
    assert inputs.before(x) is None, "a pass is forgotten once it was asked for"


class Plain(nn.Module):
    patch_size = 4

    def forward(self, images):
        patches = nn.functional.avg_pool2d(images, 4)
        return patches.mean(dim=(2, 3)), None, patches.movedim(1, -1)


def test_a_model_without_final_normalisation_is_measured_as_it_is():
    model = FrozenModel(Plain(), EvaluationConfig(output_dir="unused"), torch.device("cpu"), "plain.py")
    with vis.NormInputs(dict(model.module.named_modules())) as inputs:
        assert inputs.before(model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).feature_map.flatten(1, 2)) is None


# ------------------------------------------------------------------------------------------------ the whole thing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run whose checkpoint has a clustering head of width 16 and 5 prototypes."""
    folder = tmp_path_factory.mktemp("run")
    head = OnlineClustering(WIDTH, 5, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    modules = {"clustering": head, "student_ema": nn.ModuleDict({"backbone": nn.Linear(3, 2)})}
    Checkpoints(folder, keep=1).save(7, modules=modules, optimizers={}, extra={}, rank_extra={}, config_yaml="")
    return folder


@pytest.fixture(scope="module")
def drawn(place, checkpoint, tmp_path_factory):
    """The output of one run with every kind of picture."""
    output = tmp_path_factory.mktemp("drawn")
    everything = "pictures=[image_pca,joint_pca,norms,nearest,clusters,dictionary]"
    assert run(place, output, everything, f"clustering_checkpoint={checkpoint}", "dictionary_atoms=[3]") == 0
    return output


def test_every_picture_is_there_with_a_square_for_each_patch(drawn):
    kinds = {str(path.parent.relative_to(drawn / "artifacts")) for path in drawn.rglob("0*.png")}
    signs = {f"rgb_{a}{b}{c}" for a in "pn" for b in "pn" for c in "pn"} - {"rgb_ppp"} | {"rgb"}
    expected = {"norms", "nearest", "clusters", "dictionary/3_atoms"}
    expected |= {f"image_pca/{name}" for name in signs} | {f"image_pca/component_{i}" for i in (1, 2, 3)}
    expected |= {f"joint_pca/{name}" for name in signs} | {f"joint_pca/component_{i}" for i in (1, 2, 3, 4)}
    assert kinds == expected
    for kind in kinds:
        files = sorted(path.name for path in (drawn / "artifacts" / kind).iterdir())
        assert files == [f"{i:06d}.png" for i in range(7)], kind
        picture = pixels(drawn / "artifacts" / kind / "000003.png")
        assert picture.shape == (16, 16, 3), kind
        squares = picture.reshape(4, 4, 4, 4, 3)
        if kind != "clusters":  # has borders
            assert (squares == squares[:, :1, :, :1]).all(), f"{kind}: a patch has one colour"
    for figure in ("overview", "norms", "nearest"):
        path = drawn / "artifacts" / f"{figure}.png"
        assert pixels(path).std() > 20, f"{figure}.png is empty"
        assert path.stat().st_size < 1e6


def test_pictures_may_be_no_squares(place, checkpoint, tmp_path):
    more = ["resolution=[8,24]", "query=[3,1,5]", f"clustering_checkpoint={checkpoint}", "dictionary_atoms=[3]"]
    assert run(place, tmp_path, "pictures=[image_pca,norms,nearest,clusters,dictionary]", *more) == 0
    for kind in ("image_pca/rgb", "norms", "nearest", "clusters", "dictionary/3_atoms"):
        picture = pixels(tmp_path / "artifacts" / kind / "000003.png")
        assert picture.shape == (8, 24, 3), kind
        squares = picture.reshape(2, 4, 6, 4, 3)
        assert kind == "clusters" or (squares == squares[:, :1, :, :1]).all(), f"{kind}: a patch has one colour"
    nearest = pixels(tmp_path / "artifacts" / "nearest" / "000003.png").sum(axis=2)
    assert nearest[4, 20] == nearest.max(), "the query is elsewhere"
    assert all(row < 2 and column < 6 for _, row, column, _ in results_in(tmp_path)["nearest"]["best_matches"])
    with pytest.raises(UserError, match="row and column must be below 2 and 6"):
        vis.check_query([3, 5, 1], 7, (2, 6))


def test_a_flipped_sign_inverts_its_colour(drawn):
    rgb, flipped = (pixels(drawn / "artifacts" / "image_pca" / name / "000002.png") for name in ("rgb", "rgb_pnp"))
    assert np.array_equal(rgb[..., [0, 2]], flipped[..., [0, 2]])
    assert np.abs(rgb[..., 1] + flipped[..., 1] - 255).max() <= 1
    assert rgb[..., 1].std() > 20


def test_results_say_what_the_pictures_show(drawn):
    results = results_in(drawn)
    for kind, num in (("image_pca", 3), ("joint_pca", 4)):
        shares = results[kind]["explained_variance_ratio"]
        assert len(shares) == num
        assert sorted(shares, reverse=True) == shares
        assert 0 < sum(shares) <= 1
    assert results["norms"]["of"] == "tokens before norm"
    assert results["norms"]["min"] < results["norms"]["median"] < results["norms"]["max"]
    assert results["nearest"]["query"] == [0, 2, 2]
    assert 1 <= results["clusters"]["used"] <= results["clusters"]["num_clusters"] == 5
    assert results["clusters"]["is_its_teacher"] is False
    assert 0 < results["dictionary"]["explained_variance"]["3"] < 1


def test_what_is_there_is_not_drawn_again_and_what_is_asked_for_anew_is(place, checkpoint, drawn, caplog):
    same = ["pictures=[image_pca,norms,nearest]", "dictionary_atoms=[3]", f"clustering_checkpoint={checkpoint}"]
    watched = [drawn / "artifacts" / kind / "000001.png" for kind in ("image_pca/rgb", "norms", "nearest")]
    before = [path.stat().st_mtime_ns for path in watched]
    assert run(place, drawn, *same) == 0
    assert [path.stat().st_mtime_ns for path in watched] == before
    assert run(place, drawn, *same, "query=[3,0,1]") == 0
    after = [path.stat().st_mtime_ns for path in watched]
    assert after[:2] == before[:2], "only the nearest patches depend on the query"
    assert after[2] > before[2]
    assert results_in(drawn)["nearest"]["query"] == [3, 0, 1]
    assert set(results_in(drawn)) == {"image_pca", "joint_pca", "norms", "nearest", "clusters", "dictionary"}
    assert run(place, drawn, *same, "whiten=false") == 2, "another config needs another folder"


def test_the_overview_names_the_patch_that_its_similarities_are_to(place, tmp_path):
    query = "query=[3,0,1]"
    assert run(place, tmp_path / "both", "pictures=[norms,nearest]", query) == 0
    for one in (["pictures=[nearest]", query], ["pictures=[norms]"]):
        assert run(place, tmp_path / "each", *one) == 0
    both, each = (pixels(tmp_path / name / "artifacts" / "overview.png") for name in ("both", "each"))
    assert np.array_equal(both, each), "it names the patch of the last command"


def pictures_on_rank(args):
    vis.EVALUATION.run(load_config(vis.VisualizationsConfig, None, args), torch.device("cpu"))


def test_two_ranks_draw_what_one_draws(place, checkpoint, tmp_path):
    more = [
        "pictures=[image_pca,joint_pca,norms,nearest,clusters,dictionary]",
        f"clustering_checkpoint={checkpoint}",
        "dictionary_atoms=[3]",
        "batch_size=3",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    pictures_on_rank(arguments(place, one, *more))
    run_on_ranks(pictures_on_rank, 2, arguments(place, two, *more))
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*.png")} for folder in (one, two)]
    assert names[0] == names[1]
    worst = {name: np.abs(pixels(one / name) - pixels(two / name)).max() for name in names[0] if "/0" in name}
    assert len(worst) > 150
    assert max(worst.values()) <= 1, f"differ: {[name for name, by in worst.items() if by > 1]}"

    def flat(tree):
        return [x for v in tree.values() for x in (flat(v) if isinstance(v, dict) else np.ravel(v).tolist())]

    a, b = flat(results_in(one)), flat(results_in(two))
    assert all(x == pytest.approx(y, rel=1e-3) if isinstance(x, float) else x == y for x, y in zip(a, b, strict=True))


def test_joint_components_alone_are_drawn_by_two_ranks(place, tmp_path):
    run_on_ranks(pictures_on_rank, 2, arguments(place, tmp_path, "pictures=[joint_pca]"))
    assert len(list((tmp_path / "artifacts" / "joint_pca" / "rgb").iterdir())) == len(
        list((place / "images").iterdir())
    )


def test_command_as_typed(tmp_path):
    images = ROOT / "demo_data" / "emoji_on_scenes" / "val" / "images"
    override = (
        "model_loader_kwargs.config_override={model: {patch_size: 16, transformers_kwargs: {embed_dim: 32, "
        "block_kwargs: {attn_kwargs: {num_heads: 2}}}, encoder_kwargs: {depth: 1}, decoder_kwargs: {depth: 1}}}"
    )
    done = run_cli(
        "eval_visualizations.py",
        f"output_dir={tmp_path}",
        f"dataset_name=custom://Images?root='{images}'",
        override,
        "resolution=96",
        "num_images=4",
        "device=cpu",
        "num_workers=0",
    )
    assert done.returncode == 0, done.stderr
    assert "no clusters are drawn" in done.stderr
    assert "clustering_checkpoint" in done.stderr
    assert set(results_in(tmp_path)) == {"image_pca", "joint_pca", "norms", "nearest"}
    kinds = sorted(path.name for path in (tmp_path / "artifacts").iterdir())
    assert kinds == ["image_pca", "joint_pca", "nearest", "nearest.png", "norms", "norms.png", "overview.png"]
    chosen = sorted(path.stem for path in (tmp_path / "artifacts" / "image_pca" / "rgb").iterdir())
    assert chosen == ["000000", "000006", "000013", "000019"]


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resolution=18"], r"resolution=18: must be a multiple of 4, the patch size of .*tiny.py; the nearest is 16"),
        (["resolution=2"], "the nearest is 4"),
        (["query=[0,4,0]"], r"query=\[0, 4, 0\]: row and column must be below 4"),
        (["query=[7,0,0]"], r"query=\[7, 0, 0\]: the data set has 7 images"),
        (["query=[1,2]"], r"query=\[1, 2\]: must be \[number of the image, row, column\]"),
        (["image_components=16"], "image_components=16: an image of 16 pixels has 16 patches, .* raise resolution"),
        (["num_images=1", "joint_components=16"], "joint_components=16: all images .* 16 patches, .* num_images"),
        (["joint_components=17"], "joint_components=17: must be at most 16, the width of the features"),
        (["image_components=2"], "image_components=2: must be at least 3"),
        (["pictures=[pca]"], "pictures='pca': must be one of image_pca, joint_pca"),
        (["pictures=[]"], r"pictures=\[\]: must name at least one of"),
        (["dictionary_atoms=[11]"], r"dictionary_atoms=\[11\]: must be numbers from 2 to 10"),
        (["outlier_norm=0"], "outlier_norm=0.0: must be above 0"),
        (["num_images=0"], "num_images=0: must be at least 1"),
        (["clustering_checkpoint=/nowhere"], "clustering_checkpoint='/nowhere': there is no such file"),
    ],
)
def test_bad_values_name_the_key_and_the_remedy(place, tmp_path, capsys, overrides, message):
    assert run(place, tmp_path, *overrides) == 2
    assert re.search(message, capsys.readouterr().err)


def test_more_images_than_there_are_draws_all_and_says_so(place, tmp_path, capsys):
    assert run(place, tmp_path, "num_images=8", "pictures=[norms]") == 0
    assert "num_images=8: the data set has 7 images, all are drawn" in capsys.readouterr().err


def test_clusters_of_a_checkpoint_that_has_changed_are_drawn_again(place, tmp_path):
    found = []
    for num_clusters in (5, 7, 7):
        if num_clusters not in found:
            torch.save({"clustering.layer.weight": torch.randn(num_clusters, 16)}, tmp_path / "head.pth")
        out = tmp_path / "out"
        assert run(place, out, f"clustering_checkpoint={tmp_path / 'head.pth'}", "pictures=[clusters]") == 0
        found.append(results_in(out)["clusters"]["num_clusters"])
    assert found == [5, 7, 7]


def test_clustering_head_must_fit_be_there_and_be_readable(place, checkpoint, tmp_path, capsys):
    def message(source, *more):
        assert run(place, tmp_path / "out", f"clustering_checkpoint={source}", "pictures=[clusters]", *more) == 2
        return capsys.readouterr().err

    assert "takes features of width 16, and the model gives 8" in message(checkpoint, "model_loader_kwargs.width=8")
    (tmp_path / "empty").mkdir()
    assert "has no training checkpoint; give the run's folder" in message(tmp_path / "empty")
    torch.save({"backbone.weight": torch.zeros(2)}, tmp_path / "student.pth")
    assert "has no tensor clustering.layer.weight" in message(tmp_path / "student.pth")
    for unfit, says in (
        (torch.full((7, 16), torch.nan), "not all finite: layer.weight (112 of 112 values)"),
        (torch.ones(7, 16, dtype=torch.int64), "layer.weight (int64)"),
        ({"nested": 3}, "has no tensor clustering.layer.weight"),
    ):
        torch.save({"clustering.layer.weight": unfit}, tmp_path / "unfit.pth")
        assert says in message(tmp_path / "unfit.pth")
    step = Checkpoints(checkpoint, keep=1).newest()
    assert step is not None
    for size in (0, 40, 900):
        damaged = tmp_path / f"damaged{size}"
        damaged.mkdir()
        for file in step.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes()[: size if file.suffix == ".distcp" else None])
        assert re.search(r"cannot be read: .*\w", message(damaged)), f"{size} bytes are left"


def test_clustering_head_of_a_file_is_that_of_the_checkpoint(place, checkpoint, tmp_path):
    module = nn.Linear(1, 1)
    of_run = vis.read_clustering_head(str(checkpoint), module, WIDTH)
    torch.save(
        {"clustering.layer.weight": of_run.weight, "clustering.layer.bias": of_run.bias}, Path(tmp_path / "head.pth")
    )
    of_file = vis.read_clustering_head(str(tmp_path / "head.pth"), module, WIDTH)
    assert torch.equal(of_run.weight, of_file.weight)
    assert of_file.is_teacher is None
    with pytest.raises(UserError, match="width 16, and the model gives 3"):
        vis.read_clustering_head(str(checkpoint), module, 3)


# ------------------------------------------------------------------------------------------------------ predictions

TRAINING = '''
import torch
from checkpoint import read_weights
from pictures import PatchPredictor, Prediction
class Store(torch.nn.Module):
    def __init__(self, wanted):
        super().__init__()
        self.register_buffer("wanted", wanted)
    def init_weights(self):
        self.wanted.normal_()
class Oracle(PatchPredictor):
    """Predicts at fixed positions what the checkpoint has in store."""
    def __init__(self, wanted):
        super().__init__()
        self.student = torch.nn.ModuleDict({"store": Store(wanted)})
    def forward(self, image, seed, num_draws):
        wanted = self.student["store"].wanted
        visible = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor([0, 5]), True)
        return Prediction(visible, torch.tensor([1, 6, 11]), {"kept": wanted, "turned": wanted.flip(0)})
    def targets(self, features):
        return 3 * features
def __predictor_loader__(checkpoint, resolution):
    return Oracle(read_weights(checkpoint, "student")["wanted"])
'''
IN_STORE = [(3, 7), (5, 2), (0, 4)]
"""(image, patch) whose features are predicted; of the first one also for itself."""


@pytest.fixture(scope="module")
def oracle(place):
    """A folder with a model file, the script that trains it, and a run whose student predicts known patches."""
    (place / "predicting.py").write_text(MODEL + '\n__trained_by__ = "training.py"\n')
    (place / "training.py").write_text(TRAINING)
    cfg = EvaluationConfig(output_dir="unused")
    model = FrozenModel(load_model_file(str(place / "predicting.py"), {}), cfg, torch.device("cpu"), "predicting.py")
    dataset = make_dataset(f"custom://Images?root='{place / 'images'}'")
    squares = torch.stack([vis.squashed(dataset[i].image(), 16) for i in range(len(dataset))])
    features = model(squares).feature_map.flatten(1, 2)
    student = nn.Module()
    student.register_buffer("wanted", torch.stack([2 * features[at] for at in IN_STORE]))
    modules = {"student": student, "student_ema": nn.ModuleDict({"backbone": model.module})}
    Checkpoints(place / "run", keep=1).save(7, modules=modules, optimizers={}, extra={}, rank_extra={}, config_yaml="")
    return place, squares.movedim(1, -1).numpy().astype(int), features


def predicted(oracle, output_dir, *more):
    place, *_ = oracle
    given = ["pictures=[predictions]", f"model_path={place / 'predicting.py'}", f"predictor_checkpoint={place / 'run'}"]
    return run(place, output_dir, *given, *more)


def patch_at(picture, patch):
    row, column = (4 * place for place in divmod(patch, 4))
    return picture[row : row + 4, column : column + 4]


def test_a_predicted_patch_is_shown_pixel_for_pixel_and_never_of_the_same_image(oracle, tmp_path):
    _, images, features = oracle
    assert predicted(oracle, tmp_path) == 0
    others = torch.nn.functional.normalize(features, dim=-1)
    similarity = others @ others[0, 4]
    similarity[0] = -2
    second_best = divmod(int(similarity.argmax()), 16)
    for number, last in ((0, second_best), (6, (0, 4))):  # the first and the last image
        expected = {1: IN_STORE[0], 6: IN_STORE[1], 11: last}
        for title, order in (("kept", [1, 6, 11]), ("turned", [11, 6, 1])):
            picture = pixels(tmp_path / "artifacts" / "predictions" / title / f"00000{number}.png")
            for position, source in zip([1, 6, 11], order, strict=True):
                image, patch = expected[source]
                shown = patch_at(picture, position)
                assert np.array_equal(shown, patch_at(images[image], patch)), (number, title, position)
            for position in range(16):
                if position in (0, 5):
                    assert np.array_equal(patch_at(picture, position), patch_at(images[number], position))
                elif position not in expected:
                    assert (patch_at(picture, position) == vis.HIDDEN).all(), "neither seen nor predicted"
        seen = pixels(tmp_path / "artifacts" / "predictions" / "visible" / f"00000{number}.png")
        assert [p for p in range(16) if (patch_at(seen, p) != vis.HIDDEN).any()] == [0, 5]
    results = results_in(tmp_path)["predictions"]
    assert results["draws"] == ["kept", "turned", "random weights"]
    assert results["is_its_teacher"] is True
    assert results["predicted_patches"] == 6, "three in each of two images"
    assert results["median_similarity"]["kept"] == pytest.approx(1.0)
    assert results["median_similarity"]["random weights"] < 0.9


def test_other_batches_and_ranks_show_the_same_predictions(oracle, tmp_path):
    assert predicted(oracle, tmp_path / "one", "batch_size=1") == 0
    assert predicted(oracle, tmp_path / "three", "batch_size=3") == 0
    place, *_ = oracle
    given = ["pictures=[predictions]", f"model_path={place / 'predicting.py'}", f"predictor_checkpoint={place / 'run'}"]
    run_on_ranks(pictures_on_rank, 2, arguments(place, tmp_path / "ranks", *given))
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.png"))
    assert len(names) == 4 * 2 + 1
    for other in ("three", "ranks"):
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / other / name).read_bytes(), (other, name)


def test_predictions_that_are_there_are_kept_and_those_of_another_request_are_not(oracle, tmp_path):
    picture = tmp_path / "artifacts" / "predictions" / "kept" / "000000.png"
    assert predicted(oracle, tmp_path) == 0
    first = picture.stat().st_mtime_ns
    assert predicted(oracle, tmp_path) == 0
    assert picture.stat().st_mtime_ns == first
    assert predicted(oracle, tmp_path, "prediction_draws=5") == 0
    assert picture.stat().st_mtime_ns > first


def test_best_patches_are_found_in_parts_as_at_once(monkeypatch):
    x, queries = torch.randn(5, 9, 8, generator=seeded(0)), torch.randn(23, 8, generator=seeded(1))
    similarity = torch.nn.functional.cosine_similarity(x[:, None], queries[None, :, None], dim=-1)  # [b, q, n]
    monkeypatch.setattr(vis, "QUERIES_AT_A_TIME", 7)
    rows = vis.best_patches(x, queries)
    torch.testing.assert_close(rows[..., 0], similarity.amax(dim=2))
    assert torch.equal(rows[..., 1].long(), similarity.argmax(dim=2))


TRAININGS = {
    "CAPI": (train_capi, tiny, "model.py", 16, ["most likely", "draw 1", "draw 2", "draw 3"]),
    "moving average": (
        train_capi,
        lambda *run: tiny(*run, "capi.targets=ema_head", "capi.student_head=mlp"),
        "model.py",
        16,
        ["most likely", "draw 1", "draw 2", "draw 3"],
    ),
    "latents": (train_capi, lambda *run: tiny(*run, "capi.targets=latents"), "model.py", 16, ["predicted"]),
    "I-JEPA": (train_ijepa, tiny_run, "ijepa.py", 32, ["predicted"]),
    "CAE": (train_cae, lambda *run: cae_run(*run, NARROW), "cae.py", 32, ["predicted"]),
    "StoP": (train_ijepa, lambda *run: tiny_run(*run, STOP_NOISE), "ijepa.py", 32, ["draw 1", "draw 2", "draw 3"]),
}


LESS_USED = ("moving average", "latents")
of_every_method = pytest.mark.parametrize(
    "trained", [name for name in TRAININGS if name not in LESS_USED], indirect=True, scope="module"
)
"""What does not depend on the targets of a method."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long if name in LESS_USED else ()) for name in TRAININGS],
)
def trained(request, place, tmp_path_factory):
    """What a few steps of a method left, and how its predictions are drawn."""
    script, command, model_path, size, titles = TRAININGS[request.param]
    folder = tmp_path_factory.mktemp("trained")
    if script is train_cae:
        save_tokenizer(place / "images")
    assert script.main(command(place / "images", folder)) == 0
    return folder, script, model_path, size, titles


def exported(folder):
    """The weights that a training exports of its teacher."""
    average, student = folder / "student_ema.pth", folder / "student.pth"
    return average if average.is_file() else student


def predictions_of(trained, place, output_dir, *more):
    folder, _, model_path, size, _ = trained
    return vis.main(
        [
            f"model_path={model_path}",
            f"model_loader_kwargs.pretrained_weights={exported(folder)}",
            f"dataset_name=custom://Images?root='{place / 'images'}'",
            f"output_dir={output_dir}",
            f"resolution={size}",
            "num_overview=2",
            "num_workers=0",
            "device=cpu",
            *more,
        ]
    )


def test_every_method_finds_its_run_and_draws_what_it_predicts(trained, place, tmp_path):
    assert predictions_of(trained, place, tmp_path, "pictures=[predictions]") == 0
    results = results_in(tmp_path)["predictions"]
    folder, _, _, size, titles = trained
    assert str(folder / "checkpoints" / "step_000000006") in results["read_from"]
    assert results["is_its_teacher"] is True
    assert results["draws"] == [*titles, "random weights"]
    for title in ("visible", *results["draws"]):
        for number in (0, 6):
            path = tmp_path / "artifacts" / "predictions" / title.replace(" ", "_") / f"00000{number}.png"
            assert pixels(path).shape == (size, size, 3)
    figures = [path.name for path in (tmp_path / "artifacts").glob("*.png")]
    assert figures == ["predictions.png"], "an overview without columns says nothing"
    assert pixels(tmp_path / "artifacts" / "predictions.png").std() > 20, "the figure is empty"


def test_an_evaluation_during_training_finds_the_run_and_its_report_shows_the_predictions(trained, place, tmp_path):
    folder, *_ = trained
    launched = tmp_path / "run" / "evals" / "fast" / "step_000000006"
    launched.mkdir(parents=True)
    shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
    for suffix in (".pth", ".yaml"):
        shutil.copy(exported(folder).with_suffix(suffix), launched / f"weights{suffix}")
    results = launched / "results" / "pictures"
    weights = f"model_loader_kwargs.pretrained_weights={launched / 'weights.pth'}"
    assert predictions_of(trained, place, results, weights, "pictures=[norms,nearest,predictions]") == 0
    entry = json.loads((results / "results_visualizations.json").read_text()) | {"folder": "pictures"}
    write_report(launched / "results" / "report.html", {"name": "a run", "evaluations": {"pictures": entry}})
    page = (launched / "results" / "report.html").read_text()
    assert "<figcaption>predictions, a run</figcaption><img" in page


def test_predictions_follow_from_the_seed_and_differ_where_they_are_stochastic(trained):
    folder, script, _, size, titles = trained
    (step,) = Checkpoints(folder, keep=1).all()[-1:]
    predictor = script.load_predictor(step, size).eval()
    image = torch.randn(3, size, size, generator=seeded(0))
    with torch.no_grad():
        prediction, again, other = (predictor(image, seed, 3) for seed in (1, 1, 2))
    assert list(prediction.draws) == titles
    assert torch.equal(prediction.visible, again.visible)
    assert all(torch.equal(prediction.draws[title], again.draws[title]) for title in titles)
    assert not torch.equal(prediction.visible, other.visible), "another seed hides other patches"
    assert not prediction.visible[prediction.positions].any(), "what is seen is predicted"
    stacked = torch.stack([prediction.draws[title] for title in titles])
    assert len(stacked.flatten(1).unique(dim=0)) == len(titles), "two draws are the same"
    state = torch.get_rng_state()
    random, same = (vis.untrained(predictor, 0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "what is drawn elsewhere changes"
    assert hash_weights(random) == hash_weights(same) != hash_weights(predictor)
    with torch.no_grad():
        control = random(image, 1, 3)
    assert torch.equal(control.visible, prediction.visible), "random weights see another part"
    assert not torch.equal(control.draws[titles[0]], prediction.draws[titles[0]])


@of_every_method
def test_predictions_are_made_at_sizes_that_were_not_trained(trained, place, tmp_path):
    double = f"resolution={2 * trained[3]}"
    assert predictions_of(trained, place, tmp_path, "pictures=[predictions]", double) == 0
    assert pixels(tmp_path / "artifacts" / "predictions" / "visible" / "000000.png").shape[0] == 2 * trained[3]


@of_every_method
def test_a_model_that_predicts_nothing_is_an_error_only_if_it_was_asked_to(place, trained, tmp_path, capsys):
    assert run(place, tmp_path / "asked", "pictures=[norms,predictions]") == 2
    message = capsys.readouterr().err
    assert "pictures=['norms', 'predictions']" in message
    assert "tiny.py is of models that predict no patches; leave predictions out" in message
    assert run(place, tmp_path / "default") == 0
    assert "predictions" not in results_in(tmp_path / "default")


@of_every_method
def test_a_run_that_is_not_found_or_does_not_fit_is_named(trained, oracle, place, tmp_path, capsys):
    folder, _, model_path, *_ = trained

    def message(*more):
        assert predictions_of(trained, place, tmp_path / "out", *more) == 2
        return capsys.readouterr().err

    away = tmp_path / "away" / "weights.pth"
    away.parent.mkdir()
    for suffix in (".pth", ".yaml"):
        shutil.copy(exported(folder).with_suffix(suffix), away.with_suffix(suffix))
    moved = f"model_loader_kwargs.pretrained_weights={away}"
    assert "predictor_checkpoint=None: no run in the folders above" in message("pictures=[predictions]", moved)
    assert predictions_of(trained, place, tmp_path / "named", moved, f"predictor_checkpoint={folder}") == 0
    capsys.readouterr()
    assert predictions_of(trained, place, tmp_path / "left out", moved) == 0
    assert "no predictions are drawn: name the run" in capsys.readouterr().err
    assert "has no training checkpoint; give the folder of a run" in message(f"predictor_checkpoint={tmp_path}")
    assert "predictor_checkpoint='/nowhere': has no training checkpoint" in message("predictor_checkpoint=/nowhere")
    assert f"give a run of the models of {model_path}" in message(f"predictor_checkpoint={oracle[0] / 'run'}")
    alone = message("pictures=[predictions]", "num_images=1", "output_dir=" + str(tmp_path / "alone"))
    assert "num_images=1: the patches of other images are shown" in alone


@of_every_method
def test_a_damaged_checkpoint_is_an_error_for_who_asks_and_a_warning_for_who_does_not(trained, place, tmp_path, capsys):
    folder, *_ = trained
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    for suffix in (".pth", ".yaml"):
        shutil.copy(exported(folder).with_suffix(suffix), tmp_path / f"weights{suffix}")
    for metadata in (tmp_path / "checkpoints").rglob(".metadata"):
        metadata.write_bytes(metadata.read_bytes()[:40])
    weights = f"model_loader_kwargs.pretrained_weights={tmp_path / 'weights.pth'}"
    assert predictions_of(trained, place, tmp_path / "asked", weights, "pictures=[predictions]") == 2
    assert "predictor_checkpoint=None: a checkpoint in" in capsys.readouterr().err
    assert predictions_of(trained, place, tmp_path / "default", weights) == 0
    assert "no predictions are drawn: predictor_checkpoint=None: a checkpoint in" in capsys.readouterr().err
