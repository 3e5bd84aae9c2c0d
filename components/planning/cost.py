"""The cost of a profile on given GPUs: memory, operations, days, storage, requests and money.

Models are on the meta device, so only shapes are computed. Times, and what follows from them, are ranges ``[shortest,
longest]``, because no run at this size has been measured. ``assumptions`` lists every figure that is assumed rather
than derived, and ``checks`` compares ours with published figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.profiles import load_profile
from components.planning.meta_models import MetaModels, build_models, check_video
from components.training.train_stage import objective_settings
from univigu import planning, wan
from univigu.errors import BadInputError
from univigu.hardware import Gpu, find_gpu
from univigu.training.engine import OFFLOAD, TrainingConfig
from univigu.training.memory import BYTES, parameter_count
from univigu.training.memory_check import count_trainable, needed_by_task, needed_host_memory

if TYPE_CHECKING:
    from univigu.training.engine import TrainingConfig

# Measured with Wan by NVIDIA: NeMo Automodel, which trains diffusers' own modules as we do, on 64 and on 8 H100s; and
# NeMo's Megatron path with the 14B on 128 H100s, whose fused kernels and parallel layers we don't have.
EAGER_MFU = (0.18, 0.23)
NEMO_TFLOPS = 325.8
MEGATRON_MFU = round(NEMO_TFLOPS / 989.4, 2)
PAPER = {"gpus": 16, "gpu": "h800", "steps": 100_000, "seconds": 6.05}  # under a week
CLIP = {"frames": 81, "height": 480, "width": 832}
KEPT_CHECKPOINTS = 2  # per run; the one being written is a third
DAY = 86_400

Profile = Mapping[str, Any]
Plan = dict[str, Any]
Span = list[float]  # [shortest, longest]


def make_plan(
    profile: Profile,
    root: Path,
    gpus: int,
    gpu: str,
    mfu: float | None = None,
    zero: int | None = None,
    price: float = 0.0,
) -> Plan:
    """The whole plan as plain data.

    mfu: model FLOPs utilisation, by default the range `EAGER_MFU`. zero: overrides the profile's ZeRO stage. price: of
    a GPU-hour.
    """
    device = find_gpu(gpu)
    utilisation = mfu_range(mfu)
    rates = [device.tflops * 1e12 * each for each in utilisation]
    models = build_models(profile, wan.config_folder(root / profile["base"]))
    check_video(profile, models)
    text = profile["text"]
    tokens = planning.Tokens(models.video_tokens, text["caption_tokens"][1], text["prompt_length"])
    stages, memory = {}, {}
    for number in (1, 2):
        section = profile[f"train_stage_{number}"]
        config = TrainingConfig.from_section(section, profile["seed"])
        check_zero(config, zero)
        objective = objective_settings(section, profile["model"], profile["seed"])
        stages[f"stage_{number}"] = plan_stage(models, tokens, config, objective, gpus, rates)
        memory[f"stage_{number}"] = plan_memory(models, tokens, config, gpus, device, zero, objective.text_draws)
    synthesis = plan_synthesis(profile, models, tokens, rates)
    days = {
        "synthesis": synthesis["gpu_days"],
        "encoding": synthesis["encoding_gpu_days"],
        **{name: stage["gpu_days"] for name, stage in stages.items()},
    }
    hours = {name: [24 * end for end in span] for name, span in days.items()}
    return {
        "gpu": {"name": gpu, "count": gpus, **device._asdict(), "mfu": utilisation},
        "model": describe_models(models, tokens),
        "memory": memory,
        "training": stages,
        "days": total([stage["days"] for stage in stages.values()]),
        "synthesis": synthesis,
        "captioning": plan_captioning(profile),
        "storage": plan_storage(profile, models),
        "gpu_hours": hours,
        "cost": {"per_gpu_hour": price, "total": [price * end for end in total(list(hours.values()))]},
        "assumptions": assumptions(profile, utilisation),
        "checks": known_figures(utilisation),
    }


def mfu_range(mfu: float | None) -> Span:
    """[lowest, highest] share of a GPU's peak; raises `BadInputError` for a share that there can't be."""
    if mfu is not None and not 0 < mfu <= 1:
        raise BadInputError(f"The MFU is {mfu}; give a share of the GPU's peak, above 0 and at most 1.")
    return list(EAGER_MFU) if mfu is None else [mfu, mfu]


def check_zero(config: "TrainingConfig", zero: int | None) -> None:
    """Refuse a ZeRO stage that there isn't, before anything is counted; raises `BadInputError`."""
    stage = config.zero_stage if zero is None else zero
    if stage not in range(config.precision == "bf16", 4):
        raise BadInputError(f"There is no ZeRO stage {stage} in {config.precision}; use one of 1, 2 and 3.")


