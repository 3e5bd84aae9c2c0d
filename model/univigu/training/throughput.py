"""How fast a run is, against what its GPUs could do.

FLOPs are the model's own: what recomputing activations costs is not counted, as usual for an MFU.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from univigu.hardware import recognise_gpu
from univigu.objective import ObjectiveConfig, TrainingObjective
from univigu.planning import Tokens, mean_step, task_costs
from univigu.training.engine import TrainingConfig
from univigu.transformer import UniViGUTransformer3DModel


def peak_tflops(device: torch.device) -> float | None:
    """What a GPU can do at most, or None where that isn't known: on a CPU, on a GPU that isn't in the table."""
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
    learning_share: float = 1.0,
) -> float:
    """Floating-point operations of a training step, a sample, on average over tasks and self-conditioning.

    latents: (T, H, W). learning_share: of the weights, that learn; for the others no gradient is computed, though it
    is passed on through them.
    """
    tokens = Tokens(video_tokens(transformer, latents), transformer.config.text_length, context_tokens)
    return mean_step(task_costs(transformer, tokens, objective), objective.self_conditioning, learning_share - 1)


def video_tokens(transformer: UniViGUTransformer3DModel, latents: Sequence[int]) -> int:
    """Patches of latents of size (T, H, W)."""
    frames, height, width = transformer.grid(latents)
    return frames * height * width


class Throughput:
    """Samples, tokens and FLOPs a second since the run began, without what lies between steps."""

    def __init__(self, objective: TrainingObjective, config: TrainingConfig, device: torch.device) -> None:
        self.objective, self.batch_size = objective, config.batch_size
        self.peak = config.peak_tflops or peak_tflops(device)
        self.learning_share = learning_share(objective)
        self._flops: dict[tuple[int, ...], float] = {}
        self.seconds = self.waited = self.flops = 0.0
        self.samples = self.tokens = 0

    def add(self, seconds: float, waited: float, latents: Sequence[int], context_tokens: int) -> None:
        """Count a step: how long it took, and how much of that it waited for its batch; of latents (T, H, W)."""
        transformer, size = self.objective.transformer, tuple(latents)
        if size not in self._flops:
            self._flops[size] = sample_flops(
                transformer, self.objective.config, size, context_tokens, self.learning_share
            )
        self.seconds += seconds
        self.waited += waited
        self.samples += self.batch_size
        self.tokens += self.batch_size * (video_tokens(transformer, size) + transformer.config.text_length)
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


def learning_share(objective: nn.Module) -> float:
    """The share of weights that learn."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in objective.parameters()]
    return sum(size for size, learns in sizes if learns) / sum(size for size, _ in sizes)
