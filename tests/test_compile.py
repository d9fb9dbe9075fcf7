"""speed/compiling.py: the compiled step is the eager step, compiled once, and what was compiled is kept."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import make_images, run_forked, run_main, tiny
from conftest import PYTHON, ROOT
from golden import golden_state
from torch import fx
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import train_capi
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from fsdp import Sharding
from speed.compiling import compile_function, kept_compilations
from train_capi import CapiConfig
from utils import UserError

METHODS = {
    "capi": """
    from config import DEFAULT_PRETRAIN_CONFIG as DEFAULT
    from golden import DROP_PATH, GOLDEN_CONFIG, golden_batches
    from train_capi import CapiConfig as Config, CapiState as State, hyper_at, train_step

    own = [*GOLDEN_CONFIG, "model.encoder_kwargs.depth=1", "model.decoder_kwargs.depth=1", DROP_PATH]
    losses, without_effect = ("capi_loss", "clustering_loss"), ()

    def batches(step):
        return golden_batches(step, 1)
""",
    "stop": """
    from data import Batch
    from golden_ijepa import GOLDEN_CONFIG, STOP_NOISE
    from masking import MultiBlockMasks
    from train_ijepa import DEFAULT_CONFIG as DEFAULT, IjepaConfig as Config, IjepaState as State
    from train_ijepa import hyper_at, mask_plan, train_step

    own = [*GOLDEN_CONFIG, "data.images_size=96", "model.depth=1", "predictor.depth=1", STOP_NOISE]
    losses, without_effect = ("loss",), ()

    def batches(step):
        masks = MultiBlockMasks(mask_plan(eager.cfg), 0)([(4 * step + image,) for image in range(4)])
        lengths.add((masks["context_indices"].shape[2], masks["target_indices"].shape[2]))
        assert len(lengths) > min(step, 2), "all steps have as many patches"
        return [Batch(images=torch.randn(4, 3, 96, 96), masks=masks, sample_ids=torch.arange(4))]
""",
    "cae": """
    from golden_cae import DROP_PATH, GOLDEN_CONFIG, NARROW, GoldenTokenizer, golden_batches
    from train_cae import DEFAULT_CONFIG as DEFAULT, CaeConfig as Config, CaeState as State
    import train_cae

    own = [*GOLDEN_CONFIG, DROP_PATH, NARROW, "regressor.depth=1"]
    losses, without_effect = ("token_loss", "alignment_loss"), ("norm1_k.bias",)

    def hyper_at(step, cfg):
        return 1e-4

    def train_step(state, batches, lr):
        scalars = train_cae.train_step(state, GoldenTokenizer(), batches, lr)
        state.step += 1
        return scalars

    def batches(step):
        return golden_batches()
""",
}
METHODS |= {kind: METHODS["capi"] + f"\n    own.append('model.predictor={kind}')\n" for kind in ("split", "fused")}
"""For each method: its configuration, state and step; arguments of its own; its losses, and weights whose gradient is 0
but for rounding; and what it trains on."""

COMPARE = """
    import torch, torch._dynamo
    from config import load_config

    torch.set_num_threads(2)
    lengths = set()

    def state(disable):
        disabled = [f"efficiency.compilation.{name}.disable={disable}" for name in ("do_teacher", "do_student")]
        return State(load_config(Config, DEFAULT, [*own, *disabled]), torch.device("cpu"))

    eager, compiled = state("true"), state("false")
    for i in range(4):
        torch._dynamo.config.error_on_recompile = i > 1
        given, hyper = batches(i), hyper_at(i, eager.cfg)
        a, b = (train_step(one, given, hyper) for one in (eager, compiled))
        for name in (*losses, "grad_norm"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=f"{name} at step {i}")
    for (name, p), q in zip(eager.student.named_parameters(), compiled.student.parameters(), strict=True):
        if not name.endswith(without_effect):  # keys that shift together: Adam moves them by the rounding of nothing
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, torch._dynamo.utils.counters
    assert not torch._dynamo.utils.counters["graph_break"]
