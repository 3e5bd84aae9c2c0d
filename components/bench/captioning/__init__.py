"""Captioning of 1,000 clips by a misbehaving service: the step is killed halfway, and resumed.

`ratio` is the number of requests that the service received over the minimum of a perfect client, which the service
knows. Probes, requests in flight at the kill, and requests beyond the rate limit exceed that minimum. `asked_twice`
counts the requests that came again although their answer was on disk at the kill.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.bench.captioning.server import MisbehavingServer
from components.bench.captioning.troubles import draw_troubles, least_requests
from components.captions.captioners.client.journal import Journal
from components.pipeline.state import STATE
from univigu.errors import UniViGUError

CLIPS = 1000
SEED = 0
RATE = 100.0  # requests per second that the service accepts
STEP = "caption-videos"
KEY = "sk-bench-0123456789"
OPTIONS = {
    "model": "under-test",
    "frames": 2,
    "max_side": 32,
    "request": {"temperature": 0, "max_tokens": 64, "seed": SEED},
    "concurrency": 16,
    "tries": 6,
    "backoff_s": 0.1,
    "deadline_s": 1,
    "prices": {"prompt": 1.0, "completion": 4.0},
}


def measure() -> dict[str, Any]:
    """Run the step in a separate process, kill it halfway, run it again, and compare the results."""
    from components.bench.captioning.clips import make_root, profile, write_caption
    from components.pipeline.tables import read_table

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        settings = profile(OPTIONS)
        prompts = make_root(root, settings, CLIPS, SEED)
        attempts = settings["caption_videos"]["attempts"]
        troubles = {prompt: draw_troubles(SEED, prompt) for prompt in prompts.values()}
        least = {clip: least_requests(troubles[prompt], OPTIONS["tries"], attempts) for clip, prompt in prompts.items()}
        minimum = sum(requests for requests, _ in least.values())
        server = MisbehavingServer(write_caption, troubles.__getitem__, RATE, hang_s=5.0, key=KEY)
        started = time.monotonic()
        killed = start(root, server.url)
        while len(server.requests) < minimum / 2 and killed.poll() is None:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        if killed.returncode != -signal.SIGKILL:
            raise UniViGUError(f"The captioning step ended with {killed.returncode} before it could be killed.")
        journal = Journal(root / STATE / "answers" / STEP / "openai.sqlite")
        kept, before = set(journal.keys()), len(server.requests)
        journal.close()
        resumed = start(root, server.url)
        if resumed.wait() != 0:
            raise UniViGUError(f"The captioning step ended with {resumed.returncode} when it was resumed.")
        seconds = time.monotonic() - started
        server.close()
        again = {name for name, _ in server.requests[before:]}
        statuses = {row["clip_id"]: row["status"] for row in read_table(root / "data/captions", "captions").to_pylist()}
        record = json.loads((root / STATE / "runs" / f"{STEP}.json").read_text(encoding="utf-8"))
        requests = len(server.requests)
        return {
            "ratio": round(requests / minimum, 4),
            "clips": CLIPS,
            "requests": requests,
            "minimum": minimum,
            "over_the_minimum": over_the_minimum(server.requests, before, kept),
            "asked_twice": len(kept & again),
            "statuses": dict(sorted(Counter(statuses.values()).items())),
            "other_status_than_due": sum(statuses.get(clip) != due for clip, (_, due) in least.items()),
            "troubles": dict(sorted(Counter(befell for _, befell in server.requests if befell).items())),
            "seconds": round(seconds, 1),
            "least_seconds_at_the_rate_limit": round(minimum / RATE, 1),
            "peak_rss_mb": record["peak_rss_mb"],
        }


def start(root: Path, url: str) -> subprocess.Popen:
    """Start the step as a process in the work root that `make_root` filled."""
    command = [sys.executable, "-m", "components.cli.main", "run", STEP, "--profile", str(root / "profile.yaml")]
    environment = {**os.environ, "CAPTION_BASE_URL": url, "CAPTION_API_KEY": KEY}
    return subprocess.Popen([*command, "--root", str(root)], env=environment, stdout=subprocess.DEVNULL)


def over_the_minimum(requests: Sequence[tuple[str, str]], before: int, kept: set[str]) -> Mapping[str, int]:
    """The number of requests that a perfect client would not have sent, by reason."""
    under_way = {name for name, befell in requests[:before] if befell != "limited" and name not in kept}
    after = [name for name, befell in requests[before:] if befell != "limited"]
    return {
        "probes": sum(befell == "probe" for _, befell in requests),
        "turned away by the rate limit": sum(befell == "limited" for _, befell in requests),
        "begun before the kill and asked again": len(under_way & set(after)),
    }
