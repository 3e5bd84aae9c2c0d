"""One OpenAI-compatible endpoint: requests that survive what networks and services do, and answers that are kept.

What is transient is tried again: 408, 425, 429, 5xx, lost connections, answers that break off; the same words again for
one request, while others are answered, settle it. The client is `httpx2` rather than a vendor's own, because each try
has to be seen: what it cost, which headers it came with, and that its answer is on the disk before it is used. Keys and
addresses with credentials are in no message.
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
    Lost,
    Refused,
    Unusable,
    check_size,
    clean,
    decode_reply,
    read_reply,
)
from components.captions.captioners.client.throttle import Throttle, backoff
from univigu.errors import ConfigError, TransientError

CONNECT_S = 10.0
WITNESS_TRIES, WITNESS_S = 3, 30.0  # how long another request is waited for that shows whose fault a failure is
EVERYBODY = 10  # clips: when as many in a row are turned away, with none answered between, it isn't about the clips


class Stopped(Exception):  # noqa: N818 (how a conversation is left early)
    """The endpoint is no longer asked: `Endpoint.fault` says why."""


class Impatient(Lost):
    """A rate limit that takes longer than `patience_s`; `sentence` is for the user."""

    def __init__(self, lost: Lost, place: str, delay: float, patience_s: float) -> None:
        super().__init__(lost.kind, f"a rate limit for {patience_s:g} s; the last: {lost}")
        waits = f"asks to wait {round(delay, 2):g} s ({lost}), beyond"
        does = waits if lost.delay else f"turns requests away ({lost}) beyond"
        self.sentence = (
            f"The captioning service at {place} {does} the {patience_s:g} s of `caption_videos.options.patience_s`; "
            "run the same command again later: what is answered is kept."
        )


@dataclass(frozen=True)
class Terms:
    """What one endpoint is asked with, and what it may cost."""

    url: str
    key: str
    key_name: str  # the environment variable that holds the key
    model: str
    concurrency: int
    tries: int  # of one request, each with its own deadline; refusals by a rate limit are none
    backoff_s: float  # before the second try; then twice as long each time
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
        self.budget = Budget(terms.budget, terms.prices, journal.spent(), terms.reserve)
        self.answered, self.kept, self.failures = 0, 0, Counter()
        self.fault: BaseException | None = None
        self.suspicion: Exception | None
        self.turned_away, self.suspicion = 0, None  # clips in a row with no answer between, and what it may be about
        url = httpx2.URL(terms.url)
        self.place = f"{url.host}:{url.port}" if url.port else url.host

    def open(self) -> httpx2.AsyncClient:
        """Make the connections of one run of the event loop; the caller closes what this returns."""
        self.stop = asyncio.Event()
        key = {"Authorization": f"Bearer {self.terms.key}"} if self.terms.key else {}
        plain = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "uni-vigu"}
        self.client = httpx2.AsyncClient(
            headers={**plain, **key},
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

    async def ask(self, key: str, payload: Mapping[str, Any], witness: Mapping[str, Any]) -> Any:
        """The answer to a request, kept under its digest.

        witness: another request, which tells whose fault a failure is. Raises `Refused` where only this request fails.
        Where no try helps and nobody else is answered meanwhile, not even the witness, the endpoint is given up:
        `Stopped`.
        """
        body = await self._persist(payload, key, witness)
        self.answered += 1
        self.turned_away = 0
        return body

    async def probe(self, payload: Mapping[str, Any], witness: Mapping[str, Any] | None = None) -> Any:
        """The answer to a request that is asked for the sake of asking, and kept nowhere; raises as `ask` does."""
        return await self._persist(payload, "", witness)

    async def _persist(self, payload: Mapping[str, Any], key: str, witness: Mapping[str, Any] | None) -> Any:
        """Try until there is an answer, or it is settled that there will be none."""
        content, tries, answered, gist = json.dumps(payload).encode(), self.terms.tries, -1, ""
        for number in range(1, tries + 1):
            try:
                return await self._send(content, key, self.terms.patience_s)
            except Unusable as unusable:
                fault = ConfigError(f"The captioning service at {self.place} {self._remedy(unusable)}")
                certain = not key and unusable.status == 401
                raise await self._turn_away(fault, unusable, key, None if certain else witness) from unusable
            except Impatient as limit:
                fault = TransientError(limit.sentence)
                raise await self._turn_away(fault, limit, key, witness if key else None) from limit
            except Lost as lost:
                answered = self.answered if answered < 0 else answered
                # Of the first question all tries are made: no clip has to wait for them.
                settled = number == tries or (key and number == 2 and lost.gist and lost.gist == gist)
                if settled and (self.answered > answered or await self._answers(witness)):
                    detail = f"{number} tries brought no answer; the last: {lost}"
                    raise Refused("error", "no_answer", detail, alone=True) from lost
                if number == tries:
                    raise self.give_up(self._silence(lost)) from lost
                gist = lost.gist
            await self._sleep(backoff(self.terms.backoff_s, number, key))
        raise AssertionError("a request has at least one try")

    async def _turn_away(
        self, fault: Exception, why: Exception, key: str, witness: Mapping[str, Any] | None
    ) -> Exception:
        """What to raise for a reply that may be about everybody: `Refused` where the witness is answered.

        Unless the same has happened to `EVERYBODY` in a row.
        """
        if not await self._answers(witness):
            return self.give_up(fault)
        if key:
            self.turned_away, self.suspicion = self.turned_away + 1, fault
        if self.turned_away >= EVERYBODY:
            return self.give_up(fault)
        reason = "no_answer" if isinstance(why, Lost) else "refused_request"
        return Refused("error", reason, str(why), alone=True)

    async def _answers(self, witness: Mapping[str, Any] | None) -> bool:
        """Whether a request is answered, within a few tries and little patience."""
        content, patience_s = json.dumps(witness).encode(), min(self.terms.patience_s, WITNESS_S)
        for number in range(1, WITNESS_TRIES + 1) if witness else ():
            try:
                await self._send(content, "", patience_s)
                return True
            except (Impatient, Refused, Unusable):
                return False
            except Lost:
                await self._sleep(backoff(self.terms.backoff_s, number, "witness"))
        return False

    async def _send(self, content: bytes, key: str, patience_s: float) -> Any:
        """One try, after as many refusals by a rate limit as patience allows; the decoded answer, kept under `key`."""
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
            except Lost as lost:
                await self._count(lost.kind, lost.billed)
                if lost.delay is None and lost.kind != "429":
                    raise
                refusals += 1
                delay = self._delay(lost, refusals, key)
                if loop.time() + delay > patience_ends:
                    raise Impatient(lost, self.place, delay, patience_s) from lost
                self.throttle.slow_down(delay)
            finally:
                self.throttle.leave()

    def _delay(self, lost: Lost, refusals: int, name: str) -> float:
        """Seconds to wait for a rate limit: as long as it says, or, where it says nothing of use, ever longer."""
        if lost.delay is not None and lost.delay >= self.terms.backoff_s:
            return lost.delay
        return max(lost.delay or 0.0, backoff(self.terms.backoff_s, max(refusals, self.throttle.refusals + 1), name))

    async def _exchange(self, content: bytes, name: str) -> Any:
        """Send one request and read its answer to the end, within the deadline and a size."""
        received, named = bytearray(), {"X-Client-Request-Id": name}  # a repeated request is recognised by it
        try:
            async with (
                asyncio.timeout(self.terms.deadline_s),
                self.client.stream("POST", self.terms.url, content=content, headers=named) as reply,
            ):
                async for chunk in reply.aiter_raw():
                    received += chunk
                    check_size(received)
        except TimeoutError as error:
            raise Lost("deadline", f"no whole answer within {self.terms.deadline_s:g} s", billed=True) from error
        except httpx2.RequestError as error:
            kind, billed = type(error).__name__, not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise Lost(kind, f"{kind}: {self.clean(str(error))}", billed=billed) from error
        text = decode_reply(bytes(received), reply.headers.get("content-encoding", ""))
        text = text.replace(self.terms.key, "[key]") if self.terms.key else text
        body = read_reply(reply.status_code, reply.headers, text)
        self.throttle.note_answer(reply.headers, self.budget.cost(body).get("tokens", 0.0))
        return body

    def _remedy(self, unusable: Unusable) -> str:
        model, key_name = self.terms.model, self.terms.key_name
        if unusable.what == "credit":
            return f"has no credit left ({unusable}); top it up and run the same command: what is answered is kept."
        if unusable.status == 403:
            return (
                f"forbids access ({unusable}); check that the key in {key_name} may use the model '{model}', and that "
                "no firewall or gateway stands between."
            )
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

    def _check_budget(self) -> None:
        """Give up before a request that may overrun a budget."""
        if overrun := self.budget.overrun(self.throttle.under_way):
            sentence = (
                f"The budget for captions is used up: {overrun}, and one more may overrun it; raise "
                "`caption_videos.options.budget` and run the same command: what is answered is kept."
            )
            raise self.give_up(ConfigError(sentence))

    def _check_usage(self) -> None:
        """Give up where no answer has said yet what a budget is to count: unknown is not zero."""
        if not self.budget.countable:
            sentence = (
                f"The captioning service at {self.place} doesn't say how many tokens its answers take, so a budget in "
                "tokens or USD can't be kept; state one in `requests` (`caption_videos.options.budget`)."
            )
            self.give_up(ConfigError(sentence))

    async def _count(self, kind: str, billed: bool = False) -> None:
        """Note a request without an answer. billed: whether the service may have worked for it."""
        self.failures[kind] += 1
        await self._note(self.journal.charge, self.budget.unknown() if billed else {"requests": 1.0})

    async def _note(self, write: Callable[[Mapping[str, float]], None], cost: Mapping[str, float]) -> None:
        """Write to the journal in its own thread, and learn what has been spent by all processes."""

        def work() -> dict[str, float]:
            write(cost)
            return self.journal.spent()

        # An answer that is here is paid for: it is kept even when this task is cancelled meanwhile.
        writing = asyncio.get_running_loop().run_in_executor(self.journal.thread, work)
        self.budget.spent = await asyncio.shield(writing)

    async def _sleep(self, seconds: float) -> None:
        """Wait, or until the endpoint is given up."""
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return
