"""`univigu data`: versions of the dataset, each a git tag that DVC can bring back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Versions of the dataset: tag the one that lies here, list those there are.")

Root = Annotated[Path, typer.Option(help="The work root: a git and DVC repository.")]
Json = Annotated[bool, typer.Option("--json", help="For machines: JSON on standard output.")]


@app.command(epilog="Example: `univigu data snapshot --push`")
def snapshot(
    version: Annotated[str, typer.Argument(help="Such as v1.2.0. (default: the next minor version)")] = "",
    push: Annotated[bool, typer.Option("--push", help="Send the data to the default DVC remote, too.")] = False,
    root: Root = Path("."),
    as_json: Json = False,
) -> None:
    """Tag the dataset that `dvc repro` left here: curated prompts, clips, captions, pairs and latents.

    The tag is `dataset@VERSION`, at the commit that holds dvc.lock. The same dataset is tagged once.
    """
    from components import snapshots

    found, new = snapshots.take_snapshot(root, version)
    if push:
        snapshots.push_data(root)
    if as_json:
        print(json.dumps({**asdict(found), "new": new, "pushed": push}, indent=1))
        return
    if new:
        print(f"{found.tag}: {found.facts['Pairs']} pairs, dataset {found.digest}, commit {found.commit[:12]}")
        print(f"Share the tag with `git push origin {found.tag}`" + ("." if push else ", and the data with --push."))
    else:
        print(f"This dataset is {found.tag} already, tagged on {found.when[:10]}; no other tag was made.")
    if push:
        print("Its data are in the DVC remote.")


@app.command("list")
def list_datasets(root: Root = Path("."), as_json: Json = False) -> None:
    """List the tagged datasets, the newest version first."""
    from components import snapshots

    found = snapshots.list_snapshots(root)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    if not found:
        print("No dataset is tagged here yet; `univigu data snapshot` tags the one that `dvc repro` left.")
    for one in found:
        counts = f"{one.facts.get('Prompts', '?'):>7} prompts {one.facts.get('Pairs', '?'):>7} pairs"
        print(f"{one.tag:<16} {one.when[:10]} {counts}  {one.digest[:12]}  {one.commit[:12]}")
