import time

import numpy as np
import pytest

from components.digits import world
from components.prompts import filters
from components.prompts.injection import find_injection


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("a red seven\u00c2\u00a0on white", "a red seven on white"),
        ("itâ€™s a blue two", "it's a blue two"),
        ("topâ€‘left", "top-left"),
        ("ｃｙａｎ ｆｏｕｒ", "cyan four"),
        ("a &lt;red&gt; six &amp;amp; a nine", "a <red> six & a nine"),
        ("a \x1b[31mred\x1b[0m six", "a red six"),
        ("\ufeffa\u200b  red\r\n\tsix\x07 ", "a red six"),
    ],
)
def test_transport_damage_is_repaired_and_repair_is_idempotent(broken, whole):
    assert filters.repair(broken) == whole
    assert filters.repair(whole) == whole


def test_repair_is_idempotent_for_any_text():
    rng = np.random.default_rng(0)
    alphabet = [*"ab &;<>#x0123456789Ââ€™\u00a0\u200b\ufeff\x07\x1b[m\u2010ﬁｃ'\"", "&amp;", "&lt;", "&#38;"]
    for _ in range(300):
        text = filters.repair("".join(rng.choice(alphabet, 20)))
        assert filters.repair(text) == text


def test_the_prompts_of_the_toy_dataset_pass_every_filter():
    rng = np.random.default_rng(5)
    for _ in range(1500):
        text = world.write_prompt(world.sample_attributes(rng), rng)
        assert filters.repair(text) == text
        assert not any((find_injection(text), filters.find_personal_data(text), filters.find_unsafe(text)))
        assert filters.identify_language(text, ["en"])[0] in ("en", filters.UNDECIDED)


@pytest.mark.parametrize(
    "text",
    [
        "a shooting star over a desert camp fire",
        "a skilled potter on 2024-05-01, 1920x1080, 24 fps",
        "act two of a play, seen in the rules of the 1990s",
        "show only the system of pipes, 4k, 16:9, f/2.8, iso 3200",
        "a street in 1950s New York, 35 mm film",
        "Sussex in spring",
    ],
)
def test_harmless_prompts_pass(text):
    assert not any((find_injection(text), filters.find_personal_data(text), filters.find_unsafe(text)))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to o.neil+x@mail.example.org", "e-mail address"),
        ("anna [at] example [dot] com", "e-mail address"),
        ("call 555-0142", "telephone number"),
        ("call +1 202 555 0173", "telephone number"),
        ("call (202) 555-0119", "telephone number"),
        ("card 4111 1111 1111 1111", "payment card number"),
        ("card 378282246310005", "payment card number"),
        ("12 Example Street", "street address"),
        ("987-65-4320", "national identity number"),
        ("DE00 1234 5678 9012 3456 78", "bank account number"),
    ],
)
def test_personal_data_is_found_and_never_quoted(text, kind):
    assert filters.find_personal_data(text) == kind


def test_the_search_for_personal_data_takes_time_in_proportion_to_the_text():
    seconds = {}
    for length in (20_000, 200_000):
        started = time.process_time()
        assert filters.find_personal_data("a" * length) == ""
        seconds[length] = time.process_time() - started
    assert seconds[200_000] < 40 * max(seconds[20_000], 0.001)  # 100 times if a match is tried at every letter
