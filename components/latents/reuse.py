"""Reuse of tensors from the last committed output, looked up by everything that decides them.

A clip's latents are reused for the same video bytes, autoencoder, size and code; a prompt's states for the same text,
text encoder, tokenizer and code. So new captions need no encoding, and a new text encoder needs no new video latents. A
batch is reused as a whole or not at all, because the other clips of a batch may change a clip's last bits; with a
`batch_size` of 1, clips are reused one by one. A shard's hash is compared with the manifest before it is read.
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
    """The tensors of an earlier output in `folder` whose facts `video_code` and `text_code` equal those in `facts`.

    Rows are those of the table `latents`, in the batches of `size` in which a shard is encoded.
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
            return  # there is no output, or one in an older format
        for fact, key in (("video_code", VIDEO_KEY), ("text_code", TEXT_KEY)):
            if made.get(fact) == facts[fact]:
                self._places[key] = {_values(row, key): (row["shard"], row["row"]) for row in rows}
        if self._places[TEXT_KEY]:
            self._text_encoder = _values(rows[0], TEXT_KEY[2:])

    def latents(self, batch: Rows) -> "list[Tensor] | None":
        """The latents (C, T, H', W') of a batch, or None if they can't be reused."""
        found = self._find(batch, VIDEO_KEY)
        return found and list(found[0].get_slice("latents")[found[1] : found[2]])

    def states(self, batch: Rows) -> "list[Tensor] | None":
        """The text-encoder states (length, D) of a batch's prompts, or None if they can't be reused."""
        found = self._find(batch, TEXT_KEY)
        if not found:
            return None
        shard, first, last = found
        lengths = shard.get_tensor("prompt_lengths").tolist()
        states = shard.get_slice("prompt_embeds")[sum(lengths[:first]) : sum(lengths[:last])]
        return list(states.split(lengths[first:last]))

    def empty_states(self, row: Mapping[str, Any]) -> "Tensor | None":
        """The states of the empty prompt, or None if they are from another text encoder than the row's."""
        file = self._open(EMPTY_PROMPT) if self._text_encoder == _values(row, TEXT_KEY[2:]) else None
        return file and file.get_tensor("prompt_embeds")

    def _find(self, batch: Rows, key: tuple) -> tuple[Any, int, int] | None:
        """The opened shard of a batch and the range of its rows there, if exactly these rows were one batch."""
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
        """A file of the output, or None if its bytes don't match the manifest."""
        from safetensors import safe_open

        if name not in self._opened:
            path = self._folder / name
            intact = name in self._files and path.is_file() and file_sha256(path) == self._files[name]["sha256"]
            self._opened[name] = safe_open(path, framework="pt") if intact else None
        return self._opened[name]


def _values(row: Mapping[str, Any], names: Sequence[str]) -> tuple:
    return tuple(row[name] for name in names)
