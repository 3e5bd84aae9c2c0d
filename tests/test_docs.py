"""What the documents point to is there, and the site is built from them without a warning."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from components.pipeline.stages import STAGES

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


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_fonts_or_styles_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UniViGUPipeline" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    styles = re.findall(r"<link[^>]+stylesheet[^>]+>", (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [style for style in styles if "://" in style] == []


def test_the_picture_of_the_steps_has_each_edge_between_them():
    page = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^    ([\w-]+) --> ([\w-]+)$", page, re.MULTILINE))
    steps = [stage for stage in STAGES if stage.name not in ("evaluate-model", "register-model")]
    assert {(source, stage.name) for stage in steps for source in stage.inputs.values()} <= drawn
    assert all(f"| `{stage.name}` |" in page for stage in STAGES)


def test_the_tree_of_files_names_the_folders_in_the_order_of_the_layers():
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["components"])
    order = [name.strip() for layer in layers for name in layer.split("|")]
    tree = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\ncomponents/")[2]
    named = re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.MULTILINE)
    assert [name for name in named if name in order] == order
