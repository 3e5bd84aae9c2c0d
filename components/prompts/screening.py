"""The filters that look at one raw prompt at a time; worker processes run them on batches.

The filters run in the order of `FILTERS`, and a row is rejected with the reason of the first that it fails. Each can be
off, or only score: then its finding is noted in the row's `scores`, and the row stays.
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
from components.settings.sections import CuratePrompts, Filters

OFF, SCORE, ENFORCE = "off", "score", "enforce"
# Each filter's reasons to reject a row. Reasons that belong to no filter always apply.
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
CHARACTERS_PER_TOKEN = 64  # a text longer than this times the maximum of tokens is rejected without tokenizing it
WITHHELD = "[withheld]"  # replaces personal data in the quarantine; the raw file still has them
LONGEST_ID = 200  # characters of a row's own id
MOST_QUOTES = 64  # values of a row that the quarantine keeps


def filter_modes(settings: Filters) -> dict[str, str]:
    """Each filter's mode, in the order in which the filters run."""
    return {name: getattr(settings, name) for name in FILTERS}


class Finding(NamedTuple):
    """What a filter found in a row."""

    filter: str  # empty: always enforced
    reason: str
    detail: str  # empty: the row passes
    figure: float | None = None  # noted in `scores` in place of the detail


class Rejected(NamedTuple):
    """A row for the quarantine, without personal data."""

    reason: str
    detail: str
    row: Any


class Accepted(NamedTuple):
    """A row that passed: a row of the table `prompts`, with `scores` still a dict."""

    prompt: dict[str, Any]
    repaired: bool
    fingerprint: Fingerprint


@dataclass
class Row:
    """A raw row, and what the filters find out about it."""

    raw: Any
    layout: Layout
    given: str = ""  # its text before repair
    text: str = ""
    source: str = ""
    licence: str = ""
    language: str = filters.UNDECIDED
    scores: dict[str, Any] = field(default_factory=dict)
    n_tokens: int = 0


