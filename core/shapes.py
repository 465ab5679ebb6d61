"""What a value must be, said by type hints: options of a config, and the JSON that an earlier step wrote. Our own plumbing."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_E_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type: `float` takes integers, no number takes true, a dataclass takes anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if hint is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        pair = origin is tuple and ... not in inner and len(value) != len(inner)  # a tuple of other length
        return not inner or (not pair and all(fits(v, inner[0]) for v in value))
    if origin is dict or hint is dict:
        return isinstance(value, dict) and (not inner or all(fits(one, inner[1]) for one in value.values()))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, Path))
    return not isinstance(hint, type) or isinstance(value, hint) or dataclasses.is_dataclass(hint)


def describe(hint: Any) -> str:
    """A type as a person reads it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in inner)
    if hint is type(None):
        return "null"
    if list in (hint, origin):
        return "a list" + (f" of {describe(inner[0])}" if inner else "")
    plain = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
    return plain.get(hint, plain.get(origin, getattr(hint, "__name__", str(hint))))


def as_number(value: Any, hint: Any) -> Any:
    """`1e-3`, which some readers of YAML take for a text, and `1e6` for an integer, as the number that a type wants."""
    if isinstance(value, list) and typing.get_origin(hint) in (list, Sequence) and typing.get_args(hint):
        return [as_number(one, typing.get_args(hint)[0]) for one in value]
    if fits(value, hint):
        return value
    number = float(value) if isinstance(value, str) and _E_NUMBER.fullmatch(value) else value
    if isinstance(number, float) and number.is_integer() and fits(int(number), hint) and not fits(number, hint):
        return int(number)
    return number if fits(number, hint) else value


def unusable(value: Any, place: str) -> tuple[str, str] | None:
    """Where in nested values something stands that no option takes, and what must be there; None where nothing does."""
    if isinstance(value, float) and not math.isfinite(value):
        return place, "a finite number, not NaN or infinity"
    if isinstance(value, int) and abs(value) > 2**63:
        return place, "a number that 64 bits hold"
    if isinstance(value, str) and ("\0" in value or not value.isascii() and _is_broken(value)):
        return place, "a text of UTF-8 without the character NUL"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next((found for key, one in parts if (found := unusable(one, f"{place}.{key}"))), None)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Why a JSON value is not of a shape, as `'systems.0.name' must be a text, got 3`; None where it is.

    Args:
        shape: a type, of lists and mappings too; a dataclass, whose fields without a default must be there; a list of one shape,
            for all elements; a mapping of keys to shapes, where `"key?"` need not be there and `...` stands for all keys.
    """
    told, origin, inner = f"'{place}'" if place else "it", typing.get_origin(shape), typing.get_args(shape)
    if origin in (typing.Union, types.UnionType):
        fit = any(misfit(value, one) is None for one in inner)
        return None if fit else f"{told} must be {describe(shape)}, got {_short(value)}"
    if dataclasses.is_dataclass(shape):
        hints, required = typing.get_type_hints(shape), dataclasses.MISSING
        fields = dataclasses.fields(shape)
        needed = [f.name for f in fields if f.default is required and f.default_factory is required]
        shape = {f.name if f.name in needed else f"{f.name}?": hints[f.name] for f in fields}
    elif origin in (list, dict) and inner:
        shape = [inner[0]] if origin is list else {...: inner[1]}
    if not isinstance(shape, (dict, list)):
        return None if fits(value, shape) else f"{told} must be {describe(shape)}, got {_short(value)}"
    if not isinstance(value, type(shape)):
        return f"{told} must be {describe(type(shape))}, got {_short(value)}"
    parts = [(key, one, shape[0]) for key, one in enumerate(value)] if isinstance(shape, list) else []
    for key, one in shape.items() if isinstance(shape, dict) else ():
        if key is ...:
            parts += [(name, part, one) for name, part in value.items()]
        elif (name := key.removesuffix("?")) in value:
            parts.append((name, value[name], one))
        elif name == key:
            return f"{told} has no '{name}'"
    found = (misfit(part, one, f"{place}.{key}" if place else str(key)) for key, part, one in parts)
    return next((why for why in found if why is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
