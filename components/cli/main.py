"""The `univigu` command. Each command imports what it needs when it runs, so that `univigu --help` answers at once."""

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from components.cli import data, generate, models, pipeline, plan, profile, train_job
from components.cli.options import Profile, Settings
from univigu.errors import ConfigError, PreemptedError, UniViGUError, storage_fault
from univigu.threads import bound_spinning

app = typer.Typer(
    name="univigu",
    help="Uni-ViGU: generate video from text, describe video in text, or make both jointly - and train the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

generate.add_to(app)
train_job.add_to(app)
plan.add_to(app)
app.add_typer(pipeline.app)
app.add_typer(models.app, name="model")
app.add_typer(data.app, name="data")
app.add_typer(profile.app, name="profile")

Root = Annotated[Path, typer.Option(help="The work root: every path a step reads or writes lies below it.")]


@app.command()
def run(
    step: Annotated[str, typer.Argument(help="The step's name; `univigu steps` lists them.")],
    profile: Profile = "tiny",
    settings: Settings = None,
    root: Root = Path("."),
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Only make the K-th of N parts of the step's shards, beside other processes; commit nothing.",
        ),
    ] = "",
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Make the step's shards with so many processes, and commit them. (default: for a step that wants "
            "GPUs one a visible GPU, else one)",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--restart", help="Start from nothing: checkpoints, shards and paid answers are set aside."),
    ] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Go on from checkpoints and shards that were set aside, although something has changed since.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run one step of the pipeline on the outputs of the steps before it, whether or not its own is up to date.

    `dvc repro` runs all steps whose output isn't, and `univigu status` says which these are. What a killed run has
    finished is kept, and used again where nothing has changed; where something has, it is set aside and named.
    """
    from components.pipeline.freshness import finished
    from components.pipeline.processes import count_processes, end_with_parent, make_parts
    from components.pipeline.profiles import check_watched, load_profile, with_settings
    from components.pipeline.runner import imported, restart, resume, run_part, run_stage
    from components.pipeline.stages import find_stage
    from components.pipeline.workspace import Part

    end_with_parent()
    profile = with_settings(profile, settings or [])
    values = load_profile(profile)
    check_watched(profile, values, root)
    if part:
        if fresh or resume_from:
            raise ConfigError("A part of a step can't start afresh by itself; run the whole step so, or without it.")
        counts = run_part(step, values, root, Part.parse(part))
        print(f"{step} {part}: {counts['made']} shards made, {counts['kept']} kept; to be committed by the whole run")
        return
    stage = find_stage(step)
    if imported(stage, root):
        print(f"{step}: {stage.home} was imported, and is kept as it is; delete it to have it made here")
        return
    if "DVC_STAGE" in os.environ and not stage.external and finished(step, values, root):
        print(f"{step}: finished before, with the same inputs, parameters and code")
        return
    if fresh and _speaks():
        restart(step, values, root)
    if resume_from and _speaks():
        resume(step, values, root, resume_from)
    processes = processes or count_processes(stage)
    if processes > 1:
        make_parts(step, profile, root, processes)
    manifest = run_stage(step, values, root)
    if not _speaks():
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["reasons"].items())
    usage = ", ".join(f"{name} {amount:,.10g}" for name, amount in manifest["facts"].get("usage", {}).items())
    print(
        f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, {manifest['quarantined']} quarantined"
        + (f" ({reasons})" if reasons else "")
        + (f"; it took {usage}" if usage else "")
    )


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="A bundled profile's name.")],
    root: Root = Path("."),
) -> None:
    """Choose the profile that `dvc repro` runs; writes params.yaml."""
    from components.pipeline.profiles import use_profile

    if not (root / "dvc.yaml").is_file():
        raise ConfigError(f"There is no dvc.yaml in {root.resolve()}; go to the project's folder, or give its --root.")
    for key, path in use_profile(profile, root).items():
        there = "" if (root / path).exists() else f" (not there yet: `univigu rehearse --profile {profile}`)"
        print(f"{key:<12} {path}{there}")


@app.command()
def steps() -> None:
    """List the steps, in the order in which they run."""
    from components.pipeline.stages import STAGES

    for stage in STAGES:
        print(f"{stage.name:<20} {', '.join(stage.inputs.values()) or '-'} -> {stage.home}")


@app.command()
def status(profile: Profile = "tiny", settings: Settings = None, root: Root = Path(".")) -> None:
    """Say which steps are finished, what would start the others again, and what is set aside."""
    from components.pipeline.aside import list_kept
    from components.pipeline.freshness import why_not_finished
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.stages import STAGES

    values = load_profile(with_settings(profile, settings or []))
    for stage in STAGES:
        print(f"{stage.name:<20} {why_not_finished(stage.name, values, root) or 'finished'}")
    for folder in list_kept(root.resolve()):
        print(f"set aside            {folder}")


@app.command()
def clean(root: Root = Path(".")) -> None:
    """Remove outputs and unfinished runs; paid answers, what is set aside, the registry and DVC's cache stay."""
    from components.pipeline.clean import clean as remove

    remove(root)


