"""Validate data: three gates of Great Expectations, after prompts, after clips, after captions.

Each writes the rows that passed (the next step reads those), `validation.json` with what was expected and found, and
pages for people below ``.univigu/docs/<step>``. Single bad rows are quarantined; a broken table fails the step. Token
lengths are always counted again from the text, with the base's own tokenizer and EOS included.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.checks import load_caption_checks
from components.checks.refusal import refusal
from components.checks.repetition import repetition
from components.checks.texts import damage, repeats_prompt
from components.checks.wrapping import wrapping
from components.clips.buckets import Bucket, list_buckets
from components.pipeline.step import Step
from components.pipeline.tables import SCHEMAS
from components.prompts.filters import UNDECIDED, text_id
from components.prompts.screening import ENFORCE, filter_modes
from components.prompts.tokens import count_tokens, load_tokenizer
from components.validation.gates import Reject, expectations, run_gate

STATUSES = ("success", "truncated", "blocked", "error", "skipped")


def validate_prompts(step: Step) -> None:
    """Curated prompts -> the same table, every row of which keeps the contract of prompts.

    What a filter of the curation did not enforce is not asked for here either.
    """
    gx = expectations()
    prompts = step.read("prompts", "prompts")
    curation = step["curate_prompts"]
    frame = prompts.to_pandas()
    texts = [text or "" for text in prompts["text"].to_pylist()]
    frame["counted_tokens"] = count_tokens(load_tokenizer(step.inputs["base"]), texts)
    frame["text_id"] = [text_id(text) for text in texts]
    if filter_modes(curation)["exact_duplicates"] != ENFORCE:  # then a number tells a text's second row from its first
        frame["text_id"] += frame["id"].str.extract(r"(-\d+)$", expand=False).fillna("")
    suite = [
        *_table_contract(gx, "prompts", ["counted_tokens", "text_id"]),
        *_never_null(gx, SCHEMAS["prompts"].names),
        gx.ExpectColumnPairValuesToBeEqual(column_A="id", column_B="text_id", meta={"reason": "id_mismatch"}),
        *_contract_of_filters(gx, curation, step["text"]["prompt_tokens"]),
        _one_of(gx, "verdict", ["keep"]),
    ]
    remedy = "mend the raw prompts or the profile, then run `univigu run curate-prompts` again"
    _pass_gate(step, "prompts", prompts, frame, suite, remedy)


def _contract_of_filters(gx: Any, curation: Mapping[str, Any], tokens: tuple[int, int]) -> Iterator[Any]:
    """What holds of a prompt that each filter of the curation let pass; nothing for one that it doesn't enforce."""
    enforced = {name for name, mode in filter_modes(curation).items() if mode == ENFORCE}
    if "unicode" in enforced:
        control = r"[\x00-\x1f\x7f]"
        yield gx.ExpectColumnValuesToNotMatchRegex(column="text", regex=control, meta={"reason": "control_characters"})
    if "length" in enforced:
        yield gx.ExpectColumnValuesToBeBetween(
            column="counted_tokens", min_value=tokens[0], max_value=tokens[1], meta={"reason": "token_range"}
        )
    yield gx.ExpectColumnPairValuesToBeEqual(
        column_A="n_tokens", column_B="counted_tokens", meta={"reason": "token_count"}
    )
    if "licence" in enforced:
        yield gx.ExpectColumnValueLengthsToBeBetween(column="source", min_value=1, meta={"reason": "no_source"})
        yield _one_of(gx, "licence", curation["licences"])
    if "language" in enforced:
        yield _one_of(gx, "language", [*curation["languages"], UNDECIDED])


def validate_clips(step: Step) -> None:
    """Clips -> the same table, every row of which keeps the contract of clips; the videos stay where they are."""
    gx = expectations()
    clips = step.read("clips", "clips")
    video = step["video"]
    sizes = [Bucket(video["frames"], video["height"], video["width"]), *list_buckets(video)]
    suite = [
        *_table_contract(gx, "clips"),
        *_never_null(gx, SCHEMAS["clips"].names),
        _one_of(gx, "fps", [round(video["fps"], 3)]),
        *(_one_of(gx, name, sorted({getattr(size, name) for size in sizes})) for name in ("frames", "height", "width")),
        _one_of(gx, "stage", [1, 2]),
        gx.ExpectColumnValuesToBeUnique(column="sha256", meta={"reason": "same_video"}),
        gx.ExpectColumnValuesToMatchRegex(column="sha256", regex="^[0-9a-f]{64}$", meta={"reason": "sha256"}),
        gx.ExpectCompoundColumnsToBeUnique(column_list=["prompt_id", "seed"]),
        gx.ExpectCompoundColumnsToBeUnique(column_list=["shard", "member"]),
        gx.ExpectColumnDistinctValuesToContainSet(column="stage", value_set=[1, 2]),
    ]
    remedy = "look at data/clips, then run `univigu run synthesize-videos` again with more prompts or clips"
    frame = clips.to_pandas()
    frame["fps"] = frame["fps"].astype("float64").round(3)  # stored in 32 bits, where 23.976 is another number
    _pass_gate(step, "clips", clips, frame, suite, remedy)


