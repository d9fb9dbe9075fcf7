"""fsdp.py on several ranks: dividing a model changes where numbers are, not which."""

import dataclasses
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import TINY
from golden import with_kernel
from ranks import run_on_ranks
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import run_and_get_code
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import Checkpoints
from clustering import OnlineClustering
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import Batch
from fsdp import Bucket, Sharding, average_gradients_, overlap_collectives, overlap_options, parallelize
from model import Block, EncoderDecoder
from optim import ema_update_
from speed.recomputing import recompute_blocks
from train_capi import CapiConfig, CapiState, Hyper, train_step

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
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.offset: Tensor
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


def small_backbone(seed: int = 0, depth: int = 2) -> EncoderDecoder:
    torch.manual_seed(seed)
    block = {"drop_path_type": "efficient", "attn_kwargs": {"num_heads": 2}}
    return EncoderDecoder(
        patch_size=4,
        n_registers=4,
        transformers_kwargs={"embed_dim": 24, "drop_path_rate": 0.0, "block_kwargs": block},
        encoder_kwargs={"depth": depth},
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
        for parameter in module.parameters():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                own = parameter.grad
                assert isinstance(own, DTensor) and own.placements == parameter.placements
                assert own.to_local().stride() == parameter.to_local().stride(), "torch 2.11 would copy on some ranks"
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
    plain, loss = small_backbone(), torch.zeros(())
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
NUM_STEPS = 10
"""Of the training that all others have to equal: twice the warm-up and more."""


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
        masks={"visible_indices": visible, "predict_indices": predict},
        sample_ids=ids,
    ).to("cpu")


def divided_state(cfg: CapiConfig, how: Sharding) -> CapiState:
    """A `CapiState` whose weights are divided like this."""
    efficiency = dataclasses.replace(
        cfg.efficiency,
        fsdp=how.mode,
        fsdp_bucket_mib=how.bucket_mib,
        fsdp_prefetch=how.prefetch,
        param_dtype=str(how.param_dtype).removeprefix("torch."),
        reduce_dtype=str(how.reduce_dtype).removeprefix("torch."),
    )
    return CapiState(dataclasses.replace(cfg, efficiency=efficiency), CPU)


def run_steps(state: CapiState, num_steps: int) -> dict[str, Any]:
    logs = []
    for step, batch in list(enumerate(make_batches(state.step + num_steps)))[state.step :]:
        hyper = Hyper(lr=1e-3 * min(1, step / 4), momentum=0.9, clustering_lr=1e-3)
        scalars = train_step(state, [my_batch(batch)], hyper)
        state.step += 1
        logs.append({key: whole(scalars[key]).double() for key in ("capi_loss", "clustering_loss", "grad_norm")})
    weights = {f"{n}.{k}": whole(p) for n, m in state.modules.items() for k, p in m.named_parameters()}
    return {"logs": logs, "weights": weights}


def train(how: Sharding | None, num_steps: int, *overrides: str) -> dict[str, Any]:
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*TRAIN, *overrides])
    return run_steps(CapiState(cfg, CPU) if how is None else divided_state(cfg, how), num_steps)


@pytest.fixture(scope="module")
def trained_alone() -> dict[str, Any]:
    return train(None, NUM_STEPS)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (a, b) in enumerate(zip(found["logs"], expected["logs"], strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, step=step: f"step {step}: {text}")
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][key], weight, rtol=1e-5, atol=1e-5, msg=lambda t, k=key: f"{k}: {t}"
        )


@pytest.mark.parametrize(
    ("num_ranks", "mode"),
    [
        *((n, "simple") for n in (1, 2, 3)),
        pytest.param(4, "simple", marks=pytest.mark.long),
        (2, "fully_shard"),
        pytest.param(3, "fully_shard", marks=pytest.mark.long),
        (2, "none"),
        (3, "none"),
    ],
)
def test_training_on_ranks_is_training_on_one_process_with_the_whole_batch(num_ranks, mode, trained_alone):
    for found in run_on_ranks(train, num_ranks, sharding(mode, bucket_mib=0.01), NUM_STEPS):
        assert_same_training(found, trained_alone)


