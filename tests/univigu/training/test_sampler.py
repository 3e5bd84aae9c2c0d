import hashlib

import pytest
import torch

from univigu.errors import BadInputError
from univigu.training.sampler import SampleOrder, rank_slice

BUCKETS = [(81, 480, 832)] * 30 + [(49, 480, 832)] * 13 + [(81, 832, 480)] * 3


def meet(order: SampleOrder, steps: int) -> list[tuple[int, int]]:
    return [pair for step in range(1, steps + 1) for pair in zip(*order.batch(step), strict=True)]


def test_with_one_bucket_a_step_takes_the_next_samples_of_the_permutations():
    def permutation(epoch):
        digest = hashlib.sha256(f"order 3 {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(10, generator=generator).tolist()

    stream = [(index, epoch) for epoch in range(4) for index in permutation(epoch)]
    assert meet(SampleOrder([()] * 10, 4, seed=3), 10) == stream


@pytest.mark.parametrize("batch_size", [2, 7, 16])  # 16 is more than the smallest bucket holds
def test_a_batch_has_one_bucket_and_every_sample_is_used_once_per_epoch(batch_size):
    order = SampleOrder(BUCKETS, batch_size, seed=1)
    met = meet(order, 100)
    assert len(set(met)) == len(met)
    for step in range(1, 101):
        indices, _ = order.batch(step)
        assert {BUCKETS[index] for index in indices} == {order.bucket(step)}
    for report in order.report(100):
        mine = [index for index, bucket in enumerate(BUCKETS) if bucket == report.bucket]
        last = max(epoch for index, epoch in met if index in mine)
        assert report.samples == len(mine)
        assert report.left_over == sum((index, last) not in met for index in mine)
        assert all((index, epoch) in met for index in mine for epoch in range(last))
    assert sum(report.batches for report in order.report(100)) == 100


def test_buckets_alternate_as_their_samples_come_up():
    order = SampleOrder(BUCKETS, 4, seed=0)
    turns = [order.bucket(step) for step in range(1, 24)]
    assert 12 <= turns.count((81, 480, 832)) <= 18
    assert len(set(turns[:8])) > 1


def test_a_step_does_not_depend_on_the_steps_computed_before():
    whole = SampleOrder(BUCKETS, 8, seed=1)
    batches = [whole.batch(step) for step in range(1, 60)]
    assert [SampleOrder(BUCKETS, 8, seed=1).batch(step) for step in range(1, 60)] == batches
    assert SampleOrder(BUCKETS, 8, seed=2).batch(1) != batches[0]


def test_shuffling_within_k_shards_needs_few_at_a_time_and_uses_every_sample():
    shards = [f"shard-{index // 10}" for index in range(100)]
    order = SampleOrder([()] * 100, 10, 0, shards, shuffle_shards=2)
    met = meet(order, 10)
    assert sorted(index for index, _ in met) == list(range(100))
    groups = [{shards[index] for index, _ in met[start : start + 20]} for start in range(0, 100, 20)]
    assert all(len(group) == 2 for group in groups)
    assert [index for index, _ in met[:20]] != sorted(index for index, _ in met[:20])
    assert groups != [{shards[index] for index, _ in meet(order, 20)[100 + s : 120 + s]} for s in range(0, 100, 20)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_split_a_step_without_overlap(world_size):
    step, _ = SampleOrder([()] * 50, 8, seed=0).batch(3)
    shares = [step[rank_slice(8, rank, world_size)] for rank in range(world_size)]
    assert [index for share in shares for index in share] == step
    assert len({len(share) for share in shares}) == 1


def test_a_batch_that_ranks_cannot_split_evenly_is_refused():
    with pytest.raises(BadInputError, match="multiple"):
        rank_slice(9, 0, 2)


def test_no_samples_are_refused():
    with pytest.raises(BadInputError, match="no sample"):
        SampleOrder([], 4, 0)
