"""Train a stage: stage 1 teaches the base to speak of videos, stage 2 refines what it says (method: two stages).

Both run the library's loop on the latents of their own stage, log to MLflow, and leave a whole pipeline folder that can
be used at once. A killed run goes on from its last good checkpoint; under torchrun many processes train together, and
only the first writes.
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
from components.tracking import start_run
from components.training.previews import show_samples
from univigu.errors import BadInputError

if TYPE_CHECKING:
    from components.pipeline.step import Step
    from univigu import ObjectiveConfig, UniViGUPipeline, UniViGUTransformer3DModel
    from univigu.training.data import LatentDataset
    from univigu.training.engine import TrainingConfig

MODEL = "model"
_RECORDS = ("curves.csv", "heldout.json", "heldout.csv")
_BUCKET = ("frames", "height", "width")
_BYTES_A_WEIGHT = 16  # with its gradient and moments


def train_stage_1(step: "Step") -> None:
    """Stage 1, *knowledge recall*: the base and stage-1 latents -> a Uni-ViGU whose target text is the prompt."""
    _train(step, 1, "base")


def train_stage_2(step: "Step") -> None:
    """Stage 2, *capability refinement*: stage 1's model and stage-2 latents -> a Uni-ViGU that writes captions."""
    _train(step, 2, "model")


def _train(step: "Step", number: int, source: str) -> None:
    from contextlib import nullcontext

    import torch

    from univigu import TrainingObjective
    from univigu.training.data import token_weights
    from univigu.training.engine import TrainingConfig, is_main_process
    from univigu.training.loop import train

    section = step[f"train_stage_{number}"]
    config = TrainingConfig.from_section(section, step["seed"])
    objective_config = objective_settings(section, step["model"], step["seed"])
    dataset, heldout = open_datasets(step, number)
    shape = transformer_config(step, number)
    check_memory(shape, config, dataset)
    run = nullcontext()
    if is_main_process():
        run = start_run(
            step.root,
            step.stage.name,
            parameters=step.parameters,
            tags={
                "univigu.stage": step.stage.name,
                "univigu.dataset_digest": step.input_digests["latents"],
                f"univigu.input.{source}_digest": step.input_digests[source],
                "univigu.code_digest": code_digest(step.code),
            },
            datasets={f"latents-stage-{number}": (str(step.inputs["latents"]), step.input_digests["latents"])},
            note=step.scratch / "mlflow.json",
        )
    with run as tracked:
        torch.manual_seed(step["seed"])  # the new weights of the text side
        # the engine gives every process rank 0's weights, so only that one reads them
        pipeline = load_pipeline(step, number) if tracked else None
        transformer = pipeline.transformer if pipeline else empty_transformer(shape)
        weights = token_weights(
            dataset.target_ids, shape["vocab_size"], shape["pad_token_id"], section["token_weighting"]
        )
        objective = TrainingObjective(transformer, objective_config, weights)

        def sample(at: int) -> None:
            tokenizer, settings = sampler(step, number)
            show_samples(transformer, tokenizer, heldout, settings, at, pipeline, tracked)

        order = train(
            objective, dataset, heldout, config, step.scratch, tracked.log if tracked else lambda *_: None, sample
        )
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


def open_datasets(step: "Step", number: int) -> tuple["LatentDataset", "LatentDataset"]:
    """The stage's samples to train on, and those held out; raises where there are none of either.

    Where the folder of latents says that its shards lie in an object store, they are fetched when they are needed.
    """
    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
    from univigu.training.remote_shards import REMOTE, RemoteShards

    folder = step.inputs["latents"]
    rows = [row for row in step.read("latents", "latents").to_pylist() if row["stage"] == number]
    shards = None
    if (folder / REMOTE).is_file():
        cache_bytes = int(step[f"train_stage_{number}"]["cache_gb"] * 1e9)
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
                f"No sample of stage {number} is in the split '{split}'; make more clips, or hold out another share."
            )
        datasets.append(LatentDataset(chosen, folder / EMPTY_PROMPT, step["text"]["prompt_length"], shards))
    wanted = step["text"]["caption_tokens"][1]
    if datasets[0].text_length != wanted:
        raise BadInputError(
            f"The latents hold texts of {datasets[0].text_length} tokens and the profile says {wanted}; "
            "run encode-latents again."
        )
    return datasets[0], datasets[1]


