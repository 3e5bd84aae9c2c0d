"""Attention of both streams at once: laid out head by head where a CPU only computes, with the same result."""

import pytest
import torch

from univigu.joint_attention import empty_by_heads, rotate
from univigu.transformer import UniViGUTransformer3DModel

WAN = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32}
TEXT = {"vocab_size": 60, "tokenizer_length": 58, "text_latent_dim": 16, "text_length": 12}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UniViGUTransformer3DModel(**WAN, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, **TEXT)
    torch.nn.init.normal_(model.text_head.proj_out.weight)
    return model


@pytest.mark.parametrize("attention", ["joint", "video_only", "prefix"])
@pytest.mark.parametrize("texts", [2, 4])
def test_a_pass_without_gradients_has_the_outputs_of_one_with_gradients(model, attention, texts):
    torch.manual_seed(1)
    video, condition, text = torch.randn(2, 4, 3, 8, 6), torch.randn(texts, 10, 32), torch.randn(texts, 12, 16)
    inputs = (video, torch.rand(2), condition, text, torch.rand(texts))
    with torch.no_grad():
        without = model(*inputs, attention=attention)
    beside = model(*inputs, attention=attention)
    assert len(without.video) == texts
    torch.testing.assert_close(without.video, beside.video, atol=1e-5, rtol=1e-5)
    if attention != "video_only":
        torch.testing.assert_close(without.text, beside.text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_that_is_written_elsewhere_has_the_same_bits(dtype):
    torch.manual_seed(2)
    x, angles = torch.randn(2, 5, 3, 16).to(dtype), torch.randn(1, 5, 1, 8)
    out = empty_by_heads(x.flatten(2), 3, 5)
    found = rotate(x, torch.stack([angles.cos(), angles.sin()], dim=-1), out)
    assert found is out
    assert torch.equal(found, rotate(x, torch.stack([angles.cos(), angles.sin()], dim=-1)))
