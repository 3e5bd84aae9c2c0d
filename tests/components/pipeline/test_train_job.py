"""TrainJobs through the real Kubernetes client, against a server that answers as the API server does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from components.pipeline import kfp_tasks
from components.pipeline.runner import STATE, verify
from components.pipeline.stages import find_stage
from components.pipeline.train_job import Settings, build, run_train_job, try_train_job
from components.pipeline.train_job_follower import follow
from univigu.errors import (
    BadInputError,
    ConfigError,
    MissingInputError,
    PreemptedError,
    TransientError,
    UniViGUError,
)

STAGE = find_stage("train-stage-1")
KEY = "0123456789abcdef"
NAME = "train-stage-1-0123456789"
QUICK = {"namespace": "team", "poll": 0.01, "api_timeout": 20.0, "grace": 5, "start_timeout": 30.0}
LONG_AGO = "2026-01-01T00:00:00Z"
MANIFEST = {"rows_in": 6, "rows_out": 6}


class Kubernetes(ThreadingHTTPServer):
    """The API server's paths that a launcher uses, with its status codes and error bodies.

    `looks` are functions, one of which is called before each GET of the TrainJob: how the cluster moves on.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.jobs, self.pods, self.logs, self.events, self.looks = {}, {}, {}, [], []
        self.requests = []
        self.failures = []  # (status, message) of the next answers, in place of the real ones
        self.installed = True
        self.created = lambda job: None
        self.deleted = lambda job: None

    @property
    def submissions(self):
        return sum(method == "POST" for method, _ in self.requests)

    def condition(self, kind, message="said the controller", name=NAME):
        found = self.jobs[name].setdefault("status", {}).setdefault("conditions", [])
        found[:] = [c for c in found if c["type"] != kind] + [
            {
                "type": kind,
                "status": "True",
                "reason": kind,
                "message": message,
                "lastTransitionTime": LONG_AGO,
            }
        ]

    def pod(
        self,
        index=0,
        phase="Running",
        exit_code=None,
        reason=None,
        waiting=None,
        unscheduled=None,
        disrupted=False,
        name=NAME,
    ):
        job, name = name, f"{name}-node-0-{index}"
        state = {"running": {"startedAt": LONG_AGO}}
        if exit_code is not None:
            state = {"terminated": {"exitCode": exit_code, "reason": reason or "Error"}}
        if waiting:
            state = {"waiting": dict(zip(("reason", "message"), waiting, strict=True))}
        conditions = [{"type": "PodScheduled", "status": "True"}]
        if unscheduled:
            conditions = [
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unscheduled}
            ]
        if disrupted:
            conditions += [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        container = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        status = {"phase": phase, "conditions": conditions}
        if not unscheduled:
            status["containerStatuses"] = [container]
        self.pods[name] = {
            "metadata": {
                "name": name,
                "uid": f"{name}-{self.submissions}",
                "labels": labels,
                "creationTimestamp": LONG_AGO,
            },
            "spec": {"containers": [{"name": "node", "image": "i"}]},
            "status": status,
        }
        return name

    def say(self, text, index=0):
        lines = self.logs.setdefault(f"{NAME}-node-0-{index}", [])
        for line in text.splitlines():
            lines.append(f"2026-01-01T00:00:00.{len(lines):09d}Z {line}\n")


class Requests(BaseHTTPRequestHandler):
    JOBS = re.compile(r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/team/trainjobs(?:/([^/]+))?$")
    POD_LOG = re.compile(r"/api/v1/namespaces/team/pods/([^/]+)/log$")

    def log_message(self, *_): ...

    def answer(self, value, status=200):
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, reason, message):
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
        self.answer({**body, "code": status}, status)

    def do_GET(self):
        self.handle_with(self.get)

    def do_POST(self):
        self.handle_with(self.post)

    def do_DELETE(self):
        self.handle_with(self.delete)

    def handle_with(self, method):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        if self.server.failures:
            status, message = self.server.failures.pop(0)
            return self.refuse(status, "Failed", message)
        return method(url.path, {k: v[0] for k, v in parse_qs(url.query).items()}, body)

    def missing(self, name):
        self.refuse(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')

    def get(self, path, query, _):
        server = self.server
        if found := self.JOBS.match(path):
            name = found[1]
            if name in server.jobs and server.looks:
                server.looks.pop(0)()
            job = server.jobs.get(name)
            if job is None:
                return self.missing(name)
            if "deletionTimestamp" in job["metadata"]:
                job["polls"] = job.get("polls", 0) + 1
                if job["polls"] > 2:  # pods take a while to go
                    del server.jobs[name]
            return self.answer({k: v for k, v in job.items() if k != "polls"})
        if found := self.POD_LOG.match(path):
            pod = server.pods.get(found[1])
            if pod is None:
                return self.refuse(404, "NotFound", f'pods "{found[1]}" not found')
            if "waiting" in pod["status"]["containerStatuses"][0]["state"]:
                return self.refuse(400, "BadRequest", 'container "node" is waiting to start: ContainerCreating')
            lines = server.logs.get(found[1], [])[-int(query.get("tailLines", 10**9)) :]
            if query.get("timestamps", "").lower() != "true":  # the client writes True, which Go takes too
                lines = [line.split(" ", 1)[1] for line in lines]
            return self.answer("".join(lines))
        if path == "/api/v1/namespaces/team/pods":
            label, _, wanted = query["labelSelector"].partition("=")
            pods = [pod for pod in server.pods.values() if pod["metadata"]["labels"][label] == wanted]
            return self.answer({"kind": "PodList", "apiVersion": "v1", "items": pods})
        if path == "/api/v1/namespaces/team/events":
            return self.answer({"kind": "EventList", "apiVersion": "v1", "items": server.events})
        return self.refuse(404, "NotFound", "the server could not find the requested resource")

    def post(self, path, query, job):
        if not self.JOBS.match(path) or not self.server.installed:
            return self.answer("404 page not found\n", 404)
        if TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job:
            return self.refuse(400, "BadRequest", "strict decoding error: unknown field")
        name = job["metadata"]["name"]
        if name in self.server.jobs:
            return self.refuse(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        if query.get("dryRun") == "All":
            return self.answer(job, 201)
        self.server.jobs[name] = job
        self.server.pods, self.server.logs = {}, {}
        self.server.created(job)
        return self.answer(job, 201)

    def delete(self, path, query, _):
        name = self.JOBS.match(path)[1]
        if name not in self.server.jobs:
            return self.missing(name)
        assert query.get("propagationPolicy") == "Foreground"
        job = self.server.jobs[name]
        job["metadata"]["deletionTimestamp"] = LONG_AGO
        self.server.deleted(job)
        return self.answer(job)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    server = Kubernetes()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def make_job(**settings):
    return build(STAGE, KEY, "tiny", Path("/work/run"), Settings(**settings))


def launch(output=lambda: MANIFEST, **settings):
    settings = Settings(**{**QUICK, **settings})
    return follow(build(STAGE, KEY, "tiny", Path("/work/run"), settings), settings, output)


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preempted_training_on_two_processes_ends_with_the_bits_of_an_undisturbed_one(
    cluster, latents_root, profile, tmp_path, monkeypatch, capfd
):
    """A pipeline's task, and a cluster that runs what its TrainJob asks for: two processes, which SIGTERM stops."""
    profile["train_stage_1"].update(steps=30, batch_size=4, checkpoint_every=1000, heldout_every=30)
    for root in (latents_root, shutil.copytree(latents_root, tmp_path / "undisturbed")):
        (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    torchrun = [sys.executable, "-m", "univigu.training.launch", "--standalone", "-m", "components.pipeline.cli"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{latents_root / 'mlflow.db'}"
    curves = latents_root / STATE / "scratch/train-stage-1/curves.csv"
    codes = []

    def run_pod(job):
        trainer = job["spec"]["trainer"]
        asked = {
            **environment,
            **{variable["name"]: variable["value"] for variable in trainer["env"]},
            "PET_NPROC_PER_NODE": str(2 * trainer["numProcPerNode"]),  # gloo has room for two on this node
        }
        with (latents_root / "pod.log").open("ab") as log:
            process = subprocess.Popen([*torchrun, *trainer["args"]], env=asked, stdout=log, stderr=log)
        cluster.pod(name=job["metadata"]["name"])
        threading.Thread(target=watch, args=(job["metadata"]["name"], process, not codes), daemon=True).start()

    def watch(name, process, preempt):
        while preempt and process.poll() is None:
            if curves.is_file() and len(curves.read_text().splitlines()) > 3:
                process.terminate()  # as a kubelet does with a pod
                break
            time.sleep(0.01)
        codes.append(process.wait())
        cluster.pods.clear()
        cluster.pod(phase="Failed" if codes[-1] else "Succeeded", exit_code=codes[-1], name=name)
        cluster.condition("Failed" if codes[-1] else "Complete", name=name)

    cluster.created = run_pod
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    monkeypatch.setenv("UNIVIGU_API_TIMEOUT", "60")
    task = ("train-stage-1", str(latents_root / "profile.yaml"), str(latents_root), "key")
    options = {"claim": "work", "mount-path": str(tmp_path), "gpus": "0", "nodes": "1", "queue": ""}
    digest = kfp_tasks.run_step(*task, kfp_tasks.declaration("train-stage-1"), trainjob=options)
    said = capfd.readouterr().out
    assert "preempted; submitting it again (1 of 20)" in said
    assert "train-stage-1 | train-stage-1: 6 rows in, 6 out, by a TrainJob\n" in said
    (job,) = cluster.jobs.values()
    ((node,),) = [
        patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"] for patch in job["spec"]["runtimePatches"]
    ]
    (mount,) = node["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == str(tmp_path)  # the volume lies where it lies for the pipeline, above the root
    assert codes == [81, 0], (latents_root / "pod.log").read_text()[-4000:]
    assert cluster.submissions >= 2
    log = (latents_root / "pod.log").read_text()
    assert len(re.findall(r"univigu: Training was told to stop and saved step \d+ of 30", log)) == 1
    assert re.search(r"Going on after step \d+ of 30", log)
    assert log.count("train-stage-1: 6 rows in") == 1
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    (run,) = mlflow.search_runs(experiment_names=["uni-vigu"], output_format="list")
    assert run.info.status == "FINISHED"

    root = tmp_path / "undisturbed"
    command = [*torchrun, "run", "train-stage-1", "--profile", str(root / "profile.yaml"), "--root", str(root)]
    undisturbed = {**environment, "PET_NPROC_PER_NODE": "2", "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    subprocess.run(command, env=undisturbed, check=True, capture_output=True)
    assert verify(root / "data/stage1", "train-stage-1")["digest"] == digest


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gpus": 0, "cpu": "2", "memory": "4Gi"},
        {
            "image": "registry.example/univigu@sha256:0",
            "claim": "work",
            "mount_path": Path("/work"),
            "nodes": 4,
            "queue": "gpus",
            "env": {"NCCL_DEBUG": "INFO"},
        },
    ],
)
def test_the_api_knows_every_field_of_a_train_job(settings):
    job = make_job(**settings)
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # the models drop what they don't know


def test_a_train_job_says_what_runs_where_and_on_which_volume():
    job = make_job(claim="work", mount_path=Path("/work"), nodes=2, gpus=4, queue="gpus", image="i", grace=120)
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert job["metadata"]["name"] == NAME
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": "univigu-torchrun",
    }
    assert trainer["args"] == ["run", "train-stage-1", "--profile", "tiny", "--root", "/work/run"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "i")
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "4"}
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
    assert pod["containers"] == [{"name": "node", "volumeMounts": [{"name": "work", "mountPath": "/work"}]}]


def test_without_gpus_a_node_has_one_process():
    trainer = make_job(gpus=0)["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 1
    assert "nvidia.com/gpu" not in trainer["resourcesPerNode"]["limits"]


def test_other_work_has_another_name():
    assert build(STAGE, "f" * 64, "tiny", Path("/work"), Settings())["metadata"]["name"] == "train-stage-1-ffffffffff"


def test_what_makes_no_sense_is_refused_before_a_cluster_is_asked(tmp_path):
    with pytest.raises(ConfigError, match="doesn't train"):
        run_train_job("encode-latents", "tiny", tmp_path, Settings())
    with pytest.raises(BadInputError, match="not on the volume"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings(mount_path=tmp_path / "elsewhere"))
    (tmp_path / "mine.yaml").write_text("seed: 0")
    with pytest.raises(BadInputError, match=r"mine.yaml is not on the volume"):
        run_train_job("train-stage-1", str(tmp_path / "mine.yaml"), tmp_path / "root", Settings())
    with pytest.raises(BadInputError, match="split evenly over 56 processes"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings(nodes=7))
    with pytest.raises(MissingInputError, match="univigu run encode-latents"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings())


def test_a_dry_run_has_the_job_checked_and_creates_nothing(cluster, tmp_path, capfd):
    settings = Settings(**QUICK)
    try_train_job("train-stage-1", "tiny", tmp_path, settings)
    assert (cluster.submissions, cluster.jobs) == (1, {})
    cluster.failures = [(403, "admission webhook denied the request: TrainingRuntime univigu-torchrun not found")]
    with pytest.raises(ConfigError, match="TrainingRuntime univigu-torchrun not found"):
        try_train_job("train-stage-1", "tiny", tmp_path, settings)


def test_a_pipelines_first_task_asks_the_cluster_for_both_stages(cluster, capfd, tmp_path):
    options = {"image": "i", "claim": "work", "mount-path": "/", "gpus": "8", "nodes": "1", "queue": ""}
    with pytest.raises(SystemExit) as stop:
        kfp_tasks._check_train_jobs("tiny", str(tmp_path), {**options, "nodes": "7"})
    assert stop.value.code == 65
    assert "split evenly over 56 processes" in kfp_tasks.last_failure(str(tmp_path))["message"]
    kfp_tasks._check_train_jobs("tiny", str(tmp_path), options)
    said = capfd.readouterr().out
    for stage in ("train-stage-1", "train-stage-2"):
        assert f"check-prerequisites | {stage}: the cluster would take this TrainJob" in said
    assert cluster.jobs == {}


# --- following -------------------------------------------------------------------------------------------------------


def test_a_job_is_followed_to_its_end_and_its_first_pods_log_is_passed_on_once(cluster, capsys):
    def start():
        cluster.pod(0)
        cluster.pod(1)
        cluster.say("step 1/2 loss 2.0")
        cluster.say("not for the reader", index=1)

    cluster.looks = [
        lambda: None,
        start,
        lambda: cluster.say("step 2/2 loss 1.0\x1b[31m"),
        lambda: cluster.condition("Complete"),
    ]
    assert launch(nodes=2) == MANIFEST
    said = capsys.readouterr()
    assert said.out == "step 1/2 loss 2.0\nstep 2/2 loss 1.0 [31m\n"
    assert f"TrainJob team/{NAME}: submitted, nodes: 2\n" in said.err
    assert "2 of 2 pods have started" in said.err
    assert cluster.submissions == 1
    assert NAME in cluster.jobs  # stays to be looked at


def test_what_is_under_way_is_followed_and_not_submitted_again(cluster, capsys):
    cluster.jobs[NAME] = make_job()
    cluster.looks = [lambda: cluster.pod(), lambda: cluster.condition("Complete")]
    assert launch() == MANIFEST
    assert "it was submitted before; following it" in capsys.readouterr().err
    assert len(cluster.jobs) == 1


def test_a_lost_answer_to_the_submission_submits_nothing_twice(cluster):
    cluster.failures = [(504, "Timeout: request did not complete within the allotted duration")]
    cluster.jobs[NAME] = make_job()  # the server had taken it before it fell silent
    cluster.looks = [lambda: cluster.condition("Complete")]
    assert launch() == MANIFEST
    assert [method for method, path in cluster.requests if "trainjobs" in path][:2] == ["POST", "POST"]


def test_a_finished_job_is_not_run_again_unless_its_output_is_gone(cluster):
    cluster.jobs[NAME] = make_job()
    cluster.condition("Complete")
    assert launch() == MANIFEST
    assert not [method for method, _ in cluster.requests if method == "DELETE"]

    there = []
    cluster.created = lambda job: (there.append(MANIFEST), cluster.condition("Complete"))
    assert launch(lambda: there[0] if there else None) == MANIFEST
    assert [method for method, _ in cluster.requests if method == "DELETE"] == ["DELETE"]


def test_a_completed_job_without_an_output_here_is_an_error(cluster):
    cluster.looks = [lambda: cluster.condition("Complete")]
    with pytest.raises(MissingInputError, match="--claim"):
        launch(lambda: None)


def test_a_preempted_job_is_submitted_again_and_goes_on(cluster, capsys):
    ends = [
        {"exit_code": 81},  # SIGTERM: saved, left
        {"exit_code": 137, "disrupted": True},  # the node went away under it
    ]

    def run_once(job):
        if not ends:
            return cluster.condition("Complete")
        cluster.pod(0, "Failed", **ends.pop(0))
        return cluster.condition("Failed", "jobset failed due to one or more job failures")

    cluster.created = run_once
    assert launch() == MANIFEST
    said = capsys.readouterr().err
    assert "preempted; submitting it again (1 of 20)" in said
    assert "preempted; submitting it again (2 of 20)" in said


@pytest.mark.parametrize("codes", [(81, 74), (74, 81)], ids=str)
def test_a_pod_that_failed_by_itself_outweighs_others_that_saved_and_left(cluster, codes):
    def fail(job):
        for index, code in enumerate(codes):
            cluster.pod(index, "Failed", exit_code=code)
        cluster.condition("Failed")

    cluster.created = fail
    with pytest.raises(UniViGUError, match="ended with exit code 74") as failed:
        launch(nodes=2)
    assert failed.value.exit_code == 74
    assert cluster.submissions == 1


def test_a_job_that_is_preempted_for_ever_is_given_up_and_can_be_resumed(cluster):
    def preempt(job):
        cluster.pod(0, "Failed", exit_code=81)
        cluster.condition("Failed")

    cluster.created = preempt
    with pytest.raises(PreemptedError, match=r"preempted 3 times.*run the same command") as stopped:
        launch(resumes=2)
    assert stopped.value.exit_code == 81


def test_a_failed_job_ends_with_the_pods_exit_code_and_last_words(cluster, capsys):
    def fail():
        cluster.pod(0, "Failed", exit_code=1)
        cluster.pod(1, "Failed", exit_code=74)
        cluster.say("Traceback: Connection closed by peer")
        cluster.say("step 3/9\nunivigu: The loss is nan at step 4; lower the learning rate.", index=1)
        cluster.condition("Failed")

    cluster.looks = [fail]
    with pytest.raises(UniViGUError, match=r"pod .*-0-1 ended with exit code 74, saying: The loss is nan") as failed:
        launch(nodes=2)
    assert failed.value.exit_code == 74
    assert f"{NAME}-node-0-1: step 3/9" in capsys.readouterr().err
    assert NAME in cluster.jobs


def test_a_failed_job_is_replaced_by_the_next_run(cluster):
    cluster.jobs[NAME] = make_job()
    cluster.condition("Failed")
    cluster.created = lambda job: cluster.condition("Complete")
    assert launch() == MANIFEST
    assert cluster.submissions == 2  # the first was told that there is one already, until that was gone
    assert "Failed" not in {c["type"] for c in cluster.jobs[NAME]["status"]["conditions"]}


def test_a_pod_out_of_memory_is_told_as_such(cluster):
    def fail():
        cluster.pod(0, "Failed", exit_code=137, reason="OOMKilled")
        cluster.condition("Failed")

    cluster.looks = [fail]
    with pytest.raises(UniViGUError, match=r"more memory than its 256Gi.*--memory"):
        launch()


def test_a_failure_without_pods_says_what_the_controller_says(cluster):
    cluster.looks = [lambda: cluster.condition("Failed", "TrainingRuntime univigu-torchrun not found")]
    with pytest.raises(UniViGUError, match="TrainingRuntime univigu-torchrun not found"):
        launch()


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        ({"unscheduled": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}, "3 Insufficient nvidia.com/gpu"),
        ({"waiting": ("ImagePullBackOff", 'Back-off pulling image "nowhere"')}, "ImagePullBackOff: Back-off pulling"),
        (None, "FailedCreate: pods is forbidden: violates PodSecurity"),
    ],
    ids=["no room", "no image", "no pod"],
)
def test_a_job_that_never_starts_is_deleted_with_what_kubernetes_says(cluster, pod, said):
    def stay_pending(job):
        if pod:
            cluster.pod(0, "Pending", **pod)
        else:
            cluster.events = [
                {
                    "metadata": {"name": "e"},
                    "involvedObject": {"kind": "Job", "name": f"{NAME}-node-0"},
                    "type": "Warning",
                    "reason": "FailedCreate",
                    "message": "pods is forbidden: violates PodSecurity",
                }
            ]

    cluster.created = stay_pending
    with pytest.raises(TransientError, match=re.escape(said)) as failed:
        launch(start_timeout=0.2)
    assert failed.value.exit_code == 75
    assert "deletionTimestamp" in cluster.jobs[NAME]["metadata"]


def test_a_job_of_which_only_some_nodes_start_does_not_hold_them_for_ever(cluster):
    def start_one(job):
        cluster.pod(0)
        cluster.pod(1, "Pending", unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")

    cluster.created = start_one
    with pytest.raises(TransientError, match=r"had 1 of 2 pods running for 0\.2 s .*Insufficient nvidia.com/gpu"):
        launch(start_timeout=0.2, nodes=2)
    assert "deletionTimestamp" in cluster.jobs[NAME]["metadata"]


def test_waiting_in_a_queue_is_not_taken_for_a_job_that_never_starts(cluster, capsys):
    def suspend(job):
        job["spec"]["suspend"] = True
        cluster.condition("Suspended")

    def admit():
        cluster.jobs[NAME]["spec"]["suspend"] = False
        cluster.jobs[NAME]["status"]["conditions"] = []
        cluster.pod()

    cluster.created = suspend
    cluster.looks = [*[lambda: time.sleep(0.05)] * 10, admit, lambda: cluster.condition("Complete")]
    assert launch(start_timeout=0.3, queue="gpus") == MANIFEST
    assert "waiting in its queue" in capsys.readouterr().err


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "^C"]
)
def test_a_launcher_that_is_told_to_stop_deletes_its_job(cluster, number, error):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [lambda: None, lambda: os.kill(os.getpid(), number)]
    before = signal.getsignal(number)
    with pytest.raises(error):
        launch()
    assert "deletionTimestamp" in cluster.jobs[NAME]["metadata"]
    assert signal.getsignal(number) == before


def test_a_job_deleted_by_someone_else_is_told_apart_from_a_failure(cluster):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [lambda: None, lambda: cluster.jobs.pop(NAME)]
    with pytest.raises(PreemptedError, match=r"deleted by someone else.*Run the same command to go on"):
        launch()
    assert cluster.submissions == 1


# --- the API server --------------------------------------------------------------------------------------------------


def test_an_api_server_that_is_away_for_a_while_is_asked_again(cluster, capsys):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [
        lambda: cluster.failures.extend([(503, "the server is currently unable to handle the request")] * 2),
        lambda: cluster.condition("Complete"),
    ]
    assert launch() == MANIFEST
    assert "currently unable to handle" in capsys.readouterr().err
    assert cluster.submissions == 1


def test_an_api_server_that_is_not_there_is_a_transient_error(cluster):
    cluster.shutdown()
    cluster.server_close()
    with pytest.raises(TransientError, match=r"http://127\.0\.0\.1:\d+ doesn't answer.*same command"):
        launch(api_timeout=0.6)


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        ((403, 'trainjobs is forbidden: User "u" cannot create resource'), ConfigError, "cannot create resource"),
        ((422, "spec.trainer.numNodes: Invalid value"), BadInputError, "numNodes: Invalid value"),
    ],
)
def test_a_refusal_is_told_with_the_servers_own_words(cluster, failure, error, said):
    cluster.failures = [failure]
    with pytest.raises(error, match=said):
        launch()


def test_a_cluster_without_kubeflow_trainer_is_told_as_such(cluster):
    cluster.installed = False
    with pytest.raises(ConfigError, match="install Kubeflow Trainer"):
        launch()


def test_without_a_cluster_the_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no cluster"):
        launch()
