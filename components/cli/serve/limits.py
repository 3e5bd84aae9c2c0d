"""What the server takes, and how much of it."""

import threading
from typing import NamedTuple

from components.cli.serve.errors import ApiError

LONGEST_PROMPT = 4000  # characters
MOST_STEPS = 1000
LARGEST_SEED = 2**53 - 1  # a number of JSON is exact up to here
LARGEST_SCALE = 100.0  # of guidance
HELD = 2 << 30  # bytes of all unfinished requests: their bodies, and the frames that were decoded from them


class Limits(NamedTuple):
    """The options of `univigu serve`."""

    batch: int  # requests that are sampled together
    queue: int  # waiting requests
    seconds: float  # of a caption with its wait, of the sampling of a video, of reading a body
    body: int  # bytes
    pixels: int  # in all frames of a video that is sent here
    frames: int | None  # of a generated video; None: the model's own
    keep: float  # seconds that a finished video is kept


class Memory:
    """Bytes that unfinished requests hold, up to a limit."""

    def __init__(self, limit: int = HELD) -> None:
        self.limit, self.held, self._lock = limit, 0, threading.Lock()

    def take(self, count: int) -> None:
        """Count bytes as held; raises `ApiError` (429) if they are too many."""
        with self._lock:
            if self.held + count > self.limit:
                raise ApiError(
                    429,
                    "The server holds as many bytes of unfinished requests as it may; send this one again later.",
                    code="server_busy",
                    retry_after=1,
                )
            self.held += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.held -= count
