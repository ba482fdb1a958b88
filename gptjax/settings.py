"""Settings: frozen dataclasses that check their values when they are made."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from gptjax.errors import ConfigError, quoted

INT_LIMIT = 2**31
"""Whole numbers are int32 on devices: settings must be below this."""


class Config:
    """Base of all settings. `given` names the fields that were passed to the constructor.
    (`dataclasses.replace` passes all of them, `replace` only those given before or now.)
    """

    given: frozenset[str]
    prefix: ClassVar[str] = ""
    """Of the fields' names, in messages."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = [field.name for field in fields if not field.kw_only]
        object.__setattr__(self, "given", frozenset([*names[: len(args)], *kwargs]))
        return self

    def __post_init__(self) -> None:
        wrong = []
        for name, kind in _types(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if not fits(value, kind):
                wrong.append(f"{self.prefix}{name} is {quoted(value)}; expected {expected(kind)}")
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if problems := wrong or self.problems():
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Each value that is out of range, in words."""
        return []

    def replace(self, changes: Mapping[str, Any] = {}, /, **more: Any) -> Self:
        """This with other values: `config.replace({"model.n_layer": 4}, max_steps=100)`.

        Raises:
            ConfigError: names are unknown or values out of range; it names all of them.
        """
        values = {name: getattr(self, name) for name in self.given}
        kinds, problems = _types(type(self)), list[str]()  # type: ignore[arg-type]
        sections: dict[str, dict[str, Any]] = {}
        for name, value in {**changes, **more}.items():
            section, _, rest = name.partition(".")
            if section not in kinds or (rest and not dataclasses.is_dataclass(kinds[section])):
                problems.append(f"unknown setting {self.prefix}{name}")
            elif rest:
                sections.setdefault(section, {})[rest] = value
            else:
                values[name] = value
        for section, inner in sections.items():
            try:
                values[section] = values.get(section, getattr(self, section)).replace(inner)
            except ConfigError as error:
                problems += error.problems
        try:
            changed = type(self)(**values)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return changed

    def _check_ints(self, least: int, *names: str) -> list[str]:
        """What is wrong with whole numbers (or None) that must lie in [least, INT_LIMIT)."""
        values = {f"{self.prefix}{name}": getattr(self, name) for name in names}
        values = {name: value for name, value in values.items() if value is not None}
        out = [f"{name} {v} must be at least {least}" for name, v in values.items() if v < least]
        return out + [
            f"{name} {v} must be below {INT_LIMIT}" for name, v in values.items() if v >= INT_LIMIT
        ]


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def expected(kind: Any) -> str:
    """What the values of a type are, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(expected, args))
    if origin is tuple:
        return f"any number of {expected(args[0])}"
    if dataclasses.is_dataclass(kind):
        return f"a {getattr(kind, '__name__', kind)}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(kind, "None")


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`; a whole number is a number too."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(fits(item, args[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
