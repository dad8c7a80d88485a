"""Filters such as `class=rust`: which documents of an index a search may find."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlkit.data.captions import readable_class
from vlkit.errors import UsageError, suggest_name
from vlkit.inference.index.index_folder import Index
from vlkit.models.stages import Modality

# Columns of the docstore; any other name is a further column of the source.
DOCSTORE_COLUMNS = ("class", "group", "id")
MAX_SUGGESTED_VALUES = 5000
Filters = Mapping[str, frozenset[str]]


def parse_filters(lines: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return name -> allowed values; a document passes with one value of every name.

    Raises:
        UsageError: a line without a name or a value.
    """
    filters: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        name, _, value = (part.strip() for part in line.partition("="))
        if not name or not value:
            raise UsageError(f"the filter {line!r} does not have the form class=rust")
        filters[name].add(value)
    return {name: frozenset(values) for name, values in filters.items()}


def allowed_mask(index: Index, modality: Modality, filters: Filters) -> np.ndarray:
    """Return bool [documents]: True for those that pass all filters."""
    mask = np.ones(len(index.vectors[modality]), bool)
    for name, allowed in filters.items():
        columns = _values(index, modality, name)
        mask &= np.fromiter((not allowed.isdisjoint(values) for values in columns), bool, len(mask))
    return mask


def refuse_unknown(index: Index, filters: Filters) -> None:
    """Refuse a name or a value that no document has.

    Raises:
        UsageError: suggests the most similar one that exists.
    """
    for name, allowed in filters.items():
        known = {value for modality in index.vectors for values in _values(index, modality, name) for value in values}
        if not known:
            further = {key for modality in index.vectors for metadata in _metadata(index, modality) for key in metadata}
            others = [other for other in (*DOCSTORE_COLUMNS, *sorted(further)) if other != name]
            raise UsageError(f"no document in {index.name} has a {name}", hint=suggest_name(name, others))
        if allowed.isdisjoint(known):
            value = sorted(allowed)[0]
            message = f"no document in {index.name} has {name}={value}"
            raise UsageError(message, hint=suggest_name(value, sorted(known)[:MAX_SUGGESTED_VALUES]))


def _values(index: Index, modality: Modality, name: str) -> list[list[str]]:
    """Return the values of every document under a name."""
    if name == "group":
        return list(index.column(modality, name).to_pylist())
    if name == "class":
        classes = index.column(modality, name).to_pylist()
        names = {class_name: _class_names(class_name) for class_name in set(classes) if class_name is not None}
        return [names.get(class_name, []) for class_name in classes]
    if name == "id":
        return [[key] for key in index.column(modality, name).to_pylist()]
    return [_as_texts(metadata[name]) if name in metadata else [] for metadata in _metadata(index, modality)]


def _class_names(class_name: str) -> list[str]:
    """Return the names by which a class is found: as in the data, readable, and each condition by itself."""
    parts = class_name.split("|")
    return list(dict.fromkeys([class_name, *parts, *map(readable_class, parts)]))


def _metadata(index: Index, modality: Modality) -> list[dict[str, Any]]:
    return [json.loads(value or "{}") for value in index.column(modality, "metadata").to_pylist()]


def _as_texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
