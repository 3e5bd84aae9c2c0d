"""`univigu model`: registered versions, promotion and rollback, history, and lineage."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from components.pipeline.progress import activity, progress

if TYPE_CHECKING:
    import numpy as np

    from components.registry.ledger import Entry
    from components.registry.promotion import Comparison

app = typer.Typer(help="List, compare, promote and roll back registered models, and trace them to their data.")

READING = "Reading the registry"

Name = Annotated[str, typer.Option(help="The registered name.")]
Root = Annotated[Path, typer.Option(help="The work root, which contains the registry (or set MLFLOW_TRACKING_URI).")]
Version = Annotated[str, typer.Argument(help="A version number, or an alias such as candidate.")]
Precision = Literal["fp32", "fp16", "bf16"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Why = Annotated[str, typer.Option(help="The reason, which is recorded in the history.")]


@app.command("list")
def list_versions(name: Name = "uni-vigu", root: Root = Path("."), as_json: Json = False) -> None:
    """List the versions, newest first: aliases, score, dataset, and the decision at registration."""
    with activity(READING):
        rows = read_versions(name, root)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"No version of '{name}' is registered; `univigu run register-model` registers one.")
    else:
        columns = ("version", "aliases", "registered", "score", "dataset", "at registration")
        show_table(
            columns,
            [
                (
                    str(row["version"]),
                    ", ".join(row["aliases"]),
                    _minute(row["registered"]),
                    f"{row['metric']} {row['score'] or ''}",
                    (row["dataset_digest"] or "")[:12],
                    row["decision"] or "",
                )
                for row in rows
            ],
        )


def read_versions(name: str, root: Path) -> list[dict[str, Any]]:
    """The versions of a registered model, newest first, as JSON values."""
    from datetime import UTC, datetime

    from components.registry.promotion import METRIC, METRIC_TAG
    from components.tracking import existing_store
    from univigu import registry

    return [
        {
            "version": int(one.version),
            "aliases": one.aliases,
            "registered": datetime.fromtimestamp(one.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
            "metric": one.tags.get(METRIC_TAG, METRIC),
            "score": one.tags.get("univigu.score"),
            "dataset_digest": one.tags.get("univigu.dataset_digest"),
            "decision": one.tags.get("univigu.decision"),
        }
        for one in registry.versions(name, existing_store(root))
    ]


@app.command(epilog="Example: `univigu model promote candidate --why 'the new prompts'`")
def promote(
    version: Version,
    why: Why,
    force: Annotated[bool, typer.Option("--force", help="Promote even if it is refused.")] = False,
    name: Name = "uni-vigu",
    root: Root = Path("."),
    as_json: Json = False,
) -> None:
    """Make a version the champion if it is better on the same held-out items (see `compare`), or with `--force`.

    A version below the `least_scores` of its profile needs `--force` even if there is no champion. The old champion
    becomes `previous`. The history records the user of this machine, and whom UNIVIGU_ACTOR names.
    """
    from components.registry import promotion

    with activity("Comparing the versions"):
        line = promotion.promote(name, version, why, force=force, root=root)
    _show_entry(line, name, as_json)


@app.command()
def compare(version: Version, name: Name = "uni-vigu", root: Root = Path("."), as_json: Json = False) -> None:
    """Compare a version with the champion by a paired bootstrap over the same held-out items; this changes nothing."""
    from components.registry import promotion

    with activity("Comparing the versions"):
        comparison = promotion.compare(name, version, root=root)
    if as_json:
        print(json.dumps(asdict(comparison), indent=1))
    else:
        _show_comparison(comparison)


@app.command(epilog="Example: `univigu model rollback --why 'captions repeat themselves'`")
def rollback(why: Why, name: Name = "uni-vigu", root: Root = Path("."), as_json: Json = False) -> None:
    """Swap `champion` and `previous`: undo the last change of champion."""
    from components.registry import promotion

    with activity(READING):
        line = promotion.rollback(name, why, root=root)
    _show_entry(line, name, as_json)


Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Examine the lines instead: find those that were changed, forged, back-dated or removed."
    ),
]


@app.command()
def history(name: Name = "uni-vigu", root: Root = Path("."), as_json: Json = False, verify: Verify = False) -> None:
    """Show all decisions about the champion, newest first: who, when, why, including refusals and rollbacks.

    With --verify: UNIVIGU_LEDGER_PUBLIC_KEY names the key that lines are signed with, UNIVIGU_LEDGER_MIRROR their copy.
    """
    if verify:
        _verify_history(name, root, as_json)
        return
    from components.registry import promotion
    from components.tracking import tracking_uri
    from univigu import registry

    with activity(READING):
        lines = promotion.history(name, root=root)
        champion = registry.version_at(name, registry.CHAMPION, tracking_uri(root)) if lines else None
    if as_json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
        return
    if not lines:
        print(f"There is no decision about '{name}' yet.")
        return
    columns = ("when (UTC)", "who", "outcome", "from", "to", "why", "comparison")
    show_table(
        columns,
        [
            (
                _minute(line.when),
                line.who,
                line.outcome + (", forced" if line.forced else ""),
                str(line.replaced or "-"),
                str(line.version),
                line.why,
                line.reason,
            )
            for line in lines
        ],
    )
    recorded = next((line.version for line in lines if line.outcome in ("promoted", "rolled back")), None)
    holder = champion and int(champion.version)
    if holder != recorded:
        print(
            f"The champion is {f'version {holder}' if holder else 'unset'}, but this history ends with "
            f"{f'version {recorded}' if recorded else 'no champion'}: the alias was moved by other means."
        )


def _verify_history(name: str, root: Path, as_json: bool) -> None:
    from components.registry.ledger import verify_ledger
    from univigu.errors import CorruptDataError

    with activity(READING):
        found = verify_ledger(name, root)
    if as_json:
        print(json.dumps({**found._asdict(), "faults": [fault._asdict() for fault in found.faults]}, indent=1))
    else:
        older = f", and {found.older} older ones without a number" if found.older else ""
        print(f"{found.lines} lines{older}; {found.signed} signed, {found.mirrored} in the mirror")
        for fault in found.faults:
            print(f"  {fault.what}" + (f" (run {fault.run_id})" if fault.run_id else ""))
    if found.faults:
        raise CorruptDataError(
            f"The history of '{name}' is not what was written: {found.faults[0].what}; ask who can write to the "
            "registry's database, and restore it from a backup."
        )


@app.command()
def trace(
    version: Annotated[str, typer.Argument(help="A version number, or an alias.")] = "champion",
    name: Name = "uni-vigu",
    root: Root = Path("."),
    as_json: Json = False,
) -> None:
    """Trace a version back to its model, training runs, dataset and snapshot, prompts and their licences."""
    from components.registry.lineage import trace_version

    with activity(READING):
        found = trace_version(name, version, root)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show_trace(found)


@app.command(epilog="Example: `univigu model export champion my-model --precision fp16`")
def export(
    version: Version,
    folder: Annotated[Path, typer.Argument(help="The folder to create.")],
    precision: Annotated[Precision, typer.Option(help="Precision of the stored weights.")] = "fp32",
    name: Name = "uni-vigu",
    root: Root = Path("."),
) -> None:
    """Write a version's pipeline and its card to a folder, to be shared or used without the registry."""
    from components.registry.export import export_version

    with activity("Writing the pipeline"):
        size = export_version(name, version, folder, precision, root)
    print(f"{folder}: version {version} of '{name}' in {precision}, {size / 1e6:.1f} MB")


