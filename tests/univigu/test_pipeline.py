"""The pipeline: caption, generate, joint; saving and loading; and errors for invalid input."""

import json

import numpy as np
import pytest
import torch

from univigu import UniViGUPipeline, flow, text_space, wan
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.sampling import Guide, joint_field, seeded_noise

SETTINGS = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "max_sequence_length": 24,
    "num_inference_steps": 3,
    "caption_steps": 4,
    "guidance_scale": 2.0,
    "text_length": 20,
    "text_latent_dim": 16,
}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_folder):
    torch.manual_seed(0)
    pipeline = UniViGUPipeline.from_wan(tiny_wan_folder, **SETTINGS)
    pipeline.set_progress_bar_config(disable=True)
    # the output of an untrained head is zero: randomise it, so that every input has an effect
    torch.nn.init.normal_(pipeline.transformer.text_head.proj_out.weight, std=0.3)
    torch.nn.init.normal_(pipeline.transformer.text_embedder.proj_guess.weight, std=0.3)
    return pipeline


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).integers(0, 256, (3, 9, 32, 32, 3), dtype=np.uint8)


def joint(pipeline, *arguments, **settings):
    """Frames in uint8, and captions."""
    return pipeline.joint(*arguments, **settings, output_type="uint8", return_dict=False)


def joint_latents(pipeline, prompt="a red digit", **settings):
    """Latents and captions of four steps."""
    return pipeline.joint(prompt, seed=3, num_inference_steps=4, output_type="latent", return_dict=False, **settings)


def test_the_base_gives_the_vocabulary(pipeline):
    config, tokenizer = pipeline.transformer.config, pipeline.tokenizer
    assert config.tokenizer_length == len(tokenizer) <= config.vocab_size
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.row_norm == pytest.approx(text_space.row_norm_for(len(tokenizer)))


def test_one_video_in_any_form_gives_one_text(pipeline, clips):
    expected = pipeline.caption(clips[0])
    assert len(expected) == 1
    for form in (clips[:1], [clips[0]], list(clips[0]), torch.from_numpy(clips[0]), [list(clips[0])]):
        assert pipeline.caption(form) == expected


def test_a_caption_depends_on_its_clip_alone(pipeline, clips):
    a, b, c = pipeline.caption(clips)
    assert pipeline.caption(clips[::-1]) == [c, b, a]
    assert pipeline.caption([clips[1], clips[0]], batch_size=2) == [b, a]
    assert pipeline.caption(clips[1]) == [b] != pipeline.caption(clips[1], seed=6)
    generator = torch.Generator().manual_seed(3)
    assert pipeline.caption(clips[:2], generator=generator)[1:] == pipeline.caption(
        clips[1], generator=generator.manual_seed(3)
    )


def test_a_list_of_seeds_gives_each_clip_its_own(pipeline, clips):
    together = pipeline.caption(clips, seed=[5, 6, 7], batch_size=2)
    assert together == [pipeline.caption(clip, seed=5 + i)[0] for i, clip in enumerate(clips)]
    assert pipeline.caption(clips[0], seed=5) != pipeline.caption(clips[0], seed=6)


def test_a_caption_equals_the_uncached_prefix_forward(pipeline, clips):
    """The same sampling, written with the full model in each step."""
    model, latents = pipeline.transformer, wan.encode_frames(pipeline.vae, torch.from_numpy(clips))
    empty = wan.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [""], 24)
    z, guess = flow.keyed_noise([(0, "text")] * 3, (20, 16)), None
    with torch.no_grad():
        table = model.text_space()
        for tau, tau_next in torch.tensor([[0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1]]):
            times = tau.expand(3)
            hidden = model(latents, torch.ones(3), empty, z, times, guess, "prefix").text
            prediction = model.read_text(hidden, z, times, table, temperature=0.5)
            guess, z = prediction.data, flow.euler_step(z, prediction.velocity, tau, tau_next)
        ids = text_space.nearest(z, table, len(pipeline.tokenizer))
    assert pipeline.caption(clips, temperature=0.5) == text_space.detokenize(pipeline.tokenizer, ids)


