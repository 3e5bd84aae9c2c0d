"""Promotion to champion, and rollback to the previous champion.

A challenger replaces the champion only if it is significantly better on the same held-out items: if the 95 % interval
of the paired difference of the metric (`univigu.evaluation.intervals.paired_difference`) is above zero. Otherwise the
champion stays. A version with scores below its profile's `least_scores` is promoted only by force, even if there is no
champion. Every decision, refusals too, is a line of the ledger (`components.registry.ledger`), and is made under a
lease: of two concurrent promotions, the second is compared with the champion that the first one left.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.digests import json_digest
from components.registry import ledger
from components.registry.evaluations import HEADLINES, Evaluation, UnreadableEvaluationError, claims, read_evaluation
from components.tracking import actor, existing_store
from univigu import registry, version_files
from univigu.errors import BadInputError, BusyError, GateFailedError, MissingInputError, UniViGUError
from univigu.evaluation.intervals import Score, clustered_mean, paired_difference
from univigu.mlflow_store import without_password

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

METRIC = "captions.mean"
METRIC_TAG = "univigu.champion_metric"  # of a version: the score that it is compared by, by default METRIC
LEAST_TAG = "univigu.least_scores"  # of a version: the scores that its profile requires of a champion, as JSON
MIN_ITEMS = 10  # a bootstrap interval over fewer items is not informative


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison; `scores` has the keys `challenger`, `champion` and `difference`, or is empty."""

    name: str
    challenger: int
    champion: int | None
    metric: str
    better: bool
    reason: str
    scores: Mapping[str, Score] = field(default_factory=dict)


def compare(name: str, version: int | str, *, root: Path = Path(".")) -> Comparison:
    """Compare a version (a number or an alias) with the champion, on the champion's items; changes nothing.

    If there is no champion, any version counts as better that has the least scores of its profile. Raises
    `MissingInputError` if there is no such version.
    """
    store = existing_store(root)
    return _compare(registry.find_version(name, version, store), store)


def side_by_side(comparison: Comparison, *, root: Path = Path(".")) -> dict[str, dict[str, Score | None]]:
    """The headline scores of the challenger and the champion, each on its own items, by score; None where unknown."""
    store = existing_store(root)
    sides = {"challenger": comparison.challenger, "champion": comparison.champion}
    found = {
        side: _read_registered_evaluation(registry.find_version(comparison.name, number, store), store)
        if number is not None
        else None
        for side, number in sides.items()
    }
    return {
        name: {side: evaluation.scores.get(name) if evaluation else None for side, evaluation in found.items()}
        for name in dict.fromkeys([comparison.metric, *HEADLINES])
        if (challenger := found["challenger"]) and name in challenger.scores
    }


def promote(
    name: str, version: int | str, why: str, *, who: str = "", force: bool = False, root: Path = Path(".")
) -> ledger.Entry:
    """Make a version champion if it is better, and the old champion `previous`; returns the ledger line.

    If the version is champion already, the line says `unchanged`. who: by default `components.tracking.actor`. force:
    promote it even if it is not better. Raises `GateFailedError` if it is not better, and `BusyError` if other
    processes keep changing the same model.
    """
    entry = promote_if_better(name, version, why, who=who, force=force, root=root)
    if entry.outcome == ledger.REFUSED:
        raise GateFailedError(
            f"Version {entry.version} of '{name}' was not promoted ({entry.reason}); to promote it anyway, use --force "
            f"and give the reason with --why."
        )
    return entry


def promote_if_better(
    name: str,
    version: int | str,
    why: str,
    *,
    who: str = "",
    force: bool = False,
    decision_id: str = "",
    root: Path = Path("."),
) -> ledger.Entry:
    """Like `promote`, but a refusal raises no error: the outcome of the returned line says what was decided.

    decision_id: identifies a decision that is made only once; if the ledger has its line, that line is returned.
    """
    _require_why(why)
    store, who = existing_store(root), who or actor()
    challenger = registry.find_version(name, version, store)
    number = int(challenger.version)
    asked = {"action": "promote", "version": number, "who": who, "why": why}
    request = decision_id or json_digest([asked, force])
    with ledger.hold_lease(name, root, f"promote version {number}", who, why) as lease:
        if not (lease.find_decided(request) if decision_id else lease.find_settled(request)):
            _decide(lease, challenger, store, {**asked, "request": request}, force)
    return lease.entry()


