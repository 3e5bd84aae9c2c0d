"""Checkpoints of a training run: atomic, verified, and independent of the number of processes.

A folder holds ``step-00000100/`` and so on, each with a safetensors file from every rank (its share of the fp32
weights, of AdamW's moments and of the weights' average, each tensor whole), ``loop.json`` (the loop's state), a copy of
the run's records and, written last by rank 0, ``manifest.json`` with the size and SHA-256 of every file. Then
``latest`` is replaced atomically. Where a checkpoint is damaged, the one before it is used.

DeepSpeed's own checkpoints are pickled, and hold slices that fit one number of processes and one ZeRO stage. These can
be read by any number of processes in any stage, and nothing is unpickled. All ranks must see the same folder.
"""

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from univigu.errors import ConfigError
from univigu.files import file_sha256, read_json_object, replaced, sync, write_json
from univigu.training.optimizer_state import read_state, write_state

LATEST = "latest"
MANIFEST = "manifest.json"
LOOP = "loop.json"
KEEP = 2


def save_checkpoint(
    engine: Any, folder: Path, step: int, state: Mapping[str, Any], records: Sequence[Path] = ()
) -> None:
    """Save the engine and the loop's `state` (JSON) as the checkpoint of `step`. All ranks must call this.

    records: files that the run appends to, such as its curves; the checkpoint gets a copy of their present content.
    Keeps the newest two checkpoints. A run that is killed during this call resumes from the checkpoint before.
    """
    home = folder / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
    dist.barrier()
    path = home / f"rank-{dist.get_rank():05d}.safetensors"
    save_file(read_state(engine), path)
    sync(path)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, ({path.name: _describe(path)}, _generator_states()))
    if dist.get_rank() == 0:
        write_json(home / LOOP, {**state, "step": step, "generators": [generators for _, generators in shares]})
        files = {name: facts for described, _ in shares for name, facts in described.items()}
        for record in filter(Path.is_file, records):
            shutil.copyfile(record, home / record.name)
            sync(home / record.name)
            files[record.name] = _describe(home / record.name)
        write_json(home / MANIFEST, {"step": step, "files": {**files, LOOP: _describe(home / LOOP)}})
        sync(folder)
        write_json(folder / LATEST, {"checkpoint": home.name, "step": step})
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(engine: Any, folder: Path, records: Sequence[Path] = ()) -> dict[str, Any] | None:
    """Load the newest valid checkpoint into the engine; returns the loop's state, or None if there is no checkpoint.

    `records` are restored, where the checkpoint has them. All ranks must call this: each verifies its share of the
    files. Where a different number of processes saved it, a rank without a saved generator state keeps its own: noise
    is keyed by sample, so no result depends on it. Raises `ConfigError` for the checkpoint of another model.
    """
    home = _choose(folder)
    if home is None:
        return None
    state = read_json_object(home / LOOP)
    if dist.get_rank() == 0:
        for record in records:
            if (home / record.name).is_file():
                with replaced(record) as stream:
                    stream.write((home / record.name).read_bytes())
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(home.glob("*.safetensors"))]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

        def saved(name: str) -> InFile:
            if name not in file_of:
                raise ConfigError(
                    f"The checkpoint in {home} has no '{name}', so it is of another model; start again with --restart."
                )
            return InFile(file_of[name], name)

        write_state(engine, state["step"], saved)
    generators = state.pop("generators")
    if dist.get_rank() < len(generators):
        _restore_generators(generators[dist.get_rank()])
    return state


class InFile:
    """A tensor in an open safetensors file, see `optimizer_state.SavedTensor`; only what is asked for is read."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def whole(self) -> torch.Tensor:
        return self._slice[...]

    def part(self, start: int, stop: int) -> torch.Tensor:
        """The elements from ``start`` to ``stop`` of the flattened tensor, from the rows that hold them."""
        if start >= stop:
            return torch.empty(0)
        row = math.prod(self.shape[1:])
        first, last = start // row, -(-stop // row)
        rows = self._slice[first:last] if self.shape else self.whole()
        return rows.flatten()[start - first * row : stop - first * row]


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose files are complete and unchanged, the one that `latest` names being tried first."""
    for name in _candidates(folder):
        fault = _fault_in_share(folder / name, 0, 1)
        if fault is None:
            return folder / name
        _say_skipped(folder / name, fault)
    return None


def _choose(folder: Path) -> Path | None:
    """`newest_valid` with the help of all ranks, which must call this: each reads its share of the files.

    Damaged checkpoints that are newer are renamed, so that they are not overwritten and the user can examine them.
    """
    candidates: list[Any] = [_candidates(folder) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(candidates)
    skipped, chosen = [], None
    for name in candidates[0]:
        fault = _fault(folder / name)
        if fault is None:
            chosen = name
            break
        skipped.append(name)
        if dist.get_rank() == 0:
            _say_skipped(folder / name, fault)
    if dist.get_rank() == 0:
        for name in skipped:
            if (chosen is None or name > chosen) and (folder / name / MANIFEST).exists():
                aside = folder / f"damaged-{name}"
                shutil.rmtree(aside, ignore_errors=True)
                (folder / name).rename(aside)
    dist.barrier()
    return folder / chosen if chosen else None


def _say_skipped(checkpoint: Path, fault: str) -> None:
    print(f"The checkpoint {checkpoint} is skipped: {fault}.", file=sys.stderr)


def _candidates(folder: Path) -> list[str]:
    """The names of the checkpoints in the order in which they are tried."""
    found = sorted((path.name for path in folder.glob("step-*")), reverse=True)
    try:
        named = read_json_object(folder / LATEST)["checkpoint"]
        found.sort(key=lambda name: name != named)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # without a readable pointer, the newest first
    return found


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be used, or None for a valid one; each rank reads its share of the files."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, _fault_in_share(checkpoint, dist.get_rank(), dist.get_world_size()))
    return next((fault for fault in faults if fault), None)


def _fault_in_share(checkpoint: Path, rank: int, world_size: int) -> str | None:
    try:
        files = dict(read_json_object(checkpoint / MANIFEST)["files"])
        described = {name: (facts["size"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if LOOP not in described:
        return "its manifest is damaged"
    for name in sorted(described)[rank::world_size]:
        path, (size, sha256) = checkpoint / name, described[name]
        if not path.is_file() or path.stat().st_size != size or file_sha256(path) != sha256:
            return f"{name} is missing or damaged"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


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
