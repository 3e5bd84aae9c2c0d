"""What a failure concerns: one clip, all clips, or a service that accepts no pictures; and what it costs."""

import gzip
import json
from itertools import pairwise

import pytest

from components.bench.captioning.clips import write_caption
from components.captions.captioners.client.endpoint import MAX_REJECTED_IN_A_ROW
from components.captions.captioners.client.replies import MAX_BYTES, Refused, Retryable, decode_reply, read_reply
from components.captions.captioners.client.throttle import MAX_BACKOFF_S, backoff
from univigu.errors import ConfigError, TransientError

from .conftest import KEY, PROMPTS

FRAMES = "http 500 Expected reading 1226 frames, but only loaded 1225 frames from video."


def replies(server, without=("probe",)):
    return [what for _, what in server.requests if what not in without]


def only(number, trouble, times=99):
    """The same trouble for every request about one prompt."""
    return lambda prompt: [trouble] * times if prompt == PROMPTS[number] else []


# --- one clip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_a_single_refused_clip_is_quarantined_and_the_run_continues(serve, caption, status, number):
    trouble = f"http {status} Forbidden by rule 123"
    outcomes = caption(serve(only(number, trouble)), 6, concurrency=1)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {
        f"c{number}": "refused_request"
    }
    assert f"HTTP {status}" in outcomes[f"c{number}"].detail


@pytest.mark.parametrize("count", [2, 9, 36])
def test_a_run_whose_clips_are_all_refused_stops_with_the_reason(serve, caption, count):
    server = serve(["http 403 Forbidden by rule 123"] * 99)
    with pytest.raises(ConfigError, match=r"forbids access \(HTTP 403: Forbidden by rule 123\); check that the key"):
        caption(server, count)
    assert len(replies(server)) <= MAX_REJECTED_IN_A_ROW + 4


def test_a_revoked_key_stops_the_run_and_quarantines_no_clip(serve, caption):
    server = serve()

    def describe(prompt):
        server.key = "another"
        return write_caption(prompt)

    server.describe = describe
    with pytest.raises(ConfigError, match=r"refuses the key in CAPTION_API_KEY \(HTTP 401\)"):
        caption(server, 36)
    assert {one.status for one in caption.conversations.outcomes.values()} == {"success"}


def test_a_message_about_a_key_is_not_shown(serve, caption):
    outcomes = caption(serve(only(2, f"http 403 Key {KEY[:9]}*** may not do this")), 6)
    assert outcomes["c2"].detail == "HTTP 403"


@pytest.mark.parametrize(
    ("trouble", "tries"),
    [
        (FRAMES, 2),
        ("http 500 Error in request req_01: no such codec", 2),
        ("http 503 The picture can't be decoded", 2),
        ("no choices", 2),
        ("http 503 Service Unavailable", 6),
        ("http 500 The model is overloaded; try again later", 6),
        ("http 502 <html>Bad Gateway</html>", 6),
        ("half json", 6),
    ],
)
def test_a_repeated_message_is_final_for_its_clip_unless_it_comes_from_a_gateway(serve, caption, trouble, tries):
    server = serve(only(3, trouble))
    outcomes = caption(server, 6)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c3": "no_answer"}
    assert replies(server).count(trouble) == tries
    assert f"{tries} tries brought no answer" in outcomes["c3"].detail


def test_failures_with_different_messages_are_retried(serve, caption):
    troubles = [f"http 500 {word} broke" for word in ("one", "two", "three", "four", "five")]
    server = serve(lambda prompt: troubles)
    assert {one.status for one in caption(server, 2).values()} == {"success"}
    assert len(replies(server)) == 12


def test_the_same_message_for_all_clips_is_the_services_fault(serve, caption):
    def break_down(prompt):
        server.sees = trouble
        return [trouble] * 99

    trouble = "http 500 disk broken"
    server = serve(break_down)
    with pytest.raises(TransientError, match=r"doesn't answer \(HTTP 500: disk broken\)"):
        caption(server, 1, tries=3)
    assert caption.conversations.outcomes == {}


# --- waits -----------------------------------------------------------------------------------------------------------


def test_backoff_grows_up_to_a_limit_and_is_deterministic():
    waits = [backoff(1.0, times, "a") for times in range(1, 12)]
    assert all(later > wait for wait, later in pairwise(waits[:5]))
    assert all(0.75 * 2**place <= wait <= 2**place for place, wait in enumerate(waits[:5]))
    assert max(waits) <= MAX_BACKOFF_S
    assert waits == [backoff(1.0, times, "a") for times in range(1, 12)] != [backoff(1.0, 1, "b")] * 11
    assert backoff(60.0, 5, "a") <= 60.0
    assert backoff(1.0, 10**6, "a") <= MAX_BACKOFF_S


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}])
def test_the_waits_for_a_rate_limit_without_a_time_increase(serve, caption, headers, monkeypatch):
    server = serve(only(0, "http 429 Too Many Requests"))
    refuse = server.RequestHandlerClass.refuse
    monkeypatch.setattr(
        server.RequestHandlerClass, "refuse", lambda self, status, words, *_: refuse(self, status, words, headers)
    )
    outcomes = caption(server, 3, patience_s=1.5)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c0": "no_answer"}
    assert 4 <= replies(server).count("http 429 Too Many Requests") <= 9


