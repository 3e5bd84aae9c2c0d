"""Make one clip a prompt with a text-to-video generator, check each, and keep them as mp4 in tar shards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.clips.generator import PLACEMENT, generate, load_generator

if TYPE_CHECKING:
    from components.pipeline.step import Step

TAR = "clips.tar"


def synthesize_videos(step: "Step") -> None:
    """Prompts -> clips. The generator is loaded only when at least one shard has to be made."""
    from components.clips.archive import join_tars, write_tar
    from components.clips.gate import gate_digests, load_gate

    settings = step["synthesize_videos"]
    prompts = step.read("prompts", "prompts").sort_by("id").to_pylist()[: settings["clips"]]
    gate = load_gate(settings["checks"], step.root)
    digests = gate_digests(gate)
    models = {"gate_models": digests} if digests else {}
    rows = [{**plan_clip(prompt, step["seed"], settings["stage_1_share"]), **models} for prompt in prompts]
    step.rows_in = len(rows)
    step.facts |= models
    placement = {name: settings[name] for name in PLACEMENT}
    generator = cache(lambda: load_generator(step.inputs["generator"], settings["precision"], **placement))

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        def make_batch(batch: Sequence[Mapping[str, Any]], place: Path) -> list[dict[str, Any]]:
            clips, members = keep_good(step, gate, batch, generate(generator(), batch, step["video"], settings))
            write_tar(place / TAR, members)
            return clips

        batches = step.map_batches(shard, settings["batch_size"], folder, make_batch)
        join_tars([place / TAR for place, _ in batches], folder / TAR)
        shard_name = f"shards/{folder.name.removeprefix('.')}/{TAR}"
        return [{**row, "shard": shard_name} for _, made in batches for row in made]

    step.write("clips", step.map_shards(rows, settings["shard_size"], make_shard, unit="clips"))


def keep_good(
    step: "Step", gate: Sequence[Any], rows: Sequence[Mapping[str, Any]], videos: Any
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Of float videos (B, F, H, W, 3), those that the gate lets pass: their rows, and their mp4s by member name."""
    from components.clips.gate import examine
    from univigu.video import encode_mp4

    clips, members = [], {}
    for row, frames, finding in examine(videos, rows, gate):
        if finding.reason:
            step.reject(row["id"], finding.reason, finding.detail, {**row, "scores": finding.scores})
            continue
        content = encode_mp4(frames, step["video"]["fps"])
        member = f"{row['id']}.mp4"
        members[member] = content
        clips.append(
            {
                **row,
                "generator": step.inputs["generator"].name,
                "generator_digest": step.input_digests["generator"],
                **{key: step["video"][key] for key in ("frames", "height", "width", "fps")},
                "sha256": hashlib.sha256(content).hexdigest(),
                "scores": json.dumps(dict(finding.scores), sort_keys=True),
                "member": member,
            }
        )
    return clips, members


def plan_clip(prompt: Mapping[str, Any], seed: int, stage_1_share: float) -> dict[str, Any]:
    """What is known of a prompt's clip before it is made: its id, seed and training stage, from hashes alone."""
    clip_seed = _hash(f"seed {seed} {prompt['id']}") >> 32
    clip_id = f"{prompt['id']}-{clip_seed:08x}"
    stage = training_stage(clip_id, stage_1_share)
    return {"id": clip_id, "prompt_id": prompt["id"], "prompt": prompt["text"], "stage": stage, "seed": clip_seed}


def training_stage(clip_id: str, stage_1_share: float) -> int:
    """Which stage of training a clip is for, 1 or 2: always the same for one clip."""
    return 1 if _hash(f"stage {clip_id}") < stage_1_share * 2**64 else 2


def _hash(text: str) -> int:
    """A number below 2^64 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
