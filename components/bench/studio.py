"""How long `univigu studio` lets a person wait, on a work root with many clips; and what its previews cost.

The command is started in a process of its own and asked over HTTP, as a browser does, without the time in which a
browser draws. The work root has registered versions, a training run with curves, and clips, of which some were
rejected; all clips share three small videos. ``seconds``:

- ``start``: from the start of the process to the first page
- ``first_clips``: the page of data and its first clips, when nothing of the work root has been read yet
- ``filters``: the first clips again, with a verdict and a stage, a text, or bounds of a score

``previews`` has the share of a step that its preview takes, with the bundled model, alone: a video, and text and video
together. `ratio` is the largest of all these figures over its `TARGETS`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from univigu.errors import UniViGUError

CLIPS = 10_000
TARGETS = {"start": 5.0, "first_clips": 1.0, "filter": 0.3, "preview": 0.05}  # seconds; the preview is a share
REPO = Path(__file__).resolve().parents[2]
VERSIONS, POINTS = 5, 500
ASKED = ["", 0, "", "", "", "", 1]  # verdict, stage, text, score, its bounds, page
FILTERS = {
    "verdict": ["kept", 2, "", "", "", "", 1],
    "text": ["", 0, "shade 5", "", "", "", 1],
    "score": ["", 0, "", "motion", "1", "3", 1],
}
PREVIEWS = "components.cli.studio.previews"  # a program; the command isn't imported from here


def measure(clips: int = CLIPS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        write_root(root, clips)
        seconds, shown = _ask(root)
    previews = json.loads(_run([PREVIEWS]))
    slowest, costliest = max(seconds["filters"].values()), max(one["share"] for one in previews.values())
    figures = {**seconds, "filter": slowest, "preview": costliest}
    return {
        "ratio": round(max(figures[name] / target for name, target in TARGETS.items()), 3),
        "targets": TARGETS,
        "clips": {"of": clips, "found": shown},
        "seconds": seconds,
        "previews": previews,
    }


def _ask(root: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The seconds, and how many clips each filter found."""
    from gradio_client import Client

    began = time.perf_counter()
    with start_studio(root) as url:
        _fetch(url)
        start = time.perf_counter() - began
        client = Client(url, verbose=False, analytics_enabled=False)
        began = time.perf_counter()
        _fetch(f"{url}/data")
        pages = {"none": client.predict(*ASKED, api_name="/clips")[3]}
        first, filters = time.perf_counter() - began, {}
        for name, asked in FILTERS.items():
            began = time.perf_counter()
            pages[name] = client.predict(*asked, api_name="/clips")[3]
            filters[name] = round(time.perf_counter() - began, 3)
    found = {name: _read_count(page) for name, page in pages.items()}
    return {"start": round(start, 2), "first_clips": round(first, 3), "filters": filters}, found


@contextmanager
def start_studio(root: Path) -> Iterator[str]:
    """`univigu studio` on a work root, at the address that this yields."""
    command = [sys.executable, "-m", "components.cli.main", "studio", "--root", str(root), "--port", "0"]
    log = root / "studio.log"
    with (
        log.open("w") as said,
        subprocess.Popen(command, cwd=REPO, env=_environment(), stdout=subprocess.PIPE, stderr=said, text=True) as run,
    ):
        try:
            url = (run.stdout.readline() if run.stdout else "").strip().rstrip("/")
            if not url.startswith("http://"):
                raise UniViGUError(f"The studio did not start: {log.read_text()[-500:]}")
            yield url
        finally:
            run.terminate()


def _environment() -> dict[str, str]:
    """The environment without settings of this shell that lead the studio to another MLflow or token."""
    path = os.pathsep.join([str(REPO), str(REPO / "model"), os.environ.get("PYTHONPATH", "")])
    others = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "UNIVIGU_"))}
    return {**others, "PYTHONPATH": path}


def _run(module: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *module], cwd=REPO, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UniViGUError(f"'{module[0]}' ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()[-1]


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def _read_count(page: str) -> int:
    """The number of clips that a page says it found; raises `UniViGUError` if it shows none."""
    said = page.partition(" of ")[2].partition(",")[0]
    if not said.isdecimal():
        raise UniViGUError(f"The studio showed no clips: {page[:300]}")
    return int(said)


# --- the work root ---------------------------------------------------------------------------------------------------


def write_root(root: Path, clips: int) -> None:
    """A work root with so many clips, registered versions and a training run."""
    from components.clips.archive import write_tar
    from univigu.video import encode_mp4

    frames = np.full((3, 9, 32, 32, 3), 40, np.uint8)
    for number, video in enumerate(frames):
        for at, frame in enumerate(video):
            frame[8:16, 2 * at : 2 * at + 8] = 100 + 50 * number
    members = {f"{number}.mp4": encode_mp4(video, 8) for number, video in enumerate(frames)}
    home = root / find_stage("synthesize-videos").home
    (home / "shards/00000").mkdir(parents=True)
    write_tar(home / "shards/00000/clips.tar", members)
    rows = [_clip(number, members) for number in range(clips)]
    write_table(home, "clips", rows)
    _write_captions(root, rows)
    _write_registry(root)


def _clip(number: int, members: dict[str, bytes]) -> dict[str, Any]:
    member = f"{number % 3}.mp4"
    made = {"generator": "square", "generator_digest": "0", "frames": 9, "height": 32, "width": 32, "fps": 8.0}
    return {
        "id": f"c{number:06d}",
        "prompt_id": f"p{number}",
        "prompt": f"a square of shade {number}",
        "stage": 1 + number % 2,
        "seed": number,
        "sha256": hashlib.sha256(members[member]).hexdigest(),
        "scores": json.dumps({"motion": number % 5 + 0.5, "contrast": number % 7}),
        "shard": "shards/00000/clips.tar",
        "member": member,
        **made,
    }


def _write_captions(root: Path, clips: list[dict[str, Any]]) -> None:
    """Captions of the clips of stage 2, of which every fifth was rejected."""
    home = root / find_stage("caption-videos").home
    home.mkdir(parents=True)
    second = [row for row in clips if row["stage"] == 2]
    captions = [{"clip_id": row["id"], "text": f"A square moves, {row['id']}.", "status": "success"} for row in second]
    more = {"n_tokens": 12, "attempts": 1, "captioner": "square", "captioner_digest": "0", "template_version": "1"}
    write_table(home, "captions", ({**row, **more} for at, row in enumerate(captions) if at % 5))
    rejected = ((row["id"], json.dumps({**row, "caption": "so"})) for row in second[::5])
    why = {"reason": "too_long", "detail": "it has 50 tokens"}
    write_table(home, "rejected", ({"id": clip_id, "row": row, **why} for clip_id, row in rejected))


def _write_registry(root: Path) -> None:
    """Versions of the model `uni-vigu`, the last one champion, and a training run with a curve."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.create_experiment("uni-vigu", artifact_location=(root / "mlruns").as_uri())
    run = client.create_run(experiment, run_name="train-stage-1").info.run_id
    client.log_batch(run, [Metric("loss", 2.0 / (step + 1), 0, step) for step in range(POINTS)])
    client.set_terminated(run)
    client.create_registered_model("uni-vigu")
    for version in range(1, VERSIONS + 1):
        client.create_model_version("uni-vigu", (root / "mlruns").as_uri(), run)
        client.set_registered_model_alias("uni-vigu", "champion", str(version))
