"""The networks and inputs of I-JEPA's and StoP's published vectors, and tiny runs of both.

Code that a test runs in a process of its own imports this file too: it needs the root and `tests` on its path.
"""

import math
from pathlib import Path

import numpy as np
import torch
from commands import TINY_TRAINING
from conftest import load_golden_json
from torch import Tensor, nn

from config import load_config
from data import Batch
from ijepa import Encoder, Predictor
from train_ijepa import DEFAULT_CONFIG, IjepaConfig, IjepaState

IJEPA, STOP = load_golden_json("vectors_ijepa"), load_golden_json("vectors_stop")

GOLDEN_CONFIG = [
    "train.device=cpu",
    "optim.total_iters=10",
    "optim.batch_size_per_gpu=2",
    "optim.lr_schedule.warmup_iters=2",
    "data.images_size=48",
    "model={patch_size: 12, embed_dim: 32, depth: 2, num_heads: 4}",
    "predictor={embed_dim: 16, depth: 2}",
    "masks.min_keep=2",
    "efficiency.param_dtype=float32",
    "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true",
    "evals=null",
]
STOP_NOISE = "predictor.position_noise_std=0.25"

TINY_RUN = [
    *TINY_TRAINING,
    "optim.momentum=[0.9,1.0]",
    "data.images_size=32",
    "model={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "predictor={embed_dim: 16, depth: 1}",
    "masks.min_keep=4",
]


def tiny_run(images: Path | str, output_dir: Path, *overrides: str) -> list[str]:
    """Command-line arguments of a tiny run."""
    return [*TINY_RUN, f"data.dataset={images}", f"train.output_dir={output_dir}", *overrides]


def hashed(num: int, index: int) -> Tensor:
    """Rule H: uniform numbers in [0, 1), from integers alone."""
    x = np.arange(num, dtype=np.uint32) + np.uint32(1000003 * (index + 1))
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return torch.from_numpy(x / 2**32)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    for index, (key, tensor) in enumerate(sorted(module.state_dict().items())):
        if "pos_embed" in key:
            continue
        amplitude = math.sqrt(3 * tensor.shape[0] / tensor.numel()) if tensor.ndim > 1 else 0.1
        values = amplitude * (2 * hashed(tensor.numel(), index) - 1)
        owner, _, kind = key.rpartition(".")
        values += 1 if kind == "weight" and "norm" in owner.rpartition(".")[2] else 0
        tensor.copy_(values.view(tensor.shape))


def tiny_networks() -> tuple[Encoder, Predictor]:
    """The networks of the vectors, with the weights of the vectors."""
    encoder = Encoder(grid_size=4, patch_size=12, embed_dim=32, depth=2, num_heads=4)
    predictor = Predictor(grid_size=4, encoder_dim=32, embed_dim=16, depth=2, num_heads=4)
    fill(encoder)
    fill(predictor)
    return encoder, predictor


IMAGES = (2 * hashed(2 * 3 * 48 * 48, 776) - 1).float().view(2, 3, 48, 48)
CONTEXT, TARGET = torch.tensor(IJEPA["tiny"]["enc_masks"]), torch.tensor(IJEPA["tiny"]["pred_masks"])


def golden_state(*overrides: str) -> IjepaState:
    """The state before the first step of the vectors."""
    state = IjepaState(load_config(IjepaConfig, DEFAULT_CONFIG, [*GOLDEN_CONFIG, *overrides]), torch.device("cpu"))
    for module in (*state.student.values(), state.student_ema["backbone"]):
        fill(module)
    return state


def golden_batches(accumulation_steps: int = 1) -> list[Batch]:
    """Images and masks of the vectors as so many batches."""
    parts = zip(*(x.chunk(accumulation_steps, dim) for x, dim in ((IMAGES, 0), (CONTEXT, 1), (TARGET, 1))), strict=True)
    return [
        Batch(images=images, masks={"context_indices": context, "target_indices": target}, sample_ids=torch.arange(1))
        for images, context, target in parts
    ]
