"""What makes a raw prompt usable: repair, and the tests that reject one. Pure functions of a text.

Each test answers with an empty string where the text passes, and otherwise with what was seen. Near-duplicates are
compared by `content_phrases`; language by py3langid, which is small, offline, and right on very short prompts.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

UNDECIDED = "und"  # ISO 639's word for a language that can't be told
LANGUAGE_CONFIDENCE = 0.5  # below it, a short text's language is left undecided rather than called foreign
LANGUAGE_CHARACTERS = 200  # of a text, that its language is told from
CONTROL_SHARE = 0.1  # more control characters than this: the row is binary or was cut, so stripping would be guessing

# The languages that prompts come in. All of py3langid's 97 would have rare ones win on three-word prompts.
_LANGUAGES = (
    *("ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it", "ja"),
    *("ko", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sv", "sw", "th", "tr", "uk", "ur", "vi", "zh"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Invisible: zero-width space, soft hyphen, word joiner, byte-order mark, and marks that change the reading direction.
_INVISIBLE = re.compile(r"[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_DASHES = re.compile(r"[\u2010-\u2015\u2212]")
_HTML = re.compile(r"&#?\w{1,31};")


@cache
def wordlists() -> dict[str, Any]:
    """What is in `wordlists.yaml`."""
    import yaml

    return yaml.safe_load((resources.files("components.prompts") / "wordlists.yaml").read_text(encoding="utf-8"))


def text_id(text: str) -> str:
    """A prompt's id: the first 16 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- repair ----------------------------------------------------------------------------------------------------------


def control_damage(text: str) -> str:
    """Says why control characters make `text` unusable: a NUL, or too many of them to be strays."""
    if text.isprintable():
        return ""
    if "\x00" in text:
        return "holds a NUL"
    count = len(_CONTROL.findall(text))
    return f"{count} control characters in {len(text)}" if count > CONTROL_SHARE * len(text) else ""


def repair(text: str) -> str:
    """Undo what transport does to a text: mojibake, HTML entities, stray control and invisible characters, odd blanks.

    The result is a fixed point: repairing it again changes nothing. What can't be recovered stays visible as U+FFFD.
    """
    if text.isascii() and text.isprintable() and not _HTML.search(text):
        return " ".join(text.split())
    import ftfy

    config = ftfy.TextFixerConfig(unescape_html=True, normalization="NFC")
    for _ in range(8):
        fixed = _DASHES.sub("-", _INVISIBLE.sub("", ftfy.fix_text(text, config)))
        fixed = " ".join(_CONTROL.sub("", fixed).split())
        if fixed == text:
            return fixed
        text = fixed
    return "\ufffd"  # it still changes: an escape inside an escape, nested deeper than any accident


def text_damage(text: str) -> str:
    """Says whether something of a repaired text is lost for good."""
    return f"{text.count(chr(0xFFFD))} unreadable characters" if "\ufffd" in text else ""


# --- language --------------------------------------------------------------------------------------------------------


@cache
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted(languages))
    return identifier


def identify_language(text: str, accepted: Sequence[str]) -> tuple[str, float]:
    """The ISO 639-1 code of a text's language and its probability; `und` where it is foreign but far from sure."""
    language, probability = _identifier(tuple({*_LANGUAGES, *accepted})).classify(text[:LANGUAGE_CHARACTERS])
    if language not in accepted and probability < LANGUAGE_CONFIDENCE:
        return UNDECIDED, round(float(probability), 3)
    return language, round(float(probability), 3)


# --- content ---------------------------------------------------------------------------------------------------------


@cache
def _unsafe_patterns() -> dict[str, re.Pattern[str]]:
    def pattern(words: Sequence[str]) -> re.Pattern[str]:
        parts = (re.escape(word.removesuffix("*")) + (r"\w*" if word.endswith("*") else "") for word in words)
        return re.compile(rf"\b(?:{'|'.join(parts)})\b")

    lists = wordlists()["unsafe"]
    patterns = {"any": pattern([word for words in lists.values() for word in words])}
    return patterns | {name: pattern(words) for name, words in lists.items()}


def find_unsafe(text: str) -> str:
    """Names the kind of unsafe content that `text` asks for, and the word that says so."""
    patterns = _unsafe_patterns()
    found = patterns["any"].search(text.casefold())
    if not found:
        return ""
    kind = next(name for name, pattern in patterns.items() if name != "any" and pattern.fullmatch(found[0]))
    return f"{kind}: {found[0]}"


