"""Edits of clips by people: clips to exclude and captions written by hand, as a small file that every run obeys.

`data/edits.json` under the work root is meant to be committed to git. Lines are only added, and an undo is a line, so
the file is its own history. A line says what it was made against (`Edit.of`): if the caption, or the video, is another
one by now, the edit is not applied, and the step says so. The file is an input of each step that names a function for
it in the table of steps (`Stage.edits`), as long as an edit is in force: without one, no recipe knows of it.

`components.pipeline.withdrawn` is about data that must not come back; an edit can be undone.
"""

import fcntl
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.pipeline.stages import EDITS
from components.pipeline.state import lock
from univigu.errors import BusyError, ConfigError, CorruptDataError, first_line
from univigu.files import read_json_object, write_json

VERSION = 1
LONGEST_CAPTION = 8000  # characters
MOST = 100_000  # lines
NOTHING = hashlib.sha256(b"").hexdigest()

Action = Literal["exclude", "caption", "undo"]
EXCLUDE, CAPTION, UNDO = "exclude", "caption", "undo"


class Edit(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: Annotated[int, Field(ge=1, le=MOST)]  # from 1, in order
    action: Action
    id: Annotated[str, Field(min_length=1, max_length=300)]  # of the clip
    of: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = NOTHING  # SHA-256: of the caption it replaces, or the video
    caption: Annotated[str, Field(max_length=LONGEST_CAPTION)] = ""  # the new one
    undoes: Annotated[int, Field(ge=0)] = 0  # the number of the line that an undo takes back
    by: Annotated[str, Field(max_length=300)] = ""
    at: Annotated[str, Field(max_length=40)] = ""  # UTC, ISO 8601


class Outcome(NamedTuple):
    """What the edits of one clip make of it."""

    excluded: bool
    caption: str | None  # None: as it was
    not_applied: tuple[int, ...]  # numbers of the edits that were made against something else


def text_digest(text: str | None) -> str:
    """The `of` of an edit that replaces this caption; a missing one counts as empty."""
    return hashlib.sha256((text or "").encode(errors="surrogatepass")).hexdigest()


def settle(edits: Iterable[Edit], caption: str | None, video: str) -> Outcome:
    """The outcome of one clip's edits in force, in order. video: the SHA-256 of the clip."""
    text, excluded, failed = caption, False, []
    for edit in edits:
        if edit.of != (video if edit.action == EXCLUDE else text_digest(text)):
            failed.append(edit.number)
        elif edit.action == EXCLUDE:
            excluded = True
        else:
            text = edit.caption
    return Outcome(excluded, text if text != caption else None, tuple(failed))


def in_force(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits that were not undone."""
    undone = {edit.undoes for edit in edits if edit.action == UNDO}
    return tuple(edit for edit in edits if edit.action != UNDO and edit.number not in undone)


def by_clip(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """The edits of each clip, in order."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.id, []).append(edit)
    return found


def read_edits(root: Path) -> list[Edit]:
    """All lines under a work root, oldest first; raises `CorruptDataError` if the file can't be understood."""
    path = root / EDITS
    try:
        found = read_json_object(path)
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']}, not {VERSION}")
        edits = _read_lines(found["entries"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(
            f"{path} holds people's edits and can't be read ({_said(error)}); restore it from git, or correct it."
        ) from error
    return edits


def _read_lines(entries: Any) -> list[Edit]:
    if not isinstance(entries, list) or len(entries) > MOST:
        raise ValueError(f"'entries' is not a list of at most {MOST} lines")
    edits = [Edit.model_validate(entry) for entry in entries]
    left: dict[str, list[int]] = {}
    for number, edit in enumerate(edits, 1):
        if edit.number != number:
            raise ValueError(f"line {number} has the number {edit.number}")
        lines = left.setdefault(edit.id, [])
        if edit.action != UNDO:
            lines.append(number)
        elif not lines or lines.pop() != edit.undoes:
            raise ValueError(f"line {number} undoes line {edit.undoes}, which is not the last edit of its clip")
    return edits


def _said(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)


def add_edit(root: Path, line: Mapping[str, Any], seen: int) -> Edit:
    """Add a line (the fields of `Edit` without `number` and `at`); returns it.

    seen: the number of the clip's last line when the decision was made, 0 for none. Raises `BusyError` if there is a
    later one, and `ConfigError` if a value is out of its bounds.
    """
    (root / EDITS).parent.mkdir(parents=True, exist_ok=True)
    with lock(root, "edits", "", fcntl.LOCK_EX):  # waits: it is held only while the file is written
        edits = read_edits(root)
        if last_line(edits, line["id"]) != seen:
            raise BusyError(
                f"Nothing was changed, because the clip '{line['id']}' was edited after you opened it; open it again."
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            edit = Edit.model_validate({**line, "number": len(edits) + 1, "at": now})
        except ValidationError as error:
            raise ConfigError(f"This edit can't be written ({_said(error)}); correct it.") from error
        lines = [one.model_dump(exclude_defaults=True) for one in (*edits, edit)]
        write_json(root / EDITS, {"version": VERSION, "entries": lines})
    return edit


def last_line(edits: Sequence[Edit], clip: str) -> int:
    """The number of the last line about a clip, or 0."""
    return max((edit.number for edit in edits if edit.id == clip), default=0)
