"""`univigu data import` reports the actual cause and no other."""

import pytest

from components.cli.data import _about_stages
from components.clips.import_report import used_of


@pytest.mark.parametrize(
    ("captions", "stages", "said"),
    [
        ({"usable": 3}, (1, 2), []),
        ({"usable": 1}, (1, 0), ["All clips with a usable caption (1) were assigned to stage 1 by chance"]),
        ({"usable": 2}, (0, 2), ["All clips were assigned to stage 2 by chance"]),
        ({"none": 2}, (2, 0), ["No clip has a caption: import them with `--texts prompts`"]),
        ({"is_prompt": 2}, (2, 0), ["Captions that stage 2", "Every caption says no more than its prompt: import"]),
        ({"too_short": 2}, (2, 0), ["Captions that stage 2", "Every caption is shorter than 'text.caption_tokens'"]),
        ({"too_long": 1}, (1, 0), ["Captions that stage 2", "Every caption is longer than 'text.caption_tokens'"]),
        ({"none": 1, "too_long": 1}, (2, 0), ["Captions that stage 2", "Stage 2 can learn from no caption"]),
        ({"too_short": 2, "usable": 1}, (3, 0), ["Captions that stage 2", "All clips with a usable caption (1) were"]),
    ],
)
def test_a_stage_without_clips_is_told_with_its_cause(captions, stages, said):
    facts = {"captions": captions, "stages": {"1": stages[0], "2": stages[1]}}
    lines = list(_about_stages(facts))
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said


def test_rows_of_a_table_that_are_about_no_video_explain_no_unused_video():
    reasons = {"no_file": 2, "duplicate_row": 1, "broken_row": 1, "no_text": 3, "damaged": 1}
    assert used_of(16, 20, reasons) == "Used 16 of 20 videos, because: damaged 1, no_text 3"
    assert used_of(20, 20, {"no_file": 2}) == "Used 20 of 20 videos"
