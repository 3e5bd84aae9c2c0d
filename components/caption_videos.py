"""Have every stage-2 clip described in detail, check each description, and ask again with the reason where it fails."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.checks import repeats_prompt
from univigu.errors import BadInputError

if TYPE_CHECKING:
    from components.captioners import Captioner, CaptionRequest, CaptionResponse
    from components.pipeline.runner import Step

Judge = Callable[["CaptionRequest", str], tuple[str, str] | None]  # (reason slug, complaint in words), or None


def caption_videos(step: "Step") -> None:
    """Clips that passed their gate -> a caption row for each, with a status; failures are quarantined as well."""
    from components.captioners import load_captioner
    from components.checks import load_checks
    from components.tokens import count_tokens, load_tokenizer

    settings, bounds = step["caption_videos"], tuple(step["text"]["caption_tokens"])
    rows = step.read("gate", "clips").sort_by("id").to_pylist()
    step.rows_in = len(rows)
    captioner = load_captioner(settings["captioner"], {**settings, "seed": step["seed"]})
    tokenizer = load_tokenizer(step.inputs["base"])
    checks = load_checks(settings["checks"], "check_caption")

    def judge(request: "CaptionRequest", text: str) -> tuple[str, str] | None:
        return find_fault(request, text, count_tokens(tokenizer, [text])[0], checks)

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        wanted, size = [row for row in shard if row["stage"] == 2], settings["batch_size"]
        batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        answers, damaged, captions = {}, {}, []
        for batch in step.progress(batches, unit="batches"):
            requests, unreadable = open_clips(step.inputs["clips"], batch, bounds)
            answers |= describe(captioner, requests, judge, settings["attempts"])
            damaged |= unreadable
        for row in shard:
            text, status, attempts, reason, detail, usage = None, "skipped", 0, None, "", {}
            if row["id"] in damaged:
                status, reason, detail = "error", "damaged", damaged[row["id"]]
            elif row["id"] in answers:
                text, status, attempts, reason, detail, usage = answers[row["id"]]
            if reason:
                step.reject(row["id"], reason, detail, {**row, "caption": text})
            captions.append(
                {
                    "clip_id": row["id"],
                    "text": text,
                    "n_tokens": count_tokens(tokenizer, [text])[0] if text else 0,
                    "status": status,
                    "attempts": attempts,
                    "captioner": captioner.name,
                    "captioner_digest": captioner.digest,
                    "template_version": captioner.template_version,
                    "usage": usage,
                }
            )
        return captions

    captions = step.map_shards(rows, settings["shard_size"], make_shard)
    step.facts["statuses"] = dict(sorted(Counter(row["status"] for row in captions).items()))
    step.facts["calls"] = sum(row["attempts"] for row in captions)
    step.facts["usage"] = dict(sorted(sum((Counter(row.pop("usage")) for row in captions), Counter()).items()))
    step.write("captions", captions)


def open_clips(
    folder: Path, rows: Sequence[Mapping[str, Any]], bounds: tuple[int, int]
) -> tuple[list["CaptionRequest"], dict[str, str]]:
    """A request for each clip that can be read, and for each other clip's id what is wrong with it."""
    from components.captioners import CaptionRequest
    from components.videos import open_clip, read_clips

    requests, damaged = [], {}
    for row, content in read_clips(folder, rows):
        try:
            frames, fps = open_clip(row, content)
        except BadInputError as error:
            damaged[row["id"]] = str(error)
            continue
        requests.append(CaptionRequest(row["id"], frames, fps, row["prompt"], bounds))
    return requests, damaged


def describe(captioner: "Captioner", requests: Sequence["CaptionRequest"], judge: Judge, attempts: int) -> dict:
    """Ask for all captions, and again (with the complaint) for those that fail, at most `attempts` times each.

    Returns by id: (text, status, attempts, reason slug or None, detail, usage).
    """
    answers: dict[str, tuple] = {}
    usage: dict[str, Counter] = {request.id: Counter() for request in requests}
    pending = list(requests)
    while pending:
        responses = captioner.caption(pending)
        again = []
        for request, response in zip(pending, responses, strict=True):
            usage[request.id].update(response.usage or {})
            status, fault = settle(request, response, judge)
            reason, detail = fault or (None, "")
            answers[request.id] = (response.text, status, request.attempt, reason, detail, dict(usage[request.id]))
            if fault and status not in ("blocked", "skipped") and request.attempt < attempts:
                again.append(replace(request, attempt=request.attempt + 1, last_text=response.text, complaint=detail))
        pending = again
    return answers


def settle(request: "CaptionRequest", response: "CaptionResponse", judge: Judge) -> tuple[str, tuple[str, str] | None]:
    """The status that one response earns, and its fault: a caption that fails a check is an `error`."""
    if response.status != "success":
        return response.status, (response.status, response.detail or f"the captioner answered '{response.status}'")
    fault = judge(request, response.text)
    return ("error" if fault else "success"), fault


def find_fault(request: "CaptionRequest", text: str, n_tokens: int, checks: Sequence[Any]) -> tuple[str, str] | None:
    """Why a caption can't be used, as (reason slug, complaint to the captioner), or None."""
    low, high = request.token_range
    if repeats_prompt(request.prompt, text):
        return "repeats_prompt", "it only repeats the prompt; describe the video in more detail"
    if n_tokens < low:
        return "too_short", f"it has {n_tokens} tokens and should have {low} to {high}; say more"
    if n_tokens > high:
        return "too_long", f"it has {n_tokens} tokens and should have {low} to {high}; say less"
    for check in checks:
        if complaint := check.check_caption(request.prompt, text):
            return "misses_prompt", complaint
    return None
