"""Any text-to-video pipeline makes clips, called with its own arguments; others are refused in one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch

from components.clips import generator
from components.pipeline.profiles import load_profile
from components.settings.sections import Fit, Video
from univigu.errors import ConfigError, MissingInputError
from univigu.threads import PART

FIT = Fit(upscale=1.0, cut=0.0, speed=(1.0, 1.0), hdr="tone_map")
VIDEO = Video(frames=9, height=32, width=32, fps=8, buckets=[], fit=FIT)
SAMPLING = generator.Sampling(steps=2, guidance_scale=3.0)
ROWS = [{"prompt": f"a red digit {seed}", "seed": seed} for seed in range(3)]


def text_side(tiny_wan_folder):
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    config = T5Config(vocab_size=512, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer"),
        "text_encoder": T5EncoderModel(config).eval(),
    }


def ltx(text):
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    return LTXPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **text)


def cogvideox(text):
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=16,
    )
    return CogVideoXPipeline(scheduler=CogVideoXDDIMScheduler(), vae=vae, transformer=transformer, **text)


@pytest.fixture(scope="module")
def folders(tiny_wan_folder, tmp_path_factory):
    """Pipelines of three families by name, random and tiny, in diffusers' layout."""
    home = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ltx(text_side(tiny_wan_folder)).save_pretrained(home / "ltx")
        cogvideox(text_side(tiny_wan_folder)).save_pretrained(home / "cogvideox")
    return {"wan": tiny_wan_folder, "ltx": home / "ltx", "cogvideox": home / "cogvideox"}


any_pipeline = pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("wan", {"max_sequence_length": 32}),
        ("ltx", {"max_sequence_length": 32, "decode_timestep": 0.0}),
        ("cogvideox", {"max_sequence_length": 16, "use_dynamic_cfg": False}),
    ],
)


@pytest.mark.slow
@any_pipeline
def test_clips_are_the_same_on_any_number_of_cores(folders, name, arguments):
    pipeline, sampling = generator.load_generator(folders[name], "fp32"), SAMPLING._replace(arguments=arguments)
    rows = [{"prompt": f"a red digit {seed}", "seed": seed} for seed in range(2 * PART + 1)]
    before, found = torch.get_num_threads(), []
    for cores in (1, 2):
        torch.set_num_threads(cores)
        found.append(generator.generate(pipeline, rows, VIDEO, sampling))
    torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


@any_pipeline
def test_a_clip_does_not_depend_on_its_batch_with_any_pipeline(folders, name, arguments):
    pipeline = generator.load_generator(folders[name], "fp32")
    sampling = SAMPLING._replace(arguments=arguments)
    together = generator.generate(pipeline, ROWS, VIDEO, sampling)
    assert together.shape == (3, 9, 32, 32, 3)
    alone = generator.generate(pipeline, ROWS[1:2], VIDEO, sampling)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.05


def test_a_pipeline_is_called_with_the_arguments_that_it_accepts(folders):
    wan, other = (generator.load_generator(folders[name], "fp32") for name in ("wan", "ltx"))
    for_wan, for_ltx = (generator.call_arguments(one, ROWS, VIDEO, SAMPLING) for one in (wan, other))
    assert (for_wan["num_frames"], for_ltx["num_frames"]) == (9, 9)
    assert "frame_rate" not in for_wan
    assert for_ltx["frame_rate"] == 8
    with pytest.raises(ConfigError, match=r"LTXPipeline has no argument 'shift'; it has .*guidance_scale"):
        generator.call_arguments(other, ROWS, VIDEO, SAMPLING._replace(arguments={"shift": 3}))


def test_a_pipeline_that_needs_an_image_is_refused(folders):
    from diffusers import WanImageToVideoPipeline

    wan = generator.load_generator(folders["wan"], "fp32")
    parts = {**wan.components, "image_processor": None, "image_encoder": None}
    pipeline = WanImageToVideoPipeline(**{name: part for name, part in parts.items() if name != "guider"})
    with pytest.raises(ConfigError, match=r"WanImageToVideoPipeline can't make a video from text alone .*'image'"):
        generator.generate(pipeline, ROWS, VIDEO, SAMPLING)


@pytest.mark.parametrize(
    ("name", "size", "sides", "frames"),
    [
        ("wan", {"height": 30}, 16, 4),
        ("wan", {"frames": 10}, 16, 4),
        ("ltx", {"frames": 10}, 16, 4),
        ("cogvideox", {"width": 40}, 16, 4),
    ],
)
def test_a_size_that_the_pipeline_would_round_is_refused(folders, name, size, sides, frames):
    pipeline = generator.load_generator(folders[name], "fp32")
    with pytest.raises(ConfigError, match=rf"sides that are multiples of {sides} and {frames}k \+ 1 frames"):
        generator.generate(pipeline, ROWS, VIDEO.model_copy(update=size), SAMPLING)


