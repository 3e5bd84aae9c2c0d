"""What an HTTP reply of a language model's service means: an answer, another try, a refusal, or the end."""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from components.captions.captioners.client.throttle import retry_after
from components.checks.wrapping.common import bracket_depth

MAX_BYTES = 4 * 2**20  # of one answer, compressed or not
MAX_DEPTH = 64  # of brackets in brackets
QUOTE = 200  # characters of a service's own words in a message
_TRANSIENT = {408, 425, 429}
_GATEWAY = {502, 503, 504, *range(520, 528), 529}  # which a service says of itself, whatever the request
_REFUSALS = {400, 403, 422, 451}
_ELSEWHERE = {301, 302, 303, 307, 308, 404, 405}
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance", "credit_balance_too_low")
_BLOCKED = ("content_filter", "content_policy_violation", "data_inspection_failed", "moderation", "responsibleai")
_PASSING = re.compile(
    r"overload|unavailable|try again|retry your|temporar|capacity|busy|time[d -]*out|upstream|gateway|rate limit"
    r"|restart|loading|starting|warming|no healthy|connection",
    re.IGNORECASE,
)
_SECRETIVE = re.compile(r"key|token|credential|bearer|auth", re.IGNORECASE)


class Lost(Exception):  # noqa: N818 (no error yet: there may be another try)
    """A try that brought no answer, and may the next time.

    delay: what the service asks to wait, in seconds. lasting: whether these words are about the request, so that the
    same ones again settle it. billed: whether the service may have done the work.
    """

    def __init__(
        self, kind: str, detail: str, delay: float | None = None, lasting: bool = False, billed: bool = False
    ) -> None:
        super().__init__(detail)
        self.kind, self.delay, self.billed = kind, delay, billed
        self.gist = re.sub(r"\w*\d\w*", "#", detail) if lasting else ""  # without the ids of requests


class Refused(Exception):  # noqa: N818 (a row's fate, told as data)
    """No answer for this request, and trying again won't help. alone: others are known to be answered."""

    def __init__(self, status: str, reason: str, detail: str, alone: bool = False) -> None:
        super().__init__(detail)
        self.status, self.reason, self.alone = status, reason, alone


class Unusable(Exception):  # noqa: N818 (the endpoint has the words for it)
    """No request will be answered until a person has corrected the `key`, the `credit`, or the `model` or address.

    Unless it is about this request only, which a single reply doesn't tell.
    """

    def __init__(self, what: str, detail: str, status: int) -> None:
        super().__init__(detail)
        self.what, self.status = what, status


def decode_reply(content: bytes, encoding: str) -> str:
    """The text of a body that came with the header Content-Encoding; raises `Refused` where it is too large."""
    if encoding.strip().casefold() in ("gzip", "x-gzip", "deflate"):
        try:
            content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, MAX_BYTES + 1)
        except zlib.error as error:
            raise Lost("broken answer", f"an answer whose compression is broken ({error})", billed=True) from error
    check_size(content)
    return content.decode("utf-8", "replace")


def check_size(content: bytes | bytearray) -> None:
    """Raise `Refused` for a body that has become too large."""
    if len(content) > MAX_BYTES:
        raise Refused("error", "too_large", f"the answer has more than {MAX_BYTES} bytes")


def read_reply(status: int, headers: Mapping[str, str], text: str) -> Any:
    """The answer in a reply (decoded JSON with `choices`); raises `Lost`, `Refused` or `Unusable` for anything else.

    text: the reply's body, without the key.
    """
    body = _read_json(text)
    fault = body.get("error") if isinstance(body, dict) else None
    if 200 <= status < 300 and not fault:
        return _check_answer(body, status)
    if 200 <= status < 300:  # some gateways pass a model's failure on like this
        code = fault.get("code") if isinstance(fault, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    words, lowered = clean(_words(body) or text), text.lower()
    named = f"HTTP {status}: {words}" if words else f"HTTP {status}"
    if status == 402 or any(code in lowered for code in _NO_CREDIT):
        raise Unusable("credit", named, status)
    if status in _TRANSIENT or status >= 500:
        delay = retry_after(headers) if status in (429, 503, 529) else None
        raise Lost(str(status), named, delay, lasting=_is_lasting(status, words))
    if status in _REFUSALS and any(code in lowered for code in _BLOCKED):
        raise Refused("blocked", "blocked", named)
    if status in (401, 403):
        hidden = status == 401 or _SECRETIVE.search(words)  # its words may quote a part of the key
        raise Unusable("key", f"HTTP {status}" if hidden else named, status)
    if status in _ELSEWHERE:
        raise Unusable("model", named, status)
    raise Refused("error", "refused_request", named)


def clean(text: str, secret: str = "") -> str:
    """A service's own words for a message: one short line, without the secret."""
    text = text.replace(secret, "[key]") if secret else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * QUOTE]).split())
    return text if len(text) <= QUOTE else text[:QUOTE] + "…"


def _read_json(text: str) -> Any:
    """Decoded JSON, or None for what isn't any, or is nested too deep."""
    try:
        return json.loads(text) if bracket_depth(text) <= MAX_DEPTH else None
    except (ValueError, RecursionError):
        return None


def _check_answer(body: Any, status: int) -> Any:
    if body is None:
        detail = f"HTTP {status} with an answer that breaks off, or is no JSON"
        raise Lost("broken answer", detail, billed=True)
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        detail = f"HTTP {status} with an answer that holds no choices"
        raise Lost("no choices", detail, lasting=True, billed=True)
    return body


def _is_lasting(status: int, words: str) -> bool:
    """Whether a failure of a service is worded as one of this request, and not of the service as a whole."""
    if status < 500 or _PASSING.search(words):
        return False
    return status not in _GATEWAY or (bool(words) and not words.startswith("<"))


def _words(body: Any) -> str:
    """The message in a body of an error, in the shapes that services use."""
    found = body.get("error", body) if isinstance(body, dict) else body
    for key in ("message", "detail", "error", "type", "code"):
        if isinstance(found, dict) and isinstance(found.get(key), str) and found[key].strip():
            return found[key]
    return found if isinstance(found, str) else ""