@app.command(epilog="Example: `univigu model pull champion served-model`")
def pull(
    version: Version,
    folder: Annotated[Path, typer.Argument(help="The folder to create.")],
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Also a version of which the history has no digest.")
    ] = False,
    name: Name = "uni-vigu",
    root: Root = Path("."),
) -> None:
    """Write a version as MLflow stores it to a folder, after comparing its files with the digest of its promotion.

    `mlflow.pyfunc.load_model(FOLDER)` then runs the code that was promoted.
    """
    from components.registry.export import pull_version

    with activity("Copying and verifying the version's files"):
        line = pull_version(name, version, folder, root, unverified)
    state = f"the files that {line.who} promoted on {_minute(line.when)} (UTC)" if line else "not verified"
    print(f"{folder}: {state}; load it with mlflow.pyfunc.load_model({str(folder)!r})")


@app.command(epilog="Example: `univigu model calibrate model/tiny-univigu`")
def calibrate(
    folder: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    clips: Annotated[
        Path | None,
        typer.Option(help="A folder of videos that the model was not trained on. (default: the built-in dataset's)"),
    ] = None,
    heldout: Annotated[Path, typer.Option(help="The built-in dataset's held-out items.")] = Path("data/heldout.json"),
    count: Annotated[int, typer.Option(min=2, help="The most clips to measure.")] = 256,
) -> None:
    """Measure a model on held-out clips, so that `univigu caption` warns of clips that are unlike them.

    Writes confidence.json into the model's folder: how sure the model is of its captions, and how well its latents
    reproduce the clips.
    """
    from components.cli.chosen_model import load
    from univigu.confidence import measure
    from univigu.confidence_reference import RARE, write_reference

    videos = _heldout_clips(clips, heldout, count)
    pipeline = load(folder)
    pipeline.progress_bar = iter  # the progress over clips is enough
    measured = []
    for frames in progress(videos, "calibrate", unit="clips"):
        (caption,) = pipeline.caption([frames], seed=[0])
        measured += measure(pipeline, [frames], [caption], [0])
    reference = write_reference(folder, measured)
    for name, least in reference.least.items():
        print(f"{name:<11} {reference.median[name]:.3f} in the median, at least {least:.3f} for {1 - RARE:.0%}")


