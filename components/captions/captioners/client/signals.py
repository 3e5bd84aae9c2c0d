"""SIGINT and SIGTERM while requests are in flight: their answers are paid for, so they are still received."""

import asyncio
import signal
import threading

from components.captions.captioners.client.endpoint import Endpoint
from univigu.errors import PreemptedError


class GracefulShutdown:
    """While active, the first SIGINT or SIGTERM waits for the requests in flight; the second cancels them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def __enter__(self) -> None:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        self.signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            self.signals = ()
        for number in self.signals:
            self.loop.add_signal_handler(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number in self.signals:
            self.loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.endpoint.stop.is_set():
            # pyrefly: ignore[missing-attribute]
            self.task.cancel()
        self.endpoint.give_up(
            PreemptedError("Captioning was interrupted; all answers are kept, so run the same command again to resume.")
        )
