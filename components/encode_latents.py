"""Encode every pair once, so that training reads tensors only: video latents, prompt states, token ids."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from univigu.errors import BadInputError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from components.pipeline.runner import Step


SHARD = "latents.safetensors"
_COPIED = ("id", "stage", "split", "frames", "height", "width")


class Encoders(NamedTuple):
    """The parts of a base that turn samples into tensors."""

    vae: Any
    text_encoder: Any
    tokenizer: Any


def encode_latents(step: "Step") -> None:
    """Pairs and their clips -> shards of normalised latent means, prompt states and token ids, and a row for each."""
    import shutil

    from components.pipeline.digests import tree_digest
    from univigu.training.data import EMPTY_PROMPT

    settings, base = step["encode_latents"], step.inputs["base"]
    clips = {row["id"]: row for row in step.read("clips", "clips").to_pylist()}
    pairs = step.read("pairs", "pairs").to_pylist()
    if not pairs:
        raise BadInputError("There is no pair to encode; look at what the steps before quarantined.")
    if lost := {pair["clip_id"] for pair in pairs} - clips.keys():
        raise BadInputError(
            f"The pairs name {len(lost)} clips that are no longer there, such as {min(lost)}; "
            "run the steps since 'synthesize-videos' again, in order."
        )
    # In the order of the clips' shards, so that each of those is opened once.
    rows = sorted(
        ({**clips[p["clip_id"]], **p} for p in pairs), key=lambda row: (row["shard"], row["member"], row["id"])
    )
    step.rows_in = len(rows)
    digests = {
        "vae_digest": tree_digest([base / "vae"], relative_to=base),
        "tokenizer_digest": tree_digest([base / "tokenizer"], relative_to=base),
    }
    encoders = cache(lambda: load_encoders(base, settings["precision"]))

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        made = encode_shard(step, encoders(), shard, folder)
        place = {"shard": f"shards/{folder.name.removeprefix('.')}/{SHARD}"}
        return [
            {**{key: row[key] for key in _COPIED}, **digests, **place, "video_sha256": row["sha256"], "row": number}
            for number, row in enumerate(made)
        ]

    latents = step.map_shards(rows, settings["shard_size"], make_shard)
    shutil.copyfile(step.out / "shards" / "00000" / EMPTY_PROMPT, step.out / EMPTY_PROMPT)
    step.write("latents", latents)


def encode_shard(
    step: "Step", encoders: Encoders, rows: Sequence[Mapping[str, Any]], folder: Path
) -> list[Mapping[str, Any]]:
    """Write the tensors of `rows` into `folder`; returns those that could be read, in the order of the tensors."""
    import torch

    from univigu.training.data import write_empty_prompt, write_latents
    from univigu.wan import encode_frames

    text = step["text"]
    size = step["encode_latents"]["batch_size"]
    # With each shard, so that a resumed run which finds all shards finished needs no encoder.
    write_empty_prompt(folder, unpadded_states(encoders, [""], text["prompt_length"])[0])
    kept: list[Mapping[str, Any]] = []
    latents, states = [], []
    for batch in step.progress(_batches(readable_clips(step, rows), size), -(-len(rows) // size), unit="batches"):
        kept += [row for row, _ in batch]
        latents.append(encode_frames(encoders.vae, torch.stack([frames for _, frames in batch])).bfloat16().cpu())
        states += unpadded_states(encoders, [row["prompt"] for row, _ in batch], text["prompt_length"])
    if kept:
        length = text["caption_tokens"][1]
        write_latents(
            folder / SHARD,
            latents=torch.cat(latents),
            prompt_embeds=states,
            prompt_ids=token_ids(encoders.tokenizer, [row["prompt"] for row in kept], length),
            target_ids=token_ids(encoders.tokenizer, [target_text(row) for row in kept], length),
        )
    return kept


def readable_clips(step: "Step", rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], "Tensor"]]:
    """Each row and its frames uint8 (F, H, W, 3); what can't be read is quarantined as `damaged`."""
    import torch

    from components.videos import open_clip, read_clips

    for row, content in read_clips(step.inputs["clips"], rows):
        try:
            frames, _ = open_clip(row, content)
        except BadInputError as error:
            step.reject(row["id"], "damaged", str(error), row)
            continue
        yield row, torch.from_numpy(frames)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def target_text(row: Mapping[str, Any]) -> str:
    """What the model should say about the video: the prompt in stage 1, the caption in stage 2."""
    return row["prompt"] if row["stage"] == 1 else row["caption"]


def load_encoders(folder: Path, precision: str) -> Encoders:
    """The VAE (always fp32), the text encoder (in `precision`) and the tokenizer of a base; the rest stays on disk."""
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    from components.tokens import load_tokenizer
    from univigu.wan import check_text_encoder

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in kinds:
        raise ConfigError(f"There is no precision '{precision}'; choose one of {', '.join(kinds)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
        text_encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=kinds[precision])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no Wan base in diffusers' layout at {folder} ({str(error).splitlines()[0]}); "
            "check the profile's 'base'."
        ) from error
    check_text_encoder(text_encoder)
    return Encoders(vae.to(device).eval(), text_encoder.to(device).eval(), load_tokenizer(folder))


def unpadded_states(encoders: Encoders, prompts: Sequence[str], prompt_length: int) -> list["Tensor"]:
    """Text-encoder states of each prompt, (length, D), without the zeros that Wan pads them with."""
    from univigu.wan import encode_prompts

    padded = encode_prompts(encoders.tokenizer, encoders.text_encoder, prompts, prompt_length)
    return [states[: int(states.any(-1).sum())].cpu() for states in padded]


def token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> "Tensor":
    """Texts as ids (N, length): EOS, then PAD to the end; raises `BadInputError` for a text that doesn't fit."""
    from components.tokens import count_tokens
    from univigu.text_space import tokenize

    for text, count in zip(texts, count_tokens(tokenizer, texts), strict=True):
        if count > length:
            raise BadInputError(
                f"A text has {count} tokens, over the profile's {length} ('{text[:60]}'); run the pairs' gate again."
            )
    return tokenize(tokenizer, texts, length)
