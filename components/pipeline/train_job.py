"""Training on a pool of GPU nodes: `univigu train-job` has a step run as a Kubeflow TrainJob, and stays with it.

The TrainJob's name is derived from the step and from all that decides its output, so the same work is never submitted
twice: whoever comes second follows the first. Only the conditions Complete and Failed end it (a queued job may never
report that it runs). The work root is a volume that this process and the pods see under the same path; the pods run
`univigu run STEP` on it, and go on from the checkpoint that they find there.

=======================================  ============================================================================
what happens                             what becomes of it
=======================================  ============================================================================
pods end with 81, or a node goes away    submitted again, and goes on from its checkpoint; after `--resumes`: exit 81
pods end with another code               that code and their last words; the TrainJob stays to be looked at
no pod runs for `--start-timeout`        deleted, exit 75, with what Kubernetes says about it
the TrainJob is deleted from outside     exit 81: the pods were told to stop, so they saved
SIGTERM or Ctrl-C here                   deleted, exit 81 or 130: the same
the API server doesn't answer            asked again for `--api-timeout`, then exit 75; the TrainJob goes on
=======================================  ============================================================================
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from components.pipeline.stages import Stage, find_stage
from univigu.errors import (
    BadInputError,
    ConfigError,
    MissingInputError,
    PreemptedError,
    TransientError,
    UniViGUError,
)

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"  # what Kubeflow Trainer calls the job, and the container, in which training runs
JOB_LABEL, INDEX_LABEL = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
TRAINING_MODULE = "components.train_stage"
_WORTH_ANOTHER_TRY = {0, 408, 429, 500, 502, 503, 504}
_DISRUPTIONS = {"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"}  # why a pod was ended
_NOT_YET = {"ContainerCreating", "PodInitializing"}


@dataclass(frozen=True)
class Settings:
    """Where a TrainJob runs, and with how much; a profile says what it trains."""

    namespace: str | None = None  # None: that of the pod, or of the kubeconfig's context
    runtime: str = "univigu-torchrun"  # a TrainingRuntime of the namespace
    image: str | None = None  # None: the runtime's
    claim: str | None = None  # the PersistentVolumeClaim that holds the work root; None: the runtime mounts it
    mount_path: Path | None = None  # where that volume lies, here and in the pods; None: the root itself
    nodes: int = 1
    gpus: int | None = None  # of a node, one process each; None: what the step's table says; 0: one process on the CPU
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    queue: str | None = None  # Kueue's LocalQueue
    env: Mapping[str, str] = field(default_factory=dict)  # nothing secret: the runtime takes secrets by reference
    grace: int = 600  # seconds in which a pod that is told to stop may save
    resumes: int = 20
    start_timeout: float = 1800.0
    api_timeout: float = 300.0
    poll: float = 5.0


def train_job(
    step: Annotated[str, typer.Argument(help="A training step: train-stage-1 or train-stage-2.")],
    profile: Annotated[str, typer.Option(help="A bundled profile's name, or a YAML file on the volume.")] = "tiny",
    root: Annotated[Path, typer.Option(help="The work root, under the same path here and in the pods.")] = Path("."),
    namespace: Annotated[
        str | None, typer.Option(envvar="UNIVIGU_NAMESPACE", help="Where to run. (default: the present one)")
    ] = None,
    runtime: Annotated[
        str, typer.Option(envvar="UNIVIGU_RUNTIME", help="The TrainingRuntime that says how.")
    ] = Settings.runtime,
    image: Annotated[
        str | None, typer.Option(envvar="UNIVIGU_IMAGE", help="The pods' image. (default: the runtime's)")
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(envvar="UNIVIGU_CLAIM", help="The PersistentVolumeClaim that holds the work root."),
    ] = None,
    mount_path: Annotated[
        Path | None,
        typer.Option(envvar="UNIVIGU_MOUNT_PATH", help="Where that volume is mounted. (default: at the root)"),
    ] = None,
    nodes: Annotated[int, typer.Option(envvar="UNIVIGU_NODES", min=1, help="Nodes that train together.")] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(envvar="UNIVIGU_GPUS", min=0, help="GPUs of each node; 0 is one process on the CPU. (default: 8)"),
    ] = None,
    gpu_resource: Annotated[
        str, typer.Option(envvar="UNIVIGU_GPU_RESOURCE", help="What the cluster calls a GPU.")
    ] = Settings.gpu_resource,
    cpu: Annotated[str | None, typer.Option(envvar="UNIVIGU_CPU", help="CPUs of each node. (default: 32)")] = None,
    memory: Annotated[
        str | None, typer.Option(envvar="UNIVIGU_MEMORY", help="Memory of each node. (default: 256Gi)")
    ] = None,
    queue: Annotated[
        str | None, typer.Option(envvar="UNIVIGU_QUEUE", help="Kueue's LocalQueue, if the cluster has one.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the pods; may be given again. Nothing secret.")
    ] = None,
    grace: Annotated[
        int, typer.Option(envvar="UNIVIGU_GRACE", min=1, help="Seconds in which pods that must stop may save.")
    ] = Settings.grace,
    resumes: Annotated[int, typer.Option(min=0, help="How often a preempted job is submitted again.")] = (
        Settings.resumes
    ),
    start_timeout: Annotated[
        float,
        typer.Option(envvar="UNIVIGU_START_TIMEOUT", min=0, help="Seconds without a running pod, outside a queue."),
    ] = Settings.start_timeout,
    api_timeout: Annotated[
        float,
        typer.Option(envvar="UNIVIGU_API_TIMEOUT", min=0, help="Seconds for which the API server may be away."),
    ] = Settings.api_timeout,
) -> None:
    """Run a training step as a TrainJob on a cluster, and follow it to its end; Ctrl-C or SIGTERM deletes it.

    The same command goes on wherever the last one stopped, and nothing is ever submitted twice.
    """
    settings = Settings(
        namespace=namespace,
        runtime=runtime,
        image=image,
        claim=claim,
        mount_path=mount_path,
        nodes=nodes,
        gpus=gpus,
        gpu_resource=gpu_resource,
        cpu=cpu,
        memory=memory,
        queue=queue,
        env=_parse_env(env or []),
        grace=grace,
        resumes=resumes,
        start_timeout=start_timeout,
        api_timeout=api_timeout,
    )
    manifest = run_train_job(step, profile, root, settings)
    print(f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, by a TrainJob")


def add_to(app: typer.Typer) -> None:
    """Make `train_job` a command of `app`."""
    app.command("train-job")(train_job)


def run_train_job(name: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """Have the step `name` run as a TrainJob; returns the manifest of its output.

    Everything that can be checked is, before GPUs are asked for. Raises an error of `univigu.errors`, as the table at
    the head of this file says.
    """
    from components.pipeline.profiles import load_profile
    from components.pipeline.runner import prepare
    from univigu.training.engine import TrainingConfig, micro_batches

    stage, root = find_stage(name), root.resolve()
    if stage.module != TRAINING_MODULE:
        raise ConfigError(f"'{name}' doesn't train, so it needs no TrainJob; use `univigu run {name}`.")
    mount_path = (settings.mount_path or root).resolve()
    if not root.is_relative_to(mount_path):
        raise BadInputError(f"The work root {root} is not on the volume at {mount_path}; give another --mount-path.")
    if profile.endswith((".yaml", ".yml")):
        profile = str(Path(profile).resolve())
        if not Path(profile).is_relative_to(mount_path):
            raise BadInputError(f"The profile {profile} is not on the volume at {mount_path}; copy it there.")
    values = load_profile(profile)
    step = prepare(name, values, root)
    micro_batches(
        TrainingConfig.from_section(step[stage.parameters[-1]], step["seed"]),
        settings.nodes * _processes(stage, settings),
    )
    return follow(build(stage, step.key(), profile, root, settings), settings, lambda: _output_of(step))


def follow(job: dict[str, Any], settings: Settings, output: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """See a TrainJob through to its end, submitting it if it isn't there; returns what `output` then finds."""
    with _Cluster.connect(settings) as cluster:
        return _Follower(cluster, job, settings, output).run()


