"""What standard error holds: with UNIVIGU_LOG_FORMAT=json, one JSON object per line; with `--quiet`, only errors.

`components.pipeline.processes.read_lines` turns the lines of a child back into text.
"""

import io
import json
import os
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from components.pipeline.processes import PREFIX, plain_line
from univigu.errors import ConfigError

FORMAT = "UNIVIGU_LOG_FORMAT"


def choose_format() -> None:
    """Set up standard error as UNIVIGU_LOG_FORMAT says: `text`, the default, or `json`.

    Raises `ConfigError` for another value.
    """
    chosen = os.environ.get(FORMAT) or "text"
    if chosen not in ("text", "json"):
        raise ConfigError(f"{FORMAT} is '{chosen}'; set it to text or json.")
    if chosen == "json" and not isinstance(sys.stderr, JsonLines):
        sys.stderr = JsonLines(sys.stderr)
        sys.excepthook = _report_exception


class JsonLines(io.TextIOBase):
    """A text stream that writes each line to another one as a JSON object; empty lines are left out."""

    encoding = "utf-8"  # the objects are ASCII

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._partial, self._lock = stream, "", threading.RLock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str, /) -> int:
        """Write the lines that `text` completes; the rest waits for its end, or for `flush` at the exit."""
        with self._lock:
            *lines, self._partial = (self._partial + text.replace("\r", "\n")).split("\n")
            for line in lines:
                self._write_line(line)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        """Write what has no line end yet. The stream itself stays open: it is the process's own."""
        with self._lock:
            self._write_line(self._partial)
            self._partial = ""
        self.flush()

    def record(self, level: str, message: str, **more: Any) -> None:
        """Write one object."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        rank = {"rank": int(os.environ["RANK"])} if os.environ.get("RANK", "").isdecimal() else {}
        content = {"time": now, "level": level, "message": message, "process": os.getpid(), **rank, **more}
        with self._lock:
            self.stream.write(json.dumps(content, sort_keys=True) + "\n")
            self.stream.flush()

    def _write_line(self, line: str) -> None:
        if line.strip():
            text = plain_line(line)
            self.record("error" if text.startswith(PREFIX) else "info", text)


class ErrorLines(JsonLines):
    """A text stream that passes on only the lines that report an error to the user, for `--quiet`."""

    def _write_line(self, line: str) -> None:
        if line.startswith(PREFIX):
            print(line, file=self.stream, flush=True)


def _report_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if isinstance(sys.stderr, JsonLines):
        lines = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.record("error", f"{kind.__name__}: {error}", traceback=lines)
