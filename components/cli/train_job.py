"""`univigu train-job`: a training step as a Kubeflow TrainJob."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from components.cli.options import DEFAULT_PROFILE, profile_in_use
from components.orchestration.train_job import Settings
from univigu.errors import ConfigError


def _option(help: str, variable: str | None = None, least: int | None = None) -> typer.models.OptionInfo:
    """An option of the command; the environment variable `variable` sets its default, `least` is its minimum."""
    return typer.Option(help=help, envvar=variable, min=least)


Step = Annotated[str, typer.Argument(help="A training step: train-stage-1 or train-stage-2.")]
Profile = Annotated[
    str | None,
    _option(
        "A bundled profile's name, or a YAML file on the volume. (default: what `univigu use` chose, otherwise "
        f"{DEFAULT_PROFILE})"
    ),
]
Root = Annotated[Path, _option("The work root, under the same path here and in the pods.")]
Namespace = Annotated[str | None, _option("The namespace to run in. (default: the current one)", "UNIVIGU_NAMESPACE")]
Runtime = Annotated[str, _option("The TrainingRuntime to use.", "UNIVIGU_RUNTIME")]
Image = Annotated[str | None, _option("The pods' image. (default: the runtime's)", "UNIVIGU_IMAGE")]
Claim = Annotated[str | None, _option("The PersistentVolumeClaim with the work root.", "UNIVIGU_CLAIM")]
MountPath = Annotated[Path | None, _option("Where to mount the volume. (default: the root)", "UNIVIGU_MOUNT_PATH")]
Nodes = Annotated[int, _option("Nodes that train together.", "UNIVIGU_NODES", least=1)]
Gpus = Annotated[int | None, _option("GPUs per node; 0: one CPU process. (default: 8)", "UNIVIGU_GPUS", least=0)]
GpuResource = Annotated[str, _option("The cluster's resource name of a GPU.", "UNIVIGU_GPU_RESOURCE")]
Cpu = Annotated[str | None, _option("CPUs per node. (default: 32)", "UNIVIGU_CPU")]
Memory = Annotated[str | None, _option("Memory per node. (default: 256Gi)", "UNIVIGU_MEMORY")]
Queue = Annotated[str | None, _option("Kueue's LocalQueue, if the cluster has one.", "UNIVIGU_QUEUE")]
Priority = Annotated[
    str | None,
    _option("Kueue's WorkloadPriorityClass, for a job in a queue. (default: none)", "UNIVIGU_PRIORITY"),
]
RunId = Annotated[str | None, _option("The pipeline run that this belongs to, for a label.", "UNIVIGU_RUN_ID")]
Env = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An environment variable for the pods, not a secret; may be repeated."),
]
Grace = Annotated[int, _option("Seconds that stopped pods have to save their state.", "UNIVIGU_GRACE", least=1)]
Resumes = Annotated[int, _option("How often a preempted job is submitted again.", least=0)]
StartTimeout = Annotated[
    float, _option("Seconds to wait for a running pod, not counting a queue.", "UNIVIGU_START_TIMEOUT", least=0)
]
ApiTimeout = Annotated[
    float, _option("Seconds for which the API server may be unreachable.", "UNIVIGU_API_TIMEOUT", least=0)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only validate the job on the cluster; create nothing.")]


def train_job(
    step: Step,
    profile: Profile = None,
    root: Root = Path("."),
    namespace: Namespace = None,
    runtime: Runtime = Settings.runtime,
    image: Image = None,
    claim: Claim = None,
    mount_path: MountPath = None,
    nodes: Nodes = 1,
    gpus: Gpus = None,
    gpu_resource: GpuResource = Settings.gpu_resource,
    cpu: Cpu = None,
    memory: Memory = None,
    queue: Queue = None,
    priority: Priority = None,
    run_id: RunId = None,
    env: Env = None,
    grace: Grace = Settings.grace,
    resumes: Resumes = Settings.resumes,
    start_timeout: StartTimeout = Settings.start_timeout,
    api_timeout: ApiTimeout = Settings.api_timeout,
    dry_run: DryRun = False,
) -> None:
    """Run a training step as a TrainJob on a cluster and follow it until it ends; Ctrl-C or SIGTERM deletes it.

    The same command resumes wherever the last one stopped, and never submits a job twice.
    """
    from components.orchestration.train_job_run import dry_run_train_job, run_train_job

    profile = profile_in_use(profile, root)
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
        priority=priority,
        run_id=run_id,
        env=_parse_env(env or []),
        grace=grace,
        resumes=resumes,
        start_timeout=start_timeout,
        api_timeout=api_timeout,
    )
    if dry_run:
        dry_run_train_job(step, profile, root, settings)
        print(f"{step}: the cluster accepts this TrainJob")
        return
    manifest = run_train_job(step, profile, root, settings)
    print(f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, by a TrainJob")


def add_to(app: typer.Typer) -> None:
    """Make `train_job` a command of `app`."""
    app.command("train-job")(train_job)


def _parse_env(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[0].replace("_", "").isalnum() or "=" not in pair:
            raise ConfigError(f"'{pair}' is not an environment variable; write --env NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs)
