"""`univigu studio`: a local web application for models, runs, data and results."""

from pathlib import Path
from typing import Annotated

import typer

from components.cli.options import Profile
from univigu.errors import BadInputError

PANEL = "Watch it"
TOKEN = "UNIVIGU_STUDIO_TOKEN"


def studio(
    root: Annotated[Path, typer.Option(help="The work root, whose models, runs and data are shown.")] = Path("."),
    name: Annotated[str, typer.Option(help="The registered model that is shown first, and whose champion is used.")] = (
        "uni-vigu"
    ),
    host: Annotated[
        str,
        typer.Option(help="The address to serve on; any other than this machine's own (127.0.0.1) requires a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 7860,
    profile: Profile = None,
) -> None:
    """Serve a web application for models, runs, clips and new results, until Ctrl-C.

    It listens on this machine only. With another --host, every request needs the token in UNIVIGU_STUDIO_TOKEN, or one
    that is made and printed. Nothing is fetched from anywhere else. Edits of clips are checked with the profile.
    """
    if not root.is_dir():
        raise BadInputError(f"'{root}' is not a folder; give the work root with --root.")
    from components.cli.listening import choose_token
    from components.cli.studio.server import serve

    serve(root.resolve(), name, host, port, choose_token(host, TOKEN), profile)


def add_to(app: typer.Typer) -> None:
    """Make `studio` a command of `app`."""
    app.command(rich_help_panel=PANEL, epilog="Example: `univigu studio --root . --port 7860`")(studio)
