"""The Triton kernels: in Triton's interpreter against golden numbers and plain torch, and compiled for GPUs."""

import contextlib
import importlib
import os
import subprocess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import PYTHON, ROOT, never_waiting
from golden import golden_head, golden_step, with_kernel
from ranks import run_on_ranks

from clustering import OnlineClustering
from speed.clustering import learn_in_chunks, use_triton
from utils import UserError

clustering_triton = pytest.importorskip("speed.clustering_triton")  # triton is not installed everywhere
TEMPERATURES = {"n_sk_iter": 3, "target_temp": 0.06, "pred_temp": 0.12}


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, which is tested")


@pytest.fixture(params=[True, False], ids=["held", "read twice"])
def tokens_are_held(request, monkeypatch):
    """With kernels that hold whole tokens, and with those for more prototypes than can be held."""
    if not request.param:
        monkeypatch.setattr(clustering_triton, "MOST_HELD", 0)
    return request.param


@interpreted
@pytest.mark.usefixtures("tokens_are_held")
@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("positionwise", [True, False])
def test_kernels_match_golden(positionwise, chunk):
    head, golden = golden_head(positionwise)
    step = golden_step(head, golden, "triton", chunk, with_usage=True)
    assert step.counts.sum() == golden["x"].shape[:2].numel()


def learnt(head: OnlineClustering, x: torch.Tensor, kernel: str, dtype: torch.dtype, chunk: int | None = None) -> Any:
    head.zero_grad()
    p, b, _ = x.shape
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        indices = torch.arange(b) * p + torch.arange(b) % p
        step = with_kernel(head, kernel, chunk).step(x, indices, loss_scale=8.0, with_usage=True)
    return step.targets, step.loss, step.mass, [parameter.grad for parameter in head.parameters()]


@interpreted
@pytest.mark.usefixtures("tokens_are_held")
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(
    ("images", "prototypes"), [(19, 300), (1, 2), (16, 256), (70, 6)]
)  # blocks and a bit, less, one
def test_kernels_match_plain_torch_at_any_size(dtype, bias, images, prototypes):
    torch.manual_seed(1)
    head = OnlineClustering(12, prototypes, bias=bias, **TEMPERATURES)
    x = torch.randn(3, images, 12)
    actual = learnt(head, x, "triton", dtype, chunk=2)
    expected = learnt(head, x, "torch", dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    else:  # which rounds the logits, as autocast does, then their gradients, and those over whole chunks
        torch.testing.assert_close(actual[:3], expected[:3], rtol=1e-3, atol=1e-5)
        for ours, plain in zip(actual[3], expected[3], strict=True):
            assert (ours - plain).norm() < 1e-2 * plain.norm()


def learnt_on_my_images(x: torch.Tensor, kernel: str) -> Any:
    torch.manual_seed(1)
    head = OnlineClustering(12, 40, bias=True, **TEMPERATURES)
    mine = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
    return learnt(head, mine, kernel, torch.float32, chunk=1)


@interpreted
def test_kernels_on_two_ranks_solve_one_problem():
    x = torch.randn(3, 10, 12)
    actual, expected = (run_on_ranks(learnt_on_my_images, 2, x, kernel) for kernel in ("triton", "torch"))
    for ours, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


COMPILE = """
import re
import sys
import warnings
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import speed.clustering_triton as kernels
from speed import adamw_triton

warnings.simplefilter("error")  # as in the tests that need a GPU
names = ("rows_at_once", "columns_at_once")
numbers = {"log_beta1": -0.1, "log_beta2": -0.05, "beta1": 0.9, "beta2": 0.95, "smallest": adamw_triton.SMALLEST}
numbers |= {"blocks_at_once": adamw_triton.BLOCKS, "columns": 256}
types = {"logits": "*bf16", "slots": "*i32", "largest": "*i32"}
types |= dict.fromkeys(("averages", "squares", "signed_table", "table"), "*u8")
types |= dict.fromkeys(("b", "k", "stride", "num_groups", "num_blocks", "size"), "i32")
types |= dict.fromkeys(("scale", "shift", "eps", "pred_scale", "lr", "weight_decay"), "fp32")
types |= dict.fromkeys((*names, *numbers), "constexpr")
few, held = (kernels.ROWS, kernels.COLUMNS), kernels.held_shape(512, 16384)
few, held = ({**numbers, **dict(zip(names, shape))} for shape in (few, held))
for kernel, sizes, num_warps in (
    (kernels.column_kernel, few, 4),
    (kernels.round_kernel, few, 4),
    (kernels.learn_kernel, few, 8),
    (kernels.largest_kernel, few, 4),
    (kernels.held_round_kernel, held, kernels.warps(kernels.held_shape(512, 16384), kernels.ROUND_VALUES)),
    (kernels.held_learn_kernel, held, kernels.warps(kernels.held_shape(512, 16384), kernels.LEARN_VALUES)),
    (adamw_triton.update_kernel, few, 4),
):
    constants = {(i,): sizes[name] for i, name in enumerate(kernel.arg_names) if name in sizes}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    divided = [name in ("stride", "size") or signature[name][0] == "*" for name in kernel.arg_names]
    divided_by_16 = [(i,) for i, is_divided in enumerate(divided) if is_divided]
    known = dict.fromkeys(divided_by_16, [["tt.divisibility", 16]])
    source = ASTSource(kernel, signature, constants, known)
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **kernels.OPTIONS})
        assert compiled.asm["cubin"][:4] == b"\\x7fELF"
        is_wide = re.search(r"ld\\.global\\.v4\\.b32|cp\\.async\\.cg\\.shared", compiled.asm["ptx"]) is not None
        print(kernel.__name__, capability, compiled.metadata.shared, is_wide)
"""


@pytest.mark.long
def test_kernels_compile_to_machine_code_of_gpus(tmp_path):
    """The interpreter takes what the compiler refuses. No GPU is needed for compiling."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", COMPILE, "90"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7
    assert all(int(shared) < 48 * 1024 for _, _, shared, _ in lines), "more shared memory than a program gets unasked"
    assert all(is_wide == "True" for *_, is_wide in lines), "logits are not read 16 bytes at a time for every k"


@pytest.mark.gpu
@pytest.mark.usefixtures("tokens_are_held")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_plain_torch_on_a_gpu_without_waiting_for_it(dtype):
    torch.manual_seed(1)
    head = OnlineClustering(64, 1000, bias=True, **TEMPERATURES).cuda()
    x = torch.randn(9, 100, 64, device="cuda")
    indices = torch.arange(100) * 9 + torch.arange(100) % 9
    results = []
    for kernel in ("torch", "triton", "triton"):
        head.zero_grad()
        learn_in_chunks(head, kernel=kernel, device=x.device, chunk=4)
        compiles = len(results) < 2
        with (
            torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
            contextlib.nullcontext() if compiles else never_waiting(),
        ):
            step = head.step(x, indices)
        results.append((step.targets, step.loss, [parameter.grad for parameter in head.parameters()]))
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    for ours, plain in zip(results[1][2], results[0][2], strict=True):
        assert (ours - plain).norm() < tolerance * plain.norm()
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=tolerance, atol=1e-5)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton("auto", torch.device("cpu"))
    assert use_triton("auto", torch.device("cuda"))
    with pytest.raises(UserError, match=r"capi\.clustering_kernel=triton: it needs a GPU, not cpu; use auto or torch"):
        use_triton("triton", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not use_triton("auto", torch.device("cuda"))
    with pytest.raises(UserError, match="the package triton is not installed"):
        use_triton("triton", torch.device("cuda"))
