"""Score texts against scenes: facts right, contradicted and left out, and the share of texts that are grammatical.

``python -m components.digits.stories.scoring reports/items.parquet`` scores the captions of an evaluation, for each
number of Euler steps that it compared.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from components.digits.stories.reader import read
from components.digits.stories.scenes import Scene
from univigu.evaluation.claims import summarise
from univigu.evaluation.intervals import Score, clustered_mean, share


class Verdict(NamedTuple):
    """The facts of a scene that a text has `right` or leaves out, and the facts that it states and that don't hold."""

    right: frozenset[str]
    contradicted: frozenset[str]
    left_out: frozenset[str]


def judge(scene: Scene, claims: Mapping[str, Set[str]]) -> Verdict:
    """Compare the facts that a text states (`reader.Reading.claims`) with those of a scene.

    A fact with two values in one text is contradicted. So is one about a digit or a relation that the scene hasn't.
    """
    right = {name for name, value in scene.items() if claims.get(name) == {value}}
    stated = {name for name, values in claims.items() if values}
    return Verdict(frozenset(right), frozenset(stated - right), frozenset(scene.keys() - stated))


def score_texts(scenes: Sequence[Scene], texts: Sequence[str], seed: int = 0) -> dict[str, Score]:
    """Scores with intervals over texts: ``right`` and ``left_out``, of the scenes' facts, and ``contradicted``, of the
    facts that the texts state (missing if they state none), each the mean over kinds of facts; ``whole``, the share of
    texts that are of the grammar from end to end; and ``right`` for each kind, as ``right.digit``.
    """
    readings = [read(text) for text in texts]
    verdicts = [judge(scene, reading.claims) for scene, reading in zip(scenes, readings, strict=True)]
    pairs = list(zip(scenes, verdicts, strict=True))
    right = summarise([{name: name in verdict.right for name in scene} for scene, verdict in pairs], seed)
    stated = [
        {name: name in verdict.contradicted for name in verdict.right | verdict.contradicted} for verdict in verdicts
    ]
    left_out = [{name: name in verdict.left_out for name in scene} for scene, verdict in pairs]
    return {
        "right": right.pop("mean"),
        **({"contradicted": clustered_mean(stated, seed)} if any(stated) else {}),
        "left_out": clustered_mean(left_out, seed),
        "whole": share([reading.whole for reading in readings]),
        **{f"right.{name}": score for name, score in right.items()},
    }


def score_items(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Score]]:
    """The scores of each way of captioning in the table `items` of an evaluation on stories."""
    told: dict[str, list[tuple[Scene, str]]] = {}
    for row in rows:
        if row["task"].startswith("captions"):
            told.setdefault(row["task"], []).append((json.loads(row["truth"]), row["text"]))
    return {
        task: score_texts([scene for scene, _ in pairs], [text for _, text in pairs]) for task, pairs in told.items()
    }


def main() -> None:
    """Print the scores of an evaluation's captions as JSON."""
    import pyarrow.parquet as pq

    print(json.dumps(score_items(pq.read_table(sys.argv[1]).to_pylist()), indent=1))


if __name__ == "__main__":
    main()
