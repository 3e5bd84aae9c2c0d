"""Token lengths: counted in one place, with the base's own tokenizer and EOS included, so that no two steps differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univigu.errors import BadInputError, MissingInputError, first_line


def load_tokenizer(base: Path) -> Any:
    """The tokenizer of a base in diffusers' layout (``base/tokenizer``), read from disk only.

    Raises where there is none, or where it does not end a text with EOS: every length in a profile counts EOS.
    """
    folder = base / "tokenizer"
    if not folder.is_dir():
        raise MissingInputError(f"The base {base} has no folder 'tokenizer'; give a base in diffusers' layout.")
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # over a damaged file, transformers and tokenizers raise whatever their code trips over
        raise BadInputError(f"The tokenizer at {folder} can't be read ({first_line(error)}); fix the base.") from error
    if token_ids(tokenizer, ["a"])[0][-1:] != [tokenizer.eos_token_id]:
        raise BadInputError(f"The tokenizer at {folder} does not end a text with EOS; give the base's own tokenizer.")
    return tokenizer


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, EOS included, neither padded nor truncated."""
    if not tokenizer.is_fast:
        return tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
    backend = tokenizer.backend_tokenizer  # the same without offsets and masks, in two thirds of the time
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, EOS included."""
    return [len(ids) for ids in token_ids(tokenizer, texts)]
