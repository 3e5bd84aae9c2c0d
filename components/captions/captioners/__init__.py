"""Captioners: one module each, named in the profile, with ``create(config) -> Captioner``.

The interface fits both a program that measures frames and a language model behind an HTTP API. A captioner takes
requests as fast as it can answer them, and passes every answer to `follow_up`, which judges it and returns the next
request. So it may answer in batches, or hold many conversations concurrently.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from components.checks.wrapping import extract_caption
from univigu.errors import BadInputError, ConfigError

if TYPE_CHECKING:
    import numpy as np

Status = Literal["success", "truncated", "blocked", "error", "skipped"]
Clip = tuple["np.ndarray", float]  # frames uint8 (F, H, W, 3), frames per second
T = TypeVar("T")


@dataclass(frozen=True)
class CaptionRequest:
    """One clip to be described: its frames, its prompt, and the limits of its caption."""

    id: str  # the clip's id, from which all randomness is seeded
    video_digest: str  # SHA-256 of the clip's file
    open: Callable[[], Clip]  # raises `BadInputError` if the clip is damaged
    prompt: str
    token_range: tuple[int, int]  # from the profile; EOS included, counted with the base's tokenizer
    attempt: int = 1
    last_text: str = ""
    complaint: str = ""  # what was wrong with `last_text`, as a sentence


@dataclass(frozen=True)
class CaptionResponse:
    """An answer. `usage` counts what a service charges for (tokens, money); the sums go into the manifest.

    A `success` is judged. After a `truncated` text, or a `success` with a `reason` (why its text is not a caption), the
    captioner is asked again. Any other status is final.
    """

    text: str
    status: Status = "success"
    detail: str = ""  # what is wrong with the text, as a sentence
    usage: Mapping[str, float] | None = None
    reason: str = ""  # the slug of the quarantined row; empty if it is the status


FollowUp = Callable[[CaptionRequest, CaptionResponse], CaptionRequest | None]
Answer = Callable[[Sequence[CaptionRequest], Sequence[Clip]], Sequence[CaptionResponse]]


class Captioner(Protocol):
    """Writes captions. `digest` changes whenever its captions may; `template_version` names its wording or prompt.

    `instructions` is the text that instructs its model, which a caption must not repeat; or empty.
    """

    name: str
    digest: str
    template_version: str
    instructions: str

    def check(self) -> None:
        """Raise as `caption` would if the service can't be reached or can't do the job; needs no clip."""
        ...

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        """Answer every request, and every request that `follow_up` returns for an answer, in any order.

        `follow_up` gets exactly one response per request. A failure that affects one request is a status, never an
        exception. Raises `TransientError` if the service can't be reached, `ConfigError` if it refuses everything, and
        `PreemptedError` after SIGTERM or SIGINT: the step ends, and its next run resumes.
        """
        ...


def load_captioner(name: str, config: Mapping[str, Any]) -> Captioner:
    """The captioner in ``components/captions/captioners/<name>.py``; raises `ConfigError` if there is none.

    config: the profile's `caption_videos` section, plus the profile's `seed`, the work `root`, and `answers`, a folder
    under it that outlives runs, for answers that were paid for.
    """
    try:
        module = import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ConfigError(
            f"There is no captioner '{name}'; name a module of components/captions/captioners."
        ) from error
    if not hasattr(module, "create"):
        raise ConfigError(
            f"'{name}' is a helper module of the captioners, not a captioner; name another in the profile."
        )
    return module.create(config)


def read_options(kind: type[T], config: Mapping[str, Any], name: str) -> T:
    """The profile's `caption_videos.options` as the dataclass of a captioner called `name`.

    Raises `ConfigError` for an option that is unknown, missing, or of the wrong type.
    """
    given = config.get("options") or {}
    known: dict[str, Any] = {field.name: field for field in fields(kind)}  # pyrefly: ignore[bad-argument-type]
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"The captioner '{name}' has no option '{unknown[0]}'; it has {', '.join(known)}.")
    for key, value in given.items():
        wanted = known[key].type
        if isinstance(value, bool) or not isinstance(value, wanted):
            kinds = " or ".join(getattr(each, "__name__", str(each)) for each in getattr(wanted, "__args__", (wanted,)))
            raise ConfigError(f"The option '{key}' of the captioner '{name}' is {value!r}; it must be {kinds}.")
    try:
        return kind(**given)
    except TypeError as error:
        missing = [key for key, field in known.items() if key not in given and not _has_default(field)]
        raise ConfigError(f"The captioner '{name}' needs `caption_videos.options.{missing[0]}`; add it.") from error


def _has_default(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is not MISSING or field.default_factory is not MISSING


def caption_in_batches(answer: Answer, requests: Iterable[CaptionRequest], follow_up: FollowUp, size: int) -> None:
    """`Captioner.caption` for a captioner that answers `size` clips at once; a batch ends when no clip has a follow-up.

    answer: maps requests and their clips to one response each, in order.
    """
    requests = iter(requests)
    while batch := list(islice(requests, size)):
        pending = []
        for request in batch:
            try:
                pending.append((request, request.open()))
            except BadInputError as error:
                follow_up(request, damaged(error))
        while pending:
            responses = answer([request for request, _ in pending], [clip for _, clip in pending])
            again = [
                (follow_up(request, response), clip)
                for (request, clip), response in zip(pending, responses, strict=True)
            ]
            pending = [(request, clip) for request, clip in again if request]


def read_text(text: str, usage: Mapping[str, float]) -> CaptionResponse:
    """The response for the whole text that a model wrote: its caption, or a complaint if it can't be extracted."""
    caption, complaint = extract_caption(text)
    return CaptionResponse(caption, usage=usage, reason="wrapping" if complaint else "", detail=complaint)


def damaged(error: BadInputError) -> CaptionResponse:
    """The response to a request if its clip can't be opened."""
    return CaptionResponse("", "error", str(error), reason="damaged")
