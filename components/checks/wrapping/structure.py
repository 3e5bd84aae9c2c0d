"""Machine-readable wrappings of a text: marker lines, code fences, JSON, tags, quotes."""

import ast
import html
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from components.checks.texts import words
from components.checks.wrapping.chat_tokens import own_turn
from components.checks.wrapping.common import Ambiguous, answer_rank, bracket_depth, is_prose, only, shown
from components.checks.wrapping.prose import describes, without_remarks

DEPTH = 32  # nested brackets, at most
_MARKER = re.compile(r" ?={2,4} ?[0-9a-f]{16} ?={2,4} ?\n?")
_FENCE = re.compile(r"`{3,}|~{3,}|'''|\"\"\"")
_WHOLE_FENCE = re.compile(r"(?P<fence>`{3,}|~{3,})[^\n`]{0,40}\n(?P<text>.*?)\n?[ \t]*(?P=fence)", re.DOTALL)
_WHOLE_TAG = re.compile(r"<(?P<name>[A-Za-z_]{1,40})>(?P<text>(?:(?!</?(?P=name)>).)*)</(?P=name)>", re.DOTALL)
_LANGUAGE = re.compile(
    r"[ \t]*[\w+-]{0,20}[ \t]*(?:\n|\\n)|(?:json|text|txt|markdown|md|plaintext|plain|yaml|xml|html)(?=[\s{\[])"
)
_OBJECT = re.compile(r"[\[{]\s*[\"'“{\[]|\{\s*\w{1,40}\s*:")
_BARE_KEY = re.compile(r"\"\w{1,40}\"\s*:\s*\"")
_ONE_KEY = re.compile(r"\{\s*\"?(?P<key>\w{1,40})\"?\s*:\s*\"(?P<text>.*)\"\s*,?\s*\}", re.DOTALL)
_THOUGHTS = re.compile(r"think|thought|reason|analysis|rationale|plan|reflection|role|type|model|object|^id$", re.I)
_TAG = re.compile(
    r"<(?P<end>/)?(?P<name>[A-Za-z][\w:.-]{0,40})"
    r"(?:\s+[\w:-]{1,40}\s*=\s*(?:\"[^\"<>]{0,200}\"|'[^'<>]{0,200}'|[^\s\"'<>]{1,200})){0,8}\s*/?>"
)
_LISTS = {"ul", "ol", "li", "dl", "table", "tr", "td"}
_COMMENT = re.compile(r"<!--.{0,2000}?-->|<\?xml[^<>]{0,200}\?>|<!DOCTYPE[^<>]{0,200}>", re.DOTALL)
_FORMAT = re.compile(r"<(b|i|em|strong|u|mark)>(?=\S)([^<>]{1,2000})(?<=\S)</\1>", re.IGNORECASE)
_LINE_BREAK = re.compile(r"<br\s*/?>|</?(?:p|div|section|article|body|html|span|main|center)(?:\s[^<>]{0,200})?>", re.I)
_ENTITY = re.compile(r"&(?:quot|amp|apos|nbsp|lt|gt|#\d{1,5}|#x[0-9a-f]{1,5});", re.IGNORECASE)
_ESCAPES = re.compile(r"\\n(?=\\n|\s*[A-Z*#-]|\s*$)|\\\"|\\u[0-9a-fA-F]{4}")
_BEFORE_QUOTES = (*" \n\t([{\"“”'", "")
_QUOTES = (
    "** **",
    "__ __",
    "~~ ~~",
    "$$ $$",
    "\\[ \\]",
    "\\( \\)",
    "【 】",
    '" "',
    "“ ”",
    "” ”",
    "« »",
    "„ “",
    "「 」",
    "『 』",
    "' '",
    "‘ ’",
    "` `",
)
_PAIRS = [pair.split() for pair in (*_QUOTES, "( )", "[ ]", "{ }")]
_LATEX = re.compile(r"\$*\\(?:boxed|text)\{(?P<text>.*)\}\$*", re.DOTALL)


def without_markers(text: str) -> str:
    """A text without the marker lines of a request, which a model may copy into its answer."""
    parts = [part for part in _MARKER.split(text) if part.strip()]
    if len(parts) < 2 or not _MARKER.search(text):
        return _MARKER.sub("", text)
    return only([part for part in parts if describes(part)] or parts, "marker lines and more than one text")


def fenced(text: str) -> str:
    """The content of a text's only code fence; raises `Ambiguous` if there is a description beside it."""
    parts = _FENCE.split(text)
    if len(parts) == 1:
        return text
    parts = [_LANGUAGE.sub("", part, count=1) if number % 2 else part for number, part in enumerate(parts)]
    said = [part for part in parts if describes(part)]
    if len(said) > 1 or (said and len(parts) > 3):
        raise Ambiguous("it holds a code block beside the description; write the description alone")
    return said[0] if said else " ".join(part for part in parts if part.strip())


def from_json(text: str) -> str:
    """The caption in JSON (or in a Python literal); a text that isn't JSON is returned unchanged."""
    if text[:1] not in ("{", "[", '"'):
        return text
    if bracket_depth(text) > DEPTH:
        raise Ambiguous("it is JSON with too many brackets; write plain text")
    value, rest = _decode(text)
    if value is None or (not isinstance(value, str) and not any(_strings(value))):
        if value is None and _OBJECT.match(text):
            raise Ambiguous("it is JSON that can't be read; write plain text")
        return text
    if words(without_remarks(own_turn(_MARKER.sub("", rest)))):
        if isinstance(value, str):
            return text  # a caption that begins with the quoted text of a sign
        raise Ambiguous("it holds JSON beside the description; write plain text")
    return value if isinstance(value, str) else _choose(value)


