"""Reasoning in an answer: between tags of any spelling, also unopened or unclosed ones, and in channels."""

import re

from components.checks.wrapping.common import Ambiguous, answer_rank, is_prose, phrases, shown
from components.checks.wrapping.prose import describes

_NAME = (
    r"(?:[a-z]{1,16}[:_-](?:of[_-])?)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|rationale|reflect(?:ion)?|analysis"
    r"|scratch_?pad|monologue|cot|planning|deliberation|ponder(?:ing)?|思考|思维|推理)(?:[_-][a-z]{1,16})?"
)
# <think>, </seed:think>, [THINK], ◁/think▷, <|begin_of_thought|>, <|END_THINKING|>, <|channel>thought, <unused94>
_TAG = re.compile(
    rf"(?:<|&lt;|◁|《|\{{)\s*(?P<close>\\?/\s*|end[_-](?:of[_-])?)?{_NAME}(?:\s[^<>\n]{{0,80}})?\s*(?:>|&gt;|▷|》|\}})"
    r"|\[\s*(?P<close2>/)?\s*(?:think(?:ing)?|thoughts?|reasoning)\s*\]"
    rf"|<\|\s*(?P<close3>/|end[_-](?:of[_-])?)?{_NAME}\s*\|>"
    r"|<\|channel>\s*(?:thought|thinking|analysis)\b|(?P<close4><channel\|>)"
    r"|<unused94>\s*(?:thought\b)?|(?P<close5><unused95>)",
    re.IGNORECASE,
)
_EMPTY_TAG = re.compile(rf"<{_NAME}\s*/>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<([A-Za-z_]{1,40})>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>[a-z]+)[^<]{0,100}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>")
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# Names of channels whose tokens a tokenizer removed: "analysisWe need ... assistantfinalA ball moves."
_BARE_FINAL = re.compile(r"assistantfinal|(?<=[.!?\"\s])assistant\s+final(?=\s*[A-Z\"“{])")
_BARE_ANALYSIS = re.compile(r"analysis(?=[A-Z\"“\n])")
_ONLY = "it holds only reasoning; write the description alone"
_MIXED = "it holds reasoning as well; write the description alone"


def final_channel(text: str) -> str:
    """The final channel of an answer in the harmony format, with or without its tokens; other texts are unchanged."""
    messages = list(_CHANNEL.finditer(text))
    if messages:
        ends = [*(found.start() for found in messages[1:]), len(text)]
        bodies = [(found["name"], text[found.end() : end]) for found, end in zip(messages, ends, strict=True)]
        finals = [_CHANNEL_END.split(body, maxsplit=1)[0] for name, body in bodies if name == "final"]
        last = bodies[-1][1].rpartition("<|end|>")
        for answer in (*reversed(finals), last[2] if last[1] else ""):
            if answer.strip():
                return answer
        raise Ambiguous(_ONLY)
    if found := list(_BARE_FINAL.finditer(text)):
        return text[found[-1].end() :]
    if _BARE_ANALYSIS.match(text):
        raise Ambiguous(_ONLY)
    return text


def without_reasoning(text: str) -> str:
    """A text without reasoning; raises `Ambiguous` if nothing is left, or several parts."""
    text = _EMPTY_TAG.sub("", text)
    tags = [(found.start(), found.end(), _is_closing(found)) for found in shown(_TAG, text)]
    if not tags:
        return _without_marked_thoughts(text)
    parts, ended = _visible(text, tags)
    said = [part for part in parts if part.strip()]
    if any(answer_rank(name) >= 0 for part in said for name in _ANSWER_TAG.findall(part)):
        return "\n".join(said)
    if not said or (not ended and not re.search(r"[.!?。！？\"”)]\s*$", said[-1])):
        raise Ambiguous(_ONLY if not said else _MIXED)
    prose = [part for part in said if describes(part) and not phrases()["reasoning"]["opening"].match(part)] or said[
        -1:
    ]
    chosen = prose[0]
    broken = chosen is not said[0] and re.match(r"\s*[a-z,;]", chosen)
    if len(prose) > 1 or broken or (not ended and chosen is not said[-1]):
        raise Ambiguous(_MIXED)
    return chosen


def _is_closing(found: re.Match[str]) -> bool:
    return any(found[name] for name in ("close", "close2", "close3", "close4", "close5"))


def _visible(text: str, tags: list[tuple[int, int, bool]]) -> tuple[list[str], bool]:
    """The parts of a text outside of reasoning, and whether the last reasoning is closed.

    Tags nest if they are balanced. Otherwise any closing tag ends the reasoning, and an opening tag within it has no
    effect. If a closing tag has no opening tag, all text before it is reasoning.
    """
    nested = _balanced([closing for _, _, closing in tags])
    parts, depth, last_end = [""], 0, 0
    for start, end, closing in tags:
        if depth == 0:
            parts.append(text[last_end:start])
        if closing:
            parts = parts if depth else []
            depth = depth - 1 if nested else 0
        else:
            depth = depth + 1 if nested else 1
        last_end = end
    return ([*parts, text[last_end:]], True) if depth == 0 else (parts, False)


def _balanced(closings: list[bool]) -> bool:
    depth = 0
    for closing in closings:
        depth += -1 if closing else 1
        if depth < 0:
            return False
    return depth == 0


def _without_marked_thoughts(text: str) -> str:
    """A text without reasoning that has no tags, only a label or typical words; it ends at the last answer label."""
    patterns = phrases()["reasoning"]
    if (block := patterns["block"].match(text)) and is_prose(text[block.end() :]):
        return text[block.end() :]
    if not (patterns["label"].match(text) or patterns["opening"].match(text)):
        return text
    answers = list(patterns["answer"].finditer(text))
    if not answers:
        raise Ambiguous(_ONLY)
    return text[answers[-1].end() :]