@app.command(hidden=True)
def code(profile: Profile = "tiny", root: Root = Path(".")) -> None:
    """Write what dvc.yaml watches: the digest of what each step's code does, and the profile with all that it extends.

    They are .univigu/code.json and .univigu/profile.json.
    """
    from components.pipeline.fingerprint import code_digest, stage_code
    from components.pipeline.profiles import load_profile
    from components.pipeline.stages import STAGES
    from components.pipeline.state import STATE
    from univigu.files import write_json

    values = load_profile(profile)
    (root / STATE).mkdir(exist_ok=True)
    write_json(root / STATE / "code.json", {stage.name: code_digest(stage_code(stage, values)) for stage in STAGES})
    write_json(root / STATE / "profile.json", values)


@app.command()
def summary(root: Root = Path(".")) -> None:
    """Show what the last run did: steps, times, rows, scores, the registered version; writes reports/run.json."""
    from components.cli.summary import show, summarise

    show(root, summarise(root))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="The folder that becomes the base, replaced as a whole.")],
    work: Annotated[Path, typer.Option(help="Where checkpoints are kept; run again to go on from them.")] = Path(
        ".univigu/pretrain"
    ),
    settings: Annotated[
        Path | None, typer.Option(help="A YAML file of sizes and steps; without it, those of the bundled base.")
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="Run only this phase; may be given again.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="The recogniser's folder; by default its own.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Held-out items, whose prompts are not trained on.")] = Path(
        "data/heldout.json"
    ),
) -> None:
    """Make the bundled base from nothing: hours on one core (`--out model/tiny-wan` replaces the bundled one)."""
    from components.digits import pretrain as pretraining

    config = pretraining.load_config(settings or pretraining.DEFAULT_CONFIG)
    scores = pretraining.pretrain(
        out,
        work,
        config,
        tuple(phase or pretraining.PHASES),
        recogniser or pretraining.recogniser_training.BUNDLED,
        heldout,
    )
    for name, value in scores.items():
        print(f"{name:<22} {value:.3f}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="What to measure; without a name, the names are listed.")] = "",
    root: Root = Path("."),
) -> None:
    """Measure a claim about speed or cost against something else, and write reports/bench-NAME.json."""
    import json

    from components import bench

    if not name:
        print("\n".join(bench.benchmarks()))
        return
    print(json.dumps(bench.run(name, root), indent=1, ensure_ascii=False))


def keep_libraries_quiet() -> None:
    """Warnings, log lines and loading bars of libraries are for developers; people see what the command says.

    Set UNIVIGU_VERBOSE=1 to see them. Nothing calls home, and nothing is fetched from a hub unless HF_HUB_OFFLINE=0.
    """
    quiet = {"TQDM_DISABLE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    verbose = os.environ.get("UNIVIGU_VERBOSE") == "1"
    for name, value in {**({} if verbose else quiet), **offline, "GX_ANALYTICS_ENABLED": "false"}.items():
        os.environ.setdefault(name, value)
    if not verbose:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # with tracebacks, of what the command then says in a sentence


def _speaks() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _end(error: UniViGUError) -> NoReturn:
    if _speaks() or not isinstance(error, PreemptedError):
        print(f"univigu: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command; an expected failure is one sentence on standard error and its own exit code."""
    keep_libraries_quiet()
    bound_spinning()
    # Collections while torch is imported, and the last one through all of it, take seconds.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    try:
        app()
    except UniViGUError as error:
        _end(error)
    except OSError as error:
        fault = storage_fault(error, Path.cwd())
        if fault is None:
            raise
        _end(fault)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # what typer makes of a KeyboardInterrupt
            print("univigu: stopped; the same command goes on where it was.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
