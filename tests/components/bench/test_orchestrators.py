"""What an orchestrator adds to a step is the time around the step's own process."""

import json
import os

import pytest

from components.bench import orchestrators as measure_orchestrators
from components.pipeline.manifests import write_manifest
from components.pipeline.stages import STAGES, find_stage
from components.pipeline.state import STATE


def leave_records(root, started, process, around):
    """As a run of every step would that began at `started`, took `process` seconds in each, and `around` beside it."""
    folder = root / STATE / "runs"
    folder.mkdir(parents=True)
    for number, stage in enumerate(STAGES, 1):
        record = folder / f"{stage.name}.json"
        record.write_text(json.dumps({"process_seconds": process}))
        ended = started + number * (process + around)
        os.utime(record, (ended, ended))
    home = root / find_stage(measure_orchestrators.DATASET).home
    home.mkdir(parents=True)
    write_manifest(home, {"digest": "0" * 64})
    return started


@pytest.mark.parametrize("around", [0.0, 1.25])
def test_the_overhead_is_what_the_process_did_not_take(tmp_path, around):
    started = leave_records(tmp_path, 1_700_000_000.0, 3.0, around)
    assert measure_orchestrators.overheads(tmp_path, started) == {stage.name: around for stage in STAGES}


@pytest.mark.slow
def test_each_orchestrator_runs_in_a_copy_of_the_repository_set_to_the_profile_and_the_report_has_its_keys():
    seen = []

    def run(profile, root):
        seen.append((root / "params.yaml").read_text())
        assert (root / "components/pipeline/stages.py").is_file()
        assert not (root / ".venv").exists()
        return leave_records(root, 1_700_000_000.0, 3.0, 1.5)

    report = measure_orchestrators.measure("smoke", {"dvc": run, "kfp_local": run})
    assert report["overhead_seconds"] == {"dvc": 1.5, "kfp_local": 1.5}
    assert report["overhead_seconds_by_step"]["dvc"].keys() == {stage.name for stage in STAGES}
    assert report["dataset_digest"] == {"dvc": "0" * 64, "kfp_local": "0" * 64}
    assert all("profile: smoke" in text for text in seen)
