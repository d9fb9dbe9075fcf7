"""Tokenizers: what gives every patch of an image one of so many ids, which CAE (arXiv:2202.03026) learns to predict.

The published one is the encoder of DALL-E's discrete autoencoder (arXiv:2102.12092); `load_tokenizer` downloads it from
`DALLE_ENCODER` or takes a file of it. Any model file of the evaluations becomes another: k-means on its patch features,
with a cluster for each id.

    python cae_tokenizer.py model_loader_kwargs.pretrained_weights=runs/mine/student_ema.pth dataset=/my/images \\
        output=tokenizer.safetensors [vocabulary_size=8192] [image_size=224] [model_path=model.py]

The file has the centres of the clusters, and says which model, data and keys they were made of; the same command finds
it again. Whoever loads it runs the model file that it names. `--help-all` shows all keys.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import functools
import itertools
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from config import COUNT, MISSING, build, changed_keys, load_config, require, within
from data import dead_workers_explained
from distributed import on_rank_0, rank, session
from evaluation import (
    ROOT,
    SPEED_KEYS,
    Features,
    FrozenModel,
    FrozenModelConfig,
    ImageBatches,
    extract,
    hash_loader,
    hash_weights,
    load_model_file,
    model_name,
    open_dataset,
    squashed,
)
from keys import answer
from reading.sources import ImageDataset
from readouts import nearest
from utils import (
    Bands,
    UserError,
    as_typed,
    as_written,
    both_sides,
    derive_seed,
    ending_in_words,
    replacing,
    setup_logging,
    writing_explained,
)
from weights import load_strictly, local_path, not_finite, read_state_dict, save_safetensors

logger = logging.getLogger("tokenizer")

DALLE_ENCODER = "https://cdn.openai.com/dall-e/encoder.pkl"
"""Address of the published encoder, a pickled module, of which the tensors alone are read."""
DALLE_PACKAGES = ("dall_e", "torch.nn")
"""Where the classes of that module are from. None of them is imported."""


class Tokenizer(nn.Module):
    """A frozen network that gives every patch of an image an id from 0 to `vocabulary_size` - 1.

    It is called with images `[b, c, *image_size]` of values in [0, 1], not normalised, and returns ids `[b, n]` of the
    `grid_size` rows and columns of patches, row by row.
    """

    description: str
    """What it is, in a line for logs and results; tokenizers with the same description give the same ids."""

    def __init__(
        self,
        *,
        vocabulary_size: int,
        image_size: int | Sequence[int],
        patch_size: int,
        bands: Bands | None = None,
    ) -> None:
        super().__init__()
        self.bands = bands
        """Of the images that it was made of; None for RGB of any depth."""
        self.vocabulary_size, self.patch_size = vocabulary_size, patch_size
        self.image_size = height, width = both_sides(image_size)
        self.grid_size = height // patch_size, width // patch_size

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b n"]:
        """Ids of the patches, on the device of the images, which must be the tokenizer's."""
        num = 3 if self.bands is None else self.bands.num
        assert images.shape[1:] == (num, *self.image_size), "it was loaded for another image size"
        with torch.autocast(images.device.type, enabled=False):  # its precision is its own, whatever is trained
            return self._ids(images)

    def _ids(self, images: Float[Tensor, "b 3 h w"]) -> Int64[Tensor, "b n"]:
        raise NotImplementedError


def _check_image_size(image_size: int | Sequence[int], patch_size: int, key: str, source: object) -> None:
    """Raise UserError if images of that size are no whole number of patches."""
    sides = both_sides(image_size)
    if any(side % patch_size for side in sides):
        near = [max(1, round(side / patch_size)) * patch_size for side in sides]
        raise UserError(
            f"{key}={str(source)!r} has patches of {patch_size} pixels, into which images of {as_typed(image_size)} do "
            f"not divide; choose another image size, such as {as_typed(near)}"
        )


# ------------------------------------------------------------------------------------------------ DALL-E's encoder

DALLE_DEPTH = 4
"""Groups of blocks, each but the last of which halves the sides of what it sees."""
DALLE_BLOCKS = 2
"""Blocks of a group."""
DALLE_PATCH_SIZE = 2 ** (DALLE_DEPTH - 1)


