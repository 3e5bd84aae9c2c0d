"""Who writes captions: one module a captioner, named in the profile, with ``create(config) -> Captioner``.

The interface fits a program that measures frames and a language model behind an HTTP API alike. A captioner draws
requests as it has room for them, and gives every answer to `follow_up`, which judges it and says what to ask next:
so a batch can be answered at once, and a hundred conversations can go on side by side.
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
    """One clip to be described: what is seen, what was asked for, and what the caption must keep to."""

    id: str  # the clip's id: keys all randomness
    video_digest: str  # SHA-256 of the clip's file
    open: Callable[[], Clip]  # raises `BadInputError` for a damaged one
    prompt: str
    token_range: tuple[int, int]  # the profile's, EOS included, counted with the base's tokenizer
    attempt: int = 1
    last_text: str = ""
    complaint: str = ""  # what was wrong with `last_text`, in words


@dataclass(frozen=True)
class CaptionResponse:
    """What came back. `usage` counts whatever a service charges for (tokens, money); sums go into the manifest.

    A `success` is judged. A `truncated` text is asked for again, and so is a `success` with a `reason`: what keeps its
    text from being a caption. Any other status is the captioner's last word.
    """

    text: str
    status: Status = "success"
    detail: str = ""  # what is wrong with the text, in words
    usage: Mapping[str, float] | None = None
    reason: str = ""  # the slug to quarantine by, where the status doesn't say it


FollowUp = Callable[[CaptionRequest, CaptionResponse], CaptionRequest | None]
Answer = Callable[[Sequence[CaptionRequest], Sequence[Clip]], Sequence[CaptionResponse]]


class Captioner(Protocol):
    """Writes captions. `digest` changes whenever its captions may; `template_version` names its wording or prompt.

    `instructions` is what it tells a model to do, or empty: a caption must not repeat it.
    """

    name: str
    digest: str
    template_version: str
    instructions: str

    def check(self) -> None:
        """Raise as `caption` would, before there is a clip, for a service that can't be reached or can't do the job."""
        ...

    def caption(self, requests: Iterable[CaptionRequest], follow_up: FollowUp) -> None:
        """Answer every request, and every request that `follow_up` returns for an answer, in any order.

        `follow_up` gets exactly one response for each request; a request that fails alone gets a status, never an
        exception. Raises `TransientError` for a service that can't be reached, `ConfigError` for one that refuses
        everything, and `PreemptedError` when told to stop: the step ends, and its next run goes on.
        """
        ...


def load_captioner(name: str, config: Mapping[str, Any]) -> Captioner:
    """The captioner in ``components/captions/captioners/<name>.py``; raises `ConfigError` where there is none.

    config: the profile's whole `caption_videos` section, with the profile's `seed` added, the work `root`, and
    `answers`, a folder below it that outlives runs, for what a service was paid for.
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
        raise ConfigError(f"'{name}' is part of the captioners and none itself; name another in the profile.")
    return module.create(config)


def read_options(kind: type[T], config: Mapping[str, Any], name: str) -> T:
    """The profile's `caption_videos.options` as the dataclass of a captioner called `name`.

    Raises `ConfigError` for an option that the captioner doesn't have, lacks, or has of another type.
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
    """`Captioner.caption` for what answers `size` clips at once; a batch ends when `follow_up` asks no more of it.

    answer: from requests and their clips to a response for each, in order.
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
    """The response that all of what a model wrote makes: the caption in it, or what can't be told from a caption."""
    caption, complaint = extract_caption(text)
    return CaptionResponse(caption, usage=usage, reason="wrapping" if complaint else "", detail=complaint)


def damaged(error: BadInputError) -> CaptionResponse:
    """The response to a request whose clip can't be opened."""
    return CaptionResponse("", "error", str(error), reason="damaged")
