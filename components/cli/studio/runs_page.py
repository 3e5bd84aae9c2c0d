"""The page of runs: what trains now, how each step ended, and the curves and samples of training runs."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from components.cli.studio import runs, training
from components.cli.studio.choices import choice, number
from components.cli.studio.work import Studio, attempt, explain, note, render

EVERY_S = 5.0  # between two looks at what trains
SHOWN = 2  # runs whose curves are shown first
COLUMNS = ("run", "step", "value")


def build(studio: Studio, app: gr.Blocks) -> None:
    """The page's components and what they do."""
    page = RunsPage(studio)
    now = gr.HTML()
    with gr.Row(equal_height=True):
        step_name = gr.Dropdown(label="Training step", choices=list(training.STEPS), elem_id="training-step")
        stop, resume = (
            gr.Button("Stop and save", elem_id="training-stop", scale=0),
            gr.Button("Resume", elem_id="training-resume", scale=0),
        )
    told = gr.HTML(elem_id="training-said")
    results = gr.HTML()
    gr.HTML("<h2>Curves</h2>")
    said = gr.HTML()
    with gr.Row():
        chosen = choice("Training runs", "runs", several=True)
        metric = choice("Metric of training", "metric")
        heldout = choice("Metric of held-out samples", "heldout")
    with gr.Row():
        curves = gr.LinePlot(x="step", y="value", color="run", title="Training", height=320, min_width=320)
        heldout_curves = gr.LinePlot(x="step", y="value", color="run", title="Held out", height=320, min_width=320)
    gr.HTML("<h2>Samples on the way</h2>")
    step = choice("Step (of the first chosen run)", "step")
    samples = gr.HTML()

    app.load(page.now, None, now, api_name="runs_now")
    app.load(page.results, None, results, api_name="runs_results")
    gr.Timer(EVERY_S).tick(page.now, None, now, api_visibility="private", show_progress="hidden")
    stop.click(page.stop, step_name, told, api_name="stop_training", concurrency_limit=1)
    resume.click(page.resume, step_name, told, api_name="resume_training", concurrency_limit=1)
    choices = [chosen, metric, heldout]
    app.load(page.choose, choices, [said, *choices], api_name="runs").then(
        page.draw, choices, [curves, heldout_curves], api_name="curves"
    ).then(page.show_samples, [chosen, step], [step, samples], api_name="samples")
    for one in choices:
        one.input(page.draw, choices, [curves, heldout_curves], api_visibility="private")
    chosen.input(lambda ids: page.show_samples(ids, None), [chosen], [step, samples], api_visibility="private")
    step.input(page.show_samples, [chosen, step], [step, samples], api_visibility="private")
    seldom = gr.Timer(6 * EVERY_S)
    seldom.tick(page.results, None, results, api_visibility="private", show_progress="hidden")
    seldom.tick(page.draw_again, choices, [curves, heldout_curves], api_visibility="private", show_progress="hidden")


class RunsPage:
    """What the page shows of a work root; every function answers with values of Gradio's components."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def now(self) -> str:
        """What trains now, and how each step ended last."""
        return attempt(lambda: render("runs.html.j2", **runs.read_work(self.studio.root)))

    def results(self) -> str:
        """Held-out losses by time, and the scores of the last evaluation."""
        return attempt(lambda: render("results.html.j2", **runs.read_results(self.studio.root)))

    def stop(self, step: str | None) -> str:
        """Stop a training step of this machine, with its progress saved."""
        return attempt(lambda: note(training.stop(self.studio.root, step or "")))

    def resume(self, step: str | None) -> str:
        """Continue a training step that was stopped."""
        return attempt(lambda: note(training.resume(self.studio, step or "")))

    def choose(self, ids: Sequence[str] | None, metric: str | None, heldout: str | None) -> list[Any]:
        """A message, and the choices of runs and metrics."""
        try:
            found = runs.list_runs(self.studio)
        except Exception as error:
            return [note(explain(error)), *[gr.Dropdown(choices=[], value=None) for _ in range(3)]]
        if not found:
            empty = note("No training run is recorded here yet. `univigu run train-stage-1` or `make demo` starts one.")
            return [empty, *[gr.Dropdown(choices=[], value=None) for _ in range(3)]]
        known = {run.id for run in found}
        ids = [one for one in ids or () if one in known] or [run.id for run in found[:SHOWN]]
        losses, held = runs.list_metrics(found)
        return [
            "",
            gr.Dropdown(choices=[(run.label, run.id) for run in found], value=ids),
            gr.Dropdown(choices=losses, value=metric if metric in losses else losses[0]),
            gr.Dropdown(choices=held, value=heldout if heldout in held else next(iter(held), None)),
        ]

    def draw(self, ids: Sequence[str] | None, metric: str | None, heldout: str | None) -> list[Any]:
        """The curves of both metrics over the chosen runs."""
        import pandas as pd

        try:
            found = self._chosen(ids)
            curves = [runs.read_curves(self.studio, found, name) if name else [] for name in (metric, heldout)]
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error
        return [
            gr.LinePlot(value=pd.DataFrame(points, columns=list(COLUMNS)), title=name or "no metric")
            for points, name in zip(curves, (metric, heldout), strict=True)
        ]

    def draw_again(self, ids: Sequence[str] | None, metric: str | None, heldout: str | None) -> list[Any]:
        """The same while one of the runs goes on."""
        with suppress(Exception):  # it is said when the page is opened, not every time
            if all(run.ended for run in self._chosen(ids)):
                return [gr.skip(), gr.skip()]
        return self.draw(ids, metric, heldout)

    def show_samples(self, ids: Sequence[str] | None, step: Any) -> list[Any]:
        """The steps at which the first chosen run drew samples, and the samples of one of them."""
        try:
            found = self._chosen(ids)
            steps = runs.read_run_samples(self.studio, found[0]) if found else {}
        except Exception as error:
            return [gr.Dropdown(choices=[], value=None), note(explain(error))]
        if not steps:
            return [gr.Dropdown(choices=[], value=None), note("No samples are recorded for this run.") if found else ""]
        chosen = number(step)
        step = chosen if chosen in steps else max(steps)
        return [gr.Dropdown(choices=sorted(steps), value=step), render("samples.html.j2", step=step, rows=steps[step])]

    def _chosen(self, ids: Sequence[str] | None) -> list[runs.Run]:
        """The runs with these ids, in their order."""
        found = {run.id: run for run in runs.list_runs(self.studio)} if ids else {}
        return [found[one] for one in ids or () if one in found]
