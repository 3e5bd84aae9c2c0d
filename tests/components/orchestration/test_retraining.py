"""Decisions around the steps, tested without an orchestrator."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from components.orchestration import approval, retraining
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.registry import promotion
from univigu import registry
from univigu.errors import BadInputError, MissingInputError, TransientError

DIGEST = "ab" * 32
REPO = Path(__file__).parents[3]


@pytest.fixture
def name(versions, monkeypatch, request):
    """A model name for each test, as if the profile `smoke` contained it."""
    monkeypatch.setattr(retraining, "_name", lambda _: request.node.name)
    return request.node.name


@pytest.fixture
def register(versions, recommit, name):
    """Register a version as the step does: it becomes the candidate, and registration.json names it."""

    def register(right, name=name, **more):
        number = versions.add(name, right, **more)
        registry.set_alias(name, registry.CANDIDATE, number)
        text = json.dumps({"name": name, "version": number})
        recommit(versions.root, "register-model", {}, lambda home: (home / "registration.json").write_text(text))
        return number

    return register


@pytest.mark.slow
def test_a_dataset_counts_as_trained_with_the_profile_it_was_trained_with(versions, register):
    number = register(10, tags={"univigu.digest.validate-prompts": DIGEST})
    assert retraining.find_trained(versions.root, "smoke", DIGEST) is None  # not tagged with a profile yet
    retraining.compare_candidate(versions.root, "smoke")
    assert retraining.find_trained(versions.root, "smoke", DIGEST) == number
    assert retraining.find_trained(versions.root, "tiny", DIGEST) is None
    assert retraining.find_trained(versions.root, "smoke", "cd" * 32) is None


def test_an_empty_work_root_has_no_trained_version(tmp_path):
    assert retraining.find_trained(tmp_path, "smoke", DIGEST) is None


@pytest.mark.parametrize("digest", ["", "None", "x' OR '1'='1", DIGEST.upper()])
def test_an_event_without_a_digest_is_refused(tmp_path, digest):
    with pytest.raises(BadInputError, match="not a SHA-256 digest"):
        retraining.find_trained(tmp_path, "smoke", digest)


def test_the_profile_of_an_event_overrides_the_default_and_must_exist():
    assert retraining.announced_profile({"digest": DIGEST, "profile": "smoke"}, "tiny") == "smoke"
    assert retraining.announced_profile({"digest": DIGEST}, "tiny") == "tiny"
    for wrong in ("huge", "../smoke.yaml", "", None, ["smoke"]):
        with pytest.raises(
            BadInputError, match=r"'profile' is .* not a profile; emit .* with one of long, smoke, stories, tiny"
        ):
            retraining.announced_profile({"digest": DIGEST, "profile": wrong}, "tiny")


def test_a_registry_that_does_not_answer_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:9")
    with pytest.raises(TransientError, match=r"http://127.0.0.1:9 does not answer"):
        retraining.find_trained(tmp_path, "smoke", DIGEST)


def test_comparing_changes_no_champion_and_promoting_records_the_user(versions, name, register):
    register(10)
    found = retraining.compare_candidate(versions.root, "smoke")
    assert (found["version"], found["champion"], found["better"]) == (1, None, True)
    assert versions.aliases(name) == (None, None)
    done = retraining.promote_version(versions.root, name, 1, "ada", "approved")
    assert done["outcome"] == "promoted"
    assert versions.aliases(name) == (1, None)
    assert [(line.who, line.why) for line in promotion.history(name, root=versions.root)] == [("ada", "approved")]
    assert retraining.promote_version(versions.root, name, 1, "ada", "again")["outcome"] == "unchanged"


def test_a_candidate_that_is_not_better_does_not_replace_the_champion(versions, name, register):
    promotion.promote(name, versions.add(name, 30), "the first", root=versions.root)
    register(5)
    found = retraining.compare_candidate(versions.root, "smoke")
    assert (found["version"], found["champion"], found["better"]) == (2, 1, False)
    lines = found["body"].splitlines()
    assert lines[0] == f"{found['reason']}."
    assert "| score | version 2 (new) | champion: version 1 |" in lines
    assert "| captions.mean | 0.087 (0.025 to 0.175) | 0.562 (0.438 to 0.675) |" in lines
    assert str(versions.root / "reports/report.html") in lines[-1]
    assert retraining.promote_version(versions.root, name, 2, "ada", "approved")["outcome"] == "refused"
    assert versions.aliases(name) == (1, None)


def test_the_request_for_a_first_champion_compares_with_nothing():
    comparison = promotion.Comparison("uni-vigu", 1, None, "captions.mean", True, "the first one (captions.mean 0.071)")
    body = approval.describe(comparison, {}, Path(), {})
    assert body.startswith("There is no champion yet, so version 1 would be the first one (captions.mean 0.071).\n")
    assert "compares the two" not in body


def test_with_a_server_the_request_for_an_approval_shows_the_samples_of_both_versions(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@mlflow:5000/")
    comparison = promotion.Comparison("uni-vigu", 3, 1, "captions.mean", True, "better")
    body = approval.describe(comparison, {}, Path(), {"challenger": "aa", "champion": "bb"})
    pages = [f"[Version {number}](http://mlflow:5000/#/models/uni-vigu/versions/{number})" for number in (3, 1)]
    pictures = [
        f"![Samples of version {number}](http://mlflow:5000/get-artifact?path=report/gallery.gif&run_uuid={run})"
        for number, run in ((3, "aa"), (1, "bb"))
    ]
    assert body.splitlines()[-3:] == [f"| {' | '.join(cells)} |" for cells in (pages, ["---", "---"], pictures)]
    assert "s3cret" not in body


def test_a_candidate_of_another_process_is_neither_compared_nor_tagged(versions, name, register):
    ours = register(10)
    theirs = versions.add(name, 40)
    registry.set_alias(name, registry.CANDIDATE, theirs)
    assert retraining.compare_candidate(versions.root, "smoke")["version"] == ours
    marked = {one.version: retraining.PROFILE_TAG in one.tags for one in registry.versions(name)}
    assert marked == {ours: True, theirs: False}


def test_a_version_from_another_root_or_under_another_name_is_not_compared(versions, register, tmp_path):
    with pytest.raises(MissingInputError, match="univigu run register-model"):
        retraining.compare_candidate(tmp_path, "smoke")
    register(10, name="another")
    with pytest.raises(BadInputError, match="is called 'another'"):
        retraining.compare_candidate(versions.root, "smoke")


@pytest.mark.slow
def test_the_dataset_is_the_profiles_validated_prompts(tmp_path):
    for source in ("data/prompts", "model/tiny-wan"):
        shutil.copytree(REPO / source, tmp_path / source)
    profile = load_profile("smoke")
    with pytest.raises(MissingInputError, match="univigu run validate-prompts"):
        retraining.dataset(tmp_path, "smoke")
    run_stage("curate-prompts", profile, tmp_path)
    made = run_stage("validate-prompts", profile, tmp_path)
    assert retraining.dataset(tmp_path, "smoke") == {"digest": made["digest"], "rows": made["rows_out"]}
    profile["validate_data"]["min_rows"] += 1
    run_stage("validate-prompts", profile, tmp_path)
    with pytest.raises(BadInputError, match="not made with the profile 'smoke'"):
        retraining.dataset(tmp_path, "smoke")


def test_outside_a_dvc_project_a_dataset_is_known_by_its_digest(tmp_path):
    assert "not a DVC project" in retraining.version_dataset(tmp_path, "smoke")


def test_in_a_dvc_project_the_dataset_is_added_to_cache_and_lock(tmp_path):
    call(tmp_path, "git", "init", "-q")
    call(tmp_path, "dvc", "init", "-q")
    stage = {"cmd": "true", "outs": ["data/{}"]}
    stages = {
        "curate-prompts": {**stage, "outs": ["data/curated"]},
        "validate-prompts": {**stage, "outs": ["data/validated/prompts"]},
    }
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (tmp_path / "params.yaml").write_text("profile: smoke\n")
    for stage in stages.values():
        (tmp_path / stage["outs"][0]).mkdir(parents=True)
        (tmp_path / stage["outs"][0] / "prompts.parquet").write_text("rows")
    assert "params.yaml names the profile 'smoke'" in retraining.version_dataset(tmp_path, "tiny")
    assert not (tmp_path / "dvc.lock").exists()
    assert "to dvc.lock" in retraining.version_dataset(tmp_path, "smoke")
    assert "data/validated/prompts" in (tmp_path / "dvc.lock").read_text()
    assert [*(tmp_path / ".dvc/cache").rglob("*.dir")]


def call(folder, *command):
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
