"""Folders in the layouts of VBench, DREAM-1K and VDC: all of it or nothing, and what their own scripts read."""

import json
from pathlib import Path

import numpy as np
import pytest

from components.evaluation.suite.benchmarks import VDC_KINDS
from components.evaluation.suite.data import open_dataset
from components.evaluation.suite.run import choose_tasks
from univigu.errors import BadInputError
from univigu.video import encode_mp4

CLIP = encode_mp4(np.zeros((9, 32, 32, 3), dtype=np.uint8), 8)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_vbench_asks_for_five_videos_of_a_prompt_and_25_where_it_measures_flicker(tmp_path):
    rows = [
        {"prompt_en": "a still pond", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
        {"prompt_en": "a red car", "dimension": ["object_class"]},
    ]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(rows))
    dataset = open_dataset(tmp_path)
    assert choose_tasks(dataset, []) == ["generate"]
    counts = {text: sum(one.text == text for one in dataset.prompts) for text in ("a still pond", "a red car")}
    assert counts == {"a still pond": 25, "a red car": 5}
    assert len({one.seed for one in dataset.prompts}) == 30
    last = dataset.prompts[-1]
    path = dataset.benchmark.save_video(tmp_path, last, np.zeros((9, 32, 32, 3), dtype=np.uint8), 8)
    assert path == tmp_path / "videos/a red car-4.mp4"
    assert path.is_file()
    (tmp_path / "VBench_full_info.json").write_text(
        json.dumps([*rows, {"prompt_en": "../../up", "dimension": ["color"]}])
    )
    with pytest.raises(BadInputError, match=r"1 faults \(entry 3 can't be the name of a file"):
        open_dataset(tmp_path)


def dream_row(number):
    said = {"type": "text", "text": "", "reference": f"A dog runs {number}.", "video": None}
    asked = {"type": "video", "video": {"video_file": "<placeholder>"}}
    messages = [{"role": "user", "content": [asked]}, {"role": "assistant", "content": [said]}]
    return {"messages": messages, "dataset": "DREAM/youtube", "task": "video/caption", "idx": number, "vid": number}


def test_dream_names_every_missing_video_and_takes_the_prediction_beside_its_reference(tmp_path):
    write_rows(tmp_path / "DREAM-1k.jsonl", map(dream_row, (1, 2)))
    with pytest.raises(BadInputError, match=r"2 faults \(1.mp4 is missing; 2.mp4 is missing\)"):
        open_dataset(tmp_path)
    (tmp_path / "videos").mkdir()
    for number in (1, 2):
        (tmp_path / f"videos/{number}.mp4").write_bytes(CLIP)
    dataset = open_dataset(tmp_path)
    assert [clip.references for clip in dataset.clips] == [("A dog runs 1.",), ("A dog runs 2.",)]
    path = dataset.benchmark.save_captions(tmp_path / "out", dataset.clips, ["a cat", None])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["messages"][-1]["content"][-1]["text"] for row in rows] == ["a cat", ""]
    assert [row["idx"] for row in rows] == [1, 2]
    assert path.suffix == ".jsonl"


def test_vdc_needs_its_videos_its_captions_and_its_questions(tmp_path):
    row = {"video_id": "a", "video_name": "a.mp4", **{f"{kind}_caption": f"the {kind}" for kind in VDC_KINDS}}
    write_rows(tmp_path / "VDC_1k.jsonl", [row, {**row, "video_id": "b", "video_name": "b.mp4"}])
    (tmp_path / "videos/videos").mkdir(parents=True)
    (tmp_path / "videos/videos/a.mp4").write_bytes(CLIP)
    for kind in VDC_KINDS[1:]:
        write_rows(tmp_path / f"VDCScore_qa/{kind}.jsonl", [])
    with pytest.raises(BadInputError, match=r"2 faults \(VDCScore_qa/background.jsonl is missing; b.mp4 is missing\)"):
        open_dataset(tmp_path)
    write_rows(tmp_path / "VDCScore_qa/background.jsonl", [])
    (tmp_path / "videos/videos/b.mp4").write_bytes(CLIP)
    dataset = open_dataset(tmp_path)
    assert dataset.clips[0].references == ("the detailed",)
    path = dataset.benchmark.save_captions(tmp_path / "out", dataset.clips, ["a cat", "a dog"])
    rows = json.loads(path.read_text())
    assert [(row["doc"]["video_id"], row["resps"][0][0]) for row in rows] == [("a", "a cat"), ("b", "a dog")]
    write_rows(tmp_path / "VDC_1k.jsonl", [row, {**row, "short_caption": ""}])
    with pytest.raises(BadInputError, match="line 2 has no short_caption"):
        open_dataset(tmp_path)
    assert isinstance(dataset.clips[0].read(), np.ndarray)
    assert Path(path).parent == tmp_path / "out"
