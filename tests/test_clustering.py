"""clustering.py against the golden numbers, an independent oracle, and itself in chunks."""

import copy
import math
from collections import deque

import pytest
import torch
import torch.distributed as dist
from conftest import seeded
from golden import CLUSTERING, golden_head, golden_step, with_kernel
from ranks import run_on_ranks
from torch import Tensor

import speed.clustering
from clustering import (
    FeatureQueue,
    L2NormLinear,
    MlpHead,
    OnlineClustering,
    TargetStep,
    entropy,
    sinkhorn_knopp,
    soft_cross_entropy,
)


@pytest.mark.parametrize("n_iterations", [1, 3, 10])
def test_sinkhorn_matches_golden(n_iterations):
    actual = sinkhorn_knopp(CLUSTERING["sinkhorn.in"], n_iterations)
    torch.testing.assert_close(actual, CLUSTERING[f"sinkhorn.out_{n_iterations}"], atol=1e-6, rtol=1e-5)


def log_domain_oracle(logits: Tensor, n_iterations: int) -> Tensor:
    """Without eps and without a shift: what the algorithm means."""
    log = logits.double()
    for _ in range(n_iterations):
        log = log - log.logsumexp(dim=-2, keepdim=True)
        log = log - log.logsumexp(dim=-1, keepdim=True)
    return log.exp()


def float64_oracle(logits: Tensor, n_iterations: int) -> Tensor:
    """With the published shift and eps, sample by sample: what they do where a row or column all but vanishes."""
    m = logits.double()
    m = (m - m.max(dim=-2, keepdim=True).values + 50).exp()
    for _ in range(n_iterations):
        for k in range(m.shape[-1]):
            m[..., k] = m[..., k] / (m[..., k].sum(-1, keepdim=True) + 1e-8)
        for b in range(m.shape[-2]):
            m[..., b, :] = m[..., b, :] / (m[..., b, :].sum(-1, keepdim=True) + 1e-8)
    return m


@pytest.mark.parametrize(("oracle", "scale"), [(log_domain_oracle, 1.0), (float64_oracle, 1.0), (float64_oracle, 17.0)])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (3, 5, 20, 8)])  # more samples than prototypes, fewer, batched
def test_sinkhorn_matches_an_oracle(oracle, scale, shape):
    logits = scale * torch.randn(
        shape, generator=seeded(0)
    )  # 1 / target_temp = 17: std of the logits at initialisation
    before = logits.clone()
    torch.testing.assert_close(sinkhorn_knopp(logits, 3).double(), oracle(logits, 3), rtol=1e-3, atol=1e-6)
    assert torch.equal(logits, before), "the input was modified in place"


def test_sinkhorn_rows_sum_to_one_and_columns_balance():
    assignments = sinkhorn_knopp(torch.randn(40, 10, generator=seeded(0)), 50)
    torch.testing.assert_close(assignments.sum(-1), torch.ones(40))
    torch.testing.assert_close(assignments.sum(-2), torch.full((10,), 4.0), rtol=1e-3, atol=0)


