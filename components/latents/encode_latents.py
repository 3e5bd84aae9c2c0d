"""Step encode-latents: encode every pair once, so that training reads only latents, prompt states and token ids."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.clips.buckets import Misfit, choose_bucket, list_buckets
from components.latents.encoders import Encoders
from components.pipeline.digests import json_digest, tree_digest
from components.pipeline.fingerprint import code_digest, fingerprint
from univigu.errors import BadInputError
from univigu.threads import side_threads

if TYPE_CHECKING:
    from torch import Tensor

    from components.latents.encoders import Encoders
    from components.latents.reuse import Encoded
    from components.pipeline.step import Step

Row = Mapping[str, Any]
SHARD = "latents.safetensors"


def encode_latents(step: "Step") -> None:
    """Write shards of normalised latent means, prompt states and token ids of the pairs, and the table `latents`.

    A shard holds clips of one bucket. Tensors of the same clips and prompts in an earlier output are reused.
    """
    import shutil

    from components.latents.reuse import Encoded
    from univigu.training.data import EMPTY_PROMPT, write_empty_prompt
    from univigu.wan import check_autoencoder

    settings, text, base = step.settings.encode_latents, step.settings.text, step.inputs["base"]
    check_autoencoder(base, list_buckets(step.settings.video))
    rows = fit_to_buckets(step, join_clips(step))
    if not rows:
        raise BadInputError("No clip fits a bucket of the profile's 'video'; check its 'buckets' and 'fit'.")
    digests = part_digests(base)
    step.facts |= {"buckets": dict(Counter(str(row["bucket"]) for row in rows)), **code_facts(step)}
    encoders = Encoders(base, settings.precision, text.prompt_length, text.caption_tokens[1])
    encoded = cache(lambda: Encoded(step.previous, step.facts, settings.batch_size))

    @cache
    def empty() -> "Tensor":
        found = encoded().empty_states(digests)
        return encoders.encode_texts([""])[0] if found is None else found

    def make_shard(shard: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
        # Written with each shard, so that a resumed run with all shards finished needs no encoder.
        write_empty_prompt(folder, empty())
        made = encode_shard(step, encoders, encoded(), shard, folder)
        shard_name = f"shards/{folder.name.removeprefix('.')}/{SHARD}"
        return [{**row, "shard": shard_name, "row": number} for number, row in enumerate(made)]

    planned = [{**row, "latents_row": latents_row(row, digests)} for row in rows]
    latents = step.map_shards(planned, settings.shard_size, make_shard, unit="clips", group=lambda row: row["bucket"])
    shutil.copyfile(step.out / "shards" / "00000" / EMPTY_PROMPT, step.out / EMPTY_PROMPT)
    step.write("latents", latents)


# --- what there is to encode -----------------------------------------------------------------------------------------


def join_clips(step: "Step") -> list[dict[str, Any]]:
    """Each pair with its clip's row; raises `BadInputError` if there are no pairs, or if a clip no longer exists."""
    clips = {row["id"]: row for row in step.read("clips", "clips").to_pylist()}
    pairs = step.read("pairs", "pairs").to_pylist()
    if not pairs:
        raise BadInputError("There are no pairs to encode; check what the earlier steps quarantined.")
    if lost := {pair["clip_id"] for pair in pairs} - clips.keys():
        raise BadInputError(
            f"{len(lost)} clips of the pairs no longer exist, such as {min(lost)}; run the steps from "
            "'synthesize-videos' on again, in order."
        )
    step.rows_in = len(pairs)
    return [{**clips[pair["clip_id"]], **pair} for pair in pairs]


