"""The model of a whole profile, and the validation of a mapping of settings."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from components.settings.faults import Fault, explain, find_odd_values
from components.settings.fields import Count, Name, Section, setting
from components.settings.sections import (
    CaptionVideos,
    CuratePrompts,
    EncodeLatents,
    EvaluateModel,
    ImportVideos,
    RegisterModel,
    SynthesizeVideos,
    Text,
    ValidateData,
    Video,
)
from components.settings.training import Model, TrainStage


class Profile(Section):
    """All settings of a run of the pipeline."""

    seed: Count = setting("Seed of all random numbers", lt=2**63)
    raw_prompts: Name = setting("Folder of raw prompts: JSONL, CSV or Parquet")
    base: Name = setting("Folder of the base model, in diffusers' Wan layout")
    generator: Name = setting("Folder of the pipeline that makes the clips: any text-to-video pipeline of diffusers")
    heldout: Name = setting("File of held-out items for the evaluation")
    text: Text = setting("Lengths of prompts and captions")
    video: Video = setting("The size of the clips")
    curate_prompts: CuratePrompts = setting("Which raw prompts are kept")
    validate_data: ValidateData = setting("What the gates between steps require")
    synthesize_videos: SynthesizeVideos = setting("How clips are generated, and which are kept")
    import_videos: ImportVideos = setting("`univigu data import`")
    caption_videos: CaptionVideos = setting("The captioner, and the checks of its captions")
    encode_latents: EncodeLatents = setting("How clips and texts are encoded")
    model: Model = setting("The text side that is added to the base")
    train_stage_1: TrainStage = setting("Training on prompts")
    train_stage_2: TrainStage = setting("Training on captions")
    evaluate_model: EvaluateModel = setting("What the trained model is measured on")
    register_model: RegisterModel = setting("What the model is called in the registry, and when it becomes champion")

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        for name in ("train_stage_1", "train_stage_2"):
            training = getattr(self, name)
            if self.model.output_dim and training.zero_stage == 3 and training.task_draw == "sample":
                # seen on two processes: a rank whose micro-batch has no text gathers the table once less
                yield (
                    f"{name}.task_draw",
                    f"is sample, and with ZeRO 3 the output table (model.output_dim {self.model.output_dim}) needs "
                    "steps of one task; set it to step, or zero_stage to 2",
                )


def read_sections(values: Mapping[str, Any]) -> Profile:
    """A profile with only the given sections; reading another section raises `AttributeError`."""
    read = {name: _kinds()[name].validate_python(value) for name, value in values.items() if name in _kinds()}
    return Profile.model_construct(None, **read)


@functools.cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(field.annotation) for name, field in Profile.model_fields.items()}


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a complete profile; callers must not modify it."""
    return Profile.model_json_schema()


def find_faults(values: Mapping[str, Any]) -> list[Fault]:
    """All faults of a complete profile, in the order of its keys; empty for a valid one."""
    odd = list(find_odd_values(values))
    try:
        Profile.model_validate(dict(values))
    except ValidationError as error:
        faults = explain(error.errors(include_url=False, include_input=False), values, schema())
        return [*odd, *(fault for fault in faults if not any(fault.path[: len(one.path)] == one.path for one in odd))]
    return odd
