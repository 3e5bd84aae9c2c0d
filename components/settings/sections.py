"""The sections that make the data and judge the model: everything in a profile but training."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict

from components.settings.fields import (
    CaptionCheck,
    Cosine,
    Count,
    Mode,
    Name,
    NotNegative,
    Positive,
    Precision,
    Range,
    Section,
    Share,
    Size,
    foreign_table,
    setting,
)

REJECTED = "The step fails when it rejects a larger share of its rows than this"
SHARD = "Rows in a shard: what a killed run keeps is a whole number of shards"


class Text(Section):
    """How long prompts and captions may be."""

    prompt_tokens: Range = setting(
        "Fewest and most tokens of a prompt, EOS included; the base's tokenizer counts", "tokens"
    )
    caption_tokens: Range = setting("Fewest and most tokens of a caption, EOS included; above any prompt's", "tokens")
    prompt_length: Size = setting("max_sequence_length of the text encoder: its states are zero-padded to it", "tokens")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        for key in ("prompt_tokens", "caption_tokens"):
            fewest, most = getattr(self, key)
            if fewest > most:
                yield key, f"is [{fewest}, {most}]; put the smaller number first"
        longest, fewest = self.prompt_tokens[1], self.caption_tokens[0]
        if fewest <= longest:
            yield (
                "caption_tokens",
                f"begins at {fewest}; a caption must be longer than any prompt, so begin above {longest}",
            )
        if longest > self.prompt_length:
            yield "prompt_length", f"is {self.prompt_length} and prompts have up to {longest} tokens; raise it"


class Fit(Section):
    """How far a clip may be changed to fit a bucket."""

    upscale: Positive = setting("Enlarge it at most so many times")
    cut: Share = setting("Cut off at most this share of its area")
    speed: Annotated[tuple[Positive, Positive], Strict(False)] = setting("Slowest and fastest speed that it may get")
    hdr: Literal["tone_map", "quarantine"] = setting("Map HDR videos to SDR, or quarantine them")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        if self.speed[0] > self.speed[1]:
            yield "speed", f"is {list(self.speed)}; put the smaller number first"


class Video(Section):
    """The size of the clips."""

    frames: Size = setting("Frames of a clip; 4k + 1 for Wan", "frames")
    height: Size = setting("Height of a clip", "pixels")
    width: Size = setting("Width of a clip", "pixels")
    fps: Size = setting("Frame rate of a clip", "frames per second")
    buckets: list[Annotated[tuple[Size, Size, Size], Strict(False)]] = setting(
        "Sizes that clips are fitted to, each [frames, height, width]; none: the one size above"
    )
    fit: Fit = setting("How far a clip may be changed to fit a bucket")


class Columns(Section):
    """Which column of a file of prompts holds what."""

    text: str | None = Field(None, description="The prompt")
    source: str | None = Field(None, description="The source of a row")
    licence: str | None = Field(None, description="The licence of a row")
    id: str | None = Field(None, description="The id of a row")
    unsafe: str | list[str] | None = Field(None, description="Probabilities of unsafe content")


class PromptSource(Section):
    """What files of prompts don't say of themselves."""

    source: str = Field("", description="The source of rows that name none")
    licence: str = Field("", description="The licence of rows that name none")
    columns: Columns = Field(Columns(), description="Which column holds what, where the names aren't the usual ones")


class Filters(Section):
    """The prompt filters: off, score (noted in the row's scores; the row stays) or enforce."""

    unicode: Mode = setting("Text that is no clean Unicode")
    licence: Mode = setting("Licences that aren't listed in `licences`")
    prompt_injection: Mode = setting("Instructions to a language model")
    personal_data: Mode = setting("Addresses, telephone numbers and the like")
    unsafe: Mode = setting("Unsafe content, by word lists and by the file's own probabilities")
    language: Mode = setting("Languages that aren't listed in `languages`")
    length: Mode = setting("Prompts outside `text.prompt_tokens`")
    unknown_tokens: Mode = setting("Text that the base's tokenizer doesn't know")
    exact_duplicates: Mode = setting("Prompts that say the same in the same words")
    near_duplicates: Mode = setting("Prompts that share most of their words")
    semantic_duplicates: Mode = setting("Prompts that mean the same; needs `embedding_model`")
    diversity: Mode = setting("Prompts that have many others close by; needs `embedding_model`")


class Diversity(Section):
    """When a prompt has too many others close by."""

    cosine: Cosine = setting("From this cosine similarity on, another prompt is close")
    neighbours: Size = setting("Earlier prompts that close, of which one is too many", "prompts")


