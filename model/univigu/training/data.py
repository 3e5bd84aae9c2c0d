"""Encoded samples: their files, and how they are read.

A shard is one safetensors file of N samples:

=================  =====================  ========  ============================================================
``latents``        (N, C, T, H, W)        bfloat16  normalised VAE means, Wan's own time order
``prompt_embeds``  (sum of lengths, D)    bfloat16  text-encoder states of the prompts, concatenated, without padding
``prompt_lengths``  (N,)                  int32     the number of these rows that belong to each sample
``prompt_ids``     (N, text_length)       int32     the prompt as token ids: text, EOS, then PAD to the end
``target_ids``     (N, text_length)       int32     the stage's target text (stage 1: the prompt; stage 2: the caption)
=================  =====================  ========  ============================================================

The states of the empty prompt, which replace those of a dropped prompt, are in a file beside the shards
(`write_empty_prompt`). All samples of a shard have the same shape. Shards are on this machine (`Shards`), or are
fetched when they are needed (`remote_shards.RemoteShards`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError

EMPTY_PROMPT = "empty_prompt.safetensors"
_SHARD = {"latents": 5, "prompt_embeds": 2, "prompt_lengths": 1, "prompt_ids": 2, "target_ids": 2}


@dataclass(frozen=True)
class SampleRef:
    """The location of one sample: its id, its shard's file, its row there, and its clip's (frames, height, width)."""

    id: str
    shard: Path
    row: int
    bucket: tuple[int, ...] = ()


def write_latents(
    path: Path, *, latents: Tensor, prompt_embeds: Sequence[Tensor], prompt_ids: Tensor, target_ids: Tensor
) -> None:
    """Write one shard of N samples to `path`; equal tensors give equal bytes.

    latents (N, C, T, H, W), normalised; prompt_embeds N tensors (length_i, D) without their padding; prompt_ids and
    target_ids (N, text_length). Raises `BadInputError` where the counts differ.
    """
    count = len(latents)
    if not count == len(prompt_embeds) == len(prompt_ids) == len(target_ids) or prompt_ids.shape != target_ids.shape:
        raise BadInputError(
            f"A shard at {path} got {count} latents, {len(prompt_embeds)} prompts, ids {tuple(prompt_ids.shape)} and "
            f"targets {tuple(target_ids.shape)}; give one of each per sample."
        )
    tensors = {
        "latents": latents.to(torch.bfloat16),
        "prompt_embeds": torch.cat(list(prompt_embeds)).to(torch.bfloat16),
        "prompt_lengths": torch.tensor([len(states) for states in prompt_embeds], dtype=torch.int32),
        "prompt_ids": prompt_ids.to(torch.int32),
        "target_ids": target_ids.to(torch.int32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def write_empty_prompt(folder: Path, states: Tensor) -> None:
    """Write the text-encoder states of the empty prompt, (length, D) without padding, as ``folder/EMPTY_PROMPT``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompt_embeds": states.detach().cpu().to(torch.bfloat16).contiguous()}, folder / EMPTY_PROMPT)


class Shards:
    """Shards on this machine's disk, all of them open and memory-mapped: bytes are read when rows are."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._open = {path: open_shard(path) for path in sorted(set(paths))}

    def open(self, path: Path) -> Mapping[str, Tensor]:
        """The tensors of a shard, and the ``offsets`` of its prompts."""
        return self._open[path]

    def rows(self, path: Path) -> int:
        """The number of samples in a shard."""
        return len(self._open[path]["latents"])

    def target_ids(self, path: Path) -> Tensor:
        """A shard's targets, (samples, text_length)."""
        return self._open[path]["target_ids"]

    def fetch_ahead(self, paths: Iterable[Path]) -> None:
        """Announce shards that will be needed soon; for shards on this disk there is nothing to do."""


