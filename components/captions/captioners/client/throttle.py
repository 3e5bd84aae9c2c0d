"""How many requests may be under way: no more than a service bears, as it says itself.

As TCP does it: few at first, twice as many in each round, until a 429 stops every request for the time that it names,
and halves how many go at once; from there, one more in each round. Where a service announces what is left of a quota,
the quota isn't overrun in the first place. Where it doesn't say how long to wait, each wait is twice the one before.
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
    """Seconds to wait after the failure that is the `times`-th in a row: `first`, then twice as long each time.

    At most `MAX_BACKOFF_S` (or `first`). The last quarter depends on the request's name, so that requests that failed
    together don't come back together.
    """
    longest = min(first * 2.0 ** min(times - 1, 32), max(first, MAX_BACKOFF_S))
    return longest * (0.75 + 0.25 * random.Random(f"{name} {times}").random())


class Throttle:
    """State that all requests to one service share."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(2.0, float(most))
        self.bearable = float(most)  # up to here, the limit doubles in each round
        self.under_way = 0
        self.closed_until = 0.0
        self.refusals = 0  # in a row, with no answer between; those at the same time count as one
        self.quotas: dict[str, Quota] = {"requests": Quota(), "tokens": Quota()}

    async def enter(self, stop: asyncio.Event) -> bool:
        """Wait for room, and take it; False when `stop` was set meanwhile."""
        while not stop.is_set():
            wait = max(self.closed_for(), *(quota.closed_for(self.under_way) for quota in self.quotas.values()))
            if wait <= 0 and self.under_way < max(1, int(self.limit)):
                self.under_way += 1
                for quota in self.quotas.values():
                    quota.take()
                return True
            await asyncio.sleep(min(max(wait, POLL_S), 0.25))
        return False

    def leave(self) -> None:
        self.under_way -= 1

    def closed_for(self) -> float:
        """Seconds until the next request may go, by the last refusal."""
        return self.closed_until - time.monotonic()

    def slow_down(self, seconds: float) -> None:
        """A service has had too much: wait, then go on with half as many at once."""
        if self.closed_for() <= 0:  # the others that were refused at the same time are no further sign
            self.limit = self.bearable = max(1.0, self.limit / 2)
            self.refusals += 1
        self.closed_until = max(self.closed_until, time.monotonic() + seconds)

    def note_answer(self, headers: Mapping[str, str], tokens: float) -> None:
        """Learn from an answer, whose request still counts as under way."""
        self.refusals = 0
        self.limit = min(float(self.most), self.limit + (1.0 if self.limit < self.bearable else 1 / self.limit))
        self.quotas["tokens"].one = max(self.quotas["tokens"].one, tokens)
        for kind, quota in self.quotas.items():
            quota.note(headers, kind, self.under_way - 1)


class Quota:
    """What is left of one of a service's quotas, as far as its headers say; without them it is no limit."""

    def __init__(self) -> None:
        self.one = 1.0  # the most that one request has taken
        self.left = self.whole = math.inf
        self.full_at = math.inf

    def closed_for(self, under_way: int) -> float:
        """Seconds until the quota bears one more request."""
        if time.monotonic() >= self.full_at:
            self.left, self.full_at = max(self.one, self.whole - under_way * self.one), math.inf
        if self.left >= self.one or (self.full_at == math.inf and not under_way):
            return 0.0
        return POLL_S if self.full_at == math.inf else self.full_at - time.monotonic()

    def take(self) -> None:
        self.left -= self.one

    def note(self, headers: Mapping[str, str], kind: str, under_way: int) -> None:
        """Read the headers of an answer; what is under way beside it may not have been counted yet."""
        left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
        wait = read_delay(headers.get(f"x-ratelimit-reset-{kind}"))
        if left is None or wait is None:
            return
        self.left, self.full_at = left - under_way * self.one, time.monotonic() + wait
        self.whole = _number(headers.get(f"x-ratelimit-limit-{kind}")) or max(left, self.one)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a refusal asks to wait, by whichever header it says so, or None."""
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
    """Seconds from now: of ``30``, ``1m30.5s``, ``20ms``, an HTTP or ISO date, a Unix time; None for anything else."""
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
