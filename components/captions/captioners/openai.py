"""A vision-language model behind an OpenAI-compatible API: vLLM, `transformers serve`, or any vendor's.

Frames are sent as JPEG data URLs with the prompt, worded by a versioned template. Every answer, good or bad, is kept in
a journal under the work root before it is used: after a kill, or with other checks, a run sends only requests that have
no answer. The first request of a run is a probe, so a bad key, an unknown model, or a model that doesn't see pictures
is reported before any clip is sent.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from components.captions.captioners import (
    Captioner,
    CaptionRequest,
    CaptionResponse,
    FollowUp,
    damaged,
    probe,
    read_options,
)
from components.captions.captioners.client.answers import COMPLETE, read_response
from components.captions.captioners.client.endpoint import Endpoint, EndpointSettings, Stopped
from components.captions.captioners.client.journal import Journal
from components.captions.captioners.client.replies import Refused
from components.captions.captioners.client.signals import GracefulShutdown
from components.captions.captioners.client.usage import answer_cost
from components.captions.captioners.wording import data_url, jpeg, load_template, sample_frames, write_messages
from components.pipeline.digests import json_digest
from univigu.errors import BadInputError, ConfigError
from univigu.threads import side_threads

FORMAT = "chat-1"  # how a template becomes a request; changing it invalidates every kept answer
DECODERS = 2  # clips decoded at once; the frames of each may take 100 MB

Picture = tuple[bytes, float]  # JPEG, seconds


@dataclass(frozen=True)
class Options:
    """`caption_videos.options` in a profile."""

    model: str
    base_url_env: str = "CAPTION_BASE_URL"  # the names of environment variables
    api_key_env: str = "CAPTION_API_KEY"
    template: str = "video-caption-1"
    frames: int = 8  # per clip; 0 for a text-only model
    max_side: int = 512  # of a picture, in pixels
    max_image_bytes: int = 200_000
    request: dict = field(default_factory=dict)  # additional fields of each request: temperature, max_tokens, seed ...
    finish_reasons: list = field(
        default_factory=list
    )  # of complete answers, besides the usual ones; None: none is reported
    concurrency: int = 16
    tries: int = 6
    backoff_s: float | int = 1.0
    deadline_s: float | int = 120.0
    patience_s: float | int = 900.0
    prices: dict = field(default_factory=dict)
    budget: dict = field(default_factory=dict)


def create(config: Mapping[str, Any]) -> Captioner:
    """The captioner with the profile's options; the address and the key come from the environment.

    Raises `ConfigError` for an invalid option, address or key. No request is sent yet.
    """
    options = read_options(Options, config, "openai")
    if options.frames < 0 or min(options.concurrency, options.tries, options.max_side) < 1:
        raise ConfigError(
            "The captioner 'openai' needs concurrency, tries and max_side of at least 1, and frames of at least 0; "
            "correct `caption_videos.options`."
        )
    if taken := sorted({"model", "messages", "stream", "n"} & options.request.keys()):
        raise ConfigError(f"The option 'request' can't hold '{taken[0]}', which the captioner sets; remove it.")
    if min(options.backoff_s, options.deadline_s) <= 0 or options.patience_s < 0:
        raise ConfigError(
            "The captioner 'openai' needs a backoff_s and a deadline_s above 0, and no negative patience_s."
        )
    if not all(word is None or isinstance(word, str) for word in options.finish_reasons):
        raise ConfigError("The option 'finish_reasons' takes strings, and null for a service that reports none.")
    for name, known in (("prices", ("prompt", "completion")), ("budget", ("requests", "tokens", "usd"))):
        given = _amounts(getattr(options, name))
        if not set(given) <= set(known) or not all(_is_amount(value) for value in given.values()):
            raise ConfigError(f"The option '{name}' takes numbers for {', '.join(known)}, but is {given}; correct it.")
    if "usd" in _amounts(options.budget) and not _amounts(options.prices):
        raise ConfigError(
            "A budget in USD needs `prices`, in USD per million tokens; set them, or remove `budget.usd`."
        )
    return OpenAI(options, read_settings(options), Journal(config["answers"] / "openai.sqlite"))


def read_settings(options: Options) -> EndpointSettings:
    """How to use the endpoint: the options, plus the address and the key from the environment."""
    url = os.environ.get(options.base_url_env, "").strip()
    if not re.fullmatch(r"https?://[^\s/]+.*", url):
        raise ConfigError(
            f"The environment variable {options.base_url_env} doesn't hold an http(s) address; set it to that of an "
            "OpenAI-compatible service, such as http://localhost:8000/v1."
        )
    key = os.environ.get(options.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"The key in {options.api_key_env} has characters that no key contains; set it again.")
    longest = options.request.get("max_tokens") or options.request.get("max_completion_tokens") or 0
    prices = _amounts(options.prices)
    return EndpointSettings(
        url=url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions",
        key=key,
        key_name=options.api_key_env,
        model=options.model,
        concurrency=options.concurrency,
        tries=options.tries,
        backoff_s=options.backoff_s,
        deadline_s=options.deadline_s,
        patience_s=options.patience_s,
        reserve=answer_cost({"completion_tokens": float(longest)}, prices),
        prices=prices,
        budget=_amounts(options.budget),
    )


class OpenAI:
    """See `Captioner`."""

    name = "openai"

    def __init__(self, options: Options, settings: EndpointSettings, journal: Journal) -> None:
        self.options, self.settings, self.journal = options, settings, journal
        self.endpoint = Endpoint(settings, journal)
        self.template = load_template(options.template)
        self.template_version, self.instructions = self.template.name, self.template.system
        asked = (options.model, options.frames, options.max_side, options.max_image_bytes, options.request)
        self.digest = json_digest([FORMAT, self.template.digest, *asked])
        self.probed = False

    def check(self) -> None:
        asyncio.run(self._check())
        if self.endpoint.fault:
            raise self.endpoint.fault

    async def _check(self) -> None:
        self.probing = asyncio.Lock()
        async with self.endpoint.open():
            with suppress(Stopped):
                await self._ensure_probed()

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        before = (self.endpoint.answered, self.endpoint.kept, self.endpoint.failures.copy())
        try:
            asyncio.run(self._caption(iter(requests), follow_up))
        except asyncio.CancelledError as error:  # after a second SIGTERM or SIGINT
            # pyrefly: ignore[bad-raise]
            raise self.endpoint.fault from error
        finally:
            self._report(*before)

    async def _caption(self, requests: Iterator[CaptionRequest], follow_up: FollowUp) -> None:
        endpoint = self.endpoint
        self.probing = asyncio.Lock()
        with side_threads(DECODERS, "clips") as decoders, GracefulShutdown(endpoint):
            async with endpoint.open():
                workers = [
                    self._run_conversations(requests, follow_up, decoders) for _ in range(self.options.concurrency)
                ]
                await asyncio.gather(*workers)
        if endpoint.fault:
            raise endpoint.fault
        if endpoint.suspected_fault and not endpoint.answered and not endpoint.kept:  # all clips were refused
            raise endpoint.suspected_fault

    async def _run_conversations(
        self, requests: Iterator[CaptionRequest], follow_up: FollowUp, decoders: Executor
    ) -> None:
        """Hold one conversation after another, until there are no more or the endpoint is given up."""
        try:
            for request in requests:
                pictures: list[Picture] | None = None
                again: CaptionRequest | None = request
                while again:
                    response, pictures = await self._answer(again, pictures, decoders)
                    again = follow_up(again, response)
                if self.endpoint.stop.is_set():
                    return
        except Stopped:
            return
        except Exception as error:  # other requests in flight are paid for, so they are still received
            self.endpoint.give_up(error)

    async def _answer(
        self, request: CaptionRequest, pictures: list[Picture] | None, decoders: Executor
    ) -> tuple[CaptionResponse, list[Picture] | None]:
        """One response, from the journal or the endpoint; and the clip's pictures, if they had to be made."""
        key = self.request_digest(request)
        body = await self.endpoint.find(key)
        if body is None:
            await self._ensure_probed()
            try:
                if pictures is None:
                    pictures = await asyncio.get_running_loop().run_in_executor(decoders, self._take_pictures, request)
            except BadInputError as error:
                return damaged(error), pictures
            try:
                body = await self.endpoint.ask(key, self.payload(request, pictures), self.question)
            except Refused as refused:
                # pyrefly: ignore[bad-argument-type]
                return CaptionResponse("", refused.status, str(refused), reason=refused.reason), pictures
        return read_response(body, self.settings.prices, self.options.finish_reasons), pictures

    def request_digest(self, request: CaptionRequest) -> str:
        """The digest that an answer is kept under: of the whole request, without the address and the key."""
        said = [request.prompt, request.token_range, request.attempt, request.last_text, request.complaint]
        return json_digest([self.digest, request.video_digest, *said])

    def payload(self, request: CaptionRequest, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The body of a request: the template's messages; the pictures precede the text of the first user message."""
        messages = write_messages(self.template, request, [seconds for _, seconds in pictures])
        first = next(message for message in messages if message["role"] == "user")
        return self._body(
            {"role": message["role"], "content": _content(message["text"], pictures if message is first else ())}
            for message in messages
        )

    @cached_property
    def question(self) -> dict[str, Any]:
        """The probe: a request that only a model that sees `frames` pictures at once can answer correctly."""
        if not self.options.frames:
            return self._body([{"role": "user", "content": probe.WORDS}])
        pictures = [(jpeg(frame, 64, 100_000), 0.0) for frame in probe.pictures(self.options.frames)]
        return self._body([{"role": "user", "content": _content(probe.QUESTION, pictures)}])

    def _body(self, messages: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return {"model": self.options.model, "messages": list(messages), "stream": False, **self.options.request}

    def _take_pictures(self, request: CaptionRequest) -> list[Picture]:
        if not self.options.frames:
            return []
        frames, times = sample_frames(*request.open(), self.options.frames)
        return [
            (jpeg(frame, self.options.max_side, self.options.max_image_bytes), seconds)
            for frame, seconds in zip(frames, times, strict=True)
        ]

    async def _ensure_probed(self) -> None:
        """Probe the endpoint, once per process; raises `ConfigError` if it can't do the job."""
        async with self.probing:
            if self.probed:
                return
            if self.endpoint.stop.is_set():
                raise Stopped
            await self._probe()
            self.probed = True

    async def _probe(self) -> None:
        host, model, frames = self.endpoint.host, self.options.model, self.options.frames
        words = self._body([{"role": "user", "content": probe.WORDS}]) if frames else None
        try:
            body = await self.endpoint.probe(self.question, words)
        except Refused as refused:
            if words and (refused.isolated or await self._is_answered(words)):
                raise ConfigError(
                    f"The model '{model}' at {host} doesn't accept {frames} pictures ({refused}); use a "
                    "vision-language model, or lower `caption_videos.options.frames`."
                ) from refused
            raise ConfigError(
                f"The captioning service at {host} refuses the first request ({refused}); correct the model and the "
                "fields of `caption_videos.options.request`."
            ) from refused
        response = read_response(body, {}, COMPLETE | {None})
        if response.status != "success" or response.reason:  # a reasoning model may have been cut off
            return
        if frames and response.text and not probe.is_right(response.text, frames):
            raise ConfigError(
                f"The model '{model}' at {host} doesn't see pictures: shown {' and '.join(probe.colours(frames))}, it "
                f"answered '{self.endpoint.clean(response.text)}'; use a vision-language model, or set "
                "`caption_videos.options.frames` to 0 to write captions from the prompts alone."
            )

    async def _is_answered(self, payload: Mapping[str, Any]) -> bool:
        try:
            await self.endpoint.probe(payload)
        except Refused:
            return False
        return True

    def _report(self, answered: int, kept: int, failures: Mapping[str, int]) -> None:
        """Print what this call received; it varies with the network, so it isn't part of the output."""
        # pyrefly: ignore[unsupported-operation]
        failed = self.endpoint.failures - failures
        line = f"captions: {self.endpoint.answered - answered} new answers, {self.endpoint.kept - kept} kept ones"
        if failed:
            counts = ", ".join(f"{kind} {count}" for kind, count in failed.most_common())
            line += f"; {failed.total()} requests without an answer ({counts})"
        spent = ", ".join(f"{value:,.6g} {name}" for name, value in sorted(self.endpoint.budget.spent.items()))
        print(f"{line}; spent in this work root: {spent or 'nothing'}", file=sys.stderr)


def _content(text: str, pictures: Sequence[Picture]) -> Any:
    """The content of a message: a plain string, or pictures and then the text."""
    if not pictures:
        return text
    shown = [{"type": "image_url", "image_url": {"url": data_url(content)}} for content, _ in pictures]
    return [*shown, {"type": "text", "text": text}]


def _amounts(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