def _decide(lease: ledger.Lease, challenger: "ModelVersion", store: str, asked: Mapping[str, Any], force: bool) -> None:
    comparison = _compare(challenger, store)
    number = int(challenger.version)
    if comparison.champion == number:
        outcome = ledger.UNCHANGED
    elif comparison.better or force:
        _require_files(lease, challenger, store, asked)
        outcome = ledger.PROMOTED
    else:
        outcome = ledger.REFUSED
    forced = force and not comparison.better
    files = {"files": digest} if (digest := challenger.tags.get(version_files.TAG)) else {}
    lease.decide({**asked, **files, **_facts(comparison, outcome), "forced": forced}, _figures(comparison))
    if outcome == ledger.PROMOTED:
        lease.set_champion(number, comparison.champion)


def rollback(name: str, why: str, *, who: str = "", root: Path = Path(".")) -> ledger.Entry:
    """Swap `champion` and `previous`; returns the ledger line.

    Raises `MissingInputError` if there is no previous champion, and `BusyError` if the champion changed while this
    call waited for the lease: it would then roll back another version than the caller saw.
    """
    _require_why(why)
    store, who = existing_store(root), who or actor()
    asked = {"action": "rollback", "who": who, "why": why}
    request = json_digest(asked)
    before = _champion_and_previous(name, store)
    with ledger.hold_lease(name, root, "rollback", who, why) as lease:
        if not lease.find_settled(request):
            _roll_back(lease, name, store, {**asked, "request": request}, before)
    return lease.entry()


def _roll_back(
    lease: ledger.Lease, name: str, store: str, asked: Mapping[str, Any], before: Sequence["ModelVersion | None"]
) -> None:
    champion, previous = _champion_and_previous(name, store)
    if _numbers(before) != _numbers((champion, previous)):
        raise BusyError(
            f"The champion of '{name}' changed while this rollback waited, so nothing was rolled back; check "
            f"`univigu model history`, and try again if it is still needed."
        )
    if champion is None or previous is None or previous.version == champion.version:
        raise MissingInputError(
            f"'{name}' has no previous champion to roll back to; `univigu model list` shows the versions, and "
            f"`univigu model promote` makes one of them champion."
        )
    number, replaced = int(previous.version), int(champion.version)
    asked = {**asked, "version": number}
    _require_files(lease, previous, store, asked)
    try:
        comparison = _compare(previous, store)
    except UniViGUError as error:  # a failed comparison must not prevent a rollback
        comparison = Comparison(name, number, replaced, METRIC, False, str(error))
    lease.decide({**asked, **_facts(comparison, ledger.ROLLED_BACK)}, _figures(comparison))
    lease.set_champion(number, replaced)


def history(name: str, *, root: Path = Path(".")) -> list[ledger.Entry]:
    """All ledger lines of `name`, newest first."""
    return ledger.read_ledger(name, root)


# --- comparison ------------------------------------------------------------------------------------------------------


def _compare(challenger: "ModelVersion", store: str) -> Comparison:
    name, number = challenger.name, int(challenger.version)
    metric = challenger.tags.get(METRIC_TAG, METRIC)
    champion, _ = _champion_and_previous(name, store)
    holder = champion and int(champion.version)
    ours = _read_registered_evaluation(challenger, store)

    def verdict(better: bool, reason: str, scores: Mapping[str, Score] | None = None) -> Comparison:
        # pyrefly: ignore[bad-argument-type]
        return Comparison(name, number, holder, metric, better, reason, scores or {})

    if holder != number and (short := shortfall(least_scores(challenger.tags), ours)):
        return verdict(False, short)
    if holder is None:
        known = ours and ours.scores.get(metric)
        return verdict(True, "the first one" + (f" ({metric} {known['value']:.3f})" if known else ""))
    if holder == number:
        return verdict(False, "it is champion already")
    # pyrefly: ignore[bad-argument-type]
    theirs = _read_registered_evaluation(champion, store)
    if ours is None or theirs is None:
        return verdict(False, f"the evaluation of version {number if ours is None else holder} can't be read")
    asked, answered = claims(theirs, metric), claims(ours, metric)
    if not asked or not asked.keys() <= answered.keys():
        return verdict(False, f"it and the champion, version {holder}, were not measured on the same held-out items")
    if any(answered[one].keys() != right.keys() for one, right in asked.items()):
        return verdict(False, f"it and the champion, version {holder}, were not scored on the same attributes")
    if len(asked) < MIN_ITEMS:
        return verdict(False, f"{len(asked)} items in common with the champion, version {holder}, tell nothing apart")
    pairs: tuple[Sequence, Sequence] = [answered[one] for one in asked], list(asked.values())
    scores = {
        "challenger": clustered_mean(pairs[0]),
        "champion": clustered_mean(pairs[1]),
        "difference": paired_difference(*pairs),
    }
    # pyrefly: ignore[bad-argument-type]
    return verdict(scores["difference"]["low"] > 0, _describe(metric, holder, scores), scores)


