"""What many tests share: a random tiny Wan, a pipeline that DVC has run, and a server that speaks KFP's API."""

import atexit
import fcntl
import gc
import json
import os
import random
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

# Before torch is imported, and for every process that a test starts: on models this small a second thread costs more
# than it brings, and next to another busy process many times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Processes that a test starts keep what they compile, as on a user's machine, also where the shell says otherwise.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts background jobs with SIGINT ignored, and every process that a test interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from components.bench.orchestrators import call, copy_repository
from components.cli.messages import QUIET, VERBOSE
from hub_server import Hub
from local_server import LocalServer, serving


def pytest_configure():
    """Keep rewritten tests, too: rewriting their assertions takes each process of pytest about five seconds.

    Collect garbage as rarely as `univigu` does: over all that is imported, it takes a sixth of the time.
    """
    sys.dont_write_bytecode = False
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def pytest_collection_modifyitems(items):
    """Run the files with slow tests first, so that two processes that share the files finish at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Seed before a test and its fixtures, so that no random number depends on the tests before; imports nothing."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory):
    """A random Wan text-to-video pipeline for clips of 9 frames of 32x32: latents (4, 3, 8, 8), 48 video tokens.

    Its tokenizer is the embedded world's own.
    """
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from components.digits.tokenizer import build_tokenizer, corpus

    folder = tmp_path_factory.mktemp("base") / "tiny-wan"
    tokenizer = build_tokenizer(corpus(300, seed=0), 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(tokenizer),
                    d_model=32,
                    d_kv=16,
                    d_ff=64,
                    num_layers=1,
                    num_heads=2,
                    dropout_rate=0.0,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            ).eval(),
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                attn_scales=[],
                temperal_downsample=[True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[0.5, 1.0, 1.5, 2.0],
                scale_factor_spatial=4,
                scale_factor_temporal=4,
            ).eval(),
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=32,
                freq_dim=32,
                ffn_dim=48,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=128,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaking_model(tiny_wan_folder, tmp_path_factory):
    """The folder of an untrained Uni-ViGU whose text head is random, so that every input has an effect on its text."""
    import torch

    from univigu import UniViGUPipeline

    folder = tmp_path_factory.mktemp("uni-vigu") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = UniViGUPipeline.from_wan(
            tiny_wan_folder,
            num_frames=9,
            height=32,
            width=32,
            fps=8,
            max_sequence_length=32,
            num_inference_steps=3,
            caption_steps=3,
            guidance_scale=2.0,
            text_length=48,
            text_latent_dim=16,
        )
        torch.nn.init.normal_(pipeline.transformer.text_head.proj_out.weight, std=0.3)
    pipeline.save_pretrained(folder)
    return folder


class Reproduced(NamedTuple):
    """A copy of the working tree in which `dvc repro` has run: since which Unix time, and how long it took."""

    root: Path
    started: float
    seconds: float


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory, worker_id):
    """A copy of the working tree on the profile `smoke`, after `dvc repro`; tests may add to it, and change nothing.

    The processes of one run of pytest share it.
    """
    base = tmp_path_factory.getbasetemp()
    home = (base if worker_id == "master" else base.parent) / "way"
    root, times = home / "uni-vigu", home / "times.json"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not times.exists():
            copy_repository(root, "smoke")
            started = time.time()
            call([sys.executable, "-m", "dvc", "repro"], root)
            times.write_text(json.dumps({"started": started, "seconds": time.time() - started}))
    return Reproduced(root, **json.loads(times.read_text()))


@pytest.fixture(autouse=True)
def own_environment():
    """Variables that MLflow or a command sets would be taken for the user's choice by whatever comes next."""
    names = [*(f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD")), QUIET, VERBOSE]
    for name in names:
        os.environ.pop(name, None)
    yield
    for name in names:  # a monkeypatch puts back what it found, and these were made meanwhile
        os.environ.pop(name, None)


CREATED = "2026-01-01T00:00:00Z"


class FakeKfp(LocalServer):
    """Experiments and runs in memory; a run goes through `states`, one further each time it is looked at."""

    page_size = 3  # however many are asked for

    def __init__(self):
        super().__init__(KfpHandler)
        self.experiments, self.runs, self.tokens, self.failures = {}, {}, [], []
        self.states, self.version = ["PENDING", "RUNNING", "SUCCEEDED"], "2.17.0"
        self.task_details, self.logs, self.lose_answers, self.page = [], {}, 0, b""
        self.meet = {}  # by path, a barrier at which the first who ask for a list wait for one another
        self.turn = threading.Lock()


class KfpHandler(BaseHTTPRequestHandler):
    def answer(self, status, value):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, bytes) else "application/json")
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message):
        self.answer(status, {"error": message, "code": 5, "message": message, "details": []})

    def list(self, kind, scope):
        """A page of those that the query's filter names, within its `scope`, the newest first."""
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        wanted = {each["key"]: each["stringValue"] for each in json.loads(query["filter"])["predicates"]}
        wanted[scope] = query.get(scope)
        found = [
            each
            for each in reversed(getattr(self.server, kind).values())
            if all(each.get(key) == value for key, value in wanted.items())
        ]
        start = int(query.get("page_token", 0))
        end = start + self.server.page_size
        return {kind: found[start:end]} | ({"next_page_token": str(end)} if end < len(found) else {})

    def handle_request(self, method):
        server, path = self.server, urlsplit(self.path).path
        server.tokens.append(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if server.failures:
            return self.refuse(server.failures.pop(0), "upstream connect error")
        if server.page:
            return self.answer(200, server.page)
        if path == "/apis/v2beta1/healthz":
            about = {"commit_sha": "unknown", "tag_name": server.version, "multi_user": False}
            return self.answer(200, about | {"pipeline_store": "database"})
        if method == "GET" and (barrier := server.meet.get(path)):
            barrier.wait(timeout=10)
            server.meet.pop(path, None)
        with server.turn:
            return self.handle_in_turn(server, method, path, body)

    def handle_in_turn(self, server, method, path, body):
        if path == "/apis/v2beta1/experiments" and method == "GET":
            return self.answer(200, self.list("experiments", "namespace"))
        if path == "/apis/v2beta1/experiments":
            named = [(each["display_name"], each.get("namespace")) for each in server.experiments.values()]
            if (body["display_name"], body.get("namespace")) in named:
                return self.refuse(409, "Already exist error: an experiment of this name")
            made = {**body, "experiment_id": f"experiment-{len(server.experiments) + 1}", "created_at": CREATED}
            server.experiments[made["experiment_id"]] = made
            return self.answer(200, made)
        if path == "/apis/v2beta1/runs" and method == "GET":
            found = self.list("runs", "experiment_id")
            return self.answer(200, found | {"runs": [self.shown(run) for run in found.get("runs", [])]})
        if path == "/apis/v2beta1/runs":
            made = {**body, "run_id": f"run-{len(server.runs) + 1}", "created_at": CREATED}
            made |= {"looks": 0, "state": server.states[0]}
            server.runs[made["run_id"]] = made
            if server.lose_answers:
                server.lose_answers -= 1
                return self.close_without_answer()
            return self.answer(200, self.shown(made))
        if match := re.fullmatch(r"/apis/v2beta1/runs/([^/:]+)(:terminate)?", path):
            run = server.runs.get(match[1])
            if run is None:
                return self.refuse(404, f"Run {match[1]} not found")
            if match[2]:
                run["state"] = "CANCELING"
                return self.answer(200, {})
            self.move_on(run)
            return self.answer(200, self.shown(run))
        if match := re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path):
            text = server.logs.get(match[2])
            return self.answer(200, text.encode()) if text else self.refuse(404, "log not found")
        return self.refuse(404, "no such path")

    def close_without_answer(self):
        self.close_connection = True
        self.connection.close()

    def move_on(self, run):
        if run["state"] == "CANCELING":
            run["state"] = "CANCELED"
        elif run["state"] not in ("SUCCEEDED", "FAILED", "CANCELED"):
            run["state"] = self.server.states[min(run["looks"], len(self.server.states) - 1)]
            run["looks"] += 1

    def shown(self, run):
        shown = {key: value for key, value in run.items() if key not in ("looks", "pipeline_spec")}
        if run["state"] == "FAILED":
            shown["error"] = {"code": 13, "message": "main: Error (exit code 80)"}
        return {**shown, "run_details": {"task_details": self.server.task_details}}

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def log_message(self, *_):
        pass


@pytest.fixture
def kfp(monkeypatch):
    """A server that speaks KFP's v2beta1 API for experiments and runs; no cluster is behind it."""
    for name in ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DELAY_S", "SETTLE_S"):  # of a server on this machine, whose clock is ours
        monkeypatch.setattr(f"components.orchestration.kfp_server.{name}", 0.01)
    with serving(FakeKfp()) as server:
        yield server


@pytest.fixture(scope="module")
def lasting_kfp():
    """The same for all tests of a module."""
    with serving(FakeKfp()) as server:
        yield server


@pytest.fixture
def hub():
    """A hub of one repository in memory (see `hub_server`)."""
    with serving(Hub()) as server:
        yield server
