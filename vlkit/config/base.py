"""What a settings dataclass can do: read its fields' types and help, take values from YAML or flags, write itself back.

Types are trusted over YAML's guesses (PyYAML reads `1e-5` as a string), and a key or a value that is not known is
refused with the nearest one that is.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from vlkit.errors import UsageError, suggest_name
from vlkit.storage import Location

# Marks a field is annotated with: an argument without a flag's name; a flag that is given once for each of its texts.
POSITIONAL, REPEATED = "positional", "repeated"

TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    Location: "a path",
}

# Two names for one wish: the more specific layer's choice wins over the other's.
ALTERNATIVES = ({"steps", "epochs"},)


@dataclass(frozen=True)
class Field:
    """One setting, as the command line and YAML see it."""

    name: str
    kind: Any
    help: str
    default: Any
    required: bool
    positional: bool
    repeated: bool
    optional: bool

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        if self.positional:
            return self.name.upper()
        return f"-{self.name}" if len(self.name) == 1 else "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a Literal setting, else nothing."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def read(self, value: Any, where: str) -> Any:
        """`value` as this field's type; raises UsageError that names `where` it stood."""
        if value is None:
            if self.optional:
                return None
            raise UsageError(f"{where}: {self.flag} is empty")
        if value is False and self.kind is str:
            value = "off"  # What YAML 1.1 makes of a bare `off`.
        if self.choices:
            if value not in self.choices:
                told = f"{where}: {self.flag} {value!r} is none of {', '.join(self.choices)}"
                raise UsageError(told, hint=suggest_name(str(value), self.choices))
            return value
        try:
            return _convert(self.kind, [value] if self.repeated and isinstance(value, str) else value)
        except (TypeError, ValueError):
            wanted = TYPE_WORDS.get(self.kind) or ("two numbers" if float in get_args(self.kind) else "a list of texts")
            raise UsageError(f"{where}: {self.flag} {value!r} is not {wanted}") from None


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        inner, *more = get_args(kind)
        nothing = isinstance(value, dict) or any(part is None or isinstance(part, bool | dict | list) for part in parts)
        if nothing or (more == [inner] and len(parts) != 2):
            raise ValueError(value)
        return tuple(str(part) if inner is str else _convert(inner, part) for part in parts)
    if isinstance(kind, type) and issubclass(kind, Settings):
        return value if isinstance(value, kind) else kind.from_layers(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value
    if isinstance(value, bool | dict | list):
        raise ValueError(value)
    if kind is int:
        if not float(value).is_integer():
            raise ValueError(value)
        return int(value)
    if kind is float and not math.isfinite(float(value)):
        raise ValueError(value)
    return kind(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the config dataclasses."""

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """name -> Field, in the order of declaration."""
        return _fields(cls)

    @classmethod
    def check_keys(cls, values: Mapping[str, Any], where: str) -> None:
        """Refuse a key that is not a setting of this command."""
        for key in values:
            if str(key) not in cls.fields():
                raise UsageError(f"{where}: unknown key {str(key)!r}", hint=suggest_name(str(key), cls.fields()))

    @classmethod
    def from_layers(cls, *layers: Mapping[str, Any], where: str = "settings") -> Self:
        """Build from layers of values, later ones win; what none names, or names as null, keeps its default."""
        merged: dict[str, Any] = {}
        for layer in layers:
            cls.check_keys(layer, where)
            layer = {key: value for key, value in layer.items() if value is not None}
            for pair in ALTERNATIVES:
                if pair & layer.keys():
                    for name in pair:
                        merged.pop(name, None)
            merged.update(layer)
        fields = cls.fields()
        for name, field in fields.items():
            if field.required and merged.get(name) is None:
                raise UsageError(f"missing {field.flag}: {field.help}")
        config = cls(**{name: fields[name].read(value, where) for name, value in merged.items()})
        object.__setattr__(config, "_given", frozenset(layers[-1]) if layers else frozenset())
        return config

    def given_as(self, other: Settings) -> Self:
        """This config, remembering what the user chose in `other`, which it was made from."""
        object.__setattr__(self, "_given", getattr(other, "_given", None))
        return self

    def was_given(self, name: str) -> bool:
        """The user chose this value (by flag, YAML or in code), no preset or default did."""
        given = getattr(self, "_given", None)
        return getattr(self, name) != self.fields()[name].default if given is None else name in given

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON: paths as strings, tuples as lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return self.plain(values)

    @staticmethod
    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as plain values."""
        return {name: _plain(value) for name, value in values.items()}

    def to_yaml(self) -> str:
        """The snapshot: every setting, in the order of declaration."""
        return yaml_text(self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return str(value) if isinstance(value, Path | Location) else list(value) if isinstance(value, tuple) else value


@cache
def _fields(cls: type[Settings]) -> dict[str, Field]:
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
        optional = get_origin(kind) in (Union, types.UnionType)
        if optional:
            kind = next(part for part in get_args(kind) if part is not type(None))
        found[field.name] = Field(
            name=field.name,
            kind=kind,
            help=notes[0],
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            positional=POSITIONAL in notes[1:],
            repeated=REPEATED in notes[1:],
            optional=optional,
        )
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping."""
    import yaml

    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; a YAML file was expected") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold `key: value` lines, not a {type(value).__name__}")
    return value


def yaml_text(value: Mapping[str, Any]) -> str:
    """A mapping as YAML that a person reads: keys in their order, Unicode as it is."""
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=120)
