"""Votes about two versions, blind and side by side."""

import pytest

from components.registry import votes
from components.registry.votes import CHOICES, Pair
from univigu.errors import BadInputError


def test_the_sides_are_drawn_from_a_number_and_both_occur():
    pairs = [Pair(1, 2, "a seven", 0, order) for order in range(40)]
    sides = [pair.sides() for pair in pairs]
    assert set(sides) == {(1, 2), (2, 1)}
    assert sides == [pair.sides() for pair in pairs]
    assert 10 <= sides.count((1, 2)) <= 30


@pytest.mark.slow
def test_votes_are_kept_in_mlflow_and_counted_for_both_versions(versions):
    name, root = "voted", versions.root
    versions.add(name, 10)
    assert votes.count(name, 1, root) == []
    pair = next(one for order in range(99) if (one := Pair(1, 2, "a seven", 0, order)).sides() == (2, 1))
    assert [votes.record(name, pair, choice, "Ann", root) for choice in CHOICES] == [2, 1, 0]
    votes.record(name, pair._replace(second=3), "neither", "Bob", root)
    first, other = votes.count(name, 1, root)
    assert first[:4] == (2, 1, 1, 1)
    assert (first.share["value"], first.share["n"]) == (0.5, 2)
    assert other == (3, 0, 0, 1, None)
    assert votes.count(name, 2, root)[0][:4] == (1, 1, 1, 1)
    with pytest.raises(BadInputError, match="'both' is no vote"):
        votes.record(name, pair, "both", "Ann", root)
