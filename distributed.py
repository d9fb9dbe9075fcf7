"""Ranks: how this process finds its peers, and what they reduce. One process alone is the same code with one rank.

`session` starts a process group from the variables of `torchrun` or of Slurm's `srun`; without either there is no group
and `world_size()` is 1. Tensors on a GPU travel over nccl, flags and objects over gloo.
"""

import contextlib
import gc
import hashlib
import logging
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, at the start and in any collective. Listing a large data set on one rank, or a
checkpoint on a busy file system, takes minutes; a rank that died is noticed by its launcher, not by this."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its job."""

    launcher: str
    """torchrun, slurm or alone."""
    rank: int
    local_rank: int
    """Number among the processes of this machine."""
    world_size: int
    address: str
    """Machine of rank 0."""
    port: int

    def __str__(self) -> str:
        """As it is logged."""
        where = "" if self.launcher == "alone" else f" (local rank {self.local_rank}) on {socket.gethostname()}"
        return f"rank {self.rank} of {self.world_size}{where}, {self.launcher}"


ALONE = Place("alone", 0, 0, 1, "", 0)


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process, from the environment alone.

    In this order:

    - **torchrun**, or any launcher with its variables: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. It may
      itself run under Slurm.
    - **Slurm**, if `srun` started this process as one task of several: SLURM_STEP_ID is that of a step of tasks and
      SLURM_STEP_NUM_TASKS is above 1. MASTER_ADDR and MASTER_PORT are respected; else rank 0 is on the first node of
      the step, and the port follows from job and step.
    - **alone** otherwise. In the shell of `salloc`, in a batch script and in `srun --pty bash`, SLURM_NTASKS may be
      any number, but no peers have been started, so a plain `python` there is one process.

    Raises: UserError if the variables contradict each other or one is missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        place = Place(
            "torchrun",
            rank=_number(environ, "RANK"),
            local_rank=_number(environ, "LOCAL_RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            address=_text(environ, "MASTER_ADDR"),
            port=_number(environ, "MASTER_PORT"),
        )
        if not 0 <= place.rank < place.world_size:
            raise UserError(
                f"RANK={place.rank}: must lie in [0, WORLD_SIZE={place.world_size}); start all processes with "
                "torchrun, or unset RANK and WORLD_SIZE to run one process"
            )
        return place
    if _is_srun_task(environ) and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        return Place(
            "slurm",
            rank=_number(environ, "SLURM_PROCID"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            address=environ.get("MASTER_ADDR") or first_host(_text(environ, "SLURM_STEP_NODELIST")),
            port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _port_of(job, step),
        )
    return ALONE


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    # A batch script has no step; salloc's interactive step and the batch step have numbers above those of srun.
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < 0xFFFF_0000 and "SLURM_STEP_NUM_TASKS" in environ


def _port_of(job: int, step: int) -> int:
    """The same on all tasks of a step, another one for the next job; below the ports that systems hand out."""
    return 12_000 + (31 * job + step) % 20_000


def first_host(node_list: str) -> str:
    """First name in a list of Slurm's: `gpu[007-009,12],cpu1` -> `gpu007`."""
    first = re.split(r",(?![^\[]*\])", node_list, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def ranks_of_this_machine(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes of the job share this machine; at most, where only Slurm says how they are spread."""
    if "LOCAL_WORLD_SIZE" in environ:
        return _number(environ, "LOCAL_WORLD_SIZE")
    if find_place(environ).launcher == "slurm" and "SLURM_STEP_TASKS_PER_NODE" in environ:  # such as 8(x3),4
        return max(map(int, re.findall(r"(?:^|,)(\d+)", environ["SLURM_STEP_TASKS_PER_NODE"])))
    return world_size()


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        present = ", ".join(f"{n}={environ[n]}" for n in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID") if n in environ)
        raise UserError(
            f"{name} is not set, but {present}: this process is said to be one of several and cannot find the others; "
            "start it with torchrun or srun, which set all variables, or unset these to run one process"
        )
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name)
    if not value.isdecimal():
        raise UserError(f"{name}={value!r}: must be a whole number; torchrun and srun set it")
    return int(value)


@contextlib.contextmanager
def session(device_name: str, *, key: str = "train.device", timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the other processes of the job, if there are any, until the block ends; yields this process's device.

    Sharded tensors must not outlive the block. If it raises, this rank leaves without waiting, because the others may
    be in a collective that it will never enter: the process is expected to end, and its launcher then ends the others.

    Args:
        device_name: `auto`, `cuda`, `mps` or `cpu`.
        key: of the configuration, under which it was given.
        timeout: how long a rank waits for another, in the start and in every collective.

    Raises: UserError if the launcher's variables are wrong, there is no device for this rank, or peers do not answer.
    """
    try:
        place = find_place()
        device = pick_device(device_name, place, key=key)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if place.launcher != "alone":
            _join(place, device, timeout)
    except UserError as error:
        error.told = False  # each rank may have its own
        raise
    if place.launcher == "alone":
        yield device
        return
    logger.info("%s, device %s, rank 0 at %s:%d", place, device, place.address, place.port)
    together = False
    try:
        yield device
        together = True
    except UserError as error:
        error.told = _is_told(str(error))
        if place.rank == 0:
            raise
        of_this_rank = UserError(f"rank {place.rank}: {error}")
        of_this_rank.told = error.told
        raise of_this_rank from error
    finally:
        _leave(device, together=together)


def _is_told(message: str) -> bool:
    """Whether another rank came to this with the same message, which most errors are on all of them."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"told/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}", 1) > 1
    except dist.DistError:  # it was on rank 0, which has left
        return False


def _leave(device: torch.device, *, together: bool) -> None:
    if together:
        # Gloo aborts now and then if sharded tensors are freed after the group is, or one rank leaves before another.
        gc.collect()
        barrier()
    # After an error of this rank: a gloo group that is left behind aborts one exit in thirty, but nccl might wait here.
    if together or device.type == "cpu":
        dist.destroy_process_group()


def _join(place: Place, device: torch.device, timeout: timedelta) -> None:
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if place.launcher == "torchrun" else f"tcp://{place.address}:{place.port}",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{place}: no meeting of all ranks at {place.address}:{place.port} within {timeout.total_seconds():.0f} s "
            f"({reason}). If MASTER_ADDR={place.address} is not a name under which all machines know that of rank 0, "
            "set it; if port is taken or closed, set MASTER_PORT; if a rank ended early, its message says why"
        ) from error


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


def mean_over_ranks(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each scalar over the ranks, in float64 if there are several."""
    if world_size() == 1:
        return scalars
    means = all_reduce_sum_(torch.stack([value.double() for value in scalars.values()])) / world_size()
    return dict(zip(scalars, means, strict=True))


def max_over_ranks(value: int) -> int:
    """The largest `value` of any rank. It travels between hosts, so nothing waits for a GPU."""
    return int(all_reduce_max_(torch.tensor(value)).item())


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether `flag` is set on any rank; the same answer everywhere, so all ranks can act on it together.

    Args:
        flag: this rank's.
        device: where it is reduced; None is the CPU, where no rank waits for a GPU.
    """
    if not is_distributed():
        return flag
    return bool(all_reduce_max_(torch.tensor(int(flag), device=device)).item())


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, in rank order, on every rank. Pickled: for small host data.

    Args:
        value: this rank's.
        group: of all ranks, for a thread beside the main one: collectives of two threads must not mix in one group.
    """
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values  # pyright: ignore[reportReturnType]  # all were filled


def on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Do something on every rank, and return the results of all, in rank order, once all are done.

    Raises: on every rank, the first UserError or OSError of any, so that none waits for a rank that gave up.
    """
    result: T | None = None
    failure: UserError | OSError | None = None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    outcomes = gather_objects((result, failure), group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [outcome for outcome, _ in outcomes]  # pyright: ignore[reportReturnType]  # None only where T is optional


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do something on rank 0 alone, and return its result, or raise its UserError or OSError, on every rank."""
    return on_all_ranks(lambda: action() if rank() == 0 else None, group)[0]  # pyright: ignore[reportReturnType]  # as above


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, in rank order, on every rank; ranks may have different numbers of rows.

    Memory beside the result: nothing, so that features of a large data set can be gathered.
    """
    if not is_distributed():
        return x
    counts = gather_objects(len(x))
    whole = torch.empty(sum(counts), *x.shape[1:], dtype=x.dtype, device=x.device)
    start = 0
    for source, count in enumerate(counts):
        part = whole[start : start + count]
        if source == rank():
            part.copy_(x)
        if count:
            dist.broadcast(part, src=source)
        start += count
    return whole


def zeros_by_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros with as many rows as a tensor, on its device, and with these divided over ranks as there."""
    from torch.distributed.tensor import DTensor, zeros

    assert shape[0] == like.shape[0]
    if not isinstance(like, DTensor):
        return torch.zeros(*shape, dtype=dtype, device=like.device)
    return zeros(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank. Pickled: for small host data."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def pick_device(name: str, place: Place = ALONE, *, key: str = "train.device") -> torch.device:
    """The device that `auto`, `cuda`, `mps` or `cpu` stands for in this process.

    Raises: UserError, with `key`, if there is no such device, if this rank has no GPU of its own, or if several
        processes would share an Apple GPU.
    """
    if name == "auto":
        alone = place.world_size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    is_there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in is_there and not is_there[name]():
        raise UserError(f"{key}={name}: torch {torch.__version__} finds none on this machine; use {key}=cpu or auto")
    if name == "mps" and place.world_size > 1:
        raise UserError(f"{key}=mps: one process only, not {place.world_size}; run without a launcher")
    if name != "cuda" or place.launcher == "alone":
        return torch.device(name)
    gpus = torch.cuda.device_count()
    # Slurm may bind one GPU to each task; the only visible one is then its own.
    index = 0 if place.launcher == "slurm" and gpus == 1 else place.local_rank
    if index >= gpus:
        raise UserError(
            f"LOCAL_RANK={place.local_rank}: this machine shows {gpus} GPU(s) to the process; start at most that many "
            f"per machine (torchrun --nproc-per-node, launcher.gpus_per_node), or use {key}=cpu"
        )
    return torch.device("cuda", index)


def device_model(device: torch.device) -> str:
    """What was computed on, in words: the model of the GPU or of the processor, as the system says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; without a model's name on some processors
    said = re.search(r"^model name\s*:\s*(.+?)\s*$", info.read_text() if info.is_file() else "", re.MULTILINE)
    processor = said[1] if said else platform.processor() or platform.machine()
    return processor if device.type == "cpu" else f"{device.type} of {processor}"
