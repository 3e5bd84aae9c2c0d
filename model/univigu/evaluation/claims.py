"""Scoring of attribute claims: what a text states, or a recogniser detects, against the truth.

An attribute has one of several named values ("colour": red, green and so on). A claim is the set of values that a text
states for an attribute; it is empty where the text states none. A claim is correct only if it has exactly one value and
this is the true one, so neither an empty text nor a list of all values scores a point.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from univigu.errors import BadInputError
from univigu.evaluation.intervals import Score, attribute, clustered_mean, share

Claims = Mapping[str, Set[str]]


def single_values(claims: Claims) -> dict[str, str]:
    """The values of the attributes with exactly one claimed value."""
    return {name: next(iter(values)) for name, values in claims.items() if len(values) == 1}


def score_item(truth: Mapping[str, str], found: Mapping[str, str]) -> dict[str, bool]:
    """For each attribute of `truth`, whether `found` has the true value; a missing value is wrong."""
    return {name: found.get(name) == value for name, value in truth.items()}


def summarise(correct: Sequence[Mapping[str, bool]], seed: int = 0) -> dict[str, Score]:
    """One score for each attribute that any item is scored on, and their ``mean`` (see `clustered_mean`).

    An item may have several claims about an attribute, named ``attribute:claim``. Raises `BadInputError` for an
    attribute with the name "mean".
    """
    if any("mean" in item for item in correct):
        raise BadInputError("An attribute can't be named 'mean', the name of the score over all attributes; rename it.")
    grouped: dict[str, list[Mapping[str, bool]]] = {}
    for item in correct:
        claims: dict[str, dict[str, bool]] = {}
        for claim, is_right in item.items():
            claims.setdefault(attribute(claim), {})[claim] = is_right
        for name, of_name in claims.items():
            grouped.setdefault(name, []).append(of_name)
    scores = {name: _share(items, seed) for name, items in grouped.items()}
    return {"mean": clustered_mean(correct, seed), **scores}


def _share(items: Sequence[Mapping[str, bool]], seed: int) -> Score:
    """The share of correct claims about one attribute; several claims of one item are resampled together."""
    if all(len(item) == 1 for item in items):
        return share([is_right for item in items for is_right in item.values()])
    return clustered_mean(items, seed)


def majority_values(truths: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The most common value of each attribute: the best constant guess. Ties go to the first value by name."""
    counts: dict[str, Counter[str]] = {}
    for truth in truths:
        for name, value in truth.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: min(count, key=lambda value: (-count[value], value)) for name, count in counts.items()}
