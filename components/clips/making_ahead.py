"""Videos of an import are read ahead of the batch that is asked for: no core waits for a batch's last video."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Self

from components.clips.import_clips import Made

Row = Mapping[str, Any]


class MadeAhead:
    """The clips of planned videos, in batches that are asked for in the order of `rows`.

    make: called with a place in `folder` and a row, in the threads of `pool`. ahead: the number of videos after a batch
    that are begun with it; so many are made in vain where the next batch is kept from an earlier run.
    """

    def __init__(
        self, pool: Executor, make: Callable[[Path, Row], Made], rows: Sequence[Row], folder: Path, ahead: int
    ) -> None:
        self._pool, self._make, self._rows, self._folder, self._ahead = pool, make, rows, folder, ahead
        self._numbers = {row["id"]: number for number, row in enumerate(rows)}
        self._begun: dict[str, Future[Made]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def take(self, batch: Sequence[Row], folder: Path) -> list[Made]:
        """What became of each video of a batch; its clips are in ``ID.tar`` in `folder`."""
        after = self._numbers[batch[-1]["id"]] + 1
        for row in (*batch, *self._rows[after : after + self._ahead]):
            if row["id"] not in self._begun:
                self._begun[row["id"]] = self._pool.submit(self._make, self._place(row), row)
        found = []
        for row in batch:
            found.append(self._begun.pop(row["id"]).result())
            if found[-1].clips:
                self._place(row).rename(folder / self._place(row).name)
            self._place(row).unlink(missing_ok=True)
        return found

    def _place(self, row: Row) -> Path:
        return self._folder / f"{row['id']}.tar"
