"""Training on several ranks is training on one: the golden trajectory, whole runs, and runs that change their ranks."""

import errno
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import assert_close_runs, assert_same_run, make_images, tiny
from conftest import load_golden_json
from golden import META, NUM_PATCHES, frequencies, golden_batches, golden_part, golden_state
from ranks import exit_codes, run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

import train_capi
import training
from checkpoint import Checkpoints
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import Batch
from train_capi import CapiConfig, hyper_at
from utils import UserError

GLOBAL_BATCH = 12


def golden_on_this_rank(mode: str, copies: int, kernel: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Eight golden steps with this rank's share of so many copies of the six images; losses, and the final weights."""
    state = golden_state(f"efficiency.fsdp={mode}", f"capi.clustering_kernel={kernel}")
    for parameter in frequencies(state):
        parameter.requires_grad_()  # the golden norm of the gradients has theirs in it
    records = []
    for step in range(META["steps"]):
        images = [image for image in golden_batches(step, 6) for _ in range(copies)]
        share = len(images) // dist.get_world_size()
        mine = joined(images[share * dist.get_rank() :][:share])
        scalars = train_capi.train_step(state, [mine], hyper_at(step, state.cfg))
        state.step += 1
        records.append({name: value.item() for name, value in scalars.items()})
    return records, {f"{n}.{k}": whole(v) for n, m in state.modules.items() for k, v in m.state_dict().items()}


def joined(batches: list[Batch]) -> Batch:
    """Batches of one image as one batch."""
    masks = {
        name: torch.cat([batch.masks[name] + NUM_PATCHES * i for i, batch in enumerate(batches)])
        for name in ("visible_indices", "predict_indices")
    }
    images = torch.cat([batch.images for batch in batches])
    return Batch(images=images, masks=masks, sample_ids=torch.arange(len(batches))).to("cpu")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.parametrize(
    ("num_ranks", "mode", "copies", "kernel"),
    [
        *((n, "simple", 1, "auto") for n in (1, 2)),
        pytest.param(3, "simple", 1, "auto", marks=pytest.mark.long),
        pytest.param(4, "simple", 2, "auto", marks=pytest.mark.slow),
        (2, "fully_shard", 1, "auto"),
        *((n, "none", 1, "auto") for n in (2, 3)),
        pytest.param(4, "none", 2, "auto", marks=pytest.mark.long),
        *((2, mode, 1, "plain") for mode in ("simple", "fully_shard", "none")),
    ],
)
def test_the_golden_trajectory_on_ranks(num_ranks, mode, copies, kernel):
    """Six images do not divide by four: there every image comes twice, which changes no mean and no balance."""
    for records, weights in run_on_ranks(golden_on_this_rank, num_ranks, mode, copies, kernel):
        for actual, expected in zip(records, load_golden_json("trajectory_default"), strict=True):
            assert actual["capi_loss"] == pytest.approx(expected["capi_loss"], rel=1e-6)
            assert actual["clustering_loss"] == pytest.approx(expected["clustering_loss"], rel=1e-6)
            assert actual["target_entropy"] == pytest.approx(expected["target_entropy"], rel=1e-5)
            assert actual["grad_norm"] == pytest.approx(expected["student_grad_norm"], rel=1e-5)
        for name in ("student", "student_ema", "clustering"):
            for key, value in golden_part(f"final.{name}.").items():
                torch.testing.assert_close(weights[f"{name}.{key}"], value, atol=1e-5, rtol=0, msg=f"{name}.{key}")


def train_on_this_rank(arguments: list[str]) -> None:
    """A whole run, with this rank's share of the global batch."""
    share = f"optim.batch_size_per_gpu={GLOBAL_BATCH // dist.get_world_size()}"
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*arguments, share])
    train_capi.train(cfg, Path(cfg.train.output_dir), torch.device("cpu"))


