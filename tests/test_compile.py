"""The compiled step is the eager step, without recompilation after the first one."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

CODE = """
    import torch, torch._dynamo
    import test_train_capi as golden
    from train_capi import train_step
    from optim import hyper_at

    torch.set_num_threads(2)
    small = ["model.encoder_kwargs.depth=1", "model.decoder_kwargs.depth=1"]
    golden.GOLDEN_CONFIG += small
    def state(disable):
        cfg = golden.load_config(golden.CapiConfig, golden.DEFAULT_PRETRAIN_CONFIG, [
            *golden.GOLDEN_CONFIG, *small,
            f"efficiency.compilation.do_teacher.disable={disable}",
            f"efficiency.compilation.do_student.disable={disable}",
        ])
        return golden.train_capi.TrainState(cfg, torch.device("cpu"))
    eager, compiled = state("true"), state("false")
    for i in range(4):
        torch._dynamo.config.error_on_recompile = i > 1
        a = train_step(eager, golden.golden_batches(i, 1), hyper_at(i, eager.cfg))
        b = train_step(compiled, golden.golden_batches(i, 1), hyper_at(i, eager.cfg))
        for name in ("capi_loss", "clustering_loss", "grad_norm"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=f"{name} at step {i}")
    for (name, p), q in zip(eager.student.named_parameters(), compiled.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, torch._dynamo.utils.counters
    assert not torch._dynamo.utils.counters["graph_break"]
"""


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.timeout(300)
def test_compiled_steps_equal_eager_steps():
    """In a process of its own: run-time shape checks and torch.compile do not go together."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)],
        cwd=ROOT,
        env={**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
