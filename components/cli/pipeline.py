"""`univigu pipeline`: the steps as a Kubeflow pipeline, run here or on a server."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.cli.options import DEFAULT_PROFILE, Settings, profile_in_use
from univigu.errors import BadInputError, ConfigError, UniViGUError

if TYPE_CHECKING:
    from components.orchestration.kfp_server import KfpServer

app = typer.Typer(
    name="pipeline",
    help="Run all steps as a Kubeflow pipeline, on this machine or on a server.",
    no_args_is_help=True,
)
POLL_S = 10.0
DEFAULT_PACKAGE = Path("infra/pipeline.yaml")

Host = Annotated[str, typer.Option(help="The server's address. (default: KFP_ENDPOINT or KF_PIPELINES_ENDPOINT)")]
Namespace = Annotated[str, typer.Option(help="Your namespace on a multi-user server.")]
Package = Annotated[Path, typer.Option(help="The compiled pipeline.")]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Wait for the end; exit code 0 on success, 83 on failure, 84 if cancelled."),
]
Poll = Annotated[float, typer.Option(min=0.05, help="Polling interval in seconds.")]
RunId = Annotated[str, typer.Argument(help="The run's id, as printed by `submit`.")]
Parameters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="The pipeline's parameters, such as profile=smoke parts=4; without a profile, that of `univigu use`.",
    ),
]


@app.command("compile")
def compile_pipeline(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = DEFAULT_PACKAGE,
) -> None:
    """Write the pipeline as YAML for `submit`, `kfp run create`, or an upload on the server's web page."""
    from components.orchestration.kfp_pipeline import compile_to

    if output.suffix != ".yaml" or not output.parent.is_dir():
        raise BadInputError(f"'{output}' can't be written; give a .yaml file in an existing folder.")
    compile_to(output)
    print(output)


@app.command("run")
def run_here(
    parameters: Parameters = None,
    settings: Settings = None,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine; use `submit` for a server.")] = False,
    root: Annotated[Path, typer.Option(help="The work root, which contains the prompts and the base.")] = Path("."),
) -> None:
    """Run the whole pipeline on this machine with kfp's local runner: one process per task."""
    from components.orchestration.kfp_local import run_locally

    if not local:
        raise ConfigError(
            "Choose where to run: `univigu pipeline run --local`, or `univigu pipeline submit` for a server."
        )
    run_locally(root, _with_settings(_arguments(parameters or [], root), settings or []))
    print("SUCCEEDED")


@app.command()
def submit(
    parameters: Parameters = None,
    settings: Settings = None,
    package: Package = DEFAULT_PACKAGE,
    name: Annotated[
        str, typer.Option(help="The run's name. (default: derived from the pipeline and its parameters)")
    ] = "",
    experiment: Annotated[str, typer.Option(help="The experiment to run in.")] = "uni-vigu",
    service_account: Annotated[str, typer.Option(help="Service account of the pods. (default: the server's)")] = "",
    host: Host = "",
    namespace: Namespace = "",
    wait: Wait = False,
    poll: Poll = POLL_S,
) -> None:
    """Start a run on a server and print its id, unless a run of that name is active or has succeeded."""
    from components.orchestration.kfp_server import KfpServer, default_run_name, typed_arguments

    arguments = typed_arguments(package, _with_settings(_arguments(parameters or [], Path(".")), settings or []))
    server = KfpServer(host, namespace)
    name = name or default_run_name(package, arguments)
    run_id = server.submit(package, name, arguments, experiment, service_account)
    print(run_id, flush=True)
    if wait:
        _report(server, run_id, wait, poll)


@app.command()
def status(run_id: RunId, host: Host = "", namespace: Namespace = "", wait: Wait = False, poll: Poll = POLL_S) -> None:
    """Print a run's state; the exit code is 83 if it failed, 84 if it was cancelled, otherwise 0."""
    from components.orchestration.kfp_server import KfpServer

    _report(KfpServer(host, namespace), run_id, wait, poll)


@app.command()
def cancel(run_id: RunId, host: Host = "", namespace: Namespace = "") -> None:
    """Cancel a run; finished work of its steps is kept, and another run resumes from it."""
    from components.orchestration.kfp_server import KfpServer
    from components.orchestration.train_job import RUN_LABEL

    server = KfpServer(host, namespace)
    print(server.cancel(run_id).state)
    if server.arguments(run_id).get("train_backend") != "pod":
        where = namespace or "NAMESPACE"
        print(
            "The pod that follows its TrainJob deletes it, but has only a second to do so; to make sure, run:\n"
            f"kubectl delete trainjob --namespace {where} --selector {RUN_LABEL}={run_id}",
            file=sys.stderr,
        )


@app.command()
def logs(
    run_id: RunId,
    step: Annotated[str, typer.Option(help="Print only this step's log.")] = "",
    host: Host = "",
    namespace: Namespace = "",
) -> None:
    """Print the logs of a run's pods, as far as the server has them."""
    from components.orchestration.kfp_server import KfpServer

    found = False
    for task, text in KfpServer(host, namespace).logs(run_id, step):
        found = True
        for line in text.splitlines():
            print(f"{task} | {line}")
    if not found:
        where = f" -n {namespace}" if namespace else ""
        raise UniViGUError(
            "The server has no log of this run. While its pods exist, "
            f"`kubectl logs{where} -l pipeline/runid={run_id} -c main --prefix --tail=-1` shows them."
        )


def _report(server: "KfpServer", run_id: str, wait: bool, poll: float) -> None:
    """Print a run's state, or each new state while waiting; raises if the run failed or was cancelled."""
    from components.orchestration.kfp_server import RunCanceledError, RunFailedError

    printed = ""
    while True:
        now = server.state(run_id)
        if now.state != printed:
            print(now.state, flush=True)
            printed = now.state
        if now.is_terminal or not wait:
            break
        time.sleep(poll)
    if now.state == "CANCELED":
        raise RunCanceledError(
            f"The run {run_id} was cancelled; submit it again to resume from the finished work of its steps."
        )
    if now.is_terminal and now.state != "SUCCEEDED":
        why = f" ({now.message})" if now.message else ""
        raise RunFailedError(
            f"The run {run_id} ended as {now.state}{why}; `univigu pipeline logs {run_id}` shows why, "
            "and submitting it again resumes from the finished work of its steps."
        )


def _arguments(parameters: Sequence[str], root: Path) -> Mapping[str, str]:
    """The pipeline's parameters (KEY=VALUE each); where they name no profile, with the one that is in use."""
    for text in parameters:
        if "=" not in text:
            raise ConfigError(f"'{text}' is not a parameter; write KEY=VALUE, such as profile=smoke.")
    given = dict(text.split("=", 1) for text in parameters)
    chosen = profile_in_use(given.get("profile"), root)
    return given if chosen == DEFAULT_PROFILE else {**given, "profile": chosen}  # it is the pipeline's own default


def _with_settings(parameters: Mapping[str, str], settings: Sequence[str]) -> Mapping[str, str]:
    """The pipeline's parameters, with the settings of ``--set`` added to the profile, which every task receives.

    A bundled profile is checked here; a file may exist only on the cluster's volume, so it is checked there.
    """
    from components.pipeline.profiles import load_profile, profile_names, with_settings

    if not settings:
        return parameters
    name = parameters.get("profile", DEFAULT_PROFILE)
    spec = with_settings(name, settings)
    if name in profile_names():
        load_profile(spec)
    return {**parameters, "profile": spec}
