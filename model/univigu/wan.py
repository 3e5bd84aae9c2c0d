"""Wan's conventions: its time, its latents, its text encoder and its checkpoints.

In Wan, sigma is 1 for noise and 0 for data, the transformer's timestep is t = 1000 sigma, and the prediction is
noise - data. In the paper, tau = 1 - sigma and the velocity is data - noise, so u = -model_out at t = 1000 (1 - tau).
Only this module converts between the two.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import BadInputError, ConfigError, CorruptDataError, MissingInputError, storage_fault
from .files import read_json_object

NUM_TRAIN_TIMESTEPS = 1000
MASK_CHANNELS = 4  # one for each frame of a latent frame
_SHARED = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_dim": 4096, "freq_dim": 256}
WAN_1_3B = {**_SHARED, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {**_SHARED, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
WHOLE_PIXELS = 480 * 832  # of a frame that is decoded as a whole

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "README.md"]  # what is fetched from the hub
_TEXT_SIDE = re.compile(
    r"(text_space|text_embedder|text_head|text_output)\.|blocks\.\d+\.(ffn_text\.|text_scale_shift_table$)"
)

_IMAGE_SIDE = re.compile(r"condition_embedder\.image_embedder\.|blocks\.\d+\.attn2\.(add_[kv]_proj|norm_added_k)\.")

# --- time -----------------------------------------------------------------------------------------------------------


def wan_timestep(tau: Tensor) -> Tensor:
    """t = 1000 (1 - tau), float32: the ``timestep`` of Wan's transformer."""
    return NUM_TRAIN_TIMESTEPS * (1 - tau.float())


def wan_output_to_velocity(model_out: Tensor) -> Tensor:
    """u = data - noise from Wan's prediction of noise - data."""
    return -model_out


# --- the autoencoder ------------------------------------------------------------------------------------------------


def runs_on(module: Any) -> torch.device:
    """Where a module's inputs have to be; with offloading, that is not where its weights are."""
    from diffusers.utils.torch_utils import get_module_execution_device

    return get_module_execution_device(module)


def _latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return torch.tensor(mean).view(shape).to(like), torch.tensor(std).view(shape).to(like)


def normalize_latents(vae: Any, latents: Tensor) -> Tensor:
    """z = (mu - mean) / std per channel: the autoencoder's (B, C, T, H, W) to the transformer's unit scale."""
    mean, std = _latent_statistics(vae, latents)
    return (latents - mean) / std


def denormalize_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of :func:`normalize_latents`."""
    mean, std = _latent_statistics(vae, latents)
    return latents * std + mean


@torch.no_grad()
def encode_frames(vae: Any, frames: Tensor) -> Tensor:
    """uint8 frames (B, F, H, W, 3), F = 4k + 1, to normalised latent means (B, C, T, H', W'), float32.

    By Wan's convention the posterior's mean is used, not a sample of it.
    """
    return encode_pixels(vae, frames.to(runs_on(vae)).movedim(-1, 1).to(vae.dtype) / 127.5 - 1)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """:func:`encode_frames` of pixels (B, 3, F, H, W) from -1 to 1."""
    pixels = pixels.to(runs_on(vae), vae.dtype)
    return normalize_latents(vae, vae.encode(pixels).latent_dist.mode().float())


@torch.no_grad()
def decode_pixels(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, T, H', W') to pixels (B, 3, F, H, W), float32 in 0..1, on the autoencoder's device."""
    scale, (height, width) = vae.config.scale_factor_spatial, latents.shape[-2:]
    latents = denormalize_latents(vae, latents.float()).to(runs_on(vae), vae.dtype)
    with large_in_tiles(vae, height * scale, width * scale):
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def large_in_tiles(vae: Any, height: int, width: int) -> Iterator[None]:
    """Within the block, an autoencoder decodes frames above 480p in overlapping tiles, to need no more memory."""
    if height * width <= WHOLE_PIXELS or vae.use_tiling:
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, T, H', W') to uint8 frames (B, F, H, W, 3) on the CPU."""
    return (decode_pixels(vae, latents) * 255).round().to(torch.uint8).movedim(1, -1).cpu()


def latent_shape(vae: Any, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, T, H', W') of the latents of a clip with ``num_frames`` frames of ``height`` x ``width`` pixels."""
    config = vae.config
    frames = (num_frames - 1) // config.scale_factor_temporal + 1
    return config.z_dim, frames, height // config.scale_factor_spatial, width // config.scale_factor_spatial


