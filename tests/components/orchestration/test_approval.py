"""Who may approve, whether anyone has to, and whose approval doesn't count."""

import pytest

from components.orchestration.approval import OWN, approvers, is_required, refusal
from univigu.errors import ConfigError


def test_approvers_are_named_by_their_ids():
    assert approvers(" ada, bob@example.org,,") == [
        {"id": "ada", "name": "ada"},
        {"id": "bob@example.org", "name": "bob@example.org"},
    ]
    assert approvers("") == []


def test_only_the_value_off_dispenses_with_an_approval():
    assert is_required("required")
    assert not is_required("off")
    for unclear in ("", "Off", "false", "no", "0"):
        with pytest.raises(ConfigError, match="set it to required or off"):
            is_required(unclear)


@pytest.mark.parametrize(
    ("answered_by", "started_by", "own", "counts"),
    [
        ("ada", "bob", "no", True),
        ("ada", "ada", "no", False),
        ("ada", "ada", "yes", True),
        ("ada", None, "no", True),  # a schedule or an event started the run
        ("ada", "", "no", True),
    ],
)
def test_an_approval_of_ones_own_run_counts_only_where_the_settings_say_so(
    monkeypatch, answered_by, started_by, own, counts
):
    monkeypatch.setenv(OWN, own)
    said = refusal(answered_by, started_by)
    assert (said == "") is counts
    if not counts:
        assert said.startswith("ada started this run, so another person has to approve its model")


def test_an_unclear_setting_is_refused(monkeypatch):
    monkeypatch.setenv(OWN, "true")
    with pytest.raises(ConfigError, match="UNIVIGU_APPROVE_OWN is 'true'; set it to yes or no"):
        refusal("ada", "ada")
