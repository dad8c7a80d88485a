"""What a layout reads and gives: a raw folder under its settings -> rows and rejects.

A row is one picture with one text. A layout says which file, which texts of its own, which classes and groups; how
texts are cleaned, limited and, where there are none, made from templates is the same for all and stands here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlkit.config.data import PrepConfig
from vlkit.data import captions
from vlkit.data.prep import tables
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.errors import DataError, UsageError, suggest_name
from vlkit.storage import Location


class RawRow(NamedTuple):
    """One picture with one text.

    Attributes:
        image: the picture's name in the source of the pictures.
        groups: what makes a match; several where the picture has several conditions.
        unit: what must not be torn apart by the split.
        classes: none, one or several.
        where: its place for messages, a file and a line.
        split: where the source puts it, if it does.
        extra: further columns of the source.
    """

    image: str
    text: str
    groups: tuple[str, ...]
    unit: str
    classes: tuple[str, ...]
    where: str
    split: str | None = None
    extra: Mapping[str, str | None] | None = None


class Reject(NamedTuple):
    """Something left out, and why: a reason that others share, and a detail of its own."""

    where: str
    item: str
    reason: str
    detail: str = ""


class RawImage(NamedTuple):
    """A picture with what its source says of it, before it has become rows."""

    image: str
    texts: Sequence[str]
    where: str
    unit: str
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    split: str | None = None
    fields: Mapping[str, str] = {}
    extra: Mapping[str, str | None] | None = None


class RawFolder:
    """A raw folder under its settings: the source of the tables, and that of the pictures."""

    def __init__(self, config: PrepConfig) -> None:
        self.config = config
        self.layout = config.layout
        location, self.table = config.source, config.table
        if is_table(location):
            # --source names the table itself.
            self.table, location = location.name, location.parent
        without = [config.out] if config.out is not None else []
        self.source = SourceFolder(location, without)
        prepared = (
            {"pairs.parquet", "data.yaml"} <= set(os.listdir(self.source.root)) if self.source.remote is None else False
        )
        if prepared:
            told = f"{location} is a prepared folder already"
            raise DataError(told, hint=f"use it: vlkit train-retrieval --data {location}")
        self.pictures = SourceFolder(config.image_root, without, "--image-root") if config.image_root else self.source

    def check_templates(self, known: Collection[str]) -> None:
        """Refuse a template that names what no row has.

        Raises:
            UsageError: names the field and those that there are.
        """
        for template in self.config.templates:
            for name in captions.template_fields(template):
                if name not in {*known, *self.class_fields}:
                    told = f"the template {template!r} names {{{name}}}, which no row has"
                    raise UsageError(told, hint=suggest_name(name, sorted({*known, *self.class_fields})))

    def rows_of(self, item: RawImage) -> Iterator[RawRow | Reject]:
        """An item's rows: its own texts, and the templates' where it has none of its own (or for all, if asked)."""
        own = list(dict.fromkeys(text for text in map(self._cleaned, item.texts) if text))
        groups = item.groups or item.classes or (item.image,)
        captioned = [(text, groups) for text in own]
        if not own or self.config.templates_for == "all":
            captioned += self._from_templates(item, groups)
        if not captioned:
            yield Reject(item.where, item.image, "no text" if item.classes else "no text and no class")
        for text, of in dict(captioned).items():
            if (told := self._length(text)) is not None:
                yield Reject(item.where, item.image, told)
                continue
            # A template speaks of one class: its row is first of that one.
            classes = (*of, *(c for c in item.classes if c not in of)) if set(of) <= set(item.classes) else item.classes
            yield RawRow(item.image, text, of, item.unit, classes, item.where, item.split, item.extra)

    def _from_templates(self, item: RawImage, groups: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
        made = []
        for class_name in item.classes:
            words = captions.readable_class(class_name)
            named = {column: words for column in self.class_fields}
            for template in self.config.templates:
                text = captions.fill_template(template, {**item.fields, **named})
                if text:
                    made.append((text, groups if item.groups else (class_name,)))
        return made

    @cached_property
    def class_fields(self) -> tuple[str, ...]:
        """Names under which a template finds the class."""
        return ("class_name", "condition", *self.config.label_column)

    def _cleaned(self, text: Any) -> str:
        return captions.clean(text, persian=self.config.script == "persian")

    def _length(self, text: str) -> str | None:
        words = len(text.split())
        if self.config.min_words is not None and words < self.config.min_words:
            return f"a text of fewer than {self.config.min_words} words"
        if self.config.max_words is not None and words > self.config.max_words:
            return f"a text of more than {self.config.max_words} words"
        return None

    def locate(self, name: str, beside: str = "") -> str:
        """The picture that is meant by `name`; DataError says why there is none."""
        return self.pictures.locate(name, beside if self.pictures is self.source else "", listed=self.listed)

    @property
    def listed(self) -> bool:
        """The source's files were listed; not so where pictures are not looked at."""
        return self.config.check_images

    def unnamed(self, named: set[str], reason: str) -> Iterator[Reject]:
        """The pictures that no row names; masks under their own reason."""
        if not self.listed or self._wide:
            return
        for name in self.pictures.pictures:
            if name not in named and PurePosixPath(name).suffix:
                yield Reject(name, name, mask_reason(name, self.pictures) or reason)

    @property
    def _wide(self) -> bool:
        """The pictures' root holds more than this source: what lies there besides is not ours to list."""
        root = self.pictures.location
        if self.pictures is self.source or root.is_remote or self.source.location.is_remote:
            return False
        return Path(self.source.root.resolve()).is_relative_to(root.path.resolve())

    def closed(self) -> Iterator[Reject]:
        """Folders that could not be read, links that lead out or nowhere, what is no file."""
        for source in dict.fromkeys((self.source, self.pictures)):
            for name, reason in sorted(source.refused.items()):
                shown = os.fsencode(name).decode("utf-8", "replace")
                yield Reject(shown, shown, reason)


