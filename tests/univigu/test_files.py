"""Files are written atomically and read within limits."""

import json
import os

import pytest

from univigu import files


def test_a_file_that_fails_halfway_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "notes.json"
    files.write_json(path, {"a": 1})

    def fail():
        with files.replaced(path) as stream:
            stream.write(b"half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fail()
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["notes.json"]


def test_a_value_survives_writing_and_reading(tmp_path):
    value = {"text": "é – 映画", "list": [1, 2.5, None], "table": {"b": True}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json_object(tmp_path / "value.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}', b"\0" * 300])
def test_invalid_json_is_a_value_error(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 (the message is json's)
        files.read_json(tmp_path / "broken.json")


def test_a_json_file_without_an_object_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        files.read_json_object(tmp_path / "list.json")


def test_no_more_than_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 1000)
    (tmp_path / "fits.json").write_text(json.dumps("x" * 998))
    (tmp_path / "too_large.json").write_text(json.dumps("x" * 999))
    assert len(files.read_json(tmp_path / "fits.json")) == 998
    with pytest.raises(ValueError, match="larger than"):
        files.read_json(tmp_path / "too_large.json")


def test_a_link_takes_no_space_on_one_disk(tmp_path):
    (tmp_path / "a").write_text("x")
    files.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino


def bomb(levels):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (bomb(13), "aliases expand to more than"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 200_000, "more than 50 levels deep"),
        ("{a: " * 60 + "1" + "}" * 60, "more than 50 levels deep"),
        ("a: [1, 2", "while parsing"),
        ("a: \x00", "not allowed|unacceptable|control characters"),
        ("x: '" + "y" * 2**20 + "'", "larger than 1 MiB"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "more than one document"),
    ],
)
def test_yaml_limits_are_checked_before_values_are_built(tmp_path, text, why):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=why):
        files.read_yaml(tmp_path / "a.yaml")


def test_yaml_with_ordinary_anchors_is_read(tmp_path):
    text = "\ufeffbase: &base {a: 1, b: [2, 3]}\nmore:\n  <<: *base\n  c: é\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert files.read_yaml(tmp_path / "a.yaml") == {
        "base": {"a": 1, "b": [2, 3]},
        "more": {"a": 1, "b": [2, 3], "c": "é"},
    }
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        files.read_yaml(tmp_path / "latin.yaml")


def test_a_yaml_text_has_the_same_limits():
    assert files.parse_yaml("{rank: 4, targets: [to_q]}") == {"rank": 4, "targets": ["to_q"]}
    assert files.parse_yaml("") is None
    for text, reason in (
        ("a: [1", "flow sequence"),
        ("a\n---\nb", "more than one"),
        ("x" * 2**21, "larger than 1 MiB"),
    ):
        with pytest.raises(ValueError, match=reason):
            files.parse_yaml(text)