def test_a_caption_without_the_video_does_not_depend_on_it(pipeline, clips):
    latents = wan.encode_frames(pipeline.vae, torch.from_numpy(clips))
    blind = pipeline.caption_latents(latents, video_tau=0.0)
    assert blind == pipeline.caption_latents(latents + 3, video_tau=0.0)
    assert blind != pipeline.caption_latents(latents)


def test_guidance_changes_captions_and_videos(pipeline, clips):
    assert pipeline.caption(clips[0], guidance_scale=1.0) == pipeline.caption(clips[0])
    assert pipeline.caption(clips[0], guidance_scale=3.0) != pipeline.caption(clips[0])
    plain = pipeline.generate("a red digit", guidance_scale=1.0)
    assert not np.array_equal(plain, pipeline.generate("a red digit", guidance_scale=4.0))


def test_a_video_of_another_size_and_length_is_fitted(pipeline, clips):
    portrait = np.repeat(np.repeat(clips[0], 3, axis=1), 2, axis=2)
    long = np.repeat(clips[0], 5, axis=0)
    for video in (portrait, long, clips[0][:2]):
        assert len(pipeline.caption(video)) == 1
    # with every frame five times, it is the same video
    assert pipeline.caption(long) == pipeline.caption(clips[0])


def test_videos_are_generated_in_the_requested_size(pipeline):
    frames = pipeline.generate(["a red digit", "a blue digit"])
    assert (frames.shape, frames.dtype) == ((2, 9, 32, 32, 3), np.uint8)
    assert pipeline.generate("a red digit", num_frames=5, height=16, width=24).shape == (1, 5, 16, 24, 3)


def test_a_generated_video_depends_on_prompt_and_seed_not_on_its_batch(pipeline):
    together = pipeline.generate(["a red digit", "a blue digit"], seed=3)
    alone = pipeline.generate("a blue digit", seed=4)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(alone, pipeline.generate("a blue digit", seed=5))
    assert not np.array_equal(alone, pipeline.generate("a red digit", seed=4))


def test_generation_sees_the_prompt_as_text_too(pipeline, monkeypatch):
    """Eq 17: with the same condition, another embedded prompt gives another video."""
    one = pipeline.generate("a red digit", guidance_scale=1.0)
    tokenize = text_space.tokenize
    monkeypatch.setattr(text_space, "tokenize", lambda t, texts, n: tokenize(t, ["moves left" for _ in texts], n))
    assert not np.array_equal(one, pipeline.generate("a red digit", guidance_scale=1.0))


PATHS = [{"text_at": 0.0}, {"text_at": 0.4}, {"text_at": 1.0}, {"in_step": True}, {"in_step": 0.5, "prompt_until": 0.0}]


@pytest.mark.parametrize("path", PATHS)
def test_joint_gives_a_video_and_its_text_from_noise(pipeline, path):
    frames, texts = joint(pipeline, **path)
    assert frames.shape == (1, 9, 32, 32, 3)
    assert len(texts) == 1
    assert isinstance(texts[0], str)
    many, captions = joint(pipeline, ["", "a red digit"], seed=[0, 1], caption_guidance_scale=3.0, **path)
    assert many.shape[0] == len(captions) == 2
    alone, guided = joint(pipeline, caption_guidance_scale=3.0, **path)
    assert np.abs(many[0].astype(int) - alone[0]).max() <= 1
    assert guided != texts


def test_a_joint_text_written_at_tau_1_is_a_caption_of_the_finished_video(pipeline):
    frames, texts = joint(pipeline, seed=3, num_inference_steps=5, text_at=1.0)
    assert texts == pipeline.caption(frames, seed=3) != [""]
    assert not np.array_equal(frames, joint(pipeline, seed=3, num_inference_steps=5, text_at=0.4)[0])


def test_a_joint_text_depends_on_the_prompt(pipeline):
    frames, texts = joint(pipeline, "a red digit", seed=3, text_at=1.0)
    assert texts != pipeline.caption(frames, seed=3)


