"""`make figures`: the figures in README.md and docs/*.md are written from the JSON files in docs/figures.

A page marks a place with ``<!-- figures: NAME -->`` and ``<!-- /figures -->``; between them is what the Jinja template
docs/figures/NAME.md.j2 makes of the JSON files that it names, such as ``data("scores").captions.mean``. The files are
what `univigu bench NAME`, `make demo` and `make measure-orchestrators` leave in reports/, unchanged. A place whose file
is missing keeps its text, and the command names the file.

    python docs/figures.py [FILE.json ...]    # take these files into docs/figures first
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

REPO = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n\n)(?P<text>.*?)(\n\n<!-- /figures -->)", re.DOTALL)


class NotMeasuredError(LookupError):
    """A JSON file that a template names and that is not in docs/figures."""


def pages(root: Path) -> list[Path]:
    """The documents that may have marked places."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(name: str, folder: Path) -> str:
    """The text of a marked place; folder: docs/figures.

    Raises `NotMeasuredError` if a JSON file is missing, and jinja2's `UndefinedError` for a key that it doesn't have.
    """

    def data(file: str) -> Mapping[str, Any]:
        path = folder / f"{file}.json"
        if not path.is_file():
            raise NotMeasuredError(path.name)
        return json.loads(path.read_text(encoding="utf-8"))

    # The output is Markdown from our own templates and numbers, so HTML isn't escaped.
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": interval, "duration": duration, "percent": percent, "points": points}
    return environment.get_template(f"{name}.md.j2").render(data=data).strip("\n")


def interval(score: Mapping[str, float]) -> str:
    """A score with its 95 % interval."""
    return f"{score['value']:.2f} ({score['low']:.2f}-{score['high']:.2f})"


def percent(score: Mapping[str, float], with_interval: bool = True) -> str:
    """A share in percent, with its 95 % interval."""
    shown = f"{100 * score['value']:.1f} %"
    return f"{shown} ({100 * score['low']:.1f} to {100 * score['high']:.1f})" if with_interval else shown


def points(score: Mapping[str, float], sign: int = 1) -> str:
    """A difference of shares in points, with its 95 % interval; bold if 0 is not in it. sign -1 turns it around."""
    value, *ends = (100 * sign * score[key] for key in ("value", "low", "high"))
    low, high = sorted(ends)
    shown = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return shown if low <= 0 <= high else f"**{shown}**"


def duration(seconds: float) -> str:
    """Whole seconds below two minutes, and minutes from there."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def rewrite(text: str, folder: Path) -> tuple[str, set[str]]:
    """A page's text with its marked places as the files have them, and which files are missing."""
    missing: set[str] = set()

    def fill(found: re.Match[str]) -> str:
        try:
            return found[1] + render(found["name"], folder) + found[4]
        except NotMeasuredError as error:
            missing.add(str(error))
            return found[0]

    return MARKED.sub(fill, text), missing


def main(files: list[str]) -> None:
    folder = REPO / "docs" / "figures"
    for file in files:
        target = folder / Path(file).name
        if not (target.exists() and target.samefile(file)):  # the study's is a link to its report
            shutil.copyfile(file, target)
    missing: set[str] = set()
    for page in pages(REPO):
        before = page.read_text(encoding="utf-8")
        after, awaited = rewrite(before, folder)
        missing |= awaited
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(REPO)}")
    for name in sorted(missing):
        print(f"docs/figures/{name} is missing; places with its figures were left as they are", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
