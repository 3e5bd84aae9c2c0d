"""Votes about two versions whose videos were seen side by side without their names.

Each vote is a run of the experiment ``NAME/votes`` in MLflow, next to the registry: it is written in one request, so
that several people can vote at once, and never changed. Its params say what was shown, on which side, and what was
chosen; the side of each version was drawn from `Pair.order`, so that it can be checked.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from components.registry import leases
from components.tracking import existing_store, open_tracking, tracking_uri
from univigu.errors import BadInputError
from univigu.evaluation.intervals import Score, share
from univigu.mlflow_store import explained, first_contact, without_secrets

LEFT, RIGHT, NEITHER = CHOICES = ("left", "right", "neither")
LONGEST = 500  # characters of a prompt that a vote keeps: MLflow's params have a limit


class Pair(NamedTuple):
    """Two versions on the same prompt and seed, and the number from which their sides are drawn."""

    first: int
    second: int
    prompt: str
    seed: int
    order: int

    def sides(self) -> tuple[int, int]:
        """The versions on the left and on the right."""
        drawn = hashlib.sha256(f"{self.order} {self.first} {self.second} {self.prompt} {self.seed}".encode()).digest()
        return (self.first, self.second) if drawn[0] % 2 else (self.second, self.first)


class Tally(NamedTuple):
    """The votes about a version and another one."""

    other: int
    better: int
    worse: int
    alike: int
    share: Score | None  # of the votes with a decision in which it was the better one, with a 95 % interval


def record(name: str, pair: Pair, choice: str, who: str, root: Path) -> int:
    """Write a vote; returns the version that was chosen, or 0. Raises `BadInputError` for an unknown choice."""
    if choice not in CHOICES:
        raise BadInputError(f"'{choice}' is no vote; choose one of {', '.join(CHOICES)}.")
    left, right = pair.sides()
    chosen = {LEFT: left, RIGHT: right, NEITHER: 0}[choice]
    experiment = open_tracking(root, _experiment(name))
    from mlflow import MlflowClient
    from mlflow.entities import Param

    facts = {**pair._asdict(), "prompt": without_secrets(pair.prompt)[:LONGEST], "left": left, "right": right}
    with explained(tracking_uri(root)):
        client = MlflowClient()
        tags = {"mlflow.user": who}
        run = client.create_run(experiment, tags=tags, run_name=f"{left} and {right}").info.run_id
        params = [Param(key, str(value)) for key, value in {**facts, "chosen": chosen}.items()]
        client.log_batch(run, params=params)
        client.set_terminated(run)
    return chosen


def count(name: str, version: int, root: Path) -> list[Tally]:
    """The votes about a version by the other one that was shown, in the order of their numbers."""
    store = existing_store(root)
    with first_contact(store):
        from mlflow import MlflowClient

        client = MlflowClient(store)
        experiment = client.get_experiment_by_name(_experiment(name))
        runs = leases.search_runs(client, experiment.experiment_id) if experiment else []
    votes: dict[int, list[int]] = {}
    for left, right, chosen in filter(None, map(_read, runs)):
        if version in (left, right):
            votes.setdefault(left + right - version, []).append(chosen)
    return [_tally(version, other, chosen) for other, chosen in sorted(votes.items())]


def _tally(version: int, other: int, chosen: Sequence[int]) -> Tally:
    decided = [one == version for one in chosen if one]
    better = sum(decided)
    found = share(decided) if decided else None
    return Tally(other, better, len(decided) - better, len(chosen) - len(decided), found)


def _read(run: Any) -> tuple[int, int, int] | None:
    """The versions on the left and right and the chosen one; None for a run that is no whole vote."""
    try:
        left, right, chosen = (int(run.data.params[name]) for name in ("left", "right", "chosen"))
    except (KeyError, ValueError):
        return None
    return (left, right, chosen) if left != right and chosen in (0, left, right) else None


def _experiment(name: str) -> str:
    return f"{name}/votes"
