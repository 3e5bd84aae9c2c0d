"""The memory of evaluations and samples, against real tensors and against what must be kept."""

import pytest
import torch

from univigu import UniViGUTransformer3DModel, layers
from univigu.errors import ConfigError
from univigu.sampling import text_field
from univigu.training.engine import TrainingConfig
from univigu.training.memory import state_memory
from univigu.training.memory_check import needed_by_task, needed_memory
from univigu.training.memory_looks import Look, peak_bytes
from univigu.training.meta_tensors import LiveBytes

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 4, "text_dim": 8}
TEXT = {"vocab_size": 40, "tokenizer_length": 40, "text_latent_dim": 4, "text_length": 8}
SIZES = {"video_tokens": 1024, "text_tokens": 8, "context_tokens": 16, "batch_size": 1, "precision": "fp32"}
CACHE = 2 * (1024 + 16) * 32 * 4  # keys and values of one block
CONDITION = 2 * 16 * 32 * 4  # those of the condition alone


@pytest.fixture(scope="module")
def shape():
    return dict(UniViGUTransformer3DModel(**SHAPE, **TEXT).config)


def peak(shape, look, layers, **sizes):
    return peak_bytes(look, shape | {"num_layers": layers}, **SIZES | sizes)


def test_a_caption_needs_what_the_same_code_needs_on_real_tensors(shape, monkeypatch):
    monkeypatch.setattr(layers, "CPU_TOKENS", 10**9)  # a GPU computes all tokens at once
    torch.manual_seed(0)
    model = UniViGUTransformer3DModel.from_config(shape)
    with torch.no_grad(), LiveBytes() as counted:
        counted.ignore([*model.parameters(), *model.buffers()])
        latents, empty = torch.zeros(1, 16, 1, 64, 64), torch.zeros(1, 16, 8)
        field = text_field(model, latents, [0], empty, empty, 2.0, 0.1)
        z = torch.zeros(1, 8, 4)
        for tau in (0.0, 0.5):
            z = z + field(z, tau)
    assert peak(shape, Look("caption", guided=True), 4) == pytest.approx(counted.peak, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("look", "kept"),
    [
        (Look("caption"), CACHE),
        (Look("caption", guided=True), 2 * CACHE),
        (Look("evaluation"), CACHE),
        (Look("generate"), CONDITION),
        (Look("generate", guided=True), 2 * CONDITION),
    ],
)
def test_each_more_block_needs_the_keys_and_values_that_are_kept_at_a_time(shape, look, kept):
    grown = peak(shape, look, 60) - peak(shape, look, 40)
    assert grown == pytest.approx(20 * kept, rel=0.02, abs=1)


@pytest.mark.slow
def test_the_largest_task_of_a_run_counts_and_a_run_without_samples_has_none(shape):
    deep = shape | {"num_layers": 40}
    settings = {"steps": 1, "batch_size": 1, "learning_rate": 1.0, "gradient_checkpointing": 1, "micro_batch_size": 1}
    sizes = {"video_tokens": 1024, "context_tokens": 16, "world_size": 1}
    config = TrainingConfig(**settings, samples_every=1)
    tasks = needed_by_task(deep, config, **sizes)
    assert list(tasks) == ["training step", "evaluation", "caption", "generate"]
    assert all(parts["total"] == sum(parts.values()) - parts["total"] for parts in tasks.values())
    assert needed_memory(deep, config, **sizes) == max(tasks.values(), key=lambda parts: parts["total"])
    held = state_memory(deep, world_size=1, zero_stage=0, precision="fp32")
    assert held.items() <= tasks["evaluation"].items()
    alone = needed_by_task(deep, TrainingConfig(**settings, samples_every=0), **sizes)
    assert list(alone) == ["training step", "evaluation"]


def test_another_kind_of_look_is_refused(shape):
    with pytest.raises(ConfigError, match="Unknown kind of look 'glance'"):
        peak(shape, Look("glance"), 4)
