"""What one sample of the trained model needs on one GPU: memory and seconds of a caption, a video, or both.

The code that samples runs on meta tensors, as in training (`univigu.training.memory_looks`), and so does the
autoencoder at the profile's size of clip.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.planning.cost import Plan, autoencoder_flops, durations, mfu_range
from components.planning.meta_models import MetaModels, build_any_models, check_video
from univigu import planning, wan
from univigu.bases import find_base
from univigu.errors import ConfigError
from univigu.hardware import Gpu, find_gpu
from univigu.training.memory import BYTES, parameter_count
from univigu.training.memory_looks import Look, peak_bytes
from univigu.training.meta_tensors import LiveBytes, without_data

Profile = Mapping[str, Any]

DESCRIPTIONS = {
    "caption": "the text is written beside the video, whose keys and values are computed once (eq 16)",
    "generate": "the video is denoised beside its prompt as clean text (eq 17)",
    "joint": "the video is denoised part of the way, the text is written beside the video predicted there, and the "
    "rest of the video is generated from that text; `in_step=1`, eq 18 as printed, denoises both in lockstep",
}


def make_inference_plan(
    profile: Profile, root: Path, task: str, gpu: str, mfu: float | None = None, image: bool = False
) -> Plan:
    """Memory and seconds of one sample of a ``task`` of `DESCRIPTIONS`, of a video after a first ``image`` or without.

    Raises `ConfigError` for another task, and for an image that the task or the base doesn't take.
    """
    if task not in DESCRIPTIONS:
        raise ConfigError(f"There is no task '{task}'; use one of {', '.join(DESCRIPTIONS)}.")
    device, utilisation = find_gpu(gpu), mfu_range(mfu)
    models = build_any_models(profile, wan.config_folder(root / profile["base"]))
    check_video(profile, models)
    if image:
        check_image(models, task)
    precision, usable = profile["evaluate_model"]["precision"], planning.usable_memory(device.memory_gib)
    return {
        "task": task,
        "description": DESCRIPTIONS[task] + ("; a first image is given" if image else ""),
        "gpu": {"name": gpu, **device._asdict(), "mfu": utilisation},
        "memory": inference_memory(profile, models, task, image) | {"usable": usable},
        "seconds": inference_seconds(profile, models, task, device, utilisation, image),
        "assumptions": [
            f"The transformer and the text encoder are in {precision}, the autoencoder in fp32; one sample at a time.",
            f"A pass over a video reaches an MFU of {utilisation[0]:g} to {utilisation[1]:g}; a step of the text alone "
            "also takes at least the time to read the weights and the video's keys and values from the GPU's memory.",
            f"The CUDA context takes {planning.CONTEXT_GIB:g} GiB, and fragmentation {100 * planning.FRAGMENTATION:g} %"
            " of the GPU. Not counted: the text encoder's own activations and time, and the workspace of convolutions.",
        ],
    }


def check_image(models: MetaModels, task: str) -> None:
    """Raise `ConfigError` where the task or the base takes no first image."""
    base = find_base(models.base.config, wan.read_json(models.folder / "model_index.json"))
    if task == "caption":
        raise ConfigError("A caption is of a whole video, which has no first image apart; leave --image out.")
    if base.show is None:
        raise ConfigError(
            f"The profile's base is {base.name}, which takes no image; leave --image out, or set `base` to Wan2.1 I2V"
            " or Wan2.2 TI2V."
        )


def image_encoder(models: MetaModels) -> tuple[int, int]:
    """The parameters of the base's image encoder, and the number of states that it gives; zeros without one."""
    if not models.base.config.image_dim:
        return 0, 0
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = wan.read_json(models.folder / "image_encoder" / "config.json")
    with torch.device("meta"):
        encoder = CLIPVisionModel(CLIPVisionConfig(**config))
    return sum(p.numel() for p in encoder.parameters()), (config["image_size"] // config["patch_size"]) ** 2 + 1


def image_clip(models: MetaModels, video: Mapping[str, Any]) -> tuple[MetaModels, Mapping[str, Any]]:
    """The clip that the autoencoder encodes for a first image: with grey frames after it where channels show it."""
    if models.base.config.in_channels > models.latents[0]:
        return models, video
    channels, _, height, width = models.latents
    return replace(models, latents=(channels, 1, height, width)), {**video, "frames": 1}


def inference_memory(profile: Profile, models: MetaModels, task: str, image: bool = False) -> Plan:
    """Bytes: ``weights`` by model, ``phases`` with the most tensors that each has alive, and ``totals``.

    In the totals either all models stay on the GPU, or each is there only while it runs (`enable_model_cpu_offload`).
    """
    precision, sampling = profile["evaluate_model"]["precision"], profile["model"]["sampling"]
    size = BYTES[precision]
    encoder, vae = (sum(p.numel() for p in model.parameters()) for model in (models.text_encoder, models.vae))
    weights = {
        "transformer": size * parameter_count(models.transformer.config),
        "text encoder": size * encoder,
        "autoencoder": BYTES["fp32"] * vae,
    }
    context, (parameters, states) = profile["text"]["prompt_length"], image_encoder(models) if image else (0, 0)
    if parameters:
        weights["image encoder"] = size * parameters
    # an image's states have keys and values as the condition's have
    sizes = {"video_tokens": models.video_tokens, "context_tokens": context + states}
    sizes |= {"text_tokens": profile["text"]["caption_tokens"][1], "batch_size": 1}

    def peak(kind: str, scale: str) -> int:
        look = Look(kind, sampling[scale] > 1)
        return peak_bytes(look, models.transformer.config, **sizes, precision=precision)

    phases, user = {}, {}
    if task != "generate":
        phases["the autoencoder encodes the clip"] = autoencoder_peak(models, profile["video"], "encode")
        phases["the text is written"] = peak("caption", "caption_guidance_scale")
    if image:
        clip = image_clip(models, profile["video"])
        phases["the autoencoder encodes the image"] = autoencoder_peak(*clip, "encode")
    if task != "caption":
        phases["the video is denoised"] = peak("generate", "guidance_scale")
        phases["the autoencoder decodes the clip"] = autoencoder_peak(models, profile["video"], "decode")
    for name in phases:
        user[name] = weights["autoencoder" if "autoencoder" in name else "transformer"]
    return {
        "weights": weights,
        "phases": phases,
        "totals": {
            "all models on the GPU": sum(weights.values()) + max(phases.values()),
            "offload to CPU memory": max(*weights.values(), *(phases[name] + user[name] for name in phases)),
        },
    }


def autoencoder_peak(models: MetaModels, video: Mapping[str, Any], way: str) -> int:
    """The most bytes of tensors alive while the autoencoder encodes or decodes a clip in fp32, its input included."""
    import torch
    from diffusers import AutoencoderKLWan

    from univigu.wan import large_in_tiles

    shape = (1, 3, video["frames"], video["height"], video["width"])
    with without_data(), torch.no_grad():
        vae = AutoencoderKLWan.from_config(models.vae.config)
        with LiveBytes() as counted:
            counted.ignore([*vae.parameters(), *vae.buffers()])
            if way == "encode":
                vae.encode(torch.zeros(shape))
            else:
                with large_in_tiles(vae, video["height"], video["width"]):
                    vae.decode(torch.zeros(1, *models.latents))
    return counted.peak


def inference_seconds(
    profile: Profile, models: MetaModels, task: str, device: Gpu, utilisation: list[float], image: bool = False
) -> dict[str, list[float]]:
    """[shortest, longest] seconds of each part, and their ``total``."""
    sampling, transformer = profile["model"]["sampling"], models.transformer
    text, context = profile["text"]["caption_tokens"][1], profile["text"]["prompt_length"]
    rates = [device.tflops * 1e12 * each for each in utilisation]
    encode, decode = autoencoder_flops(models, profile["video"])
    parts: dict[str, list[float]] = {}
    if image:
        encode_image, _ = autoencoder_flops(*image_clip(models, profile["video"]))
        parts["encoding the image"] = durations(encode_image, rates)
    if task != "caption":
        # a joint sample has one step more: the clean video that is predicted where the text is written
        steps = sampling["num_inference_steps"] + (task == "joint")
        branches = 2 if sampling["guidance_scale"] > 1 else 1
        step = transformer.estimate_flops(models.video_tokens, text, context)
        parts["denoising the video"] = durations(steps * branches * step, rates)
    if task == "joint":
        parts["decoding the predicted video"] = durations(decode, rates)
    if task != "generate":
        parts["encoding the video"] = durations(encode, rates)
        branches = 2 if sampling["caption_guidance_scale"] > 1 else 1
        video, each_text = transformer.estimate_caption_flops(models.video_tokens, text, context)
        parts["reading the video"] = durations(branches * video, rates)
        read = bytes_of_text_step(profile, models) / (device.bandwidth_tb * 1e12)
        count = branches * sampling["caption_steps"]
        parts["writing the text"] = [count * max(read, each) for each in durations(each_text, rates)]
    if task != "caption":
        parts["decoding the video"] = durations(decode, rates)
    return {**parts, "total": [sum(ends) for ends in zip(*parts.values(), strict=True)]}


def bytes_of_text_step(profile: Profile, models: MetaModels) -> int:
    """What a step of the text reads: the weights without the video's own, and the keys and values of the video."""
    config, size = models.transformer.config, BYTES[profile["evaluate_model"]["precision"]]
    width = config.num_attention_heads * config.attention_head_dim
    video_alone = config.num_layers * 2 * width * config.ffn_dim
    kept = 2 * config.num_layers * width * (models.video_tokens + profile["text"]["prompt_length"])
    return size * (parameter_count(config) - video_alone + kept)
