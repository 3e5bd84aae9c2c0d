"""Steps validate-prompts, validate-clips and validate-pairs: gates of Great Expectations after three other steps.

Each writes the rows that passed, which the next step reads; `validation.json` with the expectations and their results;
and HTML pages under ``.univigu/docs/<step>``, listed in ``.univigu/docs/index.html``. Single bad rows are quarantined;
a broken table fails the step. Token lengths are always counted again from the text, with the base's own tokenizer and
EOS included.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.checks import CaptionCheck, load_caption_checks
from components.checks.refusal import refusal
from components.checks.repetition import repetition
from components.checks.texts import damage, repeats_prompt
from components.checks.wrapping import wrapping
from components.clips.buckets import Bucket, list_buckets
from components.clips.import_clips import NAME as IMPORTED
from components.pipeline.step import Step, load_function
from components.pipeline.tables import SCHEMAS
from components.prompts.filters import UNDECIDED, text_id
from components.prompts.screening import ENFORCE, filter_modes
from components.prompts.tokens import count_tokens, load_tokenizer
from components.validation.data_docs import write_root
from components.validation.gates import Gate, Reject, expectations, run_gate
from univigu.files import write_json

# By the mode of `validate_data.caption_quality`: loaded by name, so that its code counts only where it is on.
READERS = {
    "score": "components.validation.caption_quality:score_captions",
    "enforce": "components.validation.caption_quality:score_captions",
}
QUALITY = "caption_quality"  # the column of its scores, and the reason of pairs that it finds unfit
STATUSES = ("success", "truncated", "blocked", "error", "skipped")


def validate_prompts(step: Step) -> None:
    """Write the curated prompts that keep the contract of prompts.

    What the filters of curation don't enforce is not required here either.
    """
    gx = expectations()
    prompts = step.read("prompts", "prompts")
    curation = step.settings.curate_prompts
    enforced = {name for name, mode in filter_modes(curation.filters).items() if mode == ENFORCE}
    frame = prompts.to_pandas()
    texts = [text or "" for text in prompts["text"].to_pylist()]
    frame["counted_tokens"] = count_tokens(load_tokenizer(step.inputs["base"]), texts)
    frame["text_id"] = [text_id(text) for text in texts]
    if "exact_duplicates" not in enforced:  # then the ids of repeated texts end with a number
        frame["text_id"] += frame["id"].str.extract(r"(-\d+)$", expand=False).fillna("")
    suite = [
        *_table_contract(gx, "prompts", ["counted_tokens", "text_id"]),
        *_never_null(gx, SCHEMAS["prompts"].names),
        gx.ExpectColumnPairValuesToBeEqual(column_A="id", column_B="text_id", meta={"reason": "id_mismatch"}),
        *_contract_of_filters(gx, enforced, step.settings.text.prompt_tokens, curation.licences, curation.languages),
        _one_of(gx, "verdict", ["keep"]),
    ]
    remedy = "correct the raw prompts or the profile, then run `univigu run curate-prompts` again"
    _pass_gate(step, "prompts", prompts, frame, suite, remedy)


def _contract_of_filters(
    gx: Any, enforced: Collection[str], tokens: tuple[int, int], licences: Sequence[str], languages: Sequence[str]
) -> Iterator[Any]:
    """The expectations on prompts that passed the filters `enforced`; tokens: fewest and most of a prompt."""
    if "unicode" in enforced:
        control = r"[\x00-\x1f\x7f]"
        yield gx.ExpectColumnValuesToNotMatchRegex(column="text", regex=control, meta={"reason": "control_characters"})
    if "length" in enforced:
        yield _between(gx, "counted_tokens", *tokens, reason="token_range")
    yield gx.ExpectColumnPairValuesToBeEqual(
        column_A="n_tokens", column_B="counted_tokens", meta={"reason": "token_count"}
    )
    if "licence" in enforced:
        yield gx.ExpectColumnValueLengthsToBeBetween(column="source", min_value=1, meta={"reason": "no_source"})
        yield _one_of(gx, "licence", licences)
    if "language" in enforced:
        yield _one_of(gx, "language", [*languages, UNDECIDED])


def validate_clips(step: Step) -> None:
    """Write the rows of the clips that keep the contract of clips; the videos stay in the output of their step."""
    gx = expectations()
    clips = step.read("clips", "clips")
    video = step.settings.video
    sizes = [Bucket(video.frames, video.height, video.width), *list_buckets(video)]
    suite = [
        *_table_contract(gx, "clips"),
        *_never_null(gx, SCHEMAS["clips"].names),
        _one_of(gx, "fps", [round(video.fps, 3)]),
        *(_one_of(gx, name, sorted({getattr(size, name) for size in sizes})) for name in ("frames", "height", "width")),
        _one_of(gx, "stage", [1, 2]),
        gx.ExpectColumnValuesToBeUnique(column="sha256", meta={"reason": "same_video"}),
        gx.ExpectColumnValuesToMatchRegex(column="sha256", regex="^[0-9a-f]{64}$", meta={"reason": "sha256"}),
        gx.ExpectCompoundColumnsToBeUnique(column_list=["prompt_id", "seed"]),
        gx.ExpectCompoundColumnsToBeUnique(column_list=["shard", "member"]),
        gx.ExpectColumnDistinctValuesToContainSet(column="stage", value_set=[1, 2]),
    ]
    remedy = "check data/clips, then run `univigu run synthesize-videos` again with more prompts or clips"
    frame = clips.to_pandas()
    frame["fps"] = frame["fps"].astype("float64").round(3)  # 32-bit floats in the table: 23.976 is not exact
    _pass_gate(step, "clips", clips, frame, suite, remedy)


def validate_pairs(step: Step) -> None:
    """Write the table `pairs`, which the two training stages learn from: validated clips with their captions.

    A stage-1 pair has no caption. Stage-2 clips whose caption failed were quarantined by caption-videos, and are only
    counted here.
    """
    step.settings.text.require_longer_captions()
    gx = expectations()
    captions = step.read("captions", "captions")
    rows = _captioned_rows(step, captions)
    assign_splits(rows, step.settings.validate_data.heldout_share)
    _measure_texts(step, rows)
    quality = step.settings.validate_data.caption_quality
    if quality.mode in READERS:
        load_function(READERS[quality.mode])(step, rows)
        scores = {row["clip_id"]: row[QUALITY] for row in rows if row["caption"]}  # also of those that are quarantined
        write_json(step.out / f"{QUALITY}.json", scores)
    frame = pa.Table.from_pylist(rows).to_pandas() if rows else pa.table({"id": []}).to_pandas()
    text = step.settings.text
    suite = [*_contract_of_pairs(gx, text.prompt_tokens, text.caption_tokens), *_contract_of_quality(gx, quality)]
    remedy = "check data/captions and data/clips, then run `univigu run caption-videos` again, or with more clips"
    _check_captions(step, gx, captions, remedy)
    _pass_gate(step, "pairs", pa.Table.from_pylist(rows), frame, suite, remedy)


# --- pairs -----------------------------------------------------------------------------------------------------------


def join_captions(clips: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of pairs for each clip, with the text, status and stored length of its caption if it has one."""
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
                "video": clip["generator_digest"] if clip["generator"] == IMPORTED else clip["id"],
                "status": caption.get("status"),
                "stored_tokens": caption.get("n_tokens", 0),
            }
        )
    return rows