def test_the_rest_of_a_joint_video_is_generated_from_its_own_text(pipeline, monkeypatch):
    """If the text is written first and equals the prompt, the video equals that of `generate`."""
    prompt = text_space.tokenize(pipeline.tokenizer, ["a red digit"], pipeline.transformer.config.text_length)
    monkeypatch.setattr(text_space, "nearest", lambda *_: prompt)
    generated = pipeline.generate("a red digit", seed=3, num_inference_steps=5)
    for given in ("", "a blue digit"):
        frames, texts = joint(pipeline, given, seed=3, num_inference_steps=5, text_at=0.0)
        assert texts == ["a red digit"]
        assert np.abs(frames.astype(int) - generated).max() <= 1


def test_a_joint_text_is_written_at_the_first_step_from_text_at_on(pipeline):
    """In two steps without shift, the times of the video are 0, 0.5 and 1."""
    pairs = {at: joint(pipeline, seed=3, num_inference_steps=2, shift=1.0, text_at=at) for at in (0.1, 0.5, 0.6, 1.0)}
    assert pairs[0.1][1] == pairs[0.5][1]
    assert np.array_equal(pairs[0.1][0], pairs[0.5][0])
    assert np.array_equal(pairs[0.6][0], pairs[1.0][0])
    assert not np.array_equal(pairs[0.5][0], pairs[0.6][0])


@pytest.mark.parametrize("text_shift", [None, 3.0])
def test_in_lockstep_eq_18_is_integrated_from_both_noises(pipeline, text_shift):
    """Bit for bit, along times that `flow.integrate` is given: the video's shifted by 3, the text's by 1 by default."""
    frames, texts = joint_latents(pipeline, in_step=1.0, shift=3.0, text_shift=text_shift, guidance_scale=2.0)
    shape, text_shape = pipeline._default_shape(None, None, None), pipeline._text_shape
    device = pipeline._execution_device
    noises = [seeded_noise([3], name, size, device) for name, size in (("video", shape), ("text", text_shape))]
    condition, negative = pipeline._encode(["a red digit"]), pipeline._encode([""])
    guide = Guide(condition, negative, 2.0)
    field = joint_field(pipeline.transformer, shape, text_shape, [3], guide, 1.0, pipeline.config.caption_temperature)
    with torch.no_grad():
        video, text = flow.integrate(field, noises, (flow.tau_grid(4, 3.0), flow.tau_grid(4, text_shift or 1.0)))
    assert torch.equal(frames, video)
    assert texts == text_space.detokenize(pipeline.tokenizer, pipeline._nearest(text))


@pytest.mark.parametrize("text_at", [0.2, 0.4, 1.0])
def test_an_interval_without_the_time_of_a_step_is_the_text_written_in_turn(pipeline, text_at):
    short, turn = (joint_latents(pipeline, in_step=part, text_at=text_at) for part in (1e-6, 0.0))
    assert torch.equal(short[0], turn[0])
    assert short[1] == turn[1]


def test_what_the_text_says_so_far_replaces_the_prompt_as_the_condition(pipeline, monkeypatch):
    """If the text always says what the prompt does, nothing changes; if it says something else, the video does."""
    prompt = text_space.tokenize(pipeline.tokenizer, ["a red digit"], pipeline.transformer.config.text_length)
    monkeypatch.setattr(text_space, "nearest", lambda *_: prompt)
    until = {at: joint_latents(pipeline, in_step=1.0, prompt_until=at)[0] for at in (0.0, 1.0)}
    assert torch.equal(until[0.0], until[1.0])
    blue = {at: joint_latents(pipeline, "a blue digit", in_step=1.0, prompt_until=at)[0] for at in (0.0, 0.6, 0.7, 1.0)}
    # of the text's times 0, 0.25, 0.5 and 0.75, the last is the only one from 0.6 or 0.7 on
    assert torch.equal(blue[0.6], blue[0.7])
    assert len({blue[at].sum().item() for at in (0.0, 0.6, 1.0)}) == 3


