"""The summary of the last run: printed for people, and written to `reports/run.json` for programs.

`reports/index.html` is the report page with the date, the machine and links to MLflow and Data Docs, which the output
of a step must not have.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from components.pipeline.manifests import read_manifest
from components.pipeline.stages import STAGES, Stage, find_stage
from components.pipeline.state import STATE
from univigu.errors import CorruptDataError, MissingInputError
from univigu.files import read_json_object, write_json
from univigu.mlflow_store import without_login

SCORES = ("captions.mean", "captions_without_video.mean", "generation.mean", "generation_base.mean", "joint.agreement")


def summarise(root: Path) -> dict[str, Any]:
    """Gather the records of each step's last run.

    `total_seconds` is the sum of the steps' own times, without the overhead of an orchestrator. A step's time is
    null if its output was restored from a cache. `machine` is the one that this command runs on.
    """
    from components.bench import machine

    records = [record for stage in STAGES if (record := _record(root, stage))]
    if not records:
        raise MissingInputError(f"No step has run under {root.resolve()} yet; run `make demo` first.")
    registration = root / find_stage("register-model").home / "registration.json"
    return {
        "steps": [
            {key: record[key] for key in ("name", "seconds", "rows_in", "rows_out", "quarantined")}
            for record in records
        ],
        "total_seconds": round(sum(record["seconds"] or 0 for record in records), 2),
        "peak_rss_mb": max(record["peak_rss_mb"] or 0 for record in records),
        "model_version": _read(root, "register-model", registration.name)["version"]
        if registration.is_file()
        else None,
        "machine": dict(machine()),
    }


def _record(root: Path, stage: Stage) -> dict[str, Any] | None:
    """The record of the run that made a step's current output; without times if a cache restored the output."""
    try:
        manifest = read_manifest(root / stage.home, stage.name)
    except MissingInputError:
        return None
    rows = {key: manifest[key] for key in ("rows_in", "rows_out", "quarantined")}
    known = {"name": stage.name, "seconds": None, "peak_rss_mb": None, **rows}
    try:
        record = read_json_object(root / STATE / "runs" / f"{stage.name}.json")
    except (OSError, ValueError):
        return known
    return record if record.get("digest") == manifest["digest"] and record.keys() >= known.keys() else known


def _read(root: Path, step: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a step's output; raises `CorruptDataError` if it can't be parsed."""
    path = root / find_stage(step).home / name
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CorruptDataError(f"{path} can't be read ({error}); run `univigu run {step}` again.") from error


def show(root: Path, run: dict[str, Any]) -> None:
    """Print a run's steps, scores, registered version and page; write that page, and ``reports/run.json``."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("step", box=None, pad_edge=False)
    for name in ("seconds", "in", "out", "quarantined"):
        table.add_column(name, justify="right")
    for step in run["steps"]:
        counts = (str(step[key]) for key in ("rows_in", "rows_out", "quarantined"))
        table.add_row(step["name"], "restored" if step["seconds"] is None else f"{step['seconds']:.1f}", *counts)
    console.print(table)
    console.print(f"{run['total_seconds']:.0f} s in total, at most {run['peak_rss_mb'] / 1024:.1f} GiB of memory")
    metrics_path = root / "reports" / "scores.json"
    if metrics_path.is_file():
        _show_scores(console, _read(root, "evaluate-model", metrics_path.name))
    if run["model_version"]:
        console.print(f"registered: {_registration_line(root)}")
    (root / "reports").mkdir(exist_ok=True)
    write_json(root / "reports" / "run.json", run)
    if page := write_index(root, run):
        console.print(f"page: {page.resolve()}", soft_wrap=True)


def write_index(root: Path, run: dict[str, Any]) -> Path | None:
    """Write ``reports/index.html``, the report page with facts about the run and links; None if there is no report."""
    from components.registry.run_page import write_page

    page = root / "reports" / "report.html"
    if not page.is_file():
        return None
    index = page.with_name("index.html")
    write_page(page, index, _run_facts(root, run), _links(root, run))
    return index


def _run_facts(root: Path, run: dict[str, Any]) -> dict[str, str]:
    from components.pipeline.profiles import PARAMS
    from components.registry.register_model import git_commit
    from univigu.files import read_yaml

    try:
        profile = str(read_yaml(root / PARAMS).get("profile"))
    except (OSError, ValueError, AttributeError):  # a work root without DVC
        profile = "unknown"
    return {
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Profile": profile,
        "Version": _registration_line(root) if run["model_version"] else "not registered",
        "Commit": git_commit(root) or "not in git",
        "Machine": f"{run['machine']['processor']}, {run['machine']['cores']} cores; {run['total_seconds']:.0f} s",
    }


def _links(root: Path, run: dict[str, Any]) -> dict[str, str]:
    """Links from the page, by label: Data Docs if they were written, and the version in MLflow's web UI."""
    links = {}
    if (root / STATE / "docs" / "index.html").is_file():
        links["Data Docs"] = f"../{STATE}/docs/index.html"
    if run["model_version"]:
        server = os.environ.get("MLFLOW_TRACKING_URI", "")
        facts = _read(root, "register-model", "registration.json")
        here = "" if server.startswith("http") else " (after `mlflow ui --backend-store-uri sqlite:///mlflow.db`)"
        address = without_login(server).rstrip("/") if not here else "http://127.0.0.1:5000"
        links[f"MLflow{here}"] = f"{address}/#/models/{quote(facts['name'])}/versions/{facts['version']}"
    return links


def _show_scores(console: Any, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("score", box=None, pad_edge=False)
    for name in ("value", "95 % interval", "n"):
        table.add_column(name, justify="right")
    attributes = [f"captions.{name}" for name in metrics.get("captions", {}) if name != "mean"]
    for name in (SCORES[0], *attributes, *SCORES[1:], "recogniser.mean"):
        group, _, key = name.partition(".")
        score = metrics.get(group, {}).get(key)
        if score:
            interval = f"{score['low']:.3f}-{score['high']:.3f}"
            table.add_row(name, f"{score['value']:.3f}", interval, str(score["n"]))
    console.print()
    console.print(table)
    console.print()


def _registration_line(root: Path) -> str:
    facts = _read(root, "register-model", "registration.json")
    return f"{facts['name']} version {facts['version']} - {facts['decision']}"