def test_changing_one_position_leaves_the_other_positions_targets_alone():
    head = OnlineClustering(8, 6, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    x = torch.randn(5, 7, 8, generator=seeded(0))
    changed = x.clone()
    changed[2] = torch.randn(7, 8, generator=seeded(1))
    a, b = head(x)[0], head(changed)[0]
    same = [bool(torch.equal(a[i], b[i])) for i in range(5)]
    assert same == [True, True, False, True, True]


@pytest.mark.parametrize("positionwise", [True, False])
def test_earlier_images_share_the_balance_and_nothing_else(positionwise):
    """Against the definition: one balance over all images, of which the earlier ones have neither target nor loss."""
    head = OnlineClustering(8, 6, bias=True, n_sk_iter=3, target_temp=0.5, pred_temp=0.12, positionwise_sk=positionwise)
    x, earlier = torch.randn(5, 4, 8, generator=seeded(0)), torch.randn(5, 12, 8, generator=seeded(1))
    earlier = torch.nn.functional.normalize(earlier, dim=-1)
    step = head.step(x, torch.tensor([0, 7, 19]), with_usage=True, earlier=earlier)
    weight = head.layer.weight.detach().double().requires_grad_()
    logits = torch.nn.functional.normalize(x.double(), dim=-1) @ weight.T + head.layer.bias.double()
    with torch.no_grad():
        together = torch.cat([logits, earlier.double() @ weight.T + head.layer.bias.double()], dim=1) / 0.5
        shape = together.shape
        oracle = log_domain_oracle(together if positionwise else together.flatten(0, 1), 3).view(shape)[:, :4]
    loss = -(oracle * (logits / 0.12).log_softmax(-1)).sum(-1).mean()
    loss.backward()
    tokens = oracle.transpose(0, 1).flatten(0, 1)  # image-major
    torch.testing.assert_close(step.targets.double(), tokens[[0, 7, 19]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step.loss.double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(head.layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step.mass.double(), tokens.sum(0), rtol=1e-4, atol=1e-6)
    assert step.counts.sum() == 20


def test_a_batch_seen_before_balances_as_it_does_alone():
    head, golden = golden_head(True)
    before = torch.nn.functional.normalize(golden["x"], dim=-1)
    assignments, loss = head(golden["x"], torch.cat([before, before], dim=1))
    torch.testing.assert_close(assignments, golden["assignments"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, golden["loss"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_queue_holds_the_batches_before_and_forgets_older_ones(length):
    queue, seen = FeatureQueue(torch.zeros(length, 2, 5, 4)), deque(maxlen=length)
    for step in range(8):
        earlier = queue.earlier(step)
        if seen:
            images = {tuple(image.flatten().tolist()) for image in earlier.transpose(0, 1)}
            assert images == {tuple(image.flatten().tolist()) for batch in seen for image in batch}, f"step {step}"
        else:
            assert earlier is None
        features = torch.randn(2, 5, 4, generator=seeded(step))
        queue.put_(features, step)
        seen.append(torch.nn.functional.normalize(features, dim=-1, eps=1e-7))


def test_sinkhorn_needs_an_iteration():
    with pytest.raises(AssertionError, match="n_sk_iter=0"):
        sinkhorn_knopp(torch.zeros(2, 2), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_in_half_precision_is_that_of_float32(dtype):
    logits = (17 * torch.randn(4, 32, 16, generator=seeded(0))).to(dtype)
    assignments = sinkhorn_knopp(logits, 3)
    assert assignments.dtype == dtype
    torch.testing.assert_close(assignments.float(), sinkhorn_knopp(logits.float(), 3), atol=5e-3, rtol=0)


@pytest.mark.parametrize("positionwise", [True, False])
def test_clustering_head_matches_golden(positionwise):
    head, golden = golden_head(positionwise)
    assignments, loss = head(golden["x"])
    loss.backward()
    torch.testing.assert_close(assignments, golden["assignments"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.detach(), golden["loss"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(head.layer.weight.grad, golden["grad_weight"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.layer.bias.grad, golden["grad_bias"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 9, None])
@pytest.mark.parametrize("block_bytes", [300, 2000, 2**22])  # 3 tokens of a position, 2 positions, all
def test_chunks_and_blocks_change_nothing(positionwise, chunk, block_bytes, monkeypatch):
    monkeypatch.setattr(speed.clustering, "BLOCK_BYTES", block_bytes)
    assert_golden_with_usage(positionwise, "torch", chunk)


def test_a_dot_product_of_more_elements_than_torch_counts_is_a_sum_of_several(monkeypatch):
    monkeypatch.setattr(speed.clustering, "LARGEST_DOT", 7)
    assert_golden_with_usage(True, "torch")


@pytest.mark.parametrize("positionwise", [True, False])
def test_the_plain_step_is_golden(positionwise):
    assert_golden_with_usage(positionwise, "plain")


def assert_golden_with_usage(positionwise: bool, kernel: str, chunk: int | None = None) -> None:
    head, golden = golden_head(positionwise)
    step = golden_step(head, golden, kernel, chunk, with_usage=True)
    assert step.counts is not None
    first, second = golden["assignments"].topk(2).values.unbind(-1)
    counts = golden["assignments"].argmax(-1).flatten().bincount(minlength=step.targets.shape[1])
    num_ties = int((first - second < 1e-6).sum())
    assert step.counts.sum() == counts.sum()
    assert (step.counts - counts).abs().sum() <= 2 * num_ties, "a token that is no tie changed its mind"


def golden_step_on_ranks(positionwise: bool, chunk: int) -> None:
    golden_step(*golden_head(positionwise), "torch", chunk, with_usage=True)


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 9])  # chunks without a partner at the end, all together
def test_two_chunks_side_by_side_are_chunks_one_by_one(positionwise, chunk):
    """With a process group, of one rank here, whole chunks are balanced, and two are on their way at a time."""
    run_on_ranks(golden_step_on_ranks, 1, positionwise, chunk)


def my_images_step(x: Tensor, kernel: str, positionwise: bool) -> tuple[TargetStep, list[Tensor | None]]:
    torch.manual_seed(1)
    head = OnlineClustering(
        12, 40, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12, positionwise_sk=positionwise
    )
    mine = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
    step = with_kernel(head, kernel, chunk=1).step(mine, torch.arange(0, 15, 4), with_usage=True)
    return step, [parameter.grad for parameter in head.parameters()]


@pytest.mark.parametrize("positionwise", [True, False])
def test_plain_and_chunks_agree_on_two_ranks(positionwise):
    x = torch.randn(3, 10, 12)
    plain, chunks = (run_on_ranks(my_images_step, 2, x, kernel, positionwise) for kernel in ("plain", "torch"))
    torch.testing.assert_close(chunks, plain, rtol=1e-4, atol=1e-6)


def test_chunks_hold_no_more_logits_than_they_say():
    """The largest tensor the step makes is one chunk's logits, not all positions' logits."""
    head = OnlineClustering(8, 64, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        with_kernel(head, "torch", chunk=2).step(torch.randn(16, 32, 8), torch.arange(0, 16 * 32, 50))
    assert largest == 2 * 32 * 64


@pytest.mark.parametrize("kernel", ["plain", "torch"])
def test_loss_scale_scales_the_gradient_alone(kernel):
    grads, losses = [], []
    for scale in (1.0, 1024.0):
        head, golden = golden_head(True)
        losses.append(with_kernel(head, kernel).step(golden["x"], torch.tensor([0]), loss_scale=scale).loss)
        grads.append(head.layer.weight.grad)
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(grads[1] / 1024, grads[0])


def test_the_loss_scale_keeps_gradients_of_float16_weights_from_vanishing():
    head = OnlineClustering(8, 16, bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=1e7)  # tiny gradients
    half = copy.deepcopy(head).half()
    for each in (head, half):
        with_kernel(each, "torch").step(torch.randn(3, 5, 8, generator=seeded(0)), torch.tensor([0]), loss_scale=1e7)
    exact, rounded = head.layer.weight.grad, half.layer.weight.grad
    assert rounded.dtype == torch.float16
    assert (rounded.float() - exact).norm() < 5e-2 * exact.norm()


@pytest.mark.parametrize("kernel", ["plain", "torch"])
def test_a_copy_of_a_head_learns_with_its_own_weights(kernel):
    head, golden = golden_head(True)
    copied = copy.deepcopy(with_kernel(head, kernel))
    copied.step(golden["x"], torch.tensor([0]))
    assert head.layer.weight.grad is None
    torch.testing.assert_close(copied.layer.weight.grad, golden["grad_weight"], atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_features():
    head, golden = golden_head(True)
    x = golden["x"].clone().requires_grad_()
    head(x)[1].backward()
    assert x.grad is None


def test_student_head_matches_golden():
    k, d = CLUSTERING["student_head.weight_v"].shape
    head = L2NormLinear(d, k)
    head.load_state_dict({f"last_layer.{n}": CLUSTERING[f"student_head.{n}"] for n in ("weight_g", "weight_v")})
    x = CLUSTERING["student_head.x"].clone().requires_grad_()
    out = head(x)
    loss = soft_cross_entropy(CLUSTERING["student_head.target"], out, 0.12).mean()
    loss.backward()
    torch.testing.assert_close(out.detach(), CLUSTERING["student_head.out"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss.detach(), CLUSTERING["student_head.loss_temp_0.12"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, CLUSTERING["student_head.grad_x"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.last_layer.weight_g.grad, CLUSTERING["student_head.grad_g"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.last_layer.weight_v.grad, CLUSTERING["student_head.grad_v"], atol=1e-6, rtol=1e-4)


def test_the_mlp_head_is_a_gelu_mlp_and_cosines_in_its_bottleneck():
    head, x = MlpHead(16, 8), torch.randn(4, 16, generator=seeded(0))
    assert {key.partition(".")[0] for key in head.state_dict()} == {"mlp", "last_layer"}
    assert [tuple(layer.weight.shape) for layer in head.mlp] == [(2048, 16), (2048, 2048), (256, 2048)]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)) * 0.1)
    weights = {key: value.double() for key, value in head.state_dict().items()}
    hidden = x.double()
    for i in range(3):
        hidden = hidden @ weights[f"mlp.{i}.weight"].T + weights[f"mlp.{i}.bias"]
        if i < 2:
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    rows = weights["last_layer.weight_v"]
    cosines = torch.nn.functional.cosine_similarity(hidden[:, None], rows[None], dim=-1)
    torch.testing.assert_close(head(x).double(), cosines * weights["last_layer.weight_g"].T, rtol=1e-4, atol=1e-5)


def test_student_head_works_in_bfloat16():
    head = L2NormLinear(16, 8)
    x = torch.randn(4, 16, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x.bfloat16())
    torch.testing.assert_close(out.float(), head(x), atol=2e-2, rtol=0)


def test_entropy_is_zero_for_certainty_and_log_k_for_ignorance():
    rows = torch.stack([torch.eye(8)[0], torch.full((8,), 1 / 8)])
    torch.testing.assert_close(entropy(rows), torch.tensor([0.0, math.log(8)]))
