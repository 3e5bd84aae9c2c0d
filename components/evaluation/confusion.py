"""Which values of an attribute captions confuse: counts of true and stated values, for the page and for plots."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MOST_VALUES = 12  # with more true values, a matrix can't be read
NOT_SAID = "not said"


def count_confusions(rows: Sequence[Mapping[str, Any]], attribute: str) -> dict[str, Any] | None:
    """The confusion matrix of an attribute in rows of the task ``captions``; None if it has too few or many values.

    ``stated`` are the columns: the true values, others that were stated, and ``not said``. Each of ``rows`` has the
    ``true`` value and its ``counts``, one per column.
    """
    pairs = stated_values(rows, attribute)
    true = sorted({truth for truth, _ in pairs})
    if not 2 <= len(true) <= MOST_VALUES:
        return None
    others = sorted({said for _, said in pairs} - {*true, NOT_SAID})
    stated = [*true, *others, NOT_SAID]
    counts = Counter(pairs)
    matrix = [{"true": truth, "counts": [counts[truth, said] for said in stated]} for truth in true]
    return {"attribute": attribute, "stated": stated, "rows": matrix}


def stated_values(rows: Sequence[Mapping[str, Any]], attribute: str) -> list[tuple[str, str]]:
    """The true value and the stated one of each caption that is scored on the attribute."""
    pairs = []
    for row in rows:
        truth, found = json.loads(row["truth"]), json.loads(row["found"])
        if row["task"] == "captions" and attribute in truth:
            pairs.append((str(truth[attribute]), str(found.get(attribute) or NOT_SAID)))
    return pairs
