"""checkpoint.py: nothing is lost to kills, full disks and damaged files, and what comes back is what was saved."""

import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import run_forked
from conftest import ROOT, files_limited_to
from golden import tiny_model
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import checkpoint
import eval_visualizations
from checkpoint import Checkpoints, SavedState, check_compatible, export_weights
from config import DEFAULT_PRETRAIN_CONFIG, load_config, to_yaml
from launch import claim_output_dir
from train_capi import CapiConfig, CapiState
from utils import UserError, hash_file

YAML = "model:\n  depth: 2\n"


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 5)
        self.fc2 = nn.Linear(5, 4, bias=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Training:
    """A student with two AdamW groups, a copy, a head with its own optimizer: the structure of a CAPI run."""

    def __init__(self, seed: int, shard: bool = False) -> None:
        torch.manual_seed(seed)
        student = nn.ModuleDict({"backbone": Tower(), "head": nn.Linear(4, 2)})
        self.modules: dict[str, nn.Module] = {"student": student, "student_ema": copy.deepcopy(student)}
        self.modules["clustering"] = nn.Linear(4, 2)
        if shard:
            for module in self.modules.values():
                for part in list(module.children()) or [module]:
                    fully_shard(part)
        norms = [p for p in student.parameters() if p.ndim == 1]
        weights = [p for p in student.parameters() if p.ndim > 1]
        student_optimizer = torch.optim.AdamW([{"params": weights}, {"params": norms, "weight_decay": 0.0}], lr=0.1)
        head = self.modules["clustering"]
        self.optimizers: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
            "student": (student, student_optimizer),
            "clustering": (head, torch.optim.AdamW(head.parameters(), lr=0.2)),
        }

    def train(self, steps: int) -> "Training":
        for step in range(steps):
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
            student = self.modules["student"]
            assert isinstance(student, nn.ModuleDict)
            features = student["backbone"](x)
            (student["head"](features).square().mean() + features.sum()).backward()
            self.modules["clustering"](features.detach()).square().mean().backward()
            for _, optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        return self

    def mark(self, value: float) -> "Training":
        """Fill all weights with `value`, to recognise them."""
        with torch.no_grad():
            for module in self.modules.values():
                for parameter in module.parameters():
                    parameter.fill_(value)
        return self

    @property
    def marked(self) -> float:
        values = {float(v) for m in self.modules.values() for p in m.parameters() for v in p.detach().unique()}
        assert len(values) == 1, f"weights of several checkpoints are mixed: {values}"
        return values.pop()

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{name}.{key}": t for name, m in self.modules.items() for key, t in m.state_dict().items()}
        for name, (_, optimizer) in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{index}.{key}": t for key, t in state.items()}
        return {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in found.items()}

    def save(self, checkpoints: Checkpoints, step: int, **extra: Any) -> Path:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return checkpoints.save(
            step,
            modules=self.modules,
            optimizers=self.optimizers,
            extra={"images_seen": 4 * step, **extra},
            rank_extra={"rank": rank},
            config_yaml=YAML,
        )

    def restore_latest(self, checkpoints: Checkpoints) -> SavedState | None:
        return checkpoints.restore_latest(modules=self.modules, optimizers=self.optimizers)

    def restore(self, checkpoints: Checkpoints, path: Path, **kwargs: Any) -> SavedState:
        return checkpoints.restore(path, modules=self.modules, optimizers=self.optimizers, **kwargs)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(bits(actual[key]), bits(tensor)), f"{key} is not what was saved"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What comes back


def test_a_round_trip_is_bit_exact(tmp_path):
    saved = Training(seed=1).train(3)
    with torch.no_grad():  # values that arithmetic would not keep
        next(saved.modules["student"].parameters())[0] = torch.tensor([float("nan"), -0.0, 1e-40])
    path = saved.save(Checkpoints(tmp_path, keep=3), 3, note="é\n")
    loaded = Training(seed=2)
    state = loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert state == SavedState(path, 3, {"images_seen": 12, "note": "é\n"}, [{"rank": 0}], 1, {"model": {"depth": 2}})
    assert_bitwise_equal(loaded.tensors(), saved.tensors())
    assert loaded.optimizers["student"][1].state_dict()["state"][0]["step"] == 3


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    Training(seed=1).train(2).save(Checkpoints(tmp_path, keep=3), 2)
    resumed = Training(seed=2).train(5)  # state of its own, which has to go
    resumed.restore_latest(Checkpoints(tmp_path, keep=3))
    assert_bitwise_equal(resumed.train(2).tensors(), Training(seed=1).train(2).train(2).tensors())


def test_parameters_without_optimizer_state_come_back_without_it(tmp_path):
    fresh = Training(seed=1)
    before = copy.deepcopy(fresh.tensors())
    fresh.save(Checkpoints(tmp_path, keep=3), 0)
    assert_bitwise_equal(fresh.tensors(), before)
    loaded = Training(seed=2).train(1)
    loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert_bitwise_equal(loaded.tensors(), before)


def test_keys_are_free_of_the_prefixes_of_compiled_modules(tmp_path):
    saved = Training(seed=1)
    plain = saved.modules["student"]
    compiled = torch.compile(plain, backend="eager")
    assert isinstance(compiled, nn.Module)
    saved.modules["student"] = compiled
    saved.save(Checkpoints(tmp_path, keep=3), 1)
    loaded = Training(seed=2)
    loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert_bitwise_equal(loaded.modules["student"].state_dict(), plain.state_dict())


def test_loading_changes_no_hyper_parameters(tmp_path):
    Training(seed=1).train(1).save(Checkpoints(tmp_path, keep=3), 1)
    loaded = Training(seed=2)
    groups = loaded.optimizers["student"][1].param_groups
    groups[1]["lr"] = 0.7
    loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert [group["lr"] for group in groups] == [0.1, 0.7]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    assert checkpoints.newest() is None
    assert checkpoints.all() == []
    assert Training(seed=1).restore_latest(checkpoints) is None