def durations(flops: float, rates: Sequence[float]) -> Span:
    """[shortest, longest] seconds of so many operations at a range of rates, in FLOP/s."""
    return [flops / max(rates), flops / min(rates)]


def total(spans: Sequence[Span]) -> Span:
    """The sum of the shortest and of the longest."""
    return [sum(ends) for ends in zip(*spans, strict=True)]


def describe_models(models: MetaModels, tokens: planning.Tokens) -> Plan:
    """Numbers of parameters, the latents' shape, and the tokens of a sample."""
    count = {name: sum(p.numel() for p in getattr(models, name).parameters()) for name in ("base", "vae")}
    trained = parameter_count(models.transformer.config)
    return {
        "configs": models.folder.name,
        "parameters": trained,
        "text_side": trained - count["base"],
        "text_encoder": sum(p.numel() for p in models.text_encoder.parameters()),
        "vae": count["vae"],
        "latents": list(models.latents),
        "tokens": tokens._asdict(),
    }


def plan_hours(profile: Profile, models: MetaModels, gpus: int, gpu: str) -> dict[str, float]:
    """The most hours of each long step, by name, shared by all GPUs."""
    text, rates = profile["text"], [find_gpu(gpu).tflops * 1e12 * each for each in EAGER_MFU]
    tokens = planning.Tokens(models.video_tokens, text["caption_tokens"][1], text["prompt_length"])
    synthesis = plan_synthesis(profile, models, tokens, rates)
    hours = {"synthesize-videos": 24 * synthesis["gpu_days"][1] / gpus}
    for number in (1, 2):
        section = profile[f"train_stage_{number}"]
        objective = objective_settings(section, profile["model"], profile["seed"])
        config = TrainingConfig.from_section(section, profile["seed"])
        stage = plan_stage(models, tokens, config, objective, gpus, rates)
        hours[f"train-stage-{number}"] = 24 * stage["days"][1]
    return hours