def assign_splits(rows: Sequence[dict[str, Any]], heldout_share: float) -> None:
    """Set `split`, and `part` (stage and split): in each stage, the videos with the lowest hashes are held out.

    They have at least the share of the stage's rows, and one. All clips of an imported video are on one side, unless
    its stage has no other video. A video's split doesn't depend on the order of the rows, and hardly on the others.
    """
    for stage in {row["stage"] for row in rows}:
        videos: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["stage"] == stage:
                videos.setdefault(row.get("video") or row["clip_id"], []).append(row)
        if len(videos) == 1:
            videos = {row["clip_id"]: [row] for row in next(iter(videos.values()))}
        missing = ceil(heldout_share * sum(map(len, videos.values())))
        for name in sorted(videos, key=lambda name: hashlib.sha256(f"split {name}".encode()).digest()):
            split = "heldout" if missing > 0 else "train"
            missing -= len(videos[name])
            for row in videos[name]:
                row["split"], row["part"] = split, f"{stage} {split}"


def _captioned_rows(step: Step, captions: pa.Table) -> list[dict[str, Any]]:
    """The rows of pairs, without stage-2 clips whose caption failed, which are counted in the step's facts."""
    rows = join_captions(step.read("clips", "clips").to_pylist(), captions.to_pylist())
    failed = [row for row in rows if row["stage"] == 2 and row["status"] in ("truncated", "blocked", "error")]
    step.facts["without_caption"] = {
        status: sum(row["status"] == status for row in failed) for status in sorted({row["status"] for row in failed})
    }
    failed_ids = {row["clip_id"] for row in failed}
    return [row for row in rows if row["clip_id"] not in failed_ids]


