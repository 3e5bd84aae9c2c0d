"""The funnel of raw prompts: how many rows each filter rejected, how many were left after it, and examples.

Printed as a table on the terminal, and written as JSON, CSV and SVG. Equal runs give equal bytes.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.prompts.screening import FILTERS, OFF, REASONS

EXAMPLES = 3  # per reason
LONGEST_EXAMPLE = 120  # characters
WITHHELD = ("unsafe", "personal_data")  # the examples of these reasons show no text
BAR = 400  # pixels


class Funnel:
    """Counts of a run. Reasons are in the order of the filters."""

    def __init__(self, modes: Mapping[str, str]) -> None:
        filters = {reason: name for name, reasons in FILTERS.items() for reason in reasons}
        self.modes = {reason: modes[filters[reason]] if reason in filters else "always" for reason in REASONS}
        self.read = self.kept = 0
        self.rejected: Counter[str] = Counter()
        self.scored: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def keep(self, scores: Mapping[str, Any]) -> None:
        """Count a row that is kept, and the findings of filters that only score."""
        self.kept += 1
        self.scored.update(reason for reason in scores if reason in self.modes)

    def reject(self, reason: str, row_id: str, detail: str, text: Any) -> None:
        """Count a row that is rejected; `text` is shown as an example and holds no personal data."""
        self.rejected[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            shown = "" if reason in WITHHELD or not isinstance(text, str) else text[:LONGEST_EXAMPLE]
            examples.append({"id": row_id, "detail": detail, "text": shown})

    def rows(self) -> list[dict[str, Any]]:
        """A row for each reason whose filter isn't off: rows rejected, scored, and left after it."""
        left, rows = self.read, []
        for reason, mode in self.modes.items():
            if mode == OFF:
                continue
            left -= self.rejected[reason]
            counts = {"rejected": self.rejected[reason], "scored": self.scored[reason], "left": left}
            rows.append({"reason": reason, "mode": mode, **counts, "examples": self.examples.get(reason, [])})
        return rows

    def write(self, folder: Path) -> None:
        """Write ``funnel.json``, ``funnel.csv`` and ``funnel.svg``."""
        whole = {"read": self.read, "kept": self.kept, "reasons": self.rows()}
        text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        (folder / "funnel.json").write_text(text.encode(errors="replace").decode(), encoding="utf-8")
        with (folder / "funnel.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["reason", "mode", "rejected", "scored", "left", "example"])
            for row in self.rows():
                cells = (row[key] for key in ("reason", "mode", "rejected", "scored", "left"))
                table.writerow([*cells, _example(row)])
        (folder / "funnel.svg").write_text(self._picture(), encoding="utf-8")

    def show(self) -> None:
        """Print the reasons that occurred as a table on standard error."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = f"{self.read:,} raw prompts, {self.kept:,} kept"
        table = Table(title=title, title_justify="left", box=None, expand=True)
        table.add_column("reason", no_wrap=True, min_width=max(map(len, self.modes)))
        for name in ("rejected", "scored", "left"):
            table.add_column(name, justify="right", no_wrap=True, min_width=9)
        table.add_column("first example", no_wrap=True, overflow="ellipsis", ratio=1)
        for row in self.rows():
            if row["rejected"] or row["scored"]:
                counts = (f"{row[key]:,}" for key in ("rejected", "scored", "left"))
                table.add_row(row["reason"], *counts, Text(_example(row)))
        Console(file=sys.stderr).print(table)

    def _picture(self) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
        )
        scale = BAR / max(self.read, 1)
        rows = [
            {
                "reason": row["reason"],
                "width": round(scale * row["left"], 2),
                "lost_width": round(scale * row["rejected"], 2),
                "label": f"{row['left']:,}" + (f" (-{row['rejected']:,})" if row["rejected"] else ""),
            }
            for row in self.rows()
        ]
        title = f"{self.read:,} raw prompts, {self.kept:,} kept"
        return environment.get_template("funnel.svg.j2").render(title=title, rows=rows)


def _example(row: Mapping[str, Any]) -> str:
    """The first example of a reason in one line; control characters are escaped, so a terminal ignores them."""
    if not row["examples"]:
        return ""
    first = row["examples"][0]
    return f"{first['id']}: {first['text']!r}" if first["text"] else f"{first['id']}: {first['detail']!r}"
