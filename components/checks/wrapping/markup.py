"""Markdown around and in a description: titles, bold type, block quotes."""

import re

from components.checks.wrapping.common import is_prose

_TITLE = re.compile(
    r"(?: ?#{1,6} [^\n]{1,120}| ?(?:\*\*|__)[^*_\n]{1,120}(?:\*\*|__) ?"
    r"|[^\n]{1,120}\n ?[=-]{3,} ?)\n+"
)
_RULE = re.compile(r"^ ?(?:[-*_=] ?){3,}$\n?", re.MULTILINE)
_MARGIN = re.compile(r"^ ?> ?", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\[\]\n]{1,200})\]\((?:https?://|#|/|attachment:|data:)[^()\s]{0,500}\)")
_BOLD = re.compile(r"(\*\*\*|\*\*|___|__)(?=\S)([^*\n]{1,2000}?)(?<=\S)\1")
_ITALIC = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]{1,2000}?)(?<=[^\s*])\*(?![\w*])")
_UNDERLINED = re.compile(r"(?<!\w)_(?=[^\s_])([^_\n]{1,2000}?)(?<=[^\s_])_(?!\w)")
_HEADING = re.compile(r"#{1,6} (?=\S)")
_ITEM = re.compile(r"[-*•–—] (?=\S)")


def without_markdown(text: str) -> str:
    """A text without Markdown. Lists and further headings are kept: such a text isn't one paragraph."""
    if (title := _TITLE.match(text)) and is_prose(text[title.end() :]):
        text = text[title.end() :]
    text = _MARGIN.sub("", _RULE.sub("", text)) if _is_quoted(text) else _RULE.sub("", text)
    text = _LINK.sub(r"\1", text)
    for pattern, kept in ((_BOLD, r"\2"), (_ITALIC, r"\1"), (_UNDERLINED, r"\1")):
        text = pattern.sub(kept, text)
    if "\n" not in text.strip():
        text = (
            _ITEM.sub("", _HEADING.sub("", text, count=1), count=1)
            if _HEADING.match(text) or _ITEM.match(text)
            else text
        )
    return text


def _is_quoted(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(line.lstrip().startswith(">") for line in lines)
