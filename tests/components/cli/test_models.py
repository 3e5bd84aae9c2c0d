"""`univigu model` and `univigu data` as people and scripts meet them: what they print, and how they end."""

import json
import logging
import sys

import pytest

from components.cli.main import main
from components.registry import promotion


@pytest.fixture
def univigu(versions, monkeypatch, capsys):
    """Run a command in the work root of `versions`; returns its exit code, standard output and standard error."""
    monkeypatch.setenv("UNIVIGU_ACTOR", "ann")
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments, root=versions.root):
        monkeypatch.setattr(sys, "argv", ["univigu", *map(str, arguments), "--root", str(root)])
        with pytest.raises(SystemExit) as ended:
            main()
        logging.disable(logging.NOTSET)
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.mark.slow
def test_what_can_be_no_name_and_an_empty_address_are_told_in_a_sentence(versions, univigu, tmp_path, monkeypatch):
    versions.add("any", 10)
    code, _, err = univigu("model", "list", "--name", "it's")
    assert (code, err.count("\n")) == (78, 1)
    assert "has a quotation mark" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    code, _, err = univigu("model", "list", root=tmp_path)
    assert code == 66
    assert "which has no mlflow.db" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_champion_is_made_refused_forced_and_taken_back(versions, univigu):
    for right in (10, 30, 28):
        versions.add("by-hand", right)
    name = ("--name", "by-hand")
    code, out, _ = univigu("model", "promote", "1", "--why", "to begin", *name)
    assert (code, out) == (0, "Version 1 of 'by-hand' is now champion: the first one (captions.mean 0.188).\n")
    code, out, _ = univigu("model", "compare", "2", *name)
    assert (code, "Version 2 is better: captions.mean 0.562 against version 1's 0.188" in out) == (0, True)
    assert univigu("model", "promote", "2", "--why", "sees more", *name)[0] == 0
    code, out, err = univigu("model", "promote", "3", "--why", "hope", *name)
    assert (code, out) == (80, "")
    assert err.startswith("univigu: Version 3 of 'by-hand' was not promoted (captions.mean 0.525 against version 2's")
    code, out, _ = univigu("model", "promote", "3", "--why", "half the size", "--force", *name)
    assert (code, "is now champion, instead of version 2, by force" in out) == (0, True)
    code, out, _ = univigu("model", "rollback", "--why", "too [bold]terse\x1b[31m", *name)
    assert (code, "Version 2 of 'by-hand' is now champion, instead of version 3" in out) == (0, True)
    assert "Version 2 of 'by-hand' is still champion" in univigu("model", "promote", "2", "--why", "sure?", *name)[1]

    code, out, _ = univigu("model", "history", *name)
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 7)
    assert [line.split()[2] for line in lines[1:]] == ["ann,"] * 6
    assert "too [bold]terse [31m" in out
    assert "\x1b" not in out
    story = json.loads(univigu("model", "history", "--json", *name)[1])
    outcomes = ["unchanged", "rolled back", "promoted", "refused", "promoted", "promoted"]
    assert [line["outcome"] for line in story] == outcomes
    assert [(line["replaced"], line["version"]) for line in story][1:3] == [(3, 2), (2, 3)]

    rows = json.loads(univigu("model", "list", "--json", *name)[1])
    assert [(row["version"], row["aliases"]) for row in rows] == [(3, ["previous"]), (2, ["champion"]), (1, [])]
    code, out, _ = univigu("model", "list", *name)
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["version", "3", "2", "1"])


def test_history_says_where_an_alias_was_moved_by_other_means(versions, univigu):
    from univigu import registry

    for right in (10, 30):
        versions.add("moved", right)
    promotion.promote("moved", 1, "to begin", root=versions.root)
    assert "other means" not in univigu("model", "history", "--name", "moved")[1]
    registry.set_alias("moved", "champion", 2, f"sqlite:///{versions.root / 'mlflow.db'}")
    assert (
        "The champion is version 2, but this history ends with version 1"
        in univigu("model", "history", "--name", "moved")[1]
    )


def test_nothing_there_is_said_in_words(versions, univigu, tmp_path):
    versions.add("there", 10)
    assert univigu("model", "list", "--name", "nobody")[:2] == (
        0,
        "No version of 'nobody' is registered; `univigu run register-model` registers one.\n",
    )
    assert univigu("model", "history", "--name", "there")[1] == "There is no decision about 'there' yet.\n"
    for command in (("model", "list"), ("model", "history"), ("model", "trace"), ("model", "rollback", "--why", "x")):
        code, out, err = univigu(*command, root=tmp_path)
        assert (code, out) == (66, "")
        assert "no mlflow.db" in err
    code, _, err = univigu("model", "trace", "--name", "there", "1")
    assert (code, "has no 'lineage' among its files at" in err) == (66, True)
    for command in (("data", "snapshot"), ("data", "list")):
        code, out, err = univigu(*command, root=tmp_path)
        assert (code, out) == (65, "")
        assert "not in a git repository" in err
