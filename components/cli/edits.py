"""Edit clips: what a change would do to the counts, then the change itself; for `univigu data edit` and the studio.

A proposal says what validate-pairs would say about the clip, by that step's own checks. Nothing is written before it is
applied, and then only `data/edits.json`: the data change when the step runs again.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.cli.studio import clips
from components.pipeline.edits import (
    CAPTION,
    EXCLUDE,
    UNDO,
    Edit,
    add_edit,
    by_clip,
    in_force,
    last_line,
    read_edits,
    settle,
    text_digest,
)
from components.pipeline.freshness import committed
from components.pipeline.stages import EDITED, EXCLUDED
from components.validation.edits import PAIRS, foresee
from univigu.errors import BadInputError

GATE, LATER = "validate-clips", "encode-latents"


class Clip(NamedTuple):
    """A clip that passed its gate, as it is with all edits in force."""

    id: str
    stage: int
    video: str  # SHA-256
    caption: str
    excluded: bool
    not_applied: tuple[int, ...]
    line: int  # the number of the last line about it; 0 for none


class Proposal(NamedTuple):
    """A change that was examined and not written, and the counts by verdict before and after the next run."""

    line: dict[str, Any]
    seen: int  # the clip's last line when it was examined
    before: dict[str, int]
    after: dict[str, int]

    def describe(self) -> list[str]:
        """The counts that change, such as ``kept 26 -> 27``; one sentence if none does."""
        names = [name for name in {**self.before, **self.after} if self.before.get(name) != self.after.get(name)]
        changes = [f"{name} {self.before.get(name, 0)} -> {self.after.get(name, 0)}" for name in names]
        return changes or ["no count changes"]


# --- what there is ----------------------------------------------------------------------------------------------------


def open_clip(root: Path, clip_id: str) -> Clip:
    """A clip with its edits; raises `BadInputError` if it didn't pass the gate of clips, so that none can be made."""
    rows = clips.read_rows(root, GATE, "clips", "id", [clip_id])
    if not rows:
        raise BadInputError(
            f"The clip '{clip_id}' isn't among those that passed '{GATE}', so an edit has no effect; check its id."
        )
    captions = clips.read_rows(root, clips.CAPTIONS, "captions", "clip_id", [clip_id])
    text = captions.get(clip_id, {}).get("text")
    edits = read_edits(root)
    video, stage = rows[clip_id]["sha256"], rows[clip_id]["stage"]
    outcome = settle(by_clip(in_force(edits)).get(clip_id, []), text, video)
    caption = (text if outcome.caption is None else outcome.caption) or ""
    line = last_line(edits, clip_id)
    return Clip(clip_id, stage, video, caption, outcome.excluded, outcome.not_applied, line)


def describe_all(root: Path) -> list[str]:
    """All lines of the file, oldest first, each in one line."""
    lines = read_edits(root)
    undone = {line.undoes for line in lines if line.action == UNDO}
    said = []
    for line in lines:
        what = {CAPTION: line.caption, UNDO: f"line {line.undoes}"}.get(line.action, "")
        end = " (undone)" if line.number in undone else ""
        said.append(f"{line.number:>4} {line.at[:16]} {line.action:<8} {line.id} {what}{end}  {line.by}")
    return said or ["No clip was edited here."]


def mark(root: Path, described: Sequence[dict[str, Any]]) -> int:
    """Add to clips of a page what edits make of them; returns how many clips have edits that the data don't have yet.

    `caption` becomes the one in force. `marks` says in words what was edited.
    """
    lines = read_edits(root)
    edits, pending = by_clip(in_force(lines)), find_pending(root, lines)
    for clip in described:
        outcome = settle(edits.get(clip["id"], []), clip["made"], clip["sha256"])
        clip["caption"] = clip["caption"] if outcome.caption is None else outcome.caption
        clip["marks"] = [
            *(["caption edited"] if outcome.caption is not None else []),
            *(["excluded by the next run"] if outcome.excluded and clip["reason"] != EXCLUDED else []),
            *(["an edit is not applied: it was made for another video or caption"] if outcome.not_applied else []),
            *(["not in the data yet"] if clip["id"] in pending else []),
        ]
    return len(pending)


# --- a change ---------------------------------------------------------------------------------------------------------


