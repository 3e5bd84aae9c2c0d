"""diffusers' caches on our blocks: nothing changes at threshold 0, and blocks of a video alone are skipped above."""

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from univigu import UniViGUPipeline
from univigu.errors import ConfigError

STEPS = 6
GIVEN = {"prompt": "a red five", "num_inference_steps": STEPS, "seed": 1}
SKIPPING = {
    "first block": FirstBlockCacheConfig(threshold=10.0),
    "magnitudes": MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
    "taylor": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, use_lite_mode=True),
}


@pytest.fixture(scope="module")
def pipeline(speaking_model):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def _disabled(pipeline):
    yield
    if pipeline.transformer.is_cache_enabled:
        pipeline.transformer.disable_cache()


def count_blocks(pipeline, sample):
    """The result, and how often a block's feed-forward network was called beyond the first block's."""
    calls = []
    hooks = [block.ffn.register_forward_hook(lambda *_: calls.append(1)) for block in pipeline.transformer.blocks[1:]]
    try:
        return sample(), len(calls)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("arguments", [{}, {"text_stream": False}, {"guidance_scale": 1.0}], ids=str)
def test_at_threshold_zero_the_frames_are_the_same(pipeline, arguments):
    plain = pipeline(**GIVEN, **arguments).frames
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    np.testing.assert_allclose(pipeline(**GIVEN, **arguments).frames, plain, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"guidance_scale": 3.0}, {"guidance_scale": 1.0, "text_stream": False}], ids=str)
@pytest.mark.parametrize("name", SKIPPING)
def test_a_cache_skips_blocks_and_leaves_none_behind(pipeline, name, arguments):
    plain = pipeline(**GIVEN, **arguments).frames
    passes = STEPS * (2 if arguments["guidance_scale"] > 1 else 1)  # each branch of guidance has its own cache
    all_calls = passes * (len(pipeline.transformer.blocks) - 1)
    pipeline.transformer.enable_cache(SKIPPING[name])
    runs = [count_blocks(pipeline, lambda: pipeline(**GIVEN, **arguments).frames) for _ in range(2)]
    assert runs[0][1] == runs[1][1] < 0.8 * all_calls
    np.testing.assert_array_equal(runs[0][0], runs[1][0])  # nothing of a run is left for the next
    assert np.isfinite(runs[0][0]).all()
    pipeline.transformer.disable_cache()
    np.testing.assert_array_equal(pipeline(**GIVEN, **arguments).frames, plain)


def test_captions_are_written_without_the_cache(pipeline):
    video = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    plain = pipeline.caption(video, guidance_scale=2.0)
    pipeline.transformer.enable_cache(SKIPPING["first block"])
    assert pipeline.caption(video, guidance_scale=2.0) == plain
    assert pipeline.transformer.is_cache_enabled


def test_joint_skips_blocks_of_the_video_alone(pipeline):
    given = GIVEN | {"text_at": 0.5, "guidance_scale": 1.0}
    (_, plain), all_calls = count_blocks(pipeline, lambda: pipeline.joint(**given, return_dict=False))
    locked = pipeline.joint(**GIVEN, in_step=True, return_dict=False)
    pipeline.transformer.enable_cache(SKIPPING["first block"])
    (frames, texts), calls = count_blocks(pipeline, lambda: pipeline.joint(**given, return_dict=False))
    assert calls < all_calls
    assert np.isfinite(frames).all()
    assert len(texts) == len(plain) == 1
    again = pipeline.joint(**GIVEN, in_step=True, return_dict=False)
    np.testing.assert_array_equal(again[0], locked[0])
    assert again[1] == locked[1]


def test_what_a_cache_would_not_act_on_is_refused(pipeline):
    model = pipeline.transformer
    for config in (PyramidAttentionBroadcastConfig(), FasterCacheConfig(), TaylorSeerCacheConfig()):
        with pytest.raises(ConfigError, match="two streams: use FirstBlockCacheConfig"):
            model.enable_cache(config)
    assert not model.is_cache_enabled
    model.enable_cache(SKIPPING["magnitudes"])
    with pytest.raises(ConfigError, match="can't be enabled"):
        model.enable_cache(SKIPPING["first block"])
    with pytest.raises(ConfigError, match="two parts"):
        pipeline.joint(**GIVEN)
