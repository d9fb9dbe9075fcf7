"""fsdp.py on several ranks: dividing a model changes where numbers are, not which."""

import dataclasses
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from runs import TINY
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from data import Batch
from fsdp import Sharding, average_gradients_, gathered, parallelize
from model import Block, EncoderDecoder
from optim import Hyper, make_clustering_optimizer, make_student_optimizer
from train_capi import TrainState, train_step

CPU = torch.device("cpu")
SIMPLE = Sharding("simple", torch.float32, torch.float32, bucket_mib=25, prefetch=1)
GLOBAL_BATCH = 12


def sharding(mode: str, **changes: Any) -> Sharding:
    return dataclasses.replace(SIMPLE, mode=mode, **changes)


def my_part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Odd(nn.Module):
    """Parameters of awkward sizes, a tied one among them, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(), (1,), (1, 3), (2, 3), (5,), (7, 2, 2), (0, 2)]):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
        self.linear = nn.Linear(3, 5)
        self.same = nn.Linear(3, 5, bias=False)
        self.same.weight = self.linear.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("offset", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x + self.offset) + 2 * self.same(x)
        for name, _ in self.named_parameters(recurse=False):
            parameter = getattr(self, name)
            y = y + parameter.square().sum() * y.mean() * 0.1
        return y.square().mean(dim=1)


def make_odd(seed: int = 0) -> Odd:
    torch.manual_seed(seed)
    return Odd()


def small_backbone(seed: int = 0) -> EncoderDecoder:
    torch.manual_seed(seed)
    block = {"drop_path_type": "efficient", "attn_kwargs": {"num_heads": 2}}
    return EncoderDecoder(
        patch_size=4,
        n_registers=4,
        transformers_kwargs={"embed_dim": 24, "drop_path_rate": 0.0, "block_kwargs": block},
        encoder_kwargs={"depth": 2},
        decoder_kwargs={"depth": 1},
    )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, Block)]


def backbone_loss(model: EncoderDecoder, images: Tensor) -> Tensor:
    b = len(images)
    position = torch.arange(16 * b).view(b, 16)
    _, predictions = model.forward_pretrain(
        images, position[:, :6].flatten(), position[:, 9:12].flatten(), do_prediction=True
    )
    assert predictions is not None
    predictions = predictions.float()
    return (
        (predictions * torch.linspace(-1, 1, predictions.shape[1])).cos().mean()
    )  # any function that is not symmetric


# What a divided module looks like


def describe(mode: str) -> dict[str, Any]:
    module = make_odd(seed=dist.get_rank())  # different weights: those of rank 0 count
    class_name = type(module).__name__
    parallelize(module, sharding(mode), CPU)
    assert type(module).__name__ == class_name
    assert isinstance(module, Odd)
    assert module.same._parameters["weight"] is module.linear._parameters["weight"], "no longer tied"
    own = {k: len(p.to_local()) for k, p in module.named_parameters() if isinstance(p, DTensor) and p.ndim}
    return {
        "state_dict": {k: whole(v) for k, v in module.state_dict().items()},
        "names": [n for n, _ in module.named_parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "own": own,
        "attribute": module.linear.weight.detach().clone(),
        "type": type(module.linear.weight).__name__,
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_names_and_values_stay_and_each_rank_holds_its_part(num_ranks):
    plain = make_odd(seed=0)
    descriptions = run_on_ranks(describe, num_ranks, "simple")
    for found in descriptions:
        assert found["names"] == [n for n, _ in plain.named_parameters()]
        assert found["requires_grad"] == [p.requires_grad for p in plain.parameters()]
        torch.testing.assert_close(found["state_dict"], dict(plain.state_dict()), rtol=0, atol=0)
        assert torch.equal(found["attribute"], plain.linear.weight)
        assert found["type"] == "Tensor", "reading a parameter did not give a plain tensor"
    for key, value in plain.named_parameters():
        if value.ndim:
            rows = [found["own"][key] for found in descriptions]
            assert sum(rows) == len(value), f"{key} is not divided"
            assert max(rows) == -(-len(value) // num_ranks), f"{key} is not divided evenly"


def gradients(make: Any, run: Any, data: Tensor, how: Sharding, steps: int = 1) -> dict[str, Any]:
    module = make()
    parallelize(module, how, CPU, blocks_of(module))
    outputs = []
    for _ in range(steps):  # gradients add up
        out = run(module, my_part(data))
        out.mean().backward()
        outputs.append(out.detach())
    average_gradients_(module, how)
    return {"out": outputs[-1], "grads": {k: whole(p.grad) for k, p in module.named_parameters() if p.requires_grad}}


def run_odd(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_odd_parameters_have_the_gradients_of_the_whole_batch(num_ranks):
    x = torch.randn(GLOBAL_BATCH, 3)
    # y.mean() is over the rank's part, so the oracle is the mean of the parts' losses.
    oracle = make_odd()
    torch.stack([oracle(part).mean() for part in x.chunk(num_ranks)]).mean().backward()
    for found in run_on_ranks(gradients, num_ranks, make_odd, run_odd, x, SIMPLE):
        for key, parameter in oracle.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found["grads"][key], parameter.grad, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_backbone_has_the_outputs_and_gradients_of_the_whole_batch(num_ranks, mode):
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16)
    plain = small_backbone()
    for _ in range(2):
        loss = backbone_loss(plain, images)
        loss.backward()
    results = run_on_ranks(gradients, num_ranks, small_backbone, backbone_loss, images, sharding(mode), 2)
    torch.testing.assert_close(torch.stack([r["out"] for r in results]).mean(), loss.detach(), rtol=1e-6, atol=0)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(results[0]["grads"][key], parameter.grad, rtol=1e-4, atol=1e-7, msg=key)


# Precision


def dtypes_in_use(how: Sharding) -> dict[str, torch.dtype]:
    backbone = small_backbone()
    parallelize(backbone, how, CPU)
    used = {}
    for prefix, module in backbone.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            used[f"{prefix}.{name}"] = getattr(module, name).dtype
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    return used


def test_weights_are_used_in_param_dtype_but_for_those_that_need_float32():
    (used, _) = run_on_ranks(dtypes_in_use, 2, sharding("simple", param_dtype=torch.bfloat16))
    for name, dtype in used.items():
        kept = name.endswith(("freqs", "mask_token")) or ".norm." in name
        assert dtype == (torch.float32 if kept else torch.bfloat16), name


def autocast_gradients(how: Sharding | None, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    backbone = small_backbone()
    if how is not None:
        parallelize(backbone, how, CPU)
    with torch.autocast("cpu", dtype):
        loss = backbone_loss(backbone, my_part(images))
    (loss * 64).backward()
    if how is not None:
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in backbone.parameters())
    return {k: whole(p.grad) for k, p in backbone.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_one_rank_changes_no_bit(dtype):
    images = torch.randn(4, 3, 16, 16)
    (divided,) = run_on_ranks(autocast_gradients, 1, sharding("simple", param_dtype=dtype), images, dtype)
    plain = autocast_gradients(None, images, dtype)
    different = [key for key in plain if not torch.equal(plain[key], divided[key])]
    assert different == []


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_reduced_in_reduce_dtype(reduce_dtype):
    how = sharding("simple", param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    images = torch.randn(4, 3, 16, 16)
    divided, _ = run_on_ranks(autocast_gradients, 2, how, images, torch.bfloat16)
    plain = autocast_gradients(None, images, torch.bfloat16)
    for key in plain.keys() - {"loss"}:
        error = (divided[key] - plain[key]).norm() / plain[key].norm()
        assert error < 0.05, f"{key}: {error}"
    weight = divided["decoder.blocks.0.residual2.fn.fc1.weight"]
    low = torch.bfloat16 if reduce_dtype == torch.float32 else reduce_dtype
    representable = torch.equal(weight, weight.to(low).float())
    assert representable == (reduce_dtype != torch.float32), "not reduced in this precision"


# Training

TRAIN = [
    *TINY,
    "capi.num_clusters=18",
    "model.transformers_kwargs.drop_path_rate=0",
    "optim.total_iters=20",
    "data.prediction_subsampling=0.5",
]


def make_batches(num_steps: int) -> list[dict[str, Tensor]]:
    """Global batches, positions per image; every rank cuts out its part."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_steps):
        order = torch.stack([torch.randperm(16, generator=generator) for _ in range(GLOBAL_BATCH)])
        images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
        visible, predict = order[:, :6].sort(dim=1).values, order[:, 6:11].sort(dim=1).values
        batches.append({"images": images, "visible": visible, "predict": predict})
    return batches


