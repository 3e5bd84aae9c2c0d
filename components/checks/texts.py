"""Tests that apply to every caption: it must not be damaged, repeat its prompt, or repeat the captioner's instructions.

Each test returns an empty string (or False) if the text passes, otherwise what was found.
"""

import re
import unicodedata
from functools import cache

ECHO_WORDS = 8  # this many words of the instructions in a row are no coincidence
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces
_WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")
# Marks that change the reading order of the text after them can disguise it (Unicode TR 36). The marks U+200E and
# U+200F and joiners are allowed: right-to-left scripts and emoji need them.
_OVERRIDES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def words(text: str) -> list[str]:
    """The words of a text in lower case; in scripts without spaces, the characters."""
    return _WORD.findall(text.casefold())


def repeats_prompt(prompt: str, caption: str) -> bool:
    """Whether a caption has the same words as its prompt, ignoring case and punctuation."""
    return words(prompt) == words(caption)


def damage(text: str) -> str:
    """The characters that make a text unusable, such as control characters and lost characters."""
    if text.isascii() and text.isprintable():
        return ""
    bad = sorted({character for character in text if _is_bad(character)})
    return f"it holds {', '.join(f'U+{ord(character):04X}' for character in bad[:4])}" if bad else ""


def echo(instructions: str, text: str) -> str:
    """The first `ECHO_WORDS` words in a row that a text repeats from the instructions, or an empty string."""
    if not instructions:
        return ""
    known, found = _runs(instructions), words(text)
    for start in range(len(found) - ECHO_WORDS + 1):
        run = tuple(found[start : start + ECHO_WORDS])
        if run in known:
            return " ".join(run)
    return ""


def _is_bad(character: str) -> bool:
    kind = unicodedata.category(character)
    return character == "\ufffd" or kind in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") or ord(character) in _OVERRIDES


@cache
def _runs(text: str) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(tuple(found[i : i + ECHO_WORDS]) for i in range(len(found) - ECHO_WORDS + 1))
