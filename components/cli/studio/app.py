"""The studio's pages as one Gradio application."""

from pathlib import Path

import gradio as gr

from components.cli.studio import create_page, data_page, models_page, runs_page
from components.cli.studio.work import Studio

STYLE = Path(__file__).with_name("studio.css")
SCRIPT = Path(__file__).with_name("studio.js")
SUBDUED = ("body_text_color_subdued", "block_info_text_color")
PAGES = {  # by path
    "": ("Models", models_page.build),
    "runs": ("Runs", runs_page.build),
    "data": ("Data", data_page.build),
    "create": ("Create", create_page.build),
}


def build(studio: Studio) -> gr.Blocks:
    """All pages; each reads the work root when it is opened."""
    with gr.Blocks(title="Uni-ViGU studio", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        _page("", app, studio)
    for path, (title, _) in PAGES.items():
        if path:
            with app.route(title, path):
                _page(path, app, studio)
    return app


def _page(path: str, app: gr.Blocks, studio: Studio) -> None:
    title, fill = PAGES[path]
    gr.Navbar(main_page_name=PAGES[""][0])
    gr.HTML(f"<h1>{title}</h1>")
    fill(studio, app)


def script() -> str:
    """The pages' own script, for keys and synchronised videos, as HTML for their heads."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"


def theme() -> gr.themes.Base:
    """Fonts of the system, so that none is fetched; light or dark as the browser asks for.

    Subdued texts and the primary buttons have more contrast than Gradio's, for WCAG's 4.5 to 1.
    """
    plain = gr.themes.Base(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    buttons = {
        f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_hover", "_dark", "_hover_dark")
    }
    buttons |= {f"button_primary_text_color{mode}": "white" for mode in ("", "_dark")}
    soft = {
        f"{name}{mode}": shade for name in SUBDUED for mode, shade in (("", "*neutral_600"), ("_dark", "*neutral_300"))
    }
    return plain.set(**buttons, **soft)
