"""Classifies the HTTP replies of a language model's service: an answer, a retryable failure, a refusal, or a fault."""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from components.captions.captioners.client.throttle import retry_after
from components.checks.wrapping.common import bracket_depth

MAX_BYTES = 4 * 2**20  # of one answer, compressed or not
MAX_DEPTH = 64  # of nested brackets
QUOTE = 200  # characters of a service's own message that we show
_TRANSIENT = {408, 425, 429}
_GATEWAY = {502, 503, 504, *range(520, 528), 529}  # about the service as a whole, not the request
_REFUSALS = {400, 403, 422, 451}
_WRONG_ADDRESS = {301, 302, 303, 307, 308, 404, 405}
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance", "credit_balance_too_low")
_BLOCKED = ("content_filter", "content_policy_violation", "data_inspection_failed", "moderation", "responsibleai")
_PASSING = re.compile(
    r"overload|unavailable|try again|retry your|temporar|capacity|busy|time[d -]*out|upstream|gateway|rate limit"
    r"|restart|loading|starting|warming|no healthy|connection",
    re.IGNORECASE,
)
_MAY_QUOTE_KEY = re.compile(r"key|token|credential|bearer|auth", re.IGNORECASE)


class Retryable(Exception):  # noqa: N818 (not an error yet: there may be another try)
    """A try without an answer; the next one may bring one.

    delay: the seconds that the service asks to wait. permanent: whether the message is about this request, so that the
    same message again is final. billed: whether the service may have done, and charge for, the work.
    """

    def __init__(
        self, kind: str, detail: str, delay: float | None = None, permanent: bool = False, billed: bool = False
    ) -> None:
        super().__init__(detail)
        self.kind, self.delay, self.billed = kind, delay, billed
        # without numbers and ids, which differ between requests
        self.signature = re.sub(r"\w*\d\w*", "#", detail) if permanent else ""


class Refused(Exception):  # noqa: N818 (the outcome of a row, as data)
    """No answer for this request, and a retry won't help. isolated: other requests are known to be answered."""

    def __init__(self, status: str, reason: str, detail: str, isolated: bool = False) -> None:
        super().__init__(detail)
        self.status, self.reason, self.isolated = status, reason, isolated


class Unusable(Exception):  # noqa: N818 (the endpoint makes the error of it)
    """No request will be answered until the user corrects the `key`, the `credit`, or the `model` (or the address).

    It may also concern this request only; a single reply doesn't tell.
    """

    def __init__(self, what: str, detail: str, status: int) -> None:
        super().__init__(detail)
        self.what, self.status = what, status


def decode_reply(content: bytes, encoding: str) -> str:
    """The text of a body with this Content-Encoding header; raises `Refused` if it is too large."""
    if encoding.strip().casefold() in ("gzip", "x-gzip", "deflate"):
        try:
            content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, MAX_BYTES + 1)
        except zlib.error as error:
            raise Retryable("broken answer", f"an answer whose compression is broken ({error})", billed=True) from error
    check_size(content)
    return content.decode("utf-8", "replace")


def check_size(content: bytes | bytearray) -> None:
    """Raise `Refused` if a body is too large."""
    if len(content) > MAX_BYTES:
        raise Refused("error", "too_large", f"the answer has more than {MAX_BYTES} bytes")


def read_reply(status: int, headers: Mapping[str, str], text: str) -> Any:
    """The answer in a reply (decoded JSON with `choices`); otherwise raises `Retryable`, `Refused` or `Unusable`.

    text: the reply's body, without the key.
    """
    body = _read_json(text)
    fault = body.get("error") if isinstance(body, dict) else None
    if 200 <= status < 300 and not fault:
        return _check_answer(body, status)
    if 200 <= status < 300:  # some gateways report a model's failure with status 200
        code = fault.get("code") if isinstance(fault, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    words, lowered = clean(_message(body) or text), text.lower()
    named = f"HTTP {status}: {words}" if words else f"HTTP {status}"
    if status == 402 or any(code in lowered for code in _NO_CREDIT):
        raise Unusable("credit", named, status)
    if status in _TRANSIENT or status >= 500:
        delay = retry_after(headers) if status in (429, 503, 529) else None
        raise Retryable(str(status), named, delay, permanent=_is_permanent(status, words))
    if status in _REFUSALS and any(code in lowered for code in _BLOCKED):
        raise Refused("blocked", "blocked", named)
    if status in (401, 403):
        hidden = status == 401 or _MAY_QUOTE_KEY.search(words)  # the message may quote a part of the key
        raise Unusable("key", f"HTTP {status}" if hidden else named, status)
    if status in _WRONG_ADDRESS:
        raise Unusable("model", named, status)
    raise Refused("error", "refused_request", named)


def clean(text: str, secret: str = "") -> str:
    """A service's own message as one short line, without the secret."""
    text = text.replace(secret, "[key]") if secret else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * QUOTE]).split())
    return text if len(text) <= QUOTE else text[:QUOTE] + "…"


def _read_json(text: str) -> Any:
    """The decoded JSON, or None if it is invalid or nested too deeply."""
    try:
        return json.loads(text) if bracket_depth(text) <= MAX_DEPTH else None
    except (ValueError, RecursionError):
        return None


def _check_answer(body: Any, status: int) -> Any:
    if body is None:
        detail = f"HTTP {status} with an answer that breaks off, or is no JSON"
        raise Retryable("broken answer", detail, billed=True)
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        detail = f"HTTP {status} with an answer that holds no choices"
        raise Retryable("no choices", detail, permanent=True, billed=True)
    return body


def _is_permanent(status: int, words: str) -> bool:
    """Whether a failure's message is about this request, and not about the service as a whole."""
    if status < 500 or _PASSING.search(words):
        return False
    return status not in _GATEWAY or (bool(words) and not words.startswith("<"))


def _message(body: Any) -> str:
    """The message in an error's body, in any of the shapes that services use."""
    found = body.get("error", body) if isinstance(body, dict) else body
    for key in ("message", "detail", "error", "type", "code"):
        if isinstance(found, dict) and isinstance(found.get(key), str) and found[key].strip():
            return found[key]
    return found if isinstance(found, str) else ""
