"""What only a GPU can show: `make gpu`."""

import dataclasses

import pytest
import torch
from runs import make_images, metrics_of, run_main, tiny
from test_train_capi import GOLDEN_CONFIG, golden_batches

import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from optim import hyper_at

pytestmark = pytest.mark.gpu


def test_a_step_never_waits_for_the_gpu():
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, "efficiency.param_dtype=bfloat16"])
    state = train_capi.TrainState(cfg, torch.device("cuda"))
    (batch,) = golden_batches(0, 1)
    batch = dataclasses.replace(batch.to("cuda"), host_predict_indices=batch.host_predict_indices)
    train_capi.train_step(state, [batch], hyper_at(1, cfg), with_usage=True)  # libraries load, states are allocated
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_capi.train_step(state, [batch], hyper_at(2, cfg), with_usage=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_on_a_gpu_is_close_to_one_on_a_cpu(tmp_path, dtype):
    images = make_images(tmp_path / "images")
    for device in ("cpu", "cuda"):
        overrides = [f"train.device={device}", f"efficiency.param_dtype={dtype if device == 'cuda' else 'float32'}"]
        assert run_main(tiny(images, tmp_path / device, *overrides)) == 0
    expected, actual = metrics_of(tmp_path / "cpu")[0], metrics_of(tmp_path / "cuda")[0]
    assert actual["capi_loss"] == pytest.approx(expected["capi_loss"], rel=0.2)  # other initial weights
