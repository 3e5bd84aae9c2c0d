"""`python -m components.pipeline.cli`: another name of `components.cli.main`, by which training runtimes call it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("components.cli.main", run_name="__main__", alter_sys=True)
