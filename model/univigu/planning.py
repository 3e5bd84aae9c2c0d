"""The cost of training a model, computed without running it: operations and bytes.

Operations come from the model's own count (`UniViGUTransformer3DModel.estimate_flops`). A backward pass costs two
forward passes, recomputed activations one more, and self-conditioning a forward pass without gradient.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from univigu.tasks import ObjectiveConfig
from univigu.transformer import UniViGUTransformer3DModel

CONTEXT_GIB = 1.5  # of a CUDA context with its libraries and NCCL's buffers
FRAGMENTATION = 0.05  # of a GPU's memory, lost between the allocator's blocks
CLIP_BITS_PER_PIXEL = 0.1  # of an H.264 clip at x264's default quality
STATE_BYTES = 12  # per trained parameter in a checkpoint: fp32 weight and two moments


class Tokens(NamedTuple):
    """The lengths of a sample's three sequences, in tokens."""

    video: int
    text: int
    context: int


class TaskCost(NamedTuple):
    """Floating-point operations of one sample of a task."""

    share: float
    forward: int
    guess: int  # of the extra pass in a self-conditioned step
    whole_guess: int  # of that pass where activations are recomputed, and no video is cached

    def step(self, self_conditioning: float, recomputed: float) -> float:
        """Operations of a training step; `recomputed` is the share of forward passes that run again."""
        return (3 + recomputed) * self.forward + self_conditioning * self.first_guess(recomputed)

    def first_guess(self, recomputed: float) -> int:
        """Operations of the extra pass."""
        return self.whole_guess if recomputed else self.guess


def task_costs(model: UniViGUTransformer3DModel, tokens: Tokens, objective: ObjectiveConfig) -> dict[str, TaskCost]:
    """Operations of one sample, by task; ``model`` may be on the meta device.

    The understand task has ``prefix`` attention, where each of the objective's ``text_draws`` after the first costs the
    text tokens alone, and so does the extra pass beside a cached video (see `predict_prefix`). In the generate task the
    text is given, so there is no extra pass.
    """
    joint, draws = model.estimate_flops(*tokens), objective.text_draws
    video, text = model.estimate_caption_flops(*tokens)
    whole = video + draws * text
    costs = {"understand": (whole, draws * text, whole), "joint": (joint, joint, joint), "generate": (joint, 0, 0)}
    total = sum(objective.shares.values())
    return {task: TaskCost(share / total, *costs[task]) for task, share in objective.shares.items() if share}


def mean_step(costs: Mapping[str, TaskCost], self_conditioning: float, recomputed: float) -> float:
    """Operations of a training step per sample, averaged over tasks."""
    return sum(cost.share * cost.step(self_conditioning, recomputed) for cost in costs.values())


def slowest_step(
    costs: Mapping[str, TaskCost], self_conditioning: float, recomputed: float, samples: int, gpus: int
) -> float:
    """Expected operations of the busiest GPU in a step with ``samples`` per GPU, over random draws of tasks.

    All GPUs wait for the busiest one. Self-conditioning is on or off for all of them, so the two cases are computed
    separately: for each, the distribution of one GPU's sum, then the expected maximum over ``gpus`` of them.
    """
    found = 0.0
    for guessing, probability in ((0.0, 1 - self_conditioning), (1.0, self_conditioning)):
        sums = {0.0: 1.0}  # operations of one GPU, and the probability of that sum
        for _ in range(samples):
            drawn: dict[float, float] = {}
            for done, chance in sums.items():
                for cost in costs.values():
                    work = done + cost.step(guessing, recomputed)
                    drawn[work] = drawn.get(work, 0.0) + chance * cost.share
            sums = drawn
        below = 0.0
        for work, chance in sorted(sums.items()):
            up_to = min(1.0, below + chance)
            found += probability * work * (up_to**gpus - below**gpus)
            below = up_to
    return found


def count_flops(function: Any, *arguments: Any) -> int:
    """Operations of a call on meta tensors, counted by torch."""
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def usable_memory(memory_gib: float) -> int:
    """Bytes of a GPU's memory that are available for tensors."""
    return int((memory_gib * (1 - FRAGMENTATION) - CONTEXT_GIB) * 2**30)


def clip_bytes(frames: int, height: int, width: int) -> int:
    """Approximate bytes of an H.264 clip."""
    return int(frames * height * width * CLIP_BITS_PER_PIXEL / 8)
