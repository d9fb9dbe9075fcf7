import ctypes
import os

import pytest
import torch
from ranks import RankError, run_on_ranks


def test_every_call_has_processes_of_its_own():
    processes = [process for _ in range(2) for process in run_on_ranks(os.getpid, 2)]
    assert len({*processes, os.getpid()}) == 5


def crash_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        ctypes.string_at(0)
    torch.distributed.barrier()


def test_a_rank_that_crashes_says_where():
    with pytest.raises(RankError, match=r"(?s)rank 1: died with exit code -11.*Segmentation fault.*crash_on_rank_1"):
        run_on_ranks(crash_on_rank_1, 2)
