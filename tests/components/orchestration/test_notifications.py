"""Reports reach the receiver once, and its address is in no message and in no log."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from components.orchestration.notifications import NOTIFY_URL, send


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_): ...


@pytest.fixture
def receiver(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.received, server.status = [], 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv(NOTIFY_URL, f"http://127.0.0.1:{server.server_port}/secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (200, "notification sent"),
        (204, "notification sent"),
        (302, "no notification sent: the receiver failed (status 302)"),
        (500, "no notification sent: the receiver failed (status 500)"),
    ],
)
def test_a_report_is_posted_once_and_a_redirect_is_not_followed(receiver, status, message):
    receiver.status = status
    assert send({"state": "promoted"}) == message
    assert receiver.received == [("/secret", {"state": "promoted"})]


def test_no_log_line_holds_the_address(receiver, caplog):
    with caplog.at_level(logging.DEBUG):
        assert send({}) == "notification sent"
    assert "secret" not in caplog.text


def test_a_receiver_that_is_not_there_raises_no_error(receiver):
    receiver.shutdown()
    receiver.server_close()
    assert send({}) == "no notification sent: the receiver failed (ConnectError)"


@pytest.mark.parametrize("url", ["http://[secret", "http://a b/secret", "http://a:secret/"])
def test_no_message_holds_an_invalid_address(monkeypatch, url):
    monkeypatch.setenv(NOTIFY_URL, url)
    assert send({}).startswith("no notification sent")
    assert "secret" not in send({})


def test_an_address_of_another_scheme_is_not_used(monkeypatch):
    monkeypatch.setenv(NOTIFY_URL, "ftp://secret")
    assert send({}) == "no notification sent: UNIVIGU_NOTIFY_URL is not an http or https address"
    monkeypatch.delenv(NOTIFY_URL)
    assert send({}) == "no notification sent: UNIVIGU_NOTIFY_URL is not set"
