"""A Python program in a process of its own, with the packages of this checkout."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def run_python(script, *arguments, env=None):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": f"{REPO / 'model'}:{REPO}", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
