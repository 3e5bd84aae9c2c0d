"""Code is identified by what it does, by what a run uses of it, and not by how it is written or where it is."""

import ast
import importlib
import py_compile
import sys
from pathlib import Path

import pytest

from components.pipeline import fingerprint as fingerprints
from components.pipeline import syntax
from components.pipeline.fingerprint import changed_code, code_digest, fingerprint, named_in, stage_code
from components.pipeline.profiles import load_profile, profile_names
from components.pipeline.stages import STAGES, find_stage
from univigu import extras, version_files

ROOT = Path(__file__).parents[3]
CODE = {
    "world/__init__.py": "",
    "world/steps.py": """
        from world import tools
        from world.tools import scale as by
        import math as m

        def step(x):
            return by(x) + tools.SHIFT + m.pi

        def unused(x):
            return x
    """,
    "world/tools.py": '''
        SHIFT = 3

        def scale(x: float) -> float:
            """Twice."""
            return 2 * x

        class Box:
            size: int = 1

        def never():
            return Box()
    ''',
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A package on the path; returns a function that writes one of its files and gives the code of its step."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files=CODE, entry="world.steps:step"):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            lines = text.splitlines()
            indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            path.write_text("\n".join(line[indent:] for line in lines) + "\n")
        importlib.invalidate_caches()
        syntax._parse.cache_clear()
        return fingerprint([entry])

    yield write
    sys.modules.pop("world", None)


def changed(world, file, before, after):
    """Whether the step's code is another after a replacement in one file."""
    assert before in CODE[file]
    first = code_digest(world())
    return code_digest(world({**CODE, file: CODE[file].replace(before, after)})) != first


def test_only_what_is_reached_counts(world):
    assert set(world()) == {"world.steps:step", "world.tools:scale", "world.tools:SHIFT"}
    assert not changed(world, "world/tools.py", "return Box()", "return None")
    assert not changed(world, "world/steps.py", "            return x\n    ", "            return 2 * x\n    ")


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("world/tools.py", '"""Twice."""', '"""Two times.\n\n            At least."""'),
        ("world/tools.py", '            """Twice."""\n', ""),
        ("world/tools.py", "return 2 * x", "return (2 *\n                x)  # a comment"),
        ("world/tools.py", "(x: float) -> float", "(x)"),
        ("world/tools.py", "(x: float) -> float", "(x: 'int | float') -> 'int | float'"),
        ("world/tools.py", "SHIFT = 3", "# why\n        SHIFT: int = 3"),
        ("world/tools.py", "SHIFT = 3", "SHIFT = 0x3"),
        ("world/steps.py", "import math as m\n", "import math as m\n        import json\n"),
        ("world/steps.py", "from world import tools\n", "import world.tools as tools\n"),
        (
            "world/steps.py",
            "            return by(x)",
            "            if True:\n                pass\n            return by(x)",
        ),
    ][:-1],
)
def test_what_does_nothing_does_not_count(world, file, before, after):
    assert not changed(world, file, before, after)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("world/tools.py", "return 2 * x", "return 3 * x"),
        ("world/tools.py", "SHIFT = 3", "SHIFT = 4"),
        ("world/tools.py", "SHIFT = 3", "SHIFT = 3\n        SHIFT += 1"),
        ("world/tools.py", "SHIFT = 3", "SHIFT = 3\n        print(SHIFT)"),
        ("world/steps.py", "import math as m", "import cmath as m"),
        ("world/steps.py", "from world.tools import scale as by", "from world.tools import never as by"),
        ("world/steps.py", "by(x)", "-by(x)"),
        ("world/tools.py", "def scale(x: float)", "@print\n        def scale(x: float)"),
        ("world/tools.py", "x: float", "x: float = 1"),
    ],
)
def test_what_does_something_else_counts(world, file, before, after):
    assert changed(world, file, before, after)


def test_two_names_that_change_places_count(world):
    files = {"world/steps.py": "from world.tools import a as x, b as y\ndef step():\n    return x() - y()\n"}
    tools = "def a():\n    return 1\ndef b():\n    return 2\n"
    first = world({**CODE, **files, "world/tools.py": tools})
    files["world/steps.py"] = files["world/steps.py"].replace("a as x, b as y", "b as x, a as y")
    assert code_digest(world({**CODE, **files, "world/tools.py": tools})) != code_digest(first)


