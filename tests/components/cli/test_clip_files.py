"""The names of clips that are made from prompts."""

import pytest

from components.cli.clip_files import LONGEST, check_output, name_after, write_clip
from univigu.errors import BadInputError


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red seven, moving up!", "a-red-seven-moving-up"),
        ("../../etc/passwd", "etc-passwd"),
        ("-o --force", "o-force"),
        (".hidden\n\x1b[31m", "hidden-31m"),
        ("红色的七", "红色的七"),
        ("!?", "clip"),
        ("", "clip"),
        ("one two " * 20, "one-two-one-two-one-two-one-two-one-two-one-two-one-two-one"),
        ("x" * 300, "x" * LONGEST),
        ("七" * 300, "clip"),
    ],
)
def test_a_name_is_made_of_the_words_of_a_prompt_and_names_a_file_in_this_folder(prompt, name):
    assert name_after(prompt) == name
    assert len(name_after(prompt)) <= LONGEST


def test_a_folder_is_no_clip_and_a_read_only_one_is_refused_by_name(tmp_path):
    with pytest.raises(BadInputError, match=f"'{tmp_path}' is a folder; .* {tmp_path}/clip.mp4"):
        check_output(tmp_path)
    with pytest.raises(BadInputError, match=r"mp4, webm or gif, but .* use 'clip.mp4'"):
        check_output(tmp_path / "clip.mov")


def test_a_name_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    tmp_path.rmdir()  # while the model was sampling
    with pytest.raises(BadInputError, match=r"Can't write .*No such file"):
        write_clip(None, "a red seven", frames, 8, None)
