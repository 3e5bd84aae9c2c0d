"""The table of steps, `dvc.yaml` and what the steps' code uses say the same."""

from pathlib import Path

import pytest
import yaml

from components.pipeline.stages import EDITS, STAGES, find_stage
from univigu.errors import ConfigError

ROOT = Path(__file__).parents[3]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
IDS = [stage.name for stage in STAGES]
CODE = "code"  # the stage that digests the steps' code


def dvc_paths(entries):
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def test_dvc_has_the_same_steps_in_the_same_order():
    assert list(DVC["stages"]) == [CODE, *IDS]


def test_dvc_watches_what_the_code_of_each_step_does():
    stage = DVC["stages"][CODE]
    assert stage["deps"] == ["components", "model/univigu"]
    assert dvc_paths(stage["outs"]) == {".univigu/steps"}


def test_dvc_shows_and_changes_the_profile_as_it_is_written():
    assert DVC["stages"][CODE]["params"] == [{"components/profiles/${profile}.yaml": None}]


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_runs_the_step_with_the_profile(stage):
    assert DVC["stages"][stage.name]["cmd"] == f"univigu run {stage.name} --profile ${{profile}}"


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_depends_on_the_same_inputs_and_sources(stage):
    makers = [find_stage(name) for name in stage.inputs.values()]
    expected = {f"{maker.home}/manifest.json" if maker.outputs else maker.home for maker in makers}
    expected |= {f"${{{key}}}" for key in stage.sources.values()}
    expected.add(f".univigu/steps/{stage.name}.json")  # its code and settings
    expected |= {EDITS} if stage.edits else set()
    assert dvc_paths(DVC["stages"][stage.name]["deps"]) == expected


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_tracks_the_same_outputs(stage):
    entry = DVC["stages"][stage.name]
    found = dvc_paths([*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])])
    names = (*stage.outputs, "rejected.parquet", "manifest.json")
    assert found == ({f"{stage.home}/{name}" for name in names} if stage.outputs else {stage.home})


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_leaves_outputs_in_their_place_for_the_step_to_go_on_from(stage):
    entry = DVC["stages"][stage.name]
    outputs = [*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])]
    assert all(next(iter(output.values()))["persist"] for output in outputs)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_what_a_step_names_exists(stage):
    assert (ROOT / (stage.module.replace(".", "/") + ".py")).is_file()
    earlier = IDS[: IDS.index(stage.name)]
    assert set(stage.inputs.values()) <= set(earlier)


def test_an_unknown_step_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="no step 'dance'; the steps are curate-prompts"):
        find_stage("dance")
