import pytest

from univigu import UniViGUTransformer3DModel, wan
from univigu.errors import ConfigError
from univigu.training.engine import TIMEOUT, TrainingConfig
from univigu.training.memory import parameter_count
from univigu.training.memory_check import (
    needed_by_task,
    needed_host_memory,
    needed_memory,
    require_host_memory,
    require_memory,
)

GIB = 2**30
SETTINGS = {"steps": 1, "batch_size": 16, "learning_rate": 1.0, "precision": "bf16", "micro_batch_size": 1}

SIZES = {"video_tokens": 32760, "context_tokens": 512, "world_size": 16}


@pytest.fixture(scope="module")
def shape():
    import torch

    with torch.device("meta"):
        return dict(UniViGUTransformer3DModel(**(wan.WAN_14B | {"num_layers": 1})).config) | {"num_layers": 40}


def needed(shape, trainable=None, **settings):
    config = TrainingConfig(**SETTINGS | {"zero_stage": 3, "gradient_checkpointing": 1} | settings)
    return config, needed_memory(shape, config, trainable=trainable, **SIZES)


@pytest.mark.slow
def test_the_14b_fits_16_gpus_of_80_gb_as_its_profile_says_and_not_without_recomputation(shape):
    config, memory = needed(shape)
    require_memory(memory, int(79.1 * GIB), config)
    config, memory = needed(shape, gradient_checkpointing=0)
    with pytest.raises(ConfigError, match="gradient_checkpointing: true, or offload"):
        require_memory(memory, int(79.1 * GIB), config)


@pytest.mark.slow
def test_every_second_block_gives_the_mean_of_none_and_all(shape):
    def kept(every):
        config = TrainingConfig(**SETTINGS | {"zero_stage": 3, "gradient_checkpointing": every})
        return needed_by_task(shape, config, **SIZES)["training step"]["activations"]

    assert kept(2) == pytest.approx((kept(0) + kept(1)) / 2, rel=1e-6)


@pytest.mark.slow
def test_offloading_and_adapters_reduce_memory(shape):
    plain = needed(shape)[1]["total"]
    assert needed(shape, offload=("optimizer",))[1]["total"] < plain - 10 * GIB
    assert needed(shape, trainable=10**8)[1]["total"] < plain - 10 * GIB


def test_the_message_lists_the_largest_part_first():
    config = TrainingConfig(**SETTINGS | {"zero_stage": 2})
    parts = {"parameters": 2 * GIB, "activations": 5 * GIB, "total": 7 * GIB}
    with pytest.raises(ConfigError, match=r"needs 7\.0 GiB per process, and 6\.0 are free \(activations 5\.0, param"):
        require_memory(parts, 6 * GIB, config)


def host(shape, processes=8, trainable=None, **settings):
    config = TrainingConfig(**SETTINGS | {"zero_stage": 3} | settings)
    return config, needed_host_memory(shape, config, world_size=16, processes=processes, trainable=trainable)


def test_offloaded_memory_is_counted_for_all_processes_of_a_machine(shape):
    count = parameter_count(shape)
    config, memory = host(shape, offload=("optimizer", "parameters"))
    # half of the 16 processes: bf16 weights and gradients, fp32 gradients, weights and moments; and what rank 0 reads
    assert memory["total"] == pytest.approx((2 + 2 + 4 + 12) * count / 2 + 4 * count, rel=1e-6)
    require_host_memory(memory, memory["total"], config)
    message = (
        r"of the machine's own memory .* \(optimizer .*, weights .*\); set offload: \[\], or lora: .*more machines"
    )
    with pytest.raises(ConfigError, match=message):
        require_host_memory(memory, memory["total"] - 1, config)
    assert host(shape, processes=4, offload=("optimizer",))[1]["optimizer"] == memory["optimizer"] / 2


def test_a_machine_that_cannot_hold_the_weights_of_rank_0_is_refused(shape):
    config, memory = host(shape)
    assert memory["total"] == 4 * parameter_count(shape)
    with pytest.raises(ConfigError, match="use a machine with more"):
        require_host_memory(memory, 50 * GIB, config)


def test_frozen_weights_are_kept_in_host_memory_in_fp32(shape):
    count = parameter_count(shape)
    assert host(shape, trainable=count // 4)[1]["weights"] == pytest.approx(4 * count * 1.75, rel=1e-6)
    assert host(shape, trainable=count // 4, precision="fp32")[1]["weights"] == 4 * count


def test_at_100_mb_per_second_a_checkpoint_of_the_14b_is_saved_and_verified_within_the_timeout(shape):
    # the weights, both moments and their average in fp32, written and read again while other ranks may wait
    assert 2 * 4 * 4 * parameter_count(shape) / 100e6 < TIMEOUT.total_seconds()
