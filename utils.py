"""Small standard-library helpers that several modules use. No torch, no state, nothing runs on import."""

import argparse
import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


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
    """Run a Python file as a module of its own, whatever folder it is in.

    Raises: UserError if it is not a Python file or imports something that is not installed.
    """
    name = f"{path.stem}_at_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{path} cannot be imported: {error}") from error
    return module


def setup_logging(log_path: Path | None = None, *, quiet: bool = False) -> None:
    """Log to stderr, and to `log_path` if given. `quiet` leaves warnings and errors alone on stderr."""
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
