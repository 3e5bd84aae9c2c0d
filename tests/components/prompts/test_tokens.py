import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

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


def test_a_tokenizer_is_the_one_that_transformers_chooses(tiny_wan_folder):
    ours, chosen = load_tokenizer(tiny_wan_folder), AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer")
    assert type(ours) is type(chosen)
    assert ours.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    assert ours.special_tokens_map == chosen.special_tokens_map


def test_a_tokenizer_is_loaded_by_the_class_that_it_names(tiny_wan_folder, tmp_path):
    """BERT's tokenizers end no text with EOS, whatever their file says."""
    shutil.copytree(tiny_wan_folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "BertTokenizer"}))
    with pytest.raises(BadInputError, match="does not end a text with EOS"):
        load_tokenizer(tmp_path)


def test_counting_tokens_needs_no_torch(tiny_wan_folder):
    script = "import sys; from pathlib import Path; from components.prompts.tokens import load_tokenizer as load\n"
    script += "load(Path(sys.argv[1])); print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, str(tiny_wan_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False"]


def test_every_text_ends_with_eos(tiny_wan_folder):
    tokenizer = load_tokenizer(tiny_wan_folder)
    assert [ids[-1] for ids in token_ids(tokenizer, ["", "a red seven", "é"])] == [tokenizer.eos_token_id] * 3


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError(), "ValueError"), (OSError(" \n"), "OSError"), (KeyError("a"), "'a'"), (ValueError("a\nb"), "a")],
)
def test_an_exception_is_quoted_in_one_line(error, line):
    assert first_line(error) == line
