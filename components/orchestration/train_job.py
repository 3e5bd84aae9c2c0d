"""Training on a pool of GPU nodes: `univigu train-job` runs a step as a Kubeflow TrainJob, and follows it to its end.

The TrainJob's name is derived from the step and from everything that determines its output, so the same work is never
submitted twice: a second command follows the existing TrainJob. Only the conditions Complete and Failed end it, because
a queued job may never report that it runs. The work root is a volume that is mounted at the same path here and in the
pods; the pods run `univigu run STEP` on it, and resume from the checkpoint there.

The Kubeflow SDK (0.5.0) is not used: its runtime patch has no grace period, and it reports no exit codes or conflicts.

=======================================  ============================================================================
event                                    result
=======================================  ============================================================================
all pods exit with 81, or a node fails   submitted again, resumes from its checkpoint; exit 81 after `--resumes` times
a pod exits with another code            that exit code and the last message; the TrainJob is kept for inspection
pods don't start in `--start-timeout`    deleted, exit 75, with the reason that Kubernetes gives
someone else deletes the TrainJob        exit 81: the pods received SIGTERM, so they saved their state
SIGTERM or Ctrl-C here                   deleted, exit 81 or 130; the pods save their state
the API server does not answer           retried for `--api-timeout`, then exit 75; the TrainJob keeps running
=======================================  ============================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.orchestration.kubernetes_api import GROUP, NODE, VERSION
from components.pipeline.digests import json_digest
from components.pipeline.stages import Stage
from univigu.extras import import_extra

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
RUN_LABEL = "univigu/run-id"


@dataclass(frozen=True)
class Settings:
    """Where a TrainJob runs, and with which resources; the profile decides what it trains."""

    namespace: str | None = None  # None: that of the pod, or of the kubeconfig's context
    runtime: str = "univigu-torchrun"  # a TrainingRuntime of the namespace
    image: str | None = None  # None: the runtime's image
    claim: str | None = None  # the PersistentVolumeClaim that holds the work root; None: the runtime mounts it
    mount_path: Path | None = None  # where that volume is mounted, here and in the pods; None: at the work root
    nodes: int = 1
    gpus: int | None = None  # per node, one process per GPU; None: the default of stages.py; 0: one process on the CPU
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    queue: str | None = None  # Kueue's LocalQueue
    priority: str | None = None  # Kueue's WorkloadPriorityClass, for a TrainJob in a queue
    run_id: str | None = None  # of the pipeline run that this is part of
    env: Mapping[str, str] = field(default_factory=dict)  # no secrets: the runtime references Secrets
    grace: int = 600  # seconds that a pod has to save its state after SIGTERM
    resumes: int = 20
    start_timeout: float = 1800.0
    api_timeout: float = 300.0
    poll: float = 5.0


def build(stage: Stage, key: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """The TrainJob that runs a stage, as an API object; `key` identifies the work (see `work_key`)."""
    models = import_extra("kubeflow_trainer_api.models")
    gpus, mount_path = _gpus(stage, settings), str((settings.mount_path or root).resolve())
    resources = {"cpu": settings.cpu or stage.resources.cpu, "memory": settings.memory or stage.resources.memory}
    if gpus:
        resources[settings.gpu_resource] = str(gpus)
    trainer: dict[str, Any] = {
        "args": ["run", stage.name, "--profile", profile, "--root", str(root)],
        "env": [{"name": k, "value": v} for k, v in sorted({"PYTHONUNBUFFERED": "1", **settings.env}.items())],
        "numNodes": settings.nodes,
        "numProcPerNode": processes(stage, settings),
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
    if settings.priority:
        labels[PRIORITY_LABEL] = settings.priority
    if settings.run_id:
        labels[RUN_LABEL] = settings.run_id
    node = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    job = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": f"{stage.name}-{key[:10]}",
            "labels": labels,
            "annotations": {"univigu/work-key": key},
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


def work_key(run_key: str, root: Path, settings: Settings) -> str:
    """A digest of everything that determines the output, and of the work root: two roots may hold the same output."""
    return json_digest([run_key, str(root), settings.claim])


def _gpus(stage: Stage, settings: Settings) -> int:
    return stage.resources.gpus if settings.gpus is None else settings.gpus


def processes(stage: Stage, settings: Settings) -> int:
    """The number of processes per node: one per GPU, or one on the CPU."""
    return max(_gpus(stage, settings), 1)
