from pathlib import Path

import pytest
import torch

from univigu.errors import BadInputError, ConfigError, CorruptDataError
from univigu.training.data import (
    EMPTY_PROMPT,
    LatentDataset,
    SampleRef,
    sample_key,
    token_weights,
    write_empty_prompt,
    write_latents,
)


def make_shard(path: Path, count: int) -> dict:
    generator = torch.Generator().manual_seed(count)
    tensors = {
        "latents": torch.randn(count, 4, 2, 3, 3, generator=generator),
        "prompt_embeds": [torch.randn(1 + i % 3, 8, generator=generator) for i in range(count)],
        "prompt_ids": torch.randint(0, 9, (count, 5), generator=generator),
        "target_ids": torch.randint(0, 9, (count, 5), generator=generator),
    }
    write_latents(path, **tensors)
    return tensors


def open_dataset(folder: Path, refs: list[SampleRef]) -> LatentDataset:
    write_empty_prompt(folder, torch.ones(1, 8))
    return LatentDataset(refs, folder / EMPTY_PROMPT, prompt_length=4)


def test_a_batch_holds_what_was_written_with_prompts_padded_by_zeros(tmp_path):
    first, second = make_shard(tmp_path / "a.safetensors", 3), make_shard(tmp_path / "b.safetensors", 4)
    dataset = open_dataset(
        tmp_path, [SampleRef("x", tmp_path / "a.safetensors", 2), SampleRef("y", tmp_path / "b.safetensors", 1)]
    )
    batch = dataset.batch([1, 0], [0, 7])
    assert torch.equal(batch["latents"], torch.stack([second["latents"][1], first["latents"][2]]).bfloat16().float())
    assert torch.equal(batch["prompt_embeds"][0, :2], second["prompt_embeds"][1].bfloat16().float())
    assert batch["prompt_embeds"].shape == (2, 4, 8)
    assert not batch["prompt_embeds"][0, 2:].any()
    assert torch.equal(batch["prompt_ids"][1], first["prompt_ids"][2])
    assert torch.equal(batch["target_ids"][0], second["target_ids"][1])
    assert torch.equal(batch["empty_embeds"], torch.tensor([[1.0], [0], [0], [0]]).expand(4, 8))
    assert batch["sample_ids"].tolist() == [sample_key("y"), sample_key("x")]
    assert batch["epochs"].tolist() == [0, 7]


def test_equal_tensors_give_equal_bytes(tmp_path):
    for name in "ab":
        make_shard(tmp_path / name, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_sample_key_does_not_change():
    assert sample_key("clip-0001") == 5378881816254645253
    assert 0 <= sample_key("") < 2**63


def test_rare_tokens_have_higher_weights_and_pad_a_very_low_one():
    targets = torch.tensor([[1, 2, 5, 0], [1, 3, 5, 0], [1, 2, 5, 0], [1, 4, 5, 0]])
    weights = token_weights(targets, 8, 0, "inverse_document_frequency")
    assert weights[1].item() == pytest.approx(0.1)  # in every target
    assert weights[2].item() == pytest.approx(-torch.tensor(0.5).log().item())
    assert weights[3] > weights[2]
    assert weights[7].item() == pytest.approx(4.0)  # in none
    assert weights[0].item() == pytest.approx(0.05)
    rarity = token_weights(targets, 8, 0, "rarity")
    torch.testing.assert_close(rarity[:5], torch.tensor([0.05, 0.1, 2.0, 3.0, 3.0]))
    assert token_weights(targets, 8, 0, "uniform").unique().tolist() == [1.0]
    gentle = token_weights(targets, 8, 0, "root_inverse_document_frequency", eos_id=1)
    root = -torch.tensor([0.5, 0.25]).log()
    torch.testing.assert_close(gentle[:4], torch.cat([torch.tensor([0.05, 1.0]), root.sqrt()]))
    assert token_weights(targets, 8, 0, "root_inverse_document_frequency")[1].item() == 0.5
    with pytest.raises(ConfigError, match="rarity"):
        token_weights(targets, 8, 0, "tf-idf")


def test_damage_is_reported_in_one_sentence(tmp_path):
    make_shard(tmp_path / "a.safetensors", 3)
    with pytest.raises(CorruptDataError, match="no row 3"):
        open_dataset(tmp_path, [SampleRef("x", tmp_path / "a.safetensors", 3)])
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-40])
    with pytest.raises(CorruptDataError, match=r"b\.safetensors"):
        open_dataset(tmp_path, [SampleRef("x", tmp_path / "b.safetensors", 0)])
    with pytest.raises(BadInputError, match="one of each"):
        write_latents(
            tmp_path / "c",
            latents=torch.zeros(2, 4, 2, 3, 3),
            prompt_embeds=[torch.zeros(1, 8)],
            prompt_ids=torch.zeros(2, 5),
            target_ids=torch.zeros(2, 5),
        )
