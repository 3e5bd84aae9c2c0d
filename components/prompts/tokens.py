"""Token lengths, with the base's own tokenizer and EOS included; all steps count with these functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univigu.errors import BadInputError, MissingInputError, first_line
from univigu.files import read_json_object


def load_tokenizer(base: Path) -> Any:
    """The tokenizer of a base in diffusers' layout (``base/tokenizer``), read from disk only.

    Raises `MissingInputError` if there is none, and `BadInputError` if it can't be read or doesn't end a text with EOS:
    every length in a profile includes EOS.
    """
    folder = base / "tokenizer"
    if not folder.is_dir():
        raise MissingInputError(f"The base {base} has no folder 'tokenizer'; give a base in diffusers' layout.")
    try:
        tokenizer: Any = _find_class(folder).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # on a damaged file, transformers and tokenizers raise any kind of exception
        raise BadInputError(f"The tokenizer at {folder} can't be read ({first_line(error)}); fix the base.") from error
    if token_ids(tokenizer, ["a"])[0][-1:] != [tokenizer.eos_token_id]:
        raise BadInputError(f"The tokenizer at {folder} does not end a text with EOS; give the base's own tokenizer.")
    return tokenizer


def _find_class(folder: Path) -> Any:
    """The class that transformers' `AutoTokenizer` finds for a tokenizer.

    `AutoTokenizer` itself imports torch, which takes a second. It is not asked where a tokenizer without a model's
    config names transformers' general class, as those of tiny bases do (transformers 5.23, tokenization_auto.py).
    """
    import transformers

    try:
        config = read_json_object(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return transformers.AutoTokenizer  # it says what is wrong
    general = config.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in config
    general = general and not (folder / "config.json").exists()
    return transformers.PreTrainedTokenizerFast if general else transformers.AutoTokenizer


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, EOS included, neither padded nor truncated."""
    if not tokenizer.is_fast:
        return tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
    backend = tokenizer.backend_tokenizer  # takes two thirds of the time: no offsets, no masks
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, EOS included."""
    return [len(ids) for ids in token_ids(tokenizer, texts)]
