"""Figures of captions: what a right, a wrong, a silent and a failed caption score."""

import re

import numpy as np
import pytest
import sacrebleu
from model2vec import StaticModel
from tokenizers import Tokenizer, models, pre_tokenizers

from components.digits import evaluation
from components.evaluation.suite.captions import embed, score_captions, score_overlap
from components.evaluation.suite.data import Clip, Dataset
from univigu.errors import BadInputError, MissingInputError

TRUTH = {"digit": "seven", "colour": "red", "background": "black", "direction": "right", "speed": "slow"}
TRUTH |= {"start": "centre", "end": "middle-right"}


def digits(count, world=evaluation):
    clips = tuple(
        Clip(f"clip-{n}", (evaluation.references({"seed": n, "attributes": TRUTH})), None, n, TRUTH)
        for n in range(count)
    )
    return Dataset("digits", "", clips, world=world)


def test_facts_are_right_stated_wrongly_or_left_out_and_a_failure_states_none():
    dataset = digits(4)
    true = dataset.clips[0].references[0]
    texts = [true, re.sub("red", "blue", true), "a seven", None]
    scores, left_out = score_captions(dataset, dataset.clips, texts, None, 0)
    values = {name: scores[name]["value"] * 28 for name in ("facts", "hallucination", "omission")}
    assert values == pytest.approx({"facts": 7 + 6 + 1, "hallucination": 1, "omission": 6 + 7}, abs=1e-4)
    assert scores["fact.colour"]["value"] == 0.25
    assert scores["empty"]["value"] == 0.25
    assert {score["n"] for score in scores.values()} == {4}
    assert list(left_out) == ["similarity"]


def test_without_a_known_truth_content_words_are_compared_and_facts_are_left_out():
    dataset = digits(2, world=None)
    scores, left_out = score_captions(dataset, dataset.clips, [dataset.clips[0].references[0], None], None, 0)
    assert not {"facts", "hallucination", "omission"} & scores.keys()
    assert scores["content"]["value"] == 0.5
    assert "isn't known" in left_out["facts"]


def test_a_caption_is_compared_with_the_reference_that_fits_it_and_their_number_may_differ():
    references = [["a dog runs over the green grass", "a cat sleeps on the warm bed"], ["two birds fly over the sea"]]
    exact = score_overlap(references, ["a cat sleeps on the warm bed", "two birds fly over the sea"], 0)
    assert exact["bleu"]["value"] == pytest.approx(100)
    assert exact["chrf"]["value"] == pytest.approx(100)
    assert exact["rouge_l"]["value"] == 1
    assert 7.5 <= exact["cider"]["value"] < 8  # CIDEr is the mean over references: of one clip 10, of the other half
    said = ["a dog sleeps on the green bed", "two birds fly"]
    streams = [[one[0] for one in references], [references[0][1], None]]
    part = score_overlap(references, said, 0)
    assert part["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(said, streams).score, abs=1e-6)
    assert part["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(said, streams).score, abs=1e-6)
    assert part["bleu"]["low"] < part["bleu"]["high"]
    none = score_overlap(references, ["", ""], 0)
    assert all(score["value"] == 0 for score in none.values())


def test_one_caption_has_no_figure():
    dataset = digits(1)
    with pytest.raises(BadInputError, match="at least two"):
        score_captions(dataset, dataset.clips, ["a seven"], None, 0)


@pytest.fixture
def embedder(tmp_path):
    """A model2vec folder whose words are orthogonal."""
    words = ["[UNK]", "dog", "cat", "sea", "bird"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    StaticModel(np.eye(5, dtype=np.float32), tokenizer).save_pretrained(str(tmp_path / "embedder"))
    return tmp_path / "embedder"


def test_similarity_is_measured_by_the_model_that_the_user_names(embedder, tmp_path):
    cosines = embed(embedder, ["dog", "cat"]) @ embed(embedder, ["dog", "dog cat"]).T
    np.testing.assert_allclose(cosines, [[1, 0.5**0.5], [0, 0.5**0.5]], atol=1e-6)
    clips = (Clip("0", ("a dog", "a bird"), None), Clip("1", ("the sea",), None))
    scores, left_out = score_captions(Dataset("", "", clips), clips, ["bird", "dog"], embedder, 0)
    assert scores["retrieval.embedding"]["value"] == 0.5
    assert "similarity" not in left_out
    with pytest.raises(MissingInputError, match="no embedding model"):
        embed(tmp_path, ["dog"])
