"""Step synthesize-videos: make one clip per prompt with a text-to-video generator, check it, and keep it as mp4."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.clips.generator import Sampling, load_generator, map_generated

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline

    from components.clips.gate import ClipCheck
    from components.pipeline.step import Step

TAR = "clips.tar"


def synthesize_videos(step: "Step") -> None:
    """Make the clips of the prompts. The generator is loaded only if at least one shard has to be made."""
    from components.clips.archive import join_tars, write_tar
    from components.clips.gate import gate_digests, load_gate

    settings = step.settings.synthesize_videos
    prompts = step.read("prompts", "prompts").sort_by("id").to_pylist()[: settings.clips]
    gate = load_gate(step.parameters["synthesize_videos"]["checks"], step.root)
    digests = gate_digests(gate)
    models = {"gate_models": digests} if digests else {}
    rows = [{**plan_clip(prompt, step.settings.seed, settings.stage_1_share), **models} for prompt in prompts]
    step.rows_in = len(rows)
    step.facts |= models
    sampling = Sampling(settings.steps, settings.guidance_scale, settings.negative_prompt, settings.arguments)

    @cache
    def generator() -> "DiffusionPipeline":
        return load_generator(
            step.inputs["generator"],
            settings.precision,
            vae_precision=settings.vae_precision,
            flow_shift=settings.flow_shift,
            offload=settings.offload,
            vae_memory=settings.vae_memory,
            attention_backend=settings.attention_backend,
            compiled=settings.compile == "blocks",
        )

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        def make_batch(batch: Sequence[Mapping[str, Any]], batch_folder: Path) -> list[dict[str, Any]]:
            parts = map_generated(partial(keep_good, step, gate), generator(), batch, step.settings.video, sampling)
            for part in parts:
                for refusal in part.refused:
                    step.reject(*refusal)
            write_tar(batch_folder / TAR, {name: mp4 for part in parts for name, mp4 in part.members.items()})
            return [clip for part in parts for clip in part.clips]

        batches = step.map_batches(shard, settings.batch_size, folder, make_batch)
        join_tars([batch_folder / TAR for batch_folder, _ in batches], folder / TAR)
        shard_name = f"shards/{folder.name.removeprefix('.')}/{TAR}"
        return [{**row, "shard": shard_name} for _, made in batches for row in made]

    step.write("clips", step.map_shards(rows, settings.shard_size, make_shard, unit="clips"))


class Judged(NamedTuple):
    """What the gate made of some clips."""

    clips: list[dict[str, Any]]  # rows of those that pass
    members: dict[str, bytes]  # their mp4s by member name
    refused: list[tuple[str, str, str, Mapping[str, Any]]]  # of the others: id, reason, detail, row


def keep_good(
    step: "Step", gate: Sequence["ClipCheck"], rows: Sequence[Mapping[str, Any]], videos: "np.ndarray"
) -> Judged:
    """Float videos (B, F, H, W, 3) as the gate judges them. It runs in several threads and changes nothing."""
    from components.clips.gate import examine
    from univigu.video import encode_mp4

    video = step.settings.video
    clips, members, refused = [], {}, []
    for row, frames, finding in examine(videos, rows, gate):
        if finding.reason:
            refused.append((row["id"], finding.reason, finding.detail, {**row, "scores": finding.scores}))
            continue
        content = encode_mp4(frames, video.fps)
        member = f"{row['id']}.mp4"
        members[member] = content
        clips.append(
            {
                **row,
                "generator": step.inputs["generator"].name,
                "generator_digest": step.input_digests["generator"],
                "frames": video.frames,
                "height": video.height,
                "width": video.width,
                "fps": video.fps,
                "sha256": hashlib.sha256(content).hexdigest(),
                "scores": json.dumps(dict(finding.scores), sort_keys=True),
                "member": member,
            }
        )
    return Judged(clips, members, refused)


def plan_clip(prompt: Mapping[str, Any], seed: int, stage_1_share: float) -> dict[str, Any]:
    """A prompt's clip before it is made: its id, seed and training stage, all derived from hashes."""
    clip_seed = _hash(f"seed {seed} {prompt['id']}") >> 32
    clip_id = f"{prompt['id']}-{clip_seed:08x}"
    stage = training_stage(clip_id, stage_1_share)
    return {"id": clip_id, "prompt_id": prompt["id"], "prompt": prompt["text"], "stage": stage, "seed": clip_seed}


def training_stage(clip_id: str, stage_1_share: float) -> int:
    """The training stage of a clip, 1 or 2; it depends on the id alone."""
    return 1 if _hash(f"stage {clip_id}") < stage_1_share * 2**64 else 2


def _hash(text: str) -> int:
    """A number below 2^64 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
