"""The step caption-videos: caption each stage-2 clip, check each caption, and ask again with the reason if it fails."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captions.captioners import CaptionRequest, load_captioner
from components.checks import CaptionCheck, load_caption_checks
from components.checks.refusal import refusal
from components.checks.repetition import repetition
from components.checks.texts import damage, echo, repeats_prompt
from components.checks.wrapping import wrapping
from components.pipeline.state import STATE
from components.prompts.tokens import count_tokens, load_tokenizer
from univigu.errors import GateFailedError

if TYPE_CHECKING:
    from components.captions.captioners import Captioner, CaptionRequest, CaptionResponse
    from components.pipeline.step import Step

HOPELESS = 50  # if none of this many first clips gets a caption, the step stops and doesn't pay for the rest

Judge = Callable[["CaptionRequest", str], tuple[str, str] | None]  # (reason slug, complaint in words), or None


def caption_videos(step: "Step") -> None:
    """Clips that passed their gate -> one caption row per clip, with a status; failures are also quarantined."""
    settings, bounds = step.settings.caption_videos, step.settings.text.caption_tokens
    tokenizer = load_tokenizer(step.inputs["base"])
    checks = load_caption_checks(settings.checks)
    captioner = open_captioner(step.parameters, step.root)
    # The digest is part of the rows, so that a shard is reused only while the captioner would write the same captions.
    rows = [
        {**row, "captioner_digest": captioner.digest} for row in step.read("gate", "clips").sort_by("id").to_pylist()
    ]
    step.rows_in = len(rows)

    def judge(request: "CaptionRequest", text: str) -> tuple[str, str] | None:
        return find_fault(request, text, count_tokens(tokenizer, [text])[0], captioner.instructions, checks)

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        wanted = [row for row in shard if row["stage"] == 2]
        conversations = Conversations(judge, settings.attempts)
        requests = make_requests(step.inputs["clips"], wanted, bounds)
        captioner.caption(step.progress(requests, len(wanted), "clips"), conversations.follow_up)
        captions = []
        for row in shard:
            outcome = conversations.outcomes[row["id"]] if row["stage"] == 2 else Outcome(None, "skipped", attempts=0)
            if outcome.reason:
                clip = {name: value for name, value in row.items() if name != "captioner_digest"}
                step.reject(row["id"], outcome.reason, outcome.detail, {**clip, "caption": outcome.text})
            n_tokens = count_tokens(tokenizer, [outcome.text])[0] if outcome.text else 0
            captions.append(caption_row(row["id"], outcome, n_tokens, captioner))
        return captions

    captions = step.map_shards(rows, settings.shard_size, make_shard)
    step.facts["statuses"] = dict(sorted(Counter(row["status"] for row in captions).items()))
    step.facts["calls"] = sum(row["attempts"] for row in captions)
    usage = sum((Counter(row.pop("usage")) for row in captions), Counter())
    step.facts["usage"] = {name: round(amount, 6) for name, amount in sorted(usage.items())}
    step.write("captions", captions)
    step.rows_out -= step.reasons.total()  # a clip without a caption keeps its row but counts as quarantined


def caption_row(clip_id: str, outcome: "Outcome", n_tokens: int, captioner: "Captioner") -> dict[str, Any]:
    """A row of the table `captions`."""
    return {
        "clip_id": clip_id,
        "text": outcome.text,
        "n_tokens": n_tokens,
        "status": outcome.status,
        "attempts": outcome.attempts,
        "captioner": captioner.name,
        "captioner_digest": captioner.digest,
        "template_version": captioner.template_version,
        "usage": dict(outcome.usage),
    }


def open_captioner(profile: Mapping[str, Any], root: Path) -> "Captioner":
    """The profile's captioner, with the answers that are kept under `root`; raises as its `create` does."""
    settings, answers = profile["caption_videos"], root / STATE / "answers" / "caption-videos"
    return load_captioner(
        settings["captioner"], {**settings, "seed": profile["seed"], "root": root, "answers": answers}
    )


@dataclass(frozen=True)
class Outcome:
    """The result for one clip. `attempts` counts how often the captioner was asked about it."""

    text: str | None
    status: str
    reason: str | None = None
    detail: str = ""
    attempts: int = 1
    usage: Mapping[str, float] = field(default_factory=Counter)


