"""The training loop: one engine, one order of samples, and once in a while an evaluation, a checkpoint, a line.

The same code runs as one process on a CPU and under torchrun on many GPUs. What a step computes depends on its number
alone: the samples come from a stream (`SampleStream`), noise and tau from each sample's id and epoch, the learning rate
from the step. So a run that was killed goes on from its checkpoint as if nothing had happened, and ends with the same
weights, bit for bit on one process.
"""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from univigu.errors import ConfigError, CorruptDataError, PreemptedError
from univigu.objective import TrainingObjective, evaluate_heldout
from univigu.training.checkpoints import load_checkpoint, save_checkpoint
from univigu.training.data import LatentDataset, SampleStream, rank_slice
from univigu.training.engine import (
    TrainingConfig,
    clip_gradients,
    gather_weights,
    init_distributed,
    learning_rate,
    make_engine,
)
from univigu.training.records import Curves, Evaluations, ProgressLine, StepSums, heldout_summary

Report = Callable[[int, Mapping[str, float]], None]


def train(
    objective: TrainingObjective,
    dataset: LatentDataset,
    heldout: LatentDataset,
    config: TrainingConfig,
    folder: Path,
    report: Report = lambda step, metrics: None,
) -> None:
    """Train `objective` in place for `config.steps` steps, going on from the newest good checkpoint in `folder`.

    Rank 0 calls `report(step, metrics)` for each row and leaves in `folder`: ``curves.csv``, a row a step;
    ``heldout.json``, what the last `evaluate_heldout` said, and ``heldout.csv``, all of them, a row a (step, bin).
    Raises `PreemptedError` after SIGTERM, with everything saved.
    """
    with _termination_flag() as told_to_stop:
        device = init_distributed()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if config.gradient_checkpointing:
            objective.transformer.enable_gradient_checkpointing()
        engine = make_engine(objective.to(device), config, world_size)
        share = rank_slice(config.batch_size, rank, world_size)
        micro_steps = engine.gradient_accumulation_steps()
        micro_size = (share.stop - share.start) // micro_steps
        stream = SampleStream(len(dataset), config.seed)

        state = load_checkpoint(engine, folder / "checkpoints") or {"step": 0}
        if state["step"] and state["seed"] != config.seed:
            raise ConfigError(f"The checkpoint in {folder} was begun with seed {state['seed']}; remove it or use that.")
        first = state["step"]
        curves = Curves(folder / "curves.csv", first)
        evaluations = Evaluations(folder, first)
        line = ProgressLine(first, config)
        if first and rank == 0:
            print(f"Going on after step {first} of {config.steps}.", file=sys.stderr)

        def save(step: int) -> None:
            position = step * config.batch_size
            loop = {"seed": config.seed, "position": position, "epoch": position // len(dataset)}
            save_checkpoint(engine, folder / "checkpoints", step, loop)

        for step in range(first + 1, config.steps + 1):
            rate = learning_rate(step, config)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
            indices, epochs = stream.take((step - 1) * config.batch_size, config.batch_size)
            indices, epochs = indices[share], epochs[share]
            sums = StepSums()
            objective.train()
            for start in range(0, len(indices), micro_size):
                part = slice(start, start + micro_size)
                batch = {k: v.to(device) for k, v in dataset.batch(indices[part], epochs[part]).items()}
                out = engine(batch, step)
                engine.backward(out["loss"])
                sums.add(out, len(batch["latents"]))
                if start + micro_size >= len(indices):
                    grad_norm = clip_gradients(engine, config)
                engine.step()
                if _any_rank(told_to_stop(), device) and start + micro_size < len(indices):
                    if step - 1 > first:
                        save(step - 1)  # the weights are still those of the last whole step
                    raise _preempted(step - 1, config)

            row = sums.means(device)
            row["grad_norm"] = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
            row["learning_rate"] = rate
            if not math.isfinite(row["loss"]):
                raise CorruptDataError(
                    f"The loss is {row['loss']} at step {step}; lower the learning rate, or check the latents."
                )
            if rank == 0:
                curves.add(step, row)
                report(step, {**row, "samples_per_second": line.samples_per_second(step)})
                line.show(step, row)

            # once in a while: look at what was held out
            if step % config.heldout_every == 0 or step == config.steps:
                scores = heldout_scores(objective, heldout, micro_size, config.seed, device)
                if rank == 0:
                    evaluations.add(step, scores)
                    report(step, {f"heldout_{name}": value for name, value in heldout_summary(scores).items()})

            # once in a while, and when told to stop: save
            stop = _any_rank(told_to_stop(), device)
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                save(step)
            if stop and step < config.steps:
                raise _preempted(step, config)
        gather_weights(engine, objective)


def heldout_scores(
    objective: TrainingObjective, heldout: LatentDataset, batch_size: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """`evaluate_heldout` on all of `heldout`, shared out over the processes; all get the whole result."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    objective.eval()
    mine = torch.arange(len(heldout))
    if len(heldout) >= world_size:
        mine = mine[rank::world_size]
    # every process goes through equally many batches: under ZeRO 3 they gather each other's weights in step
    count = max(1, math.ceil(math.ceil(len(heldout) / world_size) / batch_size))
    batches = (heldout.batch(part.tolist(), [0] * len(part)) for part in mine.tensor_split(count) if len(part))
    moved = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
    scores = evaluate_heldout(objective.transformer, moved, seed)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, scores)
    return _weighted_mean(gathered)


def _any_rank(flag: bool, device: torch.device) -> bool:
    if dist.get_world_size() == 1:
        return flag
    told = torch.tensor([int(flag)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())


def _weighted_mean(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = sum(part["samples"] for part in scores)
    share = [part["samples"] / total for part in scores]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], list):
            return [mean(entries) for entries in zip(*values, strict=True)]
        return sum(value * weight for value, weight in zip(values, share, strict=True))

    names = [name for name in scores[0] if name not in ("tau", "samples")]
    means = {name: mean([part[name] for part in scores]) for name in names}
    return {"tau": scores[0]["tau"], **means, "samples": total}


@contextmanager
def _termination_flag() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM instead of dying of it; the loop asks when it can stop cleanly."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # signals can't be caught here; whoever owns the main thread decides
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        # under torchrun the rest get another as soon as one rank has left, and rank 0 may have more to write down
        if not (told.is_set() and dist.is_initialized() and dist.get_world_size() > 1):
            signal.signal(signal.SIGTERM, before)


def _preempted(step: int, config: TrainingConfig) -> PreemptedError:
    return PreemptedError(
        f"Training was told to stop and saved step {step} of {config.steps}; run the same command to go on."
    )
