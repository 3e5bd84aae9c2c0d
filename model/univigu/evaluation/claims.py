"""Scoring of attribute claims: what a text says, or a recogniser sees, against what is true.

An attribute is one of several named values ("colour": red, green ...). A claim is the set of values that an attribute
is said to have: empty where nothing is said. It is right only when it names exactly one value, and that is the true
one, so that neither silence nor a list of everything earns a point.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from univigu.errors import BadInputError
from univigu.evaluation.intervals import Score, attribute, clustered_mean, share

Claims = Mapping[str, Set[str]]


def single_values(claims: Claims) -> dict[str, str]:
    """The value of each attribute of which exactly one value is claimed."""
    return {name: next(iter(values)) for name, values in claims.items() if len(values) == 1}


def score_item(truth: Mapping[str, str], found: Mapping[str, str]) -> dict[str, bool]:
    """Whether `found` has the true value, for each attribute of `truth`; a value that is missing is wrong."""
    return {name: found.get(name) == value for name, value in truth.items()}


def summarise(correct: Sequence[Mapping[str, bool]], seed: int = 0) -> dict[str, Score]:
    """One score for each attribute that any item is scored on, and their ``mean`` (see `clustered_mean`).

    An item may make several claims about an attribute, named ``attribute:claim``.
    """
    if any("mean" in item for item in correct):
        raise BadInputError("An attribute can't be called 'mean', which is the name of the score over all attributes.")
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
    """The share that is right of one attribute's claims, which go together where an item has several."""
    if all(len(item) == 1 for item in items):
        return share([is_right for item in items for is_right in item.values()])
    return clustered_mean(items, seed)


def majority_values(truths: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The commonest value of each attribute: the best guess without looking. Ties go to the first by name."""
    counts: dict[str, Counter[str]] = {}
    for truth in truths:
        for name, value in truth.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: min(count, key=lambda value: (-count[value], value)) for name, count in counts.items()}
