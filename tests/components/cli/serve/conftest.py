"""The real server on a small work root, with the bundled model, and a client that speaks OpenAI's formats."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from univigu.video import encode_mp4

REPO = Path(__file__).parents[4]
OPTIONS = ("--batch", "4", "--poll", "0.5", "--max-body", "1", "--max-queue", "128", "--max-seconds", "600")


class Server:
    """`univigu serve` in a process of its own; a restart keeps its port."""

    def __init__(self, root):
        self.root, self.port = root, "0"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "components.cli.main", "serve", "--root", str(self.root), "--port", self.port]
        env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        log = (self.root / "serve.log").open("a")
        self.process = subprocess.Popen(
            [*command, *OPTIONS], cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), (self.root / "serve.log").read_text()
        self.port = self.url.rpartition(":")[2]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(timeout=300)

    def call(self, method, path, body=None, **headers):
        """The status and the body of an answer: a value of JSON, or bytes."""
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        request = urllib.request.Request(f"{self.url}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, kind, content = answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, content = error.code, error.headers["content-type"], error.read()
        return status, json.loads(content) if kind == "application/json" else content

    def until(self, wanted, seconds=300):
        """Wait until `wanted()` is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := wanted()):
            assert time.monotonic() < end, (self.root / "serve.log").read_text()
            assert self.process.poll() is None, (self.root / "serve.log").read_text()
            time.sleep(0.1)
        return found

    def until_ready(self):
        self.until(lambda: self.call("GET", "/health")[0] == 200)

    def post(self, prompt="a red seven moves to the right", **fields):
        """The id of a new video; of two steps unless they are given."""
        key = {"idempotency-key": fields.pop("key")} if "key" in fields else {}
        body = {"prompt": prompt, "num_inference_steps": 2, **fields}
        status, job = self.call("POST", "/v1/videos", body, **key)
        assert status == 200, job
        return job["id"]

    def wait_for(self, video_id):
        """A finished job."""
        return self.until(
            lambda: (job := self.call("GET", f"/v1/videos/{video_id}")[1])["status"] in ("completed", "failed") and job
        )

    def make(self, **fields):
        """The mp4 of a new video."""
        return self.call("GET", f"/v1/videos/{self.wait_for(self.post(**fields))['id']}/content")[1]

    def caption(self, content, **fields):
        """The answer to a question about an mp4."""
        return self.call("POST", "/v1/chat/completions", question(content, **fields))

    def metric(self, name):
        text = self.call("GET", "/metrics")[1].decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return float(values.get(f"univigu_serve_{name}", 0))


def question(content, **fields):
    """A request about a file, as vLLM's clients send a video."""
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "text", "text": "What happens?"}, {"type": "video_url", "video_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], **fields}


@pytest.fixture(scope="session", name="question")
def question_fixture():
    return question


@pytest.fixture(scope="session")
def clip():
    """An mp4 of nine frames in which a bright square moves."""
    frames = np.full((9, 32, 32, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:20, 2 * number : 2 * number + 10] = 220
    return encode_mp4(frames, 8, "yuv420p")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    server.until_ready()
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)