@dataclass
class Screen:
    """The filters with a profile's settings; pickled for worker processes."""

    settings: CuratePrompts
    prompt_tokens: tuple[int, int]  # fewest and most
    base: Path  # folder of the base model, for its tokenizer

    @cached_property
    def modes(self) -> dict[str, str]:
        return filter_modes(self.settings.filters)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    def is_on(self, name: str) -> bool:
        """Whether a filter is not off."""
        return self.modes[name] != OFF

    def screen(self, batch: RawBatch) -> list[Rejected | Accepted]:
        """The result for each row of a batch."""
        rows = [Row(parse(raw), batch.layout) for _, raw in batch.rows]
        results: dict[int, Rejected | Accepted] = {}

        def judge(number: int, findings: Iterable[Finding]) -> None:
            if (verdict := self._judge(rows[number], findings)) is not None:
                results[number] = verdict

        for number, row in enumerate(rows):
            judge(number, self._check_text(row))
        left = [number for number in range(len(rows)) if number not in results]
        for number, ids in zip(left, token_ids(self.tokenizer, [rows[n].text for n in left]), strict=True):
            rows[number].n_tokens = len(ids)
            judge(number, self._check_tokens(ids))
        left = [number for number in left if number not in results]
        prints = self._fingerprints([rows[number].text for number in left])
        for number, fingerprint in zip(left, prints, strict=True):
            results[number] = _accepted(rows[number], fingerprint)
        return [results[number] for number in range(len(rows))]

    def _judge(self, row: Row, findings: Iterable[Finding]) -> Rejected | None:
        """The rejection by the first enforced finding, or None; findings before it are noted in the row's scores."""
        for finding in findings:
            if not finding.detail:
                continue
            if not finding.filter or self.modes[finding.filter] == ENFORCE:
                return Rejected(finding.reason, quotable(finding.detail), quotable_row(row.raw))
            row.scores[finding.reason] = finding.detail if finding.figure is None else finding.figure
        return None

    def _fingerprints(self, texts: Sequence[str]) -> list[Fingerprint]:
        if self.is_on("near_duplicates"):
            return fingerprints(texts, self.settings.near_duplicate_min_features)
        return [Fingerprint(int(filters.text_id(text), 16)) for text in texts]

    def _check_text(self, row: Row) -> Iterator[Finding]:
        """The findings of all filters that need no tokens, in order; also fills the fields of `row`."""
        if isinstance(row.raw, Broken):
            yield Finding("", row.raw.reason, row.raw.why)
        # pyrefly: ignore[bad-argument-type]
        column = row.layout.column(row.raw, "text")
        # pyrefly: ignore[missing-attribute]
        row.given = text = row.raw.get(column)
        yield Finding("", "no_text", "" if isinstance(text, str) else _describe_type(column, text))
        if self.modes["length"] == ENFORCE:
            longest = CHARACTERS_PER_TOKEN * self.prompt_tokens[1]
            yield Finding("length", "over_long", f"{len(text)} characters" if len(text) > longest else "")
        row.text = text
        if self.is_on("unicode"):
            yield Finding("unicode", "control_characters", filters.control_damage(text))
            repaired = filters.repair(text)
            yield Finding("unicode", "damaged_text", filters.text_damage(repaired))
            if self.modes["unicode"] == ENFORCE:
                row.text = repaired
            elif repaired != text:
                row.scores["needs_repair"] = True
        yield Finding("", "damaged_text", "" if is_unicode(row.text) else "half a surrogate pair")
        yield Finding("", "empty", "" if any(map(str.isalnum, row.text)) else "no letter or figure in it")
        yield from self._check_provenance(row)
        yield from self._check_content(row)

    def _check_provenance(self, row: Row) -> Iterator[Finding]:
        layout, raw = row.layout, row.raw
        row.source, problem = _source(raw.get(layout.column(raw, "source")) or layout.whole_source)
        if self.is_on("licence"):
            yield Finding("licence", "no_source", problem)
        licence = raw.get(layout.column(raw, "licence")) or layout.whole_licence
        row.licence, problem = _licence(licence, self.settings.licences)
        if self.is_on("licence"):
            yield Finding("licence", "licence", problem)

    def _check_content(self, row: Row) -> Iterator[Finding]:
        if self.is_on("prompt_injection"):
            # Before repair, the text still has its line breaks.
            found = find_injection(row.text) or (row.given != row.text and find_injection(row.given))
            yield Finding("prompt_injection", "prompt_injection", found or "")
        if self.is_on("personal_data"):
            yield Finding("personal_data", "personal_data", filters.find_personal_data(row.text))
        if self.is_on("unsafe"):
            yield Finding("unsafe", "unsafe", filters.find_unsafe(row.text) or self._unsafe_column(row))
        row.scores |= {"characters": len(row.text), "words": len(row.text.split())}
        own = row.layout.column(row.raw, "id")
        if row.raw.get(own):
            row.scores[own] = str(row.raw[own])[:LONGEST_ID]
        if self.is_on("language"):
            languages = self.settings.languages
            row.language, row.scores["language"] = filters.identify_language(row.text, languages)
            foreign = row.language not in (*languages, filters.UNDECIDED)
            detail = f"{row.language} ({row.scores['language']:.2f})" if foreign else ""
            yield Finding("language", "wrong_language", detail)

    def _unsafe_column(self, row: Row) -> str:
        """The column with the highest probability of unsafe content if that is too high, or one with no probability."""
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
        return f"{worst} {found[worst]:.2f}" if worst and found[worst] >= self.settings.unsafe_probability else ""

    def _check_tokens(self, ids: Sequence[int]) -> Iterator[Finding]:
        """Findings on the length in tokens, EOS included, and on unknown tokens, which are bad training targets."""
        fewest, most = self.prompt_tokens
        if self.is_on("length"):
            yield Finding("length", "over_long", f"{len(ids)} tokens, at most {most}" if len(ids) > most else "")
            yield Finding("length", "too_short", f"{len(ids)} tokens, at least {fewest}" if len(ids) < fewest else "")
        unknown = self.tokenizer.unk_token_id
        if self.is_on("unknown_tokens") and unknown is not None and (missing := ids.count(unknown)):
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


def _describe_type(column: str, value: Any) -> str:
    return f"'{column}' is {type(value).__name__}, not a string"


def _source(source: Any) -> tuple[str, str]:
    source = filters.repair(source) if isinstance(source, str) else ""
    return source, filters.text_damage(source) if source else "no source is named"


def _licence(licence: Any, allowed: Iterable[str]) -> tuple[str, str]:
    """A licence as the profile spells it, otherwise as it is; and what is wrong with it."""
    name = filters.repair(licence) if isinstance(licence, str) else ""
    spelling = {known.casefold(): known for known in allowed}.get(name.casefold(), "")
    return spelling or name, "" if spelling else f"'{name}' is not allowed here" if name else "no licence is named"


# --- the quarantine --------------------------------------------------------------------------------------------------


def quotable_row(raw: Any) -> Any:
    """A raw row as the quarantine may keep it, without the values that hold personal data."""
    if not isinstance(raw, dict):
        return quotable(raw.text if isinstance(raw, Broken) else raw)
    return {quotable(key): quotable(value) for key, value in islice(raw.items(), MOST_QUOTES)}


def quotable(value: Any) -> Any:
    """A value as the quarantine may keep it: at most `LONGEST_QUOTE` characters, and `WITHHELD` for personal data.

    NaN and infinity, which JSON doesn't have, are kept as text.
    """
    text, plain = (value, True) if isinstance(value, str) else _as_json(value)
    quote = text[:LONGEST_QUOTE]
    repaired = filters.repair(quote)
    if filters.find_personal_data(text) or (repaired != text and filters.find_personal_data(repaired)):
        return WITHHELD
    return value if plain and quote == text else quote


def _as_json(value: Any) -> tuple[str, bool]:
    """A value as JSON, and whether it is standard JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False), True
    except ValueError:
        return json.dumps(value, ensure_ascii=False, default=str), False
