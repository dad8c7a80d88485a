"""Read a raw folder in its layout. Each layout is a function from folder to rows; `LAYOUTS` lists them.

A layout knows names and files, not pixels: images are verified later, each once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from vlkit import console
from vlkit.data.prep import tables
from vlkit.data.prep.coco_layout import read_coco
from vlkit.data.prep.folder_layouts import (
    JSON_SUFFIXES,
    WRAPPER_FOLDERS,
    read_class_folders,
    read_json_folders,
    read_text_files,
)
from vlkit.data.prep.raw_folder import RawFolder, RawRow, Reject
from vlkit.data.prep.table_layout import find_tables, has_image_column, read_table
from vlkit.errors import DataError

Layout = Callable[[RawFolder], Iterator[RawRow | Reject]]

# Tables in deeper folders that are pointed out, at most.
SHOWN_TABLES = 3


def read_rows(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield the rows of a raw folder in the layout that its settings name, or in the one that fits best."""
    if raw.layout == "auto":
        raw.layout = guess_layout(raw)
        console.say(f"{raw.config.source}: read as {raw.layout} (--layout sets another)")
    try:
        yield from LAYOUTS[raw.layout](raw)
    except DataError as error:
        # Layouts name files relative to the source; the user may have several sources.
        where = "" if str(raw.config.source) in error.message else f"{raw.config.source}: "
        raise DataError(where + error.message, hint=error.hint) from None
    yield from raw.reject_skipped_files()


def guess_layout(raw: RawFolder) -> str:
    """Return the layout that fits most of a raw folder: one stray file does not change it."""
    names = raw.source.files
    if any(re.fullmatch(r"annotations/captions_[^/]+\.json", name) for name in names):
        return "coco"
    found_tables = find_tables(raw.source)
    if raw.table or any(has_image_column(raw, name) for name in found_tables):
        return "table"
    images = [name for name in raw.source.image_names if PurePosixPath(name).suffix]
    stems = {str(PurePosixPath(name).with_suffix("")) for name in images}
    text_stems = {name[:-4] for name in names if name.lower().endswith(".txt")}
    if 2 * len(stems & text_stems) > len(stems):
        return "text-files"
    folders = {name.rpartition("/")[0] for name in images}
    with_json = {name.rpartition("/")[0] for name in names if PurePosixPath(name).suffix.lower() in JSON_SUFFIXES}
    if folders and 2 * len(folders & with_json) > len(folders):
        return "json-folders"
    if found_tables and all(folder.lower() in {"", *WRAPPER_FOLDERS} for folder in folders):
        return "table"
    for name in found_tables:
        console.say(f"{name} is not read: it has no column of images (--table {name} reads it all the same)")
    deeper = [
        name for name in names if PurePosixPath(name).suffix.lower() in tables.SUFFIXES and name not in found_tables
    ]
    for name in deeper[:SHOWN_TABLES]:
        console.say(f"{name} is not read: --source {raw.source.location}/{name} would read it")
    return "class-folders"


def describe_layout(name: str) -> str:
    """Return what a layout consists of, for messages."""
    return {
        "table": f"a table ({', '.join(tables.SUFFIXES)}) that names images and texts",
        "class-folders": "class folders with images in them",
        "text-files": "images with a .txt file of the same name beside each",
        "json-folders": "folders with images and one JSON file each",
        "coco": "annotations/captions_<split>.json and images/<split>/",
        "auto": "class folders, a table, or images with texts beside them",
    }[name]


LAYOUTS: dict[str, Layout] = {
    "table": read_table,
    "class-folders": read_class_folders,
    "text-files": read_text_files,
    "json-folders": read_json_folders,
    "coco": read_coco,
}
