"""The authors' own released checkpoint, as a model with a `discrete` text side.

The release (github.com/Fr0zenCrane/Uni-ViGU) is one state dict beside a Wan2.1 T2V 1.3B folder in diffusers' layout. It
is a pickle, which is never read here: write its ``model`` as safetensors first, in an environment that you trust it in.
"""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import BadInputError, CorruptDataError, MissingInputError, first_line

# The released names and ours, in this order. All others are Wan's in diffusers' layout.
_NAMES = (
    (r"(_fsdp_wrapped_module|_orig_mod)\.", ""),
    (r"^vocab_embed\.", "text_embedder.table."),
    (r"^time_embedding_t\.", "text_embedder."),
    (r"^time_embedding_v\.", "condition_embedder."),
    (r"^cond_text_embedder\.", "condition_embedder.text_embedder."),
    (r"^text_head\.linear\.", "text_head.proj_out."),
    (r"^text_head\.norm_final\.weight$", "text_head.norm_weight"),
    (r"^video_head\.proj_out\.", "proj_out."),
    (r"^scale_shift_table_v$", "scale_shift_table"),
    (r"^scale_shift_table_t$", "text_head.scale_shift_table"),
    (r"^(blocks\.\d+)\.ffn_t\.", r"\1.ffn_text."),
)
_COMPUTED = re.compile(r"rotary_emb_(text|video)\.")  # tables that are made, not learned


def convert_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the release's names under ours; what is computed and not learned is left out."""
    found = {}
    for key, value in state.items():
        for pattern, ours in _NAMES:
            key = re.sub(pattern, ours, key)
        if not _COMPUTED.match(key):
            found[key] = value
    return found


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The release's weights from a safetensors file, under our names.

    Raises MissingInputError without the file, BadInputError for a pickle or another model's weights, CorruptDataError
    for a damaged file.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingInputError(f"There are no weights at {file}: give the released model as a safetensors file.")
    if file.suffix != ".safetensors":
        raise BadInputError(
            f"{file} is no safetensors file, and pickles are not read: save its `model` with safetensors, in an"
            " environment that you trust it in."
        )
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptDataError(f"{file} can't be read ({first_line(error)}): save it again.") from error
    if "vocab_embed.weight" not in {re.sub(*_NAMES[0], key) for key in state}:
        raise BadInputError(
            f"{file} has no `vocab_embed.weight`, so it isn't the released model: give its own weights."
        )
    return convert_keys(state)


def text_side(state: dict[str, Tensor]) -> dict[str, Any]:
    """The text arguments of a transformer with these weights; a caption sees the video beside it, as in the release."""
    count = len(state["text_embedder.table.weight"])
    vocabulary = {"vocab_size": count, "tokenizer_length": count}
    return vocabulary | {"prediction": "discrete", "ffn_init": "copy", "caption_attention": "joint"}


def load_weights(transformer: Any, state: dict[str, Tensor], file: str | Path) -> None:
    """Put the release's weights, read from ``file``, into a transformer that was made for them.

    Raises BadInputError where weights are missing, unknown, or of other shapes.
    """
    ours = transformer.state_dict()
    missing, unknown = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    other = sorted(key for key in ours.keys() & state.keys() if ours[key].shape != state[key].shape)
    if faults := missing + unknown + other:
        raise BadInputError(
            f"{file} doesn't fit the base ({len(missing)} weights missing, {len(unknown)} unknown, {len(other)} of"
            f" another shape; one is {faults[0]}): give the Wan2.1 T2V folder and tokenizer that it was trained from."
        )
    transformer.load_state_dict(state)


def without_normalisation(vae: Any) -> None:
    """Make an autoencoder's latents the transformer's own scale, as in the release: mean 0 and deviation 1."""
    vae.register_to_config(latents_mean=[0.0] * vae.config.z_dim, latents_std=[1.0] * vae.config.z_dim)