def _measure_texts(step: Step, rows: Sequence[dict[str, Any]]) -> None:
    """Add the columns that the contract of pairs is checked on. Without a caption, each gets a value that passes."""
    tokenizer = load_tokenizer(step.inputs["base"])
    prompt_lengths = count_tokens(tokenizer, [row["prompt"] for row in rows])
    caption_lengths = count_tokens(tokenizer, [row["caption"] or "" for row in rows])
    checks = load_caption_checks(step.settings.validate_data.caption_checks)
    fewest, _ = step.settings.text.caption_tokens
    longest = max(prompt_lengths, default=0)
    for row, prompt_length, caption_length in zip(rows, prompt_lengths, caption_lengths, strict=True):
        captioned, caption = row["stage"] == 2, row["caption"] or ""
        row["prompt_tokens"] = prompt_length
        row["caption_tokens"] = caption_length if captioned else fewest
        row["stored_tokens"] = row["stored_tokens"] if captioned else fewest
        row["tokens_over_longest_prompt"] = row["caption_tokens"] - longest
        row["caption_state"] = row["status"] or "missing" if captioned else "none" if not caption else "unwanted"
        row["is_prompt"] = captioned and repeats_prompt(row["prompt"], caption)
        row["damage"] = damage(caption) if captioned else ""
        row["refusal"] = refusal(caption) if captioned else ""
        row["wrapping"] = wrapping(caption) if captioned else ""
        row["repetition"] = repetition(caption) if captioned else ""
        row["fault"] = _find_fault(checks, row["prompt"], caption) if captioned else ""


def _find_fault(checks: Sequence[CaptionCheck], prompt: str, caption: str) -> str:
    """The fault that the first failing check of the profile's caption checks finds, or an empty string."""
    return next((fault for check in checks if (fault := check.find(prompt, caption))), "")


