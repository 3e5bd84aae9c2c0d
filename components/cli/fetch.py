"""`univigu fetch`: download pretrained weights from the hub."""

import os
from pathlib import Path
from typing import Annotated

import typer

from components.cli.messages import is_quiet, say
from components.cli.options import Profile, Settings, profile_in_use

Repository = Annotated[
    str,
    typer.Argument(
        metavar="[OWNER/NAME]",
        help="A hub repository in diffusers' layout. (default: what is missing of the profile's base and generator)",
        show_default=False,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("--to", metavar="FOLDER", help="Where to put it. (default: model/NAME)", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="A branch, a tag or a commit. (default: main)", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Make `fetch` a command of `app`."""
    app.command()(fetch)


def fetch(
    repository: Repository = "",
    to: Folder = None,
    revision: Revision = None,
    profile: Profile = None,
    settings: Settings = None,
    root: Annotated[Path, typer.Option(help="The work root, which the folder must be in.")] = Path("."),
) -> None:
    """Download pretrained weights from the hub: safetensors, configurations, tokenizers and the README; no code.

    Run it again to resume a download. HF_TOKEN gives access to gated repositories, and HF_ENDPOINT names a mirror.
    """
    from components.pipeline.manifests import inside
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.weights import fetch as download
    from components.pipeline.weights import missing_weights
    from univigu.errors import ConfigError

    if repository:
        wanted = {inside(root, to or Path("model") / Path(repository).name): repository}
    elif to or revision:
        raise ConfigError("--to and --revision need a repository; name one, such as OWNER/NAME.")
    else:
        wanted = missing_weights(load_profile(with_settings(profile_in_use(profile, root), settings or [])), root)
        if not wanted:
            say("Nothing is missing.")
    os.environ["HF_HUB_OFFLINE"] = "0"  # for this command, which was asked for a download
    if not is_quiet():
        os.environ.pop("TQDM_DISABLE", None)
    for folder, source in wanted.items():
        say(f"Fetching {source} into {folder}.")
        print(download(source, folder, revision))
