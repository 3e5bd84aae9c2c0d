"""An output takes its place whole, made of the inputs that were verified, while nobody reads what it replaces."""

import json
import os
import subprocess
import sys

import pytest

from components.pipeline import commit, freshness, runner
from components.pipeline.manifests import MANIFEST, read_manifest, verify
from components.pipeline.stages import find_stage
from engine import PROFILE, run, snapshot
from univigu import files
from univigu.errors import BadInputError, BusyError, CorruptDataError, DiskFullError

OTHER = {**PROFILE, "double": {"factor": 3, "max_rejected_share": 0.5}}


def during(monkeypatch, act):
    """Have `act` happen after a step's inputs were verified and before its function runs."""
    real = runner.load_function

    def load(stage):
        act()
        return real(stage)

    monkeypatch.setattr(runner, "load_function", load)


def test_nobody_replaces_an_input_while_a_step_reads_it(root, monkeypatch):
    before = run(root)

    def replace_input():
        monkeypatch.undo()
        code = f"""
import sys; sys.path[:0] = {[str(root), *sys.path]!r}
import engine
from components.pipeline import runner, stages
stages.STAGES = (engine.FIRST, engine.SECOND)
from pathlib import Path
runner.run_stage("first", {OTHER!r}, Path({str(root)!r}))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "BusyError: Another step is reading the output of 'first'" in done.stderr

    monkeypatch.syspath_prepend(str(root))
    during(monkeypatch, replace_input)
    stage = find_stage("second")
    manifest = runner.run_adhoc_stage(stage, PROFILE, root, {})
    assert manifest["inputs"] == {"first": before["digest"]}
    assert read_manifest(root / "data/first", "first") == before


@pytest.mark.parametrize("name", ["captions.parquet", "shards/00000/data.bin", MANIFEST])
def test_an_input_that_was_written_to_meanwhile_is_not_committed_from(root, monkeypatch, name):
    run(root)
    during(monkeypatch, lambda: (root / "data/first" / name).write_bytes(b"another"))
    monkeypatch.setattr(runner, "load_function", lambda _: make_nothing(root, name))
    with pytest.raises(BadInputError, match=r"data/first changed while 'second' was reading it"):
        run(root, "second")
    assert not (root / "data/second").exists()


def make_nothing(root, name):
    def step(step):
        (root / "data/first" / name).write_bytes(b"another")

    return step


def test_a_source_that_was_changed_meanwhile_is_not_committed_from(root, monkeypatch):
    during(monkeypatch, lambda: (root / "numbers.json").write_text("[1]"))
    with pytest.raises(BadInputError, match=r"numbers.json changed while 'first' was reading it"):
        run(root)
    assert not (root / "data/first").exists()


def test_an_input_that_was_only_touched_or_put_back_is_the_same(root, monkeypatch):
    run(root)

    def rewrite():
        path = root / "data/first/captions.parquet"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)

    during(monkeypatch, rewrite)
    assert run(root, "second")["rows_out"] == 12


def test_everything_reaches_the_disk_before_the_manifest_that_names_it(root, monkeypatch):
    reached, named = set(), {}
    real_sync, real_write = files.sync, commit.write_manifest

    def sync(path):
        reached.add(os.stat(path).st_ino)
        real_sync(path)

    def write_manifest(folder, manifest):
        named.update({name: os.stat(folder / name).st_ino for name in manifest["files"]})
        named["."] = os.stat(folder).st_ino
        assert set(named.values()) <= reached
        return real_write(folder, manifest)

    for module in (files, commit):
        monkeypatch.setattr(module, "sync", sync)
    monkeypatch.setattr(commit, "write_manifest", write_manifest)
    run(root)
    assert len(named) > 4


@pytest.mark.parametrize("change", [{"rows_out": 11}, {"quarantined": 1}, {"facts": {"a": 1}}, {"step": "second"}])
def test_a_manifest_covers_itself(root, change):
    run(root)
    path = root / "data/first" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptDataError, match=r"manifest of .* is damaged; run `univigu run first`"):
        run(root, "second")
    assert freshness.finished("first", PROFILE, root) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"files": {"x": {}}}',
        '{"files": {"x": "y"}}',
        "[" * 100_000,
        '{"files": {}}',
        '{"files": ["a"]}',
        "\0" * 300,
        "",
    ],
)
def test_a_manifest_that_makes_no_sense_is_damaged(root, text):
    run(root)
    (root / "data/first" / MANIFEST).write_text(text)
    with pytest.raises(CorruptDataError, match="is damaged"):
        verify(root / "data/first", "first")


def test_rows_of_a_shard_that_were_changed_in_its_record_are_made_again(root):
    run(root)
    before = snapshot(root / "data/first")
    path = root / ".univigu/shards/first/00001.json"
    assert '"text": "8"' in path.read_text()
    path.write_text(path.read_text().replace('"text": "8"', '"text": "9"'))
    run(root)
    assert snapshot(root / "data/first") == before


@pytest.mark.parametrize(("number", "kind"), [(28, DiskFullError), (5, CorruptDataError), (30, BadInputError)])
def test_a_failing_disk_is_one_sentence_and_leaves_the_output_as_it_was(root, monkeypatch, number, kind):
    run(root)
    monkeypatch.setenv("FAIL", str(number))
    with pytest.raises(kind, match=str(root)):
        run(root, "second")
    assert not (root / "data/second").exists()


def test_a_step_under_way_is_told_of_before_another_begins_to_replace_what_it_reads(root):
    run(root)
    with commit.reading("first", root), pytest.raises(BusyError, match="Another step is reading the output of 'first'"):
        run(root, profile=OTHER)