def is_table(location: Location) -> bool:
    """The source names a table, not a folder."""
    if location.is_remote:
        return PurePosixPath(location).suffix.lower() in tables.SUFFIXES
    return location.path.is_file()


MASK_FOLDERS = frozenset(
    ["mask", "masks", "segmentation", "segmentations", "ground_truth", "groundtruth", "annotations"]
)
MASK_ENDS = ("mask", "masks", "seg", "segmentation", "superpixels", "groundtruth", "gt")
MASKED_FOLDERS = ("image", "images", "img", "imgs", "original", "originals", "orig")


def mask_reason(name: str, source: SourceFolder) -> str | None:
    """Why a picture is taken for a mask, else None: there is the picture that it masks.

    That lies beside it under the name without its end (`7_mask.png` by `7.png`), or above or beside a folder of masks
    (`masks/7.png` by `7.png` or `images/7.png`). A class may well be called mask.
    """
    path = PurePosixPath(name)
    stem = path.stem.lower().rstrip("0123456789").rstrip("_- ") or path.stem.lower()
    end = next((end for end in MASK_ENDS for mark in "_-. " if stem.endswith(mark + end)), None)
    masked = path.stem[: len(stem) - len(end) - 1] if end else None
    if masked and source.has_stem(str(path.with_name(masked))):
        return "a mask, by its name beside the picture"
    folders = path.parts[:-1]
    for place, folder in enumerate(folders):
        if folder.lower() in MASK_FOLDERS:
            for instead in ((), *((each,) for each in MASKED_FOLDERS)):
                parts = (*folders[:place], *instead, *folders[place + 1 :])
                if any(source.has_stem("/".join((*parts, each))) for each in (path.stem, masked) if each):
                    return "a mask, by its folder"
    return None


def reject_from_error(error: DataError, where: str, item: str) -> Reject:
    """A DataError about one file as a reject."""
    return Reject(where, item, error.message, error.hint or "")
