"""The journal: a service's answers, kept on disk before they are used, and their cost, so that none is paid for twice.

It is a SQLite file under the work root. Every answer is one transaction, synced to disk, so a killed process loses no
answer that it had received. Several processes may share the file. It outlives runs, changed parameters and commits, and
is never part of an output.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from univigu.errors import CorruptDataError

WAIT_S = 120.0  # for another process's transaction
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (name TEXT PRIMARY KEY, amount REAL NOT NULL) WITHOUT ROWID;
"""
_ADD = "INSERT INTO spent VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount"


class Journal:
    """Answers by the digest of their request, and the summed cost of all requests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._damage_as_error():
            self._connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_TABLES)
        self.thread = ThreadPoolExecutor(1, "journal")  # for callers that must not wait for the disk

    def close(self) -> None:
        self.thread.shutdown()
        self._connection.close()

    def find(self, key: str) -> Any:
        """The answer to the request with this digest, or None."""
        with self._damage_as_error():
            row = self._connection.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, key: str, body: Any, cost: Mapping[str, float]) -> None:
        """Keep an answer (JSON), and add its cost to the sums. It is on disk when this returns."""
        text = json.dumps(body)  # ASCII, so that lone surrogates can be kept too
        with self._transaction():
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
            self._connection.executemany(_ADD, list(cost.items()))

    def charge(self, cost: Mapping[str, float]) -> None:
        """Add the cost of a request without an answer to the sums."""
        with self._transaction():
            self._connection.executemany(_ADD, list(cost.items()))

    def spent(self) -> dict[str, float]:
        """The sums, by name."""
        with self._damage_as_error():
            return dict(self._connection.execute("SELECT name, amount FROM spent"))

    def keys(self) -> list[str]:
        """The digests of all answered requests."""
        with self._damage_as_error():
            return [key for (key,) in self._connection.execute("SELECT key FROM answers ORDER BY key")]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._damage_as_error():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _damage_as_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise  # a full disk, which the runner reports, or a lock
        except sqlite3.DatabaseError as error:
            raise CorruptDataError(
                f"The journal of answers {self.path} is damaged ({error}); move the file away and run the step again "
                "(its answers then have to be paid for again)."
            ) from error