def test_code_that_was_moved_is_the_same(world):
    first = world()
    moved = {**CODE, "world/numbers.py": CODE["world/tools.py"], "world/tools.py": "SHIFT = 3\n"}
    moved["world/steps.py"] = CODE["world/steps.py"].replace("world.tools import", "world.numbers import")
    moved["world/steps.py"] = moved["world/steps.py"].replace("import math as m\n", "")
    moved["world/steps.py"] = moved["world/steps.py"].replace("return by", "import math as m\n            return by")
    second = world(moved)
    assert code_digest(second) == code_digest(first)
    assert set(second) != set(first)
    assert changed_code(first, second) == []


def test_a_text_that_names_a_place_by_its_new_name_is_the_same_and_another_text_is_not(world):
    def places(text):
        return code_digest(world({**CODE, "world/tools.py": CODE["world/tools.py"].replace("SHIFT = 3", text)}))

    for names in syntax.MOVED.items():
        one, other = (f"SHIFT = {name}" if name.startswith("'") else f"SHIFT = {name!r}" for name in names)
        assert places(one) == places(other) != places("SHIFT = 'components.elsewhere'")


def test_imports_for_type_checkers_alone_are_not_followed(world):
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from world.tools import Box\n"
    steps = guarded + 'def step(x: "Box"):\n    return x\n'
    assert set(world({**CODE, "world/steps.py": steps})) == {"world.steps:step"}


def test_a_class_counts_with_all_its_methods_and_what_they_use(world):
    steps = "from world.tools import scale\nclass A:\n    def f(self):\n        return scale(1)\n"
    steps += "def step():\n    return A()\n"
    assert set(world({**CODE, "world/steps.py": steps})) == {"world.steps:step", "world.steps:A", "world.tools:scale"}


def test_code_that_uses_itself_is_followed_once(world):
    steps = "def step(n):\n    return other(n)\ndef other(n):\n    return n and step(n - 1)\n"
    assert set(world({**CODE, "world/steps.py": steps})) == {"world.steps:step", "world.steps:other"}


def test_a_name_that_is_not_there_is_an_error(world):
    with pytest.raises(LookupError, match=r"'world\.tools' has no 'gone'"):
        world({**CODE, "world/steps.py": "from world.tools import gone\ndef step():\n    return gone()\n"})


def test_a_change_is_said_with_its_file_and_its_definitions(world):
    first = world()
    second = world({**CODE, "world/tools.py": CODE["world/tools.py"].replace("2 * x", "3 * x").replace("= 3", "= 4")})
    assert changed_code(first, second) == ["world/steps.py (step)", "world/tools.py (SHIFT, scale)"]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("digits", ["digits"]),
        (None, []),
        (["digits", {"coverage": {"least": 0.5}}], ["digits", "coverage"]),
        ({"blank": {"mode": "enforce"}, "frozen": {"mode": "off"}, "motion": {"mode": False}}, ["blank"]),
        ({"clip": "model/clip"}, ["clip"]),
    ],
)
def test_a_profile_names_plug_ins_as_text_list_or_table(value, names):
    assert named_in({"section": {"key": value}}, "section.key") == names
    assert named_in({}, "section.key") == []


# --- of this project --------------------------------------------------------------------------------------------------


def keys(profile):
    return {stage.name: code_digest(stage_code(stage, profile)) for stage in STAGES}


