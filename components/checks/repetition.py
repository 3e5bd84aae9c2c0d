"""Repetition loops: captions in which a model repeats the same words, the same sentence or a counter.

A good description may repeat words a little (left, right, left, right; three equal signs), so each rule needs more
repetition than that. When counters are detected, all numbers count as equal.
"""

import re
import zlib
from collections import Counter
from itertools import pairwise

from components.checks.texts import words

READ = 20_000  # characters; no caption is longer
_RULES = ((2, 30), (3, 24), (4, 16), (6, 8))  # repetitions in a row, and words in total
_LONGEST = 120  # words of a repeated phrase
_COUNTS = 16  # numbers or single letters in a row; a countdown from ten is allowed
_COUNTER = (5, 20)  # repetitions, and words in total, of a phrase that is repeated with other numbers
_SENTENCES = ((3, 4), (2, 10))  # occurrences of a sentence, and words in it
_CHARACTERS = re.compile(r"(\S{2,20}?)\1{7,}|(\S)\2{23,}")
_DENSE = (400, 4.5)  # least bytes, and compression ratio; descriptions of this length have ratios of 1.5 to 2.5
_NUMBER = re.compile(
    r"\d[\w.,:/%]*|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred"
)
_SENTENCE_END = re.compile(r"[.!?。！？…\n]+")


def repetition(text: str) -> str:
    """The repeated part of a text, or an empty string."""
    text = text[:READ]
    if found := _CHARACTERS.search(text):
        return _quote(found[1] or found[2])
    said = words(text)
    return _loop(said) or _counter(said) or _sentence(text) or _dense(text)


def _loop(said: list[str]) -> str:
    """The words that are repeated several times in a row."""
    for period in _possible_periods(said):
        run, start = _longest_run(said, period)
        times = run // period + 1
        if any(times >= least and run + period >= total for least, total in _RULES):
            return _quote(" ".join(said[start : start + period]))
    return ""


def _counter(said: list[str]) -> str:
    """Numbers or letters in a row, or one phrase repeated with other numbers."""
    kinds = ["#" if _NUMBER.fullmatch(word) else "@" if len(word) == 1 and word.isascii() else word for word in said]
    if "#" not in kinds and "@" not in kinds:
        return ""
    for period in _possible_periods(kinds):
        run, start = _longest_run(kinds, period)
        phrase = {*kinds[start : start + period]}
        if phrase <= {"#", "@"} and run + period >= _COUNTS:
            return _quote(" ".join(said[start : start + 4]))
        if phrase & {"#", "@"} and run // period + 1 >= _COUNTER[0] and run + period >= _COUNTER[1]:
            return _quote(" ".join(said[start : start + period]))
    return ""


def _possible_periods(said: list[str]) -> list[int]:
    """The distances between equal runs of three words, ascending: only these can be periods of a loop."""
    last: dict[tuple[str, ...], int] = {}
    found = set()
    for index, three in enumerate(zip(said, said[1:], said[2:], strict=False)):
        found.add(index - last.get(three, index))
        last[three] = index
    return sorted(period for period in found if 0 < period <= _LONGEST)


def _longest_run(said: list[str], period: int) -> tuple[int, int]:
    """The length of the longest run of words that equal the word `period` before, and where the run starts."""
    longest = run = start = 0
    for index, (one, other) in enumerate(zip(said, said[period:], strict=False)):
        run = run + 1 if one == other else 0
        if run > longest:
            longest, start = run, index - run + 1
    return longest, start


def _sentence(text: str) -> str:
    """A sentence that occurs several times anywhere in a text."""
    sentences = Counter(tuple(words(part)) for part in _SENTENCE_END.split(text))
    for sentence, times in sentences.items():
        if any(times >= least and len(sentence) >= length for least, length in _SENTENCES):
            return _quote(" ".join(sentence))
    return ""


def _dense(text: str) -> str:
    """The most common pair of words of a long text that compresses too well."""
    content, (least, ratio) = text.encode(errors="replace"), _DENSE
    if len(content) < least or len(content) < ratio * len(zlib.compress(content)):
        return ""
    ((pair, _),) = Counter(pairwise(words(text))).most_common(1) or [((text[:20],), 0)]
    return _quote(" ".join(pair))


def _quote(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"