class Conversations:
    """The conversation about each clip: judges every answer, and asks again if that can help."""

    def __init__(self, judge: Judge, attempts: int) -> None:
        self.judge, self.attempts = judge, attempts
        self.outcomes: dict[str, Outcome] = {}
        self.failed: Counter[str] = Counter()  # reasons of the clips that were rejected for good
        self.captioned = False  # whether any clip has a caption

    def follow_up(self, request: "CaptionRequest", response: "CaptionResponse") -> "CaptionRequest | None":
        """Record the outcome of an answer; returns the next request, with the complaint, or None (see `FollowUp`).

        Raises `GateFailedError` if all of the first `HOPELESS` clips fail.
        """
        before = self.outcomes.get(request.id)
        usage = Counter(before.usage if before else {}) + Counter(response.usage or {})
        status, fault = settle(request, response, self.judge)
        reason, detail = fault or (None, "")
        attempts = 0 if reason == "damaged" else request.attempt
        self.outcomes[request.id] = Outcome(response.text or None, status, reason, detail, attempts, usage)
        if fault and response.status in ("success", "truncated") and request.attempt < self.attempts:
            return replace(request, attempt=request.attempt + 1, last_text=response.text, complaint=detail)
        self.captioned |= not fault
        self.failed.update([reason] if reason else [])
        if not self.captioned and self.failed.total() >= HOPELESS:
            counts = ", ".join(f"{name} {count}" for name, count in self.failed.most_common())
            raise GateFailedError(
                f"None of the first {HOPELESS} clips got a usable caption ({counts}; the last: {detail}), so the step "
                "stopped; try another model or template, or correct `text.caption_tokens`."
            )
        return None


def make_requests(
    folder: Path, rows: Sequence[Mapping[str, Any]], bounds: tuple[int, int]
) -> Iterator["CaptionRequest"]:
    """The first request for each clip, in order; frames are decoded when they are needed."""
    from components.clips.archive import open_clip, read_clips

    for row, content in read_clips(folder, rows):
        yield CaptionRequest(row["id"], row["sha256"], partial(open_clip, row, content), row["prompt"], bounds)


def settle(request: "CaptionRequest", response: "CaptionResponse", judge: Judge) -> tuple[str, tuple[str, str] | None]:
    """The status of one response, and its fault: a caption that fails a check is an `error`, a refusal is `blocked`."""
    if response.status != "success":
        detail = response.detail or f"the captioner answered '{response.status}'"
        return response.status, (response.reason or response.status, detail)
    if response.reason:
        return "error", (response.reason, response.detail)
    fault = judge(request, response.text)
    return ("success" if not fault else "blocked" if fault[0] == "refusal" else "error"), fault


def find_fault(
    request: "CaptionRequest", text: str, n_tokens: int, instructions: str, checks: Sequence[CaptionCheck]
) -> tuple[str, str] | None:
    """What is wrong with a caption, as (reason slug, complaint to the captioner), or None."""
    low, high = request.token_range
    if not text.strip():
        return "empty", "it was empty; describe the video"
    if found := damage(text):
        return "damaged_text", f"{found}; write plain text"
    if repeats_prompt(request.prompt, text):
        return "repeats_prompt", "it only repeats the prompt; describe the video in more detail"
    if found := refusal(text):
        return "refusal", f"it says '{found}'; the video was made by a computer: say what is seen in it"
    if found := echo(instructions, text):
        return "echoes_instructions", f"it repeats the instructions ('{found}'); describe the video instead"
    if n_tokens < low:
        return "too_short", f"it has {n_tokens} tokens and should have {low} to {high}; say more"
    if n_tokens > high:
        return "too_long", f"it has {n_tokens} tokens and should have {low} to {high}; say less"
    for check in checks:
        if complaint := check.find(request.prompt, text):
            return check.reason, complaint
    # These come last: a complaint is part of the next request's digest, so another order would ask, and pay, again.
    if found := wrapping(text):
        return "wrapping", found
    if found := repetition(text):
        return "repetition", f"it says '{found}' over and over; say each thing once"
    return None
