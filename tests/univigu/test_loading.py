"""Loading and saving: precision, sizes from the checkpoint, the hub's options, the model card."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PipelineQuantizationConfig

from univigu import UniViGUPipeline, loading
from univigu.errors import BadInputError, MissingInputError

BUNDLED = Path(__file__).parents[2] / "model/tiny-wan"


def test_a_base_gives_all_sizes_and_lengths(tiny_wan_folder):
    """The bundled base states them in its README.md; without a README, they are Wan's as far as the tables reach."""
    bundled = loading.wan_defaults(BUNDLED)
    assert bundled == {
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "fps": 8.0,
        "max_sequence_length": 32,
        "guidance_scale": 4.0,
        "num_inference_steps": 20,
        "shift": 3.0,
        "text_length": 124,
    }
    published = Path(loading.__file__).parent / "published"
    for name in ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers"):
        found = loading.wan_defaults(published / name)
        assert {key: found[key] for key in ("num_frames", "height", "width", "text_length")} == {
            "num_frames": 81,
            "height": 480,
            "width": 832,
            "text_length": 256,
        }
    small = loading.wan_defaults(tiny_wan_folder)
    assert (small["num_frames"], small["height"], small["width"], small["text_length"]) == (81, 480, 768, 32)


@pytest.mark.parametrize("base", ["bundled", "tiny"])
def test_every_base_works_without_further_arguments(base, tiny_wan_folder):
    pipeline = UniViGUPipeline.from_wan(BUNDLED if base == "bundled" else tiny_wan_folder)
    pipeline._latent_shape(None, None, None)  # video and text fit the rotary tables
    given = {} if base == "bundled" else {"num_frames": 5, "height": 32, "width": 32}
    assert pipeline("a red five", num_inference_steps=1, **given).frames.shape[0] == 1
    assert UniViGUPipeline.from_wan(tiny_wan_folder, num_frames=9).config.num_frames == 9


def test_both_loaders_take_a_precision(tiny_wan_folder, speaking_model):
    made = UniViGUPipeline.from_wan(tiny_wan_folder, torch_dtype=torch.bfloat16)
    loaded = UniViGUPipeline.from_pretrained(speaking_model, torch_dtype=torch.bfloat16)
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = (getattr(one, part).named_parameters() for one in (made, loaded))
        assert {name: value.dtype for name, value in ours} == {name: value.dtype for name, value in theirs}
    kept = made.transformer.text_space.weight.dtype, made.transformer.patch_embedding.weight.dtype
    assert kept == (torch.float32, torch.bfloat16)
    mixed = UniViGUPipeline.from_wan(tiny_wan_folder, torch_dtype={"vae": torch.float16, "default": torch.bfloat16})
    assert (mixed.vae.dtype, mixed.text_encoder.dtype) == (torch.float16, torch.bfloat16)
    frames = loaded.generate("a red five", seed=1, num_inference_steps=2)
    assert frames.std() > 0


def test_the_text_encoder_may_be_left_out(tiny_wan_folder, tmp_path):
    shutil.copytree(tiny_wan_folder, tmp_path / "base", ignore=shutil.ignore_patterns("text_encoder"))
    pipeline = UniViGUPipeline.from_wan(tmp_path / "base", text_encoder=None)
    assert pipeline.text_encoder is None
    pipeline.save_pretrained(tmp_path / "saved")
    assert UniViGUPipeline.from_pretrained(tmp_path / "saved").text_encoder is None
    with pytest.raises(MissingInputError, match="no text_encoder"):
        UniViGUPipeline.from_wan(tmp_path / "base")


def test_a_device_map_places_the_parts(speaking_model):
    pipeline = UniViGUPipeline.from_pretrained(speaking_model, device_map="cpu")
    assert pipeline.hf_device_map == "cpu"
    with pytest.raises(BadInputError, match=r"given device_map .*: correct it") as caught:
        UniViGUPipeline.from_pretrained(speaking_model, device_map="anywhere")
    assert "\n" not in str(caught.value)


def test_a_quantisation_that_is_not_installed_and_a_quantised_base_are_one_sentence(
    speaking_model, tiny_wan_folder, tmp_path
):
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True},
        components_to_quantize=["transformer"],
    )
    with pytest.raises(BadInputError, match=r"can't be loaded.*bitsandbytes") as caught:
        UniViGUPipeline.from_pretrained(speaking_model, quantization_config=config)
    assert "\n" not in str(caught.value)
    for name, source, load in (
        ("base", tiny_wan_folder, UniViGUPipeline.from_wan),
        ("model", speaking_model, UniViGUPipeline.from_pretrained),
    ):
        shutil.copytree(source, tmp_path / name)
        file = tmp_path / name / "transformer/config.json"
        quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
        with pytest.raises(BadInputError, match=r"quantised|bitsandbytes") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_model_card_is_saved_and_kept(speaking_model, tmp_path):
    card = (speaking_model / "README.md").read_text()
    assert "9 frames of 32x32 pixels at 8 frames a second" in card
    assert "up to 32 tokens" in card
    assert str(speaking_model) not in card
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    (tmp_path / "README.md").write_text("my own")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def python(code, *arguments, **environment):
    run = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_diffusers_finds_the_class_of_a_folder(speaking_model):
    code = (
        "import sys, univigu.pipeline\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\nprint(type(pipe).__name__, pipe.caption.__name__)"
    )
    assert python(code, speaking_model).stdout.split() == ["UniViGUPipeline", "caption"]


PUSH_AND_LOAD = """
import sys
from univigu import UniViGUPipeline
from univigu.errors import MissingInputError

folder, base, cache = sys.argv[1:]
UniViGUPipeline.from_pretrained(folder).push_to_hub("me/model", token="hf_secret")
hub = {"token": "hf_secret", "cache_dir": cache}
pipe = UniViGUPipeline.from_pretrained("me/model", revision="v1", **hub)
print(pipe.generate("a red five", num_inference_steps=1).sum())
UniViGUPipeline.from_pretrained("me/model", revision="v1", cache_dir=cache, local_files_only=True)
for load in (UniViGUPipeline.from_pretrained, UniViGUPipeline.from_wan):
    for given in ({"revision": "v9", **hub}, {"local_files_only": True, "cache_dir": cache + "-empty"}):
        try:
            load("me/model", **given)
        except MissingInputError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_pipeline_is_pushed_to_a_hub_and_loaded_with_its_options(hub, speaking_model, tiny_wan_folder, tmp_path):
    cache = tmp_path / "cache"
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = python(PUSH_AND_LOAD, speaking_model, tiny_wan_folder, cache, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    frames = UniViGUPipeline.from_pretrained(speaking_model).generate("a red five", num_inference_steps=1)
    first, *messages = done.stdout.splitlines()[-5:]  # DeepSpeed greets on standard output
    assert int(first) == int(frames.astype(np.int64).sum())
    assert hub.files["README.md"] == (speaking_model / "README.md").read_bytes()
    assert cache.is_dir()
    assert "Bearer hf_secret" in hub.tokens
    for missing, offline in (messages[:2], messages[2:]):
        assert missing.startswith("The hub repository me/model has no revision 'v9': give a branch")
        assert offline.startswith("me/model is not in the cache of downloads and can't be fetched now")
