"""Run a function on several gloo ranks, in processes of its own."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GRACE_S = 3.0
"""How long ranks may go on after one of them has failed: they wait for it in vain."""


def forked(function: Callable[..., Any], *args: Any, daemon: bool = False) -> ForkServerProcess:
    """A process, not yet started, that calls `function(*args)`.

    It is forked off a server which has imported a training, and what torch imports in its first step: that takes half
    of the processor time of a tiny run. Its garbage collector passes over all that is imported: a training collects by
    hand, and looking through it takes as long again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "commands", "train_capi", "torch._inductor.compile_fx", "datasets"])
    return context.Process(target=_begin, args=(sys.executable, function, args), daemon=daemon)


def _begin(executable: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()
    sys.executable = executable
    function(*args)


class RankError(AssertionError):
    """What went wrong, with every rank's traceback."""


class _Rank:
    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.get_context("forkserver").Pipe()
        self.stacks = tempfile.NamedTemporaryFile("r+", prefix="rank-stacks-", delete=False)  # noqa: SIM115  # the rank deletes it
        self.process = forked(_serve, theirs, self.stacks.name, daemon=True)
        self.process.start()
        theirs.close()

    def stack(self) -> str:
        """Where a rank that does not answer is."""
        with contextlib.suppress(ProcessLookupError):
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        return "did not answer; " + self.stacks_written()

    def stacks_written(self) -> str:
        """Where its threads were when it was asked, or when it crashed."""
        self.stacks.seek(0)
        return "it was at\n" + (self.stacks.read() or "(no Python code)")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.stacks.close()


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 200) -> list[Any]:
    """Call `function(*args)` on ranks of a fresh gloo process group; what each returned.

    Args:
        function: of a module that the ranks can import. Rank and number of ranks are in `torch.distributed`.
        num_ranks: processes, 1 to 4.
        *args: what can be pickled.
        timeout_s: after it the ranks are killed and their stacks shown.

    Raises: RankError with the traceback of every rank that failed or did not answer.
    """
    # Processes that had run other tests before, with other groups, ended now and then in a crash or waited in gloo for
    # ever; and torch remembers which part of a tensor is whose.
    ranks = [_Rank() for _ in range(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        for number, rank in enumerate(ranks):
            rank.connection.send_bytes(pickle.dumps((function, args, number, num_ranks, f"{folder}/store")))
        outcomes = _collect(ranks, time.monotonic() + timeout_s)
    for rank in ranks:
        rank.kill()
    if all(outcome.ok for outcome in outcomes):
        return [outcome.result for outcome in outcomes]
    reports = [f"---- rank {i}: {'returned' if each.ok else each.result}" for i, each in enumerate(outcomes)]
    raise RankError("\n".join([f"{function.__name__} failed on {num_ranks} ranks", *reports]))


class _Outcome(NamedTuple):
    ok: bool
    result: Any
    """What the function returned, or what went wrong in words."""


def _collect(ranks: list[_Rank], deadline: float) -> list[_Outcome]:
    outcomes: dict[Connection, _Outcome] = {}
    waiting = {rank.connection: rank for rank in ranks}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                outcomes[connection] = pickle.loads(connection.recv_bytes())
            except EOFError:
                rank.process.join(1)
                died = f"died with exit code {rank.process.exitcode}; {rank.stacks_written()}"
                outcomes[connection] = _Outcome(False, died)
            if not outcomes[connection].ok:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for connection, rank in waiting.items():
        outcomes[connection] = _Outcome(False, rank.stack())
    return [outcomes[rank.connection] for rank in ranks]


def _serve(connection: Connection, stacks: str) -> None:
    with open(stacks, "w") as file, contextlib.suppress(EOFError, KeyboardInterrupt):  # noqa: PTH123  # stays open
        Path(stacks).unlink()  # both have it open, and none is left behind when both are gone
        faulthandler.register(signal.SIGUSR1, file=file)
        faulthandler.enable(file)
        function, args, rank, num_ranks, store = pickle.loads(connection.recv_bytes())
        connection.send_bytes(_answer(function, args, rank, num_ranks, store))


def _answer(function: Callable[..., Any], args: tuple[Any, ...], rank: int, num_ranks: int, store: str) -> bytes:
    try:
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch 2.11 does what it has deprecated when it compiles.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            answer = pickle.dumps(_Outcome(True, function(*args)))
        gc.collect()  # what is sharded has to be gone before the process group is, or gloo aborts now and then
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  # the parent shows it, whatever it is
        return pickle.dumps(_Outcome(False, "failed\n" + traceback.format_exc()))
    return answer


@contextlib.contextmanager
def launched(function: Callable[..., Any], num_ranks: int, *args: Any) -> Iterator[list[ForkServerProcess]]:
    """Ranks that may die: processes that call `function(*args)` and find each other by the variables of torchrun.

    Unlike under torchrun, nobody ends the others when one dies: what they do then can be seen. None outlives the block.
    """
    # Like torchrun's, the store is the parent's: there is no free port to guess, and it outlives rank 0.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": num_ranks,
        "MASTER_ADDR": store.host,
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,  # only older versions of torch read it
    }
    processes = []
    for rank in range(num_ranks):
        environ = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(forked(_call_launched, environ, function, args))
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def exit_codes(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 200) -> list[int | None]:
    """Exit codes of `launched` ranks when all have ended, None for one that has not after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    with launched(function, num_ranks, *args) as processes:
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]


def _call_launched(environ: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environ)
    function(*args)
