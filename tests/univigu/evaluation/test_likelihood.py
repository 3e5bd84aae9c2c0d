"""What a model predicts of given texts beside given clips, with the bundled model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.digits import benchmark, evaluation
from univigu import UniViGUPipeline, text_space
from univigu.evaluation.likelihood import encode_clip, measure_text, retrieve
from univigu.training.heldout import evaluate_heldout

REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pipe():
    return UniViGUPipeline.from_pretrained(REPO / "model/tiny-univigu")


@pytest.fixture(scope="module")
def clips(pipe):
    """Latents and a true caption of held-out clips."""
    items = benchmark.load_heldout(REPO / "data/heldout.json")["captions"][:5]
    return [(encode_clip(pipe, benchmark.render([one])[0]), evaluation.references(one)[0]) for one in items]


def test_token_accuracy_and_its_gain_are_those_of_the_trainings_held_out_measures(pipe, clips):
    model, (latents, text) = pipe.transformer, clips[0]
    ids = text_space.tokenize(pipe.tokenizer, [text], model.config.text_length)
    empty = pipe._encode([""])
    batch = {"latents": latents, "target_ids": ids, "prompt_ids": ids, "prompt_embeds": empty}
    theirs = evaluate_heldout(model, [batch | {"empty_embeds": empty[0], "sample_ids": torch.tensor([3])}], seed=7)
    ours = measure_text(pipe, latents, text, 3, seed=7)
    np.testing.assert_allclose(ours.accuracy, theirs["token_accuracy"], atol=1e-6)
    gain = ours.accuracy - ours.accuracy_without
    assert gain.mean() == pytest.approx(theirs["video_gain"], abs=1e-6)


def test_a_false_caption_is_less_likely_beside_its_clip(pipe, clips):
    true, false = (measure_text(pipe, clips[0][0], clips[number][1], 0) for number in (0, 1))
    assert true.entropy.mean() < false.entropy.mean()
    assert true.gain > false.gain


def test_a_trained_model_finds_the_text_of_a_clip_and_the_clip_of_a_text(pipe, clips):
    found = retrieve(pipe, [latents for latents, _ in clips], [text for _, text in clips])
    assert found.text_of_clip.mean() >= 0.8
    assert found.clip_of_text.mean() >= 0.8
    moved = [text for _, text in clips[1:] + clips[:1]]
    assert retrieve(pipe, [latents for latents, _ in clips], moved).text_of_clip.mean() <= 0.4


def test_equal_texts_and_their_clips_count_as_each_other(pipe, clips):
    found = retrieve(pipe, [clips[0][0], clips[1][0]], [clips[0][1]] * 2)
    assert found.text_of_clip.all()
    assert found.clip_of_text.all()