def validate_pairs(step: Step) -> None:
    """Validated clips and their captions -> the table `pairs`: what the two training stages learn from.

    A stage-1 pair has no caption. A stage-2 clip whose caption did not succeed was quarantined where it was captioned,
    and is only counted here.
    """
    gx = expectations()
    settings = step["validate_data"]
    fewest, most = step["text"]["caption_tokens"]
    clips = step.read("clips", "clips").to_pylist()
    captions = step.read("captions", "captions")
    rows = join_captions(clips, captions.to_pylist())
    failed = [row for row in rows if row["stage"] == 2 and row["status"] in ("truncated", "blocked", "error")]
    step.facts["without_caption"] = {
        status: sum(row["status"] == status for row in failed) for status in sorted({row["status"] for row in failed})
    }
    failed_ids = {row["clip_id"] for row in failed}
    rows = [row for row in rows if row["clip_id"] not in failed_ids]
    assign_splits(rows, settings["heldout_share"])

    tokenizer = load_tokenizer(step.inputs["base"])
    prompt_lengths = count_tokens(tokenizer, [row["prompt"] for row in rows])
    caption_lengths = count_tokens(tokenizer, [row["caption"] or "" for row in rows])
    checks = load_caption_checks(settings["caption_checks"])
    longest = max(prompt_lengths, default=0)
    for row, prompt_length, caption_length in zip(rows, prompt_lengths, caption_lengths, strict=True):
        captioned = row["stage"] == 2
        # A stage-1 row has no caption to measure: it stands in every caption column as a row that holds.
        row["prompt_tokens"] = prompt_length
        row["caption_tokens"] = caption_length if captioned else fewest
        row["stored_tokens"] = row["stored_tokens"] if captioned else fewest
        row["tokens_over_longest_prompt"] = row["caption_tokens"] - longest
        row["caption_state"] = row["status"] or "missing" if captioned else "none" if not row["caption"] else "unwanted"
        row["is_prompt"] = captioned and repeats_prompt(row["prompt"], row["caption"] or "")
        row["damage"] = damage(row["caption"] or "") if captioned else ""
        row["refusal"] = refusal(row["caption"] or "") if captioned else ""
        row["wrapping"] = wrapping(row["caption"] or "") if captioned else ""
        row["repetition"] = repetition(row["caption"] or "") if captioned else ""
        row["fault"] = _fault(checks, row["prompt"], row["caption"]) if captioned else ""
    frame = pa.Table.from_pylist(rows).to_pandas() if rows else pa.table({"id": []}).to_pandas()

    between = gx.ExpectColumnValuesToBeBetween
    prompt_range = step["text"]["prompt_tokens"]
    suite = [
        gx.ExpectColumnValuesToBeUnique(column="id"),
        gx.ExpectColumnValuesToBeUnique(column="clip_id"),  # so no clip is in both stages, nor twice in one
        gx.ExpectColumnValuesToBeUnique(column="sha256"),  # nor under another name
        *_never_null(gx, ["id", "clip_id", "stage", "split", "prompt", "shard", "member", "stored_tokens"]),
        _one_of(gx, "stage", [1, 2]),
        _one_of(gx, "caption_state", ["success", "none"], reason="no_caption"),
        between(
            column="prompt_tokens",
            min_value=prompt_range[0],
            max_value=prompt_range[1],
            meta={"reason": "prompt_range"},
        ),
        between(column="caption_tokens", min_value=fewest, max_value=most, meta={"reason": "caption_range"}),
        between(column="tokens_over_longest_prompt", min_value=1, meta={"reason": "caption_not_longer"}),
        gx.ExpectColumnPairValuesToBeEqual(
            column_A="stored_tokens", column_B="caption_tokens", meta={"reason": "token_count"}
        ),
        _one_of(gx, "is_prompt", [False], reason="caption_is_prompt"),
        _one_of(gx, "damage", [""], reason="damaged_text"),
        _one_of(gx, "refusal", [""]),
        _one_of(gx, "wrapping", [""]),
        _one_of(gx, "repetition", [""]),
        _one_of(gx, "fault", [""], reason="not_covered"),
        *(
            gx.ExpectColumnDistinctValuesToContainSet(column="part", value_set=[f"{stage} {split}"])
            for stage in (1, 2)
            for split in ("train", "heldout")
        ),
    ]
    remedy = "look at data/captions and data/clips, then run `univigu run caption-videos` again, or with more clips"
    _check_captions(step, gx, captions, remedy)
    _pass_gate(step, "pairs", pa.Table.from_pylist(rows), frame, suite, remedy)


# --- pairs -----------------------------------------------------------------------------------------------------------


