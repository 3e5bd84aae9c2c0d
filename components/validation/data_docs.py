"""Great Expectations' pages (Data Docs), made readable without a network, and the page that lists all of them.

Great Expectations' pages load style sheets, scripts and images from public servers. Without them a page is complete but
unstyled, so they are replaced by a small style sheet. Nothing on the pages needs a script.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univigu.files import read_json_object, write_json

GATE = "gate.json"  # beside the pages of a gate: what the root page says about it
_REMOTE = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*\bsrc=[\"']https?:[^>]*>|<meta\b[^>]*refresh[^>]*>",
    re.DOTALL | re.IGNORECASE,
)
_STYLE, _ROOT = "data_docs.css.j2", "data_docs.html.j2"


def finish_docs(docs: Path, suite: str, rows: int, report: list[dict[str, Any]]) -> None:
    """Make the pages in `docs` readable without a network, and write what `write_root` says about them.

    report: the figures of each expectation (see `gates.Gate`).
    """
    style = Path(__file__).with_name(_STYLE).read_text(encoding="utf-8")
    for page in docs.rglob("*.html"):
        text = _REMOTE.sub("", page.read_text(encoding="utf-8"))
        page.write_text(text.replace("</head>", f"{style}</head>", 1), encoding="utf-8")
    failed = [figures["expectation"] for figures in report if not figures["success"]]
    facts = {"suite": suite, "table": docs.name, "rows": rows, "expectations": len(report), "failed": failed}
    write_json(docs / GATE, facts)


def write_root(home: Path) -> None:
    """Write ``index.html`` in the folder of all Data Docs, with a row for each gate that has run."""
    from jinja2 import Environment, FileSystemLoader

    gates = [_describe(home, path) for path in sorted(home.glob(f"*/*/{GATE}"))]
    if gates:
        environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
        (home / "index.html").write_text(environment.get_template(_ROOT).render(gates=gates), encoding="utf-8")


def _describe(home: Path, path: Path) -> Mapping[str, Any]:
    """The facts of a gate, with the page of its results."""
    facts = read_json_object(path)
    results = sorted(path.parent.glob("validations/**/*.html"))
    page = results[-1] if results else path.with_name("index.html")
    met = facts["expectations"] - len(facts["failed"])
    return {**facts, "met": met, "page": page.relative_to(home).as_posix()}
