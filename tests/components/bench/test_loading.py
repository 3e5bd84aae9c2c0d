from components.bench import loading
from univigu.training.checkpoints import file_sha256
from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
from univigu.training.shards import fetch_file


def test_a_sample_is_as_large_as_one_of_wans(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHARDS", 1)
    monkeypatch.setattr(loading, "ROWS", 1)
    (name,) = loading.write_shards(tmp_path)
    dataset = LatentDataset([SampleRef("a", tmp_path / name, 0)], tmp_path / EMPTY_PROMPT, loading.PROMPT_LENGTH)
    batch = dataset.batch([0], [0])
    assert round(2 * batch["latents"].numel() / 1e6, 2) == 4.19
    assert batch["prompt_embeds"].shape == (1, 512, 4096)


def test_the_server_serves_a_folder_until_it_is_left(tmp_path):
    (tmp_path / "a").write_bytes(b"some bytes")
    facts = {"size": 10, "sha256": file_sha256(tmp_path / "a")}
    with loading.server(tmp_path) as url:
        fetch_file(f"{url}/a", tmp_path / "b", facts)
    assert (tmp_path / "b").read_bytes() == b"some bytes"
