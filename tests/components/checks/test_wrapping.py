"""Wrappings of a caption are removed, ambiguous texts get a complaint, and plain captions are unchanged."""

import itertools
import json
from pathlib import Path

import pytest

from components.checks.wrapping import extract_caption, wrapping
from components.pipeline.fingerprint import fingerprint

CAPTION = "A ball moves slowly from the left to the right, over coloured bars; a clock counts in the corner."
THOUGHT = "The user wants a caption of the video. Let me look at the frames one by one; I see a ball and bars."


def read_texts():
    """The lines of ``wrapped.txt``, by section."""
    sections = {}
    for line in Path(__file__).with_name("wrapped.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line[1:-1] in SECTIONS:
            texts = sections.setdefault(line[1:-1], [])
        elif sections and line:
            texts.append(line.replace("⏎", "\n"))
    return sections


TAKEN_OFF = ("reasoning", "json", "words_to_the_reader", "markdown", "chat_tokens", "boxes", "frames", "tags", "more")
SECTIONS = (*TAKEN_OFF, "quotes", "inline", "doubtful", "captions")
TEXTS = read_texts()


def fill(template):
    return template.replace("§", CAPTION).replace("¤", THOUGHT)


@pytest.mark.parametrize("template", [*(text for name in TAKEN_OFF for text in TEXTS[name]), *TEXTS["quotes"]])
def test_what_is_around_a_caption_is_taken_off(template):
    assert extract_caption(fill(template)) == (CAPTION, "")


@pytest.mark.parametrize("form", TEXTS["inline"])
def test_markup_of_words_in_a_caption_is_removed(form):
    assert extract_caption(CAPTION.replace("a clock", form)) == (CAPTION, "")


@pytest.mark.parametrize("template", [*TEXTS["doubtful"], "[" * 200 + '"§"' + "]" * 200, '{"a":' * 5000])
def test_what_can_not_be_told_from_a_caption_is_asked_again(template):
    text, complaint = extract_caption(fill(template))
    assert complaint.startswith(("it holds", "it is", "it begins"))
    assert text == " ".join(fill(template).split())
    assert wrapping(fill(template)) == complaint


@pytest.mark.parametrize("text", TEXTS["captions"])
def test_a_caption_with_braces_quotes_or_lists_is_unchanged(text):
    assert extract_caption(text) == (text, "")
    assert wrapping(text) == ""


OUTER = [
    "Sure! Here is the caption:\n\n%s",
    "```\n%s\n```",
    "**Caption:** %s",
    "%s\n\nLet me know if I can help!",
    "%s<|im_end|>",
]
INNER = ["<think>¤</think>%s", '"%s"', "<caption>%s</caption>", "%s\n\n(Word count: 20)", "[/INST] %s</s>"]


@pytest.mark.parametrize(("outer", "inner"), [*itertools.product(OUTER, INNER)])
def test_wrappings_may_be_nested(outer, inner):
    assert extract_caption(fill(outer % inner % "§")) == (CAPTION, "")
    asked = json.dumps({"caption": fill(outer % inner % "§"), "confidence": 0.9})
    assert extract_caption(asked) == (CAPTION, "")


@pytest.mark.parametrize(
    "template", [text for name in TAKEN_OFF if name not in ("markdown", "more") for text in TEXTS[name]]
)
def test_a_stored_caption_with_a_wrapping_gets_a_complaint(template):
    assert wrapping(fill(template)).startswith("it ")


@pytest.mark.parametrize(
    "text", [*TEXTS["quotes"], f"*{CAPTION}*", CAPTION.replace(" slowly", " *slowly*"), f"  {CAPTION}\n"]
)
def test_a_stored_caption_may_be_in_quotes_or_italics(text):
    assert wrapping(fill(text)) == ""


@pytest.mark.parametrize(
    "text",
    [
        "A ball moves.\n\nThe clock  counts.\n",
        "A wide shot of a city at night.\nCars move along the streets like rivers of light.\nThe moon rises.",
        'A woman opens a door.\n\n"Who is there?" she asks.\n\nNo one answers; a curtain moves in the wind.',
        "I run through a field.\n\nMy feet hit the ground, and I breathe hard.",
        "The stage is dark, and then a light comes on.\n\nWhat a sight!",
        "A sign on a door:\nit says closed, in red letters on white, and a man turns away.",
    ],
)
def test_paragraphs_become_one_line(text):
    assert extract_caption(text) == (" ".join(text.split()), "")


@pytest.mark.parametrize(
    "unit", ["<think>", "*", "```\n", "{", '"a",', "\n", "> a\n", "[1,2,3,4]", "<|im_end|>", "Sure! ", "a "]
)
def test_a_text_made_to_be_slow_takes_a_moment_only(unit):
    extract_caption(unit * (19_000 // len(unit)))
    extract_caption(f"<think>{unit * (390_000 // len(unit))}</think>{CAPTION}")


def test_the_phrases_decide_the_output_of_steps_that_check_captions():
    assert "components/checks/wrapping/phrases.yaml" in fingerprint(["components.checks.wrapping:wrapping"])