def my_batch(batch: dict[str, Tensor]) -> Batch:
    part = {key: my_part(value) for key, value in batch.items()}
    ids = torch.arange(len(part["images"]))
    visible, predict = ((part[key] + 16 * ids.unsqueeze(1)).flatten() for key in ("visible", "predict"))
    return Batch(
        images=part["images"],
        visible_indices=visible,
        predict_indices=predict,
        host_predict_indices=predict,
        sample_ids=ids,
    )


class DividedState(TrainState):
    """`TrainState` with its modules divided by `parallelize` before the optimizers are made."""

    def __init__(self, cfg: CapiConfig, how: Sharding) -> None:
        super().__init__(cfg, CPU, compiled=False)
        self.how = how
        for module in self.modules.values():
            parallelize(module, how, CPU, blocks_of(module))
        self.student_optimizer = make_student_optimizer(self.student, cfg)
        self.clustering_optimizer = make_clustering_optimizer(self.clustering, cfg)
        step = self.clustering.step

        def gathered_step(*args: Any, **kwargs: Any) -> Any:
            with gathered(self.clustering):
                return step(*args, **kwargs)

        self.clustering.step = gathered_step  # pyright: ignore[reportAttributeAccessIssue]  # same signature

    def apply_gradients(self, hyper: Hyper) -> dict[str, Tensor]:
        for module in (self.student, self.clustering):
            average_gradients_(module, self.how)
        with unittest.mock.patch("train_capi.average_gradients_"):  # that was it
            return super().apply_gradients(hyper)


