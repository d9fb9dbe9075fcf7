"""Commands and tiny training runs that tests start: in this process, in one that is forked, in one that is killed."""

import hashlib
import importlib
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_cli
from PIL import Image
from ranks import forked

from benchmark import without_weights

SPEED = {"images_per_s", "step_ms", "data_wait", "memory_gib", "eta_s", "mfu", "probe_s"}
"""Metrics that depend on the machine and the moment."""

TINY_TRAINING = [
    "train.device=cpu",
    "train.log_loss_every=1",
    "train.health_every=3",
    "train.checkpointing.period=2",
    "optim.batch_size_per_gpu=4",
    "optim.total_iters=6",
    "data.stream_shuffle_block=4",
    "efficiency.param_dtype=float32",
    "efficiency.dataloader_num_workers=0",
    "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true",
    "efficiency.rematerialization.enabled=false",
    "evals=null",
]
"""What tiny runs of all methods share."""

TINY = [
    *TINY_TRAINING,
    "capi.num_clusters=16",
    "optim.momentum_schedule.start_warmup_value=0.9",
    "optim.momentum_schedule.base_value=0.9",
    "data.images_size=16",
    "data.prediction_subsampling=0.5",
    "model.patch_size=4",
    "model.n_registers=4",
    "model.transformers_kwargs.embed_dim=32",
    "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=2",
    "model.encoder_kwargs.depth=2",
    "model.decoder_kwargs.depth=1",
]

FAKE_EVALUATION = """
    import sys
    sys.path.insert(0, {root!r})
    from utils import add_sources, command_line
    with command_line("fake", __name__) as parser:
        add_sources(parser)
    from dataclasses import dataclass
    from evaluation import Evaluation, EvaluationConfig

    @dataclass(frozen=True, kw_only=True)
    class Config(EvaluationConfig):
        draws: bool = False

    def evaluate(cfg, model, results):
        if cfg.draws:
            return results.add("pictures", {{}})
        total = sum(float(p.double().sum()) for p in model.module.parameters())
        results.add("sum", {{"top1": total, "settings": {{"not": 1.0}}}})

    sys.exit(Evaluation("fake", Config, evaluate, parser).main())
"""
"""A script, but for the place of the repository, that scores a model by the sum of its weights: quick, and another
number at every step."""


def probed_and_evaluated(place: Path, model_to_eval: str, model_file: str) -> list[str]:
    """Arguments of a run of two steps with a probe and an evaluation by `FAKE_EVALUATION` at the second one."""
    (place / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    evals = {"mine": {
        "period": 2, "final": False, "model_to_eval": model_to_eval, "where": "inline", "download": False,
        "model_setup_script": model_file, "eval_config": {"fake": {"file": str(place / "eval_fake.py")}},
    }}  # fmt: skip
    (place / "evals.yaml").write_text(yaml.safe_dump({"evals": evals}))
    for number in range(2):
        make_images(place / "classes" / f"class{number}", 4)
    labelled = f"torchvision://ImageFolder?root='{place}/classes'"
    probe = [f"train.probe.{name}_dataset={labelled}" for name in ("train", "test")]
    return [*probe, "train.probe.every=2", "train.probe.k=2", "optim.total_iters=2", str(place / "evals.yaml")]


def make_images(folder: Path, num: int = 10, size: int = 24) -> Path:
    """A folder of colourful JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(
            folder / f"{i:02d}.jpg", quality=90
        )
    return folder


def tiny(images: Path | str, output_dir: Path, *overrides: str) -> list[str]:
    """Command-line arguments of a tiny run."""
    return [*TINY, f"data.dataset={images}", f"train.output_dir={output_dir}", *overrides]


def run_main(arguments: list[str]) -> int:
    """Train in this process; the exit code."""
    import train_capi

    return train_capi.main(arguments)


def _child(script: str, arguments: list[str]) -> None:
    raise SystemExit(importlib.import_module(script).main(arguments))


def run_forked(*args: str | Path, cwd: Path = ROOT, timeout: float = 200, **env: str) -> CompletedProcess[str]:
    """Like `conftest.run_cli`, in a process that is forked off a server, see `forked_python`.

    Imports are most of what a short command does. What uses a part of a package without importing it shows where a
    script is started by `run_cli`.
    """
    return run_cli(*args, cwd=cwd, timeout=timeout, python=sys.executable, **env)


class KillableRun:
    """A training in a process of its own, started from a server that has imported everything already."""

    def __init__(self, arguments: list[str], output_dir: Path, script: str = "train_capi") -> None:
        self.output_dir = output_dir
        self.process = forked(_child, script, arguments)
        self.process.start()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 200) -> bool:
        """Until the condition holds (True) or the process ended (False)."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                return condition()
            assert time.monotonic() < end, f"{self.output_dir} did not get that far in {seconds} s"
            time.sleep(0.002)
        return True

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def join(self, seconds: float = 200) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode


def logged_steps(output_dir: Path) -> int:
    """Last step in metrics.jsonl, 0 if there is none."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def untrained(load_model: Callable[..., torch.nn.Module], weights: Path) -> torch.nn.Module:
    """A model beside which benchmark.py shows that of an export."""
    return load_model(**without_weights({"pretrained_weights": str(weights)}, [*signature(load_model).parameters]))


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """All records of metrics.jsonl without what depends on the machine."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]


def assert_same_but_for_values(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Parameters of the same names and shapes, not all of the same values."""
    a, b = a.state_dict(), b.state_dict()
    assert {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in b.items()}
    assert not all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(actual: Path, expected: Path, exports: Sequence[str] = ("student", "student_ema")) -> None:
    """Bit for bit the same weights and metrics."""
    assert metrics_of(actual) == metrics_of(expected)
    for name in exports:
        a, b = (torch.load(run / f"{name}.pth", weights_only=True) for run in (actual, expected))
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert different == [], f"{name}.pth differs"


def assert_close_runs(
    actual: Path,
    expected: Path,
    *losses: str,
    export: str = "student_ema",
    rel: float = 2e-5,
    atol: float = 1e-5,
    rtol: float = 0.0,
    but: Sequence[str] = (),
) -> None:
    """Up to rounding the same losses, where there are some, norms of gradients, and weights but for those named."""
    for a, b in zip(metrics_of(actual), metrics_of(expected), strict=True):
        assert a.keys() == b.keys()
        for key in {"step", "grad_norm", *losses} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=rel), f"{key} at step {a['step']}"
    a, b = (torch.load(run / f"{export}.pth", weights_only=True) for run in (actual, expected))
    assert a.keys() == b.keys()
    for key in b.keys() - set(but):
        torch.testing.assert_close(a[key], b[key], atol=atol, rtol=rtol, msg=key)


def train_through_kills(
    script: Any, arguments: list[str], output_dir: Path, at_steps: Sequence[int] = (1, 3, 5)
) -> None:
    """Kill a training when it has logged so many steps, each time, and let it end at last.

    Args:
        script: its module.
        arguments: of the training.
        output_dir: of the training.
        at_steps: when it is killed.
    """
    for at_step in at_steps:
        run = KillableRun(arguments, output_dir, script.__name__)
        run.wait_for(lambda at_step=at_step: logged_steps(output_dir) >= at_step)
        run.signal(signal.SIGKILL)
        assert run.join() == -signal.SIGKILL
    assert script.main(arguments) == 0


def rewrite_config(checkpoint: Path, text: str) -> None:
    """Give a checkpoint another configuration, and its manifest the sums of that."""
    (checkpoint / "config.yaml").write_text(text)
    content, manifest = (checkpoint / "config.yaml").read_bytes(), checkpoint / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(sums))
