"""What takes long says so: to people at once, in a log after some seconds, and not at all with --quiet."""

import io
import sys
import time

import pytest

from components.pipeline import progress
from components.pipeline.progress import activity


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.delenv("UNIVIGU_QUIET", raising=False)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)


def wait_for(stream, text):
    for _ in range(500):
        if text in stream.getvalue():
            return
        time.sleep(0.01)
    raise AssertionError(stream.getvalue())


def test_a_terminal_shows_what_is_done_until_it_is_done(monkeypatch, impatient):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with activity("Loading"):
        assert terminal.getvalue() == "Loading ...\r"
    assert terminal.getvalue() == "Loading ...\r           \r"


def test_a_log_has_a_line_about_what_takes_long_only(monkeypatch, impatient):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with activity("Loading"):
        wait_for(log, "Loading ...\n")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 60)
    with activity("Reading"):
        pass
    assert log.getvalue() == "Loading ...\n"


def test_quiet_shows_neither_a_line_nor_a_bar(monkeypatch, impatient):
    monkeypatch.setenv("UNIVIGU_QUIET", "1")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with activity("Loading"):
            time.sleep(0.05)
        assert list(progress.progress(_slowly(3), "sampling")) == [0, 1, 2]
        assert stream.getvalue() == ""


def test_a_loop_has_lines_in_a_log(monkeypatch, impatient):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(progress.progress(_slowly(3), "sampling", 3, "steps")) == [0, 1, 2]
    assert log.getvalue().startswith("sampling:  33% 1/3")


def _slowly(count):
    for number in range(count):
        time.sleep(0.03)
        yield number
