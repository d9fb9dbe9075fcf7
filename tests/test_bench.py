"""bench/: the benchmarks run as typed, and what they count is right."""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from commands import run_forked
from conftest import PYTHON, ROOT, run_cli
from torch.utils.flop_counter import flop_registry

sys.path.append(str(ROOT / "bench"))  # where the scripts look for each other; last, for it has a clustering.py too

import step

needs_counted_attention = pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch does not count the attention of a CPU",
)
SMALL = [
    "data.images_size=84",
    "capi.num_clusters=64",
    "model.n_registers=4",
    "model.transformers_kwargs.embed_dim=64",
    "model.transformers_kwargs.drop_path_rate=0.3",
    "model.transformers_kwargs.block_kwargs.attn_kwargs.num_heads=2",
    "model.encoder_kwargs.depth=2",
    "model.decoder_kwargs.depth=1",
]


def arguments(*sources: str) -> argparse.Namespace:
    return argparse.Namespace(model="vits14", sources=[*SMALL, *sources])


@needs_counted_attention
@pytest.mark.parametrize("batch", [4, 5, 8])
@pytest.mark.parametrize("recomputes", ["true", "false"])
def test_the_flops_that_torch_counts_on_a_step_are_those_of_the_formula(batch, recomputes):
    cpu = torch.device("cpu")
    cfg = step.configure(arguments(f"efficiency.rematerialization.enabled={recomputes}"), cpu, batch, "eager")
    counts = step.count_flops(cfg, cpu)
    for name in ("teacher", "student", "step"):
        assert counts[name]["counted"] == pytest.approx(counts[name]["formula"], rel=1e-3), name
    # The head sums over prototypes and tokens, 2 n - 1 times in n rounds, by products with a vector: no model FLOPs.
    ratio = counts["clustering"]["counted"] / counts["clustering"]["formula"]
    num_sums = 2 * cfg.capi.clustering_kwargs.n_sk_iter - 1
    assert 1 <= ratio <= 1 + num_sums / (2 * cfg.model.transformers_kwargs.embed_dim)


def test_the_target_is_stated_with_the_flops_of_the_recipe():
    shape = step.step_shape(step.load_config(step.CapiConfig, step.DEFAULT_PRETRAIN_CONFIG, []))
    stated = re.search(
        r"\(([\d.]+) TFLOP per image\).*\| (\d+) % MFU: ([\d,]+) images/s", (ROOT / "bench" / "README.md").read_text()
    )
    tflop, percent, speed = (float(number.replace(",", "")) for number in stated.groups())
    assert tflop == pytest.approx(sum(step.step_flops_per_image(shape).values()) / 1e12, rel=1e-3)
    peak = step.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert speed == pytest.approx(percent / 100 * peak / 1e12 / tflop, rel=0.01)


def test_every_model_is_a_config():
    for name in step.MODELS:
        namespace = argparse.Namespace(model=name, sources=[])
        cfg = step.configure(namespace, torch.device("cuda"), 8, "cudagraphs")
        towers = cfg.model
        assert towers.decoder_kwargs.depth == towers.encoder_kwargs.depth // 2
        assert cfg.optim.batch_size_per_gpu == 8
        assert cfg.efficiency.compilation.cuda_graphs
        assert cfg.efficiency.param_dtype == "bfloat16"


def test_parts_are_timed_apart_and_what_was_wrapped_is_put_back():
    cpu = torch.device("cpu")
    repeated = step.Step(step.configure(arguments(), cpu, 4, "eager"), cpu)
    before = repeated.state.do_teacher, repeated.state.do_student, step.train_capi.ema_update_
    parts = step.time_parts(repeated, 2)
    assert list(parts) == [*step.PARTS, "rest"]
    assert all(seconds > 0 for seconds in parts.values())
    assert (repeated.state.do_teacher, repeated.state.do_student, step.train_capi.ema_update_) == before
    assert "apply_gradients" not in vars(repeated.state)
    assert "step" not in vars(repeated.state.clustering)
    assert repeated.state.step == 2


@pytest.mark.parametrize("capacity", [0, 1, 7, 63, 64, 65, 500, 1000, 5000])
@pytest.mark.parametrize("start", [1, 16, 512])
def test_the_search_ends_within_an_eighth_of_its_start_below_what_fits(capacity, start):
    tried = []

    def runs(batch: int) -> bool:
        assert batch > 0
        tried.append(batch)
        return batch <= capacity

    found = step.largest_batch(runs, start)
    unit = max(1, start // 8)
    assert found <= capacity < found + 2 * unit
    assert len(tried) == len(set(tried)) < 30


def test_a_batch_that_asks_for_too_much_memory_does_not_fit(monkeypatch, capsys):
    cpu = torch.device("cpu")
    assert step.fits(arguments(), cpu, 2, "eager")

    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step.Step, "__call__", too_much)
    assert not step.fits(arguments(), cpu, 2, "eager")
    assert capsys.readouterr().out.splitlines() == ["batch 2 fits, eager", "batch 2 does not fit, eager"]


