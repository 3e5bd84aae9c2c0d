"""The page on which one makes videos and captions, and the gallery of what was made."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import gradio as gr

from components.cli import adapters
from components.cli.studio import gallery, sampling
from components.cli.studio.choices import choice, number
from components.cli.studio.sampling import Made, Model
from components.cli.studio.tracing import Moment, Progress, Token, picture
from components.cli.studio.work import Studio, attempt, explain, note, render
from univigu.errors import BadInputError

OWN = "empty: the model's own"
# Fields of text, because Gradio's fields of numbers can't be empty: a browser shows 0.
OPTIONAL: dict[str, Callable[[str], float]] = {
    "steps": int,
    "guidance": float,
    "temperature": float,
    "text_at": float,
    "lora_scale": float,
}
LIVE_S = 0.3  # seconds at least between two looks at a result on the way


class Seen(NamedTuple):
    """A step of a run that is under way."""

    step: int
    moment: Moment


class Inputs(NamedTuple):
    """The fields of a task, by the names that `sampling` gives them."""

    names: tuple[str, ...]
    fields: list[Any]

    def field(self, name: str) -> Any:
        return self.fields[self.names.index(name)]

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
            names = ("prompt", "negative_prompt", "steps", "guidance", "lora", "lora_scale", "seed")
            generate, generating = _inputs(*names), _go("Generate")
        with gr.Tab("Caption", id="caption"):
            file = gr.File(label=f"Video, at most {sampling.LARGEST_FILE >> 20} MB", elem_id="file")
            caption, captioning = _inputs("steps", "guidance", "temperature", "seed"), _go("Caption")
        with gr.Tab("Both jointly", id="joint"):
            names = (*names[:4], "temperature", "text_at", "in_step", *names[4:])
            joint, jointly = _inputs(*names), _go("Make both")
    stop, stopping = gr.Button("Stop, and keep what is there", elem_id="stop"), gr.HTML()
    made, looked = gr.HTML(), gr.HTML(elem_id="looked")
    # the script writes here which word was clicked; each word is a button
    word, look = gr.Textbox(visible="hidden", elem_id="look-at"), gr.Button(visible="hidden", elem_id="look")
    trace, mine = gr.State([]), gr.State(lambda: secrets.token_hex(8))
    with gr.Group(visible=False) as over_time:
        moment = gr.Slider(0, 1, step=1, label="Step", elem_id="moment")
        seen = gr.HTML(padding=True, elem_id="seen")
    gr.HTML("<h2>Gallery</h2>")
    at, results = gr.Number(label="Page of the gallery", value=1, minimum=1, precision=0), gr.HTML()

    shown = [made, trace, over_time, moment, seen, at, results]
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}

    def run_generate(who: str, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008 (Gradio's way)
        task = lambda tell: sampling.generate(studio, page.model, generate.asked(values), tell)  # noqa: E731
        yield from page.make(who, task, progress)

    def run_caption(who: str, path: Any, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        task = lambda tell: sampling.caption(studio, page.model, path, caption.asked(values), tell)  # noqa: E731
        yield from page.make(who, task, progress)

    def run_joint(who: str, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        task = lambda tell: sampling.joint(studio, page.model, joint.asked(values), tell)  # noqa: E731
        yield from page.make(who, task, progress)

    generating.click(run_generate, [mine, *generate.fields], shown, api_name="generate", **one_at_a_time)
    captioning.click(run_caption, [mine, file, *caption.fields], shown, api_name="caption", **one_at_a_time)
    jointly.click(run_joint, [mine, *joint.fields], shown, api_name="joint", **one_at_a_time)
    stop.click(page.stop, mine, stopping, api_name="stop", queue=False, show_progress="hidden")
    look.click(page.look, word, looked, api_name="look", **one_at_a_time)
    scrub: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
    moment.input(page.show_moment, [trace, moment], seen, **scrub)
    app.load(page.which, None, which, api_name="which")
    choices = [generate.field("lora"), joint.field("lora")]
    app.load(page.list_adapters, None, choices, api_visibility="private")
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
        "lora": lambda: choice("LoRA"),
        "lora_scale": lambda: gr.Textbox(label="Scale of the LoRA", info="empty: 1"),
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
        self._one = threading.Lock()  # one result is made at a time, even if the tab that asked has gone away
        self._running: tuple[str, threading.Event] | None = None

    def which(self) -> str:
        """Which model the next result is made with."""
        return attempt(lambda: render("which.html.j2", label=self.model.label()))

    def list_adapters(self) -> list[Any]:
        """The choices of LoRA adapters, once for each task that takes one."""
        choices = [("none", ""), *((name, name) for name in adapters.list_adapters(self.studio.root))]
        return [gr.Dropdown(choices=choices, value="") for _ in range(2)]

    def look(self, address: str) -> str:
        """The frames that a word of a result's caption looked at; `address` is ID/NUMBER, counted from 0."""
        result_id, _, place = address.partition("/")

        def look() -> str:
            with self._one:
                words = self.model.calls.look(result_id, self.model.load)
            chosen = number(place)
            if chosen is None or chosen >= len(words):
                raise BadInputError("The caption has no such word; click one of its words.")
            return render("looked.html.j2", word=words[chosen])

        return attempt(look)

    def make(self, who: str, task: Callable[[Progress], Made], progress: gr.Progress) -> Iterator[list[Any]]:
        """Run a task: show what is seen on the way, then its result, all moments, and the gallery; or its error.

        who: the session that asks, which alone can stop it; it is stopped, too, if that tab goes away.
        """
        progress(0, desc="loading the model")
        events: SimpleQueue[Any] = SimpleQueue()
        stop = threading.Event()
        threading.Thread(target=self._work, args=(who, task, events, stop), daemon=True).start()
        shown = 0.0
        try:
            while isinstance(event := events.get(), Seen):
                step, moment = event
                progress((step, None), desc="sampling", unit="steps")
                if time.monotonic() - shown > LIVE_S and events.empty():
                    yield [gr.skip(), gr.skip(), gr.Group(visible=True), gr.skip(), _show(moment), gr.skip(), gr.skip()]
                    shown = time.monotonic()
        finally:
            stop.set()
        yield self._show_made(event)

    def _work(self, who: str, task: Callable[[Progress], Made], events: "SimpleQueue[Any]", stop: Any) -> None:
        def tell(step: int, moment: Moment) -> bool:
            events.put(Seen(step, moment))
            return stop.is_set()

        with self._one:
            self._running = (who, stop)
            try:
                events.put(task(tell))
            except Exception as error:
                events.put(error)
            finally:
                self._running = None

    def stop(self, who: str) -> str:
        """Stop what this session is making after its present step."""
        running = self._running
        if not running or running[0] != who:
            return note("Nothing of this page is being made.")
        running[1].set()
        return ""

    def _show_made(self, made: Made | Exception) -> list[Any]:
        if isinstance(made, Exception):
            failed = render("note.html.j2", sentence=explain(made), role="alert")
            return [failed, [], gr.Group(visible=False), gr.Slider(value=0), "", gr.skip(), gr.skip()]
        last = len(made.trace) - 1
        return [
            render("made.html.j2", results=[made.result], notes=made.notes, words=made.words),
            made.trace,
            gr.Group(visible=last >= 0),
            gr.Slider(minimum=0, maximum=max(1, last), value=max(0, last)),
            self.show_moment(made.trace, last),
            *self.show_gallery(1),
        ]

    def show_moment(self, trace: list[Moment], step: Any) -> str:
        """The video and the text after a step; each token with the probability that its place names it."""
        step = number(step)
        return "" if step is None or step >= len(trace) else _show(Moment(*trace[step]))

    def show_gallery(self, page: Any) -> list[Any]:
        """The number of the page that is shown, and its results."""
        try:
            found, page, pages = gallery.list_results(self.studio.root, number(page) or 1)
        except Exception as error:
            return [1, note(explain(error))]
        if not found:
            return [1, note("Nothing was made here yet; write a prompt above, or drop a video.")]
        return [page, render("gallery.html.j2", results=found, page=page, pages=pages)]


def _show(moment: Moment) -> str:
    address = "" if moment.frames is None else picture(moment.frames)
    return render("moment.html.j2", moment=moment, tokens=[Token(*one) for one in moment.tokens], picture=address)
