import json
import re
import shutil

import pandas as pd
import pytest

from components.digits import world
from components.pipeline.digests import tree_digest
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.prompts.filters import text_id
from components.prompts.tokens import count_tokens, load_tokenizer
from components.validation.gates import expectations, run_gate
from good_rows import COUNT, make_rows
from univigu.errors import ConfigError, GateFailedError


@pytest.fixture(scope="module")
def rows(tiny_wan_folder):
    """Rows of prompts, clips and captions that keep every contract: the odd clips are for stage 2."""
    return make_rows(load_tokenizer(tiny_wan_folder))


@pytest.fixture
def validate(tmp_path, tiny_wan_folder, profile, rows, recommit):
    """Run one gate on the good rows after `change(rows)`; returns the manifest and the output folder."""
    root = tmp_path / "root"
    before = {
        "validate-prompts": [("curate-prompts", "prompts")],
        "validate-clips": [("synthesize-videos", "clips")],
        "validate-pairs": [("validate-clips", "clips"), ("caption-videos", "captions")],
    }
    home = {"validate-prompts": "validated/prompts", "validate-clips": "validated/clips", "validate-pairs": "pairs"}

    def run(step, change=lambda tables: None):
        tables = {name: [dict(row) for row in table] for name, table in rows.items()}
        change(tables)
        if not (root / profile["base"]).exists():
            shutil.copytree(tiny_wan_folder / "tokenizer", root / profile["base"] / "tokenizer")
        for maker, table in before[step]:
            recommit(root, maker, {table: tables[table]})
        return run_stage(step, profile, root), root / "data" / home[step]

    return run


def one(table, number, **values):
    """A change: row `number` of `table` gets `values`."""
    return lambda tables: tables[table][number].update(values)


STEPS = {"validate-prompts": "prompts", "validate-clips": "clips", "validate-pairs": "pairs"}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_good_rows_pass_and_equal_inputs_give_equal_bytes(validate, step):
    manifest, home = validate(step)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (COUNT, COUNT, 0)
    report = json.loads((home / "validation.json").read_text())
    assert all(figures["success"] for figures in report[STEPS[step]])
    assert len(report[STEPS[step]]) >= 15
    before = tree_digest([home], home)
    shutil.rmtree(home)
    assert validate(step)[0] == manifest
    assert tree_digest([home], home) == before


def test_html_pages_are_kept_outside_the_output(validate):
    _, home = validate("validate-clips")
    assert {path.name for path in home.iterdir()} == {
        "clips.parquet", "validation.json", "rejected.parquet", "manifest.json"
    }  # fmt: skip
    docs = home.parents[2] / ".univigu" / "docs" / "validate-clips" / "clips"
    (page,) = (docs / "validations").rglob("*.html")
    assert "expect_compound_columns_to_be_unique" in page.read_text() or "must be unique" in page.read_text()
    assert (docs / "index.html").is_file()
    for html in docs.rglob("*.html"):
        text = html.read_text()
        assert re.findall(r"<script|<link|<img[^>]+http", text) == []
        assert "<style>" in text
    assert "uni-vigu-clips" in page.name  # the data source and the table
    root = docs.parents[1] / "index.html"
    assert re.findall(r'<a href="(.*?)">clips</a>', root.read_text()) == [page.relative_to(root.parent).as_posix()]
    assert "<td>validate-clips</td>" in root.read_text()
    assert f"<td>{len(json.loads((home / 'validation.json').read_text())['clips'])} of" in root.read_text()


