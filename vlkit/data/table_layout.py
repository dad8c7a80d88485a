"""A table that names pictures: CSV, TSV, JSON lines, JSON or Parquet; one row a picture, or several of each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.config import PrepConfig
from vlkit.data import captions, tables
from vlkit.data.pairs import PAIR_COLUMNS
from vlkit.data.raw import Item, RawFolder, RawRow, Reject, reject_of
from vlkit.data.sources import Source
from vlkit.data.splits import named_split
from vlkit.errors import DataError, nearest

# Where no flag or preset names a column, the first of these that the table has.
IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "image_name", "file_name", "filename", "file", "path", "filepath"),
    *("images", "img", "img_path", "image_id", "image_key", "photo", "picture"),
)
TEXT_COLUMNS = ("caption", "captions", "text", "description", "sentence", "title")
LABEL_COLUMNS = ("condition", "label", "class", "class_name", "category", "disease", "diagnosis", "dx", "species")
SEPARATORS = "|;"
PEEKED = 200


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what. `labels`: one column of names, or several of 0 and 1."""

    image: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    group: str | None
    unit: str | None
    split: str | None
    extra: tuple[str, ...]

    @classmethod
    def of(cls, config: PrepConfig, names: Sequence[str], where: str) -> Columns:
        """Choose by the settings, else by the usual names.

        Raises:
            DataError: a column is missing; names those that are there.
        """
        image = _required("image", config.image_column, IMAGE_COLUMNS, names, where)
        texts = tuple(column for column in config.text_column if column in names)
        if not config.text_column:
            texts = tuple(column for column in TEXT_COLUMNS if column in names and column != image)[:1]
        labels = tuple(column for column in config.label_column if column in names)
        if not config.label_column:
            labels = tuple(column for column in LABEL_COLUMNS if column in names and column not in (image, *texts))[:1]
        if config.was_given("text_column") or config.was_given("label_column"):
            for column in (*config.text_column, *config.label_column):
                if column not in names:
                    raise _no_column(where, column, names)
        if not texts and not labels:
            wanted = config.text_column or TEXT_COLUMNS
            raise DataError(
                f"{where}: no column with texts ({', '.join(wanted)}) and none with classes; it has {', '.join(names)}",
                hint="name it: --text-column NAME, or --label-column NAME",
            )
        for column in (config.group_column, config.unit_column):
            if column and column not in names:
                raise _no_column(where, column, names)
        split = "split" if "split" in names else None
        used = {image, *texts, *labels, config.group_column, config.unit_column, split}
        extra = tuple(column for column in names if column not in used)
        return cls(image, texts, labels, config.group_column, config.unit_column, split, extra)

    def told(self) -> str:
        """In words."""
        parts = [f"pictures from {self.image}"]
        parts += [f"texts from {', '.join(self.texts)}"] if self.texts else []
        parts += [f"classes from {', '.join(self.labels)}"] if self.labels else []
        return ", ".join(parts)


def _required(what: str, given: str | None, usual: Sequence[str], names: Sequence[str], where: str) -> str:
    if given:
        if given not in names:
            raise _no_column(where, given, names)
        return given
    found = next((column for column in usual if column in names), None)
    if found is None:
        told = f"{where}: which column names the {what}s? It has {', '.join(names)}"
        raise DataError(told, hint=f"say so: --{what}-column NAME")
    return found


def _no_column(where: str, column: str, names: Sequence[str]) -> DataError:
    return DataError(f"{where}: no column {column!r}; it has {', '.join(names)}", hint=nearest(column, names))


def find_tables(source: Source) -> list[str]:
    """Tables at the top of a source or under documents/."""
    return [
        name
        for name in source.files
        if PurePosixPath(name).suffix.lower() in tables.SUFFIXES
        and str(PurePosixPath(name).parent) in (".", "documents")
    ]


