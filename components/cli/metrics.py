"""`univigu metrics`: Prometheus metrics of a work root, printed, written as a textfile, or served."""

import time
from pathlib import Path
from typing import Annotated

import typer

from univigu.errors import BadInputError, ConfigError

PANEL = "Watch it"


def metrics(
    root: Annotated[Path, typer.Option(help="The work root.")] = Path("."),
    textfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.prom",
            help="Write this file, for node_exporter's textfile collector, instead of printing.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Serve http://HOST:PORT/metrics instead of printing; 0: don't.")
    ] = 0,
    host: Annotated[str, typer.Option(help="The address to serve on; 0.0.0.0 for all.")] = "127.0.0.1",
    every: Annotated[
        float, typer.Option(min=0, help="Write the textfile again after this many seconds; 0: write it once.")
    ] = 0.0,
) -> None:
    """Print Prometheus metrics of the runs in a work root, write them as a textfile, or serve them."""
    from prometheus_client import generate_latest, start_http_server, write_to_textfile

    from components.orchestration.metrics import registry

    if textfile and port:
        raise ConfigError("--textfile and --port contradict each other; give one of them.")
    if not root.is_dir():
        raise BadInputError(f"'{root}' is not a folder; give the work root with --root.")
    found = registry(root.resolve())
    if port:
        _, thread = start_http_server(port, host, found)
        print(f"http://{host}:{port}/metrics", flush=True)
        thread.join()
    elif textfile is None:
        print(generate_latest(found).decode(), end="")
    else:
        if textfile.suffix != ".prom" or not textfile.parent.is_dir():
            raise BadInputError(
                f"'{textfile}' can't be written; give a name that ends with .prom, as node_exporter requires, in an "
                "existing folder."
            )
        write_to_textfile(str(textfile), found)
        while every:
            time.sleep(every)
            write_to_textfile(str(textfile), found)


def add_to(app: typer.Typer) -> None:
    """Make `metrics` a command of `app`."""
    app.command(rich_help_panel=PANEL)(metrics)