def map_pixels(images: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Values of [0, 1] as DALL-E's encoder expects them, from 0.1 to 0.9."""
    return 0.8 * images + 0.1


class _Conv(nn.Module):
    """A convolution that keeps the size, computed in the precision of its weight; names are those of the weights."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_dim, in_dim, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.empty(out_dim))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=self.w.shape[-1] // 2)


class _ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        dims = [in_dim, *[out_dim // 4] * 3, out_dim]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (before, after) in enumerate(itertools.pairwise(dims), 1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = _Conv(before, after, 1 if number == 4 else 3)
        self.id_path = nn.Identity() if in_dim == out_dim else _Conv(in_dim, out_dim, 1)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        return self.id_path(x) + self.res_path(x) / (DALLE_DEPTH * DALLE_BLOCKS) ** 2


class DalleEncoder(nn.Module):
    """The encoder of DALL-E's discrete autoencoder: logits of a token for every 8 x 8 pixels.

    Weights are uninitialised and have the published names.

    Args:
        width: channels of the first group, doubled in each that follows; published: 256.
        vocabulary_size: tokens to tell apart; published: 8192.
    """

    def __init__(self, width: int = 256, vocabulary_size: int = 8192) -> None:
        super().__init__()
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=_Conv(3, width, 7))
        dim = width
        for depth in range(DALLE_DEPTH):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(1, DALLE_BLOCKS + 1):
                group[f"block_{number}"] = _ResidualBlock(dim, width * 2**depth)
                dim = width * 2**depth
            if depth < DALLE_DEPTH - 1:
                group["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{depth + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_Conv(dim, vocabulary_size, 1)))
        self.blocks = nn.Sequential(blocks)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hp wp"]:
        """Logits of every token, from the output of `map_pixels`; both sides must be multiples of 8."""
        return self.blocks(x)


class DalleTokenizer(Tokenizer):
    """The token to which DALL-E's encoder gives the largest logit, of several the first.

    On CUDA all layers but the last compute in float16, as published.
    """

    def __init__(self, encoder: DalleEncoder, *, image_size: int | Sequence[int], device: torch.device) -> None:
        vocabulary_size = len(encoder.blocks.get_submodule("output.conv").get_parameter("b"))
        super().__init__(vocabulary_size=vocabulary_size, image_size=image_size, patch_size=DALLE_PATCH_SIZE)
        self.description = f"DALL-E's encoder, {vocabulary_size} tokens, weights {hash_weights(encoder)[:12]}"
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            for name, part in encoder.blocks.named_children():
                part.to(torch.float32 if name == "output" else torch.float16)

    def _ids(self, images: Float[Tensor, "b 3 h w"]) -> Int64[Tensor, "b n"]:
        return self.encoder(map_pixels(images)).argmax(dim=1).flatten(1)


def _load_dalle(
    state: dict[str, Any], source: str, image_size: int | Sequence[int], device: torch.device, key: str
) -> DalleTokenizer:
    _check_image_size(image_size, DALLE_PATCH_SIZE, key, source)
    sizes = {}
    for name, bias in (("width", "blocks.input.b"), ("vocabulary_size", "blocks.output.conv.b")):
        if isinstance(state.get(bias), Tensor) and state[bias].ndim == 1:
            sizes[name] = len(state[bias])
    with torch.device("meta"):
        encoder = DalleEncoder(**sizes)
    encoder.to_empty(device="cpu")
    remedy = f"Give the encoder that was published with DALL-E ({DALLE_ENCODER}), or a file of cae_tokenizer.py"
    load_strictly(encoder, state, f"{key}={source}", remedy=remedy)
    return DalleTokenizer(encoder, image_size=image_size, device=device)


# ----------------------------------------------------------------------------------------------------- k-means


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(FrozenModelConfig):
    """Of which model and images a tokenizer is made, and how; these keys are also in its file."""

    dataset: str = MISSING
    """Folder of images, or data URL."""
    output: str = MISSING
    """File to write, ending in `.safetensors`."""
    vocabulary_size: int = field(default=8192, metadata=within(at_least=2))
    """Number of clusters, each of which is an id."""
    image_size: int | tuple[int, int] = field(default=224, metadata=COUNT)
    """Pixels of the images that it will be given, the side of squares or [height, width]: the patch size of the model
    times the grid of CAE."""
    num_images: int = field(default=20_000, metadata=COUNT)
    """Images whose patches are clustered, chosen at random; all of them if there are fewer."""
    patches_per_image: int = field(default=16, metadata=COUNT)
    """Patches of each, chosen at random; all of them if there are fewer."""

    def __post_init__(self) -> None:
        """Check the name of the file, and write squares as one number."""
        object.__setattr__(self, "image_size", as_written(self.image_size))
        require(self.output.endswith(".safetensors"), "output", self.output, "must end in .safetensors")


CENTRES = "centres"
"""The only tensor of a file: a row for each cluster."""
NOTES = "tokenizer"
"""Its metadata: the keys that it was made with, and hashes of the model and the data, as JSON."""


class KMeansTokenizer(Tokenizer):
    """The centre of a cluster that is nearest to the features of a patch.

    The model sees images as in the evaluations, of its bands and with the normalisation of the configuration.
    """

    centres: Tensor

    def __init__(self, model: FrozenModel, centres: Float[Tensor, "k d"], cfg: TokenizerConfig) -> None:
        super().__init__(
            vocabulary_size=len(centres), image_size=cfg.image_size, patch_size=model.patch_size, bands=model.bands
        )
        self.model = model
        self.register_buffer(CENTRES, centres.to(model.device))
        name = model_name(cfg.model_path, cfg.model_loader_kwargs)
        self.description = (
            f"k-means, {len(centres)} clusters of patch features of {name} (weights {model.sha256[:12]}), centres "
            f"{hash_weights(self)[:12]}"
        )

    def _ids(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b n"]:
        pixels = images if self.model.bands.value_range is not None else (255 * images).round().to(torch.uint8)
        features = self.model(pixels, check_finite=False).feature_map
        return nearest(features.flatten(0, 2), self.centres, 1, "L2")[1].view(len(images), -1)


def _load_kmeans(
    centres: Tensor, path: Path, image_size: int | Sequence[int], device: torch.device, key: str
) -> KMeansTokenizer:
    notes = _read_notes(path, key)
    cfg = build(TokenizerConfig, notes["config"])
    if centres.ndim != 2 or len(centres) != cfg.vocabulary_size or not centres.is_floating_point():
        fault = f"its centres are {centres.dtype} {list(centres.shape)}, not numbers of {cfg.vocabulary_size} clusters"
    else:
        fault = not_finite([(CENTRES, centres)])
    if fault:
        raise UserError(f"{key}={str(path)!r} is damaged: {fault}; make it again")
    if as_written(image_size) != cfg.image_size:
        raise UserError(
            f"{key}={str(path)!r} is for images of {as_typed(cfg.image_size)} pixels, not {as_typed(image_size)}; "
            f"choose that image size, or make another one with cae_tokenizer.py image_size={as_typed(image_size)}"
        )
    try:
        model = _frozen_model(cfg, device)
    except UserError as error:
        raise UserError(f"{key}={str(path)!r} needs the model that it was made of, as it was: {error}") from error
    if model.sha256 != notes["weights_sha256"]:
        raise UserError(
            f"{key}={str(path)!r} was made with other weights of {cfg.model_path} with {cfg.model_loader_kwargs} "
            f"({notes['weights_sha256'][:12]}, these are {model.sha256[:12]}); bring those back, or make another one"
        )
    return KMeansTokenizer(model, centres, cfg)


def _frozen_model(cfg: TokenizerConfig, device: torch.device) -> FrozenModel:
    torch.manual_seed(cfg.seed)  # for the weights of a model without pretrained ones
    return FrozenModel(load_model_file(cfg.model_path, cfg.model_loader_kwargs), cfg, device, cfg.model_path)


def _read_notes(path: Path, key: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()[NOTES])
        notes = {name: notes[name] for name in ("config", "weights_sha256", "loader_sha256", "data")}
        notes["config"] = dict(notes["config"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{key}={str(path)!r} was not written by cae_tokenizer.py, or is damaged: {error}") from error
    return notes


def _squashed(image: Image.Image | Tensor, _target: Any, size: tuple[int, int]) -> tuple[Tensor]:
    return (squashed(image, size),)


def sample_patches(cfg: TokenizerConfig, model: FrozenModel, dataset: ImageDataset) -> Float[Tensor, "p d"]:
    """Features of some patches of some images, both chosen by the seed alone; those of all ranks, on the CPU."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(derive_seed(cfg.seed, "images")))
    batches = ImageBatches(
        dataset,
        functools.partial(_squashed, size=both_sides(cfg.image_size)),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        indices=order[: cfg.num_images].tolist(),
        pin=model.device.type == "cuda",
        title="images",
        bands=model.bands,
    )
    numbers = itertools.count(batches.share.start)

    def choose(features: Features) -> tuple[Tensor]:
        patches = features.feature_map.flatten(1, 2)
        chosen = []
        for rows in patches:
            generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "patches", next(numbers)))
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[: cfg.patches_per_image].to(rows.device)])
        return (torch.cat(chosen),)

    (patches,) = extract(model, batches, choose)
    require(
        len(patches) >= cfg.vocabulary_size,
        "vocabulary_size",
        cfg.vocabulary_size,
        f"there are {len(patches)} patches for so many clusters; choose fewer, or more of num_images and "
        "patches_per_image",
    )
    return patches


