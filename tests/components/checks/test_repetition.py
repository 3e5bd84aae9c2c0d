"""Loops and counters are found, and descriptions with a little repetition pass."""

import numpy as np
import pytest

from components.checks.repetition import repetition
from components.digits import world

SEEN = "Pattern number 3 with a moving ball"
LOOPS = [
    "78" * 200,
    "The can is black and white. " * 20,
    f"{SEEN}. The picture shows it. " * 15,
    "A ball moves. " + " ".join(f"{number}%" for number in range(1, 100)),
    f"A {SEEN}: " + "the ball is black and white and " * 25,
    "一个红色的球在移动。" * 12,
    "red " * 30,
    "The ball moves left. " * 3,
    "A ball, a ball, a ball, a ball, a ball, a ball, a ball, a ball",
    "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen",
    " ".join(f"At {number} s the ball is at {10 * number}." for number in range(1, 6)),
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "!" * 50,
    "ha" * 20,
    "A dog runs. " + "🔥" * 40,
    "and then " * 10,
    "The scene is calm" + " and the scene is calm" * 4,
    " ".join(f"Frame {number}: the ball moves." for number in range(1, 6)),
    ", ".join(f"0.{number}" for number in range(1, 17)),
    "The cat sits. The dog sits. The cat sits on the mat. The dog sits on the mat. " * 6,
    "A dog runs along the wide beach in the evening light, and a man follows it slowly. " * 2,
]
DESCRIPTIONS = """
A red ball moves left, then right, then left, then right, then left across a wooden table in the light of the evening.
The clock counts down: ten, nine, eight, seven, six, five, four, three, two, one, and the rocket lifts off.
Three signs say STOP, STOP and STOP. The first sign hangs on the left, the second sign in the middle, the third right.
A neon sign reads HA HA HA HA above a bar; people laugh.
A scoreboard shows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, and a crowd cheers.
very very very tall tower
一只红色的狗在宽阔的海滩上奔跑，傍晚的阳光照在它的毛上，镜头从侧面慢慢地跟随着它，背景是平静的大海。
Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily, a child sings on a lake.
A man knocks, knocks, knocks on the door. Knock, knock, knock.
The small wheel turns, the large wheel turns, the belt turns, and the shaft turns slowly in a dim workshop.
"""


@pytest.mark.parametrize("text", LOOPS, ids=lambda text: text[:30])
def test_a_loop_is_found(text):
    assert repetition(text)


@pytest.mark.parametrize("text", DESCRIPTIONS.strip().splitlines())
def test_a_description_with_a_little_repetition_is_not_a_loop(text):
    assert repetition(text) == ""


def test_captions_of_the_toy_dataset_are_not_loops():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert repetition(world.write_caption(world.sample_attributes(rng), rng)) == ""


def test_the_repeated_words_are_quoted():
    assert repetition("A dog. " + "The sky is wide and blue. " * 5) == "the sky is wide and blue"


def test_a_long_text_is_checked_quickly():
    assert repetition("ab " * 1_000_000)
    assert repetition(" ".join(f"w{number}x" for number in range(100_000))) == ""
