"""Frozen dataclasses that pydantic validates strictly; what is wrong is said in one line."""

import contextlib
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import Field

_T = TypeVar("_T")

Count = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ConfigError(ValueError):
    """A setting that cannot work, as one line: `name=value: what is wrong; what to do`."""


class Settings:
    """Base of `strict` dataclasses: refuses values that exclude each other."""

    def conflicts(self) -> Iterator[str]:
        """A message for each pair of fields that cannot work together."""
        yield from ()

    def __post_init__(self) -> None:
        conflict = next(self.conflicts(), None)
        if conflict is not None:
            raise ValueError(conflict)  # pydantic adds the path of the object


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def strict(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass that raises `ConfigError` for a value that does not fit.

    Strict: no "3" for 3, no true for 1, no NaN or inf, no unknown name; an int may be a float.
    """
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def init(self: _T, **values: Any) -> None:
        with _one_line_errors(made):
            validate(self, **values)

    made.__init__ = init
    validated: type[_T] = made
    return validated


def from_plain(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """A `strict` dataclass from nested plain values: the inverse of `dataclasses.asdict`.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range; names the field.
    """
    # By way of JSON, because strict validation takes a dictionary for a nested object only there.
    with _one_line_errors(cls):
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(values))


@contextlib.contextmanager
def _one_line_errors(cls: type) -> Iterator[None]:
    try:
        yield
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, cls)) from error


def _describe(error: pydantic.ValidationError, cls: type) -> str:
    """The first of the report's errors as one line that begins with the path of the field."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return ".".join(filter(None, [path, str(first["ctx"]["error"])]))
    if first["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(str(first["loc"][-1]), _field_names(cls), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"{path}: unknown setting{hint}"
    message = re.sub(r"^(Input|String) should", "must", first["msg"])
    return f"{path or 'config'}={first['input']!r:.80}: {message}"


def _field_names(cls: Any) -> Iterator[str]:
    for item in dataclasses.fields(cls):
        yield item.name
        if dataclasses.is_dataclass(item.type):
            yield from _field_names(item.type)
