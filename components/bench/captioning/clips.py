"""A work root of clips to caption, as earlier steps would write it; prompts are distinct and state all attributes."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from components.clips.archive import write_tar
from components.digits import world
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import SOURCE_ROOT
from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from univigu.video import encode_mp4

VIDEOS = 16  # distinct videos; the prompts distinguish the clips


def profile(options: Mapping[str, Any]) -> dict[str, Any]:
    """The profile `tiny` with the captioner `openai`."""
    made = load_profile("tiny")
    made["caption_videos"].update(captioner="openai", options=dict(options), shard_size=250, max_rejected_share=1.0)
    return made


def make_root(root: Path, settings: Mapping[str, Any], count: int, seed: int) -> dict[str, str]:
    """Fill `root` with `count` clips of stage 2, the base's tokenizer and `profile.yaml`; returns prompts by id."""
    (root / "profile.yaml").write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    shutil.copytree(SOURCE_ROOT / "model/tiny-wan/tokenizer", root / settings["base"] / "tokenizer")
    rng = np.random.default_rng(seed)
    everything: dict[str, dict[str, str]] = {}
    while len(everything) < count:
        attributes = world.sample_attributes(rng)
        everything[write_prompt(attributes)] = attributes
    shown = list(everything.values())[:VIDEOS]
    videos = world.render(shown, world.draw_scans(shown, world.train_scans(), seed), seed)
    contents = [encode_mp4(frames, world.FPS) for frames in videos]
    prompts = {f"c{number:05d}": prompt for number, prompt in enumerate(everything)}
    members, rows = {}, []
    for number, (clip, prompt) in enumerate(prompts.items()):
        content = contents[number % len(contents)]
        members[f"{clip}.mp4"] = content
        size = {"frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE, "fps": world.FPS}
        made = {"generator": "rendered", "generator_digest": "0", "sha256": hashlib.sha256(content).hexdigest()}
        place = {"scores": "{}", "shard": "shards/00000/clips.tar", "member": f"{clip}.mp4"}
        rows.append(
            {"id": clip, "prompt_id": clip, "prompt": prompt, "stage": 2, "seed": number, **size, **made, **place}
        )
    for step in ("synthesize-videos", "validate-clips"):
        home = root / find_stage(step).home
        (home / "shards/00000").mkdir(parents=True)
        if step == "synthesize-videos":
            write_tar(home / "shards/00000/clips.tar", members)
        write_table(home, "clips", rows)
        files = describe_files(home)
        write_manifest(home, {"step": step, "digest": files_digest(files), "files": files})
    return prompts


def write_prompt(attributes: Mapping[str, str]) -> str:
    """A prompt that states every attribute; the end follows from the others."""
    pace = {"slow": "slowly", "fast": "quickly"}[attributes["speed"]]
    return (
        f"a {attributes['colour']} {attributes['digit']} on {attributes['background']} "
        f"moving {attributes['direction']} {pace}, starting at the {attributes['start']}"
    )


def write_caption(prompt: str) -> str:
    """The caption that a good model writes for such a prompt."""
    said: dict[str, str | None] = {
        name: next(iter(values)) for name, values in world.read_text(prompt).items() if values
    }
    # pyrefly: ignore[bad-argument-type]
    said["end"] = world.end_place(said["start"], said["direction"], said["speed"])
    # pyrefly: ignore[bad-argument-type]
    return world.write_plain_caption(said)
