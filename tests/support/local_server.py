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


@contextmanager
def serving(handler):
    """A server whose requests `handler` answers, until the block ends; `url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
