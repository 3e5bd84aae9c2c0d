"""Shards from an object store, for which a real HTTP server is used."""

import functools
import http.server
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from univigu.errors import ConfigError, CorruptDataError, MissingInputError, TransientError
from univigu.training import remote_shards
from univigu.training.data import EMPTY_PROMPT, LatentDataset, SampleRef, write_empty_prompt, write_latents
from univigu.training.loader import load_ahead
from univigu.training.remote_shards import REMOTE, RemoteShards, put_shards
from univigu.training.sampler import SampleOrder

ROWS, SHARDS = 4, 6


class Store(http.server.SimpleHTTPRequestHandler):
    asked: list[str]
    fail = 0  # number of requests to answer with 503

    def do_GET(self):
        type(self).asked.append(self.path)
        if type(self).fail > 0:
            type(self).fail -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_): ...


@pytest.fixture
def store(tmp_path):
    """A store with a folder ``bucket``: its handler, its URL and the folder."""
    (tmp_path / "bucket").mkdir()
    handler = type("Handler", (Store,), {"asked": []})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "bucket"))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}", tmp_path / "bucket"
    server.shutdown()
    server.server_close()


@pytest.fixture
def latents(tmp_path, store):
    """A folder of latents whose shards were uploaded; the samples; a dataset of them from local files."""
    folder = tmp_path / "latents"
    for number in range(SHARDS):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 9, (ROWS, 5), generator=generator)
        write_latents(
            folder / f"shards/{number:05d}/latents.safetensors",
            latents=torch.randn(ROWS, 4, 2, 8, 8, generator=generator),
            prompt_embeds=[torch.randn(2, 8, generator=generator) for _ in range(ROWS)],
            prompt_ids=ids,
            target_ids=ids,
        )
    write_empty_prompt(folder, torch.ones(1, 8))
    names = [f"shards/{number:05d}/latents.safetensors" for number in range(SHARDS)]
    refs = [SampleRef(f"{name}-{row}", folder / name, row) for name in names for row in range(ROWS)]
    before = LatentDataset(refs, folder / EMPTY_PROMPT, 4)
    batches = [before.batch([index], [0]) for index in range(len(refs))]
    put_shards(folder, names, str(store[2]))
    for name in names:
        (folder / name).unlink()
    remote = json.loads((folder / REMOTE).read_text())
    (folder / REMOTE).write_text(json.dumps(remote | {"url": store[1]}))
    return folder, refs, batches


def size_of(folder) -> int:
    return next(iter(json.loads((folder / REMOTE).read_text())["shards"].values()))["size"]


def opened(latents, tmp_path, held=SHARDS):
    folder, refs, _ = latents
    remote = RemoteShards(folder, tmp_path / "cache", held * size_of(folder))
    return LatentDataset(refs, folder / EMPTY_PROMPT, 4, remote)


def test_remote_samples_equal_local_ones_and_each_shard_is_fetched_once(latents, store, tmp_path):
    dataset = opened(latents, tmp_path)
    assert dataset.target_ids.shape == (24, 5)
    assert store[0].asked == []  # targets are read without a shard
    for index, expected in enumerate(latents[2]):
        batch = dataset.batch([index], [0])
        assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    again = opened(latents, tmp_path)
    again.batch(list(range(24)), [0] * 24)
    assert len(store[0].asked) == SHARDS


def test_the_cache_stays_within_its_limit_and_drops_the_least_recently_used(latents, store, tmp_path):
    dataset = opened(latents, tmp_path, held=3)
    for index in (0, 4, 8, 0, 12):  # shards 0, 1, 2, 0, 3
        dataset.batch([index], [0])
        time.sleep(0.01)
        held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
        assert held <= 3 * size_of(latents[0])
    asked = len(store[0].asked)
    for index in (0, 8, 12):
        dataset.shards.fetch(latents[1][index].shard)
    assert len(store[0].asked) == asked
    dataset.shards.fetch(latents[1][4].shard)
    assert len(store[0].asked) == asked + 1


