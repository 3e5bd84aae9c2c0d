"""The training steps: stage 1 teaches the base to describe videos, stage 2 refines its descriptions.

Both run the library's training loop on the latents of their own stage, log to MLflow, and write a complete pipeline
folder. A killed run resumes from its last valid checkpoint. Under torchrun many processes train together, and only the
first one writes.
"""

import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.digests import tree_digest
from components.pipeline.fingerprint import code_digest
from components.training.previews import show_samples
from components.training.tracked_run import start_run
from univigu.errors import BadInputError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from components.pipeline.step import Step
    from components.training.tracked_run import TrackedRun
    from univigu import ObjectiveConfig, UniViGUPipeline, UniViGUTransformer3DModel
    from univigu.training.data import LatentDataset
    from univigu.training.engine import TrainingConfig

MODEL = "model"
_RECORDS = ("curves.csv", "heldout.json", "heldout.csv")
_BUCKET = ("frames", "height", "width")
_BYTES_PER_WEIGHT = 16  # with its gradient and moments


def train_stage_1(step: "Step") -> None:
    """Stage 1, *knowledge recall*: the base and stage-1 latents -> a model that writes prompts."""
    _train(step, 1, "base")


def train_stage_2(step: "Step") -> None:
    """Stage 2, *capability refinement*: stage 1's model and stage-2 latents -> a model that writes captions."""
    _train(step, 2, "model")


def _train(step: "Step", number: int, source: str) -> None:
    from contextlib import nullcontext

    import torch

    from univigu import TrainingObjective
    from univigu.training.data import token_weights
    from univigu.training.engine import TrainingConfig, is_main_process
    from univigu.training.loop import train

    seed, settings = step.settings.seed, getattr(step.settings, f"train_stage_{number}")
    section = step.parameters[f"train_stage_{number}"]  # the library reads the section as the profile has it
    config = TrainingConfig.from_section(section, seed)
    objective_config = objective_settings(section, step.parameters["model"], seed)
    dataset, heldout = open_datasets(step, number)
    shape = transformer_config(step, number)
    check_memory(shape, config, dataset, objective_config.text_draws)
    with _start_run(step, number, source) if is_main_process() else nullcontext() as tracked:
        torch.manual_seed(seed)  # for the new weights of the text side
        # only rank 0 reads the weights: the engine copies them to every other process
        pipeline = load_pipeline(step, number) if tracked else None
        transformer = pipeline.transformer if pipeline else empty_transformer(shape)
        weights = token_weights(
            dataset.target_ids,
            shape["vocab_size"],
            shape["pad_token_id"],
            settings.token_weighting,
            shape["eos_token_id"],
        )
        if number == 1 and transformer.text_output is not None:
            # as the loss counts them; every process has them, although only rank 0's weights are used
            counts = torch.bincount(dataset.target_ids.flatten(), minlength=shape["vocab_size"])
            transformer.text_output.init_bias(counts * weights)
        objective = TrainingObjective(transformer, objective_config, weights)

        def sample(at: int) -> None:
            tokenizer, sampling = sampler(step, number)
            show_samples(transformer, tokenizer, heldout, sampling, at, pipeline, tracked)

        report = tracked.log if tracked else lambda *_: None
        with step.temporary_files() if tracked else nullcontext():
            order = train(objective, dataset, heldout, config, step.scratch, report, sample)
        step.rows_in = step.rows_out = len(dataset)
        step.facts |= {"training_samples": len(dataset), "heldout_samples": len(heldout)}
        step.facts["buckets"] = [
            {"frames_height_width": list(found.bucket), "samples": found.samples, "batches": found.batches}
            | {"left_over": found.left_over}
            for found in order.report(config.steps)
        ]
        if tracked:
            for bucket in step.facts["buckets"]:
                print("bucket", *(f"{name} {value}" for name, value in bucket.items()), file=sys.stderr)
            save(step, pipeline)
            tracked.set_tags({"univigu.model_digest": model_digest(step.out)})


def _start_run(step: "Step", number: int, source: str) -> "AbstractContextManager[TrackedRun]":
    """The MLflow run of this training, with the digests of everything it is made from."""
    return start_run(
        step.root,
        step.stage.name,
        parameters=step.parameters,
        tags={
            "univigu.stage": step.stage.name,
            "univigu.dataset_digest": step.input_digests["latents"],
            f"univigu.input.{source}_digest": step.input_digests[source],
            "univigu.code_digest": code_digest(step.code),
        },
        description=_describe_run(step, number),
        datasets={f"latents-stage-{number}": (str(step.inputs["latents"]), step.input_digests["latents"])},
        note=step.scratch / "mlflow.json",
    )