def test_the_largest_batch_is_reduced_until_it_can_be_measured(monkeypatch):
    tried = []

    def report(args, device, batch):
        tried.append(batch)
        if batch > 11:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "report", report)
    monkeypatch.setattr(step, "search", lambda args, device: 16)
    step.report_what_fits(argparse.Namespace(largest_batch=True), torch.device("cpu"))
    assert tried == [16, 14, 12, 10]
    with pytest.raises(step.UserError, match="--batch=12 does not fit on cpu; use a smaller one, or --largest-batch"):
        step.report_what_fits(argparse.Namespace(largest_batch=False, batch=12), torch.device("cpu"))


@needs_counted_attention
def test_the_step_is_measured_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    done = run_forked("bench/step.py", "--batch", "4", "--steps", "2", "--results", results, *SMALL)
    assert done.returncode == 0, done.stderr
    summary, parts = (json.loads(line) for line in results.read_text().splitlines())
    assert summary["settings"]["batch"] == 4
    (whole,) = summary["numbers"]
    assert whole["MFU"] is None or torch.cuda.is_available()
    assert whole["images/s"] == pytest.approx(4000 / whole["ms"])
    assert whole["counted / formula"] == pytest.approx(1, abs=1e-3)
    assert [row["part"] for row in parts["numbers"]] == [*step.PARTS, "rest", "step"]
    assert sum(row["share"] for row in parts["numbers"][:-1]) == pytest.approx(1)
    assert "images/s" in done.stdout


@pytest.mark.long
def test_what_is_measured_is_recorded_before_the_next_thing_begins(tmp_path, monkeypatch):
    """Compiling a large model may take longer than there is time."""
    measured = step.Measured(dict.fromkeys([*step.PARTS, "rest", "step"], 0.5), 1.0, 0.25)

    def measure(_args, _device, _batch, mode):
        if mode == "compiled":
            raise KeyboardInterrupt
        return measured

    monkeypatch.setattr(step, "measure", measure)
    args = arguments()
    args.mode, args.results = "compiled", tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        step.report(args, torch.device("cpu"), 2)
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    assert [(line["bench"], line["settings"]["mode"]) for line in lines] == [
        ("training step", "eager"),
        ("training step, parts", "eager"),
    ]
    monkeypatch.setattr(step, "measure", lambda *_: measured)
    starts = []

    def first_step(*_):
        starts.append(args.results.read_text().splitlines()[-1])
        return None, 0.125

    monkeypatch.setattr(step, "first_step", first_step)
    step.report(args, torch.device("cpu"), 2)
    starts = [json.loads(line) for line in (*starts, args.results.read_text().splitlines()[-1])]
    assert {line["bench"] for line in starts} == {"training step, start"}
    assert [[row["first step s"] for row in line["numbers"]] for line in starts] == [[0.25, None], [0.25, 0.125]]


@pytest.mark.long
def test_methods_are_measured_beside_each_other_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    small = ["--batch", "2", "--px", "128", "--steps", "1"]
    done = run_forked("bench/methods.py", "--method", "cae", "stop", *small, "--results", results, timeout=280)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (line["settings"]["px"], line["settings"]["methods"]) == (128, "cae stop")
    first, second = line["numbers"]
    assert (first["method"], second["method"]) == ("cae", "stop")
    assert first["times the first"] == 1 != second["times the first"] > 0
    for row in (first, second):
        assert row["processor ms per image"] > 0 and row["added GiB"] > 0.1
    assert second["TFLOP per image"] < first["TFLOP per image"], "it sees a quarter of the patches, the other half"


@pytest.mark.long
def test_the_clustering_head_is_measured_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    small = ["--positions", "8", "--batch", "2", "--width", "32", "--prototypes", "64", "--repeats", "1"]
    done = run_forked("bench/clustering.py", *small, "--chunks", "2", "auto", "--results", results, timeout=280)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["settings"]["chunks"] == "2 auto"
    assert {"floor", "step, torch, chunk 2", "step, torch, chunk auto", "plain"} <= {
        row["what"] for row in line["numbers"]
    }


