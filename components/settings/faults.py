"""Explain what is wrong in a profile: the key, its value, and what is allowed."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from components.settings.fields import RULES
from components.settings.schema_words import look_up, properties, say_kind

LONGEST_VALUE = 60  # characters of a value in a message
Path = tuple[str | int, ...]


class Fault(NamedTuple):
    """A fault at `path`; `text` is the rest of a sentence that begins with the key."""

    path: Path
    text: str


def explain(errors: Sequence[Mapping[str, Any]], values: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Fault]:
    """Pydantic's errors as faults, one per key (a union has one error per alternative)."""
    found: dict[Path, Fault] = {}
    for error in errors:
        for fault in _read(error, values, schema):
            found.setdefault(fault.path, fault)
    return list(found.values())


def find_odd_values(values: Any, path: Path = ()) -> Iterator[Fault]:
    """Values that YAML has and JSON doesn't: keys that aren't strings, dates, bytes, sets."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if isinstance(key, str):
                yield from find_odd_values(value, (*path, key))
            else:
                yield Fault(path, f"has the key {_shown(key)}, which is no text; put it in quotation marks")
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from find_odd_values(value, (*path, number))
    elif not isinstance(values, str | int | float | None):
        yield Fault(
            path, f"is {_shown(values)}, which YAML reads as a {type(values).__name__}; put it in quotation marks"
        )


def dotted(path: Path) -> str:
    """``("text", "prompt_tokens", 0)`` as ``text.prompt_tokens[0]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _read(error: Mapping[str, Any], values: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Fault]:
    path = _reached(error["loc"], values)
    kind = error["type"]
    if kind == RULES:
        for key, text in error["ctx"][RULES]:
            yield Fault((*path, *([key] if key else [])), text)
    elif kind == "missing":
        path = (*path, error["loc"][-1])
        elsewhere = ", or take it from another profile with `extends`" if isinstance(path[-1], str) else ""
        yield Fault(path, f"is missing; add {say_kind(look_up(schema, path), schema)}{elsewhere}")
    elif kind == "extra_forbidden":
        yield Fault(path, f"is not a setting; {_nearest(path, schema)}")
    else:
        value = _value(path, values)
        wanted = say_kind(look_up(schema, path), schema)
        yield Fault(path, f"is {_shown(value)}; give {wanted}{_hint(value, wanted)}")


def _reached(loc: Sequence[str | int], values: Any) -> Path:
    """The part of an error's location that exists in the values: a union adds the names of its alternatives."""
    path: list[str | int] = []
    for part in loc:
        inside = isinstance(values, Mapping) and part in values
        if not inside and not (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            break
        values = values[part]
        path.append(part)
    return tuple(path)


def _value(path: Path, values: Any) -> Any:
    for part in path:
        values = values[part]
    return values


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _hint(value: Any, wanted: str) -> str:
    """A hint for numbers that YAML 1.1 reads as a text, such as 2e-3."""
    if not isinstance(value, str) or "number" not in wanted:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (without quotation marks; YAML reads 2e-3 as a text and 2.0e-3 as a number)"


def _nearest(path: Path, schema: Mapping[str, Any]) -> str:
    """The key that was probably meant."""
    siblings = list(properties(look_up(schema, path[:-1]), schema))
    close = difflib.get_close_matches(str(path[-1]), siblings, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"remove it, or use one of {', '.join(siblings)}"
