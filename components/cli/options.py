"""Options of several commands."""

from typing import Annotated

import typer

Profile = Annotated[str, typer.Option(help="A bundled profile's name, or the path of a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a setting of the profile, such as train_stage_2.steps=500; may be repeated.",
        show_default=False,
    ),
]