def fit_to_buckets(step: "Step", rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their `bucket`, sorted by bucket and within one by the clips' shards, so each is opened once.

    A row that fits no bucket is quarantined.
    """
    video, fitted = step.settings.video, []
    for row in rows:
        frames = row["frames"] * video.fps / row["fps"]
        bucket = choose_bucket(frames, row["height"], row["width"], video)
        if isinstance(bucket, Misfit):
            step.reject(row["id"], bucket.reason, bucket.detail, row)
        else:
            fitted.append({**row, "bucket": bucket})
    return sorted(fitted, key=lambda row: (row["bucket"], row["shard"], row["member"], row["id"]))


def code_facts(step: "Step") -> dict[str, str]:
    """Digests of the code and settings behind latents and states; the next run compares them in the manifest."""

    def code(*entries: str) -> str:
        return code_digest(fingerprint(entries))

    settings = step.settings.encode_latents
    read = ("components.clips.archive:open_clip", "univigu.video:fit_frames")
    video = [
        code("components.latents.encoders:latent_means", "components.latents.encoders:load_vae", *read),
        settings.batch_size,
    ]
    loaders = ("components.latents.encoders:load_text_encoder", "components.prompts.tokens:load_tokenizer")
    text = [code("components.latents.encoders:text_states", *loaders), settings.batch_size, settings.precision]
    return {"video_code": json_digest(video), "text_code": json_digest([*text, step.settings.text.prompt_length])}


def part_digests(base: Path) -> dict[str, str]:
    """Digests of the parts of a base that the tensors depend on."""
    parts = {"vae_digest": "vae", "tokenizer_digest": "tokenizer", "text_encoder_digest": "text_encoder"}
    return {name: tree_digest([base / part], relative_to=base) for name, part in parts.items()}


def latents_row(row: Row, digests: Mapping[str, str]) -> dict[str, Any]:
    """A sample's row of the table `latents` before it is encoded, without its place in a shard."""
    return {
        **{key: row[key] for key in ("id", "stage", "split")},
        **digests,
        **row["bucket"]._asdict(),
        "video_sha256": row["sha256"],
        "prompt_sha256": hashlib.sha256(row["prompt"].encode()).hexdigest(),
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows, and what was read for them: tensors of an earlier output, or the frames of their clips."""

    rows: Sequence[Row]
    latents: "list[Tensor] | None"  # (C, T, H', W') each
    states: "list[Tensor] | None"  # (length, D) each
    frames: "dict[str, Tensor]"  # by id: uint8 (F, H, W, 3), in the bucket's size
    faults: dict[str, str]  # by id: why a clip can't be read


def encode_shard(
    step: "Step", encoders: "Encoders", encoded: "Encoded", rows: Sequence[Row], folder: Path
) -> list[dict[str, Any]]:
    """Write the tensors of `rows` into `folder`; returns their rows of `latents`, in the order of the tensors."""
    size = step.settings.encode_latents.batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    numbers = {batch[0]["id"]: number for number, batch in enumerate(batches)}
    with side_threads(1, "read-clips") as reader:
        ahead: dict[int, Future[Batch]] = {}

        def make_batch(batch: Sequence[Row], batch_folder: Path) -> list[dict[str, Any]]:
            number = numbers[batch[0]["id"]]
            for wanted in range(number, min(number + 2, len(batches))):  # read the next while this one is encoded
                if wanted not in ahead:
                    ahead[wanted] = reader.submit(read_batch, step, encoded, batches[wanted])
            return encode_batch(step, encoders, ahead.pop(number).result(), batch_folder / SHARD)

        made = step.map_batches(rows, size, folder, make_batch)
    parts = [batch_folder / SHARD for batch_folder, kept in made if kept]
    if parts:
        join_shards(parts, folder / SHARD)
    return [row for _, kept in made for row in kept]


def join_shards(parts: Sequence[Path], path: Path) -> None:
    """Write the samples of shards of one bucket, in order, as one shard at `path`."""
    import torch
    from safetensors.torch import load_file, save_file

    shards = [load_file(part) for part in parts]
    save_file({name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}, path)


def read_batch(step: "Step", encoded: "Encoded", rows: Sequence[Row]) -> Batch:
    """Read tensors of an earlier output for some rows, or their clips if it doesn't have their latents."""
    import torch

    from components.clips.archive import open_clip, read_clips
    from univigu.video import fit_frames

    latents_rows = [row["latents_row"] for row in rows]
    batch = Batch(rows, encoded.latents(latents_rows), encoded.states(latents_rows), {}, {})
    if batch.latents is None:
        for row, content in read_clips(step.inputs["clips"], rows):
            try:
                clip, _ = open_clip(row, content)
                batch.frames[row["id"]] = torch.from_numpy(fit_frames(clip, *row["bucket"]))
            except BadInputError as error:
                batch.faults[row["id"]] = str(error)
    return batch


def encode_batch(step: "Step", encoders: "Encoders", batch: Batch, path: Path) -> list[dict[str, Any]]:
    """Write the tensors of a batch to `path`; returns the rows of `latents` of its samples.

    A clip that can't be read is quarantined as `damaged`, and one with latents that are not finite as `not_finite`. If
    no sample is left, no file is written.
    """
    import torch

    from univigu.training.data import write_latents

    ids = list(batch.frames) if batch.latents is None else [row["id"] for row in batch.rows]
    latents = encoders.encode_clips(list(batch.frames.values())) if batch.latents is None else batch.latents
    made = dict(zip(ids, latents, strict=True))
    states = batch.states or encoders.encode_texts([row["prompt"] for row in batch.rows])
    kept = []
    for row, text in zip(batch.rows, states, strict=True):
        if row["id"] not in made:
            step.reject(row["id"], "damaged", batch.faults[row["id"]], _plain(row))
        elif not torch.isfinite(made[row["id"]]).all():
            step.reject(row["id"], "not_finite", "its latents are not all finite numbers", _plain(row))
        else:
            kept.append((row, text))
    if kept:
        write_latents(
            path,
            latents=torch.stack([made[row["id"]] for row, _ in kept]),
            prompt_embeds=[text for _, text in kept],
            prompt_ids=encoders.token_ids([row["prompt"] for row, _ in kept]),
            target_ids=encoders.token_ids([target_text(row) for row, _ in kept]),
        )
    return [dict(row["latents_row"]) for row, _ in kept]


def _plain(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "latents_row"}


def target_text(row: Row) -> str:
    """The text that the model learns to write about the video: the prompt in stage 1, the caption in stage 2."""
    return row["prompt"] if row["stage"] == 1 else row["caption"]
