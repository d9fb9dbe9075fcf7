"""What changes weights: schedules (step to value), parameter groups, and the moving average."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import CapiConfig, ScheduleConfig


@dataclass(frozen=True)
class WarmupThenCosine:
    """A value for every step: zeros, a linear warm-up, then part of a half cosine.

    Args:
        base_value: value at the end of the warm-up.
        final_value: value that the whole cosine would reach, and the value past the end.
        total_iters: length of the schedule in steps.
        warmup_iters: points of the warm-up, both ends included.
        start_warmup_value: first point of the warm-up.
        freeze_iters: steps at 0 before it.
        truncate_cos: fraction of the half cosine that is run through.
    """

    base_value: float
    final_value: float
    total_iters: int
    warmup_iters: int = 0
    start_warmup_value: float = 0.0
    freeze_iters: int = 0
    truncate_cos: float = 1.0

    def __call__(self, step: int) -> float:
        """Value for the update that makes `step` finished updates into `step + 1`."""
        if step >= self.total_iters:
            return self.final_value
        if step < self.freeze_iters:
            return 0.0
        step -= self.freeze_iters
        if step < self.warmup_iters:
            share = step / (self.warmup_iters - 1) if self.warmup_iters > 1 else 0.0
            return self.start_warmup_value + share * (self.base_value - self.start_warmup_value)
        progress = (step - self.warmup_iters) / (self.total_iters - self.freeze_iters - self.warmup_iters)
        cosine = 1 + math.cos(math.pi * self.truncate_cos * progress)
        return self.final_value + 0.5 * (self.base_value - self.final_value) * cosine

    @classmethod
    def from_config(cls, schedule: ScheduleConfig, total_iters: int) -> "WarmupThenCosine":
        """The schedule of a config section, with its warm-up in steps."""
        return cls(
            base_value=schedule.base_value,
            final_value=schedule.final_value,
            total_iters=total_iters,
            warmup_iters=schedule.warmup_steps(total_iters),
            start_warmup_value=schedule.start_warmup_value,
            freeze_iters=schedule.freeze_iters,
            truncate_cos=schedule.truncate_cos,
        )


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one update."""

    lr: float
    weight_decay: float
    momentum: float
    """EMA momentum m in ema = m * ema + (1 - m) * student."""
    clustering_lr: float


def hyper_at(step: int, cfg: CapiConfig) -> Hyper:
    """Hyper-parameters of the update after `step` finished ones. Pure, so a resumed run has nothing to restore."""
    total = cfg.optim.total_iters
    return Hyper(
        lr=WarmupThenCosine.from_config(cfg.optim.lr_schedule, total)(step),
        weight_decay=cfg.optim.weight_decay,
        momentum=WarmupThenCosine.from_config(cfg.optim.momentum_schedule, total)(step),
        clustering_lr=WarmupThenCosine.from_config(cfg.capi.clustering_optimizer.lr_schedule, total)(step),
    )


@dataclass(frozen=True)
class Multipliers:
    """What a parameter's learning rate and weight decay are multiplied by."""

    lr: float = 1.0
    weight_decay: float = 1.0


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


def make_student_optimizer(student: nn.Module, cfg: CapiConfig) -> torch.optim.AdamW:
    """AdamW with one group per pair of multipliers; `set_hyper` sets its learning rates and weight decays."""
    by_name = multipliers(
        student,
        patch_embed_lr_mult=cfg.optim.patch_embed_lr_mult,
        rope_lr_mult=cfg.optim.rope_lr_mult,
        layernorm_wd_mult=cfg.optim.layernorm_wd_mult,
    )
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        groups.setdefault(by_name[name], []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_multiplier": m.lr, "wd_multiplier": m.weight_decay}
            for m, parameters in groups.items()
        ],
        lr=0.0,
        betas=cfg.optim.betas,
        fused=True,
    )


def make_clustering_optimizer(head: nn.Module, cfg: CapiConfig) -> torch.optim.AdamW:
    """AdamW of the clustering head, one group."""
    settings = cfg.capi.clustering_optimizer
    return torch.optim.AdamW(
        head.parameters(), lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def set_hyper(
    student_optimizer: torch.optim.Optimizer, clustering_optimizer: torch.optim.Optimizer, hyper: Hyper
) -> None:
    """Write this update's learning rates and weight decays into the optimizers' groups."""
    for group in student_optimizer.param_groups:
        group["lr"] = hyper.lr * group["lr_multiplier"]
        group["weight_decay"] = hyper.weight_decay * group["wd_multiplier"]
    for group in clustering_optimizer.param_groups:
        group["lr"] = hyper.clustering_lr


@torch.no_grad()
def ema_update_(ema: nn.Module, module: nn.Module, momentum: float) -> None:
    """`ema = momentum * ema + (1 - momentum) * module`, parameter by parameter, on whatever shard each rank holds."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # the optimizers use it too
        list(ema.parameters()), list(module.parameters()), 1 - momentum
    )


def grad_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a module, on its device."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
