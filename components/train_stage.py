"""Train a stage: stage 1 teaches the base to speak of videos, stage 2 refines what it says (method: two stages).

Both run the library's loop on the latents of their own stage, log to MLflow, and leave a whole pipeline folder that can
be used at once. A killed run goes on from its last good checkpoint; under torchrun many processes train together, and
only the first writes.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univigu.errors import BadInputError

if TYPE_CHECKING:
    from components.pipeline.runner import Step
    from univigu import ObjectiveConfig, UniViGUPipeline
    from univigu.training.data import LatentDataset

MODEL = "model"
_RECORDS = ("curves.csv", "heldout.json", "heldout.csv")


def train_stage_1(step: "Step") -> None:
    """Stage 1, *knowledge recall*: the base and stage-1 latents -> a Uni-ViGU whose target text is the prompt."""
    _train(step, 1, "base")


def train_stage_2(step: "Step") -> None:
    """Stage 2, *capability refinement*: stage 1's model and stage-2 latents -> a Uni-ViGU that writes captions."""
    _train(step, 2, "model")


def _train(step: "Step", number: int, source: str) -> None:
    from contextlib import nullcontext

    import torch

    from components.tracking import start_run
    from univigu import TrainingObjective
    from univigu.training.data import token_weights
    from univigu.training.engine import TrainingConfig, is_main_process
    from univigu.training.loop import train

    section = step[f"train_stage_{number}"]
    config = TrainingConfig.from_section(section, step["seed"])
    objective_config = objective_settings(section, step["model"], step["seed"])
    dataset, heldout = open_datasets(step, number)
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
                "univigu.code_digest": step.code_digest,
            },
            datasets={f"latents-stage-{number}": (str(step.inputs["latents"]), step.input_digests["latents"])},
            note=step.scratch / "mlflow.json",
        )
    with run as tracked:
        torch.manual_seed(step["seed"])  # the new weights of the text side
        pipeline = load_pipeline(step, number)
        weights = token_weights(
            dataset.target_ids,
            pipeline.transformer.config.vocab_size,
            pipeline.tokenizer.pad_token_id,
            section["token_weighting"],
        )
        objective = TrainingObjective(pipeline.transformer, objective_config, weights)
        train(objective, dataset, heldout, config, step.scratch, *([tracked.log] if tracked else []))
        step.rows_in = step.rows_out = len(dataset)
        step.facts |= {"training_samples": len(dataset), "heldout_samples": len(heldout)}
        if tracked:
            save(step, pipeline)
            tracked.set_tags({"univigu.model_digest": model_digest(step.out)})


def open_datasets(step: "Step", number: int) -> tuple["LatentDataset", "LatentDataset"]:
    """The stage's samples to train on, and those held out; raises where there are none of either."""
    from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef

    folder = step.inputs["latents"]
    rows = [row for row in step.read("latents", "latents").to_pylist() if row["stage"] == number]
    datasets = []
    for split in ("train", "heldout"):
        chosen = [SampleRef(row["id"], folder / row["shard"], row["row"]) for row in rows if row["split"] == split]
        if not chosen:
            raise BadInputError(
                f"No sample of stage {number} is in the split '{split}'; make more clips, or hold out another share."
            )
        datasets.append(LatentDataset(chosen, folder / EMPTY_PROMPT, step["text"]["prompt_length"]))
    wanted = step["text"]["caption_tokens"][1]
    if datasets[0].text_length != wanted:
        raise BadInputError(
            f"The latents hold texts of {datasets[0].text_length} tokens and the profile says {wanted}; "
            "run encode-latents again."
        )
    return datasets[0], datasets[1]


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
    from transformers import AutoTokenizer

    from univigu import UniViGUPipeline
    from univigu.text_space import row_norm_for

    if number == 2:
        return UniViGUPipeline.from_pretrained(step.inputs["model"] / MODEL)
    model, video, base = step["model"], step["video"], step.inputs["base"]
    words = len(AutoTokenizer.from_pretrained(base / "tokenizer"))
    return UniViGUPipeline.from_wan(
        base,
        text_length=step["text"]["caption_tokens"][1],
        text_latent_dim=model["text_dim"],
        row_norm=row_norm_for(words, model["tau_star"]),
        prediction=model["prediction"],
        ffn_init=model["ffn_init"],
        num_frames=video["frames"],
        height=video["height"],
        width=video["width"],
        fps=video["fps"],
        max_sequence_length=step["text"]["prompt_length"],
        **model["sampling"],
    )


def save(step: "Step", pipeline: "UniViGUPipeline") -> None:
    """Leave the whole pipeline, in safetensors, and the run's records in the step's output."""
    pipeline.vae.register_to_config(_name_or_path="")  # where diffusers read it from: a path of this machine
    pipeline.save_pretrained(step.out / MODEL, safe_serialization=True)
    for name in _RECORDS:
        shutil.copyfile(step.scratch / name, step.out / name)


def model_digest(folder: Path) -> str:
    """What identifies a trained model: the names and bytes of its pipeline folder."""
    from components.pipeline.digests import tree_digest

    return tree_digest([folder / MODEL], relative_to=folder / MODEL)