def train(how: Sharding | None, num_steps: int, *overrides: str) -> dict[str, Any]:
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*TRAIN, *overrides])
    state = TrainState(cfg, CPU, compiled=False) if how is None else DividedState(cfg, how)
    logs = []
    for step, batch in enumerate(make_batches(num_steps)):
        hyper = Hyper(lr=1e-3 * min(1, step / 4), weight_decay=0.1, momentum=0.9, clustering_lr=1e-3)
        scalars = train_step(state, [my_batch(batch)], hyper)
        state.step += 1
        logs.append({key: whole(scalars[key]).double() for key in ("capi_loss", "clustering_loss", "grad_norm")})
    weights = {f"{n}.{k}": whole(p) for n, m in state.modules.items() for k, p in m.named_parameters()}
    return {"logs": logs, "weights": weights}


@pytest.fixture(scope="module")
def trained_alone() -> dict[str, Any]:
    return train(None, 20)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (a, b) in enumerate(zip(found["logs"], expected["logs"], strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, step=step: f"step {step}: {text}")
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][key], weight, rtol=1e-3, atol=2e-5, msg=lambda t, k=key: f"{k}: {t}"
        )


@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_training_on_ranks_is_training_on_one_process_with_the_whole_batch(num_ranks, mode, trained_alone):
    for found in run_on_ranks(train, num_ranks, sharding(mode), 20):
        assert_same_training(found, trained_alone)
