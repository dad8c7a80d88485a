"""Read a settings dataclass: its fields' types and help; take values from YAML or flags; write them back.

A field is `name: Annotated[type, help, *marks] = default`. The marks say how a setting is given and when it counts.
The types are trusted over YAML's guesses (PyYAML reads `1e-5` as a string). An unknown key or value is refused, with
the nearest known one as a hint.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from vlkit.errors import UsageError, suggest_name
from vlkit.storage import Location

# Marks: an argument without a flag's name; a flag that is given once for each of its texts.
POSITIONAL, REPEATED = "positional", "repeated"
# For `requires`: any value but None.
SET = object()

TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    Location: "a path",
}

# Settings that exclude each other: the choice of the more specific layer wins.
ALTERNATIVES = ({"steps", "epochs"},)


@dataclass(frozen=True)
class Requirement:
    """A mark: the field has an effect only where another setting has one of these values."""

    setting: str
    values: tuple[Any, ...]

    def is_met(self, settings: Mapping[str, Any]) -> bool:
        """Return whether `settings` (name -> value) has such a value."""
        value = settings.get(self.setting)
        return value is not None if SET in self.values else value in self.values

    def assignments(self, fields: Mapping[str, Field]) -> str:
        """Return what to give on the command line: "--tune lora"."""
        return " or ".join(fields[self.setting].assignment(value) for value in self.values)


def requires(setting: str, *values: Any) -> Requirement:
    """Return the mark of a field that has no effect unless `setting` is one of `values`; without values: unless set."""
    return Requirement(setting, values or (SET,))


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
    requirement: Requirement | None

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        if self.positional:
            return self.name.upper()
        return f"-{self.name}" if len(self.name) == 1 else "--" + self.name.replace("_", "-")

    def assignment(self, value: Any) -> str:
        """Return how a value is given on the command line: "--tune lora"; a switch or any value: "--llm-lora"."""
        return self.flag if value is SET or value is True else f"{self.flag} {_flag_value(value)}"

    def circumstance(self, value: Any) -> str:
        """Return "with" a value or "without" one, for a message."""
        return f"without {self.flag}" if value is None else f"with {self.assignment(value)}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a Literal setting, else nothing."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_union(self) -> bool:
        """It takes values of several types, such as a number or a word."""
        return _is_union(self.kind)

    def read(self, value: Any, source: str) -> Any:
        """Return `value` as this field's type.

        Raises:
            UsageError: it is no such value; the message begins with its `source`, a file, unless that is empty.
        """
        prefix = _prefix(source)
        if value is None:
            if self.optional:
                return None
            raise UsageError(f"{prefix}{self.flag} is empty")
        if value is False and self.kind is str:
            value = "off"  # What YAML 1.1 makes of a bare `off`.
        if self.choices:
            if value not in self.choices:
                message = f"{prefix}{self.flag} {value!r} is none of {', '.join(self.choices)}"
                raise UsageError(message, hint=suggest_name(str(value), self.choices))
            return value
        try:
            return _convert(self.kind, [value] if self.repeated and isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise UsageError(f"{prefix}{self.flag} {value!r} is not {_type_words(self.kind)}") from None


def _prefix(source: str) -> str:
    """Return what a message begins with: the file that a value comes from; nothing for the command line."""
    return f"{source}: " if source else ""


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _type_words(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(map(_type_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return TYPE_WORDS.get(kind) or ("two numbers" if float in get_args(kind) else "a list of texts")


def _convert(kind: Any, value: Any) -> Any:
    if _is_union(kind):
        return _convert_union(get_args(kind), value)
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
        inner, *more = get_args(kind)
        nested = isinstance(value, dict) or any(part is None or isinstance(part, bool | dict | list) for part in parts)
        if nested or (more == [inner] and len(parts) != 2):
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


def _convert_union(kinds: Iterable[Any], value: Any) -> Any:
    """Return one of the words of a Literal as it is; anything else as the first type that takes it."""
    others = []
    for kind in kinds:
        if get_origin(kind) is not Literal:
            others.append(kind)
        elif value in get_args(kind):
            return value
    for kind in others:
        converted = _convert(kind, value)
        # A flag's or an old snapshot's text is a number only in its plain form: 32, not 032 or ٣٢.
        if isinstance(value, str) and str(converted) != value:
            raise ValueError(value)
        return converted
    raise ValueError(value)


T = TypeVar("T")


def require_resolved(value: T | None) -> T:
    """Return a setting that the trainer has filled in: no longer None, for the type checker as well."""
    assert value is not None, "the settings are not resolved"
    return value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the config dataclasses.

    Attributes:
        given: names of the settings that the user chose, by flag or in YAML; None: built in code, not from layers.
            No setting itself: neither a flag nor a key. `dataclasses.replace` carries it.
    """

    given: frozenset[str] | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """Return name -> Field, in the order of declaration."""
        if cls not in _FIELDS:
            _FIELDS[cls] = _read_fields(cls)
        return _FIELDS[cls]

    @classmethod
    def check_keys(cls, values: Mapping[str, Any], source: str) -> None:
        """Refuse a key that is not a setting of this command."""
        for key in values:
            if str(key) not in cls.fields():
                message = f"{_prefix(source)}unknown key {str(key)!r}"
                raise UsageError(message, hint=suggest_name(str(key), cls.fields()))

    @classmethod
    def from_layers(cls, *layers: Mapping[str, Any], source: str = "") -> Self:
        """Build from layers of values; later ones win, and the last is what the user gave.

        A setting that no layer names, or that is null, keeps its default; so does one that only a preset names and that
        has no effect with the others.
        """
        merged: dict[str, Any] = {}
        layer: dict[str, Any] = {}
        for values in layers:
            cls.check_keys(values, source)
            layer = {key: value for key, value in values.items() if value is not None}
            for pair in ALTERNATIVES:
                if pair & layer.keys():
                    for name in pair:
                        merged.pop(name, None)
            merged.update(layer)
        fields = cls.fields()
        for name, field in fields.items():
            if field.required and merged.get(name) is None:
                raise UsageError(f"missing {field.flag}: {field.help}")
        merged = {**cls.drop_idle(merged), **layer}
        return cls(given=frozenset(layer), **{name: fields[name].read(value, source) for name, value in merged.items()})

    @classmethod
    def drop_idle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` without the settings that have no effect with the others, or with their defaults."""
        fields = cls.fields()
        settings = {**{name: field.default for name, field in fields.items()}, **values}
        marks = {name: field.requirement for name, field in fields.items()}
        idle = {name for name, mark in marks.items() if mark is not None and not mark.is_met(settings)}
        return {name: value for name, value in values.items() if name not in idle}

    def was_given(self, name: str) -> bool:
        """Return whether the user chose this value (by flag, YAML or in code), not a preset or a default."""
        return getattr(self, name) != self.fields()[name].default if self.given is None else name in self.given

    def refuse_idle(self) -> None:
        """Refuse settings that the user gave and that have no effect; at its default a setting says nothing.

        Raises:
            UsageError: names all of them, what makes them idle, and what they need.
        """
        fields, values = self.fields(), self.values()
        idle: dict[str, Requirement] = {}
        active = self.drop_idle(values)
        for name, field in fields.items():
            if field.requirement and name not in active and self.was_given(name) and values[name] != field.default:
                idle[name] = field.requirement
        if not idle:
            return
        flags = " and ".join(fields[name].assignment(values[name]) for name in idle)
        causes = dict.fromkeys(fields[idle[name].setting].circumstance(values[idle[name].setting]) for name in idle)
        ways = list(dict.fromkeys(requirement.assignments(fields) for requirement in idle.values()))
        if len(ways) > 1:
            ways = [f"{idle[name].assignments(fields)} for {fields[name].flag}" for name in idle]
        message = f"{flags}: no effect {' and '.join(causes)}"
        raise UsageError(message, hint=f"leave {'it' if len(idle) == 1 else 'them'} out, or add {', '.join(ways)}")

    def values(self) -> dict[str, Any]:
        """Return name -> value of every setting, in the order of declaration."""
        return {name: getattr(self, name) for name in self.fields()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML and JSON: paths as strings, tuples as lists."""
        return self.to_plain(self.values())

    @staticmethod
    def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings as plain values."""
        return {name: _to_plain(value) for name, value in values.items()}

    def to_yaml(self) -> str:
        """Return the snapshot: every setting, in the order of declaration."""
        return yaml_text(self.to_dict())


def _to_plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return str(value) if isinstance(value, Path | Location) else list(value) if isinstance(value, tuple) else value


def _flag_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_FIELDS: dict[type[Settings], dict[str, Field]] = {}


def _read_fields(cls: type[Settings]) -> dict[str, Field]:
    hints = get_type_hints(cls, include_extras=True)
    fields = {}
    for field in dataclasses.fields(cls):
        if field.name == "given":
            continue
        hint = hints[field.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
        optional = _is_union(kind) and type(None) in get_args(kind)
        if optional:
            kind = Union[tuple(part for part in get_args(kind) if part is not type(None))]  # noqa: UP007
        fields[field.name] = Field(
            name=field.name,
            kind=kind,
            help=notes[0],
            default=None if field.default is dataclasses.MISSING else field.default,
            required=field.default is dataclasses.MISSING,
            positional=POSITIONAL in notes[1:],
            repeated=REPEATED in notes[1:],
            optional=optional,
            requirement=next((note for note in notes[1:] if isinstance(note, Requirement)), None),
        )
    return fields


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        UsageError: the file does not exist, or it holds something else.
    """
    import yaml

    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold `key: value` lines, not a {type(value).__name__}")
    return value


def yaml_text(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML that a person reads: keys in their order, Unicode as it is."""
    import yaml

    text: str = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=120)
    return text
