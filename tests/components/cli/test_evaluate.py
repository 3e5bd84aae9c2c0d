"""`univigu evaluate` as people meet it: what it prints, writes and refuses."""

import json
import sys
from pathlib import Path

import pytest

from components.cli.evaluate import check_world
from components.cli.main import main
from components.evaluation.suite.data import Clip, Dataset, open_dataset
from univigu import UniViGUPipeline
from univigu.errors import BadInputError

REPO = Path(__file__).parents[3]
MODEL = REPO / "model/tiny-univigu"


@pytest.fixture
def univigu(monkeypatch, capsys):
    """Run the command with these arguments: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["univigu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_it_prints_a_table_and_writes_the_same_figures(univigu, tmp_path):
    path = tmp_path / "new/evaluation.json"
    options = ("--model", MODEL, "--task", "caption", "--count", 2, "-o", path)
    code, out, _ = univigu("evaluate", "--data", REPO / "data/heldout.json", *options)
    assert code == 0
    report = json.loads(path.read_text())
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("caption: ")}
    assert lines.keys() == report["scores"]["caption"].keys()
    assert lines["facts"].split()[-1] == "2"
    assert "left out of caption: similarity (no --embedder was given" in out
    assert report["data"] == "digits"


def test_bad_data_is_one_sentence_and_no_file(univigu, tmp_path):
    output = tmp_path / "evaluation.json"
    (tmp_path / "empty").mkdir()
    for data, said, status in (
        (tmp_path / "nothing", "There is no folder or file", 66),
        (tmp_path / "empty", "There is no video in", 66),
    ):
        code, out, err = univigu("evaluate", "--data", data, "--model", MODEL, "-o", output)
        assert (code, out, err.count("\n")) == (status, "", 1)
        assert said in err
    assert not output.exists()


def test_a_model_of_another_world_is_refused():
    pipeline = UniViGUPipeline.from_pretrained(MODEL)
    heldout = open_dataset(REPO / "data/heldout.json").first(20)
    check_world(pipeline, MODEL, heldout)
    cats = (Clip("0", ("A tabby cat yawns beside an antique lamp.",), None),)
    with pytest.raises(BadInputError, match=r"doesn't know \d of the 8 words of 'cats'"):
        check_world(pipeline, MODEL, Dataset("cats", "", cats))
    pipeline.register_to_config(num_frames=81)
    with pytest.raises(BadInputError, match=r"have 9 frames of 32x32 and those of the model .* 81 frames of 32x32"):
        check_world(pipeline, MODEL, heldout)
