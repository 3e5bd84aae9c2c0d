"""Measures of texts that need no reference: repetition, and how varied a set of texts is."""

import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a hyphen or an apostrophe inside a word belongs to it."""
    return re.findall(r"\w+(?:[-'’]\w+)*", text.lower())


def repeated_share(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that it has said before, 0 to 1; 0 for a text with fewer than n words.

    It is rep-n of Su et al. 2022 (arXiv 2202.06417, section 5.1): 1 - different n-grams / n-grams.
    """
    found = _ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_share(texts: Sequence[str], n: int) -> float:
    """Different n-grams per n-gram of all texts together (distinct-n, Li et al. 2016, arXiv 1510.03055), 0 to 1."""
    counts = Counter(gram for text in texts for gram in _ngrams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def _ngrams(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[start : start + n]) for start in range(len(said) - n + 1)]