def test_a_cache_that_cannot_hold_two_shards_is_refused(latents, tmp_path):
    with pytest.raises(ConfigError, match="cache_gb"):
        opened(latents, tmp_path, held=1.5)


def test_wrong_bytes_are_fetched_again_and_then_refused(latents, store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards.time, "sleep", lambda _: None)
    stored = store[2] / "shards/00002/latents.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    dataset = opened(latents, tmp_path)
    with pytest.raises(CorruptDataError, match="00002"):
        dataset.batch([8], [0])
    assert len(store[0].asked) == remote_shards.ATTEMPTS
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_requests_to_a_busy_store_are_retried(latents, store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards.time, "sleep", lambda _: None)
    store[0].fail = 2
    opened(latents, tmp_path).batch([0], [0])
    store[0].fail = 99
    with pytest.raises(TransientError, match="try again later"):
        opened(latents, tmp_path).batch([4], [0])


def test_a_shard_that_is_missing_in_the_store_is_named(latents, store, tmp_path):
    (store[2] / "shards/00001/latents.safetensors").unlink()
    with pytest.raises(MissingInputError, match="00001"):
        opened(latents, tmp_path).batch([4], [0])


def test_processes_that_need_the_same_shard_share_one_fetch(latents, store, tmp_path):
    datasets = [opened(latents, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda dataset: dataset.batch([0], [0]), datasets))
    assert len(store[0].asked) == 1


def test_prefetching_stays_within_the_limit_and_fetches_each_shard_once(latents, store, tmp_path):
    dataset = opened(latents, tmp_path, held=2)
    most = 0
    order = SampleOrder([()] * 24, 4, 0, [str(ref.shard) for ref in latents[1]], shuffle_shards=1)
    for _ in load_ahead(dataset, order, range(1, 7), slice(0, 4), 4):
        held = 0
        for path in (tmp_path / "cache").glob("*.safetensors"):
            with suppress(FileNotFoundError):  # evicted between the two calls
                held += path.stat().st_size
        most = max(most, held)
    assert size_of(latents[0]) <= most <= 2 * size_of(latents[0])
    assert len(store[0].asked) == SHARDS


def test_a_shard_opened_before_its_prefetch_is_not_fetched_again(latents, store, tmp_path):
    dataset, busy = opened(latents, tmp_path, held=2), threading.Event()
    fetchers = dataset.shards._fetchers
    for _ in range(fetchers._max_workers):
        fetchers.submit(busy.wait)
    paths = [dataset.samples[index].shard for index in (0, 4, 8, 12)]
    dataset.shards.fetch_ahead(paths)
    for path in paths:  # the first are out of the cache again at the end
        dataset.shards.open(path)
    busy.set()
    fetchers.shutdown()
    assert len(store[0].asked) == len(paths)


def test_shards_are_fetched_before_their_step(latents, store, tmp_path):
    dataset = opened(latents, tmp_path, held=2 * SHARDS)
    shards_of = [str(ref.shard) for ref in latents[1]]
    order = SampleOrder([()] * 24, 4, 0, shards_of, shuffle_shards=1)
    batches = load_ahead(dataset, order, range(1, 7), slice(0, 4), 2)
    first = next(batches)
    assert [len(micro["latents"]) for micro in first] == [2, 2]
    deadline = time.monotonic() + 10
    while len(set(store[0].asked)) < SHARDS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(set(store[0].asked)) == SHARDS  # the second step was not requested yet
    for step, micro in enumerate(batches, 2):
        indices, _ = order.batch(step)
        expected = torch.cat([latents[2][index]["latents"] for index in indices])
        assert torch.equal(torch.cat([part["latents"] for part in micro]), expected)
    assert step == 6


def test_an_error_in_the_background_is_raised_at_its_step(latents, store, tmp_path):
    (store[2] / "shards/00000/latents.safetensors").unlink()
    dataset = opened(latents, tmp_path)
    batches = load_ahead(dataset, SampleOrder([()] * 24, 24, 0), range(1, 3), slice(0, 24), 24)
    with pytest.raises(MissingInputError, match="00000"):
        next(batches)
