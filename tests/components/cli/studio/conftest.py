"""A work root with something for every page of the studio, and the real server on it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from components.clips.archive import write_tar
from components.prompts.tokens import load_tokenizer
from components.tracking import tracking_uri
from components.training.tracked_run import start_run
from good_rows import COUNT, make_rows
from univigu import registry
from univigu.video import encode_mp4

REPO = Path(__file__).parents[4]
NASTY = (
    "<img src=x onerror=alert(1)> {{7}} ${7} \u202egnorw"  # HTML, two kinds of templates, and a right-to-left override
)


def moving_square(shade):
    """Frames uint8 (9, 32, 32, 3)."""
    frames = np.full((9, 32, 32, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 2 * number : 2 * number + 8] = shade
    return frames


def leave_clips(root, commit, count=30):
    """Outputs of the steps of clips: three videos for all of them, and every tenth rejected by the captioner."""
    members = {f"{number}.mp4": encode_mp4(moving_square(100 + 50 * number), 8) for number in range(3)}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    made = {"frames": 9, "height": 32, "width": 32, "fps": 8.0, "generator": "square", "generator_digest": "0"}
    rows = [
        {
            "id": f"c{number:05d}",
            "prompt_id": f"p{number}",
            "prompt": f"a square of shade {number}" if number else NASTY,
            "stage": 1 + number % 2,
            "seed": number,
            "sha256": digests[f"{number % 3}.mp4"],
            "scores": json.dumps({"motion": 3.5}),
            "shard": "shards/00000/clips.tar",
            "member": f"{number % 3}.mp4",
        }
        | made
        for number in range(count)
    ]

    def write_shard(home):
        (home / "shards/00000").mkdir(parents=True)
        write_tar(home / "shards/00000/clips.tar", members)

    gone = {"prompt": "a square that stands still", "stage": 2, "scores": {"motion": 0.0}}
    frozen = {"id": "frozen", "reason": "frozen", "detail": "nothing moves", "row": json.dumps(gone)}
    commit(root, "synthesize-videos", {"clips": rows, "rejected": [frozen]}, write_shard)
    too_long = [row for row in rows if row["stage"] == 2 and int(row["id"][1:]) % 10 == 1]
    captions = [
        {"clip_id": row["id"], "text": f"A Square moves, {row['id']}.", "status": "success", "attempts": 1}
        for row in rows
        if row["stage"] == 2 and row not in too_long
    ]
    rejected = [
        {
            "id": row["id"],
            "reason": "too_long",
            "detail": "it has 50 tokens",
            "row": json.dumps({**row, "caption": "so"}),
        }
        for row in too_long
    ]
    commit(root, "caption-videos", {"captions": captions, "rejected": rejected})


def leave_run(root):
    """A finished training run in MLflow, with curves and samples, and its note; returns its id."""
    parameters = {"train_stage_1": {"steps": 6, "checkpoint_every": 3, "batch_size": 2}}
    with start_run(root, "train-stage-1", parameters=parameters, tags={}, datasets={}) as run:
        for step in range(1, 7):
            run.log(step, {"loss": 2.0 / step, "samples_per_second": 4.0, "heldout_text_ce": 3.0 / step})
        row = {"step": 6, "sample": "s0", "prompt": NASTY, "target": "a square", "said": "a circle"}
        run._logged = 5  # the samples of step 6 are new
        run.log_samples(6, [row], {"s0": moving_square(200)}, 8)
    (root / ".univigu/scratch/train-stage-1").mkdir(parents=True)
    losses = [f"6,{0.1 * number + 0.05:.2f},{2 / (number + 1):.3f},0.5" for number in range(10)]
    (root / ".univigu/scratch/train-stage-1/heldout.csv").write_text(
        "\n".join(["step,tau,text_ce,video_mse", *losses, ""])
    )
    return run.run_id


class StudioServer:
    """`univigu studio` in a process of its own, at `url`."""

    def __init__(self, root, *options, **env):
        command = [sys.executable, "-m", "components.cli.main", "studio", "--root", str(root), "--port", "0", *options]
        self.errors = (root / "studio.log").open("w+")
        self.process = subprocess.Popen(
            command, cwd=REPO, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url.startswith("http://"), (root / "studio.log").read_text()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def full_root(versions, recommit):
    """The work root of `versions`, with clips, a training run and two versions of the model `seen`."""
    leave_clips(versions.root, recommit)
    leave_run(versions.root)
    for right in (10, 30):
        versions.add("seen", right)
    return versions.root


@pytest.fixture(scope="module")
def editable_root(full_root, versions, recommit, tmp_path_factory):
    """A work root in which validate-pairs can run, two versions of `pairs` can make videos, and version 1 is champion.

    Its registry is a copy; `c900` has the bytes of another clip, `c005` is a near-duplicate of `c004` that a check only
    scored, and the caption of `c003` was not made.
    """
    root = tmp_path_factory.mktemp("editable")
    shutil.copytree(REPO / "model/tiny-wan/tokenizer", root / "model/tiny-wan/tokenizer")
    members = {f"{number}.mp4": encode_mp4(moving_square(100 + 3 * number), 8) for number in range(COUNT)}
    # captions here are worded in every way of the world
    (root / "profile.yaml").write_text("extends: smoke\ntext: {caption_tokens: [32, 64]}\n")
    rows = make_rows(load_tokenizer(root / "model/tiny-wan"))
    for number, row in enumerate(rows["clips"]):
        row["sha256"] = hashlib.sha256(members[row["member"]]).hexdigest()
        row["scores"] = json.dumps({"motion": number + 0.5})
    alike = {"motion": 5.5, "picture_distance": 0.02, "duplicate_of": "c004"}
    rows["clips"][5]["scores"] = json.dumps(alike)
    rows["captions"][3] |= {"text": None, "n_tokens": 0, "status": "error"}
    copy = rows["clips"][0] | {"id": "c900", "seed": 900}

    def write_shard(home):
        (home / "shards/00000").mkdir(parents=True)
        write_tar(home / "shards/00000/clips.tar", members)

    same = {"id": "c900", "reason": "same_video", "detail": "its sha256 is another's", "row": json.dumps(copy)}
    failed = {"id": "c003", "reason": "empty", "detail": "it was empty", "row": "{}"}
    recommit(root, "synthesize-videos", {"clips": [*rows["clips"], copy]}, write_shard)
    recommit(root, "validate-clips", {"clips": rows["clips"], "rejected": [same]})
    recommit(root, "caption-videos", {"captions": rows["captions"], "rejected": [failed]})
    for right in (10, 30):
        versions.add("pairs", right, pipeline=REPO / "model/tiny-univigu")
    shutil.copy(full_root / "mlflow.db", root)
    shutil.copytree(full_root / ".univigu", root / ".univigu")  # the note of the training run
    registry.set_alias("pairs", "champion", 1, tracking_uri(root))
    return root


@pytest.fixture(scope="module")
def studio_server(full_root):
    server = StudioServer(full_root)
    yield server
    server.stop()


@pytest.fixture(scope="session", name="StudioServer")
def studio_server_class():
    return StudioServer


@pytest.fixture(scope="session", name="leave_clips")
def leave_clips_fixture():
    return leave_clips


@pytest.fixture(scope="session", name="moving_square")
def moving_square_fixture():
    return moving_square
