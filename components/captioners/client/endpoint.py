"""One OpenAI-compatible endpoint: requests that survive what networks and services do, and answers that are kept.

Only what is transient is tried again: 408, 425, 429, 5xx, lost connections, answers that break off. The client is
`httpx2` rather than a vendor's own, because each try has to be seen: what it cost, which headers it came with, and that
its answer is on the disk before it is used. Keys and addresses with credentials are in no message.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from components.captioners.client.answers import answer_cost, read_usage
from components.captioners.client.journal import Journal
from components.captioners.client.replies import Lost, Refused, Unusable, clean, read_reply
from components.captioners.client.throttle import Throttle
from univigu.errors import ConfigError, TransientError

CONNECT_S = 10.0
MAX_BYTES = 4 * 2**20  # of one answer
MAX_BACKOFF_S = 30.0


class Stopped(Exception):  # noqa: N818 (how a conversation is left early)
    """The endpoint is no longer asked: `Endpoint.fault` says why."""


@dataclass(frozen=True)
class Terms:
    """What one endpoint is asked with, and what it may cost."""

    url: str
    key: str
    key_name: str  # the environment variable that holds the key
    model: str
    concurrency: int
    tries: int  # of one request, each with its own deadline; refusals by a rate limit are none
    backoff_s: float  # before the second try, at the most; then up to twice as long each time, always with jitter
    deadline_s: float  # from the request's first byte to the answer's last
    patience_s: float  # with a rate limit
    reserve: Mapping[str, float]  # what one request may take of each budget, before the first answer
    prices: Mapping[str, float] = field(default_factory=dict)  # USD for a million `prompt` and `completion` tokens
    budget: Mapping[str, float] = field(default_factory=dict)  # `requests`, `tokens`, `usd`: of the whole journal


class Endpoint:
    """State that all conversations share: the connection, the throttle, what was spent, and whether to go on."""

    def __init__(self, terms: Terms, journal: Journal) -> None:
        self.terms, self.journal = terms, journal
        self.throttle = Throttle(terms.concurrency)
        self.spent, self.reserve = journal.spent(), {"requests": 1.0, **terms.reserve}
        self.answered, self.kept, self.failures = 0, 0, Counter()
        self.fault: BaseException | None = None
        url = httpx2.URL(terms.url)
        self.place = f"{url.host}:{url.port}" if url.port else url.host

    def open(self) -> httpx2.AsyncClient:
        """Make the connections of one run of the event loop; the caller closes what this returns."""
        self.stop = asyncio.Event()
        key = {"Authorization": f"Bearer {self.terms.key}"} if self.terms.key else {}
        self.client = httpx2.AsyncClient(
            headers={"Content-Type": "application/json", "User-Agent": "uni-vigu", **key},
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self.terms.concurrency + 1),
        )
        return self.client

    def give_up(self, fault: BaseException) -> Stopped:
        """Send nothing more; what is under way may still be answered, as it is paid for."""
        self.fault = self.fault or fault
        self.stop.set()
        return Stopped()

    async def find(self, key: str) -> Any:
        """The answer that is kept for the request with this digest, or None."""
        body = await asyncio.get_running_loop().run_in_executor(self.journal.thread, self.journal.find, key)
        self.kept += body is not None
        return body

    async def ask(self, key: str, payload: Mapping[str, Any], probe: Mapping[str, Any]) -> Any:
        """The answer to a request, kept under its digest.

        Raises `Refused` where only this request fails. Where no try helps and nobody else is answered meanwhile, not
        even `probe`, the endpoint is given up: `Stopped`.
        """
        answered = self.answered
        try:
            body = await self._try_again(payload, key)
        except Lost as lost:
            if self.answered == answered and not await self._answers(probe):
                raise self.give_up(self._silence(lost)) from lost
            detail = f"{self.terms.tries} tries brought no answer; the last: {lost}"
            raise Refused("error", "no_answer", detail) from lost
        self.answered += 1
        return body

    async def probe(self, payload: Mapping[str, Any]) -> Any:
        """The answer to a request that is asked for the sake of asking, and kept nowhere."""
        try:
            return await self._try_again(payload)
        except Lost as lost:
            raise self.give_up(self._silence(lost)) from lost

    async def _answers(self, probe: Mapping[str, Any]) -> bool:
        try:
            await self._send(json.dumps(probe).encode())
        except (Lost, Refused):
            return False
        return True

    async def _try_again(self, payload: Mapping[str, Any], key: str = "") -> Any:
        content = json.dumps(payload).encode()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Lost),
            stop=stop_after_attempt(self.terms.tries),
            wait=wait_random_exponential(self.terms.backoff_s, max=max(MAX_BACKOFF_S, self.terms.backoff_s)),
            sleep=self._sleep,
            reraise=True,
        )
        return await retrying(self._send, content, key)

    async def _send(self, content: bytes, key: str = "") -> Any:
        """One try, after as many refusals by a rate limit as patience allows; the decoded answer, kept under `key`."""
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + self.terms.patience_s
        while True:
            if not await self.throttle.enter(self.stop):
                raise Stopped
            try:
                self._check_budget()
                body = await self._exchange(content, key or "probe")
                write = partial(self.journal.keep, key, body) if key else self.journal.charge
                await self._note(write, self.cost(body))
                return body
            except Refused as refused:
                await self._count(refused.reason)
                raise
            except Lost as lost:
                await self._count(lost.kind)
                if lost.delay is None and lost.kind != "429":
                    raise
                delay = self.terms.backoff_s if lost.delay is None else lost.delay
                if loop.time() + delay > patience_ends:
                    sentence = (
                        f"The captioning service at {self.place} asks to wait {delay:.0f} s (HTTP {lost.kind}), which "
                        "is beyond `caption_videos.options.patience_s`; run the same command again after that."
                    )
                    raise self.give_up(TransientError(sentence)) from lost
                self.throttle.slow_down(delay)
            finally:
                self.throttle.leave()

    async def _exchange(self, content: bytes, name: str) -> Any:
        """Send one request and read its answer to the end, within the deadline."""
        received, named = bytearray(), {"X-Client-Request-Id": name}  # a repeated request is recognised by it
        try:
            async with (
                asyncio.timeout(self.terms.deadline_s),
                self.client.stream("POST", self.terms.url, content=content, headers=named) as reply,
            ):
                async for chunk in reply.aiter_bytes():
                    received += chunk
                    if len(received) > MAX_BYTES:
                        raise Refused("error", "too_large", f"the answer has more than {MAX_BYTES} bytes")
        except TimeoutError as error:
            raise Lost("deadline", f"no whole answer within {self.terms.deadline_s:g} s") from error
        except httpx2.RequestError as error:
            kind = type(error).__name__
            raise Lost(kind, f"{kind}: {self.clean(str(error))}") from error
        text = received.decode("utf-8", "replace")
        text = text.replace(self.terms.key, "[key]") if self.terms.key else text
        try:
            body = read_reply(reply.status_code, reply.headers, text)
        except Unusable as unusable:
            sentence = f"The captioning service at {self.place} {self._remedy(unusable)}"
            raise self.give_up(ConfigError(sentence)) from unusable
        self.throttle.note_answer(reply.headers, self.cost(body)["tokens"])
        return body

    def _remedy(self, unusable: Unusable) -> str:
        model, key_name = self.terms.model, self.terms.key_name
        if unusable.what == "credit":
            return f"has no credit left ({unusable}); top it up and run the same command: what is answered is kept."
        if unusable.what == "key":
            said = f"refuses the key in {key_name}" if self.terms.key else "wants a key"
            return f"{said} ({unusable}); put one that may use the model '{model}' into {key_name}."
        return f"has no model '{model}', or not at this address ({unusable}); correct the profile or the address."

    def _silence(self, lost: Lost) -> TransientError:
        return TransientError(
            f"The captioning service at {self.place} doesn't answer ({lost}); what it has answered is kept, so start "
            "it, or correct its address, and run the same command again."
        )

    def clean(self, text: str) -> str:
        """A service's own words for a message."""
        return clean(text, self.terms.key)

    def cost(self, body: Any) -> dict[str, float]:
        """What an answer adds to the sums."""
        return {"requests": 1.0, **answer_cost(read_usage(body), self.terms.prices)}

    def _check_budget(self) -> None:
        """Give up before a request that may overrun a budget, counting what is under way as the dearest seen so far."""
        for name, most in self.terms.budget.items():
            spent = self.spent.get(name, 0.0)
            if spent + self.throttle.under_way * self.reserve.get(name, 0.0) > most:
                sentence = (
                    f"The budget for captions is used up: {spent:g} of {most:g} {name}, and one more may overrun it; "
                    "raise `caption_videos.options.budget` and run the same command: what is answered is kept."
                )
                raise self.give_up(ConfigError(sentence))

    async def _count(self, kind: str) -> None:
        self.failures[kind] += 1
        await self._note(self.journal.charge, {"requests": 1.0})

    async def _note(self, write: Callable[[Mapping[str, float]], None], cost: Mapping[str, float]) -> None:
        """Write to the journal in its own thread, and learn what has been spent by all processes."""

        def work() -> dict[str, float]:
            write(cost)
            return self.journal.spent()

        for name in ("tokens", "usd"):
            self.reserve[name] = max(self.reserve.get(name, 0.0), cost.get(name, 0.0))
        # An answer that is here is paid for: it is kept even when this task is cancelled meanwhile.
        writing = asyncio.get_running_loop().run_in_executor(self.journal.thread, work)
        self.spent = await asyncio.shield(writing)

    async def _sleep(self, seconds: float) -> None:
        """Wait, or until the endpoint is given up."""
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return
