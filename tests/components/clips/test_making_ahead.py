"""Videos are read ahead of their batch, and each batch gets what belongs to it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import pytest

from components.clips.import_clips import Made
from components.clips.making_ahead import MadeAhead

ROWS = [{"id": f"{number:02d}"} for number in range(10)]


def test_later_videos_are_begun_with_a_batch_and_each_is_made_once(tmp_path):
    begun, third = [], Event()

    def make(place, row):
        begun.append(row["id"])
        if len(begun) == 3:
            third.set()
        assert third.wait(20)  # the two of the first batch wait for one of the next
        place.write_text(row["id"])
        return Made([] if row["id"] == "05" else [row], [])

    batches = [ROWS[at : at + 2] for at in range(0, len(ROWS), 2)]
    with ThreadPoolExecutor(3) as pool, MadeAhead(pool, make, ROWS, tmp_path, 3) as made:
        for number, batch in enumerate(batches):
            folder = tmp_path / f"batch-{number}"
            folder.mkdir()
            found = made.take(batch, folder)
            assert [clip for one in found for clip in one.clips] == [row for row in batch if row["id"] != "05"]
            used = {f"{row['id']}.tar": row["id"] for row in batch if row["id"] != "05"}
            assert {file.name: file.read_text() for file in folder.iterdir()} == used
    assert sorted(begun) == [row["id"] for row in ROWS]
    assert not list(tmp_path.glob("*.tar"))


def test_no_video_is_begun_after_an_error(tmp_path):
    begun, left = [], Event()

    def make(place, row):
        begun.append(row["id"])
        if row["id"] == "00":
            raise OSError("full")
        assert left.wait(20)
        return Made([], [])

    def take():
        with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
            stack.callback(left.set)  # after the block below is left
            with MadeAhead(pool, make, ROWS, tmp_path, 8) as made:
                made.take(ROWS[:1], tmp_path)

    with pytest.raises(OSError, match="full"):
        take()
    assert set(begun) <= {"00", "01"}
