"""The script of docs/api.md, in diffusers' idiom, on a trained model and on a checkpoint in Wan2.1's layout."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from univigu import wan
from univigu.video import read_video

REPO = Path(__file__).parents[2]
LOAD = 'UniViGUPipeline.from_pretrained("model/tiny-univigu")'


def script():
    page = (REPO / "docs/api.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block.count(LOAD) == 1
    return block


def write_adapter(path, transformer):
    """An adapter of the attention layers of a transformer, in diffusers' layout."""
    generator = torch.Generator().manual_seed(0)
    layers = {name: layer for name, layer in transformer.named_modules() if re.search(r"\.attn\d\.to_[qkv]$", name)}
    state = {}
    for name, layer in layers.items():
        wide, narrow = layer.weight.shape
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, narrow, generator=generator) / narrow**0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(wide, 2, generator=generator) / 2
    save_file(state, path)


def wan_weights_of(pipeline):
    """A `WanPipeline` of the video side of a pipeline of ours."""
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    known = WanTransformer3DModel._get_init_keys(WanTransformer3DModel)
    transformer = WanTransformer3DModel(**{key: value for key, value in config.items() if key in known})
    state = pipeline.transformer.state_dict()
    transformer.load_state_dict({key: value for key, value in state.items() if not wan.is_text_side(key)})
    parts = {name: getattr(pipeline, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return WanPipeline(transformer=transformer.eval(), **parts)


def same_call(pipe, **more):
    """The script's call, without its callback."""
    sizes = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 10, "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(7)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red five moves up", negative_prompt="a blue two", generator=generator, **sizes, **more).frames


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["the bundled model", "wan 2.1's layout"])
def test_the_documented_script_runs_and_its_frames_are_those_of_wan_pipeline(
    kind, tiny_wan_folder, tmp_path, monkeypatch, capsys
):
    from univigu import UniViGUPipeline

    bundled = kind == "the bundled model"
    folder = REPO / "model/tiny-univigu" if bundled else tiny_wan_folder
    load = UniViGUPipeline.from_pretrained if bundled else UniViGUPipeline.from_wan
    base = load(folder)
    theirs = wan_weights_of(base) if bundled else WanPipeline.from_pretrained(folder)
    write_adapter(tmp_path / "lora.safetensors", base.transformer)
    monkeypatch.chdir(tmp_path)
    line = f"UniViGUPipeline.{load.__name__}({str(folder)!r})"
    (tmp_path / "script.py").write_text(script().replace(LOAD, line))
    made = runpy.run_path("script.py")
    pipe, frames = made["pipe"], made["output"].frames

    assert capsys.readouterr().out.splitlines() == [f"step {i} of 10" for i in range(1, 11)]
    written, fps = read_video(tmp_path / "five.mp4")
    assert (written.shape, fps) == ((9, 32, 32, 3), pipe.config.fps)
    assert np.abs(written / 255 - frames[0]).mean() < 0.1  # the codec is lossy

    theirs.scheduler = pipe.scheduler
    theirs.load_lora_weights("lora.safetensors", adapter_name="style")
    theirs.set_adapters("style", 0.5)
    length = pipe.config.max_sequence_length
    expected = same_call(theirs, max_sequence_length=length)
    ours = same_call(pipe, text_stream=False) if bundled else frames
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(same_call(base, text_stream=False) - expected).max() > 1e-3  # the adapter has an effect
    if bundled:  # the text beside the video takes part
        assert np.abs(frames - expected).max() > 1e-3
