"""What is in an answer of the chat completions API: a text, how it ended, and what it cost."""

import re
from collections.abc import Mapping
from typing import Any

from components.captioners import CaptionResponse

_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def read_response(body: Mapping[str, Any], prices: Mapping[str, float]) -> CaptionResponse:
    """The caption in an answer. What isn't where it belongs counts as an empty text, which is asked for again."""
    choice = body["choices"][0] if isinstance(body["choices"][0], dict) else {}
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    usage = read_usage(body)
    usage = {**usage, **({"usd": answer_cost(usage, prices)["usd"]} if prices else {})}
    finish = choice.get("finish_reason")
    refusal = message.get("refusal")
    if finish == "content_filter" or (isinstance(refusal, str) and refusal):
        return CaptionResponse("", "blocked", _plain(refusal) or "the service withheld its answer", usage)
    text = _plain(_THOUGHT.sub("", _text_of(message.get("content")) or _text_of(choice.get("text")), count=1))
    if finish == "length":
        return CaptionResponse(text, "truncated", "it was cut off before its end; say less", usage)
    return CaptionResponse(text, usage=usage)


def _text_of(content: Any) -> str:
    """A message's text: a string, or the text parts of a list."""
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text")
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _plain(text: Any) -> str:
    """One line; half a surrogate pair, which has no UTF-8, becomes U+FFFD."""
    text = text if isinstance(text, str) else ""
    return " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def read_usage(body: Any) -> dict[str, int]:
    """Tokens that an answer says it took, `prompt_tokens` and `completion_tokens`; none where it doesn't say."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if isinstance(count, int) and 0 <= count < 1e9}


def answer_cost(usage: Mapping[str, float], prices: Mapping[str, float]) -> dict[str, float]:
    """Tokens in all, and USD, of one answer."""
    kinds = {"prompt": usage.get("prompt_tokens", 0), "completion": usage.get("completion_tokens", 0)}
    usd = sum(count * prices.get(kind, 0.0) for kind, count in kinds.items()) / 1e6
    return {"tokens": sum(kinds.values()), **({"usd": usd} if prices else {})}
