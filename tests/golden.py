"""Models, heads and training steps that several test files compare with: golden ones, and a tiny one.

Code that a test runs in a process of its own imports this file too: it needs the root and `tests` on its path.
"""

from typing import Any

import torch
from conftest import load_golden, seeded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import train_capi
from clustering import OnlineClustering, TargetStep
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import Batch
from model import EncoderDecoder
from speed.clustering import learn_in_chunks
from train_capi import CapiConfig

TRAJECTORY, META = load_golden("trajectory_default")
CLUSTERING, _ = load_golden("clustering")

GOLDEN_CONFIG = [
    "train.device=cpu",
    f"capi.num_clusters={META['num_clusters']}",
    f"data.images_size={META['image'][-1]}",
    f"optim.total_iters={META['steps']}",
    "optim.lr_schedule.warmup_iters=2",
    "optim.momentum_schedule.warmup_iters=2",
    f"optim.momentum_schedule.base_value={META['optim']['momentum']['base_value']}",
    "capi.clustering_optimizer.lr_schedule.warmup_iters=2",
    "model.transformers_kwargs.embed_dim=64",
    "model.transformers_kwargs.drop_path_rate=0",
    "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=4",
    "model.encoder_kwargs.depth=3",
    "model.decoder_kwargs.depth=2",
    "efficiency.param_dtype=float32",
    "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true",
]
DROP_PATH = "model.transformers_kwargs.drop_path_rate=0.3"
NAIVE = "model.transformers_kwargs.block_kwargs.drop_path_type=naive"
NUM_PATCHES = 36
"""Patches of a golden image."""


def golden_part(prefix: str) -> dict[str, Tensor]:
    """Tensors of the golden trajectory whose names begin with the prefix, which is cut off."""
    return {key.removeprefix(prefix): value for key, value in TRAJECTORY.items() if key.startswith(prefix)}


def golden_state(*overrides: str, device: str = "cpu") -> train_capi.CapiState:
    """The state before the golden trajectory's first step."""
    sources = [*GOLDEN_CONFIG, f"train.device={device}", *overrides]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources)
    state = train_capi.CapiState(cfg, torch.device(device))
    load_whole(state.student, golden_part("init.student."))
    load_whole(state.student_ema, golden_part("init.student."))
    load_whole(state.clustering, golden_part("init.clustering."))
    return state


def load_whole(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whole weights into a module that may be divided over ranks."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            is_divided = isinstance(parameter, DTensor)
            parts = (parameter.device_mesh, parameter.placements) if is_divided else ()
            parameter.copy_(distribute_tensor(weights[key], *parts) if is_divided else weights[key])


def golden_batches(step: int, accumulation_steps: int) -> list[Batch]:
    """The step's six images as so many batches."""
    tensors = golden_part(f"step{step}.")
    per_batch = len(tensors["images"]) // accumulation_steps
    batches = []
    for i in range(accumulation_steps):
        share = {name: tensors[name].chunk(accumulation_steps)[i] for name in tensors}
        offset = i * per_batch * NUM_PATCHES
        batches.append(
            Batch(
                images=share["images"],
                masks={name: share[name] - offset for name in ("visible_indices", "predict_indices")},
                sample_ids=torch.arange(per_batch),
            ).to("cpu")
        )
    return batches


def frequencies(state: train_capi.CapiState) -> list[nn.Parameter]:
    """The student's rotary frequencies, which learn only if they are asked to."""
    return [parameter for name, parameter in state.student.named_parameters() if name.endswith("rope.freqs")]


def golden_head(positionwise: bool) -> tuple[OnlineClustering, dict[str, Tensor]]:
    """The golden clustering head, and what goes into it and comes out."""
    prefix = f"clustering.positionwise_{positionwise}."
    tensors = {k.removeprefix(prefix): v for k, v in CLUSTERING.items() if k.startswith(prefix)}
    k, d = tensors["weight"].shape
    head = OnlineClustering(
        d, k, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12, positionwise_sk=positionwise
    )
    head.load_state_dict({"layer.weight": tensors["weight"], "layer.bias": tensors["bias"]})
    return head, tensors


def with_kernel(head: OnlineClustering, kernel: str, chunk: int | None = None) -> OnlineClustering:
    """The head as `capi.clustering_kernel` and `capi.clustering_chunk` have it, on the CPU."""
    if kernel == "plain":
        return head
    return learn_in_chunks(head, kernel=kernel, device=torch.device("cpu"), chunk=chunk)


def golden_step(
    head: OnlineClustering,
    golden: dict[str, Tensor],
    kernel: str,
    chunk: int | None = None,
    *,
    with_usage: bool = False,
) -> TargetStep:
    """A step on the golden features, whose targets, loss and gradients must be golden."""
    p, b, _ = golden["x"].shape
    predict_indices = torch.randperm(p * b, generator=seeded(0))[:25]
    step = with_kernel(head, kernel, chunk).step(golden["x"], predict_indices, with_usage=with_usage)
    expected = golden["assignments"][predict_indices % p, predict_indices // p]
    torch.testing.assert_close(step.targets, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(step.loss, golden["loss"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(head.layer.weight.grad, golden["grad_weight"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.layer.bias.grad, golden["grad_bias"], atol=1e-5, rtol=1e-4)
    if step.mass is not None:
        torch.testing.assert_close(step.mass, golden["assignments"].sum((0, 1)), atol=1e-4, rtol=1e-4)
    return step


def tiny_model(**changes: Any) -> EncoderDecoder:
    """Two blocks of 32 channels each for encoder and predictor, no drop-path; `changes` replace arguments."""
    kwargs: dict[str, Any] = {
        "patch_size": 4,
        "n_registers": 4,
        "transformers_kwargs": {
            "embed_dim": 32,
            "drop_path_rate": 0.0,
            "block_kwargs": {"attn_kwargs": {"num_heads": 2}},
        },
        "encoder_kwargs": {"depth": 2},
        "decoder_kwargs": {"depth": 2},
    }
    return EncoderDecoder(**(kwargs | changes))
