"""Who may talk to the server, and how much of a body is read."""

from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from components.cli.serve.errors import ApiError
from components.cli.serve.limits import Memory
from components.cli.studio.guard import Guard, Receive, Scope, Send

HEALTH = "/health"  # needs no token: an orchestrator's probe has none


class ApiGuard(Guard):
    """The studio's guard for programs: the token comes in a header alone, and answers are in OpenAI's format."""

    def _say(self, status: int, sentence: str) -> Response:
        return ApiError(status, sentence).response()

    def _refuse_stranger(self, request: Request) -> Response | None:
        if request.url.path == HEALTH or self._bears_token(request):
            return None
        sentence = "The token is missing or wrong; send the one that `univigu serve` printed, as an API key."
        return ApiError(401, sentence, code="invalid_api_key").response()


class Bodies:
    """ASGI middleware that reads no more than `limit` bytes of a body, and counts those of all unfinished requests."""

    def __init__(self, app: Any, limit: int, memory: Memory) -> None:
        self.app, self.limit, self.memory = app, limit, memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.limit:
            await self._too_large().response()(scope, receive, send)
            return
        held = 0

        async def receive_counted() -> Any:
            nonlocal held
            message = await receive()
            count = len(message.get("body", b""))
            if held + count > self.limit:
                raise self._too_large()
            self.memory.take(count)
            held += count
            return message

        try:
            await self.app(scope, receive_counted, send)
        finally:
            self.memory.give_back(held)

    def _too_large(self) -> ApiError:
        sentence = f"The body has more than {self.limit >> 20} MiB; send a shorter or smaller video."
        return ApiError(413, sentence, code="body_too_large")
