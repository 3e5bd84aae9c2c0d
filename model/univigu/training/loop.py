"""The training loop: one engine, one order of samples, and once in a while an evaluation, a checkpoint, a line.

The same code runs as one process on a CPU and under torchrun on many GPUs. What a step computes depends on its number
alone: the samples come from an endless order (`SampleOrder`), noise and tau from each sample's id and epoch, the
learning rate from the step. So a run that was killed goes on from its checkpoint as if nothing had happened, and ends
with the same weights, bit for bit on one process.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from univigu.errors import ConfigError, CorruptDataError, PreemptedError
from univigu.objective import TrainingObjective, evaluate_heldout
from univigu.threads import settle_threads
from univigu.training.adapters import choose_what_learns, merge_lora
from univigu.training.checkpoints import load_checkpoint, save_checkpoint
from univigu.training.data import LatentDataset
from univigu.training.engine import (
    TrainingConfig,
    clip_gradients,
    init_distributed,
    learning_rate,
    make_engine,
    micro_batches,
    recompute_activations,
)
from univigu.training.loader import MicroBatches, load_ahead
from univigu.training.metrics import RECORDS, Curves, Evaluations, ProgressLine, StepSums, heldout_summary
from univigu.training.optimizer_state import (
    averaged_weights,
    frozen_weights,
    gather_weights,
    swap_average,
    update_average,
)
from univigu.training.sampler import SampleOrder, rank_slice
from univigu.training.throughput import Throughput

Report = Callable[[int, Mapping[str, float]], None]


def train(
    objective: TrainingObjective,
    dataset: LatentDataset,
    heldout: LatentDataset,
    config: TrainingConfig,
    folder: Path,
    report: Report = lambda step, metrics: None,
    sample: Callable[[int], None] = lambda step: None,
) -> SampleOrder:
    """Train `objective` in place for `config.steps` steps, going on from the newest good checkpoint in `folder`.

    Rank 0 calls `report(step, metrics)` for each row, those before the checkpoint included, and leaves in `folder`:
    ``curves.csv``, a row a step; ``heldout.json``, what the last `evaluate_heldout` said, and ``heldout.csv``, all of
    them, a row a (step, bin).
    All ranks call `sample(step)` every `config.samples_every` steps, with the weights that would be saved. Returns the
    order that the samples came in. Raises `PreemptedError` after SIGTERM, with everything saved.
    """
    with _termination_flag() as told_to_stop:
        device = init_distributed()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        choose_what_learns(objective.transformer, config.freeze, config.lora, config.seed)
        if config.gradient_checkpointing:
            recompute_activations(objective.transformer, config.gradient_checkpointing)
        throughput = Throughput(objective, config, device)
        frozen = frozen_weights(objective, config.precision)
        engine = make_engine(objective, config, world_size)
        order = sample_order(dataset, config)

        records = [folder / name for name in RECORDS]
        state = load_checkpoint(engine, folder / "checkpoints", records) or {"step": 0}
        if state["step"] and state["seed"] != config.seed:
            raise ConfigError(
                f"The checkpoint in {folder} was begun with seed {state['seed']}; use that, or start afresh with "
                "--restart."
            )
        first = state["step"]
        steps = range(first + 1, config.steps + 1)
        share, micro_size = rank_slice(config.batch_size, rank, world_size), micro_batches(config, world_size)[1]
        if device.type == "cpu" and world_size == 1 and steps:
            settle_threads(_look_at(objective, dataset, order, micro_size), folder / "threads.json")
        curves = Curves(folder / "curves.csv", first)
        evaluations = Evaluations(folder, first)
        line = ProgressLine(first, config)
        if first and rank == 0:
            evaluations.write()
            for step, row in curves.past():  # what was reported last may not have arrived before the run ended
                report(step, row)
            for scores in evaluations.all:
                report(scores["step"], _heldout_figures(scores))
            print(f"Going on after step {first} of {config.steps}.", file=sys.stderr)

        def save(step: int) -> None:
            position = step * config.batch_size
            loop = {"seed": config.seed, "position": position, "epoch": position // len(dataset)}
            save_checkpoint(engine, folder / "checkpoints", step, loop, records)

        def look(step: int) -> None:
            objective.eval()
            if _is_due(step, config.heldout_every, config):
                scores = heldout_scores(objective, heldout, micro_size, config.seed, device)
                if rank == 0:
                    evaluations.add(step, scores)
                    report(step, _heldout_figures(scores))
            if _is_due(step, config.samples_every, config):
                sample(step)

        # pyrefly: ignore[bad-specialization]
        with closing(load_ahead(dataset, order, steps, share, micro_size)) as batches:
            for step in steps:
                started = time.monotonic()
                micro = next(batches)
                waited = time.monotonic() - started
                row = run_step(engine, config, step, micro, device, told_to_stop)
                if row is None:
                    if step - 1 > first and (step - 1) % config.checkpoint_every:
                        save(step - 1)  # the weights are still those of the last whole step
                    raise _preempted(step - 1, config)
                if not math.isfinite(row["loss"]):
                    raise CorruptDataError(
                        f"The loss is {row['loss']} at step {step}; lower the learning rate, or check the latents."
                    )
                if config.ema_decay:
                    update_average(engine, step, config.ema_decay)
                shape, context = micro[0]["latents"].shape[2:], micro[0]["prompt_embeds"].shape[1]
                throughput.add(time.monotonic() - started, waited, shape, context)
                if rank == 0:
                    curves.add(step, row)
                    report(step, {**row, **throughput.figures()})
                    line.show(step, row, throughput.figures())

                # once in a while: look at what was held out, and at what the model makes
                if _is_due(step, config.heldout_every, config) or _is_due(step, config.samples_every, config):
                    with averaged_weights(engine):
                        look(step)

                # once in a while, and when told to stop: save
                stop = _any_rank(told_to_stop(), device)
                if step % config.checkpoint_every == 0 or step == config.steps or stop:
                    save(step)
                if stop and step < config.steps:
                    raise _preempted(step, config)
        swap_average(engine)
        gather_weights(engine, objective, frozen)
        dist.barrier()  # a rank that left now might take along what another is still reading from it
        if rank == 0:
            merge_lora(objective.transformer)
        return order


def _look_at(
    objective: TrainingObjective, dataset: LatentDataset, order: SampleOrder, micro_size: int
) -> Callable[[], object]:
    """A forward pass of the first micro-batch that leaves nothing behind, to be timed."""
    read: list[dict[str, torch.Tensor]] = []

    def look() -> object:
        if not read:
            read.append(dataset.batch(*(values[:micro_size] for values in order.batch(1))))
        with torch.no_grad():
            return objective(read[0], 1)

    return look


def _heldout_figures(scores: Mapping[str, Any]) -> dict[str, float]:
    return {f"heldout_{name}": value for name, value in heldout_summary(scores).items()}


def sample_order(dataset: LatentDataset, config: TrainingConfig) -> SampleOrder:
    """The order in which a run with this configuration meets the samples."""
    samples = dataset.samples
    shards = [str(sample.shard) for sample in samples] if config.shuffle_shards else []
    return SampleOrder(
        [sample.bucket for sample in samples], config.batch_size, config.seed, shards, config.shuffle_shards
    )


def run_step(
    engine: Any,
    config: TrainingConfig,
    step: int,
    micro: MicroBatches,
    device: torch.device,
    told_to_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """One step; returns its metrics over all ranks, or None where they agreed to stop before its last micro-batch."""
    rate = learning_rate(step, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    engine.module.train()
    sums = StepSums()
    for number, batch in enumerate(micro, 1):
        out = engine({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, step)
        engine.backward(out["loss"])
        sums.add(out, len(batch["latents"]))
        if number == len(micro):
            grad_norm = clip_gradients(engine, config)
        engine.step()
        if _any_rank(told_to_stop(), device) and number < len(micro):
            return None
    row = sums.means(device)
    row["grad_norm"] = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
    row["learning_rate"] = rate
    return row


def heldout_scores(
    objective: TrainingObjective, heldout: LatentDataset, batch_size: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """`evaluate_heldout` on all of `heldout`, shared out over the processes; all get the whole result."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(heldout.samples):
        buckets.setdefault(sample.bucket, []).append(index)
    scores = []
    for _, indices in sorted(buckets.items()):
        gathered = _bucket_scores(objective, heldout, indices, batch_size, seed, device)
        scores.append(_weighted_mean(gathered) | {"samples": len(indices)})
    return _weighted_mean(scores)