def transformer_config(step: "Step", number: int) -> dict[str, Any]:
    """The config of the transformer that a stage trains, from files of a few KB."""
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


def text_side(step: "Step", words: int) -> dict[str, Any]:
    """What the profile says of a new text side, for a vocabulary of so many words."""
    from univigu.text_space import row_norm_for

    model = step["model"]
    return {
        "text_length": step["text"]["caption_tokens"][1],
        "text_latent_dim": model["text_dim"],
        "row_norm": row_norm_for(words, model["tau_star"]),
        "prediction": model["prediction"],
        "ffn_init": model["ffn_init"],
    }


def check_memory(shape: Mapping[str, Any], config: "TrainingConfig", dataset: "LatentDataset") -> None:
    """Refuse, before anything is loaded, a run that would need more memory than there is."""
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
    if parameter_count(shape) * _BYTES_A_WEIGHT * 100 < min(free, free_host):
        return  # next to nothing: not worth the seconds that counting activations takes
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # speaks for its machine's others; rank 0 loads only after this
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
    )
    require_memory(needed, free, config)


def empty_transformer(config: Mapping[str, Any]) -> "UniViGUTransformer3DModel":
    """The transformer of a process that is given its weights by another: on the meta device, but for its tables."""
    import torch

    from univigu import UniViGUTransformer3DModel
    from univigu.transformer import RotaryTables

    with torch.device("meta"):
        model = UniViGUTransformer3DModel.from_config(config)
    own = model.config
    model.rope = RotaryTables(own.attention_head_dim, own.patch_size, own.rope_max_seq_len)
    return model


def objective_settings(section: Mapping[str, Any], model: Mapping[str, Any], seed: int) -> "ObjectiveConfig":
    """A profile's training section as the library's objective."""
    from univigu import ObjectiveConfig

    weights = section["loss_weights"]
    return ObjectiveConfig(
        shares=section["tasks"],
        prompt_dropout=section["prompt_dropout"],
        video_shift=section["time_shift"]["video"],
        text_shift=section["time_shift"]["text"],
        video_weight=weights["video"],
        text_weight=weights["text"],
        ce_weight=weights["cross_entropy"],
        self_conditioning=model["self_conditioning"],
        form=section["objective"],
        seed=seed,
    )


def load_pipeline(step: "Step", number: int) -> "UniViGUPipeline":
    """What the stage starts from: the base with a new text side (1), or stage 1's model (2)."""
    from univigu import UniViGUPipeline

    if number == 2:
        return UniViGUPipeline.from_pretrained(step.inputs["model"] / MODEL)
    tokenizer, settings = sampler(step, number)
    return UniViGUPipeline.from_wan(step.inputs["base"], **text_side(step, len(tokenizer)), **settings)


def sampler(step: "Step", number: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and what the pipeline does unless told otherwise: the profile says it (1), or stage 1's model."""
    import inspect

    from transformers import AutoTokenizer

    from univigu import UniViGUPipeline, wan

    if number == 2:
        folder = step.inputs["model"] / MODEL
        known = inspect.signature(UniViGUPipeline.__init__).parameters
        index = wan.read_json(folder / "model_index.json")
        settings = {name: value for name, value in index.items() if name in known and not isinstance(value, list)}
        return AutoTokenizer.from_pretrained(folder / "tokenizer"), settings
    video = step["video"]
    return AutoTokenizer.from_pretrained(step.inputs["base"] / "tokenizer"), {
        "num_frames": video["frames"],
        "height": video["height"],
        "width": video["width"],
        "fps": video["fps"],
        "max_sequence_length": step["text"]["prompt_length"],
        **step["model"]["sampling"],
    }


def save(step: "Step", pipeline: "UniViGUPipeline") -> None:
    """Leave the whole pipeline, in safetensors, and the run's records in the step's output."""
    pipeline.save_pretrained(step.out / MODEL, safe_serialization=True)
    for name in _RECORDS:
        shutil.copyfile(step.scratch / name, step.out / name)


def model_digest(folder: Path) -> str:
    """What identifies a trained model: the names and bytes of its pipeline folder."""
    return tree_digest([folder / MODEL], relative_to=folder / MODEL)
