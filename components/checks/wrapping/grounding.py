"""Boxes and points that grounding models write into their text, and tags around the phrases for them."""

import re

_NUMBERS = r"[\s\d.,;:()\[\]<>-]{0,400}"
_FOUR = r"\s*\d+(?:\.\d+)?(?:\s*,\s*\d+(?:\.\d+)?){3}\s*"
# <box>(1,2),(3,4)</box>, <|box_start|>..<|box_end|>, <loc_12>, <patch_index_0044>, {<1><2><3><4>}, [0.1, 0.2, 0.3, 0.4]
_BOX = re.compile(
    rf"<\|?(?P<name>box|bbox|quad|point|poly|polygon|coord|coordinates|location|roi|det)(?:_start)?\|?>{_NUMBERS}"
    r"(?:<r\d{1,3}>)*<\|?/?(?P=name)(?:_end)?\|?>"
    r"|</?(?:loc|seg|patch_index|bin)_?\d{1,5}>|</?object>|<grounding>|\[SEG\]|<region\d{0,3}>|\{(?:<\d{1,4}>){4}\}"
    rf"|\[{_FOUR}\]|\[\[{_FOUR}\]\]",
    re.IGNORECASE,
)
_PHRASE = re.compile(
    r"<(?P<name>ref|phrase)>(?P<one>[^<>]{0,300})</(?P=name)>"
    r"|<\|object_ref_start\|>(?P<two>[^<>]{0,300})<\|object_ref_end\|>"
    r"|<\|ref\|>(?P<three>[^<>]{0,300})<\|/ref\|>"
    r"|<points?\s[^<>]{0,400}>(?P<four>[^<>]{0,300})</points?>"
    r"|<p>(?P<five>[^<>.]{0,60})</p>(?=\s*(?:\[SEG\]|\{<|\[\[|<box|<roi))"
)
_STRAY = re.compile(r"</?(?:box|bbox|quad|ref|phrase|poly|roi|det)>|<\|(?:object_ref|box|quad)_(?:start|end)\|>")


def without_boxes(text: str) -> str:
    """A text without coordinates and without tags around phrases.

    A phrase between two sentences is not part of them, so it is removed with its box.
    """
    phrases = list(_PHRASE.finditer(text))
    for found in reversed(phrases):
        phrase = next(found[name] for name in ("one", "two", "three", "four", "five") if found[name] is not None)
        before, after = text[: found.start()], text[found.end() :]
        text = before + ("" if _stands_alone(before, phrase, _BOX.sub("", after)) else phrase) + after
    bare = _STRAY.sub("", _BOX.sub("", text))
    return re.sub(r" +(?=[.,;:!?])", "", bare) if bare != text or phrases else text


def _stands_alone(before: str, phrase: str, after: str) -> bool:
    begins = not before.strip() or before.rstrip()[-1] in ".!?:>])"
    ends = not after.strip() or re.match(r"\s*[\"“(]?[A-Z]", after) is not None
    return begins and ends and phrase.rstrip()[-1:] not in (".", "!", "?")