def test_predictors_are_measured_beside_what_the_author_reports_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    command = ["bench/predictors.py", *SMALL, "--batch", "2", "--px", "84", "--steps", "1", "--results", results]
    done = run_forked(*command, timeout=280)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (line["settings"]["px"], line["settings"]["overrides"]) == (84, " ".join(SMALL))
    cross, split, fused = line["numbers"]
    assert [row["predictor"] for row in (cross, split, fused)] == ["cross", "split", "fused"]
    assert cross["times cross"] == cross["by FLOPs"] == 1 < split["by FLOPs"] < fused["by FLOPs"]
    for row in (split, fused):
        assert row["times cross"] > 0
        counted = row["ViT-L/14 by FLOPs"]
        assert row["author, as speed"] < counted < row["author, as time"], "what is counted is not what was compared"


@pytest.mark.long
def test_moments_in_8_bits_are_measured_beside_those_in_32_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    command = ["bench/optimizers.py", *SMALL, "--batch", "2", "--px", "84", "--steps", "1", "--results", results]
    done = run_forked(*command, timeout=280)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["settings"]["overrides"] == " ".join(SMALL)
    whole, eight = line["numbers"]
    assert whole["bytes per weight"] == 8 > 4 > eight["bytes per weight"] > 2
    assert whole["step, times AdamW"] == whole["update, times AdamW"] == 1 < eight["update, times AdamW"]
    assert eight["ViT-L/14 GiB"] < 0.26 * whole["ViT-L/14 GiB"], "nearly all weights are in large matrices"


def test_the_loader_is_measured_as_typed(tmp_path):
    results = tmp_path / "results.jsonl"
    done = run_forked("bench/loading.py", "--repeats", "1", "--results", results)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, results.read_text().splitlines())
    rows = {row["row"]: row for row in line["numbers"]}
    assert ("ours: folder, decoded on the GPU" in rows) == torch.cuda.is_available()
    for source in ("folder", "parquet, streamed", "tar, streamed"):
        row = rows[f"ours: {source}"]
        assert row["images/s per core"] == pytest.approx(1000 / row["ms per image"])
        assert row["times the baseline"] > 1, "slower than Pillow and torchvision's v1 transforms"


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    done = run_forked("bench/loading.py", "--images", "10", "--results", tmp_path / "results.jsonl")
    assert done.returncode == 2
    assert "argument --images: it=10: must be at least 64" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would search")
def test_a_largest_batch_is_not_searched_on_a_cpu():
    done = run_forked("bench/step.py", "--largest-batch")
    assert done.returncode == 2
    assert "--largest-batch needs a CUDA device, this is cpu" in done.stderr
    assert "Traceback" not in done.stderr


