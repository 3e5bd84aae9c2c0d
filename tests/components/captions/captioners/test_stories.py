"""The captioner of stories says what the frames show, in words of its own for every clip and attempt."""

from dataclasses import replace

import numpy as np
import pytest

from components.captions.captioners import CaptionRequest, load_captioner
from components.captions.captioners.stories import decide
from components.digits.measure import Measurement
from components.digits.stories.reader import read
from components.digits.worlds import STORIES


@pytest.fixture(scope="module")
def drawn():
    return STORIES.draw_clips(40, 9)


def test_captions_are_true_and_differ_from_clip_to_clip_and_from_attempt_to_attempt(drawn):
    clips, scenes = drawn
    captioner = load_captioner("stories", {"seed": 0, "batch_size": 8})
    rng = np.random.default_rng(0)
    requests = [
        CaptionRequest(str(i), "", lambda: (clips[0], 8.0), STORIES.write_prompt(scene, rng), (40, 96))
        for i, scene in enumerate(scenes)
    ]
    opened = [(clip, 8.0) for clip in clips]
    captions = [response.text for response in captioner.answer(requests, opened)]
    assert all(read(text).whole for text in captions)
    true = [
        read(text).claims == {k: {v} for k, v in scene.items()} for text, scene in zip(captions, scenes, strict=True)
    ]
    assert np.mean(true) > 0.9
    assert captions == [response.text for response in captioner.answer(requests, opened)]
    again = captioner.answer([replace(request, attempt=2) for request in requests], opened)
    assert all(one != other.text for one, other in zip(captions, again, strict=True))


def test_the_frames_decide_where_they_are_clear_and_then_the_prompt():
    scene = {"background": "white"}
    for colour, place in (("red", "top"), ("blue", "bottom")):
        scene |= {f"digit:{colour}": "two", f"place:{colour}": place, f"first:{colour}": "stands"}
        scene |= {f"then:{colour}": "goes left slow"}
    clear = {name: Measurement(value, 1.0) for name, value in scene.items()}
    asked = {"digit:red": {"three"}, "then:red": {"goes right slow"}}
    assert decide(clear, asked)["digit:red"] == "two"
    unclear = {**clear, "digit:red": Measurement("two", 0.4), "then:red": Measurement("goes left slow", 0.1)}
    found = decide(unclear, asked)
    assert (found["digit:red"], found["then:red"], found["side"]) == ("three", "goes right slow", "red above blue")
    assert decide({**clear, "then:red": Measurement("goes up slow", 1.0)}, {}) is None  # out of the frame
