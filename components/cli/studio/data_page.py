"""The page of data: each clip of the run with its prompt, caption, scores and verdict."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from components.cli import edits
from components.cli.edits import Clip, Proposal
from components.cli.options import profile_in_use
from components.cli.studio import clips
from components.cli.studio.choices import choice, number
from components.cli.studio.work import Studio, explain, note, render
from components.pipeline.edits import CAPTION, LONGEST_CAPTION
from components.pipeline.profiles import load_profile
from components.tracking import actor
from univigu.errors import BadInputError, MissingInputError

KEYS = (
    "Keys: j and k go to the next and the previous clip, space plays it, e edits its caption, x excludes it, u undoes."
)
IN_ORDER = "clips"  # one queue, so that a slow answer doesn't replace that to a later filter
# The script focuses what comes next; a page that is used without it has the buttons.
TO_CAPTION, TO_APPLY = "() => univigu.focus('edit-caption')", "() => univigu.focus('edit-apply')"


def build(studio: Studio, app: gr.Blocks) -> None:
    """The page's components and what they do."""
    page = DataPage(studio)
    with gr.Row():
        verdict = choice("Verdict", "verdict")
        stage = gr.Dropdown(label="Training stage", choices=[("any", 0), ("1", 1), ("2", 2)], value=0, elem_id="stage")
        text = gr.Textbox(label="Text in the prompt or caption", max_length=clips.LONGEST_SEARCH, elem_id="search")
    with gr.Row():
        score = choice("Score", "score")
        least = gr.Textbox(label="At least", elem_id="score-least", max_length=40)
        most = gr.Textbox(label="At most", elem_id="score-most", max_length=40)
    with gr.Row():
        back = gr.Button("Previous page")
        at = gr.Number(label="Page", value=1, minimum=1, precision=0, elem_id="page")
        ahead = gr.Button("Next page")
    edit = _edit_panel()
    found = gr.HTML()

    query, shown = [verdict, stage, text, score, least, most], [verdict, score, at, found]
    app.load(page.show, [*query, at], shown, api_name="clips", concurrency_id=IN_ORDER)
    own: dict[str, Any] = {"api_visibility": "private", "concurrency_id": IN_ORDER}
    for event in (verdict.input, stage.input, text.submit, score.input, least.submit, most.submit):
        event(page.show, query, shown, **own)
    at.submit(page.show, [*query, at], shown, **own)
    back.click(page.show_previous, [*query, at], shown, **own)
    ahead.click(page.show_next, [*query, at], shown, **own)

    examined = [edit["said"], edit["proposal"]]
    opened = [edit["caption"], edit["opened"], *examined]
    edit["open"].click(page.open, edit["clip"], opened, api_name="open_clip").then(None, js=TO_CAPTION)
    for name, examine in (("exclude", page.exclude), ("undo", page.undo)):
        edit[name].click(examine, edit["clip"], opened, api_name=f"{name}_clip").then(None, js=TO_APPLY)
    asked = [edit["opened"], edit["caption"]]
    edit["check"].click(page.check, asked, examined, api_name="check_caption").then(None, js=TO_APPLY)
    changed = [*opened, *shown]
    edit["apply"].click(page.apply, [*asked, edit["proposal"], *query, at], changed, api_name="apply_edit")


def _edit_panel() -> dict[str, Any]:
    """The fields and buttons for edits of one clip, by name."""
    with gr.Group(elem_id="edit"):
        with gr.Row(equal_height=True):
            panel: dict[str, Any] = {"clip": gr.Textbox(label="Clip", info=KEYS, elem_id="edit-clip", scale=3)}
            for name, label in (("open", "Edit"), ("exclude", "Exclude"), ("undo", "Undo")):
                panel[name] = gr.Button(label, elem_id=f"edit-{name}", min_width=80)
        panel["caption"] = gr.Textbox(label="Caption", lines=3, max_length=LONGEST_CAPTION, elem_id="edit-caption")
        with gr.Row():
            panel["check"] = gr.Button("What would change", elem_id="edit-check")
            panel["apply"] = gr.Button("Apply", variant="primary", elem_id="edit-apply")
        panel["said"] = gr.HTML(elem_id="edit-said")
    return {**panel, "opened": gr.State(None), "proposal": gr.State(None)}