def propose_caption(root: Path, profile: Mapping[str, Any], clip: Clip, caption: str, by: str) -> Proposal:
    """Another caption for a clip; raises `BadInputError` if validate-pairs would not accept it."""
    caption = caption.strip()
    if clip.stage != 2:
        raise BadInputError(f"The clip '{clip.id}' is for stage 1, which learns from prompts, so it has no caption.")
    if caption == clip.caption:
        raise BadInputError("The caption is as it was; write another one.")
    line = {"action": CAPTION, "id": clip.id, "of": text_digest(clip.caption), "caption": caption, "by": by}
    proposal, (reason, detail) = _examine(root, profile, clip, line)
    if reason and reason != EXCLUDED:
        found = detail.partition(": expect_")[0]
        raise BadInputError(f"'{PAIRS}' would reject this caption as '{reason}' ({found}); nothing was changed.")
    return proposal


def propose_exclusion(root: Path, profile: Mapping[str, Any], clip: Clip, by: str) -> Proposal:
    """Leave a clip out; raises `BadInputError` if it is out already, or if the step would fail without it."""
    if clip.excluded:
        raise BadInputError(f"The clip '{clip.id}' is excluded already.")
    line = {"action": EXCLUDE, "id": clip.id, "of": clip.video, "by": by}
    return _examine(root, profile, clip, line)[0]


def propose_undo(root: Path, profile: Mapping[str, Any], clip: Clip, by: str) -> Proposal:
    """Take back the last edit of a clip; raises `BadInputError` if there is none."""
    own = by_clip(in_force(read_edits(root))).get(clip.id)
    if not own:
        raise BadInputError(f"There is no edit of the clip '{clip.id}' to undo.")
    line = {"action": UNDO, "id": clip.id, "undoes": own[-1].number, "by": by}
    return _examine(root, profile, clip, line)[0]


def apply(root: Path, proposal: Proposal) -> Edit:
    """Write a proposal into the file; raises `BusyError` if the clip was edited since it was examined."""
    return add_edit(root, proposal.line, proposal.seen)


def find_pending(root: Path, edits: Sequence[Edit]) -> set[str]:
    """The ids of clips with lines that the output of validate-pairs doesn't know yet."""
    known = committed(PAIRS, root).get("facts", {}).get(EDITED, {}).get("last", 0)
    return {edit.id for edit in edits if edit.number > known}


def _examine(
    root: Path, profile: Mapping[str, Any], clip: Clip, line: Mapping[str, Any]
) -> tuple[Proposal, tuple[str, str]]:
    """The proposal, and the reason and detail with which validate-pairs would reject the clip ("" for none)."""
    edits = read_edits(root)
    proposed = [*edits, Edit.model_validate({"number": len(edits) + 1, **line})]
    pending = find_pending(root, edits)
    concerned = sorted({*pending, clip.id})
    now = clips.read_verdicts(root, concerned)
    before = _foresee(root, profile, edits, pending, now)
    after = _foresee(root, profile, proposed, concerned, now)
    counts = clips.count_verdicts(root)
    found = [_count(counts, now, {name: reason for name, (reason, _) in then.items()}) for then in (before, after)]
    return Proposal(dict(line), clip.line, *found), after[clip.id]


def _foresee(
    root: Path,
    profile: Mapping[str, Any],
    edits: Sequence[Edit],
    ids: Collection[str],
    now: Mapping[str, tuple[str, str]],
) -> dict[str, tuple[str, str]]:
    """The reason and detail that each clip would have after the next run."""
    if not ids:
        return {}
    foreseen = foresee(root, profile, in_force(edits), ids)
    uncaptioned = clips.read_rows(root, clips.CAPTIONS, "rejected", "id", list(ids))
    found = {}
    for clip in ids:
        step, reason = now.get(clip, ("", ""))
        if clip not in foreseen:  # it has no caption
            found[clip] = (uncaptioned.get(clip, {}).get("reason", reason), "")
        elif not foreseen[clip][0] and step == LATER:
            found[clip] = (reason, "")
        else:
            found[clip] = foreseen[clip]
    return found


def _count(counts: Mapping[str, int], now: Mapping[str, tuple[str, str]], then: Mapping[str, str]) -> dict[str, int]:
    """Counts by verdict after some clips have got other reasons."""
    moved = Counter(counts)
    for clip, reason in then.items():
        moved[now.get(clip, ("", ""))[1] or clips.KEPT] -= 1
        moved[reason or clips.KEPT] += 1
    reasons = {name: n for name, n in sorted(moved.items()) if n and name not in (clips.KEPT, clips.QUARANTINED)}
    return {clips.KEPT: moved[clips.KEPT], clips.QUARANTINED: sum(reasons.values()), **reasons}
