"""Captions that leave out content of their prompt: a check for any vocabulary, by the stems of content words.

A caption may use synonyms, so only a share of the prompt's words is required. Scripts without spaces are compared by
pairs of characters.
"""

import re
from functools import cache
from itertools import groupby
from typing import Any

from components.checks.texts import UNSPACED
from components.prompts.filters import content_phrases

SHOWN = 8  # words in the message
_UNSPACED = re.compile(f"[{UNSPACED}]")


def check_caption(prompt: str, caption: str, least: float = 0.5, stemmer: str = "english") -> str | None:
    """The prompt's words that a caption leaves out, if it has less than the share `least` of them; otherwise None.

    stemmer: a language of snowballstemmer, for words of that language.
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
    """The words of a prompt's phrases; adjacent characters of a script without spaces are joined to one word."""
    words: list[str] = []
    for phrase in content_phrases(prompt):
        bare = [word.rpartition(":")[2] for word in phrase if re.search(r"\w", word)]
        runs = [[*run] for _, run in groupby(bare, key=lambda word: bool(_UNSPACED.match(word)))]
        for run in runs:
            words += ["".join(run)] if _UNSPACED.match(run[0]) else run
    return words


def _units(word: str, stemmer: str) -> list[str]:
    """The stem of a word, or its pairs of characters in a script without spaces."""
    if _UNSPACED.search(word):
        return [word[i : i + 2] for i in range(max(1, len(word) - 1))]
    return [_stemmer(stemmer).stemWord(word)]


@cache
def _stemmer(language: str) -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer(language)
