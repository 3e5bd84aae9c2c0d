"""What the README's examples make is what they ask for, as seen by the recogniser, which has no part in the model."""

import re
import shlex
from pathlib import Path

import nbclient
import nbformat
import pytest

from components.digits import benchmark
from univigu import UniViGUPipeline

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pipe():
    pipeline = UniViGUPipeline.from_pretrained(REPO / "model/tiny-univigu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_bundled_model_is_small():
    files = [path for path in (REPO / "model/tiny-univigu").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 12e6


@pytest.mark.slow
def test_the_notebook_runs_and_its_caption_is_right():
    notebook = nbformat.read(REPO / "docs/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": REPO / "docs"}}).execute()
    texts = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/gif" not in output.get("data", {"image/gif": ""})
    ]
    assert any(agrees("a green five on black moving right", benchmark.read_text(text)) for text in texts), texts


def commands(task):
    """(prompt, seed) of each `univigu TASK "PROMPT"` in the README."""
    found = []
    for line in re.findall(rf'^univigu {task} ".*$', README, re.M):
        words = shlex.split(line, comments=True)
        found.append((words[2], int(words[words.index("--seed") + 1]) if "--seed" in words else 0))
    assert found
    return found


def agrees(prompt, found):
    """Whether the attributes that a prompt states are among the found ones, and the prompt states some."""
    asked = benchmark.asked(prompt)
    return bool(asked) and asked.items() <= found.items()


@pytest.mark.parametrize(("prompt", "seed"), commands("generate"))
def test_the_clip_of_an_example_shows_its_prompt_and_its_caption_says_so(pipe, prompt, seed):
    frames = pipe.generate(prompt, seed=seed)
    assert agrees(prompt, benchmark.recognise(frames)[0])
    (caption,) = pipe.caption(frames)
    assert agrees(prompt, benchmark.read_text(caption)), caption


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "seed"), commands("joint"))
def test_a_joint_example_states_what_is_asked_in_nine_of_ten_seeds(pipe, prompt, seed):
    right = 0
    for number in range(seed, seed + 10):
        frames, (caption,) = pipe.joint(prompt, seed=number, output_type="uint8", return_dict=False)
        right += agrees(prompt, benchmark.recognise(frames)[0]) and agrees(prompt, benchmark.read_text(caption))
    assert right >= 9


def test_the_python_example_captions_what_it_generated(pipe):
    (example,) = re.findall(r'"([^"]*)", seed=(\d+)\)', README)
    frames = pipe.generate(example[0], seed=int(example[1]))
    assert agrees(example[0], benchmark.recognise(frames)[0])
    assert agrees(example[0], benchmark.read_text(pipe.caption(frames)[0]))