def _decode(text: str) -> tuple[Any, str]:
    """The JSON value at the start of a text (None if there is none), and the text after it."""
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(f"{{{text}}}" if _BARE_KEY.match(text) else text)
        return _with_further(value, text[end:])
    except (ValueError, RecursionError):
        pass
    if (found := _ONE_KEY.fullmatch(text)) and not re.search(r"\"\s*,\s*\"\w+\"\s*:", found["text"]):
        return {found["key"]: found["text"]}, ""
    if not _OBJECT.match(text):
        return None, ""
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes
            return ast.literal_eval(text), ""
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None, ""


def _with_further(value: Any, rest: str) -> tuple[Any, str]:
    """A JSON value, in a list with any objects directly after it, and the text after them."""
    values = [value]
    while isinstance(value, dict) and rest.lstrip()[:1] == "{":
        try:
            further, end = json.JSONDecoder(strict=False).raw_decode(rest.lstrip())
        except (ValueError, RecursionError):
            break
        values, rest = [*values, further], rest.lstrip()[end:]
    return (values if len(values) > 1 else value), rest


def _choose(value: Any) -> str:
    """The caption among the strings of an object or list: the one with the best-ranked key, or the only one."""
    found = list(_strings(value))
    prose = [(answer_rank(key), text) for key, text in found if is_prose(text)]
    if not prose:
        prose = [(answer_rank(key), text) for key, text in found if text.strip()]
    named = [rank for rank, _ in prose if rank >= 0]
    chosen = [text for rank, text in prose if not named or rank == min(named)]
    return only(chosen, "JSON with several texts")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a JSON value with their keys, without those of reasoning."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _strings(each, key)
    elif isinstance(value, dict):
        for name, each in value.items():
            if not _THOUGHTS.search(str(name)) or answer_rank(str(name)) >= 0:
                yield from _strings(each, str(name))


def tagged(text: str) -> str:
    """The content of a text's tags (XML, HTML): of an answer's tag, or of a tag around the whole text."""
    text = _COMMENT.sub("", text)
    tags = list(shown(_TAG, text))
    if not tags:
        return text
    answers = sorted({rank for tag in tags if (rank := answer_rank(tag["name"])) >= 0})
    if answers:
        return only(_between(text, [tag for tag in tags if answer_rank(tag["name"]) == answers[0]]), "several texts")
    if any(tag["name"].casefold() in _LISTS for tag in tags):
        raise Ambiguous("it holds a list; write one paragraph of plain text")
    first, last = tags[0], tags[-1]
    around = first.start() == 0 and last.end() == len(text) and last["end"] and first["name"] == last["name"]
    if around and [tag["name"] for tag in tags].count(first["name"]) == 2:
        return text[first.end() : last.start()]
    text = _FORMAT.sub(r"\2", text)
    if _LINE_BREAK.match(text) or "<br" in text:
        text = _LINE_BREAK.sub("\n", text)
    if edge := next((tag for tag in shown(_TAG, text) if tag.start() == 0 or tag.end() == len(text)), None):
        raise Ambiguous(f"it holds '{edge[0]}'; write plain text")
    return text


def _between(text: str, tags: list[re.Match[str]]) -> list[str]:
    """The contents of tags of one name; without its partner, a tag reaches to the end of the text or from its start."""
    if not any(tag["end"] for tag in tags):
        return [text[tags[-1].end() :]]
    found, start = [], 0
    for tag in tags:
        if tag["end"]:
            found.append(text[start : tag.start()])
        start = tag.end()
    return found


def unescaped(text: str) -> str:
    """A text with JSON escapes and HTML entities decoded."""
    text = html.unescape(text) if _ENTITY.search(text) else text
    if not _ESCAPES.search(text) or re.search(r"(?<!\\)\"", text):
        return text
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text


def unquoted(text: str) -> str:
    """A text without quotes or bold type around the whole text.

    A text that begins and ends with different quotations keeps them.
    """
    if found := _LATEX.fullmatch(text):
        return found["text"]
    if (whole := _WHOLE_FENCE.fullmatch(text)) and not _FENCE.search(whole["text"]):
        return whole["text"]
    if (whole := _WHOLE_TAG.fullmatch(text)) and answer_rank(whole["name"]) >= 0:
        return whole["text"]
    whole = text[:-1] if text.endswith(('",', "”,", '".', "”.")) else text
    for opening, closing in _PAIRS:
        inner = whole[len(opening) : -len(closing)]
        if whole == f"{opening}{inner}{closing}" and inner.strip() and _is_one(opening, inner, closing):
            return inner
    return text


def _is_one(opening: str, inner: str, closing: str) -> bool:
    """Whether an opening and a closing quote are a pair; other quotes of the kind between them must be pairs."""
    if opening in "([{":
        return not (_OBJECT.match(opening + inner) or re.search(r"[()\[\]{}]", inner))
    if inner[:1] == opening == "`":
        return False  # a fence
    if _OBJECT.match(inner) and inner[-1] in "]}":
        return True
    marks = f"{re.escape(opening)}|{re.escape(closing)}"
    further = re.search(rf"(?<!\w)(?:{marks})|(?:{marks})(?!\w)", inner)  # no apostrophe
    if not further:
        return True
    before, after = inner[: further.start()][-1:], inner[further.end() :][:1]
    return before in _BEFORE_QUOTES and not after.isspace()
