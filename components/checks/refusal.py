"""Refusals: captions in which a model declines to describe the video, or says that it was shown none.

"A man who can't swim" is not a refusal, nor is a sign with a refusal on it: quoted text is left out, and most patterns
match only at the start of a sentence.
"""

import re
import unicodedata
from functools import cache
from importlib import resources

from components.prompts.patterns import read_patterns

READ = 20_000  # characters; no caption is longer
# pyrefly: ignore[bad-argument-type]
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb\u2032\u00b4`\uff07", "'"))
_QUOTED = re.compile(r"[\"“«„][^\"”»“]{0,300}[\"”»“](?!\w)|(?<!\w)'[^'\n]{3,300}'(?!\w)")


def refusal(text: str) -> str:
    """The words with which a text declines to describe, or says that nothing was shown; empty if there are none."""
    plain = unicodedata.normalize("NFKC", text[:READ].translate(_APOSTROPHES)).casefold().strip(" \n\t\"'“”«»*_>(-")
    abroad, anywhere, sentences = _patterns()
    found = abroad.match(plain) or anywhere.search(plain)
    if found:
        return " ".join(found[0].split())
    found = sentences.search(_QUOTED.sub('""', plain))
    return " ".join(found["said"].split()) if found else ""


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    lists = read_patterns(resources.files("components.checks") / "refusals.yaml")
    openings = rf"(?:(?:{'|'.join(lists['openings'])})[\s,.!:;-]{{1,6}}){{0,3}}"
    said = "|".join(lists["sentences"])
    sentences = rf"(?:^|(?<=[.!?:;\n…]))[\s\"'“(*>_-]{{0,6}}{openings}(?P<said>{said})"
    return (
        re.compile("|".join(lists["abroad"].values())),
        re.compile("|".join(lists["anywhere"])),
        re.compile(sentences, re.MULTILINE),
    )
