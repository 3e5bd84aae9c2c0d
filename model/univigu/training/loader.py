"""Loading batches in the background while the previous step is computed."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from univigu.threads import side_threads
from univigu.training.data import LatentDataset
from univigu.training.sampler import SampleOrder

STEPS_AHEAD = 2  # steps whose batches are in memory
SHARDS_AHEAD = 64  # steps whose shards are requested ahead of their use

MicroBatches = list[dict[str, Tensor]]


def load_ahead(
    dataset: LatentDataset, order: SampleOrder, steps: range, share: slice, micro_size: int
) -> Iterator[MicroBatches]:
    """For each of `steps`, the micro-batches of one rank's `share` of its samples; in pinned memory if there is a GPU.

    One thread is enough: reading and copying rows of a memory-mapped file releases the interpreter's lock. An error in
    the thread is raised here, at the step that it belongs to. Close the iterator to end the thread.
    """
    pin = torch.cuda.is_available()
    requested = steps.start  # the first step whose shards are not requested yet

    def prepare(step: int) -> MicroBatches:
        nonlocal requested
        for later in range(max(requested, step), min(step + SHARDS_AHEAD, steps.stop)):
            indices, _ = order.batch(later)
            dataset.shards.fetch_ahead({dataset.samples[i].shard for i in indices[share]})
            requested = later + 1
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
