"""A real MLflow server behind a gate that a test can close."""

import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from local_server import Answering, LocalServer, serving


class _Handler(Answering, BaseHTTPRequestHandler):
    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        if self.server.closed or self.is_next(self.server.drops):
            return self.hang_up()
        if self.is_next(self.server.refused):
            return self.answer(400, b'{"error_code": "INTERNAL_ERROR", "message": "disk I/O error"}')
        if self.is_next(self.server.closes_at):
            self.server.closed = True
            return self.hang_up()
        kept = {name: value for name, value in self.headers.items() if name in ("Content-Type", "Accept")}
        asked = urllib.request.Request(self.server.target + self.path, body, kept, method=self.command)
        try:
            with urllib.request.urlopen(asked) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if self.is_next(self.server.loses):
            return self.hang_up()
        self.server.closed = self.is_next(self.server.closes_after)
        return self.answer(status, content)

    def is_next(self, parts):
        """Whether the method and the path have one of `parts`, which is then removed."""
        if found := [part for part in parts if part in f"{self.command} {self.path}"]:
            parts.remove(found[0])
        return bool(found)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def do_GET(self):
        self.pass_on()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 (http.server looks for these names)


@contextmanager
def gated(mlflow_server):
    """The gate, whose `url` is its address.

    While it is `closed` it answers nothing, as a server that is down. The lists hold parts of a method and a path, each
    for the next request that has it: it is `refused`, it `drops` before the server or its answer is lost (`loses`), or
    the gate closes when it comes (`closes_at`) or when it is answered (`closes_after`).
    """
    with serving(LocalServer(_Handler)) as gate:
        gate.target, gate.closed = mlflow_server.url, False
        gate.refused, gate.drops, gate.loses, gate.closes_at, gate.closes_after = [], [], [], [], []
        yield gate
