"""The parts of a base that encode samples as tensors: autoencoder, text encoder, tokenizer."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.lean_imports import import_models
from components.pipeline.weights import how_to_fetch
from components.prompts.tokens import count_tokens, load_tokenizer
from univigu.errors import BadInputError, ConfigError, MissingInputError, first_line
from univigu.threads import in_parts, map_on_cores

if TYPE_CHECKING:
    from torch import Tensor


class Encoders:
    """The encoders of `base`, each loaded when it is first needed, on the GPU if there is one.

    prompt_length: length to which the text encoder's input is padded. text_length: most tokens of a text, EOS included.
    """

    def __init__(self, base: Path, precision: str, prompt_length: int, text_length: int) -> None:
        self._base, self._precision = base, precision
        self._prompt_length, self._text_length = prompt_length, text_length

    @cached_property
    def tokenizer(self) -> Any:
        import_models()  # before anything else imports transformers
        return load_tokenizer(self._base)

    @cached_property
    def vae(self) -> Any:
        return load_vae(self._base)

    @cached_property
    def text_encoder(self) -> Any:
        return load_text_encoder(self._base, self._precision)

    def encode_clips(self, clips: "Sequence[Tensor]") -> list["Tensor"]:
        """Normalised latent means (C, T, H', W') of clips uint8 (F, H, W, 3) of one size, in bf16."""
        return latent_means(self.vae, clips) if clips else []

    def encode_texts(self, prompts: Sequence[str]) -> list["Tensor"]:
        """Text-encoder states of each prompt, (length, D) in bf16, without Wan's zero padding."""
        return text_states(self.tokenizer, self.text_encoder, prompts, self._prompt_length) if prompts else []

    def token_ids(self, texts: Sequence[str]) -> "Tensor":
        """Texts as ids (N, length): EOS, then PAD to the end; raises `BadInputError` for a text that is too long."""
        from univigu.text_space import tokenize

        for text, count in zip(texts, count_tokens(self.tokenizer, texts), strict=True):
            if count > self._text_length:
                raise BadInputError(
                    f"A text has {count} tokens, more than the profile's {self._text_length} ('{text[:60]}'); run "
                    "validate-pairs again."
                )
        return tokenize(self.tokenizer, texts, self._text_length)


def latent_means(vae: Any, clips: "Sequence[Tensor]") -> list["Tensor"]:
    """The result of `Encoders.encode_clips`; only this function and `load_vae` decide a clip's latents.

    On a CPU, the number of cores changes no bit of them (`map_on_cores`).
    """
    import torch

    from univigu.wan import encode_frames

    def encode(part: "Sequence[Tensor]") -> "Tensor":
        return encode_frames(copy.copy(vae), torch.stack(list(part)))  # it keeps frames of its own

    return list(torch.cat(map_on_cores(encode, in_parts(clips))).bfloat16().cpu())


def text_states(tokenizer: Any, text_encoder: Any, prompts: Sequence[str], length: int) -> list["Tensor"]:
    """The result of `Encoders.encode_texts`; only this function and the loaders decide a prompt's states.

    On a CPU, the number of cores changes no bit of them (`map_on_cores`).
    """
    from univigu.wan import encode_prompts

    padded = map_on_cores(lambda part: encode_prompts(tokenizer, text_encoder, part, length), in_parts(prompts))
    return [states[: int(states.any(-1).sum())].bfloat16().cpu() for part in padded for states in part]


def load_vae(base: Path) -> Any:
    """The autoencoder of a base, always in fp32; raises if it is missing, incomplete, or not Wan's."""
    import_models()
    import torch
    from diffusers import AutoencoderKLWan

    with _loading(base, "vae"):
        vae, found = AutoencoderKLWan.from_pretrained(
            base, subfolder="vae", dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        _check_whole(found)
        return vae.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_text_encoder(base: Path, precision: str) -> Any:
    """The text encoder of a base in fp32 or bf16; raises as `load_vae` does."""
    import_models()
    import torch
    from transformers import UMT5EncoderModel

    from univigu.wan import check_text_encoder

    with _loading(base, "text_encoder"):
        # pyrefly: ignore[not-iterable]
        text_encoder, found = UMT5EncoderModel.from_pretrained(
            base,
            subfolder="text_encoder",
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
            use_safetensors=True,
            output_loading_info=True,
        )
        _check_whole(found)
        check_text_encoder(text_encoder)
        return text_encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@contextmanager
def _loading(base: Path, part: str) -> Iterator[None]:
    """Raise a loader's errors as `ConfigError`, in one sentence."""
    from safetensors import SafetensorError

    if not list((base / part).glob("*.safetensors")):
        raise MissingInputError(f"There are no weights (*.safetensors) in {base / part}; {how_to_fetch(base)}.")
    try:
        yield
    # pyrefly: ignore[unreachable-except-clause]
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise ConfigError(f"{base / part} can't be loaded ({first_line(error)}); {how_to_fetch(base)}.") from error


def _check_whole(found: Mapping[str, Any]) -> None:
    """Raise `ValueError` if weights are missing, unexpected or of another shape: a loader would make them random."""
    for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "has too"), ("mismatched_keys", "misshapes")):
        if keys := sorted(str(key) for key in found.get(kind) or ()):
            raise ValueError(f"its file {words} {keys[0]} and {len(keys) - 1} other weights")
