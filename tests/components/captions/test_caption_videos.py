"""Captions are checked, bad ones are asked for again with the reason, and every clip gets a status."""

import json
import sys
from types import SimpleNamespace

import pytest

from components.captions.captioners import CaptionResponse, caption_in_batches
from components.digits import world
from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table
from components.prompts.tokens import count_tokens, load_tokenizer
from univigu.errors import ConfigError

STEP = "caption-videos"
INSTRUCTIONS = "Write one paragraph of plain prose in the present tense: what is seen, and how it moves."


def captions_of(root):
    return {row["clip_id"]: row for row in read_table(root / "data/captions", "captions").to_pylist()}


def rejected_of(root):
    return {row["id"]: row for row in read_table(root / "data/captions", "rejected").to_pylist()}


@pytest.fixture
def install(monkeypatch, profile):
    """Make `answer(request) -> CaptionResponse` the profile's captioner; returns the list of requests it will get."""

    def make(answer):
        asked = []

        def answer_all(requests, clips):
            asked.extend(requests)
            return [answer(request) for request in requests]

        def caption(requests, follow_up):
            caption_in_batches(answer_all, requests, follow_up, 3)

        about = {"name": "under-test", "digest": "0", "template_version": "1", "instructions": INSTRUCTIONS}
        captioner = SimpleNamespace(**about, caption=caption)
        module = SimpleNamespace(create=lambda config: captioner)
        monkeypatch.setitem(sys.modules, "components.captions.captioners.under_test", module)
        profile["caption_videos"]["captioner"] = "under_test"
        return asked

    return make


@pytest.mark.slow
def test_measured_captions_are_true_long_enough_and_only_for_stage_2(digits_root, profile):
    root, rows, attributes = digits_root
    manifest = run_stage(STEP, profile, root)
    captions = captions_of(root)
    tokenizer = load_tokenizer(root / profile["base"])
    low, high = profile["text"]["caption_tokens"]
    assert manifest["facts"]["statuses"] == {"skipped": 4, "success": 8}
    right = 0
    for row in rows:
        caption = captions[row["id"]]
        if row["stage"] == 1:
            assert (caption["text"], caption["status"], caption["attempts"]) == (None, "skipped", 0)
            continue
        assert low <= caption["n_tokens"] == count_tokens(tokenizer, [caption["text"]])[0] <= high
        said = world.read_text(caption["text"])
        right += sum(said[name] == {value} for name, value in attributes[row["id"]].items())
    assert right >= 0.9 * 8 * len(world.ATTRIBUTES)


def test_captions_are_deterministic_and_independent_of_the_batch(digits_root, profile):
    root, _, _ = digits_root
    run_stage(STEP, profile, root)
    first = captions_of(root)
    profile["caption_videos"].update(shard_size=2, batch_size=1)
    run_stage(STEP, profile, root)
    assert captions_of(root) == first


def test_a_caption_that_is_too_short_is_asked_for_again_with_the_reason(digits_root, profile, install):
    from components.captions.captioners import measured

    root, _, _ = digits_root
    good = measured.create({"seed": 0, "wordings": 6, "batch_size": 1})

    def answer(request):
        if request.complaint:
            return good.answer([request], [request.open()])[0]
        return CaptionResponse("a digit", usage={"tokens": 2})

    asked = install(answer)
    manifest = run_stage(STEP, profile, root)
    again = [request for request in asked if request.attempt == 2]
    assert len(again) == 8
    assert {request.last_text for request in again} == {"a digit"}
    assert all("say more" in request.complaint for request in again)
    assert {row["attempts"] for row in captions_of(root).values() if row["status"] == "success"} == {2}
    assert manifest["facts"] == {"statuses": {"skipped": 4, "success": 8}, "calls": 16, "usage": {"tokens": 16}}


