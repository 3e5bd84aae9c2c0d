"""What the pages tell people to type exists, with every option."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from components.cli.main import app

DOCS = Path(__file__).parents[3] / "docs"


def commands(page):
    """The `univigu` commands in the page's blocks of code, as lists of words."""
    text = re.sub(r"\$\(\(.*?\)\)", "1", (DOCS / page).read_text())
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    found = (re.search(r"(?:^\s*|\s)(?:univigu|components\.pipeline\.cli) (.*)", line) for line in lines)
    return [shlex.split(match[1].rstrip(" &"), comments=True) for match in found if match]


@pytest.mark.parametrize("page", ["planning.md", "wan.md"])
def test_every_command_of_the_page_exists_with_its_options(page):
    told = commands(page)
    assert len(told) >= 4
    for words in told:
        command, context = typer.main.get_command(app), None
        while hasattr(command, "resolve_command"):
            context = command.context_class(command, parent=context)
            name, command, words = command.resolve_command(context, words)
        with command.make_context(name, words, parent=context):
            pass
