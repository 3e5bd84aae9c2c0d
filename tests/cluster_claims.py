"""What the pages for operators promise about a cluster, with the tests and the sources: `make cluster-claims`."""

import json
import re
from pathlib import Path

import yaml

REPO = Path(__file__).parents[1]
REPORT = REPO / "reports/cluster-claims.json"
KINDS = ("recovery", "rights", "reach", "sizes")


def declared():
    """infra/claims.yaml: `claims`, `sources` by short name, and `sections` by page."""
    return yaml.safe_load((REPO / "infra/claims.yaml").read_text(encoding="utf-8"))


def find_tests():
    """The file of each test function, relative to the repository, by the function's name."""
    found = {}
    for path in sorted((REPO / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, str(path.relative_to(REPO)))
    return found


def on_one_line(text):
    return " ".join(text.split())


def problems(declaration, tests):
    """What is wrong with the declared promises, one sentence each."""
    wrong, pages = [], {}
    for one in declaration["claims"]:
        claim, page = one["claim"], one["page"]
        pages.setdefault(page, on_one_line((REPO / page).read_text(encoding="utf-8")))
        if one["kind"] not in KINDS:
            wrong.append(f"'{claim}' has the kind '{one['kind']}'; choose one of {', '.join(KINDS)}.")
        if on_one_line(claim) not in pages[page]:
            wrong.append(f"'{claim}' is not on {page}; quote its present wording.")
        if not one.get("tests"):
            wrong.append(f"'{claim}' ({page}) is held by no test.")
        wrong += [f"'{claim}' names {name}, which is no test." for name in one.get("tests", []) if name not in tests]
        if bool(one.get("sources")) == bool(one.get("ours")):
            wrong.append(f"'{claim}' ({page}) needs sources, or `ours: true` if it rests on no other project.")
        wrong += [
            f"'{claim}' names the source '{name}', which has no project, version and file."
            for name in one.get("sources", [])
            if set(declaration["sources"].get(name, ())) != {"project", "version", "file"}
        ]
    for page, titles in declaration["sections"].items():
        claims = [on_one_line(one["claim"]) for one in declaration["claims"] if one["page"] == page]
        wrong += [
            f"No promise of infra/claims.yaml is in '{part[:60]}…' ({page}, {title})."
            for title in titles
            for part in parts(page, title)
            if not any(claim in part for claim in claims)
        ]
    return wrong


def parts(page, title):
    """The paragraphs and table rows of a section, each on one line."""
    text = (REPO / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, (page, title)
    found = []
    for block in re.split(r"\n\s*\n", section[1].strip()):
        if block.startswith("|"):
            found += block.splitlines()[2:]  # without the head
        elif not block.startswith("```"):
            found.append(on_one_line(block))
    return found


def report(declaration, tests):
    """The promises as they are written to the report."""
    return [
        {
            "page": one["page"],
            "kind": one["kind"],
            "claim": on_one_line(one["claim"]),
            "tests": [f"{tests[name]}::{name}" for name in one["tests"]],
            "sources": [declaration["sources"][name] for name in one.get("sources", [])],
        }
        for one in declaration["claims"]
    ]


if __name__ == "__main__":
    known, all_tests = declared(), find_tests()
    if found := problems(known, all_tests):
        raise SystemExit("\n".join(found))
    REPORT.write_text(json.dumps(report(known, all_tests), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(known['claims'])} promises, each with its tests and sources: {REPORT.relative_to(REPO)}")
