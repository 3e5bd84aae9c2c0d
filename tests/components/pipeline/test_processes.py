"""One process a GPU: how many there are, and which GPU each may see."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.pipeline import processes
from components.pipeline.stages import find_stage
from univigu.errors import ConfigError


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def test_gpus_keep_the_names_that_they_were_given(four_gpus, monkeypatch):
    assert processes.visible_gpus() == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8f2a, MIG-1b,7")
    assert processes.visible_gpus() == ["6", "GPU-8f2a", "MIG-1b", "7"]


def test_a_step_gets_a_process_a_gpu_only_if_it_asks_for_gpus_and_works_in_shards(four_gpus, monkeypatch):
    stage = find_stage("synthesize-videos")
    assert processes.count_processes(stage) == 4
    assert processes.count_processes(find_stage("caption-videos")) == 1
    assert processes.count_processes(replace(stage, sharded=False)) == 1
    monkeypatch.setenv("RANK", "0")  # torchrun has started enough of them
    assert processes.count_processes(stage) == 1


def test_a_step_without_shards_takes_one_process(four_gpus):
    with pytest.raises(ConfigError, match="'validate-clips' doesn't work in shards"):
        processes.make_parts("validate-clips", "smoke", Path("."), 2)
