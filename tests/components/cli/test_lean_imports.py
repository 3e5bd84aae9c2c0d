"""A package that isn't needed stays out of the commands' imports, and can still be imported afterwards."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

from components.cli.chosen_model import load

load(Path(sys.argv[1]))
assert "scipy" not in sys.modules, "imported"
import scipy.stats
assert scipy.stats.norm.cdf(0) == 0.5
"""


def test_loading_a_model_imports_no_scipy_and_leaves_it_importable(speaking_model):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, speaking_model],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
