"""Checks of a base's models on the meta device: files, keys, shapes."""

from typing import Any

from components.planning.meta_models import MetaModels, check_video
from components.planning.rehearsal.lines import Profile, Scene, ToDo
from univigu import UniViGUPipeline, wan
from univigu.errors import BadInputError, MissingInputError
from univigu.weight_files import STEMS, check_weights, read_headers


def check_files(profile: Profile, scene: Scene, models: list[MetaModels]) -> str:
    """The headers of the weight files match the modules; without weights, raises `ToDo`."""
    folder = scene.weights or scene.root / profile["base"]
    if not folder.is_dir():
        if scene.weights:
            raise MissingInputError(f"There is no folder {folder}; set --weights to a complete checkpoint.")
        raise ToDo(f"put the base at {folder} (docs/wan.md); only its config was checked")
    if not models:
        raise BadInputError("The weights were not checked, because the modules could not be built; see above.")
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise MissingInputError(f"{folder} has no tokenizer/tokenizer.json: download the whole repository.")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise MissingInputError(f"{folder} has no {name}: download the whole repository.")
    modules = {"transformer": models[0].base, "vae": models[0].vae, "text_encoder": models[0].text_encoder}
    found = []
    for part, module in modules.items():
        headers = read_headers(folder / part, STEMS[part])
        check_weights(headers, module, part.replace("_", " "))
        kinds = sorted({header.kind for header in headers.values()})
        files = len({header.file for header in headers.values()})
        found.append(f"{part} {len(headers)} tensors, {' and '.join(kinds)}, in {files} file{'s' * (files > 1)}")
    return "; ".join(found)


def check_keys(models: MetaModels) -> str:
    """All of Wan's keys exist with the same shapes in our transformer, and all other keys are the text side's."""
    ours = {key: tensor.shape for key, tensor in models.transformer.state_dict().items()}
    theirs = {key: tensor.shape for key, tensor in models.base.state_dict().items()}
    wan.check_keys(ours.keys() - theirs.keys(), theirs.keys() - ours.keys())
    if differing := [key for key, shape in theirs.items() if ours[key] != shape]:
        raise BadInputError(f"{differing[0]} has different shapes in Wan's transformer and ours; fix transformer.py.")
    return f"{len(theirs)} of Wan's, {len(ours) - len(theirs)} of the text side"


def check_shapes(profile: Profile, models: MetaModels) -> str:
    """Frames and sides are divisible into patches, channels and widths match, and the rotary tables are long enough."""
    check_video(profile, models)
    config, vae = models.transformer.config, models.vae.config
    channels, taken = vae.z_dim, wan.latent_channels(config)
    if not channels == taken == len(vae.latents_mean) == len(vae.latents_std):
        raise BadInputError(
            f"The autoencoder's latents have {channels} channels ({len(vae.latents_mean)} means), but the transformer"
            f" takes {taken}; use the autoencoder that the transformer was trained with."
        )
    if (width := models.text_encoder.config.d_model) != config.text_dim:
        raise BadInputError(
            f"The text encoder's states have {width} dimensions, but the transformer takes {config.text_dim}; use the"
            " text encoder that the transformer was trained with."
        )
    models.transformer.rope.text(models.transformer.grid(models.latents[1:]), config.text_length)
    return f"latents {'x'.join(map(str, models.latents))}, {models.video_tokens:,} video tokens"


def check_text_encoder(profile: Profile, models: MetaModels) -> str:
    """Prompt states have the shape that the transformer takes."""
    import torch

    length = profile["text"]["prompt_length"]
    with torch.no_grad(), torch.device("meta"):
        states = models.text_encoder(torch.zeros(1, length, dtype=torch.long)).last_hidden_state
    if tuple(states.shape) != (1, length, models.transformer.config.text_dim):
        raise BadInputError(
            f"Prompt states are {tuple(states.shape)}, which don't fit the transformer; use its own text encoder."
        )
    return f"states {length}x{states.shape[-1]}"


def check_autoencoder(profile: Profile, models: MetaModels) -> str:
    """The autoencoder encodes a clip to latents of the expected shape, and decodes them to the clip's shape."""
    import torch

    video = profile["video"]
    frames = (1, video["frames"], video["height"], video["width"], 3)
    with torch.no_grad():
        pixels = torch.zeros(frames, dtype=torch.uint8, device="meta").movedim(-1, 1).to(models.vae.dtype) / 127.5 - 1
        latents = models.vae.encode(pixels).latent_dist.mode()
        decoded = models.vae.decode(latents, return_dict=False)[0]
    if tuple(latents.shape[1:]) != models.latents or decoded.shape != pixels.shape:
        raise BadInputError(
            f"The autoencoder encodes a clip as {tuple(latents.shape[1:])} and decodes it as {tuple(decoded.shape[1:])}"
            f" instead of {models.latents} and the clip's own shape; choose another video size."
        )
    return f"{video['frames']} frames of {video['height']}x{video['width']} and back"


def check_sampling(profile: Profile, models: MetaModels) -> str:
    """One step of each kind of sampling, at full size with the profile's settings."""
    import torch

    from univigu.sampling import Guide, text_field, video_field

    sampling, video = profile["model"]["sampling"], profile["video"]
    config, length = models.transformer.config, profile["text"]["prompt_length"]

    class Unread(UniViGUPipeline):
        def _encode(self, prompts):  # `check_text_encoder` covers the text encoder
            return torch.empty(len(prompts), length, config.text_dim, device="meta")

    sizes = {"num_frames": video["frames"], "height": video["height"], "width": video["width"]}
    pipeline = Unread(None, None, models.vae, models.transformer, **sizes, **sampling)
    settings = pipeline.config
    clip = torch.empty(1, *models.latents, device="meta")
    text = torch.empty(1, config.text_length, config.text_latent_dim, device="meta")
    with torch.no_grad():
        empty, scales = pipeline._encode([""]), (settings.caption_guidance_scale, settings.guidance_scale)
        say = text_field(models.transformer, clip, [0], empty, empty, scales[0], settings.caption_temperature)
        draw = video_field(models.transformer, text, 1.0, [0], Guide(empty, empty, scales[1]))
        for field, state in ((say, text), (draw, clip)):
            if (velocity := field(state, 0.0)).shape != state.shape:
                raise BadInputError(f"A velocity is {tuple(velocity.shape)}, but its state is {tuple(state.shape)}.")
    return (
        f"video in {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}; "
        f"text in {settings.caption_steps}, guidance {settings.caption_guidance_scale:g}"
    )


def count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