def check_autoencoder(folder: Path, sizes: Iterable[tuple[int, int, int]] = ()) -> None:
    """Check that a base's autoencoder and transformer fit together, and can make clips of these sizes.

    folder: in diffusers' layout; only the configs are read. sizes: (frames, height, width) each. Raises BadInputError
    for an autoencoder that isn't Wan's, has no statistics for normalisation, or makes latents that the transformer
    doesn't take; ConfigError for a size that is not a multiple of what it can make.
    """
    vae, transformer = (read_json(folder / part / "config.json") for part in ("vae", "transformer"))
    if vae.get("_class_name") != "AutoencoderKLWan":
        raise BadInputError(f"{folder}/vae is {vae.get('_class_name')}, not AutoencoderKLWan: use a base with Wan's.")
    channels, taken = vae.get("z_dim", 16), latent_channels(transformer)
    for name in ("latents_mean", "latents_std"):
        values = vae.get(name)
        if not isinstance(values, list) or len(values) != channels or (name == "latents_std" and min(values) <= 0):
            raise BadInputError(
                f"{folder}/vae/config.json has no '{name}' of {channels} values, so its latents can't be normalised:"
                " download the base's own autoencoder again."
            )
    if taken != channels:
        raise BadInputError(
            f"The autoencoder of {folder} makes latents of {channels} channels and its transformer takes"
            f" {taken}: use the autoencoder that the transformer was trained with."
        )
    spatial = 2 ** (len(vae.get("dim_mult", (1, 2, 4, 4))) - 1) * (vae.get("patch_size") or 1)
    temporal = 2 ** sum(vae.get("temperal_downsample", (False, True, True)))
    stated = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    if stated != (spatial, temporal):
        raise BadInputError(
            f"The autoencoder of {folder} declares compression factors of {stated[0]} in space and {stated[1]} in time,"
            f" but its layers have {spatial} and {temporal}: correct its config.json."
        )
    _, high, wide = transformer.get("patch_size", (1, 2, 2))
    for frames, height, width in sizes:
        if (frames - 1) % temporal or height % (spatial * high) or width % (spatial * wide):
            raise ConfigError(
                f"{folder} can't take clips of {frames} frames of {height}x{width}: choose {temporal}k + 1 frames, a"
                f" height that is a multiple of {spatial * high}, and a width that is a multiple of {spatial * wide}."
            )


# --- the text encoder -----------------------------------------------------------------------------------------------


def check_text_encoder(text_encoder: Any) -> None:
    """Raise CorruptDataError unless the encoder uses the shared token table, and the table was loaded.

    An early transformers 5 left the table untied and zero: every prompt then had the same states, without an error.
    """
    shared, tokens = text_encoder.shared.weight, text_encoder.encoder.embed_tokens.weight
    if shared.data_ptr() != tokens.data_ptr() or not shared.any():
        raise CorruptDataError(
            "The text encoder's token table is empty, or is not the table that its encoder uses, so prompts would have"
            " no effect: download the checkpoint again, or install another version of transformers."
        )


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: Sequence[str], max_sequence_length: int) -> Tensor:
    """Prompt states (B, max_sequence_length, text_dim) in the form that Wan's cross-attention takes.

    The encoder uses the padding mask. Its states at padded positions are then set to zero, and the transformer attends
    to all positions without a mask. The dropped condition is the encoded empty string.
    """
    states, mask = _encode(tokenizer, text_encoder, prompts, max_sequence_length)
    return states.masked_fill(~mask.bool()[..., None], 0)


