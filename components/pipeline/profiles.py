"""Profiles: one YAML file of parameters each; code never asks which one it is in."""

from importlib import resources
from pathlib import Path
from typing import Any

from univigu.errors import ConfigError


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    folder = resources.files("components") / "profiles"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_profile(name: str) -> dict[str, Any]:
    """Read a profile by its name, or by the path of a YAML file; raises `ConfigError` where there is none."""
    import yaml

    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in profile_names():
            raise ConfigError(
                f"There is no profile '{name}'; choose one of {', '.join(profile_names())}, or give a YAML file's path."
            )
        path = _bundled(name)
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no profile file {path}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The profile {path} is not readable YAML ({str(error).splitlines()[0]}); mend it."
        ) from error
    if not isinstance(profile, dict):
        raise ConfigError(f"The profile {path} is not a table of parameters; see {profile_names()} for examples.")
    missing = sorted(_keys(yaml.safe_load(_bundled("tiny").read_text(encoding="utf-8"))) - _keys(profile))
    if missing:
        raise ConfigError(f"The profile {path} lacks {', '.join(missing)}; the bundled profile 'tiny' shows them.")
    return profile


def _bundled(name: str) -> Path:
    return Path(str(resources.files("components") / "profiles" / f"{name}.yaml"))


def _keys(profile: dict[str, Any]) -> set[str]:
    """Every section, and every ``section.key``."""
    sections = {name: values for name, values in profile.items() if isinstance(values, dict)}
    return set(profile) | {f"{name}.{key}" for name, values in sections.items() for key in values}
