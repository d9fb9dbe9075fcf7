"""Attention by the kernels of xformers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from utils import UserError


def attend_by_xformers(layers: Iterable[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Make attention layers (`model.Attention`) call xformers' kernels instead of torch's.

    Raises: UserError if it is not installed, or has none for this device and precision.
    """
    key, remedy = "efficiency.attention=xformers", "use efficiency.attention=sdpa"
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise UserError(f"{key}: the package is not installed ({error}); pip install xformers, or {remedy}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From and to `[b, heads, n, dh]`; xformers has the tokens before the heads."""
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    for layer in layers:
        width = layer.proj.in_features // layer.num_heads
        tried = [torch.zeros(1, layer.num_heads, 8, width, device=device, dtype=dtype) for _ in range(3)]
        try:
            attend(*(x.requires_grad_() for x in tried))
        except NotImplementedError as error:
            reason = (
                f"it has no kernel for {dtype} and heads of width {width} on {device.type}, as it is installed here"
            )
            raise UserError(f"{key}: {reason}; {remedy}") from error
        layer.attend = attend
