"""The page on which one makes videos and captions, and the gallery of what was made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradio as gr

from components.cli.studio import gallery, sampling
from components.cli.studio.choices import number
from components.cli.studio.sampling import Made, Model, Token
from components.cli.studio.work import Studio, attempt, explain, note, render
from univigu.errors import BadInputError

OWN = "empty: the model's own"
# Fields of text, because Gradio's fields of numbers can't be empty: a browser shows 0.
OPTIONAL: dict[str, Callable[[str], float]] = {"steps": int, "guidance": float, "temperature": float, "text_at": float}
Trace = list[tuple[float, list[Token]]]


class Inputs(NamedTuple):
    """The fields of a task, by the names that `sampling` gives them."""

    names: tuple[str, ...]
    fields: list[Any]

    def asked(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The values by name; raises `BadInputError` for a field that should have a number and hasn't."""
        given = dict(zip(self.names, values, strict=True))
        return {name: read_number(name, value) if name in OPTIONAL else value for name, value in given.items()}


def build(studio: Studio, app: gr.Blocks) -> None:
    """The page's components and what they do."""
    page = CreatePage(studio)
    which = gr.HTML()
    with gr.Tabs():
        with gr.Tab("Generate", id="generate"):
            generate, generating = _inputs("prompt", "negative_prompt", "steps", "guidance", "seed"), _go("Generate")
        with gr.Tab("Caption", id="caption"):
            file = gr.File(label=f"Video, at most {sampling.LARGEST_FILE >> 20} MB", elem_id="file")
            caption, captioning = _inputs("steps", "guidance", "temperature", "seed"), _go("Caption")
        with gr.Tab("Both jointly", id="joint"):
            names = ("prompt", "negative_prompt", "steps", "guidance", "temperature", "text_at", "in_step", "seed")
            joint, jointly = _inputs(*names), _go("Make both")
    made = gr.HTML()
    trace = gr.State([])
    with gr.Group(visible=False) as over_time:
        moment = gr.Slider(0, 1, step=1, label="Text step", elem_id="moment")
        tokens = gr.HTML(padding=True)
    gr.HTML("<h2>Gallery</h2>")
    at, results = gr.Number(label="Page of the gallery", value=1, minimum=1, precision=0), gr.HTML()

    shown = [made, trace, over_time, moment, tokens, at, results]
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}

    def run_generate(*values: Any, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008 (Gradio's way)
        return page.make(lambda tell: sampling.generate(studio, page.model, generate.asked(values), tell), progress)

    def run_caption(path: str | None, *values: Any, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        return page.make(lambda tell: sampling.caption(studio, page.model, path, caption.asked(values), tell), progress)

    def run_joint(*values: Any, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        return page.make(lambda tell: sampling.joint(studio, page.model, joint.asked(values), tell), progress)

    generating.click(run_generate, generate.fields, shown, api_name="generate", **one_at_a_time)
    captioning.click(run_caption, [file, *caption.fields], shown, api_name="caption", **one_at_a_time)
    jointly.click(run_joint, joint.fields, shown, api_name="joint", **one_at_a_time)
    moment.input(page.show_tokens, [trace, moment], tokens, api_visibility="private", show_progress="hidden")
    app.load(page.which, None, which, api_name="which")
    app.load(page.show_gallery, at, [at, results], api_name="gallery")
    at.submit(page.show_gallery, at, [at, results], api_visibility="private")


def read_number(name: str, text: str | None) -> float | None:
    """The number in a field that may be empty; raises `BadInputError` if it is none."""
    if not text or not text.strip():
        return None
    try:
        return OPTIONAL[name](text.strip())
    except ValueError as error:
        kind = "a whole number" if OPTIONAL[name] is int else "a number"
        raise BadInputError(f"The field '{name}' has '{text.strip()[:40]}'; give {kind}, or leave it empty.") from error


def _go(label: str) -> gr.Button:
    return gr.Button(label, variant="primary")


def _inputs(*names: str) -> Inputs:
    """The fields of a task, in this order."""
    make: dict[str, Callable[[], Any]] = {
        "prompt": lambda: gr.Textbox(label="Prompt", lines=2, max_length=sampling.LONGEST_PROMPT),
        "negative_prompt": lambda: gr.Textbox(label="Negative prompt", max_length=sampling.LONGEST_PROMPT),
        "steps": lambda: gr.Textbox(label="Steps", info=OWN),
        "guidance": lambda: gr.Textbox(label="Guidance", info=f"{OWN}; 1 is none"),
        "temperature": lambda: gr.Textbox(label="Temperature of the text", info=f"{OWN}; 0 is greedy"),
        "text_at": lambda: gr.Textbox(label="Text at the video's time", info=f"{OWN}; 0 to 1"),
        "in_step": lambda: gr.Checkbox(label="In lockstep (eq 18)", value=False),
        "seed": lambda: gr.Number(label="Seed", value=0, minimum=0, precision=0),
    }
    texts = [name for name in names if name.endswith("prompt")]
    fields = {name: make[name]() for name in texts}
    with gr.Row():
        fields |= {name: make[name]() for name in names if name not in texts}
    return Inputs(names, [fields[name] for name in names])


class CreatePage:
    """What the page does; every function answers with values of Gradio's components."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.model = studio, Model(studio)

    def which(self) -> str:
        """Which model the next result is made with."""
        return attempt(lambda: render("which.html.j2", label=self.model.label()))

    def make(self, task: Callable[[sampling.Progress], Made], progress: gr.Progress) -> list[Any]:
        """Run a task and show its result, its tokens over time, and the gallery; or its error."""
        progress(0, desc="loading the model")
        try:
            made = task(lambda step: progress((step, None), desc="sampling", unit="steps"))
        except Exception as error:
            failed = render("note.html.j2", sentence=explain(error), role="alert")
            return [failed, [], gr.Group(visible=False), gr.Slider(value=0), "", gr.skip(), gr.skip()]
        last = len(made.trace) - 1
        return [
            render("made.html.j2", results=[made.result], notes=made.notes),
            made.trace,
            gr.Group(visible=last > 0),
            gr.Slider(minimum=0, maximum=max(1, last), value=max(0, last)),
            self.show_tokens(made.trace, last),
            *self.show_gallery(1),
        ]

    def show_tokens(self, trace: Trace, step: Any) -> str:
        """The text after a step, each token with the probability that its place names it."""
        step = number(step)
        if step is None or step >= len(trace):
            return ""
        tau, tokens = trace[step]
        return render("tokens.html.j2", tau=tau, tokens=[Token(*token) for token in tokens])

    def show_gallery(self, page: Any) -> list[Any]:
        """The number of the page that is shown, and its results."""
        try:
            found, page, pages = gallery.list_results(self.studio.root, number(page) or 1)
        except Exception as error:
            return [1, note(explain(error))]
        if not found:
            return [1, note("Nothing was made here yet; write a prompt above, or drop a video.")]
        return [page, render("gallery.html.j2", results=found, page=page, pages=pages)]
