"""Clips of an import that nearly equal an earlier one are quarantined, if the profile has the check `near_duplicate`.

Clips are compared in the order of the import, which is that of the files' names; the first of several copies stays.
Clips of one video are not compared with each other.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from components.checks import near_duplicate
from components.clips.gate import ClipCheck

DISTANCE = "picture_distance"  # to the nearest earlier clip, among the scores
COPY_OF = "duplicate_of"  # the id of that clip, among the scores, if both are so alike that one should go
Row = dict[str, Any]


def drop_copies(clips: Sequence[Row], gate: Sequence[ClipCheck], reject: Callable[[Row, str, str], None]) -> list[Row]:
    """The rows of `clips` that stay, with the distance, and the clip of which one is a copy, among their scores.

    reject: called with each of the others, the reason and the details.
    """
    check = next((check for check in gate if check.module is near_duplicate), None)
    if not check:
        return list(clips)
    scores = [json.loads(row["scores"]) for row in clips]
    hashes = [each.pop(near_duplicate.HASH) for each in scores]
    most = check.settings["max_distance"]
    enforced = check.mode == "enforce"
    nearest = near_duplicate.compare(hashes, [row["plan"] for row in clips], most if enforced else None)
    kept = []
    for row, known, found in zip(clips, scores, nearest, strict=True):
        known |= {DISTANCE: round(found.distance, 4)} if found else {}
        if found and found.distance <= most:
            known[COPY_OF] = clips[found.index]["id"]
        changed = {**row, "scores": json.dumps(known, sort_keys=True)}
        if enforced and COPY_OF in known:
            detail = f"{known[DISTANCE]:.1%} of the bits differ from those of clip {known[COPY_OF]}"
            reject(changed, "near_duplicate", detail)
        else:
            kept.append(changed)
    return kept
