"""Odd inputs, made from good ones with stored seeds, at what reads them: a `UniViGUError` or a result, nothing else.

What is not told from a good input may be taken; what raises anything else, hangs, ends the process or takes a GiB of
memory is a finding.
"""

import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos import good, server
from tests.chaos.mutations import Mutation, either, of_bytes, of_values
from tests.chaos.shim import Fault
from univigu.errors import UniViGUError

SECONDS = 20  # for one input
MEMORY = 2**30  # bytes that a batch of inputs may add to what the process has
BATCH = 200


class Target(NamedTuple):
    """What reads an input. `file`: where it finds it, in a folder that `good` filled with what belongs to it."""

    name: str
    read: Callable[[Path], Any]
    files: tuple[str, ...]  # in the folder of good inputs; each is mutated
    mutate: Mutation
    inputs: int  # of a full run


def targets() -> list[Target]:
    json_values = either(of_bytes, of_values(_dump_json), of_values(_dump_json))
    return [
        Target("profiles", good.read_profile, ("profile.yaml",), either(of_bytes, of_yaml), 1200),
        Target("prompts, JSONL", good.read_prompts, ("prompts.jsonl",), of_bytes, 1000),
        Target("prompts, CSV", good.read_prompts, ("prompts.csv",), of_bytes, 1000),
        Target("prompts, compressed", good.read_prompts, ("prompts.jsonl.gz",), of_bytes, 500),
        Target("prompts, Parquet", good.read_prompts, ("prompts.parquet",), of_bytes, 1200),
        Target("videos", good.read_video, good.VIDEOS, of_bytes, 1500),
        Target("tar shards", good.read_tar, ("shard.tar",), of_bytes, 1000),
        Target("manifests", good.read_output, ("output/manifest.json",), json_values, 900),
        Target("records of shards", good.read_record, ("record.json",), json_values, 700),
        Target("notes of checkpoints", good.read_checkpoint, good.CHECKPOINT_NOTES, json_values, 800),
        Target("latents", good.read_latents, ("latents.safetensors",), of_bytes, 1000),
        Target("weights", good.read_weights, ("weights/model.safetensors",), of_bytes, 700),
        Target("captions of a service", good.read_answer, ("answer.json",), json_values, 1500),
    ]


def of_yaml(drawn: random.Random, content: bytes) -> bytes:
    import yaml

    as_json = json.dumps(yaml.safe_load(content)).encode()
    return of_values(lambda value: yaml.dump(value, allow_unicode=True))(drawn, as_json)


def fuzz(target: Target, seed: int, start: int, count: int, place: Path) -> Iterator[dict[str, Any]]:
    """Read `count` inputs of a target, from number `start` on, in forks; yields what is wrong, and with which input."""
    end = start + count
    while start < end:
        batch = min(BATCH, end - start)
        for name in ("root", "tmp"):
            (place / name).mkdir(parents=True, exist_ok=True)
        first = start
        outcome = server.run_function(
            lambda first=first, batch=batch: _batch(target, seed, first, batch), place, Fault(0), SECONDS * batch
        )
        lines = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"input"')]
        yield from (line for line in lines if line["finding"])
        start = lines[-1]["input"] + 1 if lines else first
        if outcome.code or outcome.hung:  # at the input after the last that was told
            kind = "hang" if outcome.hung or outcome.code == -signal.SIGALRM else f"ended with {outcome.code}"
            yield {"input": start, "finding": f"{kind}: {outcome.err[-300:]}"}
            start += 1


def repeat(target: Target, seed: int, number: int, place: Path) -> None:
    """Read one input in this process, and let it raise what it raises."""
    target.read(_make(target, seed, number, place / "root"))


def _batch(target: Target, seed: int, start: int, count: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(start, start + count):
        signal.alarm(SECONDS)
        finding = _read(target, _make(target, seed, number, Path.cwd()))
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MEMORY and not finding:
            finding, before = f"{grown >> 20} MiB of memory", before + grown // 1024
        print(json.dumps({"input": number, "finding": finding}), flush=True)
    signal.alarm(0)


def _read(target: Target, path: Path) -> str:
    try:
        target.read(path)
    except UniViGUError:
        return ""
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return ""


def _make(target: Target, seed: int, number: int, folder: Path) -> Path:
    """Write an input, with the good files that belong to it; the same for the same seed and number."""
    drawn = random.Random(f"{seed} {target.name} {number}")
    name = drawn.choice(target.files)
    path = folder / name
    if not path.exists():
        shutil.copytree(_good(folder), folder, dirs_exist_ok=True)
    content = _originals(folder, target)[name]
    for other in target.files:
        (folder / other).write_bytes(_originals(folder, target)[other])
    path.write_bytes(target.mutate(drawn, content))
    return path


_ORIGINALS: dict[tuple[Path, str], dict[str, bytes]] = {}


def _originals(folder: Path, target: Target) -> dict[str, bytes]:
    key = (folder, target.name)
    if key not in _ORIGINALS:
        _ORIGINALS[key] = {name: (_good(folder) / name).read_bytes() for name in target.files}
    return _ORIGINALS[key]


def _good(folder: Path) -> Path:
    """The good inputs beside a folder, which the first process that needs them makes for all."""
    made = folder.with_name("good")
    if not made.exists():
        fresh = folder.with_name(f"good-{os.getpid()}")
        good.make(fresh)
        fresh.rename(made)
    return made


def _dump_json(value: Any) -> str:
    return json.dumps(value)
