"""Triton kernels of the clustering head's step, for GPUs; `speed/clustering.py` says what they compute.

The logits stay in the precision of the matmul. With n Sinkhorn rounds they are read from memory n + 1 times: for the
largest one and the mass of each prototype, once per further round, and for loss, targets and residuals (assignments
minus prediction), which are written over them. All that is summed is float32, in the same order in every run.

Scaling a token takes a sum over all prototypes, and what it then gives to each of them is needed after that. Up to
`MOST_HELD` prototypes a program holds whole tokens in registers in between (kernels `held_*`). Beyond, it reads them
twice, and the second time they come from a cache only where few programs share it.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
ROWS, COLUMNS = 16, 256
"""Tokens and prototypes that a program works on at a time."""
MOST_HELD = 16384
"""Logits that a program holds: with as many offsets and sums they fill the registers of a multiprocessor of an H100."""
HELD_ROWS = 32
"""Tokens of a position that such a program works on, one after the other or several at a time. Then it writes what they
gave to each prototype: a sixteenth of the bytes that it read, if the logits are bfloat16."""
ROUND_VALUES, LEARN_VALUES = 32, 16
"""Logits per thread of such programs. Compiled for an H100, the first needs 127 registers of 128 and spills none, the
second needs all of 64 and spills 18."""

OPTIONS = {"enable_fp_fusion": True}
"""Of the compiler: a * b + c in one operation, rounded once. Triton 3.9 warns if this is left to its default, which
differs between versions."""
MULTIPLE = 16
"""Rows of logits and targets begin at a multiple of so many values, or they would be read and written two bytes at a
time."""


@triton.jit
def _read(logits, rows, columns, b, k, stride):
    """Logits as float32, 0 outside, and where they are inside."""
    inside = (rows < b)[:, None] & (columns < k)[None, :]
    at = logits + rows[:, None] * stride + columns[None, :]
    # Up to `stride`, of which the compiler knows that 16 divides it, many bytes are read at a time; up to k it is two.
    read = tl.load(at, mask=(rows < b)[:, None] & (columns < stride)[None, :], other=0.0)
    return tl.where(inside, read.to(tl.float32), 0.0), inside, at


@triton.jit
def _exponentials(logits, maxima, rows, columns, b, k, stride, scale, shift):
    """exp((logits - maxima) / temperature + shift), 0 outside, and what `_read` gives.

    `scale` and `shift` are for powers of two.
    """
    read, inside, at = _read(logits, rows, columns, b, k, stride)
    largest = tl.load(maxima + columns, mask=columns < k, other=0.0)
    return tl.where(inside, tl.exp2((read - largest[None, :]) * scale + shift), 0.0), read, inside, at


@triton.jit
def _row(vector, columns, k):
    """Some of a vector of all prototypes, 0 outside, to multiply tokens with."""
    return tl.load(vector + columns, mask=columns < k, other=0.0)[None, :]


@triton.jit
def column_kernel(logits, maxima, sums, b, k, stride, scale, rows_at_once: tl.constexpr, columns_at_once: tl.constexpr):
    """Of each prototype: largest logit, and sum over tokens of exp((logit - largest) / temperature)."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * columns_at_once + tl.arange(0, columns_at_once)
    largest = tl.full([columns_at_once], -float("inf"), tl.float32)
    total = tl.zeros([columns_at_once], tl.float32)
    for start in range(0, b, rows_at_once):
        rows = start + tl.arange(0, rows_at_once)
        read, inside, _ = _read(logits + position * b * stride, rows, columns, b, k, stride)
        present = (rows < b)[:, None] | (columns >= k)[None, :]  # a column outside is full of zeros, for no inf - inf
        found = tl.maximum(largest, tl.max(tl.where(present, read, -float("inf")), 0))
        here = tl.where(inside, tl.exp2((read - found[None, :]) * scale), 0.0)
        total = total * tl.exp2((largest - found) * scale) + tl.sum(here, 0)
        largest = found
    tl.store(maxima + position * k + columns, largest, mask=columns < k)
    tl.store(sums + position * k + columns, total, mask=columns < k)


