"""Remarks to the reader around a description: "Sure! Here is a caption:", "Caption:", "Let me know if ..."."""

import re

from components.checks.wrapping.common import QUOTED, Ambiguous, is_prose, phrases, shown

_SPEAKS = re.compile(r"\b(?:I|I['’]\w+|[Yy]ou|[Yy]our|[Mm]y)\b")
_SENTENCE_START = re.compile(r"(?:(?<=[.!?。！？…])[\"”’)\]*]*\s+|(?<=[。！？])|\n+)(?=\S)")


def without_remarks(text: str) -> str:
    """A text without remarks to the reader at its start and end; empty if it has nothing else."""
    rest = without_end(f".\n{text.strip()}").removeprefix(".").strip()
    return without_start(f"{rest}\n.").removesuffix(".").strip()


def describes(text: str) -> bool:
    """Whether a text has a sentence besides remarks to the reader."""
    return is_prose(without_remarks(text))


def check_leftovers(text: str) -> None:
    """Raise `Ambiguous` for wrappings that no layer can remove without guessing."""
    spoken = QUOTED.sub('""', text)
    for what, pattern in phrases()["leftovers"].items():
        if any(shown(pattern, spoken)):
            raise Ambiguous(f"it holds {what}; write one paragraph of plain text")
    if _is_unbalanced(text):
        raise Ambiguous("it holds a quote or bracket without a partner; write one paragraph of plain text")
    first, *rest = _SENTENCE_START.split(text)
    for sentence in rest and (first,):
        if phrases()["itself"]["first"].match(sentence):
            raise Ambiguous(f"it begins with '{sentence[:60]}'; write the description alone")


def _is_unbalanced(text: str) -> bool:
    """Whether a text begins or ends with an unpaired quote or bracket; inches, as in 12", are allowed."""
    if any(text.endswith(closing) and text.count(closing) > text.count(opening) for opening, closing in ("{}", "[]")):
        return True
    for opening, closing, without in (
        ('"', '"', text.count('"') % 2),
        ("“", "”", text.count("“") != text.count("”")),
    ):
        if without and (text.startswith(opening) or re.search(rf"[^\d{closing}]{closing}\W*$", text)):
            return True
    return False


def without_start(text: str) -> str:
    """A text without introductions that are about the text itself."""
    patterns = phrases()["starts"]
    while True:
        found = next((found for pattern in patterns.values() if (found := pattern.match(text))), None)
        if not found or not found[0].strip() or not text[found.end() :].strip():
            return text
        text = text[found.end() :].strip()
        if found[0].count("**") % 2 and text.endswith("**"):  # the whole text was bold
            text = text[:-2]


def without_end(text: str) -> str:
    """A text without remarks to the reader in its last sentences or lines."""
    if (turn := phrases()["turns"]["next"].search(text)) and is_prose(text[: turn.start()]):
        text = text[: turn.start()].rstrip()
    starts = [found.end() for found in _SENTENCE_START.finditer(text)]
    ends = phrases()["ends"]["last"]
    for start in reversed(starts[-6:]):
        if not ends.match(text, start):
            break
        text = text[:start].rstrip()
    last = phrases()["ends"]["paragraph"].search(text)
    if last and is_prose(text[: last.start()]) and not _SPEAKS.search(QUOTED.sub("", text[: last.start()])):
        text = text[: last.start()].rstrip()
    return phrases()["ends"]["count"].sub("", text)
