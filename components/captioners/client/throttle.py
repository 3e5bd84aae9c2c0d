"""How many requests may be under way: no more than a service bears, as it says itself.

A 429 stops every request until the time it names, and halves how many go at once; answers let the number grow again
by one in each round. Where a service announces what is left of a quota, the quota is not overrun in the first place.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

POLL_S = 0.01
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|[smhd]))")


class Throttle:
    """State that all requests to one service share."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.under_way = 0
        self.closed_until = 0.0
        self.largest: dict[str, float] = {"requests": 1.0, "tokens": 1.0}  # what one request has taken of a quota

    async def enter(self, stop: asyncio.Event) -> bool:
        """Wait for room, and take it; False when `stop` was set meanwhile."""
        while not stop.is_set():
            if self.closed_for() <= 0 and self.under_way < max(1, int(self.limit)):
                self.under_way += 1
                return True
            await asyncio.sleep(POLL_S if self.closed_for() <= 0 else min(self.closed_for(), 0.25))
        return False

    def leave(self) -> None:
        self.under_way -= 1

    def closed_for(self) -> float:
        """Seconds until the next request may go."""
        return self.closed_until - time.monotonic()

    def close_for(self, seconds: float) -> None:
        """Let no request go for so long."""
        self.closed_until = max(self.closed_until, time.monotonic() + seconds)

    def slow_down(self, seconds: float) -> None:
        """A service has had too much: wait, then go on with half as many at once."""
        if self.closed_for() <= 0:  # the others that were refused at the same time are no further sign
            self.limit = max(1.0, self.limit / 2)
        self.close_for(seconds)

    def note_answer(self, headers: Mapping[str, str], tokens: float) -> None:
        """Learn from an answer: go on with more at once, and wait where the quotas that it names are used up."""
        self.limit = min(float(self.most), self.limit + 1 / max(1.0, self.limit))
        self.largest["tokens"] = max(self.largest["tokens"], tokens)
        for kind, one in self.largest.items():
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
            wait = read_delay(headers.get(f"x-ratelimit-reset-{kind}"))
            if left is not None and wait is not None and left < (self.under_way + 1) * one:
                self.close_for(wait)


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