LOSSES = ("capi_loss", "clustering_loss", "target_entropy")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def run_arguments(images: Path, output_dir: Path, *overrides: str) -> list[str]:
    output_dir.mkdir(exist_ok=True)
    no_drop = "model.transformers_kwargs.drop_path_rate=0"  # which differs by rank, as each has images of its own
    return tiny(images, output_dir, no_drop, "train.checkpointing.period=3", *overrides)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Path:
    """The run that all others have to equal: one rank, never interrupted, past the second epoch of ten images."""
    output_dir = tmp_path_factory.mktemp("alone")
    run_on_ranks(train_on_this_rank, 1, run_arguments(images, output_dir))
    return output_dir


@pytest.mark.parametrize(
    ("num_ranks", "mode"),
    [(2, "simple"), (3, "simple"), pytest.param(4, "simple", marks=pytest.mark.long), (2, "none")],
)
def test_a_run_on_ranks_equals_a_run_alone(images, alone, tmp_path, num_ranks, mode):
    run_on_ranks(train_on_this_rank, num_ranks, run_arguments(images, tmp_path, f"efficiency.fsdp={mode}"))
    assert_close_runs(tmp_path, alone, *LOSSES)


@pytest.fixture(scope="module")
def alone_with(images, tmp_path_factory):
    """A run of one process with other arguments, made once."""

    @functools.cache
    def run(variant):
        folder = tmp_path_factory.mktemp("alone")
        run_on_ranks(train_on_this_rank, 1, [*run_arguments(images, folder, variant), "optim.total_iters=4"])
        return folder

    return run


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("model.predictor=split", "simple"),
        pytest.param("model.predictor=split", "fully_shard", marks=pytest.mark.long),
        ("model.predictor=fused", "simple"),
        pytest.param("model.predictor=fused", "fully_shard", marks=pytest.mark.long),
        ("capi.student_head=mlp", "simple"),
        pytest.param("capi.student_head=mlp", "fully_shard", marks=pytest.mark.long),
        ("capi.queue=2", "simple"),
        pytest.param("capi.queue=2", "fully_shard", marks=pytest.mark.long),
        ("capi.queue=2", "none"),
        ("capi.targets=ema_head", "simple"),
        pytest.param("capi.targets=ema_head", "fully_shard", marks=pytest.mark.long),
        ("capi.targets=latents", "simple"),
    ],
)
def test_a_run_with_another_choice_of_the_paper_on_ranks_equals_one_alone(alone_with, images, tmp_path, variant, mode):
    arguments = run_arguments(images, tmp_path, variant, f"efficiency.fsdp={mode}")
    run_on_ranks(train_on_this_rank, 2, [*arguments, "optim.total_iters=4"])
    assert_close_runs(tmp_path, alone_with(variant), *LOSSES)


@pytest.mark.long
def test_a_queue_moves_to_other_ranks(images, tmp_path):
    """What each rank has seen is everybody's: the balance is over all ranks."""
    straight, moved = (run_arguments(images, tmp_path / name, "capi.queue=2") for name in ("straight", "moved"))
    run_on_ranks(train_on_this_rank, 1, straight)
    run_on_ranks(train_on_this_rank, 2, moved)
    for path in (tmp_path / "moved" / "checkpoints").iterdir():  # as if it had been killed after step 3
        if path.name == "step_000000006":
            path.rename(tmp_path / "not-reached")
    run_on_ranks(train_on_this_rank, 3, moved)
    assert_close_runs(tmp_path / "moved", tmp_path / "straight", *LOSSES)


@pytest.mark.parametrize(
    ("before", "after", "modes"),
    [
        (2, 1, ("simple", "simple")),
        (2, 3, ("simple", "simple")),
        pytest.param(2, 4, ("simple", "none"), marks=pytest.mark.long),
        (1, 2, ("none", "simple")),
        pytest.param(2, 2, ("simple", "fully_shard"), marks=pytest.mark.long),
        pytest.param(2, 3, ("fully_shard", "simple"), marks=pytest.mark.long),
    ],
)
def test_a_run_continues_on_other_ranks_and_divided_in_another_way(images, alone, tmp_path, before, after, modes):
    arguments = run_arguments(images, tmp_path)
    run_on_ranks(train_on_this_rank, before, [*arguments, f"efficiency.fsdp={modes[0]}"])
    for path in (tmp_path / "checkpoints").iterdir():  # as if it had been killed after step 3
        if path.name == "step_000000006":
            path.rename(tmp_path / "not-reached")
    run_on_ranks(train_on_this_rank, after, [*arguments, f"efficiency.fsdp={modes[1]}"])
    assert_close_runs(tmp_path, alone, *LOSSES)


