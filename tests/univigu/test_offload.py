"""Offloading in all three tasks.

Without an accelerator the weights wait and run on the same processor. What shows is whether each task reaches every
weight through a hook: group offloading to the disk leaves memory without values.
"""

import numpy as np
import pytest
import torch

from univigu import UniViGUPipeline

CLIP = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
OFFLOADS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "leaves": lambda pipe, folder: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red five", seed=1).frames
    joint = pipeline.joint("a red five", seed=1, caption_guidance_scale=2.0)
    lockstep = pipeline.joint("a red five", seed=1, in_step=True)
    text = pipeline.caption(CLIP) + joint.captions + lockstep.captions
    return [frames, joint.frames, lockstep.frames], text


@pytest.fixture(scope="module")
def expected(speaking_model):
    return sample(UniViGUPipeline.from_pretrained(speaking_model))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_nothing_in_any_task(speaking_model, expected, offload, tmp_path):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    OFFLOADS[offload](pipeline, tmp_path)
    frames, text = sample(pipeline)
    for ours, theirs in zip(frames, expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert text == expected[1]
