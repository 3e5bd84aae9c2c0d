import subprocess
import sys

import numpy as np
import pytest

from components.digits import world
from components.prompts import duplicates as prompt_duplicates
from components.prompts import filters
from components.prompts.duplicates import PERMUTATIONS, RECALL, NearDuplicates, bands, fingerprints
from univigu.errors import ConfigError


def find(texts, threshold=0.9, min_features=48):
    """The match of each text in order, or None."""
    near = NearDuplicates(threshold)
    return [near.find(fingerprint) for fingerprint in fingerprints(texts, min_features)]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a red seven on a black background", "A RED SEVEN, on the black background!"),
        ("a red seven on a black background", "on a black background, a red seven"),
        ("a blue two moving left", "please: a blue two - moving left"),
        ("slow seven, grey background, moving left", "moving left; slow seven; grey background"),
        ("the", "The"),
        (" ".join(f"word{i}" for i in range(60)), " ".join(f"word{i}" for i in range(61))),
        ("一位老妇人，在雨中慢慢地走着", "在雨中慢慢地走着。一位老妇人"),
        ("كلب أسود، تحت المطر", "تحت المطر: كلب أسود!"),
    ],
)
def test_texts_with_the_same_content_are_near_duplicates(left, right):
    first, second = find([left, right])
    assert first is None
    assert second.id == filters.text_id(left)


def test_prompts_with_different_content_words_are_no_near_duplicates():
    different = [
        ("a red seven", "a blue seven"),
        ("a seven from the left to the right", "a seven from the right to the left"),
        ("a dog chases a cat", "a cat chases a dog"),
        ("a red car on a blue road", "a blue car on a red road"),
        ("a red red seven", "a red seven"),
        ("a red 🐶 on white", "a red 🐱 on white"),
        ("一只黑狗追一只白猫", "一只白猫追一只黑狗"),
        ("एक लाल कार", "एक लला कार"),
        ("الكلب يطارد القط", "القط يطارد الكلب"),
        ("แมวไล่หมา", "หมาไล่แมว"),
    ]
    rng = np.random.default_rng(3)
    for _ in range(200):
        attributes = world.sample_attributes(rng)
        other = {**attributes, "colour": "pink" if attributes["colour"] != "pink" else "red"}
        seed = int(rng.integers(1 << 30))
        pair = tuple(world.write_prompt(one, np.random.default_rng(seed)) for one in (attributes, other))
        different += [pair] if world.read_text(pair[0]) != world.read_text(pair[1]) else []
    assert len(different) > 150
    for left, right in different:
        assert find([left, right]) == [None, None], (left, right)


def texts_with_a_changed_word(count, words):
    """Texts, each followed by a copy with one word changed."""
    rng = np.random.default_rng(2)
    vocabulary = [f"word{i}" for i in range(400)]
    texts = []
    for _ in range(count):
        text = list(rng.choice(vocabulary, words))
        texts.append(" ".join(text))
        text[int(rng.integers(words))] = "changed"
        texts.append(" ".join(text))
    return texts


@pytest.mark.parametrize(("threshold", "words"), [(0.9, 40), (0.8, 20), (0.7, 12)])
def test_near_duplicates_are_those_with_a_high_exact_jaccard(threshold, words):
    texts = texts_with_a_changed_word(100, words)
    found = {number for number, alike in enumerate(find(texts, threshold, min_features=1)) if alike}
    kept, exact = [], set()
    for number, features in enumerate(filters.content_features(filters.content_phrases(text)) for text in texts):
        if any(len(features & other) / len(features | other) >= threshold for other in kept):
            exact.add(number)
        else:
            kept.append(features)
    assert len(exact) == 100
    assert found <= exact
    assert len(found) >= 0.95 * len(exact)


def test_the_most_similar_text_is_named_with_its_jaccard():
    words = [f"word{i}" for i in range(60)]
    far, near = ["x", "y", "z", *words[3:]], [*words[:58], "p", "q"]
    found = find([" ".join(far), " ".join(near), " ".join(words)])
    assert found[:2] == [None, None]
    assert found[2].id == filters.text_id(" ".join(near))
    assert found[2].jaccard == pytest.approx(115 / 123)


def test_short_texts_that_differ_in_a_word_are_no_near_duplicates():
    short = "a red seven on a black background moving left"
    assert find([short, f"{short} quickly"], threshold=0.5) == [None, None]
    assert find([short, f"{short} quickly"], threshold=0.5, min_features=1)[1]


def test_a_large_cluster_of_similar_texts_does_not_fill_the_index(monkeypatch):
    monkeypatch.setattr(prompt_duplicates, "CANDIDATES", 8)
    rest = " ".join(f"word{i}" for i in range(60))
    texts = [f"one{i} two{i} three{i} {rest}" for i in range(100)]  # a Jaccard of about 0.91 each, below the threshold
    near = NearDuplicates(0.95)
    assert [near.find(each) for each in fingerprints(texts, 48)] == [None] * 100
    assert len(near.ids) + near.left_out == 100
    assert len(near.ids) < 50
    assert near.find(fingerprints([texts[99].upper()], 48)[0]).id == filters.text_id(texts[99])


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_an_invalid_threshold_is_refused(threshold):
    with pytest.raises(ConfigError, match="near_duplicate_jaccard"):
        NearDuplicates(threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_the_bands_find_enough_of_the_pairs_at_the_threshold(threshold):
    count = bands(threshold)
    assert 1 - (1 - threshold ** (PERMUTATIONS / count)) ** count >= RECALL
    wider = count // 2
    assert not wider or 1 - (1 - threshold ** (PERMUTATIONS / wider)) ** wider < RECALL


def test_fingerprints_do_not_depend_on_the_batch_or_the_process():
    texts = texts_with_a_changed_word(20, 40)
    alone = [fingerprint for text in texts for fingerprint in fingerprints([text], 48)]
    together = fingerprints(texts, 48)
    assert [each[:3] for each in alone] == [each[:3] for each in together]
    assert [each.sketch.digest() for each in alone] == [each.sketch.digest() for each in together]
    code = (
        "import sys; from components.prompts.duplicates import fingerprints; "
        "print(*[n for f in fingerprints([sys.argv[1]], 48) for n in (*f.content, *f.features, *f.sketch.digest())])"
    )
    done = subprocess.run([sys.executable, "-c", code, texts[0]], capture_output=True, text=True, check=True)
    one = together[0]
    assert done.stdout.split() == [str(n) for n in (*one.content, *one.features, *one.sketch.digest())]
