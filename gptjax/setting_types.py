"""What values the type of a setting allows, and how to say so."""

import types
import typing
from typing import Any, Literal


def expected(kind: Any) -> str:
    """What the values of a type are, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(expected, args))
    if origin is tuple:
        return f"any number of {expected(args[0])}"
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
