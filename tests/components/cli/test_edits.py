"""A change of a clip does to the counts what was said before, and the command writes it."""

import shutil

import pytest
from typer.testing import CliRunner

from components.cli import edits
from components.cli.main import app
from components.cli.studio import clips
from components.cli.studio.work import Studio
from components.pipeline.runner import run_stage
from components.pipeline.stages import EDITS
from components.pipeline.tables import read_table
from components.prompts.tokens import load_tokenizer
from good_rows import make_rows
from univigu.errors import BadInputError, BusyError

SHORT, FAILED, KEPT = "c001", "c003", "c005"  # a caption that the gate rejects, one that was not made, a good one


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_wan_folder, recommit):
    """A work root in which validate-pairs can run: one caption is too short, and one was not made."""
    root = tmp_path_factory.mktemp("edits")
    shutil.copytree(tiny_wan_folder / "tokenizer", root / "model/tiny-wan/tokenizer")
    rows = make_rows(load_tokenizer(tiny_wan_folder))
    rows["captions"][1] |= {"text": "a red six", "n_tokens": 4}
    rows["captions"][3] |= {"text": None, "n_tokens": 0, "status": "error"}
    recommit(root, "synthesize-videos", {"clips": rows["clips"]})
    recommit(root, "validate-clips", {"clips": rows["clips"]})
    failed = {"id": FAILED, "reason": "empty", "detail": "it was empty", "row": "{}"}
    recommit(root, "caption-videos", {"captions": rows["captions"], "rejected": [failed]})
    return root


@pytest.fixture
def root(tmp_path, data):
    """A copy of it, in which nothing was edited."""
    return shutil.copytree(data, tmp_path / "root")


@pytest.fixture
def caption(data):
    """A caption that the gate accepts: another clip's."""
    return next(
        row["text"] for row in read_table(data / "data/captions", "captions").to_pylist() if row["clip_id"] == KEPT
    )


def run_gate(root, profile):
    manifest = run_stage("validate-pairs", profile, root)
    return manifest, clips.count_verdicts(root)


@pytest.mark.slow
def test_the_next_run_has_the_counts_that_were_foreseen(root, profile, caption):
    profile["validate_data"]["caption_checks"] = []  # of the digits: the caption is another clip's
    assert run_gate(root, profile)[1] == {"kept": 38, "quarantined": 2, "caption_range": 1, "empty": 1}

    def propose(clip, text=""):
        opened = edits.open_clip(root, clip)
        if text:
            return edits.propose_caption(root, profile, opened, text, "Ann")
        return edits.propose_exclusion(root, profile, opened, "Ann")

    assert propose(FAILED, caption).describe() == ["kept 38 -> 39", "quarantined 2 -> 1", "empty 1 -> 0"]
    edits.apply(root, propose(FAILED, caption))
    edits.apply(root, propose(SHORT, f"{caption} ."))
    last = propose(KEPT)
    assert last.describe() == ["kept 40 -> 39", "quarantined 0 -> 1", "excluded 0 -> 1"]
    edits.apply(root, last)
    manifest, counts = run_gate(root, profile)
    assert counts == last.after == {"kept": 39, "quarantined": 1, "excluded": 1}
    assert (manifest["rows_in"], manifest["rows_out"], manifest["reasons"]) == (40, 39, {"excluded": 1})
    assert manifest["facts"]["edits"] == {"applied": 3, "not_applied": [], "last": 3}
    pairs = {row["clip_id"]: row["caption"] for row in read_table(root / "data/pairs", "pairs").to_pylist()}
    assert (pairs[FAILED], pairs[SHORT], KEPT in pairs) == (caption, f"{caption} .", False)
    undo = edits.propose_undo(root, profile, edits.open_clip(root, FAILED), "Ann")
    assert undo.describe() == ["kept 39 -> 38", "quarantined 1 -> 2", "empty 0 -> 1"]


@pytest.mark.slow
def test_an_edit_of_a_caption_that_was_made_anew_is_reported_and_not_applied(root, profile, caption, recommit, capfd):
    opened = edits.open_clip(root, KEPT)
    first = edits.propose_caption(root, profile, opened, caption.replace(" ", "  ", 1), "Ann")
    other = edits.propose_exclusion(root, profile, opened, "Bob")
    edits.apply(root, first)
    with pytest.raises(BusyError, match="was edited after you opened it"):
        edits.apply(root, other)
    rows = read_table(root / "data/captions", "captions").to_pylist()
    for row in rows:
        row["text"] = row["text"] and f"{row['text']} ." if row["clip_id"] == KEPT else row["text"]
    recommit(root, "caption-videos", {"captions": rows})
    assert edits.open_clip(root, KEPT).not_applied == (1,)
    manifest, _ = run_gate(root, profile)
    assert manifest["facts"]["edits"] == {"applied": 0, "not_applied": [1], "last": 1}
    assert "1 edits in data/edits.json were not applied" in capfd.readouterr().err


@pytest.mark.slow
def test_what_the_gate_would_reject_is_not_written(root, profile, caption):
    def refused(clip, text, said):
        with pytest.raises(BadInputError, match=said):
            edits.propose_caption(root, profile, edits.open_clip(root, clip), text, "Ann")

    refused(KEPT, "a red six", r"would reject this caption as 'caption_range' \(caption_tokens 4\)")
    refused(KEPT, caption, "as it was")
    refused("c000", caption, "is for stage 1")
    refused("nobody", caption, "isn't among those that passed")
    profile["validate_data"]["min_rows"] = 39
    with pytest.raises(BadInputError, match="Only 38 clips would be left"):
        edits.propose_exclusion(root, profile, edits.open_clip(root, KEPT), "Ann")
    assert not (root / EDITS).exists()


@pytest.mark.slow
def test_of_two_tabs_that_edit_the_same_caption_the_second_is_told_and_opens_what_the_first_wrote(root, caption):
    from components.cli.studio.data_page import DataPage  # with Gradio, which takes two seconds

    page, query = DataPage(Studio(root, "uni-vigu", root / "cache", "smoke")), ("", 0, "", "", "", "", 1)
    texts = [caption.replace(" ", " " * spaces, 1) for spaces in (2, 3)]
    tabs = [page.open(KEPT)[1] for _ in texts]
    examined = [page.check(opened, text) for opened, text in zip(tabs, texts, strict=True)]
    said = [
        page.apply(opened, text, proposal, *query)[2]
        for opened, text, (_, proposal) in zip(tabs, texts, examined, strict=True)
    ]
    assert "Line 1 is written" in said[0]
    assert "was edited after you opened it; open it again" in said[1]
    assert page.open(KEPT)[0] == texts[0]


@pytest.mark.slow
def test_the_command_edits_lists_and_undoes(root, caption):
    def call(*options):
        return CliRunner().invoke(app, ["data", "edit", "--root", str(root), "--profile", "smoke", *options])

    assert "No clip was edited here." in call("--list").output
    assert "kept 39 -> 38" in call("--id", KEPT, "--exclude", "--dry-run").output
    assert not (root / EDITS).exists()
    assert "This is line 1 of data/edits.json" in call("--id", KEPT, "--exclude").output
    assert "kept 38 -> 39" in call("--id", KEPT, "--undo").output
    assert [line.split()[0] for line in call("--list").output.splitlines()] == ["1", "2"]
    assert "exactly one of --caption" in str(call("--id", KEPT).exception)
    assert "excluded" not in edits.read_edits(root)[0].caption
