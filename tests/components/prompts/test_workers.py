import math
import operator
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.prompts.tokens import load_tokenizer
from components.prompts.workers import AHEAD, ProcessDiedError, Processes, map_in_order, worker_count
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


def test_a_call_that_ends_its_process_costs_only_that_call(tmp_path):
    once = f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'once')!r}); p.exists() or p.touch() or os._exit(1)"
    calls = [(math.factorial, number) for number in range(8)]
    calls[2:2] = [(os._exit, 9), (signal.raise_signal, signal.SIGSEGV), (exec, once), (int, "x")]
    with ThreadPoolExecutor(2) as pool, Processes(operator.call, 2) as call:
        found = [pool.submit(call, *arguments) for arguments in calls]
        errors = [future.exception() for future in found]
    assert [type(error) for error in errors[2:6]] == [ProcessDiedError, ProcessDiedError, type(None), ValueError]
    assert [str(error) for error in errors[2:4]] == ["ended with exit code 9", "was ended by SIGSEGV"]
    assert [future.result() for future in found[:2] + found[6:]] == [math.factorial(number) for number in range(8)]
