"""The `univigu` command. Each command imports what it needs when it runs, to keep `univigu --help` fast."""

import atexit
import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from components.cli import (
    data,
    development,
    evaluate,
    fetch,
    generate,
    logs,
    messages,
    metrics,
    models,
    pipeline,
    plan,
    profile,
    study,
    train_job,
)
from components.cli.options import Profile, Root, Settings, complete_profile, complete_step, profile_in_use
from components.cli.serve import command as serve
from components.cli.studio import command as studio
from components.pipeline.lean_imports import import_models, import_training, start_command, without
from univigu import __version__
from univigu.errors import ConfigError, PreemptedError, UniViGUError, storage_fault
from univigu.threads import bound_spinning

SILENT = {"TQDM_DISABLE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}

app = typer.Typer(
    name="univigu",
    help="Uni-ViGU: generate video from text, describe video in text, or make both jointly - and train the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

generate.add_to(app)
evaluate.add_to(app)
train_job.add_to(app)
plan.add_to(app)
fetch.add_to(app)
metrics.add_to(app)
serve.add_to(app)
studio.add_to(app)
development.add_to(app)
app.add_typer(pipeline.app)
app.add_typer(models.app, name="model")
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")
app.add_typer(study.app, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"univigu {__version__}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results and errors: no progress and no hints.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print warnings and log lines of libraries, and tracebacks of errors."),
    ] = False,
) -> None:
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose contradict each other; give one of them.")
    if quiet:
        os.environ[messages.QUIET] = "1"  # also for child processes
        context.with_resource(redirect_stderr(logs.ErrorLines(sys.stderr)))
    if verbose:
        os.environ[messages.VERBOSE] = "1"
        let_libraries_speak()


PartOption = Annotated[
    str,
    typer.Option(
        metavar="K/N",
        help="Make only part K of N of the step's shards, in parallel with other processes; commit nothing.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of processes that make the step's shards, or train together. (default: one per visible GPU for a "
        "step that needs GPUs; without a GPU, training takes one per core, up to four)",
        show_default=False,
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Start from nothing; checkpoints, shards and paid answers are set aside.")
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Resume from checkpoints and shards that were set aside, even if something has changed since.",
        show_default=False,
    ),
]


@app.command()
def run(
    step: Annotated[
        str, typer.Argument(help="The step's name; `univigu steps` lists them.", autocompletion=complete_step)
    ],
    profile: Profile = None,
    settings: Settings = None,
    root: Root = Path("."),
    part: PartOption = "",
    processes: Processes = None,
    fresh: Restart = False,
    resume_from: ResumeFrom = None,
) -> None:
    """Run one step of the pipeline on the outputs of earlier steps, even if its own output is up to date.

    `dvc repro` runs all steps whose output is out of date, and `univigu status` lists them. The finished work of a
    killed run is reused if nothing has changed; otherwise it is set aside, and the command prints where.
    """
    from components.pipeline.freshness import finished
    from components.pipeline.processes import count_processes, end_with_parent, make_parts, train_together
    from components.pipeline.profiles import check_watched, load_profile, with_settings
    from components.pipeline.progress import activity
    from components.pipeline.runner import imported, restart, resume, run_part, run_stage
    from components.pipeline.stages import find_stage
    from components.pipeline.workspace import Part

    end_with_parent()
    profile = with_settings(profile_in_use(profile, root), settings or [])
    values = load_profile(profile)
    check_watched(profile, values, root)
    if part:
        if fresh or resume_from:
            raise ConfigError("--part can't be combined with --restart or --resume-from; run the whole step with them.")
        counts = run_part(step, values, root, Part.parse(part))
        print(f"{step} {part}: {counts['made']} shards made, {counts['kept']} kept; run the whole step to commit them")
        return
    stage = find_stage(step)
    if imported(stage, root):
        print(f"{step}: {stage.home} was imported and is kept unchanged; delete it to make it here")
        return
    if "DVC_STAGE" in os.environ and not stage.external and finished(step, values, root):
        print(f"{step}: already finished with the same inputs, parameters and code")
        return
    if fresh and _is_main_rank():
        restart(step, values, root)
    if resume_from and _is_main_rank():
        resume(step, values, root, resume_from)
    processes = processes or count_processes(stage, values.get(step.replace("-", "_")))
    if processes > 1 and not stage.sharded:
        train_together(step, profile, root, processes)
        return
    if processes > 1:
        make_parts(step, profile, root, processes)
    with without(*([] if _uses_adapters(values) else ["peft"])):
        if stage.resources.gpus and not stage.sharded:  # shards may all be made already: they import models when needed
            (import_training if stage.together else import_models)()
        with activity(f"{step} runs") if _is_main_rank() else nullcontext():
            manifest = run_stage(step, values, root)
    if _is_main_rank():
        _print_result(step, manifest)


def _uses_adapters(profile: Mapping[str, Any]) -> bool:
    return any(profile.get(section, {}).get("lora") for section in ("train_stage_1", "train_stage_2"))


