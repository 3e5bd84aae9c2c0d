"""A Wan checkpoint with a new text side: equal weights, the text side of a model made whole, and no memory for two."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from univigu import from_wan, wan
from univigu.layers import UniViGUBlock
from univigu.transformer import UniViGUTransformer3DModel

WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 3, "text_dim": 16}
TEXT = {"vocab_size": 40, "tokenizer_length": 40, "text_latent_dim": 8, "text_length": 6}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return WanTransformer3DModel(**WAN)


@pytest.mark.parametrize("ffn_init", ["new", "shared"])
def test_every_weight_is_there_and_wans_are_the_checkpoints_own(base, ffn_init):
    model = UniViGUTransformer3DModel.from_wan(base, **TEXT, ffn_init=ffn_init)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    state, theirs = model.state_dict(), base.state_dict()
    assert {key for key in state if not wan.is_text_side(key)} == set(theirs)
    assert all(torch.equal(state[key], value) for key, value in theirs.items())
    assert all(state[key].data_ptr() == value.data_ptr() for key, value in theirs.items())


def test_the_text_side_has_the_numbers_of_a_model_made_whole(base):
    made = []
    for make in (UniViGUTransformer3DModel, lambda **config: UniViGUTransformer3DModel.from_wan(base, **TEXT)):
        torch.manual_seed(1)
        made.append(make(**WAN, **TEXT).state_dict())
    drawn = [key for key in made[0] if "ffn_text" in key or key.startswith(("text_space", "text_embedder.proj"))]
    assert drawn
    assert all(torch.equal(made[0][key], made[1][key]) for key in drawn)


def test_wans_initial_weights_are_dropped_block_by_block(monkeypatch):
    held = []
    init = UniViGUBlock.__init__

    def count(self, *arguments):
        init(self, *arguments)
        held.append(self)

    monkeypatch.setattr(UniViGUBlock, "__init__", count)
    whole = UniViGUTransformer3DModel(**WAN, **TEXT)
    assert not any(parameter.is_meta for parameter in whole.parameters())
    held.clear()
    with from_wan.blocks_without_wans_weights():
        UniViGUTransformer3DModel(**WAN, **TEXT)
    for block in held:
        there = {name for name, parameter in block.named_parameters() if not parameter.is_meta}
        assert there == {name for name, _ in block.named_parameters() if name.startswith(("ffn_text", "text_"))}


def test_a_copied_network_starts_from_the_videos(base):
    model = UniViGUTransformer3DModel.from_wan(copy.deepcopy(base), **TEXT, ffn_init="copy")
    for block in model.blocks:
        assert torch.equal(block.ffn_text.net[2].weight, block.ffn.net[2].weight)
