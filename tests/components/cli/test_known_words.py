"""Words of a prompt that a tokenizer doesn't know: a small one spells them, a large one has its unknown token."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from components.cli.known_words import SMALL, find_unknown_words, known_words, warn_of_unknown_words
from components.digits.tokenizer import build_tokenizer, corpus


@pytest.fixture(scope="module")
def small():
    return build_tokenizer(corpus(300, seed=0), 512)


@pytest.fixture(scope="module")
def large():
    """A vocabulary of all letters in threes, as a large subword tokenizer: every word of small letters has pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<unk>", *letters, *(a + b + c for a in letters for b in letters for c in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red seven on black, moving up.", []),
        ("A digit in the bottom-left corner", []),
        ("an elephant (big) in the jungle", ["elephant", "jungle"]),
        ("a red 7", ["7"]),
        ("红色的七", ["红色的七"]),
        ("eine rote Sieben", ["eine", "rote", "Sieben"]),
        ("zebra zebra - !", ["zebra"]),
        ("", []),
    ],
)
def test_words_that_a_small_tokenizer_spells_are_unknown(small, prompt, unknown):
    assert find_unknown_words(prompt, small) == unknown


def test_the_listed_words_are_the_most_frequent_ones(small):
    assert {"red", "black", "seven", "bottom-left"} <= set(known_words(small))
    assert known_words(small) == sorted(known_words(small))
    assert "quietly" not in known_words(small)  # in the vocabulary, but in none of the dataset's sentences


def test_a_large_vocabulary_is_not_listed_and_knows_what_it_has_pieces_for(large, capsys):
    assert len(large) > SMALL
    assert find_unknown_words("zebra in a jungle", large) == []
    assert known_words(large) == []
    warn_of_unknown_words("zebra", large)
    assert capsys.readouterr().err == ""
    warn_of_unknown_words("zebra 七\x1b[31m", large)
    said = "This model doesn't know '七[31m'; the clip may ignore it. Use other words.\n"
    assert capsys.readouterr().err == said