"""


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler"
)


def run_code(code):
    """In a process of its own: run-time shape checks and torch.compile do not go together."""
    path = ":".join(str(ROOT / folder) for folder in (".", "tests", "bench"))
    done = run_forked("-c", textwrap.dedent(code), timeout=300, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.long if name == "capi" else pytest.mark.slow) for name in METHODS],
)
def test_compiled_steps_equal_eager_steps(method):
    run_code(METHODS[method] + COMPARE)


GRAPHS = """
    import functools, torch, plan
    from config import DEFAULT_PRETRAIN_CONFIG, load_config
    from golden import DROP_PATH, GOLDEN_CONFIG, NAIVE, golden_batches
    from train_capi import CapiConfig, CapiState, do_student, do_teacher, hyper_at, train_step

    def is_random(node):
        operator, *args = node.target, *node.args
        if isinstance(operator, torch._ops.HigherOrderOperator) and args:  # it keeps the generator's state for an
            operator, *args = args  # operator that is computed again
        if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
            return False
        arguments = dict(zip([a.name for a in operator._schema.arguments], args)) | node.kwargs
        return arguments.get("dropout_p", 0 if "scaled_dot_product" in str(operator) else 1) != 0

    def random_operators(function, *args):
        graphs = plan.trace(function, *args)
        traced[function.__name__] = set(graphs)
        for name, graph in graphs.items():
            for node in graph.graph.nodes:
                if node.target in (torch.ops.aten.sin.default, torch.ops.aten.cos.default):
                    tables.append(node)
                    # What is seen with given strides is kept in memory, not computed anew where it is used.
                    assert all(user.target is torch.ops.aten.as_strided.default for user in node.users), node.users
            found.extend(f"{function.__name__}, {name}: {node}" for node in graph.graph.nodes if is_random(node))
        return function(*args)

    for more in ([], [NAIVE]):
        found, traced, tables = [], {}, []
        shallow = ["model.encoder_kwargs.depth=2", "model.decoder_kwargs.depth=1"]
        sources = [*GOLDEN_CONFIG, *shallow, DROP_PATH, *more]
        state = CapiState(load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, sources), torch.device("cpu"))
        state.do_teacher = functools.partial(random_operators, do_teacher)
        state.do_student = functools.partial(random_operators, do_student)
        train_step(state, golden_batches(0, 1), hyper_at(0, state.cfg))
        assert traced == {"do_teacher": {"inference"}, "do_student": {"forward", "backward"}}, traced
        assert not found, found
        # Two blocks of the teacher; two of the student's encoder; one of its predictor, with queries and keys.
        assert len(tables) >= 2 * (2 + 2 + 2 * 1), len(tables)
    # What this looks for is what it finds where drop-path draws by itself.
    module = state.student["backbone"].encoder.blocks[0].residual2
    random_operators(module.forward, torch.randn(4, 3, 64, requires_grad=True))
    assert found, "random operators go unnoticed"
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_in_the_traced_graphs_of_a_step_nothing_is_random_and_rotary_tables_are_made_once():
    """Compiled code is free to draw random numbers from other generators than the one that is seeded."""
    run_code(GRAPHS)


def test_compiling_for_a_cpu_without_a_compiler_is_an_error_with_the_key(monkeypatch):
    options = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation.do_student
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"efficiency\.compilation\.do_student\.disable=true"):
        compile_function(torch.sin, options, "efficiency.compilation.do_student", torch.device("cpu"))
    disabled = dataclasses.replace(options, disable=True)
    assert compile_function(torch.sin, disabled, "", torch.device("cpu")) is torch.sin


@pytest.mark.parametrize(("device", "wanted"), [("cuda", {"triton.cudagraphs": True}), ("cpu", None)])
def test_cuda_graphs_are_asked_for_where_there_is_cuda(device, wanted, monkeypatch, caplog):
    options = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation.do_student
    asked = []
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("torch.compile", lambda function, **kwargs: asked.append(kwargs) or function)
    caplog.set_level("INFO", "capi")
    compile_function(torch.sin, options, "efficiency.x", torch.device(device), cuda_graphs=True)
    compile_function(torch.sin, options, "efficiency.x", torch.device(device))
    assert [kwargs["options"] for kwargs in asked] == [wanted, None]
    assert ("there are none on cpu; efficiency.x runs without" in caplog.text) == (device == "cpu")


def test_cuda_graphs_and_divided_weights_do_not_go_together(monkeypatch):
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, []).efficiency.compilation
    sharding = Sharding("simple", torch.bfloat16, torch.float32, 64, 1)
    monkeypatch.setattr("speed.compiling.is_distributed", lambda: True)
    with pytest.raises(UserError, match=r"cuda_graphs=true: not with weights divided"):
        compile_function(torch.sin, cfg.do_student, "x", torch.device("cuda"), sharding, cuda_graphs=True)


@pytest.mark.parametrize("cuda_graphs", ["true", "false"])
def test_steps_are_marked_for_cuda_graphs_from_the_first_one_on_and_for_nothing_else(cuda_graphs, monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append("step"))
    compiled = [f"efficiency.compilation.{name}.disable=false" for name in ("do_teacher", "do_student")]
    golden_state(*compiled, f"efficiency.compilation.cuda_graphs={cuda_graphs}").zero_grad()
    assert marks == (["step"] if cuda_graphs == "true" else [])


def test_cuda_graphs_need_compiled_functions():
    off = [f"efficiency.compilation.{name}.disable=true" for name in ("do_teacher", "do_student")]
    on = "efficiency.compilation.cuda_graphs=true"
    assert load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [on]).efficiency.compilation.cuda_graphs
    with pytest.raises(UserError, match=r"cuda_graphs=True: only compiled functions become graphs"):
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*off, on])


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def cache_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in CACHES if name in os.environ}


