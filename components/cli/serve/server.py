"""The process: its address, its threads, and its end."""

import asyncio
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

from components.cli.listening import address_of, is_loopback, listen
from components.cli.messages import is_verbose, say
from components.cli.serve.app import Service, make_app
from components.cli.serve.command import TOKEN
from components.cli.serve.errors import ApiError
from components.cli.serve.guard import ApiGuard
from components.cli.serve.jobs import Jobs
from components.cli.serve.limits import Limits, Memory
from components.cli.serve.line import Line, Video
from components.cli.serve.metrics import Metered, Metrics
from components.cli.serve.models import Models
from components.cli.serve.videos import enter
from components.cli.serve.worker import Worker
from components.pipeline.state import lock

SPARE = 200  # connections beside those of waiting requests
SWEEP = 60.0  # seconds between two looks for expired videos


def run(model: str, name: str, root: Path, poll: float, limits: Limits, address: tuple[str, int], token: str) -> None:
    """Serve until SIGINT or SIGTERM; prints the address once it listens.

    model, name: as in `chosen_model.find_model`. Raises as that does, and `BusyError` if another server has the root.
    """
    refusal = f"Another `univigu serve` runs on {root}; stop it, or give another --root."
    with lock(root, "serve", refusal), listen(*address) as listening:
        metrics = Metrics()
        models = Models(model, name, root, poll, metrics)
        folder = models.find()
        line = Line(limits.queue)
        service = Service(root, models, line, Jobs(root, limits.keep), limits, Memory(), metrics)
        host, port = address[0], listening.getsockname()[1]
        app = Metered(ApiGuard(make_app(service), token, port, is_loopback(host)), metrics)
        print(address_of(host, port), flush=True)
        if token != os.environ.get(TOKEN, ""):
            print(f"The token is {token}", flush=True)  # it was made just now
        say("Press Ctrl-C to stop.")
        level = "info" if is_verbose() else "error"
        options: dict[str, Any] = {
            "log_level": level,
            "access_log": is_verbose(),
            "server_header": False,
            "lifespan": "off",
        }
        config = uvicorn.Config(app, limit_concurrency=limits.queue + SPARE, **options)
        server = Server(config, service, folder)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn raises again when it has ended
        with suppress(KeyboardInterrupt):
            server.run([listening])
        if server.fault:
            raise server.fault


class Server(uvicorn.Server):
    """uvicorn with the threads of a service: one loads models, one runs them."""

    def __init__(self, config: uvicorn.Config, service: Service, folder: Path) -> None:
        super().__init__(config)
        self.service, self.folder = service, folder
        self.fault: BaseException | None = None
        self._worker = Worker(service.line, service.limits, service.metrics)
        self._loader = threading.Thread(target=self._load, name="loader", daemon=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loader.start()

    def _load(self) -> None:
        """Load the model, resume what an earlier server left, and look for new champions."""
        service = self.service
        try:
            waiting = service.jobs.load()
            service.models.load(self.folder)
            model = service.models.require()
            service.line.restore([enter(service, job, model) for job in waiting])
            self._worker.start()
        except BaseException as error:
            self.fault, self.should_exit = error, True
            return
        if waiting:
            say(f"{len(waiting)} videos that an earlier server left are made first.")
        service.models.watch()

    async def on_tick(self, counter: int) -> bool:
        if counter % int(SWEEP * 10) == 0:
            with suppress(OSError):
                await asyncio.to_thread(self.service.jobs.remove_expired)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the batch that runs; waiting captions are refused, and waiting videos stay on the disk."""
        self.service.models.stop()
        for entry in self.service.line.close():
            if not isinstance(entry.asked, Video):
                error = ApiError(503, "The server is shutting down; send the request again.", retry_after=5)
                entry.future.set_exception(error)
        await super().shutdown(sockets)
        while self._worker.is_alive() and not self.force_exit:
            await asyncio.sleep(0.1)
