"""Read a table that names images: CSV, TSV, JSON lines, JSON or Parquet, with one row or several per image."""

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
from vlkit.data.prep.raw_folder import RawFolder, RawImage, RawRow, Reject, reject_from_error
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError, suggest_name

# Where neither a flag nor a preset names a column, the first of these that the table has.
IMAGE_COLUMNS = (
    *("image", "image_path", "image_file", "image_name", "file_name", "filename", "file", "path", "filepath"),
    *("images", "img", "img_path", "image_id", "image_key", "photo", "picture"),
)
TEXT_COLUMNS = ("caption", "captions", "text", "description", "sentence", "title")
LABEL_COLUMNS = ("condition", "label", "class", "class_name", "category", "disease", "diagnosis", "dx", "species")
CLASS_SEPARATORS = "|;"
# Records read before the columns are chosen; and those of them that show whether a column names images.
PEEK_RECORDS, PROBE_RECORDS = 200, 20
# Kinds of tables whose records need not all have the same columns.
SCHEMALESS_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Columns:
    """What each column of a table means. `labels`: one column of names, or several of 0 and 1."""

    image: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    group: str | None
    unit: str | None
    split: str | None

    @classmethod
    def choose(cls, config: PrepConfig, names: Sequence[str], image: str, where: str) -> Columns:
        """Choose the columns by the settings, else by the usual names.

        Args:
            names: the table's columns.
            image: the one that names the images.

        Raises:
            DataError: a column is missing; lists the existing ones.
        """
        texts = tuple(column for column in config.text_column if column in names)
        if not config.text_column:
            texts = tuple(column for column in usual_columns(TEXT_COLUMNS, names) if column != image)[:1]
        labels = tuple(column for column in config.label_column if column in names)
        if not config.label_column:
            labels = tuple(c for c in usual_columns(LABEL_COLUMNS, names) if c not in (image, *texts))[:1]
        requested = [config.group_column, config.unit_column]
        requested += config.text_column if config.was_given("text_column") else ()
        requested += config.label_column if config.was_given("label_column") else ()
        for column in requested:
            if column and column not in names:
                raise _missing_column(where, column, names)
        if not texts and not labels:
            tried = ", ".join(config.text_column or TEXT_COLUMNS)
            message = f"{where}: no column of texts ({tried}) and none of classes; it has {', '.join(names)}"
            raise DataError(message, hint="name it: --text-column NAME, or --label-column NAME")
        split = next(iter(usual_columns(("split",), names)), None)
        return cls(image, texts, labels, config.group_column, config.unit_column, split)

    @property
    def mapped_names(self) -> set[str | None]:
        """Columns whose content the pairs table holds under its own names."""
        return {self.image, *self.texts, *self.labels, self.group, self.split}

    def describe(self) -> str:
        """Return the choice in words."""
        parts = [f"images from {self.image}"]
        parts += [f"texts from {', '.join(self.texts)}"] if self.texts else []
        parts += [f"classes from {', '.join(self.labels)}"] if self.labels else []
        return ", ".join(parts)


