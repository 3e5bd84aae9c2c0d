"""Benchmarks: claims about speed and cost, each measured against an alternative in the same run.

One module per benchmark (``import_`` for `import`), with ``measure() -> dict``: at least `ratio` (ours over theirs,
unless the module says otherwise) and the times of both sides in seconds. `univigu bench NAME` runs it and writes
``reports/bench-NAME.json`` with the machine.
"""

import platform
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from components.pipeline.processes import usable_cores
from univigu.errors import ConfigError
from univigu.files import write_json


def benchmarks() -> list[str]:
    """The names that `run` accepts."""
    names = {_name(module.name) for module in iter_modules(__path__)}
    # These write reports of their own: `make measure-orchestrators`, `univigu study` and `univigu data score-captions`.
    return sorted(names - {"orchestrators", "study", "caption-quality"})


def _name(module: str) -> str:
    return module.replace("_", "-").removesuffix("-")


def run(name: str, root: Path, **options: Any) -> dict[str, Any]:
    """Run a benchmark and write ``reports/bench-NAME.json`` under `root`; returns the report.

    options: of the benchmark, such as `videos`. Raises `ConfigError` for another benchmark or option.
    """
    if name not in benchmarks():
        raise ConfigError(f"There is no benchmark '{name}'; choose one of {', '.join(benchmarks())}.")
    (module,) = (module.name for module in iter_modules(__path__) if _name(module.name) == name)
    measure = import_module(f"{__name__}.{module}").measure
    if unknown := sorted(options.keys() - signature(measure).parameters.keys()):
        raise ConfigError(f"The benchmark '{name}' has no option --{unknown[0]}; leave it out.")
    measured = measure(**options)
    report = {"benchmark": name, **measured, "machine": machine()}
    (root / "reports").mkdir(parents=True, exist_ok=True)
    write_json(root / "reports" / f"bench-{name}.json", report)
    return report


def machine() -> Mapping[str, Any]:
    """The machine: processor, cores that this process may use, memory, versions."""
    import psutil

    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
