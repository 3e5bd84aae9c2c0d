"""Register the evaluated model in MLflow, with a model card and with tags that lead back to its data.

The same model from the same library code, with the same evaluation, is registered once: repeated, killed and concurrent
runs create no second version. A version that has lost files gets them back. The newest version has the alias
`candidate`. `components.registry.promotion` decides once per version whether it becomes champion, exactly as
`univigu model promote` does; a version below the profile's `register_model.least_scores` stays a candidate. With
`register_model.promotion: manual` in the profile, a person or an orchestrator decides instead. An orchestrator sets
UNIVIGU_PROMOTION to `manual`, which overrides the profile.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.digests import json_digest
from components.pipeline.fingerprint import code_digest, fingerprint, modules_of
from components.pipeline.manifests import read_manifest
from components.pipeline.runner import SOURCE_ROOT
from components.pipeline.stages import find_stage
from components.pipeline.step import Step
from components.registry import ledger, promotion
from components.registry.evaluations import Evaluation, read_evaluation
from components.registry.model_card import PIPELINE, Manifests, model_files, prompt_sources, render_card
from components.registry.run_page import describe_run, show_report
from components.tracking import NOTE, actor, find_run, flatten, open_tracking, redacted, single_requests
from univigu import registration, registry
from univigu.errors import BadInputError, ConfigError
from univigu.files import read_json_object, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REGISTRATION = "registration.json"
PROMPT_SOURCES = "prompts.json"
SEARCHED = ("validate-prompts",)  # steps by whose output versions are searched (`components.orchestration`)
EVIDENCE = ("scores.json", "confidence.json", "items.parquet")  # files of the evaluation in a version, where there
DECISION_TAG = "univigu.decision"
LINEAGE = "lineage.json"  # the digests of all steps and sources, the training runs and the commit, in one document
LOST_TAG = "univigu.lost_version"  # the earlier version of the same model, which the registry has lost
WHY = "register-model offers each new version"
PROMOTIONS = ("automatic", "manual")
PROMOTION = "UNIVIGU_PROMOTION"


def register_model(step: Step) -> None:
    """Register a version in MLflow's registry, and write `registration.json` (name, version, decision, digests)."""
    with step.temporary_files() as temporary:
        facts = _register(step, temporary)
    print(f"{facts['name']} version {facts['version']}: {facts['decision']}", file=sys.stderr)
    write_json(step.out / REGISTRATION, facts)
    step.rows_in = step.rows_out = 1


@dataclass(frozen=True)
class _Candidate:
    """The evaluated model, and everything that its version is registered with."""

    name: str
    identity: Mapping[str, str]  # tags that no other version has
    manifests: Manifests
    evaluation: Evaluation
    metric: str  # the score that promotion compares
    pipeline: Path
    evidence: Mapping[str, Path]  # folders of artifacts by name
    card: str
    tags: Mapping[str, str]


def _register(step: Step, temporary: Path) -> dict[str, Any]:
    """Register the model and decide about its promotion; returns the content of `registration.json`."""
    mode = _promotion_mode(step)
    manifests = {source: read_manifest(step.inputs[source], maker) for source, maker in step.stage.inputs.items()}
    lineage = trace_lineage(manifests)
    evaluation = _read_evaluation(step)
    experiment = open_tracking(step.root)
    candidate = _describe_candidate(step, manifests, lineage, evaluation, temporary)
    registration.tidy_uploads(candidate.name, experiment)
    version = registry.version_with(candidate.name, candidate.identity)
    version = _upload(candidate, experiment, step.root) if version is None else _restore(candidate, version, step.root)
    decision = version.tags.get(DECISION_TAG)
    if decision is None or _lowered(candidate, version):  # otherwise running the step again would undo a rollback
        least = {promotion.LEAST_TAG: candidate.tags[promotion.LEAST_TAG]}
        if least.items() - version.tags.items():
            registry.set_tags(version, least)
        decision = _decide(version, mode, step.root, candidate)
        registry.set_tags(version, {DECISION_TAG: decision})
    show_report(step, version, decision, temporary)
    return {
        "name": candidate.name,
        "version": int(version.version),
        "decision": decision,
        **_digests(candidate.identity),
        "champion_metric": {"name": candidate.metric, **evaluation.scores[candidate.metric]},
        "heldout_digest": evaluation.digest,
    }


