"""A training step (forward, backward) of our transformer against diffusers' own Wan at equal tokens, width and depth.

Ours attends jointly to 2,048 video and 64 text tokens, with the paper's velocity head; Wan gets 2,112 video tokens.
Both get the same condition, in fp32 on the CPU, at three widths, the last of which is Wan2.1 1.3B's. Each size is timed
in pairs, with a step of each side in turn, so that other load on the machine affects both; and on one thread, since
threads that wait for each other suffer most from such load. `ratio` is the worst median of three.

Memory is counted, not sampled, because a process's resident size says little about tensors of a few MB:

- ``saved``: the bytes that autograd keeps between forward and backward (`torch.autograd.graph.saved_tensors_hooks`;
  each storage once, parameters and buffers not at all);
- ``peak``: the most bytes that tensors held at once in forward and backward, beyond parameters, buffers and gradients
  (torch's `MemTracker`, which follows every storage that an operation makes).

`memory_ratio` is the worst ratio of either at any size.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

PAIRS = 7
VIDEO_TOKENS, TEXT_TOKENS, CONTEXT_TOKENS = 2048, 64, 128
OUR_LATENTS, WAN_LATENTS = (8, 32, 32), (11, 24, 32)  # frames, height, width: 2,048 and 2,112 patches of 1 x 2 x 2
FFN_OF_WIDTH = 8960 / 1536  # Wan2.1 1.3B's
SIZES = {  # heads, width of a head, blocks
    "width 256, 4 blocks": (4, 64, 4),
    "width 768, 2 blocks": (6, 128, 2),
    "width 1536, 1 block": (12, 128, 1),
}


def measure() -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = {name: compare(*size) for name, size in SIZES.items()}
    finally:
        torch.set_num_threads(threads)
    return {
        "ratio": max(size["ratio"] for size in sizes.values()),
        "memory_ratio": max(max(size["saved_ratio"], size["peak_ratio"]) for size in sizes.values()),
        "sizes": sizes,
        "pairs": PAIRS,
        "tokens": {"video": VIDEO_TOKENS, "text": TEXT_TOKENS, "wan": VIDEO_TOKENS + TEXT_TOKENS},
        "threads": 1,
        "torch": torch.__version__,
    }


def compare(heads: int, head_dim: int, layers: int) -> dict[str, float]:
    """Seconds per step, bytes saved and peak bytes of both sides at one size."""
    ours, theirs = our_step(heads, head_dim, layers), wan_step(heads, head_dim, layers)
    memory = {"ours": held_bytes(*ours), "wan": held_bytes(*theirs)}
    times: dict[str, list[float]] = {"ours": [], "wan": []}
    for pair in range(PAIRS + 1):
        order = [("ours", ours), ("wan", theirs)]
        for name, (module, step) in order if pair % 2 else reversed(order):
            module.zero_grad(set_to_none=True)
            started = time.perf_counter()
            step().backward()
            if pair:  # the first is a warm-up
                times[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["ours"], times["wan"], strict=True)]
    figures = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in times.items()}
    figures |= {"ratio": round(statistics.median(ratios), 4)}
    for kind in ("saved", "peak"):
        figures |= {f"{name}_{kind}_bytes": values[kind] for name, values in memory.items()}
        figures[f"{kind}_ratio"] = round(memory["ours"][kind] / memory["wan"][kind], 4)
    return figures


Side = tuple[Any, Callable[[], Any]]  # a module, and its forward pass to a loss


def our_step(heads: int, head_dim: int, layers: int) -> Side:
    import torch

    from univigu import UniViGUTransformer3DModel

    torch.manual_seed(0)
    text = {"text_latent_dim": 64, "vocab_size": 512, "tokenizer_length": 512, "text_length": TEXT_TOKENS}
    model = UniViGUTransformer3DModel(**model_size(heads, head_dim, layers), **text, prediction="velocity")
    latents, condition = torch.randn(1, 16, *OUR_LATENTS), torch.randn(1, CONTEXT_TOKENS, 64)
    words, tau = torch.randn(1, TEXT_TOKENS, 64), torch.tensor([0.5])

    def loss() -> torch.Tensor:
        out = model(latents, tau, condition, words, tau, torch.zeros_like(words), attention="joint")
        return out.video.square().mean() + out.text.square().mean()

    return model, loss


def wan_step(heads: int, head_dim: int, layers: int) -> Side:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**model_size(heads, head_dim, layers))
    latents, condition = torch.randn(1, 16, *WAN_LATENTS), torch.randn(1, CONTEXT_TOKENS, 64)
    timestep = torch.tensor([500.0])

    def loss() -> torch.Tensor:
        return model(latents, timestep, condition, return_dict=False)[0].square().mean()

    return model, loss


def model_size(heads: int, head_dim: int, layers: int) -> dict[str, int]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "ffn_dim": int(heads * head_dim * FFN_OF_WIDTH),
        "text_dim": 64,
    }


def held_bytes(module: Any, step: Callable[[], Any]) -> dict[str, int]:
    """Bytes of a step beyond parameters, buffers and gradients: ``saved`` for the backward pass, and ``peak``."""
    return {"saved": saved_bytes(module, step), "peak": peak_bytes(module, step)}


def saved_bytes(module: Any, step: Callable[[], Any]) -> int:
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(storages.values())


def peak_bytes(module: Any, step: Callable[[], Any]) -> int:
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    step().backward()  # allocates the gradients, which the tracked step adds to
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker:
        step().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    own = ("PARAM", "BUFFER", "GRAD")
    return peak["Total"] - sum(size for kind, size in peak.items() if getattr(kind, "name", "") in own)
