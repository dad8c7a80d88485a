"""Raw folders without a table: class folders, pictures with .txt beside each, folders with pictures and one JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.data import captions
from vlkit.data.images.decode import IMAGE_SUFFIXES
from vlkit.data.prep import tables
from vlkit.data.prep.raw_folder import MASK_FOLDERS, RawImage, RawFolder, RawRow, Reject, mask_reason, reject_from_error
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError

# Folders inside a class folder that only say where its pictures are.
ORIGINALS = frozenset(
    ["orig", "original", "originals", "raw", "image", "images", "img", "imgs", "picture", "pictures", "photos"]
)
AUGMENTED = frozenset(["aug", "augmented", "augmentation", "augmentations"])
PLACES = ORIGINALS | AUGMENTED
# Folders that hold a whole data set and say nothing of it.
WRAPPERS = ORIGINALS | {"data", "dataset", "datasets"}
SHARE_IN_SPLITS = 0.8
JSON_SUFFIXES = (".json", ".jsonl")


def class_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """`class/picture.jpg`, nested too (`rice/blast/orig/x.jpg` is of rice/blast), below or above train/ and test/."""
    source = raw.pictures
    raw.check_templates(())
    tree = _Tree(source)
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in {*IMAGE_SUFFIXES, ""}:
            yield Reject(name, name, "not an image by its name")
            continue
        folders, split, told = tree.read(path.parts[:-1])
        told = told or mask_reason(name, source)
        class_name = captions.clean("/".join(folders))
        if told or not class_name:
            yield Reject(name, name, told or "lies in no class folder")
            continue
        item = RawImage(name, (), name, name, classes=(class_name,), split=split, fields={"class_name": class_name})
        yield from raw.rows_of(item)


class _Tree:
    """What the folders of a tree mean: classes, a level of splits among them, wrappers, places of originals."""

    def __init__(self, source: SourceFolder) -> None:
        sizes = {
            tuple(folder.split("/")): sum(bool(PurePosixPath(name).suffix) for name in names)
            for folder, names in source.folders.items()
            if folder
        }
        sizes = {folders: size for folders, size in sizes.items() if size}
        self.level = self._level_of_splits(sizes)
        inside = [folders for folders in sizes if self.level is None or self._split(folders)]
        # One way to all of them is a wrapper around the splits; several ways are classes with splits below each.
        ways = {folders[: self.level] for folders in inside} if self.level else set()
        self.wrapped = len(ways) == 1 and all(len(folders) > (self.level or 0) + 1 for folders in inside)
        left = [self._without_split(folders) for folders in inside]
        self.peeled = 0
        while (
            left
            and min(map(len, left)) > 1
            and len({parts[0] for parts in left}) == 1
            and left[0][0].lower() in WRAPPERS
        ):
            left = [parts[1:] for parts in left]
            self.peeled += 1
        self.children: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for parts in left:
            for depth in range(len(parts)):
                self.children[parts[:depth]].add(parts[depth].lower())
        self._tell(inside, left)

    def _level_of_splits(self, sizes: Mapping[tuple[str, ...], int]) -> int | None:
        """The first depth at which most pictures lie in folders named after splits, one of them to train on."""
        for depth in range(max(map(len, sizes), default=0)):
            named = {folders: split_from_name(folders[depth]) for folders in sizes if len(folders) > depth}
            found = {name for name in named.values() if name}
            in_splits = sum(sizes[folders] for folders, name in named.items() if name)
            if "train" in found and len(found) > 1 and in_splits >= SHARE_IN_SPLITS * sum(sizes.values()):
                return depth
        return None

    def _tell(self, inside: Sequence[tuple[str, ...]], left: Sequence[tuple[str, ...]]) -> None:
        if self.level is not None:
            names = sorted({folders[self.level] for folders in inside})
            console.say(f"the folders {', '.join(names)} are splits, not classes (--split-by source keeps them)")
        odd = sorted({part for parts in left for part in parts if split_from_name(part)})
        if odd:
            console.warn(f"folders named like splits are taken for classes: {', '.join(odd[:4])}")

    def _split(self, folders: tuple[str, ...]) -> str | None:
        return split_from_name(folders[self.level]) if self.level is not None and len(folders) > self.level else None

    def _without_split(self, folders: tuple[str, ...]) -> tuple[str, ...]:
        if self.level is None:
            return folders
        return (() if self.wrapped else folders[: self.level]) + folders[self.level + 1 :]

    def read(self, folders: tuple[str, ...]) -> tuple[tuple[str, ...], str | None, str | None]:
        """The parts of the class, the split, and why pictures here are left out."""
        split = self._split(folders)
        if self.level is not None and split is None:
            return folders, None, "lies beside the folders of the splits"
        left, told = self._without_split(folders)[self.peeled :], None
        if left and left[-1].lower() in AUGMENTED and ORIGINALS & self.children[left[:-1]]:
            told = "an augmented copy, by its folder: vlkit augments the training split alone"
        beside = PLACES | MASK_FOLDERS
        while len(left) > 1 and left[-1].lower() in PLACES and self.children[left[:-1]] <= beside:
            left = left[:-1]
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
            if told := mask_reason(name, source):
                yield Reject(name, name, told)
            elif stem not in texts:
                yield Reject(name, name, "no .txt of this name beside the picture")
            else:
                try:
                    lines = list(tables.read_lines(source.path(texts[stem]), texts[stem]))
                except DataError as error:
                    yield reject_from_error(error, texts[stem], name)
                    continue
                yield from raw.rows_of(RawImage(name, lines, name, name))
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
            records = list(tables.read_records(source.path(name), name))
        except DataError as error:
            yield reject_from_error(error, name, name)
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
    texts = [t for c in columns for v in tables.cell_values(record.get(c)) if (t := captions.clean(v, persian=persian))]
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
        and (text := captions.clean(" ".join(tables.cell_values(record[key])), persian=persian))
    }
    for image in images:
        yield from raw.rows_of(RawImage(image, texts, where, passage, (passage,), extra=extra or None))


def _pictures(raw: RawFolder, record: dict[str, Any], where: str, folder: str) -> tuple[list[str], list[Reject]]:
    """The pictures that a record means: those of image_path, else all of folder_path, else all beside the JSON."""
    column = raw.config.image_column or "image_path"
    paths = [path for key in dict.fromkeys((column, "image_path")) for path in tables.cell_values(record.get(key))]
    images, rejects = [], []
    for path in dict.fromkeys(paths):
        try:
            images.append(raw.locate(path, folder))
        except DataError as error:
            rejects.append(reject_from_error(error, where, path))
    if paths:
        return images, rejects
    wanted = folder
    for path in tables.cell_values(record.get("folder_path")):
        wanted = _folder(raw, path.strip().rstrip("/\\"), folder)
        if wanted is None:
            return [], [Reject(where, path, "no such folder in the source")]
    inside = raw.source.folders.get(wanted, [])
    return [name for name in inside if PurePosixPath(name).suffix and not mask_reason(name, raw.source)], []


def _folder(raw: RawFolder, path: str, folder: str) -> str | None:
    """A folder as a JSON may name it: from the source, from where the JSON lies or one above, or by its last part."""
    path = path.replace("\\", "/").removeprefix("./")
    above = str(PurePosixPath(folder).parent).removeprefix(".")
    for candidate in (path, f"{folder}/{path}", f"{above}/{path}".strip("/")):
        if candidate.strip("/") in raw.source.folders:
            return candidate.strip("/")
    # Paths of another machine are known by their last part, which the JSON's own folder bears.
    return folder if PurePosixPath(path).name == PurePosixPath(folder).name or path in ("", ".") else None
