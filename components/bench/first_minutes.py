"""How long a newcomer waits: from `git clone` to a first clip, a first caption and the notebook, in a fresh clone.

Packages come from the local cache of the installer where it has them, so this is the time with packages at hand; the
first installation on a machine downloads them in addition. The clone has the last commit, and the bundled model makes
the clip and its caption. The notebook's cells are run as one program; it is left out where the commit has none.

`ratio` is the time to the first clip (clone, install and generate) over the `TARGET` of two minutes.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univigu.errors import UniViGUError

REPO = Path(__file__).resolve().parents[2]
TARGET = 120.0  # seconds to the first clip
NOTEBOOK = Path("docs/quickstart.ipynb")
PROMPT = "a red seven moves to the right"
TAIL = 500  # characters of a failed command's output in the error


def measure(source: Path = REPO) -> dict[str, Any]:
    """The `seconds` of each part, in order, and `to_first_clip`; source: the git repository to clone.

    Raises `UniViGUError` with the end of its output where a part fails.
    """
    with tempfile.TemporaryDirectory() as home:
        clone = Path(home) / "uni-vigu"
        univigu = str(clone / ".venv/bin/univigu")
        parts: dict[str, tuple[Sequence[str], Path]] = {
            "clone": (["git", "clone", "--quiet", str(source), str(clone)], Path(home)),
            "install": (["make", "--no-print-directory", "install"], clone),
            "first_clip": ([univigu, "generate", PROMPT, "-o", "clip.mp4"], clone),
            "first_caption": ([univigu, "caption", "clip.mp4"], clone),
        }
        seconds = {name: _time(name, *part) for name, part in parts.items()}
        if (clone / NOTEBOOK).is_file():
            program = [str(clone / ".venv/bin/python"), "-c", read_notebook(clone / NOTEBOOK)]
            seconds["notebook"] = _time("notebook", program, clone / NOTEBOOK.parent)
    to_first_clip = round(sum(seconds[name] for name in ("clone", "install", "first_clip")), 2)
    return {"ratio": round(to_first_clip / TARGET, 3), "to_first_clip": to_first_clip, "seconds": seconds}


def read_notebook(path: Path) -> str:
    """The code of a notebook's cells as one program, without commands of IPython (`%` and `!`)."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))


def _time(name: str, command: Sequence[str], folder: Path) -> float:
    """The seconds that a command takes in a folder, in an environment without this process's packages."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MLFLOW_TRACKING_URI", "MAKEFLAGS", "MAKELEVEL")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-TAIL:]
        raise UniViGUError(f"The part '{name}' ended with {done.returncode}: {said}")
    return round(time.perf_counter() - started, 2)
