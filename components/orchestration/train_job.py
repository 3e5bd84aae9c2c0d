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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from components.orchestration.kubernetes_api import GROUP, NODE, VERSION, Cluster, import_extra
from components.orchestration.train_job_run import follow
from components.pipeline.digests import json_digest
from components.pipeline.manifests import Recipe, verify
from components.pipeline.profiles import load_profile
from components.pipeline.stages import Stage, find_stage
from univigu.errors import BadInputError, ConfigError

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUN_LABEL = "univigu/run-id"
TRAINING_MODULE = "components.training.train_stage"


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
    run_id: Annotated[
        str | None, typer.Option(envvar="UNIVIGU_RUN_ID", help="The pipeline's run that this is part of, for a label.")
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only ask the cluster whether it would take the job; create nothing.")
    ] = False,
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
        run_id=run_id,
        env=_parse_env(env or []),
        grace=grace,
        resumes=resumes,
        start_timeout=start_timeout,
        api_timeout=api_timeout,
    )
    if dry_run:
        try_train_job(step, profile, root, settings)
        print(f"{step}: the cluster would take this TrainJob")
        return
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
    from components.pipeline.runner import make_step

    stage, profile, root = _check(name, profile, root, settings)
    step = make_step(stage, load_profile(profile), root)
    job = build(stage, _work_key(step.key, root, settings), profile, root, settings)
    return follow(job, settings, lambda: _output_of(step))


def try_train_job(name: str, profile: str, root: Path, settings: Settings) -> None:
    """Have the API server check such a TrainJob as it would a real one; raises as `run_train_job` does.

    The step's inputs don't have to be there yet.
    """
    stage, profile, root = _check(name, profile, root, settings)
    with Cluster.connect(settings.namespace, settings.api_timeout) as cluster:
        cluster.create(build(stage, "dry-run", profile, root, settings), dry_run=True)


def _check(name: str, profile: str, root: Path, settings: Settings) -> tuple[Stage, str, Path]:
    """The stage, the profile's name or absolute path, and the absolute root; raises for what can't be trained there."""
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
    micro_batches(
        TrainingConfig.from_section(values[stage.parameters[-1]], values["seed"]),
        settings.nodes * _processes(stage, settings),
    )
    return stage, profile, root


def build(stage: Stage, key: str, profile: str, root: Path, settings: Settings) -> dict[str, Any]:
    """The TrainJob that runs a stage, as the API takes it; `key` says which work it is, and nothing else has it."""
    models = import_extra("kubeflow_trainer_api.models")
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


def _work_key(run_key: str, root: Path, settings: Settings) -> str:
    """A digest of all that decides the output, and of where it goes: two roots may make the same."""

    return json_digest([run_key, str(root), settings.claim])


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
    """The manifest of the step's output, if these inputs, parameters and code made it and it is whole."""

    try:
        manifest = verify(step.previous, step.stage.name)
    except BadInputError:
        return None
    return manifest if Recipe.of(manifest).key() == step.key() else None
