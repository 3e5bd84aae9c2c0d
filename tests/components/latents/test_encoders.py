"""The encoders of a base: a sample's tensors depend on the sample alone."""

from pathlib import Path

import pytest
import torch

from components.digits import benchmark
from components.latents.encoders import Encoders

ROOT = Path(__file__).parents[3]
TEXTS = [f"a {colour} {digit} goes left" for colour in ("red", "green", "blue") for digit in ("six", "two", "nine")]


@pytest.fixture
def encoders():
    yield Encoders(ROOT / "model/tiny-wan", "fp32", 16, 32)
    torch.set_num_threads(1)


def test_the_number_of_cores_changes_no_bit(encoders):
    items = benchmark.load_heldout(ROOT / "data/heldout.json")["captions"][:29]
    clips = [torch.from_numpy(frames) for frames in benchmark.render(items)]
    found = []
    for cores in (1, 2, 3):
        torch.set_num_threads(cores)
        made = [encoders.encode_clips(clips[:count]) for count in (5, 13, 29)]
        made += [encoders.encode_texts(prompts) for prompts in ([""], TEXTS * 2)]
        found.append([tensor for batch in made for tensor in batch])
    assert len(found[0]) == 5 + 13 + 29 + 1 + 18
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other, strict=True))


def test_clips_and_texts_keep_their_order_over_parts(encoders):
    clips = [torch.full((9, 32, 32, 3), 6 * n, dtype=torch.uint8) for n in range(33)]
    together = encoders.encode_clips(clips)
    for n in (0, 16, 32):
        (alone,) = encoders.encode_clips([clips[n]])
        assert torch.allclose(together[n].float(), alone.float(), atol=2e-2)
    lengths = [len(encoders.encode_texts([text])[0]) for text in TEXTS]
    assert [len(states) for states in encoders.encode_texts(TEXTS * 3)] == lengths * 3
