"""Raw folders as they come -> rows: a picture, a text, and what they belong to.

A layout is a function that yields `RawRow`s and `Reject`s; the table of them is at the end. It knows names and files,
not pixels: whether a picture decodes is `prepare.py`'s question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit.data import captions, images
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.config import PrepConfig


@dataclass(frozen=True)
class RawRow:
    """One picture with one text. `where` names its place for messages: a file and a line."""

    image: Path
    image_key: str
    text: str
    group: str
    unit: str
    class_name: str | None
    where: str


@dataclass(frozen=True)
class Reject:
    """Something left out, and why."""

    where: str
    item: str
    reason: str


def recipes(config: PrepConfig) -> Iterator[RawRow | Reject]:
    """`recipes.jsonl` (or documents/recipes.jsonl): one JSON object a line, several pictures and texts each."""
    table = _table(config)
    root = config.image_root or config.source
    for number, line in enumerate(_text_of(table).split("\n"), start=1):
        where = f"{table.name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield Reject(where, line[:80], f"not JSON: {error.msg}")
            continue
        if not isinstance(record, dict):
            yield Reject(where, line[:80], "not a JSON object")
            continue
        yield from _recipe(record, config, root, where)


def _recipe(record: dict[str, Any], config: PrepConfig, root: Path, where: str) -> Iterator[RawRow | Reject]:
    group = captions.clean(record.get(config.group_column))
    texts = list(dict.fromkeys(text for column in config.text_column for text in _texts(record.get(column))))
    keys = list(dict.fromkeys(_texts(record.get(config.image_column))))
    missing = [
        reason
        for reason, there in (
            (f"no {config.group_column}", group),
            (f"no text in {', '.join(config.text_column)}", texts),
            (f"no pictures in {config.image_column}", keys),
        )
        if not there
    ]
    if missing:
        yield Reject(where, group, "; ".join(missing))
        return
    for key in keys:
        path = _inside(root, key)
        if path is None:
            yield Reject(where, key, "the path leads out of the source")
            continue
        for text in texts:
            yield RawRow(path, key, text, group, group, None, where)


def _texts(value: Any) -> list[str]:
    """A field's texts: one, or one an element of a list; empty ones left out."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if not isinstance(item, dict | list) and (text := captions.clean(item))]


def class_folders(config: PrepConfig) -> Iterator[RawRow | Reject]:
    """`class/picture.jpg`, also nested (`rice/blast/x.jpg` is the class rice/blast); captions from the templates."""
    root = config.image_root or config.source
    closed: list[OSError] = []
    files = [Path(folder) / name for folder, _, names in os.walk(root, onerror=closed.append) for name in names]
    for error in closed:
        yield Reject(str(error.filename), str(error.filename), f"the folder cannot be read: {error.strerror}")
    for path in sorted(files):
        key = path.relative_to(root).as_posix()
        if any(part.startswith(".") for part in key.split("/")):
            continue
        if path.suffix.lower() not in images.SUFFIXES:
            yield Reject(key, key, "not a picture by its name")
            continue
        class_name = path.parent.relative_to(root).as_posix()
        if class_name == ".":
            yield Reject(key, key, "lies in no class folder")
            continue
        if _inside(root, key) is None:
            yield Reject(key, key, "the link leads out of the source")
            continue
        for text in captions.from_templates(config.templates, class_name):
            yield RawRow(path, key, text, class_name, key, class_name, key)


def _table(config: PrepConfig) -> Path:
    for folder in (config.source, config.source / "documents"):
        if (folder / config.table).is_file():
            return folder / config.table
    raise DataError(
        f"{config.source}: no {config.table}, and none under documents/",
        hint=f"found: {', '.join(sorted(p.name for p in config.source.iterdir())[:8]) or 'nothing'}",
    )


def _text_of(table: Path) -> str:
    content = table.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        hint = "save it as UTF-8, for example: iconv -f latin1 -t utf-8"
        raise DataError(f"{table}, line {line}: not UTF-8 ({error.reason})", hint=hint) from None


def _inside(root: Path, key: str) -> Path | None:
    """The picture's path, or None where `key` leads out of the root."""
    path = root / key
    return path if path.resolve().is_relative_to(root.resolve()) else None


LAYOUTS = {"recipes": recipes, "class-folders": class_folders}
