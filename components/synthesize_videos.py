"""Make one clip a prompt with the base generator, check each, and keep them as mp4 in tar shards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from diffusers import WanPipeline

    from components.pipeline.runner import Step


def synthesize_videos(step: "Step") -> None:
    """Prompts -> clips. The generator is loaded only when at least one shard has to be made."""
    from components.checks import load_checks

    settings = step["synthesize_videos"]
    prompts = step.read("prompts", "prompts").sort_by("id").to_pylist()[: settings["clips"]]
    rows = [plan_clip(prompt, step["seed"], settings["stage_1_share"]) for prompt in prompts]
    step.rows_in = len(rows)
    checks = load_checks(settings["checks"], "check")
    generator = cache(lambda: load_generator(step.inputs["base"], settings["precision"]))

    def make_shard(shard: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
        from components.videos import write_tar
        from univigu.video import encode_mp4

        size, clips, members = settings["batch_size"], [], {}
        batches = [shard[start : start + size] for start in range(0, len(shard), size)]
        for batch in step.progress(batches, unit="batches"):
            videos = generate(generator(), batch, step["video"], settings, step["text"]["prompt_length"])
            for row, frames, finding in examine(videos, batch, checks):
                if finding.reason:
                    step.reject(row["id"], finding.reason, finding.detail, {**row, "scores": finding.scores})
                    continue
                content = encode_mp4(frames, step["video"]["fps"])
                member = f"{row['id']}.mp4"
                members[member] = content
                clips.append(
                    {
                        **row,
                        "generator": step.inputs["base"].name,
                        "generator_digest": step.input_digests["base"],
                        **{key: step["video"][key] for key in ("frames", "height", "width", "fps")},
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "scores": json.dumps(dict(finding.scores), sort_keys=True),
                        "shard": f"shards/{folder.name.removeprefix('.')}/clips.tar",
                        "member": member,
                    }
                )
        write_tar(folder / "clips.tar", members)
        return clips

    step.write("clips", step.map_shards(rows, settings["shard_size"], make_shard))


def plan_clip(prompt: Mapping[str, Any], seed: int, stage_1_share: float) -> dict[str, Any]:
    """What is known of a prompt's clip before it is made: its id, seed and training stage, from hashes alone."""
    clip_seed = _hash(f"seed {seed} {prompt['id']}") >> 32
    clip_id = f"{prompt['id']}-{clip_seed:08x}"
    stage = 1 if _hash(f"stage {clip_id}") < stage_1_share * 2**64 else 2
    return {"id": clip_id, "prompt_id": prompt["id"], "prompt": prompt["text"], "stage": stage, "seed": clip_seed}


def _hash(text: str) -> int:
    """A number below 2^64 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def load_generator(folder: Path, precision: str) -> "WanPipeline":
    """The text-to-video pipeline in `folder`, on the GPU if there is one; `precision` is its transformer's."""
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in kinds:
        raise ConfigError(f"There is no precision '{precision}'; choose one of {', '.join(kinds)}.")
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
        pipeline = WanPipeline.from_pretrained(folder, vae=vae, dtype=kinds[precision], local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no Wan pipeline in diffusers' layout at {folder} ({str(error).splitlines()[0]}); "
            "check the profile's 'base'."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(
    pipeline: "WanPipeline",
    rows: Sequence[Mapping[str, Any]],
    video: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompt_length: int,
) -> "np.ndarray":
    """Clips float (B, F, H, W, 3) in [0, 1], one for each row; each has its own noise, so its batch doesn't matter."""
    import torch

    if video["height"] % 16 or video["width"] % 16 or (video["frames"] - 1) % pipeline.vae_scale_factor_temporal:
        raise ConfigError(
            f"Wan can't make {video['frames']} frames of {video['height']}x{video['width']}; choose sides that are "
            f"multiples of 16 and {pipeline.vae_scale_factor_temporal}k + 1 frames in the profile's 'video'."
        )
    return pipeline(
        prompt=[row["prompt"] for row in rows],
        negative_prompt="",
        num_frames=video["frames"],
        height=video["height"],
        width=video["width"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
        max_sequence_length=prompt_length,
        output_type="np",
    ).frames


def examine(videos: "np.ndarray", rows: Sequence[Mapping[str, Any]], checks: Sequence[Any]) -> list[tuple]:
    """(row, frames uint8, finding) for each clip of float videos (B, F, H, W, 3); the first reason found stands."""
    import numpy as np

    from components.checks import Finding

    finite = np.isfinite(videos).all(axis=(1, 2, 3, 4))
    frames = (np.nan_to_num(videos) * 255).round().clip(0, 255).astype(np.uint8)
    findings = [check.check(frames, rows) for check in checks]
    results = []
    for index, row in enumerate(rows):
        seen = [found[index] for found in findings]
        scores = {name: score for finding in seen for name, score in finding.scores.items()}
        stopped = next((finding for finding in seen if finding.reason), Finding())
        if not finite[index]:
            stopped = Finding(reason="broken", detail="the generator's output holds values that are not finite")
        results.append((row, frames[index], Finding(scores, stopped.reason, stopped.detail)))
    return results
