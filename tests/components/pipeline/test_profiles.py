"""What a profile may say, what it becomes with all that it extends, and what is said of one that doesn't fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.pipeline.profiles import (
    check_watched,
    find_profile,
    load_profile,
    profile_names,
    use_profile,
)
from components.pipeline.stages import STAGES
from refused_profile import refusal
from univigu.errors import ConfigError

ROOT = Path(__file__).parents[3]


def changed(section, **values):
    profile = load_profile("smoke")
    return {**profile, section: {**profile[section], **values}}


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_every_section_that_a_step_reads(name):
    needed = {key for stage in STAGES for key in (*stage.parameters, *stage.sources.values())}
    assert needed <= load_profile(name).keys()


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_written_out_in_full_is_the_same_profile(name, write):
    assert load_profile(write(load_profile(name))) == load_profile(name)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train_stage_1", "learning_rate", "2e-3", 'is "2e-3"; give a number above 0 (without quotation marks; YAML'),
        ("train_stage_1", "steps", "eight", 'is "eight"; give a whole number of at least 1.'),
        ("train_stage_1", "steps", True, "is true; give a whole number"),
        ("train_stage_1", "weight_decay", -3, "is -3; give a number of at least 0."),
        ("train_stage_1", "gradient_checkpointing", "often", 'is "often"; give true or false or a whole number'),
        ("train_stage_1", "zero_stage", 4, "is 4; give a whole number from 0 to 3."),
        ("train_stage_1", "schedule", "linear", 'is "linear"; give one of cosine, constant.'),
        ("train_stage_1", "loss_weights", 3, "is 3; give a table with video, text, cross_entropy."),
        ("train_stage_1", "lora", "yes", 'is "yes"; give a table with rank, alpha, targets, merge or null.'),
        ("train_stage_1", "ema_decay", float("nan"), "is NaN; give a number of at least 0 and below 1."),
        ("synthesize_videos", "shard_size", 3.5, "is 3.5; give a whole number"),
        ("encode_latents", "batch_size", 0, "is 0; give a whole number of at least 1."),
        ("curate_prompts", "languages", "en", 'is "en"; give a list, each entry a text that is not empty.'),
        ("curate_prompts", "licences", None, "is null; give a list"),
        ("caption_videos", "checks", [3], "[0] is 3; give a text that is not empty or a table."),
        ("video", "buckets", [[9, 32]], "[0][2] is missing; add a whole number of at least 1."),
        ("curate_prompts", "semantic_duplicate_cosine", 3, "is 3; give a number from -1 to 1."),
        ("synthesize_videos", "precision", "int4", 'is "int4"; give one of fp32, bf16.'),
        ("synthesize_videos", "offload", "disk", 'is "disk"; give one of none, model, sequential.'),
        ("synthesize_videos", "vae_memory", ["folding"], '[0] is "folding"; give one of tiling, slicing.'),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_file_and_with_what_would_do(write, section, key, value, said):
    path = write(changed(section, **{key: value}))
    assert f"{path}: {section}.{key}{'' if said.startswith('[') else ' '}{said}" in refusal(path)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("curate_prompts", {"filters": {"speling": "off"}}, "curate_prompts.filters.speling is not a setting"),
        (
            "curate_prompts",
            {"filters": {"unsafe": "maybe"}},
            'filters.unsafe is "maybe"; give one of off, score,',
        ),
        ("curate_prompts", {"filters": {"unsafe": None}}, "curate_prompts.filters.unsafe is null"),
        ("curate_prompts", {"sources": {"a*": {"sauce": "x"}}}, "curate_prompts.sources.a*.sauce is not a setting"),
        (
            "curate_prompts",
            {"sources": {"a*": {"columns": {"txt": "x"}}}},
            "columns.txt is not a setting; did you",
        ),
        ("synthesize_videos", {"checks": {"blank": {"mode": "maybe"}}}, 'checks.blank.mode is "maybe"'),
        ("video", {"fit": {"hdr": "dance"}}, 'video.fit.hdr is "dance"; give one of tone_map, quarantine'),
        ("model", {"sampling": {"luck": 7}}, "model.sampling.luck is not a setting"),
    ],
)
def test_what_is_wrong_inside_a_table_is_named(write, section, values, said):
    assert said in refusal(write({"extends": "tiny", section: values}))


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("text", {"prompt_tokens": [9, 4]}, "text.prompt_tokens is [9, 4]; put the smaller number first"),
        ("text", {"prompt_length": 16}, "text.prompt_length is 16 and prompts have up to 31 tokens; raise it"),
        ("train_stage_2", {"precision": "bf16"}, "train_stage_2.zero_stage is 0, and bf16 without ZeRO keeps no fp32"),
        (
            "train_stage_2",
            {"offload": ["optimizer"]},
            "train_stage_2.zero_stage is 0; to offload optimizer, set it to 1",
        ),
        ("train_stage_2", {"objective": "literal"}, "train_stage_2.tasks has others than joint"),
        (
            "train_stage_2",
            {"text_draws": 4, "tasks": {"understand": 0.0, "joint": 1.0, "generate": 0.0}},
            "train_stage_2.text_draws is 4, and understand has no share",
        ),
        (
            "train_stage_2",
            {"coupled_times": 0.5, "tasks": {"understand": 0.9, "joint": 0.0, "generate": 0.1}},
            "train_stage_2.coupled_times is 0.5, and joint has no share",
        ),
        (
            "train_stage_2",
            {"tasks": {"understand": 0, "joint": 0, "generate": 0}},
            "train_stage_2.tasks has no share above 0",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(write, section, values, said):
    assert said in refusal(write(changed(section, **values)))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train_stage_1", "learning_rate", 1),
        ("train_stage_1", "micro_batch_size", 4),
        ("train_stage_1", "micro_batch_size", None),
        ("train_stage_1", "lora", {"rank": 4, "alpha": 4, "targets": ["to_q"]}),
        ("train_stage_1", "gradient_checkpointing", 2),
        ("train_stage_1", "gradient_checkpointing", True),
        ("train_stage_1", "samples_every", 0),
        ("train_stage_1", "cache_gb", 0.5),
        ("synthesize_videos", "flow_shift", 3.0),
        ("synthesize_videos", "checks", {"blank": {"mode": False, "min_contrast": 3}}),
        ("video", "buckets", [[9, 32, 32]]),
        ("evaluate_model", "scorers", {"clip": "model/clip"}),
        ("curate_prompts", "sources", {"Vid*": {"source": "VidProM", "columns": {"unsafe": ["toxicity"]}}}),
    ],
)
def test_what_only_other_profiles_need_is_taken_as_it_is(write, section, key, value):
    profile = changed(section, **{key: value})
    assert load_profile(write(profile)) == profile


def test_every_fault_of_a_profile_is_in_one_message(write):
    profile = changed("train_stage_1", stepz=3, learning_rate=-1)
    del profile["train_stage_1"]["steps"], profile["register_model"]
    profile["mascot"] = 1
    path = write(profile)
    assert refusal(path).splitlines() == [
        f"The profile {path} has 5 faults (train_stage_1.steps, train_stage_1.learning_rate, train_stage_1.stepz, "
        "register_model, mascot):",
        f"  {path}: train_stage_1.steps is missing; add a whole number of at least 1, or take it from another profile "
        "with `extends`",
        f"  {path}: train_stage_1.learning_rate is -1; give a number above 0",
        f"  {path}: train_stage_1.stepz is not a setting; did you mean 'steps'?",
        f"  {path}: register_model is missing; add a table with name, champion_metric, least_scores, promotion, or "
        "take it from another profile with `extends`",
        f"  {path}: mascot is not a setting; remove it, or use one of {', '.join(load_profile('tiny'))}",
    ]


def test_what_is_no_json_is_named_before_it_reaches_a_recipe(write):
    said = refusal(
        write("extends: tiny\ntext: {1: 2}\ncaption_videos: {options: {since: 2026-01-01}}\nseed: 1970-01-01")
    )
    assert "text has the key 1, which is no text; put it in quotation marks" in said
    assert 'caption_videos.options.since is "2026-01-01", which YAML reads as a date' in said
    assert 'seed is "1970-01-01"' in said
    assert "has 3 faults" in said


def test_a_message_does_not_grow_with_thousands_of_faults(write):
    said = refusal(write({f"key{number}": 1 for number in range(5000)})).splitlines()
    assert len(said) == 52
    assert said[-1] == "  and 4968 more"


def test_a_profile_of_an_earlier_version_is_told_all_that_has_changed(write):
    old = load_profile("smoke")
    old["train_stage_1"]["lr"] = old["train_stage_1"].pop("learning_rate")
    del old["import_videos"], old["curate_prompts"]["filters"]["diversity"]
    old["evaluate_model"]["guidance"] = 4.0
    said = refusal(write(old))
    for key in ("train_stage_1.learning_rate", "import_videos", "curate_prompts.filters.diversity"):
        assert f"{key} is missing" in said
    for key in ("train_stage_1.lr", "evaluate_model.guidance"):
        assert f"{key} is not a setting" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not readable YAML"),
        ("- a\n- b", "is not a table of settings"),
        ("1: 2", "is not a table of settings"),
        ("", "is not a table of settings"),
        ("a: &a [x, x]\nb: &b [*a, *a]" + "".join(f"\n{c}: &{c} [{', '.join(['*' + p] * 20)}]" for p, c in
         zip("bcdefg", "cdefgh", strict=True)), "aliases expand to more than 100,000 values"),
        ("a: " + "x" * 10 * 2**20, "is larger than 1 MiB"),
        ("a: " + "[" * 200 + "]" * 200, "nested more than 50 levels deep"),
    ],
    ids=["broken", "list", "numbers", "empty", "alias bomb", "10 MB", "deep"],
)  # fmt: skip
def test_a_file_that_holds_no_profile_is_refused_in_one_sentence(write, text, said):
    assert said in refusal(write(text))
    assert len(refusal(write(text)).splitlines()) == 1


def test_a_missing_file_and_an_unknown_name_are_named():
    assert "no profile file nowhere/mine.yaml" in refusal("nowhere/mine.yaml")
    for choose in (load_profile, lambda name: use_profile(name, Path("."))):
        with pytest.raises(ConfigError, match=r"no profile 'huge'.*; choose one of long, smoke, stories, tiny"):
            choose("huge")


def test_a_profile_that_only_imports_and_captions_may_allow_captions_of_any_length(write):
    path = write(
        {"extends": "tiny", "text": {"prompt_tokens": [1, 400], "caption_tokens": [2, 2000], "prompt_length": 512}}
    )
    assert load_profile(path)["text"]["caption_tokens"] == [2, 2000]


# --- DVC and the command line ----------------------------------------------------------------------------------------


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
    with pytest.raises(ConfigError, match=r"DVC watches model/tiny-wan .*; run `univigu use wan-1.3b` first"):
        check_watched("wan-1.3b", real, tmp_path)
    use_profile("wan-1.3b", tmp_path)
    check_watched("wan-1.3b", real, tmp_path)


def test_the_names_of_profiles_are_known_without_importing_what_is_slow():
    command = "import sys; from components.pipeline import profiles; "
    command += "print(profiles.profile_names(), 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == f"{profile_names()} False"


def test_a_bundled_profile_is_found_by_its_name_and_any_other_by_its_path():
    assert find_profile("tiny").name == "tiny.yaml"
    assert find_profile("some/where.yml") == Path("some/where.yml")
