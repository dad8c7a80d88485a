"""Raw folders as they come -> rows. Each layout is a function; the table of them is at the end.

A layout knows names and files, not pixels: whether a picture decodes is asked later, once for each picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from vlkit import console
from vlkit.data import tables
from vlkit.data.coco_layout import coco
from vlkit.data.folder_layouts import class_folders, json_folders, text_files
from vlkit.data.raw import RawFolder, RawRow, Reject
from vlkit.data.table_layout import find_tables, table

Layout = Callable[[RawFolder], Iterator[RawRow | Reject]]


def read(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """The rows of a raw folder in the layout that its settings name, or the one that it looks like."""
    name = raw.config.layout if raw.config.layout != "auto" else guess(raw)
    if raw.config.layout == "auto":
        console.say(f"{raw.config.source}: read as {name} (--layout says otherwise)")
    yield from LAYOUTS[name](raw)
    yield from raw.closed()


def guess(raw: RawFolder) -> str:
    """The layout that a raw folder looks like."""
    names = raw.source.files
    if any(re.fullmatch(r"annotations/captions_[^/]+\.json", name) for name in names):
        return "coco"
    if raw.table or find_tables(raw.source):
        return "table"
    pictures = {str(PurePosixPath(name).with_suffix("")) for name in raw.source.pictures}
    if any(name.endswith(".txt") and name[:-4] in pictures for name in names):
        return "text-files"
    folders = {str(PurePosixPath(name).parent) for name in raw.source.pictures}
    if any(
        PurePosixPath(name).suffix in (".json", ".jsonl") and str(PurePosixPath(name).parent) in folders
        for name in names
    ):
        return "json-folders"
    return "class-folders"


def expected(name: str) -> str:
    """What a layout wants to find, for messages."""
    return {
        "table": f"a table ({', '.join(tables.SUFFIXES)}) that names pictures and texts",
        "class-folders": "class folders with pictures in them",
        "text-files": "pictures with a .txt file of the same name beside each",
        "json-folders": "folders with pictures and one JSON file each",
        "coco": "annotations/captions_<split>.json and images/<split>/",
        "auto": "class folders, a table, or pictures with texts beside them",
    }[name]


LAYOUTS: dict[str, Layout] = {
    "table": table,
    "class-folders": class_folders,
    "text-files": text_files,
    "json-folders": json_folders,
    "coco": coco,
}
