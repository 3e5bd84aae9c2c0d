"""The speed of a run, and the share of its GPUs' peak that it reaches (MFU).

FLOPs are the model's own: recomputing activations is not counted, as usual for an MFU.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from univigu.hardware import recognise_gpu
from univigu.objective import TrainingObjective
from univigu.planning import Tokens, mean_step, task_costs
from univigu.tasks import ObjectiveConfig
from univigu.training.engine import TrainingConfig
from univigu.transformer import UniViGUTransformer3DModel


def peak_tflops(device: torch.device) -> float | None:
    """The peak TFLOP/s of a GPU, or None for a CPU and for a GPU that isn't in the table."""
    if device.type != "cuda":
        return None
    gpu = recognise_gpu(torch.cuda.get_device_name(device))
    # pyrefly: ignore[bad-return]
    return gpu and gpu.tflops


def sample_flops(
    transformer: UniViGUTransformer3DModel,
    objective: ObjectiveConfig,
    latents: Sequence[int],
    context_tokens: int,
    trainable_share: float = 1.0,
) -> float:
    """Floating-point operations of a training step per sample, averaged over tasks and self-conditioning.

    latents: (T, H, W). trainable_share: the share of weights that are trained. For the others no weight gradient is
    computed, but gradients still pass through them.
    """
    tokens = Tokens(video_tokens(transformer, latents), transformer.config.text_length, context_tokens)
    return mean_step(task_costs(transformer, tokens, objective), objective.self_conditioning, trainable_share - 1)


def mean_draws(objective: ObjectiveConfig) -> float:
    """The texts that are computed per sample: ``text_draws`` in the understand task, otherwise one; the mean."""
    share = objective.shares.get("understand", 0.0) / sum(objective.shares.values())
    return 1 + share * (objective.text_draws - 1)


def video_tokens(transformer: UniViGUTransformer3DModel, latents: Sequence[int]) -> int:
    """The number of patches of latents of size (T, H, W)."""
    frames, height, width = transformer.grid(latents)
    return frames * height * width


class Throughput:
    """Samples, tokens and FLOPs per second since the run began; the time between steps is not counted.

    A draw of a text is counted as tokens of its own. Tokens and FLOPs are means over the objective's shares of tasks.
    """

    def __init__(self, objective: TrainingObjective, config: TrainingConfig, device: torch.device) -> None:
        self.objective, self.batch_size = objective, config.batch_size
        self.peak = config.peak_tflops or peak_tflops(device)
        self.trainable_share = trainable_share(objective)
        self._flops: dict[tuple[int, ...], float] = {}
        self.seconds = self.waited = self.flops = 0.0
        self.samples, self.tokens = 0, 0.0
        self.text_tokens = mean_draws(objective.config) * objective.transformer.config.text_length

    def add(self, seconds: float, waited: float, latents: Sequence[int], context_tokens: int) -> None:
        """Count a step with latents of size (T, H, W): its duration, and how much of it was spent waiting for data."""
        transformer, size = self.objective.transformer, tuple(latents)
        if size not in self._flops:
            self._flops[size] = sample_flops(
                transformer, self.objective.config, size, context_tokens, self.trainable_share
            )
        self.seconds += seconds
        self.waited += waited
        self.samples += self.batch_size
        self.tokens += self.batch_size * (video_tokens(transformer, size) + self.text_tokens)
        self.flops += self.batch_size * self._flops[size]

    def figures(self) -> dict[str, float]:
        """``samples_per_second``, ``tokens_per_second``, ``tflops_per_process``, ``loading_share`` and, where a peak
        is known, ``mfu``."""
        seconds = max(self.seconds, 1e-9)
        tflops = self.flops / seconds / dist.get_world_size() / 1e12
        figures = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops_per_process": tflops,
            "loading_share": self.waited / seconds,
        }
        return figures | ({"mfu": tflops / self.peak} if self.peak else {})


def trainable_share(objective: nn.Module) -> float:
    """The share of weights that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in objective.parameters()]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
