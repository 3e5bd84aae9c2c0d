"""`univigu study`: the arms of the study, run, and shown with their intervals."""

from pathlib import Path
from typing import Annotated

import typer

from components.pipeline.progress import activity
from univigu.errors import UniViGUError

app = typer.Typer(help="Train and evaluate the arms of the study, and report what each choice does to the scores.")

Budget = Annotated[str, typer.Option(help="short (one seed, few steps) or full (three seeds, the profile's steps).")]
Declared = Annotated[
    Path | None, typer.Option("--arms", help="The file that declares the arms. (default: the bundled one)")
]
Root = Annotated[Path, typer.Option(help="The work root, which holds the base, the prompts and the held-out set.")]


@app.command("list")
def list_arms(budget: Budget = "short", arms: Declared = None, root: Root = Path(".")) -> None:
    """List the arms: what each asks, which steps it changes, and whether it has run."""
    from components.bench.study.arms import changed_steps, load_study
    from components.bench.study.results import status

    study = load_study(*[arms] if arms else [])
    for arm in study.chosen(budget):
        states = status(study, arm, budget, root)
        done = sum(state == "finished" for state in states.values())
        failed = "".join(f"; seed {seed} failed" for seed, state in states.items() if state not in ("", "finished"))
        steps = ", ".join(changed_steps(study, arm, budget)) or "no step"
        print(f"{arm.name:<22} {arm.family:<11} {done} of {len(states)} finished{failed}; changes {steps}")
        print(f"{'':<22} {arm.question}")
    for probe in study.probes:
        if budget in probe.budgets:
            print(f"{probe.name:<22} {probe.family:<11} evaluates {probe.of or study.reference} and trains nothing")
            print(f"{'':<22} {probe.question}")


@app.command()
def run(
    arm: Annotated[list[str] | None, typer.Argument(help="Names of arms. (default: all)", show_default=False)] = None,
    budget: Budget = "short",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Arms that run at a time. (default: 2, or 1 on one core)", show_default=False),
    ] = None,
    arms: Declared = None,
    root: Root = Path("."),
) -> None:
    """Run arms, then write reports/study.json and reports/study.html.

    Everything resumes: finished arms are verified and kept, and a killed arm continues at its last checkpoint. An arm
    that fails is named at the end, and the others are reported.
    """
    from components.bench.study.arms import check_arms, load_study
    from components.bench.study.run import run_study
    from components.pipeline.processes import usable_cores

    study = load_study(*[arms] if arms else [])
    chosen = study.chosen(budget, arm)
    check_arms(study, budget, chosen)
    outcomes = run_study(study, budget, chosen, root, jobs or min(2, usable_cores()))
    failed = [one for one in outcomes if one.failure]
    if len(failed) < len(outcomes):
        show(budget, arms, root)
    if failed:
        reasons = "\n  ".join(f"{one.arm}, seed {one.seed}: {one.failure}" for one in failed)
        raise UniViGUError(f"{len(failed)} of {len(outcomes)} arms failed; run them again to retry:\n  {reasons}")


@app.command()
def show(budget: Budget = "short", arms: Declared = None, root: Root = Path(".")) -> None:
    """Write reports/study.json and reports/study.html from the finished arms, and print the scores."""
    from components.bench.study.arms import load_study
    from components.bench.study.page import answer, write_page
    from components.bench.study.results import COMPARED, write_report
    from components.bench.study.shown import read_shown

    study = load_study(*[arms] if arms else [])
    with activity("Reading the finished arms"):
        report, evaluated = write_report(study, budget, root)
        page = write_page(report, evaluated, read_shown(study, budget, root, evaluated), root)
    print("\n".join(answer(report)))
    for ran in evaluated:
        figures = report[ran.arm.family][ran.arm.name]
        scores = [(task, figures[task]) for task in COMPARED if task in figures]
        shown = "  ".join(
            f"{task} {score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})" for task, score in scores
        )
        print(f"{ran.arm.name:<22} {shown}  seeds {len(ran.tasks)}")
    for name, probe in report["about"]["probes"].items():
        if probe["seeds"]:
            figures = report[probe["family"]][name]
            score, seconds = figures["captions"], figures["seconds_per_caption"]["value"]
            shown = f"captions {score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})  {seconds:.3f} s each"
            print(f"{name:<22} {shown}  seeds {len(probe['seeds'])}")
    print(f"The table, with differences, learning curves and samples, is in {page}.")
