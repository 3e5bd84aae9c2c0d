"""Blocks are compiled where the machine and the model allow it; elsewhere one sentence says what is missing."""

import pytest
import torch

from univigu.compiling import compile_blocks
from univigu.errors import ConfigError
from univigu.pipeline import UniViGUPipeline
from univigu.transformer import UniViGUTransformer3DModel


@pytest.mark.slow
def test_compiled_blocks_have_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    wan = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    text = {"vocab_size": 60, "tokenizer_length": 58, "text_latent_dim": 16, "text_length": 12}
    model = UniViGUTransformer3DModel(**wan, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, **text)
    torch.nn.init.normal_(model.text_head.proj_out.weight)
    inputs = torch.randn(2, 4, 3, 8, 6), torch.rand(2), torch.randn(2, 10, 32), torch.randn(2, 12, 16), torch.rand(2)

    def outputs_and_gradients():
        model.zero_grad()
        out = model(*inputs)
        (out.video.square().mean() + out.text.square().mean()).backward()
        return [out.video, out.text, *(p.grad for p in model.parameters() if p.grad is not None)]

    before = [tensor.detach().clone() for tensor in outputs_and_gradients()]
    compile_blocks(model)
    torch.testing.assert_close(outputs_and_gradients(), before, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_joint_samples_and_captions_go_through_compiled_blocks(speaking_model):
    """The compiler's first part alone, which fails where a block falls into several graphs."""
    pipeline = UniViGUPipeline.from_pretrained(speaking_model)
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_frames": 5, "height": 32, "width": 32}

    def samples():
        latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        frames, texts = pipeline.joint(["a dog runs"], **size, seed=[0], output_type="uint8", return_dict=False)
        return frames, texts, pipeline.caption_latents(latents, 2, seed=[0])

    before = samples()
    compile_blocks(pipeline.transformer, "eager")
    frames, *texts = samples()
    assert texts == [*before[1:]]
    torch.testing.assert_close(torch.as_tensor(frames).float(), torch.as_tensor(before[0]).float(), atol=1.0, rtol=0)


def test_without_a_compiler_nothing_is_compiled(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    model._repeated_blocks = ["Linear"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"torch finds no C\+\+ compiler .*set 'compile' to none"):
        compile_blocks(model)


def test_a_model_whose_blocks_differ_is_refused():
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        compile_blocks(torch.nn.Linear(2, 2))
