import os
import re
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from commands import run_forked
from conftest import ROOT
from ranks import exit_codes, run_on_ranks
from torch.cuda._utils import _get_device_index

import distributed
from distributed import ALONE, Place, device_model, find_place, first_host, pick_device, session
from utils import UserError, ending_in_words

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host0", "MASTER_PORT": "29400"}

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}

BATCH_SCRIPT = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun_says_it_all_even_under_slurm():
    place = Place("torchrun", rank=3, local_rank=1, world_size=4, address="host0", port=29400)
    assert find_place(TORCHRUN) == place
    assert find_place(SRUN | TORCHRUN) == place


def test_a_task_of_srun_meets_the_others_on_the_first_node_of_its_step():
    place = find_place(SRUN)
    assert (place.launcher, place.rank, place.local_rank, place.world_size) == ("slurm", 9, 1, 16)
    assert place.address == "gpu03"
    assert place.port == find_place(SRUN | {"SLURM_PROCID": "0"}).port, "ranks of a step have different ports"
    others = {find_place(SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job in "123" for step in "012"}
    assert len(others) == 9, "steps or jobs on one node share a port"
    assert all(12_000 <= port < 32_000 for port in others)


def test_a_site_may_say_where_the_ranks_meet():
    place = find_place(SRUN | {"MASTER_ADDR": "gpu03-ib", "MASTER_PORT": "4711"})
    assert (place.address, place.port) == ("gpu03-ib", 4711)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        without(BATCH_SCRIPT, "SLURM_PROCID", "SLURM_LOCALID"),  # the shell of salloc
        BATCH_SCRIPT,
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # salloc where it starts an interactive step
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash; srun python
    ],
    ids=["nothing", "salloc", "sbatch", "interactive-step", "one-task"],
)
def test_one_process_waits_for_nobody(environ):
    assert find_place(environ) == ALONE


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            without(TORCHRUN, "MASTER_ADDR"),
            "MASTER_ADDR is not set, but RANK=3, WORLD_SIZE=4: .* with torchrun or srun",
        ),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set, but RANK=3"),
        (without(TORCHRUN, "RANK"), "RANK is not set, but WORLD_SIZE=4"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set, but SLURM_STEP_ID=2"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http': must be a whole number"),
        (TORCHRUN | {"RANK": "4"}, r"RANK=4: must lie in \[0, WORLD_SIZE=4\)"),
    ],
)
def test_broken_variables_are_named(environ, message):
    with pytest.raises(UserError, match=message):
        find_place(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("gpu[3,5]-ib[1-2]", "gpu3-ib1"),
        ("rack2-[11],x", "rack2-11"),
        ("10.0.0.[4-5]", "10.0.0.4"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def place(launcher="torchrun", local_rank=1):
    return Place(launcher, local_rank, local_rank, 2, "host0", 1)


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", place()) == torch.device("cuda", 1)
    assert pick_device("cuda", place("slurm")) == torch.device("cuda", 1)
    assert pick_device("auto", ALONE) == torch.device("cuda")
    assert pick_device("cpu", place()) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", place("slurm")) == torch.device("cuda", 0), "Slurm bound one GPU to each task"
    with pytest.raises(UserError, match=r"LOCAL_RANK=1: this machine shows 1 GPU\(s\)"):
        pick_device("cuda", place())


def test_one_process_leaves_the_choice_among_its_gpus_to_torch(monkeypatch):
    def set_device(device):  # as torch does, without a GPU
        assert _get_device_index(device) >= 0

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "find_place", lambda: ALONE)
    with session("cuda") as device:
        assert device == torch.device("cuda")


def test_an_apple_gpu_is_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", ALONE) == torch.device("mps")
    assert pick_device("auto", place()) == torch.device("cpu")
    with pytest.raises(UserError, match="one process only, not 2"):
        pick_device("mps", place())


@pytest.mark.parametrize("name", ["cuda", "mps"])
@pytest.mark.parametrize("where", [ALONE, Place("torchrun", 0, 0, 2, "host0", 1)])
def test_a_device_that_is_not_there_is_an_error(monkeypatch, name, where):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"^device={name}: .*finds none on this machine; use device=cpu or auto"):
        pick_device(name, where, key="device")
    with pytest.raises(UserError, match=rf"^train\.device={name}: .*use train\.device=cpu"):
        pick_device(name, where)


def reduce_everything():
    mine = distributed.rank()
    return (
        distributed.all_reduce_sum_(torch.tensor([1.0, mine])).tolist(),
        distributed.all_reduce_max_(torch.tensor([mine])).tolist(),
        distributed.max_over_ranks(mine * 10),
        distributed.any_rank(mine == 1),
        distributed.any_rank(False),
        distributed.gather_objects({"rank": mine}),
        distributed.broadcast_object(f"from {mine}"),
    )


def test_reductions_agree_on_all_ranks():
    ranks = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    expected = ([3.0, 3.0], [2], 20, True, False, ranks, "from 0")
    assert run_on_ranks(reduce_everything, 3) == [expected] * 3


