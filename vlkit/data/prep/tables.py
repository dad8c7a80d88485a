"""Read tables as users have them, one record at a time: CSV, TSV, JSON lines, JSON, Parquet.

A file that ends inside a quote, or is not UTF-8, is refused as a whole: nobody can say how many rows it swallowed. A
line that is not a record is rejected alone, and the rest is read.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlkit.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# What spreadsheets and other programs write into an empty cell.
EMPTY_CELLS = frozenset(
    ["", "nan", "null", "none", "n/a", "#n/a", "<na>", "#name?", "#value!", "#ref!", "#div/0!", "#null!", "#num!"]
)
DELIMITERS = ",;\t|"
MAX_CELL_CHARACTERS = 2**24
# Lines from which the delimiter is guessed; characters of a bad line in rejects.csv.
SNIFFED_LINES, SHOWN_CHARACTERS = 20, 80
_DELIMITER_LINE = re.compile(r"sep=(.)", re.IGNORECASE)
_NAN = re.compile(r"\bnan\b")
_ADJACENT_STRINGS = re.compile(r"""['"]\s+['"]""")

Record = dict[str, Any]


class BadLine(Exception):
    """A line that is not a record; `where` and `content` go into rejects.csv."""

    def __init__(self, where: str, content: str, reason: str) -> None:
        super().__init__(reason)
        self.where, self.content, self.reason = where, content, reason


def read_records(path: Path, name: str | None = None) -> Iterator[tuple[str, Record | BadLine]]:
    """Yield the records of a table with their positions, `file:line`; a line that is not a record as a BadLine.

    Args:
        path: its suffix says how it is read.
        name: its name in messages.

    Raises:
        DataError: the file cannot be read as its suffix says.
    """
    name = name or path.name
    suffix = Path(name).suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _read_csv(path, name, "\t" if suffix == ".tsv" else None)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _read_json_lines(read_lines(path, name), name)
    elif suffix == ".json":
        yield from _read_json(path, name)
    elif suffix == ".parquet":
        yield from _read_parquet(path, name)
    else:
        raise DataError(f"{path}: a table ends in {', '.join(SUFFIXES)}")


def cell_values(cell: Any) -> list[str]:
    """Return a cell's texts: one, or one per element of a list; a list written as text (JSON or Python) is a list.

    Empty cells, and what spreadsheets write into them, give none.
    """
    if (
        isinstance(cell, str)
        and cell[:1] + cell[-1:] in ("[]", "()", "{}")
        and (cell[0] == "[" or is_unreadable_list(cell))
    ):
        cell = _parse_list(cell)
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if isinstance(cell, list | tuple):
        return [text for item in cell for text in cell_values(item)]
    if cell is None or isinstance(cell, dict) or (isinstance(cell, float) and math.isnan(cell)):
        return []
    text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    return [] if text.strip().casefold() in EMPTY_CELLS else [text]


def _parse_list(cell: str) -> Any:
    """Return the list that a text spells; any other text as it is."""
    if _ADJACENT_STRINGS.search(cell):
        # A printed numpy array: Python would join its strings.
        return cell
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, lambda text: ast.literal_eval(_NAN.sub("None", text)))
    for parse in parsers:
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, list | tuple):
            return list(value)
        if isinstance(value, set):
            return sorted(map(str, value))
    return cell


def is_unreadable_list(text: str) -> bool:
    """Return whether a value starts like a list, tuple or mapping of strings: then `cell_values` could not read it."""
    return text[:1] in ("[", "(", "{") and any(quote in text[1:3] for quote in "'\"")


def _detect_encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def read_lines(path: Path, name: str) -> Iterator[str]:
    """Yield a text file's lines with their line ends.

    Raises:
        DataError: it is neither UTF-8 nor UTF-16 with a byte order mark; names the line.
    """
    try:
        with path.open(encoding=_detect_encoding(path), newline="") as file:
            yield from file
    except UnicodeError as error:
        message = f"{name}, line {_first_undecodable_line(path)}: not UTF-8 ({getattr(error, 'reason', error)})"
        raise DataError(message, hint="save it as UTF-8, for example: iconv -f latin1 -t utf-8") from None


