"""The usage that an answer reports, under the names that various services use. Missing usage is unknown, not 0."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DEPTH = 5  # of nested objects
_PLACES = re.compile(r"usage|meta|token|billed|metric|statistic|x_groq|timing")  # keys under which usage is searched
_PROMPT = {"prompttokens", "inputtokens", "prompttokencount", "inputtokencount", "promptevalcount", "prompt", "input"}
_COMPLETION = {
    "completiontokens",
    "outputtokens",
    "candidatestokencount",
    "outputtokencount",
    "completiontokencount",
    "generatedtokens",
    "generatedtokencount",
    "evalcount",
    "completion",
    "output",
}
_TOTAL = {"totaltokens", "totaltokencount", "total"}
_BESIDE_PROMPT = {"cachereadinputtokens", "cachecreationinputtokens"}  # Anthropic's: not part of its `input_tokens`
_BESIDE_COMPLETION = {"thoughtstokencount"}  # Gemini's: not part of its `candidatesTokenCount`


def read_usage(body: Any) -> dict[str, int]:
    """The tokens of an answer: `prompt_tokens` and `completion_tokens`, or `total_tokens`; empty if unknown.

    A count of zero for a prompt, or for a completion that isn't empty, is taken as unknown.
    """
    for table in _tables(body):
        named = {re.sub(r"[^a-z]", "", key.casefold()): _count(value) for key, value in table.items()}
        prompt, completion = _sum(named, _PROMPT, _BESIDE_PROMPT), _sum(named, _COMPLETION, _BESIDE_COMPLETION)
        total = _sum(named, _TOTAL, set())
        if prompt and completion is not None and (completion or not _has_text(body)):
            completion = max(completion, (total or 0) - prompt)  # some services count reasoning only in the total
            return {"prompt_tokens": prompt, "completion_tokens": completion}
        if total:
            return {"total_tokens": total}
    return {}


def answer_cost(usage: Mapping[str, float], prices: Mapping[str, float]) -> dict[str, float]:
    """The total `tokens` and the `usd` (prices are per million tokens) of one answer; empty if its usage is unknown.

    If only the total is known, every token is charged at the higher price.
    """
    if not usage:
        return {}
    kinds = {"prompt": usage.get("prompt_tokens", 0), "completion": usage.get("completion_tokens", 0)}
    usd = sum(count * prices.get(kind, 0.0) for kind, count in kinds.items())
    usd += usage.get("total_tokens", 0) * max(prices.values(), default=0.0)
    tokens = sum(kinds.values()) + usage.get("total_tokens", 0)
    return {"tokens": tokens, **({"usd": usd / 1e6} if prices else {})}


def _tables(body: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The objects in a body that may contain counts, those nearest to the root first."""
    if not isinstance(body, dict) or depth > _DEPTH:
        return
    if depth:
        yield body
    inner = [value for key, value in body.items() if isinstance(key, str) and _PLACES.search(key.casefold())]
    choices = body.get("choices")
    inner += choices[:1] if isinstance(choices, list) and not depth else []
    for each in inner:
        yield from _tables(each, depth + 1)
    if not depth:
        yield {
            key: value for key, value in body.items() if key.casefold() not in ("prompt", "input", "output", "total")
        }


def _sum(named: Mapping[str, int | None], names: set[str], beside: set[str]) -> int | None:
    """The first count under one of `names`, plus the counts under `beside`."""
    count = next((named[name] for name in names & named.keys() if named[name] is not None), None)
    return None if count is None else count + sum(named.get(name) or 0 for name in beside)


def _count(value: Any) -> int | None:
    """A number of tokens, from a number or a string; None for anything else."""
    if isinstance(value, str):
        value = value.replace(",", "").strip()
        return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 1e9 and math.isfinite(value) and value == int(value) else None


def _has_text(body: Any) -> bool:
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    return bool(choice.get("text") or (message.get("content") if isinstance(message, dict) else message))