@pytest.mark.parametrize("fails", [0, 1, 5, 8])
def test_every_row_is_kept_or_quarantined(digits_root, profile, install, fails):
    from components.captions.captioners import measured

    root, rows, _ = digits_root
    good = measured.create({"seed": 0, "wordings": 1, "batch_size": 1})
    bad = {row["id"] for row in [row for row in rows if row["stage"] == 2][:fails]}

    def answer(request):
        return CaptionResponse("a digit") if request.id in bad else good.answer([request], [request.open()])[0]

    install(answer)
    manifest = run_stage(STEP, profile, root)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (12, 12 - fails, fails)
    assert len(captions_of(root)) == 12
    assert json.loads((root / "data/captions/manifest.json").read_text())["rows_out"] == 12 - fails


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a digit", "too_short"),
        ("a digit moves and " * 40, "too_long"),
        ("the camera does not move at all and there is no other thing in the picture " * 2, "misses_prompt"),
    ],
)
def test_a_clip_with_bad_captions_only_gets_a_status_and_a_reason(digits_root, profile, install, text, reason):
    root, rows, _ = digits_root
    install(lambda request: CaptionResponse(text))
    manifest = run_stage(STEP, profile, root)
    assert manifest["reasons"] == {reason: 8}
    assert {row["attempts"] for row in captions_of(root).values() if row["status"] == "error"} == {3}
    assert set(captions_of(root)) == {row["id"] for row in rows}


@pytest.mark.parametrize(
    ("text", "reason", "status"),
    [
        ("", "empty", "error"),
        ("The digit \0 moves.", "damaged_text", "error"),
        ("I'm sorry, I can't describe this.", "refusal", "blocked"),
        (f"Sure! {INSTRUCTIONS}", "echoes_instructions", "error"),
    ],
)
def test_texts_that_are_not_descriptions_are_rejected_whatever_their_length(
    digits_root, profile, install, text, reason, status
):
    root, _, _ = digits_root
    install(lambda request: CaptionResponse(text))
    manifest = run_stage(STEP, profile, root)
    assert manifest["reasons"] == {reason: 8}
    assert manifest["facts"]["statuses"] == {status: 8, "skipped": 4}
    assert {row["attempts"] for row in captions_of(root).values()} == {0, 3}
    assert all("<script>" not in row["detail"] for row in rejected_of(root).values())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: f"<think>What is it?</think>{text}", "wrapping"),
        (lambda text: f"{text}<|im_end|>", "wrapping"),
        (lambda text: f"{text}{' It moves, and' * 9}", "repetition"),
    ],
)
def test_captions_with_wrapping_or_repetition_are_rejected(digits_root, profile, install, spoil, reason):
    from components.captions.captioners import measured

    root, _, _ = digits_root
    profile["text"]["caption_tokens"] = [profile["text"]["prompt_tokens"][1] + 1, 400]
    good = measured.create({"seed": 0, "wordings": 1, "batch_size": 1})
    install(lambda request: CaptionResponse(spoil(good.answer([request], [request.open()])[0].text)))
    assert run_stage(STEP, profile, root)["reasons"] == {reason: 8}


def test_a_shard_is_made_again_by_another_captioner(digits_root, profile, install):
    root, _, _ = digits_root
    asked = install(lambda request: CaptionResponse("a digit"))
    run_stage(STEP, profile, root)
    before = len(asked)
    run_stage(STEP, profile, root)
    assert len(asked) == before
    sys.modules["components.captions.captioners.under_test"].create({}).digest = "1"
    run_stage(STEP, profile, root)
    assert len(asked) == 2 * before


def test_a_repeated_prompt_is_rejected(digits_root, profile, install):
    root, _, _ = digits_root
    install(lambda request: CaptionResponse(request.prompt.upper() + " !"))
    assert run_stage(STEP, profile, root)["reasons"] == {"repeats_prompt": 8}


def test_a_blocked_clip_is_not_asked_about_again(digits_root, profile, install):
    root, _, _ = digits_root
    asked = install(lambda request: CaptionResponse("", "blocked", "the service declined"))
    run_stage(STEP, profile, root)
    assert len(asked) == 8
    assert {row["detail"] for row in rejected_of(root).values()} == {"the service declined"}
    assert {row["status"] for row in captions_of(root).values()} == {"blocked", "skipped"}


def test_a_damaged_clip_is_quarantined_and_the_others_are_described(digits_root, profile, recommit):
    root, rows, _ = digits_root
    rows[4]["sha256"] = "0" * 64
    recommit(root, "validate-clips", {"clips": rows})
    assert run_stage(STEP, profile, root)["reasons"] == {"damaged": 1}
    assert captions_of(root)["c04"]["status"] == "error"


def test_an_unknown_captioner_is_rejected(digits_root, profile):
    profile["caption_videos"]["captioner"] = "nobody"
    with pytest.raises(ConfigError, match="no captioner 'nobody'"):
        run_stage(STEP, profile, digits_root[0])