@pytest.fixture
def _no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_caches")
def test_what_is_compiled_goes_to_the_folder_until_the_block_ends(tmp_path):
    with kept_compilations(tmp_path / "cache"):
        folders = cache_variables()
        assert sorted(folders) == sorted(CACHES)
        assert all(tmp_path / "cache" in Path(folder).parents for folder in folders.values())
    assert cache_variables() == {}
    with kept_compilations(tmp_path / "cache"):
        assert cache_variables() == folders, "a later start does not find it"


@pytest.mark.usefixtures("_no_caches")
def test_each_kind_of_processor_has_libraries_of_its_own(tmp_path, monkeypatch):
    with kept_compilations(tmp_path):
        folders = cache_variables()
    monkeypatch.setattr(platform, "machine", lambda: "other")
    with kept_compilations(tmp_path):
        assert not set(cache_variables().values()) & set(folders.values())


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.usefixtures("_no_caches")
def test_the_folder_that_a_user_has_chosen_comes_first(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "/mine")
    with kept_compilations(tmp_path):
        assert os.environ[name] == "/mine"
        assert len(cache_variables()) == 2
    assert cache_variables() == {name: "/mine"}


@pytest.mark.usefixtures("_no_caches")
def test_the_default_that_torch_sets_on_import_is_no_choice_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    with kept_compilations(tmp_path):
        assert tmp_path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert cache_variables() == {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}


@pytest.mark.usefixtures("_no_caches")
def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO")
    with kept_compilations(tmp_path / "file" / "cache"):
        assert cache_variables() == {}
    assert "not kept for later starts" in caplog.text


@pytest.mark.usefixtures("_no_caches")
def test_what_a_run_left_that_was_killed_while_it_compiled_is_compiled_again(tmp_path):
    """What is there in the middle of a compilation is what a kill would leave."""
    folder, killed, library = tmp_path / "cache", tmp_path / "killed", Path("ab") / "abc.main.so"

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        shutil.copytree(folder, killed)
        return graph.forward

    with kept_compilations(folder):
        kind = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).name
        (folder / kind / library).parent.mkdir()
        (folder / kind / library).write_bytes(b"half a library")
        torch.compile(torch.sin, backend=backend)(torch.zeros(2))
    assert (killed / kind / library).exists()
    with kept_compilations(killed):
        assert not (killed / kind / library).exists()
        assert (killed / kind).is_dir()
    with kept_compilations(folder):
        assert (folder / kind / library).exists(), "what a run made that ended later is thrown away"


COMPILED = "efficiency.compilation.do_teacher.disable=false"


def test_all_that_a_run_compiles_is_kept_in_its_folder(tmp_path, monkeypatch):
    seen = {}

    def train(cfg, output_dir, device):
        seen.update({name: os.environ.get(name) for name in CACHES})

    monkeypatch.setattr(train_capi, "train", train)
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    assert run_main(tiny("images", tmp_path / "run", COMPILED)) == 0
    assert all(tmp_path / "run" / "compile_cache" in Path(folder).parents for folder in seen.values())
    assert run_main(tiny("images", tmp_path / "eager")) == 0
    assert not (tmp_path / "eager" / "compile_cache").exists()


TRAIN = """
    import json, os, sys
    from pathlib import Path
    import train_capi
    from torch._dynamo.utils import counters

    assert train_capi.main(sys.argv[1:]) == 0
    counted = Path(__file__).parent / f"counted_{os.environ.get('RANK', 0)}.json"
    counted.write_text(json.dumps(counters["inductor"]))
"""


def train_in_a_process(arguments, num_ranks):
    """What inductor counted on each rank."""
    own = {key: value for key, value in os.environ.items() if key not in CACHES}
    script = Path(arguments[-1]).parent / "train.py"
    script.write_text(textwrap.dedent(TRAIN))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [PYTHON, *(launcher if num_ranks > 1 else []), str(script), *arguments],
        env={**own, "JAXTYPING_DISABLE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((script.parent / f"counted_{rank}.json").read_text()) for rank in range(num_ranks)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_start_reads_what_the_first_one_compiled(tmp_path, num_ranks):
    run = tmp_path / "run"
    small = ["model.encoder_kwargs.depth=1", "model.decoder_kwargs.depth=1", COMPILED]
    images = make_images(tmp_path / "images")

    def start(steps):
        (tmp_path / "steps.yaml").write_text(f"optim: {{total_iters: {steps}}}\n")
        counted = train_in_a_process([*tiny(images, run, *small), str(tmp_path / "steps.yaml")], num_ranks)
        return counted, {path: path.stat().st_mtime_ns for path in run.glob("compile_cache/**/*.so")}

    counted, libraries = start(1)
    assert len(counted) == num_ranks and all(rank["fxgraph_cache_miss"] > 0 for rank in counted)
    assert libraries
    counted, same = start(2)
    assert all(rank["fxgraph_cache_hit"] > 0 and "fxgraph_cache_miss" not in rank for rank in counted), counted
    assert same == libraries