def _describe_run(step: "Step", number: int) -> str:
    """What the run trains, on what and for how long, as Markdown."""
    settings, video = getattr(step.settings, f"train_stage_{number}"), step.settings.video if number == 1 else None
    what = (
        f"Stage 1, *knowledge recall*: from the base `{step.inputs['base'].name}`, the new text side learns to write "
        f"the prompt of a clip of {video.frames} x {video.height} x {video.width}"
        if video
        else "Stage 2, *capability refinement*: the model of stage 1 learns to write captions of clips"
    )
    return (
        f"{what}. {settings.steps} steps of {settings.batch_size} samples, learning rate {settings.learning_rate:g}, "
        f"seed {step.settings.seed}.\n\nThe latents have the digest `{step.input_digests['latents']}`. Losses are on "
        f"training batches; those called `heldout_` are on held-out pairs."
    )


def open_datasets(step: "Step", number: int) -> tuple["LatentDataset", "LatentDataset"]:
    """The stage's training samples and its held-out samples; raises `BadInputError` if either has none.

    If the folder of latents says that its shards are in an object store, they are fetched when they are needed.
    """
    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
    from univigu.training.remote_shards import REMOTE, RemoteShards

    folder = step.inputs["latents"]
    rows = [row for row in step.read("latents", "latents").to_pylist() if row["stage"] == number]
    shards = None
    if (folder / REMOTE).is_file():
        cache_bytes = int(getattr(step.settings, f"train_stage_{number}").cache_gb * 1e9)
        cache = Path(os.environ.get("UNIVIGU_CACHE") or step.root / ".univigu" / "cache")
        shards = RemoteShards(folder, cache / "shards", cache_bytes)
    datasets = []
    for split in ("train", "heldout"):
        chosen = [
            SampleRef(row["id"], folder / row["shard"], row["row"], tuple(row[key] for key in _BUCKET))
            for row in rows
            if row["split"] == split
        ]
        if not chosen:
            raise BadInputError(
                f"Stage {number} has no samples in the split '{split}'; make more clips, or change "
                "`validate_data.heldout_share`."
            )
        datasets.append(LatentDataset(chosen, folder / EMPTY_PROMPT, step.settings.text.prompt_length, shards))
    wanted = step.settings.text.caption_tokens[1]
    if datasets[0].text_length != wanted:
        raise BadInputError(
            f"The latents have texts of {datasets[0].text_length} tokens, but the profile's `text.caption_tokens` "
            f"allows {wanted}; run encode-latents again."
        )
    return datasets[0], datasets[1]