def encode_padded(tokenizer: Any, text_encoder: Any, prompts: Sequence[str], max_sequence_length: int) -> Tensor:
    """:func:`encode_prompts` with the encoder's states at padded positions, as the authors' released model takes it."""
    return _encode(tokenizer, text_encoder, prompts, max_sequence_length)[0]


@torch.no_grad()
def _encode(
    tokenizer: Any, text_encoder: Any, prompts: Sequence[str], max_sequence_length: int
) -> tuple[Tensor, Tensor]:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    inputs = tokenizer(
        [prompt_clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = runs_on(text_encoder)
    ids, mask = inputs.input_ids.to(device), inputs.attention_mask.to(device)
    return text_encoder(ids, mask).last_hidden_state, mask


# --- checkpoints ----------------------------------------------------------------------------------------------------


def is_text_side(key: str) -> bool:
    """Whether a key of ``UniViGUTransformer3DModel``'s state belongs to the text side; all others have Wan's names."""
    return _TEXT_SIDE.match(key) is not None


def is_image_side(key: str) -> bool:
    """Whether a key of ``UniViGUTransformer3DModel``'s state is used for the states of an image encoder alone."""
    return _IMAGE_SIDE.match(key) is not None


def check_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise BadInputError for a checkpoint that lacks one of Wan's weights, or has one that the model doesn't have."""
    missing, unexpected = [k for k in missing if not is_text_side(k)], list(unexpected)
    if missing or unexpected:
        raise BadInputError(
            f"The checkpoint doesn't fit Wan's transformer ({len(missing)} weights missing, {len(unexpected)}"
            f" unexpected, for example {(missing + unexpected)[0]}): check that its config.json belongs to its weights."
        )


def local_folder(source: str | Path, **hub: Any) -> Path:
    """The folder itself, or a download of the hub repository ``owner/name`` if there is no such folder.

    ``hub`` are options of the download: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
    ``force_download``. Raises MissingInputError where there is neither, or no such revision.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise MissingInputError(f"There is no model folder at {source}: give a folder in diffusers' layout.")
    return download(str(source), **hub)


def download(repository: str, **hub: Any) -> Path:
    """The download of the hub repository ``owner/name``, of which what is missing is fetched: weights in safetensors,
    configurations, tokenizers and the README.

    ``hub`` are options of the download, see :func:`local_folder`, and ``local_dir``, a folder for it in place of the
    cache. Raises MissingInputError as that does.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES, **hub))
    except RevisionNotFoundError as error:
        raise MissingInputError(
            f"The hub repository {repository} has no revision '{hub.get('revision')}': give a branch, a tag or a commit"
            " of it, or leave `revision` out."
        ) from error
    except LocalEntryNotFoundError as error:
        raise MissingInputError(
            f"{repository} is not in the cache of downloads{_at(hub)} and can't be fetched now: download it once"
            " without `local_files_only`, or check the network."
        ) from error
    except GatedRepoError as error:
        raise MissingInputError(
            f"The weights of {repository} are gated: accept their licence at https://huggingface.co/{repository}, then"
            " set HF_TOKEN to a token of that account."
        ) from error
    except Exception as error:
        if fault := storage_fault(error, Path(hub.get("local_dir") or ".")):
            raise fault from error
        raise MissingInputError(
            f"There is no model folder at {repository}, and no hub repository of that name could be fetched"
            f" ({type(error).__name__}): give a folder in diffusers' layout."
        ) from error


def _at(hub: dict[str, Any]) -> str:
    return f" at revision '{hub['revision']}'" if hub.get("revision") else ""


def latent_channels(transformer: Mapping[str, Any]) -> int:
    """The channels C of the latents that a transformer with this config denoises.

    Wan's image-to-video transformers take 4 + C more: a mask of the frames that are given, and their latents.
    """
    taken, made = transformer.get("in_channels", 16), transformer.get("out_channels") or 16
    return made if taken == made + MASK_CHANNELS + made else taken


def transformer_folder(source: str | Path) -> Path:
    """The folder of a Wan transformer that can be a base: ``source`` itself or its ``transformer`` part.

    Raises MissingInputError where there is none, BadInputError for another architecture or another kind of Wan.
    """
    folder = local_folder(source)
    _refuse_experts(source, folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise MissingInputError(f"{source} has no transformer/config.json: give a folder in diffusers' layout.")
    config = read_json(folder / "config.json")
    name = config.get("_class_name", "a model without a class name")
    if name != "WanTransformer3DModel":
        raise BadInputError(f"{source} is {name}, not WanTransformer3DModel: give a Wan checkpoint in diffusers' form.")
    taken, made = (config.get(name) or 16 for name in ("in_channels", "out_channels"))
    by_images = bool(config.get("image_dim") or config.get("added_kv_proj_dim"))
    if latent_channels(config) != made or (by_images and taken == made) or config.get("pos_embed_seq_len"):
        raise BadInputError(
            f"{source} is conditioned on images, but not on a first one alone, as Wan2.1's image-to-video models and"
            " Wan2.2 TI2V are: give one of those, or a Wan text-to-video checkpoint."
        )
    return folder


def _refuse_experts(source: str | Path, folder: Path) -> None:
    """Raise BadInputError for Wan2.2 A14B, given as a whole or as one of its two transformers."""
    places = (folder, folder.parent)
    index = next(
        (read_json(place / "model_index.json") for place in places if (place / "model_index.json").is_file()), {}
    )
    if any((place / "transformer_2").is_dir() for place in places) or index.get("boundary_ratio") is not None:
        raise BadInputError(
            f"{source} is a Wan2.2 with two transformers, one for the high noise levels and one for the low ones, and"
            " the text side shares its layers with a single transformer, which must know all noise levels: give a"
            " checkpoint with one, such as Wan2.1 T2V 1.3B or 14B, or Wan2.2 TI2V 5B."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CorruptDataError where it isn't one."""
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise CorruptDataError(f"{path} can't be read as JSON ({error}): get or create the model again.") from error


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn any error of a loader of weights into a CorruptDataError of one sentence; our own errors pass unchanged."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptDataError(f"{source} can't be loaded ({reason}): download or create the model again.") from error


def token_rows(folder: Path) -> Tensor | None:
    """umT5's token table (V, D) from ``folder``/text_encoder, without loading the encoder; None if there is none."""
    from safetensors import safe_open

    for path in sorted((folder / "text_encoder").glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for key in ("shared.weight", "encoder.embed_tokens.weight"):
                if key in tensors.keys():  # noqa: SIM118 (the handle isn't a dict)
                    return tensors.get_tensor(key)
    return None


def config_folder(base: str | Path) -> Path:
    """The folder with a base's configs: its own, or our copy of the published configs of a base of that name.

    There are copies for Wan2.1 T2V 1.3B and 14B, Wan2.1 I2V 14B and Wan2.2 TI2V 5B, so these need no download; their
    sizes are those of diffusers' `convert_wan_to_diffusers.py`. Raises MissingInputError for other bases that are not
    on this disk.
    """
    folder = Path(base)
    published = Path(__file__).parent / "published"
    if folder.is_dir():
        return folder
    if (published / folder.name).is_dir():
        return published / folder.name
    known = ", ".join(sorted(path.name for path in published.iterdir()))
    raise MissingInputError(
        f"There is no base at {base}, and its name is not one of {known}: put its folder there, in diffusers' layout,"
        " or correct the profile's `base`."
    )
