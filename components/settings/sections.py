"""All sections of a profile except those of the model and its training."""

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
from univigu.errors import ConfigError

REJECTED = "The step fails when it rejects a larger share of its rows than this"
SHARD = "Rows per shard; a killed run keeps its finished shards"


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
        longest = self.prompt_tokens[1]
        if longest > self.prompt_length:
            yield "prompt_length", f"is {self.prompt_length} and prompts have up to {longest} tokens; raise it"

    def require_longer_captions(self) -> None:
        """Raise `ConfigError` if a caption may be as short as a prompt: the two stages need different lengths.

        Importing and captioning don't need this, so it is not a rule of the section.
        """
        longest, fewest = self.prompt_tokens[1], self.caption_tokens[0]
        if fewest <= longest:
            raise ConfigError(
                f"'text.caption_tokens' begins at {fewest}; a caption must be longer than any prompt, so begin above "
                f"{longest}."
            )


class Fit(Section):
    """How far a clip may be changed to fit a bucket."""

    upscale: Positive = setting("Largest enlargement, as a factor")
    cut: Share = setting("Cut off at most this share of its area")
    speed: Annotated[tuple[Positive, Positive], Strict(False)] = setting("Smallest and largest speed-up, as factors")
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
    """Facts that files of prompts don't contain."""

    source: str = Field("", description="The source of rows without one")
    licence: str = Field("", description="The licence of rows without one")
    columns: Columns = Field(Columns(), description="Which column holds what, if the names aren't the usual ones")


class Filters(Section):
    """The prompt filters: off, score (noted in the row's scores; the row stays) or enforce."""

    unicode: Mode = setting("Text that is not clean Unicode")
    licence: Mode = setting("Licences that aren't listed in `licences`")
    prompt_injection: Mode = setting("Instructions to a language model")
    personal_data: Mode = setting("Addresses, telephone numbers and similar data")
    unsafe: Mode = setting("Unsafe content, by word lists and by the file's own probabilities")
    language: Mode = setting("Languages that aren't listed in `languages`")
    length: Mode = setting("Prompts outside `text.prompt_tokens`")
    unknown_tokens: Mode = setting("Text that the base's tokenizer doesn't know")
    exact_duplicates: Mode = setting("Prompts that say the same in the same words")
    near_duplicates: Mode = setting("Prompts that share most of their words")
    semantic_duplicates: Mode = setting("Prompts that mean the same; needs `embedding_model`")
    diversity: Mode = setting("Prompts with too many similar ones; needs `embedding_model`")


class Diversity(Section):
    """When a prompt has too many similar ones."""

    cosine: Cosine = setting("Smallest cosine similarity at which two prompts are similar")
    neighbours: Size = setting("Number of similar earlier prompts that is too many", "prompts")


class CuratePrompts(Section):
    """Which raw prompts are kept."""

    max_rejected_share: Share = setting(REJECTED)
    languages: list[Name] = setting("Languages that are kept, as ISO 639-1 codes")
    licences: list[Name] = setting("Licences that are kept, as SPDX identifiers")
    sources: dict[str, PromptSource] = foreign_table(
        "Facts that files don't contain, by file name patterns: source, licence, columns"
    )
    filters: Filters = setting("What each filter does: off, score or enforce")
    unsafe_probability: Share = setting("Smallest probability, in a column such as VidProM's, at which a row is unsafe")
    near_duplicate_jaccard: Share = setting("Smallest Jaccard similarity at which two prompts are near duplicates")
    near_duplicate_min_features: Count = setting(
        "Shorter prompts must be equal to be near duplicates", "words and pairs of words"
    )
    embedding_model: str = setting("Folder of a sentence-embedding model, for the last two filters")
    semantic_duplicate_cosine: Cosine = setting("Smallest cosine similarity at which two prompts mean the same")
    diversity: Diversity = setting("When a prompt has too many similar ones")


class CaptionQuality(Section):
    """What an independent reader, which wrote no caption, thinks of the captions."""

    mode: Mode = setting(
        "off, score (the scores are kept) or enforce (pairs below `least` are quarantined as `caption_quality`)",
        default="off",
    )
    model: str = setting("Folder of a CLIP-like model; empty: the recogniser of the built-in toy dataset", default="")
    least: Cosine = setting(
        "Lowest score: cosine similarity of frames and caption, or the share of its claims that the recogniser sees",
        default=0.0,
    )


class ValidateData(Section):
    """What the gates between steps ask for."""

    min_rows: Count = setting("Fewest rows with which a gate passes", "rows")
    heldout_share: Share = setting("Share of each stage's pairs that is held out for measuring losses")
    caption_checks: list[CaptionCheck] = setting("Checks of captions, each a name, or {name: {setting: value}}")
    caption_quality: CaptionQuality = Field(
        CaptionQuality(), description="Whether captions fit their clips, as an independent reader sees it"
    )
    max_rejected_share: Share = setting(REJECTED)


class ClipCheck(Section):
    """A check of clips: its mode, and the settings of its own."""

    model_config = ConfigDict(extra="allow")

    mode: Mode = setting("off, score (the figures are kept) or enforce (clips that fall short are quarantined)")


