"""Options of several commands, and the profile that is meant where none is given."""

from pathlib import Path
from typing import Annotated

import typer

from components.pipeline.profiles import PARAMS, profile_names
from components.pipeline.stages import STAGES
from univigu.errors import ConfigError
from univigu.files import read_yaml

DEFAULT_PROFILE = "tiny"  # where `univigu use` has chosen none


def complete_profile(incomplete: str) -> list[str]:
    """The bundled profiles, for a shell's completion."""
    return [name for name in profile_names() if name.startswith(incomplete)]


def complete_step(incomplete: str) -> list[str]:
    """The steps, for a shell's completion."""
    return [stage.name for stage in STAGES if stage.name.startswith(incomplete)]


Root = Annotated[Path, typer.Option(help="The work root, which contains every path that a step reads or writes.")]
Profile = Annotated[
    str | None,
    typer.Option(
        autocompletion=complete_profile,
        help="A bundled profile's name, or the path of a YAML file. (default: what `univigu use` chose, otherwise "
        f"{DEFAULT_PROFILE})",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a setting of the profile, such as train_stage_2.steps=500; may be repeated.",
        show_default=False,
    ),
]


def profile_in_use(profile: str | None, root: Path) -> str:
    """The given profile, or the one that `univigu use` chose for the work root: that of its params.yaml.

    Raises `ConfigError` if params.yaml is there and names none.
    """
    if profile is not None:
        return profile
    path = root / PARAMS
    if not path.is_file():
        return DEFAULT_PROFILE
    try:
        chosen = read_yaml(path).get("profile")
    except (OSError, ValueError, AttributeError):
        chosen = None
    if not isinstance(chosen, str) or not chosen:
        raise ConfigError(f"{path} names no profile; choose one with `univigu use NAME`, or give --profile.")
    return chosen
