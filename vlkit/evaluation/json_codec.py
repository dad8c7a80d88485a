"""Dataclasses <-> JSON by their fields' types, with an error that names the key.

Numbers that are not finite are null in JSON: a field of type float reads null as NaN. A field that may be None may be
missing; one whose default is None is left out again when it is written, any other is written as null. A field's
metadata {"key": ...} gives a name in JSON that is no Python name, such as recall@1.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class WrongKeyError(ValueError):
    """A key that is missing, or holds something else than it should.

    Attributes:
        problem: "it has no metrics.text_to_image", "slices.words is a list".
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def encode(value: Any) -> Any:
    """Return dataclasses, and whatever holds them, as dicts and lists."""
    if is_dataclass(value) and not isinstance(value, type):
        encoded = {_key(field): encode(getattr(value, field.name)) for field in fields(value)}
        optional = {_key(field) for field in fields(value) if field.default is None}
        return {key: item for key, item in encoded.items() if item is not None or key not in optional}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, raw: Any, key: str = "") -> Any:
    """Build a value of a type from JSON.

    Args:
        kind: a dataclass, dict[str, X], list[X], tuple[float, float], a union with None, Any, float, int, str or bool.
        key: where in the file it is, with dots.

    Raises:
        WrongKeyError: names the key.
    """
    origin = get_origin(kind)
    if kind is Any:
        return raw
    if origin in (Union, UnionType):
        (inner,) = (option for option in get_args(kind) if option is not NoneType)
        return None if raw is None or (raw == {} and is_dataclass(inner)) else decode(inner, raw, key)
    if is_dataclass(kind):
        return _decode_dataclass(kind, raw, key)
    if kind is float:
        if raw is None:
            return math.nan
        return _expect(raw, isinstance(raw, int | float) and not isinstance(raw, bool), key)
    if origin is dict:
        _expect(raw, isinstance(raw, dict), key)
        inner = get_args(kind)[1]
        return {name: decode(inner, item, _join(key, name)) for name, item in raw.items()}
    if origin in (list, tuple):
        inner, *others = get_args(kind)
        pair = origin is tuple and Ellipsis not in others
        _expect(raw, isinstance(raw, list) and (not pair or len(raw) == 1 + len(others)), key)
        return origin(decode(inner, item, f"{key}[{index}]") for index, item in enumerate(raw))
    return _expect(raw, isinstance(raw, kind) and (kind is not int or not isinstance(raw, bool)), key)


def _decode_dataclass(kind: Any, raw: Any, key: str) -> Any:
    _expect(raw, isinstance(raw, dict), key)
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):
        name, nullable = _key(field), NoneType in get_args(hints[field.name])
        if name not in raw and not nullable and field.default is MISSING and field.default_factory is MISSING:
            raise WrongKeyError(f"it has no {_join(key, name)}")
        if name in raw or (nullable and field.default is MISSING):
            values[field.name] = decode(hints[field.name], raw.get(name), _join(key, name))
    return kind(**values)


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _expect(raw: Any, right: bool, key: str) -> Any:
    if not right:
        kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", NoneType: "null"}
        raise WrongKeyError(f"{key or 'the file'} is {kinds.get(type(raw), 'a number')}")
    return raw
