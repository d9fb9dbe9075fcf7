"""Pictures of frozen patch features: components, norms, nearest patches, clusters, dictionary atoms, predictions.

    python eval_visualizations.py model_loader_kwargs.pretrained_weights=student_ema.pth output_dir=results/pictures \\
        dataset_name="custom://Images?root='/data/images'" num_images=64 clustering_checkpoint=runs/my_run

Writes results_visualizations.json, and into output_dir/artifacts: overview.png, and one PNG for each picture of each
image, `<kind>/<number of the image in the data set>.png`, of the resolution, with one colour per patch.

    image_pca/rgb          first three principal components of the image's own patches as red, green, blue
    image_pca/rgb_pnp      the same with signs plus, minus, plus; with rgb these are all eight choices
    image_pca/component_1  one component, blue (negative) over grey (0) to red (positive)
    joint_pca/...          likewise, components of the patches of all images together
    norms                  length of the features, outliers in red; norms.png has their distribution and number
    nearest                cosine similarity to one patch, the query; nearest.png has the best matches
    clusters               the prototype of the teacher's clustering head that is most similar, a colour each
    dictionary/3_atoms     parts of sparse non-negative codes, mixed from one colour per atom
    predictions            of a few images, the visible patches, and what the student of the run predicts for hidden
                           ones: there the patches of other images are shown that are most like the predictions

Predictions need a checkpoint of the training; the folder of the run above the weights is found, or is named in
predictor_checkpoint.

The number of ranks does not change a picture by more than a grey level here and there: a sum has another order.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import colorsys
import contextlib
import copy
import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoints, read_tensors
from config import COUNT, POSITIVE, one_of, require, within
from distributed import barrier, broadcast_object, on_rank_0, rank
from evaluation import (
    Evaluation,
    EvaluationConfig,
    Features,
    FrozenModel,
    ImageBatches,
    Results,
    extract,
    find_model_file,
    my_share,
    open_dataset,
    squashed,
)
from pictures import (
    COLOR_RANGE,
    Moments,
    PatchPredictor,
    Prediction,
    image_scores,
    map_colors,
    project,
    rgb_colors,
    show,
    standardize,
    to_bytes,
)
from reading.sources import BadImageError, ImageDataset
from utils import RGB8, Bands, UserError, as_typed, as_written, derive_seed, import_from_path
from weights import check_values, read_state_dict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("visualizations")

PICTURES = ("image_pca", "joint_pca", "norms", "nearest", "clusters", "dictionary", "predictions")
"""What can be drawn, in the order of the columns of overview.png; see `Kind`."""
OUTLIER_DEVIATIONS = 5.0
DICTIONARY_PATCHES = 16_384
"""Patches, evenly spaced, to which dictionaries are fitted."""
DICTIONARY_ALPHA = 0.1
"""Sparsity penalty, for features whose root mean square length is 1."""
MIN_COLUMNS = 4
QUERIES_AT_A_TIME = 4096
HIDDEN = 235
"""Grey of patches that are neither seen nor predicted."""
UNTRAINED = "random weights"
"""Title of what a student predicts that was not trained."""

# Told apart also by colour-blind people: Okabe and Ito's colours, then grey and brown. Fixed: atom 1 is always blue.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#999999", "#661100")
RED = "#D55E00"


@dataclass(frozen=True, kw_only=True)
class VisualizationsConfig(EvaluationConfig):
    """Keys of this evaluation."""

    dataset_name: str = "custom://ADE20K?split='training'"
    """Data URL of images; labels are not used."""
    num_images: int = field(default=1024, metadata=COUNT)
    """Images that are drawn, evenly spaced over the data set from its first to its last; all if it has fewer."""
    resolution: int | tuple[int, int] = field(default=224, metadata=COUNT)
    """Images are resized to squares of this many pixels, or to [height, width] (bicubic)."""
    pictures: list[str] = field(
        default_factory=lambda: [name for name in PICTURES if name != "dictionary"],
        metadata=one_of(*PICTURES, not_empty=True),
    )
    """What is drawn, of `PICTURES`. Naming more in a later run adds them."""
    image_components: int = field(default=6, metadata=within(at_least=3, remedy="must be at least 3: red, green, blue"))
    """Principal components of each image's own patches."""
    joint_components: int = field(
        default=10, metadata=within(at_least=3, remedy="must be at least 3: red, green, blue")
    )
    """Principal components of the patches of all images."""
    whiten: bool = True
    """Whether each component is divided by its own standard deviation, which makes faint ones as colourful as strong
    ones. Otherwise all are divided by the standard deviation of the first."""
    outlier_norm: float | None = field(default=None, metadata=POSITIVE)
    """Patches whose features are longer are outliers, such as 150 for DINOv2 (arXiv:2309.16588). null: longer than
    the median plus 5 robust deviations, see `outlier_cutoff`."""
    norms_of_output: bool = False
    """Measure the feature map itself. Otherwise, if the model ends in a normalisation layer, what goes into it is
    measured: after it all norms are nearly the same, and exactly so in CAPI, whose layer has no parameters."""
    query: list[int] | None = field(
        default=None,
        metadata=within(at_least=0, size=3, remedy="must be [number of the image, row, column], counted from 0"),
    )
    """[number of an image in the data set, row, column] of the patch whose nearest ones are looked for; null for the
    middle of the first image drawn."""
    clustering_checkpoint: str | None = None
    """Where the teacher's clustering head is: a training checkpoint, the folder of a run, or a weights file with the
    keys `clustering.layer.weight` and `.bias`. null draws no clusters."""
    dictionary_atoms: list[int] = field(
        default_factory=lambda: [3, 6, 10],
        metadata=within(
            at_least=2,
            at_most=len(PALETTE),
            not_empty=True,
            remedy=f"must be numbers from 2 to {len(PALETTE)}, the colours there are",
        ),
    )
    """Sizes of the dictionaries."""
    predictor_checkpoint: str | None = None
    """Where student and predictor are: a training checkpoint, or the folder of a run, of which the checkpoint whose
    teacher has the weights under evaluation is taken. null looks for it in the folders above the weights."""
    prediction_draws: int = field(default=3, metadata=COUNT)
    """Draws from predictions that are not deterministic."""
    num_overview: int = field(default=6, metadata=COUNT)
    """Images in figures: the first ones drawn in overview.png, norms.png and nearest.png, evenly spaced ones in
    predictions.png."""

    free_keys: ClassVar[tuple[str, ...]] = (
        "pictures",
        "query",
        "clustering_checkpoint",
        "predictor_checkpoint",
        "prediction_draws",
    )

    def __post_init__(self) -> None:
        """Write squares as one number."""
        object.__setattr__(self, "resolution", as_written(self.resolution))


# ------------------------------------------------------------------------------------------------ the evaluation


