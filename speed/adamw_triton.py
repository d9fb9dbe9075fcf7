"""A Triton kernel for GPUs of the update that `optim.AdamW8bit` makes, one launch for each parameter.

Step by step in torch an update is some thirty kernels for a parameter, and each reads and writes 32-bit values. Here a
program reads a few blocks of weights, gradients and 8-bit moments once, and writes the new ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 4
"""Blocks of moments that a program works on."""
SMALLEST = torch.finfo(torch.float32).tiny

OPTIONS = {"enable_fp_fusion": True}
"""Of the compiler: a * b + c in one operation, rounded once. Triton 3.9 warns if this is left to its default."""


@triton.jit
def _read(codes, scales, values, at, inside, blocks, num_blocks):
    """A moment in 32 bits, 0 outside."""
    levels = tl.load(values + tl.load(codes + at, mask=inside, other=0).to(tl.int32))
    scale = tl.load(scales + blocks, mask=blocks < num_blocks, other=0.0)
    return tl.where(inside, levels * scale[:, None], 0.0)


@triton.jit
def _write(x, codes, scales, middles, table, at, inside, blocks, num_blocks, smallest: tl.constexpr):
    """Round a moment; where a block is not finite, its scale is not."""
    largest = tl.max(tl.abs(x), 1)
    broken = tl.sum(x * 0.0, 1)  # 0, or no number: a maximum passes over what is none
    tl.store(scales + blocks, tl.where(broken == 0.0, largest, broken), mask=blocks < num_blocks)
    relative = tl.div_rn(x, tl.maximum(largest, smallest)[:, None] + tl.zeros_like(x))
    upper = relative.to(tl.int32, bitcast=True) >> 16
    below = tl.load(table + (upper + 32768)).to(tl.int32)
    code = below + (relative > tl.load(middles + below)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)


@triton.jit
def update_kernel(
    weights, grads, averages, average_scales, squares, square_scales, step,
    signed_values, signed_middles, signed_table, values, middles, table,
    num_blocks, size, lr, weight_decay, eps,
    log_beta1: tl.constexpr, log_beta2: tl.constexpr, beta1: tl.constexpr, beta2: tl.constexpr,
    blocks_at_once: tl.constexpr, columns: tl.constexpr, smallest: tl.constexpr,
):  # fmt: skip
    """AdamW on some blocks of a parameter, `step` updates before this one."""
    blocks = tl.program_id(0) * blocks_at_once + tl.arange(0, blocks_at_once)
    column = tl.arange(0, columns)
    inside = (blocks < num_blocks)[:, None] & (column < size)[None, :]
    at = blocks.to(tl.int64)[:, None] * size + column[None, :]
    weight = tl.load(weights + at, mask=inside, other=0.0)
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    average = _read(averages, average_scales, signed_values, at, inside, blocks, num_blocks)
    square = _read(squares, square_scales, values, at, inside, blocks, num_blocks)

    average = beta1 * average + (1 - beta1) * grad
    square = beta2 * square + (1 - beta2) * grad * grad
    # A power near 1 taken from 1: in 32 bits the first updates would have four digits less.
    number = tl.load(step).to(tl.float64) + 1
    of_average = (1 - tl.exp(number * log_beta1)).to(tl.float32)
    of_square = (1 - tl.exp(number * log_beta2)).to(tl.float32)
    divisor = tl.sqrt(square) / tl.sqrt(of_square) + eps
    weight = weight * (1 - lr * weight_decay) - lr / of_average * average / divisor

    tl.store(weights + at, weight, mask=inside)
    _write(average, averages, average_scales, signed_middles, signed_table, at, inside, blocks, num_blocks, smallest)
    _write(square, squares, square_scales, middles, table, at, inside, blocks, num_blocks, smallest)


def update_blocks(
    weights: Tensor,
    grads: Tensor,
    moments: Sequence[tuple[Tensor, Tensor]],
    levels: Sequence[tuple[Tensor, Tensor, Tensor]],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update this rank's part of a parameter and of its moments; `step` is left as it is.

    Args:
        weights: [blocks, size], as all that follows on the device of the kernel.
        grads: [blocks, size].
        moments: of the average and of the squares, codes [blocks, size] and scales [blocks].
        levels: of the same, values of the codes, the middles between them and the table that finds them: those of
            `optim`.
        step: updates before this one, a number on the device.
        lr: learning rate of the group.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of the group.
    """
    num_blocks, size = weights.shape
    if num_blocks == 0:
        return
    kernel: Any = update_kernel
    kernel[(triton.cdiv(num_blocks, BLOCKS),)](
        weights, grads, *moments[0], *moments[1], step, *levels[0], *levels[1],
        num_blocks, size, float(lr), float(weight_decay), float(eps),
        log_beta1=math.log(betas[0]), log_beta2=math.log(betas[1]), beta1=betas[0], beta2=betas[1],
        blocks_at_once=BLOCKS, columns=triton.next_power_of_2(size), smallest=SMALLEST, **OPTIONS,
    )  # fmt: skip
