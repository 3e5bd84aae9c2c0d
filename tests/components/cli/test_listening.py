"""Where servers listen, and who needs a token."""

import pytest

from components.cli.listening import choose_token, is_loopback, listen
from univigu.errors import BadInputError, ConfigError

TOKEN, VARIABLE = "a-token-of-some-length", "UNIVIGU_STUDIO_TOKEN"


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_only_another_address_than_this_machines_own_needs_a_token(host, own, monkeypatch):
    assert is_loopback(host) == own
    monkeypatch.delenv(VARIABLE, raising=False)
    assert bool(choose_token(host, VARIABLE)) == (not own)
    monkeypatch.setenv(VARIABLE, TOKEN)
    assert choose_token(host, VARIABLE) == TOKEN
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        choose_token(host, VARIABLE)


def test_a_port_that_is_taken_is_said_in_a_sentence():
    with listen("127.0.0.1", 0) as taken, pytest.raises(BadInputError, match="give another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