class Query(NamedTuple):
    """A patch of an image of the data set."""

    image: int
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """What is drawn and where to."""

    model: FrozenModel
    cfg: VisualizationsConfig
    dataset: ImageDataset
    numbers: list[int]
    """Which images of the data set are drawn."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    patch_size: int
    query: Query
    folder: Path

    @functools.cached_property
    def query_features(self) -> Float[Tensor, "n d"]:
        """Features of the patches of the image that has the query."""
        image = read_image(self.dataset, self.query.image, self.cfg.resolution, self.model.bands)
        return patch_features(self.model(image.unsqueeze(0)))[0]

    @functools.cached_property
    def checkpoint(self) -> Path | None:
        """The training checkpoint by which predictions are made, see `find_checkpoint`; the same on all ranks."""
        return on_rank_0(lambda: find_checkpoint(self.cfg, self.model.module))

    def picture(self, number: int) -> UInt8[Tensor, "h w 3"]:
        """An image of the data set, for people: of other than three bands the first three, or the first as grey."""
        pixels = read_image(self.dataset, number, self.cfg.resolution, self.model.bands)
        pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
        return (to_bytes(pixels) if pixels.is_floating_point() else pixels).movedim(0, -1)

    @property
    def row_height(self) -> float:
        """Of a row of pictures in figures, inches, with what is written below."""
        return 1.5 * self.grid[0] / self.grid[1] + 0.22

    @property
    def shown(self) -> list[int]:
        """Numbers of the images in figures."""
        return self.numbers[: self.cfg.num_overview]

    @property
    def predicted(self) -> list[int]:
        """Places among `numbers` of the images of which hidden patches are predicted."""
        return evenly_spaced(len(self.numbers), self.cfg.num_overview)


def evaluate(cfg: VisualizationsConfig, model: FrozenModel, results: Results) -> None:
    """Draw the pictures that `results` do not have yet."""
    grid = rows, columns = model.grid(cfg.resolution)
    dataset = open_dataset(cfg.dataset_name, "dataset_name", model.bands)
    results.note_data(dataset_name=dataset)
    if len(dataset) < cfg.num_images:
        logger.info("num_images=%d: the data set has %d images, all are drawn", cfg.num_images, len(dataset))
    numbers = evenly_spaced(len(dataset), cfg.num_images)
    query = check_query(cfg.query, len(dataset), grid) or Query(numbers[0], rows // 2, columns // 2)
    scene = Scene(model, cfg, dataset, numbers, grid, model.patch_size, query, results.artifacts())
    todo = [kind for kind in KINDS if kind.name in cfg.pictures and kind.is_due(scene, results)]
    if not todo:
        logger.info("%s are there already", ", ".join(cfg.pictures))
        return
    kinds = [kind(scene) for kind in todo]
    measures = {name: measure for kind in kinds for name, measure in kind.measures().items()}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(kind.watching())
        rows = run_model(scene, measures, "features")
    for kind in kinds:
        if not kind.looks_again:
            results.add(kind.name, kind.draw(rows))
    kinds = [kind for kind in kinds if kind.looks_again]
    for kind in kinds:
        kind.fit(rows)
    if kinds:
        measures = {name: measure for kind in kinds for name, measure in kind.measures_again().items()}
        rows = run_model(scene, measures, "features again")
    for kind in kinds:
        results.add(kind.name, kind.draw(rows))
    results.note(
        num_images=len(numbers), images=f"{numbers[0]} to {numbers[-1]} of {len(dataset)}", grid=as_written(grid)
    )
    if rank() == 0 and (columns := overview_columns(scene, results)):
        draw_overview(scene, results, columns).savefig(scene.folder / "overview.png")
    logger.info("pictures are in %s", scene.folder)


Measure = Callable[[Float[Tensor, "b n d"]], Tensor]
"""A function of the patch features of some images that gives rows, one per image."""


def evenly_spaced(total: int, num: int) -> list[int]:
    """`num` numbers below `total` (all if there are fewer), the first and the last one among them."""
    if num >= total:
        return list(range(total))
    return [(i * (total - 1) + (num - 1) // 2) // max(1, num - 1) for i in range(num)]


def check_query(query: list[int] | None, num_images: int, grid: tuple[int, int]) -> Query | None:
    """The patch that the user chose, if any.

    Raises: UserError if it does not exist.
    """
    if query is None:
        return None
    image, row, column = query
    require(image < num_images, "query", query, f"the data set has {num_images} images, numbered from 0")
    remedy = f"row and column must be below {grid[0]} and {grid[1]}, those of the patches"
    require(row < grid[0] and column < grid[1], "query", query, remedy)
    return Query(image, row, column)


def read_image(
    dataset: ImageDataset, number: int, resolution: int | tuple[int, int], bands: Bands = RGB8
) -> Shaped[Tensor, "c h w"]:
    """One image of the data set in this resolution, for a model of these bands.

    Raises: UserError if the file cannot be read.
    """
    try:
        return squashed(dataset[number].picture(bands), resolution)
    except BadImageError as error:
        raise UserError(f"{error}; repair or remove the file") from error


def prepare_image(
    image: Image.Image | Tensor, _target: Any, resolution: int | tuple[int, int]
) -> tuple[Shaped[Tensor, "c h w"]]:
    """The image in this resolution; see `evaluation.Prepare`."""
    return (squashed(image, resolution),)


def run_model(scene: Scene, measures: Mapping[str, Measure], title: str) -> dict[str, Tensor]:
    """Apply measures to the patch features of all images, which are not kept.

    Returns: name of the measure -> its rows, those of all ranks, on the CPU.
    """
    cfg, model = scene.cfg, scene.model
    batches = ImageBatches(
        scene.dataset,
        functools.partial(prepare_image, resolution=cfg.resolution),
        indices=scene.numbers,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        pin=model.device.type == "cuda",
        title=title,
        bands=model.bands,
    )

    def compute(features: Features) -> tuple[Tensor, ...]:
        x = patch_features(features)
        return tuple(measure(x) for measure in measures.values())

    started = time.monotonic()
    columns = extract(model, batches, compute)
    logger.info("%s of %d images in %.1f s", title, len(scene.numbers), time.monotonic() - started)
    return dict(zip(measures, columns, strict=True))


def patch_features(features: Features) -> Float[Tensor, "b n d"]:
    """The feature map in a row, where it can be computed with in float64."""
    x = features.feature_map.flatten(1, 2)
    return x.cpu() if x.device.type == "mps" else x


class NormInputs:
    """What goes into normalisation layers, as a context around the forward passes of their model.

    Args:
        layers: name -> layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def __enter__(self) -> "NormInputs":
        self.handles = [
            layer.register_forward_hook(functools.partial(self._remember, name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _remember(self, name: str, _layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 3:
            self.calls.append((name, inputs[0], output))

    def before(self, x: Float[Tensor, "b n d"]) -> tuple[str, Float[Tensor, "b n d"]] | None:
        """The layer that patches `x` of the last forward pass come out of, and what they were before; None if none."""
        calls, self.calls = self.calls, []  # not to be held during the next pass
        for name, tokens, normalised in reversed(calls):
            for first in (normalised.shape[1] - x.shape[1], 0):  # registers come before the patches, or after them
                patches = slice(first, first + x.shape[1])
                if first >= 0 and torch.equal(normalised[:, patches].float().to(x.device), x):
                    return name, tokens[:, patches]
        return None


# -------------------------------------------------------------------------------------------- what is computed


def outlier_cutoff(norms: Float[Tensor, "*images"]) -> float:
    """Length beyond which a patch is an outlier: the median plus 5 robust standard deviations.

    The robust deviation is 1.4826 times the median distance from the median, and at least 1 % of the median: after a
    normalisation layer all norms may be nearly the same, and rounding makes no outliers.
    """
    median = norms.double().median()
    spread = 1.4826 * (norms.double() - median).abs().median()
    return float(median + OUTLIER_DEVIATIONS * torch.maximum(spread, 0.01 * median))


def cosine_similarity(x: Float[Tensor, "b n d"], to: Float[Tensor, " d"]) -> Float32[Tensor, "b n"]:
    """The cosine similarity of each patch to one."""
    return F.cosine_similarity(x.float(), to.to(x.device), dim=-1).clamp(-1, 1)


def best_matches(
    similarity: Float[Tensor, "images n"], numbers: Sequence[int], query: Query, num: int, columns: int
) -> list[list[Any]]:
    """The best patch of each image but the query's, best first: [number of the image, row, column, similarity]."""
    best, place = similarity.max(dim=1)
    order = [i for i in best.argsort(descending=True, stable=True).tolist() if numbers[i] != query.image][:num]
    return [[numbers[i], *divmod(int(place[i]), columns), round(float(best[i]), 4)] for i in order]


class ClusteringHead:
    """The teacher's clustering head, for assignments alone.

    Args:
        weight: prototypes.
        bias: of the linear layer.
        is_teacher: whether the model under evaluation is the teacher it was trained with; None if that is unknown.
    """

    def __init__(
        self, weight: Float[Tensor, "k d"], bias: Float[Tensor, " k"] | None, *, is_teacher: bool | None
    ) -> None:
        self.weight, self.bias, self.is_teacher = weight.float(), None if bias is None else bias.float(), is_teacher
        self.num_clusters = len(weight)

    def assign(self, x: Float[Tensor, "b n d"]) -> Int64[Tensor, "b n"]:
        """The most similar prototype of each patch: the head's own answer, before Sinkhorn-Knopp balances a batch."""
        weight, bias = self.weight.to(x.device), None if self.bias is None else self.bias.to(x.device)
        return torch.stack(
            [F.linear(F.normalize(image.float(), dim=-1, eps=1e-7), weight, bias).argmax(-1) for image in x]
        )


def _read_from(source: str | None) -> str:
    """The file that a clustering head comes from, with its size and time, by which a later one is told from it."""
    path = Path(str(source))
    if path.is_dir() and not (path / ".metadata").is_file():
        path = Checkpoints(path, keep=1).newest() or path
    path = path / ".metadata" if path.is_dir() else path
    file = path.stat() if path.is_file() else None
    return broadcast_object(str(path) if file is None else f"{path}, {file.st_size} bytes, {file.st_mtime_ns}")


def read_clustering_head(source: str, module: nn.Module, width: int) -> ClusteringHead:
    """The clustering head of a training checkpoint, of the newest one of a run's folder, or of a weights file.

    Args:
        source: as the user named it.
        module: the model under evaluation.
        width: of its patch features.

    Raises: UserError if there is none, or if it takes features of another width.
    """
    path, is_teacher = Path(source), None
    if path.is_dir():
        step = path if (path / ".metadata").is_file() else Checkpoints(path, keep=1).newest()
        require(step is not None, "clustering_checkpoint", source, "has no training checkpoint; give the run's folder")
        assert step is not None
        tensors, is_teacher = _read_training_checkpoint(step, source, module)
    else:
        loaded = read_state_dict(source, key="clustering_checkpoint")
        tensors = {key.removeprefix("clustering."): value for key, value in loaded.items()}
    head = {key: tensors[key] for key in ("layer.weight", "layer.bias") if tensors.get(key) is not None}
    is_head = all(isinstance(value, Tensor) for value in head.values()) and "layer.weight" in head
    remedy = "has no tensor clustering.layer.weight; give the folder of a CAPI training run, whose checkpoints do"
    require(is_head, "clustering_checkpoint", source, remedy)
    check_values(head, dict.fromkeys(head, torch.empty(0)), source)
    weight = head["layer.weight"]
    remedy = (
        f"its head takes features of width {weight.shape[-1]}, and the model gives {width}; give that of this model"
    )
    require(weight.shape[-1] == width, "clustering_checkpoint", source, remedy)
    if is_teacher is False:
        logger.warning("%s was trained with other weights than these: its clusters say little here", source)
    return ClusteringHead(weight, head.get("layer.bias"), is_teacher=is_teacher)


def _read_training_checkpoint(step: Path, source: str, module: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The clustering head, and whether the teacher in there is `module`."""
    heads = "clustering."
    try:
        tensors = read_tensors(step, lambda sizes: [key for key in sizes if key.startswith(heads)])
        is_teacher = has_teacher(step, module)
    except (OSError, UserError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"clustering_checkpoint={source}: {step} cannot be read: {reason}; give another one") from error
    return {key.removeprefix(heads): tensor for key, tensor in tensors.items()}, is_teacher


def has_teacher(step: Path, module: nn.Module) -> bool:
    """Whether the teacher of a training checkpoint is `module`, as far as its largest weight tells.

    Where there is no average, the student is its own teacher.

    Raises: UserError or OSError if the checkpoint cannot be read.
    """
    own = module.state_dict()

    def largest(sizes: Mapping[str, torch.Size]) -> list[str]:
        average, student = "student_ema.backbone.", "student.backbone."
        teacher = average if any(key.startswith(average) for key in sizes) else student
        shared = [key for key in sizes if key.startswith(teacher) and key.removeprefix(teacher) in own]
        return sorted(shared, key=lambda key: sizes[key].numel())[-1:]

    tensors = read_tensors(step, largest)
    return bool(tensors) and all(torch.equal(x, own[key.partition("backbone.")[2]].cpu()) for key, x in tensors.items())


class AtomDictionary(NamedTuple):
    """Atoms of which centred, scaled features are sparse sums."""

    mean: Float64[Tensor, " d"]
    scale: float
    atoms: Float64[Tensor, "k d"]
    explained: float
    """Part of the variance of the patches it was fitted to that the sums explain."""

    def encode(self, x: Float[Tensor, "b n d"]) -> Float32[Tensor, "b n k"]:
        """How much of each atom is in each patch."""
        mean = self.mean.to(x.device)
        return torch.stack([sparse_codes((image - mean) / self.scale, self.atoms).float() for image in x])


def sparse_codes(x: Float64[Tensor, "m d"], atoms: Float64[Tensor, "k d"]) -> Float64[Tensor, "m k"]:
    """Codes >= 0 that minimise |x - codes atoms|^2 / 2 + `DICTIONARY_ALPHA` sum(codes) for each row; on the CPU."""
    from sklearn.decomposition import sparse_encode

    options = {"algorithm": "lasso_cd", "alpha": DICTIONARY_ALPHA, "positive": True}
    return torch.from_numpy(sparse_encode(x.cpu().numpy(), atoms.cpu().numpy(), **options))


def fit_dictionaries(sample: Float[Tensor, "m d"], sizes: Sequence[int], seed: int) -> list[AtomDictionary]:
    """Dictionaries of several sizes with non-negative codes, the most used atom first; the same on all ranks."""
    return broadcast_object([_fit_dictionary(sample.double(), k, seed) for k in sizes] if rank() == 0 else [])


def _fit_dictionary(sample: Float64[Tensor, "m d"], num_atoms: int, seed: int) -> AtomDictionary:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    mean = sample.mean(dim=0)
    scale = float((sample - mean).pow(2).sum(dim=1).mean().sqrt()) or 1.0
    scaled = (sample - mean) / scale
    learner = MiniBatchDictionaryLearning(
        num_atoms,
        alpha=DICTIONARY_ALPHA,  # pyright: ignore[reportArgumentType]  # the stub takes the type of the default, 1
        fit_algorithm="cd",
        batch_size=256,
        max_iter=20,
        positive_code=True,
        random_state=seed,
    )
    atoms = torch.from_numpy(learner.fit(scaled.numpy()).components_)
    codes = sparse_codes(scaled, atoms)
    error = (scaled - codes @ atoms).pow(2).sum(dim=1).mean()
    return AtomDictionary(mean, scale, atoms[codes.sum(dim=0).argsort(descending=True, stable=True)], 1 - float(error))


# -------------------------------------------------------------------------------------------------- predictions


def find_predictor_loader(model_path: str) -> Callable[..., PatchPredictor] | None:
    """`__predictor_loader__` of the script that trains the models of a model file, see `pictures.PatchPredictor`.

    The model file names the script, which is beside it, as `__trained_by__`. None if it names none, or that has none.
    """
    path = find_model_file(model_path)
    script = getattr(import_from_path(path), "__trained_by__", None)
    return None if script is None else getattr(import_from_path(path.with_name(script)), "__predictor_loader__", None)


def find_checkpoint(cfg: VisualizationsConfig, module: nn.Module) -> Path | None:
    """The training checkpoint that predictions are made by: of a run that whose teacher is `module`.

    Returns: None if no run is named, and none in the folders above the weights has such a checkpoint.
    Raises: UserError if a run is named that has none at all, or one cannot be read.
    """
    source = cfg.predictor_checkpoint
    if source is not None and Path(source, ".metadata").is_file():
        return Path(source)
    weights = cfg.model_loader_kwargs.get("pretrained_weights")
    above = [] if weights is None or "://" in str(weights) else Path(weights).absolute().parents
    for folder in above if source is None else [Path(source)]:
        steps = Checkpoints(folder, keep=1).all()[::-1]
        try:
            chosen = next((step for step in steps if has_teacher(step, module)), None)
        except (OSError, UserError) as error:
            raise UserError(
                f"predictor_checkpoint={source}: a checkpoint in {folder} cannot be read: {error}; name another one"
            ) from error
        if source is not None:
            remedy = "has no training checkpoint; give the folder of a run, or of a checkpoint"
            require(bool(steps), "predictor_checkpoint", source, remedy)
            if chosen is None:
                logger.warning("%s: no checkpoint has a teacher with these weights, the newest is taken", source)
            return chosen or steps[0]
        if chosen is not None:
            return chosen
    return None


def untrained(predictor: PatchPredictor, seed: int) -> PatchPredictor:
    """A copy whose student has the random weights that follow from `seed`."""
    control = copy.deepcopy(predictor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in control.student.values():
            part.init_weights()  # pyright: ignore[reportCallIssue]  # `PatchPredictor` asks for it
    return control


def best_patches(x: Float[Tensor, "b n d"], queries: Float[Tensor, "q d"]) -> Float32[Tensor, "b q 2"]:
    """For each image and query, the largest cosine similarity of a patch, and which patch that is.

    Memory: similarities of one image and `QUERIES_AT_A_TIME` queries.
    """
    queries = F.normalize(queries.to(x.device).float(), dim=-1)
    rows = []
    for image in x:
        patches = F.normalize(image.float(), dim=-1)
        best = [(part @ patches.T).max(dim=-1) for part in queries.split(QUERIES_AT_A_TIME)]
        rows.append(torch.cat([torch.stack([found.values, found.indices.float()], dim=-1) for found in best]))
    return torch.stack(rows)


def choose_patches(
    rows: Float[Tensor, "images q 2"], own: Int64[Tensor, " q"]
) -> tuple[Float[Tensor, " q"], Int64[Tensor, "q 2"]]:
    """The best patch of all images for each query, but for those of the query's own image.

    Args:
        rows: what `best_patches` gave.
        own: place of the image among `rows` that each query is of.

    Returns: similarities, and (place of the image, patch).
    """
    similarity = rows[..., 0].clone()
    similarity[own, torch.arange(len(own))] = -torch.inf
    best, image = similarity.max(dim=0)
    return best, torch.stack([image, rows[image, torch.arange(len(own)), 1].long()], dim=1)


# ------------------------------------------------------------------------------------------------------ colours


def _color(name: str) -> UInt8[Tensor, " 3"]:
    return torch.tensor(list(bytes.fromhex(name[1:])), dtype=torch.uint8)


def norm_colors(norms: Float[Tensor, "*grid"], cutoff: float, low: float, high: float) -> UInt8[Tensor, "*grid 3"]:
    """Norms as viridis from `low` to `high`, outliers red."""
    colors = map_colors(norms, low, high, "viridis")
    colors[norms > cutoff] = _color(RED)
    return colors


def mix_colors(codes: Float[Tensor, "*grid k"]) -> UInt8[Tensor, "*grid 3"]:
    """Colours of the atoms, mixed in proportion to the codes; light grey where no atom is used."""
    palette = torch.stack([_color(name) for name in PALETTE[: codes.shape[-1]]]).float()
    total = codes.sum(dim=-1, keepdim=True)
    mixed = codes @ palette / total.clamp_min(1e-12)
    return torch.where(total > 0, mixed, 220.0).round().to(torch.uint8)


def cluster_colors(usage: Int64[Tensor, " k"]) -> UInt8[Tensor, "k 3"]:
    """A colour for each prototype; those that are used most differ most, in lightness too."""
    colors = torch.empty(len(usage), 3)
    for place, prototype in enumerate(usage.argsort(descending=True, stable=True).tolist()):
        hue, light = place * 0.618034 % 1, (0.55, 0.8, 0.35)[place % 3]
        colors[prototype] = torch.tensor(colorsys.hls_to_rgb(hue, light, 0.65))
    return to_bytes(colors)


# ----------------------------------------------------------------------------------------------------- pictures


def save_pictures(scene: Scene, kind: str, picture: Callable[[int], UInt8[Tensor, "h w 3"]]) -> None:
    """Write `picture(i)` for this rank's share of the images; returns when all ranks are done."""
    for i in my_share(len(scene.numbers)):
        _save(scene, kind, scene.numbers[i], picture(i))
    barrier()


def picture_path(scene: Scene, kind: str, number: int) -> Path:
    """Where the picture of an image is."""
    return scene.folder / kind / f"{number:06d}.png"


def save_maps(scene: Scene, kind: str, colors: UInt8[Tensor, "images n 3"]) -> None:
    """Write pictures in which every patch is a square of one colour."""
    save_pictures(scene, kind, lambda i: as_squares(colors[i], scene))


def as_squares(values: Tensor, scene: Scene) -> Tensor:
    """Values of the patches [n, ...] as those of the pixels [h, w, ...]."""
    grid = values.unflatten(0, scene.grid)
    return grid.repeat_interleave(scene.patch_size, 0).repeat_interleave(scene.patch_size, 1)


def draw_components(scene: Scene, kind: str, components: Float[Tensor, "images n k"]) -> None:
    """Pictures of standardised components: the first three in colour with all signs, and each by itself."""
    for signs in itertools.product((1.0, -1.0), repeat=3):
        letters = "".join("p" if sign > 0 else "n" for sign in signs)
        name = "rgb" if letters == "ppp" else f"rgb_{letters}"
        save_maps(scene, f"{kind}/{name}", rgb_colors(components[..., :3] * torch.tensor(signs)))
    for c in range(components.shape[-1]):
        colors = map_colors(components[..., c], -COLOR_RANGE, COLOR_RANGE, "coolwarm")
        save_maps(scene, f"{kind}/component_{c + 1}", colors)


def norm_figure(scene: Scene, norms: Float[Tensor, "images n"], report: Mapping[str, Any]) -> "Figure":
    """The distribution of the norms with the cut-off, and the maps of the first images with their outliers."""
    from matplotlib.figure import Figure

    shown = scene.shown
    columns = max(MIN_COLUMNS, len(shown))
    figure = Figure(figsize=(1.7 * columns + 1, 6.2), dpi=100, layout="constrained")
    axes = figure.add_gridspec(3, columns, height_ratios=(1.1, 1, 1))
    histogram = figure.add_subplot(axes[0, :])
    low, high = report["color_range"]
    histogram.hist(norms.flatten().numpy(), bins=100, range=(low, max(high, report["max"])), color="#0072B2", log=True)
    histogram.axvline(report["outlier_cutoff"], color=RED, linestyle="--", label=f"cut-off {report['outlier_cutoff']}")
    histogram.axvline(report["median"], color="black", linestyle=":", label=f"median {report['median']}")
    histogram.legend(frameon=False)
    histogram.set_xlabel(f"norm of a patch: {report['of']}")
    histogram.set_ylabel("patches")
    histogram.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report['outliers']} of {norms.numel()} patches are outliers ({report['outlier_fraction']:.2%}), "
        f"in {report['images_with_outliers']} of {len(norms)} images"
    )
    maps = []
    for column, number in enumerate(shown):
        top, bottom = figure.add_subplot(axes[1, column]), figure.add_subplot(axes[2, column])
        show(top, scene.picture(number).numpy(), f"image {number}")
        show(bottom, _read(scene, "norms", number), _outliers(report["outliers_of_shown"][column]))
        maps.append(bottom)
    _color_bar(figure, maps, "viridis", low, high, "norm (outliers red)")
    return figure


def nearest_figure(
    scene: Scene, similarity: Float[Tensor, "images n"], low: float, matches: Sequence[Sequence[Any]]
) -> "Figure":
    """The query and its best matches, then the similarity maps of the first images."""
    from matplotlib.figure import Figure

    query, shown = scene.query, scene.shown
    columns = max(MIN_COLUMNS, len(shown))
    figure = Figure(figsize=(1.7 * columns + 1, 6.4), dpi=100, layout="constrained")
    axes = figure.add_gridspec(3, columns)
    figure.suptitle(
        f"The query, framed in image {query.image}; the best patch of other images; and similarity to the query.\n"
        f"Median cosine similarity over {len(similarity)} images: {float(similarity.median()):.2f}"
    )
    places = [(query, "query"), *((Query(*match[:3]), f"image {match[0]}: {match[3]:.3f}") for match in matches)]
    for column, (place, title) in enumerate(places):
        ax = figure.add_subplot(axes[0, column])
        show(ax, scene.picture(place.image).numpy(), title)
        _frame(ax, place, scene)
    maps = []
    for column, number in enumerate(shown):
        top, bottom = figure.add_subplot(axes[1, column]), figure.add_subplot(axes[2, column])
        show(top, scene.picture(number).numpy(), f"image {number}")
        show(bottom, _read(scene, "nearest", number), "")
        if number == query.image:
            _frame(bottom, query, scene)
        maps.append(bottom)
    _color_bar(figure, maps, "cividis", low, 1.0, "cosine similarity")
    return figure


def predictions_figure(scene: Scene, draws: Sequence[str]) -> "Figure":
    """A row per image: itself, the visible patches, the draws, and what a student with random weights predicts."""
    from matplotlib.figure import Figure

    titles, rows = ["visible", *draws], len(scene.predicted)
    figure = Figure(figsize=(1.7 * (len(titles) + 1), scene.row_height * rows + 1.1), dpi=100, layout="constrained")
    axes = figure.subplots(rows, len(titles) + 1, squeeze=False)
    figure.suptitle(
        f"Predicted patches, shown as the patch of {len(scene.numbers) - 1} other images that is most like the "
        "prediction\n(grey: neither seen nor predicted)",
        fontsize=10,
    )
    for row, place in enumerate(scene.predicted):
        number = scene.numbers[place]
        show(axes[row, 0], scene.picture(number).numpy())
        axes[row, 0].set_ylabel(str(number), fontsize=9)
        for ax, title in zip(axes[row, 1:], titles, strict=True):
            show(ax, _read(scene, _folder_of(title), number))
    for ax, title in zip(axes[0], ["image", *titles], strict=True):
        ax.set_title(title, fontsize=9)
    return figure


def _folder_of(title: str) -> str:
    """Where the pictures of a column of predictions.png are."""
    return f"predictions/{title.replace(' ', '_')}"


def read_squares(scene: Scene, patches: Int64[Tensor, "q 2"]) -> dict[tuple[int, int], UInt8[Tensor, "p p 3"]]:
    """Pixels of patches of the images that are drawn, by (place of the image, patch)."""
    squares = {}
    for place, group in itertools.groupby(patches.unique(dim=0).tolist(), key=lambda pair: pair[0]):
        pixels = scene.picture(scene.numbers[place])
        squares |= {(place, patch): pixels[_square_at(patch, scene)].clone() for _, patch in group}
    return squares


def save_patchworks(
    scene: Scene,
    number: int,
    prediction: Prediction,
    patches: Int64[Tensor, "draws m 2"],
    squares: Mapping[tuple[int, int], UInt8[Tensor, "p p 3"]],
) -> None:
    """Write the visible part of an image, and for each draw the image with other patches where it is predicted.

    Args:
        scene: what is drawn and where to.
        number: of the image in the data set.
        prediction: what is visible, where is predicted, and the titles of the draws.
        patches: keys of `squares` for each draw and predicted patch.
        squares: see `read_squares`.
    """
    pixels = scene.picture(number)
    seen = torch.where(as_squares(prediction.visible, scene).unsqueeze(-1), pixels, HIDDEN)
    _save(scene, _folder_of("visible"), number, seen)
    for title, chosen in zip(prediction.draws, patches.tolist(), strict=True):
        patchwork = seen.clone()
        for position, (image, patch) in zip(prediction.positions.tolist(), chosen, strict=True):
            patchwork[_square_at(position, scene)] = squares[image, patch]
        _save(scene, _folder_of(title), number, patchwork)


def _square_at(patch: int, scene: Scene) -> tuple[slice, slice]:
    row, column = (place * scene.patch_size for place in divmod(patch, scene.grid[1]))
    return slice(row, row + scene.patch_size), slice(column, column + scene.patch_size)


def _save(scene: Scene, kind: str, number: int, picture: UInt8[Tensor, "h w 3"]) -> None:
    path = picture_path(scene, kind, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.numpy()).save(path, compress_level=1)


def _read(scene: Scene, kind: str, number: int) -> np.ndarray:
    with Image.open(picture_path(scene, kind, number)) as picture:
        return np.asarray(picture)


def _frame(ax: "Axes", place: Query, scene: Scene) -> None:
    from matplotlib.patches import Rectangle

    size = scene.patch_size
    corner = (place.column * size - 0.5, place.row * size - 0.5)
    # White around red is seen on every picture.
    for color, width in (("white", 3.0), (RED, 1.5)):
        ax.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=color, linewidth=width))


def _color_bar(figure: "Figure", axes: "Sequence[Axes]", name: str, low: float, high: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(low, high), name), ax=list(axes), label=label, shrink=0.9, pad=0.01)


