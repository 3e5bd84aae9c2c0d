"""Samples during training: captions of held-out clips and generated clips, logged to the MLflow run."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from components.training.tracked_run import TrackedRun
    from univigu import UniViGUPipeline, UniViGUTransformer3DModel
    from univigu.training.data import LatentDataset

SAMPLES = 4


def show_samples(
    transformer: "UniViGUTransformer3DModel",
    tokenizer: Any,
    heldout: "LatentDataset",
    sampling: Mapping[str, Any],
    step: int,
    pipeline: "UniViGUPipeline | None",
    tracked: "TrackedRun | None",
) -> None:
    """Sample from the first held-out samples.

    All processes must call this; only the one with a `pipeline` and a run decodes the clips and logs them.
    """
    import torch

    from univigu.mlflow_store import short_timeouts
    from univigu.training.previews import draw_samples

    samples = draw_samples(transformer, tokenizer, heldout, SAMPLES, sampling)
    if tracked is None or pipeline is None:
        return
    rows = [
        {"step": step, "sample": one.id, "prompt": one.prompt, "target": one.target, "said": one.caption}
        for one in samples
    ]
    print(f"sample at step {step}: {rows[0]['said'][:200]!r}", file=sys.stderr)
    videos = {}
    try:
        videos = {one.id: clip for one, clip in zip(samples, decode(pipeline, samples), strict=True)}
    except torch.OutOfMemoryError:
        print("The GPU has too little memory to decode the sampled clips; only captions are logged.", file=sys.stderr)
    with short_timeouts():  # training waits for this, and must not wait long for a server that is down
        tracked.log_samples(step, rows, videos, pipeline.config.fps)


def decode(pipeline: "UniViGUPipeline", samples: Sequence[Any]) -> list["np.ndarray"]:
    """The clips, uint8 (F, H, W, 3). The autoencoder is moved to the transformer's device meanwhile."""
    import torch

    from univigu import wan

    vae, vae_device = pipeline.vae, pipeline.vae.device
    device = pipeline.transformer.text_space.weight.device
    vae.to(device)
    if device.type == "cuda":
        vae.enable_tiling()
    try:
        return [wan.decode_latents(vae, one.latents[None].to(device))[0].numpy() for one in samples]
    finally:
        vae.disable_tiling()
        vae.to(vae_device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
