"""Who may talk to the studio: a check of each request before any page sees it, and the headers of each answer.

A page of another site that is open in the same browser can send requests to this machine. Such a request has another
`Origin`, or, after a trick with name servers, another `Host`; both are refused. The content security policy lets a
page load nothing from elsewhere, whatever a library would like to.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOCAL_NAMES = ("localhost",)
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


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


class Guard:
    """ASGI middleware around the whole application.

    token: what every request has to know, in a cookie, as `Authorization: Bearer`, or once as `?token=`; "" for none.
    port: makes the cookie's name, because the ports of one host share their cookies. local: refuse other names of this
    host than its loopback ones.
    """

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
            return PlainTextResponse("The studio answers only under this machine's own address.\n", 421)
        if request.method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("The studio takes no orders from the pages of another site.\n", 403)
        return self._refuse_stranger(request) if self.token else None

    def _refuse_stranger(self, request: Request) -> Response | None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if self._knows(request.cookies.get(self.cookie, "")) or (scheme == "Bearer" and self._knows(bearer)):
            return None
        if request.method == "GET" and self._knows(request.query_params.get("token", "")):
            rest = [(key, value) for key, value in request.query_params.multi_items() if key != "token"]
            place = request.url.path.replace("//", "/")  # a path with two slashes would lead to another host
            response = RedirectResponse(f"{place}?{urlencode(rest)}" if rest else place, 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        return HTMLResponse(_FORM, 401)

    def _knows(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with_headers
