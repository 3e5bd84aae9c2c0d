"""`univigu evaluate` as people meet it: what it prints, writes and refuses."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from components.cli.evaluate import check_world, choose_count
from components.cli.main import main
from components.digits import benchmark, evaluation
from components.evaluation.suite.data import Clip, Dataset, open_dataset
from univigu import UniViGUPipeline
from univigu.errors import BadInputError
from univigu.video import encode_mp4

REPO = Path(__file__).parents[3]
MODEL = REPO / "model/tiny-univigu"
PAGE = (REPO / "docs/evaluate.md").read_text(encoding="utf-8")


@pytest.fixture
def univigu(monkeypatch, capsys):
    """Run the command with these arguments: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["univigu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands of the page name, as few clips and prompts as there may be."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "model"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "my-clips").mkdir()
    for item in benchmark.load_heldout(REPO / "data/heldout.json")["captions"][:2]:
        (tmp_path / f"my-clips/{item['id']}.mp4").write_bytes(encode_mp4(benchmark.render([item])[0], 8))
        (tmp_path / f"my-clips/{item['id']}.txt").write_text(evaluation.references(item)[0])
    (tmp_path / "vbench").mkdir()
    prompts = [{"prompt_en": "a red seven moves up", "dimension": ["color"]}]
    (tmp_path / "vbench/VBench_full_info.json").write_text(json.dumps(prompts))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", re.findall(r"^univigu (evaluate .*)$", PAGE, re.M))
def test_the_commands_of_the_page_print_a_table_and_write_the_same_figures(univigu, place, command):
    words = shlex.split(command)
    if "20" in words:  # the page's number would take too long here
        words[words.index("20")] = "2"
    code, out, err = univigu(*words)
    assert code == 0, err
    (path,) = place.glob("reports/*.json")
    report = json.loads(path.read_text())
    for task, scores in report["scores"].items():
        lines = {line.split()[1]: line.split() for line in out.splitlines() if line.startswith(f"{task}: ")}
        assert lines.keys() == scores.keys()
        assert all(int(line[-1]) == scores[name]["n"] for name, line in lines.items())
    assert not report["failed"]
    if "vbench" in words:
        assert "This is a part" not in err
        assert len(list((place / "reports/vbench/videos").glob("a red seven moves up-?.mp4"))) == 5
    else:
        assert "left out of caption: similarity (no --embedder was given" in out


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


def test_samples_of_two_evaluations_are_not_mixed(univigu, place):
    (place / "reports/evaluation/videos").mkdir(parents=True)
    code, out, err = univigu("evaluate", "--data", "vbench", "--model", MODEL)
    assert (code, out) == (65, "")
    assert "'reports/evaluation' exists" in err
    assert univigu("evaluate", "--data", "vbench", "--output", "figures.txt")[0] == 65


def test_a_part_of_a_benchmark_is_called_one(place, capsys):
    dataset = open_dataset(Path("vbench"))
    assert [choose_count(dataset, count) for count in (None, 5, 9)] == [5, 5, 9]
    assert not capsys.readouterr().err
    assert choose_count(dataset, 2) == 2
    assert "a part of VBench, 2 of 5 samples" in capsys.readouterr().err
    assert choose_count(open_dataset(Path("data/heldout.json")), None) == 100


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