def test_an_invalid_time_or_temperature_is_refused(pipeline, clips):
    with pytest.raises(BadInputError, match="from 0"):
        joint(pipeline, text_at=1.5)
    with pytest.raises(BadInputError, match="in_step"):
        joint(pipeline, text_at=0.5, in_step=True)
    with pytest.raises(BadInputError, match=r"in_step is 1\.5"):
        joint(pipeline, in_step=1.5)
    with pytest.raises(BadInputError, match="prompt_until is -1"):
        joint(pipeline, prompt_until=-1.0)
    with pytest.raises(BadInputError, match="shift"):
        joint(pipeline, text_shift=0.0)
    with pytest.raises(BadInputError, match="0 or more"):
        pipeline.caption(clips[0], temperature=-1.0)
    with pytest.raises(BadInputError, match="0 or more"):
        pipeline.caption(clips[0], temperature=float("inf"))


def test_a_saved_pipeline_loads_and_gives_the_same_output(pipeline, clips, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    loaded = UniViGUPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert {k: loaded.config[k] for k in SETTINGS if k in loaded.config} == {
        k: v for k, v in SETTINGS.items() if k in pipeline.config
    }
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert loaded.caption(clips) == pipeline.caption(clips)
    difference = loaded.generate("a red digit").astype(int) - pipeline.generate("a red digit")
    assert np.abs(difference).max() <= 1


def test_saved_files_do_not_depend_on_the_source_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "first")
    UniViGUPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in (path for path in (tmp_path / "first").rglob("*") if path.is_file()):
        again = tmp_path / "second" / file.relative_to(tmp_path / "first")
        assert again.read_bytes() == file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "decode it"),
        (np.zeros((1, 32, 32, 3), np.uint8), "single frame"),
        (np.zeros((9, 32, 32, 4), np.uint8), "decode it"),
        (np.full((9, 32, 32, 3), 255, np.float32), "from 0 to 1"),
        (np.zeros((9, 0, 32, 3), np.uint8), "decode it"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)], "of one size"),
        ([], "no video"),
        ("clip.mp4", "no video"),
        (None, "no video"),
    ],
)
def test_an_invalid_video_is_refused_in_one_sentence(pipeline, video, message):
    with pytest.raises(BadInputError, match=message) as caught:
        pipeline.caption(video)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("word " * 10_000, "at most 20: shorten"),
        ([], "isn't empty"),
        (7, "a text"),
        ([7], "a text"),
    ],
)
def test_an_invalid_prompt_is_refused_in_one_sentence(pipeline, prompt, message):
    with pytest.raises(BadInputError, match=message):
        pipeline.generate(prompt)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 8},
        {"num_frames": -3},
        {"num_frames": 0},
        {"height": 30},
        {"width": 4},
        {"height": 320_000},
        {"num_inference_steps": 0},
        {"shift": 0.0},
        {"seed": [1, 2]},
        {"batch_size": 0},
    ],
)
def test_invalid_numbers_are_refused(pipeline, wrong):
    with pytest.raises(BadInputError):
        pipeline.generate("a red digit", **wrong)


def test_a_folder_without_a_trained_model_is_refused(tiny_wan_folder, tmp_path):
    with pytest.raises(MissingInputError, match="no model folder"):
        UniViGUPipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(MissingInputError, match="model_index"):
        UniViGUPipeline.from_pretrained(tmp_path)
    with pytest.raises(BadInputError, match="is WanPipeline, not UniViGUPipeline"):
        UniViGUPipeline.from_pretrained(tiny_wan_folder)


def test_an_incomplete_base_is_refused(tiny_wan_folder, tmp_path):
    with pytest.raises(MissingInputError, match="no vae and no text_encoder"):
        UniViGUPipeline.from_wan(tiny_wan_folder / "transformer")
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(CorruptDataError):
        UniViGUPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "UniViGUPipeline"}))
    with pytest.raises(CorruptDataError, match="can't be loaded"):
        UniViGUPipeline.from_pretrained(tmp_path)


def test_importing_the_package_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, univigu; assert 'torch' not in sys.modules; assert 'UniViGUPipeline' in dir(univigu)"
    subprocess.run([sys.executable, "-c", code], check=True)