def test_a_rate_limit_without_a_time_for_all_requests_stops_the_step(serve, caption):
    server = serve(sees="http 429 Too Many Requests")
    with pytest.raises(
        TransientError, match=r"refuses requests \(HTTP 429: Too Many Requests\) for longer than the 0.5 s of"
    ):
        caption(server, 6, patience_s=0.5, frames=1)
    assert len(server.requests) <= 9


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sees",
    ["http 500 ", "http 404 No endpoints found that support image input", "http 403 No images", "http 503 ", "nothing"],
)
def test_a_service_that_fails_only_with_pictures_is_reported_as_such(serve, caption, sees):
    with pytest.raises(ConfigError, match=r"doesn't accept 2 pictures \(.*use a vision-language model") as raised:
        caption(serve(sees=sees), 3, tries=2)
    assert "doesn't answer" not in str(raised.value)


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_usage(serve, monkeypatch):
    """Start a server whose answers report the usage `usage(number of the answer)`."""
    from components.bench.captioning import server as module

    def start(usage):
        said, completion = [], module._completion

        def write(text, finish="stop", _=None, **more):
            body = json.loads(completion(text, finish, **more))
            body["usage"] = usage(len(said))
            said.append(text)
            return json.dumps(body).encode()

        monkeypatch.setattr(module, "_completion", write)
        return serve()

    return start


@pytest.mark.parametrize("budget", [{"tokens": 750}, {"usd": 0.0025}], ids=str)
@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}], ids=str)
def test_a_budget_that_cannot_be_enforced_stops_the_run_at_the_first_answer(with_usage, caption, budget, usage):
    server = with_usage(lambda number: usage)
    with pytest.raises(ConfigError, match=r"doesn't report the tokens of its answers.*set `requests` in"):
        caption(server, 9, budget=budget, prices={"prompt": 2.0, "completion": 6.0})
    assert len(server.requests) == 1
    outcomes = caption(server, 3, budget={"requests": 99})
    assert {one.status for one in outcomes.values()} == {"success"}
    assert outcomes["c0"].usage == {"answers_without_usage": 1}


def test_an_answer_without_usage_is_charged_like_the_most_expensive_one(with_usage, caption):
    counts = {"input_tokens": "100", "output_tokens": "50"}
    server = with_usage(lambda number: counts if number < 2 else None)
    with pytest.raises(ConfigError, match="used up: 750 of 750 tokens"):
        caption(server, 9, budget={"tokens": 750}, concurrency=1)
    assert len(server.requests) == 5


def test_a_request_that_may_have_been_answered_is_charged_too(serve, caption):
    server = serve(lambda prompt: ["broken off"] if prompt == PROMPTS[1] else [])
    caption(server, 3, budget={"tokens": 10_000}, concurrency=1)
    assert caption.captioner.endpoint.budget.spent["tokens"] == 5 * 150  # the probe, three answers, and the lost one


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_the_size_of_a_body_is_limited_before_it_is_decompressed():
    bomb = gzip.compress(b" " * (MAX_BYTES + 1))
    assert len(bomb) < 10_000
    with pytest.raises(Refused, match="more than"):
        decode_reply(bomb, "gzip")
    with pytest.raises(Refused, match="more than"):
        decode_reply(b" " * (MAX_BYTES + 1), "")
    assert decode_reply(gzip.compress(b"{}"), "gzip") == decode_reply(b"{}", "identity") == "{}"
    with pytest.raises(Retryable, match="compression is broken"):
        decode_reply(b"no gzip", "gzip")


@pytest.mark.parametrize("text", ['{"choices": [' + "[" * 100 + "]" * 100 + "]}", '{"choices": [' + "9" * 5000 + "]}"])
def test_a_body_with_deep_nesting_or_huge_numbers_is_rejected(text):
    with pytest.raises(Retryable, match="is no JSON"):
        read_reply(200, {}, text)


def test_a_clip_whose_answer_is_too_large_is_the_only_one_rejected(serve, caption):
    long = "says " + "A ball moves. " * (MAX_BYTES // 14 + 1)
    outcomes = caption(serve(only(1, long)), 4, deadline_s=5)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c1": "too_large"}
