"""What chat models and services put around a caption, and how it is taken off.

Reasoning, tokens of chat templates, boxes of grounding, code fences, JSON, tags, Markdown, and words to the reader.
Each layer is a function from text to text that takes one kind off. Where what remains may be the caption or not, it
raises `Ambiguous`: such a text is asked for again, never guessed. A caption that merely has braces, quotes or a list in
it comes out as it went in.
"""

import re
from collections.abc import Callable

from components.checks.wrapping import chat_tokens, grounding, markup, prose, reasoning, structure
from components.checks.wrapping.common import Ambiguous, tidy

READ = 400_000  # characters of an answer, most of which may be reasoning
LONGEST = 20_000  # of what is left without reasoning: more is no caption
_STEPS = 40  # wrappings inside and after one another
_BLANKS = " \t\r\n\f\v\u00a0\u200b\u200c\u200d\u200e\u200f\u2060"

# What is around everything comes first: what JSON, quotes or a fence hold can be wrapped again.
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
    """The caption in what a model wrote, as one line, and an empty string; or the whole text, and a complaint."""
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
    """A text without the first wrapping that a layer finds, or as it is."""
    changed = (layer(text).strip(_BLANKS) for layer in _LAYERS)
    return next((inner for inner in changed if inner != text), text)


def wrapping(text: str) -> str:
    """Says what is wrong with a text that isn't a caption alone, or is empty. Quotes around it and italics may stay."""
    caption, complaint = extract_caption(text)
    if complaint or _bare(caption) == _bare(one_line(text[:READ])):
        return complaint
    return "it holds more than the description; write the description alone"


def one_line(text: str) -> str:
    """A text without line breaks, and with single spaces."""
    return " ".join(text.split())


def _bare(text: str) -> str:
    return re.sub(r"(?<!\*)\*(?!\*)|(?<!_)_(?!_)", "", text).strip("\"'“”‘’«» ")
