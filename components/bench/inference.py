"""Captions beside a cached video against the paper's procedure, and a step of generation against diffusers' own Wan.

All of it is on the CPU with one thread, in fp32, with random weights, 4,096 video tokens, 64 text tokens and 128
condition tokens, at three sizes. Each comparison is timed in pairs, one of each side in turn, so that other load on the
machine affects both.

- ``caption``: 50 Euler steps. The paper's procedure (eq 17) is a joint pass over video and text in each step; ours
  computes the video's keys and values once (``prefix``). ``times_faster`` is the paper's time over ours.
- ``generate``: a step of `univigu.sampling.video_field` beside a given text, over a forward pass of Wan on the same
  video tokens. ``guided``: the same with guidance, over two passes of Wan, as `WanPipeline` takes them. Both branches
  share what the first block computes of the video alone, which is little of a deep model: hence the size of more
  blocks, at which no caption is timed.

`ratio` is the worst of ``generate``.
"""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from univigu import UniViGUTransformer3DModel

STEPS = 50  # of a caption
PAIRS, CAPTION_PAIRS = 7, 1  # a pair of captions takes a minute
LATENTS, TEXT_TOKENS, CONTEXT_TOKENS = (16, 32, 32), 64, 128  # 16 x 16 x 16 patches of 1 x 2 x 2
SIZES = {  # heads, width of a head, blocks
    "width 256, 2 blocks": (4, 64, 2),
    "width 768, 1 block": (6, 128, 1),
    "width 256, 8 blocks": (4, 64, 8),
}
CAPTIONED = 2  # blocks, up to which captions are timed: the paper's procedure takes minutes beyond
GUIDANCE = 3.0


def measure() -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            sizes = {name: compare(*size) for name, size in SIZES.items()}
    finally:
        torch.set_num_threads(threads)
    return {
        "ratio": max(size["generate"]["ratio"] for size in sizes.values()),
        "guided_ratio": max(size["guided"]["ratio"] for size in sizes.values()),
        "caption_times_faster": min(size["caption"]["times_faster"] for size in sizes.values() if "caption" in size),
        "sizes": sizes,
        "caption_steps": STEPS,
        "tokens": {"video": 4096, "text": TEXT_TOKENS, "condition": CONTEXT_TOKENS},
        "threads": 1,
        "torch": torch.__version__,
    }


def compare(heads: int, head_dim: int, layers: int) -> dict[str, dict[str, float]]:
    """The comparisons at one size, each with the seconds of both sides."""
    from components.bench.train_step import model_size

    size = model_size(heads, head_dim, layers)
    model = make_model(size)
    wan = wan_pass(size)
    found = {
        "generate": timed(video_step(model, 1.0), wan, PAIRS),
        "guided": timed(video_step(model, GUIDANCE), lambda: (wan(), wan()), PAIRS),
    }
    if layers <= CAPTIONED:
        caption = timed(cached_caption(model), papers_caption(model), CAPTION_PAIRS)
        found["caption"] = caption | {"times_faster": round(1 / caption["ratio"], 2)}
    return found


def timed(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> dict[str, float]:
    """The median seconds of both sides, and the median of the pairs' ratios, ours over theirs."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    warm_up = pairs > 1
    for pair in range(pairs + warm_up):
        order = [("ours", ours), ("theirs", theirs)]
        for name, run in order if pair % 2 else reversed(order):
            started = time.perf_counter()
            run()
            if pair or not warm_up:
                seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    medians = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    return {**medians, "ratio": round(ratio, 4)}


def make_model(size: dict[str, int]) -> "UniViGUTransformer3DModel":
    import torch

    from univigu import UniViGUTransformer3DModel

    torch.manual_seed(0)
    text = {"text_latent_dim": 64, "vocab_size": 512, "tokenizer_length": 512, "text_length": TEXT_TOKENS}
    return UniViGUTransformer3DModel(**size, **text).eval()


def cached_caption(model: "UniViGUTransformer3DModel") -> Callable[[], object]:
    import torch

    from univigu.sampling import text_field

    latents, empty = torch.randn(1, 16, *LATENTS), torch.randn(1, CONTEXT_TOKENS, 64)

    def run() -> object:
        field = text_field(model, latents, [0], empty, empty, 1.0, 0.1)
        return euler(field)

    return run


def papers_caption(model: "UniViGUTransformer3DModel") -> Callable[[], object]:
    """Eq 17 as printed: the clean video and the text go through all layers in each step."""
    import torch

    latents, empty, table = torch.randn(1, 16, *LATENTS), torch.randn(1, CONTEXT_TOKENS, 64), model.text_space()
    ones = torch.ones(1)

    def field(z: torch.Tensor, tau: float) -> torch.Tensor:
        at = torch.full((1,), tau)
        hidden = model(latents, ones, empty, z, at).text
        return model.read_text(hidden, z, at, table, temperature=0.1).velocity

    return lambda: euler(field)


def euler(field: Callable[..., Any]) -> object:
    """`STEPS` Euler steps of the text from noise."""
    import torch

    z = torch.randn(1, TEXT_TOKENS, 64, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        z = z + field(z, step / STEPS) / STEPS
    return z


def video_step(model: "UniViGUTransformer3DModel", scale: float) -> Callable[[], object]:
    """A step of a video beside a given text, with guidance if ``scale`` is above 1."""
    import torch

    from univigu.sampling import Guide, video_field

    text, condition = torch.randn(1, TEXT_TOKENS, 64), torch.randn(2, 1, CONTEXT_TOKENS, 64)
    field = video_field(model, text, 1.0, [0], Guide(condition[0], condition[1], scale))
    z = torch.randn(1, 16, *LATENTS)
    return lambda: field(z, 0.5)


def wan_pass(size: dict[str, int]) -> Callable[[], object]:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**size).eval()
    latents, condition = torch.randn(1, 16, *LATENTS), torch.randn(1, CONTEXT_TOKENS, 64)
    return lambda: model(latents, torch.tensor([500.0]), condition, return_dict=False)[0]
