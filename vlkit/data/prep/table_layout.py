"""A table that names pictures: CSV, TSV, JSON lines, JSON or Parquet; one row a picture, or several of each."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.config.data import PrepConfig
from vlkit.data import captions
from vlkit.data.prep import tables
from vlkit.data.prep.raw_folder import RawImage, RawFolder, RawRow, Reject, reject_from_error
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError, suggest_name

# Where no flag or preset names a column, the first of these that the table has.
IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "image_name", "file_name", "filename", "file", "path", "filepath"),
    *("images", "img", "img_path", "image_id", "image_key", "photo", "picture"),
)
TEXT_COLUMNS = ("caption", "captions", "text", "description", "sentence", "title")
LABEL_COLUMNS = ("condition", "label", "class", "class_name", "category", "disease", "diagnosis", "dx", "species")
SEPARATORS = "|;"
PEEKED, TRIED = 200, 20
# Kinds of tables whose records need not all have the same columns.
OPEN_ENDED = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what. `labels`: one column of names, or several of 0 and 1."""

    image: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    group: str | None
    unit: str | None
    split: str | None

    @classmethod
    def of(cls, config: PrepConfig, names: Sequence[str], image: str, where: str) -> Columns:
        """Choose by the settings, else by the usual names.

        Args:
            names: the columns that there are.
            image: the one that names the pictures.

        Raises:
            DataError: a column is missing; names those that are there.
        """
        texts = tuple(column for column in config.text_column if column in names)
        if not config.text_column:
            texts = tuple(column for column in usual(TEXT_COLUMNS, names) if column != image)[:1]
        labels = tuple(column for column in config.label_column if column in names)
        if not config.label_column:
            labels = tuple(column for column in usual(LABEL_COLUMNS, names) if column not in (image, *texts))[:1]
        asked = [config.group_column, config.unit_column]
        asked += config.text_column if config.was_given("text_column") else ()
        asked += config.label_column if config.was_given("label_column") else ()
        for column in asked:
            if column and column not in names:
                raise _no_column(where, column, names)
        if not texts and not labels:
            wanted = config.text_column or TEXT_COLUMNS
            raise DataError(
                f"{where}: no column with texts ({', '.join(wanted)}) and none with classes; it has {', '.join(names)}",
                hint="name it: --text-column NAME, or --label-column NAME",
            )
        split = next(iter(usual(("split",), names)), None)
        return cls(image, texts, labels, config.group_column, config.unit_column, split)

    @property
    def used(self) -> set[str | None]:
        """Columns whose content the table of pairs has under its own names."""
        return {self.image, *self.texts, *self.labels, self.group, self.split}

    def told(self) -> str:
        """In words."""
        parts = [f"pictures from {self.image}"]
        parts += [f"texts from {', '.join(self.texts)}"] if self.texts else []
        parts += [f"classes from {', '.join(self.labels)}"] if self.labels else []
        return ", ".join(parts)


