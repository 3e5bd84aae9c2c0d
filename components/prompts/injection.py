"""Instructions aimed at a model that reads a prompt: role markers, pseudo tags, and orders to ignore others (English).

A model reads through disguises that a pattern does not: look-alike letters of other scripts, invisible characters,
digits for letters, letters set apart. So a text is folded to plain lower-case letters first. Patterns and look-alikes
are in `wordlists.yaml`; what they find and miss is measured by `tests/components/prompts/test_injection.py`.
"""

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from components.prompts.filters import wordlists

# A digit or sign between letters, or at the start of a word: it may stand for a letter ("3D", "4k" and "24 fps" don't).
_LEET = re.compile(r"[013457@$!](?=[a-z])(?:(?<=[a-z].)|(?<![^\s.,;:(].)(?=[a-z]{2}))")
_APART = re.compile(r"[\s.*~-]\w[\s.*~-]{1,3}\w[\s.*~-]{1,3}\w[\s.*~-]")  # letters in a row, each by itself
_NO_LETTER = re.compile(r"[\W\d_]+")
# Letters that hide in plain sight: in circles, in squares, as flags, and as the tag characters that no font shows.
_HIDDEN = {start + number: chr(97 + number) for start in (0x1F150, 0x1F170, 0x1F1E6) for number in range(26)} | {
    0xE0000 + code: chr(code) for code in range(0x20, 0x7F)
}
_FILLERS = "\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters without a shape


class Group(NamedTuple):
    """Patterns that match only where a text holds one of some words: looking for those is a hundred times faster."""

    cues: Sequence[str]
    pattern: re.Pattern[str]


def find_injection(text: str) -> str:
    """Quotes the part of `text` that instructs a model instead of describing a picture, as it reads when folded."""
    folded = fold(text)
    for reading in _readings(folded):
        for cues, pattern in _groups():
            if any(map(reading.__contains__, cues)) and (found := pattern.search(reading)):
                return found[0].strip()
    if _APART.search(folded) and (found := _compact().search(_NO_LETTER.sub("", folded))):
        return found[0]
    return ""


def fold(text: str) -> str:
    """A text as a model reads it: without disguise, in lower case, with single blanks; lines stay apart."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_HIDDEN)).translate(_plain())
    text = text.casefold().replace("_", " ").replace("\\n", "\n")
    if text.isprintable() and "  " not in text:
        return text.strip()
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


def _readings(text: str) -> Iterator[str]:
    """A folded text, and what it says where digits and signs stand for letters (1 for i or for l)."""
    yield text
    if _LEET.search(text):
        for one in "il":
            yield text.translate(str.maketrans("03457@$!1", f"oeastasi{one}"))


@cache
def _groups() -> list[Group]:
    groups = wordlists()["prompt_injection"]["groups"]
    return [Group(group["cues"], _compile([_whole(pattern) for pattern in group["patterns"]])) for group in groups]


@cache
def _compact() -> re.Pattern[str]:
    return re.compile(wordlists()["prompt_injection"]["compact"])


def _whole(pattern: str) -> str:
    for name, part in wordlists()["prompt_injection"]["parts"].items():
        pattern = pattern.replace(f"{{{name}}}", f"(?:{part})")
    return pattern


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    # All that begin at a word's edge share one test for it: the search spends its time on those.
    at_edge = [pattern.removeprefix(r"\b") for pattern in patterns if pattern.startswith(r"\b")]
    others = [pattern for pattern in patterns if not pattern.startswith(r"\b")]
    return re.compile("|".join([*([rf"\b(?:{'|'.join(at_edge)})"] if at_edge else []), *others]))


@cache
def _plain() -> dict[int, str | None]:
    """What a character of a decomposed text is read as: a look-alike's letter; nothing for marks and the invisible."""
    chars = [*map(chr, range(0x80, 0x20000)), *map(chr, range(0xE0000, 0xE0200))]
    table: dict[int, str | None] = {
        ord(char): None for char in chars if unicodedata.category(char) in ("Mn", "Me", "Cf") or char in _FILLERS
    }
    return table | {ord(char): letter for letter, alike in wordlists()["look_alikes"].items() for char in alike}
