"""Removal of what chat models and services put around a caption.

That is reasoning, tokens of chat templates, grounding boxes, code fences, JSON, tags, Markdown, and remarks to the
reader. Each layer is a function from text to text that removes one kind. If it is not certain what the caption is, the
layer raises `Ambiguous`, and the captioner is asked again. A caption that only contains braces, quotes or a list is
returned unchanged.
"""

import re
from collections.abc import Callable

from components.checks.wrapping import chat_tokens, grounding, markup, prose, reasoning, structure
from components.checks.wrapping.common import Ambiguous, tidy

READ = 400_000  # characters of an answer; most of it may be reasoning
LONGEST = 20_000  # characters of an answer without reasoning; no caption is longer
_STEPS = 40  # wrappings to remove, at most
_BLANKS = " \t\r\n\f\v\u00a0\u200b\u200c\u200d\u200e\u200f\u2060"

# Outer layers come first: the content of JSON, quotes or a fence can be wrapped again.
_LAYERS: tuple[Callable[[str], str], ...] = (
    tidy,
    structure.from_json,
    structure.unquoted,
    prose.without_start,
    reasoning.final_channel,
    reasoning.without_reasoning,
    structure.without_markers,
    structure.fenced,
    grounding.without_boxes,
    chat_tokens.own_turn,
    structure.tagged,
    structure.unescaped,
    prose.without_end,
    markup.without_markdown,
)


def extract_caption(text: str) -> tuple[str, str]:
    """The caption in a model's answer as one line, and an empty string; or the whole text, and a complaint."""
    found = tidy(text[:READ].replace("\ufeff", "")).strip(_BLANKS)
    try:
        if len(found) > LONGEST:
            found = reasoning.without_reasoning(reasoning.final_channel(found))
        if len(found) > LONGEST:
            raise Ambiguous("it is far too long; write one paragraph")
        for _ in range(_STEPS):
            before = found
            found = _unwrap(found)
            if found == before:
                break
        prose.check_leftovers(found)
    except Ambiguous as complaint:
        return one_line(text[:READ]), str(complaint)
    return one_line(found), ""


def _unwrap(text: str) -> str:
    """A text without the wrapping that the first matching layer removes; unchanged if none matches."""
    changed = (layer(text).strip(_BLANKS) for layer in _LAYERS)
    return next((inner for inner in changed if inner != text), text)


def wrapping(text: str) -> str:
    """A complaint about a text that isn't only a caption, or an empty string. Outer quotes and italics are allowed."""
    caption, complaint = extract_caption(text)
    if complaint or _bare(caption) == _bare(one_line(text[:READ])):
        return complaint
    return "it holds more than the description; write the description alone"


def one_line(text: str) -> str:
    """A text without line breaks, and with single spaces."""
    return " ".join(text.split())


def _bare(text: str) -> str:
    return re.sub(r"(?<!\*)\*(?!\*)|(?<!_)_(?!_)", "", text).strip("\"'“”‘’«» ")
