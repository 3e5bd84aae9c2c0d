"""What transformers finds in its models' folders is kept on disk, and is never anything else than what is there."""

import json
from pathlib import Path

import pytest
from transformers.utils import import_utils

from components.pipeline.model_folders import remember

find_exports = import_utils.create_import_structure_from_path.__wrapped__


class Reader:
    """Reads folders as transformers does, and counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, path):
        self.asked.append(path)
        return find_exports(path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with models in the layout of transformers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = tmp_path / "package"
    for name, text in {
        "utils/import_utils.py": "",
        "models/one/__init__.py": "",
        "models/one/modeling_one.py": '__all__ = ["One", "Other"]\n',
        "models/one/tokenization_one_fast.py": '__all__ = ["Tokens"]\n',
        "models/group/two/configuration_two.py": '@requires(backends=("vision", "torch"))\nclass Two:\n    pass\n',
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    import_utils.create_import_structure_from_path.cache_clear()
    yield package
    import_utils.create_import_structure_from_path.cache_clear()


def found(package, version="1"):
    """What a new process finds in the models' folder, and whether it read the sources for that."""
    import_utils.create_import_structure_from_path.cache_clear()  # called for subfolders
    reader = Reader()
    exports = remember(reader, package, version)(str(package / "models"))
    assert exports == find_exports(package / "models")
    return exports, bool(reader.asked)


def kept_file(package):
    (kept,) = (package.parent / "cache/univigu").iterdir()
    return kept


def test_the_second_process_finds_the_same_without_reading_sources(package):
    first, was_read = found(package)
    assert was_read
    assert found(package) == (first, False)
    assert first["group"]["two"] == {frozenset({"torch", "vision"}): {"configuration_two": {"Two"}}}


def test_everything_that_transformers_has_survives_being_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = Path(import_utils.__file__).parents[1]
    for is_read in (True, False):
        reader = Reader()
        answer = remember(reader, package, "1")
        assert bool(reader.asked) == is_read
        models = answer(package / "models")
        assert models == find_exports(package / "models")
        assert list(models) == list(find_exports(package / "models"))  # in the same order
        assert answer(str(package / "models/umt5/__init__.py")) is models["umt5"]
        assert answer(package / "decision") == find_exports(package / "decision")  # which isn't kept


def change(package):
    file = package / "models/one/modeling_one.py"
    file.write_text('__all__ = ["One", "Newer"]\n')


def add(package):
    (package / "models/one/processing_one.py").write_text('__all__ = ["Processor"]\n')


def remove(package):
    (package / "models/one/modeling_one.py").unlink()


def read_otherwise(package):
    (package / "utils/import_utils.py").write_text("another way")


@pytest.mark.parametrize("edit", [change, add, remove, read_otherwise])
def test_changed_sources_are_read_again(package, edit):
    found(package)
    edit(package)
    assert found(package)[1]
    assert not found(package)[1]


def test_another_version_is_read_again(package):
    found(package)
    assert found(package, "2")[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: content.replace(b"One", b"Two"),
        lambda content: content.partition(b"\n")[2],
        lambda content: b"\xff" * len(content),
    ],
)
def test_a_damaged_file_costs_only_time_and_is_replaced(package, damage):
    found(package)
    kept = kept_file(package)
    content = kept.read_bytes()
    kept.write_bytes(damage(content))
    assert found(package)[1]
    assert kept.read_bytes() == content


@pytest.mark.parametrize("place", ["taken/by a file", "relative"])
def test_without_a_folder_to_keep_it_in_sources_are_read_each_time(package, monkeypatch, place):
    (package.parent / "taken").write_text("")
    monkeypatch.chdir(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(package.parent / place) if "/" in place else place)
    assert found(package)[1]
    assert found(package)[1]
    assert not (package / place).exists()


def test_a_structure_that_json_would_change_is_not_kept(package):
    read = {"one": {frozenset(): {"modeling_one": ["One"]}}}  # a list where there are sets
    answer = remember(lambda _: read, package, "1")
    assert answer(package / "models") is read
    assert not (package.parent / "cache").exists()


def test_what_is_kept_is_plain_json(package):
    found(package)
    assert json.loads(kept_file(package).read_bytes().partition(b"\n")[2])
