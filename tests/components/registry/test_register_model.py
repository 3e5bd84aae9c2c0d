"""Registration: one version per model, promotion, lineage tags, and a pull without a checkout."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from components.evaluation.report import RUN
from components.pipeline.digests import tree_files
from components.pipeline.manifests import write_manifest
from components.registry import promotion
from components.registry.export import pull_version
from components.registry.lineage import trace_version
from components.registry.register_model import git_commit
from components.tracking import tracking_uri
from trained_root import commit
from univigu import registry
from univigu.errors import BadInputError, ConfigError, CorruptDataError, GateFailedError


@pytest.mark.slow
def test_the_first_version_is_champion_and_has_its_lineage(world):
    import mlflow

    run = world.track(2)
    facts = world.register("whence")

    assert (facts["version"], world.version("whence", "champion"), world.version("whence", "candidate")) == (1, 1, 1)
    store = tracking_uri(world.root)
    version = registry.version_at("whence", "champion", store)
    lineage = {"curate-prompts": "prompts", "encode-latents": "latents", "train-stage-2": "stage2", "base": "base"}
    document = json.loads(registry.artifact("models:/whence@champion", "lineage/lineage.json", store).read_text())
    for step, name in lineage.items():
        assert document["steps"][step] == world.digests[name]
    assert document["runs"] == {"train-stage-2": run}
    assert [tag for tag in version.tags if tag.startswith("univigu.digest.")] == []
    assert version.tags["univigu.dataset_digest"] == world.digests["latents"]
    assert version.tags["univigu.run.train-stage-2"] == run
    for text in (world.digests["latents"], "hand/written | CC0-1.0 | 2", "captions.mean | 0.375", run, "seed 0"):
        assert text in version.description
    assert "On 20 held-out items" in version.description
    own = mlflow.get_run(version.run_id).data
    assert own.metrics["captions.mean"] == 0.375
    assert own.params["train-stage-2.train_stage_2.tasks.joint"] == "0.5"
    assert own.tags["univigu.model_digest"] == facts["model_digest"]
    assert "captions.mean **0.375**" in own.tags["mlflow.note.content"]


@pytest.mark.slow
def test_the_run_of_a_version_shows_the_report_the_samples_and_the_scores(world):
    import mlflow

    world.train("shown")
    Image.new("RGB", (40, 30)).save(world.root / "reports/gallery.webp", save_all=True, append_images=[])
    (world.root / "reports/report.html").write_text(f"<h1>Page</h1>{RUN}")
    (world.root / "reports/plots").mkdir()
    for name in ("confusion.csv", "funnel.csv"):
        (world.root / "reports/plots" / name).write_text("true,stated\n1,7\n")
    facts = world.register("shown")
    run = registry.find_version("shown", 1, tracking_uri(world.root)).run_id
    client = mlflow.MlflowClient()
    shown = {Path(file.path).name for file in client.list_artifacts(run, "report")}
    assert shown == {"report.html", "gallery.gif", "scores.json", "confusion.csv", "funnel.csv"}
    page = Path(client.download_artifacts(run, "report/report.html")).read_text()
    assert f"<dd>{facts['decision']}</dd>" in page
    assert "<dd>shown 1</dd>" in page
    for name in ("gallery.webp", "report.html", "plots"):
        path = world.root / "reports" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_the_same_model_is_registered_once(world):
    first = world.register("once")
    again = world.register("once")
    assert again == first
    assert registry.version_with("once", {"univigu.model_digest": first["model_digest"]}).version == 1


@pytest.mark.slow
def test_stage_1_is_the_run_that_made_the_parent_of_stage_2(world):
    world.train("child")
    parent = world.track(1)
    world.track(1, digest="0" * 64)  # newer, on the same dataset, of another model
    world.register("child")
    assert (
        registry.version_at("child", "candidate", tracking_uri(world.root)).tags["univigu.run.train-stage-1"] == parent
    )

    world.train("orphan")
    (world.root / "data/stage1/model/trained.txt").write_text("trained again since")
    commit(world.root, "train-stage-1", {"latents": world.digests["latents"], "base": world.digests["base"]})
    world.track(1)
    world.register("child")
    orphan = registry.version_at("child", "candidate", tracking_uri(world.root))
    assert (orphan.version, "univigu.run.train-stage-1" in orphan.tags) == (2, False)


@pytest.mark.slow
def test_another_evaluation_of_the_same_model_is_another_version(world):
    world.train("evaluated twice")
    first = world.register("evaluations")
    world.evaluate(14)
    second = world.register("evaluations")
    assert [facts["version"] for facts in (first, second, world.register("evaluations"))] == [1, 2, 2]
    assert first["model_digest"] == second["model_digest"]
    newer = registry.version_at("evaluations", "champion", tracking_uri(world.root))
    assert (newer.version, "captions.mean | 0.525" in newer.description) == (2, True)


def test_the_commit_says_whether_files_were_edited_since(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "One")
    git("tag", "-a", "v1", "-m", "A tag is no commit")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.slow
def test_a_version_below_the_least_scores_stays_a_candidate_until_a_person_insists(world, capsys):
    world.train("poor")
    reason = "captions.mean 0.375 is below its profile's least (0.5)"
    facts = world.register("poor", least={"captions.mean": 0.5, "captions.colour": 0.2})
    assert (facts["version"], facts["decision"]) == (1, f"candidate, as {reason}")
    assert f"poor version 1: candidate, as {reason}" in capsys.readouterr().err
    assert (world.version("poor", "champion"), world.version("poor", "candidate")) == (None, 1)
    comparison = promotion.compare("poor", 1, root=world.root)
    assert (comparison.better, comparison.reason) == (False, reason)
    with pytest.raises(GateFailedError, match=re.escape(reason)):
        promotion.promote("poor", 1, "why not", root=world.root)
    forced = promotion.promote("poor", 1, "good enough for a test", force=True, root=world.root)
    assert (forced.outcome, forced.forced, forced.reason) == ("promoted", True, reason)
    assert world.version("poor", "champion") == 1
    outcomes = [line.outcome for line in promotion.history("poor", root=world.root)]
    assert outcomes == ["promoted", "refused", "refused"]


@pytest.mark.slow
def test_a_version_is_offered_again_once_its_profile_asks_for_less(world):
    world.train("modest")
    least = {"captions.mean": 0.5, "captions.digit": 0.3}
    both = "captions.mean 0.375 and captions.digit 0.250 are below its profile's least (0.5 and 0.3)"
    assert world.register("modest", least=least)["decision"] == f"candidate, as {both}"
    assert world.register("modest", least={"captions.mean": 0.4})["decision"] == f"candidate, as {both}"
    assert world.register("modest", least={"captions.mean": 0.3})["decision"].startswith("champion, as the first one")
    assert world.version("modest", "champion") == 1


def test_manual_promotion_also_says_what_falls_short(world):
    world.train("manual and poor")
    decision = world.register("manual-poor", promotion="manual", least={"captions.mean": 0.9})["decision"]
    assert decision.startswith("candidate, as promotion is manual; captions.mean 0.375 is below")


def test_a_least_score_that_the_evaluation_lacks_is_reported(world):
    with pytest.raises(BadInputError, match=r"no score 'captions.meen', of which the profile's register_model.least"):
        world.register("typo", least={"captions.meen": 0.5})


@pytest.mark.slow
def test_a_version_that_is_better_on_the_same_items_becomes_champion(world):
    world.train("contested")
    assert world.register("contest")["decision"] == "champion, as the first one (captions.mean 0.375)"
    world.train("not surely better")
    world.evaluate(12)
    assert "candidate, with captions.mean 0.450 against version 1's 0.375" in world.register("contest")["decision"]
    assert (world.version("contest", "champion"), world.version("contest", "candidate")) == (1, 2)
    world.train("better")
    world.evaluate(16)
    assert world.register("contest")["decision"].startswith("champion, with captions.mean 0.600 against version 1's")
    aliases = {alias: world.version("contest", alias) for alias in ("champion", "candidate", "previous")}
    assert aliases == {"champion": 3, "candidate": 3, "previous": 1}
    outcomes = [(line.version, line.replaced, line.outcome) for line in promotion.history("contest", root=world.root)]
    assert outcomes == [(3, 1, "promoted"), (2, 1, "refused"), (1, None, "promoted")]


@pytest.mark.slow
def test_running_the_step_again_undoes_no_rollback(world):
    world.train("early")
    world.register("undone")
    world.train("late")
    world.evaluate(16)
    first = world.register("undone")
    promotion.rollback("undone", "people dislike it", root=world.root)
    assert world.register("undone") == first
    assert (world.version("undone", "champion"), world.version("undone", "previous")) == (1, 2)


def test_with_manual_promotion_a_version_is_only_a_candidate(world, monkeypatch):
    assert world.register("by-hand", promotion="manual")["decision"] == "candidate, as promotion is manual"
    assert (world.version("by-hand", "champion"), world.version("by-hand", "candidate")) == (None, 1)
    monkeypatch.setenv("UNIVIGU_PROMOTION", "maybe")
    with pytest.raises(ConfigError, match="set it to one of automatic, manual"):
        world.register("by-hand")


@pytest.mark.slow
def test_a_version_whose_files_are_lost_gets_them_back(world, tmp_path):
    first = world.register("lost")
    folder = registry.pipeline_folder("lost", tracking_uri(world.root)).parents[1]
    assert folder.is_relative_to(world.root / "mlruns")
    whole = {file.relative_to(folder) for file in tree_files(folder)}
    shutil.rmtree(folder)
    assert not registry.has_files(registry.find_version("lost", 1, tracking_uri(world.root)), tracking_uri(world.root))
    assert world.register("lost") == first
    assert {file.relative_to(folder) for file in tree_files(folder)} == whole
    assert [line.outcome for line in promotion.history("lost", root=world.root)] == ["promoted"]
    assert pull_version("lost", "1", tmp_path / "pulled", world.root).files  # the digest is as before


@pytest.mark.slow
def test_a_lost_registry_gets_the_model_again_and_the_decision_says_so(world, tmp_path, monkeypatch):
    world.train("restored")
    first = world.register("restored")
    home, cache = world.root / "data/registered", tmp_path / "cache"
    shutil.copytree(home, cache)
    shutil.rmtree(home)
    shutil.copytree(cache, home)  # as DVC restores it
    assert world.register("restored") == first
    shutil.rmtree(home)
    assert world.register("restored") == first

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    again = world.register("restored")
    decision = f"{first['decision']}; registered again, as the registry no longer had version 1"
    assert again == {**first, "decision": decision}
    assert world.register("restored") == again
    assert [line.outcome for line in promotion.history("restored", root=world.root)] == ["promoted"]
    shutil.rmtree(registry.pipeline_folder("restored", tracking_uri(world.root)).parents[2])  # of the new registry


@pytest.mark.slow
def test_registered_files_contain_no_login(world, monkeypatch):
    monkeypatch.setenv("CAPTION_API_KEY", "key-of-ann")
    home = world.root / "data/curated"
    before = (home / "manifest.json").read_bytes()
    manifest = json.loads(before)
    manifest["parameters"]["source"] = {"url": "https://ann:s3cret@host/prompts?token=abcdef", "key": ["key-of-ann"]}
    write_manifest(home, manifest)
    facts = world.register("discreet")
    (home / "manifest.json").write_bytes(before)
    folder = registry.artifact("models:/discreet/1", "lineage", tracking_uri(world.root))
    held = json.loads((folder / "curate-prompts.json").read_text())["parameters"]["source"]
    assert held == {"url": "https://***@host/prompts?token=***", "key": ["***"]}
    version = registry.find_version("discreet", facts["version"], tracking_uri(world.root))
    for text in (version.description, str(version.tags), (folder.parent / "README.md").read_text()):
        assert "s3cret" not in text
        assert "key-of-ann" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "has no valid 'rows_out'"),
        (b'{"rows_out": "many", "inputs": 5}', "has no valid 'rows_out'"),
    ],
)
def test_a_damaged_lineage_file_is_named(world, content, message):
    world.register("traced")
    folder = registry.artifact("models:/traced/1", "lineage", tracking_uri(world.root))
    before = (folder / "encode-latents.json").read_bytes()
    (folder / "encode-latents.json").write_bytes(content)
    with pytest.raises(CorruptDataError, match=message):
        trace_version("traced", 1, world.root)
    (folder / "encode-latents.json").write_bytes(before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", b"[]", "has no valid num_frames"),
        ("transformer/config.json", b"{}", "has no valid text_length"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            (2**60).to_bytes(8, "little") + b"{}",
            "not a valid safetensors",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            (2).to_bytes(8, "little") + b"{",
            "not a valid safetensors",
        ),
    ],
)
def test_an_invalid_model_is_named_and_not_registered(world, name, content, message):
    path = world.root / "data/stage2/model" / name
    before = path.read_bytes()
    path.write_bytes(content)
    world.train("nonsense")
    with pytest.raises(CorruptDataError, match=message):
        world.register("nonsense")
    path.write_bytes(before)
    world.train("sense")
    assert world.version("nonsense", "candidate") is None


@pytest.mark.slow
def test_a_champion_with_captions_in_several_step_counts_is_compared(world):
    world.train("thorough")
    world.evaluate(8, compared_steps=(1, 32))
    world.register("steps")
    world.train("plain")
    world.evaluate(16)
    assert world.register("steps")["decision"].startswith("champion, with captions.mean 0.600")


def test_an_evaluation_of_another_model_is_refused(world):
    world.train("evaluated")
    (world.root / "data/stage2/model/tokenizer/trained.txt").write_text("another")
    inputs = {"latents": world.digests["latents"], "model": world.digests["stage1"]}
    commit(world.root, "train-stage-2", inputs)
    with pytest.raises(BadInputError, match="different outputs of 'train-stage-2'"):
        world.register("mixed")
    world.train("evaluated")
    with pytest.raises(BadInputError, match="no score 'captions"):
        world.register("mixed", metric="captions.beauty")
    assert world.version("mixed", "candidate") is None
