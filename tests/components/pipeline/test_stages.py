"""The table of steps, `dvc.yaml` and what the steps' code uses say the same."""

import ast
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml

from components.pipeline.profiles import check_watched, load_profile, profile_names, use_profile
from components.pipeline.stages import STAGES, find_stage
from univigu.errors import ConfigError

ROOT = Path(__file__).parents[3]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
IDS = [stage.name for stage in STAGES]
MACHINERY = ("components/pipeline", "components/workers.py", "model/univigu/errors.py")  # runs steps, decides nothing
UNUSED = {  # by the step, although its code could reach it: only checks of captions read these
    "synthesize-videos": {"components/prompt_filters.py", "components/wordlists.yaml"}
}


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
    expected |= {f"${{{key}}}" for key in stage.sources.values()}
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


def source_file(module):
    """The file of a module of this project, or None."""
    if module.partition(".")[0] not in ("components", "univigu"):
        return None
    place = ROOT / ("model" if module.startswith("univigu") else "") / module.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@cache
def definitions(module):
    """What each name at the top of a module stands for; what is there for type checkers alone is left out."""
    found = {}
    for node in ast.parse(source_file(module).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                one = ast.Import([alias])
                if isinstance(node, ast.ImportFrom):
                    one = ast.ImportFrom(node.module, [alias], node.level)
                found[alias.asname or alias.name] = one
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif not isinstance(node, ast.If):
            stored = (one for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
            found |= {one.id: node for one in stored}
    return found


@cache
def used_by(module, name):
    """What a definition uses: (module, name), with None for the whole module, and (module, path) for a data file.

    A whole package is all that is in it, and so is a package whose code asks for its own name, to import by it.
    """
    file, known = source_file(module), definitions(module)
    if name not in known:
        package = file.parent.glob("*.py") if file.name == "__init__.py" else ()
        inner = {(f"{module}.{one.stem}", None) for one in package if one != file}
        return inner | {(module, one) for one in known}
    used = set()
    for node in ast.walk(known[name]):
        match node:
            case ast.Import():
                used |= {(alias.name, None) for alias in node.names}
            case ast.ImportFrom():
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                origin = resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    used.add((inner, None) if source_file(inner) else (origin, alias.name))
            case ast.Name(id=one) if one in known or one == "__name__":
                used.add((module, one))
            case ast.Constant(value=str(text)) if "." in text[1:-1] and text.isprintable() and len(text) < 100:
                used.add((text, None))  # a module that is imported by its name
                if (file.parent / text).is_file():
                    used.add((module, file.parent / text))
    return {(origin, one) for origin, one in used if source_file(origin)}


def files_behind(stage):
    """Every file that the step's function reaches through what it calls and imports; `MACHINERY` is not entered."""
    files, seen, ahead = set(), set(), {tuple(stage.function.split(":"))}
    while ahead:
        module, name = found = ahead.pop()
        seen.add(found)
        path = (name if isinstance(name, Path) else source_file(module)).relative_to(ROOT).as_posix()
        if not covers(MACHINERY, path):
            files.add(path)
            ahead |= set() if isinstance(name, Path) else used_by(module, name) - seen
    return files


def covers(paths, file):
    return any(file == path or file.startswith(f"{path}/") for path in paths)


@pytest.mark.parametrize("stage", STAGES, ids=IDS)
def test_a_step_names_the_code_that_it_uses_and_no_other(stage):
    files = files_behind(stage) - UNUSED.get(stage.name, set())
    named = [stage.module.replace(".", "/") + ".py", *stage.code]
    assert {file for file in files if not covers(named, file)} == set()
    assert [path for path in named if not any(covers([path], file) for file in files)] == []


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
