"""The reader takes back what the writer said, whatever the wording, and finds what is wrong, missing or no sentence."""

from itertools import pairwise

import numpy as np
import pytest

from components.digits import world
from components.digits.stories.reader import read
from components.digits.stories.scenes import sample_scene
from components.digits.stories.scoring import judge
from components.digits.stories.writer import CAPTION_TOKENS, PROMPT_TOKENS, write_caption, write_prompt
from components.digits.tokenizer import build_tokenizer, corpus
from components.digits.worlds import STORIES
from components.pipeline.profiles import load_profile

COUNT = 3000


@pytest.fixture(scope="module")
def told():
    rng = np.random.default_rng(3)
    return [(scene, write_caption(scene, rng), write_prompt(scene, rng)) for scene in map(sample_scene, [rng] * COUNT)]


def test_a_caption_in_any_wording_is_read_back_into_exactly_its_scene(told):
    for scene, caption, _ in told:
        reading = read(caption)
        assert reading.whole, (caption, reading.unread)
        assert reading.claims == {name: {value} for name, value in scene.items()}, caption
        assert CAPTION_TOKENS[0] <= world.count_words(caption) + 1 <= CAPTION_TOKENS[1]
    assert len({caption for _, caption, _ in told}) == COUNT


def test_a_prompt_names_both_digits_and_says_nothing_that_does_not_hold(told):
    for scene, _, prompt in told:
        reading = read(prompt)
        verdict = judge(scene, reading.claims)
        assert reading.whole, (prompt, reading.unread)
        assert not verdict.contradicted, prompt
        assert sum(name.startswith("digit:") for name in verdict.right) == 2
        assert world.count_words(prompt) + 1 <= PROMPT_TOKENS[1]


def test_each_word_is_one_token_and_none_is_unknown(told):
    tokenizer = build_tokenizer(corpus(1500, 0, STORIES), 96)
    for _, caption, prompt in told[:300]:
        for text in (caption, prompt):
            tokens = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in tokens
            assert len(tokens) == world.count_words(text) + 1, text


def test_the_profile_has_the_same_bounds_of_tokens():
    text = load_profile("stories")["text"]
    assert (tuple(text["prompt_tokens"]), tuple(text["caption_tokens"])) == (PROMPT_TOKENS, CAPTION_TOKENS)


def test_one_scene_has_many_captions_of_many_lengths():
    rng = np.random.default_rng(5)
    scene = sample_scene(rng)
    captions = [write_caption(scene, rng) for _ in range(200)]
    assert len(set(captions)) == 200
    assert len({world.count_words(caption) for caption in captions}) > 20


def test_a_caption_of_another_scene_contradicts_and_a_caption_without_a_sentence_leaves_out(told):
    for (scene, caption, _), (other, _, _) in pairwise(told):
        wrong = judge(other, read(caption).claims)
        assert wrong.contradicted == {name for name, value in scene.items() if other.get(name) != value}
        assert wrong.left_out == other.keys() - scene.keys()
    shorter = 0
    for scene, caption, _ in told[:300]:
        verdict = judge(scene, read(caption.partition(". ")[2]).claims)
        shorter += bool(verdict.left_out)
        assert not verdict.contradicted
    assert shorter > 250


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        (
            "A red three goes left slowly, passing above a blue seven which never moves, then leaves to the left.",
            {
                "digit:red": {"three"},
                "digit:blue": {"seven"},
                "first:red": {"goes left slow"},
                "then:red": {"leaves left"},
                "first:blue": {"stands"},
                "then:blue": {"stands"},
                "passes": {"red above blue"},
            },
        ),
        ("a blue one and an eight in pink", {"digit:blue": {"one"}, "digit:pink": {"eight"}}),
        (
            "A red three crosses below a green two. The other one waits. Then it comes in from the top.",
            {
                "digit:red": {"three"},
                "digit:green": {"two"},
                "passes": {"green above red"},
                "first:green": {"stands"},
                "then:green": {"enters top"},
            },
        ),
    ],
)
def test_free_combinations_of_the_grammar_are_read_whole(text, claims):
    reading = read(text)
    assert reading.whole, reading.unread
    assert reading.claims == claims


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog runs in a park",
        "red three moves left slowly",  # no article
        "It moves left slowly.",  # who?
        "A red three waits. The blue one moves left slowly.",  # not introduced
        "A red three waits. A red five waits.",  # introduced twice
        "A red three waits. The other one waits.",  # there is none
        "There are two digits, a red three and a blue three. The three waits.",  # which?
        "A red three and a blue two. The red one moves left slowly The blue one waits.",
        "A red three moves slowly left left quickly.",
        "A red three and a blue seven on a grey background on a white background.",
        "A red three does the same again.",
    ],
)
def test_what_is_no_text_of_the_grammar_is_not_read_whole(text):
    assert not read(text).whole


def test_a_shuffled_or_cut_caption_is_not_read_whole_but_for_rare_accidents(told):
    rng = np.random.default_rng(7)
    shuffled = [read(" ".join(rng.permutation(caption.split()))).whole for _, caption, _ in told[:300]]
    cut = [read(caption[: len(caption) * 2 // 3].rsplit(" ", 1)[0]).whole for _, caption, _ in told[:300]]
    assert sum(shuffled) == 0
    assert sum(cut) < 60


def test_a_broken_sentence_costs_its_own_facts_alone():
    text = "A red three waits. A blue seven it it leaves to the left. The background is grey."
    reading = read(text)
    assert reading.unread == ["a blue seven it it leaves to the left."]
    assert reading.claims["first:red"] == {"stands"}
    assert reading.claims["background"] == {"grey"}
    assert reading.claims["digit:blue"] == {"seven"}
