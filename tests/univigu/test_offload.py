"""Offloading in all three tasks, and in the measure of a caption.

Without an accelerator the weights wait and run on the same processor. What shows is whether each task reaches every
weight through a hook: sequential offloading leaves weights on the meta device, and group offloading to the disk leaves
memory without values.
"""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from univigu import UniViGUPipeline
from univigu.confidence import measure
from univigu.errors import BadInputError

CLIP = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
CPU = torch.device("cpu")


def offload_each_layer(pipeline, folder):
    """What diffusers' `enable_sequential_cpu_offload` does, on the device `cpu` in place of `cpu:0`."""
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
    assert pipeline.transformer.device.type == "meta"


def to_disk(**how):
    # leaf by leaf, diffusers loses the token table, which two layers of the text encoder share
    how |= {"exclude_modules": "text_encoder"}
    return lambda pipe, folder: pipe.enable_group_offload(CPU, offload_to_disk_path=str(folder), **how)


OFFLOADS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(),
    "sequential": offload_each_layer,
    "blocks": lambda pipe, folder: pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaves": lambda pipe, folder: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "blocks to the disk": to_disk(offload_type="block_level", num_blocks_per_group=1),
    "leaves to the disk": to_disk(offload_type="leaf_level"),
}


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red five", seed=1).frames
    joint = pipeline.joint("a red five", seed=1, caption_guidance_scale=2.0)
    lockstep = pipeline.joint("a red five", seed=1, in_step=True)
    text = pipeline.caption(CLIP) + joint.captions + lockstep.captions
    return [frames, joint.frames, lockstep.frames], text, measure(pipeline, [CLIP], text[:1], [0])


@pytest.fixture(scope="module")
def expected(speaking_model):
    return sample(UniViGUPipeline.from_pretrained(speaking_model))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_nothing_in_any_task(speaking_model, expected, offload, tmp_path):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    OFFLOADS[offload](pipeline, tmp_path)
    frames, *rest = sample(pipeline)
    for ours, theirs in zip(frames, expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert rest == [*expected[1:]]


@pytest.mark.parametrize("offload", [name for name in OFFLOADS if name != "model"])
def test_whether_the_text_side_is_trained_is_known_when_its_weights_are_elsewhere(tiny_wan_folder, offload, tmp_path):
    pipeline = UniViGUPipeline.from_wan(tiny_wan_folder)
    assert not pipeline._is_text_side_trained()
    OFFLOADS[offload](pipeline, tmp_path)
    assert not pipeline._is_text_side_trained()


def test_an_adapter_can_be_loaded_after_offloading(speaking_model, expected):
    generator = torch.Generator().manual_seed(0)
    adapter = {
        f"transformer.blocks.{block}.attn1.to_q.lora_{name}.weight": torch.randn(size, generator=generator)
        for block in range(2)
        for name, size in {"A": (2, 24), "B": (24, 2)}.items()
    }
    found = []
    for offloaded in (False, True):
        pipeline = UniViGUPipeline.from_pretrained(speaking_model)
        if offloaded:
            pipeline.enable_model_cpu_offload()
        pipeline.load_lora_weights(adapter)
        found.append(sample(pipeline))
    assert hasattr(pipeline.transformer, "_hf_hook")
    np.testing.assert_allclose(found[1][0][0], found[0][0][0], atol=1e-4)
    assert found[1][1:] == found[0][1:]
    assert np.abs(found[0][0][0] - expected[0][0]).max() > 1e-3


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what a machine without an accelerator says")
@pytest.mark.parametrize("given", [{}, {"device": "cpu"}])
def test_sequential_offloading_without_an_accelerator_is_refused_in_one_sentence(speaking_model, given):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    with pytest.raises(BadInputError, match="needs an accelerator, and there is none") as caught:
        pipeline.enable_sequential_cpu_offload(**given)
    assert "\n" not in str(caught.value)
