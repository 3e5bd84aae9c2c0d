"""Which pairs are held out: whole videos, whatever the order of the rows."""

from components.validation.validate_data import assign_splits


def test_a_clip_keeps_its_split_in_any_order_of_the_rows():
    rows = [{"clip_id": f"c{i}", "stage": 1 + i % 2} for i in range(60)]
    assign_splits(rows, 0.1)
    before = {row["clip_id"]: row["split"] for row in rows}
    assign_splits(rows[::-1], 0.1)
    assert {row["clip_id"]: row["split"] for row in rows} == before
    more = [*rows, *({"clip_id": f"d{i}", "stage": 1} for i in range(20))]
    assign_splits(more, 0.1)
    assert sum(before[row["clip_id"]] != row["split"] for row in rows) <= 2


def test_all_clips_of_a_video_are_trained_on_or_held_out_unless_it_is_the_only_one():
    rows = [{"clip_id": f"c{i}", "video": f"v{i // 5}", "stage": 2} for i in range(60)]
    assign_splits(rows, 0.1)
    heldout = {row["video"] for row in rows if row["split"] == "heldout"}
    assert len(heldout) == 2  # 10 of 60 clips: at least a tenth
    assert {row["split"] for row in rows if row["video"] in heldout} == {"heldout"}
    alone = rows[:5]
    assign_splits(alone, 0.1)
    assert sorted(row["split"] for row in alone) == ["heldout", *["train"] * 4]
