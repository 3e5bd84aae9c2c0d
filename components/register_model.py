"""Register the evaluated model in MLflow, with a card made of its run's own facts and tags that lead back to the data.

The same model from the same library code, with the same evaluation, is registered once, however often the step runs; a
version that has lost its files gets them back. A version always gets the alias `candidate`. Whether it is champion is
decided once, when it is new, and by `components.promotion`, as it would be by hand; where the profile's
`register_model.promotion` is `manual`, that is left to a person or an orchestrator. An orchestrator that decides sets
UNIVIGU_PROMOTION to `manual`, whatever the profile says.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components import ledger, promotion
from components.pipeline.digests import json_digest
from components.pipeline.fingerprint import code_digest, fingerprint, modules_of
from components.pipeline.manifests import MANIFEST
from components.pipeline.runner import SOURCE_ROOT, Step
from components.pipeline.stages import find_stage
from components.promotion import Evaluation, read_evaluation
from univigu.errors import BadInputError, ConfigError
from univigu.files import write_json

PIPELINE = "model"  # the pipeline's folder inside the training step's output
CARD = "model_card.md.j2"
PROMPT_SOURCES = "prompts.json"
EVIDENCE = ("metrics.json", "items.parquet")  # of the evaluation, what a version carries
DECISION_TAG = "univigu.decision"
PROMOTIONS = ("automatic", "manual")
PROMOTION = "UNIVIGU_PROMOTION"

Manifests = Mapping[str, Mapping[str, Any]]  # by the step's input name


def register_model(step: Step) -> None:
    """Leave `registration.json` (name, version, decision, digests); the version itself lies in MLflow's registry."""
    from components.tracking import flatten, open_tracking
    from univigu import registry

    settings = step["register_model"]
    name, metric = settings["name"], settings["champion_metric"]
    how = os.environ.get(PROMOTION) or settings["promotion"]
    if how not in PROMOTIONS:
        where = PROMOTION if os.environ.get(PROMOTION) else "The profile's register_model.promotion"
        raise ConfigError(f"{where} is '{how}'; choose one of {', '.join(PROMOTIONS)}.")
    manifests = {source: _manifest(step.inputs[source]) for source in step.stage.inputs}
    lineage = trace_lineage(manifests)
    evaluation = read_evaluation(step.inputs["evaluation"])
    if metric not in evaluation.scores:
        raise BadInputError(
            f"The evaluation has no score '{metric}', which decides who is champion; name one of "
            f"{', '.join(evaluation.scores)} in the profile's register_model.champion_metric."
        )
    experiment = open_tracking(step.root)
    identity = {
        "univigu.model_digest": _model_digest(manifests["model"]),
        "univigu.library_digest": code_digest(fingerprint(modules_of("univigu"))),
        "univigu.evaluation_digest": _evaluation_digest(manifests["evaluation"]),
    }
    runs = _training_runs(step.root, manifests["model"])
    commit = _git_commit(SOURCE_ROOT)
    facts = lineage_tags(manifests, lineage, evaluation, runs, commit)
    card = render_card(step, name, manifests, lineage, evaluation, identity, runs, commit)
    evidence = {
        "evaluation": _copy_evaluation(step.inputs["evaluation"], step.scratch),
        "lineage": _copy_lineage(step, manifests),
    }
    version = registry.version_with(name, identity)
    if version is None:
        score = evaluation.scores[metric]
        version = registry.register_version(
            step.inputs["model"] / PIPELINE,
            name,
            experiment_id=experiment,
            card=card,
            evidence=evidence,
            tags={
                **identity,
                **facts,
                promotion.METRIC_TAG: metric,
                "univigu.score": f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})",
            },
            parameters=flatten({manifest["step"]: manifest["parameters"] for manifest in manifests.values()}),
            metrics={score: values["value"] for score, values in evaluation.scores.items()},
            scratch=step.scratch,
        )
    elif not registry.has_files(version):
        registry.restore_files(version, step.inputs["model"] / PIPELINE, card, evidence, step.scratch)
    registry.set_alias(name, registry.CANDIDATE, version.version)
    decision = version.tags.get(DECISION_TAG)
    if decision is None:  # once a version: running the step again must not undo a rollback
        decision = _decide(name, version.version, how, step.root)
        registry.set_tags(version, {DECISION_TAG: decision})
    step.rows_in = step.rows_out = 1
    registration = {
        "name": name,
        "version": int(version.version),
        "decision": decision,
        **{key.removeprefix("univigu."): digest for key, digest in identity.items()},
        "champion_metric": {"name": metric, **evaluation.scores[metric]},
        "heldout_digest": evaluation.digest,
    }
    write_json(step.out / "registration.json", registration)


def _decide(name: str, version: str, how: str, root: Path) -> str:
    """Whether the new version becomes champion, in words."""
    if how == "manual":
        return "candidate, as promotion is manual"
    entry = promotion.offer(name, version, "register-model offers each new version", root=root)
    state = "candidate" if entry.outcome == ledger.REFUSED else "champion"
    return f"{state}, {'with' if entry.scores else 'as'} {entry.reason}"


# --- where it came from ----------------------------------------------------------------------------------------------


def trace_lineage(manifests: Manifests) -> dict[str, str]:
    """The output digest of every step, and of every source, that these manifests name.

    Raises `BadInputError` where two of them name different outputs of one step: then the model that was evaluated, the
    data that it learned from, or the base below both is not the one at hand.
    """
    digests: dict[str, str] = {}
    said_by: dict[str, str] = {}
    for manifest in manifests.values():
        stage = find_stage(manifest["step"])
        named = {stage.name: manifest["digest"]}
        for name, digest in manifest["inputs"].items():
            named[stage.inputs.get(name) or stage.sources.get(name) or name] = digest
        for step, digest in named.items():
            if digests.setdefault(step, digest) != digest:
                raise BadInputError(
                    f"'{stage.name}' and '{said_by[step]}' were made from different outputs of '{step}'; run "
                    f"`dvc repro`, which runs again what is out of date."
                )
            said_by.setdefault(step, stage.name)
    return digests


def lineage_tags(
    manifests: Manifests,
    lineage: Mapping[str, str],
    evaluation: Evaluation,
    runs: Sequence[Mapping],
    commit: str | None,
) -> dict[str, str]:
    """Tags for the version and its run, by which one can walk back to the prompts."""
    tags = {
        "univigu.dataset_digest": manifests["latents"]["digest"],
        "univigu.heldout_digest": evaluation.digest,
        **{f"univigu.digest.{step}": digest for step, digest in lineage.items()},
        **{f"univigu.run.{run['stage']}": run["id"] for run in runs},
    }
    return {**tags, **({"univigu.git_commit": commit} if commit else {})}


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _model_files(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The pipeline's files in a training step's manifest, by their names inside the pipeline's folder."""
    folder = f"{PIPELINE}/"
    return {name.removeprefix(folder): facts for name, facts in manifest["files"].items() if name.startswith(folder)}


def _model_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: facts["sha256"] for name, facts in _model_files(manifest).items()})


def _evaluation_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: manifest["files"][name]["sha256"] for name in EVIDENCE})


def _training_runs(root: Path, model: Mapping[str, Any]) -> list[dict[str, str]]:
    """MLflow's finished runs that made stage 1's model and, from it, this one; a run that can't be told is left out."""
    from components.tracking import find_run

    parent = _parent_manifest(root, model)
    found = []
    for manifest in [parent, model] if parent else [model]:
        tags = {
            "univigu.stage": manifest["step"],
            "univigu.dataset_digest": manifest["inputs"]["latents"],
            "univigu.model_digest": _model_digest(manifest),
        }
        found.append({"stage": manifest["step"], "id": find_run(root, tags)})
    return [run for run in found if run["id"]]


def _parent_manifest(root: Path, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of stage 1's output, if what lies there is still what the model was trained from."""
    try:
        manifest = _manifest(root / find_stage(find_stage(model["step"]).inputs["model"]).home)
    except (OSError, ValueError):
        return None
    return manifest if manifest["digest"] == model["inputs"]["model"] else None


def _git_commit(folder: Path) -> str | None:
    """The commit of the checkout, with ``-dirty`` where tracked files differ from it; None where there is none."""
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _copy_evaluation(folder: Path, scratch: Path) -> Path:
    target = scratch / "evaluation"
    target.mkdir(exist_ok=True)
    for name in EVIDENCE:
        shutil.copy(folder / name, target / name)
    return target


def _copy_lineage(step: Step, manifests: Manifests) -> Path:
    """The manifests behind a version, and the sources of its prompts: what `univigu model trace` reads."""
    target = step.scratch / "lineage"
    target.mkdir(exist_ok=True)
    for source, manifest in manifests.items():
        shutil.copy(step.inputs[source] / MANIFEST, target / f"{manifest['step']}.json")
    write_json(target / PROMPT_SOURCES, _sources(step))
    return target


# --- the model card --------------------------------------------------------------------------------------------------


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
    """The model card as Markdown with YAML front matter; every figure on it comes from the step's inputs."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from components.tracking import flatten

    folder = step.inputs["model"] / PIPELINE
    settings = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    files = _model_files(manifests["model"])
    weights = [folder / file for file in files if file.endswith(".safetensors")]
    captions = [
        {"name": score.partition(".")[2], **values}
        for score, values in evaluation.scores.items()
        if score.startswith("captions.") and score != "captions.mean"
    ]
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
        data=_sources(step),
        evaluation={
            "digest": evaluation.digest,
            "count": len({row["clip_id"] for row in evaluation.items.values()}),
            "scores": [{"name": name, **values} for name, values in evaluation.scores.items() if _on_card(name)],
        },
        limits={
            **{key: settings[key] for key in ("num_frames", "height", "width", "max_sequence_length")},
            "text_length": json.loads((folder / "transformer/config.json").read_text())["text_length"],
            "weakest": sorted(captions, key=lambda score: score["value"])[:3],
        },
        parameters=[
            {"step": manifest["step"], "text": _listed(flatten(manifest["parameters"]))}
            for manifest in manifests.values()
        ],
        lineage=[{"step": key, "digest": digest} for key, digest in lineage.items()],
        runs=runs,
    )


def _on_card(name: str) -> bool:
    """The sums of everything, and what the model itself gets right on each attribute; the rest is in metrics.json."""
    group, _, key = name.partition(".")
    return group in ("captions", "generation") or key in ("mean", "agreement")


def _cell(text: Any) -> str:
    """A text that can't break out of a cell of a Markdown table."""
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


def _sources(step: Step) -> dict[str, Any]:
    rows = step.read("prompts", "prompts").to_pylist()
    counts = Counter((row["source"], row["licence"]) for row in rows)
    sources = [{"source": source, "licence": licence, "count": n} for (source, licence), n in sorted(counts.items())]
    return {"prompts": len(rows), "sources": sources}


def _parameters(weights: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone."""
    from math import prod

    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
