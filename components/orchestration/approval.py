"""Who decides whether a model becomes champion, and what that person reads: the comparison, the scores, the samples."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import ConfigError
from univigu.mlflow_store import without_login

if TYPE_CHECKING:
    from components.registry.promotion import Comparison

GALLERY = "report/gallery.gif"  # among the artifacts of the run that registered the version


APPROVERS, OWN = "UNIVIGU_APPROVERS", "UNIVIGU_APPROVE_OWN"  # set where Airflow runs, not by those who use it
VARIABLE = "univigu_approval"  # Airflow's, which administrators change


def approvers(text: str) -> list[dict[str, str]]:
    """The users who may answer, from their ids with commas between them; none: everyone who may answer in Airflow."""
    return [{"id": user, "name": user} for user in map(str.strip, text.split(",")) if user]


def is_required(variable: str) -> bool:
    """Whether a person has to approve, by the value of `VARIABLE`; raises `ConfigError` for an unknown value."""
    if variable not in ("required", "off"):
        raise ConfigError(f"The Airflow variable {VARIABLE} is '{variable}'; set it to required or off.")
    return variable == "required"


def may_approve_own() -> bool:
    """Whether a person may approve a run that they started, by `OWN`; raises `ConfigError` for an unknown value."""
    own = os.environ.get(OWN, "no")
    if own not in ("yes", "no"):
        raise ConfigError(f"{OWN} is '{own}'; set it to yes or no.")
    return own == "yes"


def refusal(answered_by: str, started_by: str | None) -> str:
    """Why an approval doesn't count, or "": by default no one approves a run that they started themselves.

    The users are those that Airflow has authenticated; a run that a schedule or an event started has none.
    """
    if may_approve_own() or not started_by or answered_by != started_by:
        return ""
    return f"{answered_by} started this run, so another person has to approve its model; {OWN}=yes would allow it"


def describe(
    comparison: "Comparison", scores: Mapping[str, Mapping[str, Any]], root: Path, runs: Mapping[str, str]
) -> str:
    """The request for an approval, as Markdown.

    scores: the result of `promotion.side_by_side`. runs: the MLflow runs that registered the two versions, by
    ``challenger`` and ``champion``.
    """
    champion = f"version {comparison.champion}" if comparison.champion else "none"
    first = f"There is no champion yet, so version {comparison.challenger} would be "
    compared = (
        "each version on its own held-out items. The sentence above compares the two on the items that they share, "
        "which is what the decision is based on."
    )
    lines = [
        f"{'' if comparison.champion else first}{comparison.reason}.",
        "",
        f"| score | version {comparison.challenger} (new) | champion: {champion} |",
        "|---|---|---|",
        *(f"| {name} | {_cell(both['challenger'])} | {_cell(both['champion'])} |" for name, both in scores.items()),
        "",
        f"Values with 95 % intervals, {compared if comparison.champion else 'on held-out items.'}",
        "",
        *_samples(comparison, root, runs),
    ]
    return "\n".join(lines)


def _cell(score: Mapping[str, Any] | None) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})" if score else "-"


def _samples(comparison: "Comparison", root: Path, runs: Mapping[str, str]) -> list[str]:
    """Links and samples from MLflow's server, a column for each version; without a server, the path of the report."""
    server = without_login(os.environ.get("MLFLOW_TRACKING_URI", "")).rstrip("/")
    if not server.startswith("http"):
        page = (root / "reports" / "report.html").resolve()
        return [f"Samples, worst cases and curves of the new version: `{page}`, and in `mlflow ui`."]
    pages, pictures = [], []
    for side, run in runs.items():
        number = getattr(comparison, side)
        pages.append(f"[Version {number}]({server}/#/models/{comparison.name}/versions/{number})")
        pictures.append(f"![Samples of version {number}]({server}/get-artifact?path={GALLERY}&run_uuid={run})")
    return [f"| {' | '.join(cells)} |" for cells in (pages, ["---"] * len(pages), pictures)]
