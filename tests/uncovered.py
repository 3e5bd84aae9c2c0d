"""The end of `make coverage`: functions and methods that no test runs, by name, from reports/coverage.json."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parents[1] / "reports" / "coverage.json"


def main() -> None:
    """Print each name with the number of its lines, the longest first, and the share of lines that tests run."""
    if not REPORT.exists():
        sys.exit(f"There is no {REPORT.name}; run `make coverage`.")
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    found = sorted(uncovered(report), reverse=True)
    for lines, name in found:
        print(f"{lines:4} lines  {name}")
    print(f"{len(found)} functions are not covered; {report['totals']['percent_covered']:.1f} % of lines are.")


def uncovered(report: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Functions of which no line was run: how many lines each has, and its name."""
    for file, facts in report["files"].items():
        for name, function in facts["functions"].items():
            if name and function["missing_lines"] and not function["executed_lines"]:
                yield len(function["missing_lines"]), f"{file}:{name}"


if __name__ == "__main__":
    main()
