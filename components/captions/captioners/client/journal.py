"""What a service answered, kept on disk before anybody uses it, and what that has cost: nothing is paid for twice.

A SQLite file below the work root. Every answer is one transaction, written through to the disk, so a killed process
loses none that it had received; several processes may share the file. It outlives runs, changed parameters and commits,
and is never part of an output.
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
    """Answers by the digest of their request, and sums of what all of them, and all requests, have cost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._said_in_a_sentence():
            self._connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_TABLES)
        self.thread = ThreadPoolExecutor(1, "journal")  # a write waits for the disk; who can't, hands it over

    def close(self) -> None:
        self.thread.shutdown()
        self._connection.close()

    def find(self, key: str) -> Any:
        """The answer to the request with that digest, or None."""
        with self._said_in_a_sentence():
            row = self._connection.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, key: str, body: Any, cost: Mapping[str, float]) -> None:
        """Keep an answer (JSON), and add its cost to the sums. On the disk when this returns."""
        text = json.dumps(body)  # ASCII, so half a surrogate pair can be kept too
        with self._transaction():
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
            self._connection.executemany(_ADD, list(cost.items()))

    def charge(self, cost: Mapping[str, float]) -> None:
        """Add to the sums what brought no answer."""
        with self._transaction():
            self._connection.executemany(_ADD, list(cost.items()))

    def spent(self) -> dict[str, float]:
        """The sums, by name."""
        with self._said_in_a_sentence():
            return dict(self._connection.execute("SELECT name, amount FROM spent"))

    def keys(self) -> list[str]:
        """The digests of all answered requests."""
        with self._said_in_a_sentence():
            return [key for (key,) in self._connection.execute("SELECT key FROM answers ORDER BY key")]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._said_in_a_sentence():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _said_in_a_sentence(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise  # a full disk, a lock: the runner has words for the first
        except sqlite3.DatabaseError as error:
            raise CorruptDataError(
                f"The kept answers at {self.path} are damaged ({error}); move the file away, and run the step again "
                "(it then pays for its answers again)."
            ) from error
