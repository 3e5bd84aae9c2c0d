"""The page of data: each clip of the run with its prompt, caption, scores and verdict."""

from typing import Any

import gradio as gr

from components.cli.studio import clips
from components.cli.studio.choices import choice, number
from components.cli.studio.work import Studio, explain, note, render


def build(studio: Studio, app: gr.Blocks) -> None:
    """The page's components and what they do."""
    page = DataPage(studio)
    with gr.Row():
        verdict = choice("Verdict", "verdict")
        stage = gr.Dropdown(label="Training stage", choices=[("any", 0), ("1", 1), ("2", 2)], value=0, elem_id="stage")
        text = gr.Textbox(label="Text in the prompt or caption", max_length=clips.LONGEST_SEARCH, elem_id="search")
    with gr.Row():
        back = gr.Button("Previous page")
        at = gr.Number(label="Page", value=1, minimum=1, precision=0, elem_id="page")
        ahead = gr.Button("Next page")
    found = gr.HTML()

    query, shown = [verdict, stage, text], [verdict, at, found]
    app.load(page.show, [*query, at], shown, api_name="clips")
    for event in (verdict.input, stage.input, text.submit):
        event(page.show, query, shown, api_visibility="private")
    at.submit(page.show, [*query, at], shown, api_visibility="private")
    back.click(page.show_previous, [*query, at], shown, api_visibility="private")
    ahead.click(page.show_next, [*query, at], shown, api_visibility="private")


class DataPage:
    """What the page shows of a work root; every function answers with values of Gradio's components."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def show(self, verdict: str | None, stage: Any, text: str | None, page: Any = 1) -> list[Any]:
        """The choice of verdicts, the number of the page that is shown, and its clips."""
        try:
            counts = clips.count_verdicts(self.studio.root)
            verdict = verdict if verdict in counts else ""
            query = clips.Query(verdict, number(stage) or 0, (text or "").strip())
            found = clips.find(self.studio.root, query, number(page) or 1)
        except Exception as error:
            return [gr.Dropdown(choices=[], value=None), 1, note(explain(error))]
        labels = [("any", ""), *((f"{name} ({count})", name) for name, count in counts.items())]
        page_html = render("clips.html.j2", found=found, first=(found.page - 1) * clips.PAGE + 1)
        return [gr.Dropdown(choices=labels, value=verdict), found.page, page_html]

    def show_previous(self, verdict: str | None, stage: Any, text: str | None, page: Any) -> list[Any]:
        """The page before."""
        return self.show(verdict, stage, text, (number(page) or 1) - 1)

    def show_next(self, verdict: str | None, stage: Any, text: str | None, page: Any) -> list[Any]:
        """The page after."""
        return self.show(verdict, stage, text, (number(page) or 0) + 1)
