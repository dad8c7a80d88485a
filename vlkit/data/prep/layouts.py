"""Raw folders as they come -> rows. Each layout is a function; the table of them is at the end.

A layout knows names and files, not pixels: whether a picture decodes is asked later, once for each picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from vlkit import console
from vlkit.data.prep import tables
from vlkit.data.prep.coco_layout import coco
from vlkit.data.prep.folder_layouts import JSON_SUFFIXES, WRAPPERS, class_folders, json_folders, text_files
from vlkit.data.prep.raw_folder import RawFolder, RawRow, Reject
from vlkit.data.prep.table_layout import find_tables, names_pictures, table
from vlkit.errors import DataError

Layout = Callable[[RawFolder], Iterator[RawRow | Reject]]


def read(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """The rows of a raw folder in the layout that its settings name, or the one that it looks like."""
    if raw.layout == "auto":
        raw.layout = guess(raw)
        console.say(f"{raw.config.source}: read as {raw.layout} (--layout says otherwise)")
    try:
        yield from LAYOUTS[raw.layout](raw)
    except DataError as error:
        # The layouts name files from the source on; the user may have several sources.
        where = "" if str(raw.config.source) in error.message else f"{raw.config.source}: "
        raise DataError(where + error.message, hint=error.hint) from None
    yield from raw.closed()


def guess(raw: RawFolder) -> str:
    """The layout that most of a raw folder looks like: one stray file does not make it another."""
    names = raw.source.files
    if any(re.fullmatch(r"annotations/captions_[^/]+\.json", name) for name in names):
        return "coco"
    found = find_tables(raw.source)
    if raw.table or any(names_pictures(raw, name) for name in found):
        return "table"
    pictures = [name for name in raw.source.pictures if PurePosixPath(name).suffix]
    stems = {str(PurePosixPath(name).with_suffix("")) for name in pictures}
    told = {name[:-4] for name in names if name.lower().endswith(".txt")}
    if 2 * len(stems & told) > len(stems):
        return "text-files"
    folders = {name.rpartition("/")[0] for name in pictures}
    with_json = {name.rpartition("/")[0] for name in names if PurePosixPath(name).suffix.lower() in JSON_SUFFIXES}
    if folders and 2 * len(folders & with_json) > len(folders):
        return "json-folders"
    if found and all(folder.lower() in {"", *WRAPPERS} for folder in folders):
        return "table"
    for name in found:
        console.say(f"{name} is not read: it has no column of pictures (--table {name} reads it all the same)")
    deeper = [name for name in names if PurePosixPath(name).suffix.lower() in tables.SUFFIXES and name not in found]
    for name in deeper[:3]:
        console.say(f"{name} is not read: --source {raw.source.location}/{name} would")
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
