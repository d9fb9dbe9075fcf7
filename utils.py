"""Small standard-library helpers that several modules use. No torch, no state, nothing runs on import."""

import contextlib
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType


class UserError(ValueError):
    """A mistake the user can fix: the message names key or file, value and remedy; scripts print no traceback."""


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
    except ImportError as error:
        raise UserError(f"{path} cannot be imported: {error}") from error
    return module


def setup_logging(log_path: Path | None = None, *, quiet: bool = False) -> None:
    """Log to stderr, and to `log_path` if given. `quiet` leaves warnings and errors alone on stderr."""
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if log_path is not None:
        handlers.append(logging.FileHandler(log_path))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.setLevel(max(handler.level, logging.INFO))  # loggers of libraries may be set to more
        root.addHandler(handler)


def git_revision() -> str | None:
    """Commit of this source tree, with `+changes` if it was modified, or None outside a git checkout."""
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
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