def _promotion_mode(step: Step) -> str:
    """`automatic` or `manual`, from UNIVIGU_PROMOTION or else from the profile."""
    mode = os.environ.get(PROMOTION) or step.settings.register_model.promotion
    if mode not in PROMOTIONS:
        raise ConfigError(f"{PROMOTION} is '{mode}'; set it to one of {', '.join(PROMOTIONS)}.")
    return mode


def _read_evaluation(step: Step) -> Evaluation:
    evaluation, metric = read_evaluation(step.inputs["evaluation"]), step.settings.register_model.champion_metric
    if metric not in evaluation.scores:
        raise BadInputError(
            f"The evaluation has no score '{metric}', by which the champion is chosen; set the profile's "
            f"register_model.champion_metric to one of {', '.join(evaluation.scores)}."
        )
    for name in step.settings.register_model.least_scores:
        if name not in evaluation.scores:
            raise BadInputError(
                f"The evaluation has no score '{name}', of which the profile's register_model.least_scores sets the "
                f"least; name some of {', '.join(evaluation.scores)}."
            )
    return evaluation


def _describe_candidate(
    step: Step, manifests: Manifests, lineage: Mapping[str, str], evaluation: Evaluation, temporary: Path
) -> _Candidate:
    """Collect what the version carries; its artifacts are copied to `temporary`."""
    name, metric = step.settings.register_model.name, step.settings.register_model.champion_metric
    identity = {
        "univigu.model_digest": _model_digest(manifests["model"]),
        "univigu.library_digest": code_digest(fingerprint(modules_of("univigu"))),
        "univigu.evaluation_digest": _evaluation_digest(manifests["evaluation"]),
    }
    runs = _training_runs(step.root, manifests["model"])
    commit = git_commit(SOURCE_ROOT)
    score = evaluation.scores[metric]
    return _Candidate(
        name=name,
        identity=identity,
        manifests=manifests,
        evaluation=evaluation,
        metric=metric,
        pipeline=step.inputs["model"] / PIPELINE,
        card=render_card(step, name, manifests, lineage, evaluation, identity, runs, commit),
        evidence={
            "evaluation": _copy_evaluation(step.inputs["evaluation"], temporary),
            "lineage": _copy_lineage(
                step, manifests, temporary, lineage_document(manifests, lineage, evaluation, identity, runs, commit)
            ),
        },
        tags={
            **identity,
            **lineage_tags(manifests, lineage, evaluation, runs, commit),
            **_lost_version(step.previous, name, identity),
            promotion.METRIC_TAG: metric,
            promotion.LEAST_TAG: json.dumps(step.settings.register_model.least_scores),
            "univigu.score": f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})",
        },
    )


def _upload(candidate: _Candidate, experiment: str, root: Path) -> "ModelVersion":
    """Upload the model's files and create its version."""
    name = candidate.name
    with registration.uploaded(
        candidate.pipeline,
        name,
        experiment_id=experiment,
        card=candidate.card,
        evidence=candidate.evidence,
        tags={**candidate.tags, NOTE: describe_run(candidate.name, candidate.evaluation)},
        parameters=flatten({manifest["step"]: manifest["parameters"] for manifest in candidate.manifests.values()}),
        metrics={score: values["value"] for score, values in candidate.evaluation.scores.items()},
    ) as upload:
        return _add_version(name, candidate.identity, root, lambda: _create_once(upload, candidate))


def _create_once(upload: registration.Upload, candidate: _Candidate) -> "ModelVersion":
    """Create the version with one request; if its answer is lost, look whether it has been created.

    MLflow would send the request again, and the server would create a second version.
    """
    from mlflow.exceptions import MlflowException

    try:
        with single_requests():
            return registration.create_version(upload, candidate.name, candidate.card, candidate.tags)
    except MlflowException:
        upload.version = registry.version_with(candidate.name, candidate.identity)
        if upload.version is None:
            raise
        return upload.version