def test_clipping_uses_the_norm_over_all_ranks():
    expected = train(None, 2, "optim.clip_grad=1")
    assert min(log["grad_norm"] for log in expected["logs"]) > 2, "nothing was clipped"
    assert_same_training(run_on_ranks(train, 2, SIMPLE, 2, "optim.clip_grad=1")[0], expected)


def overflow_on_the_last_rank() -> tuple[bool, float]:
    backbone = small_backbone()
    parallelize(backbone, SIMPLE, CPU)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (scaler.scale(backbone_loss(backbone, torch.randn(2, 3, 16, 16)))).backward()
    before = [whole(p) for p in backbone.parameters()]
    if dist.get_rank() == dist.get_world_size() - 1:
        grad = dict(backbone.named_parameters())["encoder.blocks.0.residual2.fn.fc1.weight"].grad
        assert isinstance(grad, DTensor)
        grad.to_local().fill_(torch.inf)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(whole(p), b) for p, b in zip(backbone.parameters(), before, strict=True))
    return same, scaler.get_scale()


def test_an_overflow_on_one_rank_skips_the_update_on_all():
    assert run_on_ranks(overflow_on_the_last_rank, 3) == [(True, 2.0)] * 3


def communication_of_updates() -> int:
    state = divided_state(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, TRAIN), SIMPLE)
    for module in (state.student, state.clustering):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    with CommDebugMode() as communication:
        state.student_optimizer.step()
        state.clustering_optimizer.step()
        ema_update_(state.student_ema, state.student, 0.9)
    return communication.get_total_counts()


def test_optimizers_and_average_work_on_the_own_part_without_communication():
    assert run_on_ranks(communication_of_updates, 2) == [0, 0]


def from_rank_0(mode: str) -> dict[str, Tensor]:
    if dist.get_rank() == 0:
        backbone = small_backbone()
    else:
        with torch.device("meta"):
            backbone = small_backbone()
    parallelize(backbone, sharding(mode), CPU, blocks_of(backbone))
    return {k: whole(v) for k, v in backbone.state_dict().items()}


@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
def test_only_rank_0_needs_weights(mode):
    expected = dict(small_backbone().state_dict())
    for found in run_on_ranks(from_rank_0, 3, mode):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# When weights are gathered


class CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional":
            self.counts[func._schema.name.removeprefix("_c10d_functional::")] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(recomputed: bool | None) -> tuple[Counter[str], Counter[str]]:
    backbone = small_backbone()
    parallelize(backbone, SIMPLE, CPU)
    if recomputed is not None:
        recompute_all_but_matmuls(backbone, recomputed)
    with CountCollectives() as forward:
        loss = backbone_loss(backbone, torch.randn(2, 3, 16, 16))
    with CountCollectives() as backward:
        loss.backward()
    return forward.counts, backward.counts


def test_the_policy_decides_whether_blocks_gather_again_in_the_backward_pass():
    (plain,), (kept,), (again,) = (run_on_ranks(count_collectives, 1, value) for value in (None, False, True))
    assert plain == kept
    assert plain[0] == again[0], "the forward pass gathers as before"
    assert plain[1]["all_gather_into_tensor"] == 0
    in_blocks = sum(len(list(block.parameters())) for block in blocks_of(small_backbone()))
    # rope.freqs is read twice in the predictor's block, where queries and keys have coordinates of their own
    assert again[1]["all_gather_into_tensor"] == in_blocks + 1
    assert again[1]["reduce_scatter_tensor"] == plain[1]["reduce_scatter_tensor"] == plain[0]["all_gather_into_tensor"]


