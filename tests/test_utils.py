"""utils.py: temporary files, processes that end with their parent, and how a script ends."""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import PYTHON, ROOT

from utils import (
    REMEDIES,
    Interrupted,
    UserError,
    ended_with_block,
    ending_in_words,
    remove,
    replacing,
    write_text_atomically,
    writing_explained,
)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Python code in a process of its own, with what it and its children print."""
    command = [PYTHON, "-u", "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children, and has /dev/full")


# Temporary files


@pytest.mark.parametrize("kind", ["link", "link to nothing", "file", "folder"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_stands_under_the_temporary_name_is_neither_followed_nor_in_the_way(tmp_path, kind, shared):
    planted, victim = tmp_path / ".tmp-report.txt", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "folder":
        (planted / "in").mkdir(parents=True)
        (planted / "in" / "link").symlink_to(victim)
    elif kind == "file":
        planted.write_text("half a rep")
    else:
        planted.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    with replacing(tmp_path / "report.txt", shared=shared) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "report.txt").read_text() == "whole"
    assert not (tmp_path / "report.txt").is_symlink()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    assert shared or not os.path.lexists(planted)


def test_a_file_comes_in_the_place_of_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a device or a pipe"):
        write_text_atomically(tmp_path / "pipe", "text")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_a_file_written_atomically_has_the_permissions_of_any_other(tmp_path):
    write_text_atomically(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


# Errors of the system


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_is_explained_although_the_error_names_no_file(tmp_path, number):
    with pytest.raises(UserError) as caught, writing_explained(tmp_path, "train.output_dir"):
        raise OSError(number, os.strerror(number))
    words = f"train.output_dir={str(tmp_path)!r} cannot be written: {os.strerror(number)}; {REMEDIES[number]}"
    assert str(caught.value) == words


def test_a_folder_that_is_gone_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*bring it back"), writing_explained(tmp_path / "run", "key"):
        (tmp_path / "run" / "metrics.jsonl").open("a")


def test_errors_about_other_files_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), writing_explained(tmp_path / "run", "key"):
        (tmp_path / "data").open()
    with pytest.raises(ConnectionResetError), writing_explained(tmp_path / "run", "key"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


# The log


@linux
@pytest.mark.parametrize("takes_stderr", [True, False])
def test_a_log_that_cannot_be_written_says_so_once_and_all_goes_on(tmp_path, takes_stderr):
    """A full disk below the log file, or below what stderr goes to; with more lines than wait in buffers."""
    process = start("""
        import logging, sys
        from pathlib import Path
        from utils import setup_logging

        if sys.argv[2] != "-":
            sys.stderr = open(sys.argv[2], "w")
        setup_logging(Path(sys.argv[1]))
        for number in range(300):
            logging.getLogger("a").info("line %d %s", number, "x" * 100)
        setup_logging()
        print("goes on")
    """, *(("/dev/full", "-") if takes_stderr else (str(tmp_path / "log.txt"), "/dev/full")))  # fmt: skip
    out, error = process.communicate(timeout=60)
    assert out == "goes on\n", error[-3000:]
    assert process.returncode == 0 or not takes_stderr  # Python itself minds what was left in stderr at its end
    lines = (error if takes_stderr else (tmp_path / "log.txt").read_text()).splitlines()
    own = [line for line in lines if re.match(r"[\d:]{8} I a: line \d+ x+$", line)]
    (said,) = (line for line in lines if line not in own)
    assert len(own) == 300
    place = "'/dev/full'" if takes_stderr else "stderr"
    assert said.endswith(f": {place} cannot be written: No space left on device; {REMEDIES[errno.ENOSPC]}")


def test_a_mistake_in_a_line_of_the_log_keeps_its_traceback(tmp_path):
    process = start("import logging, utils; utils.setup_logging(); logging.info('%d', 'x')")
    assert "TypeError: %d format" in process.communicate(timeout=60)[1]


# How a script ends


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("a=1: must be 2"), 2, "error: a=1: must be 2"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x/y"),
            2,
            "error: Permission denied: 'x/y'; give yourself",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; make room"),
    ],
)
def test_what_a_user_did_ends_in_one_line(capsys, raised, code, line):
    @ending_in_words
    def main() -> int:
        raise raised

    assert main() == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("told", "environ", "speaks"),
    [
        (None, {"RANK": "8", "LOCAL_RANK": "0"}, True),
        (None, {"RANK": "9", "LOCAL_RANK": "1"}, False),
        (None, {"SLURM_LOCALID": "1"}, False),
        (None, {}, True),
        (False, {"RANK": "9", "LOCAL_RANK": "1"}, True),
        (True, {"RANK": "0", "LOCAL_RANK": "0"}, False),
    ],
)
def test_one_rank_speaks_for_those_that_have_the_same_error(capsys, monkeypatch, told, environ, speaks):
    for name in ("RANK", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    @ending_in_words
    def main() -> int:
        error = UserError("a=1: must be 2")
        error.told = told
        raise error

    assert main() == 2
    assert capsys.readouterr().err == ("error: a=1: must be 2\n" if speaks else "")


@pytest.mark.parametrize("bug", [ValueError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), BrokenPipeError(32, "x")])
def test_a_bug_keeps_its_traceback(bug):
    @ending_in_words
    def main() -> int:
        raise bug

    with pytest.raises(type(bug)):
        main()


def test_a_reader_of_stdout_that_leaves_is_no_traceback():
    process = start("""
        import sys
        from utils import ending_in_words

        @ending_in_words
        def main():
            sys.stdin.read()
            sys.stdout.write("word " * 100_000)
            return 0

        sys.exit(main())
    """)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (141, "stdout was closed before all was written\n")


def test_ctrl_c_during_the_imports_of_a_script_is_one_line():
    process = start("""
        from utils import command_line
        with command_line("doc", "__main__") as parser:
            pass
        print("importing")
        try:
            import time
            time.sleep(600)
        except BaseException:
            print("an import took it for its own")
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


# Processes that end with their parent. Nobody is left when the pipe to which all of them print ends.

PARENT = """
    import sys
    from utils import ended_with_block, ending_in_words, start_python

    @ending_in_words
    def main():
        child = "import os, time; print(os.getppid(), flush=True); time.sleep(600)"
        with start_python(["-u", "-c", child]) as process, ended_with_block(process):
            return process.wait()

    sys.exit(main())
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=linux),
    ],
)
def test_a_child_ends_with_its_parent_whatever_ends_that(number, code):
    process = start(PARENT)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{process.pid}\n", "something stands between parent and child"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")


def test_a_second_signal_while_a_child_is_ended_leaves_no_handler_behind():
    """`timeout` sends two; what handles the second would raise from wherever the process is then."""

    class Impatient:
        pid = 0

        def poll(self):
            return None

        def send_signal(self, number):
            pass

        def wait(self, timeout=None):
            if timeout is not None:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), ended_with_block(cast("Any", Impatient())):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@linux
def test_a_child_whose_parent_was_faster_to_end_notices():
    process = start("import signal, utils; utils.end_with_parent(signal.SIGTERM, 1234567); print('goes on')")
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == -signal.SIGTERM


@linux
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path: Path):
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils import command_line\n"
        "with command_line('doc', __name__): pass\n"
        "os.write(1, f'rank {os.environ[\"RANK\"]}\\n'.encode())\n"  # in one piece: the ranks share the pipe
        "time.sleep(600)\n"
    )
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    lines = sorted(process.stdout.readline() for _ in range(2))
    process.kill()
    assert lines == ["rank 0\n", "rank 1\n"], (tmp_path / "stderr").read_text()
    assert process.communicate(timeout=60)[0] == ""
