"""Tables as users have them -> records: CSV, TSV, JSON lines, JSON, Parquet, one record at a time.

A file that ends inside a quote, or is not UTF-8, is refused as a whole: nobody can say how many rows it swallowed. A
line that is no record is a reject, and the rest goes on.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlkit.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# What spreadsheets and other programs write where there is nothing.
EMPTY = frozenset(
    ["", "nan", "null", "none", "n/a", "#n/a", "<na>", "#name?", "#value!", "#ref!", "#div/0!", "#null!", "#num!"]
)
DELIMITERS = ",;\t|"
LONGEST_CELL = 2**24
SNIFFED = 20
_SAID = re.compile(r"sep=(.)", re.IGNORECASE)
_NAN = re.compile(r"\bnan\b")
_PRINTED = re.compile(r"""['"]\s+['"]""")

Record = dict[str, Any]


class BadLine(Exception):
    """A line that is no record; `where` and `what` go into rejects.csv."""

    def __init__(self, where: str, what: str, reason: str) -> None:
        super().__init__(reason)
        self.where, self.what, self.reason = where, what, reason


def records(path: Path, name: str | None = None) -> Iterator[tuple[str, Record | BadLine]]:
    """The records of a table with their places, `file:line`; a line that is none comes as a BadLine.

    Args:
        path: its suffix says how it is read.
        name: what messages call it.

    Raises:
        DataError: the file cannot be read as what its suffix says.
    """
    name = name or path.name
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _csv(path, name, "\t" if suffix == ".tsv" else None)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(lines(path, name), name)
    elif suffix == ".json":
        yield from _json(path, name)
    elif suffix == ".parquet":
        yield from _parquet(path, name)
    else:
        raise DataError(f"{path}: a table ends in {', '.join(SUFFIXES)}")


def values(cell: Any) -> list[str]:
    """A cell's texts: one, or one an element of a list; a list written as text (JSON or Python) is a list.

    Empty cells, and what spreadsheets write for them, give none.
    """
    if isinstance(cell, str) and cell[:1] + cell[-1:] in ("[]", "()", "{}") and (cell[0] == "[" or broken_list(cell)):
        cell = _literal(cell)
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if isinstance(cell, list | tuple):
        return [text for item in cell for text in values(item)]
    if cell is None or isinstance(cell, dict) or (isinstance(cell, float) and math.isnan(cell)):
        return []
    text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    return [] if text.strip().casefold() in EMPTY else [text]


def _literal(cell: str) -> Any:
    if _PRINTED.search(cell):
        # A printed numpy array: Python would glue its strings together.
        return cell
    for read in (json.loads, lambda text: ast.literal_eval(_NAN.sub("None", text))):
        try:
            value = read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, list | tuple):
            return list(value)
        if isinstance(value, set):
            return sorted(map(str, value))
    return cell


def broken_list(text: str) -> bool:
    """It begins like a list, a tuple or a mapping, and is none that `values` could read."""
    return text[:1] in ("[", "(", "{") and any(quote in text[1:3] for quote in "'\"")


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def lines(path: Path, name: str) -> Iterator[str]:
    """A text file's lines, their ends as they are; DataError where it is not UTF-8 (or UTF-16 that says so)."""
    try:
        with path.open(encoding=_encoding(path), newline="") as file:
            yield from file
    except UnicodeError as error:
        told = f"{name}, line {_line_of(path)}: not UTF-8 ({getattr(error, 'reason', error)})"
        raise DataError(told, hint="save it as UTF-8, for example: iconv -f latin1 -t utf-8") from None


def _line_of(path: Path) -> int:
    """The first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _csv(path: Path, name: str, delimiter: str | None) -> Iterator[tuple[str, Record | BadLine]]:
    csv.field_size_limit(LONGEST_CELL)
    text = lines(path, name)
    head = list(itertools.islice(text, SNIFFED))
    if any("\0" in line for line in head):
        raise DataError(f"{name}: holds zero bytes; it is no text table")
    if head and (said := _SAID.fullmatch(head[0].strip())):
        # What spreadsheets write before the header.
        delimiter, head[0] = said[1], "\n"
    reader = csv.reader(itertools.chain(head, text), delimiter=delimiter or _delimiter(head), strict=True)
    header, started = None, 1
    try:
        for row in reader:
            where, started = f"{name}:{started}", reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _header(row, name)
            elif len(row) != len(header):
                cut = ": cut off?" if len(row) < len(header) else ""
                yield where, BadLine(where, str(row)[:80], f"{len(row)} cells, {len(header)} columns{cut}")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _csv_refused(name, started, error) from None
    if header is None:
        raise DataError(f"{name} is empty: it has no header line")


def _delimiter(head: Sequence[str]) -> str:
    """The one under which header and first row have the same number of cells, and most of them."""

    def cells(delimiter: str) -> tuple[bool, int]:
        rows = [row for row in csv.reader(head, delimiter=delimiter) if any(row)]
        return len(rows) > 1 and len(rows[0]) == len(rows[1]) > 1, len(rows[0]) if rows else 0

    return max(DELIMITERS, key=cells)


def _csv_refused(name: str, line: int, error: csv.Error) -> DataError:
    if "unexpected end of data" in str(error) or "field larger than" in str(error):
        told = f"{name}, line {line}: a quote that opens in this row is never closed"
        return DataError(told, hint='the file is cut off there, or a " inside a text is not doubled ("")')
    return DataError(f"{name}, line {line}: {error}", hint='a " inside a quoted text must be doubled ("")')


def _header(row: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in row]
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice:
        raise DataError(f"{name}: the column {twice[0]!r} stands twice in the header", hint="rename one of them")
    return [column or f"column_{position}" for position, column in enumerate(header, start=1)]


def _json_lines(text: Iterator[str], name: str) -> Iterator[tuple[str, Record | BadLine]]:
    for number, line in enumerate(text, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadLine(where, line.strip()[:80], f"not JSON: {getattr(error, 'msg', 'nested too deeply')}")
            continue
        yield where, value if isinstance(value, dict) else BadLine(where, line.strip()[:80], "not a JSON object")


def _json(path: Path, name: str) -> Iterator[tuple[str, Record | BadLine]]:
    """One object, a list of objects, or, as some files are called, JSON lines."""
    text = "".join(lines(path, name))
    if not text.strip():
        yield name, BadLine(name, name, "the file is empty")
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n" in text.strip() and _is_object(text.strip().split("\n")[0]):
            yield from _json_lines(iter(text.split("\n")), name)
        else:
            yield name, BadLine(name, text.strip()[:80], f"not JSON: {getattr(error, 'msg', 'nested too deeply')}")
        return
    several = isinstance(value, list)
    for number, item in enumerate(value if several else [value], start=1):
        where = f"{name}[{number}]" if several else name
        yield where, item if isinstance(item, dict) else BadLine(where, str(item)[:80], "not a JSON object")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Record | BadLine]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for record in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", record
    except (pyarrow.ArrowInvalid, OSError) as error:
        hint = "write it again; it may have been cut off on its way"
        raise DataError(f"{name} cannot be read as Parquet: {error}", hint=hint) from None
