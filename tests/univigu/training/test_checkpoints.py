"""What is read of a checkpoint: slices of tensors, and each rank's share of the files."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from univigu.files import write_json
from univigu.training import checkpoints


@pytest.mark.parametrize("shape", [(), (4,), (5, 7), (3, 4, 5)])
def test_any_part_of_a_tensor_is_read_without_the_rest(tmp_path, shape):
    tensor = torch.arange(float(math.prod(shape))).reshape(shape)
    save_file({"weight": tensor}, tmp_path / "rank.safetensors")
    with safe_open(tmp_path / "rank.safetensors", "pt") as file:
        saved = checkpoints.InFile(file, "weight")
        assert saved.shape == shape
        assert torch.equal(saved.whole(), tensor)
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert torch.equal(saved.part(start, stop), tensor.flatten()[start:stop])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_damaged_file_is_found_by_the_one_rank_that_reads_it(tmp_path, world_size):
    names = [*(f"rank-{rank:05d}.safetensors" for rank in range(4)), checkpoints.LOOP]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    files = {name: checkpoints._describe(tmp_path / name) for name in names}
    write_json(tmp_path / checkpoints.MANIFEST, {"step": 1, "files": files})

    def faults():
        return [checkpoints._fault_in_share(tmp_path, rank, world_size) for rank in range(world_size)]

    assert faults() == [None] * world_size
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + b"x")
        assert [fault for fault in faults() if fault] == [f"{name} is missing or damaged"]
        (tmp_path / name).write_bytes(content)
