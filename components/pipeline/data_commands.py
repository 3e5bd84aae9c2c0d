"""`univigu data`: versions of the dataset, each a git tag that DVC can bring back; and where its latents lie."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The dataset: tag the one that lies here, list those there are, move its latents to a store.")

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


@app.command(epilog="Example: `univigu data offload s3://bucket/latents --remove`")
def offload(
    url: Annotated[str, typer.Argument(help="Where to: s3://, gs://, az://, or a folder; keys are the environment's.")],
    remove: Annotated[bool, typer.Option("--remove", help="Free the disk: training fetches what it needs.")] = False,
    root: Root = Path("."),
) -> None:
    """Put the shards of latents into an object store, from which training streams them.

    Everything else of the output stays here, with the hashes that each fetched shard is verified against.
    """
    from components.pipeline.runner import verify
    from components.pipeline.stages import find_stage
    from univigu.training.shards import put_shards

    stage = find_stage("encode-latents")
    folder = root.resolve() / stage.home
    shards = [name for name in verify(folder, stage.name)["files"] if name.startswith("shards/")]
    shards = [name for name in shards if name.endswith("latents.safetensors")]
    size = put_shards(folder, shards, url)
    if remove:
        for name in shards:
            (folder / name).unlink()
    kept = "; they are no longer here" if remove else ""
    print(f"{len(shards)} shards, {size / 1e9:.3g} GB, lie at {url}{kept}.")


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
