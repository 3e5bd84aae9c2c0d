"""The `univigu` command. Each command imports what it needs when it runs, so that `univigu --help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from univigu.errors import UniViGUError

from components.pipeline import commands

app = typer.Typer(
    name="univigu",
    help="Uni-ViGU: generate video from text, describe video in text, or make both jointly - and train the model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

commands.add_to(app)

Profile = Annotated[str, typer.Option(help="A bundled profile's name, or the path of a YAML file.")]
Root = Annotated[Path, typer.Option(help="The work root: every path a step reads or writes lies below it.")]


@app.command()
def run(
    step: Annotated[str, typer.Argument(help="The step's name; `univigu steps` lists them.")],
    profile: Profile = "tiny",
    root: Root = Path("."),
) -> None:
    """Run one step of the pipeline on the outputs of the steps before it (`dvc repro` runs them all)."""
    from components.pipeline.profiles import load_profile
    from components.pipeline.runner import run_stage

    manifest = run_stage(step, load_profile(profile), root)
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["reasons"].items())
    print(
        f"{step}: {manifest['rows_in']} rows in, {manifest['rows_out']} out, {manifest['quarantined']} quarantined"
        + (f" ({reasons})" if reasons else "")
    )


@app.command()
def steps() -> None:
    """List the steps, in the order in which they run."""
    from components.pipeline.stages import STAGES

    for stage in STAGES:
        print(f"{stage.name:<20} {', '.join(stage.inputs.values()) or '-'} -> {stage.home}")


@app.command()
def summary(root: Root = Path(".")) -> None:
    """Show what the last run did: steps, times, rows, scores, the registered version; writes reports/run.json."""
    from components.pipeline.summary import show, summarise

    show(root, summarise(root))


def main() -> None:
    """Run the command; an expected failure is one sentence on standard error and its own exit code."""
    try:
        app()
    except UniViGUError as error:
        print(f"univigu: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
