"""Shards of latents in an object store: uploaded once, prefetched into a bounded cache, and verified.

A folder of latents with remote shards has ``remote.json`` (their URL; size, SHA-256 and number of samples of each) and
``target_ids.safetensors``, which is read as a whole before the first step. A URL can be anything that fsspec reads: s3,
gs, az, http, a mounted folder. Keys and endpoints come from the environment, as the store's own client reads them.

A cached shard is named by its SHA-256, so all processes of a machine share the cache, and so do runs. When the cache is
full, the least recently used shards are removed.
"""

import json
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from univigu.errors import BadInputError, ConfigError, CorruptDataError, MissingInputError, TransientError
from univigu.files import file_sha256, write_json
from univigu.threads import side_threads
from univigu.training.data import Shards, open_shard, open_tensors

REMOTE = "remote.json"
TARGET_IDS = "target_ids.safetensors"
ATTEMPTS = 4
_FETCHES_AT_ONCE = 4
_ABANDONED_S = 60  # an unknown process id may belong to another container, so its file is kept this long


class RemoteShards(Shards):
    """The shards that ``folder/remote.json`` lists, fetched into the folder `cache`; at most `cache_bytes` of them.

    Half of the cache is for prefetched shards. Raises `ConfigError` where the cache can't hold two shards, and
    `CorruptDataError` where ``remote.json`` can't be read.
    """

    def __init__(self, folder: Path, cache: Path, cache_bytes: int) -> None:
        self.folder, self.cache, self.cache_bytes = folder, cache, cache_bytes
        remote = _read_remote(folder)
        self.url, self._facts = remote["url"], {folder / name: facts for name, facts in remote["shards"].items()}
        largest = max(facts["size"] for facts in self._facts.values())
        if cache_bytes < 2 * largest:
            raise ConfigError(
                f"A cache of {cache_bytes / 1e9:.3g} GB can't hold two shards of {largest / 1e9:.3g} GB; "
                "raise `cache_gb`, or encode the latents in smaller shards."
            )
        self._targets = open_tensors(folder / TARGET_IDS)
        self._capacity = int(cache_bytes // largest)  # in shards
        self._opened: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        self._wanted: OrderedDict[Path, None] = OrderedDict()
        self._ahead: dict[Path, Future[Path]] = {}
        self._lock = threading.RLock()  # the loader's thread and an evaluation may open shards at the same time
        self._fetchers = side_threads(_FETCHES_AT_ONCE, "fetch-shard")
        cache.mkdir(parents=True, exist_ok=True)

    def open(self, path: Path) -> Mapping[str, Tensor]:
        with self._lock:
            if path in self._opened:
                _touch(self._cached(path))
            else:
                self._wanted.pop(path, None)
                coming = self._ahead.pop(path, None)
                if coming and not coming.cancel():
                    wait([coming])
                self._opened[path] = open_shard(self.fetch(path))
                if len(self._opened) > self._capacity:
                    self._opened.popitem(last=False)
                self._fetch_some()
            self._opened.move_to_end(path)
            return self._opened[path]

    def rows(self, path: Path) -> int:
        return self._of(path)["rows"]

    def target_ids(self, path: Path) -> Tensor:
        return self._targets[path.relative_to(self.folder).as_posix()]

    def fetch_ahead(self, paths: Iterable[Path]) -> None:
        with self._lock:
            self._wanted |= {path: None for path in paths if path not in self._opened and path not in self._ahead}
            self._fetch_some()

    def _fetch_some(self) -> None:
        while self._wanted and len(self._ahead) < self._capacity // 2:
            path, _ = self._wanted.popitem(last=False)
            self._ahead[path] = self._fetchers.submit(self.fetch, path)  # `open` fetches again and raises its error

    def fetch(self, path: Path) -> Path:
        """The path of a shard in the cache; it is fetched and verified if it is not there.

        Raises `MissingInputError` where the store doesn't have it, `CorruptDataError` where its bytes differ from the
        uploaded ones, and `TransientError` where the store doesn't answer.
        """
        from filelock import FileLock

        facts, home = self._of(path), self._cached(path)
        if not _touch(home):
            with FileLock(self.cache / f".{facts['sha256'][:16]}.lock"):
                if not _touch(home):  # another process may have fetched it meanwhile
                    partial = self.cache / f".{facts['sha256']}.{facts['size']}.{os.getpid()}.partial"
                    try:
                        while not self._reserve(partial, facts["size"]):
                            time.sleep(0.05)  # until another shard has arrived, which can then be removed
                        fetch_file(f"{self.url}/{path.relative_to(self.folder).as_posix()}", partial, facts)
                        partial.replace(home)
                    finally:
                        partial.unlink(missing_ok=True)
        return home

    def _cached(self, path: Path) -> Path:
        return self.cache / f"{self._of(path)['sha256']}.safetensors"

    def _of(self, path: Path) -> Mapping[str, Any]:
        if path not in self._facts:
            raise CorruptDataError(f"{self.folder / REMOTE} doesn't list {path}; upload the latents again.")
        return self._facts[path]

    def _reserve(self, partial: Path, size: int) -> bool:
        """Reserve space for a shard, removing the least recently used ones; open files stay readable after removal.

        Returns whether there is space beside the other shards that are being fetched.
        """
        import psutil
        from filelock import FileLock

        with FileLock(self.cache / ".lock"):
            coming = 0
            for other in self.cache.glob(".*.partial"):
                _, _, its_size, process, _ = other.name.split(".")
                if psutil.pid_exists(int(process)) or time.time() - other.stat().st_mtime < _ABANDONED_S:
                    coming += int(its_size)
                else:
                    other.unlink(missing_ok=True)  # left by a killed run
            here = sorted((path.stat().st_mtime_ns, path) for path in self.cache.glob("*.safetensors"))
            held = sum(path.stat().st_size for _, path in here)
            for _, path in here:
                if held + coming + size <= self.cache_bytes:
                    break
                held -= path.stat().st_size
                path.unlink()
            fits = held + coming + size <= self.cache_bytes
            if fits:
                partial.touch()
            return fits


def fetch_file(url: str, path: Path, facts: Mapping[str, Any]) -> None:
    """Fetch one file to `path` and verify it; wrong bytes and errors of the store are retried after a random wait.

    Raises as `RemoteShards.fetch` does, and `ConfigError` for a URL that no installed filesystem can read.
    """
    # Our own loop, not tenacity: wrong bytes are retried like errors, but reported differently at the end.
    from fsspec.core import url_to_fs

    fault = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2**attempt * random.uniform(0.25, 0.75))
        try:
            store, place = url_to_fs(url)
            store.get_file(place, str(path))
        except FileNotFoundError as error:
            raise MissingInputError(f"There is no file {url}; upload the latents again.") from error
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url} can't be read ({error}); install the package that it needs, or correct the URL."
            ) from error
        except Exception as error:  # each store's client has its own exceptions
            fault = f"{type(error).__name__}: {error}"
            continue
        if path.stat().st_size == facts["size"] and file_sha256(path) == facts["sha256"]:
            return
        fault = ""
    if not fault:
        raise CorruptDataError(f"{url} differs from what was uploaded (size or SHA-256); upload the latents again.")
    raise TransientError(f"{url} could not be fetched ({fault}); try again later, or check the store.")


