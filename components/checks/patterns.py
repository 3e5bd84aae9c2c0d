"""Regular expressions in YAML files beside the checks: long ones are readable there, a line for each idea."""

from importlib import resources
from typing import Any


def read_patterns(name: str) -> dict[str, Any]:
    """The patterns of ``components/checks/<name>``, in its groups (lists, or by name).

    The lines of a pattern are joined without their indentation. What stands under `parts` is no pattern of its own: it
    is put in wherever a later one names it, as ``{part}``.
    """
    import yaml

    groups = yaml.safe_load((resources.files("components") / "checks" / name).read_text(encoding="utf-8"))
    parts: dict[str, str] = {}

    def whole(text: str) -> str:
        text = "".join(line.strip() for line in text.splitlines())
        for part, pattern in parts.items():
            text = text.replace(f"{{{part}}}", pattern)
        return text

    for part, text in groups.pop("parts").items():
        parts[part] = whole(text)
    return {
        group: [whole(text) for text in texts]
        if isinstance(texts, list)
        else {each: whole(text) for each, text in texts.items()}
        for group, texts in groups.items()
    }
