"""Nothing that was withdrawn comes back through a step."""

import json

import pytest

from components.pipeline.tables import read_table
from components.pipeline.withdrawn import FILE, Withdrawn, add_entry, read_withdrawn
from engine import PROFILE, run
from univigu.errors import BadInputError, CorruptDataError

EMPTY = {"prompts": [], "clips": [], "videos": [], "sources": [], "outputs": []}


def test_withdrawn_rows_are_quarantined_without_their_content_and_fail_no_gate(root):
    run(root)
    add_entry(root, EMPTY | {"clips": [f"{number:03d}" for number in range(3, 12)]})
    manifest = run(root)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["reasons"]) == (12, 3, {"withdrawn": 9})
    rejected = read_table(root / "data/first", "rejected").to_pylist()
    assert [(row["id"], row["row"]) for row in rejected] == [(f"{number:03d}", "null") for number in range(3, 12)]


def test_an_output_that_held_withdrawn_data_is_no_input_until_its_step_ran_again(root):
    digest = run(root)["digest"]
    add_entry(root, EMPTY | {"clips": ["003"], "outputs": [digest]})
    with pytest.raises(BadInputError, match="holds or comes from withdrawn data; run 'first' again first"):
        run(root, "second")
    run(root)
    assert run(root, "second")["rows_out"] == 11


def test_without_a_withdrawal_the_key_of_a_step_is_what_it_was_and_with_one_too(root):
    before = run(root)
    add_entry(root, EMPTY | {"clips": ["none of these"]})
    after = run(root, profile=PROFILE)
    assert [after[name] for name in ("digest", "parameters", "code")] == [
        before[name] for name in ("digest", "parameters", "code")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "p"},
        {"id": "c"},
        {"id": "2-c", "clip_id": "c"},
        {"id": "x", "prompt_id": "p"},
        {"id": "x", "source_sha256": "v"},
        {"id": "x", "generator_digest": "v"},
        {"id": "x", "source": "s"},
    ],
)
def test_every_kind_of_row_is_covered(row):
    withdrawn = Withdrawn(*map(frozenset, ({"p"}, {"c"}, {"v"}, {"s"})))
    assert withdrawn.covers(row)
    assert not withdrawn.covers(dict.fromkeys(row, "other"))
    assert not Withdrawn().covers({"id": None})


def test_withdrawals_add_up_and_a_damaged_file_is_no_reason_to_forget_them(tmp_path):
    assert not read_withdrawn(tmp_path)
    assert [add_entry(tmp_path, EMPTY | {"clips": [clip]}) for clip in ("a", "b")] == [1, 2]
    assert read_withdrawn(tmp_path).clips == {"a", "b"}
    for content in (
        "{",
        "[]",
        '{"version": 2, "entries": []}',
        json.dumps({"version": 1, "entries": [{"clips": "a"}]}),
    ):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(CorruptDataError, match="says what was withdrawn and can't be read"):
            read_withdrawn(tmp_path)
