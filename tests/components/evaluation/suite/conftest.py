"""The bundled model, and clips and captions of its world as people keep them."""

import json
from pathlib import Path

import pytest

from components.digits import benchmark, evaluation
from univigu import UniViGUPipeline
from univigu.video import encode_mp4

REPO = Path(__file__).parents[4]
HELDOUT = REPO / "data/heldout.json"


@pytest.fixture(scope="session")
def bundled():
    pipeline = UniViGUPipeline.from_pretrained(REPO / "model/tiny-univigu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def items():
    """Held-out items of the built-in dataset: a clip and true captions of each."""
    return benchmark.load_heldout(HELDOUT)["captions"][:3]


@pytest.fixture
def folder(tmp_path, items):
    """A folder of three clips and a table with two references of each."""
    home = tmp_path / "clips"
    home.mkdir()
    rows = []
    for number, item in enumerate(items):
        (home / f"clip-{number}.mp4").write_bytes(encode_mp4(benchmark.render([item])[0], 8))
        rows += [{"file_name": f"clip-{number}.mp4", "caption": text} for text in evaluation.references(item)[:2]]
    write_rows(home / "metadata.jsonl", rows)
    return home


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
