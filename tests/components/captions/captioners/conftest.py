"""A misbehaving endpoint, and clips to be captioned by it."""

from functools import partial

import numpy as np
import pytest

from components.bench.captioning.clips import write_caption
from components.bench.captioning.server import MisbehavingServer
from components.captions.caption_videos import Conversations, find_fault
from components.captions.captioners import CaptionRequest, load_captioner

KEY = "sk-secret-0123456789abcdef"
PROMPTS = [
    f"a {colour} {digit} on black moving {way} slowly, starting at the centre"
    for colour in ("red", "green", "blue", "pink")
    for digit in ("two", "three", "seven")
    for way in ("left", "right", "up")
]


def open_clip(number, opened):
    opened.append(number)
    return np.full((9, 32, 32, 3), 10 * number % 256, np.uint8), 8.0


@pytest.fixture
def serve():
    """Start a misbehaving server; all are closed at the end."""
    servers = []

    def start(troubles=(), **settings):
        trouble = troubles if callable(troubles) else lambda prompt: troubles
        server = MisbehavingServer(settings.pop("describe", write_caption), trouble, **{"key": KEY, **settings})
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def caption(tmp_path, monkeypatch):
    """Have the first `count` prompts captioned by a server; returns their outcomes, by id."""
    opened = []

    def run(server, count=6, attempts=3, instructions=None, prompts=PROMPTS, bounds=(60, 300), checks=(), **options):
        monkeypatch.setenv("CAPTION_BASE_URL", server if isinstance(server, str) else server.url)
        monkeypatch.setenv("CAPTION_API_KEY", options.pop("key", KEY))
        known = {"model": "under-test", "frames": 2, "concurrency": 4, "backoff_s": 0.01, "deadline_s": 0.5}
        config = {"seed": 0, "root": tmp_path, "answers": tmp_path / "answers", "options": {**known, **options}}
        captioner = load_captioner("openai", config)
        run.captioner = captioner

        def judge(request, text):
            told = captioner.instructions if instructions is None else instructions
            return find_fault(request, text, len(text), told, checks)  # characters stand for tokens

        conversations = Conversations(judge, attempts)
        run.conversations = conversations
        requests = [
            CaptionRequest(f"c{i}", f"{i:064x}", partial(open_clip, i, opened), prompt, bounds)
            for i, prompt in enumerate(prompts[:count])
        ]
        captioner.caption(requests, conversations.follow_up)
        return conversations.outcomes

    run.opened, run.journal = opened, tmp_path / "answers" / "openai.sqlite"
    return run
