import json
import shutil

import pytest

from components.prompts.tokens import load_tokenizer, token_ids
from univigu.errors import BadInputError, first_line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"model": 5}'])
def test_a_damaged_tokenizer_is_reported_in_one_sentence(tiny_wan_folder, tmp_path, name, content):
    shutil.copytree(tiny_wan_folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_bytes(content)
    with pytest.raises(BadInputError, match=r"The tokenizer at .*tokenizer (can't be read|does not end a text)"):
        load_tokenizer(tmp_path)


def test_an_unknown_tokenizer_model_is_reported_in_one_sentence(tiny_wan_folder, tmp_path):
    shutil.copytree(tiny_wan_folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": "Unheard"}}))
    with pytest.raises(BadInputError, match="can't be read"):
        load_tokenizer(tmp_path)


def test_every_text_ends_with_eos(tiny_wan_folder):
    tokenizer = load_tokenizer(tiny_wan_folder)
    assert [ids[-1] for ids in token_ids(tokenizer, ["", "a red seven", "é"])] == [tokenizer.eos_token_id] * 3


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError(), "ValueError"), (OSError(" \n"), "OSError"), (KeyError("a"), "'a'"), (ValueError("a\nb"), "a")],
)
def test_an_exception_is_quoted_in_one_line(error, line):
    assert first_line(error) == line
