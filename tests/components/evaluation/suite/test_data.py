"""What can be evaluated on, and what is refused: nothing is left out silently."""

import json
from pathlib import Path

import pytest

from components.evaluation.suite.data import open_dataset
from univigu.errors import BadInputError, MissingInputError

REPO = Path(__file__).parents[4]


def test_rows_about_the_same_clip_are_its_references(folder):
    for path in (folder, folder / "metadata.jsonl"):
        dataset = open_dataset(path)
        assert [clip.id for clip in dataset.clips] == ["clip-0.mp4", "clip-1.mp4", "clip-2.mp4"]
        assert [len(clip.references) for clip in dataset.clips] == [2, 2, 2]
        assert dataset.clips[0].read().shape == (9, 32, 32, 3)
        assert [prompt.text for prompt in dataset.prompts] == [clip.references[0] for clip in dataset.clips]


def test_a_text_beside_a_video_is_its_reference(folder):
    (folder / "metadata.jsonl").unlink()
    for number in range(3):
        (folder / f"clip-{number}.txt").write_text(f"a red {number}")
    assert [clip.references for clip in open_dataset(folder).clips] == [("a red 0",), ("a red 1",), ("a red 2",)]


def test_a_held_out_set_has_the_truth_and_captions_that_state_it():
    dataset = open_dataset(REPO / "data/heldout.json")
    clip = dataset.clips[0]
    assert all(dataset.world.read_text(text) == clip.truth for text in clip.references)
    assert len(clip.truth) == 7
    assert dataset.prompts
    assert dataset.joint


def test_prompts_alone_are_for_generation(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red seven"}\n{"prompt": "a blue one"}\n')
    dataset = open_dataset(tmp_path / "prompts.jsonl")
    assert (len(dataset.clips), [one.text for one in dataset.prompts]) == (0, ["a red seven", "a blue one"])


def test_a_folder_without_references_and_a_table_with_holes_are_refused(folder):
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([*rows[:4], '{"file_name": "clip-2.mp4", "caption": ""}']))
    with pytest.raises(BadInputError, match=r"2 faults \(metadata.jsonl:5: its text is empty; 'clip-2.mp4' has no"):
        open_dataset(folder)
    (folder / "metadata.jsonl").write_text("\n".join(rows[:4]))
    with pytest.raises(BadInputError, match=r"1 faults \('clip-2.mp4' has no reference\)"):
        open_dataset(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(MissingInputError, match=r"No video in .* has a reference: put NAME.txt"):
        open_dataset(folder)


def test_files_outside_the_folder_and_files_that_are_missing_are_refused(folder):
    names = ["../secret.mp4", "clip-9.mp4"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file": name, "caption": "a"}) + "\n" for name in names))
    with pytest.raises(BadInputError, match=r"not a name inside the folder.*there is no video 'clip-9.mp4'"):
        open_dataset(folder / "metadata.jsonl")


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", '{"world": "mars"}'), ("a.json", "{"), ("a.txt", "a red one")]
)
def test_another_file_is_no_data(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match="give "):
        open_dataset(tmp_path / name)
    with pytest.raises(MissingInputError, match="no folder or file"):
        open_dataset(tmp_path / "nothing")
