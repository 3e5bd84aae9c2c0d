"""What no caption may be, in any world: damaged, its prompt again, or its own instructions.

Each test answers with an empty string (or False) where the text passes, and otherwise with what was seen.
"""

import re
import unicodedata
from functools import cache

ECHO_WORDS = 8  # as many words of the instructions in a row are no chance
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces
_WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")
# Marks that change the reading order of what follows can show another text than is there (Unicode TR 36). Marks of a
# single place (U+200E, U+200F) and joiners belong to right-to-left scripts and to emoji.
_OVERRIDES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def words(text: str) -> list[str]:
    """The words of a text in lower case; in a script without spaces, its characters."""
    return _WORD.findall(text.casefold())


def repeats_prompt(prompt: str, caption: str) -> bool:
    """Whether a caption is its prompt again: the same words, whatever their case and punctuation."""
    return words(prompt) == words(caption)


def damage(text: str) -> str:
    """Says what makes a text unfit to be stored, shown or learned from: NUL and other controls, lost characters."""
    if text.isascii() and text.isprintable():
        return ""
    bad = sorted({character for character in text if _is_bad(character)})
    return f"it holds {', '.join(f'U+{ord(character):04X}' for character in bad[:4])}" if bad else ""


def echo(instructions: str, text: str) -> str:
    """Quotes the first `ECHO_WORDS` words of the instructions that a text repeats in a row."""
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
