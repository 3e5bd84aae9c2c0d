"""What one sample needs on one GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.pipeline.profiles import load_profile
from components.planning.inference import autoencoder_peak, make_inference_plan
from components.planning.meta_models import build_models
from univigu import wan
from univigu.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plans():
    profile = load_profile("tiny")
    return {task: make_inference_plan(profile, ROOT, task, "h100") for task in ("caption", "generate", "joint")}


@pytest.mark.slow
def test_a_joint_sample_is_a_video_and_a_text_and_needs_the_most_of_both(plans):
    caption, video, joint = (plans[task] for task in ("caption", "generate", "joint"))
    assert joint["memory"]["phases"] == caption["memory"]["phases"] | video["memory"]["phases"]
    totals = [plan["memory"]["totals"]["all models on the GPU"] for plan in (caption, video, joint)]
    assert totals[2] == max(totals[:2])
    assert joint["seconds"]["total"][0] > caption["seconds"]["total"][0] + video["seconds"]["total"][0]


@pytest.mark.slow
def test_the_time_of_each_part_is_a_range_that_an_mfu_of_your_own_closes(plans):
    for span in plans["joint"]["seconds"].values():
        assert span[0] <= span[1]
    assert plans["joint"]["seconds"]["denoising the video"][0] < plans["joint"]["seconds"]["denoising the video"][1]
    one = make_inference_plan(load_profile("tiny"), ROOT, "caption", "h100", mfu=0.2)
    assert all(first == last for first, last in one["seconds"].values())


@pytest.mark.slow
def test_offloading_leaves_the_text_encoder_out_of_the_peak(plans):
    memory = plans["caption"]["memory"]
    resident, offloaded = memory["totals"].values()
    assert offloaded < resident
    assert offloaded >= memory["weights"]["text encoder"]


@pytest.mark.slow
def test_guidance_of_captions_keeps_a_second_cache():
    profile = load_profile("tiny")
    sampling = {**profile["model"]["sampling"], "caption_guidance_scale": 2.0}
    guided = {**profile, "model": {**profile["model"], "sampling": sampling}}
    plain, more = (
        make_inference_plan(each, ROOT, "caption", "h100")["memory"]["phases"]["the text is written"]
        for each in (profile, guided)
    )
    assert more > plain


@pytest.mark.slow
def test_above_480p_a_clip_is_decoded_in_tiles_of_less_memory():
    profile = load_profile("wan-1.3b")
    models = build_models(profile, wan.config_folder(ROOT / profile["base"]))

    def peak(height, width):
        video = {"frames": 5, "height": height, "width": width}
        sized = replace(models, latents=wan.latent_shape(models.vae, *video.values()))
        return autoencoder_peak(sized, video, "decode")

    assert peak(720, 1280) < 1.2 * peak(480, 832)  # with 2.3 times the pixels


@pytest.mark.slow
def test_a_first_image_needs_its_encoder_and_the_autoencoder_and_some_time():
    """Wan2.1 I2V encodes a whole clip of grey frames for it, and has CLIP's states of it."""
    base = {"base": "model/Wan2.1-I2V-14B-480P-Diffusers", "video": {"frames": 9, "height": 64, "width": 64, "fps": 16}}
    profile = load_profile("wan-14b") | base
    without, given = (make_inference_plan(profile, ROOT, "generate", "h100", image=image) for image in (False, True))
    assert given["memory"]["weights"]["image encoder"] == 2 * 630_766_080  # CLIP ViT-H/14 without its projection
    more, fewer = given["memory"]["phases"], without["memory"]["phases"]
    assert more.keys() - fewer.keys() == {"the autoencoder encodes the image"}
    assert more["the video is denoised"] > fewer["the video is denoised"]
    assert given["seconds"]["total"] > without["seconds"]["total"]


@pytest.mark.parametrize(
    ("profile", "task", "message"),
    [
        ("tiny", "generate", "base is Wan text-to-video, which takes no image; leave --image out"),
        ("wan-5b", "caption", "has no first image apart; leave --image out"),
    ],
)
def test_an_image_that_the_task_or_the_base_does_not_take_is_refused(profile, task, message):
    with pytest.raises(ConfigError, match=message):
        make_inference_plan(load_profile(profile), ROOT, task, "h100", image=True)


def test_a_task_that_there_is_not_is_refused_by_name():
    with pytest.raises(ConfigError, match="no task 'dub'; use one of caption, generate, joint"):
        make_inference_plan(load_profile("tiny"), ROOT, "dub", "h100")