# The look-behind keeps the search linear: without it, every character of a long word would start an attempt of its own.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+\s?(?:@|\[at\]|\(at\))\s?[\w-]+(?:\s?(?:\.|\[dot\]|\(dot\))\s?[\w-]+)+")
_NUMBER = re.compile(r"(?<![\w.])\+?\(?\d(?:[\s().-]{0,2}\d){6,18}(?![\w])")
_DIGIT = re.compile(r"\d")
_DATE = re.compile(r"\d{4}([-./ ])\d{1,2}\1\d{1,2}|\d{1,2}([-./ ])\d{1,2}\2\d{4}")
_ADDRESS = re.compile(
    r"\b\d{1,5}[a-z]?\s+(?:[A-Z][\w'-]+\s+){1,3}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Square|Terrace|Way)\b"
)
_NATIONAL_ID = re.compile(r"\b\d{3}-\d{2}-\d{4}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:\s?[A-Z0-9]{4}){3,7}(?:\s?[A-Z0-9]{1,3})?\b")


def find_personal_data(text: str) -> str:
    """Names the kind of personal data in `text`; never quotes it, so that a report does not spread it."""
    if ("@" in text or "at]" in text or "at)" in text) and _EMAIL.search(text):
        return "e-mail address"
    if not _DIGIT.search(text):
        return ""
    if _ADDRESS.search(text):
        return "street address"
    if _NATIONAL_ID.search(text):
        return "national identity number"
    if _IBAN.search(text):
        return "bank account number"
    for found in _NUMBER.finditer(text):
        if _DATE.fullmatch(found[0]):
            continue
        digits = [int(digit) for digit in found[0] if digit.isdigit()]
        if len(digits) >= 13 and _luhn_holds(digits):
            return "payment card number"
        if len(digits) <= 15 and (len(digits) >= 9 or "-" in found[0] or found[0][0] in "+("):
            return "telephone number"
    return ""


def _luhn_holds(digits: Sequence[int]) -> bool:
    """The check sum that every payment card number satisfies (ISO/IEC 7812-1)."""
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


# --- likeness --------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+|[^\w\s-]|(?<!\w)-|-(?!\w)")  # a hyphen inside a word is no break
# Thai, Lao, Burmese, Khmer, kana and Han: written without blanks, so each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@cache
def _any_word() -> re.Pattern[str]:
    """`_WORD` for every script: vowel signs and accents, which are no letters to it, belong to the one before them."""
    marks = "".join(char for char in map(chr, range(0x20000)) if unicodedata.category(char) in ("Mn", "Mc"))
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:(?![{_UNSPACED}])[\w{marks}])+|[^\w\s-]|(?<!\w)-|-(?!\w)")


def _is_sign(char: str) -> bool:
    """Whether a character that is no letter stands for something, as an emoji does; punctuation doesn't."""
    return unicodedata.category(char) == "So"


@cache
def _grammar() -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    lists = wordlists()
    return frozenset(lists["stop_words"]), frozenset(lists["determiners"]), frozenset(lists["prepositions"])


def content_phrases(text: str) -> list[list[str]]:
    """The content words of a text, in phrases: what is left without case, punctuation and stop words.

    Punctuation, articles and prepositions open a new phrase; a preposition is joined to the word after it, because it
    decides that word's role ("from:left" and "to:left" are not alike). A text of nothing but stop words keeps itself.
    """
    stop_words, determiners, prepositions = _grammar()
    phrases: list[list[str]] = [[]]
    preposition = ""
    pattern = _WORD if text.isascii() else _any_word()
    for word in pattern.findall(text.casefold()):
        if word in stop_words:
            continue
        if word in determiners or word in prepositions or not (word[0].isalnum() or _is_sign(word[0])):
            phrases.append([])
            preposition = f"{word}:" if word in prepositions else preposition
        else:
            phrases[-1].append(preposition + word)
            preposition = ""
    return [phrase for phrase in phrases if phrase] or [[text.casefold()]]


def content_features(phrases: Sequence[Sequence[str]]) -> frozenset[str]:
    """Features of phrases for Jaccard: every word, and every two neighbours in a phrase; a repeated one is another.

    So the order of phrases does not count while the order in a phrase does: "on grass, a red car" is "a red car on
    grass", and "a dog bites a man" is not "a man bites a dog".
    """
    features: list[str] = []
    for phrase in phrases:
        features += phrase
        features += map(" ".join, pairwise(phrase))
    found = frozenset(features)
    if len(found) < len(features):
        times = Counter(features)
        found |= {f"{feature}#{number}" for feature in times for number in range(2, times[feature] + 1)}
    return found
