"""What the last committed latents hold that still holds: tensors are looked up by all that decides them.

A clip's latents are kept for the same video bytes, autoencoder, size and code; a prompt's states for the same text,
text encoder, tokenizer and code. So other captions encode nothing again, and another text encoder no video. A batch is
kept as a whole or not at all, because what a clip is encoded with may change its last bits: with a `batch_size` of 1,
each clip is kept by itself. A shard is hashed against its manifest before anything is taken from it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.manifests import MANIFEST
from components.pipeline.tables import read_table
from univigu.errors import BadInputError
from univigu.files import file_sha256
from univigu.training.data import EMPTY_PROMPT

if TYPE_CHECKING:
    from torch import Tensor

Rows = Sequence[Mapping[str, Any]]
VIDEO_KEY = ("video_sha256", "vae_digest", "frames", "height", "width")
TEXT_KEY = ("id", "prompt_sha256", "text_encoder_digest", "tokenizer_digest")


class Encoded:
    """The tensors of an earlier output in `folder`, as far as its facts `video_code` and `text_code` are those given.

    Rows are of the table `latents`, and come in the batches of `size` that a shard is encoded in.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], size: int) -> None:
        self._folder, self._size = folder, size
        self._files: dict[str, Any] = {}
        self._opened: dict[str, Any] = {}
        self._places: dict[tuple, dict[tuple, tuple[str, int]]] = {VIDEO_KEY: {}, TEXT_KEY: {}}
        self._text_encoder: tuple[str, ...] = ()
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._files, made = manifest["files"], manifest["facts"]
            rows = read_table(folder, "latents").to_pylist()
        except (OSError, ValueError, KeyError, TypeError, BadInputError):
            return  # there is none, or one of an older kind
        for fact, key in (("video_code", VIDEO_KEY), ("text_code", TEXT_KEY)):
            if made.get(fact) == facts[fact]:
                self._places[key] = {_values(row, key): (row["shard"], row["row"]) for row in rows}
        if self._places[TEXT_KEY]:
            self._text_encoder = _values(rows[0], TEXT_KEY[2:])

    def latents(self, batch: Rows) -> "list[Tensor] | None":
        """The latents (C, T, H', W') of a batch, or None."""
        found = self._find(batch, VIDEO_KEY)
        return found and list(found[0].get_slice("latents")[found[1] : found[2]])

    def states(self, batch: Rows) -> "list[Tensor] | None":
        """The text-encoder states (length, D) of a batch's prompts, or None."""
        found = self._find(batch, TEXT_KEY)
        if not found:
            return None
        shard, first, last = found
        lengths = shard.get_tensor("prompt_lengths").tolist()
        states = shard.get_slice("prompt_embeds")[sum(lengths[:first]) : sum(lengths[:last])]
        return list(states.split(lengths[first:last]))

    def empty_states(self, row: Mapping[str, Any]) -> "Tensor | None":
        """The states of the empty prompt, if they are those of this row's text encoder."""
        file = self._open(EMPTY_PROMPT) if self._text_encoder == _values(row, TEXT_KEY[2:]) else None
        return file and file.get_tensor("prompt_embeds")

    def _find(self, batch: Rows, key: tuple) -> tuple[Any, int, int] | None:
        """The opened shard of a batch and the range of its rows there, if these and no others were a batch."""
        places = [self._places[key].get(_values(row, key), ("", -1)) for row in batch]
        name, first = places[0]
        last = first + len(batch)
        if places != [(name, number) for number in range(first, last)] or first % self._size:
            return None
        shard = self._open(name)
        if not shard or (len(batch) < self._size and last < len(shard.get_slice("prompt_lengths")[:])):
            return None
        return shard, first, last

    def _open(self, name: str) -> Any:
        """A file of the output, if its bytes are those of the manifest."""
        from safetensors import safe_open

        if name not in self._opened:
            path = self._folder / name
            whole = name in self._files and path.is_file() and file_sha256(path) == self._files[name]["sha256"]
            self._opened[name] = safe_open(path, framework="pt") if whole else None
        return self._opened[name]


def _values(row: Mapping[str, Any], names: Sequence[str]) -> tuple:
    return tuple(row[name] for name in names)