def with_a_fault_of_one_rank(arguments: list[str], kind: str) -> str:
    """A run in which, at step 3, rank 0 cannot write its metrics, or a gradient of rank 1 is NaN; the error here."""
    append, average = training.Metrics.append, training.average_gradients_
    calls = []

    def appends_unless_full(meters: Any, step: int, values: Any) -> Any:
        if kind == "full disk" and step == 3 and dist.get_rank() == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(meters, step, values)

    def averages_a_nan(module: Any, sharding: Any) -> None:
        calls.append(module)
        if kind == "NaN" and len(calls) == 5 and dist.get_rank() == 1:  # student and clustering head take turns
            next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = torch.nan
        average(module, sharding)

    with (
        mock.patch.object(training.Metrics, "append", appends_unless_full),
        mock.patch.object(training, "average_gradients_", averages_a_nan),
        pytest.raises(UserError) as caught,
    ):
        train_on_this_rank(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "says", "saved"),
    [
        ("full disk", "cannot be written: No space left on device", ["step_000000002", "step_000000004"]),
        ("NaN", "grad_norm became NaN at step 3", ["step_000000002"]),
    ],
)
def test_a_fault_of_one_rank_stops_all_with_what_is_good_on_disk(images, tmp_path, kind, says, saved):
    arguments = run_arguments(images, tmp_path, "efficiency.fsdp=none", "train.nan_check_period=3")
    period = "train.checkpointing.period=2"
    errors = run_on_ranks(with_a_fault_of_one_rank, 2, [*arguments, period], kind)
    assert len(set(errors)) == 1 and says in errors[0], errors
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == saved


def main_on_a_rank(arguments: list[str], dies: tuple[int, str, str] | None) -> None:
    """A whole run; with `dies` = (rank, audit event, end of its path), that rank is killed just before that happens."""

    def die(event: str, args: tuple[Any, ...]) -> None:
        assert dies is not None
        if event == dies[1] and str(args[0]).endswith(dies[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    if dies is not None and int(os.environ["RANK"]) == dies[0]:
        sys.addaudithook(die)
    raise SystemExit(train_capi.main(arguments))


def ends_of_two_ranks(arguments: list[str], dies: tuple[int, str, str] | None = None) -> list[int | None]:
    share = f"optim.batch_size_per_gpu={GLOBAL_BATCH // 2}"
    steps = ["optim.total_iters=4", "train.checkpointing.period=2"]
    return exit_codes(main_on_a_rank, 2, [*arguments, share, *steps], dies)


@pytest.fixture(scope="module")
def on_two_ranks(images, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("two")
    assert ends_of_two_ranks(run_arguments(images, output_dir)) == [0, 0]
    return output_dir


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("dies", "async_save"),
    [
        ((1, "open", "/.tmp-step_000000004/__1_0.distcp"), "false"),
        ((0, "os.rename", "/.tmp-step_000000004"), "true"),
    ],
    ids=["before its tensors", "before the rename, in the background"],
)
def test_a_rank_killed_in_a_save_costs_the_steps_since_the_last_one(images, on_two_ranks, tmp_path, dies, async_save):
    arguments = run_arguments(images, tmp_path, f"train.checkpointing.async_save={async_save}")
    codes = ends_of_two_ranks(arguments, dies)
    assert codes[dies[0]] == -signal.SIGKILL, "nothing killed it"
    assert codes[1 - dies[0]] == 1, "the other rank did not end with an error of its own"
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert (checkpoints.directory / ".tmp-step_000000004").is_dir(), "the save had not begun, or was over"
    assert checkpoints.newest() == checkpoints.directory / "step_000000002"
    assert ends_of_two_ranks(arguments) == [0, 0]
    assert checkpoints.newest() == checkpoints.directory / "step_000000004"
    assert_same_run(tmp_path, on_two_ranks)