def put_shards(folder: Path, names: Iterable[str], url: str) -> int:
    """Upload the shards `names` of a folder of latents to `url`, and write their URL and hashes into the folder.

    Returns the number of bytes. The shards stay in the folder; the caller may remove them. Raises `BadInputError`
    where there are none, and `TransientError` where an upload is incomplete.
    """
    from fsspec.core import url_to_fs

    url = url.rstrip("/")
    shards, targets = {}, {}
    for name in sorted(names):
        shard = open_shard(folder / name)
        store, place = url_to_fs(f"{url}/{name}")
        store.makedirs(place.rpartition("/")[0], exist_ok=True)
        store.put_file(str(folder / name), place)
        size = (folder / name).stat().st_size
        if store.info(place)["size"] != size:
            raise TransientError(f"{folder / name} was not uploaded completely to {url}; run the same command again.")
        shards[name] = {"size": size, "sha256": file_sha256(folder / name), "rows": len(shard["latents"])}
        targets[name] = shard["target_ids"]
    if not shards:
        raise BadInputError(f"There are no shards in {folder}; run encode-latents first.")
    save_file(targets, folder / TARGET_IDS)
    write_json(folder / REMOTE, {"url": url, "shards": shards})
    return sum(facts["size"] for facts in shards.values())


def _read_remote(folder: Path) -> dict[str, Any]:
    try:
        remote = json.loads((folder / REMOTE).read_text(encoding="utf-8"))
        return {"url": str(remote["url"]), "shards": dict(remote["shards"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{folder / REMOTE} can't be read ({error}); upload the latents again.") from error


def _touch(path: Path) -> bool:
    """Whether a file exists; if so, mark it as just used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
