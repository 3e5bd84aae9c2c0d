"""A profile's models without weights: built from configs on the meta device, at full size and without memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu import wan
from univigu.errors import BadInputError, ConfigError
from univigu.text_space import row_norm_for

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    from univigu import UniViGUTransformer3DModel

Profile = Mapping[str, Any]


@dataclass(frozen=True)
class MetaModels:
    """The models of a base, and the transformer that is trained from it; all tensors are on the meta device."""

    folder: Path  # with the configs
    vae: "AutoencoderKLWan"
    text_encoder: "UMT5EncoderModel"
    base: "WanTransformer3DModel"
    transformer: "UniViGUTransformer3DModel"
    latents: tuple[int, int, int, int]  # (C, T, H', W') of a clip
    video_tokens: int


def build_models(profile: Profile, folder: Path) -> MetaModels:
    """Build the modules of `profile` from the configs in `folder`.

    Raises `BadInputError` if they don't match, or if the steps can't use the base, which makes no video from text.
    """
    config = wan.read_json(wan.transformer_folder(folder) / "config.json")
    if config.get("in_channels", 16) != wan.latent_channels(config):
        raise BadInputError(
            f"{folder} makes videos from an image, and the steps need clips that a base makes from text alone: use a"
            " text-to-video base, or Wan2.2 TI2V."
        )
    return build_any_models(profile, folder)


def build_any_models(profile: Profile, folder: Path) -> MetaModels:
    """:func:`build_models` for every kind of base, to count what a model of it needs."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    transformer_config = wan.read_json(wan.transformer_folder(folder) / "config.json")
    encoder_config = UMT5Config(**wan.read_json(folder / "text_encoder" / "config.json"))
    vae_config = wan.read_json(folder / "vae" / "config.json")
    if (name := vae_config.get("_class_name")) != "AutoencoderKLWan":
        raise BadInputError(f"{folder / 'vae'} is {name}, not AutoencoderKLWan; use the checkpoint's own autoencoder.")
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(vae_config)
        text_encoder = UMT5EncoderModel(encoder_config)
        base = WanTransformer3DModel.from_config(transformer_config)
        transformer = build_transformer(profile, base.config, encoder_config.vocab_size)
    video = profile["video"]
    latents = wan.latent_shape(vae, video["frames"], video["height"], video["width"])
    tokens = 1
    for length in transformer.grid(latents[1:]):
        tokens *= length
    return MetaModels(folder, vae, text_encoder, base, transformer, latents, tokens)


def check_video(profile: Profile, models: MetaModels) -> None:
    """Raise `ConfigError` where the profile's clips can't be divided into latent frames and patches."""
    video, patch, vae = profile["video"], models.transformer.config.patch_size, models.vae.config
    steps = vae.scale_factor_spatial * patch[1], vae.scale_factor_spatial * patch[2]
    if (video["frames"] - 1) % vae.scale_factor_temporal or video["height"] % steps[0] or video["width"] % steps[1]:
        raise ConfigError(
            f"{video['frames']} frames of {video['height']}x{video['width']} can't be divided into patches; choose"
            f" {vae.scale_factor_temporal}k + 1 frames and sides that are multiples of {steps[0]} and {steps[1]}."
        )


def build_transformer(profile: Profile, base: Mapping[str, Any], vocab_size: int) -> "UniViGUTransformer3DModel":
    """Wan's transformer with the text side of `profile`, on the default device."""
    from univigu import UniViGUTransformer3DModel

    known, model = UniViGUTransformer3DModel._get_init_keys(UniViGUTransformer3DModel), profile["model"]
    return UniViGUTransformer3DModel(
        **{key: value for key, value in base.items() if key in known},
        vocab_size=vocab_size,
        tokenizer_length=vocab_size,
        text_latent_dim=model["text_dim"],
        text_output_dim=model["output_dim"],
        text_length=profile["text"]["caption_tokens"][1],
        row_norm=row_norm_for(vocab_size, model["tau_star"]),
        prediction=model["prediction"],
        ffn_init=model["ffn_init"],
        caption_attention=model["caption_attention"],
    )
