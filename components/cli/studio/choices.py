"""Gradio's lists to choose from, and the values that come back from them."""

from typing import Any

import gradio as gr


def choice(label: str, name: str | None = None, *, several: bool = False) -> gr.Dropdown:
    """A list that a page fills when it is opened.

    Any value is accepted here, and examined where it is used: a page that was opened before the studio was started
    again has values that Gradio no longer knows.
    """
    return gr.Dropdown(
        label=label, choices=[], multiselect=several, interactive=True, allow_custom_value=True, elem_id=name
    )


def number(value: Any) -> int | None:
    """A whole number that was chosen, or None for anything else."""
    return int(value) if str(value).isdecimal() else None
