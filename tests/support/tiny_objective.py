"""A model of two blocks, and batches of random samples for it: latents (B, 4, 2, 4, 4), texts of 6 tokens."""

from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel

from univigu.tasks import ObjectiveConfig
from univigu.transformer import UniViGUTransformer3DModel

DEFAULT = ObjectiveConfig()
VOCABULARY, LENGTH = 30, 6


def build(prediction="categorical", zero_head=False):
    torch.manual_seed(0)
    base = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    model = UniViGUTransformer3DModel.from_wan(
        base,
        vocab_size=VOCABULARY + 2,
        tokenizer_length=VOCABULARY,
        text_latent_dim=8,
        text_length=LENGTH,
        prediction=prediction,
    )
    if not zero_head:
        torch.nn.init.normal_(model.text_head.proj_out.weight, std=0.1)
    return model


def make_batch(size=16, epoch=0):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, size, LENGTH), generator=generator)
    ids[:, :, -2], ids[:, :, -1] = 1, 0
    return {
        "latents": torch.randn(size, 4, 2, 4, 4, generator=generator),
        "prompt_embeds": torch.randn(size, 5, 32, generator=generator),
        "empty_embeds": torch.randn(5, 32, generator=generator),
        "prompt_ids": ids[0],
        "target_ids": ids[1],
        "sample_ids": torch.arange(size) + 100,
        "epochs": torch.full((size,), epoch),
    }


def take(batch, rows):
    return {name: tensor if name == "empty_embeds" else tensor[rows] for name, tensor in batch.items()}


def alone(task):
    return replace(DEFAULT, shares={task: 1.0})
