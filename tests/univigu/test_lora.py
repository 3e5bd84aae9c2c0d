"""LoRA adapters of Wan, in its public layouts."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from univigu import UniViGUPipeline
from univigu.errors import BadInputError
from univigu.training.adapters import finish_lora

CALL = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
LAYERS = {"self_attn": "attn1", "cross_attn": "attn2"}  # the names of the original code, and diffusers'
PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


@pytest.fixture(scope="module")
def wan(tiny_wan_folder):
    return WanPipeline.from_pretrained(tiny_wan_folder)


@pytest.fixture(scope="module")
def adapter():
    """The weights of an adapter of all attention layers of the tiny Wan, by block, layer and part: (A, B)."""
    generator = torch.Generator().manual_seed(0)
    keys = [(block, layer, part) for block in range(2) for layer in LAYERS for part in PARTS]
    return {key: [torch.randn(size, generator=generator) / 2 for size in ((4, 24), (24, 4))] for key in keys}


def diffusers_layout(adapter):
    return {
        f"transformer.blocks.{block}.{LAYERS[layer]}.{PARTS[part]}.lora_{name}.weight": value
        for (block, layer, part), pair in adapter.items()
        for name, value in zip("AB", pair, strict=True)
    }


def original_layout(adapter):
    return {
        f"diffusion_model.blocks.{block}.{layer}.{part}.lora_{name}.weight": value
        for (block, layer, part), pair in adapter.items()
        for name, value in zip("AB", pair, strict=True)
    }


def load(folder):
    pipeline = UniViGUPipeline.from_wan(folder, max_sequence_length=32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("layout", [diffusers_layout, original_layout], ids=lambda one: one.__name__)
def test_an_adapter_in_a_public_layout_gives_the_frames_of_wan_pipeline(tiny_wan_folder, adapter, layout, tmp_path):
    save_file({key: value.contiguous() for key, value in layout(adapter).items()}, tmp_path / "a.safetensors")
    wan, ours = WanPipeline.from_pretrained(tiny_wan_folder), load(tiny_wan_folder)
    wan.set_progress_bar_config(disable=True)
    ours.scheduler = wan.scheduler
    given = CALL | {"latents": torch.randn(1, 4, 3, 8, 8), "max_sequence_length": 32}
    plain = ours("a red five", **given).frames
    for pipeline in (wan, ours):
        pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="style")
    adapted = ours("a red five", **given).frames
    np.testing.assert_allclose(adapted, wan("a red five", **given).frames, atol=1e-4)
    assert np.abs(adapted - plain).max() > 1e-3
    ours.set_adapters("style", 0.5)
    assert np.abs(ours("a red five", **given).frames - adapted).max() > 1e-4
    ours.unload_lora_weights()
    np.testing.assert_array_equal(ours("a red five", **given).frames, plain)


def test_a_merged_adapter_is_saved_and_a_loaded_one_is_not(tiny_wan_folder, adapter, tmp_path):
    pipeline = load(tiny_wan_folder)
    pipeline.load_lora_weights(diffusers_layout(adapter))
    adapted = pipeline("a red five", seed=1, **CALL).frames
    with pytest.raises(BadInputError, match="fuse_lora"):
        pipeline.save_pretrained(tmp_path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path)
    loaded = UniViGUPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded("a red five", seed=1, **CALL).frames, adapted, atol=1e-4)


def test_a_saved_adapter_loads_in_wan_pipeline(tiny_wan_folder, wan, tmp_path):
    pipeline = load(tiny_wan_folder)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    wan.load_lora_weights(tmp_path)
    loaded = get_peft_model_state_dict(wan.transformer, adapter_name=next(iter(wan.transformer.peft_config)))
    wan.unload_lora_weights()
    assert loaded.keys() == layers.keys()
    assert all(torch.equal(loaded[key], layers[key]) for key in layers)


def test_the_adapter_that_a_model_was_trained_with_is_saved_and_loaded_with_it(tiny_wan_folder, wan, tmp_path):
    pipeline = load(tiny_wan_folder)
    plain = pipeline("a red five", seed=1, **CALL).frames
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    pipeline.transformer.add_adapter(LoraConfig(**config))
    adapted = pipeline("a red five", seed=1, **CALL).frames
    assert np.abs(adapted - plain).max() > 1e-3
    finish_lora(pipeline.transformer, {"merge": False})
    for folder in (tmp_path / "first", tmp_path / "second"):  # what was loaded can be saved again
        pipeline.save_pretrained(folder)
        np.testing.assert_allclose(pipeline("a red five", seed=1, **CALL).frames, adapted, atol=1e-4)
        pipeline = UniViGUPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(pipeline("a red five", seed=1, **CALL).frames, adapted, atol=1e-4)
    saved = load_file(tmp_path / "second/transformer/diffusion_pytorch_model.safetensors")
    base = load_file(tiny_wan_folder / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())
    wan.load_lora_weights(tmp_path / "second")
    given = {"latents": torch.randn(1, 4, 3, 8, 8), "max_sequence_length": 32}
    theirs = wan("a red five", **CALL, **given).frames
    wan.unload_lora_weights()
    pipeline.scheduler = wan.scheduler
    np.testing.assert_allclose(pipeline("a red five", **CALL, **given).frames, theirs, atol=1e-4)
    pipeline.unload_lora_weights()
    plain = wan("a red five", **CALL, **given).frames
    np.testing.assert_allclose(pipeline("a red five", **CALL, **given).frames, plain, atol=1e-4)


def test_what_is_no_adapter_of_this_base_is_refused_in_one_sentence(tiny_wan_folder, adapter, tmp_path):
    pipeline = load(tiny_wan_folder)
    wide = {(*key[:1], *key[1:]): [torch.zeros(4, 5120), torch.zeros(5120, 4)] for key in adapter}
    deep = {(block + 30, *rest): pair for (block, *rest), pair in adapter.items()}
    cases = {
        "a width of 5120, and this model's layer one of 24": diffusers_layout(wide),
        "the layer blocks.30.attn1.to_q, which this model doesn't have": diffusers_layout(deep),
        "no weights for Wan's transformer": {"unet.down.lora_A.weight": torch.zeros(4, 4)},
    }
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    torch.save(diffusers_layout(adapter), tmp_path / "pytorch_lora_weights.bin")
    cases["can't be loaded"] = tmp_path / "broken.safetensors"
    for message, source in cases.items():
        with pytest.raises(BadInputError, match=message) as caught:
            pipeline.load_lora_weights(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError, match="in safetensors"):  # a pickle is not read
        pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    assert not getattr(pipeline.transformer, "peft_config", None)
