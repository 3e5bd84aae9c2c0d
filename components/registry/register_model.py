"""Register the evaluated model in MLflow, with a card made of its run's own facts and tags that lead back to the data.

The same model from the same library code, with the same evaluation, is registered once, however often the step runs,
wherever it was killed, and whoever else registers meanwhile; a version that has lost files gets them back. The newest
version has the alias `candidate`. Whether a version is champion is decided once, by `components.registry.promotion`, as
it would be by hand; where the profile's `register_model.promotion` is `manual`, that is left to a person or an
orchestrator. An orchestrator that decides sets UNIVIGU_PROMOTION to `manual`, whatever the profile says.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from components.tracking import actor, find_run, flatten, open_tracking, redacted
from univigu import registration, registry
from univigu.errors import BadInputError, ConfigError
from univigu.files import read_json_object, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

REGISTRATION = "registration.json"
PROMPT_SOURCES = "prompts.json"
EVIDENCE = ("metrics.json", "items.parquet")  # of the evaluation, what a version carries
DECISION_TAG = "univigu.decision"
LOST_TAG = "univigu.lost_version"  # of a version whose model was registered before: that version, which was lost
WHY = "register-model offers each new version"
PROMOTIONS = ("automatic", "manual")
PROMOTION = "UNIVIGU_PROMOTION"


def register_model(step: Step) -> None:
    """Leave `registration.json` (name, version, decision, digests); the version itself is in MLflow's registry."""
    with _temporary_files(step.out) as temporary:
        facts = _register(step, temporary)
    write_json(step.out / REGISTRATION, facts)
    step.rows_in = step.rows_out = 1


@contextmanager
def _temporary_files(staging: Path) -> Iterator[Path]:
    """A folder for temporary files, MLflow's copies of the model too, where the next run removes what a kill left."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def _register(step: Step, temporary: Path) -> dict[str, Any]:
    """Register, and decide; returns what `registration.json` says."""
    settings = step["register_model"]
    name, metric = settings["name"], settings["champion_metric"]
    how = os.environ.get(PROMOTION) or settings["promotion"]
    if how not in PROMOTIONS:
        where = PROMOTION if os.environ.get(PROMOTION) else "The profile's register_model.promotion"
        raise ConfigError(f"{where} is '{how}'; choose one of {', '.join(PROMOTIONS)}.")
    manifests = {source: read_manifest(step.inputs[source], maker) for source, maker in step.stage.inputs.items()}
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
    card = render_card(step, name, manifests, lineage, evaluation, identity, runs, commit)
    pipeline = step.inputs["model"] / PIPELINE
    evidence = {
        "evaluation": _copy_evaluation(step.inputs["evaluation"], temporary),
        "lineage": _copy_lineage(step, manifests, temporary),
    }
    registration.tidy_uploads(name, experiment)
    version = registry.version_with(name, identity)
    if version is None:
        score = evaluation.scores[metric]
        tags = {
            **identity,
            **lineage_tags(manifests, lineage, evaluation, runs, commit),
            **_lost_version(step.previous, name, identity),
            promotion.METRIC_TAG: metric,
            "univigu.score": f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})",
        }
        with registration.uploaded(
            pipeline,
            name,
            experiment_id=experiment,
            card=card,
            evidence=evidence,
            tags=tags,
            parameters=flatten({manifest["step"]: manifest["parameters"] for manifest in manifests.values()}),
            metrics={score: values["value"] for score, values in evaluation.scores.items()},
        ) as upload:
            version = _enter(name, identity, step.root, lambda: registration.create_version(upload, name, card, tags))
    else:
        if registry.lost_files(version, _version_files(manifests, evidence)):
            registration.restore_files(version, pipeline, card, evidence)
        version = _enter(name, identity, step.root, lambda: version)
    decision = version.tags.get(DECISION_TAG)
    if decision is None:  # once a version: running the step again must not undo a rollback
        decision = _decide(version, how, step.root)
        registry.set_tags(version, {DECISION_TAG: decision})
    return {
        "name": name,
        "version": int(version.version),
        "decision": decision,
        **_digests(identity),
        "champion_metric": {"name": metric, **evaluation.scores[metric]},
        "heldout_digest": evaluation.digest,
    }


def _enter(name: str, identity: Mapping[str, str], root: Path, make: "Callable[[], ModelVersion]") -> "ModelVersion":
    """The version of this identity, made by `make` where nobody has made it meanwhile; the newest is the candidate."""
    with ledger.hold_lease(name, root, "register", actor(), WHY):
        version = registry.version_with(name, identity) or make()
        if int(version.version) == max(int(one.version) for one in registry.versions(name)):
            registry.set_alias(name, registry.CANDIDATE, version.version)
    return version


def _decide(version: "ModelVersion", how: str, root: Path) -> str:
    """Whether the new version becomes champion, in words; the same ones where the ledger knows it already."""
    request = json_digest(["register-model", version.name, int(version.version), version.run_id])
    if how == "manual":
        entry = ledger.find_decision(version.name, request, root)
    else:
        entry = promotion.offer(version.name, version.version, WHY, once=request, root=root)
    if entry is None:
        decision = "candidate, as promotion is manual"
    else:
        state = "candidate" if entry.outcome == ledger.REFUSED else "champion"
        decision = f"{state}, {'with' if entry.scores else 'as'} {entry.reason}"
    lost = version.tags.get(LOST_TAG)
    return f"{decision}; registered again, as the registry no longer had version {lost}" if lost else decision


def _lost_version(previous: Path, name: str, identity: Mapping[str, str]) -> dict[str, str]:
    """A tag with the version that this step registered before, by what it left: a new one is made, so that is lost."""
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
    """The files of a version by their names inside it, with their sizes in bytes where the identity decides these."""
    sizes = {f"artifacts/pipeline/{name}": facts["size"] for name, facts in model_files(manifests["model"]).items()}
    measured = manifests["evaluation"]["files"]
    sizes |= {f"artifacts/evaluation/{name}": measured[name]["size"] for name in EVIDENCE}
    described = [f"artifacts/lineage/{path.name}" for path in evidence["lineage"].iterdir()]
    return {**sizes, **dict.fromkeys([*described, "artifacts/README.md", "MLmodel"])}


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


def _model_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: facts["sha256"] for name, facts in model_files(manifest).items()})


def _evaluation_digest(manifest: Mapping[str, Any]) -> str:
    return json_digest({name: manifest["files"][name]["sha256"] for name in EVIDENCE})


def _training_runs(root: Path, model: Mapping[str, Any]) -> list[dict[str, str]]:
    """MLflow's finished runs that made stage 1's model and, from it, this one; a run that can't be told is left out."""
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
    """The manifest of stage 1's output, if what lies there is still what the model was trained from."""
    parent = find_stage(find_stage(model["step"]).inputs["model"])
    try:
        manifest = read_manifest(root / parent.home, parent.name)
    except (OSError, BadInputError):
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


def _copy_evaluation(folder: Path, temporary: Path) -> Path:
    target = temporary / "evaluation"
    target.mkdir()
    for name in EVIDENCE:
        shutil.copy(folder / name, target / name)
    return target


def _copy_lineage(step: Step, manifests: Manifests, temporary: Path) -> Path:
    """The manifests behind a version, and the sources of its prompts: what `univigu model trace` reads."""
    target = temporary / "lineage"
    target.mkdir()
    for manifest in manifests.values():
        write_json(target / f"{manifest['step']}.json", redacted(manifest))
    write_json(target / PROMPT_SOURCES, prompt_sources(step))
    return target
