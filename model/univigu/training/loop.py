"""The training loop: one engine, one order of samples, and periodic evaluations and checkpoints.

The same code runs as one process on a CPU and under torchrun on many GPUs. The result of a step depends on its number
alone: the samples come from an endless order (`SampleOrder`), noise and tau from each sample's id and epoch, the
learning rate from the step. So a killed run resumes from its checkpoint and ends with the same weights as a run without
interruption; on one process they are equal bit for bit.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from univigu.attention import set_attention_backend
from univigu.compiling import compile_blocks
from univigu.errors import ConfigError, CorruptDataError, PreemptedError
from univigu.objective import TrainingObjective
from univigu.sequence_parallel import make_groups
from univigu.threads import settle_threads
from univigu.training.adapters import choose_trainable, finish_lora
from univigu.training.checkpoints import load_checkpoint, save_checkpoint
from univigu.training.data import LatentDataset
from univigu.training.engine import (
    TrainingConfig,
    clear_gradients,
    data_rank,
    finish_step,
    init_distributed,
    learning_rate,
    make_engine,
    micro_batches,
    recompute_activations,
)
from univigu.training.heldout import heldout_scores
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
from univigu.transformer import UniViGUTransformer3DModel

SKIPPED_AT_MOST = 5  # steps in a row whose loss or gradient is not finite: the last of them ends the run
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
    """Train `objective` in place until step `config.steps`, resuming from the newest valid checkpoint in `folder`.

    Rank 0 calls `report(step, metrics)` for each step, those before the checkpoint included, and writes the files of
    `metrics` to `folder`. All ranks call `sample(step)` every `config.samples_every` steps, with the weights that would
    be saved. Returns the order of the samples. Raises `PreemptedError` after SIGTERM, with all progress saved,
    `ConfigError` for a checkpoint of another seed, and `CorruptDataError` where the loss is not finite.
    """
    with _termination_flag() as stop_requested:
        # --- the engine, and where it resumes
        device = _set_up(objective.transformer, config)
        throughput = Throughput(objective, config, device)  # counts weights, which ZeRO 3 partitions in `make_engine`
        frozen = frozen_weights(objective, config.precision)
        engine = make_engine(objective, config, dist.get_world_size())
        order = sample_order(dataset, config)
        run = _Run(engine, objective, dataset, heldout, config, folder, device, throughput, report, sample)
        steps = range(run.resume() + 1, config.steps + 1)
        run.evaluate_missing()
        if device.type == "cpu" and dist.get_world_size() == 1 and steps:
            settle_threads(_trial_pass(objective, dataset, order, run.micro_size), folder / "threads.json")
        # pyrefly: ignore[bad-specialization]
        with closing(load_ahead(dataset, order, steps, run.share, run.micro_size)) as batches:
            for step in steps:
                # --- one step
                started = time.monotonic()
                micro = next(batches)
                waited = time.monotonic() - started
                row = run_step(engine, config, step, micro, device, stop_requested)
                if row is None:
                    raise run.interrupted(step - 1)
                if config.ema_decay:
                    update_average(engine, step, config.ema_decay)
                run.record(step, row, micro, time.monotonic() - started, waited)

                # --- every `checkpoint_every` steps, at the end, and on SIGTERM: save
                stop = _any_rank(stop_requested(), device)
                if stop or run.is_due(step, config.checkpoint_every):
                    run.save(step)
                if stop and step < config.steps:
                    raise _preempted(step, config)

                # --- every `heldout_every` and `samples_every` steps: evaluate, with the step saved if it is due
                run.evaluate(step)

        # --- the trained weights, whole, on rank 0
        swap_average(engine)
        gather_weights(engine, objective, frozen)
        objective.transformer.share_sequence(None)
        dist.barrier()  # a rank that leaves now may close connections that another one still reads from
        if dist.get_rank() == 0:
            finish_lora(objective.transformer, config.lora)
        return order


def _set_up(transformer: UniViGUTransformer3DModel, config: TrainingConfig) -> torch.device:
    """Join the other processes, and prepare the model for the run's settings; returns this process's device."""
    device = init_distributed()
    choose_trainable(transformer, config.freeze, config.lora, config.seed)
    recompute_activations(transformer, config.gradient_checkpointing)
    set_attention_backend(transformer, config.attention_backend)
    if config.compile == "blocks":
        compile_blocks(transformer)
    transformer.share_sequence(make_groups(config.sequence_parallel, transformer.config.num_attention_heads))
    return device


@dataclass
class _Run:
    """What `train` does around its steps: resume, record, evaluate and save."""

    engine: Any
    objective: TrainingObjective
    dataset: LatentDataset
    heldout: LatentDataset
    config: TrainingConfig
    folder: Path
    device: torch.device
    throughput: Throughput
    report: Report
    sample: Callable[[int], None]

    def __post_init__(self) -> None:
        world_size = dist.get_world_size()
        self.is_main = dist.get_rank() == 0
        self.share = rank_slice(self.config.batch_size, *data_rank(self.config.sequence_parallel))
        self.micro_size = micro_batches(self.config, world_size)[1]
        self.records = [self.folder / name for name in RECORDS]
        self.first = self.skipped_in_a_row = 0

    def resume(self) -> int:
        """Load the newest valid checkpoint, if there is one, and its records; returns its step, or 0."""
        state = load_checkpoint(self.engine, self.folder / "checkpoints", self.records) or {"step": 0}
        if state["step"] and state["seed"] != self.config.seed:
            raise ConfigError(
                f"The checkpoint in {self.folder} was trained with seed {state['seed']}; use that seed, or start again "
                "with --restart."
            )
        self.first = first = state["step"]
        self.curves = Curves(self.folder / "curves.csv", first)
        self.evaluations = Evaluations(self.folder, first)
        self.line = ProgressLine(first, self.config)
        if first and self.is_main:
            self.evaluations.write()
            for step, row in self.curves.past():  # the last reports before a kill may not have arrived
                self.report(step, row)
            for scores in self.evaluations.all:
                self.report(scores["step"], _heldout_metrics(scores))
            print(f"Resuming after step {first} of {self.config.steps}.", file=sys.stderr)
        return first

    def record(self, step: int, row: Mapping[str, float], micro: MicroBatches, seconds: float, waited: float) -> None:
        """Write and report a step's metrics; `seconds` is its duration, of which it `waited` for its batch."""
        row = self._without_skipped(step, row)
        shape, context = micro[0]["latents"].shape[2:], micro[0]["prompt_embeds"].shape[1]
        self.throughput.add(seconds, waited, shape, context)
        if self.is_main:
            self.curves.add(step, row)
            self.report(step, {**row, **self.throughput.figures()})
            self.line.show(step, row, self.throughput.figures())

    def _without_skipped(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """The row's finite values. A step with others was skipped: it is counted, and some in a row end the run."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        if len(finite) == len(row):
            self.skipped_in_a_row = 0
            return finite
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == SKIPPED_AT_MOST:
            name = "grad_norm" if math.isfinite(row["loss"]) else "loss"
            what = "The loss" if name == "loss" else "The norm of the gradient"
            raise CorruptDataError(
                f"{what} is {row[name]} at step {step}, and the {SKIPPED_AT_MOST - 1} steps before it were skipped for "
                "such a reason; lower the learning rate, or check the latents. The last checkpoint is kept."
            )
        if self.is_main:
            print(
                f"Step {step} is skipped: its loss is {row['loss']:.4g}, the norm of its gradient "
                f"{row['grad_norm']:.4g}. Training stops after {SKIPPED_AT_MOST} such steps in a row.",
                file=sys.stderr,
            )
        return finite

    def evaluate_missing(self) -> None:
        """The evaluations of the step that the run resumes from: a checkpoint is saved before its evaluations."""
        done = any(scores["step"] == self.first for scores in self.evaluations.all)
        if self.first and not done:
            self.evaluate(self.first)

    def evaluate(self, step: int) -> None:
        """Evaluate on held-out samples and draw samples, where either is due, with the weights that would be saved."""
        scoring = self.is_due(step, self.config.heldout_every)
        sampling = self.is_due(step, self.config.samples_every)
        if not (scoring or sampling):
            return
        with averaged_weights(self.engine):
            self.objective.eval()
            if scoring:
                scores = heldout_scores(self.objective, self.heldout, self.micro_size, self.config.seed, self.device)
                if self.is_main:
                    self.evaluations.add(step, scores)
                    self.report(step, _heldout_metrics(scores))
            if sampling:
                self.sample(step)

    def is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def save(self, step: int) -> None:
        """Save a checkpoint of `step`. All ranks must call this."""
        position = step * self.config.batch_size
        loop = {"seed": self.config.seed, "position": position, "epoch": position // len(self.dataset)}
        save_checkpoint(self.engine, self.folder / "checkpoints", step, loop, self.records)

    def interrupted(self, step: int) -> PreemptedError:
        """Save `step`, the last complete one: the weights have not changed since. Returns the error to raise."""
        if step > self.first and step % self.config.checkpoint_every:  # otherwise its checkpoint exists
            self.save(step)
        return _preempted(step, self.config)


def _trial_pass(
    objective: TrainingObjective, dataset: LatentDataset, order: SampleOrder, micro_size: int
) -> Callable[[], object]:
    """A forward pass over the first micro-batch, for timing; it changes nothing."""
    batch: list[dict[str, torch.Tensor]] = []

    def run() -> object:
        if not batch:
            batch.append(dataset.batch(*(values[:micro_size] for values in order.batch(1))))
        with torch.no_grad():
            return objective(batch[0], 1)

    return run


def _heldout_metrics(scores: Mapping[str, Any]) -> dict[str, float]:
    return {f"heldout_{name}": value for name, value in heldout_summary(scores).items()}


def sample_order(dataset: LatentDataset, config: TrainingConfig) -> SampleOrder:
    """The order of the samples in a run with this configuration."""
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
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """One step; returns its metrics over all ranks, or None where they agreed to stop before its last micro-batch."""
    rate = learning_rate(step, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    engine.module.train()
    sums, grad_norm = StepSums(), math.nan
    clear_gradients(engine)
    for number, batch in enumerate(micro, 1):
        out = engine({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, step)
        engine.backward(out["loss"])
        sums.add(out, len(batch["latents"]))
        if number == len(micro):
            grad_norm = finish_step(engine, config)
            break
        engine.step()
        if _any_rank(stop_requested(), device):
            return None
    return {**sums.means(device), "grad_norm": grad_norm, "learning_rate": rate}


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; a rank that stopped alone would leave the others waiting for it."""
    if dist.get_world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


@contextmanager
def _termination_flag() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM within the block; yields a function that tells whether it was received."""
    signals: list[int] = []  # not an Event: its lock would deadlock if a second signal arrived while it is set

    def received() -> bool:
        return bool(signals)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can catch signals, so its owner decides
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        yield received
    finally:
        # torchrun sends the other ranks a second SIGTERM when the first rank has exited; rank 0 may still be writing
        if not (received() and dist.is_initialized() and dist.get_world_size() > 1):
            signal.signal(signal.SIGTERM, before)


def _preempted(step: int, config: TrainingConfig) -> PreemptedError:
    return PreemptedError(
        f"Training received SIGTERM and saved step {step} of {config.steps}; run the same command to resume."
    )
