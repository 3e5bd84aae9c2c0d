import pytest

from components.bench import studio
from components.cli.studio import previews


@pytest.mark.slow
def test_the_studio_is_asked_for_clips_and_each_filter_finds_its_own(tmp_path):
    studio.write_root(tmp_path, 60)
    seconds, found = studio._ask(tmp_path)
    assert found == {"none": 60, "verdict": 24, "text": 11, "score": 24}
    assert 0 < seconds["first_clips"] < seconds["start"]


@pytest.mark.slow
def test_a_preview_is_a_part_of_its_step():
    found = previews.measure(steps=12, runs=1)
    assert found.keys() == {"video", "video_and_text"}
    assert all(0 < one["preview_ms"] < one["step_ms"] for one in found.values())
