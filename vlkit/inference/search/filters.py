"""`class=rust`: which of an index' rows a search may find."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlkit.data.captions import readable_class
from vlkit.errors import UsageError, suggest_name
from vlkit.inference.index.documents import Modality
from vlkit.inference.index.index_folder import Index

# Columns of the docstore; any other name is one of the source's further columns.
OWN = ("class", "group", "id")
Filters = Mapping[str, frozenset[str]]


def parsed(lines: Sequence[str]) -> dict[str, frozenset[str]]:
    """Name -> values, of which one must be there.

    Raises:
        UsageError: a line without a name or a value.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        name, _, value = (part.strip() for part in line.partition("="))
        if not name or not value:
            raise UsageError(f"the filter {line!r} is not of the form class=rust")
        found[name].add(value)
    return {name: frozenset(values) for name, values in found.items()}


def allowed(index: Index, kind: Modality, filters: Filters) -> np.ndarray:
    """bool [rows]: which have one of the values of every name."""
    mask = np.ones(len(index.nearest[kind]), bool)
    for name, values in filters.items():
        mask &= np.fromiter((not values.isdisjoint(each) for each in _values(index, kind, name)), bool, len(mask))
    return mask


def refuse_unknown(index: Index, filters: Filters) -> None:
    """Say which name or value nothing has.

    Raises:
        UsageError: names the nearest one that something has.
    """
    for name, values in filters.items():
        known = {value for kind in index.nearest for each in _values(index, kind, name) for value in each}
        if not known:
            further = {key for kind in index.nearest for each in _metadata(index, kind) for key in each}
            told = f"nothing in {index.name} has a {name}"
            others = [each for each in (*OWN, *sorted(further)) if each != name]
            raise UsageError(told, hint=suggest_name(name, others))
        if values.isdisjoint(known):
            value = sorted(values)[0]
            told = f"nothing in {index.name} has {name}={value}"
            raise UsageError(told, hint=suggest_name(value, sorted(known)[:5000]))


def _values(index: Index, kind: Modality, name: str) -> list[list[str]]:
    """Of every row the values that it has under a name."""
    if name == "group":
        return index.column(kind, name).to_pylist()
    if name == "class":
        found = index.column(kind, name).to_pylist()
        known = {each: _names(each) for each in set(found) if each is not None}
        return [known.get(each, []) for each in found]
    if name == "id":
        return [[each] for each in index.column(kind, name).to_pylist()]
    return [_texts(row[name]) if name in row else [] for row in _metadata(index, kind)]


def _names(class_name: str) -> list[str]:
    """What a class may be called: as the data has it, readably, and of several conditions each by itself."""
    parts = class_name.split("|")
    return list(dict.fromkeys([class_name, *parts, *map(readable_class, parts)]))


def _metadata(index: Index, kind: Modality) -> list[dict[str, Any]]:
    return [json.loads(each or "{}") for each in index.column(kind, "metadata").to_pylist()]


def _texts(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]
