"""Small standard-library helpers that several modules use. No torch, no state, nothing runs on import."""

import argparse
import builtins
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class UserError(ValueError):
    """A mistake the user can fix: the message names key or file, value and remedy; scripts print no traceback."""


@contextlib.contextmanager
def command_line(doc: str | None, name: str) -> Iterator[argparse.ArgumentParser]:
    """The parser of a script's arguments: they are added in the block, and `main` parses with what it yields.

        with command_line(__doc__, __name__) as parser:
            parser.add_argument("--dry-run", action="store_true", help="...")

    A script has the block before its other imports. When it ends in the script that was started, `--help` and mistakes
    that the parser sees are answered: without torch, which takes seconds to import.

    Args:
        doc: the script's docstring, which `--help` shows.
        name: its `__name__`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    yield parser
    if name == "__main__":
        parser.parse_intermixed_args()


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add `sources`, what `config.load_config` merges."""
    parser.add_argument("sources", nargs="*", metavar="config.yaml | a.b=c", help="in order; later ones win")


def due(step: int, every: int) -> bool:
    """Whether something that happens each `every` finished steps happens now. `every <= 0` means never."""
    return every > 0 and step % every == 0


def import_from_path(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, whatever folder it is in; what it imports may be files beside it.

    Raises: UserError if it is not a Python file or imports something that is not installed.
    """
    if path.suffix != ".py":
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    folder = path.resolve().parent
    try:
        if folder == Path(__file__).resolve().parent and path.stem.isidentifier():
            return importlib.import_module(path.stem)
        return FolderOfModules(folder, f"{folder.name}_at_{abs(hash(folder)):x}".replace(".", "_")).run(path)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{path} cannot be imported: {error}") from error


_ONE_AT_A_TIME = threading.RLock()


class FolderOfModules:
    """Runs the modules of a folder below a package of their own, for each other and for nobody else.

    `import utils` in one of them, at any time, means the `utils.py` beside it, which becomes the module
    `<package>.utils`. `sys.path` and the names of the program's own modules, `utils` among them, stay what they are.
    Where the program has that very file as `utils`, because it runs in that folder, it is that module.

    Args:
        folder: absolute, without symbolic links.
        package: name of the package.
        hidden: packages that appear not to be installed.
    """

    def __init__(self, folder: Path, package: str, hidden: Collection[str] = ()) -> None:
        self.folder, self.package, self.hidden = folder, package, hidden
        sys.modules.setdefault(package, ModuleType(package)).__path__ = [str(folder)]

    def run(self, path: Path) -> ModuleType:
        """Run a file of the folder, whatever its name, also if it was run before."""
        name = f"{self.package}.{path.stem.replace('.', '_')}"
        return self._execute(importlib.util.spec_from_file_location(name, path))

    def import_module(
        self, name: str, scope: Any = None, local: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> ModuleType:
        """What the builtin `__import__` does, but the folder comes before all places except Python's own library."""
        scope = scope or {}
        if name.partition(".")[0] in self.hidden and not level:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        inner = importlib.util.resolve_name("." * level + name, scope.get("__package__")) if level else name
        inner = inner.removeprefix(f"{self.package}.") if level else inner
        if inner == self.package or not (level or self._is_beside(name.partition(".")[0], scope)):
            return builtins.__import__(name, scope, local, fromlist or (), level)
        parts = inner.split(".")
        modules = [self._load(".".join(parts[: end + 1])) for end in range(len(parts))]
        for item in fromlist or ():
            if hasattr(modules[-1], "__path__") and not hasattr(modules[-1], item) and self._find(f"{inner}.{item}"):
                self._load(f"{inner}.{item}")
        return modules[-1] if fromlist else modules[0]

    def _is_beside(self, name: str, scope: dict[str, Any]) -> bool:
        """Whether `import <name>` in a module with these globals means a module of the folder."""
        full_name, spec = f"{self.package}.{name}", self._find(name)
        if spec is None or name in sys.stdlib_module_names:
            return False
        if scope.get("__name__") == full_name and "__path__" not in scope:
            return False  # a file may be called like the package that it imports
        if spec.origin is None:  # a folder that may hold anything, images for example
            return full_name in sys.modules or importlib.util.find_spec(name) is None
        in_program = getattr(sys.modules.get(name), "__file__", None)
        return in_program is None or Path(in_program).resolve() != Path(spec.origin).resolve()

    def _load(self, name: str) -> ModuleType:
        with _ONE_AT_A_TIME:
            return sys.modules.get(f"{self.package}.{name}") or self._execute(self._find(name), name)

    def _find(self, name: str) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        path = getattr(self._load(parent), "__path__", []) if parent else [str(self.folder)]
        return PathFinder.find_spec(f"{self.package}.{name}", path)

    def _execute(self, spec: ModuleSpec | None, name: str = "") -> ModuleType:
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r} in {str(self.folder)!r}", name=name)
        module = importlib.util.module_from_spec(spec)
        # An import statement calls the __import__ among the builtins of the module that it is in.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self.import_module}
        sys.modules[spec.name] = module
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(sys.modules.pop, spec.name, None)
            if spec.loader is not None:  # else a folder without __init__.py
                spec.loader.exec_module(module)
            if_it_fails.pop_all()
        parent, _, child = spec.name.rpartition(".")
        setattr(sys.modules[parent], child, module)
        return module


def setup_logging(log_path: Path | None = None, *, quiet: bool = False) -> None:
    """Log to stderr, and to `log_path` if given. `quiet` leaves warnings and errors alone on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text; stderr and the log escape them too
        sys.stdout.reconfigure(errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if log_path is not None:
        handlers.append(logging.FileHandler(log_path, errors="backslashreplace"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.setLevel(max(handler.level, logging.INFO))  # loggers of libraries may be set to more
        root.addHandler(handler)


def git_revision(*ignoring: str) -> str | None:
    """Commit of this source tree, with `+changes` if it was modified, or None outside a git checkout.

    Args:
        ignoring: paths from the root of the tree whose changes do not count.
    """
    root = Path(__file__).parent
    with contextlib.suppress(FileNotFoundError):  # a job's copy of the code says what it was copied from
        return (root / "REVISION").read_text().strip()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    which = [".", *(f":(exclude){path}" for path in ignoring)]
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no", "--", *which) else commit


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, also one after a crash, finds the old text or the new one and nothing between."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` in one step when the block ends, or is deleted if it raises."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