BAD = {
    "validate-prompts": {
        0: (one("prompts", 0, n_tokens=5000), "token_count"),
        1: (one("prompts", 1, licence="CC-BY-NC-4.0"), "licence"),
        2: (one("prompts", 2, source=""), "no_source"),
        3: (one("prompts", 3, licence=None), "no_licence"),
        4: (one("prompts", 4, language="fr"), "language"),
        5: (one("prompts", 5, verdict="drop"), "verdict"),
        6: (one("prompts", 6, text="a red six"), "id_mismatch"),
        7: (one("prompts", 7, text="six " * 31, id=text_id("six " * 31), n_tokens=32), "token_range"),
        8: (one("prompts", 8, text="a\nsix", id=text_id("a\nsix")), "control_characters"),
    },
    "validate-clips": {
        0: (one("clips", 0, frames=5), "frames"),
        1: (one("clips", 1, width=64), "width"),
        2: (one("clips", 2, fps=24.0), "fps"),
        3: (one("clips", 3, stage=3), "stage"),
        4: (one("clips", 4, prompt_id=None), "no_prompt_id"),
        5: (one("clips", 5, sha256="x"), "sha256"),
        7: (one("clips", 7, sha256=f"{6:064x}"), "same_video"),
    },
    "validate-pairs": {
        1: (one("captions", 1, n_tokens=33), "token_count"),
        3: (one("captions", 3, text="a red six", n_tokens=4), "caption_range"),
        5: (one("captions", 5, clip_id="another"), "no_caption"),
        7: (one("captions", 7, status="skipped"), "no_caption"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text.replace(".", "\u202e", 1), "damaged_text"),
        (lambda text: f"I am sorry: {text}", "refusal"),
        (lambda text: f"Sure! Here is a caption: {text}", "wrapping"),
        (lambda text: text + " It moves, and" * 9, "repetition"),
    ],
)
def test_captions_of_any_source_are_checked_for_damage_and_refusals(
    validate, profile, rows, tiny_wan_folder, spoil, reason
):
    profile["text"]["caption_tokens"] = [32, 80]
    text = spoil(rows["captions"][1]["text"])
    count = count_tokens(load_tokenizer(tiny_wan_folder), [text])[0]
    manifest, _ = validate("validate-pairs", one("captions", 1, text=text, n_tokens=count))
    assert manifest["reasons"] == {reason: 1}


def test_pairs_are_refused_if_the_profile_allows_captions_as_short_as_a_prompt(validate, profile):
    profile["text"]["caption_tokens"] = [20, 40]
    with pytest.raises(ConfigError, match="a caption must be longer than any prompt"):
        validate("validate-pairs")


@pytest.mark.slow
@pytest.mark.parametrize("step", BAD)
def test_bad_rows_are_quarantined_by_reason_and_the_rest_passes(validate, profile, step):
    profile["validate_data"]["max_rejected_share"] = 0.5

    def change(tables):
        for spoil, _ in BAD[step].values():
            spoil(tables)

    _, home = validate(step, change)
    rejected = read_table(home, "rejected").to_pylist()
    assert sorted(row["reason"] for row in rejected) == sorted(reason for _, reason in BAD[step].values())
    assert all("expect_" in row["detail"] for row in rejected)
    kept = read_table(home, STEPS[step]).to_pylist()
    assert len(kept) == COUNT - len(BAD[step])
    assert {row["id"] for row in rejected}.isdisjoint(row["id"] for row in kept)


@pytest.mark.slow
def test_a_caption_that_omits_an_attribute_of_its_prompt_is_quarantined(validate, rows):
    number = next(
        i for i, clip in enumerate(rows["clips"]) if clip["stage"] == 2 and world.read_text(clip["prompt"])["colour"]
    )
    caption = rows["captions"][number]
    (colour,) = world.read_text(rows["clips"][number]["prompt"])["colour"]
    other = "pink" if colour != "pink" else "red"
    manifest, home = validate("validate-pairs", one("captions", number, text=caption["text"].replace(colour, other)))
    assert manifest["reasons"] == {"not_covered": 1}
    assert f"colour is {colour}" in read_table(home, "rejected").to_pylist()[0]["detail"]


def test_a_failed_caption_is_counted_and_not_quarantined_twice(validate):
    manifest, _ = validate("validate-pairs", one("captions", 1, text=None, n_tokens=0, status="blocked"))
    assert manifest["facts"]["without_caption"] == {"blocked": 1}
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (COUNT - 1, COUNT - 1, 0)