RECOMPILES = """
    import sys
    sys.path.insert(0, "bench")
    import torch, step, test_bench
    cpu, args = torch.device("cpu"), test_bench.arguments()
    args.steps = 1
    first = step.measure(args, cpu, 4, "compiled").seconds
    assert first["step"] > 0
    class Grows(step.Step):
        def __call__(self):
            if self.state.step == step.WARMUP_STEPS["compiled"]:
                self.batch = step.make_batch(step.configure(args, cpu, 6, "compiled"), cpu)
            super().__call__()
    step.release(cpu)
    step.Step = Grows
    try:
        step.measure(args, cpu, 4, "compiled")
    except RuntimeError as error:
        assert "recompile" in str(error), error
    else:
        raise SystemExit("compiling anew after warm-up went unnoticed")
"""


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: run-time shape checks and torch.compile do not go together."""
    return run_cli("-c", textwrap.dedent(code), timeout=600, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
def test_compiling_anew_after_warm_up_is_an_error():
    done = run_code(RECOMPILES)
    assert done.returncode == 0, done.stderr[-3000:]


CUDA_GRAPHS = """
    import sys
    sys.path.insert(0, "bench")
    import torch, step, test_bench
    from train_capi import hyper_at
    from train_capi import train_step
    cuda, args = torch.device("cuda"), test_bench.arguments("efficiency.param_dtype=float32")
    losses = {}
    for mode in ("eager", "cudagraphs"):
        repeated = step.Step(step.configure(args, cuda, 8, mode), cuda)
        cfg, state, losses[mode] = repeated.cfg, repeated.state, []
        for i in range(8):
            hyper = hyper_at(cfg.optim.total_iters // 2, cfg)
            with torch.compiler.set_stance("fail_on_recompile" if mode != "eager" and i > 2 else "default"):
                scalars = train_step(state, [repeated.batch] * 2, hyper)
            state.step += 1
            losses[mode].append(torch.stack([scalars[k].double() for k in ("loss", "grad_norm")]))
    torch.testing.assert_close(torch.stack(losses["cudagraphs"]), torch.stack(losses["eager"]), rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    # Replays are given new images for drop path, from the step's seed.
    args.sources.append("model.transformers_kwargs.drop_path_rate=0.5")
    repeated = step.Step(step.configure(args, cuda, 8, "cudagraphs"), cuda)
    hyper = hyper_at(0, repeated.cfg)  # learning rate 0: the loss depends on drop path alone
    seen = []
    for i in (0, 1, 2, 3, 4, 5, 4):
        repeated.state.step = i
        scalars = train_step(repeated.state, [repeated.batch], hyper)
        seen.append(scalars["capi_loss"].item())
    assert seen[3] != seen[4] != seen[5], seen
    assert seen[6] == seen[4], seen
"""


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_steps_of_cuda_graphs_are_those_of_eager_code():
    done = run_code(CUDA_GRAPHS)
    assert done.returncode == 0, done.stderr[-3000:]


SCALE = """
    import sys
    sys.path.insert(0, "bench")
    import plan
    plan.SCALE_MODELS = ("vits14",)
    small = ["data.images_size=84", "model.encoder_kwargs.depth=2", "model.decoder_kwargs.depth=1"]
    sys.argv = ["plan.py", "--scale", "--results", RESULTS, "optim.batch_size_per_gpu=64", *small]
    plan.main()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table_of_scales_is_consistent(tmp_path):
    results = tmp_path / "results.jsonl"
    done = run_code(SCALE.replace("RESULTS", repr(str(results))))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(results.read_text())["numbers"]
    assert [row["GPUs"] for row in rows] == [8, 64, 128, 512]
    assert all(a["images/s"] < b["images/s"] and a["MFU"] > b["MFU"] for a, b in itertools.pairwise(rows))
    assert all(0 < row["MFU"] < 450 / 989 for row in rows)
    assert all(0 < row["of it activations"] < row["memory GiB"] for row in rows)
    assert rows[0]["memory GiB"] > rows[-1]["memory GiB"]
    assert "Predicted, not measured" in done.stdout


def test_without_a_gpu_the_gpu_benchmark_says_so():
    done = subprocess.run(
        ["bash", "bench/gpu.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": PYTHON, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "torch sees no CUDA device here" in done.stderr
    assert done.stdout == ""


def run_gpu_benchmark(folder, cases, **environment):
    """bench/gpu.sh in a copy, with an interpreter that claims a GPU and for scripts of some names does as told."""
    fake = folder / "python"
    told = "".join(f"{pattern}) {commands} ;;\n" for pattern, commands in cases.items())
    fake.write_text(f'#!/bin/bash\ncase "$*" in\n-c*) exit 0 ;;\n-\\ *) exec {PYTHON} "$@" ;;\n{told}esac\n')
    fake.chmod(0o755)
    copy = folder / "repository" / "bench"
    copy.mkdir(parents=True)
    for name in ("gpu.sh", "results.py"):
        shutil.copy(ROOT / "bench" / name, copy)
    for path in ROOT.glob("*.py"):  # what results.py imports
        shutil.copy(path, copy.parent)
    done = subprocess.run(
        ["bash", str(copy / "gpu.sh"), str(folder / "r.jsonl")],
        env={**os.environ, "PYTHON": str(fake), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    table = done.stdout.split("\n\n")[-1].splitlines()
    assert len(table) == 10
    return done.stdout, {line.split("  ")[0]: line for line in table}, copy.parent / "runs" / "bench_gpu"


@pytest.mark.long
def test_the_gpu_benchmark_ends_in_time_and_says_what_was_left_out(tmp_path):
    _, outcomes, _ = run_gpu_benchmark(tmp_path, {"*clustering*": "exec sleep 300"}, BENCH_GPU_S="4")
    assert "timed out" in outcomes["clustering head"]
    assert "no time left" in outcomes["evaluations"]
    (seconds,) = re.findall(r"BENCH_GPU_S:-(\d+)", (ROOT / "bench" / "gpu.sh").read_text())
    assert int(seconds) + 10 <= 480


def test_the_gpu_benchmark_goes_on_after_a_failure(tmp_path):
    line = {"settings": {"batch": 7}, "numbers": [{"ms": 12.5, "MFU": None}]}
    (tmp_path / "line").write_text(json.dumps(line) + "\n")
    stdout, outcomes, logs = run_gpu_benchmark(
        tmp_path,
        {
            "*clustering*": 'echo "no such kernel" >&2; exit 3',
            "*loading*": "exit 124",
            "*step*": f'cat "{tmp_path}/line" >>"{tmp_path}/r.jsonl"',
        },
    )
    assert "failed, exit code 3" in outcomes["clustering head"]
    assert "timed out" in outcomes["loading"]
    assert "ok" in outcomes["evaluations"]
    assert "batch 7, ms 12.5" in outcomes["ViT-S/14 step, compiled"]
    assert "no such kernel" in stdout
    assert (logs / "2.log").read_text() == "no such kernel\n"
