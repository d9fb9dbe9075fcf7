"""Linear layers without gradient in 8-bit floats."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError

FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply 8-bit floats: Ada."""


def multiply_in_fp8(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Make the linear layers of blocks without gradient multiply in 8-bit floats (e4m3), scaled row by row.

    Every token's features and every output's weights are divided by their largest magnitude, so that one large value
    costs its own row its precision and no other. Results are bfloat16.

    Raises: UserError if the GPU has no such units. A CPU computes it too, without being faster, if torch is new enough.
    """
    if device.type == "cpu" and not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"):
        raise UserError(
            f"efficiency.teacher_fp8=true: torch {torch.__version__} has no 8-bit float matmuls on a CPU; set it to "
            "false"
        )
    if device.type not in ("cuda", "cpu") or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY
    ):
        raise UserError(
            f"efficiency.teacher_fp8=true: {device.type} has no 8-bit float matmuls here, NVIDIA GPUs have them from "
            "compute capability 8.9 on; set it to false"
        )
    for block in blocks:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                forward: Any = functools.partial(_linear_in_fp8, linear)
                linear.forward = forward


def _linear_in_fp8(linear: nn.Linear, x: Tensor) -> Tensor:
    tokens, token_scales = _to_fp8(x.flatten(0, -2))
    weight, weight_scales = _to_fp8(linear.weight)
    by_row = F.ScalingType.RowWise
    scales = token_scales, by_row, weight_scales.T, by_row
    out = F.scaled_mm(tokens, weight.T, *scales, output_dtype=torch.bfloat16, use_fast_accum=True)
    out = out.unflatten(0, x.shape[:-1])
    return out if linear.bias is None else out + linear.bias.to(out.dtype)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by a scale `[rows, 1]` each, such that the largest magnitude is the largest number of the format."""
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scales).to(torch.float8_e4m3fn), scales
