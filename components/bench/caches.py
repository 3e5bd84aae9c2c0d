"""diffusers' caches between the steps of a video: what they save, and what they lose, on the bundled digit world.

The bundled base and the bundled Uni-ViGU model each make the same videos from the same seeds in `STEPS` steps: without
a cache, with each of diffusers' caches that our blocks support, from careful to bold, and without a cache in fewer
steps, which is the alternative to any cache. On the CPU with one thread, in fp32. Each round makes the next `BATCH`
videos in all these ways, one after another, so that other load on the machine affects all of them. Of each way:

- ``skipped``: the share of the block passes that are not computed;
- ``ratio``: its processor time up to the latents over that of the same round without a cache, the median of the rounds;
- ``error``: the relative L2 distance of the latents from those without a cache, the mean of the videos;
- ``right``: the share of the attributes stated by the prompt that the recogniser sees in the video.

MagCache's ratios are calibrated on one video with another prompt and seed. `ratio` of the report is the largest of all
caches. What surrounds the blocks weighs more in a small model than at Wan's size, where a time is nearer to what is not
skipped.
"""

import io
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from univigu import UniViGUPipeline

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("model/tiny-wan", "model/tiny-univigu")
STEPS = 50  # Wan's own
FEWER = (25, 12)
VIDEOS, BATCH = 32, 8
THRESHOLDS = {"FirstBlockCache": (0.05, 0.1, 0.2), "MagCache": (0.06, 0.12, 0.24)}
INTERVALS = (2, 3, 5)  # of TaylorSeer: every such step is computed
CALIBRATED_ON = {"prompt": "a red five moves to the right", "seed": 20_260_413}


@dataclass
class Way:
    """A way to make the videos, and what it has made: tokens that went through blocks, seconds, latents."""

    name: str
    setting: str
    steps: int
    cache: Any = None  # one of diffusers' configurations
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    latents: list["Tensor"] = field(default_factory=list)


def measure() -> dict[str, Any]:
    import torch

    from components.digits import benchmark

    items = benchmark.load_heldout(ROOT / "data" / "heldout.json")["generations"][:VIDEOS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {name: compare(load(ROOT / name), items) for name in MODELS}
    finally:
        torch.set_num_threads(threads)
    caches = [row for model in models.values() for row in model["rows"] if row["cache"] != "none"]
    return {
        "ratio": max(row["ratio"] for row in caches),
        "models": models,
        "steps": STEPS,
        "videos": len(items),
        "threads": 1,
        "torch": torch.__version__,
    }


def load(folder: Path) -> "UniViGUPipeline":
    """A base, or a trained model."""
    from univigu import UniViGUPipeline

    trained = "UniViGU" in (folder / "model_index.json").read_text(encoding="utf-8")
    pipeline = (UniViGUPipeline.from_pretrained if trained else UniViGUPipeline.from_wan)(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare(pipeline: "UniViGUPipeline", items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of each way to make the videos of ``items`` (prompt, seed); the first row is without a cache."""
    plain, *others = ways(calibrate(pipeline))
    for number, start in enumerate(range(0, len(items), BATCH)):
        order = [plain, *others]
        for way in order if number % 2 else reversed(order):
            make(pipeline, way, items[start : start + BATCH])
    return {
        "guidance": pipeline.config.guidance_scale,
        "blocks": len(pipeline.transformer.blocks),
        "rows": [score(pipeline, way, plain, items) for way in (plain, *others)],
    }


def ways(mag_ratios: Sequence[float]) -> list[Way]:
    """All ways to make the videos; the first is without a cache."""
    import torch
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    found = [Way("none", "", STEPS)]
    for threshold in THRESHOLDS["FirstBlockCache"]:
        found.append(Way("FirstBlockCache", f"threshold {threshold:g}", STEPS, FirstBlockCacheConfig(threshold)))
    for threshold in THRESHOLDS["MagCache"]:
        config = MagCacheConfig(threshold, num_inference_steps=STEPS, mag_ratios=list(mag_ratios))
        found.append(Way("MagCache", f"threshold {threshold:g}", STEPS, config))
    for interval in INTERVALS:
        config = TaylorSeerCacheConfig(interval, taylor_factors_dtype=torch.float32, use_lite_mode=True)
        found.append(Way("TaylorSeer (lite)", f"interval {interval}", STEPS, config))
    return found + [Way("none", f"{steps} steps", steps) for steps in FEWER]


def calibrate(pipeline: "UniViGUPipeline") -> list[float]:
    """MagCache's ratio of each step, which diffusers prints, of the branch of guidance with the prompt."""
    from diffusers import MagCacheConfig

    printed = io.StringIO()
    with cached(pipeline, MagCacheConfig(num_inference_steps=STEPS, calibrate=True)), redirect_stdout(printed):
        pipeline(**CALIBRATED_ON, num_inference_steps=STEPS, output_type="latent")
    return json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))


@contextmanager
def cached(pipeline: "UniViGUPipeline", cache: Any) -> Iterator[None]:
    """Within the block, videos are made with a cache, if one is given."""
    if cache is None:
        yield
        return
    pipeline.transformer.enable_cache(cache)
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


def make(pipeline: "UniViGUPipeline", way: Way, items: Sequence[dict[str, Any]]) -> None:
    """Make the videos of ``items`` up to their latents, in one batch."""

    def count(_: Any, given: tuple["Tensor", ...], __: Any) -> None:
        way.tokens += given[0].shape[:-1].numel()  # a block may call it for a part of its tokens at a time

    hooks = [block.ffn.register_forward_hook(count) for block in pipeline.transformer.blocks]
    prompts, seeds = [item["prompt"] for item in items], [item["seed"] for item in items]
    given = {"num_inference_steps": way.steps, "seed": seeds, "batch_size": len(items), "output_type": "latent"}
    try:
        with cached(pipeline, way.cache):
            started = time.process_time()
            way.latents.append(pipeline(prompts, **given).frames)
            way.seconds.append(time.process_time() - started)
    finally:
        for hook in hooks:
            hook.remove()


def score(pipeline: "UniViGUPipeline", way: Way, plain: Way, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of one way in the report."""
    import torch

    from components.digits import benchmark
    from univigu.outputs import to_frames

    ours, theirs = torch.cat(way.latents), torch.cat(plain.latents)
    distance = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    frames = to_frames(pipeline.vae, ours, "uint8")
    right = [
        seen[name] == value
        for item, seen in zip(items, benchmark.recognise(frames), strict=True)
        for name, value in benchmark.asked(item["prompt"]).items()
    ]
    return {
        "cache": way.name,
        "setting": way.setting,
        "skipped": round(1 - way.tokens / plain.tokens, 4),
        "seconds": round(sum(way.seconds) / len(items), 4),
        "ratio": round(statistics.median(a / b for a, b in zip(way.seconds, plain.seconds, strict=True)), 4),
        "error": round(float(distance.mean()), 4),
        "right": round(sum(right) / len(right), 4),
    }