def _outliers(count: int) -> str:
    return f"{count} outlier{'s' * (count != 1)}"


def _rounded(x: Any) -> Any:
    """Numbers as they are reported, with five significant digits."""
    values = torch.as_tensor(x).double().tolist()
    return [float(f"{v:.5g}") for v in values] if isinstance(values, list) else float(f"{values:.5g}")


# ----------------------------------------------------------------------------------------- kinds of pictures


class Kind:
    """A kind of picture: what it measures of the features of all images, and what it draws of that.

    The model is run over all images for the measures of all kinds together, and once more for kinds that look again.

    Args:
        scene: what is drawn and where to.

    Raises: UserError if the configuration does not fit the model or the images.
    """

    name: ClassVar[str]
    """In `PICTURES`, in the results, and of the folder of its pictures."""
    looks_again: ClassVar[bool] = False
    """Whether there is something to `fit`, of which `measures_again` are then taken."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.cfg = scene, scene.cfg

    @classmethod
    def is_due(cls, scene: Scene, results: Results) -> bool:
        """Whether it is to be drawn: not if results and pictures are there already."""
        return not (cls.name in results and broadcast_object((scene.folder / cls.name).is_dir()))

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Around the first look at the images."""
        return contextlib.nullcontext()

    def measures(self) -> dict[str, Measure]:
        """Functions of the patch features of some images, by names that no other kind has."""
        raise NotImplementedError

    def fit(self, rows: Mapping[str, Tensor]) -> None:
        """What is done with the rows of the measures before the second look."""

    def measures_again(self) -> dict[str, Measure]:
        """Functions of the patch features for the second look, once `fit` was called."""
        return {}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Draw the pictures from the rows of the last look, and return what there is to report; all ranks together."""
        raise NotImplementedError

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        """Columns of overview.png: folder of the pictures -> title."""
        raise NotImplementedError

    @staticmethod
    def annotate(ax: "Axes", scene: Scene, report: Mapping[str, Any], row: int) -> None:
        """Add to the picture of a row of overview.png."""


class _ImagePca(Kind):
    """Principal components of each image's own patches."""

    name = "image_pca"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        where = f"an image of {as_typed(scene.cfg.resolution)} pixels has"
        check_components("image_components", scene, 1, where, "raise resolution")

    def measures(self) -> dict[str, Measure]:
        return {
            "image_pca": functools.partial(image_scores, num_components=self.cfg.image_components),
            "variance": lambda x: x.var(dim=1).sum(dim=-1),
        }

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        draw_components(self.scene, self.name, standardize(rows["image_pca"], self.cfg.whiten))
        shares = rows["image_pca"].var(dim=1) / rows["variance"].clamp_min(1e-12).unsqueeze(-1)
        return {"explained_variance_ratio": _rounded(shares.mean(dim=0))}

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        return {"image_pca/rgb": "PCA of\nthis image"}