def fit_centres(patches: Float[Tensor, "p d"], vocabulary_size: int, seed: int) -> Float[Tensor, "k d"]:
    """Centres of clusters of rows: scikit-learn's mini-batch k-means."""
    from sklearn.cluster import MiniBatchKMeans

    batch_size = max(1024, vocabulary_size)
    kmeans = MiniBatchKMeans(vocabulary_size, batch_size=batch_size, random_state=seed % 2**32).fit(patches.numpy())
    logger.info(
        "%d patches: %d of %d clusters have some, their mean squared distance is %.4g of the variance",
        len(patches),
        len(np.unique(kmeans.labels_)),
        vocabulary_size,
        kmeans.inertia_ / len(patches) / patches.var(dim=0, correction=0).sum().item(),
    )
    return torch.from_numpy(kmeans.cluster_centers_).to(patches.dtype)


def make_tokenizer(cfg: TokenizerConfig, device: torch.device) -> None:
    """Write the file, unless it is there; all ranks call this together.

    Raises: UserError if the file is of another model, other data or other keys, or cannot be written.
    """
    model = _frozen_model(cfg, device)
    _check_image_size(cfg.image_size, model.patch_size, "model_path", cfg.model_path)
    dataset = open_dataset(cfg.dataset, "dataset", model.bands)
    used = model.normalisation
    cfg = replace(cfg, image_mean=list(used.mean), image_std=list(used.std))
    path, movable = Path(cfg.output), _with_absolute_paths(cfg)
    notes = {
        "config": asdict(movable),
        "weights_sha256": model.sha256,
        "loader_sha256": hash_loader(cfg.model_path, cfg.model_loader_kwargs),
        "data": dataset.fingerprint(),
    }
    if on_rank_0(path.is_file):
        changed = changed_keys(_identity(_read_notes(path, "output")), _identity(notes))
        if changed:
            what = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise UserError(f"output={cfg.output} is another tokenizer ({what}); choose another name, or delete it")
        logger.info("%s is there already", path)
        return

    with writing_explained(path.parent, "output"):
        on_rank_0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    patches = sample_patches(cfg, model, dataset)

    def write() -> None:
        centres = fit_centres(patches, cfg.vocabulary_size, cfg.seed)
        with writing_explained(path.parent, "output"), replacing(path) as temporary:
            save_safetensors({CENTRES: centres}, temporary, {NOTES: json.dumps(notes)})
        logger.info("%s: %s", path, KMeansTokenizer(model, centres, movable).description)

    on_rank_0(write)


