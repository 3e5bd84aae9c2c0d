"""A task whose step was stopped, or whose server was down, ends as without it."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from components.orchestration import kfp_tasks
from components.pipeline.manifests import read_manifest
from components.pipeline.runner import run_stage

REPO = Path(__file__).parents[3]


def run_task(root, profile):
    name = "curate-prompts"
    return kfp_tasks.run_step(name, str(profile), str(root), "key", kfp_tasks.declaration(name))


ANSWERS_LATER = "import sys, pathlib as p; at = p.Path(sys.argv[1]); left = int(at.read_text()); "
ANSWERS_LATER += "at.write_text(str(left - 1)); sys.exit('univigu: MLflow does not answer.' and 75 if left else 0)"


def test_a_step_is_run_again_until_its_server_answers_or_time_is_up(tmp_path, capfd):
    def run(refusals):
        (tmp_path / "left").write_text(str(refusals))
        command = [sys.executable, "-S", "-c", ANSWERS_LATER, str(tmp_path / "left")]
        kfp_tasks._run_command("register-model", str(tmp_path), command, patience_s=0.2)

    run(1)
    assert "register-model | tries again in 0.2 s, because this failure may be temporary" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(2)
    assert stop.value.code == 75
    assert kfp_tasks.PATIENCE_S > 10 * 60


DRAINED = """
import os, signal, time
from pathlib import Path
from components.pipeline import commit

def wait_for_the_drain(*_):
    if os.environ["DRAINED"] == "SIGKILL":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as long as the grace period
    Path(os.environ["DRAINED_AT"]).write_text(f"{os.getpid()}\\n")
    time.sleep(60)

if os.environ.get("DRAINED"):
    commit.write_manifest = wait_for_the_drain
"""


@pytest.mark.slow
def test_a_step_whose_node_is_drained_while_it_commits_ends_with_the_same_output(
    new_root, profile, tmp_path, monkeypatch
):
    """Between the last file of its output and the manifest: by SIGTERM, and by SIGKILL after the grace period."""
    root = new_root("drained")
    prompts = root / profile["raw_prompts"] / "new.jsonl"
    prompts.parent.mkdir(parents=True)
    row = {"text": "a clip of a red nine that turns over black", "source": "test", "licence": "CC0-1.0"}
    prompts.write_text(json.dumps(row))
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    shutil.copytree(root, tmp_path / "undisturbed")
    (tmp_path / "sitecustomize.py").write_text(DRAINED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{REPO}:{REPO / 'model'}")
    monkeypatch.setenv("DRAINED_AT", str(tmp_path / "at"))

    def drain():
        while not (at := tmp_path / "at").exists() or not at.read_text().endswith("\n"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # to the task, which passes it on
        if os.environ["DRAINED"] == "SIGKILL":
            time.sleep(0.2)
            os.kill(int(at.read_text()), signal.SIGKILL)
        at.unlink()

    for how, code in (("SIGTERM", 143), ("SIGKILL", 137)):
        monkeypatch.setenv("DRAINED", how)
        node = threading.Thread(target=drain)
        node.start()
        with pytest.raises(SystemExit) as stop:
            run_task(root, tmp_path / "profile.yaml")
        node.join()
        assert stop.value.code == code
        assert {path.name for path in (root / "data/curated").iterdir()} >= {"prompts.parquet", "rejected.parquet"}
        assert not (root / "data/curated/manifest.json").exists()
    monkeypatch.delenv("DRAINED")
    digest = run_task(root, tmp_path / "profile.yaml")
    assert digest == run_stage("curate-prompts", profile, tmp_path / "undisturbed")["digest"]
    assert read_manifest(root / "data/curated", "curate-prompts")["digest"] == digest
