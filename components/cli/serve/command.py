"""`univigu serve`: a server for generation and captioning."""

from pathlib import Path
from typing import Annotated

import typer

from components.cli.chosen_model import NAME
from components.cli.generate import Model
from univigu.errors import BadInputError

PANEL = "Use a trained model"
TOKEN = "UNIVIGU_SERVE_TOKEN"


def serve(
    root: Annotated[Path, typer.Option(help="The work root, which has the registry and keeps the videos.")] = Path("."),
    model: Model = "",
    name: Annotated[str, typer.Option(help="The registered model whose champion is served.")] = NAME,
    host: Annotated[
        str,
        typer.Option(help="The address to serve on; any other than this machine's own (127.0.0.1) requires a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    batch: Annotated[
        int,
        typer.Option(min=1, max=256, help="Waiting requests that are sampled together; a smaller batch is filled up."),
    ] = 1,
    max_queue: Annotated[int, typer.Option(min=1, help="Waiting requests; the next one is refused (429).")] = 256,
    max_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a caption, with its wait, or for the sampling of a video.")
    ] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, max=2048, help="MiB of a request's body.")] = 64,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Pixels in all frames of a video that is sent here, before it is scaled.")
    ] = 2 * 10**9,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames of a generated video, of at most as many pixels as so many of the model's own. "
            "(default: the model's)",
            show_default=False,
        ),
    ] = None,
    keep_days: Annotated[float, typer.Option(min=0.001, help="Days after which a finished video is deleted.")] = 7.0,
    poll: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds between two queries of the registry for its champion."),
    ] = 30.0,
) -> None:
    """Serve videos (/v1/videos) and captions (/v1/chat/completions) in OpenAI's formats, until SIGTERM or Ctrl-C.

    Without --model, the registered champion is served, and a new champion takes over without a restart. It listens on
    this machine only. With another --host, every request needs the token in UNIVIGU_SERVE_TOKEN, or one that is made
    and printed.
    """
    if not root.is_dir():
        raise BadInputError(f"'{root}' is not a folder; give the work root with --root.")
    from components.cli.listening import choose_token
    from univigu.extras import import_extra

    for package in ("uvicorn", "starlette", "python_multipart"):
        import_extra(package)
    from components.cli.serve.limits import Limits
    from components.cli.serve.server import run

    limits = Limits(batch, max_queue, max_seconds, max_body << 20, max_pixels, max_frames, keep_days * 86400)
    run(model, name, root.resolve(), poll, limits, (host, port), choose_token(host, TOKEN))


def add_to(app: typer.Typer) -> None:
    """Make `serve` a command of `app`."""
    app.command(rich_help_panel=PANEL, epilog="Example: `univigu serve --port 8000 --batch 4`")(serve)
