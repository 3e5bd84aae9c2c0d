import pytest

from components.bench import loading
from univigu.errors import UniViGUError
from univigu.training.checkpoints import file_sha256
from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef
from univigu.training.remote_shards import fetch_file


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


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(loading, "LATENTS", (16, 2, 4, 4))
    monkeypatch.setattr(loading, "PROMPT", 4)
    monkeypatch.setattr(loading, "PROMPT_LENGTH", 8)
    monkeypatch.setattr(loading, "STATES", 16)
    monkeypatch.setattr(loading, "TEXT_LENGTH", 8)


@pytest.mark.slow
def test_shards_are_fetched_and_dropped_while_steps_are_timed(small):
    figures = loading.measure()
    assert figures["streamed"]["shards_fetched"] >= 3
    assert figures["streamed"]["shards_dropped"] >= 3
    assert "shards_fetched" not in figures["local"]
    assert figures["ratio"] == max(figures[side]["waiting_share"] for side in ("local", "streamed"))


def test_steps_that_drop_nothing_are_no_measurement(small, monkeypatch):
    monkeypatch.setattr(loading, "CACHED", loading.SHARDS)
    with pytest.raises(UniViGUError, match=r"fetched and 0 dropped in 11 timed steps"):
        loading.measure()
