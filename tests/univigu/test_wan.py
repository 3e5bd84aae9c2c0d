"""Wan's conventions: its time, latents, prompts and checkpoint folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from univigu import flow, wan
from univigu.errors import BadInputError, CorruptDataError, MissingInputError
from univigu.transformer import UniViGUTransformer3DModel


@pytest.fixture(scope="module")
def base(tiny_wan_folder):
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def latents(base):
    torch.manual_seed(0)
    return torch.randn(2, *wan.latent_shape(base.vae, 9, 32, 32))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.85, 1.0])
def test_the_papers_time_and_wans_are_equivalent(base, latents, tau):
    """u = -model_out at t = 1000 (1 - tau), and an Euler step from tau to tau' is the scheduler's own."""
    torch.manual_seed(0)
    model = UniViGUTransformer3DModel.from_wan(base.transformer, vocab_size=20, tokenizer_length=20)
    condition = torch.randn(2, 7, 32)
    with torch.no_grad():
        model_out = base.transformer(latents, torch.full((2,), 1000 * (1 - tau)), condition).sample
        velocity = model(latents, torch.full((2,), tau), condition).video
    torch.testing.assert_close(velocity, -model_out, rtol=0, atol=1e-5)
    if tau < 1:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - tau, (1 - tau) / 2])
        stepped = scheduler.step(model_out, scheduler.timesteps[0], latents).prev_sample
        ours = flow.euler_step(latents, velocity, tau, 1 - (1 - tau) / 2)
        torch.testing.assert_close(ours, stepped, atol=1e-5, rtol=1e-5)


def test_denormalising_inverts_normalising(base, latents):
    torch.testing.assert_close(
        wan.denormalize_latents(base.vae, wan.normalize_latents(base.vae, latents)), latents, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("size", "in_tiles"), [((256, 256), False), ((256, 320), True)])
def test_large_frames_are_decoded_in_tiles_which_changes_little(base, monkeypatch, size, in_tiles):
    monkeypatch.setattr("univigu.wan.WHOLE_PIXELS", 256 * 256)  # a side of diffusers' tiles, instead of 480p
    torch.manual_seed(0)
    latents = torch.randn(1, *wan.latent_shape(base.vae, 1, *size))
    found = wan.decode_pixels(base.vae, latents)
    assert not base.vae.use_tiling
    with torch.no_grad():
        whole = base.vae.decode(wan.denormalize_latents(base.vae, latents), return_dict=False)[0]
    whole = (whole / 2 + 0.5).clamp(0, 1)
    assert torch.equal(found, whole) != in_tiles
    assert (found - whole).abs().mean() < 0.02


def test_frames_are_decoded_as_wans_pipeline_does(base):
    call = {"prompt": ["a red digit"], "num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2}
    call |= {"max_sequence_length": 16, "guidance_scale": 1.0}
    latents = base(**call, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    frames = base(**call, generator=torch.Generator().manual_seed(0), output_type="np").frames
    ours = wan.decode_latents(base.vae, latents).numpy()
    assert ours.shape == (1, 9, 32, 32, 3)
    assert np.abs(ours - np.asarray(frames) * 255).max() <= 0.51


def test_frames_become_the_normalised_mean_of_their_latents(base):
    frames = torch.randint(0, 256, (1, 9, 32, 32, 3), dtype=torch.uint8)
    pixels = frames.permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1
    with torch.no_grad():
        mean = base.vae.encode(pixels).latent_dist.mean
    ours = wan.encode_frames(base.vae, frames)
    assert tuple(ours.shape[1:]) == wan.latent_shape(base.vae, 9, 32, 32)
    torch.testing.assert_close(wan.denormalize_latents(base.vae, ours), mean, atol=1e-5, rtol=1e-5)


def test_prompts_are_encoded_as_wans_pipeline_does(base):
    prompts = ["a  red digit &amp; more", ""]
    ours = wan.encode_prompts(base.tokenizer, base.text_encoder, prompts, 24)
    with torch.no_grad():
        theirs, _ = base.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=24)
    assert torch.equal(ours, theirs)
    assert (ours[:, -5:] == 0).all()
    assert ours[1, 0].abs().sum() > 0


def test_an_encoder_without_its_token_table_is_refused(base):
    wan.check_text_encoder(base.text_encoder)
    broken = type(base.text_encoder)(base.text_encoder.config)
    torch.nn.init.zeros_(broken.shared.weight)
    with pytest.raises(CorruptDataError, match="token table"):
        wan.check_text_encoder(broken)
    untied = type(base.text_encoder)(base.text_encoder.config)
    untied.encoder.embed_tokens = torch.nn.Embedding(*untied.shared.weight.shape)
    with pytest.raises(CorruptDataError, match="token table"):
        wan.check_text_encoder(untied)


@pytest.mark.parametrize(("preset", "billions", "added"), [(wan.WAN_1_3B, 1.419, 0.826), (wan.WAN_14B, 14.288, 5.663)])
def test_presets_have_exactly_wans_parameters_and_every_wan_key_has_its_place(preset, billions, added):
    with torch.device("meta"):
        theirs, ours = WanTransformer3DModel(**preset), UniViGUTransformer3DModel(**preset)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    kept = {key: tuple(value.shape) for key, value in ours.state_dict().items() if not wan.is_text_side(key)}
    assert kept == shapes
    count = sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 3) == billions
    assert sum(p.numel() for name, p in ours.named_parameters() if not wan.is_text_side(name)) == count
    ffn_text = sum(p.numel() for name, p in ours.named_parameters() if ".ffn_text." in name)
    assert round(ffn_text / 1e9, 3) == added
    table = ours.text_space.weight
    assert table.shape == (256384, 64)


def test_missing_and_unexpected_weights_are_refused():
    wan.check_keys(["text_head.log_scale", "blocks.3.ffn_text.net.2.bias"], [])
    with pytest.raises(BadInputError, match="1 weights missing, 1 unexpected"):
        wan.check_keys(["blocks.0.ffn.net.2.bias"], ["blocks.0.more"])


def test_a_folder_and_its_transformer_part_are_both_accepted(tiny_wan_folder):
    assert wan.transformer_folder(tiny_wan_folder) == tiny_wan_folder / "transformer"
    assert wan.transformer_folder(tiny_wan_folder / "transformer") == tiny_wan_folder / "transformer"
    rows = wan.token_rows(tiny_wan_folder)
    assert rows.shape[1] == 32
    assert wan.token_rows(tiny_wan_folder / "transformer") is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_class_name": "CogVideoXTransformer3DModel"}, BadInputError, "is CogVideoXTransformer3DModel, not Wan"),
        ({"image_dim": 1280}, BadInputError, "conditioned on images"),
        ({"in_channels": 36}, BadInputError, "conditioned on images"),
    ],
)
def test_another_architecture_is_refused_in_one_sentence(tiny_wan_folder, tmp_path, change, error, message):
    config = json.loads((tiny_wan_folder / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=message):
        wan.transformer_folder(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no model folder"):
        wan.transformer_folder(tmp_path / "nothing")
    with pytest.raises(MissingInputError, match=r"config\.json"):
        wan.transformer_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptDataError, match="can't be read as JSON"):
        wan.transformer_folder(tmp_path)


def test_a_model_of_two_experts_is_refused(tiny_wan_folder, tmp_path):
    folder = shutil.copytree(tiny_wan_folder, tmp_path / "two")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    for part in ("", "transformer", "transformer_2"):
        with pytest.raises(BadInputError, match="two transformers, one for the high noise levels"):
            wan.transformer_folder(folder / part)
    with pytest.raises(BadInputError, match="two transformers"):
        wan.transformer_folder(folder)


def test_the_autoencoders_own_factors_give_the_latent_shape():
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    assert wan.latent_shape(vae, 81, 480, 832) == (16, 21, 60, 104)