class _Norms(Kind):
    """Lengths of the features, with outliers."""

    name = "norms"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        layers = {name: layer for name, layer in scene.model.module.named_modules() if "Norm" in type(layer).__name__}
        with NormInputs({} if scene.cfg.norms_of_output else layers) as inputs:
            image = scene.model.blank(scene.cfg.resolution)
            before = inputs.before(patch_features(scene.model(image)))
        self.layer = None if before is None else before[0]
        self.inputs = NormInputs({} if self.layer is None else {self.layer: layers[self.layer]})

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        return self.inputs

    def measures(self) -> dict[str, Measure]:
        def lengths(x: Tensor) -> Tensor:
            before = self.inputs.before(x)
            return (x if before is None else before[1]).float().norm(dim=-1)

        return {"norms": lengths}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        scene, norms = self.scene, rows["norms"]
        cutoff = self.cfg.outlier_norm or outlier_cutoff(norms)
        is_outlier = norms > cutoff
        low, high = float(norms.min()), float(norms[~is_outlier].max() if not is_outlier.all() else norms.max())
        high = max(high, 1.01 * low)  # norms that differ by rounding are all one colour
        save_maps(scene, self.name, norm_colors(norms, cutoff, low, high))
        per_image = is_outlier.sum(dim=1)
        report = {
            "of": "feature map" if self.layer is None else f"tokens before {self.layer}",
            "median": _rounded(norms.median()),
            "min": _rounded(norms.min()),
            "max": _rounded(norms.max()),
            "color_range": [_rounded(low), _rounded(high)],
            "outlier_cutoff": _rounded(cutoff),
            "outliers": int(per_image.sum()),
            "outlier_fraction": _rounded(is_outlier.double().mean()),
            "images_with_outliers": int((per_image > 0).sum()),
            "outliers_of_shown": per_image[: len(scene.shown)].tolist(),
        }
        if rank() == 0:
            norm_figure(scene, norms, report).savefig(scene.folder / "norms.png")
        return report

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        low, high = report["color_range"]
        return {"norms": f"feature norm,\n{low:.3g} to {high:.3g}"}

    @staticmethod
    def annotate(ax: "Axes", scene: Scene, report: Mapping[str, Any], row: int) -> None:
        ax.set_xlabel(_outliers(report["outliers_of_shown"][row]), fontsize=8, labelpad=1)


