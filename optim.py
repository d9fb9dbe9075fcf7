"""What changes weights: schedules (step to value), optimizers with a group per multiplier, and the moving average.

AdamW keeps two moments of each weight, averages of its gradients and of their squares: in 32 bits, or in 8.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from config import OPTIMIZERS, ScheduleConfig, StartConfig
from distributed import zeros_by_rows


def scheduled(schedule: ScheduleConfig, step: int, total_iters: int) -> float:
    """Value for the update that makes `step` finished updates into `step + 1`.

    Zeros, a linear warm-up whose both ends are counted, then part of a half cosine; past the end the final value.
    """
    if step >= total_iters:
        return schedule.final_value
    if step < schedule.freeze_iters:
        return 0.0
    step -= schedule.freeze_iters
    warmup = schedule.warmup_steps(total_iters)
    if step < warmup:
        share = step / (warmup - 1) if warmup > 1 else 0.0
        return schedule.start_warmup_value + share * (schedule.base_value - schedule.start_warmup_value)
    progress = (step - warmup) / (total_iters - schedule.freeze_iters - warmup)
    return half_cosine(schedule.base_value, schedule.final_value, progress, schedule.truncate_cos)


def scheduled_ahead(schedule: ScheduleConfig, step: int, total_iters: int) -> float:
    """As `scheduled`, but where the scheduler moves before the optimizer: the first update has the value of step 1.

    Of the warm-up only the end is counted: its first update is a step above the start value, and the first one after it
    has the base value. The last update of all has the final value.
    """
    step += 1 - schedule.freeze_iters
    if step <= 0:
        return 0.0
    warmup = schedule.warmup_steps(total_iters)
    if step < warmup:
        return schedule.start_warmup_value + step / warmup * (schedule.base_value - schedule.start_warmup_value)
    num_steps = total_iters - schedule.freeze_iters - warmup
    progress = min(1.0, (step - warmup) / num_steps) if num_steps else 1.0
    return half_cosine(schedule.base_value, schedule.final_value, progress, schedule.truncate_cos)


def stepped(progress: float, milestones: Sequence[float], factor: float = 0.1) -> float:
    """What a learning rate is multiplied by that is multiplied with `factor` at each of the milestones."""
    return factor ** sum(progress >= milestone for milestone in milestones)


def warmed_half_cosine(progress: float, warmup: float, total: float) -> float:
    """What a learning rate is multiplied by that rises linearly until `warmup`, then falls along a half cosine to 0."""
    return progress / warmup if progress < warmup else half_cosine(1.0, 0.0, (progress - warmup) / (total - warmup))


def half_cosine(start: float, end: float, progress: float, truncate: float = 1.0) -> float:
    """From `start` at progress 0 to `end` at progress 1, along the first `truncate` of a half cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * truncate * progress))


@dataclass(frozen=True)
class Multipliers:
    """What a parameter's learning rate and weight decay are multiplied by."""

    lr: float = 1.0
    weight_decay: float = 1.0
    part: str = ""
    """Of a network, whose learning rate has a course of its own; see `set_rates_`."""


def multipliers(
    module: nn.Module, *, patch_embed_lr_mult: float, rope_lr_mult: float, layernorm_wd_mult: float
) -> dict[str, Multipliers]:
    """Multipliers of every parameter by name: no decay on biases and `gamma`, the given ones on the rest."""
    result = {}
    for name, _ in module.named_parameters():
        parts = name.split(".")
        lr, weight_decay = 1.0, 1.0
        if "patch_embed" in parts:
            lr *= patch_embed_lr_mult
        if "rope" in parts:
            lr *= rope_lr_mult
        if any("norm" in part for part in parts):
            weight_decay *= layernorm_wd_mult
        if parts[-1] in ("bias", "gamma"):
            weight_decay = 0.0
        result[name] = Multipliers(lr, weight_decay)
    return result


def decay_of_matrices(module: nn.Module) -> dict[str, Multipliers]:
    """Multipliers of every parameter by name: no decay on what has one axis, such as biases, norms and scales."""
    return {name: Multipliers(weight_decay=float(p.ndim > 1)) for name, p in module.named_parameters()}


