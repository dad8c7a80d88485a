"""Read raw folders without a table: class folders, images with .txt files beside them, folders with one JSON each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from vlkit import console
from vlkit.data import captions
from vlkit.data.images.decode import IMAGE_SUFFIXES
from vlkit.data.prep import tables
from vlkit.data.prep.raw_folder import (
    MASK_FOLDERS,
    RawFolder,
    RawImage,
    RawRow,
    Reject,
    mask_reason,
    reject_from_error,
)
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError

# Folders inside a class folder that only say where its images are.
ORIGINAL_FOLDERS = frozenset(
    ["orig", "original", "originals", "raw", "image", "images", "img", "imgs", "picture", "pictures", "photos"]
)
AUGMENTED_FOLDERS = frozenset(["aug", "augmented", "augmentation", "augmentations"])
INNER_FOLDERS = ORIGINAL_FOLDERS | AUGMENTED_FOLDERS
# Folders that hold a whole data set and say nothing about it.
WRAPPER_FOLDERS = ORIGINAL_FOLDERS | {"data", "dataset", "datasets"}
# Folders named like splits are splits if they hold at least this share of the images.
MIN_SHARE_IN_SPLITS = 0.8
JSON_SUFFIXES = (".json", ".jsonl")

Folders = tuple[str, ...]


def read_class_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield rows of `class/image.jpg`, below or above train/ and test/; `rice/blast/orig/x.jpg` is of rice/blast."""
    source = raw.image_source
    raw.check_templates(())
    tree = _ClassTree(source)
    for name in source.files:
        path = PurePosixPath(name)
        if path.suffix.lower() not in {*IMAGE_SUFFIXES, ""}:
            yield Reject(name, name, "not an image, by its file name")
            continue
        folders, split, reason = tree.parse(path.parts[:-1])
        reason = reason or mask_reason(name, source)
        class_name = captions.clean("/".join(folders))
        if reason or not class_name:
            yield Reject(name, name, reason or "not in a class folder")
            continue
        fields = {"class_name": class_name}
        yield from raw.make_rows(RawImage(name, (), name, name, classes=(class_name,), split=split, fields=fields))


class _ClassTree:
    """What the folders of a tree mean: classes, a level of splits among them, wrappers, folders of originals.

    Attributes:
        split_level: the depth of the folders named after splits; None without such folders.
        children: path -> names of the folders in it, lower case, without splits and wrappers.
    """

    def __init__(self, source: SourceFolder) -> None:
        sizes = {
            tuple(folder.split("/")): sum(bool(PurePosixPath(name).suffix) for name in names)
            for folder, names in source.images_by_folder.items()
            if folder
        }
        sizes = {folders: size for folders, size in sizes.items() if size}
        self.split_level = self._find_split_level(sizes)
        inside = [folders for folders in sizes if self.split_level is None or self._split_of(folders)]
        # One path to all splits is a wrapper around them; several paths are classes with splits below each.
        parents = {folders[: self.split_level] for folders in inside} if self.split_level else set()
        self._split_parent_is_wrapper = len(parents) == 1 and all(
            len(folders) > (self.split_level or 0) + 1 for folders in inside
        )
        classes = [self._remove_split(folders) for folders in inside]
        self._wrappers = 0
        while (
            classes
            and min(map(len, classes)) > 1
            and len({parts[0] for parts in classes}) == 1
            and classes[0][0].lower() in WRAPPER_FOLDERS
        ):
            classes = [parts[1:] for parts in classes]
            self._wrappers += 1
        self.children: dict[Folders, set[str]] = defaultdict(set)
        for parts in classes:
            for depth in range(len(parts)):
                self.children[parts[:depth]].add(parts[depth].lower())
        self._report(inside, classes)

    def _find_split_level(self, sizes: Mapping[Folders, int]) -> int | None:
        """Return the first depth at which most images are in folders named after splits, one of them train."""
        for depth in range(max(map(len, sizes), default=0)):
            named = {folders: split_from_name(folders[depth]) for folders in sizes if len(folders) > depth}
            present = {name for name in named.values() if name}
            in_splits = sum(sizes[folders] for folders, name in named.items() if name)
            if "train" in present and len(present) > 1 and in_splits >= MIN_SHARE_IN_SPLITS * sum(sizes.values()):
                return depth
        return None

    def _report(self, inside: Sequence[Folders], classes: Sequence[Folders]) -> None:
        if self.split_level is not None:
            names = sorted({folders[self.split_level] for folders in inside})
            console.say(f"the folders {', '.join(names)} are splits, not classes (--split-by source keeps them)")
        odd = sorted({part for parts in classes for part in parts if split_from_name(part)})
        if odd:
            console.warn(f"folders named like splits are taken for classes: {', '.join(odd[:4])}")

    def _split_of(self, folders: Folders) -> str | None:
        level = self.split_level
        return split_from_name(folders[level]) if level is not None and len(folders) > level else None

    def _remove_split(self, folders: Folders) -> Folders:
        if self.split_level is None:
            return folders
        return (() if self._split_parent_is_wrapper else folders[: self.split_level]) + folders[self.split_level + 1 :]

    def parse(self, folders: Folders) -> tuple[Folders, str | None, str | None]:
        """Return the parts of the class, the split, and why images in this folder are left out, if they are."""
        split = self._split_of(folders)
        if self.split_level is not None and split is None:
            return folders, None, "not in a folder of a split"
        parts, reason = self._remove_split(folders)[self._wrappers :], None
        if parts and parts[-1].lower() in AUGMENTED_FOLDERS and ORIGINAL_FOLDERS & self.children[parts[:-1]]:
            reason = "an augmented copy, by its folder: vlkit augments only the training split"
        inner = INNER_FOLDERS | MASK_FOLDERS
        while len(parts) > 1 and parts[-1].lower() in INNER_FOLDERS and self.children[parts[:-1]] <= inner:
            parts = parts[:-1]
        return parts, split, reason


