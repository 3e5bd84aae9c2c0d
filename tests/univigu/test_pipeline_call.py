"""The pipeline called as in diffusers: arguments, outputs, callbacks, and the same frames as WanPipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from univigu import UniViGUPipeline
from univigu.errors import BadInputError

BUNDLED = Path(__file__).parents[2] / "model/tiny-wan"
CLIP = {"num_frames": 9, "height": 32, "width": 32}
PROMPT, OTHER = "a red five", "a blue two"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["bundled", "wan 2.1's layout"])
def base(request, tiny_wan_folder):
    return BUNDLED if request.param == "bundled" else tiny_wan_folder


@pytest.fixture(scope="module")
def pipeline(speaking_model):
    return quiet(UniViGUPipeline.from_pretrained(speaking_model))


def noise(pipeline, count=1, seed=0):
    shape = (count, pipeline.transformer.config.in_channels, 3, *[32 // pipeline.vae.config.scale_factor_spatial] * 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler(**FLOW), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_without_text_the_frames_are_those_of_wan_pipeline(base, scheduler, guidance):
    wan, ours = quiet(WanPipeline.from_pretrained(base)), quiet(UniViGUPipeline.from_wan(base))
    wan.scheduler = ours.scheduler = scheduler
    given = {"negative_prompt": "dark", "guidance_scale": guidance, "num_inference_steps": 5, **CLIP}
    given |= {"latents": noise(ours, 2), "max_sequence_length": 32}
    expected = wan([PROMPT, OTHER], **given).frames
    for size in (1, 2):
        found = ours([PROMPT, OTHER], **given, batch_size=size).frames
        assert found.shape == expected.shape == (2, 9, 32, 32, 3)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    embeds, negative = ours.encode_prompt([PROMPT, OTHER], "dark", max_sequence_length=32)
    encoded = given | {"negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    np.testing.assert_allclose(ours(**encoded).frames, expected, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_a_trained_text_side_takes_part_unless_it_is_left_out(pipeline, tiny_wan_folder):
    given = {"seed": 1, "guidance_scale": 1.0}
    wan = quiet(UniViGUPipeline.from_wan(tiny_wan_folder, num_inference_steps=3, **CLIP, max_sequence_length=32))
    alone = wan(PROMPT, **given).frames
    np.testing.assert_array_equal(pipeline(PROMPT, **given, text_stream=False).frames, alone)
    assert np.abs(pipeline(PROMPT, **given).frames - alone).max() > 1e-3
    np.testing.assert_array_equal(pipeline(PROMPT, **given, text_stream=True).frames, pipeline(PROMPT, **given).frames)


def test_the_same_generator_gives_the_noise_of_wan_pipeline(base):
    wan, ours = quiet(WanPipeline.from_pretrained(base)), quiet(UniViGUPipeline.from_wan(base))
    ours.scheduler = wan.scheduler
    given = {"num_inference_steps": 2, "max_sequence_length": 32, **CLIP}
    for generator in (
        lambda: torch.Generator().manual_seed(7),
        lambda: [torch.Generator().manual_seed(i) for i in (3, 4)],
    ):
        expected = wan([PROMPT, OTHER], generator=generator(), guidance_scale=1.0, **given).frames
        np.testing.assert_allclose(
            ours([PROMPT, OTHER], generator=generator(), guidance_scale=1.0, **given).frames, expected, atol=1e-4
        )


def test_frames_come_in_the_types_of_diffusers(pipeline):
    frames = {
        kind: pipeline(PROMPT, seed=3, output_type=kind).frames for kind in ("np", "pt", "pil", "uint8", "latent")
    }
    floats = frames["np"]
    assert (floats.shape, floats.dtype) == ((1, 9, 32, 32, 3), np.float32)
    assert floats.min() >= 0
    assert floats.max() <= 1
    np.testing.assert_array_equal(frames["pt"].numpy(), floats.transpose(0, 1, 4, 2, 3))
    np.testing.assert_array_equal(frames["uint8"], (floats * 255).round().astype(np.uint8))
    assert len(frames["pil"]) == 1
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in frames["pil"][0]]), frames["uint8"][0])
    assert frames["latent"].shape == noise(pipeline).shape
    (alone,) = pipeline(PROMPT, seed=3, return_dict=False)
    np.testing.assert_array_equal(alone, floats)
    np.testing.assert_array_equal(pipeline.generate(PROMPT, seed=3), frames["uint8"])


def test_calls_differ_unless_a_seed_or_a_generator_is_given(pipeline):
    assert not np.array_equal(pipeline(PROMPT).frames, pipeline(PROMPT).frames)
    one, two = (pipeline(PROMPT, generator=torch.Generator().manual_seed(5)).frames for _ in range(2))
    np.testing.assert_array_equal(one, two)
    torch.manual_seed(5)
    np.testing.assert_array_equal(pipeline(PROMPT).frames, one)


def test_several_videos_of_a_prompt_differ(pipeline):
    frames = pipeline([PROMPT, OTHER], num_videos_per_prompt=2, seed=3).frames
    assert len(frames) == 4
    np.testing.assert_allclose(frames[1], pipeline(PROMPT, seed=4).frames[0], atol=1e-4)
    np.testing.assert_allclose(frames[2], pipeline(OTHER, seed=5).frames[0], atol=1e-4)


def test_a_negative_prompt_changes_guided_videos_alone(pipeline):
    plain = pipeline(PROMPT, seed=0).frames
    np.testing.assert_array_equal(pipeline(PROMPT, negative_prompt="", seed=0).frames, plain)
    assert np.abs(pipeline(PROMPT, negative_prompt=OTHER, seed=0).frames - plain).max() > 1e-4
    unguided = {"seed": 0, "guidance_scale": 1.0}
    np.testing.assert_array_equal(
        pipeline(PROMPT, negative_prompt=OTHER, **unguided).frames, pipeline(PROMPT, **unguided).frames
    )
    # as in diffusers, a guidance of 0 is no guidance
    np.testing.assert_array_equal(
        pipeline(PROMPT, seed=0, guidance_scale=0.0).frames, pipeline(PROMPT, **unguided).frames
    )


def test_encoded_prompts_replace_the_text_encoder(pipeline, speaking_model):
    embeds, empty = pipeline.encode_prompt(PROMPT)
    without = quiet(UniViGUPipeline.from_pretrained(speaking_model, text_encoder=None))
    assert without.text_encoder is None
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": empty}
    np.testing.assert_array_equal(without(PROMPT, **given, seed=1).frames, pipeline(PROMPT, seed=1).frames)
    # alone, they leave the text beside the video unknown
    assert np.abs(without(**given, seed=1).frames - pipeline(PROMPT, seed=1).frames).max() > 1e-4
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    assert without.caption(clip, prompt_embeds=empty) == pipeline.caption(clip)
    joint = without.joint(**given, seed=1, text_at=1.0)
    assert joint.captions == pipeline.joint(PROMPT, seed=1, text_at=1.0).captions
    with pytest.raises(BadInputError, match="no text encoder: give `prompt_embeds`"):
        without(PROMPT)
    with pytest.raises(BadInputError, match="no text encoder"):
        without.caption(clip)


def test_a_callback_sees_each_step_and_may_change_it(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep), 3), sorted(tensors), pipe.num_timesteps))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "text_latents"]
    given = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names, "num_inference_steps": 4}
    frames = pipeline([PROMPT, OTHER], seed=0, shift=1.0, **given).frames
    np.testing.assert_array_equal(frames, pipeline([PROMPT, OTHER], seed=0, shift=1.0, num_inference_steps=4).frames)
    assert [one[:2] for one in seen] == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)] * 2
    assert {(tuple(one[2]), one[3]) for one in seen} == {(tuple(sorted(names)), 4)}

    fixed = noise(pipeline, seed=9)
    replace = {"callback_on_step_end": lambda *_: {"latents": fixed}, "output_type": "latent"}
    assert torch.equal(pipeline(PROMPT, **replace).frames, fixed)
    embeds, _ = pipeline.encode_prompt(OTHER)
    changed = pipeline(PROMPT, seed=0, callback_on_step_end=lambda *_: {"prompt_embeds": embeds}).frames
    assert np.abs(changed - pipeline(PROMPT, seed=0).frames).max() > 1e-4


def test_a_callback_may_end_a_call_and_its_guidance(pipeline):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 0
        return tensors

    given = {"latents": noise(pipeline), "seed": 0}  # the seed decides the text's noise in the branch without text
    short = pipeline(PROMPT, **given, callback_on_step_end=stop, output_type="latent").frames
    kept = []
    keep = {"callback_on_step_end": lambda _, step, time, tensors: kept.append(tensors["latents"])}
    pipeline(PROMPT, **given, **keep)
    assert torch.equal(short, kept[0])
    assert not torch.equal(short, kept[1])

    cut = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0), "seed": 0}
    cut = pipeline([PROMPT, OTHER], **cut).frames
    guided, plain = (pipeline([PROMPT, OTHER], seed=0, guidance_scale=scale).frames for scale in (2.0, 1.0))
    for i in range(2):
        assert np.abs(cut[i] - guided[i]).max() > 1e-4
        assert np.abs(cut[i] - plain[i]).max() > 1e-4


def test_a_caption_that_a_callback_ended_leaves_the_next_one_whole(pipeline):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    latents = noise(pipeline)
    whole = pipeline.caption_latents(latents, seed=[0])
    steps = []
    pipeline.caption_latents(latents, seed=[0], callback_on_step_end=stop)
    again = pipeline.caption_latents(
        latents, seed=[0], callback_on_step_end=lambda _, step, *__: steps.append(step) or {}
    )
    assert len(steps) == pipeline.config.caption_steps
    assert again == whole


@pytest.mark.parametrize("in_step", [False, True])
def test_joint_takes_the_same_kinds_of_arguments(pipeline, in_step):
    output = pipeline.joint(PROMPT, seed=2, in_step=in_step)
    assert (output.frames.shape, output.frames.dtype) == ((1, 9, 32, 32, 3), np.float32)
    assert len(output.captions) == 1
    frames, captions = pipeline.joint(PROMPT, seed=2, in_step=in_step, return_dict=False, output_type="pil")
    assert (len(frames[0]), captions) == (9, output.captions)
    steps = []
    names = ["latents", "text_latents", "prompt_embeds"]
    given = {"callback_on_step_end": lambda _, step, time, tensors: steps.append((step, tensors))}
    given |= {"callback_on_step_end_tensor_inputs": names, "latents": noise(pipeline), "in_step": in_step}
    given["text_latents"] = torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(1))
    one = pipeline.joint(PROMPT, **given)
    assert [step for step, _ in steps] == list(range(3 if in_step else 6))  # 3 steps of the video, 3 of the text
    assert all(tensors[name] is not None for _, tensors in steps for name in names[:2])
    again = pipeline.joint(PROMPT, **(given | {"callback_on_step_end": None}))
    np.testing.assert_array_equal(one.frames, again.frames)
    assert one.captions == again.captions
    other = given | {"text_latents": given["text_latents"].flip(1), "callback_on_step_end": None}
    assert pipeline.joint(PROMPT, **other).captions != one.captions
    negative = pipeline.joint(PROMPT, **given, negative_prompt=OTHER)
    assert np.abs(negative.frames - one.frames).max() > 1e-4


def test_captions_take_noise_and_a_callback(pipeline):
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    (expected,) = pipeline.caption(clip)
    steps = []
    watch = {"callback_on_step_end": lambda _, step, time, tensors: steps.append((step, tensors["text_latents"].shape))}
    assert pipeline.caption(clip, **watch) == [expected]
    assert steps == [(i, (1, 48, 16)) for i in range(3)]
    noise = torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(1))
    assert pipeline.caption(clip, text_latents=noise) != [expected]
    # what the pipeline returns can be captioned as it is
    frames = pipeline(PROMPT, seed=0).frames[0]
    assert pipeline.caption(frames) == pipeline.caption(pipeline.generate(PROMPT, seed=0)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_frames": 50}, "such as 49 or 53"),
        ({"output_type": "gif"}, "no output_type 'gif'"),
        ({"prompt": None}, "no prompt: give `prompt`, or"),
        ({"prompt_embeds": torch.zeros(1, 4, 7)}, "make it with `encode_prompt`"),
        ({"prompt_embeds": torch.zeros(2, 4, 32)}, "differ in number"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 32)}, "give one of them"),
        ({"latents": torch.zeros(1, 5, 3, 8, 8)}, "give noise"),
        ({"latents": torch.zeros(2, 4, 3, 8, 8)}, "latents of 2 videos for 1 prompts"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"generator": torch.Generator(), "seed": 1}, "give one of them"),
        ({"num_videos_per_prompt": 0}, "1 or more"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "can't be given 'noise'"),
    ],
)
def test_unusable_arguments_are_refused_in_one_sentence(pipeline, wrong, message):
    with pytest.raises(BadInputError, match=message) as caught:
        pipeline(**({"prompt": PROMPT} | wrong))
    assert "\n" not in str(caught.value)
