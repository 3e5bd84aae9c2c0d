"""The tests that a raw prompt passes alone, without a look at the others: what a worker process does with a batch.

The tests run in the order of `FILTERS`, and a row's reason is the first that it fails. Each can be off, or only score:
then what it saw is noted in the row's `scores`, and the row stays.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from components.prompts import filters
from components.prompts.duplicates import Fingerprint, fingerprints
from components.prompts.injection import find_injection
from components.prompts.records import LONGEST_QUOTE, Broken, is_unicode, parse
from components.prompts.sources import Layout, RawBatch
from components.prompts.tokens import load_tokenizer, token_ids

OFF, SCORE, ENFORCE = "off", "score", "enforce"
# What a filter's rows are rejected for. What is no filter of the profile's always applies.
FILTERS: Mapping[str, tuple[str, ...]] = {
    "unicode": ("control_characters", "damaged_text"),
    "licence": ("no_source", "licence"),
    "prompt_injection": ("prompt_injection",),
    "personal_data": ("personal_data",),
    "unsafe": ("unsafe",),
    "language": ("wrong_language",),
    "length": ("over_long", "too_short"),
    "unknown_tokens": ("unknown_tokens",),
    "exact_duplicates": ("exact_duplicate",),
    "near_duplicates": ("near_duplicate",),
    "semantic_duplicates": ("semantic_duplicate",),
    "diversity": ("crowded",),
}
REASONS = (
    "unreadable_file",
    "unreadable_rows",
    "broken_row",
    "no_text",
    "empty",
    *(reason for reasons in FILTERS.values() for reason in reasons),
)
CHARACTERS_PER_TOKEN = 64  # a text longer than this, times the most tokens allowed, is not looked at any closer
WITHHELD = "[withheld]"  # stands for personal data in the quarantine: the raw file has it, and no copy is needed
LONGEST_ID = 200  # characters of a row's own id
MOST_QUOTES = 64  # values of one row


def filter_modes(settings: Mapping[str, Any]) -> dict[str, str]:
    """Each filter's mode, in the order in which they run."""
    given = settings["filters"]
    return {name: OFF if given[name] is False else given[name] for name in FILTERS}  # YAML reads a bare `off` as false


class Finding(NamedTuple):
    """What a test has against a row."""

    filter: str  # empty: always enforced
    reason: str
    detail: str
    figure: float | None = None  # what `scores` hold instead of the detail


class Rejected(NamedTuple):
    """A row for the quarantine, without personal data."""

    reason: str
    detail: str
    row: Any


class Accepted(NamedTuple):
    """A row that passed: as it stands in the table `prompts`, but for its `scores`, which are still an object."""

    prompt: dict[str, Any]
    repaired: bool
    fingerprint: Fingerprint


@dataclass
class Row:
    """A raw row on its way through the tests."""

    raw: Any
    layout: Layout
    given: str = ""  # its text as it came
    text: str = ""
    source: str = ""
    licence: str = ""
    language: str = filters.UNDECIDED
    scores: dict[str, Any] = field(default_factory=dict)
    n_tokens: int = 0