def _print_result(step: str, manifest: Mapping[str, Any]) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["reasons"].items())
    usage = ", ".join(f"{name} {amount:,.10g}" for name, amount in manifest["facts"].get("usage", {}).items())
    print(
        f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, {manifest['quarantined']} quarantined"
        + (f" ({reasons})" if reasons else "")
        + (f"; it took {usage}" if usage else "")
    )


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="A bundled profile's name.", autocompletion=complete_profile)],
    root: Root = Path("."),
) -> None:
    """Choose the profile that `dvc repro` runs; writes params.yaml."""
    from components.pipeline.profiles import use_profile

    if not (root / "dvc.yaml").is_file():
        raise ConfigError(f"There is no dvc.yaml in {root.resolve()}; run this in the project's folder, or set --root.")
    for key, path in use_profile(profile, root).items():
        there = "" if (root / path).exists() else f" (missing: see `univigu rehearse --profile {profile}`)"
        print(f"{key:<12} {path}{there}")


@app.command()
def steps() -> None:
    """List the steps in the order in which they run."""
    from components.pipeline.stages import STAGES

    for stage in STAGES:
        print(f"{stage.name:<20} {', '.join(stage.inputs.values()) or '-'} -> {stage.home}")


@app.command()
def status(profile: Profile = None, settings: Settings = None, root: Root = Path(".")) -> None:
    """Show which steps are finished, why the others would run again, and which work is set aside."""
    from components.pipeline.aside import list_kept
    from components.pipeline.freshness import why_not_finished
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.stages import STAGES

    values = load_profile(with_settings(profile_in_use(profile, root), settings or []))
    for stage in STAGES:
        print(f"{stage.name:<20} {why_not_finished(stage.name, values, root) or 'finished'}")
    for folder in list_kept(root.resolve()):
        print(f"set aside            {folder}")


@app.command()
def clean(root: Root = Path(".")) -> None:
    """Remove outputs and unfinished runs; keep paid answers, set-aside work, the registry and DVC's cache."""
    from components.pipeline.clean import clean as remove

    remove(root)


@app.command(hidden=True)
def code(profile: Profile = None, root: Root = Path(".")) -> None:
    """Write the files that dvc.yaml watches: .univigu/steps/STEP.json, with the digest of its code and its settings."""
    from components.pipeline.fingerprint import code_digest, stage_code
    from components.pipeline.profiles import load_profile
    from components.pipeline.runner import code_entries
    from components.pipeline.stages import STAGES
    from components.pipeline.state import STATE
    from univigu.files import write_json

    values = load_profile(profile_in_use(profile, root))
    folder = root / STATE / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        settings = {key: values[key] for key in (*stage.sources.values(), *stage.parameters)}
        digest = code_digest(stage_code(stage, values, code_entries(stage, root)))
        write_json(folder / f"{stage.name}.json", {"code": digest, "settings": settings})


@app.command()
def summary(root: Root = Path(".")) -> None:
    """Show the last run's steps, times, rows, scores and registered version; write reports/run.json."""
    from components.cli.summary import show, summarise

    show(root, summarise(root))


def keep_libraries_quiet() -> None:
    """Hide warnings, log lines and progress bars of libraries, so that users see only the command's own output.

    `--verbose` or UNIVIGU_VERBOSE=1 shows them. Telemetry is off, and nothing is fetched from a hub unless
    HF_HUB_OFFLINE=0.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    verbose = messages.is_verbose()
    for name, value in {**({} if verbose else SILENT), **offline, "GX_ANALYTICS_ENABLED": "false"}.items():
        os.environ.setdefault(name, value)
    if not verbose:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # tracebacks of errors that the command reports itself


def let_libraries_speak() -> None:
    """Undo `keep_libraries_quiet`, before anything is imported that it concerns."""
    for name, value in SILENT.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    warnings.simplefilter("default")
    logging.disable(logging.NOTSET)


def _is_main_rank() -> bool:
    """Whether this process reports for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _end(error: UniViGUError) -> NoReturn:
    if messages.is_verbose():
        traceback.print_exception(error)
    if _is_main_rank() or not isinstance(error, PreemptedError):
        print(f"univigu: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def console() -> None:
    """The console script: `main` in a process of its own."""
    start_command()
    main()


def main() -> None:
    """Run the command; an expected failure prints one message on standard error and sets its own exit code."""
    keep_libraries_quiet()
    bound_spinning()
    # Garbage collection during torch's import and at exit would take seconds.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    try:
        logs.choose_format()
        app()
    except UniViGUError as error:
        _end(error)
    except Exception as error:  # libraries have their own exceptions for a disk that fails
        fault = storage_fault(error, Path.cwd())
        if fault is None:
            raise
        _end(fault)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # typer's exit code for a KeyboardInterrupt
            print("univigu: stopped; run the same command again to resume.", file=sys.stderr)
        raise


if __name__ == "__main__":
    console()
