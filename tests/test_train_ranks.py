"""Training on several ranks is training on one: the golden trajectory, whole runs, and runs that change their ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import load_golden_json
from ranks import run_on_ranks
from runs import make_images, tiny
from torch import Tensor
from torch.distributed.tensor import DTensor

import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from data import Batch
from optim import hyper_at

GLOBAL_BATCH = 12


def golden_on_this_rank(mode: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Eight golden steps with this rank's share of the six images; losses, and the final weights."""
    import test_train_capi as golden

    state = golden.golden_state(f"efficiency.fsdp={mode}")
    records = []
    for step in range(golden.META["steps"]):
        share: Batch = golden.golden_batches(step, dist.get_world_size())[dist.get_rank()]
        scalars = train_capi.train_step(state, [share], hyper_at(step, state.cfg))
        state.step += 1
        records.append({name: value.item() for name, value in scalars.items()})
    return records, {f"{n}.{k}": whole(v) for n, m in state.modules.items() for k, v in m.state_dict().items()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.parametrize(
    ("num_ranks", "mode"), [(1, "simple"), (2, "simple"), (3, "simple"), (2, "fully_shard"), (2, "none"), (3, "none")]
)
def test_the_golden_trajectory_on_ranks(num_ranks, mode):
    import test_train_capi as golden

    for records, weights in run_on_ranks(golden_on_this_rank, num_ranks, mode):
        for actual, expected in zip(records, load_golden_json("trajectory_default"), strict=True):
            assert actual["capi_loss"] == pytest.approx(expected["capi_loss"], rel=1e-6)
            assert actual["clustering_loss"] == pytest.approx(expected["clustering_loss"], rel=1e-6)
            assert actual["target_entropy"] == pytest.approx(expected["target_entropy"], rel=1e-5)
            assert actual["grad_norm"] == pytest.approx(expected["student_grad_norm"], rel=1e-5)
        for name in ("student", "student_ema", "clustering"):
            for key, value in golden.part(f"final.{name}.").items():
                torch.testing.assert_close(weights[f"{name}.{key}"], value, atol=1e-5, rtol=0, msg=f"{name}.{key}")


def train_on_this_rank(arguments: list[str]) -> None:
    """A whole run, with this rank's share of the global batch."""
    share = f"optim.batch_size_per_gpu={GLOBAL_BATCH // dist.get_world_size()}"
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*arguments, share])
    train_capi.train(cfg, Path(cfg.train.output_dir), torch.device("cpu"))


def records_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_close_runs(actual: Path, expected: Path) -> None:
    for a, b in zip(records_of(actual), records_of(expected), strict=True):
        assert a["step"] == b["step"]
        for key in ("capi_loss", "clustering_loss", "target_entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-5), f"{key} at step {a['step']}"
    a, b = (torch.load(run / "student_ema.pth", weights_only=True) for run in (actual, expected))
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=0, msg=key)


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


@pytest.mark.parametrize(("num_ranks", "mode"), [(2, "simple"), (3, "simple"), (4, "simple"), (2, "none")])
def test_a_run_on_ranks_equals_a_run_alone(images, alone, tmp_path, num_ranks, mode):
    run_on_ranks(train_on_this_rank, num_ranks, run_arguments(images, tmp_path, f"efficiency.fsdp={mode}"))
    assert_close_runs(tmp_path, alone)


@pytest.mark.parametrize(
    ("before", "after", "modes"),
    [
        (2, 1, ("simple", "simple")),
        (2, 3, ("simple", "simple")),
        (2, 4, ("simple", "none")),
        (1, 2, ("none", "simple")),
        (2, 2, ("simple", "fully_shard")),
        (2, 3, ("fully_shard", "simple")),
    ],
)
def test_a_run_continues_on_other_ranks_and_divided_in_another_way(images, alone, tmp_path, before, after, modes):
    arguments = run_arguments(images, tmp_path)
    run_on_ranks(train_on_this_rank, before, [*arguments, f"efficiency.fsdp={modes[0]}"])
    for path in (tmp_path / "checkpoints").iterdir():  # as if it had been killed after step 3
        if path.name == "step_000000006":
            path.rename(tmp_path / "not-reached")
    run_on_ranks(train_on_this_rank, after, [*arguments, f"efficiency.fsdp={modes[1]}"])
    assert_close_runs(tmp_path, alone)
