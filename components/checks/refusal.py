"""Refusals: a model that declines to describe, or says that it was shown nothing, in whatever words.

A man who can't swim is no refusal, nor is a sign that says it: what is quoted is left out, and most patterns count only
where a sentence begins.
"""

import re
import unicodedata
from functools import cache

from components.checks.patterns import read_patterns

READ = 20_000  # characters; a longer text is no caption anyway
# pyrefly: ignore[bad-argument-type]
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb\u2032\u00b4`\uff07", "'"))
_QUOTED = re.compile(r"[\"“«„][^\"”»“]{0,300}[\"”»“](?!\w)|(?<!\w)'[^'\n]{3,300}'(?!\w)")


def refusal(text: str) -> str:
    """Quotes the words by which a model declines to describe, or says that it was shown nothing."""
    plain = unicodedata.normalize("NFKC", text[:READ].translate(_APOSTROPHES)).casefold().strip(" \n\t\"'“”«»*_>(-")
    abroad, anywhere, sentences = _patterns()
    found = abroad.match(plain) or anywhere.search(plain)
    if found:
        return " ".join(found[0].split())
    found = sentences.search(_QUOTED.sub('""', plain))
    return " ".join(found["said"].split()) if found else ""


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    lists = read_patterns("refusals.yaml")
    openings = rf"(?:(?:{'|'.join(lists['openings'])})[\s,.!:;-]{{1,6}}){{0,3}}"
    said = "|".join(lists["sentences"])
    sentences = rf"(?:^|(?<=[.!?:;\n…]))[\s\"'“(*>_-]{{0,6}}{openings}(?P<said>{said})"
    return (
        re.compile("|".join(lists["abroad"].values())),
        re.compile("|".join(lists["anywhere"])),
        re.compile(sentences, re.MULTILINE),
    )
