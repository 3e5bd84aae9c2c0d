"""Read a text back into facts, whatever its wording, and say whether all of it is of the grammar.

A sentence becomes a row of slots and words: "First the red one waits" is ``{first} {X} {does}``. It is of the grammar
if that row is one of its sentences and each mention of a digit can be resolved. From other sentences the reader takes
what it recognises.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from components.digits.stories import phrases
from components.digits.stories.scenes import relation

_ARTICLE = "(?:an(?= eight)|a(?! eight))"
_END = r"(?![\w-])"
Token = tuple[str, str]  # a slot's name, or "" for a word, and the text


@dataclass
class Reading:
    """The values that a text gives to each fact, and the sentences that aren't of the grammar."""

    claims: dict[str, set[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    sentences: int = 0

    @property
    def whole(self) -> bool:
        """Whether there is text, and all of it is of the grammar."""
        return self.sentences > 0 and not self.unread


def read(text: str) -> Reading:
    """Read a caption, a prompt, or a model's output; only the last sentence may lack its full stop."""
    story = _Story()
    sentences = re.findall(r"[^.]+\.?", " ".join(text.lower().split()))
    for sentence in filter(None, (sentence.strip() for sentence in sentences)):
        story.reading.sentences += 1
        tokens = _tokens(sentence.removesuffix(".").strip())
        understood = story.follow(tokens)
        if not understood or _row(tokens) not in _grammar():
            story.reading.unread.append(sentence)
    return story.reading


# --- patterns --------------------------------------------------------------------------------------------------------


def _any(texts: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(texts, key=len, reverse=True)) + ")"


def _pattern(phrase: str, named: bool = False, **slots: str) -> str:
    """A phrase as a regular expression; a slot matches its values, or itself, and is a group if `named`."""
    parts = re.split(r"\{(\w+)\}", phrase)
    for i in range(1, len(parts), 2):
        slot = slots.get(parts[i]) or _any(map(re.escape, (*phrases.WORDS[parts[i]], f"{{{parts[i]}}}")))
        parts[i] = f"(?P<{parts[i]}>{slot})" if named else slot
    text = "".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.sub(r"^a(?=\\ )", _ARTICLE, text) if phrase.startswith("a {d}") else text


@cache
def _mentions() -> Mapping[str, re.Pattern[str]]:
    """Patterns of the ways to name a digit."""
    introduced = "|".join(_pattern(text, True).replace("?P<", f"?P<i{i}") for i, text in enumerate(_introductions()))
    referred = "|".join(_pattern(text, True).replace("?P<", f"?P<r{i}") for i, text in enumerate(phrases.REFERENCES))
    return {
        "introduced": re.compile(f"(?:{introduced})(?:{_pattern(phrases.INTRODUCED_AT, True)})?"),
        "referred": re.compile(referred),
        "by_digit": re.compile(_pattern(phrases.BY_DIGIT, True)),
        "it": re.compile(phrases.IT),
        "other": re.compile(_any(map(_pattern, phrases.OTHERS))),
    }


def _introductions() -> list[str]:
    return sorted(phrases.INTRODUCTIONS, key=len, reverse=True)


@cache
def _action_of() -> Mapping[str, str]:
    return {text: action for action, texts in phrases.ACTIONS.items() for text in texts}


@cache
def _islands() -> re.Pattern[str]:
    """What is read in one piece, by its slot; it starts and ends with a word."""
    mention = "(?:" + "|".join(re.sub(r"\?P<\w+>", "?:", pattern.pattern) for pattern in _mentions().values()) + ")"
    never, again = _any(map(re.escape, phrases.NEVER_MOVES)), _any(map(re.escape, phrases.AGAIN))
    move = f"{_any(map(re.escape, _action_of()))}(?:{_any(map(_pattern, phrases.ARRIVES))})?"
    tail = f"(?:{_any(map(re.escape, phrases.THAT))}{never})?"
    passes = _any(_pattern(text, X=mention) for text in phrases.PASSES)
    first = _any(_pattern(text, X=mention) for text in phrases.PASSES_FIRST)
    alone = _any(_pattern(text, X=mention) for text in phrases.PASSES_ALONE)
    pieces = {
        "closing": _any(map(_pattern, phrases.CLOSINGS)) + "$",
        "does": f"{first}{move}|{alone}{tail}|{never}|{again}|{move}(?:{passes}{tail})?",
        "at": _any(map(_pattern, phrases.STARTS)),
        "on": _any(map(_pattern, phrases.ON_BACKGROUND)),
        "first": _any(map(re.escape, phrases.FIRST)),
        "then": _any(map(re.escape, phrases.THEN)),
        "s": _pattern("{s}"),
        "X": mention,
        "b": _pattern("{b}"),
        "n": _any(phrases.NOUNS) + "(?=s?\\b)",
        "itself": r"\{\w+\}",  # in the grammar's own sentences
    }
    ends = {"n": "", "itself": ""}
    return re.compile("|".join(f"(?P<{name}>{text}){ends.get(name, _END)}" for name, text in pieces.items()))


@cache
def _passing() -> re.Pattern[str]:
    """What a digit does while it passes the other one: the side, the other, and whether that one moves."""
    mention = "(?:" + "|".join(re.sub(r"\?P<\w+>", "?:", pattern.pattern) for pattern in _mentions().values()) + ")"
    side = _any(map(re.escape, phrases.WORDS["s"]))
    passes = "|".join(_pattern(text, s=f"(?P<s{i}>{side})", X=f"(?P<X{i}>{mention})") for i, text in _numbered())
    return re.compile(f"(?:{passes})(?:{_any(phrases.THAT)}(?P<never>{_any(map(re.escape, phrases.NEVER_MOVES))}))?")


def _numbered() -> Iterable[tuple[int, str]]:
    return enumerate((*phrases.PASSES_FIRST, *phrases.PASSES, *phrases.PASSES_ALONE))


def _tokens(sentence: str) -> list[Token]:
    """A sentence as slots and words, from left to right."""
    found, at = [], 0
    while at < len(sentence):
        if sentence[at] == " ":
            at += 1
            continue
        island = _islands().match(sentence, at)
        if island and island.end() > at:
            text, name = island[0], str(island.lastgroup)
            found.append((text.strip("{}") if name == "itself" else name, text))
            at = island.end()
        else:
            word = re.findall(r"[\w-]+|\S", sentence[at:])[0]
            found.append(("", word))
            at += len(word)
    return found


def _row(tokens: Iterable[Token]) -> str:
    return " ".join(f"{{{name}}}" if name else text for name, text in tokens)


@cache
def _grammar() -> frozenset[str]:
    return frozenset(_row(_tokens(sentence)) for sentence in phrases.SENTENCES)


# --- meaning ---------------------------------------------------------------------------------------------------------


class _Story:
    """What has been said so far: which digits are known, and which one "it" is."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.digits: dict[str, str] = {}  # by colour
        self.subject: str | None = None

    def follow(self, tokens: list[Token]) -> bool:
        """Take a sentence's facts; False if a mention of a digit, or a repetition, can't be resolved."""
        understood, half, subjects, before = True, 0, set(), ""
        side: tuple[str | None, str] | None = None
        for name, text in tokens:
            if name == "X":
                colour = self.resolve(text)
                if side:
                    understood &= self.relate("side", *side, colour)
                    side = None
                else:
                    self.subject = colour
                    subjects.add(colour)
                understood &= colour is not None
            elif name in ("first", "then"):
                half = int(name == "then")
            elif name == "s":
                side = (self.subject, text)
            elif name in ("on", "b"):
                self.claim("background", _value(text, "b"))
            elif name == "at":
                understood &= self.about(self.subject, "place", _value(text, "p"))
            elif name == "does":
                understood &= self.act(text, half)
            before = name
        if before == "s":
            understood = False
        self.subject = subjects.pop() if len(subjects) == 1 else None
        return understood

    def claim(self, name: str, value: str) -> None:
        self.reading.claims.setdefault(name, set()).add(value)

    def about(self, colour: str | None, name: str, value: str) -> bool:
        if colour:
            self.claim(f"{name}:{colour}", value)
        return colour is not None

    def rests(self, colour: str | None) -> bool:
        return self.about(colour, "first", "stands") and self.about(colour, "then", "stands")

    def relate(self, name: str, one: str | None, words: str, other: str | None) -> bool:
        if not one or not other or one == other:
            return False
        side = next(side for side, texts in phrases.SIDES.items() if words in texts)
        self.claim(name, relation(one, side, other))
        return True

    def resolve(self, text: str) -> str | None:
        """The colour of the digit that a mention names; None if that isn't clear."""
        kind, found = next((kind, m) for kind, pattern in _mentions().items() if (m := pattern.fullmatch(text)))
        if kind == "it":
            return self.subject
        if kind == "other":
            others = [colour for colour in self.digits if colour != self.subject]
            return others[0] if self.subject and len(others) == 1 else None
        parts = {name[-1]: value for name, value in found.groupdict().items() if value}
        if kind == "by_digit":
            named = [colour for colour, digit in self.digits.items() if digit == parts["d"]]
            return named[0] if len(named) == 1 else None
        if kind == "referred" and parts.get("d") == "one":  # "the red one" is red, whatever it is
            del parts["d"]
        colour, known = parts["c"], parts["c"] in self.digits
        if "d" in parts:
            self.claim(f"digit:{colour}", parts["d"])
            self.digits.setdefault(colour, parts["d"])
        if "p" in parts:
            self.claim(f"place:{colour}", parts["p"])
        return colour if known == (kind == "referred") else None

    def act(self, text: str, half: int) -> bool:
        """The facts in what the subject does."""
        subject, understood = self.subject, True
        if passing := _passing().search(text):
            groups = {name[0]: value for name, value in passing.groupdict().items() if value and name != "never"}
            other = self.resolve(groups["X"])
            understood = self.relate("passes", subject, groups["s"], other)
            if passing["never"]:
                understood &= self.rests(other)
            text = text.replace(passing[0], "")
            if not text:
                return understood
        if text in phrases.NEVER_MOVES:
            return self.rests(subject) and understood
        if text in phrases.AGAIN:
            values = self.reading.claims.get(f"first:{subject}", set())
            return len(values) == 1 and self.about(subject, "then", next(iter(values))) and understood
        if arrives := _arrival(text):
            self.about(subject, "place", arrives["p"])
            text = text.replace(arrives[0], "")
        return self.about(subject, ("first", "then")[half], _action_of()[text]) and understood


def _arrival(text: str) -> re.Match[str] | None:
    return next((found for phrase in phrases.ARRIVES if (found := re.search(_pattern(phrase, True), text))), None)


def _value(text: str, slot: str) -> str:
    """The value of a slot in a phrase."""
    (value,) = re.findall(rf"(?<!\w)(?:{'|'.join(sorted(phrases.WORDS[slot], key=len, reverse=True))})(?!\w)", text)
    return value
