"""Whose fault a failure is: one clip's, everybody's, or that of a service that takes no pictures; what it costs."""

import gzip
import json
from itertools import pairwise

import pytest

from components.bench.captioning.clips import write_caption
from components.captions.captioners.client.endpoint import EVERYBODY
from components.captions.captioners.client.replies import MAX_BYTES, Lost, Refused, decode_reply, read_reply
from components.captions.captioners.client.throttle import MAX_BACKOFF_S, backoff
from univigu.errors import ConfigError, TransientError

from .conftest import KEY, PROMPTS

FRAMES = "http 500 Expected reading 1226 frames, but only loaded 1225 frames from video."


def befell(server, but=("probe",)):
    return [what for _, what in server.requests if what not in but]


def only(number, trouble, times=99):
    """The same trouble for one prompt's requests."""
    return lambda prompt: [trouble] * times if prompt == PROMPTS[number] else []


# --- one clip's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_one_clip_that_is_turned_away_costs_that_clip_and_not_the_run(serve, caption, status, number):
    trouble = f"http {status} Forbidden by rule 123"
    outcomes = caption(serve(only(number, trouble)), 6, concurrency=1)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {
        f"c{number}": "refused_request"
    }
    assert f"HTTP {status}" in outcomes[f"c{number}"].detail


@pytest.mark.parametrize("count", [2, 9, 36])
def test_clips_that_are_all_turned_away_end_the_run_with_the_reason(serve, caption, count):
    server = serve(["http 403 Forbidden by rule 123"] * 99)
    with pytest.raises(ConfigError, match=r"forbids access \(HTTP 403: Forbidden by rule 123\); check that the key"):
        caption(server, count)
    assert len(befell(server)) <= EVERYBODY + 4


def test_a_key_that_is_withdrawn_ends_the_run_and_blames_no_clip(serve, caption):
    server = serve()

    def describe(prompt):
        server.key = "another"
        return write_caption(prompt)

    server.describe = describe
    with pytest.raises(ConfigError, match=r"refuses the key in CAPTION_API_KEY \(HTTP 401\)"):
        caption(server, 36)
    assert {one.status for one in caption.conversations.outcomes.values()} == {"success"}


def test_words_about_a_key_are_in_no_message(serve, caption):
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
def test_a_failure_in_the_same_words_is_the_clips_and_one_of_a_gateway_is_not(serve, caption, trouble, tries):
    server = serve(only(3, trouble))
    outcomes = caption(server, 6)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c3": "no_answer"}
    assert befell(server).count(trouble) == tries
    assert f"{tries} tries brought no answer" in outcomes["c3"].detail


def test_other_words_each_time_are_tried_again(serve, caption):
    troubles = [f"http 500 {word} broke" for word in ("one", "two", "three", "four", "five")]
    server = serve(lambda prompt: troubles)
    assert {one.status for one in caption(server, 2).values()} == {"success"}
    assert len(befell(server)) == 12


def test_the_same_words_for_everybody_are_no_clips_fault(serve, caption):
    def break_down(prompt):
        server.sees = trouble
        return [trouble] * 99

    trouble = "http 500 disk broken"
    server = serve(break_down)
    with pytest.raises(TransientError, match=r"doesn't answer \(HTTP 500: disk broken\)"):
        caption(server, 1, tries=3)
    assert caption.conversations.outcomes == {}


# --- waits -----------------------------------------------------------------------------------------------------------


def test_waits_grow_up_to_a_limit_and_are_the_same_each_time():
    waits = [backoff(1.0, times, "a") for times in range(1, 12)]
    assert all(later > wait for wait, later in pairwise(waits[:5]))
    assert all(0.75 * 2**place <= wait <= 2**place for place, wait in enumerate(waits[:5]))
    assert max(waits) <= MAX_BACKOFF_S
    assert waits == [backoff(1.0, times, "a") for times in range(1, 12)] != [backoff(1.0, 1, "b")] * 11
    assert backoff(60.0, 5, "a") <= 60.0
    assert backoff(1.0, 10**6, "a") <= MAX_BACKOFF_S


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}])
def test_a_rate_limit_that_names_no_time_is_waited_for_longer_each_time(serve, caption, headers, monkeypatch):
    server = serve(only(0, "http 429 Too Many Requests"))
    refuse = server.RequestHandlerClass.refuse
    monkeypatch.setattr(
        server.RequestHandlerClass, "refuse", lambda self, status, words, *_: refuse(self, status, words, headers)
    )
    outcomes = caption(server, 3, patience_s=1.5)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c0": "no_answer"}
    assert 4 <= befell(server).count("http 429 Too Many Requests") <= 9