def in_parts(
    by_name: Mapping[str, Multipliers], part_of: Callable[[str], str], start: StartConfig
) -> Mapping[str, Multipliers]:
    """The same multipliers with the part of each parameter, which follows from its name, if parts learn differently."""
    if not start.tells_parts_apart:
        return by_name
    return {name: replace(own, part=part_of(name)) for name, own in by_name.items()}


def part_of(name: str) -> str:
    """The part of a student {backbone, predictor} that a parameter belongs to: encoder or predictor."""
    return {"backbone": "encoder"}.get(top := name.split(".")[0], top)


def started_rates(step: int, start: StartConfig, total_iters: int) -> dict[str, float]:
    """What the learning rates of the parts `encoder` and `predictor` are multiplied by in the update after `step`
    finished ones."""
    first, end = start.steps(total_iters)
    ramp = min(1.0, max(0.0, (step + 1 - first) / max(1, end - first)))
    return {"encoder": start.encoder_lr_mult * ramp, "predictor": start.predictor_lr_mult}


def make_adamw(
    module: nn.Module, kind: str, betas: tuple[float, float], by_name: Mapping[str, Multipliers] | None = None
) -> torch.optim.Optimizer:
    """AdamW with one group for all of the same multipliers; `set_rates_` gives it learning rate and weight decay.

    Args:
        module: whose parameters are updated.
        kind: one of `config.OPTIMIZERS`. Each goes on from what the other one saved.
        betas: of AdamW.
        by_name: multipliers of every parameter; None for 1.
    """
    assert kind in OPTIMIZERS
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        groups.setdefault(by_name[name] if by_name else Multipliers(), []).append(parameter)
    described = [
        {"params": parameters, "lr_multiplier": m.lr, "wd_multiplier": m.weight_decay, "part": m.part}
        for m, parameters in groups.items()
    ]
    if kind == "AdamW8bit":
        return AdamW8bit(described, betas)
    optimizer = torch.optim.AdamW(described, lr=0.0, betas=betas, fused=True)
    optimizer.register_load_state_dict_pre_hook(_in_32_bits)
    return optimizer


def set_rates_(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, of_parts: Mapping[str, float] | None = None
) -> None:
    """Write this update's learning rate and weight decay into the groups, times their multipliers.

    Args:
        optimizer: of `make_adamw`.
        lr: learning rate.
        weight_decay: of what has a multiplier of 1.
        of_parts: what the learning rate of some parts is multiplied by in this update; 1 for others.
    """
    of_parts = of_parts or {}
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"] * of_parts.get(group["part"], 1.0)
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


@torch.no_grad()
def ema_update_(ema: nn.Module, module: nn.Module, momentum: float) -> None:
    """`ema = momentum * ema + (1 - momentum) * module`, parameter by parameter, on whatever shard each rank holds."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # the optimizers use it too
        list(ema.parameters()), list(module.parameters()), 1 - momentum
    )


def grad_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a module, on its device."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


# --- Moments in 8 bits -----------------------------------------------------------------------------------------------

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What AdamW keeps of each weight, and whether it has a sign."""
SMALLEST_8_BIT = 4096
"""A parameter of fewer values keeps its moments in 32 bits, as in the authors' library: there is little to gain."""
BLOCK_SIZES = range(256, 15, -1)
"""Values that share a scale, the most first. 256 is the paper's."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW that keeps its moments in 8 bits between updates (arXiv:2110.02861): 2 bytes per weight instead of 8.

    An update is that of torch's AdamW, in float32, on some blocks of weights at a time. Then each block of moments is
    divided by its largest magnitude, and each value rounded to the nearest of the paper's 256 levels, which lie the
    closer the smaller they are. The levels of the squares have no zero: divided by the root of a square that was
    rounded to zero, a gradient would move a weight a thousandfold.

    A block lies within a row of the parameter, so that the same values share a scale however the rows are divided over
    ranks. What has no rows, or few values, or rows that no number of `BLOCK_SIZES` divides, stays in 32 bits.

    The state of a parameter is as torch's, but for the 8-bit codes in `exp_avg` and `exp_avg_sq`, of the parameter's
    shape, and the scales of their blocks [rows, blocks] in `exp_avg_scale` and `exp_avg_sq_scale`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update what has a gradient."""
        assert closure is None
        for group in self.param_groups:
            whole: list[list[Tensor]] = [[], [], [], [], []]
            steps = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_fresh_state(parameter))
                weights, grads = _own(parameter), _own(parameter.grad)
                if size := block_size(parameter.shape):
                    kept = _Kept.of(state, size)
                    weights, grads = weights.view(-1, size), grads.reshape(-1, size)
                    update = _update_by_kernel if has_kernel(weights.device) else _update_blocks
                    update(weights, grads, kept, state["step"], group)
                    steps.append(state["step"])
                else:
                    own = (weights, grads, _own(state["exp_avg"]), _own(state["exp_avg_sq"]), state["step"])
                    for listed, tensor in zip(whole, own, strict=True):
                        listed.append(tensor)
            _update(whole, group)
            if steps:
                torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an optimizer of either kind had; its tensors become this one's."""
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})  # it would make floats of codes
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = _in_8_bits(parameters[index], state)