def _bucket_scores(
    objective: TrainingObjective,
    heldout: LatentDataset,
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[Any]:
    """What each process found on its part of samples of one size; of too few samples, each takes all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = torch.tensor(indices)
    if len(indices) >= world_size:
        mine = mine[rank::world_size]
    # every process goes through equally many batches: under ZeRO 3 they gather each other's weights in step
    count = max(1, math.ceil(math.ceil(len(indices) / world_size) / batch_size))
    parts = [part.tolist() for part in mine.tensor_split(count) if len(part)]

    def evaluate(parts: Sequence[Sequence[int]]) -> dict[str, Any]:
        batches = (heldout.batch(part, [0] * len(part)) for part in parts)
        moved = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
        return evaluate_heldout(objective.transformer, moved, seed)

    scores = evaluate(parts)
    if count > len(parts):
        evaluate([indices[:1]] * (count - len(parts)))
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, scores)
    return gathered


def _is_due(step: int, every: int, config: TrainingConfig) -> bool:
    return every > 0 and (step % every == 0 or step == config.steps)


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
    signals: list[int] = []  # an Event has a lock, at which a second signal would wait for the first for ever

    def told() -> bool:
        return bool(signals)

    if threading.current_thread() is not threading.main_thread():
        yield told  # signals can't be caught here; whoever owns the main thread decides
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield told
    finally:
        # under torchrun the rest get another as soon as one rank has left, and rank 0 may have more to write down
        if not (told() and dist.is_initialized() and dist.get_world_size() > 1):
            signal.signal(signal.SIGTERM, before)


def _preempted(step: int, config: TrainingConfig) -> PreemptedError:
    return PreemptedError(
        f"Training was told to stop and saved step {step} of {config.steps}; run the same command to go on."
    )