@triton.jit
def round_kernel(
    logits, maxima, prototype, token, partial, b, k, stride, scale, shift, eps,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Scale some tokens of a position; what they then give to each prototype goes to a row of `partial`."""
    block, position = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * rows_at_once + tl.arange(0, rows_at_once)
    logits, maxima, prototype = logits + position * b * stride, maxima + position * k, prototype + position * k
    sums = tl.zeros([rows_at_once], tl.float32)
    for start in range(0, k, columns_at_once):
        columns = start + tl.arange(0, columns_at_once)
        e, _, _, _ = _exponentials(logits, maxima, rows, columns, b, k, stride, scale, shift)
        sums += tl.sum(e * _row(prototype, columns, k), 1)
    own = token + position * b + rows
    scaling = tl.load(own, mask=rows < b, other=1.0)
    scaling = scaling / (scaling * sums + eps)
    tl.store(own, scaling, mask=rows < b)
    partial += (position * tl.num_programs(0) + block) * k
    for start in range(0, k, columns_at_once):  # again, for the sums were not known; by now from the cache
        columns = start + tl.arange(0, columns_at_once)
        e, _, _, _ = _exponentials(logits, maxima, rows, columns, b, k, stride, scale, shift)
        tl.store(partial + columns, tl.sum(e * scaling[:, None], 0), mask=columns < k)


@triton.jit
def _held_tokens(logits, offset, rows, columns, b, k, stride, scale):
    """What whole tokens give to each prototype before they are scaled, 0 outside, and what `_read` gives."""
    read, inside, at = _read(logits, rows, columns, b, k, stride)
    return tl.where(inside, tl.exp2(read * scale + offset[None, :]), 0.0), read, inside, at


@triton.jit
def held_round_kernel(
    logits, offsets, token, partial, b, k, stride, scale, eps, num_groups,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """As `round_kernel`, with all prototypes at once; `partial` gets the sums with the prototypes' scaling in them.

    `offsets`: what `_exponentials` subtracts and adds, and the binary logarithm of the prototypes' scaling.
    """
    block, position = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, columns_at_once)
    logits, token = logits + position * b * stride, token + position * b
    offset = tl.load(offsets + position * k + columns, mask=columns < k, other=0.0)
    sums = tl.zeros([columns_at_once], tl.float32)
    # Two stages: the next tokens are on their way to shared memory while these are worked on.
    first = block * num_groups
    for group in tl.range(first, first + num_groups, num_stages=2):  # pyright: ignore[reportGeneralTypeIssues]
        rows = group * rows_at_once + tl.arange(0, rows_at_once)
        e, _, _, _ = _held_tokens(logits, offset, rows, columns, b, k, stride, scale)
        scaling = tl.load(token + rows, mask=rows < b, other=1.0)
        scaling = scaling / (scaling * tl.sum(e, 1) + eps)
        tl.store(token + rows, scaling, mask=rows < b)
        sums += tl.sum(e * scaling[:, None], 0)
    partial += (position * tl.num_programs(0) + block) * k
    tl.store(partial + columns, sums, mask=columns < k)


@triton.jit
def held_learn_kernel(
    logits, offsets, token, slots, targets, losses, partial, b, k, stride, scale, eps, pred_scale, num_groups,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """As `learn_kernel`, with all prototypes at once, and `offsets` as in `held_round_kernel`."""
    block, position = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, columns_at_once)
    logits, token = logits + position * b * stride, token + position * b
    slots, losses = slots + position * b, losses + position * b
    offset = tl.load(offsets + position * k + columns, mask=columns < k, other=0.0)
    residual_sums = tl.zeros([columns_at_once], tl.float32)
    for group in range(block * num_groups, (block + 1) * num_groups):
        rows = group * rows_at_once + tl.arange(0, rows_at_once)
        e, read, inside, at = _held_tokens(logits, offset, rows, columns, b, k, stride, scale)
        scaling = tl.load(token + rows, mask=rows < b, other=1.0)
        sums = tl.sum(e, 1)
        scaling = scaling / (scaling * sums + eps)
        sums = scaling * sums  # of the assignments: about 1
        largest = tl.max(tl.where(inside | (rows >= b)[:, None], read, -float("inf")), 1)
        log2 = (read - tl.expand_dims(largest, 1)) * pred_scale  # of the prediction, before it is normalised
        prediction = tl.where(inside, tl.exp2(log2), 0.0)
        exp_sums = tl.where(rows < b, tl.sum(prediction, 1), 1.0)
        assignments = e * scaling[:, None]
        slot = tl.load(slots + rows, mask=rows < b, other=-1).to(tl.int64)
        wanted = (slot >= 0)[:, None] & (columns < stride)[None, :]
        tl.store(targets + slot[:, None] * stride + columns[None, :], assignments, mask=wanted)
        dot = tl.sum(tl.where(inside, assignments * log2, 0.0), 1)
        residuals = assignments - prediction * (sums / exp_sums)[:, None]
        tl.store(at, residuals, mask=(rows < b)[:, None] & (columns < stride)[None, :])
        residual_sums += tl.sum(residuals, 0)
        tl.store(losses + rows, sums * tl.log2(exp_sums) - dot, mask=rows < b)
    partial += (position * tl.num_programs(0) + block) * k
    tl.store(partial + columns, residual_sums, mask=columns < k)


@triton.jit
def learn_kernel(
    logits, maxima, prototype, token, slots, targets, losses, partial, b, k, stride, scale, shift, eps, pred_scale,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Scale some tokens a last time; their losses in bits, targets, and residuals, whose sums `partial` gets."""
    block, position = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * rows_at_once + tl.arange(0, rows_at_once)
    logits, maxima, prototype = logits + position * b * stride, maxima + position * k, prototype + position * k
    sums = tl.zeros([rows_at_once], tl.float32)
    largest = tl.full([rows_at_once], -float("inf"), tl.float32)
    exp_sums = tl.zeros([rows_at_once], tl.float32)
    for start in range(0, k, columns_at_once):
        columns = start + tl.arange(0, columns_at_once)
        e, read, inside, _ = _exponentials(logits, maxima, rows, columns, b, k, stride, scale, shift)
        sums += tl.sum(e * _row(prototype, columns, k), 1)
        present = (columns < k)[None, :] | (rows >= b)[:, None]
        found = tl.maximum(largest, tl.max(tl.where(present, read, -float("inf")), 1))
        here = tl.where(inside, tl.exp2((read - found[:, None]) * pred_scale), 0.0)
        exp_sums = exp_sums * tl.exp2((largest - found) * pred_scale) + tl.sum(here, 1)
        largest = found
    scaling = tl.load(token + position * b + rows, mask=rows < b, other=1.0)
    scaling = scaling / (scaling * sums + eps)
    sums = scaling * sums  # of the assignments: about 1
    exp_sums = tl.where(rows < b, exp_sums, 1.0)
    slot = tl.load(slots + position * b + rows, mask=rows < b, other=-1).to(tl.int64)
    dot = tl.zeros([rows_at_once], tl.float32)
    partial += (position * tl.num_programs(0) + block) * k
    for start in range(0, k, columns_at_once):
        columns = start + tl.arange(0, columns_at_once)
        e, read, inside, at = _exponentials(logits, maxima, rows, columns, b, k, stride, scale, shift)
        assignments = tl.where(inside, e * _row(prototype, columns, k) * scaling[:, None], 0.0)
        wanted = (slot >= 0)[:, None] & (columns < stride)[None, :]
        tl.store(targets + slot[:, None] * stride + columns[None, :], assignments, mask=wanted)
        log2 = (read - largest[:, None]) * pred_scale  # of the prediction, before it is normalised
        dot += tl.sum(tl.where(inside, assignments * log2, 0.0), 1)
        residuals = tl.where(inside, assignments - tl.exp2(log2) * (sums / exp_sums)[:, None], 0.0)
        tl.store(at, residuals, mask=(rows < b)[:, None] & (columns < stride)[None, :])
        tl.store(partial + columns, tl.sum(residuals, 0), mask=columns < k)
    losses += position * b + rows
    tl.store(losses, sums * tl.log2(exp_sums) - dot, mask=rows < b)


@triton.jit
def largest_kernel(
    logits, offsets, largest, b, k, stride, scale, rows_at_once: tl.constexpr, columns_at_once: tl.constexpr
):
    """The prototype of each token's largest assignment; `offsets` as in `held_round_kernel`."""
    block, position = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * rows_at_once + tl.arange(0, rows_at_once)
    logits, offsets = logits + position * b * stride, offsets + position * k
    most = tl.full([rows_at_once], -float("inf"), tl.float32)
    which = tl.zeros([rows_at_once], tl.int32)
    for start in range(0, k, columns_at_once):
        columns = start + tl.arange(0, columns_at_once)
        read, inside, _ = _read(logits, rows, columns, b, k, stride)
        log2 = tl.where(inside, read * scale + _row(offsets, columns, k), -float("inf"))
        value, column = tl.max(log2, 1, return_indices=True)
        which = tl.where(value > most, start + column, which)
        most = tl.maximum(value, most)
    tl.store(largest + position * b + rows, which, mask=rows < b)


def held_shape(b: int, k: int) -> tuple[int, int] | None:
    """Tokens and prototypes, powers of two, that a program holds at a time; None if there are too many prototypes."""
    if k > MOST_HELD:
        return None
    columns = triton.next_power_of_2(k)
    return min(MOST_HELD // columns, HELD_ROWS, triton.next_power_of_2(b)), columns


def _groups(b: int, held: tuple[int, int]) -> int:
    """How often a program takes tokens that it holds: as many as there are, if that is less than `HELD_ROWS`."""
    return min(HELD_ROWS, triton.next_power_of_2(b)) // held[0]


def _launch(
    kernel: Any, grid: tuple[int, int], *arguments: Any, shape: tuple[int, int] = (ROWS, COLUMNS), num_warps: int = 4
) -> None:
    kernel[grid](*arguments, *shape, num_warps=num_warps, **OPTIONS)


def warps(shape: tuple[int, int], values_per_thread: int) -> int:
    """Warps of a program that holds logits of this shape."""
    return max(4, math.prod(shape) // (32 * values_per_thread))


class TritonPart:
    """`speed.clustering.Part` on a GPU.

    Args:
        logits: `[c, b, k]`, with rows a multiple of `MULTIPLE` apart; so are those of the targets.
        first: the first of these positions.
        target_temp: temperature of the assignments.
        pred_temp: temperature of the prediction.
        shift: exponent of each prototype's largest logit.
        eps: Sinkhorn's.
    """

    def __init__(
        self, logits: Tensor, first: int, *, target_temp: float, pred_temp: float, shift: float, eps: float
    ) -> None:
        self.logits, self.first, self.shift, self.eps = logits, first, shift * LOG2_E, eps
        self.scale, self.pred_scale = LOG2_E / target_temp, LOG2_E / pred_temp
        self.stride = logits.stride(1)
        assert self.stride % MULTIPLE == 0
        self.token = torch.ones(logits.shape[:2], device=logits.device)
        self._columns: tuple[Tensor, Tensor] | None = None
        self._maxima = self.token

    def _vectors(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.logits.device)

    def maxima(self) -> Tensor:
        """Largest logit of each prototype; its mass is found on the way."""
        self._columns = self._read_columns()
        return self._columns[0].clone()  # the largest one of all ranks is written over it

    def first_sums(self, maxima: Tensor) -> Tensor:
        """Mass of each prototype before the first round."""
        own, sums = self._columns or self._read_columns()
        self._maxima = maxima
        return sums * torch.exp2((own - maxima) * self.scale + self.shift)

    def _read_columns(self) -> tuple[Tensor, Tensor]:
        c, b, k = self.logits.shape
        largest, sums = self._vectors(c, k), self._vectors(c, k)
        _launch(column_kernel, (c, triton.cdiv(k, COLUMNS)), self.logits, largest, sums, b, k, self.stride, self.scale)
        return largest, sums

    def next_sums(self, prototype: Tensor) -> Tensor:
        """Scale the tokens, given the prototypes' scaling; mass of each prototype after that, without its scaling."""
        c, b, k = self.logits.shape
        if held := held_shape(b, k):
            blocks = triton.cdiv(b, HELD_ROWS)
            partial = self._vectors(c, blocks, k)
            _launch(
                held_round_kernel, (blocks, c), self.logits, self._offsets(prototype), self.token, partial, b, k,
                self.stride, self.scale, self.eps, _groups(b, held), shape=held,
                num_warps=warps(held, ROUND_VALUES),
            )  # fmt: skip
            return partial.sum(dim=1) / prototype
        blocks = triton.cdiv(b, ROWS)
        partial = self._vectors(c, blocks, k)
        _launch(
            round_kernel, (blocks, c), self.logits, self._maxima, prototype, self.token, partial, b, k,
            self.stride, self.scale, self.shift, self.eps,
        )  # fmt: skip
        return partial.sum(dim=1)

    def _offsets(self, prototype: Tensor) -> Tensor:
        return (self.shift - self._maxima * self.scale).add_(prototype.log2())

    def learn_(self, prototype: Tensor, results: Any) -> None:
        """Scale the tokens a last time; add to the results of the pass; write residuals over the logits."""
        c, b, k = self.logits.shape
        if results.mass is not None:
            self._add_usage(prototype, results)
        held, slots = held_shape(b, k), results.slots[self.first : self.first + c]
        blocks = triton.cdiv(b, HELD_ROWS if held else ROWS)
        losses, partial = self._vectors(c, b), self._vectors(c, blocks, k)
        if held:
            _launch(
                held_learn_kernel, (blocks, c), self.logits, self._offsets(prototype), self.token, slots,
                results.targets, losses, partial, b, k, self.stride, self.scale, self.eps, self.pred_scale,
                _groups(b, held), shape=held, num_warps=warps(held, LEARN_VALUES),
            )  # fmt: skip
        else:
            _launch(
                learn_kernel, (blocks, c), self.logits, self._maxima, prototype, self.token, slots, results.targets,
                losses, partial, b, k, self.stride, self.scale, self.shift, self.eps, self.pred_scale, num_warps=8,
            )  # fmt: skip
        results.loss += losses.sum(dtype=results.loss.dtype) / LOG2_E
        if results.bias_grad is not None:
            results.bias_grad += partial.sum(dim=(0, 1))

    def _add_usage(self, prototype: Tensor, results: Any) -> None:
        """Count how often each prototype is used; the tokens' scaling stays as it is."""
        c, b, k = self.logits.shape
        token, self.token = self.token, self.token.clone()
        mass = (self.next_sums(prototype) * prototype).sum(dim=0)
        self.token = token
        largest = torch.empty(c, b, dtype=torch.int32, device=self.logits.device)
        _launch(
            largest_kernel, (triton.cdiv(b, ROWS), c), self.logits, self._offsets(prototype), largest, b, k,
            self.stride, self.scale,
        )  # fmt: skip
        results.add_usage(mass, largest)