def _contract_of_pairs(gx: Any, prompt_tokens: tuple[int, int], caption_tokens: tuple[int, int]) -> list[Any]:
    """The expectations on pairs; prompt_tokens, caption_tokens: fewest and most of each."""
    return [
        gx.ExpectColumnValuesToBeUnique(column="id"),
        gx.ExpectColumnValuesToBeUnique(column="clip_id"),  # no clip is in both stages, or in one of them twice
        gx.ExpectColumnValuesToBeUnique(column="sha256"),  # nor under another name
        *_never_null(gx, ["id", "clip_id", "stage", "split", "prompt", "shard", "member", "stored_tokens"]),
        _one_of(gx, "stage", [1, 2]),
        _one_of(gx, "caption_state", ["success", "none"], reason="no_caption"),
        _between(gx, "prompt_tokens", *prompt_tokens, reason="prompt_range"),
        _between(gx, "caption_tokens", *caption_tokens, reason="caption_range"),
        _between(gx, "tokens_over_longest_prompt", 1, None, reason="caption_not_longer"),
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


def _contract_of_quality(gx: Any, quality: Any) -> list[Any]:
    """The expectation on the scores of an independent reader, if the profile enforces it."""
    return [_between(gx, QUALITY, quality.least, None, reason=QUALITY)] if quality.mode == ENFORCE else []


def _check_captions(step: Step, gx: Any, captions: pa.Table, remedy: str) -> None:
    """Fail the step if the captions table has two rows of a clip, unknown statuses, or successes without a text."""
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
    gate = _run_gate(step, "captions", "captions", frame, suite, 1, remedy, reject)
    _write_report(step, "captions", gate.report)


# --- shared ----------------------------------------------------------------------------------------------------------


def _table_contract(gx: Any, table: str, computed: Sequence[str] = ()) -> list[Any]:
    names = [*SCHEMAS[table].names, *computed]
    return [
        gx.ExpectTableColumnsToMatchSet(column_set=names, exact_match=True),
        gx.ExpectColumnValuesToBeUnique(column="id"),
    ]


def _never_null(gx: Any, columns: Sequence[str]) -> list[Any]:
    # Row-wise expectations ignore nulls silently, so each column has an expectation of its own about them.
    return [
        gx.ExpectColumnValuesToNotBeNull(column=name, meta=None if name == "id" else {"reason": f"no_{name}"})
        for name in columns
    ]


def _one_of(gx: Any, column: str, values: Sequence[Any], reason: str | None = None) -> Any:
    return gx.ExpectColumnValuesToBeInSet(column=column, value_set=list(values), meta={"reason": reason or column})


def _between(gx: Any, column: str, least: float, most: int | None, *, reason: str) -> Any:
    return gx.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, meta={"reason": reason})


def _pass_gate(step: Step, table: str, rows: pa.Table, frame: Any, suite: Sequence[Any], remedy: str) -> None:
    """Run the gate, quarantine the rows that fail, and write those that pass, with the report."""
    step.rows_in = rows.num_rows
    names, least = SCHEMAS[table].names, step.settings.validate_data.min_rows
    reject = _rejecter(step, table, rows)
    gate = _run_gate(step, step.stage.name, table, frame, suite, least, remedy, reject)
    _write_report(step, table, gate.report)
    passed = rows.filter(pc.is_in(rows["id"], pa.array(list(gate.passed["id"]), pa.string()))).select(names)
    step.write(table, (row for batch in passed.to_batches(4096) for row in batch.to_pylist()))


def _run_gate(step: Step, name: str, table: str, frame: Any, suite: Sequence[Any], *more: Any) -> Gate:
    """Run the gate with its pages in the step's folder of Data Docs, and list it on the page of all Data Docs."""
    try:
        return run_gate(name, frame, suite, step.docs / table, *more)
    finally:
        write_root(step.docs.parent)


def _rejecter(step: Step, table: str, rows: pa.Table) -> Reject:
    """A function that quarantines one of `rows` by its id, which is the first column of every table."""
    known = rows.select(SCHEMAS[table].names)
    indexes: dict[str | None, int] = {}  # filled at the first rejection; usually there is none

    def reject(row_id: str | None, reason: str, detail: str) -> None:
        if not indexes:
            indexes.update((key, index) for index, key in enumerate(known.column(0).to_pylist()))
        index = indexes.get(row_id)
        row = None if index is None else known.slice(index, 1).to_pylist()[0]
        step.reject(row_id or "(no id)", reason, detail, row)

    return reject


def _write_report(step: Step, table: str, report: Sequence[Mapping[str, Any]]) -> None:
    """Add a gate's figures to the committed ``validation.json``, which has neither times nor random ids."""
    path = step.out / "validation.json"
    reports = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reports[table] = list(report)
    path.write_text(json.dumps(reports, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
