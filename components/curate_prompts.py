"""Curate prompts: raw and messy JSONL rows in, clean prompts with source and licence out, a reason for every other row.

A row is an object with `text`, `source` and `licence`. What transport did to a text is repaired (mojibake, entities,
stray control characters, odd blanks); what a text says is never changed, only accepted or rejected. The tests run in
the order of `_reasons`, and a row's reason is the first test it fails. Rows are read as a stream: what stays in memory
is the rows that are kept, and the index that duplicates are looked up in.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from components import prompt_filters as filters
from components.pipeline.digests import file_digest
from components.pipeline.runner import Step
from components.tokens import load_tokenizer, token_ids
from univigu.errors import ConfigError, GateFailedError, MissingInputError

BATCH = 1024  # rows that go through the tokenizer together
LONGEST_LINE = 1 << 20  # bytes; a longer line is one broken row, and is never held whole
CHARACTERS_PER_TOKEN = 64  # a text longer than this, times the most tokens allowed, is not looked at any closer
WITHHELD = "[withheld]"  # stands for personal data in the quarantine: the raw file has it, and no copy is needed
LONGEST_QUOTE = 4096  # characters of one value that the quarantine keeps
LONG_TEXT = 48  # features: in anything shorter a single word can be all that sets two prompts apart
MINHASH_PERMUTATIONS = 128
RECALL_WEIGHT = 0.98  # candidates are verified exactly, so the index may err on the side of too many


@dataclass
class Row:
    """A raw row on its way through the tests."""

    id: str  # the file's name and the line's number
    raw: Any
    text: str = ""
    source: str = ""
    licence: str = ""
    language: str = ""
    scores: dict[str, Any] = field(default_factory=dict)


def curate_prompts(step: Step) -> None:
    """Write the table `prompts`, and quarantine every raw row that is not in it with its reason."""
    settings = step["curate_prompts"]
    tokenizer = load_tokenizer(step.inputs["base"])
    duplicates = Duplicates(settings["near_duplicate_jaccard"])
    kept: list[dict[str, Any]] = []
    repaired = 0
    rows = iter(step.progress(read_rows(step.inputs["raw"])))
    while batch := list(islice(rows, BATCH)):
        step.rows_in += len(batch)
        good = [row for row in batch if _accept(step, row)]
        for row, ids in zip(good, token_ids(tokenizer, [row.text for row in good]), strict=True):
            reason, detail = _token_reason(ids, tokenizer.unk_token_id, step["text"]["prompt_tokens"])
            prompt_id = filters.text_id(row.text)
            if not reason:
                reason, detail = duplicates.add(prompt_id, row.text)
            if reason:
                _quarantine(step, row, reason, detail)
                continue
            repaired += row.text != row.raw["text"]
            kept.append(
                {
                    "id": prompt_id,
                    "text": row.text,
                    "source": row.source,
                    "licence": row.licence,
                    "language": row.language,
                    "n_tokens": len(ids),
                    "scores": json.dumps(row.scores, sort_keys=True),
                    "verdict": "keep",
                }
            )
    if not kept:
        raise GateFailedError(
            f"None of the {step.rows_in} raw prompts in {step.inputs['raw']} is usable; add prompts, or widen the "
            "profile's 'curate_prompts'."
        )
    step.facts |= {
        "repaired": repaired,
        "sources": {file.name: file_digest(file) for file in raw_files(step.inputs["raw"])},
    }
    step.write("prompts", kept)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a JSONL file, or of all JSONL files in a folder, by name; blank lines are no rows.

    A line that is not a JSON object comes out with its text as `raw`. Raises as `raw_files` does.
    """
    for file in raw_files(path):
        with file.open("rb") as stream:
            for number, line in enumerate(_bounded_lines(stream), start=1):
                if line.strip():
                    yield Row(f"{file.name}:{number}", _parse(line))


def raw_files(path: Path) -> list[Path]:
    """A file, or the JSONL files of a folder by name; raises `MissingInputError` without any."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise MissingInputError(f"There is no *.jsonl file in {path}; put prompts there, one JSON object a line.")
    return files


def _bounded_lines(stream: Any) -> Iterator[bytes]:
    """Lines, of which never more than `LONGEST_LINE` is held: what is over is dropped, so the row will not parse."""
    while line := stream.readline(LONGEST_LINE):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE)
        yield line


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return line.decode("utf-8", errors="replace").strip()


# --- the tests -------------------------------------------------------------------------------------------------------


def _accept(step: Step, row: Row) -> bool:
    """Run the tests that need no tokenizer, in order; quarantines the row at the first that it fails."""
    for reason, detail in _reasons(row, step["curate_prompts"], step["text"]):
        if detail:
            _quarantine(step, row, reason, detail)
            return False
    return True


def _quarantine(step: Step, row: Row, reason: str, detail: str) -> None:
    """Reject a row without a copy of personal data, wherever in it that is and whatever the row is rejected for."""
    raw = row.raw
    raw = {_quotable(key): _quotable(value) for key, value in raw.items()} if isinstance(raw, dict) else _quotable(raw)
    step.reject(row.id, reason, _quotable(detail), raw)


def _quotable(value: Any) -> Any:
    """A value as the quarantine may keep it: at most `LONGEST_QUOTE` characters, and `WITHHELD` for personal data."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    quote = text[:LONGEST_QUOTE]
    if filters.find_personal_data(text) or filters.find_personal_data(filters.repair(quote)):
        return WITHHELD
    return value if quote == text else quote


def _reasons(row: Row, settings: Mapping[str, Any], lengths: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each test's reason and what it saw (empty: passed), in order; fills `row` on the way."""
    if not isinstance(row.raw, dict):
        yield "broken_row", "not a JSON object"
    text = row.raw.get("text")
    yield "no_text", "" if isinstance(text, str) else f"'text' is {type(text).__name__}, not a string"
    longest = CHARACTERS_PER_TOKEN * lengths["prompt_tokens"][1]
    yield "over_long", f"{len(text)} characters" if len(text) > longest else ""
    yield "control_characters", filters.control_damage(text)
    row.text = filters.repair(text)
    yield "damaged_text", filters.text_damage(row.text)
    yield "empty", "" if any(map(str.isalnum, row.text)) else "no letter or figure in it"
    row.source, problem = _source(row.raw.get("source"))
    yield "no_source", problem
    row.licence, problem = _licence(row.raw.get("licence"), settings["licences"])
    yield "licence", problem
    yield "prompt_injection", filters.find_injection(row.text)
    yield "personal_data", filters.find_personal_data(row.text)
    yield "unsafe", filters.find_unsafe(row.text)
    row.language, probability = filters.identify_language(row.text, settings["languages"])
    row.scores = {"characters": len(row.text), "words": len(row.text.split()), "language": probability}
    foreign = row.language not in (*settings["languages"], filters.UNDECIDED)
    yield "wrong_language", f"{row.language} ({probability:.2f})" if foreign else ""


def _source(source: Any) -> tuple[str, str]:
    source = filters.repair(source) if isinstance(source, str) else ""
    return source, filters.text_damage(source) if source else "no source is named"


def _licence(licence: Any, allowed: Iterable[str]) -> tuple[str, str]:
    name = licence.strip() if isinstance(licence, str) else ""
    spelling = {known.casefold(): known for known in allowed}.get(name.casefold(), "")
    return spelling, "" if spelling else f"'{name}' is not allowed here" if name else "no licence is named"


def _token_reason(ids: list[int], unknown: int | None, allowed: tuple[int, int]) -> tuple[str, str]:
    """Length in tokens, EOS included, and tokens that stand for nothing: as a training target they teach noise."""
    fewest, most = allowed
    if len(ids) > most:
        return "over_long", f"{len(ids)} tokens, at most {most}"
    if len(ids) < fewest:
        return "too_short", f"{len(ids)} tokens, at least {fewest}"
    missing = ids.count(unknown) if unknown is not None else 0
    return ("unknown_tokens", f"{missing} of {len(ids)} tokens are unknown to the tokenizer") if missing else ("", "")


# --- duplicates ------------------------------------------------------------------------------------------------------


class Duplicates:
    """The texts seen so far: exact ones by id, near ones by what they say.

    Texts that say the same up to case, punctuation and stop words, or up to the order of phrases, are found in a table.
    Longer ones that differ a little are candidates of a MinHash LSH, each verified by exact Jaccard of their features,
    of which `threshold` makes a near-duplicate.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"'near_duplicate_jaccard' is {threshold}, and must lie above 0 and not above 1.")
        self.threshold = threshold
        self.features: dict[str, frozenset[bytes]] = {}
        self.seen: set[str] = set()
        self.same: dict[bytes, str] = {}  # digest of what a text says -> id

    @cached_property
    def index(self) -> Any:
        """The LSH, tuned for the threshold when the first long text asks for it."""
        from datasketch import MinHashLSH

        weights = (1 - RECALL_WEIGHT, RECALL_WEIGHT)
        return MinHashLSH(min(self.threshold, 0.99), MINHASH_PERMUTATIONS, weights=weights)

    def add(self, text_id: str, text: str) -> tuple[str, str]:
        """Remember a text unless it is a duplicate; returns the reason and what it is like, or two empty strings."""
        if text_id in self.seen:
            return "exact_duplicate", f"same text as {text_id}"
        self.seen.add(text_id)
        phrases = filters.content_phrases(text)
        features = filters.content_features(phrases)
        in_order = " ".join(word for phrase in phrases for word in phrase)
        keys = [_digest(in_order, 16), _digest("\n".join(sorted(features)), 16)]
        if like := next((self.same[key] for key in keys if key in self.same), ""):
            return "near_duplicate", f"says the same as {like}"
        if len(features) >= LONG_TEXT and (found := self._find_alike(text_id, features)):
            return "near_duplicate", found
        self.same.update(dict.fromkeys(keys, text_id))
        return "", ""

    def _find_alike(self, text_id: str, words: frozenset[str]) -> str:
        """Names the earlier long text that is most alike, if it is alike enough; remembers this one otherwise."""
        from datasketch import MinHash

        features = frozenset(_digest(word, 8) for word in words)
        minhash = MinHash(MINHASH_PERMUTATIONS, seed=1)
        minhash.update_batch(features)
        likeness = {other: jaccard(features, self.features[other]) for other in self.index.query(minhash)}
        like = max(sorted(likeness), key=likeness.__getitem__, default="")
        if like and likeness[like] >= self.threshold:
            return f"like {like}, Jaccard {likeness[like]:.2f}"
        self.index.insert(text_id, minhash, check_duplication=False)
        self.features[text_id] = features
        return ""


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def jaccard(left: frozenset[Any], right: frozenset[Any]) -> float:
    """Size of the intersection over the size of the union."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
