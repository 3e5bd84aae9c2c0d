"""What MLflow shows on the page of the run that registered a version: a description, the report, samples and scores."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.evaluation.report import stamp
from components.pipeline.step import Step
from components.registry.evaluations import HEADLINES, Evaluation
from components.tracking import tracking_uri
from univigu.mlflow_store import explained

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REPORT = "report"  # the folder among the run's artifacts
FRAME_MS = 125  # how long a frame of the gallery is shown, if it doesn't say


def describe_run(name: str, evaluation: Evaluation) -> str:
    """What the run of a version of `name` holds, as Markdown."""
    scores = ", ".join(
        f"{score} **{found['value']:.3f}** ({found['low']:.3f} to {found['high']:.3f})"
        for score in HEADLINES
        if (found := evaluation.scores.get(score))
    )
    return (
        f"A version of `{name}`, with its scores and 95 % intervals: {scores}.\n\nUnder *Artifacts*: "
        f"`{REPORT}/report.html` (samples, worst cases, curves, the data's funnel), `{REPORT}/gallery.gif`, "
        f"`{REPORT}/confusion.csv`, `{REPORT}/funnel.csv` and `{REPORT}/scores.json`. The version's own files "
        f"have its lineage, in `artifacts/lineage/lineage.json`."
    )


def show_report(step: Step, version: "ModelVersion", decision: str, temporary: Path) -> None:
    """Add the report, the samples, the scores and the tables behind its charts to the version's run, once.

    Raises `TransientError` if the store does not answer.
    """
    from mlflow import MlflowClient

    store = tracking_uri(step.root)
    with explained(store):
        client = MlflowClient(store)
        # pyrefly: ignore[bad-argument-type]
        if client.list_artifacts(version.run_id, REPORT):
            return
        facts = {"Version": f"{version.name} {version.version}", "Decision": decision}
        target = _collect(step.inputs["evaluation"], temporary / REPORT, facts)
        # pyrefly: ignore[bad-argument-type]
        client.log_artifacts(version.run_id, str(target), REPORT)


def write_page(source: Path, target: Path, facts: Mapping[str, str], links: Mapping[str, str] | None = None) -> None:
    """Write the report page with facts about the run and links, both by label, which a step's output doesn't have."""
    target.write_text(stamp(source.read_text(encoding="utf-8"), facts, links or {}), encoding="utf-8")


def _collect(source: Path, target: Path, facts: Mapping[str, str]) -> Path:
    target.mkdir()
    for path in [source / "scores.json", *sorted((source / "plots").glob("*.csv"))]:
        shutil.copy(path, target / path.name)
    if (source / "report.html").is_file():
        write_page(source / "report.html", target / "report.html", facts)
    if (source / "gallery.webp").is_file():
        _convert_to_gif(source / "gallery.webp", target / "gallery.gif")
    return target


def _convert_to_gif(source: Path, target: Path) -> None:
    """An animated picture as GIF, because MLflow shows no WebP."""
    from PIL import Image, ImageSequence

    with Image.open(source) as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        duration = picture.info.get("duration") or FRAME_MS
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=duration, loop=0)