HEAD = {"in_dim": 6, "out_dim": 10, "bias": True, "n_sk_iter": 3, "target_temp": 0.1, "pred_temp": 0.2}
HEAD_FEATURES = torch.arange(7 * 8 * 6.0).view(7, 8, 6).cos()


def make_head() -> OnlineClustering:
    torch.manual_seed(0)
    return OnlineClustering(**HEAD)


def clustering_step(how: Sharding, kernel: str) -> dict[str, Any]:
    head = with_kernel(make_head(), kernel, chunk=2)
    parallelize(head, how, CPU)
    mine = HEAD_FEATURES.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
    with CountCollectives() as counter:
        step = head.step(mine, torch.arange(mine.shape[1]) * 7 + 3)
    average_gradients_(head, how)
    return {
        "counts": counter.counts,
        "grads": {k: whole(p.grad) for k, p in head.named_parameters()},
        "targets": step.targets,
        "loss": step.loss,
    }


@pytest.mark.parametrize("kernel", ["torch", "plain"])
@pytest.mark.parametrize("mode", ["simple", "fully_shard", "none"])
def test_the_clustering_head_learns_as_on_one_process_and_gathers_once(mode, kernel):
    head, how = make_head(), sharding(mode)
    everything = head.step(HEAD_FEATURES, torch.arange(8) * 7 + 3)
    found = run_on_ranks(clustering_step, 2, how, kernel)
    torch.testing.assert_close(torch.cat([each["targets"] for each in found]), everything.targets)
    torch.testing.assert_close(sum(each["loss"] for each in found) / 2, everything.loss)
    for each in found:
        for key, p in head.named_parameters():
            torch.testing.assert_close(each["grads"][key], p.grad, msg=key)
        if how.mode == "simple":
            assert each["counts"]["all_gather_into_tensor"] == each["counts"]["reduce_scatter_tensor"] == 2


# Checkpoints


def train_from(how: Sharding, folder: Path, resumes: bool, num_steps: int) -> dict[str, Any]:
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, TRAIN)
    state = divided_state(cfg, how)
    checkpoints = Checkpoints(folder, keep=2)
    if resumes:
        saved = checkpoints.restore_latest(modules=state.modules, optimizers=state.optimizers)
        assert saved is not None
        state.step = saved.step
    logs = run_steps(state, num_steps)
    checkpoints.save(
        state.step,
        modules=state.modules,
        optimizers=state.optimizers,
        extra={},
        rank_extra={},
        config_yaml="",
    )
    return logs


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ((2, "simple"), (1, "simple")),
        ((2, "simple"), (3, "fully_shard")),
        pytest.param((3, "fully_shard"), (4, "simple"), marks=pytest.mark.long),
        ((2, "none"), (2, "simple")),
    ],
)
def test_a_checkpoint_continues_on_other_ranks_and_in_another_mode(saved_by, loaded_by, trained_alone, tmp_path):
    run_on_ranks(train_from, saved_by[0], sharding(saved_by[1]), tmp_path, False, 3)
    for found in run_on_ranks(train_from, loaded_by[0], sharding(loaded_by[1]), tmp_path, True, 3):
        expected = trained_alone["logs"][3:6]
        for a, b in zip(found["logs"], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Compiled


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler"
)


def recompute_all_but_matmuls(backbone: nn.Module, gathers_again: bool) -> None:
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.rematerialization
    names = [f"_c10d_functional::{name}" for name in ("all_gather_into_tensor", "wait_tensor")]
    recompute_blocks(
        blocks_of(backbone),
        dataclasses.replace(cfg, enabled=True, policy=dict(cfg.policy) | dict.fromkeys(names, gathers_again)),
    )


