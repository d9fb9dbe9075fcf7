"""What stands in for Python while tests run behaves as a process of Python's own does, or leaves it to Python."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import PYTHON, ROOT

from utils import start_python

SAY_ALL = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "environment": os.environ.get("OF_A_TEST"), "name": __name__,
    "input": sys.stdin.read(), "mask": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "path": sys.path[0], "hidden": "OUTSIDE" in os.environ, "encoding": sys.stdout.encoding,
}))
print("é", file=sys.stderr)
import atexit, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
sys.exit(CODE)
"""


def run(python, *arguments, **options):
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False, timeout=60, **options)


def outcome(done):
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("code", ["0", "None", "7", "'a sentence'"])
def test_a_script_finds_and_leaves_what_it_would_in_a_process_of_its_own(code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAY_ALL.replace("CODE", code))
    options = {"cwd": tmp_path, "env": {"OF_A_TEST": "é=1"}, "input": "line\n"}
    expected = outcome(run(PYTHON, script, "a b", "", **options))
    assert outcome(run(sys.executable, script, "a b", "", **options)) == expected
    assert outcome(run(sys.executable, "-u", script, "a b", "", **options)) == expected
    assert "-u" in run(sys.executable, "-u", script, "-u", **options).stdout, "it is an argument of the script"


def test_code_and_modules_run_as_in_a_process_of_their_own(tmp_path):
    (tmp_path / "own.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    for arguments in (
        ["-c", "import sys; print(__name__, sys.argv)", "x"],
        ["-m", "own", "x"],
        ["-W", "ignore", "own.py"],
    ):
        expected = outcome(run(PYTHON, *arguments, cwd=tmp_path))
        assert outcome(run(sys.executable, *arguments, cwd=tmp_path)) == expected, arguments
    done = run(sys.executable, "-c", "int('x')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: invalid literal for int() with base 10: 'x'\n")


def test_the_repository_is_imported_anew_and_packages_are_there_already():
    code = "import sys; print('utils' in sys.modules, 'torch' in sys.modules); import utils; print(utils.__file__)"
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": "/nowhere"})
    assert done.stdout.startswith("False True\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_reaches_the_script_and_what_ends_it_ends_the_stand_in(number):
    code = "import time; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(30) == -number
    handled = f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(5)); {code}"
    with subprocess.Popen([sys.executable, "-c", handled], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(30) == 5


def test_a_script_does_not_outlive_its_stand_in_nor_that_its_parent():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = start_python(["-c", code], stdout=subprocess.PIPE)
    script = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert is_gone(script)
    parent = (
        f"import sys; sys.executable = {sys.executable!r}; import utils; utils.start_python(['-c', {code!r}]).wait()"
    )
    with subprocess.Popen([PYTHON, "-c", parent], stdout=subprocess.PIPE, cwd=ROOT) as process:
        script = int(process.stdout.readline())
        process.kill()
    assert is_gone(script)


def is_gone(pid, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False
