"""Ranks and reductions. One process without a process group is the same code with `world_size() == 1`."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the job."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Processes in the job."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def all_reduce_max_(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_reduce_sum_(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; the same answer everywhere, so all ranks can act on it together."""
    if not is_distributed():
        return flag
    return bool(all_reduce_max_(torch.tensor(int(flag), device=device)).item())


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cuda`, `mps` or `cpu` stands for."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
