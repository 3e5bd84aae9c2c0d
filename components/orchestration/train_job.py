"""Training on a pool of GPU nodes: `univigu train-job` has a step run as a Kubeflow TrainJob, and stays with it.

The TrainJob's name is derived from the step and from all that decides its output, so the same work is never submitted
twice: whoever comes second follows the first. Only the conditions Complete and Failed end it (a queued job may never
report that it runs). The work root is a volume that this process and the pods see under the same path; the pods run
`univigu run STEP` on it, and go on from the checkpoint that they find there.

=======================================  ============================================================================
what happens                             what becomes of it
=======================================  ============================================================================
all stop with 81, or a node goes away    submitted again, and goes on from its checkpoint; after `--resumes`: exit 81
a pod ends with another code             that code and its last words; the TrainJob stays to be looked at
no pod runs for `--start-timeout`        deleted, exit 75, with what Kubernetes says about it
the TrainJob is deleted from outside     exit 81: the pods were told to stop, so they saved
SIGTERM or Ctrl-C here                   deleted, exit 81 or 130: the same
the API server doesn't answer            asked again for `--api-timeout`, then exit 75; the TrainJob goes on
=======================================  ============================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.orchestration.kubernetes_api import GROUP, NODE, VERSION, import_extra
from components.pipeline.digests import json_digest
from components.pipeline.stages import Stage

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUN_LABEL = "univigu/run-id"


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
    run_id: str | None = None  # of the pipeline's run that this is part of
    env: Mapping[str, str] = field(default_factory=dict)  # nothing secret: the runtime takes secrets by reference
    grace: int = 600  # seconds in which a pod that is told to stop may save
    resumes: int = 20
    start_timeout: float = 1800.0
    api_timeout: float = 300.0
    poll: float = 5.0


def build(stage: Stage, key: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """The TrainJob that runs a stage, as the API takes it; `key` says which work it is, and nothing else has it."""
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
    """A digest of all that decides the output, and of where it goes: two roots may make the same."""
    return json_digest([run_key, str(root), settings.claim])


def _gpus(stage: Stage, settings: Settings) -> int:
    return stage.resources.gpus if settings.gpus is None else settings.gpus


def processes(stage: Stage, settings: Settings) -> int:
    """Of each node: one for each GPU, or one on the CPU."""
    return max(_gpus(stage, settings), 1)
