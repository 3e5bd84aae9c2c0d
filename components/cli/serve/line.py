"""The requests that wait for the model, in the order in which they came."""

import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli.serve.errors import ApiError

if TYPE_CHECKING:
    import numpy as np

    from components.cli.serve.models import Served


class Caption(NamedTuple):
    """A video to describe; None for a setting is the model's own."""

    frames: "np.ndarray"  # uint8 (F, H, W, 3), in the model's format
    seed: int
    steps: int | None
    guidance: float | None
    temperature: float | None

    @property
    def key(self) -> Hashable:
        """Captions with equal keys may be made in one batch."""
        return self.frames.shape, self.steps, self.guidance, self.temperature


class Video(NamedTuple):
    """A video to make; None for a setting is the model's own."""

    prompt: str
    negative_prompt: str | None
    frames: int
    height: int
    width: int
    seed: int
    steps: int | None
    guidance: float | None

    @property
    def key(self) -> Hashable:
        """Videos with equal keys may be made in one batch."""
        return self.frames, self.height, self.width, self.steps, self.guidance, self.negative_prompt


@dataclass(eq=False)
class Entry:
    """A request in the line. Its model is the one that was in use when it came, which also makes its answer.

    The future's result is the text of a caption, or the frames of a video, uint8 (F, H, W, 3).
    """

    asked: Caption | Video
    model: "Served"
    abandoned: bool = False  # nobody waits for it any more
    progress: int = 0  # per cent
    future: "Future[Any]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> Hashable:
        return type(self.asked), id(self.model), self.asked.key

    @property
    def kind(self) -> str:
        return type(self.asked).__name__.lower()


class Line:
    """A line of limited length. Any thread may use it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._waiting, self._changed = limit, deque[Entry](), threading.Condition()
        self._closed = False
        self.pace = 1.0  # seconds of a request, lately

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, entry: Entry) -> None:
        """Add a request at the end; raises `ApiError` (429) if the line is full, and (503) once it is closed."""
        with self._changed:
            if self._closed:
                raise ApiError(503, "The server is shutting down; send the request again.", retry_after=5)
            if len(self._waiting) >= self._limit:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting, which is the limit; send this one again later.",
                    code="queue_full",
                    retry_after=min(600, max(1, round(self.pace * len(self._waiting) / 2))),
                )
            self._waiting.append(entry)
            self._changed.notify()

    def restore(self, entries: Sequence[Entry]) -> None:
        """Add requests that were accepted earlier, without the limit."""
        with self._changed:
            self._waiting.extend(entries)
            self._changed.notify()

    def remove(self, entry: Entry) -> bool:
        """Give a request up; returns whether it still waited. A batch of which none is wanted any more is ended."""
        entry.abandoned = True
        with self._changed:
            waited = entry in self._waiting
            if waited:
                self._waiting.remove(entry)
        entry.future.cancel()
        return waited

    def take(self, count: int) -> list[Entry]:
        """Wait for the next request, and return it with at most `count - 1` others that may share its batch.

        Empty once the line is closed. The futures of what is returned are running.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return []
                key = self._waiting[0].key
                batch = [entry for entry in self._waiting if entry.key == key][:count]
                self._waiting = deque(entry for entry in self._waiting if entry not in batch)
                if batch := [entry for entry in batch if entry.future.set_running_or_notify_cancel()]:
                    return batch

    def close(self) -> list[Entry]:
        """Let nothing more in or out; returns what still waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return list(self._waiting)