def ordered_gradients(settings: list[tuple[float, int]], gathers_again: bool, images: Tensor) -> list[Any]:
    """Gradients by graphs that `overlap_collectives` has ordered, run operator by operator; and the buckets."""
    results = []
    for setting in settings:
        backbone = small_backbone(depth=1)
        parallelize(backbone, sharding("simple", param_dtype=torch.bfloat16), CPU)
        recompute_all_but_matmuls(backbone, gathers_again)
        plans: list[list[Bucket]] = []

        def order(graph: torch.fx.GraphModule, _: Any, how: Any = setting, plans: Any = plans) -> Any:
            plans.append(overlap_collectives(graph.graph, *how))
            graph.recompile()
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=order, bw_compiler=order, partition_fn=min_cut_rematerialization_partition)
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.compile(backbone_loss, backend=backend, dynamic=False)(backbone, my_part(images))
        loss.backward()
        results.append(({k: whole(p.grad) for k, p in backbone.named_parameters()} | {"loss": loss.detach()}, plans))
    return results


@pytest.mark.parametrize(
    ("bucket_mib", "prefetch", "gathers_again"),
    [
        pytest.param(0.004, 1, True, marks=pytest.mark.long),
        pytest.param(0.008, 2, False, marks=pytest.mark.slow),
    ],
)
def test_ordered_graphs_compute_the_same_bits(bucket_mib, prefetch, gathers_again):
    settings = [(0.0, 0), (bucket_mib, prefetch)]
    (apart, ordered), _ = run_on_ranks(ordered_gradients, 2, settings, gathers_again, torch.randn(6, 3, 16, 16))
    num_weights = len(list(small_backbone(depth=1).parameters()))
    forward, backward = apart[1]
    assert len(forward) == num_weights, "buckets of 0 MiB hold one weight each, which is gathered once"
    assert sum(bucket.kind == "reduce_scatter" for bucket in backward) >= num_weights
    assert any(bucket.kind == "all_gather" for bucket in backward) == gathers_again
    assert [key for key in apart[0] if not torch.equal(apart[0][key], ordered[0][key])] == []
    assert len(ordered[1][0]) < num_weights / 2
    assert sum(bucket.num_tensors for bucket in ordered[1][0]) == num_weights, "gathered twice, or not at all"
    for bucket in (b for plan in ordered[1] for b in plan):
        assert bucket.num_bytes <= bucket_mib * 2**20 or bucket.num_tensors == 1


EVENTS = {
    "all_gather": r"= torch\.ops\._c10d_functional\.all_gather_into_tensor\.default\(",
    "reduce_scatter": r"= torch\.ops\._c10d_functional\.reduce_scatter_tensor\.default\(",
    "wait": r"torch\.ops\._c10d_functional\.wait_tensor\.default\(",
    "matmul": r"extern_kernels\.(?:mm|bmm|addmm|convolution)\(|_scaled_dot_product\w+\.default\(",
}


def events(code: str) -> list[tuple[str, str]]:
    """Collectives, waits and matmuls in the order in which generated code runs them, with the buffer they concern."""
    found = []
    for line in code[code.index("def call(") :].splitlines():
        for kind, pattern in EVENTS.items():
            if "assert_" not in line and re.search(pattern, line):
                buffer = re.search(r"default\((\w+)\)" if kind == "wait" else r"(\w+) =", line)
                found.append((kind, buffer.group(1) if buffer else ""))
    return found