def test_pairs_have_separate_stages_and_both_splits(validate, rows):
    _, home = validate("validate-pairs")
    pairs = read_table(home, "pairs").to_pandas()
    assert set(pairs["clip_id"]) == {clip["id"] for clip in rows["clips"]}
    assert pairs["clip_id"].is_unique
    assert pairs[pairs["stage"] == 1]["caption"].isna().all()
    assert pairs[pairs["stage"] == 2]["caption"].notna().all()
    assert pairs.groupby(["stage", "split"]).size().to_dict() == {
        (1, "heldout"): 4, (1, "train"): 16, (2, "heldout"): 4, (2, "train"): 16
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        ("validate-prompts", lambda tables: tables["prompts"].clear(), "has 0 rows"),
        ("validate-prompts", lambda tables: tables["prompts"].__delitem__(slice(7, None)), "has 7 rows"),
        ("validate-prompts", lambda tables: tables["prompts"].append(tables["prompts"][0]), "unique"),
        ("validate-clips", one("clips", 1, id="c000"), "unique"),
        (
            "validate-clips",
            lambda tables: tables["clips"][1].update(tables["clips"][0], id="x", sha256="f" * 64),
            "seed",
        ),
        ("validate-clips", lambda tables: [row.update(stage=2) for row in tables["clips"]], "stage"),
        ("validate-clips", lambda tables: tables["clips"].clear(), "has 0 rows"),
        ("validate-pairs", lambda tables: tables["clips"].append({**tables["clips"][0], "stage": 2}), "unique"),
        ("validate-pairs", one("clips", 1, sha256=f"{0:064x}"), "sha256"),
        ("validate-pairs", one("captions", 1, status="finished"), "status"),
        ("validate-pairs", one("captions", 1, text=None), "has_text"),
        ("validate-pairs", one("captions", 1, clip_id="c000"), "clip_id"),
        ("validate-pairs", lambda tables: tables["captions"].clear(), "has 0 rows"),
    ],
)
def test_a_broken_table_fails_the_step_and_leaves_nothing(validate, tmp_path, step, change, message):
    with pytest.raises(GateFailedError, match=f"(?s){message}.*run `univigu run "):
        validate(step, change)
    assert not list((tmp_path / "root" / "data").glob(f"**/{STEPS[step]}/manifest.json")) or step == "validate-clips"


def test_too_many_bad_rows_fail_the_step_with_counts(validate):
    def change(tables):
        for row in tables["prompts"][:10]:
            row["licence"] = "proprietary"

    with pytest.raises(GateFailedError, match=r"rejected 10 of 40 rows.*licence 10"):
        validate("validate-prompts", change)


# --- the gate itself fails closed ------------------------------------------------------------------------------------


def gate(tmp_path, frame, suite, min_rows=1):
    """Run a gate; returns its result, and the (id, reason) of the rows that it rejected."""
    rejected = []
    reject = lambda row_id, reason, detail: rejected.append((row_id, reason))  # noqa: E731
    return run_gate("test", frame, suite, tmp_path / "docs", min_rows, "run `univigu run it` again", reject), rejected


@pytest.mark.parametrize(
    ("step", "change", "found"),
    [
        ("validate-prompts", one("prompts", 1, id=None), {"(no id)": "expect_column_values_to_not_be_null"}),
        ("validate-clips", one("clips", 1, id="c000"), {"c000": "expect_column_values_to_be_unique"}),
        ("validate-pairs", one("captions", 1, status="odd"), {"c001": "expect_column_values_to_be_in_set"}),
        (
            "validate-clips",
            lambda tables: [row.update(stage=7) for row in tables["clips"] if row["stage"] == 2],
            {f"c{number:03d}": "stage" for number in range(1, COUNT, 2)},
        ),
        (
            "validate-prompts",
            lambda tables: [row.update(licence="none") for row in tables["prompts"][5:]],
            None,
        ),
    ],
    ids=["no id", "same id", "bad caption", "a stage is gone", "too few are left"],
)
def test_a_gate_that_fails_the_step_keeps_the_failing_rows(validate, tmp_path, rows, step, change, found):
    with pytest.raises(GateFailedError):
        validate(step, change)
    rejected = read_table(tmp_path / "root" / ".univigu" / "scratch" / step, "rejected").to_pylist()
    found = found or {row["id"]: "licence" for row in rows["prompts"][5:]}
    assert {row["id"]: row["reason"] for row in rejected} == found
    assert all(row["row"] != "null" for row in rejected)


@pytest.mark.slow
def test_the_html_pages_show_the_run_on_the_whole_table(validate):
    _, home = validate("validate-clips", one("clips", 0, frames=76543))
    docs = home.parents[2] / ".univigu" / "docs" / "validate-clips" / "clips"
    (page,) = (docs / "validations").rglob("*.html")
    assert "76543" in page.read_text()


def test_an_expectation_that_raises_fails_the_gate(tmp_path):
    gx = expectations()
    suite = [gx.ExpectColumnValuesToBeUnique(column="id"), gx.ExpectColumnValuesToNotBeNull(column="no such column")]
    with pytest.raises(GateFailedError, match=r"no such column.*raised"):
        gate(tmp_path, pd.DataFrame({"id": ["a", "b"]}), suite)