class LatentDataset:
    """The samples of some shards, memory-mapped and read row by row; a shard is never loaded as a whole.

    samples: the rows, in a fixed order. empty_prompt: the file that `write_empty_prompt` wrote. prompt_length: the
    length to which text-encoder states are padded with zeros, as Wan does. shards: how to open them, by default from
    this disk. Raises `BadInputError` for no samples and `CorruptDataError` for rows that don't exist.
    """

    def __init__(
        self, samples: Sequence[SampleRef], empty_prompt: Path, prompt_length: int, shards: Shards | None = None
    ) -> None:
        if not samples:
            raise BadInputError("There are no samples to train on; check the output of encode-latents.")
        self.samples = list(samples)
        self.prompt_length = prompt_length
        self.shards = shards or Shards(sample.shard for sample in self.samples)
        for sample in self.samples:
            if not 0 <= sample.row < self.shards.rows(sample.shard):
                raise CorruptDataError(
                    f"{sample.shard} has no row {sample.row} (sample {sample.id}); encode the latents again."
                )
        self._ids = torch.tensor([sample_key(sample.id) for sample in self.samples])
        states = open_tensors(empty_prompt).get("prompt_embeds")
        if states is None or states.ndim != 2:
            raise CorruptDataError(f"{empty_prompt} holds no states of the empty prompt; encode the latents again.")
        self.empty_embeds = self._padded(states)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def text_length(self) -> int:
        """The number of tokens of a text, EOS and PAD included."""
        return self.shards.target_ids(self.samples[0].shard).shape[1]

    @property
    def target_ids(self) -> Tensor:
        """All targets, (samples, text_length) int64."""
        return torch.stack([self.shards.target_ids(s.shard)[s.row] for s in self.samples]).long()

    def batch(self, indices: Sequence[int], epochs: Sequence[int]) -> dict[str, Tensor]:
        """Read samples of one bucket into one batch (see `univigu.tasks`).

        Returns latents (B, C, T, H, W), prompt_embeds (B, prompt_length, D) and empty_embeds (prompt_length, D) in
        fp32; prompt_ids and target_ids (B, text_length) in int64; and sample_ids and epochs (B,) in int64, which are
        the keys of the noise.
        """
        chosen = [(self.shards.open(self.samples[i].shard), self.samples[i].row) for i in indices]
        return {
            "latents": torch.stack([shard["latents"][row] for shard, row in chosen]).float(),
            "prompt_embeds": torch.stack([self._padded(_states(shard, row)) for shard, row in chosen]),
            "empty_embeds": self.empty_embeds,
            "prompt_ids": torch.stack([shard["prompt_ids"][row] for shard, row in chosen]).long(),
            "target_ids": torch.stack([shard["target_ids"][row] for shard, row in chosen]).long(),
            "sample_ids": self._ids[list(indices)],
            "epochs": torch.tensor(list(epochs)),
        }

    def _padded(self, states: Tensor) -> Tensor:
        if len(states) > self.prompt_length:
            raise BadInputError(
                f"A prompt has {len(states)} tokens, more than the text encoder's length of {self.prompt_length}; "
                "raise `prompt_length` in the profile, or shorten the prompt."
            )
        padded = torch.zeros(self.prompt_length, states.shape[1])
        padded[: len(states)] = states
        return padded


def sample_key(sample_id: str) -> int:
    """A sample's id as a number below 2^63, the same on every machine: the key of all noise for this sample."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") >> 1


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "inverse_document_frequency": lambda share: -share.log(),
    "rarity": lambda share: 4 * (1 - share),
    "root_inverse_document_frequency": lambda share: (-share.log()).sqrt().clamp_min(0.5),
}


def token_weights(
    target_ids: Tensor, vocabulary: int, pad_id: int, weighting: str, eos_id: int | None = None
) -> Tensor:
    """The weight of each token in the cross-entropy, (vocabulary,) fp32.

    The weight depends on the share of targets (target_ids, (samples, text_length)) that contain the token, clamped to
    0.1-4: a word that distinguishes texts counts more than one that is in all of them. PAD gets 0.05. ``rarity`` is
    linear in the share, so that words with two alternatives (slow, fast) are not neglected beside words with ten.
    ``root_inverse_document_frequency`` is for real wordings, most of whose tokens are common words: at least 0.5, and 1
    for EOS (``eos_id``), which is in every text and decides its length. ``uniform`` is 1 for all tokens. Raises
    `ConfigError` for any other `weighting`.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"Unknown token weighting '{weighting}'; use {', '.join(WEIGHTINGS)}.")
    texts = torch.zeros(vocabulary)  # that contain each token
    for ids in target_ids:
        texts[ids.unique()] += 1
    weights = WEIGHTINGS[weighting](texts / len(target_ids))
    if weighting != "uniform":
        weights = weights.clamp(0.1, 4.0)
        weights[pad_id] = 0.05
    if eos_id is not None and weighting == "root_inverse_document_frequency":
        weights[eos_id] = 1.0
    return weights


def _states(shard: Mapping[str, Tensor], row: int) -> Tensor:
    return shard["prompt_embeds"][shard["offsets"][row] : shard["offsets"][row + 1]]


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, and the ``offsets`` of its prompts; raises `CorruptDataError` where it isn't a shard."""
    shard = open_tensors(path)
    wrong = [name for name, dims in _SHARD.items() if name not in shard or shard[name].ndim != dims]
    if wrong:
        raise CorruptDataError(
            f"{path} is not a shard of latents ({', '.join(wrong)} missing or of wrong rank); encode the latents again."
        )
    lengths = shard["prompt_lengths"].long()
    shard["offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = {len(shard[name]) for name in ("latents", "prompt_lengths", "prompt_ids", "target_ids")}
    if len(rows) != 1 or shard["offsets"][-1] != len(shard["prompt_embeds"]):
        raise CorruptDataError(f"The tensors of {path} have different numbers of samples; encode the latents again.")
    return shard


def open_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped: bytes are read when rows are."""
    if not path.is_file():
        raise MissingInputError(f"There is no file {path}; run encode-latents first.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CorruptDataError(f"{path} is not a readable safetensors file ({error}); encode it again.") from error
