"""The part of the page of models in which two versions are compared without their names."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from components.cli.studio import pairs
from components.cli.studio.choices import choice, number
from components.cli.studio.pairs import Shown
from components.cli.studio.work import Studio, explain, note, render
from components.registry.votes import CHOICES, Pair
from univigu.errors import BadInputError

BALLOT = ("The left one is better", "The right one is better", "Neither is better")


def build(studio: Studio, name: gr.Dropdown) -> gr.Dropdown:
    """The components and what they do; returns the choice of versions, which the page fills."""
    part = Comparison(studio)
    gr.HTML("<h2>Compare two versions blind</h2>")
    both = choice("Two versions", "compare-versions", several=True)
    prompts = gr.Textbox(label="Prompts", info="One on each line.", lines=3, elem_id="compare-prompts")
    with gr.Row():
        seed = gr.Number(label="Seed", value=0, minimum=0, precision=0, elem_id="compare-seed")
        make = gr.Button("Make both", elem_id="compare-make")
    said, pair = gr.HTML(elem_id="voted"), gr.HTML(elem_id="pair")
    with gr.Row(visible=False) as ballot:
        buttons = {side: gr.Button(label, elem_id=f"vote-{side}") for side, label in zip(CHOICES, BALLOT, strict=True)}
    left = gr.State([])
    shown = [said, pair, ballot, left]
    asked = [name, both, prompts, seed]
    make.click(_with_progress(part), asked, shown, api_name="compare", concurrency_limit=1, concurrency_id="model")
    for side, button in buttons.items():
        button.click(partial(part.vote, side), left, shown, api_name=f"vote_{side}", concurrency_limit=1)
    return both


def _with_progress(part: "Comparison") -> Any:
    def compare(
        name: str | None,
        versions: Any,
        prompts: str,
        seed: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        progress(0, desc="loading the models")
        return part.compare(
            name, versions, prompts, seed, lambda done: progress((done, None), desc="generating", unit="videos")
        )

    return compare


class Comparison:
    """Every function answers with what is said, the pair that is shown, the ballot, and the pairs that are left.

    The pairs that are left are (name of the model, number of all pairs, pairs); the first of them is shown.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def compare(self, name: str | None, versions: Any, prompts: str, seed: Any, progress: Any) -> list[Any]:
        """Make a pair for each prompt, and show the first."""
        try:
            chosen = [one for version in versions or [] if (one := number(version))]
            if not name or len(chosen) != 2:
                raise BadInputError("Choose exactly two versions to compare.")
            first = number(seed)
            drawn = -1 if first is None else first
            made = pairs.make_pairs(self.studio, name, chosen[0], chosen[1], prompts or "", drawn, progress)
        except Exception as error:
            return [_error(error), "", gr.Row(visible=False), []]
        return ["", *self._next((name, len(made), made))]

    def vote(self, side: str, left: Any) -> list[Any]:
        """Record a vote about the pair that is shown, reveal the names, and show the next pair."""
        try:
            if not left:
                raise BadInputError("No pair is shown; make pairs first.")
            name, count, shown = left
            said = note(pairs.vote(self.studio, name, Pair(*shown[0][0]), side))
        except Exception as error:
            return [_error(error), gr.skip(), gr.skip(), left]
        return [said, *self._next((name, count, shown[1:]))]

    def _next(self, left: tuple[str, int, Sequence[Any]]) -> list[Any]:
        _, count, waiting = left
        if not waiting:
            return [
                note("There are no more pairs. The votes are beside the scores of each version."),
                gr.Row(visible=False),
                [],
            ]
        shown = Shown(Pair(*waiting[0][0]), *waiting[0][1:])
        page = render("pair.html.j2", shown=shown, number=count - len(waiting) + 1, count=count)
        return [page, gr.Row(visible=True), left]


def _error(error: Exception) -> str:
    return render("note.html.j2", sentence=explain(error), role="alert")