class DataPage:
    """What the page shows of a work root; every function answers with values of Gradio's components."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    # The filters of each of these are `verdict`, `stage`, `text`, `score`, and the bounds of the score.

    def show(self, *given: Any) -> list[Any]:
        """The choices of verdicts and scores, the number of the page that is shown, and its clips.

        given: the filters, and the page, which is 1 without it.
        """
        verdict, stage, text, score, least, most, *page = given
        try:
            counts, names = clips.count_verdicts(self.studio.root), clips.list_scores(self.studio.root)
            verdict, score = verdict if verdict in counts else "", score if score in names else ""
            bounds = [_read_bound(one) for one in (least, most)]
            query = clips.Query(verdict, number(stage) or 0, (text or "").strip(), score, *bounds)
            found = clips.find(self.studio.root, query, number(page[0]) or 1 if page else 1)
            pending = edits.mark(self.studio.root, found.clips)
        except MissingInputError as error:
            return [*[gr.Dropdown(choices=[], value=None)] * 2, 1, note(explain(error))]
        except Exception as error:
            return [gr.skip(), gr.skip(), 1, _failed(error)[0]]
        labels = [("any", ""), *((f"{name} ({count})", name) for name, count in counts.items())]
        scores = gr.Dropdown(choices=[("any", ""), *((name, name) for name in names)], value=score)
        page_html = render("clips.html.j2", found=found, first=(found.page - 1) * clips.PAGE + 1, pending=pending)
        return [gr.Dropdown(choices=labels, value=verdict), scores, found.page, page_html]

    def show_previous(self, *given: Any) -> list[Any]:
        """The page before."""
        return self.show(*given[:-1], (number(given[-1]) or 1) - 1)

    def show_next(self, *given: Any) -> list[Any]:
        """The page after."""
        return self.show(*given[:-1], (number(given[-1]) or 0) + 1)

    # Each of these answers with the caption, the opened clip, what is said, and the change that was examined.

    def open(self, clip_id: str) -> list[Any]:
        """A clip to edit, with the caption that is in force."""
        try:
            clip = edits.open_clip(self.studio.root, clip_id.strip())
        except Exception as error:
            return ["", None, *_failed(error)]
        return [clip.caption, clip, note(f"Clip {clip.id} is open; change its caption."), None]

    def exclude(self, clip_id: str) -> list[Any]:
        """What it would change to leave a clip out."""
        return self._open_and_examine(clip_id, edits.propose_exclusion)

    def undo(self, clip_id: str) -> list[Any]:
        """What it would change to take back the last edit of a clip."""
        return self._open_and_examine(clip_id, edits.propose_undo)

    def _open_and_examine(self, clip_id: str, propose: Callable[..., Proposal]) -> list[Any]:
        try:
            clip = edits.open_clip(self.studio.root, clip_id.strip())
            proposal = propose(self.studio.root, self._profile(), clip, actor())
        except Exception as error:
            return ["", None, *_failed(error)]
        return [clip.caption, clip, *_examined(proposal)]

    def check(self, opened: Any, caption: str) -> list[Any]:
        """What another caption of the opened clip would change."""
        try:
            if not opened:
                raise BadInputError("No clip is open; open one, then change its caption.")
            proposal = edits.propose_caption(self.studio.root, self._profile(), Clip(*opened), caption, actor())
        except Exception as error:
            return _failed(error)
        return _examined(proposal)

    def apply(self, opened: Any, caption: str, proposal: Any, *query: Any) -> list[Any]:
        """Write the change that was examined, and show the page again; a caption that was not examined is, first."""
        line = Proposal(*proposal).line if proposal else {"action": CAPTION, "caption": None}
        if line["action"] == CAPTION and line["caption"] != (caption or "").strip():
            return [caption, opened, *self.check(opened, caption), *[gr.skip()] * 4]
        try:
            edit = edits.apply(self.studio.root, Proposal(*proposal))
        except Exception as error:
            return [caption, opened, *_failed(error), *[gr.skip()] * 4]
        return ["", None, note(f"Line {edit.number} is written. The next run obeys it."), None, *self.show(*query)]

    def _profile(self) -> dict[str, Any]:
        return load_profile(profile_in_use(self.studio.profile, self.studio.root))


def _read_bound(text: str | None) -> float | None:
    """The number in a field that may be empty; raises `BadInputError` if it is none."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError as error:
        raise BadInputError(f"The bound of the score is '{text}'; give a number, or leave it empty.") from error


def _failed(error: Exception) -> list[Any]:
    return [render("note.html.j2", sentence=explain(error), role="alert"), None]


def _examined(proposal: Proposal) -> list[Any]:
    """What is said about a change, and the change."""
    actions = {"exclude": "Exclude", "undo": "Undo the last edit of", "caption": "Change the caption of"}
    changes = ", ".join(proposal.describe())
    return [note(f"{actions[proposal.line['action']]} clip {proposal.line['id']}: {changes}. Press Apply."), proposal]