class CuratePrompts(Section):
    """Which raw prompts are kept."""

    max_rejected_share: Share = setting(REJECTED)
    languages: list[Name] = setting("Languages that are kept, as ISO 639-1 codes")
    licences: list[Name] = setting("Licences that are kept, as SPDX identifiers")
    sources: dict[str, PromptSource] = foreign_table(
        "What files don't say of themselves, by patterns of their names: source, licence, columns"
    )
    filters: Filters = setting("What each filter does: off, score or enforce")
    unsafe_probability: Share = setting("From this probability on, in a column such as VidProM's, a row is unsafe")
    near_duplicate_jaccard: Share = setting("From this Jaccard similarity on, two prompts are near duplicates")
    near_duplicate_min_features: Count = setting(
        "Shorter prompts must be equal to be near duplicates", "words and pairs of words"
    )
    embedding_model: str = setting("Folder of a sentence-embedding model, for the last two filters")
    semantic_duplicate_cosine: Cosine = setting("From this cosine similarity on, two prompts mean the same")
    diversity: Diversity = setting("When a prompt has too many others close by")


class ValidateData(Section):
    """What the gates between steps ask for."""

    min_rows: Count = setting("A gate over fewer rows fails", "rows")
    heldout_share: Share = setting("Share of each stage's pairs that is held out, for losses to be measured on")
    caption_checks: list[CaptionCheck] = setting("Checks of captions, each a name, or {name: {setting: value}}")
    max_rejected_share: Share = setting(REJECTED)


class ClipCheck(Section):
    """A check of clips: its mode, and the settings of its own."""

    model_config = ConfigDict(extra="allow")

    mode: Mode = setting("off, score (the figures are kept) or enforce (clips that fall short are quarantined)")


class SynthesizeVideos(Section):
    """How clips are generated, and which are kept."""

    max_rejected_share: Share = setting(REJECTED)
    clips: Size = setting("How many to make at most: one for each prompt, prompts in the order of their ids", "clips")
    stage_1_share: Share = setting("Share of the clips for stage 1; the rest is for stage 2")
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips that are generated together", "clips")
    steps: Size = setting("Denoising steps of a clip", "steps")
    guidance_scale: NotNegative = setting("Scale of classifier-free guidance; up to 1: none")
    negative_prompt: str = setting("What guidance leads away from")
    arguments: dict[str, Any] = foreign_table("More arguments of the generator's call, by their names")
    flow_shift: Positive | None = setting("Above 1: more of the steps near the noise; null: as its scheduler says")
    precision: Precision = setting("Of all the generator's parts but the autoencoder")
    vae_precision: Precision = setting("Of the autoencoder")
    offload: Literal["none", "model", "sequential"] = setting(
        "What waits in the CPU's memory: slower, and needs less of the GPU's"
    )
    vae_memory: list[Literal["tiling", "slicing"]] = setting("How the autoencoder saves memory")
    attention_backend: str = setting("Of diffusers: flash, _flash_3, sage and others; empty: torch's own")
    checks: dict[Name, ClipCheck] = setting("Checks of clips, by name, each with its mode and settings")


class ImportVideos(Section):
    """`univigu data import`."""

    max_rejected_share: Share = setting(REJECTED)
    shard_size: Size = setting(SHARD, "videos")


class CaptionVideos(Section):
    """Who captions the clips, and what a caption must pass."""

    max_rejected_share: Share = setting(REJECTED)
    captioner: Name = setting("measured, openai, transformers, or a module of your own: docs/captioning.md")
    options: dict[str, Any] = foreign_table("The captioner's own options: docs/captioning.md")
    wordings: Size = setting("Ways in which the captioner `measured` words a caption; 1: the plain one", "wordings")
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips in memory at a time, which the captioner answers together if it can", "clips")
    attempts: Size = setting("How often the captioner is asked about one clip", "attempts")
    checks: list[CaptionCheck] = setting(
        "What a caption must pass besides its token range, each a name, or {name: {setting: value}}"
    )


class EncodeLatents(Section):
    """How clips and texts are encoded."""

    max_rejected_share: Share = setting(REJECTED)
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips that are encoded together", "clips")
    precision: Precision = setting("Of the text encoder")


class EvaluateModel(Section):
    """What the trained model is measured on."""

    benchmark: Name = setting("digits, for the built-in toy dataset, or pairs, for any other")
    captions: Count = setting("Held-out clips to caption, or as many as there are", "clips")
    generations: Count = setting("Held-out prompts to generate videos from", "prompts")
    joint: Count = setting("Held-out prompts to make video and text of jointly", "prompts")
    batch_size: Size = setting("Items that are sampled together", "items")
    precision: Precision = setting("Of both models' transformers and text encoders")
    compared_caption_steps: list[Size] = setting("Caption the same clips again in each of these numbers of Euler steps")
    base_steps: Size = setting("Denoising steps of the base, for comparison", "steps")
    base_guidance: NotNegative = setting("Guidance scale of the base")
    scorers: dict[str, str] = foreign_table("Models that judge generated videos: name and folder, {clip: model/FOLDER}")


class RegisterModel(Section):
    """What the model is called in the registry, and when it becomes the champion."""

    name: Name = setting("The registered model's name")
    champion_metric: Name = setting("The score by which a candidate must beat the champion")
    promotion: Literal["automatic", "manual"] = setting("Manual: a person or an orchestrator promotes the candidate")
