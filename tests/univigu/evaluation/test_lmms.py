"""The model class for lmms-eval, called as lmms-eval calls it.

lmms-eval pins PyAV below 16, so it isn't in the project's environment, and these tests are skipped there. In one with
both, `pytest --noconftest tests/univigu/evaluation/test_lmms.py` runs them.
"""

from pathlib import Path

import numpy as np
import pytest

from univigu.errors import BadInputError, ConfigError
from univigu.video import encode_mp4

models = pytest.importorskip("lmms_eval.models")
REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model():
    found = models.get_model("univigu")  # by the entry point
    return found.create_from_arg_string(f"pretrained={REPO / 'model/tiny-univigu'},seed=3", {"batch_size": 1})


def request(model, media):
    """A request of a task with one document, as `ConfigurableMessagesTask.construct_requests` builds it."""
    from lmms_eval.api.instance import Instance

    content = [*media, {"type": "text", "text": "Describe the video."}]
    model.task_dict["captions"] = {"test": [{"content": content}]}

    def messages(document):
        return [{"role": "user", "content": document["content"]}]

    arguments = ("Describe the video.", messages, {"max_new_tokens": 64}, 0, "captions", "test")
    return Instance("generate_until", arguments, 0, {"task": "captions", "doc_id": 0, "repeats": 1})


def test_a_request_gets_the_caption_of_its_video(model, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(frames, 8))
    (tmp_path / "bad.mp4").write_bytes(b"This is no video." * 100)
    video = {"type": "video", "url": str(tmp_path / "clip.mp4")}
    (text,) = model.generate_until([request(model, [video])])
    assert text
    assert model.generate_until([request(model, [video])]) == [text]
    bad = {"type": "video", "url": str(tmp_path / "bad.mp4")}
    assert model.generate_until([request(model, [bad])]) == [""]


def test_tasks_that_are_no_captioning_of_videos_are_refused(model):
    with pytest.raises(BadInputError, match="has 0 videos and 0 pictures"):
        model.generate_until([request(model, [])])
    with pytest.raises(ConfigError, match="chooses no answers"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="holds no conversation"):
        model.generate_until_multi_round([])
