"""Plans that were computed before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.pipeline.profiles import load_profile
from components.planning.answers import remembered

ROOT = Path(__file__).parents[3]


def kept(root):
    return sorted((root / ".univigu" / "plans").glob("*.json"))


def ask(root, profile=None, **question):
    base = {"base": str(ROOT / "model/tiny-wan")}
    asked = {"task": "caption", "gpu": "h100", "mfu": None, **question}
    return remembered("inference", (profile or load_profile("tiny")) | base, root, **asked)


@pytest.mark.slow
def test_the_same_question_is_answered_from_the_file_and_another_is_computed(tmp_path):
    first = ask(tmp_path)
    (file,) = kept(tmp_path)
    file.write_text(json.dumps({"marked": True}))
    assert ask(tmp_path) == {"marked": True}
    assert ask(tmp_path, gpu="a100") != first
    assert len(kept(tmp_path)) == 2
    profile = load_profile("tiny")
    ask(tmp_path, profile | {"text": {**profile["text"], "caption_tokens": [32, 48]}})
    assert len(kept(tmp_path)) == 3


@pytest.mark.slow
def test_a_half_written_answer_is_computed_again(tmp_path):
    first = ask(tmp_path)
    (file,) = kept(tmp_path)
    file.write_text('{"task": "cap')
    assert ask(tmp_path) == first
    assert json.loads(file.read_text()) == first


def test_an_answer_that_is_there_imports_neither_torch_nor_diffusers(tmp_path):
    ask(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests.components.planning.test_answers import ask\n"
        f"assert ask(Path({str(tmp_path)!r}))['task'] == 'caption'\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
