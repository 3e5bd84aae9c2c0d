"""The server of the studio: its address and token, the videos that pages show, and Gradio's application."""

import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli.listening import address_of, is_loopback, listen
from components.cli.messages import is_verbose, say
from components.cli.studio.guard import LARGEST_UPLOAD_MB, Guard
from univigu.errors import ConfigError, MissingInputError, UniViGUError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from components.cli.studio.work import Studio

_QUIET = {  # Gradio calls home for statistics, new versions and example files
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def serve(root: Path, name: str, host: str, port: int, token: str, profile: str | None = None) -> None:
    """Serve the studio until SIGINT or SIGTERM; prints its address once it listens. profile: see `Studio`."""
    os.environ.update(_QUIET)
    _require_gradio()
    import uvicorn

    from components.cli.studio.work import Studio

    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="univigu-studio-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(cache) / "uploads")
        port = listening.getsockname()[1]
        app = Guard(make_app(Studio(root, name, Path(cache), profile)), token, port, is_loopback(host))
        print(f"{address_of(host, port)}/{f'?token={token}' if token else ''}", flush=True)
        say("Press Ctrl-C to stop.")
        level = "info" if is_verbose() else "error"
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary files are removed
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=2)).run([listening])


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError(
            "The package 'gradio' is missing; install the extra `studio`: `pip install 'uni-vigu[studio]'`."
        ) from error


def make_app(studio: "Studio") -> "FastAPI":
    """Gradio's pages, and the videos that they show under ``/video``."""
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, Response

    from components.cli.studio import app as pages
    from components.cli.studio import gallery
    from components.cli.studio.videos import find_video

    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @server.get("/video/{kind}/{name:path}")
    def video(kind: str, name: str, save: str | None = None) -> Response:
        try:
            path, saved_as = gallery.export(studio, name) if kind == "made" else (find_video(studio, kind, name), "")
        except MissingInputError as error:
            return PlainTextResponse(f"{error}\n", 404)
        except UniViGUError as error:
            return PlainTextResponse(f"{error}\n", 409)
        headers = {"cache-control": "private, max-age=3600"}
        return FileResponse(path, headers=headers, filename=saved_as if save is not None else None)

    return gradio.mount_gradio_app(
        server,
        pages.build(studio),
        "/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=f"{LARGEST_UPLOAD_MB}mb",
        theme=pages.theme(),
        css_paths=[pages.STYLE],
        head=pages.script(),
    )
