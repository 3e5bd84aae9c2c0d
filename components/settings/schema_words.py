"""A JSON schema in words: "a whole number from 1 up", "one of cosine, constant"."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]


def look_up(schema: Schema, path: tuple[str | int, ...]) -> Schema:
    """The schema at `path`; empty if the schema defines nothing there."""
    part: Schema = schema
    for key in path:
        part = resolve(part, schema)
        if isinstance(key, int):
            prefix = part.get("prefixItems", ())
            part = prefix[key] if key < len(prefix) else part.get("items", {})
        else:
            part = properties(part, schema).get(key, part.get("additionalProperties", {}))
        if not isinstance(part, Mapping):
            return {}
    return part


def properties(schema: Schema, whole: Schema) -> Schema:
    """The keys of a table and their schemas, even if the table may be null."""
    schema = resolve(schema, whole)
    for choice in schema.get("anyOf", ()):
        if found := properties(choice, whole):
            return found
    return schema.get("properties", {})


def resolve(schema: Schema, whole: Schema) -> Schema:
    """A schema with its reference into `whole` resolved; keys beside the reference are kept."""
    if reference := schema.get("$ref"):
        return {**whole["$defs"][reference.rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}
    return schema


def say_kind(schema: Schema, whole: Schema) -> str:
    """Describe the values that a schema allows."""
    schema = resolve(schema, whole)
    if choices := schema.get("anyOf"):
        return " or ".join(say_kind(choice, whole) for choice in choices)
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"a {'whole number' if kind == 'integer' else 'number'}{_bounds(schema)}"
    if kind == "array":
        return _say_list(schema, whole)
    if kind == "object":
        return _say_table(schema)
    if kind == "string" and schema.get("minLength"):
        return "a text that is not empty"
    return {"string": "a text", "boolean": "true or false", "null": "null"}.get(str(kind), "another value")


def _say_list(schema: Schema, whole: Schema) -> str:
    if prefix := schema.get("prefixItems"):
        each = say_kind(prefix[0], whole)
        return f"a list of {len(prefix)} values, each {each}"
    return f"a list, each entry {say_kind(schema.get('items', {}), whole)}"


def _say_table(schema: Schema) -> str:
    if keys := list(schema.get("properties", ())):
        return f"a table with {', '.join(keys)}"
    return "a table"


def _bounds(schema: Schema) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    words = []
    if least is not None:
        words.append(f"of at least {least:g}")
    if above is not None:
        words.append(f"above {above:g}")
    if below is not None:
        words.append(f"below {below:g}")
    return f" {' and '.join(words)}" if words else ""
