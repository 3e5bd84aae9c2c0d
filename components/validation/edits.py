"""People's edits in the gate of pairs: what validate-pairs reads, and what it would say with other edits."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.edits import CAPTION, EXCLUDE, Edit, Outcome, by_clip, settle
from components.pipeline.manifests import inside
from components.pipeline.runner import section
from components.pipeline.stages import EDITED, EDITS, EXCLUDED, find_stage
from components.pipeline.step import Step, load_function
from components.pipeline.tables import SCHEMAS
from components.prompts.screening import ENFORCE
from components.prompts.tokens import count_tokens, load_tokenizer
from components.validation.gates import expectations, find_reasons
from components.validation.validate_data import (
    READERS,
    _captioned_rows,
    _contract_of_pairs,
    _contract_of_quality,
    _measure_texts,
    assign_splits,
)
from univigu.errors import BadInputError

PAIRS = "validate-pairs"
PARTS = tuple(f"{stage} {split}" for stage in (1, 2) for split in ("train", "heldout"))


# --- the step ---------------------------------------------------------------------------------------------------------


def apply_edits(step: Step, name: str, table: pa.Table) -> pa.Table:
    """A table that validate-pairs reads, with the edits in force: without excluded clips, with captions by people.

    Excluded clips are quarantined. The numbers of edits that are not applied, because they were made against another
    video or caption, or because their clip isn't there, are in the step's facts.
    """
    edit = {"clips": _without_excluded, "captions": _with_captions}.get(name)
    return edit(step, table) if edit else table


def _without_excluded(step: Step, clips: pa.Table) -> pa.Table:
    rows, outcomes = _settle(step, EXCLUDE, clips)
    excluded = [clip for clip, outcome in outcomes.items() if outcome.excluded]
    for clip in excluded:
        step.reject(clip, EXCLUDED, f"by {EDITS}", rows[clip])
    return clips.filter(pc.invert(pc.is_in(clips["id"], pa.array(excluded, pa.string()))))


def _with_captions(step: Step, captions: pa.Table) -> pa.Table:
    """The captions with those of people, which count as a success and are measured as a captioner's are."""
    rows, outcomes = _settle(step, CAPTION, captions)
    texts = {clip: outcome.caption for clip, outcome in outcomes.items() if outcome.caption is not None}
    lengths = count_tokens(load_tokenizer(step.inputs["base"]), list(texts.values())) if texts else []
    for (clip, text), length in zip(texts.items(), lengths, strict=True):
        rows[clip] |= {"text": text, "n_tokens": length, "status": "success"}
    others = captions.filter(pc.invert(pc.is_in(captions["clip_id"], pa.array(list(texts), pa.string()))))
    edited = pa.Table.from_pylist([rows[clip] for clip in texts], SCHEMAS["captions"])
    return pa.concat_tables([others, edited]).sort_by("clip_id")


def _settle(step: Step, action: str, table: pa.Table) -> tuple[dict[str, dict[str, Any]], dict[str, Outcome]]:
    """The row and the outcome of each clip that has edits of a kind, by its id; counts them in the step's facts."""
    edits = by_clip(edit for edit in step.edits if edit.action == action)
    key = table.column_names[0]  # the clip's id
    found = table.filter(pc.is_in(table[key], pa.array(list(edits), pa.string()))).to_pylist()
    rows = {row[key]: row for row in found}
    outcomes = {clip: settle(edits[clip], row.get("text"), row.get("sha256", "")) for clip, row in rows.items()}
    failed = [number for outcome in outcomes.values() for number in outcome.not_applied]
    failed += [edit.number for clip in edits.keys() - rows.keys() for edit in edits[clip]]
    facts = step.facts.setdefault(EDITED, {"applied": 0, "not_applied": [], "last": 0})
    facts["applied"] += sum(map(len, edits.values())) - len(failed)
    facts["not_applied"] = sorted([*facts["not_applied"], *failed])
    facts["last"] = max((edit.number for edit in step.edits), default=0)
    return rows, outcomes


# --- before the step --------------------------------------------------------------------------------------------------


def foresee(
    root: Path, profile: Mapping[str, Any], edits: Sequence[Edit], clips: Collection[str]
) -> dict[str, tuple[str, str]]:
    """What validate-pairs would say about some clips with these edits: reason ("" if it keeps the clip) and detail.

    It comes from the functions and the suite of the step. A clip that the step doesn't see, because an earlier one
    rejected it, is left out. Raises `BadInputError` if the step would fail as a whole, because too few clips are left.
    """
    with tempfile.TemporaryDirectory() as folder:
        step = _unrecorded_step(root, profile, edits, Path(folder))
        step._rejected_of_shard = rejected = []  # so that nothing is written
        rows = _captioned_rows(step, step.read("captions", "captions"))
    validate = step.settings.validate_data
    assign_splits(rows, validate.heldout_share)
    _require_all_parts(rows, validate.min_rows)
    chosen = [row for row in rows if row["clip_id"] in clips]
    # Of the others only the prompts count: a caption has to be longer than the longest of them.
    others = [row | {"stage": 1, "caption": None, "status": None} for row in rows]
    _measure_texts(step, [*chosen, *others])
    found = {row["id"]: (EXCLUDED, "") for row in rejected if row["id"] in clips}
    if chosen:
        text, quality, gx = step.settings.text, validate.caption_quality, expectations()
        suite = [*_contract_of_pairs(gx, text.prompt_tokens, text.caption_tokens), *_contract_of_quality(gx, quality)]
        if quality.mode == ENFORCE:
            load_function(READERS[quality.mode])(step, chosen)
        reasons = find_reasons(PAIRS, pa.Table.from_pylist(chosen).to_pandas(), suite)
        found |= {row["clip_id"]: reasons.get(row["id"], ("", "")) for row in chosen}
    return found


def _unrecorded_step(root: Path, profile: Mapping[str, Any], edits: Sequence[Edit], folder: Path) -> Step:
    """The step with these edits and its inputs as they are: not verified, because it commits nothing."""
    stage = find_stage(PAIRS)
    inputs = {name: root / find_stage(maker).home for name, maker in stage.inputs.items()}
    inputs |= {name: inside(root, section(profile, key)) for name, key in stage.sources.items()}
    sections = {name: section(profile, name) for name in stage.parameters}
    own = [folder] * 5  # out, scratch, previous, records, docs
    step = Step(stage, root, sections, {**inputs, EDITED: root / EDITS}, {}, {}, *own, code={})
    step.edits = tuple(edits)
    return step


def _require_all_parts(rows: Sequence[Mapping[str, Any]], min_rows: int) -> None:
    if missing := [part for part in PARTS if part not in {row["part"] for row in rows}]:
        stage, split = missing[0].split()
        raise BadInputError(
            f"Without this clip, stage {stage} has no clip for '{split}', so the step would fail; keep it."
        )
    if len(rows) < min_rows:
        raise BadInputError(
            f"Only {len(rows)} clips would be left, fewer than 'validate_data.min_rows' ({min_rows}); keep this one."
        )