def change_head(training: Training) -> None:
    student = training.modules["student"]
    assert isinstance(student, nn.ModuleDict)
    student["head"] = nn.Linear(4, 3)


def add_bias(training: Training) -> None:
    student = training.modules["student"]
    assert isinstance(student, nn.ModuleDict)
    student["backbone"].register_parameter("bias", nn.Parameter(torch.zeros(4)))


def drop_buffer(training: Training) -> None:
    student = training.modules["student"]
    assert isinstance(student, nn.ModuleDict)
    del student["backbone"].count


def change_dtype(training: Training) -> None:
    training.modules["student"].bfloat16()


def drop_module(training: Training) -> None:
    del training.modules["student_ema"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_head, r"student.head.weight is torch.float32 \[2, 4\] there, torch.float32 \[3, 4\] here"),
        (add_bias, "student.backbone.bias is missing"),
        (drop_buffer, "student.backbone.count is unexpected"),
        (change_dtype, r"student.head.bias is torch.float32 \[2\] there, torch.bfloat16"),
        (drop_module, r"holds the modules \['clustering', 'student', 'student_ema'\], not \['clustering', 'student'\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message, tmp_path):
    Training(seed=1).save(Checkpoints(tmp_path, keep=3), 1)
    loaded = Training(seed=2)
    change(loaded)
    loaded.optimizers["student"] = (
        loaded.modules["student"],
        torch.optim.AdamW(loaded.modules["student"].parameters()),
    )
    before = copy.deepcopy(loaded.tensors())
    with pytest.raises(UserError, match=message):
        loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert_bitwise_equal(loaded.tensors(), before)


# What stays on disk


def test_retention_goes_by_the_number_in_the_name(tmp_path):
    checkpoints, training = Checkpoints(tmp_path, keep=2), Training(seed=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    checkpoints.directory.mkdir()
    (checkpoints.directory / "step_000000001").symlink_to(outside)
    (checkpoints.directory / "step_000000002.set-aside-1").mkdir()
    (checkpoints.directory / "notes").mkdir()
    for step in (9, 10, 1_000_000_000):
        path = training.save(checkpoints, step)
        os.utime(path, (2e9 - step, 2e9 - step))  # newer steps look older
    assert [path.name for path in checkpoints.all()] == ["step_000000010", "step_1000000000"]
    assert checkpoints.newest() == checkpoints.directory / "step_1000000000"
    others = ["notes", "step_000000001", "step_000000002.set-aside-1", "step_000000010", "step_1000000000"]
    assert names(checkpoints.directory) == others
    assert outside.is_dir()


def test_saving_a_step_again_replaces_it(tmp_path):
    Training(seed=1).mark(1).save(Checkpoints(tmp_path, keep=1), 5)
    resumed = Training(seed=1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    resumed.restore_latest(checkpoints)
    resumed.mark(2).save(checkpoints, 5)
    loaded = Training(seed=2)
    loaded.restore_latest(checkpoints)
    assert loaded.marked == 2
    assert names(checkpoints.directory) == ["step_000000005"]


def test_an_automatic_resume_keeps_all_checkpoints(tmp_path):
    first = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        Training(seed=1).save(first, step)
    resumed, checkpoints = Training(seed=1), Checkpoints(tmp_path, keep=3)
    resumed.restore_latest(checkpoints)
    resumed.save(checkpoints, 3)
    assert names(checkpoints.directory) == ["step_000000001", "step_000000002", "step_000000003"]


# Histories: going back, and starting anew in an old folder


@pytest.fixture
def three(tmp_path) -> Checkpoints:
    """Checkpoints of steps 100, 200, 300, with that step as the value of all weights."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (100, 200, 300):
        Training(seed=1).mark(step).save(checkpoints, step)
    return checkpoints


def again(checkpoints: Checkpoints) -> Checkpoints:
    """As the next process sees it."""
    return Checkpoints(checkpoints.directory.parent, keep=checkpoints.keep)


def test_going_back_sets_newer_checkpoints_aside_at_the_first_save(three):
    back, run = again(three), Training(seed=2)
    state = run.restore(back, back.directory / "step_000000100")
    assert (state.step, run.marked) == (100, 100)
    assert names(back.directory) == ["step_000000100", "step_000000200", "step_000000300"], "nothing moves before that"
    run.mark(150).save(back, 150)
    moved = ["step_000000200.set-aside-1", "step_000000300.set-aside-1"]
    assert names(back.directory) == ["step_000000100", "step_000000150", *moved]
    run.mark(250).save(back, 250)  # the second save of the process leaves its own first one alone
    assert [path.name for path in back.all()] == ["step_000000100", "step_000000150", "step_000000250"]

    run.restore(again(three), back.directory / moved[1])
    assert run.marked == 300, "what was set aside can be chosen again"


def test_a_second_return_numbers_what_it_sets_aside(three):
    for _ in range(2):
        back, run = again(three), Training(seed=2)
        run.restore(back, back.directory / "step_000000100")
        run.save(back, 200)
    asides = ["step_000000200.set-aside-1", "step_000000200.set-aside-2", "step_000000300.set-aside-1"]
    assert names(three.directory) == ["step_000000100", "step_000000200", *asides]


def test_a_fresh_start_in_an_old_folder_neither_loses_to_it_nor_deletes_it(three):
    fresh = again(three)
    Training(seed=2).mark(7).save(fresh, 10)
    assert [path.name for path in fresh.all()] == ["step_000000010"]
    assert sum(".set-aside-1" in name for name in names(fresh.directory)) == 3


def test_a_scheduler_that_repeats_the_command_does_not_go_back_twice(three, tmp_path):
    chosen, three.keep = tmp_path / "favourite", 1
    shutil.copytree(three.directory / "step_000000100", chosen)
    back, run = again(three), Training(seed=2)
    again_in_job = {"launches": ["job 7", "torchrun b"], "repeated": "job 7"}
    assert run.restore(back, chosen, **again_in_job).step == 100, "the first start has no successors yet"
    run.save(back, 150)
    for step in (160, 170):
        back = again(three)
        assert run.restore(back, chosen, **again_in_job).step == step - 10
        run.save(back, step)
    assert not any("150.set-aside" in name or "160.set-aside" in name for name in names(three.directory))
    assert run.restore(again(three), chosen).step == 100, "the user who asks again gets what they ask for"


@pytest.mark.parametrize("launches", [["job 7"], [], None], ids=["noted", "without a launch", "of earlier versions"])
def test_a_scheduler_that_repeats_a_second_return_goes_on_with_no_steps_of_the_first(launches, three):
    chosen, run = three.directory / "step_000000100", Training(seed=2)
    first = again(three)
    run.restore(first, chosen, launches=launches or [])
    path = run.save(first, 200)
    if launches is None:
        state = json.loads((path / "state.json").read_text())
        del state["resumed_by"]
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = described(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
        assert run.restore_latest(again(three)) is not None
    # The user returned in a job of its own, which is repeated before it has saved anything.
    assert run.restore(again(three), chosen, launches=["job 8"], repeated="job 8").step == 100


def test_a_checkpoint_of_another_run_can_be_continued(three, tmp_path):
    other = Checkpoints(tmp_path / "other", keep=2)
    run = Training(seed=2)
    assert run.restore(other, three.directory / "step_000000200").step == 200
    run.save(other, 210)
    assert names(other.directory) == ["step_000000210"]
    assert len(three.all()) == 3


def test_the_chosen_checkpoint_stays_although_it_is_not_among_the_newest(three):
    three.keep = 1
    back, run = again(three), Training(seed=2)
    run.restore(back, back.directory / "step_000000100")
    for step in (150, 160):
        run.save(back, step)
        later = again(three)  # and after an automatic resume
        run.restore_latest(later)
        run.save(later, step + 5)
    kept = [path.name for path in again(three).all()]
    assert kept == ["step_000000100", "step_000000165"], "the same command would not find what it starts from"


@pytest.mark.parametrize("state", ["[1]", "null", '{"step": 1}', "17"])
def test_a_state_of_another_kind_is_no_traceback(three, state):
    path = three.directory / "step_000000300"
    (path / "state.json").write_text(state)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step_000000300' is not a checkpoint of this program"):
        Training(seed=2).restore_latest(again(three))


def test_a_file_of_weights_is_not_resumed_from_but_said_where_it_belongs(three, tmp_path):
    (tmp_path / "student.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"train.resume_from=.*student.pth.*train.init_from"):
        Training(seed=2).restore(again(three), tmp_path / "student.pth")


def test_a_choice_that_does_not_exist_lists_those_that_do(three):
    with pytest.raises(UserError, match=r"train.resume_from=.*step_000000111.*no such folder") as caught:
        Training(seed=2).restore(again(three), three.directory / "step_000000111")
    assert all(str(path) in str(caught.value) for path in three.all())


# Damage


def truncate(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 1000)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (truncate, "__0_0.distcp has 1000 bytes instead of"),
    "flipped bit in tensors": (lambda path: flip_a_bit(path / "__0_0.distcp"), "content of __0_0.distcp has changed"),
    "flipped bit in state": (lambda path: flip_a_bit(path / "state.json"), "content of state.json has changed"),
    "flipped bit in index": (lambda path: flip_a_bit(path / ".metadata"), "content of .metadata has changed"),
    "tensors gone": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 99), "manifest.json is damaged"),
    "manifest of zeros": (lambda path: (path / "manifest.json").write_bytes(bytes(99)), "manifest.json is damaged"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json does not list"),
    "manifest of a list": (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_newest_names_the_newest_good_one(damage, three):
    inflict, what = DAMAGES[damage]
    inflict(three.directory / "step_000000300")
    flip_a_bit(three.directory / "step_000000200" / "__0_0.distcp")
    run = Training(seed=2).mark(-1)
    with pytest.raises(UserError) as caught:
        run.restore_latest(again(three))
    message = str(caught.value)
    assert "step_000000300" in message
    assert what in message
    good = three.directory / "step_000000100"
    assert f"train.resume_from={good}" in message, "200 is damaged too, so 100 is the one to name"
    assert run.marked == -1, "nothing may be loaded from a damaged checkpoint"
    with pytest.raises(UserError, match="unreadable") as caught:
        run.restore(again(three), three.directory / "step_000000300")
    assert f"train.resume_from={good}" in str(caught.value)
    with pytest.raises(UserError, match="unreadable"):
        three.load(three.directory / "step_000000300", modules=run.modules, optimizers=run.optimizers)
    assert run.restore(again(three), good).step == 100


def test_without_a_good_one_the_user_is_told_how_to_start_anew(three):
    for path in three.all():
        truncate(path)
    with pytest.raises(UserError, match=r"No other one .* is good. To start anew, choose another train.output_dir"):
        Training(seed=2).restore_latest(again(three))
    assert len(three.all()) == 3


# Full disks


# At the first byte, in small tensors, in a large one (a path of its own in torch), in state.json.
@pytest.mark.parametrize("size", [0, 100, 100_000, 500_000])
def test_a_full_disk_is_an_error_with_a_remedy_and_the_last_checkpoint_loads(size, three, tmp_path):
    run, full = Training(seed=2), again(three)
    run.restore_latest(full)
    run.modules["large"] = nn.Linear(300, 300)
    with pytest.raises(UserError) as caught, files_limited_to(size):
        run.save(full, 400, notes="." * 800_000)
    del run.modules["large"]
    message = str(caught.value)
    for part in ("step 400", "File too large", str(full.directory), "newest is", "step_000000300"):
        assert part in message
    assert names(full.directory) == ["step_000000100", "step_000000200", "step_000000300"], "no half checkpoint stays"
    for path in three.all():
        run.restore(again(three), path)
    run.restore_latest(full)
    assert run.marked == 300
    run.mark(400).save(full, 400)
    assert full.newest() == full.directory / "step_000000400", "with space again, saving works"


def test_going_back_moves_nothing_if_the_first_save_fails(three):
    back, run = again(three), Training(seed=2)
    run.restore(back, three.directory / "step_000000100")
    with pytest.raises(UserError, match="could not be saved"), files_limited_to(100):
        run.save(back, 150)
    assert names(back.directory) == ["step_000000100", "step_000000200", "step_000000300"]


# In the background


class Gate:
    """Holds up the writing of every save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        save_tensors = checkpoint.save_tensors

        def wait_and_save(*args: Any, **kwargs: Any) -> Any:
            assert self.open.wait(50), "nobody opens the gate"
            return save_tensors(*args, **kwargs)

        monkeypatch.setattr(checkpoint, "save_tensors", wait_and_save)

    def open_soon(self) -> None:
        """Not before the caller's next call had time to go past a save that it should have waited for."""
        timer = threading.Timer(0.3, self.open.set)
        timer.daemon = True
        timer.start()


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_a_background_save_holds_what_there_was_at_the_call(gate, tmp_path):
    run, loaded, history = Training(seed=1).train(2), Training(seed=2), [1]
    expected = copy.deepcopy(run.tensors())
    with Checkpoints(tmp_path, keep=3, async_save=True) as checkpoints:
        path = run.save(checkpoints, 2, history=history)
        run.train(1)
        with torch.no_grad():
            for tensor in run.tensors().values():
                tensor.zero_()
        history.append(2)
        assert not path.exists(), "the writing was not in the background"
        assert (checkpoints.newest(), checkpoints.finished) == (None, None), "an unfinished checkpoint is shown"
        gate.open.set()
        checkpoints.wait()
        assert checkpoints.newest() == checkpoints.finished == path
    state = loaded.restore_latest(Checkpoints(tmp_path, keep=3))
    assert state is not None
    assert state.extra["history"] == [1]
    assert_bitwise_equal(loaded.tensors(), expected)


def test_a_background_save_writes_the_files_of_a_foreground_save(tmp_path):
    run, written = Training(seed=1).train(2), []
    backbone: Any = run.modules["student_ema"]
    backbone["head"].weight = nn.Parameter(torch.randn(4, 2).T)  # not contiguous
    backbone["backbone"].fc1.bias = run.modules["clustering"].weight  # one tensor under two names
    for async_save in (False, True):
        with Checkpoints(tmp_path / str(async_save), keep=3, async_save=async_save) as checkpoints:
            path = run.save(checkpoints, 2, notes=("é", 1e300, float("inf")))
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        state, manifest = (json.loads(files.pop(name)) for name in ("state.json", "manifest.json"))
        files.pop(".metadata")  # contains the path
        index = FileSystemReader(path).read_metadata()
        del state["time"], manifest["state.json"], manifest[".metadata"]
        written.append((files, state, manifest, index.state_dict_metadata, index.storage_data))
    assert written[0] == written[1]


@pytest.mark.parametrize("call", ["save", "wait", "close", "restore_latest", "restore", "load"])
def test_the_next_call_first_waits_for_the_save_under_way(call, gate, tmp_path):
    run = Training(seed=1).mark(1)
    with Checkpoints(tmp_path, keep=3, async_save=True) as checkpoints:
        path = run.save(checkpoints, 1)
        gate.open_soon()
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: run.save(checkpoints, 2),
            "wait": checkpoints.wait,
            "close": checkpoints.close,
            "restore_latest": lambda: run.restore_latest(checkpoints),
            "restore": lambda: run.restore(checkpoints, path),
            "load": lambda: checkpoints.load(path, modules=run.modules, optimizers=run.optimizers),
        }
        calls[call]()
        assert path.exists(), f"{call} did not wait"
    assert len(checkpoints.all()) == (2 if call == "save" else 1)


@pytest.mark.parametrize("call", ["wait", "close"])
def test_a_failure_in_the_background_is_logged_at_once_and_raised_by_who_waits_for_the_save(call, three, caplog):
    run, full = Training(seed=2), Checkpoints(three.directory.parent, keep=3, async_save=True)
    run.restore_latest(full)
    why = r"step 400 could not be saved.*File too large.*newest is .*000300"
    with files_limited_to(100):
        run.save(full, 400)
        assert full.last() == full.directory / "step_000000300"
        assert re.search(why, caplog.text), "it is known, and not told"
        with pytest.raises(UserError, match=why):
            getattr(full, call)()
    assert names(full.directory) == ["step_000000100", "step_000000200", "step_000000300"], "no half checkpoint stays"
    full.wait()  # it is told once
    if call != "close":
        path = run.mark(500).save(full, 500)
        full.close()
        assert full.newest() == full.finished == path, "with space again, saving works"
    for path in three.all():
        run.restore(again(three), path)


@pytest.mark.parametrize("has_room_again", [True, False])
def test_the_save_after_one_that_failed_is_tried_and_ends_the_run_only_if_it_fails_too(has_room_again, three):
    run, full = Training(seed=2), Checkpoints(three.directory.parent, keep=9, async_save=True)
    run.restore_latest(full)
    with files_limited_to(100):
        run.save(full, 400)
        full.last()
        if not has_room_again:
            with pytest.raises(UserError, match=r"step 500 could not be saved"):
                run.save(full, 500)
    if has_room_again:
        run.mark(500).save(full, 500)
    full.close()
    there = [100, 200, 300] + [500] * has_room_again
    assert names(full.directory) == [f"step_{step:09d}" for step in there]
    run.mark(0).restore_latest(again(three))
    assert run.marked == there[-1]


def test_a_failure_in_the_background_does_not_hide_the_error_that_ends_the_run(tmp_path):
    def end_with(error: Exception) -> None:
        with Checkpoints(tmp_path, keep=1, async_save=True) as checkpoints, files_limited_to(100):
            Training(seed=1).save(checkpoints, 4)
            assert checkpoints.last() is None, "it did not fail"
            raise error

    with pytest.raises(UserError, match=r"loss is nan\. Besides: The checkpoint of step 4 could not be saved"):
        end_with(UserError("loss is nan"))
    with pytest.raises(ValueError, match="a bug") as caught:
        end_with(ValueError("a bug"))
    assert "The checkpoint of step 4 could not be saved" in caught.value.__notes__[0]


def test_a_closed_object_leaves_no_thread_and_cannot_save(tmp_path):
    before = threading.enumerate()
    with Checkpoints(tmp_path, keep=1, async_save=True) as checkpoints:
        Training(seed=1).save(checkpoints, 1)
        assert len(threading.enumerate()) == len(before) + 1
    assert threading.enumerate() == before
    with pytest.raises(RuntimeError, match="after shutdown"):
        Training(seed=1).save(checkpoints, 2)
    checkpoints.close()


@pytest.mark.parametrize("size", [100, resource.RLIM_INFINITY], ids=["full", "free"])
def test_the_copies_are_freed_although_no_garbage_is_collected(size, monkeypatch, tmp_path):
    copies = []
    save_tensors = checkpoint.save_tensors

    def watched(tensors: dict[str, Tensor], **kwargs: Any) -> Any:
        copies.extend(weakref.ref(tensor) for tensor in tensors.values())
        return save_tensors(tensors, **kwargs)

    monkeypatch.setattr(checkpoint, "save_tensors", watched)
    run = Training(seed=1).train(1)
    gc.collect()
    gc.disable()  # as during training
    try:
        with Checkpoints(tmp_path, keep=1, async_save=True) as checkpoints:
            with files_limited_to(size):
                run.save(checkpoints, 1)
                checkpoints.last()
            deadline = time.monotonic() + 20  # the thread lets go of its task just after the result is there
            while any(copy() is not None for copy in copies) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert copies
            assert not any(copy() is not None for copy in copies), "every save would take memory until the run ends"
            with contextlib.suppress(UserError):
                checkpoints.wait()
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_background_save_of_a_gpu_holds_what_there_was_at_the_call(gate, tmp_path):
    run, loaded = Training(seed=1), Training(seed=2)
    run.modules["large"], loaded.modules["large"] = nn.Linear(4096, 4096), nn.Linear(4096, 4096)
    for module in run.modules.values():
        module.cuda()
    with Checkpoints(tmp_path, keep=1, async_save=True) as checkpoints:
        run.mark(1).save(checkpoints, 1)
        run.mark(2)
        gate.open.set()
    loaded.restore_latest(checkpoints)
    assert loaded.marked == 1


# Kills. `kill_everywhere` runs in a process of its own because it forks.


def changes_below(directory: Path, event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event is a change of the file system below `directory`."""
    writes = event == "open" and isinstance(args[0], str) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    if not writes and event not in {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}:
        return False
    path = Path(os.fsdecode(args[0]))
    return not path.is_absolute() or path.is_relative_to(directory)  # shutil.rmtree names files by open folder and name


def kill_before_change(number: int, directory: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a fork that dies by SIGKILL before its change `number` of the file system; whether it died."""
    child = os.fork()
    if child == 0:
        remaining = [number]

        def die(event: str, args: tuple[Any, ...]) -> None:
            if changes_below(directory, event, args):
                if remaining[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining[0] -= 1

        sys.addaudithook(die)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_everywhere(
    directory: str, existing: list[int], start: int | None, step: int, keep: int, seen: list[int], async_save: bool
) -> None:
    """Kill a save at every change it makes; `seen` are the weights (times 2) that the next starts find, in order."""
    run, template, work = Training(seed=1), Path(directory) / "template", Path(directory) / "work"
    earlier = Checkpoints(template, keep=9)
    for old in existing:
        run.mark(old).save(earlier, old)
    found: list[int] = []
    while True:
        shutil.copytree(template, work)
        checkpoints = Checkpoints(work, keep=keep, async_save=async_save)
        if start is None:
            run.restore_latest(checkpoints)
        else:
            run.restore(checkpoints, checkpoints.directory / f"step_{start:09d}")

        def save(checkpoints: Checkpoints = checkpoints) -> None:
            run.mark(step + 0.5).save(checkpoints, step)
            if async_save:
                run.mark(-2)
            checkpoints.wait()

        died = kill_before_change(len(found), work, save)
        after = Checkpoints(work, keep=keep)
        state = run.mark(-1).restore_latest(after)
        assert state is not None, f"killed at change {len(found)}, everything is gone"
        assert int(run.marked) == state.step
        hidden = [path.name for path in after.directory.iterdir() if path.name.startswith(".")]
        assert not hidden, f"killed at change {len(found)}, {hidden} stay"
        found.append(int(2 * run.marked))
        for path in after.all():
            after.load(path, modules=run.modules, optimizers=run.optimizers)
        shutil.rmtree(work)
        if not died:
            break
    assert len(found) > 12, "the kills did not happen"
    order = list(dict.fromkeys(found))
    assert order == seen, f"starts after kills found {found}"


@pytest.mark.parametrize("async_save", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("existing", "start", "step", "keep", "seen"),
    [
        ([100, 200], None, 300, 2, [400, 601]),  # the doubled value of the weights: before, then after the rename
        ([100], None, 100, 1, [200, 201]),  # the same step again, and no other to fall back on
        ([100, 200, 300], 100, 150, 2, [600, 200, 301]),  # going back: the newest, the chosen one, the new one
    ],
    ids=["retention", "replacement", "going back"],
)
def test_a_kill_at_any_change_leaves_the_old_or_the_new_checkpoint(
    existing, start, step, keep, seen, async_save, tmp_path
):
    arguments = (str(tmp_path), existing, start, step, keep, seen, async_save)
    code = f"import test_checkpoint; test_checkpoint.kill_everywhere(*{arguments})"
    done = run_forked("-c", code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")  # forks, which threads of this process forbid
    assert done.returncode == 0, done.stderr


# The index, which is a pickle


class Asks:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def described(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def with_index(path: Path, index: object) -> None:
    """Replace a checkpoint's index, with a manifest that agrees: its hashes keep nobody out who can write to it."""
    (path / ".metadata").write_bytes(index if isinstance(index, bytes) else pickle.dumps(index))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[".metadata"] = described(path / ".metadata")
    (path / "manifest.json").write_text(json.dumps(manifest))


def hostile_indexes(path: Path, trace: Path) -> dict[str, object]:
    """Indexes that would run code with torch's own reader, or point out of the checkpoint, by what to say of them."""
    index = FileSystemReader(path).read_metadata()
    tensors, places = index.state_dict_metadata, index.storage_data
    first = next(iter(tensors))
    place = next(iter(places.values()))
    dotted = b"\x80\x04\x8c%storch.distributed.checkpoint.metadata\x8c\x09os.getcwd\x93)R." % bytes([0x26])
    return {
        "asks for posix.mkdir": Asks(trace),
        "posix.mkdir": dataclasses.replace(index, planner_data={"a": Asks(trace)}),
        "BytesStorageMetadata": dataclasses.replace(
            index, state_dict_metadata=tensors | {first: BytesStorageMetadata()}
        ),
        "asks for torch.load": b"ctorch\nload\n.",
        "asks for torch.serialization.load": b"ctorch.serialization\nload\n.",
        "asks for builtins.eval": b"cbuiltins\neval\n(Vprint(1)\ntR.",
        "asks for torch.distributed.checkpoint.metadata.os": b"ctorch.distributed.checkpoint.metadata\nos\n.",
        "is not the index": dotted,
        "is not the index of": {"state_dict_metadata": {}},
        "tensors alone": dataclasses.replace(
            index, storage_data={at: dataclasses.replace(place, relative_path="../../other") for at in places}
        ),
        "index of a checkpoint": b"no pickle",
        "'NoneType'": dataclasses.replace(index, storage_data=None),
        "checkpoint: ": b"",
    }


@pytest.mark.parametrize("how", ["restore", "load", "read_weights", "clusters"])
def test_a_hostile_index_is_refused_by_name_and_never_runs(tmp_path, how):
    run, checkpoints, trace = Training(seed=1).train(1), Checkpoints(tmp_path, keep=3), tmp_path / "it-ran"
    path = run.save(checkpoints, 1)
    readers: dict[str, Callable[[], object]] = {
        "restore": lambda: run.restore_latest(checkpoints),
        "load": lambda: checkpoints.load(path, modules=run.modules, optimizers=run.optimizers),
        "read_weights": lambda: checkpoint.read_weights(path, "student"),
        "clusters": lambda: eval_visualizations.read_clustering_head(str(path), run.modules["student"], 4),
    }
    before = copy.deepcopy(run.tensors())
    for message, index in hostile_indexes(path, trace).items():
        good = (path / ".metadata").read_bytes()
        with_index(path, index)
        with pytest.raises(UserError) as caught:
            readers[how]()
        assert message in str(caught.value), f"{message} is not in: {caught.value}"
        assert ".metadata" in str(caught.value)
        assert "safe_globals" not in str(caught.value)
        assert not trace.exists(), f"the index that {message} ran"
        with_index(path, good)
    assert_bitwise_equal(run.tensors(), before)
    readers["restore"]()


def test_tensors_of_the_checkpoint_are_read_without_executing_them(tmp_path):
    """A part of the file that is no tensor but a pickle, under an index that says it is one."""
    run, checkpoints, trace = Training(seed=1).train(1), Checkpoints(tmp_path, keep=3), tmp_path / "it-ran"
    path = run.save(checkpoints, 1)
    file, index = path / "__0_0.distcp", FileSystemReader(path).read_metadata()
    torch.save(Asks(trace), tmp_path / "evil.pth")
    content = (tmp_path / "evil.pth").read_bytes()
    file.write_bytes(content)
    places = {at: dataclasses.replace(p, offset=0, length=len(content)) for at, p in index.storage_data.items()}
    manifest = json.loads((path / "manifest.json").read_text()) | {file.name: described(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with_index(path, dataclasses.replace(index, storage_data=places))
    with pytest.raises(UserError, match=r"step_000000001' cannot be read: .*posix.mkdir"):
        run.restore_latest(checkpoints)
    assert not trace.exists()


def test_members_of_enumerations_may_be_pickled_as_early_python_3_11_does(tmp_path, monkeypatch):
    run, checkpoints = Training(seed=1).train(1), Checkpoints(tmp_path, keep=3)
    encoding = type(metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT)
    monkeypatch.setattr(encoding, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    run.save(checkpoints, 1)
    assert b"getattr" in (tmp_path / "checkpoints" / "step_000000001" / ".metadata").read_bytes()
    loaded = Training(seed=2)
    loaded.restore_latest(checkpoints)
    assert_bitwise_equal(loaded.tensors(), run.tensors())


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_checkpoints_of_the_time_when_final_norms_had_another_name_are_resumed(tmp_path, monkeypatch, norm):
    def training(seed: int) -> Training:
        run = Training(seed)
        student = tiny_model(norm_layer_type=norm, final_norm_kwargs={"elementwise_affine": True})
        run.modules = {"student": nn.ModuleDict({"backbone": student})}
        run.optimizers = {"student": (run.modules["student"], torch.optim.AdamW(student.parameters()))}
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.optimizers["student"][1].step()
        return run

    class OfThatTime(nn.ModuleDict):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            named = super().state_dict(*args, **kwargs).items()
            return {re.sub(r"(enc|dec)_norm", r"\1oder.norm", key): tensor for key, tensor in named}

    saved, checkpoints = training(1), Checkpoints(tmp_path, keep=3)
    student, optimizer = saved.optimizers["student"]
    assert isinstance(student, nn.ModuleDict)
    renamed = OfThatTime(student.items())
    path = checkpoints.save(
        1,
        modules={"student": renamed},
        optimizers={"student": (renamed, optimizer)},
        extra={},
        rank_extra={},
        config_yaml=YAML,
    )
    earlier = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {"student.backbone.encoder.norm.weight", "optimizers.student.backbone.decoder.norm.weight.exp_avg"} <= (
        earlier.keys()
    )
    loaded = training(2)
    loaded.restore_latest(checkpoints)
    assert_bitwise_equal(loaded.tensors(), saved.tensors())
    weights = checkpoint.read_weights(path, "student")
    assert_bitwise_equal(weights, saved.modules["student"].state_dict())


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    tower = Tower()
    export_weights(tmp_path / "w.pth", {"backbone": tower}, YAML)
    before = (tmp_path / "w.pth").read_bytes()
    with torch.no_grad():
        tower.fc1.weight[0, 1:] = torch.tensor([torch.nan, -torch.inf])
    with pytest.raises(UserError, match=r"backbone.fc1.weight \(2 of 15 values\).*Export an earlier checkpoint"):
        export_weights(tmp_path / "w.pth", {"backbone": tower}, YAML)
    assert (tmp_path / "w.pth").read_bytes() == before


# Ranks


def continue_on_a_rank(path: Path) -> None:
    """Load what one process saved, train on, save, export; then fill one rank's disk."""
    rank = dist.get_rank()
    run, checkpoints = Training(seed=5 + rank, shard=True), Checkpoints(path, keep=3)
    state = run.restore_latest(checkpoints)
    assert state is not None
    assert (state.step, state.world_size, state.rank_extra) == (2, 1, [{"rank": 0}])
    assert_bitwise_equal(run.tensors(), Training(seed=1).train(2).tensors())
    run.train(1).save(checkpoints, 3)
    student = run.modules["student"]
    assert isinstance(student, nn.ModuleDict)
    export_weights(path / "student.pth", dict(student.items()), YAML)
    expected = run.tensors()
    if rank == 0:
        torch.save(expected, path / "expected.pth")
    for full_rank in (0, 1):
        disk = files_limited_to(2000) if rank == full_rank else contextlib.nullcontext()
        with pytest.raises(UserError, match=r"step 4 could not be saved.*File too large"), disk:
            run.save(checkpoints, 4)
    with pytest.raises(UserError, match=r"rank 0 does not see __1_0.distcp; all nodes must share"):
        run.save(Checkpoints(path / f"disk_of_rank_{rank}", keep=3), 4)
    with pytest.raises(UserError, match="in use by another run"), claim_output_dir(path):
        pass


def test_ranks_save_together_and_their_number_may_change(tmp_path):
    Training(seed=1).train(2).save(Checkpoints(tmp_path, keep=3), 2)
    with claim_output_dir(tmp_path):
        run_on_ranks(continue_on_a_rank, 2, tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert names(checkpoints.directory) == ["step_000000002", "step_000000003"]
    manifest = json.loads((checkpoints.directory / "step_000000003" / "manifest.json").read_text())
    assert {"__0_0.distcp", "__1_0.distcp"} <= manifest.keys(), "each rank writes its own part"
    loaded = Training(seed=2)
    state = loaded.restore_latest(checkpoints)
    assert state is not None
    assert (state.world_size, state.rank_extra) == (2, [{"rank": 0}, {"rank": 1}])
    expected = torch.load(tmp_path / "expected.pth", weights_only=True)
    assert_bitwise_equal(loaded.tensors(), expected)
    exported = torch.load(tmp_path / "student.pth", weights_only=True)
    assert_bitwise_equal(exported, loaded.modules["student"].state_dict())


def save_while_training_on_a_rank(path: Path) -> None:
    """Train, with collectives of all kinds, while a save is between its own; then fill one rank's disk."""
    rank = dist.get_rank()
    with Checkpoints(path, keep=3, async_save=True) as checkpoints, pytest.MonkeyPatch.context() as patch:
        run = Training(seed=5, shard=True).train(2)
        expected = copy.deepcopy(run.tensors())
        gate = Gate(patch)
        if rank == 1:
            gate.open.set()  # this rank's thread waits for the other's in a collective
        run.save(checkpoints, 2)
        run.train(3)
        for number in range(200):
            total = torch.tensor(rank + number)
            dist.all_reduce(total)
            assert total == 2 * number + 1
            gathered: list[Any] = [None, None]
            dist.all_gather_object(gathered, (rank, number))
            assert gathered == [(0, number), (1, number)]
        assert checkpoints.newest() is None
        gate.open.set()
        for number in range(200):  # without a pause, while it writes
            total = torch.tensor(rank + number)
            dist.all_reduce(total)
            assert total == 2 * number + 1
        checkpoints.wait()
        assert checkpoints.newest() == checkpoints.finished
        if rank == 0:
            torch.save(expected, path / "expected.pth")
        for full_rank in (0, 1):
            disk = files_limited_to(2000) if rank == full_rank else contextlib.nullcontext()
            with pytest.raises(UserError, match=r"step 4 could not be saved.*File too large"), disk:
                run.save(checkpoints, 4)
                checkpoints.wait()
            with files_limited_to(2000) if rank == full_rank else contextlib.nullcontext():
                run.save(checkpoints, 4)
                checkpoints.last()
            run.save(checkpoints, 5)  # it is for all ranks to forget the one before


def test_ranks_train_on_while_they_save(tmp_path):
    run_on_ranks(save_while_training_on_a_rank, 2, tmp_path)
    checkpoints, loaded = Checkpoints(tmp_path, keep=3), Training(seed=2)
    assert names(checkpoints.directory) == ["step_000000002", "step_000000005"]
    state = loaded.restore(checkpoints, checkpoints.directory / "step_000000002")
    assert (state.world_size, state.rank_extra) == (2, [{"rank": 0}, {"rank": 1}])
    assert_bitwise_equal(loaded.tensors(), torch.load(tmp_path / "expected.pth", weights_only=True))


# Configurations


@pytest.fixture(scope="module")
def config() -> CapiConfig:
    return load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["capi.clustering_optimizer.weight_decay=1e-5"])


def test_a_saved_configuration_equals_itself_when_read_back(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run, checkpoints = Training(seed=1), Checkpoints(tmp_path, keep=1)
    arguments: dict[str, Any] = {"modules": run.modules, "optimizers": run.optimizers}
    checkpoints.save(1, **arguments, extra={}, rank_extra={}, config_yaml=to_yaml(config))
    state = checkpoints.restore_latest(**arguments, config=asdict(config))
    assert state is not None
    assert check_compatible(state.config, asdict(config), CapiState.MODEL_KEYS) == {}
    assert "changed since" not in caplog.text


def test_another_model_is_refused_key_by_key(config, tmp_path):
    run = Training(seed=1).mark(1)
    checkpoints = Checkpoints(tmp_path, keep=1, model_keys=CapiState.MODEL_KEYS)
    checkpoints.save(
        1, modules=run.modules, optimizers=run.optimizers, extra={}, rank_extra={}, config_yaml=to_yaml(config)
    )
    other = asdict(config)
    other["model"]["encoder_kwargs"]["depth"] = 12
    other["capi"]["num_clusters"] = 64
    other["capi"]["clustering_kwargs"]["bias"] = False
    other["optim"]["total_iters"] = 7
    other["capi"]["clustering_kwargs"]["n_sk_iter"] = 4
    with pytest.raises(UserError) as caught:
        checkpoints.restore_latest(modules=run.mark(2).modules, optimizers=run.optimizers, config=other)
    for part in (
        "model.encoder_kwargs.depth is 24 there and 12 now",
        "capi.num_clusters is 16384 there and 64 now",
        "capi.clustering_kwargs.bias is True there and False now",
    ):
        assert part in str(caught.value)
    assert "total_iters" not in str(caught.value)
    assert "n_sk_iter" not in str(caught.value)
    assert run.marked == 2


def test_other_changes_are_returned_and_logged(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run, checkpoints = Training(seed=1), Checkpoints(tmp_path, keep=1)
    checkpoints.save(
        1, modules=run.modules, optimizers=run.optimizers, extra={}, rank_extra={}, config_yaml=to_yaml(config)
    )
    other = asdict(config)
    other["optim"]["total_iters"] = 7
    assert check_compatible(asdict(config), other, CapiState.MODEL_KEYS) == {"optim.total_iters": (500_000, 7)}
    checkpoints.restore_latest(modules=run.modules, optimizers=run.optimizers, config=other)
    assert "optim.total_iters: 500000 -> 7" in caplog.text


# Exports


def test_an_export_is_a_flat_dict_that_loads_without_unpickling(tmp_path):
    backbone, head = Tower(), nn.Linear(4, 2)
    backbone.fc1.weight = nn.Parameter(torch.randn(3, 500).T[:5])  # not contiguous, a small part of its storage
    path = tmp_path / "exports" / "student_ema.pth"
    for scale in (1, 2):  # the second replaces the first
        with torch.no_grad():
            head.weight.mul_(scale)
        export_weights(path, {"backbone": backbone, "head": head}, YAML)
        exported = torch.load(path, weights_only=True)
        expected = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        expected |= {f"head.{key}": value for key, value in head.state_dict().items()}
        assert_bitwise_equal(exported, expected)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in exported.values())
    assert path.with_suffix(".yaml").read_text() == YAML
    assert names(path.parent) == ["student_ema.pth", "student_ema.yaml"]


@pytest.mark.parametrize(
    "size", [1, 500, 100_000]
)  # in the configuration, at the end of a small file, in a large tensor
def test_an_export_to_a_full_disk_keeps_the_last_one(size, tmp_path):
    path = tmp_path / "student.pth"
    export_weights(path, {"backbone": Tower()}, YAML)
    before = path.read_bytes()
    message = r"could not be exported to .*student.pth.*File too large"
    with pytest.raises(UserError, match=message), files_limited_to(size):
        export_weights(path, {"backbone": nn.Linear(300, 300) if size > 500 else Tower()}, "model:\n  depth: 3\n")
    assert path.read_bytes() == before
    assert path.with_suffix(".yaml").read_text() == YAML
    assert names(tmp_path) == ["student.pth", "student.yaml"]
