"""Where a pipeline's parts come from: a folder or the hub, a Wan checkpoint, in the precision that was asked for."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

from . import wan
from .bases import Base, find_base
from .errors import BadInputError, CorruptDataError, MissingInputError, first_line
from .transformer import UniViGUTransformer3DModel

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
PUSH_OPTIONS = ("repo_id", "token", "private", "commit_message", "create_pr")
WAN_TEXT_LENGTH = 256
Precision = torch.dtype | Mapping[str, torch.dtype] | None

_STATED = {  # what a checkpoint's README.md may state, and the defaults that it gives
    r"(\d+) frames of\s+(\d+)x(\d+)\s+pixels": ("num_frames", "height", "width"),
    r"(\d+(?:\.\d+)?) frames a second": ("fps",),
    r"max_sequence_length=(\d+)": ("max_sequence_length",),
    r"Guidance (\d+(?:\.\d+)?), ": ("guidance_scale",),
    r"Guidance [\d.]+, (\d+) steps": ("num_inference_steps",),
}


def fetch(source: str | Path, options: dict[str, Any]) -> Path:
    """The folder of ``source``, downloaded if it is a hub id; takes the hub's options out of ``options``."""
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    return wan.local_folder(source, **{name: value for name, value in hub.items() if value is not None})


@contextmanager
def reading(source: str | Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of loaders into one of ours that names the arguments which may have caused it."""
    given = [name for name in ("device_map", "quantization_config") if options.get(name) is not None]
    try:
        with wan.reading(source):
            yield
    except ImportError as error:
        raise BadInputError(
            f"{source} can't be loaded, because a package that its weights need is missing ({first_line(error)}):"
            " install it, or use a folder that isn't quantised."
        ) from error
    except CorruptDataError as error:
        if given and isinstance(error.__cause__, Exception):
            raise BadInputError(
                f"{source} can't be loaded with the given {' and '.join(given)} ({first_line(error.__cause__)}):"
                " correct it, or leave it out."
            ) from error
        raise


def check_wan(source: str | Path, folder: Path, without_text_encoder: bool = False) -> None:
    """Raise MissingInputError for an incomplete Wan folder, BadInputError for another model or a quantised one."""
    config = wan.read_json(wan.transformer_folder(folder) / "config.json")
    parts = ["transformer", "vae", *([] if without_text_encoder else ["text_encoder"]), "tokenizer"]
    parts += ["image_encoder", "image_processor"] if config.get("image_dim") else []
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise MissingInputError(f"{source} has no {' and no '.join(missing)}: give a complete checkpoint folder.")
    for name in ("transformer", "vae"):
        if "quantization_config" in wan.read_json(folder / name / "config.json"):
            raise BadInputError(f"The {name} of {source} is quantised: give the checkpoint that it was made from.")


def wan_parts(source: str | Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer, text encoder, autoencoder, new transformer and further parts of a Wan folder, by their names.

    ``options`` hold ``dtype`` or ``torch_dtype``, maybe a ``text_encoder`` (None for none), and the transformer's text
    arguments.
    """
    given = [options.pop(name, None) for name in ("dtype", "torch_dtype")]
    precision: Precision = next((dtype for dtype in given if dtype is not None), None)
    with reading(source, options):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
        vae = AutoencoderKLWan.from_pretrained(
            folder / "vae", use_safetensors=True, torch_dtype=_precision_of("vae", precision)
        )
        if "text_encoder" in options:
            text_encoder = options.pop("text_encoder")
        else:
            dtype = _precision_of("text_encoder", precision)
            chosen: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True, **chosen)
        more = folder_base(folder).parts(folder, lambda part: _precision_of(part, precision))
    check_token_table(text_encoder)
    vocabulary = {
        "tokenizer_length": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    transformer = UniViGUTransformer3DModel.from_wan(folder, **(vocabulary | options))
    _cast(transformer, _precision_of("transformer", precision))
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": transformer, **more}


def check_token_table(text_encoder: Any) -> None:
    """:func:`wan.check_text_encoder`, for an encoder that there is and whose weights are here."""
    if text_encoder is not None and not text_encoder.shared.weight.is_meta:
        wan.check_text_encoder(text_encoder)


def upload(folder: Path, repo_id: str, token: Any = None, private: bool | None = None, **commit: Any) -> str:
    """Upload a saved pipeline to the hub repository ``owner/name``, which is made if need be.

    Returns the address of the commit, whose ``commit_message`` and ``create_pr`` may be given.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    settings: dict[str, Any] = {"commit_message": "Upload UniViGUPipeline"} | commit
    return str(api.upload_folder(repo_id=name, folder_path=folder, **settings))


def wan_defaults(folder: Path) -> dict[str, Any]:
    """Sizes, lengths and sampling settings of a Wan checkpoint, as `UniViGUPipeline.from_wan` takes them.

    In this order: what its README.md states ("9 frames of 32x32 pixels"), the shift of its scheduler, and the values of
    its kind of base, with the video made smaller where its patches would fill more than three quarters of the rotary
    tables. The text gets the positions that are left, at most 256.
    """
    transformer, vae = (wan.read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    base = folder_base(folder)
    settings = {**base.clip, **_stated(folder / "README.md"), **_scheduler_shift(folder)}
    if index_of(folder).get("expand_timesteps"):
        settings["expand_timesteps"] = True
    factors = (
        vae.get("scale_factor_temporal", 4),
        vae.get("scale_factor_spatial", 8),
        vae.get("scale_factor_spatial", 8),
    )
    units = [factor * patch for factor, patch in zip(factors, transformer.get("patch_size", (1, 2, 2)), strict=True)]
    positions = transformer.get("rope_max_seq_len", 1024)
    room = positions * 3 // 4
    settings["num_frames"] = min(settings["num_frames"], (room - 1) * units[0] + 1)
    for name, unit in (("height", units[1]), ("width", units[2])):
        settings[name] = min(settings[name], room * unit)
    grid = (settings["num_frames"] - 1) // units[0] + 1, settings["height"] // units[1], settings["width"] // units[2]
    return settings | {"text_length": min(WAN_TEXT_LENGTH, positions - max(grid))}


def index_of(folder: Path) -> dict[str, Any]:
    """A folder's model_index.json; empty where there is none."""
    file = folder / "model_index.json"
    return wan.read_json(file) if file.is_file() else {}


def folder_base(folder: Path) -> Base:
    """The kind of base in a Wan folder."""
    return find_base(wan.read_json(folder / "transformer" / "config.json"), index_of(folder))


def _stated(readme: Path) -> dict[str, Any]:
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    found: dict[str, Any] = {}
    for pattern, names in _STATED.items():
        if match := re.search(pattern, text):
            found |= {
                name: (float if name in ("fps", "guidance_scale") else int)(value)
                for name, value in zip(names, match.groups(), strict=True)
            }
    return found


def _scheduler_shift(folder: Path) -> dict[str, float]:
    config = folder / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return {}
    values = wan.read_json(config)
    shift = values.get("flow_shift", values.get("shift"))
    return {"shift": float(shift)} if isinstance(shift, int | float) and shift > 0 else {}


def _precision_of(part: str, precision: Precision) -> torch.dtype | None:
    """One type for all parts, or a mapping by part with an optional `default`, as in diffusers."""
    return precision.get(part, precision.get("default")) if isinstance(precision, Mapping) else precision


def _cast(transformer: UniViGUTransformer3DModel, dtype: torch.dtype | None) -> None:
    """Cast as `from_pretrained` does: what a low precision would spoil stays float32."""
    if dtype is None:
        return
    for name, parameter in transformer.named_parameters():
        if not set(name.split(".")) & set(transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
