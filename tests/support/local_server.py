"""An HTTP server in this process."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


class Answering:
    """For a handler of `http.server`: answers in JSON, and writes no log."""

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


class LocalServer(ThreadingHTTPServer):
    """A server whose requests `handler` answers; `url` is its address."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(server):
    """Serve until the block ends."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
