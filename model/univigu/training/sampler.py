"""The order of the samples in a training run: a pure function of the seed and the step.

The samples form an endless stream: permutations of all samples, keyed by (seed, 0), (seed, 1) and so on, one after the
other. Each sample goes to the bucket of its size. Whenever a bucket has `batch_size` samples, they are the next step.
So a batch has one shape, each sample is used once per epoch, and nothing is padded or dropped: samples that remain in
a bucket at the end of an epoch are carried over. With one bucket, a step takes the next `batch_size` samples.

The order has no state: step n is computed from the number of samples, without the steps before. Ranks split the samples
of a step, so a step does not depend on the number of ranks.

With a shuffle over all samples, every part of an epoch needs all shards. Where shards are fetched, `shuffle_shards` = k
shuffles the shards, and then the samples within each group of k shards, so that about 2 k shards are needed at a time.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from univigu.errors import BadInputError

Bucket = tuple[int, ...]  # frames, height, width of its clips


@dataclass(frozen=True)
class BucketReport:
    """How much of a bucket was used after some steps."""

    bucket: Bucket
    samples: int
    batches: int
    left_over: int  # samples that its last epoch has not used yet


class SampleOrder:
    """The samples of each step; `buckets` and `shards` have one entry per sample.

    shuffle_shards: 0 to shuffle over all samples, k to shuffle within k shards at a time. Raises `BadInputError` where
    there are no samples.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        seed: int,
        shards: Sequence[str] = (),
        shuffle_shards: int = 0,
    ) -> None:
        if not buckets:
            raise BadInputError("There are no samples to train on; check the output of encode-latents.")
        self.batch_size, self.seed, self.shuffle_shards = batch_size, seed, shuffle_shards
        self.labels = sorted(set(buckets))
        self._bucket = _numbered(buckets, self.labels)
        self._shard = _numbered(shards, sorted(set(shards))) if shuffle_shards else None
        self.sizes = self._bucket.bincount().tolist()
        self._epochs: dict[int, list[Tensor]] = {}
        self._planned: dict[int, list[tuple[int, int]]] = {}

    def batch(self, step: int) -> tuple[list[int], list[int]]:
        """The samples of step 1, 2, ...: their indices, and the epoch of each."""
        bucket, number = self._find(step)
        size, first = self.sizes[bucket], number * self.batch_size
        places = [divmod(place, size) for place in range(first, first + self.batch_size)]
        indices = [int(self._members(epoch)[bucket][place]) for epoch, place in places]
        for old in sorted(self._epochs)[: -2 - self.batch_size // min(self.sizes)]:
            del self._epochs[old]
        return indices, [epoch for epoch, _ in places]

    def bucket(self, step: int) -> Bucket:
        """The bucket of step 1, 2, ..."""
        return self.labels[self._find(step)[0]]

    def report(self, steps: int) -> list[BucketReport]:
        """How much of each bucket was used after `steps` steps."""
        batches = [0] * len(self.labels)
        if steps:
            epoch = self._epoch_of(steps)
            batches = [epoch * size // self.batch_size for size in self.sizes]
            for bucket, _ in self._steps(epoch)[: steps - self._before(epoch)]:
                batches[bucket] += 1
        used = [count * self.batch_size for count in batches]
        return [
            BucketReport(label, size, count, -taken % size if taken else size)
            for label, size, count, taken in zip(self.labels, self.sizes, batches, used, strict=True)
        ]

    def _find(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of batches of that bucket before it."""
        epoch = self._epoch_of(step)
        return self._steps(epoch)[step - 1 - self._before(epoch)]

    def _epoch_of(self, step: int) -> int:
        """The epoch of the last sample of a step."""
        guess = (step - 1) * self.batch_size // len(self._bucket) + 1
        return bisect.bisect_right(range(guess + len(self.sizes) * self.batch_size + 1), step - 1, key=self._before) - 1

    def _before(self, epoch: int) -> int:
        """The number of steps before an epoch."""
        return sum(epoch * size // self.batch_size for size in self.sizes)

    def _steps(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of its batch) of each step that an epoch completes, in the order of completion."""
        if epoch not in self._planned:
            found = []
            order = self._bucket[self._permutation(epoch)]
            for bucket, size in enumerate(self.sizes):
                carried = epoch * size % self.batch_size
                completing = (order == bucket).nonzero()[:, 0][self.batch_size - 1 - carried :: self.batch_size]
                first = epoch * size // self.batch_size
                found += [(place, bucket, first + number) for number, place in enumerate(completing.tolist())]
            planned = [(bucket, number) for _, bucket, number in sorted(found)]
            # keep two epochs, because the loader alternates between them around the end of an epoch
            self._planned = dict([*self._planned.items()][-1:]) | {epoch: planned}
        return self._planned[epoch]

    def _members(self, epoch: int) -> list[Tensor]:
        """An epoch's samples by bucket, in their order."""
        if epoch not in self._epochs:
            order = self._permutation(epoch)
            buckets = self._bucket[order]
            self._epochs[epoch] = [order[buckets == bucket] for bucket in range(len(self.sizes))]
        return self._epochs[epoch]

    def _permutation(self, epoch: int) -> Tensor:
        digest = hashlib.sha256(f"order {self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order = torch.randperm(len(self._bucket), generator=generator)
        if self._shard is None:
            return order
        places = torch.randperm(int(self._shard.max()) + 1, generator=generator)
        return order[(places // self.shuffle_shards)[self._shard[order]].argsort(stable=True)]


def _numbered(labels: Sequence[object], names: Sequence[object]) -> Tensor:
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[label] for label in labels])


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a step's samples for one of `world_size` processes.

    Raises `BadInputError` where the batch can't be split evenly.
    """
    if batch_size % world_size:
        raise BadInputError(
            f"A batch of {batch_size} can't be split evenly over {world_size} processes; use a multiple of that."
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
