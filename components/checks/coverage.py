"""Captions that leave out what their prompt says: a check for open vocabularies, by the stems of content words.

A caption may use other words for the same thing, so only a share of the prompt's words is asked for. Scripts without
spaces are compared by pairs of characters.
"""

import re
from functools import cache
from itertools import groupby
from typing import Any

from components.checks.texts import UNSPACED
from components.prompts.filters import content_phrases

SHOWN = 8  # words in a complaint
_UNSPACED = re.compile(f"[{UNSPACED}]")


def check_caption(prompt: str, caption: str, least: float = 0.5, stemmer: str = "english") -> str | None:
    """Names the prompt's words that a caption leaves out, where it has fewer than the share `least` of them.

    stemmer: one of snowballstemmer's languages; it only matters for words of that language.
    """
    asked = {unit: word for word in _content_words(prompt) for unit in _units(word, stemmer)}
    if not asked:
        return None
    said = {unit for word in re.findall(r"\w+", caption.casefold()) for unit in _units(word, stemmer)}
    left_out = [word for unit, word in asked.items() if unit not in said]
    if len(left_out) <= (1 - least) * len(asked):
        return None
    return f"it leaves out most of what the prompt says: {', '.join(dict.fromkeys(left_out[:SHOWN]))}"


def _content_words(prompt: str) -> list[str]:
    """The words of its phrases, where neighbours in a script without spaces are one word."""
    words: list[str] = []
    for phrase in content_phrases(prompt):
        bare = [word.rpartition(":")[2] for word in phrase if re.search(r"\w", word)]
        runs = [[*run] for _, run in groupby(bare, key=lambda word: bool(_UNSPACED.match(word)))]
        for run in runs:
            words += ["".join(run)] if _UNSPACED.match(run[0]) else run
    return words


def _units(word: str, stemmer: str) -> list[str]:
    """The stem of a word, or the pairs of characters of one in a script without spaces."""
    if _UNSPACED.search(word):
        return [word[i : i + 2] for i in range(max(1, len(word) - 1))]
    return [_stemmer(stemmer).stemWord(word)]


@cache
def _stemmer(language: str) -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer(language)