def read_text_files(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield rows of `x.jpg` with `x.txt` beside it; each line of the .txt is a text."""
    source = raw.source
    images: dict[str, list[str]] = defaultdict(list)
    for name in source.image_names:
        images[str(PurePosixPath(name).with_suffix(""))].append(name)
    texts = {name[:-4]: name for name in source.files if name.lower().endswith(".txt")}
    for stem, names in images.items():
        for name in names:
            if not PurePosixPath(name).suffix:
                continue
            if reason := mask_reason(name, source):
                yield Reject(name, name, reason)
            elif stem not in texts:
                yield Reject(name, name, "no .txt file of this name beside the image")
            else:
                try:
                    lines = list(tables.read_lines(source.local_path(texts[stem]), texts[stem]))
                except DataError as error:
                    yield reject_from_error(error, texts[stem], name)
                    continue
                yield from raw.make_rows(RawImage(name, lines, name, name))
    for stem, name in texts.items():
        if stem not in images:
            yield Reject(name, name, "no image of this name beside the text file")


def read_json_folders(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield rows of folders that hold images and one JSON with a passage, which may say which images it means.

    The group is the passage: two folders with the same passage are the same dish.
    """
    source = raw.source
    named: set[str] = set()
    columns = raw.config.text_column or ("response",)
    for name in source.files:
        if PurePosixPath(name).suffix.lower() not in JSON_SUFFIXES:
            continue
        folder = str(PurePosixPath(name).parent).removeprefix(".")
        try:
            records = list(tables.read_records(source.local_path(name), name))
        except DataError as error:
            yield reject_from_error(error, name, name)
            continue
        for where, record in records:
            if isinstance(record, tables.BadLine):
                yield Reject(where, record.content, record.reason)
                continue
            yield from _make_rows(raw, record, where, folder, columns, named)
    yield from raw.reject_unnamed_images(named, "no JSON names this image")


def _make_rows(
    raw: RawFolder, record: dict[str, Any], where: str, folder: str, columns: tuple[str, ...], named: set[str]
) -> Iterator[RawRow | Reject]:
    """Yield the rows of a record, and add its images to `named`."""
    persian = raw.config.script == "persian"
    values = [value for column in columns for value in tables.cell_values(record.get(column))]
    texts = [text for value in values if (text := captions.clean(value, persian=persian))]
    images, rejects = _find_images(raw, record, where, folder)
    named.update(images)
    yield from rejects
    if not texts or not images:
        if not texts:
            yield Reject(where, folder, f"no text in {', '.join(columns)}")
        elif not rejects:
            yield Reject(where, folder, "no image in image_path or folder_path, and none beside the JSON")
        return
    passage = captions.text_id(texts[-1])
    extra = {
        key: text
        for key in record
        if key not in (*columns, "image_path", "folder_path", "image", "images")
        and (text := captions.clean(" ".join(tables.cell_values(record[key])), persian=persian))
    }
    for image in images:
        yield from raw.make_rows(RawImage(image, texts, where, passage, (passage,), extra=extra or None))


def _find_images(raw: RawFolder, record: dict[str, Any], where: str, folder: str) -> tuple[list[str], list[Reject]]:
    """Return the images that a record means: those of image_path, else all of folder_path, else all beside the JSON."""
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
    image_folder = folder
    for path in tables.cell_values(record.get("folder_path")):
        located = _locate_folder(raw, path.strip().rstrip("/\\"), folder)
        if located is None:
            return [], [Reject(where, path, "no such folder in the source")]
        image_folder = located
    inside = raw.source.images_by_folder.get(image_folder, [])
    return [name for name in inside if PurePosixPath(name).suffix and not mask_reason(name, raw.source)], []


def _locate_folder(raw: RawFolder, path: str, folder: str) -> str | None:
    """Return the folder that a JSON in `folder` names: from the source, the JSON, or one above, or by its last part."""
    path = path.replace("\\", "/").removeprefix("./")
    above = str(PurePosixPath(folder).parent).removeprefix(".")
    for candidate in (path, f"{folder}/{path}", f"{above}/{path}".strip("/")):
        if candidate.strip("/") in raw.source.images_by_folder:
            return candidate.strip("/")
    # A path of another machine is known by its last part, which is the name of the JSON's own folder.
    return folder if PurePosixPath(path).name == PurePosixPath(folder).name or path in ("", ".") else None
