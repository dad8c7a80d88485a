"""Raw folders without a table: class folders, pictures with .txt beside each, folders with pictures and one JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.data import captions, tables
from vlkit.data.images import SUFFIXES
from vlkit.data.raw import Item, RawFolder, RawRow, Reject, mask_of, reject_of
from vlkit.data.sources import Source
from vlkit.data.splits import named_split
from vlkit.errors import DataError

# Folders inside a class folder that only say where its pictures are.
ORIGINALS = frozenset(
    ["orig", "original", "originals", "raw", "image", "images", "img", "imgs", "picture", "pictures", "photos"]
)
AUGMENTED = frozenset(["aug", "augmented", "augmentation", "augmentations"])
JSON_SUFFIXES = (".json", ".jsonl")


def class_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """`class/picture.jpg`, nested too (`rice/blast/orig/x.jpg` is of rice/blast), also below train/ and test/."""
    source = raw.pictures
    official = _split_folders(source)
    with_originals = {folder.rpartition("/")[0] for folder in source.folders if _last(folder) in ORIGINALS}
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in {*SUFFIXES, ""}:
            yield Reject(name, name, "not a picture by its name")
            continue
        folders = list(path.parts[:-1])
        split = named_split(folders.pop(0)) if official and folders else None
        told = mask_of(name, source) or _augmented_copy(path, with_originals)
        while folders and folders[-1].lower() in ORIGINALS | AUGMENTED:
            folders.pop()
        class_name = captions.clean("/".join(folders))
        if told or not class_name:
            yield Reject(name, name, told or "lies in no class folder")
            continue
        item = Item(name, (), name, name, classes=(class_name,), split=split, fields={"class_name": class_name})
        yield from raw.rows_of(item)
    for name in sorted(source.outside):
        yield Reject(name, name, "the link leads out of the source")


def _split_folders(source: Source) -> bool:
    """The top folders are named after splits, all of them."""
    tops = {folder.split("/")[0] for folder in source.folders if folder}
    found = len(tops) > 1 and all(named_split(top) for top in tops)
    if found:
        console.say(f"the folders {', '.join(sorted(tops))} are splits, not classes (--split-by source keeps them)")
    return found


def _augmented_copy(path: PurePosixPath, with_originals: Collection[str]) -> str | None:
    """Made by a program from an original that lies beside: not a sample, and a leak if the split tears them apart."""
    if path.parent.name.lower() not in AUGMENTED or str(path.parent.parent) not in with_originals:
        return None
    return "an augmented copy, by its folder: vlkit augments the training split alone"


def _last(folder: str) -> str:
    return folder.rpartition("/")[2].lower()


def text_files(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """`x.jpg` with `x.txt` beside it; each line of the .txt is a text."""
    source = raw.source
    pictures: dict[str, list[str]] = defaultdict(list)
    for name in source.pictures:
        pictures[str(PurePosixPath(name).with_suffix(""))].append(name)
    texts = {name[:-4]: name for name in source.files if name.lower().endswith(".txt")}
    for stem, names in pictures.items():
        for name in names:
            if told := mask_of(name, source):
                yield Reject(name, name, told)
            elif stem not in texts:
                yield Reject(name, name, "no .txt of this name beside the picture")
            else:
                lines = "".join(tables.lines(source.path(texts[stem]), texts[stem])).splitlines()
                yield from raw.rows_of(Item(name, lines, name, name))
    for stem, name in texts.items():
        if stem not in pictures:
            yield Reject(name, name, "no picture of this name beside the text")


def json_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """A folder a dish, with pictures and one JSON that holds the passage and says which pictures are meant.

    The group is the passage: two folders with the same one are the same dish.
    """
    source = raw.source
    named: set[str] = set()
    columns = raw.config.text_column or ("response",)
    for name in source.files:
        if PurePosixPath(name).suffix.lower() not in JSON_SUFFIXES:
            continue
        folder = str(PurePosixPath(name).parent).removeprefix(".")
        for where, record in tables.records(source.path(name), name):
            if isinstance(record, tables.BadLine):
                yield Reject(where, record.what, record.reason)
                continue
            yield from _dish(raw, record, where, folder, columns, named)
    yield from raw.unnamed(named, "no JSON names this picture")


def _dish(
    raw: RawFolder, record: dict[str, Any], where: str, folder: str, columns: tuple[str, ...], named: set[str]
) -> Iterator[RawRow | Reject]:
    persian = raw.config.script == "persian"
    texts = [t for c in columns for v in tables.values(record.get(c)) if (t := captions.clean(v, persian=persian))]
    images, rejects = _pictures(raw, record, where, folder)
    named.update(images)
    yield from rejects
    if not texts or not images:
        if not texts:
            yield Reject(where, folder, f"no text in {', '.join(columns)}")
        elif not rejects:
            yield Reject(where, folder, "no picture in image_path or folder_path, and none beside it")
        return
    passage = captions.text_id(texts[-1])
    extra = {
        key: text
        for key in record
        if key not in (*columns, "image_path", "folder_path", "image", "images")
        and (text := captions.clean(" ".join(tables.values(record[key])), persian=persian))
    }
    for image in images:
        yield from raw.rows_of(Item(image, texts, where, passage, (passage,), extra=extra or None))


def _pictures(raw: RawFolder, record: dict[str, Any], where: str, folder: str) -> tuple[list[str], list[Reject]]:
    """The pictures that a record means: those of image_path, else all of folder_path, else all beside the JSON."""
    column = raw.config.image_column or "image_path"
    paths = [path for key in dict.fromkeys((column, "image_path")) for path in tables.values(record.get(key))]
    images, rejects = [], []
    for path in dict.fromkeys(paths):
        try:
            images.append(raw.locate(path, folder))
        except DataError as error:
            rejects.append(reject_of(error, where, path))
    if paths:
        return images, rejects
    wanted = folder
    for path in tables.values(record.get("folder_path")):
        wanted = _folder(raw, path.strip().rstrip("/\\"), folder)
        if wanted is None:
            return [], [Reject(where, path, "no such folder in the source")]
    inside = raw.source.folders.get(wanted, [])
    return [name for name in inside if PurePosixPath(name).suffix and not mask_of(name, raw.source)], []


def _folder(raw: RawFolder, path: str, folder: str) -> str | None:
    """A folder as a JSON may name it: from the source, from where the JSON lies or one above, or by its last part."""
    path = path.replace("\\", "/").removeprefix("./")
    above = str(PurePosixPath(folder).parent).removeprefix(".")
    for candidate in (path, f"{folder}/{path}", f"{above}/{path}".strip("/")):
        if candidate.strip("/") in raw.source.folders:
            return candidate.strip("/")
    return folder if PurePosixPath(path).name == PurePosixPath(folder).name or path in ("", ".") else None
