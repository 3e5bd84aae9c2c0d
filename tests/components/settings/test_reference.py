"""The page of all settings and the schema for editors say what the models say."""

import inspect
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from components.pipeline.profiles import find_profile, load_profile, profile_names
from components.prompts.screening import FILTERS
from components.prompts.sources import KNOWN_COLUMNS
from components.settings.profile import Profile, schema
from components.settings.reference import file_schema, write_page
from components.settings.schema_words import properties
from components.settings.sections import Columns, Filters
from components.settings.training import Sampling
from univigu import UniViGUPipeline

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "components/profiles"


def test_the_page_of_all_settings_is_what_the_models_say():
    assert (ROOT / "docs/profiles.md").read_text() == write_page(), "run `make profiles`"


def test_the_schema_beside_the_profiles_is_what_the_models_say():
    assert json.loads((FOLDER / "schema.json").read_text()) == file_schema(), "run `make profiles`"


@pytest.mark.parametrize("name", profile_names())
def test_every_bundled_profile_names_the_schema_and_fits_it(name):
    assert find_profile(name).read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    text = find_profile(name).read_text().replace("mode: off", 'mode: "off"')  # editors read YAML 1.2
    jsonschema.Draft202012Validator(file_schema()).validate(yaml.safe_load(text))


@pytest.mark.parametrize("wrong", [{"train_stage_2": {"stepz": 3}}, {"seed": "x"}, {"extends": 3}, {"mascot": 1}])
def test_the_schema_refuses_what_the_models_refuse(wrong):
    assert not jsonschema.Draft202012Validator(file_schema()).is_valid({"extends": "tiny", **wrong})


def test_every_setting_is_described():
    def undescribed(entry, path=""):
        for key, inner in properties(entry, schema()).items():
            if not inner.get("description"):
                yield f"{path}{key}"
            yield from undescribed(inner, f"{path}{key}.")

    assert list(undescribed(schema())) == []


def test_every_key_of_the_largest_profile_is_on_the_page():
    page = write_page()
    for section, values in load_profile("wan-1.3b").items():
        names = values if isinstance(values, dict) else [section]
        assert [name for name in names if f"| `{name}` |" not in page] == []


def test_the_models_know_the_filters_that_there_are():
    assert set(Filters.model_fields) == set(FILTERS)


def test_sampling_knows_every_setting_of_it():
    assert set(Sampling.model_fields) <= set(inspect.signature(UniViGUPipeline.__init__).parameters)


def test_the_models_know_the_columns_of_prompts_that_there_are():
    assert set(Columns.model_fields) == {*KNOWN_COLUMNS, "unsafe"}


@pytest.mark.parametrize("name", profile_names())
def test_the_typed_profile_has_the_values_of_the_mapping(name):
    profile = Profile.model_validate(load_profile(name))
    assert profile.train_stage_2.steps == load_profile(name)["train_stage_2"]["steps"]
    assert list(profile.text.prompt_tokens) == load_profile(name)["text"]["prompt_tokens"]
