"""The page of all settings for people, and the JSON schema of profile files for editors."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from components.settings.fields import REPLACED, UNIT
from components.settings.profile import schema
from components.settings.schema_words import properties, resolve, say_kind

INTRODUCTION = """# Profiles

A profile is a YAML file of settings: `components/profiles/NAME.yaml` for the bundled ones, or a file of your own.
`make profiles` writes this page.

```console
$ univigu profile list
$ univigu profile show smoke
$ univigu profile diff wan-1.3b wan-14b
$ univigu run train-stage-2 --profile tiny --set train_stage_2.steps=500
```

Your own profile extends another one and lists what differs:

```yaml
# yaml-language-server: $schema=components/profiles/schema.json
extends: tiny          # a bundled profile, or the path of a YAML file, relative to this one
train_stage_2:
  steps: 500
```

A table is merged with that of the profile it extends, key by key; a list or a single value replaces it. Tables whose
keys a plug-in defines are replaced as a whole; they are marked below. `--set SECTION.KEY=VALUE` (of `univigu run`,
`status`, `plan`, `rehearse`, `pipeline run` and `pipeline submit`) overrides both; its value is read as YAML. A
pipeline passes it to every step. `univigu run` runs one step, so give the same `--set` to each step that reads the
section, and to `univigu status`. `dvc repro` takes no `--set`: change the profile, or use `dvc exp run -S`.

An invalid profile is refused before anything starts, with exit code 78 and all faults in one message.
With the first line above, editors that use the YAML language server complete and check keys.
"""


def file_schema() -> dict[str, Any]:
    """The JSON schema of a profile's file: every key may be left out, since `extends` may provide it."""
    found = copy.deepcopy(schema())
    for table in (found, *found["$defs"].values()):
        table.pop("required", None)
        table["properties"] = {
            key: {name: value for name, value in entry.items() if name not in (REPLACED, UNIT)}
            for key, entry in table.get("properties", {}).items()
        }
    parent = {"type": "string", "description": "A bundled profile's name, or the path of a YAML file beside this one"}
    found["properties"] = {"extends": parent, **found["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def write_page() -> str:
    """The page of all settings, as Markdown: a table for each section."""
    whole = schema()
    sections = {key: entry for key, entry in properties(whole, whole).items() if properties(entry, whole)}
    single = {key: entry for key, entry in properties(whole, whole).items() if key not in sections}
    lines = [INTRODUCTION, "## Top level", "", *_table(single, whole)]
    for key, entry in sections.items():
        lines += ["", f"## {key}", "", f"{entry['description']}.", "", *_table(dict(_flatten(entry, whole)), whole)]
    return "\n".join(lines) + "\n"


def _flatten(entry: Mapping[str, Any], whole: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a section, each followed by those of its tables."""
    for key, inner in properties(entry, whole).items():
        yield f"{path}{key}", inner
        of_each = resolve(inner, whole).get("additionalProperties")
        yield from _flatten(inner, whole, f"{path}{key}.")
        if isinstance(of_each, Mapping):
            yield from _flatten(of_each, whole, f"{path}{key}.NAME.")


def _table(entries: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    rows = ["| setting | value | unit | meaning |", "|---|---|---|---|"]
    for key, entry in entries.items():
        meaning = entry.get("description", "") + (" (replaced as a whole)" if entry.get(REPLACED) else "")
        kind = "a table" if properties(entry, whole) else say_kind(entry, whole)
        cells = (f"`{key}`", kind, entry.get(UNIT, ""), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows
