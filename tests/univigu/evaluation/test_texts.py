"""Measures of texts without references."""

from univigu.evaluation.texts import distinct_share, repeated_share, words


def test_only_n_grams_that_were_said_before_are_repeated():
    assert repeated_share("one two three four five six") == 0
    assert repeated_share("a red dog runs a red dog runs") == 1 - 4 / 5
    assert repeated_share("too short") == 0


def test_texts_that_say_the_same_are_less_distinct():
    assert distinct_share(["a red dog", "the blue cat"], 1) == 1
    assert distinct_share(["a red dog", "a red dog"], 2) == 0.5
    assert distinct_share(["", ""], 1) == 0


def test_words_have_no_punctuation_and_no_case():
    assert words("It's a TOP-left, red seven!") == ["it's", "a", "top-left", "red", "seven"]