@dataclass
class Screen:
    """The tests as a profile wants them; travels to worker processes."""

    settings: Mapping[str, Any]  # the profile's `curate_prompts`
    prompt_tokens: tuple[int, int]
    base: Path  # whose tokenizer counts

    @cached_property
    def modes(self) -> dict[str, str]:
        return filter_modes(self.settings)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    def on(self, name: str) -> bool:
        """Whether a filter is not off."""
        return self.modes[name] != OFF

    def screen(self, batch: RawBatch) -> list[Rejected | Accepted]:
        """What becomes of each of a batch's rows."""
        rows = [Row(parse(raw), batch.layout) for _, raw in batch.rows]
        results: dict[int, Rejected | Accepted] = {}

        def judge(number: int, findings: Iterable[Finding]) -> None:
            if (verdict := self._judge(rows[number], findings)) is not None:
                results[number] = verdict

        for number, row in enumerate(rows):
            judge(number, self._alone(row))
        left = [number for number in range(len(rows)) if number not in results]
        for number, ids in zip(left, token_ids(self.tokenizer, [rows[n].text for n in left]), strict=True):
            rows[number].n_tokens = len(ids)
            judge(number, self._tokens(ids))
        left = [number for number in left if number not in results]
        prints = self._fingerprints([rows[number].text for number in left])
        for number, fingerprint in zip(left, prints, strict=True):
            results[number] = _accepted(rows[number], fingerprint)
        return [results[number] for number in range(len(rows))]

    def _judge(self, row: Row, findings: Iterable[Finding]) -> Rejected | None:
        """A row's rejection by the first of `findings` that is enforced; the others go into its scores."""
        for found in findings:
            if not found.detail:
                continue
            if not found.filter or self.modes[found.filter] == ENFORCE:
                return Rejected(found.reason, quotable(found.detail), quotable_row(row.raw))
            row.scores[found.reason] = found.detail if found.figure is None else found.figure
        return None

    def _fingerprints(self, texts: Sequence[str]) -> list[Fingerprint]:
        if self.on("near_duplicates"):
            return fingerprints(texts, self.settings["near_duplicate_min_features"])
        return [Fingerprint(int(filters.text_id(text), 16)) for text in texts]

    def _alone(self, row: Row) -> Iterator[Finding]:
        """Each test's finding (without a detail: passed), in order; fills `row` on the way."""
        if isinstance(row.raw, Broken):
            yield Finding("", row.raw.reason, row.raw.why)
        # pyrefly: ignore[bad-argument-type]
        column = row.layout.column(row.raw, "text")
        # pyrefly: ignore[missing-attribute]
        row.given = text = row.raw.get(column)
        yield Finding("", "no_text", "" if isinstance(text, str) else _no_string(column, text))
        if self.modes["length"] == ENFORCE:
            longest = CHARACTERS_PER_TOKEN * self.prompt_tokens[1]
            yield Finding("length", "over_long", f"{len(text)} characters" if len(text) > longest else "")
        row.text = text
        if self.on("unicode"):
            yield Finding("unicode", "control_characters", filters.control_damage(text))
            repaired = filters.repair(text)
            yield Finding("unicode", "damaged_text", filters.text_damage(repaired))
            if self.modes["unicode"] == ENFORCE:
                row.text = repaired
            elif repaired != text:
                row.scores["needs_repair"] = True
        yield Finding("", "damaged_text", "" if is_unicode(row.text) else "half a surrogate pair")
        yield Finding("", "empty", "" if any(map(str.isalnum, row.text)) else "no letter or figure in it")
        yield from self._provenance(row)
        yield from self._content(row)

    def _provenance(self, row: Row) -> Iterator[Finding]:
        layout, raw = row.layout, row.raw
        row.source, problem = _source(raw.get(layout.column(raw, "source")) or layout.whole_source)
        if self.on("licence"):
            yield Finding("licence", "no_source", problem)
        licence = raw.get(layout.column(raw, "licence")) or layout.whole_licence
        row.licence, problem = _licence(licence, self.settings["licences"])
        if self.on("licence"):
            yield Finding("licence", "licence", problem)

    def _content(self, row: Row) -> Iterator[Finding]:
        if self.on("prompt_injection"):
            found = find_injection(row.text) or (row.given != row.text and find_injection(row.given))  # with its lines
            yield Finding("prompt_injection", "prompt_injection", found or "")
        if self.on("personal_data"):
            yield Finding("personal_data", "personal_data", filters.find_personal_data(row.text))
        if self.on("unsafe"):
            yield Finding("unsafe", "unsafe", filters.find_unsafe(row.text) or self._unsafe_column(row))
        row.scores |= {"characters": len(row.text), "words": len(row.text.split())}
        own = row.layout.column(row.raw, "id")
        if row.raw.get(own):
            row.scores[own] = str(row.raw[own])[:LONGEST_ID]
        if self.on("language"):
            languages = self.settings["languages"]
            row.language, row.scores["language"] = filters.identify_language(row.text, languages)
            foreign = row.language not in (*languages, filters.UNDECIDED)
            detail = f"{row.language} ({row.scores['language']:.2f})" if foreign else ""
            yield Finding("language", "wrong_language", detail)

    def _unsafe_column(self, row: Row) -> str:
        """Names the column whose probability of unsafe content is the highest, where it is too high or no number."""
        found = {}
        for name in row.layout.unsafe_columns(row.raw):
            try:
                found[name] = float(row.raw.get(name, "nan"))
            except (TypeError, ValueError, OverflowError):
                found[name] = nan
            if not 0 <= found[name] <= 1:
                return f"'{name}' is no probability"
        worst = max(found, key=found.__getitem__, default="")
        if worst:
            row.scores["unsafe_probability"] = round(found[worst], 4)
        return f"{worst} {found[worst]:.2f}" if worst and found[worst] >= self.settings["unsafe_probability"] else ""

    def _tokens(self, ids: Sequence[int]) -> Iterator[Finding]:
        """Length in tokens, EOS included, and tokens that stand for nothing: as a training target they teach noise."""
        fewest, most = self.prompt_tokens
        if self.on("length"):
            yield Finding("length", "over_long", f"{len(ids)} tokens, at most {most}" if len(ids) > most else "")
            yield Finding("length", "too_short", f"{len(ids)} tokens, at least {fewest}" if len(ids) < fewest else "")
        unknown = self.tokenizer.unk_token_id
        if self.on("unknown_tokens") and unknown is not None and (missing := ids.count(unknown)):
            detail = f"{missing} of {len(ids)} tokens are unknown to the tokenizer"
            yield Finding("unknown_tokens", "unknown_tokens", detail, missing / len(ids))