def _first_undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _read_csv(path: Path, name: str, delimiter: str | None) -> Iterator[tuple[str, Record | BadLine]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = read_lines(path, name)
    head = list(itertools.islice(lines, SNIFFED_LINES))
    if any("\0" in line for line in head):
        raise DataError(f"{name} holds zero bytes: it is not a text table")
    if head and (match := _DELIMITER_LINE.fullmatch(head[0].strip())):
        # Spreadsheets write the delimiter before the header.
        delimiter, head[0] = match[1], "\n"
    reader = csv.reader(itertools.chain(head, lines), delimiter=delimiter or _guess_delimiter(head), strict=True)
    header, first_line = None, 1
    try:
        for row in reader:
            where, first_line = f"{name}:{first_line}", reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _parse_header(row, name)
            elif len(row) != len(header):
                cut = ": cut off?" if len(row) < len(header) else ""
                reason = f"{len(row)} cells for {len(header)} columns{cut}"
                yield where, BadLine(where, str(row)[:SHOWN_CHARACTERS], reason)
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _translate_csv_error(name, first_line, error) from None
    if header is None:
        raise DataError(f"{name} is empty: it has no header line")


def _guess_delimiter(head: Sequence[str]) -> str:
    """Return the delimiter that gives header and first row the same number of cells, and the most."""

    def cells(delimiter: str) -> tuple[bool, int]:
        rows = [row for row in csv.reader(head, delimiter=delimiter) if any(row)]
        return len(rows) > 1 and len(rows[0]) == len(rows[1]) > 1, len(rows[0]) if rows else 0

    return max(DELIMITERS, key=cells)


def _translate_csv_error(name: str, line: int, error: csv.Error) -> DataError:
    if "unexpected end of data" in str(error) or "field larger than" in str(error):
        message = f"{name}, line {line}: a quote that opens in this row is never closed"
        return DataError(message, hint='the file is cut off there, or a " inside a text is not doubled ("")')
    return DataError(f"{name}, line {line}: {error}", hint='a " inside a quoted text must be doubled ("")')


def _parse_header(row: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in row]
    repeated = sorted({column for column in header if column and header.count(column) > 1})
    if repeated:
        raise DataError(f"{name}: the header has the column {repeated[0]!r} twice", hint="rename one of them")
    return [column or f"column_{position}" for position, column in enumerate(header, start=1)]


def _read_json_lines(lines: Iterator[str], name: str) -> Iterator[tuple[str, Record | BadLine]]:
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, BadLine(where, line.strip()[:SHOWN_CHARACTERS], _json_problem(error))
            continue
        yield where, _require_object(value, where, line.strip())


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Record | BadLine]]:
    """Yield one object, a list of objects, or JSON lines, whose files some call .json."""
    text = "".join(read_lines(path, name))
    if not text.strip():
        yield name, BadLine(name, name, "the file is empty")
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\n" in text.strip() and _is_object(text.strip().split("\n")[0]):
            yield from _read_json_lines(iter(text.split("\n")), name)
        else:
            yield name, BadLine(name, text.strip()[:SHOWN_CHARACTERS], _json_problem(error))
        return
    is_list = isinstance(value, list)
    for number, item in enumerate(value if is_list else [value], start=1):
        where = f"{name}[{number}]" if is_list else name
        yield where, _require_object(item, where, item)


def _json_problem(error: ValueError | RecursionError) -> str:
    return f"not JSON: {getattr(error, 'msg', 'nested too deeply')}"


def _require_object(value: Any, where: str, content: Any) -> Record | BadLine:
    return value if isinstance(value, dict) else BadLine(where, str(content)[:SHOWN_CHARACTERS], "not a JSON object")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, Record | BadLine]]:
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
        hint = "write it again; the transfer may have cut it off"
        raise DataError(f"{name} cannot be read as Parquet: {error}", hint=hint) from None
