"""The process of a rank exits as Python does, without the shutdown that gloo's threads can abort."""

import subprocess
import sys

import pytest


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def work(*command):
    return python("-m", "univigu.training.worker", *command)


ENDS = """
import atexit, sys, threading, time

import beside

def finish():
    time.sleep(0.2)
    print("the thread has ended")

atexit.register(print, "at exit", __name__, sys.argv)
threading.Thread(target=finish).start()
sys.stdout.write("no newline yet ")
{}
"""


@pytest.mark.parametrize(
    ("end", "code", "stderr_end"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(81)", 81, ""),
        ("sys.exit('a word')", 1, "a word\n"),
        ("raise ValueError('not caught')", 1, "ValueError: not caught\n"),
    ],
)
def test_a_script_exits_as_under_python_itself(tmp_path, end, code, stderr_end):
    (tmp_path / "beside.py").touch()
    script = tmp_path / "script.py"
    script.write_text(ENDS.format(end))
    done, plain = work(script, "--option"), python(script, "--option")
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout)
    assert done.stdout == f"no newline yet the thread has ended\nat exit __main__ {[str(script), '--option']}\n"
    assert done.returncode == code
    assert done.stderr.endswith(stderr_end)


@pytest.mark.slow
def test_a_module_gets_its_own_arguments():
    done = work("-m", "components.cli.main", "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert work("-m", "components.cli.main", "--no-such-option").returncode == 2