def _restore(candidate: _Candidate, version: "ModelVersion", root: Path) -> "ModelVersion":
    """Upload again the files that an existing version has lost."""
    if registry.lost_files(version, _version_files(candidate.manifests, candidate.evidence)):
        registration.restore_files(version, candidate.pipeline, candidate.card, candidate.evidence)
    return _add_version(candidate.name, candidate.identity, root, lambda: version)


def _add_version(
    name: str, identity: Mapping[str, str], root: Path, create: "Callable[[], ModelVersion]"
) -> "ModelVersion":
    """The version of this identity, created unless another process already did; the newest becomes the candidate."""
    with ledger.hold_lease(name, root, "register", actor(), WHY):
        version = registry.version_with(name, identity) or create()
        if int(version.version) == max(int(one.version) for one in registry.versions(name)):
            registry.set_alias(name, registry.CANDIDATE, version.version)
    return version


def _lowered(candidate: _Candidate, version: "ModelVersion") -> bool:
    """Whether a version that was refused for its scores has the least scores that the profile sets now."""
    before, now = (promotion.least_scores(tags) for tags in (version.tags, candidate.tags))
    short = promotion.shortfall(before, candidate.evaluation)
    return bool(short) and not promotion.shortfall(now, candidate.evaluation)


def _decide(version: "ModelVersion", mode: str, root: Path, candidate: _Candidate) -> str:
    """Decide whether the new version becomes champion; returns the decision as text, the same text if repeated."""
    least = promotion.least_scores(candidate.tags)
    request = json_digest(
        ["register-model", version.name, int(version.version), version.run_id, *([least] if least else [])]
    )
    if mode == "manual":
        entry = ledger.find_decision(version.name, request, root)
    else:
        entry = promotion.promote_if_better(version.name, version.version, WHY, decision_id=request, root=root)
    if entry is None:
        short = promotion.shortfall(least, candidate.evaluation)
        decision = "candidate, as promotion is manual" + (f"; {short}" if short else "")
    else:
        state = "candidate" if entry.outcome == ledger.REFUSED else "champion"
        decision = f"{state}, {'with' if entry.scores else 'as'} {entry.reason}"
    lost = version.tags.get(LOST_TAG)
    return f"{decision}; registered again, as the registry no longer had version {lost}" if lost else decision


def _lost_version(previous: Path, name: str, identity: Mapping[str, str]) -> dict[str, str]:
    """A tag with the version in this step's previous output, if it has this identity: the registry has lost it."""
    try:
        facts = read_json_object(previous / REGISTRATION)
    except (OSError, ValueError):
        return {}
    same = {"name": name, **_digests(identity)}
    lost = facts.get("version")
    return {LOST_TAG: str(lost)} if type(lost) is int and same.items() <= facts.items() else {}


def _digests(identity: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix("univigu."): digest for key, digest in identity.items()}


def _version_files(manifests: Manifests, evidence: Mapping[str, Path]) -> dict[str, int | None]:
    """The files of a version by their paths inside it, with their sizes in bytes if the identity determines them."""
    sizes = {f"artifacts/pipeline/{name}": facts["size"] for name, facts in model_files(manifests["model"]).items()}
    measured = manifests["evaluation"]["files"]
    sizes |= {f"artifacts/evaluation/{name}": measured[name]["size"] for name in EVIDENCE if name in measured}
    described = [f"artifacts/lineage/{path.name}" for path in evidence["lineage"].iterdir()]
    return {**sizes, **dict.fromkeys([*described, "artifacts/README.md", "MLmodel"])}


# --- lineage ---------------------------------------------------------------------------------------------------------


