"""The figures of runs and benchmarks in the documents are those of the JSON files in docs/figures."""

import importlib.util
import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError

REPO = Path(__file__).parents[1]
FOLDER = REPO / "docs/figures"
# Measurements that the documents still quote from an earlier version, without a file: remove a name with its new file.
AWAITED = {
    "bench-curation.json",
}


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", REPO / "docs/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_have_the_figures_of_their_files(figures):
    missing = set()
    for page in figures.pages(REPO):
        text = page.read_text(encoding="utf-8")
        written, awaited = figures.rewrite(text, FOLDER)
        assert written == text, f"{page} differs from docs/figures; run `make figures`"
        assert text.count("<!-- figures:") == text.count("<!-- /figures -->") == len(figures.MARKED.findall(text))
        missing |= awaited
    assert missing == AWAITED


def test_every_template_is_used_and_every_file_is_read(figures):
    pages = "".join(page.read_text(encoding="utf-8") for page in figures.pages(REPO))
    templates = {path.name.removesuffix(".md.j2"): path.read_text() for path in FOLDER.glob("*.md.j2")}
    assert set(templates) == {found[1] for found in figures.MARKED.findall(pages)}
    named = "".join(templates.values())
    assert [path.name for path in FOLDER.glob("*.json") if f'data("{path.stem}")' not in named] == []


def test_a_changed_file_changes_the_page_and_a_missing_one_changes_nothing(figures, tmp_path):
    (tmp_path / "speed.md.j2").write_text('It takes {{ data("bench-speed").seconds | duration }}.\n')
    page = "Before.\n\n<!-- figures: speed -->\n\nOld.\n\n<!-- /figures -->\n\nAfter.\n"
    assert figures.rewrite(page, tmp_path) == (page, {"bench-speed.json"})
    for seconds, said in ((90.4, "90 s"), (240, "4 min")):
        (tmp_path / "bench-speed.json").write_text(json.dumps({"seconds": seconds}))
        written, missing = figures.rewrite(page, tmp_path)
        assert missing == set()
        assert written == page.replace("Old.", f"It takes {said}.")
    (tmp_path / "bench-speed.json").write_text("{}")
    with pytest.raises(UndefinedError, match="seconds"):
        figures.rewrite(page, tmp_path)
