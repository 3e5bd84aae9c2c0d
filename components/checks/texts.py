"""What no caption may be, in any world: damaged, its prompt again, a refusal, or its own instructions.

Each test answers with an empty string (or False) where the text passes, and otherwise with what was seen.
"""

import re
import unicodedata
from functools import cache

ECHO_WORDS = 8  # as many words of the instructions in a row are no chance
_OPENING = 240  # characters in which a refusal shows
# Marks that change the reading order of what follows can show another text than is there (Unicode TR 36). Marks of a
# single place (U+200E, U+200F) and joiners belong to right-to-left scripts and to emoji.
_OVERRIDES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_CAN_NOT = r"can(?:not|['’]?t| not)|(?:am|['’]m) (?:unable|not able) to|won['’]?t|do not|don['’]t"
_DO = "help|assist|comply|provide|describe|view|see|access|watch|fulfil+|create|generate|process"
_REFUSAL = re.compile(
    r"\b(?:i|we)(?:['’]m| am| are|['’]re)? (?:sorry|afraid)\b|\bmy apologies\b"
    rf"|\bi ?(?:{_CAN_NOT}) (?:\w+ ){{0,3}}?(?:{_DO})\b|\bi (?:must|have to) (?:decline|refuse)\b"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:\w+ ){0,2}(?:guidelines|polic(?:y|ies))\b"
    r"|\bno (?:video|image|picture|frame)s? (?:was|were|has been|have been|is|are) (?:provided|given|attached)\b"
)


def repeats_prompt(prompt: str, caption: str) -> bool:
    """Whether a caption is its prompt again: the same words, whatever their case and punctuation."""
    return _words(prompt) == _words(caption)


def damage(text: str) -> str:
    """Says what makes a text unfit to be stored, shown or learned from: NUL and other controls, lost characters."""
    if text.isascii() and text.isprintable():
        return ""
    bad = sorted({character for character in text if _is_bad(character)})
    return f"it holds {', '.join(f'U+{ord(character):04X}' for character in bad[:4])}" if bad else ""


def refusal(text: str) -> str:
    """Quotes the words by which a model declines to describe, or says that it was shown nothing."""
    found = _REFUSAL.search(text[:_OPENING].casefold())
    return found[0] if found else ""


def echo(instructions: str, text: str) -> str:
    """Quotes the first `ECHO_WORDS` words of the instructions that a text repeats in a row."""
    if not instructions:
        return ""
    known, words = _runs(instructions), _words(text)
    for start in range(len(words) - ECHO_WORDS + 1):
        run = tuple(words[start : start + ECHO_WORDS])
        if run in known:
            return " ".join(run)
    return ""


def _is_bad(character: str) -> bool:
    kind = unicodedata.category(character)
    return character == "\ufffd" or kind in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") or ord(character) in _OVERRIDES


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@cache
def _runs(text: str) -> frozenset[tuple[str, ...]]:
    words = _words(text)
    return frozenset(tuple(words[i : i + ECHO_WORDS]) for i in range(len(words) - ECHO_WORDS + 1))
