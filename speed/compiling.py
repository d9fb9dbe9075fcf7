"""Compiling the functions of a training step, and keeping what was compiled for later starts."""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from config import CompileConfig
from distributed import barrier, is_distributed, rank
from fsdp import Sharding, overlap_options
from utils import UserError

logger = logging.getLogger("capi")

MARK = "compiling-"
"""What the names of files begin with that exist while a rank compiles."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def compile_function(
    function: FunctionT,
    cfg: CompileConfig,
    key: str,
    device: torch.device,
    sharding: Sharding | None = None,
    *,
    cuda_graphs: bool = False,
) -> FunctionT:
    """`torch.compile` with the options of a config section, or the function itself if it is disabled there.

    With weights divided by `simple`, the compiled graphs' collectives are ordered by `overlap_collectives`. With
    `fully_shard`, whose hooks cannot be compiled, `compile_blocks` compiles what is between them instead.

    With `cuda_graphs` on a CUDA device, forward and backward passes are replayed as CUDA graphs: launching costs one
    call per graph. Parameters stay where they are, other arguments are copied in. Results, gradients included, are
    overwritten by the replay after the next `torch.compiler.cudagraph_mark_step_begin`, which the caller calls when it
    needs none of them any longer.

    Raises: UserError if the code is to run on a CPU and there is no C++ compiler, or if graphs are asked for where
        weights are divided.
    """
    divided = sharding if sharding is not None and sharding.mode != "none" and is_distributed() else None
    if cuda_graphs and divided:
        raise UserError(
            "efficiency.compilation.cuda_graphs=true: not with weights divided over ranks, whose collectives are "
            "ordered otherwise; set it to false, or efficiency.fsdp=none"
        )
    if cfg.disable or (divided and divided.mode == "fully_shard"):
        return function
    _require_compiler(key, device)
    options: dict[str, Any] | None = overlap_options(divided) if divided else None
    if cuda_graphs and device.type == "cuda":
        options = {"triton.cudagraphs": True}
    elif cuda_graphs:
        logger.info("efficiency.compilation.cuda_graphs: there are none on %s; %s runs without", device, key)
    compiled = torch.compile(function, dynamic=cfg.dynamic, options=options)
    return compiled  # pyright: ignore[reportReturnType]  # same signature


def compile_blocks(
    blocks: Iterable[nn.Module],
    cfg: CompileConfig,
    key: str,
    device: torch.device,
    sharding: Sharding,
    *,
    always: bool = False,
) -> None:
    """`torch.compile` each block in place; to be called before `parallelize`.

    Args:
        blocks: of a network.
        cfg: the options.
        key: their section.
        device: where they run.
        sharding: how their weights are going to be divided.
        always: whatever divides them; else only if `fully_shard` is to.

    Raises: UserError as `compile_function`.
    """
    mode = sharding.mode if is_distributed() else "none"
    if cfg.disable or not (always or mode == "fully_shard"):
        return
    _require_compiler(key, device)
    options = overlap_options(sharding) if mode == "simple" else None
    # torch.compile asks gathered weights, which are no leaves, whether they have a gradient.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for block in blocks:
        block.compile(dynamic=cfg.dynamic, options=options)


def _require_compiler(key: str, device: torch.device) -> None:
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "gcc")):
        raise UserError(
            f"{key}.disable=false: compiling for a CPU needs a C++ compiler and none was found; "
            f"install g++, or set {key}.disable=true"
        )


@contextlib.contextmanager
def kept_compilations(folder: Path) -> Iterator[None]:
    """Keep what is compiled until the block ends in `folder`, from which a later start with the same folder reads it.

    All ranks use the same folder, on any number of machines. It is safe: inductor and Triton call a file by a hash of
    all that it was made from, bring it to its place by a rename, or hold a lock while a compiler writes it; so ranks
    that make the same file at the same time replace it by its equal. Libraries for the CPU are made for the very
    processor, so that each kind of processor has a folder of its own within.

    A linker writes in place: of one that was killed half a library is left, and a start that loads it would fail.
    Hence a file marks that something is being compiled, and what has a mark at the start is thrown away.

    The variables TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR tell inductor and Triton; the user's come first. Where
    the folder cannot be written or has no locks, this does nothing, and they use folders of this machine.

    Args:
        folder: made if need be; git is told to ignore it, and so `launch.copy_code` leaves it out.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    own = folder.absolute() / _processor()
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(own), "TRITON_CACHE_DIR": str(own / "triton")}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    # Importing torch._dynamo sets a variable to its default: what it holds then is nobody's choice.
    chosen = {name for name, value in before.items() if value != os.path.abspath(default_cache_dir())}  # noqa: PTH100
    variables = {name: value for name, value in variables.items() if name not in chosen}
    if rank() == 0:
        _throw_away_half_compiled(folder)
    barrier()  # nobody compiles before that is gone
    try:
        own.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        with tempfile.TemporaryFile(dir=own) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.info("what is compiled is not kept for later starts: %s", error)
        variables = {}
    os.environ.update(variables)
    try:
        with _marked_while_compiling(own / f"{MARK}{rank()}") if variables else contextlib.nullcontext():
            yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def _throw_away_half_compiled(folder: Path) -> None:
    for kind in {mark.parent for mark in folder.glob(f"*/{MARK}*")}:
        logger.info("what %s has is compiled again: a run was killed while it compiled", kind)
        shutil.rmtree(kind, ignore_errors=True)


@contextlib.contextmanager
def _marked_while_compiling(mark: Path) -> Iterator[None]:
    """Have a file while torch compiles something in this process, be it a forward pass or, later, its backward pass."""
    from torch._dynamo.callback import callback_handler

    def begin(_: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk, of which compiling will complain
            mark.touch()

    def end(_: Any) -> None:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset has removed both
            callback_handler.remove_start_callback(begin)
            callback_handler.remove_end_callback(end)


def _processor() -> str:
    """A name for this kind of processor: the same where what the compiler makes for one also runs on another."""
    described = platform.machine()
    with contextlib.suppress(OSError):  # only Linux has it
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        described += "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return hashlib.sha256(described.encode()).hexdigest()[:8]
