import ctypes
import os

import pytest
import torch
from ranks import RankError, run_on_ranks


def own_process(compiles_on: int | None) -> int:
    if compiles_on == torch.distributed.get_rank():
        compiled = torch.compile(lambda x: x + 1, backend="eager")
        assert compiled(torch.zeros(1)) == 1
    return os.getpid()


def test_a_rank_is_used_again_unless_it_has_compiled():
    first = run_on_ranks(own_process, 3, None)
    assert run_on_ranks(own_process, 3, 1) == first
    second = run_on_ranks(own_process, 3, None)
    assert (second[0], second[2]) == (first[0], first[2]), "a process that is left keeps its rank"
    assert second[1] not in first


def crash_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        ctypes.string_at(0)
    torch.distributed.barrier()


def test_a_rank_that_crashes_says_where():
    with pytest.raises(RankError, match=r"(?s)rank 1: died with exit code -11.*Segmentation fault.*crash_on_rank_1"):
        run_on_ranks(crash_on_rank_1, 2)
