"""The networks and inputs of CAE's published vectors, a stand-in for a tokenizer, and tiny runs.

Code that a test runs in a process of its own imports this file too: it needs the root and `tests` on its path.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from commands import TINY_TRAINING
from conftest import load_golden_json, seeded
from golden_ijepa import hashed
from torch import Tensor, nn

from cae import Encoder, Predictor
from cae_tokenizer import DalleEncoder
from config import load_config
from data import Batch
from train_cae import DEFAULT_CONFIG, CaeConfig, CaeState

CAE = load_golden_json("vectors_cae")
TINY = CAE["tiny"]
NOT_IN_STATE = "alignment_encoder."
"""Keys of the published networks that repeat the encoder; they count where weights are filled by their number."""

IMAGES = (2 * hashed(2 * 3 * 32 * 32, 776) - 1).float().view(2, 3, 32, 32)
HIDDEN = torch.zeros(2, 16, dtype=torch.bool).scatter(1, torch.tensor(TINY["mask_true_idx"]), value=True)
VISIBLE_INDICES, PREDICT_INDICES = ((mask.flatten()).nonzero().squeeze(1) for mask in (~HIDDEN, HIDDEN))
LABELS = torch.tensor(TINY["labels"])


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], skipped: str = "-") -> None:
    """Rule H with its additions for CAE; keys that begin with `skipped` count and may hold anything."""
    for index, key in enumerate(sorted(tensors)):
        tensor = tensors[key]
        if "pos_embed" in key or key.startswith(skipped) or not tensor.is_floating_point():
            continue
        amplitude = math.sqrt(3 * tensor.shape[0] / tensor.numel()) if tensor.ndim > 1 else 0.1
        values = amplitude * (2 * hashed(tensor.numel(), index) - 1)
        owner, _, kind = key.rpartition(".")
        values += 1 if kind == "weight" and "norm" in owner.rpartition(".")[2] else 0
        values += 0.5 if "gamma" in kind else 0
        tensor.copy_(values.view(tensor.shape))


def published_state(encoder: nn.Module, predictor: nn.Module) -> dict[str, Tensor]:
    """The weights as a published file of a whole training has them, in its order."""
    rest = predictor.state_dict()
    first = {key: rest.pop(key) for key in ("rd_pos_embed", "mask_token")}
    encoders = {
        f"{name}.{key}": x for name in ("encoder", "alignment_encoder") for key, x in encoder.state_dict().items()
    }
    return {**first, **encoders, **rest}


def tiny_networks(dim: int = 32) -> tuple[Encoder, Predictor]:
    """The networks of the vectors, with the weights of the vectors; `dim` is the width of regressor and decoder."""
    encoder = Encoder(grid_size=4, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    predictor = Predictor(
        grid_size=4, encoder_dim=32, embed_dim=dim, regressor_depth=2, decoder_depth=2, num_heads=4, vocabulary_size=16
    )
    fill(published_state(encoder, predictor), NOT_IN_STATE)
    return encoder, predictor


GOLDEN_CONFIG = [
    "train.device=cpu",
    "optim.total_iters=10",
    "optim.batch_size_per_gpu=2",
    "data.images_size=32",
    "data.min_block=4",
    "model={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, drop_path_rate: 0.0}",
    "regressor={embed_dim: 32, depth: 2, num_heads: 4}",
    "decoder={depth: 2, vocabulary_size: 16}",
    "tokenizer.image_size=32",
    "efficiency.param_dtype=float32",
    "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true",
    "evals=null",
]
DROP_PATH = "model.drop_path_rate=0.5"
NARROW = "regressor.embed_dim=16"


class GoldenTokenizer:
    """Gives the hidden patches of the images of the vectors their labels, and the others something else."""

    vocabulary_size, patch_size, grid_size, description = 16, 8, (4, 4), "labels of the vectors"

    def __init__(self) -> None:
        self.ids = torch.full((32,), 7).index_copy(0, PREDICT_INDICES, LABELS).view(2, 16)

    def __call__(self, images: Tensor) -> Tensor:
        """The first value of an image says which of the two it is."""
        return self.ids[(255 * images[:, 0, 0, 0]).round().long()]


def golden_state(*overrides: str) -> CaeState:
    """The state before the first step of the vectors."""
    state = CaeState(load_config(CaeConfig, DEFAULT_CONFIG, [*GOLDEN_CONFIG, *overrides]), torch.device("cpu"))
    fill(published_state(state.student["backbone"], state.student["predictor"]), NOT_IN_STATE)
    return state


def golden_batches(accumulation_steps: int = 1) -> list[Batch]:
    """Images and masks of the vectors as so many batches."""
    numbers = torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    size = 2 // accumulation_steps
    return [
        Batch(
            images=IMAGES[first : first + size],
            second_images=numbers[first : first + size],
            masks={
                "visible_indices": VISIBLE_INDICES[8 * first :][: 8 * size] - 16 * first,
                "predict_indices": PREDICT_INDICES[8 * first :][: 8 * size] - 16 * first,
            },
            sample_ids=torch.arange(size),
        )
        for first in range(0, 2, size)
    ]


TINY_RUN = [
    *TINY_TRAINING,
    "data.images_size=32",
    "data.min_block=4",
    "model={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "regressor={embed_dim: 32, depth: 1, num_heads: 2}",
    "decoder={depth: 1, vocabulary_size: 16}",
    "tokenizer.image_size=32",
    DROP_PATH,
]


def tiny_run(images: Path | str, output_dir: Path, *overrides: str) -> list[str]:
    """Command-line arguments of a tiny run, whose tokenizer is beside the images as `save_tokenizer` writes it."""
    place = [f"data.dataset={images}", f"tokenizer.path={images}.tokenizer.pth", f"train.output_dir={output_dir}"]
    return [*TINY_RUN, *place, *overrides]


def save_tokenizer(images: Path) -> None:
    """A small random encoder of DALL-E's kind, in a file that `tiny_run` names; nothing in it overflows float16."""
    encoder = DalleEncoder(width=4, vocabulary_size=16)
    for parameter in encoder.parameters():
        std = math.sqrt(2 * parameter.shape[0] / parameter.numel()) if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, std=std, generator=seeded(parameter.numel()))
    torch.save(encoder.state_dict(), f"{images}.tokenizer.pth")
