"""The table of steps: the name, inputs, outputs and requirements of each.

`dvc.yaml` and every other orchestrator must agree with this table; a test compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from univigu.errors import ConfigError

EDITS = "data/edits.json"  # people's edits of clips (`components.pipeline.edits`)
EDITED = "edits"  # its name among the inputs of a step
EXCLUDED = "excluded"  # the reason of rows that someone excluded


@dataclass(frozen=True)
class Resources:
    """What a step requests from a cluster."""

    pool: str = "cpu"  # the kind of node: cpu, gpu or training
    gpus: int = 0
    cpu: str = "2"
    memory: str = "8Gi"
    hours: int = 4  # after which a cluster considers it stuck


@dataclass(frozen=True)
class Stage:
    """One step. Paths are relative to the work root."""

    name: str
    function: str  # "module:function", imported only when the step runs
    home: str  # the folder that holds its output
    outputs: tuple[str, ...] = ()  # the entries that it writes there; empty: it owns the whole folder
    inputs: Mapping[str, str] = field(default_factory=dict)  # name in the step -> the step that makes it
    sources: Mapping[str, str] = field(default_factory=dict)  # name in the step -> the profile's key with its path
    parameters: tuple[str, ...] = ()  # the profile's sections that decide its output
    # Code that is chosen by name: a package, a folder of data files, or module:TABLE -> where the profile names it.
    plugins: Mapping[str, str] = field(default_factory=dict)
    # "module:function" that applies the edits in `EDITS` to a table that the step reads: (step, name, table) -> table.
    edits: str = ""
    carries: tuple[str, ...] = ()  # packages that are copied into its output, so that all of their code counts
    # On a cluster: the name of a secret, which need not exist -> the environment variables that it sets.
    secrets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    external: bool = False  # whether it also changes something outside its output, such as a registry
    sharded: bool = False  # whether several processes can each make a part of its shards
    together: bool = False  # whether several processes of torchrun can run it together
    resources: Resources = Resources()

    @property
    def module(self) -> str:
        return self.function.partition(":")[0]


_GPU = Resources("gpu", gpus=1, cpu="8", memory="64Gi", hours=24 * 14)
_TRAINING = Resources("training", gpus=8, cpu="32", memory="256Gi", hours=24 * 28)

STAGES: tuple[Stage, ...] = (
    Stage(
        "curate-prompts",
        "components.prompts.curate_prompts:curate_prompts",
        home="data/curated",
        sources={"raw": "raw_prompts", "base": "base"},
        parameters=("text", "curate_prompts"),
    ),
    Stage(
        "validate-prompts",
        "components.validation.validate_data:validate_prompts",
        home="data/validated/prompts",
        inputs={"prompts": "curate-prompts"},
        sources={"base": "base"},
        parameters=("text", "curate_prompts", "validate_data"),
    ),
    Stage(
        "synthesize-videos",
        "components.clips.synthesize_videos:synthesize_videos",
        home="data/clips",
        inputs={"prompts": "validate-prompts"},
        sources={"generator": "generator"},
        parameters=("seed", "video", "synthesize_videos"),
        plugins={"components.checks": "synthesize_videos.checks"},
        sharded=True,
        resources=_GPU,
    ),
    Stage(
        "validate-clips",
        "components.validation.validate_data:validate_clips",
        home="data/validated/clips",
        inputs={"clips": "synthesize-videos"},
        parameters=("video", "validate_data"),
    ),
    Stage(
        "caption-videos",
        "components.captions.caption_videos:caption_videos",
        home="data/captions",
        inputs={"clips": "synthesize-videos", "gate": "validate-clips"},
        sources={"base": "base"},
        parameters=("seed", "text", "caption_videos"),
        plugins={
            "components.captions.captioners": "caption_videos.captioner",
            "components.captions.captioners.templates": "caption_videos.options.template",
            "components.checks": "caption_videos.checks",
        },
        secrets={"univigu-captioner": ("CAPTION_BASE_URL", "CAPTION_API_KEY")},
        sharded=True,
        resources=Resources(hours=48),
    ),
    Stage(
        "validate-pairs",
        "components.validation.validate_data:validate_pairs",
        home="data/pairs",
        inputs={"clips": "validate-clips", "captions": "caption-videos"},
        sources={"base": "base"},
        parameters=("text", "validate_data"),
        plugins={
            "components.checks": "validate_data.caption_checks",
            "components.validation.validate_data:READERS": "validate_data.caption_quality.mode",
        },
        edits="components.validation.edits:apply_edits",
    ),
    Stage(
        "encode-latents",
        "components.latents.encode_latents:encode_latents",
        home="data/latents",
        inputs={"clips": "synthesize-videos", "pairs": "validate-pairs"},
        sources={"base": "base"},
        parameters=("text", "video", "encode_latents"),
        sharded=True,
        resources=_GPU,
    ),
    Stage(
        "train-stage-1",
        "components.training.train_stage:train_stage_1",
        home="data/stage1",
        inputs={"latents": "encode-latents"},
        sources={"base": "base"},
        parameters=("seed", "text", "video", "model", "train_stage_1"),
        together=True,
        resources=_TRAINING,
    ),
    Stage(
        "train-stage-2",
        "components.training.train_stage:train_stage_2",
        home="data/stage2",
        inputs={"latents": "encode-latents", "model": "train-stage-1"},
        parameters=("seed", "text", "model", "train_stage_2"),
        together=True,
        resources=_TRAINING,
    ),
    Stage(
        "evaluate-model",
        "components.evaluation.evaluate_model:evaluate_model",
        home="reports",
        outputs=(
            *("metrics.json", "scores.json", "confidence.json", "items.parquet"),
            *("report.html", "gallery.webp", "plots"),
        ),
        inputs={
            "prompts": "curate-prompts",
            "checked_prompts": "validate-prompts",
            "clips": "synthesize-videos",
            "checked_clips": "validate-clips",
            "captions": "caption-videos",
            "pairs": "validate-pairs",
            "stage1": "train-stage-1",
            "stage2": "train-stage-2",
        },
        sources={"base": "base", "heldout": "heldout"},
        parameters=("seed", "text", "video", "evaluate_model"),
        plugins={
            "components.evaluation.evaluate_model:BENCHMARKS": "evaluate_model.benchmark",
            "components.evaluation.scorers": "evaluate_model.scorers",
        },
        resources=_GPU,
    ),
    Stage(
        "register-model",
        "components.registry.register_model:register_model",
        home="data/registered",
        inputs={
            "model": "train-stage-2",
            "evaluation": "evaluate-model",
            "latents": "encode-latents",
            "prompts": "curate-prompts",
        },
        parameters=("register_model",),
        carries=("univigu",),
        secrets={"univigu-registry": ("UNIVIGU_REGISTRY_USERNAME", "UNIVIGU_REGISTRY_PASSWORD")},
        external=True,
    ),
)


def find_stage(name: str) -> Stage:
    """The stage called `name`; raises `ConfigError` that lists all names."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ConfigError(f"There is no step '{name}'; the steps are {', '.join(stage.name for stage in STAGES)}.")
