"""What only a GPU can show: `make gpu`."""

import textwrap

import pytest
import torch
from conftest import ROOT, run_cli
from golden import GOLDEN_CONFIG, golden_batches
from runs import make_images, metrics_of, run_main, tiny

import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from train_capi import CapiConfig, hyper_at

pytestmark = pytest.mark.gpu


def test_a_step_never_waits_for_the_gpu():
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, "efficiency.param_dtype=bfloat16"])
    state = train_capi.CapiState(cfg, torch.device("cuda"))
    (batch,) = golden_batches(0, 1)
    batch = batch.to("cuda")
    train_capi.train_step(state, [batch], hyper_at(1, cfg), with_usage=True)  # libraries load, states are allocated
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_capi.train_step(state, [batch], hyper_at(2, cfg), with_usage=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(600)
def test_drop_path_of_a_compiled_step_follows_seed_and_step_on_a_gpu():
    """The same images as in an eager step and on a CPU, however many steps this process has made before."""
    done = run_cli("-c", textwrap.dedent(DROP_PATH), timeout=600, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]


DROP_PATH = """
    import torch
    from config import DEFAULT_PRETRAIN_CONFIG, load_config
    from train_capi import CapiConfig
    from golden import DROP_PATH, GOLDEN_CONFIG, golden_batches, golden_part, load_whole
    from train_capi import hyper_at
    from train_capi import CapiState, train_step

    (batch,) = golden_batches(0, 1)
    losses = {}
    for device, disable in (("cpu", "true"), ("cuda", "true"), ("cuda", "false")):
        cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [
            *GOLDEN_CONFIG, DROP_PATH, f"train.device={device}",
            f"efficiency.compilation.do_teacher.disable={disable}",
            f"efficiency.compilation.do_student.disable={disable}",
        ])
        state = CapiState(cfg, torch.device(device))
        for name, module in state.modules.items():
            name = name if name == "clustering" else "student"
            load_whole(module, golden_part(f"init.{name}."))
        mine = batch.to(device)
        # Learning rates are 0 at step 0: the loss depends on the images that are dropped, and on nothing before.
        for step in (0, 1, 2, 3, 1, 2):
            state.step = step
            loss = train_step(state, [mine], hyper_at(0, cfg))["capi_loss"].item()
            torch.testing.assert_close(loss, losses.setdefault(step, loss), rtol=1e-3, atol=0, msg=f"{device} {step}")
        assert len({round(loss, 4) for loss in losses.values()}) == 4, losses
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_on_a_gpu_is_close_to_one_on_a_cpu(tmp_path, dtype):
    images = make_images(tmp_path / "images")
    for device in ("cpu", "cuda"):
        overrides = [f"train.device={device}", f"efficiency.param_dtype={dtype if device == 'cuda' else 'float32'}"]
        assert run_main(tiny(images, tmp_path / device, *overrides)) == 0
    expected, actual = metrics_of(tmp_path / "cpu")[0], metrics_of(tmp_path / "cuda")[0]
    assert actual["capi_loss"] == pytest.approx(expected["capi_loss"], rel=0.2)  # other initial weights