def usual_columns(usual: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns with a usual name, in the order of the usual names, whatever their capitals."""
    return [name for word in usual for name in names if name.lower() == word]


def _choose_image_column(raw: RawFolder, names: Sequence[str], records: Sequence[Any], where: str) -> str:
    """Return the column that --image-column names, else the usual one with the most existing images."""
    column = raw.config.image_column
    if column:
        if column not in names:
            raise _missing_column(where, column, names)
        return column
    candidates = usual_columns(IMAGE_COLUMNS, names)
    if not candidates:
        message = f"{where}: which column names the images? It has {', '.join(names)}"
        raise DataError(message, hint="name it: --image-column NAME")
    if len(candidates) == 1:
        return candidates[0]
    return max(candidates, key=lambda candidate: _count_existing_images(raw, candidate, records))


def _count_existing_images(raw: RawFolder, column: str, records: Sequence[Any]) -> int:
    """Count the first records that name an existing image in this column."""
    count = 0
    for record in records[:PROBE_RECORDS]:
        for name in tables.cell_values(record.get(column))[:1]:
            with contextlib.suppress(DataError):
                raw.locate(name)
                count += 1
    return count


def _missing_column(where: str, column: str, names: Sequence[str]) -> DataError:
    return DataError(f"{where}: no column {column!r}; it has {', '.join(names)}", hint=suggest_name(column, names))


def find_tables(source: SourceFolder) -> list[str]:
    """Return the tables at the top of a source or under documents/."""
    return [
        name
        for name in source.files
        if PurePosixPath(name).suffix.lower() in tables.SUFFIXES
        and str(PurePosixPath(name).parent) in (".", "documents")
    ]


def has_image_column(raw: RawFolder, name: str) -> bool:
    """Return whether a table has a column of images, by its first records."""
    try:
        head = list(itertools.islice(tables.read_records(raw.source.local_path(name), name), PROBE_RECORDS))
    except DataError:
        # It is meant to be a table; reading it will say what is wrong with it.
        return PurePosixPath(name).suffix.lower() != ".json"
    columns = [column for _, record in head if isinstance(record, dict) for column in record]
    return raw.config.image_column in columns or bool(usual_columns(IMAGE_COLUMNS, columns))


def _choose_table(raw: RawFolder) -> str:
    names = find_tables(raw.source)
    if raw.table:
        for name in (raw.table, f"documents/{raw.table}"):
            if name in raw.source.files:
                return name
        content = ", ".join(names or sorted({name.split("/")[0] for name in raw.source.files})[:8]) or "nothing"
        message = f"{raw.source.location}: no {raw.table}, and none under documents/"
        raise DataError(message, hint=f"it holds {content}")
    if not names:
        raise DataError(f"{raw.source.location}: no table ({', '.join(tables.SUFFIXES)}) in it or under documents/")
    if len(names) > 1:
        names = [name for name in names if has_image_column(raw, name)] or names
    if len(names) > 1:
        message = f"{raw.source.location} holds {len(names)} tables: {', '.join(names[:8])}"
        raise DataError(message, hint=f"choose one: --table {names[0]}; or read none: --layout class-folders")
    return names[0]


def read_table(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield the rows of the one table."""
    name = _choose_table(raw)
    records = tables.read_records(raw.source.local_path(name), name)
    head = list(itertools.islice(records, PEEK_RECORDS))
    good = [record for _, record in head if isinstance(record, dict)]
    names = list(dict.fromkeys(column for record in good for column in record if isinstance(column, str)))
    if not names:
        bad = (record.reason for _, record in head if isinstance(record, tables.BadLine))
        message = f"{raw.source.location}/{name}: {next(bad, 'no row under its header')}"
        raise DataError(message, hint="expected one record per line")
    image = _choose_image_column(raw, names, good, name)
    if PurePosixPath(name).suffix.lower() in SCHEMALESS_SUFFIXES:
        # A column may appear further down than the head.
        names += [column for column in _requested_columns(raw.config) if column not in names]
    columns = Columns.choose(raw.config, names, image, name)
    raw.check_templates(names)
    console.say(f"{name}: {columns.describe()}")
    # Where images are not looked up, their names count as relative to the source, as they usually are.
    folder = str(PurePosixPath(name).parent).removeprefix(".") if raw.lists_images else ""
    named: set[str] = set()
    existing: set[str] = set()
    for where, record in itertools.chain(head, records):
        if isinstance(record, tables.BadLine):
            yield Reject(where, record.content, record.reason)
            continue
        existing.update(record)
        yield from _make_rows(raw, columns, record, where, folder, named)
    for column in _requested_columns(raw.config):
        if column not in existing and (column in columns.mapped_names or column == columns.unit):
            raise _missing_column(name, column, sorted(existing))
    yield from raw.reject_unnamed_images(named, "no row names this image")


def _requested_columns(config: PrepConfig) -> list[str]:
    """Return the columns that the user named; those that only a preset names may be missing."""
    columns = [config.group_column, config.unit_column]
    for setting in ("text_column", "label_column"):
        if config.was_given(setting):
            columns += getattr(config, setting)
    return [column for column in columns if column]


def _make_rows(
    raw: RawFolder, columns: Columns, record: tables.Record, where: str, folder: str, named: set[str]
) -> Iterator[RawRow | Reject]:
    """Yield the rows of a record, and add its images to `named`."""
    texts = [text for column in columns.texts for text in tables.cell_values(record.get(column))]
    classes = _parse_classes(columns.labels, record)
    groups = _clean_values(record.get(columns.group)) if columns.group else ()
    images = [image.strip() for image in dict.fromkeys(tables.cell_values(record.get(columns.image)))]
    unreadable = any(map(tables.is_unreadable_list, classes))
    problems = [
        problem
        for problem, applies in (
            (f"no {columns.group}", columns.group and not groups),
            (_no_text_reason(columns), not texts and not classes),
            (f"no image in {columns.image}", not images),
            (f"a list that cannot be read in {', '.join(columns.labels)}", unreadable),
        )
        if applies
    ]
    fields = {key: text for key in record if (text := captions.clean(" ".join(tables.cell_values(record[key]))))}
    units = _clean_values(record.get(columns.unit)) if columns.unit else groups
    split = split_from_name(str(record[columns.split])) if columns.split and record.get(columns.split) else None
    extra = {column: _to_text(record[column]) for column in record if column not in columns.mapped_names} or None
    for image in images:
        try:
            image_name = raw.locate(image, folder)
        except DataError as error:
            yield reject_from_error(error, where, image)
            continue
        named.add(image_name)
        if not problems:
            unit = units[0] if units else image_name
            yield from raw.make_rows(RawImage(image_name, texts, where, unit, groups, classes, split, fields, extra))
    if problems:
        yield Reject(where, groups[0] if groups else images[0] if images else where, "; ".join(problems))


def _no_text_reason(columns: Columns) -> str:
    parts = [f"no text in {', '.join(columns.texts)}"] if columns.texts else []
    parts += [f"no class in {', '.join(columns.labels)}"] if columns.labels else []
    return ", ".join(parts)


def _clean_values(cell: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for value in tables.cell_values(cell) if (text := captions.clean(value))))


def _parse_classes(columns: Sequence[str], record: tables.Record) -> tuple[str, ...]:
    """Return a record's classes: names in one cell (a list, or separated by | or ;), or several columns of 0 and 1."""
    if len(columns) > 1:
        return tuple(
            column for column in columns if str(record.get(column)).strip().lower() in ("1", "1.0", "true", "yes")
        )
    names = []
    for column in columns:
        for value in tables.cell_values(record.get(column)):
            for separator in CLASS_SEPARATORS[1:]:
                value = value.replace(separator, CLASS_SEPARATORS[0])
            names += [captions.clean(part) for part in value.split(CLASS_SEPARATORS[0])]
    return tuple(dict.fromkeys(name for name in names if name))


def _to_text(cell: Any) -> str | None:
    if cell is None or cell != cell:
        return None
    text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
