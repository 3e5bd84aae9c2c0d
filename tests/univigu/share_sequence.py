"""Compares a model that shares its sequence with the same model alone: started by a test on several processes.

    python share_sequence.py FILE

FILE gets the largest difference of each output and of each gradient, over all processes.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from univigu import UniViGUTransformer3DModel
from univigu.sequence_parallel import make_groups

HEADS = 6
PASSES = ("joint", "prefix", "text_only", "cached", "recomputed", "no text")


def build():
    torch.manual_seed(0)
    model = UniViGUTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        patch_size=(1, 1, 1),
        rope_max_seq_len=64,
        text_latent_dim=8,
        vocab_size=23,
        tokenizer_length=23,
        text_length=5,
    )
    torch.nn.init.normal_(model.text_head.proj_out.weight)
    return model


def outputs(model, name):
    """A pass through the model, over 27 video tokens, which neither 2 nor 3 processes share evenly with a text's 5."""
    random = torch.Generator().manual_seed(1)
    video, condition = torch.randn(2, 4, 3, 3, 3, generator=random), torch.randn(1, 7, 16, generator=random)
    text, guess = torch.randn(2, 2, 5, 8, generator=random)
    video_tau, text_tau = torch.rand(2, 2, generator=random)
    if name in ("cached", "recomputed"):
        cache = model.prefill_video(video, video_tau, condition)
        with torch.no_grad():
            model.denoise_text(text, text_tau, cache)
        return {"text": model.denoise_text(text, text_tau, cache, guess)}
    if name == "no text":
        return {"video": model(video, video_tau, condition).video}
    out = model(video, video_tau, condition, text, text_tau, guess, attention=name)
    return {key: value for key, value in (("video", out.video), ("text", out.text)) if value is not None}


def results(group, name):
    model = build()
    if name == "recomputed":
        model.enable_gradient_checkpointing()
    model.share_sequence(group)
    made = outputs(model, name)
    sum(value.square().sum() for value in made.values()).backward()
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    if group is not None:  # the mean over all processes, as data parallelism takes it
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= group.size
    return {key: value.detach() for key, value in made.items()} | gradients


if __name__ == "__main__":
    dist.init_process_group("gloo")
    group = make_groups(dist.get_world_size(), HEADS)
    found = {}
    for name in PASSES:
        alone, shared = results(None, name), results(group, name)
        found[name] = {key: float((shared[key] - alone[key]).abs().max()) for key in alone}
        found[name]["largest gradient"] = max(float(alone[key].abs().max()) for key in alone)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
