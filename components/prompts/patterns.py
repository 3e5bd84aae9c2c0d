"""Regular expressions in YAML files: long patterns are readable there, and share named parts."""

from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any


def insert_parts(pattern: str, parts: Mapping[str, str]) -> str:
    """A pattern in which each ``{name}`` of a part is replaced by that part."""
    for name, part in parts.items():
        pattern = pattern.replace(f"{{{name}}}", part)
    return pattern


def read_patterns(file: Traversable) -> dict[str, Any]:
    """The patterns of a YAML file, in its groups: each a list of patterns, or patterns by name.

    The lines of a pattern are joined without their indentation. Entries under `parts` are not patterns of their own:
    later entries, parts included, may use them as ``{part}``.
    """
    import yaml

    groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    parts: dict[str, str] = {}

    def complete(text: str) -> str:
        return insert_parts("".join(line.strip() for line in text.splitlines()), parts)

    for name, text in groups.pop("parts").items():
        parts[name] = complete(text)
    return {
        group: [complete(text) for text in texts]
        if isinstance(texts, list)
        else {name: complete(text) for name, text in texts.items()}
        for group, texts in groups.items()
    }
