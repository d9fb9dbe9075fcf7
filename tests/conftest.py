"""What several test files share: golden files, seeded generators, and running a command as a user types it."""

import contextlib
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Some virtual machines advertise AMX and then refuse its instructions: bfloat16 matmuls end in SIGILL there.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Tensors in tests are tiny: threads that wait for each other cost more than they gain, here and in processes of ours.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which it asks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from forked_python import make_stand_in
from safetensors import safe_open
from samples import encode, photo

needs_fp8_on_a_cpu = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
    reason="this torch multiplies no 8-bit floats on a CPU",
)
ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
"""A process of its own, imports and all; `sys.executable` is forked off a server while tests run."""
GOLDEN = ROOT / "tests" / "golden"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a golden .safetensors file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        return tensors, json.loads(file.metadata()["meta"])


def load_golden_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Every file of this process ends at `size` bytes, as on a disk that is full by then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """What waits for the GPU in the block is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not detect everything yet
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


# What a shell starts in the background, or `nohup` starts, ignores these, and so would all that tests start and signal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def run_cli(
    *args: str | Path, cwd: Path = ROOT, timeout: float = 200, python: str = PYTHON, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository in a process of its own; shape checks stay off, as for a user."""
    return subprocess.run(
        [python, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "JAXTYPING_DISABLE": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def pytest_collection_finish() -> None:
    """Trainings collect garbage by hand, and looking through all that is imported takes a quarter of a second."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is frozen at the end looks like a leak to some packages."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Workers of pytest-xdist send UTF-8: `?` stands for what is not, such as odd file names in logs."""
    data = yield
    return json.loads(json.dumps(data, ensure_ascii=False).encode(errors="replace"))


@pytest.fixture(autouse=True, scope="session")
def _forked_python() -> Generator[None]:
    """What tests and commands start by `sys.executable` has its imports done."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        sys.executable = make_stand_in(folder)
        yield
        sys.executable = PYTHON


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "nested" / "deep").mkdir(parents=True)
    for index in range(10):
        parent = (root, root / "nested", root / "nested" / "deep")[index % 3]
        (parent / f"{index}.png").write_bytes(encode(photo(index)))
    return root


@pytest.fixture
def jpegs(tmp_path):
    """What data.decode=gpu tells apart: plain, turned, large and damaged JPEGs, and those that nvJPEG may refuse."""
    root = tmp_path / "jpegs"
    root.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "plain.jpg": encode(photo(0, 90, 70), "JPEG", quality=90),
        "tall.jpg": encode(photo(1, 61, 143), "JPEG", quality=90),
        "turned.jpg": encode(photo(2, 120, 80), "JPEG", quality=90, exif=turned),
        "large.jpg": encode(photo(3, 701, 503), "JPEG", quality=90),
        "progressive.jpg": encode(photo(4, 90, 70), "JPEG", progressive=True),
        "cmyk.jpg": encode(photo(5, 90, 70).convert("CMYK"), "JPEG"),
        "grey.jpg": encode(photo(6, 90, 70).convert("L"), "JPEG"),
        "rgb.png": encode(photo(7, 90, 70)),
        "cut.jpg": encode(photo(8, 90, 70), "JPEG")[:-40],
    }
    for name, content in pictures.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def listed(monkeypatch):
    """Data sets by name, which `labels.open_labelled` opens instead of URLs."""
    known = {}
    monkeypatch.setattr("labels.open_dataset", lambda url, key, _: known[url])
    return known