def test_reductions_of_one_process():
    assert reduce_everything() == ([1.0, 0.0], [0], 0, False, False, [{"rank": 0}], "from 0")
    assert distributed.any_rank(True)


def fail_on_rank(number: int, error: Exception):
    def act() -> str:
        if distributed.rank() == number:
            raise error
        return f"result of rank {distributed.rank()}"

    results = []
    for do in (distributed.on_all_ranks, distributed.on_rank_0):
        try:
            results.append(do(act))
        except (UserError, OSError) as raised:
            results.append((type(raised), str(raised)))
    return results


@pytest.mark.parametrize("error", [UserError("a mistake"), FileNotFoundError(2, "No such file", "x")], ids=repr)
def test_what_one_rank_raises_is_raised_on_all(error):
    raised = (type(error), str(error))
    assert run_on_ranks(fail_on_rank, 2, 1, error) == [[raised, "result of rank 0"]] * 2
    assert run_on_ranks(fail_on_rank, 2, 0, error) == [[raised, raised]] * 2
    nowhere = ["result of rank 0", "result of rank 1"]
    assert run_on_ranks(fail_on_rank, 2, 7, error) == [[nowhere, nowhere[0]]] * 2
    assert fail_on_rank(0, error) == [raised, raised]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_peers_gives_up_and_says_where_it_looked(monkeypatch, rank):
    with session("cpu") as device:
        assert device == torch.device("cpu")
        assert not distributed.is_distributed(), "one process needs no group"
    with socket.socket() as server:  # a port at which nobody is, another worker's rank neither
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    lonely = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (TORCHRUN | lonely).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=rf"rank \d of 2 .*: no meeting of all ranks at 127.0.0.1:{port} within 1 s"),
        session("cpu", timeout=timedelta(seconds=1)),
    ):
        pass
    assert not distributed.is_distributed()


def agree_on_a_rank(folder):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with session("auto") as device:
        assert device.type == "cpu" and distributed.world_size() == 2
        total = distributed.all_reduce_sum_(torch.tensor([1.0 + distributed.rank()]))
        (folder / str(distributed.rank())).write_text(f"{total.item()} {distributed.any_rank(distributed.rank() == 1)}")


def test_ranks_of_torchrun_agree_and_leave_cleanly(tmp_path):
    assert exit_codes(agree_on_a_rank, 2, tmp_path) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3.0 True"] * 2


def test_an_error_of_one_rank_ends_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom distributed import barrier, rank, session\nfrom utils import UserError, ending_in_words\n"
        "@ending_in_words\ndef main():\n    with session('auto'):\n        if rank() == 1:\n"
        "            raise UserError('this rank alone')\n        barrier()\n    return 0\nsys.exit(main())\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_forked(*launcher, script, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "error: rank 1: this rank alone" in done.stderr


@ending_in_words
def fail_together():
    with session("cpu"):
        distributed.barrier()
        raise UserError("of all")


def fail_together_on_a_rank(folder):
    with (folder / os.environ["RANK"]).open("w") as sys.stderr:
        code = fail_together()
    raise SystemExit(code)


def test_an_error_that_all_ranks_have_is_told_once(tmp_path):
    assert exit_codes(fail_together_on_a_rank, 2, tmp_path) == [2, 2]
    said = "".join((tmp_path / rank).read_text() for rank in "01")
    assert re.fullmatch(r"error: (rank 1: )?of all\n", said)


def rows_of(rank, counts):
    return torch.arange(rank * 100, rank * 100 + 3 * counts[rank], dtype=torch.float16).view(-1, 3)


def gather_my_rows(counts):
    mine = rows_of(distributed.rank(), counts)
    before = mine.clone()
    whole = distributed.all_gather_rows(mine)
    assert torch.equal(mine, before)
    return whole


@pytest.mark.parametrize("counts", [(2, 5), (0, 3), (4, 0, 1), (0, 0)])
def test_rows_of_ranks_come_together_in_rank_order_however_many_each_has(counts):
    whole = torch.cat([rows_of(rank, counts) for rank in range(len(counts))])
    for gathered in run_on_ranks(gather_my_rows, len(counts), counts):
        assert gathered.dtype == torch.float16
        assert torch.equal(gathered, whole)


@pytest.mark.parametrize(
    ("cpuinfo", "named"),
    [
        ("model\t\t: 1\nmodel name\t: Abacus 9000 \n\nprocessor\t: 1\nmodel name\t: Other\n", "Abacus 9000"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "arm"),
        (None, "arm"),
    ],
)  # fmt: skip
def test_a_device_is_named_by_its_model(cpuinfo, named, monkeypatch):
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(Path, "is_file", lambda self: cpuinfo is not None)
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU number {device.index}")
    assert device_model(torch.device("cpu")) == named
    assert device_model(torch.device("mps")) == f"mps of {named}"
    assert device_model(torch.device("cuda", 3)) == "GPU number 3"


def test_rows_of_one_process_are_those_of_all():
    mine = torch.zeros(2, 3)
    assert distributed.all_gather_rows(mine) is mine