def _accepted(row: Row, fingerprint: Fingerprint) -> Accepted:
    prompt = {
        "id": f"{fingerprint.text:016x}",
        "text": row.text,
        "source": row.source,
        "licence": row.licence,
        "language": row.language,
        "n_tokens": row.n_tokens,
        "scores": row.scores,
        "verdict": "keep",
    }
    return Accepted(prompt, row.text != row.given, fingerprint)


def _no_string(column: str, value: Any) -> str:
    return f"'{column}' is {type(value).__name__}, not a string"


def _source(source: Any) -> tuple[str, str]:
    source = filters.repair(source) if isinstance(source, str) else ""
    return source, filters.text_damage(source) if source else "no source is named"


def _licence(licence: Any, allowed: Iterable[str]) -> tuple[str, str]:
    """A licence as the profile spells it, or as it is, and what is wrong with it."""
    name = filters.repair(licence) if isinstance(licence, str) else ""
    spelling = {known.casefold(): known for known in allowed}.get(name.casefold(), "")
    return spelling or name, "" if spelling else f"'{name}' is not allowed here" if name else "no licence is named"


# --- the quarantine --------------------------------------------------------------------------------------------------


def quotable_row(raw: Any) -> Any:
    """A raw row as the quarantine may keep it, whatever it is rejected for and wherever in it personal data are."""
    if not isinstance(raw, dict):
        return quotable(raw.text if isinstance(raw, Broken) else raw)
    return {quotable(key): quotable(value) for key, value in islice(raw.items(), MOST_QUOTES)}


def quotable(value: Any) -> Any:
    """A value as the quarantine may keep it: at most `LONGEST_QUOTE` characters, and `WITHHELD` for personal data.

    What JSON has no number for (NaN, infinity) is kept as text.
    """
    text, plain = (value, True) if isinstance(value, str) else _as_json(value)
    quote = text[:LONGEST_QUOTE]
    repaired = filters.repair(quote)
    if filters.find_personal_data(text) or (repaired != text and filters.find_personal_data(repaired)):
        return WITHHELD
    return value if plain and quote == text else quote


def _as_json(value: Any) -> tuple[str, bool]:
    """A value as JSON, and whether that is what the standard calls JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False), True
    except ValueError:
        return json.dumps(value, ensure_ascii=False, default=str), False
