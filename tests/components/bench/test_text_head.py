"""The benchmark of text heads, on a text of seconds."""

import pytest
import torch

from components.bench import text_head


@pytest.fixture
def small(monkeypatch):
    """A text in which a word follows from its neighbours, and its words."""
    for name, value in {"VOCABULARY": 11, "WIDTH": 32, "STEPS": 80, "BATCH": 64}.items():
        monkeypatch.setattr(text_head, name, value)
    return torch.arange(600) * 7 % 12


@pytest.mark.parametrize(("dim", "wide", "bias", "numbers"), [(4, 0, False, 48), (4, 8, True, 156)])
def test_every_head_learns_more_than_the_words_frequencies(small, dim, wide, bias, numbers):
    found = text_head.train_head(dim, wide, bias, small, small)
    assert found["output_parameters"] == numbers
    assert found["heldout_nats"] < 0.5 * text_head.unigram_nats(small, small)


def test_frequencies_of_words_are_those_of_the_text_and_add_up_to_one(small):
    assert text_head.log_frequencies(small).exp().sum() == pytest.approx(1)
    assert text_head.unigram_nats(small, small) == pytest.approx(torch.tensor(12.0).log().item(), abs=1e-3)
