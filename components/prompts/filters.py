"""Repair of raw prompts, and the tests that reject them: pure functions of a text.

Each test returns an empty string if the text passes, otherwise what was found. Near duplicates are compared by
`content_phrases`. Languages are identified by py3langid, which is small, works offline, and is accurate on very short
prompts.
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

UNDECIDED = "und"  # ISO 639's code for an undetermined language
LANGUAGE_CONFIDENCE = 0.5  # below it, a language that is not accepted counts as undetermined
LANGUAGE_CHARACTERS = 200  # of a text that its language is identified from
CONTROL_SHARE = 0.1  # a text with a larger share of control characters is binary or truncated, not repairable

# The languages to choose from. Among all of py3langid's 97, rare ones would win on three-word prompts.
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
    """The content of `wordlists.yaml`."""
    import yaml

    return yaml.safe_load((resources.files("components.prompts") / "wordlists.yaml").read_text(encoding="utf-8"))


def text_id(text: str) -> str:
    """A prompt's id: the first 16 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- repair ----------------------------------------------------------------------------------------------------------


def control_damage(text: str) -> str:
    """Why control characters make `text` unusable: a NUL, or more than a few stray ones."""
    if text.isprintable():
        return ""
    if "\x00" in text:
        return "holds a NUL"
    count = len(_CONTROL.findall(text))
    return f"{count} control characters in {len(text)}" if count > CONTROL_SHARE * len(text) else ""


def repair(text: str) -> str:
    """Undo transport damage: mojibake, HTML entities, stray control and invisible characters, odd white space.

    Repairing the result again changes nothing. What can't be recovered is shown as U+FFFD.
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
    return "\ufffd"  # it still changes: escapes nested deeper than happens by accident


def text_damage(text: str) -> str:
    """Whether characters of a repaired text are lost."""
    return f"{text.count(chr(0xFFFD))} unreadable characters" if "\ufffd" in text else ""


# --- language --------------------------------------------------------------------------------------------------------


@cache
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(sorted(languages))
    return identifier


def identify_language(text: str, accepted: Sequence[str]) -> tuple[str, float]:
    """The ISO 639-1 code of a text's language and its probability; `und` if it is not accepted and uncertain."""
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
    """The kind of unsafe content that `text` asks for, and the word that shows it."""
    patterns = _unsafe_patterns()
    found = patterns["any"].search(text.casefold())
    if not found:
        return ""
    kind = next(name for name, pattern in patterns.items() if name != "any" and pattern.fullmatch(found[0]))
    return f"{kind}: {found[0]}"


# The look-behind keeps the search linear: without it, a match would be tried at every character of a long word.
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
    """The kind of personal data in `text`; the data themselves are not quoted, so that reports don't spread them."""
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
    """Whether the checksum of payment card numbers is correct (ISO/IEC 7812-1)."""
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


# --- similarity ------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+|[^\w\s-]|(?<!\w)-|-(?!\w)")  # a hyphen inside a word doesn't split it
# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces, so each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@cache
def _any_word() -> re.Pattern[str]:
    """`_WORD` for every script: vowel signs and accents, which \\w doesn't match, belong to the letter before them."""
    marks = "".join(char for char in map(chr, range(0x20000)) if unicodedata.category(char) in ("Mn", "Mc"))
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:(?![{_UNSPACED}])[\w{marks}])+|[^\w\s-]|(?<!\w)-|-(?!\w)")


def _is_symbol(char: str) -> bool:
    """Whether a character is a symbol with a meaning, such as an emoji, and not punctuation."""
    return unicodedata.category(char) == "So"


@cache
def _grammar() -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    lists = wordlists()
    return frozenset(lists["stop_words"]), frozenset(lists["determiners"]), frozenset(lists["prepositions"])


def content_phrases(text: str) -> list[list[str]]:
    """The content words of a text in lower case, in phrases, without punctuation and stop words.

    Punctuation, articles and prepositions start a new phrase; a preposition is joined to the next word, because it
    decides that word's role ("from:left" and "to:left" differ). A text of stop words alone is one phrase.
    """
    stop_words, determiners, prepositions = _grammar()
    phrases: list[list[str]] = [[]]
    preposition = ""
    pattern = _WORD if text.isascii() else _any_word()
    for word in pattern.findall(text.casefold()):
        if word in stop_words:
            continue
        if word in determiners or word in prepositions or not (word[0].isalnum() or _is_symbol(word[0])):
            phrases.append([])
            preposition = f"{word}:" if word in prepositions else preposition
        else:
            phrases[-1].append(preposition + word)
            preposition = ""
    return [phrase for phrase in phrases if phrase] or [[text.casefold()]]


def content_features(phrases: Sequence[Sequence[str]]) -> frozenset[str]:
    """Features of phrases for Jaccard: every word and every pair of neighbours in a phrase, repetitions numbered.

    So the order within a phrase counts and the order of phrases doesn't: "on grass, a red car" equals "a red car on
    grass", and "a dog bites a man" differs from "a man bites a dog".
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
