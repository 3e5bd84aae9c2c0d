"""Reports reach whoever is named, once, and their address reaches nobody."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from components.orchestration.notifications import NOTIFY_URL, send


def test_a_report_reaches_whoever_is_named_and_its_address_is_in_no_message(monkeypatch):
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(received) == 1 else 500)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(NOTIFY_URL, f"http://127.0.0.1:{server.server_port}/secret")
    assert send({"state": "promoted"}) == "the receiver was notified"
    assert send({"state": "promoted"}) == "nobody was notified: the receiver failed (status 500)"
    server.shutdown()
    server.server_close()
    assert received == [{"state": "promoted"}] * 2
    assert "URLError" in send({})
    for url in ("http://[secret", "http://a b/secret"):
        monkeypatch.setenv(NOTIFY_URL, url)
        assert "secret" not in send({})
    monkeypatch.setenv(NOTIFY_URL, "ftp://secret")
    assert send({}) == "nobody was notified: UNIVIGU_NOTIFY_URL holds no http or https address"
    monkeypatch.delenv(NOTIFY_URL)
    assert "not set" in send({})
