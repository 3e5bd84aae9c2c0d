"""Who may talk to a server of ours: a check of each request before any page sees it, and the headers of each answer.

A page of another site that is open in the same browser can send requests to this machine. Such a request has another
`Origin`, or, after a trick with name servers, another `Host`; both are refused. The content security policy lets a
page load nothing from elsewhere, whatever a library would like to. A body that says it is too large isn't read.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from components.cli.listening import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

LARGEST_UPLOAD_MB = 256
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    # Gradio has inline scripts and styles, and compiles the templates of its components.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Uni-ViGU studio</title><style>:root{color-scheme:light dark}body{font:16px system-ui;margin:3em auto;
max-width:24em;padding:0 1em}</style><h1>Uni-ViGU studio</h1><form method="get" action="/"><p>This studio needs the
token that <code>univigu studio</code> printed where it was started.</p><label>Token <input name="token"
type="password" autocomplete="off" autofocus></label> <button>Open</button></form></html>"""


class Guard:
    """ASGI middleware around the whole application.

    token: what every request has to know, in a cookie, as `Authorization: Bearer`, or once as `?token=`; "" for none.
    port: makes the cookie's name, because the ports of one host share their cookies. local: refuse other names of this
    host than its loopback ones.
    """

    largest_body = (LARGEST_UPLOAD_MB + 1) << 20  # bytes: a file and the form around it

    def __init__(self, app: Any, token: str, port: int, local: bool) -> None:
        self.app, self.token, self.cookie, self.local = app, token, f"univigu_studio_{port}", local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._refuse(Request(scope))
            await (refusal or self.app)(scope, receive, _with_headers(send))

    def _refuse(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return self._say(421, "This server answers only under its machine's own address; use 127.0.0.1.")
        if request.method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != host:
            return self._say(403, "This server takes no orders from the pages of another site; use its own pages.")
        refusal = self._refuse_stranger(request) if self.token else None
        if refusal is None and _length(request) > self.largest_body:
            return self._say(413, f"A file has at most {LARGEST_UPLOAD_MB} MB here; cut the video into shorter ones.")
        return refusal

    def _say(self, status: int, sentence: str) -> Response:
        return PlainTextResponse(f"{sentence}\n", status)

    def _refuse_stranger(self, request: Request) -> Response | None:
        if self._knows(request.cookies.get(self.cookie, "")) or self._bears_token(request):
            return None
        if request.method == "GET" and self._knows(request.query_params.get("token", "")):
            rest = [(key, value) for key, value in request.query_params.multi_items() if key != "token"]
            place = request.url.path.replace("//", "/")  # a path with two slashes would lead to another host
            response = RedirectResponse(f"{place}?{urlencode(rest)}" if rest else place, 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        return HTMLResponse(_FORM, 401)

    def _bears_token(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        return scheme == "Bearer" and self._knows(bearer)

    def _knows(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _length(request: Request) -> int:
    """The bytes of a request's body, as it says; Gradio counts those of one that doesn't say."""
    said = request.headers.get("content-length", "")
    return int(said) if said.isdecimal() and len(said) < 20 else 0


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with_headers
