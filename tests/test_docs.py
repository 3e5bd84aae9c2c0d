"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((REPO / "docs").glob("*.md"))
SECURITY = (REPO / "docs/security.md").read_text(encoding="utf-8")
ROWS = [line for line in SECURITY.splitlines() if re.match(r"\| (?!what could)[^-]", line)]


def defined_tests():
    texts = (path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_every_claim_about_security_names_tests_that_are_there():
    named = [set(re.findall(r"`(test_\w+)`", row.rpartition(" | ")[2])) for row in ROWS]
    assert len(named) > 20
    assert all(named)
    assert set().union(*named) <= defined_tests()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_documents_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []
