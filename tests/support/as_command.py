"""Run a script that trains as a command trains, without packages that take as long to import as the script runs.

python as_command.py SCRIPT ARGUMENTS
"""

import runpy
import sys
from pathlib import Path

AS_COMMAND = Path(__file__)

if __name__ == "__main__":
    from components.pipeline.lean_imports import import_training, start_command, without

    start_command()
    with without(*([] if any("lora" in argument for argument in sys.argv) else ["peft"])):
        import_training()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
