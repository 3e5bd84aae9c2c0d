"""Names, shapes and dtypes of weights, read from the headers of safetensors files without loading a tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from . import wan
from .errors import BadInputError, CorruptDataError, MissingInputError

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
KINDS = {"F32", "BF16", "F16"}
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # the two names of umT5's token table: one is enough


class Header(NamedTuple):
    """The header of one tensor."""

    shape: tuple[int, ...]
    kind: str  # its dtype in safetensors' notation, such as BF16
    file: str


def read_headers(folder: Path, stem: str) -> dict[str, Header]:
    """The headers of all tensors of a model in ``folder``; ``stem`` is the name of its file, or of the index's files.

    Raises MissingInputError where files are missing, and CorruptDataError where a file is not a complete safetensors
    file.
    """
    from safetensors import SafetensorError, safe_open

    headers = {}
    for name in _file_names(folder, stem):
        path = folder / name
        if not path.is_file():
            raise MissingInputError(f"{folder} lacks {name}, which its index lists: download the rest of it.")
        with path.open("rb") as stream:
            if stream.read(24) == b"version https://git-lfs.":
                raise MissingInputError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in that folder.")
        try:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (the handle isn't a dict)
                    tensor = tensors.get_slice(key)
                    headers[key] = Header(tuple(tensor.get_shape()), tensor.get_dtype(), name)
        except SafetensorError as error:
            raise CorruptDataError(f"{path} is damaged or cut off ({error}): download it again.") from error
    return headers


def _file_names(folder: Path, stem: str) -> list[str]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(wan.read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise CorruptDataError(f"{index} lists no files beside it: download it again.")
        return names
    if (folder / f"{stem}.safetensors").is_file():
        return [f"{stem}.safetensors"]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    if others:
        raise BadInputError(
            f"{folder} has {others[0]} and no safetensors, and nothing here is unpickled: download the repository"
            " whose name ends in -Diffusers."
        )
    raise MissingInputError(
        f"{folder} has no {stem}.safetensors: download the whole repository; for a gated one, accept its licence on"
        " its page and set HF_TOKEN first."
    )


def check_weights(headers: Mapping[str, Header], module: nn.Module, what: str) -> None:
    """Raise BadInputError where names, shapes or dtypes of the tensors are not those of ``module`` (on any device)."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    missing = sorted(expected.keys() - headers.keys())
    if TIED & headers.keys():
        missing = [key for key in missing if key not in TIED]
    unexpected = sorted(headers.keys() - expected.keys() - TIED)
    if missing or unexpected:
        raise BadInputError(
            f"The weights of the {what} don't match its config ({len(missing)} missing, {len(unexpected)} unexpected,"
            f" for example {(missing + unexpected)[0]}): get config and weights from the same repository."
        )
    for key, header in headers.items():
        if key in expected and header.shape != expected[key]:
            raise BadInputError(
                f"The {what}'s {key} in {header.file} is {header.shape} and its config wants {expected[key]}: get"
                " config and weights from the same repository."
            )
        if header.kind not in KINDS:
            raise BadInputError(
                f"The {what}'s {key} in {header.file} is {header.kind}, which can't be trained from: get the weights"
                f" in one of {', '.join(sorted(KINDS))}."
            )
