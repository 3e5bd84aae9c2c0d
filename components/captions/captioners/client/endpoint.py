"""One OpenAI-compatible endpoint: retries its requests, and keeps every answer on disk.

Transient failures are retried: 408, 425, 429, 5xx, lost connections, incomplete answers. If the same message comes
again for one request while others are answered, it is final. The client is `httpx2`, not a vendor's own, because every
try is accounted for: its cost, its headers, and that its answer is on disk before it is used. No message contains the
key, or an address with credentials.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2

from components.captions.captioners.client.budget import Budget
from components.captions.captioners.client.journal import Journal
from components.captions.captioners.client.replies import (
    Refused,
    Retryable,
    Unusable,
    check_size,
    clean,
    decode_reply,
    read_reply,
)
from components.captions.captioners.client.throttle import Throttle, backoff
from univigu.errors import ConfigError, TransientError

CONNECT_S = 10.0
WITNESS_TRIES, WITNESS_S = 3, 30.0  # limits for the request that shows if a failure is general
MAX_REJECTED_IN_A_ROW = 10  # clips; if this many are refused with no answer in between, the service is at fault


class Stopped(Exception):  # noqa: N818 (control flow: ends a conversation early)
    """No more requests are sent; `Endpoint.fault` says why."""


class RateLimited(Retryable):
    """A rate limit that lasts longer than `patience_s`; `sentence` is the message for the user."""

    def __init__(self, failure: Retryable, host: str, delay: float, patience_s: float) -> None:
        super().__init__(failure.kind, f"a rate limit for {patience_s:g} s; the last: {failure}")
        waits = f"asks to wait {round(delay, 2):g} s ({failure}), longer than"
        does = waits if failure.delay else f"refuses requests ({failure}) for longer than"
        self.sentence = (
            f"The captioning service at {host} {does} the {patience_s:g} s of `caption_videos.options.patience_s`; "
            "run the same command again later: all answers are kept."
        )


@dataclass(frozen=True)
class EndpointSettings:
    """How to use one endpoint, and what it may cost."""

    url: str
    key: str
    key_name: str  # the environment variable that holds the key
    model: str
    concurrency: int
    tries: int  # of one request, each with its own deadline; refusals by a rate limit don't count
    backoff_s: float  # before the second try; doubles with each further one
    deadline_s: float  # from the first byte of the request to the last byte of the answer
    patience_s: float  # how long to wait for a rate limit
    reserve: Mapping[str, float]  # what one request may cost, until an answer shows more
    prices: Mapping[str, float] = field(default_factory=dict)  # USD per million `prompt` and `completion` tokens
    budget: Mapping[str, float] = field(
        default_factory=dict
    )  # limits of `requests`, `tokens`, `usd`, over the whole journal


class Endpoint:
    """The state that all conversations share: connections, throttle, budget, and whether to stop."""

    def __init__(self, settings: EndpointSettings, journal: Journal) -> None:
        self.settings, self.journal = settings, journal
        self.throttle = Throttle(settings.concurrency)
        self.budget = Budget(settings.budget, settings.prices, journal.spent(), settings.reserve)
        self.answered, self.kept, self.failures = 0, 0, Counter()
        self.fault: BaseException | None = None
        self.rejected_in_a_row = 0  # clips, with no answer in between
        self.suspected_fault: Exception | None = None  # what may be wrong with the service, by the last of them
        url = httpx2.URL(settings.url)
        self.host = f"{url.host}:{url.port}" if url.port else url.host

    def open(self) -> httpx2.AsyncClient:
        """Open the HTTP client for one run of the event loop; the caller closes it."""
        self.stop = asyncio.Event()
        key = {"Authorization": f"Bearer {self.settings.key}"} if self.settings.key else {}
        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "uni-vigu"}
        self.client = httpx2.AsyncClient(
            headers={**plain, **key},
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=self.settings.concurrency + 1),
        )
        return self.client

    def give_up(self, fault: BaseException) -> Stopped:
        """Send no more requests; those in flight may still be answered, as they are paid for."""
        self.fault = self.fault or fault
        self.stop.set()
        return Stopped()

    async def find(self, key: str) -> Any:
        """The kept answer to the request with this digest, or None."""
        body = await asyncio.get_running_loop().run_in_executor(self.journal.thread, self.journal.find, key)
        self.kept += body is not None
        return body

    async def ask(self, key: str, payload: Mapping[str, Any], witness: Mapping[str, Any]) -> Any:
        """Send a request, and keep its answer under its digest.

        witness: another request, which shows whether a failure is general. Raises `Refused` if only this request fails.
        If all tries fail and meanwhile no other request is answered, not even the witness, the endpoint is given up and
        `Stopped` is raised.
        """
        body = await self._retry(payload, key, witness)
        self.answered += 1
        self.rejected_in_a_row = 0
        return body

    async def probe(self, payload: Mapping[str, Any], witness: Mapping[str, Any] | None = None) -> Any:
        """Send a request whose answer isn't kept; raises as `ask` does."""
        return await self._retry(payload, "", witness)

    async def _retry(self, payload: Mapping[str, Any], key: str, witness: Mapping[str, Any] | None) -> Any:
        """Try until there is an answer, or until it is certain that there will be none."""
        content, tries, answered, signature = json.dumps(payload).encode(), self.settings.tries, -1, ""
        for number in range(1, tries + 1):
            try:
                return await self._send(content, key, self.settings.patience_s)
            except Unusable as unusable:
                fault = ConfigError(f"The captioning service at {self.host} {self._remedy(unusable)}")
                certain = not key and unusable.status == 401
                raise await self._reject_or_give_up(fault, unusable, key, None if certain else witness) from unusable
            except RateLimited as limit:
                fault = TransientError(limit.sentence)
                raise await self._reject_or_give_up(fault, limit, key, witness if key else None) from limit
            except Retryable as failure:
                answered = self.answered if answered < 0 else answered
                # The probe, which has no key, uses all its tries: no clip waits for it yet.
                settled = number == tries or (
                    key and number == 2 and failure.signature and failure.signature == signature
                )
                if settled and (self.answered > answered or await self._answers(witness)):
                    detail = f"{number} tries brought no answer; the last: {failure}"
                    raise Refused("error", "no_answer", detail, isolated=True) from failure
                if number == tries:
                    raise self.give_up(self._no_answer_error(failure)) from failure
                signature = failure.signature
            await self._sleep(backoff(self.settings.backoff_s, number, key))
        raise AssertionError("a request has at least one try")

    async def _reject_or_give_up(
        self, fault: Exception, why: Exception, key: str, witness: Mapping[str, Any] | None
    ) -> Exception:
        """The exception for a reply that may concern all requests.

        `Refused` if the witness is answered and fewer than `MAX_REJECTED_IN_A_ROW` were refused in a row; otherwise the
        endpoint is given up: `Stopped`.
        """
        if not await self._answers(witness):
            return self.give_up(fault)
        if key:
            self.rejected_in_a_row, self.suspected_fault = self.rejected_in_a_row + 1, fault
        if self.rejected_in_a_row >= MAX_REJECTED_IN_A_ROW:
            return self.give_up(fault)
        reason = "no_answer" if isinstance(why, Retryable) else "refused_request"
        return Refused("error", reason, str(why), isolated=True)

    async def _answers(self, witness: Mapping[str, Any] | None) -> bool:
        """Whether a request is answered within `WITNESS_TRIES` tries and `WITNESS_S` seconds of rate limits."""
        content, patience_s = json.dumps(witness).encode(), min(self.settings.patience_s, WITNESS_S)
        for number in range(1, WITNESS_TRIES + 1) if witness else ():
            try:
                await self._send(content, "", patience_s)
                return True
            except (RateLimited, Refused, Unusable):
                return False
            except Retryable:
                await self._sleep(backoff(self.settings.backoff_s, number, "witness"))
        return False

    async def _send(self, content: bytes, key: str, patience_s: float) -> Any:
        """One try, repeated after rate limits for up to `patience_s`; returns the decoded answer, kept under `key`."""
        loop = asyncio.get_running_loop()
        patience_ends, refusals = loop.time() + patience_s, 0
        while True:
            if not await self.throttle.enter(self.stop):
                raise Stopped
            try:
                self._check_budget()
                body = await self._exchange(content, key or "probe")
                write = partial(self.journal.keep, key, body) if key else self.journal.charge
                await self._note(write, self.budget.charge(body))
                self._check_usage()
                return body
            except Refused as refused:
                await self._count(refused.reason, billed=refused.reason == "too_large")
                raise
            except Unusable as unusable:
                await self._count(str(unusable.status))
                raise
            except Retryable as failure:
                await self._count(failure.kind, failure.billed)
                if failure.delay is None and failure.kind != "429":
                    raise
                refusals += 1
                delay = self._delay(failure, refusals, key)
                if loop.time() + delay > patience_ends:
                    raise RateLimited(failure, self.host, delay, patience_s) from failure
                self.throttle.slow_down(delay)
            finally:
                self.throttle.leave()

    def _delay(self, failure: Retryable, refusals: int, name: str) -> float:
        """Seconds to wait for a rate limit: what the service asks for, or an increasing backoff if it gives no time."""
        if failure.delay is not None and failure.delay >= self.settings.backoff_s:
            return failure.delay
        return max(
            failure.delay or 0.0, backoff(self.settings.backoff_s, max(refusals, self.throttle.refusals + 1), name)
        )

    async def _exchange(self, content: bytes, name: str) -> Any:
        """Send one request and read its whole answer, within the deadline and the size limit."""
        received, named = bytearray(), {"X-Client-Request-Id": name}  # identifies repeated requests
        try:
            async with (
                asyncio.timeout(self.settings.deadline_s),
                self.client.stream("POST", self.settings.url, content=content, headers=named) as reply,
            ):
                async for chunk in reply.aiter_raw():
                    received += chunk
                    check_size(received)
        except TimeoutError as error:
            raise Retryable(
                "deadline", f"no whole answer within {self.settings.deadline_s:g} s", billed=True
            ) from error
        except httpx2.RequestError as error:
            kind, billed = type(error).__name__, not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise Retryable(kind, f"{kind}: {self.clean(str(error))}", billed=billed) from error
        text = decode_reply(bytes(received), reply.headers.get("content-encoding", ""))
        text = text.replace(self.settings.key, "[key]") if self.settings.key else text
        body = read_reply(reply.status_code, reply.headers, text)
        self.throttle.record_answer(reply.headers, self.budget.cost(body).get("tokens", 0.0))
        return body

    def _remedy(self, unusable: Unusable) -> str:
        model, key_name = self.settings.model, self.settings.key_name
        if unusable.what == "credit":
            return f"has no credit left ({unusable}); top it up and run the same command again: all answers are kept."
        if unusable.status == 403:
            return (
                f"forbids access ({unusable}); check that the key in {key_name} may use the model '{model}', and that "
                "no firewall or gateway blocks the request."
            )
        if unusable.what == "key":
            said = f"refuses the key in {key_name}" if self.settings.key else "requires a key"
            return f"{said} ({unusable}); set {key_name} to a key that may use the model '{model}'."
        return f"has no model '{model}' at this address ({unusable}); correct the profile or the address."

    def _no_answer_error(self, failure: Retryable) -> TransientError:
        return TransientError(
            f"The captioning service at {self.host} doesn't answer ({failure}); start it or correct its address, "
            "and run the same command again: all answers are kept."
        )

    def clean(self, text: str) -> str:
        """A service's own message as one short line, without the key."""
        return clean(text, self.settings.key)

    def _check_budget(self) -> None:
        """Give up before a request that may overrun the budget."""
        if overrun := self.budget.overrun(self.throttle.in_flight):
            sentence = (
                f"The budget for captions is used up: {overrun}, and another request may exceed it; raise "
                "`caption_videos.options.budget` and run the same command again: all answers are kept."
            )
            raise self.give_up(ConfigError(sentence))

    def _check_usage(self) -> None:
        """Give up if answers don't report the usage that the budget limits: unknown is not zero."""
        if not self.budget.usage_known:
            sentence = (
                f"The captioning service at {self.host} doesn't report the tokens of its answers, so a budget in "
                "tokens or USD can't be enforced; set `requests` in `caption_videos.options.budget` instead."
            )
            self.give_up(ConfigError(sentence))

    async def _count(self, kind: str, billed: bool = False) -> None:
        """Count a request without an answer. billed: whether the service may charge for it."""
        self.failures[kind] += 1
        await self._note(self.journal.charge, self.budget.assumed_cost() if billed else {"requests": 1.0})

    async def _note(self, write: Callable[[Mapping[str, float]], None], cost: Mapping[str, float]) -> None:
        """Write to the journal in its own thread, and read what all processes have spent."""

        def work() -> dict[str, float]:
            write(cost)
            return self.journal.spent()

        # A received answer is paid for: it is kept even if this task is cancelled meanwhile.
        writing = asyncio.get_running_loop().run_in_executor(self.journal.thread, work)
        self.budget.spent = await asyncio.shield(writing)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the endpoint is given up."""
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return
