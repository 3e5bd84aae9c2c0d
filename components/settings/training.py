"""The sections of the model and of its two training stages."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from components.settings.fields import (
    Count,
    Every,
    Name,
    NotNegative,
    Positive,
    Precision,
    Section,
    Share,
    Size,
    setting,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


class Sampling(Section):
    """Sampling defaults of the saved model."""

    num_inference_steps: Size = setting("Denoising steps of a video", "steps")
    guidance_scale: NotNegative = setting("Scale of classifier-free guidance of videos; up to 1: none")
    shift: Positive = setting("Timestep shift of videos; above 1: more of the steps near the noise")
    caption_steps: Size = setting("Euler steps of a caption", "steps")
    caption_guidance_scale: NotNegative = setting("Scale of classifier-free guidance of captions; 1: none")
    caption_temperature: NotNegative = setting("Sampling temperature of captions: 1 samples, 0 is greedy")
    joint_text_at: Share = setting("Of a joint sample: the video's time, 0 to 1, at which its text is written")
    joint_in_step: Share = setting(
        "The part of the video's times during which the text is denoised, too; 0: in turn, 1: in lockstep (eq 18)"
    )
    joint_text_shift: Positive = setting("Timestep shift of a text that is denoised with its video; above 1: it lags")
    joint_prompt_until: Share = setting(
        "The text's time, 0 to 1, from which what it says replaces the prompt as the condition; 1: when it is finished"
    )


class Model(Section):
    """The text side that is added to the base."""

    text_dim: Size = setting("d of the token table E", "dimensions")
    output_dim: Count = setting(
        "Numbers that the text head reads beside d, for an output table of their own with a bias per token; 0: none",
        "dimensions",
    )
    prediction: Literal["categorical", "x1", "velocity"] = setting("What the text side predicts")
    ffn_init: Literal["new", "copy", "shared"] = setting(
        "Initialise its feed-forward layers anew, copy the video side's, or use the video side's own"
    )
    caption_attention: Literal["prefix", "joint"] = setting(
        "What a video attends to while a text about it is written: itself (and is computed once), or the text, too"
    )
    tau_star: Annotated[float, Field(gt=0, lt=1)] = setting("The time at which tokens become readable, 0 noise, 1 data")
    self_conditioning: Share = setting("Share of the steps in which the text sees its own first guess")
    sampling: Sampling = setting("Sampling defaults of the saved model")


class Lora(Section):
    """Adapters on the video side."""

    rank: Size = setting("Rank of the adapters")
    alpha: Positive = setting("The adapters count alpha / rank times")
    targets: list[Name] = setting("The linear layers that get one, by the end of their names", min_length=1)
    merge: bool = setting("Merge them into the weights at the end; false: save them beside the model", default=True)


class PromptDropout(Section):
    """Share of the samples without their prompt."""

    joint: Share = setting("Of joint samples")
    generate: Share = setting("Of samples that generate a video")


class TimeShift(Section):
    """Shift of the training times."""

    video: Positive = setting("Of the video's")
    text: Positive = setting("Of the text's")


class Tasks(Section):
    """Shares of the training tasks; they are scaled to sum to 1."""

    understand: NotNegative = setting("Video to text")
    joint: NotNegative = setting("Video and text together")
    generate: NotNegative = setting("Text to video")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        if not self.understand + self.joint + self.generate > 0:
            yield "", "has no share above 0; give one task a share"


class LossWeights(Section):
    """Weights of the losses."""

    video: NotNegative = setting("Of the video's velocity")
    text: NotNegative = setting("Of the text's velocity")
    cross_entropy: NotNegative = setting("Of the text's cross-entropy")


class TrainStage(Section):
    """A training stage."""

    steps: Size = setting("Optimizer steps", "steps")
    batch_size: Size = setting("Samples of a step, over all processes and micro-batches", "samples")
    learning_rate: Positive = setting("Peak learning rate of the text side")
    video_lr_factor: NotNegative = setting("Learning rate of the base's own weights, relative to the text side's")
    warmup_steps: Count = setting("Steps over which the learning rate rises to its peak", "steps")
    schedule: Literal["cosine", "constant"] = setting("After the warm-up: cosine, down to zero at the end, or constant")
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = setting("Betas of AdamW")
    weight_decay: NotNegative = setting("Weight decay of matrices; norms, biases and tables have none")
    grad_clip: Positive = setting("Largest norm of a step's gradients")
    micro_batch_size: Size | None = setting(
        "Samples per process and micro-batch; null: the process's whole share of the batch", "samples"
    )
    gradient_checkpointing: Every = setting(
        "Recompute activations in the backward pass; false: never, true: in all blocks, k: in every k-th",
        "blocks",
    )
    offload: list[Literal["optimizer", "parameters"]] = setting(
        "Offload to CPU memory: optimizer (zero_stage 1 to 3), parameters (zero_stage 3)"
    )
    freeze: list[Name] = setting(
        "Untrained parts: video, text, self_attention, cross_attention, video_feed_forward, text_feed_forward, "
        "token_table, or patterns such as blocks.0.*"
    )
    lora: Lora | None = setting("Train adapters on the video side in place of its weights; null: none")
    ema_decay: Beta = setting("Above 0: evaluate and save a running average of the weights, such as 0.9999")
    shuffle_shards: Count = setting("Number of shards to shuffle within; 0: shuffle all samples", "shards")
    cache_gb: Positive = setting("Disk space for shards from an object store", "GB")
    prompt_dropout: PromptDropout = setting("Share of the samples without their prompt")
    time_shift: TimeShift = setting("Shift of the training times; above 1: more of them near the noise")
    coupled_times: Share = setting(
        "Of joint samples: share whose times of video and text are one draw, each shifted by its own; others draw two"
    )
    tasks: Tasks = setting("Shares of the training tasks; they are scaled to sum to 1")
    text_draws: Size = setting(
        "Of understand: noises and times of the text for each pass over the video; the loss is their mean", "draws"
    )
    task_draw: Literal["sample", "step"] = setting(
        "Draw a task for each sample, or one for all samples of a step: with several GPUs none waits for another"
    )
    objective: Literal["weighted", "literal"] = setting("Literal: eq 11 as printed")
    loss_weights: LossWeights = setting("Weights of the losses")
    token_weighting: Literal["rarity", "inverse_document_frequency", "root_inverse_document_frequency", "uniform"] = (
        setting("How much each token counts in the cross-entropy")
    )
    attention_backend: str = setting("Diffusers' name of an implementation: flash, _flash_3 ...; empty: torch's own")
    compile: Literal["none", "blocks"] = setting(
        "Blocks: let torch compile the transformer's blocks; the first steps take minutes more"
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = setting("DeepSpeed's ZeRO stage")
    sequence_parallel: Size = setting("GPUs that share the tokens of a video; 1: none", "GPUs")
    precision: Precision = setting("Precision of weights and activations; the optimizer keeps fp32")
    checkpoint_every: Size = setting("Save a checkpoint every so many steps", "steps")
    heldout_every: Size = setting("Measure held-out losses every so many steps, and at the end", "steps")
    samples_every: Count = setting("Log held-out captions and clips to MLflow every so many steps; 0: never", "steps")
    peak_tflops: Positive | None = setting("Peak performance of one GPU, for the MFU; null: from its name", "TFLOP/s")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        if self.precision == "bf16" and self.zero_stage == 0:
            yield "zero_stage", "is 0, and bf16 without ZeRO keeps no fp32 weights; set it to 1 or more"
        if self.compile == "blocks" and self.zero_stage == 3:
            yield (
                "compile",
                "is blocks, and ZeRO 3 gathers weights within a block; set it to none, or zero_stage below 3",
            )
        needed = {"optimizer": 1, "parameters": 3}
        for part in self.offload:
            if self.zero_stage < needed[part]:
                yield "zero_stage", f"is {self.zero_stage}; to offload {part}, set it to {needed[part]} or more"
        if self.text_draws > 1 and not self.tasks.understand:
            yield "text_draws", f"is {self.text_draws}, and understand has no share; set it to 1, or give it a share"
        if self.coupled_times and not self.tasks.joint:
            yield "coupled_times", f"is {self.coupled_times:g}, and joint has no share; set it to 0, or give it a share"
        if self.objective == "literal" and self.coupled_times:
            yield "coupled_times", "must be 0 with the literal objective, whose times are independent"
        if self.objective == "literal" and (self.tasks.understand or self.tasks.generate):
            yield "tasks", "has others than joint, the literal objective's only one; set their shares to 0"
        if self.objective == "literal" and (self.time_shift.video, self.time_shift.text) != (1, 1):
            yield "time_shift", "must be 1 for both with the literal objective"
