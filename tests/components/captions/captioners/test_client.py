"""The meaning of a service's headers and replies, the throttle, and the journal."""

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate

import pytest

from components.captions.captioners.client.journal import Journal
from components.captions.captioners.client.replies import Refused, Retryable, Unusable, clean, read_reply
from components.captions.captioners.client.throttle import Throttle, read_delay, retry_after
from univigu.errors import CorruptDataError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("0.5", 0.5),
        ("20ms", 0.02),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("soon", None),
        ("", None),
        (None, None),
        ("-3", None),
        ("nan", None),
    ],
)
def test_delays_are_read_in_every_format(text, seconds):
    assert read_delay(text) == seconds


def test_dates_are_delays_from_now():
    soon = datetime.now(UTC) + timedelta(seconds=20)
    for text in (formatdate(time.time() + 20, usegmt=True), soon.isoformat(), str(time.time() + 20)):
        assert read_delay(text) == pytest.approx(20, abs=1.5)
    assert read_delay(formatdate(time.time() - 20, usegmt=True)) == 0


def test_the_delay_of_a_refusal_is_read_from_any_of_several_headers():
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": "9"}) == 9
    assert retry_after({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s"}) == 2
    assert retry_after({"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "2s"}) is None


def test_the_throttle_halves_once_per_refusal_and_grows_with_answers():
    throttle = Throttle(16)
    assert throttle.limit == 2
    for _ in range(14):
        throttle.record_answer({}, 100)
    assert throttle.limit == 16
    for _ in range(5):  # refused at the same time
        throttle.slow_down(0.05)
    assert throttle.limit == 8
    assert 0 < throttle.wait_s() <= 0.05
    throttle.record_answer({}, 100)
    assert throttle.limit == 8.125
    for _ in range(300):
        throttle.record_answer({}, 100)
    assert throttle.limit == 16


def test_requests_wait_for_a_quota_that_the_requests_in_flight_will_use_up():
    throttle = Throttle(16)
    throttle.in_flight = 5
    requests, tokens = throttle.quotas.values()
    throttle.record_answer({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "9s"}, 100)
    assert requests.wait_s(4) == tokens.wait_s(4) == 0
    requests.reserve()
    assert requests.wait_s(5) == pytest.approx(9, abs=0.1)
    throttle.record_answer({"x-ratelimit-remaining-tokens": "450", "x-ratelimit-reset-tokens": "100ms"}, 100)
    assert 0 < tokens.wait_s(4) <= 0.1
    time.sleep(0.1)
    assert tokens.wait_s(4) == 0


def test_a_quota_smaller_than_one_request_allows_one_at_a_time():
    throttle = Throttle(16)
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0s", "x-ratelimit-limit-tokens": "50"}
    throttle.in_flight = 1
    throttle.record_answer(headers, 100)
    tokens = throttle.quotas["tokens"]
    assert tokens.wait_s(0) == 0
    tokens.reserve()
    assert tokens.wait_s(1) > 0
    assert tokens.wait_s(0) == 0


@pytest.mark.parametrize(
    ("status", "text", "error", "words"),
    [
        (429, '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}', Retryable, "HTTP 429: slow down"),
        (429, '{"error": {"message": "no money", "code": "insufficient_quota"}}', Unusable, "no money"),
        (402, "", Unusable, "HTTP 402"),
        (408, "", Retryable, "HTTP 408"),
        (500, "<html>oops</html>", Retryable, "HTTP 500: <html>oops</html>"),
        (503, "", Retryable, "HTTP 503"),
        (200, '{"error": {"message": "upstream", "code": 502}}', Retryable, "HTTP 502: upstream"),
        (200, '{"error": "odd"}', Retryable, "HTTP 502: odd"),
        (200, '{"choices"', Retryable, "breaks off"),
        (200, "[" * 100_000, Retryable, "breaks off"),
        (200, "", Retryable, "breaks off"),
        (400, '{"error": {"message": "bad picture"}}', Refused, "HTTP 400: bad picture"),
        (400, '{"error": {"code": "content_filter", "message": "m"}}', Refused, "HTTP 400: m"),
        (403, '{"error": {"message": "your input was flagged by moderation"}}', Refused, "flagged"),
        (413, "", Refused, "HTTP 413"),
        (422, '{"detail": [{"msg": "extra field"}]}', Refused, "HTTP 422"),
        (401, '{"error": {"message": "Incorrect API key: sk-abc"}}', Unusable, "^HTTP 401$"),
        (404, '{"detail": "Not Found"}', Unusable, "HTTP 404: Not Found"),
        (307, "", Unusable, "HTTP 307"),
    ],
)
def test_what_a_reply_means(status, text, error, words):
    with pytest.raises(error, match=words):
        read_reply(status, {}, text)


def test_a_services_message_is_cut_to_a_short_line_without_control_characters():
    assert clean("a\nb\x1b[31m\x00c") == "a b [31m c"
    assert clean("key sk-1 here", "sk-1") == "key [key] here"
    assert len(clean("x" * 9999)) == 201


def test_an_answer_outlives_a_killed_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from components.captions.captioners.client.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.keep('one', {'choices': ['\\ud83d']}, {'requests': 1, 'tokens': 150})\n"
        "journal._connection.execute('BEGIN')\n"
        "journal._connection.execute(\"INSERT INTO answers VALUES ('two', '{}')\")\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "journal.sqlite"
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    journal = Journal(path)
    assert journal.find("one") == {"choices": ["\ud83d"]}
    assert journal.find("two") is None
    assert journal.spent() == {"requests": 1, "tokens": 150}


def test_processes_share_a_journal(tmp_path):
    path = tmp_path / "journal.sqlite"
    code = (
        "import sys; from pathlib import Path; from components.captions.captioners.client.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for i in range(40): journal.keep(f'{sys.argv[2]}-{i}', {}, {'requests': 1})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    journal = Journal(path)
    assert len(journal.keys()) == journal.spent()["requests"] == 120


def test_a_damaged_journal_is_reported(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(CorruptDataError, match="move the file away"):
        Journal(path)
