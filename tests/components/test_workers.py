import os
import signal

import pytest

from components.workers import AHEAD, map_in_order, worker_count
from univigu.errors import BadInputError, TransientError


def square(number):
    return number * number


def refuse(number):
    if number == 3:
        raise BadInputError("three is no number")
    return number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items_and_items_are_not_taken_ahead(workers):
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    for done, (item, result) in enumerate(map_in_order(square, items(), workers)):
        assert (item, result) == (done, done * done)
        assert len(taken) <= done + 1 + AHEAD * workers
    assert done == 39


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_function_raises_is_raised(workers):
    with pytest.raises(BadInputError, match="three is no number"):
        list(map_in_order(refuse, range(9), workers))


def test_a_process_that_is_killed_is_told_in_a_sentence():
    with pytest.raises(TransientError, match="worker processes was killed"):
        list(map_in_order(die, range(9), 2))


def test_the_number_of_processes_can_be_limited(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert worker_count() == 1