def transformer_config(step: "Step", number: int) -> dict[str, Any]:
    """The config of the transformer that a stage trains, read without loading any weights."""
    from transformers import AutoTokenizer

    from univigu import UniViGUTransformer3DModel, wan

    if number == 2:
        return wan.read_json(step.inputs["model"] / MODEL / "transformer" / "config.json")
    base = step.inputs["base"]
    known = UniViGUTransformer3DModel._get_init_keys(UniViGUTransformer3DModel)
    config = wan.read_json(wan.transformer_folder(base) / "config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(base / "tokenizer")
    return {name: value for name, value in config.items() if name in known} | {
        "vocab_size": wan.read_json(base / "text_encoder" / "config.json")["vocab_size"],
        "tokenizer_length": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **text_side(step, len(tokenizer)),
    }


def text_side(step: "Step", vocabulary: int) -> dict[str, Any]:
    """The config of a new text side, as the profile sets it, for a vocabulary of this size."""
    from univigu.text_space import row_norm_for

    model = step.settings.model
    return {
        "text_length": step.settings.text.caption_tokens[1],
        "text_latent_dim": model.text_dim,
        "text_output_dim": model.output_dim,
        "row_norm": row_norm_for(vocabulary, model.tau_star),
        "prediction": model.prediction,
        "ffn_init": model.ffn_init,
        "caption_attention": model.caption_attention,
    }


def check_memory(
    shape: Mapping[str, Any], config: "TrainingConfig", dataset: "LatentDataset", text_draws: int = 1
) -> None:
    """Raise `ConfigError`, before any weights are loaded, if the run needs more memory than is free."""
    from univigu.training.memory import parameter_count
    from univigu.training.memory_check import (
        count_trainable,
        free_host_memory,
        free_memory,
        needed_host_memory,
        needed_memory,
        require_host_memory,
        require_memory,
    )

    trainable = count_trainable(shape, config)
    free, free_host = free_memory(), free_host_memory()
    if parameter_count(shape) * _BYTES_PER_WEIGHT * 100 < min(free, free_host):
        return  # a small model: counting its activations would take longer than it is worth
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # checks once per machine; rank 0 loads only after this
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host = needed_host_memory(shape, config, world_size=world_size, processes=processes, trainable=trainable)
        require_host_memory(host, free_host, config)
    largest = max(range(len(dataset)), key=lambda index: math.prod(dataset.samples[index].bucket))
    latents = dataset.batch([largest], [0])["latents"].shape[2:]
    frames, height, width = empty_transformer(shape).grid(latents)
    needed = needed_memory(
        shape,
        config,
        video_tokens=frames * height * width,
        context_tokens=dataset.prompt_length,
        world_size=world_size,
        trainable=trainable,
        text_draws=text_draws,
    )
    require_memory(needed, free, config)


def empty_transformer(config: Mapping[str, Any]) -> "UniViGUTransformer3DModel":
    """The transformer of a process that gets its weights from rank 0: on the meta device, except its RoPE tables."""
    import torch

    from univigu import UniViGUTransformer3DModel
    from univigu.transformer import RotaryTables

    with torch.device("meta"):
        model = UniViGUTransformer3DModel.from_config(config)
    own = model.config
    model.rope = RotaryTables(own.attention_head_dim, own.patch_size, own.rope_max_seq_len)
    return model


def objective_settings(section: Mapping[str, Any], model: Mapping[str, Any], seed: int) -> "ObjectiveConfig":
    """The library's objective for a profile's training section and its section `model`, both as mappings."""
    from univigu import ObjectiveConfig

    weights = section["loss_weights"]
    return ObjectiveConfig(
        shares=section["tasks"],
        prompt_dropout=section["prompt_dropout"],
        video_shift=section["time_shift"]["video"],
        text_shift=section["time_shift"]["text"],
        coupled_times=section["coupled_times"],
        video_weight=weights["video"],
        text_weight=weights["text"],
        ce_weight=weights["cross_entropy"],
        self_conditioning=model["self_conditioning"],
        text_draws=section["text_draws"],
        task_draw=section["task_draw"],
        form=section["objective"],
        seed=seed,
    )


def load_pipeline(step: "Step", number: int) -> "UniViGUPipeline":
    """The pipeline that the stage starts from: the base with a new text side (1), or stage 1's model (2)."""
    from univigu import UniViGUPipeline

    if number == 2:
        from univigu.training.adapters import merge_lora

        pipeline = UniViGUPipeline.from_pretrained(step.inputs["model"] / MODEL)
        merge_lora(pipeline.transformer)  # adapters that stage 1 left unmerged
        return pipeline
    tokenizer, sampling = sampler(step, number)
    return UniViGUPipeline.from_wan(step.inputs["base"], **text_side(step, len(tokenizer)), **sampling)


def sampler(step: "Step", number: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and the pipeline's default sampling settings: from the profile (1) or from stage 1's model (2)."""
    import inspect

    from transformers import AutoTokenizer

    from univigu import UniViGUPipeline, wan

    if number == 2:
        folder = step.inputs["model"] / MODEL
        known = inspect.signature(UniViGUPipeline.__init__).parameters
        index = wan.read_json(folder / "model_index.json")
        settings = {name: value for name, value in index.items() if name in known and not isinstance(value, list)}
        return AutoTokenizer.from_pretrained(folder / "tokenizer"), settings
    video = step.settings.video
    return AutoTokenizer.from_pretrained(step.inputs["base"] / "tokenizer"), {
        "num_frames": video.frames,
        "height": video.height,
        "width": video.width,
        "fps": video.fps,
        "max_sequence_length": step.settings.text.prompt_length,
        **step.parameters["model"]["sampling"],  # saved with the model, whose digest tells 3 from 3.0
    }


def save(step: "Step", pipeline: "UniViGUPipeline") -> None:
    """Write the whole pipeline, in safetensors, and the run's records into the step's output."""
    pipeline.save_pretrained(step.out / MODEL, safe_serialization=True)
    for name in _RECORDS:
        shutil.copyfile(step.scratch / name, step.out / name)


def model_digest(folder: Path) -> str:
    """The digest of a trained model: over the names and bytes of the files in its pipeline folder."""
    return tree_digest([folder / MODEL], relative_to=folder / MODEL)