def _identity(notes: dict[str, Any]) -> dict[str, Any]:
    """What the ids depend on; where model and data are does not count, but what is there."""
    free = (*SPEED_KEYS, "output", "dataset", "model_path", "model_loader_kwargs")
    return notes | {"config": {key: value for key, value in notes["config"].items() if key not in free}}


def _with_absolute_paths(cfg: TokenizerConfig) -> TokenizerConfig:
    """The same model for whoever loads it from another folder; files of this repository are found from anywhere."""

    def absolute(value: Any) -> Any:
        is_elsewhere = isinstance(value, str) and Path(value).is_file() and not (ROOT / value).is_file()
        return str(Path(value).resolve()) if is_elsewhere else value

    arguments = {key: absolute(value) for key, value in cfg.model_loader_kwargs.items()}
    return replace(cfg, model_path=absolute(cfg.model_path), model_loader_kwargs=arguments)


# ----------------------------------------------------------------------------------------------------- loading


def load_tokenizer(
    path: str | Path, *, image_size: int | Sequence[int], device: torch.device | str, key: str = "tokenizer"
) -> Tokenizer:
    """The tokenizer of a file, for images of `image_size` pixels.

    No code in the file is run. One that this script wrote names a model file, which is.

    Args:
        path: what this script wrote; or DALL-E's encoder, as published or as a state dict in a `.pth` or `.safetensors`
            file. An address, such as `DALLE_ENCODER`, is downloaded once into torch's hub folder.
        image_size: of the images that it will be called with: side of squares, or height and width. DALL-E's patches
            are of 8 pixels.
        device: where it computes.
        key: configuration key that `path` comes from, for messages.

    Raises: UserError if the file cannot be read, is refused or is no tokenizer, does not fit the image size, or was
        made with another model.
    """
    device = torch.device(device)
    state = read_state_dict(path, key=key, module_packages=DALLE_PACKAGES)
    if state.keys() == {CENTRES}:
        tokenizer = _load_kmeans(state[CENTRES], local_path(path), image_size, device, key)
    else:
        tokenizer = _load_dalle(state, str(path), image_size, device, key)
    logger.info("%s=%s: %s", key, path, tokenizer.description)
    return tokenizer


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    answer(args, TokenizerConfig, args.sources)
    cfg = load_config(TokenizerConfig, None, args.sources)
    with session(cfg.device, key="device") as device, dead_workers_explained("num_workers"):
        setup_logging(quiet=rank() != 0)
        make_tokenizer(cfg, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
