"""The routes of the server, and what all of them share."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from components.cli.serve import chat, videos
from components.cli.serve.errors import CLIENT_GONE, ApiError, as_api_error
from components.cli.serve.guard import HEALTH, Bodies
from components.cli.serve.metrics import Metrics
from univigu.errors import UniViGUError

if TYPE_CHECKING:
    from components.cli.serve.jobs import Jobs
    from components.cli.serve.limits import Limits, Memory
    from components.cli.serve.line import Entry, Line
    from components.cli.serve.models import Models, Served


DECODED_AT_ONCE = 2  # videos: each may need many large frames at a time


@dataclass(frozen=True)
class Service:
    """What requests are answered with."""

    root: Path
    models: "Models"
    line: "Line"
    jobs: "Jobs"
    limits: "Limits"
    memory: "Memory"
    metrics: Metrics
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODED_AT_ONCE))

    def find_model(self, name: str | None) -> "Served":
        """The model for a new request; raises `ApiError` (404) if it asks for another one."""
        if name is not None and name != self.models.name:
            sentence = f"There is no model '{name[:80]}' here; use '{self.models.name}', or leave it out."
            raise ApiError(404, sentence, "model", "model_not_found")
        return self.models.require()

    def give_up(self, entry: "Entry") -> None:
        """Nobody waits for this request any more."""
        if self.line.remove(entry):
            self.metrics.results.labels(entry.kind, "abandoned").inc()


def make_app(service: Service) -> Any:
    """The ASGI application, without the guard."""
    app = Starlette(
        routes=[
            Route(HEALTH, health),
            Route("/metrics", metrics),
            Route("/v1/models", list_models),
            Route("/v1/models/{model_id:path}", retrieve_model),
            Route("/v1/chat/completions", chat.chat, methods=["POST"]),
            Route("/v1/videos", videos.create_video, methods=["POST"]),
            Route("/v1/videos", videos.list_videos),
            Route("/v1/videos/{video_id}", videos.retrieve_video),
            Route("/v1/videos/{video_id}", videos.delete_video, methods=["DELETE"]),
            Route("/v1/videos/{video_id}/content", videos.download_video),
        ],
        exception_handlers={
            HTTPException: _refuse,
            ClientDisconnect: _forget,
            UniViGUError: _fail,
            OSError: _fail,
            Exception: _fail,
        },
    )
    app.state.service = service
    return Bodies(app, service.limits.body, service.memory)


async def health(request: Request) -> Response:
    """``GET /health``: 200 once requests are answered, before that 503."""
    service: Service = request.app.state.service
    model = service.models.current
    state = {"status": "ok", "model": model.label} if model else {"status": "loading", "model": None}
    return JSONResponse({**state, "waiting": len(service.line)}, 200 if model else 503)


async def metrics(request: Request) -> Response:
    """``GET /metrics``: Prometheus' text format."""
    service: Service = request.app.state.service
    service.metrics.waiting.set(len(service.line))
    service.metrics.held_bytes.set(service.memory.held)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def list_models(request: Request) -> Response:
    """``GET /v1/models``."""
    return JSONResponse({"object": "list", "data": [_describe(request.app.state.service)]})


async def retrieve_model(request: Request) -> Response:
    """``GET /v1/models/{model_id}``."""
    service: Service = request.app.state.service
    service.find_model(request.path_params["model_id"])
    return JSONResponse(_describe(service))


def _describe(service: Service) -> dict[str, Any]:
    model = service.models.require()
    facts = {"id": service.models.name, "object": "model", "created": int(model.loaded), "owned_by": "uni-vigu"}
    return {**facts, "version": model.label}


async def _refuse(request: Request, error: Exception) -> Response:
    """The answer to what Starlette itself refuses: unknown paths, other methods, and forms that can't be read."""
    assert isinstance(error, HTTPException)
    detail = error.detail.rstrip(".")
    sentence = {
        404: f"There is nothing at {request.url.path[:200]}; see /v1/videos, /v1/chat/completions and /v1/models.",
        405: f"{request.method} is not a method of {request.url.path[:200]}; use another one.",
    }.get(error.status_code, f"The request can't be read ({detail}); correct it.")
    return ApiError(error.status_code, sentence).response()


async def _forget(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _fail(request: Request, error: Exception) -> Response:
    return as_api_error(error, request.app.state.service.root).response()
