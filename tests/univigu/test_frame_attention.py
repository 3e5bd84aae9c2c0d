"""Which frames the tokens of a caption attend to, with the bundled model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.cli import chosen_model
from univigu.frame_attention import FrameWatch, attention_weights, read_keys

MODEL = Path(__file__).parents[2] / "model/tiny-univigu"
STEPS = 2


@pytest.fixture(scope="module")
def pipeline():
    return chosen_model.read(MODEL)


@pytest.fixture(scope="module")
def moving():
    """A square that moves, uint8 (9, 32, 32, 3)."""
    frames = np.full((9, 32, 32, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 2 * number : 2 * number + 8] = 220
    return frames


def watch(pipeline, video, steps=STEPS, **settings):
    with FrameWatch(pipeline.transformer, 3, steps) as watch:
        assert watch.attention() is None
        (text,) = pipeline.caption([video], steps, callback_on_step_end=watch, **settings)
    assert watch.done
    return text, watch.attention()


def test_weights_add_up_over_the_frames_and_the_rest_of_the_attention_goes_to_the_text(pipeline, moving):
    text, seen = watch(pipeline, moving)
    assert text == pipeline.caption([moving], STEPS)[0]
    assert seen.weights.shape == (pipeline.transformer.config.text_length, 3)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(len(seen.weights)))
    assert 0 < seen.on_video.min() <= seen.on_video.max() < 1


def test_the_weights_are_those_with_which_the_pass_itself_reads_the_values(pipeline, moving):
    block, inputs, attended = pipeline.transformer.blocks[2], [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: inputs.append(given)),
        block.attn1.to_out[0].register_forward_pre_hook(lambda _, given: attended.append(given[0])),
    ]
    pipeline.caption([moving], STEPS)
    for hook in hooks:
        hook.remove()
    video, text, _, kv_cache, _ = inputs[-1]
    query, video_keys, text_keys = read_keys(block, video, text, kv_cache)
    modulation = (block.text_scale_shift_table + text[1].float()).chunk(6, dim=1)
    _, text_values = block._project(block._normed(text[0], modulation), text[2], False)
    keys, values = torch.cat([video_keys, text_keys]), torch.cat([kv_cache[1][0], text_values[0]])
    read = [attention_weights(query[:, head], keys[:, head]) @ values[:, head] for head in range(query.shape[1])]
    torch.testing.assert_close(torch.cat(read, -1), attended[-1][0], rtol=1e-4, atol=1e-5)


def test_the_frames_of_a_word_depend_on_the_video(pipeline, moving):
    late = moving.copy()
    late[:5] = 40  # nothing is there in the first two latent frames
    (_, seen), (_, other) = watch(pipeline, moving), watch(pipeline, late)
    assert (seen.weights - other.weights).abs().sum(-1).max() > 0.2


def test_with_guidance_the_pass_with_the_video_is_watched(pipeline, moving):
    (_, guided), (_, alone) = watch(pipeline, moving, 1, guidance_scale=1.5), watch(pipeline, moving, 1)
    assert torch.equal(guided.weights, alone.weights)  # in the first step, guidance has not changed the text yet


def test_a_text_in_lockstep_with_its_video_is_watched_too(pipeline):
    asked = {"num_inference_steps": 2, "in_step": True, "seed": [3]}
    with FrameWatch(pipeline.transformer, 3, 2) as watch:
        pipeline.joint("a red seven", callback_on_step_end=watch, **asked)
    torch.testing.assert_close(watch.attention().weights.sum(-1), torch.ones(len(watch.attention().weights)))
