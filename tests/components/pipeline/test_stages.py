"""The table of steps, `dvc.yaml` and what the steps' code uses say the same."""

from pathlib import Path

import pytest
import yaml

from components.pipeline.profiles import check_watched, load_profile, profile_names, use_profile
from components.pipeline.stages import STAGES, find_stage
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
    assert dvc_paths(stage["outs"]) == {".univigu/code.json"}


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_runs_the_step_with_the_profile(stage):
    assert DVC["stages"][stage.name]["cmd"] == f"univigu run {stage.name} --profile ${{profile}}"


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_depends_on_the_same_inputs_and_sources(stage):
    makers = [find_stage(name) for name in stage.inputs.values()]
    expected = {f"{maker.home}/manifest.json" if maker.outputs else maker.home for maker in makers}
    expected |= {f"${{{key}}}" for key in stage.sources.values()}
    assert dvc_paths(DVC["stages"][stage.name]["deps"]) == expected


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_dvc_watches_the_same_parameters_and_the_code(stage):
    code, entry = DVC["stages"][stage.name]["params"]
    assert code == {".univigu/code.json": [stage.name]}
    assert set(entry["components/profiles/${profile}.yaml"]) == {*stage.sources.values(), *stage.parameters}


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


def test_a_profile_that_lacks_a_parameter_is_told_which(tmp_path):
    profile = load_profile("tiny")
    del profile["text"]["prompt_tokens"], profile["register_model"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(ConfigError, match=r"lacks register_model, register_model.*text.prompt_tokens"):
        load_profile(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train_stage_1", "learning_rate", "2e-3", r"is \"2e-3\"; give it a number, .* 2.0e-3 a number\)"),
        ("train_stage_1", "steps", "eight", r'is "eight"; give it a whole number, such as'),
        ("train_stage_1", "weight_decay", -3, "is -3; give it a number above that"),
        ("train_stage_1", "betas", ["x", 0.9], 'is "x"; give it a number'),
        ("synthesize_videos", "shard_size", 3.5, "is 3.5; give it a whole number"),
        ("encode_latents", "batch_size", 0, "is 0; give it a number above that"),
        ("encode_latents", "batch_size", -1, "is -1; give it a number above that"),
        ("curate_prompts", "languages", "en", r'is "en"; give it a list, such as \["en"\]'),
        ("curate_prompts", "licences", None, "is null; give it a list"),
        ("train_stage_1", "loss_weights", 3, "is 3; give it a table"),
    ],
)
def test_a_value_of_another_kind_than_the_bundled_profiles_have_is_told(tmp_path, section, key, value, said):
    profile = load_profile("smoke")
    profile[section][key] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(ConfigError, match=rf"'{section}.{key}' in the profile .*mine.yaml {said}"):
        load_profile(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train_stage_1", "learning_rate", 1),
        ("train_stage_1", "micro_batch_size", 4),
        ("train_stage_1", "micro_batch_size", None),
        ("train_stage_1", "lora", {"rank": 4, "alpha": 4, "targets": ["to_q"]}),
        ("train_stage_1", "gradient_checkpointing", 2),
        ("train_stage_1", "samples_every", 0),
        ("train_stage_1", "cache_gb", 0.5),
        ("synthesize_videos", "flow_shift", 3.0),
        ("video", "buckets", [[9, 32, 32]]),
        ("evaluate_model", "scorers", {"clip": "model/clip"}),
    ],
)
def test_what_only_other_profiles_need_is_taken(tmp_path, section, key, value):
    profile = load_profile("smoke")
    profile[section][key] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    assert load_profile(str(tmp_path / "mine.yaml")) == profile


def test_the_profile_in_use_is_there_with_the_paths_that_it_names(tmp_path):
    committed = (ROOT / "params.yaml").read_text()
    use_profile(yaml.safe_load(committed)["profile"], tmp_path)
    assert (tmp_path / "params.yaml").read_text() == committed


@pytest.mark.parametrize("name", profile_names())
def test_using_a_profile_has_dvc_watch_what_it_reads(name, tmp_path):
    use_profile(name, tmp_path)
    profile = load_profile(name)
    expected = {key: profile[key] for key in ("base", "generator", "heldout", "raw_prompts")}
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == {"profile": name, **expected}
    text = (ROOT / "dvc.yaml").read_text()
    assert all(f"- ${{{key}}}\n" in text for key in expected)


def test_using_a_profile_twice_leaves_the_file_alone(tmp_path):
    use_profile("smoke", tmp_path)
    before = (tmp_path / "params.yaml").stat().st_mtime_ns
    use_profile("smoke", tmp_path)
    assert (tmp_path / "params.yaml").stat().st_mtime_ns == before


def test_dvc_runs_no_profile_whose_paths_it_does_not_watch(tmp_path, monkeypatch):
    use_profile("tiny", tmp_path)
    real = load_profile("wan-1.3b")
    check_watched("wan-1.3b", real, tmp_path)  # outside of DVC, nobody watches anything
    monkeypatch.setenv("DVC_STAGE", "curate-prompts")
    check_watched("smoke", load_profile("smoke"), tmp_path)
    with pytest.raises(ConfigError, match=r"has DVC watch model/tiny-wan; run `univigu use wan-1.3b` first"):
        check_watched("wan-1.3b", real, tmp_path)
    use_profile("wan-1.3b", tmp_path)
    check_watched("wan-1.3b", real, tmp_path)


def test_an_unknown_profile_or_step_is_named_with_those_there_are():
    for choose in (load_profile, lambda name: use_profile(name, Path("."))):
        with pytest.raises(ConfigError, match=r"no profile 'huge'.*; choose one of smoke, tiny"):
            choose("huge")
    with pytest.raises(ConfigError, match="no step 'dance'; the steps are curate-prompts"):
        find_stage("dance")