def _heldout_clips(folder: Path | None, heldout: Path, count: int) -> "Sequence[np.ndarray]":
    """Frames (F, H, W, 3) of at most `count` clips: of a folder's videos, or of the built-in dataset."""
    if folder is None:
        from components.digits import benchmark

        return list(benchmark.render(benchmark.load_heldout(heldout)["captions"][:count]))
    from components.clips.import_files import list_videos
    from univigu.video import read_video

    return [read_video(folder / name)[0] for name in list_videos(folder)[0][:count]]


# --- output -----------------------------------------------------------------------------------------------------------


def _show_entry(line: "Entry", name: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(line), indent=1))
        return
    was = f", instead of version {line.replaced}" if line.replaced and line.outcome != "unchanged" else ""
    state = "is still" if line.outcome == "unchanged" else "is now"
    forced = ", by force" if line.forced else ""
    print(f"Version {line.version} of '{name}' {state} champion{was}{forced}: {line.reason}.")


def _show_comparison(comparison: "Comparison") -> None:
    if comparison.scores:
        rows = []
        for side, score in comparison.scores.items():
            number = {"challenger": comparison.challenger, "champion": comparison.champion}.get(side)
            sign = "+" if side == "difference" else ""
            rows.append(
                (
                    f"{side}, version {number}" if number else side,
                    f"{score['value']:{sign}.3f}",
                    f"{score['low']:{sign}.3f} to {score['high']:{sign}.3f}",
                    str(score["n"]),
                )
            )
        show_table((comparison.metric, "value", "95 % interval", "items"), rows)
    verdict = "is better" if comparison.better else "would not be promoted"
    print(f"Version {comparison.challenger} {verdict}: {comparison.reason}.")


def _show_trace(found: dict[str, Any]) -> None:
    from rich.text import Text
    from rich.tree import Tree

    def text(line: str) -> Text:
        return Text(printable(line), overflow="fold")

    model, dataset, prompts = found["model"], found["dataset"], found["prompts"]
    aliases = f" ({', '.join(model['aliases'])})" if model["aliases"] else ""
    tree = Tree(text(f"{model['name']} version {model['version']}{aliases}"))
    tree.add(text(f"model {model['digest']}"))
    tree.add(text(f"code {model['code'] or 'not from a git checkout'}"))
    runs = tree.add(text("training runs" if found["runs"] else "no known training run"))
    for run in found["runs"]:
        runs.add(text(f"{run['step']}: {run['id']} {run.get('began', '(not in this store)')} {run.get('status', '')}"))
    data = tree.add(text(f"dataset {dataset['digest']}"))
    data.add(text(f"{dataset['samples']} samples, of pairs {dataset['pairs_digest']}"))
    if dataset["snapshot"]:
        data.add(text(f"snapshot {dataset['snapshot']} at commit {dataset['commit'][:12]}"))
    else:
        data.add(text("no snapshot here (`univigu data snapshot` makes one)"))
    origin = tree.add(text(f"prompts {prompts['digest']}"))
    rejected = ", ".join(f"{reason} {count}" for reason, count in prompts["rejected"].items())
    origin.add(text(f"{prompts['kept']} of {prompts['raw']} kept" + (f"; rejected: {rejected}" if rejected else "")))
    for row in prompts["sources"]:
        origin.add(text(f"{row['count']} from {row['source']}, {row['licence']}"))
    for file, digest in prompts["files"].items():
        origin.add(text(f"{file} {digest}"))
    _console().print(tree)


def show_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; outside a terminal its lines don't wrap, for `grep`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    _console().print(table)


def _console() -> Any:
    """A console that doesn't wrap lines in a file or pipe, for `grep`."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=400)
    return console


def printable(text: str) -> str:
    """Untrusted text without control characters, which a terminal would interpret."""
    return "".join(character if character.isprintable() else " " for character in text)


def _minute(when: str) -> str:
    return when[:16].replace("T", " ")
