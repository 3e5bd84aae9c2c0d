"""Reads an answer of the chat completions API: its caption, or why it has none, and its usage and cost."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from components.captions.captioners import CaptionResponse, read_text
from components.captions.captioners.client.usage import answer_cost, read_usage

# The finish reasons of services: of an answer that the model ended, one that was cut off, and one that was withheld.
COMPLETE = {"stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed", "finish_reason_stop"}
_CUT_OFF = {
    "length",
    "max_tokens",
    "max_output_tokens",
    "max_completion_tokens",
    "max_length",
    "model_length",
    "token_limit",
    "incomplete",
    "model_context_window_exceeded",
    "finish_reason_max_tokens",
    "error_toxic_length",
}
_WITHHELD = {
    "content_filter",
    "content_filtered",
    "content-filter",
    "contentfilter",
    "safety",
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "language",
    "image_safety",
    "refusal",
    "sensitive",
    "blocked",
    "moderation",
    "guardrail_intervened",
    "finish_reason_safety",
    "finish_reason_recitation",
    "error_toxic",
}
_NO_TEXT = {
    "thinking",
    "redacted_thinking",
    "reasoning",
    "reasoning_content",
    "reasoning_text",
    "tool_use",
    "tool_call",
}
UNCOUNTED = "answers_without_usage"


def read_response(
    body: Mapping[str, Any], prices: Mapping[str, float], also_complete: Collection[str | None] = ()
) -> CaptionResponse:
    """The caption in an answer. A body without a text counts as an empty one, which is asked for again.

    also_complete: finish reasons of a complete answer besides `COMPLETE`; None for a service that reports none.
    """
    choice = body["choices"][0] if isinstance(body["choices"][0], dict) else {}
    message = choice.get("message", choice.get("text"))
    content = message.get("content") if isinstance(message, dict) else message
    content = choice.get("text") if content is None else content
    usage, finish = _usage_and_cost(body, prices), choice.get("finish_reason", choice.get("finishReason"))
    ending = finish.strip().casefold() if isinstance(finish, str) else finish
    declined = _refusal(message, content)
    if declined or (isinstance(ending, str) and ending in _WITHHELD):
        return CaptionResponse("", "blocked", _well_formed(declined) or "the service withheld its answer", usage)
    response = read_text(_well_formed(_text_of(content)), usage)
    if isinstance(ending, str) and ending in _CUT_OFF:
        return CaptionResponse(response.text, "truncated", "it was cut off before its end; say less", usage)
    if finish in also_complete or (isinstance(ending, str) and ending in COMPLETE):
        return response
    said = f"'{_well_formed(finish)[:40]}'" if isinstance(finish, str) else "nothing"
    detail = f"its end is marked with {said} and not with 'stop'; write the whole description"
    return CaptionResponse(response.text, usage=usage, reason="unfinished", detail=detail)


def _usage_and_cost(body: Mapping[str, Any], prices: Mapping[str, float]) -> dict[str, float]:
    """What an answer adds to the usage in the manifest."""
    usage = read_usage(body)
    cost = answer_cost(usage, prices)
    return {**usage, **({"usd": cost["usd"]} if "usd" in cost else {})} if usage else {UNCOUNTED: 1}


def _text_of(content: Any) -> str:
    """A message's text: a string, the text parts of a list, or JSON that a service has already parsed."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        text = content.get("text")
        return text if isinstance(text, str) else json.dumps(content, ensure_ascii=False)
    return "".join(map(_text_of_part, content)) if isinstance(content, list) else ""


def _text_of_part(part: Any) -> str:
    if not isinstance(part, dict):
        return part if isinstance(part, str) else ""
    text = part.get("text", part.get("content"))
    text = text.get("value") if isinstance(text, dict) else text
    return text if isinstance(text, str) and part.get("type") not in _NO_TEXT else ""


def _refusal(message: Any, content: Any) -> str:
    """The text of a refusal in a field or part of its own, or an empty string."""
    parts = content if isinstance(content, list) else []
    found = [message.get("refusal")] if isinstance(message, dict) else []
    found += [part.get("refusal") for part in parts if isinstance(part, dict)]
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def _well_formed(text: str) -> str:
    """The text with lone surrogates, which UTF-8 can't encode, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
