"""Who may talk to the server, and how much of a body is read."""

import asyncio
import sys
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from components.cli.serve.errors import ApiError
from components.cli.serve.limits import Memory
from components.cli.studio.guard import Guard, Receive, Scope, Send

LINGER_S = 2.0  # seconds for which the rest of a refused body is read
HEALTH = "/health"  # needs no token: an orchestrator's probe has none


class ApiGuard(Guard):
    """The studio's guard for programs: the token comes in a header alone, and answers are in OpenAI's format."""

    largest_body = sys.maxsize  # `Bodies` counts them, also of those that don't say their length

    def _say(self, status: int, sentence: str) -> Response:
        return ApiError(status, sentence).response()

    def _refuse_stranger(self, request: Request) -> Response | None:
        if request.url.path == HEALTH or self._bears_token(request):
            return None
        sentence = "The token is missing or wrong; send the one that `univigu serve` printed, as an API key."
        return ApiError(401, sentence, code="invalid_api_key").response()


class Bodies:
    """ASGI middleware that keeps no more than `limit` bytes of a body, and counts those of all unfinished requests.

    A client that is still sending when the connection is closed can lose the answer (RFC 9112, 9.6), so after a refusal
    what it sends is thrown away for `LINGER_S` seconds.
    """

    def __init__(self, app: Any, limit: int, memory: Memory) -> None:
        self.app, self.limit, self.memory = app, limit, memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.limit:
            await self._too_large().response()(scope, receive, _before_the_rest(receive, send))
            return
        held, answer = 0, send

        async def receive_counted() -> Any:
            nonlocal held, answer
            message = await receive()
            count = len(message.get("body", b""))
            try:
                if held + count > self.limit:
                    raise self._too_large()
                self.memory.take(count)
            except ApiError:
                answer = _before_the_rest(receive, send)
                raise
            held += count
            return message

        try:
            await self.app(scope, receive_counted, lambda message: answer(message))
        finally:
            self.memory.give_back(held)

    def _too_large(self) -> ApiError:
        sentence = f"The body has more than {self.limit >> 20} MiB; send a shorter or smaller video."
        return ApiError(413, sentence, code="body_too_large")


def _before_the_rest(receive: Receive, send: Send) -> Send:
    """A `send` that throws the rest of the request's body away between the answer and the end of the connection."""

    async def send_first(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(_discard(receive), LINGER_S)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return send_first


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass
