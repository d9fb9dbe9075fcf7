"""Small standard-library helpers that several modules use. No torch, no state, nothing runs on import."""

import argparse
import builtins
import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ParamSpec


class UserError(ValueError):
    """A mistake the user can fix: the message names key or file, value and remedy; scripts print no traceback."""

    told: bool | None = None
    """Whether another rank tells it, so that this one need not; None before ranks have met, when one of each machine
    does."""


P = ParamSpec("P")


# --- The command line: its parser, and how a script ends --------------------------------------------------------------


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
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so in the background of a shell
            signal.signal(signal.SIGINT, _leave_at_once)  # `ending_in_words` takes over after the imports


def _leave_at_once(number: int, _frame: FrameType | None) -> None:
    # No exception: it could come in the middle of an import, whose C code or `try` might take it for something else.
    os.write(STDERR, f"{_interrupted(number)}\n".encode())
    os._exit(128 + number)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C by another signal, `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


STDOUT, STDERR = 1, 2


def _interrupted(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"


def ending_in_words(main: Callable[P, int]) -> Callable[P, int]:
    """For the `main` of a script: what a user did ends in one line on stderr and an exit code, not in a traceback.

    A `UserError`, and an error of the system with one of the `REMEDIES`, give 2. Ctrl-C gives 130, another signal that
    was made an `Interrupted` 128 and its number, and a reader of stdout that left, such as `head`, 141. Anything else
    is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def in_words(*args: P.args, **kwargs: P.kwargs) -> int:
        if signal.getsignal(signal.SIGINT) is _leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            first_here = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
            if not (error.told or (error.told is None and not first_here)):
                sys.stderr.write(f"error: {error}\n")
            return 2
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            sys.stderr.write("; ".join([_interrupted(number), *getattr(error, "__notes__", [])]) + "\n")
            return 128 + number
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not _stdout_has_reader():
                os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # else the interpreter writes the rest at its end
                sys.stderr.write("stdout was closed before all was written\n")
                return 128 + signal.SIGPIPE
            if error.errno not in REMEDIES:
                raise
            sys.stderr.write(f"error: {reason(error)}; {REMEDIES[error.errno]}\n")
            return 2
        return code

    return in_words


def _stdout_has_reader() -> bool:
    poller = select.poll()
    poller.register(STDOUT, 0)
    return not poller.poll(0)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add `sources`, what `config.load_config` merges, and what `keys.answer` answers."""
    parser.add_argument("sources", nargs="*", metavar="config.yaml | a.b=c", help="in order; later ones win")
    parser.add_argument(
        "--help-all",
        nargs="?",
        const="",
        metavar="WORD",
        help="print every key with value, type and meaning, or those about a word, and stop",
    )
    parser.add_argument("--schema", action="store_true", help="print a JSON Schema of YAML files for editors and stop")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what every training script takes: `sources`, and what to do with them instead of training."""
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and stop")
    parser.add_argument("--print-config", action="store_true", help="check and print the resolved config and stop")
    parser.add_argument("--export", action="store_true", help="write the weights of the newest checkpoint and stop")


# --- Numbers ---------------------------------------------------------------------------------------------------------


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part: different purposes and positions give unrelated random streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, in pixels or patches, of what is given as the side of a square or as [height, width]."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def as_written(size: int | Sequence[int]) -> int | tuple[int, int]:
    """The one way in which configurations and files have a size: a square as its side, as always, else both sides."""
    height, width = both_sides(size)
    return height if height == width else (height, width)


def as_typed(size: int | Sequence[int]) -> str:
    """The same as one types it, for messages: `224` or `[224,448]`."""
    return str(as_written(size)).replace(" ", "").replace("(", "[").replace(")", "]")


# --- Values of images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bands:
    """What is made of the values of every image; see `bands.decode_bands`.

    Args:
        num: bands, those of the model.
        value_range: the stored values that become 0 and 1; what lies outside is clipped. None: images have 8 bits,
            which stay as they are.
    """

    num: int = 3
    value_range: tuple[float, float] | None = None

    @property
    def are_rgb8(self) -> bool:
        """Whether they are 8-bit RGB, of which Pillow alone knows all."""
        return self.num == 3 and self.value_range is None


RGB8 = Bands()


@dataclass(frozen=True)
class Turns:
    """How crops may be turned, beside being mirrored; see `crops.turned`."""

    do_vflip: bool = False
    do_turns: bool = False


UPRIGHT = Turns()


@dataclass(frozen=True)
class Normalisation:
    """How the values of an image become what a network sees, which travels with its weights.

    Values are scaled so that `value_range` becomes [0, 1], and clipped; then each band loses its mean, and is divided
    by its deviation.
    """

    value_range: tuple[float, float] | None = None
    """The lowest and highest value; None for 8 bits, 0 to 255."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each band, once it is scaled. By default those of ImageNet, as for `std`."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(self, values: Any) -> Any:
        """What a network sees of images, a tensor `[b, bands, h, w]` of values as they are stored; in float32."""
        low, high = self.value_range or (0, 255)
        scaled = ((values.double() - low) / (high - low)).clamp(0, 1).float()
        mean, std = (scaled.new_tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return (scaled - mean) / std

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> "Normalisation":
        """That of a training, by the section `data` of its configuration; one without these keys has the default.

        Raises: UserError if the section does not say it, as that of a training that has not begun.
        """
        given = {key: (section or {}).get(key) for key in ("value_range", "mean", "std")}
        for key, value in given.items():
            numbers = [value] if not isinstance(value, list | tuple) else list(value)
            if value is not None and not all(isinstance(x, int | float) for x in numbers):
                raise UserError(f"data.{key}={value!r}: says no numbers; give the configuration beside the weights")
        said: dict[str, Any] = {key: tuple(map(float, value)) for key, value in given.items() if value is not None}
        return cls(**said)

    def describe(self) -> str:
        """In words that a program can follow."""
        low, high = self.value_range or (0, 255)
        numbers = (", ".join(f"{x:g}" for x in each) for each in (self.mean, self.std))
        return "values from {:g} to {:g} as 0 to 1, minus ({}), divided by ({})".format(low, high, *numbers)


# --- Child processes -------------------------------------------------------------------------------------------------


START_WITH_PARENT = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from utils import end_with_parent, unblock; "
    "import signal; unblock(signal.valid_signals()); end_with_parent(signal.SIGTERM, int(sys.argv[2])); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])"
)
PR_SET_PDEATHSIG = 1
END_S = 40
"""How long a process may take to end; torchrun gives its own processes 30 s."""


def unblock(signals: Collection[int]) -> None:
    """Let signals through that who started this process has blocked; Windows knows no such thing."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Have the system send this process a signal when the process that started it is gone, however that ended.

    Linux can, and keeps to it over an `exec`; elsewhere this does nothing.

    Args:
        number: the signal.
        parent: its process id, to notice that it ended before this call; None takes that of now.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def start_python(arguments: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Run Python in a process that ends with this one, also if this one is killed. Call it in the main thread.

    The system watches the thread, not the process. Not `preexec_fn`: it may deadlock beside other threads.

    Args:
        arguments: of Python: a script and its arguments.
        options: of `subprocess.Popen`.
    """
    root = str(Path(__file__).parent)
    return subprocess.Popen([sys.executable, "-c", START_WITH_PARENT, root, str(os.getpid()), *arguments], **options)


def end_process(*processes: "subprocess.Popen[Any]", group: bool = False) -> None:
    """Ask processes to end, and wait until all have; after `END_S`, or if this wait is interrupted, kill the others.

    Args:
        processes: may have ended.
        group: whether each leads a session of its own, all of which is meant.
    """

    def send(number: signal.Signals) -> None:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number) if group else process.send_signal(number)

    send(signal.SIGTERM)
    end = time.monotonic() + END_S
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        send(signal.SIGKILL)
        for process in processes:
            process.wait()


@contextlib.contextmanager
def ended_with_block(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Signals that ask this process to end, and errors in the block, first end `process`; then they go their way.

    SIGTERM and SIGHUP become `Interrupted` meanwhile, as SIGINT is `KeyboardInterrupt`; one that is ignored (`nohup`)
    stays so. For the main thread.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    previous = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        try:
            end_process(process)
        finally:  # also if a second signal interrupts the wait
            for number, handler in previous.items():
                signal.signal(number, handler)


# --- Small things ----------------------------------------------------------------------------------------------------


def due(step: int, every: int) -> bool:
    """Whether something that happens each `every` finished steps happens now. `every <= 0` means never."""
    return every > 0 and step % every == 0


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that looks most like `name`, whatever the case; None if none is as similar as `cutoff`, of 1."""
    by_lower = {other.lower(): other for other in known}
    return next((by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them."""
    known = list(known)
    close = closest(name, known)
    return f"; did you mean {close}?" if close else f"; there are: {', '.join(known) or 'none'}"


def import_from_path(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, whatever folder it is in; what it imports may be files beside it.

    Raises: UserError if it is not a Python file or imports something that is not installed.
    """
    if path.suffix != ".py":
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    path = of_this_code(path)
    folder = path.resolve().parent
    try:
        if folder == Path(__file__).resolve().parent and path.stem.isidentifier():
            return importlib.import_module(path.stem)
        return FolderOfModules(folder, f"{folder.name}_at_{abs(hash(folder)):x}".replace(".", "_")).run(path)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{path} cannot be imported: {error}") from error


def of_this_code(path: Path) -> Path:
    """The file of the code that runs, for one of the folder of which it is a copy for a job; any other as it is.

    A job runs in the folder where it was submitted, so that `model.py` would be another module than the one that the
    code imports, and perhaps have changed since.
    """
    here = Path(__file__).resolve().parent
    try:
        copied = here / path.resolve().relative_to((here / "ORIGIN").read_text().strip())
    except (OSError, ValueError):
        return path
    return copied if copied.is_file() else path


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


class _LineOnFaults(logging.Handler):
    """Says once, in a line of its own, that it cannot write, where others give a traceback for every line."""

    place = "stderr"
    has_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name that logging has for it
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_told:
            self.has_told = True  # first: the line goes to all handlers
            remedy = REMEDIES.get(error.errno or 0, "look what happened to it")
            logging.getLogger(__name__).warning("%s cannot be written: %s; %s", self.place, reason(error), remedy)


class _Console(_LineOnFaults, logging.StreamHandler):
    pass


class _LogFile(_LineOnFaults, logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.place = repr(str(path))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write, it has told
            super().close()


def setup_logging(log_path: Path | None = None, *, quiet: bool = False) -> None:
    """Log to stderr, and to `log_path` if given. `quiet` leaves warnings and errors alone on stderr.

    What cannot be written stops nothing, and is told once, by those of the two that can be.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text; stderr and the log escape them too
        sys.stdout.reconfigure(errors="backslashreplace")
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    console = _Console(sys.stderr)
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if log_path is not None:
        handlers.append(_LogFile(log_path))
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


# --- Files -----------------------------------------------------------------------------------------------------------

REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "files may not become that large here (ulimit -f): raise the limit",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "give yourself the permission to write, or choose another place",
    errno.EPERM: "give yourself the permission to write, or choose another place",
    errno.EISDIR: "a folder is where a file belongs: move it away",
    errno.ENOTDIR: "a file is where a folder belongs: move it away",
    errno.EEXIST: "a file is where a folder belongs: move it away",
    errno.ELOOP: "a symbolic link points to itself: remove it",
    errno.EIO: "the disk reports a fault: look after it, or choose another place",
    errno.ESTALE: "the file system has lost the folder: mount it again",
}
"""What a user can do about an OSError of this number."""


def reason(error: OSError) -> str:
    """Words of the system for an error, with the file it is about if it says so."""
    where = f": {os.fsdecode(error.filename)!r}" if isinstance(error.filename, str | bytes) else ""
    return f"{error.strerror or error}{where}"


@contextlib.contextmanager
def writing_explained(folder: Path, key: str) -> Iterator[None]:
    """Within the block, an OSError about something in `folder`, or about a full disk, is a UserError with a remedy.

    Args:
        folder: where the block writes.
        key: of the configuration that names it.
    """
    try:
        yield
    except OSError as error:
        names_file = isinstance(error.filename, str | bytes)
        inside = names_file and Path(os.path.abspath(os.fsdecode(error.filename))).is_relative_to(folder.absolute())  # noqa: PTH100  # a link is not followed
        if not inside and (names_file or error.errno not in REMEDIES):
            raise
        remedy = REMEDIES.get(error.errno or 0, "look what happened to that folder")
        if not folder.is_dir():
            remedy = "the folder was moved or deleted while it was used, or a disk is not mounted: bring it back"
        raise UserError(f"{key}={str(folder)!r} cannot be written: {reason(error)}; {remedy}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, also one after a crash, finds the old text or the new one and nothing between."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name to write to, which becomes `path` in one step when the block ends, or is deleted if it raises.

    Whatever a killed process or somebody else left under that name is removed and never written to: the file is a new
    one, and no link.

    Args:
        path: file to write or replace.
        shared: whether several processes may replace it at the same time.

    Raises: UserError where `path` is a device or a pipe, which a privileged user would replace.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a device or a pipe, in whose place a file would come; choose another path")
    temporary = path.with_name(f".tmp-{path.name}{f'-{uuid.uuid4().hex}' if shared else ''}")
    remove(temporary)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file's content in hexadecimal; `algorithm` is one of hashlib's, for detecting damage."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_file(path: Path, *, wait: bool = True) -> int | None:
    """Lock a file, made if need be, against all other processes until the returned descriptor is closed.

    The kernel takes the lock from a dead process, so nothing has to be cleaned up after a crash.

    Args:
        path: the file, whose content does not matter.
        wait: whether to wait until no other process holds it.

    Returns: the open file's descriptor; None where the system, or that file system, has no locks.
    Raises: BlockingIOError if another process holds it and `wait` is False; OSError if the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError) as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno not in NO_LOCKS_HERE:
            raise
        return None
    return descriptor


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time is in a block with this lock file; without locks (see `lock_file`) nobody waits."""
    descriptor = lock_file(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete what has this name, if anything: a file, a folder with all in it, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk. Windows cannot be asked to."""
    if os.name == "nt":  # it opens no folders, and takes for a sync the right to write
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
