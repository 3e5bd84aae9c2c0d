"""Reading an answer of any service: its caption, or why it has none, its usage and its cost."""

import json

import pytest

from components.captions.captioners import CaptionResponse
from components.captions.captioners.client.answers import UNCOUNTED, read_response
from components.captions.captioners.client.usage import answer_cost, read_usage

TEXT = "A ball moves slowly from the left to the right, over coloured bars; a clock counts in the corner."
USAGE = {"prompt_tokens": 100, "completion_tokens": 50}


def answer(message, finish="stop", **choice):
    return {"choices": [{"message": message, "finish_reason": finish, **choice}], "usage": USAGE}


def read(message, finish="stop", **more):
    return read_response(answer(message, finish), {}, **more)


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        f"  {TEXT.replace(' over', chr(10) + 'over')} ",
        [{"type": "text", "text": TEXT}],
        [{"type": "thinking", "thinking": "What?"}, {"type": "output_text", "text": TEXT}, 3],
        [{"type": "reasoning", "text": "What?"}, {"type": "text", "text": {"value": TEXT}}],
        [TEXT],
        {"text": TEXT},
        {"caption": TEXT, "confidence": 0.9},
        f"<think>What do I see?</think>{TEXT}",
    ],
    ids=str,
)
def test_the_text_is_found_in_any_shape(content):
    assert read({"content": content, "reasoning_content": "What?"}) == CaptionResponse(TEXT, usage=USAGE)


def test_an_answer_without_a_text_in_a_known_place_is_empty():
    for message in ({"content": 3}, None, {"content": None, "reasoning_content": TEXT}, {"reasoning": TEXT}, []):
        assert read(message) == CaptionResponse("", usage=USAGE)
    assert read_response({"choices": ["x"]}, {}).text == ""
    assert read(TEXT).text == read_response({"choices": [{"text": TEXT, "finish_reason": "stop"}]}, {}).text == TEXT


@pytest.mark.parametrize("finish", ["stop", "STOP", "end_turn", "eos_token", "stop_sequence"])
def test_an_answer_that_the_model_ended_is_complete(finish):
    assert read({"content": TEXT}, finish) == CaptionResponse(TEXT, usage=USAGE)


@pytest.mark.parametrize("finish", ["length", "MAX_TOKENS", "max_output_tokens", "model_length"])
def test_an_answer_that_was_cut_off_is_truncated(finish):
    assert read({"content": TEXT[:40]}, finish).status == "truncated"


@pytest.mark.parametrize("finish", ["content_filter", "SAFETY", "refusal", "sensitive", "PROHIBITED_CONTENT"])
def test_an_answer_that_was_withheld_is_blocked(finish):
    assert read({"content": TEXT[:40]}, finish).status == "blocked"


@pytest.mark.parametrize("finish", ["tool_calls", "abort", "error", "function_call", "", None, 3, ["stop"], {}])
def test_any_other_ending_is_asked_for_again(finish):
    response = read({"content": TEXT}, finish)
    assert (response.status, response.reason, response.text) == ("success", "unfinished", TEXT)
    assert "write the whole description" in response.detail
    assert read_response({"choices": [{"message": {"content": TEXT}}]}, {}).reason == "unfinished"


def test_a_profile_may_accept_other_finish_reasons():
    assert read({"content": TEXT}, "done", also_complete=["done"]).reason == ""
    assert read({"content": TEXT}, None, also_complete=[None]).reason == ""
    assert read({"content": TEXT}, None, also_complete=["done"]).reason == "unfinished"


@pytest.mark.parametrize("message", [{"content": None, "refusal": "No."}, {"content": [{"refusal": "No."}]}], ids=str)
def test_a_refusal_in_its_own_field_is_blocked(message):
    assert (read(message).status, read(message).detail) == ("blocked", "No.")
    assert read({"content": TEXT, "refusal": ""}).status == "success"


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"usage": USAGE},
        {"usage": {**USAGE, "total_tokens": 150}},
        {"usage": {"input_tokens": 100, "output_tokens": 50}},
        {"usage": {"inputTokens": "100", "outputTokens": "50"}},
        {"usage": {"prompt_tokens": 100.0, "completion_tokens": 50.0}},
        {"usage": {"tokens": {"input": 100, "output": 50}}},
        {
            "usage": {
                "input_tokens": 10,
                "cache_read_input_tokens": 80,
                "cache_creation_input_tokens": 10,
                "output_tokens": 50,
            }
        },
        {"usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 150}},
        {"usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 30, "thoughtsTokenCount": 20}},
        {"meta": {"billed_units": {"input_tokens": 100, "output_tokens": 50}}},
        {"x_groq": {"usage": USAGE}},
        {"usage": None, "token_usage": USAGE},
        {"prompt_eval_count": 100, "eval_count": 50},
        {"choices": [{"message": {"content": TEXT}, "usage": USAGE}]},
    ],
    ids=str,
)
def test_usage_is_read_under_any_known_names(said):
    assert read_usage({"choices": [{"message": {"content": TEXT}}], **said}) == USAGE


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "many",
        {"prompt_tokens": 100},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 100, "completion_tokens": 0},
        {"prompt_tokens": "many", "completion_tokens": 50},
        {"prompt_tokens": -1, "completion_tokens": 50},
        {"prompt_tokens": float("nan"), "completion_tokens": 50},
        {"prompt_tokens": True, "completion_tokens": 50},
    ],
    ids=str,
)
def test_missing_usage_is_unknown_not_zero(usage):
    body = {**answer({"content": TEXT}), "usage": usage}
    assert read_usage(body) == answer_cost(read_usage(body), {"prompt": 1.0}) == {}
    assert read_response(body, {"prompt": 1.0}).usage == {UNCOUNTED: 1}


def test_a_total_alone_is_charged_at_the_higher_price():
    assert read_usage({"usage": {"total_tokens": 150}}) == {"total_tokens": 150}
    assert answer_cost({"total_tokens": 150}, {"prompt": 1.0, "completion": 4.0}) == {"tokens": 150, "usd": 0.0006}
    assert answer_cost(USAGE, {"prompt": 1.0, "completion": 4.0}) == {"tokens": 150, "usd": 0.0003}


def test_usage_nested_too_deeply_is_unknown():
    deep = USAGE
    for _ in range(50):
        deep = {"usage": deep}
    assert read_usage(deep) == {}
    assert json.dumps(deep)