class SynthesizeVideos(Section):
    """How clips are generated, and which are kept."""

    max_rejected_share: Share = setting(REJECTED)
    clips: Size = setting("Largest number of clips; one per prompt, in the order of the prompts' ids", "clips")
    stage_1_share: Share = setting("Share of the clips for stage 1; the rest is for stage 2")
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips that are generated together", "clips")
    steps: Size = setting("Denoising steps of a clip", "steps")
    guidance_scale: NotNegative = setting("Scale of classifier-free guidance; up to 1: none")
    negative_prompt: str = setting("Prompt that guidance steers away from")
    arguments: dict[str, Any] = foreign_table("More arguments of the generator's call, by their names")
    flow_shift: Positive | None = setting("Above 1: more steps near the noise; null: the scheduler's own")
    precision: Precision = setting("Precision of the generator's parts except the autoencoder")
    vae_precision: Precision = setting("Precision of the autoencoder")
    offload: Literal["none", "model", "sequential"] = setting(
        "What is offloaded to CPU memory: slower, but needs less GPU memory"
    )
    vae_memory: list[Literal["tiling", "slicing"]] = setting("How the autoencoder saves memory")
    attention_backend: str = setting(
        "diffusers' attention backend: flash, _flash_3, sage or others; empty: torch's own"
    )
    compile: Literal["none", "blocks"] = setting(
        "Blocks: let torch compile the transformer's blocks; the first clips take minutes more"
    )
    checks: dict[Name, ClipCheck] = setting("Checks of clips, by name, each with its mode and settings")


class ImportVideos(Section):
    """`univigu data import`."""

    max_rejected_share: Share = setting(REJECTED)
    shard_size: Size = setting(SHARD, "videos")
    scenes: Literal["cut", "ignore"] = setting("Cut a video at its changes of scene, or take it as one scene")
    scene_threshold: Positive = setting("A change of scene is this many times as large as the changes around it")
    take: Literal["head", "windows", "uniform", "squeeze"] = setting(
        "What becomes of a longer scene. At its own speed: its first clip, clip after clip, or at most `most` clips "
        "spread over it; squeeze: one clip of all of it, sped up within `video.fit.speed`"
    )
    overlap: Annotated[float, Field(ge=0, le=0.9)] = setting("Share of a clip that the next one may repeat")
    most: Size = setting("Clips of a scene, with uniform", "clips")


class CaptionVideos(Section):
    """Who captions the clips, and what a caption must pass."""

    max_rejected_share: Share = setting(REJECTED)
    captioner: Name = setting("measured, openai, transformers, or a module of your own: docs/captioning.md")
    options: dict[str, Any] = foreign_table("The captioner's own options: docs/captioning.md")
    wordings: Size = setting("Number of wordings of the captioner `measured`; 1: only the plain one", "wordings")
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips in memory at a time, captioned together if the captioner supports it", "clips")
    attempts: Size = setting("How often the captioner is asked about one clip", "attempts")
    checks: list[CaptionCheck] = setting(
        "What a caption must pass besides its token range, each a name, or {name: {setting: value}}"
    )


class EncodeLatents(Section):
    """How clips and texts are encoded."""

    max_rejected_share: Share = setting(REJECTED)
    shard_size: Size = setting(SHARD, "clips")
    batch_size: Size = setting("Clips that are encoded together", "clips")
    precision: Precision = setting("Precision of the text encoder")


class EvaluateModel(Section):
    """What the trained model is measured on."""

    benchmark: Name = setting("digits or stories, for the worlds of the built-in toy dataset, or pairs, for any other")
    captions: Count = setting("Held-out clips to caption, at most", "clips")
    generations: Count = setting("Held-out prompts to generate videos from", "prompts")
    joint: Count = setting("Held-out prompts for joint sampling of video and text", "prompts")
    batch_size: Size = setting("Items that are sampled together", "items")
    precision: Precision = setting("Precision of both models' transformers and text encoders")
    attention_backend: str = setting("Diffusers' name of an implementation: flash, _flash_3 ...; empty: torch's own")
    compile: Literal["none", "blocks"] = setting(
        "Blocks: let torch compile both transformers' blocks; the first batches take minutes more"
    )
    compared_caption_steps: list[Size] = setting("Caption the same clips again in each of these numbers of Euler steps")
    base_steps: Size = setting("Denoising steps of the base, for comparison", "steps")
    base_guidance: NotNegative = setting("Guidance scale of the base")
    scorers: dict[str, str] = foreign_table("Models that judge generated videos: name and folder, {clip: model/FOLDER}")


class RegisterModel(Section):
    """What the model is called in the registry, and when it becomes the champion."""

    name: Name = setting("The registered model's name")
    champion_metric: Name = setting("The score by which a candidate must beat the champion")
    least_scores: dict[Name, Share] = foreign_table(
        "Scores that a version needs to be promoted, {captions.mean: 0.5}; with less it stays a candidate"
    )
    promotion: Literal["automatic", "manual"] = setting("Manual: a person or an orchestrator promotes the candidate")
