"""How much slower a training step on the CPU is beside other busy programs than alone.

Steps are the training loop's own, with a transformer and batches of the demo's size. The other programs are Python
processes in an endless loop; they start and stop during a run, so the run keeps the number of threads that it chose
when it was alone, and as many processes as the training step starts. A second run, alternating with the first, uses the
defaults: one process, all cores, unbounded spinning, and a loading thread with its own team of threads.

`ratio` is the median step beside one busy program over the median step alone, `beside_three` beside three of them, and
`alone_against_default` our step over the default's, both alone.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.pipeline.processes import MOST_ON_CPU, usable_cores
from univigu.errors import UniViGUError
from univigu.threads import bound_spinning

NEIGHBOURS = (0, 1, 3)  # numbers of busy programs beside a run, in turns
TURNS, STEPS = 2, 10  # turns per number of programs, and timed steps per turn
RUNS = 2  # runs with our settings and with the defaults, alternating
SAMPLES, BATCH = 240, 24
LATENTS, PROMPT, TEXT, VOCABULARY = (48, 3, 4, 4), 32, 48, 512
COUNT = "while True: pass"


def measure() -> dict[str, Any]:
    seconds: dict[str, dict[int, list[float]]] = {"ours": {}, "default": {}}
    threads: list[int] = []
    for _ in range(RUNS):
        for name, times in seconds.items():
            run = start_run(name)
            threads += [run["threads"] * run["processes"]] * (name == "ours")
            for count, values in run["seconds"].items():
                times.setdefault(int(count), []).extend(values)
    medians = {name: {count: round(statistics.median(of[count]), 4) for count in of} for name, of in seconds.items()}
    ours, default = medians["ours"], medians["default"]
    return {
        "ratio": round(ours[1] / ours[0], 3),
        "beside_three": round(ours[3] / ours[0], 3),
        "alone_against_default": round(ours[0] / default[0], 3),
        "default_ratio": round(default[1] / default[0], 3),
        "default_beside_three": round(default[3] / default[0], 3),
        "threads": threads,
        "seconds": medians,
    }


def start_run(name: str) -> dict[str, Any]:
    """The result of `train` in separate processes, with our settings or the defaults."""
    ours = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    launcher, count = [], min(usable_cores(), MOST_ON_CPU)
    if name == "ours" and count > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // count))
        launcher = ["-m", "univigu.training.launch", "--standalone", f"--nproc-per-node={count}"]
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, *launcher, "-m", __name__, name, home]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UniViGUError(f"The run to be timed ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train(name: str, home: Path) -> dict[str, Any]:
    """Train in this process, one of those that share `home`.

    Returns the seconds of each timed step by the number of busy programs, and the numbers of threads and processes.
    """
    if name == "ours":
        bound_spinning()
    import torch

    from univigu.training import loader, loop

    if name == "default":
        # pyrefly: ignore[bad-assignment]
        loader.side_threads = ThreadPoolExecutor
        # pyrefly: ignore[bad-assignment]
        loop.settle_threads = lambda *_: None
    seconds = time_steps(home)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {"seconds": seconds, "threads": torch.get_num_threads(), "processes": processes}


def time_steps(home: Path) -> dict[int, list[float]]:
    from univigu.training.engine import TrainingConfig
    from univigu.training.loop import train as train_loop

    situations = NEIGHBOURS * TURNS
    seconds: dict[int, list[float]] = {count: [] for count in NEIGHBOURS}
    dataset, heldout = write_datasets(home / f"data-{os.environ.get('RANK', '0')}")
    turn = STEPS + 1  # the first of a turn isn't timed
    config = TrainingConfig(len(situations) * turn, BATCH, 1e-4, checkpoint_every=1 << 30, heldout_every=1 << 30)
    with neighbours() as ask_for:
        last = [time.perf_counter()]

        def report(step: int, _: Mapping[str, float]) -> None:
            at, number = divmod(step - 1, turn)
            if number:
                seconds[situations[at]].append(time.perf_counter() - last[0])
            if step % turn == 0 and step < config.steps:
                ask_for(situations[at + 1])
            last[0] = time.perf_counter()

        train_loop(objective(), dataset, heldout, config, home / "run", report)
    return seconds


@contextmanager
def neighbours() -> Iterator[Any]:
    """Yield a function that sets the number of other processes that each keep a core busy; stops them at the end."""
    running: list[subprocess.Popen[bytes]] = []

    def ask_for(count: int) -> None:
        while len(running) < count:
            running.append(subprocess.Popen([sys.executable, "-c", COUNT]))
        while len(running) > count:
            one = running.pop()
            one.kill()
            one.wait()

    try:
        yield ask_for
    finally:
        ask_for(0)


def write_datasets(folder: Path) -> list[Any]:
    import torch

    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef, write_empty_prompt, write_latents

    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (SAMPLES, TEXT), generator=random)
    states = [torch.randn(PROMPT // 2, 64, generator=random) for _ in range(SAMPLES)]
    latents = torch.randn(SAMPLES, *LATENTS, generator=random)
    path = folder / "latents.safetensors"
    write_latents(path, latents=latents, prompt_embeds=states, prompt_ids=ids, target_ids=ids)
    write_empty_prompt(folder, torch.zeros(1, 64))
    refs = [SampleRef(f"{row}", path, row) for row in range(SAMPLES)]
    return [LatentDataset(part, folder / EMPTY_PROMPT, PROMPT) for part in (refs, refs[:1])]


def objective() -> Any:
    import torch

    from univigu import ObjectiveConfig, TrainingObjective, UniViGUTransformer3DModel

    torch.manual_seed(0)
    model = UniViGUTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=6,
        ffn_dim=512,
        patch_size=(1, 1, 1),
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        text_dim=64,
        text_latent_dim=16,
        vocab_size=VOCABULARY,
        tokenizer_length=VOCABULARY,
        text_length=TEXT,
    )
    return TrainingObjective(model, ObjectiveConfig(shares={"understand": 0.65, "joint": 0.1, "generate": 0.25}))


if __name__ == "__main__":
    found = train(sys.argv[1], Path(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
