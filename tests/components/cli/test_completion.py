"""Bash completes commands, options, steps and profiles, with the script that `--install-completion` installs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("univigu")
TAB = """eval "$(_UNIVIGU_COMPLETE=source_bash univigu)"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
$(complete -p univigu | sed 's/.*-F \\([^ ]*\\) .*/\\1/') univigu
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash") or not COMMAND.is_file(), reason="there is no bash, or no command")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["mod"], ["model"]),
        (["model", "pro"], ["promote"]),
        (["generate", "--se"], ["--seed"]),
        (["run", "train"], ["train-stage-1", "train-stage-2"]),
        (["run", "train-stage-1", "--profile", "wan-1"], ["wan-1.3b", "wan-14b"]),
        (["use", "smo"], ["smoke"]),
    ],
)
def test_bash_completes(words, offered, monkeypatch):
    monkeypatch.setenv("PATH", f"{COMMAND.parent}:/usr/bin:/bin")
    done = subprocess.run(
        ["bash", "--norc", "-c", TAB, "bash", "univigu", *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offered, done.stderr


def test_version_is_one_line(capfd):
    subprocess.run([sys.executable, "-m", "components.cli.main", "--version"], check=True)
    out, err = capfd.readouterr()
    assert (out.split()[0], out.count("\n"), err) == ("univigu", 1, "")
