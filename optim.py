"""What changes weights: schedules (step to value), optimizers with a group per multiplier, and the moving average."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from config import ScheduleConfig, StartConfig


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
    module: nn.Module, betas: tuple[float, float], by_name: Mapping[str, Multipliers] | None = None
) -> torch.optim.AdamW:
    """AdamW with one group for all of the same multipliers; `set_rates_` gives it learning rate and weight decay.

    Args:
        module: whose parameters are updated.
        betas: of AdamW.
        by_name: multipliers of every parameter; None for 1.
    """
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        groups.setdefault(by_name[name] if by_name else Multipliers(), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_multiplier": m.lr, "wd_multiplier": m.weight_decay, "part": m.part}
            for m, parameters in groups.items()
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


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