def block_size(shape: torch.Size) -> int | None:
    """Values that share a scale in the 8-bit moments of a parameter of this shape; None if they stay in 32 bits."""
    if shape.numel() < SMALLEST_8_BIT:
        return None
    row = shape.numel() // shape[0]
    return next((size for size in BLOCK_SIZES if row % size == 0), None)


def moments_bytes(module: nn.Module, kind: str) -> int:
    """Bytes that an optimizer of `make_adamw` keeps of all parameters of a module, on all ranks together."""
    total = 0
    for parameter in module.parameters():
        size = block_size(parameter.shape) if kind == "AdamW8bit" else None
        total += len(MOMENTS) * (
            4 * parameter.numel() if size is None else parameter.numel() + 4 * parameter.numel() // size
        )
    return total


class _Levels(NamedTuple):
    """What 8 bits can say, in [-1, 1] or [0, 1], and what finds the nearest."""

    values: Tensor
    """In ascending order."""
    middles: Tensor
    """Between each value and the next one, and infinity behind the last one."""
    table: Tensor
    """By the upper 16 bits of a float32, as a signed number, plus 2^15: how many middles are below the lowest float32
    that has them. There is at most one between that and the highest."""

    @classmethod
    @functools.cache
    def on(cls, device: torch.device, signed: bool) -> "_Levels":
        """The paper's dynamic tree, in which each smaller decade has half as many values. Without sign and without zero
        it has one value less."""
        positive = [1.0]
        for decade in range(7):
            num = 2 ** (6 - decade) if signed else 2 ** (7 - decade)
            width = 0.9 / num
            positive += [10**-decade * (0.1 + width * (i + 0.5)) for i in range(num)]
        values = torch.tensor(sorted([*positive, 0.0, *(-x for x in positive if x < 1)] if signed else positive))
        middles = (values[1:] + values[:-1]) / 2
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
        table = torch.bucketize(lowest, middles).to(torch.uint8)
        return cls(values.to(device), torch.cat([middles, torch.tensor([torch.inf])]).to(device), table.to(device))

    def nearest(self, x: Tensor) -> Tensor:
        """The codes of the nearest values. A binary search would take ten times as long on a CPU."""
        below = self.table.index_select(0, (x.view(torch.int32) >> 16).add_(2**15).flatten())
        codes = below.view_as(x)
        return codes.add_(x > self.middles.index_select(0, below.int()).view_as(x))


