"""Limits the number of requests in flight to what a service can take, by its own replies.

It works like TCP's congestion control: the limit starts low and doubles in each round, until a 429 pauses all requests
for the time that it names and halves the limit; from then on the limit grows by one in each round. If a service reports
what remains of a quota, requests wait before they exceed it. If it doesn't say how long to wait, each wait is twice the
one before.
"""

import asyncio
import math
import random
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

POLL_S = 0.01
MAX_BACKOFF_S = 30.0
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|[smhd]))")


def backoff(first: float, times: int, name: str) -> float:
    """Seconds to wait after the `times`-th failure in a row: `first`, then twice as long each time.

    At most `MAX_BACKOFF_S` (or `first`). The last quarter is jitter from the request's name, so that requests that
    failed together aren't repeated together.
    """
    longest = min(first * 2.0 ** min(times - 1, 32), max(first, MAX_BACKOFF_S))
    return longest * (0.75 + 0.25 * random.Random(f"{name} {times}").random())


class Throttle:
    """The state that all requests to one service share."""

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.limit = min(2.0, float(max_in_flight))
        self.threshold = float(max_in_flight)  # up to this, the limit doubles in each round
        self.in_flight = 0
        self.paused_until = 0.0
        self.refusals = 0  # consecutive; simultaneous ones count as one
        self.quotas: dict[str, Quota] = {"requests": Quota(), "tokens": Quota()}

    async def enter(self, stop: asyncio.Event) -> bool:
        """Wait until another request may start, and count it as in flight; False if `stop` was set meanwhile."""
        while not stop.is_set():
            wait = max(self.wait_s(), *(quota.wait_s(self.in_flight) for quota in self.quotas.values()))
            if wait <= 0 and self.in_flight < max(1, int(self.limit)):
                self.in_flight += 1
                for quota in self.quotas.values():
                    quota.reserve()
                return True
            await asyncio.sleep(min(max(wait, POLL_S), 0.25))
        return False

    def leave(self) -> None:
        self.in_flight -= 1

    def wait_s(self) -> float:
        """Seconds until the next request may start, by the last refusal."""
        return self.paused_until - time.monotonic()

    def slow_down(self, seconds: float) -> None:
        """After a refusal: pause all requests, then continue with half as many at once."""
        if self.wait_s() <= 0:  # requests refused at the same time count once
            self.limit = self.threshold = max(1.0, self.limit / 2)
            self.refusals += 1
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    def record_answer(self, headers: Mapping[str, str], tokens: float) -> None:
        """Adjust the limits to an answer, whose request still counts as in flight."""
        self.refusals = 0
        self.limit = min(
            float(self.max_in_flight), self.limit + (1.0 if self.limit < self.threshold else 1 / self.limit)
        )
        self.quotas["tokens"].per_request = max(self.quotas["tokens"].per_request, tokens)
        for kind, quota in self.quotas.items():
            quota.update(headers, kind, self.in_flight - 1)


class Quota:
    """One of a service's quotas, as reported by its headers; unlimited without them."""

    def __init__(self) -> None:
        self.per_request = 1.0  # the most that one request has taken
        self.remaining = self.limit = math.inf
        self.resets_at = math.inf

    def wait_s(self, in_flight: int) -> float:
        """Seconds until the quota allows one more request."""
        if time.monotonic() >= self.resets_at:
            self.remaining, self.resets_at = max(self.per_request, self.limit - in_flight * self.per_request), math.inf
        if self.remaining >= self.per_request or (self.resets_at == math.inf and not in_flight):
            return 0.0
        return POLL_S if self.resets_at == math.inf else self.resets_at - time.monotonic()

    def reserve(self) -> None:
        self.remaining -= self.per_request

    def update(self, headers: Mapping[str, str], kind: str, in_flight: int) -> None:
        """Read an answer's headers; the service may not have counted the other requests in flight yet."""
        remaining = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
        wait = read_delay(headers.get(f"x-ratelimit-reset-{kind}"))
        if remaining is None or wait is None:
            return
        self.remaining, self.resets_at = remaining - in_flight * self.per_request, time.monotonic() + wait
        self.limit = _number(headers.get(f"x-ratelimit-limit-{kind}")) or max(remaining, self.per_request)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a refusal asks to wait, from any of the headers in use, or None."""
    delays = [
        _scaled(headers.get("retry-after-ms"), 0.001),
        read_delay(headers.get("retry-after")),
        *(
            read_delay(headers.get(f"x-ratelimit-reset-{kind}"))
            for kind in ("requests", "tokens")
            if _number(headers.get(f"x-ratelimit-remaining-{kind}")) == 0
        ),
    ]
    return next((delay for delay in delays if delay is not None), None)


def read_delay(text: str | None) -> float | None:
    """Seconds from now, from ``30``, ``1m30.5s``, ``20ms``, an HTTP or ISO date, or a Unix time; otherwise None."""
    text = (text or "").strip()
    number = _number(text)
    if number is not None:
        return max(0.0, number - time.time()) if number > 1e9 else number
    if text and not _DURATION.sub("", text):
        return sum(float(amount) * _UNITS[unit] for amount, unit in _DURATION.findall(text))
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(text)
        except (ValueError, TypeError):
            continue
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, moment.timestamp() - time.time())
    return None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < 1e12 else None


def _scaled(text: str | None, factor: float) -> float | None:
    number = _number(text)
    return None if number is None else number * factor
