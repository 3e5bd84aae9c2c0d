"""Counting on tensors without memory: what is known of earlier operations changes no figure."""

from contextlib import nullcontext

import pytest
import torch

from univigu.training import memory, meta_tensors
from univigu.training.meta_tensors import KnownShapes, without_data

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 48,
    "text_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "vocab_size": 32,
    "text_latent_dim": 8,
    "text_length": 6,
    "rope_max_seq_len": 64,
}


def count(task, recompute):
    with without_data():
        model = memory.build_model(CONFIG, 2, torch.bfloat16)
        if recompute:
            model.enable_gradient_checkpointing(meta_tensors.recomputed)
        return memory.tracked_step(model, task, (2, 4, 2, 4, 4), 6, 5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("task", memory.COSTLIEST)
def test_bytes_are_the_same_whether_shapes_are_known_or_computed(monkeypatch, task, recompute):
    known = [count(task, recompute) for _ in range(2)]
    monkeypatch.setattr(meta_tensors, "KnownShapes", nullcontext)
    assert known == [count(task, recompute)] * 2


def test_a_known_shape_has_the_kind_of_numbers_that_is_the_default_now():
    with KnownShapes(), torch.device("meta"):
        torch.empty(3)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.empty(3).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_shares_memory_with_an_argument_still_does():
    with KnownShapes(), torch.device("meta"):
        for _ in range(2):
            whole = torch.empty(4, 6)
            part = torch.ops.aten._unsafe_view(whole, [6, 4])
            assert part.untyped_storage()._cdata == whole.untyped_storage()._cdata
            assert (whole + 1).untyped_storage()._cdata != whole.untyped_storage()._cdata


def test_tensors_with_data_are_computed():
    with KnownShapes():
        found = [torch.arange(3) + number for number in (1, 2)]
    assert [one.tolist() for one in found] == [[1, 2, 3], [2, 3, 4]]