def build(stage: Stage, key: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """The TrainJob that runs a stage, as the API takes it; `key` is the digest of all that decides the output."""
    models = _import("kubeflow_trainer_api.models")
    gpus, mount_path = _gpus(stage, settings), str((settings.mount_path or root).resolve())
    resources = {"cpu": settings.cpu or stage.resources.cpu, "memory": settings.memory or stage.resources.memory}
    if gpus:
        resources[settings.gpu_resource] = str(gpus)
    trainer = {
        "args": ["run", stage.name, "--profile", profile, "--root", str(root)],
        "env": [{"name": k, "value": v} for k, v in sorted({"PYTHONUNBUFFERED": "1", **settings.env}.items())],
        "numNodes": settings.nodes,
        "numProcPerNode": _processes(stage, settings),
        "resourcesPerNode": {"limits": resources, "requests": resources},
    }
    if settings.image:
        trainer["image"] = settings.image
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": settings.grace}
    if settings.claim:
        pod["containers"] = [{"name": NODE, "volumeMounts": [{"name": "work", "mountPath": mount_path}]}]
        pod["volumes"] = [{"name": "work", "persistentVolumeClaim": {"claimName": settings.claim}}]
    labels = {
        "app.kubernetes.io/name": "univigu",
        "app.kubernetes.io/component": stage.name,
        "app.kubernetes.io/managed-by": "univigu",
    }
    if settings.queue:
        labels[QUEUE_LABEL] = settings.queue
    node = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": f"{stage.name}-{key[:10]}",
            "labels": labels,
            "annotations": {"univigu/run-key": key},
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": settings.runtime},
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "univigu/train-job",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
                }
            ],
        },
    }
    return models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()


