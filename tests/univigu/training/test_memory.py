"""The computed memory of a step, compared with real tensors, a real engine, and Wan at its real sizes."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from univigu import UniViGUTransformer3DModel, wan
from univigu.errors import BadInputError, ConfigError
from univigu.training.engine import TrainingConfig, init_distributed, make_engine
from univigu.training.memory import latent_size, memory_needed, offloaded_memory, parameter_count, tracked_step

spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 5,
    "rope_max_seq_len": 128,
    "text_latent_dim": 8,
    "vocab_size": 40,
    "tokenizer_length": 40,
    "text_length": 10,
}
TOKENS = {"video_tokens": 36, "text_tokens": 10, "context_tokens": 6}
ONE_GPU = {**TOKENS, "micro_batch_size": 2, "world_size": 1, "zero_stage": 0, "precision": "fp32"}


def on_meta(config):
    with torch.device("meta"):
        return UniViGUTransformer3DModel(**config)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "text_draws"), [(False, 1), (True, 1), (False, 3), (True, 3)])
def test_activations_equal_those_of_a_real_step(checkpointing, text_draws):
    model = UniViGUTransformer3DModel(**TINY)
    if checkpointing:
        model.enable_gradient_checkpointing()
    real = [tracked_step(model, task, (2, 4, 1, 48, 48), 10, 6, text_draws) for task in ("joint", "understand")]
    kept, peak = max(real, key=lambda found: found[1])
    needed_bytes = memory_needed(
        model.config,
        **{**ONE_GPU, "video_tokens": 576},
        gradient_checkpointing=checkpointing,
        text_draws=text_draws,
    )
    # a checkpoint keeps the generator's state, 5 KB on a CPU, for each of the two passes through a block
    states = 2 * TINY["num_layers"] * torch.get_rng_state().nbytes if checkpointing else 0
    assert kept - states <= needed_bytes["activations"] <= kept
    assert peak - states <= needed_bytes["activations"] + needed_bytes["workspace"] <= peak


@pytest.mark.slow
def test_checkpointing_keeps_a_fraction_of_the_activations_and_bf16_less_than_fp32():
    config = on_meta({**TINY, "num_layers": 12}).config
    sizes = {**ONE_GPU, "video_tokens": 576}
    full = memory_needed(config, **sizes)["activations"]
    assert memory_needed(config, **sizes, gradient_checkpointing=True)["activations"] < full / 4
    assert full / 2 <= memory_needed(config, **{**sizes, "precision": "bf16"})["activations"] < full


def test_weights_for_an_image_are_counted_and_not_trained():
    plain = on_meta(TINY).config
    beside = on_meta({**TINY, "image_dim": 20, "added_kv_proj_dim": 24}).config
    trained = parameter_count(plain)
    image_side = parameter_count(beside) - trained
    sizes = {**ONE_GPU, "trainable_parameters": trained}
    without, found = (memory_needed(config, **sizes) for config in (plain, beside))
    assert image_side > 0
    assert found["parameters"] == without["parameters"] + 4 * image_side
    assert found["activations"] == without["activations"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_weights_and_optimizer_equal_those_of_a_real_engine(stage, precision, tmp_path):
    init_distributed()
    dataset, _ = tiny_run.open_data(tmp_path)
    objective = tiny_run.make_objective(dataset)
    config = copy.deepcopy(objective.transformer.config)
    settings = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, zero_stage=stage, precision=precision)
    engine = make_engine(objective, settings, dist.get_world_size())
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = []
    if stage:
        flat = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        masters = getattr(engine.optimizer, flat)
    moments = [tensor for state in adamw.state.values() for tensor in state.values() if tensor.ndim]
    needed_bytes = memory_needed(
        config,
        **{**ONE_GPU, "video_tokens": 8, "context_tokens": 4, "zero_stage": stage, "precision": precision},
    )
    assert needed_bytes["parameters"] == sum(tensor.nbytes for tensor in held)
    padding = 64 * len(masters)
    assert needed_bytes["optimizer"] == pytest.approx(
        sum(tensor.nbytes for tensor in [*masters, *moments]), abs=padding
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_memory_equals_that_of_a_real_engine(stage, tmp_path):
    init_distributed()
    dataset, _ = tiny_run.open_data(tmp_path)
    objective = tiny_run.make_objective(dataset)
    config = copy.deepcopy(objective.transformer.config)
    offload = ("optimizer", "parameters")[: 1 + (stage == 3)]
    settings = {"zero_stage": stage, "precision": "bf16"}
    training = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, offload=offload, **settings)
    engine = make_engine(objective, training, dist.get_world_size())
    flat = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    masters = getattr(engine.optimizer, flat)
    moments = [
        tensor for state in engine.optimizer.optimizer.state.values() for tensor in state.values() if tensor.ndim
    ]
    needed_bytes = offloaded_memory(
        config, world_size=1, **settings, offload_optimizer=True, offload_parameters="parameters" in offload
    )
    padding = 64 * len(masters)
    assert needed_bytes["optimizer"] == pytest.approx(
        sum(tensor.nbytes for tensor in [*masters, *moments]), abs=padding
    )
    buffers = "grad_partitions_flat_buffer" if stage == 3 else "param_buffer_of_bit16_for_cpu_offload_groups"
    buffers = getattr(engine.optimizer, buffers)
    gradients = [*(tensor.grad for tensor in masters), *([buffers] if stage == 3 else buffers)]
    assert needed_bytes["gradients"] == pytest.approx(sum(tensor.nbytes for tensor in gradients), abs=padding)


@pytest.mark.slow
def test_each_zero_stage_partitions_more():
    config = on_meta(TINY).config
    sizes = {**ONE_GPU, "precision": "bf16", "world_size": 4}
    count = parameter_count(config)
    stages = [memory_needed(config, **{**sizes, "zero_stage": stage}) for stage in range(4)]
    none, optimizer, gradients, weights = stages
    assert (none["gradients"], none["parameters"], none["optimizer"]) == (2 * count, 2 * count, 8 * count)
    assert optimizer["optimizer"] == pytest.approx(3 * count, abs=12)
    assert optimizer["gradients"] == 2 * count
    assert gradients["gradients"] == pytest.approx(count / 2, abs=2)
    assert gradients["parameters"] == 2 * count
    assert weights["parameters"] == pytest.approx(count / 2, abs=2)
    assert len({stage["activations"] for stage in stages}) == 1


@pytest.mark.slow
def test_offload_frozen_weights_and_ema_are_counted():
    config = on_meta(TINY).config
    sizes = {**ONE_GPU, "precision": "bf16", "world_size": 2, "zero_stage": 3}
    whole = memory_needed(config, **sizes)
    assert memory_needed(config, **sizes, offload_optimizer=True)["optimizer"] == 0
    assert memory_needed(config, **sizes, offload_parameters=True)["parameters"] == 0
    assert memory_needed(config, **sizes, ema=True)["optimizer"] == pytest.approx(whole["optimizer"] * 4 / 3, rel=1e-4)
    few = memory_needed(config, **sizes, trainable_parameters=100)
    assert (few["optimizer"], few["gradients"]) == (12 * 50, 2 * 50)
    assert few["parameters"] == whole["parameters"]
    assert sum(whole.values()) == 2 * whole["total"]


def test_wan_at_its_real_size_is_counted_exactly_and_without_weights():
    model = on_meta(wan.WAN_1_3B)
    assert parameter_count(model.config) == sum(parameter.numel() for parameter in model.parameters())
    _, height, width = latent_size(model.config, 32_760, 256)
    assert height * width == 4 * 32_760


@pytest.mark.parametrize("tokens", [1, 7, 97, 1021, 75_600])
def test_latents_are_found_for_any_number_of_video_tokens(tokens):
    config = on_meta({**wan.WAN_1_3B, "num_layers": 1}).config
    frames, height, width = latent_size(config, tokens, 256)
    assert tokens <= frames * height * width / 4 <= max(1.01 * tokens, tokens + 1)


def test_impossible_sizes_are_refused():
    config = on_meta(TINY).config
    with pytest.raises(BadInputError, match="rotary tables"):
        memory_needed(config, **{**ONE_GPU, "video_tokens": 100_000})
    with pytest.raises(ConfigError, match="ZeRO stage 4"):
        memory_needed(config, **{**ONE_GPU, "zero_stage": 4})


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [2, 4])
def test_gpus_that_share_a_sequence_keep_a_part_of_its_activations(sharing):
    sizes = {**ONE_GPU, "video_tokens": 4096, "gradient_checkpointing": True}
    config = {**TINY, "num_attention_heads": 4, "attention_head_dim": 96}
    needed = (memory_needed(config, **sizes, sequence_parallel=n) for n in (1, sharing))
    alone, shared = (parts["activations"] + parts["workspace"] for parts in needed)  # of the task that needs the most
    # whole are the text, the latents and the velocity
    assert alone / sharing < shared < alone * (1 / sharing + 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["joint", "understand"])
def test_each_more_recomputed_block_adds_its_checkpoint_and_nothing_else_to_the_peak(task):
    def measure(depth):
        model = UniViGUTransformer3DModel(**{**TINY, "num_layers": depth})
        model.enable_gradient_checkpointing()
        return tracked_step(model, task, (2, 4, 1, 48, 48), 10, 6)

    (kept, peak), (deeper, higher) = measure(3), measure(5)
    assert higher - peak == deeper - kept
