"""How much of a training step's time is spent waiting for its batch, with latents of Wan2.1's real size.

A sample is the output of `encode-latents` for 81 frames of 480x832: 16 x 21 x 60 x 104 normalised means in bf16
(4.19 MB), and prompt states of 64 x 4,096. Six shards of two samples are on disk (``local``), or come over HTTP from a
server process on this machine, through a cache of three shards (``streamed``). The training loop's own loader and step
take one sample per step, shard by shard. So every second step begins a new shard: one is fetched and hashed, and an
older one dropped. ``shards_fetched`` and ``shards_dropped`` count this over the timed steps; a count of 0 is an error.

A transformer of one block of width 24, which attends to all 32,760 tokens of such a clip, takes a few seconds per step
on a CPU, like a step of the paper on its GPUs, which takes at most 6.05 s (100,000 in a week). A faster step hides less
loading, so ``prepare_seconds`` is the whole cost of one sample, including its part of fetching its shard: a step of at
least that length can hide it.

`ratio` is the share of waiting in all steps but the first, in the worse of the two cases; ``first_wait_seconds`` is the
wait of the first step, for which nothing was loaded ahead.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import UniViGUError

if TYPE_CHECKING:
    from univigu import UniViGUTransformer3DModel

STEPS = 11  # timed steps, after one warm-up step
SHARDS, ROWS, CACHED = 6, 2, 3
LATENTS = (16, 21, 60, 104)  # channels, frames, height, width
PROMPT, PROMPT_LENGTH, STATES, TEXT_LENGTH, VOCABULARY = 64, 512, 4096, 256, 512


def measure() -> dict[str, Any]:
    import torch

    from univigu.training.remote_shards import REMOTE, RemoteShards, put_shards

    with tempfile.TemporaryDirectory() as home:
        folder, bucket = Path(home) / "latents", Path(home) / "bucket"
        names = write_shards(folder)
        local = run(folder, names, None)
        put_shards(folder, names, str(bucket))
        size = (folder / names[0]).stat().st_size
        with server(bucket) as url:
            remote = (folder / REMOTE).read_text(encoding="utf-8").replace(str(bucket), url)
            (folder / REMOTE).write_text(remote, encoding="utf-8")
            streamed = run(folder, names, RemoteShards(folder, Path(home) / "cache", CACHED * size))
    return {
        "ratio": max(local["waiting_share"], streamed["waiting_share"]),
        "local": local,
        "streamed": streamed,
        "sample_megabytes": round(2 * torch.Size(LATENTS).numel() / 1e6, 2),
        "shard_megabytes": round(size / 1e6, 1),
        "threads": torch.get_num_threads(),
    }


def write_shards(folder: Path) -> list[str]:
    import torch

    from univigu.training.data import write_empty_prompt, write_latents

    names = [f"shards/{number:05d}/latents.safetensors" for number in range(SHARDS)]
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(2, VOCABULARY, (ROWS, TEXT_LENGTH), generator=generator)
        write_latents(
            folder / name,
            latents=torch.randn(ROWS, *LATENTS, generator=generator),
            prompt_embeds=[torch.randn(PROMPT, STATES, generator=generator) for _ in range(ROWS)],
            prompt_ids=ids,
            target_ids=ids,
        )
    write_empty_prompt(folder, torch.zeros(1, STATES))
    return names


def run(folder: Path, names: list[str], shards: Any) -> dict[str, float]:
    """Time some steps of the training loop: seconds per step, and the share of them that it waits for data.

    Raises `UniViGUError` if `shards` come from a store and none is fetched or dropped during the timed steps.
    """
    from univigu import ObjectiveConfig, TrainingObjective
    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
    from univigu.training.engine import TrainingConfig, init_distributed, make_engine
    from univigu.training.loader import load_ahead
    from univigu.training.loop import run_step, sample_order

    refs = [SampleRef(f"{name}-{row}", folder / name, row) for name in names for row in range(ROWS)]
    dataset = LatentDataset(refs, folder / EMPTY_PROMPT, PROMPT_LENGTH, shards)
    model = make_model()
    device = init_distributed()
    config = TrainingConfig(steps=STEPS + 1, batch_size=1, learning_rate=1e-4, shuffle_shards=1)
    engine = make_engine(TrainingObjective(model, ObjectiveConfig(shares={"generate": 1.0})), config, 1)
    seconds, waits, cached = [], [], []
    order, steps = sample_order(dataset, config), range(1, config.steps + 1)
    # pyrefly: ignore[bad-specialization]
    with closing(load_ahead(dataset, order, steps, slice(0, 1), 1)) as batches:
        for step in steps:
            started = time.perf_counter()
            micro = next(batches)
            waits.append(time.perf_counter() - started)
            run_step(engine, config, step, micro, device, lambda: False)
            seconds.append(time.perf_counter() - started)
            cached.append({path.name for path in shards.cache.glob("*.safetensors")} if shards else set())
    counts = count_changes(cached) if shards else {}
    started = time.perf_counter()
    for step in steps:
        dataset.batch(*order.batch(step))
    prepare = (time.perf_counter() - started) / len(steps)
    return {
        "waiting_share": round(sum(waits[1:]) / sum(seconds[1:]), 6),
        "step_seconds": round(statistics.median(seconds[1:]), 3),
        "longest_wait_seconds": round(max(waits[1:]), 4),
        "first_wait_seconds": round(waits[0], 3),
        "prepare_seconds": round(prepare, 4),
        **counts,
    }


def make_model() -> "UniViGUTransformer3DModel":
    """A small model, always with the same weights."""
    import torch

    from univigu import UniViGUTransformer3DModel

    torch.manual_seed(0)
    return UniViGUTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=24,
        num_layers=1,
        ffn_dim=96,
        text_dim=STATES,
        text_latent_dim=16,
        vocab_size=VOCABULARY,
        tokenizer_length=VOCABULARY,
        text_length=TEXT_LENGTH,
    )


def count_changes(cached: Sequence[set[str]]) -> dict[str, int]:
    """The numbers of shards that were fetched and dropped between steps; `cached` are the names after each step.

    Raises `UniViGUError` where one of them is zero: the timed steps then don't measure streaming.
    """
    changes = list(pairwise(cached))
    fetched = sum(len(after - before) for before, after in changes)
    dropped = sum(len(before - after) for before, after in changes)
    if not fetched or not dropped:
        raise UniViGUError(
            f"{fetched} shards were fetched and {dropped} dropped in {STEPS} timed steps, which don't measure "
            "streaming; time more steps, or use more shards than fit the cache."
        )
    return {"shards_fetched": fetched, "shards_dropped": dropped}


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP from a separate process; yields the URL."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        # pyrefly: ignore[missing-attribute, unsupported-operation]
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
