"""The captioning benchmark holds what it claims, on fewer clips: killed, resumed, nothing lost, nothing asked twice."""

from collections import Counter

import pytest

from components.bench import captioning
from components.bench.captioning.troubles import draw_troubles, least_requests


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_a_status_for_every_clip_and_asks_nothing_twice(monkeypatch):
    monkeypatch.setattr(captioning, "CLIPS", 60)
    measured = captioning.measure()
    assert measured["other_status_than_due"] == measured["asked_twice"] == 0
    assert sum(measured["statuses"].values()) == 60
    over = measured["over_the_minimum"]
    assert measured["requests"] - measured["minimum"] <= sum(over.values())
    assert over["probes"] >= 2  # one a run; a busy machine may exceed a request's timeout and send it again
    assert over["begun before the kill and asked again"] <= captioning.OPTIONS["concurrency"]


@pytest.mark.parametrize(
    ("troubles", "least"),
    [
        ((), (1, "success")),
        (("500", "empty", "429"), (4, "success")),
        (("parts",), (1, "success")),
        (("policy",), (1, "blocked")),
        (("refusal",) * 9, (3, "blocked")),
        (("cut off",) * 9, (3, "truncated")),
        (("500",) * 9, (2, "error")),
        (("hang",) * 9, (6, "error")),
        (("429",) * 9, (10, "success")),
    ],
)
def test_the_least_that_a_client_without_fault_sends(troubles, least):
    assert least_requests(troubles, tries=6, attempts=3) == least


def test_troubles_are_the_same_each_time_and_of_every_kind():
    drawn = [draw_troubles(0, f"prompt {number}") for number in range(1000)]
    assert drawn == [draw_troubles(0, f"prompt {number}") for number in range(1000)]
    kinds = Counter(trouble for troubles in drawn for trouble in set(troubles))
    assert len(kinds) == 32
    assert 650 < sum(not troubles for troubles in drawn) < 750
