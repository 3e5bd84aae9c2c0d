"""What an HTTP reply of a language model's service means: an answer, another try, a refusal, or the end."""

import json
from collections.abc import Mapping
from typing import Any

from components.captioners.client.throttle import retry_after

QUOTE = 200  # characters of a service's own words in a message
_TRANSIENT = {408, 425, 429}
_REFUSALS = {400, 403, 422, 451}
_ELSEWHERE = {301, 302, 307, 308, 404, 405}
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance", "credit_balance_too_low")
_BLOCKED = ("content_filter", "content_policy_violation", "data_inspection_failed", "moderation", "responsibleai")


class Lost(Exception):  # noqa: N818 (no error yet: there may be another try)
    """A try that brought no answer, and may the next time; `delay` is what the service asks to wait, in seconds."""

    def __init__(self, kind: str, detail: str, delay: float | None = None) -> None:
        super().__init__(detail)
        self.kind, self.delay = kind, delay


class Refused(Exception):  # noqa: N818 (a row's fate, told as data)
    """No answer for this request, and trying again won't help."""

    def __init__(self, status: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.reason = status, reason


class Unusable(Exception):  # noqa: N818 (the endpoint has the words for it)
    """No request will be answered until a person has mended the `key`, the `credit`, or the `model` or address."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(detail)
        self.what = what


def read_reply(status: int, headers: Mapping[str, str], text: str) -> Any:
    """The answer in a reply (decoded JSON with `choices`); raises `Lost`, `Refused` or `Unusable` for anything else.

    text: the reply's body, without the key.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    fault = body.get("error") if isinstance(body, dict) else None
    if status == 200 and not fault:
        if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
            raise Lost("broken answer", "HTTP 200 with an answer that breaks off, or holds no choices")
        return body
    if status == 200:  # some gateways pass a model's failure on like this
        code = fault.get("code") if isinstance(fault, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    words, lowered = clean(_words(body) or text), text.lower()
    named = f"HTTP {status}: {words}" if words else f"HTTP {status}"
    if status == 402 or any(code in lowered for code in _NO_CREDIT):
        raise Unusable("credit", named)
    if status in _TRANSIENT or status >= 500:
        raise Lost(str(status), named, retry_after(headers) if status in (429, 503, 529) else None)
    if status in _REFUSALS and any(code in lowered for code in _BLOCKED):
        raise Refused("blocked", "blocked", named)
    if status in (401, 403):
        raise Unusable("key", f"HTTP {status}")  # its words may quote a part of the key
    if status in _ELSEWHERE:
        raise Unusable("model", named)
    raise Refused("error", "refused_request", named)


def clean(text: str, secret: str = "") -> str:
    """A service's own words for a message: one short line, without the secret."""
    text = text.replace(secret, "[key]") if secret else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= QUOTE else text[:QUOTE] + "…"


def _words(body: Any) -> str:
    """The message in a body of an error, in the shapes that services use."""
    found = body.get("error", body) if isinstance(body, dict) else body
    for key in ("message", "detail", "error"):
        if isinstance(found, dict) and isinstance(found.get(key), str):
            return found[key]
    return found if isinstance(found, str) else ""
