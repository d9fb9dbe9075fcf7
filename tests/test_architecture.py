"""The house map: who may import whom, and what no file may do."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from commands import run_forked
from conftest import PYTHON, ROOT

LAYERS = [
    {"utils", "default_eval_config", "demo_data"},
    {"reading.archives", "reading.bands", "weights"},
    {"config", "distributed", "masking", "model", "reading.sources", "speed.adamw_triton", "speed.attention",
     "speed.clustering_triton", "speed.fp8"},
    {"keys", "reading.crops", "reading.pixels", "speed.offloading", "speed.recomputing"},
    {"speed.device_decode"},
    {"cae", "checkpoint", "clustering", "data", "flops", "fsdp", "hubconf", "ijepa", "launch", "metrics", "optim"},
    {"tasks"},
    {"baselines", "pictures", "readouts", "report", "sheets", "speed.clustering", "speed.compiling"},
    {"evaluation", "probe"},
    {"cae_tokenizer", "labels"},
    {"training_evals"},
    {"training"},
    {"finetuning"},
    {"finetune_classification", "finetune_detection", "eval_finetuned"},
    {"train_capi", "train_ijepa", "train_cae"},
    {"train_distributed", "benchmark", "demo", "export", "extract_features",
     "eval_segmentation", "eval_classification", "eval_visualizations"},
    {"finetune_segmentation"},
    {"bench", "experiments"},
]  # fmt: skip
LAYER = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("reading/[!_]*.py"), *ROOT.glob("speed/[!_]*.py")])
FOLDERS = ("baselines", "bench", "demo_data", "experiments", "tasks")
"""Folders that are placed as a whole: their files may import each other."""
SOURCES = [*MODULES, *sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]
HEAVY = {"datasets", "submitit", "matplotlib", "sklearn", "scipy", "timm", "xformers", "huggingface_hub", "pandas",
         "transformers", "faster_coco_eval", "pycocotools", "jinja2", "markupsafe", "fsspec", "tifffile", "imagecodecs",
         "pydicom"}  # fmt: skip


parse = functools.cache(ast.parse)  # every test here reads the same files


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """What import statements among the nodes import: our modules as on the map, of other packages the package."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name if name in LAYER else name.split(".")[0] for name in names}


def imported_modules(path: Path) -> set[str]:
    """Everything imported anywhere in the file, also inside functions."""
    return imports(ast.walk(parse(path.read_text())))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    folder = name.split(".")[0]
    place = folder if folder in FOLDERS else name
    assert place in LAYER, f"{name} is not on the map; place it before adding it"
    imported = imported_modules(path) - ({place} if place in FOLDERS else set())
    assert not {"reading", "speed"} & imported, f"{name} imports from the package instead of from a module on the map"
    upward = sorted(module for module in imported & LAYER.keys() if LAYER[module] >= LAYER[place])
    assert not upward, f"{name} may only import lower layers, but imports {', '.join(upward)}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    heavy = sorted(imports(parse(path.read_text()).body) & HEAVY)
    assert not heavy, f"{path.name} imports {', '.join(heavy)} for everyone; do it in the functions that need it"


def names_in(node: ast.AST | None) -> set[str]:
    """Identifiers of an expression: of `(OSError, a.Error)` they are OSError, a and Error."""
    inner = list(ast.walk(node)) if node is not None else []
    return {each.id for each in inner if isinstance(each, ast.Name)} | {
        each.attr for each in inner if isinstance(each, ast.Attribute)
    }


def faults(source: str) -> list[str]:
    """Places where a source hides errors or runs code out of files, as sentences."""
    said = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            said.append(f"line {node.lineno} catches everything; name the errors that are expected")
        is_suppress = isinstance(node, ast.Call) and "suppress" in names_in(node.func)
        expected = [node.type] if isinstance(node, ast.ExceptHandler) else node.args if is_suppress else []
        too_wide = {"Exception", "BaseException"} & {name for each in expected for name in names_in(each)}
        said += [f"line {node.lineno} catches every {name}; name the errors that are expected" for name in too_wide]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if arguments.get("weights_only") != "True":
                said.append(f"line {node.lineno} loads with torch without weights_only=True, which runs code in files")
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in {a.name for a in node.names}:
            said.append(f"line {node.lineno} imports load out of torch; write torch.load, which is looked for here")
        if isinstance(node, ast.alias) and node.name == "torch" and node.asname:
            said.append(f"line {node.lineno} gives torch another name; torch.load is looked for by its own")
        if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) == ("strict", "False"):
            said.append(f"line {node.value.lineno} passes strict=False, which hides what is missing or too much")
        if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) == ("trust_remote_code", "True"):
            said.append(f"line {node.value.lineno} passes trust_remote_code=True, which runs code of others")
    return said


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_runs_code_in_files_or_hides_errors(path):
    said = faults(path.read_text())
    assert not said, f"{path.name}: {'; '.join(said)}"


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (OSError, Exception): pass",
        "try: f()\nexcept (OSError, builtins.BaseException) as error: pass",
        "with contextlib.suppress(OSError, Exception): f()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "import torch as t",
        "model.load_state_dict(state, strict=False)",
        "datasets.load_dataset(name, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_seen(source):
    assert len(faults(source)) == 1


KNOW_A_METHOD = {
    "train_capi", "clustering", "masking", "model", "speed.clustering", "speed.clustering_triton",  # which are CAPI
    "train_ijepa", "ijepa",  # which are I-JEPA and StoP, with masks in masking
    "train_cae", "cae",  # likewise
    "demo", "export", "hubconf",  # which train, unpack and publish it
    "flops",  # what a step costs
    "eval_segmentation",  # how labels were counted for the published numbers
    "eval_visualizations",  # draws the clusters of a teacher
    "cae_tokenizer",  # makes what CAE predicts
}  # fmt: skip
OUR_NAME = re.compile(r'"capi"|\btrain_capi\.py\b')
"""What the repository is called in loggers and trackers, and what a user types."""
OF_A_METHOD = re.compile(
    r"(?i:capi|i-?jepa|\bcae\b|clustering|num_clusters|prototype|sinkhorn|n_sk_iter|positionwise|mask_ratio"
    r"|(?:student|teacher|target|pred)_temp|prediction_subsampling|(?:predict|visible)_indices)|\bStoP\b"
)


def method_names(source: str) -> list[str]:
    """Lines, comments too, that name a method, its parts or its configuration keys."""
    lines = enumerate(OUR_NAME.sub("", source).splitlines(), 1)
    return [f"line {number}: {match[0]}" for number, line in lines for match in OF_A_METHOD.finditer(line)]


@pytest.mark.parametrize(
    "path", [path for path in MODULES if module_name(path) not in KNOW_A_METHOD], ids=lambda path: path.stem
)
def test_machinery_names_no_method(path):
    """It takes sections, plain values and callables, so that the next method finds it as it is."""
    named = method_names(path.read_text())
    assert not named, f"{path.name} is for every method, but names one: {'; '.join(named)}"


@pytest.mark.parametrize(
    "line",
    ["cfg: CapiConfig", "cfg.capi.num_clusters", "# as I-JEPA does", "from clustering import entropy", "key = 'capi'",
     'with_usage="prototypes_used"', "temp = cfg.student_temp", "StoP(noise)", "batch.predict_indices"],
)  # fmt: skip
def test_names_of_methods_are_seen(line):
    assert method_names(f"import math\n{line}\n")
    assert not method_names('getLogger("capi")  # train_capi.py: stop at once, on a Slurm cluster')


SCRIPTS = [path.name for path in MODULES if '\nif __name__ == "__main__":' in path.read_text()]


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.stem)
def test_test_files_do_not_import_each_other(path):
    """Not in code that they start in a process of its own either."""
    imported = re.findall(r"^ *(?:import|from) (test_\w+)", path.read_text(), flags=re.MULTILINE)
    assert not imported, (
        f"{path.name} imports {imported}; what test files share belongs in golden.py, commands.py, samples.py"
    )


def private_names(source: str) -> set[str]:
    """Names with an underscore that a source gives to what it defines."""
    names = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if re.fullmatch("_[A-Za-z]\\w*", name)}


def private_uses(source: str, private: set[str]) -> list[str]:
    """Places where a test takes a private name out of a module or an object, also in code that is a text."""
    used, own = [], private_names(source)
    for node in ast.walk(parse(source)):
        names: set[str] = set()
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            names = set() if is_own else {node.attr}
        elif isinstance(node, ast.ImportFrom):
            names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = {node.value, *re.findall(r"(?:\.|\bimport )(_\w+)", node.value)}
        used += [f"line {node.lineno}: {name}" for name in sorted(names & private)]
    return used


PRIVATE = set().union(*(private_names(path.read_text()) for path in SOURCES))
ALLOWED_PRIVATE = {"_model_section", "_merged"}
"""Of hubconf.py, all of whose public functions torch.hub offers as models."""


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/*.py")), ids=lambda path: path.stem)
def test_tests_go_through_public_names(path):
    """What nobody promised can then be changed, and what is promised is tested."""
    used = private_uses(path.read_text(), PRIVATE - ALLOWED_PRIVATE)
    assert not used, f"{path.name} uses what is private: {'; '.join(used)}"


def test_uses_of_private_names_are_seen():
    private = {"_mine", "_yours"}
    for line in (
        "x._mine.result()", "from x import _yours", "monkeypatch.setattr(x, '_yours', 1)",
        "monkeypatch.setattr('x._yours', 1)", "code = 'print(x._mine)'", "self._mine = self._yours",
    ):  # fmt: skip
        assert len(private_uses(line, private)) == 1, line
    for line in (
        "self._mine = 1",
        "torch._dynamo.reset()",
        "path = f'{name}_yours.py'",
        "'the name _yours'",
    ):
        assert not private_uses(line, private), line


def test_the_scripts_are_known():
    known = {"train_capi.py", "train_distributed.py", "benchmark.py", "demo.py", "export.py", "extract_features.py"}
    known |= {path.name for path in ROOT.glob("eval_*.py")}
    assert known <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_the_command_line_is_answered_before_torch_is_imported(script, option, code):
    command = [PYTHON, "-X", "importtime", script, option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    assert "usage:" in (done.stdout if code == 0 else done.stderr)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "utils" in imported, "importtime says nothing"
    assert not imported & {"torch", "numpy", "omegaconf"}


def test_submitting_a_job_needs_no_torch():
    code = "import sys, train_distributed; assert 'torch' not in sys.modules"
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_model_needs_torch_alone():
    """A user of torch.hub has torch; importing model.py must not ask for more."""
    allowed = {"torch", "utils", "weights", "jaxtyping", "omegaconf", "yaml"} | sys.stdlib_module_names
    assert imported_modules(ROOT / "model.py") <= allowed
    on_demand = {"huggingface_hub", "safetensors"}
    assert imported_modules(ROOT / "weights.py") <= {"torch", "utils"} | on_demand | sys.stdlib_module_names
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
    done = run_forked("-c", code)
    assert done.returncode == 0, done.stderr