class _Nearest(Kind):
    """Similarity to one patch, the query."""

    name = "nearest"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.query_feature = scene.query_features[scene.query.row * scene.grid[1] + scene.query.column]

    @classmethod
    def is_due(cls, scene: Scene, results: Results) -> bool:
        return super().is_due(scene, results) or results.values[cls.name]["query"] != list(scene.query)

    def measures(self) -> dict[str, Measure]:
        return {"nearest": functools.partial(cosine_similarity, to=self.query_feature)}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        scene, similarity = self.scene, rows["nearest"]
        low = float(similarity.flatten().kthvalue(max(1, similarity.numel() // 100)).values)
        save_maps(scene, self.name, map_colors(similarity, low, 1.0, "cividis"))
        num = max(MIN_COLUMNS, len(scene.shown)) - 1  # a row of the figure, with the query
        matches = best_matches(similarity, scene.numbers, scene.query, num, scene.grid[1])
        if rank() == 0:
            nearest_figure(scene, similarity, low, matches).savefig(scene.folder / "nearest.png")
        return {
            "query": list(scene.query),
            "best_matches": matches,
            "median_similarity": _rounded(similarity.median()),
            "color_range": [_rounded(low), 1.0],
        }

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        query = Query(*report["query"])  # that was drawn, not asked for now
        return {"nearest": f"similarity to patch\n({query.row}, {query.column}) of image {query.image}"}

    @staticmethod
    def annotate(ax: "Axes", scene: Scene, report: Mapping[str, Any], row: int) -> None:
        query = Query(*report["query"])
        if scene.shown[row] == query.image:
            _frame(ax, query, scene)


class _Clusters(Kind):
    """Prototypes of the teacher's clustering head."""

    name = "clusters"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        assert scene.cfg.clustering_checkpoint is not None
        self.read_from = _read_from(scene.cfg.clustering_checkpoint)
        self.head = read_clustering_head(
            scene.cfg.clustering_checkpoint, scene.model.module, scene.query_features.shape[-1]
        )

    @classmethod
    def is_due(cls, scene: Scene, results: Results) -> bool:
        source = scene.cfg.clustering_checkpoint
        is_there = not super().is_due(scene, results)
        if is_there and results.values[cls.name].get("read_from") == _read_from(source):
            return False
        if source is None:
            logger.info("no clusters are drawn: name the run or file that has the head in clustering_checkpoint")
        return source is not None

    def measures(self) -> dict[str, Measure]:
        return {"clusters": self.head.assign}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        scene, clusters = self.scene, rows["clusters"]
        usage = torch.bincount(clusters.flatten(), minlength=self.head.num_clusters)
        colors = cluster_colors(usage)

        def picture(i: int) -> UInt8[Tensor, "h w 3"]:
            at_pixels = as_squares(clusters[i], scene)
            drawn = colors[at_pixels]
            drawn[1:][at_pixels[1:] != at_pixels[:-1]] = 0
            drawn[:, 1:][at_pixels[:, 1:] != at_pixels[:, :-1]] = 0
            return drawn

        save_pictures(scene, self.name, picture)
        perplexity = float(torch.special.entr(usage.double() / usage.sum()).sum().exp())
        per_image = sum(len(prototypes.unique()) for prototypes in clusters) / len(clusters)
        return {
            "checkpoint": self.cfg.clustering_checkpoint,
            "read_from": self.read_from,
            "is_its_teacher": self.head.is_teacher,
            "num_clusters": self.head.num_clusters,
            "used": int((usage > 0).sum()),
            "perplexity": _rounded(perplexity),
            "used_per_image": _rounded(per_image),
        }

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        return {"clusters": f"clusters of the\nteacher, {report['used']} used"}


class _Predictions(Kind):
    """What the student of a training predicts at hidden patches of a few images."""

    name = "predictions"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        alone = "the patches of other images are shown, and there is one image; raise num_images"
        require(len(scene.numbers) > 1, "num_images", len(scene.numbers), alone)
        loader = find_predictor_loader(scene.cfg.model_path)
        assert loader is not None
        assert scene.checkpoint is not None
        self.checkpoint, self.read_from = scene.checkpoint, _read_from(str(scene.checkpoint))
        try:
            predictor = loader(self.checkpoint, self.cfg.resolution).eval()
        except UserError as error:
            wanted = f"give a run of the models of {self.cfg.model_path}"
            raise UserError(f"predictor_checkpoint={self.checkpoint}: {error}; {wanted}") from error
        control = untrained(predictor, derive_seed(self.cfg.seed, "untrained student")).to(scene.model.device)
        self.predictor = predictor.to(scene.model.device)
        self.numbers = [scene.numbers[place] for place in scene.predicted]
        # On one rank, so that all look for the same.
        self.predictions = on_rank_0(lambda: [self._predict_beside(number, control) for number in self.numbers])
        self.titles = list(self.predictions[0].draws)
        self.queries = torch.cat([x for prediction in self.predictions for x in prediction.draws.values()])
        given, taken = (x.shape[-1] for x in (self.predictor.targets(scene.query_features[None]), self.queries))
        remedy = f"predicts features of width {taken}, and the model gives {given}; give a run of this model"
        require(given == taken, "predictor_checkpoint", str(self.checkpoint), remedy)

    def _predict_beside(self, number: int, control: PatchPredictor) -> Prediction:
        """What is predicted of an image, and as the last draw what `control` predicts; on the CPU."""
        prediction, other = (self._predict(number, predictor) for predictor in (self.predictor, control))
        draws = {**prediction.draws, UNTRAINED: next(iter(other.draws.values()))}
        return prediction._replace(draws={title: x.float().cpu() for title, x in draws.items()})

    def _predict(self, number: int, predictor: PatchPredictor) -> Prediction:
        # One image at a time, with a seed of its own: what else is drawn changes nothing.
        image = read_image(self.scene.dataset, number, self.cfg.resolution, self.scene.model.bands)
        seed = derive_seed(self.cfg.seed, "prediction", number)
        return self.scene.model.run(lambda x: predictor(x[0], seed, self.cfg.prediction_draws), image.unsqueeze(0))

    @classmethod
    def is_due(cls, scene: Scene, results: Results) -> bool:
        cfg, is_there = scene.cfg, not super().is_due(scene, results)
        is_asked_for = cfg.pictures != VisualizationsConfig().pictures or cfg.predictor_checkpoint is not None
        if find_predictor_loader(cfg.model_path) is None:
            remedy = f"{cfg.model_path} is of models that predict no patches; leave predictions out"
            require(not is_asked_for, "pictures", cfg.pictures, remedy)
            return False
        try:
            checkpoint = scene.checkpoint
        except UserError as error:
            if is_asked_for:
                raise
            logger.warning("no predictions are drawn: %s", error)
            return False
        if checkpoint is not None:
            made_of = {"read_from": _read_from(str(checkpoint)), "prediction_draws": cfg.prediction_draws}
            return not is_there or not results.values[cls.name].items() >= made_of.items()
        weights = cfg.model_loader_kwargs.get("pretrained_weights")
        if not is_there:
            remedy = f"no run in the folders above {weights} has a checkpoint with a teacher of these weights; name one"
            require(weights is None or not is_asked_for, "predictor_checkpoint", None, remedy)
            logger.info("no predictions are drawn: name the run that has the predictor in predictor_checkpoint")
        return False

    def measures(self) -> dict[str, Measure]:
        return {"predictions": lambda x: best_patches(self.predictor.targets(x), self.queries)}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        scene, titles = self.scene, self.titles
        sizes = [len(titles) * len(prediction.positions) for prediction in self.predictions]
        own = torch.tensor(scene.predicted).repeat_interleave(torch.tensor(sizes))
        similarity, patches = choose_patches(rows["predictions"], own)
        # Of each image, [draws, m] and [draws, m, 2].
        similarities = [x.unflatten(0, (len(titles), -1)) for x in similarity.split(sizes)]
        chosen = [x.unflatten(0, (len(titles), -1)) for x in patches.split(sizes)]
        if rank() == 0:
            squares = read_squares(scene, patches)
            for number, prediction, patches_of_draws in zip(self.numbers, self.predictions, chosen, strict=True):
                save_patchworks(scene, number, prediction, patches_of_draws, squares)
            predictions_figure(scene, titles).savefig(scene.folder / "predictions.png")
        barrier()
        by_title = {
            title: (torch.cat([x[i] for x in similarities]), torch.cat([x[i] for x in chosen]))
            for i, title in enumerate(titles)
        }
        return {
            "read_from": self.read_from,
            "is_its_teacher": on_rank_0(lambda: has_teacher(self.checkpoint, scene.model.module)),
            "prediction_draws": self.cfg.prediction_draws,
            "draws": titles,
            "predicted_patches": sum(sizes) // len(titles),
            "median_similarity": {title: _rounded(x.median()) for title, (x, _) in by_title.items()},
            "different_patches": {title: len(x.unique(dim=0)) for title, (_, x) in by_title.items()},
        }

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        return {}  # predictions.png has them


class _JointPca(Kind):
    """Principal components of the patches of all images together."""

    name = "joint_pca"
    looks_again = True

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        more = "raise num_images or resolution"
        num_images = len(scene.numbers)
        check_components("joint_components", scene, num_images, "all images together have", more)
        self.moments = Moments(scene.query_features.shape[-1])

    def measures(self) -> dict[str, Measure]:
        def add(x: Tensor) -> Tensor:
            self.moments.add(x)
            return x.new_empty(len(x), 0)

        return {"moments": add}

    def fit(self, rows: Mapping[str, Tensor]) -> None:
        self.moments.add_other_ranks()
        self.mean, self.directions, self.shares = self.moments.principal_components(self.cfg.joint_components)

    def measures_again(self) -> dict[str, Measure]:
        return {"joint_pca": functools.partial(project, mean=self.mean, directions=self.directions)}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        scores = standardize(rows["joint_pca"].flatten(0, 1), self.cfg.whiten)
        draw_components(self.scene, self.name, scores.view_as(rows["joint_pca"]))
        return {"explained_variance_ratio": _rounded(self.shares)}

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        return {"joint_pca/rgb": "PCA of\nall images"}


class _Dictionary(Kind):
    """Atoms of which the features are sparse sums."""

    name = "dictionary"
    looks_again = True

    def measures(self) -> dict[str, Measure]:
        picked = evenly_spaced(math.prod(self.scene.grid), -(-DICTIONARY_PATCHES // len(self.scene.numbers)))
        return {"sample": lambda x: x[:, picked]}

    def fit(self, rows: Mapping[str, Tensor]) -> None:
        self.dictionaries = fit_dictionaries(rows["sample"].flatten(0, 1), self.cfg.dictionary_atoms, self.cfg.seed)

    def measures_again(self) -> dict[str, Measure]:
        return {f"{len(dictionary.atoms)}_atoms": dictionary.encode for dictionary in self.dictionaries}

    def draw(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        explained = {}
        for dictionary in self.dictionaries:
            num_atoms = len(dictionary.atoms)
            save_maps(self.scene, f"{self.name}/{num_atoms}_atoms", mix_colors(rows[f"{num_atoms}_atoms"]))
            explained[str(num_atoms)] = _rounded(dictionary.explained)
        return {"explained_variance": explained}

    @staticmethod
    def columns(scene: Scene, report: Mapping[str, Any]) -> dict[str, str]:
        return {f"dictionary/{k}_atoms": f"dictionary of\n{k} atoms" for k in scene.cfg.dictionary_atoms}


KINDS: tuple[type[Kind], ...] = (_ImagePca, _Norms, _Nearest, _Clusters, _Predictions, _JointPca, _Dictionary)
"""In the order of the results: those that look once, then those that look again."""


def check_components(key: str, scene: Scene, num_images: int, where: str, remedy: str) -> None:
    """Raise UserError if patches or channels are too few for so many principal components.

    Args:
        key: the key that says how many.
        scene: what is drawn.
        num_images: images whose patches are taken together.
        where: who has the patches, for the message.
        remedy: what gives more of them.
    """
    num_components, (num_patches, width) = getattr(scene.cfg, key), scene.query_features.shape
    count = num_images * num_patches
    too_few = f"{where} {count} patches, and {num_components} components need more; {remedy}, or lower {key}"
    require(count > num_components, key, num_components, too_few)
    require(width >= num_components, key, num_components, f"must be at most {width}, the width of the features")


# ---------------------------------------------------------------------------------------------- the overview


def overview_columns(scene: Scene, results: Results) -> list[tuple[type["Kind"], str, str]]:
    """Kind, folder and title of the pictures of each column, of those that are there."""
    by_name = {kind.name: kind for kind in KINDS}
    return [
        (by_name[name], folder, title)
        for name in PICTURES
        if name in results
        for folder, title in by_name[name].columns(scene, results.values[name]).items()
    ]


def draw_overview(scene: Scene, results: Results, columns: Sequence[tuple[type["Kind"], str, str]]) -> "Figure":
    """A row per image and a column per kind of picture, from the files that are there."""
    from matplotlib.figure import Figure

    about = results.about
    rows = len(scene.shown)
    size = (1.6 * (len(columns) + 1) + 0.2, scene.row_height * rows + 1.1)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(rows, len(columns) + 1, squeeze=False)
    weights = Path(about["weights"]).name if about["weights"] else "without pretrained_weights"
    figure.suptitle(
        f"{Path(about['model_path']).name}, {weights} ({about['weights_sha256'][:8]})\n"
        f"{as_typed(scene.cfg.resolution)} pixels, patches of {scene.patch_size}",
        fontsize=10,
    )
    query = Query(*results.values[_Nearest.name]["query"]) if _Nearest.name in results else None
    for row, number in enumerate(scene.shown):
        pixels = scene.picture(number).numpy()
        show(axes[row, 0], pixels, "image" if row == 0 else "")
        axes[row, 0].set_ylabel(str(number), fontsize=9)
        if query is not None and number == query.image:
            _frame(axes[row, 0], query, scene)
        for ax, (kind, folder, title) in zip(axes[row, 1:], columns, strict=True):
            show(ax, _read(scene, folder, number), title if row == 0 else "")
            kind.annotate(ax, scene, results.values[kind.name], row)
    return figure


EVALUATION = Evaluation("visualizations", VisualizationsConfig, evaluate, parser)
main = EVALUATION.main

if __name__ == "__main__":
    sys.exit(main())