class Layers(nn.Module):
    """Blocks with little to compile. The sizes leave ranks with parts of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(17) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(17, 17) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x)).sin()
        return x.square().sum(dim=1)


def make_layers() -> Layers:
    torch.manual_seed(0)
    return Layers()


def compiled_layers(x: Tensor) -> dict[str, Any]:
    layers = make_layers()
    how = sharding("simple", bucket_mib=1400 / 2**20, prefetch=1)  # one norm, weight and bias
    parallelize(layers, how, CPU)

    def step() -> Tensor:
        with torch.no_grad():
            compiled(layers, my_part(x))
        loss = compiled(layers, my_part(x)).mean()
        loss.backward()
        return loss

    compiled = torch.compile(lambda module, x: module(x), dynamic=False, options=overlap_options(how))
    loss, code = run_and_get_code(step)
    return {
        "loss": loss.detach(),
        "grads": {k: whole(p.grad) for k, p in layers.named_parameters()},
        "events": [events(part) for part in code],
    }


@pytest.fixture(scope="module")
def compiled_on_two_ranks() -> tuple[Tensor, list[dict[str, Any]]]:
    x = torch.randn(6, 17)
    return x, run_on_ranks(compiled_layers, 2, x, timeout_s=170)


@needs_compiler
def test_compiled_code_gives_the_gradients_of_the_whole_batch(compiled_on_two_ranks):
    x, results = compiled_on_two_ranks
    plain = make_layers()
    plain(x).mean().backward()
    for found in results:
        for key, parameter in plain.named_parameters():
            torch.testing.assert_close(found["grads"][key], parameter.grad, rtol=1e-5, atol=1e-6, msg=key)


@needs_compiler
def test_generated_code_gathers_ahead_and_waits_late(compiled_on_two_ranks):
    _, results = compiled_on_two_ranks
    assert [[kind for kind, _ in part] for part in results[0]["events"]] == [
        [kind for kind, _ in part] for part in results[1]["events"]
    ], "ranks would wait for each other in different orders"
    for found in results:
        inference, forward, backward = found["events"]
        for code, kind in ((inference, "all_gather"), (forward, "all_gather"), (backward, "reduce_scatter")):
            started = [i for i, (k, _) in enumerate(code) if k == kind]
            waited = [code.index(("wait", code[i][1]), i) for i in started]
            assert len(started) == 3, f"{len(started)} buckets for three layers"
            assert waited == sorted(waited)
            between = [sum(k == "matmul" for k, _ in code[i:j]) for i, j in zip(started, waited, strict=True)]
            hidden = between[1:] if kind == "all_gather" else between[:-1]
            assert min(hidden) >= 1, f"{kind}: nothing to hide behind in {between}"
            flying = [sum(a <= i < b for a, b in zip(started, waited, strict=True)) for i in range(len(code))]
            assert max(flying) == (2 if kind == "all_gather" else 1), f"{kind}: {max(flying)} on their way at once"


def compiled_training(num_steps: int) -> dict[str, Any]:
    how = sharding("simple", bucket_mib=0.01)
    state = divided_state(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, TRAIN), how)
    recompute_all_but_matmuls(state.student, gathers_again=True)
    # fullgraph: what cannot be compiled would otherwise run eagerly, and agree for that reason.
    options: Any = {"dynamic": False, "fullgraph": True, "options": overlap_options(how)}
    state.do_teacher = torch.compile(state.do_teacher, **options)
    state.do_student = torch.compile(state.do_student, **options)
    return run_steps(state, num_steps)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_compiled_training_on_ranks_is_training_on_one_process_with_the_whole_batch(num_ranks, trained_alone):
    for found in run_on_ranks(compiled_training, num_ranks, NUM_STEPS, timeout_s=590):
        assert_same_training(found, trained_alone)


def compiled_fully_sharded_training(num_steps: int) -> dict[str, Any]:
    on = ["efficiency.compilation.do_teacher.disable=false", "efficiency.compilation.do_student.disable=false"]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*TRAIN, "efficiency.fsdp=fully_shard", *on])
    state = CapiState(cfg, CPU)
    compiled = [m for m in state.student["backbone"].modules() if m._compiled_call_impl is not None]
    assert len(compiled) == cfg.model.encoder_kwargs.depth + cfg.model.decoder_kwargs.depth
    return run_steps(state, num_steps)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_compiled_fully_sharded_training_is_that_of_one_process_too(num_ranks, trained_alone):
    for found in run_on_ranks(compiled_fully_sharded_training, num_ranks, NUM_STEPS, timeout_s=590):
        assert_same_training(found, trained_alone)
