"""What the pages of the studio share: the work root, and how HTML and errors are written."""

import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import UniViGUError, first_line, storage_fault

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
# Gradio treats the value of an HTML component as a template; an entity is text to it.
_NO_TEMPLATE = {ord(character): f"&#{ord(character)};" for character in "{}$`"}


@dataclass(frozen=True)
class Studio:
    """What is shown, and how.

    The work root, the registered model that is shown first, a folder for temporary files, and the profile with which
    edits are checked (None: the one in use).
    """

    root: Path
    name: str
    cache: Path
    profile: str | None = None
    # MLflow's current store is a global variable, which reading the registry sets and restores.
    store: threading.RLock = field(default_factory=threading.RLock)


def render(template: str, **values: Any) -> str:
    """HTML from a file of `TEMPLATES`; every value is escaped."""
    return _templates().get_template(template).render(values).translate(_NO_TEMPLATE)


def note(sentence: str) -> str:
    """A message about what was done, as HTML that screen readers announce."""
    return render("note.html.j2", sentence=sentence, role="status")


def attempt(action: Callable[[], str]) -> str:
    """The HTML that `action` returns, or its error as HTML."""
    try:
        return action()
    except Exception as error:
        return render("note.html.j2", sentence=explain(error), role="alert")


def explain(error: Exception) -> str:
    """An error in one sentence; of one that isn't ours, the traceback is printed on standard error."""
    if isinstance(error, UniViGUError):
        return str(error)
    if isinstance(error, OSError) and (fault := storage_fault(error, Path.cwd())):
        return str(fault)
    traceback.print_exception(error, file=sys.stderr)
    said = f"{type(error).__name__}: {first_line(error)}"
    return f"This did not work ({said}); the terminal in which the studio was started shows where."


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
