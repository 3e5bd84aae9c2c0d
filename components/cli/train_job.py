"""`univigu train-job`: a training step as a Kubeflow TrainJob."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from components.orchestration.train_job import Settings
from univigu.errors import ConfigError


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
    from components.orchestration.train_job_run import dry_run_train_job, run_train_job

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
        dry_run_train_job(step, profile, root, settings)
        print(f"{step}: the cluster would take this TrainJob")
        return
    manifest = run_train_job(step, profile, root, settings)
    print(f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, by a TrainJob")


def add_to(app: typer.Typer) -> None:
    """Make `train_job` a command of `app`."""
    app.command("train-job")(train_job)


def _parse_env(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not pair.partition("=")[0].replace("_", "").isalnum() or "=" not in pair:
            raise ConfigError(f"'{pair}' is no environment variable; write --env NAME=VALUE.")
    return dict(pair.split("=", 1) for pair in pairs)