def _gpus(stage: Stage, settings: Settings) -> int:
    return stage.resources.gpus if settings.gpus is None else settings.gpus


def _processes(stage: Stage, settings: Settings) -> int:
    """Of each node: one for each GPU, or one on the CPU."""
    return max(_gpus(stage, settings), 1)


def _parse_env(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[0].replace("_", "").isalnum() or "=" not in pair:
            raise ConfigError(f"'{pair}' is no environment variable; write --env NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs)


def _output_of(step: Any) -> dict[str, Any] | None:
    """The manifest of the step's output, if these inputs and parameters made it and it is whole."""
    from components.pipeline.digests import json_digest
    from components.pipeline.runner import verify

    try:
        manifest = verify(step.previous, step.stage.name)
    except BadInputError:
        return None
    made_of = [manifest.get("inputs"), manifest.get("parameters")]
    wanted = [dict(step.input_digests), dict(step.parameters)]
    return manifest if json_digest(made_of) == json_digest(wanted) else None


# --- following a TrainJob --------------------------------------------------------------------------------------------


class _Follower:
    """One TrainJob, from its submission to its end."""

    def __init__(
        self,
        cluster: "_Cluster",
        job: dict[str, Any],
        settings: Settings,
        output: Callable[[], dict[str, Any] | None],
    ) -> None:
        self.cluster, self.job, self.settings, self.output = cluster, job, settings, output
        self.name = job["metadata"]["name"]
        self.called = f"TrainJob {cluster.namespace}/{self.name}"
        self.logs = _Logs(cluster)
        self.last_state = ""

    def run(self) -> dict[str, Any]:
        """Follow the TrainJob, submitting it where it isn't there yet or was preempted; returns the manifest."""
        with _cancellation():
            try:
                return self._run()
            except _Cancelled as cancelled:
                self._clean_up(cancelled)

    def _run(self) -> dict[str, Any]:
        self._submit()
        for resumed in range(1, self.settings.resumes + 2):
            job = self._follow()
            if _condition(job, "Complete"):
                if manifest := self.output():
                    return manifest
                raise MissingInputError(
                    f"The {self.called} has completed, and its output is not below the work root here; check that "
                    "--claim is the volume that is mounted at --mount-path."
                )
            pods = self.cluster.pods(self.name)
            if not _is_preempted(pods):
                raise self._failure(job, pods)
            if resumed > self.settings.resumes:
                break
            self._say(f"preempted; submitting it again ({resumed} of {self.settings.resumes})")
            self._submit()
        raise PreemptedError(
            f"The {self.called} was preempted {self.settings.resumes + 1} times, and saved its state; run the same "
            "command to go on, or ask for a pool that lasts longer."
        )

    def _submit(self) -> None:
        """See to it that the TrainJob is there: created, or found under way, or finished with its output in place."""
        while not self.cluster.create(self.job):
            found = self.cluster.get(self.name)
            if found is None:
                continue
            if found["metadata"].get("deletionTimestamp"):
                self._say("another of this name is being deleted; waiting for it to be gone")
            elif _condition(found, "Complete") and not self.output():
                self._say("an earlier one has completed, but its output is gone; replacing it")
            elif _condition(found, "Failed"):
                self._say("an earlier one has failed; replacing it, to go on from its checkpoint")
            else:
                self._say("it was submitted before; following it")
                return
            self.cluster.delete(self.name, self.settings.grace + 60)
        self._say(f"submitted, nodes: {self.settings.nodes}")

    def _follow(self) -> dict[str, Any]:
        """Wait for the TrainJob's end, passing on its first pod's log; returns it as it was last seen."""
        alive = time.monotonic()
        while True:
            job = self.cluster.get(self.name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise PreemptedError(
                    f"The {self.called} was deleted by someone else while it was followed; its pods were told to stop "
                    "and save. Run the same command to go on."
                )
            pods = self.cluster.pods(self.name)
            self.logs.pass_on(pods)
            if _condition(job, "Complete") or _condition(job, "Failed"):
                return job
            running = [pod for pod in pods if pod.status.phase != "Pending"]
            queued = job["spec"].get("suspend") or _condition(job, "Suspended")
            if running or queued:
                alive = time.monotonic()
            if time.monotonic() - alive > self.settings.start_timeout:
                why = self.cluster.why_not_started(self.name, pods)
                self.cluster.delete(self.name, 0)
                raise TransientError(
                    f"The {self.called} had no running pod for {self.settings.start_timeout:g} s and was deleted "
                    f"({why}); mend that, or wait for room, and run the same command."
                )
            if queued:
                self._say("waiting in its queue")
            elif running:
                self._say(f"{len(running)} of {self.settings.nodes} pods have started")
            else:
                self._say(f"waiting for its pods ({self.cluster.why_not_started(self.name, pods)})")
            time.sleep(self.settings.poll)

    def _failure(self, job: Mapping[str, Any], pods: Sequence[Any]) -> UniViGUError:
        """The error that the pods ended with, under the same exit code."""
        ended = [(pod.metadata.name, *end) for pod in pods if (end := _end(pod)) and end[0]]
        for name, *_ in ended:
            self.logs.show_tail(name)
        condition = _clean(_condition(job, "Failed").get("message") or "no reason given")
        if not ended:
            return UniViGUError(f"The {self.called} failed ({condition}), and no pod is left that says why.")
        name, code, reason = max(ended, key=lambda end: end[1])
        if reason == "OOMKilled":
            limit = self.job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
            return UniViGUError(
                f"The {self.called} failed: pod {name} needed more memory than its {limit} (OOMKilled); raise "
                "--memory, or lower `micro_batch_size`."
            )
        said = f", saying: {self.logs.last_words}" if self.logs.last_words else "; its log is above"
        message = f"The {self.called} failed: pod {name} ended with exit code {code}{said}"
        return _error_class(code)(message if message.endswith(".") else f"{message}.")

    def _clean_up(self, cancelled: "_Cancelled") -> None:
        """Delete the TrainJob; the pods save what they have, as their own SIGTERM asks them to."""
        self._say("told to stop; deleting it")
        self.cluster.patience = min(self.cluster.patience, 15.0)  # whoever told will not wait for ever
        try:
            self.cluster.delete(self.name, 0)
        except TransientError as error:
            raise TransientError(
                f"The {self.called} may still be running, as the API server doesn't answer; delete it with "
                f"`kubectl delete trainjob {self.name} --namespace {self.cluster.namespace}`."
            ) from error
        if cancelled.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise PreemptedError(
            f"The {self.called} was deleted, as this command was told to stop; its pods save what they have. Run the "
            "same command to go on."
        )

    def _say(self, state: str) -> None:
        if state != self.last_state:
            print(f"{self.called}: {state}", file=sys.stderr, flush=True)
        self.last_state = state


class _Logs:
    """The log of the pod that speaks for all, on standard output, a few lines at each look."""

    def __init__(self, cluster: "_Cluster") -> None:
        self.cluster = cluster
        self.pod, self.last, self.looked = "", "", 0.0
        self.last_words = ""  # what the command said last: why it stopped

    def pass_on(self, pods: Sequence[Any]) -> None:
        first = [p for p in pods if p.metadata.labels.get(INDEX_LABEL, "0") == "0" and p.status.phase != "Pending"]
        if not first:
            return
        pod = max(first, key=lambda p: p.metadata.creation_timestamp)
        if pod.metadata.uid != self.pod:
            self.pod, self.last, self.looked = pod.metadata.uid, "", 0.0
        now = time.monotonic()
        since = {"since_seconds": int(now - self.looked) + 10} if self.looked else {}
        text = self.cluster.log(pod.metadata.name, timestamps=True, **since)
        if text is None:
            return
        self.looked = now
        for line in text.splitlines():
            stamp, _, said = line.partition(" ")
            if stamp > self.last:  # kubelet's stamps are of equal length
                self.last = stamp
                print(_clean(said), flush=True)
                self._remember(said)

    def show_tail(self, pod: str) -> None:
        """The end of a failed pod's log, on standard error."""
        for line in (self.cluster.log(pod, tail_lines=20) or "").splitlines():
            print(f"{pod}: {_clean(line)}", file=sys.stderr)
            self._remember(line)

    def _remember(self, line: str) -> None:
        if line.startswith("univigu: "):
            self.last_words = _clean(line.removeprefix("univigu: "))


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The condition of that type if it is true, else nothing."""
    conditions = job.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), {})


def _end(pod: Any) -> tuple[int, str] | None:
    """How a pod's training container ended: exit code and reason."""
    for status in pod.status.container_statuses or []:
        state = status.state.terminated or (status.last_state and status.last_state.terminated)
        if status.name == NODE and state:
            return state.exit_code, state.reason or ""
    return None


def _is_preempted(pods: Sequence[Any]) -> bool:
    """Whether pods saved and left, or were taken away: what comes of it is not the training's own fault."""
    if any((end := _end(pod)) and end[0] == PreemptedError.exit_code for pod in pods):
        return True
    disrupted = {c.type for pod in pods for c in pod.status.conditions or [] if c.status == "True"}
    return "DisruptionTarget" in disrupted or any(pod.status.reason in _DISRUPTIONS for pod in pods)


def _error_class(code: int) -> type[UniViGUError]:
    classes, known = [UniViGUError], {}
    while classes:
        one = classes.pop()
        known.setdefault(one.exit_code, one)
        classes += one.__subclasses__()
    return known.get(code, UniViGUError)


def _clean(text: str) -> str:
    """What a server says, on one line and without control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


class _Cancelled(BaseException):
    """SIGTERM or SIGINT came; not an Exception, so that nothing on the way takes it for a failed request."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _cancellation() -> Iterator[None]:
    """Raise `_Cancelled` at the first SIGTERM or SIGINT, and let nothing more disturb the cleaning up."""

    def cancel(number: int, _: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise _Cancelled(number)

    before = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the API server --------------------------------------------------------------------------------------------------


class _Cluster:
    """What is asked of the API server, again and again where it doesn't answer."""

    def __init__(self, client: Any, namespace: str, patience: float) -> None:
        kubernetes = _import("kubernetes.client")
        self.client, self.namespace, self.patience = client, namespace, patience
        self.custom, self.core = kubernetes.CustomObjectsApi(client), kubernetes.CoreV1Api(client)

    @classmethod
    @contextmanager
    def connect(cls, settings: Settings) -> Iterator["_Cluster"]:
        """With the pod's service account inside a cluster, and with the kubeconfig outside."""
        client, config = _import("kubernetes.client"), _import("kubernetes.config")
        configuration, namespace = client.Configuration(), "default"
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config(configuration)
                own = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
                namespace = own.read_text().strip() if own.is_file() else namespace
            else:
                where = os.environ.get("KUBECONFIG")  # the client looks at it when it is imported, and not again
                config.load_kube_config(where, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(where)
                namespace = context["context"].get("namespace", namespace)
        except config.ConfigException as error:
            raise ConfigError(
                f"There is no cluster to be found ({_clean(str(error))}); set KUBECONFIG, and see whether "
                "`kubectl get trainjobs` works."
            ) from error
        configuration.retries = False  # `_ask` does, and says so
        with client.ApiClient(configuration) as connected:
            yield cls(connected, settings.namespace or namespace, settings.api_timeout)

    def create(self, job: Mapping[str, Any]) -> bool:
        """Create a TrainJob; False where there is one of that name."""
        where = (GROUP, VERSION, self.namespace, PLURAL)
        created = self._ask(self.custom.create_namespaced_custom_object, *where, dict(job), expected=(404, 409))
        if created == 404:
            raise ConfigError(
                f"The cluster has no TrainJobs ({GROUP}/{VERSION}), or no namespace '{self.namespace}'; install "
                "Kubeflow Trainer, or give another --namespace."
            )
        return created != 409

    def get(self, name: str) -> dict[str, Any] | None:
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        found = self._ask(self.custom.get_namespaced_custom_object, *where, expected=(404,))
        return None if found == 404 else found

    def delete(self, name: str, wait: float) -> None:
        """Delete a TrainJob and its pods, and wait up to `wait` seconds for them to be gone; raises where they stay."""
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        deadline = time.monotonic() + wait
        request = self.custom.delete_namespaced_custom_object
        self._ask(request, *where, propagation_policy="Foreground", expected=(404, 409))
        while wait and self.get(name) is not None:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"The TrainJob {self.namespace}/{name} is still being deleted after {wait:g} s; run the same "
                    "command once it is gone."
                )
            time.sleep(min(1.0, wait))

    def pods(self, name: str) -> list[Any]:
        selector = f"{JOB_LABEL}={name}"
        return self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=selector).items

    def log(self, pod: str, **options: Any) -> str | None:
        """A pod's log, or None where there is none yet, or none any more."""
        request = self.core.read_namespaced_pod_log
        options = {"container": NODE, "_preload_content": False, **options}
        answer = self._ask(request, pod, self.namespace, expected=(400, 404), **options)
        return None if isinstance(answer, int) else answer.data.decode(errors="replace")

    def why_not_started(self, name: str, pods: Sequence[Any]) -> str:
        """What Kubernetes says about pods that don't start: conditions and containers, and else events."""
        said = []
        for pod in pods:
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    said.append(f"{condition.reason}: {condition.message}")
            for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
                waiting = status.state.waiting
                if waiting and waiting.reason not in _NOT_YET:
                    said.append(f"{waiting.reason}: {waiting.message}")
        if not said:
            events = self._ask(self.core.list_namespaced_event, self.namespace, field_selector="type=Warning").items
            said = [f"{e.reason}: {e.message}" for e in events if (e.involved_object.name or "").startswith(name)]
        unique = list(dict.fromkeys(_clean(one)[:300] for one in said))
        return "; ".join(unique[-3:]) or "Kubernetes gives no reason"

    def _ask(self, request: Callable[..., Any], *args: Any, expected: Sequence[int] = (), **kwargs: Any) -> Any:
        """The answer, or the status if it is one of `expected`; raises an error of `univigu.errors` for another."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return request(*args, _request_timeout=(10, 60), **kwargs)
            except ApiException as error:
                if error.status in expected:
                    return error.status
                said = _message(error)
                if error.status not in _WORTH_ANOTHER_TRY:
                    raise _refusal(error.status, said, self.namespace) from error
            except (HTTPError, OSError) as error:
                said = type(error).__name__
            host = self.client.configuration.host
            if time.monotonic() + pause > deadline:
                raise TransientError(
                    f"The Kubernetes API server at {host} doesn't answer ({said}); a TrainJob that was submitted goes "
                    "on. Run the same command to follow it."
                )
            print(f"The API server at {host} doesn't answer ({said}); trying again", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _message(error: Any) -> str:
    """What the API server says in the Status of an error."""
    import json

    try:
        return _clean(json.loads(error.body)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return _clean(str(error.reason))[:500]


def _refusal(status: int, said: str, namespace: str) -> UniViGUError:
    if status in (401, 403):
        return ConfigError(
            f"The API server refuses ({said}); give the account the rights to create, get and delete trainjobs and to "
            f"read pods, their logs and events in '{namespace}'."
        )
    return BadInputError(f"The API server doesn't take the request ({status}: {said}); mend the option it names.")


def _import(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"The package '{module.partition('.')[0]}' is missing; install the cluster's extras: "
            "`pip install 'uni-vigu[cluster]'`."
        ) from error
