import math
import os
from pathlib import Path

import pytest

from components.prompts.tokens import load_tokenizer
from components.prompts.workers import AHEAD, map_in_order, worker_count
from univigu.errors import MissingInputError, TransientError


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_few_items_are_consumed_ahead(workers):
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    for done, (item, result) in enumerate(map_in_order(math.factorial, items(), workers)):
        assert (item, result) == (done, math.factorial(done))
        assert len(taken) <= done + 1 + AHEAD * workers
    assert done == 39


@pytest.mark.parametrize("workers", [1, 2])
def test_exceptions_of_the_function_are_raised(workers):
    with pytest.raises(MissingInputError, match="no folder 'tokenizer'"):
        list(map_in_order(load_tokenizer, [Path("nowhere")], workers))


def test_a_killed_process_is_reported_in_one_sentence():
    with pytest.raises(TransientError, match="worker processes was killed"):
        list(map_in_order(os._exit, [9] * 9, 2))


def test_the_number_of_processes_can_be_limited(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert worker_count() == 1
