"""Work roots for steps under test, with a tiny base and committed outputs of earlier steps; servers of MLflow's."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import engine
from components.clips.archive import write_tar
from components.digits import world
from components.evaluation.evaluate_model import summarise_rows
from components.pipeline import stages, syntax
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from components.tracking import open_tracking, tracking_uri
from local_server import Answering, LocalServer, serving
from univigu import registry
from univigu.mlflow_store import make_database
from univigu.training.data import write_empty_prompt, write_latents
from univigu.video import encode_mp4

CHECKOUT = Path(__file__).parents[2]


def commit(root, step, tables, write_more=lambda home: None):
    """Leave `tables` (name -> rows) as the finished output of `step`, as far as a later step looks at it."""
    home = root / find_stage(step).home
    home.mkdir(parents=True, exist_ok=True)
    write_more(home)
    for name, rows in tables.items():
        write_table(home, name, rows)
    files = describe_files(home)
    write_manifest(home, {"step": step, "digest": files_digest(files), "files": files})
    return home


@pytest.fixture(scope="session")
def recommit():
    """`commit`, for a test that changes what an earlier step left."""
    return commit


@pytest.fixture
def profile():
    return small_profile()


def small_profile():
    """The profile `smoke`, smaller still, and indifferent to how much is quarantined."""
    profile = load_profile("smoke")
    profile["text"]["caption_tokens"] = [32, 64]  # captions here are worded in every way of the world
    profile["synthesize_videos"].update(clips=10, shard_size=3, batch_size=2, steps=2)
    profile["synthesize_videos"]["checks"]["digits"]["mode"] = "off"
    profile["caption_videos"].update(shard_size=5, batch_size=3)
    profile["encode_latents"].update(shard_size=5, batch_size=3)
    for section in ("synthesize_videos", "caption_videos", "encode_latents"):
        profile[section]["max_rejected_share"] = 1.0
    return profile


@pytest.fixture
def write(tmp_path):
    """Write a profile beside the others of the test; returns its path as text."""

    def put(values, name="mine.yaml"):
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return put


@pytest.fixture(scope="session")
def new_root(tmp_path_factory, tiny_wan_folder):
    """Make a work root of some name, holding the base and 12 validated prompts."""

    def make(name):
        root = tmp_path_factory.mktemp(name)
        shutil.copytree(tiny_wan_folder, root / small_profile()["base"])
        rng = np.random.default_rng(0)
        prompts = [world.write_prompt(world.sample_attributes(rng), rng) for _ in range(12)]
        commit(root, "validate-prompts", {"prompts": [prompt_row(i, text) for i, text in enumerate(prompts)]})
        return root

    return make


def prompt_row(number, text):
    return {"id": f"p{number:02d}", "text": text, "source": "test", "licence": "CC0-1.0", "language": "en"}


@pytest.fixture(scope="session")
def finished_clips(new_root):
    """A work root with its clips made without interruption, and the manifest; copy it before changing it."""
    root = new_root("finished")
    return root, run_stage("synthesize-videos", small_profile(), root)


@pytest.fixture
def digits_root(tmp_path, tiny_wan_folder, profile):
    """A work root with 12 rendered clips, every third for stage 1, committed as if synthesised and validated.

    Returns (root, clip rows, attributes of each clip by id).
    """
    root = tmp_path / "digits"
    shutil.copytree(tiny_wan_folder, root / profile["base"])
    rng = np.random.default_rng(1)
    attributes = [world.sample_attributes(rng) for _ in range(12)]
    scans = world.draw_scans(attributes, world.train_scans(), seed=1)
    rows, tars = [], {"shards/00000/clips.tar": {}, "shards/00001/clips.tar": {}}
    for number, (one, frames) in enumerate(zip(attributes, world.render(attributes, scans, 1), strict=True)):
        content = encode_mp4(frames, world.FPS)
        row = {
            "id": f"c{number:02d}",
            "prompt_id": f"p{number:02d}",
            "prompt": world.write_prompt(one, rng),
            "stage": 1 if number % 3 == 0 else 2,
            "seed": number,
            "generator": "rendered",
            "generator_digest": "0",
            "sha256": hashlib.sha256(content).hexdigest(),
            "scores": "{}",
            "shard": list(tars)[number // 6],
            "member": f"c{number:02d}.mp4",
            "frames": world.FRAMES,
            "height": world.SIZE,
            "width": world.SIZE,
            "fps": world.FPS,
        }
        tars[row["shard"]][row["member"]] = content
        rows.append(row)

    def write_shards(home):
        for name, members in tars.items():
            (home / name).parent.mkdir(parents=True)
            write_tar(home / name, members)

    commit(root, "synthesize-videos", {"clips": rows}, write_shards)
    commit(root, "validate-clips", {"clips": rows})
    return root, rows, {row["id"]: one for row, one in zip(rows, attributes, strict=True)}


@pytest.fixture
def latents_root(tmp_path, tiny_wan_folder, profile, recommit):
    """A work root with the base and random latents: 8 samples of each stage, 2 of them held out."""
    root = tmp_path / "root"
    shutil.copytree(tiny_wan_folder, root / profile["base"])
    generator, length = torch.Generator().manual_seed(0), 64
    ids = torch.randint(4, 60, (16, length), generator=generator)
    ids[:, 40], ids[:, 41:] = 1, 0

    def write_shard(home):
        write_latents(
            home / "shards/00000/latents.safetensors",
            latents=torch.randn(16, 4, 3, 8, 8, generator=generator),
            prompt_embeds=[torch.randn(5, 32, generator=generator) for _ in range(16)],
            prompt_ids=ids,
            target_ids=ids,
        )
        write_empty_prompt(home, torch.randn(1, 32, generator=generator))

    rows = [
        {
            "id": f"s{row:02d}",
            "stage": 1 + row % 2,
            "split": "heldout" if row >= 12 else "train",
            **dict.fromkeys(("video_sha256", "vae_digest", "tokenizer_digest"), "0"),
            "frames": 9,
            "height": 32,
            "width": 32,
            "shard": "shards/00000/latents.safetensors",
            "row": row,
        }
        for row in range(16)
    ]
    recommit(root, "encode-latents", {"latents": rows}, write_shard)
    return root


class Versions:
    """Registered versions that carry an evaluation and no model, which is all that a promotion looks at."""

    def __init__(self, root):
        self.root = root

    def add(self, name, right, items=range(40), tags=None, pipeline=None):
        """A version of `name` that captions items 0 to `right` rightly, with a folder as its model; its number."""
        import mlflow

        with tempfile.TemporaryDirectory() as folder:
            rows = [
                {
                    "task": task,
                    "clip_id": f"heldout-{item:03d}",
                    "truth": "{}",
                    "correct": json.dumps({"colour": item < right, "digit": item < right // 2}),
                    "open_attributes": ["colour"] if task.startswith("joint") else [],
                }
                for task in ("captions", "generation", "joint", "joint_shuffled")
                for item in items
            ]
            write_table(Path(folder), "items", rows)
            (Path(folder) / "scores.json").write_text(json.dumps(summarise_rows(rows, seed=0)))
            with mlflow.start_run(experiment_id=open_tracking(self.root)) as run:
                mlflow.log_artifacts(folder, "model/artifacts/evaluation")
                if pipeline:
                    mlflow.log_artifacts(str(pipeline), "model/artifacts/pipeline")
        client = mlflow.MlflowClient()
        with contextlib.suppress(mlflow.exceptions.MlflowException):
            client.create_registered_model(name)
        version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id, tags or {})
        return int(version.version)

    def aliases(self, name):
        """Who is champion and who was before."""
        found = (registry.version_at(name, alias, tracking_uri(self.root)) for alias in ("champion", "previous"))
        return tuple(version and int(version.version) for version in found)


@pytest.fixture(scope="session")
def versions(tmp_path_factory):
    """A work root whose registry tests may fill with versions, each under a name of its own."""
    return Versions(tmp_path_factory.mktemp("versions"))


class MlflowServer:
    """A real MLflow server with a registry of its own, at `url`."""

    def __init__(self, folder, *arguments, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'store.db'}"]
        self.command += ["--artifacts-destination", str(folder), *arguments]
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        make_database(f"sqlite:///{folder / 'store.db'}")
        self.start()

    def start(self):
        """Start it, also again after `stop`, on the same store."""
        env = {**os.environ, **self.environment}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mlflow_server_with_accounts(tmp_path_factory):
    """Started as in the cluster's manifest: `admin` is its administrator, and `password` that account's password."""
    folder = tmp_path_factory.mktemp("server")
    settings = f"default_permission = READ\nauth_cache_ttl_seconds = 60\ndatabase_uri = sqlite:///{folder}/store.db\n"
    (folder / "auth.ini").write_text(f"[mlflow]\n{settings}")
    password = secrets.token_hex(24)
    server = MlflowServer(
        *[folder, "--app-name", "basic-auth"],
        MLFLOW_AUTH_CONFIG_PATH=str(folder / "auth.ini"),
        MLFLOW_AUTH_ADMIN_USERNAME="admin",
        MLFLOW_AUTH_ADMIN_PASSWORD=password,
        MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(32),
    )
    server.password = password
    yield server
    server.stop()


@pytest.fixture
def impatient(monkeypatch):
    """MLflow retries a failing server only once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


