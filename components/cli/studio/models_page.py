"""The page of registered models: versions, scores, origins, and changes of champion."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from components.cli.studio import comparison, registered
from components.cli.studio.choices import choice, number
from components.cli.studio.registered import Champions
from components.cli.studio.work import Studio, attempt, explain, note, render

NO_MODEL = "No model is registered in this work root. `make demo` trains and registers one."


def build(studio: Studio, app: gr.Blocks) -> None:
    """The page's components and what they do."""
    page = ModelsPage(studio)
    with gr.Row():
        name = choice("Registered model", "model-name")
        version = choice("Version", "model-version")
        reload = gr.Button("Read again", scale=0)
    versions = gr.HTML()
    both = comparison.build(studio, name)
    gr.HTML("<h2>Change the champion</h2>")
    why = gr.Textbox(label="Reason", info="It is recorded in the history.", elem_id="why")
    with gr.Row():
        person = gr.Textbox(label="Your name (optional)", elem_id="person")
        force = gr.Checkbox(label="even if it is not better", elem_id="force")
    with gr.Row():
        promote, roll_back = gr.Button("Promote this version", variant="primary"), gr.Button("Roll back")
    said, details, history, seen = gr.HTML(), gr.HTML(), gr.HTML(), gr.State(Champions(0, 0))

    shown = [name, version, versions, details, history, both, seen]
    asked = [name, version]
    app.load(page.show, asked, shown, api_name="models")
    reload.click(page.show, asked, shown, api_visibility="private")
    name.input(lambda chosen: page.show(chosen, None), [name], shown, api_visibility="private")
    version.input(page.show_version, asked, details, api_name="version")
    fields = [why, person, force]
    promote.click(
        page.promote, [*asked, *fields, seen], [said, *fields, *shown], api_name="promote", concurrency_limit=1
    )
    roll_back.click(
        page.roll_back, [*asked, *fields, seen], [said, *fields, *shown], api_name="rollback", concurrency_limit=1
    )


class ModelsPage:
    """What the page shows of a work root; every function answers with values of Gradio's components."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def show(self, name: str | None, version: Any) -> list[Any]:
        """The choices, the table of versions, the chosen version, the history, and the champions that are shown."""
        try:
            names = registered.list_names(self.studio)
            name = name if name in names else next(iter(names), None)
            if name is None:
                return self._nothing(NO_MODEL)
            rows = registered.list_versions(self.studio, name)
            known = registered.champions(self.studio, name)
        except Exception as error:
            return self._nothing(explain(error))
        numbers = [row["version"] for row in rows]
        version = number(version)
        chosen = version if version in numbers else (known.champion or next(iter(numbers), None))
        labels = [(" ".join([str(row["version"]), *row["aliases"]]), row["version"]) for row in rows]
        return [
            gr.Dropdown(choices=names, value=name),
            gr.Dropdown(choices=labels, value=chosen),
            render("versions.html.j2", name=name, rows=rows),
            self.show_version(name, chosen),
            attempt(lambda: render("history.html.j2", lines=registered.read_history(self.studio, name))),
            gr.Dropdown(choices=labels, value=numbers[:2] if len(numbers) > 1 else []),
            known,
        ]

    def show_version(self, name: str | None, version: Any) -> str:
        """The scores, comparison and origins of a version."""
        version = number(version)
        if not name or not version:
            return ""
        return attempt(
            lambda: render("version.html.j2", version=version, **registered.describe(self.studio, name, version))
        )

    def promote(self, name: str | None, version: Any, why: str, person: str, force: bool, seen: Champions) -> list[Any]:
        """Promote, say what was decided, and show everything again."""
        version = number(version)
        if not name or not version:
            return [note("There is no version to promote."), why, person, force, *self.show(name, version)]
        decide = lambda: registered.promote(self.studio, name, version, why, person, force, Champions(*seen))  # noqa: E731
        return self._decide(decide, name, version, (why, person, force))

    def roll_back(
        self, name: str | None, version: Any, why: str, person: str, force: bool, seen: Champions
    ) -> list[Any]:
        """Roll back, say what was done, and show everything again."""
        if not name:
            return [note("There is no model to roll back."), why, person, force, *self.show(name, version)]
        decide = lambda: registered.roll_back(self.studio, name, why, person, Champions(*seen))  # noqa: E731
        return self._decide(decide, name, version, (why, person, force))

    def _decide(self, decide: Callable[[], str], name: str, version: Any, given: tuple[str, str, bool]) -> list:
        """The result of a decision; the reason stays in its field if nothing was decided."""
        try:
            said, fields = note(decide()), ("", given[1], False)
        except Exception as error:
            said, fields = render("note.html.j2", sentence=explain(error), role="alert"), given
        return [said, *fields, *self.show(name, version)]

    def _nothing(self, why: str) -> list[Any]:
        empty = gr.Dropdown(choices=[], value=None)
        return [empty, empty, note(why), "", "", gr.Dropdown(choices=[], value=[]), Champions(0, 0)]