def test_a_rate_limit_without_a_time_for_everybody_stops_the_step(serve, caption):
    server = serve(sees="http 429 Too Many Requests")
    with pytest.raises(
        TransientError, match=r"turns requests away \(HTTP 429: Too Many Requests\) beyond the 0.5 s of"
    ):
        caption(server, 6, patience_s=0.5, frames=1)
    assert len(server.requests) <= 9


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sees",
    ["http 500 ", "http 404 No endpoints found that support image input", "http 403 No images", "http 503 ", "nothing"],
)
def test_a_service_that_fails_at_pictures_only_takes_none(serve, caption, sees):
    with pytest.raises(ConfigError, match=r"doesn't take 2 pictures \(.*name a vision-language model") as raised:
        caption(serve(sees=sees), 3, tries=2)
    assert "doesn't answer" not in str(raised.value)


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_usage(serve, monkeypatch):
    """Start a server whose answers say what `usage(number of the answer)` says."""
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
def test_a_budget_that_can_not_be_counted_stops_at_the_first_answer(with_usage, caption, budget, usage):
    server = with_usage(lambda number: usage)
    with pytest.raises(ConfigError, match=r"doesn't say how many tokens its answers take.*state one in `requests`"):
        caption(server, 9, budget=budget, prices={"prompt": 2.0, "completion": 6.0})
    assert len(server.requests) == 1
    outcomes = caption(server, 3, budget={"requests": 99})
    assert {one.status for one in outcomes.values()} == {"success"}
    assert outcomes["c0"].usage == {"answers_without_usage": 1}


def test_an_answer_without_usage_costs_a_budget_as_much_as_the_dearest(with_usage, caption):
    counts = {"input_tokens": "100", "output_tokens": "50"}
    server = with_usage(lambda number: counts if number < 2 else None)
    with pytest.raises(ConfigError, match="used up: 750 of 750 tokens"):
        caption(server, 9, budget={"tokens": 750}, concurrency=1)
    assert len(server.requests) == 5


def test_a_request_that_may_have_been_answered_costs_a_budget_as_well(serve, caption):
    server = serve(lambda prompt: ["broken off"] if prompt == PROMPTS[1] else [])
    caption(server, 3, budget={"tokens": 10_000}, concurrency=1)
    assert caption.captioner.endpoint.budget.spent["tokens"] == 5 * 150  # the probe, three answers, and the lost one


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_is_bounded_before_it_is_read():
    bomb = gzip.compress(b" " * (MAX_BYTES + 1))
    assert len(bomb) < 10_000
    with pytest.raises(Refused, match="more than"):
        decode_reply(bomb, "gzip")
    with pytest.raises(Refused, match="more than"):
        decode_reply(b" " * (MAX_BYTES + 1), "")
    assert decode_reply(gzip.compress(b"{}"), "gzip") == decode_reply(b"{}", "identity") == "{}"
    with pytest.raises(Lost, match="compression is broken"):
        decode_reply(b"no gzip", "gzip")


@pytest.mark.parametrize("text", ['{"choices": [' + "[" * 100 + "]" * 100 + "]}", '{"choices": [' + "9" * 5000 + "]}"])
def test_a_body_that_is_nested_too_deep_or_holds_endless_numbers_is_no_answer(text):
    with pytest.raises(Lost, match="is no JSON"):
        read_reply(200, {}, text)


def test_a_clip_whose_answer_is_too_large_is_the_only_one_to_go(serve, caption):
    long = "says " + "A ball moves. " * (MAX_BYTES // 14 + 1)
    outcomes = caption(serve(only(1, long)), 4, deadline_s=5)
    assert {id: one.reason for id, one in outcomes.items() if one.status != "success"} == {"c1": "too_large"}
