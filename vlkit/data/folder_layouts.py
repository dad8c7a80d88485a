"""Raw folders without a table: class folders, pictures with .txt beside each, folders with pictures and one JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.data import captions, tables
from vlkit.data.images import SUFFIXES
from vlkit.data.raw import MASK_FOLDERS, Item, RawFolder, RawRow, Reject, mask_of, reject_of
from vlkit.data.sources import Source
from vlkit.data.splits import named_split
from vlkit.errors import DataError

# Folders inside a class folder that only say where its pictures are.
ORIGINALS = frozenset(
    ["orig", "original", "originals", "raw", "image", "images", "img", "imgs", "picture", "pictures", "photos"]
)
AUGMENTED = frozenset(["aug", "augmented", "augmentation", "augmentations"])
PLACES = ORIGINALS | AUGMENTED
# Folders that hold a whole data set and say nothing of it.
WRAPPERS = ORIGINALS | {"data", "dataset", "datasets"}
JSON_SUFFIXES = (".json", ".jsonl")


def class_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """`class/picture.jpg`, nested too (`rice/blast/orig/x.jpg` is of rice/blast), below or above train/ and test/."""
    source = raw.pictures
    raw.check_templates(())
    tree = _Tree(source)
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in {*SUFFIXES, ""}:
            yield Reject(name, name, "not a picture by its name")
            continue
        folders, split, told = tree.read(path.parts[:-1])
        told = told or mask_of(name, source)
        class_name = captions.clean("/".join(folders))
        if told or not class_name:
            yield Reject(name, name, told or "lies in no class folder")
            continue
        item = Item(name, (), name, name, classes=(class_name,), split=split, fields={"class_name": class_name})
        yield from raw.rows_of(item)


class _Tree:
    """What the folders of a tree mean: classes, splits above or below them, wrappers, places of originals."""

    def __init__(self, source: Source) -> None:
        with_pictures = [
            tuple(folder.split("/"))
            for folder, names in source.folders.items()
            if folder and any(PurePosixPath(name).suffix for name in names)
        ]
        self.wrappers = self._wrapped(with_pictures)
        inner = [folders[self.wrappers :] for folders in with_pictures if len(folders) > self.wrappers]
        self.children: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for folders in inner:
            for depth in range(len(folders)):
                self.children[folders[:depth]].add(folders[depth].lower())
        tops = {folders[0] for folders in inner}
        above = {top for top in tops if named_split(top)}
        self.split_above = {"train"} < {named_split(top) for top in above}
        below = bool(inner) and all(len(folders) > 1 and named_split(folders[-1]) for folders in inner)
        self.split_below = below and not self.split_above
        if self.split_above or self.split_below:
            names = sorted(above if self.split_above else {folders[-1] for folders in inner})
            console.say(f"the folders {', '.join(names)} are splits, not classes (--split-by source keeps them)")

    def _wrapped(self, all_folders: list[tuple[str, ...]]) -> int:
        """How many folders at the top only hold the rest: each alone, with a name that says nothing or splits in it."""
        depth = 0
        while all_folders and len({folders[:1] for folders in all_folders}) == 1 and min(map(len, all_folders)) > 1:
            inside = {folders[1] for folders in all_folders}
            if all_folders[0][0].lower() not in WRAPPERS and not all(map(named_split, inside)):
                break
            all_folders = [folders[1:] for folders in all_folders]
            depth += 1
        return depth

    def read(self, folders: tuple[str, ...]) -> tuple[list[str], str | None, str | None]:
        """The parts of the class, the split, and why pictures here are left out."""
        left, split, told = list(folders[self.wrappers :]), None, None
        if self.split_above and left:
            split = named_split(left[0])
            told = None if split else "lies beside the folders of the splits"
            at = tuple(left)
            left = left[1:]
        else:
            if self.split_below and left:
                split = named_split(left.pop())
            at = tuple(left)
        if left and left[-1].lower() in AUGMENTED and ORIGINALS & self.children[at[:-1]]:
            told = "an augmented copy, by its folder: vlkit augments the training split alone"
        while (
            len(left) > 1 and left[-1].lower() in PLACES and self.children[at[:-1]] <= PLACES | MASK_FOLDERS | {"mask"}
        ):
            left.pop()
            at = at[:-1]
        return left, split, told


def text_files(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """`x.jpg` with `x.txt` beside it; each line of the .txt is a text."""
    source = raw.source
    pictures: dict[str, list[str]] = defaultdict(list)
    for name in source.pictures:
        pictures[str(PurePosixPath(name).with_suffix(""))].append(name)
    texts = {name[:-4]: name for name in source.files if name.lower().endswith(".txt")}
    for stem, names in pictures.items():
        for name in names:
            if not PurePosixPath(name).suffix:
                continue
            if told := mask_of(name, source):
                yield Reject(name, name, told)
            elif stem not in texts:
                yield Reject(name, name, "no .txt of this name beside the picture")
            else:
                try:
                    lines = list(tables.lines(source.path(texts[stem]), texts[stem]))
                except DataError as error:
                    yield reject_of(error, texts[stem], name)
                    continue
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
        try:
            records = list(tables.records(source.path(name), name))
        except DataError as error:
            yield reject_of(error, name, name)
            continue
        for where, record in records:
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
    # Paths of another machine are known by their last part, which the JSON's own folder bears.
    return folder if PurePosixPath(path).name == PurePosixPath(folder).name or path in ("", ".") else None
