"""From raw prompts to a registered model with `dvc repro`, in a clone, as a user would; then the README's commands."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from components.bench.orchestrators import overheads
from components.pipeline.freshness import finished
from components.pipeline.manifests import verify
from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES
from univigu.files import file_sha256

REPO = Path(__file__).parents[1]
README = REPO / "README.md"
PAGES = (README, REPO / "docs/registry.md")  # whose commands and examples are run; `console` blocks are run elsewhere
# What the README shows and this test does not repeat: the clone itself, the environment, and the full-size run.
RUN_ELSEWHERE = ("git clone", "make ", "mlflow ui", "cd ", "source ", "univigu rehearse --profile wan-14b")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(reproduced):
    """The clone, with the model of `smoke` promoted by hand: the documents' commands ask for a champion."""
    promoted = ["univigu", "model", "promote", "candidate", "--force", "--why", "for the commands of the documents"]
    done = call(promoted, reproduced.root)
    assert done.returncode == 0, said(done)
    assert "is below its profile's least" in done.stdout
    return reproduced.root


def call(command, cwd, **more):
    """Run a command in a clone with the clone's own code and profiles, as where the project is installed from it."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    env["PYTHONPATH"] = f"{cwd}:{cwd}/model"
    return subprocess.run(command, cwd=cwd, env={**env, **more}, capture_output=True, text=True, check=False)


def said(done):
    return f"{done.args}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_dvc_adds_little_to_the_steps(reproduced):
    added = overheads(reproduced.root, reproduced.started)
    assert sum(added.values()) < 0.35 * reproduced.seconds, added


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_every_step_leaves_a_verified_output(clone, stage):
    manifest = verify(clone / stage.home, stage.name)
    assert manifest["step"] == stage.name
    assert manifest["rows_in"] > 0
    if stage.name != "evaluate-model":  # whose rows are scores
        assert manifest["rows_in"] == manifest["rows_out"] + manifest["quarantined"]


def test_with_nothing_changed_nothing_runs(clone, reproduced):
    started = time.monotonic()
    done = call(["dvc", "repro"], clone)
    assert done.returncode == 0, said(done)
    assert "Running stage" not in done.stdout
    assert time.monotonic() - started < 0.1 * reproduced.seconds


def test_comments_docstrings_and_formatting_run_nothing(clone):
    before = {stage.name: verify(clone / stage.home, stage.name) for stage in STAGES}
    for path in [*clone.glob("components/**/*.py"), *clone.glob("model/univigu/**/*.py")]:
        path.write_text("# a comment\n" + ast.unparse(ast.parse(path.read_text())) + "\n# the end\n")
    done = call(["dvc", "repro"], clone, PYTHONPATH=f"{clone}:{clone / 'model'}")
    assert done.returncode == 0, said(done)
    assert re.findall(r"Running stage '([\w-]+)'", done.stdout) == ["code"]
    assert {stage.name: verify(clone / stage.home, stage.name) for stage in STAGES} == before
    assert call(["git", "checkout", "--", "components", "model"], clone).returncode == 0
    assert call(["dvc", "repro"], clone).returncode == 0


def test_what_dvc_restored_is_finished_for_everybody(clone):
    shutil.rmtree(clone / "data/stage2")
    runs = (clone / ".univigu/runs").rename(clone / ".univigu/noted")
    done = call(["dvc", "checkout", "data/stage2"], clone)
    assert done.returncode == 0, said(done)
    profile = load_profile("smoke")
    assert all(finished(stage.name, profile, clone) for stage in STAGES)
    done = call(["univigu", "status", "--profile", "smoke"], clone)
    assert done.stdout.split() == [word for stage in STAGES for word in (stage.name, "finished")], said(done)
    shutil.rmtree(clone / ".univigu/runs", ignore_errors=True)
    runs.rename(clone / ".univigu/runs")


def test_the_summary_shows_steps_scores_version_and_page(clone):
    done = call(["univigu", "summary"], clone)
    assert done.returncode == 0, said(done)
    for needed in (
        *(stage.name for stage in STAGES),
        "captions.mean",
        "joint.agreement",
        "registered: uni-vigu version 1 - candidate, as captions.mean",
    ):
        assert needed in done.stdout
    assert str(clone / "reports/index.html") in done.stdout.replace("\n", "")
    page = (clone / "reports/index.html").read_text()
    for needed in (
        "uni-vigu version 1",
        "<dd>smoke</dd>",
        "../.univigu/docs/index.html",
        "/models/uni-vigu/versions/1",
    ):
        assert needed in page
    run = json.loads((clone / "reports/run.json").read_text())
    assert [step["name"] for step in run["steps"]] == [stage.name for stage in STAGES]
    assert 0 < run["peak_rss_mb"] < 4096
    assert str(run["model_version"]) == "1"


def test_the_metrics_for_machines_have_their_keys(clone):
    metrics = json.loads((clone / "reports/scores.json").read_text())
    attributes = ("digit", "colour", "background", "direction", "speed", "start", "end")
    keys = [("captions", name) for name in ("mean", *attributes)] + [
        ("generation", name) for name in ("mean", *attributes)
    ]
    keys += [
        ("captions_without_video", "mean"),
        ("generation_base", "mean"),
        ("joint", "agreement"),
        ("recogniser", "mean"),
    ]
    for group, name in keys:
        score = metrics[group][name]
        assert set(score) == {"value", "low", "high", "n"}, (group, name)
        assert score["n"] == 0 or 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    shown = json.loads((clone / "reports/metrics.json").read_text())
    assert shown["captions"] == pytest.approx(metrics["captions"]["mean"]["value"], abs=1e-3)
    assert shown["joint"] == pytest.approx(metrics["joint"]["agreement"]["value"], abs=1e-3)
    items = pd.read_parquet(clone / "reports/items.parquet")
    assert set(items["task"]) >= {"captions", "generation", "joint"}


def test_the_page_is_whole_and_asks_nothing_of_the_network(clone):
    page = (clone / "reports/report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert len(page) < 8_000_000


def shown_commands():
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.split(" # ")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return [line for line in lines if not line.startswith(RUN_ELSEWHERE)]


def test_every_command_of_the_documents_runs(clone):
    commands = shown_commands()
    assert any(line.startswith("univigu caption") for line in commands)
    for line in commands:
        done = call(shlex.split(line), clone)
        assert done.returncode == 0, said(done)
        assert not re.search("Loading (?!the model)", done.stderr)  # of diffusers and transformers
        assert "Warning" not in done.stderr


def test_every_python_example_of_the_documents_runs(clone):
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
    assert blocks
    for block in blocks:
        done = call([sys.executable, "-c", block], clone)
        assert done.returncode == 0, said(done)


def test_the_champion_leads_back_to_a_tagged_dataset_and_its_prompts(clone):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["git", "add", "-A"], [*git, "commit", "-qm", "The dataset"]):
        assert call(command, clone).returncode == 0
    call(["git", "config", "user.name", "a"], clone)
    call(["git", "config", "user.email", "a@example.com"], clone)
    done = call(["univigu", "data", "snapshot"], clone)
    assert done.returncode == 0, said(done)
    assert done.stdout.startswith("dataset@v1.0.0: ")
    again = call(["univigu", "data", "snapshot"], clone)
    assert (again.returncode, "already dataset@v1.0.0" in again.stdout) == (0, True), said(again)

    done = call(["univigu", "model", "trace", "--json"], clone)
    assert done.returncode == 0, said(done)
    found = json.loads(done.stdout)
    assert found["model"]["aliases"] == ["candidate", "champion"]
    assert [run["status"] for run in found["runs"]] == ["FINISHED"] * 2
    manifests = {stage.name: verify(clone / stage.home, stage.name) for stage in STAGES}
    assert found["dataset"]["digest"] == manifests["encode-latents"]["digest"]
    assert found["dataset"]["snapshot"] == "dataset@v1.0.0"
    assert found["prompts"]["kept"] == manifests["curate-prompts"]["rows_out"]
    assert sum(row["count"] for row in found["prompts"]["sources"]) == found["prompts"]["kept"]
    for name, digest in found["prompts"]["files"].items():
        assert file_sha256(clone / "data/prompts" / name) == digest


def test_the_plots_of_dvc_are_the_ones_to_look_at(clone):
    done = call(["dvc", "plots", "show", "--json"], clone)
    assert done.returncode == 0, said(done)
    plots = {}
    for name, parts in json.loads(done.stdout)["data"].items():
        (part,) = parts
        content = part["content"]
        plots[name] = json.loads(content) if isinstance(content, str) else content
    stages = [1, 2]
    assert list(plots) == [
        "Accuracy by attribute",
        "Digits that captions confuse",
        *(f"Losses of stage {n}" for n in stages),
        *(f"Held-out losses of stage {n} by tau" for n in stages),
        *(f"What the video tells stage {n} by tau" for n in stages),
    ]
    scores = plots["Accuracy by attribute"]
    assert "<DVC_" not in json.dumps(scores)
    shown = {(row["score"], row["attribute"]) for row in scores["data"]["values"]}
    assert {("captions", "digit"), ("generation", "colour"), ("joint", "agreement")} <= shown
    losses = plots["Losses of stage 2"]["data"]["values"]
    assert {row["field"] for row in losses} == {"video_mse", "text_mse", "text_ce"}
    bins = plots["What the video tells stage 1 by tau"]["data"]["values"]
    assert len({float(row["tau"]) for row in bins}) == 10


def test_an_experiment_runs_what_its_change_decides_and_is_shown_with_its_scores(clone):
    changed = "components/profiles/smoke.yaml:+register_model.promotion=manual"  # +: `smoke` has it from `tiny`
    done = call(["dvc", "exp", "run", "--name", "by-hand", "--set-param", changed], clone)
    assert done.returncode == 0, said(done)
    assert re.findall(r"Running stage '([\w-]+)'", done.stdout) == ["code", "register-model"]
    done = call(["dvc", "exp", "show", "--json"], clone)
    assert done.returncode == 0, said(done)
    (experiment,) = [
        rev for commit in json.loads(done.stdout) for found in commit["experiments"] or [] for rev in found["revs"]
    ]
    assert experiment["name"] == "by-hand"
    data = experiment["data"]
    profile = data["params"]["components/profiles/smoke.yaml"]["data"]
    assert profile["register_model"]["promotion"] == "manual"
    scores = data["metrics"]["reports/metrics.json"]["data"]
    assert 0 <= scores["captions"] <= 1
