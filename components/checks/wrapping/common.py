"""Functions and patterns that several layers use."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

from components.checks.texts import words
from components.prompts.patterns import read_patterns

PROSE = 5  # least words of a description
_SPACES = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r" ?\n(?: ?\n)+ ?")
_LINE_ENDS = re.compile(r" \n ?|\n ")
_BRACKETS = re.compile(r"\"[^\"\\]*(?:\\.[^\"\\]*)*\"|[\[{]|[\]}]", re.DOTALL)
# Quotes within a sentence.
QUOTED = re.compile(r"(?<![\w.!?])[\"“«„][^\"”»“\n]{0,300}[\"”»“](?!\w)")
_QUOTES = "\"'“”‘’«»„`「」"
# Names of JSON keys, tags and labels of a description, the most certain first.
ANSWER_NAMES = (
    *("finalcaption", "finaldescription", "finalanswer", "finalresponse", "final", "conclusion", "revisedcaption"),
    *("reviseddescription", "detailedcaption", "detaileddescription", "videocaption", "videodescription", "caption"),
    *("description", "answer", "response", "output", "solution", "result", "paragraph", "text", "content", "value"),
    *("message", "body"),
)


class Ambiguous(Exception):  # noqa: N818 (a verdict on a text, not an error)
    """A caption can't be separated from the text around it; the message tells the model why."""


def tidy(text: str) -> str:
    """A text with single spaces, at most one empty line in a row, and no spaces at the ends of lines."""
    return _LINE_ENDS.sub("\n", _EMPTY_LINES.sub("\n\n", _SPACES.sub(" ", text)))


def is_prose(text: str) -> bool:
    """Whether a text has enough words for a sentence."""
    return len(words(text)) >= PROSE


def shown(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The matches of a pattern in a text, without those that are quoted: a sign may say "<think>"."""
    for found in pattern.finditer(text):
        before, after = text[max(0, found.start() - 2) : found.start()], text[found.end() : found.end() + 2]
        opened = before[-1:] in _QUOTES and (len(before) < 2 or (not before[0].isalnum() and before[0] not in ".!?>"))
        if not (before and after and opened and after.lstrip("\\")[:1] in _QUOTES):
            yield found


def answer_rank(name: str) -> int:
    """The rank of a key, tag or label as a name for a description; 0 is the most certain, and -1 is none."""
    plain = re.sub(r"[^a-z]", "", name.casefold())
    if plain in ANSWER_NAMES:
        return ANSWER_NAMES.index(plain)
    return next((ANSWER_NAMES.index(part) for part in ("caption", "description") if part in plain), -1)


@cache
def phrases() -> dict[str, dict[str, re.Pattern[str]]]:
    """The patterns of ``phrases.yaml``, by group and name."""
    lists = read_patterns(resources.files("components.checks.wrapping") / "phrases.yaml")
    return {
        group: {name: re.compile(each, re.IGNORECASE | re.MULTILINE) for name, each in named.items()}
        for group, named in lists.items()
    }


def only(texts: list[str], what: str) -> str:
    """The one text in `texts` if all are equal; raises `Ambiguous` otherwise."""
    different = {" ".join(words(text)): text for text in texts}
    if len(different) != 1:
        raise Ambiguous(f"it holds {what}; write one description and nothing else")
    return next(iter(different.values()))


def bracket_depth(text: str) -> int:
    """The depth of nested brackets of JSON, without those in strings."""
    deepest = depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest
