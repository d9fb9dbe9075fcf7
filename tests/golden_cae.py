"""The networks and inputs of CAE's published vectors, a stand-in for a tokenizer, and tiny runs.

Code that a test runs in a process of its own imports this file too: it needs the root and `tests` on its path.
"""

import math
from collections.abc import Mapping

import torch
from conftest import load_golden_json
from golden_ijepa import hashed
from torch import Tensor, nn

from cae import Encoder, Predictor

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
