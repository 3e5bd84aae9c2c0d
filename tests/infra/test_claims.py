"""Each promise about a cluster is on its page, is held by a test, and names the source that it was read from."""

import copy
import json

import pytest

from tests.cluster_claims import KINDS, REPORT, declared, find_tests, problems, report


@pytest.fixture(scope="module")
def known():
    return find_tests()


def test_each_promise_has_a_test_and_a_source(known):
    assert problems(declared(), known) == []
    assert {one["kind"] for one in declared()["claims"]} == set(KINDS)


def test_the_report_is_up_to_date(known):
    assert json.loads(REPORT.read_text(encoding="utf-8")) == report(declared(), known), "run `make cluster-claims`"


FAULTS = {
    "is held by no test": {"tests": []},
    "which is no test": {"tests": ["test_that_does_not_exist"]},
    "needs sources": {"sources": []},
    "which has no project, version and file": {"sources": ["hearsay"]},
    "is not on": {"claim": "A pod never fails."},
    "choose one of": {"kind": "hope"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_promise_without_a_test_a_source_or_its_sentence_is_refused(fault, known):
    declaration = copy.deepcopy(declared())
    one = next(one for one in declaration["claims"] if one.get("sources") and one["page"] == "docs/operate.md")
    one.update(FAULTS[fault])
    (problem,) = problems(declaration, known)
    assert fault in problem


def test_a_paragraph_of_a_listed_section_without_a_promise_is_named(known):
    declaration = copy.deepcopy(declared())
    declaration["claims"] = [one for one in declaration["claims"] if "a run doesn't end" not in one["claim"]]
    (problem,) = problems(declaration, known)
    assert "a run doesn't end" in problem
    assert "docs/airflow.md, Troubleshooting" in problem