def usual(known: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that are called as such columns usually are, whatever their capitals."""
    return [name for word in known for name in names if name.lower() == word]


def _image_column(raw: RawFolder, names: Sequence[str], records: Sequence[Any], where: str) -> str:
    """The column that names pictures: as told, else of the usual ones that whose names are found most often."""
    given = raw.config.image_column
    if given:
        if given not in names:
            raise _no_column(where, given, names)
        return given
    candidates = usual(IMAGE_COLUMNS, names)
    if not candidates:
        told = f"{where}: which column names the images? It has {', '.join(names)}"
        raise DataError(told, hint="say so: --image-column NAME")
    return max(candidates, key=lambda column: _found(raw, column, records)) if len(candidates) > 1 else candidates[0]


def _found(raw: RawFolder, column: str, records: Sequence[Any]) -> int:
    """How many of these records name a picture in this column that is there."""
    found = 0
    for record in records[:TRIED]:
        for name in tables.cell_values(record.get(column))[:1]:
            with contextlib.suppress(DataError):
                raw.locate(name)
                found += 1
    return found


def _no_column(where: str, column: str, names: Sequence[str]) -> DataError:
    return DataError(f"{where}: no column {column!r}; it has {', '.join(names)}", hint=suggest_name(column, names))


def find_tables(source: SourceFolder) -> list[str]:
    """Tables at the top of a source or under documents/."""
    return [
        name
        for name in source.files
        if PurePosixPath(name).suffix.lower() in tables.SUFFIXES
        and str(PurePosixPath(name).parent) in (".", "documents")
    ]


def names_pictures(raw: RawFolder, name: str) -> bool:
    """A table with a column of pictures, by its first records."""
    try:
        peeked = list(itertools.islice(tables.read_records(raw.source.path(name), name), TRIED))
    except DataError:
        # It is meant to be a table; what is wrong with it is told when it is read.
        return PurePosixPath(name).suffix.lower() != ".json"
    columns = [column for _, record in peeked if isinstance(record, dict) for column in record]
    return raw.config.image_column in columns or bool(usual(IMAGE_COLUMNS, columns))


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
        found = [name for name in found if names_pictures(raw, name)] or found
    if len(found) > 1:
        told = f"{raw.source.location} holds {len(found)} tables: {', '.join(found[:8])}"
        raise DataError(told, hint=f"say which: --table {found[0]}; or --layout class-folders to read none of them")
    return found[0]


def table(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """The rows of the one table."""
    name = _the_table(raw)
    records = tables.read_records(raw.source.path(name), name)
    peeked = list(itertools.islice(records, PEEKED))
    good = [record for _, record in peeked if isinstance(record, dict)]
    names = list(dict.fromkeys(column for record in good for column in record if isinstance(column, str)))
    if not names:
        first = next((each.reason for _, each in peeked if isinstance(each, tables.BadLine)), "no row under its header")
        raise DataError(f"{raw.source.location}/{name}: {first}", hint="expected one record a line")
    image = _image_column(raw, names, good, name)
    if PurePosixPath(name).suffix.lower() in OPEN_ENDED:
        # A column may begin further down than was looked.
        names += [column for column in _configured(raw.config) if column not in names]
    columns = Columns.of(raw.config, names, image, name)
    raw.check_templates(names)
    console.say(f"{name}: {columns.told()}")
    # Where pictures are not looked for, their names are taken as relative to the source, as they are as a rule.
    folder = str(PurePosixPath(name).parent).removeprefix(".") if raw.listed else ""
    named: set[str] = set()
    seen: set[str] = set()
    for where, record in itertools.chain(peeked, records):
        if isinstance(record, tables.BadLine):
            yield Reject(where, record.what, record.reason)
            continue
        seen.update(record)
        yield from _rows_of(raw, columns, record, where, folder, named)
    for column in _configured(raw.config):
        if column not in seen and (column in columns.used or column == columns.unit):
            raise _no_column(name, column, sorted(seen))
    yield from raw.unnamed(named, "no row names this picture")


def _configured(config: PrepConfig) -> list[str]:
    """Columns that the user named; those of a preset alone may be missing."""
    named = [config.group_column, config.unit_column]
    for setting in ("text_column", "label_column"):
        if config.was_given(setting):
            named += getattr(config, setting)
    return [column for column in named if column]


def _rows_of(
    raw: RawFolder, columns: Columns, record: tables.Record, where: str, folder: str, named: set[str]
) -> Iterator[RawRow | Reject]:
    texts = [text for column in columns.texts for text in tables.cell_values(record.get(column))]
    classes = _classes(columns.labels, record)
    groups = _cleaned(record.get(columns.group)) if columns.group else ()
    images = [image.strip() for image in dict.fromkeys(tables.cell_values(record.get(columns.image)))]
    missing = [
        reason
        for reason, there in (
            (f"no {columns.group}", groups or not columns.group),
            (_no_words(columns), texts or classes),
            (f"no picture in {columns.image}", images),
            (f"a list that cannot be read in {', '.join(columns.labels)}", not any(map(tables.is_unreadable_list, classes))),
        )
        if not there
    ]
    fields = {key: text for key in record if (text := captions.clean(" ".join(tables.cell_values(record[key]))))}
    units = _cleaned(record.get(columns.unit)) if columns.unit else groups
    split = split_from_name(str(record[columns.split])) if columns.split and record.get(columns.split) else None
    extra = {column: _plain(record[column]) for column in record if column not in columns.used} or None
    for image in images:
        try:
            found = raw.locate(image, folder)
        except DataError as error:
            yield reject_from_error(error, where, image)
            continue
        named.add(found)
        if not missing:
            unit = units[0] if units else found
            yield from raw.rows_of(RawImage(found, texts, where, unit, groups, classes, split, fields, extra))
    if missing:
        yield Reject(where, groups[0] if groups else images[0] if images else where, "; ".join(missing))


def _no_words(columns: Columns) -> str:
    parts = [f"no text in {', '.join(columns.texts)}"] if columns.texts else []
    parts += [f"no class in {', '.join(columns.labels)}"] if columns.labels else []
    return ", ".join(parts)


def _cleaned(cell: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for value in tables.cell_values(cell) if (text := captions.clean(value))))


def _classes(columns: Sequence[str], record: tables.Record) -> tuple[str, ...]:
    """A cell may hold several: a list, or names with | or ; between. Several columns are yes or no each."""
    if len(columns) > 1:
        return tuple(
            column for column in columns if str(record.get(column)).strip().lower() in ("1", "1.0", "true", "yes")
        )
    found = []
    for column in columns:
        for value in tables.cell_values(record.get(column)):
            for mark in SEPARATORS[1:]:
                value = value.replace(mark, SEPARATORS[0])
            found += [captions.clean(part) for part in value.split(SEPARATORS[0])]
    return tuple(dict.fromkeys(name for name in found if name))


def _plain(cell: Any) -> str | None:
    if cell is None or cell != cell:
        return None
    text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
