"""The model card of a registered version; all its values come from the step's inputs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.pipeline.step import Step
from components.registry.evaluations import Evaluation
from components.tracking import flatten
from univigu.errors import CorruptDataError, storage_fault
from univigu.files import read_json_object

CARD = "model_card.md.j2"
PIPELINE = "model"  # the pipeline's folder inside the training step's output
LIMITS = ("num_frames", "height", "width", "max_sequence_length")

Manifests = Mapping[str, Mapping[str, Any]]  # by the step's input name


def render_card(
    step: Step,
    name: str,
    manifests: Manifests,
    lineage: Mapping[str, str],
    evaluation: Evaluation,
    identity: Mapping[str, str],
    runs: Sequence[Mapping[str, str]],
    commit: str | None,
) -> str:
    """The model card as Markdown with YAML front matter.

    lineage: the output digest of each step. identity: the tags that identify the version. runs: training runs, as
    mappings with `stage` and `id`. commit: None outside git.
    """
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = step.inputs["model"] / PIPELINE
    limits = _model_limits(folder, evaluation)
    files = model_files(manifests["model"])
    weights = [folder / file for file in files if file.endswith(".safetensors")]
    front_matter = {
        "pipeline_tag": "text-to-video",
        "tags": ["uni-vigu", "video-captioning", "text-to-video", "flow-matching"],
        "model-index": [{"name": name, "results": _card_results(evaluation)}],
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["cell"] = _cell
    return environment.get_template(CARD).render(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        name=name,
        commit=commit,
        base_digest=lineage.get("base", "unknown"),
        model={
            "digest": identity["univigu.model_digest"],
            "parameters": sum(_parameters(path) for path in weights),
            "weights": weights,
            "bytes": sum(facts["size"] for facts in files.values()),
        },
        dataset={"digest": manifests["latents"]["digest"], "samples": _samples(step)},
        data=prompt_sources(step),
        evaluation={
            "digest": evaluation.digest,
            "count": len({row["clip_id"] for row in evaluation.items.values()}),
            "scores": [{"name": name, **values} for name, values in evaluation.scores.items() if _on_card(name)],
        },
        limits=limits,
        parameters=[
            {"step": manifest["step"], "text": _listed(flatten(manifest["parameters"]))}
            for manifest in manifests.values()
        ],
        lineage=[{"step": key, "digest": digest} for key, digest in lineage.items()],
        runs=runs,
    )


def _model_limits(pipeline: Path, evaluation: Evaluation) -> dict[str, Any]:
    """The pipeline's sizes, and the three attributes with the lowest caption scores."""
    captions = [
        {"name": score.partition(".")[2], **values}
        for score, values in evaluation.scores.items()
        if score.startswith("captions.") and score != "captions.mean"
    ]
    return {
        **_read_settings(pipeline / "model_index.json", LIMITS),
        **_read_settings(pipeline / "transformer/config.json", ("text_length",)),
        "weakest": sorted(captions, key=lambda score: score["value"])[:3],
    }


def _on_card(name: str) -> bool:
    """Whether the card shows a score: all means, and the model's own scores per attribute."""
    group, _, key = name.partition(".")
    return group in ("captions", "generation") or key in ("mean", "agreement")


def _cell(text: Any) -> str:
    """Text for a cell of a Markdown table: no newlines and no column separators."""
    return " ".join(str(text).replace("|", "/").split())


def _listed(parameters: Mapping[str, Any]) -> str:
    return _cell(
        ", ".join(f"{name} {value}" for name, value in sorted(parameters.items())).replace("`", "").replace("'", "")
    )


def _card_results(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "video-to-text" if name.startswith("captions") else "text-to-video"},
            "dataset": {"name": "held-out items", "type": evaluation.digest},
            "metrics": [{"type": name, "value": values["value"]}],
        }
        for name, values in evaluation.scores.items()
        if name in ("captions.mean", "generation.mean", "joint.agreement")
    ]


def _samples(step: Step) -> list[dict[str, Any]]:
    rows = step.read("latents", "latents").to_pylist()
    counts = Counter((r["stage"], r["split"], f"{r['frames']} x {r['height']} x {r['width']}") for r in rows)
    return [
        {"stage": stage, "split": split, "size": size, "count": n} for (stage, split, size), n in sorted(counts.items())
    ]


def _parameters(weights: Path) -> int:
    """The number of parameters in a safetensors file, read from its header."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as tensors:  # refuses a header over 100 MB, or longer than the file
            return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptDataError(
            f"{weights} is not a valid safetensors file ({error}); train the model again."
        ) from error


def _read_settings(path: Path, names: Sequence[str]) -> dict[str, int]:
    """Read these integer settings from a JSON file of the pipeline."""
    try:
        settings = read_json_object(path)
        return {name: int(settings[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if fault := storage_fault(error, path):
            raise fault from error
        raise CorruptDataError(
            f"{path} has no valid {', '.join(names)} ({type(error).__name__}: {error}); train the model again."
        ) from error


def model_files(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The pipeline's files in a training step's manifest, by their paths inside the pipeline's folder."""
    folder = f"{PIPELINE}/"
    return {name.removeprefix(folder): facts for name, facts in manifest["files"].items() if name.startswith(folder)}


def prompt_sources(step: Step) -> dict[str, Any]:
    """The number of prompts, and how many each combination of source and licence has."""
    rows = step.read("prompts", "prompts").to_pylist()
    counts = Counter((row["source"], row["licence"]) for row in rows)
    sources = [{"source": source, "licence": licence, "count": n} for (source, licence), n in sorted(counts.items())]
    return {"prompts": len(rows), "sources": sources}
