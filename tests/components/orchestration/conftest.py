"""A fake Kubernetes API server."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

JOB = "train-stage-1-0123456789"  # what most tests call the TrainJob
LONG_AGO = "2026-01-01T00:00:00Z"


class Kubernetes(ThreadingHTTPServer):
    """The API server's paths that a launcher uses, with its status codes and error bodies.

    `looks` are functions, one of which is called before each GET of the TrainJob: how the cluster moves on.
    """

    daemon_threads = True
    job_name = JOB

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

    def condition(self, kind, message="said the controller", name=JOB):
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
        name=JOB,
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
        lines = self.logs.setdefault(f"{JOB}-node-0-{index}", [])
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
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

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