def join_captions(clips: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of pairs for each clip, with its caption's text, status and stored length; None where there is none."""
    by_clip = {caption["clip_id"]: caption for caption in captions}
    rows = []
    for clip in clips:
        caption = by_clip.get(clip["id"], {})
        rows.append(
            {
                "id": f"{clip['stage']}-{clip['id']}",
                "clip_id": clip["id"],
                "stage": clip["stage"],
                "prompt": clip["prompt"],
                "caption": caption.get("text") if clip["stage"] == 2 else None,
                "shard": clip["shard"],
                "member": clip["member"],
                "sha256": clip["sha256"],
                "status": caption.get("status"),
                "stored_tokens": caption.get("n_tokens", 0),
            }
        )
    return rows


def assign_splits(rows: Sequence[dict[str, Any]], heldout_share: float) -> None:
    """Set `split` (and `part`, stage and split in one): of each stage, the share with the lowest hashes is held out.

    At least one row of a stage is, so both splits have something in them; a clip's place doesn't depend on the order
    of the rows, and hardly on which other clips there are.
    """
    for stage in {row["stage"] for row in rows}:
        ranked = sorted(
            (row for row in rows if row["stage"] == stage),
            key=lambda row: hashlib.sha256(f"split {row['clip_id']}".encode()).digest(),
        )
        heldout = ceil(heldout_share * len(ranked))
        for rank, row in enumerate(ranked):
            row["split"] = "heldout" if rank < heldout else "train"
            row["part"] = f"{stage} {row['split']}"


def _fault(checks: Sequence[Any], prompt: str, caption: str | None) -> str:
    """What the first of the profile's caption checks finds wrong, or an empty string."""
    return next((fault for check in checks if (fault := check.find(prompt, caption or ""))), "")


def _check_captions(step: Step, gx: Any, captions: pa.Table, remedy: str) -> None:
    """The captions table by itself: one row a clip, known statuses, a text wherever one succeeded. Fails the step."""
    frame = captions.to_pandas()
    frame["id"] = frame["clip_id"]
    frame["has_text"] = [
        bool(text) or status != "success"
        for text, status in zip(captions["text"].to_pylist(), captions["status"].to_pylist(), strict=True)
    ]
    suite = [
        gx.ExpectTableColumnsToMatchSet(column_set=[*SCHEMAS["captions"].names, "id", "has_text"], exact_match=True),
        gx.ExpectColumnValuesToBeUnique(column="clip_id"),
        gx.ExpectColumnValuesToNotBeNull(column="status"),
        gx.ExpectColumnValuesToBeInSet(column="status", value_set=list(STATUSES)),
        gx.ExpectColumnValuesToBeInSet(column="has_text", value_set=[True]),
    ]
    reject = _rejecter(step, "captions", captions)
    gate = run_gate("captions", frame, suite, step.docs / "captions", 1, remedy, reject)
    _write_report(step, "captions", gate.report)


# --- shared ----------------------------------------------------------------------------------------------------------


def _table_contract(gx: Any, table: str, computed: Sequence[str] = ()) -> list[Any]:
    names = [*SCHEMAS[table].names, *computed]
    return [
        gx.ExpectTableColumnsToMatchSet(column_set=names, exact_match=True),
        gx.ExpectColumnValuesToBeUnique(column="id"),
    ]


def _never_null(gx: Any, columns: Sequence[str]) -> list[Any]:
    # Row-wise expectations pass over nulls in silence, so each column says for itself that it has none.
    return [
        gx.ExpectColumnValuesToNotBeNull(column=name, meta=None if name == "id" else {"reason": f"no_{name}"})
        for name in columns
    ]


def _one_of(gx: Any, column: str, values: Sequence[Any], reason: str | None = None) -> Any:
    return gx.ExpectColumnValuesToBeInSet(column=column, value_set=list(values), meta={"reason": reason or column})


def _pass_gate(step: Step, table: str, rows: pa.Table, frame: Any, suite: Sequence[Any], remedy: str) -> None:
    """Run the gate, quarantine what it names, and write what passed with the report."""
    step.rows_in = rows.num_rows
    names, least = SCHEMAS[table].names, step["validate_data"]["min_rows"]
    reject = _rejecter(step, table, rows)
    gate = run_gate(step.stage.name, frame, suite, step.docs / table, least, remedy, reject)
    _write_report(step, table, gate.report)
    passed = rows.filter(pc.is_in(rows["id"], pa.array(list(gate.passed["id"]), pa.string()))).select(names)
    step.write(table, (row for batch in passed.to_batches(4096) for row in batch.to_pylist()))


def _rejecter(step: Step, table: str, rows: pa.Table) -> Reject:
    """What quarantines one of `rows` by its id, which is the first column of every table."""
    known = rows.select(SCHEMAS[table].names)
    places: dict[str | None, int] = {}  # filled when the first row is rejected: mostly none is

    def reject(row_id: str | None, reason: str, detail: str) -> None:
        if not places:
            places.update((key, place) for place, key in enumerate(known.column(0).to_pylist()))
        place = places.get(row_id)
        row = None if place is None else known.slice(place, 1).to_pylist()[0]
        step.reject(row_id or "(no id)", reason, detail, row)

    return reject


def _write_report(step: Step, table: str, report: Sequence[Mapping[str, Any]]) -> None:
    """Add a gate's figures to the committed ``validation.json``, which holds neither a time nor a random id."""
    path = step.out / "validation.json"
    reports = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reports[table] = list(report)
    path.write_text(json.dumps(reports, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
