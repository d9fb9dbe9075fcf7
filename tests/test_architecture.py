"""The house map: who may import whom, and what no file may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = [
    {"utils", "default_eval_config"},
    {"weights"},
    {"config", "distributed", "masking", "model", "sources", "speed.attention", "speed.clustering_triton", "speed.fp8"},
    {"crops", "pixels", "speed.recomputing"},
    {"speed.device_decode"},
    {"cae", "checkpoint", "clustering", "data", "flops", "fsdp", "ijepa", "launch", "metrics", "optim"},
    {"pictures", "readouts", "report", "speed.clustering", "speed.compiling"},
    {"evaluation", "probe"},
    {"labels"},
    {"training_evals"},
    {"training"},
    {"train_capi", "train_ijepa", "train_cae"},
    {"train_distributed", "benchmark", "hubconf", "demo", "export", "extract_features",
     "eval_segmentation", "eval_classification", "eval_visualizations"},
]  # fmt: skip
LAYER = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("speed/[!_]*.py")])
HEAVY = {"datasets", "submitit", "matplotlib", "sklearn", "scipy", "timm", "xformers", "huggingface_hub", "pandas"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_modules(path: Path) -> list[str]:
    """Everything imported anywhere in the file, also inside functions: our modules by full name, others' packages."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return [name if name in LAYER else name.split(".")[0] for name in names]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    assert name in LAYER, f"{name} is not on the map; place it before adding it"
    imported = imported_modules(path)
    assert "speed" not in imported, f"{name} imports from the package instead of from a module on the map"
    upward = [m for m in imported if m in LAYER and LAYER[m] >= LAYER[name]]
    assert not upward, f"{name} may only import lower layers, but imports {upward}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.split(".")[0]
        for node in top_level
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not names & HEAVY


@pytest.mark.parametrize("path", [*MODULES, *sorted(ROOT.glob("baselines/*.py"))], ids=module_name)
def test_nothing_loads_code_from_files_or_hides_errors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno} catches {caught}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("weights_only") == "True", f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ("strict", "trust_remote_code") and node.arg:
            is_zip = node.arg == "strict" and ast.unparse(node.value) == "True"
            assert is_zip or ast.unparse(node.value) != {"strict": "False"}.get(node.arg, "True"), (
                f"{node.value.lineno}"
            )


SCRIPTS = [path.name for path in MODULES if '\nif __name__ == "__main__":' in path.read_text()]


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.stem)
def test_test_files_do_not_import_each_other(path):
    """Not in code that they start in a process of its own either."""
    imported = re.findall(r"^ *(?:import|from) (test_\w+)", path.read_text(), flags=re.MULTILINE)
    assert not imported, (
        f"{path.name} imports {imported}; what test files share belongs in golden.py, runs.py, samples.py"
    )


def test_the_scripts_are_known():
    known = {"train_capi.py", "train_distributed.py", "benchmark.py", "demo.py", "export.py", "extract_features.py"}
    known |= {path.name for path in ROOT.glob("eval_*.py")}
    assert known <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_the_command_line_is_answered_before_torch_is_imported(script, option, code):
    command = [sys.executable, "-X", "importtime", script, option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    assert "usage:" in (done.stdout if code == 0 else done.stderr)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "utils" in imported, "importtime says nothing"
    assert not imported & {"torch", "numpy", "omegaconf"}


def test_submitting_a_job_needs_no_torch():
    code = "import sys, train_distributed; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_model_needs_torch_alone():
    """A user of torch.hub has torch; importing model.py must not ask for more."""
    allowed = {"torch", "utils", "weights", "jaxtyping", "omegaconf", "yaml"} | sys.stdlib_module_names
    assert set(imported_modules(ROOT / "model.py")) <= allowed
    on_demand = {"huggingface_hub", "safetensors"}
    assert set(imported_modules(ROOT / "weights.py")) <= {"torch", "utils"} | on_demand | sys.stdlib_module_names
    code = (
        "import sys\n"
        "for name in ('jaxtyping', 'omegaconf', 'yaml', 'numpy', 'PIL', 'datasets', 'huggingface_hub', 'safetensors'):"
        " sys.modules[name] = None\n"
        "import model, torch\n"
        "kwargs = dict(embed_dim=32, block_kwargs=dict(attn_kwargs=dict(num_heads=2)))\n"
        "m = model.EncoderDecoder(patch_size=4, transformers_kwargs=kwargs, encoder_kwargs=dict(depth=1),"
        " decoder_kwargs=dict(depth=1))\n"
        "m(torch.zeros(1, 3, 8, 8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