def test_the_autoencoder_keeps_its_own_precision(folders):
    pipeline = generator.load_generator(folders["wan"], "bf16")
    assert {pipeline.transformer.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert pipeline.vae.dtype == torch.float32
    assert generator.load_generator(folders["wan"], "fp32", vae_precision="bf16").vae.dtype == torch.bfloat16
    sampling = SAMPLING._replace(arguments={"max_sequence_length": 32})
    assert np.isfinite(generator.generate(pipeline, ROWS[:1], VIDEO, sampling)).all()


def test_the_shift_of_the_scheduler_comes_from_the_profile(folders):
    shifted = generator.load_generator(folders["wan"], "fp32", flow_shift=8.0)
    assert shifted.scheduler.config.shift == 8.0
    shifted.scheduler.set_timesteps(4)
    own = generator.load_generator(folders["wan"], "fp32")
    assert own.scheduler.config.shift == 3.0
    own.scheduler.set_timesteps(4)
    assert (shifted.scheduler.timesteps[1:] > own.scheduler.timesteps[1:]).all()
    with pytest.raises(ConfigError, match="CogVideoXDDIMScheduler has no timestep shift"):
        generator.load_generator(folders["cogvideox"], "fp32", flow_shift=8.0)


def test_options_that_save_memory_change_no_clip(folders):
    sampling = SAMPLING._replace(arguments={"max_sequence_length": 32})
    plain = generator.generate(generator.load_generator(folders["wan"], "fp32"), ROWS, VIDEO, sampling)
    thrifty = generator.load_generator(
        folders["wan"], "fp32", vae_memory=["tiling", "slicing"], attention_backend="_native_math", offload="model"
    )
    assert thrifty.vae.use_tiling
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == "native"  # of other models
    np.testing.assert_allclose(generator.generate(thrifty, ROWS, VIDEO, sampling), plain, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_change_no_clip(folders):
    sampling = SAMPLING._replace(arguments={"max_sequence_length": 32})
    plain = generator.generate(generator.load_generator(folders["wan"], "fp32"), ROWS, VIDEO, sampling)
    compiled = generator.load_generator(folders["wan"], "fp32", compiled=True)
    np.testing.assert_allclose(generator.generate(compiled, ROWS, VIDEO, sampling), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "telepathy"}, "attention backend 'telepathy' can't be used here"),
        ({"attention_backend": "flash"}, "attention backend 'flash' can't be used here"),
    ],
)
def test_an_unavailable_option_is_refused(folders, options, message):
    with pytest.raises(ConfigError, match=message):
        generator.load_generator(folders["wan"], "fp32", **options)


@pytest.fixture
def wan_copy(tiny_wan_folder, tmp_path):
    """A copy of the tiny Wan that a test may damage, with the name of the real one."""
    return shutil.copytree(tiny_wan_folder, tmp_path / "Wan2.1-T2V-1.3B-Diffusers")


FETCH = r"`univigu fetch Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers --to .*/Wan2\.1-T2V-1\.3B-Diffusers`"


def test_the_error_for_missing_weights_has_the_command_that_fetches_them(wan_copy):
    (wan_copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        MissingInputError, match=rf"no weights \(\*\.safetensors\) in .*transformer; fetch it with {FETCH}"
    ):
        generator.load_generator(wan_copy, "fp32")
    for part in ("transformer", "vae", "text_encoder"):
        for path in (wan_copy / part).glob("*.safetensors"):
            path.unlink()
    (wan_copy / ".cache/huggingface/download").mkdir(parents=True)
    (wan_copy / ".cache/huggingface/download/abc.incomplete").touch()
    with pytest.raises(MissingInputError, match=f"download .* isn't finished .*{FETCH}"):
        generator.load_generator(wan_copy, "fp32")
    (wan_copy / "model_index.json").unlink()
    shutil.rmtree(wan_copy / ".cache")
    with pytest.raises(MissingInputError, match=f"no pipeline in diffusers' layout .*{FETCH}"):
        generator.load_generator(wan_copy, "fp32")


@pytest.mark.parametrize("part", ["_class_name", "transformer"])
def test_code_in_a_pipelines_folder_is_not_run(wan_copy, tmp_path, part):
    index = json.loads((wan_copy / "model_index.json").read_text())
    index[part] = ["theirs", "Theirs"]
    (wan_copy / "model_index.json").write_text(json.dumps(index))
    home = wan_copy if part == "_class_name" else wan_copy / part
    (home / "theirs.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(ConfigError, match="custom code"):
        generator.load_generator(wan_copy, "fp32")
    assert not (tmp_path / "ran").exists()


def test_wans_original_layout_is_refused(tmp_path):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t2v"}')
    with pytest.raises(MissingInputError, match=r"no model_index\.json.*Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"):
        generator.load_generator(folder, "fp32")


def spoil_pointer(folder):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def spoil_keys(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.0.attn1.to_q.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "SoraPipeline"}))


def spoil_index(folder):
    (folder / "model_index.json").write_text("<html>Access to this model is restricted</html>")


@pytest.mark.parametrize("spoil", [spoil_pointer, spoil_keys, spoil_class, spoil_index])
def test_a_damaged_or_foreign_checkpoint_is_refused_before_anything_is_made(wan_copy, spoil):
    spoil(wan_copy)
    with pytest.raises(ConfigError, match=FETCH):
        generator.load_generator(wan_copy, "fp32")


@pytest.mark.parametrize(
    ("name", "video", "shift", "guidance"),
    [
        ("wan-1.3b", [81, 480, 832, 16], 8.0, 6.0),
        ("wan-14b", [81, 480, 832, 16], 3.0, 5.0),
        ("wan-5b", [121, 704, 1280, 24], 5.0, 5.0),
    ],
)
def test_wans_profiles_have_the_values_that_wan_recommends(name, video, shift, guidance):
    profile = load_profile(name)
    settings = profile["synthesize_videos"]
    assert [profile["video"][key] for key in ("frames", "height", "width", "fps")] == video
    assert (settings["flow_shift"], settings["guidance_scale"], settings["steps"]) == (shift, guidance, 50)
    assert (settings["precision"], settings["vae_precision"]) == ("bf16", "fp32")
    assert settings["arguments"] == {"max_sequence_length": 512}
    assert settings["negative_prompt"].startswith("色调艳丽，过曝，静态")
    assert settings["negative_prompt"].split("，")[-1] == "倒着走"
    assert " " not in settings["negative_prompt"]