def _the_table(raw: RawFolder) -> str:
    found = find_tables(raw.source)
    if raw.table:
        for name in (raw.table, f"documents/{raw.table}"):
            if name in raw.source.files:
                return name
        inside = ", ".join(found or sorted({name.split("/")[0] for name in raw.source.files})[:8]) or "nothing"
        told = f"{raw.source.location}: no {raw.table}, and none under documents/"
        raise DataError(told, hint=f"found: {inside}")
    if not found:
        raise DataError(f"{raw.source.location}: no table ({', '.join(tables.SUFFIXES)}) in it or under documents/")
    if len(found) > 1:
        told = f"{raw.source.location} holds {len(found)} tables: {', '.join(found[:8])}"
        raise DataError(told, hint=f"say which: --table {found[0]}; or --layout class-folders to read none of them")
    return found[0]


def table(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """The rows of the one table."""
    name = _the_table(raw)
    records = tables.records(raw.source.path(name), name)
    peeked = list(itertools.islice(records, PEEKED))
    names = list(dict.fromkeys(c for _, each in peeked if isinstance(each, dict) for c in each if isinstance(c, str)))
    if not names:
        first = next((each.reason for _, each in peeked if isinstance(each, tables.BadLine)), "no row under its header")
        raise DataError(f"{raw.source.location}/{name}: {first}", hint="expected one record a line")
    columns = Columns.of(raw.config, names, name)
    console.say(f"{name}: {columns.told()}")
    folder = str(PurePosixPath(name).parent).removeprefix(".")
    named: set[str] = set()
    for where, record in itertools.chain(peeked, records):
        if isinstance(record, tables.BadLine):
            yield Reject(where, record.what, record.reason)
            continue
        yield from _rows_of(raw, columns, record, where, folder, named)
    yield from raw.unnamed(named, "no row names this picture")


def _rows_of(
    raw: RawFolder, columns: Columns, record: tables.Record, where: str, folder: str, named: set[str]
) -> Iterator[RawRow | Reject]:
    texts = [text for column in columns.texts for text in tables.values(record.get(column))]
    classes = _classes(columns.labels, record)
    groups = _cleaned(record.get(columns.group)) if columns.group else ()
    images = [image.strip() for image in dict.fromkeys(tables.values(record.get(columns.image)))]
    missing = [
        reason
        for reason, there in (
            (f"no {columns.group}", groups or not columns.group),
            (f"no text in {', '.join(columns.texts) or '(no column)'}", texts or classes),
            (f"no picture in {columns.image}", images),
        )
        if not there
    ]
    fields = {key: text for key in record if (text := captions.clean(" ".join(tables.values(record[key]))))}
    units = _cleaned(record.get(columns.unit)) if columns.unit else groups
    split = named_split(str(record[columns.split])) if columns.split and record.get(columns.split) else None
    extra = {_free(column): _plain(record.get(column)) for column in columns.extra} or None
    for image in images:
        try:
            found = raw.locate(image, folder)
        except DataError as error:
            yield reject_of(error, where, image)
            continue
        named.add(found)
        if not missing:
            unit = units[0] if units else found
            yield from raw.rows_of(Item(found, texts, where, unit, groups, classes, split, fields, extra))
    if missing:
        yield Reject(where, groups[0] if groups else images[0] if images else where, "; ".join(missing))


def _cleaned(cell: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for value in tables.values(cell) if (text := captions.clean(value))))


def _classes(columns: Sequence[str], record: tables.Record) -> tuple[str, ...]:
    """A cell may hold several: a list, or names with | or ; between. Several columns are yes or no each."""
    if len(columns) > 1:
        return tuple(
            column for column in columns if str(record.get(column)).strip().lower() in ("1", "1.0", "true", "yes")
        )
    found = []
    for column in columns:
        for value in tables.values(record.get(column)):
            for mark in SEPARATORS[1:]:
                value = value.replace(mark, SEPARATORS[0])
            found += [captions.clean(part) for part in value.split(SEPARATORS[0])]
    return tuple(dict.fromkeys(name for name in found if name))


def _free(column: str) -> str:
    return f"source_{column}" if column in (*PAIR_COLUMNS, "image_key", "image_looks", "weight") else column


def _plain(cell: Any) -> str | None:
    if cell is None or cell != cell:
        return None
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
