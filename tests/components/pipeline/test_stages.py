"""The table of steps and `dvc.yaml` say the same."""

from pathlib import Path

import pytest
import yaml

from components.pipeline.profiles import load_profile, profile_names
from components.pipeline.stages import STAGES, find_stage
from univigu.errors import ConfigError

ROOT = Path(__file__).parents[3]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
IDS = [stage.name for stage in STAGES]


def dvc_paths(entries):
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def test_dvc_has_the_same_steps_in_the_same_order():
    assert list(DVC["stages"]) == IDS


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_runs_the_step_with_the_profile(stage):
    assert DVC["stages"][stage.name]["cmd"] == f"univigu run {stage.name} --profile ${{profile}}"


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_depends_on_the_same_inputs_sources_and_code(stage):
    makers = [find_stage(name) for name in stage.inputs.values()]
    expected = {f"{maker.home}/manifest.json" if maker.outputs else maker.home for maker in makers}
    places = {"base": "${base}", "generator": "${generator}", "heldout": "${heldout}", "raw": "data/prompts"}
    expected |= {places[name] for name in stage.sources}
    expected |= {stage.module.replace(".", "/") + ".py", *stage.code}
    assert dvc_paths(DVC["stages"][stage.name]["deps"]) == expected


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_watches_the_same_parameters(stage):
    (entry,) = DVC["stages"][stage.name]["params"]
    assert set(entry["components/profiles/${profile}.yaml"]) == {*stage.sources.values(), *stage.parameters}


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_tracks_the_same_outputs(stage):
    entry = DVC["stages"][stage.name]
    found = dvc_paths([*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])])
    names = (*stage.outputs, "rejected.parquet", "manifest.json")
    assert found == ({f"{stage.home}/{name}" for name in names} if stage.outputs else {stage.home})


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_what_a_step_names_exists(stage):
    assert (ROOT / (stage.module.replace(".", "/") + ".py")).is_file()
    assert [path for path in stage.code if not (ROOT / path).exists()] == []
    earlier = IDS[: IDS.index(stage.name)]
    assert set(stage.inputs.values()) <= set(earlier)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_every_section_that_a_step_reads(name):
    profile = load_profile(name)
    needed = {key for stage in STAGES for key in (*stage.parameters, *stage.sources.values())}
    assert needed <= profile.keys()


def test_profiles_of_one_world_have_the_same_keys():
    def keys(value, path=""):
        if not isinstance(value, dict):
            return {path}
        return {key for name, inner in value.items() for key in keys(inner, f"{path}.{name}")}

    assert keys(load_profile("tiny")) == keys(load_profile("smoke"))


@pytest.mark.parametrize("profile", profile_names())
def test_dvc_and_every_profile_name_the_same_sources(profile):
    assert DVC["vars"] == [{name: load_profile(profile)[name]} for name in ("base", "generator", "heldout")]


def test_a_profile_that_lacks_a_parameter_is_told_which(tmp_path):
    profile = load_profile("tiny")
    del profile["text"]["prompt_tokens"], profile["register_model"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(ConfigError, match=r"lacks register_model, register_model.*text.prompt_tokens"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_the_profile_in_use_is_there():
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["profile"] in profile_names()


def test_an_unknown_profile_or_step_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="no profile 'huge'; choose one of smoke, tiny"):
        load_profile("huge")
    with pytest.raises(ConfigError, match="no step 'dance'; the steps are curate-prompts"):
        find_stage("dance")
