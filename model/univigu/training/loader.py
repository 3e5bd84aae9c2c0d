"""Batches made ready in the background while the step before them computes."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from univigu.threads import side_threads
from univigu.training.data import LatentDataset
from univigu.training.sampler import SampleOrder

STEPS_AHEAD = 2  # whose batches are in memory
SHARDS_AHEAD = 64  # steps ahead whose shards are asked for

MicroBatches = list[dict[str, Tensor]]


def load_ahead(
    dataset: LatentDataset, order: SampleOrder, steps: range, share: slice, micro_size: int
) -> Iterator[MicroBatches]:
    """For each of `steps`, the micro-batches of one rank's `share` of its samples; in pinned memory beside a GPU.

    A thread is enough: reading rows from a mapped file and copying them holds no lock of the interpreter. What goes
    wrong in it is raised here, at the step that it belongs to. Close the iterator to end the thread.
    """
    pin = torch.cuda.is_available()
    asked = steps.start

    def prepare(step: int) -> MicroBatches:
        nonlocal asked
        for later in range(max(asked, step), min(step + SHARDS_AHEAD, steps.stop)):
            indices, _ = order.batch(later)
            dataset.shards.fetch_ahead({dataset.samples[i].shard for i in indices[share]})
            asked = later + 1
        indices, epochs = (values[share] for values in order.batch(step))
        cuts = [slice(start, start + micro_size) for start in range(0, len(indices), micro_size)]
        batches = [dataset.batch(indices[cut], epochs[cut]) for cut in cuts]
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch for batch in batches]

    with side_threads(1, "load-ahead") as thread:
        waiting = deque(thread.submit(prepare, step) for step in steps[:STEPS_AHEAD])
        for step in steps:
            batches = waiting.popleft().result()
            if step + STEPS_AHEAD < steps.stop:
                waiting.append(thread.submit(prepare, step + STEPS_AHEAD))
            yield batches