def test_an_expectation_that_raises_fails_the_gate_even_with_a_reason(tmp_path):
    gx = expectations()
    suite = [gx.ExpectColumnValuesToBeBetween(column="text", min_value=1, meta={"reason": "range"})]
    with pytest.raises(GateFailedError, match="raised"):
        gate(tmp_path, pd.DataFrame({"id": ["a", "b"], "text": ["x", "y"]}), suite)


def test_an_expectation_that_did_not_run_fails_the_gate(tmp_path):
    gx = expectations()
    unique = gx.ExpectColumnValuesToBeUnique(column="id")
    # A suite silently keeps only one of two equal expectations.
    with pytest.raises(GateFailedError, match="was not run as often as it should"):
        gate(tmp_path, pd.DataFrame({"id": ["a", "b"]}), [unique, unique])


def test_an_empty_suite_is_refused(tmp_path):
    with pytest.raises(GateFailedError, match="has no expectations"):
        gate(tmp_path, pd.DataFrame({"id": ["a"]}), [])


def test_the_rows_left_after_a_quarantine_must_pass_the_whole_suite(tmp_path):
    gx = expectations()
    frame = pd.DataFrame({"id": ["a", "b", "c"], "value": [1, 2, 99], "kind": ["x", "x", "y"]})
    small = gx.ExpectColumnValuesToBeBetween(column="value", max_value=9, meta={"reason": "large"})
    both = gx.ExpectColumnDistinctValuesToContainSet(column="kind", value_set=["x", "y"])
    with pytest.raises(GateFailedError, match=r"without the 1 rows it quarantined \(large 1\)"):
        gate(tmp_path, frame, [small, both])
    result, rejected = gate(tmp_path, frame, [small])
    assert list(result.passed["id"]) == ["a", "b"]
    assert rejected == [("c", "large")]
    with pytest.raises(GateFailedError, match=r"keeps .*2 rows, fewer than the required 3"):
        gate(tmp_path, frame, [small], min_rows=3)


def unique(column, **meta):
    """Great Expectations' rule that the values of a column, or of several together, are unique."""
    gx = expectations()
    if isinstance(column, str):
        return gx.ExpectColumnValuesToBeUnique(column=column, meta=meta or None)
    return gx.ExpectCompoundColumnsToBeUnique(column_list=column, meta=meta or None)


@pytest.mark.parametrize(
    ("rules", "passed", "rejected"),
    [
        ([("key", "same")], "acf", [("b", "same"), ("d", "same"), ("e", "same")]),
        ([(["key", "part"], "same")], "abcdf", [("e", "same")]),
        # c has the same part as a, so d is the first of its key that stays.
        (
            [("key", "same"), ("part", "part")],
            "adf",
            [("b", "same"), ("c", "part"), ("e", "same")],
        ),
    ],
    ids=["a column", "two columns", "two rules"],
)
def test_of_rows_that_violate_uniqueness_the_first_stays(tmp_path, rules, passed, rejected):
    suite = [unique(column, reason=reason) for column, reason in rules]
    keys, parts = ["x", "x", "y", "y", "x", None], ["m", "n", "m", "o", "m", "q"]
    frame = pd.DataFrame({"id": list("abcdef"), "key": keys, "part": parts})
    result, found = gate(tmp_path, frame, suite)
    assert "".join(result.passed["id"]) == passed
    assert sorted(found) == rejected


def test_a_row_with_another_fault_is_not_the_one_that_stays(tmp_path):
    gx = expectations()
    frame = pd.DataFrame({"id": ["a", "b", "c"], "key": ["x", "x", "x"], "value": [99, 1, 2]})
    small = gx.ExpectColumnValuesToBeBetween(column="value", max_value=9, meta={"reason": "large"})
    result, found = gate(tmp_path, frame, [unique("key", reason="same"), small])
    assert list(result.passed["id"]) == ["b"]
    assert sorted(found) == [("a", "large"), ("c", "same")]


def test_uniqueness_without_a_reason_fails_the_step(tmp_path):
    frame = pd.DataFrame({"id": ["a", "b"], "key": ["x", "x"]})
    with pytest.raises(GateFailedError, match="unique"):
        gate(tmp_path, frame, [unique("key")])