def least_scores(tags: Mapping[str, str]) -> dict[str, float]:
    """The scores that a version needs to be promoted, from its tags; raises `BadInputError` if the tag was damaged."""
    text = tags.get(LEAST_TAG, "{}")
    try:
        return {name: float(value) for name, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"The version's tag {LEAST_TAG} is '{text}', which is not a table of scores; set it to what the profile's "
            f"register_model.least_scores holds, as JSON."
        ) from error


def shortfall(least: Mapping[str, float], evaluation: Evaluation | None) -> str:
    """Which scores are below the least that a champion needs, in words; empty if none is."""
    if not least:
        return ""
    if evaluation is None:
        return "its evaluation can't be read"
    scores = {name: evaluation.scores.get(name, {}).get("value", 0.0) for name in least}
    short = [name for name in least if scores[name] < least[name]]
    if not short:
        return ""
    needed = " and ".join(f"{least[name]:g}" for name in short)
    found = " and ".join(f"{name} {scores[name]:.3f}" for name in short)
    return f"{found} {'is' if len(short) == 1 else 'are'} below its profile's least ({needed})"


def _describe(metric: str, holder: int, scores: Mapping[str, Score]) -> str:
    difference = scores["difference"]
    low, value, high = (difference[key] for key in ("low", "value", "high"))
    if low > 0:
        verdict = f"better by {value:.3f} ({low:.3f} to {high:.3f})"
    elif high < 0:
        verdict = f"worse by {-value:.3f} ({-high:.3f} to {-low:.3f})"
    else:
        verdict = f"a difference of {value:+.3f} ({low:+.3f} to {high:+.3f}), which may be chance"
    return (
        f"{metric} {scores['challenger']['value']:.3f} against version {holder}'s {scores['champion']['value']:.3f} on "
        f"the same {difference['n']} items: {verdict}"
    )


def _read_registered_evaluation(version: "ModelVersion", store: str) -> Evaluation | None:
    """The evaluation among a version's artifacts; None if it is missing or unreadable.

    A failing disk or server raises instead: None would refuse the version permanently because of a temporary failure.
    """
    try:
        return read_evaluation(registry.artifact(f"models:/{version.name}/{version.version}", "evaluation", store))
    except (MissingInputError, UnreadableEvaluationError):
        return None


# --- helpers ---------------------------------------------------------------------------------------------------------


def _champion_and_previous(name: str, store: str) -> list["ModelVersion | None"]:
    return [registry.version_at(name, alias, store) for alias in (registry.CHAMPION, registry.PREVIOUS)]


def _numbers(versions: Sequence["ModelVersion | None"]) -> list[int | None]:
    return [one and int(one.version) for one in versions]  # pyrefly: ignore[bad-return]: a version is always truthy


def _facts(comparison: Comparison, outcome: str) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "replaced": comparison.champion,
        "metric": comparison.metric,
        "reason": comparison.reason,
    }


def _figures(comparison: Comparison) -> dict[str, float]:
    if not comparison.scores:
        return {}
    difference = comparison.scores["difference"]
    return {
        **{side: comparison.scores[side]["value"] for side in ("challenger", "champion", "difference")},
        "difference_low": difference["low"],
        "difference_high": difference["high"],
        "items": difference["n"],
    }


def _require_why(why: str) -> None:
    if not why.strip():
        raise BadInputError("A change of champion needs a reason for the ledger; give one with --why.")


def _require_files(lease: ledger.Lease, version: "ModelVersion", store: str, asked: Mapping[str, Any]) -> None:
    if not registry.has_files(version, store):
        lease.fail(asked)
        raise MissingInputError(
            # pyrefly: ignore[bad-argument-type]
            f"The files of version {version.version} of '{version.name}' are gone, so it can't be champion; restore "
            f"them to {without_password(version.source)}, or run `univigu run register-model` where it was trained."
        )
