"""The benchmark `pairs`, for any dataset: compares content words, on pairs that the pipeline has held out.

Captions are compared with the reference captions of held-out stage-2 clips. Generated clips are compared with their
prompts, from a fixed file, by the model's own captions of the clips; so a poor captioner hides a good video, and a
scorer gives a second opinion. A claim is the stem of a content word; a text is right on a claim if it states it. Words
that more than half of the references share say nothing about a single clip, so they are not claims. No network is
needed.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.digests import json_digest
from components.prompts.filters import content_phrases
from univigu.errors import BadInputError, CorruptDataError, MissingInputError

if TYPE_CHECKING:
    import numpy as np

    from components.pipeline.step import Step

GROUPS = {
    "colour": "red orange yellow green blue purple violet pink brown black white grey gray golden silver turquoise",
    "number": "one two three four five six seven eight nine ten dozen several many single pair couple",
}
ATTRIBUTES = ("content", *GROUPS)
CLIP_KEYS = ("id", "shard", "member", "sha256", "frames", "height", "width")
COMMON = 0.5  # a word in a larger share of the references is not a claim
HAS_RECOGNISER = False
READ_AT_ONCE = 8  # clips
WORDS = {
    "captions": "held-out clips whose reference captions were not used in training; the score is the share of the "
    "reference's content words, compared by their stems, that the caption states",
    "majority": "a caption of the most common claims, as many as a reference has on average.",
    "generation": "fixed prompts",
    "reader": "The content of a video, the base's included, is read from the caption that this model writes for it, so "
    "the quality of its captions limits both scores.",
    "joint": "of these prompts. The content words of the model's caption of the video that aren't in the prompt are "
    "looked up in the text that was generated with it.",
}

Item = Mapping[str, Any]
Claims = dict[str, str]


def open_heldout(step: "Step") -> dict[str, Any]:
    """``captions``: held-out pairs of stage 2 whose clips have the profile's size; ``generations``, ``joint``: prompts.

    Of each kind as many as the profile asks for, or as there are. Raises `BadInputError` if there are none.
    """
    settings, video = step.settings.evaluate_model, step.settings.video
    size = (video.frames, video.height, video.width)
    pairs = step.read("pairs", "pairs").to_pylist()
    clips = {
        row["id"]: row
        for row in step.read("clips", "clips").to_pylist()
        if (row["frames"], row["height"], row["width"]) == size
    }
    kept = [row for row in pairs if row["stage"] == 2 and row["split"] == "heldout" and row["clip_id"] in clips]
    references = sorted(kept, key=lambda row: row["id"])[: settings.captions]
    if not references:
        raise BadInputError(
            f"No held-out pair of stage 2 has a clip of {'x'.join(map(str, size))}; raise "
            "`validate_data.heldout_share`, or make more clips."
        )
    common = common_stems([row["caption"] for row in references])
    captions = [
        {
            "id": row["clip_id"],
            "prompt": row["prompt"],
            "reference": row["caption"],
            "claims": {claim: value for claim, value in read_text(row["caption"]).items() if claim not in common},
            "seed": clips[row["clip_id"]]["seed"],
            "clip": {key: clips[row["clip_id"]][key] for key in CLIP_KEYS},
        }
        for row in references
    ]
    trained = {row["prompt"] for row in pairs if row["split"] == "train"}
    prompts = [item for item in read_prompts(step.inputs["heldout"]) if item["prompt"] not in trained]
    if not prompts:
        raise BadInputError("All prompts of the profile's 'heldout' were used in training; choose other prompts.")
    chosen = {
        "captions": captions,
        "generations": prompts[: settings.generations],
        "joint": prompts[: settings.joint],
    }
    sizes = [{**item, "clip": item["clip"]["sha256"]} for item in captions], chosen["generations"], chosen["joint"]
    return {"world": "pairs", "sha256": json_digest(sizes), **chosen}


def read_prompts(path: Path) -> list[Item]:
    """The prompts of a JSONL file with lines ``{"prompt": ...}``, each with an id and a seed."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = list(dict.fromkeys(str(line["prompt"]) for line in lines))
    except FileNotFoundError as error:
        raise MissingInputError(f"There are no prompts at {path}; check the profile's 'heldout'.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f'{path} is not JSONL with {{"prompt": "..."}} lines ({error}); correct it.') from error
    return [{"id": f"prompt-{number:03d}", "prompt": text, "seed": number} for number, text in enumerate(prompts)]


# --- claims of references, prompts and videos ------------------------------------------------------------------------


def truth(item: Item) -> Claims:
    """The claims of a held-out clip's reference caption."""
    return dict(item["claims"])


def render(items: Sequence[Item], clips: Path) -> "np.ndarray":
    """The held-out clips, uint8 (B, F, H, W, 3), each checked against its row."""
    import numpy as np

    from components.clips.archive import open_clip, read_clips

    rows = {item["clip"]["id"]: item["clip"] for item in items}
    frames = {row["id"]: open_clip(row, content)[0] for row, content in read_clips(clips, list(rows.values()))}
    return np.stack([frames[item["clip"]["id"]] for item in items])


def read_text(text: str) -> Claims:
    """The claims of a text: ``group:stem`` of each content word."""
    return {f"{_group(stem)}:{stem}": stem for stem in map(_stem, content_words(text))}


asked = read_text


def left_open(prompt: str, seen: Claims) -> list[str]:
    """The claims about a video that its prompt doesn't state."""
    return sorted(seen.keys() - asked(prompt).keys())


def majority(truths: Sequence[Claims]) -> Claims:
    """The most common claims, as many as a truth has on average."""
    counts = Counter(claim for claims in truths for claim in claims)
    number = round(sum(counts.values()) / len(truths))
    values = {claim: value for claims in truths for claim, value in claims.items()}
    return {claim: values[claim] for claim in sorted(counts, key=lambda claim: (-counts[claim], claim))[:number]}


def reader(pipeline: Any) -> Callable[["np.ndarray", Sequence[str] | None], list[Claims]]:
    """A reader of clips: returns the claims of the model's captions, which it writes if none are given."""

    def read(frames: "np.ndarray", texts: Sequence[str] | None) -> list[Claims]:
        written = texts or pipeline.caption(list(frames), seed=range(len(frames)), batch_size=READ_AT_ONCE)
        return [read_text(text) for text in written]

    return read


# --- words -----------------------------------------------------------------------------------------------------------


def content_words(text: str) -> list[str]:
    """The content words of a text, lower-case, in order, without duplicates."""
    words = (word.rpartition(":")[2] for phrase in content_phrases(text) for word in phrase)
    return list(dict.fromkeys(word for word in words if re.search(r"\w", word)))


def common_stems(texts: Sequence[str]) -> set[str]:
    """The claims that more than `COMMON` of the texts make, and more than two of them."""
    counts = Counter(claim for text in texts for claim in read_text(text))
    return {claim for claim, count in counts.items() if count > max(2, COMMON * len(texts))}


def _group(stem: str) -> str:
    return next((name for name, stems in _lexicon().items() if stem in stems), "content")


@cache
def _lexicon() -> dict[str, frozenset[str]]:
    return {name: frozenset(map(_stem, words.split())) for name, words in GROUPS.items()}


@cache
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")
