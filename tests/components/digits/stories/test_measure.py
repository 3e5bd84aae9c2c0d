"""Measured facts are those of the scene; what isn't clear has little confidence."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from components.checks import stories as check
from components.digits import world
from components.digits.stories import measure
from components.digits.stories.reader import read
from components.digits.worlds import STORIES
from univigu.errors import BadInputError


@pytest.fixture(scope="module")
def drawn():
    return STORIES.draw_clips(120, 5, world.heldout_scans())


def share_right(clips, scenes):
    right: dict[str, list[bool]] = {}
    for scene, seen in zip(scenes, measure.measure(clips), strict=True):
        facts = measure.facts_of(seen)
        for name, value in scene.items():
            right.setdefault(name.partition(":")[0], []).append(facts.get(name) == value)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


def test_clean_clips_are_measured_without_error_but_for_rare_digits(drawn):
    right = share_right(*drawn)
    assert right.pop("digit") > 0.95
    assert set(right.values()) == {1.0}


def test_above_the_thresholds_nearly_everything_is_right_on_blurred_and_noisy_clips(drawn):
    clips, scenes = drawn
    x = torch.from_numpy(clips.astype(np.float32)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    noise = 10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x = 0.6 * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) + 0.4 * x + noise
    spoilt = x.reshape(len(clips), world.FRAMES, 3, world.SIZE, world.SIZE).permute(0, 1, 3, 4, 2)
    clear: dict[str, list[bool]] = {}
    for scene, seen in zip(scenes, measure.measure(spoilt.clamp(0, 255).round().to(torch.uint8).numpy()), strict=True):
        for name, found in seen.items():
            if check.is_clear(name, found):
                clear.setdefault(name.partition(":")[0], []).append(scene.get(name, "") == found.value)
    shares = {kind: np.mean(hits) for kind, hits in clear.items()}
    assert min(shares.values()) > 0.95, shares
    assert min(len(hits) for hits in clear.values()) > 100


def test_a_blank_clip_shows_nothing_with_confidence(drawn):
    seen = measure.measure(np.full((1, world.FRAMES, world.SIZE, world.SIZE, 3), 246, np.uint8))[0]
    assert seen.pop("background").value == "white"
    assert max(found.confidence for found in seen.values()) == 0
    with pytest.raises(BadInputError):
        measure.measure(drawn[0][:, :5])


def test_a_clip_is_kept_for_its_own_prompt_and_not_for_another(drawn):
    clips, scenes = drawn
    rng = np.random.default_rng(1)
    prompts = [STORIES.write_prompt(scene, rng) for scene in scenes]
    kept = [f.reason is None for f in check.check(clips, [{"prompt": prompt} for prompt in prompts], {})]
    assert np.mean(kept) > 0.97
    swapped = [{"prompt": prompt} for prompt in prompts[1:] + prompts[:1]]
    assert np.mean([f.reason is None for f in check.check(clips, swapped, {})]) < 0.03


def test_a_caption_must_state_what_its_prompt_states_and_be_of_the_grammar(drawn):
    rng = np.random.default_rng(2)
    for scene in drawn[1]:
        prompt, caption = STORIES.write_prompt(scene, rng), STORIES.write_caption(scene, rng)
        assert check.check_caption(prompt, caption) is None
        assert "grammar" in check.check_caption(prompt, f"{caption} A dog runs.")
    fact = next(iter(read(prompt).claims))
    assert fact in check.check_caption(prompt, "")
