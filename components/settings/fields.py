"""Shared by the models of all sections: the base class, the declaration of a setting, and value types."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

REPLACED = "x-replaced"  # in a schema: an extending profile replaces this table as a whole
UNIT = "x-unit"
RULES = "rules"  # the type of `Section`'s errors, with the broken rules as context


class Section(BaseModel):
    """A table of settings: keys are required unless they have a default, unknown ones are forbidden, none is converted.

    ("3" is no number.)
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """Rules between valid settings that are broken: for each the key, and what to change."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if broken := list(self.broken_rules()):
            raise PydanticCustomError(RULES, "settings that contradict each other", {RULES: broken})
        return self


def setting(description: str, unit: str = "", **more: Any) -> Any:
    """A key of a section, required without a ``default``. `more` goes to pydantic's `Field`: bounds (``ge=0``)."""
    extra: dict[str, Any] | None = {UNIT: unit} if unit else None
    return Field(description=description, json_schema_extra=extra, **more)


def foreign_table(description: str) -> Any:
    """A required table whose keys a plug-in defines, such as a captioner's options."""
    return Field(description=description, json_schema_extra={REPLACED: True})


def _read_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads an unquoted off as false


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Name = Annotated[str, Field(min_length=1)]
Range = Annotated[tuple[Size, Size], Strict(False)]  # YAML has lists where Python has tuples
Mode = Annotated[Literal["off", "score", "enforce"], BeforeValidator(_read_off)]
Precision = Literal["fp32", "bf16"]
Every = bool | Count  # false is 0, and true is 1
CaptionCheck = Name | dict[Name, dict[str, Any]]