def trace_lineage(manifests: Manifests) -> dict[str, str]:
    """The output digest of every step and every source that these manifests name.

    Raises `BadInputError` if two manifests name different outputs of the same step: the evaluation, the model and the
    data then don't belong together.
    """
    digests: dict[str, str] = {}
    named_by: dict[str, str] = {}
    for manifest in manifests.values():
        stage = find_stage(manifest["step"])
        named = {stage.name: manifest["digest"]}
        for name, digest in manifest["inputs"].items():
            named[stage.inputs.get(name) or stage.sources.get(name) or name] = digest
        for step, digest in named.items():
            if digests.setdefault(step, digest) != digest:
                raise BadInputError(
                    f"'{stage.name}' and '{named_by[step]}' were made from different outputs of '{step}'; run "
                    f"`dvc repro`, which runs all outdated steps again."
                )
            named_by.setdefault(step, stage.name)
    return digests


def lineage_tags(
    manifests: Manifests,
    lineage: Mapping[str, str],
    evaluation: Evaluation,
    runs: Sequence[Mapping],
    commit: str | None,
) -> dict[str, str]:
    """The tags that versions are searched by, or that lead on: dataset, held-out set, commit and training runs."""
    tags = {
        "univigu.dataset_digest": manifests["latents"]["digest"],
        "univigu.heldout_digest": evaluation.digest,
        **{f"univigu.digest.{step}": lineage[step] for step in SEARCHED if step in lineage},
        **{f"univigu.run.{run['stage']}": run["id"] for run in runs},
    }
    return {**tags, **({"univigu.git_commit": commit} if commit else {})}


def lineage_document(
    manifests: Manifests,
    lineage: Mapping[str, str],
    evaluation: Evaluation,
    identity: Mapping[str, str],
    runs: Sequence[Mapping],
    commit: str | None,
) -> dict[str, Any]:
    """Everything that the version is made from, as one document; JSON values."""
    return {
        **_digests(identity),
        "dataset_digest": manifests["latents"]["digest"],
        "heldout_digest": evaluation.digest,
        "steps": dict(sorted(lineage.items())),
        "runs": {run["stage"]: run["id"] for run in runs},
        "git_commit": commit,
    }


def _model_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: facts["sha256"] for name, facts in model_files(manifest).items()})


def _evaluation_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: manifest["files"][name]["sha256"] for name in EVIDENCE if name in manifest["files"]})


def _training_runs(root: Path, model: Mapping[str, Any]) -> list[dict[str, str]]:
    """The finished MLflow runs of stage 1 and stage 2 that made this model; runs that can't be found are left out."""
    parent = _parent_manifest(root, model)
    found = []
    for manifest in [parent, model] if parent else [model]:
        tags = {
            "univigu.stage": manifest["step"],
            "univigu.dataset_digest": manifest["inputs"]["latents"],
            "univigu.model_digest": _model_digest(manifest),
        }
        found.append({"stage": manifest["step"], "id": find_run(root, tags)})
    # pyrefly: ignore[bad-return]
    return [run for run in found if run["id"]]


def _parent_manifest(root: Path, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of stage 1's output, if that is still the output that the model was trained from."""
    parent = find_stage(find_stage(model["step"]).inputs["model"])
    try:
        manifest = read_manifest(root / parent.home, parent.name)
    except (OSError, BadInputError):
        return None
    return manifest if manifest["digest"] == model["inputs"]["model"] else None


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout, with ``-dirty`` if tracked files have changes; None outside git."""
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _copy_evaluation(folder: Path, temporary: Path) -> Path:
    target = temporary / "evaluation"
    target.mkdir()
    for name in EVIDENCE:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
    return target


def _copy_lineage(step: Step, manifests: Manifests, temporary: Path, document: Mapping[str, Any]) -> Path:
    """Write what `univigu model trace` reads: the document, the manifests behind it, and the sources of the prompts."""
    target = temporary / "lineage"
    target.mkdir()
    for manifest in manifests.values():
        write_json(target / f"{manifest['step']}.json", redacted(manifest))
    write_json(target / PROMPT_SOURCES, prompt_sources(step))
    write_json(target / LINEAGE, document)
    return target
