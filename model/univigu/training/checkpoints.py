"""Checkpoints of a running training: whole or not there, and never trusted unread.

Below one folder lie ``step-00000100/`` and so on, each with what DeepSpeed saves (every rank its part), ``loop.json``
(where the loop stands) and, written last by rank 0, ``manifest.json`` with the size and SHA-256 of every file. Then
``latest`` is replaced atomically. DeepSpeed's own `latest` is not atomic and its loader unpickles whatever it finds, so
here nothing is loaded whose bytes are not the ones that were saved; a damaged checkpoint means the one before it.

These files never leave the machine that trains: what a run hands on is safetensors.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LATEST = "latest"
MANIFEST = "manifest.json"
LOOP = "loop.json"
KEEP = 2


def save_checkpoint(engine: Any, folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Save the engine and the loop's `state` (JSON) as the checkpoint of `step`. All ranks must call this.

    Keeps the newest two. A run that is killed in here finds the checkpoint before it.
    """
    home = folder / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(home, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=home.name, save_latest=False)
    generators: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, _generator_states())
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(home / LOOP, {**state, "step": step, "generators": generators})
        write_json(home / MANIFEST, {"step": step, "files": _describe(home)})
        write_json(folder / LATEST, {"checkpoint": home.name, "step": step})
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Bring the engine to the newest checkpoint whose bytes are good; returns the loop's state, or None.

    All ranks must call this; rank 0 verifies and decides for all. Where another number of processes saved it, a rank
    without a generator state of its own keeps what it has (noise is keyed by sample, so nothing depends on it).
    """
    choice: list[str | None] = [None]
    if dist.get_rank() == 0:
        good = newest_good(folder)
        choice = [good.name if good else None]
    dist.broadcast_object_list(choice)
    if choice[0] is None:
        return None
    engine.load_checkpoint(str(folder), tag=choice[0])
    state = json.loads((folder / choice[0] / LOOP).read_text(encoding="utf-8"))
    generators = state.pop("generators")
    if dist.get_rank() < len(generators):
        _restore_generators(generators[dist.get_rank()])
    return state


def newest_good(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest other one, whose files are all there and unchanged."""
    found = sorted(folder.glob("step-*"), reverse=True)
    try:
        named = folder / json.loads((folder / LATEST).read_text(encoding="utf-8"))["checkpoint"]
        found.sort(key=lambda path: path != named)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # without a pointer, the newest that verifies is as good
    for checkpoint in found:
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint
        print(f"The checkpoint {checkpoint} is left aside: {fault}.", file=sys.stderr)
    return None


def _fault(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            return f"{name} is missing or damaged"
    return None


def _describe(home: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in home.rglob("*") if path.is_file())
    return {path.relative_to(home).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _generator_states() -> dict[str, str]:
    """torch's random generators of this rank, as hex."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def _restore_generators(states: Mapping[str, str]) -> None:
    tensors = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, and be sure that it reached the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
