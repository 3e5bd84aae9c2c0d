"""`univigu profile`: list profiles, show them with everything that they extend, and describe all settings."""

import json
from typing import Annotated

import typer

from components.cli.options import Settings, complete_profile
from components.pipeline.profiles import (
    load_profile,
    profile_names,
    profile_parents,
    settings_page,
    settings_schema,
    with_settings,
)

app = typer.Typer(help="List, show and compare profiles, and describe all settings.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(help="A bundled profile's name, or the path of a YAML file.", autocompletion=complete_profile),
]


@app.command("list")
def list_profiles() -> None:
    """List the bundled profiles and what each extends."""
    for name in profile_names():
        parents = profile_parents(name)
        print(f"{name:<12} {f'extends {parents[0]}' if parents else '-'}")


@app.command()
def show(name: Name, settings: Settings = None) -> None:
    """Print a profile as YAML with everything that it extends: a complete profile that can be saved and edited."""
    import yaml

    spec = with_settings(name, settings or [])
    values = load_profile(spec)
    print(f"# {spec}, with everything that it extends")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), end="")


@app.command()
def diff(one: Name, other: Name) -> None:
    """Print the settings in which two profiles differ, one per line."""
    from components.pipeline.manifests import Recipe

    before, after = (Recipe(load_profile(name), {}, {}) for name in (one, other))
    for line in before.differences(after):
        print(line)


@app.command()
def schema() -> None:
    """Print the JSON schema of profile files, with which editors complete and check them."""
    print(json.dumps(settings_schema(), indent=1))


@app.command()
def reference() -> None:
    """Print the page of all settings as Markdown (docs/profiles.md)."""
    print(settings_page(), end="")
