"""Prompt injection: instructions to a model that reads a prompt, such as role markers and "ignore all rules" (English).

A language model understands disguised text that a pattern doesn't match: look-alike letters of other scripts, invisible
characters, digits in place of letters, spaced-out letters. So a text is first folded to plain lower-case letters.
Patterns and look-alikes are in `wordlists.yaml`; `tests/components/prompts/test_injection.py` measures what they find
and what they miss.
"""

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from components.prompts.filters import wordlists
from components.prompts.patterns import insert_parts

# A digit or sign between letters or at the start of a word, in place of a letter ("3D", "4k" and "24 fps" don't match).
_LEET = re.compile(r"[013457@$!](?=[a-z])(?:(?<=[a-z].)|(?<![^\s.,;:(].)(?=[a-z]{2}))")
_APART = re.compile(r"[\s.*~-]\w[\s.*~-]{1,3}\w[\s.*~-]{1,3}\w[\s.*~-]")  # at least three single letters in a row
_NO_LETTER = re.compile(r"[\W\d_]+")
# Letters in circles, in squares, as flags, and as the tag characters that no font shows.
_DISGUISED = {start + number: chr(97 + number) for start in (0x1F150, 0x1F170, 0x1F1E6) for number in range(26)} | {
    0xE0000 + code: chr(code) for code in range(0x20, 0x7F)
}
_FILLERS = "\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters without a visible shape


class Group(NamedTuple):
    """Patterns that can match only a text with one of the cues, which are a hundred times faster to look for."""

    cues: Sequence[str]
    pattern: re.Pattern[str]


def find_injection(text: str) -> str:
    """The part of `text` that instructs a model instead of describing a picture, as folded; empty if there is none."""
    folded = fold(text)
    for reading in _readings(folded):
        for cues, pattern in _groups():
            if any(map(reading.__contains__, cues)) and (found := pattern.search(reading)):
                return found[0].strip()
    if _APART.search(folded) and (found := _compact().search(_NO_LETTER.sub("", folded))):
        return found[0]
    return ""


def fold(text: str) -> str:
    """A text as a model reads it: without disguises, in lower case, with single spaces; line breaks are kept."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_DISGUISED)).translate(_plain())
    text = text.casefold().replace("_", " ").replace("\\n", "\n")
    if text.isprintable() and "  " not in text:
        return text.strip()
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


def _readings(text: str) -> Iterator[str]:
    """A folded text, and the same with digits and signs read as letters (1 as i or as l)."""
    yield text
    if _LEET.search(text):
        for one in "il":
            yield text.translate(str.maketrans("03457@$!1", f"oeastasi{one}"))


@cache
def _groups() -> list[Group]:
    lists = wordlists()["prompt_injection"]
    return [
        Group(group["cues"], _compile([insert_parts(pattern, lists["parts"]) for pattern in group["patterns"]]))
        for group in lists["groups"]
    ]


@cache
def _compact() -> re.Pattern[str]:
    return re.compile(wordlists()["prompt_injection"]["compact"])


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    # Patterns that begin with \b share one test of it, which takes most of the search's time.
    at_boundary = [pattern.removeprefix(r"\b") for pattern in patterns if pattern.startswith(r"\b")]
    others = [pattern for pattern in patterns if not pattern.startswith(r"\b")]
    return re.compile("|".join([*([rf"\b(?:{'|'.join(at_boundary)})"] if at_boundary else []), *others]))


@cache
def _plain() -> dict[int, str | None]:
    """Replacements for characters of a decomposed text: letters for look-alikes, None for marks and invisible ones."""
    chars = [*map(chr, range(0x80, 0x20000)), *map(chr, range(0xE0000, 0xE0200))]
    table: dict[int, str | None] = {
        ord(char): None for char in chars if unicodedata.category(char) in ("Mn", "Me", "Cf") or char in _FILLERS
    }
    return table | {ord(char): letter for letter, alike in wordlists()["look_alikes"].items() for char in alike}
