"""A stand-in for Python that saves the imports: scripts are forked off a server which has imported torch and others.

    subprocess.run([sys.executable, "script.py"])
      |                                                                    .- arguments, folder, environment, -.
      v                                                                    |  signal mask, stdin/out/err       v
    stand-in, 20 ms of Python without packages  -------------------- socket -------------------------->  server
      ^  signals that it gets go to the script; when it is gone, the script is killed                      | fork
      '------------------------- exit code, or the signal that ended it ------------------------------  script.py

The script imports the repository anew, has a session of its own, and whatever it starts by `sys.executable` is forked
too. What differs from a process of its own: it and its parent see other process ids of each other; its processor time
is not among that of its parent's children; packages are imported already, so a part of one that is used without being
imported is not noticed. What the stand-in cannot do, such as `-W`, it leaves to Python itself.

The first stand-in starts the server, which ends with the process that called `make_stand_in`.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TextIO

ROOT = Path(__file__).parent.parent
OWN_FOLDERS = {
    str(ROOT / folder)
    for folder in (".", "baselines", "bench", "demo_data", "experiments", "reading", "speed", "tasks", "tests")
}
"""Where modules of the repository are."""
PRELOADED = (
    "datasets",
    "eval_classification",
    "eval_segmentation",
    "eval_visualizations",
    "submitit",
    "torch._inductor.compile_fx",
    "torch.distributed.run",
    "train_capi",
)
"""What the server imports. What is the repository's own is imported anew by every script: it brings its packages."""

STAND_IN = """\
#!{python} -IS
import os, sys

arguments = sys.argv[1:]
if arguments[:1] == ["-c"] and "os.execv(sys.executable" in arguments[1]:
    sys.executable, sys.argv = os.path.abspath(__file__), arguments[:1] + arguments[2:]
    exec(arguments[1])
script = next((word for word in arguments if word != "-u"), "")
if not script.endswith(".py") and arguments[:1] != ["-c"] and arguments[:1] != ["-m"] or script.startswith({prefix!r}):
    os.execv({python!r}, [{python!r}, *arguments])

import fcntl, json, select, signal, socket, struct, time

def connect():
    connection = socket.socket(socket.AF_UNIX)
    connection.connect({folder!r} + "/socket")
    return connection

try:
    connection = connect()
except OSError:
    with open({folder!r} + "/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection = connect()
        except OSError:
            if os.fork() == 0:
                if os.fork() == 0:
                    os.setsid()
                    log = os.open({folder!r} + "/log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    for number in range(3):
                        os.dup2(log if number else os.open(os.devnull, os.O_RDONLY), number)
                    with open({folder!r} + "/environ.json") as file:
                        os.execve({python!r}, [{python!r}, {server!r}, {folder!r}, {owner!r}], json.load(file))
                os._exit(0)
            os.wait()
            end = time.monotonic() + 120
            while True:
                try:
                    connection = connect()
                    break
                except OSError:
                    if time.monotonic() > end:
                        sys.exit("the server did not start, see " + {folder!r} + "/log.txt")
                    time.sleep(0.02)

mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
request = json.dumps([arguments, os.getcwd(), dict(os.environ), os.path.abspath(__file__), list(map(int, mask))])
request = request.encode("utf-8", "surrogateescape")
socket.send_fds(connection, [struct.pack("i", len(request))], [0, 1, 2])
connection.sendall(request)
pid = struct.unpack("i", connection.recv(4))[0]

def forward(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass

# A signal that comes just before a call that waits would be handled after it: this pipe ends the waiting.
came, comes = os.pipe()
os.set_blocking(comes, False)
signal.set_wakeup_fd(comes)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, forward)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
while connection not in select.select([connection, came], [], [])[0]:
    os.read(came, 1024)
answer = connection.recv(4)
if not answer:
    sys.exit("the server is gone, see " + {folder!r} + "/log.txt")
code = struct.unpack("i", answer)[0]
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def make_stand_in(folder: str) -> str:
    """A program to put in the place of `sys.executable`, which serves as long as this process lives.

    Args:
        folder: an empty one with a short name, for a socket's may have about a hundred characters.
    """
    environ = {**os.environ, "JAXTYPING_DISABLE": "1"}
    Path(folder, "environ.json").write_text(json.dumps(environ))
    program = Path(folder, "python")
    places = {"python": sys.executable, "prefix": sys.prefix, "folder": folder, "server": __file__}
    program.write_text(STAND_IN.format(**places, owner=str(os.getpid())))
    program.chmod(0o755)
    return str(program)


def _serve(folder: str, owner: int) -> None:
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays, and need not be looked through, nor copied because it was
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket.new")
    listener.listen(64)
    Path(folder, "socket.new").rename(f"{folder}/socket")
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector.register(ended, selectors.EVENT_READ)
    connections: dict[socket.socket, int] = {}
    while _is_alive(owner):
        for key, _ in selector.select(1.0):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, files = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for open_socket in (listener, connection, *connections):
                        open_socket.close()
                    selector.close()
                    os.close(ended)
                    os.close(wake)
                    _run_script(*request, files=files)
                for file in files:
                    os.close(file)
                connections[connection] = pid
                selector.register(connection, selectors.EVENT_READ)
                with contextlib.suppress(OSError):
                    connection.sendall(struct.pack("i", pid))
            elif key.fileobj == ended:
                os.read(ended, 1024)
                _reap(connections, selector)
            elif key.fileobj in connections:  # the stand-in is gone
                assert isinstance(key.fileobj, socket.socket)
                selector.unregister(key.fileobj)
                _kill(connections[key.fileobj])
    for pid in connections.values():
        _kill(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[list, array.array]:
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("i", head)
    content = b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    return json.loads(content.decode("utf-8", "surrogateescape")), array.array("i", files)


def _reap(connections: dict[socket.socket, int], selector: selectors.BaseSelector) -> None:
    for connection, pid in list(connections.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
            with contextlib.suppress(KeyError):
                selector.unregister(connection)
            connection.close()
            del connections[connection]


def _run_script(
    arguments: list[str], cwd: str, environ: dict[str, str], executable: str, mask: list[int], *, files: array.array
) -> NoReturn:
    """What `python *arguments` does in that folder and environment, until it ends."""
    code = 1
    try:
        _take_place(cwd, environ, files, is_buffered=arguments[0] != "-u")
        sys.executable = executable
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _execute(arguments[1:] if arguments[0] == "-u" else arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and end.code != 1:
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001  # shown, as Python does
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # waits for threads, as Python does
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code & 0xFF)


def _take_place(cwd: str, environ: dict[str, str], files: array.array, *, is_buffered: bool) -> None:
    """Take over a session, folder, environment and streams, and forget the repository's modules."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    encoding, _, errors = environ.get("PYTHONIOENCODING", "utf-8:strict").partition(":")

    def opened(number: int, mode: str, errors: str) -> TextIO:
        stream = open(number, mode, encoding=encoding, errors=errors)  # noqa: SIM115
        if mode == "w":
            stream.reconfigure(line_buffering=number == 2, write_through=not is_buffered)
        return stream

    sys.stdin, sys.stdout = opened(0, "r", errors), opened(1, "w", errors)
    sys.stderr = opened(2, "w", "backslashreplace")
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") in OWN_FOLDERS:  # noqa: PTH120  # of thousands
            del sys.modules[name]
    if "OMP_NUM_THREADS" in environ:
        sys.modules["torch"].set_num_threads(int(environ["OMP_NUM_THREADS"]))


def _execute(arguments: list[str]) -> None:
    """Run a script, a module (`-m`) or code (`-c`) as the main module."""
    first, *rest = arguments
    sys.path[:] = [
        {"-c": "", "-m": str(Path.cwd())}.get(first, str(Path(first).parent.absolute())),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        *(path for path in sys.path if path not in OWN_FOLDERS),
    ]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # or runpy warns
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