def plan_stage(
    models: MetaModels, tokens: planning.Tokens, config: Any, objective: Any, gpus: int, rates: Sequence[float]
) -> Plan:
    """Operations, and the time of a step that waits for its slowest GPU; `rates` are of one GPU, in FLOP/s."""
    costs = planning.task_costs(models.transformer, tokens, objective)
    recomputed = 1 / int(config.gradient_checkpointing) if config.gradient_checkpointing else 0.0
    sharing = config.sequence_parallel  # GPUs, which have the same samples
    guess, groups = objective.self_conditioning, max(1, gpus // sharing)
    share = config.batch_size // groups
    once = planning.task_costs(models.transformer, tokens, replace(objective, text_draws=1))
    mean, single = (planning.mean_step(each, guess, recomputed) for each in (costs, once))
    waiting = planning.slowest_step(costs, guess, recomputed, share, groups)  # if each sample has its own task
    slowest = (waiting if objective.task_draw == "sample" else share * mean) / sharing
    seconds = durations(slowest, rates)
    days = [config.steps * each / DAY for each in seconds]
    return {
        "tasks": {
            task: {
                "share": cost.share,
                "forward": cost.forward,
                "backward": 2 * cost.forward,
                "recomputation": recomputed * cost.forward,
                "first_guess": guess * cost.first_guess(recomputed),
                "step": cost.step(guess, recomputed),
            }
            for task, cost in costs.items()
        },
        "text_draws": {"draws": objective.text_draws, "more_flops": mean / single - 1},
        "flops_per_sample": mean,
        "flops_slowest_gpu": slowest,
        "task_draw": {"draw": objective.task_draw, "saved_by_step": 1 - share * mean / waiting},
        "step_seconds": seconds,
        "steps": config.steps,
        "days": days,
        "gpu_days": [each * gpus for each in days],
    }


def plan_memory(
    models: MetaModels,
    tokens: planning.Tokens,
    config: "TrainingConfig",
    gpus: int,
    device: Gpu,
    zero: int | None,
    text_draws: int = 1,
) -> Plan:
    """Bytes on one GPU by part, for each ZeRO stage with and without recomputation, and which choices fit.

    The figures come from `needed_by_task`, whose largest training also checks before it starts: a row of ``by_stage``
    has the parts of a training step, and in ``total`` the most that any task needs. ``by_task`` has the totals of all
    tasks, for the profile's choice.
    """
    check_zero(config, zero)
    usable = planning.usable_memory(device.memory_gib)
    model, table, by_task = models.transformer.config, {}, {}
    sizes = {"video_tokens": tokens.video, "context_tokens": tokens.context, "world_size": gpus}
    sizes["text_draws"] = text_draws
    trainable = count_trainable(model, config)
    every = int(config.gradient_checkpointing)
    for stage in range(4):
        if stage == 0 and config.precision == "bf16":
            continue  # would keep no fp32 weights
        offload = tuple(part for part in config.offload if stage >= OFFLOAD[part])
        for recomputed in sorted({0, 1, every}, key=lambda k: k or math.inf):
            tried = replace(config, zero_stage=stage, offload=offload, gradient_checkpointing=recomputed)
            tasks = needed_by_task(model, tried, **sizes, trainable=trainable)
            by_task[name := _choice(stage, recomputed)] = {task: parts["total"] for task, parts in tasks.items()}
            most = max(by_task[name].values())
            table[name] = {**tasks["training step"], "total": most, "fits": most <= usable}
    chosen = _choice(config.zero_stage if zero is None else zero, every)
    encoders = sum(p.numel() for m in (models.text_encoder, models.vae) for p in m.parameters())
    processes = min(gpus, 8)  # per machine
    host = needed_host_memory(model, config, world_size=gpus, processes=processes, trainable=trainable)
    return {
        "usable": usable,
        "chosen": chosen,
        "fits": table[chosen]["fits"],
        "by_stage": table,
        "by_task": by_task[chosen],
        "learning": trainable,
        "encoders": 0,  # latents and states are precomputed
        "host_bytes_per_machine": host["total"] + 4 * encoders,
    }


def _choice(zero: int, every: int) -> str:
    """The name of a row: the ZeRO stage, and which blocks recompute activations (none, all, or every k-th)."""
    return f"zero_{zero}_" + {0: "kept", 1: "recomputed"}.get(every, f"recomputed/{every}")


def plan_synthesis(profile: Profile, models: MetaModels, tokens: planning.Tokens, rates: Sequence[float]) -> Plan:
    """GPU-days to generate clips (denoising, then the VAE) and to encode them; rates: FLOP/s of one GPU."""
    settings, video = profile["synthesize_videos"], profile["video"]
    denoise = models.transformer.estimate_flops(tokens.video, 0, tokens.context)
    passes = settings["steps"] * (2 if settings["guidance_scale"] > 1 else 1)
    encode, decode = autoencoder_flops(models, video)
    clip = passes * denoise + decode
    return {
        "clips": settings["clips"],
        "flops_per_clip": clip,
        "flops_denoising": passes * denoise,
        "flops_decoding": decode,
        "flops_encoding": encode,
        "gpu_seconds_per_clip": durations(clip, rates),
        "gpu_days": durations(settings["clips"] * clip / DAY, rates),
        "encoding_gpu_days": durations(settings["clips"] * encode / DAY, rates),
    }


def autoencoder_flops(models: MetaModels, video: Mapping[str, Any]) -> tuple[int, int]:
    """Operations to encode a clip of the profile's size, and to decode it.

    The autoencoder takes one latent frame after the other with what it keeps of earlier ones (diffusers,
    autoencoder_kl_wan.py), so from the third on each costs the same, and only four are counted.
    """
    import torch

    channels, frames, *latent_size = models.latents
    stride = models.vae.config.scale_factor_temporal
    size = video["height"], video["width"]

    def encode(count: int) -> int:
        return planning.count_flops(lambda: models.vae.encode(torch.empty(1, 3, 1 + (count - 1) * stride, *size)))

    def decode(count: int) -> int:
        return planning.count_flops(lambda: models.vae.decode(torch.empty(1, channels, count, *latent_size)))

    return _extended(encode, frames), _extended(decode, frames)


def _extended(flops: Callable[[int], int], frames: int) -> int:
    """`flops(frames)`, where each frame after the third adds the same."""
    if frames <= 4:
        return flops(frames)
    three = flops(3)
    return three + (frames - 3) * (flops(4) - three)


def plan_captioning(profile: Profile) -> Plan:
    """Requests to the captioner: at least one per clip of stage 2."""
    clips = round(profile["synthesize_videos"]["clips"] * (1 - profile["synthesize_videos"]["stage_1_share"]))
    settings = profile["caption_videos"]
    return {
        "captioner": settings["captioner"],
        "requests_at_least": clips,
        "requests_at_most": clips * settings["attempts"],
        "answer_tokens": clips * profile["text"]["caption_tokens"][1],
    }


def plan_storage(profile: Profile, models: MetaModels) -> Plan:
    """Upper bounds of bytes on disk: clips, latents, text states, checkpoints and models of both stages."""
    clips, text = profile["synthesize_videos"]["clips"], profile["text"]
    video = profile["video"]
    latents, states = 2, BYTES[profile["encode_latents"]["precision"]]
    for length in models.latents:
        latents *= length
    trained = parameter_count(models.transformer.config)
    encoders = sum(p.numel() for m in (models.text_encoder, models.vae) for p in m.parameters())
    parts = {
        "clips": clips * planning.clip_bytes(video["frames"], video["height"], video["width"]),
        "latents": clips * latents,
        "text_states": clips * text["prompt_tokens"][1] * models.transformer.config.text_dim * states,
        "checkpoints": (KEPT_CHECKPOINTS + 1) * trained * sum(state_bytes(profile, number) for number in (1, 2)),
        "models": 2 * 4 * (trained + encoders),
    }
    return {"latents_per_clip": latents, **parts, "total": sum(parts.values())}


def state_bytes(profile: Profile, number: int) -> int:
    """Bytes of a checkpoint of a stage per trained parameter; an average of the weights is fp32, too."""
    return planning.STATE_BYTES + (BYTES["fp32"] if profile[f"train_stage_{number}"]["ema_decay"] else 0)


def assumptions(profile: Profile, mfu: Span) -> list[str]:
    """What the plan assumes."""
    lengths = f"{profile['text']['prompt_tokens'][1]} tokens per prompt"
    share = f"{mfu[0]:g}" if mfu[0] == mfu[1] else f"{mfu[0]:g} to {mfu[1]:g}"
    return [
        f"The MFU is {share} of the GPU's dense bf16 peak, counting recomputation as work and including "
        "communication, loading and evaluation. Synthesis and encoding have the same MFU. "
        f"{EAGER_MFU[0]:g} to {EAGER_MFU[1]:g} was measured elsewhere with code of this kind, which runs diffusers' "
        f"modules one by one; {MEGATRON_MFU:g} needs a rewritten model such as Megatron's.",
        "Backward passes are counted as if every weight were trained; `freeze` and `lora` reduce them.",
        "Tasks are drawn by the profile's shares; with `task_draw: sample`, a step waits for its slowest GPU.",
        f"The CUDA context and NCCL take {planning.CONTEXT_GIB:g} GiB of a GPU, and fragmentation "
        f"{100 * planning.FRAGMENTATION:g} %; DeepSpeed's buckets have their default sizes.",
        "Operations of the autoencoder and the transformer are counted; those of the text encoder, the norms and the "
        "token table, under 1 % of a step, are not.",
        f"A clip takes {planning.CLIP_BITS_PER_PIXEL:g} bits per pixel; every clip is kept; text states are of "
        f"{lengths}; a run keeps {KEPT_CHECKPOINTS} checkpoints of {planning.STATE_BYTES} bytes per parameter, and "
        "4 more with an average of the weights.",
        "Costs are of GPU-hours only, without the evaluation and the fees of a captioning endpoint.",
    ]


# --- published figures ------------------------------------------------------------------------------------------------


def known_figures(mfu: Span) -> list[Plan]:
    """Published figures beside this planner's, and whether they agree."""
    profile = load_profile("wan-1.3b")
    profile["video"] = {**profile["video"], **CLIP}
    models = build_models(profile, wan.config_folder(profile["base"]))
    tokens = planning.Tokens(models.video_tokens, 256, 512)
    section = profile["train_stage_1"]
    config = TrainingConfig.from_section(section, profile["seed"])
    objective = objective_settings(section, profile["model"], profile["seed"])
    peak = find_gpu(PAPER["gpu"]).tflops * 1e12
    stage = plan_stage(models, tokens, config, objective, PAPER["gpus"], [peak * each for each in mfu])
    shortest = stage["step_seconds"][0]
    joint = models.transformer.estimate_flops(*tokens)
    size = 2
    for length in models.latents:
        size *= length
    return [
        {
            "figure": "a step of the paper's run, 100K steps on 16 H800 in under a week (s)",
            "known": PAPER["seconds"],
            "ours": shortest,
            "agrees": shortest <= PAPER["seconds"],
            "note": f"at most; needs an MFU of {mfu[1] * shortest / PAPER['seconds']:.2f} or more",
        },
        _check("latents of a clip of 81 frames of 480x832 in bf16 (MB)", 4.19, size / 1e6, 0.01),
        _check("a joint sample of the 1.3B, forward and backward (PFLOP)", 0.86, 3 * joint / 1e15, 0.02),
        _check("the same with recomputation (PFLOP)", 1.15, 4 * joint / 1e15, 0.02),
        {
            "figure": "MFU of NeMo's Wan 14B, 325.8 TFLOP/s on an H100",
            "known": NEMO_TFLOPS / 989.4,
            "ours": mfu[1],
            "agrees": mfu[1] <= MEGATRON_MFU,
            "note": "at most; an assumption: nothing published exceeds NeMo's MFU",
        },
    ]


def _check(figure: str, known: float, ours: float, tolerance: float) -> Plan:
    agrees = abs(ours - known) <= tolerance * known
    return {"figure": figure, "known": known, "ours": ours, "agrees": agrees, "note": f"within {100 * tolerance:g} %"}
