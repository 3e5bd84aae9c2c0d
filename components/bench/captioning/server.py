"""A language model service that reproduces the faults of real ones deterministically, and counts its requests.

It serves the chat completions API on this machine. Each prompt has a list of faults for its requests; when the list is
used up, answers are good. It also has a rate limit, which it announces in headers and enforces.
"""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from components.bench.captioning.troubles import LOST

_MARKED = re.compile(r"^(=== [0-9a-f]{16} ===)\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
_WORDS = {"orange": (255, 140, 0), "purple": (120, 30, 160), "black": (0, 0, 0), "white": (255, 255, 255)}
REFUSAL = "I'm sorry, but I can't help with describing this video."


class MisbehavingServer(ThreadingHTTPServer):
    """Serves from construction to `close`.

    describe: writes a good caption for a prompt. trouble: the faults of a prompt's first requests, in order. rate:
    accepted requests per second, after a burst of a fifth as many; None for no limit. hang_s: how long a hanging
    request takes. sees: "pictures", "nothing" (refuses pictures), "words" (accepts pictures but ignores them), or a
    failure for requests with pictures, such as "http 500 oops".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        describe: Callable[[str], str],
        trouble: Callable[[str], Sequence[str]] = lambda prompt: (),
        rate: float | None = None,
        hang_s: float = 30.0,
        key: str = "",
        model: str = "under-test",
        sees: str = "pictures",
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.describe, self.trouble, self.rate, self.hang_s = describe, trouble, rate, hang_s
        self.key, self.model, self.sees = key, model, sees
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.befallen: Counter[str] = Counter()  # number of faults used so far, by prompt
        self.requests: list[tuple[str, str]] = []  # (the client's request id, the fault)
        self.bodies: list[dict[str, Any]] = []
        self.said: dict[str, str] = {}  # the fault of each answered request
        self.allowance, self.filled = (rate or 0) / 5, time.monotonic()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def next_trouble(self, name: str, prompt: str) -> str:
        """The fault of the next request for a prompt; a repeated request gets the same answer."""
        troubles = self.trouble(prompt)
        with self.lock:
            if name not in self.said:
                number = self.befallen[prompt]
                self.befallen[prompt] += 1
                trouble = troubles[number] if number < len(troubles) else ""
                if trouble in LOST or trouble.startswith("http "):
                    return trouble
                self.said[name] = trouble
            return self.said[name]

    def note(self, name: str, befell: str, body: dict[str, Any]) -> None:
        with self.lock:
            self.requests.append((name, befell))
            self.bodies.append(body)

    def admit(self) -> dict[str, str] | None:
        """The headers of the rate limit, or None if it is exceeded."""
        if self.rate is None:
            return {}
        with self.lock:
            now, burst = time.monotonic(), self.rate / 5
            self.allowance = min(burst, self.allowance + (now - self.filled) * self.rate)
            self.filled = now
            if self.allowance < 1:
                return None
            self.allowance -= 1
            full = (burst - self.allowance) / self.rate
            left = {"x-ratelimit-limit-requests": str(int(burst)), "x-ratelimit-reset-requests": f"{full * 1e3:.0f}ms"}
            return {**left, "x-ratelimit-remaining-requests": str(int(self.allowance))}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect: this server provokes it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # pyrefly: ignore[bad-override-mutable-attribute]
    server: MisbehavingServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        name = self.headers.get("X-Client-Request-Id", "")
        prompt = _prompt_of(body)
        limits = server.admit()
        if limits is None:
            server.note(name, "limited", body)
            return self.refuse(429, "Rate limit reached", {"Retry-After": "1", "retry-after-ms": "100"})
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            server.note(name, "401", body)
            return self.refuse(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        if body.get("model") != server.model:
            server.note(name, "404", body)
            return self.refuse(404, f"The model `{body.get('model')}` does not exist.")
        pictures = _pictures_of(body)
        if pictures and server.sees == "nothing":
            server.note(name, "no pictures", body)
            return self.refuse(400, "This model does not support image input.")
        if pictures and server.sees.startswith("http "):
            server.note(name, server.sees, body)
            return self.fail(server.sees)
        if prompt is None:
            server.note(name, "probe", body)
            return self.answer(
                " ".join(_colours(pictures)) if pictures and server.sees == "pictures" else "ready", limits
            )
        trouble = server.next_trouble(name, prompt)
        server.note(name, trouble, body)
        self.inject_fault(trouble, prompt, limits)

    def inject_fault(self, trouble: str, prompt: str, limits: dict[str, str]) -> None:
        """Answer, with a fault of the connection or of the service, or with an odd answer."""
        good = self.server.describe(prompt)
        match trouble:
            case "429":
                self.refuse(429, "Rate limit reached", {"Retry-After": "1"})
            case "429 date":
                self.refuse(429, "Rate limit reached", {"Retry-After": formatdate(time.time() + 1, usegmt=True)})
            case "500":
                self.refuse(500, "The server had an error while processing your request")
            case "hang":
                self.close_connection = True
                self.server.closing.wait(self.server.hang_s)
            case "half json":
                content = _completion(good)
                self.send(200, content[: len(content) // 2])
            case "broken off":
                self.send(200, _completion(good), length=2 * len(_completion(good)))
                self.close_connection = True
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            case "trickle":
                self.trickle(_completion(good))
            case "no choices":
                self.send(200, json.dumps({"object": "chat.completion", "choices": []}).encode())
            case "policy":
                self.refuse(400, "Your request was rejected", code="content_policy_violation")
            case "legacy field":
                content = {"choices": [{"index": 0, "text": good, "finish_reason": "stop"}]}
                self.send(200, json.dumps(content).encode(), limits)
            case text if text.startswith("http "):
                self.fail(text)
            case _:
                self.answer_oddly(trouble, prompt, good, limits)

    def answer_oddly(self, trouble: str, prompt: str, good: str, limits: dict[str, str]) -> None:
        """Answer as services do whose answers have to be read with care; a good answer where there is no trouble."""
        match trouble:
            case "blocked":
                self.answer(None, limits, finish="content_filter")
            case "empty":
                self.answer("", limits)
            case "too long":
                self.answer(f"{good} " * 12, limits)
            case "too short":
                self.answer(good[:20], limits)
            case "refusal":
                self.answer(REFUSAL, limits)
            case "repeats prompt":
                self.answer(prompt, limits)
            case "wrong field":
                self.answer(None, limits, reasoning_content=good)
            case "loop":
                self.answer("The digit moves on and on. " * 9, limits)
            case "only thought":
                self.answer("<thinking>\nThe user wants a caption of the digit, so", limits)
            case "tool calls":
                self.answer(good, limits, finish="tool_calls")
            case "no ending":
                self.answer(good, limits, finish=None)
            case "two texts":
                self.answer(json.dumps([good, f"Another one: {good}"]), limits)
            case "cut off":
                self.answer(good[: len(good) // 2], limits, finish="length")
            case "parts":
                self.answer([{"type": "text", "text": good}], limits)
            case "thought":
                self.answer(f"<think>What do I see?</think>\n{good}", limits)
            case "half a thought":
                self.answer(f"What do I see? A digit.</think>\n\n{good}", limits)
            case "json":
                self.answer(json.dumps({"caption": good, "confidence": 0.9}), limits)
            case "fence":
                self.answer(f"```json\n{json.dumps({'description': good})}\n```", limits)
            case "preface":
                self.answer(f"Sure! Here is the caption:\n\n{good}\n\nLet me know if it fits!", limits)
            case "template tokens":
                self.answer(f"{good}<|im_end|>\n<|im_start|>assistant", limits)
            case "other usage":
                self.answer(good, limits, usage={"inputTokens": "100", "outputTokens": "50"})
            case text if text.startswith("says "):
                self.answer(text.removeprefix("says "), limits)
            case _:
                self.answer(good, limits)

    def answer(
        self,
        text: Any,
        headers: dict[str, str],
        finish: str | None = "stop",
        usage: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.send(200, _completion(text, finish, usage, **more), headers)

    def fail(self, trouble: str) -> None:
        """Refuse with a fault such as ``http 403 Forbidden``; a 429 of this kind has no headers."""
        _, status, words = trouble.split(" ", 2)
        self.refuse(int(status), words)

    def refuse(self, status: int, words: str, headers: dict[str, str] | None = None, code: str = "error") -> None:
        body = {"error": {"message": words, "type": "error", "code": code}}
        self.send(status, json.dumps(body).encode(), headers or {})

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def trickle(self, content: bytes) -> None:
        self.close_connection = True
        self.send(200, b"", length=len(content))
        for byte in content:
            if self.server.closing.wait(self.server.hang_s / len(content)):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    # pyrefly: ignore[bad-override]
    def log_message(self, *_: Any) -> None:
        pass


def _completion(text: Any, finish: str | None = "stop", usage: dict[str, Any] | None = None, **more: Any) -> bytes:
    message = {"role": "assistant", "content": text, **more}
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def _texts_of(body: dict[str, Any]) -> list[str]:
    contents = [message["content"] for message in body["messages"] if message["role"] == "user"]
    parts = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    return [part["text"] for each in parts for part in each if part["type"] == "text"]


def _prompt_of(body: dict[str, Any]) -> str | None:
    """The text between the marker lines of the first user message; None for a probe."""
    found = _MARKED.search(_texts_of(body)[0])
    return found[2] if found else None


def _pictures_of(body: dict[str, Any]) -> list[bytes]:
    contents = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
    urls = [part["image_url"]["url"] for each in contents for part in each if part["type"] == "image_url"]
    return [base64.b64decode(url.partition("base64,")[2]) for url in urls]


def _colours(pictures: Sequence[bytes]) -> list[str]:
    from PIL import Image

    def nearest(content: bytes) -> str:
        pixel = Image.open(io.BytesIO(content)).convert("RGB").resize((1, 1)).getpixel((0, 0))
        # pyrefly: ignore[bad-argument-type]
        return min(_WORDS, key=lambda word: sum((a - b) ** 2 for a, b in zip(_WORDS[word], pixel, strict=True)))

    return sorted({nearest(content) for content in pictures})