class _Kept(NamedTuple):
    """One moment of some blocks of weights."""

    codes: Tensor
    """[blocks, size]"""
    scales: Tensor
    """[blocks]"""
    signed: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor], size: int) -> "list[_Kept]":
        """This rank's part of both moments of a parameter."""
        return [
            cls(_own(state[name]).view(-1, size), _own(state[f"{name}_scale"]).view(-1), signed)
            for name, signed in MOMENTS.items()
        ]

    def read(self) -> Tensor:
        """In 32 bits."""
        values = _Levels.on(self.codes.device, self.signed).values.index_select(0, self.codes.flatten().int())
        return values.view_as(self.codes).mul_(self.scales[:, None])

    def write_(self, x: Tensor) -> None:
        """Round. Where a block is not finite, its scale is not."""
        torch.amax(x.abs(), 1, out=self.scales)
        relative = x / self.scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.codes.copy_(_Levels.on(x.device, self.signed).nearest(relative))


def _update(parts: Sequence[list[Tensor]], group: Mapping[str, Any]) -> None:
    """AdamW in 32 bits, of torch, on lists of weights, gradients, averages, squares and steps, which it counts."""
    weights, grads, averages, squares, steps = parts
    beta1, beta2 = group["betas"]
    adamw(
        weights, grads, averages, squares, [], steps, amsgrad=False, maximize=False, fused=True,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


def _update_blocks(
    weights: Tensor, grads: Tensor, kept: Sequence[_Kept], step: Tensor, group: Mapping[str, Any]
) -> None:
    """Update this rank's part [blocks, size] of a parameter, and of its moments, some blocks at a time: so many that
    temporary tensors stay small, on a CPU within its cache."""
    num_blocks, size = weights.shape
    at_once = max(1, (2**18 if weights.device.type == "cpu" else 2**24) // size)
    for start in range(0, num_blocks, at_once):
        part = slice(start, start + at_once)
        here = [_Kept(codes[part], scales[part], signed) for codes, scales, signed in kept]
        moments = [each.read() for each in here]
        _update([[tensor] for tensor in (weights[part], grads[part], *moments, step.clone())], group)
        for each, moment in zip(here, moments, strict=True):
            each.write_(moment)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether 8-bit moments are updated in one pass there, by `speed/adamw_triton.py`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _update_by_kernel(
    weights: Tensor, grads: Tensor, kept: Sequence[_Kept], step: Tensor, group: Mapping[str, Any]
) -> None:
    """The same in one pass on a GPU."""
    from speed.adamw_triton import update_blocks  # here, for it needs triton

    update_blocks(
        weights,
        grads,
        [(each.codes, each.scales) for each in kept],
        [_Levels.on(weights.device, each.signed) for each in kept],
        step,
        **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
    )


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    state, size = {"step": torch.zeros((), device=parameter.device)}, block_size(parameter.shape)
    for name in MOMENTS:
        state[name] = torch.zeros_like(parameter, dtype=torch.float32 if size is None else torch.uint8)
        if size is not None:
            scales = (parameter.shape[0], parameter.numel() // parameter.shape[0] // size)
            state[f"{name}_scale"] = zeros_by_rows(parameter, scales, torch.float32)
    return state


def _in_8_bits(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State as `AdamW8bit` has it, of such state or of torch's AdamW."""
    size = block_size(parameter.shape)
    if size is None or "exp_avg_scale" in state:
        return {name: value.to(parameter.device) for name, value in state.items()}
    result = _fresh_state(parameter) | {"step": state["step"].to(parameter.device)}
    for kept, name in zip(_Kept.of(result, size), MOMENTS, strict=True):
        kept.write_(_own(state[name]).reshape(-1, size))
    return result


def _in_32_bits(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer of either kind saved, as torch's AdamW has it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = dict(state_dict["state"])
    for index, state in states.items():
        if "exp_avg_scale" in state:
            size = block_size(parameters[index].shape)
            assert size is not None
            states[index] = {"step": state["step"], **{name: torch.zeros_like(parameters[index]) for name in MOMENTS}}
            for kept, name in zip(_Kept.of(state, size), MOMENTS, strict=True):
                own = _own(states[index][name])
                own.copy_(kept.read().view_as(own))
    return {**state_dict, "state": states}


def _own(x: Tensor) -> Tensor:
    """This rank's part."""
    return x.to_local() if isinstance(x, DTensor) else x
