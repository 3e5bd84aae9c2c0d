"""`python -m components.pipeline.cli`: an alias of `components.cli.main` that training runtimes call."""

import runpy

if __name__ == "__main__":
    runpy.run_module("components.cli.main", run_name="__main__", alter_sys=True)