def with_comments_and_no_docstrings(text):
    """The same module by `ast`: without comments and docstrings, formatted otherwise, and with other comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Expr(ast.Constant("Another docstring."))
    return "# a comment\n" + ast.unparse(tree) + "\n# the end\n"


@pytest.mark.slow
def test_comments_docstrings_and_formatting_of_all_modules_change_no_key(request):
    profiles = [load_profile(name) for name in ("tiny", "wan-1.3b")]
    before = [keys(profile) for profile in profiles]
    for path in request.getfixturevalue("project").rglob("*.py"):
        path.write_text(with_comments_and_no_docstrings(path.read_text()))
    assert [keys(profile) for profile in profiles] == before


@pytest.fixture(scope="module")
def checked():
    """The profile `tiny` with one check enforced, and the keys of this checkout with it."""
    profile = load_profile("tiny")
    profile["synthesize_videos"]["checks"]["blank"]["mode"] = "enforce"
    return profile, keys(profile)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "before", "after", "steps"),
    [
        ("components/checks/new.py", None, "def check(frames, rows, settings):\n    return []\n", set()),
        ("components/captions/captioners/templates/new.yaml", None, "system: hello\n", set()),
        ("components/checks/flicker.py", "cells[1:-1]", "cells[:-2]", set()),  # `off` in the profile
        ("components/checks/blank.py", "grey", "gray", {"synthesize-videos"}),
        ("model/univigu/hardware.py", "H100", "H1000", set()),
        ("components/evaluation/report.html.j2", "<body>", "<body class='wide'>", {"evaluate-model"}),
        ("components/prompts/wordlists.yaml", "\n", "\n# a comment\n", set()),
    ],
)
def test_only_what_the_profile_uses_decides_a_key(checked, project, file, before, after, steps):
    profile, known = checked
    path = project / file
    if before is None:
        path.write_text(after)
    else:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    assert {name for name, key in keys(profile).items() if key != known[name]} == steps


def test_a_check_counts_once_a_profile_names_it():
    profile, stage = load_profile("tiny"), find_stage("synthesize-videos")
    assert not any("flicker" in name for name in stage_code(stage, profile))
    profile["synthesize_videos"]["checks"]["flicker"]["mode"] = "score"
    assert any(name.startswith("components.checks.flicker:") for name in stage_code(stage, profile))


def test_a_template_counts_where_the_profile_or_the_code_names_it():
    profile, stage = load_profile("tiny"), find_stage("caption-videos")
    template = "components/captions/captioners/templates/video-caption-1.yaml"
    assert template not in stage_code(stage, profile)
    profile["caption_videos"]["captioner"] = "openai"
    assert template in stage_code(stage, profile)
    profile["caption_videos"]["options"] = {"template": "text-caption-1"}
    assert "components/captions/captioners/templates/text-caption-1.yaml" in stage_code(stage, profile)


def test_all_of_the_library_counts_where_it_is_carried_along():
    assert "univigu.flow:euler_step" in stage_code(find_stage("register-model"), load_profile("tiny"))


@pytest.mark.parametrize("name", profile_names())
def test_data_files_that_steps_read_count(name):
    profile = load_profile(name)
    assert "components/prompts/wordlists.yaml" in stage_code(find_stage("curate-prompts"), profile)
    assert "components/registry/model_card.md.j2" in stage_code(find_stage("register-model"), profile)
    recogniser = {"components/digits/recogniser/config.json", "components/digits/recogniser/model.safetensors"}
    if profile["evaluate_model"]["benchmark"] == "digits":
        assert recogniser <= set(stage_code(find_stage("evaluate-model"), profile))


def test_what_python_caches_is_no_data_even_where_code_names_its_folder():
    py_compile.compile(version_files.__file__, doraise=True)  # which names the folder; Python may be told to write none
    profile = load_profile("smoke")
    assert not [name for stage in STAGES for name in stage_code(stage, profile) if "__pycache__" in name]


def test_code_that_is_imported_by_a_name_from_the_profile_is_declared():
    """`import_module` hides what it imports; whoever uses it is, or names, one of the step's declared packages.

    `import_extra` imports other projects' packages alone, and `univigu`'s own `__getattr__` what its table names.
    """
    assert not set(extras._EXTRAS) & set(fingerprints.PACKAGES)
    by_other_means = {("univigu", "__getattr__"), ("univigu.extras", "import_extra")}
    for stage in STAGES:
        declared = {where.partition(":")[0] for where in stage.plugins}
        for name in stage_code(stage, load_profile("tiny")):
            if ":" not in name:
                continue
            one = fingerprints.Definition(*name.split(":"))
            uses = fingerprints._uses(one, fingerprints.PACKAGES)
            if "import_module" in uses and one not in by_other_means:
                named = {target.module for target in uses.values() if isinstance(target, fingerprints.Definition)}
                assert declared & {one.module, *named}, name
