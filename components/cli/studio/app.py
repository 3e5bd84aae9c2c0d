"""The studio's pages as one Gradio application."""

from pathlib import Path

import gradio as gr

from components.cli.studio import create_page, data_page, models_page, runs_page
from components.cli.studio.work import Studio

STYLE = Path(__file__).with_name("studio.css")
SCRIPT = Path(__file__).with_name("studio.js")
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
    """Fonts of the system, so that none is fetched; light or dark as the browser asks for."""
    return gr.themes.Base(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
