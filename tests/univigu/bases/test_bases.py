"""What holds for every kind of base: diffusers' own videos, captions, both jointly, and loading again."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from univigu import ObjectiveConfig, TrainingObjective, UniViGUPipeline, bases, text_space, wan
from univigu.errors import BadInputError, MissingInputError

PROMPT, OTHER = "a red five", "a blue two"
LENGTH = 512  # of the condition: in diffusers, what is beyond it is an image's
KINDS = ["ti2v", "i2v"]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def folder(request, ti2v_folder, i2v_folder):
    return {"ti2v": ti2v_folder, "i2v": i2v_folder}[request.param]


@pytest.fixture(scope="module")
def ours(folder):
    return quiet(UniViGUPipeline.from_wan(folder))


@pytest.fixture(scope="module")
def spoken(folder):
    """The same with a random text head, so that every input has an effect on its text."""
    size = 64 if "ti2v" in folder.name else 32
    settings = {"num_frames": 9, "height": size, "width": size, "num_inference_steps": 2, "caption_steps": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipeline = quiet(UniViGUPipeline.from_wan(folder, **settings, max_sequence_length=24, text_length=12))
        torch.nn.init.normal_(pipeline.transformer.text_head.proj_out.weight, std=3.0)
    return pipeline


def call(pipeline, frames=9, count=2):
    """A small video of the pipeline, from given noise."""
    space, time = pipeline.vae.config.scale_factor_spatial, pipeline.vae.config.scale_factor_temporal
    size = 4 * space
    shape = (count, pipeline.vae.config.z_dim, (frames - 1) // time + 1, 4, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = {"num_frames": frames, "height": size, "width": size, "num_inference_steps": 3, "negative_prompt": "dark"}
    return given | {"max_sequence_length": LENGTH, "latents": latents}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["its own", "Euler"])
def test_frames_after_an_image_are_those_of_diffusers(folder, ours, images, scheduler, guidance):
    theirs = quiet(WanImageToVideoPipeline.from_pretrained(folder))
    if scheduler == "Euler":
        theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    ours.scheduler = theirs.scheduler
    given = call(ours) | {"guidance_scale": guidance}
    expected = theirs(images[0], [PROMPT, OTHER], **given).frames
    for size in (1, 2):
        found = ours([PROMPT, OTHER], image=images[0], **given, batch_size=size).frames
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4)
    other = ours([PROMPT, OTHER], image=images, **given).frames
    np.testing.assert_allclose(other[0], expected[0], atol=1e-4)
    assert np.abs(other[1] - expected[1]).max() > 1e-3
    ours.scheduler = None


def test_an_image_may_be_an_array_or_a_tensor(ours, images):
    given = call(ours, count=1) | {"guidance_scale": 1.0}
    expected = ours(PROMPT, image=images[0], **given).frames
    pixels = np.array(images[0])
    for image in (pixels, pixels / 255, torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1) / 255):
        np.testing.assert_allclose(ours(PROMPT, image=image, **given).frames, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("first.png", "An image must be PIL's"),
        ([], "list of images is empty"),
        (np.zeros((8, 8), np.uint8), "An image must be PIL's"),
        ([Image.new("RGB", (8, 8))] * 3, "3 images for 1 prompts"),
    ],
)
def test_an_unusable_image_is_refused_in_one_sentence(ours, image, message):
    with pytest.raises(BadInputError, match=message) as caught:
        ours(PROMPT, image=image, **call(ours, count=1))
    assert "\n" not in str(caught.value)


def test_text_beside_a_video_takes_part_and_the_image_stays(spoken, images):
    given = {"seed": 1, "guidance_scale": 3.0, "output_type": "latent"}
    alone, beside = (spoken(PROMPT, image=images[0], text_stream=with_text, **given).frames for with_text in (0, 1))
    assert (alone - beside).abs().max() > 1e-3
    without = spoken(PROMPT, text_stream=True, **given).frames
    assert (without - beside).abs().max() > 1e-3


def test_videos_are_captioned_and_made_jointly(spoken, images):
    clips = np.random.default_rng(1).integers(0, 256, (2, 9, *[spoken.config.height] * 2, 3), dtype=np.uint8)
    captions = spoken.caption(clips, guidance_scale=2.0, batch_size=2)
    assert spoken.caption(clips[1], guidance_scale=2.0) == captions[1:]
    latents = 3 * torch.randn(4, *wan.latent_shape(spoken.vae, *clips.shape[1:4]), generator=torch.manual_seed(4))
    assert len(set(spoken.caption_latents(latents, temperature=1.0))) > 1
    assert len(set(spoken.caption_latents(latents, temperature=1.0, video_tau=0.0))) == 1
    for path in ({"text_at": 0.5}, {"in_step": True}):
        for image in (None, images[0]):
            output = spoken.joint(PROMPT, image=image, output_type="uint8", **path)
            assert output.frames.shape == (1, *clips.shape[1:])
            assert len(output.captions) == 1


def test_a_saved_model_is_of_the_same_kind_and_makes_the_same(spoken, images, tmp_path):
    spoken.save_pretrained(tmp_path)
    loaded = quiet(UniViGUPipeline.from_pretrained(tmp_path))
    assert loaded.base is spoken.base
    given = {"seed": 1, "guidance_scale": 3.0, "image": images[0]}
    np.testing.assert_allclose(loaded(PROMPT, **given).frames, spoken(PROMPT, **given).frames, atol=1e-4)


def test_training_gives_no_image_and_leaves_its_weights(spoken):
    shape = wan.latent_shape(spoken.vae, 9, spoken.config.height, spoken.config.width)
    ids = text_space.tokenize(spoken.tokenizer, [PROMPT, OTHER], 12)
    batch = {"latents": torch.randn(2, *shape), "prompt_embeds": torch.randn(2, 6, 32), "prompt_ids": ids}
    batch |= {"empty_embeds": torch.zeros(6, 32), "target_ids": ids, "sample_ids": torch.arange(2)}
    batch["epochs"] = torch.zeros(2, dtype=torch.long)
    objective = TrainingObjective(copy.deepcopy(spoken.transformer), ObjectiveConfig(shares={"joint": 1}))
    objective(batch, 1)["loss"].backward()
    with_gradient = {name for name, value in objective.transformer.named_parameters() if value.grad is not None}
    names = {name for name, _ in spoken.transformer.named_parameters() if not wan.is_image_side(name)}
    assert with_gradient == names


def test_a_base_without_images_refuses_one(tiny_wan_folder, images):
    pipeline = UniViGUPipeline.from_wan(tiny_wan_folder)
    assert pipeline.base is bases.wan_t2v.BASE
    with pytest.raises(BadInputError, match="is Wan text-to-video, which takes no image") as caught:
        pipeline(PROMPT, image=images[0], num_frames=5, height=16, width=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["a second transformer", "a boundary"])
def test_wan_2_2_of_two_experts_is_refused_in_one_sentence(folder, part, tmp_path):
    two = shutil.copytree(folder, tmp_path / "two")
    if part == "a boundary":
        index = two / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.9}))
    else:
        shutil.copytree(two / "transformer", two / "transformer_2")
    with pytest.raises(BadInputError, match="two transformers, one for the high noise levels") as caught:
        UniViGUPipeline.from_wan(two)
    assert "\n" not in str(caught.value)


def test_an_image_to_video_folder_without_clip_is_incomplete(i2v_folder, tmp_path):
    shutil.copytree(i2v_folder, tmp_path / "part", ignore=shutil.ignore_patterns("image_*"))
    with pytest.raises(MissingInputError, match="no image_encoder and no image_processor"):
        UniViGUPipeline.from_wan(tmp_path / "part")


def test_a_base_of_a_first_and_a_last_image_is_refused(i2v_folder, tmp_path):
    both = shutil.copytree(i2v_folder, tmp_path / "both")
    config = both / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_seq_len": 514}))
    with pytest.raises(BadInputError, match="not on a first one alone"):
        UniViGUPipeline.from_wan(both)


def test_wan_pipeline_and_ours_make_the_same_from_text_alone(ti2v_folder):
    """Wan2.2 TI2V: one model for both tasks."""
    theirs, ours = quiet(WanPipeline.from_pretrained(ti2v_folder)), quiet(UniViGUPipeline.from_wan(ti2v_folder))
    assert ours.base is bases.wan_ti2v.BASE
    assert (ours.config.num_frames, ours.config.fps, ours.config.shift) == (121, 24.0, 5.0)
    for scheduler in (theirs.scheduler, FlowMatchEulerDiscreteScheduler(shift=5.0)):
        theirs.scheduler = ours.scheduler = scheduler
        for guidance in (1.0, 4.0):
            given = call(ours) | {"guidance_scale": guidance}
            expected = theirs([PROMPT, OTHER], **given).frames
            np.testing.assert_allclose(ours([PROMPT, OTHER], **given).frames, expected, atol=1e-4)