class Failing(Answering, BaseHTTPRequestHandler):
    def do_GET(self):
        self.handle_request()

    def do_POST(self):
        self.handle_request()

    def handle_request(self):
        self.server.answers -= 1
        self.answer(200 if self.server.answers >= 0 else 500, b"{}")


@pytest.fixture
def failing_after_one_answer():
    """An HTTP server that gives `answers` empty answers, and fails from then on."""
    with serving(LocalServer(Failing)) as server:
        server.answers = 1
        yield server


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of this project's packages that can be changed, in place of the real ones."""
    for package in ("components", "model/univigu"):
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    homes = {"components": tmp_path / "components/__init__.py", "univigu": tmp_path / "model/univigu/__init__.py"}
    monkeypatch.setattr(syntax, "_home", homes.get)
    return tmp_path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A work root whose table of steps is that of `engine`."""
    (tmp_path / "steps_under_test.py").write_text(engine.MODULE)
    (tmp_path / "numbers.json").write_text(json.dumps(list(range(12))))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(stages, "STAGES", (engine.FIRST, engine.SECOND, engine.BATCHES))
    yield tmp_path
    sys.modules.pop("steps_under_test", None)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tiny_wan_folder):
    """A random CLIP of a few thousand weights, with the tests' own tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("scorers") / "clip"
    tokenizer = AutoTokenizer.from_pretrained(tiny_wan_folder / "tokenizer", model_max_length=16)
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**part, **ids, "max_position_embeddings": 16, "bos_token_id": 0},
            vision_config={**part, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder
